"""lib.data: every form a data set may have becomes one Dataset; every bad one raises one clear ValueError."""

import dataclasses
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import data
from lib.data import Dataset, inputs, load, pool, validate

CIFAR10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10.tar.xz"
RNG = np.random.default_rng(0)
X, Y = RNG.normal(3, 2, (40, 5)).astype(np.float32), np.arange(40) % 4
TRAIN, TEST = {"cat": 6, "dog": 10}, {"cat": 2, "dog": 3}


def png(mode="RGB", size=(6, 4), seed=0, kind="PNG"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def tree(folder, train=TRAIN, test=TEST, **how):
    for split, counts in (("train", train), ("test", test)):
        for name, n in counts.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                content = png(seed=[len(split), len(name) + ord(name[0]), i], **how)
                (folder / split / name / f"{i}.png").write_bytes(content)
    return folder


def archive(folder, path, lead=""):
    files = sorted(folder.rglob("*.png"), reverse=True)  # an order unlike the tree's
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as out:
            for file in files:
                out.write(file, f"{lead}{file.relative_to(folder)}")
    else:
        with tarfile.open(path, "w:" + (path.suffix[1:] if path.suffix != ".tar" else "")) as out:
            for file in files:
                out.add(file, f"{lead}{file.relative_to(folder)}")
    return path


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "d.npz", **arrays)
    return tmp_path / "d.npz"


def toy(counts=(6, 9, 25), n_test=30):
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.arange(len(y), dtype=np.float32)[:, None]
    return Dataset("toy", x, y, x[:n_test], np.arange(n_test) % len(counts), ("a", "b", "c"))


def test_digits():
    d = load("digits")
    assert d.x.shape == (1200, 1, 8, 8) and d.x_test.shape == (597, 1, 8, 8) and d.x.dtype == np.float32
    assert (d.x.min(), d.x.max(), d.n_classes, d.is_image) == (0, 1, 10, True)
    shares = np.bincount(d.y) / 1200 - np.bincount(d.y_test) / 597
    assert np.abs(shares).max() < 0.002 and load("digits").hash == d.hash
    np.testing.assert_array_equal(inputs(d)[0], d.x)


@pytest.mark.parametrize("mode,channels", [("L", 1), ("RGB", 3), ("RGBA", 3)])
def test_folder_of_images(tmp_path, mode, channels):
    d = load("folder", tree(tmp_path / "t", mode=mode), tmp_path / "cache")
    assert d.x.shape == (16, channels, 4, 6) and d.x_test.shape == (5, channels, 4, 6) and d.x.dtype == np.uint8
    assert d.classes == ("cat", "dog") and np.bincount(d.y).tolist() == [6, 10] and d.y.dtype == np.int64
    with Image.open(tmp_path / "t" / "train" / "dog" / "0.png") as image:
        expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(4, 6, channels)
    np.testing.assert_array_equal(d.x[6], expected.transpose(2, 0, 1))


def test_one_colour_image_makes_grey_ones_rgb(tmp_path):
    grey = load("folder", tree(tmp_path / "t", mode="L"), tmp_path / "cache")
    (tmp_path / "t" / "test" / "dog" / "9.JPG").write_bytes(png(kind="JPEG"))
    both = load("folder", tmp_path / "t", tmp_path / "cache")
    assert both.x_test.shape == (6, 3, 4, 6)
    np.testing.assert_array_equal(both.x, np.repeat(grey.x, 3, axis=1))


def test_threads_and_many_blocks_keep_the_order(tmp_path):
    folder = tree(tmp_path / "t", {"a": 3, "b": 3}, {}, size=(64, 64))  # this size is decoded by threads
    small = tree(tmp_path / "s", {"a": 700, "b": 700}, {"a": 1}, mode="L", size=(2, 2))  # more than one block
    d, s = load("folder", folder, tmp_path / "cache"), load("folder", small, tmp_path / "cache")
    with Image.open(folder / "train" / "b" / "2.png") as image:
        assert any((np.asarray(image).transpose(2, 0, 1) == x).all() for x in d.x[d.y == 1])
    with Image.open(small / "train" / "b" / "99.png") as image:
        np.testing.assert_array_equal(s.x[-1, 0], np.asarray(image))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.zip"])
@pytest.mark.parametrize("lead", ["", "some/"])
def test_archives_equal_their_tree_and_write_nothing_else(tmp_path, name, lead):
    folder = tree(tmp_path / "t")
    file = archive(folder, tmp_path / ("a.tar.gz" if name == "a.tgz" else name), lead).rename(tmp_path / name)
    before = set(tmp_path.rglob("*"))
    without_suffix = load("folder", str(tmp_path / "a"), tmp_path / "cache")
    written = set(tmp_path.rglob("*")) - before
    assert {p.parent for p in written} == {tmp_path, tmp_path / "cache"} and len(written) == 2
    tree_hash = load("folder", folder, tmp_path / "cache").hash
    assert without_suffix.hash == tree_hash == load("folder", file, tmp_path / "cache").hash


def test_links_and_strays_in_archives_are_ignored(tmp_path):
    folder, link, out = tree(tmp_path / "t"), tarfile.TarInfo("train/cat/link.png"), tmp_path / "a.tar"
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive(folder, out)
    image = folder / "train" / "cat" / "0.png"
    with tarfile.open(out, "a") as tar:
        tar.addfile(link)
        for name in ("../train/cat/9.png", "train/../cat/9.png", "__MACOSX/train/cat/._0.png", "train/notes.png"):
            tar.add(image, name)
        absolute = tar.gettarinfo(image)
        absolute.name = "/train/cat/9.png"
        tar.addfile(absolute, io.BytesIO(image.read_bytes()))
    assert load("folder", out, tmp_path / "c").hash == load("folder", folder, tmp_path / "c").hash
    archive(folder, tmp_path / "z.zip")
    with zipfile.ZipFile(tmp_path / "z.zip", "a") as z:
        z.writestr("/train/cat/9.png", image.read_bytes())
        z.writestr("../train/cat/9.png", image.read_bytes())
    assert len(load("folder", tmp_path / "z.zip", tmp_path / "c").x) == 16
    with zipfile.ZipFile(tmp_path / "z.zip", "a") as z:
        info = zipfile.ZipInfo("train/cat/link.png")
        info.external_attr = 0o120777 << 16
        z.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="data=.*train/cat/link.png cannot be used"):  # read as it is, not followed
        load("folder", tmp_path / "z.zip", tmp_path / "c")


def test_without_a_test_folder_a_fifth_is_split_off(tmp_path):
    d = load("folder", tree(tmp_path / "t", {"cat": 20, "dog": 30}, {}), tmp_path / "cache")
    assert np.bincount(d.y).tolist() == [16, 24] and np.bincount(d.y_test).tolist() == [4, 6]


def test_cache_is_used_rebuilt_when_damaged_and_not_used_for_other_files(tmp_path, monkeypatch):
    folder, cache, decode = tree(tmp_path / "t"), tmp_path / "cache", data._decode
    first = load("folder", folder, cache)
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("decoded a second time"))
    assert load("folder", folder, cache).hash == first.hash
    monkeypatch.setattr(data, "_decode", decode)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    for damaged in (content[:-100], content[:300] + bytes([content[300] ^ 1]) + content[301:], b"", b"text"):
        file.write_bytes(damaged)
        assert load("folder", folder, cache).hash == first.hash
        assert file.read_bytes() != damaged
    (folder / "train" / "cat" / "0.png").write_bytes(png(seed=99))
    assert load("folder", folder, cache).hash != first.hash and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("spoil,match", [
    (lambda f: (f / "train/cat/0.png").write_bytes(png(size=(5, 4))), r"cat/0.*\(4, 5\).*\(4, 6\)"),
    (lambda f: (f / "train/dog/7.png").write_bytes(png()[:60]), "train/dog/7.png"),
    (lambda f: (f / "train/dog/7.png").write_bytes(b"GIF89a"), "train/dog/7.png"),
    (lambda f: Image.new("I;16", (6, 4)).save(f / "train/dog/7.png"), "train/dog/7.png.*I;16"),
    (lambda f: (f / "train").rename(f / "training"), "no training images.*train/<class>"),
    (lambda f: (f / "test/cat").rename(f / "test/cow"), r"test part has labels \['cow'\]"),
    (lambda f: [(f / f"train/cat/{i}.png").unlink() for i in range(5)], "class 'cat' has 1"),
])  # fmt: skip
def test_bad_folders(tmp_path, spoil, match):
    spoil(tree(tmp_path / "t"))
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("folder", tmp_path / "t", tmp_path / "cache")
    assert not [p for p in tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.xz", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize("part", [0, 0.1, 0.6])
def test_damaged_archives(tmp_path, name, part):
    file = archive(tree(tmp_path / "t"), tmp_path / name)
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(ValueError, match="data=.*a whole archive .* is needed; it cannot be read"):
        load("folder", file, tmp_path / "cache")


def test_ambiguous_archives(tmp_path):
    folder, file = tree(tmp_path / "t"), tmp_path / "a.tar"
    archive(folder, file)
    with tarfile.open(file, "a") as tar:
        tar.add(folder / "train" / "cat" / "0.png", "more/train/cat/0.png")
    with pytest.raises(ValueError, match=r"data=.*below \['.', 'more'\]; one leading folder"):
        load("folder", file, tmp_path / "cache")
    archive(folder, tmp_path / "a.zip")
    with pytest.raises(ValueError, match="data=.*could be any of a.tar, a.zip"):
        load("folder", tmp_path / "a", tmp_path / "cache")


def test_a_tar_cut_between_its_files_is_noticed(tmp_path):
    file = archive(tree(tmp_path / "t"), tmp_path / "a.tar")
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-2].offset
    os.truncate(file, end)
    with pytest.raises(ValueError, match="data=.*end is missing"):
        load("folder", file, tmp_path / "cache")


def test_cifar_wants_its_own_classes_and_takes_an_image_tree(tmp_path):
    names = {f"c{i}": 2 for i in range(10)}
    d = load("cifar10", tree(tmp_path / "t", names, names, size=(32, 32)), tmp_path / "cache")
    assert (d.name, d.x.shape, d.n_classes) == ("cifar10", (20, 3, 32, 32), 10)
    with pytest.raises(ValueError, match="data=.*10 classes.*cifar100 has 100"):
        load("cifar100", tmp_path / "t", tmp_path / "cache")


def test_cifar_from_torchvision_is_unpickled_only_after_its_checksum(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder, ran = tmp_path / "cifar-10-batches-py", tmp_path / "ran"
    folder.mkdir()
    batch = {"data": RNG.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
    contents = {"a": batch, "batches.meta": {"label_names": list("abcdefghij")}}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR10, "train_list", [["a", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["a", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    d = load("cifar10", tmp_path)
    np.testing.assert_array_equal(d.x, batch["data"].reshape(20, 3, 32, 32))
    monkeypatch.setattr(CIFAR10, "train_list", [["a", "0" * 32]])
    (folder / "a").write_bytes(b"cos\nmkdir\n(V" + os.fsencode(ran) + b"\ntR.")  # what unpickling it would do
    with pytest.raises(ValueError, match="data=.*cifar10 .*checksum"):
        load("cifar10", tmp_path)
    assert not ran.exists()


def test_a_failed_download_says_how_to_give_data(tmp_path, monkeypatch):
    from torchvision import datasets

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(ValueError, match="data=None: cifar10 could not be downloaded .*cifar-10-batches-py"):
        load("cifar10")


def test_npz_twins_have_one_hash_and_one_byte_changes_it(tmp_path):
    d = load("npz", npz(tmp_path, x=X, y=Y, x_test=X, y_test=Y))
    forms = [{"y": np.eye(4)[Y]}, {"y": Y.astype(float)}, {"y": Y.astype(np.uint8)}, {"x": X.astype(">f8")}]
    for form in forms:
        assert load("npz", npz(tmp_path, **{"x": X, "y": Y, "x_test": X, "y_test": Y, **form})).hash == d.hash
    other = load("npz", npz(tmp_path, features=X, labels=Y, features_test=X, labels_test=Y, ids=np.array([{}])))
    assert other.hash == d.hash and not d.is_image and d.classes == ("0", "1", "2", "3")
    for part in ("x", "y", "x_test", "y_test"):
        changed = getattr(d, part).copy()
        changed.view(np.uint8).flat[0] ^= 1
        assert dataclasses.replace(d, **{part: changed}).hash != d.hash
    assert dataclasses.replace(d, classes=("0", "1", "2", "x")).hash != d.hash


def test_npz_split_and_labels(tmp_path):
    d = load("npz", npz(tmp_path, x=X, y=np.array([7, -2, 30, 5])[Y]))
    assert d.classes == ("-2", "5", "7", "30") and sorted(np.bincount(d.y_test)) == [2, 2, 3, 3]
    named = load("npz", npz(tmp_path, x=X, y=np.array(["c", "a", "d", "b"])[Y]))
    assert named.classes == ("a", "b", "c", "d") and (named.y == d.y).all() and (named.x == d.x).all()
    rows = [(X == row).all(axis=1).argmax() for row in [*d.x, *d.x_test]]  # where each one stood in the file
    assert sorted(rows) == list(range(40))
    assert [d.classes[c] for c in [*d.y, *d.y_test]] == [("7", "-2", "30", "5")[row % 4] for row in rows]


@pytest.mark.parametrize("shape,expected", [
    ((40, 6, 7, 3), (3, 6, 7)), ((40, 3, 6, 7), (3, 6, 7)), ((40, 6, 7, 1), (1, 6, 7)),
    ((40, 1, 5, 3), (1, 5, 3)), ((40, 6, 7), (1, 6, 7)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz_images_become_channels_first(tmp_path, shape, expected, dtype):
    x = RNG.integers(0, 256, shape).astype(dtype)
    d = load("npz", npz(tmp_path, x=x, y=Y, x_test=x, y_test=Y))
    assert d.x.shape[1:] == expected and d.x.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    last = shape[-1] in (1, 3) and shape[1] not in (1, 3)
    np.testing.assert_array_equal(d.x, np.moveaxis(x, 3, 1) if last else x.reshape(40, *expected))


@pytest.mark.parametrize("arrays,match", [
    ({"x": X}, r"holds the arrays \['x'\]; needed are x, y"),
    ({"x": X, "y": Y, "x_test": X}, "y_test"),
    ({"x": X, "y": Y[:-1]}, r"x is float32 \[40, 5\] and y int64 \[39\]"),
    ({"x": X, "y": Y, "x_test": X, "y_test": Y[:-1]}, r"x_test is .*\[40, 5\] and y_test int64 \[39\]"),
    ({"x": X, "y": Y, "x_test": X[:, :4], "y_test": Y}, "axis 0"),
    ({"x": X.astype(object), "y": Y}, "not a readable .npz of numbers .Object arrays"),
    ({"x": X.astype(str), "y": Y}, "x is <U"),
    ({"x": np.where(X == X[3, 2], np.nan, X), "y": Y}, "NaN"),
    ({"x": X.astype(float) * 1e300, "y": Y}, "infinity"),
    ({"x": X[:0], "y": Y[:0]}, r"x is float32 \[0, 5\].*N > 0"),
    ({"x": X[0], "y": Y}, "x is float32"),
    ({"x": np.zeros((40, 5, 5, 5)), "y": Y}, "axis 1 or 3"),
    ({"x": X, "y": np.eye(4)[Y] * 0.9}, "y is .*one-hot rows"),
    ({"x": X, "y": np.eye(4)[Y] + np.eye(4)[0]}, "y is .*one-hot rows"),
    ({"x": X, "y": Y + 0.5}, "y is float64 .*whole numbers"),
    ({"x": X, "y": np.where(Y == 1, np.nan, Y)}, "y is float64 .*whole numbers"),
    ({"x": X, "y": Y.astype(bytes)}, r"y is \|S"),
    ({"x": X, "y": Y, "x_test": X, "y_test": Y + 1}, r"labels \[4\]"),
    ({"x": X, "y": Y * 0}, "at least two classes"),
    ({"x": X, "y": np.where(np.arange(40) == 5, 9, Y)}, "class '9' has 1"),
])  # fmt: skip
def test_bad_npz(tmp_path, arrays, match):
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("npz", npz(tmp_path, **arrays))


@pytest.mark.parametrize("spoil", [lambda b: b"hello", lambda b: b"", lambda b: b[:400], lambda b: b[:-20]])
def test_files_that_are_no_npz(tmp_path, spoil):
    file = npz(tmp_path, x=X, y=Y)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match="data=.*not a readable .npz"):
        load("npz", file)
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(ValueError, match="data=.*not a readable .npz"):
        load("npz", tmp_path / "x.npy")


@pytest.mark.parametrize("name,path,error,match", [
    ("mnist", None, ValueError, "dataset='mnist'.*digits, cifar10"),
    ("digits", "x", ValueError, "data='x'.*digits"),
    ("npz", None, ValueError, "data=None.*npz"),
    ("folder", None, ValueError, "data=None.*folder"),
    ("folder", "", ValueError, "data=''"),
    ("npz", 3, ValueError, "data=3"),
    ("folder", __file__, ValueError, "data=.*archive"),
    ("cifar10", "no/such", FileNotFoundError, "data='no/such'.*tar.xz"),
    ("npz", "no/such.npz", FileNotFoundError, "data='no/such.npz'"),
])  # fmt: skip
def test_bad_names_and_paths(name, path, error, match, tmp_path):
    with pytest.raises(error, match=match):
        load(name, path, tmp_path)


def test_pool_is_stratified_even_and_set_by_its_seed():
    d = toy()
    p, same, other = pool(d, 20, seed=1), pool(d, 20, seed=1), pool(d, 20, seed=2)
    assert np.bincount(p.y).tolist() in ([3, 4, 13], [3, 5, 12]) and len(np.unique(p.x)) == 20
    assert p.hash == same.hash != other.hash and (np.diff(p.x[:, 0]) < 0).any()
    np.testing.assert_array_equal(d.y[p.x[:, 0].astype(int)], p.y)
    assert np.bincount(pool(d, 6).y).tolist() == [2, 2, 2]
    assert pool(d).hash == d.hash and sorted(pool(d, 40).x) == sorted(d.x) and pool(d, 40).hash != d.hash
    assert len(pool(toy((6, 9, 26))).y) == 40
    assert np.bincount(pool(d, n_test=15).y_test).tolist() == [5, 5, 5] and len(pool(d, n_test=15).y) == 40


@pytest.mark.parametrize("name,value", [("n_examples", v) for v in (7, 42, 4, 2, 0, -2, 8.0, True)]
                         + [("n_test", v) for v in (0, 31)] + [("seed", -1)])  # fmt: skip
def test_bad_pools(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: needs"):
        pool(toy(), **{name: value})


def test_validate_a_dataset_made_by_hand():
    d = toy()
    bad = [("y", d.y + 1), ("y", d.y - 1), ("y_test", d.y_test + 1), ("y", d.y.astype(float)), ("x", d.x[1:])]
    bad += [("x", d.x.astype(object)), ("x_test", d.x_test + np.inf), ("y", np.where(d.y == 0, 1, d.y))]
    for part, value in bad:
        with pytest.raises(ValueError, match=r"^(x|y|x_test|y_test)\b.*(needed|valid)"):
            validate(dataclasses.replace(d, **{part: value}))
    assert validate(d) is d


def test_inputs_are_normalised_by_the_pool(tmp_path):
    x = RNG.integers(0, 256, (40, 3, 4, 4)).astype(np.uint8)
    x[:, 2] = 7  # a constant channel
    d = load("npz", npz(tmp_path, x=x, y=Y, x_test=x[:8] // 2, y_test=Y[:8]))
    z, z_test = inputs(d)
    scaled, mean, std = x[:, :2] / 255, x[:, :2].mean((0, 2, 3)) / 255, x[:, :2].std((0, 2, 3)) / 255
    np.testing.assert_allclose(z[:, :2], (scaled - mean[:, None, None]) / std[:, None, None], atol=1e-5)
    expected = (d.x_test[:, :2] / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(z_test[:, :2], expected, atol=1e-5)
    assert z.dtype == z_test.dtype == np.float32 and not z[:, 2].any() and not z_test[:, 2].any()
    assert d.x.dtype == np.uint8 and d.x[0, 2, 0, 0] == 7


def test_inputs_of_features(tmp_path):
    x = np.hstack([X, np.full((40, 1), 1e6 / 3, np.float32)])
    z, _ = inputs(load("npz", npz(tmp_path, x=x, y=Y, x_test=x, y_test=Y)))
    np.testing.assert_allclose(z[:, :5], (X - X.mean(0)) / X.std(0), atol=1e-5)
    assert not z[:, 5].any()


@pytest.mark.skipif(not CIFAR10.exists(), reason="needs ../shared/data/cifar10.tar.xz")
def test_real_cifar10(tmp_path, monkeypatch):
    d = load("cifar10", CIFAR10.with_name("cifar10"), tmp_path)
    assert d.x.shape == (50_000, 3, 32, 32) and d.x_test.shape == (10_000, 3, 32, 32)
    assert set(np.bincount(d.y)) == {5000} and d.classes[:3] == ("airplane", "automobile", "bird")
    assert 0.44 < d.x.mean() / 255 < 0.51 and d.n_classes == 10
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("decoded a second time"))
    assert load("cifar10", CIFAR10, tmp_path).hash == d.hash

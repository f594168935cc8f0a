"""No download is trusted, no pickle runs, no archive writes, no page has a script, no file is everyone's to change."""

import ast
import hashlib
import io
import os
import pickle
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jupytext
import numpy as np
import pytest
from PIL import Image

from lib.data import sources
from lib.data.dataset import load
from lib.study import own_logits, report
from lib.study.settings import ROOT
from lib.training.store import Rows
from tests.study.test_report import audit_of_hostile_names, hostile_notebook
from tests.test_data import cifar_contents, cifar_files, png, tree

OURS = [*sorted((ROOT / "lib").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
OURS += sorted((ROOT / "notebooks").glob("*.py"))


class Evil:
    """Its unpickling makes a folder: what an attacker would run in its place."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


# ---- downloads ----------------------------------------------------------------------------------------------


def calls(path):
    """[(dotted name of what is called, keyword arguments)] in a Python file."""
    tree = ast.parse(
        jupytext.writes(jupytext.read(path), "py:percent") if path.parent.name == "notebooks" else path.read_text()
    )
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords}) for n in found]


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_only_one_line_fetches_and_none_unpickles_or_evaluates(path):
    named = calls(path)
    fetched = [name for name, _ in named if re.search(r"urlopen|urlretrieve|\brequests\.|\bhub\.|from_url", name)]
    assert fetched == ["urlopen"] * (path.name == "sources.py")
    assert not any(keys.get("download") == "True" or keys.get("allow_pickle") == "True" for _, keys in named)
    for name, keys in named:
        assert not re.fullmatch(
            r"(eval|exec|pickle\.loads?|torch\.load|marshal\.\w+|(pd\.)?read_pickle|yaml\.load)", name
        )
        assert name != "np.load" or keys["allow_pickle"] == "False", path.name


def test_what_we_fetch_has_a_checksum_and_no_name_before_it(tmp_path):
    assert all(re.fullmatch(r"[0-9a-f]{64}", sources.SOURCES[name][1]) for name in sources.CIFAR)
    source, kept = tmp_path / "source", tmp_path / "data" / "kept"
    source.write_bytes(b"content")
    with pytest.raises(ValueError, match="fails its checksum: sha256"):
        sources._download(source.as_uri(), kept, "0" * 64)
    assert not list(kept.parent.iterdir())
    sources._download(source.as_uri(), kept, hashlib.sha256(b"content").hexdigest())
    assert kept.read_bytes() == b"content" and list(kept.parent.iterdir()) == [kept]


def test_a_download_that_is_not_what_was_published_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    url = (tmp_path / "cifar-10-python.tar.gz").as_uri()
    monkeypatch.setitem(sources.SOURCES, "cifar10", (url, sources.SOURCES["cifar10"][1], "none"))
    monkeypatch.setattr(sources, "ROOT", tmp_path / "root")
    with pytest.raises(ValueError, match="cifar10 could not be downloaded .*checksum"):
        load("cifar10")
    assert not list((tmp_path / "root" / "data").iterdir()) and not (tmp_path / "ran").exists()


# ---- pickles ------------------------------------------------------------------------------------------------


def evil_npz(path, ran, names):
    """An .npz whose arrays would run something if they were unpickled."""
    np.savez(path, **{name: np.array([Evil(ran)] * 4, dtype=object) for name in names})
    return path


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
    with np.load(evil_npz(tmp_path / "a.npz", tmp_path / "again", ["x"]), allow_pickle=True) as file:
        assert file["x"] is not None and (tmp_path / "again").exists()


def test_arrays_of_objects_are_refused_everywhere(tmp_path):
    ran = tmp_path / "ran"
    path = evil_npz(tmp_path / "a.npz", ran, ("x", "y"))
    with pytest.raises(ValueError, match="data=.*not a readable .npz"):
        load("npz", path)
    with pytest.raises(ValueError, match="logits.*no objects"):
        own_logits.read(evil_npz(tmp_path / "b.npz", ran, ("logits", "y", "member")))
    array = np.array([Evil(ran)] * 4, dtype=object)
    np.save(tmp_path / "logits.npy", array)
    assert len(Rows(tmp_path / "logits.npy", (), np.float32)) == 0
    assert not ran.exists()


def test_a_cache_of_objects_is_made_anew(tmp_path):
    folder, cache, ran = tree(tmp_path / "t"), tmp_path / "cache", tmp_path / "ran"
    first = load("folder", folder, cache)
    (file,) = cache.iterdir()
    evil_npz(file, ran, ("x", "y", "x_test", "y_test"))
    assert load("folder", folder, cache).hash == first.hash and not ran.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_the_right_checksum_still_runs_nothing(tmp_path, monkeypatch, protocol):
    _, contents = cifar_contents()
    contents["a"] = pickle.dumps(Evil(tmp_path / "ran"), protocol)
    cifar_files(monkeypatch, contents)
    for name, content in contents.items():
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
    with pytest.raises(ValueError, match="data=.*a pickle asks for (posix|nt).mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "numpy.load", "numpy.core.multiarray.fromfile"])
def test_no_other_name_is_found_by_the_unpickler(name):
    with pytest.raises(ValueError, match="a pickle asks for"):
        sources.Plain(io.BytesIO()).find_class(*name.rsplit(".", 1))


# ---- archives -----------------------------------------------------------------------------------------------

ESCAPES = ("../out.png", "../../train/cat/out.png", "train/../../out.png", "train/cat/../../../out.png", "/tmp/out.png",
           "C:\\train\\cat\\out.png", "train\\..\\..\\out.png", "train/cat/..", "./../train/cat/out.png")  # fmt: skip


def hostile_tar(path, folder, target):
    """A tar of images, and what would write to `target` if it were extracted as it stands."""
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
    with zipfile.ZipFile(path, "w") as out:
        for file in folder.rglob("*.png"):
            out.write(file, file.relative_to(folder))
        link = zipfile.ZipInfo("train/cat/link")
        link.external_attr = 0o120777 << 16
        out.writestr(link, str(target))
        for name in (*ESCAPES, str(target / "out.png")):
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
    before = everything_below(tmp_path)
    found = load("folder", path, tmp_path / "cache")
    new = everything_below(tmp_path) - before
    assert found.hash == load("folder", folder, tmp_path / "cache").hash
    assert {p.parent for p, _ in new} == {tmp_path / "cache"} and not list(target.iterdir())
    assert not Path("/tmp/out.png").exists()


@pytest.mark.parametrize("limit, match", [("MOST_IMAGE", "0.png has .* MB unpacked; at most"),
                                          ("MOST_ARCHIVE", "the most that is read")])  # fmt: skip
@pytest.mark.parametrize("form", ["folder", "zip", "tar.gz"])
def test_what_unpacks_to_too_much_is_refused_unread(tmp_path, monkeypatch, form, limit, match):
    path = folder = tree(tmp_path / "t")
    if form != "folder":
        path = (hostile_zip if form == "zip" else hostile_tar)(tmp_path / f"a.{form}", folder, tmp_path)
    monkeypatch.setattr(sources, limit, 100)
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("folder", path, tmp_path / "cache")


def test_a_bomb_of_zeros_costs_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("train/cat/0.png", bytes(sources.MOST_IMAGE + 1))
    assert os.path.getsize(tmp_path / "a.zip") < 1e6
    with pytest.raises(ValueError, match="0.png has 67 MB unpacked; at most 67 are read"):
        load("folder", tmp_path / "a.zip", tmp_path / "cache")


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    folder = tree(tmp_path / "t")
    Image.new("1", (9000, 9000)).save(folder / "train" / "cat" / "big.png")
    with pytest.raises(ValueError, match="big.png cannot be used: 9000 x 9000 pixels; at most 67 million"):
        load("folder", folder, tmp_path / "cache")


def test_an_npz_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 1000)), y=np.zeros(1000, int))
    np.savez_compressed(tmp_path / "b.npz", logits=np.zeros((2, 1000, 1000)), y=np.zeros(1000, int))
    monkeypatch.setattr(sources.os, "sysconf", lambda name: 1024)
    with pytest.raises(ValueError, match="its arrays take 0.0 GB, the memory is 0.0 GB"):
        load("npz", tmp_path / "a.npz")
    with pytest.raises(ValueError, match="b.npz: .*the memory is"):
        own_logits.read(tmp_path / "b.npz")


# ---- modes --------------------------------------------------------------------------------------------------


def everything(folder):
    """Write one of everything: stores, results, figures, reports, caches, a download, an audit."""
    from benchmarks import faults

    folder = Path(folder)
    faults.small(folder)
    hostile_notebook(folder / "out" / "01_a.ipynb")
    report.build(folder / "out")
    load("folder", tree(folder / "images"), folder / "store" / "cache")
    (folder / "source").write_bytes(b"x")
    known = hashlib.sha256(b"x").hexdigest()
    sources._download((folder / "source").as_uri(), folder / "data" / "kept", known)
    audit_of_hostile_names(folder / "audit")


def test_no_file_is_world_writable_even_where_the_user_allows_it(tmp_path):
    code = "import os, sys; os.umask(0); from tests.test_safety import everything; everything(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [p for p in (tmp_path / "run").rglob("*") if not p.is_symlink()]
    suffixes = {p.suffix for p in written}
    assert {".npy", ".npz", ".json", ".csv", ".png", ".html", ".lock"} <= suffixes and len(written) > 50
    loose = [str(p.relative_to(tmp_path)) for p in written if stat.S_IMODE(p.stat().st_mode) & stat.S_IWOTH]
    assert not loose

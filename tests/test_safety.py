"""Nothing unpickles, evaluates or downloads by itself, and no file is world-writable. More in each room's tests."""

import ast
import importlib
import os
import re
import stat

import jupytext
import numpy as np
import pytest

import lib
from benchmarks import faults
from lib.data.dataset import load
from lib.study import own_logits, report
from lib.study.settings import ROOT
from lib.training.store import Rows
from tests.data.files import Evil, evil_npz, tree
from tests.processes import ended, start
from tests.study.test_report import audit_of_hostile_names, hostile_notebook

OURS = [*sorted((ROOT / "lib").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
OURS += sorted((ROOT / "notebooks").glob("*.py"))


def calls(path):
    """[(dotted name of what is called, keyword arguments)] in a Python file."""
    tree = ast.parse(
        jupytext.writes(jupytext.read(path), "py:percent") if path.parent.name == "notebooks" else path.read_text()
    )
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords}) for n in found]


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_no_line_fetches_unpickles_or_evaluates(path):
    named = calls(path)
    fetched = [name for name, _ in named if re.search(r"urlopen|urlretrieve|\brequests\.|\bhub\.|from_url", name)]
    assert not fetched  # torchvision downloads CIFAR, and compares its checksums
    assert not any(keys.get("download") == "True" or keys.get("allow_pickle") == "True" for _, keys in named)
    for name, keys in named:
        assert not re.fullmatch(
            r"(eval|exec|pickle\.loads?|torch\.load|marshal\.\w+|(pd\.)?read_pickle|yaml\.load)", name
        )
        assert name != "np.load" or keys["allow_pickle"] == "False", path.name


def test_arrays_of_objects_are_refused_everywhere(tmp_path):
    ran = tmp_path / "ran"
    with pytest.raises(ValueError, match="b.npz: logits: Object arrays"):
        own_logits.models("b", evil_npz(tmp_path / "b.npz", ran, ("logits", "y", "member")))
    np.save(tmp_path / "logits.npy", np.array([Evil(ran)] * 4, dtype=object))
    assert len(Rows(tmp_path / "logits.npy", (), np.float32).read()) == 0
    assert not ran.exists()


def test_logits_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "b.npz", logits=np.zeros((2, 1000, 1000)), y=np.zeros(1000, int))
    monkeypatch.setattr("os.sysconf", lambda name: 1024)
    with pytest.raises(ValueError, match="b.npz: .*memory"):
        own_logits.models("b", tmp_path / "b.npz")


# ---- modes --------------------------------------------------------------------------------------------------


def everything(folder):
    """Where the user allows all, write one of everything: stores, results, figures, reports, caches, an audit."""
    os.umask(0)
    importlib.reload(lib)  # as if it were imported only now
    faults.small(folder)
    hostile_notebook(folder / "out" / "01_a.ipynb")
    report.build(folder / "out")
    load("folder", tree(folder / "images"), folder / "store" / "cache")
    audit_of_hostile_names(folder / "audit")


def test_no_file_is_world_writable_even_where_the_user_allows_it(tmp_path):
    assert ended(start(everything, tmp_path / "run", said=tmp_path / "said")) == 0, (tmp_path / "said").read_text()
    written = [p for p in (tmp_path / "run").rglob("*") if not p.is_symlink()]
    suffixes = {p.suffix for p in written}
    assert {".npy", ".npz", ".json", ".csv", ".png", ".html", ".lock"} <= suffixes and len(written) > 50
    loose = [str(p.relative_to(tmp_path)) for p in written if stat.S_IMODE(p.stat().st_mode) & stat.S_IWOTH]
    assert not loose

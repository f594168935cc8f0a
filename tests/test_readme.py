"""The README's lines, typed as they stand, and its tables against the committed runs."""

import re

import numpy as np
import pytest

from lib.study import ROOT
from tools import readme

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


@pytest.fixture
def names():
    """What the README's first lines take as given: two ensembles' logits and who trained on what."""
    rng = np.random.default_rng(0)
    y, member = rng.integers(0, 3, 200), np.zeros((8, 200), bool)
    for k in range(0, 8, 2):
        member[k, rng.permutation(200)[:100]] = True
        member[k + 1] = ~member[k]
    made = {"y": y, "member": member}
    for name, gain in (("logits", 3.0), ("logits_a", 1.0), ("logits_b", 2.0)):
        made[name] = rng.normal(size=(8, 200, 3))
        made[name][:, np.arange(200), y] += gain * member
    return made


def test_the_blocks_run_in_order_as_written(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        exec(block, names)
    said = capsys.readouterr().out
    assert len(BLOCKS) >= 3 and said.count("auc") >= 3 and "train_loss" in said
    assert names["metrics"].auc_cells(names["scores"]["lira"], names["member"]).mean() > 0.6


def test_blocks_are_short():
    assert all(block.count("\n") <= 10 for block in BLOCKS)


def test_no_table_is_typed():
    assert readme.filled(TEXT) == TEXT, "the tables differ from outputs/reference/: run make sync"


def test_every_path_it_names_exists():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT) + re.findall(r"`(lib/\w+\.py)`", TEXT):
        assert (ROOT / path).exists(), path

"""The notebooks' cells with other parameters than the study's, in an IPython without a kernel."""

import re
from pathlib import Path

import jupytext
import matplotlib
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from sklearn.datasets import load_digits

from lib.study.settings import ROOT
from tests.processes import ended, start

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def run_cells(book, given):
    """Run a notebook's cells in an IPython of this process, as for a reader who has changed its parameters."""
    matplotlib.use("agg")
    shell = InteractiveShell()
    for cell in jupytext.read(book).cells:
        sources = [cell.source] * (cell.cell_type == "code")
        if "parameters" in cell.metadata.get("tags", []):
            sources.append("\n".join(["# Parameters", *(f"{name} = {value!r}" for name, value in given.items())]))
        for source in sources:
            shell.run_cell(source, store_history=True).raise_error()


ODD = {"preset": "tiny", "n_models": 24, "n_examples": 90, "epochs": 2, "subset": 0.6, "batch_size": 7, "seed": 2,
       "optimizers": "adam,sam+adam,sam", "lr": 0.01}  # fmt: skip


# names of classes that TeX, Markdown, HTML, format strings or a legend would take for something else
NAMES = np.array(["$0_to_$10", "{1}", "50%", "_x_", "<b>&", r"a\$b_$c", "[1](x)", "a`b", "5 $", "*π^2*"])


@pytest.fixture(scope="module")
def odd_store(tmp_path_factory):
    """What one notebook has trained with the odd parameters, the next one need not train again; and the data."""
    folder, digits = tmp_path_factory.mktemp("odd"), load_digits()
    np.savez(folder / "digits.npz", x=digits.images[:800], y=NAMES[digits.target[:800]])
    return folder


@pytest.mark.parametrize("source", SOURCES[::-1], ids=lambda p: p.stem)
def test_each_notebook_runs_by_itself_with_odd_parameters(odd_store, tmp_path, source):
    data = str(odd_store / "digits.npz")
    given = {**ODD, "dataset": "npz", "data": data, "store": str(odd_store), "out": str(tmp_path / "50% $a_$b {c}")}
    assert ended(start(run_cells, source, given, said=tmp_path / "said")) == 0, (tmp_path / "said").read_text()[-3000:]
    made = pd.read_csv(Path(given["out"]) / ("verdict.csv" if "verdict" in source.stem else "results.csv"), dtype=str)
    assert set(made.notebook.str[:2]) >= ({"01"} if "verdict" in source.stem else {source.stem[:2]})


def test_a_misspelt_parameter_fails_before_training(tmp_path):
    given = {"n_model": 16, "store": str(tmp_path / "store"), "out": str(tmp_path)}
    assert ended(start(run_cells, SOURCES[2], given, said=tmp_path / "said")) == 1
    assert re.search("ValueError: .*n_model", (tmp_path / "said").read_text()) and not (tmp_path / "store").exists()

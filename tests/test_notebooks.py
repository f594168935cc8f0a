"""The notebooks as tests: run on a tiny subset by the command a reader types, judged by the numbers they record."""

import os
import subprocess
import sys

import jupytext
import nbformat
import pandas as pd
import pytest

from lib import attacks
from lib.study import NOTEBOOKS, PARAMETERS, ROOT

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def cells(notebook):
    return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in notebook.cells]


def papermill(folder, book, out, *parameters):
    command = [sys.executable, "-m", "papermill", book, str(out), *parameters, "--no-progress-bar"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One tiny study on digits through the command line; its folder of results."""
    folder = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "lib.study", "PRESET=tiny", f"STORE={folder / 'store'}", f"OUT={folder / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Look at" in done.stdout.splitlines()[-1]
    return folder


def test_every_source_has_a_twin_with_the_same_cells_and_no_outputs():
    assert [p.stem for p in SOURCES] == [p.stem for p in NOTEBOOKS]
    for source, twin in zip(SOURCES, NOTEBOOKS, strict=True):
        paired = nbformat.read(twin, as_version=4)
        assert cells(jupytext.read(source)) == cells(paired), f"{twin.name} differs from {source.name}: run make sync"
        assert not any(c.get("outputs") or c.get("execution_count") for c in paired.cells), f"{twin.name}: make sync"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_the_parameters_cell_is_the_vocabulary_and_cells_are_short(source):
    notebook = jupytext.read(source)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    tagged = [c.source for c in code if "parameters" in c.metadata.get("tags", [])]
    assert [line.split(":")[0] for line in tagged[0].splitlines()] == list(PARAMETERS) and len(tagged) == 1
    assert all(c.source.count("\n") < 15 for c in code if c.source != tagged[0])
    assert 2 * len(code) < len(notebook.cells), "more prose than code"


def test_the_numbers_of_notebook_01(run):
    found = pd.read_csv(run / "out" / "results.csv", keep_default_na=False)
    one = found[(found.notebook == "01_phenomenon") & (found.note == "")]
    assert set(attacks.NAMES) <= set(one.attack) and {"sgd", "sam", "sam-sgd"} == set(one.optimizer)
    for metric in ("auc", "balanced_accuracy", "advantage", "tpr@0.1", "realised_fpr@0.1", "test_accuracy",
                   "train_accuracy", "train_loss", "nonmember_variance_phi_across_models",
                   "hessian_top_eigenvalue", "loss_rise_in_ball"):  # fmt: skip
        assert metric in set(one.metric), metric
    accuracy = one[(one.metric == "test_accuracy")].set_index("optimizer").value.astype(float)
    assert accuracy["sgd"] > 0.5 and accuracy["sam"] > 0.5  # ten classes: chance is 0.1
    assert accuracy["sam-sgd"] == pytest.approx(accuracy["sam"] - accuracy["sgd"], abs=1e-5)
    lira = one[(one.attack == "lira") & (one.metric == "auc")].set_index("optimizer").value.astype(float)
    assert 0.5 < lira["sgd"] < 1 and lira["sam-sgd"] == pytest.approx(lira["sam"] - lira["sgd"], abs=1e-5)


def test_the_null_control_of_notebook_01_holds_a_half(run):
    found = pd.read_csv(run / "out" / "results.csv", keep_default_na=False)
    null = found[found.note.str.startswith("null control")]
    low, high = null.ci_low.astype(float), null.ci_high.astype(float)
    assert len(null) == len(attacks.NAMES)
    assert ((low <= 0.5) & (high >= 0.5)).sum() >= len(null) - 2  # 95% intervals of 14 attacks that are not independent


def test_figures_and_a_clean_copy_are_left(run):
    figures = {p.stem for p in (run / "out" / "figures").glob("*.png")}
    assert {
        "attack",
        "training",
        "difference_auc",
        "difference_balanced_accuracy",
        "roc",
        "phi",
        "dose",
        "regimes",
    } <= figures
    copy = nbformat.read(run / "out" / "01_phenomenon.ipynb", as_version=4)
    outputs = [o for c in copy.cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 9
    assert not any(o.get("name") == "stderr" for o in outputs), "warnings or progress bars in the executed copy"


@pytest.mark.parametrize("folder, book", [(".", "notebooks/01_phenomenon.ipynb"), ("notebooks", "01_phenomenon.ipynb")])
def test_papermill_by_hand_works_from_both_folders_and_trains_nothing_twice(run, tmp_path, folder, book):
    flags = {p: p.stat().st_mtime_ns for p in (run / "store").glob("*/done/*.json")}
    done = papermill(ROOT / folder, book, tmp_path / "out.ipynb", "-p", "preset", "tiny",
                     "-p", "store", str(run / "store"), "-p", "out", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = (pd.read_csv(f / "results.csv", keep_default_na=False) for f in (run / "out", tmp_path))
    pd.testing.assert_frame_equal(first, again)
    assert flags == {p: p.stat().st_mtime_ns for p in (run / "store").glob("*/done/*.json")}


@pytest.mark.parametrize("name, value", [("n_model", "16"), ("n_models", "sixteen")])
def test_papermill_with_a_bad_parameter_fails_before_training(tmp_path, name, value):
    store = tmp_path / "store"
    done = papermill(
        ROOT, "notebooks/01_phenomenon.ipynb", tmp_path / "o.ipynb", "-p", name, value, "-p", "store", str(store)
    )
    assert done.returncode != 0 and "ValueError" in done.stderr and name in done.stderr
    assert not os.path.exists(store)

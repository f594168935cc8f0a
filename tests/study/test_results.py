import json
import re

import numpy as np
import pandas as pd
import pytest

from lib.study.results import COLUMNS, PROVENANCE, Results, differing, read, recipe_digest
from lib.study.settings import ROOT
from tests.study.test_settings import tiny


def frame(value, **more):
    return pd.DataFrame(
        [dict(optimizer="sam", metric="auc", value=value, ci_low=value - 0.1, ci_high=value + 0.1, **more)]
    )


def test_a_notebook_run_again_replaces_its_own_rows_and_no_others(tmp_path):
    run = tiny(tmp_path)
    for notebook, value in (("01_a", 0.6), ("02_b", 0.7), ("01_a", 0.8)):
        results = Results(notebook, run)
        results.add(frame(value), attack="lira")
        results.add(frame(value + 0.05), "length sweep", attack="rmia", coordinate="epochs=4", baseline="sgd")
    assert sum(map(len, results.rows)) == 2
    found = pd.read_csv(results.path)
    assert list(found.columns) == [*COLUMNS, *PROVENANCE] and list(found.notebook) == ["01_a"] * 2 + ["02_b"] * 2
    np.testing.assert_allclose(found.value, [0.8, 0.85, 0.7, 0.75])
    assert set(found.rho) == {0.3} and set(found.n_models) == {16}
    assert list(found.experiment) == ["main", "length sweep"] * 2


def test_rows_come_back_as_they_were_recorded(tmp_path):
    results = Results("01_a", tiny(tmp_path), n_models=12)
    made = pd.concat([frame(0.6, extra=1), frame(0.1, baseline="sgd").assign(ci_low=np.nan, ci_high=np.nan)])
    results.add(made.fillna({"baseline": ""}), rho=[0.25, 0.5], attack="lira")
    found = read(results.path)
    assert list(found.columns) == COLUMNS and list(found.baseline) == ["", "sgd"] and list(found.rho) == ["0.25", "0.5"]
    np.testing.assert_allclose(found[["value", "ci_low", "n_models"]], [[0.6, 0.5, 12], [0.1, np.nan, 12]])
    with pytest.raises(ValueError, match="note='x'"):
        results.add(frame(0.1), note="x")


def test_a_file_that_is_no_results_is_named_and_an_empty_one_has_no_rows(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    assert read(tmp_path / "empty.csv").empty
    for content in ("a,b\n1,2\n", ",".join(COLUMNS) + "\n" + "x," * (len(COLUMNS) - 1) + "x\n"):
        (tmp_path / "other.csv").write_text(content)
        with pytest.raises(ValueError, match="other.csv"):
            read(tmp_path / "other.csv")


def test_the_committed_results_have_the_schema():
    for path in sorted((ROOT / "outputs" / "reference").glob("*/results.csv")):
        found = read(path)
        least = 900 if set(found.notebook) == {"gpu"} else 1000  # one comparison alone, or one with sweeps
        assert len(found) > least and "main" in set(found.experiment)
        frontier = found.experiment == "frontier"  # where SGD's settings are compared with tuned SAM
        assert set(found.baseline[~frontier]) <= {"", "sgd", "none", "eta=0"}
        assert set(found.baseline[frontier]) <= {"sgd", "sam"}
        assert not found.optimizer.str.contains("-sgd|-none", regex=True).any()


def test_every_row_says_what_made_it(tmp_path):
    run = tiny(tmp_path, device="cpu")
    results = Results("01_new", run)
    results.add(frame(0.6))
    (new,) = pd.read_csv(results.path, dtype=str, keep_default_na=False).itertuples(index=False)
    assert (new.seed, new.recipe, new.device) == ("0", recipe_digest(run), "cpu") and float(new.seconds) >= 0
    versions = json.loads(results.path.with_name("settings.json").read_text())["01_new"]["versions"]
    for name in ("flat-is-not-private", "python", "torch", "numpy"):
        assert re.search(rf"\b{name} \d+\.\d+", versions), versions


def test_the_recipe_names_what_decides_a_run_and_not_where_it_is_made(tmp_path):
    one = recipe_digest(tiny(tmp_path))
    assert re.fullmatch("[0-9a-f]{12}", one)
    assert one == recipe_digest(tiny(tmp_path / "elsewhere"))  # another store, another folder of results
    changes = {"seed": 1, "rho": 0.2, "epochs": 9, "n_models": 24, "optimizers": "sgd,asam", "dataset": "subclasses"}
    others = [recipe_digest(tiny(tmp_path, **{name: value})) for name, value in changes.items()]
    assert len({one, *others}) == 1 + len(changes)


def test_settings_that_differ_between_the_notebooks_of_a_folder_are_said(tmp_path):
    for book, rho in (("01_phenomenon", 0.1), ("02_memorization", 0.1), ("02_memorization", 0.2)):
        told = differing(tmp_path / "out")
        Results(book, tiny(tmp_path, rho=rho)).add(frame(0.5))
    assert told == [] and differing(tmp_path / "out") == ["rho differs: 0.1 in 01_phenomenon, 0.2 in 02_memorization"]


def test_a_folder_that_refuses_is_named(tmp_path, monkeypatch):
    results = Results("01_a", tiny(tmp_path))

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr("lib.study.results.write_atomic", refuse)
    with pytest.raises(ValueError, match="out=.*no space"):
        results.add(frame(0.5))


def test_what_is_judged_at_equal_accuracy_is_the_mean_over_settings():
    judged = 0
    for path in sorted((ROOT / "outputs" / "reference").glob("*/results.csv")):
        found = read(path)
        found = found[found.metric == "auc_at_equal_accuracy"]
        for row in found[found.coordinate.str.startswith("weight_decay=")].itertuples():
            each = found[found.coordinate.str.endswith(f", {row.coordinate}") & (found.attack == row.attack)]
            assert len(each) and row.value == pytest.approx(each.value.mean(), abs=1e-6)
            judged += 1
    assert judged > 10

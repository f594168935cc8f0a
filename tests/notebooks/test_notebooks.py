"""The notebooks as tests: run on a tiny subset by the command a reader types, judged by the numbers they record."""

import subprocess
import sys

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from lib.attacks import catalogue
from lib.study import verdict
from lib.study.command_line import NOTEBOOKS
from lib.study.settings import ROOT, Parameters
from tests.notebooks.test_cells import run_cells
from tests.processes import ended, start

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def cells(notebook):
    return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in notebook.cells]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny study of digits, by the command that a reader types: its store and its results."""
    folder = tmp_path_factory.mktemp("study")
    words = ["PRESET=tiny", f"STORE={folder / 'store'}", f"OUT={folder / 'out'}"]
    done = subprocess.run([sys.executable, "-m", "lib.study", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Look at" in done.stdout.splitlines()[-1]
    return folder


def test_every_source_has_a_twin_with_the_same_cells_and_no_outputs():
    assert [p.stem for p in SOURCES] == sorted(p.stem for p in NOTEBOOKS)
    for source, twin in zip(SOURCES, sorted(NOTEBOOKS), strict=True):
        paired = nbformat.read(twin, as_version=4)
        assert cells(jupytext.read(source)) == cells(paired), f"{twin.name} differs from {source.name}: run make sync"
        assert not any(c.get("outputs") or c.get("execution_count") for c in paired.cells), f"{twin.name}: make sync"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_opens_with_prose_and_has_one_short_parameters_cell(source):
    notebook = jupytext.read(source)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    tagged = [c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    first, *lines = tagged[0].splitlines()
    assert len(tagged) == 1 and first.startswith("# Parameters") and 6 <= len(lines) <= 8
    assert {line.split(":")[0] for line in lines} <= set(Parameters.model_fields)


def rows(path):
    """A results.csv as it is printed."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def recorded(run, notebook, experiment="main", **columns):
    """The rows of one experiment of a notebook that have these values in these columns; "" where none is given."""
    found = rows(run / "out" / "results.csv")
    for name, value in {"notebook": notebook, "experiment": experiment, **columns}.items():
        found = found[found[name] == value]
    numbers = {name: pd.to_numeric(found[name]) for name in ("value", "ci_low", "ci_high", "n_models")}
    return found.assign(**numbers)


def numbers(run, notebook, experiment="main", **columns):
    """(optimizer, baseline, metric) -> value of these rows."""
    columns = {"coordinate": "", "attack": "", **columns}
    return recorded(run, notebook, experiment, **columns).set_index(["optimizer", "baseline", "metric"]).value


def test_the_numbers_of_notebook_01(run):
    one, own = recorded(run, "01_phenomenon"), numbers(run, "01_phenomenon")
    assert set(catalogue.NAMES) <= set(one.attack) and {"sgd", "sam"} == set(one.optimizer)
    for metric in ("auc", "balanced_accuracy", "advantage", "tpr@0.1", "realised_fpr@0.1", "test_accuracy",
                   "train_accuracy", "train_loss", "nonmember_variance_phi_across_models",
                   "hessian_top_eigenvalue", "loss_rise_in_ball"):  # fmt: skip
        assert metric in set(one.metric), metric
    lira = numbers(run, "01_phenomenon", attack="lira")
    for found, metric, chance in ((own, "test_accuracy", 0.1), (lira, "auc", 0.5)):
        sgd, sam = found["sgd", "", metric], found["sam", "", metric]
        assert chance < min(sgd, sam) and max(sgd, sam) < 1
        assert found["sam", "sgd", metric] == pytest.approx(sam - sgd, abs=1e-5)


def test_notebook_01_says_who_is_exposed_and_how_often_an_attacker_is_right(run):
    one = recorded(run, "01_phenomenon")
    people = one[one.metric == "exposure"]
    assert (people.groupby("optimizer").size() == 10).all() and people.coordinate.str.match(r"example=\d+$").all()
    for fpr in (0.01, 0.001):
        known = one[(one.metric == f"tpr@{fpr}") & (one.baseline == "") & (one.value > 0)]
        known = known[known.attack.isin(catalogue.NAMES)]  # who asks for labels only is told about elsewhere
        assert len(one[one.metric == f"precision@{fpr},prevalence=0.1"]) >= len(known)


def test_the_null_control_of_notebook_01_holds_a_half(run):
    null = recorded(run, "01_phenomenon", "null control")
    assert len(null) == len(catalogue.NAMES)
    inside = (null.ci_low <= 0.5) & (null.ci_high >= 0.5)
    assert inside.sum() >= len(null) - 2  # 95% intervals of attacks that are not independent


def test_the_planted_leak_of_notebook_01_is_found(run):
    planted = recorded(run, "01_phenomenon", "planted leak", coordinate="times=50").set_index("attack")
    assert set(planted.index) == set(catalogue.NAMES) and set(planted.n_models) == {16}
    found_it = planted.index[planted.ci_low > 0.5]
    blind = {"entropy", "entropy_classwise"}  # they do not see the label
    assert set(catalogue.NAMES) - set(found_it) <= blind | {"neural", "neural_classwise"}  # these learn from no copy
    assert (planted.value > 0.5).all()  # but all lean to the model that was trained on it
    once = recorded(run, "01_phenomenon", "planted leak", coordinate="times=1")
    assert once.value.mean() < planted.value.mean()


def test_mean_memorization_in_notebook_02_is_the_generalization_gap_of_notebook_01(run):
    one, two = numbers(run, "01_phenomenon"), numbers(run, "02_memorization")
    for optimizer, baseline in (("sgd", ""), ("sam", ""), ("sam", "sgd")):
        gap = one[optimizer, baseline, "generalization_gap"]
        assert two[optimizer, baseline, "mean_memorization"] == pytest.approx(gap, abs=2e-6)
    for name in ("sgd", "sam"):
        shares = two[[key for key in two.index if key[:2] == (name, "") and "memorization_share" in key[2]]]
        assert len(shares) == 5 and shares.sum() == pytest.approx(1, abs=1e-4)


def test_notebook_02_says_that_eight_models_resolve_no_band(run):
    main = recorded(run, "02_memorization", optimizer="sam", baseline="sgd")
    flags = main[main.metric.str.startswith("band_is_resolved_")]
    assert len(flags) == 5 and (flags.value == 0).all()  # tiny has 16 models, 8 of them without each example


def test_notebook_02_names_every_example_by_its_index_in_the_data_as_loaded(run):
    table = pd.read_csv(run / "out" / "memorization.csv")
    np.testing.assert_array_equal(load_digits().target[table["index"]], table["class"])
    assert len(set(table["index"])) == len(table) == 300 and table.correct_sam.between(-1, 1).all()


def test_planted_labels_and_twins_move_apart_in_notebook_02(run):
    change = recorded(run, "02_memorization", "planted faults", metric="rank_change_of_planted")
    change = change.set_index("coordinate").value
    wrong, memorized, random = (
        change[f"kind={kind}"] for kind in ("wrong label", "memorized, given twins", "random, given twins")
    )
    assert wrong > 0 > memorized and wrong > random


def test_the_traits_of_notebook_02_are_filed_under_whose_they_are(run):
    traits = recorded(run, "02_memorization", "example traits")
    kinds = set(zip(traits.coordinate, traits.optimizer, traits.baseline, strict=True))
    assert kinds == {("quantity=memorization", "sgd", ""), ("quantity=change of memorization", "sam", "sgd")}
    assert len(traits) == 8 and traits.value.abs().max() <= 1


def test_the_buckets_of_notebook_03_share_out_the_gain_of_notebook_01(run):
    whole = numbers(run, "01_phenomenon")["sam", "sgd", "test_accuracy"]
    three = numbers(run, "03_influence", "influence buckets")
    assert three["sam", "sgd", "gain"] == pytest.approx(whole, abs=1e-6)
    for name in ("bucket", "difficulty", "entropy_within_difficulty"):
        each = [three["sam", "sgd", f"gain_{name}_{b}"] for b in range(1, 6)]
        assert sum(each) / 5 == pytest.approx(whole, abs=1e-5)


def test_notebook_04_contracts_where_it_should_and_nowhere_else(run):
    def largest(experiment, coordinate):
        about = {"optimizer": "eta=10", "baseline": "", "coordinate": coordinate}
        return recorded(run, "04_contraction", f"theorem: {experiment}", **about).set_index("metric").value

    power, isotropic = (
        largest("monte carlo", f"spectrum={kind}, n/d=0.5, label noise=0.5") for kind in ("power law", "isotropic")
    )
    assert power["variance_ratio"] < 0.9 and isotropic["variance_ratio"] == pytest.approx(1, abs=1e-6)
    assert power["advantage_lira"] > 0.99 and isotropic["advantage_lira"] > 0.99  # IN is a point mass: theorem 3
    assert power["advantage_confidence"] == pytest.approx(power["advantage_confidence_predicted"], abs=0.08)
    for kind in ("empirical", "isotropic"):
        assert largest("limits", f"case={kind} curvature")["variance_ratio"] == pytest.approx(1, abs=1e-6)
    assert largest("limits", "case=population curvature")["variance_ratio"] < 0.9
    descent = numbers(run, "04_contraction", "theorem: limits", coordinate="case=linear model from zero")
    assert descent["sam", "", "distance_to_minimum_norm"] < 1e-6


def test_the_radius_sweep_of_notebook_04_meets_its_main_comparison(run):
    main = numbers(run, "04_contraction")["sam", "sgd", "nonmember_variance_phi_across_examples"]
    radius = recorded(run, "04_contraction", "radius sweep", baseline="sgd")
    radius = radius[radius.metric == "nonmember_variance_phi_across_examples"].set_index("rho").value
    assert radius["0.3"] == pytest.approx(main, abs=1e-5) and len(radius) == 3


def test_the_sweeps_of_notebook_05_meet_the_main_comparison(run):
    """Tiny's sweeps have as many models as its main ensembles, so the same recipe has the same numbers."""
    main = numbers(run, "01_phenomenon")["sam", "sgd", "test_accuracy"]
    radius = recorded(run, "05_when", "radius sweep", baseline="sgd", metric="test_accuracy")
    length = recorded(run, "05_when", "length sweep", baseline="sgd", metric="test_accuracy")
    pools = recorded(run, "05_when", "pools", baseline="sgd", metric="test_accuracy").set_index("coordinate").value
    assert radius.set_index("rho").value["0.3"] == pytest.approx(main, abs=1e-5)
    assert length.set_index("coordinate").value["epochs=10"] == pytest.approx(main, abs=1e-5)
    assert pools["seed=0, equal settings"] == pytest.approx(main, abs=1e-5) and len(pools) == 6
    causes = recorded(run, "05_when", "causes", metric="auc", attack="lira_shrunk").set_index("coordinate").value
    assert {"as it is=as it is", "label noise=30%", "BatchNorm=with", "learning rate=0.2"} <= set(causes.index)
    effect = numbers(run, "01_phenomenon", attack="lira_shrunk")["sam", "sgd", "auc"]
    assert causes["as it is=as it is"] == pytest.approx(effect, abs=1e-5)


def test_the_tuned_settings_of_notebook_05_are_among_those_tried(run):
    tuned = recorded(run, "05_when", "tuned")
    chosen = tuned[tuned.metric.str.startswith("chosen_")].set_index(["optimizer", "metric"]).value
    tried = recorded(run, "05_when", "tuning", baseline="")
    for name in ("sgd", "sam"):
        place = f"lr={chosen[name, 'chosen_lr']:g}, weight_decay={chosen[name, 'chosen_weight_decay']:g}"
        rho = tuned[(tuned.optimizer == name) & (tuned.metric == "chosen_lr")].rho.iloc[0]
        here = tried[(tried.optimizer == name) & (tried.coordinate == place) & (tried.metric == "test_accuracy")]
        here = here[here.rho.astype(float) == float(rho)]
        own = tuned[(tuned.optimizer == name) & (tuned.baseline == "") & (tuned.metric == "test_accuracy")]
        own = own[own.rho.astype(float) == float(rho)]
        assert len(here) == len(own) == 1 and here.value.iloc[0] == pytest.approx(own.value.iloc[0], abs=1e-6)
    auc = tried[(tried.metric == "auc") & (tried.attack == "lira_shrunk")]
    assert len(auc) == 27 and set(auc.rho.astype(float)) == {0, 0.15, 0.3, 0.6}
    ends = tuned[tuned.metric == "auc_among_the_best"].set_index("coordinate").value
    assert ends["lowest"] <= ends["highest"]


def test_the_parts_of_the_decomposition_in_notebook_05_add_up(run):
    split = recorded(run, "05_when", "decomposition")
    assert split.coordinate.str.startswith(("epochs=", "path=")).all()
    parts = split[split.metric.str.startswith("auc_")]
    whole = parts.pivot(index=["coordinate", "rho", "attack"], columns="metric", values="value").dropna()
    assert len(whole) >= 3
    np.testing.assert_allclose(whole.auc_from_fit + whole.auc_at_equal_loss, whole.auc_total, atol=3e-6)
    total = whole.auc_total.xs("lira_shrunk", level="attack").xs("epochs=10", level="coordinate")
    effect = numbers(run, "01_phenomenon", attack="lira_shrunk")["sam", "sgd", "auc"]
    assert total.iloc[0] == pytest.approx(effect, abs=1e-5)


def test_notebook_07_and_the_report_judge_every_claim_of_the_run(run):
    ledger = pd.read_csv(run / "out" / "verdict.csv").set_index("claim").verdict
    not_run = {"other_architectures_alike", "memorizes_atypical", "gains_on_atypical"}
    missing = set(ledger[ledger == "not run"].index) - {"more_at_equal_accuracy"}  # SGD may not reach SAM's accuracy
    assert missing == not_run  # one architecture ran, on data of unknown sub-patterns
    assert set(verdict.CLAIMS.claim) <= set(ledger.index)
    assert ledger["premise_interpolator"] == ledger["premise_curvature"] == "contradicted"
    page = (run / "out" / "report" / "index.html").read_text()
    assert all(f'href="{book.stem}.html"' in page for book in NOTEBOOKS)
    assert len(list((run / "out" / "report").glob("*.html"))) == len(NOTEBOOKS) + 1


def test_notebook_06_answers_every_question_with_a_number(run):
    variants = recorded(run, "06_beyond", "variants", baseline="sgd", metric="auc")
    assert {"sam", "asam", "looksam", "esam", "swa", "sharpreg"} <= set(variants.optimizer)
    defences = recorded(run, "06_beyond", "defences", baseline="none", metric="test_accuracy").set_index("optimizer")
    assert defences.value["temperature 4"] == 0 and {"sam", "SharpReg", "label smoothing 0.1"} <= set(defences.index)
    for experiment in ("classes", "agreement"):
        assert len(recorded(run, "06_beyond", experiment)), experiment
    private = recorded(run, "06_beyond", "private", attack="rmia", metric="auc", baseline="sgd")
    assert len(private) == 4 and private.coordinate.str.startswith("epsilon=").all()


def test_figures_and_a_clean_copy_are_left(run):
    figures = {p.stem for p in (run / "out" / "figures").glob("*.png")}
    assert {
        "attack",
        "training",
        "difference_auc",
        "difference_balanced_accuracy",
        "roc",
        "phi",
        "radius_at_equal_loss",
        "leakage_against_loss",
        "leakage_against_accuracy",
        "contraction_and_leakage",
        "memorization",
        "movers",
        "buckets",
        "contraction",
        "verdict",
        "frontier",
        "causes",
        "defences",
        "privacy",
        "classes",
    } <= figures
    for book, least in zip(NOTEBOOKS, (7, 6, 5, 6, 5, 4, 1), strict=True):
        copy = nbformat.read(run / "out" / book.name, as_version=4)
        outputs = [o for c in copy.cells for o in c.get("outputs", [])]
        assert sum("image/png" in o.get("data", {}) for o in outputs) >= least, book.stem
        assert not any(o.get("name") == "stderr" for o in outputs), "warnings or progress bars in the executed copy"


def test_papermill_by_hand_and_an_empty_store_give_the_same_results(run, tmp_path):
    words = ["-p", "preset", "tiny", "-p", "store", str(tmp_path / "store"), "-p", "out", str(tmp_path)]
    command = [sys.executable, "-m", "papermill", "03_influence.ipynb", str(tmp_path / "out.ipynb"), *words]
    done = subprocess.run(command, cwd=ROOT / "notebooks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_numbers(run, tmp_path, "03_influence")


def test_a_notebook_run_again_trains_nothing_and_gives_the_same_results(run, tmp_path):
    flags = {p: p.stat().st_mtime_ns for p in (run / "store").glob("*/done/*.json")}
    given = {"preset": "tiny", "store": str(run / "store"), "out": str(tmp_path)}
    assert ended(start(run_cells, ROOT / "notebooks" / "03_influence.py", given)) == 0
    assert_same_numbers(run, tmp_path, "03_influence")
    assert flags == {p: p.stat().st_mtime_ns for p in (run / "store").glob("*/done/*.json")}


def assert_same_numbers(run, out, notebook):
    """All that a notebook recorded in the folder `out` is what it recorded in the study, to the last digit."""
    first, again = (rows(folder / "results.csv").drop(columns="seconds") for folder in (run / "out", out))
    pd.testing.assert_frame_equal(first[first.notebook == notebook].reset_index(drop=True), again)

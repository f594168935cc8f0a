"""Tables of variants, causes, defences and of who pays: on stand-ins with known effects, and on trained ensembles."""

from dataclasses import replace

import jupytext
import numpy as np
import pytest

from lib.analysis import compare, interventions
from lib.attacks import catalogue, intervals
from lib.study.settings import ROOT
from lib.training import Recipe, train
from tests.analysis.conftest import simulated
from tests.conftest import blobs


def beaten(made):
    """Who beats each of `made`, by the cell of notebook 06 that says so."""
    cells = jupytext.read(ROOT / "notebooks" / "06_beyond.py").cells
    (source,) = (cell.source for cell in cells if "def beats" in cell.source)
    names = {"made": made, "run": next(iter(made.values())), "compare": compare, "intervals": intervals, "np": np}
    exec(source, names)
    return names["beaten"]


def test_dominated_is_who_another_beats_in_one_respect_and_does_not_trail_in_the_other():
    made = {"base": (1.0, 1.0), "leaky": (2.0, 1.0), "better": (1.0, 2.0), "trade": (2.0, 2.5)}
    by = beaten({name: simulated(*of) for name, of in made.items()})
    assert {"base", "better"} <= set(by["leaky"])
    assert "better" in by["base"] and "base" not in by["better"] and not by["trade"]
    assert "leaky" not in by["base"]


def test_nothing_dominates_its_equal():
    same = {name: simulated(1.0, 1.0) for name in "ab"}
    assert beaten(same) == {"a": [], "b": []}


def test_temperature_changes_neither_accuracy_nor_two_class_lira_but_the_confidence():
    plain = simulated(1.0, 1.0)
    warm = interventions.tempered(plain, 4)
    assert (compare.hits_on_test(warm) == compare.hits_on_test(plain)).all()
    assert np.abs(warm.logits).max() == pytest.approx(np.abs(plain.logits).max() / 4)
    # with two classes phi is a difference of logits: dividing it rescales every Gaussian alike
    warm, plain = (compare.headline_scores(e)["lira_shrunk"] for e in (warm, plain))
    np.testing.assert_allclose(warm, plain, rtol=1e-3, atol=1e-3)


def test_effect_table_has_the_effect_and_its_change_from_the_first_level():
    leaks = {"as it is": (1, 1.5), "5": (1, 1)}
    found = {
        ("epochs", k, name): simulated(leak, 1)
        for k, of in leaks.items()
        for name, leak in zip(("sgd", "sam"), of, strict=True)
    }
    found["batch size", "4", "sgd"] = simulated(1, 1)  # its partner diverged
    frame = interventions.effect_table(found)
    assert set(frame.coordinate) == {"epochs=as it is", "epochs=5"} and set(frame.baseline) == {"sgd"}
    assert set(frame.attack) == set(catalogue.HEADLINES)
    frame = frame[frame.attack == "lira_shrunk"].set_index(["level", "metric"])
    assert frame.value["as it is", "auc"] > 0.02 and frame.value["5", "auc"] == 0
    assert frame.value["as it is", "auc_change"] == 0
    assert frame.value["5", "auc_change"] == pytest.approx(-frame.value["as it is", "auc"])
    assert frame.ci_high["5", "auc_change"] < 0


def test_class_table_finds_the_class_that_leaks_and_weighs_classes_alike():
    one, other = simulated(1, 1), simulated(1, 1)
    second = other.dataset.y == 1
    other.logits[:, 0, second, 1] += 2.0 * other.member[:, second]
    frame = interventions.class_table({"sgd": one, "sam": other})
    assert set(frame[frame.metric == "auc"].attack) == set(catalogue.HEADLINES)
    frame = frame[frame.attack.isna() | (frame.attack == "lira_shrunk")]
    frame = frame.set_index(["metric", "class", "optimizer", "baseline"])
    assert frame.ci_low["auc", "b", "sam", "sgd"] > 0 and frame.value["auc", "a", "sam", "sgd"] == 0
    balanced = frame.value["balanced_test_accuracy", "", "sgd", ""]
    each = [frame.value["class_test_accuracy", c, "sgd", ""] for c in "ab"]
    assert balanced == pytest.approx(np.mean(each))


def test_a_class_of_one_example_has_no_auc_and_groups_count_as_one():
    lone = simulated(1, 1, n=100)
    lone.dataset.y[:] = 0
    lone.dataset.y[0] = 1
    frame = interventions.class_table({"sgd": lone})
    assert set(frame[frame["class"] == "b"].metric) == {"class_test_accuracy"}
    twins = simulated(1, 1, n=100, groups=np.arange(100) // 4)
    alone = interventions.class_table({"sgd": simulated(1, 1, n=100)})
    both = interventions.class_table({"sgd": twins})
    assert (both.value == alone.value).all() and (both.ci_low != alone.ci_low)[both.metric == "auc"].all()


def test_private_tables_split_the_claim_from_the_name(pair):
    made = {("sgd", np.inf): pair["sgd"], ("dpsgd", 8.0): pair["sam"]}
    frame = compare.split_labels(interventions.defence_table(made), "epsilon")
    labels = set(frame[["optimizer", "baseline", "epsilon"]].itertuples(index=False, name=None))
    assert labels == {("sgd", "", np.inf), ("dpsgd", "", 8.0), ("dpsgd", "sgd", 8.0)}


def test_a_defence_is_measured_by_the_headline_attacks_and_by_a_threshold(pair):
    frame = interventions.defence_table({"none": pair["sgd"], "other": pair["sam"]})
    auc = frame[frame.metric == "auc"].set_index(["attack", "optimizer", "baseline"]).value
    member = np.array(pair["sam"].member)
    phi = compare.signal(pair["sam"], "phi")
    assert auc["confidence", "other", ""] == pytest.approx(intervals.auc_influence_values(phi, member).mean())
    for attack in catalogue.HEADLINES:
        assert auc[attack, "other", "none"] == pytest.approx(auc[attack, "other", ""] - auc[attack, "none", ""])


def test_agreement_is_high_with_the_same_exposed_and_low_with_others():
    def exposing(who, seed):
        found = simulated(0.0, 1.0, m=128, n=100, seed=3)
        found.logits = found.logits + np.random.default_rng(seed).normal(size=found.logits.shape)
        found.logits[:, 0, who, found.dataset.y[who]] += 5.0 * found.member[:, who]
        return found

    few, rest = np.arange(50), np.arange(50, 100)
    same = interventions.agreement({"a": exposing(few, 1), "b": exposing(few, 2)})[:3].set_index("optimizer").value
    others = interventions.agreement({"a": exposing(few, 1), "b": exposing(rest, 2)})[:3].set_index("optimizer").value
    assert same["a and b"] > 0.5 and same["a"] > 0.5 and others["a and b"] < -0.5


def test_corrected_agreement_of_the_same_exposure_is_one():
    """16 models and weak exposures: what shadows of both halves share must not pass for agreement within."""
    strength = 3 * np.random.default_rng(0).random(600)

    def exposing(seed):
        found = simulated(0.0, 1.0, m=16, n=600, seed=3)
        found.logits = np.random.default_rng(seed).normal(size=found.logits.shape)
        found.logits[:, 0, np.arange(600), found.dataset.y] += strength * found.member
        return found

    found = interventions.agreement({"a": exposing(1), "b": exposing(2)})
    a, b, both = found[found.metric == "exposure_rank_correlation"].value
    (corrected,) = found[found.metric == "exposure_rank_correlation_corrected"].itertuples()
    assert corrected.value == pytest.approx(both / np.sqrt(a * b)) and 0.85 < corrected.value < 1.15
    assert corrected.ci_low < corrected.value < corrected.ci_high


def test_pattern_table_finds_the_rare_ones(tmp_path):
    data = blobs(n=80, t=60)
    pattern = np.where(np.arange(80) < 20, np.arange(80), 20)
    common = replace(data, pattern=pattern, pattern_test=np.arange(60) % 22)  # 21: the pool has none
    made = {k: train(Recipe(optimizer=k, rho=0.1, epochs=2, batch_size=8), common, 8, tmp_path, "cpu", quiet=True)
            for k in ("sgd", "sam")}  # fmt: skip
    memorized = {k: np.where(np.arange(80) < 20, rare, 0.1) for k, rare in (("sgd", 0.7), ("sam", 0.9))}
    frame = interventions.pattern_table(made, memorized)
    sam = frame[(frame.metric == "mean_memorization") & (frame.optimizer == "sam")]
    for baseline, rare, common in (("", 0.9, 0.1), ("sgd", 0.2, 0.0)):
        found = sam[sam.baseline == baseline].set_index("size").value
        assert found.to_dict() == pytest.approx({"1 to 2": rare, "30 to 99": common})
    assert {"auc", "mean_memorization"} <= set(frame.metric) and set(frame.baseline) == {"", "sgd"}

"""Cells of notebooks 05 and 06 that make a table, on stand-ins with known effects."""

from unittest.mock import Mock

import jupytext
import numpy as np
import pandas as pd
import pytest

from lib.analysis import compare, memorization
from lib.attacks import catalogue, intervals
from lib.study.settings import ROOT
from tests.analysis.conftest import simulated


def run_cell(text, book="06_beyond", baseline="sgd", treatment="sam", **names):
    """The names after running the one cell of a notebook that contains a text."""
    cells = jupytext.read(ROOT / "notebooks" / f"{book}.py").cells
    (source,) = (cell.source for cell in cells if text in cell.source)
    names |= {"compare": compare, "intervals": intervals, "memorization": memorization, "catalogue": catalogue}
    names |= {"np": np, "pd": pd, "baseline": baseline, "treatment": treatment}
    exec(source, names)
    return names


def beaten(made):
    """Who beats each of `made`."""
    return run_cell("def beats", made=made, run=next(iter(made.values())))["beaten"]


def agreement(a, b):
    """Do two ensembles expose the same examples? The rows by what they compare."""
    two, ignored = {"a": a, "b": b}, Mock()
    more = dict(two=two, baseline="a", treatment="b", n_models=16, results=ignored)
    frame = run_cell("rho_corrected", **more, show_text=ignored, show_table=ignored)["agreement"]
    return frame.set_index("metric")


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
    warm = compare.tempered(plain, 4)
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
    run = Mock(ensembles=lambda _: found, dataset=found["epochs", "5", "sgd"].dataset)
    frame = run_cell("as_it_is", "05_when", run=run, headline="rmia", results=Mock(), show_text=Mock())["effects"]
    assert set(frame.coordinate) == {"epochs=as it is", "epochs=5"} and set(frame.baseline) == {"sgd"}
    assert set(frame.attack) == set(catalogue.HEADLINES)
    frame = frame[frame.attack == "lira_shrunk"].set_index(["level", "metric"])
    assert frame.value["as it is", "auc"] > 0.02 and frame.value["5", "auc"] == 0
    assert frame.value["as it is", "auc_change"] == 0
    assert frame.value["5", "auc_change"] == pytest.approx(-frame.value["as it is", "auc"])
    assert frame.ci_high["5", "auc_change"] < 0


def by_class(ensembles):
    data = next(iter(ensembles.values())).dataset
    parts = {name: (data.y == c, data.y_test == c) for c, name in enumerate(data.classes)}
    return run_cell("def by_part", run=Mock(dataset=data))["by_part"](ensembles, parts, "class_test_accuracy")


def test_the_class_that_leaks_is_found():
    one, other = simulated(1, 1), simulated(1, 1)
    second = other.dataset.y == 1
    other.logits[:, 0, second, 1] += 2.0 * other.member[:, second]
    frame = by_class({"sgd": one, "sam": other})
    assert set(frame[frame.metric == "auc"].attack) == set(catalogue.HEADLINES) and set(frame["size"]) == {100}
    frame = frame[frame.attack.isna() | (frame.attack == "lira_shrunk")]
    frame = frame.set_index(["metric", "part", "optimizer", "baseline"])
    assert frame.ci_low["auc", "b", "sam", "sgd"] > 0 and frame.value["auc", "a", "sam", "sgd"] == 0
    hits = compare.hits_on_test(one)[:, one.dataset.y_test == 1]
    assert frame.value["class_test_accuracy", "b", "sgd", ""] == pytest.approx(hits.mean())


def test_a_class_of_one_example_has_no_auc_and_groups_count_as_one():
    lone = simulated(1, 1, n=100)
    lone.dataset.y[:] = 0
    lone.dataset.y[0] = 1
    frame = by_class({"sgd": lone})
    assert set(frame[frame.part == "b"].metric) == {"class_test_accuracy"}
    twins = simulated(1, 1, n=100, groups=np.arange(100) // 4)
    alone, both = by_class({"sgd": simulated(1, 1, n=100)}), by_class({"sgd": twins})
    assert (both.value == alone.value).all() and (both.ci_low != alone.ci_low)[both.metric == "auc"].all()


def test_agreement_is_high_with_the_same_exposed_and_low_with_others():
    def exposing(who, seed):
        found = simulated(0.0, 1.0, m=128, n=100, seed=3)
        found.logits = found.logits + np.random.default_rng(seed).normal(size=found.logits.shape)
        found.logits[:, 0, who, found.dataset.y[who]] += 5.0 * found.member[:, who]
        return found

    few, rest = np.arange(50), np.arange(50, 100)
    same, others = (agreement(exposing(few, 1), exposing(who, 2)).iloc[:3] for who in (few, rest))
    same, others = same.set_index("optimizer").value, others.set_index("optimizer").value
    assert same["a and b"] > 0.5 and same["a"] > 0.5 and others["a and b"] < -0.5


def test_corrected_agreement_of_the_same_exposure_is_one():
    """16 models and weak exposures: what shadows of both halves share must not pass for agreement within."""
    strength = 3 * np.random.default_rng(0).random(600)

    def exposing(seed):
        found = simulated(0.0, 1.0, m=16, n=600, seed=3)
        found.logits = np.random.default_rng(seed).normal(size=found.logits.shape)
        found.logits[:, 0, np.arange(600), found.dataset.y] += strength * found.member
        return found

    found = agreement(exposing(1), exposing(2))
    a, b, both = found.value["exposure_rank_correlation"]
    corrected = found.loc["exposure_rank_correlation_corrected"]
    assert corrected.value == pytest.approx(both / np.sqrt(a * b)) and 0.85 < corrected.value < 1.15
    assert corrected.ci_low < corrected.value < corrected.ci_high and corrected.optimizer == "a and b"

import ast
from dataclasses import replace
from types import SimpleNamespace

import jupytext
import numpy as np
import pandas as pd
import pytest

from lib.analysis import compare, interventions, memorization
from lib.study import experiments, settings, text
from lib.training import train
from lib.training.optimizers import parse
from lib.training.recipe import Recipe
from tests.conftest import blobs


def simulated(leak, skill, m=16, n=200, t=150, seed=0, classes=2):
    """A stand-in for an Ensemble: members' logits are higher by `leak`, all by `skill`; noise is shared by seed."""
    rng = np.random.default_rng(seed)
    y, y_test = np.arange(n) % classes, np.arange(t) % classes
    member = np.repeat(rng.random((m // 2, n)) < 0.5, 2, axis=0)
    member[1::2] = ~member[::2]
    logits, test_logits = rng.normal(size=(m, 1, n, classes)), rng.normal(size=(m, 1, t, classes))
    logits[:, 0, np.arange(n), y] += skill + leak * member
    test_logits[:, 0, np.arange(t), y_test] += skill
    dataset = SimpleNamespace(
        y=y, y_test=y_test, n_classes=classes, classes=tuple("ab"[:classes]), groups=None, groups_test=None
    )
    return SimpleNamespace(
        logits=logits, test_logits=test_logits, member=member, dataset=dataset, ids=np.arange(m), recipe=None
    )


def test_dominated_is_who_another_beats_in_one_respect_and_does_not_trail_in_the_other():
    made = {"base": (1.0, 1.0), "leaky": (2.0, 1.0), "better": (1.0, 2.0), "trade": (2.0, 2.5)}
    beaten = interventions.dominated({name: simulated(*of) for name, of in made.items()})
    assert {"base", "better"} <= set(beaten["leaky"])
    assert "better" in beaten["base"] and "base" not in beaten["better"] and not beaten["trade"]
    assert "leaky" not in beaten["base"]


def test_nothing_dominates_its_equal():
    same = {name: simulated(1.0, 1.0) for name in "ab"}
    assert interventions.dominated(same) == {"a": [], "b": []}


def test_signs_are_those_of_clear_intervals():
    rows = [("auc", 0.1, 0.05, 0.15), ("test_accuracy", 0.1, -0.05, 0.15)]
    table = pd.DataFrame(rows, columns=["metric", "value", "ci_low", "ci_high"]).assign(
        optimizer="sam", baseline="sgd", rho=0.3
    )
    assert interventions.signs(table, "sgd") == {("sam", 0.3): (0, 1)}


def test_mislabelled_changes_the_share_it_says_and_always_to_another_class(table):
    noisy = interventions.mislabelled(table, 0.25, seed=1)
    assert (noisy.y != table.y).sum() == round(0.25 * len(table.y)) and noisy.hash != table.hash
    assert set(noisy.y) <= set(range(table.n_classes)) and (noisy.y_test == table.y_test).all()
    assert interventions.mislabelled(table, 0.0).hash == table.hash
    with pytest.raises(ValueError, match="share=1.5"):
        interventions.mislabelled(table, 1.5)


def test_temperature_changes_neither_accuracy_nor_two_class_lira_but_the_confidence():
    plain = simulated(1.0, 1.0)
    warm = interventions.tempered(plain, 4)
    assert interventions.test_accuracy(warm) == interventions.test_accuracy(plain)
    # with two classes phi is a difference of logits: dividing it rescales every Gaussian alike
    np.testing.assert_allclose(interventions.lira_scores(warm), interventions.lira_scores(plain), rtol=1e-3, atol=1e-3)
    assert np.abs(warm.logits).max() == pytest.approx(np.abs(plain.logits).max() / 4)


def test_effect_table_has_the_effect_and_its_change_from_the_first_level():
    found = {
        ("as it is", "as it is"): {"sgd": simulated(1, 1), "sam": simulated(1.5, 1)},
        ("epochs", "5"): {"sgd": simulated(1, 1), "sam": simulated(1, 1)},
    }
    frame = interventions.effect_table(found).set_index(["level", "metric"])
    assert frame.value["as it is", "auc"] > 0.02 and frame.value["5", "auc"] == 0
    assert frame.value["as it is", "auc_change"] == 0
    assert frame.value["5", "auc_change"] == pytest.approx(-frame.value["as it is", "auc"])
    assert frame.ci_high["5", "auc_change"] < 0


def test_class_table_finds_the_class_that_leaks_and_weighs_classes_alike():
    one, other = simulated(1, 1), simulated(1, 1)
    second = other.dataset.y == 1
    other.logits[:, 0, second, 1] += 2.0 * other.member[:, second]
    frame = interventions.class_table({"sgd": one, "sam": other}).set_index(
        ["metric", "class", "optimizer", "baseline"]
    )
    assert frame.ci_low["auc", "b", "sam", "sgd"] > 0 and frame.value["auc", "a", "sam", "sgd"] == 0
    balanced = frame.value["balanced_test_accuracy", "", "sgd", ""]
    each = [frame.value["class_test_accuracy", c, "sgd", ""] for c in "ab"]
    assert balanced == pytest.approx(np.mean(each))


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


def test_levels_change_one_thing_at_a_time_and_the_run_comes_first(tmp_path):
    run = settings.settings({"preset": "tiny", "store": str(tmp_path), "out": str(tmp_path)})
    found = interventions.levels(run)
    assert list(found)[0] == ("as it is", "as it is")
    for (factor, _), (changes, data) in list(found.items())[1:]:
        assert (len(changes) == 1) != (data is not run.dataset), factor
        run.recipe("sgd", **changes)  # valid
    fewer = interventions.chosen_levels(run, 1)
    assert len({f for f, _ in fewer}) == len(fewer) == len({f for f, _ in found})


def test_the_plan_counts_what_is_left(tmp_path, table):
    run = settings.settings(
        {"preset": "tiny", "epochs": 2, "n_models": 8, "store": str(tmp_path / "s"), "out": str(tmp_path)}
    )
    before, total = experiments.left(run, ["03"])
    recipe = run.recipe("sgd")
    # sgd once and sam twice the gradients, of the same models
    assert before == total == 3 * experiments.work(recipe, len(run.dataset.y), 8)
    assert not list((tmp_path / "s").glob("digits*")), "a plan makes nothing"
    run.train("sgd")
    assert experiments.left(run, ["03"])[0] == pytest.approx(total * 2 / 3)


def test_the_plan_of_notebook_01_has_the_planted_leak(tmp_path):
    given = {"preset": "tiny", "epochs": 1, "n_models": 8, "store": str(tmp_path / "s"), "out": str(tmp_path)}
    run = settings.settings(given)
    recipe, later, n_models = experiments.wanted(run)["01"][-1]
    assert (recipe, later, n_models) == (run.recipe("sgd"), "leak", 16)
    main = run.train("sgd")
    example = compare.least_sure(compare.plain_signal(main, "phi"), main.member)
    leaky, _ = memorization.leak(run.dataset, example, 50, run.seed)
    before = experiments.left(run, ["01"])[0]
    run.train("sgd", 16, dataset=leaky, subset=0.5)
    assert experiments.left(run, ["01"])[0] == before - experiments.work(recipe, len(run.dataset.y), 16)


@pytest.mark.parametrize(
    "name, count",
    [("sgd", 1), ("sam", 2), ("looksam(k=4)", 1.25), ("swa", 1), ("adam", 1)]
    + [("esam", 1 + 1 / 3 + 1 / 2), ("esam(gamma=1.0)", 2 + 1 / 3), ("dpsgd(sigma=1.0)", 1), ("dpsam(sigma=1.0)", 2)]
    + [("lib.training.sharpness:gsam", 2), ("lib.training.sharpness:looksam(k=4)", 1.25)],
)  # as a reader's own, by trial
def test_the_plan_counts_gradients_as_the_papers_do(name, count):
    assert experiments.gradients(Recipe(optimizer=name, rho=0.1)) == pytest.approx(count)


def test_a_forecast_is_told_once_after_the_second_chunk(tmp_path, capsys):
    run = settings.settings({"preset": "tiny", "store": str(tmp_path / "s"), "out": str(tmp_path)})
    for _ in range(4):
        run.forecast(run.recipe("sgd"), 300, 32, 1.0)
    said = capsys.readouterr().out
    assert said.count("about") == 1 and "to go, 0% is done" in said


def test_variants_are_on_the_baselines_own_base():
    assert parse(interventions.on("adam")("sam")).base_name == "adam" and interventions.on("sgd")("sam") == "sam"


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


# ---- the plan and the notebook ------------------------------------------------------------------------------


def planned(run):
    """(recipe, data) -> models of notebook 06 in the plan."""
    found = {}
    for recipe, data, n_models in experiments.wanted(run, exact=True)["06"]:
        found[recipe, data.hash] = max(n_models, found.get((recipe, data.hash), 0))
    return found


@pytest.mark.parametrize("more", [{}, {"optimizers": "sgd,sam,looksam(k=3)", "epochs": 3}, {"ema": 0.9, "epochs": 2}])
def test_the_plan_of_notebook_06_is_what_its_cells_train(tmp_path, more, monkeypatch):
    given = {"preset": "tiny", "epochs": 2, "n_models": 8, "store": str(tmp_path / "s"), "out": str(tmp_path), **more}
    run, asked = settings.settings(given), {}

    def record(self, optimizer, n_models=None, dataset=None, **changes):
        key = self.recipe(optimizer, **changes), (dataset or self.dataset).hash
        asked[key] = max(n_models or self.n_models, asked.get(key, 0))
        return SimpleNamespace(ids=np.arange(8))

    monkeypatch.setattr(settings.Settings, "train", record)
    monkeypatch.setattr(compare, "keep_common_models", lambda made, essential=None: made)
    influence_values = [
        c.source for c in jupytext.read(settings.ROOT / "notebooks" / "06_beyond.py").cells if "run.train" in c.source
    ]
    trains = "\n".join(line for source in influence_values for line in source.splitlines())
    names = {
        "run": run,
        "baseline": run.names[0],
        "other": run.treatment,
        "interventions": interventions,
        "experiments": experiments,
        "compare": compare,
    }
    interventions.variants(run, run.strengths, run.few)
    for tree in ast.parse(trains).body:  # the statements that train, until the first that looks at what came out
        if "run.train" in ast.unparse(tree) or "plan." in ast.unparse(tree):
            exec(compile(ast.Module([tree], []), "06", "exec"), names)
    interventions.causes(run, run.few, run.most_levels)
    interventions.private(run, run.epsilons, run.private, interventions.delta_of(run))
    assert asked == planned(run)


def test_equal_compute_is_counted_in_gradients(tmp_path):
    given = {"preset": "tiny", "epochs": 20, "store": str(tmp_path / "s"), "out": str(tmp_path)}
    assert experiments.equal_compute(settings.settings(given)) == {10: 20, 20: 40}
    assert experiments.equal_compute(settings.settings({**given, "optimizers": "sgd,looksam"})) == {10: 12, 20: 24}


def test_private_gradients_weigh_more_in_the_work_than_in_the_count():
    plain, private = (Recipe(optimizer=name, batch_size=8) for name in ("sgd", "dpsgd(sigma=1.0)"))
    assert experiments.work(private, 100, 2) == experiments.APART * experiments.work(plain, 100, 2)


def test_a_radius_in_the_name_is_the_only_dose(tmp_path):
    given = {"preset": "tiny", "store": str(tmp_path / "s"), "out": str(tmp_path)}
    run = settings.settings({**given, "optimizers": "sgd,sam(rho=0.2)"})
    assert run.radius_sweep("sam(rho=0.2)") == [0.2] and len(run.radius_sweep("sam")) > 2


def test_the_optimizer_in_question_is_no_private_one(tmp_path):
    given = {"preset": "tiny", "store": str(tmp_path / "s"), "out": str(tmp_path)}
    assert settings.settings({**given, "optimizers": "sgd,sam,dpsam(sigma=1.0)"}).treatment == "sam"


def test_no_level_of_batch_size_is_below_what_msam_needs(tmp_path):
    given = {"preset": "tiny", "batch_size": 64, "store": str(tmp_path / "s"), "out": str(tmp_path)}
    run = settings.settings({**given, "optimizers": "sgd,msam(m=16)"})
    assert ("batch size", "16") not in interventions.levels(run)
    assert ("batch size", "16") in interventions.levels(settings.settings(given))
    experiments.wanted(run)


def test_a_base_that_asks_again_within_a_step_has_no_private_twin(tmp_path):
    given = {"preset": "tiny", "store": str(tmp_path / "s"), "out": str(tmp_path)}
    assert (
        interventions.private_arch(
            settings.settings({**given, "optimizers": "torch.optim:LBFGS,sam+torch.optim:LBFGS"})
        )
        is None
    )
    assert interventions.private_arch(settings.settings({**given, "optimizers": "torch.optim:Adagrad,sam"})) == "mlp"


def test_few_models_only_where_halves_are_complementary(tmp_path):
    given = {"dataset": "digits", "n_models": 256, "store": str(tmp_path / "s"), "out": str(tmp_path)}
    run = settings.settings(given)
    assert (run.sweep, run.few, run.private) == (128, 64, 32)
    run = settings.settings({**given, "subset": 0.4})
    assert run.sweep == run.few == run.private == 256


def test_a_defence_is_told_with_its_price_and_the_strictest_rate_there_is():
    rows = [
        ("test_accuracy", "", -0.02),
        ("auc", "lira", -0.1),
        ("auc", "confidence", 0.01),
        ("tpr@0.01", "lira", -0.2),
    ]
    frame = pd.DataFrame(rows, columns=["metric", "attack", "value"])
    frame = frame.assign(ci_low=frame.value - 0.005, ci_high=frame.value + 0.005)
    assert interventions.strict_rate(frame) == [0.01] and interventions.strict_rate(frame[:3]) == []
    said = text.bought("swa", frame, interventions.strict_rate(frame))
    assert said.startswith("**swa** leaks less: accuracy -2.0 points") and "its TPR at 1% FPR -20.0 points" in said
    more = pd.concat([frame, frame.assign(metric="tpr@0.001"), frame.assign(metric="tpr@0.0001")])
    assert interventions.strict_rate(more) == [0.001]


def test_where_a_metric_is_largest():
    rows = [("sgd", "", "auc", "1 to 2", 0.7), ("sgd", "", "auc", "3 to 9", 0.6), ("sam", "sgd", "auc", "3 to 9", 0.1)]
    frame = pd.DataFrame(rows, columns=["optimizer", "baseline", "metric", "size", "value"])
    largest = {("sgd", "", "auc"): ("1 to 2", 0.7), ("sam", "sgd", "auc"): ("3 to 9", 0.1)}
    assert interventions.most(frame) == largest

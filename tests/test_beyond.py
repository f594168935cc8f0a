import ast
from types import SimpleNamespace

import jupytext
import numpy as np
import pandas as pd
import pytest

from lib.analysis import compare, interventions, memorization
from lib.study import experiments, settings, text
from lib.training.optimizers import parse
from lib.training.recipe import Recipe


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
    example = compare.least_sure(compare.signal(main, "phi"), main.member)
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

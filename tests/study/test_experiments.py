"""What is declared, what is left to train, and processes that share it."""

import re
import shutil
import threading
import time
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from lib.analysis import memorization
from lib.study import command_line, experiments, settings
from lib.study.experiments import Experiment, declared, of
from lib.training import Recipe, ensemble, privacy, train, workers
from lib.training.store import check_disk
from tests.processes import ended, start

SMALL = {"preset": "tiny", "n_models": "8", "n_examples": "100", "epochs": "2"}


@pytest.fixture(autouse=True)
def quick_accountant(monkeypatch):
    """Finding the noise for an epsilon takes seconds, and test_privacy.py tests it."""
    monkeypatch.setattr(privacy, "noise_for", lambda epsilon, *run: 100 / epsilon)


def small(tmp_path, **given):
    return settings.open_run({**SMALL, "store": tmp_path / "store", "out": tmp_path / "out", **given})


def words(tmp_path, *more):
    return [*(f"{n}={v}" for n, v in SMALL.items()), f"STORE={tmp_path / 'store'}", f"OUT={tmp_path / 'out'}", *more]


def left(run, notebooks=None):
    """Million gradients still to do."""
    return experiments.Plan(run, notebooks).table().megagradients.sum()


def trained(run, planned):
    return train(planned.recipe, planned.dataset, planned.n_models, run.store, run.device, quiet=True)


# ---- the list -----------------------------------------------------------------------------------------------


def two_rates(run):
    return {lr: of(run, "sgd", 8, lr=lr) for lr in (0.05, 0.3)}


def three_rates(run):
    return two_rates(run) | {0.1: of(run, "sgd", 16)}


@pytest.mark.parametrize("declare, models", [(two_rates, [8, 8]), (three_rates, [8, 8, 16])])
def test_a_changed_experiment_is_followed_by_all_that_use_it(tmp_path, monkeypatch, capsys, declare, models):
    """The plan, the forecast, the check of the disk, --work and run.ensembles."""
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"rates": Experiment(declare, ("03",))})
    run = small(tmp_path)
    plan, one = experiments.Plan(run), experiments.work(run.recipe("sgd"), 100, 1)
    table = plan.table()
    assert list(table.experiment) == ["rates"] * len(models) and list(table.models) == models
    assert left(run, ["01"]) == 0 and left(run, ["03"]) == pytest.approx(sum(models) * one / 1e6)

    for room, fits in ((0.9, False), (1.1, True)):
        free = shutil._ntuple_diskusage(10**9, 10**9, room * 1e6 * table.megabytes.sum())
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: free)
        with nullcontext() if fits else pytest.raises(ValueError, match="store="):
            check_disk(run.store, 1e6 * plan.table().megabytes.sum())
    monkeypatch.undo()
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"rates": Experiment(declare, ("03",))})
    monkeypatch.setattr(experiments, "QUIET", 0)

    assert command_line.main(["--work", *words(tmp_path, "03")]) == 0
    assert left(run) == 0 and "to go" in capsys.readouterr().out
    found = run.ensembles("rates")
    assert {lr: e.recipe.lr for lr, e in found.items()} == {lr: lr for lr in declare(run)}
    with pytest.raises(ValueError, match="main.*rates"):
        run.ensembles("main")


@pytest.mark.parametrize("more", [{}, {"optimizers": "sgd,sam,looksam(k=3)", "epochs": 3}, {"arch": "mlp_bn"}])
def test_essential_keys_are_declared_and_every_recipe_is_valid(tmp_path, more):
    run = small(tmp_path, **more)
    for name, experiment in experiments.EXPERIMENTS.items():
        found = declared(run, name, run.dataset)
        assert found and all(8 <= planned.n_models <= 16 for planned in found.values()), name
        assert experiment.essential is None or set(experiment.essential(run)) <= set(found), name


def test_keys_are_those_that_the_notebooks_expect(tmp_path):
    run = small(tmp_path, epochs=8)
    keys = {name: list(declared(run, name, run.dataset)) for name in experiments.EXPERIMENTS}
    assert keys["main"] == ["sgd", "sam"]
    np.testing.assert_allclose(keys["radius sweep"], [0, 0.15, 0.3, 0.6])
    assert {e for e, n in keys["length sweep"] if n == "sam"} == {1, 3, 8, 16}
    assert {e for e, n in keys["length sweep"] if n == "sgd"} == {1, 3, 8, 16, 2, 6, 4}
    assert (keys["planted leak"], keys["planted faults"]) == (["leak"], ["before", "after"])
    assert keys["variants"][:4] == [("sgd", 0.0), ("sam", 0.15), ("sam", 0.3), ("sam", 0.6)]
    assert len(keys["variants"]) == 4 + 8 and keys["defences"][:2] == ["none", "sam"]
    assert keys["causes"][:2] == [("as it is", "as it is", "sgd"), ("as it is", "as it is", "sam")]
    assert keys["private"] == [("sgd", np.inf), ("dpsgd", 8), ("dpsgd", 64), ("dpsam", 8), ("dpsam", 64)]


def test_sizes_of_the_sweeps(tmp_path):
    given = {"preset": "default", "n_models": 256, "n_examples": 1000}
    run = small(tmp_path, **given)
    assert [experiments.n_models(run, kind) for kind in ("sweep", "few", "fewer")] == [128, 64, 32]
    run = small(tmp_path, **given, subset=0.4)  # each model draws its own subset: few would miss examples
    assert [experiments.n_models(run, kind) for kind in ("sweep", "few", "fewer")] == [256] * 3


def test_the_tuning_tries_every_combination_or_changes_one_thing_at_a_time(tmp_path):
    run = small(tmp_path, weight_decay=0.01)
    full = declared(run, "tuning")
    rates, decays, radii = (0.1, 0.2, 0.4), (0.01, 0.04), (0.15, 0.3, 0.6)
    wanted = {("sam", rho, lr, decay) for rho in radii for lr in rates for decay in decays}
    wanted |= {("sgd", 0.0, lr, decay) for lr in rates for decay in decays}
    wanted |= {("sgd", 0.0, 0.05, 0.01), ("sgd", 0.0, 0.8, 0.01), ("sam", 0.3, 0.8, 0.01)}
    assert set(full) == wanted
    for (name, rho, lr, decay), (recipe, *_) in full.items():
        assert (str(recipe.optimizer), recipe.rho, recipe.lr, recipe.weight_decay) == (name, rho, lr, decay)
    cross = declared(small(tmp_path, weight_decay=0.01, tuning="cross"), "tuning")
    own = {"sgd": ("sgd", 0.0, 0.1, 0.01), "sam": ("sam", 0.3, 0.1, 0.01)}
    assert all(sum(a != b for a, b in zip(key, own[key[0]], strict=True)) <= 1 for key in cross)
    assert set(own.values()) < set(cross) < set(full) and len(cross) == 13
    few = declared(small(tmp_path, weight_decay=0.01, tuning="few"), "tuning")
    dropped = {("sgd", 0.0, 0.05, 0.01), ("sam", 0.15, 0.1, 0.01)} | {(*key[:2], 0.8, 0.01) for key in own.values()}
    assert set(few) < set(cross) and set(cross) - set(few) == dropped
    decays = {decay for *_, decay in declared(small(tmp_path, weight_decay=0), "tuning")}
    assert decays == {0, 5e-4}


def test_other_pools_are_other_examples_and_other_halves(tmp_path):
    run = small(tmp_path, n_pools=3)
    found = declared(run, "pools")
    wanted = {(name, rho, lr, 5e-4) for name, rho in (("sgd", 0.0), ("sam", 0.3)) for lr in (0.1, 0.2, 0.4)}
    assert wanted < set(declared(run, "tuning"))
    assert set(found) == {(seed, *key) for seed in (1, 2) for key in wanted}
    pools = [run.dataset, *run.other_pools.values()]
    assert len({pool.hash for pool in pools}) == 3 and len({pool.x_test.tobytes() for pool in pools}) == 3
    assert {pool.x.shape for pool in pools} == {run.dataset.x.shape}
    assert all(recipe.seed == seed for (seed, *_), (recipe, *_) in found.items())
    assert declared(small(tmp_path, n_pools=1), "pools") == {}


def test_levels_change_one_thing_at_a_time_and_the_run_comes_first(tmp_path):
    run = small(tmp_path)
    found = experiments.levels(run)
    assert list(found)[0] == ("as it is", "as it is")
    assert [len(changes) for changes in found.values()] == [0] + [1] * (len(found) - 1)
    assert [key[:2] for key in declared(run, "causes")] == [key for key in found for _ in range(2)]


def test_no_level_of_batch_size_is_below_what_msam_needs(tmp_path):
    given = {"batch_size": 64, "n_examples": 300}  # four times as large a batch is more than a half of the pool
    assert ("batch size", "16") not in experiments.levels(small(tmp_path, **given, optimizers="sgd,msam(m=16)"))
    assert ("batch size", "16") in experiments.levels(small(tmp_path, **given))


def test_a_radius_in_the_name_is_the_only_one(tmp_path):
    run = small(tmp_path, optimizers="sgd,sam(rho=0.2)")
    assert list(declared(run, "radius sweep")) == [0.0, 0.2]
    assert [rho for name, rho in declared(run, "variants") if name == "sam(rho=0.2)"] == [0.2]


def test_variants_are_on_the_baselines_own_base(tmp_path):
    names = {name for name, _ in declared(small(tmp_path, optimizers="adam,sam+adam"), "variants")}
    assert {"adam", "sam+adam", "swa+adam"} <= names and "sam" not in names


def test_equal_compute_is_counted_in_gradients(tmp_path):
    assert experiments.equal_compute(small(tmp_path, epochs=20)) == {2: 4, 8: 16, 20: 40}
    assert experiments.equal_compute(small(tmp_path, epochs=20, optimizers="sgd,looksam")) == {2: 2, 8: 10, 20: 24}


def test_a_network_without_a_gradient_of_each_example_has_no_private_twin(tmp_path):
    assert experiments.private_arch(small(tmp_path, optimizers="torch.optim:Adagrad,sam")) == "mlp"
    assert experiments.private_arch(small(tmp_path, arch="tests.training.test_trial:gru")) is None


# ---- the plan -----------------------------------------------------------------------------------------------


def test_private_training_takes_half_the_epochs_and_the_noise_that_those_steps_need(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(privacy, "noise_for", lambda epsilon, batch, n, steps, *more: asked.append(steps) or 1.0)
    run = small(tmp_path)
    (_, plain), *private = declared(run, "private").items()
    assert plain.recipe.epochs == run.epochs and {one.recipe.epochs for _, one in private} == {run.epochs // 2}
    n = round(run.n_examples * plain.recipe.subset)
    assert set(asked) == {n // run.batch_size * (run.epochs // 2)} and asked[0] > 0


def test_private_gradients_weigh_more_in_the_work_than_in_the_count():
    plain, private = (Recipe(optimizer=name, batch_size=8) for name in ("sgd", "dpsgd(sigma=1.0)"))
    assert experiments.work(private, 100, 2) == experiments.PER_EXAMPLE * experiments.work(plain, 100, 2)


def test_the_plan_lists_each_model_once_and_counts_what_is_finished(tmp_path):
    run = small(tmp_path)
    plan = experiments.Plan(run, ["01", "03"])
    before = plan.table()
    assert (before.finished == 0).all() and before.seconds.isna().all() and before.megabytes.sum() > 0
    assert not list((tmp_path / "store").glob("digits*")), "a plan makes nothing"
    trained(run, of(run, "sgd", 8))
    after = plan.table()
    main = (after.optimizer == "sgd") & (after.epochs == run.epochs) & (after.models == 8)
    assert (after.finished[main] == 8).all() and (after.finished[~main] == 0).all() and after.seconds.notna().all()
    assert after.megagradients[main].item() == after.seconds[main].item() == after.megabytes[main].item() == 0
    total = after.megagradients_in_all.sum()
    assert total == before.megagradients.sum() == before.megagradients_in_all.sum()
    assert after.megagradients.sum() == pytest.approx(total - experiments.work(run.recipe("sgd"), 100, 8) / 1e6)


def test_private_models_are_trained_while_the_first_ensemble_compiles(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(experiments, "train", lambda recipe, *_, **how: order.append(recipe.optimizer))
    monkeypatch.setattr(experiments, "AT_ONCE", 1)
    plan = experiments.Plan(small(tmp_path), ["01", "06"])
    plan.train(["01", "06"])
    private = [optimizer.is_private for optimizer in order]
    assert len(order) == len(plan.ensembles) and str(order[0]) == "sgd" and sum(private) > 1
    assert private == [False] + [True] * sum(private) + [False] * (len(order) - sum(private) - 1)


def test_if_one_ensemble_is_worth_processes_they_train_all_and_the_forecast_knows(tmp_path, monkeypatch):
    """Started for the longest training alone, they would come when half of the models are trained."""
    run, seen = small(tmp_path), []
    steps = run.n_examples // 2 // run.batch_size * run.epochs
    monkeypatch.setattr(workers, "LONG", 2 * steps)  # the length sweep trains for twice as many epochs
    monkeypatch.setattr("loky.cpu_count", lambda: 2)
    how_many = workers.n_processes
    monkeypatch.setattr(
        experiments, "train", lambda *recipe_and_data, **_: seen.append(how_many(*recipe_and_data[:2], cpu))
    )
    cpu = torch.device("cpu")
    workers.processes.cache_clear()
    try:
        short, plan = experiments.Plan(run, ["01"]), experiments.Plan(run, ["01", "05"])
        assert how_many(run.recipe("sgd"), run.dataset, cpu) == short.at_once() == 1 and plan.at_once() == 2
        halves = plan.table(1e6).seconds - experiments.START / 2
        np.testing.assert_allclose(halves, plan.table(1e6).megagradients / 2)
        short.train(["01"])
        assert set(seen) == {1}
        seen.clear()
        plan.train(["01", "05"])
        assert set(seen) == {2} and len(seen) == len(plan.ensembles)
    finally:
        workers.processes.cache_clear()


def test_a_pool_that_a_notebook_draws_is_asked_for_and_in_no_plan(tmp_path):
    run = small(tmp_path)
    assert "planted leak" not in set(experiments.Plan(run, ["01"]).table().experiment)
    leaky, _ = memorization.leak(run.dataset, 3, 20, run.seed)
    with pytest.raises(ValueError, match="dataset"):
        run.ensembles("planted leak")
    found = run.ensembles("planted leak", dataset=leaky)["leak"]
    assert found.dataset is leaky and len(found.ids) == experiments.PLANTED


def test_two_processes_work_off_a_plan_together_and_leave_nothing(tmp_path):
    pair = [start(command_line.main, ["--work", *words(tmp_path, "01", "03")]) for _ in range(2)]
    assert [ended(process) for process in pair] == [0, 0]
    run = small(tmp_path)
    assert left(run, ["03"]) == 0
    table = experiments.Plan(run, ["01"]).table()
    assert len(table) and (table.finished == table.models).all()
    assert not (tmp_path / "out" / "results.csv").exists()


def test_a_plan_divides_by_the_processes_and_leaves_the_threads_alone(tmp_path, monkeypatch):
    run = small(tmp_path)
    trained(run, of(run, "sgd", 8))
    plan = experiments.Plan(run, ["01"])
    one = plan.table().seconds
    monkeypatch.setattr(workers, "n_processes", lambda *_: 4)
    np.testing.assert_allclose(plan.table().seconds, one / 4)
    monkeypatch.undo()
    before = torch.get_num_threads()
    assert plan.trial() > 0 and torch.get_num_threads() == before


def test_a_trial_is_about_as_fast_as_the_training(tmp_path, one_thread):
    run = small(tmp_path, epochs=20)
    plan = experiments.Plan(run, ["01"])
    rate = plan.trial()
    trained(run, of(run, "sgd", 64))
    known = plan.table()
    assert rate / 3 < (known.rate / plan.at_once()).max() < 3 * rate


def slow_and_private(run):
    return {"plain": of(run, "sgd", 32, epochs=10), "private": of(run, "dpsgd(sigma=1.0)", 32, epochs=10)}


def test_a_forecast_meets_what_came(tmp_path, monkeypatch):
    """After half of the first ensemble, and again after it: seconds to go, beside the clock."""
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"two": Experiment(slow_and_private, ("03",))})
    monkeypatch.setattr(workers, "n_processes", lambda *_: 1)
    run, told = small(tmp_path), []
    plan = experiments.Plan(run, ["03"])
    trained(run, of(run, "dpsgd(sigma=1.0)", 16, epochs=2))  # the first step of a kind is slow
    plan.notebooks = []
    for _, _, (recipe, n_models, data) in plan.ensembles:
        for n in (n_models // 2, n_models):
            train(recipe, data, n, run.store, run.device, quiet=True)
            told.append((time.monotonic(), plan.seconds_left(plan.table())))
    at, said = told[2]  # half of the private models are left, and both kinds are known
    assert said == pytest.approx(told[-1][0] - at, rel=0.6)
    assert told[0][1] > told[1][1] > told[2][1] > told[-1][1] == 0


def test_notebooks_are_analysed_two_at_a_time_beside_the_training(tmp_path, monkeypatch):
    run = small(tmp_path)
    plan, frame = experiments.Plan(run, ["01", "02"]), pd.DataFrame({"seconds": [9.0, 1.0]})
    monkeypatch.setattr(experiments, "ANALYSIS", {"01": (3, 0), "02": (5, 0)})
    monkeypatch.setattr(experiments, "AT_ONCE", 2)
    monkeypatch.setattr(experiments, "pace", lambda: experiments.PACE)
    assert plan.seconds_left(frame) == pytest.approx(10 + (3 + 5) / 2)
    plan.notebooks.remove("01")
    assert plan.seconds_left(frame) == pytest.approx(10 + 5 / 2)
    # a machine half as fast takes twice as long for the analysis; the training's rate was measured on it
    monkeypatch.setattr(experiments, "pace", lambda: 2 * experiments.PACE)
    assert plan.seconds_left(frame) == pytest.approx(10 + 5)


def test_other_threads_do_not_change_the_pace():
    """It counts the processor's seconds of this thread: another that works at the same time does not slow it down."""
    alone, done = experiments.pace(), threading.Event()
    busy = threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(done.is_set, True)])
    busy.start()
    try:
        began = time.monotonic()
        beside = experiments.pace()
        assert time.monotonic() - began > 4 * beside, "the other thread took none of its time"
    finally:
        done.set()
        busy.join()
    assert beside == pytest.approx(alone, rel=0.5)


def test_an_optional_experiment_without_enough_models_is_not_run(tmp_path, monkeypatch):
    run, asked = small(tmp_path), []

    def failing(recipe, dataset, *_, **__):
        asked.append(recipe)
        return ensemble.Ensemble(recipe, dataset, None, np.arange(6))

    monkeypatch.setattr(settings, "train", failing)
    assert run.ensembles("private") == {} and len(asked) == 1, "nothing private is trained in vain"
    with pytest.raises(ValueError, match="n_models"):
        run.ensembles("main")


def test_the_notebooks_ask_for_the_experiments_that_are_declared_for_them():
    asked = {name: set() for name in experiments.EXPERIMENTS}
    for path in (settings.ROOT / "notebooks").glob("*.py"):
        for name in re.findall(r'run\.ensembles\(\s*"([^"]+)"', path.read_text()):
            asked[name].add(path.name[:2])
    assert asked == {name: set(experiment.notebooks) for name, experiment in experiments.EXPERIMENTS.items()}

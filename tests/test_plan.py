"""What is left to train, and processes that share it."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from lib.analysis import interventions, memorization
from lib.study import command_line, experiments, settings
from lib.training import ensemble

SMALL = {"preset": "tiny", "n_models": "8", "n_examples": "100", "epochs": "2"}


def small(tmp_path, **given):
    return settings.settings({**SMALL, "store": str(tmp_path / "store"), "out": str(tmp_path / "out"), **given})


def words(tmp_path, *more):
    return [*(f"{n}={v}" for n, v in SMALL.items()), f"STORE={tmp_path / 'store'}", f"OUT={tmp_path / 'out'}", *more]


def test_the_plan_lists_each_model_once_and_counts_what_is_finished(tmp_path):
    run = small(tmp_path)
    before = experiments.table(run, ["01", "03"])
    assert (before.finished == 0).all() and before.seconds.isna().all() and before.megabytes.sum() > 0
    assert set(before.notebook) == {"01"}, "notebook 03 needs nothing more"
    assert before.duplicated(["optimizer", "rho", "epochs"]).sum() == 1, "the leak, on other data"
    run.train("sgd")
    after = experiments.table(run, ["01", "03"])
    main = (after.optimizer == "sgd") & (after.epochs == run.epochs) & (after.models == 8)
    assert (after.finished[main] == 8).all() and (after.finished[~main] == 0).all() and after.seconds.notna().all()
    assert after.megagradients[main].item() == after.seconds[main].item() == after.megabytes[main].item() == 0
    done, total = experiments.left(run, ["01", "03"])
    assert done == pytest.approx(1e6 * after.megagradients.sum()) and total == pytest.approx(
        1e6 * before.megagradients.sum()
    )


def test_work_on_a_pool_that_is_drawn_later_counts_once_it_is_there(tmp_path):
    run = small(tmp_path)
    drawn = [row for row in experiments.ensembles(run, ["02"]) if row[2] == "planted"]
    assert drawn and not experiments.flags(run, *drawn[0][1:])
    _, recipe, _, _, high = drawn[0]
    pool, _, _ = memorization.plant(run.dataset, [0, 1], 2, 1, seed=0)
    ensemble.train(recipe, pool, high, run.store, "cpu", quiet=True)
    assert len(experiments.flags(run, *drawn[0][1:])) == high
    other = replace(recipe, lr=0.05)
    assert not experiments.flags(run, other, "planted", 0, high)
    assert not experiments.flags(run, recipe, "leak", 0, high)


def test_the_private_models_of_an_exact_plan_are_those_that_the_notebook_trains(tmp_path):
    run = small(tmp_path)
    names = {f"{rule}(sigma={s:.4g})" for (rule, _), s in
             interventions.noise_levels(run, run.epsilons, interventions.delta_of(run)).items()}  # fmt: skip
    exact = {recipe.optimizer for recipe, _, _ in experiments.wanted(run, exact=True)["06"]}
    rough = {recipe.optimizer for recipe, _, _ in experiments.wanted(run)["06"]}
    assert names <= exact and not names & rough
    size = [
        sum(experiments.work(r, 100, m) for r, _, m in experiments.wanted(run, exact=e)["06"]) for e in (False, True)
    ]
    assert size[0] == size[1]


def test_two_processes_work_off_a_plan_together_and_leave_nothing(tmp_path):
    command = [sys.executable, "-m", "lib.study", "--work", *words(tmp_path, "01", "03")]
    pair = [subprocess.Popen(command, cwd=settings.ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(p.communicate(), p.returncode)[1] for p in pair] == [0, 0]
    run = small(tmp_path)
    assert experiments.left(run, ["03"])[0] == 0
    left = [row for row in experiments.ensembles(run, ["01"]) if row[2] != "leak"]
    assert all(len(experiments.flags(run, *row[1:])) == row[4] - row[3] for row in left)
    assert not (tmp_path / "out" / "results.csv").exists()


def test_a_notebook_that_trains_nothing_has_an_empty_plan(tmp_path, capsys):
    assert experiments.left(small(tmp_path), ["05"]) == (0, 0)
    experiments.check_disk(small(tmp_path), ["05"])
    assert (
        command_line.main(["--plan", *words(tmp_path, "05")])
        == 0
        == command_line.main(["--work", *words(tmp_path, "05")])
    )
    assert "Left: 0 of 0 models" in capsys.readouterr().out


def test_the_command_says_the_plan_and_trains_nothing(tmp_path, capsys):
    assert command_line.main(["--plan", *words(tmp_path, "03")]) == 0
    said = capsys.readouterr().out
    assert "Left: 16 of 16 models" in said and "on the disk" in said and "memory" in said and "trial" in said
    assert not list((tmp_path / "store").glob("*/done/*.json"))
    assert command_line.main(["--plan", "--work", *words(tmp_path)]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_a_run_that_will_not_fit_is_refused_with_figures_before_training(tmp_path, monkeypatch, capsys):
    full = shutil._ntuple_diskusage(10**9, 10**9, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert command_line.main(words(tmp_path, "03")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: store=") and "MB free" in said and said.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.setattr(settings.step, "free_memory", lambda device: 1000)
    assert command_line.main(words(tmp_path, "03")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: batch_size=") and "GB" in said and said.count("\n") == 1
    assert not list((tmp_path / "store").glob("*/done/*.json"))

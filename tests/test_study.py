import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lib.study import command_line, settings, text, verdict
from lib.study.results import COLUMNS, PROVENANCE, Results, differing, recipe_digest

ROOT = settings.ROOT


def tiny(tmp_path, **given):
    return settings.settings(
        {"preset": "tiny", "store": str(tmp_path / "store"), "out": str(tmp_path / "out"), **given}
    )


def test_a_preset_fills_what_is_not_given_and_what_is_given_wins(tmp_path):
    run = tiny(tmp_path, n_models="24", rho=None)
    assert (run.n_models, run.rho, run.epochs, len(run.dataset.y)) == (24, 0.3, 8, 300)
    assert run.names == ("sgd", "sam") and run.recipe("sam").rho == 0.3 and run.recipe("sgd").rho == 0.0


@pytest.mark.parametrize(
    "given, names",
    [({"n_model": 16}, "n_model.*n_models"), ({"n_models": "many"}, "n_models.*int"),
     ({"n_models": 16.5}, "n_models"), ({"n_models": True}, "n_models"), ({"n_models": 1}, "n_models"),
     ({"n_models": 4}, "n_models"), ({"n_models": 17}, "n_models"), ({"n_examples": 301}, "n_examples"),
     ({"n_examples": 8}, "n_examples"), ({"n_examples": 10**6}, "n_examples"),
     ({"preset": "huge"}, "preset.*default"), ({"dataset": "mnist"}, "digits"), ({"dataset": "folder"}, "data"),
     ({"dataset": "npz", "data": "absent.npz"}, "data"), ({"arch": "vit"}, "arch"),
     ({"optimizers": "sgd,sammy"}, "optimizers"), ({"optimizers": "sgd,sgd"}, "optimizers"),
     ({"optimizers": "sgd"}, "optimizers"), ({"optimizers": "sam,sgd"}, "optimizers.*baseline"), ({"rho": 0}, "rho"),
     ({"augment": True, "dataset": "npz"}, "data"),
     ({"device": "cpu:x"}, "device"), ({"rho": -1}, "rho"),
     ({"rho": "nan"}, "rho"), ({"subset": 0.9}, "subset.*n_models"), ({"subset": 0}, "subset"),
     ({"subset": 1.0}, "subset"), ({"batch_size": 151}, "batch"), ({"epochs": 0}, "epochs"), ({"lr": 0}, "lr"),
     ({"weight_decay": -1}, "weight_decay"), ({"augment": "?"}, "aug"), ({"seed": -1}, "seed"),
     ({"device": "tpu"}, "device"), ({"ema": 1}, "ema"), ({"engine": "dask"}, "engine.*ray"), ({"gpus": -1}, "gpus"),
     ({"arch": "cnn", "dataset": "npz"}, "data")],
)  # fmt: skip
def test_bad_input_is_one_error_that_names_the_parameter(tmp_path, given, names):
    with pytest.raises((ValueError, FileNotFoundError), match=names):
        tiny(tmp_path, **given)
    assert not list(tmp_path.glob("store/*-*/done/*"))


def test_an_unwritable_out_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out="):
        tiny(tmp_path, out=str(tmp_path / "file" / "below"))


def test_words_of_make_and_flags_mean_the_same():
    one = command_line.parse(["DATASET=cifar10", "N_MODELS=32", "01"])
    two = command_line.parse(["--dataset", "cifar10", "--n-models", "32", "01"])
    assert one == two == ([command_line.NOTEBOOKS[0]], {"dataset": "cifar10", "n_models": "32"}, "run")


def test_a_notebook_run_again_in_the_same_kernel_sees_its_changed_parameters(tmp_path):
    names = {"preset": "tiny", "n_models": 24, "store": str(tmp_path / "s"), "out": str(tmp_path / "o"), "leak": 1}
    assert settings.notebook_settings(names, before=set(names)).n_models == 24
    with pytest.raises(ValueError, match="leak"):
        settings.notebook_settings(names, before=set(settings.PARAMETERS))


@pytest.mark.parametrize("words", [["N_MODEL=16"], ["N_MODELS=sixteen"], ["99"], ["01", "77"], ["DATASET=mnist"]])
def test_the_command_line_refuses_with_one_line_and_status_2(words, capsys):
    assert command_line.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_make_passes_an_unknown_knob_on_so_that_it_fails():
    said = subprocess.run(["make", "-n", "study", "N_MODEL=16", "PYTHON=x"], cwd=ROOT, capture_output=True, text=True)
    assert "lib.study N_MODEL=16" in said.stdout and "PYTHON=x" not in said.stdout.split("lib.study")[1]


def test_a_flag_is_not_guessed_from_its_beginning(capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.parse(["--n_model", "16"])
    assert "--n_model" in capsys.readouterr().err


def test_a_small_table_gets_a_batch_that_fits_and_a_given_batch_is_left_alone(tmp_path):
    assert (
        tiny(tmp_path, n_examples=110).batch_size == 27
        and tiny(tmp_path, n_examples=110, batch_size=40).batch_size == 40
    )


def test_help_lists_every_parameter():
    said = subprocess.run([sys.executable, "-m", "lib.study", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and all(f"--{name.replace('_', '-')}" in said.stdout for name in settings.PARAMETERS)


def test_presets_are_valid_recipes(tmp_path):
    """Every preset makes recipes on a stand-in of its kind, on the CPU."""
    for preset, kinds in settings.PRESETS.items():
        for kind, values in kinds.items():
            unknown = set(values) - set(settings.PARAMETERS)
            assert not unknown, (preset, kind, unknown)
            run = settings.Settings({**values, "data": None, "device": "cpu"}, None)
            assert [run.recipe(name).epochs for name in run.names] == [values["epochs"]] * 2


def frame(value):
    return pd.DataFrame([dict(optimizer="sam", metric="auc", value=value, ci_low=value - 0.1, ci_high=value + 0.1)])


def test_a_notebook_run_again_replaces_its_own_rows_and_no_others(tmp_path):
    run = tiny(tmp_path)
    for notebook, value in (("01_a", 0.6), ("02_b", 0.7), ("01_a", 0.8)):
        results = Results(notebook, run)
        results.add(frame(value), attack="lira")
        results.add(frame(value + 0.05), attack="rmia", note="second")
    found = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(found.columns) == [*COLUMNS, *PROVENANCE] and list(found.notebook) == ["01_a"] * 2 + ["02_b"] * 2
    np.testing.assert_allclose(found.value, [0.8, 0.85, 0.7, 0.75])
    assert set(found.rho) == {0.3} and set(found.n_models) == {16}


def test_every_row_says_what_made_it_and_an_older_file_is_kept(tmp_path):
    run, path = tiny(tmp_path, device="cpu"), tmp_path / "out" / "results.csv"
    old = pd.DataFrame([{**dict.fromkeys(COLUMNS, ""), "notebook": "02_old", "metric": "auc", "value": "0.5"}])
    old.to_csv(path, index=False)  # as it was written before there was any provenance
    Results("01_new", run).add(frame(0.6))
    new, kept = pd.read_csv(path, dtype=str, keep_default_na=False).itertuples(index=False)
    assert (new.seed, new.recipe, new.device) == ("0", recipe_digest(run), "cpu") and float(new.seconds) >= 0
    for name in ("flat-is-not-private", "python", "torch", "numpy"):
        assert re.search(rf"\b{name} \d+\.\d+", new.versions), new.versions
    assert kept.value == "0.5" and kept.recipe == kept.seconds == ""
    assert len(verdict.read(path)) == 2


def test_the_recipe_names_what_decides_a_run_and_not_where_it_is_made(tmp_path):
    one = recipe_digest(tiny(tmp_path))
    assert re.fullmatch("[0-9a-f]{12}", one)
    assert one == recipe_digest(tiny(tmp_path / "elsewhere"))  # another store, another folder of results
    changes = {"seed": 1, "rho": 0.2, "epochs": 9, "n_models": 24, "optimizers": "sgd,asam", "dataset": "subclasses"}
    others = [recipe_digest(tiny(tmp_path, **{name: value})) for name, value in changes.items()]
    assert len({one, *others}) == 1 + len(changes)


@pytest.mark.parametrize("value, word", [(0.2, "more"), (-0.2, "less"), (0.05, "neither")])
def test_a_sentence_follows_its_interval(value, word):
    row = frame(value).iloc[0]
    assert text.verb(row, "more", "less", "neither") == word
    assert f"{100 * value:+.1f} points" in text.points(row)


def test_settings_that_differ_between_the_notebooks_of_a_folder_are_said(tmp_path):
    frame = pd.DataFrame([{"metric": "auc", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "optimizer": "sgd"}])
    for book, rho in (("01_phenomenon", 0.1), ("02_memorization", 0.1)):
        run = settings.settings({"preset": "tiny", "rho": rho, "out": str(tmp_path), "store": str(tmp_path / "store")})
        Results(book, run).add(frame)
    assert differing(tmp_path) == []
    run = settings.settings({"preset": "tiny", "rho": 0.2, "out": str(tmp_path), "store": str(tmp_path / "store")})
    Results("02_memorization", run).add(frame)
    assert differing(tmp_path) == ["rho differs: 0.1 in 01_phenomenon, 0.2 in 02_memorization"]


def test_a_class_that_a_half_would_miss_is_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="n_examples=40: model .* none of class"):
        tiny(tmp_path, n_examples=40)
    assert not list((tmp_path / "s").glob("*-*"))

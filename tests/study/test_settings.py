import numpy as np
import pytest
from sklearn.datasets import load_digits

from lib.study import settings

CSCORES = settings.ROOT.parent / "shared" / "data" / "cifar10_cscores.npy"
PARAMETERS = list(settings.Parameters.model_fields)


def tiny(tmp_path, **given):
    return settings.open_run({"preset": "tiny", "store": tmp_path / "store", "out": tmp_path / "out", **given})


def test_a_preset_fills_what_is_not_given_and_what_is_given_wins(tmp_path):
    run = tiny(tmp_path, n_models="24", rho=None, augment="false")
    assert (run.n_models, run.rho, run.epochs, len(run.dataset.y)) == (24, 0.3, 10, 300)
    assert run.names == ("sgd", "sam") and run.recipe("sam").rho == 0.3 and run.recipe("sgd").rho == 0.0
    assert run.augment is False and None not in run.parameters.model_dump(exclude={"data", "scores"}).values()


@pytest.mark.parametrize(
    "given, names",
    [({"n_model": 16}, "n_model.*n_models"), ({"n_models": "many"}, "n_models.*many.*int"),
     ({"n_models": 16.5}, "n_models"), ({"n_models": True}, "n_models"), ({"n_models": 1}, "n_models"),
     ({"n_models": 4}, "n_models"), ({"n_models": 17}, "n_models"), ({"n_examples": 301}, "n_examples"),
     ({"n_examples": 8}, "n_examples"), ({"n_examples": 10**6}, "n_examples"),
     ({"preset": "huge"}, "preset.*default"), ({"dataset": "mnist"}, "digits"), ({"dataset": "folder"}, "data"),
     ({"dataset": "npz", "data": "absent.npz"}, "data"), ({"arch": "vit"}, "arch"),
     ({"optimizers": "sgd,sammy"}, "optimizers"), ({"optimizers": "sgd,sgd"}, "optimizers"),
     ({"optimizers": "sgd"}, "optimizers"), ({"optimizers": "sam,sgd"}, "optimizers.*baseline"), ({"rho": 0}, "rho"),
     ({"augment": True, "dataset": "npz"}, "data"), ({"epochs": True}, "epochs"),
     ({"device": "cpu:x"}, "device"), ({"rho": -1}, "rho"),
     ({"rho": "nan"}, "rho"), ({"subset": 0.9}, "subset.*n_models"), ({"subset": 0}, "subset"),
     ({"subset": 1.0}, "subset"), ({"batch_size": 151}, "batch"), ({"epochs": 0}, "epochs"), ({"lr": 0}, "lr"),
     ({"weight_decay": -1}, "weight_decay"), ({"augment": "?"}, "aug"), ({"seed": -1}, "seed"),
     ({"device": "tpu"}, "device"), ({"ema": 1}, "ema"), ({"engine": "dask"}, "engine.*ray"), ({"gpus": -1}, "gpus"),
     ({"arch": "cnn", "dataset": "npz"}, "data")],
)  # fmt: skip
def test_bad_input_is_one_error_that_names_the_parameter(tmp_path, given, names):
    with pytest.raises(ValueError, match=names) as found:
        tiny(tmp_path, **given)
    assert "\n" not in str(found.value)
    assert not list(tmp_path.glob("store/*-*/done/*"))


@pytest.mark.parametrize(
    "made, names",
    [(None, "absent.npy"), (np.ones(1796), "1797"), (np.ones((1797, 2)), "1797, 2"), (np.array(["a"] * 1797), "<U1"),
     (np.where(np.arange(1797) == 5, np.nan, 1), "finite"), (np.full(1797, np.inf), "finite"),
     (np.array([{}], dtype=object), "can't be read"), ("name,score\n", "can't be read"), (b"", "can't be read")],
)  # fmt: skip
def test_published_scores_that_do_not_fit_are_named_before_training(tmp_path, made, names):
    path = tmp_path / ("absent.npy" if not isinstance(made, str) else "scores.csv")
    if isinstance(made, np.ndarray):
        np.save(path, made)
    elif made is not None:
        path.write_bytes(made if isinstance(made, bytes) else made.encode())
    with pytest.raises(ValueError, match=f"scores=.*{names}"):
        tiny(tmp_path, scores=path)
    assert not list(tmp_path.glob("store/*-*/done/*"))


@pytest.mark.parametrize("name", ["scores.npy", "scores.txt"])
def test_published_scores_follow_their_examples_into_the_pool(tmp_path, name):
    """Digits has no test part of its own, so the file has a number for each of its 1,797 pictures."""
    x = load_digits().images
    brightness = x.sum((1, 2))
    np.save(tmp_path / name, brightness) if name.endswith("npy") else np.savetxt(tmp_path / name, brightness)
    run = tiny(tmp_path, scores=tmp_path / name)
    np.testing.assert_allclose(run.published, run.dataset.x.astype(float).sum((1, 2, 3)) * 16 / run.dataset.x.max())
    assert run.published.shape == (300,) and len(set(run.published)) > 50
    assert tiny(tmp_path).published is None


@pytest.mark.skipif(not CSCORES.exists(), reason="needs ../shared/data/cifar10_cscores.npy")
def test_cifar_10s_consistency_scores_are_read():
    found = settings.published_scores(CSCORES, 50_000)
    assert found.shape == (50_000,) and 0 <= found.min() < found.max() <= 1
    with pytest.raises(ValueError, match="scores=.*50000.*one finite number for each of the 60000"):
        settings.published_scores(CSCORES, 60_000)


def test_an_unwritable_out_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out="):
        tiny(tmp_path, out=str(tmp_path / "file" / "below"))


def test_a_class_that_a_half_would_miss_is_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="n_examples=40: model .* none of class"):
        tiny(tmp_path, n_examples=40)


def test_a_small_table_gets_a_batch_that_fits_and_a_given_batch_is_left_alone(tmp_path):
    assert tiny(tmp_path, n_examples=110).batch_size == 27
    assert tiny(tmp_path, n_examples=110, batch_size=40).batch_size == 40


def test_every_preset_is_complete_and_valid(tmp_path):
    for kinds in settings.PRESETS.values():
        for values in kinds.values():
            run = settings.Run(settings.checked({**values, "device": "cpu"}), None)
            assert [run.recipe(name).epochs for name in run.names] == [values["epochs"]] * 2
            assert set(PARAMETERS) - set(values) == {"preset", "dataset", "data", "scores", "gpus", "store", "out"}


def test_mnist5k_is_trained_whole_by_the_small_network(tmp_path):
    run = settings.open_run({"preset": "small", "dataset": "mnist5k", "store": tmp_path / "s", "out": tmp_path / "o"})
    assert (run.arch, run.n_examples, run.n_models, len(run.dataset.y_test)) == ("cnn", 3000, 16, 1500)
    assert tiny(tmp_path, dataset="mnist5k").n_examples == 200


def test_the_treatment_is_the_last_sharpness_aware_optimizer_that_is_not_private(tmp_path):
    run = tiny(tmp_path, optimizers="sgd,sam,asam,adam,dpsam(sigma=1.0)")
    assert (run.baseline, run.treatment) == ("sgd", "asam")
    assert run.recipe("asam").rho == pytest.approx(10 * run.rho) and run.recipe("dpsam(sigma=1.0)").rho == run.rho


def test_the_words_of_make_and_flags_mean_the_same():
    one = settings.parse(["DATASET=cifar10", "N_MODELS=32", "--plan", "01"])
    assert one == settings.parse(["--dataset", "cifar10", "--n-models", "32", "01", "--plan"])
    assert one == (["01"], {"dataset": "cifar10", "n_models": "32"}, "plan") and settings.parse([])[2] == "run"


@pytest.mark.parametrize("words", [["--n_model", "16"], ["--plan", "--work"]])
def test_a_flag_is_not_guessed_and_plan_excludes_work(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        settings.parse(words)
    assert words[-1].strip("16") in capsys.readouterr().err


def test_help_lists_every_parameter(capsys):
    with pytest.raises(SystemExit, match="0"):
        settings.parse(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in said for name in PARAMETERS)


# ---- notebooks ----------------------------------------------------------------------------------------------


def kernel(tmp_path, *cells):
    """The namespace of a notebook's kernel that has run these cells; the last is the one that calls notebook_run."""
    names = {"preset": "tiny", "store": str(tmp_path / "s"), "out": str(tmp_path / "o"), "In": ["", *cells]}
    for cell in cells[:-1]:
        exec(cell, names)
    return {name: value for name, value in names.items() if name != "__builtins__"}


OPENING = "from lib.study import settings\nrun = settings.notebook_run(globals())\nstyle = 1"


def test_a_notebook_reads_its_parameters_and_those_that_papermill_adds(tmp_path):
    own = "# Parameters that a reader would change\nn_models: int = None\nseed = 1"
    added = "# Parameters\nn_models = 24\nepochs = 3\nPAPERMILL_INPUT_PATH = PAPERMILL_OUTPUT_PATH = 'x'\n"
    run = settings.notebook_run(kernel(tmp_path, own, added, "import json", OPENING))
    assert (run.n_models, run.epochs, run.seed) == (24, 3, 1)


@pytest.mark.parametrize("cells", [["# Parameters\nn_model = 24"], ["# Parameters\nseed = 0", "n_model = 24"]])
def test_a_misspelt_parameter_of_a_notebook_is_refused(tmp_path, cells):
    with pytest.raises(ValueError, match="n_model=24"):
        settings.notebook_run(kernel(tmp_path, *cells, OPENING))


def test_a_notebook_run_again_in_the_same_kernel_sees_its_changed_parameters(tmp_path):
    first = "# Parameters\nn_models = 24"
    later = ["leak = 1", "# Parameters\nn_models = 16", "run = style = 2", OPENING.replace("style = 1", "")]
    with pytest.raises(ValueError, match="run=|style="):
        settings.notebook_run(kernel(tmp_path, first, *later))
    del later[2]
    assert settings.notebook_run(kernel(tmp_path, first, *later)).n_models == 16
    opened_before = "def notebook_run(_): pass\nrun = notebook_run(0)"
    again = kernel(tmp_path, first, opened_before, "leak = 1", OPENING)  # only the cell that opens the run, once more
    assert settings.notebook_run(again).n_models == 24


def test_outside_ipython_known_names_alone_are_read(tmp_path):
    names = {"preset": "tiny", "n_models": 24, "store": str(tmp_path / "s"), "out": str(tmp_path / "o"), "leak": 1}
    assert settings.notebook_run(names).n_models == 24

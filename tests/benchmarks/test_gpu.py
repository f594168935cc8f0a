"""The script for a GPU at toy size on the processor. Speed is not tested."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import gpu
from lib.study.results import read
from lib.training import ensemble, step, train
from lib.training.recipe import membership

TOY = replace(gpu.PAPER, arch="cnn", epochs=2, batch_size=16, precision="float32")
ROW = "name value unit baseline ratio goal limit".split()


def table(rows):
    return pd.DataFrame(rows, columns=ROW)


def test_every_way_of_training_agrees_with_the_processor():
    found = table(gpu.checks("cpu", ways=("eager", "eager"), n=64, epochs=1))
    far, same = found[found.goal == "<= 0.01"], found[found.goal == ""]
    assert len(far) == len(same) == 10 and (far.value < 0.01).all() and (same.value == 1).all()


def test_a_device_that_computes_something_else_is_seen(monkeypatch):
    class Wrong(ensemble.Inputs):
        made = 0

        def __init__(self, *given):
            super().__init__(*given)
            Wrong.made += 1
            if Wrong.made % 2 == 0:  # the second of each pair is the device's
                self.y = 9 - self.y

    monkeypatch.setattr(ensemble, "Inputs", Wrong)
    found = table(gpu.checks("cpu", ways=("eager",), n=64, epochs=1))
    assert (found[found.goal == "<= 0.01"].value > 0.01).all()


def test_a_way_that_fails_is_named_and_the_next_runs(monkeypatch):
    calls, train_chunk = [], ensemble.train_chunk

    def fails_once(*given):
        calls.append(given)
        if len(calls) == 2:  # the first on the device
            raise RuntimeError("no such kernel")
        return train_chunk(*given)

    monkeypatch.setattr(ensemble, "train_chunk", fails_once)
    rows = gpu.checks("cpu", ways=("eager", "eager"), n=64, epochs=1)
    assert "no such kernel" in next(rows)[1] and next(rows)[1] < 0.01


def test_speed_and_tuning_at_toy_size(monkeypatch):
    monkeypatch.setattr(gpu, "matrix_rate", partial(gpu.matrix_rate, size=64))
    monkeypatch.setattr(step, "compiled_once", lambda function, *_: function)
    dataset = gpu.photographs(64, 32, side=16, classes=3)
    found = table(gpu.speed(dataset, "cpu", ["cnn"], TOY, n_workers=0)).set_index("name")
    assert found.ratio["cnn, sgd"] > 0 and len(found) == 4 and (found.value > 0).all()
    found = table(gpu.tune(dataset, "cpu", TOY, rates=(0.01, 0.1), epochs=2))
    assert len(found) == 12 and found.value[found.name.str.contains("accuracy")].between(0, 1).all()


def test_operations_of_a_linear_network_are_counted():
    # forward, the weights' gradient and, above the first layer, the inputs' gradient: two operations a product
    assert gpu.operations("mlp", (1, 8, 8), 10) == 2 * (2 * 64 * 256 + 3 * 256 * 10)


def test_the_peers_see_the_same_half_in_the_same_form():
    dataset = gpu.photographs(64, 32, side=16, classes=3)
    pictures = gpu.Pictures(dataset, replace(TOY, augment=False))
    image, label = pictures[5]
    k = pictures.index[5]
    assert len(pictures) == 32 and label == dataset.y[k]
    np.testing.assert_allclose(image, (dataset.x[k] / 255 - 0.5) / 0.25, atol=1e-6)


def test_without_a_gpu_the_row_says_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ((_, value, *_),) = gpu.rows()
    assert value == "not measured"


def test_what_comes_back_is_what_was_trained_and_can_be_audited(tmp_path):
    dataset, store, kinds = gpu.pool_of("128"), tmp_path / "store", gpu.ensembles(TOY, sam_lr=0.05)
    gpu.train_until(np.inf, kinds, "128", str(store), "cpu", most=8)
    gpu.pack(kinds, dataset, str(store), tmp_path, "cpu", most=8)
    summary = json.loads((tmp_path / "summary.json").read_text())
    counts = {name: (len(about["ids"]), about["recipe"]["lr"]) for name, about in summary["models"].items()}
    assert counts == {"sgd": (8, 0.1), "sam": (8, 0.05)}
    whole = train(kinds["sam"], dataset, 8, store, "cpu", quiet=True)
    np.testing.assert_allclose(np.load(tmp_path / "sam.npy"), whole.logits[:, 0], rtol=1e-3, atol=1e-4)
    assert np.shape(summary["flatness"]["sgd"]) == (4, 2)
    gpu.audit("128", tmp_path)
    rows = read(tmp_path / "results.csv")
    row = rows[(rows.metric == "auc") & (rows.attack == "rmia") & (rows.baseline == "sgd")].iloc[0]
    assert (row.experiment, row.n_models, row.n_examples, row.rho) == ("main", 8, 128, "0.05")
    logits = np.load(tmp_path / "sam.npy")
    fits = (logits.argmax(-1) == dataset.y)[membership(kinds["sam"], 128, range(8))].mean()
    found = rows[(rows.metric == "train_accuracy") & (rows.optimizer == "sam") & (rows.baseline == "")]
    assert len(found) == 1 and np.allclose(found.value, fits, atol=1e-6)
    flat = rows[(rows.metric == "hessian_top_eigenvalue") & (rows.optimizer == "sam") & (rows.baseline == "")]
    assert np.allclose(flat.value, np.mean(summary["flatness"]["sam"], axis=0)[0], rtol=1e-4)


def test_no_model_is_begun_that_would_end_after_the_deadline(tmp_path):
    gpu.train_until(0, gpu.ensembles(TOY), "128", str(tmp_path), "cpu", most=4)
    # the first two are trained to learn what a model costs
    assert len(list(tmp_path.glob("*/done/*.json"))) == 2


def test_a_bare_machine_suffices():
    lacking = "pydantic nh3 loky psutil ray dp_accounting papermill jupytext"
    code = f"import sys; sys.modules |= dict.fromkeys({lacking!r}.split()); import benchmarks.gpu"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(gpu.__file__).parents[1]).returncode == 0

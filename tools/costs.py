"""What a run costs, by preset: the README's table, computed from the plan of the run and from the committed runs.

Nothing is trained and no data are needed: pictures of CIFAR's size stand in for CIFAR.
"""

import json
import tempfile
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import torch

from lib import data, ensemble, models, plan, step, study
from lib.results import SETTINGS

PRESETS = [("digits", "tiny"), ("digits", "default"), ("CIFAR", "small"), ("CIFAR", "fast"), ("CIFAR", "paper")]
NOT_MEASURED = "not measured"


def blank(n):
    """A data set of CIFAR-10's shapes, all black: n pool examples, and test points as `study.settings` takes them."""
    t = min(10_000, n // 2)
    x, x_test = (np.zeros((size, 3, 32, 32), np.uint8) for size in (n, t))
    y, y_test = (np.arange(size) % 10 for size in (n, t))
    return data.Dataset("CIFAR", x, y, x_test, y_test, tuple("0123456789"))


def settings(name, preset, folder):
    """The Settings of a preset on digits, or on pictures of CIFAR's size; its store would be in `folder`."""
    given = {"preset": preset, "store": folder, "out": folder}
    if name == "digits":
        return study.settings({"dataset": name, **given})
    values = {"data": None, **study.PRESETS[preset]["image"], "dataset": name, **given}
    return study.Settings(values, blank(values["n_examples"]))


def ensembles(run):
    """What the notebooks train, each ensemble once: a list of (Recipe, Dataset, n_models)."""
    most = {}
    for notebook, wanted in plan.wanted(run).items():
        for recipe, dataset, n_models in wanted:
            planted = notebook == "02" and n_models != run.n_models  # on data of its own, as in plan.left
            key = (recipe, dataset.hash, planted)
            most[key] = max(most.get(key, (recipe, dataset, 0)), (recipe, dataset, n_models), key=lambda made: made[2])
    return list(most.values())


@cache
def row_bytes(arch, queries, epochs, dataset):
    """Bytes on disk of one model of an architecture: (all but its weights, its weights)."""
    recipe = ensemble.Recipe(arch=arch, queries=queries, epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        rows = ensemble.open_store(recipe, dataset, folder).rows
    weights = rows["weights"].row_bytes
    return sum(r.row_bytes for r in rows.values()) - weights, weights


def disk(made):
    """Bytes that ensembles take in the store: of the first models the weights are kept too."""
    total = 0
    for recipe, dataset, n_models in made:
        outputs, weights = row_bytes(recipe.arch, recipe.queries, recipe.epochs, dataset)
        total += n_models * outputs + min(n_models, ensemble.KEEP_WEIGHTS) * weights
    return total


def memory(made):
    """Bytes that training takes at its peak on a CPU, beside the data, as predicted for the largest of the ensembles.

    In float32: bfloat16, which some processors have, takes less.
    """
    most, cpu = 0, torch.device("cpu")
    for recipe in {replace(recipe, epochs=1, queries=1, precision="float32") for recipe, _, _ in made}:
        dataset = made[0][1]
        shape = dataset.x.shape[1:]
        lanes = step.lanes_for(models.build(recipe.arch, shape, dataset.n_classes), cpu)
        most = max(most, step.predicted_memory(recipe, shape, dataset.n_classes, lanes))
    return most


def measured(run, folders):
    """Seconds that a committed run of just these settings took, all notebooks together; None if there is none."""
    for folder in folders:
        made, found = json.loads((folder / "settings.json").read_text()), pd.read_csv(folder / "results.csv")
        alike = all(book[name] == run.values[name] for book in made.values() for name in SETTINGS)
        if alike and "seconds" in found and found.n_models.max() == run.n_models:
            return found.groupby("notebook").seconds.max().sum()
    return None


def size(n_bytes):
    """'12 MB', '3.4 GB'."""
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


def line(name, preset, folders):
    """One preset's line of the table."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):  # of networks the sizes are wanted alone
        run = settings(name, preset, folder)
        made, (_, work) = ensembles(run), plan.left(run)
        stored, held = size(disk(made)), size(memory(made))
    pool = f"{run.n_examples:,} of {'digits' if name == 'digits' else 'CIFAR or its like'}"
    models = f"{run.n_models} for each of {len(run.names)}, {sum(n for _, _, n in made):,} in all"
    seconds = measured(run, folders)
    time = NOT_MEASURED if seconds is None else plan.duration(seconds)
    return f"| `{preset}` | {pool} | {run.arch}, {run.epochs} | {models} | {work:.1e} | {stored} | {held} | {time} |"


def table(folders):
    """The README's table. folders: of the committed runs."""
    lines = [
        "| preset | pool | network, epochs | models | gradients of one example | disk | memory | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line(name, preset, folders) for name, preset in PRESETS)])

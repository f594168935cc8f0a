"""What a run costs, by preset: the README's table, computed from the declared experiments and the committed runs.

Nothing is trained and no data are needed: black pictures of CIFAR's size stand in for CIFAR.
"""

import json
import tempfile

import numpy as np
import torch

from lib.data.dataset import Dataset
from lib.study import command_line, experiments, settings
from lib.study.results import SETTINGS
from lib.training import ensemble

PRESETS = [("digits", "tiny"), ("digits", "default"), ("CIFAR", "small"), ("CIFAR", "fast"), ("CIFAR", "paper")]
COLUMNS = "preset", "pool", "network, epochs", "models", "gradients of one example", "disk", "time"
NOT_MEASURED = "not measured"


def blank(n):
    """A data set of CIFAR-10's shapes, all black: n pool examples, and as many test points as a run takes."""
    t = min(10_000, n // 2)
    x, x_test = (np.zeros((size, 3, 32, 32), np.uint8) for size in (n, t))
    y, y_test = (np.arange(size) % 10 for size in (n, t))
    return Dataset("CIFAR", x, y, x_test, y_test, tuple("0123456789"))


def preset_run(name, preset, folder):
    """The Run of a preset on digits, or on pictures of CIFAR's size; its store would be in `folder`."""
    given = {"preset": preset, "store": folder, "out": folder}
    if name == "digits":
        return settings.open_run({"dataset": name, **given})
    values = {**settings.PRESETS[preset]["image"], "dataset": "cifar10", "gpus": 0.0, **given}
    return settings.Run(settings.checked(values), blank(values["n_examples"]))


def told(path):
    """The content of a JSON file; {} if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def measured(run, folders):
    """Seconds of a committed run of just these settings, all notebooks, every model trained; None if there is none."""
    for folder in folders:
        made, took = (told(folder / name) for name in ("settings.json", "run.json"))
        alike = all(book.get(name) == getattr(run, name) for book in made.values() for name in SETTINGS)
        whole = took.get("trained") == 1 and took["notebooks"] == [book.name[:2] for book in command_line.NOTEBOOKS]
        if alike and whole and took.get("n_models") == run.n_models:
            return took["seconds"]
    return None


def row(name, preset, folders):
    """One preset's row of the table."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):  # only the sizes of networks are needed
        run = preset_run(name, preset, folder)
        planned = [plan for *_, plan in experiments.Plan(run).ensembles]
        disk = sum(ensemble.stored_bytes(plan.recipe, plan.dataset, range(plan.n_models)) for plan in planned)
        work = sum(experiments.work(plan.recipe, len(plan.dataset.y), plan.n_models) for plan in planned)
    pool = f"{run.n_examples:,} of {'digits' if name == 'digits' else 'CIFAR or its like'}"
    models = f"{run.n_models} for each of {len(run.names)}, {sum(plan.n_models for plan in planned):,} in all"
    size = f"{disk / 1e6:.0f} MB" if disk < 1e9 else f"{disk / 1e9:.1f} GB"
    seconds = measured(run, folders)
    time = NOT_MEASURED if seconds is None else experiments.duration(seconds)
    return f"`{preset}`", pool, f"{run.arch}, {run.epochs}", models, f"{work:.1e}", size, time


def rows(folders):
    """The rows of the README's table. folders: of the committed runs."""
    return [row(name, preset, folders) for name, preset in PRESETS]

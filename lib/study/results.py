"""Tidy results: one number a row, in `results.csv` of the run. A notebook run again replaces its own rows."""

import hashlib
import json
import platform
import re
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock

from lib.training import ensemble
from lib.training.store import VERSION, write_atomic

COLUMNS = (
    "notebook dataset arch optimizer baseline rho attack metric value ci_low ci_high n_models n_examples note".split()
)
PROVENANCE = "seed recipe versions device seconds".split()  # what made a row; of all columns only `seconds` may vary

PLACES = "data store out device engine gpus".split()  # parameters that say where a run is made, not what it is
SETTINGS = "arch optimizers rho n_examples subset epochs batch_size lr weight_decay augment ema seed".split()


def differing(out):
    """Sentences on the settings in which the notebooks behind a results.csv differ: one each; none if all agree."""
    path = Path(out) / "settings.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    values = {name: {book: of[name] for book, of in made.items() if name in of} for name in SETTINGS if made}
    mixed = {name: of for name, of in values.items() if len(set(map(str, of.values()))) > 1}
    return [f"{name} differs: " + ", ".join(f"{v} in {b}" for b, v in sorted(of.items())) for name, of in mixed.items()]


def recipe_digest(run):
    """12 hex digits that name all that decides a run's numbers: its settings, its data, its optimizers' stores."""
    settings = {name: value for name, value in run.values.items() if name not in PLACES}
    stores = [ensemble.store_key(run.recipe(name), run.dataset) for name in run.names]
    text = json.dumps([VERSION, settings, run.dataset.hash, stores], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def versions():
    """'flat-is-not-private 0.1.0 python 3.11.7 torch 2.15.0 numpy 2.3.1'."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"  # absent where the library was installed
    found = re.search(r'^version = "(.+)"', project.read_text(), flags=re.M) if project.exists() else None
    own = found[1] if found else metadata.version("flat-is-not-private")
    used = {"flat-is-not-private": own, "python": platform.python_version()}
    used |= {"torch": torch.__version__, "numpy": np.__version__}
    return " ".join(f"{name} {version}" for name, version in used.items())


def device_name(name):
    """The GPU's own name, else the kind of device: 'cpu', 'mps'."""
    device = ensemble.device_of(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Results:
    """The rows of one notebook. notebook: its name; run: the Settings; n_models: how many models are compared.

    Nothing is written before the first `add`. Each row also has PROVENANCE: seed, recipe (recipe_digest), versions,
    device, and seconds, the wall-clock time since the notebook's settings were read.
    """

    def __init__(self, notebook, run, n_models=None):
        self.run, self.rows, self.path = run, [], Path(run.out) / "results.csv"
        self.made = {"seed": run.seed, "recipe": recipe_digest(run), "versions": versions()}
        self.made["device"] = device_name(run.device)
        self.about = {
            "notebook": notebook,
            "dataset": run.dataset.name,
            "arch": run.arch,
            "n_models": n_models or run.n_models,
            "n_examples": len(run.dataset.y),
        }
        baseline, *others = run.names
        radius = {name: run.recipe(name).rho or "" for name in run.names}
        self.radius = radius | {f"{name}-{baseline}": radius[name] for name in others}

    def add(self, frame, **fields):
        """Record a frame with columns metric, value, ci_low, ci_high (and more of COLUMNS), the rest from `fields`.

        Writes the file anew, atomically: other notebooks' rows as they were, then this one's.
        """
        seconds = f"{time.monotonic() - self.run.began:.1f}"
        frame = frame.assign(**{**self.about, **self.made, "seconds": seconds, **fields})
        if "rho" not in frame:
            frame["rho"] = frame.optimizer.map(self.radius)
        for column in ("value", "ci_low", "ci_high"):
            frame[column] = [f"{v:.6g}" if v == v else "" for v in frame[column]]  # NaN: no interval
        self.rows.append(frame.reindex(columns=[*COLUMNS, *PROVENANCE]).astype(object))
        self.write()

    def count(self):
        """How many numbers this notebook has recorded."""
        return sum(map(len, self.rows))

    def write(self):
        """Replace this notebook's rows in the file. Raises ValueError naming `out` if the disk refuses."""
        try:
            self._write(pd.concat(self.rows))
        except OSError as error:
            raise ValueError(f"out={str(self.run.out)!r} can't be written ({error}): give a writable folder") from error

    def _write(self, own):
        with FileLock(self.path.with_name(".results.lock")):
            if self.path.exists():
                others = pd.read_csv(self.path, dtype=object, keep_default_na=False)
                own = pd.concat([others[others.notebook != self.about["notebook"]], own])
            path = self.path.with_name("settings.json")
            made = json.loads(path.read_text()) if path.exists() else {}
            made[self.about["notebook"]] = {name: self.run.values[name] for name in SETTINGS}
            write_atomic(path, json.dumps(made, indent=1))
            write_atomic(self.path, own.sort_values("notebook", kind="stable").to_csv(index=False))

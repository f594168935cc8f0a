"""Tidy results: one number a row, in `results.csv` of the run. A notebook run again replaces its own rows.

A row whose `baseline` is filled in is a paired difference: the optimizer's value minus the baseline's. `coordinate`
says where along an experiment the row lies, as name=value pairs: "epochs=40".
"""

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
from lib.training.store import VERSION, read_json, write_atomic

IDENTITY = "notebook experiment dataset arch optimizer baseline rho coordinate attack metric".split()
NUMBERS = "value ci_low ci_high".split()
COUNTS = "n_models n_examples".split()
COLUMNS = [*IDENTITY, *NUMBERS, *COUNTS]
PROVENANCE = "seed recipe versions device seconds".split()  # what made a row; of all columns only `seconds` may vary

PLACES = "data store out device engine gpus".split()  # parameters that say where a run is made, not what it is
SETTINGS = "arch optimizers rho n_examples subset epochs batch_size lr weight_decay augment ema seed".split()


def read(path):
    """The rows of a results.csv but for audits of own logits, with COLUMNS; numbers and counts as floats.

    An empty file has no rows. Raises ValueError naming the file if it can't be read or lacks a column.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)[COLUMNS]
        numbers = {name: frame[name].replace("", "nan").astype(float) for name in [*NUMBERS, *COUNTS]}
        return frame.assign(**numbers)[frame.notebook != "own_logits"].dropna(subset="value")
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=COLUMNS)
    except (OSError, ValueError, KeyError) as error:
        wanted = f"a run's results.csv, with the columns {', '.join(COLUMNS)}"
        raise ValueError(f"results={str(path)!r} can't be read ({error}): give {wanted}") from None


def differing(out):
    """Sentences on the settings in which the notebooks behind a results.csv differ: one each; none if all agree."""
    made = read_json(Path(out) / "settings.json")
    values = {name: {book: of[name] for book, of in made.items() if name in of} for name in SETTINGS if made}
    mixed = {name: of for name, of in values.items() if len(set(map(str, of.values()))) > 1}
    return [f"{name} differs: " + ", ".join(f"{v} in {b}" for b, v in sorted(of.items())) for name, of in mixed.items()]


def recipe_digest(run):
    """12 hex digits that name all that decides a run's numbers: its settings, its data, its optimizers' stores."""
    stores = [ensemble.store_key(run.recipe(name), run.dataset) for name in run.names]
    text = [VERSION, run.parameters.model_dump(exclude=PLACES), run.dataset.hash, stores]
    return hashlib.blake2b(json.dumps(text, sort_keys=True).encode(), digest_size=6).hexdigest()


def versions():
    """'flat-is-not-private 0.1.0 python 3.11.7 torch 2.15.0 numpy 2.3.1'."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"  # absent where the library was installed
    found = re.search(r'^version = "(.+)"', project.read_text(), flags=re.M) if project.exists() else None
    used = {"flat-is-not-private": found[1] if found else metadata.version("flat-is-not-private")}
    used |= {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return " ".join(f"{name} {version}" for name, version in used.items())


class Results:
    """The rows of one notebook. notebook: its name; run: the Run; n_models: how many models are compared.

    Nothing is written before the first `add`. Each row also has PROVENANCE: seed, recipe (recipe_digest), versions,
    device (a GPU's own name, else cpu or mps), and seconds, the wall-clock time since the run was opened.
    """

    def __init__(self, notebook, run, n_models=None):
        self.run, self.rows, self.path = run, [], Path(run.out) / "results.csv"
        device = ensemble.device_of(run.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.about = dict(notebook=notebook, dataset=run.dataset.name, arch=run.arch, baseline="", coordinate="")
        self.about |= dict(attack="", n_models=n_models or run.n_models, n_examples=len(run.dataset.y))
        self.about |= dict(seed=run.seed, recipe=recipe_digest(run), versions=versions(), device=name)

    def add(self, frame, experiment="main", **fields):
        """Record a tidy frame: optimizer, metric, value, ci_low, ci_high and more of COLUMNS, or these from `fields`.

        rho, if absent, is the run's own for each optimizer. Columns beyond the schema are dropped. Writes the file
        anew, atomically: other notebooks' rows as they were, then this one's. Raises ValueError for an unknown field.
        """
        unknown = [name for name in fields if name not in COLUMNS]
        if unknown:
            raise ValueError(f"{unknown[0]}={fields[unknown[0]]!r} is no column of results: {', '.join(COLUMNS)}")
        seconds = f"{time.monotonic() - self.run.began:.1f}"
        absent = {name: value for name, value in self.about.items() if name not in frame}
        frame = frame.assign(**{**absent, "experiment": experiment, "seconds": seconds, **fields})
        if "rho" not in frame:
            frame["rho"] = frame.optimizer.map({name: self.run.recipe(name).rho or "" for name in self.run.names})
        frame = frame.reindex(columns=[*COLUMNS, *PROVENANCE]).astype(object)
        for column in NUMBERS:
            frame[column] = [f"{v:.6g}" if v == v else "" for v in frame[column]]  # NaN: no interval
        self.rows.append(frame)
        self._write(pd.concat(self.rows))

    def count(self):
        """How many numbers this notebook has recorded."""
        return sum(map(len, self.rows))

    def _write(self, own):
        """Replace this notebook's rows in the file. Raises ValueError naming `out` if the disk refuses."""
        notebook, path = self.about["notebook"], self.path.with_name("settings.json")
        try:
            with FileLock(self.path.with_name(".results.lock")):
                if self.path.exists():
                    others = pd.read_csv(self.path, dtype=object, keep_default_na=False)
                    own = pd.concat([others[others.notebook != notebook], own])
                made = read_json(path)
                made[notebook] = {name: getattr(self.run, name) for name in SETTINGS}
                write_atomic(path, json.dumps(made, indent=1))
                write_atomic(self.path, own.sort_values("notebook", kind="stable").to_csv(index=False))
        except OSError as error:
            raise ValueError(f"out={str(self.run.out)!r} can't be written ({error}): give a writable folder") from error

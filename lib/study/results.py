"""Tidy results: one number a row, in `results.csv` of the run. A notebook run again replaces its own rows."""

import hashlib
import json
import platform
import time
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

from lib.training import ensemble
from lib.training.store import VERSION, read_json, write_atomic

NUMBERS, COUNTS = "value ci_low ci_high".split(), "n_models n_examples".split()
COLUMNS = "notebook experiment dataset arch optimizer baseline rho coordinate attack metric".split() + NUMBERS + COUNTS
PROVENANCE = "seed recipe device seconds".split()  # what made a row; of all columns only `seconds` may vary
PLACES = "data scores store out device engine gpus".split()  # parameters that say where a run is made, not what it is
SETTINGS = "arch optimizers rho n_examples subset epochs batch_size lr weight_decay augment ema seed".split()
SETTINGS += ["tuning", "n_pools"]


def read(path):
    """The rows of a results.csv but for audits of own logits: COLUMNS, with numbers and counts as floats."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)[COLUMNS]
        frame[NUMBERS + COUNTS] = frame[NUMBERS + COUNTS].replace("", "nan").astype(float)
        return frame[frame.notebook != "own_logits"].dropna(subset="value")
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=COLUMNS)
    except (OSError, ValueError, KeyError) as error:
        wanted = f"give a run's results.csv, with the columns {', '.join(COLUMNS)}"
        raise ValueError(f"results={str(path)!r} can't be read ({error}): {wanted}") from None


def differing(out):
    """A list of sentences: one for each setting in which the notebooks behind a results.csv differ."""
    made = sorted(read_json(Path(out) / "settings.json").items())
    values = {name: [(of[name], book) for book, of in made if name in of] for name in SETTINGS}
    differ = {name: found for name, found in values.items() if len({str(value) for value, _ in found}) > 1}
    return [f"{name} differs: {', '.join(f'{v} in {book}' for v, book in found)}" for name, found in differ.items()]


def recipe_digest(run):
    """12 hex digits that name all that decides a run's numbers: its settings, its data, its optimizers' stores."""
    stores = [ensemble.store_key(run.recipe(name), run.dataset) for name in run.names]
    published = [] if run.published is None else [run.published.tolist()]
    text = [VERSION, run.parameters.model_dump(exclude=PLACES), run.dataset.hash, stores, *published]
    return hashlib.blake2b(json.dumps(text, sort_keys=True).encode(), digest_size=6).hexdigest()


class Results:
    """The rows of one notebook, given its name, its run, and how many models it compares (default: the run's)."""

    def __init__(self, notebook, run, n_models=None):
        self.run, self.rows, self.path = run, [], Path(run.out) / "results.csv"
        device = ensemble.device_of(run.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        versions = [f"{name} {metadata.version(name)}" for name in ("flat-is-not-private", "torch", "numpy")]
        self.versions = " ".join([*versions, f"python {platform.python_version()}"])
        self.about = dict(notebook=notebook, dataset=run.dataset.name, arch=run.arch, baseline="", coordinate="")
        self.about |= dict(attack="", n_models=n_models or run.n_models, n_examples=len(run.dataset.y))
        self.about |= dict(seed=run.seed, recipe=recipe_digest(run), device=name)

    def add(self, frame, experiment="main", **fields):
        """Write a tidy frame and its other columns, `fields`, beside what is there; rho is by default the run's own."""
        for name in set(fields) - set(COLUMNS):
            raise ValueError(f"{name}={fields[name]!r} is no column of results: {', '.join(COLUMNS)}")
        seconds = f"{time.monotonic() - self.run.began:.1f}"
        absent = {name: value for name, value in self.about.items() if name not in frame}
        frame = frame.assign(**{**absent, "experiment": experiment, "seconds": seconds, **fields})
        if "rho" not in frame:
            frame["rho"] = frame.optimizer.map({name: self.run.recipe(name).rho or "" for name in self.run.names})
        frame = frame.reindex(columns=[*COLUMNS, *PROVENANCE]).astype(object)
        frame[NUMBERS] = frame[NUMBERS].map(lambda v: f"{v:.6g}" if v == v else "")  # NaN: no interval
        self.rows.append(frame)
        own, notebook, settings = pd.concat(self.rows), self.about["notebook"], self.path.with_name("settings.json")
        try:
            with FileLock(self.path.with_name(".results.lock")):
                if self.path.exists():
                    others = pd.read_csv(self.path, dtype=object, keep_default_na=False)
                    own = pd.concat([others[others.notebook != notebook], own])
                made = {name: getattr(self.run, name) for name in SETTINGS} | {"versions": self.versions}
                write_atomic(settings, json.dumps(read_json(settings) | {notebook: made}, indent=1))
                write_atomic(self.path, own.sort_values("notebook", kind="stable").to_csv(index=False))
        except OSError as error:
            raise ValueError(f"out={str(self.run.out)!r} can't be written ({error}): give a writable folder") from error

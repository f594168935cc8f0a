"""Tidy results: one number a row, in `results.csv` of the run. A notebook run again replaces its own rows."""

import json
from pathlib import Path

import pandas as pd
from filelock import FileLock

from lib.store import write_atomic

COLUMNS = "notebook dataset arch optimizer rho attack metric value ci_low ci_high n_models n_examples note".split()

SETTINGS = "arch optimizers rho n_examples subset epochs batch_size lr weight_decay augment seed".split()


def differing(out):
    """Sentences on the settings in which the notebooks behind a results.csv differ: one each; none if all agree."""
    path = Path(out) / "settings.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    values = {name: {book: settings[name] for book, settings in made.items()} for name in SETTINGS if made}
    mixed = {name: of for name, of in values.items() if len(set(map(str, of.values()))) > 1}
    return [f"{name} differs: " + ", ".join(f"{v} in {b}" for b, v in sorted(of.items())) for name, of in mixed.items()]


class Results:
    """The rows of one notebook. notebook: its name; run: the Settings; n_models: how many models are compared.

    Nothing is written before the first `add`.
    """

    def __init__(self, notebook, run, n_models=None):
        self.run, self.rows, self.path = run, [], Path(run.out) / "results.csv"
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
        frame = frame.assign(**{**self.about, **fields})
        if "rho" not in frame:
            frame["rho"] = frame.optimizer.map(self.radius)
        for column in ("value", "ci_low", "ci_high"):
            frame[column] = [f"{v:.6g}" if v == v else "" for v in frame[column]]  # NaN: no interval
        self.rows.append(frame.reindex(columns=COLUMNS).astype(object))
        self.write()

    def count(self):
        """How many numbers this notebook has recorded."""
        return sum(map(len, self.rows))

    def write(self):
        """Replace this notebook's rows in the file."""
        own = pd.concat(self.rows)
        with FileLock(self.path.with_name(".results.lock")):
            if self.path.exists():
                others = pd.read_csv(self.path, dtype=object, keep_default_na=False)
                own = pd.concat([others[others.notebook != self.about["notebook"]], own])
            path = self.path.with_name("settings.json")
            made = json.loads(path.read_text()) if path.exists() else {}
            made[self.about["notebook"]] = {name: self.run.values[name] for name in SETTINGS}
            write_atomic(path, json.dumps(made, indent=1))
            write_atomic(self.path, own.sort_values("notebook", kind="stable").to_csv(index=False))

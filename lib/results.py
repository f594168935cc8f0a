"""Tidy results: one number a row, in `results.csv` of the run. A notebook run again replaces its own rows."""

import os
from pathlib import Path

import pandas as pd

COLUMNS = [
    "notebook",
    "dataset",
    "arch",
    "optimizer",
    "rho",
    "attack",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n_models",
    "n_examples",
    "note",
]


class Results:
    """The rows of one notebook. notebook: its name; run: the Settings; nothing is written before the first `add`."""

    def __init__(self, notebook, run):
        self.notebook, self.run, self.rows = notebook, run, []
        self.path = Path(run.out) / "results.csv"

    def add(self, frame, **fields):
        """Record a frame with columns metric, value, ci_low, ci_high (and more of COLUMNS), the rest from `fields`.

        Writes the file anew, atomically: other notebooks' rows as they were, then this one's. Returns the frame.
        """
        about = {
            "notebook": self.notebook,
            "dataset": self.run.dataset.name,
            "arch": self.run.arch,
            "n_models": self.run.n_models,
            "n_examples": len(self.run.dataset.y),
        }
        self.rows.append(frame.assign(**{**about, **fields}).reindex(columns=COLUMNS))
        self.write()
        return frame

    def count(self):
        """How many numbers this notebook has recorded."""
        return sum(map(len, self.rows))

    def write(self):
        """Write the file anew: other notebooks' rows as they were, then this one's."""
        own = pd.concat([rows.astype(object) for rows in self.rows])
        if self.path.exists():
            others = pd.read_csv(self.path, dtype=object, keep_default_na=False)
            own = pd.concat([others[others.notebook != self.notebook], own])
        temporary = self.path.with_suffix(".tmp")
        own.sort_values("notebook", kind="stable").to_csv(temporary, index=False, float_format="%.6g")
        os.replace(temporary, self.path)


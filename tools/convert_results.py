"""Convert the committed results.csv files from the old columns, with a `note`, to the new schema. Run once.

python -m tools.convert_results
"""

import re
from pathlib import Path

import pandas as pd

IDENTITY = "notebook experiment dataset arch optimizer baseline rho coordinate attack metric".split()
NUMBERS = "value ci_low ci_high n_models n_examples".split()
PROVENANCE = "seed recipe versions device seconds".split()
BASELINES = ("sgd", "none", "eta=0")

# notebook, pattern of the old note, experiment, coordinate; the first pattern that matches the whole note counts
TABLE = (
    ("01", "duplicates in the pool", "duplicates", ""),
    ("01", "null control: shuffled membership", "null control", ""),
    ("01", r"planted leak: one example trained (\d+) times", "planted leak", r"times=\1"),
    ("01", "the same example trained once", "planted leak", "times=1"),
    ("01", r"epochs=(\d+)", "length sweep", r"epochs=\1"),
    ("01", "at equal train loss (.+), baseline between (.+)", "equal train loss", r"train_loss=\1, between=\2"),
    ("02", "of confidence", "main", "output=confidence"),
    ("02", "change of memorization", "example traits", "quantity=change of memorization"),
    ("02", r"memorization \(sgd\)", "example traits", "quantity=memorization"),
    ("02", "(wrong label|memorized, given twins|random, given twins)", "planted faults", r"kind=\1"),
    ("03", r"(true|shuffled) membership \(.+\)", "influence noise", r"membership=\1"),
    ("03", "", "influence buckets", ""),
    ("03", "(.+)", "influence buckets", r"by=\1"),
    ("01|04", "dose and response", "radius sweep", ""),
    ("04", "monte carlo, (.+)", "theorem: monte carlo", r"\1"),
    ("04", "released with noise (.+?), (.+)", "theorem: noisy release", r"noise=\1, \2"),
    ("04", "limit: (.+)", "theorem: limits", r"case=\1"),
    ("04", "appears: (.+)", "theorem: where it appears", r"case=\1"),
    ("04", "feature space, (.+)", "theorem: feature space", r"kind=\1"),
    ("06", "variants", "variants", ""),
    ("06", "variants, other radius", "variants", "radius=other"),
    ("06", "cause: (as it is|batch size|epochs|label noise|weight decay|BatchNorm) (.+)", "causes", r"\1=\2"),
    ("06", "defence", "defences", ""),
    ("06", "privacy", "private", ""),
    ("06", "(epsilon=.+, delta=.+)", "private", r"\1"),
    ("06", "(class=.+)", "classes", r"\1"),
    ("06", "classes weighted alike", "classes", ""),
    ("06", "pattern shared by (.+)", "sub-patterns", r"shared by=\1"),
    ("06", "range over splits of the models", "agreement", ""),
    ("06", "equal accuracy (.+)", "equal test accuracy", r"test_accuracy=\1"),
    ("06", "equal loss (.+)", "equal train loss", r"train_loss=\1"),
    ("06", r"equal compute, sam (\d+) epochs", "equal compute", r"epochs=\1"),
    (".*", "", "main", ""),
)


def place(notebook, note):
    """(experiment, coordinate) of an old note. Raises ValueError for a note that TABLE does not know."""
    for book, pattern, experiment, coordinate in TABLE:
        if re.fullmatch(book, notebook[:2]) and (found := re.fullmatch(pattern, note)):
            return experiment, found.expand(coordinate)
    raise ValueError(f"note={note!r} of {notebook} is not in the table")


def converted(old):
    """The rows of an old results.csv (all columns text) in the new schema, in the same order."""
    new = old.reindex(columns=[*IDENTITY, *NUMBERS, *PROVENANCE], fill_value="")
    new[["experiment", "coordinate"]] = [place(b, n) for b, n in zip(old.notebook, old.note, strict=True)]
    for row, name, note in zip(new.index, old.optimizer, old.note, strict=True):
        optimizer, sign, baseline = name.rpartition("/" if name == "sam/sgd" else "-")
        if not sign or baseline not in BASELINES:
            optimizer, baseline = name, ""
        if note == "memorization (sgd)":  # it was filed under the difference, but it is the baseline's own
            optimizer, baseline, new.loc[row, "rho"] = "sgd", "", ""
        if note == "privacy" and (private := re.fullmatch(r"(dp\w+), epsilon (.+)", optimizer)):
            optimizer, new.loc[row, "coordinate"] = private[1], f"epsilon={private[2]}"
        new.loc[row, ["optimizer", "baseline"]] = optimizer, baseline
    kept = ["notebook", "dataset", "arch", "attack", "metric", *NUMBERS]
    assert len(new) == len(old) and new[kept].equals(old[kept])
    assert (
        new.duplicated([*IDENTITY, "n_models"]).sum()
        == old.duplicated(["notebook", "optimizer", "rho", "attack", "metric", "note", "n_models"]).sum()
    ), "two different rows were given the same name"
    return new


def main():
    """Convert every committed run that still has the old columns."""
    for path in sorted((Path(__file__).parents[1] / "outputs" / "reference").glob("*/results.csv")):
        old = pd.read_csv(path, dtype=str, keep_default_na=False)
        if "note" in old:
            converted(old).to_csv(path, index=False)
            print(f"{path.parent.name}: {len(old)} rows")


if __name__ == "__main__":
    main()

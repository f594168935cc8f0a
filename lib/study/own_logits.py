"""Audit models trained elsewhere: `python -m lib.study.own_logits sgd.npz sam.npz --out outputs/mine`, or `audit` from Python.

A file holds what any framework can save with numpy.savez; M models (one is enough), N examples, C classes, Q queries:

    logits [M, N, C] or [M, Q, N, C]   floats; or `probabilities` of that shape, whose logarithm is taken
    y [N]                              integers 0..C-1, or one-hot [N, C]
    member [M, N]                      0/1: which model trained on which example
    population_logits [M, T, C], population_y [T]   optional, for RMIA: examples that no model trained on
    groups [N]                         optional: which examples belong together, such as a patient's two eyes

With one model, [N, C] and [N] do as well. The first file is the baseline; all share y and member.
"""

import argparse
import base64
import html
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from lib.attacks import catalogue, intervals, shadow
from lib.attacks.signals import signals
from lib.data.sources import fits
from lib.study import figures, report, text
from lib.study.results import COLUMNS
from lib.training.store import write_atomic

NEEDED = ("logits", "y", "member")
OPTIONAL = ("population_logits", "population_y", "groups", "probabilities", "population_probabilities")
SHUFFLED = "null control: shuffled membership"
LEAST = 4  # members and non-members of a model: a half of each learns, the other is judged


# ---- what was given, checked --------------------------------------------------------------------------------


def read(path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, never unpickled. Raises FileNotFoundError, or ValueError naming file and array."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; valid is an .npz file with {', '.join(NEEDED)}")
    key, damaged = "file", (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("a single array, without a name")
            fits(loaded)
            found = {}
            for key in known(loaded.files):
                found[key] = loaded[key]
        return found
    except damaged as error:
        raise ValueError(f"{path}: {key}: {error}; valid are the named arrays of numpy.savez, no objects") from None


def known(names) -> list[str]:
    """The names, or ValueError for one that is unknown."""
    for name in set(names) - {*NEEDED, *OPTIONAL}:
        raise ValueError(f"array {name!r} is unknown; valid are {', '.join(NEEDED + OPTIONAL)}")
    return list(names)


def checked(name, given) -> SimpleNamespace:
    """One ensemble from a path or a dict of arrays: logits, y, member, population_*, groups (None if not given), notes.

    Raises ValueError naming the ensemble, the array, what it is and what is valid.
    """
    arrays = dict(given) if hasattr(given, "items") else read(given)
    try:
        arrays = {key: np.asarray(arrays[key]) for key in known(arrays)}
        for key, array in arrays.items():
            if array.dtype.kind not in "biuf" + "US" * (key == "groups"):
                raise ValueError(f"{key}: {array.dtype} of shape {array.shape}; valid are real numbers")
        notes = [note for prefix in ("", "population_") for note in to_logits(arrays, prefix)]
        for key in NEEDED:
            if key not in arrays:
                raise ValueError(f"{key}: missing; valid are files with {', '.join(NEEDED)}")
        e = SimpleNamespace(**{key: arrays.get(key) for key in NEEDED + OPTIONAL[:3]}, notes=notes)
        if e.logits.ndim == 2 and e.member.ndim == 1:  # one model
            e.logits, e.member = e.logits[None], e.member[None]
            e.population_logits = None if e.population_logits is None else e.population_logits[None]
        shaped("logits", e.logits, (3, 4))
        e.y = labels("y", e.y, e.logits)
        e.member = membership(e.member, (len(e.logits), len(e.y)))
        population(e)
        grouped(e)
        return e
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def to_logits(arrays, prefix):
    """Replace <prefix>probabilities by their logarithms: the notes that this calls for."""
    p = arrays.pop(f"{prefix}probabilities", None)
    if p is None:
        return []
    if f"{prefix}logits" in arrays:
        raise ValueError(f"{prefix}probabilities: beside {prefix}logits; valid is one of them")
    if (
        p.dtype.kind != "f"
        or p.ndim < 2
        or p.size == 0
        or not ((p >= 0).all() and np.abs(p.sum(-1, dtype=float) - 1).max() < 0.02)
    ):
        raise ValueError(f"{prefix}probabilities: {p.dtype} of shape {p.shape}; valid are floats >= 0 that sum to 1")
    # z = log p, and log of the smallest positive p where p = 0
    least = p[p > 0].min()
    arrays[f"{prefix}logits"] = np.log(np.maximum(p, least))
    zeros = f", the {np.mean(p == 0):.2%} that are 0 as {least:.2g}, the smallest one given" if (p == 0).any() else ""
    return [f"{prefix}probabilities were given: their logarithms stand for logits{zeros}."]


def shaped(key, logits, ndims):
    """ValueError unless logits are floats with one of these numbers of axes, two classes or more, and no NaN or inf."""
    if logits.dtype.kind != "f" or logits.ndim not in ndims or logits.shape[-1] < 2 or logits.size == 0:
        raise ValueError(f"{key}: {logits.dtype} of shape {logits.shape}; valid are floats [M, N, C] or [M, Q, N, C]")
    for m, z in enumerate(logits):
        bad = np.isnan(z) | np.isposinf(z)
        if bad.any():
            raise ValueError(
                f"{key}: {z[bad][0]} at model {m}, example {np.argwhere(bad)[0][-2]}; valid are finite numbers"
            )


def labels(key, y, logits):
    """Integers [N] from y [N] or one-hot y [N, C], or ValueError."""
    n, c = logits.shape[-2:]
    if y.shape == (n, c) and ((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all():
        return y.argmax(1)
    if y.shape != (n,) or y.dtype.kind not in "iu":
        raise ValueError(f"{key}: {y.dtype} of shape {y.shape}; valid are integers [{n}], or one-hot [{n}, {c}]")
    for i in np.flatnonzero((y < 0) | (y >= c))[:1]:
        raise ValueError(f"{key}: {y[i]} at example {i}; valid are 0 to {c - 1}, the classes of logits")
    return y.astype(np.int64)


def membership(member, shape):
    """member as bool [M, N], or ValueError. Models that all trained on the same examples are a design too."""
    if member.shape != shape:
        raise ValueError(f"member: shape {member.shape}; valid is [M, N] = {shape}, as in logits")
    for m, i in np.argwhere(~np.isin(member, (0, 1)))[:1]:
        raise ValueError(f"member: {member[m, i]} at model {m}, example {i}; valid are 0 and 1")
    member, n = member.astype(bool), shape[1]
    for m in np.flatnonzero(np.minimum(member.sum(1), (~member).sum(1)) < LEAST)[:1]:
        found = f"model {m} has {member[m].sum()} members of {n} examples"
        raise ValueError(f"member: {found}; valid are at least {LEAST} members and {LEAST} non-members")
    share = member.mean(0)
    if len(member) > 2 and (member != member[0]).any() and not ((share > 0) & (share < 1)).all():
        i = int(np.flatnonzero((share == 0) | (share == 1))[0])
        where = "all" if share[i] else "none"
        raise ValueError(
            f"member: example {i} is in {where} of the {len(member)} models; valid is in some: leave it out, or "
            "give what no model trained on as population_logits and population_y"
        )
    return member


def population(e):
    """Check population_logits and population_y: ValueError, or labels as integers."""
    if (e.population_logits is None) != (e.population_y is None):
        raise ValueError("population_y: missing or without population_logits; valid are both or neither")
    if e.population_logits is not None:
        z, like = e.population_logits, e.logits.shape
        if z.ndim != len(like) or z.shape[:-2] + z.shape[-1:] != like[:-2] + like[-1:]:
            raise ValueError(f"population_logits: shape {z.shape}; valid is that of logits {like} but for N")
        shaped("population_logits", z, (len(like),))
        e.population_y = labels("population_y", e.population_y, z)


def grouped(e):
    """ValueError unless groups, if given, are [N] and each model has enough of them, by their first examples."""
    if e.groups is None:
        return
    if e.groups.shape != e.y.shape:
        raise ValueError(f"groups: shape {e.groups.shape}; valid is [N] = {e.y.shape}")
    member = e.member[:, np.unique(e.groups, return_index=True)[1]]
    for m in np.flatnonzero(np.minimum(member.sum(1), (~member).sum(1)) < LEAST)[:1]:
        found = f"model {m} has {member[m].sum()} members among {member.shape[1]} groups"
        raise ValueError(f"groups: {found}; valid are at least {LEAST} members and {LEAST} non-members")


def alike(ensembles):
    """ValueError unless all share y, member and groups, so that every comparison is paired."""
    (first, base), *others = ensembles.items()
    for name, e in others:
        for key in ("y", "member", "groups"):
            a, b = getattr(base, key), getattr(e, key)
            if (a is None) != (b is None) or not np.array_equal(a, b):
                raise ValueError(
                    f"{name}: {key}: differs from that of {first}; valid is the same in all files, so that models are "
                    "compared pair by pair: audit files that differ one at a time"
                )


# ---- what it comes to ---------------------------------------------------------------------------------------


def lacking(member) -> str:
    """What LiRA and RMIA lack in models; empty if nothing."""
    try:
        return shadow._enough(member, 2, True) or ""
    except ValueError as error:
        return str(error).removeprefix("member: ")


def scores(e, member) -> dict[str, np.ndarray]:
    """Attack -> scores [M, N]: all catalogue.NAMES, or, with too few shadow models, those that need none."""
    if not lacking(member):
        return catalogue.run(e.logits, e.y, member, e.population_logits, e.population_y, groups=e.groups)
    found = catalogue.single(plain(e), e.y, member, groups=e.groups)
    return {name: found[name] for name in catalogue.NAMES if name in found}


def plain(e):
    """The logits [M, N, C] of the plain input, the first query."""
    return e.logits if e.logits.ndim == 3 else e.logits[:, 0]


def how(e):
    """The arguments of intervals.table that say what the intervals are about."""
    return {"columns": e.groups, "examples_only": len(e.member) < 3}


def leakage(scored, e):
    """Every metric of every attack, for each name and difference from the first: a tidy frame."""
    frames = []
    for attack in next(iter(scored.values())):
        threshold = 0.0 if attack in catalogue.FIXED else None
        each = {name: found[attack] for name, found in scored.items()}
        frames.append(intervals.table(each, e.member, threshold=threshold, **how(e)).assign(attack=attack))
    return pd.concat(frames, ignore_index=True)


def fit(ensembles):
    """Accuracy and loss on the members, and accuracy in minus out: a tidy frame."""
    base, cells, frames = next(iter(ensembles.values())), {}, []
    for name, e in ensembles.items():
        seen = signals(plain(e), e.y, only=("correct", "log_confidence"))
        right, loss = seen["correct"].astype(float), -seen["log_confidence"].astype(float)
        inside, outside = (intervals.ratio_influence_values(right, side) for side in (e.member, ~e.member))
        cells[name] = inside, intervals.ratio_influence_values(loss, e.member), inside - outside
    for k, metric in enumerate(("train_accuracy", "train_loss", "generalization_gap")):
        each = {name: c[k] for name, c in cells.items()}
        clusters = intervals.pairs(base.member)
        frames.append(intervals.paired(each, metric, k == 0, clusters=clusters, **how(base)).assign(attack=""))
    return pd.concat(frames, ignore_index=True)


def null(name, e):
    """AUC of every attack on shuffled membership, without a fault 0.5: a tidy frame."""
    shuffled = SimpleNamespace(**{**vars(e), "member": catalogue.null_member(e.member, 0, e.groups)})
    frame = leakage({name: scores(e, shuffled.member)}, shuffled)
    return frame[frame.metric == "auc"].assign(note=SHUFFLED)


def audit(given, out) -> pd.DataFrame:
    """Audit models trained elsewhere: the tidy frame of results.csv, with figures/ and report/index.html in `out`.

    given: dict name -> path of an .npz or dict of arrays (see the top of this file), or a list of paths, named by
    their stems; the first is the baseline. Raises ValueError or FileNotFoundError before any attack runs.
    """
    ensembles = {name: checked(name, value) for name, value in named(given).items()}
    alike(ensembles)
    out = prepared(out)
    first, e = next(iter(ensembles.items()))
    scored = {name: scores(one, e.member) for name, one in ensembles.items()}
    note = "logits given" + ", intervals over examples only" * how(e)["examples_only"]
    found = pd.concat([fit(ensembles), leakage(scored, e)], ignore_index=True).assign(note=note)
    frame = pd.concat([found, null(first, e)], ignore_index=True)
    about = {"notebook": "outside", "dataset": out.name, "n_models": len(e.member), "n_examples": len(e.y)}
    frame = frame.assign(**about).reindex(columns=COLUMNS)
    draw(out, ensembles, scored, frame)
    write_atomic(out / "results.csv", frame.to_csv(index=False, float_format="%.6g"))
    write_atomic(out / "report" / "index.html", page(out, ensembles, frame))
    return frame


def named(given):
    """given as a dict name -> path or arrays; a list of paths is named by their stems."""
    if hasattr(given, "items"):
        named = {str(name): value for name, value in given.items()}
    else:
        named = {Path(path).stem: path for path in given}
    if not named or len(named) < len(given):
        raise ValueError(f"data: {list(map(str, given))}; valid are one or more .npz files of different names")
    return named


def prepared(out):
    """The folder, made; ValueError if it holds a study's results."""
    path = Path(out) / "results.csv"
    if path.exists() and not (pd.read_csv(path, dtype=str).get("notebook", pd.Series("")) == "outside").all():
        raise ValueError(f"out={str(out)!r} holds other results; valid is a folder of its own, such as outputs/mine")
    for name in ("figures", "report"):
        (Path(out) / name).mkdir(parents=True, exist_ok=True)
    return Path(out).resolve()


# ---- what is shown ------------------------------------------------------------------------------------------


def draw(out, ensembles, scored, frame):
    """Write figures/auc.png, difference.png (of several names), roc.png and phi.png."""
    figures.style()
    safe = {name: name.replace("$", r"\$").lstrip("_") for name in frame.optimizer.unique()}  # in matplotlib's labels
    auc, member = true_auc(frame), next(iter(ensembles.values())).member
    alone = auc.baseline == ""
    auc, attack = auc.assign(optimizer=auc.optimizer.map(safe)), "lira" if "lira" in auc.attack.values else "confidence"
    phis = {safe[name]: signals(plain(e), e.y, only=("phi",))["phi"] for name, e in ensembles.items()}
    above = auc[alone].assign(**(auc.loc[alone, ["value", "ci_low", "ci_high"]] - 0.5))
    drawn = {
        "auc": figures.forest(above, "AUC above 1/2, which is guessing"),
        "roc": figures.roc({safe[name]: found for name, found in scored.items()}, member, attack),
        "phi": figures.phi_of_members(phis, member),
    }
    if len(ensembles) > 1:
        drawn["difference"] = figures.forest(auc[~alone], "difference in AUC")
    for name, figure in drawn.items():
        figures.save(figure, SimpleNamespace(out=out), name)


def true_auc(frame):
    """The rows of AUC but for the null control's."""
    return frame[(frame.metric == "auc") & (frame.note != SHUFFLED)]


def summary(ensembles, frame):
    """The finding, in a sentence for each name and each difference."""
    auc, (first, *others), said = true_auc(frame), ensembles, []
    for name in ensembles:
        rows = auc[(auc.optimizer == name) & (auc.baseline == "")]
        best, above = rows.loc[rows.value.idxmax()], int((rows.ci_low > 0.5).sum())
        said.append(
            f"{name}: {above} of {len(rows)} attacks tell members from non-members (interval of AUC above 1/2); "
            f"the highest AUC is {text.number(best.value, best.ci_low, best.ci_high)}, of {best.attack}."
        )
    return said + [
        text.summary(auc[(auc.optimizer == b) & (auc.baseline == first)], f"{b} leaks", first) for b in others
    ]


def limits(ensembles):
    """What the numbers are about and what they cannot say, in sentences."""
    e = next(iter(ensembles.values()))
    lack, thin, alone = lacking(e.member), classes_without(e), how(e)["examples_only"]
    groups = 0 if e.groups is None else len(np.unique(e.groups))
    said = {
        f"Only attacks on one model's output were tried. LiRA and RMIA were left out: {lack}.": lack,
        "The 95% intervals are over new examples only: one or two models cannot say how others would differ.": alone,
        "The 95% intervals are over new models and new examples.": not alone,
        f"They count {groups} groups of examples, not {len(e.y)} examples.": groups,
        f"Classes {thin} lack members or non-members in a half of some model: their thresholds are all classes'.": thin,
        "Thresholds were learned on one half of the known members and non-members, and judged on the other.": True,
        "If members and non-members differ in more than training (a later date, another source), attacks see that too, "
        "and no control here can tell.": True,
        "The highest of many AUCs is high in part by chance, and a stronger attack may exist: low values are no "
        "proof.": True,
    }
    notes = [f"{name}: {note}" for name, one in ensembles.items() for note in one.notes]
    return notes + [text for text, holds in said.items() if holds]


def classes_without(e):
    """The classes without members or without non-members in a half of some model: a list."""
    part = 2 * intervals.calibration_split(e.member, 0, e.y, e.groups) + e.member
    present = {c: [(part[:, e.y == c] == k).any(1).all() for k in range(4)] for c in np.unique(e.y).tolist()}
    return [c for c, sides in present.items() if not all(sides)]


def tables(frame, columns):
    """An HTML table for each optimizer: attacks by metrics, all text escaped."""
    shown = ""
    for (name, baseline), rows in frame.groupby(["optimizer", "baseline"], sort=False):
        cells = [text.number(*row) for row in rows[["value", "ci_low", "ci_high"]].itertuples(index=False)]
        order = [c for c in dict.fromkeys(rows.metric) if c in columns or "@" in c]
        wide = rows.assign(cell=cells).pivot(index="attack", columns="metric", values="cell")
        wide = wide.loc[rows.attack.unique(), order].rename_axis(index=None, columns=None).fillna("")
        shown += f"<h3>{html.escape(name + (f' minus {baseline}' if baseline else ''))}</h3>{wide.to_html(border=0)}"
    return shown


def picture(path):
    """An image as a paragraph of HTML, the file in it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}"></p>'


def page(out, ensembles, frame):
    """The report, one HTML page with the figures in it."""
    e, control, fitted = next(iter(ensembles.values())), frame[frame.note == SHUFFLED], frame[frame.attack == ""]
    leaks = frame[(frame.attack != "") & (frame.note != SHUFFLED)]
    inside = int(((control.ci_low <= 0.5) & (control.ci_high >= 0.5)).sum())
    names = [n for n in ("auc", "difference", "roc", "phi") if n != "difference" or len(ensembles) > 1]
    figures = "".join(picture(out / "figures" / f"{name}.png") for name in names)
    said = summary(ensembles, frame), limits(ensembles)
    found, limit = ("".join(f"<li>{html.escape(text)}</li>" for text in texts) for texts in said)
    title = f"Membership leakage: {', '.join(ensembles)}"
    body = f"""<h1>{html.escape(title)}</h1>
<p>Models: {len(e.member)}; examples: {len(e.y)}, of {e.logits.shape[-1]} classes.</p><ul>{found}</ul>
{tables(leaks, ("auc", "balanced_accuracy"))}{figures}
<h2>How well the models fit</h2>{tables(fitted, tuple(fitted.metric))}
<h2>The null control</h2><p>On shuffled membership, {inside} of {len(control)} attacks have 0.5 in the interval.</p>
{tables(control, ("auc",))}<h2>The limits</h2><ul>{limit}</ul>
<p>All numbers: <a href="../results.csv">results.csv</a>.</p>"""
    return report.page(title, body, "wide")


# ---- the command --------------------------------------------------------------------------------------------


def parse(arguments=None):
    """(files, out) of a command line: files and --out, or DATA=a.npz,b.npz OUT=folder as make has them."""
    parser = argparse.ArgumentParser(prog="python -m lib.study.own_logits", description="Audit logits from anywhere.")
    parser.add_argument("files", nargs="*", help=".npz files, the first is the baseline (or DATA=a.npz,b.npz)")
    parser.add_argument("--out", default="outputs/mine", help="folder of the results (or OUT=folder)")
    found = parser.parse_args(arguments)
    words = dict(word.split("=", 1) for word in found.files if word.startswith(("DATA=", "OUT=")))
    files = [word for word in found.files if not word.startswith(("DATA=", "OUT="))]
    return files + [file for file in words.get("DATA", "").split(",") if file], words.get("OUT", found.out)


def main(arguments=None):
    """Command line. Returns the exit status, 2 for bad input."""
    files, out = parse(arguments)
    try:
        audit(files, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"Done. Look at {Path(out) / 'report' / 'index.html'} (open in a browser), results.csv and figures/ beside it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Audit models trained elsewhere: `python -m lib.study.own_logits sgd.npz sam.npz --out outputs/mine`, or `audit`.

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

from lib.analysis import compare
from lib.attacks import catalogue, intervals, shadow
from lib.data.sources import fits, need
from lib.study import figures, report, text
from lib.study.results import COLUMNS
from lib.training.store import write_atomic

NEEDED = ("logits", "y", "member")
OPTIONAL = ("population_logits", "population_y", "groups", "probabilities", "population_probabilities")
LEAST = 4  # members and non-members of a model: thresholds are learned on one half of them and judged on the other


# ---- what was given, checked --------------------------------------------------------------------------------


def read(path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, never unpickled. Raises ValueError naming the file and the array."""
    key, found = "file", {}
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            need(isinstance(loaded, np.lib.npyio.NpzFile), "a single array, without a name")
            fits(loaded)
            for key in loaded.files:
                found[key] = loaded[key]
        return found
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {key}: {error}; valid are the named arrays of numpy.savez, no objects") from None


def checked(name, given) -> SimpleNamespace:
    """One ensemble from a path or a dict of arrays: logits [M, Q, N, C], member [M, N], dataset.y, dataset.groups, ...

    What was not given is None; notes says what was changed. Raises ValueError naming the ensemble, the array, what it
    is and what is valid.
    """
    arrays = {key: np.asarray(array) for key, array in (given if hasattr(given, "items") else read(given)).items()}
    try:
        for key, array in arrays.items():
            need(key in NEEDED + OPTIONAL, f"array {key!r} is unknown; valid are {', '.join(NEEDED + OPTIONAL)}")
            numbers = array.dtype.kind in "biuf" + "US" * (key == "groups")
            need(numbers, f"{key}: {array.dtype} of shape {array.shape}; valid are real numbers")
        notes = [note for prefix in ("", "population_") for note in to_logits(arrays, prefix)]
        for key in NEEDED:
            need(key in arrays, f"{key}: missing; valid are files with {', '.join(NEEDED)}")
        e = SimpleNamespace(**{key: arrays.get(key) for key in NEEDED + OPTIONAL[:3]}, notes=notes)
        if e.logits.ndim == 2 and e.member.ndim == 1:  # one model
            e.logits, e.member = e.logits[None], e.member[None]
            e.population_logits = None if e.population_logits is None else e.population_logits[None]
        check_logits("logits", e.logits)
        e.y = labels("y", e.y, e.logits)
        e.member = membership(e.member, (len(e.logits), len(e.y)), e.groups)
        z, like = e.population_logits, e.logits.shape
        both = (z is None) == (e.population_y is None)
        need(both, "population_y: missing or without population_logits; valid are both or neither")
        if z is not None:
            alike = z.ndim == len(like) and z.shape[:-2] + z.shape[-1:] == like[:-2] + like[-1:]
            need(alike, f"population_logits: shape {z.shape}; valid is that of logits {like} except for N")
            check_logits("population_logits", z)
            e.population_y = labels("population_y", e.population_y, z)
            e.population_logits = z if z.ndim == 4 else z[:, None]
        e.logits, e.dataset = e.logits if e.logits.ndim == 4 else e.logits[:, None], SimpleNamespace(**vars(e))
        return e
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def to_logits(arrays, prefix):
    """Replace <prefix>probabilities by their logarithms: a list of notes to the reader."""
    p = arrays.pop(f"{prefix}probabilities", None)
    if p is None:
        return []
    need(f"{prefix}logits" not in arrays, f"{prefix}probabilities: beside {prefix}logits; valid is one of them")
    floats = p.dtype.kind == "f" and p.ndim > 1 and p.size > 0
    fine = floats and (p >= 0).all() and np.abs(p.sum(-1, dtype=float) - 1).max() < 0.02
    need(fine, f"{prefix}probabilities: {p.dtype} of shape {p.shape}; valid are floats >= 0 that sum to 1")
    # z = log p, and log of the smallest positive p where p = 0
    least, zero = p[p > 0].min(), np.mean(p == 0)
    arrays[f"{prefix}logits"] = np.log(np.maximum(p, least))
    note = f"{prefix}probabilities were given: we use their logarithms as logits."
    return [note + (f" {zero:.2%} are 0 and count as {least:.2g}, the smallest other one." if zero else "")]


def check_logits(key, logits):
    """ValueError unless logits are floats [M, N, C] or [M, Q, N, C], two classes or more, without NaN and inf."""
    fine = logits.dtype.kind == "f" and logits.ndim in (3, 4) and logits.shape[-1] >= 2 and logits.size > 0
    need(fine, f"{key}: {logits.dtype} of shape {logits.shape}; valid are floats [M, N, C] or [M, Q, N, C]")
    for m, z in enumerate(logits):  # one model at a time, to save memory
        for at in np.argwhere(np.isnan(z) | np.isposinf(z))[:1]:
            raise ValueError(f"{key}: {z[tuple(at)]} at model {m}, example {at[-2]}; valid are finite numbers")


def labels(key, y, logits):
    """Integers [N] from y [N] or one-hot y [N, C], or ValueError."""
    n, c = logits.shape[-2:]
    if y.shape == (n, c) and ((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all():
        return y.argmax(1)
    integers = y.shape == (n,) and y.dtype.kind in "iu"
    need(integers, f"{key}: {y.dtype} of shape {y.shape}; valid are integers [{n}], or one-hot [{n}, {c}]")
    for i in np.flatnonzero((y < 0) | (y >= c))[:1]:
        raise ValueError(f"{key}: {y[i]} at example {i}; valid are 0 to {c - 1}, the classes of logits")
    return y.astype(np.int64)


def membership(member, shape, groups):
    """member as bool [M, N], with LEAST members and non-members (examples, and groups) in every model, or ValueError.

    All models may have trained on the same examples; otherwise, every example is in some models and not in others.
    """
    need(member.shape == shape, f"member: shape {member.shape}; valid is [M, N] = {shape}, as in logits")
    for m, i in np.argwhere(~np.isin(member, (0, 1)))[:1]:
        raise ValueError(f"member: {member[m, i]} at model {m}, example {i}; valid are 0 and 1")
    member = member.astype(bool)
    columns = {"member": np.arange(shape[1])}
    if groups is not None:
        need(groups.shape == shape[1:], f"groups: shape {groups.shape}; valid is [N] = {shape[1:]}")
        columns["groups"] = np.unique(groups, return_index=True)[1]  # the first example of each
    for key, chosen in columns.items():
        inside = member[:, chosen].sum(1)
        for m in np.flatnonzero((inside < LEAST) | (len(chosen) - inside < LEAST))[:1]:
            found = f"model {m} has {inside[m]} members of {len(chosen)}"
            raise ValueError(f"{key}: {found}; valid are at least {LEAST} members and {LEAST} non-members")
    if len(member) > 2 and (member != member[0]).any():
        for i in np.flatnonzero(member.all(0) | ~member.any(0))[:1]:
            where = "all" if member[0, i] else "none"
            raise ValueError(
                f"member: example {i} is in {where} of the {len(member)} models; valid is in some: leave it out, or "
                "give what no model trained on as population_logits and population_y"
            )
    return member


# ---- the audit ----------------------------------------------------------------------------------------------


def lacking(member) -> str:
    """Why LiRA and RMIA cannot run (too few models), or ""."""
    try:
        shadow.require_shadows(member, 2)
    except ValueError as error:
        return str(error).removeprefix("member: ")
    return ""


def scores(e, member) -> dict[str, np.ndarray]:
    """Attack -> scores [M, N]: all catalogue.NAMES, or, with too few shadow models, those that need none."""
    if not lacking(member):
        return catalogue.run(e.logits, e.y, member, e.population_logits, e.population_y, groups=e.groups)
    found = catalogue.single(e.logits[:, 0], e.y, member, groups=e.groups)
    return {name: found[name] for name in catalogue.NAMES if name in found}


def how(e):
    """The arguments of `intervals` that say what the intervals are over: one or two models say nothing on others."""
    return {"columns": e.groups, "examples_only": len(e.member) < 3}


def leakage(scored, e, member):
    """Every metric of every attack, for each name and for each difference from the first: a tidy frame."""
    frames = []
    for attack in next(iter(scored.values())):
        threshold = 0.0 if attack in catalogue.FIXED else None
        each = {name: found[attack] for name, found in scored.items()}
        frames.append(intervals.table(each, member, threshold=threshold, **how(e)).assign(attack=attack))
    return pd.concat(frames, ignore_index=True)


def fit(ensembles):
    """Accuracy and loss on the members, and accuracy in minus out: a tidy frame."""
    e, frames = next(iter(ensembles.values())), []
    for metric, values_of in {
        "train_accuracy": lambda e: compare.on_pool(e, "correct"),
        "train_loss": compare.train_losses,
        "generalization_gap": lambda e: compare.on_pool(e, "correct") - compare.on_pool(e, "correct", members=False),
    }.items():
        values = {name: values_of(one) for name, one in ensembles.items()}
        rate = metric == "train_accuracy"
        frames.append(intervals.paired(values, metric, rate, clusters=intervals.pairs(e.member), **how(e)))
    return pd.concat(frames, ignore_index=True).assign(attack="")


def audit(given, out) -> pd.DataFrame:
    """Audit models trained elsewhere: the tidy frame of results.csv, with figures/ and report/index.html in `out`.

    given: dict name -> path of an .npz or dict of arrays (see the top of this file), or a list of paths, named by
    their stems; the first is the baseline. The experiments are "main" and "null control" (shuffled membership, on
    which every AUC should be 1/2). Raises ValueError before any attack runs.
    """
    named = {str(k): v for k, v in given.items()} if hasattr(given, "items") else {Path(p).stem: p for p in given}
    fine = 0 < len(named) == len(given)
    need(fine, f"data: {list(map(str, given))}; valid are one or more .npz files of different names")
    ensembles = {name: checked(name, value) for name, value in named.items()}
    (first, e), *others = ensembles.items()
    for name, other in others:
        for key in ("y", "member", "groups"):
            same = np.array_equal(getattr(e, key), getattr(other, key))
            need(same, f"{name}: {key}: differs from that of {first}; valid is the same in all files, so that models "
                 "are compared pair by pair: audit files that differ one at a time")  # fmt: skip
    path = Path(out) / "results.csv"
    fine = not path.exists() or set(pd.read_csv(path, dtype=str).get("notebook", [""])) == {"own_logits"}
    need(fine, f"out={str(out)!r} holds other results; valid is a folder of its own, such as outputs/mine")
    for name in ("figures", "report"):
        (Path(out) / name).mkdir(parents=True, exist_ok=True)

    scored = {name: scores(one, e.member) for name, one in ensembles.items()}
    shuffled = catalogue.null_member(e.member, 0, e.groups)
    null = leakage({first: scores(e, shuffled)}, e, shuffled)
    main = pd.concat([fit(ensembles), leakage(scored, e, e.member)]).assign(experiment="main")
    frame = pd.concat([main, null[null.metric == "auc"].assign(experiment="null control")], ignore_index=True)
    about = {"notebook": "own_logits", "dataset": Path(out).resolve().name, "coordinate": ""}
    frame = frame.assign(**about, n_models=len(e.member), n_examples=len(e.y)).reindex(columns=COLUMNS)
    write_atomic(path, frame.to_csv(index=False, float_format="%.6g"))
    pictures = draw(out, ensembles, scored, frame)
    write_atomic(Path(out) / "report" / "index.html", page(ensembles, frame, pictures))
    return frame


# ---- what is shown ------------------------------------------------------------------------------------------


def draw(out, ensembles, scored, frame):
    """Write figures/auc.png, difference.png (of several names), roc.png and phi.png: the HTML that shows them."""
    figures.style()
    auc, member = frame[(frame.metric == "auc") & (frame.experiment == "main")], next(iter(ensembles.values())).member
    own, differences = auc[auc.baseline == ""], auc[auc.baseline != ""]
    phis = {name: compare.signal(e, "phi") for name, e in ensembles.items()}
    above = own.assign(**(own[["value", "ci_low", "ci_high"]] - 0.5))
    drawn = {"auc": figures.forest(above, "AUC minus 1/2, which is guessing")}
    if len(differences):
        drawn["difference"] = figures.forest(differences, "difference in AUC")
    drawn["roc"] = figures.roc(scored, member, "lira" if "lira" in set(auc.attack) else "confidence")
    drawn["phi"] = figures.phi_of_members(phis, member)
    shown = ""
    for name, figure in drawn.items():
        figures.save(figure, SimpleNamespace(out=out), name)
        data = base64.b64encode((Path(out) / "figures" / f"{name}.png").read_bytes()).decode()
        shown += f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'
    return shown


def summary(auc):
    """The finding, in a sentence for each name and each difference. auc: the main rows of the AUC."""
    said = []
    for (name, baseline), rows in auc.groupby(["optimizer", "baseline"], sort=False):
        best, above = rows.loc[rows.value.idxmax()], int((rows.ci_low > 0.5).sum())
        said.append(
            text.summary(rows, f"{name} leaks", baseline)
            if baseline
            else f"{name}: {above} of {len(rows)} attacks tell members from non-members (interval of AUC above 1/2); "
            f"the highest AUC is {text.number(best.value, best.ci_low, best.ci_high)}, of {best.attack}."
        )
    return said


def limits(ensembles):
    """What the numbers are about and what they cannot say, in sentences."""
    e = next(iter(ensembles.values()))
    lack, thin, alone = lacking(e.member), classes_without(e), how(e)["examples_only"]
    groups = 0 if e.groups is None else len(np.unique(e.groups))
    said = {
        f"We ran only attacks on one model's output. LiRA and RMIA were left out: {lack}.": lack,
        "The 95% intervals are over new examples only: one or two models cannot say how others would differ.": alone,
        "The 95% intervals are over new models and new examples.": not alone,
        f"The intervals count {groups} groups of examples, not {len(e.y)} examples.": groups,
        f"Classes {thin} lack members or non-members in a half of some model: their thresholds are those of all "
        "classes together.": thin,
        "Thresholds were learned on one half of the known members and non-members, and judged on the other.": True,
        "If members and non-members differ in more than training (a later date, another source), attacks see that too, "
        "and no control here can tell.": True,
        "The highest of many AUCs is high in part by chance, and a stronger attack may exist: low values prove "
        "nothing.": True,
    }
    notes = [f"{name}: {note}" for name, one in ensembles.items() for note in one.notes]
    return notes + [sentence for sentence, holds in said.items() if holds]


def classes_without(e):
    """The classes without members or without non-members in a half of some model: a list."""
    part = 2 * intervals.calibration_split(e.member, 0, e.y, e.groups) + e.member
    present = {c: [(part[:, e.y == c] == k).any(1).all() for k in range(4)] for c in np.unique(e.y).tolist()}
    return [c for c, sides in present.items() if not all(sides)]


def tables(frame):
    """An HTML table for each name and difference: attacks by metrics, all text escaped."""
    shown = ""
    for name, rows in frame.groupby(text.series(frame), sort=False):
        cells = [text.number(*row) for row in rows[["value", "ci_low", "ci_high"]].itertuples(index=False)]
        wide = rows.assign(cell=cells).pivot(index="attack", columns="metric", values="cell")
        wide = wide.loc[rows.attack.unique(), rows.metric.unique()].rename_axis(index=None, columns=None).fillna("")
        shown += f"<h3>{html.escape(name)}</h3>{wide.to_html(border=0)}"
    return shown


def page(ensembles, frame, pictures):
    """The report, one HTML page with the figures in it."""
    e, main = next(iter(ensembles.values())), frame[frame.experiment == "main"]
    leaks, control = main[(main.attack != "") & (main.metric != "advantage")], frame[frame.experiment == "null control"]
    found, limit = ("".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
                    for sentences in (summary(leaks[leaks.metric == "auc"]), limits(ensembles)))  # fmt: skip
    title = f"Membership leakage: {', '.join(ensembles)}"
    body = f"""<h1>{html.escape(title)}</h1>
<p>Models: {len(e.member)}; examples: {len(e.y)}, of {e.logits.shape[-1]} classes.</p><ul>{found}</ul>
{tables(leaks)}{pictures}
<h2>How well the models fit</h2>{tables(main[main.attack == ""])}
<h2>The null control</h2><p>Membership shuffled: {html.escape(text.null_control(control))}</p>
{tables(control)}<h2>The limits</h2><ul>{limit}</ul>
<p>All numbers: <a href="../results.csv">results.csv</a>.</p>"""
    return report.page(title, body, "wide")


def main(arguments=None):
    """Command line: files and --out, or DATA=a.npz,b.npz OUT=folder. Returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m lib.study.own_logits", description="Audit logits from anywhere.")
    parser.add_argument("files", nargs="*", help=".npz files, the first is the baseline (or DATA=a.npz,b.npz)")
    parser.add_argument("--out", default="outputs/mine", help="folder of the results (or OUT=folder)")
    words = []
    for word in sys.argv[1:] if arguments is None else arguments:
        name, _, value = word.partition("=")
        words += {"DATA": value.split(","), "OUT": ["--out", value]}.get(name, [word])
    given = parser.parse_args(words)
    try:
        audit(given.files, given.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page_at = Path(given.out) / "report" / "index.html"
    print(f"Done. Look at {page_at} (open in a browser), results.csv and figures/ beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

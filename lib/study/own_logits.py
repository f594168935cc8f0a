"""Audit models trained elsewhere: `make audit DATA=sgd.npz,sam.npz OUT=outputs/mine`; see docs/own_audits.md."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from lib import need
from lib.analysis import compare
from lib.attacks import intervals
from lib.attacks.catalogue import FAMILIES, HEADLINES
from lib.attacks.membership import calibration_split
from lib.data.sources import read_npz
from lib.study import figures, report, text, verdict
from lib.study.results import COLUMNS, NUMBERS
from lib.training.store import write_atomic

ARRAYS = "logits y member probabilities population_logits population_y population_probabilities groups".split()
FORM = "floats [M, N, C] or [M, Q, N, C] of two classes or more; for a sigmoid's p [M, N] save probabilities=np.stack"
FORM += "([1 - p, p], -1), for its logit z [M, N] save logits=np.stack([np.zeros_like(z), z], -1)"
LEAST = 4  # members and non-members of a model: thresholds are learned on one half of them and judged on the other


def models(name, given):
    """Models trained elsewhere, from a path or arrays, in the shape of an Ensemble: logits [M, Q, N, C], member, ...

    The population stands in for the test part. Where the models did not all train on the same examples, those that LiRA
    can't judge are left out, if enough others remain. `notes` says what was changed, `kept` [N] which are judged.
    Raises ValueError naming the file, the array, what is wrong there and what is valid."""
    if not hasattr(given, "items"):
        path = Path(given)
        how = {".csv": "np.loadtxt({!r}, delimiter=',')", ".pt": "torch.load({!r}).numpy()"}
        how = how.get(path.suffix.lower().replace("pth", "pt"), "np.load({!r})").format(path.name)
        lines = f"logits = {how}\nnp.savez({path.stem!r}, logits=logits, y=y, member=member)"
        need(path.suffix == ".npz", f"data={path.name!r}: valid is an .npz, which these two lines make:\n{lines}")
        given = read_npz(path, ARRAYS)
    arrays = {key: np.asarray(array) for key, array in given.items()}

    def refuse(key, wrong, valid, values=None):
        # wrong: a bool, or bools of which the first true one is the place; values: to show there
        if np.any(wrong):
            array = arrays.get(key)
            found = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
            if np.ndim(wrong):
                at = np.argwhere(wrong)[0].tolist()
                found = f"{(array if values is None else values)[tuple(at)]} at {at}"
            raise ValueError(f"{name}: {key}: {found}; valid are {valid}")

    for key, array in arrays.items():
        refuse(key, key not in ARRAYS, f"the names {', '.join(ARRAYS)}")
        refuse(key, array.dtype.kind not in "biuf" + "US" * (key == "groups"), "real numbers")
    member, groups, notes = arrays.get("member"), arrays.get("groups"), []
    if np.size(member) in np.shape(member):  # one model: [N], [1, N] or [N, 1]
        member, of_models = member.reshape(1, -1), ("logits", "probabilities")
        arrays |= {k: a[None] for k, a in arrays.items() if k.endswith(of_models) and a.ndim == 2 and len(a) > 1}
    z, y = part(arrays, "", refuse, notes)
    (m, q, n, c), test, y_test = z.shape, None, None
    if any(key.startswith("population") for key in arrays):
        test, y_test = part(arrays, "population_", refuse, notes)
        same = f"{m} models, {q} queries and {c} classes, as in logits"
        refuse("population_logits", test.shape != (m, q, len(y_test), c), same)
    swapped = ", so give member.T" * (np.shape(member) == (n, m))
    refuse("member", np.shape(member) != (m, n), f"[M, N] = {(m, n)}, as in logits{swapped}")
    refuse("member", ~np.isin(member, (0, 1)), "0 and 1", member)
    refuse("groups", groups is not None and groups.shape != (n,), f"[N] = {(n,)}")

    member, names = member.astype(bool), np.arange(n) if groups is None else groups
    for kept in (has_shadows(member), np.ones(n, bool)):
        one_each = np.unique(names[kept], return_index=True)[1]
        inside = member[:, kept][:, one_each].sum(1)
        few = (inside < LEAST) | (inside > len(one_each) - LEAST)
        if not few.any():
            break
    valid = f"{LEAST} members and {LEAST} non-members or more in each of the models [M]"
    refuse("member" if groups is None else "groups", few, valid, inside)
    if not kept.all():
        z, y, member, groups = z[:, :, kept], y[kept], member[:, kept], None if groups is None else groups[kept]
        why = "LiRA and RMIA need three models trained on an example, three others, and one of each complementary pair"
        notes.append(f"{n - kept.sum()} of {n} examples are left out: {why}.")
    more = dict(notes=notes, kept=kept, shared={"member": member, "y": y, "groups": groups, "population_y": y_test})
    dataset = SimpleNamespace(y=y, groups=groups, y_test=y_test, groups_test=None)
    return SimpleNamespace(logits=z, member=member, test_logits=test, dataset=dataset, **more)


def part(arrays, which, refuse, notes):
    """Logits [M, Q, N, C] and labels [N] of the pool (which: "") or of the population ("population_"), for `models`."""
    logits, labels, probabilities = (which + key for key in ("logits", "y", "probabilities"))
    given = probabilities if probabilities in arrays else logits
    z, y = arrays.get(given), arrays.get(labels)
    refuse(given, {logits, probabilities} <= set(arrays), f"these or {logits}, not both")
    refuse(given, z is None or z.dtype.kind != "f" or z.ndim not in (3, 4) or z.shape[-1] < 2 or z.size == 0, FORM)
    refuse(given, ~(z < np.inf), "numbers below infinity")
    (n, c), total = z.shape[-2:], z.sum(-1, dtype=float)
    if given == logits:
        said = f"logits; these are probabilities (they sum to {total.mean():.3g}): name the array {probabilities}"
        refuse(given, (z >= 0).all() and np.ptp(total) <= 0.04 * total.mean(), said)
    else:
        refuse(given, z < 0, f"numbers from 0 to 1 (name the array {logits} if it holds logits or log p)")
        refuse(given, np.abs(total - 1) > 0.02, f"classes that sum to 1 (logits are named {logits})", total)
        refuse(given, np.isin(z, (0, 1)).all(), "probabilities; these are labels only")
        least, zero = z[z > 0].min(), np.mean(z == 0)
        z = np.log(np.maximum(z, least), dtype=np.promote_types(z.dtype, np.float32))
        zeros = f"{zero:.2%} of them are 0 and count as {least:.2g}, the smallest other one"
        notes.append(f"We use the logarithms of {given} as logits; {zeros}.")
    if np.shape(y) == (n, c) and (np.sort(y, 1) == np.eye(c)[-1]).all():  # one-hot
        y = y.argmax(1)
    elif np.size(y) in np.shape(y):  # [N], [N, 1] or [1, N]
        y = y.ravel()
        swapped = len(y) != n and len(y) in z.shape and f"np.moveaxis({given}, {z.shape.index(len(y))}, -2)"
        refuse(given, bool(swapped), f"[M, N, C] with N = {len(y)} labels: {swapped} swaps the axes")
    refuse(labels, np.shape(y) != (n,), f"integers [{n}], or one-hot [{n}, {c}]")
    refuse(labels, y != np.floor(y), "whole numbers", y)
    one_too_high = ", so subtract 1" * bool(y.min() == 1 and y.max() == c)
    refuse(labels, (y < 0) | (y >= c), f"0 to {c - 1}, the classes of {given}{one_too_high}", y)
    return z if z.ndim == 4 else z[:, None], y.astype(np.int64)


def has_shadows(member):
    """The examples [N] that LiRA and RMIA can judge: three models trained on them, three did not, of each pair one."""
    enough = (member.sum(0) >= 3) & ((~member).sum(0) >= 3)
    sides = 2.0 * member[:, enough] - 1
    partner = (sides @ sides.T).argmin(1)  # the model that shares the fewest members
    alike = (member == member[partner]).any(0)
    in_pairs = (partner[partner] == np.arange(len(member))).all()
    if in_pairs and alike[enough].sum() < 0.05 * enough.sum():  # but for a few, which would keep LiRA from knowing it
        enough &= ~alike
    return enough


def audit(given, out) -> pd.DataFrame:
    """Audit models trained elsewhere: the tidy frame of results.csv, with figures/ and report/index.html in `out`.

    given: dict name -> path of an .npz or dict of arrays, or a list of paths, named by their stems; the first is the
    baseline. Raises ValueError before any attack runs."""
    named = {str(k): v for k, v in given.items()} if hasattr(given, "items") else {Path(p).stem: p for p in given}
    need(0 < len(named) == len(given), f"data: {[*map(str, given)]}; valid are one or more .npz of different names")
    ensembles = {name: models(name, value) for name, value in named.items()}
    first, e = next(iter(ensembles.items()))
    valid = "valid is the same in all: audit others one at a time"
    for name, other in ensembles.items():
        for key, array in e.shared.items():
            need(np.array_equal(array, other.shared[key]), f"{name}: {key}: differs from that of {first}; {valid}")
    path = Path(out) / "results.csv"
    free = not path.exists() or set(pd.read_csv(path, dtype=str).get("notebook", [""])) == {"own_logits"}
    need(free, f"out={str(out)!r} holds other results; valid is a folder of its own, such as outputs/mine")
    (Path(out) / "report").mkdir(parents=True, exist_ok=True)

    print("".join(f"{name}: {note}\n" for name, one in ensembles.items() for note in one.notes), end="")
    scored = {name: compare.scores(one) for name, one in ensembles.items()}
    leaks, null = compare.leakage(ensembles, scored), compare.null_table(e, seed=0, shuffles=1)
    found = [compare.accuracies(ensembles).assign(attack="", coordinate=""), leaks, intervals.precisions(leaks)]
    if "lira_shrunk" in scored[first]:
        found.append(compare.exposure_table(ensembles, scored, np.flatnonzero(e.kept)))
    if left_out := np.sum(~e.kept):
        found.append(pd.DataFrame([{"metric": "examples_left_out", "value": left_out, "optimizer": first}]))
    frame = pd.concat([*found, null.assign(optimizer=first, experiment="null control")], ignore_index=True)
    frame = frame.fillna({"experiment": "main", "coordinate": "", "baseline": "", "attack": ""})
    about = {"notebook": "own_logits", "dataset": Path(out).resolve().name}
    frame = frame.assign(**about, n_models=len(e.member), n_examples=len(e.dataset.y)).reindex(columns=COLUMNS)
    write_atomic(path, frame.to_csv(index=False, float_format="%.6g"))
    write_atomic(Path(out) / "report" / "index.html", page(out, ensembles, scored, frame))
    return frame


def page(out, ensembles, scored, frame):
    """The report as one HTML page: report.opening. frame: of results.csv; the figures are also kept in figures/."""
    main, e, best = frame[frame.experiment == "main"], next(iter(ensembles.values())), report.strongest(frame)
    auc, attack = main[main.metric == "auc"], best.attack.iloc[0]
    said, least, families, shadows = [], set(), {}, "lira" in set(auc.attack)
    judged = auc[(auc.baseline != "") & auc.attack.isin([*HEADLINES, attack])]
    for (name, baseline), rows in judged.groupby(["optimizer", "baseline"], sort=False):
        signs = {*rows.apply(text.sign, axis=1)}
        least |= {name} if max(signs) < 0 else {baseline} if min(signs) > 0 else set()
        way = " and ".join(word for word, sign in (("more", 1), ("less", -1)) if sign in signs) or "no differently"
        way += " (the attacks disagree)" * (len(signs) > 1)
        by = text.joined(f"{text.percentage_points(row)} by {row.attack}" for row in rows.itertuples())
        said.append(f"{name} leaks {way} than {baseline}: {by}")
    told = text.joined(f"{text.of_hundred(row)} for {row.optimizer}" for row in best.itertuples())
    answer = "; ".join(said) + ", in AUC. " * bool(said) + "Of a hundred pairs of a member and a non-member, "
    answer += f"{attack} tells which is which in {told}; guessing would in 50."
    if len(ensembles) == 1:
        found = main[main.metric.str.contains("@0.1$|@0.01$") & (main.attack == attack)][-2:]
        who = [f"a hundred {'non-' * ('fpr' in metric)}members" for metric in found.metric]
        named = [f"{text.of_hundred(row)} of {of}" for row, of in zip(found.itertuples(), who, strict=True)]
        answer += f" Told to accuse few, it names {' and '.join(named) or 'nobody: there are too few examples'}."
    for family, attacks in FAMILIES.items():
        for (name, baseline), rows in auc[auc.attack.isin(attacks)].groupby(["optimizer", "baseline"], sort=False):
            top = rows.loc[rows.value.idxmax()]
            column, cell = f"highest AUC of {name}", f"{text.number(top)} by {top.attack}"
            if baseline:
                given = [*rows.attack], 100 * rows[NUMBERS].to_numpy(float), verdict.DELTAS[" points"], "family"
                column = f"{name} leaks more than {baseline}"
                cell = ": ".join(filter(None, verdict.judge_attacks(*given)))
            families.setdefault(family, {})[column] = cell

    first, *others = pictures(out, ensembles, scored, auc)
    is_fit, null = (main.attack == "") & (main.metric != "examples_left_out"), frame[frame.experiment == "null control"]
    tables = main[main.metric.str.contains("auc$|balanced|@[^,]*$") & (main.attack != "")], main[is_fit], null
    leakage, fits, control = (text.wide(rows, across=("metric",)).to_html(border=0) for rows in tables)
    over = text.joined(name for name in ensembles if name not in least) if len(ensembles) > 1 else ""
    sections = {
        "For engineers": report.for_engineers(frame, " and ".join(sorted(least)), over),
        "Families of attacks": pd.DataFrame(families).T.to_html(border=0),
        "Fit": f"<p>Models: {len(e.member)}; examples: {len(e.dataset.y)}, of {e.logits.shape[-1]} classes.</p>{fits}",
        "Figures": "".join(f"<p>{report.embedded(*each)}</p>" for each in others),
        "Limits": report.bullets(limits(ensembles, shadows)),
    }
    folded = {"Each attack by itself": leakage, "The null control": control}
    return report.opening(f"Membership leakage: {', '.join(ensembles)}", answer, first, sections, folded)


def pictures(out, ensembles, scored, auc):
    """The figures, also kept in figures/: a list of (path, name). auc: the AUCs among the rows of results.csv."""
    figures.style()
    differences, e = auc[auc.baseline != ""], next(iter(ensembles.values()))
    drawn = {"auc": figures.forest(auc[auc.baseline == ""], {"auc": "AUC (the line: guessing)"}, reference=0.5)}
    if len(differences):
        drawn["difference"] = figures.forest(differences, {"auc": "difference in AUC"})
    size, attack = (5.2 * (1 + len(ensembles)), 4.2), HEADLINES[0] if HEADLINES[0] in set(auc.attack) else "confidence"
    drawn["roc_and_phi"], axes = plt.subplots(1, 1 + len(ensembles), figsize=size, layout="constrained")
    grid = np.geomspace(10 / (~e.member).sum(), 1, 200)  # down to the FPR at which ten false positives are expected
    for index, (name, one) in enumerate(ensembles.items()):
        rates, phi = roc_curve(e.member.ravel(), scored[name][attack].ravel())[:2], compare.signal(one, "phi")
        axes[0].plot(grid, np.interp(grid, *rates), **figures.look(index, name) | {"marker": ""})
        filled = dict(density=True, histtype="stepfilled", alpha=0.5, label=["members", "non-members"])
        axes[1 + index].hist([phi[e.member], phi[~e.member]], 30, **filled)
        axes[1 + index].set(title=figures.plain(name), xlabel=r"$\phi = \log p_y - \log(1-p_y)$", ylabel="density")
    axes[0].plot(grid, grid, color="0.5", lw=1, label="guessing")
    axes[0].set(xscale="log", yscale="log", xlabel="false positive rate", ylabel="true positive rate", title=attack)
    for axis in axes:
        axis.legend()
    for name, figure in drawn.items():
        figures.save(figure, SimpleNamespace(out=out), name)
    return [(Path(out) / "figures" / f"{name}.png", name) for name in drawn]


def limits(ensembles, shadows):
    """What the numbers cannot say, in sentences. shadows: LiRA and RMIA ran."""
    e = next(iter(ensembles.values()))
    member, y, groups = e.member, e.dataset.y, e.dataset.groups
    side = 2 * calibration_split(member, 0, y, groups) + member  # 0 to 3: the non-members and members of each half
    thin = [c for c in np.unique(y).tolist() if any((side[:, y == c] != k).all(1).any() for k in range(4))]
    said = [f"{name}: {note}" for name, one in ensembles.items() for note in one.notes]
    without = "LiRA and RMIA were left out: they need 3 models with and 3 without every example (n_models >= 6)."
    alone = "examples only: one or two models cannot say how others would differ"
    said += [without] * (not shadows)
    said += [f"The 95% intervals are over new {alone if len(member) < 3 else 'models and new examples'}."]
    said += [f"The intervals count {len(np.unique(groups))} groups, not {len(y)} examples."] * (groups is not None)
    half = f"Classes {thin} lack members or non-members in a half of some model: there all share a threshold."
    said += [half] * bool(thin)
    return said + [
        "Thresholds were learned on one half of the known members and non-members, and judged on the other.",
        "If members and non-members differ in more than training (date, source), attacks see it; no control can tell.",
        "The highest of many AUCs is high in part by chance; a stronger attack may exist: low values prove nothing.",
    ]

"""What the paper leaves open: tables of its variants, of what switches the effect off, of defences, and of who pays.

`found` and `ensembles` are dicts label -> Ensemble of the same models, the baseline first, as in lib.analysis.compare.
An AUC is that of each headline attack (column attack).
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from lib.analysis import compare
from lib.analysis.memorization import exposure, spearman
from lib.attacks import catalogue, intervals
from lib.attacks.intervals import SHADOW_CORRECTION, row


def effect_table(found):
    """The treatment's effect on AUC at every level (auc), and its change from the run as it is (auc_change): tidy.

    found: dict (factor, level, optimizer) -> Ensemble, with the baseline and the run as it is first. A level with a
    missing ensemble is left out. Columns beside the usual ones: attack, factor, level, coordinate, train_accuracy (the
    baseline's), train_accuracy_treatment and test_gain.
    """
    baseline, treatment = dict.fromkeys(name for *_, name in found)
    rows, as_it_is = [], {}
    for factor, level in dict.fromkeys(key[:2] for key in found):
        base, treated = (found.get((factor, level, name)) for name in (baseline, treatment))
        if base is None or treated is None:
            continue
        about = dict(optimizer=treatment, baseline=baseline, factor=factor, level=level)
        about["coordinate"] = f"{factor}={level}"
        about["train_accuracy"] = compare.on_pool(base, "correct").mean()
        about["train_accuracy_treatment"] = compare.on_pool(treated, "correct").mean()
        about["test_gain"] = compare.hits_on_test(treated).mean() - compare.hits_on_test(base).mean()
        for attack in catalogue.HEADLINES:
            effect = compare.auc_influence_values(treated, attack) - compare.auc_influence_values(base, attack)
            change = effect - as_it_is.setdefault(attack, effect)
            for metric, values in (("auc", effect), ("auc_change", change)):
                rows.append(row(metric, compare.auc_estimate(values, base.dataset), attack=attack, **about))
    return pd.DataFrame(rows)


def tempered(ensemble, temperature):
    """The ensemble as served with its logits divided by a temperature, which changes no prediction."""
    served = {n: getattr(ensemble, n) / np.float32(temperature) for n in ("logits", "test_logits")}
    return SimpleNamespace(**served, member=ensemble.member, dataset=ensemble.dataset, ids=ensemble.ids)


def defence_table(found):
    """Accuracies, and every metric of the headline attacks and of a threshold on the confidence: a tidy frame."""
    scored = {k: compare.headline_scores(e) | {"confidence": compare.signal(e, "phi")} for k, e in found.items()}
    return pd.concat([compare.accuracies(found), compare.leakage(found, scored)], ignore_index=True)


def within(ensembles, parts, accuracy):
    """AUC and test accuracy (the metric `accuracy`) within parts of the data: a tidy frame with the column part.

    parts: dict part -> (which of the pool, [N] bool; which of the test part, [T] bool). A part without members or
    non-members in some model has no AUC; one without test examples has no accuracy.
    """
    first = next(iter(ensembles.values()))
    data, member, frames = first.dataset, np.array(first.member), []
    right = {label: compare.hits_on_test(e) for label, e in ensembles.items()}
    for part, (own, seen) in parts.items():
        inside = member[:, own]
        if inside.any(1).all() and (~inside).any(1).all():
            groups = None if data.groups is None else data.groups[own]
            how = {"shadow_correction": SHADOW_CORRECTION, "columns": groups}
            for attack in catalogue.HEADLINES:
                scores = {label: compare.headline_scores(e)[attack][:, own] for label, e in ensembles.items()}
                values = {label: intervals.auc_influence_values(s, inside) for label, s in scores.items()}
                frames.append(intervals.paired(values, "auc", True, **how).assign(attack=attack, part=part))
        if seen.any():
            groups = None if data.groups_test is None else data.groups_test[seen]
            values = {label: r[:, seen] for label, r in right.items()}
            frames.append(intervals.paired(values, accuracy, True, columns=groups).assign(part=part))
    return pd.concat(frames, ignore_index=True)


def class_table(ensembles):
    """AUC and test accuracy within each class: a tidy frame with the columns class, size and coordinate.

    size: the class's number of examples in the pool. Metrics auc, class_test_accuracy, and balanced_test_accuracy
    (class ""), the mean over the classes.
    """
    data = next(iter(ensembles.values())).dataset
    parts = {name: (data.y == c, data.y_test == c) for c, name in enumerate(data.classes)}
    frame = within(ensembles, parts, "class_test_accuracy").rename(columns={"part": "class"})
    frame["size"] = [parts[name][0].sum() for name in frame["class"]]
    counts = np.bincount(data.y_test, minlength=data.n_classes)
    # the mean over classes of the accuracy within: each test point weighs T / (C n_class)
    weight = len(data.y_test) / ((counts > 0).sum() * np.maximum(counts, 1))[data.y_test]
    weighted = {label: compare.hits_on_test(e) * weight for label, e in ensembles.items()}
    balanced = intervals.paired(weighted, "balanced_test_accuracy", columns=data.groups_test)
    balanced = balanced.assign(**{"class": "", "size": len(data.y), "coordinate": ""})
    return pd.concat([frame.assign(coordinate="class=" + frame["class"]), balanced], ignore_index=True)


def agreement(ensembles, parts=8, seed=0):
    """Do two optimizers expose the same examples? Rank correlations of exposure between two halves of the pairs.

    An example's exposure is how well phi tells the models trained with it from those without (AUC; no shadow models,
    which the two halves would share). Noise keeps even the correlation within an optimizer below 1; the corrected one
    (Spearman 1904) is given if those within are positive in every split. A tidy frame; the intervals are the range over
    `parts` random splits.
    """
    (a, first), (b, second) = ensembles.items()
    scores, member = {a: compare.signal(first, "phi"), b: compare.signal(second, "phi")}, np.array(first.member)
    both = f"{a} and {b}"
    compared = {a: ((a, 0), (a, 1)), b: ((b, 0), (b, 1)), both: ((a, 0), (b, 1))}
    rng, found = np.random.default_rng(seed), {label: [] for label in compared}
    for _ in range(parts):
        left = np.repeat(rng.permutation(len(member) // 2) < len(member) // 4, 2)
        seen = {(k, side): exposure(scores[k][left == side], member[left == side]) for k in scores for side in (0, 1)}
        for label, (one, two) in compared.items():
            known = np.isfinite(seen[one]) & np.isfinite(seen[two])  # unknown: in all models of a half, or in none
            found[label].append(spearman(seen[one][known], seen[two][known]))
    rows = [("exposure_rank_correlation", label, np.mean(v), min(v), max(v)) for label, v in found.items()]
    one, two, across = map(np.array, found.values())
    if min(*one, *two) > 0:
        # rho_corrected = rho_ab / sqrt(rho_aa rho_bb)
        each, value = across / np.sqrt(one * two), across.mean() / np.sqrt(one.mean() * two.mean())
        rows.append(("exposure_rank_correlation_corrected", both, value, min(each), max(each)))
    return pd.DataFrame(rows, columns=["metric", "optimizer", "value", "ci_low", "ci_high"]).assign(baseline="")


def pattern_table(ensembles, memorized):
    """auc, mean_memorization and test_accuracy by how many pool examples share a known sub-pattern: a tidy frame.

    memorized: dict optimizer -> [N]. Columns size ("3 to 9") and coordinate. Sizes with fewer than 10 examples in the
    pool are left out, and accuracies on fewer than 10.
    """
    data = next(iter(ensembles.values())).dataset
    count = np.bincount(data.pattern, minlength=1 + max(data.pattern.max(), data.pattern_test.max()))
    size, size_test, parts = count[data.pattern], count[data.pattern_test], {}
    for low, high in ((1, 3), (3, 10), (10, 30), (30, 100), (100, np.inf)):
        own, seen = (size >= low) & (size < high), (size_test >= low) & (size_test < high)
        if own.sum() >= 10:
            label = f"{low} to {high - 1}" if high < np.inf else f"{low} or more"
            parts[label] = own, seen & (seen.sum() >= 10)
    frames = [within(ensembles, parts, "test_accuracy")]
    for part, (own, _) in parts.items():
        values = {label: m[None, own] for label, m in memorized.items()}
        frames.append(intervals.paired(values, "mean_memorization", examples_only=True).assign(part=part))
    frame = pd.concat(frames, ignore_index=True).rename(columns={"part": "size"})
    return frame.assign(coordinate="shared by=" + frame["size"])

"""What the paper leaves open: tables of what switches the effect off, and of leakage within parts of the data.

Dicts label -> Ensemble hold ensembles of the same models, the baseline first, as in lib.analysis.compare. An AUC is
that of each headline attack (column attack).
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from lib.analysis import compare
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
        about = dict(optimizer=treatment, baseline=baseline, factor=factor, level=level, coordinate=f"{factor}={level}")
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


def within(ensembles, parts, accuracy):
    """AUC and test accuracy (the metric `accuracy`) within parts of the data: a tidy frame.

    parts: dict part -> (which of the pool, [N] bool; which of the test part, [T] bool). A part without members or
    non-members in some model has no AUC; one without test examples has no accuracy. Columns beside the usual ones:
    attack, part, and size, its number of examples in the pool.
    """
    first, frames = next(iter(ensembles.values())), []
    data, member = first.dataset, np.array(first.member)
    groups = np.arange(len(data.y)) if data.groups is None else data.groups
    groups_test = np.arange(len(data.y_test)) if data.groups_test is None else data.groups_test
    for part, (own, seen) in parts.items():
        inside, about = member[:, own], {"part": part, "size": own.sum()}
        if inside.any(1).all() and (~inside).any(1).all():
            how = {"shadow_correction": SHADOW_CORRECTION, "columns": groups[own]}
            for attack in catalogue.HEADLINES:
                scores = {label: compare.headline_scores(e)[attack][:, own] for label, e in ensembles.items()}
                values = {label: intervals.auc_influence_values(s, inside) for label, s in scores.items()}
                frames.append(intervals.paired(values, "auc", True, **how).assign(attack=attack, **about))
        if seen.any():
            values = {label: compare.hits_on_test(e)[:, seen] for label, e in ensembles.items()}
            frames.append(intervals.paired(values, accuracy, True, columns=groups_test[seen]).assign(**about))
    return pd.concat(frames, ignore_index=True)

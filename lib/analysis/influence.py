"""influence"""

import numpy as np
import pandas as pd
from scipy.special import xlogy

from lib.analysis.memorization import _checked
from lib.attacks import intervals

# ---- influence ----------------------------------------------------------------------------------------------


def influence_blocks(member, values, block=1000):
    """infl[i, j] on `block` test examples at a time: yields (slice of columns, [N, <= block] float32).

    infl[i, j] is the mean output on test example j of models trained with i minus that of models trained without
    i (Feldman & Zhang 2020, equation 2): one matrix product. member: [M, N] bool; values: [M, T].
    """
    values, member = _checked(values, member)
    if block < 1:
        raise ValueError(f"block={block!r}; valid are whole numbers from 1")
    n_in = member.sum(0)
    # infl = W'V with W_mi = 1{i in m} / n_in - 1{i not in m} / n_out
    weights = np.where(member, (1 / n_in).astype(np.float32), (-1 / (len(member) - n_in)).astype(np.float32))
    for start in range(0, values.shape[1], block):
        where = slice(start, min(start + block, values.shape[1]))
        part = values[:, where].astype(np.float32)
        # a column of W sums to 0, so any constant may be taken off: what never varies becomes exactly 0
        yield where, weights.T @ (part - part[0])


def influence(member, values, block=1000):
    """infl [N, T] float32, see influence_blocks."""
    out = np.empty((np.shape(member)[1], np.shape(values)[1]), np.float32)
    for where, part in influence_blocks(member, values, block):
        out[:, where] = part
    return out


def influence_entropy(member, values, y, y_test, part="positive", same_class=True, block=1000):
    """I_ent [T]: the entropy (nats) of each test example's distribution of influence over training examples.

    part: "positive" keeps the positive influences, "absolute" their sizes; same_class: only training examples of
    the test example's class. Low: it leans on few. A test example that nothing influences gets the largest
    entropy possible, log of the number of candidates (of the largest class). Entropies of classes of different
    sizes compare after division by log of that size. Raises ValueError if nothing influences any of them, or for a
    test class without training examples.
    """
    if part not in ("positive", "absolute"):
        raise ValueError(f"part={part!r}; valid are 'positive' and 'absolute'")
    values, y, y_test = np.asarray(values), np.asarray(y), np.asarray(y_test)
    if len(values) and (values == values[0]).all():
        raise ValueError("values: every model gives the same outputs, so nothing has any influence")
    if same_class and (lost := set(y_test.tolist()) - set(y.tolist())):
        raise ValueError(f"y_test: class {min(lost)} has no training example; valid are the classes of y")
    everyone = [(np.ones(len(y), bool), np.ones(len(y_test), bool))]
    groups = [(y == c, y_test == c) for c in np.unique(y_test)] if same_class else everyone
    out, most = np.empty(len(y_test)), max(rows.sum() for rows, _ in groups)
    for rows, columns in groups:
        places = np.flatnonzero(columns)
        for where, infl in influence_blocks(member[:, rows], values[:, columns], block):
            out[places[where]] = entropy(np.maximum(infl, 0) if part == "positive" else np.abs(infl), most)
    return out


def entropy(mass, most):
    """Entropy (nats) of each column of mass [N, T] >= 0, normalized; log `most` for a column of zeros."""
    total = mass.sum(0, dtype=np.float64)
    # H = -sum p log p = log s - sum m log m / s for p = m / s
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(total) - xlogy(mass, mass).sum(0, dtype=np.float64) / total
    return np.where(total > 0, found, np.log(most))


# ---- buckets ------------------------------------------------------------------------------------------------


def buckets(score, n=5, within=None, seed=0):
    """Equal buckets by rising score, 0..n-1: [T]; ties fall at random. within: [T] groups, each cut by itself.

    Raises ValueError for NaN, and unless 2 <= n <= the size of (each group of) the test set.
    """
    score = np.asarray(score)
    if np.isnan(score).any():
        raise ValueError("score: NaN; valid are numbers")
    group = np.zeros(len(score), int) if within is None else np.asarray(within)
    smallest = np.unique(group, return_counts=True)[1].min()
    if not 2 <= n <= smallest:
        what = "test examples" if within is None else "test examples in the smallest group"
        raise ValueError(f"n={n} buckets; valid are 2 to {smallest}, the number of {what}")
    out, order = np.empty(len(score), int), np.random.default_rng(seed).permutation(len(score))
    for g in np.unique(group):
        own = order[group[order] == g]
        own = own[np.argsort(score[own], kind="stable")]
        out[own] = np.arange(len(own)) * n // len(own)
    return out


def cross_fitted(form, member):
    """Labels [M, T] for each model, formed on the *other* half of the models: form(rows) -> [T]."""
    fold = np.unique(intervals.pairs(member), return_inverse=True)[1] % 2
    by_fold = [form(np.flatnonzero(fold != k)) for k in (0, 1)]
    return np.stack([by_fold[k] for k in fold])


def step_influence_values(difference, label):
    """Cells [M, T] of the mean of difference [M, T] in the first bucket of label [M, T] minus that in the last."""
    first, last = (intervals.ratio_influence_values(difference, label == b) for b in (0, label.max()))
    return first - last


def gains(difference, label, name, total=False):
    """Mean of difference [M, T] in each bucket of label [M, T], and in the first minus the last: a tidy frame.

    Metrics gain_<name>_1 and so on, gain_<name>_1_minus_<n>; with `total`, also the overall mean (gain) and, unless
    that is zero, the first bucket's share of it (gain_share_<name>_1), a ratio, by the delta method.
    """
    n = label.max() + 1
    influence_values = [intervals.ratio_influence_values(difference, label == b) for b in range(n)]
    found = {f"gain_{name}_{b + 1}": c for b, c in enumerate(influence_values)}
    found[f"gain_{name}_1_minus_{n}"] = step_influence_values(difference, label)
    whole, weight = difference.mean(), (label == 0).mean()
    if total:
        found["gain"] = difference
    if total and whole:
        share = weight * influence_values[0].mean() / whole
        # d(a/b) = (da - (a/b) db) / b
        found[f"gain_share_{name}_1"] = share + (weight * influence_values[0] - share * difference) / whole
    rows = {metric: intervals.estimate(c) for metric, c in found.items()}
    return pd.DataFrame([(m, *e) for m, e in rows.items()], columns=["metric", "value", "ci_low", "ci_high"])

"""What one training example does to a model's output on itself: memorization, and which examples are memorized.

Feldman & Zhang 2020, "What neural networks memorize and why". values [M, N]: correctness (bool) or confidence p_y of M
models on the N examples of their pool; member [M, N] (bool): which model trained on which."""

from collections import namedtuple
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from lib import need
from lib.attacks import intervals
from lib.attacks.membership import pairs

EDGES, BANDS = (0.1, 0.4, 0.6, 0.85), ("below_0.1", "0.1_0.4", "0.4_0.6", "0.6_0.85", "above_0.85")


Memorization = namedtuple("Memorization", "value se")  # arrays [N]: the estimate and its standard error


def memorization(values, member) -> Memorization:
    """mem_i: mean output on example i of the models trained with it, minus that of the models trained without it.

    Feldman & Zhang 2020, equation 1 and algorithm 1. The standard error is about new models; for bools it is Agresti &
    Caffo's (2000), which is not 0 where all models agree."""
    values, member = checked(values, member)
    value, variance = 0.0, 0.0
    for sign, group in ((1, member), (-1, ~member)):
        n = group.sum(0)
        mean = (values * group).sum(0, dtype=np.float64) / n  # a product takes a third of the time of `where`
        # mem_i = sum_m v_mi 1{i in m} / n_in - sum_m v_mi 1{i not in m} / n_out
        value = value + sign * mean
        if values.dtype == bool:
            # p = (hits + 1) / (n + 2),  variance p (1 - p) / (n + 2)
            p = (n * mean + 1) / (n + 2)
            variance = variance + p * (1 - p) / (n + 2)
        else:
            variance = variance + np.square((values - mean) * group).sum(0) / (n - 1) / n
    return Memorization(value, np.sqrt(variance))


def checked(values, member):
    """values [M, N or T] and member [M, N] as arrays; a ValueError if too few models have, or lack, an example."""
    values, member = np.asarray(values), np.asarray(member)
    fits = member.dtype == bool and len(values) == len(member)
    need(fits, f"values, member: {values.shape}, {member.dtype} {member.shape}; valid are bools, a row for each model")
    fewest = min(member.sum(0).min(), (~member).sum(0).min())
    need(fewest >= 2, f"n_models={len(member)}: an example is in or out of only {fewest}; valid are 2 or more of each")
    return values, member


def bands(memorized):
    """The band of each example, an index into BANDS."""
    return np.digitize(np.round(memorized, 9), EDGES)


def jackknife(statistic, member, groups=20):
    """95% intervals of statistic(rows, columns) -> [K], of the models and examples at these indices: K Estimates.

    Delete-a-group jackknife (Efron & Tibshirani 1993, section 11.7) over pairs of models plus that over examples."""
    rows, columns = np.arange(len(member)), np.arange(member.shape[1])
    value, variance, spread = np.asarray(statistic(rows, columns)), 0.0, 0.0
    pair_of = np.unique(pairs(member), return_inverse=True)[1]
    for index, without in ((pair_of, lambda k: statistic(k, columns)), (columns, lambda k: statistic(rows, k))):
        g = min(groups, index.max() + 1)
        found = np.array([without(np.flatnonzero(index % g != k)) for k in range(g)])
        # V = (G - 1)/G sum_g (theta_(g) - mean theta)^2
        part = (g - 1) * found.var(0)
        variance, spread = variance + part, spread + part**2 / (g - 1)
    # df = V^2 / sum_k V_k^2 / (G_k - 1)  (Satterthwaite)
    df = np.divide(variance**2, spread, out=np.full_like(spread, groups - 1.0), where=spread > 0)
    half = stats.t.ppf(0.975, df) * np.sqrt(variance)
    return [intervals.Estimate(*map(float, triple)) for triple in zip(value, value - half, value + half, strict=True)]


def memorization_table(values, member, published=None):
    """Mean memorization and the share of examples in each band, of two optimizers and their difference: a tidy frame.

    values: dict optimizer -> [M, N], the baseline first; published: scores [N] from elsewhere. Both are correlated by
    rank. The interval of a share reaches at least two examples either way: an empty band shows no spread."""
    baseline, treatment = values

    def statistic(rows, columns):
        part = np.ix_(rows, columns)
        mem = [memorization(v[part], member[part]).value for v in values.values()]
        known = [] if published is None else [published[columns]]
        shares = [np.bincount(bands(m), minlength=len(BANDS)) / len(m) for m in mem]
        both = np.array([[m.mean(), *s, *(spearman(m, p) for p in known)] for m, s in zip(mem, shares, strict=True)])
        return [*both[0], *both[1], *(both[1] - both[0]), spearman(*mem)]

    metrics = ["mean_memorization", *(f"memorization_share_{band}" for band in BANDS)]
    metrics += ["memorization_spearman_published"] * (published is not None)
    keys = [(*who, m) for who in ((baseline, ""), (treatment, ""), (treatment, baseline)) for m in metrics]
    keys.append((treatment, baseline, "memorization_spearman"))
    rows = [(*key, *estimate) for key, estimate in zip(keys, jackknife(statistic, member), strict=True)]
    frame = pd.DataFrame(rows, columns=intervals.TIDY)
    is_share, is_published = (frame.metric.str.contains(word) for word in ("share", "published"))
    most = np.where(is_published & (frame.baseline != ""), 2, 1)  # what the metric can be at most
    low, high = (frame.value + sign * 2 / member.shape[1] * is_share for sign in (-1, 1))
    frame["ci_low"] = np.fmax(np.fmin(frame.ci_low, low), np.where(is_share & (frame.baseline == ""), 0, -most))
    frame["ci_high"] = np.fmin(np.fmax(frame.ci_high, high), most)
    return frame


def spearman(a, b):
    """Spearman's rank correlation of two arrays [N]; 0 where one of them is constant."""
    return float(stats.spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def plant(dataset, n_wrong, sources=(), copies=4, seed=0):
    """The data set with other labels at `wrong` [n_wrong], and each of the sources [n] also at `copied` [n, copies], in
    place of other examples: (Dataset, wrong, copied)."""
    rng, sources, x, y = np.random.default_rng(seed), np.array(sources, int), dataset.x.copy(), dataset.y.copy()
    free = rng.permutation(np.setdiff1d(np.arange(len(y)), sources))
    wrong, copied = free[:n_wrong], free[n_wrong:][: copies * len(sources)].reshape(len(sources), copies)
    y[wrong] = (y[wrong] + rng.integers(1, dataset.n_classes, n_wrong)) % dataset.n_classes
    x[copied], y[copied] = x[sources][:, None], y[sources][:, None]
    return replace(dataset, name=f"{dataset.name}-planted", x=x, y=y), wrong, copied


def leak(dataset, index, times=50, seed=0):
    """The data set with example `index` in it `times` times (an even number): (Dataset, its place there).

    All copies are in the example's own group, so a half holds all of them or none. One example of another group, of the
    same class if two of these stay, is dropped: an even pool stays even. ValueError if half of it is too small."""
    n, y = len(dataset.y), dataset.y
    groups = np.arange(n) if dataset.groups is None else dataset.groups
    others = groups != groups[index]
    most = (2 * int(others.sum()) - n) // 2 * 2
    need(times in range(2, most + 1, 2), f"times={times}: valid are even numbers from 2 to {most} in a pool of {n}")
    spare = others & (np.bincount(y)[y] > 2)
    alike = spare & (y == y[index])
    dropped = np.random.default_rng(seed).choice(np.flatnonzero(alike if alike.sum() > 2 else spare))
    rows = np.append(np.delete(np.arange(n), dropped), np.full(times - 1, index))
    index_of = np.arange(n) if dataset.index is None else dataset.index
    parts = {"x": dataset.x[rows], "y": y[rows], "index": index_of[rows], "groups": groups[rows]}
    parts["pattern"] = None if dataset.pattern is None else dataset.pattern[rows]
    return replace(dataset, name=f"{dataset.name}-leak", **parts), int(index - (dropped < index))


def exposure(scores, member):
    """How well scores [M, N] tell the models trained with an example from those without: AUC of each example, [N]."""
    ranks, n_in = stats.rankdata(scores, axis=0), member.sum(0)
    # AUC_i = (sum of the ranks of the models with i - n_in (n_in + 1) / 2) / (n_in n_out)
    return ((ranks * member).sum(0) - n_in * (n_in + 1) / 2) / (n_in * (len(member) - n_in))

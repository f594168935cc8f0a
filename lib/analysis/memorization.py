"""What one training example does to a model's output on itself: memorization, and which examples are memorized.

Everything is estimated from an ensemble on random subsets of one pool (Feldman & Zhang 2020, "What neural networks
memorize and why"). values [M, N] are correctness (bool) or confidence p_y of M models on the N examples of the pool;
member [M, N] says which model trained on which example. Nothing here trains.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from lib.attacks import intervals
from lib.attacks.membership import pairs

EDGES = (0.1, 0.4, 0.6, 0.85)
BANDS = ("below_0.1", "0.1_0.4", "0.4_0.6", "0.6_0.85", "above_0.85")


class Memorization(NamedTuple):
    """Arrays [N]: the estimate and its standard error."""

    value: np.ndarray
    se: np.ndarray


def memorization(values, member) -> Memorization:
    """mem_i: mean output on example i of the models trained with it, minus that of the models trained without it.

    values: [M, N] numbers or bools; member: [M, N] bool. Feldman & Zhang 2020, equation 1 and algorithm 1. The standard
    error is each example's own and speaks of new models. For bools it is Agresti & Caffo's (2000), which is not zero
    where all models agree. values may also be the difference of two paired ensembles.
    Raises ValueError for shapes that differ, NaN, or an example with fewer than two models in or out.
    """
    values, member = checked(values, member, same=True)
    value, variance = 0.0, 0.0
    for sign, group in ((1, member), (-1, ~member)):
        n, exact = group.sum(0), {"dtype": np.float64, "casting": "unsafe"}
        total = np.einsum("mn,mn->n", group, values, **exact)
        # mem_i = sum_m v_mi 1{i in m} / n_in - sum_m v_mi 1{i not in m} / n_out
        value = value + sign * total / n
        if values.dtype == bool:
            # p = (hits + 1) / (n + 2),  variance p (1 - p) / (n + 2)
            p = (total + 1) / (n + 2)
            variance = variance + p * (1 - p) / (n + 2)
        else:
            # s^2 / n = (sum v^2 - (sum v)^2 / n) / (n - 1) / n
            squares = np.einsum("mn,mn,mn->n", group, values, values, **exact)
            variance = variance + np.maximum(squares - total**2 / n, 0) / (n - 1) / n
    return Memorization(value, np.sqrt(variance))


def checked(values, member, same=False):
    """values [M, N or T] and member [M, N] as arrays, or a ValueError that says what is wrong."""
    values, member = np.asarray(values), np.asarray(member)
    if member.dtype != bool or member.ndim != 2:
        raise ValueError(f"member: {member.dtype} {member.shape}; valid are bools [M, N]")
    if values.ndim != 2 or len(values) != len(member) or (same and values.shape != member.shape):
        raise ValueError(f"values: shape {values.shape}; valid is {member.shape if same else (len(member), 'T')}")
    if values.dtype != bool and not np.isfinite(values).all():
        raise ValueError("values: NaN or infinity; valid are finite numbers")
    fewest = min(member.sum(0).min(), (~member).sum(0).min())
    if fewest < 2:
        raise ValueError(
            f"n_models={len(member)} is too few: an example is in or out of only {fewest}; valid are 2 or more of each"
        )
    return values, member


def per_example(found, dataset):
    """A frame with a row for each example: its index in the data set as loaded, class, estimates and standard errors.

    found: dict output -> dict optimizer -> Memorization.
    """
    index = np.arange(len(dataset.y)) if dataset.index is None else dataset.index
    frame = pd.DataFrame({"index": index, "class": np.array(dataset.classes)[dataset.y]})
    for kind, of in found.items():
        for name, m in of.items():
            frame[f"{kind}_{name}"], frame[f"{kind}_{name}_se"] = m.value, m.se
    return frame


def models_needed(se, n_models, wanted):
    """How many models (4 or more) bring a standard error, a number or an array, from n_models down to `wanted`."""
    if not wanted > 0:
        raise ValueError(f"wanted={wanted!r}; valid are positive standard errors")
    # se is proportional to M^(-1/2)
    return np.maximum(np.ceil(n_models * (np.asarray(se) / wanted) ** 2), 4).astype(int)


def band_shares(memorized):
    """Share of the examples in each of BANDS: [N] -> [5]."""
    return np.bincount(np.digitize(np.round(memorized, 9), EDGES), minlength=len(BANDS)) / len(memorized)


def jackknife(statistic, member, groups=20, level=0.95):
    """Intervals of a vector statistic(rows, columns) of some models and some examples: a list of Estimate.

    rows, columns: index arrays, as in values[np.ix_(rows, columns)]. Delete-a-group jackknife (Efron & Tibshirani 1993,
    section 11.7) over pairs of models and over examples. The two variances are added, so an interval speaks of new
    models and new examples.
    """
    rows, columns = np.arange(len(member)), np.arange(member.shape[1])
    value, variance, spread = np.atleast_1d(statistic(rows, columns)), 0.0, 0.0
    pair_of = np.unique(pairs(member), return_inverse=True)[1]
    for index, over_models in ((pair_of, True), (columns, False)):
        g = min(groups, index.max() + 1)
        left = [np.flatnonzero(index % g != k) for k in range(g)]
        found = np.array([statistic(kept, columns) if over_models else statistic(rows, kept) for kept in left])
        # V = (G - 1)/G sum_g (theta_(g) - mean theta)^2
        part = (g - 1) / g * np.square(found.reshape(g, -1) - found.reshape(g, -1).mean(0)).sum(0)
        variance, spread = variance + part, spread + part**2 / (g - 1)
    # df = V^2 / sum_k V_k^2 / (G_k - 1)  (Satterthwaite)
    df = np.divide(variance**2, spread, out=np.full_like(spread, groups - 1.0), where=spread > 0)
    half = stats.t.ppf(0.5 + level / 2, df) * np.sqrt(variance)
    return [intervals.Estimate(*map(float, triple)) for triple in zip(value, value - half, value + half, strict=True)]


def memorization_table(values, member):
    """Mean memorization and the share of examples in each band, of two optimizers and their difference: a tidy frame.

    values: dict optimizer -> [M, N], the baseline first. The difference also has the rank correlation of the two
    (memorization_spearman). The interval of a share reaches at least two examples either way, because leaving groups
    out shows no spread where a band is empty.
    """
    baseline, treatment = values

    def statistic(rows, columns):
        part = np.ix_(rows, columns)
        mem = [memorization(v[part], member[part]).value for v in values.values()]
        a, b = (np.array([m.mean(), *band_shares(m)]) for m in mem)
        return np.concatenate([a, b, b - a, [spearman(*mem)]])

    metrics = ["mean_memorization", *(f"memorization_share_{band}" for band in BANDS)]
    keys = [(*who, m) for who in ((baseline, ""), (treatment, ""), (treatment, baseline)) for m in metrics]
    keys.append((treatment, baseline, "memorization_spearman"))
    rows = [(*key, *estimate) for key, estimate in zip(keys, jackknife(statistic, member), strict=True)]
    frame = pd.DataFrame(rows, columns=intervals.TIDY)
    least = 2 / member.shape[1] * frame.metric.str.contains("share")
    lowest = np.where((frame.baseline != "") | (least == 0), -1, 0)
    return frame.assign(
        ci_low=np.fmax(np.fmin(frame.ci_low, frame.value - least), lowest),
        ci_high=np.fmin(np.fmax(frame.ci_high, frame.value + least), 1),
    )


def spearman(a, b):
    """Spearman's rank correlation of two arrays [N]; 0 where one of them is constant."""
    ranks = stats.rankdata(a), stats.rankdata(b)
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


# ---- pools with planted faults ------------------------------------------------------------------------------


def plant(dataset, sources, n_wrong, copies=4, seed=0):
    """The data set with faults at known places: (Dataset, wrong [n_wrong], copied [len(sources), copies]).

    The examples `wrong` get another label. Each of the sources [n] gets `copies` copies, which replace other examples.
    Raises ValueError if the pool is too small to hold them.
    """
    rng, sources, x, y = np.random.default_rng(seed), np.asarray(sources), dataset.x.copy(), dataset.y.copy()
    free = rng.permutation(np.setdiff1d(np.arange(len(y)), sources))
    if n_wrong + copies * len(sources) > len(free):
        raise ValueError(f"n_wrong={n_wrong}, sources: {len(sources)}; a pool of {len(y)} has no room for them")
    wrong, copied = free[:n_wrong], free[n_wrong:][: copies * len(sources)].reshape(-1, copies)
    y[wrong] = (y[wrong] + rng.integers(1, dataset.n_classes, n_wrong)) % dataset.n_classes
    x[copied], y[copied] = x[sources][:, None], y[sources][:, None]
    return replace(dataset, name=f"{dataset.name}-planted", x=x, y=y), wrong, copied


def leak(dataset, index, times=50, seed=0):
    """The data set with example `index` in it `times` times and another example dropped: (Dataset, its place there).

    It has N + times - 2 examples, so an even pool stays even. The copies form one group with the example and its own
    group, so a half holds all of them or none. The dropped example is of another group and, if two of them stay, of the
    same class. Raises ValueError if `times` is odd or the copies do not fit into half of the pool.
    """
    n = len(dataset.y)
    groups = np.arange(n) if dataset.groups is None else dataset.groups
    kin = int((groups == groups[index]).sum())
    most = (n - 2 * kin) // 2 * 2
    if not 2 <= times <= most or times % 2:
        raise ValueError(f"times={times}: valid are even numbers from 2 to {most} in a pool of {n}")
    spare = (groups != groups[index]) & (np.bincount(dataset.y)[dataset.y] > 2)
    own = spare & (dataset.y == dataset.y[index])
    dropped = np.random.default_rng(seed).choice(np.flatnonzero(own if own.sum() > 2 else spare))
    rows = np.concatenate([np.delete(np.arange(n), dropped), np.full(times - 1, index)])
    parts = {name: a[rows] for name in ("x", "y", "pattern") if (a := getattr(dataset, name)) is not None}
    parts |= {"index": rows if dataset.index is None else dataset.index[rows], "groups": groups[rows]}
    return replace(dataset, name=f"{dataset.name}-leak", **parts), int(index - (dropped < index))


def atypicality(x, y, k=5):
    """Mean distance to the k nearest of its own class over that to the k nearest of the nearest other class: [N].

    x: [N, ...] inputs, compared in Euclidean distance; y: [N]. Above 1, an example lies nearer to another class.
    """
    x, (labels, y) = np.reshape(x, (len(x), -1)), np.unique(y, return_inverse=True)
    fewest = np.bincount(y).min()
    if len(labels) < 2 or not 1 <= k < fewest:
        raise ValueError(
            f"k={k}: {len(labels)} classes, the least of {fewest}; valid are two or more, with more than k >= 1"
        )
    distance = np.empty((len(x), len(labels)))
    for c in range(len(labels)):
        own = y == c
        near = NearestNeighbors(n_neighbors=k).fit(x[own])
        distance[own, c] = near.kneighbors()[0].mean(1)  # without arguments: the others of its class, not itself
        distance[~own, c] = near.kneighbors(x[~own])[0].mean(1)
    within = distance[np.arange(len(x)), y]
    distance[np.arange(len(x)), y] = np.inf
    return within / np.maximum(distance.min(1), 1e-12)


def exposure(scores, member):
    """How well an attack tells the models trained with an example from those without: AUC for each example, [N].

    scores, member: [M, N]. Ties count half (Mann-Whitney).
    """
    ranks, n_in = stats.rankdata(scores, axis=0), member.sum(0)
    # AUC_i = (sum of the ranks of the models with i - n_in (n_in + 1) / 2) / (n_in n_out)
    return ((ranks * member).sum(0) - n_in * (n_in + 1) / 2) / (n_in * (len(member) - n_in))

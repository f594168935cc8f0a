"""What single training examples do to a model's outputs: memorization, influence, and who leans on whom.

Everything is estimated from an ensemble on random subsets (Feldman & Zhang 2020, "What neural networks memorize
and why"): values[M, N] or [M, T] are correctness (bool) or confidence p_y of M models on the N examples of the
pool, or on T test examples; member[M, N] says who trained on what. Nothing here trains.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from lib.attacks import intervals

EDGES = (0.1, 0.4, 0.6, 0.85)
BANDS = ("below_0.1", "0.1_0.4", "0.4_0.6", "0.6_0.85", "above_0.85")


class Memorization(NamedTuple):
    """Arrays [N]: the estimate, its standard error, and the two means that it is the difference of."""

    value: np.ndarray
    se: np.ndarray
    inside: np.ndarray
    outside: np.ndarray


def memorization(values, member) -> Memorization:
    """mem_i: mean output on example i of the models trained with it, minus that of those trained without it.

    values: [M, N] numbers or bools; member: [M, N] bool. Feldman & Zhang 2020, equation 1 and algorithm 1. The
    standard error is for new models, each example by itself; that of a proportion (bools) is Agresti & Caffo's
    (2000), so that it is not zero where all models agree. Differences of two paired ensembles are values too.
    Raises ValueError for shapes that differ, NaN, or an example with fewer than two models in or out.
    """
    values, member = _checked(values, member, same=True)
    n_in, n = member.sum(0), len(member)
    first, second = (_sums(values, member, power) for power in (1, 2))
    # mem_i = sum_m v_mi 1{i in m} / n_in - sum_m v_mi 1{i not in m} / n_out
    inside, outside = first[0] / n_in, first[1] / (n - n_in)
    variance = 0.0
    for total, squares, count in zip(first, second, (n_in, n - n_in), strict=True):
        if values.dtype == bool:
            share = (total + 1) / (count + 2)
            variance = variance + share * (1 - share) / (count + 2)
        else:
            # s^2 / n = (sum v^2 - (sum v)^2 / n) / (n - 1) / n
            variance = variance + np.maximum(squares - total**2 / count, 0) / (count - 1) / count
    return Memorization(inside - outside, np.sqrt(variance), inside, outside)


def _sums(values, member, power):
    """Sums over the models with and without each example of values^power, each [N], in float64."""
    factors = [values] * power
    every = np.einsum(",".join(["mn"] * power) + "->n", *factors, dtype=np.float64, casting="unsafe")
    letters = ",".join(["mn"] * (power + 1)) + "->n"
    inside = np.einsum(letters, member, *factors, dtype=np.float64, casting="unsafe")
    return inside, every - inside


def _checked(values, member, same=False):
    """values [M, N or T] and member [M, N] as arrays, or a ValueError that says what is wrong."""
    values, member = np.asarray(values), np.asarray(member)
    if member.dtype != bool or member.ndim != 2:
        raise ValueError(f"member: {member.dtype} {member.shape}; valid are bools [M, N]")
    if values.ndim != 2 or len(values) != len(member) or (same and values.shape != member.shape):
        valid = member.shape if same else (len(member), "T")
        raise ValueError(f"values: shape {values.shape}; valid is {valid}, for member {member.shape}")
    if values.dtype != bool and not np.isfinite(values).all():
        raise ValueError("values: NaN or infinity; valid are finite numbers")
    n_in = member.sum(0)
    few = np.minimum(n_in, len(member) - n_in) < 2
    if few.any():
        i = int(np.flatnonzero(few)[0])
        raise ValueError(
            f"n_models={len(member)} is too few: example {i} is in {n_in[i]} and out of {len(member) - n_in[i]}; "
            "an estimate needs 2 of each"
        )
    return values, member


def per_example(found, dataset):
    """A frame with a line for each example: its index in the data set as loaded, class, and each estimate with its se.

    found: dict output -> dict optimizer -> Memorization.
    """
    index = np.arange(len(dataset.y)) if dataset.index is None else dataset.index
    frame = pd.DataFrame({"index": index, "class": np.array(dataset.classes)[dataset.y]})
    for kind, of in found.items():
        for name, m in of.items():
            frame[f"{kind}_{name}"], frame[f"{kind}_{name}_se"] = m.value, m.se
    return frame


def models_needed(se, n_models, wanted):
    """How many models would bring a standard error (a number or an array) down to `wanted`, 4 at least.

    For examples on which the models differ. With halves, no proportion needs more than wanted^(-2).
    Raises ValueError for wanted <= 0.
    """
    if not wanted > 0:
        raise ValueError(f"wanted={wanted!r}; valid are positive standard errors")
    # se is proportional to M^(-1/2)
    return np.maximum(np.ceil(n_models * (np.asarray(se) / wanted) ** 2), 4).astype(int)


def band_shares(memorized):
    """Share of examples in each of BANDS: [N] -> [5]."""
    return np.bincount(np.digitize(np.round(memorized, 9), EDGES), minlength=len(BANDS)) / len(memorized)


# ---- intervals ----------------------------------------------------------------------------------------------


def jackknife(statistic, member, groups=20, level=0.95):
    """Estimates of a vector statistic(rows, columns) of some models and some examples, as a list of Estimate.

    rows, columns: index arrays, as in values[np.ix_(rows, columns)]. Delete-a-group jackknife (Efron & Tibshirani
    1993, section 11.7) over pairs of models and over examples; the two variances add up, so an interval speaks of
    new models and new examples.
    """
    rows, columns = np.arange(len(member)), np.arange(member.shape[1])
    value, variance, spread = np.atleast_1d(statistic(rows, columns)), 0.0, 0.0
    pairs = np.unique(intervals.pairs(member), return_inverse=True)[1]
    for which in (0, 1):
        index = (pairs, columns)[which]
        g = min(groups, index.max() + 1)
        left = [np.flatnonzero(index % g != k) for k in range(g)]
        found = np.array([statistic(*((kept, columns) if which == 0 else (rows, kept))) for kept in left])
        # V = (G - 1)/G sum_g (theta_(g) - mean theta)^2
        part = (g - 1) / g * np.square(found.reshape(g, -1) - found.reshape(g, -1).mean(0)).sum(0)
        variance, spread = variance + part, spread + part**2 / (g - 1)
    df = np.divide(variance**2, spread, out=np.full_like(spread, groups - 1.0), where=spread > 0)
    half = stats.t.ppf(0.5 + level / 2, df) * np.sqrt(variance)
    return [intervals.Estimate(*map(float, triple)) for triple in zip(value, value - half, value + half, strict=True)]


def memorization_table(values, member):
    """Mean memorization and the bands' shares of two optimizers and their paired differences: a tidy frame.

    values: dict optimizer -> [M, N] of two paired ensembles, the baseline first. Also the rank correlation
    (metric memorization_spearman) between the two, in the row of the difference. The interval of a share reaches
    two examples either way at least: where a band is empty, leaving groups out shows no spread.
    """
    baseline, treatment = values

    def statistic(rows, columns):
        part = np.ix_(rows, columns)
        mem = [memorization(v[part], member[part]).value for v in values.values()]
        a, b = (np.array([m.mean(), *band_shares(m)]) for m in mem)
        return np.concatenate([a, b, b - a, [spearman(*mem)]])

    names = ["mean_memorization", *(f"memorization_share_{band}" for band in BANDS)]
    whose = ((baseline, ""), (treatment, ""), (treatment, baseline))
    keys = [(*who, name) for who in whose for name in names] + [(treatment, baseline, "memorization_spearman")]
    frame = tidy(keys, jackknife(statistic, member))
    least = 2 / member.shape[1] * frame.metric.str.contains("share")
    lowest = np.where((frame.baseline != "") | (least == 0), -1, 0)
    return frame.assign(
        ci_low=np.fmax(np.fmin(frame.ci_low, frame.value - least), lowest),
        ci_high=np.fmin(np.fmax(frame.ci_high, frame.value + least), 1),
    )


def tidy(keys, estimates):
    """A tidy frame from (optimizer, baseline, metric) and Estimates."""
    rows = [(*key, *estimate) for key, estimate in zip(keys, estimates, strict=True)]
    return pd.DataFrame(rows, columns=intervals.TIDY)


def spearman(a, b):
    """Spearman's rank correlation of two arrays [N]; 0 where one of them is constant."""
    ranks = stats.rankdata(a), stats.rankdata(b)
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def plant(dataset, sources, n_wrong, copies=4, seed=0):
    """The data set with faults of known place: (Dataset, wrong [n_wrong], copied [len(sources), copies]).

    Examples `wrong` get another label; each of the sources [n] gets `copies` twins, which replace other examples.
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
    """The data set with example `index` in it `times` over and another example dropped: (Dataset, its place there).

    N + times - 2 examples, so that with even `times` an even pool stays even. The copies form one group with the
    example and its kin: a half holds all of them or none. The one dropped is of another group and, if two of them
    stay, of the same class. Raises ValueError if that group would not fit into half of the pool.
    """
    n = len(dataset.y)
    groups = np.arange(n) if dataset.groups is None else dataset.groups
    kin = int((groups == groups[index]).sum())
    if times < 2 or times % 2 or times - 1 + kin > (n + times - 2) // 2:
        raise ValueError(f"times={times}: valid are even numbers from 2 to {(n - 2 * kin) // 2 * 2} in a pool of {n}")
    spare = (groups != groups[index]) & (np.bincount(dataset.y)[dataset.y] > 2)
    own = spare & (dataset.y == dataset.y[index])
    dropped = np.random.default_rng(seed).choice(np.flatnonzero(own if own.sum() > 2 else spare))
    rows = np.concatenate([np.delete(np.arange(n), dropped), np.full(times - 1, index)])
    parts = {key: getattr(dataset, key) for key in ("x", "y", "pattern")}
    parts = {key: None if part is None else part[rows] for key, part in parts.items()}
    parts["index"] = rows if dataset.index is None else dataset.index[rows]
    planted = replace(dataset, name=f"{dataset.name}-leak", groups=groups[rows], **parts)
    return planted, int(index - (dropped < index))


# ---- what kind of example -----------------------------------------------------------------------------------


def atypicality(x, y, k=5):
    """Mean distance to the k nearest of its own class over that to the k nearest of the nearest other class: [N].

    x: [N, ...] inputs, compared in Euclidean distance; y: [N]. Above 1, an example lies nearer to another class.
    Raises ValueError for one class only, k < 1, or a class with k or fewer examples.
    """
    x, (labels, y) = np.reshape(x, (len(x), -1)), np.unique(y, return_inverse=True)
    fewest = np.bincount(y).min()
    if len(labels) < 2 or not 1 <= k < fewest:
        raise ValueError(
            f"k={k}: {len(labels)} classes of {fewest} examples or more; valid are two, of more than k >= 1"
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
    """How well an attack tells each example's members from its non-members, over models: AUC, [N].

    scores, member: [M, N]. The Mann-Whitney form of the AUC, ties counted half.
    """
    ranks, n_in = stats.rankdata(scores, axis=0), member.sum(0)
    # AUC_i = (sum of the ranks of the models with i - n_in (n_in + 1) / 2) / (n_in n_out)
    return ((ranks * member).sum(0) - n_in * (n_in + 1) / 2) / (n_in * (len(member) - n_in))

"""What one training example does to a model's output on test examples.

As in lib.analysis.memorization, for T test examples: values [M, T] are correctness or confidence p_y of M models."""

import numpy as np
import pandas as pd
from scipy.special import xlogy

from lib import need
from lib.analysis.memorization import checked


def influence_blocks(member, values, block=1000):
    """infl[i, j] on `block` test examples at a time: yields (slice of columns, [N, <= block] float32).

    infl[i, j]: mean output on test example j of the models trained with example i, minus that of the models trained
    without it (Feldman & Zhang 2020, equation 2)."""
    values, member = checked(values, member)
    n_in = member.sum(0)
    # infl = W'V with W_mi = 1{i in m} / n_in - 1{i not in m} / n_out
    weights = np.where(member, (1 / n_in).astype(np.float32), (-1 / (len(member) - n_in)).astype(np.float32))
    for start in range(0, values.shape[1], block):
        where = slice(start, min(start + block, values.shape[1]))
        part = values[:, where].astype(np.float32)
        # a column of W sums to 0, so a constant can be subtracted: an output that never varies gives exactly 0
        yield where, weights.T @ (part - part[0])


def influence(member, values):
    """infl [N, T] float32, see influence_blocks."""
    return np.concatenate([part for _, part in influence_blocks(member, values)], axis=1)


def influence_entropy(member, values, y, y_test, part="positive", same_class=True):
    """I_ent - log n [T] (nats, at most 0): entropy of each test example's distribution of influence, below its maximum.

    The distribution runs over n training examples: those of the test example's class with same_class, else all. Low: it
    depends on few of them; 0: on all alike, or on none; pure noise: about -0.98 (positive part), whatever n is. part:
    "positive" keeps the positive influences, "absolute" the sizes of all."""
    groups = [(y == c, y_test == c) for c in np.unique(y_test)] if same_class else [(y == y, y_test == y_test)]
    out = np.empty(len(y_test))
    for rows, columns in groups:
        places = np.flatnonzero(columns)
        for where, infl in influence_blocks(member[:, rows], values[:, columns]):
            mass = np.maximum(infl, 0) if part == "positive" else np.abs(infl)
            total = mass.sum(0, dtype=np.float64)
            # H = -sum p log p = log s - sum m log m / s  for p = m / s
            with np.errstate(divide="ignore", invalid="ignore"):
                entropy = np.log(total) - xlogy(mass, mass).sum(0, dtype=np.float64) / total
            out[places[where]] = np.where(total > 0, entropy - np.log(rows.sum()), 0.0)
    return out


def buckets(score, n=5, within=None, seed=0, classes=None):
    """Equal buckets 0..n-1 by rising score [T], with ties in random order: [T]. within: [T] groups, each cut by itself.

    classes [T]: the score is first replaced by its rank in the own class, since scores of small classes are noisier."""
    order, out = np.random.default_rng(seed).permutation(len(score)), np.empty(len(score), int)
    frame = pd.DataFrame({"score": score, "group": 0 if within is None else within, "class": classes}).iloc[order]
    if classes is not None:
        of_class = frame.groupby("class").score
        frame["score"] = (of_class.rank(method="first") - 0.5) / of_class.transform("size")
    own = frame.groupby("group").score
    smallest = own.size().min()
    need(2 <= n <= smallest, f"n={n} buckets; valid are 2 to {smallest}, the size of the test part (or group)")
    out[order] = (own.rank(method="first") - 1) * n // own.transform("size")
    return out

"""Attacks that compare one number of one model with a threshold learned from known members and non-members."""

import numpy as np

from lib.attacks.membership import checked
from lib.attacks.signals import TINY, by_rows, ranking


def yeom(log_confidence, member, half) -> np.ndarray:
    """Yeom et al. (2018, adversary 2), "member if the loss is below the mean member loss": scores [M, N] float32.

    The decision is score > 0. The mean over one half of the target's members judges the other half, and vice versa. In
    logarithms, losses near zero stay distinct. half: [M, N] of 0 and 1, as from calibration_split."""
    log_confidence, member = checked(log_confidence, member)

    def attack(m):
        loss = np.maximum(-log_confidence[m].astype(np.float64), TINY)
        mean = np.array([loss[member[m] & (half[m] == h)].mean() for h in (0, 1)])
        # score = log(mean loss of the members in the other half) - log(loss)
        return np.log(mean)[1 - half[m]] - np.log(loss)

    return by_rows(attack, member.shape, np.float32)


def classwise(scores, member, y, part, own=None) -> np.ndarray:
    """Scores minus a threshold for each class (Song & Mittal 2021, section 3.2): [M, N] float32.

    The decision is score > 0. y: [N] labels; part: [M, N] integers, as from calibration_split. In each part of a
    target's examples, the threshold of best balanced accuracy is found for each class (or for all, if it lacks members
    or non-members there), and subtracted in the next part. own: [M, N], what is learned from, default `scores`."""
    scores, member = checked(scores, member)
    own, y = scores if own is None else own, np.unique(y, return_inverse=True)[1]
    n_classes, n_parts = int(y.max()) + 1, int(part.max()) + 1
    of_class, before = (n_parts * y).astype(np.uint16), np.roll(np.arange(n_parts, dtype=np.uint16), 1)

    def attack(m):
        here = part[m].astype(np.uint16)
        best = best_thresholds(own[m], member[m], of_class + here, n_parts * n_classes)
        if np.isnan(best).any():
            best = np.where(np.isnan(best), np.tile(best_thresholds(own[m], member[m], here, n_parts), n_classes), best)
        # score - threshold of its class in the part before
        return scores[m] - best.take(of_class + before.take(here))

    return by_rows(attack, member.shape, np.float32)


def best_thresholds(s, member, group, n_groups) -> np.ndarray:
    """The threshold t of best balanced accuracy for the decision s > t, in each group: [n_groups] float64.

    s, member, group (uint16): [N], of one target. NaN for a group without members or without non-members. t lies midway
    between two neighbouring scores, or is the largest score if it is best to flag nobody."""
    order = ranking(s)
    order = order[np.argsort(group[order], kind="stable")]  # by group, then by score; a radix sort on uint16
    s, kind = s[order], (2 * group + member)[order]
    n = np.bincount(kind, minlength=2 * n_groups).reshape(n_groups, 2)  # non-members, members
    # TPR - FPR of a threshold just above position k = sum_{j <= k} 1{out}/n_out - 1{in}/n_in
    gain = np.cumsum((np.array([1, -1]) / np.maximum(n, 1)).take(kind))
    gain[np.flatnonzero(s[1:] == s[:-1])] = -np.inf  # never between ties
    ends, best = np.cumsum(n.sum(1)), np.full(n_groups, np.nan)
    for g in np.flatnonzero((n > 0).all(1)):
        start, last = ends[g] - n[g].sum(), ends[g] - 1
        gain[last] = 0.0  # flags nobody
        k = start + gain[start : ends[g]].argmax()
        best[g] = s[k] if k == last else (float(s[k]) + float(s[k + 1])) / 2
    return best

"""A lower bound on epsilon from a membership attack, to hold against the accountant's upper bound.

The neighbour of a training set has one example replaced by another, as in lib.training.privacy.
"""

import numpy as np
from scipy import stats

from lib.attacks.intervals import estimate, ratio_influence_values
from lib.attacks.membership import checked, pairs


def epsilon_lower_bound(tp, fp, n_in, n_out, delta, level=0.95):
    """The largest epsilon that an attack's counts rule out at this confidence level: a float, 0 or more.

    tp of n_in members and fp of n_out non-members were flagged by a rule fixed beforehand. Each must be an independent
    trial, as when every model contributes one example. Jagielski, Ullman & Oprea 2020; Nasr et al. 2021.
    Raises ValueError naming the count, delta or level that is out of range.
    """
    _check("tp", 0 <= tp <= n_in > 0, tp, f"a count from 0 to {n_in}, the number of members, 1 or more")
    _check("fp", 0 <= fp <= n_out > 0, fp, f"a count from 0 to {n_out}, the number of non-members, 1 or more")
    _check_levels(delta, level)
    tpr, fpr = _lowest_rate(tp, n_in, level), 1 - _lowest_rate(n_out - fp, n_out, level)
    # the guarantee limits naming members and naming non-members alike
    return float(max(_implied_epsilon(tpr, fpr, delta), _implied_epsilon(1 - fpr, 1 - tpr, delta)))


def audited_epsilon(scores, member, delta, level=0.95):
    """The largest epsilon that an attack on many models rules out: a float, 0 or more (0 with fewer than four pairs).

    scores, member: [M, N]. A model's scores must not use its partner, whose half gives the target's away. The attack
    names members (highest scores) and, separately, non-members (lowest). Each threshold is the one that promises most
    on the other fold of models. The larger bound counts, and each is made at half the error (Bonferroni).

    A bound on the rates of every example also bounds their mean over examples and models, so all are pooled. But one
    model may leak more about all its examples. So each end of a rate is the more cautious of two: Clopper & Pearson's
    on the counts, right for rare events, and that of intervals.estimate, clustered by pairs of models and by examples.
    Raises ValueError for shapes that differ, or a row without members or non-members.
    """
    scores, member = checked(scores, member)
    _check_levels(delta, level)
    if len(np.unique(pairs(member))) < 4:
        return 0.0
    each = 1 - (1 - level) / 2
    return float(max(_bound(scores, member, delta, each), _bound(-scores, ~member, delta, each)))


def _bound(scores, member, delta, level):
    """The lower bound from calling the examples of the highest scores members: thresholds are cross-fitted."""
    together = pairs(member)
    fold = np.unique(together, return_inverse=True)[1] % 2
    limits = []
    for k in (0, 1):  # of 200 thresholds from either end of the ranks, the one of the best bound on this fold
        own, is_in = scores[fold == k], member[fold == k]
        ranks = np.unique(np.geomspace(1, own.size, 200).astype(int)) - 1
        candidates = np.unique(np.sort(own, axis=None)[np.append(ranks, own.size - 1 - ranks)])
        inside, outside = np.sort(own[is_in]), np.sort(own[~is_in])
        hits = len(inside) - np.searchsorted(inside, candidates, "right")
        rejected = np.searchsorted(outside, candidates, "right")
        tpr, fpr = _lowest_rate(hits, len(inside), level), 1 - _lowest_rate(rejected, len(outside), level)
        limits.append(candidates[np.argmax(_implied_epsilon(tpr, fpr, delta))])
    flagged = scores > np.array(limits)[1 - fold][:, None]
    tpr, fpr = (estimate(ratio_influence_values(flagged, who), together, level, rate=True) for who in (member, ~member))
    low = min(tpr.low, _lowest_rate(flagged[member].sum(), member.sum(), level))
    high = max(fpr.high, 1 - _lowest_rate((~flagged & ~member).sum(), (~member).sum(), level))
    return _implied_epsilon(low, high, delta)


def _lowest_rate(count, n, level):
    """Lower end of Clopper & Pearson's (1934) interval for the rate of `count` in n trials."""
    return np.where(count > 0, stats.beta.ppf((1 - level) / 2, np.maximum(count, 1), n - count + 1), 0.0)


def _implied_epsilon(tpr, fpr, delta):
    """The smallest epsilon that allows these rates, or 0."""
    # TPR <= e^eps FPR + delta
    return np.log(np.maximum((tpr - delta) / fpr, 1.0))


def _check_levels(delta, level):
    _check("delta", 0 <= delta < 1, delta, "at least 0 and below 1")
    _check("level", 0 < level < 1, level, "between 0 and 1")


def _check(name, is_valid, value, valid):
    if not is_valid:
        raise ValueError(f"{name}={value!r} is not valid: it must be {valid}")

"""Differential privacy: rules whose gradients are clipped for each example and noised, the epsilon that this gives,
and the epsilon that an attack shows to be exceeded.

Everywhere a neighbour of a half is the half with one example replaced by another (replace-one): that is what a
membership game on halves of one size compares. Under it a sum of gradients, each clipped to C, moves by up to 2 C.
"""

from functools import cache
from math import ceil, exp, floor, inf, log, log10

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq
from torch.func import vmap

from lib.attacks.intervals import checked, estimate, pairs, ratio_influence_values
from lib.training.sharpness import ascend, norm

# ---- rules, as those of sharpness.py ------------------------------------------------------------------------


def dpsgd(gradient, params, per_example, noise, clip=1.0, sigma=1.0):
    """DP-SGD: Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.

    clip: largest norm of one example's gradient; sigma: standard deviation of the noise on the sum, in units of clip.
    """
    return _private(params, per_example, _nth(noise, 0), clip, sigma)


def dpsam(gradient, params, rho, per_example, noise, clip=1.0, sigma=1.0):
    """DP-SAM: SAM with both of its gradients clipped and noised; options as in `dpsgd`.

    The two-step form that Park et al. 2023, "Differentially private sharpness-aware training", set their one-step
    DP-SAT against. Each step asks the batch two questions, and `epsilon` has to know (queries=2).
    """
    first, aux = _private(params, per_example, _nth(noise, 0), clip, sigma)
    second, _ = _private(ascend(params, first, rho), per_example, _nth(noise, 1), clip, sigma)
    return second, aux


dpsgd.queries, dpsam.queries = 1, 2


def _nth(noise, k):
    return {name: z[k] for name, z in noise.items()}


def _private(params, per_example, noise, clip, sigma):
    """(clipped and noised mean gradient, aux)."""
    _require("clip", clip, 0 < clip < inf, "finite and positive")
    _require("sigma", sigma, 0 <= sigma < inf, "finite, zero or positive")
    each, aux = per_example(params)
    # g_i <- g_i / max(1, |g_i| / C)
    weight = 1 / (vmap(norm)(each) / clip).clamp(min=1)
    # g = (sum_i g_i + sigma C N(0, 1)) / B
    return {n: (torch.tensordot(weight, g, 1) + sigma * clip * noise[n]) / len(weight) for n, g in each.items()}, aux


def _require(name, value, fine, valid):
    if not fine:
        raise ValueError(f"{name}={value!r} is not valid: {valid}")


# ---- from above: the accountant -----------------------------------------------------------------------------


@cache
def epsilon(sigma, batch_size, n, steps, delta, queries=1):
    """The epsilon, at delta, of `steps` noisy steps: float, inf without noise.

    Every step draws batch_size of the n examples without replacement, whatever was drawn before, and asks `queries`
    questions of them, each answered as in `dpsgd`. Renyi accounting by Google's dp-accounting: Wang, Balle &
    Kasiviswanathan 2019, theorem 27. Raises ValueError for numbers out of range, ImportError without dp-accounting.
    """
    _require("sigma", sigma, sigma >= 0, "zero or positive")
    _check_run(batch_size, n, steps, delta, queries)
    try:
        import dp_accounting as dp
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise ImportError("privacy accounting needs Google's dp-accounting: pip install dp-accounting") from error
    if sigma == 0:
        return inf
    # noise / sensitivity = sigma C / (2 C): the accountant's unit is the largest change, replace-one's 2 C
    answer = dp.GaussianDpEvent(sigma / 2)
    # two answers about one batch, sigma each, are one of sigma / sqrt(2): jointly they change by up to sqrt(2) 2 C
    step = dp.SampledWithoutReplacementDpEvent(n, batch_size, dp.SelfComposedDpEvent(answer, queries))
    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    return float(accountant.compose(step, steps).get_epsilon(delta))


@cache
def noise_for(target, batch_size, n, steps, delta, queries=1):
    """The smallest sigma whose epsilon is at most `target`: four significant digits, rounded up. As in `epsilon`."""
    _require("target", target, 0 < target < inf, "finite and positive")
    _check_run(batch_size, n, steps, delta, queries)

    def excess(power):
        return log(epsilon(exp(power), batch_size, n, steps, delta, queries) + 1e-9) - log(target)

    low, high = log(1e-3), log(1e4)
    _require("target", target, excess(low) > 0 > excess(high), "within reach of a sigma from 0.001 to 10000")
    sigma = exp(brentq(excess, low, high, xtol=1e-5))
    digit = 10.0 ** (floor(log10(sigma)) - 3)
    sigma = ceil(sigma / digit) * digit
    return float(f"{sigma if excess(log(sigma)) <= 0 else sigma + digit:.4g}")


def _check_run(batch_size, n, steps, delta, queries):
    _require("n", n, n >= 1, "one example or more")
    _require("batch_size", batch_size, 1 <= batch_size <= n, f"from 1 to the {n} examples")
    _require("steps", steps, steps >= 1, "one or more")
    _require("delta", delta, 0 < delta < 1, "between 0 and 1")
    _require("queries", queries, queries >= 1, "one or more a step")


# ---- from below: the audit ----------------------------------------------------------------------------------


def epsilon_lower_bound(tp, fp, n_in, n_out, delta, level=0.95):
    """The epsilon that a membership attack's counts rule out anything below, at that level: float, 0 or more.

    tp of n_in members and fp of n_out non-members flagged by a rule fixed beforehand; every one an independent trial,
    as with one example a model. Jagielski, Ullman & Oprea 2020; Nasr et al. 2021 ("Adversary instantiation").
    Raises ValueError for counts, delta or level out of range.
    """
    for name, count, n in (("tp", tp, n_in), ("fp", fp, n_out)):
        _require(name, count, n > 0 and 0 <= count <= n, f"a count of at most {n}")
    _check_levels(delta, level)
    tpr, fpr = _least(tp, n_in, level), 1 - _least(n_out - fp, n_out, level)
    return float(max(_epsilon_of(tpr, fpr, delta), _epsilon_of(1 - fpr, 1 - tpr, delta)))


def _check_levels(delta, level):
    _require("delta", delta, 0 <= delta < 1, "from 0 to below 1")
    _require("level", level, 0 < level < 1, "between 0 and 1")


def _least(count, n, level):
    """Lower end of Clopper & Pearson's (1934) interval of a rate: count of n."""
    return np.where(count > 0, stats.beta.ppf((1 - level) / 2, np.maximum(count, 1), n - count + 1), 0.0)


def _epsilon_of(tpr, fpr, delta):
    """The least epsilon that allows these rates, or 0."""
    # TPR <= e^eps FPR + delta
    return np.log(np.maximum((tpr - delta) / fpr, 1.0))


def audited_epsilon(scores, member, delta, level=0.95):
    """The epsilon that an attack on many models rules out anything below, at that level: float, 0 for a useless one.

    scores, member: [M, N], higher = more likely a member; a model's scores must not use its partner, whose half gives
    the target's away. The attack names members (highest scores) and non-members (lowest), each with the threshold
    that promises most on the other fold of models; the larger result counts, each at half the error (Bonferroni).

    What bounds the rates of every example bounds their mean over examples and models, so these are pooled. But the
    examples of one model are no independent trials: a model may be leakier for all of them. So each rate's end is the
    more cautious of two: Clopper & Pearson's on the counts, right for rare events, and that of the interval two-way
    clustered by pairs of models and examples (`metrics.estimate`). With fewer than four pairs the spread over models
    is hardly known, and the result is 0. Raises ValueError for shapes that differ, or a row without (non-)members.
    """
    scores, member = checked(scores, member)
    _check_levels(delta, level)
    if len(np.unique(pairs(member))) < 4:
        return 0.0
    each = 1 - (1 - level) / 2
    return float(max(_naming(scores, member, delta, each), _naming(-scores, ~member, delta, each)))


def _naming(scores, member, delta, level):
    """The bound of naming those of high score members."""
    together = pairs(member)
    fold = np.unique(together, return_inverse=True)[1] % 2
    limits = np.array([_best_limit(scores[fold == k], member[fold == k], delta, level) for k in (0, 1)])
    flagged = scores > limits[1 - fold][:, None]
    tpr, fpr = (
        estimate(ratio_influence_values(flagged, kind), together, level, rate=True) for kind in (member, ~member)
    )
    low = min(tpr.low, _least(flagged[member].sum(), member.sum(), level))
    high = max(fpr.high, 1 - _least((~flagged & ~member).sum(), (~member).sum(), level))
    return _epsilon_of(low, high, delta)


def _best_limit(scores, member, delta, level):
    """The threshold of the best bound on these models, among 200 from either end of the ranks."""
    ranks = np.unique(np.geomspace(1, scores.size, 200).astype(int)) - 1
    limits = np.unique(np.sort(scores, axis=None)[np.append(ranks, scores.size - 1 - ranks)])
    inside, outside = np.sort(scores[member]), np.sort(scores[~member])
    hits, rejected = len(inside) - np.searchsorted(inside, limits, "right"), np.searchsorted(outside, limits, "right")
    tpr, fpr = _least(hits, len(inside), level), 1 - _least(rejected, len(outside), level)
    return limits[np.argmax(_epsilon_of(tpr, fpr, delta))]

"""Differential privacy: rules whose gradients are clipped for each example and noised, and the epsilon that this gives.

Everywhere a neighbour of a half is the half with one example replaced by another (replace-one): that is what a
membership game on halves of one size compares. Under it a sum of gradients, each clipped to C, moves by up to 2 C.
"""

from functools import cache
from math import ceil, exp, floor, inf, log, log10

import torch
from scipy.optimize import brentq
from torch.func import vmap

from lib import need
from lib.training.sharpness import ascend, norm

# ---- rules, as those of sharpness.py ------------------------------------------------------------------------


def dpsgd(gradient, params, per_example, noise, clip=1.0, sigma=1.0):
    """DP-SGD: Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.

    clip: largest norm of one example's gradient; sigma: standard deviation of the noise on the sum, in units of clip.
    """
    return _private(params, per_example, noise, 0, clip, sigma)


def dpsam(gradient, params, rho, per_example, noise, clip=1.0, sigma=1.0):
    """DP-SAM: SAM with both of its gradients clipped and noised; options as in `dpsgd`.

    The two-step form that Park et al. 2023, "Differentially private sharpness-aware training", set their one-step
    DP-SAT against. Each step asks the batch two questions, and `epsilon` has to know (queries=2).
    """
    first, aux = _private(params, per_example, noise, 0, clip, sigma)
    second, _ = _private(ascend(params, first, rho), per_example, noise, 1, clip, sigma)
    return second, aux


dpsgd.queries, dpsam.queries = 1, 2


def _private(params, per_example, noise, k, clip, sigma):
    """(clipped mean gradient with the k-th noise, aux)."""
    _require("clip", clip, 0 < clip < inf, "finite and positive")
    _require("sigma", sigma, 0 <= sigma < inf, "finite, zero or positive")
    each, aux = per_example(params)
    # g_i <- g_i / max(1, |g_i| / C)
    weight = 1 / (vmap(norm)(each) / clip).clamp(min=1)
    # g = (sum_i g_i + sigma C N(0, 1)) / B
    return {n: (torch.tensordot(weight, g, 1) + sigma * clip * noise[n][k]) / len(weight) for n, g in each.items()}, aux


def _require(name, value, fine, valid):
    need(fine, f"{name}={value!r} is not valid: {valid}")


# ---- the accountant ----------------------------------------------------------------------------------------


ORDERS = (*range(2, 33), 40, 48, 64)  # of Renyi's divergence: every one gives a valid epsilon, and large ones take long


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
    accountant = RdpAccountant(ORDERS, neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
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

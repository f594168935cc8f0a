"""shadow"""

from typing import NamedTuple

import numpy as np

from lib.attacks.intervals import checked, partners
from lib.attacks.signals import parallel

FLOOR = 1e-12  # of a variance
TINY = 1e-40  # of a loss, an entropy or a confidence that is divided by or put into a logarithm


# ---- likelihood ratio ------------------------------------------------------------------------------------


def lira(phi, member, offline=False, variance="example", center="mean", leave=None) -> np.ndarray:
    """The likelihood-ratio attack of Carlini et al. (2022, algorithm 1): scores [M, N] float32.

    phi: [M, N], or [M, Q, N] with Q queries, over which the scores are averaged; member: [M, N] bool.
    variance: "example", every example's own (ddof 0, as in the authors' code); "pooled", the variance within
    examples, pooled over examples by residual degrees of freedom; "global", the authors' `fix_variance`,
    about the grand mean - but for OUT its own, where their code copies IN's. center: "mean", or "median" as
    in their code. offline: a one-sided z-score from OUT alone, monotone in the paper's 1 - Pr[Z > phi]
    (equation 4; their code uses a two-sided logpdf). leave: "model" leaves only the target out of its own
    statistics, "pair" its complementary partner too; None: "pair" where the models are complementary.
    Raises ValueError if an example has too few IN or OUT models left.
    """
    if variance not in ("example", "pooled", "global"):
        raise ValueError(f"variance: {variance!r}; valid are 'example', 'pooled' and 'global'")
    if center not in ("mean", "median"):
        raise ValueError(f"center: {center!r}; valid are 'mean' and 'median'")
    return _averaged(lambda x: _lira(x, member, [(offline, variance)], center, leave)[0], phi)


def _averaged(attack, *inputs):
    """attack(*inputs) for inputs [M, N]; for [M, Q, N] the mean over the queries of attack's scores."""
    if inputs[0].ndim == 2:
        return attack(*inputs)
    queries = range(inputs[0].shape[1])
    return sum(np.asarray(attack(*(x[:, q] for x in inputs))) for q in queries) / np.float32(len(queries))


def _lira(x, member, kinds, center="mean", leave=None):
    """One array of scores per (offline, variance) in kinds, all from the same statistics."""
    x, member = checked(x, member)
    partner, online = _partner(member, leave), not all(offline for offline, _ in kinds)
    _enough(member, 2 if any(v == "example" for _, v in kinds) else 1, online)
    sides = {side: _statistics(x, member == side, center) for side in ((False, True) if online else (False,))}
    scores = [np.empty(x.shape, np.float32) for _ in kinds]

    def row(m):
        left = {side: _leave_out(s, x, member == side, m, partner) for side, s in sides.items()}
        for out, (offline, variance) in zip(scores, kinds, strict=True):
            var = left[False].var(variance)
            # z = (phi - mu_out) / s_out
            z = (x[m] - left[False].mu) / np.sqrt(var)
            if not offline:
                var_in = left[True].var(variance)
                # log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out)
                z = 0.5 * (z**2 - (x[m] - left[True].mu) ** 2 / var_in + np.log(var / var_in))
            out[m] = z

    parallel(row, range(len(x)))
    return scores


# ---- relative likelihood ---------------------------------------------------------------------------------


def rmia(confidence, member, population=None, offline=False, gamma=1.0, a=0.3, leave=None) -> np.ndarray:
    """The robust attack of Zarifzadeh, Liu & Shokri (2024, algorithm 1): scores [M, N] float32 in [0, 1].

    confidence: [M, N], or [M, Q, N] with Q queries, over which the scores are averaged; population: [M, T] or
    [M, Q, T], the confidences on examples that no model trained on. None: the pool's own examples take their
    place (their membership in the target is not used). gamma: the ratio to exceed; a: the offline line
    mean_in = a mean_out + 1 - a. leave: as in `lira`. Scores are multiples of 1/T (or 1/N): they tie. The paper's
    gamma = 2 goes with its Taylor softmax; on plain confidences near 1 it would leave a few dozen distinct scores
    and decide by ties who leaks more. 1, as in the authors' privacy_meter, keeps the order of the ratios.
    Raises ValueError if an example has too few IN or OUT models left, or for gamma <= 0 or a outside [0, 1].
    """
    if gamma <= 0 or not 0 <= a <= 1:
        raise ValueError(f"gamma, a: {gamma}, {a}; valid are gamma > 0 and 0 <= a <= 1")
    if population is None:
        return _averaged(lambda p: _rmia(p, None, member, offline, gamma, a, leave), confidence)
    if population.shape[:-1] != confidence.shape[:-1]:
        raise ValueError(f"population: shape {population.shape}; valid is {(*confidence.shape[:-1], 'T')}")
    return _averaged(lambda p, z: _rmia(p, z, member, offline, gamma, a, leave), confidence, population)


def _rmia(p, z, member, offline, gamma, a, leave):
    p, member = checked(p, member)
    partner = _partner(member, leave)
    _enough(member, 1, not offline)
    sides = {side: _statistics(p, member == side, None) for side in ((False,) if offline else (False, True))}
    z_sum, scores = None if z is None else z.sum(0, dtype=np.float64), np.empty(p.shape, np.float32)

    def row(m):
        mu = [_leave_out(s, p, member == side, m, partner).mu for side, s in sides.items()]
        # ratio_x = Pr(x | target) / Pr(x)
        ratio = p[m] / np.maximum(_marginal(mu, offline, a), TINY)
        order = np.argsort(ratio)
        ratio_z = ratio[order]
        if z is not None:
            left = [m] if partner is None else [m, partner[m]]
            mu_z = (z_sum - z[left].sum(0, dtype=np.float64)) / (len(p) - len(left))
            ratio_z = np.sort(z[m] / np.maximum(_marginal([mu_z], offline, a), TINY))
        # score(x) = share of z with ratio_x / ratio_z >= gamma, by ten times faster sorted queries
        scores[m, order] = np.searchsorted(ratio_z, ratio[order] / gamma, side="right") / len(ratio_z)

    parallel(row, range(len(p)))
    return scores


def _marginal(mu, offline, a):
    """Pr(x) from the mean confidences of the shadows, [OUT] or [OUT, IN]."""
    # offline: Pr(x) = ((1 + a) mean_out + (1 - a)) / 2;  online: Pr(x) = (mean_in + mean_out) / 2
    return ((1 + a) * mu[0] + (1 - a)) / 2 if offline else sum(mu) / len(mu)


# ---- statistics of the shadows, the target left out ------------------------------------------------------


class _Side(NamedTuple):
    """The IN (or OUT) models of every example."""

    n: np.ndarray  # [N] how many
    mean: np.ndarray  # [N]
    ss: np.ndarray | None  # [N] sum of squares about the mean
    middle: np.ndarray | None  # [4, N] the order statistics that a leave-one-out median can need


class _Left(NamedTuple):
    """The same after leaving one out: mu is the mean or the median, `mean` always the mean."""

    n: np.ndarray
    mean: np.ndarray
    ss: np.ndarray | None
    mu: np.ndarray

    def var(self, kind):
        if kind == "example":
            return np.maximum(self.ss / self.n, FLOOR)
        if kind == "pooled":
            if (self.n == 1).all():
                raise ValueError("member: too few n_models: one IN or OUT each is left, pooled needs 2")
            return max(self.ss.sum() / (self.n - 1).sum(), FLOOR)
        grand = np.average(self.mean, weights=self.n)
        return max((self.ss + self.n * (self.mean - grand) ** 2).sum() / self.n.sum(), FLOOR)


def _statistics(x, mask, center):
    """The _Side of x [M, N] where mask; without a sum of squares if center is None."""
    n, total, ss = mask.sum(0), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for row, chosen in zip(x, mask, strict=True):  # float64 sums without a float64 copy
        total += np.where(chosen, row, 0.0)
    mean = total / np.maximum(n, 1)
    if center is None:
        return _Side(n, mean, None, None)
    for row, chosen in zip(x, mask, strict=True):
        ss += np.where(chosen, row - mean, 0.0) ** 2
    if center == "mean":
        return _Side(n, mean, ss, None)
    ranks = np.clip(np.stack([n - 2, n - 1, n, n + 1]) // 2, 0, len(x) - 1)
    return _Side(n, mean, ss, np.take_along_axis(np.sort(np.where(mask, x, np.inf), axis=0), ranks, axis=0))


def _leave_out(side, x, mask, m, partner):
    """One side's statistics for target m: at most one value goes, the target's or its partner's."""
    gone, value = mask[m], x[m]
    if partner is not None:
        gone, value = True, np.where(mask[m], x[m], x[partner[m]])
    n = side.n - gone
    u = np.where(gone, value - side.mean, 0.0)
    # without u, the mean is lower by u / (n - 1) and the sum of squares by u^2 n / (n - 1)
    mean, ss = side.mean - u / n, None if side.ss is None else side.ss - u**2 * (1 + 1 / n)
    return _Left(n, mean, ss, mean if side.middle is None else _median(side.middle, value, gone))


def _median(middle, value, gone):
    """Median without `value` where it is gone: the order statistics above it move down by one."""
    below, low, high, above = middle
    shorter = np.where(value > below, below, high) + np.where(value > low, low, above)
    return np.where(gone, shorter, low + high) / 2


def _partner(member, leave):
    """The model to leave out together with each target, [M], or None."""
    found = partners(member)
    if leave not in (None, "pair", "model") or (leave == "pair" and found is None):
        raise ValueError(f"leave: {leave!r}; valid are None, 'model' and, for complementary models, 'pair'")
    return None if leave == "model" else found


def _enough(member, least, online):
    """At least `least` OUT (and IN) models must remain for every example when one is left out."""
    n_in, n = member.sum(0), len(member)
    short = (n - n_in <= least) | (online & (n_in <= least))
    if short.any():
        i = int(np.flatnonzero(short)[0])
        where = {0: "none", n: "all"}.get(int(n_in[i]), str(n_in[i]))
        sides = "IN and OUT" if online else "OUT"
        raise ValueError(
            f"member: example {i} is in {where} of n_models = {n}; valid are at least "
            f"{least + 1} {sides} for every example (n_models >= {2 * least + 2} in halves)"
        )

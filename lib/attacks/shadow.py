"""Attacks with shadow models: LiRA and RMIA.

Each model is in turn the target, and all the others are its shadows: for every example, some trained on it (IN) and
some did not (OUT). Where models are complementary pairs, the target's partner is left out as well: otherwise the number
of IN models would give away the target's own membership, and a model that leaks nothing would not have AUC 1/2."""

import numpy as np
from scipy.special import digamma, gammaln, polygamma

from lib.attacks.membership import checked, partners
from lib.attacks.signals import TINY, parallel, ranking, ties

FLOOR = 1e-12  # smallest variance that we divide by
BLOCK = 1024  # examples at a time: their values stay in the processor's cache


def lira(phi, member, offline=False, variance="example") -> np.ndarray:
    """The likelihood-ratio attack of Carlini et al. (2022, algorithm 1): scores [M, N] float32.

    phi: [M, N], or [M, Q, N] for Q queries, whose scores are averaged. offline: use the OUT models only and return a
    z-score, which orders examples as the paper's 1 - Pr[Z > phi] does (equation 4). variance: one of VARIANCES."""
    return liras(phi, member, [(offline, variance)])[0]


def liras(phi, member, kinds) -> list[np.ndarray]:
    """`lira` for several kinds (offline, variance) at once: the statistics of the shadow models are computed once."""
    if np.ndim(phi) == 3:
        total = liras(phi[:, 0], member, kinds)
        for q in range(1, phi.shape[1]):
            total = [a + b for a, b in zip(total, liras(phi[:, q], member, kinds), strict=True)]
        return [scores / phi.shape[1] for scores in total]
    phi, inside = checked(phi, member)
    online = not all(offline for offline, _ in kinds)
    require_shadows(inside, 2, online)
    sides = [(chosen, statistics(phi, chosen)) for chosen in [~inside, inside][: 1 + online]]  # OUT, and online IN
    scores = [np.empty(phi.shape, np.float32) for _ in kinds]

    def attack(targets):
        found = [without(side, phi, chosen, targets) for chosen, side in sides]
        # of each variance, for OUT and IN: how far phi is from the mean, sigma^2, degrees of freedom
        spread = {v: [(phi[targets] - side[1], *VARIANCES[v](*side)) for side in found] for v in {v for _, v in kinds}}
        for out, (offline, variance) in zip(scores, kinds, strict=True):
            if offline:
                # z = (phi - mu_out) / sigma_out
                out[targets] = z_score(*spread[variance][0])
            else:
                # log Lambda = log p(phi | IN) - log p(phi | OUT)
                out[targets] = log_density(*spread[variance][1]) - log_density(*spread[variance][0])

    parallel(attack, left_out_together(inside))
    return scores


def log_density(u, variance, freedom):
    """Log density [m, N] of Student's t (normal if freedom is inf) at u [m, N] from its centre, + log(2 pi) / 2."""
    scale = np.maximum(variance, FLOOR)
    if np.all(freedom == np.inf):
        return -(u**2 / scale + np.log(scale)) / 2
    # log t = lgamma((v+1)/2) - lgamma(v/2) - log(v sigma^2 / 2) / 2 - (v+1)/2 log(1 + u^2 / (v sigma^2))
    constant = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - np.log(freedom / 2) / 2
    return constant - np.log(scale) / 2 - (freedom + 1) / 2 * np.log1p(u**2 / (freedom * scale))


def z_score(u, variance, freedom):
    """u / sigma [m, N]; for Student's t the normal deviate of about the same tail (Wallace 1959)."""
    z = u / np.sqrt(np.maximum(variance, FLOOR))
    if np.all(freedom == np.inf):
        return z
    return np.copysign((8 * freedom + 1) / (8 * freedom + 3) * np.sqrt(freedom * np.log1p(z**2 / freedom)), z)


def shrunk(n, mean, squares):
    """The scale^2 and degrees of freedom of Student's t for a new output of each example: [N], and [N] or a number.

    Each example's variance s^2 is drawn towards a common one, s0^2, which weighs as much as d0 degrees of freedom."""
    n = n[0] if (n == n[0]).all() else n  # a number is faster
    d, (d0, common) = n - 1, prior(n, squares)
    d0 = min(d0, 1e9)  # so many are normal
    # scale^2 = (d0 s0^2 + d s^2) / (d0 + d) (1 + 1/n): the mean is an estimate, too
    return (d0 * common + squares) / (d0 + d) * (1 + 1 / n), d0 + d


def prior(n, squares) -> tuple[float, float]:
    """(d0, s0^2): the variances of the examples are about s0^2 d0 / chi^2(d0) (Smyth 2004, section 6.2).

    n: [N], or one number; squares: [N] sums of squared deviations. If the examples' variances differ no more than
    estimates do, d0 is inf and s0^2 the variance pooled over all examples."""
    d, own = n - 1, squares / (n - 1)
    # e = log s^2 - psi(d/2) + log(d/2); variances near 0 count as 1e-5 of the median, as in the author's limma
    e = np.log(np.maximum(own, max(1e-5 * np.median(own), FLOOR))) - digamma(d / 2) + np.log(d / 2)
    # psi'(d0/2) = var(e) - psi'(d/2)
    wanted = e.var() - np.mean(polygamma(1, d / 2))
    if wanted <= 0:
        return np.inf, float(squares.sum() / (d + np.zeros(len(squares))).sum())
    half, now = 0.5 + 1 / wanted, np.inf
    while abs(now / wanted - 1) > 1e-9:  # Newton's method on 1 / psi', which is nearly linear and convex
        now = polygamma(1, half)
        half += now * (1 - now / wanted) / polygamma(2, half)
    # s0^2 = exp(mean(e) + psi(d0/2) - log(d0/2))
    return float(2 * half), float(np.exp(e.mean() + digamma(half) - np.log(half)))


# (sigma^2, degrees of freedom) of the IN (or OUT) shadows of each example, from n, mean and squares (`statistics`)
VARIANCES = {
    # each example's own, without Bessel's correction, as in the authors' code
    "example": lambda n, mean, squares: (squares / n, np.inf),
    # one for all examples: the squares within examples over their degrees of freedom
    "pooled": lambda n, mean, squares: (squares.sum() / (n - 1).sum(), np.inf),
    "shrunk": shrunk,  # between the two, by as much as the examples' variances differ
}


def rmia(confidence, member, population=None, offline=False, gamma=1.0, a=0.3) -> np.ndarray:
    """The robust attack of Zarifzadeh, Liu & Shokri (2024, algorithm 1): scores [M, N] float32 in [0, 1].

    confidence: [M, N], or [M, Q, N] for Q queries, whose scores are averaged; population: [M, T] or [M, Q, T],
    confidences on examples that no model trained on; without it the pool's own take their place. offline: use the OUT
    models only and estimate the mean of IN by a mean_out + 1 - a. gamma: the ratio to exceed. The paper uses 2, with a
    Taylor softmax. With 2 and plain confidences near 1, nearly all scores would be equal; the default is that of the
    authors' privacy_meter."""
    if np.ndim(confidence) == 3:
        each = [None if population is None else population[:, q] for q in range(confidence.shape[1])]
        return sum(rmia(confidence[:, q], member, z, offline, gamma, a) for q, z in enumerate(each)) / len(each)
    p, inside = checked(confidence, member)
    require_shadows(inside, 1, not offline)
    outside = ~inside
    all_in, all_out = None if offline else statistics(p, inside), statistics(p, outside)
    total_z = None if population is None else population.sum(0, dtype=np.float64)
    scores = np.empty(p.shape, np.float32)

    def ratio(target, mean_out, mean_in):  # Pr(x | target) / Pr(x), with Pr(x) = (mean_in + mean_out) / 2
        return target / np.maximum((mean_in + mean_out) / 2, TINY)

    def attack(targets):
        mean_out = without(all_out, p, outside, targets)[1]
        mean_in = a * mean_out + 1 - a if offline else without(all_in, p, inside, targets)[1]
        if population is not None:
            # no model trained on z, so online its mean_in is unknown and Pr(z) is the mean of all shadows
            mean_z = (total_z - population[targets].sum(0, dtype=np.float64)) / (len(p) - len(targets))
        for m in targets:
            ratio_x = ratio(p[m], mean_out, mean_in)
            order = ranking(ratio_x)
            own = ratio_z = ratio_x[order]
            if population is not None:
                ratio_z = np.sort(ratio(population[m], mean_z, a * mean_z + 1 - a if offline else mean_z))
            # score(x) = share of z with ratio_x / ratio_z >= gamma; sorted queries are ten times faster, ties thirty
            n_z = ties(own)[1] if ratio_z is own and gamma == 1 else np.searchsorted(ratio_z, own / gamma, "right")
            scores[m, order] = n_z / len(ratio_z)

    parallel(attack, left_out_together(inside))
    return scores


def left_out_together(member) -> list[np.ndarray]:
    """Targets with the same shadows, as arrays of indices: each set is attacked by all the models outside of it."""
    partner, own = partners(member), np.arange(len(member))
    return list(own[:, None] if partner is None else np.stack([own, partner], 1)[own < partner])


def require_shadows(member, least, online=True):
    """Raise ValueError unless `least` OUT (and, online, IN) models remain for every example when one is left out."""
    n_in, n, sides = member.sum(0), len(member), "IN and OUT" if online else "OUT"
    valid = f"at least {least + 1} {sides} models for every example (n_models >= {2 * least + 2} in halves)"
    for i in np.flatnonzero((n - n_in <= least) | (online & (n_in <= least))):
        raise ValueError(f"member: example {i} is in {n_in[i]} of n_models = {n}; valid are {valid}")


def statistics(x, chosen):
    """Number, mean and sum of squared deviations of the chosen values of each example, each [N]. x, chosen: [M, N]."""
    n, mean, squares = chosen.sum(0, dtype=np.int32), np.empty(x.shape[1]), np.empty(x.shape[1])

    def of_block(start):
        of = slice(start, start + BLOCK)
        values, here = x[:, of], chosen[:, of]
        mean[of] = (values * here).sum(0, dtype=np.float64) / np.maximum(n[of], 1)
        squares[of] = np.square((values - mean[of]) * here).sum(0)

    parallel(of_block, range(0, len(n), BLOCK))
    return n, mean, squares


def without(side, x, chosen, models):
    """The same statistics without some models, of which at most one is chosen for any example (a target, or a pair)."""
    n, mean, squares = side
    n = n - chosen[models].sum(0)
    u = ((x[models] - mean) * chosen[models]).sum(0)
    # without a value that lies u from the mean, the mean is lower by u / n and the squares by u^2 (1 + 1/n)
    return n, mean - u / n, squares - u**2 * (1 + 1 / n)

"""Attacks with shadow models: LiRA and RMIA.

Each model is in turn the target, and all the others are its shadows. For every example, the shadows that trained on it
(IN) and those that did not (OUT) show what the target's output would look like in either case.

Where models are complementary pairs, the target's partner is left out as well: otherwise the number of IN models among
the rest would give away the target's own membership. So an attack on a model that leaks nothing has AUC 1/2 exactly.
"""

import numpy as np

from lib import need
from lib.attacks.membership import checked, partners
from lib.attacks.signals import TINY, parallel

FLOOR = 1e-12  # smallest variance that we divide by

# sigma^2 of the IN (or OUT) shadows of each example, from n, mean and squares (see `statistics`), each [N]
VARIANCES = {
    # an own variance for each example, without Bessel's correction, as in the authors' code
    "example": lambda n, mean, squares: squares / n,
    # one variance for all examples: the squares within examples over their degrees of freedom
    "pooled": lambda n, mean, squares: squares.sum() / (n - 1).sum(),
}


def lira(phi, member, offline=False, variance="example", leave=None) -> np.ndarray:
    """The likelihood-ratio attack of Carlini et al. (2022, algorithm 1): scores [M, N] float32.

    phi: [M, N], or [M, Q, N] for Q queries, whose scores are averaged; member: [M, N] bool. offline: use the OUT
    models only and return a z-score, which orders examples as the paper's 1 - Pr[Z > phi] does (equation 4; their
    code has a two-sided density). variance: one of VARIANCES. leave: "pair" leaves out the target and its partner,
    "model" the target only; None is "pair" where the models are complementary, else "model". Raises ValueError if
    an example would have fewer than 2 OUT (or IN) shadows.
    """
    return liras(phi, member, [(offline, variance)], leave)[0]


def liras(phi, member, kinds, leave=None) -> list[np.ndarray]:
    """`lira` for several kinds, pairs (offline, variance), from the same means: a list of scores [M, N]."""
    if np.ndim(phi) == 3:
        return mean_over(liras(phi[:, q], member, kinds, leave) for q in range(phi.shape[1]))
    for _, variance in kinds:
        need(variance in VARIANCES, f"variance: {variance!r}; valid are {', '.join(map(repr, VARIANCES))}")
    phi, inside = checked(phi, member)
    online = not all(offline for offline, _ in kinds)
    require_shadows(inside, 2, online)
    sides = [(chosen, statistics(phi, chosen)) for chosen in (~inside, inside)[: 1 + online]]
    scores = [np.empty(phi.shape, np.float32) for _ in kinds]

    def attack(targets):
        out, *rest = (without(side, phi, chosen, targets) for chosen, side in sides)
        for (offline, variance), score in zip(kinds, scores, strict=True):
            var_out = np.maximum(VARIANCES[variance](*out), FLOOR)
            if offline:
                # z = (phi - mu_out) / sigma_out
                score[targets] = (phi[targets] - out[1]) / np.sqrt(var_out)
            else:
                var_in = np.maximum(VARIANCES[variance](*rest[0]), FLOOR)
                # log Lambda = log N(phi; mu_in, sigma_in^2) - log N(phi; mu_out, sigma_out^2)
                score[targets] = log_normal(phi[targets], rest[0][1], var_in) - log_normal(
                    phi[targets], out[1], var_out
                )

    parallel(attack, left_out_together(inside, leave))
    return scores


def log_normal(x, mean, variance):  # up to a constant
    return -((x - mean) ** 2 / variance + np.log(variance)) / 2


def rmia(confidence, member, population=None, offline=False, gamma=1.0, a=0.3, leave=None) -> np.ndarray:
    """The robust attack of Zarifzadeh, Liu & Shokri (2024, algorithm 1): scores [M, N] float32 in [0, 1].

    confidence: [M, N], or [M, Q, N] for Q queries, whose scores are averaged; population: [M, T] or [M, Q, T],
    confidences on examples that no model trained on; without it the pool's own examples take its place (their
    membership in the target is not used). offline: use the OUT models only and estimate the mean of IN by the line
    a mean_out + 1 - a. leave: as in `lira`. gamma: the ratio to exceed. The paper uses 2, with a Taylor softmax. On
    plain confidences near 1, 2 would leave a few dozen distinct scores, and ties would decide who leaks more; 1, as in
    the authors' privacy_meter, keeps the order of the ratios. Scores are multiples of 1/T (or 1/N), so they can tie.
    Raises ValueError if an example would have no OUT (or IN) shadow, and for gamma <= 0 or a outside [0, 1].
    """
    need(gamma > 0 and 0 <= a <= 1, f"gamma, a: {gamma}, {a}; valid are gamma > 0 and 0 <= a <= 1")
    fits = population is None or population.shape[:-1] == confidence.shape[:-1]
    need(fits, f"population: shape {np.shape(population)}; valid is {(*confidence.shape[:-1], 'T')}")
    if np.ndim(confidence) == 3:
        each = [None if population is None else population[:, q] for q in range(confidence.shape[1])]
        found = ([rmia(confidence[:, q], member, z, offline, gamma, a, leave)] for q, z in enumerate(each))
        return mean_over(found)[0]
    p, inside = checked(confidence, member)
    outside = ~inside
    require_shadows(inside, 1, not offline)
    all_in, all_out = statistics(p, inside), statistics(p, outside)
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
            order = np.argsort(ratio_x)
            ratio_z = ratio_x[order]
            if population is not None:
                ratio_z = np.sort(ratio(population[m], mean_z, a * mean_z + 1 - a if offline else mean_z))
            # score(x) = share of the z with ratio_x / ratio_z >= gamma; sorted queries are ten times faster
            scores[m, order] = np.searchsorted(ratio_z, ratio_x[order] / gamma, side="right") / len(ratio_z)

    parallel(attack, left_out_together(inside, leave))
    return scores


def mean_over(queries):
    """The mean of several lists of arrays, entry by entry: a list of arrays."""
    total, count = None, 0
    for found in queries:
        total, count = found if total is None else list(map(np.add, total, found)), count + 1
    return [scores / count for scores in total]


def left_out_together(member, leave) -> list[np.ndarray]:
    """Targets with the same shadows, as arrays of indices: each set is attacked by all the models outside of it."""
    partner, own = partners(member), np.arange(len(member))
    fine = leave in (None, "model") or leave == "pair" and partner is not None
    need(fine, f"leave: {leave!r}; valid are None, 'model' and, for complementary models, 'pair'")
    if partner is None or leave == "model":
        return list(own[:, None])
    return list(np.stack([own, partner], 1)[own < partner])


def require_shadows(member, least, online=True):
    """Raise ValueError unless `least` OUT (and, online, IN) models remain for every example when one is left out."""
    n_in, n = member.sum(0), len(member)
    short = (n - n_in <= least) | (online & (n_in <= least))
    for i in np.flatnonzero(short)[:1]:
        valid = f"at least {least + 1} {'IN and OUT' if online else 'OUT'} models for every example"
        found = f"example {i} is in {n_in[i]} of n_models = {n}"
        raise ValueError(f"member: {found}; valid are {valid} (n_models >= {2 * least + 2} in halves)")


def statistics(x, chosen):
    """Number, mean and sum of squared deviations of the chosen values of each example, each [N]. x, chosen: [M, N]."""
    n, mean, squares = chosen.sum(0), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for row, here in zip(x, chosen, strict=True):
        mean += row * here
    mean /= np.maximum(n, 1)
    for row, here in zip(x, chosen, strict=True):
        squares += ((row - mean) * here) ** 2
    return n, mean, squares


def without(side, x, chosen, models):
    """The same statistics without some models, of which at most one is chosen for any example (a target, or a pair)."""
    n, mean, squares = side
    n = n - chosen[models].sum(0)
    u = ((x[models] - mean) * chosen[models]).sum(0)
    # without a value that lies u from the mean, the mean is lower by u / n and the squares by u^2 (1 + 1/n)
    return n, mean - u / n, squares - u**2 * (1 + 1 / n)

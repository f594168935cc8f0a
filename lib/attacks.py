"""Membership inference: from the signals of M models to scores [M, N], higher = more likely a member.

Every model is in turn the target and the others are its shadows. `member` [M, N] bool says who trained on
what. Where models 2k and 2k+1 train on complementary halves, the target's partner is left out together with
the target (`leave="pair"`): every example is in exactly half of all the models, so among the other M - 1 the
*count* of members already gives the target's membership away, and leave-one-out statistics are worse on one
side than on the other. Leaving the pair out makes the null exact: without a leak, LiRA and RMIA have AUC 1/2.
"""

from typing import NamedTuple

import numpy as np

from lib.metrics import best_thresholds, halves
from lib.signals import parallel, signals

NAMES = ("gap", "loss", "confidence", "confidence_classwise", "entropy", "entropy_classwise",
         "m_entropy", "m_entropy_classwise", "lira", "lira_pooled", "lira_offline", "lira_offline_pooled",
         "rmia", "rmia_offline")
FIXED = ("gap", "loss", "confidence_classwise", "entropy_classwise", "m_entropy_classwise")  # decision: score > 0
FLOOR = 1e-12  # of a variance
TINY = 1e-40  # of a loss or an entropy before its logarithm


# ---- all attacks -----------------------------------------------------------------------------------------

def run(logits, y, member, population_logits=None, population_y=None, gamma=2.0, a=0.3, seed=0):
    """All attacks in NAMES on one ensemble: a dict name -> scores [M, N] float32.

    logits: [M, N, C], or [M, Q, N, C] with Q queries (augmentations) of which the first is the plain input;
    LiRA and RMIA average over the queries, the others see the first. y: [N] labels; member: [M, N] bool.
    population_logits [M, T, C] or [M, Q, T, C] with population_y [T]: examples that no model trained on, for
    RMIA; without them RMIA compares with the pool itself. gamma, a: RMIA's. seed: of the halves on which
    classwise and loss thresholds are learned. Raises ValueError, naming the argument, where they do not fit.
    """
    if np.ndim(logits) not in (3, 4):
        raise ValueError(f"logits: shape {np.shape(logits)}; valid are [M, N, C] and [M, Q, N, C]")
    if (population_logits is None) != (population_y is None):
        raise ValueError("population_y: population_logits and population_y are given together or not at all")
    plain = signals(logits if np.ndim(logits) == 3 else logits[:, 0], y)
    phi, confidence = plain["phi"], plain["confidence"]
    _checked(phi, member)
    if np.ndim(logits) == 4:
        phi, confidence = signals(logits, y, only=("phi", "confidence")).values()
    population = None
    if population_logits is not None:
        population = signals(population_logits, population_y, only=("confidence",))["confidence"]
    out = {**_threshold_attacks(plain, member, y, seed), **_lira_family(phi, member)}
    out["rmia"] = rmia(confidence, member, population, gamma=gamma, a=a)
    out["rmia_offline"] = rmia(confidence, member, population, offline=True, gamma=gamma, a=a)
    return {name: out[name] for name in NAMES}


def _threshold_attacks(plain, member, y, seed):
    """Scores of the attacks that look at one model only (Yeom et al. 2018; Song & Mittal 2021)."""
    out = {"gap": plain["correct"].astype(np.float32), "loss": yeom(plain["log_confidence"], member, seed)}
    # -log(entropy) orders as -entropy does, but a difference to a threshold does not tie in float32
    ranked = {"confidence": plain["phi"], "entropy": _minus_log(plain["entropy"]),
              "m_entropy": _minus_log(plain["modified_entropy"])}
    for name, scores in ranked.items():
        out[name] = scores
        out[f"{name}_classwise"] = classwise(scores, member, y, seed)
    return out


def _minus_log(x):
    return -np.log(np.maximum(x, np.float32(TINY)))


# ---- thresholds on one model's output --------------------------------------------------------------------

def yeom(log_confidence, member, seed=0) -> np.ndarray:
    """Member if the loss is below the mean loss of the members: scores [M, N], decision score > 0.

    Yeom et al. 2018, adversary 2, with the mean taken over one half of the target's members and applied to
    the other half of the examples, and vice versa. The score is log(mean loss) - log(loss) rather than
    mean - loss: the same decision, and losses near zero stay distinct in float32.
    """
    _checked(log_confidence, member)
    half, scores = halves(member, seed), np.empty(member.shape, np.float32)

    def row(m):
        loss = np.maximum(-log_confidence[m].astype(np.float64), TINY)
        mean = np.array([loss[member[m] & (half[m] == h)].mean() for h in (False, True)])
        # s = log mean_{members of the other half} loss - log loss
        scores[m] = np.log(mean)[1 - half[m].astype(int)] - np.log(loss)

    parallel(row, range(len(member)))
    return scores


def classwise(scores, member, y, seed=0) -> np.ndarray:
    """Scores minus their class's threshold: [M, N] float32, decision score > 0 (Song & Mittal 2021, section 3.2).

    scores: [M, N]; y: [N] labels. Each target's members and non-members are split in two random halves
    (within classes); a class's threshold of best balanced accuracy in one half is subtracted in the other.
    A class without members or non-members in a half takes the threshold of that whole half.
    """
    _checked(scores, member)
    _, y = np.unique(y, return_inverse=True)
    half, out = halves(member, seed, y), np.empty(member.shape, np.float32)

    def row(m):
        side = half[m].astype(np.uint16)
        best = best_thresholds(scores[m], member[m], (2 * y + side).astype(np.uint16), 2 * y.max() + 2)
        if np.isnan(best).any():
            everyone = best_thresholds(scores[m], member[m], side, 2)
            best = np.where(np.isnan(best), np.tile(everyone, y.max() + 1), best)
        # s = s - t_{class, other half}
        out[m] = scores[m] - best[2 * y + 1 - side]

    parallel(row, range(len(member)))
    return out


# ---- likelihood ratio ------------------------------------------------------------------------------------

def lira(phi, member, offline=False, variance="example", center="mean", leave=None) -> np.ndarray:
    """The likelihood-ratio attack of Carlini et al. (2022, algorithm 1): scores [M, N] float32.

    phi: [M, N], or [M, Q, N] with Q queries, over which the scores are averaged; member: [M, N] bool.
    variance: "example", every example's own (ddof 0, as in the authors' code); "pooled", the variance within
    examples, pooled over examples by residual degrees of freedom; "global", the authors' `fix_variance`,
    about the grand mean - but for OUT its own, where their code copies IN's. center: "mean", or "median" as
    in their code. offline: a one-sided z-score from OUT alone, monotone in the paper's 1 - Pr[Z > phi]
    (equation 5; their code uses a two-sided logpdf). leave: "model" leaves only the target out of its own
    statistics, "pair" its complementary partner too; None: "pair" where the models are complementary.
    Raises ValueError if an example has too few IN or OUT models left.
    """
    member = _checked(phi, member)
    if variance not in ("example", "pooled", "global"):
        raise ValueError(f"variance: {variance!r}; valid are 'example', 'pooled' and 'global'")
    if center not in ("mean", "median"):
        raise ValueError(f"center: {center!r}; valid are 'mean' and 'median'")
    return _averaged(lambda x: _lira(x, member, [(offline, variance)], center, leave)[0], phi)


def _lira_family(phi, member):
    kinds = [(offline, variance) for offline in (False, True) for variance in ("example", "pooled")]
    names = ("lira", "lira_pooled", "lira_offline", "lira_offline_pooled")
    return dict(zip(names, _averaged(lambda x: _lira(x, member, kinds), phi), strict=True))


def _averaged(attack, *inputs):
    """attack(*inputs) for inputs [M, N]; for [M, Q, N] the mean over the queries of attack's scores."""
    if inputs[0].ndim == 2:
        return attack(*inputs)
    n_queries = inputs[0].shape[1]
    return sum(np.asarray(attack(*(x[:, q] for x in inputs))) for q in range(n_queries)) / np.float32(n_queries)


def _lira(x, member, kinds, center="mean", leave=None):
    """One array of scores per (offline, variance) in kinds, from the same leave-out statistics."""
    x = np.asarray(x)
    partner = _partner(member, leave)
    online = not all(offline for offline, _ in kinds)
    least = 2 if any(v == "example" for _, v in kinds) else 1
    _enough(member, least, online)
    sides = {side: _statistics(x, member == side, center) for side in ((False, True) if online else (False,))}
    scores = [np.empty(x.shape, np.float32) for _ in kinds]

    def row(m):
        left = {side: _leave_out(st, x, member == side, m, partner, center) for side, st in sides.items()}
        for out, (offline, variance) in zip(scores, kinds, strict=True):
            mu, var = left[False].mu, left[False].var(variance)
            # z = (phi - mu_out) / s_out
            z = (x[m] - mu) / np.sqrt(var)
            if offline:
                out[m] = z
            else:
                mu_in, var_in = left[True].mu, left[True].var(variance)
                # log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out)
                out[m] = 0.5 * (z**2 - (x[m] - mu_in) ** 2 / var_in + np.log(var / var_in))

    parallel(row, range(len(x)))
    return scores


# ---- relative likelihood ---------------------------------------------------------------------------------

def rmia(confidence, member, population=None, offline=False, gamma=2.0, a=0.3, leave=None) -> np.ndarray:
    """The robust attack of Zarifzadeh, Liu & Shokri (2024, algorithm 1): scores [M, N] float32 in [0, 1].

    confidence: [M, N], or [M, Q, N] with Q queries, over which the scores are averaged; population: [M, T] or
    [M, Q, T], the confidences on examples that no model trained on. None: the pool's own examples take their
    place (their membership in the target is not used). gamma: the ratio to exceed; a: the offline line
    Pr_in = a Pr_out + 1 - a (their equation 10). leave: as in `lira`. Scores are multiples of 1/T: they tie.
    Raises ValueError if an example has too few IN or OUT models left, or for gamma <= 0 or a outside [0, 1].
    """
    member = _checked(confidence, member)
    if gamma <= 0 or not 0 <= a <= 1:
        raise ValueError(f"gamma, a: {gamma}, {a}; valid are gamma > 0 and 0 <= a <= 1")
    if population is None:
        return _averaged(lambda p: _rmia(p, None, member, offline, gamma, a, leave), confidence)
    if population.shape[:-1] != confidence.shape[:-1]:
        raise ValueError(f"population: shape {population.shape}; valid is {(*confidence.shape[:-1], 'T')}")
    return _averaged(lambda p, z: _rmia(p, z, member, offline, gamma, a, leave), confidence, population)


def _rmia(p, z, member, offline, gamma, a, leave):
    p, partner = np.asarray(p), _partner(member, leave)
    _enough(member, 1, not offline)
    sides = {side: _statistics(p, member == side, "mean") for side in ((False,) if offline else (False, True))}
    z_sum = None if z is None else z.sum(0, dtype=np.float64)
    scores = np.empty(p.shape, np.float32)

    def row(m):
        mu = [_leave_out(st, p, member == side, m, partner).mu for side, st in sides.items()]
        # ratio_x = Pr(x | target) / Pr(x)
        ratio = p[m] / np.maximum(_marginal(mu, offline, a), TINY)
        order = np.argsort(ratio)
        if z is None:
            ratio_z = ratio[order]
        else:
            left = [m] if partner is None else [m, partner[m]]
            mu_z = (z_sum - z[left].sum(0, dtype=np.float64)) / (len(p) - len(left))
            ratio_z = np.sort(z[m] / np.maximum(_marginal([mu_z], offline, a), TINY))
        # score(x) = share of z with ratio_x / ratio_z >= gamma; sorted queries make the search ten times faster
        count = np.searchsorted(ratio_z, ratio[order] / gamma, side="right")
        scores[m, order] = count / len(ratio_z)

    parallel(row, range(len(p)))
    return scores


def _marginal(mu, offline, a):
    """Pr(x) from the mean confidences of the shadows, [OUT] or [OUT, IN]."""
    if offline:
        # Pr(x) = ((1 + a) mean_out + (1 - a)) / 2
        return ((1 + a) * mu[0] + (1 - a)) / 2
    # Pr(x) = (mean_in + mean_out) / 2
    return sum(mu) / len(mu)


# ---- statistics of the shadows, the target left out ------------------------------------------------------

class _Side(NamedTuple):
    """The IN (or OUT) models of every example."""

    n: np.ndarray  # [N] how many
    mean: np.ndarray  # [N]
    ss: np.ndarray  # [N] sum of squares about the mean
    grand: float  # mean of all values
    middle: np.ndarray | None  # [4, N] the order statistics that a leave-one-out median can need


class _Left(NamedTuple):
    """The same models without those left out for one target."""

    n: np.ndarray
    mu: np.ndarray
    ss: np.ndarray
    everything: float  # variance of all values about their mean

    def var(self, kind):
        if kind == "global":
            return max(self.everything, FLOOR)
        if kind == "pooled":
            return max(self.ss.sum() / (self.n - 1).sum(), FLOOR)
        return np.maximum(self.ss / self.n, FLOOR)


def _statistics(x, mask, center):
    n, total, ss = mask.sum(0), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for row, chosen in zip(x, mask, strict=True):  # row by row: float64 sums of float32 without a float64 copy
        total += np.where(chosen, row, 0.0)
    mean = total / np.maximum(n, 1)
    for row, chosen in zip(x, mask, strict=True):
        ss += np.where(chosen, row - mean, 0.0) ** 2
    middle = None
    if center == "median":
        ordered = np.sort(np.where(mask, x, np.inf), axis=0)
        ranks = np.stack([n - 2, n - 1, n, n + 1]) // 2
        middle = np.take_along_axis(ordered, np.clip(ranks, 0, len(x) - 1), axis=0)
    return _Side(n, mean, ss, total.sum() / n.sum(), middle)


def _leave_out(side, x, mask, m, partner, center="mean"):
    """The statistics of one side for target m: at most one value goes per example, the target's or its partner's."""
    gone, value = mask[m], x[m]
    if partner is not None:
        gone, value = True, np.where(mask[m], x[m], x[partner[m]])
    n = side.n - gone
    u = np.where(gone, value - side.mean, 0.0)
    # sum of squares without u: SS - u^2 - u^2 / (n - 1);  mean without u: mean - u / (n - 1)
    ss = side.ss - u**2 * (1 + 1 / n)
    mu = side.mean - u / n if center == "mean" else _median(side.middle, value, gone)
    u = np.where(gone, value - side.grand, 0.0)
    everything = side.ss.sum() + (side.n * (side.mean - side.grand) ** 2).sum() - (u**2).sum()
    return _Left(n, mu, ss, everything / n.sum() - (u.sum() / n.sum()) ** 2)


def _median(middle, value, gone):
    """Median of the values without `value` where it is gone: order statistics above it move down by one."""
    below, low, high, above = middle
    first = np.where(value > below, below, high)
    second = np.where(value > low, low, above)
    return np.where(gone, first + second, low + high) / 2


# ---- checks ----------------------------------------------------------------------------------------------

def _partner(member, leave):
    """The model to leave out together with each target, [M], or None."""
    paired = len(member) % 2 == 0 and (member[0::2] != member[1::2]).all()
    if leave not in (None, "pair", "model") or (leave == "pair" and not paired):
        raise ValueError(f"leave: {leave!r}; valid are 'model', None and, for complementary models only, 'pair'")
    return np.arange(len(member)) ^ 1 if paired and leave != "model" else None


def _enough(member, least, online):
    """At least `least` OUT (and IN) models must remain for every example when one is left out."""
    n_in, n = member.sum(0), len(member)
    short = (n - n_in <= least) | (online & (n_in <= least))
    if short.any():
        i = int(np.flatnonzero(short)[0])
        where = {0: "none", n: "all"}.get(int(n_in[i]), str(n_in[i]))
        raise ValueError(f"member: example {i} is in {where} of n_models = {n}; valid are at least {least + 1} models "
                         f"without {'and as many with ' if online else ''}every example "
                         f"({2 * least + 2} models, in complementary pairs)")


def _checked(x, member):
    member = np.asarray(member)
    if member.dtype != bool or member.ndim != 2 or member.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(f"member: {member.dtype} of shape {member.shape}; valid is bool [M, N] = "
                         f"[{x.shape[0]}, {x.shape[-1]}], the models and examples of the scores")
    inside = member.sum(1)
    if ((inside == 0) | (inside == member.shape[1])).any():
        raise ValueError(f"member: {inside.min()} to {inside.max()} of {member.shape[1]} examples in a model; "
                         "valid is at least one member and one non-member each")
    if np.isnan(x).any():
        raise ValueError(f"scores: {int(np.isnan(x).sum())} NaN among phi, confidences or scores; valid are numbers")
    return member


def null_member(member, seed=0) -> np.ndarray:
    """The null control: a membership matrix [M, N] with the same design that says nothing about training.

    One common permutation of the columns: rows keep their sizes, complementary pairs stay complementary and
    every example stays in as many models. Feed it to an attack as `member`, with the untouched logits: given
    the permutation, an example's real membership is a coin flip for every pair, independent of its alleged
    one. So LiRA and RMIA with leave="pair" have AUC 1/2 in expectation, exactly, and so have learned
    thresholds (a threshold never judges an example it was learned on). With leave="model" they have not: the
    alleged counts give the target away and its partner agrees with it, which is O(1/M) off, in both directions.
    """
    return member[:, np.random.default_rng(seed).permutation(member.shape[1])]

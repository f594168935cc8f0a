"""Membership inference: from the signals of M models to scores [M, N], higher = more likely a member.

Every model is in turn the target and the others are its shadows; `member` [M, N] bool says who trained on
what. Where models 2k and 2k+1 train on complementary halves, the target's partner is left out with the target
(leave="pair"): every example is in exactly half of the models, so among the other M - 1 the mere *count* of
members gives the target's membership away. With the pair left out the null is exact: without a leak, AUC 1/2.
"""

import numpy as np

from lib.attacks import neural
from lib.attacks.intervals import calibration_split, checked, partners
from lib.attacks.shadow import _averaged, _lira, rmia
from lib.attacks.signals import signals
from lib.attacks.thresholds import _threshold_attacks, classwise

NAMES = (
    "gap",
    "loss",
    "confidence",
    "confidence_classwise",
    "entropy",
    "entropy_classwise",
    "m_entropy",
    "m_entropy_classwise",
    "neural",
    "neural_classwise",
    "lira",
    "lira_pooled",
    "lira_offline",
    "lira_offline_pooled",
    "rmia",
    "rmia_offline",
)
# these decide "member" by score > 0, by construction
FIXED = ("gap", "loss", "confidence_classwise", "entropy_classwise", "m_entropy_classwise", "neural_classwise")


def run(
    logits, y, member, population_logits=None, population_y=None, gamma=1.0, a=0.3, seed=0, learned=True, groups=None
):
    """All attacks in NAMES on one ensemble: a dict name -> scores [M, N] float32; learned=False: without the neural.

    logits: [M, N, C], or [M, Q, N, C] with Q queries (augmentations) of which the first is the plain input;
    LiRA and RMIA average over the queries, the others see the first. y: [N] labels; member: [M, N] bool.
    population_logits [M, T, C] or [M, Q, T, C] with population_y [T]: examples that no model trained on, for
    RMIA; without them RMIA compares with the pool itself. gamma, a: RMIA's. seed: of the halves on which
    thresholds and the neural attack are learned, in which groups [N] (a patient's two eyes) stay together. Raises
    ValueError, naming the argument, where they do not fit.
    """
    shape = np.shape(logits)
    if len(shape) not in (3, 4):
        raise ValueError(f"logits: shape {shape}; valid are [M, N, C] and [M, Q, N, C]")
    if np.shape(member) != (shape[0], shape[-2]):
        raise ValueError(f"member: shape {np.shape(member)}; valid is [M, N] = {(shape[0], shape[-2])}")
    if (population_logits is None) != (population_y is None):
        raise ValueError("population_y: missing or without population_logits; valid are both or neither")
    out = single(logits if len(shape) == 3 else logits[:, 0], y, member, seed, learned, groups)
    shown = signals(logits, y, only=("phi", "confidence"))
    population = None
    if population_logits is not None:
        population = signals(population_logits, population_y, only=("confidence",))["confidence"]
    kinds = {
        "lira": (False, "example"),
        "lira_pooled": (False, "pooled"),
        "lira_offline": (True, "example"),
        "lira_offline_pooled": (True, "pooled"),
    }
    family = _averaged(lambda phi: _lira(phi, member, kinds.values()), shown["phi"])
    out.update(zip(kinds, family, strict=True))
    for name, offline in (("rmia", False), ("rmia_offline", True)):
        out[name] = rmia(shown["confidence"], member, population, offline, gamma, a)
    return {name: out[name] for name in NAMES if name in out}


def single(logits, y, member, seed=0, learned=True, groups=None):
    """The attacks of `run` that look at one model alone and need no shadow models: a dict name -> scores [M, N].

    logits: [M, N, C] on the plain input. Thresholds and the neural attack are learned on one half of each model's
    members and non-members and judge the other; groups [N] stay together in these.
    """
    plain = signals(logits, y)
    member = checked(plain["phi"], member)[1]
    half = calibration_split(member, seed, y, groups)
    out = _threshold_attacks(plain, member, y, half)
    if learned:
        half = calibration_split(member, seed, groups=groups)  # not within classes, see neural.attack
        out["neural"], own = neural.fit(logits, y, member, half, seed, groups=groups)
        out["neural_classwise"] = classwise(out["neural"], member, y, half=half, own=own)
    return out


def null_member(member, seed=0, groups=None) -> np.ndarray:
    """The null control: a membership matrix [M, N] of the same design that says nothing about training.

    Every pair's halves are drawn anew, by themselves: rows keep their sizes, pairs stay complementary and every
    example stays in as many models. groups [N] stay whole: each trades places with one of its size, and for those
    that have none the two sides of the pair do, at random. Feed it to an attack as `member`, with the untouched
    logits: an example's real membership in a pair is then a coin flip, independent of its alleged one. So LiRA and
    RMIA with leave="pair" have AUC 1/2 in expectation, and learned thresholds accuracy 1/2 (none judges an example
    it was learned on; ranks across the two halves are off by O(1/N)). With leave="model" the alleged counts and the
    agreeing partner give the target away.

    Where models are no pairs, one permutation of the columns serves all, whatever the groups: every example stays in
    as many models, but halves that really overlap more do so in the alleged membership too, and LiRA finds a trace.
    """
    partner, rng = partners(member), np.random.default_rng(seed)
    if partner is None:
        return member[:, rng.permutation(member.shape[1])]
    null = member.copy()
    for m in np.flatnonzero(np.arange(len(member)) < partner):
        side = m if groups is None else rng.choice([m, partner[m]])
        null[m] = member[side, _exchanged(rng, groups, member.shape[1])]
        null[partner[m]] = ~null[m]
    return null


def _exchanged(rng, groups, n) -> np.ndarray:
    """A random order of n columns; groups trade places whole, with others of their size."""
    if groups is None:
        return rng.permutation(n)
    groups = np.unique(groups, return_inverse=True)[1]  # which may be names
    sizes, order = np.bincount(groups)[groups], np.empty(n, np.int64)
    for size in np.unique(sizes):
        own = np.flatnonzero(sizes == size)
        own = own[np.argsort(groups[own], kind="stable")]  # group after group
        order[own] = rng.permutation(own.reshape(-1, size)).ravel()
    return order

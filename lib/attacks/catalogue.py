"""All membership inference attacks on one ensemble: from logits to scores [M, N], higher = more likely a member."""

import numpy as np

from lib import need
from lib.attacks import neural
from lib.attacks.membership import calibration_split, checked, partners
from lib.attacks.shadow import lira, rmia
from lib.attacks.signals import TINY, signals
from lib.attacks.thresholds import classwise, yeom

NAMES = tuple(
    "gap loss confidence confidence_classwise entropy entropy_classwise m_entropy m_entropy_classwise neural "
    "neural_classwise lira lira_pooled lira_offline lira_offline_pooled rmia rmia_offline".split()
)
# the attacks whose own decision is score > 0
FIXED = ("gap", "loss", "confidence_classwise", "entropy_classwise", "m_entropy_classwise", "neural_classwise")


def run(
    logits, y, member, population_logits=None, population_y=None, gamma=1.0, a=0.3, seed=0, learned=True, groups=None
):
    """All attacks in NAMES: a dict name -> scores [M, N] float32. learned=False leaves out the neural ones.

    logits: [M, N, C], or [M, Q, N, C] with Q queries (augmentations), the plain input first. LiRA and RMIA average over
    the queries; the others see the first. y: [N] labels; member: [M, N] bool. population_logits [M, T, C] (or
    [M, Q, T, C]) and population_y [T]: examples that no model trained on; without them RMIA compares with the pool.
    gamma, a: RMIA's. seed: of the halves on which thresholds and the neural attack are learned; groups [N] (a patient's
    two eyes) stay together in them. Raises ValueError, naming the argument, where they do not fit.
    """
    shape = np.shape(logits)
    need(len(shape) in (3, 4), f"logits: shape {shape}; valid are [M, N, C] and [M, Q, N, C]")
    valid = (shape[0], shape[-2])
    need(np.shape(member) == valid, f"member: shape {np.shape(member)}; valid is [M, N] = {valid}")
    both = (population_logits is None) == (population_y is None)
    need(both, "population_y: missing or without population_logits; valid are both or neither")
    out = single(logits if len(shape) == 3 else logits[:, 0], y, member, seed, learned, groups)
    shown, population = signals(logits, y, only=("phi", "confidence")), None
    if population_logits is not None:
        population = signals(population_logits, population_y, only=("confidence",))["confidence"]
    for suffix, offline in (("", False), ("_offline", True)):
        out[f"lira{suffix}"] = lira(shown["phi"], member, offline, "example")
        out[f"lira{suffix}_pooled"] = lira(shown["phi"], member, offline, "pooled")
        out[f"rmia{suffix}"] = rmia(shown["confidence"], member, population, offline, gamma, a)
    return {name: out[name] for name in NAMES if name in out}


def single(logits, y, member, seed=0, learned=True, groups=None):
    """The attacks of `run` that need no shadow models: a dict name -> scores [M, N] float32.

    logits: [M, N, C] on the plain input; the rest as in `run`. Thresholds and the neural attack are learned on one half
    of each model's members and non-members, and judge the other half.
    """
    seen = signals(logits, y)
    member = checked(seen["phi"], member)[1]
    half = calibration_split(member, seed, y, groups)
    out = {
        "gap": seen["correct"].astype(np.float32),
        "loss": yeom(seen["log_confidence"], member, half=half),
        # phi orders as confidence does, and -log(entropy) as -entropy; but these do not tie in float32
        "confidence": seen["phi"],
        "entropy": -np.log(np.maximum(seen["entropy"], np.float32(TINY))),
        "m_entropy": -np.log(np.maximum(seen["modified_entropy"], np.float32(TINY))),
    }
    for name in ("confidence", "entropy", "m_entropy"):
        out[f"{name}_classwise"] = classwise(out[name], member, y, half=half)
    if learned:
        half = calibration_split(member, seed, groups=groups)  # not within classes, see neural.attack
        out["neural"], own = neural.attack(logits, y, member, half, seed, groups=groups)
        out["neural_classwise"] = classwise(out["neural"], member, y, half=half, own=own)
    return out


def null_member(member, seed=0, groups=None) -> np.ndarray:
    """The null control: a membership matrix [M, N] of the same design that says nothing about training.

    Given to an attack in the place of `member`, with the real logits, it gives AUC 1/2 if there is no fault.

    Each complementary pair's halves are drawn anew, with the sizes that they had. So LiRA and RMIA with leave="pair"
    have AUC 1/2 in expectation, and learned thresholds accuracy 1/2, up to O(1/N); with leave="model" the number of IN
    models gives the target away. groups [N] (a patient's two eyes) stay whole, as members if their first example is
    one: they trade places with groups of their size, and the two sides of a pair with each other, at random. Without
    pairs, one permutation of the examples serves all models, whatever the groups: halves that really overlap more then
    also do so in the null, and LiRA finds a trace of that.
    """
    partner, rng = partners(member), np.random.default_rng(seed)
    if partner is None:
        return member[:, rng.permutation(member.shape[1])]
    names = np.arange(member.shape[1]) if groups is None else groups
    _, first, own, sizes = np.unique(names, return_index=True, return_inverse=True, return_counts=True)
    null = member.copy()
    for m in np.flatnonzero(np.arange(len(member)) < partner):
        side = m if groups is None else rng.choice([m, partner[m]])
        order = np.arange(len(first))
        for size in np.unique(sizes):
            order[sizes == size] = rng.permutation(order[sizes == size])
        null[m] = member[side, first][order][own]
        null[partner[m]] = ~null[m]
    return null

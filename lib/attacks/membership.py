"""Who trained on what, member[M, N] (bool): which models are partners, and how members and non-members are split."""

import numpy as np

from lib import need
from lib.attacks.signals import parallel


def checked(scores, member) -> tuple[np.ndarray, np.ndarray]:
    """scores [M, N] and member [M, N] as arrays, or a ValueError that says what is wrong."""
    scores, member = np.asarray(scores), np.asarray(member)
    fits = scores.ndim == 2 and scores.shape == member.shape
    need(fits, f"scores: shape {scores.shape}; valid is the shape of member [M, N], {member.shape}")
    need(member.dtype == bool, f"member: dtype {member.dtype}; valid is bool")
    inside, n = member.sum(1), member.shape[1]
    for m in np.flatnonzero((inside == 0) | (inside == n)):
        raise ValueError(f"member: row {m} has {inside[m]} members of {n}; valid are rows with members and non-members")
    for m, i in np.argwhere(np.isnan(scores)):
        raise ValueError(f"scores: NaN at model {m}, example {i}; valid are numbers")
    return scores, member


def partners(member) -> np.ndarray | None:
    """For each model, the index of the one that trained on exactly the other examples: [M]; None if one has none."""
    found, waiting = np.full(len(member), -1), {}  # waiting: half -> models whose partner would have this half
    for k, row in enumerate(member):
        if waiting.get(row.tobytes()):
            found[k] = waiting[row.tobytes()].pop()
            found[found[k]] = k
        else:
            waiting.setdefault((~row).tobytes(), []).append(k)
    return None if (found < 0).any() else found


def pairs(member) -> np.ndarray:
    """Which models belong together, as integers [M]: complementary partners, or else models 2k and 2k + 1."""
    found, own = partners(member), np.arange(len(member))
    return own // 2 if found is None else np.minimum(own, found)


def folds(member) -> list[np.ndarray]:
    """The models in two folds, as arrays of indices. The models of a pair are in the same fold."""
    fold = np.unique(pairs(member), return_inverse=True)[1] % 2
    return [np.flatnonzero(fold == k) for k in (0, 1)]


def calibration_split(member, seed=0, y=None, groups=None) -> np.ndarray:
    """A random half [M, N] (bool) of each model's members and of its non-members; with y [N], within each class.

    An attacker learns on one half and judges the other. Examples of one group (a patient's two eyes, groups [N]) stay
    together; the group counts as a member if its first example is one. member may hold integers: each kind is then
    split by itself. Raises ValueError if a half would lack one of the kinds.
    """
    if groups is not None:
        need(np.shape(groups) == member.shape[1:], f"groups: shape {np.shape(groups)}; valid is {member.shape[1:]}")
        _, first, own = np.unique(groups, return_index=True, return_inverse=True)
        half = calibration_split(member[:, first], seed, None if y is None else np.asarray(y)[first])[:, own]
        sides = [(member == kind) & (half == h) for kind in np.unique(member) for h in (False, True)]
        enough = all(side.any(1).all() for side in sides)
        need(enough, f"groups: {len(first)} are too few for halves that have members and non-members each")
        return half
    order = np.random.default_rng(seed).permutation(member.shape[1])
    if y is not None:
        order = order[np.argsort(np.asarray(y)[order], kind="stable")]
    half = np.zeros(member.shape, bool)

    def split(m):
        for kind in np.unique(member[m]):
            own = order[member[m, order] == kind]
            half[m, own[1::2]] = True  # every other one along a random order

    parallel(split, range(len(member)))
    return half

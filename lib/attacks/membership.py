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
    inside, n = np.array([*map(np.count_nonzero, member)]), member.shape[1]  # a sixth of the time of member.sum(1)
    for m in np.flatnonzero((inside == 0) | (inside == n)):
        raise ValueError(f"member: row {m} has {inside[m]} members of {n}; valid are rows with members and non-members")
    for m, i in np.argwhere(np.isnan(scores)) if np.isnan(scores.min()) else ():  # the least is NaN if any is
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


def calibration_split(member, seed=0, y=None, groups=None, parts=2) -> np.ndarray:
    """Each model's members and its non-members, cut into equal random parts: [M, N], integers from 0 to parts - 1.

    With y [N], each class is cut by itself. Examples of one group (a patient's two eyes, groups [N]) stay together; the
    group counts as a member if its first example is one. Partners have the same parts."""
    names = np.arange(member.shape[1]) if groups is None else np.asarray(groups)
    _, first, own = np.unique(names, return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(first))
    if y is not None:
        order = order[np.argsort(np.asarray(y)[first][order], kind="stable")]
    found, turn, place = np.empty((len(member), len(first)), np.int8), np.arange(len(first)) % parts, first[order]

    def split(m):
        inside = member[m, place]
        for kind in (False, True):
            rows = order[inside == kind]
            what = f"member: row {m} has {len(rows)} {'members' if kind else 'non-members'} (or groups of them)"
            need(len(rows) >= parts, f"{what}; valid are at least {parts}, one for each part")
            found[m, rows] = turn[: len(rows)]  # along a random order

    parallel(split, range(len(member)))
    return found if groups is None else found[:, own]

"""thresholds"""

import numpy as np

from lib.attacks.intervals import best_thresholds, calibration_split, checked
from lib.attacks.shadow import TINY
from lib.attacks.signals import parallel

# ---- thresholds on one model's output --------------------------------------------------------------------


def _threshold_attacks(plain, member, y, half):
    """Attacks that look at one number of one model (Yeom et al. 2018; Song & Mittal 2021)."""
    out = {"gap": plain["correct"].astype(np.float32)}
    out["loss"] = yeom(plain["log_confidence"], member, half=half)
    # phi orders as confidence does, -log(entropy) as -entropy; near a threshold neither ties in float32
    out["confidence"] = plain["phi"]
    out["entropy"] = -np.log(np.maximum(plain["entropy"], np.float32(TINY)))
    out["m_entropy"] = -np.log(np.maximum(plain["modified_entropy"], np.float32(TINY)))
    for name in ("confidence", "entropy", "m_entropy"):
        out[f"{name}_classwise"] = classwise(out[name], member, y, half=half)
    return out


def yeom(log_confidence, member, seed=0, half=None) -> np.ndarray:
    """Member if the loss is below the mean member loss: scores [M, N] float32, decision score > 0.

    Yeom et al. 2018, adversary 2; the mean over one half of the target's members judges the other half of the
    examples, and vice versa. The score is log(mean loss) - log(loss), not mean - loss: the same decision,
    and losses near zero stay distinct in float32. half: [M, N] bool, default halves(member, seed).
    """
    log_confidence, member = checked(log_confidence, member)
    half, scores = calibration_split(member, seed) if half is None else half, np.empty(member.shape, np.float32)

    def row(m):
        loss = np.maximum(-log_confidence[m].astype(np.float64), TINY)
        mean = np.array([loss[member[m] & (half[m] == h)].mean() for h in (False, True)])
        # s = log(mean loss of the members in the other half) - log(loss)
        scores[m] = np.log(mean)[1 - half[m].astype(int)] - np.log(loss)

    parallel(row, range(len(member)))
    return scores


def classwise(scores, member, y, seed=0, half=None, own=None) -> np.ndarray:
    """Scores minus their class's threshold: [M, N] float32, decision score > 0 (Song & Mittal 2021, 3.2).

    scores: [M, N]; y: [N] labels. Each target's members and non-members are split in two random halves
    (within classes); a class's threshold of best balanced accuracy in one half is subtracted in the other.
    A class without members or non-members in a half takes the threshold of that whole half.
    half: [M, N] bool, default halves(member, seed, y). own: [M, N], what the thresholds are learned from, default
    scores. Where the scores of one half are themselves learned on the other (`neural.fit`), so would be the
    threshold that judges it; own scores come from within the half.
    """
    scores, member = checked(scores, member)
    own = scores if own is None else checked(own, member)[0]
    if np.shape(y) != scores.shape[1:]:
        raise ValueError(f"y: shape {np.shape(y)}; valid is [N] = {scores.shape[1:]}")
    _, y = np.unique(y, return_inverse=True)
    half, out = calibration_split(member, seed, y) if half is None else half, np.empty(member.shape, np.float32)

    def row(m):
        side = half[m].astype(np.uint16)
        best = best_thresholds(own[m], member[m], (2 * y + side).astype(np.uint16), 2 * y.max() + 2)
        if np.isnan(best).any():
            everyone = best_thresholds(own[m], member[m], side, 2)
            best = np.where(np.isnan(best), np.tile(everyone, y.max() + 1), best)
        # s = s - t_{class, other half}
        out[m] = scores[m] - best[2 * y + 1 - side]

    parallel(row, range(len(member)))
    return out

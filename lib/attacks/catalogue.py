"""All membership inference attacks on one ensemble: from logits to scores [M, N], higher = more likely a member."""

import numpy as np

from lib import need
from lib.attacks import neural
from lib.attacks.membership import calibration_split, checked, partners
from lib.attacks.shadow import liras, rmia
from lib.attacks.signals import TINY, by_rows, ranking, signals, ties
from lib.attacks.thresholds import classwise, yeom

# those that look at one model alone
ALONE = ("gap", "loss", "confidence", "confidence_classwise", "entropy", "entropy_classwise", "m_entropy")
ALONE += ("m_entropy_classwise", "neural", "neural_classwise")
LIRAS = {"lira": (False, "example"), "lira_shrunk": (False, "shrunk")}  # (offline, variance), as in shadow.lira
LIRAS |= {"lira_offline": (True, "example"), "lira_offline_shrunk": (True, "shrunk")}
NAMES = (*ALONE, *LIRAS, "rmia", "rmia_offline", "combined")
# the attacks that speak for all where one number is wanted, since 26 November 2026 (docs/results.md)
HEADLINES = ("lira_shrunk", "rmia", "combined")
# the attacks whose own decision is score > 0
FIXED = ("gap", "loss", "confidence_classwise", "entropy_classwise", "m_entropy_classwise", "neural_classwise")
FAMILIES = {
    "threshold on one output": ("gap", "loss", "confidence", "entropy", "m_entropy"),
    "class-wise thresholds": FIXED[2:],
    "neural": ("neural",),
    "label-only": ("label_only", "label_only_classwise"),
    "likelihood ratio": tuple(LIRAS),
    "RMIA": ("rmia", "rmia_offline"),
    "both combined": ("combined",),
}


def run(logits, y, member, population_logits=None, population_y=None, seed=0, groups=None, only=NAMES):
    """All attacks in NAMES, or those in `only`: a dict name -> scores [M, N] float32.

    logits: [M, N, C] or [M, Q, N, C] with Q queries (augmentations), the plain input first. LiRA and RMIA average over
    the queries; the others see the first. y: [N] labels; member: [M, N] bool. population_logits [M, T, C] (or
    [M, Q, T, C]) and population_y [T]: examples that no model trained on, for RMIA. seed, groups [N]: as in
    calibration_split. combined: the mean of the ranks of lira_shrunk and rmia among a model's examples, from 0 to 1."""
    logits = np.asanyarray(logits)
    need(logits.ndim in (3, 4), f"logits: shape {logits.shape}; valid are [M, N, C] and [M, Q, N, C]")
    need(set(only) <= set(NAMES), f"only: {[*only]}; valid are {', '.join(NAMES)}")
    wanted, out = {*only, *(("lira_shrunk", "rmia") if "combined" in only else ())}, {}
    plain, both = logits if logits.ndim == 3 else logits[:, 0], ("phi", "confidence")
    seen = signals(plain, y) if wanted & {*ALONE} else signals(plain, y, only=both)
    if wanted & {*ALONE}:
        out = of_single_models(seen, y, member, seed, groups)
    of_all = seen if plain.size == logits.size else signals(logits, y, only=both)
    phi, confidence = (of_all[name].reshape(logits.shape[:-1]) for name in both)
    del seen, of_all  # large arrays that are no longer needed
    if asked := [name for name in LIRAS if name in wanted]:
        out |= zip(asked, liras(phi, member, [LIRAS[name] for name in asked]), strict=True)
    if rmias := wanted & {"rmia", "rmia_offline"}:
        z = {} if population_logits is None else signals(population_logits, population_y, only=("confidence",))
        out |= {name: rmia(confidence, member, z.get("confidence"), name == "rmia_offline") for name in rmias}
    if "combined" in wanted:
        del phi, confidence

        def mean_rank(m):
            total = np.zeros(len(y))
            for s in (out["lira_shrunk"][m], out["rmia"][m]):
                order = ranking(s)
                total[order] += ties(s[order]).sum(0) - 1  # twice the rank, from 0: those with the same score share one
            return total / 4 / (len(y) - 1)

        out["combined"] = by_rows(mean_rank, member.shape, np.float32)
    return {name: out[name] for name in NAMES if name in only}


def of_single_models(seen, y, member, seed, groups):
    """The attacks in ALONE, from the signals of the plain input, which it uses up; one half teaches about the other."""
    half = calibration_split(checked(seen["phi"], member)[1], seed, y, groups)
    # -log(entropy) orders as -entropy does, but does not tie where a model is nearly certain; nor does phi
    own = (seen.pop(k) for k in ("entropy", "modified_entropy"))
    entropies = (np.negative(np.log(np.maximum(h, np.float32(TINY), out=h), out=h), out=h) for h in own)
    levels = dict(zip(("confidence", "entropy", "m_entropy"), (seen["phi"], *entropies), strict=True))
    out = {"gap": seen.pop("correct").astype(np.float32), "loss": yeom(seen.pop("log_confidence"), member, half)}
    out |= levels | {f"{name}_classwise": classwise(s, member, y, half) for name, s in levels.items()}
    out["neural"], own, part = neural.attack(list(levels.values()), member, seed, groups)
    out["neural_classwise"] = classwise(out["neural"], member, y, part, own)
    return out


def null_member(member, seed=0, groups=None) -> np.ndarray:
    """The null control: a membership matrix [M, N] of the same design that says nothing about training.

    With it, in the place of `member`, and the real logits, AUC (and the accuracy of learned thresholds) is 1/2, up to
    O(1/N), if there is no fault. Each pair's halves are drawn anew; groups [N] trade places with groups of their size,
    and the two sides of a pair with each other. Without pairs, one permutation serves all models."""
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

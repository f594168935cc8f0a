"""The label-only attack: who is classified right under many small changes of the input is a member.

Choquette-Choo et al. (2021): the attacker sees a model's predicted labels, no confidence. First counts whether the
example is labelled right as it is, then the share of queries with the right label. Images are shifted and mirrored
(their augmentation attack), tables get noise (their random-noise attack: flipped bits, or Gaussian noise), of a
strength that other models chose; none at all is one of them.

The authors' code differs: it shifts along one diamond (|dx| + |dy| = d, border repeated) or rotates, without mirror
images, and classes each have a network on the vector of hits, the untouched query's among them, learned on a shadow
model; here the hits are counted and class-wise thresholds do the rest. Its noise attack asks 2,500 to 10,000 times, and
gives 0 to an example that is wrong as it is. For bits the strengths are theirs, 1 to 10 expected flips, and two more;
their Gaussian noise is .02 to .1 of the range of a pixel, here it is in units of each feature's standard deviation.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from lib.attacks import catalogue, intervals, thresholds
from lib.attacks.signals import signals
from lib.data.dataset import inputs
from lib.training.ensemble import KEEP_WEIGHTS

LEAST = 8  # models: fewer pairs give no interval
COPIES = 50  # noisy copies beside the plain input: an odd number of queries
FLIPS = (1, 2, 3, 5, 10, 20, 50)  # bits expected to flip
NOISE = (0.1, 0.2, 0.4, 0.8, 1.6)  # standard deviations of each feature in the pool
BATCH = 200  # examples: the activations stay in the cache, twice as fast as 500 (small CNN, 2 threads)


def table(ensembles, n_models=16, device="cpu") -> pd.DataFrame:
    """`intervals.table` of the attacks label_only, label_only_classwise and label_once on the models that all have kept.

    label_once asks for the label of the example as it is and no more: it is the attack `gap`.

    ensembles: dict optimizer -> Ensemble, the first is the baseline. Returns a tidy frame like audit.leakage: metric,
    value, ci_low, ci_high, optimizer, attack; with the null control of label_only as the metric null_auc. Raises
    ValueError if fewer than 8 such models are left.
    """
    first = next(iter(ensembles.values()))
    ids = kept(ensembles.values(), n_models)
    asked = {name: answers(e.only(ids), n_models, device=device)[0] for name, e in ensembles.items()}
    member, y, groups = np.array(first.only(ids).member), first.dataset.y, first.dataset.groups
    scored = {name: chosen(found, member) for name, found in asked.items()}
    half = intervals.calibration_split(member, 0, y, groups)
    by_class = {name: thresholds.classwise(s, member, y, half=half) for name, s in scored.items()}
    right = {n: signals(e.only(ids).logits[:, 0], y, only=("correct",))["correct"] for n, e in ensembles.items()}
    kinds = (("label_only", scored, None), ("label_only_classwise", by_class, 0.0), ("label_once", right, 0.0))
    how = {"columns": groups}
    frames = [intervals.table(s, member, threshold=limit, **how).assign(attack=name) for name, s, limit in kinds]
    null = [null_auc(found, member, groups) for found in asked.values()]
    rows = [
        dict(metric="null_auc", value=e.value, ci_low=e.low, ci_high=e.high, attack="label_only", baseline="")
        for e in null
    ]
    return pd.concat([*frames, pd.DataFrame(rows).assign(optimizer=list(asked))], ignore_index=True)


def null_auc(found, member, groups=None, shuffles=5):
    """AUC on shuffled membership, averaged over shuffles, as an Estimate: without a fault 0.5. found: [S, m, N]."""
    influence_values = 0
    for shuffle in range(shuffles):
        alleged = catalogue.null_member(member, shuffle, groups)
        influence_values = influence_values + intervals.auc_influence_values(chosen(found, alleged), alleged) / shuffles
    return intervals.estimate(influence_values, rate=True, columns=groups)


def scores(ensemble, n_models=16, seed=0, device="cpu") -> tuple[np.ndarray, np.ndarray]:
    """Scores [m, N] float32 in [0, 1] of the models whose weights are kept, and their ids [m].

    As `answers`; a fold of models takes the strength of noise of best AUC in the other fold.
    """
    found, ids = answers(ensemble, n_models, seed, device)
    return chosen(found, np.array(ensemble.only(ids).member)), ids


def of_one(ensemble, place, n_models=16, device="cpu") -> tuple[np.ndarray, np.ndarray]:
    """As `scores`, of the example in column `place` alone: [m, 1].

    A strength of noise is chosen on the whole pool, so tables are asked about all of it. Images are asked about the one
    alone, at the least strength, a pixel (the authors' own).
    """
    if not ensemble.dataset.is_image:
        found, ids = scores(ensemble, n_models, device=device)
        return found[:, [place]], ids
    found, ids = answers(ensemble, n_models, device=device, rows=[place], most=1)
    return found[-1], ids


def answers(ensemble, n_models=16, seed=0, device="cpu", rows=slice(None), most=None):
    """`shares` at each strength, [S, m, N] float32, of the models whose weights are kept; and their ids [m].

    Images: every shift by up to 1, 2, 4, ... pixels, `most` of them (default an eighth of the side), over a reflected
    border, and each one's mirror image (18, 50 and 162 queries at 32 x 32). Tables: the input and COPIES noisy copies.
    The first strength is none: the example as it is. seed: of the noise, which is the same for all models and
    optimizers. rows: the examples asked about, N of them. ValueError: see `kept`.
    """
    ids = kept([ensemble], n_models)
    nets, x = [network(ensemble, k, device) for k in ids], torch.from_numpy(inputs(ensemble.dataset)[0])
    strengths, y = shifts(x, most) if ensemble.dataset.is_image else noises(x, seed), ensemble.dataset.y[rows]
    return np.stack([shares(nets, x[rows], y, queries, device) for queries in (once, *strengths)]), ids


def kept(ensembles, n_models=16) -> np.ndarray:
    """The first n_models models, in whole pairs, that finished in all ensembles and whose weights are kept: ids [m].

    Raises ValueError if n_models is no even number from 8, or fewer than 8 are left.
    """
    if n_models % 2 or n_models < LEAST:
        raise ValueError(f"n_models={n_models!r} is not valid: it must be an even number from {LEAST}")
    there = set.intersection(*(set(e.ids.tolist()) for e in ensembles))
    ids = [k for k in range(KEEP_WEIGHTS) if {k, k ^ 1} <= there][:n_models]
    if len(ids) < LEAST:
        raise ValueError(f"n_models: only {len(ids)} models finished and kept their weights; {LEAST} are needed")
    return np.array(ids)


def network(ensemble, k, device="cpu"):
    """Model k in evaluation mode, its convolutions in the layout that is fastest for them."""
    net, params, buffers = ensemble.weights(k)
    net.load_state_dict(params | buffers)
    return net.to(device, memory_format=torch.channels_last).eval()


@torch.inference_mode()
def shares(nets, x, y, queries, device="cpu") -> np.ndarray:
    """Does each model label the example right as it is, and then what share of the queries: [m, N] float32 in [0, 1].

    x: [N, ...]; y: [N] labels; queries: a function of a batch of x that yields it as each query shows it.
    """
    out = np.empty((len(nets), len(x)), np.float32)
    for start in range(0, len(x), BATCH):
        part, labels = x[start : start + BATCH].to(device), torch.as_tensor(y[start : start + BATCH], device=device)
        right = torch.stack([net(part).argmax(-1) == labels for net in nets])
        hits, count = torch.zeros(len(nets), len(part), device=device), 0
        for seen in queries(part):
            hits += torch.stack([net(seen).argmax(-1) == labels for net in nets])
            count += 1
        # s = (1{label of x = y} + 1/Q sum_q 1{label of query q = y}) / 2
        out[:, start : start + BATCH] = ((right + hits / count) / 2).cpu().numpy()
    return out


# ---- queries ---------------------------------------------------------------------------------------------


def once(x):
    """Yield x as it is."""
    yield x


def shifts(x, most=None):
    """One query function for each strength: shifts of up to 1, 2, 4, ... pixels; see `answers`."""
    most = max(1, min(x.shape[2:]) // 8) if most is None else most
    return [partial(shifted, most=2**power) for power in range(most.bit_length())]


def shifted(x, most):
    """Yield x [B, channels, H, W] at every shift of up to `most` pixels, and each mirrored."""
    height, width = x.shape[2:]
    padded = F.pad(x, (most,) * 4, mode="reflect").contiguous(memory_format=torch.channels_last)
    for down in range(2 * most + 1):
        for right in range(2 * most + 1):
            seen = padded[:, :, down : down + height, right : right + width]
            yield from (seen, seen.flip(-1))


def noises(x, seed=0):
    """One query function for each strength of noise: flipped bits if all of x [N, D] are 0 or 1, else Gaussian."""
    if ((x == 0) | (x == 1)).all():
        rates = sorted({min(flips / x.shape[1], 0.5) for flips in FLIPS})
        return [noisy(lambda part, r, rate=rate: flipped(part, rate, r), seed) for rate in rates]
    spread = x.std(0, correction=0)
    return [noisy(lambda part, r, s=s: part + (s * spread).to(part.device) * normal(part, r), seed) for s in NOISE]


def noisy(change, seed):
    """A query function: the batch as it is, then COPIES of change(batch, random)."""
    random = torch.Generator().manual_seed(seed)

    def queries(part):
        yield part
        yield from (change(part, random) for _ in range(COPIES))

    return queries


def flipped(part, rate, random):
    """Bits part [B, D], each flipped with probability `rate`."""
    flip = torch.rand(part.shape, generator=random) < rate
    # x = 1 - x where flipped
    return (part - flip.to(part)).abs()


def normal(part, random):
    """Standard normal noise of part's shape, drawn on the CPU: the same on each device."""
    return torch.randn(part.shape, generator=random).to(part.device)


def chosen(found, member) -> np.ndarray:
    """Scores [m, N] of those at each strength [S, m, N]: in either fold of models, where the other fold's AUC is best.

    member: [m, N] bool. The folds keep pairs together, as those of the thresholds in `metrics` do.
    """
    fold = np.unique(intervals.pairs(member), return_inverse=True)[1] % 2
    auc = np.array([intervals.auc_influence_values(s, member).mean(1) for s in found])  # [S, m]
    best = [auc[:, fold != side].mean(1).argmax() for side in (0, 1)]
    return np.where((fold == 0)[:, None], found[best[0]], found[best[1]])

"""The label-only attack (Choquette-Choo et al. 2021): it sees a model's predicted labels and no confidences.

A member tends to lie far from the decision boundary, so it keeps its label under many small changes of the input.
The strength of the change is chosen on other models; "no change at all" is one of the choices. Limits: docs/limits.md.
"""

from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from lib.attacks import intervals
from lib.attacks.membership import folds

COPIES = 50  # noisy copies beside the plain input, which makes an odd number of queries
FLIPS = (1, 2, 3, 5, 10, 20, 50)  # expected number of flipped bits
NOISE = (0.1, 0.2, 0.4, 0.8, 1.6)  # in standard deviations of each feature in x
BATCH = 200  # examples; their activations stay in the cache, twice as fast as 500 (small CNN, 2 threads)


@torch.inference_mode()
def answers(predict, x, y, is_image, seed=0, device="cpu") -> np.ndarray:
    """How often each model gives the right label under small changes of each input: [S, M, N] float32 in [0, 1].

    predict: M functions, each from a batch of inputs (a tensor on `device`) to predicted labels [B]; x: images
    (is_image) or features [N, D]; y: [N] labels. The first of the S strengths is no change. The others are, for images,
    all shifts by up to 1, 2, 4, ... pixels (an eighth of a side) over a reflected border, each also mirrored; for
    features, the input and COPIES noisy copies: flipped bits if all of x is 0 or 1, else Gaussian noise."""
    x = torch.as_tensor(x)
    strengths = queries(x, is_image, seed)
    out = np.empty((1 + len(strengths), len(predict), len(x)), np.float32)
    for start in range(0, len(x), BATCH):
        rows = slice(start, start + BATCH)
        part, labels = x[rows].to(device), torch.as_tensor(y[rows], device=device)
        right = torch.stack([model(part) == labels for model in predict])
        out[0, :, rows] = right.cpu().numpy()
        for s, asked in enumerate(strengths, 1):
            hits = [torch.stack([model(seen) == labels for model in predict]) for seen in asked(part)]
            # score = (1{label of x = y} + 1/Q sum_q 1{label of query q = y}) / 2
            out[s, :, rows] = ((right + torch.stack(hits).float().mean(0)) / 2).cpu().numpy()
    return out


def scores(answered, member) -> np.ndarray:
    """Scores [M, N] from answers [S, M, N] and member [M, N]: a fold takes the strength of best AUC in the other."""
    auc = np.array([intervals.auc_influence_values(s, member).mean(1) for s in answered])  # [S, M]
    out, (first, second) = np.empty(answered.shape[1:], np.float32), folds(member)
    for here, there in ((first, second), (second, first)):
        out[here] = answered[auc[:, there].mean(1).argmax(), here]
    return out


def queries(x, is_image, seed=0) -> list:
    """For each strength a function from a batch to its changed batches; x: all inputs. See `answers`."""
    if is_image:
        limits = [min(max(1, side // 8), side - 1) for side in x.shape[2:]]  # a reflected border is narrower than it
        strengths = [2**power for power in range(max(limits).bit_length())]
        return [partial(shifted, most=[min(strength, limit) for limit in limits]) for strength in strengths]
    if ((x == 0) | (x == 1)).all():
        changes = [{"rate": rate} for rate in sorted({min(k / x.shape[1], 0.5) for k in FLIPS})]
    else:
        changes = [{"spread": strength * x.std(0, correction=0)} for strength in NOISE]
    return [partial(noisy, random=torch.Generator().manual_seed(seed), **change) for change in changes]


def shifted(x, most):
    """Yield x [B, channels, H, W] shifted by up to `most` pixels (down, right), each shift also mirrored: all of them
    up to 7 pixels each way, and a lattice of 9 to 15 places a side where `most` is larger."""
    (height, width), (high, wide) = x.shape[2:], most
    padded = F.pad(x, (wide, wide, high, high), mode="reflect").contiguous(memory_format=torch.channels_last)
    down, right = (range(n % max(1, n // 4), 2 * n + 1, max(1, n // 4)) for n in (high, wide))
    for top, left in product(down, right):
        seen = padded[:, :, top : top + height, left : left + width]
        yield from (seen, seen.flip(-1))


def noisy(x, random, rate=None, spread=None):
    """Yield x [B, D] as it is, then COPIES times with bits flipped at a rate or noise of deviation `spread` [D]."""
    yield x
    for _ in range(COPIES):  # drawn on the CPU: the same on every device
        if spread is None:
            yield (x - (torch.rand(x.shape, generator=random) < rate).to(x)).abs()
        else:
            yield x + spread.to(x) * torch.randn(x.shape, generator=random).to(x)

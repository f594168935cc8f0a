"""From logits to what a membership attack looks at: one number for each model and example.

All are computed in float64 from differences to the largest logit, so that no digits cancel when a model is nearly
certain. `confidence` ties at 1.0 from phi = 17 on; phi has the same order and no ties."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import joblib
import numpy as np
import torch

from lib import need

NAMES = ("phi", "log_confidence", "confidence", "entropy", "modified_entropy", "correct")
GAP = 700.0  # logits further below the largest count as this far below; exp(-700) is still a normal float64
TINY = 1e-40  # smallest loss, entropy or probability that is put into a logarithm or divided by
THREADS = min(8, joblib.cpu_count())  # with LOKY_MAX_CPU_COUNT=1, as in a notebook beside those that train, one
BLOCK = 8192  # examples at a time: what is computed on the way stays in the processor's cache


@contextmanager
def threads(count):
    """Within it, torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parallel(function, items):
    """Call function(item) for all items on THREADS threads (numpy releases the interpreter lock in its loops)."""
    items = list(items)
    with threads(1), ThreadPoolExecutor(THREADS) as pool:  # else each of them would have torch start more
        # a task for each thread: one for each item took longer than the items
        list(pool.map(lambda k: [function(item) for item in items[k::THREADS]], range(THREADS)))


def by_rows(function, shape, dtype=np.float64) -> np.ndarray:
    """The array whose row m is function(m), by `parallel`: each row is written to its place."""
    out = np.empty(shape, dtype)
    parallel(lambda m: out.__setitem__(m, function(m)), range(len(out)))
    return out


def ranking(values) -> np.ndarray:
    """The indices that sort values [N]; many float32 or float64 by a radix sort of their bits, four times as fast."""
    if len(values) < 20_000 or values.dtype not in (np.float32, np.float64):
        return np.argsort(values)
    bits = values.view(f"i{values.itemsize}")
    # read as integers, negative numbers stand in reverse order, until all their bits but the sign are flipped
    flipped = bits ^ (bits >> (8 * values.itemsize - 1) & np.iinfo(bits.dtype).max)
    return torch.sort(torch.from_numpy(flipped), stable=True).indices.numpy()


def ties(ranked) -> np.ndarray:
    """For each of the sorted values [N]: how many are smaller, and how many are not larger, integers [2, N]."""
    differs = ranked[1:] != ranked[:-1]
    if differs.all():
        return np.arange(len(ranked)) + [[0], [1]]
    starts = np.append(0, np.flatnonzero(differs) + 1)
    ends = np.append(starts[1:], len(ranked))
    return np.repeat([starts, ends], ends - starts, axis=1)


def signals(logits, y, only=NAMES) -> dict[str, np.ndarray]:
    """The signals of every model on every example: a dict of [..., N] arrays, float32 (`correct`: bool).

    logits: [..., N, C] floats (or a memory map, read one [N, C] block at a time); y: [N] integers. In natural
    logarithms, phi = log p_y - log(1 - p_y) (Carlini et al. 2022, section IV), log_confidence = log p_y = -loss,
    confidence = p_y, entropy, modified_entropy (Song & Mittal 2021, section 3.2) and correct."""
    logits, y = np.asanyarray(logits), np.asarray(y)
    n_classes, fits = logits.shape[-1], y.shape == logits.shape[-2:-1] and y.dtype.kind in "iu"
    fits = fits and y.size and 0 <= y.min() and y.max() < n_classes
    need(fits, f"y: {y.dtype} of shape {y.shape}; valid are [N] integers, classes of logits, 0 to {n_classes - 1}")
    out = {name: np.empty(logits.shape[:-1], bool if name == "correct" else np.float32) for name in only}

    def fill(index):
        for start in range(0, len(y), BLOCK):
            rows = slice(start, start + BLOCK)
            found = of_one_model(logits[index][rows], y[rows], bool(out.keys() & {"entropy", "modified_entropy"}))
            for i in np.flatnonzero(np.isnan(found["phi"]))[:1]:
                seen = logits[index][start + i]
                raise ValueError(f"logits: {seen} at example {start + i}; valid are numbers below infinity")
            for name in out:
                out[name][index][rows] = found[name]

    parallel(fill, np.ndindex(*logits.shape[:-2]))
    return out


def of_one_model(z, y, entropies=True) -> dict[str, np.ndarray]:
    """The signals of z [N, C] and y [N]: a dict of arrays [N]. entropies: whether these two are among them."""
    z = z.T.astype(np.float64, order="C")  # [C, N]: reductions over classes run over contiguous rows
    own, seen = y * len(y) + np.arange(len(y)), np.zeros(len(y), bool)  # own: where a flat [C, N] holds class y
    with np.errstate(invalid="ignore"):  # inf - inf, which `signals` refuses
        d = np.minimum(z.max(0) - z, GAP)  # d_j = z_top - z_j >= 0
    is_top = d == 0
    for of_class in is_top:  # of equal logits the first is the top one; argmax takes five times as long
        of_class &= ~seen
        seen |= of_class
    r = np.exp(-d) * ~is_top  # r_j = p_j / p_top for all but the top class
    s = r.sum(0)
    d_y, r_y, correct = d.take(own), r.take(own), is_top.take(own)
    # -log p_top = log(1 + s),   log(1 - p_top) = log s - log(1 + s)
    loss_top, log_s = np.log1p(s), np.log(s)
    # phi = z_y - logsumexp_{j != y} z_j
    phi = np.where(correct, -log_s, -d_y - np.log1p(s - r_y))
    # log p_y = z_y - logsumexp_j z_j
    log_p = -d_y - loss_top
    found = {"phi": phi, "log_confidence": log_p, "confidence": np.exp(log_p), "correct": correct}
    if not entropies:
        return found
    # H = -sum_j p_j log p_j = log(1 + s) + sum_j p_j d_j: no term is negative, so nothing cancels
    entropy = loss_top + np.einsum("cn,cn->n", r, d) / (1 + s)
    # M = -(1 - p_y) log p_y - sum_{j != y} p_j log(1 - p_j); every class but the top one has p_j <= 1/2
    r, p_y = r / -(1 + s), r_y / (1 + s)  # r_j = -p_j
    rest = -np.einsum("cn,cn->n", r, np.log1p(r)) - p_y * np.log1p(-p_y)
    rest += np.where(correct, 0.0, (log_s - loss_top) / (1 + s))
    modified = -np.where(correct, s, 1 + s - r_y) / (1 + s) * log_p - rest
    return found | {"entropy": entropy, "modified_entropy": modified}

"""The neural attack: a small network learns to tell members from non-members by what the models answer.

Shokri et al. (2017, section V) and Salem et al. (2019, adversary 1) train it on shadow models, Nasr et al. (2019) on
known members of the target; here it learns from both. Each model's members and non-members are cut into three parts,
partners' alike. Network k learns on part k of all models, stops early on part k + 1, and judges part k + 2 (modulo 3).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.adam import adam

from lib.attacks.membership import calibration_split, checked
from lib.attacks.signals import parallel, threads

HIDDEN = 32  # units of the one hidden layer
RATE = 0.03  # of Adam, falling to 0 by a cosine; high, because the task is simple
BATCH = 2048  # outputs, drawn with replacement
STEPS = 100  # early stopping keeps the best weights on the way
ADAM = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)  # torch's defaults
EVERY = 10  # steps between two looks at the stopping loss
STOP = 20_000  # outputs in the stopping loss, at most
CELLS = 600_000  # outputs (of one model on one example) that the three networks learn and stop on, at most
CLIP = 5.0  # standard deviations; no outlier steers the gradient
BLOCK = 16_384  # outputs that are judged at a time; fewer take longer in Python, more do not stay in the cache


def attack(seen, member, seed=0, groups=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, own, part): log-odds of membership, [M, N] float32 each, and the parts, [M, N] integers 0 to 2.

    scores come from the network that judges an example's part; own, from the one that stopped on it, are for learning
    thresholds. Members and non-members weigh alike, so 0 is undecided. seen: a list of [M, N] arrays. The parts are not
    drawn within classes: a network that reads the class off an output would know something of the part it judges."""
    x = [checked(values, member)[0].ravel() for values in seen]
    member, rng = np.asarray(member), np.random.default_rng(seed)
    part = calibration_split(member, seed, groups=groups, parts=3)
    cells = np.arange(member.size) if member.size <= CELLS else rng.integers(member.size, size=CELLS)
    inside, of_part, drawn = member.ravel(), part.ravel(), np.stack([values[cells] for values in x], -1)
    mean, std = drawn.mean(0), drawn.std(0) + 1e-6

    def scaled(outputs):
        return torch.from_numpy(((outputs - mean) / std).clip(-CLIP, CLIP).astype(np.float32))

    parts = [torch.from_numpy(np.flatnonzero(of_part[cells] == k)) for k in range(3)]
    scores, own = np.empty(member.shape, np.float32), np.empty(member.shape, np.float32)

    def judge(start):
        rows = slice(start, start + BLOCK)
        odds = log_odds(weights, scaled(np.stack([values[rows] for values in x], -1))).numpy()  # [3, block]
        first, second = (of_part[rows] == p for p in (0, 1))
        # part p is judged by network p - 2, and stopped network p - 1
        scores.ravel()[rows] = np.where(first, odds[1], np.where(second, odds[2], odds[0]))
        own.ravel()[rows] = np.where(first, odds[2], np.where(second, odds[0], odds[1]))

    with threads(1):  # so small a network gains nothing from more
        weights = learn(scaled(drawn), torch.from_numpy(inside[cells]).float(), parts, int(rng.integers(2**62)))
    parallel(judge, range(0, member.size, BLOCK))
    return scores, own, part


def log_odds(weights, x):
    """s = w' relu(W x + b) + c of each network: x [n, F] (or [3, n, F], a batch for each network) -> [3, n]."""
    first, bias, last, offset = weights
    hidden = torch.baddbmm(bias, x.expand(3, *x.shape[-2:]), first).relu_()
    # a product of a matrix and a vector for each network is five times as fast as one of three matrices of one column
    return torch.stack([torch.mv(h, w) for h, w in zip(hidden, last[..., 0], strict=True)]) + offset[..., 0]


def learn(x, label, parts, seed):
    """Train the three networks at once: the weights of each one's lowest stopping loss.

    x: [n, F]; label: [n], 1 for members; parts: the indices of the three parts. All networks start alike."""
    random, weight = torch.Generator().manual_seed(seed), torch.empty_like(label)
    for rows in parts:
        share = label[rows].mean()
        # members weigh as much as non-members: w = 1 / (2 share of the kind)
        weight[rows] = 0.5 / torch.where(label[rows] > 0, share, 1 - share)
    shuffled = [rows[torch.randperm(len(rows), generator=random)] for rows in parts]
    stop = torch.stack([shuffled[k - 2][: min(STOP, *map(len, parts))] for k in range(3)])
    batches = torch.stack([rows[torch.arange(STEPS * BATCH) % len(rows)].view(STEPS, BATCH) for rows in shuffled])

    def loss(weights, x, label, weight):
        # l = mean_i w_i (-label_i log sigma(s_i) - (1 - label_i) log(1 - sigma(s_i)))
        return F.binary_cross_entropy_with_logits(log_odds(weights, x), label, weight, reduction="none").mean(1)

    learned, stopped = ([a[rows] for a in (x, label, weight)] for rows in (batches, stop))
    # He et al. (2015), with kinks at drawn outputs; zeros at the end, so that a network starts undecided
    first = torch.randn(x.shape[1], HIDDEN, generator=random) * (2 / x.shape[1]) ** 0.5
    bias = -(x[torch.randint(len(x), (HIDDEN,), generator=random)] * first.T).sum(1)
    start = first, bias[None], torch.zeros(HIDDEN, 1), torch.zeros(1, 1)
    weights = [w.repeat(3, 1, 1).requires_grad_() for w in start]
    lowest, best, counts = torch.full((3,), torch.inf), weights, [torch.zeros(()) for _ in weights]
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    for step in range(STEPS):
        rate = RATE * (1 + np.cos(np.pi * step / STEPS)) / 2
        slopes = torch.autograd.grad(loss(weights, *(a[:, step] for a in learned)).sum(), weights)
        with torch.no_grad():  # a torch.optim.Adam would import the compiler, which takes longer than all the steps
            adam(weights, [*slopes], *moments, [], counts, fused=True, lr=rate, **ADAM)
            if (step + 1) % EVERY == 0:
                now = loss(weights, *stopped)
                better, lowest = (now < lowest)[:, None, None], torch.minimum(now, lowest)
                best = [torch.where(better, w, b) for w, b in zip(weights, best, strict=True)]
    return best

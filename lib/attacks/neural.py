"""The neural attack: a small network learns, from a target's outputs on known members and non-members, who is one.

Shokri et al. (2017, section V); Salem et al. (2019, adversary 1); the black-box attack of Nasr et al. (2019), whose
network too learns from members that the attacker knows. Here it knows one half of the target's pool and judges the
other, and the other way round, as learned thresholds do in `attacks`. No network sees an example that it judges,
neither to learn nor to stop, so a shuffled membership gives AUC and accuracy 1/2.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lib.attacks.intervals import calibration_split, checked
from lib.attacks.signals import parallel, signals

FOLDS = 2  # of a half: each network learns on the others and stops on one; three or four cost more and gain nothing
TOP = 10  # log-probabilities a network sees; three were enough for Salem et al.
HIDDEN = 64  # one layer of 64 units, as in Salem et al. and in Choquette-Choo et al.
RATE = 0.03  # Adam's: high, for what is learned is simple and early stopping takes the best weights on the way
BATCH = 128  # examples; all of a small fold, and enough of a large one for a gradient
STEPS = 100  # at most: early stopping decides
EVERY = 5  # steps between two looks at the validation loss
PATIENCE = 3  # looks without a lower one after which a network stops
CLIP = 5.0  # standard deviations: no example that stands far out steers the gradient
GAP = 50.0  # of features: p = exp(-50) says no more than p = exp(-700)
BLOCK = 1e7  # numbers in the hidden layers of the networks of a block of targets: 40 MB


def attack(logits, y, member, half=None, seed=0, device="cpu", groups=None) -> np.ndarray:
    """Log-odds of membership, scores [M, N] float32, from networks that saw neither the example nor its membership.

    logits: [M, N, C] floats (a memory map too: it is read by blocks of models); y: [N] labels; member: [M, N] bool.
    half: [M, N] bool, halves of equal size of which each is judged by the other's networks; default
    halves(member, seed, groups=groups). Halves drawn within classes would share each class's share of members, and a
    network that sees from an output which class it is would know something of the half it judges: with 1,200 examples
    of 10 classes the AUC on shuffled membership was 0.501. device: of PyTorch, for the networks. groups: [N], what
    belongs together (a patient's two eyes) and stays so in halves and folds. Members and non-members weigh alike, so 0
    is undecided. Raises ValueError for shapes that do not fit, NaN logits, or under 2 FOLDS members or non-members (or
    groups).
    """
    return fit(logits, y, member, half, seed, device, groups)[0]


def fit(logits, y, member, half=None, seed=0, device="cpu", groups=None) -> tuple[np.ndarray, np.ndarray]:
    """(scores of `attack`, own), both [M, N]: own are for thresholds, and come from the networks of the example's half.

    own is by the network that stopped on the example's fold and learned on the other: a threshold learned from own
    in one half is on the scale of the scores in the other, and owes nothing to the examples that it judges there.
    """
    if np.ndim(logits) != 3:
        raise ValueError(f"logits: shape {np.shape(logits)}; valid is [M, N, C]")
    seen = signals(logits, y, only=("phi", "log_confidence"))
    member = _known(seen["phi"], member, groups)
    half = calibration_split(member, seed, groups=groups) if half is None else half
    fold = folds(member, half, y, seed, groups)
    scores, own = np.empty(member.shape, np.float32), np.empty(member.shape, np.float32)
    size = max(1, int(BLOCK // (2 * FOLDS * member.shape[1] * HIDDEN)))
    for start in range(0, len(member), size):
        rows = slice(start, start + size)
        x = features(logits[rows], seen["phi"][rows], seen["log_confidence"][rows])
        parts = [torch.as_tensor(a, device=device) for a in (x, member[rows], half[rows], fold[rows])]
        scores[rows], own[rows] = (s.cpu().numpy() for s in _block(*parts, seed))
    return scores, own


def _known(phi, member, groups=None):
    """member, checked: each part of each half needs both kinds."""
    member = checked(phi, member)[1]
    counted = member if groups is None else member[:, np.unique(groups, return_index=True)[1]]
    fewest, least = np.minimum(counted.sum(1), (~counted).sum(1)), 2 * FOLDS
    for m in np.flatnonzero(fewest < least):
        found = f"row {m} has {fewest[m]} members or non-members{'' if groups is None else ' (groups)'}"
        raise ValueError(f"member: {found}; valid are at least {least} of each")
    return member


def folds(member, half, y, seed=0, groups=None) -> np.ndarray:
    """A random fold within each half, of members and non-members alike and within classes: [M, N] in 0..FOLDS-1.

    groups [N] stay together, as in `metrics.halves`.
    """
    if groups is not None:
        first, own = np.unique(groups, return_index=True, return_inverse=True)[1:]
        return folds(member[:, first], half[:, first], np.asarray(y)[first], seed)[:, own]
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(np.asarray(y)[order], kind="stable")]
    out = np.empty(member.shape, np.int64)

    def fill(m):  # along a random order, each half's members in turn, and its non-members
        kind = 2 * half[m, order] + member[m, order]
        for k in range(4):
            same = order[kind == k]
            out[m, same] = np.arange(len(same)) % FOLDS

    parallel(fill, range(len(member)))
    return out


def features(logits, phi, log_confidence) -> torch.Tensor:
    """What a network sees: the largest log-probabilities in descending order, phi, log p_y; [B, N, min(C, TOP) + 2].

    logits: [B, N, C]; phi, log_confidence: [B, N].
    """
    z = torch.from_numpy(np.array(logits, np.float32))
    top = F.log_softmax(z, -1).topk(min(z.shape[-1], TOP))[0]
    return torch.cat([top, *(torch.from_numpy(s)[..., None] for s in (phi, log_confidence))], -1).clamp(-GAP, GAP)


# ---- all networks of a block of targets ------------------------------------------------------------------


def _block(x, member, half, fold, seed):
    """scores, own [B, N] of B targets. x: [B, N, features]; member, half [B, N] bool; fold [B, N]."""
    learn, stop = _parts(half, fold)
    target = torch.arange(len(x), device=x.device).repeat_interleave(2 * FOLDS)
    learned, stopped = (_gathered(x, member, target, mask) for mask in (learn, stop))
    std, mean = torch.std_mean(learned[0], 1, correction=0, keepdim=True)

    def scaled(x):
        return ((x - mean) / (std + 1e-6)).clamp(-CLIP, CLIP)

    weights = _train((scaled(learned[0]), *learned[1:]), (scaled(stopped[0]), *stopped[1:]), seed)
    found = log_odds(weights, scaled(x[target])).unflatten(0, (len(x), 2, FOLDS))
    # the other half's networks vote: s = mean_k s_{other half, k}
    scores = found.mean(2).gather(1, (~half).long()[:, None])[:, 0]
    own = found.flatten(1, 2).gather(1, (half * FOLDS + fold)[:, None])[:, 0]
    return scores, own


def _parts(half, fold):
    """Who network (b, h, k) learns on, half h but for fold k, and stops on, fold k: two masks [B 2 FOLDS, N]."""
    number = torch.arange(max(2, FOLDS), device=half.device)[:, None]
    inside = half[:, None] == number[:2]  # [B, 2, N]
    mine = fold[:, None] == number[:FOLDS]  # [B, FOLDS, N]
    return ((inside[:, :, None] & part[:, None]).flatten(0, 2) for part in (~mine, mine))


def _gathered(x, member, target, mask):
    """The first n of each network's part: examples [L, n, features], membership and weights [L, n]; n: the fewest."""
    chosen = mask.float().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).min())]
    label = member[target[:, None], chosen].float()
    share = label.mean(1, keepdim=True).clamp(1e-6, 1 - 1e-6)
    # members weigh as much as non-members: w = 1 / (2 share of the kind)
    weight = 0.5 * torch.where(label > 0, 1 / share, 1 / (1 - share))
    return x[target[:, None], chosen], label, weight


def _train(learned, stopped, seed):
    """All L networks at once, by Adam, each with the weights of its lowest validation loss: a list of [L, ...]."""
    random = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62)))
    weights = _initial(learned[0], random)
    optimizer = torch.optim.Adam(weights, RATE, fused=True)
    best = [w.detach().clone() for w in weights]
    lowest, since = torch.full_like(learned[0][:, 0, 0], torch.inf), torch.zeros_like(learned[0][:, 0, 0])
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                _look(weights, stopped, best, lowest, since)
            if (since >= PATIENCE).all():
                break
        # drawn on the CPU, the same for all networks: which others train beside one changes nothing
        batch = torch.randperm(learned[1].shape[1], generator=random)[:BATCH].to(since.device)
        optimizer.zero_grad()
        loss(weights, *(part[:, batch] for part in learned)).sum().backward()
        optimizer.step()
    return best


def _initial(x, random):
    """Random weights (He et al. 2015), the same for each of L networks, and zeros at the output: undecided."""
    first = torch.randn(x.shape[-1], HIDDEN, generator=random) * (2 / x.shape[-1]) ** 0.5
    shared = (first, torch.zeros(1, HIDDEN), torch.zeros(HIDDEN, 1), torch.zeros(1, 1))
    return [w.to(x.device).repeat(len(x), 1, 1).requires_grad_() for w in shared]


def _look(weights, stopped, best, lowest, since):
    """Keep, in place, the weights of each network whose validation loss is its lowest yet and that has not stopped."""
    found = loss(weights, *stopped)
    better = (found < lowest) & (since < PATIENCE)
    since += 1
    since[better] = 0
    for kept, now in zip((lowest, *best), (found, *weights), strict=True):
        kept[better] = now[better]


def log_odds(weights, x) -> torch.Tensor:
    """L networks at their own x [L, n, features]: [L, n]."""
    first, bias, last, offset = weights
    # s = w' relu(W x + b) + c
    return torch.baddbmm(offset, torch.baddbmm(bias, x, first).relu(), last)[..., 0]


def loss(weights, x, label, weight) -> torch.Tensor:
    """Mean weighted cross-entropy of each of L networks, [L]. x: [L, n, features]; label, weight: [L, n]."""
    # l = mean_i w_i (-label_i log sigma(s_i) - (1 - label_i) log(1 - sigma(s_i)))
    return F.binary_cross_entropy_with_logits(log_odds(weights, x), label, weight, reduction="none").mean(1)

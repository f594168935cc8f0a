"""The neural attack: a small network learns to tell members from non-members by a target's outputs.

Shokri et al. (2017, section V); Salem et al. (2019, adversary 1); Nasr et al. (2019), whose black-box attack also
learns from known members. Here the attacker knows one half of the target's pool and judges the other half, and vice
versa. Each half is cut in two quarters. Network q of a target stops early by its loss on quarter q, and learns on the
other quarter of the same half. The mean of a half's two networks judges the other half. No network sees an example that
it judges, so a shuffled membership gives AUC and accuracy 1/2.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lib import need
from lib.attacks.membership import calibration_split, checked
from lib.attacks.signals import signals

TOP = 10  # log-probabilities that a network sees; three were enough for Salem et al.
HIDDEN = 64  # one layer of 64 units, as in Salem et al. and in Choquette-Choo et al.
RATE = 0.03  # of Adam; high, because the task is simple and early stopping keeps the best weights on the way
BATCH = 128  # examples: all of a small quarter, and enough of a large one for a gradient
STEPS = 100  # at most; early stopping decides
EVERY = 5  # steps between two looks at the stopping loss
PATIENCE = 3  # looks without a lower loss after which a network stops
CLIP = 5.0  # standard deviations; no outlier steers the gradient
GAP = 50.0  # of features; p = exp(-50) says no more than p = exp(-700)
BLOCK = 1e7  # numbers in the hidden layers of the networks that train together: 40 MB


def attack(logits, y, member, half=None, seed=0, device="cpu", groups=None) -> tuple[np.ndarray, np.ndarray]:
    """(scores, own): log-odds of membership, each [M, N] float32. Members and non-members weigh alike: 0 is undecided.

    scores come from the networks of the other half. own, from the network that stopped on the example's quarter, are
    for learning thresholds: they have the scale of the other half's scores, and owe those examples nothing.

    logits: [M, N, C] floats (or a memory map, read by blocks of models); y: [N] labels; member: [M, N] bool.
    half: [M, N] bool, default calibration_split(member, seed, groups=groups). It must not be drawn within classes: then
    both halves would have the same share of members in each class, and a network that reads the class off an output
    would know something of the half it judges (AUC 0.501 on shuffled membership). groups [N] (a patient's two eyes)
    stay together in halves and quarters. Raises ValueError for shapes that do not fit, NaN logits, or fewer than 4
    members or non-members (or groups of them).
    """
    need(np.ndim(logits) == 3, f"logits: shape {np.shape(logits)}; valid is [M, N, C]")
    seen = signals(logits, y, only=("phi", "log_confidence"))
    member = checked(seen["phi"], member)[1]
    counted = member if groups is None else member[:, np.unique(groups, return_index=True)[1]]
    for m in np.flatnonzero(np.minimum(counted.sum(1), (~counted).sum(1)) < 4)[:1]:
        found = f"row {m} has {counted[m].sum()} members among {counted.shape[1]} examples (or groups)"
        raise ValueError(f"member: {found}; valid are at least 4 members and 4 non-members")
    half = calibration_split(member, seed, groups=groups) if half is None else half
    quarter = 2 * half + calibration_split(2 * half + member, seed, y, groups)  # [M, N] in 0..3
    size = min((quarter == q).sum(1).min() for q in range(4))  # of a quarter, the same for all networks
    scores, own = np.empty(member.shape, np.float32), np.empty(member.shape, np.float32)
    block = max(1, int(BLOCK // (4 * member.shape[1] * HIDDEN)))  # targets whose networks train together
    for start in range(0, len(member), block):
        rows = slice(start, start + block)
        # a network sees the largest log-probabilities in descending order, phi and log p_y
        log_p = F.log_softmax(torch.from_numpy(np.array(logits[rows], np.float32)), -1)
        top = log_p.topk(min(TOP, log_p.shape[-1]))[0]
        more = [torch.from_numpy(s[rows, :, None]) for s in seen.values()]
        x = torch.cat([top, *more], -1).clamp(-GAP, GAP).to(device)  # [B, N, features]
        inside, part = (torch.as_tensor(a[rows], device=device) for a in (member, quarter))
        odds = log_odds_of_networks(x, inside, part, size, seed)  # [B, 4, N]
        judges = torch.where(part < 2, odds[:, 2:].mean(1), odds[:, :2].mean(1))
        scores[rows], own[rows] = judges.cpu().numpy(), odds.gather(1, part[:, None])[:, 0].cpu().numpy()
    return scores, own


def log_odds_of_networks(x, member, quarter, size, seed):
    """Train the four networks of each target, all at once, and return their log-odds of every example: [B, 4, N].

    x: [B, N, features]; member, quarter: [B, N]; size: examples taken from each quarter. All networks start alike and
    draw the same batches, on the CPU, so a network does not depend on those that train beside it.
    """
    targets = torch.arange(len(x), device=x.device)[:, None, None]
    inside = torch.stack([quarter == q for q in range(4)], 1).int()  # [B, 4, N]
    stop = inside.argsort(descending=True, stable=True)[..., :size]  # the first examples of each quarter
    learn = stop[:, [1, 0, 3, 2]]  # the other quarter of the same half
    std, mean = torch.std_mean(x[targets, learn], 2, correction=0, keepdim=True)  # [B, 4, 1, features]

    def scaled(x):
        return ((x - mean) / (std + 1e-6)).clamp(-CLIP, CLIP).flatten(0, 1)

    def prepared(chosen):
        """Inputs [L, n, features], labels and weights [L, n] of chosen examples, for the L = 4 B networks."""
        label = member[targets, chosen].float()
        share = label.mean(2, keepdim=True).clamp(1e-6, 1 - 1e-6)
        # members weigh as much as non-members: w = 1 / (2 share of the kind)
        weight = 0.5 * torch.where(label > 0, 1 / share, 1 / (1 - share))
        return scaled(x[targets, chosen]), label.flatten(0, 1), weight.flatten(0, 1)

    def log_odds(weights, x):
        first, bias, last, offset = weights
        # s = w' relu(W x + b) + c
        return torch.baddbmm(offset, torch.baddbmm(bias, x, first).relu(), last)[..., 0]

    def loss(weights, x, label, weight):
        # l = mean_i w_i (-label_i log sigma(s_i) - (1 - label_i) log(1 - sigma(s_i)))
        return F.binary_cross_entropy_with_logits(log_odds(weights, x), label, weight, reduction="none").mean(1)

    learned, stopped = prepared(learn), prepared(stop)
    random = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62)))
    # He et al. (2015); zeros at the output, so that a network starts undecided
    first = torch.randn(x.shape[-1], HIDDEN, generator=random) * (2 / x.shape[-1]) ** 0.5
    start = (first, torch.zeros(1, HIDDEN), torch.zeros(HIDDEN, 1), torch.zeros(1, 1))
    weights = [w.to(x.device).repeat(4 * len(x), 1, 1).requires_grad_() for w in start]
    best = [w.detach().clone() for w in weights]  # the weights of the lowest stopping loss
    optimizer = torch.optim.Adam(weights, RATE, fused=True)
    lowest, waited = torch.full((4 * len(x),), torch.inf, device=x.device), torch.zeros(4 * len(x), device=x.device)
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                now = loss(weights, *stopped)
            better = (now < lowest) & (waited < PATIENCE)
            lowest, waited = torch.where(better, now, lowest), torch.where(better, 0, waited + 1)
            best = [torch.where(better[:, None, None], w.detach(), b) for w, b in zip(weights, best, strict=True)]
            if (waited >= PATIENCE).all():
                break
        batch = torch.randperm(size, generator=random)[:BATCH].to(x.device)
        optimizer.zero_grad()
        loss(weights, *(part[:, batch] for part in learned)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return log_odds(best, scaled(x[:, None])).unflatten(0, (len(x), 4))

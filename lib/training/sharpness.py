"""Sharpness-aware rules, and the sharpness of a minimum.

A rule turns a gradient function into the gradient that the base optimizer then uses. It is written for ONE model, and
step.py maps it over the stack. Its first two arguments are

    gradient(params, index=None) -> (grads, aux)    of the mean loss over the batch, or over the examples `index` of it
    params                                          dict of tensors

It returns (grads, aux), with the aux of the pass at the *unperturbed* weights: it holds BatchNorm's new statistics. It
asks for anything else by the names of its arguments (CONTEXT); with `memory` it returns (grads, aux, memory). Any other
argument has a default and is an option: looksam(k=5, alpha=0.7). At radius 0 the base alone is used."""

import math

import torch
from torch.utils._pytree import tree_map

CONTEXT = {
    "rho": "radius of the neighbourhood, a scalar tensor",
    "rate": "learning rate as a share of its peak, a scalar tensor",
    "step": "how many steps were made before this one, a scalar tensor",
    "is_kth_step": "True on every k-th step, the first included, k being an option of the rule",
    "memory": "what the rule returned as memory a step ago: a dict like params, zeros at first",
    "uniform": "uniform random numbers, one for each tensor of params",
    "noise": "standard normal numbers: a dict like params, with a leading axis of `queries` (an attribute of the rule)",
    "size": "number of examples in the batch",
    "losses": "function of params: the loss of every example, [B], by a forward pass alone; then aux.losses is there",
    "per_example": "function of params: the examples' gradient norms [B], function weights [B] -> (weighted sum, aux)",
}
# of the options of the rules; the others may have any value
LIMITS = {"k": (1, math.inf), "m": (1, math.inf), "clip": (1e-12, math.inf), "beta": (0.01, 1), "gamma": (0.01, 1)}
LIMITS |= dict.fromkeys(("low", "decay", "start", "floor"), (0, 1))
LIMITS |= dict.fromkeys(("eta", "alpha", "sigma"), (0, math.inf))
RADIUS = {"asam": 10.0, "sharpreg": -1.0}  # Kwon et al.: 0.5 on CIFAR-10 where SAM has 0.05; SharpReg descends


def norm(tree):
    """Euclidean norm over all the tensors of a dict: a scalar tensor."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in tree.values()]))


def dot(a, b):
    """Inner product of two dicts of tensors: a scalar tensor."""
    return sum((a[name] * b[name]).sum() for name in a)


def ascend(params, direction, rho):
    """w + rho d / |d|, and w itself where d = 0."""
    scale = rho / (norm(direction) + 1e-12)
    return {name: torch.addcmul(weight, scale, direction[name]) for name, weight in params.items()}


def plain(gradient, params):
    """The base optimizer alone: g = grad L(w)."""
    return gradient(params)


def sam(gradient, params, rho):
    """SAM: Foret et al. 2021, "Sharpness-aware minimization for efficiently improving generalization", eq. 2-3."""
    # e(w) = rho grad L(w) / |grad L(w)|
    first, aux = gradient(params)
    # g_SAM = grad L(w + e(w))
    second, _ = gradient(ascend(params, first, rho))
    return second, aux


def asam(gradient, params, rho, eta=0.01):
    """ASAM: Kwon et al. 2021, eq. 6 and section 4 (biases are not normalised). Radius ten times SAM's."""
    first, aux = gradient(params)
    # T_w = |w| + eta on weights, 1 on biases;   e(w) = rho T_w^2 g / |T_w g|
    size = {n: w.abs() + eta if "weight" in n else torch.ones_like(w) for n, w in params.items()}
    scaled = {n: size[n] * g for n, g in first.items()}
    scale = rho / (norm(scaled) + 1e-16)
    second, _ = gradient({n: w + scale * size[n] * scaled[n] for n, w in params.items()})
    return second, aux


def gsam(gradient, params, rho, rate, alpha=0.2, low=0.5):
    """GSAM: Zhuang et al. 2022, "Surrogate gap minimization", algorithm 1. alpha = 0 is SAM at a constant radius;
    low: the radius at learning rate 0, as a share of rho (their ResNets on ImageNet: 0.02 of 0.04)."""
    first, aux = gradient(params)
    # rho_t = rho_min + (rho_max - rho_min) lr_t / lr_max
    second, _ = gradient(ascend(params, first, rho * (low + (1 - low) * rate) if alpha else rho))
    # g = g_SAM - alpha (the part of grad L(w) that is orthogonal to g_SAM)
    along = dot(first, second) / (dot(second, second) + 1e-24)
    return {n: g - alpha * (first[n] - along * g) for n, g in second.items()}, aux


def looksam(gradient, params, rho, is_kth_step, memory, k=5, alpha=0.7, layerwise=False):
    """LookSAM: Liu et al. 2022, algorithm 1: SAM every k-th step, its flat direction reused in between.

    layerwise: norms and angles of each tensor by itself, not of the whole gradient. Limits: docs/limits.md."""
    first, aux = gradient(params)
    other = gradient(ascend(params, first, rho))[0] if is_kth_step else memory
    found = {}
    for part in [[n] for n in params] if layerwise else [list(params)]:
        g, h = ({n: tree[n] for n in part} for tree in (first, other))
        if is_kth_step:
            # g_v = g_SAM - (g_SAM . g / |g|^2) g: what SAM adds at a right angle to the gradient
            along = dot(h, g) / (dot(g, g) + 1e-24)
            found |= {n: h[n] - along * g[n] for n in part}
        else:
            # g + alpha |g| / |g_v| g_v
            scale = alpha * norm(g) / (norm(h) + 1e-12)
            found |= {n: g[n] + scale * h[n] for n in part}
    return (other, aux, found) if is_kth_step else (found, aux, memory)


def msam(gradient, params, rho, size, m=2):
    """mSAM: Behdin et al. 2023, "mSAM: micro-batch-averaged SAM", eq. 4: the mean of m shards' SAM gradients."""
    shards = torch.arange(size, device=next(iter(params.values())).device).tensor_split(m)
    # g = 1/m sum_i grad L_i(w + rho grad L_i(w) / |grad L_i(w)|)
    found = [sam(lambda p, shard=shard: gradient(p, shard), params, rho) for shard in shards]
    return tree_map(lambda *leaves: (sum(leaves) / len(leaves)).to(leaves[0].dtype), *found)


def fsam(gradient, params, rho, step, memory, sigma=1.0, decay=0.9):
    """Friendly-SAM: Li et al. 2024, algorithm 1: a moving average of the gradient, over the steps before (as in their
    code), is subtracted from the ascent. sigma = 0 is SAM."""
    first, aux = gradient(params)
    # d_t = g_t - sigma m_{t-1}
    ahead = {n: g - sigma * memory[n] for n, g in first.items()}
    # m_t = decay m_{t-1} + (1 - decay) g_t, m_0 = g_0
    fade = torch.where(step == 0, 0.0, decay)
    memory = {n: fade * memory[n] + (1 - fade) * g for n, g in first.items()}
    second, _ = gradient(ascend(params, ahead, rho))
    return second, aux, memory


def esam(gradient, params, rho, uniform, losses, beta=0.6, gamma=0.5):
    """ESAM: Du et al. 2022, "Efficient sharpness-aware minimization", algorithm 1, with their CIFAR options: a share
    beta of the tensors, one at least, is perturbed; the share gamma of the batch whose loss rises most is used."""
    first, aux = gradient(params)
    bound = uniform.min().clamp(min=beta)  # with no tensor perturbed, rounding would choose the examples
    chosen = {n: g * (u <= bound) for (n, g), u in zip(first.items(), uniform, strict=True)}
    # e(w) = rho / beta * 1{tensor chosen} g / |g|
    moved = ascend(params, chosen, rho / beta)
    # B+ = the gamma B examples of largest l(w + e) - l(w)
    rise = losses(moved) - aux.losses
    second, _ = gradient(moved, rise.topk(max(1, int(gamma * len(rise)))).indices)
    return second, aux


def swa(gradient, params, start=0.75, floor=0.5):
    """SWA: Izmailov et al. 2018, "Averaging weights leads to wider optima": ensemble.py averages the weights after the
    share `start` of training, from where the learning rate stays at `floor` of its peak."""
    return gradient(params)


RULES = {r.__name__: r for r in (plain, sam, asam, gsam, looksam, msam, fsam, esam, swa)}
RULES["sharpreg"] = sam  # at a negative radius it seeks sharper minima: the defence of arXiv 2310.00488, version 1


def top_eigenvalue(loss, params, steps=100, tolerance=1e-3, seed=0):
    """Largest-magnitude Hessian eigenvalue (a scalar tensor) of `loss`, dict of tensors -> scalar, at `params`.

    By power iteration, until the Rayleigh quotient v'Hv changes by less than the share `tolerance`, or for `steps`
    products: Yao et al. 2020, "PyHessian", section 3."""
    leaves = [p.detach().requires_grad_() for p in params.values()]
    source, value = torch.Generator().manual_seed(seed), torch.zeros(())
    slope = torch.autograd.grad(loss(dict(zip(params, leaves, strict=True))), leaves, create_graph=True)
    vector = {n: torch.randn(p.shape, generator=source).to(p) for n, p in params.items()}
    for _ in range(steps):
        size = norm(vector) + 1e-30
        vector = {n: v / size for n, v in vector.items()}
        # Hv = grad (grad L(w) . v)
        product = torch.autograd.grad(slope, leaves, list(vector.values()), retain_graph=True, materialize_grads=True)
        product = dict(zip(params, product, strict=True))
        # lambda = v'Hv for |v| = 1
        before, value = value, dot(vector, product)
        if abs(value - before) <= tolerance * abs(value):
            break
        vector = product
    return value


def loss_rise_in_ball(loss, params, rho, steps=5):
    """How much the loss can rise within |e| <= rho: max_e L(w + e) - L(w), by `steps` normalised ascent steps.

    A lower bound of the maximum, the inner problem of SAM (Foret et al. 2021, eq. 1), as a scalar tensor."""
    offset = {n: torch.zeros_like(p) for n, p in params.items()}
    for _ in range(steps):
        at = {n: (p + offset[n]).detach().requires_grad_() for n, p in params.items()}
        slope = torch.autograd.grad(loss(at), list(at.values()), materialize_grads=True)
        offset = ascend(offset, dict(zip(params, slope, strict=True)), 2 * rho / steps)
        # back onto the ball: e <- e min(1, rho / |e|)
        shrink = torch.clamp(rho / (norm(offset) + 1e-12), max=1.0)
        offset = {n: e * shrink for n, e in offset.items()}
    return loss({n: p + offset[n] for n, p in params.items()}) - loss(params)

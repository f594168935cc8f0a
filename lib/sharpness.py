"""Sharpness-aware rules, and the sharpness of a minimum.

A rule turns a gradient function into the gradient that the base optimizer then uses. It is written for ONE
model; `ensemble.py` maps it over all of them, each with its own rho. `gradient(params)` returns
`(grads, aux)`, and a rule returns the aux of the pass at the *unperturbed* weights: it holds BatchNorm's new
running statistics, which are therefore updated once a step, whatever the rule.
"""

import torch
from torch.func import grad


def norm(tree):
    """Euclidean norm over all the tensors of a dict: a scalar tensor."""
    return torch.sqrt(sum((leaf * leaf).sum() for leaf in tree.values()))


def ascend(params, direction, rho):
    """w + rho d / |d|, and w itself where d = 0."""
    scale = rho / (norm(direction) + 1e-12)
    return {name: weight + scale * direction[name] for name, weight in params.items()}


def plain(gradient, params, rho):
    """The base optimizer alone: g = grad L(w). rho is ignored."""
    return gradient(params)


def sam(gradient, params, rho):
    """SAM: Foret et al. 2021, "Sharpness-aware minimization for efficiently improving generalization", eq. 2-3."""
    # e(w) = rho grad L(w) / |grad L(w)|
    first, aux = gradient(params)
    # g_SAM = grad L(w + e(w))
    second, _ = gradient(ascend(params, first, rho))
    return second, aux


RULES = {"plain": plain, "sam": sam}


def top_eigenvalue(loss, params, steps=100, tolerance=1e-3, seed=0):
    """Largest-magnitude Hessian eigenvalue of `loss` at `params`, by power iteration on Hessian-vector products.

    loss: dict of tensors -> scalar. Returns the Rayleigh quotient v'Hv (a scalar tensor), once a product changes it
    by less than the share `tolerance`, or after `steps` products.
    Source: Yao et al. 2020, "PyHessian", section 3.
    """
    device = next(iter(params.values())).device
    source = torch.Generator().manual_seed(seed)
    vector = {k: torch.randn(p.shape, generator=source).to(device) for k, p in params.items()}
    value = torch.zeros(())

    def slope_along(params, vector):
        slope = grad(loss)(params)
        return sum((slope[k] * vector[k]).sum() for k in slope)

    for _ in range(steps):
        size = norm(vector) + 1e-30
        vector = {k: v / size for k, v in vector.items()}
        # Hv = grad (grad L(w) . v)
        product = grad(slope_along)(params, vector)
        # lambda = v'Hv for |v| = 1
        before, value = value, sum((vector[k] * product[k]).sum() for k in vector)
        if abs(value - before) <= tolerance * abs(value):
            break
        vector = product
    return value


def ball_rise(loss, params, rho, steps=5):
    """How much the loss can rise within |e| <= rho: max_e L(w + e) - L(w), by `steps` normalised ascent steps.

    loss: dict of tensors -> scalar; rho > 0. A lower bound of the true maximum. Returns a scalar tensor.
    Source: the inner problem of SAM, Foret et al. 2021, eq. 1.
    """
    offset = {k: torch.zeros_like(p) for k, p in params.items()}
    for _ in range(steps):
        slope = grad(loss)({k: params[k] + offset[k] for k in params})
        offset = ascend(offset, slope, 2 * rho / steps)
        # back onto the ball: e <- e min(1, rho / |e|)
        shrink = torch.clamp(rho / (norm(offset) + 1e-12), max=1.0)
        offset = {k: e * shrink for k, e in offset.items()}
    return loss({k: params[k] + offset[k] for k in params}) - loss(params)

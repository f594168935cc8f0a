"""How flat a trained minimum is, and the linear model that a trained network is close to."""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

from lib.attacks import intervals
from lib.data.dataset import inputs
from lib.training import sharpness
from lib.training.ensemble import KEEP_WEIGHTS


def flatness(ensemble, rho, n_models=8, n_examples=512):
    """Sharpness of the first models' minima on (at most n_examples of) their own training halves.

    Returns [models whose weights are kept, 2]: the largest eigenvalue of the Hessian, and how far the loss rises within
    a ball of radius rho > 0.
    """
    x, y = torch.from_numpy(inputs(ensemble.dataset)[0]), torch.from_numpy(ensemble.dataset.y)
    found = []
    kept = [int(k) for k in ensemble.ids[:n_models] if k < KEEP_WEIGHTS]
    for index, k in enumerate(tqdm(kept, "flatness", delay=2, leave=False)):
        net, params, buffers = ensemble.weights(k)
        chosen = np.flatnonzero(ensemble.member[index])[:n_examples]

        def loss(params, net=net, buffers=buffers, chosen=chosen):
            return F.cross_entropy(functional_call(net, (params, buffers), (x[chosen],)), y[chosen])

        pair = sharpness.top_eigenvalue(loss, params), sharpness.loss_rise_in_ball(loss, params, rho)
        found.append([float(value) for value in pair])
    return np.array(found).reshape(-1, 2)


def flatness_table(ensembles, rho):
    """Mean `flatness` of each optimizer's minima, paired differences and log ratios, over pairs of models: tidy."""
    found, frames = {label: flatness(e, rho).reshape(-1, 2, 2).mean(1) for label, e in ensembles.items()}, []
    for column, metric in enumerate(("hessian_top_eigenvalue", "loss_rise_in_ball")):
        values = {label: v[None, :, column] for label, v in found.items()}
        frames.append(intervals.paired(values, metric, False, 0.0, examples_only=True))  # here Student's t, over pairs
    return pd.concat(frames, ignore_index=True)


def tangent_features(ensemble, k, chosen, most=100_000):
    """Gradient of phi in the weights of model k (< 16), at the examples `chosen` of the pool: [len(chosen), P] float64.

    P: all the weights, or only the last layers' while they are at most `most`.
    """
    net, params, buffers = ensemble.weights(k)
    x, y = (torch.from_numpy(a[chosen]) for a in (inputs(ensemble.dataset)[0], ensemble.dataset.y))
    sizes = np.cumsum([p.numel() for p in reversed(params.values())])
    names = list(reversed(params))[: max(1, np.sum(sizes <= most))]

    def phi(some, x, own):
        logits = functional_call(net, ({**params, **some}, buffers), (x[None],))[0]
        # phi = z_y - logsumexp_{j != y} z_j
        return (logits * own).sum() - torch.logsumexp(logits.masked_fill(own, -torch.inf), 0)

    rows = []
    for one, own in zip(x, F.one_hot(y, ensemble.dataset.n_classes).bool(), strict=True):
        some = {n: params[n].detach().requires_grad_() for n in names}
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(phi(some, one, own), list(some.values()))]))
    return torch.stack(rows).double().numpy()

"""How flat a trained minimum is."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

from lib.data.dataset import inputs
from lib.training import sharpness
from lib.training.ensemble import KEEP_WEIGHTS


def flatness(ensemble, rho, n_models=8, n_examples=512, device="cpu"):
    """Largest eigenvalue of the Hessian, and rise of the loss within a ball of radius rho > 0, at the minima of the
    first models whose weights are kept, on (at most n_examples of) their own training halves: [models, 2]."""
    x, y = (torch.from_numpy(part).to(device) for part in (inputs(ensemble.dataset)[0], ensemble.dataset.y))
    found, kept = [], [int(k) for k in ensemble.ids[:n_models] if k < KEEP_WEIGHTS]
    for index, k in enumerate(tqdm(kept, "flatness", delay=2, leave=False)):
        net, *parts = ensemble.weights(k)
        params, buffers = ({name: tensor.detach().to(device) for name, tensor in part.items()} for part in parts)
        chosen = np.flatnonzero(ensemble.member[index])[:n_examples]

        def loss(params, net=net, buffers=buffers, chosen=chosen):
            return F.cross_entropy(functional_call(net, (params, buffers), (x[chosen],)), y[chosen])

        pair = sharpness.top_eigenvalue(loss, params), sharpness.loss_rise_in_ball(loss, params, rho)
        found.append([float(value) for value in pair])
    return np.array(found).reshape(-1, 2)

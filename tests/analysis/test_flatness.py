"""Flatness is paired, and tangent features are derivatives."""

import numpy as np
import pytest
import torch
from torch.func import functional_call

from lib.analysis import flatness
from lib.attacks.signals import signals
from lib.data.dataset import inputs


def test_flatness_is_positive_and_paired(pair):
    frame = flatness.flatness_table(pair, 0.2).set_index(["optimizer", "baseline", "metric"]).value
    for metric in ("hessian_top_eigenvalue", "loss_rise_in_ball"):
        own = frame["sam", "", metric], frame["sgd", "", metric]
        assert own[1] > 0 and frame["sam", "sgd", metric] == pytest.approx(own[0] - own[1])
        assert frame["sam", "sgd", f"log_ratio_{metric}"] == pytest.approx(np.log(own[0] / own[1]))


@pytest.mark.parametrize("most", [10, 100_000])
def test_tangent_features_are_the_slope_of_phi(pair, most):
    ensemble, chosen = pair["sgd"], np.array([3, 50])
    net, params, buffers = ensemble.weights(2)
    found = flatness.tangent_features(ensemble, 2, chosen, most)
    names = list(reversed(params)) if most > 10 else list(reversed(params))[:1]
    direction = {n: torch.randn(params[n].shape, generator=torch.Generator().manual_seed(0)) for n in names}
    x = torch.from_numpy(inputs(ensemble.dataset)[0][chosen]).double()

    def phi(step):
        moved = {n: (p + step * direction[n] if n in direction else p).double() for n, p in params.items()}
        logits = functional_call(net, (moved, buffers), (x,)).detach().numpy()
        return signals(logits, ensemble.dataset.y[chosen], only=("phi",))["phi"].astype(float)

    slope = found @ torch.cat([direction[n].flatten() for n in names]).numpy()
    np.testing.assert_allclose(slope, (phi(1e-3) - phi(-1e-3)) / 2e-3, rtol=1e-2, atol=1e-2)

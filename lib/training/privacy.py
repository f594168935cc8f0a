"""Differential privacy: rules whose gradients are clipped for each example and noised, and the epsilon that this gives.

Neighbours differ by one replaced example: a sum of gradients, each clipped to C, then moves by up to 2 C."""

from decimal import ROUND_UP, Context
from functools import cache, partial
from math import sqrt

import torch
from torch.func import grad, vmap
from torch.nn.modules.module import register_module_forward_hook

from lib.training.networks import Head
from lib.training.sharpness import ascend, norm


def dpsgd(gradient, params, per_example, noise, clip=1.0, sigma=1.0):
    """DP-SGD: Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.

    clip: largest norm of one example's gradient; sigma: deviation of the noise on their sum, in units of clip."""
    norms, weighted_sum = per_example(params)
    # w_i = 1 / max(1, |g_i| / C)
    weight = 1 / (norms / clip).clamp(min=1)
    # g = (sum_i w_i g_i + sigma C N(0, 1)) / B
    total, aux = weighted_sum(weight)
    return {n: (g + sigma * clip * noise[n][0]) / len(weight) for n, g in total.items()}, aux


def dpsam(gradient, params, rho, per_example, noise, clip=1.0, sigma=1.0):
    """DP-SAM: SAM with both of its gradients clipped and noised; options as in `dpsgd`.

    The two-step form that Park et al. 2023, "Differentially private sharpness-aware training", set theirs against."""
    first, aux = dpsgd(gradient, params, per_example, noise, clip, sigma)
    moved, later = ascend(params, first, rho), {n: z[1:] for n, z in noise.items()}
    return dpsgd(gradient, moved, per_example, later, clip, sigma)[0], aux


dpsgd.queries, dpsam.queries = 1, 2  # what a step asks of its batch, each answered with noise


def by_example(loss, params, x, y):
    """What `per_example` gives to a rule, in any network whose examples do not mix: |g_i| of every example, [B], and a
    function of weights [B] that returns sum_i w_i g_i and aux. The gradients g_i are never held at once.

    loss(params, x, y, weight=None) -> (mean loss, or the sum of w_i times loss i; aux), x [B, ...], y [B]."""

    def size(x, y):
        return norm(grad(loss, has_aux=True)(params, x[None], y[None])[0])

    return vmap(size, chunk_size=8)(x, y), lambda weight: grad(loss, has_aux=True)(params, x, y, weight)


def by_layer(loss, params, x, y, net):
    """The same in a network of linear layers on [B, D], from one pass back to the layers' outputs.

    An example's gradient of a layer's weights is the outer product of its input a and the slope d of the loss at its
    output, so its norm is |a| |d|: Goodfellow 2015, "Efficient per-example gradient computations"."""
    names, inputs = {m: name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}, {}

    def total(shifts):
        def shifted(layer, given, output):
            if layer in names:
                inputs[names[layer]] = given[0]
                return output + shifts[names[layer]]

        with register_module_forward_hook(shifted):
            mean, aux = loss(params, x, y)
        return len(y) * mean, (inputs, aux)

    slopes, (seen, aux) = grad(total, has_aux=True)({n: x.new_zeros(len(y), m.out_features) for m, n in names.items()})
    # |g|^2 = sum over layers of |d|^2 |a|^2, and |d|^2 for a bias, where they are trained
    size = {n: a.square().sum(1) * (f"{n}.weight" in params) + (f"{n}.bias" in params) for n, a in seen.items()}

    def weighted_sum(weight):
        scaled = [(n, weight[:, None] * d) for n, d in slopes.items()]
        # sum_i w_i d_i a_i', and sum_i w_i d_i for a bias
        sums = {f"{n}.weight": d.T @ seen[n] for n, d in scaled} | {f"{n}.bias": d.sum(0) for n, d in scaled}
        return {n: sums[n] for n in params}, aux

    return torch.sqrt(sum(d.square().sum(1) * size[n] for n, d in slopes.items())), weighted_sum


def way_for(net):
    """by_layer where the network is a chain of linear layers and activations, else by_example."""
    plain = torch.nn.Flatten, torch.nn.Linear, Head, torch.nn.ReLU, torch.nn.Tanh
    is_chain = isinstance(net, torch.nn.Sequential) and isinstance(net[0], torch.nn.Flatten) and len({*net}) == len(net)
    return partial(by_layer, net=net) if is_chain and all(type(m) in plain for m in net) else by_example


ORDERS = (*range(2, 33), 40, 48, 64)  # of Renyi's divergence: every one gives a valid epsilon, and large ones take long


def accounting(batch_size, n, steps, queries):
    """(function that makes an accountant, function of sigma > 0 that says what it counts), of Google's dp-accounting.

    Each step draws batch_size of the n examples without replacement, whatever was drawn before, and asks `queries`
    questions of them, each answered as in `dpsgd`: Wang, Balle & Kasiviswanathan 2019, theorem 27."""
    import dp_accounting as dp  # here: it takes a second
    from dp_accounting.rdp import RdpAccountant

    def event(sigma):
        # noise / sensitivity = sigma C / (2 C): the accountant's unit is the largest change, replace-one's 2 C
        answer = dp.GaussianDpEvent(sigma / 2)
        # two answers about one batch, sigma each, are one of sigma / sqrt(2): jointly they change by up to sqrt(2) 2 C
        step = dp.SampledWithoutReplacementDpEvent(n, batch_size, dp.SelfComposedDpEvent(answer, queries))
        return dp.SelfComposedDpEvent(step, steps)

    return partial(RdpAccountant, ORDERS, dp.NeighboringRelation.REPLACE_ONE), event


def noise_for(epsilon, batch_size, n, steps, delta, queries=1):
    """The smallest sigma of (epsilon, delta)-privacy, to four significant digits, rounded up; as in `accounting`."""
    # several answers with noise sigma each say as much as one answer with noise sigma / sqrt(queries)
    sigma = noise_of_one(epsilon, batch_size, n, steps, delta) * sqrt(queries)
    return float(Context(prec=4, rounding=ROUND_UP).create_decimal_from_float(sigma))


@cache
def noise_of_one(epsilon, batch_size, n, steps, delta):
    """The smallest sigma for one query a step, within a millionth."""
    from dp_accounting import LowerEndpointAndGuess, calibrate_dp_mechanism

    return calibrate_dp_mechanism(*accounting(batch_size, n, steps, 1), epsilon, delta, LowerEndpointAndGuess(0.01, 1))

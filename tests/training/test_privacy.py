from math import exp

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import brentq
from torch.func import functional_call, grad, vmap

from lib.training import networks, privacy, sharpness

# ---- rules ------------------------------------------------------------------------------------------------------


class Problem:
    """A small network on five examples, in double precision, and what the rules ask for."""

    def __init__(self, seed=0, queries=2):
        torch.manual_seed(seed)
        self.net = networks.build("mlp", (3,), 4).double()
        self.params = {n: p.detach() for n, p in self.net.named_parameters()}
        self.x, self.y = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 3, 1])
        self.noise = {n: torch.randn(queries, *p.shape).double() for n, p in self.params.items()}
        self.rho = torch.tensor(0.3).double()

    def loss(self, params, x, y):
        return F.cross_entropy(functional_call(self.net, params, (x,)), y)

    def gradient(self, params, index=None):
        return grad(self.loss)(params, self.x, self.y), "aux"

    def per_example(self, params):
        each = vmap(grad(self.loss), (None, 0, 0))(params, self.x[:, None], self.y[:, None])

        def weighted_sum(weight):
            return {n: torch.tensordot(weight, g, 1) for n, g in each.items()}, "aux"

        return vmap(sharpness.norm)(each), weighted_sum

    def by_hand(self, params, clip, sigma, noise):
        """One example after another, every tensor flattened into one vector."""
        total = 0
        for i in range(5):
            g = grad(self.loss)(params, self.x[i : i + 1], self.y[i : i + 1])
            flat = torch.cat([t.flatten() for t in g.values()])
            total = total + (flat if flat.norm() <= clip else flat * clip / flat.norm())
        return (total + sigma * clip * torch.cat([z.flatten() for z in noise.values()])) / 5


@pytest.fixture
def problem():
    return Problem()


def flat(grads):
    return torch.cat([g.flatten() for g in grads.values()])


@pytest.mark.parametrize("clip, sigma", [(6.0, 0.0), (7.0, 1.3), (1e-3, 2.0), (100.0, 0.1)])
def test_dpsgd_clips_and_noises_as_a_loop_over_the_examples(problem, clip, sigma):
    found, aux = privacy.dpsgd(None, problem.params, problem.per_example, problem.noise, clip, sigma)
    noise = {n: z[0] for n, z in problem.noise.items()}
    torch.testing.assert_close(flat(found), problem.by_hand(problem.params, clip, sigma, noise))
    assert aux == "aux" and list(found) == list(problem.params)


def test_the_clip_of_the_loop_binds_for_some_examples_and_not_for_others(problem):
    sizes, _ = problem.per_example(problem.params)
    assert sizes.min() < 6 < 7 < sizes.max()


def test_dpsam_takes_both_gradients_privately(problem):
    clip, sigma = 7.0, 1.3
    found, _ = privacy.dpsam(None, problem.params, problem.rho, problem.per_example, problem.noise, clip, sigma)
    first, second = ({n: z[k] for n, z in problem.noise.items()} for k in (0, 1))
    g, at, moved = problem.by_hand(problem.params, clip, sigma, first), 0, {}
    for n, w in problem.params.items():
        moved[n] = w + problem.rho * g[at : at + w.numel()].reshape(w.shape) / g.norm()
        at += w.numel()
    torch.testing.assert_close(flat(found), problem.by_hand(moved, clip, sigma, second))


def test_without_noise_and_clipping_they_are_sgd_and_sam(problem):
    free = {"clip": 1e30, "sigma": 0.0}
    found, _ = privacy.dpsgd(None, problem.params, problem.per_example, problem.noise, **free)
    torch.testing.assert_close(found, problem.gradient(problem.params)[0])
    found, _ = privacy.dpsam(None, problem.params, problem.rho, problem.per_example, problem.noise, **free)
    torch.testing.assert_close(found, sharpness.sam(problem.gradient, problem.params, problem.rho)[0])


def test_at_radius_zero_dpsam_is_dpsgd_on_its_second_noise(problem):
    found, _ = privacy.dpsam(None, problem.params, 0.0, problem.per_example, problem.noise)
    later = {n: z[1:] for n, z in problem.noise.items()}
    again, _ = privacy.dpsgd(None, problem.params, problem.per_example, later)
    torch.testing.assert_close(found, again)


def test_one_example_moves_the_sum_by_no_more_than_twice_the_clip(problem):
    """The sensitivity that the accountant is told, at an example of opposite gradient."""
    before = flat(privacy.dpsgd(None, problem.params, problem.per_example, problem.noise, 0.1, 1.0)[0])
    moves = []
    for value in (-50.0, 50.0):
        problem.x[0] = value
        after = flat(privacy.dpsgd(None, problem.params, problem.per_example, problem.noise, 0.1, 1.0)[0])
        moves.append(5 * (after - before).norm())
    assert 0 < max(moves) <= 0.2 + 1e-12


def test_the_rules_map_over_models():
    problems = [Problem(0), Problem(1)]
    stacked, noise = (
        {n: torch.stack([getattr(p, which)[n] for p in problems]) for n in problems[0].params}
        for which in ("params", "noise")
    )
    x, y = torch.stack([p.x for p in problems]), torch.stack([p.y for p in problems])

    def one(params, noise, x, y):
        def per_example(w):
            return privacy.by_layer(lambda w, x, y: (problems[0].loss(w, x, y), ()), w, x, y, problems[0].net)

        return privacy.dpsam(None, params, 0.3, per_example, noise, 7.0, 0.5)[0]

    found = vmap(one)(stacked, noise, x, y)
    for k, p in enumerate(problems):
        alone, _ = privacy.dpsam(None, p.params, 0.3, p.per_example, p.noise, 7.0, 0.5)
        torch.testing.assert_close({n: g[k] for n, g in found.items()}, alone)


def test_the_rules_say_how_many_noisy_answers_they_use():
    assert (privacy.dpsgd.queries, privacy.dpsam.queries) == (1, 2)


# ---- every example's gradient: its norm, and weighted sums --------------------------------------------------------


class Twice(torch.nn.Module):
    """A layer that is used twice: its gradient is no outer product."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.last(self.layer(torch.tanh(self.layer(x))))


def shared():
    """A chain in which one layer stands twice."""
    layer = torch.nn.Linear(6, 6)
    return torch.nn.Sequential(torch.nn.Flatten(), layer, torch.nn.Tanh(), layer)


@pytest.mark.parametrize(
    "make, shape, by_layer",
    [
        (lambda: networks.build("mlp", (2, 3), 3), (2, 3), True),
        (lambda: networks.build("mlp3_tanh", (6,), 3), (6,), True),
        (lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3, bias=False)), (6,), True),
        (lambda: torch.nn.Linear(6, 3), (6,), False),
        (lambda: networks.build("cnn_plain", (1, 16, 16), 3), (1, 16, 16), False),
        (Twice, (6,), False),
        (shared, (6,), False),
        (lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3), torch.nn.LayerNorm(3)), (6,), False),
    ],
)
def test_norms_and_sums_are_those_of_single_gradients_by_the_way_that_suits_the_network(make, shape, by_layer):
    torch.manual_seed(0)
    net, x, y, weight = make().double(), torch.randn(11, *shape).double(), torch.arange(11) % 3, torch.rand(11).double()
    params = {n: p.detach() for n, p in net.named_parameters()}

    def loss(params, x, y, weight=None):
        losses = F.cross_entropy(functional_call(net, params, (x,)), y, reduction="none")
        return losses.mean() if weight is None else (weight * losses).sum(), losses.mean()

    each = [grad(loss, has_aux=True)(params, x[i : i + 1], y[i : i + 1])[0] for i in range(11)]
    wanted = torch.stack([torch.cat([t.flatten() for t in g.values()]).norm() for g in each])
    total = {n: sum(w * g[n] for w, g in zip(weight, each, strict=True)) for n in params}
    found = privacy.way_for(net)
    assert (found is not privacy.by_example) == by_layer
    for way in (found, privacy.by_example):
        norms, weighted_sum = way(loss, params, x, y)
        torch.testing.assert_close(norms, wanted)
        sums, aux = weighted_sum(weight)
        torch.testing.assert_close(sums, total)
        torch.testing.assert_close(aux, loss(params, x, y)[0])


# ---- the accountant ---------------------------------------------------------------------------------------------


def epsilon_of(sigma, batch_size, n, steps, delta, queries=1):
    """What the accountant says of a training."""
    accountant, event = privacy.accounting(batch_size, n, steps, queries)
    return accountant().compose(event(sigma)).get_epsilon(delta)


def gaussian_delta(epsilon, mu):
    """delta of the Gaussian mechanism with sensitivity / sigma = mu: Balle & Wang 2018, theorem 8."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


def gaussian_epsilon(mu, delta):
    return brentq(lambda e: gaussian_delta(e, mu) - delta, 0, 500)


@pytest.mark.parametrize("sigma, steps, queries", [(20.0, 100, 1), (5.0, 4, 1), (20.0, 50, 2), (200.0, 100, 1)])
def test_on_whole_batches_epsilon_is_just_above_the_exact_one(sigma, steps, queries):
    """T answers with noise sigma C and sensitivity 2 C are one Gaussian mechanism of mu = 2 sqrt(T) / sigma."""
    exact = gaussian_epsilon(2 * np.sqrt(steps * queries) / sigma, 1e-5)
    assert exact < epsilon_of(sigma, 50, 50, steps, 1e-5, queries) < 1.3 * exact


@pytest.mark.parametrize("q, sigma", [(0.5, 1.0), (0.1, 2.0), (0.02, 1.0)])
def test_of_one_drawn_batch_epsilon_is_above_the_exact_one_of_its_worst_case(q, sigma):
    """One example worth +C against -C, the others nothing: with probability q it is in the batch."""
    z = np.linspace(-12 * sigma, 12 * sigma, 200_001)
    p, other = ((1 - q) * stats.norm.pdf(z, 0, sigma) + q * stats.norm.pdf(z, side, sigma) for side in (1, -1))

    def delta(e):
        return np.maximum(p - exp(e) * other, 0).sum() * (z[1] - z[0])

    exact = brentq(lambda e: delta(e) - 1e-4, 0, 50)
    assert exact < epsilon_of(sigma, round(1000 * q), 1000, 1, 1e-4) < gaussian_epsilon(2 / sigma, 1e-4) * 1.3


def test_epsilon_grows_with_steps_batch_and_queries_and_falls_with_noise():
    base = epsilon_of(4.0, 20, 600, 100, 1e-4)
    assert base < epsilon_of(4.0, 20, 600, 200, 1e-4)
    assert base < epsilon_of(4.0, 40, 600, 100, 1e-4)
    assert epsilon_of(8.0, 20, 600, 100, 1e-4) < base < epsilon_of(4.0, 20, 600, 100, 1e-5)
    # two answers of sigma each are one of sigma / sqrt(2)
    two, less = epsilon_of(4.0, 20, 600, 100, 1e-4, 2), epsilon_of(4.0 / np.sqrt(2), 20, 600, 100, 1e-4)
    assert base < two == pytest.approx(less)


@pytest.mark.parametrize("target, queries", [(3.0, 1), (60.0, 2)])
def test_noise_for_is_the_inverse(target, queries):
    sigma = privacy.noise_for(target, 100, 100, 50, 1e-4, queries)
    assert epsilon_of(sigma, 100, 100, 50, 1e-4, queries) <= target
    assert epsilon_of(0.999 * sigma, 100, 100, 50, 1e-4, queries) > target
    assert float(f"{sigma:.4g}") == sigma


def test_noise_for_with_drawn_batches():
    sigma = privacy.noise_for(8.0, 32, 600, 400, 1e-4)
    assert 7.9 < epsilon_of(sigma, 32, 600, 400, 1e-4) <= 8.0


def test_our_own_mlps_go_the_short_way():
    for arch, way in (("mlp", privacy.by_layer), ("mlp3_tanh", privacy.by_layer), ("cnn_plain", privacy.by_example)):
        found = privacy.way_for(networks.build(arch, (1, 8, 8), 3))
        assert getattr(found, "func", found) is way

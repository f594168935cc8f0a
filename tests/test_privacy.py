import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import grad_and_value, vmap

from lib import ensemble, privacy, sharpness
from lib.ensemble import Recipe, train
from tests.conftest import blobs


def problem(n=12, d=5, seed=0):
    """Squared errors of a linear model: params, gradient (of the mean), per_example, noise [2, d]."""
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=draw) * 3, torch.randn(n, generator=draw)
    params = {"w": torch.randn(d, generator=draw)}

    def loss(p, x, y):
        value = 0.5 * (x @ p["w"] - y) ** 2
        return value.mean(), value.mean()

    gradient = grad_and_value(loss, has_aux=True)

    def mean(p, index=None):
        grads, (_, aux) = gradient(p, x, y)
        return grads, aux

    def each(p):
        grads, (_, aux) = vmap(gradient, (None, 0, 0))(p, x, y)
        return grads, aux.mean()

    return params, mean, each, {"w": torch.randn(2, d, generator=draw)}


def test_without_noise_or_clipping_the_private_rules_are_the_plain_ones():
    params, mean, each, noise = problem()
    free = {"clip": 1e30, "sigma": 0.0}
    torch.testing.assert_close(privacy.dpsgd(mean, params, each, noise, **free)[0], mean(params)[0])
    rho = torch.tensor(0.3)
    found, expected = privacy.dpsam(mean, params, rho, each, noise, **free)[0], sharpness.sam(mean, params, rho)[0]
    torch.testing.assert_close(found, expected)


def test_clipping_and_noise_are_a_loop_over_examples():
    params, mean, each, noise = problem()
    grads = each(params)[0]["w"]
    total = torch.zeros(5)
    for g in grads:
        total += g / max(1.0, float(g.norm()) / 2.0)
    expected = (total + 0.7 * 2.0 * noise["w"][0]) / len(grads)
    found, aux = privacy.dpsgd(mean, params, each, noise, clip=2.0, sigma=0.7)
    torch.testing.assert_close(found["w"], expected)
    assert aux == each(params)[1]


def test_dpsam_asks_twice_and_the_second_time_at_the_noisy_worst_point():
    params, mean, each, noise = problem()
    first = privacy.dpsgd(mean, params, each, {"w": noise["w"][:1]}, sigma=0.5)[0]
    there = sharpness.ascend(params, first, torch.tensor(0.4))
    expected = privacy.dpsgd(mean, there, each, {"w": noise["w"][1:]}, sigma=0.5)[0]
    torch.testing.assert_close(privacy.dpsam(mean, params, torch.tensor(0.4), each, noise, sigma=0.5)[0], expected)


@pytest.mark.parametrize("option", [{"clip": 0}, {"clip": -1}, {"sigma": -0.1}])
def test_options_out_of_range_are_named(option):
    params, mean, each, noise = problem()
    with pytest.raises(ValueError, match=next(iter(option))):
        privacy.dpsgd(mean, params, each, noise, **option)


def test_training_without_noise_is_sgd_on_the_same_batches(tmp_path, monkeypatch):
    """The batches differ by design (every one is drawn from all), so the plain run is given the private one's."""
    table = blobs()
    monkeypatch.setattr(ensemble.Group, "shuffled", lambda self, rng, n: rng.permutation(n))
    one = train(Recipe(epochs=2, batch_size=8), table, 2, tmp_path, "cpu", quiet=True)
    free = Recipe(optimizer="dpsgd(clip=1000000.0, sigma=0.0)", epochs=2, batch_size=8)
    two = train(free, table, 2, tmp_path, "cpu", quiet=True)
    np.testing.assert_allclose(one.logits, two.logits, rtol=1e-3, atol=1e-4)


def test_private_batches_are_drawn_anew_from_all_the_examples_at_every_step():
    recipe = Recipe(optimizer="dpsgd", epochs=1, batch_size=20)
    inputs = ensemble.Inputs(blobs(), recipe, torch.device("cpu"))
    group = ensemble.Group(recipe, inputs, [0, 1])
    order = group.shuffled(np.random.default_rng(0), 40).reshape(2, 20)
    assert all(len(set(batch)) == 20 for batch in order.tolist()) and set(order[0]) & set(order[1])


def test_a_batchnorm_network_is_refused(images):
    with pytest.raises(ValueError, match="arch='cnn' has BatchNorm"):
        ensemble.check(Recipe("cnn", "dpsgd", batch_size=8), images, 2)


# ---- the accountant -----------------------------------------------------------------------------------------


def gaussian_epsilon(sigma, delta, sensitivity):
    """Exact epsilon of one Gaussian mechanism by bisection: Balle & Wang 2018, theorem 8."""
    low, high, mu = 0.0, 200.0, sensitivity / sigma
    for _ in range(100):
        e = (low + high) / 2
        spent = stats.norm.cdf(mu / 2 - e / mu) - np.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)
        low, high = (e, high) if spent > delta else (low, e)
    return high


@pytest.mark.parametrize("sigma, steps", [(8.0, 1), (20.0, 10)])
def test_full_batches_are_a_plain_gaussian_under_replacing_one(sigma, steps):
    """Without subsampling the steps are one Gaussian of sigma / sqrt(steps), sensitivity 2: Renyi's bound is near."""
    found = privacy.epsilon(sigma, 100, 100, steps, 1e-3)
    exact = gaussian_epsilon(sigma / np.sqrt(steps), 1e-3, 2.0)
    assert exact <= found <= 1.6 * exact + 0.05


def test_two_answers_cost_what_one_of_less_noise_does():
    two, one = (privacy.epsilon(s, 20, 400, 50, 1e-3, q) for s, q in ((4.0, 2), (4.0 / np.sqrt(2), 1)))
    assert two == pytest.approx(one, rel=1e-6)


def test_epsilon_moves_as_it_must_and_noise_for_is_its_inverse():
    base = privacy.epsilon(3.0, 20, 400, 50, 1e-3)
    assert privacy.epsilon(6.0, 20, 400, 50, 1e-3) < base < privacy.epsilon(3.0, 40, 400, 50, 1e-3)
    assert base < privacy.epsilon(3.0, 20, 400, 100, 1e-3) and privacy.epsilon(0.0, 20, 400, 50, 1e-3) == np.inf
    for queries in (1, 2):
        sigma = privacy.noise_for(8.0, 20, 400, 5, 1e-3, queries)
        assert 7.9 < privacy.epsilon(sigma, 20, 400, 5, 1e-3, queries) <= 8.0


@pytest.mark.parametrize("change, name", [({"sigma": -1}, "sigma"), ({"batch_size": 500}, "batch_size"),
                                          ({"delta": 0}, "delta"), ({"steps": 0}, "steps")])  # fmt: skip
def test_numbers_out_of_range_are_named(change, name):
    with pytest.raises(ValueError, match=name):
        privacy.epsilon(**{"sigma": 1.0, "batch_size": 20, "n": 400, "steps": 50, "delta": 1e-3, **change})


# ---- the bound from below -----------------------------------------------------------------------------------


def test_perfect_separation_certifies_what_the_count_allows():
    """Clopper-Pearson with n of n: TPR >= a^(1/n), FPR <= 1 - a^(1/n), a = 0.025."""
    n, end = 1000, 0.025 ** (1 / 1000)
    assert privacy.epsilon_lower_bound(n, 0, n, n, 0.0) == pytest.approx(np.log(end / (1 - end)))
    assert privacy.epsilon_lower_bound(500, 500, 1000, 1000, 0.0) == 0


def mechanism(sigma, m=40, n=150, seed=0):
    """Scores of a Gaussian mechanism of sensitivity 1 for every model and example, and who was in."""
    rng = np.random.default_rng(seed)
    member = np.repeat(rng.random((m // 2, n)) < 0.5, 2, axis=0)
    member[1::2] = ~member[::2]
    return (member + sigma * rng.normal(size=(m, n))).astype(np.float32), member


def test_the_bound_stays_below_the_truth_and_reaches_for_it():
    sigma, delta = 0.5, 1e-3
    truth = gaussian_epsilon(sigma, delta, 1.0)
    found = [privacy.audited_epsilon(*mechanism(sigma, seed=s), delta) for s in range(40)]
    assert np.mean([f > truth for f in found]) <= 0.1 and np.median(found) > truth / 4


def test_a_useless_attack_certifies_nothing():
    found = [privacy.audited_epsilon(*mechanism(1e6, seed=s), 1e-3) for s in range(20)]
    assert min(found) == 0 and np.mean(np.array(found) > 0) <= 0.1
    scores, member = mechanism(1.0, m=4)
    assert privacy.audited_epsilon(scores, member, 1e-3) == 0  # two pairs say nothing about new models

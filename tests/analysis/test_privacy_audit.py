"""The lower bound on epsilon against closed forms and mechanisms whose epsilon is known."""

from math import exp, log

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from lib.analysis import privacy_audit


def gaussian_epsilon(mu, delta):
    """epsilon of the Gaussian mechanism with sensitivity / sigma = mu: Balle & Wang 2018, theorem 8."""

    def excess(epsilon):
        return stats.norm.cdf(mu / 2 - epsilon / mu) - exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(excess, 0, 500)


@pytest.mark.parametrize("n", [20, 1000])
def test_a_perfect_attack_certifies_the_logarithm_of_its_trials(n):
    """TPR >= a and FPR <= 1 - a with a = 0.025^(1/n): about log(n / 3.7)."""
    a = 0.025 ** (1 / n)
    assert privacy_audit.epsilon_lower_bound(n, 0, n, n, 0.0) == pytest.approx(log(a / (1 - a)))
    assert privacy_audit.epsilon_lower_bound(n, 0, n, n, 0.1) == pytest.approx(log((a - 0.1) / (1 - a)))
    assert privacy_audit.epsilon_lower_bound(n, 0, n, n, 0.0) == pytest.approx(log(n / 3.7), abs=0.2)


def test_the_bound_is_that_of_clopper_and_pearson_in_either_direction():
    high = stats.binomtest(7, 100).proportion_ci(0.9).high
    low = stats.binomtest(60, 80).proportion_ci(0.9).low
    found = privacy_audit.epsilon_lower_bound(60, 7, 80, 100, 1e-3, level=0.9)
    assert found == pytest.approx(log((low - 1e-3) / high))
    # the same attack told the other way round: non-members named, members named wrongly
    assert privacy_audit.epsilon_lower_bound(93, 20, 100, 80, 1e-3, level=0.9) == pytest.approx(found)


@pytest.mark.parametrize("tp, fp", [(0, 0), (50, 50), (0, 50), (100, 100), (20, 60)])
def test_a_useless_attack_certifies_nothing(tp, fp):
    """And so does one that is mostly wrong: it is judged as it was fixed, not turned round."""
    assert privacy_audit.epsilon_lower_bound(tp, fp, 100, 100, 0.01) == 0


@pytest.mark.parametrize(
    "change", [{"tp": 101}, {"fp": -1}, {"delta": -0.1}, {"delta": 1.0}, {"level": 1.0}, {"n_in": 0, "tp": 0}]
)
def test_counts_out_of_range_are_named(change):
    name = next(n for n in change if n != "n_in")
    with pytest.raises(ValueError, match=f"{name}="):
        privacy_audit.epsilon_lower_bound(**({"tp": 5, "fp": 1, "n_in": 100, "n_out": 100, "delta": 0.0} | change))


def complementary(rng, models, examples):
    member = np.zeros((models, examples), bool)
    for k in range(0, models, 2):
        member[k, rng.permutation(examples)[: examples // 2]] = True
        member[k + 1] = ~member[k]
    return member


def coin(rng, member, rates):
    """Says member rightly with probability p, one p for each pair of models: epsilon is log(p / (1 - p)) on average."""
    p = np.repeat(rng.choice(rates, len(member) // 2), 2)[:, None]
    return (rng.random(member.shape) < np.where(member, p, 1 - p)).astype(float)


def audits(n_models, n_examples, draw, delta, repeats=60):
    found = []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        member = complementary(rng, n_models, n_examples)
        found.append(privacy_audit.audited_epsilon(draw(rng, member), member, delta))
    return np.array(found)


def test_the_counts_of_a_gaussian_mechanism_seldom_exceed_its_epsilon():
    """One trial a model: at the best threshold of mu = 1 the claim is tight, so about one in forty bounds is above."""
    mu, delta = 1.0, 0.05
    exact, rng = gaussian_epsilon(mu, delta), np.random.default_rng(0)
    grid = np.linspace(-3, 5, 400)
    best = grid[np.argmax((stats.norm.sf(grid - mu) - delta) / stats.norm.sf(grid))]
    tp, fp = (rng.binomial(20_000, stats.norm.sf(best - m), 300) for m in (mu, 0.0))
    found = np.array(
        [privacy_audit.epsilon_lower_bound(a, b, 20_000, 20_000, delta) for a, b in zip(tp, fp, strict=True)]
    )
    assert np.mean(found > exact) <= 0.05
    assert found.mean() > 0.85 * exact


def test_an_audit_comes_near_the_epsilon_of_a_gaussian_mechanism_and_stays_below():
    found = audits(64, 500, lambda rng, member: rng.normal(size=member.shape) + member, 0.01, repeats=20)
    exact = gaussian_epsilon(1.0, 0.01)
    assert np.mean(found > exact) <= 0.05 and found.mean() > 0.7 * exact


def test_an_audit_of_randomized_response_is_below_where_leakier_models_would_fool_the_counts():
    """Pairs of models with p = 0.5 or 0.9: examples pooled as independent trials claim too much most of the time."""
    true = log(0.7 / 0.3)
    found = audits(16, 100, lambda rng, member: coin(rng, member, (0.5, 0.9)), 0.0)
    assert np.mean(found > true) <= 0.05
    pooled = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        member = complementary(rng, 16, 100)
        said = coin(rng, member, (0.5, 0.9)) > 0
        pooled.append(privacy_audit.epsilon_lower_bound(said[member].sum(), said[~member].sum(), 800, 800, 0.0))
    assert np.mean(np.array(pooled) > true) > 0.3


def test_an_audit_of_noise_is_zero_but_for_chance():
    found = audits(16, 100, lambda rng, member: rng.normal(size=member.shape), 0.0)
    assert (found >= 0).all() and np.mean(found > 0) <= 0.05


def test_an_audit_sees_non_members_named_as_well():
    """A score that is low for some non-members and says nothing else; turned round, the same of members."""

    def draw(rng, member):
        return rng.normal(size=member.shape) - 20 * (~member & (rng.random(member.shape) < 0.2))

    low = audits(16, 200, draw, 0.0, repeats=5)
    high = audits(16, 200, lambda rng, member: -draw(rng, ~member), 0.0, repeats=5)
    assert (low > 1).all() and (high > 1).all()


def test_a_perfect_attack_is_held_to_the_examples_counted_once():
    member = complementary(np.random.default_rng(0), 8, 100)
    a = 0.0125 ** (1 / 100)  # each direction has half of the 5%, each end half of that
    assert privacy_audit.audited_epsilon(member.astype(float), member, 0.0) == pytest.approx(log(a / (1 - a)))


def test_the_threshold_comes_from_other_models():
    """A perfect attack on scores whose scale shifts between the two folds of pairs is of no use on the other fold."""
    member = complementary(np.random.default_rng(0), 16, 100)
    shift = 10.0 * (np.arange(16) // 2 % 2)[:, None]
    assert privacy_audit.audited_epsilon(member + shift, member, 0.0) == 0
    assert privacy_audit.audited_epsilon(member + 0.0, member, 0.0) > 2


def test_the_order_of_the_models_does_not_part_the_pairs():
    rng = np.random.default_rng(1)
    member = complementary(rng, 16, 100)
    scores = coin(rng, member, (0.8,))
    order = np.concatenate([np.arange(0, 16, 2), np.arange(1, 16, 2)])
    found = privacy_audit.audited_epsilon(scores, member, 0.0)
    assert found > 0 and privacy_audit.audited_epsilon(scores[order], member[order], 0.0) == pytest.approx(found)


def test_of_three_pairs_nothing_is_claimed():
    member = complementary(np.random.default_rng(0), 6, 100)
    assert privacy_audit.audited_epsilon(member.astype(float), member, 0.0) == 0.0


def test_an_audit_of_the_impossible_is_refused():
    member = complementary(np.random.default_rng(0), 8, 10)
    with pytest.raises(ValueError, match="delta=1"):
        privacy_audit.audited_epsilon(member.astype(float), member, 1.0)
    with pytest.raises(ValueError, match="level=0"):
        privacy_audit.audited_epsilon(member.astype(float), member, 0.0, level=0)
    with pytest.raises(ValueError, match="scores: shape"):
        privacy_audit.audited_epsilon(np.zeros((8, 9)), member, 0.0)

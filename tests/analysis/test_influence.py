"""Influence, its entropy and the gains by bucket against brute force, the authors' arithmetic and planted effects."""

import numpy as np
import pytest
from scipy import stats

from lib.analysis import influence, memorization
from tests.analysis.test_memorization import coins, halves

RNG = np.random.default_rng(0)


def test_equals_feldman_and_zhangs_arithmetic():
    member, tests = coins(60, 40), coins(60, 25, 0.7, seed=2)

    def dot(x, mask):  # _masked_dot of their published code
        return (np.matmul(x.T, mask) / np.maximum(np.sum(mask, axis=0, keepdims=True), 1e-10)).astype(np.float32)

    expected = (dot(tests, member.astype(float)) - dot(tests, 1 - member.astype(float))).T
    np.testing.assert_allclose(influence.influence(member, tests), expected, atol=1e-6)


def test_influence_on_the_pool_itself_has_memorization_on_its_diagonal():
    member, values = halves(20, 12), RNG.random((20, 12))
    diagonal = np.diag(influence.influence(member, values))
    np.testing.assert_allclose(diagonal, memorization.memorization(values, member).value, atol=1e-6)


def entropy_by_hand(infl, y, y_test, part, same_class):
    """Below the largest possible: log of the number of candidates."""
    out = []
    for j in range(infl.shape[1]):
        chosen = infl[y == y_test[j], j] if same_class else infl[:, j]
        mass = np.maximum(chosen, 0) if part == "positive" else np.abs(chosen)
        out.append(stats.entropy(mass) - np.log(len(mass)) if mass.sum() else 0.0)
    return np.array(out)


@pytest.mark.parametrize("part", ["positive", "absolute"])
@pytest.mark.parametrize("same_class", [True, False])
def test_entropy_is_that_of_the_normalized_influences(part, same_class):
    member, values = coins(40, 30), RNG.random((40, 23))
    y, y_test = np.arange(30) % 3, np.arange(23) % 3
    values[:, 4] = 0.5  # nothing influences this one: the limit
    found = influence.influence_entropy(member, values, y, y_test, part, same_class)
    expected = entropy_by_hand(influence.influence(member, values), y, y_test, part, same_class)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found[4] == 0 and found.max() <= 1e-6


def test_entropy_is_low_for_a_test_point_that_leans_on_one_example():
    member = halves(64, 40)
    values = np.stack([member[:, 0], member[:, :20].mean(1)], 1).astype(float)
    leaning, spread = influence.influence_entropy(member, values, np.zeros(40, int), np.zeros(2, int))
    assert leaning < spread


def test_buckets_are_equal_rising_and_within_groups():
    score = RNG.random(103)
    bucket = influence.buckets(score)
    assert np.ptp(np.bincount(bucket)) <= 1
    assert all(score[bucket == b].max() <= score[bucket == b + 1].min() for b in range(4))
    group = np.arange(103) % 2
    nested = influence.buckets(score, 4, within=group)
    assert all(np.ptp(np.bincount(nested[group == g])) <= 1 for g in (0, 1))
    assert len(set(influence.buckets(np.zeros(50), 5))) == 5  # ties are cut too


def test_entropies_of_a_rare_class_do_not_sink_below_those_of_a_common_one():
    member = halves(32, 40)
    y, y_test = np.repeat([0, 1], [36, 4]), np.array([0, 0, 1])
    values = np.stack([member[:, :18].mean(1), member[:, 0], np.full(32, 0.5)], 1)
    found = influence.influence_entropy(member, values, y, y_test)
    assert found[2] == 0 and found[2] > found[0] > found[1]  # nothing influences the third


SIZES = np.array([741, 69, 145, 25, 18])  # EyePACS' five grades, a fifth of each


@pytest.fixture(scope="module")
def imbalanced():
    """Membership [32, 998], classes of the pool, and of 2,000 test points in the same shares."""
    y = np.repeat(np.arange(5), SIZES)
    return halves(32, len(y)), y, np.random.default_rng(0).permutation(np.repeat(np.arange(5), 2 * SIZES))


def test_noise_lies_equally_far_below_the_maximum_in_classes_of_any_size(imbalanced):
    member, y, y_test = imbalanced
    found = influence.influence_entropy(member, np.random.default_rng(1).normal(size=(32, len(y_test))), y, y_test)
    # of the positive part z of N(0, 1): H - log n = log E[z] - E[z log z] / E[z] = -log(2 pi) / 2 - (log 2 - gamma) / 2
    expected = -np.log(2 * np.pi) / 2 - (np.log(2) - np.euler_gamma) / 2
    assert expected == pytest.approx(-0.98, abs=0.005)
    for c, size in enumerate(SIZES):
        assert found[y_test == c].mean() == pytest.approx(expected, abs=0.08), size


@pytest.mark.parametrize("kind", ["noise", "one model errs", "no model errs"])
def test_where_all_is_noise_every_bucket_holds_the_classes_in_their_shares(imbalanced, kind):
    member, y, y_test = imbalanced
    rng, m, t = np.random.default_rng(2), *(len(a) for a in (member, y_test))
    values = rng.normal(size=(m, t)) if kind == "noise" else np.ones((m, t))
    if kind == "one model errs":  # on half of the test points; nothing influences the others
        values[rng.integers(m, size=t), np.arange(t)] = rng.random(t) < 0.5
    bucket = influence.buckets(influence.influence_entropy(member, values, y, y_test), classes=y_test)
    assert np.ptp(np.bincount(bucket)) <= 1
    for b in range(5):
        np.testing.assert_allclose(np.bincount(y_test[bucket == b], minlength=5), 2 * SIZES / 5, atol=2)
    quiet = (values == values[0]).all(0)  # nothing influences these: they come last, in random order
    if quiet.any():
        assert bucket[quiet].min() >= (2 if kind == "one model errs" else 0)
        assert abs(np.corrcoef(np.flatnonzero(quiet), bucket[quiet])[0, 1]) < 0.1


def test_a_class_that_leans_on_few_examples_keeps_its_order_within():
    score, classes = np.concatenate([np.arange(20), np.arange(10) - 50.0]), np.repeat([0, 1], [20, 10])
    found = influence.buckets(score, 5, classes=classes)
    np.testing.assert_array_equal(found[:20], np.arange(20) // 4)
    np.testing.assert_array_equal(found[20:], np.arange(10) // 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: influence.influence(halves(8, 6), np.ones((7, 4))), "values, member: "),
        (lambda: influence.buckets(np.ones(4), 5), "n=5 buckets; valid are 2 to 4"),
        (lambda: influence.buckets(np.ones(4), 1), "n=1"),
    ],
)
def test_bad_input_is_one_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()

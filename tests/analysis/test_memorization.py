"""Memorization against closed forms, brute force and the authors' own arithmetic."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from lib.analysis import memorization
from lib.data.dataset import pool
from lib.training.recipe import Recipe, membership
from tests.conftest import blobs

RNG = np.random.default_rng(0)


def coins(m, n, p=0.5, seed=0):
    return np.random.default_rng(seed).random((m, n)) < p


def halves(m, n):
    return membership(Recipe(), n, range(m))


def ridge(x, y, chosen, penalty=1.0):
    """Predictions [N] on all examples of ridge regression on the chosen ones."""
    xs = x[chosen]
    return x @ np.linalg.solve(xs.T @ xs + penalty * np.eye(x.shape[1]), xs.T @ y[chosen])


def leave_one_out(x, y, chosen, i, penalty=1.0):
    """f_S(x_i) - f_(S without i)(x_i) in closed form: h (y - f) / (1 - h), with the leverage h."""
    xs = x[chosen]
    h = x[i] @ np.linalg.solve(xs.T @ xs + penalty * np.eye(x.shape[1]), x[i])
    return h * (y[i] - ridge(x, y, chosen, penalty)[i]) / (1 - h)


@pytest.fixture(scope="module")
def regression():
    """Ten examples, all 1,024 subsets, ridge predictions on each, and the mean exact leave-one-out difference."""
    x, y = RNG.normal(size=(10, 3)), RNG.normal(size=10)
    subsets = np.array(list(itertools.product([False, True], repeat=10)))
    predicted = np.stack([ridge(x, y, s) for s in subsets])
    truth = [np.mean([leave_one_out(x, y, s, i) for s in subsets[subsets[:, i]]]) for i in range(10)]
    return subsets, predicted, np.array(truth)


def test_over_all_subsets_the_estimate_is_exact_leave_one_out(regression):
    subsets, predicted, truth = regression
    np.testing.assert_allclose(memorization.memorization(predicted, subsets).value, truth, atol=1e-12)
    assert np.abs(truth).max() > 0.1


@pytest.mark.parametrize("m", [32, 512])
def test_the_standard_error_is_the_spread_about_leave_one_out(regression, m):
    subsets, predicted, truth = regression
    z = []
    for seed in range(200):
        drawn = np.random.default_rng(seed).integers(len(subsets), size=m)
        found = memorization.memorization(predicted[drawn], subsets[drawn])
        z.append((found.value - truth) / found.se)
    assert np.abs(np.mean(z)) < 0.15 and np.sqrt(np.mean(np.square(z))) == pytest.approx(1, abs=0.12)


def test_equals_feldman_and_zhangs_arithmetic():
    member, hits = coins(60, 40), coins(60, 40, 0.8, seed=1)

    def average(x, mask):  # _masked_avg of their published code
        return (np.sum(x * mask, axis=0) / np.maximum(np.sum(mask, axis=0), 1e-10)).astype(np.float32)

    expected = average(hits, member.astype(float)) - average(hits, 1 - member.astype(float))
    np.testing.assert_allclose(memorization.memorization(hits, member).value, expected, atol=1e-6)


def test_mean_memorization_is_accuracy_in_minus_accuracy_out():
    member, hits = halves(16, 50), coins(16, 50, 0.7, seed=3)
    found = memorization.memorization(hits, member).value.mean()
    assert found == pytest.approx(hits[member].mean() - hits[~member].mean(), abs=1e-12)
    assert found != 0


def test_the_standard_error_of_a_proportion_is_agresti_and_caffos_and_never_zero():
    member = halves(8, 6)
    found = memorization.memorization(np.ones((8, 6), bool), member)
    # 4 of 4 on both sides: p = 5/6, p (1 - p) / 6 twice
    np.testing.assert_allclose(found.se, np.sqrt(2 * 5 / 36 / 6))
    numbers = RNG.random((8, 6))
    one = memorization.memorization(numbers, member)
    inside, outside = numbers[member[:, 0], 0], numbers[~member[:, 0], 0]
    assert one.se[0] == pytest.approx(np.sqrt(inside.var(ddof=1) / 4 + outside.var(ddof=1) / 4))


def test_bands_are_the_issues():
    found = memorization.bands(np.array([-0.2, 0.0999, 0.1, 0.4, 0.6 - 1e-12, 0.7, 0.85, 1.0]))
    assert found.tolist() == [0, 0, 1, 2, 3, 3, 4, 4]


def test_published_scores_are_correlated_by_rank_with_both_and_the_difference_is_paired():
    member, (rng, hard) = halves(64, 150), (np.random.default_rng(0), np.linspace(0, 1, 150))
    a, b = (np.where(member, 1.0, 1 - hard) + noise * rng.normal(size=member.shape) for noise in (0.1, 2.0))
    frame = memorization.memorization_table({"sgd": a, "sam": b}, member, published=1 - hard**3)
    found = frame[frame.metric == "memorization_spearman_published"].set_index(["optimizer", "baseline"])
    own = [stats.spearmanr(memorization.memorization(v, member).value, 1 - hard**3)[0] for v in (a, b)]
    np.testing.assert_allclose(found.value, [*own, own[1] - own[0]], atol=1e-9)
    assert own[0] < -0.95 and found.ci_low["sam", "sgd"] > 0 and found.ci_high["sgd", ""] < -0.9
    plain = memorization.memorization_table({"sgd": a, "sam": b}, member)
    assert plain.equals(frame[~frame.metric.str.contains("published")].reset_index(drop=True))


def test_the_jackknife_covers_a_mean_over_models_and_examples():
    hit, widths = 0, []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(40, 1)) / 3 + rng.normal(size=60) / 3 + rng.normal(size=(40, 60))
        member = np.zeros(values.shape, bool)
        member[::2] = True
        found = memorization.jackknife(lambda r, c, v=values: [v[np.ix_(r, c)].mean()], member)[0]
        hit += found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    assert 0.9 <= hit / 150 <= 1 and np.mean(widths) < 0.6
    # an ideal interval has a width of 2 * 1.96 * sqrt(1/9/40 + 1/9/60 + 1/2400) = 0.28


def test_the_table_is_paired_and_holds_the_identity():
    member = halves(24, 80)
    a = np.where(member, coins(24, 80, 0.95, 4), coins(24, 80, 0.6, 5))
    b = np.where(member, a, a | coins(24, 80, 0.2, 6))  # the same, but better on what it did not see
    frame = memorization.memorization_table({"sgd": a, "sam": b}, member)
    frame = frame.set_index(["optimizer", "baseline", "metric"]).sort_index()
    means = frame.value[:, :, "mean_memorization"]
    assert means["sam", "sgd"] == pytest.approx(means["sam", ""] - means["sgd", ""])
    assert frame.ci_high["sam", "sgd", "mean_memorization"] < 0
    for name in ("sgd", "sam"):
        assert frame.value[name, ""].filter(like="share").sum() == pytest.approx(1)
    assert 0 < frame.value["sam", "sgd", "memorization_spearman"] <= 1


def test_exposure_is_the_auc_of_each_example():

    member, scores = halves(30, 5), RNG.integers(0, 6, (30, 5)).astype(float)
    expected = [roc_auc_score(member[:, i], scores[:, i]) for i in range(5)]
    np.testing.assert_allclose(memorization.exposure(scores, member), expected)


def test_planting_changes_what_it_says_and_nothing_else():
    dataset = blobs()
    planted, wrong, copied = memorization.plant(dataset, 4, [3, 5], copies=2)
    assert (planted.y[wrong] != dataset.y[wrong]).all() and copied.shape == (2, 2)
    np.testing.assert_array_equal(planted.x[copied], dataset.x[[3, 5]][:, None].repeat(2, 1))
    same = np.setdiff1d(np.arange(len(dataset.y)), np.concatenate([wrong, copied.ravel()]))
    np.testing.assert_array_equal(planted.x[same], dataset.x[same])
    np.testing.assert_array_equal(planted.y[same], dataset.y[same])
    assert planted.hash != dataset.hash and not {3, 5} & {*wrong, *copied.ravel()}
    wrong_only = memorization.plant(dataset, 20, seed=1)[0]
    assert (wrong_only.y != dataset.y).sum() == 20 and (wrong_only.y_test == dataset.y_test).all()
    assert (wrong_only.x == dataset.x).all() and set(wrong_only.y) <= set(range(dataset.n_classes))


def test_a_leak_is_one_example_many_times_in_one_group_and_one_other_less():
    dataset = blobs()
    planted, place = memorization.leak(dataset, 7, times=20, seed=1)
    same = (planted.x == dataset.x[7]).all(1)
    assert len(planted.y) == len(dataset.y) + 18 and same.sum() == 20 and same[place]
    assert (planted.y[same] == dataset.y[7]).all() and len(set(planted.groups[same])) == 1
    assert len(set(planted.groups[~same])) == (~same).sum() == len(dataset.y) - 2  # each other is its own group
    lost = set(range(len(dataset.y))) - set(planted.index)
    assert len(lost) == 1 and dataset.y[lost.pop()] == dataset.y[7]
    np.testing.assert_array_equal(planted.x, dataset.x[planted.index])
    assert planted.hash != dataset.hash and (memorization.leak(dataset, 7, 20, 1)[0].index == planted.index).all()
    member = membership(Recipe(), len(planted.y), range(8), planted.groups)
    assert (member[:, same].sum(1) % 20 == 0).all() and (member[::2, place] != member[1::2, place]).all()
    assert (member.sum(1) == len(planted.y) // 2).all()


def test_a_leaks_copies_join_the_examples_patient():
    eyes = replace(blobs(n=100), groups=np.arange(100) // 2, index=np.arange(100) + 5)
    planted, place = memorization.leak(eyes, 40, times=30)
    kin = planted.groups == planted.groups[place]
    assert kin.sum() == 31 and {45, 46} == set(planted.index[kin])
    member = membership(Recipe(), len(planted.y), range(8), planted.groups)
    assert (member[:, kin].sum(1) % 31 == 0).all()


@pytest.mark.parametrize("times", [1, 3, 0, 80, 200])
def test_a_leak_that_does_not_fit_into_half_of_the_pool_is_refused(times):
    with pytest.raises(ValueError, match=f"times={times}.* 78 "):
        memorization.leak(blobs(), 7, times)
    assert len(memorization.leak(blobs(), 7, 78)[0].y) == 156


def test_every_example_is_named_by_its_index_in_the_data_as_loaded():
    whole = blobs()
    part = pool(pool(whole, 40, seed=1), 20, seed=2)
    np.testing.assert_array_equal(whole.x[part.index], part.x)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: memorization.memorization(np.ones((7, 6)), halves(8, 6)), "values, member: "),
        (lambda: memorization.memorization(np.ones((8, 6)), halves(8, 6).astype(int)), "values, member: .*int64"),
        (lambda: memorization.memorization(np.ones((2, 6)), halves(2, 6)), "n_models=2: .* only 1;"),
        (lambda: memorization.memorization(np.ones((8, 6)), np.ones((8, 6), bool)), "n_models=8: .* only 0;"),
    ],
)
def test_bad_input_is_one_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""The label-only attack against loops over pixels, its limits, and models trained for it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lib.attacks import catalogue, intervals, label_only, thresholds
from lib.attacks.intervals import auc_influence_values
from lib.training.ensemble import Recipe, train
from tests.conftest import blobs


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    recipe, folder = Recipe(epochs=15, batch_size=10, rho=0.2), tmp_path_factory.mktemp("store")
    data = blobs(n=120, t=60)
    return {o: train(replace(recipe, optimizer=o), data, 10, folder, "cpu", quiet=True) for o in ("sgd", "sam")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    recipe, data = Recipe("cnn", epochs=3, batch_size=8), blobs(n=48, t=16, shape=(3, 16, 16), classes=3)
    return train(recipe, data, 8, tmp_path_factory.mktemp("store"), "cpu", quiet=True)


def plain(x):
    yield x


def linear(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2 * 5 * 7, 4)).eval()


# ---- queries -----------------------------------------------------------------------------------------------


def reflected(index, size):
    index = abs(index)
    return 2 * (size - 1) - index if index >= size else index


def test_shifts_equal_loops_over_pixels():
    x = torch.randn(2, 3, 5, 7)
    seen, twin = list(label_only.shifted(x, 2)), []
    for down in range(-2, 3):
        for right in range(-2, 3):
            image = torch.empty_like(x)
            for i in range(5):
                for j in range(7):
                    image[:, :, i, j] = x[:, :, reflected(i + down, 5), reflected(j + right, 7)]
            twin += [image, torch.stack([image[..., 6 - j] for j in range(7)], -1)]
    assert len(seen) == len(twin) == 50
    assert all(torch.equal(a, b) for a, b in zip(seen, twin, strict=True))
    assert torch.equal(seen[24], x)  # no shift stands in the middle


@pytest.mark.parametrize("side, queries", [(5, 18), (8, 18), (16, 50), (24, 50), (32, 162)])
def test_number_of_shifts_grows_with_the_image(side, queries):
    x = torch.zeros(1, 1, side, side)
    counts = [len(list(of(x))) for of in label_only.shifts(x)]
    assert counts == [18, 50, 162][: len(counts)] and counts[-1] == queries


def test_bits_flip_at_their_rates_and_features_get_noise_of_their_own_scale():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (400, 100)).astype(np.float32))
    found = [list(queries(x)) for queries in label_only.noises(x)]
    assert len(found) == len(label_only.FLIPS)
    for (first, *copies), flips in zip(found, label_only.FLIPS, strict=True):
        assert torch.equal(first, x) and len(copies) == label_only.COPIES
        assert all(((c == 0) | (c == 1)).all() for c in copies)
        assert np.mean([(c != x).float().mean() for c in copies]) == pytest.approx(flips / 100, rel=0.02)
    x = torch.randn(400, 6) * torch.tensor([0.0, 0.1, 1, 2, 3, 10])
    for (_, *copies), strength in zip((list(q(x)) for q in label_only.noises(x)), label_only.NOISE, strict=True):
        spread = (torch.stack(copies) - x).std((0, 1))
        np.testing.assert_allclose(spread, strength * x.std(0), rtol=0.03)


def test_noise_is_the_same_in_each_run_and_differs_between_seeds():
    x = torch.randn(10, 4)
    first, again, other = (torch.stack(list(label_only.noises(x, seed)[2](x))) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- shares ------------------------------------------------------------------------------------------------


def test_shares_equal_counts_over_single_images(monkeypatch):
    monkeypatch.setattr(label_only, "BATCH", 4)
    x, y, nets = torch.randn(9, 2, 5, 7), np.arange(9) % 4, [linear(0), linear(1)]
    found = label_only.shares(nets, x, y, partial(label_only.shifted, most=1))
    for m, net in enumerate(nets):
        for i in range(9):
            hits = [int(net(seen).argmax()) == y[i] for seen in label_only.shifted(x[i : i + 1], 1)]
            assert found[m, i] == pytest.approx((hits[8] + np.mean(hits)) / 2)  # the ninth is the example as it is
    assert found.dtype == np.float32 and 0 < found.mean() < 1


def test_one_plain_query_is_the_gap_attack(images, tables):
    for ensemble in (images, tables["sgd"]):
        x = torch.from_numpy(label_only.data.inputs(ensemble.dataset)[0])
        nets = [label_only.network(ensemble, k) for k in range(8)]
        found = label_only.shares(nets, x, ensemble.dataset.y, plain)
        gap = catalogue.run(np.array(ensemble.logits), ensemble.dataset.y, np.array(ensemble.member))["gap"]
        np.testing.assert_array_equal(found, gap[:8])


def test_a_constant_model_says_nothing():
    member = np.arange(8) < 4
    y = np.array([0, 1, 2, 3] * 2)
    found = label_only.shares(
        [lambda x: torch.zeros(len(x), 4)], torch.randn(8, 2, 5, 7), y, partial(label_only.shifted, most=1)
    )
    np.testing.assert_array_equal(found[0], y == 0)
    assert auc_influence_values(found, member[None]).mean() == 0.5


def test_right_further_from_the_boundary_scores_higher():
    """One feature, decided by its sign: the share is Phi(|x| / s), so it orders by distance."""
    x = torch.linspace(0.05, 1.0, 20)[:, None]
    found = label_only.shares(
        [lambda x: torch.cat([-x, x], 1)],
        x,
        np.ones(20, int),
        label_only.noisy(lambda p, r: p + 0.5 * label_only.normal(p, r), 0),
    )
    from scipy import stats

    expected = stats.norm.cdf(x[:, 0].numpy() / 0.5) * 50 / 51 + 1 / 51
    np.testing.assert_allclose(2 * found[0] - 1, expected, atol=4 * 0.5 / np.sqrt(50))
    assert stats.spearmanr(found[0], x[:, 0]).statistic > 0.9


# ---- strengths and the whole ---------------------------------------------------------------------------------


def leaky(seed=0, n=100, strengths=(0.2, 1.0)):
    rng = np.random.default_rng(seed)
    half = np.argsort(rng.random((4, n)), axis=1) < n // 2
    member = np.stack([half, ~half], 1).reshape(8, n)
    return np.stack([rng.normal(size=(8, n)) + s * member for s in strengths]), member


def test_each_fold_takes_the_strength_that_is_best_in_the_other():
    found, member = leaky()
    np.testing.assert_array_equal(label_only.chosen(found, member), found[1])
    found[:, [0, 1, 4, 5]] = found[::-1, [0, 1, 4, 5]]  # in the first fold the other strength is best
    fold = np.isin(np.arange(8), [0, 1, 4, 5])
    np.testing.assert_array_equal(label_only.chosen(found, member), np.where(fold[:, None], found[1], found[0]))


def test_null_of_the_choice_is_one_half_and_choosing_on_oneself_is_not():
    aucs, selfish = [], []
    for seed in range(150):
        found, member = leaky(seed, 30, strengths=(0,) * 5)
        aucs.append(auc_influence_values(label_only.chosen(found, member), member).mean())
        selfish.append(max(auc_influence_values(s, member).mean() for s in found))
    assert abs(np.mean(aucs) - 0.5) < 4 * np.std(aucs) / np.sqrt(150)
    assert np.mean(selfish) - 0.5 > 4 * np.std(selfish) / np.sqrt(150)


def test_scores_of_trained_models_find_members_and_no_shuffled_ones(tables):
    found, ids = label_only.scores(tables["sgd"])
    member = np.array(tables["sgd"].member)
    assert ids.tolist() == list(range(10)) and found.shape == (10, 120) and found.dtype == np.float32
    assert intervals.estimate(auc_influence_values(found, member)).low > 0.5
    null = np.mean([auc_influence_values(found, catalogue.null_member(member, s)).mean() for s in range(20)])
    assert null == pytest.approx(0.5, abs=0.02)
    again, few = label_only.scores(tables["sgd"].only(range(2, 10)), 8)
    assert few.tolist() == list(range(2, 8)) + [8, 9] and again.shape == (8, 120)


def test_scores_of_images_are_the_shares_of_the_shifted(images):
    found, ids = label_only.scores(images, 8)
    assert ids.tolist() == list(range(8))
    whole = [np.abs(found * 2 * q - np.round(found * 2 * q)) < 1e-3 for q in (1, 18, 50)]  # a strength's queries
    assert np.any([w.all(1) for w in whole], axis=0).all()
    assert auc_influence_values(found, np.array(images.member)).mean() > 0.5


def test_one_example_is_asked_as_among_all(tables, images):
    found, ids = label_only.answers(images, 8)
    one, same = label_only.of_one(images, 5, 8)
    np.testing.assert_array_equal(found[1][:, [5]], one)
    assert ids.tolist() == same.tolist()
    found, _ = label_only.scores(tables["sgd"], 8)
    np.testing.assert_array_equal(found[:, [5]], label_only.of_one(tables["sgd"], 5, 8)[0])


def test_no_example_that_is_wrong_as_it_is_outranks_one_that_is_right(images, tables):
    for ensemble in (images, tables["sgd"]):
        found, _ = label_only.answers(ensemble, 8)
        right = catalogue.run(np.array(ensemble.logits), ensemble.dataset.y, np.array(ensemble.member))["gap"][:8] > 0
        np.testing.assert_array_equal(found[0], right)  # the first strength is none
        assert all(scores[right].min() > 0.5 > scores[~right].max() for scores in found)


def test_table_has_both_attacks_each_optimizer_and_the_paired_difference(tables):
    pair = {"sgd": tables["sgd"], "sam": tables["sam"].only([0, 1, 2, 3, 6, 7, 8, 9])}
    frame = label_only.table(pair)
    auc = frame[frame.metric == "auc"].set_index(["attack", "optimizer", "baseline"]).value
    ids, y = [0, 1, 2, 3, 6, 7, 8, 9], tables["sgd"].dataset.y
    for name, ensemble in pair.items():
        member = np.array(ensemble.only(ids).member)
        scores = label_only.scores(ensemble.only(ids))[0]
        assert auc["label_only", name, ""] == pytest.approx(auc_influence_values(scores, member).mean())
        by_class = thresholds.classwise(scores, member, y)
        assert auc["label_only_classwise", name, ""] == pytest.approx(auc_influence_values(by_class, member).mean())
    difference = auc["label_only", "sam", ""] - auc["label_only", "sgd", ""]
    assert auc["label_only", "sam", "sgd"] == pytest.approx(difference)
    own = (frame.optimizer == "sam") & (frame.baseline == "")
    accuracy = frame[(frame.metric == "balanced_accuracy") & own].set_index("attack").value
    assert accuracy["label_only_classwise"] == pytest.approx(
        intervals.balanced_accuracy_influence_values(by_class, member, 0.0).mean()
    )


def test_too_few_models_are_named(tables):
    with pytest.raises(ValueError, match="n_models: only 6 models .* 8 are needed"):
        label_only.table({"sgd": tables["sgd"], "sam": tables["sam"].only(range(6))})
    with pytest.raises(ValueError, match="n_models=7 is not valid"):
        label_only.scores(tables["sgd"], 7)
    with pytest.raises(ValueError, match="n_models: only 6 "):  # a half pair does not count
        label_only.scores(tables["sgd"].only([0, 1, 2, 3, 4, 5, 6]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_agree(images):
    found = [label_only.scores(images, 8, device=device)[0] for device in ("cpu", "cuda")]
    np.testing.assert_allclose(*found, atol=0.05)


def test_the_null_control_is_at_one_half(tables):
    frame = label_only.table(tables, 10)
    null = frame[frame.metric == "null_auc"].set_index("optimizer")
    assert list(null.index) == ["sgd", "sam"] and null.value.between(0.4, 0.6).all()
    member = np.array(tables["sgd"].member)
    rng = np.random.default_rng(0)
    noise = np.stack([rng.random(member.shape) for _ in range(3)])
    assert label_only.null_auc(noise, member).value == pytest.approx(0.5, abs=0.03)

"""The label-only attack against loops over pixels, closed forms and its limits. Models are plain functions."""

import numpy as np
import pytest
import torch
from scipy import stats

from lib.attacks import label_only
from lib.attacks.intervals import auc_influence_values


def linear(seed=0):
    """A random linear classifier of images [2, 5, 7] into 4 classes."""
    weights = torch.randn(2 * 5 * 7, 4, generator=torch.Generator().manual_seed(seed))
    return lambda batch: (batch.flatten(1) @ weights).argmax(-1)


# ---- queries -----------------------------------------------------------------------------------------------


def reflected(index, size):
    index = abs(index)
    return 2 * (size - 1) - index if index >= size else index


def test_shifts_equal_loops_over_pixels():
    x = torch.randn(2, 3, 5, 7)
    seen, twin = list(label_only.shifted(x, (2, 2))), []
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
    counts = [len(list(asked(x))) for asked in label_only.queries(x, True)]
    assert counts == [18, 50, 162][: len(counts)] and counts[-1] == queries


@pytest.mark.parametrize("shape, queries", [
    ((20, 200), [18, 50, 90, 90, 90]), ((72, 64), [18, 50, 162, 162]), ((1, 9), [6]), ((1, 40), [6, 10, 18]),
    ((9, 1), [6]), ((1, 1), []), ((2, 2), [18])
])  # fmt: skip
def test_every_side_is_shifted_by_at_most_an_eighth_of_itself(shape, queries):
    x = torch.arange(float(shape[0] * shape[1])).reshape(1, 1, *shape)
    found = [list(asked(x)) for asked in label_only.queries(x, True)]
    assert [len(seen) for seen in found] == queries and all(one.shape == x.shape for seen in found for one in seen)
    for seen in found:
        assert torch.equal(seen[len(seen) // 2 - 1], x)  # no shift stands in the middle
    answers = label_only.answers([lambda batch: torch.zeros(len(batch))], x, np.zeros(1), True)
    assert answers.shape == (1 + len(queries), 1, 1) and (answers == 1).all()


def test_bits_flip_at_their_rates_and_features_get_noise_of_their_own_scale():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (400, 100)).astype(np.float32))
    found = [list(asked(x)) for asked in label_only.queries(x, False)]
    assert len(found) == len(label_only.FLIPS)
    for (first, *copies), flips in zip(found, label_only.FLIPS, strict=True):
        assert torch.equal(first, x) and len(copies) == label_only.COPIES
        assert all(((c == 0) | (c == 1)).all() for c in copies)
        assert np.mean([(c != x).float().mean() for c in copies]) == pytest.approx(flips / 100, rel=0.02)
    x = torch.randn(400, 6) * torch.tensor([0.0, 0.1, 1, 2, 3, 10])
    found = [list(asked(x)) for asked in label_only.queries(x, False)]
    for (_, *copies), strength in zip(found, label_only.NOISE, strict=True):
        spread = (torch.stack(copies) - x).std((0, 1))
        np.testing.assert_allclose(spread, strength * x.std(0), rtol=0.03)


def test_noise_is_the_same_in_each_run_and_differs_between_seeds():
    x = torch.randn(10, 4)
    first, again, other = (torch.stack(list(label_only.queries(x, False, seed)[2](x))) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- answers -----------------------------------------------------------------------------------------------


def test_answers_equal_counts_over_single_images(monkeypatch):
    monkeypatch.setattr(label_only, "BATCH", 4)
    x, y, models = torch.randn(9, 2, 5, 7), np.arange(9) % 4, [linear(0), linear(1)]
    found = label_only.answers(models, x, y, is_image=True)
    assert found.shape == (2, 2, 9) and found.dtype == np.float32
    for m, model in enumerate(models):
        for i in range(9):
            hits = [int(model(seen)) == y[i] for seen in label_only.shifted(x[i : i + 1], (1, 1))]
            assert found[0, m, i] == hits[8]  # the ninth is the example as it is
            assert found[1, m, i] == pytest.approx((hits[8] + np.mean(hits)) / 2)


def test_noise_is_drawn_once_for_all_models():
    x, y = torch.randn(300, 3), np.zeros(300, int)
    models = [lambda batch, j=j: (batch @ torch.tensor([1.0, j, 0.0]) > 0).long() for j in range(3)]
    together = label_only.answers(models, x, y, is_image=False)
    alone = [label_only.answers([model], x, y, is_image=False) for model in models]
    np.testing.assert_array_equal(together, np.concatenate(alone, axis=1))


def test_no_example_that_is_wrong_as_it_is_outranks_one_that_is_right():
    x, y = torch.randn(40, 2, 5, 7), np.arange(40) % 4
    found = label_only.answers([linear(0), linear(1)], x, y, is_image=True)
    right = found[0] > 0
    assert right.any() and not right.all()
    assert all(s[right].min() >= 0.5 >= s[~right].max() for s in found)


def test_a_constant_model_says_nothing():
    member, y = np.arange(8) < 4, np.array([0, 1, 2, 3] * 2)
    found = label_only.answers([lambda batch: torch.zeros(len(batch))], torch.randn(8, 2, 5, 7), y, is_image=True)
    for scores in found:
        np.testing.assert_array_equal(scores[0], y == 0)
        assert auc_influence_values(scores, member[None]).mean() == 0.5


def test_right_further_from_the_boundary_scores_higher():
    """One feature, decided by its sign: the share of right answers is Phi(|x| / s), so it orders by distance."""
    x = torch.linspace(0.05, 1.0, 20)[:, None]
    found = label_only.answers([lambda batch: (batch[:, 0] > 0).long()], x, np.ones(20, int), is_image=False)
    for strength, (scores,) in zip(label_only.NOISE, found[1:], strict=True):
        expected = stats.norm.cdf(x[:, 0] / (strength * x.std(correction=0))) * 50 / 51 + 1 / 51
        np.testing.assert_allclose(2 * scores - 1, expected, atol=4 * 0.5 / np.sqrt(50))
    assert stats.spearmanr(found[-1, 0], x[:, 0]).statistic > 0.9


# ---- choosing a strength -------------------------------------------------------------------------------------


def leaky(seed=0, n=100, strengths=(0.2, 1.0)):
    """Answers [S, 8, n] that leak more at some strengths, and the membership of 4 complementary pairs."""
    rng = np.random.default_rng(seed)
    half = np.argsort(rng.random((4, n)), axis=1) < n // 2
    member = np.stack([half, ~half], 1).reshape(8, n)
    return np.stack([rng.normal(size=(8, n)) + s * member for s in strengths]).astype(np.float32), member


def test_each_fold_takes_the_strength_that_is_best_in_the_other():
    found, member = leaky()
    np.testing.assert_array_equal(label_only.scores(found, member), found[1])
    found[:, [0, 1, 4, 5]] = found[::-1, [0, 1, 4, 5]]  # in the first fold the other strength is best
    fold = np.isin(np.arange(8), [0, 1, 4, 5])
    np.testing.assert_array_equal(label_only.scores(found, member), np.where(fold[:, None], found[1], found[0]))


def test_null_of_the_choice_is_one_half_and_choosing_on_oneself_is_not():
    aucs, selfish = [], []
    for seed in range(50):
        found, member = leaky(seed, 30, strengths=(0,) * 5)
        aucs.append(auc_influence_values(label_only.scores(found, member), member).mean())
        selfish.append(max(auc_influence_values(s, member).mean() for s in found))
    assert abs(np.mean(aucs) - 0.5) < 4 * np.std(aucs) / np.sqrt(50)
    assert np.mean(selfish) - 0.5 > 4 * np.std(selfish) / np.sqrt(50)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_agree():
    weights = torch.randn(5, 3)
    found = [
        label_only.answers([lambda b: (b @ weights.to(b)).argmax(-1)], torch.randn(50, 5), np.arange(50) % 3, False,
                           device=device)
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    np.testing.assert_allclose(*found, atol=0.05)

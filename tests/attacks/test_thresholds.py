"""Thresholds on one model's output, against loops and closed forms."""

import numpy as np
import pytest

from benchmarks.calibration import halves_of_pool
from lib.attacks import catalogue, thresholds
from lib.attacks.intervals import balanced_accuracy_influence_values
from lib.attacks.membership import calibration_split
from tests.attacks.simulated import leaky


def best_threshold(s, member):
    """All thresholds tried: midpoints of neighbours, and the largest score."""
    values = np.unique(s)
    candidates = [*((values[1:] + values[:-1]) / 2), values[-1]]
    gains = [np.mean(s[member] > t) - np.mean(s[~member] > t) for t in candidates]
    return candidates[int(np.flatnonzero(np.isclose(gains, max(gains), atol=1e-12))[0])]


@pytest.mark.parametrize("ties", [False, True])
def test_classwise_equals_loops_over_targets_classes_and_thresholds(ties):
    scores, member = leaky(n_models=4, n=120)
    if ties:
        scores = np.round(scores)
    y = np.array([7, 3, 5])[np.arange(120) % 3]
    y[:3] = 9  # a class of three: one half must lack a kind
    half, fallbacks = calibration_split(member, 4, y), 0
    fast = thresholds.classwise(scores, member, y, half)
    for m in range(4):
        for h in (False, True):
            for c in np.unique(y):
                use = (half[m] == h) & (y == c)
                if not (member[m, use].any() and (~member[m, use]).any()):
                    use, fallbacks = half[m] == h, fallbacks + 1
                t = best_threshold(scores[m, use], member[m, use])
                judged = (half[m] != h) & (y == c)
                np.testing.assert_allclose(fast[m, judged], scores[m, judged] - t, atol=1e-5)
    assert fallbacks


def test_classwise_beats_one_threshold_where_classes_differ():
    scores, member = leaky(n_models=8, n=600, leak=2.0)
    y = np.arange(600) % 3
    scores = scores + 10 * y
    learned = balanced_accuracy_influence_values(scores, member).mean()
    by_class = thresholds.classwise(scores, member, y, calibration_split(member, 0, y))
    assert balanced_accuracy_influence_values(by_class, member, 0.0).mean() > learned + 0.1


def test_best_thresholds_per_group():
    # group 0: best to flag none, though its largest score ties with the next group's smallest; 2: no members
    s, member = np.array([1.0, 2, 2, 3, 0, 9]), np.array([True, False, False, True, False, False])
    group = np.array([0, 0, 1, 1, 2, 2], np.uint16)
    np.testing.assert_array_equal(thresholds.best_thresholds(s, member, group, 4), [2, 2.5, np.nan, np.nan])


def test_gap_and_yeom_equal_their_closed_forms():
    rng = np.random.default_rng(0)
    member, y = halves_of_pool(rng, 6, 80), rng.integers(0, 3, 80)
    logits = rng.normal(size=(6, 80, 3)) + 2 * member[..., None] * np.eye(3)[y]
    out = catalogue.run(logits, y, member, seed=3, only=catalogue.ALONE)
    correct = logits.argmax(-1) == y
    gap = [correct[m, member[m]].mean() - correct[m, ~member[m]].mean() for m in range(6)]
    assert balanced_accuracy_influence_values(out["gap"], member, 0.0).mean() == pytest.approx(0.5 + np.mean(gap) / 2)
    loss = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, y[None, :, None], 2)[..., 0]
    half = calibration_split(member, 3, y)
    for m in range(6):
        for h in (False, True):
            mean = loss[m, member[m] & (half[m] == h)].mean()
            judged = half[m] != h
            assert ((out["loss"][m, judged] > 0) == (loss[m, judged] < mean)).all()
            np.testing.assert_allclose(np.exp(out["loss"][m, judged]), mean / loss[m, judged], rtol=1e-4)

"""Partners and pairs in any order, and how members and non-members are split."""

import numpy as np
import pytest

from benchmarks.calibration import halves_of_pool
from lib.attacks import intervals, shadow
from lib.attacks.membership import calibration_split, partners


def test_halves_split_members_and_non_members_of_every_class():
    member = halves_of_pool(np.random.default_rng(0), 8, 60)
    y = np.arange(60) % 4
    half = calibration_split(member, 1, y)
    for m in range(8):
        for inside in (member[m], ~member[m]):
            assert abs(half[m, inside].sum() - half[m, y == 0][inside[y == 0]].sum() - 11) < 4
            for c in range(4):
                chosen = inside & (y == c)
                assert abs(half[m, chosen].sum() - chosen.sum() / 2) <= 0.5
            assert abs(calibration_split(member, 1)[m, inside].sum() - inside.sum() / 2) <= 0.5
    assert (calibration_split(member, 1) != calibration_split(member, 2)).any()


def test_thirds_are_equal_and_partners_share_them():
    member = halves_of_pool(np.random.default_rng(0), 6, 122)
    third = calibration_split(member, 1, parts=3)
    for inside in (member, ~member):
        for k in range(3):
            assert (np.abs((inside & (third == k)).sum(1) - 61 / 3) < 1).all()
    np.testing.assert_array_equal(third[::2], third[1::2])
    assert (third[0] != third[2]).any()


def test_halves_keep_groups_whole():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 2))
    member = np.random.default_rng(1).permuted(np.tile(np.arange(30) < 15, (6, 1)), axis=1)[:, groups]
    half = calibration_split(member, 1, groups % 3, groups)
    for m in range(6):
        for group in range(30):
            assert len(set(half[m, groups == group])) == 1
        assert abs(half[m, member[m]].sum() - 15) <= 4 and abs(half[m, ~member[m]].sum() - 15) <= 4
    with pytest.raises(ValueError, match="row 0 has 1 .*members .*at least 2"):
        calibration_split(member, 1, groups=groups // 30)


def test_logits_in_any_order_of_models_get_the_same_scores_and_intervals():
    """Complements need not stand at (2k, 2k+1): shuffled rows are recognised, scored and clustered alike."""
    rng = np.random.default_rng(5)
    member = np.zeros((12, 150), bool)
    for k in range(0, 12, 2):
        member[k, rng.permutation(150)[:75]] = True
        member[k + 1] = ~member[k]
    phi, order = rng.normal(size=member.shape) + member, rng.permutation(12)
    straight, shuffled = shadow.lira(phi, member), shadow.lira(phi[order], member[order])
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-4, atol=1e-4)
    first, second = (
        intervals.table({"": straight}, member, fprs=()),
        intervals.table({"": straight[order]}, member[order], fprs=()),
    )
    np.testing.assert_allclose(first[["value", "ci_low", "ci_high"]], second[["value", "ci_low", "ci_high"]], atol=1e-9)
    assert partners(rng.random((4, 9)) < 0.5) is None

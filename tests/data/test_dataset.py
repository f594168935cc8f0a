"""lib.data.dataset: arrays in any form become one Dataset; pools, groups, model inputs and duplicates."""

import dataclasses

import numpy as np
import pytest

from lib.data.dataset import Dataset, inputs, load, pool, validate
from lib.training.recipe import Recipe, membership
from tests.data.files import npz

RNG = np.random.default_rng(0)
X, Y = RNG.normal(3, 2, (40, 5)).astype(np.float32), np.arange(40) % 4


def toy(counts=(6, 9, 25), n_test=30):
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.arange(len(y), dtype=np.float32)[:, None]
    return Dataset("toy", x, y, x[:n_test], np.arange(n_test) % len(counts), ("a", "b", "c"))


def test_npz_twins_have_one_hash_and_one_byte_changes_it(tmp_path):
    d = load("npz", npz(tmp_path, x=X, y=Y, x_test=X, y_test=Y))
    forms = [{"y": np.eye(4)[Y]}, {"y": Y.astype(float)}, {"y": Y.astype(np.uint8)}, {"x": X.astype(">f8")}]
    for form in forms:
        assert load("npz", npz(tmp_path, **{"x": X, "y": Y, "x_test": X, "y_test": Y, **form})).hash == d.hash
    other = load("npz", npz(tmp_path, features=X, labels=Y, features_test=X, labels_test=Y, ids=np.array([{}])))
    assert other.hash == d.hash and not d.is_image and d.classes == ("0", "1", "2", "3")
    for part in ("x", "y", "x_test", "y_test"):
        changed = getattr(d, part).copy()
        changed.view(np.uint8).flat[0] ^= 1
        assert dataclasses.replace(d, **{part: changed}).hash != d.hash
    assert dataclasses.replace(d, classes=("0", "1", "2", "x")).hash != d.hash


def test_npz_groups_may_be_names(tmp_path):
    numbers = np.arange(40) // 2
    first, second = (load("npz", npz(tmp_path, x=X, y=Y, groups=g)) for g in (numbers, np.char.mod("p%02d", numbers)))
    assert first.hash == second.hash and (first.groups == second.groups).all()


def test_the_groups_of_the_test_part_are_kept_and_drawn_with_it(tmp_path):
    numbers = np.repeat(np.arange(len(Y) // 2), 2)
    whole = load("npz", npz(tmp_path, x=X, y=Y, groups=numbers))
    assert whole.groups_test.shape == whole.y_test.shape and set(np.bincount(whole.groups_test)) == {2}
    fewer = pool(whole, n_test=len(whole.y_test) - 1)
    assert fewer.groups_test.shape == fewer.y_test.shape and sorted(np.bincount(fewer.groups_test))[0] == 1
    assert load("npz", npz(tmp_path, x=X, y=Y)).groups_test is None


def test_npz_split_and_labels(tmp_path):
    d = load("npz", npz(tmp_path, x=X, y=np.array([7, -2, 30, 5])[Y]))
    assert d.classes == ("-2", "5", "7", "30") and sorted(np.bincount(d.y_test)) == [2, 2, 3, 3]
    named = load("npz", npz(tmp_path, x=X, y=np.array(["c", "a", "d", "b"])[Y]))
    assert named.classes == ("a", "b", "c", "d") and (named.y == d.y).all() and (named.x == d.x).all()
    rows = [(X == row).all(axis=1).argmax() for row in [*d.x, *d.x_test]]  # where each one stood in the file
    assert sorted(rows) == list(range(40))
    assert [d.classes[c] for c in [*d.y, *d.y_test]] == [("7", "-2", "30", "5")[row % 4] for row in rows]


@pytest.mark.parametrize("shape,expected", [
    ((40, 6, 7, 3), (3, 6, 7)), ((40, 3, 6, 7), (3, 6, 7)), ((40, 6, 7, 1), (1, 6, 7)),
    ((40, 1, 5, 3), (1, 5, 3)), ((40, 6, 7), (1, 6, 7)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz_images_become_channels_first(tmp_path, shape, expected, dtype):
    x = RNG.integers(0, 256, shape).astype(dtype)
    d = load("npz", npz(tmp_path, x=x, y=Y, x_test=x, y_test=Y))
    assert d.x.shape[1:] == expected and d.x.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    last = shape[-1] in (1, 3) and shape[1] not in (1, 3)
    np.testing.assert_array_equal(d.x, np.moveaxis(x, 3, 1) if last else x.reshape(40, *expected))


@pytest.mark.parametrize("arrays,match", [
    ({"x": X}, r"holds the arrays \['x'\]; needed are x, y"),
    ({"x": X, "y": Y, "x_test": X}, "y_test"),
    ({"x": X, "y": Y[:-1]}, r"x is float32 \[40, 5\] and y int64 \[39\]"),
    ({"x": X, "y": Y, "x_test": X, "y_test": Y[:-1]}, r"x_test is .*\[40, 5\] and y_test int64 \[39\]"),
    ({"x": X, "y": Y, "x_test": X[:, :4], "y_test": Y}, r"x_test .*\[40, 4\].*\[5\]"),
    ({"x": X.astype(object), "y": Y}, "x: Object arrays.*numpy.savez"),
    ({"x": X.astype(str), "y": Y}, "x is <U"),
    ({"x": np.where(X == X[3, 2], np.nan, X), "y": Y}, "NaN"),
    ({"x": X.astype(float) * 1e300, "y": Y}, "infinity"),
    ({"x": X[:0], "y": Y[:0]}, r"x is float32 \[0, 5\].*N > 0"),
    ({"x": X[0], "y": Y}, "x is float32"),
    ({"x": np.zeros((40, 5, 5, 5)), "y": Y}, "axis 1 or 3"),
    ({"x": X, "y": np.eye(4)[Y] * 0.9}, "y is .*one-hot rows"),
    ({"x": X, "y": np.eye(4)[Y] + np.eye(4)[0]}, "y is .*one-hot rows"),
    ({"x": X, "y": Y + 0.5}, "y is float64 .*whole numbers"),
    ({"x": X, "y": np.where(Y == 1, np.nan, Y)}, "y is float64 .*whole numbers"),
    ({"x": X, "y": Y.astype(bytes)}, r"y is \|S"),
    ({"x": X, "y": Y, "x_test": X, "y_test": Y + 1}, r"labels \[4\]"),
    ({"x": X, "y": Y * 0}, "at least two classes"),
    ({"x": X, "y": np.where(np.arange(40) == 5, 9, Y)}, "class '9' has 1"),
])  # fmt: skip
def test_bad_npz(tmp_path, arrays, match):
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("npz", npz(tmp_path, **arrays))


def test_pool_is_stratified_even_and_set_by_its_seed():
    d = toy()
    p, same, other = pool(d, 20, seed=1), pool(d, 20, seed=1), pool(d, 20, seed=2)
    assert np.bincount(p.y).tolist() in ([3, 4, 13], [3, 5, 12]) and len(np.unique(p.x)) == 20
    assert p.hash == same.hash != other.hash and (np.diff(p.x[:, 0]) < 0).any()
    np.testing.assert_array_equal(d.y[p.x[:, 0].astype(int)], p.y)
    assert np.bincount(pool(d, 6).y).tolist() == [2, 2, 2]
    assert pool(d).hash == d.hash and sorted(pool(d, 40).x) == sorted(d.x) and pool(d, 40).hash != d.hash
    assert len(pool(toy((6, 9, 26))).y) == 40
    assert np.bincount(pool(d, n_test=15).y_test).tolist() == [5, 5, 5] and len(pool(d, n_test=15).y) == 40


@pytest.mark.parametrize("name,value", [("n_examples", v) for v in (7, 42, 4, 2, 0, -2, 8.5, True)]
                         + [("n_test", v) for v in (0, 31)] + [("seed", -1)])  # fmt: skip
def test_bad_pools(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: needs"):
        pool(toy(), **{name: value})


def test_validate_a_dataset_made_by_hand():
    d = toy()
    bad = [("y", d.y + 1), ("y", d.y - 1), ("y_test", d.y_test + 1), ("y", d.y.astype(float)), ("x", d.x[1:])]
    bad += [("x", d.x.astype(object)), ("x_test", d.x_test + np.inf), ("y", np.where(d.y == 0, 1, d.y))]
    for part, value in bad:
        with pytest.raises(ValueError, match=r"^(x|y|x_test|y_test)\b.*(needed|valid)"):
            validate(dataclasses.replace(d, **{part: value}))
    assert validate(d) is d


def test_inputs_are_normalised_by_the_pool(tmp_path):
    x = RNG.integers(0, 256, (40, 3, 4, 4)).astype(np.uint8)
    x[:, 2] = 7  # a constant channel
    d = load("npz", npz(tmp_path, x=x, y=Y, x_test=x[:8] // 2, y_test=Y[:8]))
    z, z_test = inputs(d)
    scaled, mean, std = x[:, :2] / 255, x[:, :2].mean((0, 2, 3)) / 255, x[:, :2].std((0, 2, 3)) / 255
    np.testing.assert_allclose(z[:, :2], (scaled - mean[:, None, None]) / std[:, None, None], atol=1e-5)
    expected = (d.x_test[:, :2] / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(z_test[:, :2], expected, atol=1e-5)
    assert z.dtype == z_test.dtype == np.float32 and not z[:, 2].any() and not z_test[:, 2].any()
    assert d.x.dtype == np.uint8 and d.x[0, 2, 0, 0] == 7


def test_inputs_of_features(tmp_path):
    x = np.hstack([X, np.full((40, 1), 1e6 / 3, np.float32)])
    z, _ = inputs(load("npz", npz(tmp_path, x=x, y=Y, x_test=x, y_test=Y)))
    np.testing.assert_allclose(z[:, :5], (X - X.mean(0)) / X.std(0), atol=1e-5)
    assert not z[:, 5].any()


def halves(groups):
    """Whether half of the examples can be had in whole groups: by the set of all sums."""
    sums = {0}
    for size in np.bincount(groups):
        sums |= {total + size for total in sums}
    return len(groups) / 2 in sums


def grouped(sizes, seed=0, classes=3):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    y = np.random.default_rng(seed).permutation(np.arange(len(groups)) % classes)
    x = np.arange(len(groups), dtype=np.float32)[:, None]
    return Dataset("toy", x, y, x, y, tuple("abc"[:classes]), groups=groups)


@pytest.mark.parametrize("sizes,n,expected", [
    ([2] * 15, None, 28), ([2] * 15, 24, 24), ([1] * 11 + [2] * 12, None, 34), ([1] * 11 + [2] * 12, 26, 26),
    ([3] * 10, None, 30), ([1, 2, 3, 4, 5] * 3, None, 30), ([4] * 7 + [1, 1], None, 26),
])  # fmt: skip
def test_pool_draws_whole_groups_that_make_two_halves(sizes, n, expected):
    d = grouped(sizes)
    p, same = pool(d, n, seed=3), pool(d, n, seed=3)
    old = d.groups[p.x[:, 0].astype(int)]  # x is the place in d
    assert p.hash == same.hash and halves(p.groups) and len(p.y) == expected
    assert all((d.groups == g).sum() == (old == g).sum() for g in np.unique(old))
    assert (
        np.unique(p.groups).tolist() == list(range(len(np.unique(old)))) and (d.y[p.x[:, 0].astype(int)] == p.y).all()
    )
    assert [len(set(old[p.groups == g])) for g in range(p.groups.max() + 1)] == [1] * (p.groups.max() + 1)


def test_a_pool_of_groups_is_stratified_and_says_which_number_is_valid():
    d = grouped([2] * 300)
    top = [max(d.y[d.groups == g]) for g in range(300)]
    p = pool(d, 200, seed=1)
    share = np.bincount([max(p.y[p.groups == g]) for g in range(100)]) / 100
    np.testing.assert_allclose(share, np.bincount(top) / 300, atol=0.02)
    assert len(pool(d).y) == 600 and pool(d).hash == d.hash and (pool(pool(d, 400), 80, seed=2).index < 600).all()
    with pytest.raises(ValueError, match="n_examples=30: .*whole groups have 28 in all; choose that"):
        pool(d, 30)
    with pytest.raises(ValueError, match="whole groups have 0 in all"):
        pool(grouped([40]))


@pytest.mark.parametrize("sizes", [[2] * 40, [1] * 11 + [2] * 20, [1, 1] + [2] * 31])
@pytest.mark.parametrize("seed", range(5))
def test_a_pool_of_pairs_can_be_halved_for_training(sizes, seed):
    p = pool(grouped(sizes), seed=seed)
    member = membership(Recipe(), len(p.y), range(6), p.groups)
    assert (member.sum(axis=1) == len(p.y) / 2).all() and (member[::2] != member[1::2]).all()
    assert all(len(set(row[p.groups == g])) == 1 for row in member for g in range(p.groups.max() + 1))


def test_many_groups_of_one_are_as_good_as_none():
    d = grouped([1] * 20_000)
    assert len(pool(d, 10_000).y) == 10_000 and len(np.unique(pool(d, 10_000).groups)) == 10_000


def test_groups_split_the_test_part_and_enter_the_hash_only_where_there_are_any(tmp_path):
    groups = np.arange(40) // 2 * 7
    d = load("npz", npz(tmp_path, x=X, y=Y, groups=groups))
    rows = [(X == row).all(axis=1).argmax() for row in [*d.x, *d.x_test]]
    where = groups[rows]
    assert not set(where[: len(d.y)]) & set(where[len(d.y) :]) and len(d.y_test) == 10
    assert (np.unique(where[: len(d.y)], return_inverse=True)[1] == d.groups).all()
    given = load("npz", npz(tmp_path, x=X, y=Y, x_test=X, y_test=Y, groups=groups))
    without = load("npz", npz(tmp_path, x=X, y=Y, x_test=X, y_test=Y))
    assert (given.groups == np.arange(40) // 2).all() and without.groups is None
    assert given.hash != without.hash == dataclasses.replace(given, groups=None).hash
    assert given.hash == dataclasses.replace(given, pattern=Y, pattern_test=Y).hash


@pytest.mark.parametrize("groups", [np.arange(39), np.arange(40)[:, None]])
def test_bad_groups(tmp_path, groups):
    with pytest.raises(ValueError, match=r"data=.*groups.*40 integers"):
        load("npz", npz(tmp_path, x=X, y=Y, groups=groups))


def test_too_few_groups_for_a_test_part(tmp_path):
    with pytest.raises(ValueError, match="data=.*3 groups; two for each of 4 classes"):
        load("npz", npz(tmp_path, x=X, y=Y, groups=np.arange(40) % 3))

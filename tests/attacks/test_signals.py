"""Signals against the textbook formulas, and against their limits where the textbook formulas break."""

import numpy as np
import pytest
import torch

from lib.attacks import signals as signals_module
from lib.attacks.signals import by_rows, parallel, ranking, signals, threads, ties


def textbook(logits, y):
    """Softmax first, formulas as printed; good for moderate logits only."""
    z = logits.astype(np.longdouble)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    own = np.eye(z.shape[-1], dtype=bool)[y]
    p_y = p[..., own]
    others = np.where(own, 0, p * np.log(1 - p)).sum(-1)
    return {
        "phi": np.log(p_y) - np.log(1 - p_y),
        "log_confidence": np.log(p_y),
        "confidence": p_y,
        "entropy": -(p * np.log(p)).sum(-1),
        "modified_entropy": -(1 - p_y) * np.log(p_y) - others,
        "correct": z.argmax(-1) == y,
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(50, 2), (3, 40, 10), (2, 3, 20, 5)])
def test_equals_textbook_formulas(dtype, shape):
    rng = np.random.default_rng(1)
    logits = (3 * rng.normal(size=shape)).astype(dtype)
    y = rng.integers(0, shape[-1], shape[-2])
    expected = textbook(logits, y)
    for name, values in signals(logits, y).items():
        assert values.shape == shape[:-1]
        np.testing.assert_allclose(values, expected[name].astype(float), rtol=2e-6, atol=1e-7, err_msg=name)


def test_of_equal_logits_the_first_is_the_prediction():
    logits = np.random.default_rng(2).integers(0, 3, (400, 5)).astype(np.float16)
    y = np.random.default_rng(3).integers(0, 5, 400)
    tied = (logits == logits.max(1, keepdims=True)).sum(1) > 1
    assert tied.sum() > 100 and (logits.argmax(1) == y)[tied].any()
    expected = textbook(logits, y)
    for name, values in signals(logits, y).items():
        np.testing.assert_allclose(values, expected[name].astype(float), rtol=2e-6, atol=1e-7, err_msg=name)


def test_limits_of_certain_models():
    right, wrong = np.array([200.0, -200, -200]), np.array([-200.0, 200, -200])
    out = signals(np.stack([right, wrong]), np.array([0, 0]))
    np.testing.assert_allclose(out["phi"], [400 - np.log(2), -400], rtol=1e-6)
    np.testing.assert_allclose(out["log_confidence"], [0, -400], atol=1e-30, rtol=1e-6)
    np.testing.assert_allclose(out["confidence"], [1, 0], atol=1e-30)
    np.testing.assert_allclose(out["entropy"], [0, 0], atol=1e-30)
    # wrong and certain: -(1 - p_y) log p_y = 400, and -log(1 - p_top) = 400 - log 2
    np.testing.assert_allclose(out["modified_entropy"], [0, 800 - np.log(2)], rtol=1e-6)
    assert out["correct"].tolist() == [True, False]


def test_nearly_certain_models_stay_distinct():
    gaps = np.array([20.0, 40, 60])  # the textbook softmax ties at 1.0 from 37 on
    logits = np.stack([gaps, 0 * gaps], axis=1)
    out = signals(logits, np.zeros(3, int))
    np.testing.assert_allclose(out["phi"], gaps, rtol=1e-6)
    np.testing.assert_allclose(-out["log_confidence"], np.exp(-gaps), rtol=1e-6)
    # p = 1 - e: H -> e (1 + gap);  M -> e^2 + e^2
    np.testing.assert_allclose(out["entropy"], np.exp(-gaps) * (1 + gaps), rtol=1e-6)
    np.testing.assert_allclose(out["modified_entropy"][:2], 2 * np.exp(-2 * gaps[:2]), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e3, 6e4, 1e300])
def test_no_nan_or_infinity_however_large_the_logits(scale):
    logits = scale * np.random.default_rng(0).uniform(-1, 1, (2, 30, 4))
    logits[0, 0] = 0  # all tied
    logits[0, 1] = [-np.inf, 0, 0, -np.inf]  # masked classes
    out = signals(logits, np.arange(30) % 4)
    assert all(np.isfinite(v).all() for v in out.values())
    np.testing.assert_allclose(out["entropy"][0, :2], [np.log(4), np.log(2)], rtol=1e-6)


def test_shifting_all_logits_changes_nothing():
    rng = np.random.default_rng(2)
    logits, y = rng.normal(size=(4, 25, 6)), rng.integers(0, 6, 25)
    for name, values in signals(logits + 100 * rng.normal(size=(4, 25, 1)), y).items():
        np.testing.assert_allclose(values, signals(logits, y)[name], rtol=1e-5, atol=1e-6)


def test_memory_map_and_selection(tmp_path):
    rng = np.random.default_rng(3)
    logits, y = rng.normal(size=(4, 25, 6)).astype(np.float16), rng.integers(0, 6, 25)
    np.save(tmp_path / "logits.npy", logits)
    mapped = signals(np.load(tmp_path / "logits.npy", mmap_mode="r"), y, only=("phi", "correct"))
    assert list(mapped) == ["phi", "correct"]
    for name, values in mapped.items():
        np.testing.assert_array_equal(values, signals(logits, y)[name])


def test_ties_are_counted_as_a_search_counts_them():
    for values in (np.arange(5.0), np.zeros(4), np.array([1.0]), np.random.default_rng(0).integers(0, 9, 50)):
        ranked = np.sort(values)
        np.testing.assert_array_equal(ties(ranked), [np.searchsorted(ranked, ranked, s) for s in ("left", "right")])


@pytest.mark.parametrize("n_threads", [1, 3])
def test_rows_come_in_order_and_errors_are_raised(n_threads, monkeypatch):
    monkeypatch.setattr(signals_module, "THREADS", n_threads)
    np.testing.assert_array_equal(by_rows(lambda k: k * np.arange(3), (50, 3)), np.outer(np.arange(50), np.arange(3)))
    with pytest.raises(ZeroDivisionError):
        parallel(lambda k: 1 // k, range(3))


def test_threads_share_no_cores_with_torch(monkeypatch):
    """Two threads that each have torch start two wait for each other."""
    monkeypatch.setattr(signals_module, "THREADS", 2)
    found = []
    with threads(3):
        parallel(lambda k: found.append(torch.get_num_threads()), range(4))
        assert found == [1] * 4 and torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError):
            parallel(lambda k: 1 // k, range(3))
        assert torch.get_num_threads() == 3, "also after an error"


@pytest.mark.parametrize(
    "logits, y, words",
    [
        (np.zeros((5, 3)), np.full(5, 3), "y: int64 of shape .*valid are .*0 to 2"),
        (np.zeros((5, 3)), np.full(5, -1), "y: int64"),
        (np.zeros((5, 3)), np.zeros(4, int), r"y: int64 of shape \(4,\)"),
        (np.zeros((5, 3)), np.zeros(5), "y: float64"),
        (np.full((5, 3), np.nan), np.zeros(5, int), "logits: .*nan.* at example 0"),
        (np.full((5, 3), np.inf), np.zeros(5, int), "logits: .*inf"),
    ],
)
def test_faults_are_named(logits, y, words):
    with pytest.raises(ValueError, match=words):
        signals(logits, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
@pytest.mark.parametrize("n", [1000, 30_000])  # by NumPy, and by a radix sort of the bits
def test_ranking_sorts_negative_numbers_ties_zeros_and_infinities(n, dtype):
    rng = np.random.default_rng(0)
    if dtype == np.int32:
        values = rng.integers(-100, 100, n, dtype)
    else:
        values = rng.normal(size=n).round(3) * 10.0 ** rng.integers(-30, 30, n)
        values = np.append(values, [0.0, -0.0, np.inf, -np.inf]).astype(dtype)
    order = ranking(values)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(values)))
    np.testing.assert_array_equal(values[order], np.sort(values))

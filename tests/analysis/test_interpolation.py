"""The theorem's formulas against independent numerics: KKT solves, quadrature, finite differences, simulation."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm

from lib.analysis import interpolation


def power_law(d):
    """Eigenvalues 1, 1/2, ..., 1/d times a number that makes their sum d."""
    return d / np.arange(1, d + 1) / (1 / np.arange(1, d + 1)).sum()


def problem(n=6, d=15, seed=0, falling=False):
    """x, y and a random sigma (or a diagonal one with eigenvalues that fall)."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(d, d))
    sigma = np.diag(power_law(d)) if falling else factor @ factor.T / d
    return rng.normal(size=(n, d)), rng.choice([-1.0, 1.0], n), sigma


def penalty(sigma, eta):
    """G_eta = I + eta Σ."""
    return np.eye(len(sigma)) + eta * sigma


# ---- interpolators -------------------------------------------------------------------------------------------


def test_minimum_norm_solves_the_kkt_system():
    x, y, sigma = problem()
    g = penalty(sigma, 2.5)
    n, d = x.shape
    # Gw - X'l = 0, Xw = y
    kkt = np.block([[g, -x.T], [x, np.zeros((n, n))]])
    expected = np.linalg.solve(kkt, np.concatenate([np.zeros(d), y]))[:d]
    np.testing.assert_allclose(interpolation.minimum_norm(x, y, g), expected, atol=1e-10)
    np.testing.assert_allclose(x @ interpolation.minimum_norm(x, y, g), y, atol=1e-10)
    np.testing.assert_allclose(interpolation.minimum_norm(x, y), np.linalg.pinv(x) @ y, atol=1e-10)


def test_minimum_norm_agrees_with_a_numerical_minimiser():
    x, y, sigma = problem(n=2, d=5)
    g = penalty(sigma, 1.0)
    bound = {"type": "eq", "fun": lambda w: x @ w - y, "jac": lambda w: x}
    found = minimize(
        lambda w: w @ g @ w, np.zeros(5), jac=lambda w: 2 * g @ w, constraints=bound, method="SLSQP", tol=1e-14
    )
    np.testing.assert_allclose(interpolation.minimum_norm(x, y, g), found.x, atol=1e-6)


# ---- Theorem 1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("falling", [False, True])
def test_the_spectral_formula_is_the_solved_interpolator(falling):
    x, y, sigma = problem(falling=falling)
    path, etas = interpolation.spectral(x, y, sigma), np.array([0, 0.01, 0.5, 3, 200])
    v = interpolation.contraction(path, etas)
    for eta, expected in zip(etas, v, strict=True):
        w = interpolation.minimum_norm(x, y, penalty(sigma, eta))
        assert interpolation.variance(w, sigma) == pytest.approx(expected, rel=1e-11)
        np.testing.assert_allclose(interpolation.weights(path, eta), w, atol=1e-10)
    assert (np.diff(v) < 0).all()


def test_the_limit_is_the_smallest_variance_of_any_interpolator():
    x, y, sigma = problem()
    least = interpolation.variance(interpolation.minimum_norm(x, y, sigma), sigma)
    path = interpolation.spectral(x, y, sigma)
    assert interpolation.contraction(path, 1e9) == pytest.approx(least, rel=1e-6)
    assert interpolation.variance(interpolation.weights(path, 1e9), sigma) == pytest.approx(least, rel=1e-6)


def test_nothing_moves_with_isotropic_or_empirical_curvature():
    x, y, _ = problem()
    for sigma in (3 * np.eye(15), x.T @ x / len(x), np.zeros((15, 15))):
        w0, w = interpolation.minimum_norm(x, y), interpolation.minimum_norm(x, y, penalty(sigma, 100.0))
        np.testing.assert_allclose(w, w0, atol=1e-12)
        path = interpolation.spectral(x, y, sigma)
        assert interpolation.contraction(path, 1e9) == pytest.approx(path.v0, abs=1e-12)


def test_singular_curvature_of_few_new_examples_contracts():
    x, y, _ = problem()
    z = np.random.default_rng(5).normal(size=(4, 15))
    sigma = z.T @ z / 4  # rank 4 of 15
    path = interpolation.spectral(x, y, sigma)
    assert path.s.shape == (4,)
    for eta in (1.0, 50.0):
        w = interpolation.minimum_norm(x, y, penalty(sigma, eta))
        assert interpolation.contraction(path, eta) == pytest.approx(interpolation.variance(w, sigma), rel=1e-9)
    assert interpolation.contraction(path, 1e12) == pytest.approx(0, abs=1e-12)  # 9 free directions fit 4 zeros


def test_two_thousand_features():
    values = power_law(2000)
    x, y = interpolation.draw(500, values)
    path = interpolation.spectral(x, y, np.diag(values))
    w = interpolation.minimum_norm(x, y, penalty(np.diag(values), 3.0))
    assert abs(interpolation.contraction(path, 3.0) - values @ w**2) < 1e-12


# ---- Theorem 3 -----------------------------------------------------------------------------------------------

CASES = [
    (1, 1, 0, 1),
    (1, 0.3, 0, 2),
    (0, 2, 1, 0.5),
    (0, 1, 0, 3),
    (0, 3, 0, 1),
    (2, 1, -1, 1.0000001),
    (4, 1, 0, 1.5),
]


@pytest.mark.parametrize("case", CASES)
def test_likelihood_ratio_advantage_is_the_total_variation(case):
    a, s, b, t = case
    ends = np.linspace(-20, 20, 81)
    parts = (
        quad(lambda u: abs(norm.pdf(u, a, s) - norm.pdf(u, b, t)), *e)[0] for e in zip(ends, ends[1:], strict=False)
    )
    assert interpolation.likelihood_ratio_advantage(*case)[0] == pytest.approx(sum(parts) / 2, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_slope_is_the_derivative_in_the_spread_of_out(case):
    a, s, b, t = case
    after, before = (interpolation.likelihood_ratio_advantage(a, s, b, t + h)[0] for h in (1e-5, -1e-5))
    assert interpolation.likelihood_ratio_advantage(*case)[1] == pytest.approx((after - before) / 2e-5, abs=1e-6)


def test_limits_of_the_likelihood_ratio_advantage():
    def advantage(*case):
        return interpolation.likelihood_ratio_advantage(*case)[0]

    assert advantage(1, 1e-9, 0, 2) == pytest.approx(1, abs=1e-7)
    assert advantage(3, 2, 0, 2) == pytest.approx(2 * norm.cdf(3 / 4) - 1)
    assert advantage(0, 1e-4, 0, 1e4) == pytest.approx(1, abs=1e-6)


def test_the_region_where_a_smaller_out_variance_helps_the_attacker():
    delta, r = np.meshgrid(np.linspace(0.05, 4, 60), np.geomspace(0.1, 6, 61))
    helps = interpolation.likelihood_ratio_advantage(delta, 1, 0, r)[1] < 0
    assert helps[r <= 1].all()  # OUT no wider than IN: always
    delta, r, helps = delta[r > 1], r[r > 1], helps[r > 1]
    m, h = r * delta / (r**2 - 1), np.sqrt(delta**2 + 2 * (r**2 - 1) * np.log(r)) / (r**2 - 1)
    np.testing.assert_array_equal(helps, h < m * np.tanh(m * h))
    assert helps.any() and not helps.all() and (delta[helps] ** 2 > 2 * np.log(r[helps])).all()


# ---- data ------------------------------------------------------------------------------------------


def test_draws_have_the_variances_that_were_asked_for():
    values = power_law(40)
    x, y = interpolation.draw(40_000, values)
    np.testing.assert_allclose(x.var(0) / values, 1, atol=0.05)
    assert set(y) == {-1.0, 1.0} and abs(y.mean()) < 0.03


def test_labels_follow_the_teacher_but_for_the_noise():
    teacher = np.arange(1.0, 11)
    x, y = interpolation.draw(20_000, np.ones(10), teacher, noise=0.2)
    assert np.mean(y != np.sign(x @ teacher)) == pytest.approx(0.2, abs=0.015)

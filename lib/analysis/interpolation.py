"""Minimum G-norm interpolation by a linear model: its weights, how its outputs contract, and what an attacker gains.

Shapes: n training examples with d > n features, x [n, d] of full rank, y [n]; sigma and g [d, d]. The outputs on new
examples have the variance V = w'Σw. Statements and proofs: notebooks/04_contraction.py, after arXiv 2310.00488."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh, qr, solve_triangular
from scipy.special import ndtr

EPS = np.finfo(float).eps


def minimum_norm(x, y, g=None) -> np.ndarray:
    """w_G = argmin w'Gw subject to Xw = y: [d]. g: positive definite; None: the identity."""
    lower = np.linalg.cholesky(np.eye(x.shape[1]) if g is None else g)
    # G = LL' and L^-1 X' = QR:  w = G^-1 X' (X G^-1 X')^-1 y = L^-T Q R^-T y
    q, r = qr(solve_triangular(lower, x.T, lower=True), mode="economic")
    return solve_triangular(lower, q @ solve_triangular(r, y, trans="T"), lower=True, trans="T")


def variance(w, sigma) -> np.ndarray:
    """Variance w'Σw of the outputs x'w, where x has covariance sigma: a number for w [d], [k] for w [d, k]."""
    return np.sum(w * (sigma @ w), axis=0)


class Path(NamedTuple):
    """Theorem 1. The interpolators of G_eta for every eta at once: w_eta = w_0 - B diag(eta / (1 + eta s)) b."""

    w0: np.ndarray  # [d] the minimum 2-norm interpolator
    v0: float  # w_0'Σw_0
    basis: np.ndarray  # [d, r] B = NE: orthonormal, orthogonal to the rows of X
    s: np.ndarray  # [r] the positive eigenvalues of N'ΣN = E diag(s) E'
    b: np.ndarray  # [r] B'Σw_0


def spectral(x, y, sigma) -> Path:
    """The Path of x, y and a positive semi-definite sigma, by one eigendecomposition."""
    q, r = qr(x.T)
    # w_0 = X'(XX')^-1 y, and N: the columns of Q that X does not reach
    w0, null = q[:, : len(x)] @ solve_triangular(r[: len(x)], y, trans="T"), q[:, len(x) :]
    s, e = eigh(null.T @ sigma @ null)
    positive = s > len(sigma) * EPS * np.linalg.norm(sigma)  # where s = 0, b = 0 too
    basis = null @ e[:, positive]
    return Path(w0, float(variance(w0, sigma)), basis, s[positive], basis.T @ (sigma @ w0))


def contraction(path, eta) -> np.ndarray:
    """V(eta), for eta >= 0, in eta's shape."""
    eta = np.asarray(eta, float)[..., None]
    # V(eta) = w_0'Σw_0 - sum b^2 eta (2 + eta s) / (1 + eta s)^2
    return path.v0 - np.sum(path.b**2 * eta * (2 + eta * path.s) / (1 + eta * path.s) ** 2, axis=-1)


def weights(path, eta) -> np.ndarray:
    """w_eta: [d], for one number eta >= 0."""
    return path.w0 - path.basis @ (eta / (1 + eta * path.s) * path.b)


def likelihood_ratio_advantage(mean_in, sd_in, mean_out, sd_out) -> tuple[np.ndarray, np.ndarray]:
    """Theorem 3. (Largest TPR - FPR of any rule that tells IN from OUT, its derivative in sd_out). Arrays broadcast.

    IN is N(mean_in, sd_in^2), OUT is N(mean_out, sd_out^2), with sds > 0; NaN where the two coincide."""
    r, delta = sd_out / sd_in, np.abs(mean_in - mean_out) / sd_in
    # the densities cross at y_1, y_2, in units of IN, or at z = (y + delta) / r, in units of OUT:
    # (1 - r^2) y^2 + 2 delta y + delta^2 + 2 r^2 log r = 0
    root = np.sqrt(delta**2 + 2 * (r**2 - 1) * np.log(r))
    with np.errstate(divide="ignore"):  # of equal spreads, one of the crossings is at infinity
        y1, z1 = -(delta + r * root) / (1 - r**2), -(r * delta + root) / (1 - r**2)
    y2 = -(delta**2 + 2 * r**2 * np.log(r)) / (delta + r * root)
    z2 = (delta**2 - 2 * np.log(r)) / (r * delta + root)
    # Adv = P_in(A) - P_out(A),  A = {p_in > p_out}: between the crossings for r > 1, outside them for r < 1
    advantage = ndtr(y1) - ndtr(y2) - ndtr(z1) + ndtr(z2)
    # -d/ds P_out(A) = (z_1 phi(z_1) - z_2 phi(z_2)) / s: where p_in = p_out, moving the ends of A changes nothing
    first, second = (z * np.exp(-(z**2) / 2) for z in np.clip([z1, z2], -40, 40))
    return advantage, (first - second) / np.sqrt(2 * np.pi) / sd_out


def draw(n, values, teacher=None, noise=0.0, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """x [n, d] from N(0, diag(values)) and labels y [n]: sign(x'teacher), flipped at the rate `noise`; or random."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(values))) * np.sqrt(values)
    signs = np.where(rng.random(n) < (0.5 if teacher is None else noise), -1.0, 1.0)
    return x, signs if teacher is None else signs * np.where(x @ teacher >= 0, 1.0, -1.0)

"""Minimum G-norm interpolation by a linear model: its weights, how its outputs contract, and what an attacker gains.

Shapes: n training examples with d > n features, x [n, d], y [n]; sigma and g [d, d], symmetric. The outputs on new
examples have the variance V = w'Σw. Statements and proofs: notebooks/04_contraction.py, after arXiv 2310.00488.
Functions raise a ValueError that names the argument that is not valid.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh, qr, solve_triangular
from scipy.special import ndtr, owens_t

from lib import need

EPS, INF = np.finfo(float).eps, 1e300  # eta = INF gives the limit eta = inf to the last digit


def minimum_norm(x, y, g=None) -> np.ndarray:
    """w_G = argmin w'Gw subject to Xw = y: [d], or [d, k] for y [n, k]. g: positive definite; None: the identity."""
    x, y = _system(x, y)
    lower = _cholesky("g", np.eye(x.shape[1]) if g is None else g, x.shape[1])
    # G = LL' and L^-1 X' = QR:  w = G^-1 X' (X G^-1 X')^-1 y = L^-T Q R^-T y
    q, r = qr(solve_triangular(lower, x.T, lower=True), mode="economic")
    return solve_triangular(lower, q @ solve_triangular(r, y, trans="T"), lower=True, trans="T")


def penalty(sigma, eta) -> np.ndarray:
    """G_eta = I + eta Σ: [d, d]. sigma: positive semi-definite (it may be singular); eta: a finite number >= 0."""
    _cholesky("sigma", sigma, len(np.atleast_1d(sigma)), semi=True)
    return np.eye(len(sigma)) + _finite("eta", eta, 0) * np.asarray(sigma)


def variance(w, sigma) -> np.ndarray:
    """Variance w'Σw of the outputs x'w, where x has covariance sigma: a number for w [d], [k] for w [d, k]."""
    return np.sum(w * (sigma @ w), axis=0)


def independent_rows(x) -> np.ndarray:
    """Indices, in order, of a largest set of linearly independent rows of x [n, d], by pivoted QR."""
    r, order = qr(np.transpose(x), mode="r", pivoting=True)
    size = np.abs(np.diag(r))
    return np.sort(order[: np.sum(size > 1e-10 * size[0])])


class Path(NamedTuple):
    """Theorem 1. The interpolators of G_eta for every eta at once: w_eta = w_0 - B diag(eta / (1 + eta s)) b."""

    w0: np.ndarray  # [d] the minimum 2-norm interpolator
    v0: float  # w_0'Σw_0
    basis: np.ndarray  # [d, r] B = NE: orthonormal, orthogonal to the rows of X
    s: np.ndarray  # [r] the positive eigenvalues of N'ΣN = E diag(s) E'
    b: np.ndarray  # [r] B'Σw_0


def spectral(x, y, sigma) -> Path:
    """The Path of x, y [n] and a positive semi-definite sigma, by one eigendecomposition.

    Directions with s = 0 are left out: they have b = 0. With Σ = X'X/n, none is left.
    """
    x, y = _system(x, y, outputs=False)
    _cholesky("sigma", sigma, x.shape[1], semi=True)
    sigma, n = np.asarray(sigma, float), len(x)
    q, r = qr(x.T)
    # w_0 = X'(XX')^-1 y, and N: the columns of Q that X does not reach
    w0, null = q[:, :n] @ solve_triangular(r[:n], y, trans="T"), q[:, n:]
    s, e = eigh(null.T @ sigma @ null)
    positive = s > len(sigma) * EPS * np.linalg.norm(sigma)
    basis = null @ e[:, positive]
    return Path(w0, float(variance(w0, sigma)), basis, s[positive], basis.T @ (sigma @ w0))


def contraction(path, eta) -> np.ndarray:
    """V(eta), for eta >= 0 (inf: the limit), in eta's shape."""
    t = _shrinkage(path, eta)
    # V(eta) = w_0'Σw_0 - sum b^2 eta (2 + eta s) / (1 + eta s)^2 = w_0'Σw_0 - sum b^2 t (2 - s t)
    return path.v0 - np.sum(path.b**2 * t * (2 - path.s * t), axis=-1)


def weights(path, eta) -> np.ndarray:
    """w_eta: [d], for one number eta >= 0 or inf."""
    # w_eta = w_0 - B diag(t) b
    return path.w0 - path.basis @ (_shrinkage(path, eta) * path.b)


def _shrinkage(path, eta):
    """t = eta / (1 + eta s), which is 0 at eta = 0 and 1/s at eta = inf: [..., r] for eta [...]."""
    with np.errstate(divide="ignore"):
        return 1 / (1 / _finite("eta", np.minimum(eta, INF), 0)[..., None] + path.s)


def teacher_advantage(w, sigma, teacher, noise) -> np.ndarray:
    """Theorem 2. TPR - FPR of the best threshold, "member if margin >= 1": members at 1, non-members x ~ N(0, Σ).

    Labels are sign(x'teacher), flipped with probability `noise`; w is [d] or [d, k]. The margin of a non-member is
    skew-normal (Azzalini 1985, eq. 1 and 9), and N(0, V) with noise 1/2.
    """
    v, noise = variance(w, sigma), _finite("noise", noise, 0, 1)
    size = np.sqrt(v * variance(teacher, sigma))
    cosine = np.divide((sigma @ teacher) @ w, size, out=np.zeros_like(v), where=size > 0)
    slant = cosine / np.sqrt(np.maximum(1 - cosine**2, EPS))
    with np.errstate(divide="ignore"):
        h = 1 / np.sqrt(v)
    # Adv = Phi(h) - 2 (1 - 2 noise) T(h, slant),  h = 1 / sqrt(V),  T: Owen's function
    return ndtr(h) - 2 * (1 - 2 * noise) * owens_t(h, slant)


def likelihood_ratio_advantage(mean_in, sd_in, mean_out, sd_out) -> tuple[np.ndarray, np.ndarray]:
    """Theorem 3. (Largest TPR - FPR of any rule that tells IN from OUT, its derivative in sd_out). Arrays broadcast.

    IN is N(mean_in, sd_in^2), OUT is N(mean_out, sd_out^2). Where the derivative is negative, a smaller OUT variance
    raises the advantage. Where an sd is 0 the advantage is 1 and the derivative is given as 0; where IN and OUT
    coincide both are 0.
    """
    mean_in, mean_out = _finite("mean_in", mean_in), _finite("mean_out", mean_out)
    sd_in, sd_out = _finite("sd_in", sd_in, 0), _finite("sd_out", sd_out, 0)
    same, is_point = (mean_in == mean_out) & (sd_in == sd_out), (sd_in == 0) | (sd_out == 0)
    with np.errstate(all="ignore"):  # where an sd is 0, and where IN equals OUT, the crossings are not used
        r, delta = sd_out / sd_in, np.abs(mean_in - mean_out) / sd_in
        r, delta = np.clip(r, 1e-60, 1e60), np.minimum(delta, 1e60)  # squares of more would overflow
        # the densities cross at y_1, y_2, in units of IN, or at z = (y + delta) / r, in units of OUT:
        # (1 - r^2) y^2 + 2 delta y + delta^2 + 2 r^2 log r = 0
        root = np.sqrt(delta**2 + 2 * (r**2 - 1) * np.log(r))
        y1, z1 = -(delta + r * root) / (1 - r**2), -(r * delta + root) / (1 - r**2)
        y2 = -(delta**2 + 2 * r**2 * np.log(r)) / (delta + r * root)
        z2 = (delta**2 - 2 * np.log(r)) / (r * delta + root)
        # Adv = P_in(A) - P_out(A),  A = {p_in > p_out}: between the crossings for r > 1, outside them for r < 1
        advantage = ndtr(y1) - ndtr(y2) - ndtr(z1) + ndtr(z2)
        # -d/ds P_out(A) = (z_1 phi(z_1) - z_2 phi(z_2)) / s: where p_in = p_out, moving the ends of A changes nothing
        first, second = (z * np.exp(-(z**2) / 2) for z in np.clip([z1, z2], -40, 40))
        slope = (first - second) / np.sqrt(2 * np.pi) / sd_out
    return np.where(same, 0.0, np.where(is_point, 1.0, advantage)), np.where(same | is_point, 0.0, slope)


def spectrum(kind, d) -> np.ndarray:
    """Eigenvalues of Σ, largest first, [d] with sum d: isotropic, power law (1/i), spiked (a tenth hold 90%)."""
    rank = np.arange(1, d + 1)
    spikes = np.where(rank <= max(1, d // 10), 81.0, 1.0)
    kinds = {"isotropic": np.ones(d), "power law": 1 / rank, "spiked": spikes}
    need(kind in kinds, f"kind={kind!r}; valid are {', '.join(kinds)}")
    return d * kinds[kind] / kinds[kind].sum()


def draw(n, values, teacher=None, noise=0.0, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """x [n, d] from N(0, diag(values)) and labels y [n]: sign(x'teacher), flipped at the rate `noise`; or random."""
    rng, values, noise = np.random.default_rng(seed), _finite("values", values, 0), _finite("noise", noise, 0, 1)
    x = rng.normal(size=(n, len(values))) * np.sqrt(values)
    signs = np.where(rng.random(n) < (0.5 if teacher is None else noise), -1.0, 1.0)
    return x, signs if teacher is None else signs * np.where(x @ teacher >= 0, 1.0, -1.0)


def gradient_descent(x, y, rho=0.0, steps=4000) -> np.ndarray:
    """w [d] after full-batch descent on |Xw - y|^2 / 2n from w = 0, with a cosine learning rate. rho > 0: SAM."""
    (x, y), w, rho = _system(x, y, outputs=False), np.zeros(np.shape(x)[1]), _finite("rho", rho, 0)
    top = np.linalg.norm(x, 2) ** 2 / len(x)
    for t in range(steps):
        g = x.T @ (x @ w - y) / len(x)
        if rho:
            # g_SAM = grad L(w + rho g / |g|)
            g = x.T @ (x @ (w + rho * g / (np.linalg.norm(g) + 1e-30)) - y) / len(x)
        # w <- w - lr_t g,  lr_t = (1 + cos(pi t / T)) / (2 largest curvature)
        w = w - (1 + np.cos(np.pi * t / steps)) / (2 * top) * g
    return w


def _finite(name, value, least=-np.inf, most=np.inf):
    """value as floats, all finite and from `least` to `most`."""
    value = np.asarray(value, float)
    for bad in value[~(np.isfinite(value) & (value >= least) & (value <= most))].flat:
        raise ValueError(f"{name}={bad}; valid are finite numbers from {least:g} to {most:g}")
    return value


def _system(x, y, outputs=True):
    """x [n, d] and y [n] (or [n, k] if `outputs`) as floats, where every y has infinitely many solutions w."""
    x, y = _finite("x", x), _finite("y", y)
    fits = x.ndim == 2 and 0 < len(x) < x.shape[1] and np.linalg.matrix_rank(x) == len(x)
    need(fits, f"x: shape {x.shape}, or dependent rows; valid is [n, d] with n < d, of full row rank")
    fits = y.shape[:1] == x.shape[:1] and y.ndim <= 1 + outputs
    need(fits, f"y: shape {y.shape}; valid is ({len(x)},){f' or ({len(x)}, k)' * outputs}")
    return x, y


def _cholesky(name, matrix, d, semi=False):
    """L of a symmetric [d, d] matrix LL'; semi: zero eigenvalues are valid."""
    matrix, valid = _finite(name, matrix), f"valid is a symmetric ({d}, {d}) matrix, positive {'semi-' * semi}definite"
    if matrix.shape != (d, d) or not np.allclose(matrix, matrix.T, rtol=1e-8, atol=1e-12 * np.abs(matrix).max()):
        raise ValueError(f"{name}: shape {matrix.shape}, or not symmetric; {valid}")
    try:
        return np.linalg.cholesky(matrix + semi * (1e-10 * np.linalg.norm(matrix) + 1e-300) * np.eye(d))
    except np.linalg.LinAlgError:
        raise ValueError(f"{name}: it has an eigenvalue that is too small; {valid}") from None

"""Memberships, phi and logits of simulated ensembles, which the tests of this folder share."""

import numpy as np

from benchmarks.calibration import halves_of_pool


def leaky(seed=0, n_models=10, n=60, leak=1.0, queries=()):
    rng = np.random.default_rng(seed)
    member = halves_of_pool(rng, n_models, n)
    signal = member.reshape(n_models, *[1] * len(queries), n)
    return rng.normal(1, 1, n) + leak * signal + rng.normal(size=(n_models, *queries, n)), member


def subsets(seed, n_models, n):
    """member [M, N]: independent subsets of 60%, no pairs; three IN and three OUT models at least."""
    rng = np.random.default_rng(seed)
    member = rng.random((n_models, n)) < 0.6
    while (few := (member.sum(0) < 3) | (member.sum(0) > n_models - 3)).any():
        member[:, few] = rng.random((n_models, few.sum())) < 0.6
    return member


def ensemble(seed=0, n_models=16, n=300, n_classes=5, leak=1.5):
    """Logits [M, N, C] whose label's logit is higher for members; examples differ in difficulty."""
    rng = np.random.default_rng(seed)
    member, y = halves_of_pool(rng, n_models, n), rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n_models, n, n_classes))
    logits[:, np.arange(n), y] += rng.normal(3, 1.5, n) + leak * member
    return logits.astype(np.float16), y, member

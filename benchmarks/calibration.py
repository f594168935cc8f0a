"""How often the intervals of lib.attacks.intervals hold the truth: `python -m benchmarks.calibration 400 300`.

Two optimizers' ensembles of new models and new examples are simulated 400 times, with 300 examples each. The truth is
the mean over these replications. The tests run the same with few replications.
"""

import sys

import numpy as np
import pandas as pd

from lib.attacks import intervals, shadow


def halves_of_pool(rng, n_models, n):
    """Membership [n_models, n]: models 2k and 2k+1 train on complementary halves."""
    half = np.argsort(rng.random((n_models // 2, n)), axis=1) < n // 2
    return np.stack([half, ~half], axis=1).reshape(n_models, n)


def two_optimizers(seed, n_models, n):
    """phi of two ensembles on the same halves: shared examples, noise shared in part, model effects."""
    rng = np.random.default_rng(seed)
    member = halves_of_pool(rng, n_models, n)
    mu, delta = rng.normal(2, 2, n), rng.lognormal(-0.5, 1, n)
    sigma, shared = rng.lognormal(0, 0.4, n), rng.normal(size=(n_models, n))

    def phi(boost):
        noise = np.sqrt(0.5) * (shared + rng.normal(size=member.shape))
        scale, shift = rng.lognormal(0, 0.15, (n_models, 1)), 0.4 * rng.normal(size=(n_models, 1))
        return (mu + boost * delta * member + sigma * noise) * scale + shift

    return phi(1.0), phi(1.25), member


def strictest(n_models, n):
    """The lowest of some rates that `intervals.table` reports: ten false positives are expected in either fold."""
    member = halves_of_pool(np.random.default_rng(0), n_models, n)
    return intervals.reportable(member, (0.05, 0.02, 0.01, 0.005, 0.0025, 0.001))[-1]


def coverage(n_models, n=300, replications=150, variance="pooled", fprs=None):
    """Share of intervals that hold the truth, by metric and optimizer: a Series.

    LiRA of two optimizers a and b, and the difference b minus a. fprs: default 0.05 and the strictest that is
    reported. For a realised FPR the truth is the rate that was asked for, and 0 for a difference of two.
    """
    found, fprs = [], fprs or sorted({0.05, strictest(n_models, n)}, reverse=True)
    for seed in range(replications):
        a, b, member = two_optimizers(seed, n_models, n)
        scores = {name: shadow.lira(x, member, variance=variance) for name, x in (("a", a), ("b", b))}
        found.append(intervals.table(scores, member, fprs=fprs).set_index(["metric", "optimizer", "baseline"]))
    value, low, high = (np.stack([frame[c] for frame in found]) for c in ("value", "ci_low", "ci_high"))
    asked = [asked_for(*key) for key in found[0].index]
    truth = np.where(np.isnan(asked), value.mean(0), asked)
    return pd.Series(((low <= truth) & (truth <= high)).mean(0), found[0].index)


def asked_for(metric, optimizer, baseline):
    """The rate behind a realised FPR, 0 for a difference of two; NaN for other metrics."""
    rate = float(metric.partition("realised_fpr@")[2] or "nan")
    return 0 * rate if baseline else rate


def main(replications=400, n=300):
    """Print the tables: metrics down, optimizers and their difference across."""
    for variance in ("pooled", "example"):
        print(f"LiRA, variance={variance}, {n} examples, {replications} replications")
        for m in (8, 16, 64):
            found = coverage(m, n, replications, variance)
            print(f"{m} models; the strictest FPR is {strictest(m, n)}")
            print(found.unstack([1, 2]).to_string(float_format="%.3f"), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

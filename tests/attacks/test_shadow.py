"""LiRA and RMIA against independent twins (loops over targets and examples), closed forms, limits and the null."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.calibration import halves_of_pool
from lib.attacks import catalogue, shadow
from lib.attacks.intervals import auc_influence_values, estimate
from tests.attacks.simulated import leaky, subsets

# ---- LiRA ------------------------------------------------------------------------------------------------


def generate_ours(keep, scores, check_scores, centre, variance, offline):
    """The authors' plot.py, one target: keep [n, N], scores [n, N, Q], check_scores [N, Q] -> [N]."""
    dat_in = [scores[keep[:, j], j] for j in range(scores.shape[1])]
    dat_out = [scores[~keep[:, j], j] for j in range(scores.shape[1])]
    predictions = []
    for j, sc in enumerate(check_scores):
        log = {}
        for name, dat in (("in", dat_in), ("out", dat_out)):
            if name == "in" and offline:
                continue
            mean = centre(dat[j], 0)
            if variance == "example":
                std = np.std(dat[j], 0)
            elif variance == "global":  # their fix_variance
                std = np.std(np.concatenate(dat), 0)
            else:
                within = sum(((d - d.mean(0)) ** 2).sum(0) for d in dat)
                std = np.sqrt(within / sum(len(d) - 1 for d in dat))
            z = (sc - mean) / std  # the last one is OUT's
            log[name] = -(z**2) / 2 - np.log(std)
        predictions.append((z if offline else log["in"] - log["out"]).mean())
    return np.array(predictions)


def global_variance(n, mean, squares):
    """The variance of all IN (or OUT) values of all examples about their common mean, of normal distributions."""
    return ((squares + n * (mean - np.average(mean, weights=n)) ** 2).sum()) / n.sum(), np.inf


def assert_equals_the_original(fast, phi, member, gone, centre, variance, offline):
    cube = np.moveaxis(phi, 1, 2) if phi.ndim == 3 else phi[:, :, None]
    for m in range(len(phi)):
        others = np.delete(np.arange(len(phi)), gone(m))
        slow = generate_ours(member[others], cube[others], cube[m], centre, variance, offline)
        np.testing.assert_allclose(fast[m], slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("variance", ["example", "pooled", "global"])
@pytest.mark.parametrize("design", ["model", "pair", "subsets", "queries"])
def test_lira_equals_the_authors_algorithm(design, variance, offline, monkeypatch):
    monkeypatch.setitem(shadow.VARIANCES, "global", global_variance)  # a new variance is one entry
    phi, member = leaky(n_models=12, n=30, queries=(3,) if design == "queries" else ())
    if design == "subsets":
        member = subsets(3, 12, 30)
    leave = None if design in ("subsets", "queries") else design
    fast = shadow.lira(phi, member, offline, variance, leave)
    gone = (lambda m: [m, m ^ 1]) if design in ("pair", "queries") else (lambda m: [m])
    assert_equals_the_original(fast, phi, member, gone, np.mean, variance, offline)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("variance", ["example", "global"])
def test_lira_equals_the_original_code_where_its_medians_are_means(variance, offline, monkeypatch):
    """The authors' code has medians in the place of means. Of two shadows on either side they are the same."""
    monkeypatch.setitem(shadow.VARIANCES, "global", global_variance)
    phi, member = leaky(n_models=6, n=30)
    fast = shadow.lira(phi, member, offline, variance)
    assert_equals_the_original(fast, phi, member, lambda m: [m, m ^ 1], np.median, variance, offline)


def test_lira_survives_constant_examples_and_a_large_common_offset():
    phi, member = leaky()
    phi[:, 0] = 3.0
    scores = shadow.lira(phi, member)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(shadow.lira(phi + 1e6, member), scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("offline", [False, True])
def test_lira_reaches_the_optimal_auc_on_gaussians(offline):
    # IN ~ N(mu_i + 1, 1), OUT ~ N(mu_i, 1): the best AUC is Phi(1 / sqrt 2)
    phi, member = leaky(n_models=200, n=400)
    found = estimate(auc_influence_values(shadow.lira(phi, member, offline, "pooled"), member))
    assert found.low - 0.003 < stats.norm.cdf(1 / np.sqrt(2)) < found.high + 0.003
    assert found.high - found.low < 0.02


def test_lira_finds_a_wider_in_distribution_that_a_threshold_cannot():
    rng = np.random.default_rng(5)
    member = halves_of_pool(rng, 64, 300)
    phi = rng.normal(size=(64, 300)) * np.where(member, 3.0, 1.0)  # equal means
    assert abs(auc_influence_values(phi, member).mean() - 0.5) < 0.02
    # optimal: |x|, AUC = (2/pi) arctan(3)
    assert auc_influence_values(shadow.lira(phi, member, variance="pooled"), member).mean() == pytest.approx(
        2 / np.pi * np.arctan(3), abs=0.02
    )


@pytest.mark.parametrize("attack", [shadow.lira, shadow.rmia])
def test_order_of_models_and_of_examples_does_not_matter(attack):
    phi, member = leaky()
    phi = 1 / (1 + np.exp(-phi))
    models = np.random.default_rng(1).permutation(5).repeat(2) * 2 + np.array([1, 0] * 5)
    examples = np.random.default_rng(2).permutation(60)
    moved = attack(phi[models][:, examples], member[models][:, examples])
    np.testing.assert_allclose(moved, attack(phi, member)[models][:, examples], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("n_models", [8, 16])
def test_null_auc_is_one_half_only_if_the_pair_is_left_out(n_models, offline):
    null = {"pair": [], "model": []}
    for seed in range(40):
        phi, member = leaky(seed, n_models, 300)
        alleged = catalogue.null_member(member, seed)
        for leave, values in null.items():
            values.append(auc_influence_values(shadow.lira(phi, alleged, offline, leave=leave), alleged).mean())
    error = np.std(null["pair"]) / np.sqrt(40)
    assert abs(np.mean(null["pair"]) - 0.5) < 4 * error
    if n_models == 8 and not offline:  # what leaving out the target alone would have reported
        assert np.mean(null["model"]) < 0.47


# ---- RMIA ------------------------------------------------------------------------------------------------


def pairwise_rmia(p, z, member, m, offline, gamma, a, gone):
    """Algorithm 1 for target m by counting over all pairs; z [M, T] are outside every model, or None."""
    others = np.delete(np.arange(len(p)), gone)

    def ratio(q, inside):
        out = np.array([q[others][~inside[others, i], i].mean() for i in range(q.shape[1])])
        if offline:
            return q[m] / (((1 + a) * out + 1 - a) / 2)
        if not inside.any():
            return q[m] / out
        within = np.array([q[others][inside[others, i], i].mean() for i in range(q.shape[1])])
        return q[m] / ((within + out) / 2)

    of_x = ratio(p, member)
    of_z = of_x if z is None else ratio(z, np.zeros(z.shape, bool))
    return np.array([np.mean(x / of_z >= gamma) for x in of_x])


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("population", [False, True])
@pytest.mark.parametrize("leave", ["model", "pair"])
def test_rmia_equals_pairwise_counts(offline, population, leave):
    phi, member = leaky()
    p = 1 / (1 + np.exp(-phi))
    z = 1 / (1 + np.exp(-np.random.default_rng(9).normal(1, 1.5, (10, 23)))) if population else None
    fast = shadow.rmia(p, member, z, offline, gamma=1.3, a=0.4, leave=leave)
    for m in range(10):
        slow = pairwise_rmia(p, z, member, m, offline, 1.3, 0.4, [m, m ^ 1] if leave == "pair" else [m])
        np.testing.assert_allclose(fast[m], slow, atol=1e-6)
    assert 0.05 < fast.mean() < 0.95


@pytest.mark.parametrize("population", [False, True])
def test_rmia_averages_over_queries(population):
    phi, member = leaky(queries=(3,))
    p = 1 / (1 + np.exp(-phi))
    z = p[:, :, :20] ** 2 if population else None
    single = [shadow.rmia(p[:, q], member, None if z is None else z[:, q]) for q in range(3)]
    np.testing.assert_allclose(shadow.rmia(p, member, z), np.mean(single, axis=0), atol=1e-6)


def test_rmia_counts_a_ratio_of_exactly_gamma():
    _, member = leaky()
    p = np.full(member.shape, 0.5)  # every ratio is 1
    assert (shadow.rmia(p, member, gamma=1.0) == 1).all() and (shadow.rmia(p, member, gamma=2.0) == 0).all()


def test_rmia_orders_confidences_near_one_as_their_ratios_do():
    rng = np.random.default_rng(0)
    member = halves_of_pool(rng, 16, 500)
    p = 1 - 1e-3 * rng.random(member.shape)
    assert min(len(np.unique(row)) for row in shadow.rmia(p, member)) > 490
    assert max(len(np.unique(row)) for row in shadow.rmia(p, member, gamma=2.0)) == 1


def test_rmia_survives_zero_confidence():
    phi, member = leaky()
    p = 1 / (1 + np.exp(-phi))
    p[:, :5] = 0
    assert np.isfinite(shadow.rmia(p, member)).all()


# ---- faults ----------------------------------------------------------------------------------------------


def test_too_few_models_are_named():
    phi, member = leaky(n_models=4)
    with pytest.raises(ValueError, match="n_models = 4; valid are at least 3 IN and OUT .*n_models >= 6"):
        shadow.lira(phi, member)
    shadow.rmia(1 / (1 + np.exp(-phi)), member)
    with pytest.raises(ValueError, match="n_models = 2; valid are at least 2 OUT"):
        shadow.rmia(phi[:2], member[:2], offline=True)


def test_an_example_in_all_or_no_models_is_named():
    phi, member = leaky()
    member[:, 7] = True
    with pytest.raises(ValueError, match="example 7 is in 10 of n_models = 10"):
        shadow.lira(phi, member, offline=True)
    member[:, 7] = False
    with pytest.raises(ValueError, match="example 7 is in 0 of"):
        shadow.lira(phi, member)
    assert np.isfinite(shadow.lira(phi, member, offline=True)).all()  # OUT is all it needs


@pytest.mark.parametrize(
    "change, words",
    [
        ({"variance": "fixed"}, "variance: 'fixed'; valid"),
        ({"leave": "none"}, "leave: 'none'; valid"),
        ({"member": np.ones((10, 60), int)}, "member: dtype int64"),
        ({"member": np.ones((10, 60), bool)}, "member: row 0 has 60 members of 60"),
        ({"member": np.ones((10, 59), bool)}, "scores: shape"),
        ({"phi": np.full((10, 60), np.nan)}, "scores: NaN"),
    ],
)
def test_lira_faults_are_named(change, words):
    phi, member = leaky()
    with pytest.raises(ValueError, match=words):
        shadow.lira(**{"phi": phi, "member": member, **change})


def test_leaving_out_a_pair_needs_pairs():
    with pytest.raises(ValueError, match="leave: 'pair'"):
        shadow.lira(np.random.default_rng(0).normal(size=(12, 30)), subsets(0, 12, 30), leave="pair")


@pytest.mark.parametrize(
    "change, words",
    [({"gamma": 0}, "gamma"), ({"a": 1.5}, "gamma, a"), ({"population": np.ones((9, 5))}, "population: shape")],
)
def test_rmia_faults_are_named(change, words):
    phi, member = leaky()
    with pytest.raises(ValueError, match=words):
        shadow.rmia(1 / (1 + np.exp(-phi)), member, **change)

"""LiRA and RMIA against independent twins (loops over targets and examples), closed forms, limits and the null."""

import numpy as np
import pytest
from scipy import optimize, special, stats

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
@pytest.mark.parametrize("design", ["pair", "subsets", "queries"])
def test_lira_equals_the_authors_algorithm(design, variance, offline, monkeypatch):
    monkeypatch.setitem(shadow.VARIANCES, "global", global_variance)  # a new variance is one entry
    phi, member = leaky(n_models=12, n=30, queries=(3,) if design == "queries" else ())
    if design == "subsets":
        member = subsets(3, 12, 30)
    fast = shadow.lira(phi, member, offline, variance)
    gone = (lambda m: [m]) if design == "subsets" else (lambda m: [m, m ^ 1])
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


@pytest.mark.parametrize("variance", ["example", "shrunk"])
@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("n_models", [8, 16])
def test_null_auc_is_one_half_only_if_the_pair_is_left_out(n_models, offline, variance, monkeypatch):
    pairs, null = shadow.left_out_together, {"pair": [], "model": []}
    for seed in range(40):
        phi, member = leaky(seed, n_models, 300)
        alleged = catalogue.null_member(member, seed)
        for leave, values in null.items():
            alone = np.arange(n_models)[:, None]
            monkeypatch.setattr(shadow, "left_out_together", pairs if leave == "pair" else lambda _, alone=alone: alone)
            scores = shadow.lira(phi, alleged, offline, variance)
            values.append(auc_influence_values(scores, alleged).mean())
    error = np.std(null["pair"]) / np.sqrt(40)
    assert abs(np.mean(null["pair"]) - 0.5) < 4 * error
    if n_models == 8 and not offline and variance == "example":  # what leaving out the target alone would have reported
        assert np.mean(null["model"]) < 0.47


# ---- LiRA with shrunken variances ------------------------------------------------------------------------


def shrunken(values, d0, common):
    """Smyth (2004, equation 4) for one example: the t distribution of a new value, as scipy has it."""
    d = len(values) - 1
    variance = (d0 * common + d * np.var(values, ddof=1)) / (d0 + d)
    return stats.t(d0 + d, np.mean(values), np.sqrt(variance * (1 + 1 / len(values))))


def prior_of(samples):
    """(d0, s0^2) of a list of samples: section 6.2 in plain loops; the equation for d0 is solved by bisection."""
    variances = [np.var(values, ddof=1) for values in samples]
    e, noise = [], []
    for values, variance in zip(samples, variances, strict=True):
        half = (len(values) - 1) / 2
        e.append(np.log(max(variance, 1e-5 * np.median(variances))) - special.digamma(half) + np.log(half))
        noise.append(special.polygamma(1, half))
    if np.var(e) <= np.mean(noise):
        squares = sum(((values - np.mean(values)) ** 2).sum() for values in samples)
        return 1e9, squares / sum(len(values) - 1 for values in samples)
    half = optimize.brentq(lambda x: special.polygamma(1, x) - np.var(e) + np.mean(noise), 1e-3, 1e6, xtol=1e-12)
    return 2 * half, np.exp(np.mean(e) + special.digamma(half) - np.log(half))


def varied(seed=0, n_models=12, n=60, freedom=5.0, leak=1.0, member=None):
    """phi [M, N] whose examples differ in difficulty and in their two spreads, IN and OUT: sigma^2 = d0 / chi^2(d0)."""
    rng = np.random.default_rng(seed)
    member = halves_of_pool(rng, n_models, n) if member is None else member
    spread = np.where(member, *np.sqrt(freedom / rng.chisquare(freedom, (2, n))))
    return rng.normal(3, 2, n) + leak * member + spread * rng.normal(size=member.shape), member


@pytest.mark.parametrize("freedom", [3.0, 1e6])
@pytest.mark.parametrize("design", ["pair", "subsets"])
def test_shrunken_lira_equals_a_twin_in_plain_loops(design, freedom):
    phi, member = varied(freedom=freedom, member=subsets(3, 12, 60) if design == "subsets" else None)
    phi[:, 5] = 2.0  # an example without any spread
    online, offline = (shadow.lira(phi, member, offline, "shrunk") for offline in (False, True))
    for m in (0, 7):
        others = np.delete(np.arange(12), [m, m ^ 1] if design == "pair" else [m])
        sides = [[phi[others, i][side[others, i]] for i in range(60)] for side in (member, ~member)]
        within, out = ([shrunken(v, *prior) for v in s] for s in sides for prior in [prior_of(s)])
        ratio = [a.logpdf(x) - b.logpdf(x) for x, a, b in zip(phi[m], within, out, strict=True)]
        np.testing.assert_allclose(online[m], ratio, rtol=1e-4, atol=1e-5)
        # the normal deviate of the same tail, to which Wallace's formula comes near
        deviate = stats.norm.isf([b.sf(x) for x, b in zip(phi[m], out, strict=True)])
        near = np.abs(deviate) < 6
        np.testing.assert_allclose(offline[m][near], deviate[near], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("freedom", [3.0, 20.0])
def test_the_prior_is_recovered_from_simulated_variances(n, freedom):
    rng = np.random.default_rng(1)
    variance = 0.7 * freedom / rng.chisquare(freedom, 20_000)
    squares = variance * rng.chisquare(n - 1, 20_000)
    d0, common = shadow.prior(n, squares)
    assert d0 == pytest.approx(freedom, rel=0.25) and common == pytest.approx(0.7, rel=0.03)
    n = rng.integers(3, 9, 20_000)  # examples in different numbers of models
    d0, common = shadow.prior(n, variance * rng.chisquare(n - 1))
    assert d0 == pytest.approx(freedom, rel=0.25) and common == pytest.approx(0.7, rel=0.03)
    assert shadow.prior(4, np.full(100, 6.0)) == (np.inf, pytest.approx(2.0))  # all alike


def test_without_a_prior_each_example_has_its_own_variance_and_with_an_infinite_one_all_share(monkeypatch):
    phi, member = varied()
    new = 1 + 1 / 5  # of the 6 models on either side, 5 without the pair: the mean is an estimate, too
    own, pooled = (shadow.lira(phi, member, True, v) for v in ("example", "pooled"))
    monkeypatch.setattr(shadow, "prior", lambda n, squares: (0.0, 1.0))
    t = own * np.sqrt(4 / 5 / new)  # s^2 has Bessel's correction; t with 4 degrees of freedom
    np.testing.assert_allclose(shadow.z_score(t, 1.0, 4), shadow.lira(phi, member, True, "shrunk"), rtol=1e-5)
    monkeypatch.setattr(shadow, "prior", lambda n, squares: (np.inf, squares.sum() / (n - 1) / len(squares)))
    np.testing.assert_allclose(shadow.lira(phi, member, True, "shrunk"), pooled / np.sqrt(new), rtol=1e-5)
    log_ratios = [shadow.lira(phi, member, False, v) for v in ("pooled", "shrunk")]
    np.testing.assert_allclose(np.diff(np.argsort(log_ratios, axis=2), axis=0), 0)  # but for 1/new and a constant alike


def test_with_eight_models_shrunken_variances_tell_more_than_each_examples_own_or_one_for_all():
    found = {variance: [] for variance in shadow.VARIANCES}
    for seed in range(10):
        phi, member = varied(seed, 8, 500)
        for variance, aucs in found.items():
            aucs.append(auc_influence_values(shadow.lira(phi, member, variance=variance), member).mean())
    for other in ("example", "pooled"):
        gain = np.subtract(found["shrunk"], found[other])
        assert stats.ttest_1samp(gain, 0).statistic > 5, (other, gain.mean())


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


@pytest.mark.parametrize("gamma", [1.0, 1.3])
@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("population", [False, True])
@pytest.mark.parametrize("design", ["pair", "subsets"])
def test_rmia_equals_pairwise_counts(offline, population, design, gamma):
    phi, member = leaky()
    member = subsets(3, 10, 60) if design == "subsets" else member
    p = 1 / (1 + np.exp(-phi))
    z = 1 / (1 + np.exp(-np.random.default_rng(9).normal(1, 1.5, (10, 23)))) if population else None
    fast = shadow.rmia(p, member, z, offline, gamma=gamma, a=0.4)
    for m in range(10):
        slow = pairwise_rmia(p, z, member, m, offline, gamma, 0.4, [m, m ^ 1] if design == "pair" else [m])
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


def test_statistics_of_more_examples_than_a_block_holds():
    n, rng = 2 * shadow.BLOCK + 7, np.random.default_rng(0)
    x, chosen = rng.normal(3, 2, (9, n)).astype(np.float32), rng.random((9, n)) < 0.6
    chosen[:2] = True
    counts, mean, squares = shadow.statistics(x, chosen)
    for i in (0, shadow.BLOCK - 1, shadow.BLOCK, n - 1):
        values = x[chosen[:, i], i].astype(float)
        assert counts[i] == len(values)
        np.testing.assert_allclose([mean[i], squares[i]], [values.mean(), len(values) * values.var()], rtol=1e-12)


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

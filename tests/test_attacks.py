"""Attacks against independent twins: loops over targets and examples that follow papers and their code."""

import numpy as np
import pytest
from scipy import stats

from lib.attacks import catalogue, intervals, shadow, thresholds
from lib.attacks.intervals import auc_influence_values, balanced_accuracy_influence_values, calibration_split, estimate


def halves_of_pool(rng, n_models, n):
    """member [M, N]: complementary pairs on random halves."""
    half = np.argsort(rng.random((n_models // 2, n)), axis=1) < n // 2
    return np.stack([half, ~half], axis=1).reshape(n_models, n)


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


# ---- LiRA ------------------------------------------------------------------------------------------------


def generate_ours(keep, scores, check_keep, check_scores, centre, variance, offline):
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
            elif variance == "global":
                std = np.std(np.concatenate(dat), 0)
            else:
                within = sum(((d - d.mean(0)) ** 2).sum(0) for d in dat)
                std = np.sqrt(within / sum(len(d) - 1 for d in dat))
            log[name] = stats.norm.logpdf(sc, mean, std)
            z = (sc - mean) / std  # the last one is OUT's
        predictions.append((z if offline else log["in"] - log["out"]).mean())
    return np.array(predictions)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("variance", ["example", "pooled", "global"])
@pytest.mark.parametrize("center", ["mean", "median"])
@pytest.mark.parametrize("design", ["model", "pair", "subsets", "queries"])
def test_lira_equals_the_authors_algorithm(design, center, variance, offline):
    phi, member = leaky(n_models=12, n=30, queries=(3,) if design == "queries" else ())
    if design == "subsets":
        member = subsets(3, 12, 30)
    leave = None if design in ("subsets", "queries") else design
    fast = shadow.lira(phi, member, offline, variance, center, leave)
    cube = np.moveaxis(phi, 1, 2) if phi.ndim == 3 else phi[:, :, None]
    for m in range(len(phi)):
        gone = [m, m ^ 1] if design in ("pair", "queries") else [m]
        others = np.delete(np.arange(len(phi)), gone)
        slow = generate_ours(member[others], cube[others], member[m], cube[m], getattr(np, center), variance, offline)
        np.testing.assert_allclose(fast[m], slow, rtol=1e-4, atol=1e-5)


def test_lira_median_with_ties():
    phi, member = leaky(n_models=8, n=40)
    phi = np.round(phi)  # most examples have equal phi among their models
    fast = shadow.lira(phi, member, variance="global", center="median", offline=True, leave="model")
    for m in range(8):
        others, outside = np.delete(phi, m, 0), ~np.delete(member, m, 0)
        medians = np.array([np.median(others[outside[:, i], i]) for i in range(40)])
        np.testing.assert_allclose(fast[m], (phi[m] - medians) / np.std(others[outside]), atol=1e-5)


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


# ---- thresholds ------------------------------------------------------------------------------------------


def best_threshold(s, member):
    """All thresholds tried: midpoints of neighbours, and the largest score."""
    values = np.unique(s)
    candidates = [*((values[1:] + values[:-1]) / 2), values[-1]]
    gains = [np.mean(s[member] > t) - np.mean(s[~member] > t) for t in candidates]
    return candidates[int(np.flatnonzero(np.isclose(gains, max(gains), atol=1e-12))[0])]


@pytest.mark.parametrize("ties", [False, True])
def test_classwise_equals_loops_over_targets_classes_and_thresholds(ties):
    scores, member = leaky(n_models=4, n=120)
    if ties:
        scores = np.round(scores)
    y = np.array([7, 3, 5])[np.arange(120) % 3]
    y[:3] = 9  # a class of three: one half must lack a kind
    fast, half, fallbacks = thresholds.classwise(scores, member, y, seed=4), calibration_split(member, 4, y), 0
    for m in range(4):
        for h in (False, True):
            for c in np.unique(y):
                use = (half[m] == h) & (y == c)
                if not (member[m, use].any() and (~member[m, use]).any()):
                    use, fallbacks = half[m] == h, fallbacks + 1
                t = best_threshold(scores[m, use], member[m, use])
                judged = (half[m] != h) & (y == c)
                np.testing.assert_allclose(fast[m, judged], scores[m, judged] - t, atol=1e-5)
    assert fallbacks


def test_classwise_beats_one_threshold_where_classes_differ():
    scores, member = leaky(n_models=8, n=600, leak=2.0)
    y = np.arange(600) % 3
    scores = scores + 10 * y
    learned = balanced_accuracy_influence_values(scores, member).mean()
    assert (
        balanced_accuracy_influence_values(thresholds.classwise(scores, member, y), member, 0.0).mean() > learned + 0.1
    )


def test_two_eyes_of_a_patient_are_judged_by_what_neither_taught():
    rng = np.random.default_rng(0)
    eyes = np.repeat(np.arange(40), 2)
    member, y = halves_of_pool(rng, 4, 40)[:, eyes], rng.integers(0, 3, 40)[eyes]
    logits = rng.normal(size=(4, 40, 3))[:, eyes]  # a patient's eyes look alike: one would give the other away
    found = catalogue.single(logits, y, member, groups=eyes)
    for name, scores in found.items():
        np.testing.assert_array_equal(scores[:, ::2], scores[:, 1::2], err_msg=name)
    split = catalogue.single(logits, y, member)
    for name in ("loss", "confidence_classwise", "neural", "neural_classwise"):
        assert (split[name][:, ::2] != split[name][:, 1::2]).any()
    right = [balanced_accuracy_influence_values(found["confidence"], member, groups=g) for g in (eyes, None)]
    assert (right[0] != right[1]).any()


def test_gap_and_yeom_equal_their_closed_forms():
    rng = np.random.default_rng(0)
    member, y = halves_of_pool(rng, 6, 80), rng.integers(0, 3, 80)
    logits = rng.normal(size=(6, 80, 3)) + 2 * member[..., None] * np.eye(3)[y]
    out = catalogue.run(logits, y, member, seed=3)
    correct = logits.argmax(-1) == y
    gap = [correct[m, member[m]].mean() - correct[m, ~member[m]].mean() for m in range(6)]
    assert balanced_accuracy_influence_values(out["gap"], member, 0.0).mean() == pytest.approx(0.5 + np.mean(gap) / 2)
    loss = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, y[None, :, None], 2)[..., 0]
    half = calibration_split(member, 3, y)
    for m in range(6):
        for h in (False, True):
            mean = loss[m, member[m] & (half[m] == h)].mean()
            judged = half[m] != h
            assert ((out["loss"][m, judged] > 0) == (loss[m, judged] < mean)).all()
            np.testing.assert_allclose(np.exp(out["loss"][m, judged]), mean / loss[m, judged], rtol=1e-4)


# ---- all together ----------------------------------------------------------------------------------------


def ensemble(seed=0, n_models=16, n=300, n_classes=5, leak=1.5):
    """Logits [M, N, C] whose label's logit is higher for members; examples differ in difficulty."""
    rng = np.random.default_rng(seed)
    member, y = halves_of_pool(rng, n_models, n), rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n_models, n, n_classes))
    logits[:, np.arange(n), y] += rng.normal(3, 1.5, n) + leak * member
    return logits.astype(np.float16), y, member


def test_run_finds_a_planted_leak_with_every_attack_and_nothing_in_the_null():
    logits, y, member = ensemble()
    population = ensemble(seed=8)[0][:, :100]
    extra = {"population_logits": population, "population_y": np.zeros(100, int)}
    found = catalogue.run(logits, y, member, **extra)
    nothing = catalogue.run(logits, y, catalogue.null_member(member), **extra)
    assert tuple(found) == catalogue.NAMES and set(catalogue.FIXED) < set(found)
    for name, scores in found.items():
        assert scores.shape == member.shape and scores.dtype == np.float32
        assert estimate(auc_influence_values(scores, member)).low > 0.5, name
        null = estimate(auc_influence_values(nothing[name], catalogue.null_member(member)), level=0.999)
        assert null.low < 0.5 < null.high, name
    auc = {name: auc_influence_values(scores, member).mean() for name, scores in found.items()}
    assert auc["lira_pooled"] > auc["confidence"] + 0.05 > auc["gap"]


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


def test_null_member_keeps_the_design():
    _, member = leaky()
    null = catalogue.null_member(member, 1)
    assert (null[0::2] == ~null[1::2]).all() and (null.sum(0) == 5).all() and (null.sum(1) == 30).all()
    assert abs(np.mean(null == member) - 0.5) < 0.2
    assert (null != catalogue.null_member(member, 2)).any()


def test_null_member_draws_each_pair_by_itself_and_without_pairs_one_order_for_all():
    member = np.repeat(np.random.default_rng(0).permuted(np.tile(np.arange(300) < 150, (6, 1)), axis=1), 2, axis=0)
    member[1::2] = ~member[::2]
    member[2], member[3] = member[0], member[1]  # two models on the same half
    null = catalogue.null_member(member)
    assert (null[0::2] == ~null[1::2]).all() and 0.3 < (null[0] == null[2]).mean() < 0.7
    alone = member[::2]
    null = catalogue.null_member(alone)
    np.testing.assert_array_equal(null[0], null[1])
    assert (np.sort(null.sum(0)) == np.sort(alone.sum(0))).all() and (null != alone).any()


def test_null_member_keeps_groups_whole():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(60), [1] * 20 + [2] * 20 + [3] * 20))
    half = np.arange(60) % 2 == 0
    member = np.stack([half[groups], ~half[groups]])
    null = catalogue.null_member(member, 3, groups)
    for group in range(60):
        assert len(set(null[0, groups == group])) == 1
    assert null[0].sum() == member[0].sum() and (null[0] == ~null[1]).all()
    assert 0.3 < (null == member).mean() < 0.7
    named = catalogue.null_member(member, 3, np.char.mod("p%02d", groups))
    np.testing.assert_array_equal(null, named)
    alone = [(catalogue.null_member(member[:, :6], seed, np.array([7, 7, 7, 7, 8, 8]))[0, 0]) for seed in range(200)]
    assert 0.35 < np.mean(alone) < 0.65  # a group without another of its size changes sides


def test_the_null_is_one_half_where_halves_that_overlap_make_alike_models():
    """phi moves with what a half holds: one order of the columns for all would let LiRA see which halves overlap."""
    found = {"each pair": [], "all alike": []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        half = np.argsort(rng.random((8, 40)), axis=1) < 20
        member = np.stack([half, ~half], 1).reshape(16, 40)
        phi = (2 * member - 1) @ rng.normal(size=(40, 400)) + rng.normal(size=(16, 400))
        phi, wide = np.concatenate([phi[:, :0], phi], 1), np.tile(member, 10)
        order = rng.permutation(400)
        for name, alleged in (("each pair", catalogue.null_member(wide, seed)), ("all alike", wide[:, order])):
            found[name].append(auc_influence_values(shadow.lira(phi, alleged, variance="pooled"), alleged).mean())
    error = {name: np.std(values) / np.sqrt(60) for name, values in found.items()}
    assert abs(np.mean(found["each pair"]) - 0.5) < 3 * error["each pair"]
    assert np.mean(found["all alike"]) - 0.5 > 3 * error["all alike"]


def test_run_queries_reach_lira_and_rmia_only():
    logits, y, member = ensemble(n_models=8, n=60)
    plain = catalogue.run(logits, y, member)
    queried = catalogue.run(np.stack([logits, logits[..., ::-1]], 1), y, member)
    for name in catalogue.NAMES:
        assert np.array_equal(plain[name], queried[name]) == (not name.startswith(("lira", "rmia"))), name
    same = catalogue.run(np.stack([logits, logits], 1), y, member)
    for name in catalogue.NAMES:
        np.testing.assert_allclose(same[name], plain[name], rtol=1e-5, atol=1e-6)


# ---- faults ----------------------------------------------------------------------------------------------


def test_too_few_models_are_named():
    phi, member = leaky(n_models=4)
    with pytest.raises(ValueError, match="n_models = 4; valid are at least 3 IN and OUT .*n_models >= 6"):
        shadow.lira(phi, member)
    with pytest.raises(ValueError, match="too few n_models"):
        shadow.lira(phi, member, variance="pooled")
    assert np.isfinite(shadow.lira(phi, member, variance="pooled", leave="model")).all()
    shadow.rmia(1 / (1 + np.exp(-phi)), member)
    with pytest.raises(ValueError, match="n_models = 2; valid are at least 2 OUT"):
        shadow.rmia(phi[:2], member[:2], offline=True)


def test_an_example_in_all_or_no_models_is_named():
    phi, member = leaky()
    member[:, 7] = True
    with pytest.raises(ValueError, match="example 7 is in all of n_models = 10"):
        shadow.lira(phi, member, offline=True)
    member[:, 7] = False
    with pytest.raises(ValueError, match="example 7 is in none"):
        shadow.lira(phi, member)
    assert np.isfinite(shadow.lira(phi, member, offline=True)).all()  # OUT is all it needs


@pytest.mark.parametrize(
    "change, words",
    [
        ({"variance": "fixed"}, "variance: 'fixed'; valid"),
        ({"center": "mode"}, "center: 'mode'; valid"),
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


@pytest.mark.parametrize(
    "change, words",
    [
        ({"logits": np.zeros((300, 5))}, "logits: shape"),
        ({"member": np.zeros((16, 299), bool)}, "member: shape"),
        ({"y": np.full(300, 9)}, "y: values 9"),
        ({"population_logits": np.zeros((16, 10, 5))}, "population_y: missing"),
    ],
)
def test_run_faults_are_named(change, words):
    logits, y, member = ensemble()
    with pytest.raises(ValueError, match=words):
        catalogue.run(**{"logits": logits, "y": y, "member": member, **change})


def test_classwise_refuses_labels_of_another_length():
    phi, member = leaky()
    with pytest.raises(ValueError, match="y: shape"):
        thresholds.classwise(phi, member, np.zeros(59, int))


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
        intervals.evaluate(straight, member, fprs=()),
        intervals.evaluate(straight[order], member[order], fprs=()),
    )
    np.testing.assert_allclose(first[["value", "ci_low", "ci_high"]], second[["value", "ci_low", "ci_high"]], atol=1e-9)
    assert intervals.partners(rng.random((4, 9)) < 0.5) is None

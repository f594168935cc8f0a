"""Metrics against scikit-learn, plain loops and the textbook variance; intervals by simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks import calibration
from benchmarks.calibration import halves_of_pool
from lib.attacks import intervals
from lib.attacks.membership import calibration_split


def example(seed=0, n_models=8, n=60, leak=1.0, ties=False):
    rng = np.random.default_rng(seed)
    member = halves_of_pool(rng, n_models, n)
    scores = rng.normal(size=(n_models, n)) + leak * member + rng.normal(size=n)
    return (np.round(scores) if ties else scores), member


def uneven(seed=1, n_models=7, n=50):
    """Independent subsets of different sizes."""
    rng = np.random.default_rng(seed)
    member = rng.random((n_models, n)) < rng.uniform(0.2, 0.8, (n_models, 1))
    return rng.normal(size=(n_models, n)) + member, member


def evaluate(scores, member, **how):
    """`table` of one ensemble's scores, without optimizer and baseline."""
    return intervals.table({"": scores}, member, **how).drop(columns=["optimizer", "baseline"])


def compare(a, b, member, **how):
    """The paired differences b minus a of `table`, without optimizer and baseline."""
    frame = intervals.table({"a": a, "b": b}, member, **how)
    return frame[frame.baseline == "a"].drop(columns=["optimizer", "baseline"]).reset_index(drop=True)


# ---- intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [None, [0, 0, 0, 5, 5, 2], [3, 1, 4, 0, 9, 8]])
def test_estimate_equals_the_textbook_two_way_formula(clusters):
    rng = np.random.default_rng(2)
    influence_values = rng.normal(size=(6, 9)) + rng.normal(size=9) + rng.normal(size=(6, 1))
    names = np.array([0, 0, 1, 1, 2, 2] if clusters is None else clusters)
    rows = [(names[m], i, influence_values[m, i] - influence_values.mean()) for m in range(6) for i in range(9)]

    def one_way(key):
        """G/(G-1) x the sum of products of deviations over all pairs of cells with the same key."""
        g = len({key(r) for r in rows})
        return g / (g - 1) * sum(a[2] * b[2] for a in rows for b in rows if key(a) == key(b)) / 54**2

    n_groups = len(set(names))
    v_rows, v_columns, pairs = one_way(lambda r: r[0]), one_way(lambda r: r[1]), n_groups * 9
    v_both = one_way(lambda r: (r[0], r[1])) * (pairs - 1) / pairs
    v = max(v_rows + v_columns - v_both, v_rows, v_columns)
    df = v**2 / (v_rows**2 / (n_groups - 1) + v_columns**2 / 8)
    half = stats.t.ppf(0.975, df) * np.sqrt(v)
    found = intervals.estimate(influence_values, clusters)
    np.testing.assert_allclose(
        found, [influence_values.mean(), influence_values.mean() - half, influence_values.mean() + half]
    )


def test_estimate_of_one_factor_is_the_t_interval():
    by_pair = np.array([1.0, 4, 2, 7]).repeat(2)[:, None] * np.ones(500)
    by_example = np.ones((8, 1)) * np.array([1.0, 4, 2, 7, 3])
    for influence_values, values in ((by_pair, [1, 4, 2, 7]), (by_example, [1, 4, 2, 7, 3])):
        expected = stats.t.interval(0.9, len(values) - 1, np.mean(values), stats.sem(values))
        np.testing.assert_allclose(intervals.estimate(influence_values, level=0.9)[1:], expected, rtol=1e-6)


def test_widen_multiplies_the_row_term():
    influence_values = np.array([1.0, 4, 2, 7]).repeat(2)[:, None] * np.ones(500)
    plain, wide = intervals.estimate(influence_values), intervals.estimate(influence_values, shadow_correction=12)
    assert wide.high - wide.value == pytest.approx(2 * (plain.high - plain.value), rel=1e-6)


def test_rates_stay_inside_the_unit_interval():
    rng = np.random.default_rng(0)
    influence_values = (rng.random((6, 30)) < 0.02).astype(float)
    influence_values[0, 0] = 1
    plain, rate = intervals.estimate(influence_values), intervals.estimate(influence_values, rate=True)
    assert plain.low < 0 < rate.low < rate.value == plain.value < rate.high < 1
    middle = 0.5 + 0.1 * rng.normal(size=(20, 300)), 0.5 + 0.001 * rng.normal(size=(20, 300))
    for influence_values in middle:  # far from the ends the two agree
        np.testing.assert_allclose(
            intervals.estimate(influence_values), intervals.estimate(influence_values, rate=True), rtol=1e-3
        )


def test_rates_of_zero_and_one_have_clopper_pearson_bounds():
    none, all_ = (intervals.estimate(np.full((6, 200), v), rate=True) for v in (0.0, 1.0))
    bound = stats.beta.ppf(0.975, 1, 200)  # 0 of 200
    np.testing.assert_allclose(none, [0, 0, bound])
    np.testing.assert_allclose(all_, [1, 1 - bound, 1])


@pytest.mark.parametrize("found, n", [(0, 5), (3, 8), (5, 5), (8, 8), (6, 7)])
def test_a_proportion_has_the_exact_interval_and_a_tie_counts_half(found, n):
    low = stats.beta.ppf(0.025, found, n - found + 1) if found else 0.0
    high = stats.beta.ppf(0.975, found + 1, n - found) if found < n else 1.0
    np.testing.assert_allclose(intervals.proportion(found, n), [found / n, low, high])
    if found < n:
        tie = intervals.proportion(found + 0.5, n)
        above = intervals.proportion(found + 1, n)
        np.testing.assert_allclose(tie, [(found + 0.5) / n, low, above.high])


def test_six_trials_are_the_fewest_that_exclude_a_half():
    assert [n for n in range(1, 12) if intervals.proportion(n, n).low > 0.5][0] == 6


@pytest.mark.parametrize("rate", [False, True])
@pytest.mark.parametrize("shape", [(2, 40), (1, 40), (6, 1)])
def test_no_interval_without_two_clusters_and_two_examples(shape, rate):
    for influence_values in (np.random.default_rng(0).random(shape), np.zeros(shape)):
        found = intervals.estimate(influence_values, rate=rate)
        assert found.value == pytest.approx(influence_values.mean()) and np.isnan(found[1:]).all()


def test_constant_cells_have_a_point_interval():
    assert intervals.estimate(np.full((4, 6), 0.25)) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    "influence_values, clusters, words",
    [(np.zeros(5), None, "values: "), (np.full((4, 5), np.nan), None, "values: .* mean nan")],
)
def test_estimate_faults_are_named(influence_values, clusters, words):
    with pytest.raises(ValueError, match=words):
        intervals.estimate(influence_values, clusters)


# ---- examples in groups, and models that are given -------------------------------------------------------


def doubled(x):
    return np.repeat(x, 2, axis=-1)


@pytest.mark.parametrize("how", [{}, {"rate": True}, {"shadow_correction": 5.0}, {"examples_only": True}])
def test_doubled_columns_in_groups_give_the_interval_of_single_ones(how):
    rng = np.random.default_rng(4)
    influence_values, names = rng.random((8, 30)) + 0.2 * rng.random(30), doubled(rng.permutation(30) - 7)
    order = rng.permutation(60)
    found = intervals.estimate(doubled(influence_values)[:, order], columns=names[order], **how)
    np.testing.assert_allclose(found, intervals.estimate(influence_values, **how), rtol=1e-12)
    alone = intervals.estimate(influence_values, columns=rng.permutation(30), **how)  # groups of one
    np.testing.assert_allclose(alone, intervals.estimate(influence_values, **how), rtol=1e-12)


def test_groups_of_unequal_size_equal_the_plain_formula():
    rng = np.random.default_rng(5)
    influence_values, names = rng.normal(size=(1, 12)), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4])
    sums = [(influence_values[0, names == k] - influence_values.mean()).sum() for k in range(5)]
    half = stats.t.ppf(0.975, 4) * np.sqrt(5 / 4 * np.square(sums).sum()) / 12
    found = intervals.estimate(influence_values, columns=names, examples_only=True)
    np.testing.assert_allclose(
        found, [influence_values.mean(), influence_values.mean() - half, influence_values.mean() + half]
    )


def test_a_rate_of_zero_counts_groups():
    found = intervals.estimate(np.zeros((6, 200)), rate=True, columns=np.arange(200) // 2)
    np.testing.assert_allclose(found, [0, 0, stats.beta.ppf(0.975, 1, 100)])


def test_one_group_and_columns_of_another_length():
    assert np.isnan(intervals.estimate(np.random.default_rng(0).random((4, 6)), columns=np.zeros(6))[1:]).all()


def test_tables_count_groups():
    scores, member = example(n_models=12, n=300)
    frames = []
    for f, how in ((np.asarray, {}), (doubled, {"columns": doubled(np.arange(300))})):
        scored = {"a": f(scores), "b": f(scores + member)}
        frames.append(intervals.table(scored, f(member), fprs=(), threshold=0.0, **how))
    pd.testing.assert_frame_equal(*frames)
    difference = compare(scores, scores + member, member, fprs=(), columns=np.arange(300) // 3)
    assert difference.ci_low[0] != compare(scores, scores + member, member, fprs=()).ci_low[0]


def test_groups_restore_the_coverage_that_correlated_pairs_take():
    rng, found = np.random.default_rng(6), []
    for _ in range(400):
        eyes = 0.95 * doubled(rng.normal(size=(1, 60))) + 0.3 * rng.normal(size=(1, 120))
        influence_values = eyes + 0.1 * rng.normal(size=(8, 120))
        found.append([intervals.estimate(influence_values, columns=c) for c in (None, np.arange(120) // 2)])
    plain, grouped = ((np.array(found)[..., 1] < 0) & (0 < np.array(found)[..., 2])).mean(0)
    assert plain < 0.88 and 0.92 < grouped < 0.98, (plain, grouped)


def test_one_given_model_has_delongs_interval_and_the_t_interval():
    scores, member = example(n_models=2, n=400)
    s, inside = scores[0], member[0]
    found = intervals.estimate(intervals.auc_influence_values(scores[:1], member[:1]), examples_only=True)
    v10 = [(s[~inside] < x).mean() for x in s[inside]]
    v01 = [(s[inside] > x).mean() for x in s[~inside]]
    delong = np.sqrt(np.var(v10, ddof=1) / len(v10) + np.var(v01, ddof=1) / len(v01))
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 399) * delong, rel=0.01)
    influence_values = np.random.default_rng(0).normal(size=(3, 50))
    found, means = intervals.estimate(influence_values, examples_only=True), influence_values.mean(0)
    np.testing.assert_allclose(found, [means.mean(), *stats.t.interval(0.95, 49, means.mean(), stats.sem(means))])


@pytest.mark.parametrize("fpr", [0.1, 0.25])
def test_tpr_within_one_model_equals_a_plain_loop(fpr):
    scores, member = example(n_models=2, n=200)
    tpr, realised = intervals.tpr_influence_values(scores, member, fpr, calibration_split(member, 3))
    for m, half in enumerate(calibration_split(member, 3)):
        flagged = np.empty(200, bool)
        for h in (False, True):
            null = scores[m, ~member[m] & (half == h)]
            flagged[half != h] = scores[m, half != h] > min(t for t in null if np.mean(null > t) <= fpr)
        assert tpr[m].mean() == pytest.approx(flagged[member[m]].mean())
        assert realised[m].mean() == pytest.approx(flagged[~member[m]].mean())


def test_tpr_within_one_model_covers_the_truth():
    # N(1, 1) for members and N(0, 1) else: ROC(f) = Phi(1 + Phi^-1(f))
    rng, member, found = np.random.default_rng(7), np.arange(600)[None] < 300, []
    for seed in range(300):
        scores, half = rng.normal(size=(1, 600)) + member, calibration_split(member, seed)
        influence_values = intervals.tpr_influence_values(scores, member, 0.1, half)[0]
        found.append(intervals.estimate(influence_values, rate=True, examples_only=True))
    value, low, high = np.array(found).T
    truth = stats.norm.cdf(1 + stats.norm.ppf(0.1))
    assert value.mean() == pytest.approx(truth, abs=0.015)
    assert 0.9 < ((low < truth) & (truth < high)).mean() < 0.99


def test_one_given_model_has_a_whole_table():
    scores, member = example(n_models=2, n=500)
    found = evaluate(scores[:1], member[:1], examples_only=True)
    assert found.metric.tolist() == ["auc", "balanced_accuracy", "advantage", "tpr@0.1", "realised_fpr@0.1"]
    assert (found.ci_low < found.value).all() and (found.value < found.ci_high).all()
    assert evaluate(scores[:1], member[:1]).ci_low.isna().all()


# ---- influence values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [example(), example(ties=True), uneven(), example(leak=50)])
def test_auc_equals_scikit_learn_per_target(data):
    scores, member = data
    influence_values = intervals.auc_influence_values(scores, member)
    expected = [roc_auc_score(inside, s) for s, inside in zip(scores, member, strict=True)]
    np.testing.assert_allclose(influence_values.mean(1), expected, atol=1e-12)


def test_auc_cells_are_delongs_placements():
    scores, member = example(ties=True)
    influence_values, s, inside = intervals.auc_influence_values(scores, member), scores[0], member[0]
    auc = roc_auc_score(inside, s)
    for i in range(60):
        others = s[inside != inside[i]]
        place = np.mean(others < s[i]) + np.mean(others == s[i]) / 2
        assert influence_values[0, i] == pytest.approx(auc + 2 * ((place if inside[i] else 1 - place) - auc))


def test_auc_interval_of_one_target_is_delongs():
    # independent examples, every pair with the same scores: only the examples vary
    scores, member = example(n_models=2, n=400)
    s, inside = scores[0], member[0]
    found = intervals.estimate(intervals.auc_influence_values(np.tile(s, (40, 1)), np.tile(inside, (40, 1))))
    v10 = [(s[~inside] < x).mean() for x in s[inside]]
    v01 = [(s[inside] > x).mean() for x in s[~inside]]
    delong = np.sqrt(np.var(v10, ddof=1) / len(v10) + np.var(v01, ddof=1) / len(v01))
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 399) * delong, rel=0.01)


@pytest.mark.parametrize("data", [example(n=90), example(n=90, ties=True), uneven()])
@pytest.mark.parametrize("fpr", [0.1, 0.25])
def test_tpr_and_realised_fpr_equal_a_plain_loop(data, fpr):
    scores, member = data
    tpr, realised = intervals.tpr_influence_values(scores, member, fpr)
    expected_tpr, expected_fpr = [], []
    for m in range(len(scores)):
        others = [k for k in range(len(scores)) if (k // 2) % 2 != (m // 2) % 2]
        null = np.concatenate([scores[k][~member[k]] for k in others])
        limit = min(t for t in null if np.mean(null > t) <= fpr)
        expected_tpr.append(np.mean(scores[m][member[m]] > limit))
        expected_fpr.append(np.mean(scores[m][~member[m]] > limit))
    assert tpr.mean() == pytest.approx(np.mean(expected_tpr))
    np.testing.assert_allclose(realised.mean(1), expected_fpr, atol=1e-12)


def test_tpr_cells_carry_the_error_of_the_threshold():
    # independent scores, N(1, 1) for members and N(0, 1) else: ROC(f) = Phi(1 + q), q = Phi^-1(f)
    rng = np.random.default_rng(3)
    member = halves_of_pool(rng, 40, 2000)
    influence_values = intervals.tpr_influence_values(rng.normal(size=member.shape) + member, member, 0.1)[0]
    q = stats.norm.ppf(0.1)
    tpr, slope = stats.norm.cdf(1 + q), stats.norm.pdf(1 + q) / stats.norm.pdf(q)
    # Var = tpr (1 - tpr) / n_in + slope^2 fpr (1 - fpr) / n_out (Hsieh & Turnbull 1996)
    variance = (tpr * (1 - tpr) + slope**2 * 0.1 * 0.9) / (member.size / 2)
    assert influence_values.var() / influence_values.size == pytest.approx(variance, rel=0.05)
    assert influence_values.mean() == pytest.approx(tpr, abs=4 * np.sqrt(variance))


def test_ratio_cells_are_means_over_the_chosen_with_their_sampling_error():
    x, chosen = uneven(n_models=40, n=3000)
    influence_values = intervals.ratio_influence_values(x, chosen)
    np.testing.assert_allclose(influence_values.mean(1), [x[m, chosen[m]].mean() for m in range(40)])
    np.testing.assert_array_equal(influence_values[3], intervals.ratio_influence_values(x[3], chosen[3]))
    np.testing.assert_allclose(intervals.ratio_influence_values(np.where(chosen, x, 99.0), chosen), influence_values)
    # independent entries of variance 1: Var of a row's mean = 1 / n, so its cells have variance N / n
    np.testing.assert_allclose(influence_values.var(1), 3000 / chosen.sum(1), rtol=0.2)


@pytest.mark.parametrize("data", [example(n=90), uneven(n=80)])
def test_balanced_accuracy_equals_its_definition(data):
    scores, member = data

    def definition(s, inside, limit):
        return (np.mean(s[inside] > limit) + np.mean(s[~inside] <= limit)) / 2

    rows = range(len(scores))
    fixed = intervals.balanced_accuracy_influence_values(scores, member, 0.7)
    np.testing.assert_allclose(fixed.mean(1), [definition(scores[m], member[m], 0.7) for m in rows])
    half, learned = (calibration_split(member, 5), intervals.balanced_accuracy_influence_values(scores, member, seed=5))
    for m in rows:
        right = np.empty(member.shape[1], bool)
        for h in (False, True):
            use = half[m] == h
            gains = [definition(scores[m, use], member[m, use], t) for t in np.sort(scores[m, use])]
            low = np.sort(scores[m, use])[int(np.argmax(gains)) :][:2]
            right[~use] = (scores[m, ~use] > low.mean()) == member[m, ~use]
        expected = (right[member[m]].mean() + right[~member[m]].mean()) / 2
        assert learned[m].mean() == pytest.approx(expected)


def test_learned_thresholds_are_not_judged_on_what_they_learned():
    scores, member = example(n=20, n_models=400, leak=0)
    found = intervals.estimate(intervals.balanced_accuracy_influence_values(scores, member))
    assert found.low < 0.5 < found.high and found.high - found.low < 0.06


# ---- tables ----------------------------------------------------------------------------------------------


def test_evaluate_is_tidy_and_consistent():
    scores, member = example(n_models=12, n=1000)
    table = evaluate(scores, member)
    assert list(table.columns) == ["metric", "value", "ci_low", "ci_high"]
    assert table.metric.tolist() == [
        "auc",
        "balanced_accuracy",
        "advantage",
        "tpr@0.1",
        "realised_fpr@0.1",
        "tpr@0.01",
        "realised_fpr@0.01",
    ]  # 3000 non-members a fold: not 0.001
    values = table.set_index("metric")
    assert (table.ci_low < table.value).all() and (table.value < table.ci_high).all()
    np.testing.assert_allclose(values.loc["advantage"], 2 * values.loc["balanced_accuracy"] - 1)
    for fpr in (0.1, 0.01):
        row = values.loc[f"realised_fpr@{fpr}"]
        assert row.ci_low < fpr < row.ci_high
    assert values.value["auc"] == pytest.approx(intervals.auc_influence_values(scores, member).mean())


def test_rates_are_reported_where_the_counts_allow():
    member = halves_of_pool(np.random.default_rng(0), 8, 1000)  # 2000 non-members in either fold
    assert intervals.reportable(member, (0.005, 0.0049)) == [0.005]
    assert intervals.reportable(member[:2], (0.1,)) == []
    table = evaluate(member[:2] + 0.0, member[:2])
    assert table.metric.tolist() == ["auc", "balanced_accuracy", "advantage"] and table.ci_low.isna().all()


def test_compare_is_b_minus_a_and_antisymmetric():
    a, member = example(n_models=12, n=400)
    b = a + 0.5 * member
    forth, back = compare(a, b, member), compare(b, a, member)
    difference = evaluate(b, member).value - evaluate(a, member).value
    np.testing.assert_allclose(forth.value, difference, atol=1e-12)
    np.testing.assert_allclose(forth.ci_low, -back.ci_high, atol=1e-12)
    assert forth.ci_low[0] > 0
    same = compare(a, a, member)
    assert (same[["value", "ci_low", "ci_high"]] == 0).all(axis=None)


def test_table_has_every_optimizer_and_its_difference_from_the_first():
    a, member = example(n_models=12, n=400)
    scores = {"sgd": a, "sam": a + 0.5 * member, "asam": a + 0.2 * member}
    found = intervals.table(scores, member, fprs=(0.1,), threshold=0.0)
    how, groups = {"fprs": (0.1,), "threshold": 0.0}, found.groupby(["optimizer", "baseline"])
    assert set(groups.groups) == {("sgd", ""), ("sam", ""), ("asam", ""), ("sam", "sgd"), ("asam", "sgd")}
    for (name, baseline), part in groups:
        own, difference = (evaluate(scores[name], member, **how), compare(a, scores[name], member, **how))
        expected = difference if baseline else own
        pd.testing.assert_frame_equal(part.drop(columns=["optimizer", "baseline"]).reset_index(drop=True), expected)


def test_a_log_ratio_covers_the_truth_and_cannot_fall_below_minus_100_percent():
    covered = 0
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(size=(4, 12, 40))
        below = 2 + 0.5 * noise[0] + 0.4 * noise[3][:, :1]  # common to both: pairs cancel
        above = 0.6 * below + 0.3 * noise[1] + 0.3 * noise[2][:, :1]
        found = intervals.estimate(intervals.log_ratio_influence_values(above, below))
        covered += found.low <= np.log(0.6) <= found.high
    assert 275 <= covered <= 297
    assert intervals.estimate(intervals.log_ratio_influence_values(below, below)) == (0, 0, 0)
    few = np.exp(np.random.default_rng(0).normal(size=(2, 4, 3)))
    change = (few[0] - few[1]) / few[1].mean()  # the baseline taken as known, on the plain scale
    assert intervals.estimate(change).low < -1
    assert 0 < np.exp(intervals.estimate(intervals.log_ratio_influence_values(*few)).low) < 1


def test_log_ratios_of_a_table_are_those_of_its_values_and_add_up():
    a, member = example(n_models=16, n=400)
    scores = {"sgd": a, "sam": a + 0.3 * member}
    own, found = (intervals.table(scores, member, log_ratios=log).set_index(["baseline", "metric"]) for log in (0, 1))
    pd.testing.assert_frame_equal(own.sort_index(), found.drop(index=set(found.index) - set(own.index)).sort_index())
    new = found.loc["sgd"].value.filter(like="log_ratio")
    value = found.loc[""].set_index("optimizer", append=True).value
    assert set(new.index) == {
        "log_ratio_auc",
        *(f"log_ratio_tpr@{r}{to}" for r in (0.1, 0.01) for to in ("", "_to_auc")),
    }
    assert new["log_ratio_auc"] == pytest.approx(np.log((value["auc", "sam"] - 0.5) / (value["auc", "sgd"] - 0.5)))
    for rate in (0.1, 0.01):
        tpr = np.log(value[f"tpr@{rate}", "sam"] / value[f"tpr@{rate}", "sgd"])
        assert new[f"log_ratio_tpr@{rate}"] == pytest.approx(tpr)
        assert new[f"log_ratio_tpr@{rate}_to_auc"] == pytest.approx(tpr - new["log_ratio_auc"])


def test_pairing_narrows_the_difference():
    rng = np.random.default_rng(1)
    a, member = example(n_models=16, n=300)
    b = a + 0.1 * member + 0.1 * rng.normal(size=a.shape)
    paired = compare(a, b, member).set_index("metric").loc["auc"]
    alone = evaluate(a, member).set_index("metric").loc["auc"]
    assert paired.ci_high - paired.ci_low < (alone.ci_high - alone.ci_low) / 2


@pytest.mark.parametrize("data", [example(n=400), example(n=400, ties=True)])
def test_monotone_transformations_change_nothing_but_fixed_thresholds(data):
    scores, member = data
    a, b = evaluate(scores, member), evaluate(np.exp(scores / 3) - 7, member)
    by_rank = ~a.metric.isin(["balanced_accuracy", "advantage"])
    pd.testing.assert_frame_equal(a[by_rank], b[by_rank])


def test_perfect_and_useless_scores():
    _, member = example(n=400)
    perfect = evaluate(member + 0.0, member).set_index("metric")
    assert perfect.value["auc"] == perfect.value["tpr@0.1"] == perfect.value["advantage"] == 1
    assert 0.98 < perfect.ci_low["auc"] < 1 == perfect.ci_high["auc"]
    flat = evaluate(np.zeros(member.shape), member).set_index("metric")
    assert flat.value["auc"] == flat.value["balanced_accuracy"] == 0.5
    assert flat.value["tpr@0.1"] == flat.value["realised_fpr@0.1"] == 0


@pytest.mark.parametrize(
    "scores, member, words",
    [
        (np.zeros((4, 5)), np.zeros((4, 6), bool), "scores: shape"),
        (np.zeros(5), np.zeros(5, bool), "scores: shape"),
        (np.zeros((4, 5)), np.zeros((4, 5)), "member: dtype float64"),
        (np.zeros((4, 5)), np.ones((4, 5), bool), "member: row 0 has 5 members of 5"),
        (np.zeros((4, 5)), np.zeros((4, 5), bool), "member: row 0 has 0 members"),
        (np.full((4, 6), np.nan), np.tile([True, False], (4, 3)), "scores: NaN at model 0, example 0"),
    ],
)
def test_faults_are_named(scores, member, words):
    for function in (evaluate, intervals.auc_influence_values, intervals.balanced_accuracy_influence_values):
        with pytest.raises(ValueError, match=words):
            function(scores, member)


# ---- coverage (in full: python -m benchmarks.calibration) ------------------------------------------------


@pytest.mark.parametrize("n_models, n, replications", [(8, 260, 60), (64, 100, 20)])
def test_intervals_cover_the_truth_over_new_models_and_new_examples(n_models, n, replications):
    found = calibration.coverage(n_models, n, replications)
    least = 0.95 - 4 * np.sqrt(0.95 * 0.05 / replications)  # four standard errors
    assert (found > least).all() and found.mean() > 0.9, found
    kinds = {name.partition("@")[0] for name in found.index.levels[0]}
    assert kinds == {"auc", "balanced_accuracy", "advantage", "tpr", "realised_fpr"} and len(found) == 21


def test_the_coverage_test_can_fail(monkeypatch):
    whole = intervals.estimate

    def narrow(*args, **how):
        """Half as wide as it should be."""
        value, low, high = whole(*args, **how)
        return intervals.Estimate(value, (value + low) / 2, (value + high) / 2)

    monkeypatch.setattr(intervals, "estimate", narrow)
    assert calibration.coverage(8, 200, 40, fprs=(0.05,)).drop("realised_fpr@0.05", level=0).max() < 0.95


# ---- precision -------------------------------------------------------------------------------------------


def test_precision_follows_from_the_rates_and_the_prevalence():
    rows = [("tpr@0.01", 0.2, 0.1, 0.3), ("realised_fpr@0.01", 0.02, 0.01, 0.03), ("auc", 0.6, 0.5, 0.7)]
    frame = pd.DataFrame(rows, columns=["metric", "value", "ci_low", "ci_high"]).assign(optimizer="a", baseline="")
    nobody = frame.assign(optimizer="b", value=0.0)
    difference = frame.assign(optimizer="b", baseline="a")
    found = intervals.precisions(pd.concat([frame, nobody, difference])).set_index("metric")
    assert set(found.optimizer) == {"a"} and set(found.index) == {f"precision@0.01,prevalence={p}" for p in (0.01, 0.1)}
    # of 1,000 candidates 10 are members: 2 of them and 19.8 others are named
    assert found.value["precision@0.01,prevalence=0.01"] == pytest.approx(2 / 21.8)
    assert found.ci_low["precision@0.01,prevalence=0.01"] == pytest.approx(1 / (1 + 29.7))
    assert found.ci_high["precision@0.01,prevalence=0.1"] == pytest.approx(30 / (30 + 9))


def test_the_interval_of_precision_holds_what_new_models_and_examples_show():
    """Scores are normal, members' higher by 1; the threshold is where the FPR is 1%."""
    truth = 0.1 * stats.norm.sf(stats.norm.isf(0.01) - 1)
    truth, held = truth / (truth + 0.9 * 0.01), []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        member = halves_of_pool(rng, 8, 1000)
        frame = intervals.at_rates({"": rng.normal(size=member.shape) + member}, member, (0.01,))
        found = intervals.precisions(pd.concat(frame), (0.01,), (0.1,)).iloc[0]
        held.append(found.ci_low <= truth <= found.ci_high)
    assert np.mean(held) >= 0.93

"""Tables on trained pairs of ensembles against plain arithmetic, and the planted and null controls."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.special import expit
from sklearn.metrics import balanced_accuracy_score

from lib.analysis import compare
from lib.attacks import catalogue, intervals, label_only, thresholds
from lib.attacks.intervals import auc_influence_values
from lib.attacks.membership import calibration_split
from lib.training import Recipe, train
from tests.analysis.conftest import simulated
from tests.conftest import blobs


def direct(ensemble, member=True):
    hits = np.array(ensemble.logits)[:, 0].argmax(-1) == ensemble.dataset.y
    return hits[np.array(ensemble.member) == member].mean()


def test_accuracies_are_the_plain_means_and_the_gap_is_mean_memorization(pair):
    table = compare.accuracies(pair).set_index(["baseline", "optimizer", "metric"]).value
    frame = table[""]
    for name, ensemble in pair.items():
        test = (np.array(ensemble.test_logits)[:, 0].argmax(-1) == ensemble.dataset.y_test).mean()
        assert frame[name, "test_accuracy"] == pytest.approx(test)
        assert frame[name, "train_accuracy"] == pytest.approx(direct(ensemble))
        assert frame[name, "generalization_gap"] == pytest.approx(direct(ensemble) - direct(ensemble, False))
    assert table["sgd", "sam", "test_accuracy"] == pytest.approx(
        frame["sam", "test_accuracy"] - frame["sgd", "test_accuracy"]
    )


def test_balanced_accuracy_is_that_of_scikit_learn_and_of_the_commonest_class_alone_is_nothing():
    rng, y = np.random.default_rng(0), np.repeat([0, 1, 2, 4], [600, 200, 150, 50])
    logits = rng.normal(size=(8, 1, 1000, 5)) + 2 * np.eye(5)[y] - 99 * np.eye(5)[3]  # nobody says 3, which is no class
    data = SimpleNamespace(y_test=y)
    guess = 8 * np.eye(5)[0] + 0 * logits
    for found, skilled in ((logits, True), (guess, False)):
        values = compare.balanced_on_test(SimpleNamespace(test_logits=found, dataset=data))
        said = found[:, 0].argmax(-1)
        by_model = [balanced_accuracy_score(y, each, adjusted=True) for each in said]
        np.testing.assert_allclose(values.mean(1), by_model, atol=1e-12)
        low, high = intervals.estimate(values)[1:]
        assert (0.3 < low < high < 0.9) if skilled else (abs(low) < 1e-12 and abs(high) < 1e-12)
    # over new test points, the interval is as wide as such scores differ
    drawn = []
    for seed in range(300):
        again = np.random.default_rng(seed)
        new = np.concatenate([again.choice(np.flatnonzero(y == c), (y == c).sum()) for c in np.unique(y)])
        drawn.append(balanced_accuracy_score(y, logits[0, 0, new].argmax(-1), adjusted=True))
    one = compare.balanced_on_test(SimpleNamespace(test_logits=logits[:1], dataset=data))
    made = intervals.estimate(one, examples_only=True)
    assert (made.high - made.low) / 3.92 == pytest.approx(np.std(drawn), rel=0.15)


def test_train_loss_is_cross_entropy_of_the_members(pair):
    ensemble = pair["sam"]
    logits, member = torch.from_numpy(np.array(ensemble.logits))[:, 0], np.array(ensemble.member)
    labels = torch.from_numpy(np.tile(ensemble.dataset.y, (16, 1)))
    loss = F.cross_entropy(logits[member], labels[member]).item()
    found = compare.accuracies({"sam": ensemble}).set_index("metric").value["train_loss"]
    assert found == pytest.approx(loss, rel=1e-5)


def test_variances_are_numpy_variances_of_the_non_members(pair):
    frame = compare.variances({"sgd": pair["sgd"]}).set_index("metric").value
    phi, out = compare.signal(pair["sgd"], "phi").astype(float), ~np.array(pair["sgd"].member)
    rows = np.mean([phi[m, out[m]].var(ddof=1) for m in range(16)])
    columns = np.mean([phi[out[:, i], i].var(ddof=1) for i in range(120)])
    assert frame["nonmember_variance_phi_across_examples"] == pytest.approx(rows)
    assert frame["nonmember_variance_phi_across_models"] == pytest.approx(columns)


def test_variances_are_compared_as_log_ratios_too(pair):
    frame = compare.variances(pair).set_index(["baseline", "optimizer", "metric"])
    for metric in ("nonmember_variance_phi_across_examples", "nonmember_variance_confidence_across_models"):
        own = frame.value["", "sam", metric] / frame.value["", "sgd", metric]
        log = frame.loc["sgd", "sam", f"log_ratio_{metric}"]
        assert log.value == pytest.approx(np.log(own)) and log.ci_low < log.value < log.ci_high


def test_leakage_has_every_attack_and_paired_differences(pair):
    scored = {name: compare.scores(e) for name, e in pair.items()}
    frame = compare.leakage(pair, scored)
    auc = frame[frame.metric == "auc"].set_index(["attack", "optimizer", "baseline"]).value
    assert len(auc) == 3 * len(catalogue.NAMES)
    for attack in scored["sgd"]:
        assert auc[attack, "sam", "sgd"] == pytest.approx(auc[attack, "sam", ""] - auc[attack, "sgd", ""])


def at_equal_loss(base, treated, name="train_loss"):
    """What is left of each treated run, against the baseline's curve through the runs `base`; all are names."""
    runs = {name: stand_in(name, m=8, n=40) for name in (*base, *treated)}
    curve = {name: runs[name] for name in base}
    parts = [compare.decomposition(runs[n], curve, curve[base[0]], "sam", "sgd", name) for n in treated]
    found = pd.concat(parts, ignore_index=True)
    return found[found.metric.str.startswith("auc_at_equal")].reset_index(drop=True)


def test_align_leaves_out_what_mostly_diverged_unless_it_is_essential(pair, capsys):
    doses = {0.0: pair["sgd"], 0.1: pair["sam"], 9.0: pair["sam"].only([0, 1])}
    assert list(compare.keep_common_models(doses, essential=[0.0])) == [0.0, 0.1] and "9.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="n_models"):
        compare.keep_common_models(doses, essential=[9.0])


def test_an_ensemble_restricted_to_its_own_models_keeps_what_was_computed_from_it(pair):
    whole, some = pair["sam"], pair["sam"].only(range(10))
    compare.auc_influence_values(whole), compare.auc_influence_values(some)
    assert compare.headline_scores(whole.only(list(whole.ids))) is compare.headline_scores(whole)
    assert compare.headline_scores(some.only(range(10))) is compare.headline_scores(some)
    for other in (whole.only(range(10)), whole.only(range(6, 16)), some.only([])):
        assert other is not whole and "made" not in vars(other)


def test_align_drops_as_few_as_it_must_for_half_of_the_models_in_common(pair, capsys):
    made = {"all": pair["sgd"], "late": pair["sam"].only(range(6, 16)), "early": pair["sam"].only(range(10))}
    kept = compare.keep_common_models(made, essential=["all"])  # 4 in common of all three, 10 without one of them
    assert len(kept) == 2 and "all" in kept and all(len(e.ids) == 10 for e in kept.values())
    assert "left out" in capsys.readouterr().out


def made_up(monkeypatch, runs, noise=0.0):
    """Have ensembles of those names the train loss and the AUC's cells of `runs`; noise: of the loss's cells."""
    own = {n: np.random.default_rng(k).normal(loss, noise, (8, 40)) for k, (n, (loss, _)) in enumerate(runs.items())}
    monkeypatch.setattr(compare, "train_losses", lambda e: own[e.name] if noise else np.full((8, 40), runs[e.name][0]))
    monkeypatch.setattr(compare, "auc_influence_values", lambda e, attack: runs[e.name][1])


def test_a_decomposition_refuses_ensembles_of_different_models(pair):
    few = pair["sam"].only(pair["sam"].ids[:-2])
    with pytest.raises(ValueError, match="curve: .* different models"):
        compare.decomposition(few, {3: pair["sgd"]}, pair["sgd"], "sam", "sgd")


def test_equal_loss_interpolates_and_never_extrapolates(monkeypatch):
    influence_values = np.random.default_rng(0).normal(0.6, 0.1, (8, 40))
    influence_values += 0.6 - influence_values.mean()
    runs = {
        "a": (1.0, influence_values),
        "b": (0.01, influence_values + 0.2),
        "between": (0.1, influence_values + 0.15),
        "beyond": (0.001, influence_values),
    }
    made_up(monkeypatch, runs)
    found = at_equal_loss(["a", "b"], ["between", "beyond"])
    assert list(found.attack) == list(catalogue.HEADLINES)
    np.testing.assert_allclose(found.train_loss, 0.1)
    # half-way in log loss: there the odds are sqrt(6/4 * 8/2)
    np.testing.assert_allclose(found.value, 0.75 - np.sqrt(6) / (1 + np.sqrt(6)))
    assert (found.optimizer[0], found.baseline[0], found.metric[0]) == ("sam", "sgd", "auc_at_equal_loss")


@pytest.mark.parametrize("bends", [(0.6, 0.8, 0.6), (0.5, 0.62, 0.97), (0.7, 0.71, 0.5)])
def test_no_estimate_leaves_the_range_of_the_two_neighbouring_runs(monkeypatch, bends):
    cells, places = np.random.default_rng(0).normal(0, 0.001, (8, 40)), np.geomspace(1, 1e-3, 4)
    runs = {f"{x:g}": (x, cells + auc) for x, auc in zip(places, (*bends, 0.9), strict=True)}
    inside = {f"at {x}": (x, cells + 0.5) for x in np.geomspace(0.98, 0.0011, 25)}
    made_up(monkeypatch, runs | inside)
    found = at_equal_loss(list(runs), list(inside)).query("attack == 'rmia'")
    known = 0.5 - found.value  # B at the treated losses
    assert len(found) == 25
    for x, auc in zip(found.train_loss, known, strict=True):
        k = np.flatnonzero(places >= x)[-1]
        low, high = sorted((*bends, 0.9)[k : k + 2])
        assert low - 2e-4 <= auc <= high + 2e-4


def drawn(seed, truth, m=16, n=60, t=None, error=0.3, spread=0.02):
    """Influence values of the coordinates [M, N or T] and AUCs [M, N] of runs, given the truth: dict name -> both.

    What a pair of models or an example does is partly common to all runs, and partly to a run's coordinate and AUC.
    """
    rng, made = np.random.default_rng(seed), {}

    def noise(columns):
        return (
            np.repeat(rng.normal(size=(m // 2, 1)), 2, 0)
            + rng.normal(size=(1, columns))
            + rng.normal(size=(m, columns))
        )

    common = noise(n)
    for name, (x, auc) in truth.items():
        of_run, of_coordinate = noise(n), noise(t or n)
        both = of_coordinate if t else (of_run + of_coordinate) / np.sqrt(2)
        made[name] = x * (1 + error * both), auc + spread * (common + of_run)
    return made


def planted(monkeypatch, made, test=False):
    monkeypatch.setattr(compare, "hits_on_test" if test else "train_losses", lambda e: made[e.name][0])
    monkeypatch.setattr(compare, "auc_influence_values", lambda e, attack: made[e.name][1])
    monkeypatch.setattr(catalogue, "HEADLINES", ("rmia",))


def stand_in(name, m=16, n=60):
    """One of `drawn`'s runs in the place of an ensemble."""
    dataset = SimpleNamespace(groups=None, groups_test=None)
    return SimpleNamespace(
        name=name, ids=np.arange(m), member=np.arange(m)[:, None] % 2 == np.zeros(n), dataset=dataset
    )


def curve_auc(x):
    """A baseline whose AUC is a known function of its train loss: straight in logit and log."""
    return expit(0.1 - 0.35 * np.log(x))


@pytest.mark.parametrize("test", [False, True])
def test_the_parts_add_up_and_their_intervals_cover_the_truth(monkeypatch, test):
    """The coordinates err by as much as the AUCs do. By accuracy: the same curve, read on the test part."""
    name, what = ("test_accuracy", "accuracy") if test else ("train_loss", "loss")
    auc = (lambda x: expit(-3 + 6 * x)) if test else curve_auc
    places, place = ((0.5, 0.6, 0.7, 0.8), 0.64) if test else ((0.5, 0.25, 0.1, 0.04), 0.15)
    truth = {f"run {x}": (x, auc(x)) for x in places} | {"sam": (place, auc(place) + 0.03)}
    right = {"auc_total": auc(place) + 0.03 - auc(places[1]), f"auc_at_equal_{what}": 0.03}
    right["auc_from_fit"] = right["auc_total"] - 0.03
    monkeypatch.setattr(compare, "SHADOW_CORRECTION", 0.0)  # there are no shadows here
    curve, error = {x: stand_in(f"run {x}") for x in places}, 0.03 if test else 0.15

    def decomposed(seed, error):
        planted(monkeypatch, drawn(seed, truth, t=80 if test else None, error=error), test)
        found = compare.decomposition(stand_in("sam"), curve, curve[places[1]], "sam", "sgd", name, "epochs=4")
        return found.set_index("metric")

    frames = [decomposed(seed, error) for seed in range(250)]
    for found in frames:
        assert found.value["auc_total"] == pytest.approx(found.value.drop("auc_total").sum(), abs=1e-12)
    covered = {k: np.mean([f.ci_low[k] <= value <= f.ci_high[k] for f in frames]) for k, value in right.items()}
    assert all(0.90 <= share <= 0.98 for share in covered.values()), covered
    wide, exact = (
        [f.ci_high - f.ci_low for f in found] for found in (frames[:20], [decomposed(s, 0) for s in range(20)])
    )
    remains = f"auc_at_equal_{what}"  # without the coordinates' errors, the interval would be too narrow by a third
    assert np.mean([w[remains] for w in wide]) > 1.3 * np.mean([w[remains] for w in exact])


def test_a_bent_curve_is_followed_and_one_beyond_has_a_total_only(monkeypatch):
    auc = lambda x: expit(0.2 - 0.3 * np.log(x) - 0.04 * np.log(x) ** 2)  # noqa: E731
    truth = {f"run {x}": (x, auc(x)) for x in np.geomspace(0.6, 0.02, 7)}
    truth |= {"sam": (0.13, 0.7), "far": (0.01, 0.7)}
    planted(monkeypatch, drawn(0, truth, error=1e-4, spread=1e-4))
    curve = {x: stand_in(name) for x, name in enumerate(truth) if name.startswith("run")}
    found = compare.decomposition(stand_in("sam"), curve, curve[0], "sam", "sgd").set_index("metric").value
    assert found["auc_at_equal_loss"] == pytest.approx(0.7 - auc(0.13), abs=2e-3)
    assert found["auc_from_fit"] == pytest.approx(auc(0.13) - auc(0.6), abs=2e-3)
    far = compare.decomposition(stand_in("far"), curve, curve[0], "sam", "sgd", coordinate="epochs=3")
    assert list(far.metric) == ["auc_total"] and far.coordinate[0] == "epochs=3"


@pytest.mark.parametrize("test", [False, True])
def test_several_treated_give_the_mean_over_those_that_the_curve_encloses(monkeypatch, test):
    name = "test_accuracy" if test else "train_loss"
    truth = {"a": (0.5, 0.55), "b": (0.7, 0.65), "one": (0.6, 0.64), "other": (0.55, 0.55), "far": (0.9, 0.99)}
    planted(monkeypatch, drawn(0, truth, t=80 if test else None, error=0.03), test)
    curve = {n: stand_in(n) for n in "ab"}

    def found(*names):
        treated = [stand_in(n) for n in names]
        frame = compare.decomposition(treated if len(names) > 1 else treated[0], curve, curve["a"], "sam", "sgd", name)
        return frame.set_index(["attack", "metric"])[["value", "ci_low", "ci_high"]]

    one, other, far = map(found, ("one", "other", "far"))
    assert {metric for _, metric in far.index} == {"auc_total"} and len(one) == 3 * len(far)
    both = found("one", "far", "other")
    np.testing.assert_allclose(both.value, (one.value + other.value)[both.index] / 2, atol=1e-12)
    wide = (one.ci_high - one.ci_low + other.ci_high - other.ci_low)[both.index] / 2
    assert (both.ci_high - both.ci_low < wide).all()  # their errors are independent, but for what they share
    np.testing.assert_allclose(found("one", "one"), one, atol=1e-12)


def test_groups_of_the_pool_and_of_the_test_part_are_kept_apart(monkeypatch):
    truth = {"a": (0.5, 0.55), "b": (0.7, 0.65), "sam": (0.6, 0.64)}
    made, thirds = drawn(0, truth, t=80, error=0.03), np.repeat([0, 1, 2], 20)
    made["sam"][1][...] += 0.2 * (thirds - 1)  # an error that a third of the examples share
    planted(monkeypatch, made, test=True)
    ends, alone = [], (np.arange(60), np.arange(80))
    for groups, groups_test in ((None, None), (alone[0], None), (None, alone[1]), (thirds, None)):
        runs = {name: stand_in(name) for name in truth}
        for e in runs.values():
            e.dataset.groups, e.dataset.groups_test = groups, groups_test
        curve = {name: runs[name] for name in "ab"}
        found = compare.decomposition(runs["sam"], curve, runs["a"], "sam", "sgd", "test_accuracy")
        ends.append((found.ci_low[2], found.ci_high[2]))
    np.testing.assert_allclose(ends[1:3], [ends[0]] * 2, rtol=1e-9)
    assert ends[3][1] - ends[3][0] > 1.5 * (ends[0][1] - ends[0][0])


def test_trained_ensembles_decompose_with_a_total_that_the_contrast_has(pair):
    curve = {5: pair["sgd"], 9: pair["sam"]}
    for name in ("train_loss", "test_accuracy"):
        found = compare.decomposition(pair["sam"], curve, pair["sgd"], "sam", "sgd", name)
        assert set(found.attack) == set(catalogue.HEADLINES) and (found.metric == "auc_total").any()
        total = found[found.metric == "auc_total"].set_index("attack").value
        plain = compare.contrast(pair).query("metric == 'auc' and baseline == 'sgd'").set_index("attack").value
        np.testing.assert_allclose(total, plain[total.index], atol=1e-12)


def test_runs_that_differ_by_no_more_than_noise_bracket_nothing(monkeypatch):
    influence_values = np.random.default_rng(0).normal(0.6, 0.1, (8, 40))
    runs = {"a": (1.01, influence_values), "b": (1.0, influence_values + 0.2), "between": (1.005, influence_values)}
    made_up(monkeypatch, runs, noise=0.02)
    assert len(at_equal_loss(["a", "b"], ["between"])) == len(catalogue.HEADLINES)
    made_up(monkeypatch, runs, noise=2.0)
    assert len(at_equal_loss(["a", "b"], ["between"])) == 0


def test_identical_ensembles_differ_by_exactly_nothing(pair):
    frame = compare.contrast({"sgd": pair["sgd"], "twin": pair["sgd"]})
    differences = frame[frame.baseline == "sgd"]
    assert len(differences) == 5 + len(catalogue.HEADLINES)
    assert (differences.value == 0).all() and differences.train_loss.isna().all()


def test_contrast_reports_what_the_table_of_every_headline_attack_says():
    made = {name: simulated(leak, 1.0, n=400, classes=3) for name, leak in (("sgd", 1.0), ("sam", 1.5))}
    key, numbers = ["attack", "optimizer", "baseline", "metric"], ["value", "ci_low", "ci_high"]
    found = compare.contrast(made).set_index(key)[numbers]
    scored = {name: compare.scores(e) for name, e in made.items()}
    full = compare.leakage(made, scored).set_index(key)[numbers]
    metrics = ("auc", "tpr@0.01", "realised_fpr@0.01")
    who = (("sgd", ""), ("sam", ""), ("sam", "sgd"))
    both = [(attack, *of, metric) for attack in catalogue.HEADLINES for of in who for metric in metrics]
    assert set(both) == {index for index in found.index if index[0]}
    np.testing.assert_allclose(found.loc[both], full.loc[both], rtol=1e-12)


def test_headline_scores_are_computed_once_for_each_ensemble(monkeypatch):
    made, asked = {name: simulated(1.0, 1.0, seed=seed) for seed, name in enumerate("ab")}, []
    run = catalogue.run
    monkeypatch.setattr(catalogue, "run", lambda *given, **how: asked.append(how["only"]) or run(*given, **how))
    compare.contrast(made)
    compare.auc_influence_values(made["a"], "combined")
    assert asked == [catalogue.HEADLINES] * 2


def test_labels_that_are_pairs_are_split_and_compare_as_plain_ones_do(pair):
    made = {("sgd", 0.0): pair["sgd"], ("sam", 0.2): pair["sam"], ("sam", 0.4): pair["sgd"]}
    frame = compare.split_labels(compare.contrast(made), "rho")
    frame = frame.set_index(["optimizer", "baseline", "rho", "metric", "attack"]).value
    plain = compare.contrast(pair).set_index(["optimizer", "baseline", "metric", "attack"]).value
    for what in (("auc", "lira_shrunk"), ("auc", "rmia"), ("test_accuracy", ""), ("train_loss", "")):
        assert frame[("sgd", "", 0.0, *what)] == plain[("sgd", "", *what)]
        assert frame[("sam", "sgd", 0.2, *what)] == plain[("sam", "sgd", *what)]
        assert frame[("sam", "sgd", 0.4, *what)] == 0


def test_equal_accuracy_is_read_off_the_test_part(monkeypatch):
    auc, values = {"0.2": 0.1, "0.4": 0.2, "0.3": 0.3}, np.random.default_rng(0).normal(0.6, 0.1, (8, 40))
    monkeypatch.setattr(compare, "hits_on_test", lambda e: np.full((8, 30), float(e.name)))
    monkeypatch.setattr(compare, "auc_influence_values", lambda e, attack: values + auc[e.name])
    found = at_equal_loss(["0.2", "0.4"], ["0.3"], "test_accuracy")
    read = 1 / (1 + np.sqrt(1 / (values.mean() + 0.1) - 1) * np.sqrt(1 / (values.mean() + 0.2) - 1))  # odds multiply
    assert found.test_accuracy[0] == pytest.approx(0.3) and found.value[0] == pytest.approx(values.mean() + 0.3 - read)
    assert set(found.metric) == {"auc_at_equal_accuracy"}


def test_align_drops_a_lost_pair_everywhere_and_refuses_too_few(pair):
    lost = {"sgd": pair["sgd"].only([0, 1, *range(4, 16)]), "sam": pair["sam"]}
    both = compare.keep_common_models(lost)
    assert both["sam"].ids.tolist() == both["sgd"].ids.tolist() == [0, 1, *range(4, 16)]
    np.testing.assert_array_equal(both["sam"].logits[2], pair["sam"].logits[4])
    with pytest.raises(ValueError, match="n_models"):
        compare.keep_common_models({"sgd": pair["sgd"].only(range(6)), "sam": pair["sam"]})


def test_null_table_holds_a_half_and_the_true_membership_does_not(pair):
    null = compare.null_table(pair["sgd"], seed=1).set_index("attack")
    assert set(null.index) == set(catalogue.NAMES)
    assert null.ci_low.lira_shrunk <= 0.5 <= null.ci_high.lira_shrunk
    correction = intervals.SHADOW_CORRECTION
    assert intervals.estimate(compare.auc_influence_values(pair["sgd"]), shadow_correction=correction).low > 0.5


def test_variances_within_classes_and_of_members(pair):
    kinds = ("across_examples", "within_class")
    frame = compare.variances({"sgd": pair["sgd"]}, kinds, members=True).set_index("metric").value
    y, member = pair["sgd"].dataset.y, np.array(pair["sgd"].member)
    confidence = compare.signal(pair["sgd"], "confidence").astype(float)
    whole = np.mean([confidence[m, member[m]].var(ddof=1) for m in range(16)])
    within = [
        sum(confidence[m, member[m] & (y == c)].var(ddof=1) * (member[m] & (y == c)).sum() for c in range(4)) / 60
        for m in range(16)
    ]
    assert frame["member_variance_confidence_across_examples"] == pytest.approx(whole)
    assert frame["member_variance_confidence_within_class"] == pytest.approx(np.mean(within))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    recipe, data = Recipe("cnn", epochs=3, batch_size=8), blobs(n=48, t=16, shape=(3, 16, 16), classes=3)
    return train(recipe, data, 8, tmp_path_factory.mktemp("store"), "cpu", quiet=True)


@pytest.fixture
def answered(monkeypatch):
    """What each call of label_only.answers gave."""
    found, answers = [], label_only.answers
    monkeypatch.setattr(label_only, "answers", lambda *given, **how: found.append(answers(*given, **how)) or found[-1])
    return found


def test_unchanged_inputs_are_labelled_as_the_stored_logits_say(pictures, pair, answered):
    for ensemble in (pictures, pair["sgd"]):
        compare.label_only_table({"sgd": ensemble}, 8)
        gap = catalogue.run(np.array(ensemble.logits), ensemble.dataset.y, np.array(ensemble.member))["gap"]
        np.testing.assert_array_equal(answered[-1][0], gap[:8])


def test_trained_models_are_told_by_their_labels_and_no_shuffled_ones(pair, answered):
    frame = compare.label_only_table({"sgd": pair["sgd"]}).query("attack == 'label_only'").set_index("metric")
    assert frame.ci_low["auc"] > 0.5 and set(frame.n_models) == {16}
    shuffled = [catalogue.null_member(np.array(pair["sgd"].member), seed) for seed in range(20)]
    null = [auc_influence_values(label_only.scores(answered[0], alleged), alleged).mean() for alleged in shuffled]
    assert np.mean(null) == pytest.approx(0.5, abs=0.02)


def test_some_examples_are_asked_about_as_among_all(pictures, answered):
    compare.label_only_table({"sgd": pictures}, 8)
    few = compare.label_only_table({"sgd": pictures}, 8, n_examples=20)
    rows = np.sort(np.random.default_rng(231000488).permutation(len(pictures.dataset.y))[:20])
    np.testing.assert_array_equal(answered[1], answered[0][:, :, rows])
    member = np.array(pictures.only(range(8)).member)[:, rows]
    auc = few[(few.metric == "auc") & (few.attack == "label_only")].value.item()
    expected = auc_influence_values(label_only.scores(answered[1], member), member).mean()
    assert auc == pytest.approx(expected) and set(few.n_examples) == {20}


def test_table_has_both_attacks_each_optimizer_and_the_paired_difference(pair, answered):
    both = {"sgd": pair["sgd"], "sam": pair["sam"].only([0, 1, 2, 3, 6, 7, 8, 9])}
    frame = compare.label_only_table(both)
    auc = frame[frame.metric == "auc"].set_index(["attack", "optimizer", "baseline"]).value
    y, member = pair["sgd"].dataset.y, np.array(both["sam"].member)
    assert set(frame.n_models) == {8}
    for name, answers in zip(both, answered, strict=True):
        scores = label_only.scores(answers, member)
        assert auc["label_only", name, ""] == pytest.approx(auc_influence_values(scores, member).mean())
        by_class = thresholds.classwise(scores, member, y, calibration_split(member, 0, y))
        assert auc["label_only_classwise", name, ""] == pytest.approx(auc_influence_values(by_class, member).mean())
    difference = auc["label_only", "sam", ""] - auc["label_only", "sgd", ""]
    assert auc["label_only", "sam", "sgd"] == pytest.approx(difference)
    own = frame[(frame.optimizer == "sam") & (frame.baseline == "") & (frame.metric == "balanced_accuracy")]
    expected = intervals.balanced_accuracy_influence_values(by_class, member, 0.0).mean()
    assert own.set_index("attack").value["label_only_classwise"] == pytest.approx(expected)
    null = frame[frame.metric == "null_auc"].set_index("optimizer")
    assert list(null.index) == ["sgd", "sam"] and null.value.between(0.4, 0.6).all()


@pytest.mark.parametrize("n_models, ids", [(16, range(6)), (7, range(16)), (16, range(7))])
def test_too_few_models_are_named(pair, n_models, ids):
    """The last: half a pair does not count."""
    with pytest.raises(ValueError, match=f"n_models={n_models}: only 6 models .* 8 are needed"):
        compare.label_only_table({"sgd": pair["sgd"], "sam": pair["sam"].only(ids)}, n_models)


def test_bfloat16_agrees_with_float32_within_intervals_and_another_learning_rate_does_not(tmp_path):
    pictures, base = blobs(n=60, t=60, shape=(3, 8, 8), classes=3), Recipe(arch="cnn", epochs=4, batch_size=10)
    changes = {"float32": {}, "bfloat16": {"precision": "bfloat16"}, "slower": {"lr": base.lr / 10}}
    made = {name: train(replace(base, **c), pictures, 8, tmp_path, "cpu", quiet=True) for name, c in changes.items()}
    assert (np.array(made["bfloat16"].logits) != np.array(made["float32"].logits)).any()
    frame = compare.contrast(made)
    frame = frame[frame.metric.isin(["auc", "test_accuracy"]) & (frame.baseline != "")]
    frame = frame.set_index(["optimizer", "attack"])
    holds_zero = (frame.ci_low <= 0) & (frame.ci_high >= 0)
    assert holds_zero["bfloat16"].all(), frame.loc["bfloat16"]
    assert not holds_zero["slower"][["", "lira_shrunk"]].any(), frame.loc["slower"]


def exposing(rng, n, m=16, exposed=20, leak=8.0, again=True):
    """Logits that give the first `exposed` examples away, in half of the pairs only unless `again`: a stand-in."""
    found = simulated(0.3, 1.0, m=m, n=n, seed=rng)
    models = np.arange(m) // 2 % 2 == 0
    gain = leak * found.member[:, :exposed] * (again | models)[:, None]
    found.logits[:, 0, np.arange(exposed), found.dataset.y[:exposed]] += gain
    return found


def test_exposure_is_the_mean_score_of_the_models_with_minus_without_and_welchs_interval():
    e = exposing(0, 200)
    scored = {"sgd": compare.scores(e, only=("lira_shrunk",))}
    frame = compare.exposure_table({"sgd": e}, scored, ids=np.arange(200) + 1000)
    assert set(frame.metric) == {"exposure"} and len(frame) == 10  # 200 examples are too few for a top 1%
    s, places = scored["sgd"]["lira_shrunk"].astype(float), frame.coordinate.str.removeprefix("example=").astype(int)
    by_hand = np.array([s[e.member[:, i], i].mean() - s[~e.member[:, i], i].mean() for i in range(200)])
    assert sorted(places - 1000) == sorted(np.argsort(by_hand)[-10:]) and (np.diff(frame.value) <= 0).all()
    i = places[0] - 1000
    a, b = s[e.member[:, i], i], s[~e.member[:, i], i]
    parts = [x.var(ddof=1) / len(x) for x in (a, b)]
    df = sum(parts) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(parts, (a, b), strict=True))
    half = stats.t.ppf(0.975, df) * np.sqrt(sum(parts))
    np.testing.assert_allclose(frame.iloc[0][["ci_low", "ci_high"]].astype(float), [a.mean() - b.mean() - half,
                               a.mean() - b.mean() + half])  # fmt: skip


@pytest.mark.parametrize("again", [True, False])
def test_the_same_examples_are_exposed_in_both_halves_only_if_they_are_exposed_at_all_seeds(again):
    e = exposing(1, 2000, again=again)
    member = e.member
    frame = compare.exposure_table({"sgd": e}, {"sgd": compare.scores(e, only=("lira_shrunk",))})
    frame = frame.set_index("metric")
    assert frame.value["exposed_by_chance"] == 0.01
    both = frame.loc["exposed_in_both_halves"]
    assert (both.ci_low > 0.5 and both.value > 0.8) if again else both.ci_low < 0.01 < both.ci_high
    few = SimpleNamespace(**{**vars(e), "logits": e.logits[:8], "member": member[:8], "test_logits": None})
    found = compare.exposure_table({"sgd": few}, {"sgd": {"lira_shrunk": compare.signal(few, "phi")}})
    assert set(found.metric) == {"exposure"}  # two models on either side in each half are too few

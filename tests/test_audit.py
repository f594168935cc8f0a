from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib.analysis import compare, flatness, memorization
from lib.attacks import catalogue, intervals
from lib.study import text
from lib.training import Recipe, train
from tests.conftest import blobs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("store"), blobs(n=120, t=60)
    recipe = Recipe(epochs=15, batch_size=10, rho=0.2)
    return {o: train(replace(recipe, optimizer=o), data, 16, folder, "cpu", quiet=True) for o in ("sgd", "sam")}


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


def test_train_loss_is_cross_entropy_of_the_members(pair):
    import torch
    import torch.nn.functional as F

    ensemble = pair["sam"]
    logits, member = torch.from_numpy(np.array(ensemble.logits))[:, 0], np.array(ensemble.member)
    labels = torch.from_numpy(np.tile(ensemble.dataset.y, (16, 1)))
    loss = F.cross_entropy(logits[member], labels[member]).item()
    found = compare.accuracies({"sam": ensemble}).set_index("metric").value["train_loss"]
    assert found == pytest.approx(loss, rel=1e-5)


def test_variances_are_numpy_variances_of_the_non_members(pair):
    frame = compare.variances({"sgd": pair["sgd"]}).set_index("metric").value
    phi, out = compare.plain_signal(pair["sgd"], "phi").astype(float), ~np.array(pair["sgd"].member)
    rows = np.mean([phi[m, out[m]].var(ddof=1) for m in range(16)])
    columns = np.mean([phi[out[:, i], i].var(ddof=1) for i in range(120)])
    assert frame["nonmember_variance_phi_across_examples"] == pytest.approx(rows)
    assert frame["nonmember_variance_phi_across_models"] == pytest.approx(columns)


def test_leakage_has_every_attack_and_paired_differences(pair):
    scored = {name: compare.scores(e) for name, e in pair.items()}
    frame = compare.leakage(pair, scored)
    auc = frame[frame.metric == "auc"].set_index(["attack", "optimizer", "baseline"]).value
    assert len(auc) == 3 * len(catalogue.NAMES)
    for attack in scored["sgd"]:
        assert auc[attack, "sam", "sgd"] == pytest.approx(auc[attack, "sam", ""] - auc[attack, "sgd", ""])


def stand_ins(*lists, ids=range(8)):
    """Named things with ids, in place of ensembles."""
    data, recipe = SimpleNamespace(groups=None, groups_test=None), SimpleNamespace(epochs=3)
    return [
        [SimpleNamespace(name=name, ids=np.array(ids), dataset=data, recipe=recipe) for name in names]
        for names in lists
    ]


def test_equal_loss_refuses_ensembles_of_different_models():
    with pytest.raises(ValueError, match="different models"):
        compare.at_equal_loss(*stand_ins(["a"]), *stand_ins(["b"], ids=range(2, 10)))


def test_align_leaves_out_what_mostly_diverged_unless_it_is_essential(pair, capsys):
    doses = {0.0: pair["sgd"], 0.1: pair["sam"], 9.0: pair["sam"].only([0, 1])}
    assert list(compare.keep_common_models(doses, essential=[0.0])) == [0.0, 0.1] and "[9.0]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="n_models"):
        compare.keep_common_models(doses, essential=[9.0])


def test_align_drops_as_few_as_it_must_for_half_of_the_models_in_common(pair, capsys):
    made = {"all": pair["sgd"], "late": pair["sam"].only(range(6, 16)), "early": pair["sam"].only(range(10))}
    kept = compare.keep_common_models(made, essential=["all"])  # 4 in common of all three, 10 without one of them
    assert len(kept) == 2 and "all" in kept and all(len(e.ids) == 10 for e in kept.values())
    assert "left out" in capsys.readouterr().out


def made_up(monkeypatch, runs, noise=0.0):
    """Have ensembles of those names the train loss and the LiRA cells of `runs`; noise: of the loss's cells."""
    own = {n: np.random.default_rng(k).normal(loss, noise, (8, 40)) for k, (n, (loss, _)) in enumerate(runs.items())}
    monkeypatch.setattr(compare, "train_losses", lambda e: own[e.name] if noise else np.full((8, 40), runs[e.name][0]))
    monkeypatch.setattr(compare, "lira_influence_values", lambda e: runs[e.name][1])


def test_equal_loss_interpolates_and_never_extrapolates(monkeypatch):
    influence_values = np.random.default_rng(0).normal(0.6, 0.1, (8, 40))
    runs = {
        "a": (1.0, influence_values),
        "b": (0.01, influence_values + 0.2),
        "between": (0.1, influence_values + 0.15),
        "beyond": (0.001, influence_values),
    }
    made_up(monkeypatch, runs)
    found = compare.at_equal_loss(*stand_ins(["a", "b"], ["between", "beyond"]))
    assert list(found.train_loss) == [pytest.approx(0.1)]  # half-way in log loss: there it is cells + 0.1
    assert found.value[0] == pytest.approx(0.05)


def test_equal_loss_says_more_only_if_every_curve_does(monkeypatch):
    """The baseline bends: half-way between two runs it is .15 above the first, the straight line .1; the other, .12."""
    influence_values = np.random.default_rng(0).normal(0.6, 0.001, (8, 40))
    runs = {
        "a": (1.0, influence_values),
        "b": (0.01, influence_values + 0.2),
        "c": (0.0001, influence_values),
        "at": (0.1, influence_values + 0.12),
    }
    made_up(monkeypatch, runs)
    assert compare.at_equal_loss(*stand_ins(["a", "b"], ["at"])).ci_low[0] > 0
    found = compare.at_equal_loss(*stand_ins(["a", "b", "c"], ["at"])).iloc[0]
    assert found.ci_low == pytest.approx(-0.03, abs=1e-3) and found.ci_high == pytest.approx(0.02, abs=1e-3)


def test_curves_are_exact_for_what_they_are():
    places = [0.0, 1.0, 2.5, 4.0]
    line, *parabolas = compare.curves(places, 1.9, 2)
    assert set(line) == {1, 2} and [set(p) for p in parabolas] == [{0, 1, 2}, {1, 2, 3}]
    assert sum(w * (3 * places[k] + 1) for k, w in line.items()) == pytest.approx(3 * 1.9 + 1)
    for weights in parabolas:
        assert sum(w * (places[k] ** 2 - places[k]) for k, w in weights.items()) == pytest.approx(1.9**2 - 1.9)
    assert len(compare.curves([0.0, 1.0], 0.5, 1)) == 1


def test_runs_that_differ_by_no_more_than_noise_bracket_nothing(monkeypatch):
    influence_values = np.random.default_rng(0).normal(0.6, 0.1, (8, 40))
    runs = {"a": (1.01, influence_values), "b": (1.0, influence_values + 0.2), "between": (1.005, influence_values)}
    made_up(monkeypatch, runs, noise=0.02)
    assert len(compare.at_equal_loss(*stand_ins(["a", "b"], ["between"]))) == 1
    made_up(monkeypatch, runs, noise=2.0)
    assert len(compare.at_equal_loss(*stand_ins(["a", "b"], ["between"]))) == 0


def test_groups_are_put_on_the_models_they_share_and_stay_what_they_are_if_they_have_no_others(pair):
    whole, part = {"a": pair["sgd"]}, {"b": pair["sam"].only(range(2, 12)), "c": pair["sgd"].only(range(2, 12))}
    first, second = compare.on_the_same(whole, part)
    assert second is part and first["a"].ids.tolist() == list(range(2, 12))
    few = {"b": pair["sam"].only(range(4))}
    assert compare.on_the_same(whole, few) == (whole, few)


def test_identical_ensembles_differ_by_exactly_nothing(pair):
    same = {"sgd": pair["sgd"], "twin": pair["sgd"]}
    frame = compare.contrast(same)
    assert (frame.value[frame.baseline == "sgd"] == 0).all() and (frame.baseline == "sgd").sum() == 5


def test_align_drops_a_lost_pair_everywhere_and_refuses_too_few(pair):
    lost = {"sgd": pair["sgd"].only([0, 1, *range(4, 16)]), "sam": pair["sam"]}
    both = compare.keep_common_models(lost)
    assert both["sam"].ids.tolist() == both["sgd"].ids.tolist() == [0, 1, *range(4, 16)]
    np.testing.assert_array_equal(both["sam"].logits[2], pair["sam"].logits[4])
    with pytest.raises(ValueError, match="n_models"):
        compare.keep_common_models({"sgd": pair["sgd"].only(range(6)), "sam": pair["sam"]})


def test_flatness_is_positive_and_paired(pair):
    frame = flatness.flatness_table(pair, 0.2).set_index(["optimizer", "baseline", "metric"]).value
    for metric in ("hessian_top_eigenvalue", "loss_rise_in_ball"):
        own = frame["sam", "", metric], frame["sgd", "", metric]
        assert own[1] > 0 and frame["sam", "sgd", metric] == pytest.approx(own[0] - own[1])


def test_null_table_holds_a_half_and_the_true_membership_does_not(pair):
    null = compare.null_table(pair["sgd"], seed=1).set_index("attack")
    assert (null.ci_low.lira_pooled <= 0.5) and (null.ci_high.lira_pooled >= 0.5)
    assert (
        intervals.estimate(
            compare.lira_influence_values(pair["sgd"]), shadow_correction=intervals.SHADOW_CORRECTION
        ).low
        > 0.5
    )


def test_variances_within_classes_and_of_members(pair):
    kinds = ("across_examples", "within_class")
    frame = compare.variances({"sgd": pair["sgd"]}, kinds, members=True).set_index("metric").value
    y, member = pair["sgd"].dataset.y, np.array(pair["sgd"].member)
    confidence = compare.plain_signal(pair["sgd"], "confidence").astype(float)
    whole = np.mean([confidence[m, member[m]].var(ddof=1) for m in range(16)])
    within = [
        sum(confidence[m, member[m] & (y == c)].var(ddof=1) * (member[m] & (y == c)).sum() for c in range(4)) / 60
        for m in range(16)
    ]
    assert frame["member_variance_confidence_across_examples"] == pytest.approx(whole)
    assert frame["member_variance_confidence_within_class"] == pytest.approx(np.mean(within))


def test_extremes_are_shares_of_non_members(pair):
    frame = compare.extremes(pair)
    frame = frame[frame.baseline == ""].set_index(["metric", "optimizer"]).value
    phi, member = compare.plain_signal(pair["sam"], "phi"), np.array(pair["sam"].member)
    out = ~member
    certain = np.mean([(1 / (1 + np.exp(-phi[m, out[m]].astype(float))) > 0.99).mean() for m in range(16)])
    above = np.mean([(phi[m, out[m]] > np.median(phi[m, member[m]])).mean() for m in range(16)])
    assert frame["nonmember_share_above_0.99", "sam"] == pytest.approx(certain)
    assert frame["nonmember_share_above_member_median", "sam"] == pytest.approx(above)
    assert 0 < above < 0.5


def test_a_ratio_covers_the_truth_and_of_a_thing_with_itself_is_one():
    covered = 0
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=(3, 12, 40))
        below = 2 + 0.5 * noise[0]
        found = compare.ratio(0.6 * below + 0.3 * noise[1], below)
        covered += found.low <= 0.6 <= found.high
    assert 180 <= covered <= 199
    same = compare.ratio(below, below)
    assert same.value == 1 and same.high - same.low < 1e-12


@pytest.mark.parametrize("most", [10, 100_000])
def test_tangent_features_are_the_slope_of_phi(pair, most):
    import torch
    from torch.func import functional_call

    from lib.attacks.signals import signals
    from lib.data.dataset import inputs

    ensemble, chosen = pair["sgd"], np.array([3, 50])
    net, params, buffers = ensemble.weights(2)
    found = flatness.tangent_features(ensemble, 2, chosen, most)
    names = list(reversed(params)) if most > 10 else list(reversed(params))[:1]
    direction = {n: torch.randn(params[n].shape, generator=torch.Generator().manual_seed(0)) for n in names}
    x = torch.from_numpy(inputs(ensemble.dataset)[0][chosen]).double()

    def phi(step):
        moved = {n: (p + step * direction[n] if n in direction else p).double() for n, p in params.items()}
        logits = functional_call(net, (moved, buffers), (x,)).detach().numpy()
        return signals(logits, ensemble.dataset.y[chosen], only=("phi",))["phi"].astype(float)

    slope = found @ torch.cat([direction[n].flatten() for n in names]).numpy()
    np.testing.assert_allclose(slope, (phi(1e-3) - phi(-1e-3)) / 2e-3, rtol=1e-2, atol=1e-2)


# ---- the planted leak ---------------------------------------------------------------------------------------


def test_the_example_of_a_leak_is_the_one_that_non_members_are_least_sure_of(pair):
    phi, member = compare.plain_signal(pair["sgd"], "phi"), np.array(pair["sgd"].member)
    means = [phi[~member[:, i], i].mean() for i in range(120)]
    assert compare.least_sure(phi, member) == int(np.argmin(means))


def test_pairs_are_counted_where_one_partner_saw_the_example_and_ties_count_half():
    member = np.zeros((10, 3), bool)
    member[[0, 3, 4, 5, 9], 1] = True  # the pair 4, 5 saw it both, the pair 6, 7 neither
    scores = np.zeros((10, 3))
    scores[:, 1] = [5, 4, 1, 2, 9, 0, 0, 9, 3, 3]  # found, found, -, -, a tie
    frame = compare.planted_table({"a": scores, "b": -scores}, member, 1)
    assert frame.attack.tolist() == ["a", "b"] and set(frame.metric) == {"planted_pairs_found"}
    np.testing.assert_allclose(frame.value, [2.5 / 3, 0.5 / 3])
    assert set(frame.n_models) == {6} and "too few" in text.planted_leak(frame)
    assert compare.planted_table({"a": scores}, member, 1, n_pairs=2).value.tolist() == [1.0]
    nothing = compare.planted_table({"a": scores}, member, 0)
    assert nothing.empty and "0 pairs are too few" in text.planted_leak(nothing)


@pytest.fixture(scope="module")
def leaky(pair, tmp_path_factory):
    """An ensemble on a pool with a planted leak, and its place."""
    phi, member = compare.plain_signal(pair["sgd"], "phi"), np.array(pair["sgd"].member)
    data, place = memorization.leak(pair["sgd"].dataset, compare.least_sure(phi, member), times=50)
    return train(pair["sgd"].recipe, data, compare.PLANTED, tmp_path_factory.mktemp("leak"), "cpu", quiet=True), place


def test_every_attack_finds_a_planted_leak_and_a_blind_one_does_not(leaky):
    ensemble, place = leaky
    member, scored = np.array(ensemble.member), compare.scores(ensemble)
    frame = compare.planted_table(scored, member, place).set_index("attack")
    assert set(frame.index) == set(catalogue.NAMES) and set(frame.n_models) == {16}
    missed = set(frame.index[frame.ci_low <= 0.5])
    assert missed <= {"entropy", "entropy_classwise", "neural", "neural_classwise"}, missed
    blind = {"constant": np.zeros(member.shape), "backwards": -scored["lira"]}
    blind["noise"] = np.random.default_rng(0).normal(size=member.shape)
    assert (compare.planted_table(blind, member, place).ci_low <= 0.5).all()


def test_what_the_controls_say_counts_attacks_and_names_them(leaky):
    ensemble, place = leaky
    scored = {"lira": compare.scores(ensemble)["lira"], "constant": np.zeros(ensemble.member.shape)}
    said = text.planted_leak(compare.planted_table(scored, np.array(ensemble.member), place))
    assert said.startswith("1 of 2 attacks find") and "of 8 pairs" in said and said.endswith("; constant do not.")
    outside = pd.DataFrame({"attack": ["a", "b"], "value": [0.5, 0.6], "ci_low": [0.4, 0.55], "ci_high": [0.6, 0.7]})
    assert text.null_control(outside).endswith("the furthest is b with 0.600. Outside: b.")
    said = text.null_control(compare.null_table(ensemble, 0, shuffles=1))
    assert "of 16 attacks have 0.5 within their 95% interval; the furthest is " in said


# ---- precision ----------------------------------------------------------------------------------------------


def test_bfloat16_agrees_with_float32_within_intervals_and_another_learning_rate_does_not(tmp_path):
    pictures, base = blobs(n=60, t=60, shape=(3, 8, 8), classes=3), Recipe(arch="cnn", epochs=4, batch_size=10)
    changes = {"float32": {}, "bfloat16": {"precision": "bfloat16"}, "slower": {"lr": base.lr / 10}}
    made = {name: train(replace(base, **c), pictures, 8, tmp_path, "cpu", quiet=True) for name, c in changes.items()}
    assert (np.array(made["bfloat16"].logits) != np.array(made["float32"].logits)).any()
    frame = compare.contrast(made)
    frame = frame[frame.metric.isin(["auc", "test_accuracy"]) & (frame.baseline != "")].set_index(
        ["optimizer", "metric"]
    )
    holds_zero = (frame.ci_low <= 0) & (frame.ci_high >= 0)
    assert holds_zero["bfloat16"].all(), frame.loc["bfloat16"]
    assert not holds_zero["slower"].any(), frame.loc["slower"]

"""All attacks together, what queries and groups reach, and the null control."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.calibration import halves_of_pool
from lib.attacks import catalogue, shadow
from lib.attacks.intervals import auc_influence_values, balanced_accuracy_influence_values, estimate
from lib.attacks.signals import signals
from tests.attacks.simulated import ensemble, leaky


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
    assert auc["lira_shrunk"] > auc["confidence"] + 0.05 > auc["gap"]


def test_run_queries_reach_lira_and_rmia_only():
    logits, y, member = ensemble(n_models=8, n=60)
    plain = catalogue.run(logits, y, member)
    queried = catalogue.run(np.stack([logits, logits[..., ::-1]], 1), y, member)
    for name in catalogue.NAMES:
        assert np.array_equal(plain[name], queried[name]) == (name in catalogue.ALONE), name
    same = catalogue.run(np.stack([logits, logits], 1), y, member)
    for name in catalogue.NAMES:
        np.testing.assert_allclose(same[name], plain[name], rtol=1e-5, atol=1e-6)


def test_the_kinds_of_lira_that_share_statistics_score_as_each_by_itself():
    logits, y, member = ensemble(n_models=8, n=60)
    logits = np.stack([logits, logits[..., ::-1], 2 * logits], 1)
    found, phi = catalogue.run(logits, y, member), signals(logits, y, only=("phi",))["phi"]
    for name, (offline, variance) in catalogue.LIRAS.items():
        each = [shadow.lira(phi[:, q], member, offline, variance) for q in range(3)]
        np.testing.assert_array_equal(found[name], (each[0] + each[1] + each[2]) / 3, err_msg=name)


def test_combined_is_the_mean_of_two_ranks():
    logits, y, member = ensemble(n_models=8, n=60)
    logits[:, :9] = logits[:, [0]]  # examples that tie
    y[:9] = y[0]
    found = catalogue.run(logits, y, member)
    assert len(np.unique(found["rmia"][0])) < 60
    ranked = [stats.rankdata(found[name], axis=1) - 1 for name in ("lira_shrunk", "rmia")]
    np.testing.assert_allclose(found["combined"], np.mean(ranked, axis=0) / 59, atol=1e-6)


@pytest.mark.parametrize("only", [("combined",), ("rmia_offline", "lira"), ("gap", "lira_shrunk"), catalogue.HEADLINES])
def test_some_attacks_alone_score_as_among_all(only):
    logits, y, member = ensemble(n_models=8, n=60)
    every, some = catalogue.run(logits, y, member), catalogue.run(logits, y, member, only=only)
    assert set(some) == set(only)
    for name in only:
        np.testing.assert_array_equal(some[name], every[name])


def test_every_attack_is_in_one_family():
    members = [name for family in catalogue.FAMILIES.values() for name in family]
    assert sorted(members) == sorted([*catalogue.NAMES, "label_only", "label_only_classwise"])
    assert set(catalogue.FIXED[2:]) == {name for name in catalogue.NAMES if name.endswith("_classwise")}


def test_two_eyes_of_a_patient_are_judged_by_what_neither_taught():
    rng = np.random.default_rng(0)
    eyes = np.repeat(np.arange(40), 2)
    member, y = halves_of_pool(rng, 4, 40)[:, eyes], rng.integers(0, 3, 40)[eyes]
    logits = rng.normal(size=(4, 40, 3))[:, eyes]  # a patient's eyes look alike: one would give the other away
    found = catalogue.run(logits, y, member, groups=eyes, only=catalogue.ALONE)
    for name, scores in found.items():
        np.testing.assert_array_equal(scores[:, ::2], scores[:, 1::2], err_msg=name)
    split = catalogue.run(logits, y, member, only=catalogue.ALONE)
    for name in ("loss", "confidence_classwise", "neural", "neural_classwise"):
        assert (split[name][:, ::2] != split[name][:, 1::2]).any()
    right = [balanced_accuracy_influence_values(found["confidence"], member, groups=g) for g in (eyes, None)]
    assert (right[0] != right[1]).any()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"logits": np.zeros((300, 5))}, "logits: shape"),
        ({"member": np.zeros((16, 299), bool)}, "scores: shape .*valid is the shape of member"),
        ({"y": np.full(300, 9)}, "y: int64 .*0 to 4"),
        ({"only": ("lira_pooled",)}, "only: .*'lira_pooled'.*; valid are gap"),
        ({"population_logits": np.zeros((16, 10, 5))}, "y: object"),
    ],
)
def test_run_faults_are_named(change, words):
    logits, y, member = ensemble()
    with pytest.raises(ValueError, match=words):
        catalogue.run(**{"logits": logits, "y": y, "member": member, **change})


# ---- the null control ------------------------------------------------------------------------------------


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

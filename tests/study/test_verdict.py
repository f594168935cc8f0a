"""The ledger: its rule at the boundaries, verdicts that flip with the data, partial results, several runs."""

from itertools import combinations, product
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from lib.attacks import catalogue
from lib.study import verdict
from lib.study.results import COLUMNS, NUMBERS, read
from lib.study.settings import ROOT

REFERENCE = sorted((ROOT / "outputs" / "reference").glob("*/results.csv"))
NAMES = list(verdict.CLAIMS.claim.unique())
ONE_RUN = [name for name in NAMES if not name.endswith("_alike")]
SPREAD = list(product(("confidence", "phi"), ("examples", "models")))
OPPOSITE = {"supported": "contradicted", "contradicted": "supported"}


def row(metric, value, half=0.001, optimizer="sam", baseline="sgd", attack="", experiment="main", **more):
    """One row of results; half: of its interval, None for a number without chance."""
    low, high = (np.nan, np.nan) if half is None else (value - half, value + half)
    plain = {"notebook": "01", "dataset": "digits", "arch": "mlp", "rho": "0.3" if "sam" in optimizer else ""}
    numbers = {"value": value, "ci_low": low, "ci_high": high, "n_models": 128, "n_examples": 1200, "coordinate": ""}
    about = {"metric": metric, "optimizer": optimizer, "baseline": baseline, "attack": attack, "experiment": experiment}
    return plain | numbers | about | more


def own(metric, value, half=0.001, optimizer="sgd", **more):
    """A row of an optimizer's own value."""
    return row(metric, value, half, optimizer=optimizer, baseline="", **more)


def fitted(sgd=1.0, sam=1.0, skill=0.9, **more):
    """What makes a comparison testable: the train accuracies, and the balanced accuracies above chance."""
    both = {"sgd": sgd, "sam": sam}
    fits = [own("train_accuracy", fit, optimizer=name, **more) for name, fit in both.items()]
    return fits + [own(verdict.SKILL, skill, optimizer=name, **more) for name in both]


def headlines(metric, value, half=0.001, **more):
    """A row of every headline attack."""
    return [row(metric, value, half, attack=attack, **more) for attack in catalogue.HEADLINES]


def penalty(eta, value, coordinate, experiment="theorem: monte carlo", **more):
    """A row of the theorem: the ratio of variances under a penalty."""
    about = dict(optimizer=f"eta={eta}", baseline="", experiment=experiment, coordinate=coordinate, notebook="04")
    return row("variance_ratio", value, 0.01, **(about | more))


def claim_of(tests):
    about = verdict.CLAIMS.iloc[0].to_dict() | dict(claim="conjunction", needs="fit learning", statement="{a}, {b}")
    return pd.DataFrame([about | test for test in tests])


def frame(rows):
    return pd.DataFrame(list(rows), columns=COLUMNS)


def everything(sign=1):
    """Rows for every claim; with sign 1 they support it, with -1 they say the reverse."""
    out = [row("test_accuracy", 0.01 * sign), *fitted(0.999, 0.995)]
    out += [row("auc", 0.02 * sign, attack=n) for attacks in catalogue.FAMILIES.values() for n in attacks]
    for fpr in (0.1, 0.01, 0.001):
        out += headlines(f"tpr@{fpr}", 0.02 * sign)
        out += headlines(f"log_ratio_tpr@{fpr}_to_auc", 0.5 * sign)
    out += headlines("advantage", 0.02 * sign)
    for epochs, sam, toward in ((2, 0.8, -1), (5, 0.99, 1), (9, 1.0, 1)):
        at = dict(experiment="length sweep", coordinate=f"epochs={epochs}")
        out += fitted(sam=sam, **at) + headlines("auc", 0.02 * toward * sign, **at)
    out += headlines("auc", 0.02 * sign, experiment="tuned")
    out += headlines("auc_at_equal_accuracy", 0.02 * sign, experiment="frontier", coordinate="weight_decay=0.1")
    out += headlines("auc_at_equal_loss", 0.02 * sign, experiment="decomposition", coordinate="epochs=9")
    out += [row(metric, 0.01 * sign, notebook="02") for metric in ("mean_memorization", "memorization_share_0.6_0.85")]
    out += [row("band_is_resolved_0.6_0.85", 1.0, None, notebook="02")]
    rare = dict(experiment="sub-patterns", coordinate="shared by=1 to 2", notebook="06")
    out += [row(metric, 0.01 * sign, **rare) for metric in ("mean_memorization", "test_accuracy")]
    buckets = dict(experiment="influence buckets", notebook="03")
    for metric, value in (("gain_bucket_1", 0.03), ("gain_bucket_5", -0.005), ("gain_bucket_1_minus_5", 0.035),
                          ("gain_entropy_within_difficulty_1_minus_5", 0.01)):  # fmt: skip
        out += [row(metric, value * sign, **buckets)]
    for metric in ("gain_beyond_shuffled", "gain_bucket_1_minus_5"):
        out += [row(metric, 0.01 * sign, coordinate="by=influence on p_y", **buckets)]
    out += [row("gain_beyond_shuffled", 0.01 * sign, coordinate="by=influence on correctness", **buckets)]
    for metric in ("nonmember_share_above_member_median", "nonmember_share_above_0.99", "generalization_gap"):
        out += [row(metric, -0.01 * sign)]
    for metric in ("hessian_top_eigenvalue", *(f"nonmember_variance_{s}_across_{o}" for s, o in SPREAD)):
        out += [row(f"log_ratio_{metric}", -0.5 * sign, 0.1)]
    for experiment, at in (("theorem: monte carlo", "spectrum=power law, n/d=0.5"),
                           ("theorem: limits", "case=empirical curvature")):  # fmt: skip
        out += [penalty(eta, 1 - eta * sign / 40, at, experiment) for eta in (0, 1, 10)]
    out += [distance(0.5 if sign > 0 else 1e-12)]
    return frame(out)


def distance(value):
    about = dict(baseline="", experiment="theorem: limits", coordinate="case=linear model from zero", notebook="04")
    return row("distance_to_minimum_norm", value, None, "sam", **about)


def judged(results, claim, **how):
    """The one row of the ledger about this claim."""
    return verdict.ledger(results, **how).set_index("claim").loc[claim]


def verdicts(results, **wanted):
    """claim -> verdict, of the rows of the ledger that match."""
    found = verdict.ledger(results)
    for column, value in wanted.items():
        found = found[found[column] == value]
    return found.set_index("claim").verdict.to_dict()


@pytest.mark.parametrize(
    "effect, low, high, rule, wanted",
    [(0.01, 0.001, 0.02, "more", "supported"), (0.01, 0.0, 0.02, "more", "inconclusive"),
     (0.002, 0.001, 0.003, "more", "supported"), (0.0019, 0.001, 0.003, "more", "inconclusive"),
     (-0.01, -0.02, -0.001, "more", "contradicted"), (-0.01, -0.02, 0.0, "more", "inconclusive"),
     (-0.002, -0.003, -0.001, "more", "contradicted"), (-0.0019, -0.003, -0.001, "more", "inconclusive"),
     (0.0, -0.001, 0.001, "more", "inconclusive"), (0.0, 0.0, 0.0, "more", "inconclusive"),
     (0.0, -0.001, 0.001, "not less", "supported"), (0.0, -0.002, 0.002, "not less", "inconclusive"),
     (-0.001, -0.003, 0.001, "not less", "inconclusive"), (-0.003, -0.005, -0.001, "not less", "contradicted"),
     (-0.001, -0.0015, -0.0005, "not less", "supported"), (0.01, 0.005, 0.02, "not less", "supported"),
     (1e-15, 1e-15, 1e-15, "present", "contradicted"), (0.1, 0.1, 0.1, "present", "supported"),
     (0.002, 0.002, 0.002, "present", "supported"), (0.001, -0.001, 0.003, "present", "inconclusive"),
     (-0.5, -0.6, -0.4, "present", "contradicted")],
)  # fmt: skip
def test_the_rule_at_its_boundaries(effect, low, high, rule, wanted):
    assert verdict.judge(effect, low, high, 0.002, rule) == wanted


def test_the_rule_is_symmetric_and_not_less_is_the_negation_of_less():
    for effect, half in np.random.default_rng(0).normal(0, 0.004, (300, 2)):
        low, high = effect - abs(half), effect + abs(half)
        more, less = (verdict.judge(*e, 0.002) for e in ((effect, low, high), (-effect, -high, -low)))
        assert less == OPPOSITE.get(more, more)
        not_less = verdict.judge(effect, low, high, 0.002, "not less")
        assert (not_less == "contradicted") == (less == "supported")
        assert more != "supported" or not_less == "supported"


@pytest.mark.parametrize(
    "parts, wanted",
    [("ss", "supported"), ("sc", "contradicted"), ("si", "inconclusive"), ("ic", "contradicted"), ("sn", "not run"),
     ("cn", "not run"), ("n", "not run"), ("tc", "not testable here"), ("ts", "not testable here"), ("tn", "not run")],
)  # fmt: skip
def test_a_conjunction(parts, wanted):
    """A claim of a test for each letter; one that can't be tested (t) is of an optimizer that does not fit."""
    for order in (parts, parts[::-1]):
        tests, rows = [], []
        for k, part in enumerate(order):
            at = dict(experiment="length sweep", coordinate=f"epochs={k}")
            tests.append(dict(metric="test_accuracy", **at))
            rows += fitted(sam=0.5 if part == "t" else 1, **at)
            rows += [row("test_accuracy", {"c": -0.01, "i": 0.0}.get(part, 0.01), **at)] * (part != "n")
        claim = claim_of(tests)
        assert judged(frame(rows), "conjunction", claims=claim).verdict == wanted


def test_every_claim_can_be_supported_and_turns_with_the_data():
    for_it, against = verdicts(everything()), verdicts(everything(-1))
    assert set(for_it) == set(NAMES)
    for name in ONE_RUN:
        assert for_it[name] == "supported", name
        assert against[name] == "contradicted", name
    assert for_it["other_optimizers_alike"] == for_it["other_architectures_alike"] == "not run"


@pytest.mark.parametrize("name", ONE_RUN)
def test_a_claim_without_one_of_its_rows_is_not_run(name):
    claim = verdict.CLAIMS[verdict.CLAIMS.claim == name]  # judging all the others takes forty times as long
    results, test = everything(), claim.iloc[0]
    attacks = test.attack.split(" ")
    about = results.metric.str.startswith(test.metric.removesuffix("lowest"))
    about &= results.attack.isin(attacks) & (results.experiment == test.experiment)
    whole, lacking = (judged(rows, name, claims=claim) for rows in (results, results[~about]))
    assert whole.verdict == "supported" and lacking.verdict == "not run" and about.any()
    assert test.metric in lacking.evidence and "not recorded" in lacking.evidence


def test_too_small_an_effect_is_inconclusive_and_a_wide_interval_too():
    small, wide = (frame([*fitted(), row("test_accuracy", v, half)]) for v, half in ((0.001, 0.0005), (0.05, 0.06)))
    found = [judged(f, "generalizes_better") for f in (small, wide)]
    assert [f.verdict for f in found] == ["inconclusive"] * 2
    assert "+0.1 points [+0.1, +0.1]" in found[0].effect and "+5.0 points [-1.0, +11.0]" in found[1].effect


def test_a_log_ratio_is_judged_as_a_relative_change_that_never_falls_below_minus_100_percent():
    metric, claim = "log_ratio_nonmember_variance_phi_across_models", "varies_less_phi_models"
    for value, half, wanted in (
        (-0.5, 0.1, "supported"),
        (-0.1, 0.2, "inconclusive"),
        (-0.04, 0.01, "inconclusive"),
        (5, 1, "contradicted"),
    ):
        assert verdicts(frame([*fitted(), row(metric, value, half)]))[claim] == wanted
    found = judged(frame([*fitted(), row(metric, -5, 3)]), claim)
    assert found.verdict == "supported" and "-99.3% [-100.0, -86.5]" in found.effect  # e^-5 - 1, e^-8 - 1, e^-2 - 1


def test_a_number_without_an_interval_decides_nothing_unless_it_is_deterministic():
    assert verdicts(frame([*fitted(), row("test_accuracy", 0.1, None)]))["generalizes_better"] == "inconclusive"
    family = [*fitted(), row("auc", 0.1, None, attack="rmia"), row("auc", 0.1, None, attack="rmia_offline")]
    assert verdicts(frame(family))["leaks_more_rmia"] == "inconclusive"
    assert verdicts(frame([distance(0.1)]))["premise_interpolator"] == "supported"


def test_the_lowest_rate_and_its_growth_beyond_the_auc():
    rows = everything()
    assert "tpr@0.001: lira_shrunk +2.0 points" in judged(rows, "more_so_when_strict").effect
    beyond = rows.metric == "log_ratio_tpr@0.001_to_auc"
    for value, wanted in ((0.02, "inconclusive"), (-0.5, "contradicted")):  # it grows as the AUC does, and by less
        rows.loc[beyond, NUMBERS] = [value, value - 0.04, value + 0.04]
        assert verdicts(rows)["more_so_when_strict"] == wanted


def test_one_length_that_fits_is_enough_to_contradict_every_length_and_one_that_does_not_is_set_aside():
    rows = everything()
    found = judged(rows, "at_every_length")
    assert found.verdict == "supported" and "epochs=2: SAM fits 80% and SGD fits 100%;" in found.effect
    rows.loc[(rows.coordinate == "epochs=5") & (rows.baseline == "sgd"), NUMBERS] = [-0.02, -0.021, -0.019]
    found = verdicts(rows)
    assert found["at_every_length"] == "contradicted" and found["at_equal_loss"] == "supported"
    assert found["less_while_unfit"] == "supported"  # of epochs=2 alone
    rows.loc[rows.coordinate == "epochs=2", "value"] = 1.0
    assert verdicts(rows)["less_while_unfit"] == "not testable here"


def test_the_strongest_penalty_is_judged_at_each_setting():
    at = "spectrum=power law, n/d=0.5"
    rows = [penalty(0, 1, at), penalty(0.3, 1.2, at), penalty(10, 0.4, at)]
    found = judged(frame(rows), "theorem_conclusion")
    assert found.verdict == "supported" and "-60.0%" in found.effect and found.optimizer == ""
    rows += [penalty(10, 1.3, at.replace("0.5", "0.9"))]
    assert verdicts(frame(rows))["theorem_conclusion"] == "contradicted"


# ---- what can be tested --------------------------------------------------------------------------------------

LEAKAGE = [name for name in NAMES if name.startswith("leaks_more_")]
THEOREM = list(verdict.CLAIMS.claim[verdict.CLAIMS.experiment.str.startswith("theorem")])


def planted(sgd=1.0, sam=1.0, skill=0.9, resolved=1.0):
    """`everything`, but for how well the optimizers fit and learn in the main comparison, and the models' number."""
    rows = everything()
    rows = rows[~rows.metric.isin(["train_accuracy", verdict.SKILL]) | (rows.experiment != "main")]
    rows.loc[rows.metric.str.startswith("band_is_resolved"), "value"] = resolved
    return pd.concat([rows, frame(fitted(sgd, sam, skill))])


def test_where_sam_fits_79_percent_leakage_is_not_testable_and_a_theorem_is():
    found = verdict.ledger(planted(sam=0.79)).set_index("claim")
    for name in LEAKAGE:
        assert found.verdict[name] == "not testable here" and found.effect[name] == "SAM fits 79% and SGD fits 100%", (
            name
        )
    assert set(found.verdict[THEOREM]) == {"supported"} and len(THEOREM) == 3
    assert found.verdict["flatter_yet_leaks_more"] == "not testable here"
    assert found.verdict["at_equal_loss"] == "not testable here"  # a curve through lengths that do not fit says little
    assert found.verdict["generalizes_better"] == "supported"  # it needs no fit
    assert verdicts(planted(sam=0.99))["leaks_more_rmia"] == "supported"
    both = judged(planted(sgd=0.985, sam=0.79), "leaks_more_rmia")
    assert both.effect == "SAM fits 79% and SGD fits 98.5%"


def test_a_classifier_that_says_only_the_commonest_class_decides_nothing():
    found = verdict.ledger(planted(skill=0.0)).set_index("claim")
    for name in [*LEAKAGE, "generalizes_better", "at_equal_loss", "gains_where_few_help"]:
        assert found.verdict[name] == "not testable here" and "guessing" in found.effect[name], name
    assert set(found.verdict[THEOREM]) == {"supported"}
    margin = verdict.LEARNS + 0.001  # half of the rows' interval
    assert verdicts(planted(skill=margin + 1e-6))["generalizes_better"] == "supported"
    assert verdicts(planted(skill=margin - 1e-6))["generalizes_better"] == "not testable here"


def test_too_few_models_for_a_band_of_memorization():
    found = verdict.ledger(planted(resolved=0.0)).set_index("claim")
    assert found.verdict["memorization_in_the_middle"] == "not testable here"
    assert "128 models are too few" in found.effect["memorization_in_the_middle"]
    assert found.verdict["memorization_not_lower"] == "supported"  # a mean has no bands


@pytest.mark.parametrize("metric", ["train_accuracy", verdict.SKILL, "band_is_resolved_0.6_0.85"])
def test_a_condition_that_was_not_recorded_leaves_its_claims_not_run(metric):
    rows = everything()
    found = verdicts(rows[rows.metric != metric])
    assert found["memorization_in_the_middle"] == "not run" and found["theorem_conclusion"] == "supported"
    assert (found["leaks_more_rmia"] == "not run") == (found["memorization_not_lower"] == "not run")
    assert (found["leaks_more_rmia"] == "supported") == metric.startswith("band")


# ---- families and headline attacks ---------------------------------------------------------------------------


def rejected_by_closed_testing(p, level):
    """Holm's method is the closed test with Bonferroni's: i is rejected if every set with i has a p <= level / size."""
    sets = [s for size in range(1, len(p) + 1) for s in combinations(range(len(p)), size)]
    return [all(min(p[k] for k in s) <= level / len(s) for s in sets if i in s) for i in range(len(p))]


def test_holms_method_by_hand_and_by_closed_testing():
    # sorted: 0.005 <= 0.05/4, 0.01 <= 0.05/3, but 0.03 > 0.05/2, and with it falls 0.04, although 0.04 <= 0.05/1
    assert verdict.holm([0.01, 0.04, 0.03, 0.005]).tolist() == [True, False, False, True]
    assert verdict.holm([0.04, np.nan]).tolist() == [False, False] and verdict.holm([0.04]).tolist() == [True]
    for p in np.random.default_rng(0).beta(0.3, 3, (100, 5)):
        assert verdict.holm(p, 0.1).tolist() == rejected_by_closed_testing(p, 0.1)


ONE_OUTPUT = catalogue.FAMILIES["threshold on one output"]


@pytest.mark.parametrize(
    "effects, wanted, reason",
    [({"gap": 2, "loss": 2, "entropy": 2}, "supported", "for it: gap, loss and entropy"),
     ({"gap": -2, "loss": 0.1}, "contradicted", "against it: gap"),
     ({"gap": 2, "loss": 0.1, "entropy": -0.1}, "supported", "for it: gap"),
     ({"gap": 2, "loss": -2}, "inconclusive", "mixed"),
     ({"gap": 2, "loss": -0.8}, "inconclusive", "mixed"),  # too small to matter, and yet significant
     ({"gap": 0.9, "loss": 0.8}, "inconclusive", "for it"),
     ({"gap": 0.1, "loss": -0.1}, "inconclusive", "significant by none"), ({}, "not run", "")],
)  # fmt: skip
def test_a_family_has_one_verdict(effects, wanted, reason):
    """Effects in units of delta, 0.2 points; their intervals reach a tenth of a point, half a delta, either way."""
    rows = [row("auc", 0.002 * value, 0.001, attack=name) for name, value in effects.items()]
    found = judged(frame([*fitted(), *rows]), "leaks_more_threshold_on_one_output")
    assert found.verdict == wanted and reason in found.effect
    assert all(name in found.effect for name in effects)


def test_a_family_is_corrected_for_its_attacks():
    """z = 2.2, or p = 0.028: significant alone, not among five; with z = 2.7, or p = 0.007, one of five is."""
    for z, wanted in ((2.2, "inconclusive"), (2.7, "supported")):
        half = 1.959964 * 0.01 / z
        rows = [row("auc", 0.01, half, attack="gap"), *(row("auc", 0.0, 0.01, attack=name) for name in ONE_OUTPUT[1:])]
        rows = frame([*fitted(), *rows])
        assert verdicts(rows)["leaks_more_threshold_on_one_output"] == wanted
        alone = judged(rows, "leaks_more_gap", claims=verdict.BY_ATTACK)
        assert alone.verdict == "supported"
    named = [name.removeprefix("leaks_more_") for name in verdict.BY_ATTACK.claim]
    assert named == [name for attacks in catalogue.FAMILIES.values() for name in attacks]


@pytest.mark.parametrize(
    "values, wanted, reason",
    [((2, 2, 2), "supported", "for it: lira_shrunk, rmia and combined"), ((-2, -2, -2), "contradicted", "against it"),
     ((2, 0, 2), "inconclusive", "for it: lira_shrunk and combined"), ((2, -2, 2), "inconclusive", "attacks disagree"),
     ((0, 0, 0), "inconclusive", "none"), ((2, None, None), "supported", "advantage: lira_shrunk +2.0")],
)  # fmt: skip
def test_a_claim_holds_if_it_does_for_every_headline_attack(values, wanted, reason):
    rows = [
        row("advantage", 0.01 * v, attack=n) for n, v in zip(catalogue.HEADLINES, values, strict=True) if v is not None
    ]
    found = judged(frame([*fitted(), row("generalization_gap", -0.01), *rows]), "smaller_gap_larger_advantage")
    assert found.verdict == wanted and reason in found.effect


def test_near_the_ceiling_the_effect_is_also_given_in_logits_and_as_tpr():
    about = dict(attack="rmia")
    rows = [*fitted(), row("auc", 0.01, **about), row("tpr@0.01", 0.05, **about)]
    for level, near in ((0.5, False), (0.965, True)):
        levels = [own("auc", level, **about), own("auc", level + 0.01, optimizer="sam", **about)]
        effect = judged(frame([*rows, *levels]), "leaks_more_rmia").effect
        assert ("ceiling" in effect) == near
    # logit(.975) - logit(.965) = 3.66 - 3.32
    assert "+1.0 points [+0.9, +1.1] (near the ceiling: +0.35 in logit AUC, +5.0 points in TPR at 1% FPR)" in effect


def test_buckets_by_correctness_must_beat_shuffled_membership_too():
    rows = everything()
    at = (rows.metric == "gain_beyond_shuffled") & (rows.coordinate == "by=influence on correctness")
    rows.loc[at, NUMBERS] = [0.001, -0.01, 0.012]
    found = verdicts(rows)
    assert found["gains_where_few_help"] == "inconclusive" and found["influence_makes_buckets"] == "supported"


def test_every_claim_has_a_date_and_none_is_older_than_the_first_ledger():
    dates = pd.to_datetime(verdict.CLAIMS.drop_duplicates("claim").since)
    assert dates.notna().all()
    assert dates.min() == pd.Timestamp("2026-11-23") and (verdict.ledger(everything()).since != "").all()


# ---- the answer ----------------------------------------------------------------------------------------------


def test_the_headline_counts_tuned_and_fitted_cases_and_says_what_was_not_run():
    assert verdict.headline(verdict.ledger(frame([]))).count("not run") == 2
    rows = []
    for dataset, value, sam in (("a", 0.02, 1), ("b", -0.01, 1), ("c", 0.0, 1), ("d", -0.05, 0.8)):
        tuned = dict(dataset=dataset, experiment="tuned")  # SAM of another radius, and the best that SGD can do
        rows += headlines("auc", value, **tuned) + headlines("auc", 0.9, coordinate="rho=9", **tuned)
        rows += fitted(sam=sam, **tuned) + fitted(0.5, 0.5, dataset=dataset)
    for decay, value in ((0.1, -0.013), (0.4, -0.019)):
        at = dict(experiment="frontier", dataset="a", coordinate=f"weight_decay={decay}")
        rows += headlines("auc_at_equal_accuracy", value, **at)
    rows += headlines("auc_at_equal_accuracy", 0.5, **at | {"coordinate": "lr=1, weight_decay=0.1"})  # of one setting
    tuned, equal = verdict.headline(verdict.ledger(frame(rows))).split(" At equal")
    assert "more in 1 of 3 cases, less in 1; where it does, the AUC changes by +0.5 points, from -1.0 to +2.0" in tuned
    assert "more in 0 of 1 cases, less in 1; where it does, the AUC changes by -1.6 points in the median" in equal
    undecided = verdict.headline(verdict.ledger(frame(r for r in rows if r["dataset"] == "c")))
    assert "fit: undecided. At equal" in undecided
    unfit = verdict.ledger(frame(r for r in rows if r["dataset"] == "d"))
    assert "fit: not testable here (SAM fits 80% and SGD fits 100%)." in verdict.headline(unfit)


# ---- runs and groups -----------------------------------------------------------------------------------------


def test_other_experiments_and_other_coordinates_are_not_mixed_up():
    rows = headlines("auc", 0.02, experiment="equal compute", coordinate="train_loss=1") + fitted()
    rows += [row("mean_memorization", 0.01, coordinate="output=confidence", notebook="02")]
    found = verdicts(frame(rows))
    assert found["at_equal_loss"] == found["memorization_not_lower"] == found["leaks_more_rmia"] == "not run"


def test_notebooks_that_record_the_same_number_twice_count_once():
    rows = everything()
    twice = pd.concat([rows, rows.assign(notebook="04")])  # with repeated index labels, too
    pd.testing.assert_frame_equal(verdict.ledger(twice), verdict.ledger(rows))


def test_several_optimizers_each_get_a_line_and_plain_ones_none():
    one = everything()
    asam = one[one.optimizer == "sam"].assign(optimizer="asam", rho="0.5")
    others = asam.assign(optimizer="adam", rho=""), asam.assign(optimizer="dpsam(sigma=1.0)")
    found = verdict.ledger(pd.concat([one, asam, *others]))
    assert set(zip(found.optimizer, found.baseline, strict=True)) == {("sam", "sgd"), ("asam", "sgd"), ("", "")}
    assert (found[found.claim == "leaks_more_likelihood_ratio"].verdict == "supported").sum() == 2
    assert (found.statement == "ASAM tests better than SGD.").sum() == 1
    variant = asam[(asam.experiment == "main") & (asam.metric.isin(["auc", "train_accuracy", verdict.SKILL]))]
    variant = variant.assign(experiment="variants", optimizer="gsam")
    reverse = variant.copy()
    pairs = reverse.baseline != ""
    reverse.loc[pairs, NUMBERS] = -reverse.loc[pairs, ["value", "ci_high", "ci_low"]].to_numpy()
    unfit = reverse.assign(value=np.where(reverse.metric == "train_accuracy", 0.6, reverse.value))
    for more, wanted in ((asam, "supported"), (variant, "supported"), (reverse, "contradicted"), (unfit, "supported")):
        assert verdicts(pd.concat([one, more]))["other_optimizers_alike"] == wanted
    assert "gsam mlp: GSAM fits 60%" in judged(pd.concat([one, unfit]), "other_optimizers_alike").effect


def test_architectures_are_compared_on_one_data_set_only():
    one, other = everything().assign(run="a"), everything(-1).assign(run="b", arch="cnn")
    both = verdicts(pd.concat([one, other]), run="a")
    assert both["other_architectures_alike"] == "contradicted" and both["leaks_more_rmia"] == "supported"
    apart = verdicts(pd.concat([one, other.assign(dataset="cifar10")]), run="a")
    assert apart["other_architectures_alike"] == "not run"
    assert (
        verdicts(pd.concat([one, one.assign(run="b", arch="cnn")]), run="b")["other_architectures_alike"] == "supported"
    )


def test_the_setting_is_read_off_the_rows():
    found = verdict.ledger(everything()).set_index("claim").setting
    assert found["generalizes_better"] == "1,200 examples, 128 models; sgd fits 99.9%; sam fits 99.5%"
    assert found["theorem_conclusion"] == ""


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.parent.name)
def test_the_reference_runs_are_judged_as_their_rows_say_and_flip(path):
    results = read(path)
    main = results[(results.experiment == "main") & (results.coordinate == "")]
    results = results[~results.metric.isin(["train_accuracy", verdict.SKILL])]  # as if all had fitted and learned
    results = pd.concat([results, frame(fitted(dataset=main.dataset.iloc[0], arch=main.arch.iloc[0]))])
    found = verdicts(results, optimizer="sam")
    rows = main[(main.baseline == "sgd") & (main.optimizer == "sam") & (main.metric == "auc")].set_index("attack")
    for family, attacks in catalogue.FAMILIES.items():
        here = [rows.loc[[name]].iloc[0] for name in attacks if name in rows.index]
        p = [2 * NormalDist().cdf(-abs(r.value) * 2 * 1.959964 / (r.ci_high - r.ci_low)) for r in here]
        signs = {np.sign(r.value) for r, real in zip(here, rejected_by_closed_testing(p, 0.05), strict=True) if real}
        plain = {(1,): "supported", (-1,): "contradicted"}.get(tuple(signs), "inconclusive") if here else "not run"
        if all(abs(r.value) >= 0.002 for r in here):
            assert found["leaks_more_" + family.lower().replace(" ", "_")] == plain, family
    pair = results.baseline == "sgd"
    results.loc[pair, NUMBERS] = -results.loc[pair, ["value", "ci_high", "ci_low"]].to_numpy()
    flipped = verdicts(results, optimizer="sam")
    for claim in ("generalizes_better", *LEAKAGE):
        assert flipped[claim] == OPPOSITE.get(found[claim], found[claim]), claim


@pytest.mark.parametrize("text", ["", ",".join(COLUMNS) + "\n"])
def test_an_empty_file_is_a_ledger_of_claims_not_run(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    found = verdict.ledger(read(tmp_path / "results.csv"))
    assert set(found.verdict) == {"not run"} and set(found.claim) == set(NAMES)
    assert "not run" in verdict.table(found).to_html()


@pytest.mark.parametrize("text", ["notebook,value\n01,1\n", ",".join(COLUMNS) + "\n" + "x," * 12 + "y\n", '"', None])
def test_a_bad_file_is_one_error_that_names_it(tmp_path, text):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="results.csv.*columns"):
        read(path)


def test_the_table_escapes_and_names_every_verdict():
    found = verdict.ledger(pd.concat([everything(), everything(-1).assign(dataset="<script>alert(1)</script>")]))
    shown = verdict.table(found).to_html()
    assert "<script>" not in shown and "&lt;script&gt;" in shown and verdict.SHADES["contradicted"] in shown
    assert shown.count(">contradicted</td>") == (found.verdict == "contradicted").sum() > 20

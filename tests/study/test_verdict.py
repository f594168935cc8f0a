"""The ledger: its rule at the boundaries, verdicts that flip with the data, partial results, several runs."""

import numpy as np
import pandas as pd
import pytest

from lib.attacks import catalogue
from lib.study import verdict
from lib.study.results import COLUMNS, NUMBERS, read
from lib.study.settings import ROOT

REFERENCE = sorted((ROOT / "outputs" / "reference").glob("*/results.csv"))
ONE_RUN = [claim for claim in verdict.CLAIMS if claim.name not in verdict.ALIKE]
OPPOSITE = {"supported": "contradicted", "contradicted": "supported"}


def row(metric, value, half=0.001, optimizer="sam", baseline="sgd", attack="", experiment="main", **more):
    """One row of results; half: of its interval, None for a number without chance."""
    low, high = (np.nan, np.nan) if half is None else (value - half, value + half)
    plain = {"notebook": "01", "dataset": "digits", "arch": "mlp", "rho": "0.3" if "sam" in optimizer else ""}
    numbers = {"value": value, "ci_low": low, "ci_high": high, "n_models": 128, "n_examples": 1200, "coordinate": ""}
    about = {"metric": metric, "optimizer": optimizer, "baseline": baseline, "attack": attack, "experiment": experiment}
    return plain | numbers | about | more


def own(metric, value, half=0.001, **more):
    """A row of the baseline's own value."""
    return row(metric, value, half, optimizer="sgd", baseline="", **more)


def penalty(eta, value, coordinate, experiment="theorem: monte carlo", **more):
    """A row of the theorem: the ratio of variances under a penalty."""
    about = dict(optimizer=f"eta={eta}", baseline="", experiment=experiment, coordinate=coordinate, notebook="04")
    return row("variance_ratio", value, 0.01, **(about | more))


def frame(rows):
    return pd.DataFrame(list(rows), columns=COLUMNS)


def everything(sign=1):
    """Rows for every claim; with sign 1 they support it, with -1 they say the reverse."""
    out = [row("test_accuracy", 0.01 * sign), own("train_accuracy", 0.99)]
    out += [row("auc", 0.02 * sign, attack=name) for name in catalogue.NAMES]
    for fpr in (0.1, 0.001):
        out += [own(f"tpr@{fpr}", 0.02, attack="lira"), row(f"tpr@{fpr}", 0.02 * sign, attack="lira")]
    out += [own("auc", 0.6, attack="lira"), row("advantage", 0.02 * sign, attack="lira")]
    for experiment, coordinate in (("length sweep", "epochs=5"), ("length sweep", "epochs=9"),
                                   ("equal train loss", "train_loss=1, between=0.9 and 1.1")):  # fmt: skip
        out += [row("auc", 0.02 * sign, attack="lira", experiment=experiment, coordinate=coordinate)]
    out += [row(metric, 0.01 * sign, notebook="02") for metric in ("mean_memorization", "memorization_share_0.6_0.85")]
    rare = dict(experiment="sub-patterns", coordinate="shared by=1 to 2", notebook="06")
    out += [row(metric, 0.01 * sign, **rare) for metric in ("mean_memorization", "test_accuracy")]
    buckets = dict(experiment="influence buckets", notebook="03")
    for metric, value in (("gain_bucket_1", 0.03), ("gain_bucket_5", -0.005), ("gain_bucket_1_minus_5", 0.035),
                          ("gain_entropy_within_difficulty_1_minus_5", 0.01)):  # fmt: skip
        out += [row(metric, value * sign, **buckets)]
    for metric in ("gain_beyond_shuffled", "gain_bucket_1_minus_5"):
        out += [row(metric, 0.01 * sign, coordinate="by=influence on p_y", **buckets)]
    for metric in ("nonmember_share_above_member_median", "nonmember_share_above_0.99", "generalization_gap"):
        out += [row(metric, -0.01 * sign)]
    for metric in ("hessian_top_eigenvalue", *(f"nonmember_variance_{s}_across_{o}" for s, o in verdict.SPREAD)):
        out += [row(metric, -0.5 * sign, 0.1), own(metric, 2.0)]
    for experiment, at in (("theorem: monte carlo", "spectrum=power law, n/d=0.5"),
                           ("theorem: limits", "case=empirical curvature")):  # fmt: skip
        out += [penalty(eta, 1 - eta * sign / 4, at, experiment) for eta in (0, 1, 2)]
    out += [distance(0.5 if sign > 0 else 1e-12)]
    return frame(out)


def distance(value):
    about = dict(baseline="", experiment="theorem: limits", coordinate="case=linear model from zero", notebook="04")
    return row("distance_to_minimum_norm", value, None, "sam", **about)


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
    assert verdict.judge(effect, low, high, 0.002, rule)[0] == wanted


def test_the_rule_is_symmetric_and_not_less_is_the_negation_of_less():
    for effect, half in np.random.default_rng(0).normal(0, 0.004, (300, 2)):
        low, high = effect - abs(half), effect + abs(half)
        more, less = (verdict.judge(*e, 0.002)[0] for e in ((effect, low, high), (-effect, -high, -low)))
        assert less == OPPOSITE.get(more, more)
        not_less = verdict.judge(effect, low, high, 0.002, "not less")[0]
        assert (not_less == "contradicted") == (less == "supported")
        assert more != "supported" or not_less == "supported"


@pytest.mark.parametrize(
    "low, high, reason", [(-0.001, 0.001, "too small"), (0.0005, 0.003, "too small"), (-1, 2, "contains 0")]
)
def test_inconclusive_says_why(low, high, reason):
    assert reason in verdict.judge((low + high) / 2 * 0.9, low, high, 0.002)[1]


@pytest.mark.parametrize(
    "parts, wanted",
    [("ss", "supported"), ("sc", "contradicted"), ("si", "inconclusive"), ("ic", "contradicted"), ("sn", "not run"),
     ("cn", "not run"), ("n", "not run"), ("", "not run")],
)  # fmt: skip
def test_a_conjunction(parts, wanted):
    names = {"s": "supported", "c": "contradicted", "i": "inconclusive", "n": "not run"}
    assert verdict.combine([names[p] for p in parts]) == verdict.combine([names[p] for p in parts[::-1]]) == wanted


def test_every_claim_can_be_supported_and_turns_with_the_data():
    for_it, against = verdicts(everything()), verdicts(everything(-1))
    assert set(for_it) == {c.name for c in verdict.CLAIMS}
    for claim in ONE_RUN:
        assert for_it[claim.name] == "supported", claim.name
        assert against[claim.name] == "contradicted", claim.name
    assert for_it["other_optimizers_alike"] == for_it["other_architectures_alike"] == "not run"


@pytest.mark.parametrize("claim", ONE_RUN, ids=lambda c: c.name)
def test_a_claim_without_one_of_its_rows_is_not_run(claim, monkeypatch):
    monkeypatch.setattr(verdict, "CLAIMS", (claim,))  # judging all the others takes forty times as long
    results, test = everything(), claim.tests[0]
    metric = test.metric.removeprefix("relative ").replace(
        "variance", "variance_ratio" if test.optimizer else "variance"
    )
    about = results.metric.str.startswith("tpr@" if "strict" in metric else metric) & (results.attack == test.attack)
    fewer = results[~(about & (results.experiment == test.experiment))]
    whole, lacking = (verdict.ledger(rows).set_index("claim").loc[claim.name] for rows in (results, fewer))
    assert whole.verdict == "supported" and lacking.verdict == "not run" and len(fewer) < len(results)
    assert test.metric in lacking.evidence and "not recorded" in lacking.evidence


def test_too_small_an_effect_is_inconclusive_and_a_wide_interval_too():
    small, wide = (frame([row("test_accuracy", 0.001, 0.0005)]), frame([row("test_accuracy", 0.05, 0.06)]))
    found = [verdict.ledger(f).set_index("claim").loc["generalizes_better"] for f in (small, wide)]
    assert [f.verdict for f in found] == ["inconclusive"] * 2
    assert "too small" in found[0].effect and "contains 0" in found[1].effect and "+5.0 points" in found[1].effect


def test_a_variance_is_judged_relative_to_the_baseline():
    metric, claim = "nonmember_variance_phi_across_models", "varies_less_phi_models"
    for base, wanted in ((2.0, "supported"), (100.0, "inconclusive"), (0.0, "inconclusive")):
        assert verdicts(frame([row(metric, -0.5, 0.1), own(metric, base)]))[claim] == wanted
    assert verdicts(frame([row(metric, -0.5, 0.1)]))[claim] == "inconclusive"  # nothing to be relative to


def test_a_number_without_an_interval_decides_nothing_unless_it_is_deterministic():
    assert verdicts(frame([row("auc", 0.1, None, attack="lira")]))["leaks_more_lira"] == "inconclusive"
    assert verdicts(frame([distance(0.1)]))["premise_interpolator"] == "supported"


def test_the_strictest_rate_and_its_relative_growth():
    rows = everything()
    extra = verdict.derived(rows).set_index("metric")
    assert extra.loc["tpr@strictest", "coordinate"] == "tpr@0.001" and extra.loc["tpr@strictest", "value"] == 0.02
    # 0.02/0.02 - 0.02/0.1; half-widths by the delta method, each 0.001 at first, in quadrature
    excess, half = extra.loc["strict_excess"], np.hypot(np.hypot(1, 1) * 0.001 / 0.02, np.hypot(1, 0.2) * 0.001 / 0.1)
    np.testing.assert_allclose([excess.value, excess.ci_low, excess.ci_high], [0.8, 0.8 - half, 0.8 + half])
    for tpr, wanted in ((0.0042, "inconclusive"), (0.0025, "contradicted")):  # it grows as the AUC does, and by less
        changed = (rows.metric == "tpr@0.001") & (rows.baseline == "sgd")
        rows.loc[changed, NUMBERS] = [tpr, tpr - 0.0004, tpr + 0.0004]
        assert verdicts(rows)["more_so_when_strict"] == wanted


def test_one_length_of_training_is_enough_to_contradict_every_length():
    rows = everything()
    rows.loc[rows.coordinate == "epochs=5", NUMBERS] = [-0.02, -0.021, -0.019]
    assert verdicts(rows)["at_every_length"] == "contradicted" and verdicts(rows)["at_equal_loss"] == "supported"


def test_the_strongest_penalty_is_judged_at_each_setting():
    at = "spectrum=power law, n/d=0.5"
    rows = [penalty(0, 1, at), penalty(0.1, 0.99, at), penalty(10, 0.4, at)]
    found = verdict.ledger(frame(rows)).set_index("claim").loc["theorem_conclusion"]
    assert found.verdict == "supported" and "-60.0%" in found.effect and found.optimizer == ""
    rows += [penalty(1, 1.3, at.replace("0.5", "0.9"))]
    assert verdicts(frame(rows))["theorem_conclusion"] == "contradicted"


def test_other_notebooks_and_other_coordinates_are_not_mixed_up():
    rows = [row("auc", 0.02, attack="lira", experiment="equal train loss", coordinate="train_loss=1", notebook=n)
            for n in ("06",)]  # fmt: skip
    rows += [row("mean_memorization", 0.01, coordinate="output=confidence", notebook="02")]
    found = verdicts(frame(rows))
    assert found["at_equal_loss"] == found["memorization_not_lower"] == "not run"


def test_notebooks_that_record_the_same_number_twice_count_once():
    rows = everything()
    twice = pd.concat([rows, rows.assign(notebook="04")])  # with repeated index labels, too
    pd.testing.assert_frame_equal(verdict.ledger(twice), verdict.ledger(rows))


def test_several_optimizers_each_get_a_line_and_plain_ones_none():
    one = everything()
    asam = one[(one.optimizer == "sam") & (one.baseline == "sgd")].assign(optimizer="asam", rho="0.5")
    others = asam.assign(optimizer="adam", rho=""), asam.assign(optimizer="dpsam(sigma=1.0)")
    found = verdict.ledger(pd.concat([one, asam, *others]))
    assert set(zip(found.optimizer, found.baseline, strict=True)) == {("sam", "sgd"), ("asam", "sgd"), ("", "")}
    assert (found[found.claim == "leaks_more_lira"].verdict == "supported").sum() == 2
    assert (found.statement == "ASAM tests better than SGD.").sum() == 1
    variant = asam[(asam.attack == "lira") & (asam.experiment == "main")].assign(
        experiment="variants", optimizer="gsam"
    )
    reverse = pd.concat([asam, variant]).assign(**{name: -asam[name] for name in NUMBERS})
    reverse[["ci_low", "ci_high"]] = reverse[["ci_high", "ci_low"]].to_numpy()
    for more, wanted in ((asam, "supported"), (variant, "supported"), (reverse, "contradicted")):
        assert verdicts(pd.concat([one, more]))["other_optimizers_alike"] == wanted


def test_architectures_are_compared_on_one_data_set_only():
    one, other = everything().assign(run="a"), everything(-1).assign(run="b", arch="cnn")
    both = verdicts(pd.concat([one, other]), run="a")
    assert both["other_architectures_alike"] == "contradicted" and both["leaks_more_lira"] == "supported"
    apart = verdicts(pd.concat([one, other.assign(dataset="cifar10")]), run="a")
    assert apart["other_architectures_alike"] == "not run"
    assert (
        verdicts(pd.concat([one, one.assign(run="b", arch="cnn")]), run="b")["other_architectures_alike"] == "supported"
    )


def test_what_differs_is_read_off_the_rows():
    ours = verdict.ledger(everything()).set_index("claim").differs["generalizes_better"]
    assert all(word in ours for word in ("digits", "mlp", "1200", "128 models", "sgd fits 99.0%"))
    theirs = everything().assign(dataset="cifar10", arch="resnet18", n_models=256, n_examples=50_000)
    assert verdict.ledger(theirs).set_index("claim").differs["generalizes_better"] == "sgd fits 99.0%"


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.parent.name)
def test_the_reference_runs_are_judged_as_their_rows_say_and_flip(path):
    results = read(path)
    found, main = (
        verdicts(results),
        results[(results.experiment == "main") & (results.coordinate == "") & (results.baseline == "sgd")],
    )
    for name in catalogue.NAMES:
        recorded = main[(main.attack == name) & (main.metric == "auc")]
        if recorded.empty:  # a run made before this attack was
            assert found[f"leaks_more_{name}"] == "not run"
            continue
        r = recorded.iloc[0]
        plain = "supported" if r.ci_low > 0 and r.value >= 0.002 else "inconclusive"
        plain = "contradicted" if r.ci_high < 0 and r.value <= -0.002 else plain
        assert found[f"leaks_more_{name}"] == plain, name
    pair = results.baseline == "sgd"
    results.loc[pair, NUMBERS] = -results.loc[pair, ["value", "ci_high", "ci_low"]].to_numpy()
    flipped = verdicts(results)
    for claim in ("generalizes_better", *(f"leaks_more_{n}" for n in catalogue.NAMES)):
        assert flipped[claim] == OPPOSITE.get(found[claim], found[claim]), claim


@pytest.mark.parametrize("text", ["", ",".join(COLUMNS) + "\n"])
def test_an_empty_file_is_a_ledger_of_claims_not_run(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    found = verdict.ledger(read(tmp_path / "results.csv"))
    assert set(found.verdict) == {"not run"} and set(found.claim) == {c.name for c in verdict.CLAIMS}
    assert "not run" in verdict.table(found).to_html()


@pytest.mark.parametrize("text", ["notebook,value\n01,1\n", ",".join(COLUMNS) + "\n" + "x," * 12 + "y\n", '"', None])
def test_a_bad_file_is_one_error_that_names_it(tmp_path, text):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="results.csv.*columns"):
        read(path)


def test_runs_beside_are_read_and_strange_files_passed_over(tmp_path):
    for name, rows in (("own", everything()), ("another", everything(-1))):
        (tmp_path / name).mkdir()
        rows.to_csv(tmp_path / name / "results.csv", index=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.csv").write_text("a,b\n1,2\n")
    found = verdict.beside(tmp_path / "own")
    assert list(found.run.unique()) == ["own", "another"]
    assert verdicts(found, run="another")["generalizes_better"] == "contradicted"
    assert verdict.beside(tmp_path / "nowhere").run.unique().tolist() == ["another", "own"]
    with pytest.raises(ValueError, match="foreign"):
        verdict.beside(tmp_path / "foreign")


def test_the_table_escapes_and_names_every_verdict():
    found = verdict.ledger(pd.concat([everything(), everything(-1).assign(dataset="<script>alert(1)</script>")]))
    shown = verdict.table(found).to_html()
    assert "<script>" not in shown and "&lt;script&gt;" in shown and verdict.SHADES["contradicted"] in shown
    assert shown.count(">contradicted</td>") == (found.verdict == "contradicted").sum() > 20

"""The ledger: its rule at the boundaries, verdicts that flip with the data, partial results, several runs."""

import numpy as np
import pandas as pd
import pytest

from lib.attacks import catalogue
from lib.study import verdict
from lib.study.figures import tiles
from lib.study.results import COLUMNS
from lib.study.settings import ROOT

REFERENCE = sorted((ROOT / "outputs" / "reference").glob("*/results.csv"))
OPPOSITE = {"supported": "contradicted", "contradicted": "supported"}


def row(metric, value, half=0.001, optimizer="sam-sgd", attack="", note="", **more):
    """One row of results; half: of its interval, None for a deterministic number."""
    low, high = (np.nan, np.nan) if half is None else (value - half, value + half)
    plain = {"notebook": "01", "dataset": "digits", "arch": "mlp", "rho": "0.3" if "sam" in optimizer else ""}
    numbers = {"value": value, "ci_low": low, "ci_high": high, "n_models": 128, "n_examples": 1200}
    return plain | numbers | {"metric": metric, "optimizer": optimizer, "attack": attack, "note": note} | more


def frame(rows):
    return pd.DataFrame(list(rows), columns=[*COLUMNS, "run"] if any("run" in r for r in rows) else COLUMNS)


def everything(sign=1):
    """Rows for every claim; with sign 1 they support it, with -1 they say the reverse."""
    out = [row("test_accuracy", 0.01 * sign), row("train_accuracy", 0.99, optimizer="sgd")]
    out += [row("auc", 0.02 * sign, attack=name) for name in catalogue.NAMES]
    out += [row(f"tpr@{f}", v, attack="lira", optimizer=o)
            for f in (0.1, 0.001) for o, v in (("sgd", 0.02), ("sam-sgd", 0.02 * sign))]  # fmt: skip
    out += [row("auc", 0.6, attack="lira", optimizer="sgd"), row("advantage", 0.02 * sign, attack="lira")]
    out += [
        row("auc", 0.02 * sign, attack="lira", note=n) for n in ("epochs=5", "epochs=9", "at equal train loss 1, x")
    ]
    out += [row("mean_memorization", 0.01 * sign), row("memorization_share_0.6_0.85", 0.01 * sign)]
    out += [row(m, 0.01 * sign, note="pattern shared by 1 to 2") for m in ("mean_memorization", "test_accuracy")]
    out += [row(f"gain_bucket_{b}", v * sign) for b, v in (("1", 0.03), ("5", -0.005), ("1_minus_5", 0.035))]
    out += [row(m, 0.01 * sign, note="influence on p_y") for m in ("gain_beyond_shuffled", "gain_bucket_1_minus_5")]
    out += [row("gain_entropy_within_difficulty_1_minus_5", 0.01 * sign)]
    out += [row("nonmember_share_above_member_median", -0.01 * sign)]
    out += [row("nonmember_share_above_0.99", -0.01 * sign), row("generalization_gap", -0.01 * sign)]
    for metric in ("hessian_top_eigenvalue", *(f"nonmember_variance_{s}_across_{o}" for s, o in verdict.SPREAD)):
        out += [row(metric, -0.5 * sign, 0.1), row(metric, 2.0, optimizer="sgd")]
    for note in ("monte carlo, spectrum=power law, n/d=0.5", "limit: empirical curvature"):
        out += [row("variance_ratio", 1 - e * sign / 4, 0.01, optimizer=f"eta={e}", note=note) for e in (0, 1, 2)]
    distance = 0.5 if sign > 0 else 1e-12
    out += [row("distance_to_minimum_norm", distance, None, "sam", note="limit: linear model from zero")]
    return frame(out)


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
    "low, high, reason", [(-0.001, 0.001, "smaller"), (0.0005, 0.003, "smaller"), (-1, 2, "holds 0")]
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
    assert set(for_it) == {c.name for c in verdict.CLAIMS} | set(verdict.ALIKE)
    for claim in verdict.CLAIMS:
        assert for_it[claim.name] == "supported", claim.name
        assert against[claim.name] == "contradicted", claim.name
    assert for_it["other_optimizers_alike"] == for_it["other_architectures_alike"] == "not run"


@pytest.mark.parametrize("claim", verdict.CLAIMS, ids=lambda c: c.name)
def test_a_claim_without_one_of_its_rows_is_not_run_and_the_others_stay(claim):
    results = everything()
    test = claim.tests[0]
    metric = {"tpr@strictest": ["tpr@0.1", "tpr@0.001"]}.get(test.metric, [test.metric])
    about = results.note.str.startswith(test.note) if test.note and "tpr" not in test.note else results.note == ""
    fewer = results[~(results.metric.isin(metric) & (results.attack == test.attack) & about)]
    whole, lacking = (verdict.judged(verdict.with_strict(r, "sam-sgd"), claim, "sam-sgd") for r in (results, fewer))
    assert whole["verdict"] == "supported" and lacking["verdict"] == "not run" and len(fewer) < len(results)
    assert test.metric in lacking["evidence"] and "not recorded" in lacking["evidence"]


def test_too_small_an_effect_is_inconclusive_and_a_wide_interval_too():
    small, wide = (frame([row("test_accuracy", 0.001, 0.0005)]), frame([row("test_accuracy", 0.05, 0.06)]))
    found = [verdict.ledger(f).set_index("claim").loc["generalizes_better"] for f in (small, wide)]
    assert [f.verdict for f in found] == ["inconclusive"] * 2
    assert (
        "smaller than matters" in found[0].effect and "holds 0" in found[1].effect and "+5.0 points" in found[1].effect
    )


def test_a_variance_is_judged_relative_to_the_baseline():
    metric, claim = "nonmember_variance_phi_across_models", "varies_less_phi_models"
    for base, wanted in ((2.0, "supported"), (100.0, "inconclusive"), (0.0, "inconclusive")):
        assert verdicts(frame([row(metric, -0.5, 0.1), row(metric, base, optimizer="sgd")]))[claim] == wanted
    assert verdicts(frame([row(metric, -0.5, 0.1)]))[claim] == "inconclusive"  # nothing to be relative to


def test_a_number_without_an_interval_decides_nothing_unless_it_is_deterministic():
    assert verdicts(frame([row("auc", 0.1, None, attack="lira")]))["leaks_more_lira"] == "inconclusive"
    limit = row("distance_to_minimum_norm", 0.1, None, "sam", note="limit: linear model from zero")
    assert verdicts(frame([limit]))["premise_interpolator"] == "supported"


def test_the_strictest_rate_and_its_relative_growth():
    rows = everything()
    pair = rows.optimizer == "sam-sgd"
    known = verdict.with_strict(rows, "sam-sgd")
    extra = known[len(rows):].set_index("metric")  # fmt: skip
    assert extra.loc["tpr@strictest", "note"] == "tpr@0.001" and extra.loc["tpr@strictest", "value"] == 0.02
    # 0.02/0.02 - 0.02/0.1; half-widths by the delta method, each 0.001 at first, in quadrature
    excess, half = extra.loc["strict_excess"], np.hypot(np.hypot(1, 1) * 0.001 / 0.02, np.hypot(1, 0.2) * 0.001 / 0.1)
    np.testing.assert_allclose([excess.value, excess.ci_low, excess.ci_high], [0.8, 0.8 - half, 0.8 + half])
    for tpr, wanted in ((0.0042, "inconclusive"), (0.0025, "contradicted")):  # it grows as the AUC does, and by less
        rows.loc[(rows.metric == "tpr@0.001") & pair, verdict.NUMBERS] = [tpr, tpr - 0.0004, tpr + 0.0004]
        assert verdicts(rows)["more_so_when_strict"] == wanted


def test_one_length_of_training_is_enough_to_contradict_every_length():
    rows = everything()
    flipped = rows.note == "epochs=5"
    rows.loc[flipped, verdict.NUMBERS] = [-0.02, -0.021, -0.019]
    assert verdicts(rows)["at_every_length"] == "contradicted" and verdicts(rows)["at_equal_loss"] == "supported"


def test_the_strongest_penalty_is_judged_and_differences_of_penalties_are_not():
    note = "monte carlo, spectrum=power law, n/d=0.5"
    rows = [
        row("variance_ratio", v, 0.01, optimizer=f"eta={e}", note=note) for e, v in ((0, 1), (0.1, 0.99), (10, 0.4))
    ]
    rows += [row("variance_ratio", 5.0, 0.01, optimizer="eta=99-eta=0", note=note)]
    found = verdict.ledger(frame(rows)).set_index("claim").loc["theorem_conclusion"]
    assert found.verdict == "supported" and "-60.0%" in found.effect and found.optimizer == ""
    rows += [row("variance_ratio", 1.3, 0.01, optimizer="eta=1", note=note.replace("0.5", "0.9"))]
    assert verdicts(frame(rows))["theorem_conclusion"] == "contradicted"


def test_notebooks_that_record_the_same_number_twice_count_once():
    rows = everything()
    twice = pd.concat([rows, rows.assign(notebook="04")])  # with repeated index labels, too
    pd.testing.assert_frame_equal(verdict.ledger(twice), verdict.ledger(rows))


def test_several_optimizers_each_get_a_line_and_plain_ones_none():
    one = everything()
    asam = one[one.optimizer == "sam-sgd"].assign(optimizer="asam-sgd", rho="0.5")
    adam = asam.assign(optimizer="adam-sgd", rho="")
    dpsam = asam.assign(optimizer="dpsam(sigma=1.0)-sgd")
    assert "dpsam(sigma=1.0)-sgd" not in set(verdict.ledger(pd.concat([one, dpsam])).optimizer)
    found = verdict.ledger(pd.concat([one, asam, adam]))
    assert set(found.optimizer) == {"sam-sgd", "asam-sgd", ""}
    assert (found[found.claim == "leaks_more_lira"].verdict == "supported").sum() == 2
    assert found.statement.str.startswith("ASAM tests better than SGD").sum() == 1
    assert verdicts(pd.concat([one, asam]))["other_optimizers_alike"] == "supported"
    asam[verdict.NUMBERS] *= -1
    asam[["ci_low", "ci_high"]] = asam[["ci_high", "ci_low"]].to_numpy()
    assert verdicts(pd.concat([one, asam]))["other_optimizers_alike"] == "contradicted"
    assert verdict.wide(verdict.ledger(pd.concat([one, asam]))).shape == (len(verdict.CLAIMS) + 2, 2)


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
    results = verdict.read(path)
    found, main = verdicts(results), results[(results.note == "") & (results.optimizer == "sam-sgd")]
    for name in catalogue.NAMES:
        recorded = main[(main.attack == name) & (main.metric == "auc")]
        if recorded.empty:  # a run made before this attack was
            assert found[f"leaks_more_{name}"] == "not run"
            continue
        r = recorded.iloc[0]
        plain = "supported" if r.ci_low > 0 and r.value >= 0.002 else "inconclusive"
        plain = "contradicted" if r.ci_high < 0 and r.value <= -0.002 else plain
        assert found[f"leaks_more_{name}"] == plain, name
    pair = results.optimizer == "sam-sgd"
    results.loc[pair, verdict.NUMBERS] = -results.loc[pair, ["value", "ci_high", "ci_low"]].to_numpy()
    flipped = verdicts(results)
    for claim in ("generalizes_better", *(f"leaks_more_{n}" for n in catalogue.NAMES)):
        assert flipped[claim] == OPPOSITE.get(found[claim], found[claim]), claim


@pytest.mark.parametrize("text", ["", ",".join(COLUMNS) + "\n"])
def test_an_empty_file_is_a_ledger_of_claims_not_run(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    found = verdict.ledger(verdict.read(tmp_path / "results.csv"))
    assert set(found.verdict) == {"not run"} and set(found.claim) == {c.name for c in verdict.CLAIMS} | set(
        verdict.ALIKE
    )
    assert verdict.wide(found).shape == (len(found), 1) and "not run" in verdict.table(found).to_html()


@pytest.mark.parametrize("text", ["notebook,value\n01,1\n", ",".join(COLUMNS) + "\n" + "x," * 12 + "y\n", '"', None])
def test_a_bad_file_is_one_error_that_names_it(tmp_path, text):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="results.csv.*columns"):
        verdict.read(path)


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


def test_the_table_escapes_and_the_tiles_name_every_verdict():
    found = verdict.ledger(pd.concat([everything(), everything(-1).assign(dataset="<script>alert(1)</script>")]))
    shown = verdict.table(found).to_html()
    assert "<script>" not in shown and "&lt;script&gt;" in shown and verdict.SHADES["contradicted"] in shown
    words = verdict.wide(found)
    figure = tiles(words, verdict.SHADES)
    assert (
        sum(t.get_text() == "contradicted" for t in figure.axes[0].texts) == (words == "contradicted").sum().sum() > 20
    )

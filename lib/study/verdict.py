"""The paper's claims, and checks of ours, judged by rule: supported, contradicted, inconclusive or not run.

A claim predicts the sign of an effect, which is a paired difference with a 95% interval [low, high]. We count an effect
as positive where it agrees with the claim. delta is the smallest effect that matters (DELTAS). There are three rules:

    more      supported if low > 0 and effect >= delta; contradicted if high < 0 and effect <= -delta
    not less  supported if low > -delta;                contradicted if high < 0 and effect <= -delta
    present   supported if low > 0 and effect >= delta; contradicted if high < delta (too small to matter, or reversed)

Otherwise the test is inconclusive. A claim of several tests is not run if one of them has no numbers; else it is
contradicted if one test is, supported if all are, and inconclusive in all other cases. A number in which there is no
chance (the limits of the theorem) is its own interval; any other number without an interval decides nothing.
"""

import html
import re
from contextlib import nullcontext, suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.attacks.catalogue import NAMES
from lib.study.results import COLUMNS, NUMBERS, read

GROUP = ["run", "dataset", "arch"]
LEDGER = [*GROUP, *"optimizer baseline claim whose statement verdict effect evidence n_models differs notebook".split()]
SHADES = {"supported": "#a6cee3", "contradicted": "#fdbf6f", "inconclusive": "#e3e3e3", "not run": "#ffffff"}
DELTAS = {" points": 0.002, "%": 0.05, "": 0.01}  # of a rate; of the baseline's own value; of a distance
UNITS = {"relative": "%", "strict": "%", "distance": ""}  # by the first word of a metric; all others are rates
IMAGE, TABLE = ("resnet18", "wrn28_2", "vgg16"), ("mlp",)
PAPER = {"cifar10": IMAGE, "cifar100": IMAGE, "eyepacs": IMAGE, "purchase100": TABLE, "texas100": TABLE}


class Test(NamedTuple):
    """Which rows of results.csv, or of `derived`, must follow the rule. The defaults are the main comparison.

    sign: -1 if the claim expects a negative effect. coordinate: how it begins. optimizer: None is the pair judged.
    """

    metric: str
    sign: int = 1
    attack: str = ""
    experiment: str = "main"
    coordinate: str = ""
    optimizer: str | None = None
    rule: str = "more"


class Claim(NamedTuple):
    """A claim, the notebook that tests it, and its tests. {a} is the optimizer, {b} the baseline."""

    name: str
    notebook: str
    statement: str
    tests: tuple
    whose: str = "the paper's"


OURS, AUC = "ours", Test("auc", attack="lira")  # checks of ours go beyond what the paper says
BY_CONFIDENCE = dict(experiment="influence buckets", coordinate="by=influence on p_y")
BUCKETS, RARE = dict(experiment="influence buckets"), dict(experiment="sub-patterns", coordinate="shared by=1 to 2")
EACH = "each − its baseline"
SPREAD = [(signal, over) for over in ("examples", "models") for signal in ("confidence", "phi")]
CLAIMS = (
    Claim("generalizes_better", "01", "{a} tests better than {b}.", (Test("test_accuracy"),)),
    *(Claim(f"leaks_more_{n}", "01", f"{{a}} leaks more than {{b}} under {n}.", (Test("auc", 1, n),)) for n in NAMES),
    Claim("more_so_when_strict", "01", "Under lira, {a} leaks more at the lowest FPR, relatively more than in AUC.",
          (Test("tpr@strictest", 1, "lira", coordinate="tpr@"), Test("strict_excess", 1, "lira", coordinate="tpr@"))),
    Claim("at_every_length", "01", "{a} leaks more than {b} at every length of training.",
          (AUC._replace(experiment="length sweep", coordinate="epochs="),), OURS),
    Claim("at_equal_loss", "01", "{a} leaks more than {b} at equal train loss.",
          (AUC._replace(experiment="equal train loss", coordinate="train_loss="),), OURS),
    Claim("memorization_not_lower", "02", "On average, {a} memorizes no less than {b}.",
          (Test("mean_memorization", rule="not less"),)),
    Claim("memorization_in_the_middle", "02", "{a} has more examples than {b} with memorization from 0.6 to 0.85.",
          (Test("memorization_share_0.6_0.85"),)),
    Claim("memorizes_atypical", "06", "{a} memorizes the rarest known sub-patterns more than {b}.",
          (Test("mean_memorization", **RARE),)),
    Claim("gains_on_atypical", "06", "{a} tests better than {b} on the rarest known sub-patterns.",
          (Test("test_accuracy", **RARE),)),
    Claim("gains_where_few_help", "03", "{a} gains over {b} on test points that depend on few examples, not on others.",
          (Test("gain_bucket_1", **BUCKETS), Test("gain_bucket_5", -1, rule="not less", **BUCKETS),
           Test("gain_bucket_1_minus_5", **BUCKETS))),
    Claim("gains_without_ties", "03", "The same by influence on confidence, which has no ties: bucket 1 gains most.",
          (Test("gain_bucket_1_minus_5", **BY_CONFIDENCE),), OURS),
    Claim("influence_makes_buckets", "03", "Influence explains bucket 1's gain: shuffled membership gives less.",
          (Test("gain_beyond_shuffled", **BY_CONFIDENCE),), OURS),
    Claim("beyond_difficulty", "03", "At similar difficulty, too, test points that depend on few examples gain more.",
          (Test("gain_entropy_within_difficulty_1_minus_5", **BUCKETS),), OURS),
    *(Claim(f"varies_less_{s}_{over}", "01", f"On non-members, {{a}}'s {s} varies less across {over} than {{b}}'s.",
            (Test(f"relative nonmember_variance_{s}_across_{over}", -1),)) for s, over in SPREAD),
    Claim("fewer_extreme_nonmembers", "04", "{a} has fewer non-members with a confidence above 0.99 than {b}.",
          (Test("nonmember_share_above_0.99", -1),)),
    Claim("fewer_nonmembers_above", "04", "{a} has fewer non-members above its median member in confidence than {b}.",
          (Test("nonmember_share_above_member_median", -1),), OURS),
    Claim("theorem_conclusion", "04", "Theorem: penalizing curvature reduces the variance on non-members.",
          (Test("relative variance", -1, "", "theorem: monte carlo", "spectrum=power law", "largest eta"),)),
    Claim("premise_interpolator", "04", "Premise: on a linear model, SAM does not end at the minimum 2-norm solution.",
          (Test("distance_to_minimum_norm", 1, "", "theorem: limits", "case=linear model", "sam", "present"),), OURS),
    Claim("premise_curvature", "04", "Premise: it is enough to penalize the curvature of the training data.",
          (Test("relative variance", -1, "", "theorem: limits", "case=empirical curvature", "largest eta", "present"),),
          OURS),
    Claim("flatter_yet_leaks_more", "01", "{a}'s minima are flatter than {b}'s, and {a} leaks more under lira.",
          (Test("relative hessian_top_eigenvalue", -1), AUC)),
    Claim("smaller_gap_larger_advantage", "01", "{a} narrows the generalization gap, yet lira's advantage grows.",
          (Test("generalization_gap", -1), Test("advantage", attack="lira"))),
    Claim("other_optimizers_alike", "01", "Every sharpness-aware optimizer leaks more under lira.",
          (Test("auc", 1, "lira", "every optimizer", "optimizer=", EACH),)),
    Claim("other_architectures_alike", "01", "Sharpness-aware training leaks more under lira in every architecture.",
          (Test("auc", 1, "lira", "every arch", "arch=", EACH),)),
)  # fmt: skip
ALIKE = ("other_optimizers_alike", "other_architectures_alike")  # these need more than one run can have by default


def beside(out):
    """The rows of the run in folder `out`, then of readable runs in the folders beside it, with a column run."""
    own, found = Path(out).resolve() / "results.csv", [pd.DataFrame(columns=[*COLUMNS, "run"])]
    for path in sorted(own.parents[1].glob("*/results.csv"), key=lambda path: (path != own, path)):
        with nullcontext() if path == own else suppress(ValueError):
            found.append(read(path).assign(run=path.parent.name))
    return pd.concat([frame for frame in found if len(frame)] or found[:1], ignore_index=True)


def judge(effect, low, high, delta, rule="more"):
    """(verdict, reason) by the rules at the top; the effect is positive where it agrees with the claim."""
    more, less = low > 0 and effect >= delta, high < 0 and effect <= -delta
    rules = {"more": (more, less), "not less": (low > -delta, less), "present": (more, high < delta)}
    for holds, verdict in zip(rules[rule], ("supported", "contradicted"), strict=True):
        if holds:
            return verdict, verdict
    if np.isnan([effect, low, high]).any():
        return "inconclusive", "no interval" if np.isfinite(effect) else "the baseline's own value is missing or 0"
    small = max(abs(low), abs(high)) < delta or not low <= 0 <= high
    return "inconclusive", "too small to matter" if small else "the interval contains 0"


def combine(verdicts):
    """The verdict on a claim of several tests; without any, it is not run."""
    worst_first = ("not run", "contradicted", "inconclusive", "supported")
    return next((v for v in worst_first if v in set(verdicts)), "not run")


def derived(rows):
    """Rows that claims test, computed from one group's recorded rows.

    "relative X": a difference in X over the baseline's own X (of the AUC: over its excess above 1/2). "tpr@strictest":
    lira's TPR at the lowest FPR recorded; "strict_excess": its relative growth minus that of the AUC. "relative
    variance" of "largest eta": the ratio of variances minus 1 under the strongest penalty, at each coordinate.
    """
    same = ["baseline", "attack", "metric"]
    main = rows[(rows.experiment == "main") & (rows.coordinate == "")].drop_duplicates(["optimizer", *same])
    own = main[main.baseline == ""].assign(baseline=main.optimizer)[[*same, *NUMBERS]]
    pairs = main[main.baseline != ""].merge(own, "left", same, suffixes=("", "_own"))
    start = pairs.value_own - 0.5 * (pairs.metric == "auc")
    ratio = pairs.value / start.where(start > 0)
    # Var(d / b) = (Var d + (d / b)^2 Var b) / b^2, taking d and b as independent
    own_width = (pairs.ci_high_own - pairs.ci_low_own).fillna(0)
    half = np.hypot(pairs.ci_high - pairs.ci_low, ratio * own_width) / 2 / start
    relative = pairs.assign(value=ratio, ci_low=ratio - half, ci_high=ratio + half, metric="relative " + pairs.metric)

    lira, rate = pairs.attack == "lira", pairs.metric.str.extract("^tpr@(.+)")[0].astype(float)
    at = lira & (rate == rate[lira].min())
    strict = pairs[at].assign(metric="tpr@strictest", coordinate=pairs.metric)
    auc = relative[lira & (pairs.metric == "auc")][["optimizer", "baseline", *NUMBERS]]
    both = relative[at].assign(coordinate=pairs.metric + ", growth beyond the AUC's", metric="strict_excess")
    both = both.merge(auc, on=["optimizer", "baseline"], suffixes=("", "_auc"))
    value = both.value - both.value_auc
    half = np.hypot(both.ci_high - both.ci_low, both.ci_high_auc - both.ci_low_auc) / 2
    excess = both.assign(value=value, ci_low=value - half, ci_high=value + half)

    eta = rows[(rows.metric == "variance_ratio") & rows.optimizer.str.startswith("eta=")]
    eta = eta.loc[eta.optimizer.str[4:].astype(float).groupby([eta.experiment, eta.coordinate]).idxmax()]
    eta = eta.assign(optimizer="largest eta", metric="relative variance", **(eta[NUMBERS] - 1))
    return pd.concat([relative, strict, excess, eta])


def tested(rows, test, optimizer, baseline, notebook):
    """A test on the rows of a group: a list of (verdict, effect, evidence, n_models), one for each coordinate."""
    wanted = dict(metric=test.metric, attack=test.attack, experiment=test.experiment)
    wanted |= dict(optimizer=optimizer, baseline=baseline)
    found = rows[(rows[list(wanted)] == pd.Series(wanted)).all(axis=1)].drop_duplicates("coordinate")
    at = found.coordinate.str.startswith(test.coordinate) if test.coordinate else found.coordinate == ""
    here = (found.notebook.str[:2] == notebook) | (test.experiment == "main")  # notebooks share the main comparison
    unit = UNITS.get(re.split("[ _]", test.metric)[0], " points")
    delta, scale, form = DELTAS[unit], 100 if unit else 1, "+.1f" if unit else ".2g"
    what = test.metric + f" of {test.attack}" * bool(test.attack)
    least = test.sign * delta * scale * (-1 if test.rule == "not less" else 1)
    who = f"{optimizer} − {baseline}" if baseline else optimizer
    evidence = f"{who}: {what} {'≥' if test.sign > 0 else '≤'} {least:+g}{unit}"
    out = []
    for row in found[at & here].itertuples():
        low, high = sorted((test.sign * row.ci_low, test.sign * row.ci_high))
        verdict, reason = judge(test.sign * row.value, low, high, delta, test.rule)
        effect = f"{row.coordinate or what}: {scale * row.value:{form}}{unit}"
        if row.ci_low < row.ci_high:
            effect += f" [{scale * row.ci_low:{form}}, {scale * row.ci_high:{form}}]"
        out.append((verdict, f"{effect}, {reason}", evidence, row.n_models))
    return out or [("not run", "", f"{evidence} (not recorded)", np.nan)]


def setting(main, optimizer, baseline):
    """In words: what of a group's setting differs from the paper's, and how well its baseline fits."""
    said = []
    for row in main[(main.optimizer == optimizer) & (main.baseline == baseline)][:1].itertuples():
        said += [f"data set {row.dataset}"] * (row.dataset not in PAPER)
        said += [f"architecture {row.arch}"] * (row.arch not in PAPER.get(row.dataset, IMAGE))
        said += [f"a pool of {row.n_examples:.0f} examples, not 50,000"] * (row.n_examples < 50_000)
        said += [f"{row.n_models:.0f} models, not 256"] * (row.n_models < 256)
    fit = main.value[(main.metric == "train_accuracy") & (main.optimizer == baseline) & (main.baseline == "")]
    return "; ".join(said + [f"{baseline} fits {v:.1%}" for v in fit[:1]])


def sharp(rows):
    """The differences of sharpness-aware optimizers: those with a radius, and without the noise of DP-SAM."""
    radius = pd.to_numeric(rows.rho, errors="coerce")
    return rows[(rows.baseline != "") & (radius > 0) & ~rows.optimizer.str.startswith("dpsam")]


def ledger(results):
    """The verdicts on rows of `read` or `beside`, a frame with the columns LEDGER.

    One row for each claim and group (run, dataset, arch) and, if the claim compares optimizers, for each
    sharpness-aware optimizer of the main comparison. Without any rows, every claim is not run.
    """
    rows = results.assign(run=results.get("run", "")).reset_index(drop=True)
    exact = rows.value.where(rows.experiment == "theorem: limits")  # no chance in them
    rows = rows.assign(ci_low=rows.ci_low.fillna(exact), ci_high=rows.ci_high.fillna(exact))
    lira = sharp(rows[(rows.metric == "auc") & (rows.attack == "lira") & (rows.coordinate == "")])
    lira = lira[lira.experiment.isin(["main", "variants"])].sort_values("experiment", kind="stable")  # main first
    lira, out = lira.drop_duplicates([*GROUP, "optimizer"]), []
    for group, part in list(rows.groupby(GROUP, sort=False)) or [(("", "", ""), rows)]:
        main = part[(part.experiment == "main") & (part.coordinate == "")]
        known = [part, derived(part)]
        archs = lira[(lira.dataset == group[1]) & (lira.experiment == "main")]
        for names, found in ((["optimizer"], lira[lira.index.isin(part.index)]), (["arch", "optimizer", "run"], archs)):
            if found[names[0]].nunique() > 1:
                about = dict(experiment=f"every {names[0]}", optimizer=EACH, baseline="", notebook="01")
                at = [", ".join(map("=".join, zip(names, row, strict=True))) for row in found[names].values]
                known.append(found.assign(coordinate=at, **about))
        known = pd.concat(known)
        pairs = sharp(main)[["optimizer", "baseline"]].drop_duplicates().values.tolist() or [["sam", "sgd"]]
        for pair, claim in product(pairs, CLAIMS):
            parts = []
            for test in claim.tests:
                parts += tested(known, test, *((test.optimizer, "") if test.optimizer else pair), claim.notebook)
            verdicts, effects, evidence, n_models = zip(*parts, strict=True)
            who = pair if any(test.optimizer is None for test in claim.tests) else ("", "")
            statement = claim.statement.format(a=pair[0].upper(), b=pair[1].upper())
            found = combine(verdicts), "; ".join(filter(None, effects)), "; ".join(dict.fromkeys(evidence))
            theorem = claim.tests[0].experiment.startswith("theorem")
            differs = "a linear model on drawn data" if theorem else setting(main, *pair)
            about = claim.name, claim.whose, statement
            out.append([*group, *who, *about, *found, pd.Series(n_models).min(), differs, claim.notebook])
    return pd.DataFrame(out, columns=LEDGER).drop_duplicates([*GROUP, "optimizer", "claim"], ignore_index=True)


def table(ledger):
    """The ledger for reading, a pandas Styler: the verdict in words and in a shade, all text escaped."""
    shown = [c for c in [*GROUP, "optimizer"] if ledger[c].nunique() > 1 + (c == "optimizer")]
    shown = ledger[shown + ["whose", "statement", "verdict", "effect", "evidence"]].rename(columns={"evidence": "test"})
    shade = {name: f"background-color: {c}; color: #1a1a1a; white-space: nowrap" for name, c in SHADES.items()}
    style = shown.style.set_uuid("verdict").map(shade.get, subset=["verdict"])
    style = style.format(lambda cell: html.escape(str(cell)).replace("_", "_&#8203;"))  # lines may break there
    return style.set_properties(**{"text-align": "left", "vertical-align": "top"}).hide(axis="index")

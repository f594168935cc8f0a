"""The paper's claims, and checks of ours, judged by rule: supported, contradicted, inconclusive or not run.

An effect e with 95% interval [low, high] is turned so that a positive one speaks for the claim, and is held against
delta, the smallest effect that matters (DELTAS). Three rules, and inconclusive where neither side of one holds:

    more      supported if low > 0 and e >= delta; contradicted if high < 0 and e <= -delta
    not less  supported if low > -delta;           contradicted if high < 0 and e <= -delta ("less" is supported)
    present   supported if low > 0 and e >= delta; contradicted if high < delta (too small to matter, or reversed)

A claim of several tests: not run if any is absent, else contradicted if any is, supported if all are, inconclusive
else. A deterministic number (the limits of the theorem) is its own interval; any other without one is inconclusive.
"""

import html
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.attacks.catalogue import NAMES
from lib.study.results import COLUMNS

NUMBERS, GROUP = ["value", "ci_low", "ci_high"], ["run", "dataset", "arch"]
NOTHING = pd.DataFrame(columns=COLUMNS)
SHADES = {"supported": "#a6cee3", "contradicted": "#fdbf6f", "inconclusive": "#e3e3e3", "not run": "#ffffff"}
DELTAS = {" points": 0.002, "%": 0.05, "": 0.01}  # of a rate; of the baseline's value, or of a ratio of 1; else
PERCENT = ("nonmember_variance", "hessian", "variance_ratio", "strict_excess")  # metrics whose unit is free
IMAGE, TABLE = ("resnet18", "wrn28_2", "vgg16"), ("mlp",)
PAPER = {"cifar10": IMAGE, "cifar100": IMAGE, "eyepacs": IMAGE, "purchase100": TABLE, "texas100": TABLE}


class Test(NamedTuple):
    """Numbers to judge, all of which must hold. sign: -1 if the claim wants them negative; optimizer: None is the pair,
    such as sam-sgd; note: its beginning, where empty means the main comparison, whose rows have none."""

    metric: str
    sign: int = 1
    attack: str = ""
    note: str = ""
    optimizer: str | None = None
    rule: str = "more"


class Claim(NamedTuple):
    """A claim, the notebook that tests it, and its tests. {a} is the optimizer, {b} the baseline; whose: the paper's
    claim, or a check of ours that goes beyond what the paper says."""

    name: str
    notebook: str
    statement: str
    tests: tuple
    whose: str = "the paper's"


OURS, AUC = "ours", Test("auc", attack="lira")
SPREAD = [(signal, over) for over in ("examples", "models") for signal in ("confidence", "phi")]
CLAIMS = (
    Claim("generalizes_better", "01", "{a} tests better than {b}.", (Test("test_accuracy"),)),
    *(Claim(f"leaks_more_{n}", "01", f"{{a}} leaks more than {{b}} under {n}.", (Test("auc", 1, n),)) for n in NAMES),
    Claim("more_so_when_strict", "01", "At the strictest FPR {a} leaks more under lira, relatively more than in AUC.",
          (Test("tpr@strictest", 1, "lira", "tpr@"), Test("strict_excess", 1, "lira", "tpr@"))),
    Claim("at_every_length", "01", "{a} leaks more than {b} at every length of training.",
          (AUC._replace(note="epochs="),), OURS),
    Claim("at_equal_loss", "01", "{a} leaks more than {b} at equal train loss.",
          (AUC._replace(note="at equal train loss"),), OURS),
    Claim("memorization_not_lower", "02", "{a} memorizes no less than {b} on average.",
          (Test("mean_memorization", rule="not less"),)),
    Claim("memorization_in_the_middle", "02", "{a} memorizes more examples at 0.6 to 0.85 than {b}.",
          (Test("memorization_share_0.6_0.85"),)),
    *(Claim(name, "06", statement, (Test(metric, note="pattern shared by 1 to 2"),)) for name, statement, metric in (
        ("memorizes_atypical", "{a} memorizes the rarest known sub-patterns more than {b}.", "mean_memorization"),
        ("gains_on_atypical", "{a} gains over {b} on test points of the rarest known sub-patterns.", "test_accuracy"))),
    Claim("gains_where_few_help", "03", "{a} gains over {b} in bucket 1 (leaning on few examples), not in bucket 5.",
          (Test("gain_bucket_1"), Test("gain_bucket_5", -1, rule="not less"), Test("gain_bucket_1_minus_5"))),
    Claim("gains_without_ties", "03", "The same by influence on confidence, which leaves no ties: bucket 1 gains most.",
          (Test("gain_bucket_1_minus_5", note="influence on p_y"),), OURS),
    Claim("influence_makes_buckets", "03", "It is influence that sets bucket 1 apart: shuffled membership does less.",
          (Test("gain_beyond_shuffled", note="influence on p_y"),), OURS),
    Claim("beyond_difficulty", "03", "Within fifths of difficulty too, points that lean on few gain more.",
          (Test("gain_entropy_within_difficulty_1_minus_5"),), OURS),
    *(Claim(f"varies_less_{s}_{over}", "01", f"On non-members, {{a}}'s {s} varies less across {over} than {{b}}'s.",
            (Test(f"nonmember_variance_{s}_across_{over}", -1),)) for s, over in SPREAD),
    Claim("fewer_extreme_nonmembers", "04", "{b} has more non-members of extreme confidence than {a}.",
          (Test("nonmember_share_above_0.99", -1),)),
    Claim("fewer_nonmembers_above", "04", "{b} has more non-members above its median member in confidence than {a}.",
          (Test("nonmember_share_above_member_median", -1),), OURS),
    Claim("theorem_conclusion", "04", "Theorem: penalizing curvature contracts the variance on non-members.",
          (Test("variance_ratio", -1, note="monte carlo, spectrum=power law", optimizer="eta="),)),
    Claim("premise_interpolator", "04", "Premise: SAM on a linear model ends away from the minimum 2-norm solution.",
          (Test("distance_to_minimum_norm", note="limit: linear model", optimizer="sam", rule="present"),), OURS),
    Claim("premise_curvature", "04", "Premise: the curvature of the training data is enough to contract it.",
          (Test("variance_ratio", -1, note="limit: empirical curvature", optimizer="eta=", rule="present"),), OURS),
    Claim("flatter_yet_leaks_more", "01", "{a}'s minima are flatter than {b}'s, and leak more under lira.",
          (Test("hessian_top_eigenvalue", -1), AUC)),
    Claim("smaller_gap_larger_advantage", "01", "{a}'s generalization gap is smaller, and lira's advantage larger.",
          (Test("generalization_gap", -1), Test("advantage", attack="lira"))),
)  # fmt: skip
ALIKE = {  # claim: (statement, what the verdicts on lira that it compares share, in what they differ)
    "other_optimizers_alike": ("Every sharpness-aware optimizer leaks more under lira.", GROUP, "optimizer"),
    "other_architectures_alike": (
        "Sharpness-aware training leaks more under lira in every architecture.",
        ["dataset"],
        "arch",
    ),
}


def read(path):
    """Rows of a results.csv, numbers as numbers; an empty file has none. Raises ValueError naming the file."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        frame = frame.assign(**{c: frame[c].replace("", "nan").astype(float) for c in [*NUMBERS, *COLUMNS[-3:-1]]})
        return frame.loc[frame.notebook != "outside", COLUMNS].dropna(subset="value")  # no run of ours
    except pd.errors.EmptyDataError:
        return NOTHING
    except (OSError, ValueError, KeyError) as error:
        wanted = f"a run's results.csv, with the columns {', '.join(COLUMNS)}"
        raise ValueError(f"results={str(path)!r} can't be read ({error}): give {wanted}") from None


def beside(out):
    """Rows of the run in folder `out`, then of the runs in folders beside it that can be read, with a column run."""
    out, found = Path(out).resolve(), [NOTHING.assign(run="")]
    for path in sorted(out.parent.glob("*/results.csv"), key=lambda p: (p.parent != out, p)):
        try:
            found.append(read(path).assign(run=path.parent.name))
        except ValueError:
            if path.parent == out:
                raise
    return pd.concat([frame for frame in found if len(frame)] or found[:1], ignore_index=True)


def judge(effect, low, high, delta, rule="more"):
    """(verdict, reason) by the rules at the top; the effect is positive where it speaks for the claim."""
    if low > -delta if rule == "not less" else low > 0 and effect >= delta:
        return "supported", "holds"
    if high < delta if rule == "present" else high < 0 and effect <= -delta:
        return "contradicted", "fails"
    if np.isnan([effect, low, high]).any():
        return "inconclusive", "no interval" if np.isfinite(effect) else "no ratio to the baseline's value"
    small = max(abs(low), abs(high)) < delta or not low <= 0 <= high
    return "inconclusive", "smaller than matters" if small else "the interval holds 0"


def combine(verdicts):
    """The verdict on a conjunction; on nothing at all it is not run."""
    worst = (v for v in ("not run", "contradicted", "inconclusive", "supported") if v in set(verdicts))
    return next(worst, "not run")


def unit(metric):
    """The unit in which a metric's effect is judged, a key of DELTAS."""
    return "%" if metric.startswith(PERCENT) else "" if metric.startswith("distance") else " points"


def relative(rows, metric, pair, attack="", floor=0.0):
    """The pair's difference over the baseline's own value above a floor: [value, low, high], NaN without a ratio."""
    rows = rows[(rows.metric == metric) & (rows.attack == attack) & (rows.note == "")].drop_duplicates("optimizer")
    rows = rows.set_index("optimizer")[NUMBERS].reindex([pair, pair.rpartition("-")[2]]).to_numpy(float)
    base = rows[1, 0] - floor if rows[1, 0] > floor else np.nan
    ratio, half = rows[0, 0] / base, np.ptp(rows[:, 1:], axis=1) / 2
    # Var(d/b) = (Var d + (d/b)^2 Var b) / b^2, the covariance left out
    half = np.hypot(half[0], ratio * np.nan_to_num(half[1])) / base
    return ratio + np.array([0, -half, half])


def with_strict(rows, pair):
    """rows and two more: lira's TPR at the strictest FPR recorded, and its relative growth less that of the AUC."""
    lira = rows[(rows.attack == "lira") & (rows.optimizer == pair) & (rows.note == "")]
    fpr = lira.metric[lira.metric.str.startswith("tpr@")].str[4:].astype(float)
    if fpr.empty:
        return rows
    tpr = lira.loc[[fpr.idxmin()]]
    name = tpr.metric.iloc[0]
    # (tpr - tpr_b) / tpr_b  -  (auc - auc_b) / (auc_b - 1/2), half-widths added in quadrature
    a, b = relative(rows, name, pair, "lira"), relative(rows, "auc", pair, "lira", floor=0.5)
    half = np.hypot(np.ptp(a), np.ptp(b)) / 2
    excess = dict(zip(NUMBERS, a[0] - b[0] + np.array([0, -half, half]), strict=True))
    excess |= {"metric": "strict_excess", "note": f"{name}, relative, less the AUC's"}
    return pd.concat([rows, tpr.assign(metric="tpr@strictest", note=name), tpr.assign(**excess)], ignore_index=True)


def measured(rows, test, pair):
    """The rows that a test judges, their numbers in the unit of the metric; none where nothing was recorded."""
    found = rows[(rows.metric == test.metric) & (rows.attack == test.attack)]
    found = found[found.note.str.startswith(test.note) if test.note else found.note == ""]
    if test.optimizer == "eta=":  # the strongest penalty of each setting
        eta = pd.to_numeric(found.optimizer.str.removeprefix("eta="), errors="coerce").dropna()
        found = found.loc[eta.groupby(found.note).idxmax()]
    found = found[(test.optimizer == "eta=") | (found.optimizer == (test.optimizer or pair))].drop_duplicates("note")
    numbers = found[NUMBERS] - float(test.metric == "variance_ratio")
    if test.note.startswith("limit:"):  # deterministic
        numbers = numbers.T.fillna(numbers.value).T
    if len(found) and unit(test.metric) == "%" and not test.metric.startswith(("variance_ratio", "strict")):
        numbers[:] = relative(rows, test.metric, pair)
    return found.assign(**numbers)


def text(row, kind):
    """'+2.3 points [+2.0, +2.6]', '-15.0% [-18.4, -11.7]' or '1.2e-15'."""
    value, low, high = (f"{100 * number:+.1f}" for number in (row.value, row.ci_low, row.ci_high))
    return f"{value}{kind}" + f" [{low}, {high}]" * (row.ci_low < row.ci_high) if kind else f"{row.value:.2g}"


def tried(rows, test, pair):
    """One test on the rows of a group: a list of (verdict, effect, evidence, n_models)."""
    kind, out = unit(test.metric), []
    what = test.metric + f" of {test.attack}" * bool(test.attack)
    bound = test.sign * DELTAS[kind] * (100 if kind else 1) * (-1 if test.rule == "not less" else 1)
    evidence = f"{test.optimizer or pair}: {what} {'≥' if test.sign > 0 else '≤'} {bound:+g}{kind}"
    for row in measured(rows, test, pair).itertuples():
        low, high = sorted((test.sign * row.ci_low, test.sign * row.ci_high))
        verdict, reason = judge(test.sign * row.value, low, high, DELTAS[kind], test.rule)
        out.append((verdict, f"{row.note or what}: {text(row, kind)}, {reason}", evidence, row.n_models))
    return out or [("not run", "", f"{evidence} (not recorded)", np.nan)]


def judged(rows, claim, pair):
    """A claim on the rows of a group: a row of the ledger, as a dict."""
    parts = [part for test in claim.tests for part in tried(rows, test, pair)]
    verdicts, effects, evidence, n_models = zip(*parts, strict=True)
    about_pair = any(test.optimizer is None for test in claim.tests)
    return {
        "optimizer": pair if about_pair else "",
        "claim": claim.name,
        "whose": claim.whose,
        "statement": claim.statement.format(a=pair.rpartition("-")[0].upper(), b=pair.rpartition("-")[2].upper()),
        "verdict": combine(verdicts),
        "effect": "; ".join(filter(None, effects)),
        "evidence": "; ".join(dict.fromkeys(evidence)),
        "n_models": pd.Series(n_models).min(),
        "differs": setting(rows, pair) if about_pair else "a linear model on drawn data",
        "notebook": claim.notebook,
    }


def setting(rows, pair):
    """What of a group's setting differs from the paper's, and how far its baseline was trained, in words."""
    main, baseline = rows[(rows.note == "") & (rows.optimizer == pair)], pair.rpartition("-")[2]
    if main.empty:
        return ""
    row = main.iloc[0]
    said = [
        (row.dataset not in PAPER, f"data set {row.dataset}"),
        (row.arch not in PAPER.get(row.dataset, IMAGE), f"architecture {row.arch}"),
        (row.n_examples < 50_000, f"a pool of {row.n_examples:.0f} examples, not 50,000"),
        (row.n_models < 256, f"{row.n_models:.0f} models, not 256"),
    ]
    fit = rows[(rows.metric == "train_accuracy") & (rows.optimizer == baseline) & (rows.note == "")].value
    return "; ".join([words for differs, words in said if differs] + [f"{baseline} fits {v:.1%}" for v in fit[:1]])


def sharp(rows):
    """Rows of sharpness-aware optimizers: with a positive radius, which a plain optimizer and the defence SharpReg have
    not, and without the noise of DP-SAM."""
    return rows[(pd.to_numeric(rows.rho, errors="coerce") > 0) & ~rows.optimizer.str.startswith("dpsam")]


def group_ledger(rows):
    """The CLAIMS on the rows of one run, data set and architecture: for each pair, or once if about no pair."""
    main = sharp(rows[rows.note == ""]).optimizer
    known = set(rows.optimizer)
    pairs = [name for name in main.unique() if name.rpartition("-")[2] in known - {name}] or ["sam-sgd"]
    out = pd.DataFrame([judged(with_strict(rows, pair), claim, pair) for pair in pairs for claim in CLAIMS])
    return out.drop_duplicates(["optimizer", "claim"])


def variants(rows):
    """The verdict on lira for each optimizer of notebook 06 at its own radius: rows as the ledger's."""
    known = set(rows.optimizer)
    rows = sharp(rows[rows.note == "variants"]).assign(note="")
    claim = next(claim for claim in CLAIMS if claim.name == "leaks_more_lira")
    pairs = [name for name in rows.optimizer.unique() if name.rpartition("-")[2] in known - {name}]
    return pd.DataFrame([judged(rows, claim, pair) for pair in pairs])


def alike(ledger, more):
    """ALIKE, from the verdicts on lira: a row for each group, not run below two optimizers or architectures.

    more: such verdicts on optimizers that the ledger does not list one by one."""
    out, main = [], ledger[ledger.claim == "leaks_more_lira"]
    every = pd.concat([main, more], ignore_index=True).drop_duplicates([*GROUP, "optimizer"])
    for row in ledger.drop_duplicates(GROUP).to_dict("records"):
        for name, (statement, shared, across) in ALIKE.items():
            lira = every if across == "optimizer" else main
            ran = lira[(lira[shared] == pd.Series(row)[shared]).all(axis=1) & (lira.verdict != "not run")]
            effect = "; ".join(f"{getattr(r, across)}: {r.verdict}" for r in ran.itertuples())
            count = ran[across].nunique()
            verdict = combine(ran.verdict) if count >= 2 else "not run"
            about = dict(claim=name, statement=statement, verdict=verdict, effect=effect, optimizer="")
            out.append(row | about | {"evidence": f"{count} of at least 2 {across}s with a verdict on lira"})
    return pd.DataFrame(out)


def ledger(results):
    """The verdicts on the rows of `read` or `beside`: one row for each claim and group (run, dataset, arch) and, if the
    claim is about a pair, for each sharpness-aware optimizer. Without rows every claim is not run."""
    rows = results.assign(run=results.get("run", "")).reset_index(drop=True)
    if rows.empty:
        rows = pd.DataFrame([dict.fromkeys(rows.columns, "") | dict.fromkeys([*NUMBERS, *COLUMNS[-3:-1]], np.nan)])
    groups = rows.groupby(GROUP, sort=False)
    out = pd.concat(
        [group_ledger(part).assign(run=r, dataset=d, arch=a) for (r, d, a), part in groups], ignore_index=True
    )
    more = [variants(part).assign(run=r, dataset=d, arch=a) for (r, d, a), part in groups]
    return pd.concat([out, alike(out, pd.concat(more))], ignore_index=True)


def wide(ledger):
    """The verdicts as a table: a claim a row; a column for each group and pair, named by what differs."""
    out = {}
    for key, rows in ledger.groupby(GROUP, sort=False):
        for pair in filter(None, rows.optimizer.unique()):
            name = "\n".join(filter(None, dict.fromkeys((*key, pair))))
            out[name] = rows[rows.optimizer.isin([pair, ""])].set_index("claim").verdict
    return pd.DataFrame(out)


def table(ledger):
    """The ledger for reading, a pandas Styler: the verdict in words and in a shade, all text escaped."""
    shown = [c for c in [*GROUP, "optimizer"] if ledger[c].nunique() > 1 + (c == "optimizer")]
    shown = ledger[shown + ["whose", "statement", "verdict", "effect", "evidence"]].rename(columns={"evidence": "test"})
    shade = {name: f"background-color: {c}; color: #1a1a1a; white-space: nowrap" for name, c in SHADES.items()}
    style = shown.style.set_uuid("verdict").map(shade.get, subset=["verdict"])
    style = style.format(lambda cell: html.escape(str(cell)).replace("_", "_&#8203;"))  # lines may break there
    return style.set_properties(**{"text-align": "left", "vertical-align": "top"}).hide(axis="index")

"""The paper's claims, and checks of ours, judged by rule from the rows of results.csv.

A claim predicts the sign of an effect: a paired difference with a 95% interval [low, high], counted as positive where
it agrees with the claim. delta is the smallest effect that matters (DELTAS). There are four rules:

    more      supported if low > 0 and effect >= delta; contradicted if high < 0 and effect <= -delta
    not less  supported if low > -delta;                contradicted if high < 0 and effect <= -delta
    present   supported if low > 0 and effect >= delta; contradicted if high < delta (too small to matter, or reversed)
    family    of attacks: Holm's method finds effects significant at 5% for them all. Supported if all of these are
              positive, and one is >= delta; contradicted if all are negative, and one is <= -delta

Otherwise a test is inconclusive. Any other claim about several attacks (catalogue.HEADLINES) needs the same verdict
from each that was recorded. A comparison is judged only where it meets what its claim needs:

    fit       both optimizers are right about 99% of their training halves
    unfit     the optimizer is not, and fits less than the baseline
    learning  both do better than guessing on the test part: the interval of the balanced accuracy, on a scale from 0
              for guessing to 1, lies above 0.1
    models    they are enough to tell a band of memorization from the others

Of several lengths of training, those that do not meet these conditions are set aside. A claim of several tests gets the
first of these verdicts that one of them has: not run (no numbers), not testable here, contradicted, inconclusive,
supported. A number without chance (the limits of the theorem) is its own interval; any other number without an interval
decides nothing.

DELTAS were set on 23 November 2026 (23:27 UTC), when first results of digits and of CIFAR-10 (20:15 and 20:42) were
known. Conditions, families and headline attacks were set on 26 November, when all runs committed up to then were known.
`since` is the day from which a claim is judged by its present rule: only for later runs was the rule fixed beforehand.
"""

import html
import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit
from scipy.stats import norm

from lib.attacks.catalogue import FAMILIES, HEADLINES
from lib.study.results import NUMBERS
from lib.study.text import joined, number

GROUP = ["run", "dataset", "arch"]
KEY = [*GROUP, *"experiment coordinate attack metric optimizer baseline".split()]
SHADES = {"supported": "#a6cee3", "inconclusive": "#e3e3e3", "contradicted": "#fdbf6f"}
SHADES |= {"not testable here": "#f7f2c4", "not run": "#ffffff"}
DELTAS = {" points": 0.2, "%": 5, "": 0.01}  # of a rate; of the baseline's own value; of a distance
# by the first word of a metric: its unit, and what turns it into an effect in this unit; all others are rates
UNITS = {"log": ("%", lambda ratio: 100 * np.expm1(ratio)), "variance": ("%", lambda ratio: 100 * (ratio - 1))}
UNITS |= {"distance": ("", np.asarray), "rate": (" points", lambda rate: 100 * rate)}
EACH, SKILL = "each − its baseline", "balanced_accuracy_above_chance"
FITS, LEARNS, CEILING = 0.99, 0.1, 0.97  # least train accuracy; least low end of SKILL; an AUC that can hardly grow
# claims.csv has a row for each test of a claim. {a} is the optimizer, {b} the baseline. sign: -1 if the claim expects a
# negative effect. attack: none, "headline", or a family. coordinate: how it begins. optimizer: "" is the pair judged;
# EACH, every row's own pair. needs and rule: as above.
CLAIMS = pd.read_csv(Path(__file__).with_name("claims.csv"), keep_default_na=False, dtype={"notebook": str})
CLAIMS["attack"] = CLAIMS.attack.replace({k: " ".join(v) for k, v in {**FAMILIES, "headline": HEADLINES}.items()})
# the appendix: each attack by itself, its interval not corrected for the other attacks
BY_ATTACK = CLAIMS[CLAIMS.rule == "family"].assign(attack=lambda tests: tests.attack.str.split(" ")).explode("attack")
BY_ATTACK["claim"] = "leaks_more_" + BY_ATTACK.attack
BY_ATTACK["statement"] = "{a} leaks more than {b} under " + BY_ATTACK.attack + "."


def worst(verdicts):
    return max(verdicts, key=[*SHADES].index)


def judge(effect, low, high, delta, rule="more"):
    """The verdict by one of the first three rules at the top; the effect is positive where it agrees with the claim."""
    more, less = low > 0 and effect >= delta, high < 0 and effect <= -delta
    holds, fails = {"more": (more, less), "not less": (low > -delta, less), "present": (more, high < delta)}[rule]
    return "supported" if holds else "contradicted" if fails else "inconclusive"


def holm(p, level=0.05):
    """bool [n], rejected (Holm 1979): p_(1) <= ..., if p_(i) <= level / (n - i + 1) for it and all before it."""
    order, rejected = np.argsort(p), np.zeros(len(p), bool)
    rejected[order] = np.logical_and.accumulate(np.asarray(p)[order] <= level / np.arange(len(p), 0, -1))
    return rejected


def judge_attacks(attacks, numbers, delta, rule="more"):
    """(verdict, reason) on what several attacks say. numbers: [n, 3], the effect, low and high of each."""
    verdicts = [judge(*each, delta, "more" if rule == "family" else rule) for each in numbers]
    if len(attacks) == 1:
        return verdicts[0], ""
    way = np.array([(verdict == "supported") * 1 - (verdict == "contradicted") for verdict in verdicts])
    decides = (way != 0).all()
    if rule == "family":  # p of a normal distribution, whose 95% interval this is
        effect, low, high = numbers.T
        with np.errstate(divide="ignore", invalid="ignore"):
            p = 2 * norm.sf(2 * norm.ppf(0.975) * abs(effect) / (high - low))
        way = np.where(holm(p), np.sign(effect), 0)
        decides = (abs(effect[way != 0]) >= delta).any()
    sides = ("for", 1), ("against", -1)
    said = "; ".join(f"{word} it: {joined(np.array(attacks)[way == side])}" for word, side in sides if side in way)
    if way.min() < 0 < way.max():
        decides, said = False, f"mixed, the attacks disagree: {said}"
    verdict = "supported" if way.max() > 0 else "contradicted"
    return verdict if decides else "inconclusive", said or "significant by none"


def obstacle(known, row, needs):
    """Why a comparison cannot be tested, in words; "" if it can, None if what would tell was not recorded."""

    def look(metric, optimizer, baseline=""):  # [value, ci_low] at the row's own place, else of the main comparison
        group, of = (row.run, row.dataset, row.arch), ("", metric, optimizer, baseline)
        main = known.get((*group, "main", "", *of), [np.nan, np.nan])
        return known.get((*group, row.experiment, row.coordinate, *of), main)

    pair = row.optimizer, row.baseline
    fits, skills = zip(*((look("train_accuracy", name)[0], look(SKILL, name)[1]) for name in pair), strict=True)
    band = look(row.metric.replace("memorization_share", "band_is_resolved"), *pair)[0]
    fit = " and ".join(f"{name.upper()} fits {100 * value:.3g}%" for name, value in zip(pair, fits, strict=True))
    conditions = {  # the numbers that tell, whether they will do, and what is wrong if not
        "fit": (fits, min(fits) >= FITS, fit),
        "unfit": (fits, fits[0] < min(FITS, fits[1]), fit),
        "learning": (skills, min(skills) > LEARNS, "one of the two may be guessing on the test part"),
        "models": ([band], band > 0, f"{row.n_models:.0f} models are too few to resolve the band"),
    }
    wanted = [conditions[need] for need in needs.split()]
    unknown = any(np.isnan(numbers).any() for numbers, *_ in wanted)
    return None if unknown else "; ".join(wrong for _, holds, wrong in wanted if not holds)


def tested(known, rows, test, pair):
    """A test on the rows of a group: its verdict, effect in words and as a number (size), evidence and n_models."""
    attacks, against = test.attack.split(" "), test.sign < 0
    unit, change = UNITS.get(re.split("[ _]", test.metric)[0], UNITS["rate"])
    least = test.sign * DELTAS[unit] * (-1 if test.rule == "not less" else 1)
    evidence = f"{test.optimizer or ' − '.join(pair)}: {test.metric}" + f" by {joined(attacks)}" * any(attacks)
    evidence += f" {'≤' if against else '≥'} {least:+g}{unit}" + f", needs {test.needs}" * bool(test.needs)
    rows = rows[(rows.kind == test.experiment) & (rows.metric == test.metric) & rows.attack.isin(attacks)]
    rows = rows[rows.coordinate.str.startswith(test.coordinate) if test.coordinate else rows.coordinate == ""]
    if test.optimizer != EACH:
        who = (test.optimizer, "") if test.optimizer else pair
        rows = rows[(rows.optimizer == who[0]) & (rows.baseline == who[1])]
    rows = rows.assign(**{name: change(rows[name]) for name in NUMBERS})
    verdicts, sizes, said = [], [], []
    for at, here in rows.groupby("at", sort=False):
        if (why := obstacle(known, next(here.itertuples()), test.needs)) != "":
            said += [f"{at}: {why}".removeprefix(": ")] if why else []
            continue
        numbers, effects = here[NUMBERS].to_numpy(float), []
        agreeing = -numbers[:, [0, 2, 1]] if against else numbers
        verdict, reason = judge_attacks(list(here.attack), agreeing, DELTAS[unit], test.rule)
        for row in here.itertuples():
            effects.append(f"{row.attack} {number(row, '+.1f' if unit else '.2g', unit)}".lstrip())
            place = [getattr(row, name) for name in KEY[:6]]
            a, b = (known.get((*place, "auc", name, ""), [0.5])[0] for name in (row.optimizer, row.baseline))
            if test.metric == "auc" and CEILING <= max(a, b) < 1:
                tpr = known.get((*place, "tpr@0.01", row.optimizer, row.baseline), [np.nan])[0]
                also = f", {100 * tpr:+.1f} points in TPR at 1% FPR" * (tpr == tpr)
                effects[-1] += f" (near the ceiling: {logit(a) - logit(b):+.2f} in logit AUC{also})"
        verdicts.append(verdict)
        sizes.append(np.median(numbers[:, 0]))
        said.append(f"{at or test.metric}: {', '.join([*effects, reason])}".removesuffix(", "))
    verdict = worst(verdicts) if verdicts else "not testable here" if said else "not run"
    about = {"verdict": verdict, "effect": "; ".join(said), "size": np.median(sizes) if sizes else np.nan}
    return about | {"evidence": evidence + " (not recorded)" * (not said), "n_models": rows.n_models.min()}


def sharp(rows):
    """The differences of sharpness-aware optimizers: those with a radius, and without the noise of DP-SAM."""
    has_radius = pd.to_numeric(rows.rho, errors="coerce") > 0
    return rows[(rows.baseline != "") & has_radius & ~rows.optimizer.str.startswith("dpsam")]


def ledger(results, claims=CLAIMS):
    """The verdicts on rows of `read`, which may have a column run. claims: CLAIMS, or BY_ATTACK.

    One row for each claim and GROUP and, if the claim compares optimizers, for each sharpness-aware optimizer of the
    main comparison. size: the median effect of its tests and attacks, in the units of the evidence."""
    rows = results.assign(run=results.get("run", ""), at=results.coordinate, kind=results.experiment)
    rows = rows.drop_duplicates(KEY)
    exact = rows.value.where(rows.experiment == "theorem: limits")  # no chance in them
    rows = rows.assign(ci_low=rows.ci_low.fillna(exact), ci_high=rows.ci_high.fillna(exact))
    known = {row[:-2]: row[-2:] for row in rows[[*KEY, "value", "ci_low"]].itertuples(index=False, name=None)}
    # claims about the strictest rate, or every optimizer or network, find their rows once more under that name
    headlines = rows[rows.attack.isin(HEADLINES) & (rows.coordinate == "")]
    strict = headlines[headlines.experiment == "main"]
    rate = strict.metric.str.extract("tpr@([^_]+)", expand=False).astype(float)
    strict = strict[rate == rate.groupby([strict[name] for name in GROUP]).transform("min")]
    strict = strict.assign(at=strict.metric, metric=strict.metric.str.replace("tpr@[^_]+", "tpr@lowest", regex=True))
    auc = sharp(headlines[(headlines.metric == "auc") & headlines.experiment.isin(["main", "variants"])])
    auc = auc.sort_values("experiment", kind="stable").drop_duplicates([*GROUP, "optimizer", "attack"])  # main first
    auc["at"] = (auc.optimizer + " " + auc.arch + " " + auc.run).str.strip()
    every = auc[auc.groupby(GROUP).optimizer.transform("nunique") > 1].assign(kind="every optimizer")
    archs = auc[auc.experiment == "main"].assign(kind="every arch")
    archs = archs[archs.groupby("dataset").arch.transform("nunique") > 1]
    rows, claims, out = pd.concat([rows, strict, every]), claims.reset_index(drop=True), []
    for group, part in list(rows.groupby(GROUP, sort=False)) or [(("", "", ""), rows)]:
        main = part[(part.kind == "main") & (part.coordinate == "")]
        size = [f"{row.n_examples:,.0f} examples, {row.n_models:.0f} models" for row in main[:1].itertuples()]
        fits = main[(main.metric == "train_accuracy") & (main.baseline == "")]
        part = pd.concat([part, archs[archs.dataset == group[1]]])
        for a, b in sharp(main)[["optimizer", "baseline"]].drop_duplicates().values.tolist() or [["sam", "sgd"]]:
            tests = claims.join(pd.DataFrame([tested(known, part, test, (a, b)) for test in claims.itertuples()]))
            tests[GROUP], is_pair = group, tests.optimizer == ""
            fit = [f"{r.optimizer} fits {r.value:.1%}" for r in fits.itertuples() if r.optimizer in (a, b)]
            about = {"optimizer": a, "baseline": b, "setting": "; ".join(size + fit)}
            tests = tests.assign(**{name: np.where(is_pair, value, "") for name, value in about.items()})
            tests["statement"] = [said.format(a=a.upper(), b=b.upper()) for said in tests.statement]
            out.append(tests)
    tests = pd.concat(out).drop_duplicates([*GROUP, "optimizer", "claim", "metric", "coordinate"])
    how = dict.fromkeys("whose since statement verdict effect size evidence n_models setting notebook".split(), "first")
    how |= {"verdict": worst, "effect": lambda said: "; ".join(filter(None, said)), "evidence": "; ".join}
    return tests.groupby([*GROUP, "optimizer", "baseline", "claim"], sort=False, as_index=False).agg(how)


def headline(ledger):
    """The answer in two sentences: who leaks more where both are tuned and fit, and at equal test accuracy."""
    answer, absent = [], "not run"
    for claim, where in (("more_when_tuned", "Where both optimizers are tuned and fit"),
                         ("more_at_equal_accuracy", "At equal test accuracy")):  # fmt: skip
        found = ledger[ledger.claim == claim]
        why = "; ".join(filter(None, found.effect.unique()))
        said = f"not testable here ({why})" if why else absent
        if len(fair := found[~found.verdict.isin(["not run", "not testable here"])]):
            absent = "nothing to read off, no setting of the one lies clearly between two of the other"
            more, less = ((fair.verdict == v).sum() for v in ("supported", "contradicted"))
            said = "undecided" + f" in all {len(fair)} cases" * (len(fair) > 1)
            if more + less:
                low, middle, high = fair["size"][fair.verdict != "inconclusive"].quantile([0, 0.5, 1])
                span = f", from {low:+.1f} to {high:+.1f}," * bool(low < high)
                said = f"sharpness-aware training leaks more in {more} of {len(fair)} cases, less in {less}; where it "
                said += f"does, the AUC changes by {middle:+.1f} points{span} in the median of {joined(HEADLINES)}"
        answer.append(f"{where}: {said}.")
    return " ".join(answer)


def table(ledger):
    """The ledger for reading, a pandas Styler: the verdict in words and in a shade, all text escaped."""
    shown = [c for c in [*GROUP, "optimizer"] if ledger[c].nunique() > 1 + (c == "optimizer")]
    shown = ledger[shown + ["whose", "statement", "verdict", "effect", "evidence"]].rename(columns={"evidence": "test"})
    shade = {name: f"background-color: {c}; color: #1a1a1a; white-space: nowrap" for name, c in SHADES.items()}
    style = shown.style.set_uuid(f"verdict{len(ledger)}").map(shade.get, subset=["verdict"])
    style = style.format(lambda cell: html.escape(str(cell)).replace("_", "_&#8203;"))  # lines may break there
    return style.set_properties(**{"text-align": "left", "vertical-align": "top"}).hide(axis="index")

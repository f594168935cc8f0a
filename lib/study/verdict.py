"""The paper's claims, and checks of ours, judged by rule from the rows of results.csv.

A claim predicts the sign of an effect, which is a paired difference with a 95% interval [low, high]. We count an effect
as positive where it agrees with the claim. delta is the smallest effect that matters (DELTAS). There are four rules:

    more      supported if low > 0 and effect >= delta; contradicted if high < 0 and effect <= -delta
    not less  supported if low > -delta;                contradicted if high < 0 and effect <= -delta
    present   supported if low > 0 and effect >= delta; contradicted if high < delta (too small to matter, or reversed)
    family    of attacks: supported if an effect is significant, positive and >= delta, and none is significant and
              negative; contradicted the other way round; significant is what Holm's method rejects at 5% for them all

Otherwise the test is inconclusive. Any other claim about several attacks (catalogue.HEADLINES) is supported, or
contradicted, if it is so by each of them. Attacks that a run has not recorded are left out.

A comparison is judged where it can be tested. "fit": both optimizers are right about 99% of their training halves.
"learning": both do better than guessing on the test part, where the interval of the balanced accuracy, on a scale from
0 for guessing to 1, lies above 0.1. "models": they are enough to tell a band of memorization from the others. A claim
that needs one of these where it is not met is not testable here. Of several lengths of training, those that do not meet
it are set aside.

A claim of several tests is not run if one of them has no numbers; else it is not testable here if one is not,
contradicted if one is, supported if all are, and inconclusive in all other cases. A number in which there is no chance
(the limits of the theorem) is its own interval; any other number without an interval decides nothing.

DELTAS were set on 23 November 2026 (23:27 UTC), when first results of digits and of CIFAR-10 (20:15 and 20:42) were
known. Conditions, families and headline attacks were set on 26 November, when all runs committed up to then were known.
`since` is the day from which a claim is judged by its present rule: only for later runs was the rule fixed beforehand.
"""

import html
import re
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit
from scipy.stats import norm

from lib.attacks.catalogue import FAMILIES, HEADLINES
from lib.study.results import NUMBERS
from lib.study.text import joined

GROUP = ["run", "dataset", "arch"]
KEY = [*GROUP, *"experiment coordinate attack metric optimizer baseline".split()]
LEDGER = "optimizer baseline claim whose since statement verdict effect size evidence n_models differs notebook".split()
LEDGER = [*GROUP, *LEDGER]
# of several tests of a claim, the verdict that comes last here decides
SHADES = {"supported": "#a6cee3", "inconclusive": "#e3e3e3", "contradicted": "#fdbf6f"}
SHADES |= {"not testable here": "#f7f2c4", "not run": "#ffffff"}
DELTAS = {" points": 0.002, "%": 0.05, "": 0.01}  # of a rate; of the baseline's own value; of a distance
# by the first word of a metric: its unit, and what turns it into an effect; all others are rates
UNITS = {"log": ("%", np.expm1), "variance": ("%", lambda ratio: ratio - 1), "distance": ("", np.asarray)}
EACH = "each − its baseline"
SKILL = "balanced_accuracy_above_chance"
FITS, LEARNS, CEILING = 0.99, 0.1, 0.97  # least train accuracy; least low end of SKILL; an AUC that can hardly grow
IMAGE, TABLE = ("resnet18", "wrn28_2", "vgg16"), ("mlp",)
PAPER = {"cifar10": IMAGE, "cifar100": IMAGE, "eyepacs": IMAGE, "purchase100": TABLE, "texas100": TABLE}


def leaks_more(groups, what):
    """The claims that an optimizer leaks more by some attacks, a row for each. groups: dict name -> attacks."""
    about = dict(notebook="01", whose="the paper's", since="2026-11-26", needs="fit learning", metric="auc", sign=1)
    about |= dict(experiment="main", coordinate="", optimizer="", rule="family")
    for name, attacks in groups.items():
        claim = f"leaks_more_{name.lower().replace(' ', '_')}"
        yield about | dict(name=claim, statement=f"{{a}} leaks more than {{b}}{what}{name}.", attack=" ".join(attacks))


# claims.csv has a row for each test of a claim; what all its tests share stands in the first. {a} is the optimizer, {b}
# the baseline. needs: conditions, also "unfit" (the optimizer fits less than 99%, and less than the baseline). sign: -1
# if the claim expects a negative effect. attack: none, "headline", or names with spaces between. coordinate: how it
# begins. optimizer: "" is the pair judged; EACH, every row's own pair. rule: as above.
CLAIMS = pd.read_csv(Path(__file__).with_name("claims.csv"), keep_default_na=False, dtype={"notebook": str})
CLAIMS["attack"] = CLAIMS.attack.replace("headline", " ".join(HEADLINES))
CLAIMS = pd.concat([CLAIMS[:1], pd.DataFrame(leaks_more(FAMILIES, ": ")), CLAIMS[1:]], ignore_index=True)
ALIKE = ("other_optimizers_alike", "other_architectures_alike")  # these need more than one run can have by default
# the appendix: each attack by itself, its interval not corrected for the other attacks
EACH_ATTACK = {name: [name] for attacks in FAMILIES.values() for name in attacks}
BY_ATTACK = pd.DataFrame(leaks_more(EACH_ATTACK, " under "))


def judge(effect, low, high, delta, rule="more"):
    """(verdict, reason) by the first three rules at the top; the effect is positive where it agrees with the claim."""
    more, less = low > 0 and effect >= delta, high < 0 and effect <= -delta
    holds, fails = {"more": (more, less), "not less": (low > -delta, less), "present": (more, high < delta)}[rule]
    if holds or fails:
        return ("supported" if holds else "contradicted",) * 2
    if np.isnan([effect, low, high]).any():
        return "inconclusive", "no interval"
    small = max(abs(low), abs(high)) < delta or not low <= 0 <= high
    return "inconclusive", "too small to matter" if small else "the interval contains 0"


def holm(p, level=0.05):
    """Which of the hypotheses with these p values [n] Holm's method (1979) rejects, at `level` for them all: bool [n].

    Of p_(1) <= ... <= p_(n), each is rejected if p_(i) <= level / (n - i + 1) for it and all before it. NaN never is.
    """
    order, rejected = np.argsort(p), np.zeros(len(p), bool)
    rejected[order] = np.logical_and.accumulate(np.asarray(p)[order] <= level / np.arange(len(p), 0, -1))
    return rejected


def judge_attacks(attacks, numbers, delta, rule="more"):
    """(verdict, reason) on what several attacks say. numbers: [n, 3], the effect, low and high of each."""
    if len(attacks) == 1:
        return judge(*numbers[0], delta, "more" if rule == "family" else rule)
    effect, low, high = numbers.T
    if rule == "family":  # p of a normal distribution, whose 95% interval this is
        with np.errstate(divide="ignore", invalid="ignore"):
            real = holm(2 * norm.sf(2 * norm.ppf(0.975) * abs(effect) / (high - low)))
        ways, enough = (real & (effect > 0), real & (effect < 0)), (real & (abs(effect) >= delta)).any()
    else:
        found = np.array([judge(*each, delta, rule)[0] for each in numbers])
        ways = found == "supported", found == "contradicted"
        enough = max(map(np.sum, ways)) == len(attacks)
    sides = ("for", ways[0]), ("against", ways[1])
    said = [f"{word} it: {joined(np.array(attacks)[way])}" for word, way in sides if way.any()]
    mixed = len(said) == 2
    verdict = "inconclusive" if mixed or not enough else "supported" if ways[0].any() else "contradicted"
    return verdict, "mixed, the attacks disagree: " * mixed + ("; ".join(said) or "significant by none")


def obstacle(known, row, needs):
    """Why a comparison cannot be tested, in words; "" if it can, None if what would tell was not recorded.

    known: dict of KEY -> (value, ci_low). Fit and learning are those at the row's own place in an experiment; if these
    were not recorded, those of the main comparison.
    """

    def look(metric, optimizer, baseline=""):
        places, of = ((row.experiment, row.coordinate), ("main", "")), ("", metric, optimizer, baseline)
        own, main = ((row.run, row.dataset, row.arch, *place, *of) for place in places)
        return known.get(own, known.get(main, (np.nan, np.nan)))

    pair = row.optimizer, row.baseline
    fits, lows = [look("train_accuracy", name)[0] for name in pair], [look(SKILL, name)[1] for name in pair]
    band = look(row.metric.replace("memorization_share", "band_is_resolved"), *pair)[0]
    fit = [f"{name.upper()} fits {100 * value:.3g}%" for name, value in zip(pair, fits, strict=True)]
    checks = {  # condition: the numbers that tell, and what is wrong with them
        "fit": (fits, [said for said, value in zip(fit, fits, strict=True) if value < FITS]),
        "unfit": (fits, fit * (fits[0] >= min(FITS, fits[1]))),
        "learning": (
            lows,
            [f"{pair[k].upper()} may be guessing on the test part" for k in (0, 1) if lows[k] <= LEARNS],
        ),
        "models": ([band], [f"{row.n_models:.0f} models are too few to resolve the band"] * (band == 0)),
    }
    told, said = (sum((checks[need][k] for need in needs.split()), []) for k in (0, 1))
    return "; ".join(said) or (None if np.isnan(told).any() else "")


def tested(known, found, test, needs, pair):
    """A test on rows of a group: for each coordinate (verdict, effect, its size, evidence, n_models), in a list.

    known: as in `obstacle`. found: the rows of the test's experiment and metric, their coordinates in a column `at`.
    """
    attacks = test.attack.split(" ")
    unit, change = UNITS.get(re.split("[ _]", test.metric)[0], (" points", np.asarray))
    delta, scale, form = DELTAS[unit], 100 if unit else 1, "+.1f" if unit else ".2g"
    least = test.sign * delta * scale * (-1 if test.rule == "not less" else 1)
    evidence = f"{test.optimizer or ' − '.join(pair)}: {test.metric}" + f" by {joined(attacks)}" * any(attacks)
    evidence += f" {'≥' if test.sign > 0 else '≤'} {least:+g}{unit}" + f", needs {needs}" * bool(needs)
    right = found.coordinate.str.startswith(test.coordinate) if test.coordinate else found.coordinate == ""
    if test.optimizer != EACH:
        who = (test.optimizer, "") if test.optimizer else pair
        right &= (found.optimizer == who[0]) & (found.baseline == who[1])
    found, out, aside = found[right & found.attack.isin(attacks)].drop_duplicates(["at", "attack"]), [], []
    for at, rows in found.groupby("at", sort=False):
        if (why := obstacle(known, next(rows.itertuples()), needs)) != "":
            aside += [f"{at}: {why}".removeprefix(": ")] if why else []
            continue
        numbers, effects = np.column_stack([change(rows[name]) for name in NUMBERS]), []
        turned = test.sign * numbers[:, [0, 1, 2] if test.sign > 0 else [0, 2, 1]]
        verdict, reason = judge_attacks(list(rows.attack), turned, delta, test.rule)
        for row, (value, low, high) in zip(rows.itertuples(), (scale * numbers).tolist(), strict=True):
            effect = f"{row.attack} {value:{form}}{unit}".lstrip() + f" [{low:{form}}, {high:{form}}]" * (low < high)
            place = [getattr(row, name) for name in KEY[:6]]
            a, b = (known.get((*place, "auc", name, ""), [0.5])[0] for name in (row.optimizer, row.baseline))
            if test.metric == "auc" and CEILING <= max(a, b) < 1:
                tpr = known.get((*place, "tpr@0.01", row.optimizer, row.baseline), [np.nan])[0]
                effect += f" (near the ceiling: {logit(a) - logit(b):+.2f} in logit AUC"
                effect += ")" if np.isnan(tpr) else f", {100 * tpr:+.1f} points in TPR at 1% FPR)"
            effects.append(effect)
        said, size = f"{at or test.metric}: {', '.join(effects)}, {reason}", np.median(scale * numbers[:, 0])
        out.append((verdict, said, size, evidence, rows.n_models.min()))
    if not out:
        verdict, said = ("not testable here", "") if aside else ("not run", " (not recorded)")
        return [(verdict, "; ".join(aside), np.nan, evidence + said, np.nan)]
    return [*out[:-1], (out[-1][0], "; set aside: ".join([out[-1][1], *aside]), *out[-1][2:])]


def setting(main, optimizer, baseline):
    """In words: what of a group's setting differs from the paper's, and how well both optimizers fit."""
    said = []
    for row in main[(main.optimizer == optimizer) & (main.baseline == baseline)][:1].itertuples():
        said += [f"data set {row.dataset}"] * (row.dataset not in PAPER)
        said += [f"architecture {row.arch}"] * (row.arch not in PAPER.get(row.dataset, IMAGE))
        said += [f"a pool of {row.n_examples:.0f} examples, not 50,000"] * (row.n_examples < 50_000)
        said += [f"{row.n_models:.0f} models, not 256"] * (row.n_models < 256)
    fits = main[(main.metric == "train_accuracy") & (main.baseline == "") & main.optimizer.isin([optimizer, baseline])]
    return "; ".join(said + [f"{row.optimizer} fits {row.value:.1%}" for row in fits[:2].itertuples()])


def sharp(rows):
    """The differences of sharpness-aware optimizers: those with a radius, and without the noise of DP-SAM."""
    radius = pd.to_numeric(rows.rho, errors="coerce")
    return rows[(rows.baseline != "") & (radius > 0) & ~rows.optimizer.str.startswith("dpsam")]


def ledger(results, claims=CLAIMS):
    """The verdicts on rows of `read` or `beside`, a frame with the columns LEDGER. claims: CLAIMS, or BY_ATTACK.

    One row for each claim and group (run, dataset, arch) and, if the claim compares optimizers, for each
    sharpness-aware optimizer of the main comparison. Without any rows, every claim is not run. size: the first effect
    in the units of the evidence, or the median of several attacks.
    """
    rows = results.assign(run=results.get("run", ""), at=results.coordinate).reset_index(drop=True)
    exact = rows.value.where(rows.experiment == "theorem: limits")  # no chance in them
    rows = rows.assign(ci_low=rows.ci_low.fillna(exact), ci_high=rows.ci_high.fillna(exact))
    auc = sharp(rows[(rows.metric == "auc") & rows.attack.isin(HEADLINES) & (rows.coordinate == "")])
    auc = auc[auc.experiment.isin(["main", "variants"])].sort_values("experiment", kind="stable")  # main first
    auc, out, first = auc.drop_duplicates([*GROUP, "optimizer", "attack"]), [], rows.drop_duplicates(KEY)
    known = dict(zip(map(tuple, first[KEY].values), first[["value", "ci_low"]].values.tolist(), strict=True))
    for group, part in list(rows.groupby(GROUP, sort=False)) or [(("", "", ""), rows)]:
        main = part[(part.experiment == "main") & (part.coordinate == "")]
        found = {key: of for key, of in part.groupby(["experiment", "metric"], sort=False)}
        rates = main.metric[main.metric.str.startswith("tpr@") & main.attack.isin(HEADLINES)].str[4:]
        for rate in rates[rates.astype(float) == rates.astype(float).min()].unique():
            for metric in ("tpr@{}", "log_ratio_tpr@{}_to_auc"):
                recorded = main[main.metric == metric.format(rate)]
                found["main", metric.format("lowest")] = recorded.assign(at=f"tpr@{rate}")
        archs = auc[(auc.dataset == group[1]) & (auc.experiment == "main")]
        for names, each in ((["optimizer"], auc[auc.index.isin(part.index)]), (["arch", "optimizer", "run"], archs)):
            if each[names[0]].nunique() > 1:
                at = [", ".join(map("=".join, zip(names, row, strict=True))) for row in each[names].values]
                found[f"every {names[0]}", "auc"] = each.assign(at=at)
        pairs = sharp(main)[["optimizer", "baseline"]].drop_duplicates().values.tolist() or [["sam", "sgd"]]
        for pair, (name, tests) in product(pairs, claims.groupby("name", sort=False)):
            claim, parts = next(tests.itertuples()), []
            for test in tests.itertuples():
                parts += tested(known, found.get((test.experiment, test.metric), rows[:0]), test, claim.needs, pair)
            verdicts, effects, sizes, evidence, n_models = zip(*parts, strict=True)
            who = pair if (tests.optimizer == "").any() else ("", "")
            about = name, claim.whose, claim.since, claim.statement.format(a=pair[0].upper(), b=pair[1].upper())
            worst = next(v for v in reversed(SHADES) if v in verdicts)
            said = worst, "; ".join(filter(None, effects)), sizes[0], "; ".join(dict.fromkeys(evidence))
            theorem = claim.experiment.startswith("theorem")
            differs = "a linear model on drawn data" if theorem else setting(main, *pair)
            out.append([*group, *who, *about, *said, pd.Series(n_models).min(), differs, claim.notebook])
    return pd.DataFrame(out, columns=LEDGER).drop_duplicates([*GROUP, "optimizer", "claim"], ignore_index=True)


def headline(ledger):
    """The answer in two sentences: who leaks more where both are tuned and fit, and at equal test accuracy."""
    answer, absent = [], "not run"
    for claim, where in (("more_when_tuned", "Where both optimizers are tuned and fit"),
                         ("more_at_equal_accuracy", "At equal test accuracy")):  # fmt: skip
        found = ledger[ledger.claim == claim]
        fair = found[~found.verdict.isin(["not run", "not testable here"])]
        why = "; ".join(filter(None, found.effect.unique()))
        said = f"not testable here ({why})" if why else absent
        if len(fair):
            absent = "nothing to read off, no two settings of the baseline lie clearly on both sides"
            more, less = ((fair.verdict == v).sum() for v in ("supported", "contradicted"))
            low, middle, high = fair["size"].quantile([0, 0.5, 1])
            said = f"sharpness-aware training leaks more in {more} of {len(fair)} cases, less in {less}; it changes "
            said += f"the AUC by {middle:+.1f} points" + f", from {low:+.1f} to {high:+.1f}," * (len(fair) > 1)
            said += f" in the median of {joined(HEADLINES)}"
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

"""From membership scores to AUC, TPR at a fixed FPR and accuracy, each with a 95% interval.

Every metric is a matrix of influence values [M, N], one for each model and example. Their mean is the estimate; their
deviations from it say how much each model and each example moves it, to first order. The difference of two optimizers'
matrices gives the paired difference. Models and examples are both samples: an interval is about new ones of either.

Models share their shadows, so their rows are correlated, and the variance between rows does not show this. `table`
therefore multiplies that variance, for AUC and accuracy, by 1 + SHADOW_CORRECTION / (number of pairs of models), a
number fitted in simulation. How often the intervals hold the truth is in docs/benchmarks.md."""

from collections import namedtuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit, logit

from lib import need
from lib.attacks.membership import calibration_split, checked, folds, pairs
from lib.attacks.signals import by_rows, ranking, ties
from lib.attacks.thresholds import best_thresholds

FPRS, SHADOW_CORRECTION = (0.1, 0.01, 0.001, 0.0001), 5.0
TIDY = ["optimizer", "baseline", "metric", "value", "ci_low", "ci_high"]


Estimate = namedtuple("Estimate", "value low high")  # with its confidence interval, in units of the influence values


def estimate(values, clusters=None, level=0.95, rate=False, shadow_correction=0.0, columns=None, examples_only=False):
    """Estimate of the mean of influence values [M, N], two-way cluster-robust (rows: models, columns: examples).

    clusters [M]: which models belong together, default the pairs (2k, 2k + 1). columns [N]: which examples do (a
    patient's two eyes), default none. The variance is that of Cameron, Gelbach & Miller (2011, equation 2.10), the
    quantile Student's t, with Satterthwaite's degrees of freedom. rate: the mean is a probability, so the interval is
    made on the logit scale. examples_only: it is about new examples only (DeLong's for one model's AUC, Student's t for
    a single row). With one cluster, or one (group of) example(s), it is (nan, nan)."""
    x = np.asarray(values)
    names, cluster = np.unique(np.arange(len(x)) // 2 if clusters is None else clusters, return_inverse=True)
    value = float(x.mean(dtype=np.float64))
    need(x.ndim == 2 and np.isfinite(value), f"values: {x.shape}, mean {value}; valid are finite [M, N]")
    # sums of the deviations: one for each cluster of models and (group of) example(s)
    sums = np.zeros((len(names), x.shape[1]))
    for of_model, k in zip(x, cluster, strict=True):
        sums[k] += of_model - value
    if columns is not None:
        groups = np.unique(columns, return_inverse=True)[1]
        sums = np.stack([np.bincount(groups, each) for each in sums])
    g, n = sums.shape
    if n < 2 or (g < 2 and not examples_only):
        return Estimate(value, np.nan, np.nan)
    if rate and not 1e-12 <= value <= 1 - 1e-12:  # a rate of exactly 0 or 1, up to rounding
        # Clopper & Pearson (1934), each (group of) example(s) counted once: (1 - p)^n = (1 - level) / 2
        bound = 1 - ((1 - level) / 2) ** (1 / n)
        return Estimate(0.0, 0.0, bound) if value < 0.5 else Estimate(1.0, 1 - bound, 1.0)
    # V = V_rows + V_columns - V_both, each G/(G-1) sum_g (sum of the deviations in g)^2 / (M N)^2
    variance = by_column = n / (n - 1) * np.square(sums.sum(0)).sum() / x.size**2
    df = n - 1
    if not examples_only:
        by_row = (1 + shadow_correction / g) * g / (g - 1) * np.square(sums.sum(1)).sum() / x.size**2
        both = np.einsum("gn,gn->", sums, sums) / x.size**2
        variance = max(by_row + by_column - both, by_row, by_column)
        # df = V^2 / (V_rows^2 / (G-1) + V_columns^2 / (N-1))
        spread = by_row**2 / (g - 1) + by_column**2 / (n - 1)
        df = variance**2 / spread if spread > 0 else g - 1
    half = stats.t.ppf(0.5 + level / 2, df) * np.sqrt(variance)
    if not rate:
        return Estimate(value, value - half, value + half)
    # logit(p) +- half / (p (1 - p))
    low, high = expit(logit(value) + np.array([-1, 1]) * half / (value * (1 - value)))
    return Estimate(value, float(low), float(high))


def proportion(found, n) -> Estimate:
    """found of n independent trials, with the interval of Clopper & Pearson (1934); a tie may count half."""
    low, high = (stats.binomtest(int(k), n).proportion_ci() for k in (np.floor(found), np.ceil(found)))
    return Estimate(float(found / n), float(low.low), float(high.high))


def row(metric, found, **more) -> dict:
    """One row of a tidy frame: the metric, an Estimate's value, ci_low and ci_high, and further columns."""
    return dict(metric=metric, value=found.value, ci_low=found.low, ci_high=found.high, **more)


def paired(values, metric, rate=False, log_ratio_from=None, **how) -> pd.DataFrame:
    """Each optimizer's estimate of a metric, and the paired differences from the first optimizer: a tidy frame.

    values: dict optimizer -> influence values [M, N], of the same models and examples. rate, how: as in `estimate` (a
    difference is no rate). The baseline is "" for an optimizer's own value, else the first optimizer. log_ratio_from:
    where the metric's scale begins (0; 1/2 for an AUC). Then every difference also has a row log_ratio_<metric>, unless
    one of the two values does not exceed it."""
    first, *others = values
    rows = [row(metric, estimate(v, rate=rate, **how), optimizer=k, baseline="") for k, v in values.items()]
    for name in others:
        found = {metric: values[name] - values[first]}
        if log_ratio_from is not None and min(values[k].mean() for k in (first, name)) > log_ratio_from:
            above = (values[k] - log_ratio_from for k in (name, first))
            found[f"log_ratio_{metric}"] = log_ratio_influence_values(*above)
        rows += [row(m, estimate(v, **how), optimizer=name, baseline=first) for m, v in found.items()]
    return pd.DataFrame(rows, columns=TIDY)


def table(scores, member, fprs=FPRS, threshold=None, seed=0, log_ratios=False, **how) -> pd.DataFrame:
    """All metrics of one attack for each optimizer, and the paired differences from the first: a tidy frame.

    scores: dict optimizer -> [M, N], of ensembles that trained on the same halves, member [M, N] bool. Metrics: auc,
    balanced_accuracy, advantage (= TPR - FPR), and, where an FPR is `reportable`, tpr@<fpr> and realised_fpr@<fpr>.
    With log_ratios a pair also has log_ratio_auc (of the excess above 1/2), log_ratio_tpr@<fpr>, and
    log_ratio_tpr@<fpr>_to_auc, the second minus the first. threshold: as in balanced_accuracy_influence_values. how:
    columns and examples_only, as in `estimate`; groups in `columns` also stay together where thresholds are learned."""
    how["clusters"] = pairs(checked(next(iter(scores.values())), member)[1])
    learned, corrected = {"seed": seed, "groups": how.get("columns")}, {"shadow_correction": SHADOW_CORRECTION, **how}
    aucs = {k: auc_influence_values(s, member) for k, s in scores.items()}
    frames = [paired(aucs, "auc", True, 0.5 if log_ratios else None, **corrected)]
    values = {k: balanced_accuracy_influence_values(s, member, threshold, **learned) for k, s in scores.items()}
    accuracy = paired(values, "balanced_accuracy", True, **corrected)
    # advantage = TPR - FPR = 2 balanced accuracy - 1; in a difference the 1 cancels
    advantage = (2 * accuracy[["value", "ci_low", "ci_high"]]).sub(accuracy.baseline == "", axis=0)
    frames += [accuracy, accuracy.assign(metric="advantage", **advantage)]
    frames += at_rates(scores, member, fprs, seed, aucs if log_ratios else None, **how)
    return pd.concat(frames, ignore_index=True)


def at_rates(scores, member, fprs=FPRS, seed=0, aucs=None, **how) -> list[pd.DataFrame]:
    """The rows of `table` at each FPR, a frame each; log ratios where the AUCs' influence values, `aucs`, are given."""
    # with one or two models, the threshold comes from half of the target's own non-members
    alone, frames = how.get("examples_only", False) and len(member) < 3, []
    half = calibration_split(member, seed, groups=how.get("columns")) if alone else None
    for fpr in reportable(member, fprs, alone):
        both = {name: tpr_influence_values(s, member, fpr, half) for name, s in scores.items()}
        tprs, realised = ({name: found[k] for name, found in both.items()} for k in (0, 1))
        frames.append(paired(tprs, f"tpr@{fpr}", True, 0.0 if aucs else None, **how))
        frames.append(paired(realised, f"realised_fpr@{fpr}", True, **how))
        if aucs and min(v.mean() for k in aucs for v in (tprs[k], aucs[k] - 0.5)) > 0:
            strict = {k: log_ratio_influence_values(tprs[k], aucs[k] - 0.5) for k in aucs}
            frames.append(paired(strict, f"log_ratio_tpr@{fpr}_to_auc", **how).query("baseline != ''"))
    return frames


def precisions(frame, fprs=(0.01, 0.001), prevalences=(0.01, 0.1)) -> pd.DataFrame:
    """Of those whom an attacker names, the share that are members, if a share `prevalence` of the candidates are.

    frame: rows of `table`, of which differences are left out. The interval combines the unfavourable ends of the
    intervals of TPR and FPR, then the favourable ones, so it holds the truth at least as often as both do. Where nobody
    is named there is no precision, and no row. In halves of a pool the prevalence is 1/2; in life it is rarely."""
    own, frames = frame[frame.baseline == ""], []
    for fpr in fprs:
        tpr, false = (own[own.metric == f"{name}@{fpr}"] for name in ("tpr", "realised_fpr"))
        for prevalence in prevalences:
            right = prevalence * tpr[["value", "ci_low", "ci_high"]]
            wrong = (1 - prevalence) * false[["value", "ci_high", "ci_low"]].to_numpy()
            # precision = pi TPR / (pi TPR + (1 - pi) FPR)
            found = tpr.assign(metric=f"precision@{fpr},prevalence={prevalence}", **right / (right + wrong))
            frames.append(found.dropna(subset="value"))
    return pd.concat(frames, ignore_index=True)


def reportable(member, fprs=FPRS, within=False) -> list[float]:
    """The rates at which each fold of models (within: each half of a model's examples) expects ten false positives."""
    member = np.asarray(member)
    counts = (~member).sum(1) // 2 if within else [(~member[fold]).sum() for fold in folds(member)]
    return [fpr for fpr in fprs if min(counts) * fpr >= 10]


def ratio_influence_values(x, chosen) -> np.ndarray:
    """Influence values of a row's mean over its chosen examples: x and chosen (bool) [N] or [M, N] -> same shape."""
    n = chosen.sum(-1, keepdims=True)
    mean = np.sum(x * chosen, axis=-1, keepdims=True) / n  # a product takes a fifth of the time of `where`
    # mean + N/n 1{chosen} (x - mean), a ratio of means to first order
    return mean + x.shape[-1] / n * chosen * (x - mean)


def log_ratio_influence_values(x, y) -> np.ndarray:
    """Influence values [M, N] of the log ratio of two positive metrics, from theirs, x and y [M, N], paired."""
    a, b = np.mean(x, dtype=np.float64), np.mean(y, dtype=np.float64)
    # d log(a / b) = da / a - db / b
    return np.log(a / b) + x / a - y / b


def auc_influence_values(scores, member) -> np.ndarray:
    """Influence values [M, N] of the mean over targets of the AUC (DeLong, DeLong & Clarke-Pearson 1988).

    Higher scores [M, N] mean more likely a member; ties count half. Raises ValueError for what `checked` refuses."""
    scores, member = checked(scores, member)

    def placements(m):
        order = ranking(scores[m])
        inside, place = member[m][order], np.empty(len(order))
        # how many examples, and how many members, score less; of those with the same score half are counted
        (first, last), members = ties(scores[m][order]), np.append(0, inside.cumsum())
        below, members_below = (first + last) / 2, (members[first] + members[last]) / 2
        # placement: for a member the share of non-members below it, for a non-member the share of members above it
        shares = (below - members_below) / (len(order) - members[-1]), 1 - members_below / members[-1]
        place[order] = np.where(inside, *shares)
        return place

    # AUC = mean placement of the members = mean placement of the non-members
    place = by_rows(placements, scores.shape)
    of_members, of_others = (ratio_influence_values(place, side) for side in (member, ~member))
    means = [one[inside].mean() for one, inside in zip(place, member, strict=True)]
    return of_members + of_others - np.array(means)[:, None]


def balanced_accuracy_influence_values(scores, member, threshold=None, seed=0, groups=None) -> np.ndarray:
    """Influence values [M, N] of the mean over targets of (TPR + TNR) / 2 for the decision score > threshold.

    threshold: a number (0.0 for catalogue.FIXED), or None to learn it on each half of a target's members and
    non-members for the other half (calibration_split, with seed and groups)."""
    scores, member = checked(scores, member)
    half = calibration_split(member, seed, groups=groups).astype(np.uint16) if threshold is None else None

    def is_flagged(m):
        limit = best_thresholds(scores[m], member[m], half[m], 2)[1 - half[m]] if threshold is None else threshold
        return scores[m] > limit

    right = by_rows(is_flagged, scores.shape, bool) == member
    return (ratio_influence_values(right, member) + ratio_influence_values(right, ~member)) / 2


def tpr_influence_values(scores, member, fpr, half=None) -> tuple[np.ndarray, np.ndarray]:
    """Influence values [M, N] of the TPR at a false positive rate, and of the FPR that is actually realised.

    The threshold comes from other models: what flags at most a share `fpr` of one fold's non-member scores is applied
    to the other fold of pairs, and vice versa. half [M, N] of 0 and 1: it comes from one half of the target's own
    examples and judges the other; one model is enough. The TPR's values include the sampling error of the threshold
    (Hsieh & Turnbull 1996; Pepe 2003, section 5.2); those of the realised FPR take the two thresholds as given."""
    scores, member = checked(scores, member)
    targets = np.arange(len(scores))
    part = np.isin(targets, folds(member)[1])[:, None].astype(int) if half is None else half
    tpr, realised = np.empty(scores.shape), np.empty(scores.shape)
    for rows in [targets] if half is None else targets[:, None]:
        s, inside, own = scores[rows], member[rows], part[rows]
        found = []  # of either part: its threshold, the share of its non-members above it, its weight in the error
        for k in (0, 1):
            null, members = s[(own == k) & ~inside], s[(own != k) & inside]
            n_judged = np.broadcast_to(own != k, s.shape).sum()
            # the smallest scores that at most these shares of the non-members exceed
            ranks = [max(len(null) - 1 - int(share * len(null)), 0) for share in (fpr, 0.5 * fpr, 1.5 * fpr)]
            limit, *around = np.partition(null, ranks)[ranks]
            # TPR(t estimated) - TPR(t) = -dTPR/dFPR (share of the non-members above t - fpr); dTPR/dFPR is the rise of
            # the ROC between half and one and a half times fpr
            lower, upper = (np.mean(members > threshold) for threshold in around)
            found.append((limit, np.mean(null > limit), (upper - lower) / fpr * n_judged / len(null)))
        limits, above, weights = np.transpose(found)
        flagged = s > limits[1 - own]
        error = ~inside * weights[own] * ((s > limits[own]) - above[own])
        tpr[rows] = ratio_influence_values(flagged, inside) - error
        realised[rows] = ratio_influence_values(flagged, ~inside)
    return tpr, realised

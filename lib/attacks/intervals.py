"""From membership scores to AUC, TPR at a fixed FPR and accuracy, each with an interval.

Every metric is first written as a matrix cells[M, N], one number per model and example, whose mean is the
estimate and whose deviations are the cells' first-order influence on it. One function, `estimate`, then
makes every interval, and a paired difference between two optimizers is the same function on the difference
of their cells. Models and examples are crossed random factors: an interval speaks about new models *and*
new examples.

Every model is also a shadow of the others. What that adds example by example runs through the columns, and
the column term carries it. What a whole model adds (one of wider scale widens everyone's estimate of the
spread) is common to all rows, and no sum over rows can see it: in a simulation with such model effects the
plain interval of a LiRA AUC difference covered 86 and 89% with 8 and 16 models. So `table` widens
the row term of AUC and accuracy by 1 + SHADOW_CORRECTION / (row clusters), fitted to that simulation (then 93 and
94%); it fades as models are added. TPR needs none of it: its intervals are wide for few models as they are.

How often 95% intervals held the truth in simulation (`python -m tests.calibration`; LiRA, either variance, of one
optimizer and of the difference of two). With 300 examples: 95 to 100% for 8 models, 95 to 99% for 16, 93 to 97% for
64. With 2,000, where what sets whole models apart weighs more: for 8 models 90 to 95% (AUC), 92 to 97% (accuracy)
and 98% or more (TPR); for 16 models 93 to 95%, 97 to 98% and 97% or more. So 8 models on a large pool promise
nearer 90 than 95% for an AUC; take 16 or more where that matters. A realised FPR's interval held the rate asked for
in 97% or more: either fold's threshold judges the other, and their errors cancel in the mean.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit, logit

from lib.attacks.signals import parallel

FPRS = (0.1, 0.01, 0.001, 0.0001)
SHADOW_CORRECTION = 5.0
TIDY = ["optimizer", "baseline", "metric", "value", "ci_low", "ci_high"]


class Estimate(NamedTuple):
    """A value and its confidence interval, in the units of the cells."""

    value: float
    low: float
    high: float


# ---- intervals -------------------------------------------------------------------------------------------


def estimate(
    influence_values, clusters=None, level=0.95, rate=False, shadow_correction=0.0, columns=None, examples_only=False
) -> Estimate:
    """Mean of cells[M, N] with a two-way cluster-robust interval (rows: models, columns: examples).

    clusters[M]: integers that say which models belong together; default the pairs (2k, 2k+1). The variance is
    that of Cameron, Gelbach & Miller (2011, equation 2.10); see also Owen (2007) and, for readers and cases,
    Gallas (2006). The quantile is Student's t with Satterthwaite's degrees of freedom for the two terms.
    rate: the mean is a probability; the interval is made on the logit scale, so it stays inside [0, 1].
    widen: the row term is multiplied by 1 + widen / (row clusters), see the top of this file.
    columns[N]: integers that say which examples belong together (a patient's two eyes), default none do: the
    column term is then over groups. examples_only: the models are given, the column term is all; of one model's
    AUC this is DeLong's interval.
    With one row cluster or one example (group) nothing is known about new ones: the interval is (nan, nan).
    Raises ValueError if cells is not a finite matrix, or clusters (columns) has not one entry per row (column).
    """
    influence_values = np.asarray(influence_values)
    if influence_values.ndim != 2 or influence_values.size == 0:
        raise ValueError(f"influence_values: shape {influence_values.shape}; valid is a matrix [M, N]")
    clusters = np.arange(len(influence_values)) // 2 if clusters is None else np.asarray(clusters)
    if clusters.shape != (len(influence_values),):
        raise ValueError(f"clusters: shape {clusters.shape}; valid is ({len(influence_values)},), one per row")
    if columns is not None and np.shape(columns) != influence_values.shape[1:]:
        raise ValueError(
            f"columns: shape {np.shape(columns)}; valid is {influence_values.shape[1:]}, one per column of cells"
        )
    value = float(influence_values.mean(dtype=np.float64))
    if not np.isfinite(value):
        raise ValueError(f"influence_values: mean {value}; valid are finite numbers")
    variance, df, n = _variance(influence_values, value, clusters, shadow_correction, columns, examples_only)
    if rate and (value < 1e-12 or value > 1 - 1e-12):  # 0 or 1 up to rounding
        return _at_the_end(value, n, level) if df > 0 else Estimate(value, np.nan, np.nan)
    half = stats.t.ppf(0.5 + level / 2, df) * np.sqrt(variance) if df > 0 else np.nan
    if not rate:
        return Estimate(value, value - half, value + half)
    # logit(p) +- half / (p (1 - p))
    ends = expit(logit(value) + np.array([-1, 1]) * half / (value * (1 - value)))
    return Estimate(value, float(ends[0]), float(ends[1]))


def row(metric, found, **more) -> dict:
    """One row of a tidy frame: the metric, an Estimate's value, ci_low and ci_high, and further columns."""
    return dict(metric=metric, value=found.value, ci_low=found.low, ci_high=found.high, **more)


def paired(values, metric, rate=False, **how) -> pd.DataFrame:
    """Each optimizer's estimate of a metric, and the paired differences from the first optimizer: a tidy frame.

    values: dict optimizer -> influence values [M, N], with the same models and examples. rate: each optimizer's own
    value is a probability (a difference is not). how: further arguments of `estimate`. Columns optimizer, baseline,
    metric, value, ci_low, ci_high. The baseline is "" for an optimizer's own value and the first optimizer's name
    for a difference (optimizer minus baseline).
    """
    first, *others = values
    rows = [row(metric, estimate(v, rate=rate, **how), optimizer=k, baseline="") for k, v in values.items()]
    for name in others:
        difference = estimate(values[name] - values[first], **how)
        rows.append(row(metric, difference, optimizer=name, baseline=first))
    return pd.DataFrame(rows, columns=TIDY)


def t_interval(values, level=0.95):
    """Mean of independent values [n] with Student's t interval; no interval for a single one."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, np.nan, np.nan)
    half = float(stats.t.ppf(0.5 + level / 2, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def proportion(found, n, level=0.95):
    """found of n independent trials, with the exact interval of Clopper & Pearson (1934). A tie may count half: the
    bounds are then those of the whole numbers on either side. Fewer than 6 trials never exclude 1/2 at 95%."""
    low, high, tail = np.floor(found), np.ceil(found), (1 - level) / 2
    below = stats.beta.ppf(tail, low, n - low + 1) if low > 0 else 0.0
    above = stats.beta.ppf(1 - tail, high + 1, n - high) if high < n else 1.0
    return Estimate(float(found / n), float(below), float(above))


def _variance(influence_values, value, clusters, shadow_correction, together, examples_only):
    """Variance of the mean of cells, its degrees of freedom (0: not estimable), and how many (groups of) examples."""
    names, group = np.unique(clusters, return_inverse=True)
    g, n = len(names), influence_values.shape[1] if together is None else len(np.unique(together))
    if n < 2 or (g < 2 and not examples_only):
        return np.nan, 0, n
    sums = np.zeros((g, influence_values.shape[1]))  # a cluster's sum for every example
    for row, k in zip(influence_values, group, strict=True):
        sums[k] += row - value
    if together is not None:  # for every group of examples
        index = np.unique(together, return_inverse=True)[1]
        sums = np.stack([np.bincount(index, row, n) for row in sums])
    # V = V_rows + V_columns - V_both, each G/(G-1) sum_g (sum of the deviations in g)^2 / (M N)^2
    columns = n / (n - 1) * np.square(sums.sum(0)).sum() / influence_values.size**2
    if examples_only:
        return columns, n - 1, n
    rows = (1 + shadow_correction / g) * g / (g - 1) * np.square(sums.sum(1)).sum() / influence_values.size**2
    both = np.einsum("gn,gn->", sums, sums) / influence_values.size**2
    variance = max(rows + columns - both, rows, columns)
    # df = V^2 / (V_rows^2 / (G-1) + V_columns^2 / (N-1))
    spread = rows**2 / (g - 1) + columns**2 / (n - 1)
    return variance, variance**2 / spread if spread > 0 else g - 1, n


def _at_the_end(value, n, level):
    """A rate of exactly 0 or 1: the bound of Clopper & Pearson (1934), each of n (groups of) examples counted once."""
    # (1 - p)^n = (1 - level) / 2
    bound = 1 - ((1 - level) / 2) ** (1 / n)
    return Estimate(0.0, 0.0, bound) if value < 0.5 else Estimate(1.0, 1 - bound, 1.0)


# ---- cells -----------------------------------------------------------------------------------------------


def auc_influence_values(scores, member) -> np.ndarray:
    """Cells [M, N] of the mean over targets of the AUC, from DeLong's placement values (DeLong et al. 1988).

    scores: [M, N], higher = more likely a member; member: [M, N] bool. Ties count half.
    Raises ValueError for shapes that differ, NaN scores, or a row without members or non-members.
    """
    scores, member = checked(scores, member)

    def row(m):
        place = _placements(scores[m], member[m])
        return (
            ratio_influence_values(place, member[m])
            + ratio_influence_values(place, ~member[m])
            - place[member[m]].mean()
        )

    return np.stack(parallel(row, range(len(scores))))


def _placements(s, member):
    """Per member the share of non-members below it, per non-member the share of members above; ties half."""
    order = np.argsort(s)
    s, inside = s[order], member[order]
    left, right = (np.searchsorted(s, s, side) for side in ("left", "right"))  # the ends of each run of ties
    before = np.append(0, np.cumsum(inside))
    members, place = before[left] + before[right], np.empty(len(s))  # twice the members below
    outside = (left + right - members) / (2 * (len(s) - before[-1]))
    place[order] = np.where(inside, outside, 1 - members / (2 * before[-1]))
    return place


def ratio_influence_values(x, chosen) -> np.ndarray:
    """Cells of a mean over chosen examples: x and chosen (bool) [N] or [M, N] -> the same shape.

    The mean of each row of cells is the mean of x over that row's chosen ones; x elsewhere does not count.
    """
    n = chosen.sum(-1, keepdims=True)
    mean = np.sum(x, axis=-1, keepdims=True, where=chosen) / n
    # cell = mean + N/n 1{chosen} (x - mean), a ratio of means to first order
    return mean + np.where(chosen, x.shape[-1] / n * (x - mean), 0.0)


def balanced_accuracy_influence_values(scores, member, threshold=None, seed=0, groups=None) -> np.ndarray:
    """Cells [M, N] of the mean over targets of (TPR + TNR) / 2 for the decision score > threshold.

    threshold: a number, or None to learn it per target on one half of the members and non-members, apply it
    to the other half, and the other way round (cross-fitting: no example is judged by a threshold it chose).
    groups: as in `halves`.
    """
    scores, member = checked(scores, member)
    side = None if threshold is not None else calibration_split(member, seed, groups=groups).astype(np.uint16)

    def row(m):
        limit = threshold
        if side is not None:
            limit = best_thresholds(scores[m], member[m], side[m], 2)[1 - side[m]]
        right = (scores[m] > limit) == member[m]
        return (ratio_influence_values(right, member[m]) + ratio_influence_values(right, ~member[m])) / 2

    return np.stack(parallel(row, range(len(scores))))


def tpr_influence_values(scores, member, fpr) -> tuple[np.ndarray, np.ndarray]:
    """Cells [M, N] of the TPR at a false positive rate, and of the FPR realised, as an attacker gets them.

    The threshold comes from other models: the pairs are split in two folds, the threshold that
    flags at most a share `fpr` of all non-member scores of one fold is applied to the other, and vice versa.
    The TPR's cells carry the threshold's own sampling error (Hsieh & Turnbull 1996; Pepe 2003, section 5.2);
    those of the realised FPR take the two thresholds as given.
    Raises ValueError with fewer than three models (one pair): no other model is left to learn from.
    """
    scores, member = checked(scores, member)
    if len(scores) < 3:
        raise ValueError(f"scores: {len(scores)} models; valid are at least 3 (two folds of pairs)")
    if not 0 < fpr < 1:
        raise ValueError(f"fpr: {fpr}; valid are rates between 0 and 1")
    tpr, realised = np.empty(scores.shape), np.empty(scores.shape)
    both = folds(member)
    nulls = parallel(lambda fold: np.sort(scores[fold][~member[fold]]), both)

    def fill(here, there):
        limit, given = (_limit(nulls[fold], fpr) for fold in (there, here))  # used here, given to the others
        share = np.mean(nulls[here] > given)
        slope = _roc_slope(scores[both[there]], member[both[there]], nulls[here], fpr)
        weight = slope * len(both[there]) * scores.shape[1] / len(nulls[here])

        def row(m):
            # TPR(t estimated) - TPR(t) = -dTPR/dFPR (share of the non-members above t - fpr)
            excess = np.where(member[m], 0.0, (scores[m] > given) - share)
            tpr[m] = ratio_influence_values(scores[m] > limit, member[m]) - weight * excess
            realised[m] = ratio_influence_values(scores[m] > limit, ~member[m])

        parallel(row, both[here])

    fill(0, 1)
    fill(1, 0)
    return tpr, realised


def tpr_cells_within(scores, member, fpr, seed=0, groups=None) -> tuple[np.ndarray, np.ndarray]:
    """As `tpr_influence_values`, for an auditor who knows some non-members of the target itself: one model is enough.

    The threshold comes from a random half of the target's non-members and is applied to the other half of the
    examples, and vice versa. groups: as in `halves`.
    """
    scores, member = checked(scores, member)
    side, tpr, realised = calibration_split(member, seed, groups=groups), np.empty(scores.shape), np.empty(scores.shape)

    def row(m):
        s, inside, half = scores[m], member[m], side[m].astype(int)
        limits = np.array([_limit(np.sort(s[~inside & (half == h)]), fpr) for h in (0, 1)])
        above, slope = s > limits[half], _roc_slope(s, inside, np.sort(s[~inside]), fpr)
        # TPR(t estimated) - TPR(t) = -dTPR/dFPR (share of the non-members above t - fpr)
        excess = ratio_influence_values(above, ~inside) - above[~inside].mean()
        tpr[m] = ratio_influence_values(s > limits[1 - half], inside) - slope * excess
        realised[m] = ratio_influence_values(s > limits[1 - half], ~inside)

    parallel(row, range(len(scores)))
    return tpr, realised


def folds(member):
    """Two folds of models that keep partners together."""
    fold = np.unique(pairs(member), return_inverse=True)[1] % 2
    return [np.flatnonzero(fold == k) for k in (0, 1)]


def _limit(null, fpr):
    """The smallest score that at most a share fpr of the sorted null scores exceed."""
    return null[max(len(null) - 1 - int(fpr * len(null)), 0)]


def _roc_slope(scores, member, null, fpr):
    """dTPR/dFPR at fpr: the ROC's rise between half and one and a half times fpr."""
    low, high = 0.5 * fpr, min(1.5 * fpr, 1.0)
    inside = scores[member]
    rise = np.mean(inside > _limit(null, high)) - np.mean(inside > _limit(null, low))
    return rise / (high - low)


# ---- thresholds ------------------------------------------------------------------------------------------


def calibration_split(member, seed=0, y=None, groups=None) -> np.ndarray:
    """A random half [M, N] bool of every target's members and non-members (within classes, given y [N]).

    groups [N] (a patient's two eyes) stay together, each in the place of its first example. Raises ValueError where
    they are so few that a half is left without members or non-members.
    """
    if groups is not None:
        if np.shape(groups) != member.shape[1:]:
            raise ValueError(f"groups: shape {np.shape(groups)}; valid is [N] = {member.shape[1:]}")
        first, own = np.unique(groups, return_index=True, return_inverse=True)[1:]
        half = calibration_split(member[:, first], seed, None if y is None else np.asarray(y)[first])[:, own]
        if not all((half & kind).any(1).all() and (~half & kind).any(1).all() for kind in (member, ~member)):
            raise ValueError(f"groups: {len(first)} are too few for halves that have members and non-members each")
        return half
    n = member.shape[1]
    order = np.random.default_rng(seed).permutation(n)
    if y is not None:
        order = order[np.argsort(np.asarray(y)[order], kind="stable")]
    out = np.empty(member.shape, bool)

    def fill(m):  # along a random order, every other member and every other non-member
        inside = member[m, order]
        out[m, order] = np.where(inside, np.cumsum(inside), np.cumsum(~inside)) % 2 == 0

    parallel(fill, range(len(member)))
    return out


def best_thresholds(s, member, group, n_groups) -> np.ndarray:
    """Per group the threshold t of best balanced accuracy for the decision s > t: [n_groups] float64.

    s, member, group (uint16): [N], one target's. NaN for a group without members or without non-members.
    t lies midway between two neighbouring scores, or at the largest score if it is best to flag none.
    """
    order = np.argsort(s)
    order = order[np.argsort(group[order], kind="stable")]  # by group, then by score; radix sort on uint16
    s, kind = s[order], (2 * group + member)[order]
    n = np.bincount(kind, minlength=2 * n_groups).reshape(n_groups, 2)  # non-members, members
    # TPR - FPR of a threshold just above position k = sum_{j <= k} 1{out}/n_out - 1{in}/n_in
    gain = np.cumsum((np.array([1, -1]) / np.maximum(n, 1)).ravel()[kind])
    gain[np.flatnonzero(s[1:] == s[:-1])] = -np.inf  # never between ties
    ends, best = np.cumsum(n.sum(1)), np.full(n_groups, np.nan)
    for g in np.flatnonzero((n > 0).all(1)):
        start, last = ends[g] - n[g].sum(), ends[g] - 1
        gain[last] = 0.0  # flags none
        k = start + gain[start : ends[g]].argmax()
        best[g] = s[k] if k == last else (float(s[k]) + float(s[k + 1])) / 2
    return best


def partners(member) -> np.ndarray | None:
    """For each model the one that trained on exactly the other examples: [M] indices; None if any has no such partner.

    member: [M, N] bool; partners may stand in any order.
    """
    found, waiting = np.full(len(member), -1), {}  # waiting: a complement looked for -> the models that look for it
    for k, row in enumerate(member):
        if waiting.get(row.tobytes()):
            found[k] = waiting[row.tobytes()].pop()
            found[found[k]] = k
        else:
            waiting.setdefault((~row).tobytes(), []).append(k)
    return None if (found < 0).any() else found


def pairs(member) -> np.ndarray:
    """Which models belong together, [M] integers: partners, or else (2k, 2k+1)."""
    found, own = partners(member), np.arange(len(member))
    return own // 2 if found is None else np.minimum(own, found)


# ---- tables ----------------------------------------------------------------------------------------------


def table(scores, member, fprs=FPRS, threshold=None, seed=0, level=0.95, **how) -> pd.DataFrame:
    """All metrics of one attack for each optimizer, and the paired differences from the first: a tidy frame.

    scores: dict optimizer -> [M, N], of ensembles that trained on the same halves, member [M, N]. Columns optimizer,
    baseline, metric, value, ci_low, ci_high, as in `paired`. Metrics: auc, balanced_accuracy, advantage
    (= TPR - FPR), tpr@<fpr> and realised_fpr@<fpr>. An FPR is reported only where each fold expects at least ten
    false positives at it. `threshold`: as in balanced_accuracy_influence_values (0.0 for the attacks in attacks.FIXED).
    how: columns and examples_only, as in `estimate`; with examples_only and one or two models, the thresholds at
    an FPR come from half of the target's own non-members (tpr_cells_within), since no other model gives any. What is
    together in columns stays so in the halves on which thresholds are learned.
    """
    clusters, frames = pairs(checked(next(iter(scores.values())), member)[1]), []
    alone, learned = how.get("examples_only", False) and len(member) < 3, {"seed": seed, "groups": how.get("columns")}
    for metric, influence_values in _all_influence_values(scores, member, fprs, threshold, alone, learned):
        correction = 0.0 if "@" in metric else SHADOW_CORRECTION
        frame = paired(
            influence_values, metric, True, clusters=clusters, level=level, shadow_correction=correction, **how
        )
        frames.append(frame)
        if metric == "balanced_accuracy":
            # advantage = TPR - FPR = 2 balanced accuracy - 1; in a difference the 1 cancels
            doubled = (2 * frame[["value", "ci_low", "ci_high"]]).sub(frame.baseline == "", axis=0)
            frames.append(frame.assign(metric="advantage", **doubled))
    return pd.concat(frames, ignore_index=True)


def evaluate(scores, member, **how) -> pd.DataFrame:
    """`table` of one ensemble's scores [M, N], without optimizer and baseline. how: the arguments of `table`."""
    return table({"": scores}, member, **how).drop(columns=["optimizer", "baseline"])


def compare(scores_a, scores_b, member, **how) -> pd.DataFrame:
    """The paired differences b minus a of `table`, without optimizer and baseline."""
    frame = table({"a": scores_a, "b": scores_b}, member, **how)
    return frame[frame.baseline == "a"].drop(columns=["optimizer", "baseline"]).reset_index(drop=True)


def _all_influence_values(scores, member, fprs, threshold, alone, learned):
    """(metric, dict optimizer -> cells) one by one, so that only one metric's cells are in memory at a time."""
    yield "auc", {name: auc_influence_values(s, member) for name, s in scores.items()}
    yield (
        "balanced_accuracy",
        {k: balanced_accuracy_influence_values(s, member, threshold, **learned) for k, s in scores.items()},
    )
    for fpr in reportable(member, fprs, alone):
        at_rate = partial(tpr_cells_within, **learned) if alone else tpr_influence_values
        both = {name: at_rate(s, member, fpr) for name, s in scores.items()}
        yield f"tpr@{fpr}", {name: tpr for name, (tpr, _) in both.items()}
        yield f"realised_fpr@{fpr}", {name: realised for name, (_, realised) in both.items()}


def reportable(member, fprs=FPRS, within=False) -> list[float]:
    """The rates at which each fold of models expects ten false positives or more; none with one pair.

    within: each half of every model's examples instead, as in tpr_cells_within.
    """
    member = np.asarray(member)
    counts = (~member).sum(1) // 2 if within else [int((~member[f]).sum()) for f in folds(member)]
    return [fpr for fpr in fprs if min(counts) * fpr >= 10]


def roc(scores, member, grid) -> np.ndarray:
    """The ROC curve of all targets pooled, for plotting: TPR at every FPR in grid, same shape as grid."""
    scores, member = checked(scores, member)
    null, inside = np.sort(scores[~member]), np.sort(scores[member])
    limits = np.array([_limit(null, fpr) for fpr in np.ravel(grid)])
    flagged = len(inside) - np.searchsorted(inside, limits, side="right")
    return (flagged / len(inside)).reshape(np.shape(grid))


def checked(scores, member) -> tuple[np.ndarray, np.ndarray]:
    """scores [M, N] and member [M, N] as arrays, or a ValueError that says what is wrong."""
    scores, member = np.asarray(scores), np.asarray(member)
    if scores.ndim != 2 or scores.shape != member.shape:
        raise ValueError(f"scores: shape {scores.shape}; valid is the shape of member [M, N], {member.shape}")
    if member.dtype != bool:
        raise ValueError(f"member: dtype {member.dtype}; valid is bool")
    inside, n = member.sum(1), member.shape[1]
    for m in np.flatnonzero((inside == 0) | (inside == n)):
        raise ValueError(f"member: row {m} has {inside[m]} members of {n}; valid are both")
    if np.isnan(scores).any():
        m, i = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"scores: NaN at model {m}, example {i}; valid are numbers")
    return scores, member

"""From paired ensembles to tidy frames: every metric with its interval, every difference paired.

`ensembles` is a dict label -> Ensemble, the baseline first. All of them share halves, initial weights and batch orders.
A metric is first written as influence values [M, N] or [M, T], whose mean is the metric (lib.attacks.intervals).
Frames have the columns optimizer, baseline, metric, value, ci_low and ci_high. The baseline is "" for an optimizer's
own value, and the first label for a paired difference from it.
"""

from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.interpolate import PchipInterpolator
from scipy.special import expit, logit
from tqdm import tqdm

from lib import need
from lib.attacks import catalogue, intervals, label_only, thresholds
from lib.attacks.intervals import SHADOW_CORRECTION, Estimate, estimate, ratio_influence_values
from lib.attacks.signals import signals
from lib.data.dataset import inputs
from lib.training.ensemble import KEEP_WEIGHTS

PLANTED = 16  # models of the planted leak in every run: 8 pairs, and it takes 6 for the interval to exclude chance


def keep_common_models(ensembles, essential=None):
    """The ensembles restricted to the models that finished in all of them, so that every comparison stays paired.

    While fewer than half of the models (or fewer than 8) are common, the ensemble with the fewest models is left out,
    and its label printed. Labels in `essential` (default: all) stay. ValueError if fewer than 8 models are common.
    """
    kept, enough = dict(ensembles), max(8, max(len(e.ids) for e in ensembles.values()) / 2)
    spare = [label for label in ensembles if essential is not None and label not in essential]
    spare.sort(key=lambda label: len(ensembles[label].ids))
    while len(common := common_ids(kept.values())) < enough and spare:
        print(f"left out, because too many of its models diverged: {spare[0]}")
        del kept[spare.pop(0)]
    what = f"n_models: only {len(common)} models finished under all of {', '.join(map(str, kept))}"
    need(len(common) >= 8, f"{what}; valid are 8 or more: lower lr or rho, or train more models")
    return {label: e.only(common) for label, e in kept.items()}


def on_the_same(*groups):
    """Each group, a dict label -> Ensemble, restricted to the models that all groups share, if these are 8 or more.

    LiRA gets stronger with more shadow models, so AUCs compare only between ensembles of the same models.
    """
    common = common_ids([e for group in groups for e in group.values()])
    return groups if len(common) < 8 else tuple({k: e.only(common) for k, e in group.items()} for group in groups)


def common_ids(ensembles):
    """The models that finished in all of a list of ensembles, in order."""
    return sorted(set.intersection(*(set(e.ids.tolist()) for e in ensembles)))


def kept(ensemble, key, make):
    """The array make(), kept with the ensemble while it is small: notebooks ask for the same arrays again and again."""
    made = vars(ensemble).setdefault("made", {})
    found = made[key] if key in made else make()
    if found.size <= 2**20:
        found.flags.writeable = False
        made[key] = found
    return found


def signal(ensemble, name, test=False):
    """A signal (lib.attacks.signals) of the plain input: [M, N] on the pool, [M, T] on the test part."""
    logits, y = (ensemble.test_logits, ensemble.dataset.y_test) if test else (ensemble.logits, ensemble.dataset.y)
    return kept(ensemble, (name, test), lambda: signals(logits[:, 0], y, only=(name,))[name])


def hits_on_test(ensemble):
    """Influence values of the test accuracy: which test points each model gets right, [M, T] float."""
    return signal(ensemble, "correct", test=True).astype(float)


def balanced_on_test(ensemble):
    """Influence values [M, T] of the balanced accuracy B on the test part, as (B - 1/C) / (1 - 1/C).

    B is the mean of the accuracies in the C classes of the test part. 0: a model that says the same class of all, or
    guesses; 1: always right (scikit-learn's balanced_accuracy_score with adjusted=True).
    """
    hits, (names, y) = hits_on_test(ensemble), np.unique(ensemble.dataset.y_test, return_inverse=True)
    counts, n_classes = np.bincount(y), max(len(names), 2)  # of a single class there is nothing to balance
    by_class = hits @ np.eye(len(names))[y] / counts  # [M, C]
    # B + T / (C n_c) (hit - accuracy in its class c), a mean over classes of ratios of means
    values = by_class.mean(1, keepdims=True) + len(y) / (len(names) * counts[y]) * (hits - by_class[:, y])
    return (values - 1 / n_classes) / (1 - 1 / n_classes)


def on_pool(ensemble, name, members=True):
    """Influence values [M, N] of the mean of a signal over each model's members, or over its non-members."""
    return ratio_influence_values(signal(ensemble, name).astype(float), np.array(ensemble.member) == members)


def train_losses(ensemble):
    """Influence values [M, N] of the train loss (nats)."""
    return -on_pool(ensemble, "log_confidence")


def headline_scores(ensemble):
    """Scores of the headline attacks, over all queries: dict attack -> [M, N]. The ensemble keeps them."""
    if "headline_scores" not in vars(ensemble):
        vars(ensemble)["headline_scores"] = scores(ensemble, only=catalogue.HEADLINES)
    return vars(ensemble)["headline_scores"]


def auc_influence_values(ensemble, attack="lira_shrunk"):
    """Influence values [M, N] of the AUC of a headline attack."""
    scores, member = headline_scores(ensemble)[attack], np.array(ensemble.member)
    return kept(ensemble, attack, lambda: intervals.auc_influence_values(scores, member))


def auc_estimate(values, dataset, level=0.95):
    """Estimate of a difference of AUCs from its influence values [M, N]."""
    return estimate(values, level=level, shadow_correction=SHADOW_CORRECTION, columns=dataset.groups)


def variance_influence_values(ensemble, name, kind, members=False):
    """Influence values [M, N] of the variance of one signal, in one of the meanings of `variances`."""
    values, chosen = signal(ensemble, name).astype(float), np.array(ensemble.member) == members
    y = ensemble.dataset.y if kind == "within_class" else np.zeros(values.shape[1], int)

    def total(x):
        return x.sum(0, keepdims=True) if kind == "across_models" else (x @ np.eye(y.max() + 1)[y])[:, y]

    n = total(chosen.astype(float))
    centre = total(np.where(chosen, values, 0.0)) / np.maximum(n, 1)
    # s^2 = sum (x - mean)^2 / (n - 1), written as the mean over the chosen of (x - mean)^2 n / (n - 1)
    return ratio_influence_values((values - centre) ** 2 * n / np.maximum(n - 1, 1), chosen)


def compared(ensembles, values_of, metric, rate=False, shadow_correction=0.0, test=False, log_ratio_from=None):
    """One metric of every ensemble, and its paired differences from the first: a tidy frame.

    values_of: Ensemble -> influence values, [M, N] on the pool or [M, T] with `test`. rate, shadow_correction and
    log_ratio_from: as in intervals.paired.
    """
    first, values = next(iter(ensembles.values())), {label: values_of(e) for label, e in ensembles.items()}
    how = design(first, test) | {"shadow_correction": shadow_correction}
    return intervals.paired(values, metric, rate, log_ratio_from, **how)


def design(ensemble, test=False):
    """What `intervals.estimate` needs to know. One or two models, as in an audit, say nothing about other models."""
    member, data = np.array(ensemble.member), ensemble.dataset
    columns = data.groups_test if test else data.groups
    return {"clusters": intervals.pairs(member), "columns": columns, "examples_only": len(member) < 3}


def accuracies(ensembles):
    """Test accuracy, also balanced; accuracy and loss on the training half; accuracy in minus out: a tidy frame."""
    frames = []
    if next(iter(ensembles.values())).test_logits is not None:  # an audit may have no test part
        frames.append(compared(ensembles, hits_on_test, "test_accuracy", rate=True, test=True))
        frames.append(compared(ensembles, balanced_on_test, "balanced_accuracy_above_chance", test=True))
    frames.append(compared(ensembles, lambda e: on_pool(e, "correct"), "train_accuracy", rate=True))
    frames.append(compared(ensembles, train_losses, "train_loss"))
    gap = compared(ensembles, lambda e: on_pool(e, "correct") - on_pool(e, "correct", False), "generalization_gap")
    return pd.concat([*frames, gap], ignore_index=True)


def contrast(ensembles):
    """`accuracies`, and of every headline attack the AUC and, where reportable, TPR and FPR at 1% FPR: a tidy frame.

    Columns beside the usual ones: attack, and train_loss, the optimizer's own, NaN beside differences.
    """
    first, frames = next(iter(ensembles.values())), [accuracies(ensembles).assign(attack="")]
    member = np.array(first.member)
    for attack in catalogue.HEADLINES:
        auc = compared(ensembles, partial(auc_influence_values, attack=attack), "auc", True, SHADOW_CORRECTION)
        found = {label: headline_scores(e)[attack] for label, e in ensembles.items()}
        frames += [f.assign(attack=attack) for f in (auc, *intervals.at_rates(found, member, (0.01,), **design(first)))]
    frame = pd.concat(frames, ignore_index=True)
    own = frame[(frame.metric == "train_loss") & (frame.baseline == "")]
    loss = frame.optimizer.map(dict(zip(own.optimizer, own.value, strict=True)))
    return frame.assign(train_loss=loss.where(frame.baseline == ""))


def variances(ensembles, kinds=("across_examples", "across_models"), members=False):
    """Variance of phi and of p_y on non-members (or on members), and log ratios, in each of its meanings: a tidy frame.

    across_examples: of one model's outputs over examples (as in the paper's theorem); within_class: the same within
    each class, weighted by size; across_models: of one example's outputs over models (LiRA's denominator).
    """
    who, frames = "member" if members else "nonmember", []
    for name in ("phi", "confidence"):
        for kind in kinds:
            values_of = partial(variance_influence_values, name=name, kind=kind, members=members)
            frames.append(compared(ensembles, values_of, f"{who}_variance_{name}_{kind}", log_ratio_from=0.0))
    return pd.concat(frames, ignore_index=True)


def scores(ensemble, member=None, only=catalogue.NAMES):
    """Every attack (or those in `only`) on every model: dict attack -> [M, N]. member: another, for the null control.

    An audit with fewer than three models with or without an example has no LiRA and RMIA.
    """
    member = np.array(ensemble.member if member is None else member)
    data, n_in = ensemble.dataset, member.sum(0)
    if min(n_in.min(), len(member) - n_in.max()) < 3:
        only = catalogue.ALONE
    population = ensemble.test_logits, data.y_test
    return catalogue.run(ensemble.logits, data.y, member, *population, groups=data.groups, only=only)


def leakage(ensembles, scored, fixed=catalogue.FIXED, rows=slice(None)):
    """Every metric of every attack: a tidy frame with the column attack.

    scored: dict optimizer -> dict attack -> scores [M, N]. fixed: the attacks whose own decision is score > 0. rows:
    the examples of the pool that the scores are about, if not all.
    """
    first, frames = next(iter(ensembles.values())), []
    member, groups = np.array(first.member)[:, rows], first.dataset.groups
    for attack in tqdm(next(iter(scored.values())), "scoring", delay=2, leave=False):
        how = design(first) | {"threshold": 0.0 if attack in fixed else None, "log_ratios": len(scored) > 1}
        how["columns"] = None if groups is None else groups[rows]
        found = {label: scored[label][attack] for label in ensembles}
        frames.append(intervals.table(found, member, **how).assign(attack=attack))
    return pd.concat(frames, ignore_index=True)


def exposure_table(ensembles, scored, ids=None, attack="lira_shrunk", top=10):
    """Who is exposed, and are the same examples exposed under other seeds? A tidy frame.

    An example's exposure is its mean score (in nats, a log likelihood ratio) over the models that trained on it minus
    the mean over those that did not; with a few models a share of models told rightly would take a few values only. The
    rows `exposure` have the `top` highest, with Welch's interval over models, and the example's number (from `ids` [N])
    as coordinate; being the highest of many they are high in part by chance. Each half of the pairs of models also
    names, by itself, the 1% most exposed of the examples that three of its models or more have, and three have not.
    exposed_in_both_halves is the share of one half's names that are also the other's, with the interval of Clopper and
    Pearson; by chance it would be exposed_by_chance. It is given for 1,000 such examples or more.
    scored: dict optimizer -> dict attack -> scores [M, N].
    """
    first, rows = next(iter(ensembles.values())), []
    member, y, ids = np.array(first.member), first.dataset.y, np.arange(len(first.dataset.y)) if ids is None else ids
    halves = intervals.folds(member)
    seen = np.array([[member[half].sum(0), (~member[half]).sum(0)] for half in halves])
    known = np.flatnonzero((seen >= 3).all((0, 1)))
    n_top = len(known) // 100

    def exposure(scores, inside):
        return np.mean(scores, 0, where=inside) - np.mean(scores, 0, where=~inside)

    for label, e in ensembles.items():
        about, found = dict(optimizer=label, baseline="", attack=attack), scored[label][attack].astype(float)
        value = exposure(found, member)
        for i in np.argsort(-value)[:top]:
            within, without = (found[side, i] for side in (member[:, i], ~member[:, i]))
            spread = stats.ttest_ind(within, without, equal_var=False).confidence_interval()
            about["coordinate"] = f"example={ids[i]}"
            rows.append(intervals.row("exposure", Estimate(value[i], *spread), **about))
        if n_top < 10:
            continue
        named = []
        for half in halves:
            population = None if e.test_logits is None else e.test_logits[half]
            given = e.logits[half][:, :, known], y[known], member[half][:, known], population, first.dataset.y_test
            found = catalogue.run(*given, only=(attack,))[attack]
            named.append(np.argsort(-exposure(found, member[half][:, known]))[:n_top])
        both = intervals.proportion(len(np.intersect1d(*named)), n_top)
        chance = Estimate(n_top / len(known), np.nan, np.nan)
        for metric, estimated in (("exposed_in_both_halves", both), ("exposed_by_chance", chance)):
            rows.append(intervals.row(metric, estimated, **about | {"coordinate": ""}))
    return pd.DataFrame(rows)


def null_table(ensemble, seed, shuffles=5):
    """AUC of every attack on shuffled membership, averaged over shuffles: a frame as `leakage`'s, without optimizer.

    Without a fault it is 0.5 (catalogue.null_member).
    """
    values = {}
    for shuffle in range(shuffles):
        member = catalogue.null_member(np.array(ensemble.member), [seed, shuffle], ensemble.dataset.groups)
        for attack, found in scores(ensemble, member).items():
            values[attack] = values.get(attack, 0.0) + intervals.auc_influence_values(found, member) / shuffles
    how = {"rate": True, "shadow_correction": SHADOW_CORRECTION, **design(ensemble)}
    rows = [intervals.row("auc", estimate(v, **how), attack=attack, baseline="") for attack, v in values.items()]
    return pd.DataFrame(rows)


def planted_table(scored, member, place, n_pairs=PLANTED // 2):
    """In what share of pairs of partners (2k, 2k+1) an attack scores the one that saw an example higher: a tidy frame.

    scored: dict attack -> scores [M, N]; place: the example's column. The first n_pairs pairs count in which one model
    saw it and the other did not; a tie counts half. Columns beside the usual ones: attack, n_models.
    """
    seen, rows = member[:, place].reshape(-1, 2), []
    pairs = np.flatnonzero(seen[:, 0] != seen[:, 1])[:n_pairs]
    signs = np.where(seen[pairs], 1, -1)
    for attack, found in scored.items() if len(pairs) else ():
        ahead = (signs * found[:, place].reshape(-1, 2)[pairs]).sum(1)
        hits = (1 + np.sign(ahead)).sum() / 2
        rows.append(intervals.row("planted_pairs_found", intervals.proportion(hits, len(pairs)), attack=attack))
    frame = pd.DataFrame(rows, columns=["attack", "metric", "value", "ci_low", "ci_high"])
    return frame.assign(baseline="", n_models=2 * len(pairs))


def label_only_table(ensembles, n_models=16, device="cpu", n_examples=None):
    """Every metric of the attacks that see predicted labels only, on models whose weights are kept: a tidy frame.

    label_only, label_only_classwise (with a threshold for each class) and label_once, which asks for the unchanged
    example only. null_auc: label_only's AUC on shuffled membership. At most n_examples of the pool, drawn at random,
    are asked about. Columns n_models and n_examples: how many were.
    """
    ids = models_with_weights(ensembles.values(), n_models)
    asked, scored, nulls = {label: e.only(ids) for label, e in ensembles.items()}, {}, []
    first = next(iter(asked.values()))
    n, data = first.dataset.y.size, first.dataset
    # the seed is not 0, from which the first model's half is drawn
    rows = np.sort(np.random.default_rng(231000488).permutation(n)[: n_examples or n])
    member, y, groups = (
        np.array(first.member)[:, rows],
        data.y[rows],
        None if data.groups is None else data.groups[rows],
    )
    half = intervals.calibration_split(member, 0, y, groups)
    shuffled = [catalogue.null_member(member, seed, groups) for seed in range(5)]
    for label, e in asked.items():
        answers = label_answers(e, device, rows)
        found = label_only.scores(answers, member)
        by_class = thresholds.classwise(found, member, y, part=half)
        once = signal(e, "correct")[:, rows]
        scored[label] = {"label_only": found, "label_only_classwise": by_class, "label_once": once}
        values = [intervals.auc_influence_values(label_only.scores(answers, alleged), alleged) for alleged in shuffled]
        null = intervals.paired({label: np.mean(values, axis=0)}, "null_auc", True, columns=groups)
        nulls.append(null.assign(attack="label_only"))
    table = leakage(asked, scored, ("label_only_classwise", "label_once"), rows)
    return pd.concat([table, *nulls], ignore_index=True).assign(n_models=len(ids), n_examples=len(rows))


def label_only_of_one(ensemble, place, n_models=16, device="cpu"):
    """Label-only scores [m, 1] of the example in column `place`, and the ids [m] of the models asked.

    Images are asked about alone, with shifts of one pixel. For tables the noise is chosen on the whole pool.
    """
    ids = models_with_weights([ensemble], n_models)
    asked = ensemble.only(ids)
    if ensemble.dataset.is_image:
        return label_answers(asked, device, [place], most=1)[-1], ids
    return label_only.scores(label_answers(asked, device), np.array(asked.member))[:, [place]], ids


def models_with_weights(ensembles, n_models=16):
    """The first n_models models, in whole pairs, whose weights are kept in all of the ensembles: ids [8 or more]."""
    there = common_ids(ensembles)
    ids = [k for k in range(KEEP_WEIGHTS) if k in there and k ^ 1 in there][: n_models // 2 * 2]
    need(len(ids) >= 8, f"n_models={n_models}: only {len(ids)} models finished and kept their weights; 8 are needed")
    return np.array(ids)


def label_answers(ensemble, device="cpu", rows=slice(None), most=None):
    """label_only.answers [S, M, n] of the ensemble's models (ids < KEEP_WEIGHTS) about the pool's examples `rows`."""
    predict, dataset = [], ensemble.dataset
    for k in ensemble.ids:
        # the fastest layout for convolutions
        net = ensemble.weights(k)[0].to(device, memory_format=torch.channels_last)
        predict.append(lambda batch, net=net: net(batch).argmax(-1))
    x = inputs(dataset)[0][rows]
    return label_only.answers(predict, x, dataset.y[rows], dataset.is_image, most=most, device=device)


def split_labels(frame, column):
    """A frame whose labels are pairs (optimizer, x), with the optimizer's x in a column of its own."""
    names, x = zip(*frame.optimizer, strict=True)
    return frame.assign(optimizer=names, baseline=[b[0] if b else "" for b in frame.baseline], **{column: x})


def radius_table(radius_sweep, treatment, baseline, table=contrast):
    """`table` at every radius, with the paired differences from radius 0: a tidy frame with the column rho.

    radius_sweep: dict rho -> Ensemble, 0.0 first, which is the baseline.
    """
    return split_labels(table({(treatment if rho else baseline, rho): e for rho, e in radius_sweep.items()}), "rho")


def read_off(x, nodes, aucs, scale, slope):
    """The AUC B(x) read off a curve: influence values of its AUCs [M, N], mean B(x), and of its coordinates, mean 0.

    x, nodes: influence values [M, .] of the coordinates of the place and of the curve's k runs, rising; aucs: those of
    the runs' AUCs [M, N]. scale: what the coordinate is interpolated in, and slope its derivative.
    """
    k, at, a = len(nodes), [v.mean() for v in (x, *nodes)], np.clip([v.mean() for v in aucs], 1e-9, 1 - 1e-9)
    point = np.array([*map(scale, at), *logit(a)])

    def logit_auc(point):
        """The monotone cubic interpolant (PCHIP; Fritsch & Carlson 1980): always between the two neighbouring runs."""
        return PchipInterpolator(point[1 : k + 1], point[k + 1 :])(point[0])

    step = 1e-4 * np.diff(point[1 : k + 1]).min()
    slopes = [(logit_auc(point + d) - logit_auc(point - d)) / (2 * step) for d in step * np.eye(len(point))]
    b = expit(logit_auc(point))
    # dB = B (1 - B) (sum_j P'_j dA_j / (A_j (1 - A_j))  +  sum of P' u'(x) dx over the place and the nodes)
    of_aucs = sum(p * (v - m) / (m * (1 - m)) for p, v, m in zip(slopes[k + 1 :], aucs, a, strict=True))
    moves = zip(slopes[: k + 1], at, (x, *nodes), strict=True)
    return b + b * (1 - b) * of_aucs, b * (1 - b) * sum(p * slope(m) * (v - m) for p, m, v in moves)


def decomposition(treated, curve, own, treatment, baseline, name="train_loss", coordinate=None):
    """A difference in AUC = what comes from fitting more or less + what remains at equal train loss: a tidy frame.

    treated: the treatment's ensemble; own: the baseline's that it is compared with (at equal epochs, say). curve: dict
    -> Ensemble, the baseline's runs along one path (epochs, or learning rate). All hold the same models. name: the
    coordinate, train_loss or test_accuracy; x is the treated ensemble's, B(x) the AUC on the baseline's curve there,
    monotone: of its logit over the log of the train loss (or over the accuracy). For every headline attack

        auc_total = A(treated) - A(own),   auc_from_fit = B(x) - A(own),   auc_at_equal_loss = A(treated) - B(x)

    (auc_at_equal_accuracy for test_accuracy). The intervals hold the errors of all AUCs and coordinates, x too, as they
    fall together in each model and example (delta method), but not the curve's shape between two runs. Without two runs
    that enclose x and differ by more than noise, only auc_total is given. Columns beside the usual ones: attack,
    coordinate (default: x and between), the name's, which is x, and between (the coordinates of the two). Raises
    ValueError for other models.
    """
    values_of, test, scale, slope, what, digits = {
        "train_loss": (train_losses, False, np.log, np.reciprocal, "loss", ".3g"),
        "test_accuracy": (hits_on_test, True, float, np.ones_like, "accuracy", ".4f"),
    }[name]
    same = len({tuple(e.ids) for e in (treated, own, *curve.values())}) == 1
    need(same, "curve, length_sweep: the ensembles hold different models; keep_common_models first")
    runs = sorted(((values_of(e), e) for e in curve.values()), key=lambda run: run[0].mean())
    x, at, nodes, between = values_of(treated), [values.mean() for values, _ in runs], [], ""
    apart = [estimate(b[0] - a[0], **design(treated, test)).low > 0 for a, b in pairwise(runs)]
    right = int(np.searchsorted(at, x.mean()))
    if 0 < right < len(runs) and apart[right - 1]:  # beyond these two, the next on either side gives the curve's slope
        first, last = (right > 1 and apart[right - 2]), (right + 1 < len(runs) and apart[right])
        nodes = runs[right - 1 - first : right + 1 + last]
        between = f"{at[right - 1]:{digits}} and {at[right]:{digits}}"
    how, data, n = design(treated) | {"shadow_correction": SHADOW_CORRECTION}, treated.dataset, treated.member.shape[1]
    if test and not (data.groups is None and data.groups_test is None):
        one, two = (np.arange(k) if g is None else g for k, g in ((n, data.groups), (x.shape[1], data.groups_test)))
        how["columns"] = np.append(one, n + two)  # no group of the pool is one of the test part
    coordinate = f"{name}={x.mean():{digits}}, between={between}" if coordinate is None else coordinate
    rows, about = [], {"optimizer": treatment, "baseline": baseline, "coordinate": coordinate, name: x.mean()}
    for attack in catalogue.HEADLINES:
        whole, before = (auc_influence_values(e, attack) for e in (treated, own))
        parts = {"auc_total": (whole - before, 0 * x)}  # metric -> influence values of its AUCs, and of its coordinates
        if nodes:
            aucs = [auc_influence_values(e, attack) for _, e in nodes]
            read, moved = read_off(x, [values for values, _ in nodes], aucs, scale, slope)
            parts |= {"auc_from_fit": (read - before, moved), f"auc_at_equal_{what}": (whole - read, -moved)}
        for metric, (of_aucs, of_coordinates) in parts.items():
            if test:  # the sum of two means is a mean over N + T columns
                t, value = x.shape[1], of_aucs.mean()
                values = value + np.hstack([(of_aucs - value) * (n + t) / n, of_coordinates * (n + t) / t])
            else:
                values = of_aucs + of_coordinates
            rows.append(intervals.row(metric, estimate(values, **how), attack=attack, between=between, **about))
    return pd.DataFrame(rows, columns=[*intervals.TIDY, "attack", "coordinate", name, "between"])


def at_equal(name, length_sweep, treatment, baseline):
    """AUC, treatment minus baseline, at every train_loss or test_accuracy (the name) that the treatment reached: tidy.

    length_sweep: dict (epochs, optimizer) -> Ensemble, all of the same models. For every headline attack it is what
    remains in `decomposition`; nothing is said where the baseline's runs do not enclose the treatment's. Columns beside
    the usual ones: attack, epochs (the treatment's), coordinate, the name's, and between.
    """
    curve = {epochs: e for (epochs, optimizer), e in length_sweep.items() if optimizer == baseline}
    frames = [
        decomposition(e, curve, next(iter(curve.values())), treatment, baseline, name).assign(epochs=epochs)
        for (epochs, optimizer), e in length_sweep.items()
        if optimizer == treatment
    ]
    frame = pd.concat(frames)
    return frame[frame.metric.str.startswith("auc_at_equal")].assign(metric="auc").reset_index(drop=True)

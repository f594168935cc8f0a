"""From paired ensembles to tidy frames: every metric with its interval, every difference paired.

`ensembles` is a dict label -> Ensemble, the baseline first. All of them share halves, initial weights and batch orders.
Influence values, [M, N] or [M, T], and the frames' columns are those of lib.attacks.intervals."""

from collections import defaultdict
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.interpolate import PchipInterpolator
from scipy.special import expit, logit
from tqdm import tqdm

from lib import need
from lib.analysis.memorization import memorization
from lib.attacks import catalogue, intervals, label_only, thresholds
from lib.attacks.intervals import SHADOW_CORRECTION, Estimate, estimate, ratio_influence_values
from lib.attacks.membership import calibration_split, folds
from lib.attacks.signals import signals
from lib.data.dataset import inputs
from lib.training.ensemble import KEEP_WEIGHTS


def keep_common_models(ensembles, essential=None):
    """The ensembles restricted to the models that finished in all of them, so that every comparison stays paired.

    While fewer than half of the models (or fewer than 8) are common, the ensemble with the fewest models is left out,
    and its label printed. Labels in `essential` (default: all) stay. ValueError if fewer than 8 models are common."""
    kept, enough = dict(ensembles), max(8, max(len(e.ids) for e in ensembles.values()) / 2)
    spare = [label for label in ensembles if essential is not None and label not in essential]
    spare.sort(key=lambda label: len(ensembles[label].ids))
    while len(common := common_ids(kept.values())) < enough and spare:
        print(f"left out, because too many of its models diverged: {spare[0]}")
        del kept[spare.pop(0)]
    what = f"n_models: only {len(common)} models finished under all of {', '.join(map(str, kept))}"
    need(len(common) >= 8, f"{what}; valid are 8 or more: lower lr or rho, or train more models")
    return {label: e.only(common) for label, e in kept.items()}


def common_ids(ensembles):
    """The models that finished in all of a list of ensembles, in order."""
    return sorted(set.intersection(*(set(e.ids.tolist()) for e in ensembles)))


def kept(ensemble, key, make):
    """What make() gives, kept with the ensemble unless it is a large array: notebooks ask for the same again."""
    made = vars(ensemble).setdefault("made", {})
    found = made[key] if key in made else make()
    if getattr(found, "size", 0) <= 2**20:
        made[key] = found
    return found


def signal(ensemble, name, test=False):
    """A signal (lib.attacks.signals) of the plain input: [M, N] on the pool, [M, T] on the test part."""
    logits, y = (ensemble.test_logits, ensemble.dataset.y_test) if test else (ensemble.logits, ensemble.dataset.y)
    if name == "correct":  # a fifth of the time that all signals take
        return kept(ensemble, (name, test), lambda: np.stack([z.argmax(-1) == y for z in logits[:, 0]]))
    return kept(ensemble, (name, test), lambda: signals(logits[:, 0], y, only=(name,))[name])


def hits_on_test(ensemble):
    """Influence values of the test accuracy: which test points each model gets right, [M, T] float."""
    return signal(ensemble, "correct", test=True).astype(float)


def balanced_on_test(ensemble):
    """Influence values [M, T] of (B - 1/C) / (1 - 1/C), B being the mean of the accuracies in the C classes of the test
    part (scikit-learn's balanced_accuracy_score with adjusted=True): 0 is a model that guesses, 1 is always right."""
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
    """Scores of the headline attacks, over all queries: dict attack -> [M, N]."""
    return kept(ensemble, "headlines", lambda: scores(ensemble, only=catalogue.HEADLINES))


def auc_influence_values(ensemble, attack="lira_shrunk"):
    """Influence values [M, N] of the AUC of a headline attack."""
    found, member = headline_scores(ensemble)[attack], np.array(ensemble.member)
    return kept(ensemble, attack, lambda: intervals.auc_influence_values(found, member))


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


def compared(ensembles, values_of, metric, test=False, **how):
    """intervals.paired of every ensemble's values_of(ensemble): influence values, [M, N], or [M, T] with `test`."""
    values = {label: values_of(e) for label, e in ensembles.items()}
    return intervals.paired(values, metric, **design(next(iter(ensembles.values())), test), **how)


def tempered(ensemble, temperature):
    """The ensemble as served with its logits divided by a temperature, which changes no prediction."""
    served = {n: getattr(ensemble, n) / np.float32(temperature) for n in ("logits", "test_logits")}
    return SimpleNamespace(**served, member=ensemble.member, dataset=ensemble.dataset, ids=ensemble.ids)


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

    Columns beside the usual ones: attack, and train_loss, the optimizer's own, NaN beside differences."""
    first, frames = next(iter(ensembles.values())), [accuracies(ensembles).assign(attack="")]
    member, corrected = np.array(first.member), {"rate": True, "shadow_correction": SHADOW_CORRECTION}
    for attack in catalogue.HEADLINES:
        auc = compared(ensembles, partial(auc_influence_values, attack=attack), "auc", **corrected)
        found = {label: headline_scores(e)[attack] for label, e in ensembles.items()}
        frames += [f.assign(attack=attack) for f in (auc, *intervals.at_rates(found, member, (0.01,), **design(first)))]
    frame = pd.concat(frames, ignore_index=True)
    own = frame[(frame.metric == "train_loss") & (frame.baseline == "")]
    loss = frame.optimizer.map(dict(zip(own.optimizer, own.value, strict=True)))
    return frame.assign(train_loss=loss.where(frame.baseline == ""))


def variances(ensembles, kinds=("across_examples", "across_models"), members=False):
    """Variance of phi and of p_y on non-members (or on members), and log ratios, in each of its meanings: a tidy frame.

    across_examples: of one model's outputs over examples (as in the paper's theorem); within_class: the same in each
    class; across_models: of one example's outputs over models (LiRA's denominator)."""
    frames = []
    for name, kind in product(("phi", "confidence"), kinds):
        values_of = partial(variance_influence_values, name=name, kind=kind, members=members)
        metric = f"{'member' if members else 'nonmember'}_variance_{name}_{kind}"
        frames.append(compared(ensembles, values_of, metric, log_ratio_from=0.0))
    return pd.concat(frames, ignore_index=True)


def scores(ensemble, member=None, only=catalogue.NAMES):
    """Every attack (or `only` those) on every model: dict attack -> [M, N]. member: another, for the null control."""
    member = np.array(ensemble.member if member is None else member)
    data, n_in = ensemble.dataset, member.sum(0)
    if min(n_in.min(), len(member) - n_in.max()) < 3:  # too few for LiRA and RMIA
        only = catalogue.ALONE
    population = ensemble.test_logits, data.y_test
    return catalogue.run(ensemble.logits, data.y, member, *population, groups=data.groups, only=only)


def leakage(ensembles, scored):
    """Every metric of every attack, from dict optimizer -> dict attack -> scores [M, N]: tidy, with a column attack."""
    first, frames = next(iter(ensembles.values())), []
    how = {**design(first), "log_ratios": len(scored) > 1}
    for attack in tqdm(next(iter(scored.values())), "scoring", delay=2, leave=False):
        threshold, found = 0.0 if attack in catalogue.FIXED else None, {k: scored[k][attack] for k in ensembles}
        frames.append(intervals.table(found, np.array(first.member), threshold=threshold, **how).assign(attack=attack))
    return pd.concat(frames, ignore_index=True)


def exposure_table(ensembles, scored, ids=None):
    """Who is exposed, and are the same examples exposed under other seeds? A tidy frame.

    An example's exposure is its mean score by lira_shrunk over the models that trained on it minus the mean over those
    that did not. The rows `exposure` have the ten highest, with Welch's interval over models, and the example's number
    (from `ids` [N]) as coordinate. exposed_in_both_halves: each half of the pairs of models names the 1% most exposed
    of the (at least 1,000) examples that, in both halves, three models or more trained on and three or more did not;
    the value is the share that both halves name."""
    first, rows, attack = next(iter(ensembles.values())), [], "lira_shrunk"
    member, data, ids = np.array(first.member), first.dataset, np.arange(len(first.dataset.y)) if ids is None else ids
    halves = folds(member)
    seen = np.array([[member[half].sum(0), (~member[half]).sum(0)] for half in halves])
    known = np.flatnonzero((seen >= 3).all((0, 1)))
    n_top = len(known) // 100
    for label, e in ensembles.items():
        about, found = dict(optimizer=label, baseline="", attack=attack), scored[label][attack].astype(float)
        exposure = memorization(found, member).value
        top = np.argsort(-exposure)[:10]
        sides = (np.where(side[:, top], found[:, top], np.nan) for side in (member, ~member))
        welch = stats.ttest_ind(*sides, equal_var=False, nan_policy="omit").confidence_interval()
        for i, low, high in zip(top, *welch, strict=True):
            estimated = Estimate(exposure[i], low, high)
            rows.append(intervals.row("exposure", estimated, coordinate=f"example={ids[i]}", **about))
        if n_top < 10:
            continue
        named = []
        for half in halves:
            population = None if e.test_logits is None else e.test_logits[half]
            given = e.logits[half][:, :, known], data.y[known], member[half][:, known], population, data.y_test
            found = catalogue.run(*given, only=(attack,))[attack]
            named.append(np.argsort(-memorization(found, given[2]).value)[:n_top])
        both = intervals.proportion(len(np.intersect1d(*named)), n_top)
        chance = Estimate(n_top / len(known), np.nan, np.nan)
        for metric, estimated in (("exposed_in_both_halves", both), ("exposed_by_chance", chance)):
            rows.append(intervals.row(metric, estimated, coordinate="", **about))
    return pd.DataFrame(rows)


def null_table(ensemble, seed, shuffles=5):
    """AUC of every attack on shuffled membership (catalogue.null_member), averaged over shuffles; 0.5 is right."""
    values = {}
    for shuffle in range(shuffles):
        member = catalogue.null_member(np.array(ensemble.member), [seed, shuffle], ensemble.dataset.groups)
        for attack, found in scores(ensemble, member).items():
            values[attack] = values.get(attack, 0.0) + intervals.auc_influence_values(found, member) / shuffles
    how = {"rate": True, "shadow_correction": SHADOW_CORRECTION, **design(ensemble)}
    return pd.DataFrame([intervals.row("auc", estimate(v, **how), attack=a, baseline="") for a, v in values.items()])


def label_only_table(ensembles, n_models=16, device="cpu", n_examples=None):
    """Every metric of the attacks that see predicted labels only, on models whose weights are kept: a tidy frame.

    label_once asks for the unchanged example only; null_auc is label_only's AUC on shuffled membership. The first
    n_models models, in whole pairs, are asked about n_examples of the pool, drawn at random: columns of the frame."""
    there = common_ids(ensembles.values())
    ids = [k for k in range(KEEP_WEIGHTS) if k in there and k ^ 1 in there][: n_models // 2 * 2]
    need(len(ids) >= 8, f"n_models={n_models}: only {len(ids)} models finished and kept their weights; 8 are needed")
    asked, frames, nulls = {label: e.only(ids) for label, e in ensembles.items()}, [], {}
    first = next(iter(asked.values()))
    data, n = first.dataset, len(first.dataset.y)
    # the seed is not 0, from which the first model's half is drawn
    rows = np.sort(np.random.default_rng(231000488).permutation(n)[: n_examples or n])
    x, y, member = inputs(data)[0][rows], data.y[rows], np.array(first.member)[:, rows]
    groups = None if data.groups is None else data.groups[rows]
    half = calibration_split(member, 0, y, groups)
    shuffled = [catalogue.null_member(member, seed, groups) for seed in range(5)]
    scored = {"label_only": {}, "label_only_classwise": {}, "label_once": {}}  # attack -> optimizer -> [M, rows]
    for label, e in asked.items():
        # channels last: the fastest layout for convolutions
        nets = [e.weights(k)[0].to(device, memory_format=torch.channels_last) for k in ids]
        predict = [lambda batch, net=net: net(batch).argmax(-1) for net in nets]
        answers = label_only.answers(predict, x, y, data.is_image, device=device)
        scored["label_only"][label] = found = label_only.scores(answers, member)
        scored["label_only_classwise"][label] = thresholds.classwise(found, member, y, part=half)
        scored["label_once"][label] = signal(e, "correct")[:, rows]
        values = [intervals.auc_influence_values(label_only.scores(answers, alleged), alleged) for alleged in shuffled]
        nulls[label] = np.mean(values, axis=0)
    for attack, found in scored.items():
        how = {"threshold": None if attack == "label_only" else 0.0, "log_ratios": len(asked) > 1, "columns": groups}
        frames.append(intervals.table(found, member, **how).assign(attack=attack))
    null = intervals.paired(nulls, "null_auc", True, columns=groups).query("baseline == ''")
    frames.append(null.assign(attack="label_only"))
    return pd.concat(frames, ignore_index=True).assign(n_models=len(ids), n_examples=len(rows))


def split_labels(frame, column):
    """A frame whose labels are pairs (optimizer, x), with the optimizer's x in a column of its own."""
    x = {column: frame.optimizer.str[1]}
    return frame.assign(**x, optimizer=frame.optimizer.str[0], baseline=frame.baseline.str[0].fillna(""))


def read_off(x, nodes, aucs, scale, slope):
    """The AUC B(x) read off a curve: influence values of its AUCs [M, N], mean B(x), and of its coordinates, mean 0.

    x, nodes: influence values [M, .] of the coordinates of the place and of the curve's k runs, rising; aucs: those of
    the runs' AUCs [M, N]. scale: what the coordinate is interpolated in, and slope its derivative."""
    k, at, a = len(nodes), [v.mean() for v in (x, *nodes)], np.clip([v.mean() for v in aucs], 1e-9, 1 - 1e-9)
    point = np.array([*map(scale, at), *logit(a)])

    def logit_auc(point):  # monotone and cubic, so always between the two neighbouring runs (Fritsch & Carlson 1980)
        return PchipInterpolator(point[1 : k + 1], point[k + 1 :])(point[0])

    step = 1e-4 * np.diff(point[1 : k + 1]).min()
    slopes = [(logit_auc(point + d) - logit_auc(point - d)) / (2 * step) for d in step * np.eye(len(point))]
    b = expit(logit_auc(point))
    # dB = B (1 - B) (sum_j P'_j dA_j / (A_j (1 - A_j))  +  sum of P' u'(x) dx over the place and the nodes)
    of_aucs = sum(p * (v - m) / (m * (1 - m)) for p, v, m in zip(slopes[k + 1 :], aucs, a, strict=True))
    moves = zip(slopes[: k + 1], at, (x, *nodes), strict=True)
    return b + b * (1 - b) * of_aucs, b * (1 - b) * sum(p * slope(m) * (v - m) for p, m, v in moves)


def decomposition(treated, curve, own, treatment, baseline, name="train_loss", coordinate=""):
    """A difference in AUC = what comes from fitting more or less + what remains at equal train loss: a tidy frame.

    treated: the treatment's ensemble, or a list: all numbers are means over those for which there is a B(x). own: the
    baseline's that it is compared with (at equal epochs, say). curve: dict -> Ensemble, the baseline's runs along one
    path (epochs, or learning rate). All hold the same models. x is the treated ensemble's train loss, and B(x) the AUC
    on the baseline's curve there: monotone, of its logit over the log of the loss. For every headline attack

        auc_total = A(treated) - A(own),   auc_from_fit = B(x) - A(own),   auc_at_equal_loss = A(treated) - B(x)

    With the name test_accuracy, x is the accuracy, and the last is auc_at_equal_accuracy. The intervals hold the errors
    of all AUCs and coordinates, x too (delta method), but not the curve's shape between two runs. Without two runs that
    enclose x and differ by more than noise, only auc_total is given. Further columns: attack, coordinate, and x."""
    test = name == "test_accuracy"
    values_of, scale, slope = (hits_on_test, float, np.ones_like) if test else (train_losses, np.log, np.reciprocal)
    treated = treated if isinstance(treated, list) else [treated]
    same = len({tuple(e.ids) for e in (*treated, own, *curve.values())}) == 1
    need(same, "curve: the ensembles hold different models; keep_common_models first")
    runs, placed = sorted(((values_of(e), e) for e in curve.values()), key=lambda run: run[0].mean()), []
    apart = [estimate(b[0] - a[0], **design(own, test)).low > 0 for a, b in pairwise(runs)]
    for e, x in zip(treated, map(values_of, treated), strict=True):
        k, nodes = int(np.searchsorted([values.mean() for values, _ in runs], x.mean())), []
        if 0 < k < len(runs) and apart[k - 1]:  # beyond these two, the next on either side gives the curve's slope
            first, last = (k > 1 and apart[k - 2]), (k + 1 < len(runs) and apart[k])
            nodes = runs[k - 1 - first : k + 1 + last]
        placed.append((e, x, nodes))
    placed = [each for each in placed if each[2]] or placed
    how, data, n, t = design(own), own.dataset, own.member.shape[1], placed[0][1].shape[1]
    if test:  # the columns are the pool's and then the test part's, and no group of the one is a group of the other
        one, two = (np.arange(k) if g is None else g for k, g in ((n, data.groups), (t, data.groups_test)))
        how["columns"] = np.append(one, n + two)
    at = np.mean([x.mean() for _, x, _ in placed])
    rows, about = [], {"optimizer": treatment, "baseline": baseline, "coordinate": coordinate, name: at}
    for attack in catalogue.HEADLINES:
        parts = defaultdict(list)  # metric -> of each treated: influence values of its AUCs, and of its coordinates
        for e, x, nodes in placed:
            whole, before = (auc_influence_values(of, attack) for of in (e, own))
            parts["auc_total"].append((whole - before, 0 * x))
            if nodes:
                aucs = [auc_influence_values(of, attack) for _, of in nodes]
                read, moved = read_off(x, [values for values, _ in nodes], aucs, scale, slope)
                parts["auc_from_fit"].append((read - before, moved))
                parts[f"auc_at_equal_{name.split('_')[1]}"].append((whole - read, -moved))
        for metric, found in parts.items():
            of_aucs, of_coordinates = (sum(values) / len(found) for values in zip(*found, strict=True))
            value = of_aucs.mean()  # the sum of two means is a mean over N + T columns
            both = (of_aucs - value) * (n + t) / n, of_coordinates * (n + t) / t
            values = value + np.hstack(both) if test else of_aucs + of_coordinates
            found = estimate(values, shadow_correction=SHADOW_CORRECTION, **how)
            rows.append(intervals.row(metric, found, attack=attack, **about))
    return pd.DataFrame(rows)

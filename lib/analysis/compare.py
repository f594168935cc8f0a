"""From paired ensembles to tidy frames: every metric with its interval, every difference paired.

`ensembles` is a dict label -> Ensemble, the baseline first. All of them share halves, initial weights and batch orders.
A metric is first written as influence values [M, N] or [M, T], whose mean is the metric (lib.attacks.intervals).
Frames have the columns optimizer, baseline, metric, value, ci_low and ci_high. The baseline is "" for an optimizer's
own value, and the first label for a paired difference from it.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib.attacks import catalogue, intervals, label_only, shadow, thresholds
from lib.attacks.intervals import Estimate, estimate, ratio_influence_values
from lib.attacks.membership import calibration_split
from lib.attacks.signals import signals
from lib.data.dataset import inputs
from lib.training.ensemble import KEEP_WEIGHTS

PLANTED = 16  # models of the planted leak in every run: 8 pairs, and it takes 6 for the interval to exclude chance


def keep_common_models(ensembles, essential=None):
    """The ensembles restricted to the models that finished in all of them, so that every comparison stays paired.

    While fewer than half of the models (or fewer than 8) are common, the ensemble with the fewest models is left out,
    and its label printed. Labels in `essential` (default: all) stay. ValueError if fewer than 8 models are common.
    """
    kept, lost = dict(ensembles), []
    enough = max(8, max(len(e.ids) for e in ensembles.values()) / 2)
    spare = [label for label in ensembles if essential is not None and label not in essential]
    spare.sort(key=lambda label: len(ensembles[label].ids))
    while len(common := common_ids(kept.values())) < enough and spare:
        lost.append(spare.pop(0))
        del kept[lost[-1]]
    if lost:
        print(f"left out, because too many of their models diverged: {lost}")
    if len(common) < 8:
        raise ValueError(
            f"n_models: only {len(common)} models finished under all of {', '.join(map(str, kept))}; valid are 8 or "
            "more: lower lr or rho, or train more models"
        )
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


# ---- one metric of one ensemble, as influence values --------------------------------------------------------


def signal(ensemble, name, test=False):
    """A signal (lib.attacks.signals) of the plain input: [M, N] on the pool, [M, T] on the test part."""
    logits, y = (ensemble.test_logits, ensemble.dataset.y_test) if test else (ensemble.logits, ensemble.dataset.y)
    return signals(logits[:, 0], y, only=(name,))[name]


def hits_on_test(ensemble):
    """Influence values of the test accuracy: which test points each model gets right, [M, T] float."""
    return signal(ensemble, "correct", test=True).astype(float)


def on_pool(ensemble, name, members=True):
    """Influence values [M, N] of the mean of a signal over each model's members, or over its non-members."""
    return ratio_influence_values(signal(ensemble, name).astype(float), np.array(ensemble.member) == members)


def train_losses(ensemble):
    """Influence values [M, N] of the train loss (nats)."""
    return -on_pool(ensemble, "log_confidence")


def lira_scores(ensemble):
    """Scores [M, N] of LiRA: online, a variance for each example, over all queries."""
    phi = signals(ensemble.logits, ensemble.dataset.y, only=("phi",))["phi"]
    return shadow.lira(phi, np.array(ensemble.member))


def lira_influence_values(ensemble):
    """Influence values [M, N] of the AUC of LiRA."""
    return intervals.auc_influence_values(lira_scores(ensemble), np.array(ensemble.member))


def auc_estimate(values, dataset, level=0.95):
    """Estimate of a difference of LiRA's AUCs from its influence values [M, N]."""
    return estimate(values, level=level, shadow_correction=intervals.SHADOW_CORRECTION, columns=dataset.groups)


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


# ---- tables -------------------------------------------------------------------------------------------------


def compared(ensembles, values_of, metric, rate=False, shadow_correction=0.0, test=False):
    """One metric of every ensemble, and its paired differences from the first: a tidy frame.

    values_of: Ensemble -> influence values, [M, N] on the pool or [M, T] with `test`. rate: the metric is a
    probability. shadow_correction: as in intervals.estimate. Examples of one group (a patient's eyes) count as one.
    """
    first, values = next(iter(ensembles.values())), {label: values_of(e) for label, e in ensembles.items()}
    return intervals.paired(values, metric, rate, shadow_correction=shadow_correction, **design(first, test))


def design(ensemble, test=False):
    """What `intervals.estimate` needs to know: which models and which examples belong together, and if both vary.

    One or two models, as in an audit, say nothing about others: the interval is then about new examples only.
    """
    member, data = np.array(ensemble.member), ensemble.dataset
    columns = data.groups_test if test else data.groups
    return {"clusters": intervals.pairs(member), "columns": columns, "examples_only": len(member) < 3}


def paired_t(values, metric):
    """Mean of independent values [n] of every label, and paired differences from the first: a tidy frame (Student)."""
    first, *others = values
    found = {(label, ""): v for label, v in values.items()}
    found |= {(label, first): values[label] - values[first] for label in others}
    rows = [intervals.row(metric, intervals.t_interval(v), optimizer=k, baseline=b) for (k, b), v in found.items()]
    return pd.DataFrame(rows, columns=intervals.TIDY)


def accuracies(ensembles):
    """Test accuracy, accuracy and loss on the training half, and accuracy in minus accuracy out: a tidy frame.

    Without a test part (an audit may have none), there is no test accuracy.
    """

    def gap(e):
        return on_pool(e, "correct") - on_pool(e, "correct", members=False)

    frames = [
        compared(ensembles, lambda e: on_pool(e, "correct"), "train_accuracy", rate=True),
        compared(ensembles, train_losses, "train_loss"),
        compared(ensembles, gap, "generalization_gap"),
    ]
    if next(iter(ensembles.values())).test_logits is not None:
        frames.insert(0, compared(ensembles, hits_on_test, "test_accuracy", rate=True, test=True))
    return pd.concat(frames, ignore_index=True)


def contrast(ensembles):
    """`accuracies` and LiRA's AUC: a tidy frame. Column train_loss: the optimizer's own, NaN beside differences."""
    auc = compared(ensembles, lira_influence_values, "auc", True, intervals.SHADOW_CORRECTION).assign(attack="lira")
    frame = pd.concat([accuracies(ensembles), auc], ignore_index=True)
    own = frame[(frame.metric == "train_loss") & (frame.baseline == "")]
    loss = dict(zip(own.optimizer, own.value, strict=True))
    labels = frame[["optimizer", "baseline"]].itertuples(index=False)
    return frame.assign(train_loss=[np.nan if baseline else loss[optimizer] for optimizer, baseline in labels])


def variances(ensembles, kinds=("across_examples", "across_models"), members=False):
    """Variance of phi and of p_y on non-members (or on members), in each of its meanings: a tidy frame.

    across_examples: of one model's outputs over the examples that it did not see (as in the paper's theorem);
    within_class: the same within each class, with the classes weighted by their size;
    across_models: of one example's outputs over the models that did not see it (LiRA's denominator).
    """
    who, frames = "member" if members else "nonmember", []
    for name in ("phi", "confidence"):
        for kind in kinds:
            values_of = partial(variance_influence_values, name=name, kind=kind, members=members)
            frames.append(compared(ensembles, values_of, f"{who}_variance_{name}_{kind}"))
    return pd.concat(frames, ignore_index=True)


def ratio(values, reference):
    """Ratio of the means of two matrices of influence values [M, N], as an Estimate (delta method, paired)."""
    found, below = values.mean() / reference.mean(), reference.mean()
    # A/B about (a, b):  a/b + (A - (a/b) B) / b
    return estimate(found + (values - found * reference) / below)


def extremes(ensembles):
    """Share of the non-members with p_y > 0.99, and with phi above the median of the model's members: a tidy frame."""

    def certain(e):
        return ratio_influence_values(signal(e, "confidence") > 0.99, ~np.array(e.member))

    def above_median(e):
        phi, member = signal(e, "phi"), np.array(e.member)
        median = np.nanmedian(np.where(member, phi, np.nan), axis=1, keepdims=True)
        return ratio_influence_values(phi > median, ~member)

    kinds = {"nonmember_share_above_0.99": certain, "nonmember_share_above_member_median": above_median}
    return pd.concat([compared(ensembles, of, metric, rate=True) for metric, of in kinds.items()], ignore_index=True)


# ---- attacks ------------------------------------------------------------------------------------------------


def scores(ensemble, member=None):
    """Every attack on every model: dict attack -> [M, N]. member: another membership, for the null control.

    LiRA and RMIA need three models with and three without each example. An audit of fewer has the other attacks only.
    """
    member = np.array(ensemble.member if member is None else member)
    data, n_in = ensemble.dataset, member.sum(0)
    if min(n_in.min(), len(member) - n_in.max()) < 3:
        found = catalogue.single(ensemble.logits[:, 0], data.y, member, groups=data.groups)
        return {name: found[name] for name in catalogue.NAMES if name in found}
    return catalogue.run(ensemble.logits, data.y, member, ensemble.test_logits, data.y_test, groups=data.groups)


def leakage(ensembles, scored):
    """Every metric of every attack: a tidy frame with the column attack.

    scored: dict optimizer -> dict attack -> scores [M, N].
    """
    first, frames = next(iter(ensembles.values())), []
    member, how = np.array(first.member), design(first)
    for attack in tqdm(next(iter(scored.values())), "scoring", delay=2, leave=False):
        threshold = 0.0 if attack in catalogue.FIXED else None
        found = {label: scored[label][attack] for label in ensembles}
        frames.append(intervals.table(found, member, threshold=threshold, **how).assign(attack=attack))
    return pd.concat(frames, ignore_index=True)


def null_table(ensemble, seed, shuffles=5):
    """AUC of every attack on shuffled membership (catalogue.null_member), averaged over shuffles: a tidy frame.

    Without a fault it is 0.5. The frame has no column optimizer.
    """
    values = {}
    for shuffle in range(shuffles):
        member = catalogue.null_member(np.array(ensemble.member), [seed, shuffle], ensemble.dataset.groups)
        for attack, found in scores(ensemble, member).items():
            values[attack] = values.get(attack, 0.0) + intervals.auc_influence_values(found, member) / shuffles
    how = {"rate": True, "shadow_correction": intervals.SHADOW_CORRECTION, **design(ensemble)}
    rows = [intervals.row("auc", estimate(v, **how), attack=attack, baseline="") for attack, v in values.items()]
    return pd.DataFrame(rows)


def planted_table(scored, member, place, n_pairs=PLANTED // 2):
    """In what share of pairs an attack finds which of two partners trained on an example: a tidy frame.

    scored: dict attack -> scores [M, N]; partners are the models (2k, 2k+1); place: the example's column. The first
    n_pairs pairs count in which one model saw the example and the other did not. An attack finds a pair if the model
    that saw it has the higher score; a tie counts half. Columns beside the usual ones: attack, n_models.
    """
    seen = member[:, place].reshape(-1, 2)
    pairs, rows = np.flatnonzero(seen[:, 0] != seen[:, 1])[:n_pairs], []
    for attack, found in scored.items() if len(pairs) else ():
        own = found[:, place].reshape(-1, 2)[pairs]
        inside, outside = own[seen[pairs]], own[~seen[pairs]]
        hits = (inside > outside).sum() + (inside == outside).sum() / 2
        rows.append(intervals.row("planted_pairs_found", intervals.proportion(hits, len(pairs)), attack=attack))
    frame = pd.DataFrame(rows, columns=["attack", "metric", "value", "ci_low", "ci_high"])
    return frame.assign(baseline="", n_models=2 * len(pairs))


# ---- labels only --------------------------------------------------------------------------------------------


def label_only_table(ensembles, n_models=16, device="cpu"):
    """Every metric of the attacks that see predicted labels only, on models whose weights are kept: a tidy frame.

    label_only (lib.attacks.label_only), label_only_classwise (with a threshold for each class) and label_once, which
    asks for the unchanged example only and is the attack `gap`. null_auc is label_only's AUC on shuffled membership.
    Column n_models: how many models were asked. ValueError: see `models_with_weights`.
    """
    first, ids = next(iter(ensembles.values())), models_with_weights(ensembles.values(), n_models)
    member, y, groups = np.array(first.only(ids).member), first.dataset.y, first.dataset.groups
    answered = {label: label_answers(e, ids, device) for label, e in ensembles.items()}
    scored = {label: label_only.scores(a, member) for label, a in answered.items()}
    half = calibration_split(member, 0, y, groups)
    by_class = {label: thresholds.classwise(s, member, y, half=half) for label, s in scored.items()}
    once = {label: signal(e.only(ids), "correct") for label, e in ensembles.items()}
    kinds = (("label_only", scored, None), ("label_only_classwise", by_class, 0.0), ("label_once", once, 0.0))
    frames = [intervals.table(s, member, threshold=t, columns=groups).assign(attack=attack) for attack, s, t in kinds]
    shuffled = [catalogue.null_member(member, seed, groups) for seed in range(5)]
    for label, a in answered.items():
        values = [intervals.auc_influence_values(label_only.scores(a, alleged), alleged) for alleged in shuffled]
        null = intervals.paired({label: np.mean(values, axis=0)}, "null_auc", True, columns=groups)
        frames.append(null.assign(attack="label_only"))
    return pd.concat(frames, ignore_index=True).assign(n_models=len(ids))


def label_only_of_one(ensemble, place, n_models=16, device="cpu"):
    """Label-only scores [m, 1] of the example in column `place`, and the ids [m] of the models asked.

    Images are asked about this example alone, with shifts of one pixel (the authors' smallest). For tables the
    strength of the noise is chosen on the whole pool.
    """
    ids = models_with_weights([ensemble], n_models)
    if ensemble.dataset.is_image:
        return label_answers(ensemble, ids, device, [place], most=1)[-1], ids
    member = np.array(ensemble.only(ids).member)
    return label_only.scores(label_answers(ensemble, ids, device), member)[:, [place]], ids


def models_with_weights(ensembles, n_models=16):
    """The first n_models models, in whole pairs, whose weights are kept in all of the ensembles: ids [m].

    Raises ValueError if n_models is not an even number from 8, or fewer than 8 are left.
    """
    if n_models % 2 or n_models < 8:
        raise ValueError(f"n_models={n_models!r} is not valid: it must be an even number from 8")
    there = common_ids(ensembles)
    ids = [k for k in range(KEEP_WEIGHTS) if k in there and k ^ 1 in there][:n_models]
    if len(ids) < 8:
        raise ValueError(f"n_models: only {len(ids)} models finished and kept their weights; 8 are needed")
    return np.array(ids)


def label_answers(ensemble, ids, device="cpu", rows=slice(None), most=None):
    """label_only.answers [S, m, n] of the models `ids` about the pool's examples `rows`."""
    predict, dataset = [], ensemble.dataset
    for k in ids:
        net, params, buffers = ensemble.weights(k)
        net.load_state_dict(params | buffers)
        net = net.to(device, memory_format=torch.channels_last).eval()  # the fastest layout for convolutions
        predict.append(lambda batch, net=net: net(batch).argmax(-1))
    x = inputs(dataset)[0][rows]
    return label_only.answers(predict, x, dataset.y[rows], dataset.is_image, most=most, device=device)


# ---- along a sweep ------------------------------------------------------------------------------------------


def split_labels(frame, column):
    """A frame whose labels are pairs (optimizer, x), with x in a column of its own.

    Beside a difference stands the x of the optimizer, not of the baseline.
    """
    names, x = zip(*frame.optimizer, strict=True)
    return frame.assign(optimizer=names, baseline=[b[0] if b else "" for b in frame.baseline], **{column: x})


def radius_table(radius_sweep, treatment, baseline, table=contrast):
    """`table` at every radius, with the paired differences from radius 0: a tidy frame with the column rho.

    radius_sweep: dict rho -> Ensemble, 0.0 first, which is the baseline.
    """
    return split_labels(table({(treatment if rho else baseline, rho): e for rho, e in radius_sweep.items()}), "rho")


def length_table(length_sweep):
    """`contrast` at every number of epochs: a tidy frame with the columns epochs and coordinate.

    length_sweep: dict (epochs, optimizer) -> Ensemble, where the baseline precedes the other at each number of epochs.
    """
    frames = []
    for epochs in tqdm(sorted({e for e, _ in length_sweep}), "lengths", delay=2, leave=False):
        here = {name: e for (length, name), e in length_sweep.items() if length == epochs}
        frames.append(contrast(here).assign(epochs=epochs, coordinate=f"epochs={epochs}"))
    return pd.concat(frames, ignore_index=True)


def at_equal_loss(length_sweep, treatment, baseline):
    """Difference in LiRA's AUC at equal train loss (interpolated in log loss): a tidy frame, see `at_equal`."""
    return at_equal(length_sweep, treatment, baseline, "train_loss", train_losses, np.log, np.exp, "{:.3g}")


def at_equal_accuracy(length_sweep, treatment, baseline):
    """Difference in LiRA's AUC at equal test accuracy: a tidy frame, see `at_equal`."""
    return at_equal(length_sweep, treatment, baseline, "test_accuracy", hits_on_test, float, float, "{:.4f}")


def at_equal(length_sweep, treatment, baseline, name, values_of, scale, back, digits):
    """LiRA's AUC, treatment minus baseline, at every train loss (or test accuracy) that the treatment reached.

    length_sweep: dict (epochs, optimizer) -> Ensemble, all of the same models. values_of: Ensemble -> influence values
    of the coordinate `name`; scale, back: to the scale of the interpolation, and back. digits: a format.

    The baseline's AUC is interpolated between its two neighbouring runs by several `curves`. The value is the mean of
    the differences from them, and the interval spans the 95% intervals of all. The coordinate is taken as known: so
    nothing is said where no two runs enclose it, or where those that do differ by no more than noise.
    Columns beside the usual ones: epochs (of the treatment), coordinate, its value, and between (the baseline's two).
    """
    if len({tuple(e.ids.tolist()) for e in length_sweep.values()}) > 1:
        raise ValueError("length_sweep: the ensembles hold different models; apply keep_common_models first")
    points, rows = [], []
    for (_, optimizer), e in length_sweep.items():
        if optimizer == baseline:
            values = values_of(e)
            points.append((scale(values.mean()), values, lira_influence_values(e).astype(np.float32)))
    places, values, aucs = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    for (epochs, optimizer), e in length_sweep.items():
        if optimizer != treatment:
            continue
        place, data = scale(values_of(e).mean()), e.dataset
        right = int(np.searchsorted(places, place))
        if not 0 < right < len(places):
            continue
        groups = data.groups_test if name == "test_accuracy" else data.groups
        apart = estimate(values[right] - values[right - 1], columns=groups)
        if apart.low <= 0 <= apart.high:
            continue
        own = lira_influence_values(e)
        interpolated = [sum(w * aucs[k] for k, w in weights.items()) for weights in curves(places, place, right)]
        found = [auc_estimate(own - auc, data) for auc in interpolated]
        hull = Estimate(np.mean([f.value for f in found]), min(f.low for f in found), max(f.high for f in found))
        at, *ends = (digits.format(back(x)) for x in (place, places[right - 1], places[right]))
        between = " and ".join(ends)
        about = dict(optimizer=treatment, baseline=baseline, attack="lira", epochs=epochs, between=between)
        coordinate = f"{name}={at}, between={between}"
        rows.append(intervals.row("auc", hull, coordinate=coordinate, **{name: back(place)}, **about))
    return pd.DataFrame(rows, columns=[*intervals.TIDY, "attack", "epochs", "coordinate", name, "between"])


def curves(places, at, right):
    """Interpolation weights at `at`, between the runs right - 1 and right of the rising `places`: dicts run -> weight.

    There is the straight line through the two runs, and the parabola through them and the next run on either side, if
    there is one. How far they differ shows how much the bend between the two runs leaves open.
    """
    ends = [right - 1, right]
    sets = [ends, *([*ends, k] for k in (right - 2, right + 1) if 0 <= k < len(places))]
    # Lagrange: w_k = prod_{j != k} (at - x_j) / (x_k - x_j)
    return [
        {k: float(np.prod([(at - places[j]) / (places[k] - places[j]) for j in nodes if j != k])) for k in nodes}
        for nodes in sets
    ]

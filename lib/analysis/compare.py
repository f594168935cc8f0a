"""From paired ensembles to the study's tables: every number with its interval, every difference paired.

`ensembles` is a dict optimizer -> Ensemble; the first is the baseline. All share halves, weights and orders.
"""

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib.attacks import catalogue, intervals, label_only, shadow, thresholds
from lib.attacks.intervals import row
from lib.attacks.signals import signals
from lib.data.dataset import inputs
from lib.training.ensemble import KEEP_WEIGHTS

PLANTED = 16  # models of the planted leak, whatever the run's: 8 pairs, of which 6 are the least that can show it


def keep_common_models(ensembles, essential=None):
    """The ensembles on the models that finished in all of them, so that every comparison stays paired.

    While fewer than half of the models (or 8) are common, the key with the fewest is dropped, and said, unless it is
    in `essential` (default: all are). ValueError if fewer than 8 models are left in common.
    """
    kept, lost = dict(ensembles), []
    enough = max(8, max(len(e.ids) for e in ensembles.values()) / 2)
    while len(common := common_ids(kept)) < enough:
        fewest = min((k for k in kept if essential is not None and k not in essential),
                     key=lambda k: len(kept[k].ids), default=None)  # fmt: skip
        if fewest is None:
            break
        lost.append(fewest)
        del kept[fewest]
    if lost:
        print(f"left out, since too many of their models diverged: {lost}")
    if len(common) < 8:
        raise ValueError(
            f"n_models: only {len(common)} models finished under all of {', '.join(map(str, kept))}; 8 are needed: "
            "lower lr or rho, or train more models"
        )
    return {name: e.only(common) for name, e in kept.items()}


def common_ids(ensembles):
    """The models that finished in all of them, in order."""
    return sorted(set.intersection(*(set(e.ids.tolist()) for e in ensembles.values())))


def scores(ensemble, member=None):
    """Every attack on every model: dict attack -> [M, N]. member: another membership, for the null control."""
    return catalogue.run(
        ensemble.logits,
        ensemble.dataset.y,
        np.array(ensemble.member if member is None else member),
        ensemble.test_logits,
        ensemble.dataset.y_test,
        groups=ensemble.dataset.groups,
    )


def leakage(ensembles, scored):
    """Metrics of every attack, for each optimizer and for each difference from the baseline: a tidy frame.

    scored: dict optimizer -> dict attack -> scores [M, N]. Columns optimizer and baseline as in intervals.paired.
    """
    first, frames = next(iter(ensembles.values())), []
    member, groups = np.array(first.member), first.dataset.groups
    for attack in tqdm(catalogue.NAMES, "scoring", delay=2, leave=False):
        how = {"threshold": 0.0 if attack in catalogue.FIXED else None, "columns": groups}
        frame = intervals.table({name: scored[name][attack] for name in ensembles}, member, **how)
        frames.append(frame.assign(attack=attack))
    return pd.concat(frames, ignore_index=True)


def compared(ensembles, influence_values_of, metric, rate=False, shadow_correction=0.0, test=False):
    """One metric for each optimizer and difference: a tidy frame.

    influence_values_of: Ensemble -> cells [M, N] of the pool, or [M, T] of the test part; groups (patients) count as one.
    """
    dataset = next(iter(ensembles.values())).dataset
    groups = dataset.groups_test if test else dataset.groups
    influence_values = {name: influence_values_of(e) for name, e in ensembles.items()}
    return intervals.paired(influence_values, metric, rate, shadow_correction=shadow_correction, columns=groups)


def plain_signal(ensemble, name, test=False):
    """A signal of the plain input: [M, N] on the pool, [M, T] on the test part."""
    logits, y = (ensemble.test_logits, ensemble.dataset.y_test) if test else (ensemble.logits, ensemble.dataset.y)
    return signals(logits[:, 0], y, only=(name,))[name]


def phi_gap(phi, member):
    """How much training on an example raises its phi: mean over models with it minus mean without, [N]."""
    return (phi * member).sum(0) / member.sum(0) - (phi * ~member).sum(0) / (~member).sum(0)


def hits_on_test(ensemble):
    """Which test points each model gets right: [M, T] float."""
    return plain_signal(ensemble, "correct", test=True).astype(float)


def accuracies(ensembles):
    """Test accuracy, accuracy and loss on the training halves, and the gap between accuracies in and out."""

    def train(name):
        return lambda e: intervals.ratio_influence_values(plain_signal(e, name).astype(float), np.array(e.member))

    def gap(e):
        hits, member = plain_signal(e, "correct").astype(float), np.array(e.member)
        return intervals.ratio_influence_values(hits, member) - intervals.ratio_influence_values(hits, ~member)

    return pd.concat(
        [
            compared(ensembles, hits_on_test, "test_accuracy", True, test=True),
            compared(ensembles, train("correct"), "train_accuracy", True),
            compared(ensembles, lambda e: -train("log_confidence")(e), "train_loss"),
            compared(ensembles, gap, "generalization_gap"),
        ],
        ignore_index=True,
    )


def variances(ensembles, kinds=("across_examples", "across_models"), members=False):
    """Variance of the outputs on non-members (or on members), of phi and of p_y, in each of its meanings.

    across_examples: of one model's outputs over the examples it did not see (what the paper's theorem is about);
    within_class: the same within each class, the classes weighted by their size;
    across_models: of one example's outputs over the models that did not see it (what LiRA's denominator is).
    """
    who = "member" if members else "nonmember"
    frames = [
        compared(ensembles, lambda e, n=n, k=k: variance_influence_values(e, n, k, members), f"{who}_variance_{n}_{k}")
        for n in ("phi", "confidence")
        for k in kinds
    ]
    return pd.concat(frames, ignore_index=True)


def variance_influence_values(ensemble, name, kind, members=False):
    """Cells [M, N] of the variance of one signal, in one of the meanings of `variances`."""
    values, chosen = plain_signal(ensemble, name).astype(float), np.array(ensemble.member) == members
    y = ensemble.dataset.y if kind == "within_class" else np.zeros(values.shape[1], int)

    def total(x):
        return x.sum(0, keepdims=True) if kind == "across_models" else (x @ np.eye(y.max() + 1)[y])[:, y]

    n = total(chosen.astype(float))
    centre = total(np.where(chosen, values, 0.0)) / np.maximum(n, 1)
    # s^2 = sum (x - mean)^2 / (n - 1), as the mean over the chosen of (x - mean)^2 n / (n - 1)
    return intervals.ratio_influence_values((values - centre) ** 2 * n / np.maximum(n - 1, 1), chosen)


def ratio(influence_values, reference):
    """Ratio of the means of two matrices of cells [M, N], with its paired interval (delta method): an Estimate."""
    value, below = influence_values.mean() / reference.mean(), reference.mean()
    # A/B about (a, b):  a/b + (A - (a/b) B) / b
    return intervals.estimate(value + (influence_values - value * reference) / below)


def extremes(ensembles):
    """Share of each model's non-members with p_y > 0.99, and with phi above the median of its members."""

    def above_median(e):
        phi, member = plain_signal(e, "phi"), np.array(e.member)
        median = np.nanmedian(np.where(member, phi, np.nan), axis=1, keepdims=True)
        return intervals.ratio_influence_values(phi > median, ~member)

    def certain(e):
        return intervals.ratio_influence_values(plain_signal(e, "confidence") > 0.99, ~np.array(e.member))

    share = "nonmember_share_above"
    kinds = ((certain, f"{share}_0.99"), (above_median, f"{share}_member_median"))
    return pd.concat(
        [compared(ensembles, influence_values, name, rate=True) for influence_values, name in kinds], ignore_index=True
    )


def lira_influence_values(ensemble):
    """Cells [M, N] of the AUC of LiRA (online, per-example variance, over all the queries)."""
    phi, member = signals(ensemble.logits, ensemble.dataset.y, only=("phi",))["phi"], np.array(ensemble.member)
    return intervals.auc_influence_values(shadow.lira(phi, member), member)


def contrast(ensembles):
    """Accuracies, train loss and LiRA's AUC of each optimizer, and their differences from the first: a tidy frame.

    Column train_loss holds the optimizer's loss beside each of its rows (NaN beside differences).
    """
    auc = compared(
        ensembles, lira_influence_values, "auc", rate=True, shadow_correction=intervals.SHADOW_CORRECTION
    ).assign(attack="lira")
    frame = pd.concat([accuracies(ensembles), auc], ignore_index=True)
    loss = frame[(frame.metric == "train_loss") & (frame.baseline == "")].set_index("optimizer").value
    return frame.assign(train_loss=frame.optimizer.map(loss).where(frame.baseline == ""))


def radius_table(radius_sweep, treatment, baseline, table=contrast):
    """`table` of every radius with radius 0. doses: dict rho -> Ensemble, 0.0 first; baseline's rows come once."""
    frames = []
    for rho, ensemble in tqdm(list(radius_sweep.items())[1:], "doses", delay=2, leave=False):
        frame = table({baseline: radius_sweep[0.0], treatment: ensemble})
        frames.append(frame.assign(rho=np.where(frame.optimizer == baseline, 0.0, rho)))
    frame = pd.concat(frames or [table({baseline: radius_sweep[0.0]}).assign(rho=0.0)], ignore_index=True)
    return frame.drop_duplicates(["optimizer", "baseline", "rho", "metric"])


def null_table(ensemble, seed, shuffles=5):
    """AUC of every attack on shuffled membership (catalogue.null_member), averaged over shuffles: 0.5 without a fault."""
    influence_values = {}
    for shuffle in range(shuffles):
        member = catalogue.null_member(np.array(ensemble.member), [seed, shuffle], ensemble.dataset.groups)
        for attack, found in scores(ensemble, member).items():
            influence_values[attack] = (
                influence_values.get(attack, 0) + intervals.auc_influence_values(found, member) / shuffles
            )
    how = {"rate": True, "shadow_correction": intervals.SHADOW_CORRECTION, "columns": ensemble.dataset.groups}
    found = {attack: intervals.estimate(c, **how) for attack, c in influence_values.items()}
    return pd.DataFrame([row("auc", e, attack=attack) for attack, e in found.items()])


def least_sure(phi, member):
    """The example of which the models that did not see it are least sure: lowest mean phi over its non-members."""
    return int(((phi * ~member).sum(0) / (~member).sum(0)).argmin())


def leak_times(n):
    """How often the planted leak is trained, in a pool of n: 50 times, but at most about half of n, and even."""
    return min(50, n // 4 * 2)


def planted_table(scored, member, place, n_pairs=PLANTED // 2):
    """In how many pairs of partners (2k, 2k+1) an attack finds which model was trained on one example: a tidy frame.

    scored: dict attack -> scores [M, N]; place: the example's column. The first n_pairs pairs count of which one
    model saw it and one did not. Found is a pair if its member has the higher score; a tie counts half.
    """
    seen = member[:, place].reshape(-1, 2)
    pairs, rows = np.flatnonzero(seen[:, 0] != seen[:, 1])[:n_pairs], []
    for attack, scores in scored.items() if len(pairs) else ():
        own = scores[:, place].reshape(-1, 2)[pairs]
        inside, outside = own[seen[pairs]], own[~seen[pairs]]
        found = (inside > outside).sum() + (inside == outside).sum() / 2
        rows.append(row("planted_pairs_found", intervals.proportion(found, len(pairs)), attack=attack))
    frame = pd.DataFrame(rows, columns=["metric", "value", "ci_low", "ci_high", "attack"])
    return frame.assign(n_models=2 * len(pairs))


# ---- labels only ---------------------------------------------------------------------------------------------


def label_only_table(ensembles, n_models=16, device="cpu"):
    """`intervals.table` of the attacks that see predicted labels only, on the models whose weights are kept.

    label_only (lib.attacks.label_only), label_only_classwise (with a threshold for each class) and label_once, which
    asks for the unchanged example only and is the attack `gap`. Also the null control of label_only, as the metric
    null_auc. Column n_models: how many models were asked. ValueError: see `models_with_weights`.
    """
    first, ids = next(iter(ensembles.values())), models_with_weights(ensembles.values(), n_models)
    member, y, groups = np.array(first.only(ids).member), first.dataset.y, first.dataset.groups
    answered = {name: label_answers(e, ids, device) for name, e in ensembles.items()}
    scored = {name: label_only.scores(a, member) for name, a in answered.items()}
    half = intervals.calibration_split(member, 0, y, groups)
    by_class = {name: thresholds.classwise(s, member, y, half=half) for name, s in scored.items()}
    right = {name: plain_signal(e.only(ids), "correct") for name, e in ensembles.items()}
    kinds = (("label_only", scored, None), ("label_only_classwise", by_class, 0.0), ("label_once", right, 0.0))
    frames = [
        intervals.table(s, member, threshold=limit, columns=groups).assign(attack=attack) for attack, s, limit in kinds
    ]
    for name, a in answered.items():
        shuffled = [catalogue.null_member(member, seed, groups) for seed in range(5)]
        values = [intervals.auc_influence_values(label_only.scores(a, alleged), alleged) for alleged in shuffled]
        null = intervals.estimate(np.mean(values, axis=0), rate=True, columns=groups)
        frames.append(pd.DataFrame([row("null_auc", null, optimizer=name, baseline="", attack="label_only")]))
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
    """The first n_models models, in whole pairs, whose weights are kept in all the ensembles: ids [m].

    Raises ValueError if n_models is not an even number from 8, or fewer than 8 are left.
    """
    if n_models % 2 or n_models < 8:
        raise ValueError(f"n_models={n_models!r} is not valid: it must be an even number from 8")
    there = set.intersection(*(set(e.ids.tolist()) for e in ensembles))
    ids = [k for k in range(KEEP_WEIGHTS) if {k, k ^ 1} <= there][:n_models]
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


PAPER_ATTACKS = (
    ("confidence accuracy", "confidence", "balanced_accuracy"),
    ("M-entropy accuracy", "m_entropy", "balanced_accuracy"),
    ("RMIA AUC", "rmia", "auc"),
    ("LiRA AUC", "lira", "auc"),
    ("LiRA TPR at 0.1% FPR", "lira", "tpr@0.001"),
)


def beside_paper(leak, accuracy, baseline, treatment):
    """This run's numbers in the shape of the paper's table, in per cent."""
    leak, own = leak[leak.baseline == ""], accuracy[accuracy.baseline == ""]
    test = {
        n: 100 * own[(own.optimizer == n) & (own.metric == "test_accuracy")].value.iloc[0]
        for n in (baseline, treatment)
    }
    rows = []
    for label, attack, metric in PAPER_ATTACKS:
        found = leak[(leak.attack == attack) & (leak.metric == metric)].set_index("optimizer").value
        if len(found):
            rows.append(
                {
                    "attack": label,
                    baseline: 100 * found[baseline],
                    treatment: 100 * found[treatment],
                    f"{baseline} test": test[baseline],
                    f"{treatment} test": test[treatment],
                }
            )
    return pd.DataFrame(rows)


# ---- regimes: equal epochs, equal train loss ----------------------------------------------------------------


def by_epochs(ensembles):
    """dict (epochs, optimizer) -> Ensemble as dict epochs -> dict optimizer -> Ensemble, in order of epochs."""
    return {e: {name: ensembles[k, name] for k, name in ensembles if k == e} for e in sorted({e for e, _ in ensembles})}


def length_table(length_sweep):
    """`contrast` at every number of epochs. regimes: dict epochs -> dict optimizer -> Ensemble, the baseline first."""
    bar = tqdm(length_sweep.items(), "regimes", delay=2, leave=False)
    return pd.concat([contrast(pair).assign(epochs=epochs) for epochs, pair in bar], ignore_index=True)


def on_the_same(*groups):
    """Each group, a dict label -> Ensemble, restricted to the models that all groups have; as it is if it has no more,
    or if fewer than 8 models would be left."""
    common = common_ids({(k, label): e for k, group in enumerate(groups) for label, e in group.items()})

    def restricted(group):
        more = any(len(e.ids) > len(common) for e in group.values())
        return {label: e.only(common) for label, e in group.items()} if more else group

    return groups if len(common) < 8 else tuple(map(restricted, groups))


def loss_series(regime_frame, dose_frame, baseline, treatment):
    """LiRA's AUC against train loss as plots.leakage_against_loss takes it: two series over epochs, one over radii."""
    epochs = regime_frame.assign(
        series=regime_frame.optimizer + ", epochs varied", label=regime_frame.epochs.astype(str)
    )
    radii = dose_frame.assign(series=f"{treatment}, radius varied", label=[f"{rho:.3g}" for rho in dose_frame.rho])
    both = pd.concat([epochs, radii[radii.rho > 0]], ignore_index=True)
    return both[(both.metric == "auc") & (both.baseline == "") & both.optimizer.isin([baseline, treatment])]


def train_losses(ensemble):
    """Cells [M, N] of the train loss (nats)."""
    return intervals.ratio_influence_values(
        -plain_signal(ensemble, "log_confidence").astype(float), np.array(ensemble.member)
    )


def at_equal(baseline, treatment, influence_values_of, scale=float, test=False):
    """AUC differences, other minus baseline, where `other` reached a coordinate: a tidy frame.

    baseline, other: lists of Ensembles of the same models. The coordinate is scale(mean of influence_values_of(ensemble)), cells
    [M, N] of the pool or [M, T] of the test part. Between its two neighbouring runs (columns below and above have their
    coordinates) the baseline's AUC is read off several `curves`, which are linear in its cells: the value is the mean
    of the differences, the interval spans the curves' 95% intervals. The coordinate itself is taken as known, so what
    the baseline did not bracket is left out, and so is a bracket whose own two runs differ by no more than noise.
    """
    ids = [e.ids.tolist() for e in [*baseline, *treatment]]
    if any(i != ids[0] for i in ids):
        raise ValueError("baseline, other: the ensembles hold different models; align them first")
    points = [(influence_values_of(e), lira_influence_values(e).astype(np.float32)) for e in baseline]
    points = sorted(
        ((scale(influence_values.mean()), influence_values, leak) for influence_values, leak in points),
        key=lambda point: point[0],
    )
    places, of, leak = zip(*points, strict=True)
    rows = []
    for ensemble in treatment:
        at, groups = scale(influence_values_of(ensemble).mean()), ensemble.dataset.groups
        right = int(np.searchsorted(places, at))
        if not 0 < right < len(places):
            continue
        apart = intervals.estimate(of[right] - of[right - 1], columns=ensemble.dataset.groups_test if test else groups)
        if apart.low <= 0 <= apart.high:
            continue
        own, found = lira_influence_values(ensemble), []
        for weights in curves(places, at, right):
            influence_values = own - sum(weight * leak[k] for k, weight in weights.items())
            found.append(
                intervals.estimate(influence_values, shadow_correction=intervals.SHADOW_CORRECTION, columns=groups)
            )
        hull = intervals.Estimate(
            np.mean([e.value for e in found]), min(e.low for e in found), max(e.high for e in found)
        )
        between = {"below": places[right - 1], "above": places[right], "epochs": ensemble.recipe.epochs}
        rows.append(row("auc", hull, at=at, **between))
    return pd.DataFrame(rows, columns=["at", "below", "above", "epochs", "metric", "value", "ci_low", "ci_high"])


def curves(places, at, right):
    """Weights of the runs at rising `places` in the value at `at`, between the runs right - 1 and right: dicts.

    The straight line through the two, and the parabolas through them and the next run on either side, where there is
    one: how far they part says how much the bend between two runs leaves open.
    """
    ends = [right - 1, right]
    sets = [ends, *([*ends, k] for k in (right - 2, right + 1) if 0 <= k < len(places))]
    # Lagrange: w_k = prod_{j != k} (at - x_j) / (x_k - x_j)
    return [
        {k: float(np.prod([(at - places[j]) / (places[k] - places[j]) for j in nodes if j != k])) for k in nodes}
        for nodes in sets
    ]


def at_equal_loss(baseline, treatment):
    """`at_equal` in log train loss: columns train_loss (nats), between (the baseline's two), metric, value, ..."""
    frame = at_equal(baseline, treatment, train_losses, np.log)
    between = [f"{np.exp(low):.3g} and {np.exp(high):.3g}" for low, high in zip(frame.below, frame.above, strict=True)]
    kept = frame[["epochs", "metric", "value", "ci_low", "ci_high"]]
    return pd.concat([pd.DataFrame({"train_loss": np.exp(frame["at"]), "between": between}), kept], axis=1)

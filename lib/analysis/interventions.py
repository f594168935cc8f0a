"""What the paper leaves open: its variants, what switches the effect off, defences, and who pays.

Every comparison is paired with a baseline on the same halves, initial weights and batch orders. Ensembles are
dicts label -> Ensemble with the same models (compare.keep_common_models).
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd

from lib.analysis import compare
from lib.analysis.compare import lira_influence_values, plain_signal, row
from lib.analysis.memorization import exposure, spearman
from lib.analysis.privacy_audit import audited_epsilon
from lib.attacks import intervals, shadow
from lib.attacks.signals import signals
from lib.study.text import sign
from lib.training import networks, privacy

VARIANTS = ("sam", "asam", "gsam", "looksam", "msam", "fsam", "esam")
WITHOUT_NORM = {"cnn": "cnn_plain", "mlp_bn": "mlp"}  # a network and the same without BatchNorm


# ---- variants: accuracy against leakage ---------------------------------------------------------------------


def on(baseline):
    """name -> the same rule on the baseline's own base."""
    return lambda name: name if baseline == "sgd" else f"{name}+{baseline}"


def variant_radii(run, factors):
    """(name, rho) of every sharpness-aware optimizer at its strengths, of the run's own further optimizers, and of
    SharpReg and SWA at one. factors: radii as shares of each one's own; a radius given in the name is kept."""
    fixed = [on(run.names[0])(name) for name in ("sharpreg", "swa")]
    found = []
    for name in dict.fromkeys((*map(on(run.names[0]), VARIANTS), *run.names[1:], *fixed)):
        recipe = run.recipe(name)
        free = recipe.rho > 0 and recipe.optimizer.rho is None
        found += [(name, factor * recipe.rho) for factor in (factors if free else (1,))]
    return found


def variants(run, factors, n_models):
    """The ensembles of `variant_radii`, and what they are held against, first: dict (name, rho) -> Ensemble."""
    found = {(run.names[0], 0.0): run.train(run.names[0], n_models)}
    return found | {(name, rho): run.train(name, n_models, rho=rho) for name, rho in variant_radii(run, factors)}


def variant_table(found):
    """`compare.contrast` of every variant with the baseline, which is first: a tidy frame with a column rho."""
    (first, _), *others = found
    frames = []
    for name, rho in others:
        frame = compare.contrast({first: found[first, 0.0], name: found[name, rho]})
        frames.append(frame.assign(rho=np.where(frame.optimizer == first, 0.0, rho)))
    return pd.concat(frames, ignore_index=True).drop_duplicates(["optimizer", "baseline", "rho", "metric"])


def signs(table, baseline):
    """Signs of the differences in test accuracy and LiRA's AUC, 0 where not clear: dict (name, rho) -> (int, int)."""
    rows = table[(table.baseline == baseline) & (table.rho > 0)]
    rows = rows.assign(sign=[sign(row) for row in rows.itertuples()])
    wide = rows.pivot_table("sign", ["optimizer", "rho"], "metric", sort=False)
    return {key: (int(row.test_accuracy), int(row.auc)) for key, row in wide.iterrows()}


def dominated(found, level=0.95):
    """Which of the ensembles another beats: dict label -> list of labels; an empty list is the frontier.

    b beats a if it tests better or leaks less (LiRA's AUC), the paired interval clear of 0, and is not worse in the
    other by its estimate. Intervals are widened for the number of pairs (Bonferroni).
    """
    accuracy = {k: compare.hits_on_test(e) for k, e in found.items()}
    leak, k = {label: lira_influence_values(e).astype(np.float32) for label, e in found.items()}, len(found)
    strict, dataset = 1 - (1 - level) / max(1, k * (k - 1)), next(iter(found.values())).dataset

    def beats(b, a):
        better = intervals.estimate(accuracy[b] - accuracy[a], level=strict, columns=dataset.groups_test)
        tighter = intervals.estimate(
            leak[a] - leak[b], level=strict, shadow_correction=intervals.SHADOW_CORRECTION, columns=dataset.groups
        )
        clear = (better.low > 0) or (tighter.low > 0)
        return clear and better.value >= 0 and tighter.value >= 0

    return {a: [b for b in found if b != a and beats(b, a)] for a in found}


# ---- at equal accuracy, loss, compute -----------------------------------------------------------------------


def test_accuracy(ensemble):
    """Mean test accuracy."""
    return float(compare.hits_on_test(ensemble).mean())


def at_equal_accuracy(baseline, treatment):
    """As compare.at_equal_loss, at the test accuracies that `other` reached: columns test_accuracy, between, ..."""
    frame = compare.at_equal(baseline, treatment, compare.hits_on_test, test=True)
    between = [f"{low:.1%} and {high:.1%}" for low, high in zip(frame.below, frame.above, strict=True)]
    return frame.drop(columns=["below", "above"]).rename(columns={"at": "test_accuracy"}).assign(between=between)


# ---- causes -------------------------------------------------------------------------------------------------


def mislabelled(dataset, share, seed=0):
    """The data set with a share of the pool's labels replaced by another class, drawn evenly: a Dataset."""
    if not 0 <= share < 1:
        raise ValueError(f"share={share!r} is not valid: it must be in [0, 1)")
    rng, y = np.random.default_rng(seed), dataset.y.copy()
    wrong = rng.permutation(len(y))[: round(share * len(y))]
    y[wrong] = (y[wrong] + rng.integers(1, dataset.n_classes, len(wrong))) % dataset.n_classes
    return replace(dataset, y=y)


def levels(run):
    """What is varied, one thing at a time: dict (factor, level) -> (changes of the recipe, data set). The run first."""
    data, found = run.dataset, {("as it is", "as it is"): ({}, run.dataset)}
    size = run.recipe(run.names[0]).batch_size
    least = max(4, *(run.recipe(name).optimizer.least_batch for name in (run.names[0], run.treatment)))
    for factor in (0.25, 4):
        batch = round(factor * size)
        if least <= batch <= round(len(data.y) * run.subset):
            found["batch size", f"{batch}"] = ({"batch_size": batch}, data)
    for epochs in (run.length_sweep()[-3:][0], run.length_sweep()[-1]):
        if epochs != run.epochs:
            found["epochs", f"{epochs}"] = ({"epochs": epochs}, data)
    for share in (0.1, 0.3):
        found["label noise", f"{share:.0%}"] = ({}, mislabelled(data, share, run.seed))
    for decay in (0.0, 5e-3):
        if decay != run.weight_decay:
            found["weight decay", f"{decay:g}"] = ({"weight_decay": decay}, data)
    twin = WITHOUT_NORM.get(run.arch) or {v: k for k, v in WITHOUT_NORM.items()}.get(run.arch)
    if twin:
        found["BatchNorm", "without" if run.arch in WITHOUT_NORM else "with"] = ({"arch": twin}, data)
    return found


def chosen_levels(run, most=None):
    """`levels`, at most the last `most` of each factor."""
    found, count = levels(run), {}
    for key in reversed(list(found)):
        count[key[0]] = count.get(key[0], 0) + 1
        if most is not None and count[key[0]] > most:
            del found[key]
    return found


def causes(run, n_models, most=None):
    """The baseline and run.treatment at every one of `chosen_levels`: dict level -> dict optimizer -> Ensemble.

    Levels at which most models diverged are left out, and said.
    """
    names = run.names[0], run.treatment
    wanted = {
        (*level, name): run.train(name, n_models, dataset=data, **changes)
        for level, (changes, data) in chosen_levels(run, most).items()
        for name in names
    }
    kept = compare.keep_common_models(wanted, essential=[key for key in wanted if key[0] == "as it is"])
    both = [level for level in dict.fromkeys(key[:2] for key in kept) if all((*level, n) in kept for n in names)]
    return {level: {name: kept[(*level, name)] for name in names} for level in both}


def effect_table(found):
    """Effect on LiRA's AUC at every level, and how far it is from the effect as it is: a tidy frame.

    Columns factor, level, metric (auc, auc_change), value, ci_low, ci_high; train_accuracy, test_gain beside them.
    """
    effect, about, groups = {}, {}, next(iter(next(iter(found.values())).values())).dataset.groups
    for level, (base, treatment) in ((k, e.values()) for k, e in found.items()):
        effect[level] = lira_influence_values(treatment) - lira_influence_values(base)
        member = np.array(base.member)
        fits = [plain_signal(e, "correct")[member].mean() for e in (base, treatment)]
        gain = test_accuracy(treatment) - test_accuracy(base)
        about[level] = {"train_accuracy": fits[0], "train_accuracy_other": fits[1], "test_gain": gain}
    first, rows = effect[next(iter(effect))], []
    for level, influence_values in effect.items():
        for metric, values in (("auc", influence_values), ("auc_change", influence_values - first)):
            found_here = intervals.estimate(values, shadow_correction=intervals.SHADOW_CORRECTION, columns=groups)
            rows.append(row(metric, found_here, factor=level[0], level=level[1], **about[level]))
    return pd.DataFrame(rows)


# ---- defences -----------------------------------------------------------------------------------------------


def defences(run):
    """What is trained to leak less: dict name -> changes of the baseline's recipe, the optimizer among them."""
    name, treatment = on(run.names[0]), run.treatment
    return {
        treatment: dict(optimizer=treatment),
        "label smoothing 0.1": dict(smoothing=0.1),
        "stopped at a quarter": dict(stop=0.25),
        "stopped at half": dict(stop=0.5),
        "weight averaging (swa)": dict(optimizer=name("swa")),
        "SharpReg": dict(optimizer=name("sharpreg")),
        f"{treatment}, smoothing 0.1": dict(optimizer=treatment, smoothing=0.1),
    }


def tempered(ensemble, temperature):
    """The ensemble as served with its logits divided by a temperature, shadows alike: accuracy does not change."""
    served = {n: getattr(ensemble, n) / np.float32(temperature) for n in ("logits", "test_logits")}
    return SimpleNamespace(
        **served, member=ensemble.member, dataset=ensemble.dataset, ids=ensemble.ids, recipe=ensemble.recipe
    )


def lira_scores(ensemble):
    """LiRA's scores, online, per-example variance: [M, N]."""
    phi = signals(ensemble.logits, ensemble.dataset.y, only=("phi",))["phi"]
    return shadow.lira(phi, np.array(ensemble.member))


def defence_table(found):
    """What each defence costs and buys: accuracies, and the metrics of LiRA and of a confidence threshold, paired.

    found: dict label -> Ensemble, the undefended one first. A tidy frame with column optimizer for the label.
    """
    member = np.array(next(iter(found.values())).member)
    scored = {
        "lira": {k: lira_scores(e) for k, e in found.items()},
        "confidence": {k: plain_signal(e, "phi") for k, e in found.items()},
    }
    groups = next(iter(found.values())).dataset.groups
    frames = [compare.accuracies(found)]
    frames += [intervals.table(scores, member, columns=groups).assign(attack=name) for name, scores in scored.items()]
    return pd.concat(frames, ignore_index=True)


def strict_rate(frame):
    """[the false positive rate, of those at which a TPR is there, that is 0.1% or else the strictest]; [] of none."""
    rates = sorted({float(m[4:]) for m in frame.metric.unique() if m.startswith("tpr@")})
    return [0.001] if 0.001 in rates else rates[:1]


def delta_of(run):
    """The delta of the run's privacy claims: the power of ten below half of one over the size of the pool."""
    return 10.0 ** np.floor(np.log10(1 / (2 * run.n_examples)))


def noise_levels(run, targets, delta):
    """dict (rule, epsilon) -> sigma: the noise that gives DP-SGD and DP-SAM each epsilon on this run's halves."""
    recipe = run.recipe(run.names[0])
    n = round(len(run.dataset.y) * recipe.subset)
    steps = n // recipe.batch_size * recipe.epochs
    return {
        (rule, target): privacy.noise_for(target, recipe.batch_size, n, steps, delta, queries)
        for rule, queries in (("dpsgd", 1), ("dpsam", 2))
        for target in targets
    }


def private_arch(run):
    """The run's network, or its twin, without BatchNorm, which mixes a batch's examples; None if there is none, or if
    the baseline asks for gradients anew within a step, which no accountant counts."""
    arch = WITHOUT_NORM.get(run.arch, run.arch)
    if run.recipe(run.names[0]).optimizer.asks_again():
        return None
    net = networks.build(arch, run.dataset.x.shape[1:], run.dataset.n_classes)
    return None if networks.has_batchnorm(net) else arch


def private(run, targets, n_models, delta):
    """DP-SGD and DP-SAM at each epsilon, with the undefended baseline on the same network: dict label -> Ensemble.

    Empty without a network for it (`private_arch`), or where fewer than 8 undefended models of it learn."""
    arch = private_arch(run)
    found = {} if arch is None else {(run.names[0], np.inf): run.train(run.names[0], n_models, arch=arch)}
    if arch is None or len(found[run.names[0], np.inf].ids) < 8:
        return {}
    for (rule, target), sigma in noise_levels(run, targets, delta).items():
        name = on(run.names[0])(f"{rule}(sigma={sigma:.4g})")
        found[rule, target] = run.train(name, n_models, arch=arch)
    return found


def epsilon_table(found, delta):
    """Claimed epsilon beside the lower bound that LiRA reaches: a frame with optimizer, epsilon, bound."""
    rows = []
    for (name, target), ensemble in found.items():
        bound = audited_epsilon(lira_scores(ensemble), np.array(ensemble.member), delta)
        rows.append({"optimizer": name, "epsilon": target, "bound": float(bound)})
    return pd.DataFrame(rows)


# ---- who pays -----------------------------------------------------------------------------------------------


def class_table(ensembles):
    """LiRA's AUC and the test accuracy within each class, for each optimizer and difference: a tidy frame.

    Column `class` and the class's size in the pool; classes without members and non-members in every model are left
    out. Metrics auc, class_test_accuracy; and balanced_test_accuracy (class ''), the mean over the classes.
    """
    dataset = next(iter(ensembles.values())).dataset
    member, frames = np.array(next(iter(ensembles.values())).member), []
    scores = {k: lira_scores(e) for k, e in ensembles.items()}
    right = {k: compare.hits_on_test(e) for k, e in ensembles.items()}
    for c, name in enumerate(dataset.classes):
        own, seen = dataset.y == c, dataset.y_test == c
        inside, of = member[:, own], {"groups": own, "groups_test": seen}
        of = {key: None if (g := getattr(dataset, key)) is None else g[rows] for key, rows in of.items()}
        influence_values = {}
        if inside.any(1).all() and (~inside).any(1).all():
            influence_values["auc"] = {k: intervals.auc_influence_values(s[:, own], inside) for k, s in scores.items()}
        if seen.any():
            influence_values["class_test_accuracy"] = {k: r[:, seen] for k, r in right.items()}
        for metric, each in influence_values.items():
            how = (
                {"shadow_correction": intervals.SHADOW_CORRECTION, "columns": of["groups"]}
                if metric == "auc"
                else {"columns": of["groups_test"]}
            )
            found = intervals.paired(each, metric, True, **how)
            frames.append(found.assign(**{"class": name, "size": own.sum()}))
    counts = np.bincount(dataset.y_test, minlength=dataset.n_classes)
    # mean over classes of the accuracy within: each test point weighs T / (C n_class)
    weight = len(dataset.y_test) / ((counts > 0).sum() * np.maximum(counts, 1))[dataset.y_test]
    balanced = compare.compared(
        ensembles, lambda e: compare.hits_on_test(e) * weight, "balanced_test_accuracy", test=True
    )
    return pd.concat([*frames, balanced.assign(**{"class": "", "size": len(dataset.y)})], ignore_index=True)


def agreement(ensembles, parts=8, seed=0):
    """Does the other expose the same examples? Rank correlations of the examples' exposure between two halves of pairs.

    Exposure: how well phi tells the models with an example from those without (AUC); no shadow model is in it, which
    both halves would share. Two halves of the *models* of one optimizer agree no better than their noise lets them;
    across optimizers (again on different models) a lower correlation means other examples. Corrected for noise: across,
    over the geometric mean of the two within (Spearman 1904), where these are positive in every split. Returns a tidy
    frame: metric, value and the range over `parts` splits as interval.
    """
    (a, first), (b, second) = ensembles.items()
    scores = {a: plain_signal(first, "phi"), b: plain_signal(second, "phi")}
    member = np.array(first.member)
    rng, found = np.random.default_rng(seed), {}
    for _ in range(parts):
        left = np.repeat(rng.permutation(len(member) // 2) < len(member) // 4, 2)
        seen = {(k, side): exposure(scores[k][left == side], member[left == side]) for k in scores for side in (0, 1)}
        pairs = {a: ((a, 0), (a, 1)), b: ((b, 0), (b, 1)), f"{a} and {b}": ((a, 0), (b, 1))}
        for name, (one, treatment) in pairs.items():
            both = np.isfinite(seen[one]) & np.isfinite(
                seen[treatment]
            )  # some were in, or out of, all of a half's models
            found.setdefault(name, []).append(spearman(seen[one][both], seen[treatment][both]))
    rows = [
        row("exposure_rank_correlation", intervals.Estimate(np.mean(v), min(v), max(v)), optimizer=name, baseline="")
        for name, v in found.items()
    ]
    one, treatment, across = map(np.array, found.values())
    if min(*one, *treatment) > 0:
        # rho_corrected = rho_ab / sqrt(rho_aa rho_bb)
        corrected, value = across / np.sqrt(one * treatment), across.mean() / np.sqrt(one.mean() * treatment.mean())
        found_here = intervals.Estimate(value, min(corrected), max(corrected))
        rows.append(row("exposure_rank_correlation_corrected", found_here, optimizer=f"{a} and {b}", baseline=""))
    return pd.DataFrame(rows)


def pattern_table(ensembles, memorized):
    """On data with known sub-patterns: memorization, exposure and SAM's gain by how many examples share the pattern.

    memorized: dict optimizer -> [N]. Rows for each optimizer and each difference from the first, by class of size; the
    gain is on the test part.
    """
    (base, first), *_ = ensembles.items()
    memorized = {(k, ""): v for k, v in memorized.items()} | {
        (k, base): memorized[k] - memorized[base] for k in memorized if k != base
    }
    dataset, member = first.dataset, np.array(first.member)
    both = dataset.pattern, dataset.pattern_test
    shared = np.bincount(dataset.pattern, minlength=1 + max(p.max() for p in both))  # 0 for one that the pool lacks
    size, size_test = (shared[p] for p in both)
    edges = [1, 3, 10, 30, 100, np.inf]
    frames = []
    for low, high in zip(edges, edges[1:], strict=False):
        own, seen = (size >= low) & (size < high), (size_test >= low) & (size_test < high)
        label = f"{low:g} to {high - 1:g}" if high < np.inf else f"{low:g} or more"
        if own.sum() < 10:
            continue
        influence_values = {
            k: intervals.auc_influence_values(lira_scores(e)[:, own], member[:, own]) for k, e in ensembles.items()
        }
        shown = [intervals.paired(influence_values, "auc", True, shadow_correction=intervals.SHADOW_CORRECTION)]
        means = {key: intervals.t_interval(values[own]) for key, values in memorized.items()}
        rows = [row("mean_memorization", e, optimizer=k, baseline=b) for (k, b), e in means.items()]
        shown.append(pd.DataFrame(rows))
        if seen.sum() >= 10:
            right = {k: plain_signal(e, "correct", test=True)[:, seen].astype(float) for k, e in ensembles.items()}
            shown.append(intervals.paired(right, "test_accuracy", True))
        frames.append(pd.concat(shown, ignore_index=True).assign(size=label))
    return pd.concat(frames, ignore_index=True)


def most(patterns):
    """Where each metric of a pattern_table is largest: dict (optimizer, baseline, metric) -> (size, value)."""
    found = {}
    for key, rows in patterns.groupby(["optimizer", "baseline", "metric"], sort=False):
        top = rows.loc[rows.value.idxmax()]
        found[key] = top["size"], float(top.value)
    return found

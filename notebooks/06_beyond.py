# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. Beyond the paper: variants, defences, and who pays
#
# The paper speaks of sharpness-aware training *in general*, but compares a handful of optimizers at one strength
# each. This notebook answers three questions that it leaves open:
#
# - **Variants.** Which sharpness-aware optimizers trade privacy for accuracy, and which improve on neither?
# - **Defences.** What does each cost in accuracy, and what does it buy in privacy?
# - **Who pays.** Are the same classes and examples exposed as under SGD, or others?
#
# Each section answers with the numbers of this run, and the last one collects the answers. All ensembles share their
# halves, initial weights and batch orders, so every comparison is paired.

# %% tags=["setup"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from lib.analysis import compare, memorization
from lib.attacks import catalogue, intervals
from lib.study import experiments, figures, settings
from lib.study.results import Results
from lib.study.text import joined, number, percentage_points, select, show_table, show_text, sign

# %% tags=["parameters"]
# Parameters that a reader would change first; the preset fills in what is None. `make study` takes many more.
preset: str = "default"  # tiny, default, small, fast, paper
dataset: str = "digits"  # digits, mnist5k, cifar10, folder, npz, ...: docs/settings.md lists them
data: str = None  # path, where the data set needs one
arch: str = None  # mlp, cnn, resnet18, wrn28_2, vgg16_bn, ... or your own as package.module:name
optimizers: str = None  # comma-separated, the first is the baseline: "sgd,sam,looksam"
rho: float = None  # radius of SAM's neighbourhood
n_models: int = None  # models per optimizer, an even number
epochs: int = None  # epochs of the main comparison

# %% tags=["setup"]
run = settings.notebook_run(globals())
few, fewer = (experiments.n_models(run, kind) for kind in ("few", "fewer"))
results = Results("06_beyond", run, n_models=few)
baseline, treatment = run.baseline, run.treatment
than = ("more than", "less than", "no differently from")
figures.style()
show_text(run.describe() + f" Here an ensemble has {few} models, a private one {fewer}.")

# %% [markdown]
# ## Variants: who sits on the frontier?
#
# **Claim.** Every sharpness-aware optimizer tests better than SGD and leaks more.
#
# **Method.** SAM and six of its relatives at their usual radius, and this run's own optimizer at the radii of notebook
# 5; weight averaging (SWA), which finds flat minima without looking for them; and SharpReg, an earlier defence of the
# paper, which looks for *sharp* minima. A variant changes one function, the one that turns gradients $g(w)$ into the
# step's gradient. SAM's is $g(w + e)$ with $e = \rho\, g(w) / \lVert g(w) \rVert$.
#
# | optimizer | what it changes | gradients a step |
# |---|---|---|
# | `sam` | the gradient is taken at the worst point nearby, $w + e$ (Foret et al. 2021) | 2 |
# | `asam` | "nearby" is relative to each weight: $e = \rho\, T^2 g / \lVert T g \rVert$, $T = \mathrm{diag}\lvert w \rvert$; radii are ten times SAM's (Kwon et al. 2021) | 2 |
# | `gsam` | subtracts the part of $g(w)$ at a right angle to $g(w + e)$, which brings the two losses together (Zhuang et al. 2022) | 2 |
# | `looksam` | SAM every fifth step; in between it reuses what SAM added to $g(w)$ (Liu et al. 2022) | 1.2 |
# | `msam` | each half of the batch has a worst point of its own (Behdin et al. 2023) | 2 |
# | `fsam` | $e$ follows the batch's gradient minus the running mean of the gradients (Li et al. 2024) | 2 |
# | `esam` | moves a random part of the weights, then uses the half of the batch whose loss rises most (Du et al. 2022) | 1.8 |
# | `swa` | plain gradients; averages the weights of the last quarter of training (Izmailov et al. 2018) | 1 |
# | `sharpreg` | SAM with a negative radius, $g(w - e)$ | 2 |

# %%
made = run.ensembles("variants")
table = compare.split_labels(compare.contrast(made), "rho")
usual = np.array([rho == run.recipe(name).rho for name, rho in zip(table.optimizer, table.rho, strict=True)])
place = np.where(usual, "", "radius=other")
results.add(table, experiment="variants", coordinate=place, n_models=len(made[baseline, 0.0].ids))
wanted = table.metric.isin(["auc", "tpr@0.01", "test_accuracy"]) & (table.baseline == baseline)
show_table(table[wanted & usual], across=["metric"])

# %% [markdown]
# The table has the differences from the baseline, of each optimizer with its default options at its usual radius (the
# run's; ASAM's is ten times as large, as its authors have it).
#
# The picture has all ensembles. Each is a marker at its paired difference from the baseline, with 95% intervals;
# larger markers have larger radii. **Filled markers are Pareto-optimal**: no other ensemble beats them. One ensemble
# beats another if it tests better or leaks less, clearly, and is no worse in the other respect. "Clearly" means that
# the paired interval excludes zero, at a level that allows for the number of pairs. In code:

# %%
hits = {key: compare.hits_on_test(e) for key, e in made.items()}
leaks = {key: compare.auc_influence_values(e).astype(np.float32) for key, e in made.items()}
level = 1 - 0.05 / max(1, len(made) * (len(made) - 1))  # Bonferroni


def beats(b, a):
    """Does ensemble b beat ensemble a?"""
    better = intervals.estimate(hits[b] - hits[a], level=level, columns=run.dataset.groups_test)
    tighter = compare.auc_estimate(leaks[a] - leaks[b], run.dataset, level)
    return (better.low > 0 or tighter.low > 0) and better.value >= 0 and tighter.value >= 0


beaten = {a: [b for b in made if b != a and beats(b, a)] for a in made}

# %%
shown = (("test_accuracy", ""), ("auc", "lira_shrunk"))
points = {
    key: [select(table, baseline, metric=m, attack=a, optimizer=key[0], rho=key[1]) for m, a in shown]
    for key in list(made)[1:]
}
near = {key: rows for key, rows in points.items() if abs(rows[0].value) <= 0.02}
panels = 1 + (0 < len(near) < len(points))  # a second one, if some lie far off
figure, axes = plt.subplots(1, panels, figsize=(2 + 5 * panels, 5), layout="constrained", squeeze=False)
names = list(dict.fromkeys(name for name, _ in points))
for axis in axes[0]:
    for (name, rho), (x, y) in points.items():
        place, radii = names.index(name), [r for n, r in points if n == name]
        look = dict(color=figures.COLOURS[place % 10], marker="os^DvPX*<>ph"[place % 12], ms=8 + 3 * radii.index(rho))
        across, up = ([[row.value - row.ci_low], [row.ci_high - row.value]] for row in (x, y))
        marker = axis.errorbar(
            x.value, y.value, up, across, capsize=2, label=figures.plain(name) if rho == radii[0] else None, **look
        )
        marker[0].set_markerfacecolor("white" if beaten[name, rho] else look["color"])
    axis.axhline(0, color="0.4", lw=0.8)
    axis.axvline(0, color="0.4", lw=0.8)
    axis.locator_params(nbins=5)
    axis.set(xlabel="test accuracy, minus the baseline's", ylabel="AUC of lira_shrunk, minus the baseline's")
if panels == 2:
    height = 1.25 * max(max(-y.ci_low, y.ci_high, 0.004) for _, y in near.values())
    axes[0, 1].set(xlim=(-0.02, 0.02), ylim=(-height, height), ylabel="", title="near the baseline")
figure.legend(*axes[0, 0].get_legend_handles_labels(), title="filled: Pareto-optimal", loc="outside right center")
figures.save(figure, run, "frontier")


# %%
def label(name, rho):
    """An optimizer and its radius, if it has one."""
    return f"{name} {rho:.2g}" if rho else name


signs = {key: (sign(x), sign(y)) for key, (x, y) in points.items() if key[1] > 0}  # in accuracy and in AUC
test, leak = {1: "better", 0: "no differently", -1: "worse"}, {1: "more", 0: "no differently", -1: "less"}
for kind in dict.fromkeys([(1, 1), *signs.values()]):  # the claim's first, then what else there is
    found = [label(*key) for key, both in signs.items() if both == kind]
    said = f"**{len(found)} test {test[kind[0]]} and leak {leak[kind[1]]}** than {baseline}: {joined(found)}"
    show_text(f"Of {len(signs)} sharpness-aware ensembles, {said}.")
failing = [label(*key) for key, (accuracy, _) in signs.items() if accuracy < 0 and key[1] == run.recipe(key[0]).rho]
show_text(f"At the radii and options of the table, these test *worse* than {baseline}: {joined(failing)}.")
show_text(f"Pareto-optimal: {joined(label(*key) for key, by in beaten.items() if not by)}.")
show_text(f"What beats {baseline}: {joined(label(*key) for key in beaten[baseline, 0.0])}.")

# %% [markdown]
# **How to read it.** Only an ensemble in the lower right quarter improves on the baseline in both respects. A chain
# of markers that rises to the right is the trade that the paper describes: accuracy is paid with privacy, whatever
# the optimizer's name. A chain that falls to the right contradicts it. Far to the left are radii or options that do
# not suit this data or this length of training; an author's defaults may be among them.

# %% [markdown]
# ## Defences: what each costs and buys
#
# **Claim.** Leakage can be lowered; the question is the price in accuracy.
#
# **Method.** Each defence is trained (or, for temperature, served) on the baseline's halves. The attacker knows the
# defence: the shadow models are trained and served in the same way. Beside LiRA we report the attack without shadow
# models, a threshold on the confidence. The figure shows `lira_shrunk`; results.csv has every headline attack.

# %%
defended = run.ensembles("defences")
defended |= {f"temperature {t}": compare.tempered(defended["none"], t) for t in (0.25, 4)}


def defence_table(found):
    """Accuracies, and every metric of the headline attacks and of a threshold on the confidence: a tidy frame."""
    scored = {k: compare.headline_scores(e) | {"confidence": compare.signal(e, "phi")} for k, e in found.items()}
    return pd.concat([compare.accuracies(found), compare.leakage(found, scored)], ignore_index=True)


costs = defence_table(defended)
results.add(costs, experiment="defences", rho="", n_models=len(defended["none"].ids))


# %%
def show_prices(costs, undefended, name):
    """A picture of accuracy and leakage, and a table of the differences from the undefended baseline."""
    costs = costs[costs.attack.isna() | costs.attack.isin(["lira_shrunk", "confidence"])]
    rates = sorted(float(metric[4:]) for metric in costs.metric.unique() if metric.startswith("tpr@"))
    rates = [0.001] if 0.001 in rates else rates[:1]
    panels = {"test_accuracy": "test accuracy", "auc": "AUC of lira_shrunk"}
    panels |= {f"tpr@{rate:g}": f"TPR of lira_shrunk at {100 * rate:g}% FPR" for rate in rates}
    is_threshold, own = costs.attack == "confidence", costs.baseline == ""
    drawn = costs[own & ~is_threshold].assign(optimizer="")  # one marker for all
    display(figures.save(figures.forest(drawn, panels, "label", undefended), run, name))
    what = costs.metric.map(panels).mask(is_threshold, costs.metric.map({"auc": "AUC of a threshold"}))
    steps = costs.assign(what=what, optimizer=costs.label, attack="", metric="", baseline="")[~own]
    show_table(steps.dropna(subset="what"), across=["what"])
    if 0.001 not in rates:
        show_text("There are too few non-members to report the TPR at 0.1% FPR, which needs ten false positives.")


show_prices(costs.assign(label=costs.optimizer), "none", "defences")

# %% [markdown]
# **How to read it.** The left panel shows the price, the others what it buys; the grey line is the undefended
# baseline. The table has the differences from it. Temperature changes no prediction. With two classes it changes no
# ranking that LiRA uses either. With more, it changes which examples the attack confuses, and an attacker who sees
# all probabilities can undo it. A defence that lowers the threshold attack but not LiRA only confuses an attacker who
# did not adapt.

# %% [markdown]
# ### With a guarantee: DP-SGD and DP-SAM
#
# Clipping every example's gradient and adding noise bounds what *any* attack can learn. An accountant computes the
# bound, $\epsilon$, for the change that we test: a training half with the example, against the same half with another
# example in its place, batches drawn without replacement. DP-SAM spends its budget on two noisy gradients a step. Both
# train for half as many epochs as the baseline: at the same $\epsilon$, fewer steps need less noise.
# The claimed $\epsilon$ is the accountant's. To check it from below, by an attack, takes many more models than these.

# %%
private, delta, arch = run.ensembles("private"), experiments.delta_of(run), experiments.private_arch(run)
if private:
    guard = compare.split_labels(defence_table(private), "epsilon")
    guard["coordinate"] = ["" if np.isinf(e) else f"epsilon={e:g}" for e in guard.epsilon]
    about = {"experiment": "private", "rho": "", "n_models": len(private[baseline, np.inf].ids)}
    results.add(guard, **about)
    named = guard.optimizer + (", " + guard.coordinate.str.replace("=", " ")).where(guard.coordinate != "", "")
    show_prices(guard.assign(label=named), baseline, "privacy")
    show_text(f"Every claim is for delta = {delta:g}.")
elif arch:
    show_text(f"Not run: fewer than 8 of {fewer} models of {arch} learn, even without noise.")
else:
    show_text(f"Not run: {run.arch} has BatchNorm, which mixes the examples of a batch, and no twin without it; or "
        f"{baseline} asks for gradients more than once in a step, which no accountant counts.")  # fmt: skip

# %% [markdown]
# **How to read it.** A claim bounds every attack, so it can be loose: our attack may find much less than it allows. On
# training halves this small, an $\epsilon$ of one digit costs much of the accuracy.

# %% [markdown]
# ## Who pays?
#
# **Claim.** SAM exposes the same examples as SGD, only more.
#
# **Method.** Per class: the AUC of `lira_shrunk` within each class, and the test accuracy of each class, since an
# overall accuracy can hide a class that nobody recognizes. Per example: its exposure is how well $\phi$ tells the
# models trained with it from those without it (AUC). We rank the examples by exposure and compare the ranks under the
# two optimizers on *different* models. We compare one optimizer with itself in the same way: noise alone keeps these
# ranks from agreeing perfectly.


# %%
def by_part(two, parts, accuracy):
    """AUC and test accuracy (the metric `accuracy`) within parts of the data: a tidy frame, also with part and size.

    parts: dict part -> (which of the pool, [N] bool; which of the test part, [T] bool). A part without members or
    non-members in some model has no AUC; one without test examples has no accuracy.
    """
    frames, member = [], np.array(two[baseline].member)
    groups, groups_test = run.dataset.groups, run.dataset.groups_test
    for part, (own, seen) in parts.items():
        inside, about = member[:, own], {"part": part, "size": own.sum()}
        if inside.any(1).all() and (~inside).any(1).all():
            how = {
                "shadow_correction": intervals.SHADOW_CORRECTION,
                "columns": groups if groups is None else groups[own],
            }
            for attack in catalogue.HEADLINES:
                scores = {name: compare.headline_scores(e)[attack][:, own] for name, e in two.items()}
                values = {name: intervals.auc_influence_values(s, inside) for name, s in scores.items()}
                frames.append(intervals.paired(values, "auc", True, **how).assign(attack=attack, **about))
        if seen.any():
            values = {name: compare.hits_on_test(e)[:, seen] for name, e in two.items()}
            columns = groups_test if groups_test is None else groups_test[seen]
            frames.append(intervals.paired(values, accuracy, True, columns=columns).assign(**about))
    return pd.concat(frames, ignore_index=True)


# %%
two = {name: made[name, 0.0 if name == baseline else run.recipe(name).rho] for name in (baseline, treatment)}
n_models = len(two[baseline].ids)
parts = {name: (run.dataset.y == c, run.dataset.y_test == c) for c, name in enumerate(run.dataset.classes)}
by_class = by_part(two, parts, "class_test_accuracy")
results.add(by_class, experiment="classes", coordinate="class=" + by_class.part, n_models=n_models)

_, label_of, counts = np.unique(run.dataset.y_test, return_inverse=True, return_counts=True)
weight = len(label_of) / (len(counts) * counts[label_of])  # the mean over the classes: all weigh alike
weighted = {name: compare.hits_on_test(e) * weight for name, e in two.items()}
balanced = intervals.paired(weighted, "balanced_test_accuracy", columns=run.dataset.groups_test)
results.add(balanced, experiment="classes", n_models=n_models)
show_table(balanced)
auc = by_class[(by_class.metric == "auc") & (by_class.attack == "lira_shrunk")]

# %%
if len(auc):
    one, other = (auc[(auc.optimizer == name) & (auc.baseline == "")].set_index("part") for name in two)
    figure, axis = plt.subplots(figsize=(5.4, 4.8), layout="constrained")
    bars = [[rows.value - rows.ci_low, rows.ci_high - rows.value] for rows in (other, one)]
    axis.errorbar(one.value, other.value, *bars, color="0.7", linestyle="", lw=0.8, zorder=1)
    sizes = axis.scatter(one.value, other.value, c=one["size"], cmap="viridis", s=40, zorder=2)
    for name in one.index[:12]:
        axis.annotate(
            figures.plain(name), (one.value[name], other.value[name]), (6, 4), textcoords="offset points", fontsize=8
        )
    axis.axline((one.value.iloc[0],) * 2, slope=1, color="0.4", lw=1, linestyle="--", label="equal")
    within = figures.plain(f"AUC of lira_shrunk within a class, {baseline}")
    axis.set(xlabel=within, ylabel=figures.plain(f"under {treatment}"))
    figure.colorbar(sizes, label="examples of the class in the pool", ticks=one["size"].quantile([0, 0.5, 1]).unique())
    axis.legend(fontsize=9)
    display(figures.save(figure, run, "classes"))

# %%
change = [sign(row) for row in auc[auc.baseline == baseline].itertuples()]
show_text(f"Of {len(change)} classes, {change.count(1)} leak more under {treatment}, {change.count(-1)} less.")
for name, rows in auc[auc.baseline == ""].groupby("optimizer", sort=False):
    worst = rows.loc[rows.value.idxmax()]
    said = f"AUC {number(worst)}, with {worst['size']} examples in the pool"
    show_text(f"Most exposed under {name}: class `{worst.part}`, {said}.")

# %%
member, rng = np.array(two[baseline].member), np.random.default_rng(0)
phis = {name: compare.signal(e, "phi") for name, e in two.items()}
compared = {name: (name, name) for name in two} | {f"{baseline} and {treatment}": (baseline, treatment)}
splits = []
for _ in range(8):
    half = np.repeat(rng.permutation(len(member) // 2) < len(member) // 4, 2)  # of the pairs of models
    one, other = (
        {name: memorization.exposure(phi[rows], member[rows]) for name, phi in phis.items()} for rows in (~half, half)
    )
    known = np.isfinite(one[baseline]) & np.isfinite(other[baseline])  # not in all models of a half, nor in none
    splits.append([memorization.spearman(one[a][known], other[b][known]) for a, b in compared.values()])
splits = np.array(splits).T  # [3, splits]
columns = {"value": splits.mean(1), "ci_low": splits.min(1), "ci_high": splits.max(1)}
agreement = pd.DataFrame({"optimizer": compared.keys(), **columns}).assign(metric="exposure_rank_correlation")
if splits[:2].min() > 0:
    # rho_corrected = rho_ab / sqrt(rho_aa rho_bb)  (Spearman 1904)
    (a, b, across), means = splits, splits.mean(1)
    each, value = across / np.sqrt(a * b), means[2] / np.sqrt(means[0] * means[1])
    last = {"optimizer": [*compared][2], "value": value, "ci_low": each.min(), "ci_high": each.max()}
    agreement.loc[3] = last | {"metric": "exposure_rank_correlation_corrected"}
    spread = f"from {each.min():.2f} to {each.max():.2f} over the splits"
    show_text(f"Corrected for noise, the ranks under the two optimizers agree at {value:.2f}, {spread}.")
else:
    show_text("The ranks are all noise here: in some splits even one optimizer does not agree with itself.")
results.add(agreement, experiment="agreement", n_models=n_models)
show_table(agreement)

# %% [markdown]
# **How to read it.** The correction divides the agreement across optimizers by what noise allows, the geometric mean
# of the agreements within each. Near 1, both optimizers expose the same people, and SAM only changes how much. Well
# below 1, SAM exposes others. If the splits range far on both sides of 1, the models are too few to tell. The intervals
# of this table are the range over random splits of the models, not confidence intervals.

# %% [markdown]
# ## Where atypical is known
#
# **Claim.** SAM memorizes atypical sub-patterns, gains on them, and exposes them.
#
# **Method.** In the data set `subclasses` we know every example's sub-pattern, and how many examples share it. That
# is a ground truth for "atypical" which uses no estimate. On other data this section has nothing to say.
#
# **How to read it.** Read a difference beside its level: where an AUC or a memorization is near 1 already, SAM has
# little to add.

# %%
if run.dataset.pattern is None:
    atypical = {}
    show_text(f"{run.dataset.name} has no known sub-patterns: `make study DATASET=subclasses` runs this section.")
else:
    edges, names = [1, 3, 10, 30, 100, np.inf], ["1 to 2", "3 to 9", "10 to 29", "30 to 99", "100 or more"]
    given = run.dataset.pattern, run.dataset.pattern_test
    count = np.bincount(given[0], minlength=1 + given[1].max())  # how many of the pool share each sub-pattern
    size, size_test = (np.array(pd.cut(count[p], edges, right=False, labels=names)) for p in given)
    parts = {name: (size == name, size_test == name) for name in names if (size == name).sum() >= 10}
    parts = {name: (own, seen & (seen.sum() >= 10)) for name, (own, seen) in parts.items()}
    frames = [by_part(two, parts, "test_accuracy")]
    memorized = {n: memorization.memorization(compare.signal(e, "confidence"), member).value for n, e in two.items()}
    for name, (own, _) in parts.items():
        values = {n: m[None, own] for n, m in memorized.items()}
        frames.append(intervals.paired(values, "mean_memorization", examples_only=True).assign(part=name))
    patterns = pd.concat(frames, ignore_index=True)
    results.add(patterns, experiment="sub-patterns", coordinate="shared by=" + patterns.part, n_models=n_models)
    for metric, rows in patterns.groupby("metric", sort=False):
        show_text(f"`{metric}`, by how many examples share a sub-pattern:")
        show_table(rows.assign(metric=rows.part))
    patterns = patterns[patterns.attack.isna() | (patterns.attack == "lira_shrunk")]
    cells = patterns.groupby(["optimizer", "baseline", "metric"], sort=False)
    atypical = {key: rows.loc[rows.value.idxmax(), ["part", "value"]] for key, rows in cells}

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above.

# %%
more, less = (sum(leak == s for _, leak in signs.values()) for s in (1, -1))
show_text(f"**Variants.** {more} of {len(signs)} sharpness-aware ensembles leak more than {baseline}, {less} less.")
lowered = costs[(costs.baseline == "none") & (costs.attack == "lira_shrunk") & (costs.metric == "auc")]
lowered = lowered[lowered.ci_high < 0].sort_values("value")
said = joined(f"{row.optimizer} ({percentage_points(row)})" for row in lowered.itertuples())
show_text(f"**Defences.** Without a guarantee, these lower the AUC of `lira_shrunk`, most first: {said}.")
if private:
    rows = guard[(guard.baseline == baseline) & (guard.metric == "test_accuracy")].itertuples()
    said = joined(f"{row.optimizer}, {row.coordinate} ({percentage_points(row)})" for row in rows)
    show_text(f"**With a guarantee**, and what it costs in accuracy: {said}.")
said = f"{change.count(1)} of {len(change)} classes leak more under {treatment}, {change.count(-1)} less"
show_text(f"**Who pays.** {said}.")
for (name, other, metric), (size, value) in atypical.items():
    who = f"{name} − {other}" if other else name
    show_text(f"**Atypical sub-patterns.** `{metric}` of {who} is largest where {size} share a pattern ({value:.3f}).")
trained = lowered[~lowered.optimizer.str.startswith("temperature")]  # which an attacker can undo
free = [n for n in trained.optimizer if select(costs, "none", optimizer=n, metric="test_accuracy").ci_high >= 0]
advice = f"Trained so, a model leaks less here without a measurable loss of accuracy: {joined(free)}."
if private:
    cheapest = guard[(guard.baseline == baseline) & (guard.metric == "test_accuracy")].sort_values("value").iloc[-1]
    price = (
        f"{cheapest.optimizer} at {cheapest.coordinate.replace('=', ' ')}: {percentage_points(cheapest)} of accuracy"
    )
    advice += f" Only the private optimizers bound what *any* attack can learn; the least it costs here is {price}."
show_text(f"**What to do.** {advice} An optimizer's name is no defence: audit the model that you ship.")
show_text(f"All numbers: `{results.path.name}` beside this notebook's copy.")

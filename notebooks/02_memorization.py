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
# # 2. Memorization: what does SAM remember?
#
# A model *memorizes* a training example if it is right about it only because it was trained on it (Feldman 2020). The
# paper says that SAM does not memorize less than SGD, but differently: more examples at a middling degree, where rare
# but not unique sub-patterns lie.
#
# **What this notebook shows.** Mean memorization is the generalization gap, so an optimizer that generalizes better and
# fits as well *must* memorize less on average. What can differ is which examples are memorized. You will see
# memorization and its standard error computed in a few lines, checked against exact leave-one-out and against planted
# faults, and then compared between the optimizers example by example. The ensembles are those of notebook 1; only the
# pool with planted faults is trained anew.

# %% tags=["setup"]
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from lib.analysis import compare, memorization
from lib.attacks import intervals
from lib.data.dataset import inputs
from lib.study import figures, settings
from lib.study.results import Results
from lib.study.text import describe_sign, joined, percentage_points, select, show_table, show_text
from lib.training.store import write_atomic

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
baseline, treatment = run.baseline, run.treatment
versus = {"optimizer": treatment, "baseline": baseline}  # the columns of a paired difference
figures.style()
show_text(run.describe())

# %% [markdown]
# ## Memorization in a few lines
#
# For a training algorithm $A$ and an example $i$ of the pool (Feldman & Zhang 2020),
#
# $$\mathrm{mem}(i) = \Pr_{h \sim A(S),\ i \in S}[h(x_i) = y_i] - \Pr_{h \sim A(S),\ i \notin S}[h(x_i) = y_i].$$
#
# $S$ is a random subset of the pool. An easy example is learned from the others: its memorization is 0. If nothing else
# resembles an example, models are right about it only if they saw it: its memorization is near 1.
#
# Every example is in some of the models and out of the others, so the estimate is a difference of two means, and it has
# a standard error for each example. (Every example is in half of our models. Feldman and Zhang used subsets of 0.7:
# `make study SUBSET=0.7` does so.)

# %%
ensembles = run.ensembles("main")
member = np.array(ensembles[baseline].member)  # [M, N]: was model m trained on example i?
results = Results("02_memorization", run, n_models=len(member))
correct = compare.signal(ensembles[baseline], "correct")  # [M, N]: is model m right about example i?

n_in, n_out = member.sum(0), (~member).sum(0)
p_in, p_out = (correct & member).sum(0) / n_in, (correct & ~member).sum(0) / n_out
estimate = p_in - p_out


def variance(p, n):
    """Of a proportion, with one success and one failure added: never 0, even if all models agree (Agresti & Caffo 2000)."""
    p = (n * p + 1) / (n + 2)
    return p * (1 - p) / (n + 2)


standard_error = np.sqrt(variance(p_in, n_in) + variance(p_out, n_out))
library = memorization.memorization(correct, member)
np.testing.assert_allclose(estimate, library.value, atol=1e-12)
np.testing.assert_allclose(standard_error, library.se, atol=1e-12)

# %% [markdown]
# We estimate memorization of two outputs: of *correctness*, as the paper does, and of the *confidence* $p_y$ in the true
# label, which is finer and is what attacks look at. `memorization.csv`, beside this copy, keeps every example's
# estimates under its index in the data as loaded.

# %%
outputs = {kind: {n: compare.signal(e, kind) for n, e in ensembles.items()} for kind in ("correct", "confidence")}
mem = {kind: {n: memorization.memorization(v, member) for n, v in of.items()} for kind, of in outputs.items()}
index = np.arange(len(run.dataset.y)) if run.dataset.index is None else run.dataset.index
frame = pd.DataFrame({"index": index, "class": np.array(run.dataset.classes)[run.dataset.y]})
for kind, of in mem.items():
    for name, found in of.items():
        frame[f"{kind}_{name}"], frame[f"{kind}_{name}_se"] = found.value.round(4), found.se.round(4)
write_atomic(Path(run.out) / "memorization.csv", frame.to_csv(index=False))
for kind in outputs:
    middle, most = np.quantile(mem[kind][baseline].se, [0.5, 0.95])
    show_text(
        f"With {len(member)} models the standard error for `{kind}` under {baseline} is {middle:.3f} in the median and "
        f"{most:.3f} at the 95th percentile; {len(member) * (most / 0.02) ** 2:.0f} models would bring "
        "the latter to 0.02."
    )

# %% [markdown]
# ## Can the estimates be believed?
#
# **Claim.** The estimate is how much leaving the example out would change the prediction on it.
#
# **Method.** For ridge regression, the effect of leaving example $i$ out of $S$ is known exactly:
# $h_i\,(y_i - f_S(x_i))/(1-h_i)$ with the leverage $h_i = x_i^\top(X_S^\top X_S + \lambda I)^{-1}x_i$. On ten examples we
# can train on *every* subset. There the estimate must equal the average of the formula. On random subsets it must miss
# by as much as its standard error says.

# %%
rng = np.random.default_rng(run.seed)
x, y, penalty = rng.normal(size=(10, 3)), rng.normal(size=10), 1.0
subsets = (np.arange(1024)[:, None] >> np.arange(10) & 1).astype(bool)
predicted, removed = np.empty((2, 1024, 10))
for s, chosen in enumerate(subsets):
    inverse = np.linalg.inv(x[chosen].T @ x[chosen] + penalty * np.eye(3))
    predicted[s] = x @ inverse @ x[chosen].T @ y[chosen]
    leverage = np.einsum("nd,de,ne->n", x, inverse, x)
    removed[s] = leverage * (y - predicted[s]) / (1 - leverage)
truth = np.array([removed[subsets[:, i], i].mean() for i in range(10)])
worst = np.abs(memorization.memorization(predicted, subsets).value - truth).max()
show_text(f"Over all {len(subsets):,} subsets the estimate differs from exact leave-one-out by at most {worst:.1e}.")

# %%
counts, errors, stated = [16, 32, 64, 128, 256, 512], [], []
for count in counts:
    draws = [rng.integers(1024, size=count) for _ in range(100)]
    draws = [d for d in draws if min(subsets[d].sum(0).min(), (~subsets[d]).sum(0).min()) > 1]
    found = [memorization.memorization(predicted[d], subsets[d]) for d in draws]
    errors.append(np.sqrt(np.mean([(f.value - truth) ** 2 for f in found])))
    stated.append(np.sqrt(np.mean([f.se**2 for f in found])))
figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
axis.loglog(counts, errors, "o", ms=8, label="root mean square error")
axis.loglog(counts, stated, "--", lw=2, label="standard error stated")
axis.set(xlabel="models", ylabel="error of memorization", xticks=counts, xticklabels=counts)
axis.minorticks_off()
axis.legend()
display(figures.save(figure, run, "memorization_convergence"))
slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
show_text(f"On random subsets the error falls as the number of models to the power {slope:.2f}.")

# %% [markdown]
# **How to read it.** Where the dots lie on the line, the standard error is honest. (In our ensembles a model without
# example $i$ has one other example in its place, since all halves are equally large: an effect of order $1/N$.)
#
# ### Planted faults
#
# **Claim.** The estimates rank examples as they should. What can only be memorized is at the top. What others stand in
# for is at the bottom.
#
# **Method.** We train the baseline once more, on a pool with planted faults. Some examples get a wrong label, which only
# memory can reproduce. Other examples get exact copies (twins), which teach what the example teaches: some drawn at
# random, and some of the most memorized ones. We compare their ranks in the pool before and after. Both trainings are as
# long as the longest of notebook 1, since a wrong label that is never fitted is not memorized.

# %%
n_pool = len(run.dataset.y)
n = max(2, n_pool // 200)
top = np.argsort(-mem["confidence"][baseline].value)
sources = np.concatenate([top[:n], rng.choice(top[n:], 3 * n, replace=False)])
faulty, wrong, twins = memorization.plant(run.dataset, 2 * n, sources, min(4, max(1, n_pool // 24)), seed=run.seed)
trained = run.ensembles("planted faults", dataset=faulty)  # "before" and "after"
planted = {
    when: memorization.memorization(compare.signal(e, "confidence"), np.array(e.member)).value
    for when, e in trained.items()
}
after = trained["after"]
fitted = compare.signal(after, "correct")[:, wrong][np.array(after.member)[:, wrong]].mean()
show_text(f"Models that were given the wrong labels reproduce {fitted:.0%} of them.")

# %%
kinds = {"wrong label": wrong, "memorized, given twins": sources[:n], "random, given twins": sources[n:]}
groups = {f"{kind}, {when}": m[rows] for kind, rows in kinds.items() for when, m in planted.items()}
groups["all others"] = np.delete(planted["after"], np.concatenate([sources, wrong, twins.ravel()]))
groups = {name: values for name, values in groups.items() if len(values)}
figure, axis = plt.subplots(figsize=(7.2, 0.6 * len(groups) + 1.1), layout="constrained")
for index, values in enumerate(groups.values()):
    axis.scatter(values, index + rng.uniform(-0.22, 0.22, len(values)), s=8, alpha=0.4, linewidth=0)
    axis.hlines(index, *np.quantile(values, [0.25, 0.75]), color="0.2", lw=3)
    axis.plot(np.median(values), index, "o", color="white", markeredgecolor="0.2", ms=7)
axis.set(yticks=range(len(groups)), yticklabels=groups, xlabel="memorization (of $p_y$)")
axis.invert_yaxis()
display(figures.save(figure, run, "planted"))

ranks = {when: stats.rankdata(m) / n_pool for when, m in planted.items()}  # the share of the pool memorized less
for kind, rows in kinds.items():
    # of a single row: Student's t interval
    change = intervals.estimate((ranks["after"][rows] - ranks["before"][rows])[None], examples_only=True)
    moved = intervals.row("rank_change_of_planted", change)
    now = {"metric": "rank_of_planted", "value": ranks["after"][rows].mean()}
    frame = pd.DataFrame([moved, now]).assign(optimizer=baseline)
    results.add(frame, experiment="planted faults", coordinate=f"kind={kind}", n_models=len(after.ids))
    words = describe_sign(frame.iloc[0], "rises", "falls", "does not move detectably")
    show_text(f"{kind}: the mean rank {words}, from {ranks['before'][rows].mean():.0%} to {now['value']:.0%}.")

# %% [markdown]
# **How to read it.** A dot is an example, and a bar holds the middle half of each kind. Where ranks fall with twins,
# memorization is a property of an example *in its pool*, not of the example alone. The same twins spoil membership
# attacks: a non-member with a near-copy among the members is effectively a member.

# %% [markdown]
# ## How much is memorized, and where
#
# **Claim.** SAM's memorization is not lower than SGD's. It is shifted to the middle, 0.6 to 0.85.
#
# **Method.** We compare the distributions of the estimates, the shares of examples in five bands, and the paired
# differences of these shares. Intervals come from leaving out groups of models and groups of examples.
#
# An estimate of correctness is a difference of two shares of models, so it lies on a lattice. A band counts as
# *resolved* if an example in its middle lands in it at least four times in five, and one in the middle of another band
# at most once in five. The verdict judges no band that is not resolved.

# %%
values = {name: mem["correct"][name].value for name in (baseline, treatment)}
figure, axes = plt.subplots(1, 2, figsize=(10.8, 3.4), sharex=True, sharey=True, layout="constrained")
bins = np.linspace(min(0, *map(np.min, values.values())), 1, 26)
for index, (axis, (name, of)) in enumerate(zip(axes, values.items(), strict=True)):
    axis.hist(of, bins, weights=np.full(len(of), 1 / len(of)), color=figures.COLOURS[index], alpha=0.7)
    axis.set(title=figures.plain(name), yscale="log", xlabel="memorization", ylabel="share of examples")
    for edge in memorization.EDGES:
        axis.axvline(edge, color="0.3", lw=1, linestyle=":")
figures.save(figure, run, "memorization")

# %%
# an example in the middle of a band is estimated as 1 - k / n, where k ~ Bin(n, 1 - mem) of the n models without it
# get it right nevertheless
k, middle = np.arange(n_out.min() + 1), np.array([0.05, 0.25, 0.5, 0.725, 0.925])
lands = memorization.bands(1 - k / k.max())  # the band of each possible estimate
chance = stats.binom.pmf(k[:, None], k.max(), 1 - middle)
landing = np.array([chance[lands == band].sum(0) for band in range(5)])  # [where it lands, where it is]
resolved = np.where(np.eye(5, dtype=bool), landing >= 0.8, landing <= 0.2).all(1)

tables = {}
flags = [dict(metric=f"band_is_resolved_{b}", value=v) for b, v in zip(memorization.BANDS, resolved, strict=True)]
flags = pd.DataFrame(flags).astype({"value": float}).assign(ci_low=np.nan, ci_high=np.nan, baseline=baseline)
for name in run.names[1:]:
    results.add(flags.assign(optimizer=name))
bands = ["< 0.1", "0.1-0.4", "0.4-0.6", "0.6-0.85", "> 0.85"]
show_text(
    f"With {n_in.min()} models in and {n_out.min()} out, these bands of correctness are resolved: "
    f"{joined(np.array(bands)[resolved])}. Not resolved: {joined(np.array(bands)[~resolved])}."
)
for kind, coordinate in (("correct", ""), ("confidence", "output=confidence")):
    for name in run.names[1:]:
        pair = {n: outputs[kind][n] for n in (baseline, name)}
        table = memorization.memorization_table(pair, member, run.published)
        tables[kind, name] = table
        again = (table.optimizer == baseline) & (name != run.names[1])  # the baseline's own rows are recorded once
        results.add(table[~again], coordinate=coordinate)
    show_table(tables[kind, treatment])

# %%
panels = {f"memorization of {kind}": tables[kind, treatment] for kind in outputs}
panels = {t: f[(f.baseline == baseline) & f.metric.str.contains("share")] for t, f in panels.items()}
figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), sharey=True, layout="constrained")
for index, (axis, (title, rows)) in enumerate(zip(axes, panels.items(), strict=True)):
    figures.error_bars(axis, bands, rows, index, linestyle="")
    axis.axhline(0, color="0.3", lw=1)
    axis.set(title=title, xlabel="band of memorization")
    axis.tick_params(axis="x", labelsize=9)
    axis.margins(x=0.12)
axes[0].set_ylabel(figures.plain(f"share of examples: {treatment} minus {baseline}"))
display(figures.save(figure, run, "memorization_bands"))
for kind in outputs:
    band = select(tables[kind, treatment], metric="memorization_share_0.6_0.85", **versus)
    words = describe_sign(band, "more examples than", "fewer examples than", "as many examples, within error, as")
    show_text(f"By `{kind}`, {treatment} has {words} {baseline} between 0.6 and 0.85 ({percentage_points(band)}).")

# %% [markdown]
# **How to read it.** Most examples are easy and lie at 0, so the first figure has a logarithmic axis. Noise smears an
# example at 0 over a band as wide as its standard error. It does so under both optimizers: compare the two, and not a
# band with zero.

# %% [markdown]
# ## Beside published scores
#
# **Claim.** What we call memorized is what others found hard.
#
# **Method.** Scores that someone has published for the same examples, such as consistency scores (Jiang et al. 2021),
# in the file `SCORES`, one number for each example of the data as loaded. We state the rank correlation of memorization
# with them, for each optimizer, and the paired difference. (If a high score means an easy example, it is negative.)

# %%
aligned = "No published scores are given (`make study SCORES=scores.npy`)."
if run.published is not None:
    found = pd.concat([tables[kind, treatment].assign(coordinate=kind) for kind in outputs])
    found = found[found.metric == "memorization_spearman_published"]
    show_table(found, across=["coordinate"])
    step = select(found, coordinate="correct", **versus)
    words = describe_sign(step, "higher under {a} than under {b}", "lower under {a} than under {b}", "no different")
    aligned = f"Its rank correlation with the published scores is {words.format(a=treatment, b=baseline)}."
show_text(aligned)

# %% [markdown]
# ## The mean is the generalization gap
#
# **Claim.** With equal subsets, mean memorization *is* train accuracy minus accuracy on the examples left out.
#
# **Why.** Average the definition over $i$. The first term becomes the accuracy of models on their members, the second
# their accuracy on non-members. No training algorithm enters. So of two optimizers that both fit their training set,
# the one that generalizes better *must* memorize less on average. "Not lower" is possible only where SAM fits better or
# generalizes worse.

# %%
accuracy = compare.accuracies(ensembles)
for name in (baseline, treatment):
    gap, mean = select(accuracy, metric="generalization_gap", optimizer=name).value, mem["correct"][name].value.mean()
    show_text(f"{name}: generalization gap {gap:.6f}, mean memorization {mean:.6f}, difference {abs(gap - mean):.1e}.")
mean = select(tables["correct", treatment], metric="mean_memorization", **versus)
fit = select(accuracy, metric="train_accuracy", **versus)
memorizes = describe_sign(mean, "more than", "less than", "no differently from")
met = describe_sign(mean, "more than met", "contradicted", "not contradicted")
show_text(
    f"Here {treatment} memorizes {memorizes} {baseline} on average ({percentage_points(mean)}), while its train accuracy "
    f"differs by {percentage_points(fit)}. So *not lower* is {met}."
)

# %% [markdown]
# **How to read it.** Compare distributions, not means: the mean says nothing that the accuracies do not say. (Where
# `subset` is not 0.5, examples are in unequal numbers of models, and the two numbers differ a little.)

# %% [markdown]
# ## Which examples moved?
#
# **Claim.** SAM memorizes *other* examples than SGD, not the same ones more or less.
#
# **Method.** We plot one optimizer's memorization against the other's, and test each example's paired change at a false
# discovery rate of 5% (Benjamini & Hochberg 1995). We pick the examples that moved most on one half of the models and
# show their change on the *other* half. On the same half they would seem to move further than they do.

# %%
moves = outputs["confidence"][treatment].astype(float) - outputs["confidence"][baseline]
change = memorization.memorization(moves, member)
df = np.minimum(n_in, n_out) - 1  # at least as cautious as Welch's
detected = stats.false_discovery_control(2 * stats.t.sf(np.abs(change.value) / np.maximum(change.se, 1e-9), df)) < 0.05
for sign, word in ((1, "more"), (-1, "less")):
    share = (detected & (np.sign(change.value) == sign)).mean()
    show_text(f"{treatment} memorizes {share:.1%} of the examples detectably {word} than {baseline} (of confidence).")

halves = [np.arange(len(member)) // 2 % 2 == k for k in (0, 1)]
picked, judged = (memorization.memorization(moves[half], member[half]).value for half in halves)
movers = {"more": np.argsort(-picked)[:8], "less": np.argsort(picked)[:8]}
values = {name: mem["confidence"][name].value for name in (baseline, treatment)}
figure, axis = plt.subplots(figsize=(4.8, 4.6), layout="constrained")
axis.scatter(*values.values(), s=9, alpha=0.35, linewidth=0)
ringed = [v[np.concatenate([*movers.values()])] for v in values.values()]
axis.scatter(*ringed, s=55, facecolor="none", edgecolor=figures.COLOURS[3], label="movers")
se = np.median(mem["confidence"][baseline].se)
axis.errorbar(0.02, 0.93, se, se, color="0.3", capsize=2, label="median standard error")
axis.plot([-0.1, 1], [-0.1, 1], color="0.5", lw=1, linestyle="--", label="equal")
under = [figures.plain(f"memorization under {name}") for name in (baseline, treatment)]
axis.set(xlabel=under[0], ylabel=under[1])
axis.legend(fontsize=9, loc="lower right")
figures.save(figure, run, "memorization_pairs")

# %%
names, (before, after) = np.array(run.dataset.classes)[run.dataset.y], values.values()
rows = {}
for word, chosen in movers.items():
    captions = [f"{names[i]}\n{before[i]:.2f} to {after[i]:.2f}\n({judged[i]:+.2f})" for i in chosen]
    rows[f"memorized {word} by {treatment}"] = list(zip(run.dataset.x[chosen], captions, strict=True))
figure, axes = plt.subplots(2, 8, figsize=(10.8, 4), layout="constrained")
for line, (title, pictures) in zip(axes, rows.items(), strict=True):
    line[0].set_title(figures.plain(title), fontsize=10, loc="left")
    for axis, (image, caption) in zip(line, pictures, strict=False):
        figures.picture(axis, image)
        axis.set_xlabel(figures.plain(caption), fontsize=8)
display(figures.save(figure, run, "movers"))
for word, chosen in movers.items():
    show_text(
        f"The examples picked as memorized {word} change by {picked[chosen].mean():+.3f} on the half that picked them and "
        f"by {judged[chosen].mean():+.3f} on the other half."
    )
rank = select(tables["confidence", treatment], metric="memorization_spearman", **versus)
show_text(f"The rank correlation of the two optimizers is {rank.value:.3f} [{rank.ci_low:.3f}, {rank.ci_high:.3f}].")

# %% [markdown]
# **How to read it.** Under each picture are its label, its memorization under the two optimizers over all models and, in
# brackets, the change on the half of the models that did not pick it. A rank correlation near 1 means that the two
# optimizers memorize the same examples.

# %% [markdown]
# ## Are the movers atypical, and do attacks find them?
#
# **Claim.** What SAM adds is memory of atypical sub-patterns, and attacks name these examples.
#
# **Method.** We correlate memorization and its change, over the examples and by rank, with four properties.
# *Atypicality*: the distance to the nearest examples of the own class over the distance to the nearest ones of another
# class, in input space. *Ambiguity*: the entropy of the predictions of models that did not see the example. *Exposure*:
# how well $\phi$ tells the models with the example from those without it, as an AUC over models; LiRA lives on this. And
# the change of exposure. Memorization comes from one half of the models and the properties from the other; then the
# halves swap. From the same models, both would share their errors, and would correlate where there is nothing.

# %%
phi = {name: compare.signal(ensembles[name], "phi") for name in (baseline, treatment)}
unsure = compare.signal(ensembles[baseline], "entropy")
x, y = inputs(run.dataset)[0].reshape(n_pool, -1), run.dataset.y
k = min(5, np.bincount(y).min() - 1)
own, distance = np.eye(run.dataset.n_classes, dtype=bool)[y], np.empty((n_pool, run.dataset.n_classes))
for c in range(run.dataset.n_classes):  # the mean distance of each example to its k nearest of class c
    nearest = NearestNeighbors(n_neighbors=k + 1).fit(x[y == c]).kneighbors(x)[0]
    distance[:, c] = np.where(y == c, nearest[:, 1:].mean(1), nearest[:, :-1].mean(1))  # the nearest may be itself
atypical = distance[own] / np.maximum(np.where(own, np.inf, distance).min(1), 1e-12)
sides = []
for one, two in (halves, halves[::-1]):
    exposed = {name: memorization.exposure(p[two], member[two]) for name, p in phi.items()}
    traits = {
        "ambiguity": np.average(unsure[two], 0, ~member[two]),
        "atypicality": atypical,
        "exposure": exposed[baseline],
        "change of exposure": exposed[treatment] - exposed[baseline],
    }
    of_baseline, moved = (
        memorization.memorization(v[one], member[one]).value for v in (outputs["confidence"][baseline], moves)
    )
    sides.append(({"memorization": of_baseline, "change of memorization": moved}, traits))
keys = [(quantity, trait) for quantity in sides[0][0] for trait in sides[0][1]]


def correlations(_, columns):
    """Rank correlation of each quantity with each trait over some examples, averaged over the two halves: [8]."""
    return np.mean([[memorization.spearman(q[a][columns], t[b][columns]) for a, b in keys] for q, t in sides], 0)


rows = [
    intervals.row("spearman_" + trait.replace(" ", "_"), estimate, coordinate=f"quantity={quantity}")
    for (quantity, trait), estimate in zip(keys, memorization.jackknife(correlations, member), strict=True)
]
traits = pd.DataFrame(rows)
is_change = traits.coordinate == "quantity=change of memorization"
traits["optimizer"] = np.where(is_change, treatment, baseline)
traits["baseline"] = np.where(is_change, baseline, "")
results.add(traits, experiment="example traits")
show_table(traits.drop(columns=["optimizer", "baseline"]), across=["coordinate"])
for row in traits[is_change].itertuples():
    words = describe_sign(row, "higher", "lower", "neither higher nor lower")
    show_text(
        f"Where {treatment} memorizes more than {baseline}, {row.metric[9:].replace('_', ' ')} is {words} ({row.value:+.2f})."
    )

# %% [markdown]
# **How to read it.** The intervals speak of new examples, given these models. Noise in the estimates pulls correlations
# towards 0. The paper describes a change that rises with ambiguity and atypicality; if it falls with them, SAM memorizes
# its odd examples *less*. Where the change of exposure follows the change of memorization, attacks find what the
# optimizer moved.

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above.

# %%
band = select(tables["correct", treatment], metric="memorization_share_0.6_0.85", **versus)
exposed = select(traits, metric="spearman_change_of_exposure", **versus)
where = describe_sign(band, "more", "fewer", "not detectably more or fewer")
judged_band = "" if resolved[3] else f"; {len(member)} models do not resolve this band"
leaks = describe_sign(exposed, "more exposed", "less exposed", "neither more nor less exposed")
worst = np.argsort(-mem["confidence"][treatment].value)[: max(1, n_pool // 100)]
advice = (
    f"Before you ship a model trained with {treatment}, look at the examples that it memorizes most "
    f"(`memorization.csv`, sorted): the top hundredth, {len(worst)} examples, has a mean memorization of "
    f"{mem['confidence'][treatment].value[worst].mean():.2f} of confidence. Correct wrong labels among them, and leave out "
    "what must not be disclosed: an attack finds these first. "
) + describe_sign(
    exposed,
    f"The list is that of {treatment}, not of {baseline}: where memorization moved, exposure moved with it.",
    f"Where {treatment} memorizes more, exposure falls here, so rank by exposure, not by memorization.",
    f"A list made under {baseline} serves as well: we detect no exposure that moved with memorization.",
)
show_text(f"""
- **How much.** {treatment} memorizes {memorizes} {baseline} on average ({percentage_points(mean)} of correctness).
- **Where.** Between 0.6 and 0.85 there are {where} examples than under {baseline} ({percentage_points(band)}{judged_band}).
- **Who.** The rank correlation of the two is {rank.value:.2f}; {detected.mean():.1%} of the examples moved detectably.
- **Does it leak?** Examples that {treatment} memorizes more than {baseline} are {leaks} under it ({exposed.value:+.2f}).
- **Published scores.** {aligned}

**What an engineer should do.** {advice}

All numbers of this run: `{results.path.name}` beside this notebook's copy.
""")

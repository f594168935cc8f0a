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
# # 1. The phenomenon: does sharpness-aware training reveal who was in the training data?
#
# Sharpness-aware minimization (SAM) looks for weights whose whole neighbourhood has a low loss. It often generalizes
# better than SGD. A model that generalizes better should reveal less about its training data, one would think.
# *Membership Privacy Risks of Sharpness-Aware Minimization* (arXiv 2310.00488) reports the opposite: SAM tests better
# **and** leaks more.
#
# **What this notebook shows.** Two ensembles with the same settings, one trained with SGD and one with SAM: how they
# test, how they fit, and how much each attack learns about their members. On the way you will see SAM's step and the
# attack LiRA written out in a few lines, every attack side by side, and two controls. Whether the answer holds for tuned
# settings, at equal loss and for other radii is the subject of notebook 5. The last section sums up the run that you are
# looking at.
#
# **Why the comparison is fair.** We train two ensembles of models, one with each optimizer. Model $k$ of either
# ensemble has the same half of the data, the same initial weights and the same order of batches. So every comparison is
# *paired*, and every estimate has a 95% interval.

# %% tags=["setup"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display
from sklearn.metrics import roc_curve
from sklearn.neighbors import NearestNeighbors
from torch.func import functional_call, grad

from lib.analysis import compare, flatness, memorization
from lib.attacks import catalogue, intervals, membership, shadow
from lib.data.dataset import inputs
from lib.study import experiments, figures, settings, text
from lib.study.results import Results
from lib.study.text import describe_sign, percentage_points, select, show_table, show_text
from lib.training import sharpness
from lib.training.ensemble import device_of

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
than = ("more than", "less than", "no differently from")
figures.style()
show_text(run.describe())

# %% [markdown]
# ## Membership inference in three pictures
#
# **The game.** Someone holds an example and a trained model, and guesses whether the model was trained on the example.
# If the guesses are good, the model reveals who is in its data: a patient in a hospital's study, say.
#
# **The strong attack.** LiRA trains *shadow* models of its own, some with the example and some without. Then it asks
# which of the two groups the target model resembles. It describes a model's output by
# $\phi = \log p_y - \log(1-p_y)$, the confidence in the true label on a scale without a ceiling.
#
# **Our ensembles.** We train $M$ models, each on a random half of one pool of $N$ examples. Models $2k$ and $2k+1$
# split the pool between them, so every example is in exactly half of the models. Each model in turn is the target. All
# others are its shadows, except for its partner, whose half would give the answer away.

# %%
ensembles = run.ensembles("main")
member = np.array(ensembles[baseline].member)  # [M, N]: was model m trained on example i?
phis = {name: compare.signal(e, "phi") for name, e in ensembles.items()}  # [M, N] each
results = Results("01_phenomenon", run, n_models=len(member))

phi = phis[baseline]
rise = np.average(phi, 0, member) - np.average(phi, 0, ~member)  # what training on an example does to its phi
example = np.argsort(rise)[-1 - len(rise) // 100]
seen = member[:, example]


def draw_hills(axis, inside, outside, labels):
    """Two filled histograms on common bins, told apart by colour and outline."""
    bins = np.histogram_bin_edges(np.concatenate([inside, outside]), 30)
    for index, (values, label) in enumerate(zip((inside, outside), labels, strict=True)):
        colour, line = figures.COLOURS[2 + index], figures.LINES[index]
        look = dict(edgecolor=colour, facecolor=(*colour, 0.3), linestyle=line, linewidth=1.8, label=label)
        axis.hist(values, bins, density=True, histtype="stepfilled", **look)
    axis.legend(fontsize=9)


figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), width_ratios=[1, 2, 2], layout="constrained")
figures.picture(axes[0], run.dataset.x[example])
draw_hills(axes[1], phi[seen, example], phi[~seen, example], ("trained with it", "trained without it"))
draw_hills(axes[2], phi[0, member[0]], phi[0, ~member[0]], ("members", "non-members"))
axes[0].set_title(figures.plain(f"a '{run.dataset.classes[run.dataset.y[example]]}' from the pool"))
axes[1].set(title="one example, many models", xlabel=r"confidence $\phi$", ylabel="density of models")
axes[2].set(title="one model, many examples", xlabel=r"confidence $\phi$", ylabel="density of examples")
figures.save(figure, run, "attack")

# %% [markdown]
# **How to read it.** Left: an example from the hundredth of the pool that training changes most. Middle: the
# confidence in its label, of the models trained with it and of those trained without it. Where the two hills part,
# membership is plain to see. Right: what an attacker without shadow models sees, one model and the hills of its members
# and non-members. An easy example lies on the right of this picture whether it was a member or not. That is why a
# strong attack judges every example by its own two hills.

# %% [markdown]
# ## The data
#
# Each column shows some examples of one class. Every model trains on half of the pool, and the other half are its
# non-members. No model trains on the test part.

# %%
n_shown = min(run.dataset.n_classes, 10)
figure, axes = plt.subplots(4, n_shown, figsize=(n_shown, 4.2), squeeze=False)
for label in range(n_shown):
    for axis, i in zip(axes[:, label], np.flatnonzero(run.dataset.y == label), strict=False):
        figures.picture(axis, run.dataset.x[i])
    axes[0, label].set_title(figures.plain(run.dataset.classes[label]), fontsize=10)
for axis in axes.flat:
    axis.set_axis_off()
figures.save(figure, run, "data")

# %% [markdown]
# A non-member with a near-copy among the members is effectively a member. We keep such examples and report how many
# there are. An exact copy has the same bytes. A near-copy is closer than half the median distance between nearest
# neighbours; plain skies and dark pictures can be that close without being copies.

# %%
x, x_test = (part.reshape(len(part), -1) for part in inputs(run.dataset))
content, content_test = (pd.Series([a.tobytes() for a in part]) for part in (run.dataset.x, run.dataset.x_test))
search, y = NearestNeighbors(n_neighbors=1, algorithm="brute"), pd.Series(run.dataset.y)
distance, nearest = (found[:, 0] for found in search.fit(x).kneighbors())  # to another example of the pool
distance_test = search.fit(x_test).kneighbors(x)[0][:, 0]
exact, exact_test = content.duplicated(keep=False), content.isin(content_test)
near = np.median(distance[~exact]) / 2
other = np.where(exact, y.groupby(content).transform("nunique") > 1, y != y.to_numpy()[nearest])  # of another label
count = {}
for kind, limit in (("exact", 0), ("near", near)):
    twins = exact | (distance < limit)
    count[f"{kind}_duplicates"], count[f"{kind}_duplicates_other_label"] = twins.sum(), (twins & other).sum()
    count[f"{kind}_test_twins"] = (exact_test | (distance_test < limit)).sum()
results.add(pd.DataFrame(count.items(), columns=["metric", "value"]), experiment="duplicates", optimizer="")
for kind in ("exact", "near"):
    twins, other, test = (count[f"{kind}_{what}"] for what in ("duplicates", "duplicates_other_label", "test_twins"))
    show_text(
        f"Examples with {kind} copies in the pool: {twins} ({other} have another label); in the test part: {test}."
    )

# %% [markdown]
# ## SAM's step
#
# SGD steps along the gradient at the weights $w$. SAM first climbs to the worst point near $w$, to first order, and
# takes the gradient there:
#
# $$g = \nabla L(w), \qquad g_\mathrm{SAM} = \nabla L\Big(w + \rho\,\frac{g}{\lVert g\rVert}\Big).$$
#
# The optimizer then steps from $w$ along $g_\mathrm{SAM}$. Here is the whole of it, on a trained model and one batch of
# its members. The library's rule, with which the ensemble was trained, gives the same.

# %%
k = int(ensembles[treatment].ids[0])
net, weights, buffers = ensembles[treatment].weights(k)
batch = np.flatnonzero(member[0])[: run.batch_size]
x, y = torch.from_numpy(inputs(run.dataset)[0][batch]), torch.from_numpy(run.dataset.y[batch])


def loss(w):
    return F.cross_entropy(functional_call(net, (w, buffers), (x,)), y)


g = grad(loss)(weights)
length = torch.sqrt(sum((part**2).sum() for part in g.values())) + 1e-12  # never zero
worst = {name: w + run.rho * g[name] / length for name, w in weights.items()}
g_sam = grad(loss)(worst)

from_library, _ = sharpness.sam(lambda w: (grad(loss)(w), None), weights, torch.tensor(run.rho))
torch.testing.assert_close(g_sam, from_library, rtol=1e-3, atol=1e-5)
show_text(f"The batch's loss is {loss(weights):.2g} at the weights and {loss(worst):.2g} a distance {run.rho} uphill.")

# %% [markdown]
# ## Training
#
# **Claim.** SAM reaches a better test accuracy than SGD on the same halves.
#
# **Method.** The two differ in the gradient alone. We choose nothing by the test points and pick no checkpoint: the
# last weights are what we report.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
titles = {"train loss": "cross-entropy (nats)", "train accuracy": "share correct", "test accuracy": "share correct"}
for index, (name, ensemble) in enumerate(ensembles.items()):
    for axis, values in zip(axes, np.moveaxis(np.array(ensemble.history), 2, 0), strict=True):  # [M, epochs]
        at = np.flatnonzero(~np.isnan(values).any(0))
        look = figures.look(index, name) | {"marker": "."}
        axis.plot(at + 1, values[:, at].mean(0), **look)
        axis.fill_between(at + 1, *np.quantile(values[:, at], [0.025, 0.975], axis=0), color=look["color"], alpha=0.2)
for axis, (title, ylabel) in zip(axes, titles.items(), strict=True):
    axis.set(title=title, ylabel=ylabel, xlabel="epoch")
axes[0].set_yscale("log")
axes[0].legend()
figures.save(figure, run, "training")

# %% [markdown]
# Lines are means over the models, and bands hold 95% of them. In the table, a column "a − b" is a paired difference:
# the same halves, initial weights and orders on both sides.

# %%
accuracy = compare.accuracies(ensembles)
results.add(accuracy)
show_table(accuracy)
test = select(accuracy, metric="test_accuracy", **versus)
better = describe_sign(test, "better than", "worse than", "no differently from")
show_text(f"{treatment} tests {better} {baseline}: {percentage_points(test)}.")

# %% [markdown]
# **How to read it.** The generalization gap is the accuracy on the training half minus the accuracy on the other half.
# It is also the mean memorization (notebook 2). So of two optimizers that fit their training data, the one that
# generalizes better memorizes *less on average*. The question is whether this makes it harder to attack.

# %% [markdown]
# ## LiRA in a dozen lines
#
# For a target model and an example, LiRA takes the other models that were trained with the example (IN) and those that
# were trained without it (OUT). It fits a normal distribution to the $\phi$ of each group. Its score is the log
# likelihood ratio of the target's own $\phi$:
#
# $$\log \mathcal{N}(\phi;\ \mu_\mathrm{in}, \sigma_\mathrm{in}^2) - \log \mathcal{N}(\phi;\ \mu_\mathrm{out}, \sigma_\mathrm{out}^2).$$
#
# The cell does this for the first targets, for all examples at once. The library does it for all targets and gives the
# same.

# %%
partner = membership.partners(member)  # the model trained on the other half; None if the subsets are no halves
scores = []
for target in range(8):
    shadows = np.ones_like(member)
    shadows[target if partner is None else [target, partner[target]]] = False
    log_density = {}
    for side, chosen in (("in", shadows & member), ("out", shadows & ~member)):
        mean = phi.mean(0, where=chosen, dtype=float)
        variance = np.maximum(phi.var(0, where=chosen, dtype=float), 1e-12)
        log_density[side] = -((phi[target] - mean) ** 2) / (2 * variance) - np.log(variance) / 2
    scores.append(log_density["in"] - log_density["out"])
np.testing.assert_allclose(scores, shadow.lira(phi, member)[:8], rtol=1e-3, atol=1e-3)

# the share of pairs of a member and a non-member in which the member scores higher
auc = [np.searchsorted(np.sort(s[~m]), s[m]).mean() / (~m).sum() for s, m in zip(scores, member, strict=False)]
show_text(f"LiRA's AUC against these models is {np.mean(auc):.3f}; a coin has 0.5.")

# %% [markdown]
# ## All attacks
#
# **Claim.** SAM's models leak more about their members, under every attack.
#
# **Method.** Each model in turn is the target of each attack.
#
# | attack | what it looks at |
# |---|---|
# | `gap` | is the prediction correct? |
# | `loss` | is the loss below the members' mean loss? (Yeom et al. 2018) |
# | `confidence`, `entropy`, `m_entropy` | is the output beyond a threshold? (Song & Mittal 2021) `_classwise`: one threshold for each class |
# | `lira` | the likelihood ratio of the output with and without the example (Carlini et al. 2022). `_shrunk`: each example's variance is drawn towards a common one, by empirical Bayes; `_offline`: no shadow model was trained on the example |
# | `neural` | a small network on confidence, entropy and modified entropy at once, trained, stopped and judged on three different parts of all models (Shokri et al. 2017). `_classwise`: one threshold for each class |
# | `rmia` | how the output compares with the outputs on other examples (Zarifzadeh et al. 2024; `lib/attacks/shadow.py` says why `gamma` is 1). `_offline`: as above |
#
# Thresholds are learned on one half of the examples and judged on the other. Thresholds for a fixed false positive rate
# (FPR) are learned on other models, as an attacker would learn them on shadow models; we report the FPR actually
# obtained beside the true positive rate (TPR). Intervals treat models and examples as two crossed samples, so they speak
# of new models *and* new examples (Cameron, Gelbach & Miller 2011; Owen 2007). Targets share their shadow models, which
# we correct for by a factor fitted in simulation (`lib/attacks/intervals.py`).

# %%
scored = {name: compare.scores(e) for name, e in ensembles.items()}  # attack -> [M, N]
leak = compare.leakage(ensembles, scored)
results.add(leak)
own = leak[leak.baseline == ""]
show_table(own[own.metric.isin(["auc", "balanced_accuracy"])], across=["metric", "optimizer"])

# %% [markdown]
# `combined` is the mean of an example's ranks by `lira_shrunk` and by `rmia`. These three are the *headline* attacks:
# wherever this study compares whole ensembles by one number, it reports each of them, whatever they say.
#
# The strict end: how many members can an attacker name while hardly anyone is accused wrongly? The FPR obtained should
# be close to the one asked for. RMIA compares an example with a finite number of others, so its scores tie, and it
# cannot reach an FPR far below one over that number.

# %%
strict = own[own.metric.str.startswith(("tpr@", "realised_fpr@")) & own.attack.isin(catalogue.HEADLINES)]
show_table(strict, across=["attack", "optimizer"])

# %% [markdown]
# Here every second candidate is a member; in life it may be one in a hundred. The next table says how many of those whom
# the attacker names were members, if 1% or 10% of the candidates are. That is $\pi\,\mathrm{TPR} / (\pi\,\mathrm{TPR} +
# (1 - \pi)\,\mathrm{FPR})$ at the prevalence $\pi$.

# %%
precision = intervals.precisions(leak)
results.add(precision)
show_table(precision[precision.attack.isin(catalogue.HEADLINES)], across=["attack", "optimizer"])

# %% [markdown]
# And the paired differences. To the right of the line, the sharpness-aware ensemble leaks more.

# %%
differences = leak[leak.baseline == baseline]
for metric, label in (("auc", "AUC"), ("balanced_accuracy", "balanced accuracy")):
    frame = differences[differences.metric == metric]
    display(
        figures.save(
            figures.forest(frame, {metric: f"difference in {label} from {baseline}"}), run, f"difference_{metric}"
        )
    )
    rows = frame[frame.optimizer == treatment]
    named = rows.attack.groupby([describe_sign(row, *than) for row in rows.itertuples()], sort=False).agg(text.joined)
    said = "; ".join(f"{way} {baseline} under {attacks}" for way, attacks in named.items())
    show_text(f"In {label}, {treatment} leaks {said}.")

# %% [markdown]
# The ROC curves of `lira_shrunk`, on logarithmic axes. At the strict end, on the left, an attack accuses few examples
# and is nearly always right. The curves end where ten false positives are expected.

# %%
figure, axis = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
grid = np.geomspace(10 / (~member).sum(), 1, 200)
for index, (name, attacks) in enumerate(scored.items()):
    rates = roc_curve(member.ravel(), attacks["lira_shrunk"].ravel())[:2]  # all targets pooled
    axis.plot(grid, np.interp(grid, *rates), **figures.look(index, name) | {"marker": ""}, lw=2)
axis.plot(grid, grid, color="0.5", lw=1, label="guessing")
axis.set(xscale="log", yscale="log", xlabel="false positive rate", ylabel="true positive rate")
axis.legend(loc="lower right")
figures.save(figure, run, "roc")

# %% [markdown]
# ### Who is exposed?
#
# **Claim.** It is not chance who is exposed: other models, from other seeds, expose the same examples.
#
# **Method.** An example's *exposure* is its mean score by `lira_shrunk` over the models trained on it, minus the mean over
# the others. We cut the models into two halves and let each half, with its own models as shadows, name the 1% most
# exposed. The table has the ten most exposed of all models, by their number in the pool. These are the highest of many,
# so part of their height is chance.

# %%
exposed = compare.exposure_table(ensembles, scored)
results.add(exposed)
people = exposed[exposed.metric == "exposure"]
show_table(people.assign(metric=people.coordinate, attack=""))
for row in exposed[exposed.metric == "exposed_in_both_halves"].itertuples():
    chance = select(exposed, metric="exposed_by_chance", optimizer=row.optimizer).value
    share = f"{row.value:.0%} [{row.ci_low:.0%}, {row.ci_high:.0%}]"
    show_text(
        f"{row.optimizer}: {share} of those whom one half names, the other half names too; by chance {chance:.0%}."
    )
if "exposed_in_both_halves" not in set(exposed.metric):
    show_text("Too few models or examples to compare two halves: it takes 12 models in halves, and 1,000 examples.")

# %% [markdown]
# ### An attacker who sees only the label
#
# **Claim.** An attacker who sees no confidence, only the predicted label, learns less.
#
# **Method.** Training pushes an example away from the decision boundary (Choquette-Choo et al. 2021). So the attacker
# asks about many versions of the example and counts how often the label is right. Versions of a picture are shifted and
# mirrored; versions of a table's row have noise or flipped bits. `label_once` asks about the example as it is; any gain
# over it comes from distance to the decision boundary. SAM moves the boundary away from *every* example, so it may look
# safer here. The targets are the models whose weights are kept. The size of the shift or of the noise is chosen on other
# models. No change at all is one of the choices, since an easy example is right under every shift whether it was a
# member or not. Of images, at most a thousand examples are asked about. `null_auc` is the AUC with shuffled membership,
# where 0.5 is right.

# %%
n_targets = 16 if run.is_small else 8
n_asked = None if run.is_small else min(1000, 2**20 // run.dataset.x[0, 0].size)  # fewer where images are large
labels = compare.label_only_table(ensembles, n_targets, device_of(run.device), n_asked)
results.add(labels)
show_table(labels[labels.metric.isin(["auc", "balanced_accuracy", "null_auc"])])
row = select(labels, attack="label_only", metric="auc", **versus)
show_text(
    f"By labels alone, {treatment} leaks {describe_sign(row, *than)} {baseline}: {percentage_points(row)} of AUC."
)

# %% [markdown]
# ## What the outputs look like
#
# **Claim.** SAM's outputs on non-members vary less, so members stand out.
#
# **Method.** "Vary" can mean two things, and we measure both. *Across examples*: the spread of one model's outputs over
# all the examples that it did not see. The paper's theorem speaks of this one. *Across models*: the spread of one
# example's output over the models that did not see it. LiRA divides by this one.

# %%
size = (5.2 * len(phis), 3.4)
figure, axes = plt.subplots(1, len(phis), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
for axis, (name, phi_of) in zip(axes[0], phis.items(), strict=True):
    draw_hills(axis, phi_of[member], phi_of[~member], ("members", "non-members"))
    axis.set(title=figures.plain(name), xlabel=r"$\phi$", ylabel="density")
display(figures.save(figure, run, "phi"))
spread = compare.variances(ensembles)
results.add(spread)
show_table(spread)
for metric in spread.metric[spread.baseline == ""].unique():
    words = describe_sign(select(spread, metric=metric, **versus), *than)
    show_text(f"`{metric}`: {treatment} varies {words} {baseline}.")

# %% [markdown]
# **How to read it.** $\phi$ has no ceiling. Longer training stretches it for members and non-members alike, so its
# variance alone says little about how well the two can be told apart. The confidence $p_y$ lies between 0 and 1 and
# cannot be stretched like that.

# %% [markdown]
# ## How flat are the minima?
#
# **Claim.** The sharpness-aware minima are flatter.
#
# **Method.** On each model's own training half we measure the largest eigenvalue of the Hessian, by power iteration, and
# how far the loss can rise within a ball of radius $\rho$ around the weights.

# %%
sharpness_of = {name: flatness.flatness(e, run.rho) for name, e in ensembles.items()}  # [models, 2] each
pairs_of_models = {name: found.reshape(-1, 2, 2).mean(1) for name, found in sharpness_of.items()}
frames = []
for column, metric in enumerate(("hessian_top_eigenvalue", "loss_rise_in_ball")):
    values = {name: found[None, :, column] for name, found in pairs_of_models.items()}
    frames.append(intervals.paired(values, metric, log_ratio_from=0.0, examples_only=True))  # Student's t over pairs
flat = pd.concat(frames, ignore_index=True)
results.add(flat)
show_table(flat)
for metric in flat.metric[flat.baseline == ""].unique():
    row = select(flat, metric=metric, **versus)
    words = describe_sign(row, "sharper than", "flatter than", "neither flatter nor sharper than")
    show_text(f"`{metric}`: {treatment} is {words} {baseline}.")

# %% [markdown]
# ## A control: shuffled membership
#
# **Claim.** None of the above is an artefact of the attacks or of how we score them.
#
# **Method.** We attack the same logits with membership matrices that have the same design but say nothing about
# training. A sound attack can only guess: its AUC is 0.5. One 95% interval in twenty misses by chance, and the attacks
# share shuffles, so their errors are correlated.

# %%
first = ensembles[treatment].only(ensembles[treatment].ids[:128])  # a control needs no more models
null = compare.null_table(first, run.seed)
results.add(null, experiment="null control", optimizer=treatment, n_models=len(first.ids))
show_table(null, across=["metric"])
show_text(text.null_control(null))

# %% [markdown]
# ## Another control: a planted leak
#
# **Claim.** The attacks find a leak that is certainly there.
#
# **Method.** We plant the example that models find hardest without training on it: it enters the pool many times (fewer
# times in a small pool), and all copies go to the same side of every split. So of two partners, one was trained on the
# example many times and the other never. We train the baseline on halves of this pool. An attack finds the leak in a
# pair of partners if the example's score is higher in the one that was trained on it. A coin would find half.

# %%
hardest = int(np.average(phi, 0, ~member).argmin())
times = min(50, member.shape[1] // 4 * 2)
leaky, place = memorization.leak(run.dataset, hardest, times, seed=run.seed)
planted = run.ensembles("planted leak", dataset=leaky)["leak"]


def pairs_found(scored, member, place, times):
    """In what share of pairs of partners each attack scores the one that saw an example higher; a tie counts half."""
    seen = member[:, place].reshape(-1, 2)
    pairs = np.flatnonzero(seen[:, 0] != seen[:, 1])[: experiments.PLANTED // 2]
    inside, rows = 2 * pairs + seen[pairs].argmax(1), []  # the models that saw it; a partner is one number up or down
    for attack, score in scored.items() if len(pairs) else ():
        ahead = np.sign(score[inside, place] - score[inside ^ 1, place])
        share = intervals.proportion((1 + ahead).sum() / 2, len(pairs))
        rows.append(intervals.row("planted_pairs_found", share, attack=attack))
    frame = pd.DataFrame(rows, columns=["attack", "metric", "value", "ci_low", "ci_high"])
    return frame.assign(optimizer=baseline, baseline="", coordinate=f"times={times}", n_models=2 * len(pairs))


found = pairs_found(compare.scores(planted), np.array(planted.member), place, times)
results.add(found, experiment="planted leak", n_models=found.n_models, n_examples=len(leaky.y))
show_text(f"Trained {times} times: {text.planted_leak(found)}")

# %% [markdown]
# Beside it the same example in the main ensemble, which was trained on it once.

# %%
once = pairs_found(scored[baseline], member, hardest, 1)
results.add(once, experiment="planted leak", n_models=once.n_models)
show_text(f"Trained once: {text.planted_leak(once)}")
show_table(pd.concat([found, once]), across=["coordinate"])

# %% [markdown]
# **How to read it.** The numbers are shares of pairs, with exact intervals. A few pairs can show that an attack works,
# but not how well. `entropy` sees how sure a model is, but not of which label: it may miss the leak where non-members are
# sure of a wrong label. A network or a class's threshold is learned from other examples than the copies, and may miss
# the leak as well. The once-trained copy is not a null control: hard examples leak even after one exposure.

# %% [markdown]
# ## Beside the paper's numbers
#
# The paper works in two settings. *Full training set*: one model is trained on all of it, with augmentation, and
# attacked by thresholds. *Halves*: 256 models are trained on random halves and attacked by LiRA and RMIA. We work with
# halves, at a smaller size: compare the signs first, and only then the sizes. All numbers are in per cent.

# %%
rows = [
    ("full set", "CIFAR-100", "confidence accuracy", 77.19, 79.10, 80.30, 81.60),
    ("full set", "CIFAR-10", "M-entropy accuracy", 59.51, 61.70, 96.00, 96.72),
    ("full set", "CIFAR-10", "confidence accuracy", 59.37, 61.64, None, None),
    ("full set", "Texas-100", "confidence accuracy", 65.20, 66.59, None, None),
    ("full set", "EyePACS", "confidence accuracy", 73.40, 77.07, 73.67, 75.41),
    ("halves, 256 models", "CIFAR-100", "RMIA AUC", 90.4, 91.6, 67.7, 69.1),
    ("halves, 256 models", "CIFAR-100", "LiRA AUC", 92.6, 93.7, 67.7, 69.1),
    ("halves, 256 models", "CIFAR-10", "LiRA TPR at 0.1% FPR", 8.8, 12.5, 92.3, 93.1),
    ("halves, 256 models", "CIFAR-10", "LiRA AUC", 73.0, 76.4, 92.3, 93.1),
]
paper = pd.DataFrame(rows, columns=["setting", "dataset", "attack", "SGD", "SAM", "SGD test", "SAM test"])
display(paper.style.format(precision=2, na_rep="").hide(axis="index"))

# %% [markdown]
# This run, in the same shape. Its intervals are in the tables above.

# %%
rows = [("confidence", "balanced_accuracy"), ("m_entropy", "balanced_accuracy"), ("rmia", "auc"), ("lira", "auc")]
ours = 100 * own.pivot(index=["attack", "metric"], columns="optimizer", values="value")[list(run.names)]
ours = ours.reindex([*rows, ("lira", "tpr@0.001")]).dropna()
for name in run.names:
    ours[f"{name} test"] = 100 * select(accuracy, metric="test_accuracy", optimizer=name).value
display(ours.style.format(precision=2))

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above.

# %%
rows = [select(leak, metric="auc", attack=attack, **versus) for attack in catalogue.HEADLINES]
leaks = text.joined(
    f"{describe_sign(row, *than)} {baseline} by {row.attack} ({percentage_points(row)})" for row in rows
)
top = select(flat, metric="hessian_top_eigenvalue", **versus)
fits = text.joined(f"{select(accuracy, metric='train_accuracy', optimizer=n).value:.1%} ({n})" for n in run.names)
flatter = describe_sign(top, "sharper than", "flatter than", "neither flatter nor sharper than")
found = own[(own.optimizer == treatment) & (own.metric == "auc")]
best, simple = found.loc[found.value.idxmax()], select(found, attack="confidence")
show_text(f"""
- **Generalization.** {treatment} tests {better} {baseline} ({percentage_points(test)}). Train accuracies: {fits}.
- **Leakage.** In AUC, {treatment} leaks {leaks}.
- **Flatness.** By the largest Hessian eigenvalue, {treatment} ends {flatter} {baseline}.

**What an engineer should do.** Audit with the strongest attack, not the simplest: under {treatment}, `{best.attack}` has an
AUC of {best.value:.3f}, a threshold on the confidence {simple.value:.3f}. A better test accuracy is no sign that less is
revealed. Before you choose between {baseline} and {treatment}, tune both and look at notebook 5.

All numbers of this run: `{results.path.name}` beside this notebook's copy.
""")

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
# # 3. Influence buckets: where do SAM's gains come from?
#
# Some test points depend on one or two training examples, others on a whole crowd. The paper sorts test points by this,
# with the entropy of their *influence* distribution, and finds that almost all of SAM's gain in test accuracy lies with
# points that depend on few. Then SAM would owe its better generalization to memorized, atypical sub-patterns, which are
# also what membership attacks find.
#
# **What this notebook shows.** We compute influence and its entropy in a few lines, repeat the paper's measurement, and
# ask two critical questions. How much of the entropy is noise of the estimate? And does it say anything that plain
# difficulty does not say? The answers decide how far the buckets support the paper's explanation. The ensembles are
# those of notebook 1.

# %% tags=["setup"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from lib.analysis import compare, influence, memorization
from lib.analysis.influence import buckets, influence_entropy
from lib.attacks import catalogue, intervals
from lib.attacks.intervals import ratio_influence_values
from lib.attacks.membership import folds
from lib.study import figures, settings
from lib.study.results import Results
from lib.study.text import describe_sign, percentage_points, select, show_table, show_text, sign

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
baseline, treatment, n_buckets = run.baseline, run.treatment, 5
y, y_test = run.dataset.y, run.dataset.y_test
buckets(
    y_test, n_buckets, within=buckets(y_test, n_buckets)
)  # raises before any training if the test part is too small
than = ("more than", "less than", "no differently from")
figures.style()
show_text(run.describe())

# %% [markdown]
# ## Influence and its entropy in a few lines
#
# $\mathrm{infl}(i, j)$ is the accuracy on test point $j$ of models trained with example $i$, minus that of models
# trained without it (Feldman & Zhang 2020). It is memorization with the test point elsewhere. For all pairs at once it
# is one matrix product, $W^\top V$: $V$ holds the outputs of every model on every test point, and $W$ the membership
# matrix with its entries scaled to $1/n_\mathrm{in}$ and $-1/n_\mathrm{out}$.
#
# The entropy $I_\mathrm{ent}(j) = -\sum_i p_{ij} \log p_{ij}$ is that of the positive influences of the training examples
# of $j$'s own class, scaled to sum to one. It is low if few examples matter. Its maximum is the log of the size $n$ of
# that class, so we state $I_\mathrm{ent}(j) - \log n$: 0 if all examples matter alike, and about -0.98 for pure noise,
# whatever $n$ is. No model trained on the test part.

# %%
ensembles = run.ensembles("main")
member = np.array(ensembles[baseline].member)  # [M, N]: was model m trained on example i?
results = Results("03_influence", run, n_models=len(member))
tests = {
    kind: {name: compare.signal(e, kind, test=True) for name, e in ensembles.items()}
    for kind in ("correct", "confidence")
}
correct, confidence = tests["correct"][baseline], tests["confidence"][baseline]  # [M, T]

few = slice(0, 50)  # some test points, to show how; the library takes them all, in blocks
W = member / member.sum(0) - ~member / (~member).sum(0)
infl = W.T @ confidence[:, few].astype(float)  # [N, 50]
p = np.where(y[:, None] == y_test[few], np.maximum(infl, 0), 0)
p = p / p.sum(0)
by_hand = -(p * np.log(np.where(p > 0, p, 1))).sum(0) - np.log((y[:, None] == y_test[few]).sum(0))

entropy = influence_entropy(member, confidence, y, y_test)  # [T]
np.testing.assert_allclose(infl, influence.influence(member, confidence[:, few]), atol=1e-5)
np.testing.assert_allclose(by_hand, entropy[few], atol=1e-3)

# %% [markdown]
# ## The gain in five buckets
#
# **Claim.** SAM's gain lies in bucket 1, the fifth of the test points with the lowest entropy. Bucket 5 gains nothing.
#
# **Method.** Entropies come from one half of the baseline's models, and the gain of each bucket is measured on the
# *other* half; then the halves swap. On the same models both would share their errors: a test point that some models
# happen to miss has few influences *and* looks like a place to gain. Intervals are for new models and new test points.
# A bucket holds a fifth of each class. (The smaller a class, the noisier its entropies: if all test points were ranked
# together, the rarest classes would fill the first and the last bucket even where nothing influences anything.)


# %%
def by_entropy(rows, values, within=None, design=member, same_class=True, part="positive"):
    """Buckets [T] by the entropies that models `rows` give, ranked in the test point's class."""
    found = influence_entropy(design[rows], values[rows], y, y_test, part, same_class)
    return buckets(found, n_buckets, within, run.seed, classes=y_test if same_class else None)


def cross_fitted(form):
    """Labels [M, T], where each model's are formed on the *other* half of the models: form(rows) -> [T]."""
    labels, (first, second) = np.empty((len(member), len(y_test)), int), folds(member)
    labels[first], labels[second] = form(second), form(first)
    return labels


def gains(difference, label, name, total=False):
    """Mean of difference [M, T] in each bucket of label [M, T], and in the first minus the last: a frame.

    With `total` also the overall mean and, unless that is zero, the first bucket's share of it (delta method).
    """
    each = [ratio_influence_values(difference, label == b) for b in range(n_buckets)]
    found = {f"gain_{name}_{b + 1}": values for b, values in enumerate(each)}
    found[f"gain_{name}_1_minus_{n_buckets}"] = each[0] - each[-1]
    if total:
        found["gain"] = difference
    if total and (whole := difference.mean()):
        part = (label == 0).mean() * each[0]
        # d(a/b) = (da - (a/b) db) / b
        found[f"gain_share_{name}_1"] = part.mean() / whole + (part - part.mean() / whole * difference) / whole
    return pd.DataFrame([intervals.row(metric, intervals.estimate(values)) for metric, values in found.items()])


def panel(table):
    """The rows of the buckets alone, in percentage points."""
    rows = table[table.metric.str.fullmatch(r"gain_\w+_\d") & ~table.metric.str.contains("minus|share")]
    return rows.assign(**{c: 100 * rows[c] for c in ("value", "ci_low", "ci_high")})


gain = {name: tests["correct"][name].astype(float) - tests["correct"][baseline] for name in run.names[1:]}  # [M, T]
label = cross_fitted(lambda rows: by_entropy(rows, correct))  # [M, T]
tables = {
    name: gains(gain[name], label, "bucket", total=True).assign(optimizer=name, baseline=baseline)
    for name in run.names[1:]
}
results.add(pd.concat(tables.values()), experiment="influence buckets")
frame = tables[treatment]
show_table(frame)

# %%
whole, first, last, step = (
    select(frame, metric=m, baseline=baseline)
    for m in ("gain", "gain_bucket_1", f"gain_bucket_{n_buckets}", f"gain_bucket_1_minus_{n_buckets}")
)
show_text(
    f"From {baseline} to {treatment}, test accuracy changes by {percentage_points(first)} in bucket 1, by "
    f"{percentage_points(last)} in bucket {n_buckets} and by {percentage_points(whole)} overall."
)
if sign(whole):
    share = select(frame, metric="gain_share_bucket_1", baseline=baseline)
    show_text(f"Bucket 1 holds {share.value:.0%} [{share.ci_low:.0%}, {share.ci_high:.0%}] of the overall change.")
else:
    show_text("The interval of the overall change contains zero, so a share of it would mean nothing.")
never = (correct == correct[0]).all(0).mean()
show_text(
    f"All {len(member)} models of {baseline} agree on {never:.0%} of the test points. Nothing influences these, so they "
    "come last in their class, in random order."
)

# %% [markdown]
# **How to read it.** A test point that all models get right (or all get wrong) is influenced by nothing and counts as
# the largest entropy of its class. Where such points fill whole buckets, "bucket 1" means little more than "some model errs", and
# only such points can gain. The confidence $p_y$ has no such ties: every test point has influences on it. So what
# follows looks at both.
#
# ### Other ways of counting
#
# The same with absolute influences, with all training examples as candidates, and with influences on the confidence
# $p_y$. The last panel shows the bias when buckets and gains use the same models.

# %%
variants = {
    "absolute influence": (correct, {"part": "absolute"}),
    "all classes": (correct, {"same_class": False}),
    "influence on p_y": (confidence, {}),
}
labels = {
    title: cross_fitted(lambda rows, v=values, k=kind: by_entropy(rows, v, **k))
    for title, (values, kind) in variants.items()
}
labels["formed on the same models"] = np.tile(by_entropy(slice(None), correct), (len(member), 1))
panels = {"as above": panel(frame)}
for title, found in labels.items():
    for name in run.names[1:]:
        table = gains(gain[name], found, "bucket", total=True)
        results.add(table, experiment="influence buckets", coordinate=f"by={title}", optimizer=name, baseline=baseline)
    panels[title] = panel(gains(gain[treatment], found, "bucket"))


# %%
def draw(panels, name):
    """The gain in every bucket, a panel for each way of forming them."""
    n = len(panels)
    figure, axes = plt.subplots(1, n, figsize=(min(3.6 * n, 14), 3.4), sharey=True, layout="constrained")
    for index, (axis, (title, rows)) in enumerate(zip(axes, panels.items(), strict=True)):
        figures.error_bars(axis, np.arange(1, n_buckets + 1), rows, index, linestyle="")
        axis.axhline(0, color="0.3", lw=1)
        axis.set(title=title, xlabel="bucket", xticks=range(1, n_buckets + 1))
        axis.margins(x=0.12)
    axes[0].set_ylabel(figures.plain(f"test accuracy: {treatment} minus {baseline}, points"))
    return figures.save(figure, run, name)


draw(panels, "buckets")

# %% [markdown]
# ## What the buckets look like
#
# The test points of lowest and of highest entropy (of influence on $p_y$, among those that one model in twenty or more
# gets wrong). Beneath each is the most influential training example of its class.

# %%
disputed = np.flatnonzero(correct.mean(0) <= 0.95)
disputed = disputed[np.argsort(entropy[disputed])]
rows = {}
for title, chosen in (("lowest entropy", disputed[:8]), ("highest entropy", disputed[-8:])):
    infl = influence.influence(member, confidence[:, chosen])
    best = np.where(y[:, None] == y_test[chosen], infl, -np.inf).argmax(0)
    rows[f"test, {title}"] = [(run.dataset.x_test[j], f"a '{run.dataset.classes[y_test[j]]}'") for j in chosen]
    rows[f"train, beside them ({title})"] = [(run.dataset.x[i], f"{infl[i, c]:+.2f}") for c, i in enumerate(best)]
figure, axes = plt.subplots(len(rows), 8, figsize=(10.8, 8.2), layout="constrained")
for line, (title, pictures) in zip(axes, rows.items(), strict=True):
    line[0].set_title(title, fontsize=10, loc="left")
    for axis, (image, caption) in zip(line, pictures, strict=False):
        figures.picture(axis, image)
        axis.set_xlabel(figures.plain(caption), fontsize=8)
    for axis in line[len(pictures) :]:
        axis.set_axis_off()
figures.save(figure, run, "influences")

# %% [markdown]
# **How to read it.** The number under a training image says how much surer of the test image above it are the models
# that trained with it. With few models, the largest of many noisy influences is large by chance. The next section looks
# at this.

# %% [markdown]
# ## Check 1: how much of the entropy is noise?
#
# **Claim.** The entropy is a property of the test point, not of the estimate.
#
# **Method.** The error of an influence falls only with the root of the number of models, and the positive parts of pure
# noise have an entropy too. We compute the entropies from more and more models, with the true membership and with a
# *shuffled* one, which has the same design but is unrelated to training. A meaningful score is also the same when it is
# measured again, so we compare the entropies from two disjoint halves of the models.

# %%
shuffled = catalogue.null_member(member, run.seed, run.dataset.groups)
designs = {"true": member, "shuffled": shuffled}
counts = [c for c in (16, 32, 64, 128, 256, 512, 1024) if c <= len(member)]
counts = [c for c in counts if min(member[:c].sum(0).min(), (~member[:c]).sum(0).min()) > 1] or [len(member)]
lines = []
for count in counts:
    for kind, design in designs.items():
        found = influence_entropy(design[:count], confidence[:count], y, y_test)
        lines.append((kind, count, *np.quantile(found, [0.5, 0.1, 0.9])))
noise = pd.DataFrame(lines, columns=["membership", "n_models", "value", "ci_low", "ci_high"])
noise = noise.assign(
    metric="influence_entropy_below_log_n", optimizer=baseline, coordinate="membership=" + noise.membership
)
results.add(noise, experiment="influence noise", n_models=noise.n_models)

figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for index, (kind, rows) in enumerate(noise.groupby("membership", sort=False)):
    figures.error_bars(axis, rows.n_models * (1 + 0.06 * index), rows, index, label=f"{kind} membership")
axis.axhline(0, color="0.4", lw=1, label="largest possible")
axis.set(xscale="log", xlabel="models", ylabel="entropy - log n (nats)", xticks=counts, xticklabels=counts)
axis.minorticks_off()
axis.legend(fontsize=9)
display(figures.save(figure, run, "entropy_noise"))

half = np.arange(len(member)) // 2 % 2 == 0
for kind, values in (("correctness", correct), ("confidence", confidence)):
    again = {
        name: memorization.spearman(*(influence_entropy(design[h], values[h], y, y_test) for h in (half, ~half)))
        for name, design in designs.items()
    }
    show_text(
        f"Entropies of {kind} from two halves of the models have a rank correlation of {again['true']:.2f}, "
        f"and of {again['shuffled']:.2f} with shuffled membership."
    )

# %% [markdown]
# **How to read it.** Points are medians over the test points, and bars hold 80% of them. Where true and shuffled
# membership give the same entropies, noise decides them. The correlation with *shuffled* membership is not zero where
# noise has structure: entropy then measures how much the models differ on a test point, which is a kind of difficulty.
#
# The control that decides: buckets formed with shuffled membership, whose "influences" say nothing about any training
# example. If shuffled membership separates the gain equally well, influence is not the explanation.

# %%
panels, excess = {}, []
for kind, values, true in (("correctness", correct, label), ("p_y", confidence, labels["influence on p_y"])):
    fake = cross_fitted(lambda rows, v=values: by_entropy(rows, v, design=shuffled))
    control = gains(gain[treatment], fake, "bucket", total=True)
    of = dict(experiment="influence buckets", coordinate=f"by=shuffled membership, {kind}")
    results.add(control, **of, optimizer=treatment, baseline=baseline)
    panels[f"{kind}, true"] = panel(gains(gain[treatment], true, "bucket"))
    panels[f"{kind}, shuffled"] = panel(control)
    for name in run.names[1:]:
        steps = [  # influence values [M, T] of the gain in the first bucket minus the last
            ratio_influence_values(gain[name], f == 0) - ratio_influence_values(gain[name], f == n_buckets - 1)
            for f in (true, fake)
        ]
        beyond = intervals.row("gain_beyond_shuffled", intervals.estimate(steps[0] - steps[1]), optimizer=name)
        excess.append(beyond | {"coordinate": f"by=influence on {kind}"})
excess = pd.DataFrame(excess).assign(baseline=baseline)
results.add(excess, experiment="influence buckets")
display(draw(panels, "shuffled"))
excess = excess[excess.optimizer == treatment]
for row in excess.itertuples():
    words = describe_sign(row, "further than", "less far than", "no further than")
    show_text(
        f"{row.coordinate[3:]}: true membership sets buckets 1 and {n_buckets} apart {words} shuffled membership does "
        f"({percentage_points(row)} of gain)."
    )

# %% [markdown]
# **How to read it.** Points are gains with 95% intervals, on common axes. Where the shuffled panel looks like the true
# one, the buckets sort by something that needs no influence. (Where test points that nothing influences fill all buckets
# but the first, the control of correctness *cannot* find a difference; that of $p_y$ can.)

# %% [markdown]
# ## Check 2: is it more than difficulty?
#
# **Claim.** Entropy tells where SAM gains, beyond telling which test points are hard.
#
# **Method.** Only points that some models get wrong can gain. So we also form five buckets by plain difficulty: the mean
# confidence $p_y$ of the baseline's models, lowest first, again on the other half of the models. Then we form buckets by
# entropy (of influence on $p_y$, which has no ties) *within* each fifth of difficulty, and buckets by difficulty within
# each fifth of entropy. If buckets by entropy still differ in gain within a fifth of difficulty, entropy adds something
# to difficulty; and the other way round.


# %%
def by_difficulty(rows, within=None):
    """Buckets [T] by the mean confidence of models `rows`."""
    return buckets(confidence[rows].mean(0), n_buckets, within, run.seed)


forms = {
    "entropy": lambda rows: by_entropy(rows, confidence),
    "difficulty": by_difficulty,
    "entropy_within_difficulty": lambda rows: by_entropy(rows, confidence, within=by_difficulty(rows)),
    "difficulty_within_entropy": lambda rows: by_difficulty(rows, within=by_entropy(rows, confidence)),
}
sorted_by = {name: cross_fitted(form) for name, form in forms.items()}
for name in run.names[1:]:
    for kind in list(forms)[1:]:  # the gains by entropy are recorded above
        table = gains(gain[name], sorted_by[kind], kind)
        results.add(table, experiment="influence buckets", optimizer=name, baseline=baseline)

tables = {kind: gains(gain[treatment], found, kind) for kind, found in sorted_by.items()}
panels = {kind.replace("_", " "): panel(table) for kind, table in tables.items()}
display(draw(panels, "difficulty"))
steps = {kind: select(table, metric=f"gain_{kind}_1_minus_{n_buckets}") for kind, table in tables.items()}
for kind, row in steps.items():
    words = describe_sign(row, *than)
    show_text(f"By {kind.replace('_', ' ')}: bucket 1 gains {words} bucket {n_buckets} ({percentage_points(row)}).")
both = np.mean(sorted_by["entropy"] == sorted_by["difficulty"])
show_text(
    f"Entropy and difficulty put {both:.0%} of the test points into the same bucket; chance gives {1 / n_buckets:.0%}."
)

# %% [markdown]
# **How to read it.** Bucket 1 is always the end where a gain is expected: the lowest entropies, the lowest confidences.
# If the first two panels look alike and the third is flat, entropy is difficulty under another name. If the third falls
# from left to right and the fourth is flat, it is the other way round: points are hard *because* they depend on few. (A
# fifth is a coarse measure. Points of one fifth are not equally hard, so a little of what the third panel shows may
# still be difficulty.)

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above.

# %%
within, untied = steps["entropy_within_difficulty"], steps["entropy"]
controls = "\n".join(
    f"- **Control, {row.coordinate[3:]}.** True membership separates the gain "
    f"{describe_sign(row, 'better than', 'worse than', 'no better than')} a shuffled one ({percentage_points(row)})."
    for row in excess.itertuples()
)
if sign(within) == 1 and sign(excess.iloc[-1]) == 1:
    advice = (
        f"Buckets of influence tell more than difficulty here. Before you remove or down-weight rare training examples, "
        f"train without them and measure bucket 1: there {treatment} has its gain over {baseline}."
    )
else:
    advice = (
        "Do not choose or clean training data by these buckets: here they tell no more than shuffled membership or "
        f"plain difficulty. To find out where {treatment} would help, sort test points by the mean confidence of a few "
        "models; that needs no record of who trained on what."
    )
show_text(f"""
- **Buckets.** Bucket 1 gains {describe_sign(step, *than)} bucket {n_buckets}: {percentage_points(step)}.
- **Ties.** Nothing influences {never:.0%} of the test points; bucket {n_buckets} changes by {percentage_points(last)}.
- **Without ties**, on p_y, bucket 1 gains {describe_sign(untied, *than)} bucket {n_buckets}: {percentage_points(untied)}.
- **Beyond difficulty.** Within fifths of it, low entropies gain {describe_sign(within, *than)} high ones: {percentage_points(within)}.
{controls}

**What an engineer should do.** {advice} Judge buckets on other models than those that formed them.

All numbers of this run: `{results.path.name}` beside this notebook's copy.
""")

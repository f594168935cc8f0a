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
# A test point can lean on one or two training examples, or on a whole crowd of them. The paper sorts test points by
# this, with the entropy of their *influence* distribution, and finds that almost all of SAM's gain in test accuracy lies
# with points that lean on few: SAM would owe its better generalization to memorized, atypical sub-patterns, which are also what
# membership attacks can see. This notebook repeats the measurement, then asks the two questions that a critical
# reader asks: how much of the entropy is the noise of its estimate, and does it say anything that plain
# difficulty does not?

# %% [markdown]
# **The definition.** $\mathrm{infl}(i, j)$ is the accuracy on test point $j$ of models trained with example $i$, minus
# that of models trained without it (Feldman & Zhang 2020): memorization, with the test point elsewhere. For all pairs at once it is
# one matrix product, $W^\top V$, with $V$ the correctness of every model on every test point and $W$ the membership
# matrix, its columns scaled to $1/n_\mathrm{in}$ and $-1/n_\mathrm{out}$.
#
# The entropy $I_\mathrm{ent}(j) = -\sum_i p_{ij} \log p_{ij}$ is that of the positive influences of the training examples
# of $j$'s own class, scaled to sum to one. Low: few examples matter.

# %% [markdown]
# ## Setting up
#
# As in every notebook: find the library, note which names exist, take the parameters (`None` is filled in by the
# preset), check them all before any training.

# %%
import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in (Path.cwd(), Path.cwd().parent) if (p / "lib" / "study" / "settings.py").exists()]

from lib.study import settings

before = {*globals(), "before"}

# %% tags=["parameters"]
preset: str = "default"  # tiny, default, small, fast, paper
dataset: str = "digits"  # digits, subclasses, cifar10, cifar100, eyepacs, purchase100, texas100, folder, npz
data: str = None  # path, where the data set needs one
arch: str = None  # mlp, cnn, resnet18, wrn28_2, vgg16_bn, ... or your own as package.module:name
optimizers: str = None  # comma-separated, the first is the baseline: "sgd,sam,looksam"
rho: float = None  # radius of SAM's neighbourhood
n_models: int = None  # models per optimizer, an even number
n_examples: int = None  # size of the pool, an even number
subset: float = None  # share of the pool that each model trains on
epochs: int = None  # epochs of the main comparison
batch_size: int = None  # examples per step
lr: float = None  # peak learning rate
weight_decay: float = None  # weight decay
augment: bool = None  # flips and shifts, in training and as queries of the attacks
ema: float = None  # decay of the moving average of the weights that is kept; 0: the last weights
seed: int = None  # seed of everything
device: str = None  # auto, cpu, cuda, mps
engine: str = None  # local, or ray (a cluster at RAY_ADDRESS, or this machine's own)
gpus: float = None  # GPUs that a Ray task asks for
store: str = None  # folder of the trained ensembles (default: store/)
out: str = None  # folder of this run's results (default: outputs/<dataset>/)

# %%
run = settings.notebook_settings(globals(), before)

import numpy as np
import pandas as pd
from IPython.display import display

from lib.analysis import compare, influence, memorization
from lib.analysis.influence import buckets, cross_fitted, gains, influence_entropy
from lib.attacks import catalogue, intervals
from lib.study import figures
from lib.study.results import Results
from lib.study.text import describe_sign, percentage_points, show_table, show_text, sign

baseline, treatment, n_buckets = run.names[0], run.treatment, 5
pair, y, y_test = f"{treatment}-{baseline}", run.dataset.y, run.dataset.y_test

# %% [markdown]
# ## The ensembles
#
# Those of the first notebooks. $V$ comes from the test part, which no model trained on.

# %%
# raises now, not after training, if the test part is too small
_ = buckets(y_test, n_buckets, within=buckets(y_test, n_buckets))
figures.style()
show_text(run.describe())
ensembles = compare.keep_common_models({name: run.train(name) for name in run.names})
member = np.array(ensembles[baseline].member)
results = Results("03_influence", run, n_models=len(member))
tests = {
    kind: {n: compare.signal(e, kind, test=True) for n, e in ensembles.items()}
    for kind in ("correct", "confidence")
}
gain = {name: tests["correct"][name].astype(float) - tests["correct"][baseline] for name in run.names[1:]}
accuracy = compare.accuracies(ensembles)
show_table(accuracy[accuracy.metric.isin(["test_accuracy", "train_accuracy"])])

# %% [markdown]
# ## The gain in five buckets
#
# **Claim.** SAM's gain lies in bucket 1, the fifth of the test points with the lowest entropy; bucket 5 gains nothing.
#
# **How we test it.** Entropies come from the baseline's models alone, on *one half* of them; the gain of each bucket is
# measured on the *other* half, then the halves change places. On the same models both would share their accidents: a test point that some models
# happen to miss has few influences *and* looks like a place to gain. Intervals are for new models and new test points.


# %%
def by_entropy(rows, values, within=None, design=member, same_class=True, part="positive"):
    """Buckets [T] of the entropies that models `rows` give, in units of the largest possible in their class."""
    most = np.bincount(y)[y_test] if same_class else len(y)
    found = influence_entropy(design[rows], values[rows], y, y_test, part, same_class) / np.log(most)
    return buckets(found, n_buckets, within, run.seed)


correct, confidence = tests["correct"][baseline], tests["confidence"][baseline]
label = cross_fitted(lambda rows: by_entropy(rows, correct), member)
main = {name: gains(gain[name], label, "bucket", total=True) for name in run.names[1:]}
for name, table in main.items():
    results.add(table, optimizer=f"{name}-{baseline}")
frame = main[treatment]
show_table(frame.assign(optimizer=pair))

# %% [markdown]
# In points of test accuracy, and as a share of the whole.


# %%
def panel(table, name):
    """The rows of the buckets alone, in points."""
    rows = table[table.metric.str.fullmatch(rf"gain_{name}_\d+")]
    return rows.assign(**{c: 100 * rows[c] for c in ("value", "ci_low", "ci_high")})


first, last, step = (frame[frame.metric == f"gain_bucket_{b}"].iloc[0] for b in (1, n_buckets, f"1_minus_{n_buckets}"))
whole, share = frame[frame.metric == "gain"].iloc[0], frame[frame.metric == "gain_share_bucket_1"]
show_text(
    f"{treatment} gains {percentage_points(first)} in bucket 1 and {percentage_points(last)} in bucket {n_buckets}; overall {percentage_points(whole)}."
)
if sign(whole):
    held = share.iloc[0]
    show_text(f"Bucket 1 holds {held.value:.0%} [{held.ci_low:.0%}, {held.ci_high:.0%}] of the overall change.")
else:
    show_text("The overall change is not clear of zero, so a share of it would mean nothing.")

# %% [markdown]
# And how many of the test points have an influence to speak of?

# %%
never = (correct == correct[0]).all(0).mean()
full = n_buckets - int(n_buckets * never)
show_text(
    f"{never:.0%} of the test points are influenced by nothing: all {len(member)} models of {baseline} agree on them."
)
show_text(f"Only buckets 1 to {full} can hold others; whatever lies beyond is in random order."
    if full < n_buckets else "Every bucket holds test points that something influences.")  # fmt: skip

# %% [markdown]
# **How to read it.** Bucket 1 holds the fifth of the test points with the lowest entropy. With correctness, a test point
# that all models get right (or all get wrong) is influenced by nothing and counts as the largest entropy. Where such
# points fill whole buckets, "bucket 1" means little more than "some model errs", and only such points can gain. The confidence $p_y$
# has no such ties: every test point has influences on it. So what follows looks at both.

# %% [markdown]
# ### Other ways of counting
#
# The same with absolute influences; with all training examples as candidates; with influences on the confidence $p_y$
# instead of correctness; and, as a warning, formed and measured on the same models.

# %%
variants = {
    "absolute influence": (correct, {"part": "absolute"}),
    "all classes": (correct, {"same_class": False}),
    "influence on p_y": (confidence, {}),
}
labels = {
    title: cross_fitted(lambda rows, v=values, k=kind: by_entropy(rows, v, **k), member)
    for title, (values, kind) in variants.items()
}
labels["formed on the same models"] = np.tile(by_entropy(slice(None), correct), (len(member), 1))

# %% [markdown]
# Each of them on the same axis. The last panel shows what the precaution of two halves is worth here.

# %%
panels = {"as above": panel(frame, "bucket")}
for title, found in labels.items():
    for name in run.names[1:]:
        table = gains(gain[name], found, "bucket", total=True)
        results.add(table, optimizer=f"{name}-{baseline}", note=title)
        if name == treatment:
            panels[title] = panel(table, "bucket")
figures.save(figures.interval_panels(panels, f"test accuracy: {treatment} minus {baseline}, points"), run, "buckets")

# %% [markdown]
# ## What the buckets look like
#
# For the test points of lowest and of highest entropy (of influence on $p_y$, among those that one model in twenty or
# more gets wrong), the most influential training example of the same class beneath.

# %%
entropy = influence_entropy(member, confidence, y, y_test)
disputed = np.flatnonzero(correct.mean(0) <= 0.95)
disputed = disputed[np.argsort(entropy[disputed])]
rows = {}
for title, chosen in (("lowest entropy", disputed[:8]), ("highest entropy", disputed[-8:])):
    infl = influence.influence(member, confidence[:, chosen])
    best = np.where(y[:, None] == y_test[chosen], infl, -np.inf).argmax(0)
    classes = [run.dataset.classes[c] for c in y_test[chosen]]
    rows[f"test, {title}"] = [(run.dataset.x_test[j], f"a '{c}'") for j, c in zip(chosen, classes, strict=True)]
    top = infl[best, np.arange(len(chosen))]
    rows[f"train, beside them ({title})"] = [(run.dataset.x[i], f"{v:+.2f}") for i, v in zip(best, top, strict=True)]
figures.save(figures.captioned(rows), run, "influences")

# %% [markdown]
# **How to read it.** Under a training image, how much surer of the right label of the test image above are models that trained
# with it. With few models the largest of many noisy influences is large by chance: the next section follows this up.

# %% [markdown]
# ## Check 1: how much of the entropy is noise?
#
# **Claim.** The entropy is a property of the test point, not of the estimate.
#
# **How we test it.** Every influence is estimated with an error that falls only with the root of the number of models, and
# the positive parts of pure noise have an entropy too. We compute the entropies from more and more models, on the true membership
# and on a *shuffled* one (of the same design, but unrelated to training), and compare two disjoint halves of the models.

# %%
scarcest = {c: min(member[:c].sum(0).min(), (~member[:c]).sum(0).min()) for c in (16, 32, 64, 128, 256, 512, 1024)}
counts = [c for c, models in scarcest.items() if c <= len(member) and models >= 2] or [len(member)]
shuffled = catalogue.null_member(member, run.seed, run.dataset.groups)
lines = []
for count in counts:
    for kind, design in (("true membership", member), ("shuffled membership", shuffled)):
        found = influence_entropy(design[:count], confidence[:count], y, y_test)
        low, middle, high = np.quantile(found, [0.1, 0.5, 0.9])
        lines.append((kind, count, middle, low, high))
noise = pd.DataFrame(lines, columns=["series", "models", "value", "ci_low", "ci_high"])
display(figures.save(figures.entropy_and_noise(noise, np.log(np.bincount(y)).mean()), run, "entropy_noise"))
about = noise.series + " (median over test points; the interval holds 80% of them)"
results.add(noise.assign(metric="influence_entropy", note=about, n_models=noise.models), optimizer=baseline)

# %% [markdown]
# A score that means something is the same when it is measured again. So: the entropies from one half of the models against those
# from the other.

# %%
fold = np.arange(len(member)) // 2 % 2 == 0
reliability = {}
for kind, values in (("correctness", correct), ("confidence", confidence)):
    for name, design in (("true", member), ("shuffled", shuffled)):
        halves = [influence_entropy(design[f], values[f], y, y_test) for f in (fold, ~fold)]
        reliability[kind, name] = memorization.spearman(*halves)
    show_text(f"Entropies of {kind} from two halves of the models correlate by {reliability[kind, 'true']:.2f} in rank, "
        f"and by {reliability[kind, 'shuffled']:.2f} with shuffled membership.")  # fmt: skip

# %% [markdown]
# **How to read it.** In the figure, points are medians over the test points (influence on $p_y$, which every example has), bars hold
# 80% of them, and the line on top is the largest entropy possible. Where true and shuffled membership give the same entropies, noise
# decides them. A correlation with *shuffled* membership is not zero where noise has structure: entropy then measures
# how much the models differ on a test point, which is a kind of difficulty.

# %% [markdown]
# And the control that decides: buckets formed with shuffled membership, whose "influences" say nothing about any training
# example. Should they separate the gain as well as the true ones, then it was never influence that did. We ask it of
# correctness, and of the confidence $p_y$.

# %%
panels, excess = {}, []
for kind, values, true in (("correctness", correct, label), ("p_y", confidence, labels["influence on p_y"])):
    fake = cross_fitted(lambda rows, v=values: by_entropy(rows, v, design=shuffled), member)
    control = gains(gain[treatment], fake, "bucket", total=True)
    results.add(control, optimizer=pair, note=f"shuffled membership, {kind}")
    panels |= {f"{kind}, true": panel(gains(gain[treatment], true, "bucket"), "bucket")}
    panels |= {f"{kind}, shuffled": panel(control, "bucket")}
    for name in run.names[1:]:
        steps = [influence.step_influence_values(gain[name], found) for found in (true, fake)]
        row = intervals.row(
            "gain_beyond_shuffled", intervals.estimate(steps[0] - steps[1]), optimizer=f"{name}-{baseline}"
        )
        excess.append({**row, "note": f"influence on {kind}"})
beyond = pd.DataFrame(excess)
results.add(beyond)

# %%
display(
    figures.save(
        figures.interval_panels(panels, f"test accuracy: {treatment} minus {baseline}, points"), run, "shuffled"
    )
)
beyond = beyond[beyond.optimizer == pair].set_index("note")
for note, row in beyond.iterrows():
    words = describe_sign(row, "further than", "less far than", "no further than")
    show_text(f"{note}: true membership sets buckets 1 and {n_buckets} apart {words} shuffled "
        f"membership does ({percentage_points(row)} of gain).")  # fmt: skip

# %% [markdown]
# **How to read it.** Points are gains with 95% intervals, on common axes. Where the shuffled panel looks like the true one, the
# buckets sort by something that needs no influence. (Where test points that nothing influences fill all buckets but the first,
# the control of correctness *cannot* find a difference; that of $p_y$ can.)

# %% [markdown]
# ## Check 2: is it more than difficulty?
#
# **Claim.** Entropy tells where SAM gains, beyond telling which test points are hard.
#
# **How we test it.** Only points that some models get wrong can gain. So we form five buckets by plain difficulty (the mean
# confidence $p_y$ of the baseline's models, lowest first), again on the other half of the models; then buckets by entropy
# (of influence on $p_y$, which has no ties) *within* each fifth of difficulty, and buckets by difficulty within each fifth of entropy. What
# still separates within the other is what it adds.


# %%
def by_difficulty(rows, within=None):
    """Buckets [T] of the mean confidence of models `rows`."""
    return buckets(confidence[rows].mean(0), n_buckets, within, run.seed)


forms = {
    "entropy": lambda rows: by_entropy(rows, confidence),
    "difficulty": by_difficulty,
    "entropy_within_difficulty": lambda rows: by_entropy(rows, confidence, within=by_difficulty(rows)),
    "difficulty_within_entropy": lambda rows: by_difficulty(rows, within=by_entropy(rows, confidence)),
}
sorted_by = {name: cross_fitted(form, member) for name, form in forms.items()}
tables = {name: gains(gain[treatment], found, name) for name, found in sorted_by.items()}

# %% [markdown]
# Left to right: entropy alone, difficulty alone, and each with the other held fixed. "1" is always the end where a gain is
# expected: the lowest entropies, the lowest confidences.

# %%
for name in run.names[1:]:
    for kind, found in list(sorted_by.items())[1:]:
        results.add(gains(gain[name], found, kind), optimizer=f"{name}-{baseline}")
panels = {name.replace("_", " "): panel(table, name) for name, table in tables.items()}
figures.save(figures.interval_panels(panels, f"test accuracy: {treatment} minus {baseline}, points"), run, "difficulty")

# %%
steps = {name: table[table.metric == f"gain_{name}_1_minus_{n_buckets}"].iloc[0] for name, table in tables.items()}
for name, row in steps.items():
    words = describe_sign(row, "more than", "less than", "no differently from")
    show_text(f"By {name.replace('_', ' ')}: bucket 1 gains {words} bucket {n_buckets} ({percentage_points(row)}).")
both = np.mean(sorted_by["entropy"] == sorted_by["difficulty"])
show_text(
    f"Entropy and difficulty put {both:.0%} of the test points into the same bucket; by chance it would be {1 / n_buckets:.0%}."
)

# %% [markdown]
# **How to read it.** If the first two panels look alike and the third is flat, entropy is difficulty under another name. If the third falls from left to right and the
# fourth is flat, it is the other way round: points are hard *because* they lean on few. (A fifth is a coarse measure: points of the same
# fifth are not equally hard, so a little of what the third panel shows may still be difficulty.)

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above, whatever they are.

# %%
than = ("more than", "less than", "no differently from")
within, untied = steps["entropy_within_difficulty"], steps["entropy"]
show_text(f"**Buckets.** Bucket 1 gains {describe_sign(step, *than)} bucket {n_buckets}: {percentage_points(step)}.")
show_text(
    f"**Ties.** {never:.0%} of the test points are influenced by nothing; bucket {n_buckets} changes by {percentage_points(last)}."
)
show_text(
    f"**Without ties**, on p_y, bucket 1 gains {describe_sign(untied, *than)} bucket {n_buckets}: {percentage_points(untied)}."
)
show_text(
    f"**Beyond difficulty.** Within fifths of it, low entropies gain {describe_sign(within, *than)} high ones: {percentage_points(within)}."
)
for note, row in beyond.iterrows():
    show_text(f"**Control, {note}.** True membership separates the gain {describe_sign(row, 'better than', 'worse than', 'no better than')} "
        f"a shuffled one ({percentage_points(row)}).")  # fmt: skip
show_text(f"All numbers of this run: `{results.path.name}` beside this notebook's copy, {results.count()} rows.")

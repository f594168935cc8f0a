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
# # 1. The phenomenon: does sharpness-aware training leak who was in the training data?
#
# Sharpness-aware minimization (SAM) looks for weights whose whole neighbourhood has a low loss, and generalizes
# better than SGD. A model that generalizes better should, one would think, treat the examples it was trained on
# less specially. *Membership Privacy Risks of Sharpness-Aware Minimization* (arXiv 2310.00488) reports the
# opposite: SAM tests better **and** leaks more.
#
# This notebook puts both on one table. Two ensembles of models, one trained with each optimizer, differ in
# nothing else: model $k$ of either has the same half of the data, the same initial weights and the same order of
# batches. So every comparison below is *paired*, and every estimate carries a 95% interval.
#
# *(This file comes in two copies with the same cells. Edit the `.py`; `make sync` writes the `.ipynb`.)*

# %% [markdown]
# ## Setting up
#
# The first cell finds the library, whether the notebook runs from the root or from `notebooks/`, and notes which
# names exist, so that a misspelt parameter is seen as one.

# %%
import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in (Path.cwd(), Path.cwd().parent) if (p / "lib" / "study" / "settings.py").exists()]

from lib.study import settings

before = {*globals(), "before"}

# %% [markdown]
# Parameters left at `None` are filled in by the preset. All are checked in the next cell, before any training.

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

from lib.analysis import compare, flatness, memorization
from lib.data.dataset import duplicate_table
from lib.study import figures
from lib.study.results import Results
from lib.study.text import (
    conclusions,
    describe_sign,
    difference,
    null_control,
    percentage_points,
    pick,
    planted_leak,
    show_table,
    show_text,
    summary,
)
from lib.training import ensemble

figures.style()
baseline, treatment = run.names[0], run.treatment
pair, than = f"{treatment}-{baseline}", ("more than", "less than", "no differently from")
show_text(run.describe())

# %% [markdown]
# ## What membership inference is, in three pictures
#
# **The game.** Someone holds an example and a trained model, and guesses whether the example was in the training
# set. A good guesser means that the model betrays who is in its data: a patient in a hospital's study, say.
#
# **How it is played.** A strong attack, LiRA, trains *shadow* models of its own, some with the example
# and some without, and asks which of the two groups the target model's output resembles. The output is summed up
# by $\phi = \log p_y - \log(1-p_y)$, the model's confidence in the true label on a scale without ceiling.

# %% [markdown]
# We train $M$ models, each on a random half of one pool of $N$ examples. Models $2k$ and $2k+1$ share the pool
# out between them, so every example is in exactly half of the models. Each model is a target in its turn, and all
# the others (but for its partner, which would give the game away) are its shadows.

# %%
ensembles = compare.keep_common_models({name: run.train(name) for name in run.names})
member = np.array(ensembles[baseline].member)
phis = {name: compare.signal(e, "phi") for name, e in ensembles.items()}
gap = compare.phi_gap(phis[baseline], member)
telling = int(np.argsort(gap)[-1 - len(gap) // 100])
title = f"a '{run.dataset.classes[run.dataset.y[telling]]}' from the pool"
figure = figures.what_an_attacker_sees(phis[baseline], member, telling, run.dataset.x[telling], title)
figures.save(figure, run, "attack")

# %% [markdown]
# **How to read it.** Left, one example, chosen among the hundredth of the pool that training changes most.
# Middle, the confidence in its label of the models that trained with it and of those that did not: where the two
# hills part, membership is plain to see. Right, what an attacker without shadow models sees: one model, and the
# hills of all its members and non-members. An easy example is on the right-hand side of this picture whether or not it
# was a member, which is what a per-example attack corrects for.

# %% [markdown]
# ## The data
#
# Some of the pool, a class a column. Every model sees one half of the pool; the other half is its non-members.
# The test part is seen by none.

# %%
figures.save(figures.gallery(run.dataset, per_class=4), run, "data")

# %% [markdown]
# A "non-member" with a twin among the members is none: what the model learnt from the twin, it knows of the example.
# Exact duplicates have the same bytes; near ones are closer than half the median distance to a nearest neighbour, which
# plain skies and dark pictures can be without being copies. They stay in: this says how many there are.

# %%
results = Results("01_phenomenon", run, n_models=len(member))
twins = duplicate_table(run.dataset)
results.add(twins, optimizer="", note="duplicates in the pool")
counts = twins.set_index("metric").value
for kind in ("exact", "near"):
    own, other_label, outside = (
        counts[f"{kind}_{name}"] for name in ("duplicates", "duplicates_other_label", "test_twins")
    )
    show_text(f"Of {len(run.dataset.y)} examples {own:.0f} have {kind} twins in the pool ({other_label:.0f} of them with another "
        f"label), {outside:.0f} in the test part.")  # fmt: skip

# %% [markdown]
# ## Training
#
# **Claim.** SAM reaches a better test accuracy than SGD on the same halves.
#
# **How we test it.** SAM takes the gradient not at the weights $w$ but at the worst point near them to first
# order, $w + \rho\,g/\lVert g\rVert$ with $g = \nabla L(w)$; the step itself is the base optimizer's. Everything
# else is shared. Test points are never used for a choice, and no checkpoint is picked: we report the last one.

# %%
figures.save(figures.training_curves(ensembles), run, "training")

# %% [markdown]
# Curves are means over the models, bands hold 95% of them. In the table, a column named with a difference of two
# optimizers is paired: the same halves, weights and orders on both sides.

# %%
accuracy = compare.accuracies(ensembles)
results.add(accuracy)
show_table(accuracy)
test = difference(accuracy, "test_accuracy", pair)
show_text(
    f"{treatment} tests {describe_sign(test, 'better than', 'worse than', 'no differently from')} {baseline}: {percentage_points(test)}."
)
for name in run.names:
    fit, loss = pick(accuracy, name, "train_accuracy"), pick(accuracy, name, "train_loss")
    show_text(f"{name} fits its training half with accuracy {fit:.1%} and loss {loss:.2g}.")

# %% [markdown]
# **How to read it.** The generalization gap is
# accuracy on the training half minus accuracy on the other half. It is also, by definition, the mean
# memorization: of two optimizers that fit their training sets, the one that generalizes better memorizes
# *less on average*. The question is whether that makes it harder to attack.

# %% [markdown]
# ## The attacks
#
# **Claim.** SAM's models leak more about their members, under every attack.
#
# **How we test it.** The attacks below, each model a target in turn.
#
# | attack | what it looks at |
# |---|---|
# | `gap` | is the prediction correct? |
# | `loss` | is the loss below the members' mean loss? (Yeom et al. 2018) |
# | `confidence`, `entropy`, `m_entropy` | one threshold on the output (Song & Mittal 2021); `_classwise`: one for each class |
# | `lira` | likelihood ratio of the output, given models with and without the example (Carlini et al. 2022); `_pooled`: one variance for all examples; `_offline`: without models that contain it |
# | `neural` | a small network on the whole sorted output, trained, stopped and judged on three parts (Shokri et al. 2017); `_classwise` likewise |
# | `rmia` | how the output compares with those on other examples (Zarifzadeh et al. 2024; `gamma` 1, `lib/attacks/catalogue.py` says why); `_offline` likewise |

# %% [markdown]
# Thresholds are learned on one half of the examples and judged on the other; those for a fixed false positive
# rate (FPR) are learned on other models, as an attacker would with shadows, and the FPR that they then
# *realise* stands beside the true positive rate (TPR).
# Intervals treat models and examples as two crossed samples: they speak about new models *and* new
# examples (Cameron, Gelbach & Miller 2011; Owen 2007), and are widened for the shadows that targets share by a
# factor fitted in simulation (`lib/attacks/intervals.py`).

# %%
scored = {name: compare.scores(e) for name, e in ensembles.items()}
leak = compare.leakage(ensembles, scored)
results.add(leak)
table = leak.metric.isin(["auc", "balanced_accuracy"])
show_table(leak[table & leak.optimizer.isin(run.names)], across=["metric", "optimizer"])

# %% [markdown]
# The strict end: how many members can be named when almost nobody may be accused wrongly? The realised FPR should
# be close to the one asked for. RMIA's scores are shares of a finite set of comparison points, so they tie, and a
# rate far below one over their number can't be realised by it.

# %%
strict = leak[leak.metric.str.startswith(("tpr@", "realised_fpr@")) & leak.attack.isin(["lira", "rmia"])]
show_table(strict[strict.optimizer.isin(run.names)], across=["attack", "optimizer"])

# %% [markdown]
# And the differences, paired. To the right of the line, the sharpness-aware ensemble leaks more.

# %%
differences = leak[~leak.optimizer.isin(run.names)]
auc = differences[differences.metric == "auc"]
for metric, label in (("auc", "AUC"), ("balanced_accuracy", "balanced accuracy")):
    frame = differences[differences.metric == metric]
    display(
        figures.save(
            figures.forest(frame, f"difference in {label} (paired, 95% interval)"), run, f"difference_{metric}"
        )
    )
    show_text(summary(frame[frame.optimizer == pair], f"In {label}, {treatment} leaks", baseline))

# %% [markdown]
# ### Only the label
#
# **Claim.** An attacker who is shown no confidence, only the predicted label, learns less.
#
# **How we test it.** The attacker asks about many versions of an example, pictures shifted and mirrored, tables with
# noise or flipped bits, and counts how often the label is right: training pushes an example away from the
# decision boundary (Choquette-Choo et al. 2021). `label_once` asks for the example as it is and no more: what the
# queries add to it is what distance tells. SAM pushes boundaries away for *everyone*, so here it may look safer. The
# models whose weights are kept are the targets; how far to shift, or how much noise, is chosen on other models, none
# at all included: what is right under every shift may be what is easy for all, not what this model was trained on.

# %%
where = ensemble.device_of(run.device)
labels = compare.label_only_table(ensembles, 16 if run.is_small else 8, where)
results.add(labels, n_models=labels.n_models)
show_table(labels[labels.metric.isin(["auc", "balanced_accuracy"])], across=["metric", "optimizer"])
for metric in ("auc", "balanced_accuracy"):
    rows = labels[(labels.attack == "label_only") & (labels.metric == metric)]
    only = difference(rows, metric, pair)
    show_text(
        f"By labels alone ({metric}), {treatment} leaks {describe_sign(only, *than)} {baseline}: {percentage_points(only)}."
    )

# %%
known = pd.concat([labels, leak]).query("metric == 'auc'").set_index(["optimizer", "attack"]).value
for name in run.names:
    show_text(f"{name}: AUC {known[name, 'label_only']:.3f}; asked once, for the example as it is, {known[name, 'label_once']:.3f}; "
        f"LiRA, which is shown the confidence, {known[name, 'lira']:.3f}.")  # fmt: skip
null = labels[labels.metric == "null_auc"].itertuples()
said = [f"{row.optimizer} {row.value:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]" for row in null]
show_text(f"On shuffled membership, where an AUC of 0.5 is due: {', '.join(said)}.")

# %% [markdown]
# ### ROC
#
# On logarithmic axes, so that the strict end, where an attack accuses few and is nearly always right, can be
# seen. The curves end where ten false positives are expected.

# %%
figures.save(figures.roc(scored, member, "lira"), run, "roc")

# %% [markdown]
# ## What the outputs look like
#
# **Claim.** SAM's outputs on non-members vary less, so that members stand out.
#
# **How we test it.** "Vary" can mean two things, and we measure both. *Across examples*: the spread of one
# model's outputs over all the examples it did not see; this is what the paper's theorem speaks of. *Across
# models*: the spread of one example's output over the models that did not see it; this is what LiRA divides by.

# %%
display(figures.save(figures.phi_of_members(phis, member), run, "phi"))
spread = compare.variances(ensembles)
results.add(spread)
show_table(spread)
for metric in spread.metric.unique():
    show_text(f"`{metric}`: {treatment} varies {describe_sign(difference(spread, metric, pair), *than)} {baseline}.")

# %% [markdown]
# **How to read it.** $\phi$ has no ceiling, so a longer or larger-stepped training stretches it for members and
# non-members alike; a variance of $\phi$ alone says little about how well the two can be told apart. The
# confidence $p_y$ lies in $[0, 1]$ and does not have this freedom.

# %% [markdown]
# ## Dose and response
#
# **Claim.** If sharpness-awareness is the cause, more of it has more effect.
#
# **How we test it.** The same halves, weights and orders once more, with several radii $\rho$. Radius 0 is the
# optimizer's own base, trained without the rule. (An optimizer without a radius has no dose to vary.)

# %%
without = run.recipe(treatment).optimizer.base_name
radius_sweep = {0.0: run.train(without, run.sweep)}
radius_sweep |= {dose: run.train(treatment, run.sweep, rho=dose) for dose in run.radius_sweep(treatment)}
radius_sweep = compare.keep_common_models(radius_sweep, essential=[0.0])
radius_frame = compare.radius_table(radius_sweep, treatment, without)
results.add(radius_frame, note="dose and response", n_models=len(radius_sweep[0.0].ids))
panels = {"test_accuracy": "test accuracy", "train_loss": "train loss (nats)", "auc": "AUC of LiRA"}
radius_steps = radius_frame[radius_frame.optimizer == f"{treatment}-{without}"]
figures.save(figures.radius_response(radius_steps, panels), run, "dose")

# %% [markdown]
# **How to read it.** Paired differences from radius 0, with 95% intervals. Left to right: what is gained, how
# well the training half is fitted, what is leaked. If
# leakage rises only where the train loss falls, then fitting may be the cause rather than flatness: the
# next section separates the two.

# %% [markdown]
# ## Where does it turn? Leakage against train loss
#
# **Claim.** The effect is a property of SAM, not of how far training has gone.
#
# **How we test it.** We train for several numbers of epochs, from far short of fitting the training half to far beyond
# it, each with its own full learning-rate schedule, and look at leakage two ways: at *equal epochs*, and
# at *equal train loss*. For the second the baseline is trained for more numbers of epochs in between, and its
# AUC is interpolated, in log loss, to the loss that the other reached; where it did not bracket that loss, nothing is
# said. How it bends between two runs is not known, so it is drawn as a straight line and as the parabolas through
# one run more; the interval spans what all of them give.

# %%
wanted = {(e, name): run.train(name, run.sweep, epochs=e) for e in run.length_sweep() for name in (baseline, treatment)}
wanted |= {(e, baseline): run.train(baseline, run.sweep, epochs=e) for e in run.between()}
usable = compare.keep_common_models(wanted, essential=[(run.epochs, baseline), (run.epochs, treatment)])
length_frame = compare.length_table(usable)
about = {"note": [f"epochs={e}" for e in length_frame.epochs], "n_models": len(usable[run.epochs, treatment].ids)}
results.add(length_frame, **about)
equal_epochs = length_frame[(length_frame.optimizer == pair) & (length_frame.metric == "auc")]
show_table(equal_epochs, across=["epochs"])

# %% [markdown]
# One line joins numbers of epochs, the other radii, so that both ways of moving the train loss can be seen. A point
# is a whole ensemble; all are of the same models here, since LiRA finds more the more shadows it has.

# %%
by_length, by_radius = compare.on_the_same(usable, radius_sweep)
by_length = length_frame if by_length is usable else compare.length_table(by_length)
by_radius = radius_frame if by_radius is radius_sweep else compare.radius_table(by_radius, treatment, without)
figures.save(
    figures.leakage_against_loss(compare.loss_series(by_length, by_radius, baseline, treatment)), run, "regimes"
)

# %%
equal_loss = compare.at_equal_loss(usable, treatment, baseline)
notes = [f"at equal train loss {row.train_loss:.3g}, baseline between {row.between}" for row in equal_loss.itertuples()]
results.add(equal_loss, optimizer=pair, attack="lira", note=notes, n_models=len(usable[run.epochs, treatment].ids))
display(equal_loss.style.format(precision=4).hide(axis="index"))
for row in equal_epochs.itertuples():
    show_text(
        f"After {row.epochs} epochs, {treatment} leaks {describe_sign(row, *than)} {baseline} ({percentage_points(row)} of AUC)."
    )
for row in equal_loss.itertuples():
    show_text(f"At train loss {row.train_loss:.2g}, where {treatment} is after {row.epochs} epochs, it leaks "
        f"{describe_sign(row, *than)} {baseline} ({percentage_points(row)} of AUC).")  # fmt: skip

# %% [markdown]
# **How to read it.** Where the lines cross, the sign of the effect turns. Where they coincide at equal loss, the train
# loss explains the leakage and the optimizer adds nothing. The column `between` gives the losses of the baseline's two
# neighbouring runs: where they are far apart and the curve bends, the interval is wide.

# %% [markdown]
# ## How flat are the minima?
#
# **Claim.** The sharpness-aware minima are flatter.
#
# **How we test it.** On each model's own training half: the largest eigenvalue of the Hessian, by power
# iteration, and how far the loss can rise within a ball of radius $\rho$ around the weights.

# %%
flat = flatness.flatness_table(ensembles, run.rho)
results.add(flat)
show_table(flat)
for metric in flat.metric.unique():
    words = describe_sign(
        difference(flat, metric, pair), "sharper than", "flatter than", "neither flatter nor sharper than"
    )
    show_text(f"`{metric}`: {treatment} is {words} {baseline}.")

# %% [markdown]
# ## A control: shuffled membership
#
# **Claim.** None of the above is an artefact of the attacks or of how we score them.
#
# **How we test it.** The same logits, with membership matrices that have the same design but say nothing about
# training. A sound attack must then guess: AUC 0.5. (The attacks share these shuffles, so their misses come together;
# one 95% interval in twenty misses by chance.)

# %%
null = compare.null_table(ensembles[treatment], run.seed)
results.add(null, optimizer=treatment, note="null control: shuffled membership")
show_table(null, across=["metric"])
show_text(null_control(null))

# %% [markdown]
# ## Another control: a planted leak
#
# **Claim.** The attacks find a leak that is certainly there.
#
# **How we test it.** One example is put into the pool many times over (fewer in a small pool), all copies on the same
# side of every half, and the baseline is trained on halves of that pool. So of two partners one was trained on the
# example that often and the other never. It is the example of which the main ensemble's non-members are
# least sure: none would know it unseen. Given both partners, an attack finds the pair if it scores the
# example higher for the one that saw it; a coin would find half.

# %%
hardest, times = compare.least_sure(phis[baseline], member), compare.leak_times(len(run.dataset.y))
leaky, place = memorization.leak(run.dataset, hardest, times, seed=run.seed)
planted = run.train(baseline, compare.PLANTED, dataset=leaky, subset=0.5)
asked, ids = compare.label_only_of_one(planted, place, compare.PLANTED, where)
sides = np.array(planted.only(ids).member)[:, [place]]
found = [compare.planted_table(compare.scores(planted), np.array(planted.member), place)]
found = pd.concat([*found, compare.planted_table({"label_only": asked}, sides, 0)], ignore_index=True)
results.add(found, optimizer=baseline, note=f"planted leak: one example trained {times} times",
            n_models=found.n_models, n_examples=len(leaky.y))  # fmt: skip
show_text(f"Trained {times} times: {planted_leak(found)}")

# %% [markdown]
# Beside it the same example in the main ensemble, trained once and no more, with the same measure.

# %%
once = compare.planted_table(scored[baseline], member, hardest)
results.add(once, optimizer=baseline, note="the same example trained once", n_models=once.n_models)
show_text(f"Trained once: {planted_leak(once)}")
show_table(pd.concat([found.assign(trained=f"{times} times"), once.assign(trained="once")]), across=["trained"])

# %% [markdown]
# **How to read it.** Shares of pairs found, with exact intervals, which are wide: a few pairs can show that an attack
# works, not how well. `entropy` sees how sure a model is but not of what: where non-members are sure of a wrong label,
# it may miss the leak without a fault. The copies stay together, so what judges them, a network or a class's threshold,
# was learned from other examples alone, and may miss the leak as well. The example trained once is no null: it was
# chosen because it is hard, and what is hard and learnt all the same is what leaks.

# %% [markdown]
# ## Beside the paper's numbers
#
# The paper works in two regimes. *Full training set*: one model trained on all of it with augmentation, attacked by
# thresholds. *Halves*: 256 models on random halves of the training set, attacked by LiRA and RMIA. Ours is the second
# regime, at a smaller size: compare signs, and only then sizes.

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
paper = pd.DataFrame(rows, columns=["regime", "dataset", "attack", "SGD", "SAM", "SGD test", "SAM test"])
display(paper.style.format(precision=2, na_rep="").hide(axis="index"))

# %% [markdown]
# This run, in the same shape and in per cent. Its intervals stand in the tables above.

# %%
ours = compare.beside_paper(leak, accuracy, baseline, treatment)
ours.insert(0, "regime", f"halves, {len(member)} models, N = {member.shape[1]}")
display(ours.style.format(precision=2, na_rep="").hide(axis="index"))

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above, whatever they are.

# %%
for line in conclusions(accuracy, auc, equal_epochs, equal_loss, flat, pair):
    show_text(line)
show_text(f"All numbers of this run: `{results.path.name}` beside this notebook's copy, {results.count()} rows.")

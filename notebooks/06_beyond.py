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
# # 6. Beyond the paper: variants, causes, defences, and who pays
#
# The paper's claim is about sharpness-aware training *in general*. It compares a handful of optimizers at one
# strength each, and leaves open what makes the effect come and go, what protects, and whom it hits. This notebook
# trains many small ensembles, all on the same halves with the same initial weights and batch orders, and asks.
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

from lib.analysis import compare, interventions, memorization
from lib.study import experiments, figures
from lib.study.results import Results
from lib.study.text import bought, describe_sign, joined, label, percentage_points, pick, show_table, show_text, sign

figures.style()
baseline, treatment = run.names[0], run.treatment
pair, than = f"{treatment}-{baseline}", ("more than", "less than", "no differently from")
results = Results("06_beyond", run, n_models=run.few)
show_text(run.describe() + f" Here an ensemble has {run.few} models, a private one and its baseline {run.private}.")

# %% [markdown]
# ## Variants: who sits on the frontier?
#
# **Claim.** Every sharpness-aware optimizer tests better than SGD and leaks more.

# %% [markdown]
# **How we test it.** SAM and six of its relatives at several radii; weight averaging (SWA), which finds flat minima
# without looking for them; and SharpReg, which looks for *sharp* ones (a negative radius), an earlier version of the
# paper's defence.

# %% [markdown]
# | optimizer | what it changes | gradients a step |
# |---|---|---|
# | `sam` | the gradient at the worst point nearby (Foret et al. 2021) | 2 |
# | `asam` | "nearby" in units of each weight (Kwon et al. 2021): its radii are ten times SAM's | 2 |
# | `gsam` | also pulls the two losses together (Zhuang et al. 2022) | 2 |
# | `looksam` | SAM every fifth step, its flat direction reused (Liu et al. 2022) | 1.2 |
# | `msam` | a worst point for each half of the batch (Behdin et al. 2023) | 2 |
# | `fsam` | without the full gradient's share of the ascent (Li et al. 2024) | 2 |
# | `esam` | a random part of the weights, half of the batch (Du et al. 2022) | 1.8 |
# | `swa` | averages the weights of the last quarter (Izmailov et al. 2018) | 1 |

# %%
made = interventions.variants(run, run.strengths, run.few)
made = compare.keep_common_models(made, essential=[(baseline, 0.0), (treatment, run.recipe(treatment).rho)])
table = interventions.variant_table(made)
own = np.array([row.rho == run.recipe(row.optimizer.removesuffix(f"-{baseline}")).rho for row in table.itertuples()])
results.add(table, n_models=len(made[baseline, 0.0].ids), note=np.where(own, "variants", "variants, other radius"))
wanted = table.metric.isin(["auc", "test_accuracy"]) & ~table.optimizer.isin([n for n, _ in made])
show_table(table[wanted & own], across=["metric"])

# %% [markdown]
# The table has each optimizer at its own radius (the run's; ASAM's is ten times as large, as its authors have
# it), with the options it has by default, less the baseline. In the picture an ensemble is a mark, its place the paired difference from the baseline, its bars
# 95% intervals; larger marks have larger radii. Full marks are beaten by none: beaten means that another tests
# better or leaks less, its paired interval (widened for the number of pairs) clear of zero, and is no worse in the other
# respect.

# %%
steps = table[wanted].assign(optimizer=lambda f: f.optimizer.str.removesuffix(f"-{baseline}"))
wide = steps.pivot(index=["optimizer", "rho"], columns="metric", values=["value", "ci_low", "ci_high"])
wide.columns = [f"{metric}_{value}" for value, metric in wide.columns]
wide = wide.loc[[key for key in made if key in wide.index]].reset_index()
beaten = interventions.dominated(made)
kept = [key for key, by in beaten.items() if not by]
figures.save(figures.frontier(wide, kept), run, "frontier")

# %%
both = interventions.signs(table)
test, leak = {1: "better", 0: "no differently", -1: "worse"}, {1: "more", 0: "no differently", -1: "less"}
for kind in dict.fromkeys([(1, 1), *both.values()]):  # the claim's first, then what else there is
    named = [label(*key) for key, found in both.items() if found == kind]
    show_text(f"Of {len(both)} sharpness-aware ensembles, **{len(named)} test {test[kind[0]]} and leak {leak[kind[1]]}** "
        f"than {baseline}: {joined(named)}.")  # fmt: skip
own_radius = [key for key in both if key[1] == run.recipe(key[0]).rho]
failing = [label(*key) for key in own_radius if both[key][0] < 0]
show_text(f"At the radii and options of the table, these test *worse* than {baseline}: {joined(failing)}.")
show_text(f"Beaten by none: {joined([label(*key) for key in kept])}.")
show_text(f"What beats {baseline}: {joined([label(*key) for key in beaten[baseline, 0.0]])}.")

# %% [markdown]
# **How to read it.** Only an ensemble in the lower right quarter improves on the baseline in both respects. A chain of
# marks that rises to the right is the trade that the paper describes: accuracy bought with privacy, whatever
# the optimizer's name. A chain that falls to the right contradicts it here. Far to the left lie radii or options that
# do not suit this data or this length of training: an author's default may be one of them, and fails here.

# %% [markdown]
# ## At equal test accuracy, equal train loss, equal compute
#
# **Claim.** At the same accuracy, or the same fit, or the same cost, SAM still leaks more.

# %% [markdown]
# **How we test it.** The baseline and SAM are trained for several numbers of epochs (the first notebook's ensembles).
# At *equal accuracy* and *equal train loss* the baseline's AUC is interpolated between two of its runs to the place that
# SAM reached (a straight line and two parabolas; the interval spans all three); where its runs do not bracket the
# place, or differ there by no more than noise, nothing is said. At *equal compute* the baseline gets as many
# more epochs as a step of the other takes gradients: twice the epochs against SAM, whose step takes two.

# %%
epochs = {(e, name): run.train(name, run.few, epochs=e) for e in run.length_sweep() for name in (baseline, treatment)}
epochs |= {(e, baseline): run.train(baseline, run.few, epochs=e) for e in run.between()}
alike = experiments.equal_compute(run)
epochs |= {(e, treatment): run.train(treatment, run.few, epochs=e) for e in alike}
epochs |= {(e, baseline): run.train(baseline, run.few, epochs=e) for e in alike.values()}
main = [(run.epochs, baseline), (run.epochs, treatment), (alike[run.epochs], baseline)]
epochs = compare.keep_common_models(epochs, essential=main)
base, sharp = ([e for (_, name), e in epochs.items() if name == kind] for kind in (baseline, treatment))
accuracy, loss = (
    compare.at_equal_accuracy(epochs, treatment, baseline),
    compare.at_equal_loss(epochs, treatment, baseline),
)
spent = [(e, more) for e, more in alike.items() if (more, baseline) in epochs and (e, treatment) in epochs]
frames = [
    compare.contrast({baseline: epochs[more, baseline], treatment: epochs[e, treatment]}).assign(epochs=e)
    for e, more in spent
]
compute = pd.concat(frames).query("optimizer == @pair and metric in ['auc', 'test_accuracy']")

# %%
about = {"optimizer": pair, "attack": "lira", "n_models": len(base[0].ids)}
results.add(accuracy, note=[f"equal accuracy {a:.4f}" for a in accuracy.test_accuracy], **about)
results.add(loss, note=[f"equal loss {at:.4f}" for at in loss.train_loss], **about)
results.add(compute, note=[f"equal compute, {treatment} {e} epochs" for e in compute.epochs], n_models=len(base[0].ids))
for row in accuracy.itertuples():
    place = f"At test accuracy {row.test_accuracy:.1%} ({treatment} after {row.epochs} epochs, {baseline} between {row.between})"
    show_text(f"{place}, {treatment} leaks {describe_sign(row, *than)} {baseline}: {percentage_points(row)} of AUC.")
for row in loss.itertuples():
    place = f"At train loss {row.train_loss:.2g} ({treatment} after {row.epochs} epochs)"
    show_text(f"{place}, {treatment} leaks {describe_sign(row, *than)} {baseline}: {percentage_points(row)} of AUC.")
for e, more in spent:
    gain, rise = (compute[(compute.epochs == e) & (compute.metric == m)].iloc[0] for m in ("test_accuracy", "auc"))
    show_text(
        f"At equal compute ({treatment} {e} epochs, {baseline} {more}): accuracy {percentage_points(gain)}, AUC {percentage_points(rise)}."
    )

# %%
reached = [interventions.test_accuracy(e) for e in base]
most = max(interventions.test_accuracy(e) for e in sharp)
show_text(
    f"{baseline}'s best test accuracy over all lengths of training is {max(reached):.1%}, {treatment}'s is {most:.1%}. "
    f"For {len(sharp) - len(accuracy)} of {treatment}'s {len(sharp)} runs {baseline} has no two neighbours that differ clearly."
)

# %% [markdown]
# **How to read it.** The three comparisons hold different things fixed, and none is *the* fair one. An engineer who
# needs a given accuracy cares about the first; whoever asks what sharpness adds beyond a closer fit, about the second;
# whoever pays for the computer, about the third.

# %% [markdown]
# ## Why: what switches the effect off?
#
# **Claim.** The effect belongs to sharpness-aware training, not to a batch size, a length or a regularizer.

# %% [markdown]
# **How we test it.** One thing is changed at a time, for both optimizers, and the paired effect on LiRA's AUC is
# measured anew. The grey band is the effect as the run is. An effect counts as *switched off* at a level if its interval
# there is not clear of zero on the side where it was, and the change from the run as it is, also paired, is clear of zero.

# %%
found = interventions.causes(run, run.few, run.most_levels)
effects = interventions.effect_table(found)
notes = [f"cause: {f} {level}" for f, level in zip(effects.factor, effects.level, strict=True)]
n_models = len(next(iter(found.values())).ids)
results.add(effects, optimizer=pair, attack="lira", note=notes, n_models=n_models)
here = effects[effects.metric == "auc"].reset_index(drop=True)
figures.save(figures.effects(here, f"{treatment} minus {baseline}: AUC of LiRA"), run, "causes")

# %%
change = effects[effects.metric == "auc_change"].reset_index(drop=True)
columns = ["factor", "level", "train_accuracy", "train_accuracy_treatment", "test_gain"]
display(here[columns].style.format(precision=3).hide(axis="index"))
was = sign(here.iloc[0])
moved = [i for i in range(1, len(here)) if sign(change.iloc[i]) == -was != 0]
off = [i for i in moved if sign(here.iloc[i]) != was]
names = [f"{f} {level}" for f, level in zip(here.factor, here.level, strict=True)]
show_text(
    f"As it is, {treatment} leaks {describe_sign(here.iloc[0], *than)} {baseline}: {percentage_points(here.iloc[0])} of AUC."
)
if was:
    weaker = [names[i] for i in moved if i not in off]
    show_text(f"**Switched off at**: {joined([names[i] for i in off])}. Weakened, not off: {joined(weaker)}.")
    turned = [names[i] for i in off if sign(here.iloc[i]) == -was]
    show_text(f"Turned into its opposite at: {joined(turned)}.")

# %% [markdown]
# **How to read it.** `train_accuracy` is the baseline's, `train_accuracy_treatment` SAM's, at each level; look at them
# first. A level that keeps SAM from fitting its training half changes two things at once, and says little about
# sharpness. Label noise also changes the examples: part of what leaks there is which wrong labels were learnt.

# %% [markdown]
# ## Defences: what each costs and buys
#
# **Claim.** Leakage can be bought down; the question is the price in accuracy.

# %% [markdown]
# **How we test it.** Each defence is trained (or, for temperature, served) on the baseline's halves. The attacker knows
# the defence: shadow models are trained and served the same way. Beside LiRA stands the attack without shadow
# models, a threshold on the confidence.

# %%
defended = {"none": run.train(baseline, run.few)}
for name, changes in interventions.defences(run).items():
    defended[name] = run.train(**{"optimizer": baseline, "n_models": run.few, **changes})
defended = compare.keep_common_models(defended, essential=["none"])
defended |= {f"temperature {t}": interventions.tempered(defended["none"], t) for t in (0.25, 4)}
costs = interventions.defence_table(defended).rename(columns={"optimizer": "label"})

# %%
results.add(costs, optimizer=costs.label, rho="", note="defence", n_models=len(defended["none"].ids))
levels = costs[costs.label.isin(list(defended)) & ~costs.attack.eq("confidence")]
strict = interventions.strict_rate(levels)
panels = {"test_accuracy": "test accuracy", "auc": "AUC of LiRA"}
panels |= {f"tpr@{rate:g}": f"TPR of LiRA at {100 * rate:g}% FPR" for rate in strict}
figures.save(figures.side_by_side(levels, panels, "none"), run, "defences")

# %%
cheaper = costs[costs.label.str.endswith("-none")].assign(name=lambda f: f.label.str.removesuffix("-none"))
for name in [n for n in defended if n != "none"]:
    show_text(bought(name, cheaper[cheaper.name == name], strict))
if 0.001 not in strict:
    show_text(
        "The TPR at 0.1% FPR is not reported: these ensembles have too few non-members for ten false positives at it."
    )

# %% [markdown]
# **How to read it.** Left, what is paid; middle and right, what is bought; grey, the undefended baseline. Temperature
# changes no prediction, and on two classes no ranking that LiRA uses; on more it changes which examples the attack
# confuses, and an attacker who sees all the probabilities can undo it. A defence
# that moves the threshold attack but not LiRA only confuses an attacker who did not adapt.

# %% [markdown]
# ### With a guarantee: DP-SGD and DP-SAM
#
# Clipping every example's gradient and adding noise bounds what *any* attack can learn. The bound, $\epsilon$, is
# computed by an accountant for what we compare: a training half with the example, against the same half with another
# in its place, batches drawn without replacement. DP-SAM spends its budget on two noisy gradients a step.
# From below, our attack certifies an $\epsilon$ of its own: it must not exceed the claimed one.

# %%
delta = interventions.delta_of(run)
private = interventions.private(run, run.epsilons, run.private, delta)
if private:
    private = compare.keep_common_models(private, essential=[(baseline, np.inf)])
    labels = {k: k[0] if np.isinf(k[1]) else f"{k[0]}, epsilon {k[1]:g}" for k in private}
    guard = interventions.defence_table({labels[k]: e for k, e in private.items()}).rename(
        columns={"optimizer": "label"}
    )
    about = {"optimizer": guard.label, "rho": "", "note": "privacy", "n_models": len(private[baseline, np.inf].ids)}
    results.add(guard, **about)
    shown_rows = guard[guard.label.isin(labels.values()) & ~guard.attack.eq("confidence")]
    their = {m: words for m, words in panels.items() if m in set(shown_rows.metric)}
    display(figures.save(figures.side_by_side(shown_rows, their, baseline), run, "privacy"))

# %% [markdown]
# What each costs and buys, against the same network without noise:

# %%
if private:
    for name in [n for n in labels.values() if n != baseline]:
        show_text(bought(name, guard[guard.label == f"{name}-{baseline}"], interventions.strict_rate(shown_rows)))
elif interventions.private_arch(run) is None:
    show_text(
        f"Not run: {run.arch} has BatchNorm, which mixes the examples of a batch, and no twin without it; "
        f"or {baseline} asks for gradients anew within a step, which no accountant counts."
    )
else:
    show_text(
        f"Not run: fewer than 8 of {run.private} models of {interventions.private_arch(run)} learn, even without noise."
    )

# %%
if private:
    bounds = interventions.epsilon_table(private, delta)
    shown = bounds[["optimizer", "epsilon", "value"]].rename(columns={"value": "lower bound"})
    display(shown.style.format({"epsilon": "{:g}", "lower bound": "{:.3f}"}).hide(axis="index"))
    claimed = bounds[np.isfinite(bounds.epsilon)]
    results.add(claimed, rho="", n_models=about["n_models"])

# %% [markdown]
# A fault of the accountant or of the noise shows only where the attack, left undisturbed, certifies more than is claimed.

# %%
if private and claimed.empty:
    show_text("Every private ensemble was left out: no claim is left to check.")
elif private:
    broken = claimed[claimed.value > claimed.epsilon]
    verdict = f"None of {len(claimed)} bounds exceeds its claim"
    verdict = verdict if broken.empty else f"**{len(broken)} bounds exceed their claims: a fault**"
    loosest = bounds.value[np.isinf(bounds.epsilon)].iloc[0]
    show_text(f"{verdict} (delta {delta:g}). Without noise, LiRA certifies an epsilon of at least {loosest:.2f}.")
    if loosest <= claimed.epsilon.min():
        show_text("That is no more than the smallest claim: with so few models the check could not have found a fault.")

# %% [markdown]
# **How to read it.** Between the bound and the claim lies what the accountant must allow for and our attack does not
# exploit; a claim can be loose, a bound can be weak, but a bound above a claim would be a bug. On training
# halves this small, an $\epsilon$ of one digit costs much of the accuracy.

# %% [markdown]
# ## Who pays?
#
# **Claim.** SAM exposes the same examples as SGD, only more.

# %% [markdown]
# **How we test it.** Per class: LiRA's AUC within each class, and the test accuracy of each class, since an overall accuracy
# can hide a class that nobody recognizes. Per example: how well $\phi$ tells the models with it from those without
# (AUC), ranked; the ranks under the two optimizers are compared on *different* models, and so are those of one
# optimizer with itself: noise alone keeps the latter from agreeing perfectly.

# %%
two = {name: made[name, 0.0 if name == baseline else run.recipe(name).rho] for name in (baseline, treatment)}
by_class = interventions.class_table(two)
results.add(by_class, attack=["lira" if m == "auc" else "" for m in by_class.metric],
            note=[f"class={c}" if c else "classes weighted alike" for c in by_class["class"]], n_models=len(two[baseline].ids))  # fmt: skip
if (by_class.metric == "auc").any():
    display(figures.save(figures.classes(by_class, baseline, treatment), run, "classes"))
balanced = by_class[by_class.metric == "balanced_test_accuracy"]
show_table(balanced, across=["optimizer"])

# %%
change = by_class[(by_class.metric == "auc") & (by_class.optimizer == pair)]
signs = [sign(row) for row in change.itertuples()]
show_text(
    f"Of {len(change)} classes, {signs.count(1)} leak more under {treatment}, {signs.count(-1)} less, "
    f"{signs.count(0)} without a detectable difference."
)
worst = by_class[(by_class.metric == "auc") & by_class.optimizer.isin(two)].sort_values("value")
for name in two:
    top = worst[worst.optimizer == name].tail(1).itertuples()
    for row in top:
        show_text(f"Most exposed under {name}: class {row[worst.columns.get_loc('class') + 1]}, {row.value:.3f} "
            f"[{row.ci_low:.3f}, {row.ci_high:.3f}], with {row.size} examples in the pool.")  # fmt: skip

# %%
agreement = interventions.agreement(two)
results.add(agreement, note="range over splits of the models", n_models=len(two[baseline].ids))
show_table(agreement)
within = [pick(agreement, name, "exposure_rank_correlation") for name in two]
across = pick(agreement, f"{baseline} and {treatment}", "exposure_rank_correlation")
for row in agreement[agreement.metric == "exposure_rank_correlation_corrected"].itertuples():
    show_text(
        f"Across optimizers the ranks agree at {across:.2f}, where noise allows {np.sqrt(np.prod(within)):.2f} (the "
        f"geometric mean of the agreements within): corrected for noise, {row.value:.2f}, from {row.ci_low:.2f} to "
        f"{row.ci_high:.2f} over the splits."
    )
if len(agreement) == 3:
    show_text("The ranks are all noise here: even within one optimizer some splits do not agree.")

# %% [markdown]
# **How to read it.** A corrected agreement near 1 means that both optimizers expose the same people, and SAM moves the
# level; well below 1, that it exposes others; far from 1 on either side over the splits, that these models are too few
# to tell. The intervals of this table are the range over random splits of the models, not confidence intervals.

# %% [markdown]
# ## Where atypical is known
#
# **Claim.** SAM memorizes atypical sub-patterns, gains on them, and exposes them.

# %% [markdown]
# **How we test it.** In the data set `subclasses` every example's sub-pattern is known, and so is how many share it: a
# ground truth for "atypical" that no estimate had a hand in. On other data this section has nothing to say.
#
# **How to read it.** Read a difference beside its level: where an AUC or a memorization is near 1 already, SAM has
# little to add.

# %%
if run.dataset.pattern is None:
    show_text(f"{run.dataset.name} has no known sub-patterns: `make study DATASET=subclasses` runs this section.")
else:
    member = np.array(two[baseline].member)
    memorized = {n: memorization.memorization(compare.signal(e, "confidence"), member).value for n, e in two.items()}
    patterns = interventions.pattern_table(two, memorized)
    results.add(patterns, attack=["lira" if m == "auc" else "" for m in patterns.metric],
                note=[f"pattern shared by {s}" for s in patterns["size"]], n_models=len(member))  # fmt: skip
    for metric in patterns.metric.unique():
        show_table(patterns[patterns.metric == metric].drop(columns="metric").rename(columns={"size": "metric"}))

# %%
if run.dataset.pattern is not None:
    for metric in patterns.metric.unique():
        rows = patterns[(patterns.metric == metric) & (patterns.optimizer == pair)]
        for row, size in zip(rows.itertuples(), rows["size"], strict=True):
            show_text(
                f"`{metric}`, sub-patterns shared by {size}: {treatment} less {baseline} {percentage_points(row)}."
            )
    atypical = interventions.most(patterns, (*two, pair))
    for (name, metric), (size, value) in atypical.items():
        show_text(f"`{metric}` of {name} is largest on sub-patterns shared by {size} ({value:.3f}).")

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above, whatever they are.

# %%
more, less = (sum(leak == s for _, leak in both.values()) for s in (1, -1))
show_text(f"**Variants.** {more} of {len(both)} sharpness-aware ensembles leak more than {baseline}, {less} less.")
for e, more in spent:
    rise = compute[(compute.epochs == e) & (compute.metric == "auc")].iloc[0]
    show_text(
        f"**At equal compute** ({e} and {more} epochs) {treatment} leaks {describe_sign(rise, *than)} {baseline}."
    )
for name, frame in (("accuracy", accuracy), ("train loss", loss)):
    found = [sign(row) for row in frame.itertuples()]
    counted = f"{treatment} leaks more in {found.count(1)}, less in {found.count(-1)} of {len(found)} comparisons."
    show_text(f"**At equal {name}** {counted if found else 'nothing can be compared.'}")
if was:
    show_text(f"**Causes.** The effect is switched off by {joined([names[i] for i in off])}.")

# %%
lowered = cheaper[(cheaper.attack == "lira") & (cheaper.metric == "auc") & (cheaper.ci_high < 0)].sort_values("value")
said = [f"{row['name']} ({percentage_points(row)})" for _, row in lowered.iterrows()]
show_text(f"**Defences.** Of those without a guarantee these lower LiRA's AUC, most first: {joined(said)}.")
if private:
    price = guard[guard.label.str.endswith(f"-{baseline}") & (guard.metric == "test_accuracy")]
    said = [
        f"{row.label.removesuffix(f'-{baseline}')} ({percentage_points(row)} of accuracy)" for row in price.itertuples()
    ]
    show_text(f"**With a guarantee**: {joined(said)}.")
show_text(
    f"**Who pays.** {signs.count(1)} of {len(signs)} classes leak more under {treatment}, {signs.count(-1)} less."
)
if run.dataset.pattern is not None:
    said = [f"{metric} of {name}: those shared by {size}" for (name, metric), (size, _) in atypical.items()]
    show_text(f"**Atypical sub-patterns.** Largest, by how many examples share a sub-pattern: {'; '.join(said)}.")
show_text(f"All numbers: `{results.path.name}` beside this notebook's copy, {results.count()} rows.")

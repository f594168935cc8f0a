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
# # 7. Verdict: the paper's claims, one by one
#
# Which claims of *Membership Privacy Risks of Sharpness-Aware Minimization* (arXiv 2310.00488) hold in this run, and
# which do not? The other notebooks measure. This one judges their numbers in `results.csv`: first the answer, then the
# families of attacks, then the other claims. It trains nothing, and no verdict is typed: with other numbers, the same
# cells reach other verdicts.

# %% tags=["setup"]
import shlex
from contextlib import nullcontext, suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.colors import ListedColormap

from lib.attacks.catalogue import HEADLINES
from lib.study import figures, settings, verdict
from lib.study.results import COLUMNS, differing, read
from lib.study.text import joined, show_table, show_text
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
given = {name: value for name in type(run.parameters).model_fields if (value := globals().get(name)) is not None}
command = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())
figures.style()

# %% [markdown]
# ## The answer
#
# Of this run, and of all runs in the folders beside it. Both optimizers must be tuned, each at its own best learning
# rate, and must fit their training halves. Then the same question at equal test accuracy (notebook 05).

# %%
folder, found = Path(run.out).resolve(), []
for path in sorted(folder.parent.glob("*/results.csv"), key=lambda path: (path.parent != folder, path)):
    with nullcontext() if path.parent == folder else suppress(ValueError):  # others may be of another kind
        found.append(read(path).assign(run=path.parent.name))
nothing = pd.DataFrame(columns=[*COLUMNS, "run"])
rows = pd.concat([part for part in found if len(part)] or [nothing], ignore_index=True)
own = rows[rows.run == folder.name]
everything = verdict.ledger(rows)
show_text(verdict.headline(everything))

# %% [markdown]
# ## What there is to judge
#
# We read the rows of this run, and of all runs in the folders beside it: `outputs/digits/`, `outputs/cifar10/` and so
# on. A claim without rows is *not run*, which is a verdict too.

# %%
show_text(f"`{folder.name}` has {len(own)} numbers, from these notebooks: {joined(sorted(own.notebook.unique()))}.")
if own.empty:
    show_text(f"`python -m lib.study {command}` fills it.")
for sentence in differing(run.out):
    show_text(f"**Mind:** {sentence}. Verdicts from different notebooks then speak of different trainings.")
show_text(f"Other runs beside it: {joined(rows.run[rows.run != folder.name].unique())}.")

# %% [markdown]
# ## The rule
#
# A claim says that something is larger or smaller under sharpness-aware training. We judge the paired difference from
# the baseline by its 95% interval and by delta, the *smallest effect that matters*. With enough models any interval
# excludes zero, but a difference of a hundredth of a point would concern nobody. So a verdict needs both: an interval
# that excludes zero and an effect of at least delta. It also needs a comparison that can be tested: a network that has
# not fitted its data, or has learned nothing, leaks little under any optimizer.

# %%
show_text(verdict.__doc__)
show_text("Delta: " + "; ".join(f"{delta:g}{unit or ' (plain)'}" for unit, delta in verdict.DELTAS.items()) + ".")
show_text(f"Headline attacks: {joined(HEADLINES)}.")

# %% [markdown]
# *Points* are for rates: accuracies, AUC, TPR, advantage, shares of examples. *Per cent* of the baseline's value are
# for quantities without a natural unit: variances and eigenvalues. Their intervals are made on the scale of the
# logarithm, so no change is below -100%. *Plain* is for a distance in weights.
#
# Most claims use the rule *more*. "Memorization is not lower" and "no gain in bucket 5" use *not less*: they hold if
# a meaningful change in the wrong direction is excluded. The premises of the theorem use *present*, which asks
# whether there is anything at all, so a measured nothing contradicts them.
#
# "More so at a strict FPR" is two tests. The TPR at the strictest recorded FPR must rise, and it must rise by a
# larger factor than the AUC above guessing, $\mathrm{AUC} - 1/2$. An AUC of 0.97 or more can hardly grow; there the
# effect is also given in logits and as a TPR.

# %% [markdown]
# ## Does it leak more? One line for each family of attacks
#
# **Claim.** The paper: sharpness-aware training leaks more, under every attack.
#
# **Method.** The attacks of a family look at the same thing, so they share one verdict, corrected for their number. The
# column *effect* has what was measured, the differences in AUC, and *test* has what they had to reach.

# %%
ledger = verdict.ledger(own)
write_atomic(Path(run.out) / "verdict.csv", ledger.to_csv(index=False))
is_family = ledger.claim.str.startswith("leaks_more_")
display(verdict.table(ledger[is_family]))

# %% [markdown]
# ## The other claims
#
# *Whose* tells the paper's claims from checks of ours, which ask more than the paper says: at every length of training,
# at equal train loss, without ties, against a control. Lengths that do not fit have a claim of their own.

# %%
display(verdict.table(ledger[~is_family]))

# %%
for whose, part in ledger.groupby("whose", sort=False):
    counts = part.verdict.value_counts().items()
    show_text(f"Of claims that are {whose}: {joined(f'**{n}** {name}' for name, n in counts)}.")
judged = (~ledger.verdict.isin(["not run", "not testable here"])).sum()
show_text(f"{judged} claims were judged. Nearly all use 95% intervals, of which one in twenty misses by chance.")

# %% [markdown]
# **How to read it.** The claims are not independent: the attacks look at the same outputs, and several claims share
# the headline attacks' numbers. Count kinds of evidence, not lines. A verdict is about this data set, this network and
# this length of training. If it is *inconclusive*, the effect beside its test says whether the interval was too wide,
# the effect too small, or the attacks contradict each other. If it is *not testable here*, the effect says what would have to be
# otherwise: more epochs, a task that can be learned, more models.

# %% [markdown]
# ## All runs in one picture
#
# **Claim.** What holds on one data set and network holds on others.
#
# **Method.** The same rule on every run beside this one, one column each.

# %%
columns = {}
for group, part in everything.groupby(verdict.GROUP, sort=False):
    for optimizer in filter(None, part.optimizer.unique()):
        of_pair = part[part.optimizer.isin([optimizer, ""])].set_index("claim")  # "": claims that compare no optimizers
        columns["\n".join(filter(None, dict.fromkeys((*group, optimizer))))] = of_pair.verdict
statements = everything.drop_duplicates("claim").set_index("claim").statement
tiles = pd.DataFrame(columns).rename(index=statements)
n_rows, n_columns = tiles.shape
figure, axis = plt.subplots(figsize=(1.8 * n_columns, 0.27 * n_rows))
codes = tiles.map(list(verdict.SHADES).index)
colours = list(verdict.SHADES.values())
axis.pcolormesh(codes, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, edgecolor="0.7", lw=0.5)
for (row, column), word in np.ndenumerate(tiles.to_numpy()):
    axis.text(column + 0.5, row + 0.5, word, ha="center", va="center", fontsize=9, color="0.1")
axis.set_xticks(np.arange(n_columns) + 0.5, tiles.columns.map(figures.plain), fontsize=9)
axis.set_yticks(np.arange(n_rows) + 0.5, tiles.index.map(figures.plain), fontsize=9)
axis.tick_params(length=0, labeltop=True, labelbottom=False)
axis.invert_yaxis()
axis.grid(False)
figures.save(figure, run, "verdict")

# %% [markdown]
# **How to read it.** A line of one shade is a claim that holds, or fails, everywhere. A line of two shades is where
# to look for the reason. The runs differ in data, network, size and length of training at once, so the picture alone
# cannot name it. "Other architectures alike" therefore compares only runs on the same data set.

# %% [markdown]
# ## Where ours differs from the paper
#
# For each claim that this run contradicts: what was measured, and on what. The paper trains 256 models of ResNet-18,
# WideResNet-28-2 and VGG-16 on 50,000 images (CIFAR-10, CIFAR-100, EyePACS), and of an MLP on tables (Purchase-100,
# Texas-100). Its other setting may be the reason.

# %%
against = ledger[ledger.verdict == "contradicted"]
for row in against.itertuples():
    show_text(f"- **{row.statement}** {row.effect}. *Here:* {row.dataset}, {row.arch}, {row.setting or 'drawn data'}.")
if against.empty:
    show_text("This run contradicts none of the claims.")

# %% [markdown]
# Three of the claims can be contradicted although the paper is right:
#
# - *Threshold on one output*: for `gap` see Yeom's bound below. Where the generalization gap falls, it must leak less.
# - *Memorization not lower*: its mean is the same gap under another name (notebook 02).
# - *At every length of training*: the paper reports trained models, not half-trained ones.
#
# Which examples are atypical is known only in the data set `subclasses`. Elsewhere the two claims on *known
# sub-patterns* are not run.

# %% [markdown]
# ## Yeom's bound: what a small gap forbids
#
# **Claim.** SAM narrows the generalization gap, and the advantage of an attacker grows all the same.
#
# **Method.** Yeom et al. (2018, theorem 2): take a loss between 0 and $B$, and an adversary that answers "member"
# with probability $1 - \mathrm{loss}/B$. Its advantage TPR − FPR is exactly gap$/B$, where the gap is the expected
# loss on non-members minus that on members. With the 0-1 loss, $B = 1$, this adversary is our `gap` attack, and the
# gap is train accuracy minus held-out accuracy.

# %%
main = own[(own.experiment == "main") & (own.coordinate == "")].drop_duplicates(
    ["optimizer", "baseline", "attack", "metric"]
)
gap = main[main.metric == "generalization_gap"].assign(attack="(generalization gap)")
advantage = main[(main.metric == "advantage") & main.attack.isin(["gap", "confidence", *HEADLINES])]
show_table(pd.concat([gap, advantage]).drop(columns="metric"))
if len(gap) and len(advantage):
    same = advantage[advantage.attack == "gap"].set_index(["optimizer", "baseline"]).value
    difference = (same - gap.set_index(["optimizer", "baseline"]).value).abs().max()
    show_text(f"The advantage of `gap` and the generalization gap differ by {difference:.1g} at most.")

# %% [markdown]
# **How to read it.** One thing *is* forbidden: that the gap falls while `gap` gains. They are one number. Nothing
# else is. The gap bounds the best attacker from below, never from above. The `gap` attack sees who is classified
# correctly. Other attacks see by how much, or compare with models trained without the example. Two models may have no
# gap at all and still be told apart by their confidences. For the cross-entropy, which has no $B$, there is no such
# bound either. Differential privacy would bound every attack, and neither optimizer has it.

# %% [markdown]
# ## Where to look next
#
# Each claim's evidence is in a notebook of this folder. These claims are not run yet, and these commands run them:

# %%
alike = verdict.CLAIMS.claim[verdict.CLAIMS.optimizer == verdict.EACH]  # these need more than a run has by default
missing = ledger[(ledger.verdict == "not run") & ~ledger.claim.isin(alike)]
for book, part in missing.groupby("notebook"):
    show_text(f"- {len(part)} from notebook {book} ({joined(part.claim)}): `python -m lib.study {book} {command}`")
if missing.empty:
    show_text("None: every claim that one run can test has a verdict.")

# %% [markdown]
# "Other optimizers alike" needs two sharpness-aware optimizers in one run (`optimizers`). "Other architectures alike"
# needs the same data set under two networks, each in its own folder (`arch` and `out`). Lengths of training are swept
# only for the last sharpness-aware optimizer of a run. An interval that holds zero narrows with the square root of
# the number of models (`n_models`; those in the store are kept). The paper's own size is the preset `paper`.

# %% [markdown]
# ## Appendix: each attack by itself
#
# Here intervals are not corrected for the number of attacks: with many of them, some exclude zero by chance.

# %%
display(verdict.table(verdict.ledger(own, verdict.BY_ATTACK)))
show_text(f"The ledger is kept in `verdict.csv` beside this copy: {len(ledger)} claims, {judged} of them judged.")

# %% [markdown]
# ## What an engineer should do

# %%
auc = main[(main.metric == "auc") & main.attack.isin(HEADLINES) & main.optimizer.isin([run.baseline, run.treatment])]
level = auc[auc.baseline == ""].pivot(index="attack", columns="optimizer", values="value")
if level.shape[1] < 2:
    show_text("Run notebook 01 first: without an attack there is no advice.")
else:
    attack = level.max(axis=1).idxmax()
    before, after = level.loc[attack, run.baseline], level.loc[attack, run.treatment]
    share = abs(after - before) / max(before - 0.5, 1e-9)
    choose = "by its accuracy, not for privacy" if share < 0.25 else "with its leakage in mind"
    show_text(
        f"**Choose the optimizer {choose}.** The strongest headline attack, {attack}, tells members at an AUC of "
        f"{before:.3f} under {run.baseline} and {after:.3f} under {run.treatment}; the change is {share:.0%} of what "
        f"{run.baseline} leaks."
    )
    show_text(f"**Tune {run.baseline} before you replace it.** {verdict.headline(ledger)}")
    show_text(
        f"**Neither optimizer protects anyone.** With an AUC of {max(before, after):.3f}, "
        + ("members can be told: " if max(before, after) > 0.55 else "few members can be told; even so, ")
        + "only differential privacy bounds every attack (notebook 06 shows what it costs)."
    )

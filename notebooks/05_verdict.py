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
# # 5. Verdict: the paper's claims, one by one
#
# The other notebooks measure. This one judges: each claim of *Membership Privacy Risks of Sharpness-Aware
# Minimization* (arXiv 2310.00488) is held against the numbers that they left in `results.csv`, by one rule that is
# stated before the table is shown. Nothing is trained here, and no verdict is typed: with other numbers, the same
# cells say other things.
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

import shlex

import pandas as pd
from IPython.display import display

from lib.study import figures, verdict
from lib.study.results import differing
from lib.study.text import number, show_text
from lib.training.store import write_atomic

figures.style()
here = Path(run.out).resolve().name

# %% [markdown]
# ## What there is to judge
#
# The rows of this run, and of the runs in the folders beside it, if any: `outputs/digits/`, `outputs/cifar10/` and so
# on. A claim whose rows are missing is *not run*, which is a verdict too.

# %%
rows = verdict.beside(run.out)
own = rows[rows.run == here]
books = ", ".join(sorted(own.notebook.unique()))
show_text(
    f"`{here}` has {len(own)} numbers from {books}." if len(own) else f"`{here}` has no results: nothing was run."
)
given = " ".join(f"--{n} {shlex.quote(str(v))}" for n in settings.PARAMETERS if (v := globals()[n]) is not None)
if own.empty:
    show_text(f"`python -m lib.study {given}` fills it.")
for sentence in differing(run.out):
    show_text(f"**Mind:** {sentence}. Verdicts from different notebooks then speak of different trainings.")
beside = rows.run[rows.run != here].unique()
show_text(f"Beside it: {', '.join(beside)}." if len(beside) else "There are no other runs beside it.")

# %% [markdown]
# ## The rule
#
# A claim says that something is larger or smaller under sharpness-aware training. It has an effect (the paired
# difference to the baseline), a 95% interval, and a *smallest effect that matters*, delta, fixed beforehand: with
# enough models any difference is clear of zero, and one of a hundredth of a point would still concern nobody.
# A verdict needs both, an interval clear of zero and an effect of at least delta.

# %%
show_text(verdict.__doc__)
units = {kind.strip() or "plain": 100 * delta if kind else delta for kind, delta in verdict.DELTAS.items()}
show_text("Delta: " + "; ".join(f"{delta:g} ({kind})" for kind, delta in units.items()) + ".")

# %% [markdown]
# *Points* are for rates: accuracies, AUC, TPR, advantage, shares of examples. *Per cent* are for what has no natural
# unit, variances and eigenvalues, relative to the baseline's value. The *plain* one is for a distance in weights.
#
# Most claims are of the first kind, *more*. "Memorization is not lower" and "no gain in bucket 5" are *not less*: they
# hold unless a change the wrong way can't be excluded. The premises of the theorem are *present*: they ask whether
# something is there at all, so that a measured nothing contradicts them.

# %% [markdown]
# "More so at a strict FPR" is two tests. LiRA's TPR at the strictest FPR that was recorded must rise, and its relative
# increase must exceed the relative increase of AUC over guessing, $(\mathrm{AUC} - \mathrm{AUC}_0)/(\mathrm{AUC}_0 - 1/2)$.
# Errors of differences and of the baseline are added in quadrature, as if independent.

# %% [markdown]
# ## The ledger
#
# **Claim.** All of them, a line each.
#
# **How we test it.** The column *effect* holds what was measured, *test* what it had to reach. *Whose* tells the paper's claims
# from checks of ours, which ask more than the paper says: at every length of training, at equal train loss, without ties, against a control. Attacks are judged by
# AUC, each by its name.

# %%
ledger = verdict.ledger(own)
write_atomic(Path(run.out) / "verdict.csv", ledger.to_csv(index=False))
display(verdict.table(ledger))

# %%
for whose, part in ledger.groupby("whose", sort=False):
    counts = part.verdict.value_counts()
    show_text(f"Of claims that are {whose}: " + "; ".join(f"**{n}** {name}" for name, n in counts.items()) + ".")
judged = int((ledger.verdict != "not run").sum())
show_text(f"{judged} claims were judged, nearly all by intervals of 95%, of which one in twenty misses by chance.")

# %% [markdown]
# **How to read it.** The claims are not independent: the attacks look at the same outputs, and the claims that begin with
# lira share its number. Count kinds of evidence, not lines. A verdict is about this data set, this network and this
# length of training; *inconclusive* says in its effect whether the interval was too wide or the effect too small.

# %% [markdown]
# ## All runs in one picture
#
# **Claim.** What holds on one data set and network holds on others.
#
# **How we test it.** The same rule on every run beside this one, a column each.

# %%
everything = verdict.ledger(rows)
statements = everything.drop_duplicates("claim").set_index("claim").statement
figures.save(figures.tiles(verdict.wide(everything).rename(index=statements), verdict.SHADES), run, "verdict")

# %% [markdown]
# **How to read it.** A line of one shade is a claim that travels. A line of two shades is where to look for what decides:
# the runs differ in data, network, size and length of training at once, so the picture alone can't say which.
# "Other architectures alike" therefore compares only runs on the same data set.

# %% [markdown]
# ## Where ours differs from the paper
#
# For each claim that this run contradicts: what was measured, and what in the setting is not the paper's. Either may
# be the reason.

# %%
against = ledger[ledger.verdict == "contradicted"]
for row in against.itertuples():
    show_text(f"- **{row.statement}** {row.effect}. *Here:* {row.differs}.")
if against.empty:
    show_text("This run contradicts none of the paper's claims.")

# %% [markdown]
# Three of the claims can be contradicted without any fault of the paper's, and should be read with that in mind.
#
# - *Under `gap`*: see Yeom's bound below. Where the generalization gap falls, this attack must leak less.
# - *Memorization not lower*: its mean is the same gap under another name (notebook 02).
# - *At every length of training*: the paper reports trained models, not half-trained ones.
#
# What is atypical is known only where the data were made so (`subclasses`): elsewhere the two claims on *known
# sub-patterns* are not run.

# %% [markdown]
# ## Yeom's bound: what a small gap forbids
#
# **Claim.** SAM narrows the generalization gap, and the advantage of an attacker grows all the same.
#
# **How we test it.** Yeom et al. (2018, theorem 2): for a loss between 0 and $B$, the adversary that answers
# "member" with probability $1 - \mathrm{loss}/B$ has the advantage TPR − FPR = gap$/B$ exactly, the gap being
# the expected loss on non-members less that on members. With the 0-1 loss, $B = 1$, this adversary is our `gap`
# attack, and the gap is train accuracy less held-out accuracy.

# %%
main = own[own.note == ""].drop_duplicates(["optimizer", "attack", "metric"])
gap = main[main.metric == "generalization_gap"].assign(attack="(generalization gap)")
advantage = main[(main.metric == "advantage") & main.attack.isin(["gap", "confidence", "lira"])]
both = pd.concat([gap, advantage])
both["shown"] = [number(*row) for row in both[verdict.NUMBERS].itertuples(index=False)]
display(both.pivot(index="attack", columns="optimizer", values="shown").style)
if len(gap) and len(advantage):
    same = advantage[advantage.attack == "gap"].set_index("optimizer").value - gap.set_index("optimizer").value
    show_text(f"The advantage of `gap` and the generalization gap differ by {same.abs().max():.1g} at most.")

# %% [markdown]
# **How to read it.** It *is* forbidden that the gap falls and `gap` gains: they are one number. Nothing else is.
# The gap is a lower bound on what the best attacker achieves, never an upper one: it sees who is
# classified correctly, while the others see by how much, or compare with models trained without the example. Two models
# can have no gap at all and be told apart by their confidences. Nor is there a bound for the
# cross-entropy, which has no $B$. What would bound every attack is differential privacy, which neither
# optimizer has.

# %% [markdown]
# ## Where to look next
#
# Each claim's evidence is in a notebook of this folder. Those that are not run yet, and the command that runs them:

# %%
missing = ledger[(ledger.verdict == "not run") & ~ledger.claim.isin(verdict.ALIKE)]
for book, part in missing.groupby("notebook"):
    command = f"python -m lib.study {book} {given}"
    show_text(f"- {len(part)} from notebook {book} ({', '.join(part.claim)}): `{command}`")
if missing.empty:
    show_text("None: every claim that one run can test has a verdict.")

# %% [markdown]
# "Other optimizers alike" needs two sharpness-aware optimizers in one run (`optimizers`), "other architectures alike" the
# same data set under two networks, each in its own folder (`arch` and `out`). Lengths of training are swept for the last
# sharpness-aware optimizer of a run only. An interval that holds zero narrows
# with the square root of the number of models (`n_models`; those in the store are kept). The paper's own size is the
# preset `paper`.

# %%
show_text(f"The ledger is kept in `verdict.csv` beside this copy: {len(ledger)} claims, {judged} of them judged.")

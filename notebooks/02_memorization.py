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
# A model *memorizes* a training example to the extent that it is right about it only because it was trained on it
# (Feldman 2020). The paper says that SAM does not memorize less than SGD, but differently: more examples at a middling
# degree (0.6 to 0.85), where sub-patterns sit that are rare but not unique. This notebook estimates memorization for
# every example of the pool, asks first whether the estimates can be believed, and then compares the two optimizers
# example by example.
#
# The ensembles are those of the first notebook, so nothing new has to be trained but one control.

# %% [markdown]
# **The definition.** For training algorithm $A$ and example $i$ of the pool,
#
# $$\mathrm{mem}(i) = \Pr_{h \sim A(S),\ i \in S}[h(x_i) = y_i] - \Pr_{h \sim A(S),\ i \notin S}[h(x_i) = y_i]$$
#
# over random subsets $S$ (Feldman & Zhang 2020). An easy example is learned from the others: 0. An example that
# nothing else resembles is right only if it was seen: near 1. We estimate it for two outputs: for *correctness*, as the paper
# does, and for the *confidence* $p_y$ in the true label, which is finer and is what attacks look at.

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
from scipy import stats

from lib.analysis import compare, memorization
from lib.attacks import intervals
from lib.data.dataset import inputs
from lib.study import figures
from lib.study.results import Results
from lib.study.text import describe_sign, difference, percentage_points, pick, show_table, show_text
from lib.training.store import write_atomic

baseline, treatment = run.names[0], run.treatment
pair = f"{treatment}-{baseline}"

# %% [markdown]
# ## The estimates and their precision
#
# **How.** Every example is in some of the models and out of the others (in half of them, where the subset is 0.5; Feldman
# and Zhang used 0.7: set `subset`). The estimate is a difference of two means over models, and like every such
# difference it has a standard error, for each example by itself. It falls with the square root of the number of models.

# %%
figures.style()
than = ("more than", "less than", "no differently from")
show_text(run.describe())
ensembles = compare.keep_common_models({name: run.train(name) for name in run.names})
member = np.array(ensembles[baseline].member)
results = Results("02_memorization", run, n_models=len(member))
outputs = {kind: {n: compare.signal(e, kind) for n, e in ensembles.items()} for kind in ("correct", "confidence")}
mem = {kind: {n: memorization.memorization(v, member) for n, v in of.items()} for kind, of in outputs.items()}
write_atomic(
    Path(run.out) / "memorization.csv", memorization.per_example(mem, run.dataset).round(5).to_csv(index=False)
)

# %% [markdown]
# How precise are they?

# %%
for kind, found in mem.items():
    middle, most = np.quantile(found[baseline].se, [0.5, 0.95])
    need = memorization.models_needed(most, len(member), 0.02)
    show_text(
        f"For `{kind}` under {baseline}, {len(member)} models give a standard error of {middle:.3f} in the median and "
        f"{most:.3f} at the 95th percentile; {need} models would bring the latter to 0.02."
    )

# %% [markdown]
# Every example's estimates are kept in `memorization.csv` beside this copy, under its index in the data set as loaded.

# %% [markdown]
# ## Can the estimates be believed?
#
# **Claim.** The estimator measures what it says: how much leaving one example out would change the prediction on it.
#
# **How we test it.** For ridge regression the effect of leaving example $i$ out of $S$ is known in closed form,
# $h_i\,(y_i - f_S(x_i))/(1-h_i)$ with the leverage $h_i = x_i^\top(X_S^\top X_S + \lambda I)^{-1}x_i$. On ten
# examples we can train on *every* subset, where the estimate must equal the average of that formula to the last digit;
# and then on random subsets only, where it must miss by as much as its standard error says.

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
show_text(f"Over all 1,024 subsets the estimate differs from exact leave-one-out by at most {worst:.1e}.")

# %%
counts, errors, stated = [16, 32, 64, 128, 256, 512], [], []
for count in counts:
    draws = [rng.integers(1024, size=count) for _ in range(100)]
    draws = [d for d in draws if min(subsets[d].sum(0).min(), (~subsets[d]).sum(0).min()) > 1]
    found = [memorization.memorization(predicted[d], subsets[d]) for d in draws]
    errors.append(np.sqrt(np.mean([(f.value - truth) ** 2 for f in found])))
    stated.append(np.sqrt(np.mean([f.se**2 for f in found])))
display(
    figures.save(figures.convergence(counts, errors, stated, "error of memorization"), run, "memorization_convergence")
)
slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
show_text(f"On random subsets the error falls as the number of models to the power {slope:.2f}.")

# %% [markdown]
# **How to read it.** Dots on the line: the standard error is honest. (In our ensembles a model without $i$ has one other
# example in its place, since all halves are equally large: an effect of order $1/N$.)

# %% [markdown]
# ### Planted faults
#
# **Claim.** The estimates rank examples as they should: what must be memorized at the top, what others stand in for
# at the bottom.
#
# **How we test it.** We train the baseline once more on a pool with planted faults. Some examples get a wrong label:
# nothing but memory can reproduce it. Some examples drawn at random, and some of the most memorized ones, get four twins each:
# what an example teaches, its twins teach too. Each is ranked among all the others, before and after. Both trainings are as long as
# the longest of the first notebook, since a wrong label that was never fitted was not memorized.

# %%
n, n_pool = max(2, len(run.dataset.y) // 200), len(run.dataset.y)
top = np.argsort(-mem["confidence"][baseline].value)
sources = np.concatenate([top[:n], rng.choice(top[n:], 3 * n, replace=False)])
copies = min(4, max(1, n_pool // 24))
faulty, wrong, twins = memorization.plant(run.dataset, sources, 2 * n, copies, seed=run.seed)
placed = []
for pool in (run.dataset, faulty):
    found = run.train(
        baseline, min(run.n_models, max(32, run.n_models // 4)), pool, epochs=run.length_sweep()[-1], subset=0.5
    )
    placed.append(memorization.memorization(compare.signal(found, "confidence"), np.array(found.member)).value)
fitted = compare.signal(found, "correct")[:, wrong][np.array(found.member)[:, wrong]].mean()
show_text(f"Models that were given the wrong labels reproduce {fitted:.0%} of them.")

# %% [markdown]
# An example's rank is the share of the pool that is memorized less than it.

# %%
kinds = {"wrong label": wrong, "memorized, given twins": sources[:n], "random, given twins": sources[n:]}
groups = {
    f"{kind}, {when}": m[rows]
    for kind, rows in kinds.items()
    for when, m in zip(("before", "after"), placed, strict=True)
}
groups["all others"] = np.delete(placed[1], np.concatenate([sources, wrong, twins.ravel()]))
figures.save(figures.planted({kind: m for kind, m in groups.items() if len(m)}), run, "planted")

# %% [markdown]
# The ranks, before and after, and the change with its interval over the planted examples.

# %%
ranks = [stats.rankdata(m) / n_pool for m in placed]
for kind, rows in kinds.items():
    change = ranks[1][rows] - ranks[0][rows]
    moved = intervals.row("rank_change_of_planted", intervals.t_interval(change), optimizer=baseline)
    after = {"metric": "rank_of_planted", "value": ranks[1][rows].mean(), "optimizer": baseline}
    frame = pd.DataFrame([moved, after])
    results.add(frame, note=kind, n_models=len(found.ids))
    words = describe_sign(frame.iloc[0], "rises", "falls", "does not move detectably")
    show_text(f"{kind}: the mean rank {words}, from {ranks[0][rows].mean():.0%} to {ranks[1][rows].mean():.0%}.")

# %% [markdown]
# **How to read it.** A dot is an example, the bar holds the middle half of each kind. Where ranks fall with twins, memorization
# is a property of an example *in its pool*, not of the example. (Twins on both sides of a membership game are also why
# duplicates spoil attacks: a "non-member" with a twin among the members is none.)

# %% [markdown]
# ## How much is memorized, and where
#
# **Claim.** SAM's memorization is not lower than SGD's; it is shifted to the middle, 0.6 to 0.85.
#
# **How we test it.** The distribution of the estimates under both, the share of examples in each of five bands, and
# the paired differences of these shares. Intervals come from leaving out groups of models, and groups of examples.

# %%
values = {name: mem["correct"][name].value for name in (baseline, treatment)}
display(figures.save(figures.memorization_density(values, memorization.EDGES), run, "memorization"))
tables = {}
for kind, note in (("correct", ""), ("confidence", "of confidence")):
    for name in run.names[1:]:
        contrast = {n: outputs[kind][n] for n in (baseline, name)}
        tables[kind, name] = memorization.memorization_table(contrast, member)
        again = (tables[kind, name].optimizer == baseline) & (name != run.names[1])  # its rows are recorded once
        results.add(tables[kind, name][~again], note=note)
    show_table(tables[kind, treatment])

# %%
frames = {}
for kind in outputs:
    table = tables[kind, treatment]
    frames[f"memorization of {kind}"] = table[(table.optimizer == pair) & table.metric.str.contains("share")]
figure = figures.interval_panels(
    frames, f"share of examples: {treatment} minus {baseline}", "band of memorization",
    ["< 0.1", "0.1-0.4", "0.4-0.6", "0.6-0.85", "> 0.85"],
)  # fmt: skip
display(figures.save(figure, run, "memorization_bands"))
for kind in outputs:
    middle = difference(tables[kind, treatment], "memorization_share_0.6_0.85", pair)
    words = describe_sign(middle, "more examples than", "fewer examples than", "as many examples, within error, as")
    show_text(f"By `{kind}`, {treatment} has {words} {baseline} between 0.6 and 0.85 ({percentage_points(middle)}).")

# %% [markdown]
# **How to read it.** Most examples are easy and lie at 0; the axis of the first figure is logarithmic so that the tail can be
# seen. Estimates are noisy, and noise smears an example at 0 over a band as wide as its standard error, under both optimizers
# alike: compare the two, not the bands with zero. The table's lower half says the same for the confidence.

# %% [markdown]
# ## The mean is the generalization gap
#
# **Claim.** With equal subsets, mean memorization *is* train accuracy minus accuracy on the examples left out.
#
# **Why.** Average the definition over $i$: the first term is the accuracy of models on their members, the second on
# their non-members. No training algorithm enters. So of two optimizers that both fit their training set, the one that generalizes
# better *must* memorize less on average. "Not lower" is then possible only where SAM fits better or generalizes worse.

# %%
accuracy = compare.accuracies(ensembles)
for name in (baseline, treatment):
    gap, mean = pick(accuracy, name, "generalization_gap"), mem["correct"][name].value.mean()
    show_text(
        f"{name}: gap between accuracies {gap:.6f}, mean memorization {mean:.6f}, apart by {abs(gap - mean):.1e}."
    )
mean, fit = (
    difference(tables["correct", treatment], "mean_memorization", pair),
    difference(accuracy, "train_accuracy", pair),
)
show_text(
    f"Here {treatment} memorizes {describe_sign(mean, *than)} {baseline} on average ({percentage_points(mean)}), while its train accuracy "
    f"differs by {percentage_points(fit)}. So *not lower* is {describe_sign(mean, 'more than met', 'contradicted', 'not contradicted')}."
)

# %% [markdown]
# **How to read it.** So compare distributions, not means: the mean says nothing that the accuracies do not. (Where the subset is not
# 0.5, examples are in unequal numbers of models, and the two numbers differ a little.)

# %% [markdown]
# ## Who moved?
#
# **Claim.** SAM memorizes *other* examples than SGD, not the same ones more or less.
#
# **How we test it.** One optimizer's memorization against the other's, and the paired change of each example with its own
# standard error, judged at a false discovery rate of 5% (Benjamini & Hochberg 1995). The examples that
# moved most are picked on one half of the models and shown as the *other* half sees them: picked and shown on the same
# ones, they would seem to move further than they do.

# %%
moves = outputs["confidence"][treatment].astype(float) - outputs["confidence"][baseline]
change = memorization.memorization(moves, member)
df = np.minimum(member.sum(0), (~member).sum(0)) - 1  # at least as cautious as Welch's
found = stats.false_discovery_control(2 * stats.t.sf(np.abs(change.value) / np.maximum(change.se, 1e-9), df)) < 0.05
for sign, word in ((1, "more"), (-1, "less")):
    share = (found & (np.sign(change.value) == sign)).mean()
    show_text(f"{treatment} memorizes {share:.1%} of the examples detectably {word} than {baseline} (of confidence).")
halves = [np.arange(len(member)) // 2 % 2 == k for k in (0, 1)]
picked, kept = (memorization.memorization(moves[half], member[half]).value for half in halves)
up, down = np.argsort(-picked)[:8], np.argsort(picked)[:8]
values = {name: mem["confidence"][name].value for name in (baseline, treatment)}
se = np.median(mem["confidence"][baseline].se)
figures.save(figures.against(values, se, np.concatenate([up, down])), run, "memorization_pairs")


# %%
def caption(i):
    return f"{run.dataset.classes[run.dataset.y[i]]}\n{values[baseline][i]:.2f} to {values[treatment][i]:.2f}\n({kept[i]:+.2f})"


rows = {
    f"memorized more by {treatment}": [(run.dataset.x[i], caption(i)) for i in up],
    f"memorized less by {treatment}": [(run.dataset.x[i], caption(i)) for i in down],
}
display(figures.save(figures.captioned(rows), run, "movers"))
for word, chosen in (("more", up), ("less", down)):
    show_text(f"Picked as memorized {word}: a change of {picked[chosen].mean():+.3f} on the half that picked them, "
        f"{kept[chosen].mean():+.3f} on the other.")  # fmt: skip
rank = difference(tables["confidence", treatment], "memorization_spearman", pair)
show_text(f"The rank correlation of the two is {rank.value:.3f} [{rank.ci_low:.3f}, {rank.ci_high:.3f}].")

# %% [markdown]
# **How to read it.** Under each picture its label, its memorization under the two optimizers over all models, and, in brackets, the change
# on the models that had no say in picking it. A rank correlation near 1 means that the two memorize the same examples.

# %% [markdown]
# ## Are the movers atypical, and do attacks find them?
#
# **Claim.** What SAM adds is memory of atypical sub-patterns, and these are the examples that attacks name.
#
# **How we test it.** Rank correlations over the examples, of memorization and of its change, with four properties: *atypicality*,
# the distance to the nearest of the own class over that to the nearest of another class (in input space); *ambiguity*, the
# entropy of predictions by models that did not see the example; *exposure*, how well $\phi$ tells the models with the example from
# those without it (AUC over models: what LiRA lives on); and the change of exposure.

# %% [markdown]
# Memorization comes from one half of the models and the properties from the other, then they change places: taken from the
# same models, both would share their accidents, and correlate where there is nothing.

# %%
phi = {name: compare.signal(ensembles[name], "phi") for name in (baseline, treatment)}
unsure = compare.signal(ensembles[baseline], "entropy")
k = min(5, np.bincount(run.dataset.y).min() - 1)
atypical = memorization.atypicality(inputs(run.dataset)[0], run.dataset.y, k)


def traits(half):
    """Properties [N] of the examples, as one half of the models shows them."""
    exposed = {name: memorization.exposure(p[half], member[half]) for name, p in phi.items()}
    ambiguity = (unsure[half] * ~member[half]).sum(0) / (~member[half]).sum(0)
    found = {"ambiguity": ambiguity, "atypicality": atypical, "exposure": exposed[baseline]}
    return found | {"change of exposure": exposed[treatment] - exposed[baseline]}


# %%
sides, first = [], outputs["confidence"][baseline]
for one, two in (halves, halves[::-1]):
    own, moved = (memorization.memorization(v[one], member[one]).value for v in (first, moves))
    sides.append(({f"memorization ({baseline})": own, "change of memorization": moved}, traits(two)))
keys = [(q, t) for q in sides[0][0] for t in sides[0][1]]


def correlations(_, columns):
    return np.mean([[memorization.spearman(qs[q][columns], ts[t][columns]) for q, t in keys] for qs, ts in sides], 0)


frame = memorization.tidy(keys, memorization.jackknife(correlations, member))
results.add(frame.assign(metric="spearman_" + frame.metric.str.replace(" ", "_"), note=frame.optimizer), optimizer=pair)
show_table(frame.rename(columns={"optimizer": "quantity"}), across=["quantity"])

# %% [markdown]
# In words:

# %%
for row in frame[frame.optimizer == "change of memorization"].itertuples():
    words = describe_sign(row, "higher", "lower", "neither higher nor lower")
    show_text(f"Where {treatment} memorizes more than {baseline}, {row.metric} is {words} ({row.value:+.2f}).")

# %% [markdown]
# **How to read it.** The intervals are for new examples, given these models; noise in the estimates pulls correlations
# towards 0. A change that rises with ambiguity and atypicality is what the paper describes; one that falls with them says that
# SAM memorizes its odd examples *less*. Where the change of exposure follows the change of memorization, attacks find what
# the optimizer moved.

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above, whatever they are.

# %%
band = difference(tables["correct", treatment], "memorization_share_0.6_0.85", pair)
show_text(
    f"**How much.** {treatment} memorizes {describe_sign(mean, *than)} {baseline} on average ({percentage_points(mean)} of correctness)."
)
words = describe_sign(band, "more", "fewer", "not detectably more or fewer")
show_text(
    f"**Where.** Between 0.6 and 0.85 there are {words} examples than under {baseline} ({percentage_points(band)})."
)
show_text(f"**Who.** The two rank the examples alike to {rank.value:.2f}; {found.mean():.1%} of them moved detectably.")
row = frame[(frame.optimizer == "change of memorization") & (frame.metric == "change of exposure")].iloc[0]
words = describe_sign(row, "more exposed", "less exposed", "neither more nor less exposed")
show_text(
    f"**Does it leak?** Examples that {treatment} memorizes more than {baseline} are {words} under it ({row.value:+.2f})."
)
show_text(f"All numbers of this run: `{results.path.name}` beside this notebook's copy, {results.count()} rows.")

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
# # 5. When does SAM leak more? Tuned optimizers, equal loss, equal accuracy
#
# Notebook 1 compares SAM with SGD at one learning rate, one radius and one length of training. Another choice may give
# another sign. This notebook asks what decides the sign:
#
# - **Tuned.** Does SAM leak more than SGD when learning rate and weight decay are chosen well for each of them?
# - **Equal accuracy.** Is there an SGD that is as accurate as SAM and leaks less?
# - **Equal loss.** How much of the difference comes from fitting the training data more or less, and how much is left
#   when both have the same train loss? Does what is left grow with the radius, as it must if flatness itself leaks?
# - **The paper's explanation.** Where SAM contracts the outputs on non-members, do members stand out more?
# - **Causes and power.** Which change of the training switches the effect off, and how small an effect could this run
#   have seen?
#
# All ensembles of one pool share their halves, initial weights and batch orders, so every comparison is paired.
# Leakage is the AUC of three attacks: LiRA with shrunken variances, RMIA, and the mean of their ranks. They were chosen
# on 26 November 2026, before this notebook was first run.

# %% tags=["setup"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.interpolate import PchipInterpolator
from scipy.special import expit, logit

from lib.analysis import compare
from lib.attacks import catalogue, intervals
from lib.study import experiments, figures, settings, verdict
from lib.study.results import Results
from lib.study.text import describe_sign, joined, number, percentage_points, select, show_table, show_text, sign

# %% tags=["parameters"]
# Parameters that a reader would change first; the preset fills in what is None. `make study` takes many more.
preset: str = "default"  # tiny, default, small, fast, paper
dataset: str = "digits"  # digits, subclasses, mnist5k, cifar10, cifar100, eyepacs, purchase100, folder, npz, ...
data: str = None  # path, where the data set needs one
arch: str = None  # mlp, cnn, resnet18, wrn28_2, vgg16_bn, ... or your own as package.module:name
optimizers: str = None  # comma-separated, the first is the baseline: "sgd,sam,looksam"
rho: float = None  # radius of SAM's neighbourhood
n_models: int = None  # models per optimizer, an even number
epochs: int = None  # epochs of the main comparison

# %% tags=["setup"]
run = settings.notebook_run(globals())
baseline, treatment = run.baseline, run.treatment
fewer, few, swept = (experiments.n_models(run, kind) for kind in ("fewer", "few", "sweep"))
results = Results("05_when", run, n_models=few)
than = ("more than", "less than", "no differently from")
headline = catalogue.HEADLINES[0]
figures.style()
sizes = f"an ensemble of a sweep has {swept} models, one of another pool or of the causes {fewer}, any other {few}"
show_text(f"{run.describe()} Here {sizes}.")

# %% [markdown]
# ## Both sides tuned
#
# **Claim.** SAM leaks more than SGD where each has the settings that suit it.
#
# **Method.** We train both optimizers with several learning rates and weight decays, and SAM with several radii. Each
# model's *non-members* in the pool say how accurate a setting is; no model trained on its own non-members, and the test
# part is not looked at for the choice. The best setting of SGD is then compared with the best of SAM, on the test part
# and under the attacks.

# %%
made = run.ensembles("tuning")  # (optimizer, rho, lr, weight_decay) -> Ensemble
member = np.array(next(iter(made.values())).member)
groups = run.dataset.groups
held_out = {key: compare.on_pool(e, "correct", members=False) for key, e in made.items()}  # influence values [M, N]
fit = {key: compare.on_pool(e, "correct").mean() for key, e in made.items()}


def best(keys):
    """The setting that is right about most non-members."""
    return max(keys, key=lambda key: held_out[key].mean())


at_radius = {rho: best(key for key in made if key[1] == rho) for rho in dict.fromkeys(rho for _, rho, *_ in made)}
plain, sharp = at_radius[0.0], best(key for key in made if key[1])
rows = [(*key, held_out[key].mean(), fit[key]) for key in at_radius.values()]
columns = ["optimizer", "rho", "learning rate", "weight decay", "accuracy on non-members", "train accuracy"]
display(pd.DataFrame(rows, columns=columns).style.format(precision=4).hide(axis="index"))
show_text(f"The radius that suits {treatment} best here is {sharp[1]:g}; this run's own is {run.rho:g}.")
ends = []
for name, key in ((baseline, plain), (treatment, sharp)):
    tried = sorted({lr for one, _, lr, _ in made if one == name})
    ends += [f"{name} ({key[2]:g})"] if key[2] in (tried[0], tried[-1]) else []
decays = joined(f"{decay:g}" for decay in sorted({decay for *_, decay in made}))
said = "The best learning rate of either lies between others that were tried."
if ends:
    said = f"For {joined(ends)} the best learning rate is the largest or the smallest tried: another might be better still."
show_text(f"Weight decays tried: {decays}. {said}")

# %%
frames = [compare.contrast({baseline: made[plain], treatment: made[sharp]}).assign(coordinate="")]
for radius, key in at_radius.items():
    if radius and key != sharp:
        frame = compare.contrast({baseline: made[plain], treatment: made[key]}).assign(coordinate=f"rho={radius:g}")
        frames.append(frame[frame.optimizer == treatment])
tuned = pd.concat(frames, ignore_index=True)
tuned["rho"] = [0 if row.optimizer == baseline else row.coordinate[4:] or f"{sharp[1]:g}" for row in tuned.itertuples()]
results.add(tuned, experiment="tuned")
settings_of = {"optimizer": 0, "rho": 1, "chosen_lr": 2, "chosen_weight_decay": 3}
chosen = pd.DataFrame([{name: key[k] for name, k in settings_of.items()} for key in (plain, sharp)])
results.add(chosen.melt(["optimizer", "rho"], var_name="metric"), experiment="tuned")
tuned = tuned[tuned.coordinate == ""]
show_table(tuned[tuned.attack == ""])
leak = tuned[(tuned.attack != "") & (tuned.baseline == baseline)]
show_table(leak, across=["metric"])
for row in leak[leak.metric == "auc"].itertuples():
    said = f"leaks {describe_sign(row, *than)} {baseline} by `{row.attack}`: {percentage_points(row)} of AUC"
    show_text(f"Both tuned, {treatment} {said}.")

# %% [markdown]
# The best setting is often best by chance: its neighbours are as accurate, as far as we can tell. Leakage may differ
# between them. So we also take all settings that fit and whose accuracy on non-members cannot be told from the best
# one's, for either optimizer, and give the range of the differences in leakage between them.

# %%
aucs = {key: {a: compare.auc_influence_values(e, a) for a in catalogue.HEADLINES} for key, e in made.items()}
how = dict(clusters=intervals.pairs(member), columns=groups)
as_good = {}
for top in (plain, sharp):
    fitting = [key for key in made if key[0] == top[0] and fit[key] >= min(verdict.FITS, fit[top])]
    as_good[top] = [key for key in fitting if intervals.estimate(held_out[key] - held_out[top], **how).high >= 0]
spread = [aucs[b][headline].mean() - aucs[a][headline].mean() for a in as_good[plain] for b in as_good[sharp]]
ends = pd.DataFrame({"coordinate": ["lowest", "highest"], "value": [min(spread), max(spread)]})
about = dict(optimizer=treatment, baseline=baseline, attack=headline, rho="")
results.add(ends.assign(metric="auc_among_the_best"), experiment="tuned", **about)
show_text(
    f"Settings as accurate on non-members as the best, as far as we can tell: {len(as_good[plain])} of {baseline} and "
    f"{len(as_good[sharp])} of {treatment}. Between them, {treatment} minus {baseline} goes from {100 * min(spread):+.1f} to "
    f"{100 * max(spread):+.1f} points of AUC by `{headline}`."
)

# %% [markdown]
# **How to read it.** If the range holds both signs, tuning for accuracy does not decide who leaks more. Then the choice
# among equally accurate settings is free to be made by leakage.

# %% [markdown]
# ## Leakage against accuracy
#
# **Claim.** No SGD is as accurate as SAM and leaks less.
#
# **Method.** Every setting is a point: its test accuracy and its leakage, as paired differences from tuned SGD with 95%
# intervals. A line joins the learning rates of one optimizer at one radius; other weight decays are dotted. The tuned
# two are large. Hollow points fit less than 99% of their training half. A setting of SGD *is a better choice* than tuned
# SAM if its test accuracy is not clearly lower and its leakage is clearly lower, at a level that allows for the number of
# settings (Bonferroni), and if both fit.

# %%
cells = compare.contrast({plain: made[plain]} | made)
cells["baseline"] = np.where(cells.baseline == "", "", baseline)
cells[["optimizer", "rho", "lr", "weight_decay"]] = cells.optimizer.tolist()
cells["coordinate"] = [f"lr={row.lr:g}, weight_decay={row.weight_decay:g}" for row in cells.itertuples()]
drawn = (cells.metric == "test_accuracy") | ((cells.metric == "auc") & cells.attack.isin(catalogue.HEADLINES))
results.add(cells[drawn | (cells.baseline == "")], experiment="tuning")

shown = [attack for attack in catalogue.HEADLINES if attack != "combined"]
figure, axes = plt.subplots(1, len(shown), figsize=(6.2 * len(shown), 5), layout="constrained")
for axis, attack in zip(axes, shown, strict=True):
    figures.leakage_against_accuracy(axis, cells, attack, [plain, sharp])
axes[0].legend(fontsize=8)
figures.save(figure, run, "leakage_against_accuracy")

# %%
hits = {key: compare.hits_on_test(e) for key, e in made.items()}
bases = [key for key in made if not key[1] and fit[key] >= verdict.FITS]
level = 1 - 0.05 / max(1, len(bases))
better = []
for key in bases if fit[sharp] >= verdict.FITS else ():
    gain = intervals.estimate(hits[key] - hits[sharp], clusters=how["clusters"], columns=run.dataset.groups_test)
    leaks = {a: compare.auc_estimate(aucs[key][a] - aucs[sharp][a], run.dataset, level) for a in catalogue.HEADLINES}
    rows = [intervals.row("test_accuracy", gain, attack="")]
    rows = pd.DataFrame(rows + [intervals.row("auc", found, attack=a) for a, found in leaks.items()])
    place = f"lr={key[2]:g}, weight_decay={key[3]:g}"
    results.add(rows, experiment="frontier", optimizer=baseline, baseline=treatment, rho="", coordinate=place)
    if gain.high >= 0 and leaks[headline].high < 0:
        better.append((place, rows.iloc[0], select(rows, attack=headline)))
if fit[sharp] >= verdict.FITS:
    counts = pd.DataFrame({"metric": ["settings_that_fit", "better_choices"], "value": [len(bases), len(better)]})
    results.add(counts, experiment="frontier", optimizer=baseline, baseline=treatment, rho="", attack=headline)
    show_text(f"{len(better)} of {len(bases)} fitted settings of {baseline} are better choices than tuned {treatment}.")
else:
    show_text(f"Not testable here: tuned {treatment} fits {fit[sharp]:.1%} of its training half.")
for place, gain, leaks in better:
    changes = f"accuracy {percentage_points(gain)}, AUC of `{headline}` {percentage_points(leaks)}"
    show_text(f"- {baseline} with {place}: {changes}.")

# %% [markdown]
# ## On other pools
#
# **Claim.** What holds on one pool of examples holds on others.
#
# **Method.** The data are drawn anew with other seeds: another pool, other halves, other initial weights. On each pool
# the learning rates of both optimizers are tuned anew at the run's own radius and weight decay, by the non-members of
# that pool. The spread between the pools stands beside the interval of one pool.

# %%
others = run.ensembles("pools")  # (seed, optimizer, rho, lr, weight_decay) -> Ensemble
own_rho, rows = run.recipe(treatment).rho, []
n_fewer = len(next(iter(others.values())).ids) if others else few  # LiRA gets stronger with more models
tried = [key for key in experiments.of_pools(run) if key in made]
own_pool = {(run.seed, *key): made[key].only(made[key].ids[:n_fewer]) for key in tried}
for seed in (run.seed, *run.other_pools):
    found = {key[1:]: e for key, e in (own_pool | others).items() if key[0] == seed}
    right = {key: compare.on_pool(e, "correct", members=False).mean() for key, e in found.items()}
    chosen = [max((key for key in right if key[0] == name), key=right.get) for name in (baseline, treatment)]
    for kind, (one, other) in (("tuned", chosen), ("equal settings", experiments.own_settings(run))):
        if one in found and other in found:
            frame = compare.contrast({baseline: found[one], treatment: found[other]})
            of = " and ".join(f"lr {lr:g}, decay {decay:g}" for *_, lr, decay in (one, other))
            about = {"coordinate": f"seed={seed}, {kind}", "kind": kind, "settings": of}
            rows.append(frame[frame.baseline == baseline].assign(**about))
pools = pd.concat(rows, ignore_index=True)
results.add(pools, experiment="pools", rho=f"{own_rho:g}", n_models=n_fewer)
steps = pools[pools.metric.isin(["auc", "test_accuracy"])]
columns = {"metric": steps.coordinate + " (" + steps.settings + ")", "what": steps.metric + " " + steps.attack}
show_table(steps.assign(**columns, attack="", optimizer="", baseline=""), across=["what"])
for (kind, attack), part in steps[steps.metric == "auc"].groupby(["kind", "attack"], sort=False):
    if len(part) > 1:
        each, half = ", ".join(f"{100 * v:+.1f}" for v in part.value), (part.ci_high - part.ci_low).mean() / 2
        said = f"standard deviation between pools {100 * part.value.std():.1f}, half an interval {100 * half:.1f}"
        show_text(f"`{attack}`, {kind}: {each} points on {len(part)} pools; {said}.")
if len(run.other_pools) == 0:
    show_text("This run has one pool; `n_pools=3` asks for more.")

# %% [markdown]
# ## Where does it turn? Equal epochs and equal train loss
#
# **Claim.** The effect is a property of SAM, not of how far training has gone.
#
# **Method.** We train for several numbers of epochs, from far short of fitting the training half to far beyond it. Each
# training has its own full learning-rate schedule. At equal epochs SAM and SGD have different train losses. So we split
# the difference in leakage into two parts. SGD's AUC as a function of its train loss is a curve $B$, drawn through SGD's
# runs of several lengths. With SAM's AUC $A$, its train loss $\ell$, and SGD's AUC $B_0$ at the same epochs,
#
# $$\underbrace{A - B_0}_\text{total} = \underbrace{B(\ell) - B_0}_\text{from fitting more or less} + \underbrace{A - B(\ell)}_\text{at equal train loss}.$$
#
# The curve is monotone between neighbouring runs (PCHIP, logit of the AUC over the log of the loss). The intervals hold
# the errors of all AUCs and of all train losses. Nothing is said where no two runs of SGD enclose SAM's loss.


# %%
def on_the_same(*groups):
    """Groups of ensembles with the models that all have, if 8 or more: LiRA gets stronger with more shadow models."""
    shared = compare.common_ids([e for group in groups for e in group.values()])
    return [{k: e.only(shared) for k, e in group.items()} if len(shared) >= 8 else group for group in groups]


radius_sweep, lengths = on_the_same(run.ensembles("radius sweep"), run.ensembles("length sweep"))
n_swept = len(radius_sweep[0.0].ids)
by_epochs = {epochs: e for (epochs, name), e in lengths.items() if name == baseline}
frames = []
for epochs in sorted({k for k, _ in lengths}):
    both = {name: e for (k, name), e in lengths.items() if k == epochs}
    frames.append(compare.contrast(both).assign(epochs=epochs, coordinate=f"epochs={epochs}"))
length_frame = pd.concat(frames, ignore_index=True)
results.add(length_frame, experiment="length sweep", n_models=n_swept)
ends = sorted(epochs for epochs, name in lengths if name == treatment)
frames = []
for e in ends:
    both = lengths[e, treatment], by_epochs, lengths[e, baseline]
    frames.append(compare.decomposition(*both, treatment, baseline, coordinate=f"epochs={e}"))
split = pd.concat(frames, ignore_index=True)
own = length_frame[length_frame.metric.isin(["train_accuracy", verdict.SKILL]) & (length_frame.baseline == "")]
results.add(pd.concat([split, own]), experiment="decomposition", n_models=n_swept)  # where one fits less, no verdict
order = {"auc_total": "total", "auc_from_fit": "from fit", "auc_at_equal_loss": "at equal loss"}
fits = length_frame[(length_frame.metric == "train_accuracy") & (length_frame.baseline == "")]
fits = fits.pivot(index="epochs", columns="optimizer", values="value")[[baseline, treatment]]
display(fits.style.format("{:.1%}", na_rep="not trained").set_caption("train accuracy"))
for attack, part in split.groupby("attack", sort=False):
    show_text(f"By `{attack}`:")
    part = part.assign(metric=part.metric.map(order), attack="", optimizer=part.coordinate, baseline="")
    show_table(part, across=["metric"])
left = split[split.metric == "auc_at_equal_loss"]
not_fit = [e for e in ends if fits.loc[e].min() < verdict.FITS]
if not_fit:
    said = f"After {joined(map(str, not_fit))} epochs one of the two fits less than {verdict.FITS:.0%}"
    show_text(f"{said}: such a total compares how far training has gone.")

# %% [markdown]
# The figure shows SGD's curve with its band, and SAM as points: other numbers of epochs, and other radii.

# %%
without = str(radius_sweep[0.0].recipe.optimizer)
by_radius = {(treatment if rho else without, rho): e for rho, e in radius_sweep.items()}
radius_frame = compare.split_labels(compare.contrast(by_radius), "rho")
results.add(radius_frame, experiment="radius sweep", n_models=n_swept)
levels = pd.concat([length_frame, radius_frame[radius_frame.rho > 0]])  # of each optimizer, by epochs or by radius
levels = levels[(levels.metric == "auc") & (levels.attack == headline) & (levels.baseline == "")]
of_sgd = levels[levels.optimizer == baseline].sort_values("train_loss")
of_sam = levels[levels.optimizer == treatment]
figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
grid = np.geomspace(of_sgd.train_loss.min(), of_sgd.train_loss.max(), 200)
value, low, high = (
    expit(PchipInterpolator(np.log(of_sgd.train_loss), logit(of_sgd[side]))(np.log(grid)))
    for side in ("value", "ci_low", "ci_high")
)
axis.plot(grid, value, color=figures.COLOURS[0], label=f"{baseline}, epochs varied")
axis.fill_between(grid, low, high, color=figures.COLOURS[0], alpha=0.2)
axis.plot(of_sgd.train_loss, of_sgd.value, "o", color=figures.COLOURS[0])
for index, (name, below) in enumerate((("epochs", 6), ("rho", -13)), 1):
    rows = of_sam.dropna(subset=name)
    figures.error_bars(axis, rows.train_loss, rows, index, f"{treatment}, {name} varied", linestyle="")
    for x, y, word in rows[["train_loss", "value", name]].to_numpy():
        look = dict(textcoords="offset points", fontsize=8, color=figures.COLOURS[index])
        axis.annotate(f"{word:.3g}", (x, y), (6, below), **look)
axis.set(xscale="log", xlabel="train loss (nats), falling to the right", ylabel=figures.plain(f"AUC of {headline}"))
axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
axis.xaxis.set_major_formatter("{x:g}")
axis.xaxis.set_minor_formatter(NullFormatter())
axis.invert_xaxis()
axis.legend()
figures.save(figure, run, "leakage_against_loss")

# %% [markdown]
# **How to read it.** A point of SAM above the band leaks more than an SGD that fits as well. The total is what an engineer
# sees who swaps the optimizer and nothing else. The part at equal loss is what flatness adds beyond a closer fit.

# %% [markdown]
# ## More radius, more effect? And does it depend on the path?
#
# **Claim.** If flatness itself leaks, the part at equal loss grows with the radius $\rho$.
#
# **Method.** The same split for every radius. SGD can reach a train loss in two ways, by other numbers of epochs or by
# other learning rates, and we draw its curve along either path. If the paths disagree, "at equal loss" has no single
# answer: it depends on what SGD did to reach that loss.

# %%
same, at_rates, at_lengths = on_the_same(radius_sweep, made, lengths)
paths = {
    "epochs": {epochs: e for (epochs, name), e in at_lengths.items() if name == baseline},
    "learning rate": {
        lr: e for (name, _, lr, decay), e in at_rates.items() if name == baseline and decay == run.weight_decay
    },
}
parts = []
for path, curve in paths.items():
    for radius in filter(None, same):
        both = same[radius], curve, same[0.0]
        part = compare.decomposition(*both, treatment, baseline, coordinate=f"path={path}")
        parts.append(part.assign(rho=radius, path=path))
dose = pd.concat(parts, ignore_index=True)
results.add(dose, experiment="decomposition", n_models=len(same[0.0].ids))
named = dose[dose.attack == headline].assign(attack="", baseline="", metric=dose.metric.map(order))
named["optimizer"] = named.path + ", rho " + named.rho.map("{:g}".format)
show_table(named, across=["metric"])

# %%
figure, axes = plt.subplots(1, len(catalogue.HEADLINES), figsize=(12.3, 3.6), sharey=True, layout="constrained")
for axis, attack in zip(axes, catalogue.HEADLINES, strict=True):
    mine = dose[dose.attack == attack]
    total = mine[(mine.metric == "auc_total") & (mine.path == "epochs")]
    figures.error_bars(axis, total.rho, total, 0, "total")
    for index, path in enumerate(paths, 1):
        rows = mine[(mine.metric == "auc_at_equal_loss") & (mine.path == path)]
        figures.error_bars(axis, rows.rho * (1 + 0.02 * index), rows, index, f"at equal loss, by {path}")
    axis.axhline(0, color="0.3", lw=1)
    axis.set(title=figures.plain(attack), xlabel=r"$\rho$", xlim=(0, None))
axes[0].set_ylabel("difference in AUC")
axes[0].legend(fontsize=8)
figures.save(figure, run, "radius_at_equal_loss")

# %%
at_loss = dose[(dose.metric == "auc_at_equal_loss") & (dose.attack == headline)]
for path, rows in at_loss.groupby("path", sort=False):
    found = ", ".join(f"{percentage_points(row)} at rho {row.rho:g}" for row in rows.itertuples())
    show_text(f"At equal loss, SGD's loss moved by {path}: {found}.")
two = at_loss.pivot(index="rho", columns="path", values=["ci_low", "ci_high"]).dropna()
for radius, row in two.iterrows() if at_loss.path.nunique() == 2 else ():
    apart = row["ci_low"].max() > row["ci_high"].min()
    said = "**disagree**: their intervals do not meet" if apart else "agree within their intervals"
    show_text(f"At rho {radius:g} the two paths {said}.")

# %% [markdown]
# ## At equal accuracy
#
# **Claim.** SAM leaks more than an SGD that is as accurate.
#
# **Method.** SGD's curve is now its AUC over test accuracy, along its learning rates up to the best one at that weight
# decay. Settings of SAM with the same weight decay are compared with that curve: for every radius, the learning rates up
# to the best one. All must fit. A setting of SAM fixes the accuracy, and SGD's curve is read at that accuracy. The mean
# over SAM's settings is judged. A setting of SAM whose accuracy does not lie between those of two settings of SGD is left
# out.


# %%
def up_to_best(optimizer, rho, decay):
    """The settings that fit, by rising learning rate, up to the one that is right about most non-members."""
    of = sorted(k for k in made if k[:2] == (optimizer, rho) and k[3] == decay and fit[k] >= verdict.FITS)
    return of[: of.index(best(of)) + 1] if of else []


frames, means = [], []
for decay in dict.fromkeys(decay for *_, decay in made):
    curve = {key[2]: made[key] for key in up_to_best(baseline, 0.0, decay)}
    places = [key for rho in at_radius if rho for key in up_to_best(treatment, rho, decay)]
    how_made = dict(curve=curve, own=made[plain], treatment=treatment, baseline=baseline, name="test_accuracy")
    for key in places:
        place = f"lr={key[2]:g}, weight_decay={decay:g}"
        frames.append(compare.decomposition(made[key], **how_made, coordinate=place).assign(rho=f"{key[1]:g}"))
    if places:
        mean = compare.decomposition([made[key] for key in places], **how_made, coordinate=f"weight_decay={decay:g}")
        means.append(mean.assign(rho=""))
none = pd.DataFrame(columns=[*intervals.TIDY, "attack", "coordinate", "rho"])  # where no setting of SAM fits
frontier = pd.concat([*frames, *means]) if frames else none
frontier = frontier[frontier.metric == "auc_at_equal_accuracy"]
results.add(frontier, experiment="frontier")
if frontier.empty:
    top = {name: max(hits[key].mean() for key in made if key[0] == name) for name in (baseline, treatment)}
    said = joined(f"{name} reaches {value:.2%}" for name, value in top.items())
    show_text(
        f"No setting of {treatment} lies clearly between two of {baseline} in accuracy ({said}): nothing can be said."
    )
else:
    named = frontier.coordinate.where(frontier.rho == "", "rho=" + frontier.rho + ", " + frontier.coordinate)
    named = named.where(frontier.rho != "", "mean, " + named)
    show_table(frontier.assign(optimizer=named, baseline="", metric="at equal accuracy"), across=["attack"])
for (decay, attack), part in frontier[frontier.rho == ""].groupby(["coordinate", "attack"], sort=False):
    n_places = sum(frontier.coordinate.str.endswith(f", {decay}") & (frontier.attack == attack))
    said = (
        f"{treatment} leaks {describe_sign(part.iloc[0], *than)} {baseline}, {percentage_points(part.iloc[0])} of AUC"
    )
    show_text(f"At equal accuracy, {decay}, mean of {n_places} settings of {treatment}, by `{attack}`: {said}.")

# %% [markdown]
# ## At equal compute
#
# **Method.** We multiply SGD's epochs by the number of gradients in a step of the other optimizer. SAM takes two, so SGD
# gets twice the epochs.

# %%
pairs = experiments.equal_compute(run).items()  # epochs of the treatment, and of the baseline
pairs = {e: more for e, more in pairs if (e, treatment) in lengths and (more, baseline) in lengths}
for e, more in pairs.items():
    compute = compare.contrast({baseline: lengths[more, baseline], treatment: lengths[e, treatment]})
    compute = compute[(compute.baseline == baseline) & compute.metric.isin(["auc", "tpr@0.01", "test_accuracy"])]
    results.add(compute, experiment="equal compute", coordinate=f"epochs={e}", n_models=n_swept)
    gain = select(compute, baseline, metric="test_accuracy")
    rise = select(compute, baseline, metric="auc", attack=headline)
    said = f"accuracy {percentage_points(gain)}, AUC {percentage_points(rise)}"
    show_text(f"At equal compute ({treatment} {e} epochs, {baseline} {more}): {said}.")

# %% [markdown]
# ## Does contraction predict leakage?
#
# **Claim.** The paper's theorem: sharpness-awareness contracts the outputs on non-members, so that members stand out. If
# so, leakage rises where the variance of non-members falls, and where fewer of them lie above the median member.
#
# **Method.** Every setting of SAM, against SGD with the same learning rate, weight decay and epochs. For each we
# measure the difference in AUC, in the log of the variance of $\phi$ on non-members (across examples), and in the
# *overlap*: the share of non-members above the median member of their model. We correlate these over the settings, as
# they are and at equal train loss (each quantity minus SGD's, interpolated over its lengths of training at SAM's train
# loss; settings with another weight decay are left out). Where one of the two does not fit, the setting is left out. The
# intervals come from leaving out one pair of models at a time (jackknife), so they are about other models, not about
# other settings.

# %%
cells = {
    f"{k[0]} {k[1]:g}, lr {k[2]:g}, wd {k[3]:g}": (made[(baseline, 0.0, *k[2:])], e) for k, e in made.items() if k[1]
}
cells |= {
    f"{e} epochs": (lengths[e, baseline], lengths[e, treatment])
    for e in sorted({e for e, n in lengths if n == treatment})
}
shared = compare.common_ids([e for pair in cells.values() for e in pair])
own_decay = np.array([e.recipe.weight_decay == run.weight_decay for e, _ in cells.values()])
both_fit = np.array(
    [min(compare.on_pool(e, "correct").mean() for e in pair) >= verdict.FITS for pair in cells.values()]
)


def quantities(ensemble):
    """Of each model: AUC, log variance of phi on non-members, overlap, log train loss: [4, M]."""
    phi, inside = compare.signal(ensemble, "phi").astype(float), np.array(ensemble.member)
    median = np.nanmedian(np.where(inside, phi, np.nan), axis=1, keepdims=True)
    overlap = ((phi > median) & ~inside).sum(1) / (~inside).sum(1)
    variance = compare.variance_influence_values(ensemble, "phi", "across_examples").mean(1)
    leaks, loss = compare.auc_influence_values(ensemble, headline).mean(1), compare.train_losses(ensemble).mean(1)
    return np.array([leaks, variance, overlap, loss])


def averages(each, keep=slice(None)):
    """The means of `quantities` [..., 4, M] over the models kept: AUC, log variance, overlap, log train loss [..., 4]."""
    leaks, variance, overlap, loss = np.moveaxis(each[..., keep].mean(-1), -1, 0)
    return np.stack([leaks, np.log(variance), overlap, np.log(loss)], axis=-1)


def correlations(each, path, keep=slice(None)):
    """Of the change in AUC over the settings, at equal settings and at equal loss, with that in log variance and overlap.

    A dict (how, with what) -> (correlation, number of settings).
    """
    one, other = np.moveaxis(averages(each, keep), 1, 0)  # of SGD and of SAM, [settings, 4]
    curve = averages(path, keep)
    curve = curve[curve[:, 3].argsort()]  # of SGD's lengths of training, all with the run's own weight decay
    at_loss = PchipInterpolator(curve[:, 3], curve, extrapolate=False)(other[:, 3])
    at_loss[~own_decay] = np.nan
    found = {}
    for how, change in (("at equal settings", other - one), ("at equal loss", other - at_loss)):
        known = change[np.isfinite(change).all(1) & both_fit]
        for k, what in ((1, "log variance"), (2, "overlap")):
            correlation = np.corrcoef(known[:, 0], known[:, k])[0, 1] if len(known) > 3 else np.nan
            found[f"{what}, {how}"] = correlation, len(known)
    return found


each = np.array([[quantities(e.only(shared)) for e in pair] for pair in cells.values()])  # [settings, 2, 4, M]
path = np.array([quantities(e.only(shared)) for (_, name), e in lengths.items() if name == baseline])
pairs_of = np.arange(len(shared)) // 2
whole = correlations(each, path)
without = [correlations(each, path, pairs_of != k) for k in np.unique(pairs_of)]  # each pair of models once
rows = []
for name, (value, n_settings) in whole.items():
    half = 1.96 * np.sqrt((len(without) - 1) * np.var(np.arctanh([found[name][0] for found in without])))
    interval = intervals.Estimate(value, *np.tanh(np.arctanh(value) + [-half, half]))
    rows.append(intervals.row("correlation_with_auc", interval, coordinate=name))
    said = f"correlation with the difference in AUC {number(pd.Series(rows[-1]), '+.2f')}"
    said = said if np.isfinite(value) else "too few of them fit and lie on SGD's curve to say"
    show_text(f"Over {n_settings} settings, {name}: {said}.")
about = dict(optimizer=treatment, baseline=baseline, attack=headline, rho="", n_models=len(shared))
results.add(pd.DataFrame(rows).dropna(subset="value"), experiment="contraction", **about)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
one, other = np.moveaxis(averages(each), 1, 0)
rise, change, overlap, _ = (other - one).T
for axis, x, label in (
    (axes[0], change, r"log ratio of the variance of $\phi$ on non-members"),
    (axes[1], 100 * overlap, "overlap, difference in points"),
):
    axis.scatter(
        x, 100 * rise, color=[figures.COLOURS[0] if full else "white" for full in both_fit], ec=figures.COLOURS[0]
    )
    axis.axhline(0, color="0.4", lw=0.8)
    axis.axvline(0, color="0.4", lw=0.8)
    axis.set(xlabel=label)
axes[0].set_ylabel(figures.plain(f"AUC of {headline}, difference in points"))
figures.save(figure, run, "contraction_and_leakage")

# %% [markdown]
# A point is a setting; where it is hollow, one of the two fits less than 99% of its training half, and the correlations
# leave it out.
#
# A negative control. Dividing all logits by a temperature changes the variance much, but no prediction. An attacker who
# calibrates on models served in the same way learns about the same. If such a change of variance went with a change of
# leakage, the correlation above would be about the scale of the outputs.

# %%
for factor in (0.5, 2):
    warm = compare.tempered(made[plain], factor)
    change = averages(quantities(warm))[1] - averages(quantities(made[plain]))[1]
    moved = compare.auc_estimate(compare.auc_influence_values(warm, headline) - aucs[plain][headline], run.dataset)
    moved = pd.DataFrame([intervals.row("auc", moved, optimizer=baseline, baseline=baseline, attack=headline)])
    results.add(moved, experiment="contraction", coordinate=f"temperature={factor:g}", rho="")
    said = f"the log variance moves by {change:+.2f}, the AUC by {percentage_points(moved.iloc[0])}"
    show_text(f"{baseline} at temperature {factor:g}: {said}.")

# %% [markdown]
# **How to read it.** The paper's explanation predicts *negative* correlations: less variance and less overlap, more
# leakage. A positive correlation with the variance says that what stretches the outputs of non-members goes with
# leakage. Settings that differ in fit differ in much else, so the correlation at equal loss counts for more, although it
# rests on fewer settings.

# %% [markdown]
# ## Why: what switches the effect off?
#
# **Claim.** The effect belongs to sharpness-aware training, not to a batch size, a length or a regularizer.
#
# **Method.** We change one thing at a time, for both optimizers, and measure anew the paired effect on the AUC of the
# first headline attack (results.csv has every headline attack). The grey band is the effect of the unchanged run. A
# level *switches the effect off* if two things hold: the interval there no longer lies on the same side of zero, and the
# change from the unchanged run, also paired, excludes zero.

# %%
causes, rows, as_it_is = run.ensembles("causes"), [], {}  # the first of the causes is the run as it is
for factor, level in dict.fromkeys(key[:2] for key in causes):
    pair = [causes.get((factor, level, name)) for name in (baseline, treatment)]
    if pair[0] is None or pair[1] is None:  # too many of its models diverged
        continue
    fits = [compare.on_pool(e, "correct").mean() for e in pair]
    tests = [compare.hits_on_test(e).mean() for e in pair]
    about = dict(optimizer=treatment, baseline=baseline, factor=factor, level=level, coordinate=f"{factor}={level}")
    about |= dict(train_accuracy=fits[0], train_accuracy_treatment=fits[1], test_gain=tests[1] - tests[0])
    for attack in catalogue.HEADLINES:
        base, treated = (compare.auc_influence_values(e, attack) for e in pair)
        effect = treated - base
        change = effect - as_it_is.setdefault(attack, effect)
        for metric, values in (("auc", effect), ("auc_change", change)):
            rows.append(intervals.row(metric, compare.auc_estimate(values, run.dataset), attack=attack, **about))
effects = pd.DataFrame(rows)
results.add(effects, experiment="causes", n_models=len(next(iter(causes.values())).ids))
seen = effects[effects.attack == headline]
here, change = (seen[seen.metric == metric].reset_index(drop=True) for metric in ("auc", "auc_change"))
levels = (here.factor + ": " + here.level).where(here.factor != here.level, here.factor)
if len(here) == 1:
    show_text(
        "Nothing is varied here: the run is one of images, of which every level would take as long as the main run."
    )

# %%
figure, axis = plt.subplots(figsize=(7.5, 0.36 * len(here) + 1.2), layout="constrained")
for index, (_, rows) in enumerate(here.groupby("factor", sort=False)):
    bars = [rows.value - rows.ci_low, rows.ci_high - rows.value]
    axis.errorbar(rows.value, rows.index, xerr=bars, capsize=3, **figures.look(index) | {"linestyle": ""})
axis.axvspan(here.ci_low[0], here.ci_high[0], color="0.88", zorder=0, label="as it is")
axis.axvline(0, color="0.3", lw=1)
axis.set(
    yticks=range(len(here)), yticklabels=levels, xlabel=figures.plain(f"AUC of {headline}, {treatment} − {baseline}")
)
axis.invert_yaxis()
axis.legend(fontsize=9)
figures.save(figure, run, "causes")

# %%
columns = ["factor", "level", "train_accuracy", "train_accuracy_treatment", "test_gain"]
display(here[columns].style.format(precision=3).hide(axis="index"))
was, now = sign(here.iloc[0]), [sign(row) for row in here.itertuples()]
full = here[["train_accuracy", "train_accuracy_treatment"]].min(axis=1) >= verdict.FITS
moved = [i for i, row in enumerate(change.itertuples()) if i and was and sign(row) == -was and full[i]]
off = joined(levels[i] for i in moved if now[i] != was)
said = f"{treatment} leaks {describe_sign(here.iloc[0], *than)} {baseline}"
show_text(f"As it is, {said}: {percentage_points(here.iloc[0])} of AUC.")
if was:
    show_text(f"**Switched off at**: {off}. Weakened, not off: {joined(levels[i] for i in moved if now[i] == was)}.")
    show_text(f"Turned into its opposite at: {joined(levels[i] for i in moved if now[i] == -was)}.")
show_text(f"Not testable, because one of the two does not fit its training half: {joined(levels[~full])}.")

# %% [markdown]
# **How to read it.** `train_accuracy` is the baseline's, `train_accuracy_treatment` SAM's. A level that keeps either of
# them from fitting its training half changes two things at once, and says little about sharpness. Label noise also
# changes the examples: part of what leaks there is which wrong labels were learnt.

# %% [markdown]
# ## How small an effect could we have seen?
#
# **Method.** A difference of 2.8 standard errors is found in four of five repetitions (two-sided, at 5%). The paper's
# own differences in AUC are from 1.1 to 3.4 points (notebook 1).

# %%
main = compare.contrast(run.ensembles("main"))
main = main[(main.optimizer == treatment) & (main.baseline == baseline)]
compared = {"main comparison": main, "both tuned": leak}
parts = [frame[frame.metric == "auc"].assign(coordinate=what) for what, frame in compared.items()]
parts.append(left.assign(coordinate="at equal loss, " + left.coordinate))
power = pd.concat(parts)[["attack", "coordinate", "ci_low", "ci_high"]]
power["value"] = 2.8 * (power.pop("ci_high") - power.pop("ci_low")) / (2 * 1.96)
about = dict(metric="smallest_detectable_difference", optimizer=treatment, baseline=baseline, rho="")
results.add(power.assign(ci_low=np.nan, ci_high=np.nan), experiment="power", **about)
table = 100 * power.pivot_table(index="coordinate", columns="attack", values="value", sort=False)
display(table.style.format("{:.1f}").set_caption("points of AUC"))

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above.

# %%
rows = leak[leak.metric == "auc"].itertuples()
said = joined(f"{describe_sign(row, *than)} {baseline} by `{row.attack}` ({percentage_points(row)})" for row in rows)
show_text(f"**Both tuned**, {treatment} leaks {said}.")
fitted = {baseline: fit[plain], treatment: fit[sharp]}
short = joined(f"{name} fits {share:.1%}" for name, share in fitted.items() if share < verdict.FITS)
if short != "none":
    show_text(f"But this setting cannot test the claim: {short} of its training half.")
said = f"the difference goes from {100 * min(spread):+.1f} to {100 * max(spread):+.1f} points"
show_text(f"**Among equally accurate settings** {said}.")
for decay, part in frontier[frontier.rho == ""].groupby("coordinate", sort=False):
    rows = part.itertuples()
    said = joined(
        f"{describe_sign(row, *than)} {baseline} by `{row.attack}` ({percentage_points(row)})" for row in rows
    )
    show_text(f"**At equal accuracy**, both with {decay.replace('_', ' ')}, {treatment} leaks {said}.")
found = at_loss[at_loss.path == "epochs"]
grows = len(found) > 1 and found.ci_low.iloc[-1] > found.ci_high.iloc[0]  # at the largest radius and at the smallest
signs = [sign(row) for row in left.itertuples()]
show_text(
    f"**At equal loss** {treatment} leaks more in {signs.count(1)} and less in {signs.count(-1)} of {len(left)} comparisons "
    f"(lengths of training and attacks). What remains {'grows' if grows else 'does not clearly grow'} with the radius."
)
show_text(f"**Causes.** {f'The effect is switched off by {off}' if was else 'There is no effect to switch off'}.")
if better:
    place, _, least = min(better, key=lambda found: found[2].value)
    advice = (
        f"Before you take {treatment} for its accuracy, tune {baseline}: with {place} it tests no worse here, as far as we "
        f"can tell, and leaks {-100 * least.value:.1f} points less."
    )
else:
    advice = f"No setting of {baseline} tried here is as accurate as tuned {treatment} and clearly leaks less."
said = f"tuning for accuracy alone moves the leakage by up to {100 * (max(spread) - min(spread)):.1f} points"
show_text(f"**What to do.** {advice} Among settings of equal accuracy on held-out data, choose by an audit: {said}.")
show_text(f"All numbers: `{results.path.name}` beside this notebook's copy.")

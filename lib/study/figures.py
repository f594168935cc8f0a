"""Figures from tidy frames and arrays. Colours are seaborn's colour-blind palette, and every series also differs by
marker or line. Each function returns the figure; `save` keeps it beside the results."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from lib.attacks import intervals
from lib.study.text import series

COLOURS = sns.color_palette("colorblind")
LINES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D")


def style():
    """The look of every figure."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 130, "savefig.bbox": "tight", "legend.frameon": False})


def save(figure, run, name):
    """Write the figure to <out>/figures/<name>.png and return it."""
    folder = Path(run.out) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    plt.close(figure)
    return figure


def plain(name):
    """A name that comes from data as text of a figure: without mathematics, and never hidden from a legend."""
    text = str(name).replace("$", r"\$")
    return "\u2009" * text.startswith("_") + text  # a legend leaves out what begins with _


def look(index, name=None):
    """Colour, line and marker of the index-th series, and its name as the label, if one is given."""
    shape = dict(color=COLOURS[index % 10], linestyle=LINES[index % 4], marker=MARKERS[index % 4])
    return shape | ({"label": plain(name)} if name else {})


def error_bars(axis, x, frame, index, label=None, **more):
    """Values of a frame with their intervals, joined by a line."""
    low, high = frame.value - frame.ci_low, frame.ci_high - frame.value
    axis.errorbar(x, frame.value, [low, high], capsize=3, **{**look(index, label), **more})


def picture(axis, image):
    """One example: image [channels, H, W] (uint8, or floats in 0..1), or a table's row as a strip of bars."""
    axis.set(xticks=[], yticks=[])
    if image.ndim == 1:
        axis.stairs(image, fill=True, color="0.4")
    else:
        axis.imshow(image.transpose(1, 2, 0), cmap="gray_r", interpolation="nearest")


def histograms(axis, inside, outside, labels):
    """Two filled histograms on common bins, told apart by colour and outline."""
    bins = np.histogram_bin_edges(np.concatenate([inside, outside]), 30)
    for index, (values, label) in enumerate(zip((inside, outside), labels, strict=True)):
        drawn = dict(ec=COLOURS[index + 2], fc=(*COLOURS[index + 2], 0.3), linestyle=LINES[index], lw=1.8, label=label)
        axis.hist(values, bins, density=True, histtype="stepfilled", **drawn)
    axis.legend(fontsize=9)


def forest(frame, panels, rows="attack", reference=0):
    """Values with intervals, a row for each value of a column, a marker for each optimizer or difference.

    panels: dict metric -> label of the x axis. reference: where a grey line stands, a number or a row's name.
    """
    order = list(frame[rows].unique())
    size = (3.6 * len(panels) + 3.4, 0.34 * len(order) + 1.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (metric, xlabel) in zip(axes[0], panels.items(), strict=True):
        part = frame[frame.metric == metric]
        for index, (name, found) in enumerate(part.groupby(series(part), sort=False)):
            found = found.set_index(rows).reindex(order)
            spread = [found.value - found.ci_low, found.ci_high - found.value]
            look_of = look(index, name) | {"linestyle": ""}
            axis.errorbar(found.value, np.arange(len(order)) + 0.15 * index, xerr=spread, capsize=3, **look_of)
        axis.axvline(found.value[reference] if reference in found.index else reference, color="0.5", lw=1)
        axis.set(yticks=range(len(order)), yticklabels=map(plain, order), xlabel=xlabel)
        axis.locator_params(axis="x", nbins=5)
    axes[0, 0].invert_yaxis()
    if any(series(frame)):
        axes[0, 0].legend(fontsize=9)
    return figure


def roc(scored, member, attack="lira_shrunk"):
    """ROC on log-log axes, all targets pooled, down to the FPR at which ten false positives are expected."""
    figure, axis = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    grid = np.geomspace(10 / (~member).sum(), 1, 200)
    for index, (name, attacks) in enumerate(scored.items()):
        axis.plot(grid, intervals.roc(attacks[attack], member, grid), **(look(index, name) | {"marker": None}), lw=2)
    axis.plot(grid, grid, color="0.5", lw=1, label="guessing")
    axis.set(xscale="log", yscale="log", xlabel="false positive rate", ylabel="true positive rate", title=attack)
    axis.legend(loc="lower right")
    return figure


def leakage_against_accuracy(axis, rows, attack, chosen, fits=0.99):
    """Every setting of a tuning as a point: test accuracy and AUC, minus those of the tuned baseline, in points.

    rows: of the experiment "tuning", each setting's own values and its paired differences from the tuned baseline.
    Lines join the learning rates at one radius and weight decay, dotted unless it is the first. Settings in `chosen`
    (optimizer, rho, lr, weight decay) are large; those that fit less than the share `fits` of their half are hollow.
    """
    rows = rows.assign(rho=pd.to_numeric(rows.rho, errors="coerce").fillna(0))
    rows[["lr", "decay"]] = rows.coordinate.str.extract("lr=(.+), weight_decay=(.+)").astype(float)
    setting = ["optimizer", "rho", "lr", "decay"]
    rows = rows.drop_duplicates([*setting, "baseline", "attack", "metric"]).set_index(setting)
    fit = rows[(rows.metric == "train_accuracy") & (rows.baseline == "")].value
    differences = rows[rows.baseline != ""].groupby(["metric", "attack"])[["value", "ci_low", "ci_high"]]
    pair = (differences.get_group(key).reindex(fit.index) for key in (("test_accuracy", ""), ("auc", attack)))
    x, y = (100 * frame.fillna(0.0) for frame in pair)  # the tuned baseline has no difference from itself
    axis.axhline(0, color="0.4", lw=0.8)
    axis.axvline(0, color="0.4", lw=0.8)
    for index, ((name, rho), part) in enumerate(fit.groupby(level=["optimizer", "rho"], sort=False)):
        colour, label = COLOURS[index % 10], plain(f"{name}, rho {rho:g}" if rho else name)
        for k, (_, line) in enumerate(part.groupby(level="decay", sort=False)):
            at = line.sort_index(level="lr").index
            axis.plot(x.value[at], y.value[at], ":" if k else "-", color=colour, lw=1.2)
        across, up = x.loc[part.index], y.loc[part.index]
        bars = ([of.value - of.ci_low, of.ci_high - of.value] for of in (up, across))
        axis.errorbar(across.value, up.value, *bars, color=colour, lw=0.6, alpha=0.6, linestyle="")
        full = part >= fits
        for at, face in ((part.index[full], colour), (part.index[~full], "white")):
            named = label if face == colour or not full.any() else None
            axis.plot(x.value[at], y.value[at], MARKERS[index % 4], color=colour, markerfacecolor=face, label=named)
        for at in part.index.intersection(chosen):
            axis.plot(x.value[at], y.value[at], MARKERS[index % 4], color=colour, markersize=12)
    less = "minus the tuned baseline's, points"
    axis.set(xlabel=f"test accuracy, {less}", ylabel=plain(f"AUC of {attack},\n{less}"))


def phi_of_members(phis, member):
    """Densities of phi of members and non-members, an optimizer a panel, on shared axes."""
    n = len(phis)
    figure, axes = plt.subplots(1, n, figsize=(5.2 * n, 3.4), sharex=True, sharey=True, layout="constrained")
    for axis, (name, phi) in zip(np.ravel(axes), phis.items(), strict=True):
        histograms(axis, phi[member], phi[~member], ("members", "non-members"))
        axis.set(title=plain(name), xlabel=r"$\phi = \log p_y - \log(1-p_y)$", ylabel="density")
    return figure


def interval_panels(frames, ylabel, xlabel="bucket", ticks=None):
    """Values with intervals at 1, 2, ..., a panel for each title; the line at 0 is 'no difference'."""
    n = len(frames)
    figure, axes = plt.subplots(1, n, figsize=(min(3.6 * n, 14), 3.4), sharey=True, squeeze=False, layout="constrained")
    for index, (axis, (title, frame)) in enumerate(zip(axes[0], frames.items(), strict=True)):
        places = np.arange(1, len(frame) + 1)
        error_bars(axis, places, frame, index, linestyle="")
        axis.axhline(0, color="0.3", lw=1)
        axis.set_xticks(places, ticks or places, fontsize=9)
        axis.set(title=plain(title), xlabel=xlabel)
        axis.margins(x=0.12)
    axes[0, 0].set_ylabel(ylabel)
    return figure


def captioned(rows, columns=8):
    """Rows of pictures with captions. rows: dict title -> list of (image, caption), at most `columns` each."""
    size = (1.35 * columns, 2.05 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for line, (title, items) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (image, caption) in zip(line, items, strict=False):
            picture(axis, image)
            axis.text(0.5, -0.06, plain(caption), transform=axis.transAxes, ha="center", va="top", fontsize=8)
        line[0].set_title(plain(title), fontsize=10, loc="left")
    return figure

"""Figures from tidy frames and arrays. Colours are seaborn's colour-blind palette, and every series also differs by
marker or line. Each function returns the figure; `save` keeps it beside the results."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.colors import ListedColormap

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
    return str(name).replace("$", r"\$").lstrip("_")


def look(index, name=None):
    """Colour, line and marker of the index-th series, and its name as the label, if one is given."""
    shape = dict(color=COLOURS[index % 10], linestyle=LINES[index % 4], marker=MARKERS[index % 4])
    return shape if name is None else shape | {"label": plain(name)}


def error_bars(axis, x, frame, index, label=None, **more):
    """Values of a frame with their intervals, joined by a line."""
    low, high = frame.value - frame.ci_low, frame.ci_high - frame.value
    axis.errorbar(x, frame.value, [low, high], capsize=3, **{**look(index, label), **more})


def picture(axis, image):
    """One example: image [channels, H, W] (uint8, or floats in 0..1), or a table's row as a strip of bars."""
    if image.ndim == 1:
        axis.stairs(image, fill=True, color="0.4")
        axis.set(xticks=[], yticks=[])
        return
    pixels = image.transpose(1, 2, 0)
    axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray_r", interpolation="nearest")
    axis.set_axis_off()


def histograms(axis, inside, outside, labels):
    """Two filled histograms on common bins, told apart by colour and outline."""
    bins = np.histogram_bin_edges(np.concatenate([inside, outside]), 30)
    for index, (values, label) in enumerate(zip((inside, outside), labels, strict=True)):
        axis.hist(values, bins, density=True, histtype="stepfilled", alpha=0.3, color=COLOURS[index + 2], label=label)
        axis.hist(values, bins, density=True, histtype="step", color=COLOURS[index + 2], linestyle=LINES[index], lw=1.8)
    axis.legend(fontsize=9)


def forest(frame, xlabel, order=None):
    """Values with intervals, a row for each attack, a marker for each optimizer or difference; a line marks 0."""
    order = list(order if order is not None else frame.attack.unique())
    figure, axis = plt.subplots(figsize=(7.5, 0.34 * len(order) + 1.2), layout="constrained")
    for index, (name, rows) in enumerate(frame.groupby(series(frame), sort=False)):
        rows = rows.set_index("attack").reindex(order)
        places = np.arange(len(order)) + 0.15 * index
        spread = [rows.value - rows.ci_low, rows.ci_high - rows.value]
        axis.errorbar(rows.value, places, xerr=spread, capsize=3, **(look(index, name) | {"linestyle": ""}))
    axis.axvline(0, color="0.3", lw=1)
    axis.set(yticks=range(len(order)), yticklabels=order, xlabel=xlabel)
    axis.invert_yaxis()
    axis.legend(fontsize=9)
    return figure


def roc(scored, member, attack="lira"):
    """ROC on log-log axes, all targets pooled, down to the FPR at which ten false positives are expected."""
    figure, axis = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    grid = np.geomspace(10 / (~member).sum(), 1, 200)
    for index, (name, attacks) in enumerate(scored.items()):
        axis.plot(grid, intervals.roc(attacks[attack], member, grid), **(look(index, name) | {"marker": None}), lw=2)
    axis.plot(grid, grid, color="0.5", lw=1, label="guessing")
    axis.set(xscale="log", yscale="log", xlabel="false positive rate", ylabel="true positive rate", title=attack)
    axis.legend(loc="lower right")
    return figure


def phi_of_members(phis, member):
    """Densities of phi of members and non-members, an optimizer a panel, on shared axes."""
    figure, axes = plt.subplots(
        1, len(phis), figsize=(5.2 * len(phis), 3.4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, phi) in zip(axes[0], phis.items(), strict=True):
        histograms(axis, phi[member], phi[~member], ("members", "non-members"))
        axis.set(title=plain(name), xlabel=r"$\phi = \log p_y - \log(1-p_y)$", ylabel="density")
    return figure


# ---- memorization and influence -----------------------------------------------------------------------------


def interval_panels(frames, ylabel, xlabel="bucket", ticks=None):
    """Values with intervals at 1, 2, ..., a panel for each title; the line at 0 is 'no difference'."""
    size = (min(3.6 * len(frames), 14), 3.4)
    figure, axes = plt.subplots(1, len(frames), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for index, (axis, (title, frame)) in enumerate(zip(axes[0], frames.items(), strict=True)):
        error_bars(axis, np.arange(1, len(frame) + 1), frame, index, linestyle="")
        axis.axhline(0, color="0.3", lw=1)
        axis.set(title=title, xlabel=xlabel, xticks=range(1, len(frame) + 1))
        if ticks:
            axis.set_xticklabels(ticks, fontsize=9)
        axis.margins(x=0.12)
    axes[0, 0].set_ylabel(ylabel)
    return figure


def captioned(rows, columns=8):
    """Rows of pictures with captions. rows: dict title -> list of (image, caption), at most `columns` each."""
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.35 * columns, 2.05 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (title, items) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (image, caption) in zip(line, items, strict=False):
            picture(axis, image)
            axis.text(0.5, -0.06, plain(caption), transform=axis.transAxes, ha="center", va="top", fontsize=8)
        line[0].set_title(title, fontsize=10, loc="left")
    return figure


# ---- notebook 04: variance contraction -------------------------------------------------------------------------


def curves(frame, xlabel, ylabels, levels=False, **axes):
    """Values with intervals against x, a line per series. frame: panel, series, x, value, ci_low, ci_high.

    ylabels: panel -> label. levels: the x stand side by side, evenly. Where a column `predicted` is given, it is the
    line and the values are points.
    """
    n, same = len(ylabels), len(set(ylabels.values())) == 1
    figure, panels = plt.subplots(
        1, n, figsize=(4.4 * n + 2 * (n < 3), 4), squeeze=False, sharey=same, layout="constrained"
    )
    for axis, (panel, label) in zip(panels[0], ylabels.items(), strict=True):
        rows, ticks = frame[frame.panel == panel], np.unique(frame.x)
        for index, (name, part) in enumerate(rows.groupby("series", sort=False)):
            x = np.searchsorted(ticks, part.x) + 0.14 * (index - 1) if levels else part.x
            points = "predicted" in part and part.predicted.notna().all()
            error_bars(axis, x, part, index, label=name, **({"linestyle": ""} if points else {}))
            if points:
                axis.plot(x, part.predicted, color=COLOURS[index], linestyle=LINES[index % 4])
        if levels:
            axis.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
        axis.set(title=panel, xlabel=xlabel, ylabel=label, **axes)
        short = max(map(len, axis.get_legend_handles_labels()[1]), default=0) < 13
        if short:
            axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
        elif axis is panels[0, -1]:  # one for all
            axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def contraction(etas, curve, eta, v):
    """V(eta) with one eta marked; and what it does to the margins of non-members, N(0, V), beside the members' 1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    left.plot(etas, curve, color=COLOURS[0], lw=2)
    left.plot(eta, v, "o", color=COLOURS[1], ms=9)
    left.set(xlabel=r"$\eta$", ylabel=r"$V(\eta)$", ylim=(0, None))
    grid = np.linspace(-3.5, 3.5, 701) * np.sqrt(curve[0])
    for index, (name, variance) in enumerate(((r"non-members, $\eta = 0$", curve[0]), (rf"$\eta = {eta:.3g}$", v))):
        density = np.exp(-(grid**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        right.plot(grid, density, color=COLOURS[index], linestyle=LINES[index], lw=2, label=name)
        right.fill_between(grid, density, where=grid >= 1, color=COLOURS[index], alpha=0.25)
    right.axvline(1, color="0.2", lw=2.5, label="members: all at 1")
    right.set(xlabel=r"margin $y\,x^\top w$", ylabel="density", title="shaded: wrongly accused at threshold 1")
    right.legend(fontsize=9, loc="upper left")
    return figure


def advantage_regions(delta, r, slope):
    """Where a smaller OUT spread raises (slope < 0) or lowers the best attacker's advantage. All [rows, columns]."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    most = np.abs(slope).max()
    mesh = axis.pcolormesh(delta, r, slope, cmap="PuOr_r", vmin=-most, vmax=most, shading="gouraud", rasterized=True)
    axis.contour(delta, r, slope, [0], colors="black", linewidths=2)
    axis.axhline(1, color="0.3", lw=1, linestyle="--")
    boxed = dict(ha="center", bbox=dict(facecolor="white", alpha=0.85, linewidth=0), fontsize=10)
    axis.text(3.4, 0.42, "a smaller OUT spread\nraises the advantage", **boxed)
    axis.text(0.72, 5.2, "a smaller OUT spread\nlowers it", **boxed)
    axis.set(yscale="log", xlabel=r"distance of the means, $|\mu_{in}-\mu_{out}|\,/\,\sigma_{in}$")
    axis.set(ylabel=r"$\sigma_{out}\,/\,\sigma_{in}$")
    axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
    axis.minorticks_off()
    figure.colorbar(mesh, label=r"slope of the advantage in $\log\,\sigma_{out}$")
    return figure


def slider(draw, **ranges):
    """draw(**values) with a slider per keyword (low, high, start), where ipywidgets is and a person is at the kernel.

    In a headless run (papermill, nbconvert) nothing is shown: nobody could move it. Returns whether it is shown.
    """
    try:
        from IPython import get_ipython
        from ipywidgets import FloatSlider, interact
    except ImportError:
        return False
    if not getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False):
        return False
    moved = {n: FloatSlider(start, min=low, max=high, step=0.05) for n, (low, high, start) in ranges.items()}

    def drawn(**values):
        figure = draw(**values)
        plt.close(figure)  # shown once, by interact
        return figure

    interact(drawn, **moved)
    return True


def tiles(table, shades):
    """Verdicts as tiles, each named in words. table: claims x runs; shades: verdict -> colour."""
    figure, axis = plt.subplots(figsize=(6.5 + 1.3 * len(table.columns), 0.27 * len(table) + 1), layout="constrained")
    codes, shown = table.map(list(shades).index), ListedColormap(list(shades.values()))
    axis.pcolormesh(codes, cmap=shown, vmin=-0.5, vmax=len(shades) - 0.5, edgecolor="0.7", linewidth=0.5)
    for (row, column), word in np.ndenumerate(table.to_numpy()):
        axis.text(column + 0.5, row + 0.5, word, ha="center", va="center", fontsize=9, color="0.1")
    axis.set_xticks(np.arange(len(table.columns)) + 0.5, table.columns, fontsize=9)
    axis.set_yticks(np.arange(len(table)) + 0.5, table.index, fontsize=9)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.invert_yaxis()
    axis.grid(False)
    return figure


# ---- beyond the paper ---------------------------------------------------------------------------------------

SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


def frontier(steps, kept, near=0.02):
    """Paired differences from the baseline in leakage against those in accuracy: all ensembles, and, if some lie far
    off, those near 0 once more.

    steps: rows with optimizer, rho and, for test_accuracy and auc, value, ci_low, ci_high as <metric>_<column>; larger
    marks have larger radii. kept: the (optimizer, rho) that no other ensemble beats. near: what the right panel spans.
    """
    close = steps[steps.test_accuracy_value.abs() <= near]
    panels = 1 if len(close) == len(steps) else 2
    figure, axes = plt.subplots(1, panels, figsize=(2 + 5 * panels, 5), layout="constrained", squeeze=False)
    axes = axes[0]
    for index, (name, rows) in enumerate(steps.groupby("optimizer", sort=False)):
        shape = dict(color=COLOURS[index % 10], marker=SHAPES[index % 12])
        sizes = 5 + 3 * rows.rho.rank().to_numpy()
        for row, size in zip(rows.itertuples(), sizes, strict=True):
            bars = [[[getattr(row, f"{m}_value") - getattr(row, f"{m}_ci_low")],
                     [getattr(row, f"{m}_ci_high") - getattr(row, f"{m}_value")]]
                    for m in ("test_accuracy", "auc")]  # fmt: skip
            face = shape["color"] if (name, row.rho) in kept else "white"
            for axis in axes:
                axis.errorbar(row.test_accuracy_value, row.auc_value, xerr=bars[0], yerr=bars[1], capsize=2, lw=1,
                              markersize=size, markerfacecolor=face, **shape)  # fmt: skip
        axes[0].plot([], [], linestyle="", markersize=8, label=name, **shape)
    axes[0].plot([], [], "o", color="0.3", markerfacecolor="white", label="open: beaten by another")
    if panels == 2:
        pad = 1.25 * max(close[["auc_ci_low", "auc_ci_high"]].abs().to_numpy().max(initial=0), 0.005)
        axes[1].set(xlim=(-near, near), ylim=(-pad, pad), title="near the baseline")
        axes[0].set_title("all")
    for axis in axes:
        axis.axhline(0, color="0.4", lw=0.8)
        axis.axvline(0, color="0.4", lw=0.8)
        axis.locator_params(nbins=5)
        axis.set_xlabel("test accuracy, minus the baseline's")
    axes[0].set_ylabel("AUC of LiRA, minus the baseline's")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside right center")
    return figure


def effects(frame, xlabel):
    """One effect with its interval at each level (column) of each factor (column); the first row's is the grey band."""
    figure, axis = plt.subplots(figsize=(7.5, 0.36 * len(frame) + 1.2), layout="constrained")
    factors = list(frame.factor.unique())
    for place, row in enumerate(frame.itertuples()):
        shape = look(factors.index(row.factor)) | {"linestyle": ""}
        axis.errorbar(row.value, place, xerr=[[row.value - row.ci_low], [row.ci_high - row.value]], capsize=3, **shape)
    axis.axvspan(frame.ci_low.iloc[0], frame.ci_high.iloc[0], color="0.88", zorder=0, label="as it is")
    axis.axvline(0, color="0.3", lw=1)
    labels = [f if f == level else f"{f}: {level}" for f, level in zip(frame.factor, frame.level, strict=True)]
    axis.set(yticks=range(len(frame)), yticklabels=labels, xlabel=xlabel)
    axis.invert_yaxis()
    axis.legend(fontsize=9)
    return figure


def side_by_side(frame, panels, baseline):
    """Rows (defences) down the left, a panel for each metric; the baseline's value is the grey line.

    panels: dict metric -> axis label; frame: label, metric, value, ci_low, ci_high.
    """
    order = list(frame.label.unique())
    size = (3.4 * len(panels) + 1.6, 0.34 * len(order) + 1.1)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for index, (axis, (metric, xlabel)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        rows = frame[frame.metric == metric].set_index("label").reindex(order)
        spread = [rows.value - rows.ci_low, rows.ci_high - rows.value]
        axis.errorbar(rows.value, range(len(order)), xerr=spread, capsize=3, **(look(index) | {"linestyle": ""}))
        axis.axvline(rows.value[baseline], color="0.5", lw=1)
        axis.locator_params(axis="x", nbins=4)
        axis.set(xlabel=xlabel, yticks=range(len(order)), yticklabels=order)
    axes[0, 0].invert_yaxis()
    return figure


def classes(frame, first, second):
    """LiRA's AUC within each class under two optimizers, a class a point with both intervals."""
    frame = frame[frame.metric == "auc"]
    one, two = (frame[frame.optimizer == name].set_index("class") for name in (first, second))
    figure, axis = plt.subplots(figsize=(5.4, 4.8), layout="constrained")
    spread = [[of.value - of.ci_low, of.ci_high - of.value] for of in (two, one)]
    axis.errorbar(one.value, two.value, *spread, color="0.7", linestyle="", lw=0.8, zorder=1)
    sizes = axis.scatter(one.value, two.value, c=one["size"], cmap="viridis", s=40, zorder=2)
    if len(one) <= 12:
        for name in one.index:
            spot = dict(textcoords="offset points", xytext=(6, 4), fontsize=8)
            axis.annotate(name, (one.value[name], two.value[name]), **spot)
    span = [min(one.value.min(), two.value.min()) - 0.01, max(one.value.max(), two.value.max()) + 0.01]
    axis.plot(span, span, color="0.4", lw=1, linestyle="--", label="equal")
    axis.set(xlabel=f"AUC of LiRA within a class, {first}", ylabel=f"under {second}")
    if one["size"].nunique() > 1:
        figure.colorbar(sizes, label="examples of the class in the pool")
    axis.legend(fontsize=9)
    return figure

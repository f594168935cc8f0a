"""Figures from tidy frames and arrays. Colours are seaborn's colour-blind palette, and every series also differs by
marker or line. Each function returns the figure; `save` keeps it beside the results."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.ticker import FuncFormatter

from lib import metrics

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


def look(index):
    """Colour, line and marker of the index-th series."""
    return dict(color=COLOURS[index % 10], linestyle=LINES[index % 4], marker=MARKERS[index % 4])


def error_bars(axis, x, frame, index, label=None, **more):
    """Values of a frame with their intervals, joined by a line."""
    low, high = frame.value - frame.ci_low, frame.ci_high - frame.value
    axis.errorbar(x, frame.value, [low, high], capsize=3, label=label, **{**look(index), **more})


def picture(axis, image):
    """One example: image [channels, H, W] (uint8, or floats in 0..1), or a table's row as a strip of bars."""
    if image.ndim == 1:
        axis.stairs(image, fill=True, color="0.4")
        axis.set(xticks=[], yticks=[])
        return
    pixels = image.transpose(1, 2, 0)
    axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray_r", interpolation="nearest")
    axis.set_axis_off()


def gallery(dataset, per_class=6, most=10):
    """A few pool examples of each class (of the first ten), a class a column."""
    n = min(dataset.n_classes, most)
    figure, axes = plt.subplots(per_class, n, figsize=(n, per_class * 1.05), squeeze=False)
    for column in range(n):
        chosen = np.flatnonzero(dataset.y == column)
        for row in range(per_class):
            axes[row, column].set_axis_off()
            if row < len(chosen):
                picture(axes[row, column], dataset.x[chosen[row]])
        axes[0, column].set_title(dataset.classes[column], fontsize=10)
    return figure


def what_an_attacker_sees(phi, member, example, image, title):
    """Three pictures: an example, its phi with and without it in training, and everybody's phi in one model."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), width_ratios=[1, 2, 2], layout="constrained")
    picture(axes[0], image)
    axes[0].set_title(title)
    inside = member[:, example]
    histograms(axes[1], phi[inside, example], phi[~inside, example], ("trained with it", "trained without it"))
    axes[1].set(title="one example, many models", xlabel=r"confidence $\phi$ of the model", ylabel="density of models")
    histograms(axes[2], phi[0, member[0]], phi[0, ~member[0]], ("members", "non-members"))
    axes[2].set(
        title="one model, many examples", xlabel=r"confidence $\phi$ of the model", ylabel="density of examples"
    )
    return figure


def histograms(axis, inside, outside, labels):
    """Two filled histograms on common bins, told apart by colour and outline."""
    bins = np.histogram_bin_edges(np.concatenate([inside, outside]), 30)
    for index, (values, label) in enumerate(zip((inside, outside), labels, strict=True)):
        axis.hist(values, bins, density=True, histtype="stepfilled", alpha=0.3, color=COLOURS[index + 2], label=label)
        axis.hist(values, bins, density=True, histtype="step", color=COLOURS[index + 2], linestyle=LINES[index], lw=1.8)
    axis.legend(fontsize=9)


def training_curves(ensembles):
    """Train loss (log scale), train and test accuracy against epochs: means over models, bands of 95% of them."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for index, (name, ensemble) in enumerate(ensembles.items()):
        history = np.array(ensemble.history)
        for axis, column in zip(axes, range(3), strict=True):
            seen = ~np.isnan(history[:, :, column]).any(0)
            epochs, values = np.flatnonzero(seen) + 1, history[:, seen, column]
            style = look(index) | {"marker": MARKERS[index] if column == 2 else None}
            axis.plot(epochs, values.mean(0), label=name, **style)
            axis.fill_between(epochs, *np.quantile(values, [0.025, 0.975], axis=0), color=COLOURS[index], alpha=0.2)
    axes[0].set(title="train loss", yscale="log", xlabel="epoch", ylabel="cross-entropy (nats)")
    axes[1].set(title="train accuracy", xlabel="epoch", ylabel="share correct")
    axes[2].set(title="test accuracy", xlabel="epoch", ylabel="share correct")
    axes[0].legend()
    return figure


def forest(frame, xlabel, order=None):
    """Paired differences with intervals, one row per attack; the line at 0 is 'no difference'."""
    order = list(order if order is not None else frame.attack.unique())
    figure, axis = plt.subplots(figsize=(7.5, 0.34 * len(order) + 1.2), layout="constrained")
    for index, (name, rows) in enumerate(frame.groupby("optimizer", sort=False)):
        rows = rows.set_index("attack").reindex(order)
        places = np.arange(len(order)) + 0.15 * index
        spread = [rows.value - rows.ci_low, rows.ci_high - rows.value]
        axis.errorbar(rows.value, places, xerr=spread, capsize=3, label=name, **(look(index) | {"linestyle": ""}))
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
        axis.plot(
            grid, metrics.roc(attacks[attack], member, grid), label=name, **(look(index) | {"marker": None}), lw=2
        )
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
        axis.set(title=name, xlabel=r"$\phi = \log p_y - \log(1-p_y)$", ylabel="density")
    return figure


def dose_response(frame, panels):
    """Paired differences from the baseline against rho, a panel per metric. panels: metric -> axis label."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.1 * len(panels), 3.4), layout="constrained")
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        rows = frame[frame.metric == metric].sort_values("rho")
        error_bars(axis, rows.rho, rows, 1)
        axis.axhline(0, color="0.3", lw=1)
        axis.set(xlim=(0, None), xlabel=r"$\rho$", ylabel=f"{label}: difference")
    return figure


def leakage_against_loss(frame):
    """LiRA's AUC against the train loss reached. frame: rows with series, label, train_loss, value, ci_low, ci_high."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for index, (name, rows) in enumerate(frame.groupby("series", sort=False)):
        rows = rows.sort_values("train_loss")
        error_bars(axis, rows.train_loss, rows, index, label=name)
        for row in rows.itertuples():
            spot = dict(textcoords="offset points", xytext=((6, -11), (6, 5), (-6, -14))[index % 3], fontsize=8)
            axis.annotate(row.label, (row.train_loss, row.value), color=COLOURS[index], **spot)
    axis.set(xscale="log", xlabel="train loss (nats), falling to the right", ylabel="AUC of LiRA")
    axis.invert_xaxis()
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axis.legend()
    return figure

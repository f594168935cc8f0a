"""Figures of several notebooks. Colours are seaborn's colour-blind palette; series also differ by marker or line."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import Image

from lib.study.results import NUMBERS
from lib.study.text import series
from lib.study.verdict import FITS

COLOURS = sns.color_palette("colorblind")
LINES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D")


def style():
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update({"figure.dpi": 100, "savefig.bbox": "tight", "legend.frameon": False})


def save(figure, run, name):
    """Write the figure to <out>/figures/<name>.png; returns that picture, so that a notebook need not draw it again."""
    path = Path(run.out) / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return Image(path)


def plain(name):
    """A name that comes from data as text of a figure: without mathematics, and never hidden from a legend."""
    text = str(name).replace("$", r"\$")
    return "\u2009" * text.startswith("_") + text  # a legend leaves out what begins with _


def look(index, name=None):
    """Colour, line and marker of the index-th series, and its name as the label, if one is given."""
    label = {"label": plain(name)} if name else {}
    return dict(color=COLOURS[index % 10], linestyle=LINES[index % 4], marker=MARKERS[index % 4], **label)


def error_bars(axis, x, frame, index, label=None, **more):
    low, high = frame.value - frame.ci_low, frame.ci_high - frame.value
    axis.errorbar(x, frame.value, [low, high], capsize=3, **{**look(index, label), **more})


def picture(axis, image):
    """One example: image [channels, H, W] (uint8, or floats in 0..1), or a table's row as a strip of bars."""
    axis.set(xticks=[], yticks=[])
    if image.ndim == 1:
        axis.stairs(image, fill=True, color="0.4")
    else:
        axis.imshow(image.transpose(1, 2, 0), cmap="gray_r", interpolation="nearest")


def forest(frame, panels, rows="attack", reference=0):
    """Values with intervals, by panel (metric -> label of the x axis), row and optimizer; a grey line at reference."""
    order = list(frame[rows].unique())
    size = (3.6 * len(panels) + 3.4, 0.34 * len(order) + 1.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (metric, xlabel) in zip(axes[0], panels.items(), strict=True):
        part = frame[frame.metric == metric]
        for index, (name, found) in enumerate(part.groupby(series(part), sort=False)):
            found = found.set_index(rows).reindex(order)
            at, bars = np.arange(len(order)) + 0.15 * index, [found.value - found.ci_low, found.ci_high - found.value]
            axis.errorbar(found.value, at, xerr=bars, capsize=3, **look(index, name) | {"linestyle": ""})
        axis.axvline(found.value[reference] if reference in found.index else reference, color="0.5", lw=1)
        axis.set(yticks=range(len(order)), yticklabels=map(plain, order), xlabel=xlabel)
        axis.locator_params(axis="x", nbins=5)
    axes[0, 0].invert_yaxis()
    if any(series(frame)):
        axes[0, 0].legend(fontsize=9)
    return figure


def leakage_against_accuracy(axis, rows, attack, chosen):
    """Every setting of a tuning as a point: test accuracy and AUC, minus those of the tuned baseline, in points.

    Lines join the learning rates. Settings in `chosen` are large; those that do not fit (verdict.FITS) are hollow."""
    setting = ["optimizer", "rho", "lr", "weight_decay"]
    rows = rows.set_index(setting)
    fits = rows[(rows.metric == "train_accuracy") & (rows.baseline == "")].value.groupby(setting, sort=False).first()
    changes = rows[rows.baseline != ""].groupby(["metric", "attack"])[NUMBERS]
    what = ("test_accuracy", ""), ("auc", attack)
    x, y = (100 * changes.get_group(key).reindex(fits.index).fillna(0) for key in what)  # 0: the tuned baseline
    near = fits[~(x.value < x.value[fits >= FITS].min() - 1)]  # a point below all that fit: too far to show
    axis.axhline(0, color="0.4", lw=0.8)
    axis.axvline(0, color="0.4", lw=0.8)
    for index, ((name, rho), part) in enumerate(near.groupby(level=["optimizer", "rho"], sort=False)):
        colour, marker = COLOURS[index % 10], MARKERS[index % 4]
        label = plain(f"{name}, rho {rho:g}" if rho else name)
        for k, (_, line) in enumerate(part.groupby(level="weight_decay", sort=False)):
            at, dots = line.sort_index(level="lr").index, ":" if k else "-"
            axis.plot(x.value[at], y.value[at], marker + dots, color=colour, lw=1.2, label=None if k else label)
        for at, share in part.items():
            bars = ([[of.value - of.ci_low], [of.ci_high - of.value]] for of in (y.loc[at], x.loc[at]))
            look = dict(color=colour, mfc=colour if share >= FITS else "white", ms=12 if at in chosen else 6)
            axis.errorbar(x.value[at], y.value[at], *bars, fmt=marker, ecolor=(*colour, 0.6), elinewidth=0.6, **look)
    less = "minus the tuned baseline's, points"
    axis.set(xlabel=f"test accuracy, {less}", ylabel=plain(f"AUC of {attack},\n{less}"))

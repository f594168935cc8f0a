"""Cost against models, examples and size of model: seconds measured on this machine, and the slope of their logarithms.

Writes <out>/bench_scaling.csv (series, axis, size, seconds) and the figure made from it, <out>/bench_scaling.png.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import linregress

from benchmarks.cpu import RECIPE, in_turn, made_logits, many
from lib.attacks import catalogue
from lib.data.dataset import Dataset
from lib.training import networks

AXES = {"M": "models M", "N": "examples in the pool N", "P": "weights of a model P"}
TRAIN, ATTACK = "training (SGD)", "attacks but the neural"
COMPILED = replace(RECIPE, epochs=64)  # long enough for its step to be compiled, at the smallest N too
# N of training: multiples of two batches, so that no remainder is left out
SIZES = {
    (TRAIN, "M"): (32, 64, 128, 256, 512),
    (TRAIN, "N"): (640, 1280, 2560, 5120, 10240),
    (TRAIN, "P"): (32, 64, 128, 256, 512),  # hidden units
    (ATTACK, "M"): (32, 64, 128, 256, 512),
    (ATTACK, "N"): (2560, 5120, 10240, 20480, 40960),
}
FIXED = {"models": 32, "pool": 1280, "scored": 5120, "against": 64}  # what stays while another size changes


def __getattr__(name):
    """mlp_512 and so on, an MLP with so many hidden units, by its import path."""
    if not name.startswith("mlp_"):
        raise AttributeError(name)
    return partial(networks.mlp, hidden=(int(name.removeprefix("mlp_")),))


def table_like_digits(n, t=640, features=64, classes=10):
    """n pool and t test examples of `features` numbers in 0..1 around the centres of the classes."""
    rng = np.random.default_rng(0)
    y, y_test = np.arange(n) % classes, np.arange(t) % classes
    centres = rng.random((classes, features))
    x, x_test = (np.clip(centres[of] + 0.3 * rng.normal(size=(len(of), features)), 0, 1) for of in (y, y_test))
    names = tuple(str(label) for label in range(classes))
    return Dataset("synthetic", x.astype(np.float32), y, x_test.astype(np.float32), y_test, names)


def training_works(axis, sizes, recipe, fixed):
    """Size on the axis -> a warm training, as a function without arguments."""
    pool, count = table_like_digits(fixed["pool"]), fixed["models"]
    if axis == "M":
        return {size: many(pool, recipe, size) for size in sizes}
    if axis == "N":
        return {size: many(table_like_digits(size), recipe, count) for size in sizes}
    archs = [f"{__name__}:mlp_{width}" for width in sizes]
    return {weights(arch, pool): many(pool, replace(recipe, arch=arch), count) for arch in archs}


def weights(arch, dataset):
    """How many a model has."""
    net = networks.build(arch, dataset.x.shape[1:], dataset.n_classes)
    return sum(p.numel() for p in net.parameters())


def attack_works(axis, sizes, recipe, fixed):
    """Size on the axis -> all the attacks but the neural, as a function without arguments."""

    def work(size):
        shape = (size, fixed["scored"]) if axis == "M" else (fixed["against"], size)
        logits, y, member = made_logits(*shape)
        return lambda: catalogue.run(logits, y, member, learned=False)

    return {size: work(size) for size in sizes}


def slope(sizes, seconds):
    """(b, its standard error) of log seconds = a + b log size, by least squares."""
    fit = linregress(np.log(sizes), np.log(seconds))
    return float(fit.slope), float(fit.stderr)


def power(series, axis, points):
    """'training (SGD): time ~ M^1.02 (± 0.01)', the standard error in parentheses."""
    b, error = slope(points["size"], points.seconds)
    return f"{series}: time ~ {axis}^{b:.2f} (± {error:.2f})"


def labels(fixed):
    """What is along each axis, and what stays meanwhile."""
    pool, models, scored, against = (f"{fixed[name]:,}" for name in ("pool", "models", "scored", "against"))
    stays = {
        "M": f"pool of {pool}; attacked: {scored}",
        "N": f"{models} models; attacked: {against}",
        "P": f"{models} models, pool of {pool}",
    }
    return {axis: f"{label}\n({stays[axis]})" for axis, label in AXES.items()}


def figure(frame, fixed=FIXED):
    """A panel for each axis, the slopes in its title. frame: columns series, axis, size, seconds."""
    import matplotlib.pyplot as plt

    from lib.study import figures

    figures.style()
    made, panels = plt.subplots(1, len(AXES), figsize=(5.2 * len(AXES), 4.6), layout="constrained")
    for panel, (axis, label) in zip(panels, labels(fixed).items(), strict=True):
        titles = []
        for index, series in enumerate((TRAIN, ATTACK)):
            points = frame[(frame.series == series) & (frame.axis == axis)]
            if len(points):
                line(panel, points, index, series)
                titles.append(power(series, axis, points))
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
        panel.set_title("\n".join(titles), fontsize=11)
        ticks(panel, np.sort(frame[frame.axis == axis]["size"].unique()))
    panels[0].legend(fontsize=10)
    return made


def line(panel, points, index, series):
    """Measured points, and the fitted line through them."""
    from lib.study import figures

    fit = linregress(np.log(points["size"]), np.log(points.seconds))
    drawn = np.exp(fit.intercept + fit.slope * np.log(points["size"]))
    look = figures.look(index)
    panel.plot(points["size"], points.seconds, look["marker"], color=look["color"], label=series)
    panel.plot(points["size"], drawn, look["linestyle"], color=look["color"], lw=1.2)


def ticks(panel, sizes):
    """Plain numbers: some of the measured sizes, and seconds."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    few = sizes[:: -(-len(sizes) // 5)]
    panel.set_xticks(few, [f"{size:,}" for size in few])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def scaling(out, recipe=COMPILED, sizes=SIZES, fixed=FIXED, rounds=3):
    """A row for every slope; the seconds behind them and their figure go to the folder `out`."""
    points = []
    for (series, axis), wanted in sizes.items():
        works = (training_works if series == TRAIN else attack_works)(axis, wanted, recipe, fixed)
        taken = in_turn(works, rounds)
        points += [(series, axis, size, value) for size, value in taken.items()]
        b, error = slope(list(taken), list(taken.values()))
        name = f"cost of {series} against {AXES[axis]}, {min(taken)} to {max(taken)}: slope b of time ~ {axis}^b"
        yield f"{name} (± standard error)", f"{b:.2f} ± {error:.2f}", "", "", "", ""
    frame = pd.DataFrame(points, columns=["series", "axis", "size", "seconds"])
    frame.to_csv(out / "bench_scaling.csv", index=False, float_format="%.4g")
    figure(frame, fixed).savefig(out / "bench_scaling.png")

"""The experiments of the study, declared once, and what a run of them will train and cost.

Everything iterates over EXPERIMENTS: `run.ensembles(name)` trains one of them, `--plan` lists what is left of all,
the forecast and the check of the disk sum it up, and `--work` trains it beside other processes.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.analysis import compare
from lib.analysis.memorization import plant
from lib.data.dataset import Dataset
from lib.training import Recipe, ensemble, networks, privacy, train, workers
from lib.training.store import place, read_json

SIZES = {"sweep": (128, 64), "few": (64, 16), "private": (32, 8)}  # models of an ensemble: on small data, on images
VARIANTS = ("sam", "asam", "gsam", "looksam", "msam", "fsam", "esam")
WITHOUT_NORM = {"cnn": "cnn_plain", "mlp_bn": "mlp"}  # a network and the same without BatchNorm


class Planned(NamedTuple):
    """An ensemble to train. is_drawn: its pool is drawn from results later on, and `dataset` only stands in for it."""

    recipe: Recipe
    n_models: int
    dataset: Dataset
    is_drawn: bool = False


class Experiment(NamedTuple):
    """A set of ensembles that are compared with each other.

    declare: (run, dataset, exact) -> dict key -> Planned. exact=False: without the noise that private optimizers need
    for their epsilon, since an accountant takes seconds to find it. notebooks: the numbers of those that use it.
    essential: run -> the keys that may not be left out when models diverge (default: all). pool: the end of the data
    set's name, if a notebook draws it from results. optional: not run without 8 models of the first ensemble.
    """

    declare: Callable
    notebooks: tuple
    essential: Callable | None = None
    pool: str = ""
    optional: bool = False


# ---- what is declared ---------------------------------------------------------------------------------------


def of(run, optimizer, n_models, dataset=None, **changes):
    """The run's recipe for one optimizer, with changes, as a Planned."""
    return Planned(run.recipe(optimizer, **changes), n_models, dataset or run.dataset)


def n_models(run, kind):
    """Models of an ensemble of one kind (SIZES), or the run's if those are fewer.

    Also the run's if each model draws its own subset: then few models would leave examples that hardly any of them
    saw, or missed.
    """
    return min(run.n_models, SIZES[kind][not run.is_small]) if run.subset == 0.5 else run.n_models


def main(run, dataset, exact):
    """Every optimizer of the run. Keys: the optimizer."""
    return {name: of(run, name, run.n_models) for name in run.names}


def radius_sweep(run, dataset, exact):
    """The treatment at radii below, at and above the run's. Keys: rho. 0.0, the first, is its base without the rule.

    An optimizer whose text gives a radius has only that one; one without a radius has none.
    """
    own, size = run.recipe(run.treatment), n_models(run, "sweep")
    factors = (0.25, 0.5, 1, 2) if run.is_small else (0.5, 1, 2)
    factors = () if not own.optimizer.has_radius else factors if own.optimizer.rho is None else (1,)
    found = {0.0: of(run, own.optimizer.base_name, size)}
    return found | {f * own.rho: of(run, run.treatment, size, rho=f * own.rho) for f in factors}


def lengths(run, factors=None):
    """Numbers of epochs from far short of the main run to far beyond it, as factors of the run's."""
    factors = factors or ((0.125, 0.375, 1, 2.5) if run.is_small else (0.375, 1, 2))
    return sorted({max(1, round(factor * run.epochs)) for factor in factors})


def length_sweep(run, dataset, exact, kind="sweep"):
    """Both optimizers at every length, and the baseline in between, to interpolate. Keys: (epochs, optimizer)."""
    keys = [(epochs, name) for epochs in lengths(run) for name in (run.baseline, run.treatment)]
    keys += [(e, run.baseline) for e in lengths(run, (0.25, 0.5, 0.75, 1.5) if run.is_small else (0.7, 1.4))]
    return {(epochs, name): of(run, name, n_models(run, kind), epochs=epochs) for epochs, name in dict.fromkeys(keys)}


def equal_compute(run):
    """dict epochs of the treatment -> epochs of the baseline that take as many gradients: half the run's, the run's."""
    ratio = run.recipe(run.treatment).optimizer.gradients_per_step()
    ratio /= run.recipe(run.baseline).optimizer.gradients_per_step()
    return {e: max(1, round(ratio * e)) for e in (max(1, run.epochs // 2), run.epochs)}


def length_sweep_few(run, dataset, exact):
    """The length sweep with few models, and the lengths of equal compute. Keys: (epochs, optimizer)."""
    found = length_sweep(run, dataset, exact, "few")
    for epochs, more in equal_compute(run).items():
        for key in ((epochs, run.treatment), (more, run.baseline)):
            found[key] = of(run, key[1], n_models(run, "few"), epochs=key[0])
    return found


def planted_leak(run, dataset, exact):
    """The baseline on a pool that holds one example many times. Key: "leak"."""
    return {"leak": of(run, run.baseline, compare.PLANTED, dataset, subset=0.5)}


def planted_faults(run, dataset, exact):
    """The baseline, trained long, on the pool as it is and with faults. Keys: "before", "after"."""
    size = min(run.n_models, max(32, run.n_models // 4))
    pools = {"before": run.dataset, "after": dataset}
    return {k: of(run, run.baseline, size, pool, epochs=lengths(run)[-1], subset=0.5) for k, pool in pools.items()}


def on_base(run, rule):
    """The text of a rule on the run's own base."""
    return rule if run.baseline == "sgd" else f"{rule}+{run.baseline}"


def variants(run, dataset, exact):
    """Every sharpness-aware optimizer at its radii, the run's own, SharpReg and SWA. Keys: (optimizer, rho).

    The first is the baseline at 0.0. A radius that a name gives is the only one.
    """
    several = (0.5, 1, 2) if run.is_small and run.preset != "tiny" else (1,)
    names = [on_base(run, rule) for rule in VARIANTS] + list(run.names[1:])
    names += [on_base(run, rule) for rule in ("sharpreg", "swa")]
    found = {(run.baseline, 0.0): of(run, run.baseline, n_models(run, "few"))}
    for name in dict.fromkeys(names):
        recipe = run.recipe(name)
        free = recipe.rho > 0 and recipe.optimizer.rho is None
        for rho in [factor * recipe.rho for factor in (several if free else (1,))]:
            found[name, rho] = of(run, name, n_models(run, "few"), rho=rho)
    return found


def levels(run):
    """What is varied to find causes, one thing at a time: dict (factor, level) -> changes of the recipe.

    The run as it is comes first. A change of "dataset" is another data set.
    """
    found, size = {("as it is", "as it is"): {}}, run.batch_size
    least = max(4, *(run.recipe(name).optimizer.least_batch for name in (run.baseline, run.treatment)))
    for batch in (round(0.25 * size), 4 * size):
        if least <= batch <= round(len(run.dataset.y) * run.subset):
            found["batch size", f"{batch}"] = {"batch_size": batch}
    for epochs in (lengths(run)[-3:][0], lengths(run)[-1]):
        if epochs != run.epochs:
            found["epochs", f"{epochs}"] = {"epochs": epochs}
    for share in (0.1, 0.3):
        noisy = plant(run.dataset, round(share * len(run.dataset.y)), seed=run.seed)[0]
        found["label noise", f"{share:.0%}"] = {"dataset": noisy}
    for decay in (0.0, 5e-3):
        if decay != run.weight_decay:
            found["weight decay", f"{decay:g}"] = {"weight_decay": decay}
    twin = WITHOUT_NORM.get(run.arch) or {v: k for k, v in WITHOUT_NORM.items()}.get(run.arch)
    if twin:
        found["BatchNorm", "without" if run.arch in WITHOUT_NORM else "with"] = {"arch": twin}
    return found


def causes(run, dataset, exact):
    """Both optimizers at every level of every factor. Keys: (factor, level, optimizer).

    On images, and in the smallest run, only the last level of each factor.
    """
    found = levels(run)
    if not run.is_small or run.preset == "tiny":
        found = {key: found[key] for key in {factor: (factor, level) for factor, level in found}.values()}
    names = run.baseline, run.treatment
    return {(*key, n): of(run, n, n_models(run, "few"), **changes) for key, changes in found.items() for n in names}


def defences(run, dataset, exact):
    """What is trained to leak less. Keys: the defence's name; "none", the baseline, is first."""
    smoothed, treatment = {"smoothing": 0.1}, run.treatment
    plans = {
        "none": (run.baseline, {}),
        treatment: (treatment, {}),
        "label smoothing 0.1": (run.baseline, smoothed),
        "stopped at a quarter": (run.baseline, {"stop": 0.25}),
        "stopped at half": (run.baseline, {"stop": 0.5}),
        "weight averaging (swa)": (on_base(run, "swa"), {}),
        "SharpReg": (on_base(run, "sharpreg"), {}),
        f"{treatment}, smoothing 0.1": (treatment, smoothed),
    }
    return {label: of(run, name, n_models(run, "few"), **changes) for label, (name, changes) in plans.items()}


def delta_of(run):
    """The delta of the run's privacy claims: the power of ten below half of one over the size of the pool."""
    return 10.0 ** np.floor(np.log10(1 / (2 * run.n_examples)))


def private_arch(run):
    """The run's network, or its twin, without BatchNorm, which mixes a batch's examples.

    None if there is none, or if the baseline asks for gradients anew within a step, which no accountant counts.
    """
    arch = WITHOUT_NORM.get(run.arch, run.arch)
    if run.recipe(run.baseline).optimizer.asks_again():
        return None
    net = networks.build(arch, run.dataset.x.shape[1:], run.dataset.n_classes)
    return None if networks.has_batchnorm(net) else arch


def private(run, dataset, exact):
    """The baseline, DP-SGD and DP-SAM on a network without BatchNorm. Keys: (optimizer, epsilon).

    Each has the noise that gives it that epsilon on the run's halves; the baseline, which is first, has none: inf.
    """
    arch, recipe = private_arch(run), run.recipe(run.baseline)
    if arch is None:
        return {}
    size = n_models(run, "private")
    found = {(run.baseline, np.inf): of(run, run.baseline, size, arch=arch)}
    n = round(len(run.dataset.y) * recipe.subset)
    steps = n // recipe.batch_size * recipe.epochs
    for rule, queries in (("dpsgd", 1), ("dpsam", 2)):
        for epsilon in (8, 64) if run.is_small else (64,):
            accounted = epsilon, recipe.batch_size, n, steps, delta_of(run), queries
            sigma = privacy.noise_for(*accounted) if exact else 1.0
            found[rule, epsilon] = of(run, on_base(run, f"{rule}(sigma={sigma:.4g})"), size, arch=arch)
    return found


def pair(run):
    """The keys of the run's own length in a length sweep."""
    return [(run.epochs, run.baseline), (run.epochs, run.treatment)]


EXPERIMENTS = {
    "main": Experiment(main, ("01", "02", "03", "04")),
    "radius sweep": Experiment(radius_sweep, ("01", "04"), lambda run: [0.0]),
    "length sweep": Experiment(length_sweep, ("01",), pair),
    "planted leak": Experiment(planted_leak, ("01",), pool="leak"),
    "planted faults": Experiment(planted_faults, ("02",), pool="planted"),
    "variants": Experiment(
        variants, ("06",), lambda run: [(run.baseline, 0.0), (run.treatment, run.recipe(run.treatment).rho)]
    ),
    "length sweep, few models": Experiment(
        length_sweep_few, ("06",), lambda run: [*pair(run), (equal_compute(run)[run.epochs], run.baseline)]
    ),
    "causes": Experiment(
        causes, ("06",), lambda run: [("as it is", "as it is", name) for name in (run.baseline, run.treatment)]
    ),
    "defences": Experiment(defences, ("06",), lambda run: ["none"]),
    "private": Experiment(private, ("06",), lambda run: [(run.baseline, np.inf)], optional=True),
}


def plan(run, name, dataset=None, exact=True):
    """What an experiment trains: dict key -> Planned. dataset: the pool that a notebook has drawn for it.

    Raises ValueError for an unknown name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment={name!r} is unknown: choose one of {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    if not experiment.pool or dataset is not None:
        return experiment.declare(run, dataset, exact)
    stand_in = replace(run.dataset, name=f"{run.dataset.name}-{experiment.pool}")  # about its size
    found = experiment.declare(run, stand_in, exact)
    return {key: planned._replace(is_drawn=planned.dataset is stand_in) for key, planned in found.items()}


# ---- what it costs ------------------------------------------------------------------------------------------

COLUMNS = "experiment arch optimizer rho epochs models finished megagradients megagradients_in_all megabytes".split()
PER_EXAMPLE = 3  # a gradient for each example, which private rules clip, costs about three times a batch gradient


def work(recipe, n, n_models):
    """Gradients of one example that these models take in all, on a pool of n; a clipped one counts as PER_EXAMPLE."""
    per_epoch = round(n * recipe.subset) // recipe.batch_size * recipe.batch_size
    each = recipe.optimizer.gradients_per_step() * (PER_EXAMPLE if recipe.optimizer.is_private else 1)
    return n_models * recipe.run_epochs * per_epoch * each


def to_train(run, notebooks=None, exact=False):
    """What the experiments of some notebooks ("01", ...; default all) train, each model once.

    A list of (experiment's name, Planned, low, high) for the models low..high-1.
    """
    seen, found = {}, []
    for name, experiment in EXPERIMENTS.items():
        if notebooks is None or set(notebooks) & set(experiment.notebooks):
            for planned in plan(run, name, exact=exact).values():
                key = planned.recipe, planned.dataset.hash, planned.is_drawn and planned.dataset.name
                low, seen[key] = seen.get(key, 0), max(seen.get(key, 0), planned.n_models)
                if low < planned.n_models:
                    found.append((name, planned, low, planned.n_models))
    return found


def flags(run, planned, low, high):
    """Paths of the flags of the finished ones of models low..high-1; nothing is made in the store.

    Of a pool that is drawn later: in the store of this recipe on such a pool that has most of them.
    """
    name, key = ensemble.store_key(planned.recipe, planned.dataset)
    folder, text = place(run.store, name, key)
    folders = [folder]
    if planned.is_drawn:
        recipes = {path.parent: read_json(path) for path in folder.parent.glob(f"{name}-*/recipe.json")}
        folders = [f for f, recipe in recipes.items() if {**recipe, "data": ""} == {**json.loads(text), "data": ""}]
    found = [[where / "done" / f"{k:05d}.json" for k in range(low, high)] for where in folders]
    return max(([path for path in paths if path.exists()] for paths in found), key=len, default=[])


def table(run, notebooks=None, exact=False):
    """What is left to train: a frame with a row for each ensemble, and what is known of its cost.

    COLUMNS, of which megagradients (of one example) and megabytes (on the disk) are what is left; and seconds, left by
    this run alone, NaN where no model of this network is finished yet.
    """
    rows, rates, device = [], {}, ensemble.device_of(run.device)
    for name, planned, low, high in to_train(run, notebooks, exact):
        recipe, data, done = planned.recipe, planned.dataset, flags(run, planned, low, high)
        one, missing = work(recipe, len(data.y), 1), high - low - len(done)
        told = [read_json(path).get("seconds") for path in done]
        rates.setdefault(recipe.arch, []).extend(one / seconds for seconds in told if seconds)
        row = dict(experiment=name, arch=recipe.arch, optimizer=str(recipe.optimizer), rho=recipe.rho)
        row |= dict(epochs=recipe.run_epochs, models=high - low, finished=len(done))
        row |= dict(megagradients=missing * one / 1e6, megagradients_in_all=(high - low) * one / 1e6)
        row["megabytes"] = ensemble.stored_bytes(recipe, data, range(low + len(done), high)) / 1e6
        rows.append(row | {"at_once": workers.n_processes(recipe, data, device)})
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "at_once"])  # the verdict's notebook trains nothing: no rows
    rate = frame.arch.map({arch: median(found) if found else np.nan for arch, found in rates.items()})
    return frame.assign(seconds=1e6 * frame.megagradients / rate / frame.at_once).drop(columns="at_once")


def left(run, notebooks=None):
    """(gradients still to do, gradients in all) of a run's notebooks ("01", ...; default all)."""
    frame = table(run, notebooks)
    return 1e6 * frame.megagradients.sum(), 1e6 * frame.megagradients_in_all.sum()


def trial(run):
    """Gradients of one example a second that training the baseline takes now, uncompiled, in all processes together.

    Timed is a short training on a part of the pool, of 2, 8 or 32 steps, until it takes a second.
    """
    data, recipe = run.dataset, run.recipe(run.baseline, subset=0.5)
    n = min(len(data.y), 4 * recipe.batch_size) // 2 * 2
    few = replace(data, x=data.x[:n], y=data.y[:n], x_test=data.x_test[:1], y_test=data.y_test[:1], groups=None)
    for epochs in (1, 4, 16):
        with tempfile.TemporaryDirectory() as folder:
            train(replace(recipe, epochs=epochs), few, 2, folder, run.device, quiet=True)
            seconds = [read_json(path)["seconds"] for path in Path(folder).glob("*/done/*.json")]
        if sum(seconds) > 1:
            break
    at_once = workers.n_processes(run.recipe(run.baseline), data, ensemble.device_of(run.device))
    return at_once * work(replace(recipe, epochs=epochs), n, 1) / median(seconds)


def describe(run, notebooks=None):
    """The table as text, with what is left in all: gradients, time and disk."""
    frame, device = table(run, notebooks, exact=True), ensemble.device_of(run.device)
    unknown = 1e6 * frame.megagradients[frame.seconds.isna()].sum()
    seconds = frame.seconds.sum() + (unknown / trial(run) if unknown else 0)
    source = "the store's finished models" + (" and a trial of some steps just now" if unknown else "")
    room = shutil.disk_usage(run.store).free / 1e6
    times = ["?" if s != s else duration(s) for s in frame.seconds]
    shown = frame.drop(columns=["seconds", "megagradients_in_all"]).assign(time=times)
    return (
        f"{shown.round(1).to_string(index=False)}\n\n"
        f"Left: {frame.models.sum() - frame.finished.sum()} of {frame.models.sum()} models, "
        f"{frame.megagradients.sum():.3g} million gradients: about {duration(seconds)} on {device}, by "
        f"{source}; {frame.megabytes.sum():.0f} MB on the disk, which has {room:.0f} MB free. "
        "The time to analyse them is not counted."
    )


def check_disk(run, notebooks=None):
    """Raise ValueError naming `store` if what is left to train does not fit the disk."""
    free, needed = shutil.disk_usage(run.store).free / 1e6, table(run, notebooks).megabytes.sum()
    if needed > free:
        raise ValueError(
            f"store={run.store!r}: the disk has {free:.0f} MB free, what is left of the run needs {needed:.0f} MB: "
            "free some, or ask for fewer models, examples or notebooks"
        )


def work_off(run, notebooks=None):
    """Train what is left of a run and no other process is training, without waiting for what others have begun.

    Pools that notebooks draw from results are left to the notebooks.
    """
    for name, (recipe, _, data, is_drawn), _, high in to_train(run, notebooks, exact=True):
        if not is_drawn:
            print(f"{name}: {recipe.optimizer} rho {recipe.rho}, {recipe.run_epochs} epochs", flush=True)
            train(recipe, data, high, run.store, run.device, notify=run.forecast, wait=False)


def duration(seconds):
    """'40 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Forecast:
    """Says once, after the second chunk of models, how long the rest of a run's training will take.

    The first chunk may also have compiled its step, which later ones are spared.
    """

    def __init__(self, run):
        self.run, self.chunks = run, 0

    def __call__(self, recipe, n_examples, n_models, seconds):
        self.chunks += 1
        if self.chunks == 2:
            to_do, total = left(self.run)
            words = duration(to_do / work(recipe, n_examples, n_models) * seconds)
            done = 1 - to_do / total
            print(f"Training for all the notebooks of this run: about {words} to go, {done:.0%} is done.", flush=True)

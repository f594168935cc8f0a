"""The experiments, declared once for `run.ensembles`, `--plan`, `--work`, the forecast and the check of the disk."""

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
COLUMNS = "experiment arch optimizer rho epochs models finished megagradients megagradients_in_all megabytes".split()
PER_EXAMPLE = 3  # a gradient for each example, which private rules clip, costs about three times a batch gradient


class Planned(NamedTuple):
    """An ensemble to train. is_drawn: its pool is drawn from results later on, and `dataset` only stands in for it."""

    recipe: Recipe
    n_models: int
    dataset: Dataset
    is_drawn: bool = False


class Experiment(NamedTuple):
    """Ensembles that are compared with each other: declare(run) gives dict key -> Planned.

    notebooks: the numbers of those that use it. essential: run -> the keys that must stay when models diverge (default:
    all). pool: the end of the data set's name, if a notebook draws it from results; then declare(run, dataset).
    is_private: then declare(run, exact), and nothing is compared if fewer than 8 models of the first ensemble learn.
    """

    declare: Callable
    notebooks: tuple
    essential: Callable | None = None
    pool: str = ""
    is_private: bool = False


EXPERIMENTS = {}


def experiment(name, *notebooks, **more):
    """Declare an experiment by the function below."""
    return lambda declare: EXPERIMENTS.setdefault(name, Experiment(declare, notebooks, **more)).declare


# ---- the declarations ---------------------------------------------------------------------------------------


def of(run, optimizer, n_models, dataset=None, **changes):
    """The run's recipe for one optimizer, with changes, as a Planned."""
    return Planned(run.recipe(optimizer, **changes), n_models, dataset or run.dataset)


def n_models(run, kind):
    """Models of an ensemble of one kind (SIZES), or the run's if those are fewer."""
    # also the run's if each model draws its own subset: hardly any of few models would see, or miss, some examples
    return min(run.n_models, SIZES[kind][not run.is_small]) if run.subset == 0.5 else run.n_models


@experiment("main", "01", "02", "03", "04")
def main(run):
    """Every optimizer of the run. Keys: the optimizer."""
    return {name: of(run, name, run.n_models) for name in run.names}


@experiment("radius sweep", "01", "04", essential=lambda run: [0.0])
def radius_sweep(run):
    """The treatment's base without the rule (0.0), then the treatment at radii around the run's. Keys: rho."""
    # an optimizer whose text gives a radius has only that one; one without a radius has none
    own, size = run.recipe(run.treatment), n_models(run, "sweep")
    factors = (0.25, 0.5, 1, 2) if run.is_small else (0.5, 1, 2)
    factors = () if not own.optimizer.has_radius else factors if own.optimizer.rho is None else (1,)
    found = {0.0: of(run, own.optimizer.base_name, size)}
    return found | {f * own.rho: of(run, run.treatment, size, rho=f * own.rho) for f in factors}


def lengths(run, factors=None):
    """Numbers of epochs from far short of the main run to far beyond it, as factors of the run's."""
    factors = factors or ((0.125, 0.375, 1, 2.5) if run.is_small else (0.375, 1, 2))
    return sorted({max(1, round(factor * run.epochs)) for factor in factors})


def at_own_length(run):
    """The keys of a length sweep that have the run's own length."""
    return [(run.epochs, run.baseline), (run.epochs, run.treatment)]


@experiment("length sweep", "01", essential=at_own_length)
def length_sweep(run, kind="sweep"):
    """Both optimizers at every length, and the baseline in between, to interpolate. Keys: (epochs, optimizer)."""
    keys = [(epochs, name) for epochs in lengths(run) for name in (run.baseline, run.treatment)]
    keys += [(e, run.baseline) for e in lengths(run, (0.25, 0.5, 0.75, 1.5) if run.is_small else (0.7, 1.4))]
    return {(epochs, name): of(run, name, n_models(run, kind), epochs=epochs) for epochs, name in dict.fromkeys(keys)}


def equal_compute(run):
    """dict epochs of the treatment -> epochs of the baseline that take as many gradients: half the run's, the run's."""
    treatment, baseline = (run.recipe(n).optimizer.gradients_per_step() for n in (run.treatment, run.baseline))
    return {e: max(1, round(treatment / baseline * e)) for e in (max(1, run.epochs // 2), run.epochs)}


def at_equal_compute(run):
    """The keys of a length sweep that compare the optimizers at the run's own length and compute."""
    return [*at_own_length(run), (equal_compute(run)[run.epochs], run.baseline)]


@experiment("length sweep, few models", "06", essential=at_equal_compute)
def length_sweep_few(run):
    """The length sweep with few models, and the lengths of equal compute. Keys: (epochs, optimizer)."""
    found = length_sweep(run, "few")
    for epochs, more in equal_compute(run).items():
        found[epochs, run.treatment] = of(run, run.treatment, n_models(run, "few"), epochs=epochs)
        found[more, run.baseline] = of(run, run.baseline, n_models(run, "few"), epochs=more)
    return found


@experiment("planted leak", "01", pool="leak")
def planted_leak(run, dataset):
    """The baseline on a pool that holds one example many times. Key: "leak"."""
    return {"leak": of(run, run.baseline, compare.PLANTED, dataset, subset=0.5)}


@experiment("planted faults", "02", pool="planted")
def planted_faults(run, dataset):
    """The baseline, trained long, on the pool as it is and with faults. Keys: "before", "after"."""
    size = min(run.n_models, max(32, run.n_models // 4))
    pools = {"before": run.dataset, "after": dataset}
    return {k: of(run, run.baseline, size, pool, epochs=lengths(run)[-1], subset=0.5) for k, pool in pools.items()}


def on_base(run, rule):
    """The text of a rule on the run's own base."""
    return rule if run.baseline == "sgd" else f"{rule}+{run.baseline}"


def at_own_radius(run):
    """The keys of the variants that the run itself has."""
    return [(run.baseline, 0.0), (run.treatment, run.recipe(run.treatment).rho)]


@experiment("variants", "06", essential=at_own_radius)
def variants(run):
    """The baseline at 0.0, every rule at its radii, the run's own optimizers, SharpReg, SWA. Keys: (optimizer, rho)."""
    several = (0.5, 1, 2) if run.is_small and run.preset != "tiny" else (1,)
    names = [on_base(run, rule) for rule in VARIANTS] + list(run.names[1:])
    names += [on_base(run, rule) for rule in ("sharpreg", "swa")]
    found = {(run.baseline, 0.0): of(run, run.baseline, n_models(run, "few"))}
    for name in dict.fromkeys(names):
        recipe = run.recipe(name)
        is_free = recipe.rho > 0 and recipe.optimizer.rho is None  # a radius in the name is the only one
        for factor in several if is_free else (1,):
            found[name, factor * recipe.rho] = of(run, name, n_models(run, "few"), rho=factor * recipe.rho)
    return found


def levels(run):
    """What is varied to find causes, one thing at a time: dict (factor, level) -> changes of the run's recipe."""
    found, size = {("as it is", "as it is"): {}}, round(len(run.dataset.y) * run.subset)
    least = max(4, *(run.recipe(name).optimizer.least_batch for name in (run.baseline, run.treatment)))
    batches = [b for b in (round(0.25 * run.batch_size), 4 * run.batch_size) if least <= b <= size]
    found |= {("batch size", f"{b}"): {"batch_size": b} for b in batches}
    found |= {("epochs", f"{e}"): {"epochs": e} for e in (lengths(run)[-3:][0], lengths(run)[-1]) if e != run.epochs}
    for share in (0.1, 0.3):
        noisy = plant(run.dataset, round(share * len(run.dataset.y)), seed=run.seed)[0]
        found["label noise", f"{share:.0%}"] = {"dataset": noisy}
    found |= {("weight decay", f"{d:g}"): {"weight_decay": d} for d in (0.0, 5e-3) if d != run.weight_decay}
    twin = WITHOUT_NORM.get(run.arch) or {without: arch for arch, without in WITHOUT_NORM.items()}.get(run.arch)
    if twin:
        found["BatchNorm", "without" if run.arch in WITHOUT_NORM else "with"] = {"arch": twin}
    return found


@experiment("causes", "06", essential=lambda run: [("as it is", "as it is", n) for n in (run.baseline, run.treatment)])
def causes(run):
    """Both optimizers at every level of every factor. Keys: (factor, level, optimizer)."""
    found, names = levels(run), (run.baseline, run.treatment)
    if not run.is_small or run.preset == "tiny":  # the last level of each factor
        found = {key: found[key] for key in {factor: (factor, level) for factor, level in found}.values()}
    return {(*key, n): of(run, n, n_models(run, "few"), **changes) for key, changes in found.items() for n in names}


@experiment("defences", "06", essential=lambda run: ["none"])
def defences(run):
    """What is trained to leak less. Keys: the defence's name; "none", the baseline, is first."""
    size, baseline, treatment = n_models(run, "few"), run.baseline, run.treatment
    return {
        "none": of(run, baseline, size),
        treatment: of(run, treatment, size),
        "label smoothing 0.1": of(run, baseline, size, smoothing=0.1),
        "stopped at a quarter": of(run, baseline, size, stop=0.25),
        "stopped at half": of(run, baseline, size, stop=0.5),
        "weight averaging (swa)": of(run, on_base(run, "swa"), size),
        "SharpReg": of(run, on_base(run, "sharpreg"), size),
        f"{treatment}, smoothing 0.1": of(run, treatment, size, smoothing=0.1),
    }


def delta_of(run):
    """The delta of the run's privacy claims: the power of ten below half of one over the size of the pool."""
    return 10.0 ** np.floor(np.log10(1 / (2 * run.n_examples)))


def private_arch(run):
    """The run's network or its twin without BatchNorm, which mixes a batch's examples; None if private can't be run."""
    arch = WITHOUT_NORM.get(run.arch, run.arch)
    net = networks.build(arch, run.dataset.x.shape[1:], run.dataset.n_classes)
    asks_again = run.recipe(run.baseline).optimizer.asks_again()  # for gradients that no accountant counts
    return None if networks.has_batchnorm(net) or asks_again else arch


@experiment("private", "06", essential=lambda run: [(run.baseline, np.inf)], is_private=True)
def private(run, exact=True):
    """The baseline (epsilon inf), DP-SGD and DP-SAM without BatchNorm. Keys: (optimizer, epsilon).

    exact=False: with any noise, since it takes the accountant seconds to find the noise for an epsilon.
    """
    arch, recipe, size = private_arch(run), run.recipe(run.baseline), n_models(run, "private")
    if arch is None:
        return {}
    found = {(run.baseline, np.inf): of(run, run.baseline, size, arch=arch)}
    n = round(len(run.dataset.y) * recipe.subset)
    steps = n // recipe.batch_size * recipe.epochs
    for rule, queries in (("dpsgd", 1), ("dpsam", 2)):
        for epsilon in (8, 64) if run.is_small else (64,):
            accounted = epsilon, recipe.batch_size, n, steps, delta_of(run), queries
            sigma = privacy.noise_for(*accounted) if exact else 1.0
            found[rule, epsilon] = of(run, on_base(run, f"{rule}(sigma={sigma:.4g})"), size, arch=arch)
    return found


def plan(run, name, dataset=None, exact=True):
    """What an experiment trains: dict key -> Planned. dataset: the pool that a notebook has drawn for it."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment={name!r} is unknown: choose one of {', '.join(EXPERIMENTS)}")
    declare, pool = EXPERIMENTS[name].declare, EXPERIMENTS[name].pool
    if not pool:
        return declare(run, exact) if EXPERIMENTS[name].is_private else declare(run)
    stand_in = replace(run.dataset, name=f"{run.dataset.name}-{pool}")  # about its size
    found = declare(run, stand_in if dataset is None else dataset)
    return {key: planned._replace(is_drawn=planned.dataset is stand_in) for key, planned in found.items()}


# ---- what it costs ------------------------------------------------------------------------------------------


def work(recipe, n, n_models):
    """Gradients of one example that these models take in all, on a pool of n; a clipped one counts as PER_EXAMPLE."""
    per_epoch = round(n * recipe.subset) // recipe.batch_size * recipe.batch_size
    each = recipe.optimizer.gradients_per_step() * (PER_EXAMPLE if recipe.optimizer.is_private else 1)
    return n_models * recipe.run_epochs * per_epoch * each


def to_train(run, notebooks=None, exact=False):
    """What some notebooks ("01", ...; default all) train: (experiment's name, Planned) of each ensemble."""
    found = {}
    for name, experiment in EXPERIMENTS.items():
        if notebooks is None or set(notebooks) & set(experiment.notebooks):
            for planned in plan(run, name, exact=exact).values():
                key = planned.recipe, planned.dataset.hash, planned.is_drawn and planned.dataset.name
                first, before = found.get(key, (name, planned))
                found[key] = first, max(before, planned, key=lambda one: one.n_models)
    return list(found.values())


def flags(run, planned):
    """Paths of the flags of an ensemble's finished models; of a pool that is drawn later, in the store with most."""
    name, key = ensemble.store_key(planned.recipe, planned.dataset)
    folder, text = place(run.store, name, key)
    folders, any_data = [folder], {"data": ""}
    if planned.is_drawn:
        made, wanted = folder.parent.glob(f"{name}-*/recipe.json"), json.loads(text) | any_data
        folders = [path.parent for path in made if read_json(path) | any_data == wanted]
    found = [[f / "done" / f"{k:05d}.json" for k in range(planned.n_models)] for f in folders]
    return max(([path for path in paths if path.exists()] for paths in found), key=len, default=[])


def table(run, notebooks=None, exact=False):
    """What is left to train: a frame with a row for each ensemble, COLUMNS and the seconds that this run needs for it.

    megagradients (of one example) and megabytes (on the disk) are left; seconds are NaN until a model is finished.
    """
    rows, rates, device = [], {}, ensemble.device_of(run.device)
    for name, planned in to_train(run, notebooks, exact):
        recipe, n_models, data, _ = planned
        done, one = flags(run, planned), work(recipe, len(data.y), 1)
        told = [read_json(path).get("seconds") for path in done]
        rates.setdefault(recipe.arch, []).extend(one / seconds for seconds in told if seconds)
        row = dict(experiment=name, arch=recipe.arch, optimizer=str(recipe.optimizer), rho=recipe.rho)
        row |= dict(epochs=recipe.run_epochs, models=n_models, finished=len(done))
        row |= dict(megagradients=(n_models - len(done)) * one / 1e6, megagradients_in_all=n_models * one / 1e6)
        row["megabytes"] = ensemble.stored_bytes(recipe, data, range(len(done), n_models)) / 1e6
        rows.append(row | {"at_once": workers.n_processes(recipe, data, device)})
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "at_once"])  # the verdict's notebook trains nothing: no rows
    rate = frame.arch.map({arch: median(found) if found else np.nan for arch, found in rates.items()})
    return frame.assign(seconds=1e6 * frame.megagradients / rate / frame.at_once).drop(columns="at_once")


def left(run, notebooks=None):
    """(gradients still to do, gradients in all) of a run's notebooks ("01", ...; default all)."""
    frame = table(run, notebooks)
    return 1e6 * frame.megagradients.sum(), 1e6 * frame.megagradients_in_all.sum()


def trial(run):
    """Gradients of one example a second that training the baseline takes now: a rough rate, from a few steps."""
    data, recipe = run.dataset, run.recipe(run.baseline, epochs=16 if run.is_small else 1)
    n = min(len(data.y), round(2 * recipe.batch_size / recipe.subset)) // 2 * 2  # two steps an epoch
    few = replace(data, x=data.x[:n], y=data.y[:n], x_test=data.x_test[:1], y_test=data.y_test[:1], groups=None)
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, few, 2, folder, run.device, quiet=True)
        seconds = [read_json(path)["seconds"] for path in Path(folder).glob("*/done/*.json")]
    at_once = workers.n_processes(run.recipe(run.baseline), data, ensemble.device_of(run.device))
    return at_once * work(recipe, n, 1) / median(seconds)


def describe(run, notebooks=None):
    """The table as text, with what is left in all: gradients, time and disk."""
    frame = table(run, notebooks, exact=True)
    models, unknown = frame.models.sum(), 1e6 * frame.megagradients[frame.seconds.isna()].sum()
    seconds = frame.seconds.sum() + (unknown / trial(run) if unknown else 0)
    times = ["?" if s != s else duration(s) for s in frame.seconds]
    shown = frame.drop(columns=["seconds", "megagradients_in_all"]).assign(time=times)
    how = "the store's finished models" + (" and a trial of some steps just now" if unknown else "")
    return (
        f"{shown.round(1).to_string(index=False)}\n\n"
        f"Left: {models - frame.finished.sum()} of {models} models, {frame.megagradients.sum():.3g} million gradients: "
        f"about {duration(seconds)} on {ensemble.device_of(run.device)}, by {how}; "
        f"{frame.megabytes.sum():.0f} MB on the disk, which has {shutil.disk_usage(run.store).free / 1e6:.0f} MB free. "
        "The time to analyse them is not counted."
    )


def check_disk(run, notebooks=None):
    """Raise ValueError naming `store` if what is left to train does not fit the disk."""
    free, needed = shutil.disk_usage(run.store).free / 1e6, table(run, notebooks).megabytes.sum()
    if needed > free:
        raise ValueError(
            f"store={run.store!r}: the disk has {free:.0f} MB free, the run needs {needed:.0f} MB more: "
            "free some, or ask for fewer models, examples or notebooks"
        )


def work_off(run, notebooks=None):
    """Train what is left and no other process is training; pools that are drawn later are left to the notebooks."""
    for name, (recipe, n_models, data, is_drawn) in to_train(run, notebooks, exact=True):
        if not is_drawn:
            print(f"{name}: {recipe.optimizer} rho {recipe.rho}, {recipe.run_epochs} epochs", flush=True)
            train(recipe, data, n_models, run.store, run.device, notify=run.forecast, wait=False)


def duration(seconds):
    """'40 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""The experiments, declared once for `run.ensembles`, `--plan`, `--work`, the forecast and the check of the disk."""

import os
import shutil
import time
import timeit
from collections import namedtuple
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib import need
from lib.analysis.memorization import plant
from lib.attacks.signals import threads
from lib.training import ensemble, privacy, train, workers
from lib.training.store import place, read_json

SIZES = {"sweep": (128, 8), "few": (64, 8), "fewer": (32, 8)}  # models of an ensemble: on small data, on images
PLANTED = 16  # models of the planted leak: 8 pairs, and it takes 6 for the interval to exclude chance
VARIANTS = ("sam", "asam", "gsam", "looksam", "msam", "fsam", "esam")
WITHOUT_NORM = {"cnn": "cnn_plain", "mlp_bn": "mlp"}  # a network and the same without BatchNorm
COLUMNS = "notebook experiment arch optimizer rho epochs models finished megagradients megagradients_in_all megabytes"
# of each notebook: fixed seconds, and seconds for each million of scores. 07 runs alone, so its 4 s count twice
ANALYSIS = {"01": (4, 14), "02": (7.5, 4), "03": (1.5, 2), "04": (9.5, 4), "05": (4.5, 2.4), "06": (4, 4), "07": (8, 0)}
PACE = 0.0076  # seconds of `pace` on the machine where those were measured
AT_ONCE = min(2, os.cpu_count() or 1)  # notebooks that are analysed side by side
OPEN = AT_ONCE + 1  # on small data so many are open: while the kernel of one starts, others keep the processors busy
START = 1  # seconds of a process that a new ensemble takes beside: its data are read, another rule is compiled
QUIET = 20  # seconds without a forecast after the first models, which say little: notebooks' kernels start beside them
ASKED = 122  # gradients of each example that cost half as much as the label-only attack on one optimizer's models
PER_EXAMPLE = 4  # a gradient for each example, which private rules clip, costs about four times a batch gradient


Planned = namedtuple("Planned", "recipe n_models dataset")  # a Recipe, how many models of it, their Dataset


class Experiment(NamedTuple):
    """Ensembles that are compared with each other."""

    declare: Callable  # run -> dict key -> Planned
    notebooks: tuple  # the numbers of those that use it
    essential: Callable | None = None  # run -> the keys that must stay when models diverge; None: all
    has_own_pool: bool = False  # its notebook draws a pool from results, for declare(run, dataset); no plan lists it
    is_private: bool = False  # nothing is compared if fewer than 8 models of the first ensemble learn


EXPERIMENTS = {}


def experiment(name, *notebooks, **more):
    return lambda declare: EXPERIMENTS.setdefault(name, Experiment(declare, notebooks, **more)).declare


def of(run, optimizer, n_models, dataset=None, **changes):
    """The run's recipe for one optimizer, with changes, as a Planned."""
    return Planned(run.recipe(optimizer, **changes), n_models, dataset or run.dataset)


def n_models(run, kind):
    """Models of an ensemble of one kind (SIZES), or the run's if those are fewer."""
    # also the run's if each model draws its own subset: hardly any of few models would see, or miss, some examples
    return min(run.n_models, SIZES[kind][not run.is_small]) if run.subset == 0.5 else run.n_models


@experiment("main", "01", "02", "03", "04", "05")
def main(run):
    """Every optimizer of the run. Keys: the optimizer."""
    return {name: of(run, name, run.n_models) for name in run.names}


@experiment("radius sweep", "04", "05", essential=lambda run: [0.0])
def radius_sweep(run):
    """The treatment's base without the rule (0.0), then the treatment at radii around the run's. Keys: rho."""
    own, size = run.recipe(run.treatment), n_models(run, "sweep")
    several = (1, 2) if run.tuning == "few" else (0.5, 1, 2)
    factors = () if not own.optimizer.has_radius else several if own.optimizer.rho is None else (1,)
    found = {f * own.rho: of(run, run.treatment, size, rho=f * own.rho) for f in factors}
    return {0.0: of(run, own.optimizer.base_name, size), **found}


def lengths(run):
    """Numbers of epochs from short of the main run to beyond it; on images, where epochs are long, only to its end."""
    return sorted({max(1, round(f * run.epochs)) for f in ((0.125, 0.375, 1, 2) if run.is_small else (0.5, 1))})


def equal_compute(run):
    """dict epochs of the treatment -> epochs of the baseline that take as many gradients, up to the run's length."""
    treatment, baseline = (run.recipe(n).optimizer.gradients_per_step() for n in (run.treatment, run.baseline))
    compared = [epochs for epochs in lengths(run) if epochs <= run.epochs] if run.is_small else [run.epochs]
    return {epochs: max(1, round(treatment / baseline * epochs)) for epochs in compared}


def own_settings(run):
    """The keys of the tuning with the run's own learning rate, weight decay and radius."""
    return [(name, run.recipe(name).rho, run.lr, run.weight_decay) for name in (run.baseline, run.treatment)]


@experiment("tuning", "05", essential=own_settings)
def tuning(run):
    """Both optimizers at other learning rates and weight decays, the treatment at other radii too.

    Keys: (optimizer, rho, lr, weight_decay), rho 0 for the baseline. run.tuning "cross": at most one value differs from
    the run's own ("few": and fewer values); "full": all combinations. The largest rate shows if the best is smaller."""
    own, decays = run.recipe(run.treatment).rho, (run.weight_decay, 4 * run.weight_decay or 5e-4)
    radii, found = [rho for rho in radius_sweep(run) if rho] or [own], {}
    rates = (1, 2, 4) if run.tuning == "few" else (0.5, 1, 2, 4, 8)
    for rho, factor, decay in product([0.0, *radii], rates, decays):
        n_changed = (rho not in (0, own)) + (factor != 1) + (decay != run.weight_decay)
        most = 3 if run.tuning == "full" and factor in (1, 2, 4) else 1
        if n_changed <= most and (factor >= 1 or not rho):
            name, lr = run.treatment if rho else run.baseline, factor * run.lr
            found[name, rho, lr, decay] = of(run, name, n_models(run, "few"), rho=rho, lr=lr, weight_decay=decay)
    return found


@experiment("pools", "05")
def pools(run):
    """The settings `of_pools`, on pools drawn with other seeds. Keys: (seed, optimizer, rho, lr, weight_decay)."""
    size, recipes = n_models(run, "fewer"), {key: tuning(run)[key].recipe for key in of_pools(run)}
    each = product(run.other_pools.items(), recipes.items())
    return {(seed, *key): Planned(replace(recipe, seed=seed), size, data) for (seed, data), (key, recipe) in each}


def of_pools(run):
    """The keys of the tuning that are tried on every pool: its learning rates, at the run's own radius and decay."""
    own = {0.0, run.recipe(run.treatment).rho}
    return [k for k in tuning(run) if k[1] in own and 1 <= k[2] / run.lr <= 4 and k[3] == run.weight_decay]


@experiment("length sweep", "05", essential=lambda run: [(run.epochs, run.baseline), (run.epochs, run.treatment),
                                                         (equal_compute(run)[run.epochs], run.baseline)])  # fmt: skip
def length_sweep(run):
    """Both optimizers at every length, the baseline also at equal compute and half. Keys: (epochs, optimizer)."""
    keys = [(epochs, name) for epochs in lengths(run) for name in (run.baseline, run.treatment)]
    # half as long, the baseline's train loss is higher, as the treatment's is: its runs enclose it
    more = [*equal_compute(run).values(), *(max(1, round(epochs / 2)) for epochs in lengths(run))]
    keys += [(epochs, run.baseline) for epochs in more]
    return {key: of(run, key[1], n_models(run, "sweep"), epochs=key[0]) for key in dict.fromkeys(keys)}


@experiment("planted leak", "01", has_own_pool=True)
def planted_leak(run, dataset):
    """The baseline, trained for a quarter of the epochs, on a pool that holds one example many times. Key: "leak"."""
    return {"leak": of(run, run.baseline, PLANTED, dataset, subset=0.5, epochs=max(1, run.epochs // 4))}


@experiment("planted faults", "02", has_own_pool=True)
def planted_faults(run, dataset):
    """The baseline, trained long, on the pool as it is and with faults. Keys: "before", "after"."""
    size, pools = min(run.n_models, max(32, run.n_models // 8)), {"before": run.dataset, "after": dataset}
    return {k: of(run, run.baseline, size, pool, epochs=lengths(run)[-1], subset=0.5) for k, pool in pools.items()}


def on_base(run, rule):
    """The text of a rule on the run's own base."""
    return rule if run.baseline == "sgd" else f"{rule}+{run.baseline}"


@experiment("variants", "06", essential=lambda run: [(n, run.recipe(n).rho) for n in (run.baseline, run.treatment)])
def variants(run):
    """The baseline at 0.0, every rule at its radius, the treatment at those of its sweep. Keys: (optimizer, rho)."""
    names = [on_base(run, rule) for rule in (*VARIANTS, "sharpreg", "swa")]
    radii = {name: [run.recipe(name).rho] for name in dict.fromkeys([*run.names[1:], *names])}
    radii[run.treatment] = [rho for rho in radius_sweep(run) if rho] or radii[run.treatment]
    keys = [(run.baseline, 0.0), *((name, rho) for name in radii for rho in radii[name])]
    return {(name, rho): of(run, name, n_models(run, "few"), rho=rho) for name, rho in keys}


def levels(run):
    """What is varied to find causes, one thing at a time: dict (factor, level) -> changes of the run's recipe."""
    found, size = {("as it is", "as it is"): {}}, round(len(run.dataset.y) * run.subset)
    least = max(4, *(run.recipe(name).optimizer.least_batch for name in (run.baseline, run.treatment)))
    batches = [b for b in (4 * run.batch_size, round(0.25 * run.batch_size)) if least <= b <= size]
    found |= {("batch size", f"{b}"): {"batch_size": b} for b in batches[:1]}
    found |= {("epochs", f"{e}"): {"epochs": e} for e in lengths(run)[-3:] if e != run.epochs}
    found |= {("learning rate", f"{f * run.lr:g}"): {"lr": f * run.lr} for f in (2, 4)}
    found["label noise", "30%"] = {"dataset": plant(run.dataset, round(0.3 * len(run.dataset.y)), seed=run.seed)[0]}
    decay = 4 * run.weight_decay or 5e-4
    found["weight decay", f"{decay:g}"] = {"weight_decay": decay}
    twin = WITHOUT_NORM.get(run.arch) or {without: arch for arch, without in WITHOUT_NORM.items()}.get(run.arch)
    if twin:
        found["BatchNorm", "without" if run.arch in WITHOUT_NORM else "with"] = {"arch": twin}
    return found


@experiment("causes", "05", essential=lambda run: [("as it is", "as it is", n) for n in (run.baseline, run.treatment)])
def causes(run):
    """Both optimizers at every level of every factor, but images as they are. Keys: (factor, level, optimizer)."""
    found, names = levels(run) if run.is_small else {("as it is", "as it is"): {}}, (run.baseline, run.treatment)
    return {(*key, n): of(run, n, n_models(run, "fewer"), **changes) for key, changes in found.items() for n in names}


@experiment("defences", "06", essential=lambda run: ["none"])
def defences(run):
    """What is trained to leak less. Keys: the defence's name; "none", the baseline, is first."""
    baseline, treatment, smoothed = run.baseline, run.treatment, {"smoothing": 0.1}
    found = {"none": (baseline, {}), treatment: (treatment, {}), "label smoothing 0.1": (baseline, smoothed)}
    found |= {"stopped at a quarter": (baseline, {"stop": 0.25}), "stopped at half": (baseline, {"stop": 0.5})}
    found |= {"weight averaging (swa)": (on_base(run, "swa"), {}), "SharpReg": (on_base(run, "sharpreg"), {})}
    found[f"{treatment}, smoothing 0.1"] = treatment, smoothed
    return {key: of(run, name, n_models(run, "few"), **changes) for key, (name, changes) in found.items()}


def delta_of(run):
    """The delta of the run's privacy claims: the power of ten below half of one over the size of the pool."""
    return 10.0 ** np.floor(np.log10(1 / (2 * run.n_examples)))


def private_arch(run):
    """The run's network or its twin without BatchNorm, which mixes a batch's examples; None if private can't be run."""
    arch = WITHOUT_NORM.get(run.arch, run.arch)
    recipe = replace(run.recipe(run.baseline), arch=arch, optimizer=on_base(run, "dpsgd"))
    with suppress(ValueError):  # it gives no gradient of each example
        ensemble.check(recipe, run.dataset, run.n_models, run.device)
        return arch
    return None


@experiment("private", "06", essential=lambda run: [(run.baseline, np.inf)], is_private=True)
def private(run):
    """The baseline (epsilon inf), DP-SGD and DP-SAM without BatchNorm. Keys: (optimizer, epsilon)."""
    arch, recipe, size = private_arch(run), run.recipe(run.baseline), n_models(run, "fewer")
    if arch is None:
        return {}
    found, n = {(run.baseline, np.inf): of(run, run.baseline, size, arch=arch)}, round(run.n_examples * recipe.subset)
    epochs = max(1, round(run.epochs / 2))  # of private training: at one epsilon, fewer steps need less noise
    for (rule, queries), epsilon in product([("dpsgd", 1), ("dpsam", 2)], (8, 64) if run.is_small else (64,)):
        sigma = privacy.noise_for(epsilon, run.batch_size, n, n // run.batch_size * epochs, delta_of(run), queries)
        found[rule, epsilon] = of(run, on_base(run, f"{rule}(sigma={sigma:.4g})"), size, arch=arch, epochs=epochs)
    return found


def declared(run, name, dataset=None):
    """What an experiment trains: dict key -> Planned. dataset: the pool that a notebook has drawn for it."""
    need(name in EXPERIMENTS, f"experiment={name!r} is unknown: choose one of {', '.join(EXPERIMENTS)}")
    found, what = EXPERIMENTS[name], f"dataset=None: {name!r} needs the pool that its notebook draws"
    need(dataset is not None or not found.has_own_pool, what)
    return found.declare(run, dataset) if found.has_own_pool else found.declare(run)


def work(recipe, n, n_models):
    """Gradients of one example that these models take in all, on a pool of n; a clipped one counts as PER_EXAMPLE."""
    per_epoch = round(n * recipe.subset) // recipe.batch_size * recipe.batch_size
    each = recipe.optimizer.gradients_per_step() * (PER_EXAMPLE if recipe.optimizer.is_private else 1)
    return n_models * recipe.run_epochs * per_epoch * each


def pace():
    """Processor seconds that this machine takes to sort 100 lists of numbers, whatever other threads do meanwhile."""
    values = np.random.default_rng(0).random((100, 1000)).tolist()
    return min(timeit.repeat(lambda: [*map(sorted, values)], timer=time.thread_time, repeat=3, number=1))


class Plan:
    """What some notebooks ("01", ...; default all) of a run train, in their order, and how long all of it takes."""

    def __init__(self, run, notebooks=None):
        self.run, self.notebooks, self.speak_at, found = run, list(notebooks or ANALYSIS), None, {}
        for name, experiment in EXPERIMENTS.items():
            first = next((book for book in self.notebooks if book in experiment.notebooks), None)
            for planned in declared(run, name).values() if first and not experiment.has_own_pool else ():
                key = planned.recipe, planned.dataset.hash
                *about, before = found.get(key, (name, first, planned))
                found[key] = *about, max(before, planned, key=lambda one: one.n_models)
        # (experiment's name, the first of its notebooks, Planned) of each
        self.ensembles = sorted(found.values(), key=lambda one: self.notebooks.index(one[1]))

    def at_once(self):
        """How many processes train: as many as are worth starting for one of the ensembles, and then they train all."""
        where = ensemble.device_of(self.run.device)
        return max([1, *(workers.n_processes(one.recipe, one.dataset, where) for *_, one in self.ensembles)])

    def table(self, rate=np.nan):
        """What is left to train: a frame of COLUMNS and seconds, with a row for each ensemble.

        Seconds follow from the gradients a second of finished models of the kind, else of any kind, else `rate`."""
        rows, at_once = [], self.at_once()
        for name, book, planned in self.ensembles:
            recipe, n_models, data = planned
            folder, one = place(self.run.store, *ensemble.store_key(recipe, data))[0], work(recipe, len(data.y), 1)
            done = [path for k in range(n_models) if (path := folder / "done" / f"{k:05d}.json").exists()]
            left, took = range(len(done), n_models), [read_json(path).get("seconds", np.nan) for path in done]
            row = [book, name, recipe.arch, str(recipe.optimizer), recipe.rho, recipe.run_epochs, n_models, len(done)]
            row += [len(left) * one / 1e6, n_models * one / 1e6, ensemble.stored_bytes(recipe, data, left) / 1e6]
            own = one / np.quantile(took, 0.25) if took else np.nan  # the first wait for the compiler
            rows.append([*row, own, recipe.optimizer.is_private])
        frame = pd.DataFrame(rows, columns=[*COLUMNS.split(), "rate", "is_private"])
        of_kind = frame.groupby(["arch", "is_private"]).rate.transform("max")  # notebooks slow down others for a while
        frame["rate"] = of_kind.fillna(frame.rate.max()).fillna(rate) * at_once
        start = START * (frame.finished == 0) / at_once
        return frame.assign(seconds=1e6 * frame.megagradients / frame.rate + start)

    def seconds_left(self, frame):
        """Seconds until all notebooks are done. They are analysed, two at a time, while models of others train."""
        run, x, asked = self.run, self.run.dataset.x, 0
        if "01" in self.notebooks and not run.is_small:  # it runs beside the training: on average half is left
            asked = ASKED * len(run.names) * min(1000, len(x), 2**20 // x[0, 0].size) / frame.rate.iloc[0]
        return frame.seconds.sum() + asked + pace() / PACE * sum(map(self.analysis, self.notebooks)) / AT_ONCE

    def analysis(self, book):
        """Seconds that a notebook takes where ANALYSIS was measured, once all of its models are trained."""
        fixed, each = ANALYSIS.get(book, (8, 4))  # of a notebook that a reader has added, a guess
        used = [planned for name, _, planned in self.ensembles if book in EXPERIMENTS[name].notebooks]
        return fixed + each * sum(one.n_models * len(one.dataset.y) * one.recipe.queries for one in used) / 1e6

    def say(self, *_):
        """Print a forecast if the last was some time ago. `train` calls it after each chunk of models."""
        self.speak_at = self.speak_at or time.monotonic() + QUIET
        if time.monotonic() < self.speak_at or (frame := self.table()).seconds.isna().any():
            return
        seconds, share = self.seconds_left(frame), 1 - frame.megagradients.sum() / frame.megagradients_in_all.sum()
        print(f"About {duration(seconds)} to go, {share:.0%} of the training is done.", flush=True)
        self.speak_at = time.monotonic() + min(max(20, seconds / 5), 120)

    def train(self, books=None):
        """Train what these notebooks need and no other process trains; None: what all need, none of which is run."""
        self.notebooks, run = self.notebooks if books else [], self.run
        how = dict(device=run.device, engine=run.engine, gpus=run.gpus, quiet=bool(books), notify=self.say, wait=False)
        if (n := self.at_once()) > 1:
            workers.processes(n, os.getpid())
        # two ensembles at a time where other processes train, so that none waits for the last models of an ensemble
        pool = futures.ThreadPoolExecutor(AT_ONCE if n > 1 else 1)
        each = map if run.engine == "ray" else pool.map  # Ray ends the process when the thread that started it ends
        try:
            todo = [planned for _, first, planned in self.ensembles if first in (books or [first])]
            # private rules compile nothing: they are trained while the code of the first ensemble is compiled
            todo[1:] = sorted(todo[1:], key=lambda planned: not planned.recipe.optimizer.is_private)
            list(each(lambda one: train(one.recipe, one.dataset, one.n_models, run.store, **how), todo))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def trial(self):
        """Gradients of one example a second that a process makes for the baseline: of a stack of models, just now."""
        run, data, device = self.run, self.run.dataset, ensemble.device_of(self.run.device)
        recipe = run.recipe(run.baseline)
        # on larger images, an epoch has two steps
        n = len(data.y) if run.is_small else min(len(data.y), round(2 * recipe.batch_size / recipe.subset)) // 2 * 2
        few = replace(data, x=data.x[:n], y=data.y[:n], x_test=data.x_test[:1], y_test=data.y_test[:1], groups=None)
        short = replace(recipe, epochs=min(recipe.epochs, 8))
        inputs, ids = ensemble.Inputs(few, short, device), range(workers.n_together(short, few, device))
        n_models = run.n_models * work(recipe, len(data.y), 1) / work(short, n, 1)  # as much work as the whole ensemble
        with threads(1):  # as the processes that will train
            for _ in range(2):  # the first also compiles, if the whole ensemble would
                began = time.perf_counter()
                ensemble.train_chunk(short, inputs, ids, n_models=n_models)
        return work(short, n, len(ids)) / (time.perf_counter() - began)

    def describe(self):
        """The table as text, with what is left in all: gradients, disk and time, by a trial where nothing is known."""
        frame, how = self.table(), "finished models"
        if frame.seconds.isna().any():
            frame, how = self.table(self.trial()), "a trial of some steps just now"
        total = frame[["models", "finished", "megagradients", "megabytes", "seconds"]].sum()
        free = f"{shutil.disk_usage(self.run.store).free / 1e6:.0f} MB free"
        shown = frame[COLUMNS.split()].drop(columns="megagradients_in_all").assign(time=frame.seconds.map(duration))
        said = f"Left: {total.models - total.finished:.0f} of {total.models:.0f} models, {total.megagradients:.3g} "
        said += f"million gradients, {total.megabytes:.0f} MB on the disk, which has {free}. Time, by {how}: "
        said += f"{duration(total.seconds)} to train, {duration(self.seconds_left(frame))} with the analysis."
        return f"{shown.round(1).to_string(index=False)}\n\n{said}"


def duration(seconds):
    """'40 s', '12 min', '3.5 h'."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.2g} min" if minutes < 90 else f"{minutes / 60:.1f} h"

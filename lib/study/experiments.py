"""What a run will train, in units of work, so that its time can be told from the first models' time."""

import json
import shutil
from dataclasses import replace
from statistics import median

import numpy as np
import pandas as pd

from lib.analysis import compare, interventions
from lib.training import ensemble, workers
from lib.training.store import place

COLUMNS = "notebook arch optimizer rho epochs models finished megagradients megabytes".split()
APART = 3  # times as long as their mean take the gradients of single examples, which private rules clip


def gradients(recipe):
    """Passes forward and back that a step makes, as the rule's paper counts them: 1 for SGD, 2 for SAM.

    A forward pass alone is a third. A reader's own rule is tried.
    """
    return recipe.optimizer.gradients_per_step()


def work(recipe, n, n_models):
    """Gradients of one example that these models take, in all; one that is clipped counts as APART."""
    size, each = round(n * recipe.subset), gradients(recipe) * (APART if recipe.optimizer.is_private else 1)
    return n_models * recipe.run_epochs * (size // recipe.batch_size * recipe.batch_size) * each


def wanted(run, exact=False):
    """What the notebooks train: notebook -> list of (Recipe, Dataset, n_models); what two of them share comes twice.

    For Dataset, "leak" or "planted": a pool of about the run's size that the notebook draws from what it has found by
    then (memorization.leak, memorization.plant; the names of their data sets end so).
    exact: with the private optimizers' own noise, which takes seconds to find; it does not change the work.
    """
    base, treatment, data = run.names[0], run.treatment, run.dataset

    def of(name, n_models, dataset=data, **changes):
        return run.recipe(name, **changes), dataset, n_models

    main = [of(name, run.n_models) for name in run.names]
    doses = [of(run.recipe(treatment).optimizer.base_name, run.sweep)] + [
        of(treatment, run.sweep, rho=r) for r in run.radius_sweep(treatment)
    ]
    lengths = [(e, name) for e in run.length_sweep() for name in (base, treatment)] + [(e, base) for e in run.between()]
    planted = min(run.n_models, max(32, run.n_models // 4))
    longest = of(base, planted, epochs=run.length_sweep()[-1], subset=0.5)
    leak = run.recipe(base, subset=0.5), "leak", compare.PLANTED
    return {
        "01": [*main, *doses, *(of(name, run.sweep, epochs=e) for e, name in lengths), leak],
        "02": [*main, longest, (longest[0], "planted", planted)],
        "03": main,
        "04": [*main, *doses],
        "06": [*main, *(of(name, run.few, epochs=e) for e, name in lengths), *beyond_models(run, of, exact)],
    }


def equal_compute(run):
    """dict epochs of run.treatment -> epochs of the baseline that take as many gradients: half the run's, and the run's."""
    ratio = gradients(run.recipe(run.treatment)) / gradients(run.recipe(run.names[0]))
    return {e: max(1, round(ratio * e)) for e in (max(1, run.epochs // 2), run.epochs)}


def beyond_models(run, of, exact):
    """What notebook 06 trains beside the lengths of the first."""
    base, treatment = run.names[0], run.treatment
    made = [of(name, run.few, rho=rho) for name, rho in interventions.variant_radii(run, run.strengths)]
    for e, twice in equal_compute(run).items():
        made += [of(treatment, run.few, epochs=e), of(base, run.few, epochs=twice)]
    for changes, data in interventions.chosen_levels(run, run.most_levels).values():
        made += [of(name, run.few, data, **changes) for name in (base, treatment)]
    made += [of(changes.pop("optimizer", base), run.few, **changes) for changes in interventions.defences(run).values()]
    arch = interventions.private_arch(run)
    if arch is None:
        return made
    noise = dict.fromkeys([(rule, e) for rule in ("dpsgd", "dpsam") for e in run.epsilons], 1.0)
    noise = interventions.noise_levels(run, run.epsilons, interventions.delta_of(run)) if exact else noise
    rules = [f"{rule}(sigma={sigma:.4g})" for (rule, _), sigma in noise.items()]
    return made + [of(name, run.private, arch=arch) for name in [base, *map(interventions.on(base), rules)]]


def ensembles(run, notebooks=None, exact=False):
    """What a run's notebooks ("01", ...; default all) train, each model once.

    A list of (notebook, Recipe, Dataset, low, high) for the models low..high-1; Dataset as in `wanted`.
    """
    seen, found = {}, []
    for notebook, wanted_here in wanted(run, exact).items():
        for recipe, dataset, n_models in wanted_here if notebooks is None or notebook in notebooks else ():
            key = (recipe, getattr(dataset, "hash", dataset))
            low, seen[key] = seen.get(key, 0), max(seen.get(key, 0), n_models)
            if low < n_models:
                found.append((notebook, recipe, dataset, low, n_models))
    return found


def left(run, notebooks=None):
    """(work still to do, work in all) of a run's notebooks ("01", ...; default all); what the store has is done."""
    total, to_do = 0.0, 0.0
    for _, recipe, dataset, low, high in ensembles(run, notebooks):
        done = len(flags(run, recipe, dataset, low, high))
        total += work(recipe, len(run.dataset.y), high - low)
        to_do += work(recipe, len(run.dataset.y), high - low - done)
    return to_do, total


def flags(run, recipe, dataset, low, high):
    """Paths of the flags of the finished ones of models low..high-1; nothing is made in the store.

    Of a pool that is drawn later: in that of this recipe's stores on such pools that has most of them.
    """
    drawn = isinstance(dataset, str)
    data = replace(run.dataset, name=f"{run.dataset.name}-{dataset}") if drawn else dataset
    name, key = ensemble.store_key(recipe, data)
    folder, text = place(run.store, name, key)
    folders = [f for f in folder.parent.glob(f"{name}-*") if is_of(f, text)] if drawn else [folder]
    found = [[f / "done" / f"{k:05d}.json" for k in range(low, high)] for f in folders]
    return max(([path for path in paths if path.exists()] for paths in found), key=len, default=[])


def is_of(folder, text):
    """True if a store's folder holds the recipe of another's recipe.json, on whatever data."""
    path = folder / "recipe.json"
    said, wanted_one = (json.loads(t) for t in (path.read_text() if path.exists() else "{}", text))
    return {**said, "data": ""} == {**wanted_one, "data": ""}


def table(run, notebooks=None, exact=False):
    """What is left to train: a frame with a row for each ensemble, and what is known of its cost.

    Columns notebook, arch, optimizer, rho, epochs, models, finished, megagradients (left, of one example), megabytes
    (left, on the disk) and seconds (left, by this run alone; NaN where no model of this network is finished yet).
    """
    rows, rates, device = [], {}, ensemble.device_of(run.device)
    for notebook, recipe, dataset, low, high in ensembles(run, notebooks, exact):
        done, data = flags(run, recipe, dataset, low, high), run.dataset if isinstance(dataset, str) else dataset
        told = [json.loads(path.read_text()).get("seconds") for path in done]
        one, missing = work(recipe, len(data.y), 1), high - low - len(done)
        rates.setdefault(recipe.arch, []).extend(one / seconds for seconds in told if seconds)
        about = dict(notebook=notebook, arch=recipe.arch, optimizer=recipe.optimizer, rho=recipe.rho)
        about |= dict(epochs=recipe.run_epochs, models=high - low, finished=len(done))
        size = ensemble.stored_bytes(recipe, data, range(low + len(done), high))
        cost = dict(megagradients=missing * one / 1e6, megabytes=size / 1e6)
        about |= dict(at_once=workers.n_processes(recipe, data, device))
        rows.append(about | cost)
    rate = {arch: median(found) if found else np.nan for arch, found in rates.items()}
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "at_once"])  # no rows: the verdict's notebook trains nothing
    seconds = 1e6 * frame.megagradients / frame.arch.map(rate) / frame.at_once
    return frame.assign(seconds=seconds).drop(columns="at_once")


def trial(run, steps=8):
    """Gradients a second of the baseline now, uncompiled, from a few steps; of all the processes that will train."""
    return np.nan


def describe(run, notebooks=None):
    """The table as text, with what is left in all: gradients, time, disk and memory."""
    frame, device = table(run, notebooks, exact=True), ensemble.device_of(run.device)
    unknown = 1e6 * frame.megagradients[frame.seconds.isna()].sum()
    seconds = frame.seconds.sum() + (unknown / trial(run) if unknown else 0)
    source = "the store's finished models" + (" and a trial of some steps just now" if unknown else "")
    shown = frame.assign(time=["?" if s != s else duration(s) for s in frame.seconds]).drop(columns="seconds")
    return (
        f"{shown.round(1).to_string(index=False)}\n\n"
        f"Left: {frame.models.sum() - frame.finished.sum()} of {frame.models.sum()} models, "
        f"{frame.megagradients.sum():.3g} million gradients: about {duration(seconds)} on {device}, by "
        f"{source}; {frame.megabytes.sum():.0f} MB on the disk, which has {free(run) / 1e6:.0f} MB free; "
        f"What analysing them takes is not counted."
    )


def free(run):
    """Bytes free where the store lies."""
    return shutil.disk_usage(run.store).free


def check_disk(run, notebooks=None):
    """Raise ValueError naming `store` if what is left to train does not fit the disk."""
    needed = 1e6 * table(run, notebooks).megabytes.sum()
    if needed > free(run):
        raise ValueError(
            f"store={run.store!r}: the disk has {free(run) / 1e6:.0f} MB free, what is left of the run needs "
            f"{needed / 1e6:.0f} MB: free some, or ask for fewer models, examples or notebooks"
        )


def work_off(run, notebooks=None):
    """Train what is left of a run and no other process is training; what others have begun is not waited for.

    The pools that notebooks draw from what they have found (planted faults) are left to the notebooks.
    """
    for notebook, recipe, dataset, _, high in ensembles(run, notebooks, exact=True):
        if not isinstance(dataset, str):
            print(f"{notebook}: {recipe.optimizer} rho {recipe.rho}, {recipe.run_epochs} epochs", flush=True)
            run.train_free(recipe, dataset, high)


def duration(seconds):
    """'40 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Forecast:
    """Tells once, after the second chunk of models, how long the rest of a run's training will take.

    The first chunk may also have compiled its step, which later ones are spared.
    """

    def __init__(self, run):
        self.run, self.chunks = run, 0

    def __call__(self, recipe, n_examples, n_models, seconds):
        self.chunks += 1
        if self.chunks != 2:
            return
        to_do, total = left(self.run)
        words = duration(to_do / work(recipe, n_examples, n_models) * seconds)
        done = 1 - to_do / total
        print(f"Training for all the notebooks of this run: about {words} to go, {done:.0%} is done.", flush=True)

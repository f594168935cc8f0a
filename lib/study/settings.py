"""Run the study: `python -m lib.study --dataset digits --preset default`, or the same names as make variables.

The notebooks, the command line and make share one vocabulary of parameters (PARAMETERS). A preset fills what is
not given; what is given wins; what is unknown raises, before anything is trained.
"""

import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lib.data.dataset import DATASETS, Dataset, load, pool
from lib.training import ensemble, networks, optimizers, sharpness, workers
from lib.training.recipe import Recipe, membership

ROOT = Path(__file__).resolve().parents[2]

PARAMETERS = {
    "preset": (str, "tiny (tests), default, small (images on two cores), fast, paper (both for a GPU)"),
    "dataset": (str, f"one of {', '.join(DATASETS)}"),
    "data": (str, "path of the data, where the data set needs one"),
    "arch": (str, f"network: {', '.join(networks.MODELS)}, or package.module:name"),
    "optimizers": (str, "comma-separated, the first is the baseline: sgd,sam,looksam(k=5)"),
    "rho": (float, "radius of SAM's neighbourhood"),
    "n_models": (int, "models per optimizer, an even number (a sweep over radii or epochs takes at most 128)"),
    "n_examples": (int, "size of the pool, an even number"),
    "subset": (float, "share of the pool that each model trains on"),
    "epochs": (int, "epochs of the main comparison"),
    "batch_size": (int, "examples per step"),
    "lr": (float, "peak learning rate"),
    "weight_decay": (float, "weight decay"),
    "augment": (bool, "random flips and shifts in training, and as queries of the attacks"),
    "ema": (float, "decay of the moving average of the weights that is kept instead of the last ones; 0: none"),
    "seed": (int, "seed of everything"),
    "device": (str, "auto, cpu, cuda, mps"),
    "engine": (str, "local, or ray: tasks on this machine's Ray, or on the cluster at RAY_ADDRESS"),
    "gpus": (float, "GPUs that a Ray task asks for, such as 0.25 (default 1 where there is one)"),
    "store": (str, "folder of the trained ensembles"),
    "out": (str, "folder of this run's results"),
}

# What a preset gives, for tables and small pictures (an MLP) and for images (a convolutional network).
# n_examples is an upper bound here: a smaller data set is used whole.
COMMON = {"optimizers": "sgd,sam", "subset": 0.5, "weight_decay": 5e-4, "lr": 0.1, "seed": 0, "device": "auto"}
COMMON |= {"ema": 0.0, "engine": "local"}
TABLE = {**COMMON, "arch": "mlp", "rho": 0.3, "n_examples": 2000, "batch_size": 64, "augment": False}
IMAGE = {**COMMON, "arch": "cnn", "rho": 0.1, "n_examples": 2000, "batch_size": 64, "augment": False}
PRESETS = {
    "tiny": {
        "table": {**TABLE, "n_models": 16, "n_examples": 300, "epochs": 8, "batch_size": 32},
        "image": {**IMAGE, "n_models": 8, "n_examples": 200, "epochs": 2, "batch_size": 32},
    },
    "default": {"table": {**TABLE, "n_models": 512, "epochs": 40}, "image": {**IMAGE, "n_models": 16, "epochs": 20}},
    "small": {"table": {**TABLE, "n_models": 64, "epochs": 40}, "image": {**IMAGE, "n_models": 16, "epochs": 20}},
    "fast": {
        "table": {**TABLE, "n_models": 512, "epochs": 40},
        "image": {**IMAGE, "arch": "resnet9", "n_models": 64, "n_examples": 50000, "epochs": 16, "batch_size": 256},
    },
    "paper": {
        "table": {**TABLE, "n_models": 512, "n_examples": 50000, "epochs": 100},
        "image": {
            **IMAGE,
            "arch": "resnet18",
            "n_models": 256,
            "n_examples": 50000,
            "epochs": 100,
            "batch_size": 256,
            "augment": True,
        },
    },
}


def typed(name, value):
    """value as the parameter's type; a string is read as one. Raises ValueError naming the parameter."""
    kind, meaning = PARAMETERS[name]
    try:
        if kind is str:
            if not isinstance(value, str | Path):
                raise ValueError
            return str(value)
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        number = kind(value)
        if isinstance(value, bool) or not np.isfinite(number) or number != float(value):
            raise ValueError
        return number
    except (ValueError, TypeError, KeyError, OverflowError):
        raise ValueError(f"{name}={value!r} is not valid: {kind.__name__} expected ({meaning})") from None


def clean(given):
    """The given parameters, typed, without those left at None. Raises ValueError naming an unknown or ill-typed one."""
    unknown = [name for name in given if name not in PARAMETERS]
    if unknown:
        raise ValueError(f"unknown parameter {unknown[0]!r}: the parameters are {', '.join(PARAMETERS)}")
    given = {name: typed(name, value) for name, value in given.items() if value is not None}
    preset = given.setdefault("preset", "default")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    given.setdefault("dataset", "digits")
    given.setdefault("store", str(ROOT / "store"))
    given.setdefault("out", str(ROOT / "outputs" / given["dataset"]))
    return given


def precision_of(arch, device):
    """bfloat16 where it is fast (convolutions, on a GPU or a CPU with bfloat16 instructions), else float32."""
    if arch.startswith("mlp") or device.type == "mps":
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


@dataclass(frozen=True)
class Settings:
    """A checked run: every parameter filled in, the data loaded, nothing trained yet."""

    values: dict
    dataset: Dataset
    began: float = field(default_factory=time.monotonic, compare=False)

    def __getattr__(self, name):
        if name in PARAMETERS:
            return self.values[name]
        raise AttributeError(name)

    @cached_property
    def forecast(self):
        """Called with the time of each chunk of models, it tells once how long the run's training will take."""
        from lib.study.experiments import Forecast

        return Forecast(self)

    @property
    def names(self):
        """The optimizers, baseline first."""
        return optimizers.split(self.optimizers)

    @property
    def treatment(self):
        """The last sharpness-aware optimizer, the one that figures and sentences compare with the baseline."""
        named = {name: self.recipe(name) for name in self.names}
        aware = [
            name for name, recipe in named.items() if recipe.optimizer.has_radius and not recipe.optimizer.is_private
        ]
        return (aware or self.names)[-1]

    def recipe(self, optimizer, **changes):
        """The run's Recipe for one optimizer, with some fields changed."""
        shared = ("arch", "rho", "lr", "weight_decay", "epochs", "batch_size", "subset", "augment", "ema", "seed")
        fields = {name: self.values[name] for name in shared}
        precision = precision_of(self.arch, ensemble.device_of(self.device))
        queries = 10 if self.augment else 1
        rule = optimizers.Optimizer.parse(optimizer).rule_name
        fields["rho"] *= sharpness.RADIUS.get(rule, 1.0)
        fields["ema"] *= rule != "swa"  # which is an average already
        return Recipe(optimizer=optimizer, **{**fields, "precision": precision, "queries": queries, **changes})

    @property
    def sweep(self):
        """Models for each ensemble of a sweep (over radii, or epochs): no more than its intervals need."""
        return self.at_most(128 if self.is_small else 64)

    def at_most(self, n):
        """n models, or n_models if those are fewer, or if each draws its own subset: then few would leave examples that
        hardly any of them saw, or missed."""
        return min(self.n_models, n) if self.subset == 0.5 else self.n_models

    @property
    def few(self):
        """Models for each of the many ensembles of the last notebook."""
        return self.at_most(64 if self.is_small else 16)

    @property
    def is_small(self):
        """True for tables and small pictures, whose networks train quickly: the last notebook tries more of them."""
        return not (self.dataset.is_image and min(self.dataset.x.shape[-2:]) >= 16)

    @property
    def strengths(self):
        """Radii of every variant, as shares of its own."""
        return (0.5, 1, 2) if self.is_small and self.preset != "tiny" else (1,)

    @property
    def most_levels(self):
        """How many levels of each cause are tried; None: all."""
        return None if self.is_small and self.preset != "tiny" else 1

    @property
    def private(self):
        """Models for each private ensemble: the gradient of every example is dear."""
        return self.at_most(32 if self.is_small else 8)

    @property
    def epsilons(self):
        """Privacy budgets of the private optimizers."""
        return (8, 64) if self.is_small else (64,)

    def train(self, optimizer, n_models=None, dataset=None, **changes):
        """The ensemble of one optimizer, from the store or trained now, on the run's data or another data set."""
        recipe = self.recipe(optimizer, **changes)
        where = self.store, self.device, self.engine, self.gpus
        return workers.train(recipe, dataset or self.dataset, n_models or self.n_models, *where, notify=self.forecast)

    def train_free(self, recipe, dataset, n_models):
        """Train those models that the store lacks and no other process is training; nothing is waited for."""
        workers.train(recipe, dataset, n_models, self.store, self.device, notify=self.forecast, wait=False)

    def describe(self):
        """The run in one sentence."""
        size, held = round(self.subset * self.n_examples), len(self.dataset.y_test)
        return (
            f"**{self.dataset.name}**, {self.arch}: {self.n_models} models for each of {', '.join(self.names)}, "
            f"each on {size} of {self.n_examples} examples of {self.dataset.n_classes} classes, "
            f"tested on {held}; {self.epochs} epochs, batches of {self.batch_size}, rho = {self.rho}, seed {self.seed}."
        )

    def length_sweep(self, factors=None):
        """Numbers of epochs from far short of the main run to far beyond it."""
        factors = factors or ((0.125, 0.375, 1, 2.5) if self.is_small else (0.375, 1, 2))
        return sorted({max(1, round(factor * self.epochs)) for factor in factors})

    def between(self):
        """More numbers of epochs, between the regimes: the baseline's, to interpolate its leakage by train loss."""
        factors = (0.25, 0.5, 0.75, 1.5) if self.is_small else (0.7, 1.4)
        return [e for e in self.length_sweep(factors) if e not in self.length_sweep()]

    def radius_sweep(self, optimizer):
        """Radii below, at and above the run's rho; none for an optimizer without a radius, one if its name has one."""
        recipe, factors = self.recipe(optimizer), (0.25, 0.5, 1, 2) if self.is_small else (0.5, 1, 2)
        factors = factors if recipe.optimizer.rho is None else (1,)
        return [factor * recipe.rho for factor in factors if recipe.optimizer.has_radius]


def settings(given):
    """Check the given parameters (a dict), load the data, fill the rest from the preset: a Settings.

    Raises ValueError or FileNotFoundError that names the parameter, before anything is trained.
    """
    given = clean(given)
    for name in ("out", "store"):
        writable(name, given[name])
    whole = load(given["dataset"], given.get("data"), Path(given["store"]) / "cache")
    kind = "table" if Settings({}, whole).is_small else "image"
    preset = PRESETS[given["preset"]][kind]
    values = {"data": None, **preset, **given}
    bound = None if "n_examples" not in given and len(whole.y) <= values["n_examples"] else values["n_examples"]
    # the models are asked about as many test points as each is trained on, or all there are
    n_test = min(len(whole.y_test), max(1, (bound or len(whole.y)) // 2))
    chosen = pool(whole, bound, values["seed"], n_test)
    values["n_examples"] = len(chosen.y)
    values.setdefault("gpus", float(ensemble.device_of(values["device"]).type == "cuda"))
    if "batch_size" not in given:  # like n_examples, the preset's is an upper bound
        values["batch_size"] = max(1, min(values["batch_size"], int(len(chosen.y) * values["subset"]) // 2))
    run = Settings(values, chosen)
    check(run)
    return run


def check(run):
    """Raise ValueError naming the parameter if any ensemble of the run could not be trained or written."""
    if len(set(run.names)) != len(run.names) or "" in run.names or len(run.names) < 2:
        raise ValueError(f"optimizers={run.optimizers!r} is not valid: two or more names, separated by commas")
    ensemble.device_of(run.device)  # raises if it is not there
    workers.check(run.engine, run.gpus)
    parsed = [optimizers.Optimizer.parse(name) for name in run.names]
    if parsed[0].rule_name != "plain":
        bases = ", ".join(optimizers.BASES)
        raise ValueError(f"optimizers={run.optimizers!r}: the first is the baseline, one of {bases}, or your own")
    if any("rho" in named.wants for named in parsed) and run.rho <= 0:
        raise ValueError(f"rho={run.rho} is not valid: positive (at 0, SAM is the baseline itself)")
    for name in run.names:
        ensemble.check(run.recipe(name), run.dataset, run.n_models)
    if run.n_models < 8:
        raise ValueError(f"n_models={run.n_models} is too few: an interval needs 8 models (4 pairs) or more")
    member = membership(run.recipe(run.names[0]), len(run.dataset.y), range(run.n_models), run.dataset.groups)
    taught = member @ np.eye(run.dataset.n_classes, dtype=int)[run.dataset.y]  # [M, C] examples of each class
    if not taught.all():
        k, c = np.argwhere(taught == 0)[0]
        raise ValueError(
            f"n_examples={len(run.dataset.y)}: model {k} would train on none of class {run.dataset.classes[c]!r}: "
            f"{np.bincount(run.dataset.y)[c]} are in the pool; take more examples, or leave the class out"
        )
    inside, half = member.sum(0), np.arange(run.n_models) // 2 % 2 == 0
    # 3: attacks leave one out; 2 in either half of the models: buckets are formed on one, judged on the other
    least = min(min(h.sum(0).min(), (~h).sum(0).min()) for h in (member[half], member[~half]))
    if min(inside.min(), (run.n_models - inside).min()) < 3 or least < 2:
        raise ValueError(
            f"subset={run.subset}: of n_models={run.n_models}, some example is in {inside.min()} and some is out of "
            f"{(run.n_models - inside).min()}; both need 3, and 2 in either half of the models: train more models, or "
            "choose a subset nearer to 0.5"
        )


def writable(name, folder):
    """Make the folder, and see that a file can be written there. Raises ValueError naming the parameter."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{name}={folder!r} can't be written ({error}): give a writable folder") from error


def notebook_settings(namespace, before):
    """Settings from a notebook's variables: the parameters, and all that appeared since `before`, so that a
    misspelt parameter is seen as one."""
    wanted = {n: v for n, v in namespace.items() if n in PARAMETERS or (n not in before and not n.startswith("_"))}
    return settings(wanted)

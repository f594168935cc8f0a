"""What a run is: one model of its parameters for notebooks, command line and make, and the checked Run made of them.

A preset fills in what is not given; what is given wins; anything unknown or invalid raises a ValueError that names the
parameter, before anything is trained.
"""

import argparse
import ast
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lib.analysis import compare
from lib.data.dataset import DATASETS, Dataset, load, pool
from lib.study import experiments
from lib.training import Recipe, ensemble, networks, sharpness, train, workers
from lib.training.optimizers import BASES, Optimizer, split
from lib.training.recipe import membership

ROOT = Path(__file__).resolve().parents[2]

# What a preset gives, for tables and small pictures (an MLP) and for images (a convolutional network).
# Its n_examples and batch_size are upper bounds: a smaller data set is used whole.
COMMON = dict(optimizers="sgd,sam", subset=0.5, weight_decay=5e-4, lr=0.1, seed=0, device="auto", engine="local")
COMMON |= dict(ema=0.0, augment=False, n_examples=2000, batch_size=64)
TABLE, IMAGE = {**COMMON, "arch": "mlp", "rho": 0.3}, {**COMMON, "arch": "cnn", "rho": 0.1}
LARGE = {**IMAGE, "n_examples": 50_000, "batch_size": 256}
PRESETS = {
    "tiny": {
        "table": {**TABLE, "n_models": 16, "n_examples": 300, "epochs": 8, "batch_size": 32},
        "image": {**IMAGE, "n_models": 8, "n_examples": 200, "epochs": 2, "batch_size": 32},
    },
    "default": {"table": {**TABLE, "n_models": 512, "epochs": 40}, "image": {**IMAGE, "n_models": 16, "epochs": 20}},
    "small": {"table": {**TABLE, "n_models": 64, "epochs": 40}, "image": {**IMAGE, "n_models": 16, "epochs": 20}},
    "fast": {
        "table": {**TABLE, "n_models": 512, "epochs": 40},
        "image": {**LARGE, "arch": "resnet9", "n_models": 64, "epochs": 16},
    },
    "paper": {
        "table": {**TABLE, "n_models": 512, "n_examples": 50_000, "epochs": 100},
        "image": {**LARGE, "arch": "resnet18", "n_models": 256, "epochs": 100, "augment": True},
    },
}


def parameter(about, default=None, **limits):
    """A field of Parameters with its help text. None: not given, so the preset decides (or, for gpus, the device)."""
    return Field(**{"default": default, "description": about, **limits})


class Parameters(BaseModel):
    """The parameters of a run, with their types, limits and help texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    preset: Literal[tuple(PRESETS)] = parameter("tiny, default, small (two cores), fast, paper (a GPU)", "default")
    dataset: Literal[tuple(DATASETS)] = parameter(f"one of {', '.join(DATASETS)}", "digits")
    data: str | None = parameter("path of the data, where the data set needs one")
    arch: str | None = parameter(f"network: {', '.join(networks.MODELS)}, or package.module:name")
    optimizers: str | None = parameter("comma-separated, the first is the baseline: sgd,sam,looksam(k=5)")
    rho: float | None = parameter("radius of SAM's neighbourhood", ge=0)
    n_models: int | None = parameter("models per optimizer, an even number", ge=8, multiple_of=2)
    n_examples: int | None = parameter("size of the pool, an even number", ge=2)
    subset: float | None = parameter("share of the pool that each model trains on", gt=0, lt=1)
    epochs: int | None = parameter("epochs of the main comparison", ge=1)
    batch_size: int | None = parameter("examples per step", ge=1)
    lr: float | None = parameter("peak learning rate", gt=0)
    weight_decay: float | None = parameter("weight decay", ge=0)
    augment: bool | None = parameter("random flips and shifts in training, and as queries of the attacks")
    ema: float | None = parameter("decay of the moving average of the weights; 0: the last weights", ge=0, lt=1)
    seed: int | None = parameter("seed of everything", ge=0)
    device: str | None = parameter("auto, cpu, cuda, mps")
    engine: Literal[workers.ENGINES] | None = parameter(
        "local, or ray: a cluster at RAY_ADDRESS, or this machine's own"
    )
    gpus: float | None = parameter("GPUs that a Ray task asks for, such as 0.25 (default 1 where there is one)", ge=0)
    store: str = parameter("folder of the trained ensembles (default: store)", str(ROOT / "store"))
    out: str | None = parameter("folder of this run's results (default: outputs/<dataset>)", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def as_given(cls, value, info):
        """A path becomes its text; True and False are no numbers; `out` follows the data set."""
        if isinstance(value, bool) and info.field_name != "augment":
            raise ValueError("true and false are valid for augment only")
        if info.field_name == "out" and value is None and "dataset" in info.data:
            return str(ROOT / "outputs" / info.data["dataset"])
        return str(value) if isinstance(value, Path) else value


def checked(given):
    """The given parameters, a dict, as Parameters; None counts as not given.

    Raises one ValueError that names the first bad parameter, its value and what is valid.
    """
    try:
        return Parameters.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        if first["type"] == "extra_forbidden":
            known = ", ".join(Parameters.model_fields)
            raise ValueError(f"unknown parameter {name!r}: the parameters are {known}") from None
        about = Parameters.model_fields[name].description
        raise ValueError(f"{name}={first['input']!r} is not valid: {first['msg']} ({name}: {about})") from None


def parse(arguments):
    """(words, parameters, what to do: "run", "plan" or "work") of a command line. words: which notebooks.

    A parameter is written --name value, or NAME=value as make has it; it is not checked here.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lib.study",
        description="Run the notebooks headlessly, in order, into one folder of results.",
        allow_abbrev=False,
        epilog="A parameter may also be written as make writes it: DATASET=cifar10.",
    )
    for name, about in Parameters.model_fields.items():
        flags = dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
        parser.add_argument(*flags, dest=name, help=about.description)
    parser.set_defaults(doing="run")
    doing = parser.add_mutually_exclusive_group()
    for name, about in (("plan", "say what is left to train and what it costs"),
                        ("work", "train what is left, beside other processes; no notebooks")):  # fmt: skip
        doing.add_argument(f"--{name}", dest="doing", action="store_const", const=name, help=about)
    parser.add_argument("words", nargs="*", metavar="notebook", help="which notebooks, such as 01 (default: all)")
    found = vars(parser.parse_intermixed_args(arguments))
    words, doing = found.pop("words"), found.pop("doing")
    found |= {w.split("=", 1)[0].lower(): w.split("=", 1)[1] for w in words if "=" in w}
    return [w for w in words if "=" not in w], {n: v for n, v in found.items() if v is not None}, doing


def precision_of(arch, device):
    """bfloat16 where it is fast (convolutions, on a GPU or a CPU with bfloat16 instructions), else float32."""
    if arch.startswith("mlp") or device.type == "mps":
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


@dataclass(frozen=True)
class Run:
    """A checked run: every parameter filled in, the data loaded, nothing trained yet.

    A parameter is also an attribute of the run (run.epochs), but for `dataset`, which is the loaded Dataset.
    """

    parameters: Parameters
    dataset: Dataset
    began: float = field(default_factory=time.monotonic, compare=False)

    def __getattr__(self, name):
        if name in Parameters.model_fields:
            return getattr(self.parameters, name)
        raise AttributeError(f"a run has no {name!r}")

    @property
    def names(self):
        """The optimizers' texts, the baseline first."""
        return split(self.optimizers)

    @property
    def baseline(self):
        """The optimizer that all others are compared with."""
        return self.names[0]

    @cached_property
    def treatment(self):
        """The last sharpness-aware optimizer, which figures and sentences compare with the baseline."""
        parsed = {name: Optimizer.parse(name) for name in self.names}
        aware = [name for name, optimizer in parsed.items() if optimizer.has_radius and not optimizer.is_private]
        return (aware or self.names)[-1]

    @property
    def is_small(self):
        """True for tables and small pictures, whose networks train quickly: experiments use more models and levels."""
        return not (self.dataset.is_image and min(self.dataset.x.shape[-2:]) >= 16)

    def recipe(self, optimizer, **changes):
        """The run's Recipe for one optimizer (or its text), with some fields changed."""
        shared = ("arch", "rho", "lr", "weight_decay", "epochs", "batch_size", "subset", "augment", "ema", "seed")
        fields = {name: getattr(self.parameters, name) for name in shared}
        rule = Optimizer.parse(optimizer).rule_name
        fields["rho"] *= sharpness.RADIUS.get(rule, 1.0)
        fields["ema"] *= rule != "swa"  # which is an average already
        fields["precision"] = precision_of(self.arch, ensemble.device_of(self.device))
        return Recipe(optimizer=optimizer, **{**fields, "queries": 10 if self.augment else 1, **changes})

    @cached_property
    def forecast(self):
        """Told of each trained chunk of models, it says once how long the run's training will take."""
        return experiments.Forecast(self)

    def ensembles(self, name, dataset=None):
        """The ensembles of one experiment, trained or read, on the models that all of them have: dict key -> Ensemble.

        name: of experiments.EXPERIMENTS, which says what the keys are. dataset: the pool, where the experiment wants
        one that is drawn from earlier results. Empty where the experiment does not apply to this run.
        """
        where = self.store, self.device, self.engine, self.gpus
        found, planned = {}, experiments.plan(self, name, dataset)
        experiment = experiments.EXPERIMENTS[name]
        if any(one.is_drawn for one in planned.values()):
            raise ValueError(f"dataset=None: {name!r} needs the pool that its notebook draws from results")
        for key, (recipe, n_models, data, _) in planned.items():
            found[key] = train(recipe, data, n_models, *where, notify=self.forecast)
            if experiment.optional and len(found) == 1 and len(found[key].ids) < 8:
                return {}
        essential = experiment.essential and experiment.essential(self)
        return compare.keep_common_models(found, essential) if found else {}

    def describe(self):
        """The run in one sentence."""
        size, held = round(self.subset * self.n_examples), len(self.dataset.y_test)
        return (
            f"**{self.dataset.name}**, {self.arch}: {self.n_models} models for each of {', '.join(self.names)}, "
            f"each on {size} of {self.n_examples} examples of {self.dataset.n_classes} classes, "
            f"tested on {held}; {self.epochs} epochs, batches of {self.batch_size}, rho = {self.rho}, seed {self.seed}."
        )


def open_run(given):
    """Check the given parameters (a dict), load the data, fill in the rest from the preset: a Run.

    Raises ValueError or FileNotFoundError that names the parameter, before anything is trained.
    """
    asked = checked(given)
    writable("out", asked.out)
    writable("store", asked.store)
    whole = load(asked.dataset, asked.data, Path(asked.store) / "cache")
    preset = PRESETS[asked.preset]["table" if Run(asked, whole).is_small else "image"]
    values = {**preset, **asked.model_dump(exclude_none=True)}
    bound = None if asked.n_examples is None and len(whole.y) <= values["n_examples"] else values["n_examples"]
    # the models are asked about as many test points as each is trained on, or about all there are
    n_test = min(len(whole.y_test), max(1, (bound or len(whole.y)) // 2))
    chosen = pool(whole, bound, values["seed"], n_test)
    values["n_examples"] = len(chosen.y)
    values.setdefault("gpus", float(ensemble.device_of(values["device"]).type == "cuda"))
    if asked.batch_size is None:
        values["batch_size"] = max(1, min(values["batch_size"], int(len(chosen.y) * values["subset"]) // 2))
    run = Run(checked(values), chosen)
    check(run)
    return run


def check(run):
    """Raise ValueError naming the parameter if any main ensemble of the run could not be trained or compared."""
    if len(set(run.names)) != len(run.names) or "" in run.names or len(run.names) < 2:
        raise ValueError(f"optimizers={run.optimizers!r} is not valid: two or more names, separated by commas")
    workers.check(run.engine, run.gpus)
    ensemble.device_of(run.device)  # raises if it is not there
    parsed = [Optimizer.parse(name) for name in run.names]
    if parsed[0].rule_name != "plain":
        bases = ", ".join(BASES)
        raise ValueError(f"optimizers={run.optimizers!r}: the first is the baseline, one of {bases}, or your own")
    if any(optimizer.has_radius for optimizer in parsed) and run.rho <= 0:
        raise ValueError(f"rho={run.rho} is not valid: positive (at 0, SAM is the baseline itself)")
    for name in run.names:
        ensemble.check(run.recipe(name), run.dataset, run.n_models)
    member = membership(run.recipe(run.baseline), len(run.dataset.y), range(run.n_models), run.dataset.groups)
    taught = member @ np.eye(run.dataset.n_classes, dtype=int)[run.dataset.y]  # [M, C] examples of each class
    if not taught.all():
        k, c = np.argwhere(taught == 0)[0]
        raise ValueError(
            f"n_examples={len(run.dataset.y)}: model {k} would train on none of class {run.dataset.classes[c]!r}: "
            f"{np.bincount(run.dataset.y)[c]} are in the pool; take more examples, or leave the class out"
        )
    inside, half = member.sum(0), np.arange(run.n_models) // 2 % 2 == 0
    # 3: attacks leave one out; 2 in either half of the models: buckets are formed on one half and judged on the other
    least = min(min(part.sum(0).min(), (~part).sum(0).min()) for part in (member[half], member[~half]))
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


def notebook_run(namespace):
    """The Run of a notebook. namespace: its globals().

    Read are the known parameters and, within IPython, every name that was assigned between the last parameters cell
    and this call: so a misspelt parameter is refused. A parameters cell begins with a comment "# Parameters", as does
    the cell that papermill adds. Names that begin with PAPERMILL_ are papermill's own.
    """
    cells = namespace.get("In", [])
    starts = [k for k, cell in enumerate(cells) if cell.lstrip().startswith("# Parameters")]
    assigned = set()
    for cell in cells[starts[-1] :] if starts else ():
        if "notebook_run(" in cell:
            break
        try:
            nodes = ast.walk(ast.parse(cell))
        except SyntaxError:  # such a cell was not run
            continue
        assigned |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assigned = {name for name in assigned if name in namespace and not name.startswith(("_", "PAPERMILL_"))}
    return open_run({name: namespace[name] for name in namespace if name in assigned | set(Parameters.model_fields)})

"""What a run is: its parameters, for notebooks, command line and make, and the checked Run that is made of them."""

import argparse
import ast
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib import need
from lib.analysis import compare
from lib.data.dataset import DATASETS, ROOT, Dataset, load, pool
from lib.study import experiments
from lib.training import Recipe, ensemble, networks, sharpness, train, workers
from lib.training.optimizers import BASES, Optimizer, split
from lib.training.recipe import membership

# What a preset gives, for tables and small pictures (an MLP), for images (a convolutional network), for one data set. A
# data set with fewer examples than n_examples is used whole, and batch_size is at most half of what a model trains on.
TABLE = dict(arch="mlp", optimizers="sgd,sam", rho=0.3, n_models=512, n_examples=2000, subset=0.5, epochs=40)
TABLE |= dict(batch_size=64, lr=0.1, weight_decay=5e-4, augment=False, ema=0.0, seed=0, device="auto", engine="local")
TABLE |= dict(tuning="full", n_pools=3)
IMAGE = TABLE | dict(arch="cnn", rho=0.1, n_models=16, epochs=20, tuning="cross", n_pools=1)
LARGE = IMAGE | dict(n_models=64, n_examples=50_000, batch_size=256)
PRESETS = {
    "tiny": {"table": TABLE | dict(n_models=16, n_examples=300, epochs=10, batch_size=32),
             "image": IMAGE | dict(n_models=8, n_examples=200, epochs=2, batch_size=32)},
    # long enough on these images that both optimizers fit
    "default": {"table": TABLE, "image": IMAGE, "mnist5k": IMAGE | dict(n_examples=3000),
                "fashionmnist": IMAGE | dict(n_models=8, n_examples=20_000, epochs=45, batch_size=128),
                "eyepacs_referable": IMAGE | dict(n_models=8, epochs=80),
                "cifar10": IMAGE | dict(n_examples=8000, epochs=320, batch_size=128, rho=0.05, augment=True,
                                        tuning="few")},
    "small": {"table": TABLE | dict(n_models=64), "image": IMAGE, "mnist5k": IMAGE | dict(n_examples=3000)},
    "fast": {"table": TABLE, "image": LARGE | dict(arch="resnet9", epochs=16)},
    "paper": {"table": TABLE | dict(n_examples=50_000, epochs=100),
              "image": LARGE | dict(arch="resnet18", n_models=256, epochs=100, augment=True)},
}  # fmt: skip


def parameter(about, default=None, **limits):  # None: not given, so the preset decides (or, for gpus, the device)
    return Field(default, description=about, **limits)


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    preset: Literal[tuple(PRESETS)] = parameter("tiny, default, small (two cores), fast, paper (a GPU)", "default")
    dataset: Literal[tuple(DATASETS)] = parameter(f"one of {', '.join(DATASETS)}", "digits")
    data: str | None = parameter("path of the data, where the data set needs one")
    scores: str | None = parameter("file of published scores (.npy or text), one for each example as loaded")
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
    tuning: Literal["full", "cross", "few"] | None = parameter("full (all combinations), cross (one change each), few")
    n_pools: int | None = parameter("pools, each drawn with a seed of its own, on which SAM's effect is measured", ge=1)
    device: str | None = parameter("auto, cpu, cuda, mps")
    engine: Literal[workers.ENGINES] | None = parameter("local, or ray (a cluster at RAY_ADDRESS, or this machine)")
    gpus: float | None = parameter("GPUs that a Ray task asks for, such as 0.25 (default 1 where there is one)", ge=0)
    store: str = parameter("folder of the trained ensembles (default: store)", str(ROOT / "store"))
    out: str = Field(
        description="folder of this run's results (default: outputs/<dataset>)",
        default_factory=lambda given: str(ROOT / "outputs" / given.get("dataset", "")),
    )


def checked(given):
    """The given parameters (a dict; None: not given) as Parameters. One ValueError names the first that is bad."""
    try:
        texts = {name: str(value) if isinstance(value, Path | bool) else value for name, value in given.items()}
        return Parameters(**{name: value for name, value in texts.items() if value is not None})
    except ValidationError as error:
        first, known = error.errors()[0], Parameters.model_fields
        name = first["loc"][0]
        valid = f"{name}: {known[name].description}" if name in known else f"the parameters are {', '.join(known)}"
        raise ValueError(f"{name}={first['input']!r} is not valid: {first['msg']} ({valid})") from None


DOING = {"plan": "say what is left to train, and its cost", "work": "only train it, beside others"}
DOING |= {"report": "only make the report anew", "audit": "audit logits in the files DATA=a.npz,b.npz"}


def parse(arguments):
    """(words, parameters, what to do: "run" or flag) of a command line: --name value, or NAME=value as make has it."""
    about = "Run the notebooks headlessly, the verdict last. DATASET=cifar10, as make has it, is understood too."
    parser = argparse.ArgumentParser("python -m lib.study", description=about, allow_abbrev=False)
    parser.argument_default = argparse.SUPPRESS
    for name, field_of in Parameters.model_fields.items():
        parser.add_argument(*sorted({f"--{name}", f"--{name.replace('_', '-')}"}), dest=name, help=field_of.description)
    doing = parser.add_mutually_exclusive_group()
    for name, about in DOING.items():
        doing.add_argument(f"--{name}", dest="doing", action="store_const", const=name, default="run", help=about)
    parser.add_argument("words", nargs="*", metavar="notebook", help="which notebooks, such as 01 (default: all)")
    given = vars(parser.parse_intermixed_args(arguments))
    words, doing = given.pop("words", []), given.pop("doing")
    given |= {word.partition("=")[0].lower(): word.partition("=")[2] for word in words if "=" in word}
    return [word for word in words if "=" not in word], given, doing


@dataclass(frozen=True)
class Run:
    """A checked run. A parameter is also an attribute (run.epochs), but for `dataset`, which is the loaded Dataset."""

    parameters: Parameters
    dataset: Dataset
    published: np.ndarray | None = None  # [N] the numbers in the file `scores`, of the pool's examples
    began: float = field(default_factory=time.monotonic, compare=False)

    def __getattr__(self, name):
        if name in Parameters.model_fields:
            return getattr(self.parameters, name)
        raise AttributeError(f"a run has no {name!r}")

    # the optimizers' texts, the baseline first: all others are compared with it
    names = property(lambda self: split(self.optimizers))
    baseline = property(lambda self: self.names[0])

    @cached_property
    def treatment(self):
        """The last sharpness-aware optimizer, which figures and sentences compare with the baseline."""
        aware = [n for n in self.names if (one := Optimizer.parse(n)).has_radius and not one.is_private]
        return (aware or self.names)[-1]

    # tables and small pictures, whose networks train quickly: experiments use more models and levels
    is_small = property(lambda self: not (self.dataset.is_image and min(self.dataset.x.shape[-2:]) >= 16))

    @cached_property
    def other_pools(self):
        """The data, and a test part that was split off, drawn anew with the next seeds: dict seed -> Dataset."""
        found = {}
        for seed in range(self.seed + 1, self.seed + self.n_pools):
            whole = load(self.parameters.dataset, self.data, Path(self.store) / "cache", seed)
            n = self.n_examples if self.n_examples < len(whole.y) - 1 else None
            found[seed] = pool(whole, n, seed, len(self.dataset.y_test))
        return found

    def recipe(self, optimizer, **changes):
        """The run's Recipe for one optimizer (or its text), with some fields changed."""
        shared = {"arch", "rho", "lr", "weight_decay", "epochs", "batch_size", "subset", "augment", "ema", "seed"}
        fields = self.parameters.model_dump(include=shared)
        rule = Optimizer.parse(optimizer).rule_name
        fields["rho"] *= sharpness.RADIUS.get(rule, 1.0)
        fields["ema"] *= rule != "swa"  # which is an average already
        fields["precision"] = ensemble.precision_of(self.arch, ensemble.device_of(self.device))
        return Recipe(optimizer=optimizer, **{**fields, "queries": 10 if self.augment else 1, **changes})

    def ensembles(self, name, dataset=None):
        """The ensembles of one of experiments.EXPERIMENTS, trained or read: dict key -> Ensemble, of common models.

        dataset: the pool, where a notebook draws it from results. Empty if the experiment does not suit this run."""
        found, experiment = {}, experiments.EXPERIMENTS.get(name)
        for key, (recipe, n_models, data) in experiments.declared(self, name, dataset).items():
            found[key] = train(recipe, data, n_models, self.store, self.device, self.engine, self.gpus)
            if experiment.is_private and len(found) == 1 and len(found[key].ids) < 8:
                return {}  # not even the baseline, without noise, learns on this network
        return compare.keep_common_models(found, experiment.essential and experiment.essential(self)) if found else {}

    def describe(self):
        data, names = self.dataset, ", ".join(self.names)
        said = f"**{data.name}**, {self.arch}: {self.n_models} models for each of {names}, each on "
        said += f"{round(self.subset * self.n_examples)} of {self.n_examples} examples of {data.n_classes} classes, "
        said += f"tested on {len(data.y_test)}; {self.epochs} epochs, batches of {self.batch_size}, "
        return said + f"rho = {self.rho}, seed {self.seed}."


def open_run(given):
    """The Run of the given parameters (a dict) and, for the rest, the preset. ValueError names a bad parameter."""
    asked = checked(given)
    for name, folder in (("out", asked.out), ("store", asked.store)):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"{name}={folder!r} can't be written ({error}): give a writable folder") from error
    whole = load(asked.dataset, asked.data, Path(asked.store) / "cache")
    kinds, given = PRESETS[asked.preset], asked.model_dump(exclude_none=True)
    values = (kinds.get(asked.dataset) or kinds["table" if Run(asked, whole).is_small else "image"]) | given
    bound = values["n_examples"] if asked.n_examples or values["n_examples"] < len(whole.y) else None
    # the models are asked about as many test points as each is trained on, or about all there are
    n_test = min(len(whole.y_test), max(1, (bound or len(whole.y)) // 2))
    chosen, published = pool(whole, bound, values["seed"], n_test), None
    if asked.scores is not None:
        held = len(whole.y) + (whole.index is not None) * len(whole.y_test)  # with a test part split off
        published = published_scores(asked.scores, held)[slice(None) if chosen.index is None else chosen.index]
    values["n_examples"] = len(chosen.y)
    values.setdefault("gpus", float(ensemble.device_of(values["device"]).type == "cuda"))
    if asked.batch_size is None:
        values["batch_size"] = max(1, min(values["batch_size"], int(len(chosen.y) * values["subset"]) // 2))
    run = Run(checked(values), chosen, published)
    check(run)
    return run


def published_scores(path, n):
    """The numbers [n] in a file: .npy, or text with one number a line. ValueError naming `scores` for anything else."""
    try:
        found = np.load(path, allow_pickle=False) if Path(path).suffix == ".npy" else np.loadtxt(path, ndmin=1)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"scores={path!r} can't be read ({error}): give a .npy file, or one number a line") from None
    fine = found.dtype.kind in "iuf" and found.shape in ((n,), (n, 1)) and np.isfinite(found).all()
    valid = f"valid is one finite number for each of the {n} examples of the data as loaded, before the pool is drawn"
    need(fine, f"scores={path!r} holds {found.dtype} {list(found.shape)}; {valid}")
    return found.reshape(n).astype(float)


def check(run):
    """Raise ValueError naming the parameter if any main ensemble of the run could not be trained or compared."""
    what = f"optimizers={run.optimizers!r} is not valid"
    need(len({*run.names} - {""}) == len(run.names) >= 2, f"{what}: two or more names, separated by commas")
    workers.check(run.engine)
    recipes = [run.recipe(name) for name in run.names]  # raises what is wrong with the optimizers and the device
    first = f"the first is the baseline, one of {', '.join(BASES)}, or your own"
    need(recipes[0].optimizer.rule_name == "plain", f"{what}: {first}")
    for recipe in recipes:
        fine = run.rho > 0 or not recipe.optimizer.has_radius
        need(fine, f"rho={run.rho} is not valid: positive (at 0, SAM is the baseline itself)")
        ensemble.check(recipe, run.dataset, run.n_models, run.device)
    member = membership(recipes[0], run.n_examples, range(run.n_models), run.dataset.groups)
    taught = member @ np.eye(run.dataset.n_classes, dtype=int)[run.dataset.y]  # [M, C] examples of each class
    for k, c in np.argwhere(taught == 0)[:1]:
        what = f"model {k} would train on none of class {run.dataset.classes[c]!r}, which has "
        what += f"{np.bincount(run.dataset.y)[c]} in the pool: take more examples, or leave the class out"
        raise ValueError(f"n_examples={run.n_examples}: {what}")
    # attacks leave one model out, and need two more; buckets are formed on one half of the models, judged on the other
    half = np.arange(run.n_models) // 2 % 2 == 0
    counts = [np.minimum(part.sum(0), (~part).sum(0)) for part in (member, member[half], member[~half])]
    few = f"subset={run.subset}: of n_models={run.n_models}, only {counts[0].min()} train on some example, or not on it"
    must = "3 must, and 2 in either half of the models: train more models, or choose a subset nearer to 0.5"
    need(np.all(np.min(counts, axis=1) >= [3, 2, 2]), f"{few}; {must}")


def notebook_run(namespace):
    """The Run of a notebook, whose globals() these are."""
    # in IPython all names assigned from the last cell of parameters to this call count, so a misspelt one is refused
    cells, known = namespace.get("In", []), set(Parameters.model_fields)
    starts = [k for k, cell in enumerate(cells) if cell.lstrip().startswith("# Parameters")]
    for cell in takewhile(lambda cell: "notebook_run(" not in cell, cells[starts[-1] :] if starts else ()):
        with suppress(SyntaxError):  # such a cell was not run
            nodes = ast.walk(ast.parse(cell))
            known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    known = {name for name in known if not name.startswith(("_", "PAPERMILL_"))}
    return open_run({name: value for name, value in namespace.items() if name in known})

"""What is trained: a Recipe, and the random streams that make model k a function of (seed, k) alone."""

from dataclasses import dataclass, fields

import numpy as np

from lib import need
from lib.training import networks
from lib.training.optimizers import Optimizer

TINY = 1e-12
# of the fields that are numbers; rho and batch_size have those of the optimizer
LIMITS = {"lr": (TINY, np.inf), "epochs": (1, np.inf), "stop": (TINY, 1), "subset": (TINY, 1 - TINY)}
LIMITS |= {"queries": (1, 18)} | dict.fromkeys(("weight_decay", "seed"), (0, np.inf))
LIMITS |= dict.fromkeys(("momentum", "warmup", "smoothing", "ema"), (0, 1 - TINY))
STREAMS = {"halves": 0, "weights": 1, "order": 2, "augment": 3, "rule": 4}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained, except the data. Raises ValueError naming a bad field.

    arch, optimizer: see networks.py, optimizers.py. rho: radius of the rule's neighbourhood (negative for sharpreg);
    one among the optimizer's options wins. lr: peak learning rate. warmup: share of the steps over which it rises,
    before a cosine takes it down to 0. stop: share of the epochs after which training stops, while the schedule is that
    of all the epochs. smoothing: of the labels (Szegedy et al. 2016, section 7). subset: share of the pool that each
    model trains on. queries: how many flipped and shifted copies of each example the models predict (1: the example as
    it is). precision: float32, or bfloat16 (autocast). ema: decay of the weights' average that is kept; 0: none."""

    arch: str = "mlp"
    optimizer: Optimizer | str = "sgd"
    rho: float = 0.0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 100
    batch_size: int = 64
    warmup: float = 0.05
    stop: float = 1.0
    smoothing: float = 0.0
    subset: float = 0.5
    augment: bool = False
    queries: int = 1
    precision: str = "float32"
    ema: float = 0.0
    seed: int = 0

    def __post_init__(self):
        optimizer = self.optimizer if isinstance(self.optimizer, Optimizer) else Optimizer.parse(self.optimizer)
        rho = self.rho if optimizer.rho is None else optimizer.rho
        object.__setattr__(self, "optimizer", optimizer)
        # an optimizer without a radius has 0, so that one store serves SGD at every rho
        object.__setattr__(self, "rho", float(rho) if optimizer.has_radius else 0.0)
        known = f"one of {', '.join(networks.MODELS)}, or package.module:name"
        need(self.arch in networks.MODELS or ":" in self.arch, f"arch={self.arch!r} is not valid: it must be {known}")
        need(self.precision in ("float32", "bfloat16"), f"precision={self.precision!r}: valid are float32, bfloat16")
        need(not self.ema or optimizer.rule_name != "swa", f"ema={self.ema!r} is not valid: swa is an average already")
        radii = (-np.inf, 0) if optimizer.rule_name == "sharpreg" else (0, np.inf)
        for name, (low, high) in {**LIMITS, "rho": radii, "batch_size": (optimizer.least_batch, np.inf)}.items():
            value = getattr(self, name)
            need(low <= value <= high, f"{name}={value!r} is not valid: it must lie between {low:g} and {high:g}")

    run_epochs = property(lambda self: max(1, round(self.stop * self.epochs)))  # how many epochs are trained

    def key(self):
        """What names the recipe's store: every field, and what the optimizer's and network's names do not say."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        paths = self.optimizer.rule_name, self.optimizer.base_name.partition("(")[0]
        optimizer = {"options": self.optimizer.all_options, "source": [networks.source_hash(path) for path in paths]}
        own = {"optimizer": optimizer, "arch": networks.source_hash(self.arch)}
        return {"recipe": {**said, "optimizer": self.optimizer.text}, "own": own}


def generator(recipe, stream, k):
    """NumPy generator of model (or pair) k for one purpose, a key of STREAMS."""
    return np.random.default_rng([recipe.seed, STREAMS[stream], k])


def membership(recipe, n, ids, groups=None):
    """Which examples each model trains on: bool [len(ids), n], with the same number of members in every row.

    subset 0.5: models 2k and 2k+1 get complementary halves. Any other subset: each model draws its own. groups [n]:
    examples of one group are all members or all non-members."""
    size, member = round(n * recipe.subset), np.zeros((len(ids), n), bool)
    for row, k in enumerate(ids):
        draw = generator(recipe, "halves", k // 2 if recipe.subset == 0.5 else k)
        chosen = draw.permutation(n)[:size] if groups is None else whole_groups(draw, groups, size)
        member[row, chosen] = True
        member[row] ^= recipe.subset == 0.5 and k % 2 == 1  # the other half
    return member


def whole_groups(draw, groups, size):
    """Indices of `size` examples that make up whole groups: groups are taken in a random order where they still fit."""
    sizes = np.bincount(groups)
    for _ in range(50):  # one order may end one example short, if the last single example came too early
        taken, left = np.zeros(len(sizes), bool), size
        for group in draw.permutation(len(sizes)):
            if sizes[group] <= left:
                taken[group], left = True, left - sizes[group]
        if not left:
            return np.flatnonzero(taken[groups])
    raise ValueError(f"n_examples={len(groups)}: no {size} examples made of whole groups were found: choose another")


def learning_rate(recipe, step, n_steps):
    """Learning rate of step 0..n_steps-1: a linear rise, then a cosine down to 0 (Loshchilov & Hutter 2017, eq. 5).

    Under SWA it ends at the share `floor` of the peak, after the share `start` of the steps, and stays there."""
    rising = recipe.warmup * n_steps
    if step < rising:
        return recipe.lr * (step + 1) / (rising + 1)
    options = recipe.optimizer.all_options
    start, floor = (options["start"], options["floor"]) if recipe.optimizer.rule_name == "swa" else (1.0, 0.0)
    share = min(1.0, (step - rising) / max(start * n_steps - rising, 1e-9))
    # lr_t = lr (f + (1 - f)/2 (1 + cos(pi t / T)))
    return float(recipe.lr * (floor + (1 - floor) / 2 * (1 + np.cos(np.pi * share))))  # NumPy's does not raise at 0 / 0

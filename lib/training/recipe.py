"""What is trained: a Recipe, and the random streams that make model k a function of (seed, k) alone."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from lib.training import networks, optimizers

STREAMS = {"halves": 0, "weights": 1, "order": 2, "augment": 3, "rule": 4}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained, except the data. Raises ValueError naming a bad field.

    arch: a name of networks.MODELS, or a reader's own as package.module:name.
    optimizer: a base (sgd, nesterov, adam, adamw), a rule (sam: on SGD), or both (sam+adamw), see optimizers.parse.
    rho: radius of the rule's ball (negative for sharpreg); or a list of radii, taken in turn by the pairs of models.
    warmup: share of the steps with rising learning rate, before the cosine falls to 0.
    stop: share of the epochs after which training stops, short of the end of the learning rate's schedule.
    smoothing: of the labels (Szegedy et al. 2016, section 7).
    queries: how many flipped and shifted copies of each example the models are asked about (1 = as it is).
    precision: float32, or bfloat16 (autocast; weights stay float32).
    ema: decay of the exponential moving average of the weights that is kept instead of the last ones; 0: none.
    """

    arch: str = "mlp"
    optimizer: str = "sgd"
    rho: float | tuple[float, ...] = 0.0
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
        named = optimizers.parse(self.optimizer)  # raises if unknown
        rho = self.rho if named.rho is None else named.rho
        rho = tuple(rho) if isinstance(rho, list | tuple) else float(rho)
        # an optimizer without a radius: one store serves it whatever rho the others use
        object.__setattr__(self, "rho", rho if self.has_radius else 0.0)
        object.__setattr__(self, "optimizer", named.text)  # however it was spaced
        require, sign = partial(_require, self), -1 if named.rule_name == "sharpreg" else 1
        known = f"one of {', '.join(networks.MODELS)}, or package.module:name"
        require("arch", self.arch in networks.MODELS or ":" in self.arch, known)
        side = "zero or positive" if sign > 0 else "zero or negative"
        require("rho", min(sign * np.atleast_1d(self.rho), default=-1) >= 0, side)
        require("lr", self.lr > 0, "positive")
        require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        require("momentum", named.base_name != "nesterov" or self.momentum > 0, "positive for nesterov")
        require("weight_decay", self.weight_decay >= 0, "zero or positive")
        require("epochs", self.epochs >= 1, "at least 1")
        require("batch_size", self.batch_size >= 1, "at least 1")
        least = named.least_batch
        require("batch_size", self.batch_size >= least, f"at least {least}, two for each of msam's shards")
        require("warmup", 0 <= self.warmup < 1, "in [0, 1)")
        require("stop", 0 < self.stop <= 1, "in (0, 1]")
        require("smoothing", 0 <= self.smoothing < 1, "in [0, 1)")
        require("subset", 0 < self.subset < 1, "strictly between 0 and 1")
        require("queries", 1 <= self.queries <= 18, "between 1 and 18")
        require("ema", 0 <= self.ema < 1, "in [0, 1)")
        require("ema", not self.ema or named.rule_name != "swa", "0 for swa, which is an average already")
        require("precision", self.precision in ("float32", "bfloat16"), "float32 or bfloat16")
        require("seed", self.seed >= 0, "zero or positive")

    @property
    def named(self):
        """The optimizer in its parts: an optimizers.Named."""
        return optimizers.parse(self.optimizer)

    @property
    def has_radius(self):
        """True for a sharpness-aware optimizer: its rule asks for rho."""
        return "rho" in self.named.wants

    @property
    def run_epochs(self):
        """How many epochs are trained."""
        return max(1, round(self.stop * self.epochs))

    def rho_of(self, ids):
        """Radius of each model: [len(ids)]."""
        values = np.atleast_1d(self.rho)
        return values[(np.asarray(ids) // 2) % len(values)]


def _require(recipe, name, holds, valid):
    if not holds:
        raise ValueError(f"{name}={getattr(recipe, name)!r} is not valid: it must be {valid}")


def generator(recipe, stream, k):
    """NumPy generator of model (or pair) k for one purpose."""
    return np.random.default_rng([recipe.seed, STREAMS[stream], k])


def membership(recipe, n, ids, groups=None):
    """Which examples each model trains on: bool [len(ids), n], the same number in every row.

    subset 0.5: models 2k and 2k+1 get complementary halves. Otherwise each model draws its own subset.
    groups [n]: examples that stay together, on one side. Raises ValueError if no such subset of that size was found.
    """
    size = round(n * recipe.subset)
    member = np.zeros((len(ids), n), bool)
    for row, k in enumerate(ids):
        draw = generator(recipe, "halves", k // 2 if recipe.subset == 0.5 else k)
        chosen = draw.permutation(n)[:size] if groups is None else whole_groups(draw, groups, size)
        member[row, chosen] = True
        if recipe.subset == 0.5 and k % 2:
            member[row] = ~member[row]
    return member


def whole_groups(draw, groups, size, tries=50):
    """Indices of `size` examples that make up whole groups, taken in a random order where they still fit."""
    sizes = np.bincount(groups)
    for _ in range(tries):  # an order may end one short: a lone example that came too late
        taken, left = np.zeros(len(sizes), bool), size
        for group in draw.permutation(len(sizes)):
            if sizes[group] <= left:
                taken[group], left = True, left - sizes[group]
        if not left:
            return np.flatnonzero(taken[groups])
    raise ValueError(f"n_examples={len(groups)}: no {size} of them made of whole groups were found: choose another")


def learning_rate(recipe, step, n_steps):
    """Linear warm-up over the first share of the steps, then a cosine down to 0 (Loshchilov & Hutter 2017, eq. 5).

    Under SWA down to `floor` of the peak at the share `start` of the steps, and constant from there.
    """
    rising = recipe.warmup * n_steps
    if step < rising:
        return recipe.lr * (step + 1) / (rising + 1)
    start, floor = averaging(recipe) or (1.0, 0.0)
    share = min(1.0, (step - rising) / max(start * n_steps - rising, 1e-9))
    # lr_t = lr (f + (1 - f)/2 (1 + cos(pi t / T)))
    return recipe.lr * (floor + (1 - floor) / 2 * (1 + np.cos(np.pi * share)))


def averaging(recipe):
    """(start, floor) of SWA, or None."""
    if recipe.named.rule_name != "swa":
        return None
    options = optimizers.fingerprint(recipe.named)["options"]
    return options["start"], options["floor"]

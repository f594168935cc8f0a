"""Train many models at once, on random halves of one pool, into a resumable store.

    recipe = Recipe(arch="mlp", optimizer="sam", rho=0.3)
    ensemble = train(recipe, dataset, n_models=128, store="store")   # or finished models, read back
    ensemble.logits, ensemble.member                                  # [M, Q, N, C], [M, N]

Models 2k and 2k+1 split the pool between them. Model k's half, initial weights, batch order and augmentation
are a function of (seed, k) alone, so ensembles of two optimizers are paired model by model.
"""

import logging
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map
from tqdm import tqdm

from lib import data, models, sharpness
from lib.store import Store

KEEP_WEIGHTS = 16  # the first models' weights are kept, to measure sharpness on
BASES = {
    "sgd": lambda p, lr, r: torch.optim.SGD(p, lr, r.momentum, weight_decay=r.weight_decay),
    "nesterov": lambda p, lr, r: torch.optim.SGD(p, lr, r.momentum, weight_decay=r.weight_decay, nesterov=True),
    "adam": lambda p, lr, r: torch.optim.Adam(p, lr, weight_decay=r.weight_decay),
    "adamw": lambda p, lr, r: torch.optim.AdamW(p, lr, weight_decay=r.weight_decay),
}
STREAMS = {"halves": 0, "weights": 1, "order": 2, "augment": 3}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained, except the data. Raises ValueError naming a bad field.

    optimizer: a base (sgd, nesterov, adam, adamw), a rule (sam: on SGD), or both (sam+adamw).
    rho: radius of SAM's ball; or a list of radii, taken in turn by the pairs of models.
    warmup: share of the steps with rising learning rate, before the cosine falls to 0.
    queries: how many flipped and shifted copies of each example the models are asked about (1 = as it is).
    precision: float32, or bfloat16 (autocast; weights stay float32).
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
    subset: float = 0.5
    augment: bool = False
    queries: int = 1
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self):
        rule, base = self.parts  # raises if unknown
        rho = tuple(self.rho) if isinstance(self.rho, list | tuple) else float(self.rho)
        # a plain optimizer has no radius: one store serves it whatever rho the others use
        object.__setattr__(self, "rho", rho if rule != "plain" else 0.0)
        require = partial(_require, self)
        require("arch", self.arch in models.MODELS, f"one of {', '.join(models.MODELS)}")
        require("rho", min(np.atleast_1d(rho), default=-1) >= 0, "zero or positive")
        require("lr", self.lr > 0, "positive")
        require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        require("momentum", base != "nesterov" or self.momentum > 0, "positive for nesterov")
        require("weight_decay", self.weight_decay >= 0, "zero or positive")
        require("epochs", self.epochs >= 1, "at least 1")
        require("batch_size", self.batch_size >= 1, "at least 1")
        require("warmup", 0 <= self.warmup < 1, "in [0, 1)")
        require("subset", 0 < self.subset < 1, "strictly between 0 and 1")
        require("queries", 1 <= self.queries <= 18, "between 1 and 18")
        require("precision", self.precision in ("float32", "bfloat16"), "float32 or bfloat16")
        require("seed", self.seed >= 0, "zero or positive")

    @property
    def parts(self):
        """(rule, base) of the optimizer's name."""
        rule, _, base = self.optimizer.rpartition("+")
        if base in BASES and rule in ("", *sharpness.RULES):
            return rule or "plain", base
        if self.optimizer in sharpness.RULES and self.optimizer != "plain":
            return self.optimizer, "sgd"
        known = [*BASES, *(r for r in sharpness.RULES if r != "plain")]
        raise ValueError(f"optimizers={self.optimizer!r} is unknown: choose from {', '.join(known)}, or sam+adamw")

    def rho_of(self, ids):
        """Radius of each model: [len(ids)]."""
        values = np.atleast_1d(self.rho)
        return values[(np.asarray(ids) // 2) % len(values)]


def _require(recipe, name, holds, valid):
    if not holds:
        raise ValueError(f"{name}={getattr(recipe, name)!r} is not valid: it must be {valid}")


# ---- randomness: a function of (seed, model) alone ----------------------------------------------------------


def generator(recipe, stream, k):
    """NumPy generator of model (or pair) k for one purpose."""
    return np.random.default_rng([recipe.seed, STREAMS[stream], k])


def membership(recipe, n, ids):
    """Which examples each model trains on: bool [len(ids), n], the same number in every row.

    subset 0.5: models 2k and 2k+1 get complementary halves. Otherwise each model draws its own subset.
    """
    size = round(n * recipe.subset)
    member = np.zeros((len(ids), n), bool)
    for row, k in enumerate(ids):
        if recipe.subset == 0.5:
            order = generator(recipe, "halves", k // 2).permutation(n)
            member[row, order[:size] if k % 2 == 0 else order[size:]] = True
        else:
            member[row, generator(recipe, "halves", k).permutation(n)[:size]] = True
    return member


def initial_state(recipe, shape, n_classes, ids, device):
    """Stacked initial parameters and buffers: two dicts of tensors [len(ids), ...]."""
    nets = []
    with torch.random.fork_rng(devices=[]):
        for k in ids:
            # the CPU's generator alone: torch.manual_seed also visits the GPUs, 3 ms a model
            torch.default_generator.manual_seed(int(generator(recipe, "weights", k).integers(2**62)))
            nets.append(models.build(recipe.arch, shape, n_classes))
    params, buffers = torch.func.stack_module_state(nets)
    return {n: p.detach().to(device) for n, p in params.items()}, {n: b.to(device) for n, b in buffers.items()}


# ---- one step of all the models -----------------------------------------------------------------------------


def over_models(function, lanes):
    """Map a one-model function over the leading axis. One lane skips vmap, which would hide the memory format."""
    if lanes > 1:
        return vmap(function)

    def one(*trees):
        return tree_map(lambda t: t[None], function(*tree_map(lambda t: t[0], trees)))

    return one


def gradient_of(net, recipe):
    """(params, buffers, x, y, rho) of one model -> (grads, (loss, (new buffers, accuracy))) by the recipe's rule."""
    rule = sharpness.RULES[recipe.parts[0]]

    def gradient(params, buffers, x, y, rho):
        def loss(params):
            running = {name: b.clone() for name, b in buffers.items()}  # BatchNorm writes into these
            with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                logits = functional_call(net, (params, running), (x,))
            accuracy = (logits.argmax(-1) == y).float().mean()
            return F.cross_entropy(logits.float(), y), (running, accuracy)

        return rule(grad_and_value(loss, has_aux=True), params, rho)

    return gradient


class Stepper:
    """Weights, base optimizer and step of `lanes` models: built (and compiled) once, reset for each next group."""

    def __init__(self, recipe, shape, n_classes, lanes, device, compiled):
        self.net = models.build(recipe.arch, shape, n_classes)
        self.params, self.buffers = initial_state(recipe, shape, n_classes, range(lanes), device)
        self.rate = torch.tensor(recipe.lr) if compiled else recipe.lr  # a tensor: no recompilation when it changes
        self.optimizer = BASES[recipe.parts[1]](list(self.params.values()), self.rate, recipe)
        self.gradient = over_models(gradient_of(self.net, recipe), lanes)
        self.apply({name: torch.zeros_like(p) for name, p in self.params.items()})  # makes the optimizer's state
        self.run = torch.compile(self.plain_step, dynamic=False) if compiled else self.plain_step

    def reset(self, recipe, shape, n_classes, ids, device):
        """Fresh weights for models `ids`, and an optimizer that remembers nothing."""
        params, self.buffers = initial_state(recipe, shape, n_classes, ids, device)
        for name, weight in self.params.items():
            weight.copy_(params[name])
        for state in self.optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def apply(self, grads):
        """One step of the base optimizer."""
        for name, weight in self.params.items():
            weight.grad = grads[name]
        self.optimizer.step()

    def plain_step(self, buffers, x, y, rho):
        grads, (loss, (buffers, accuracy)) = self.gradient(self.params, buffers, x, y, rho)
        self.apply(grads)
        return loss, accuracy, buffers

    def step(self, x, y, rho, lr):
        """x [M, B, ...], y [M, B], rho [M] -> loss and accuracy before the step, each [M]."""
        if torch.is_tensor(self.rate):
            self.rate.fill_(lr)
        else:
            self.optimizer.param_groups[0]["lr"] = lr
        loss, accuracy, self.buffers = self.run(self.buffers, x, y, rho)
        return loss, accuracy


STEPPERS = {}


def stepper(recipe, inputs, lanes, compiled):
    """The stepper for this kind of run; compiled ones are kept, since neither rho nor epochs asks for a new one."""
    fixed = replace(recipe, rho=0.0, epochs=1, seed=0, subset=0.5, queries=1, warmup=0.0, lr=1.0)
    key = (fixed, inputs.shape, inputs.n_classes, lanes, inputs.device)
    args = (recipe, inputs.shape, inputs.n_classes, lanes, inputs.device, compiled)
    if not compiled:
        return Stepper(*args)
    quiet_compiler()
    return STEPPERS.get(key) or STEPPERS.setdefault(key, Stepper(*args))


def quiet_compiler():
    """The compiler's notes are for its developers. Each kind of run compiles its own step: allow for many."""
    for name in ("torch._dynamo", "torch._inductor", "torch._logging", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64


def learning_rate(recipe, step, n_steps):
    """Linear warm-up over the first share of the steps, then a cosine down to 0 (Loshchilov & Hutter 2017, eq. 5)."""
    rising = recipe.warmup * n_steps
    if step < rising:
        return recipe.lr * (step + 1) / (rising + 1)
    # lr_t = lr/2 (1 + cos(pi t / T))
    return recipe.lr / 2 * (1 + np.cos(np.pi * (step - rising) / (n_steps - rising)))


@cache
def can_compile():
    """True if torch.compile works on this machine: it needs a C++ compiler, Python's headers and a writable cache."""
    try:
        quiet_compiler()
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64))
        return True
    except Exception:  # whatever is missing, eager mode serves
        return False


def worth_compiling(n_steps, device):
    """Compilation fuses what lies between the matrix products; a short run is over before it pays."""
    return n_steps >= 300 and device.type in ("cpu", "cuda") and can_compile()


def lanes_for(net, device):
    """How many models train together, from the device and the network alone: a resumed run cuts the work alike."""
    if models.is_convolutional(net):
        return 1
    size = sum(p.numel() for p in net.parameters())
    # weights, gradients and momentum of all the lanes stay in the cache (CPU), or in 1 GB (GPU)
    budget, most = (4e6, 32) if device.type == "cpu" else (1e9, 128)
    return int(min(most, 2 ** np.floor(np.log2(max(1, budget / (12 * size))))))


# ---- a group of models, trained together --------------------------------------------------------------------


class Inputs:
    """The data on the device, once for all the models. Images are also held with a reflected border, for shifts."""

    def __init__(self, dataset, recipe, device):
        x, x_test = data.inputs(dataset)
        # in one layout, whatever way the data were read: a compiled step is built for the strides it first saw
        self.x, self.x_test = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (x, x_test))
        self.y, self.y_test = torch.from_numpy(dataset.y).to(device), torch.from_numpy(dataset.y_test).to(device)
        share = np.bincount(dataset.y) / len(dataset.y)
        self.chance = -(share * np.log(share)).sum()  # the loss of guessing the class shares
        self.n_classes, self.shape, self.device = dataset.n_classes, tuple(x.shape[1:]), device
        if recipe.augment or recipe.queries > 1:
            self.border = max(1, self.shape[-1] // 8)
            self.padded, self.padded_test = (
                F.pad(x, (self.border,) * 4, mode="reflect") for x in (self.x, self.x_test)
            )

    def crop(self, index, shift, flip):
        """Shifted and flipped copies. index, flip [B], shift [B, 2] in 0..2 border -> [B, C, H, W], channels last."""
        rows = shift[:, :1] + torch.arange(self.shape[1], device=self.device)
        columns = shift[:, 1:] + torch.arange(self.shape[2], device=self.device)
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        return self.padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def query(self, q):
        """Pool and test part as the q-th query sees them: 0 as they are, 1 flipped, 2.. shifted, then flipped."""
        if q == 0:
            return self.x, self.x_test
        sides = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)]
        down, right = ((side + 1) * self.border for side in sides[q // 2])
        window = (..., slice(down, down + self.shape[1]), slice(right, right + self.shape[2]))
        seen = self.padded[window], self.padded_test[window]
        return tuple(image.flip(-1) for image in seen) if q % 2 else seen


class Group:
    """Models `ids` in training: their halves, their random streams, their weights."""

    def __init__(self, recipe, inputs, ids):
        self.recipe, self.inputs, self.ids = recipe, inputs, ids
        device = inputs.device
        self.member = membership(recipe, len(inputs.y), ids)
        self.examples = torch.from_numpy(np.stack([np.flatnonzero(row) for row in self.member])).to(device)
        self.order = [generator(recipe, "order", k) for k in ids]
        self.augment = [generator(recipe, "augment", k) for k in ids]
        self.rho = torch.tensor(recipe.rho_of(ids), dtype=torch.float32, device=device)
        self.per_epoch = self.examples.shape[1] // recipe.batch_size  # the remainder waits for the next shuffle
        self.n_steps = self.per_epoch * recipe.epochs
        self.net = models.build(recipe.arch, inputs.shape, inputs.n_classes).eval()
        self.stepper = stepper(recipe, inputs, len(ids), worth_compiling(self.n_steps, device))
        self.stepper.reset(recipe, inputs.shape, inputs.n_classes, ids, device)

    def batches(self):
        """One epoch's batches: x [M, B, ...], y [M, B]."""
        size, n = self.recipe.batch_size, self.examples.shape[1]
        order = np.stack([rng.permutation(n) for rng in self.order])
        index = self.examples.gather(1, torch.from_numpy(order).to(self.examples.device))
        change = self.changes(n) if self.recipe.augment else None
        for at in range(0, self.per_epoch * size, size):
            batch = index[:, at : at + size]
            if change is None:
                x = self.inputs.x[batch]
            else:
                shift, flip = (c[:, at : at + size].flatten(0, 1) for c in change)
                x = self.inputs.crop(batch.flatten(), shift, flip).unflatten(0, batch.shape)
            yield x, self.inputs.y[batch]

    def changes(self, n):
        """One epoch's augmentation: shifts [M, n, 2] and flips [M, n]."""
        shift = np.stack([rng.integers(0, 2 * self.inputs.border + 1, (n, 2)) for rng in self.augment])
        flip = np.stack([rng.random(n) < 0.5 for rng in self.augment])
        return [torch.from_numpy(c).to(self.inputs.device) for c in (shift, flip)]

    def epoch(self, number):
        """Train one epoch; returns the mean loss and accuracy over its batches, each [M]."""
        losses, accuracies = [], []
        for at, (x, y) in enumerate(self.batches()):
            lr = learning_rate(self.recipe, number * self.per_epoch + at, self.n_steps)
            loss, accuracy = self.stepper.step(x, y, self.rho, lr)
            losses.append(loss)
            accuracies.append(accuracy)
        return torch.stack(losses).mean(0).cpu().numpy(), torch.stack(accuracies).mean(0).cpu().numpy()

    @torch.no_grad()
    def predict(self, x, block=2000):
        """Logits [M, len(x), C] float32 in evaluation mode, always at full precision."""
        state = self.stepper.params, self.stepper.buffers

        def logits(part):
            call = over_models(lambda p, b: functional_call(self.net, (p, b), (part,)), len(self.ids))
            return call(*state).float().cpu().numpy()

        return np.concatenate([logits(part) for part in x.split(block)], axis=1)

    def train(self, tick):
        """All the epochs. Returns history [M, epochs, 3]: train loss, train accuracy, test accuracy (some epochs)."""
        recipe, history = self.recipe, np.full((len(self.ids), self.recipe.epochs, 3), np.nan, np.float32)
        self.stuck = np.zeros(len(self.ids), bool)
        for number in range(recipe.epochs):
            history[:, number, 0], history[:, number, 1] = self.epoch(number)
            tick()
            self.stuck |= self.failing(history[:, number, 0], number)
            if self.stuck.all():
                break
            if (number + 1) % max(1, recipe.epochs // 5) == 0 or number + 1 == recipe.epochs:
                hits = self.predict(self.inputs.x_test).argmax(-1) == self.inputs.y_test.cpu().numpy()
                history[:, number, 2] = hits.mean(-1)
        return history

    def failing(self, loss, number):
        """Which models have a loss that is not finite, or, half-way, no better than guessing the class shares."""
        late = number + 1 >= max(5, self.recipe.epochs / 2)
        return ~np.isfinite(loss) | (late & (loss > 0.999 * self.inputs.chance))

    def arrays(self, history):
        """What the store keeps of each model: name -> [M, ...]."""
        queries = [self.inputs.query(q) for q in range(self.recipe.queries)]
        state = [*self.stepper.params.values(), *self.stepper.buffers.values()]
        flat = [tensor.float().cpu().reshape(len(tensor), -1) for tensor in state]
        return {
            "logits": np.stack([self.predict(x) for x, _ in queries], 1),
            "test_logits": np.stack([self.predict(x_test) for _, x_test in queries], 1),
            "member": self.member,
            "history": history,
            "weights": torch.cat(flat, 1).numpy(),
        }


# ---- the whole ensemble -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ensemble:
    """Finished models, memory-mapped from the store.

    ids [M]; logits [M, Q, N, C] on the pool (query 0 is the plain input); test_logits [M, Q, T, C]; member [M, N];
    history [M, epochs, 3]: mean train loss and accuracy of each epoch's batches, test accuracy (NaN between).
    """

    recipe: Recipe
    dataset: data.Dataset
    store: Store
    ids: np.ndarray

    def __getattr__(self, name):
        if name in ("logits", "test_logits", "member", "history"):
            rows = self.store.rows[name].read()
            whole = np.array_equal(self.ids, np.arange(len(self.ids)))
            return rows[: len(self.ids)] if whole else rows[self.ids]
        raise AttributeError(name)

    def only(self, ids):
        """The same ensemble, restricted to models `ids`."""
        return replace(self, ids=np.asarray(ids))

    def weights(self, k):
        """(net, params, buffers) of model k < 16: a module in evaluation mode and two dicts of tensors."""
        net = models.build(self.recipe.arch, self.dataset.x.shape[1:], self.dataset.n_classes).eval()
        flat = torch.from_numpy(np.array(self.store.rows["weights"].read()[k]))
        trees, at = [], 0
        for named in (net.named_parameters(), net.named_buffers()):
            tree = {}
            for name, leaf in named:
                tree[name] = flat[at : at + leaf.numel()].view(leaf.shape).to(leaf.dtype)
                at += leaf.numel()
            trees.append(tree)
        return net, *trees


def device_of(name="auto"):
    """torch.device of auto, cpu, cuda, cuda:1 or mps. Raises ValueError naming `device` if it is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    numbered = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name not in ("auto", *there, *numbered):
        raise ValueError(f"device={name!r} is not available on this machine: choose auto, {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def open_store(recipe, dataset, store):
    """The store of this recipe on this data set."""
    net = models.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes)
    n_weights = sum(t.numel() for t in [*net.parameters(), *net.buffers()])
    layout = {
        "logits": ((recipe.queries, len(dataset.y), dataset.n_classes), np.float32),
        "test_logits": ((recipe.queries, len(dataset.y_test), dataset.n_classes), np.float32),
        "member": ((len(dataset.y),), bool),
        "history": ((recipe.epochs, 3), np.float32),
        "weights": ((n_weights,), np.float32),
    }
    name = f"{dataset.name}-{recipe.arch}-{recipe.optimizer}".replace("+", "-")
    return Store(store, name, {"recipe": asdict(recipe), "data": dataset.hash}, layout)


def check(recipe, dataset, n_models):
    """Raise ValueError naming the parameter if this ensemble can't be trained: called before any training."""
    n = len(dataset.y)
    size = round(n * recipe.subset)
    if n_models < 2 or n_models % 2:
        raise ValueError(f"n_models={n_models!r} is not valid: models come in pairs, so an even number from 2")
    if n % 2 and recipe.subset == 0.5:
        raise ValueError(f"n_examples={n} is odd: complementary halves need an even number")
    if not 1 <= size < n:
        raise ValueError(f"subset={recipe.subset!r} of {n} examples leaves {size} in and {n - size} out")
    if (recipe.augment or recipe.queries > 1) and not dataset.is_image:
        raise ValueError(f"augment={recipe.augment!r} needs images; an example here has shape {dataset.x.shape[1:]}")
    models.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes)
    if recipe.batch_size > size:
        raise ValueError(f"batch_size={recipe.batch_size!r} is larger than a model's {size} training examples")


def train(recipe, dataset, n_models, store, device="auto", quiet=False):
    """Models 0..n_models-1 of the recipe, trained where the store lacks them. Returns an Ensemble.

    Models whose training diverged are named and left out, with their partner: `ensemble.ids` says who is in.
    Raises ValueError naming the parameter before anything is trained.
    """
    check(recipe, dataset, n_models)
    device, kept = device_of(device), open_store(recipe, dataset, store)
    if any(kept.flag(k) is None for k in range(n_models)):
        with kept.lock():
            train_missing(recipe, dataset, n_models, kept, device, quiet)
    lost = {k for k in range(n_models) if kept.flag(k)["status"] == "diverged"}
    if lost:
        print(f"{kept.folder.name}: models {sorted(lost)} diverged: they and their partners are left out", flush=True)
    ids = np.array([k for k in range(n_models) if not {k, k ^ 1} & lost], int)
    return Ensemble(recipe, dataset, kept, ids)


def train_missing(recipe, dataset, n_models, kept, device, quiet=False):
    """Train each group that lacks a wanted model. Groups start at multiples of their size, so a resumed or a longer
    run trains model k beside the same others, and its arrays come out the same to the last bit."""
    lanes = lanes_for(models.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes), device)
    starts = [
        s for s in range(0, n_models, lanes) if any(kept.flag(k) is None for k in range(s, min(s + lanes, n_models)))
    ]
    if not starts:
        return
    kept.check_disk(lanes * len(starts), {"weights": KEEP_WEIGHTS})
    inputs = Inputs(dataset, recipe, device)
    label = f"{recipe.optimizer} rho {recipe.rho}, {lanes * len(starts)} models"
    with tqdm(
        total=recipe.epochs * len(starts), desc=label, unit="epoch", leave=False, disable=quiet, mininterval=1
    ) as bar:
        for start in starts:
            group = Group(recipe, inputs, list(range(start, start + lanes)))
            began = time.time()
            arrays = group.arrays(group.train(bar.update))
            seconds = (time.time() - began) / lanes
            for lane, k in enumerate(group.ids):
                if kept.flag(k) is None:
                    status = "diverged" if group.stuck[lane] else "finished"
                    rows = {n: a[lane] for n, a in arrays.items() if n != "weights" or k < KEEP_WEIGHTS}
                    kept.save(k, rows, status=status, seconds=seconds, device=str(device), torch=torch.__version__)

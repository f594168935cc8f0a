"""Train many models at once, on random halves of one pool, into a resumable store.

    recipe = Recipe(arch="mlp", optimizer="sam", rho=0.3)
    ensemble = train(recipe, dataset, n_models=128, store="store")   # or finished models, read back
    ensemble.logits, ensemble.member                                  # [M, Q, N, C], [M, N]

Models 2k and 2k+1 split the pool between them. Model k's half, initial weights, batch order and augmentation
are a function of (seed, k) alone, so ensembles of two optimizers are paired model by model.
"""

import logging
import re
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map
from tqdm import tqdm

from lib import data, models, optimizers, sharpness
from lib.recipe import Recipe, averaging, generator, learning_rate, membership
from lib.store import Store

KEEP_WEIGHTS = 16  # the first models' weights are kept, to measure sharpness on


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


class Pass(NamedTuple):
    """What a pass at some weights gives beside the gradient."""

    loss: torch.Tensor  # mean over the batch
    accuracy: torch.Tensor
    buffers: dict  # BatchNorm's, after it
    losses: torch.Tensor | tuple  # [B], or () where the rule does not ask for them


class Batch:
    """One model's loss and gradients on one batch, as the rules of sharpness.py call them."""

    def __init__(self, net, recipe, buffers, x, y, keep=False):
        self.net, self.recipe, self.buffers, self.x, self.y = net, recipe, buffers, x, y
        self.size, self.keep = len(y), keep

    def pass_at(self, params, index=None):
        """(mean loss, Pass) on the whole batch, or on the examples `index` of it."""
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        running = {name: b.clone() for name, b in self.buffers.items()}  # BatchNorm writes into these
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = functional_call(self.net, (params, running), (x,)).float()
        cross_entropy = partial(F.cross_entropy, target=y, label_smoothing=self.recipe.smoothing)
        loss, accuracy = cross_entropy(logits), (logits.argmax(-1) == y).float().mean()
        losses = cross_entropy(logits, reduction="none") if self.keep else ()
        return loss, Pass(loss, accuracy, running, losses)

    def gradient(self, params, index=None):
        """(gradient of the mean loss, Pass)."""
        grads, (_, aux) = grad_and_value(self.pass_at, has_aux=True)(params, index)
        return grads, aux

    def losses(self, params):
        """Loss of every example, [B]."""
        return self.pass_at(params)[1].losses

    def per_example(self, params):
        """(gradient of every example: dict of [B, ...], Pass)."""

        def alone(params, x, y):
            loss, aux = Batch(self.net, self.recipe, self.buffers, x[None], y[None]).pass_at(params)
            return loss, aux.accuracy

        grads, (losses, hits) = vmap(grad_and_value(alone, has_aux=True), (None, 0, 0))(params, self.x, self.y)
        return grads, Pass(losses.mean(), hits.mean(), self.buffers, ())


def gradient_of(net, recipe):
    """A function of one model: (params, buffers, x, y, context, turn) -> (grads, Pass, memory) by the recipe's rule.

    context: those of sharpness.CONTEXT that are tensors and that the rule asks for. At rho 0 every rule of
    sharpness.py is plain; a private one is not, and a reader's own may not be.
    """
    named = recipe.named
    if named.rule_name in sharpness.RULES and recipe.has_radius and not np.any(recipe.rho):
        named = optimizers.parse("sgd")
    wants = named.wants

    def gradient(params, buffers, x, y, context, turn=True):
        batch = Batch(net, recipe, buffers, x, y, keep="losses" in wants)
        context = {name: value for name, value in context.items() if name in wants}
        offered = {"turn": turn, "size": batch.size, "losses": batch.losses, "per_example": batch.per_example}
        asked = {**context, **{name: offered[name] for name in wants & set(offered)}}
        found = named.rule(batch.gradient, params, **asked, **named.options)
        return found if "memory" in wants else (*found, {})

    return gradient


class Stepper:
    """Weights, base optimizer and step of `lanes` models: built (and compiled) once, reset for each next group."""

    def __init__(self, recipe, shape, n_classes, lanes, device, compiled):
        self.recipe, self.named, self.lanes = recipe, recipe.named, lanes
        self.remembers = "memory" in self.named.wants
        self.net = models.build(recipe.arch, shape, n_classes)
        self.params, self.buffers = initial_state(recipe, shape, n_classes, range(lanes), device)
        self.rate = torch.tensor(recipe.lr) if compiled else recipe.lr  # a tensor: no recompilation when it changes
        self.model_gradient = gradient_of(self.net, recipe)
        self.optimizer = self.base()
        if not self.named.own_base:
            self.apply({name: torch.zeros_like(p) for name, p in self.params.items()})  # makes the optimizer's state
        self.run = torch.compile(self.plain_step, dynamic=False) if compiled else self.plain_step

    def base(self):
        """One of torch's own for the stacked weights of all the models; a reader's own for each of them."""
        settings = self.rate, self.recipe.momentum, self.recipe.weight_decay
        if self.named.own_base:
            return optimizers.Each(self.named, self.params, *settings)
        return optimizers.build(self.named, list(self.params.values()), *settings)

    def reset(self, recipe, shape, n_classes, ids, device):
        """Fresh weights for models `ids`, and an optimizer and a rule that remember nothing."""
        params, self.buffers = initial_state(recipe, shape, n_classes, ids, device)
        for name, weight in self.params.items():
            weight.copy_(params[name])
        self.memory = {n: torch.zeros_like(p) for n, p in params.items()} if self.remembers else {}
        if self.named.own_base:
            self.optimizer = self.base()
            return
        for state in self.optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def apply(self, grads):
        """One step of the base optimizer."""
        for name, weight in self.params.items():
            weight.grad = grads[name]
        self.optimizer.step()

    def plain_step(self, buffers, x, y, context, memory, turn):
        if self.remembers:
            context = {**context, "memory": memory}

        def gradient(params, buffers, x, y, context):
            return self.model_gradient(params, buffers, x, y, context, turn)

        grads, aux, memory = over_models(gradient, self.lanes)(self.params, buffers, x, y, context)
        if self.named.own_base:
            self.optimizer.step(aux.loss, grads, lambda k, params: self.again(k, params, buffers, x, y, context, turn))
        else:
            self.apply(grads)
        return aux.loss, aux.accuracy, aux.buffers, memory

    def again(self, k, params, buffers, x, y, context, turn):
        """(loss, gradient) of model k alone, at other weights."""
        mine = tree_map(lambda t: t[k], (buffers, x, y, context))
        grads, aux, _ = self.model_gradient(params, *mine, turn)
        return aux.loss, grads

    def step(self, x, y, context, lr, turn):
        """x [M, B, ...], y [M, B], context: dict of [M, ...] -> loss and accuracy before the step, each [M]."""
        if self.named.own_base:
            self.optimizer.set_rate(lr)
        elif torch.is_tensor(self.rate):
            self.rate.fill_(lr)
        else:
            self.optimizer.param_groups[0]["lr"] = lr
        loss, accuracy, self.buffers, self.memory = self.run(self.buffers, x, y, context, self.memory, turn)
        return loss, accuracy


STEPPERS = {}


def stepper(recipe, inputs, lanes, compiled):
    """The stepper for this kind of run; compiled ones are kept, since neither rho nor epochs asks for a new one."""
    radius = float(np.sign(np.max(recipe.rho)) or np.sign(np.min(recipe.rho)))
    fixed = replace(recipe, rho=radius, epochs=1, seed=0, subset=0.5, queries=1, warmup=0.0, lr=1.0, stop=1.0)
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


@cache
def can_compile():
    """True if torch.compile works on this machine: it needs a C++ compiler, Python's headers and a writable cache."""
    try:
        quiet_compiler()
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64))
        return True
    except Exception:  # whatever is missing, eager mode serves
        return False


def worth_compiling(recipe, n_steps, device):
    """Compilation fuses what lies between the matrix products; a short run is over before it pays.

    A reader's own optimizer is run as it is, and so is what asks for the gradient of every example.
    """
    ours = not (recipe.named.own_base or recipe.named.private)
    return ours and n_steps >= 300 and device.type in ("cpu", "cuda") and can_compile()


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
        # labels smoothed by s are guessed no better than by (1 - s) share + s / C
        share = (1 - recipe.smoothing) * share + recipe.smoothing / len(share)
        self.chance = -(share * np.log(share)).sum()  # the loss of guessing the class shares
        self.n_classes, self.shape, self.device = dataset.n_classes, tuple(x.shape[1:]), device
        self.groups = dataset.groups
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


class Average:
    """Mean of the weights at the ends of SWA's last epochs (Izmailov et al. 2018, algorithm 1); else nothing."""

    def __init__(self, recipe):
        start, _ = averaging(recipe) or (np.inf, 0)
        self.first, self.count, self.mean = start * recipe.epochs, 0, {}

    def take(self, number, params):
        if number + 1 > self.first:
            self.count += 1
            # m_n = m_{n-1} + (w - m_{n-1}) / n
            self.mean = {n: m + (params[n] - m) / self.count for n, m in (self.mean or params).items()}

    def put(self, params):
        for name, weight in params.items():
            weight.copy_(self.mean[name])


class Group:
    """Models `ids` in training: their halves, their random streams, their weights."""

    def __init__(self, recipe, inputs, ids):
        self.recipe, self.inputs, self.ids = recipe, inputs, ids
        device = inputs.device
        self.member = membership(recipe, len(inputs.y), ids, inputs.groups)
        self.examples = torch.from_numpy(np.stack([np.flatnonzero(row) for row in self.member])).to(device)
        self.order = [generator(recipe, "order", k) for k in ids]
        self.augment = [generator(recipe, "augment", k) for k in ids]
        self.draw = [generator(recipe, "rule", k) for k in ids]
        self.rho = torch.tensor(recipe.rho_of(ids), dtype=torch.float32, device=device)
        self.per_epoch = self.examples.shape[1] // recipe.batch_size  # the remainder waits for the next shuffle
        self.n_steps = self.per_epoch * recipe.epochs
        options = optimizers.fingerprint(recipe.named)["options"]
        self.period = options.get("k", 1) if "turn" in recipe.named.wants else 1
        self.net = models.build(recipe.arch, inputs.shape, inputs.n_classes).eval()
        self.stepper = stepper(recipe, inputs, len(ids), worth_compiling(recipe, self.n_steps, device))
        self.stepper.reset(recipe, inputs.shape, inputs.n_classes, ids, device)

    def batches(self):
        """One epoch's batches: x [M, B, ...], y [M, B]."""
        size, n = self.recipe.batch_size, self.examples.shape[1]
        order = np.stack([self.shuffled(rng, n) for rng in self.order])
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

    def shuffled(self, rng, n):
        """Order of one epoch; where privacy is accounted for, every batch is drawn from all, whatever came before."""
        if not self.recipe.named.private:
            return rng.permutation(n)
        return np.concatenate([rng.permutation(n)[: self.recipe.batch_size] for _ in range(self.per_epoch)])

    def context(self, number, lr):
        """What the rule asks for at step `number`, as tensors [M, ...]."""
        wants, scalar = self.recipe.named.wants, torch.ones_like(self.rho)
        found = {"rho": self.rho, "rate": scalar * (lr / self.recipe.lr), "step": scalar * number}
        found = {name: value for name, value in found.items() if name in wants}
        sizes = {name: p.shape[1:] for name, p in self.stepper.params.items()}
        if "uniform" in wants:
            found["uniform"] = self.on_device([rng.random(len(sizes), np.float32) for rng in self.draw])
        if "noise" in wants:
            queries = self.recipe.named.rule.queries
            found["noise"] = {
                name: self.on_device([rng.standard_normal((queries, *size), np.float32) for rng in self.draw])
                for name, size in sizes.items()
            }
        return found

    def on_device(self, rows):
        return torch.from_numpy(np.stack(rows)).to(self.inputs.device)

    def changes(self, n):
        """One epoch's augmentation: shifts [M, n, 2] and flips [M, n]."""
        shift = np.stack([rng.integers(0, 2 * self.inputs.border + 1, (n, 2)) for rng in self.augment])
        flip = np.stack([rng.random(n) < 0.5 for rng in self.augment])
        return [torch.from_numpy(c).to(self.inputs.device) for c in (shift, flip)]

    def epoch(self, number):
        """Train one epoch; returns the mean loss and accuracy over its batches, each [M]."""
        losses, accuracies = [], []
        for at, (x, y) in enumerate(self.batches(), number * self.per_epoch):
            lr = learning_rate(self.recipe, at, self.n_steps)
            loss, accuracy = self.stepper.step(x, y, self.context(at, lr), lr, at % self.period == 0)
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
        average = Average(recipe)
        for number in range(recipe.run_epochs):
            history[:, number, 0], history[:, number, 1] = self.epoch(number)
            average.take(number, self.stepper.params)
            if number + 1 == recipe.run_epochs and average.count:
                average.put(self.stepper.params)
                self.refresh_batchnorm()
            tick()
            self.stuck |= self.failing(history[:, number, 0], number)
            if self.stuck.all():
                break
            if (number + 1) % max(1, recipe.run_epochs // 5) == 0 or number + 1 == recipe.run_epochs:
                hits = self.predict(self.inputs.x_test).argmax(-1) == self.inputs.y_test.cpu().numpy()
                history[:, number, 2] = hits.mean(-1)
        return history

    @torch.no_grad()
    def refresh_batchnorm(self):
        """BatchNorm's statistics anew, as the mean over one epoch's batches: averaged weights have others."""
        net = models.build(self.recipe.arch, self.inputs.shape, self.inputs.n_classes)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return

        def buffers_after(params, buffers, x):
            running = {name: b.clone() for name, b in buffers.items()}
            functional_call(net, (params, running), (x,))
            return running

        for count, (x, _) in enumerate(self.batches(), 1):
            for module in norms:
                module.momentum = 1 / count  # r <- r + (batch - r) / count
            call, state = over_models(buffers_after, len(self.ids)), self.stepper
            state.buffers = call(state.params, state.buffers, x)

    def failing(self, loss, number):
        """Which models have a loss that is not finite, or at the end is no better than guessing the class shares.

        Private noise alone may keep a loss that high: that is its price, and no failure.
        """
        late = number + 1 == self.recipe.run_epochs >= 5 and not self.recipe.named.private
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
    return Store(store, *store_key(recipe, dataset), layout)


def store_key(recipe, dataset):
    """(readable name, everything that names the store by its hash) of a recipe on a data set."""
    name = re.sub(r"[^\w.]+", "-", f"{dataset.name}-{recipe.arch}-{recipe.optimizer}").strip("-")[:80]
    own = {"optimizer": optimizers.fingerprint(recipe.named), "arch": optimizers.source(recipe.arch)}
    return name, {"recipe": asdict(recipe), "own": own, "data": dataset.hash}


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
    net = models.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes)
    if recipe.named.private and models.has_batchnorm(net):
        raise ValueError(f"arch={recipe.arch!r} has BatchNorm, which mixes what {recipe.optimizer} must keep apart")
    membership(recipe, n, [0], dataset.groups)
    if recipe.batch_size > size:
        raise ValueError(f"batch_size={recipe.batch_size!r} is larger than a model's {size} training examples")


def train(recipe, dataset, n_models, store, device="auto", quiet=False, notify=None):
    """Models 0..n_models-1 of the recipe, trained where the store lacks them. Returns an Ensemble.

    notify(recipe, n_examples, n_models, seconds) is called after each chunk of models that train together.
    Models whose training diverged are named and left out, with their partner: `ensemble.ids` says who is in.
    Raises ValueError naming the parameter before anything is trained.
    """
    check(recipe, dataset, n_models)
    device, kept = device_of(device), open_store(recipe, dataset, store)
    if any(kept.flag(k) is None for k in range(n_models)):
        with kept.lock():
            train_missing(recipe, dataset, n_models, kept, device, quiet, notify)
    lost = {k for k in range(n_models) if kept.flag(k)["status"] == "diverged"}
    if lost:
        print(f"{kept.folder.name}: models {sorted(lost)} diverged: they and their partners are left out", flush=True)
    ids = np.array([k for k in range(n_models) if not {k, k ^ 1} & lost], int)
    return Ensemble(recipe, dataset, kept, ids)


def train_missing(recipe, dataset, n_models, kept, device, quiet=False, notify=None):
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
        total=recipe.run_epochs * len(starts), desc=label, unit="epoch", leave=False, disable=quiet, mininterval=1
    ) as bar:
        for start in starts:
            group = Group(recipe, inputs, list(range(start, start + lanes)))
            began = time.time()
            arrays = group.arrays(group.train(bar.update))
            seconds = (time.time() - began) / lanes  # of one model
            for lane, k in enumerate(group.ids):
                if kept.flag(k) is None:
                    status = "diverged" if group.stuck[lane] else "finished"
                    rows = {n: a[lane] for n, a in arrays.items() if n != "weights" or k < KEEP_WEIGHTS}
                    kept.save(k, rows, status=status, seconds=seconds, device=str(device), torch=torch.__version__)
            if notify:
                notify(recipe, len(dataset.y), lanes, seconds * lanes)

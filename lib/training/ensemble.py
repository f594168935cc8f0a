"""Train many models at once on random halves of one pool; what is trained is kept in a resumable store.

Model k's half, initial weights, batch order and augmentation are a function of (seed, k) alone, so the ensembles of two
optimizers are paired model by model."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lib import need
from lib.data.dataset import Dataset, inputs
from lib.training import networks, step, trial
from lib.training.recipe import Recipe, generator, learning_rate, membership
from lib.training.store import Store

KEEP_WEIGHTS = 16  # the weights of the first models are kept, to measure sharpness on
HALF = 1_000_000  # from so many logits a model on, they are stored in half precision (to 1 in 2,000)


class Inputs:
    """The data on the device, once for all the models. Images are also held with a reflected border, for shifts."""

    def __init__(self, dataset, recipe, device):
        # contiguous, however the data were read: a compiled step is built for the strides that it first saw
        self.x, self.x_test = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in inputs(dataset))
        self.y, self.y_test = torch.from_numpy(dataset.y).to(device), torch.from_numpy(dataset.y_test).to(device)
        share, smoothing = np.bincount(dataset.y) / len(dataset.y), recipe.smoothing
        share = (1 - smoothing) * share + smoothing / len(share)  # what guesses smoothed labels best
        self.chance = -(share * np.log(share)).sum()  # the loss of guessing the class shares
        self.n_classes, self.shape = dataset.n_classes, tuple(self.x.shape[1:])
        self.groups, self.device = dataset.groups, device
        if recipe.augment or recipe.queries > 1:
            sides = np.array(self.shape[1:])
            self.border = np.minimum(np.maximum(1, sides // 8), sides - 1)  # of height and width; a side of 1 has none
            around = np.repeat(self.border[::-1], 2).tolist()
            self.padded, self.padded_test = (F.pad(x, around, mode="reflect") for x in (self.x, self.x_test))

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
        down, right = (np.array(sides[q // 2]) + 1) * self.border
        window = (..., slice(down, down + self.shape[1]), slice(right, right + self.shape[2]))
        return tuple(x[window].flip(-1) if q % 2 else x[window] for x in (self.padded, self.padded_test))


def train_chunk(recipe, inputs, ids, tick=lambda: None, n_models=None):
    """Train models `ids` of an ensemble of n_models: what the store keeps of each, name -> array [len(ids), ...].

    `stuck` [len(ids)]: the loss was not finite, or ended no better than guessing. tick() is called after each epoch."""
    member = membership(recipe, len(inputs.y), ids, inputs.groups)
    examples = torch.from_numpy(np.stack([np.flatnonzero(row) for row in member])).to(inputs.device)  # [M, n]
    streams = {name: [generator(recipe, name, k) for k in ids] for name in ("order", "augment", "rule")}
    per_epoch = examples.shape[1] // recipe.batch_size  # the remainder waits for the next shuffle
    n_steps, epochs, optimizer = per_epoch * recipe.epochs, recipe.run_epochs, recipe.optimizer
    alone = bool(trial.trial(recipe, inputs.shape, inputs.n_classes, inputs.device))
    stack = step.stack_for(recipe, inputs, ids, n_models or len(ids), n_steps, alone)
    swa_from = optimizer.all_options["start"] * recipe.epochs if optimizer.rule_name == "swa" else np.inf
    mean, n_averaged, stuck, y_test = None, 0, np.zeros(len(ids), bool), inputs.y_test.cpu().numpy()
    history = np.full((len(ids), recipe.epochs, 3), np.nan, np.float32)

    for epoch in range(epochs):
        steps = []
        stack.of_bases("train")
        for at, (x, y) in enumerate(batches(recipe, inputs, examples, streams), epoch * per_epoch):
            lr = learning_rate(recipe, at, n_steps)
            context = step.rule_context(recipe, stack.params, streams["rule"], at, lr)
            steps.append(stack.step(x, y, context, lr, is_kth_step=at % optimizer.k == 0))
            if recipe.ema:  # an average over all steps, whose memory grows to 1 / (1 - ema) (Polyak & Juditsky 1992)
                stack.of_bases("eval")
                mean = mean or {n: w.clone() for n, w in stack.params.items()}
                # m <- m + (1 - d) (w - m), d = min(ema, (1 + t) / (10 + t))
                share = 1 - min(recipe.ema, (1 + at) / (10 + at))
                torch._foreach_lerp_(list(mean.values()), list(stack.params.values()), share)
                stack.of_bases("train")
        for column, found in enumerate(zip(*steps, strict=True)):  # losses, then accuracies
            history[:, epoch, column] = torch.stack(found).mean(0).cpu().numpy()
        stack.of_bases("eval")
        if epoch + 1 > swa_from:  # the mean at the ends of the last epochs (Izmailov et al. 2018, algorithm 1)
            n_averaged += 1
            # m_n = m_{n-1} + (w - m_{n-1}) / n
            mean = {n: m + (stack.params[n] - m) / n_averaged for n, m in (mean or stack.params).items()}

        last = epoch + 1 == epochs
        if last and (mean or any(hasattr(base, "eval") for base in stack.bases)):
            stack.params = mean or stack.params
            stack.refresh_batchnorm(batches(recipe, inputs, examples, streams))
        tick()
        stuck |= ~np.isfinite(history[:, epoch, 0])
        if last and epochs >= 5 and not optimizer.is_private:  # private noise alone may keep a loss that high
            stuck |= history[:, epoch, 0] > 0.999 * inputs.chance
        if stuck.all():
            break
        if not last and (epoch + 1) % max(1, epochs // 5) == 0:
            history[:, epoch, 2] = (stack.predict(inputs.x_test).argmax(-1) == y_test).mean(-1)

    queries = [inputs.query(q) for q in range(recipe.queries)]
    test_logits = np.stack([stack.predict(x_test) for _, x_test in queries], 1)
    history[:, epoch, 2] = (test_logits[:, 0].argmax(-1) == y_test).mean(-1)
    state = [*stack.params.values(), *stack.buffers.values()]
    return {
        "logits": np.stack([stack.predict(x) for x, _ in queries], 1),
        "test_logits": test_logits,
        "member": member,
        "history": history,
        "weights": torch.cat([tensor.float().cpu().reshape(len(tensor), -1) for tensor in state], 1).numpy(),
        "stuck": stuck,
    }


def batches(recipe, inputs, examples, streams):
    """One epoch's batches in each model's own order: x [M, B, ...], y [M, B]. examples [M, n]: each model's half."""
    size, n = recipe.batch_size, examples.shape[1]
    per_epoch = n // size
    if recipe.optimizer.is_private:  # the accountant assumes that every batch is drawn from all, whatever came before
        order = [np.concatenate([rng.permutation(n)[:size] for _ in range(per_epoch)]) for rng in streams["order"]]
    else:
        order = [rng.permutation(n) for rng in streams["order"]]
    index = examples.gather(1, torch.from_numpy(np.stack(order)).to(inputs.device))[:, : per_epoch * size]
    index = index.unflatten(1, (per_epoch, size)).transpose(0, 1).contiguous()  # [steps, M, B]
    if recipe.augment:
        shift = np.stack([rng.integers(0, 2 * inputs.border + 1, (n, 2)) for rng in streams["augment"]])
        flip = np.stack([rng.random(n) < 0.5 for rng in streams["augment"]])
        shift, flip = (torch.from_numpy(change).to(inputs.device) for change in (shift, flip))
    for at, (batch, y) in enumerate(zip(index, inputs.y[index], strict=True)):
        if recipe.augment:
            now = slice(at * size, (at + 1) * size)
            x = inputs.crop(batch.flatten(), *(part[:, now].flatten(0, 1) for part in (shift, flip)))
        else:
            x = inputs.x.index_select(0, batch.flatten())  # whole rows: faster than x[batch]
        yield x.unflatten(0, batch.shape), y


@dataclass(frozen=True)
class Ensemble:
    """Finished models, memory-mapped from the store.

    ids [M]; logits [M, Q, N, C] on the pool (query 0 is the plain input); test_logits [M, Q, T, C]; member [M, N];
    history [M, epochs, 3]: mean train loss and accuracy of each epoch's batches, test accuracy (NaN between)."""

    recipe: Recipe
    dataset: Dataset
    store: Store
    ids: np.ndarray

    def rows(self, name):
        """The array `name` of these models: a memory map if they are the first ones, without a gap."""
        found, n = self.store.rows[name].read(), len(self.ids)
        return found[:n] if np.array_equal(self.ids, np.arange(n)) else found[self.ids]

    logits, test_logits = (property(lambda self, name=n: self.rows(name)) for n in ("logits", "test_logits"))
    member, history = (property(lambda self, name=n: self.rows(name)) for n in ("member", "history"))

    def only(self, ids):
        """The same ensemble, restricted to models `ids`: itself, if it has no others."""
        return self if np.array_equal(ids, self.ids) else replace(self, ids=np.asarray(ids))

    def weights(self, k):
        """(net, params, buffers) of model k < KEEP_WEIGHTS: a module in evaluation mode and its networks.parts."""
        net = networks.build(self.recipe.arch, self.dataset.x.shape[1:], self.dataset.n_classes).eval()
        params, buffers = networks.parts(net)
        leaves = [*params.values(), *buffers.values()]
        flat = torch.from_numpy(np.array(self.store.rows["weights"].read()[k]))
        for leaf, part in zip(leaves, flat.split([leaf.numel() for leaf in leaves]), strict=True):
            leaf.copy_(part.view(leaf.shape))
        return net, params, buffers


def open_store(recipe, dataset, store):
    """The store of this recipe on this data set, made if it is not there."""
    return Store(store, *store_key(recipe, dataset), layout(recipe, dataset))


def store_key(recipe, dataset):
    """(readable name, everything whose hash names the store) of a recipe on a data set."""
    name = re.sub(r"[^\w.]+", "-", f"{dataset.name}-{recipe.arch}-{recipe.optimizer}").strip("-")[:80]
    return name, {**recipe.key(), "data": dataset.hash}


def layout(recipe, dataset):
    """What the store keeps of one model: array name -> (shape, dtype)."""
    n, t, c, q = len(dataset.y), len(dataset.y_test), dataset.n_classes, recipe.queries
    net, kind = networks.build(recipe.arch, dataset.x.shape[1:], c), np.float16 if q * n * c >= HALF else np.float32
    n_weights = sum(tensor.numel() for tensor in [*net.parameters(), *net.buffers()])
    found = {"logits": ((q, n, c), kind), "test_logits": ((q, t, c), kind), "member": ((n,), bool)}
    return found | {"history": ((recipe.epochs, 3), np.float32), "weights": ((n_weights,), np.float32)}


def stored_bytes(recipe, dataset, ids):
    """Bytes that models `ids` take in the store; the weights of the first KEEP_WEIGHTS of all models are kept."""
    sizes = {n: int(np.prod(shape)) * np.dtype(kind).itemsize for n, (shape, kind) in layout(recipe, dataset).items()}
    return len(ids) * (sum(sizes.values()) - sizes["weights"]) + sum(k < KEEP_WEIGHTS for k in ids) * sizes["weights"]


def device_of(name="auto"):
    """torch.device of auto, cpu, cuda, cuda:1 or mps. Raises ValueError naming `device` if it is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    known = "auto", *there, *(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    need(name in known, f"device={name!r} is not available on this machine: choose auto, {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def precision_of(arch, device):
    """bfloat16 where it is fast (convolutions, on a GPU or a CPU with bfloat16 instructions), else float32."""
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        is_fast = re.search("avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text())
    return "bfloat16" if is_fast and not arch.startswith("mlp") else "float32"


def check(recipe, dataset, n_models, device="cpu"):
    """Raise ValueError naming the parameter if this ensemble can't be trained: called before any training."""
    n, shape, size = len(dataset.y), dataset.x.shape[1:], round(len(dataset.y) * recipe.subset)
    need(n_models % 2 == 0 < n_models, f"n_models={n_models!r}: models come in pairs; valid are even numbers from 2")
    need(n % 2 == 0 or recipe.subset != 0.5, f"n_examples={n} is odd: complementary halves need an even number")
    fine = dataset.is_image or not (recipe.augment or recipe.queries > 1)
    need(fine, f"augment={recipe.augment!r} needs images; an example here has shape {shape}")
    need(size < n, f"subset={recipe.subset!r} leaves none of {n} examples out")
    need(recipe.batch_size <= size, f"batch_size={recipe.batch_size!r} is larger than a model's {size} examples")
    mixes = networks.batchnorms(networks.build(recipe.arch, shape, dataset.n_classes)) and recipe.optimizer.is_private
    need(not mixes, f"arch={recipe.arch!r} has BatchNorm, which mixes the examples that {recipe.optimizer} keeps apart")
    trial.trial(recipe, shape, dataset.n_classes, device_of(device))
    membership(recipe, n, [0], dataset.groups)

"""Train many models at once, on random halves of one pool, into a resumable store.

    recipe = Recipe(arch="mlp", optimizer="sam", rho=0.3)
    ensemble = train(recipe, dataset, n_models=128, store="store")   # or finished models, read back
    ensemble.logits, ensemble.member                                  # [M, Q, N, C], [M, N]

Models 2k and 2k+1 split the pool between them. Model k's half, initial weights, batch order and augmentation
are a function of (seed, k) alone, so ensembles of two optimizers are paired model by model.
"""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

from lib.data.dataset import Dataset, inputs
from lib.training import networks, optimizers, step
from lib.training.recipe import Recipe, averaging, generator, learning_rate, membership
from lib.training.step import over_models, stepper, worth_compiling
from lib.training.store import Store

KEEP_WEIGHTS = 16  # the first models' weights are kept, to measure sharpness on
HALF = 1_000_000  # from so many logits a model on, they are stored in half precision (to 1 in 2,000)


# ---- a group of models, trained together --------------------------------------------------------------------


class Inputs:
    """The data on the device, once for all the models. Images are also held with a reflected border, for shifts."""

    def __init__(self, dataset, recipe, device):
        x, x_test = inputs(dataset)
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
    """Averages of the weights that take their place at the end; where neither is asked for, nothing.

    Of SWA, the mean at the ends of the last epochs (Izmailov et al. 2018, algorithm 1); of `ema`, the exponential
    moving average over all steps (Polyak & Juditsky 1992), whose memory grows from 10 steps to 1 / (1 - ema).
    """

    def __init__(self, recipe):
        start, _ = averaging(recipe) or (np.inf, 0)
        self.first, self.count, self.mean, self.ema = start * recipe.epochs, 0, {}, recipe.ema

    def after_step(self, number, params):
        """Take the weights after step `number` into the moving average."""
        if self.ema:
            self.mean, self.count = self.mean or {n: w.clone() for n, w in params.items()}, 1
            # m <- m + (1 - d) (w - m), d = min(ema, (1 + t) / (10 + t))
            share = 1 - min(self.ema, (1 + number) / (10 + number))
            torch._foreach_lerp_(list(self.mean.values()), list(params.values()), share)

    def after_epoch(self, number, params):
        """Take the weights at the end of epoch `number` into SWA's mean, if it is one of the last."""
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
        self.period = options.get("k", 1) if "is_kth_step" in recipe.named.wants else 1
        self.net = networks.build(recipe.arch, inputs.shape, inputs.n_classes).eval()
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

    def epoch(self, number, average):
        """Train one epoch, the Average looking on: the mean loss and accuracy over its batches, each [M]."""
        losses, accuracies = [], []
        for at, (x, y) in enumerate(self.batches(), number * self.per_epoch):
            lr = learning_rate(self.recipe, at, self.n_steps)
            loss, accuracy = self.stepper.step(x, y, self.context(at, lr), lr, at % self.period == 0)
            average.after_step(at, self.stepper.params)
            losses.append(loss)
            accuracies.append(accuracy)
        return torch.stack(losses).mean(0).cpu().numpy(), torch.stack(accuracies).mean(0).cpu().numpy()

    @torch.no_grad()
    def predict(self, x, block=None):
        """Logits [M, len(x), C] float32 in evaluation mode, always at full precision."""
        n_stacked, last = len(self.ids), len(self.ids) == 1 and networks.is_convolutional(self.net)
        state = {n: step.in_format(p, last) for n, p in self.stepper.params.items()}, self.stepper.buffers

        def logits(part):
            part = part.contiguous(memory_format=torch.channels_last) if last else part
            call = over_models(lambda p, b: functional_call(self.net, (p, b), (part,)), n_stacked)
            return call(*state).float().clamp(-6e4, 6e4).cpu().numpy()  # what half precision holds

        parts = x.split(block or step.block_for(self.inputs.device))
        return np.concatenate([logits(part) for part in parts], axis=1)

    def train(self, tick):
        """All the epochs. Returns history [M, epochs, 3]: train loss, train accuracy, test accuracy (some epochs)."""
        recipe, history = self.recipe, np.full((len(self.ids), self.recipe.epochs, 3), np.nan, np.float32)
        self.stuck = np.zeros(len(self.ids), bool)
        average = Average(recipe)
        for number in range(recipe.run_epochs):
            history[:, number, 0], history[:, number, 1] = self.epoch(number, average)
            average.after_epoch(number, self.stepper.params)
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
        net = networks.build(self.recipe.arch, self.inputs.shape, self.inputs.n_classes)
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
    dataset: Dataset
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
        net = networks.build(self.recipe.arch, self.dataset.x.shape[1:], self.dataset.n_classes).eval()
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
    return Store(store, *store_key(recipe, dataset), layout(recipe, dataset))


def layout(recipe, dataset):
    """What the store keeps of one model: array name -> (shape, dtype)."""
    net = networks.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes)
    n_weights = sum(t.numel() for t in [*net.parameters(), *net.buffers()])
    rows = recipe.queries, len(dataset.y), dataset.n_classes
    kind = np.float16 if np.prod(rows) >= HALF else np.float32
    return {
        "logits": (rows, kind),
        "test_logits": ((recipe.queries, len(dataset.y_test), dataset.n_classes), kind),
        "member": ((len(dataset.y),), bool),
        "history": ((recipe.epochs, 3), np.float32),
        "weights": ((n_weights,), np.float32),
    }


def store_key(recipe, dataset):
    """(readable name, everything that names the store by its hash) of a recipe on a data set."""
    name = re.sub(r"[^\w.]+", "-", f"{dataset.name}-{recipe.arch}-{recipe.optimizer}").strip("-")[:80]
    own = {"optimizer": optimizers.fingerprint(recipe.named), "arch": optimizers.source(recipe.arch)}
    fields = {n: v for n, v in asdict(recipe).items() if n != "ema" or v}  # without it, the key it always had
    return name, {"recipe": fields, "own": own, "data": dataset.hash}


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
    net, named = networks.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes), recipe.named
    networks.check_repeatable(net, recipe.arch, dataset.x.shape[1:])
    if "per_example" in named.wants and networks.has_batchnorm(net):
        raise ValueError(f"arch={recipe.arch!r} has BatchNorm, which mixes what {recipe.optimizer} must keep apart")
    if named.private and optimizers.asks_again(named):
        raise ValueError(
            f"optimizer={recipe.optimizer!r}: {named.base_name} asks for gradients anew within a step, with the same "
            "noise, which no accountant counts: choose another base"
        )
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
    train_missing(recipe, dataset, n_models, kept, device, quiet, notify)
    return finished(recipe, dataset, n_models, kept)


def finished(recipe, dataset, n_models, kept):
    """The Ensemble of models 0..n_models-1, all of which the store has; diverged ones are said and left out."""
    lost = {k for k in range(n_models) if kept.flag(k)["status"] == "diverged"}
    if lost:
        print(f"{kept.folder.name}: models {sorted(lost)} diverged: they and their partners are left out", flush=True)
    ids = np.array([k for k in range(n_models) if not {k, k ^ 1} & lost], int)
    return Ensemble(recipe, dataset, kept, ids)


def stored_bytes(recipe, dataset, ids):
    """Bytes that models `ids` of the recipe take in the store, the weights of the first ones among them included."""
    sizes = {n: int(np.prod(shape)) * np.dtype(kind).itemsize for n, (shape, kind) in layout(recipe, dataset).items()}
    return len(ids) * (sum(sizes.values()) - sizes["weights"]) + sum(k < KEEP_WEIGHTS for k in ids) * sizes["weights"]


def predicted_memory(recipe, dataset, device):
    """Bytes that training a chunk takes at its peak: `step.predicted_memory` and the data on the device."""
    shape = dataset.x.shape[1:]
    n_stacked = step.lanes_that_fit(recipe, shape, dataset.n_classes, device)
    held = 4 * (dataset.x.size + dataset.x_test.size) * (1 + 2 * (recipe.augment or recipe.queries > 1))
    return step.predicted_memory(recipe, shape, dataset.n_classes, n_stacked) + held


def chunks_of(recipe, dataset, device, n_models=1):
    """The chunks of models that train together: a list of lists that covers models 0..n_models-1 and maybe more."""
    n_stacked = step.lanes_that_fit(recipe, dataset.x.shape[1:], dataset.n_classes, device)
    return [list(range(s, s + n_stacked)) for s in range(0, n_models, n_stacked)]


def chunks(recipe, dataset, n_models, kept, device):
    """The chunks of models that train together and lack a wanted one: a list of lists of models.

    They start at multiples of their size, so a resumed or a longer run trains model k beside the same others, and
    its arrays come out the same to the last bit.
    """
    whole = chunks_of(recipe, dataset, device, n_models)
    return [ids for ids in whole if any(kept.flag(k) is None for k in ids if k < n_models)]


def train_missing(recipe, dataset, n_models, kept, device, quiet=False, notify=None, wait=True):
    """Train each chunk that lacks a wanted model and that no other process is training.

    wait: for what others are training, until the store has all; a process that dies meanwhile leaves its chunk to us.
    """
    inputs = None
    while todo := chunks(recipe, dataset, n_models, kept, device):
        inputs = inputs or Inputs(dataset, recipe, device)
        some = train_chunks(recipe, inputs, todo, kept, quiet, notify)
        if not wait:
            return
        if not some:
            print(f"another run is training {kept.folder.name}: waiting for it", flush=True)
            while not any_free(kept, todo):
                time.sleep(0.5)


def any_free(kept, todo):
    """True once one of the chunks is finished, or nobody trains it any more."""
    for ids in todo:
        if all(kept.flag(k) for k in ids) or (lock := kept.claim(ids[0])) and lock.release() is None:
            return True
    return False


def train_chunks(recipe, inputs, todo, kept, quiet=False, notify=None):
    """Train those of the chunks that can be claimed: how many. One is saved while the next trains."""
    kept.check_disk(sum(map(len, todo)), {"weights": KEEP_WEIGHTS})
    label, saved = f"{recipe.optimizer} rho {recipe.rho}, {sum(map(len, todo))} models", []
    bar = tqdm(total=recipe.run_epochs * len(todo), desc=label, unit="epoch", leave=False, disable=quiet, mininterval=1)
    with bar, ThreadPoolExecutor(1) as writer:
        for ids in todo:
            lock = kept.claim(ids[0])
            if lock is None or all(kept.flag(k) for k in ids):  # another process trains or has just finished it
                release(lock)
                bar.update(recipe.run_epochs)
                continue
            try:
                began = time.time()
                arrays = trained(recipe, inputs, ids, bar.update)
                seconds = time.time() - began
                [one.result() for one in saved[-1:]]  # raises what went wrong there
            except BaseException:
                release(lock)
                raise
            saved.append(writer.submit(save_chunk, kept, ids, arrays, lock, seconds / len(ids), inputs.device))
            if notify:
                notify(recipe, len(inputs.y), len(ids), seconds)
    [one.result() for one in saved]
    return len(saved)


def release(lock):
    if lock is not None:
        lock.release()


def trained(recipe, inputs, ids, tick):
    """Train models `ids` together: what the store keeps of each, name -> [len(ids), ...]. Where memory runs out, half
    of them at a time. Raises ValueError if it does not suffice for one."""
    try:
        group = Group(recipe, inputs, ids)
        history = group.train(tick)
        return group.arrays(history) | {"stuck": group.stuck}
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):  # so a CPU says it
            raise
        if len(ids) == 1:
            raise ValueError(
                f"batch_size={recipe.batch_size}: the memory of {inputs.device} does not suffice for one "
                f"{recipe.arch}: choose a smaller batch_size or arch"
            ) from error
    step.STEPPERS.clear()
    torch.cuda.empty_cache()
    few, many = len(ids) // 2, len(ids)
    print(f"memory ran out on {inputs.device}: {few} models are trained at once instead of {many}", flush=True)
    halves = [trained(recipe, inputs, half, tick) for half in (ids[:few], ids[few:])]
    return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}


def save_chunk(kept, ids, arrays, lock, seconds, device):
    """Save those of the models that the store lacks, and free their claim. seconds: of one model."""
    try:
        for lane, k in enumerate(ids):
            if kept.flag(k) is None:
                status = "diverged" if arrays["stuck"][lane] else "finished"
                rows = {n: arrays[n][lane] for n in kept.rows if n != "weights" or k < KEEP_WEIGHTS}
                kept.save(k, rows, status=status, seconds=seconds, device=str(device), torch=torch.__version__)
    finally:
        lock.release()

"""The bench's sections on a GPU: networks for images on halves of 50,000, by PRESET=fast, and the peers' way beside it.

A section yields rows (name, value, unit, baseline, ratio, goal). Without a GPU each row says "not measured"; the
same functions take any device, and tests/benchmarks/test_bench.py runs them on the processor at toy size.
"""

import tempfile
from dataclasses import fields, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Examples

from benchmarks.cpu import in_turn, seconds
from lib.data.dataset import Dataset, load, pool
from lib.training import ensemble, networks, optimizers, step
from lib.training.recipe import Recipe, learning_rate, membership

# arch -> (models a GPU-minute that are wanted of SGD, of SAM; models timed)
WANTED = {"resnet9": (10, 5, 4), "resnet18": (1, 0.5, 2)}
RATE, REACHED, STEP, PEAK = "models a GPU-minute", "train accuracy", "a step", "peak GPU memory beside the data"
PEERS = {"float32": False, "autocast": True}


def expected(arch):
    """Every row of a network without its numbers: key -> (name, unit, baseline, goal)."""
    rows = {}
    for optimizer, goal in zip(("sgd", "sam"), WANTED[arch], strict=False):
        rows[optimizer, RATE] = f"{arch}, {optimizer}, trained to the end", RATE, "", f">= {goal:g}"
        rows[optimizer, REACHED] = f"{arch}, {optimizer}: {REACHED}, the lowest of the models", "", "", ">= 0.99"
        rows[optimizer, PEAK] = f"{arch}, {optimizer}: {PEAK}", "GB", "predicted", "<= 1"
    rows["sam", STEP] = f"{arch}, sam: {STEP}", "ms", "sgd step", "<= 2.05"
    for kind in PEERS:
        against = f"DataLoader loop, {kind}, as many steps"
        rows["sgd", kind] = f"{arch}, sgd: a model", "s", against, ">= 10"
    return rows


def photographs(n=50_000, t=10_000, side=32, classes=10):
    """Made-up images, uint8 [n, 3, side, side]: a pattern of the class under noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 64, (classes, 3, side, side), np.uint8)
    y, y_test = np.arange(n) % classes, np.arange(t) % classes
    x, x_test = (patterns[of] + rng.integers(0, 192, (len(of), 3, side, side), np.uint8) for of in (y, y_test))
    return Dataset("synthetic", x, y, x_test, y_test, tuple(str(label) for label in range(classes)))


def recipes_of(arch, device):
    """PRESET=fast for this network with SGD and with SAM, as the study trains it on this device."""
    from lib.study import settings

    given = settings.PRESETS["fast"]["image"]
    known = {field.name: given[field.name] for field in fields(Recipe) if field.name in given}
    known |= {"arch": arch, "precision": settings.precision_of(arch, device)}
    return [Recipe(**{**known, "optimizer": optimizer}) for optimizer in ("sgd", "sam")]


# ---- this library's way -------------------------------------------------------------------------------------


def wait(device):
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trained(recipe, dataset, n_models, device):
    """(seconds a model, lowest train accuracy of them) of a whole training into a store.

    The step is compiled beforehand, by one epoch of another seed.
    """
    with tempfile.TemporaryDirectory() as folder:
        warm = replace(recipe, seed=recipe.seed + 1, stop=1 / recipe.epochs)
        ensemble.train(warm, dataset, 2, folder, str(device), quiet=True)
        wait(device)
        found = []
        taken = seconds(lambda: found.append(ensemble.train(recipe, dataset, n_models, folder, str(device), True)))
        made = found[0]
        in_all = len(list(made.store.folder.glob("done/*.json")))  # a whole group, where it is larger
        hits = np.asarray(made.logits[:, 0]).argmax(-1) == dataset.y
        fits = [hits[k][made.member[k]].mean() for k in range(len(made.ids))]
    return taken / in_all, float(min(fits, default=np.nan))


def most_used(work, device):
    """(result of work, bytes that it held on the device at its peak; None where the device does not count them)."""
    if device.type != "cuda":
        return work(), None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    return result, torch.cuda.max_memory_allocated(device) - before


def beside_the_data(most, recipe, inputs):
    """(GB at the peak without the data, ratio to what was predicted) of bytes at the peak."""
    if most is None:
        return "not measured", ""
    net = networks.build(recipe.arch, inputs.shape, inputs.n_classes)
    n_stacked = step.lanes_for(net, inputs.device)
    rest = most - sum(tensor.nbytes for tensor in vars(inputs).values() if torch.is_tensor(tensor))
    return rest / 1e9, rest / step.predicted_memory(recipe, inputs.shape, inputs.n_classes, n_stacked)


def steps_of(recipe, inputs, device):
    """One epoch's steps of one model, warm, as a function without arguments; and how many they are."""
    group = ensemble.Group(recipe, inputs, [0])

    def epoch():
        for at, (x, y) in enumerate(group.batches()):
            lr = learning_rate(recipe, at, group.n_steps)
            group.stepper.step(x, y, group.context(at, lr), lr, at % group.period == 0)
        wait(device)

    epoch()
    return epoch, group.per_epoch


# ---- the peers' way -----------------------------------------------------------------------------------------


class Pictures(Examples):
    """The half of model 0 as torchvision's data sets give it: a picture at a time, transformed when it is asked for."""

    def __init__(self, dataset, recipe):
        from torchvision import transforms

        self.index = np.flatnonzero(membership(recipe, len(dataset.y), [0])[0])
        self.x, self.y = np.ascontiguousarray(dataset.x.transpose(0, 2, 3, 1)), dataset.y
        side = dataset.x.shape[-1]
        moved = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(side, padding=side // 8)]
        plain = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
        self.transform = transforms.Compose([*(moved if recipe.augment else []), *plain])

    def __len__(self):
        return len(self.index)

    def __getitem__(self, at):
        k = self.index[at]
        return self.transform(Image.fromarray(self.x[k])), int(self.y[k])


def peers_epoch(recipe, dataset, device, workers, autocast):
    """One epoch as most shadow-model code runs it (a DataLoader, a step, .item()), warm, without arguments."""
    pinned = device.type == "cuda"
    how = dict(shuffle=True, drop_last=True, num_workers=workers, pin_memory=pinned, persistent_workers=workers > 0)
    loader = DataLoader(Pictures(dataset, recipe), recipe.batch_size, **how)
    net = networks.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes).to(device)
    optimizer = optimizers.build(
        recipe.named, list(net.parameters()), learning_rate(recipe, 0, 100), recipe.momentum, recipe.weight_decay
    )

    def epoch():
        net.train()
        total = 0.0
        for x, y in loader:
            x, y = x.to(device, non_blocking=pinned), y.to(device, non_blocking=pinned)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        wait(device)

    epoch()
    return epoch


# ---- the rows -----------------------------------------------------------------------------------------------


def measured(sgd, sam, dataset, device, n_models, workers=4, rounds=3):
    """(key of `expected`, value, ratio) as they are measured, of two recipes; the epochs of a ratio take turns."""
    step.STEPPERS.clear()  # of networks measured before
    inputs, model = ensemble.Inputs(dataset, sgd, device), {}
    for recipe in (sgd, sam):
        name, work = recipe.optimizer, partial(trained, recipe, dataset, n_models, device)
        (model[name], fits), most = most_used(work, device)
        yield (name, RATE), 60 / model[name], ""
        yield (name, REACHED), fits, ""
        yield (name, PEAK), *beside_the_data(most, recipe, inputs)
    (one, _), (two, steps) = (steps_of(recipe, inputs, device) for recipe in (sgd, sam))
    peers = {kind: peers_epoch(sgd, dataset, device, workers, autocast) for kind, autocast in PEERS.items()}
    taken = in_turn({"sgd": one, "sam": two, **peers}, rounds)
    yield ("sam", STEP), 1e3 * taken["sam"] / steps, taken["sam"] / taken["sgd"]
    for kind in PEERS:
        yield ("sgd", kind), model["sgd"], taken[kind] * sgd.run_epochs / model["sgd"]


def images(path):
    """CIFAR-10 from a path; without one, made-up images."""
    return load("cifar10", path) if path else photographs()


def gpu(arch, path=None, device="cuda"):
    """The rows of one network; "not measured" in each where there is no GPU."""
    rows = expected(arch)
    if device == "cuda" and not torch.cuda.is_available():
        yield from ((name, "not measured", "", baseline, "", goal) for name, _, baseline, goal in rows.values())
        return
    device, dataset = torch.device(device), pool(images(path))
    for key, value, ratio in measured(*recipes_of(arch, device), dataset, device, WANTED[arch][2]):
        name, unit, baseline, goal = rows[key]
        yield f"{name} (halves of {len(dataset.y)}, {dataset.name})", value, unit, baseline, ratio, goal

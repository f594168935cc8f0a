"""The bench's sections on a GPU: networks for images on halves of 50,000, by PRESET=fast, beside the usual loop.

A section yields rows (name, value, unit, baseline, ratio, goal). Without a GPU each row says "not measured". The same
functions take any device: tests/benchmarks/test_bench.py runs them on the processor at toy size.
"""

import tempfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Examples

from benchmarks.cpu import in_turn, seconds
from lib.data.dataset import Dataset, load, pool
from lib.study import settings
from lib.training import Recipe, ensemble, networks, train
from lib.training.recipe import learning_rate, membership

# arch -> (models a GPU-minute that are wanted of SGD, of SAM; models timed)
WANTED = {"resnet9": (10, 5, 4), "resnet18": (1, 0.5, 2)}
PEERS = {"float32": False, "autocast": True}  # how the usual loop computes -> whether by autocast


def photographs(n=50_000, t=10_000, side=32, classes=10):
    """Made-up images, uint8 [n, 3, side, side]: a pattern of the class under noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 64, (classes, 3, side, side), np.uint8)
    y, y_test = np.arange(n) % classes, np.arange(t) % classes
    x, x_test = (patterns[of] + rng.integers(0, 192, (len(of), 3, side, side), np.uint8) for of in (y, y_test))
    return Dataset("synthetic", x, y, x_test, y_test, tuple(str(label) for label in range(classes)))


def images(path):
    """CIFAR-10 from a path; without one, made-up images."""
    return load("cifar10", path) if path else photographs()


def recipes_of(arch, device):
    """PRESET=fast for this network with SGD and with SAM, as the study trains it on this device."""
    given = settings.PRESETS["fast"]["image"]
    known = {field.name: given[field.name] for field in fields(Recipe) if field.name in given}
    known |= {"arch": arch, "precision": ensemble.precision_of(arch, device)}
    return [Recipe(**{**known, "optimizer": optimizer}) for optimizer in ("sgd", "sam")]


# ---- this library's way -------------------------------------------------------------------------------------


def wait(device):
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trained(recipe, dataset, n_models, device):
    """(seconds a model, lowest train accuracy, peak GB on the device) of a whole training into a new store.

    The step is compiled beforehand, by one epoch of another seed.
    """
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as another:
        warm = replace(recipe, seed=recipe.seed + 1, stop=1 / recipe.epochs)
        train(warm, dataset, 2, another, str(device), quiet=True)
        wait(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        found = []
        taken = seconds(lambda: found.append(train(recipe, dataset, n_models, folder, str(device), quiet=True)))
        made = found[0]
        hits = np.asarray(made.logits[:, 0]).argmax(-1) == dataset.y
        in_all = len(list(Path(folder).glob("*/done/*.json")))  # a whole stack, where that is larger
        fits = [hits[k][made.member[k]].mean() for k in range(len(made.ids))]
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else "not measured"
    return taken / in_all, float(min(fits, default=np.nan)), peak


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
    settings = learning_rate(recipe, 0, 100), recipe.momentum, recipe.weight_decay
    optimizer = recipe.optimizer.build(list(net.parameters()), *settings)

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


def gpu(arch, path=None, device="cuda", workers=4, rounds=3):
    """The rows of one network; a single row "not measured" where there is no GPU."""
    *goals, n_models = WANTED[arch]
    if device == "cuda" and not torch.cuda.is_available():
        yield f"{arch}, on a GPU", "not measured", "", "", "", ""
        return
    device, dataset, model = torch.device(device), pool(images(path)), {}
    sgd, sam = recipes_of(arch, device)
    note = f"(halves of {len(dataset.y)}, {dataset.name})"
    for name, recipe, goal in zip(("sgd", "sam"), (sgd, sam), goals, strict=True):
        model[name], fits, most = trained(recipe, dataset, n_models, device)
        yield f"{arch}, {name}, trained to the end {note}", 60 / model[name], "models a minute", "", "", f">= {goal:g}"
        yield f"{arch}, {name}: train accuracy, the lowest of the models {note}", fits, "", "", "", ">= 0.99"
        yield f"{arch}, {name}: peak GPU memory {note}", most, "GB", "", "", ""
    yield f"{arch}, sam: a model {note}", model["sam"], "s", "sgd", model["sam"] / model["sgd"], "<= 2.05"
    epoch = in_turn({kind: peers_epoch(sgd, dataset, device, workers, cast) for kind, cast in PEERS.items()}, rounds)
    for kind, taken in epoch.items():
        against, ratio = f"DataLoader loop, {kind}, as many steps", taken * sgd.run_epochs / model["sgd"]
        yield f"{arch}, sgd: a model {note}", model["sgd"], "s", against, ratio, ">= 10"

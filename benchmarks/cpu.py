"""The bench's sections on the processor (run by `bench.py`).

A section yields rows (name, value, unit, baseline, ratio, goal, limit). Both sides of a ratio are measured here, in
turn. limit: what the ratio, or the value where there is none, would be if only the physics of this machine counted.
"""

import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lib.analysis import influence
from lib.attacks import catalogue
from lib.attacks.signals import threads
from lib.data.dataset import inputs
from lib.training import Recipe, ensemble, networks, train, workers
from lib.training.recipe import membership

RECIPE = Recipe(epochs=100, batch_size=64)
MAIN = replace(RECIPE, epochs=40)  # as the study trains its main ensembles on digits
SHORT = replace(RECIPE, epochs=5)
IMAGES = Recipe(arch="cnn", epochs=20, batch_size=64, precision=ensemble.precision_of("cnn", torch.device("cpu")))


def say(text):
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


# ---- measuring ----------------------------------------------------------------------------------------------


def seconds(work, repeats=1):
    """Wall-clock seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def median(numbers):
    return float(np.median(numbers))


def in_turn(works, rounds=3):
    """Seconds of several works, done A B C A B C. A ratio is the median of the rounds' ratios: what slows the machine
    for a while slows both sides of it.

    works: dict name -> function without arguments. Returns dict name -> seconds [rounds].
    """
    times = {name: [] for name in works}
    for number in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
            say(f"    round {number + 1} of {rounds}, {name}: {times[name][-1]:.3g} s")
    return {name: np.array(taken) for name, taken in times.items()}


def fresh(function, *args):
    """What a function yields in a process of its own: its peak memory is nobody else's, and nothing is warm."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield from pool.submit(listed, function, *args).result()


def listed(function, *args):
    return list(function(*args))


def peak():
    """Peak memory of this process so far, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory before the process was its own
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def processor_seconds():
    """Seconds [in the kernel, in all] that this process and those below it have spent so far."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return np.array([sum(t.system for t in times), sum(t.system + t.user for t in times)])


# ---- what the machine can do --------------------------------------------------------------------------------


def large_products(n=2048, repeats=10):
    """(operations, works) of float32 products of large matrices: by sgemm, as a program would ask for them, and by
    oneDNN, which uses all of the processor's vector width where the BLAS does not (MKL on AMD's processors)."""
    a, out = torch.rand(n, n), torch.empty(n, n)
    works = {"sgemm": lambda: [torch.mm(a, a, out=out) for _ in range(repeats)]}
    if torch.backends.mkldnn.is_available():
        held = a.to_mkldnn()
        works["oneDNN"] = lambda: [F.linear(held, held) for _ in range(repeats)]
    return 2 * n**3 * repeats, works


def products(dataset, recipe, n_stacked=32, repeats=100):
    """(operations of one model's step, models' steps, the work) of the matrix products of an MLP's training, alone."""
    net, pairs = networks.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes), []
    for depth, layer in enumerate(m for m in net.modules() if isinstance(m, torch.nn.Linear)):
        w = torch.rand(n_stacked, layer.out_features, layer.in_features)
        d, x = (torch.rand(n_stacked, recipe.batch_size, width) for width in w.shape[1:])
        pairs += [(x, w.mT), (d.mT, x), (d, w)][: 3 if depth else 2]  # the input needs no gradient
    made = [a @ b for a, b in pairs]
    flops = sum(2 * a[0].numel() * b.shape[-1] for a, b in pairs)

    def work():
        for _ in range(repeats):
            for (a, b), out in zip(pairs, made, strict=True):
                torch.bmm(a, b, out=out)

    return flops, n_stacked * repeats, work


def convolutions(dataset, recipe, form, repeats=20):
    """The convolutions of so many steps of one model, with their gradients, alone and on one thread.

    form: of memory, contiguous_format or channels_last.
    """
    how, seen = {"dtype": getattr(torch, recipe.precision), "memory_format": getattr(torch, form)}, []

    def keep(layer, args, out):
        x, w = (t.detach().to(**how).requires_grad_() for t in (args[0], layer.weight))
        seen.append((x, w, layer.stride, layer.padding, torch.rand_like(out).to(**how)))

    net = networks.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes)
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(keep)
    net(torch.from_numpy(inputs(dataset)[0][: recipe.batch_size]))

    def work():
        with threads(1):
            for depth, (x, w, stride, padding, d) in list(enumerate(seen)) * repeats:
                # the images need no gradient
                torch.autograd.grad(F.conv2d(x, w, None, stride, padding), (x, w) if depth else w, d)

    return work


# ---- one model at a time, as others do it, and many at once -------------------------------------------------


def half(dataset):
    """Inputs and labels of model 0's half, as tensors."""
    chosen = np.flatnonzero(membership(RECIPE, len(dataset.y), [0])[0])
    return torch.from_numpy(inputs(dataset)[0][chosen]), torch.from_numpy(dataset.y[chosen])


def one_model(batches, dataset, recipe, times=1):
    """Train a network on the half of model 0 with autograd and torch.optim, several times over.

    batches(): the batches of an epoch.
    """
    for _ in range(times):
        net = networks.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes)
        optimizer = recipe.optimizer.build(list(net.parameters()), recipe.lr, recipe.momentum, recipe.weight_decay)
        for _ in range(recipe.epochs):
            for x, y in batches():
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()


def lean_loop(dataset, recipe, times=1):
    """Tensors indexed by a permutation: no loader, no copies. Trained at the number of threads that is fastest."""
    x, y = half(dataset)

    def batches():
        for index in torch.randperm(len(y))[: len(y) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size):
            yield x[index], y[index]

    def run(count):
        with threads(count):
            one_model(batches, dataset, recipe, times)

    found = in_turn({count: lambda count=count: run(count) for count in range(1, torch.get_num_threads() + 1)}, 2)
    return lambda: run(min(found, key=lambda count: median(found[count])))


def loader_loop(dataset, recipe, times=1):
    """What most shadow-model code does: a shuffling DataLoader."""
    loader = DataLoader(TensorDataset(*half(dataset)), batch_size=recipe.batch_size, shuffle=True, drop_last=True)
    return lambda: one_model(lambda: iter(loader), dataset, recipe, times)


def many(dataset, recipe, n_models):
    """Training n_models as the study does, from random weights to a new store. It is warm: code is compiled."""

    def run(recipe):
        with tempfile.TemporaryDirectory() as folder:
            train(recipe, dataset, n_models, folder, "cpu", quiet=True)

    taken = seconds(lambda: run(replace(recipe, seed=recipe.seed + 1, stop=0.5)))
    say(f"    {recipe.optimizer}, {n_models} {recipe.arch}: compiled, and trained to the half, in {taken:.3g} s")
    return lambda: run(recipe)


# ---- the sections -------------------------------------------------------------------------------------------


def n_steps(dataset, recipe):
    """Steps of one model."""
    return recipe.epochs * (len(dataset.y) // 2 // recipe.batch_size)


def training(dataset, recipe=RECIPE, count=64, times=4, rounds=3):
    """SGD beside its own matrix products, and beside the usual loops on one model."""
    (flops, steps, alone), (large, dense) = products(dataset, recipe), large_products()
    loops = {"lean loop": lean_loop(dataset, recipe, times), "DataLoader loop": loader_loop(dataset, recipe, times)}
    taken = in_turn({**loops, **dense, "products": alone, "SGD": many(dataset, recipe, count)}, rounds)
    rate, most = large / taken["sgemm"], large / min(median(taken[name]) for name in dense)
    needed, sgd = flops * n_steps(dataset, recipe), taken["SGD"] / count  # operations and seconds of a model
    row = f"SGD, {count} MLPs on digits", 1e3 * median(sgd), "ms a model"
    limit = f"these products alone at {most / 1e9:.0f} GFLOP/s, the most of any product here"
    batched = flops * steps / median(taken["products"])
    others = f"sgemm makes {median(rate) / 1e9:.0f}, and bmm on the models' own shapes {batched / 1e9:.0f}"
    limit_of_all = f"{most / median(rate):.1f}: {limit}; {others}"
    yield *row, "its matrix products by sgemm", median(needed / rate / sgd), ">= 0.45", limit_of_all
    for loop, goal in (("lean loop", ">= 5"), ("DataLoader loop", ">= 8")):
        each = taken[loop] / times
        yield *row, f"{loop}, one model", median(each / sgd), goal, f"{median(each) * most / needed:.0f}: {limit}"


def rules(dataset, recipe=RECIPE, count=64, few=32, rounds=5):
    """SAM and private training beside SGD; how much of it all the kernel takes."""
    given = {"SGD": {}, "SAM": {"optimizer": "sam", "rho": 0.3}, "private SGD": {"optimizer": "dpsgd"}}
    sizes = {"SGD": count, "SAM": count, "private SGD": few}
    ours = {name: many(dataset, replace(recipe, **given[name]), size) for name, size in sizes.items()}
    rng, numbers, spent = np.random.default_rng(0), np.empty(10**7, np.float32), np.zeros(2)

    def watched(work):
        before = processor_seconds()
        work()
        spent.__iadd__(processor_seconds() - before)

    works = {name: partial(watched, work) for name, work in ours.items()}
    taken = in_turn({**works, "noise": lambda: rng.standard_normal(out=numbers, dtype=np.float32)}, rounds)
    sgd, sam, private = (taken[name] / size for name, size in sizes.items())
    limit = "2: the gradients of a step, where nothing else takes time"
    yield f"SAM, {count} MLPs on digits", 1e3 * median(sam), "ms a model", "SGD", median(sam / sgd), "<= 2.05", limit
    net = networks.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes)
    speed = torch.get_num_threads() * len(numbers) / median(taken["noise"])
    noise = n_steps(dataset, recipe) * sum(p.numel() for p in net.parameters()) / speed
    least, rate = 1 + noise / median(sgd), f"{speed / 1e6:.0f} million numbers a second"
    limit = f"{least:.2f}: SGD and noise for each weight and step, {rate}"
    name, ratio = f"private SGD, {few} MLPs on digits", median(private / sgd)
    yield name, 1e3 * median(private), "ms a model", "SGD", ratio, "<= 3", limit
    kernel, limit = 100 * spent[0] / spent[1], "0: memory is taken from the kernel once, then used again"
    yield f"kernel's share of processor time, {', '.join(ours)}", kernel, "%", "", "", "<= 10", limit


def images(dataset, recipe=IMAGES, count=10, rounds=3):
    """The small network for images, beside the usual loop and its own convolutions."""
    forms = {
        f"convolutions, {form}": convolutions(dataset, recipe, form) for form in ("contiguous_format", "channels_last")
    }
    works = {"ours": many(dataset, recipe, count), "lean loop": lean_loop(dataset, recipe)}
    taken = in_turn({**works, **forms}, rounds)
    least = n_steps(dataset, recipe) * min(median(taken[form]) for form in forms) / 20 / torch.get_num_threads()
    each, lean, size = taken["ours"] / count, taken["lean loop"], "x".join(map(str, dataset.x.shape[1:]))
    name = f"SGD, {count} small CNNs on {len(dataset.y) // 2} images of {size}"
    limit = f"{median(lean) / least:.1f}: its convolutions alone in {recipe.precision}, one model on each core"
    yield name, median(each), "s a model", "lean loop, one model", median(lean / each), ">= 1", limit


def first_and_second(dataset, recipes, count):
    """Seconds of training `count` models by each recipe in a process that never did, and of doing so once more."""
    for seed in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            for recipe in recipes:
                train(replace(recipe, seed=seed), dataset, count, folder, "cpu", quiet=True)
            yield time.perf_counter() - start
    if (n := workers.n_processes(recipes[0], dataset, torch.device("cpu"))) > 1:
        workers.processes(n, os.getpid()).shutdown(kill_workers=True)  # this process would wait for them


def compiling(dataset, recipe=MAIN, count=64, main=512):
    """What comes before the first step where no compiled code is kept, beside the main ensembles of SGD and SAM."""
    recipes = [recipe, replace(recipe, optimizer="sam", rho=0.3)]
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        (cold, warm), (kept, later) = (fresh(first_and_second, dataset, recipes, count) for _ in range(2))
    start, whole = cold - warm, (warm + later) / 2 / count * main
    name, against = "processes and code, until the first step", f"training of {main} SGD and {main} SAM models"
    limit = f"0: {kept - later:.1f} s where the code of an earlier run is kept"
    yield f"{name}, nothing kept", start, "s", against, start / whole, "<= 0.25", limit


def made_logits(n_models, n):
    """Logits [M, N, 10] in float16 in which members stand out, labels [N] and membership [M, N]."""
    rng = np.random.default_rng(0)
    y, member = rng.integers(0, 10, n), membership(RECIPE, n, range(n_models))
    logits = np.empty((n_models, n, 10), np.float16)
    for k in range(n_models):
        logits[k] = rng.standard_normal((n, 10), dtype=np.float32)
        logits[k, np.arange(n), y] += 2 + member[k]
    return logits, y, member


def scoring(n_models=256, n=50_000):
    """All the attacks on all the targets, from logits in float16."""
    libraries, size, found = peak(), f"{n_models} x {n:,} examples", {}
    logits, y, member = made_logits(n_models, n)
    taken = seconds(lambda: found.update(catalogue.run(logits, y, member)))
    most, held = peak(), sum(array.nbytes for array in (logits, y, member, *found.values())) / 1e9
    source, copy = torch.from_numpy(logits), torch.empty(logits.shape, dtype=torch.float16)
    speed = 2 * logits.nbytes / seconds(lambda: copy.copy_(source), repeats=5)  # read and written
    limit = f"{logits.nbytes / speed:.2g}: {logits.nbytes / 1e6:.0f} MB of logits read once, at {speed / 1e9:.0f} GB/s"
    yield f"all {len(found)} attacks on {size}", taken, "s", "", "", "<= 5", limit
    limit = f"{libraries + held:.2g}: the libraries {libraries:.2g}, the logits and the scores {held:.2g}"
    yield f"peak memory of these attacks on {size}", most, "GB", "", "", "<= 2", limit


def influences(m=2000, n=50_000, t=10_000):
    """All influences of the paper's scale, block by block, from random memberships and outcomes."""
    rng = np.random.default_rng(0)
    member, values = rng.random((m, n), np.float32) < 0.5, rng.random((m, t), np.float32) < 0.9
    large, dense = large_products()

    def every():
        for _, block in influence.influence_blocks(member, values):
            assert block.shape[0] == n

    taken = in_turn({**dense, "influence": every}, rounds=2)
    rate, best = 2 * m * n * t / taken["influence"], large / taken["sgemm"]
    most = large / min(median(taken[name]) for name in dense)
    limit = f"{most / median(best):.1f}: one product at {most / 1e9:.0f} GFLOP/s, the most of any product here"
    name = f"influence of {n:,} on {t:,} examples, {m:,} models"
    yield name, median(rate) / 1e9, "GFLOP/s", "sgemm", median(rate / best), ">= 0.5", limit


def memory(dataset, recipe=SHORT, counts=(32, 256)):
    """Peak memory of training few and then many models in one process."""
    after = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            train(recipe, dataset, count, folder, "cpu", quiet=True)
        after.append(peak())
    name, limit = f"peak memory after {counts[1]} MLPs", "1: models that are stored leave the memory"
    yield name, after[1], "GB", f"after {counts[0]}", after[1] / after[0], "<= 1.1", limit

"""The bench's sections on the processor: training, variants, memory, scoring, influence (run by `bench.py`).

A section yields rows (name, value, unit, baseline, ratio, goal); both sides of a ratio are measured here, in turn.
"""

import math
import resource
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lib.analysis import influence
from lib.attacks import catalogue, neural
from lib.data.dataset import inputs
from lib.training import Recipe, networks, step, train, workers
from lib.training.recipe import membership

RECIPE = Recipe(epochs=100, batch_size=64)
SHORT = replace(RECIPE, epochs=5)
# gradients a step, and forward passes alone at a third of one
PASSES = {"sam": 2, "asam": 2, "gsam": 2, "looksam(k=5)": 1.2, "msam": 2, "fsam": 2, "esam": 1 + 1 / 3 + 0.5}


def say(text):
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def peak():
    """Peak memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def seconds(work, repeats=1):
    """Wall-clock seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def in_turn(works, rounds=3):
    """Median seconds of each of several works, done A B C A B C: what slows the machine for a while slows them all.

    works: dict name -> function without arguments. Returns dict name -> seconds.
    """
    times = {name: [] for name in works}
    for number in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
            say(f"    round {number + 1} of {rounds}, {name}: {times[name][-1]:.3g} s")
    return {name: float(np.median(taken)) for name, taken in times.items()}


def fresh(section, *args):
    """A section's rows from a process of its own: the peak memory it reports is nobody else's."""
    with get_context("spawn").Pool(1) as pool:
        yield from pool.apply(rows_of, (section, args))


def rows_of(section, args):
    return list(section(*args))


# ---- one model at a time, as others do it -------------------------------------------------------------------


def one_model(dataset, batches, recipe=RECIPE):
    """Train one MLP on the half of model 0 with autograd and torch.optim."""
    net = networks.build("mlp", dataset.x.shape[1:], dataset.n_classes)
    optimizer = recipe.optimizer.build(list(net.parameters()), recipe.lr, recipe.momentum, recipe.weight_decay)
    for _ in range(recipe.epochs):
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()


def half(dataset):
    """Inputs and labels of model 0's half, as tensors."""
    chosen = np.flatnonzero(membership(RECIPE, len(dataset.y), [0])[0])
    return torch.from_numpy(inputs(dataset)[0][chosen]), torch.from_numpy(dataset.y[chosen])


def lean_batches(dataset, size):
    """Index a tensor by a permutation: no loader, no workers, no copies."""
    x, y = half(dataset)

    def batches():
        for index in torch.randperm(len(y))[: len(y) // size * size].split(size):
            yield x[index], y[index]

    return batches


def loader_batches(dataset, size):
    """What most shadow-model code does: a shuffling DataLoader."""
    loader = DataLoader(TensorDataset(*half(dataset)), batch_size=size, shuffle=True, drop_last=True)
    return lambda: iter(loader)


@contextmanager
def threads(count):
    """So many threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lean_loop(dataset, recipe):
    """The lean loop on one model, as a function without arguments, at the number of threads that is fastest for it."""
    batches = lean_batches(dataset, recipe.batch_size)

    def run(count):
        with threads(count):
            one_model(dataset, batches, recipe)

    counts = range(1, torch.get_num_threads() + 1)
    found = in_turn({count: lambda count=count: run(count) for count in counts}, rounds=2)
    best = min(found, key=found.get)
    return lambda: run(best)


# ---- many models at once ------------------------------------------------------------------------------------


def many(dataset, recipe, n_models, compiled=True):
    """Training n_models from random weights to the arrays in a new store, as a function without arguments.

    It is warm: one epoch has been trained by the same step, which compiles it where that pays.
    """

    def run(recipe, count):
        in_this_process = mock.patch.object(workers, "LONG", math.inf)
        chosen = mock.patch.object(step, "worth_compiling", lambda *_: compiled)
        with in_this_process, chosen, tempfile.TemporaryDirectory() as folder:
            train(recipe, dataset, count, folder, quiet=True)

    run(replace(recipe, seed=recipe.seed + 1, stop=1 / recipe.epochs), 2)
    return lambda: run(recipe, n_models)


def sgemm():
    """This machine's best float32 matrix rate, in operations a second."""
    a = torch.rand(2048, 2048)
    return 2 * 2048**3 / seconds(lambda: a @ a, repeats=10)


def least(n, recipe):
    """Seconds a model on n examples if its matrix products ran at the best float32 rate and nothing else took time."""
    # a step: x W1 and its weight gradient; h W2, its weight gradient and its input gradient
    flops = 2 * recipe.batch_size * (2 * 64 * 256 + 3 * 256 * 10)
    return recipe.epochs * (n // recipe.batch_size) * flops / sgemm()


def training(dataset, recipe=RECIPE, counts=(64, 512), rounds=3):
    """Milliseconds a model: one at a time, as others do it, and many at once."""
    loader, ours = loader_batches(dataset, recipe.batch_size), {}
    base = {"lean loop": lean_loop(dataset, recipe), "DataLoader loop": lambda: one_model(dataset, loader, recipe)}
    for count, compiled in ((counts[0], False), *((count, True) for count in counts)):
        name = f"sgd, {count} models at once, {'compiled' if compiled else 'eager'}"
        ours[name] = many(dataset, recipe, count, compiled), count
    taken = in_turn({**base, **{name: work for name, (work, _) in ours.items()}}, rounds)
    yield from ((name, 1e3 * taken[name], "ms a model", "", "", "") for name in base)
    bound, goals = least(len(dataset.y) // 2, recipe), {"lean loop": 10, "DataLoader loop": 20}
    for name in base:
        what = "matrix products alone, at the best sgemm rate"
        yield what, 1e3 * bound, "ms a model", name, taken[name] / bound, ""
    for name, (_, count) in ours.items():
        each = taken[name] / count
        for against, goal in goals.items():
            goal = 5 if against == "lean loop" and name.endswith("eager") else goal
            yield name, 1e3 * each, "ms a model", against, taken[against] / each, f">= {goal}"


def variants(dataset, recipe=RECIPE, count=64, passes=PASSES, rounds=3):
    """The rules, each in turn with SGD: milliseconds a model; the goal is 1.1 times the passes its paper counts."""
    sgd = many(dataset, recipe, count)
    for optimizer, passed in passes.items():
        mine = many(dataset, replace(recipe, optimizer=optimizer, rho=0.3), count)
        taken = in_turn({"sgd": sgd, optimizer: mine}, rounds)
        ratio, goal = taken[optimizer] / taken["sgd"], f"<= {1.1 * passed:.2f}"
        name = f"{optimizer}, {count} models at once, compiled"
        yield name, 1e3 * taken[optimizer] / count, "ms a model", "sgd", ratio, goal


def memory(dataset, recipe=SHORT, counts=(32, 256)):
    """Peak memory of training few and then many models: it should not grow with their number."""
    few, lot = counts
    after = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            train(recipe, dataset, count, folder, quiet=True)
        after[count] = peak()
    name, against = f"peak memory after {lot} models", f"after {few} models"
    yield name, after[lot], "GB", against, after[lot] / after[few], "<= 1.1"


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
    logits, y, member = made_logits(n_models, n)
    taken, size = seconds(lambda: catalogue.run(logits, y, member, learned=False), repeats=2), f"{n_models} x {n}"
    yield f"all attacks but the neural, {size} examples", taken, "s", "", "", "<= 5"
    yield "peak memory of the process: those attacks", peak(), "GB", "", "", "<= 2"
    few = n // 10
    slow = seconds(lambda: neural.attack(logits[:, :few], y[:few], member[:, :few]))
    yield f"neural attack, {n_models} x {few} examples", slow, "s", "", "", ""


def influences(m=2000, n=50_000, t=10_000):
    """All influences of the paper's scale, block by block, and the entropies, from random memberships and outcomes."""
    rng = np.random.default_rng(0)
    member, y, y_test = rng.random((m, n), np.float32) < 0.5, rng.integers(0, 10, n), rng.integers(0, 10, t)
    values = rng.random((m, t), np.float32) < 0.9

    def every():
        for _, block in influence.influence_blocks(member, values):
            assert block.shape[0] == n

    size, before = f"{m} models, {n} x {t} examples", sgemm()
    taken = seconds(every)
    rate, best = 2 * m * n * t / taken / 1e9, (before + sgemm()) / 2 / 1e9
    yield f"influence: {size}", taken, "s", "", "", ""
    yield "influence, rate", rate, "GFLOP/s", "sgemm", rate / best, ">= 0.5"
    yield "peak memory of the process: influence", peak(), "GB", "", "", ""
    whole = seconds(lambda: influence.influence_entropy(member, values, y, y_test))
    yield "influence entropy, same class", whole, "s", "", "", ""

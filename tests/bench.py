"""`make bench`: every speed claim as a ratio, both sides measured in this one run, one after the other.

Writes outputs/bench.csv (name, value, unit, baseline, ratio, goal, machine) and prints it. Not a test: a machine's
speed decides nothing about right or wrong.
"""

import platform
import resource
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lib import attacks, data, ensemble, memorization, neural, optimizers
from lib.ensemble import Recipe
from lib.recipe import membership
from lib.study import ROOT

COLUMNS = ["name", "value", "unit", "baseline", "ratio", "goal", "machine"]
RECIPE = Recipe(epochs=100, batch_size=64)
# gradients a step, and forward passes alone at a third of one
PASSES = {"sam": 2, "asam": 2, "gsam": 2, "looksam(k=5)": 1.2, "msam": 2, "fsam": 2, "esam": 1 + 1 / 3 + 0.5}


def machine():
    """Processor, threads, accelerator and version in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{names[0]}, {torch.get_num_threads()} threads, {chip}, torch {torch.__version__}"


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


# ---- one model at a time, as others do it -------------------------------------------------------------------


def one_model(dataset, batches):
    """Train one MLP for 100 epochs on the half of model 0 with autograd and torch.optim."""
    net = ensemble.models.build("mlp", dataset.x.shape[1:], dataset.n_classes)
    settings = RECIPE.lr, RECIPE.momentum, RECIPE.weight_decay
    optimizer = optimizers.build(RECIPE.named, list(net.parameters()), *settings)
    for _ in range(RECIPE.epochs):
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()


def half(dataset):
    chosen = np.flatnonzero(membership(RECIPE, len(dataset.y), [0])[0])
    return torch.from_numpy(data.inputs(dataset)[0][chosen]), torch.from_numpy(dataset.y[chosen])


def lean_batches(dataset):
    """Index a tensor by a permutation: no loader, no workers, no copies."""
    x, y = half(dataset)

    def batches():
        for index in torch.randperm(len(y))[: len(y) // 64 * 64].split(64):
            yield x[index], y[index]

    return batches


def loader_batches(dataset):
    """What most shadow-model code does: a shuffling DataLoader."""
    loader = DataLoader(TensorDataset(*half(dataset)), batch_size=64, shuffle=True, drop_last=True)
    return lambda: iter(loader)


def lean(dataset):
    """Seconds a model of the lean loop, its thread count tuned."""
    threads, found = torch.get_num_threads(), {}
    for count in range(1, threads + 1):
        torch.set_num_threads(count)
        found[count] = seconds(lambda: one_model(dataset, lean_batches(dataset)), repeats=3)
    torch.set_num_threads(threads)
    return min(found.values())


# ---- many models at once ------------------------------------------------------------------------------------


def many(dataset, optimizer, n_models, folder, compiled=True):
    """Seconds a model, from random weights to the arrays in the store; compiled code is warm."""
    can = ensemble.can_compile
    ensemble.can_compile = can if compiled else lambda: False
    recipe = replace(RECIPE, optimizer=optimizer, rho=0.3)
    warm = replace(recipe, seed=99)
    ensemble.train(warm, dataset, 2, folder, quiet=True)
    taken = seconds(lambda: ensemble.train(recipe, dataset, n_models, folder, quiet=True))
    ensemble.can_compile = can
    return taken / n_models


def sgemm():
    """This machine's best float32 matrix rate, in operations a second."""
    a = torch.rand(2048, 2048)
    return 2 * 2048**3 / seconds(lambda: a @ a, repeats=10)


def least():
    """Seconds a model if its matrix products ran at this machine's best float32 rate and nothing else took time."""
    rate = sgemm()
    # a step of 64 examples: x W1 and its weight gradient; h W2, its weight gradient and its input gradient
    flops = 2 * 64 * (2 * 64 * 256 + 3 * 256 * 10)
    return RECIPE.epochs * (600 // 64) * flops / rate


def training(dataset):
    """Rows on training: milliseconds a model for 100 epochs on 600 digits."""
    rows = []
    base = {"lean loop": lean(dataset), "DataLoader loop": seconds(lambda: one_model(dataset, loader_batches(dataset)))}
    for name, taken in base.items():
        rows.append((name, 1e3 * taken, "ms a model", "", "", ""))
    bound = least()
    for name, taken in base.items():
        rows.append(
            ("matrix products alone, at the best sgemm rate", 1e3 * bound, "ms a model", name, taken / bound, "")
        )
    for optimizer, count, compiled in (("sgd", 64, False), ("sgd", 64, True), ("sgd", 512, True)):
        with tempfile.TemporaryDirectory() as folder:
            taken = many(dataset, optimizer, count, folder, compiled)
        name = f"{optimizer}, {count} models at once{', compiled' if compiled else ', eager'}"
        goals = {"lean loop": (">= 10" if compiled else ">= 5"), "DataLoader loop": ">= 20"}
        for against, goal in goals.items():
            rows.append((name, 1e3 * taken, "ms a model", against, base[against] / taken, goal))
    return rows


def variants(dataset):
    """Rows on the rules: milliseconds a model, against SGD timed right before; the goal is 1.1 times their passes."""
    rows = []
    for optimizer, passes in PASSES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = many(dataset, "sgd", 64, folder)
            taken = many(dataset, optimizer, 64, folder)
        name, goal = f"{optimizer}, 64 models at once, compiled", f"<= {1.1 * passes:.2f}"
        rows.append((name, 1e3 * taken, "ms a model", "sgd", taken / base, goal))
    return rows


def memory(dataset):
    """Peak memory of training 32 and then 256 models: it should not grow with their number."""
    after = {}
    for count in (32, 256):
        with tempfile.TemporaryDirectory() as folder:
            ensemble.train(Recipe(epochs=5), dataset, count, folder, quiet=True)
        after[count] = peak()
    return [("peak memory after 256 models", after[256], "GB", "after 32 models", after[256] / after[32], "<= 1.1")]


def scoring(n_models=256, n=50_000):
    """All the attacks on all the targets, from logits in float16."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, n)
    member = membership(Recipe(), n, range(n_models))
    logits = np.empty((n_models, n, 10), np.float16)
    for k in range(n_models):
        logits[k] = rng.standard_normal((n, 10), dtype=np.float32)
        logits[k, np.arange(n), y] += 2 + member[k]
    taken, size = seconds(lambda: attacks.run(logits, y, member, learned=False), repeats=2), f"{n_models} x {n}"
    most = peak()
    slow = seconds(lambda: neural.attack(logits[:, : n // 10], y[: n // 10], member[:, : n // 10]), repeats=1)
    return [
        (f"all attacks but the neural, {size} examples", taken, "s", "", "", "<= 5"),
        ("peak memory of the process: those attacks", most, "GB", "", "", "<= 2"),
        (f"neural attack, {n_models} x {n // 10} examples", slow, "s", "", "", ""),
    ]


def influences(m=2000, n=50_000, t=10_000):
    """All influences of the paper's scale, block by block, and the entropies, from random memberships and outcomes."""
    rng = np.random.default_rng(0)
    member, y, y_test = rng.random((m, n), np.float32) < 0.5, rng.integers(0, 10, n), rng.integers(0, 10, t)
    values = rng.random((m, t), np.float32) < 0.9

    def every():
        for _, block in memorization.influence_blocks(member, values):
            assert block.shape[0] == n

    size, before = f"{m} models, {n} x {t} examples", sgemm()
    taken = seconds(every)
    rate = 2 * m * n * t / taken / 1e9
    best = (before + sgemm()) / 2 / 1e9
    held = peak()
    whole = seconds(lambda: memorization.influence_entropy(member, values, y, y_test))
    return [
        (f"influence: {size}", taken, "s", "", "", ""),
        ("influence, rate", rate, "GFLOP/s", "sgemm", rate / best, ">= 0.5"),
        ("peak memory of the process: influence", held, "GB", "", "", ""),
        ("influence entropy, same class", whole, "s", "", "", ""),
    ]


def main():
    dataset = data.load("digits")
    with get_context("spawn").Pool(1) as fresh:  # a process of its own: its peak memory is the scoring's
        rows = fresh.apply(scoring)
    with get_context("spawn").Pool(1) as fresh:
        rows += fresh.apply(influences)
    rows = memory(dataset) + training(dataset) + variants(dataset) + rows
    if not torch.cuda.is_available():
        rows.append(("training on a GPU", "not measured", "", "", "", ""))
    table = pd.DataFrame([(*row, machine()) for row in rows], columns=COLUMNS)
    path = Path(ROOT) / "outputs" / "bench.csv"
    path.parent.mkdir(exist_ok=True)
    for column in ("value", "ratio"):
        table[column] = [f"{v:.3g}" if isinstance(v, float) else v for v in table[column]]
    table.to_csv(path, index=False)
    print(pd.read_csv(path, keep_default_na=False).drop(columns="machine").to_string(index=False))
    print(f"{machine()}\nWritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

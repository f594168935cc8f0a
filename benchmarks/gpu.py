"""What a GPU is for: is it right, how fast is it, and ensembles on all of CIFAR-10.

    python -m benchmarks.gpu checks speed tune --data cifar10.tar.xz --out folder     about 6 minutes
    python -m benchmarks.gpu paper --minutes 8 --lr 0.1 --sam-lr 0.1 --data cifar10.tar.xz --out folder
    python -m benchmarks.gpu audit --data cifar10.tar.xz --out folder                 later, and on any machine

checks: the same recipe on CPU and GPU, eager and compiled. speed: images a second, beside the loop that most
shadow-model code runs. tune: how well one model of SGD and one of SAM fit their half, and classify the other half, at
each learning rate. paper: ensembles of ResNet-9 on halves of 50,000 images, at the rates given, as many models as the
time allows; logits come back in half precision. audit: the page and the tables of what came back. Rows are printed,
and appended to <out>/rows.jsonl, as they come.

A bare machine suffices but for audit: torch, torchvision, numpy, pandas, scipy, scikit-learn and tqdm.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Examples
from torch.utils.flop_counter import FlopCounterMode

from lib.analysis.flatness import flatness
from lib.data.dataset import Dataset, load, pool
from lib.training import Recipe, ensemble, networks, step, workers
from lib.training.recipe import learning_rate, membership

PAPER = Recipe(arch="resnet9", lr=0.1, batch_size=256, epochs=60, augment=True, precision="bfloat16")
RHO = 0.05  # SAM's radius on CIFAR-10: Foret et al. 2021
RATES = (0.025, 0.05, 0.1, 0.2)  # learning rates of the section tune, whose trainings are SHORT
SHORT = 24  # epochs


def say(*words):
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} ", *words, flush=True)


def photographs(n=50_000, t=10_000, side=32, classes=10):
    """Made-up images, uint8 [n, 3, side, side]: a pattern of the class under noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 64, (classes, 3, side, side), np.uint8)
    y, y_test = np.arange(n) % classes, np.arange(t) % classes
    x, x_test = (patterns[of] + rng.integers(0, 192, (len(of), 3, side, side), np.uint8) for of in (y, y_test))
    return Dataset("synthetic", x, y, x_test, y_test, tuple(str(label) for label in range(classes)))


# ---- is the GPU right? --------------------------------------------------------------------------------------


def way(name):
    """A context in which steps are eager or compiled (and, on a GPU, recorded as a CUDA graph)."""
    return mock.patch.object(step, "worth_compiling", lambda *_: name == "compiled")


def checks(device="cuda", ways=("eager", "compiled"), n=512, epochs=2):
    """Rows: the largest difference in logits from the CPU's eager training, as a share of their spread."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    images = photographs(n, 64, side=16)
    table = replace(images, x=images.x.reshape(n, -1)[:, :64], x_test=images.x_test.reshape(64, -1)[:, :64])
    base = Recipe(epochs=epochs, batch_size=32, rho=RHO)
    cases = [
        ("mlp, 8 models at once", replace(base, arch="mlp"), table, range(8), ways),
        ("cnn", replace(base, arch="cnn", augment=True), images, [0], ways),
        # two steps: rounding grows fast in a network of many BatchNorms
        ("resnet9", replace(base, arch="resnet9", epochs=1, batch_size=n // 4), images, [0], ways[:1]),
    ]
    for name, recipe, dataset, ids, ways_of in cases:
        for optimizer in ("sgd", "sam"):
            recipe = replace(recipe, optimizer=optimizer)
            with way("eager"):
                known = ensemble.train_chunk(recipe, ensemble.Inputs(dataset, recipe, torch.device("cpu")), ids)
            inputs = ensemble.Inputs(dataset, recipe, torch.device(device))
            for how in ways_of:
                what = f"{name}, {optimizer}: {how} on {device} against eager on the CPU"
                try:
                    with way(how):
                        found = [ensemble.train_chunk(recipe, inputs, ids)["logits"] for _ in range(2)]
                except Exception as error:  # the other checks still run
                    yield what, f"failed: {type(error).__name__}: {str(error)[:300]}", "", "", "", "<= 0.01", ""
                    continue
                far = np.abs(found[0] - known["logits"]).max() / known["logits"].std()
                yield what, float(far), "of the spread", "", "", "<= 0.01", "0: the same arithmetic"
                same = float(np.array_equal(*found))
                yield f"{name}, {optimizer}: {how} twice, share of equal runs", same, "", "", "", "", "1"
    step.STACKS.clear()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True


# ---- how fast is it? ----------------------------------------------------------------------------------------


def rate(recipe, dataset, device, how="compiled", epochs=4):
    """Images a second of one model's training, the first epoch (which compiles) left out."""
    few = replace(dataset, x_test=dataset.x_test[:1], y_test=dataset.y_test[:1])
    recipe, ends = replace(recipe, epochs=100, stop=epochs / 100), []
    inputs = ensemble.Inputs(few, recipe, torch.device(device))
    with way(how):
        ensemble.train_chunk(recipe, inputs, [0], lambda: ends.append(time.perf_counter()))
    size = round(len(dataset.y) * recipe.subset) // recipe.batch_size * recipe.batch_size
    return size / np.median(np.diff(ends))


def matrix_rate(device, size=8192):
    """The device's bfloat16 matrix products, in operations a second."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def operations(arch, shape, n_classes):
    """Operations in the matrix products and convolutions of one image's gradient."""
    net, x = networks.build(arch, shape, n_classes), torch.zeros(2, *shape)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(x), torch.zeros(2, dtype=int)).backward()
    return counter.get_total_flops() / 2


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


def peers_rate(recipe, dataset, device, n_workers, epochs=2):
    """Images a second of the usual loop: a DataLoader, autocast, a step, .item(). The first epoch is left out."""
    device, on_gpu = torch.device(device), device != "cpu"
    how = dict(shuffle=True, drop_last=True, num_workers=n_workers, pin_memory=on_gpu, persistent_workers=n_workers > 0)
    loader = DataLoader(Pictures(dataset, recipe), recipe.batch_size, **how)
    net = networks.build(recipe.arch, dataset.x.shape[1:], dataset.n_classes).to(device)
    settings = learning_rate(recipe, 0, 100), recipe.momentum, recipe.weight_decay
    optimizer, total = recipe.optimizer.build(list(net.parameters()), *settings), 0.0
    for _ in range(epochs):
        began = time.perf_counter()
        for x, y in loader:
            x, y = x.to(device, non_blocking=on_gpu), y.to(device, non_blocking=on_gpu)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return len(loader) * recipe.batch_size / (time.perf_counter() - began)


def speed(dataset, device="cuda", archs=("resnet9", "resnet18"), recipe=PAPER, n_workers=16):
    """Rows: images a second of each network with SGD and SAM, against the usual loop and against the matrix units."""
    best = matrix_rate(device)
    yield "bfloat16 matrix products of 8192 x 8192", best / 1e12, "TFLOP/s", "", "", "", ""
    for arch in archs:
        one = replace(recipe, arch=arch)
        needed = operations(arch, dataset.x.shape[1:], dataset.n_classes)
        limit = f"{best / needed:.3g} images/s: {needed / 1e9:.2f} GFLOP an image at the matrix rate"
        sgd = rate(one, dataset, device)
        usual = peers_rate(one, dataset, device, n_workers)
        yield f"{arch}, sgd", sgd, "images/s", f"DataLoader loop, {n_workers} workers", sgd / usual, ">= 10", limit
        sam = rate(replace(one, optimizer="sam", rho=RHO), dataset, device)
        both = "2: two gradients, one batch"
        yield f"{arch}, sam: time of a step", sam, "images/s", "sgd", sgd / sam, "<= 2.05", both
        eager = rate(one, dataset, device, "eager")
        yield f"{arch}, sgd: compiled and recorded as a graph", sgd, "images/s", "eager", sgd / eager, "", limit
        step.STACKS.clear()


def tune(dataset, device="cuda", recipe=PAPER, rates=RATES, epochs=SHORT):
    """Rows: how well model 0 of SGD and of SAM fits its half and classifies the other half, at each learning rate."""
    inputs = ensemble.Inputs(dataset, recipe, torch.device(device))
    for name, of_rule in ensembles(recipe).items():
        for lr in rates:
            began, one = time.perf_counter(), replace(of_rule, lr=lr, epochs=epochs)
            made = ensemble.train_chunk(one, inputs, [0])
            hits, member = made["logits"][0, 0].argmax(-1) == dataset.y, made["member"][0]
            what = f"{one.arch}, {name}, {epochs} epochs at rate {lr:g}"
            yield f"{what}: train accuracy", hits[member].mean(), "", "", "", "", "1"
            yield f"{what}: accuracy on the other half", hits[~member].mean(), "", "", "", "", ""
            yield f"{what}: a model, from weights to logits", time.perf_counter() - began, "s", "", "", "", ""


def rows(data="50000"):
    """The rows of `make bench`: a single "not measured" without a GPU."""
    if not torch.cuda.is_available():
        yield "training on a GPU", "not measured", "", "", "", "", ""
        return
    yield from checks()
    yield from speed(pool_of(data))


# ---- the paper's regime -------------------------------------------------------------------------------------


def ensembles(recipe=PAPER, sam_lr=None):
    """What is trained: dict name -> Recipe. SAM's learning rate is sam_lr, or the recipe's where that is None."""
    return {"sgd": recipe, "sam": replace(recipe, optimizer="sam", rho=RHO, lr=sam_lr or recipe.lr)}


def train_until(deadline, kinds, data, store, device, most):
    """Train models of SGD and SAM in turn, but those another process has claimed, while a model fits into the time."""
    dataset = pool_of(data)
    inputs = ensemble.Inputs(dataset, kinds["sgd"], torch.device(device))
    cost = None  # seconds a gradient of one example
    for k in range(most):
        for name, one in kinds.items():
            work = one.epochs * one.optimizer.gradients_per_step()
            if cost and time.time() + cost * work > deadline:
                continue
            began = time.time()
            kept = ensemble.open_store(one, dataset, store)
            if workers.train_one(one, inputs, range(k, k + 1), kept, most):
                # the first model compiles: its time says little
                cost = (time.time() - began) / work if cost is not None else 0
                say(f"{name}: model {k}, {time.time() - began:.1f} s")


def pool_of(data):
    """All of CIFAR-10's training images as the pool, or made-up ones for a trial (data: an even number)."""
    return pool(photographs(int(data), 64, side=16), None) if str(data).isdigit() else pool(load("cifar10", data))


def paper(data, out, minutes, kinds, device="cuda", processes=2, most=16):
    """Train for so many minutes in several processes beside each other, and leave what was trained in `out`."""
    deadline = time.time() + 60 * minutes
    dataset = pool_of(data)  # decoded once; the processes find it in the cache
    with tempfile.TemporaryDirectory() as store:
        args = deadline, kinds, data, store, device, most
        beside = [multiprocessing.get_context("spawn").Process(target=train_until, args=args) for _ in range(processes)]
        for process in beside:
            process.start()
        for process in beside:
            process.join()
        pack(kinds, dataset, store, Path(out), device, most)


def pack(kinds, dataset, store, out, device, most):
    """Write what was trained: <name>.npy float16 [M, N, C], others.npz and summary.json."""
    summary, arrays, kept = {"data": dataset.hash, "models": {}, "flatness": {}}, {}, {}
    for name, one in kinds.items():
        rows = ensemble.open_store(one, dataset, store)
        done = {k for k in range(most) if (rows.flag(k) or {}).get("status") == "finished"}
        ids = np.array(sorted(k for k in done if k ^ 1 in done), int)
        seconds = [rows.flag(k)["seconds"] for k in ids.tolist()]
        summary["models"][name] = {"ids": ids.tolist(), "seconds": seconds, "recipe": one.key()["recipe"]}
        if len(ids):
            kept[name] = e = ensemble.Ensemble(one, dataset, rows, ids)
            np.save(out / f"{name}.npy", e.logits[:, 0].astype(np.float16))
            arrays |= {f"{name}_history": e.history, f"{name}_test_logits": e.test_logits[:, 0].astype(np.float16)}
    np.savez_compressed(out / "others.npz", **arrays)
    say("packed:", {name: len(about["ids"]) for name, about in summary["models"].items()})
    (out / "summary.json").write_text(json.dumps(summary, default=str))  # before anything that could fail
    for name, e in kept.items():
        summary["flatness"][name] = flatness(e, RHO, n_models=4, device=device).tolist()
        say(f"{name}: (largest eigenvalue, rise of the loss within {RHO}):", summary["flatness"][name])
    (out / "summary.json").write_text(json.dumps(summary, default=str))


def audit(data, out):
    """Audit what `paper` left in `out`: <out>/audit with figures and a page, and <out>/results.csv as of a run."""
    from lib.analysis import compare, memorization  # need what a bare machine lacks
    from lib.attacks import intervals
    from lib.study import own_logits
    from lib.study.results import COLUMNS

    dataset = pool_of(data)
    with np.load(out / "others.npz") as file:
        others = dict(file)
    summary = json.loads((out / "summary.json").read_text())
    models = summary["models"]
    ids = np.intersect1d(models["sgd"]["ids"], models["sam"]["ids"])
    recipes = {name: Recipe(**about["recipe"]) for name, about in models.items()}
    member = membership(recipes["sgd"], len(dataset.y), ids)
    shared = {"y": dataset.y, "population_y": dataset.y_test, "member": member}
    given = {}
    for name in models:
        rows = np.searchsorted(models[name]["ids"], ids)
        z, test = np.load(out / f"{name}.npy")[rows], others[f"{name}_test_logits"][rows]
        given[name] = {**shared, "logits": z, "population_logits": test}
    found = own_logits.audit(given, out / "audit")
    found = found[found.experiment == "main"]
    ensembles = {name: own_logits.models(name, arrays) for name, arrays in given.items()}
    hits = {name: compare.signal(e, "correct").astype(float) for name, e in ensembles.items()}
    found = [found, compare.variances(ensembles), memorization.memorization_table(hits, member)]
    n_flat = len(summary["flatness"]["sgd"])
    for column, metric in enumerate(("hessian_top_eigenvalue", "loss_rise_in_ball")):  # of pairs, as in notebook 01
        flat = {n: np.reshape(pairs, (-1, 2, 2)).mean(1)[None, :, column] for n, pairs in summary["flatness"].items()}
        found.append(intervals.paired(flat, metric, log_ratio_from=0.0, examples_only=True).assign(n_models=n_flat))
    rows = pd.concat(found).fillna({"baseline": "", "attack": "", "n_models": len(ids)})
    about = {"notebook": "gpu", "experiment": "main", "dataset": dataset.name, "arch": recipes["sgd"].arch}
    about |= {"coordinate": "", "rho": rows.optimizer.map({name: recipe.rho for name, recipe in recipes.items()})}
    rows = rows.assign(**about, n_examples=len(dataset.y)).reindex(columns=COLUMNS)
    rows.to_csv(out / "results.csv", index=False, float_format="%.6g")


def main(argv=None):
    """Run the sections asked for; every row is printed, and appended to <out>/rows.jsonl, as it comes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    sections = "checks", "speed", "tune", "paper", "audit"
    parser.add_argument("sections", nargs="+", choices=sections)
    parser.add_argument("--data", default="50000", help="path of CIFAR-10, or an even number of made-up images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, in the section paper")
    parser.add_argument("--processes", type=int, default=2, help="that train beside each other, in the section paper")
    parser.add_argument("--models", type=int, default=16, help="of an ensemble at most, in the section paper")
    parser.add_argument("--speed-of", nargs="+", default=["resnet9", "resnet18"], help="networks of the section speed")
    parser.add_argument("--sam-lr", type=float, help="SAM's learning rate, in the section paper (default: --lr)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of the section tune")
    for name, kind in (("arch", str), ("epochs", int), ("lr", float), ("batch_size", int)):
        default = getattr(PAPER, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{default} if not given")
    given = parser.parse_args(argv)
    changed = {name: getattr(given, name) for name in ("arch", "epochs", "lr", "batch_size")}
    recipe, data, out, device = replace(PAPER, **changed), given.data, given.out, given.device
    out.mkdir(parents=True, exist_ok=True)
    for section in given.sections:
        say(section)
        if section == "paper":
            kinds = ensembles(recipe, given.sam_lr)
            paper(data, out, given.minutes, kinds, device, given.processes, given.models)
        elif section == "audit":
            audit(data, out)
        else:
            rows = {
                "checks": lambda: checks(device),
                "speed": lambda: speed(pool_of(data), device, given.speed_of, recipe),
                "tune": lambda: tune(pool_of(data), device, recipe, given.rates),
            }
            for row in rows[section]():
                say(*row)
                with open(out / "rows.jsonl", "a") as file:
                    file.write(json.dumps([section, *row], default=float) + "\n")


if __name__ == "__main__":
    main()

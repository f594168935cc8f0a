"""Who trains the chunks of an ensemble: this process, processes beside it with one thread each, or Ray's workers.

A chunk of models goes into the store and nothing else comes back, so a lost worker's chunk is trained again. With one
thread each, the arrays are the same to the last bit however the work was shared out."""

import atexit
import os
import signal
import threading
import time
from concurrent import futures
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib import need
from lib.training import ensemble, networks, step, trial
from lib.training.store import check_disk

ENGINES = ("local", "ray")
LONG = 100  # steps of one model from which processes are worth starting
OWN = 1e9  # bytes of memory that a process takes, about
STARTING = threading.Lock()  # two threads share the processes
COMPILED = set()  # what decides the compiled code of ensembles that were trained here
tell_once = cache(partial(print, flush=True))  # in each process


def train(recipe, dataset, n_models, store, device="auto", engine="local", gpus=0, quiet=False, notify=None, wait=True):
    """Models 0..n_models-1 of the recipe, trained where the store lacks them: an ensemble.Ensemble.

    gpus: what a Ray task asks for, such as 0.25 of a GPU. notify(recipe, n_examples, n_models, seconds) is called after
    each chunk. wait=False: models that other processes are training are left to them, and None is returned."""
    check(engine)
    where = ensemble.device_of(device)
    ensemble.check(recipe, dataset, n_models, device)
    kept = ensemble.open_store(recipe, dataset, store)
    todo, n = missing(recipe, dataset, n_models, kept, where), n_processes(recipe, dataset, where)
    check_disk(store, ensemble.stored_bytes(recipe, dataset, [k for ids in todo for k in ids]))
    if todo and (why := trial.trial(recipe, dataset.x.shape[1:], dataset.n_classes, where)):
        tell_once(why)
    if todo and engine == "ray":
        train_by_ray(recipe, dataset, todo, store, device, gpus, n_models, quiet, notify)
    elif todo and n > 1:
        train_by_processes(recipe, dataset, todo, store, n, n_models, quiet, notify)
    inputs = None
    while todo and (todo := missing(recipe, dataset, n_models, kept, where)):  # what others left, or still train
        inputs, taken = inputs or ensemble.Inputs(dataset, recipe, where), 0
        with progress(recipe, todo, "here", quiet) as bar:
            for ids in todo:
                if seconds := train_one(recipe, inputs, ids, kept, n_models, bar.update):
                    taken += seconds
                    if notify:
                        notify(recipe, len(dataset.y), len(ids), seconds)
        if not wait:
            return None
        if not taken:
            tell_once(f"another run is training {kept.folder.name}: waiting for it")
            quiet = True
            time.sleep(0.5)
    if lost := {k for k in range(n_models) if kept.flag(k)["status"] == "diverged"}:
        print(f"{kept.folder.name}: models {sorted(lost)} diverged: they and their partners are left out", flush=True)
    ids = np.array([k for k in range(n_models) if not {k, k ^ 1} & lost], int)
    return ensemble.Ensemble(recipe, dataset, kept, ids)


def check(engine):
    """Raise ValueError naming `engine` if it is unknown or not installed."""
    need(engine in ENGINES, f"engine={engine!r} is unknown: choose {' or '.join(ENGINES)}")
    need(engine == "local" or find_spec("ray"), f"{engine=} is not installed: pip install ray, or use engine='local'")


def missing(recipe, dataset, n_models, kept, device):
    """The chunks of models that train together and lack one of models 0..n_models-1: a list of ranges.

    They start at multiples of their size, so a resumed or a longer run trains model k beside the same others."""
    size = n_together(recipe, dataset, device)
    whole = (range(start, start + size) for start in range(0, n_models, size))
    return [ids for ids in whole if any(kept.flag(k) is None for k in ids if k < n_models)]


def n_together(recipe, dataset, device):
    """How many models train as one stack: one where the network or the optimizer can't be stacked."""
    about = dataset.x.shape[1:], dataset.n_classes
    return 1 if trial.trial(recipe, *about, device) else step.n_stacked_for(networks.build(recipe.arch, *about), device)


def train_one(recipe, inputs, ids, kept, n_models, tick=lambda: None):
    """Train and save models `ids`: the seconds it took, 0 if another process has or does. tick() after every epoch."""
    lock, began = kept.claim(ids[0]), time.time()
    try:
        if lock is None or all(kept.flag(k) for k in ids):
            return 0
        arrays = train_or_halve(recipe, inputs, list(ids), tick, n_models)
        notes = {"seconds": (time.time() - began) / len(ids), "device": str(inputs.device), "torch": torch.__version__}
        for place, k in enumerate(ids):
            if kept.flag(k) is None:
                rows = {n: arrays[n][place] for n in kept.rows if n != "weights" or k < ensemble.KEEP_WEIGHTS}
                kept.save(k, rows, status="diverged" if arrays["stuck"][place] else "finished", **notes)
        return time.time() - began
    finally:
        if lock:
            lock.release()


def train_or_halve(recipe, inputs, ids, tick, n_models):
    """ensemble.train_chunk, by halves where memory runs out. Raises ValueError if it does for a single model."""
    try:
        return ensemble.train_chunk(recipe, inputs, ids, tick, n_models)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):  # the CPU's words for it
            raise
        what = f"batch_size={recipe.batch_size}: the memory of {inputs.device} does not suffice for one {recipe.arch}"
        need(len(ids) > 1, f"{what}: choose a smaller batch_size or arch")
    step.STACKS.clear()
    torch.cuda.empty_cache()
    few = len(ids) // 2
    print(f"memory ran out on {inputs.device}: {few} models are trained at once instead of {len(ids)}", flush=True)
    halves = [train_or_halve(recipe, inputs, part, tick, n_models) for part in (ids[:few], ids[few:])]
    return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}


def progress(recipe, todo, where, quiet):
    """A bar that counts the epochs of chunks."""
    label, total = f"{recipe.optimizer} rho {recipe.rho}, {sum(map(len, todo))} models, {where}", len(todo)
    quiet = quiet or "TQDM_DISABLE" in os.environ
    return tqdm(None, label, total * recipe.run_epochs, leave=False, disable=quiet, unit="epoch", mininterval=1)


def train_there(recipe, dataset, ids, store, device, n_models):
    inputs = ensemble.Inputs(dataset, recipe, ensemble.device_of(device))
    return train_one(recipe, inputs, ids, ensemble.open_store(recipe, dataset, store), n_models)


def collect(recipe, dataset, waiting, where, n, quiet, notify):
    """Wait for `train_there` of each chunk, n at once (future -> ids). The first n may compile: notify skips them."""
    with progress(recipe, list(waiting.values()), where, quiet) as bar:
        for done, future in enumerate(futures.as_completed(waiting), 1):
            seconds = future.result()
            bar.update(recipe.run_epochs)
            if notify and done > n:
                notify(recipe, len(dataset.y), len(waiting[future]), seconds / n)


def n_processes(recipe, dataset, device):
    """How many processes train this recipe: on a CPU one a core, if they run or it is worth it, and memory suffices."""
    steps = round(len(dataset.y) * recipe.subset) // recipe.batch_size * recipe.run_epochs
    is_worth_it = steps >= LONG or processes.cache_info().currsize
    if device.type != "cpu" or not is_worth_it or "__main__" in f"{recipe.optimizer} {recipe.arch}":
        return 1  # nothing of `__main__` can be sent to other processes
    import loky
    import psutil

    return int(max(1, min(loky.cpu_count(), psutil.virtual_memory().available // (OWN + 4 * dataset.x.nbytes))))


@cache
def processes(n, parent):
    """n processes that train, kept with their compiled code for the ensembles that follow. parent: this process."""
    import loky

    os.environ.setdefault("LOKY_MAX_MEMORY_LEAK_SIZE", "1e12")  # compiled code is no leak: no process starts anew
    # without work for so many seconds they end: this process need not wait for that when it ends
    return loky.ProcessPoolExecutor(n, timeout=30, initializer=alone, initargs=(parent,))


def train_by_processes(recipe, dataset, todo, store, n, n_models, quiet=False, notify=None):
    """Have n processes train the chunks; if one of them is lost, the caller trains what is missing."""
    from loky.process_executor import BrokenProcessPool

    code = recipe.arch, recipe.smoothing, recipe.precision, recipe.batch_size, recipe.optimizer.rule_name
    with STARTING:
        pool, waiting = processes(n, os.getpid()), {}
    try:
        for ids in todo:
            waiting[pool.submit(train_there, recipe, dataset, ids, str(store), "cpu", n_models)] = ids
            if code not in COMPILED:  # the other chunks would wait for the compiler, and another ensemble behind them
                futures.wait(waiting)
                COMPILED.add(code)
        collect(recipe, dataset, waiting, f"{n} processes", n, quiet, notify)
    except BrokenProcessPool:
        processes.cache_clear()
        print("a process that trained was lost (memory?): its models are trained in this one", flush=True)
    except BaseException:
        processes.cache_clear()
        pool.shutdown(wait=False, kill_workers=True)
        raise


def alone(parent):
    """What a process does first: take one thread, leave the keyboard to its parent, and end when its parent ends."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    torch.set_num_threads(1)
    atexit.register(os._exit, 0)  # the interpreter's own end takes a second
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def train_by_ray(recipe, dataset, todo, store, device, gpus, n_models, quiet=False, notify=None):
    """Have the workers of the Ray at RAY_ADDRESS, or else of one that is started here, train the chunks."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report home
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # an address without answer is given up after 46 s
    import ray

    try:
        if not ray.is_initialized():
            paths = str(Path(__file__).resolve().parents[2]), os.getcwd(), os.environ.get("PYTHONPATH", "")
            there = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
            ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=there)
        task = ray.remote(num_cpus=1, num_gpus=gpus)(train_there)
        shared, folder = ray.put(dataset), str(Path(store).resolve())
        waiting = {task.remote(recipe, shared, ids, folder, device, n_models).future(): ids for ids in todo}
        n_at_once = ray.cluster_resources().get("GPU" if gpus else "CPU", 1) // (gpus or 1)
        collect(recipe, dataset, waiting, "by Ray", max(1, int(n_at_once)), quiet, notify)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except Exception as error:
        address = f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')!r}"
        raise ValueError(f"engine='ray': its workers can't be reached or were lost ({address}): {error}") from error

"""Chunks of models trained side by side on a CPU, by processes of one thread each.

A small network's step is over before several threads have shared it among them: as many processes with one thread each
train nearly as many times faster. They are started by the first long ensemble and kept for the next ones, with their
compiled steps. They end with the process that started them, however it ends, and a chunk they leave is nobody's.
"""

import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process

import torch
from tqdm import tqdm

from lib.training import ensemble, step

LONG = 100  # steps of one model from which a process of its own pays for being started
OWN = 6e8  # bytes that a process takes before it trains anything
POOLS = {}  # number of processes -> those of this process


def how_many(recipe, dataset, device):
    """Processes that train this recipe at once: one for each of this process's threads, where a model takes LONG steps
    on a CPU and memory suffices; else 1, which is this one. What only this process can import stays in it."""
    steps = round(len(dataset.y) * recipe.subset) // recipe.batch_size * recipe.run_epochs
    if device.type != "cpu" or steps < LONG or "__main__" in f"{recipe.optimizer} {recipe.arch}":
        return 1
    room = step.free_memory(device) // (OWN + ensemble.predicted_memory(recipe, dataset, device))
    return int(max(1, min(torch.get_num_threads(), room)))


def train(recipe, dataset, todo, store, n, quiet=False, notify=None):
    """Have n processes train the chunks `todo` into the store; one bar counts the epochs of finished chunks.

    notify is told of chunks beyond the first n, whose time is that of compiling. If a process is lost, the chunks that
    the store lacks are left to the caller.
    """
    pool = POOLS.get(n) or POOLS.setdefault(n, ProcessPoolExecutor(n, get_context("spawn"), alone))
    waiting = {pool.submit(chunk, recipe, dataset, ids, str(store), "cpu"): len(ids) for ids in todo}
    label, done = f"{recipe.optimizer} rho {recipe.rho}, {sum(waiting.values())} models, {n} at once", 0
    bar = tqdm(total=recipe.run_epochs * len(todo), desc=label, unit="epoch", leave=False, disable=quiet, mininterval=1)
    try:
        with bar:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    seconds, done = future.result(), done + 1
                    bar.update(recipe.run_epochs)
                    if notify and done > n:
                        notify(recipe, len(dataset.y), waiting[future], seconds / n)
                    del waiting[future]
    except BrokenProcessPool:
        print("a process that trained was lost (memory?): its models are trained in this one", flush=True)
        stop(n)
    except BaseException:
        stop(n)
        raise


def chunk(recipe, dataset, ids, store, device):
    """Train models `ids` into the store, unless another process has or does. Returns the seconds it took."""
    began, kept = time.time(), ensemble.open_store(recipe, dataset, store)
    ensemble.train_chunks(recipe, ensemble.Inputs(dataset, recipe, ensemble.device_of(device)), [ids], kept, quiet=True)
    return time.time() - began


def alone():
    """What a process does first: one thread, no keyboard, and an end with the process that started it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it ends it
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def stop(n):
    """End the n processes, and what they are doing."""
    pool = POOLS.pop(n)
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)

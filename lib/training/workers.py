"""Where the models of an ensemble are trained: here (`local`), or as tasks of a Ray cluster (`ray`).

A task trains one chunk of models and puts it into the store, which all the machines must see under the same path;
nothing else comes back, so a lost worker costs its chunk, which Ray runs again. Nothing depends on how the work was
cut, to the last bit where the number of threads is the same (a task on a CPU has one, and so have the processes by
which `local` trains long runs on a CPU). Without RAY_ADDRESS a Ray of this machine's own starts by itself, with a task
for each core or share of a GPU.
"""

import os
import socket
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from lib.training import ensemble, processes

ENGINES = ("local", "ray")
PATIENCE = 30  # seconds that a cluster has to answer
RETRIES = 5  # times that a chunk is trained anew after its worker was lost


def check(engine, gpus=0.0):
    """Raise ValueError naming the parameter if the engine is unknown, not installed or can't be reached."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown: choose {' or '.join(ENGINES)}")
    if not 0 <= gpus <= 64 or gpus > 1 and gpus % 1:
        raise ValueError(f"gpus={gpus!r} is not valid: a share of a GPU from 0 to 1, or a whole number of them")
    if engine == "ray":
        if find_spec("ray") is None:
            raise ValueError("engine='ray' is not installed: pip install ray, or use engine='local'")
        if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
            answers(os.environ.get("RAY_ADDRESS", ""))


def answers(address):
    """Raise ValueError if a cluster's address, host:port or ray://host:port, does not answer; "" and auto pass."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if address in ("", "auto", "local"):
        return
    if not host or not port.isdigit():
        raise ValueError(f"RAY_ADDRESS={address!r} is not valid: host:port, ray://host:port, auto, or not set")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        if "://" not in address:  # it listens; but is it a cluster?
            asked = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
            subprocess.run(asked, timeout=PATIENCE, check=True, capture_output=True)
    except (OSError, OverflowError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"RAY_ADDRESS={address!r} does not answer within {PATIENCE} s ({error}): start a cluster there "
            "(`ray start --head`), or unset it to start Ray on this machine"
        ) from error


def train(recipe, dataset, n_models, store, device="auto", engine="local", gpus=0.0, **how):
    """`ensemble.train` by an engine of ENGINES; how: quiet, notify. gpus: what a Ray task asks for, such as 0.25."""
    check(engine, gpus)
    begin(recipe, dataset, n_models, store, device, engine, gpus, **how)
    return ensemble.train(recipe, dataset, n_models, store, device, **how)


def begin(recipe, dataset, n_models, store, device, engine, gpus, **how):
    """Have other processes train what the store lacks and nobody else trains, where the engine has any."""
    ensemble.check(recipe, dataset, n_models)
    where, kept = ensemble.device_of(device), ensemble.open_store(recipe, dataset, store)
    todo, n = ensemble.chunks(recipe, dataset, n_models, kept, where), processes.how_many(recipe, dataset, where)
    if todo and engine == "ray":
        train_by_ray(recipe, dataset, todo, store, device, gpus, **how)
    elif todo and n > 1:
        processes.train(recipe, dataset, todo, store, n, **how)


def train_by_ray(recipe, dataset, todo, store, device, gpus, quiet=False, notify=None):
    """Have Ray's workers train the chunks `todo`; one bar counts the epochs of finished chunks."""
    ray = started()
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(processes.chunk)
    shared = ray.put(dataset)
    waiting = {task.remote(recipe, shared, ids, str(Path(store).resolve()), device): len(ids) for ids in todo}
    label = f"{recipe.optimizer} rho {recipe.rho}, {sum(waiting.values())} models, by Ray"
    with tqdm(total=recipe.run_epochs * len(todo), desc=label, unit="epoch", leave=False, disable=quiet) as bar:
        while waiting:
            began = time.time()
            for done in ray.wait(list(waiting))[0]:
                result(ray, done)
                bar.update(recipe.run_epochs)
                if notify:
                    notify(recipe, len(dataset.y), waiting[done], time.time() - began)
                del waiting[done]


def result(ray, done):
    """Raise what a task raised, as it was raised there; and ValueError naming `engine` if its workers were lost."""
    try:
        ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"engine='ray': a chunk's workers were lost {RETRIES + 1} times: {said}") from error


def started(tries=2):
    """The module ray, connected: to RAY_ADDRESS, else to a Ray of this process's own."""
    for quiet, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")):
        os.environ.setdefault(quiet, value)  # no report home, no stack of its own when a kernel is shut down
    import ray

    paths = dict.fromkeys([str(Path(__file__).resolve().parents[2]), os.getcwd(), *sys.path[:1]])
    there = {"PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))}
    address = os.environ.get("RAY_ADDRESS", "")
    own = {} if address not in ("", "local") else {"include_dashboard": False}
    while not ray.is_initialized():
        tries -= 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its coming versions
            try:
                ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": there}, **own)
            except Exception as error:  # of many kinds, a bare Exception among them where it started too slowly
                if not tries:
                    raise ValueError(f"RAY_ADDRESS={address!r}: Ray can't be joined or started: {error}") from error
                ray.shutdown()
    return ray

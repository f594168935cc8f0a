"""Processes of one thread each, and Ray's workers, against this process: the same arrays, whatever is lost."""

import atexit
import gc
import os
import subprocess
import sys
from concurrent import futures
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import loky
import psutil
import pytest
import torch

from lib.training import Recipe, ensemble, train, workers
from tests.conftest import blobs, killing_one, same
from tests.processes import start, until

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def ended():
    """The processes are kept from test to test: each takes seconds to start."""
    yield
    for pid in children():
        psutil.Process(pid).kill()
    workers.processes.cache_clear()


def here(*args, **how):
    """Train in this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "n_processes", lambda *_: 1)
        return train(*args, **how)


def children():
    """Process numbers of the processes that train."""
    found = psutil.process_iter(["ppid", "cmdline"])
    ours = [p for p in found if p.info["ppid"] == os.getpid()]
    return [p.pid for p in ours if "LokyProcess" in " ".join(p.info["cmdline"] or [])]


@pytest.fixture
def two(monkeypatch):
    """As if every ensemble were long, and there were two cores."""
    monkeypatch.setattr(workers, "LONG", 0)
    monkeypatch.setattr(loky, "cpu_count", lambda: 2)
    yield
    workers.processes.cache_clear()  # other tests train in their own process


def test_two_processes_make_what_one_thread_makes(images, tmp_path, two, one_thread):
    told, how = [], {"quiet": True}
    for name in ("sgd", "sam"):  # the second by the same processes
        recipe = Recipe("cnn", name, 0.1, epochs=2, batch_size=8)
        made = train(recipe, images, 6, tmp_path / "two", "cpu", notify=lambda *c: told.append(c), **how)
        same(made, here(recipe, images, 6, tmp_path / "one", "cpu", **how))
    assert len(told) == 8 and all(chunk[1:3] == (48, 1) for chunk in told)  # all but the first two of each


def test_what_a_process_raises_is_raised_here(images, tmp_path, two):
    recipe = Recipe("cnn", epochs=1, batch_size=8)
    (ensemble.open_store(recipe, images, tmp_path).folder / "logits.npy").mkdir()  # can't be written
    with pytest.raises(ValueError, match="store=.*can't be written"):
        train(recipe, images, 2, tmp_path, "cpu", quiet=True)


def test_what_is_worth_processes(images, monkeypatch):
    long = Recipe("cnn", epochs=100, batch_size=8)  # 3 steps an epoch
    monkeypatch.setattr(loky, "cpu_count", lambda: 4)
    assert workers.n_processes(long, images, CPU) == 4
    assert workers.n_processes(Recipe("cnn", epochs=33, batch_size=8), images, CPU) == 1
    assert workers.n_processes(long, images, torch.device("cuda")) == 1
    assert workers.n_processes(Recipe("__main__:net", epochs=100, batch_size=8), images, CPU) == 1
    for room, n in ((3.5, 3), (0.5, 1)):
        free = SimpleNamespace(available=room * (workers.OWN + 4 * images.x.nbytes))
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: free)
        assert workers.n_processes(long, images, CPU) == n


def test_a_process_that_is_killed_leaves_its_models_to_this_one(images, tmp_path, two, one_thread, capfd):
    recipe = Recipe("cnn", "sam", 0.1, epochs=20, batch_size=8)
    kept = ensemble.open_store(recipe, images, tmp_path / "two")
    with killing_one(kept, children) as killed:
        made = train(recipe, images, 4, tmp_path / "two", "cpu", quiet=True)
    assert killed and "a process that trained was lost" in capfd.readouterr().out
    same(made, here(recipe, images, 4, tmp_path / "one", "cpu", quiet=True))


def train_for_hours(store):
    """By a process of this one's own."""
    images, recipe = blobs(n=48, t=16, shape=(3, 16, 16), classes=3), Recipe("cnn", epochs=9999, batch_size=8)
    workers.train_by_processes(recipe, images, [[0]], store, 1, 1, quiet=True)


def ends_at_once(parent):
    atexit.register(print, "slow to end", flush=True)
    workers.alone(parent)


def test_a_process_that_trained_does_not_wait_for_the_interpreters_end(capfd):
    """Functions that were registered to be called at the end, such as slow ones of torch, are not called."""
    code = f"from {__name__} import ends_at_once; import os; ends_at_once(os.getppid())"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "slow" not in capfd.readouterr().out


def test_they_end_with_the_process_that_started_them(tmp_path):
    process = start(train_for_hours, tmp_path, daemon=False)
    try:
        until(lambda: list(tmp_path.glob("*/claims/*.lock")), 60)
        started = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert started
    finally:
        process.kill()
    until(lambda: not any(alive(pid) for pid in started), 20)


def alive(pid):
    """True if the process runs; one that has ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- Ray --------------------------------------------------------------------------------------------------

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
quiet = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def two_workers():
    """A Ray of two cores, whatever this machine has."""
    ray, before = pytest.importorskip("ray"), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ray, "init", lambda start=ray.init, **how: start(num_cpus=2, **how))
        yield ray
        ray.shutdown()
        for process in [thing for thing in gc.get_objects() if type(thing) is subprocess.Popen]:
            process.wait(10)  # Ray ends its own and does not look after them
    os.environ.clear()  # where Ray has left the number of threads of its workers
    os.environ.update(before)


@with_ray
@quiet
def test_two_workers_make_what_one_process_makes(images, tmp_path, two_workers, one_thread):
    recipe, told = Recipe("cnn", "sam", 0.1, epochs=2, batch_size=8), []
    how = {"quiet": True, "notify": lambda *chunk: told.append(chunk)}
    by_ray = train(recipe, images, 6, tmp_path / "ray", "cpu", "ray", **how)
    same(by_ray, here(recipe, images, 6, tmp_path / "here", "cpu", quiet=True))
    assert len(told) == 4 and all(chunk[1:3] == (48, 1) for chunk in told)  # all but the first two
    assert len(list((tmp_path / "ray").glob("*/done/*.json"))) == 6


@with_ray
@quiet
def test_what_a_task_raises_is_raised_here(images, tmp_path, two_workers):
    recipe = Recipe("cnn", epochs=1, batch_size=8)
    kept = ensemble.open_store(recipe, images, tmp_path)
    (kept.folder / "logits.npy").mkdir()  # can't be written
    with pytest.raises(ValueError, match="store=.*can't be written"):
        train(recipe, images, 2, tmp_path, "cpu", "ray", quiet=True)


@with_ray
@quiet
def test_a_chunk_whose_worker_is_killed_is_trained_anew(images, tmp_path, two_workers, one_thread):
    recipe = Recipe("cnn", "sam", 0.1, epochs=20, batch_size=8)
    kept = ensemble.open_store(recipe, images, tmp_path / "ray")
    with killing_one(kept, lambda: [pid for pid in ray_workers() if holds_a_claim(pid, kept.folder)]) as killed:
        by_ray = train(recipe, images, 4, tmp_path / "ray", "cpu", "ray", quiet=True)
    assert killed, "no worker was caught in mid-chunk"
    same(by_ray, here(recipe, images, 4, tmp_path / "here", "cpu", quiet=True))


def ray_workers():
    """Process numbers of Ray's workers on this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if "ray::" in (folder / "cmdline").read_text():
                yield int(folder.name)
        except OSError:
            continue


def holds_a_claim(pid, folder):
    """True if the process has a claim of the store open."""
    try:
        opened = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(path.startswith(str(folder / "claims")) for path in opened)


def test_an_unknown_engine_never_trains_here_instead(table, quick, tmp_path):
    with pytest.raises(ValueError, match="engine='dask' is unknown"):
        train(quick, table, 2, tmp_path, "cpu", "dask")
    assert not list(tmp_path.iterdir())


def test_an_engine_that_is_not_there_is_said_before_training(monkeypatch):
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="engine='ray' is not installed"):
        workers.check("ray")


@with_ray
@quiet
def test_an_address_that_is_none_is_said(images, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "host:port")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ValueError, match="engine='ray'.*RAY_ADDRESS='host:port'"):
        train(Recipe("cnn", epochs=1, batch_size=8), images, 2, tmp_path, "cpu", "ray", quiet=True)


def test_the_first_models_of_new_code_go_before_the_others(images, tmp_path, two, monkeypatch):
    """They compile; the other chunks would wait for them, and keep the processes from another ensemble."""
    recipe, ahead = Recipe("cnn", epochs=1, batch_size=8), []

    class Pool(futures.ThreadPoolExecutor):
        def submit(self, *work):
            ahead[-1].append(sum(future.done() for future in self.sent))
            self.sent.append(super().submit(*work))
            return self.sent[-1]

    monkeypatch.setattr(workers, "COMPILED", set())
    for seed in (0, 1):
        pool = Pool(1)
        pool.sent, _ = [], ahead.append([])
        monkeypatch.setattr(workers, "processes", cache(lambda n, parent, pool=pool: pool))
        train(replace(recipe, seed=seed), images, 4, tmp_path, "cpu", quiet=True)
    assert ahead[0][1] == 1 and ahead[1][:2] == [0, 0]

"""Processes of one thread each against this process: the same arrays, whatever is lost on the way."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.training import ensemble, processes, step, workers
from lib.training.recipe import Recipe
from tests.conftest import killing_one, same

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def ended():
    yield
    for n in list(processes.POOLS):
        processes.stop(n)


@pytest.fixture
def two(monkeypatch):
    """As if every ensemble were long, and this process had two threads."""
    monkeypatch.setattr(processes, "LONG", 0)
    monkeypatch.setattr(processes.torch, "get_num_threads", lambda: 2)


def test_two_processes_make_what_one_thread_makes(images, tmp_path, two, one_thread):
    told, how = [], {"quiet": True}
    for name in ("sgd", "sam"):  # the second by the same processes
        recipe = Recipe("cnn", name, 0.1, epochs=2, batch_size=8)
        made = workers.train(recipe, images, 6, tmp_path / "two", "cpu", notify=lambda *c: told.append(c), **how)
        same(made, ensemble.train(recipe, images, 6, tmp_path / "one", "cpu", **how))
    assert len(told) == 8 and all(chunk[1:3] == (48, 1) for chunk in told)  # all but the first two of each
    assert list(processes.POOLS) == [2]


def test_what_is_worth_processes(images, monkeypatch):
    long = Recipe("cnn", epochs=100, batch_size=8)  # 3 steps an epoch
    monkeypatch.setattr(processes.torch, "get_num_threads", lambda: 4)
    assert processes.how_many(long, images, CPU) == 4
    assert processes.how_many(Recipe("cnn", epochs=33, batch_size=8), images, CPU) == 1
    assert processes.how_many(long, images, torch.device("cuda")) == 1
    assert processes.how_many(Recipe("__main__:net", epochs=100, batch_size=8), images, CPU) == 1
    each = processes.OWN + ensemble.predicted_memory(long, images, CPU)
    for room, n in ((3.5, 3), (0.5, 1)):
        monkeypatch.setattr(step, "free_memory", lambda device, room=room: int(room * each))
        assert processes.how_many(long, images, CPU) == n


def test_a_process_that_is_killed_leaves_its_models_to_this_one(images, tmp_path, two, one_thread, capfd):
    recipe = Recipe("cnn", "sam", 0.1, epochs=60, batch_size=8)
    kept = ensemble.open_store(recipe, images, tmp_path / "two")
    with killing_one(kept, lambda: list(getattr(processes.POOLS.get(2), "_processes", None) or ())) as killed:
        made = workers.train(recipe, images, 4, tmp_path / "two", "cpu", quiet=True)
    assert killed and "a process that trained was lost" in capfd.readouterr().out
    same(made, ensemble.train(recipe, images, 4, tmp_path / "one", "cpu", quiet=True))
    assert not processes.POOLS


def test_what_a_process_raises_is_raised_here(images, tmp_path, two):
    recipe = Recipe("cnn", epochs=1, batch_size=8)
    (ensemble.open_store(recipe, images, tmp_path).folder / "logits.npy").mkdir()  # can't be written
    with pytest.raises(ValueError, match="store=.*can't be written"):
        workers.train(recipe, images, 2, tmp_path, "cpu", quiet=True)
    assert not processes.POOLS


def test_they_end_with_the_process_that_started_them(tmp_path):
    script = """
        import sys
        sys.path.insert(0, {here!r})
        from tests.conftest import blobs
        from lib.training import ensemble, processes
        from lib.recipe import Recipe
        images, recipe = blobs(n=48, t=16, shape=(3, 16, 16), classes=3), Recipe("cnn", epochs=9999, batch_size=8)
        if __name__ == "__main__":
            processes.train(recipe, images, [[0], [1]], {store!r}, 2, quiet=True)
    """
    store, path = str(tmp_path / "s"), tmp_path / "run.py"
    path.write_text(textwrap.dedent(script).format(here=str(Path(__file__).parent.parent), store=store))
    process = subprocess.Popen([sys.executable, str(path)], start_new_session=True)
    try:
        until(lambda: len(list(Path(store).glob("*/claims/*.lock"))) == 2, 60)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(children) >= 2
        process.kill()
        process.wait()
        until(lambda: not any(alive(pid) for pid in children), 20)
    finally:
        process.poll() is None and process.kill()


def alive(pid):
    """True if the process runs; one that has ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(done, seconds):
    end = time.time() + seconds
    while not done():
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.05)

"""Small data sets and recipes that the tests share.

The process that hands out tests to others reads this file too, so what takes seconds to import is imported within.
"""

import contextlib
import os
import signal
import threading
import time

import numpy as np
import pytest

LONGEST = "test_notebooks.py", "test_workers.py", "test_cells.py"


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that processes which share the tests end together."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def blobs(n=80, t=40, shape=(6,), classes=4, seed=0):
    """Gaussian classes that overlap: float32, n pool and t test examples."""
    from lib.data.dataset import Dataset

    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, *shape))
    y, y_test = np.arange(n) % classes, np.arange(t) % classes
    x, x_test = (centres[label] + 1.5 * rng.normal(size=(len(label), *shape)) for label in (y, y_test))
    names = tuple("abcdefghij"[:classes])
    return Dataset("blobs", x.astype(np.float32), y, x_test.astype(np.float32), y_test, names)


@pytest.fixture
def table():
    return blobs()


@pytest.fixture
def images():
    return blobs(n=48, t=16, shape=(3, 16, 16), classes=3)


@pytest.fixture
def quick():
    from lib.training import Recipe

    return Recipe(epochs=3, batch_size=8, rho=0.1)


@pytest.fixture
def one_thread():
    """In this process too, as in the others of a test: with more, sums in another order have other last bits."""
    from lib.attacks.signals import threads

    with threads(1):
        yield


def same(first, second):
    """Two ensembles of the same arrays, to the last bit."""
    for name in ("logits", "test_logits", "member", "history"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


@contextlib.contextmanager
def killing_one(kept, pids):
    """Meanwhile, kill the first process of pids() once a chunk of the store is claimed: the list of whom it was."""
    killed = []

    def wait():
        while not killed:
            for pid in pids():
                if any((kept.folder / "claims").glob("*.lock")):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield killed
    thread.join(5)

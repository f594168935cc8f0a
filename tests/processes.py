"""Processes for tests: forked from one that has imported the library, so they start in milliseconds, not seconds."""

import os
import sys
import time
from multiprocessing import get_context

import pytest
import torch

FORK = get_context("forkserver")
FORK.set_forkserver_preload(
    [*"benchmarks.faults lib.study.experiments lib.study.figures sklearn.datasets sympy".split()]
)


def start(task, *args, said=os.devnull, daemon=True):
    """A process of one thread that does task(*args), a function at the top of a module. `said` is the file of what it
    prints. It ends with the status that the task returns."""
    process = FORK.Process(target=life, args=(str(said), task, args), daemon=daemon)
    process.start()
    return process


def life(said, task, args):
    """The main function of such a process."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    sys.exit(task(*args))


def ended(process):
    """The exit status of a process, once it has ended."""
    process.join()
    return process.exitcode


def until(condition, seconds, what="what is waited for"):
    """The first true value of condition(), asked ten times a second; fails after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {seconds} s")

"""The study's library. Whatever it writes, others on this machine may read, and only its owner and group may change."""

import gc
import os

os.umask(os.umask(0o022) | 0o002)
# imports and the compiler make half a million objects that stay: looking through them took a seventh of compiling
gc.set_threshold(100_000)


def need(fine, problem: str) -> None:
    """Raise ValueError(problem) unless `fine`."""
    if not fine:
        raise ValueError(problem)

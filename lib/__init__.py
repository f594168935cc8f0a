"""The study's library. Whatever it writes, others on this machine may read, and only its owner and group may change."""

import gc
import os

os.umask(os.umask(0o022) | 0o002)
gc.set_threshold(100_000)  # new objects, of which the compiler makes many: to look for garbage took a seventh of it


def need(fine, problem: str) -> None:
    """Raise ValueError(problem) unless `fine`."""
    if not fine:
        raise ValueError(problem)

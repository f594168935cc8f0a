"""The study's library. Whatever it writes, others on this machine may read, and only its owner and group may change."""

import gc
import os

os.umask(os.umask(0o022) | 0o002)
# Python looks for garbage after so many new objects; after 700, its default, that took a seventh of a compilation
gc.set_threshold(100_000)


def need(fine, problem: str) -> None:
    """Raise ValueError(problem) unless `fine`."""
    if not fine:
        raise ValueError(problem)

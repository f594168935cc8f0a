"""Any data set becomes one `Dataset`: a pool of N examples, on whose halves models train, and T test examples."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd

from lib import need
from lib.data import sources
from lib.data.sources import DATASETS, ROOT


@dataclass(frozen=True, eq=False)
class Dataset:
    """A pool x, y with a test part; `hash` names the content, whatever the source it came from."""

    name: str
    x: np.ndarray  # uint8 or float32 images [N, channels, H, W], or float32 features [N, D]
    y: np.ndarray  # int64 [N], 0..C-1
    x_test: np.ndarray  # [T, ...]
    y_test: np.ndarray  # [T]
    classes: tuple[str, ...]
    index: np.ndarray | None = None  # [N] where these examples stand in the data as loaded; None: all of it, in order
    groups: np.ndarray | None = None  # int64 [N] what belongs together (a patient's two eyes); None: each its own
    groups_test: np.ndarray | None = None  # int64 [T] likewise, for the intervals over the test part
    pattern: np.ndarray | None = None  # int64 [N] the sub-pattern each example was drawn from, where that is known
    pattern_test: np.ndarray | None = None  # int64 [T] likewise

    @cached_property
    def hash(self) -> str:
        """Hex digest over the class names and over dtype, shape and bytes of the four arrays and the groups."""
        digest = blake2b(json.dumps(self.classes).encode(), digest_size=16)
        for array in (self.x, self.y, self.x_test, self.y_test, *([] if self.groups is None else [self.groups])):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    is_image = property(lambda self: self.x.ndim == 4)
    n_classes = property(lambda self: len(self.classes))


def load(name: str, data=None, cache=None, seed: int = 0) -> Dataset:
    """Load a data set of DATASETS; `data` is its path, `cache` the folder for decoded data (store/cache).

    docs/settings.md says which files each one reads, and what is left out is printed. Without a test part one is split
    off, in whole groups, with `seed`. Raises ValueError for what is missing or wrong."""
    try:
        need(name in DATASETS, f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")
        given = sources.read(name, data, Path(cache or ROOT / "store" / "cache"))
        x, (labels, y) = _examples("x", given["x"]), np.unique(_labels("y", given["y"]), return_inverse=True)
        if left_out := str(given.get("left_out", "")):
            print(f"{name}: left out: {left_out}", flush=True)
        more = {key: given[key] for key in ("groups", "pattern", "pattern_test") if key in given}
        if "groups" in more:  # numbers or names
            more["groups"] = np.unique(more["groups"], return_inverse=True)[1]
        d = Dataset(name, x, y, x, y, tuple(map(str, labels)), **more)
        if "x_test" in given:
            y_test = _labels("y_test", given["y_test"])
            extra = np.setdiff1d(y_test, labels)[:5].tolist()
            need(not extra, f"the test part has labels {extra}; only those of the pool are valid")
            y_test = np.searchsorted(labels, y_test)
            return validate(replace(d, x_test=_examples("x_test", given["x_test"]), y_test=y_test))
        # a share of the groups, stratified by their highest label
        groups, top = _grouped(validate(d))
        share = {"digits": 597 / 1797, "mnist5k": 0.4, "npz": 0.25}.get(name, 0.2)
        n = max(len(top) - round(share * len(top)), 2 * d.n_classes)
        need(n < len(top), f"{len(top)} groups; two for each of {d.n_classes} classes and one to test on are needed")
        keep = np.isin(groups, _draw(top, n, seed, least=2))
        d, test = replace(d, index=np.arange(len(d.y))), _subset(d, ~keep)
        return validate(replace(_subset(d, keep), x_test=test.x, y_test=test.y, groups_test=test.groups))
    except (ValueError, PermissionError) as error:
        raise ValueError(f"data={data!r}: {error}") from error


def pool(dataset: Dataset, n_examples=None, seed: int = 0, n_test=None) -> Dataset:
    """A stratified random subset of the pool, in random order, and n_test examples of the test part (None: all).

    n_examples must be even, and of whole groups in two equal halves (None: as many as possible). Raises ValueError."""
    n, t, least = len(dataset.y), len(dataset.y_test), 2 * dataset.n_classes
    need(isinstance(seed, int | np.integer) and seed >= 0, f"{seed=}: needs a whole number, not negative")
    even = n_examples in (None, *range(least, n + 1, 2))
    need(even, f"{n_examples=}: needs an even number from {least} (two of each class) to {n} (all there are)")
    need(n_test in (None, *range(1, t + 1)), f"{n_test=}: needs a whole number from 1 to {t} (all there are)")
    if n_test is not None:
        dataset = _subset(dataset, _draw(dataset.y_test, n_test, seed), "_test")
    grouped = dataset.groups is not None
    keep = _draw_groups(dataset, n_examples, seed) if grouped else _draw(dataset.y, n_examples or n - n % 2, seed, 2)
    if n_examples is not None or len(keep) < n:
        dataset = _subset(replace(dataset, index=np.arange(n) if dataset.index is None else dataset.index), keep)
    return validate(dataset)


def inputs(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """float32 model inputs (x [N, ...], x_test [T, ...]), standardised by channel or feature unless in 0..1."""
    full = 255 if dataset.x.dtype == np.uint8 else 1
    x, x_test = (np.divide(part, full, dtype=np.float32) for part in (dataset.x, dataset.x_test))
    if full == 1 and x.min() >= 0 and x.max() <= 1:
        return x, x_test
    flat, flat_test = (part.reshape(*part.shape[:2], -1) for part in (x, x_test))  # [N, channels, pixels]
    mean = flat.mean(axis=(0, 2), dtype=np.float64)[:, None].astype(np.float32)
    flat -= mean  # in place: 50,000 images are held once
    std = np.sqrt(np.einsum("ncp,ncp->c", flat, flat, dtype=np.float64) / (len(flat) * flat.shape[2]))
    flat /= (scale := np.where(std > 0, std, np.inf)[:, None].astype(np.float32))
    return x, ((flat_test - mean) / scale).reshape(x_test.shape)


def validate(dataset: Dataset) -> Dataset:
    """Return `dataset`, or raise one ValueError that says what is wrong with it."""
    c, shape = dataset.n_classes, dataset.x.shape[1:]
    for part in ("", "_test"):
        x, y, groups = (getattr(dataset, f"{key}{part}") for key in ("x", "y", "groups"))
        fine = x.dtype in (np.uint8, np.float32) and x.ndim in (2, 4) and x.size and x.shape[1:] == shape
        what = f"x{part} is {x.dtype} {list(x.shape)} and y{part} {y.dtype} {list(y.shape)}"
        form = f"uint8 or float32 [N, *{list(shape)}], 2-D or 4-D, and integers [N], N > 0, are needed"
        need(fine and y.dtype.kind in "iu" and y.shape == x.shape[:1], f"{what}; {form}")
        need(x.dtype == np.uint8 or np.isfinite(x).all(), f"x{part} holds NaN or infinity; finite numbers are needed")
        need(0 <= y.min() and y.max() < c, f"y{part} runs from {y.min()} to {y.max()}; valid are 0..{c - 1}")
        need(groups is None or groups.shape == y.shape, f"groups{part}: {len(y)} integers are needed")
    n = np.bincount(dataset.y, minlength=c)
    why = f"y: class {dataset.classes[n.argmin()]!r} has {n.min()} of the pool"
    need(c > 1 and n.min() > 1, f"{why}; at least two classes are needed, and two examples of each")
    return dataset


def _subset(dataset: Dataset, keep: np.ndarray, part: str = "") -> Dataset:
    """The examples `keep` of the pool, or of the part "_test"; groups are numbered anew."""
    fields = (f"{key}{part}" for key in ("x", "y", "index", "groups", "pattern"))
    kept = {field: a[keep] for field in fields if (a := getattr(dataset, field, None)) is not None}
    if f"groups{part}" in kept:
        kept[f"groups{part}"] = np.unique(kept[f"groups{part}"], return_inverse=True)[1]
    return replace(dataset, **kept)


def _draw(y: np.ndarray, n: int, seed: int, least: int = 0) -> np.ndarray:
    """Indices of n examples in random order, in proportion to the classes, but at least `least` of each class."""
    counts = np.bincount(y)
    least, exact = np.minimum(counts, least), n * counts / len(y)
    take = np.maximum(np.floor(exact).astype(int), least)
    while take.sum() < n:  # largest remainder first
        take[np.argmax(exact - take)] += 1
    while take.sum() > n:  # small classes got their `least`: the others make room
        take[np.argmax(np.where(take > least, take - exact, -np.inf))] -= 1
    order = np.random.default_rng(seed).permutation(len(y))
    return order[np.sort(np.concatenate([np.flatnonzero(y[order] == c)[:k] for c, k in enumerate(take)]))]


def _draw_groups(dataset: Dataset, n_examples: int | None, seed: int) -> np.ndarray:
    """Indices of n_examples (None: as many as possible), shuffled: groups in pairs of one size, one for either half."""
    groups, top = _grouped(dataset)
    sizes, rng = np.bincount(groups), np.random.default_rng(seed)
    # classes take turns, in proportion to their sizes; the first two groups of each lead
    mixed = pd.Series(top).sample(frac=1, random_state=rng)
    place = mixed.groupby(mixed).cumcount()
    place = (place / mixed.groupby(mixed).transform("size")).where(place > 1, 0)
    waiting, taken, room = {}, [], n_examples or len(groups)
    for group in place.sort_values(kind="stable").index:
        other = waiting.pop(sizes[group], None)
        if other is None:
            waiting[sizes[group]] = group
        elif 2 * sizes[group] <= room:
            taken += [group, other]
            room -= 2 * sizes[group]
    n = (n_examples or len(groups)) - room
    need(n and n_examples in (None, n), f"{n_examples=}: two halves of whole groups have {n} in all; choose that")
    shuffled = rng.permutation(len(groups))
    return shuffled[np.isin(groups[shuffled], taken)]


def _grouped(d: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(groups [N], 0..G-1, highest label of each group [G])."""
    groups = np.arange(len(d.y)) if d.groups is None else np.unique(d.groups, return_inverse=True)[1]
    return groups, pd.Series(d.y).groupby(groups).max().to_numpy()


def _examples(key: str, a: np.ndarray) -> np.ndarray:
    """uint8 or float32 images [N, channels, H, W], or float32 features [N, D]."""
    what, a = f"{key} is {a.dtype} {list(a.shape)}", a[:, None] if a.ndim == 3 else a
    if a.ndim == 4 and a.shape[1] not in (1, 3):  # if both axes could be the channels, the first one is
        a = np.moveaxis(a, 3, 1)
    fine = a.dtype.kind in "biuf" and (a.ndim == 2 or a.ndim == 4 and a.shape[1] in (1, 3))
    need(fine, f"{what}; numbers [N, D], [N, H, W] or 4-D with 1 or 3 channels in axis 1 or 3 are needed")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused by validate
        return np.ascontiguousarray(a, dtype=np.uint8 if a.dtype == np.uint8 and a.ndim == 4 else np.float32)


def _labels(key: str, a: np.ndarray) -> np.ndarray:
    """int64 [N] from integers, whole floats or one-hot rows [N, C]; names [N] stay names. A column [N, 1] is [N]."""
    number, what = a.dtype.kind in "biuf", f"{key} is {a.dtype} {list(a.shape)}"
    a = a[:, 0] if a.ndim == 2 and a.shape[1] == 1 else a
    if number and a.ndim == 2 and np.isin(a, (0, 1)).all() and (a.sum(axis=1) == 1).all():
        return a.argmax(axis=1)
    fine = np.isfinite(a).all() and (a == np.trunc(a)).all() if number else a.dtype.kind == "U"
    need(fine and a.ndim == 1, f"{what}; whole numbers or names [N], or one-hot rows [N, C], are needed")
    return a.astype(np.int64) if number else a

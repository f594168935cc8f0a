"""Any data set becomes one `Dataset`: a pool to draw members from and a test part; also its duplicates.

Shapes: N pool examples, T test examples, C classes. The pool is what random halves are drawn from; no model
trains on the test part. Where the arrays come from is in lib.sources.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data import sources
from lib.data.sources import CIFAR, DATASETS, ROOT, need, obtain

__all__ = ["DATASETS", "Dataset", "duplicate_table", "duplicates", "inputs", "load", "obtain", "pattern_size", "pool"]
__all__ += ["validate"]

SHARES = {"digits": 597 / 1797, "npz": 0.25}  # split off as the test part where none is given; others: 0.2
TEST = ("x_test", "y_test", "groups_test", "pattern_test")
NEAR = 0.5  # a near duplicate is this much nearer than a typical nearest neighbour: see `duplicates`


@dataclass(frozen=True, eq=False)
class Dataset:
    """A pool x, y with a test part; `hash` names the content, whatever the source it came from."""

    name: str
    x: np.ndarray  # uint8 or float32 images [N, channels, H, W], or float32 features [N, D]
    y: np.ndarray  # int64 [N], 0..C-1
    x_test: np.ndarray  # [T, ...]
    y_test: np.ndarray  # [T]
    classes: tuple[str, ...]
    index: np.ndarray | None = None  # [N] which examples of the training part as loaded these are; None: all, in order
    groups: np.ndarray | None = None  # int64 [N] what belongs together (a patient's two eyes); None: each its own
    groups_test: np.ndarray | None = None  # int64 [T] likewise, for the intervals over the test part
    pattern: np.ndarray | None = None  # int64 [N] the sub-pattern each example was drawn from, where that is known
    pattern_test: np.ndarray | None = None  # int64 [T] likewise

    @cached_property
    def hash(self) -> str:
        """Hex digest over dtype, shape and bytes of the four arrays and the groups and over the class names."""
        digest = blake2b(json.dumps(self.classes).encode(), digest_size=16)
        groups = () if self.groups is None else (self.groups,)
        for array in (self.x, self.y, self.x_test, self.y_test, *groups):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    @property
    def is_image(self) -> bool:
        return self.x.ndim == 4

    @property
    def n_classes(self) -> int:
        return len(self.classes)


def load(name: str, data=None, cache=None) -> Dataset:
    """Load a data set of DATASETS; `data` is its path, `cache` the folder for decoded data (store/cache).

    `folder` reads train/<class>/ and test/<class>/, also in an archive; `npz` reads x, y or features, labels, and
    groups. purchase100 and texas100 take the archives of Shokri et al. (2017), their text files, or an .npz; eyepacs
    Kaggle's layout; data=None looks for them in data/ (`obtain` says how to fill it). Without a test part whole groups
    are split off: no patient is in both parts.
    Raises FileNotFoundError for a missing path, ValueError for all else that is wrong with name or data.
    """
    try:
        return validate(_dataset(name, **sources.read(name, data, Path(cache or ROOT / "store" / "cache"))))
    except ValueError as error:
        raise ValueError(f"data={data!r}: {error}") from error


def pool(dataset: Dataset, n_examples=None, seed: int = 0, n_test=None) -> Dataset:
    """A stratified random subset of n_examples of the pool, two or more of each class; seed sets its order.

    n_examples must be even, for complementary halves; None keeps all, or as many as can be. Groups stay whole, and
    can be divided into two halves of n_examples / 2. n_test limits the test part; None keeps it all. Raises ValueError.
    """
    n, t, least = len(dataset.y), len(dataset.y_test), 2 * dataset.n_classes
    need(_whole(seed, 0), f"seed={seed!r}: needs a whole number, not negative")
    even = n_examples is None or _whole(n_examples, least, n) and n_examples % 2 == 0
    need(even, f"{n_examples=}: needs an even number from {least} (two of each class) to {n} (all there are)")
    need(n_test is None or _whole(n_test, 1, t), f"{n_test=}: needs a whole number from 1 to {t} (all there are)")
    if n_test is not None:
        dataset = _subset(dataset, _draw(dataset.y_test, n_test, seed), TEST)
    if dataset.groups is not None:
        keep = _draw_groups(dataset, n_examples, seed)
    else:
        keep = _draw(dataset.y, n_examples or n - n % 2, seed, least=2)
    if n_examples is not None or len(keep) < n:
        dataset = replace(dataset, index=np.arange(n) if dataset.index is None else dataset.index)
        dataset = _subset(dataset, keep, ("x", "y", "index", "groups", "pattern"))
    return validate(dataset)


def inputs(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """float32 model inputs (x [N, ...], x_test [T, ...]); all statistics come from the pool.

    Floats within [0, 1] stay as they are. uint8 is divided by 255; it and all else is standardised, images by
    channel and features one by one; what is constant in the pool becomes 0.
    """
    full = 255 if dataset.x.dtype == np.uint8 else 1
    x, x_test = (np.divide(part, full, dtype=np.float32) for part in (dataset.x, dataset.x_test))
    if full == 1 and x.min() >= 0 and x.max() <= 1:
        return x, x_test
    flat, flat_test = (part.reshape(*part.shape[:2], -1) for part in (x, x_test))  # [N, channels, pixels]
    mean = flat.mean(axis=(0, 2), dtype=np.float64)[:, None].astype(np.float32)
    flat -= mean  # in place: 50,000 images are held once
    std = np.sqrt(np.einsum("ncp,ncp->c", flat, flat, dtype=np.float64) / (len(flat) * flat.shape[2]))
    scale = np.where(std > 0, std, np.inf)[:, None].astype(np.float32)
    flat /= scale
    return x, ((flat_test - mean) / scale).reshape(x_test.shape)


def validate(dataset: Dataset) -> Dataset:
    """Return `dataset` unchanged, or raise one ValueError that says what is wrong with it."""
    d, c = dataset, dataset.n_classes
    for part, x, y in (("", d.x, d.y), ("_test", d.x_test, d.y_test)):
        what = f"x{part} is {x.dtype} {list(x.shape)} and y{part} {y.dtype} {list(y.shape)}"
        form = x.dtype in (np.uint8, np.float32) and x.ndim in (2, 4) and x.size
        labels = y.dtype.kind in "iu" and y.shape == x.shape[:1]
        need(form and labels, f"{what}; uint8 or float32 [N, ...], 2-D or 4-D, and integers [N], N > 0, are needed")
        need(x.shape[1:] == d.x.shape[1:], f"{what}, x is {list(d.x.shape)}; only axis 0 may differ")
        need(x.dtype == np.uint8 or np.isfinite(x).all(), f"x{part} holds NaN or infinity; finite numbers are needed")
        need(0 <= y.min() and y.max() < c, f"y{part} runs from {y.min()} to {y.max()}; valid are 0..{c - 1}")
    for key, y in (("groups", d.y), ("pattern", d.y), ("groups_test", d.y_test), ("pattern_test", d.y_test)):
        if (a := getattr(d, key)) is not None:
            fine = a.dtype.kind in "iu" and a.shape == y.shape and a.min() >= 0
            need(fine, f"{key} is {a.dtype} {list(a.shape)}; integers {list(y.shape)}, not negative, are needed")
    n = np.bincount(d.y, minlength=c)
    why = f"class {d.classes[n.argmin()]!r} has {n.min()} of the pool"
    need(c > 1 and n.min() > 1, f"y: {why}; at least two classes are needed, and two examples of each")
    return dataset


def pattern_size(dataset: Dataset) -> np.ndarray:
    """int64 [N] how many pool examples share an example's sub-pattern; 1: it is the only one. Raises ValueError."""
    need(dataset.pattern is not None, f"dataset={dataset.name!r} has no known sub-patterns; 'subclasses' has")
    return np.bincount(dataset.pattern)[dataset.pattern]


def duplicates(dataset: Dataset, near: float | None = None) -> pd.DataFrame:
    """Each pool example's nearest other pool example and nearest test example: a frame of N lines.

    Columns: `nearest` (index in the pool), `distance` (root mean square difference of the model inputs in units of
    their pooled standard deviation: sqrt(2) for two unrelated examples), `exact` (equal bytes), `near` (distance below
    `near`, or exact), `other_label` (of the nearest one; among exact copies one with another label is taken, if any)
    and `test_nearest`, `test_distance`, `test_exact`, `test_near`. `frame.attrs["near"]` is the threshold.

    near=None: half the median nearest distance of the examples that are no exact copies. Where the data have intrinsic
    dimension d, the number of neighbours within r grows as r^d, so of independent draws a share of about 2^-d log 2
    would be so near by chance: 0.07% at d = 10. A screen, not a proof: of such pairs of CIFAR-10 about half are one and
    the same picture, the others two plain skies or seas. Raises ValueError for a threshold that is no number or is
    negative.
    """
    need(
        near is None or isinstance(near, int | float | np.number) and 0 <= near < np.inf,
        f"{near=}: needs a number, not negative",
    )
    z, z_test = _standard(dataset)
    keys, keys_test = _keys(dataset.x), _keys(dataset.x_test)
    frame = _twins(*_nearest(z, z), _copies(keys, dataset.y))
    first = {key: i for i, key in reversed(list(enumerate(keys_test)))}
    test = _twins(*_nearest(z, z_test), {i: first[key] for i, key in enumerate(keys) if key in first})
    frame = frame.join(test.add_prefix("test_"))
    unique = frame.distance[~frame.exact]
    near = near if near is not None else NEAR * unique.median() if len(unique) else 0.0
    for part in ("", "test_"):
        frame[f"{part}near"] = frame[f"{part}exact"] | (frame[f"{part}distance"] < near)
    frame["other_label"] = dataset.y != dataset.y[frame.nearest]
    frame.attrs["near"] = float(near)
    return frame


def duplicate_table(dataset: Dataset, near: float | None = None) -> pd.DataFrame:
    """Tidy rows (metric, value, ci_low, ci_high) on the duplicates in the pool: how many, and which share of it.

    A non-member with a twin among the members is none, and a twin with another label can only be memorized.
    """
    frame = duplicates(dataset, near)
    rows = {"near_duplicate_distance": frame.attrs["near"], "median_nearest_distance": frame.distance.median()}
    for kind in ("exact", "near"):
        twin, test = frame[kind], frame[f"test_{kind}"]
        counts = {"duplicates": twin, "duplicates_other_label": twin & frame.other_label, "test_twins": test}
        for what, found in counts.items():
            rows |= {f"{kind}_{what}": found.sum(), f"{kind}_{what}_share": found.mean()}
    return pd.DataFrame(
        {"metric": rows.keys(), "value": map(float, rows.values()), "ci_low": np.nan, "ci_high": np.nan}
    )


def _standard(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Model inputs [N, D], [T, D], centred, in units in which |a - b| is the rms difference over the pooled std."""
    z, z_test = (part.reshape(len(part), -1) for part in inputs(dataset))
    mean = z.mean(axis=0, dtype=np.float64).astype(np.float32)
    z -= mean
    # |a - b|^2 = mean_j (a_j - b_j)^2 / s^2, with s^2 = mean_j var_j, so D s^2 = mean_i |z_i|^2
    unit = np.float32(np.sqrt(np.einsum("nd,nd->", z, z, dtype=np.float64) / len(z)) or 1)
    z /= unit
    return z, (z_test - mean) / unit


def _nearest(a: np.ndarray, b: np.ndarray, block: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """(index [N] of the row of b [K, D] nearest to each of a [N, D], distance); b is a: of the other rows."""
    index, best = np.zeros(len(a), dtype=np.int64), np.full(len(a), np.inf, dtype=np.float32)
    square_a, square_b = (np.einsum("nd,nd->n", part, part) for part in (a, b))
    for i in range(0, len(a), block):
        for j in range(i if a is b else 0, len(b), block):
            # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b
            squares = a[i : i + block] @ b[j : j + block].T
            squares *= -2
            squares += square_a[i : i + block, None]
            squares += square_b[j : j + block]
            if a is b and i == j:
                np.fill_diagonal(squares, np.inf)
            _improve(index, best, squares, 1, i, j)
            if a is b and i < j:  # the distance is symmetric: half of the products are enough
                _improve(index, best, squares, 0, j, i)
    return index, _distances(a, b, index, block)


def _improve(index, best, squares, axis, at, start) -> None:
    """Take into index, best [at:] what is smaller along an axis of squares, whose columns or rows begin at start."""
    found = squares.argmin(axis=axis)
    least = np.take_along_axis(squares, np.expand_dims(found, axis), axis).ravel()
    part = slice(at, at + len(least))
    better = least < best[part]
    index[part][better], best[part][better] = start + found[better], least[better]


def _distances(a, b, index, block) -> np.ndarray:
    """float64 [N] |a - b[index]|, from differences: the products above lose the digits of a small one."""
    starts = range(0, len(a), block)
    steps = (a[s : s + block].astype(np.float64) - b[index[s : s + block]] for s in starts)
    return np.concatenate([np.sqrt(np.einsum("nd,nd->n", step, step)) for step in steps])


def _keys(x: np.ndarray) -> list[bytes]:
    return [blake2b(row.tobytes(), digest_size=16).digest() for row in x]


def _copies(keys: list[bytes], y: np.ndarray) -> dict[int, int]:
    """{i: an exact copy of pool example i, of another label where there is one}."""
    same = {}
    for i, key in enumerate(keys):
        same.setdefault(key, []).append(i)
    copies = {}
    for members in same.values():
        by_label = sorted(members, key=lambda i: y[i])
        for i in members if len(members) > 1 else ():
            ends = [k for k in (by_label[0], by_label[-1]) if y[k] != y[i]] or [k for k in by_label[:2] if k != i]
            copies[i] = ends[0]
    return copies


def _twins(index: np.ndarray, distance: np.ndarray, copies: dict[int, int]) -> pd.DataFrame:
    exact = np.isin(np.arange(len(index)), list(copies))
    index[exact], distance[exact] = [copies[i] for i in np.flatnonzero(exact)], 0
    return pd.DataFrame({"nearest": index, "distance": distance, "exact": exact})


def _whole(value, low: int, high: float = np.inf) -> bool:
    return isinstance(value, int | np.integer) and low <= value <= high


def _subset(dataset: Dataset, keep: np.ndarray, fields: tuple[str, ...]) -> Dataset:
    """The examples `keep` in those of the fields that there are; groups are numbered anew."""
    parts = {field: a[keep] for field in fields if (a := getattr(dataset, field)) is not None}
    for field in {"groups", "groups_test"} & set(parts):
        parts[field] = np.unique(parts[field], return_inverse=True)[1]
    return replace(dataset, **parts)


def _quota(counts: np.ndarray, n: int, least: int) -> np.ndarray:
    """How many of n are taken of each class of `counts` examples: in proportion, but at least `least`."""
    least = np.minimum(counts, least)
    exact = n * counts / counts.sum()
    take = np.maximum(np.floor(exact).astype(int), least)
    while take.sum() < n:  # largest remainder first
        take[np.argmax(exact - take)] += 1
    while take.sum() > n:  # small classes got their `least`: the others make room
        take[np.argmax(np.where(take > least, take - exact, -np.inf))] -= 1
    return take


def _draw(y: np.ndarray, n: int, seed: int, least: int = 0) -> np.ndarray:
    """Indices of n examples in random order, in proportion to the classes, at least `least` of each class."""
    take = _quota(np.bincount(y), n, least)
    order = np.random.default_rng(seed).permutation(len(y))
    first = [np.flatnonzero(y[order] == c)[:k] for c, k in enumerate(take)]
    return order[np.sort(np.concatenate(first))]


def _draw_groups(dataset: Dataset, n_examples: int | None, seed: int) -> np.ndarray:
    """Indices of n_examples in whole groups, in random order; None: of as many as can be."""
    n, groups = len(dataset.y), np.unique(dataset.groups, return_inverse=True)[1]
    sizes, top = np.bincount(groups), _highest(dataset.y, groups)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(sizes)) for _ in range(8)]
    large_first = orders[0][np.argsort(-sizes[orders[0]], kind="stable")]  # the small ones fill the gaps
    ways = [(top, order) for order in orders] + [(top, large_first), (0 * top, large_first)]  # last: not stratified
    tries = ((k, *way) for k in range((n_examples or n) // 2 * 2, 2 * dataset.n_classes - 1, -2) for way in ways)
    chosen = next((c for k, *way in tries if (c := _fill(k, sizes, *way)) is not None), None)
    need(chosen is not None, f"groups of {np.unique(sizes)[:5].tolist()} examples cannot be cut into equal halves")
    found = sizes[chosen].sum()
    need(n_examples in (None, found), f"{n_examples=}: no two halves of whole groups were found; {found} is possible")
    shuffled = rng.permutation(n)
    return shuffled[np.isin(groups[shuffled], chosen)]


def _highest(y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[G] the highest label of each group 0..G-1."""
    top = np.zeros(groups.max() + 1, dtype=np.int64)
    np.maximum.at(top, groups, y)
    return top


def _fill(n: int, sizes: np.ndarray, top: np.ndarray, order: np.ndarray) -> np.ndarray | None:
    """Groups of n examples in all, in proportion to the classes `top`, that make two equal halves, or None."""
    room = _quota(np.bincount(top, weights=sizes).astype(int), n, least=2)
    chosen, rest = [], []
    for g in order:
        fits = sizes[g] <= room[top[g]]
        (chosen if fits else rest).append(g)
        room[top[g]] -= sizes[g] * fits
    left = room.sum()
    for g in rest:  # a pair where one example was missing: the rest comes from any class
        if sizes[g] <= left:
            chosen.append(g)
            left -= sizes[g]
    return np.array(chosen) if left == 0 and _reachable(sizes[chosen], n // 2) else None


def _reachable(sizes: np.ndarray, total: int) -> bool:
    """Whether some of the sizes add up to `total`: bit k of `sums` says that some add up to k."""
    sums = 1
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        for k in _powers(int(count)):  # sums of 0..count of the same size, in log(count) steps
            sums |= sums << int(size) * k
    return bool(sums >> total & 1)


def _powers(count: int) -> list[int]:
    """1, 2, 4, ... and a rest, of which every number from 0 to count is a sum."""
    powers = [1 << k for k in range((count + 1).bit_length() - 1)]
    return powers + [count - sum(powers)] * (count > sum(powers))


def _dataset(name: str, x, y, x_test=None, y_test=None, groups=None, pattern=None, pattern_test=None) -> Dataset:
    """A Dataset of examples and labels in any of their forms; without a test part one is drawn from the pool."""
    x, (labels, y) = _examples("x", x), np.unique(_labels("y", y), return_inverse=True)
    if groups is not None and groups.dtype.kind == "U" and groups.ndim == 1:  # names of patients
        groups = np.unique(groups, return_inverse=True)[1]
    d = Dataset(name, x, y, x, y, tuple(map(str, labels)), groups=groups, pattern=pattern, pattern_test=pattern_test)
    found, form = f"{d.n_classes} classes, {list(x.shape[1:])}", f"{name[5:]} classes, [3, 32, 32]"
    need(name not in CIFAR or found == form, f"it holds {found}, {name} has {form}; use dataset 'folder'")
    if x_test is None:
        d = _split(validate(d), SHARES.get(name, 0.2))
    else:
        y_test = _labels("y_test", y_test)
        extra = np.setdiff1d(y_test, labels)[:5].tolist()
        need(not extra, f"the test part has labels {extra}; only those of the pool are valid")
        d = replace(d, x_test=_examples("x_test", x_test), y_test=np.searchsorted(labels, y_test))
    if d.x.ndim == 2:  # binary features come as uint8: floats take four times the memory
        d = replace(d, x=d.x.astype(np.float32, copy=False), x_test=d.x_test.astype(np.float32, copy=False))
    return d if groups is None else _subset(d, np.arange(len(d.y)), ("groups",))


def _split(d: Dataset, share: float) -> Dataset:
    """Move a share of the groups, stratified by their highest label, to the test part.

    One fixed draw; two groups of each class, where there are, stay in the pool.
    """
    groups = np.arange(len(d.y)) if d.groups is None else np.unique(d.groups, return_inverse=True)[1]
    top = _highest(d.y, groups)
    n_pool = max(len(top) - round(share * len(top)), 2 * d.n_classes)
    need(n_pool <= len(top), f"{len(top)} groups; two for each of {d.n_classes} classes are needed")
    keep = np.isin(groups, _draw(top, n_pool, seed=0, least=2))
    need(not keep.all(), f"{len(top)} groups leave none for a test part; more, or x_test and y_test, are needed")
    own = None if d.groups is None else np.unique(groups[~keep], return_inverse=True)[1]
    test = dict(x_test=d.x[~keep], y_test=d.y[~keep], groups_test=own)
    return _subset(replace(d, **test), keep, ("x", "y", "groups", "pattern"))


def _examples(key: str, a: np.ndarray) -> np.ndarray:
    """uint8 or float32 [N, channels, H, W] or [N, D]."""
    what, a = f"{key} is {a.dtype} {list(a.shape)}", a[:, None] if a.ndim == 3 else a
    if a.ndim == 4 and a.shape[1] not in (1, 3):  # if both axes could be the channels, the first one is
        a = np.moveaxis(a, 3, 1)
    fine = a.dtype.kind in "biuf" and (a.ndim == 2 or a.ndim == 4 and a.shape[1] in (1, 3))
    need(fine, f"{what}; numbers [N, D], [N, H, W] or 4-D with 1 or 3 channels in axis 1 or 3 are needed")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused by validate
        return np.ascontiguousarray(a, dtype=np.uint8 if a.dtype == np.uint8 else np.float32)


def _labels(key: str, a: np.ndarray) -> np.ndarray:
    """int64 [N] from integers, whole floats or one-hot rows [N, C]; names [N] stay names. A column [N, 1] is [N]."""
    number, what = a.dtype.kind in "biuf", f"{key} is {a.dtype} {list(a.shape)}"
    a = a[:, 0] if a.ndim == 2 and a.shape[1] == 1 else a
    if number and a.ndim == 2 and np.isin(a, (0, 1)).all() and (a.sum(axis=1) == 1).all():
        return a.argmax(axis=1)
    fine = np.isfinite(a).all() and (a == np.trunc(a)).all() if number else a.dtype.kind == "U"
    need(fine and a.ndim == 1, f"{what}; whole numbers or names [N], or one-hot rows [N, C], are needed")
    return a.astype(np.int64) if number else a

"""Data sets: digits, CIFAR, a folder or archive of images, or arrays in an .npz file become one `Dataset`.

Shapes: N pool examples, T test examples, C classes. The pool is what random halves are drawn from; no model
trains on the test part. Nothing is unpickled but CIFAR's own files, by torchvision, after its checksums.
"""

import glob
import io
import json
import os
import re
import tarfile
import tempfile
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

DATASETS = ("digits", "cifar10", "cifar100", "folder", "npz")
CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # the folder of torchvision's files
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
# (leading folder of an archive, train or test, class, file) of an image; nothing hidden, absolute or with ".."
PLACE = re.compile(r"(?:\./)?(?:([^./][^/]*)/)?(train|test)/([^./][^/]*)/([^./][^/]*\.(?i:png|jpe?g|bmp|webp))")
SHARES = {"digits": 597 / 1797, "npz": 0.25}  # split off as the test part where none is given; images: 0.2
LAYOUT = "train/<class>/*.png (.jpg, .jpeg, .bmp, .webp) and perhaps test/<class>/... (CIFAR: or torchvision's files)"
ROOT = Path(__file__).resolve().parents[1]


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

    @cached_property
    def hash(self) -> str:
        """Hex digest over dtype, shape and bytes of the four arrays and over the class names."""
        digest = blake2b(json.dumps(self.classes).encode(), digest_size=16)
        for array in (self.x, self.y, self.x_test, self.y_test):
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
    """Load a data set of DATASETS; `data` is its path, `cache` the folder for decoded images (store/cache).

    `folder` reads train/<class>/ and test/<class>/, also in an archive; `npz` reads x, y or features, labels.
    Raises FileNotFoundError for a missing path, ValueError for all else that is wrong with name or data.
    """
    _need(name in DATASETS, f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")
    try:
        what = "is built in and takes none" if name == "digits" else "needs the path of an .npz file or of images"
        _need((data is None) == (name == "digits") or name in CIFAR, f"dataset {name!r} {what}")
        path = ROOT / "data" if data is None else _find(data)
        if name == "digits":
            from sklearn.datasets import load_digits

            arrays = load_digits().images / 16, load_digits().target
        elif name == "npz":
            arrays = _npz(path)
        elif name in CIFAR and (data is None or (path / CIFAR[name]).exists()):
            arrays = _torchvision(name, path, download=data is None)
        else:
            arrays = _images(path, Path(cache or ROOT / "store" / "cache"))
        return validate(_dataset(name, *arrays))
    except ValueError as error:
        raise ValueError(f"data={data!r}: {error}") from error


def pool(dataset: Dataset, n_examples=None, seed: int = 0, n_test=None) -> Dataset:
    """A stratified random subset of n_examples of the pool, two or more of each class; seed sets its order.

    n_examples must be even, for complementary halves; None keeps all, or one less. n_test limits the test
    part likewise; None keeps it all. Raises ValueError.
    """
    n, t, least = len(dataset.y), len(dataset.y_test), 2 * dataset.n_classes
    _need(_whole(seed, 0), f"seed={seed!r}: needs a whole number, not negative")
    even = n_examples is None or _whole(n_examples, least, n) and n_examples % 2 == 0
    _need(even, f"{n_examples=}: needs an even number from {least} (two of each class) to {n} (all there are)")
    _need(n_test is None or _whole(n_test, 1, t), f"{n_test=}: needs a whole number from 1 to {t} (all there are)")
    if n_test is not None:
        keep = _draw(dataset.y_test, n_test, seed)
        dataset = replace(dataset, x_test=dataset.x_test[keep], y_test=dataset.y_test[keep])
    if n_examples is not None or n % 2:
        keep = _draw(dataset.y, n_examples or n - 1, seed, least=2)
        index = keep if dataset.index is None else dataset.index[keep]
        dataset = replace(dataset, x=dataset.x[keep], y=dataset.y[keep], index=index)
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
        _need(form and labels, f"{what}; uint8 or float32 [N, ...], 2-D or 4-D, and integers [N], N > 0, are needed")
        _need(x.shape[1:] == d.x.shape[1:], f"{what}, x is {list(d.x.shape)}; only axis 0 may differ")
        _need(x.dtype == np.uint8 or np.isfinite(x).all(), f"x{part} holds NaN or infinity; finite numbers are needed")
        _need(0 <= y.min() and y.max() < c, f"y{part} runs from {y.min()} to {y.max()}; valid are 0..{c - 1}")
    n = np.bincount(d.y, minlength=c)
    why = f"class {d.classes[n.argmin()]!r} has {n.min()} of the pool"
    _need(c > 1 and n.min() > 1, f"y: {why}; at least two classes are needed, and two examples of each")
    return dataset


def _need(fine, problem: str) -> None:
    if not fine:
        raise ValueError(problem)


def _whole(value, low: int, high: float = np.inf) -> bool:
    return isinstance(value, int | np.integer) and low <= value <= high


def _draw(y: np.ndarray, n: int, seed: int, least: int = 0) -> np.ndarray:
    """Indices of n examples in random order, in proportion to the classes, at least `least` of each class."""
    counts = np.bincount(y)
    least = np.minimum(counts, least)
    exact = n * counts / len(y)
    take = np.maximum(np.floor(exact).astype(int), least)
    while take.sum() < n:  # largest remainder first
        take[np.argmax(exact - take)] += 1
    while take.sum() > n:  # small classes got their `least`: the others make room
        take[np.argmax(np.where(take > least, take - exact, -np.inf))] -= 1
    order = np.random.default_rng(seed).permutation(len(y))
    first = [np.flatnonzero(y[order] == c)[:k] for c, k in enumerate(take)]
    return order[np.sort(np.concatenate(first))]


def _dataset(name: str, x, y, x_test=None, y_test=None) -> Dataset:
    """A Dataset of examples and labels in any of their forms; without a test part one is drawn from the pool."""
    x, (labels, y) = _examples("x", x), np.unique(_labels("y", y), return_inverse=True)
    d = Dataset(name, x, y, x, y, tuple(map(str, labels)))
    found, need = f"{d.n_classes} classes, {list(x.shape[1:])}", f"{name[5:]} classes, [3, 32, 32]"
    _need(name not in CIFAR or found == need, f"it holds {found}, {name} has {need}; use dataset 'folder'")
    if x_test is None:  # one fixed stratified draw; two of each class, where there are, stay in the pool
        n_pool = max(len(validate(d).y) - round(SHARES.get(name, 0.2) * len(y)), 2 * d.n_classes)
        keep = np.isin(np.arange(len(y)), _draw(y, n_pool, seed=0, least=2))
        return replace(d, x=x[keep], y=y[keep], x_test=x[~keep], y_test=y[~keep])
    y_test = _labels("y_test", y_test)
    extra = np.setdiff1d(y_test, labels)[:5].tolist()
    _need(not extra, f"the test part has labels {extra}; only those of the pool are valid")
    return replace(d, x_test=_examples("x_test", x_test), y_test=np.searchsorted(labels, y_test))


def _examples(key: str, a: np.ndarray) -> np.ndarray:
    """uint8 [N, channels, H, W], or float32 [N, channels, H, W] or [N, D]."""
    what, a = f"{key} is {a.dtype} {list(a.shape)}", a[:, None] if a.ndim == 3 else a
    if a.ndim == 4 and a.shape[1] not in (1, 3):  # if both axes could be the channels, the first one is
        a = np.moveaxis(a, 3, 1)
    fine = a.dtype.kind in "biuf" and (a.ndim == 2 or a.ndim == 4 and a.shape[1] in (1, 3))
    _need(fine, f"{what}; numbers [N, D], [N, H, W] or 4-D with 1 or 3 channels in axis 1 or 3 are needed")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused by validate
        return np.ascontiguousarray(a, dtype=np.uint8 if a.dtype == np.uint8 and a.ndim == 4 else np.float32)


def _labels(key: str, a: np.ndarray) -> np.ndarray:
    """int64 [N] from integers, whole floats or one-hot rows [N, C]; names [N] stay names."""
    number, what = a.dtype.kind in "biuf", f"{key} is {a.dtype} {list(a.shape)}"
    if number and a.ndim == 2 and np.isin(a, (0, 1)).all() and (a.sum(axis=1) == 1).all():
        return a.argmax(axis=1)
    fine = np.isfinite(a).all() and (a == np.trunc(a)).all() if number else a.dtype.kind == "U"
    _need(fine and a.ndim == 1, f"{what}; whole numbers or names [N], or one-hot rows [N, C], are needed")
    return a.astype(np.int64) if number else a


def _find(data) -> Path:
    """The path `data`, or the one archive that is called `data` plus a suffix of ARCHIVES."""
    _need(isinstance(data, str | os.PathLike) and str(data), "not a path; a string or pathlib.Path is needed")
    path = Path(data).expanduser()
    found = [path] if path.exists() else [p for s in ARCHIVES if (p := Path(f"{path}{s}")).is_file()]
    _need(len(found) < 2, f"could be any of {', '.join(p.name for p in found)}; name one")
    if not found:
        raise FileNotFoundError(f"data={data!r} does not exist, nor with {', '.join(ARCHIVES)} added")
    return found[0]


def _torchvision(name: str, root: Path, download: bool) -> list[np.ndarray]:
    """CIFAR from torchvision's files, which it unpickles only if their md5 checksums are right."""
    from torchvision import datasets  # here: the import takes seconds

    try:
        with warnings.catch_warnings():  # NumPy 2.4 deprecates how these old pickles spell their dtype
            warnings.simplefilter("ignore")
            parts = [getattr(datasets, name.upper())(root, train=t, download=download) for t in (True, False)]
    except (OSError, RuntimeError) as error:
        what = "could not be downloaded" if download else "is incomplete or fails its checksum"
        raise ValueError(f"{name} {what} ({error}). Give data=, a path of {CIFAR[name]} or of {LAYOUT}") from error
    return [array for part in parts for array in (part.data, np.array(part.classes)[part.targets])]


def _npz(path: Path) -> list[np.ndarray]:
    """x, y and, where there, x_test, y_test."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = ("x", "y") if {"x", "y"} <= set(held := file.files) else ("features", "labels")
            names += tuple(f"{name}_test" for name in names)
            arrays = {name: file[name] for name in names if name in held}
    except Exception as error:  # NumPy and zipfile raise many kinds
        raise ValueError(f"not a readable .npz of numbers ({error}); make one by numpy.savez(path, x=, y=)") from error
    need = "x, y (or features, labels), and x_test, y_test (features_test, labels_test) both or not at all"
    _need(tuple(arrays) in (names, names[:2]), f"it holds the arrays {sorted(held)}; needed are {need}")
    return list(arrays.values())


def _images(path: Path, cache: Path) -> list[np.ndarray]:
    """Arrays of an image folder or archive, decoded once: the second time they come from the cache."""
    files = sorted(filter(PLACE.fullmatch, glob.glob("t*/*/*", root_dir=path))) if path.is_dir() else [""]
    # the cache file is named by a hash of where the images lie and of each file's name, size and time of change
    stats = [(file, s.st_size, s.st_mtime_ns) for file in files for s in [os.stat(path / file)]]
    key = blake2b(json.dumps([2, str(path.resolve()), stats]).encode(), digest_size=16).hexdigest()
    file = cache / f"{path.name.split('.')[0]}-{key}.npz"
    with suppress(Exception), open(file, "rb") as opened, np.load(opened) as arrays:  # checks each CRC-32
        return list(arrays.values())
    arrays = _decode_all(path, files)  # the cache file is absent or damaged
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        np.savez(f"{folder}/part.npz", *arrays)
        os.replace(f"{folder}/part.npz", file)  # atomic: a reader sees all of it or nothing
    return arrays


def _decode_all(path: Path, files: list[str]) -> list[np.ndarray]:
    """x, y and, where there, x_test, y_test of a tree or archive, sorted by class and file; y holds class names."""
    images, arrays, size = {}, [], None
    with ThreadPool(min(8, os.cpu_count())) as threads:
        decoded = threads.imap(_decode, _members(path, files), chunksize=64)
        for place, pixels in tqdm(decoded, unit=" images", leave=False, delay=1):
            size = size or pixels.shape[1:]
            what = f"image {'/'.join(place[1:])}: (H, W) is {pixels.shape[1:]}, of others {size}"
            _need(pixels.shape[1:] == size, f"{what}; all must have one size")
            images[place] = pixels
    roots, splits = {place[0] or "." for place in images}, {place[1] for place in images}
    _need("train" in splits, f"it holds no training images; needed is {LAYOUT}")
    _need(len(roots) == 1, f"it holds images below {sorted(roots)}; one leading folder is allowed")
    shape = max(pixels.shape for pixels in images.values())  # grey becomes RGB where any image is RGB
    for split in sorted(splits, reverse=True):
        places = sorted(place for place in images if place[1] == split)
        arrays.append(np.stack([np.broadcast_to(images[place], shape) for place in places]))
        arrays.append(np.array([place[2] for place in places]))
    return arrays


def _members(path: Path, files: list[str]):
    """(name, content) of each image of a folder or archive, in memory: nothing is extracted, no link followed."""
    try:
        if path.is_dir():
            yield from ((file, (path / file).read_bytes()) for file in files)
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                yield from ((name, archive.read(name)) for name in archive.namelist() if PLACE.fullmatch(name))
        else:
            with tarfile.open(path) as archive:
                members = (m for m in archive if m.isfile() and PLACE.fullmatch(m.name))
                yield from ((m.name, archive.extractfile(m).read()) for m in members)
                archive.fileobj.seek(archive.offset)  # tarfile takes a broken header for the end; a tar ends in zeros
                _need(archive.fileobj.read(512) == bytes(512), "its end is missing")
    except Exception as error:  # each format raises other kinds
        need = f"a folder or a whole archive of images ({', '.join(ARCHIVES)}) is needed"
        raise ValueError(f"{need}; it cannot be read: {error}") from error


def _decode(member: tuple[str, bytes]) -> tuple[tuple, np.ndarray]:
    """(place, uint8 [1, H, W] of a grey (mode L) image or [3, H, W] of any other)."""
    try:
        with Image.open(io.BytesIO(member[1]), formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            _need(image.mode[0] not in "IF", f"mode {image.mode} is not valid; 8 bits a channel are needed")
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except Exception as error:  # PIL raises many kinds
        raise ValueError(f"image {member[0]} cannot be used: {error}") from error
    return PLACE.fullmatch(member[0]).groups(), np.atleast_3d(pixels).transpose(2, 0, 1)

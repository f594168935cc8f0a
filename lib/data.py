"""Data sets: digits, CIFAR, a folder or archive of images, or arrays in an .npz file become one `Dataset`.

Shapes: N pool examples, T test examples, C classes. The pool is what random halves are drawn from; no model
trains on the test part. Nothing is unpickled but CIFAR's own files, by torchvision, after its checksums.
"""

import glob
import io
import itertools
import json
import lzma
import os
import stat
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

DATASETS = ("digits", "cifar10", "cifar100", "folder", "npz")
CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py", 10), "cifar100": ("CIFAR100", "cifar-100-python", 100)}
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # the only decoders PIL may choose, whatever a file is called
MAX_BYTES = 2**26  # no more than this is read of one image file
ARRAYS = ("x", "y", "x_test", "y_test", "classes")
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError)
DAMAGED += (KeyError, RuntimeError)  # what a .npz, .zip or .tar raises that is no such thing, or is cut short
LAYOUT = f"train/<class>/*{{{','.join(SUFFIXES)}}} and perhaps test/<class>/... (CIFAR: or torchvision's files)"
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
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")
    if name == "digits" and data is not None:
        raise ValueError(f"data={data!r}: digits is built in and takes none; use dataset 'npz' or 'folder'")
    if name in ("folder", "npz") and data is None:
        what = "an image folder or an archive of one" if name == "folder" else "an .npz file"
        raise ValueError(f"data=None: dataset {name!r} needs the path of {what}")
    if name == "digits":
        return validate(_digits())
    path = ROOT / "data" if data is None else _find(data)
    try:
        if name == "npz":
            return validate(_npz(path))
        if name in CIFAR and (data is None or (path / CIFAR[name][1]).exists()):
            return validate(_torchvision(name, path, download=data is None))
        return validate(_images(name, path, Path(cache or ROOT / "store" / "cache")))
    except ValueError as error:
        raise ValueError(f"data={data!r}: {error}") from error


def pool(dataset: Dataset, n_examples=None, seed: int = 0, n_test=None) -> Dataset:
    """A stratified random subset of n_examples of the pool, two or more of each class; seed sets its order.

    n_examples must be even, for complementary halves; None keeps all, or one less. n_test limits the test
    part likewise; None keeps it all. Raises ValueError.
    """
    n, t, least = len(dataset.y), len(dataset.y_test), 2 * dataset.n_classes
    why = f"needs an even number from {least} (two of each class) to {n} (all there are)"
    _whole("seed", seed, 0, 2**63, "needs a whole number, not negative")
    if n_examples is not None:
        _whole("n_examples", n_examples, least, n, why, step=2)
    if n_test is not None:
        _whole("n_test", n_test, 1, t, f"needs a whole number from 1 to {t} (all there are)")
        keep = _draw(dataset.y_test, n_test, seed)
        dataset = replace(dataset, x_test=dataset.x_test[keep], y_test=dataset.y_test[keep])
    if n_examples is not None or n % 2:
        keep = _draw(dataset.y, n - n % 2 if n_examples is None else n_examples, seed, least=2)
        dataset = replace(dataset, x=dataset.x[keep], y=dataset.y[keep])
    return validate(dataset)


def inputs(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """float32 model inputs (x [N, ...], x_test [T, ...]); all statistics come from the pool.

    Floats within [0, 1] stay as they are. uint8 is divided by 255; it and all else is standardised, images by
    channel and features one by one; what is constant in the pool becomes 0.
    """
    x, x_test = dataset.x.astype(np.float32), dataset.x_test.astype(np.float32)
    if dataset.x.dtype == np.uint8:
        for part in (x, x_test):
            part /= 255
    elif x.min() >= 0 and x.max() <= 1:
        return x, x_test
    flat, flat_test = (part.reshape(*part.shape[:2], -1) for part in (x, x_test))  # [N, channels, pixels]
    mean = flat.mean(axis=(0, 2), dtype=np.float64)[:, None].astype(np.float32)
    flat -= mean  # in place, here and below: 50,000 images are held once
    std = np.sqrt(np.einsum("ncp,ncp->c", flat, flat, dtype=np.float64) / (len(flat) * flat.shape[2]))
    scale = np.where(std > 0, std, np.inf)[:, None].astype(np.float32)
    flat /= scale
    flat_test -= mean
    flat_test /= scale
    return x, x_test


def validate(dataset: Dataset) -> Dataset:
    """Return `dataset` unchanged, or raise one ValueError that says what is wrong with it."""
    problem = _array_problem(dataset) or _label_problem(dataset)
    if problem:
        raise ValueError(f"dataset {dataset.name!r}: {problem}")
    return dataset


def _array_problem(dataset: Dataset) -> str | None:
    for part, x, y in (("", dataset.x, dataset.y), ("_test", dataset.x_test, dataset.y_test)):
        if x.dtype not in (np.uint8, np.float32) or x.ndim not in (2, 4):
            return f"x{part} is {x.dtype} {list(x.shape)}; uint8 or float32, 2-D or 4-D, is needed"
        if y.dtype.kind not in "iu" or y.ndim != 1:
            return f"y{part} is {y.dtype} {list(y.shape)}; integers [N] are needed"
        if len(x) != len(y):
            return f"x{part} has {len(x)} examples and y{part} {len(y)} labels; they must be as many"
        if not x.size:
            return f"x{part} {list(x.shape)} is empty; at least one example is needed"
        if x.dtype != np.uint8 and not np.isfinite(x).all():
            return f"x{part} holds NaN or infinity; finite numbers are needed"
    if dataset.x.shape[1:] != dataset.x_test.shape[1:]:
        return f"x {list(dataset.x.shape)} and x_test {list(dataset.x_test.shape)} may differ in axis 0 only"
    return None


def _label_problem(dataset: Dataset) -> str | None:
    if dataset.n_classes < 2:
        return f"classes={dataset.classes}; at least two classes are needed"
    for part, y in (("y", dataset.y), ("y_test", dataset.y_test)):
        if y.min() < 0 or y.max() >= dataset.n_classes:
            return f"{part} runs from {y.min()} to {y.max()}; labels must lie in 0..{dataset.n_classes - 1}"
    counts = np.bincount(dataset.y, minlength=dataset.n_classes)
    if counts.min() < 2:
        return f"class {dataset.classes[counts.argmin()]!r} has {counts.min()} of the pool; each needs two"
    return None


def _whole(parameter: str, value, low: int, high: int, why: str, step: int = 1) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not low <= value <= high or value % step:
        raise ValueError(f"{parameter}={value!r}: {why}")


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


def _split(x: np.ndarray, y: np.ndarray, n_test: int) -> tuple[np.ndarray, ...]:
    """x, y, x_test, y_test by one fixed stratified draw; two of each class, where there are, stay in x."""
    if len(x) != len(y) or not len(y):
        raise ValueError(f"x has {len(x)} examples and y {len(y)} labels; they must be as many, and not none")
    n_pool = max(len(y) - n_test, np.minimum(np.bincount(y), 2).sum())
    keep = np.isin(np.arange(len(y)), _draw(y, n_pool, seed=0, least=2))
    return x[keep], y[keep], x[~keep], y[~keep]


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images / 16).astype(np.float32)[:, None]
    return Dataset("digits", *_split(x, digits.target.astype(np.int64), n_test=597), tuple("0123456789"))


def _find(data) -> Path:
    """The path `data`, or the one archive that is called `data` plus a suffix of ARCHIVES."""
    if not isinstance(data, str | os.PathLike) or not str(data):
        raise ValueError(f"data={data!r} is not a path; a string or pathlib.Path is needed")
    path = Path(data).expanduser()
    if path.exists():
        return path
    found = [p for p in (path.with_name(path.name + s) for s in ARCHIVES if path.name) if p.is_file()]
    if len(found) > 1:
        raise ValueError(f"data={data!r} could be any of {', '.join(p.name for p in found)}; name one")
    if not found:
        raise FileNotFoundError(f"data={data!r} does not exist, nor with {', '.join(ARCHIVES)} added")
    return found[0]


def _torchvision(name: str, root: Path, download: bool) -> Dataset:
    """CIFAR from torchvision's files, which it unpickles only if their md5 checksums are right."""
    from torchvision import datasets  # here: the import takes seconds

    cls, folder, _ = CIFAR[name]
    try:
        with warnings.catch_warnings():  # NumPy 2.4 deprecates how these old pickles spell their dtype
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            parts = [getattr(datasets, cls)(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        ask = f"Give data=, a path that holds {folder} or a folder or archive of images, {LAYOUT}"
        what = "could not be downloaded" if download else "is incomplete or fails its checksum"
        raise ValueError(f"{name} {what} ({error}). {ask}") from error
    x, x_test = (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in parts)
    y, y_test = (np.array(part.targets, dtype=np.int64) for part in parts)
    return Dataset(name, x, y, x_test, y_test, tuple(parts[0].classes))


def _npz(path: Path) -> Dataset:
    arrays = _read_npz(path)
    x, y, *test = (_labels(k, a) if k[0] in "yl" else _examples(k, a) for k, a in arrays.items())
    labels, y = np.unique(y, return_inverse=True)
    if not test:
        return Dataset("npz", *_split(x, y, n_test=round(0.25 * len(y))), tuple(map(str, labels)))
    if outside := sorted(set(test[1].tolist()) - set(labels.tolist())):
        raise ValueError(f"the test part has labels {outside[:5]}; only those of the pool are valid")
    return Dataset("npz", x, y, test[0], np.searchsorted(labels, test[1]), tuple(map(str, labels)))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Examples, labels and, where there, examples and labels of the test part, under the names they have."""
    files, arrays, key = [], {}, ""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            files = file.files
            pair = next((p for p in (("x", "y"), ("features", "labels")) if set(p) <= set(files)), ())
            for key in (k for k in (*pair, *(f"{p}_test" for p in pair)) if k in files):
                arrays[key] = np.asarray(file[key])
    except (*DAMAGED, AttributeError, TypeError) as error:
        what = f"array {key!r} cannot be read; numbers are needed" if key else "not a readable .npz file"
        raise ValueError(f"{what} ({error}). Write it with numpy.savez(path, x=..., y=...)") from error
    if len(arrays) not in (2, 4):
        need = "x, y (or features, labels), and x_test, y_test (features_test, labels_test) both or not at all"
        raise ValueError(f"it holds the arrays {sorted(files)}; needed are {need}")
    return arrays


def _examples(key: str, a: np.ndarray) -> np.ndarray:
    """uint8 [N, channels, H, W], or float32 [N, channels, H, W] or [N, D]."""
    if a.dtype.kind not in "biuf" or a.ndim not in (2, 3, 4):
        raise ValueError(f"{key} is {a.dtype} {list(a.shape)}; numbers [N, D], [N, H, W] or 4-D are needed")
    if a.ndim == 3:
        a = a[:, None]
    if a.ndim == 4 and a.shape[1] not in (1, 3):  # if both axes could be the channels, the first one is
        if a.shape[3] not in (1, 3):
            raise ValueError(f"{key} has shape {list(a.shape)}; axis 1 or 3 must hold 1 or 3 channels")
        a = np.moveaxis(a, 3, 1)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused by validate
        return np.ascontiguousarray(a, dtype=np.uint8 if a.dtype == np.uint8 and a.ndim == 4 else np.float32)


def _labels(key: str, a: np.ndarray) -> np.ndarray:
    """int64 [N] from integers or whole floats [N], or from one-hot rows [N, C]."""
    if a.dtype.kind not in "biuf" or a.ndim not in (1, 2):
        raise ValueError(f"{key} is {a.dtype} {list(a.shape)}; integers [N] or one-hot [N, C] are needed")
    if a.ndim == 2:
        if not (np.isin(a, (0, 1)).all() and (a.sum(axis=1) == 1).all()):
            raise ValueError(f"{key} {list(a.shape)} is not one-hot: each row must sum to one, in one 1")
        return a.argmax(axis=1)
    if not (np.isfinite(a).all() and (a == np.trunc(a)).all()):
        raise ValueError(f"{key} holds labels that are not whole numbers; integers are needed")
    return a.astype(np.int64)


def _images(name: str, path: Path, cache: Path) -> Dataset:
    """An image folder or archive, decoded once: the second time its arrays come from the cache."""
    file = cache / f"{path.name.split('.')[0]}-{_key(path)}.npz"
    arrays = _read_cache(file)
    if arrays is None:
        arrays = _decode_all(path)
        _write_cache(file, arrays)
    x, y, x_test, y_test, classes = (arrays[key] for key in ARRAYS)
    if not len(y_test):
        x, y, x_test, y_test = _split(x, y, n_test=round(0.2 * len(y)))
    if name in CIFAR and (len(classes), *x.shape[1:]) != (CIFAR[name][2], 3, 32, 32):
        found, need = f"{len(classes)} classes, {list(x.shape[1:])}", f"{CIFAR[name][2]} classes, [3, 32, 32]"
        raise ValueError(f"it holds {found}, {name} has {need}; use dataset 'folder'")
    return Dataset(name, x, y, x_test, y_test, tuple(classes.tolist()))


def _listing(folder: Path) -> list[str]:
    names = (f"{s}/{name}" for s in ("train", "test") for name in glob.iglob("*/*", root_dir=folder / s))
    return sorted(name for name in names if _place(name))


def _key(path: Path) -> str:
    """Names a cache file: a hash of where the images lie and of each file's name, size and time of change."""
    files = [(name, os.stat(path / name)) for name in (_listing(path) if path.is_dir() else [""])]
    text = json.dumps([1, str(path.resolve()), [(name, s.st_size, s.st_mtime_ns) for name, s in files]])
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _read_cache(file: Path) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:  # checks each CRC-32
            return {key: arrays[key] for key in ARRAYS}
    except (*DAMAGED, AttributeError) as error:
        warnings.warn(f"cache file {file} is damaged and will be rebuilt ({error})", stacklevel=4)
        return None


def _write_cache(file: Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            np.savez(out, **arrays)
        os.replace(temporary, file)  # atomic: a reader sees all of it or nothing
    finally:
        Path(temporary).unlink(missing_ok=True)


def _decode_all(path: Path) -> dict[str, np.ndarray]:
    """ARRAYS of a tree or archive of images: uint8 [N, 1 or 3, H, W], sorted by class and file name."""
    members, places, blocks, size = _members(path), [], [], None
    with ThreadPoolExecutor(os.cpu_count()) as threads, tqdm(unit=" images", leave=False, delay=1) as bar:
        while block := list(itertools.islice(members, 1024)):  # bounded: an archive is never in memory whole
            size = size or _decode(*block[0]).shape[2:]
            run = threads.map if size[0] * size[1] >= 64**2 else map  # threads halve the speed of tiny images
            blocks.append(_concatenate(list(run(_decode, *zip(*block, strict=True), itertools.repeat(size)))))
            places += [_place(name) for name, _ in block]
            bar.update(len(block))
    classes, rows = _arrange(places)
    x = _concatenate(blocks)
    y = np.array([classes.index(place[2]) for place in places])
    arrays = (x[rows["train"]], y[rows["train"]], x[rows["test"]], y[rows["test"]], np.array(classes))
    return dict(zip(ARRAYS, arrays, strict=True))


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """[n, channels, H, W] from parts with 1 or 3 channels; grey becomes RGB where any part is RGB."""
    channels = max(part.shape[1] for part in parts)
    return np.concatenate([np.broadcast_to(p, (len(p), channels, *p.shape[2:])) for p in parts])


def _arrange(places: list[tuple[str, ...]]) -> tuple[list[str], dict[str, list[int]]]:
    """Sorted class names, and the rows of `places` in the train and in the test part, sorted by name."""
    if not any(place[1] == "train" for place in places):
        raise ValueError(f"it holds no training images; needed is {LAYOUT}")
    if len(roots := {place[0] for place in places}) > 1:
        raise ValueError(f"it holds images below {sorted(roots)}; one leading folder is allowed")
    if len(set(places)) < len(places):
        raise ValueError("it holds two files of one name; each image may be there once")
    classes = sorted({place[2] for place in places if place[1] == "train"})
    if extra := sorted({place[2] for place in places} - set(classes)):
        raise ValueError(f"test has classes {extra[:5]}; only those of train are valid")
    order = sorted(range(len(places)), key=places.__getitem__)
    return classes, {split: [i for i in order if places[i][1] == split] for split in ("train", "test")}


def _place(name: str) -> tuple[str, ...] | None:
    """(leading folder or "", train or test, class, file) of an image; None for any other file."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    parts = parts if len(parts) == 4 else ["", *parts]
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    ours = len(parts) == 4 and parts[1] in ("train", "test") and parts[3].lower().endswith(SUFFIXES)
    return tuple(parts) if ours and not hidden else None


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each image of a folder or archive, read in memory: nothing is extracted to disk."""
    if path.is_dir():
        yield from ((name, (path / name).read_bytes()) for name in _listing(path))
        return
    if not path.name.lower().endswith(ARCHIVES):
        raise ValueError(f"a folder or an archive ({', '.join(ARCHIVES)}) is needed")
    try:
        yield from (_zip_members if path.name.lower().endswith(".zip") else _tar_members)(path)
    except DAMAGED as error:
        raise ValueError(f"the archive cannot be read ({error}); it may be damaged or cut short") from error


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if _place(info.filename) and not stat.S_ISLNK(info.external_attr >> 16):
                with archive.open(info) as file:
                    yield info.filename, file.read(MAX_BYTES)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for info in archive:
            if _place(info.name) and info.isfile():  # no folder, link or device
                yield info.name, archive.extractfile(info).read(MAX_BYTES)
        archive.fileobj.seek(archive.offset)  # tarfile takes a broken header for the end; a tar ends in zeros
        if archive.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError("its end is missing")


def _decode(name: str, content: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [1, 1, H, W] of a grey (mode L) image, [1, 3, H, W] of any other; (H, W) must be `size`."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # reads the header
            if size and image.size[::-1] != size:
                raise ValueError(f"(H, W) is {image.size[::-1]}, of others {size}; all must have one size")
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode} is not valid; 8 bits a channel are needed")
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except Exception as error:  # PIL raises many kinds
        raise ValueError(f"image {name} cannot be used: {error}") from error
    return np.atleast_3d(pixels).transpose(2, 0, 1)[None]

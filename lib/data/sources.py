"""Where the data come from: a name and a path become arrays, which lib.data.dataset makes into one `Dataset`.

Archives are read in memory, up to a size: nothing in them is written to disk and no link is followed. Arrays of
objects are refused. Only CIFAR's own files are pickles, and torchvision reads them after comparing their checksums.
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
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from tqdm import tqdm

DATASETS = tuple("digits cifar10 cifar100 purchase100 texas100 eyepacs subclasses folder npz".split())
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
ROOT = Path(__file__).resolve().parents[2]
# limits: bytes of an image file, of another file and of everything in an archive, unpacked; pixels of an image
MOST_IMAGE, MOST_FILE, MOST_ARCHIVE, MOST_PIXELS = 1 << 26, 1 << 31, 1 << 38, 1 << 26

# files that are read, in a folder or an archive; no hidden file, absolute path or ".." matches
_IN = r"(?:\./)?(?:([^./][^/]*)/)?"  # perhaps in a leading folder
PLACE = re.compile(_IN + r"(train|test)/([^./][^/]*)/([^./][^/]*\.(?i:png|jpe?g|bmp|webp))")
LAYOUT = f"train/<class>/* ({', '.join(IMAGES)}) and perhaps test/<class>/*"
RETINA = re.compile(_IN + r"(?:train/[^./][^/]*\.(?i:jpe?g|png)|trainLabels\.csv)")
TEXTS = {"purchase100": ("dataset_purchase",), "texas100": ("feats", "labels")}  # as Shokri et al. (2017) call them
WIDTH = {"purchase100": 600, "texas100": 6169}  # binary features in the text files
EYE = r"([^_]+)_(?:left|right)"  # the name of a retina photograph: its patient and which eye
GRADES = ("0 none", "1 mild", "2 moderate", "3 severe", "4 proliferative")
SIDE = 32  # pixels to a side of a retina photograph, once it is scaled down

# what the arrays of an .npz may be called: here, in papers on attacks, by Keras and by MedMNIST (its val_ is not read)
NAMES = (
    ("x", "y", "x_test", "y_test"),
    ("features", "labels", "features_test", "labels_test"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "images_test", "labels_test"),
)

# what is looked for in a folder that is given, and in data/ when no path is given
FILES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "purchase100": ("purchase100.npz", "dataset_purchase.tgz", "dataset_purchase"),
    "texas100": ("texas100.npz", "dataset_texas.tgz", "texas"),
    "eyepacs": ("eyepacs", *(f"eyepacs{suffix}" for suffix in ARCHIVES), "diabetic-retinopathy-detection"),
}
_CIFAR = "nothing to do: it is downloaded, checksums checked. Terms: none are stated; cite Krizhevsky (2009)."
_SHOKRI = "mkdir -p data && cd data && curl -LO https://github.com/privacytrustlab/datasets/raw/master/dataset_{}.tgz."
SOURCES = {  # how to obtain a data set, and its terms
    "digits": "nothing to do: scikit-learn has it. Terms: UCI optical digits, CC BY 4.0.",
    "subclasses": "nothing to do: it is generated. Terms: none.",
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "purchase100": _SHOKRI.format("purchase") + " Terms: those of Kaggle's Acquire Valued Shoppers Challenge.",
    "texas100": _SHOKRI.format("texas") + " Terms: the data use agreement of the Texas hospital discharge public use "
    "file: no attempt to identify a patient.",
    "eyepacs": "kaggle competitions download -c diabetic-retinopathy-detection (accept its rules first), then unpack "
    "train/ and trainLabels.csv into data/eyepacs. Terms: the competition's rules; non-commercial research.",
}


def obtain(name: str) -> str:
    """How to obtain a data set of SOURCES (a command) and its terms, as one line. Raises ValueError."""
    need(name in SOURCES, f"dataset={name!r} has no source; choose one of {', '.join(SOURCES)}")
    return f"{name}: {SOURCES[name]}"


def read(name: str, data, cache: Path) -> dict[str, np.ndarray]:
    """Arrays of a data set of DATASETS: x, y and perhaps x_test, y_test, groups, pattern and pattern_test.

    data: its path, or None. cache: the folder for decoded data. Raises FileNotFoundError for a missing path or file,
    ValueError for anything else that is wrong.
    """
    need(name in DATASETS, f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")
    if name in ("digits", "subclasses"):
        need(data is None, f"dataset {name!r} is built in; it takes no path")
        return _digits() if name == "digits" else _subclasses()
    need(data is not None or name in FILES, f"dataset {name!r} needs the path of an .npz file or of images")
    need(data is None or isinstance(data, str | os.PathLike) and str(data), "not a path; a string or Path is needed")
    path = _find(name, data)
    if name in ("cifar10", "cifar100") and path.name in FILES[name]:
        return _cifar(name, path, download=data is None)
    if name == "npz" or name in TEXTS and path.suffix == ".npz":
        return _npz(path, binary=name in TEXTS)
    if name == "eyepacs":
        return _cached(name, path, RETINA, _retina, cache)
    if name not in TEXTS:
        return _cached("images", path, PLACE, _images, cache)
    wanted = re.compile(f"{_IN}{_IN}({'|'.join(TEXTS[name])})")
    if path.is_file() and not path.name.endswith(
        ARCHIVES
    ):  # the text file itself, under any name, or one of Texas' two
        path, wanted = path.parent, wanted if name == "texas100" else re.compile(re.escape(path.name))
    return _cached(name, path, wanted, partial(_text, name), cache)


def need(fine, problem: str) -> None:
    """Raise ValueError(problem) unless `fine`."""
    if not fine:
        raise ValueError(problem)


def _find(name: str, data) -> Path:
    """The first of FILES in the folder `data` (None: data/), else `data` itself, with an archive's suffix or without.

    A file with its sha256 beside it, in `<file>.sha256`, is compared with that. Raises FileNotFoundError, ValueError.
    """
    known, given = FILES.get(name, ()), ROOT / "data" if data is None else Path(data).expanduser()
    found = [path for file in known if (path := given / file).exists()][:1]
    if data is None and name in ("cifar10", "cifar100"):
        found = [given / known[0]]  # torchvision downloads what is missing
    elif data is not None and not found:
        found = [given] if given.exists() else [path for s in ARCHIVES if (path := Path(f"{given}{s}")).is_file()]
    need(len(found) < 2, f"could be any of {', '.join(path.name for path in found)}; name one")
    if not found:
        what = f"{', '.join(known)} in {given}" if data is None else f"{given}, nor with {', '.join(ARCHIVES)} added"
        raise FileNotFoundError(f"data={data!r}: there is no {what}. {obtain(name) if known else ''}")
    beside = found[0].with_name(f"{found[0].name}.sha256")
    if beside.is_file() and found[0].is_file():
        digest, known = sha256(), beside.read_text().lower()[:64]
        with open(found[0], "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        what = f"{found[0].name} has the sha256 {digest.hexdigest()}, {beside.name} says {known}"
        need(digest.hexdigest() == known, f"{what}; obtain the file again")
    return found[0]


def _digits() -> dict[str, np.ndarray]:
    digits = load_digits()
    return {"x": digits.images / 16, "y": digits.target}


def _subclasses(n: int = 2400, t: int = 1200, features: int = 32) -> dict[str, np.ndarray]:
    """A Gaussian mixture with a long tail (after Feldman 2020): n pool and t test examples of five classes.

    Each class has one common, two middling and nine rare sub-patterns. The centre of a rare one lies nearer to the
    common centre of another class than to that of its own class, so the labels of its few examples must be memorized.
    `pattern`, 0..59, is 12 class + sub-pattern, where sub-pattern 0 is the common one and 3 to 11 are rare.
    """
    rng, classes, rare = np.random.default_rng(0), 5, 9
    spread, reach = 1.2, 5.0  # of the centres, in standard deviations of a sub-pattern
    # expected number of each sub-pattern among 400 examples of a class
    share = np.concatenate([[241, 61.5, 61.5], np.linspace(2, 6, rare)]) / 400
    centre = rng.normal(size=(classes, len(share), features)) * spread
    step = rng.normal(size=(classes, rare, features))
    other = (np.arange(classes)[:, None] + 1 + np.arange(rare) % (classes - 1)) % classes
    # rare centre = common centre of another class + reach u, u a unit vector of random direction
    centre[:, 3:] = centre[other, 0] + reach * step / np.linalg.norm(step, axis=2, keepdims=True)
    pattern = rng.choice(classes * len(share), n + t, p=np.tile(share, classes) / classes)
    x = (centre.reshape(-1, features)[pattern] + rng.normal(size=(n + t, features))).astype(np.float32)
    y = pattern // len(share)
    pool = {"x": x[:n], "y": y[:n], "pattern": pattern[:n]}
    return pool | {"x_test": x[n:], "y_test": y[n:], "pattern_test": pattern[n:]}


def _cifar(name: str, path: Path, download: bool) -> dict[str, np.ndarray]:
    """CIFAR by torchvision, from the folder of its files or from its archive, which is unpacked in a temporary folder.

    The md5 of an archive is compared before it is unpacked, and that of each file before it is unpickled.
    """
    from torchvision import datasets  # here: it takes two seconds, and every worker process imports this module

    kind = getattr(datasets, name.upper())
    if path.is_file():
        need(datasets.utils.check_integrity(path, kind.tgz_md5), f"{path.name} fails its checksum: obtain it again")
        with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
            return _cifar(name, Path(folder, kind.base_folder), download=False)
    try:
        with warnings.catch_warnings():  # NumPy 2.4 deprecates how these old files spell their dtype
            warnings.simplefilter("ignore")
            train, test = (kind(path.parent, train=part, download=download) for part in (True, False))
    except (OSError, RuntimeError) as error:
        give = f"data= may be the path of {' or '.join(FILES[name])}, or of images {LAYOUT}"
        raise ValueError(f"{name} could not be downloaded, or fails its checksum: {error}; {give}") from error
    names = np.array(train.classes)
    return {"x": train.data, "y": names[train.targets], "x_test": test.data, "y_test": names[test.targets]}


def _npz(path: Path, binary: bool) -> dict[str, np.ndarray]:
    """x, y and perhaps x_test, y_test and groups; in the file they may have any of NAMES."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            fits(file)
            held = set(file.files)
            names = next((names for names in NAMES if {*names[:2]} <= held), NAMES[0])
            keys = zip((*NAMES[0], "groups"), (*names, "groups"), strict=True)
            arrays = {key: file[name] for key, name in keys if name in held}
    except Exception as error:  # NumPy and zipfile raise many kinds
        raise ValueError(f"not a readable .npz of numbers ({error}); make one by numpy.savez(path, x=, y=)") from error
    complete = {"x", "y"} <= set(arrays) and ("x_test" in arrays) == ("y_test" in arrays)
    forms = "; or ".join(", ".join(names) for names in NAMES)
    need(complete, f"it holds the arrays {sorted(held)}; needed are {forms} (the test part and groups are optional)")
    return {key: _binary(a) if binary and key[0] == "x" else a for key, a in arrays.items()}


def fits(file: np.lib.npyio.NpzFile) -> None:
    """Raise ValueError unless the arrays of an .npz, unpacked, are no larger than this machine's memory."""
    size = sum(member.file_size for member in file.zip.infolist())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need(size <= memory, f"its arrays take {size / 1e9:.1f} GB, the memory is {memory / 1e9:.1f} GB")


def _cached(kind: str, path: Path, wanted: re.Pattern, make, cache: Path) -> dict[str, np.ndarray]:
    """Arrays that `make` gets from (name, content) of the wanted files in a folder or archive, read once, then cached.

    The cache file is named by a hash of the path and of the name, size and time of change of each file. In a folder,
    files up to two folders down are found.
    """
    names = [""]  # the archive itself
    if path.is_dir():
        found = (name for level in ("*", "*/*", "*/*/*") for name in glob.glob(level, root_dir=path))
        names = sorted(filter(wanted.fullmatch, found))
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name in names for stat in [os.stat(path / name)]]
    key = blake2b(json.dumps([3, kind, str(path.resolve()), stats]).encode(), digest_size=16).hexdigest()
    file = cache / f"{path.name.split('.')[0]}-{key}.npz"
    with suppress(Exception), open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        return dict(arrays)  # NumPy compares each array with its CRC-32
    # the cache file is absent or damaged
    arrays = make(tqdm(_members(path, names, wanted), unit=" files", leave=False, delay=1))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        np.savez(f"{folder}/part.npz", **arrays)
        os.replace(f"{folder}/part.npz", file)  # atomic: another process sees the whole file or none
    return arrays


def _members(path: Path, names: list[str], wanted: re.Pattern):
    """(name, content) of each of the files `names` of a folder, or of each wanted file of an archive, in memory."""
    total, tar = 0, None
    try:
        with ExitStack() as stack:
            if path.is_dir():
                files = ((name, os.path.getsize(path / name), (path / name).read_bytes) for name in names)
            elif path.suffix.lower() == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(path))
                files = ((m.filename, m.file_size, partial(archive.read, m)) for m in archive.infolist())
            else:
                tar = stack.enter_context(tarfile.open(path))
                files = ((m.name, m.size, lambda m=m: tar.extractfile(m).read()) for m in tar if m.isfile())
            for name, size, content in files:
                most = MOST_IMAGE if name.lower().endswith(IMAGES) else MOST_FILE
                need(size <= most, f"{name} has {size / 1e6:.0f} MB unpacked; at most {most / 1e6:.0f} are read")
                total += size
                need(total <= MOST_ARCHIVE, f"it has over {MOST_ARCHIVE / 1e9:.0f} GB unpacked, the most that is read")
                if wanted.fullmatch(name):
                    yield name, content()
            if tar:
                tar.fileobj.seek(tar.offset)  # tarfile takes a broken header for the end; a tar ends in zeros
                need(tar.fileobj.read(512) == bytes(512), "its end is missing")
    except Exception as error:  # each format raises other kinds
        raise ValueError(f"a folder or a whole archive ({', '.join(ARCHIVES)}) is needed: {error}") from error


def _pixels(name: str, content: bytes, side: int | None = None) -> np.ndarray:
    """uint8 [1, H, W] of a grey image, [3, H, W] of any other; with `side`, its central square scaled to that side."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            few = image.width * image.height <= MOST_PIXELS
            need(few, f"{image.width} x {image.height} pixels; at most {MOST_PIXELS / 1e6:.0f} million are read")
            need(image.mode[0] not in "IF", f"mode {image.mode} is not valid; 8 bits a channel are needed")
            if side:
                image.draft("RGB", (2 * side, 2 * side))  # decodes a large JPEG at down to 1/8 of its size
                pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BOX))
            else:
                pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except Exception as error:  # PIL raises many kinds
        raise ValueError(f"image {name} cannot be used: {error}") from error
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def _images(files) -> dict[str, np.ndarray]:
    """x, y and perhaps x_test, y_test of a tree of images, sorted by class and file; y holds the names of classes."""
    images, arrays, size = {}, {}, None
    for name, content in files:
        pixels = _pixels(name, content)
        size = size or pixels.shape[1:]
        need(pixels.shape[1:] == size, f"image {name}: (H, W) is {pixels.shape[1:]}, of others {size}; one is needed")
        images[PLACE.fullmatch(name).groups()] = pixels
    need(any(place[1] == "train" for place in images), f"it holds no training images; needed is {LAYOUT}")
    roots = sorted({place[0] or "." for place in images})
    need(len(roots) == 1, f"it holds images below {roots}; one leading folder is allowed")
    shape = max(pixels.shape for pixels in images.values())  # grey becomes RGB where any image is RGB
    for split, tail in (("train", ""), ("test", "_test")):
        if places := sorted(place for place in images if place[1] == split):
            arrays[f"x{tail}"] = np.stack([np.broadcast_to(images[place], shape) for place in places])
            arrays[f"y{tail}"] = np.array([place[2] for place in places])
    return arrays


def _text(name: str, files) -> dict[str, np.ndarray]:
    """x uint8 [N, D] of zeros and ones and y [N], 0..99, from the text files of Shokri et al. (2017).

    purchase100: a line is `label,f1,...,f600`. texas100: the features in `feats`, the labels in `labels`, a line each.
    """
    tables = {}
    for file, content in files:
        need(Path(file).name not in tables, f"it holds more than one {Path(file).name!r}; name the one that is meant")
        tables[Path(file).name] = _csv(file, content, np.float32, header=None).to_numpy()
    fine = len(tables) == len(TEXTS[name])
    need(fine, f"it holds the files {sorted(tables)}; {TEXTS[name]}, as published, or an .npz are needed")
    if name == "texas100":
        x, labels = tables["feats"], tables["labels"][:, 0]
    else:
        (table,) = tables.values()
        x, labels = table[:, 1:], table[:, 0]
    what = f"it holds {len(labels)} labels and {len(x)} lines of {x.shape[1]} features"
    need(x.shape == (len(labels), WIDTH[name]), f"{what}; {WIDTH[name]} features for each label are needed")
    odd = np.setxor1d(labels, np.arange(1, 101))[:5].tolist()
    need(not odd, f"labels {odd} are not in 1..100, or have no example; all of 1..100 and no others are needed")
    return {"x": _binary(x), "y": labels.astype(np.int64) - 1}


def _csv(name: str, content: bytes, dtype, **how) -> pd.DataFrame:
    try:
        return pd.read_csv(io.BytesIO(content), dtype=dtype, skipinitialspace=True, **how)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as comma-separated values: {error}") from error


def _binary(x: np.ndarray) -> np.ndarray:
    """x as uint8 if all of it is 0 or 1. Raises ValueError otherwise."""
    need(x.ndim == 2 and x.dtype.kind in "biuf", f"x is {x.dtype} {list(x.shape)}; binary features [N, D] are needed")
    wrong = ~np.isin(x, (0, 1))
    need(not wrong.any(), f"x holds {x[wrong][:1]} in column {wrong.any(axis=0).argmax()}; only 0 and 1 are valid")
    return x.astype(np.uint8)


def _retina(files) -> dict[str, np.ndarray]:
    """x [N, 3, SIDE, SIDE], y (names of grades) and groups (patients) of photographs train/<patient>_<side>.jpeg.

    The layout is that of Kaggle's Diabetic Retinopathy Detection (2015); the table trainLabels.csv grades each image.
    """
    images, tables = {}, []
    for name, content in files:
        need(Path(name).stem not in images, f"image {Path(name).stem!r} is there twice")
        if name.endswith(".csv"):
            tables.append(content)
        else:
            images[Path(name).stem] = _pixels(name, content, SIDE)
    need(len(tables) == 1, f"it holds {len(tables)} tables trainLabels.csv and {len(images)} images; one is needed")
    table = _csv("trainLabels.csv", tables[0], str, keep_default_na=False)
    need({"image", "level"} <= set(table), f"trainLabels.csv has the columns {list(table)}; image, level are needed")
    table = table.sort_values("image")
    wrong = table[~(table.image.str.fullmatch(EYE) & table.level.isin(list("01234"))) | table.image.duplicated()]
    what = f"trainLabels.csv: {wrong[['image', 'level']][:1].to_dict('records')}"
    need(wrong.empty, f"{what}; <patient>_left or <patient>_right, once, and a level 0..4 are needed")
    odd = sorted(images.keys() ^ set(table.image))
    need(not odd, f"{odd[:2]}, {len(odd)} in all, have no grade or no image; trainLabels.csv and train/ must agree")
    absent = sorted(set("01234") - set(table.level))
    need(not absent, f"no image has level {absent}; all of 0..4 are needed (or use dataset 'folder')")
    x, y = np.stack([images[name] for name in table.image]), np.array(GRADES)[table.level.astype(int)]
    return {"x": x, "y": y, "groups": table.image.str.extract(EYE)[0].to_numpy(str)}

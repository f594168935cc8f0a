"""Where data come from: built-in sets, CIFAR, image trees, binary tables, retina photographs and .npz files.

`read` turns a name and a path into arrays, which lib.data makes into one `Dataset`. What is downloaded here gets its
name once its sha256 is right. Archives are read in memory, up to a size: nothing is extracted, no link is followed.
CIFAR's own files are pickles: they are read, after their checksums, by an unpickler that knows numbers, texts, lists
and NumPy's arrays, and calls nothing else.
"""

import csv
import glob
import io
import json
import os
import pickle
import re
import tarfile
import tempfile
import warnings
import zipfile
from contextlib import suppress
from functools import partial
from hashlib import blake2b, md5, sha256
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

DATASETS = tuple("digits cifar10 cifar100 purchase100 texas100 eyepacs subclasses folder npz".split())
BUILT_IN = ("digits", "subclasses")
CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # the folder of torchvision's files
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
# the largest image file and other file that are read, in bytes, the largest archive, and pixels of an image
MOST_IMAGE, MOST_FILE, MOST_ARCHIVE, MOST_PIXELS = 1 << 26, 1 << 31, 1 << 38, 1 << 26
ROOT = Path(__file__).resolve().parents[2]

# (leading folder of an archive, train or test, class, file) of an image; nothing hidden, absolute or with ".."
PLACE = re.compile(r"(?:\./)?(?:([^./][^/]*)/)?(train|test)/([^./][^/]*)/([^./][^/]*\.(?i:png|jpe?g|bmp|webp))")
LAYOUT = "train/<class>/*.png (.jpg, .jpeg, .bmp, .webp) and perhaps test/<class>/... (CIFAR: or torchvision's files)"

COLUMNS = {"purchase100": 600, "texas100": 6169}  # binary features in the published text files, of 100 classes
TEXTS = {"purchase100": ("dataset_purchase",), "texas100": ("feats", "labels")}
TEXT = re.compile(r"(?:\./)?(?:[^./][^/]*/){0,2}(dataset_purchase|feats|labels)")

# what the arrays of an .npz are called: here, in the tables of papers on attacks, by Keras, by MedMNIST (whose val_
# part is left aside: the pool is what models train on)
NAMES = (
    ("x", "y", "x_test", "y_test"),
    ("features", "labels", "features_test", "labels_test"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "images_test", "labels_test"),
)

SPREAD, REACH = 1.2, 5.0  # of the centres of `subclasses`, in standard deviations of a sub-pattern

SIZE = 32  # pixels to a side of a retina photograph
GRADES = ("0 none", "1 mild", "2 moderate", "3 severe", "4 proliferative")
# (leading folder, file without its suffix) of a photograph; both None: the table of grades
RETINA = re.compile(r"(?:\./)?(?:([^./][^/]*)/)?(?:train/([^./][^/]*)\.(?i:jpe?g|png)|trainLabels\.csv)")
EYE = re.compile(r"([^_]+)_(left|right)")

# what `data` may be called in the folder data/ where no path is given
FILES = {
    "purchase100": ("purchase100.npz", "dataset_purchase.tgz", "dataset_purchase"),
    "texas100": ("texas100.npz", "dataset_texas.tgz", "texas"),
    "eyepacs": ("eyepacs", *(f"eyepacs{suffix}" for suffix in ARCHIVES), "diabetic-retinopathy-detection"),
}
_SHOKRI = "https://github.com/privacytrustlab/datasets/raw/master/dataset"
_TORONTO = "https://www.cs.toronto.edu/~kriz/cifar"
_CITE = "no licence is stated; the authors ask for a citation of Krizhevsky (2009)"
# name: (where it is from, sha256 of that file or None where none is published, terms)
SOURCES = {
    "digits": ("scikit-learn", None, "UCI optical digits, CC BY 4.0"),
    "subclasses": ("this project", None, "synthetic, none"),
    "cifar10": (
        f"{_TORONTO}-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        _CITE,
    ),
    "cifar100": (
        f"{_TORONTO}-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        _CITE,
    ),
    "purchase100": (
        f"{_SHOKRI}_purchase.tgz",
        None,
        "derived by Shokri et al. (2017) from Kaggle's Acquire Valued Shoppers Challenge, whose rules apply",
    ),
    "texas100": (
        f"{_SHOKRI}_texas.tgz",
        None,
        "derived by Shokri et al. (2017) from the Texas hospital discharge public use file, whose data use agreement "
        "applies: no attempt to identify a patient",
    ),
    "eyepacs": (
        "https://www.kaggle.com/c/diabetic-retinopathy-detection",
        None,
        "the competition's rules; non-commercial research",
    ),
}


def obtain(name: str) -> str:
    """One paragraph: the command that obtains a data set of SOURCES, and its terms. Raises ValueError."""
    need(name in SOURCES, f"dataset={name!r} has no source; choose one of {', '.join(SOURCES)}")
    url, checksum, terms = SOURCES[name]
    file = url.rsplit("/", 1)[-1]
    how = f"mkdir -p data && curl -L -o data/{file} {url}"
    if name == "eyepacs":
        how = (
            "kaggle competitions download -c diabetic-retinopathy-detection (accept its rules first), unpack train/ "
            "and trainLabels.csv into data/eyepacs"
        )
    if name in CIFAR:
        how = f"nothing to do (it is downloaded and checked), or {how}"
    if name in BUILT_IN:
        how = f"nothing to do: it comes with {url}"
    check = f" sha256 {checksum}." if checksum else ""
    return f"{name}: {how}.{check} Terms: {terms}."


def read(name: str, data, cache: Path) -> dict[str, np.ndarray]:
    """Arrays x, y and, where there, x_test, y_test, groups, pattern, pattern_test of a data set of DATASETS.

    data: its path, or None. cache: the folder for what takes long to decode. Raises FileNotFoundError for a path or a
    file that is missing, ValueError for all else that is wrong.
    """
    need(name in DATASETS, f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")
    what = "is built in and takes none" if name in BUILT_IN else "needs the path of an .npz file or of images"
    need((data is None) == (name in BUILT_IN) or name in CIFAR or name in FILES, f"dataset {name!r} {what}")
    if name in BUILT_IN:
        return {"digits": _digits, "subclasses": _subclasses}[name]()
    path = _find(name, data)
    if name == "npz" or name in COLUMNS and path.suffix == ".npz":
        arrays = _npz(path)
        return {**arrays, **{x: _binary(arrays[x]) for x in arrays if x[0] == "x"}} if name in COLUMNS else arrays
    if name in CIFAR and (own := _own_files(name, path, download=data is None)):
        return _cifar(name, own)
    if name in COLUMNS:
        path = path.parent if path.name == "feats" else path  # its labels lie beside it
        return _cached(name, path, partial(_text, name), partial(_table, name), cache)
    if name == "eyepacs":
        return _cached(name, path, RETINA.fullmatch, _retina, cache)
    return _cached("images", path, PLACE.fullmatch, _images, cache)


def need(fine, problem: str) -> None:
    """Raise ValueError(problem) unless `fine`."""
    if not fine:
        raise ValueError(problem)


def _find(name: str, data) -> Path:
    """The path `data`, or the one archive called `data` plus a suffix of ARCHIVES; None: a known file of data/."""
    if data is None:
        here, names = ROOT / "data", FILES.get(name, ("",))
        found = [path for file in names if (path := here / file).exists() or name in CIFAR][:1]
        what = f"data=None: none of {', '.join(names)} is in {here}"
    else:
        need(isinstance(data, str | os.PathLike) and str(data), "not a path; a string or pathlib.Path is needed")
        path = Path(data).expanduser()
        found = [path] if path.exists() else [p for s in ARCHIVES if (p := Path(f"{path}{s}")).is_file()]
        need(len(found) < 2, f"could be any of {', '.join(p.name for p in found)}; name one")
        what = f"data={data!r} does not exist, nor with {', '.join(ARCHIVES)} added"
    if not found:
        raise FileNotFoundError(f"{what}. {obtain(name)}" if name in FILES else what)
    inside = [path for file in FILES.get(name, ()) if (path := found[0] / file).is_file()]
    path = [*inside, *found][0]
    if path.is_file():
        _check(name, path)
    return path


def _check(name: str, path: Path) -> None:
    """Compare a file with the sha256 of SOURCES, if it is the one published there, and of `<file>.sha256` beside it."""
    url, known, _ = SOURCES.get(name, ("", None, ""))
    beside = path.with_name(f"{path.name}.sha256")
    sums = [known] if known and url.endswith(f"/{path.name}") else []
    sums += [word for word in beside.read_text().split()[:1]] if beside.exists() else []
    if sums:
        digest = sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        found = digest.hexdigest()
        wrong = [s for s in sums if s.lower() != found]
        need(not wrong, f"{path.name} fails its checksum: sha256 {found}, needed {wrong}; obtain the file again")


def _digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    return {"x": load_digits().images / 16, "y": load_digits().target}


def _subclasses(n: int = 2400, t: int = 1200, features: int = 32) -> dict[str, np.ndarray]:
    """n pool and t test draws of a Gaussian mixture: five classes of one common, two middling, nine rare sub-patterns.

    After the long tail of Feldman (2020): a rare sub-pattern lies nearer to the common centre of another class than to
    its own class's, so that the labels of its few examples must be memorized. `pattern`, 0..59: 12 class + sub-pattern,
    of which 0 is the common one and 3 and above are rare.
    """
    rng, classes, rare = np.random.default_rng(0), 5, 9
    # expected among 400 examples of a class: 241 common ones, 61.5 of each middling and 2 to 6 of each rare sub-pattern
    share = np.concatenate([[241, 61.5, 61.5], np.linspace(2, 6, rare)]) / 400
    centre = rng.normal(size=(classes, len(share), features)) * SPREAD
    step = rng.normal(size=(classes, rare, features))
    other = (np.arange(classes)[:, None] + 1 + np.arange(rare) % (classes - 1)) % classes
    # rare centre = common centre of another class + REACH u, u a unit vector of random direction
    centre[:, 3:] = centre[other, 0] + REACH * step / np.linalg.norm(step, axis=2, keepdims=True)
    pattern = rng.choice(classes * len(share), n + t, p=np.tile(share, classes) / classes)
    x = (centre.reshape(-1, features)[pattern] + rng.normal(size=(n + t, features))).astype(np.float32)
    y = pattern // len(share)
    pool = {"x": x[:n], "y": y[:n], "pattern": pattern[:n]}
    return pool | {"x_test": x[n:], "y_test": y[n:], "pattern_test": pattern[n:]}


def _own_files(name: str, path: Path, download: bool) -> Path | None:
    """CIFAR's archive, or the folder of what is in it, at or in `path`, if it is there or has been downloaded there."""
    url, known, _ = SOURCES[name]
    archive = path if path.name == url.rsplit("/", 1)[-1] else path / url.rsplit("/", 1)[-1]
    if (path / CIFAR[name]).exists():
        return path / CIFAR[name]
    if download and not archive.exists():
        try:
            _download(url, archive, known)
        except (OSError, ValueError) as error:
            give = f"Give data=, a path of {CIFAR[name]} or of {LAYOUT}"
            raise ValueError(f"{name} could not be downloaded ({error}). {give}") from error
    if archive.is_file():
        _check(name, archive)
        return archive
    return None


def _download(url: str, path: Path, known: str) -> None:
    """Fetch a file, which gets its name only once its sha256 is the known one. Raises OSError, ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = sha256()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        with urlopen(url, timeout=60) as remote, open(f"{folder}/part", "wb") as file:
            with tqdm(desc=path.name, unit="B", unit_scale=True, leave=False, delay=1) as bar:
                while block := remote.read(1 << 20):
                    digest.update(block)
                    bar.update(file.write(block))
        found = digest.hexdigest()
        need(found == known, f"{url} fails its checksum: sha256 {found}, needed {known}")
        os.replace(f"{folder}/part", path)


class Plain(pickle.Unpickler):
    """Reads numbers, texts, lists, dicts and NumPy arrays. What names anything else to be called is refused."""

    known = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    known |= {(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")}

    def find_class(self, module, name):
        need((module, name) in self.known, f"a pickle asks for {module}.{name}, which no file of CIFAR does")
        return self.known[module, name]


def _plain(content: bytes):
    """What a pickle of CIFAR holds. Raises ValueError."""
    try:
        with warnings.catch_warnings():  # NumPy 2.4 deprecates how these old pickles spell their dtype
            warnings.simplefilter("ignore")
            return Plain(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises many kinds
        raise ValueError(f"it cannot be read: {error}") from error


def _cifar(name: str, path: Path) -> dict[str, np.ndarray]:
    """CIFAR from its archive or the folder of what is in it. torchvision has the md5 checksums of the files."""
    from torchvision import datasets  # here: the import takes seconds

    kind = getattr(datasets, name.upper())
    sums = dict(kind.train_list + kind.test_list + [(kind.meta["filename"], kind.meta["md5"])])
    lead = "" if path.is_dir() else f"{CIFAR[name]}/"
    contents, held = dict(_members(path, list(sums), lambda file: file.removeprefix(lead) in sums)), {}
    for file, known in sums.items():
        content = contents.get(f"{lead}{file}", b"")
        found = md5(content, usedforsecurity=False).hexdigest()
        need(found == known, f"{name} is incomplete or fails its checksum: {file} has md5 {found}, needed {known}")
        held[file] = _plain(content)
    classes, arrays = np.array(held[kind.meta["filename"]][kind.meta["key"]]), {}
    for tail, files in (("", kind.train_list), ("_test", kind.test_list)):
        parts = [held[file] for file, _ in files]
        arrays[f"x{tail}"] = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        arrays[f"y{tail}"] = classes[[y for part in parts for y in part.get("labels", part.get("fine_labels"))]]
    return arrays


def _npz(path: Path) -> dict[str, np.ndarray]:
    """x, y and, where there, x_test, y_test and groups, under one of NAMES."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            fits(file)
            held = set(file.files)
            names = next((names for names in NAMES if {*names[:2]} <= held), NAMES[0])
            keys = dict(zip((*NAMES[0], "groups"), (*names, "groups"), strict=True))
            arrays = {key: file[name] for key, name in keys.items() if name in held}
    except Exception as error:  # NumPy and zipfile raise many kinds
        raise ValueError(f"not a readable .npz of numbers ({error}); make one by numpy.savez(path, x=, y=)") from error
    form = "x, y and x_test, y_test, the latter both or not at all (or, alike, "
    form += "; ".join(", ".join(names) for names in NAMES[1:]) + ")"
    complete = {"x", "y"} <= set(arrays) and ("x_test" in arrays) == ("y_test" in arrays)
    need(complete, f"it holds the arrays {sorted(held)}; needed are {form}, perhaps groups")
    return arrays


def fits(file: np.lib.npyio.NpzFile) -> None:
    """Raise ValueError unless the arrays of an .npz, unpacked, are no larger than this machine's memory."""
    size, memory = (
        sum(i.file_size for i in file.zip.infolist()),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
    need(size <= memory, f"its arrays take {size / 1e9:.1f} GB, the memory is {memory / 1e9:.1f} GB")


def _cached(kind: str, path: Path, wanted, make, cache: Path) -> dict[str, np.ndarray]:
    """make(path, files) of a folder or archive, made once: the second time it comes from the cache.

    files: the files of a folder (at most two folders down) that `wanted` takes; [""] for a file.
    """
    levels = ("*", "*/*", "*/*/*")
    found = (f for level in levels for f in glob.glob(level, root_dir=path)) if path.is_dir() else ()
    files = sorted(filter(wanted, found)) if path.is_dir() else [""]
    # the cache file is named by a hash of where the files lie and of each one's name, size and time of change
    stats = [(file, s.st_size, s.st_mtime_ns) for file in files for s in [os.stat(path / file)]]
    key = blake2b(json.dumps([3, kind, str(path.resolve()), stats]).encode(), digest_size=16).hexdigest()
    file = cache / f"{path.name.split('.')[0]}-{key}.npz"
    with (
        suppress(Exception),
        open(file, "rb") as opened,
        np.load(opened, allow_pickle=False) as arrays,
    ):  # checks each CRC-32
        return dict(arrays)
    arrays = make(path, files)  # the cache file is absent or damaged
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        np.savez(f"{folder}/part.npz", **arrays)
        os.replace(f"{folder}/part.npz", file)  # atomic: a reader sees all of it or nothing
    return arrays


def _members(path: Path, files: list[str], wanted):
    """(name, content) of each wanted file of a folder or archive, in memory."""
    try:
        if path.is_dir():
            found = ((file, os.path.getsize(path / file), path / file) for file in files)
            yield from ((file, at.read_bytes()) for file, _, at in bounded(found))
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                found = bounded((m.filename, m.file_size, m) for m in archive.infolist())
                yield from ((name, archive.read(m)) for name, _, m in found if wanted(name))
        else:
            with tarfile.open(path) as archive:
                found = bounded((m.name, m.size, m) for m in archive)
                yield from (
                    (name, archive.extractfile(m).read()) for name, _, m in found if m.isfile() and wanted(name)
                )
                archive.fileobj.seek(archive.offset)  # tarfile takes a broken header for the end; a tar ends in zeros
                need(archive.fileobj.read(512) == bytes(512), "its end is missing")
    except Exception as error:  # each format raises other kinds
        form = f"a folder or a whole archive ({', '.join(ARCHIVES)}) is needed"
        raise ValueError(f"{form}; it cannot be read: {error}") from error


def bounded(members):
    """The (name, size, member) given, as long as none, nor their sum, is larger than is read here."""
    whole = 0
    for name, size, member in members:
        most = MOST_IMAGE if name.lower().endswith(IMAGES) else MOST_FILE
        need(size <= most, f"{name} has {size / 1e6:.0f} MB unpacked; at most {most / 1e6:.0f} are read")
        whole += size
        need(whole <= MOST_ARCHIVE, f"it has over {MOST_ARCHIVE / 1e9:.0f} GB unpacked, the most that is read")
        yield name, size, member


def _decoded(decode, members, unit: str):
    """decode(member) of each, in order, by threads; no more than a block of undecoded files is held at a time."""
    with ThreadPool(min(8, os.cpu_count())) as threads, tqdm(unit=unit, leave=False, delay=1) as bar:
        while block := list(islice(members, 256)):
            yield from threads.map(decode, block, chunksize=16)
            bar.update(len(block))


def _images(path: Path, files: list[str]) -> dict[str, np.ndarray]:
    """x, y and, where there, x_test, y_test of a tree or archive, sorted by class and file; y holds class names."""
    images, arrays, size = {}, {}, None
    for place, pixels in _decoded(_decode, _members(path, files, PLACE.fullmatch), " images"):
        size = size or pixels.shape[1:]
        what = f"image {'/'.join(place[1:])}: (H, W) is {pixels.shape[1:]}, of others {size}"
        need(pixels.shape[1:] == size, f"{what}; all must have one size")
        images[place] = pixels
    roots, splits = {place[0] or "." for place in images}, {place[1] for place in images}
    need("train" in splits, f"it holds no training images; needed is {LAYOUT}")
    need(len(roots) == 1, f"it holds images below {sorted(roots)}; one leading folder is allowed")
    shape = max(pixels.shape for pixels in images.values())  # grey becomes RGB where any image is RGB
    for split, tail in (("train", ""), ("test", "_test")):
        if places := sorted(place for place in images if place[1] == split):
            arrays[f"x{tail}"] = np.stack([np.broadcast_to(images[place], shape) for place in places])
            arrays[f"y{tail}"] = np.array([place[2] for place in places])
    return arrays


def _decode(member: tuple[str, bytes]) -> tuple[tuple, np.ndarray]:
    """(place, uint8 [1, H, W] of a grey (mode L) image or [3, H, W] of any other)."""
    try:
        with Image.open(io.BytesIO(member[1]), formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            _sized(image)
            need(image.mode[0] not in "IF", f"mode {image.mode} is not valid; 8 bits a channel are needed")
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except Exception as error:  # PIL raises many kinds
        raise ValueError(f"image {member[0]} cannot be used: {error}") from error
    return PLACE.fullmatch(member[0]).groups(), np.atleast_3d(pixels).transpose(2, 0, 1)


def _sized(image) -> None:
    """Raise ValueError if an image, not yet decoded, has more pixels than are read here."""
    size = f"{image.width} x {image.height} pixels"
    need(image.width * image.height <= MOST_PIXELS, f"{size}; at most {MOST_PIXELS / 1e6:.0f} million are read")


def _text(name: str, member: str) -> str | None:
    """Which text file of TEXTS an archive's member or a file of a folder is, if any."""
    found = TEXT.fullmatch(member)
    return found[1] if found and found[1] in TEXTS[name] else None


def _table(name: str, path: Path, files: list[str]) -> dict[str, np.ndarray]:
    """x uint8 [N, D] of zeros and ones and y [N], 0..99, from the text files of Shokri et al. (2017).

    purchase100: a line is `label,f1,...,f600`. texas100: the features in `feats`, the labels in `labels`, a line each.
    """
    if path.is_file() and not path.name.endswith(ARCHIVES):  # the text file itself
        path, files = path.parent, [path.name]
    held = {}
    for member, content in _members(path, files, partial(_text, name)):
        key = _text(name, member) or TEXTS[name][0]
        need(key not in held, f"it holds more than one file {key!r}; name the one that is meant")
        held[key] = _lines(content, 0 if key == "labels" else COLUMNS[name], key != "feats")
    missing = [key for key in TEXTS[name] if key not in held]
    need(not missing, f"it holds no file {missing}; needed are {TEXTS[name]}, as published, or an .npz")
    x, y, valid = held[TEXTS[name][0]][0], held[TEXTS[name][-1]][1], np.arange(1, 101)
    need(len(x) == len(y), f"feats has {len(x)} lines and labels {len(y)}; as many are needed")
    wrong, absent = np.setdiff1d(y, valid)[:5].tolist(), np.setdiff1d(valid, y)[:5].tolist()
    need(not wrong, f"it holds labels {wrong}; only 1..100 are valid")
    need(not absent, f"it holds no example of class {absent}; all of 1..100 are needed")
    return {"x": x, "y": y.astype(np.int64) - 1}


def _lines(content: bytes, width: int, labelled: bool) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, width] of zeros and ones, numbers [N] in front of them) of comma-separated text, block by block."""
    rows, labels, file = [np.empty((0, width), np.uint8)], [], io.BytesIO(content)
    while block := file.readlines(1 << 24):
        lines = [line for raw in block if (line := raw.strip())]
        parts = [line.partition(b",") for line in lines] if labelled else [(b"0", b"", line) for line in lines]
        labels += [label for label, _, _ in parts]
        rows += [_bits([line for _, _, line in parts], width)] if width else []
    try:
        return np.concatenate(rows), np.array(labels).astype(float)
    except ValueError as error:
        raise ValueError(f"a label is no number ({error})") from error


def _bits(lines: list[bytes], width: int) -> np.ndarray:
    """uint8 [n, width] of lines `0,1,...`; text of another form, as `0.0, 1.0`, goes the slow way."""
    if all(len(line) == 2 * width - 1 for line in lines):
        text = np.frombuffer(b"".join(lines), np.uint8).reshape(-1, 2 * width - 1)
        bits = text[:, ::2] - np.uint8(ord("0"))
        if bits.max(initial=0) <= 1 and (text[:, 1::2] == ord(",")).all():
            return bits
    try:
        values = np.loadtxt(lines, np.float32, delimiter=",", ndmin=2, comments=None)
    except ValueError as error:
        raise ValueError(f"its text cannot be read ({error}); {width} binary features a line are needed") from error
    need(values.shape[1] == width, f"its lines have {values.shape[1]} features; {width} are needed")
    return _binary(values)


def _binary(x: np.ndarray) -> np.ndarray:
    """x as uint8 if all of it is 0 or 1. Raises ValueError that names the first column where it is not."""
    what = f"x is {x.dtype} {list(x.shape)}"
    need(x.ndim == 2 and x.dtype.kind in "biuf" and len(x), f"{what}; binary features [N, D] are needed")
    for start in range(0, len(x), 4096):  # by block: nothing else as large as x is held
        bad = (x[start : start + 4096] != 0) & (x[start : start + 4096] != 1)
        if bad.any():
            column = bad.any(axis=0).argmax()
            value = x[start + bad[:, column].argmax(), column]
            need(False, f"{what}, column {column} holds {value}; binary features, 0 or 1, are needed")
    return x.astype(np.uint8)


def _retina(path: Path, files: list[str]) -> dict[str, np.ndarray]:
    """x [N, 3, SIZE, SIZE], y (names of grades) and groups (patients) of photographs train/<patient>_<side>.jpeg.

    The layout is that of Kaggle's Diabetic Retinopathy Detection (2015); the table trainLabels.csv grades each image.
    """
    images, tables = {}, []
    for stem, content in _decoded(_photograph, _members(path, files, RETINA.fullmatch), " photographs"):
        if stem is None:
            tables.append(content)
        else:
            need(EYE.fullmatch(stem), f"image {stem!r} is not called <patient>_left or <patient>_right")
            need(stem not in images, f"image {stem!r} is there twice")
            images[stem] = content
    need(len(tables) == 1, f"it holds {len(tables)} tables trainLabels.csv and {len(images)} images; one is needed")
    grades = _grades(tables[0])
    for kind, few in (("not among the images", grades.keys() - images), ("not in the table", images.keys() - grades)):
        need(not few, f"{min(few, default='')!r} is {kind}, {len(few)} in all; trainLabels.csv and train/ must agree")
    absent = sorted(set(GRADES) - set(grades.values()))
    need(not absent, f"no image has grade {absent}; all of 0..4 are needed (or use dataset 'folder')")
    names = sorted(images)
    patients = np.unique([EYE.fullmatch(name)[1] for name in names], return_inverse=True)[1]
    x, y = np.stack([images[name] for name in names]), np.array([grades[name] for name in names])
    return {"x": x, "y": y, "groups": patients}


def _photograph(member: tuple[str, bytes]) -> tuple[str | None, np.ndarray | bytes]:
    """(stem, uint8 [3, SIZE, SIZE]: the central square, made small) of a photograph, (None, content) of the table."""
    stem = RETINA.fullmatch(member[0])[2]
    if stem is None:
        return None, member[1]
    try:
        with Image.open(io.BytesIO(member[1]), formats=("PNG", "JPEG")) as image:
            _sized(image)
            image.draft(
                "RGB", (2 * SIZE, 2 * SIZE)
            )  # a JPEG of thousands of pixels is decoded at up to 1/8 of its size
            small = ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BOX)
    except Exception as error:  # PIL raises many kinds
        raise ValueError(f"image {member[0]} cannot be used: {error}") from error
    return stem, np.asarray(small).transpose(2, 0, 1)


def _grades(table: bytes) -> dict[str, str]:
    """{image: name of its grade} of a table with the columns image, level."""
    rows = list(csv.DictReader(io.StringIO(table.decode("utf-8-sig", "replace"))))
    need(rows and {"image", "level"} <= set(rows[0]), "trainLabels.csv has no lines with the columns image, level")
    for row in rows:
        what = f"trainLabels.csv: image {row['image']!r}, level {row['level']!r}"
        need(row["level"] in tuple("01234"), f"{what}; a level 0..4 is needed")
        need(EYE.fullmatch(row["image"] or ""), f"{what}; <patient>_left or <patient>_right is needed")
    grades = {row["image"]: GRADES[int(row["level"])] for row in rows}
    need(len(grades) == len(rows), "trainLabels.csv lists an image twice")
    return grades

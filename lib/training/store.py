"""The store: one folder for each recipe and data set, with growing .npy arrays, one row a model, and a flag a model.

    store/digits-mlp-sam-1f2e3d4c5b6a/
        recipe.json         what was trained, in full
        logits.npy          [M, Q, N, C] float32, and so on: plain arrays, memory-mapped, never pickled
        done/00012.json     written, atomically, after the rows of model 12; holds their checksums
        claims/00000.lock   held by the process that trains the chunk of models that begins with 0

A model counts as finished if its flag is there and every checksum matches, so a kill loses at most the models in
training. The system frees a process's locks when it ends. (File locks must be on, as they are by default on NFS.)"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from lib import need

VERSION = 6  # raise it when the same recipe would give other arrays, or another key


def write_atomic(path, text):
    """Write text so that a reader sees the old file or the whole new one, never a part of it."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / path.name
        whole.write_text(text)
        os.replace(whole, path)


def checksum(row):
    """blake2b of the bytes of an array, or of a dict as JSON: 16 hex digits."""
    data = json.dumps(row, sort_keys=True).encode() if isinstance(row, dict) else np.ascontiguousarray(row).data
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Rows:
    """A .npy file [rows, *shape] that grows by whole rows."""

    def __init__(self, path, shape, dtype):
        self.path, self.shape, self.dtype = Path(path), tuple(shape), np.dtype(dtype)
        self.header_bytes, self.seen = len(self.header(0)), (None, None)

    def header(self, rows):
        """NumPy's header; it has one length for any number of rows, so it can be rewritten in place."""
        out, about = BytesIO(), {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, *self.shape)}
        np.lib.format.write_array_header_1_0(out, about)
        return out.getvalue()

    def read(self):
        """Read-only memory map [rows, *shape]; without rows if the file is absent, damaged or that of another array."""
        # NumPy raises errors of many kinds at a damaged header
        with suppress(Exception), open(self.path, "rb") as file:
            about = os.fstat(file.fileno())
            if (state := (about.st_ino, about.st_size, about.st_mtime_ns)) == self.seen[0]:
                return self.seen[1]  # a map takes longer than all else
            np.lib.format.read_magic(file)
            (rows, *shape), fortran, dtype = np.lib.format.read_array_header_1_0(file)
            is_ours = (tuple(shape), fortran, dtype, file.tell()) == (self.shape, False, self.dtype, self.header_bytes)
            # a truncated file has fewer rows than its header says
            whole = (about.st_size - self.header_bytes) // self.dtype.itemsize // int(np.prod(shape))
            if is_ours and min(rows, whole) > 0:
                self.seen = state, np.memmap(file, dtype, "r", self.header_bytes, (min(rows, whole), *shape))
                return self.seen[1]
        return np.empty((0, *self.shape), self.dtype)

    def write(self, index, row):
        """Put one row in place, then the header; rows before it that are not there yet read as zeros."""
        row = np.ascontiguousarray(row, self.dtype).reshape(self.shape)
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.seek(self.header_bytes + index * row.nbytes)
            file.write(row.data)
            rows = (file.seek(0, os.SEEK_END) - self.header_bytes) // row.nbytes
            file.seek(0)
            file.write(self.header(rows))


def check_disk(store, needed):
    """Raise ValueError naming `store` if `needed` bytes more do not fit on its disk."""
    free = shutil.disk_usage(store).free
    what = f"the disk has {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB more are needed"
    need(needed <= free, f"store={str(store)!r}: {what}: free some, or ask for fewer models or notebooks")


class Store:
    """The arrays of one recipe, in a folder of `root` named by a prefix and the hash of a key (a JSON-able dict);
    layout: array name -> (shape of one row, dtype)."""

    def __init__(self, root, name, key, layout):
        self.folder, text = place(root, name, key)
        self.rows = {n: Rows(self.folder / f"{n}.npy", shape, dtype) for n, (shape, dtype) in layout.items()}
        self.verified = {}  # model -> its flag, once its checksums have been seen to match
        self.writing = FileLock(self.folder / ".lock")
        try:
            for part in ("done", "claims"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "recipe.json", text)
        except OSError as error:
            raise ValueError(f"store={str(root)!r} can't be written ({error}): give a writable folder") from error

    def claim(self, start):
        """The lock on the chunk of models that begins with `start`, held by us; None if another process trains it."""
        lock = FileLock(self.folder / "claims" / f"{start:05d}.lock")
        try:
            lock.acquire(timeout=0)
            return lock
        except Timeout:
            return None
        except (OSError, NotImplementedError) as error:
            raise ValueError(f"store={str(self.folder.parent)!r}: files can't be locked there ({error})") from error

    def save(self, model, arrays, **notes):
        """Write the model's row of each array (name -> row), then its flag with their checksums and the notes."""
        sums = {name: checksum(np.asarray(row, self.rows[name].dtype)) for name, row in arrays.items()}
        flag = {"model": int(model), "checksums": sums, **notes}
        try:
            with self.writing:  # two processes must not rewrite a header at once
                for name, row in arrays.items():
                    self.rows[name].write(model, row)
            write_atomic(self.folder / "done" / f"{model:05d}.json", json.dumps({**flag, "seal": checksum(flag)}))
        except OSError as error:
            kept = f"{len(list(self.folder.glob('done/*.json')))} finished models are kept"
            raise ValueError(f"store={str(self.folder.parent)!r} can't be written ({error}); {kept}") from error
        self.verified[model] = flag

    def flag(self, model):
        """The model's flag (a dict); None if it is absent, or if its rows are damaged, which is said."""
        path = self.folder / "done" / f"{model:05d}.json"
        if model in self.verified or not path.exists():
            return self.verified.get(model)
        if fault := self.fault(model, path):
            with self.writing:  # another process may have been rewriting a header
                fault = self.fault(model, path)
        if fault:
            warnings.warn(f"{self.folder.name}: model {model} is damaged ({fault}): it is trained again", stacklevel=2)
            path.unlink(missing_ok=True)
        return self.verified.get(model)

    def fault(self, model, path):
        """What is wrong with the flag at `path` or the rows; "" if nothing: then it counts as verified."""
        flag = read_json(path)
        if flag.pop("seal", None) != checksum(flag):
            return "its flag is unreadable or was changed"
        for name, wanted in flag["checksums"].items():
            rows = self.rows[name].read()
            if len(rows) <= model:
                return f"{name}.npy is truncated or unreadable"
            if checksum(rows[model]) != wanted:
                return f"{name}.npy has a wrong checksum"
        self.verified[model] = flag
        return ""


def read_json(path):
    """The dict in a JSON file; {} if the file is absent, torn, or holds something else."""
    found = None
    with suppress(OSError, ValueError):
        found = json.loads(Path(path).read_text())
    return found if isinstance(found, dict) else {}


def place(root, name, key):
    """(the folder of a recipe's store, the text of recipe.json in it)."""
    text = json.dumps({"store_version": VERSION, **key}, sort_keys=True, indent=1)
    return Path(root) / f"{name}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}", text

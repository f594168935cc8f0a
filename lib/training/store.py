"""The store: one folder per recipe and data set, growing .npy arrays with one row per model, and a flag per row.

    store/digits-mlp-sam-1f2e3d4c5b6a/
        recipe.json         what was trained, in full
        logits.npy          [M, Q, N, C] float32, and so on: plain arrays, memory-mapped, never pickled
        done/00012.json     written, atomically, after model 12's rows were; holds their checksums

        claims/00000.lock   held by the process that trains the chunk of models beginning with 0

A model counts as finished when its flag is there and every checksum matches, so a kill at any moment loses at
most the models in training, and a damaged row is found, named and trained again. Any number of processes may train
into one store: a chunk belongs to whoever holds its lock, which the system frees when that process ends, however it
ends, and rows are written one process at a time. (On a network file system its locks must be on, as they are by
default on NFS.)
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

VERSION = 3  # raise it when the same recipe would give other arrays


def write_atomic(path, text):
    """Write text so that a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def checksum(row):
    """blake2b of an array's bytes, 16 hex digits."""
    return hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=8).hexdigest()


def seal(flag):
    """The checksum of a flag's content."""
    return checksum(np.frombuffer(json.dumps(flag, sort_keys=True).encode(), np.uint8))


class Rows:
    """A .npy file [rows, *shape] that grows by whole rows. What it really holds is judged by its size, not its word."""

    def __init__(self, path, shape, dtype):
        self.path, self.shape, self.dtype = Path(path), tuple(shape), np.dtype(dtype)
        self.row_bytes = int(np.prod(shape)) * self.dtype.itemsize
        self.header_bytes = len(self._header(0))

    def _header(self, rows):
        """NumPy pads a version 1.0 header to one length for any number of rows, so it can be rewritten in place."""
        out = BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        note = {"descr": descr, "fortran_order": False, "shape": (rows, *self.shape)}
        np.lib.format.write_array_header_1_0(out, note)
        return out.getvalue()

    def counted(self):
        """How many rows the header counts; -1 if it is absent, damaged or another array's: not as written here."""
        try:
            with open(self.path, "rb") as file:
                header = file.read(self.header_bytes)
        except OSError:
            return -1
        found = re.search(rb"'shape': \((\d+),", header)
        return int(found[1]) if found and header == self._header(int(found[1])) else -1

    def held(self):
        """How many whole rows the file is long enough for."""
        return (self.path.stat().st_size - self.header_bytes) // self.row_bytes

    def __len__(self):
        """Whole rows in the file; 0 if it is absent, its header is damaged, or it is another array's."""
        counted = self.counted()
        return min(counted, self.held()) if counted > 0 else 0

    def mend(self):
        """Have the header count no more rows than are there: a truncated file is an .npy again."""
        if self.counted() > 0 and self.counted() > self.held():
            with open(self.path, "r+b") as file:
                file.write(self._header(self.held()))

    def read(self):
        """Read-only memory map [len(self), *shape]."""
        n = len(self)
        if not n:
            return np.empty((0, *self.shape), self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.header_bytes, (n, *self.shape))

    def write(self, index, row):
        """Put one row in place; rows before it that are not there yet read as zeros. The header comes last."""
        row = np.ascontiguousarray(row, self.dtype)
        if row.shape != self.shape:
            raise ValueError(f"{self.path.name}: a row has shape {row.shape}, expected {self.shape}")
        rows = max(len(self), index + 1)
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.seek(self.header_bytes + index * self.row_bytes)
            file.write(row.data)
            file.seek(0)
            file.write(self._header(rows))


def place(root, name, key):
    """(folder of a recipe's store, what recipe.json in it says): named by a hash of the key."""
    text = json.dumps({"store_version": VERSION, **key}, sort_keys=True, indent=1)
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return Path(root) / f"{name}-{digest}", text


def check_version(root, name, key):
    """Raise ValueError naming `store` if it holds this recipe as another version of the store wrote it."""
    for path in Path(root).glob(f"{name}-*/recipe.json"):
        try:
            said = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # not ours, or torn: it is no model of this recipe then
        if not isinstance(said, dict):
            continue
        version = said.pop("store_version", None)
        if version != VERSION and said == json.loads(json.dumps(key)):
            raise ValueError(
                f"store={str(root)!r}: {path.parent.name} was written by version {version} of the store, this is "
                f"{VERSION}: give another folder, or remove that one to train its models anew"
            )


class Store:
    """The arrays of one recipe.

    root: folder of all the stores; name: readable prefix; key: a JSON-able dict (recipe and data hash) that
    names the folder by its hash; layout: array name -> (shape of one row, dtype).
    Raises ValueError naming `store` if the folder can't be written, or holds the same in another version's form.
    """

    def __init__(self, root, name, key, layout):
        self.folder, text = place(root, name, key)
        check_version(root, name, key)
        self.rows = {n: Rows(self.folder / f"{n}.npy", shape, dtype) for n, (shape, dtype) in layout.items()}
        self.verified = {}  # model -> its flag, once its checksums have been seen to match
        self.writing = FileLock(self.folder / ".lock")
        try:
            for part in ("done", "claims"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "recipe.json", text)
            with self.writing:
                [rows.mend() for rows in self.rows.values()]
        except OSError as error:
            raise ValueError(f"store={str(root)!r} can't be written ({error}): give a writable folder") from error

    def claim(self, start):
        """The lock on the chunk of models that begins with `start`, held by us; None if another process trains it."""
        lock = FileLock(self.folder / "claims" / f"{start:05d}.lock", thread_local=False)  # freed where it was saved
        try:
            lock.acquire(timeout=0)
            return lock
        except Timeout:
            return None
        except (OSError, NotImplementedError) as error:
            raise ValueError(f"store={str(self.folder.parent)!r}: files can't be locked there ({error})") from error

    def check_disk(self, n_models, few=()):
        """Raise ValueError naming `store` if n_models more rows do not fit. few: array -> the most rows it gets."""
        counts = dict.fromkeys(self.rows, n_models) | {name: min(n_models, most) for name, most in dict(few).items()}
        needed = sum(counts[name] * rows.row_bytes for name, rows in self.rows.items())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"store={str(self.folder.parent)!r}: the disk has {free / 1e6:.0f} MB free, "
                f"{n_models} models need {needed / 1e6:.0f} MB: free some, or train fewer models"
            )

    def save(self, model, arrays, **notes):
        """Write model's row of each array (name -> row), then its flag with their checksums and the notes.

        Raises ValueError naming `store` if the disk refuses; models saved before stay as they are.
        """
        sums = {name: checksum(np.asarray(row, self.rows[name].dtype)) for name, row in arrays.items()}
        flag = {"model": int(model), "checksums": sums, **notes}
        try:
            with self.writing:  # the arrays' headers count the rows of all the processes
                for name, row in arrays.items():
                    self.rows[name].write(model, row)
            write_atomic(self._flag(model), json.dumps({**flag, "seal": seal(flag)}))
        except OSError as error:
            kept = f"{len(list(self.folder.glob('done/*.json')))} finished models are kept"
            raise ValueError(f"store={str(self.folder.parent)!r} can't be written ({error}); {kept}") from error
        self.verified[model] = flag

    def flag(self, model):
        """The model's flag (a dict), or None if it is absent or its rows are damaged (then said, and unflagged)."""
        if model not in self.verified and self._flag(model).exists():
            flag, fault = self._verify(model)
            if fault:
                with self.writing:  # not while a header is being rewritten
                    flag, fault = self._verify(model)
            if fault:
                warnings.warn(
                    f"{self.folder.name}: model {model} is damaged ({fault}): it is trained again", stacklevel=2
                )
                self._flag(model).unlink(missing_ok=True)
            else:
                self.verified[model] = flag
        return self.verified.get(model)

    def _flag(self, model):
        return self.folder / "done" / f"{model:05d}.json"

    def _verify(self, model):
        """(flag, None), or (None, what is wrong)."""
        try:
            flag = json.loads(self._flag(model).read_text())
            if flag.pop("seal", None) not in (None, seal(flag)):  # None: of a store from before there were seals
                return None, "its flag has a wrong seal"
            for name, wanted in flag["checksums"].items():
                if len(self.rows[name]) <= model:
                    return None, f"{name}.npy is truncated or unreadable"
                if checksum(self.rows[name].read()[model]) != wanted:
                    return None, f"{name}.npy has a wrong checksum"
            return flag, None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return None, f"its flag is unreadable: {error}"

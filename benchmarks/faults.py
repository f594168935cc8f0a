"""`make faults`: kill a study, fill its disk, damage its store. Does the next run end as if nothing had happened?

Each case is judged by what it leaves behind:

    same result   every array of the store and results.csv hold the same bytes as after an undisturbed run
    clear error   one line `error: ...` that names a parameter or the notebook, and no traceback
    neither       anything else: a fault of ours

The table (COLUMNS) is printed and written to outputs/faults.csv. `python -m benchmarks.faults 50 10` makes 50 kills, 10
of the real command with a notebook and 40 of `small`. `small` runs in processes forked from one that has imported all.
tests/benchmarks/test_faults.py calls the same functions with fewer cases.
"""

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import date
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nbformat
import numpy as np
import pandas as pd
import psutil
import torch

from benchmarks.bench import machine
from lib.attacks import catalogue, intervals
from lib.study import settings
from lib.study.results import Results
from lib.training import store

COLUMNS = ["fault", "cases", "same_result", "clear_error", "neither", "note", "date", "command", "machine"]
GIVEN = {"preset": "tiny", "n_models": 32, "epochs": 4, "n_examples": 200, "device": "cpu"}
PHASES = ("training", "writing", "attacking", "recording")  # of `small`
PATIENCE = 120  # seconds that a run of `small`, which takes one or two, may take
ARRAYS = ("logits", "test_logits", "member", "history", "weights")
CLEAR = re.compile(rf"error: ((.*\b)?({'|'.join(settings.Parameters.model_fields)})=|\d\d_\w+ failed, see )")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with one thread can be forked
# `python -m` imports this module twice; a killed process leaves semaphores behind
os.environ.setdefault("PYTHONWARNINGS", "ignore::RuntimeWarning:runpy,ignore:resource_tracker:UserWarning")
FORK = get_context("forkserver")
FORK.set_forkserver_preload(["benchmarks.faults", "lib.study.experiments", "sklearn.datasets"])


class Case(NamedTuple):
    """One disturbed run: the fault, how it ended (same_result, clear_error, neither), and in which phase or how."""

    fault: str
    outcome: str
    note: str = ""


# ---- the smallest study, and the process that runs it -------------------------------------------------------


def tell(phase):
    """Report the phase to the process that watches this one, if there is one."""
    if tell.mouth:
        tell.mouth.send(phase)


tell.mouth = None


def small(folder):
    """A study in small: two optimizers trained into folder/store, attacked, recorded in folder/out/results.csv."""
    tell("training")
    run = settings.open_run({**GIVEN, "store": f"{folder}/store", "out": f"{folder}/out"})
    ensembles = run.ensembles("main")
    tell("attacking")
    member = np.array(ensembles["sgd"].member)
    scored = {n: catalogue.run(e.logits, e.dataset.y, member, learned=False) for n, e in ensembles.items()}
    tables = [intervals.table({n: s[a] for n, s in scored.items()}, member).assign(attack=a) for a in scored["sgd"]]
    tell("recording")
    Results("00_small", run).add(pd.concat(tables))


def only_train(folder):
    """The first half of `small`."""
    run = settings.open_run({**GIVEN, "store": f"{folder}/store", "out": f"{folder}/out"})
    run.ensembles("main")


def report_writing():
    """Have every save of a model reported."""
    save = store.Store.save

    def saving(self, *args, **notes):
        tell("writing")
        save(self, *args, **notes)
        tell("training")

    store.Store.save = saving


def life(task, folder, mouth, said):
    """The main function of a forked process: task(folder). Like a command line, it ends on bad input with one line and
    status 2."""
    os.setsid()
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    tell.mouth = mouth
    report_writing()
    try:
        task(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def start(task, folder, name="run"):
    """Fork a process that does task(folder): a namespace of process, ear (a pipe with its phases) and said (a file)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    ear, mouth = FORK.Pipe(duplex=False)
    said = Path(folder) / f"{name}.err"
    process = FORK.Process(target=life, args=(task, str(folder), mouth, str(said)), daemon=True)
    process.start()
    mouth.close()
    return SimpleNamespace(process=process, ear=ear, said=said)


def phases(child):
    """[(seconds, phase)] as a process reports them, up to its end. If it hangs it is killed: no valid result."""
    found, until = [], time.perf_counter() + PATIENCE
    with suppress(EOFError, ProcessLookupError):
        while child.ear.poll(max(0, until - time.perf_counter())):
            found.append((child.ear.recv(), time.perf_counter())[::-1])
        os.killpg(child.process.pid, signal.SIGKILL)
    return [*found, (time.perf_counter(), "end")]


def ended(child):
    """(exit status, what it said on stderr) of a process, once it has ended."""
    phases(child)
    child.process.join()
    return child.process.exitcode, child.said.read_text() if child.said.exists() else ""


def once(task, folder, name="run"):
    """Run a task to its end in a process of its own: (exit status, stderr)."""
    return ended(start(task, folder, name))


# ---- the judgement ------------------------------------------------------------------------------------------


def fingerprint(folder):
    """{file: its content} of what must not differ between runs: the store's arrays, results.csv without times."""
    folder = Path(folder)
    arrays = sorted(folder.glob("store/*-*/*.npy"))
    found = {str(p.relative_to(folder)): blake2b(p.read_bytes(), digest_size=8).hexdigest() for p in arrays}
    results = folder / "out" / "results.csv"
    if results.exists():
        frame = pd.read_csv(results, dtype=str, keep_default_na=False)
        found["results.csv"] = frame.drop(columns="seconds", errors="ignore").to_csv(index=False)
    return found


def judged(fault, folder, reference, status, said, note=""):
    """The Case of a run that ended with this status and stderr in this folder. Of neither, the note says why."""
    if status == 0:
        left = fingerprint(folder)
        differ = sorted(name for name in reference if left.get(name) != reference[name])
        return Case(fault, "neither" if differ else "same_result", f"differ: {differ}" if differ else note)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if len(errors) == 1 and CLEAR.match(errors[0]) and "Traceback" not in said:
        return Case(fault, "clear_error", note)
    return Case(fault, "neither", f"status {status}: {said[-300:]}")


def again(fault, folder, reference, note=""):
    """The same command again, after the fault, and its Case."""
    return judged(fault, folder, reference, *once(small, folder, "again"), note)


# ---- kill -9 ------------------------------------------------------------------------------------------------


def moment(times, phase, rng):
    """A random moment in a phase of an undisturbed run: (how many reports come before it, seconds after the last)."""
    spans = [(k, end - begin) for k, ((begin, p), (end, _)) in enumerate(pairwise(times)) if p == phase]
    lengths = np.array([span for _, span in spans])
    index, span = spans[rng.choice(len(spans), p=lengths / lengths.sum())]
    return index + 1, rng.uniform(0, span)


def kill(child, reports, seconds):
    """kill -9 a process and its group, some seconds after some reports: the phase it was in, "" if it had ended."""
    phase = ""
    with suppress(EOFError):
        for _ in range(reports):
            phase = child.ear.recv()
        until = time.perf_counter() + seconds
        while child.ear.poll(max(0, until - time.perf_counter())):
            phase = child.ear.recv()
        os.killpg(child.process.pid, signal.SIGKILL)
    heard = phases(child)[:-1]  # said before it died
    child.process.join()
    return (heard[-1][1] if heard else phase) if child.process.exitcode == -signal.SIGKILL else ""


def kills(root, n, reference, times, seed=0):
    """n kills of `small`, in every phase, each followed by an undisturbed run: Cases whose note is the phase."""
    rng, cases = np.random.default_rng(seed), []
    for k in range(3 * n):  # a kill that comes too late does not count
        if len(cases) == n:
            break
        folder = Path(root) / f"kill{k}"
        phase = kill(start(small, folder), *moment(times, PHASES[k % len(PHASES)], rng))
        if phase:
            cases.append(again("kill -9", folder, reference, phase))
        shutil.rmtree(folder)
    return cases


# ---- disks --------------------------------------------------------------------------------------------------


def own_mounts():
    """True if this process got a private table of file systems, seen by no other process (Linux, mostly as root)."""
    if not sys.platform.startswith("linux"):
        return False
    libc, new_mounts, new_user = ctypes.CDLL(None), 0x20000, 0x10000000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts) == 0:
        return mount("--make-rprivate", "/")
    if libc.unshare(new_mounts | new_user):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    return mount("--make-rprivate", "/")


def mount(*words):
    """True if `mount` did it."""
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


def at(phase, count, act):
    """A listener to the reports of `small`, which calls act() at the count-th report of a phase."""
    left = iter([False] * (count - 1) + [True])
    return SimpleNamespace(send=lambda heard: act() if heard == phase and next(left, False) else None)


def fill(disk, spare):
    """Fill a disk with a file until only `spare` kilobytes are free."""
    with open(Path(disk) / "ballast", "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - 1024 * spare)))


def limit(kilobytes):
    """Limit the size of every file to some kilobytes; -1: no limit. Used where no disk can be mounted."""
    most = 1024 * kilobytes if kilobytes >= 0 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full_then_freed(folder, phase, count, spare):
    """`small` on a disk that fills up at the count-th report of a phase, then once more after it was freed.

    stderr is that of the first run. Ends with status 3, or 4 if a limit on the size of files stood in for a disk.
    """
    disk = Path(folder) / "disk"
    disk.mkdir()
    real = own_mounts() and mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk))
    tell.mouth = at(phase, count, partial(fill, disk, spare) if real else partial(limit, spare))
    try:
        small(disk)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    tell.mouth = None
    limit(-1)
    (disk / "ballast").unlink(missing_ok=True)
    small(disk)
    shutil.copytree(disk, Path(folder) / "freed")  # out of the mount, which ends with this process
    sys.exit(3 if real else 4)


# when the disk fills: phase, which of its reports, kilobytes left
FULL = (("training", 1, 100), ("writing", 1, 20), ("writing", 9, 0), ("writing", 40, 4), ("recording", 1, 0))


def full_disks(root, reference, moments=FULL):
    """A disk that fills at each of these moments. Two Cases each: the run in which it filled, and the next run."""
    cases, how = [], {3: "tmpfs", 4: "limit on file size"}
    for phase, count, spare in moments:
        folder = Path(root) / f"full {phase} {count}"
        status, said = once(partial(full_then_freed, phase=phase, count=count, spare=spare), folder)
        note = f"{how[status]}, while {phase}" if status in how else ""
        cases.append(judged("full disk", folder, reference, 2 if note else status, said, note))
        if note:
            cases.append(judged("full disk, freed", folder / "freed", reference, 0, "", note))
    return cases


def read_only(folder, begun=True):
    """`small` on a read-only store, in which some models were trained before (begun), or none."""
    place = Path(folder) / "store"
    place.mkdir(parents=True, exist_ok=True)
    if begun:
        save, store.Store.save = store.Store.save, stopping(store.Store.save, 5)
        with suppress(InterruptedError):
            only_train(folder)
        store.Store.save = save
    if own_mounts():
        done = mount("--bind", str(place), str(place)) and mount("-o", "remount,ro,bind", str(place))
    else:
        done = os.getuid() != 0 and not subprocess.run(["chmod", "-R", "a-w", str(place)]).returncode
    try:
        small(folder) if done else sys.exit(5)
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(place)], capture_output=True)


def stopping(save, count):
    """A save that is interrupted after so many models."""
    left = iter(range(count))

    def limited(*args, **notes):
        if next(left, None) is None:
            raise InterruptedError
        save(*args, **notes)

    return limited


def read_only_stores(root, reference, kinds=(False, True)):
    """Read-only stores, new and begun. Two Cases each: a run on it, and the next run, when it is writable again."""
    cases = []
    for begun in kinds:
        folder = Path(root) / f"readonly{begun}"
        status, said = once(partial(read_only, begun=begun), folder)
        if status == 5:
            continue  # root without the right to mount can write anywhere
        note = "begun" if begun else "new"
        cases.append(judged("read-only store", folder, reference, status, said, note))
        cases.append(again("read-only store, writable again", folder, reference, note))
    return cases


# ---- damage -------------------------------------------------------------------------------------------------


def finished(root, whole, name):
    """A copy of a finished run's folder, and its stores' folders."""
    folder = Path(root) / name
    shutil.copytree(whole, folder)
    return folder, sorted(folder.glob("store/*-*"))


def truncated(path, rng):
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def flipped(path, rng, limit=None):
    """Flip one bit of the file, among its first `limit` bytes."""
    content = bytearray(path.read_bytes())
    content[rng.integers(limit or len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def header_flipped(path, rng):
    flipped(path, rng, limit=128)


def arrays(root, whole, reference, n, rng, damages=(truncated, flipped, header_flipped)):
    """n copies of a finished run, each with one array damaged in one way, then run again."""
    cases = []
    for k in range(n):
        damage, name = damages[k % len(damages)], ARRAYS[k // len(damages) % len(ARRAYS)]
        folder, stores = finished(root, whole, f"{damage.__name__}{k}")
        damage(stores[rng.integers(len(stores))] / f"{name}.npy", rng)
        cases.append(again(f"array {damage.__name__.replace('_', ' ')}", folder, reference, name))
        shutil.rmtree(folder)
    return cases


FLAGS = {
    "empty": lambda text: b"",
    "cut": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: b"\xff\xfe" + text,
    "a list": lambda text: b"[]",
    "another checksum": lambda text: text.replace(b'": "', b'": "0', 2),
    "no checksums": lambda text: json.dumps({**json.loads(text), "checksums": {}}).encode(),
    "no status": lambda text: text.replace(b'"status"', b'"statvs"'),
    "status unknown": lambda text: text.replace(b'"finished"', b'"finithed"'),
    "of another model": lambda text: text.replace(b'"model": 5', b'"model": 7'),
}


def flags(root, whole, reference, names=tuple(FLAGS), file="done/00005.json", fault="flag damaged"):
    """A flag of a finished run, or another JSON file of its store, damaged in every way of FLAGS, then run again."""
    cases = []
    for name in names:
        folder, stores = finished(root, whole, f"{fault} {name}")
        path = stores[0] / file
        path.write_bytes(FLAGS[name](path.read_bytes()))
        cases.append(again(fault, folder, reference, name))
        shutil.rmtree(folder)
    return cases


# ---- clocks -------------------------------------------------------------------------------------------------


def mad_clock(folder):
    """`small` under a clock that jumps back and forth by up to sixty years at every look."""
    true, rng = time.time, np.random.default_rng(0)
    time.time = lambda: true() + rng.uniform(-2e9, 2e9)
    small(folder)


def aged(folder, stamp):
    """Set the times of all files below a folder."""
    for path in Path(folder).rglob("*"):
        os.utime(path, (stamp, stamp))


def clocks(root, reference, times, stamps=(("1970", 1), ("2100", 4102444800)), seed=0):
    """A clock that jumps during a run; and, after a kill, files dated 1970 and 2100 in the store of the next run."""
    cases, rng = [], np.random.default_rng(seed)
    folder = Path(root) / "mad"
    cases.append(judged("clock changed", folder, reference, *once(mad_clock, folder), "while it ran"))
    for year, stamp in stamps:
        folder = Path(root) / f"aged{year}"
        kill(start(small, folder), *moment(times, "training", rng))
        aged(folder, stamp)
        cases.append(again("clock changed", folder, reference, f"files from {year}"))
    return cases


# ---- several processes --------------------------------------------------------------------------------------


def two_writers(root, reference, n):
    """Two processes at once on one empty store, n times: each must end as if it had been alone."""
    cases = []
    for k in range(n):
        folder = Path(root) / f"two{k}"
        children = [start(small, folder, name) for name in ("first", "second")]
        for child in children:
            cases.append(judged("two writers", folder, reference, *ended(child)))
    return cases


def lost_workers(root, reference, times, n, seed=0):
    """One of two processes that share a store is killed while it trains, n times: the other must finish alone."""
    cases, rng = [], np.random.default_rng(seed)
    for k in range(n):
        folder = Path(root) / f"lost{k}"
        lost, other = (start(small, folder, name) for name in ("lost", "other"))
        first = times[1][0] - times[0][0]  # of the reports: training, then writing and training by turns
        when = (1, first * rng.uniform(0.5, 1.2)) if k % 2 else (2 + int(rng.integers(12)), 0)
        phase = kill(lost, *when)
        cases.append(judged("worker lost", folder, reference, *ended(other), phase or "too late"))
    return cases


# ---- the real command: notebook 01 by papermill ------------------------------------------------------------


def command(folder, n_models=8, n_examples=120, epochs=2):
    """Start `python -m lib.study` on notebook 01 in a session of its own: (Popen, its stderr's file)."""
    words = ["PRESET=tiny", f"N_MODELS={n_models}", f"N_EXAMPLES={n_examples}", f"EPOCHS={epochs}", "DEVICE=cpu"]
    words += [f"STORE={folder}/store", f"OUT={folder}/out", "01"]
    said = Path(folder) / "study.err"
    said.parent.mkdir(parents=True, exist_ok=True)
    with open(said, "w") as err, open(os.devnull, "w") as out:
        how = {"cwd": settings.ROOT, "stdout": out, "stderr": err, "start_new_session": True}
        return subprocess.Popen([sys.executable, "-m", "lib.study", *words], **how), said


def complete(folder):
    """The real command, undisturbed: (exit status, stderr). If it hangs it is killed: not a valid result."""
    process, said = command(folder)
    with suppress(subprocess.TimeoutExpired):
        return process.wait(10 * PATIENCE), said.read_text()
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait(), said.read_text()


def cells_done(folder):
    """How many cells of the copy of notebook 01 have run, and the source of the running cell ("" if none)."""
    try:
        (path,) = Path(folder, "out").glob("01_*.ipynb")
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    except (ValueError, OSError, nbformat.ValidationError):
        return 0, ""
    states = [c.metadata.get("papermill", {}).get("status") for c in cells]
    at_work = [c.source for c, state in zip(cells, states, strict=True) if state == "running"]
    return states.count("completed"), at_work[0] if at_work else ""


def phase_of(source, done):
    """What a notebook was doing: training, attacking (any other cell), or nothing (papermill, between two cells)."""
    if not source:
        return f"papermill {'between cells' if done else 'before the first cell'}"
    return "training in a notebook" if "run.ensembles(" in source else "attacking in a notebook"


def reached(folder, cells, part):
    """True once that many cells have run and the running cell contains `part`."""
    done, source = cells_done(folder)
    return done >= cells and part in source


def kill_command(folder, cells, seconds, part="", kernel=False):
    """Start the real command and kill -9 it: (exit status, stderr, phase).

    The kill comes some seconds after a number of cells have run, in a cell that contains `part`. It hits all processes
    of the command, or only its kernel.
    """
    process, said = command(folder)
    while process.poll() is None and not reached(folder, cells, part):
        time.sleep(0.05)
    time.sleep(seconds)
    done, source = cells_done(folder)
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        for one in [p for p in below if not kernel or "ipykernel_launcher" in " ".join(p.cmdline())]:
            one.kill()
    if not kernel:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait(), said.read_text(), phase_of(source, done)


def studies(root, n, reference, chain=5, seed=0):
    """n kills of the real command, up to `chain` of them one after the other in a folder; then it may end."""
    rng, cases = np.random.default_rng(seed), []
    for first in range(0, n, chain):
        folder, seen = Path(root) / f"study{first}", []
        for k in range(first, min(n, first + chain)):
            cells = [0, *rng.permutation(np.arange(1, reference["cells"]))][k % chain]
            part = "run.ensembles(" if k % chain == 1 else ""  # one in each folder while it trains
            status, _, phase = kill_command(folder, 0 if part else int(cells), rng.uniform(0, 1 if part else 3), part)
            seen += [phase] * (status == -signal.SIGKILL)
        status, said = complete(folder)
        cases += [judged("kill -9", folder, reference["files"], status, said, phase) for phase in seen]
    return cases


def kernels(root, n, reference, seed=0):
    """n deaths of the kernel within a notebook. Two Cases each: the run that lost its kernel, and the next run."""
    rng, cases = np.random.default_rng(seed), []
    for k in range(n):
        folder = Path(root) / f"kernel{k}"
        part = "" if k % 2 else "run.ensembles("
        cells = 0 if part else int(rng.integers(1, reference["cells"] // 2))
        status, said, phase = kill_command(folder, cells, rng.uniform(0, 1), part, kernel=True)
        cases.append(judged("kernel dies", folder, reference["files"], status, said, phase))
        cases.append(judged("kernel dies, next run", folder, reference["files"], *complete(folder)))
    return cases


# ---- the table ----------------------------------------------------------------------------------------------


def undisturbed(root):
    """(folder, fingerprint, [(seconds, phase)]) of a run of `small` that nothing disturbs."""
    folder = Path(root) / "whole"
    child = start(small, folder)
    times = phases(child)
    child.process.join()
    if child.process.exitcode:
        raise RuntimeError(f"the undisturbed run failed: {child.said.read_text()[-2000:]}")
    return folder, fingerprint(folder), times


def undisturbed_command(root):
    """{files: fingerprint, cells: number of code cells} of the real command that nothing disturbs."""
    folder = Path(root) / "study"
    status, said = complete(folder)
    if status:
        raise RuntimeError(f"the undisturbed study failed: {said[-2000:]}")
    return {"files": fingerprint(folder), "cells": cells_done(folder)[0]}


def table(cases):
    """Cases as a frame of COLUMNS, a row for each fault. The note counts the phases, and says why a case is neither."""
    rows = []
    for fault in dict.fromkeys(case.fault for case in cases):
        some = [case for case in cases if case.fault == fault]
        counts = Counter(case.outcome for case in some)
        notes = Counter(case.note for case in some if case.note)
        note = ", ".join(f"{name}: {count}" for name, count in sorted(notes.items()))
        rows.append((fault, len(some), counts["same_result"], counts["clear_error"], counts["neither"], note))
    return pd.DataFrame(rows, columns=COLUMNS[:6])


def parts(root, n_kills, n_studies):
    """All the faults, fault by fault: lists of Cases."""
    whole, reference, times = undisturbed(root)
    rng = np.random.default_rng(1)
    yield kills(root, n_kills, reference, times)
    yield full_disks(root, reference)
    yield read_only_stores(root, reference)
    yield arrays(root, whole, reference, 3 * len(ARRAYS), rng)
    yield flags(root, whole, reference)
    yield flags(root, whole, reference, ("empty", "no JSON", "a list"), "recipe.json", "recipe.json damaged")
    yield clocks(root, reference, times)
    yield two_writers(root, reference, 3)
    yield lost_workers(root, reference, times, 4)
    if n_studies:
        reference = undisturbed_command(root)
        yield studies(root, n_studies, reference)
        yield kernels(root, 2, reference)


def main(n=50, n_studies=10):
    """Try all faults; print and write the table row by row. Returns 1 if any case was neither, else 0."""
    n, n_studies = int(n), int(n_studies)
    path, cases = settings.ROOT / "outputs" / "faults.csv", []
    path.parent.mkdir(exist_ok=True)
    about = {"date": date.today().isoformat(), "command": "make faults", "machine": machine()}
    with tempfile.TemporaryDirectory() as root:
        for some in parts(root, n - n_studies, n_studies):
            cases += some
            made = table(cases).assign(**about)
            made.to_csv(path, index=False)
            print(table(some).to_string(index=False, header=len(cases) == len(some)), flush=True)
    print(f"{len(cases)} cases, {made.neither.sum()} neither. Written to {path.relative_to(settings.ROOT)}")
    return int(made.neither.sum() > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

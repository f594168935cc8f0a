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
from contextlib import suppress
from datetime import date
from functools import partial
from hashlib import blake2b
from itertools import islice, pairwise
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

OUTCOMES = ["same_result", "clear_error", "neither"]
COLUMNS = ["fault", "cases", *OUTCOMES, "note", "date", "command", "machine"]
GIVEN = {"preset": "tiny", "n_models": 32, "epochs": 4, "n_examples": 200, "device": "cpu"}
PHASES = ("training", "writing", "attacking", "recording")  # of `small`
PATIENCE = 120  # seconds that a run of `small`, which takes one or two, may take
TRAINS = "run.ensembles("  # stands in the cell of the notebook that trains
ARRAYS = ("logits", "test_logits", "member", "history", "weights")
CLEAR = re.compile(rf"error: ((.*\b)?({'|'.join(settings.Parameters.model_fields)})=|\d\d_\w+ failed, see )")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with one thread can be forked
# `python -m` imports this module twice; a killed process leaves semaphores behind
os.environ.setdefault("PYTHONWARNINGS", "ignore::RuntimeWarning:runpy,ignore:resource_tracker:UserWarning")
FORK = get_context("forkserver")
FORK.set_forkserver_preload(["benchmarks.faults", "lib.study.experiments", "sklearn.datasets"])


class Case(NamedTuple):
    """One disturbed run: the fault, how it ended (one of OUTCOMES), and in which phase, how, or why it is neither."""

    fault: str
    outcome: str
    note: str = ""


class Reference(NamedTuple):
    """The undisturbed run of `small`, and where the disturbed ones get their folders."""

    root: Path
    whole: Path  # its folder
    files: dict  # its fingerprint
    times: list  # [(seconds, phase)], the last one is "end"


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
    scored = {n: catalogue.run(e.logits, e.dataset.y, member) for n, e in ensembles.items()}
    tables = [intervals.table({n: s[a] for n, s in scored.items()}, member).assign(attack=a) for a in scored["sgd"]]
    tell("recording")
    Results("00_small", run).add(pd.concat(tables))


def life(task, folder, mouth, said):
    """The main function of a forked process: task(folder), with every save of a model reported. Like a command line,
    it ends on bad input with one line and status 2."""
    os.setsid()
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    tell.mouth, save = mouth, store.Store.save

    def saving(self, *args, **notes):
        tell("writing")
        save(self, *args, **notes)
        tell("training")

    store.Store.save = saving
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


def judged(fault, folder, files, status, said, note=""):
    """The Case of a run that ended with this status and stderr in this folder. files: the undisturbed fingerprint."""
    if status == 0:
        left = fingerprint(folder)
        differ = sorted(name for name in files if left.get(name) != files[name])
        return Case(fault, "neither" if differ else "same_result", f"differ: {differ}" if differ else note)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if len(errors) == 1 and CLEAR.match(errors[0]) and "Traceback" not in said:
        return Case(fault, "clear_error", note)
    return Case(fault, "neither", f"status {status}: {said[-300:]}")


def again(fault, folder, ref, note=""):
    """The same command again, after the fault, and its Case."""
    return judged(fault, folder, ref.files, *ended(start(small, folder, "again")), note)


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


def kills(ref, n, seed=0):
    """n kills of `small`, in every phase, each followed by an undisturbed run: Cases whose note is the phase."""

    def tried():
        rng = np.random.default_rng(seed)
        for k in range(3 * n):
            folder = ref.root / f"kill{k}"
            phase = kill(start(small, folder), *moment(ref.times, PHASES[k % len(PHASES)], rng))
            if phase:  # a kill that comes too late does not count
                yield again("kill -9", folder, ref, phase)
            shutil.rmtree(folder)

    return islice(tried(), n)


# ---- disks --------------------------------------------------------------------------------------------------


def own_mounts():
    """True if this process got a private table of file systems, seen by no other process (Linux, mostly as root)."""
    if not sys.platform.startswith("linux"):
        return False
    libc, new_mounts, new_user, user, group = ctypes.CDLL(None), 0x20000, 0x10000000, os.getuid(), os.getgid()
    if libc.unshare(new_mounts):
        if libc.unshare(new_mounts | new_user):
            return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    return mount("--make-rprivate", "/")


def mount(*words):
    """True if `mount` did it."""
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


def full_then_freed(folder, phase, count, spare):
    """`small` on a disk that fills up to its last `spare` kilobytes at the count-th report of a phase; then once more,
    after it was freed.

    stderr is that of the first run. Ends with status 3, or 4 if a limit on the size of files stood in for a disk.
    """
    disk, heard = Path(folder) / "disk", []
    disk.mkdir()
    real = own_mounts() and mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk))

    def limit(most):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def hear(said):
        heard.append(said)
        if said == phase and heard.count(phase) == count:
            free = shutil.disk_usage(disk).free - 1024 * spare
            (disk / "ballast").write_bytes(bytes(max(0, free))) if real else limit(1024 * spare)

    tell.mouth = SimpleNamespace(send=hear)
    try:
        small(disk)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    tell.mouth = None
    limit(resource.RLIM_INFINITY)
    (disk / "ballast").unlink(missing_ok=True)
    small(disk)
    shutil.copytree(disk, Path(folder) / "freed")  # out of the mount, which ends with this process
    sys.exit(3 if real else 4)


# when the disk fills: phase, which of its reports, kilobytes left
FULL = (("training", 1, 100), ("writing", 1, 20), ("writing", 9, 0), ("writing", 40, 4), ("recording", 1, 0))


def full_disks(ref, moments=FULL):
    """A disk that fills at each of these moments. Two Cases each: the run in which it filled, and the next run."""
    how = {3: "tmpfs", 4: "limit on file size"}
    for phase, count, spare in moments:
        folder = ref.root / f"full {phase} {count}"
        status, said = ended(start(partial(full_then_freed, phase=phase, count=count, spare=spare), folder))
        note = f"{how[status]}, while {phase}" if status in how else ""
        yield judged("full disk", folder, ref.files, 2 if note else status, said, note)
        if note:
            yield judged("full disk, freed", folder / "freed", ref.files, 0, "", note)


def read_only(folder):
    """`small` on a read-only store. Status 5: root without the right to mount can write anywhere."""
    place = Path(folder) / "store"
    place.mkdir(exist_ok=True)
    if own_mounts():
        done = mount("--bind", str(place), str(place)) and mount("-o", "remount,ro,bind", str(place))
    else:
        done = os.getuid() != 0 and not subprocess.run(["chmod", "-R", "a-w", str(place)]).returncode
    try:
        small(folder) if done else sys.exit(5)
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(place)], capture_output=True)


def read_only_stores(ref, kinds=("new", "begun")):
    """Read-only stores. Two Cases each: a run on it, and the next run, when it is writable again."""
    for kind in kinds:
        folder = ref.root / f"read-only {kind}"
        if kind == "begun":  # the first optimizer's first models are there
            shutil.copytree(ref.whole / "store", folder / "store")
            last, first = stores(folder)
            shutil.rmtree(last)
            [flag.unlink() for flag in sorted(first.glob("done/*"))[5:]]
        status, said = ended(start(read_only, folder))
        if status != 5:
            yield judged("read-only store", folder, ref.files, status, said, kind)
            yield again("read-only store, writable again", folder, ref, kind)


# ---- damage -------------------------------------------------------------------------------------------------


def stores(folder):
    """The folders of a run's two stores: SAM's, then SGD's."""
    return sorted(Path(folder).glob("store/*-*"))


def flipped(content, place, bit):
    """The same bytes, one bit of them flipped."""
    return content[:place] + bytes([content[place] ^ 1 << int(bit)]) + content[place + 1 :]


ARRAY = {
    "truncated": lambda content, rng: content[: rng.integers(len(content))],
    "flipped": lambda content, rng: flipped(content, rng.integers(len(content)), rng.integers(8)),
    "header flipped": lambda content, rng: flipped(content, rng.integers(128), rng.integers(8)),
}
JSON = {
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


def damaged(fault, ref, number, file, change, note):
    """A copy of the finished run in which a file of one store is changed, then run again: its Case."""
    folder = ref.root / f"{fault} {note}"
    shutil.copytree(ref.whole, folder)
    path = stores(folder)[number] / file
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before, f"{fault}, {note}: nothing was damaged"
    case = again(fault, folder, ref, note)
    shutil.rmtree(folder)
    return case


def arrays(ref, names=ARRAYS, seed=1):
    """Each of these arrays, damaged in every way of ARRAY."""
    rng = np.random.default_rng(seed)
    for name in names:
        for how, change in ARRAY.items():
            yield damaged(f"array {how}", ref, rng.integers(2), f"{name}.npy", partial(change, rng=rng), name)


def flags(ref, names=tuple(JSON), file="done/00005.json", fault="flag damaged"):
    """A model's flag, or another JSON file of a store, damaged in these ways of JSON."""
    return (damaged(fault, ref, 0, file, JSON[name], name) for name in names)


# ---- clocks -------------------------------------------------------------------------------------------------


def mad_clock(folder):
    """`small` under a clock that jumps back and forth by up to sixty years at every look."""
    true, rng = time.time, np.random.default_rng(0)
    time.time = lambda: true() + rng.uniform(-2e9, 2e9)
    small(folder)


def clocks(ref, stamps=(("1970", 1), ("2100", 4102444800)), seed=0):
    """A clock that jumps during a run; and, after a kill, files dated 1970 and 2100 in the store of the next run."""
    rng = np.random.default_rng(seed)
    yield judged(
        "clock changed", ref.root / "mad", ref.files, *ended(start(mad_clock, ref.root / "mad")), "while it ran"
    )
    for year, stamp in stamps:
        folder = ref.root / f"aged{year}"
        kill(start(small, folder), *moment(ref.times, "training", rng))
        for path in folder.rglob("*"):
            os.utime(path, (stamp, stamp))
        yield again("clock changed", folder, ref, f"files from {year}")


# ---- several processes --------------------------------------------------------------------------------------


def two_writers(ref, n):
    """Two processes at once on one empty store, n times: each must end as if it had been alone."""
    for k in range(n):
        folder = ref.root / f"two{k}"
        for child in [start(small, folder, name) for name in ("first", "second")]:
            yield judged("two writers", folder, ref.files, *ended(child))


def lost_workers(ref, n, seed=0):
    """One of two processes that share a store is killed while it trains, n times: the other must finish alone."""
    rng = np.random.default_rng(seed)
    first = ref.times[1][0] - ref.times[0][0]  # of the reports: training, then writing and training by turns
    for k in range(n):
        folder = ref.root / f"lost{k}"
        lost, other = (start(small, folder, name) for name in ("lost", "other"))
        when = (1, first * rng.uniform(0.5, 1.2)) if k % 2 else (2 + int(rng.integers(12)), 0)
        phase = kill(lost, *when)
        yield judged("worker lost", folder, ref.files, *ended(other), phase or "too late")


# ---- the real command: notebook 01 by papermill ------------------------------------------------------------


def command(folder):
    """Start `python -m lib.study` on notebook 01 in a session of its own: (Popen, its stderr's file)."""
    words = "PRESET=tiny N_MODELS=8 N_EXAMPLES=120 EPOCHS=2 DEVICE=cpu".split()
    words += [f"STORE={folder}/store", f"OUT={folder}/out", "01"]
    said = Path(folder) / "study.err"
    said.parent.mkdir(parents=True, exist_ok=True)
    with open(said, "w") as err:
        how = {"cwd": settings.ROOT, "stdout": subprocess.DEVNULL, "stderr": err, "start_new_session": True}
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
    return states.count("completed"), "".join(c.source for c, s in zip(cells, states, strict=True) if s == "running")


def kill_command(folder, cells, seconds, part="", kernel=False):
    """Start the real command and kill -9 it: (exit status, stderr, what it was doing).

    The kill comes some seconds after a number of cells have run, in a cell that contains `part`. It hits all processes
    of the command, or only its kernel.
    """
    process, said = command(folder)
    while process.poll() is None:
        done, source = cells_done(folder)
        if done >= cells and part in source:
            break
        time.sleep(0.05)
    time.sleep(seconds)
    done, source = cells_done(folder)
    with suppress(psutil.NoSuchProcess):
        for one in psutil.Process(process.pid).children(recursive=True):
            if not kernel or "ipykernel_launcher" in " ".join(one.cmdline()):
                one.kill()
    if not kernel:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    phase = "training in a notebook" if TRAINS in source else "attacking in a notebook"
    between = f"papermill {'between cells' if done else 'before the first cell'}"
    return process.wait(), said.read_text(), phase if source else between


def studies(root, n, files, n_cells, chain=5, seed=0):
    """n kills of the real command, up to `chain` of them one after the other in a folder; then it may end."""
    rng = np.random.default_rng(seed)
    for first in range(0, n, chain):
        folder, seen = root / f"study{first}", []
        for k in range(first, min(n, first + chain)):
            cells = [0, *rng.permutation(np.arange(1, n_cells))][k % chain]
            part = TRAINS if k % chain == 1 else ""  # one in each folder while it trains
            status, _, phase = kill_command(folder, 0 if part else int(cells), rng.uniform(0, 1 if part else 3), part)
            seen += [phase] * (status == -signal.SIGKILL)
        status, said = complete(folder)
        yield from (judged("kill -9", folder, files, status, said, phase) for phase in seen)


def kernels(root, n, files, n_cells, seed=0):
    """n deaths of the kernel within a notebook. Two Cases each: the run that lost its kernel, and the next run."""
    rng = np.random.default_rng(seed)
    for k in range(n):
        folder = root / f"kernel{k}"
        part, cells = ("", int(rng.integers(1, n_cells // 2))) if k % 2 else (TRAINS, 0)
        status, said, phase = kill_command(folder, cells, rng.uniform(0, 1), part, kernel=True)
        yield judged("kernel dies", folder, files, status, said, phase)
        yield judged("kernel dies, next run", folder, files, *complete(folder))


# ---- the table ----------------------------------------------------------------------------------------------


def undisturbed(root):
    """The Reference of a run of `small` that nothing disturbs."""
    folder = Path(root) / "whole"
    child = start(small, folder)
    times = phases(child)
    child.process.join()
    if child.process.exitcode:
        raise RuntimeError(f"the undisturbed run failed: {child.said.read_text()[-2000:]}")
    return Reference(Path(root), folder, fingerprint(folder), times)


def parts(root, n_kills, n_studies):
    """All the faults, fault by fault: iterables of Cases."""
    ref = undisturbed(root)
    yield kills(ref, n_kills)
    yield full_disks(ref)
    yield read_only_stores(ref)
    yield arrays(ref)
    yield flags(ref)
    yield flags(ref, ("empty", "no JSON", "a list"), "recipe.json", "recipe.json damaged")
    yield clocks(ref)
    yield two_writers(ref, 3)
    yield lost_workers(ref, 4)
    if n_studies:
        folder = ref.root / "study"
        status, said = complete(folder)
        if status:
            raise RuntimeError(f"the undisturbed study failed: {said[-2000:]}")
        alone = fingerprint(folder), cells_done(folder)[0]
        yield studies(ref.root, n_studies, *alone)
        yield kernels(ref.root, 2, *alone)


def table(cases):
    """Cases as a frame of COLUMNS, a row for each fault. The note counts the phases, and says why a case is neither."""
    rows = []
    for fault, some in pd.DataFrame(cases, columns=Case._fields).groupby("fault", sort=False):
        counts, notes = some.outcome.value_counts(), some.note[some.note != ""].value_counts().sort_index()
        note = ", ".join(f"{name}: {count}" for name, count in notes.items())
        rows.append((fault, len(some), *(counts.get(outcome, 0) for outcome in OUTCOMES), note))
    return pd.DataFrame(rows, columns=COLUMNS[:6])


def main(n=50, n_studies=10):
    """Try all faults; print and write the table row by row. Returns 1 if any case was neither, else 0."""
    n, n_studies = int(n), int(n_studies)
    path, cases = settings.ROOT / "outputs" / "faults.csv", []
    path.parent.mkdir(exist_ok=True)
    about = {"date": date.today().isoformat(), "command": "make faults", "machine": machine()}
    with tempfile.TemporaryDirectory() as root:
        for some in map(list, parts(root, n - n_studies, n_studies)):
            cases += some
            made = table(cases).assign(**about)
            made.to_csv(path, index=False)
            print(table(some).to_string(index=False, header=len(cases) == len(some)), flush=True)
    print(f"{len(cases)} cases, {made.neither.sum()} neither. Written to {path.relative_to(settings.ROOT)}")
    return int(made.neither.sum() > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""`make bench`: a dozen speed claims, each measured in this one run beside what it is compared with, in turn.

    make bench                             # all sections
    make bench ONLY=training,gpu           # some, whose rows are replaced
    python -m benchmarks.bench training gpu     # the same; --out: the folder

Rows are written to <out>/bench.csv (COLUMNS) as they are measured, so that a run that is killed loses none. Progress
goes to stderr. Not a test: a machine's speed decides nothing about right or wrong.
"""

import argparse
import operator
import platform
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from benchmarks import cpu, gpu
from benchmarks.cpu import say
from lib.data.dataset import load

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = [
    "name", "value", "unit", "baseline", "ratio", "goal", "limit", "met", "section", "date", "machine", "command",
]  # fmt: skip
# name -> function that yields rows (name, value, unit, baseline, ratio, goal, limit)
SECTIONS = {
    "training": lambda: cpu.training(load("digits")),
    "rules": lambda: cpu.rules(load("digits")),
    "images": lambda: cpu.images(gpu.photographs(2000, 1000)),
    "compiling": lambda: cpu.compiling(load("digits")),
    "scoring": lambda: cpu.fresh(cpu.scoring),
    "influence": lambda: cpu.fresh(cpu.influences),
    "memory": lambda: cpu.fresh(cpu.memory, load("digits")),
    "gpu": gpu.rows,
}


def machine():
    """Processor, threads, accelerator and version in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{names[0]}, {torch.get_num_threads()} threads, {chip}, torch {torch.__version__}"


def met(value, ratio, goal):
    """yes or no: whether the ratio, or the value where there is none, reaches the goal. Empty where nothing says."""
    reached = value if ratio == "" else ratio
    if not goal or isinstance(reached, str):
        return ""
    sign, bound = goal.split()
    return "yes" if {">=": operator.ge, "<=": operator.le}[sign](reached, float(bound)) else "no"


def line(row, section, **noted):
    """A section's row as a dict of COLUMNS; judged before it is rounded."""
    name, value, unit, baseline, ratio, goal, limit = row
    shown = [f"{v:.4g}" if isinstance(v, int | float) else v for v in (value, ratio)]
    entries = [name, shown[0], unit, baseline, shown[1], goal, limit, met(value, ratio, goal), section]
    return dict(zip(COLUMNS, entries, strict=False)) | noted


def read(path):
    """The rows of an earlier run of these sections, as dicts; none if the file is not there or has other columns."""
    if not path.exists():
        return []
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    return table[table.section.isin(list(SECTIONS))].to_dict("records") if [*table] == COLUMNS else []


def run(section, rows, path, **noted):
    """Measure one section's rows and write each as it comes: the section's old rows stay until they are replaced.

    rows: an iterable of a section's rows.
    """
    old, new, order, began = read(path), [], list(SECTIONS), time.perf_counter()

    def write(finished=False):
        again = {(row["name"], row["baseline"]) for row in new}
        kept = [r for r in old if r["section"] != section or not (finished or (r["name"], r["baseline"]) in again)]
        partial = path.with_suffix(".part")
        table = sorted([*kept, *new], key=lambda row: order.index(row["section"]))
        pd.DataFrame(table, columns=COLUMNS).to_csv(partial, index=False)
        partial.replace(path)

    for row in rows:
        new.append(line(row, section, **noted))
        write()
        told = new[-1]
        against = f", {told['ratio']} against {told['baseline']}" if told["ratio"] else ""
        say(f"{time.perf_counter() - began:5.0f} s  {told['name']}: {told['value']} {told['unit']}{against}")
    write(finished=True)


def arguments(argv=None):
    """The parsed command line. Exits, naming what is valid, on an unknown section."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="*", help=f"sections, spaces or commas between them: {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs", help="folder of bench.csv")
    given = parser.parse_args(argv)
    given.only = [name for text in given.only for name in text.split(",") if name]
    for name in given.only:
        if name not in SECTIONS:
            parser.error(f"ONLY={name!r} is no section of the bench: choose among {', '.join(SECTIONS)}")
    return given


def main(argv=None):
    """Run the sections asked for, then print the whole table."""
    given = arguments(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    command = f"make bench{' ONLY=' * bool(given.only)}{','.join(given.only)}"
    path, noted = given.out / "bench.csv", {"date": date.today().isoformat(), "machine": machine(), "command": command}
    for section in SECTIONS:
        if section in given.only or not given.only:
            say(f"{section} ...")
            run(section, SECTIONS[section](), path, **noted)
    print(pd.DataFrame(read(path), columns=COLUMNS)[COLUMNS[:8]].to_string(index=False))
    print(f"{', '.join(noted.values())}\nWritten to {path}")


if __name__ == "__main__":
    main()

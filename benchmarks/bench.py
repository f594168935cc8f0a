"""`make bench`: every speed claim as a ratio, both sides measured in this one run, in turn.

    make bench                             # all sections
    make bench ONLY=training,gpu           # some, whose rows are replaced; gpu: every section gpu_...
    python -m benchmarks.bench training gpu     # the same; --data: CIFAR-10 for the GPU's sections, --out: the folder

Rows are written to <out>/bench.csv (COLUMNS) as they are measured, so that a run that is killed loses none. Progress
goes to stderr. Not a test: a machine's speed decides nothing about right or wrong.
"""

import argparse
import operator
import platform
import sys
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from benchmarks import cpu, gpu, scaling
from benchmarks.cpu import say
from lib.data.dataset import load

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = [
    "name", "value", "unit", "baseline", "ratio", "goal", "met", "section", "date", "machine", "command",
]  # fmt: skip
# name -> function of the parsed arguments that yields rows (name, value, unit, baseline, ratio, goal)
SECTIONS = {
    "memory": lambda given: cpu.fresh(cpu.memory, load("digits")),
    "training": lambda given: cpu.training(load("digits")),
    "variants": lambda given: cpu.variants(load("digits")),
    "scoring": lambda given: cpu.fresh(cpu.scoring),
    "influence": lambda given: cpu.fresh(cpu.influences),
    "scaling": lambda given: scaling.scaling(given.out),
    "gpu_resnet9": lambda given: gpu.gpu("resnet9", given.data),
    "gpu_resnet18": lambda given: gpu.gpu("resnet18", given.data),
}


def machine():
    """Processor, threads, accelerator and version in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{names[0]}, {torch.get_num_threads()} threads, {chip}, torch {torch.__version__}"


def command(given):
    """The line that makes these rows; a path stays on the machine it is from."""
    only = f" ONLY={','.join(given.only)}" if given.only else ""
    return f"make bench{only}{' DATA=path' if given.data else ''}"


def chosen(only):
    """Names of the sections asked for, all if none is: by name, or by what stands before an underscore.

    Raises ValueError naming an unknown one.
    """
    for name in only:
        if name not in {*SECTIONS, *(section.split("_")[0] for section in SECTIONS)}:
            raise ValueError(f"ONLY={name!r} is no section of the bench: choose among {', '.join(SECTIONS)}")
    return [section for section in SECTIONS if not only or {section, section.split("_")[0]} & set(only)]


def met(value, ratio, goal):
    """yes or no: whether the ratio, or the value where there is none, reaches the goal. Empty where nothing says."""
    reached = value if ratio == "" else ratio
    if not goal or isinstance(reached, str):
        return ""
    sign, bound = goal.split()
    return "yes" if {">=": operator.ge, "<=": operator.le}[sign](reached, float(bound)) else "no"


def line(row, section, **noted):
    """A section's row as a dict of COLUMNS; judged before it is rounded."""
    name, value, unit, baseline, ratio, goal = row
    value, shown = (f"{v:.4g}" if isinstance(v, int | float) else v for v in (value, ratio))
    judged = met(row[1], ratio, goal)
    entries = [name, value, unit, baseline, shown, goal, judged, section]
    return dict(zip(COLUMNS, entries, strict=False)) | noted


def merged(old, section, new, finished):
    """The table with a section's new rows in it, sections in their order.

    A row measured again replaces itself; the section's other old rows go when it is finished. old, new: lists of dicts.
    """
    again = {(row["name"], row["baseline"]) for row in new}
    kept = [
        row for row in old if row["section"] != section or not (finished or (row["name"], row["baseline"]) in again)
    ]
    order = list(SECTIONS)
    return sorted([*kept, *new], key=lambda row: order.index(row["section"]))


def read(path):
    """The rows of an earlier run of these sections, as dicts; none if the file is not there or has other columns."""
    if not path.exists():
        return []
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    return table[table.section.isin(list(SECTIONS))].to_dict("records") if [*table] == COLUMNS else []


def write(path, rows):
    """The whole table, in place of the old one at once."""
    partial = path.with_suffix(".part")
    pd.DataFrame(rows, columns=COLUMNS).to_csv(partial, index=False)
    partial.replace(path)


def run(section, rows, path, **noted):
    """Measure one section's rows and write each as it comes. rows: an iterable of a section's rows."""
    old, new, began = read(path), [], time.perf_counter()
    for row in rows:
        new.append(line(row, section, **noted))
        write(path, merged(old, section, new, finished=False))
        told = new[-1]
        against = f", {told['ratio']} against {told['baseline']}" if told["ratio"] else ""
        say(f"{time.perf_counter() - began:5.0f} s  {told['name']}: {told['value']} {told['unit']}{against}")
    write(path, merged(old, section, new, finished=True))


def arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="*", help=f"sections, spaces or commas between them: {', '.join(SECTIONS)}")
    parser.add_argument("--data", help="path of CIFAR-10, for the sections on a GPU; else made-up images")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs", help="folder of bench.csv and its figure")
    given = parser.parse_args(argv)
    given.only = [name for text in given.only for name in text.split(",") if name]
    return given


def main(argv=None):
    """Run the sections asked for, then print the whole table."""
    given = arguments(argv)
    try:
        sections = chosen(given.only)
    except ValueError as error:
        sys.exit(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    path, noted = given.out / "bench.csv", {"machine": machine(), "command": command(given)}
    for section in sections:
        say(f"{section} ...")
        run(section, SECTIONS[section](given), path, date=date.today().isoformat(), **noted)
    table = pd.DataFrame(read(path), columns=COLUMNS)
    print(table[COLUMNS[: COLUMNS.index("section")]].to_string(index=False))
    print(f"{date.today()}, {machine()}, {command(given)}\nWritten to {path}")


if __name__ == "__main__":
    main()

"""command_line"""

import argparse
import base64
import io
import json
import sys
import time
from pathlib import Path

from PIL import Image

from lib.study.settings import PARAMETERS, ROOT, clean, settings
from lib.training.store import write_atomic

# the verdict judges what all the others recorded: it comes last
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"), key=lambda p: ("verdict" in p.stem, p.stem))


# ---- running the notebooks headlessly -----------------------------------------------------------------------


def parse(arguments):
    """(notebooks, parameters, what to do with them) of a command line: --name value, or NAME=value as make has them.

    What to do: "run" them, or only "plan" or "work"."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.study",
        description="Run the notebooks headlessly, in order, into one folder of results.",
        allow_abbrev=False,
        epilog="A parameter may also be written as make writes it: DATASET=cifar10.",
    )
    for name, (kind, meaning) in PARAMETERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name, metavar=kind.__name__, help=meaning)
    parser.add_argument("--plan", action="store_true", help="say what is left to train and what it costs")
    parser.add_argument("--work", action="store_true", help="train what is left, beside other processes; no notebooks")
    parser.add_argument("words", nargs="*", metavar="notebook", help="which notebooks, such as 01 (default: all)")
    found = vars(parser.parse_args(arguments))
    words, doing = found.pop("words"), [name for name in ("plan", "work") if found.pop(name)]
    if len(doing) > 1:
        raise ValueError("--plan and --work exclude each other: choose one")
    given = {name: value for name, value in found.items() if value is not None}
    given |= {w.split("=", 1)[0].lower(): w.split("=", 1)[1] for w in words if "=" in w}
    wanted = [w for w in words if "=" not in w]
    for word in wanted:
        if not any(book.name.startswith(word) for book in NOTEBOOKS):
            raise ValueError(f"notebook {word!r} is unknown: choose from {', '.join(b.stem for b in NOTEBOOKS)}")
    books = [b for b in NOTEBOOKS if not wanted or any(b.name.startswith(w) for w in wanted)]
    return books, given, (doing or ["run"])[0]


def shortest(path):
    """The path as seen from here, where the kernel will start too; absolute if it lies elsewhere."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def smaller(png):
    """A PNG (base64) with a palette of 256 colours: a figure loses nothing that is seen, and half its size."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(file := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def execute(book, given, out):
    """Run one notebook with papermill; what the kernel prints comes here, its progress bars not into the copy."""
    import papermill

    print(f"{book.stem} -> {out}", flush=True)
    streams = {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
    done = papermill.execute_notebook(book, out / book.name, parameters=given, kernel_name="python3", **streams)
    for cell in done.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" or not o.text.startswith("\r")]
    for path in ("input_path", "output_path"):
        done.metadata.papermill.pop(path, None)  # the copy may travel
    papermill.iorw.write_ipynb(done, str(out / book.name))


def main(arguments=None):
    """Command line. Returns the exit status: 2 for bad input, 1 for a notebook that failed."""
    from lib.study import experiments

    try:
        chosen, given, doing = parse(arguments)
        run = settings(given)
        numbers = [book.name[:2] for book in chosen]
        if doing == "plan":
            print(experiments.describe(run, numbers))
            return 0
        experiments.check_disk(run, numbers)
        if doing == "work":
            experiments.work_off(run, numbers)
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    to_do, total = experiments.left(run, numbers)
    status = execute_all(chosen, {**clean(given), "store": shortest(run.store), "out": shortest(run.out)})
    seconds = round(time.monotonic() - run.began)
    # what this took, and which share of its training the store did not have
    took = {"notebooks": numbers, "n_models": run.n_models, "seconds": seconds, "trained": to_do / (total or 1)}
    return status or concluded(run, took)


def concluded(run, took):
    """Write run.json and the report of a run that went through. Returns the exit status."""
    from lib.study import report

    try:
        write_atomic(Path(run.out) / "run.json", json.dumps(took))
        page = shortest(report.build(run.out))
    except OSError as error:
        print(f"error: out={run.out!r} can't be written ({error}): give a writable folder", file=sys.stderr)
        return 1
    print(f"Done. Look at {page} (open in a browser), results.csv, figures/ and the notebooks beside it")
    return 0


def execute_all(chosen, given):
    """Run the notebooks in turn. Returns the exit status."""
    out = Path(given["out"])
    for book in chosen:
        try:
            execute(book, given, out)
        except Exception as error:  # the notebook's own, or the kernel's death: what it did so far is kept in `out`
            said = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
            print(f"error: {book.stem} failed, see {out / book.name}: {said}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Commit a run: `python -m tools.reference outputs/digits [more]` copies it into outputs/reference.

The copies of the notebooks become smaller and may travel: pictures of 48 colours, no times, no paths.
"""

import base64
import io
import re
import shutil
import sys
from pathlib import Path

import nbformat
from PIL import Image

from lib.study.settings import ROOT

TABLES = "memorization.csv results.csv run.json settings.json verdict.csv".split()


def small(picture):
    """A PNG in base64 with 48 colours: it looks the same, in half the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image = image.quantize(48, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)  # median cut merged blue and green
    image.save(file := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def cleaned(book, name):
    """An executed notebook without times and paths; `name` is the run's."""
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])
            if "text/markdown" in output.get("data", {}):  # commands that name folders of this machine
                said = output.data["text/markdown"]
                said = re.sub(r"--(data|scores|store) /[^\s`]+", r"--\1 \1", said)
                output.data["text/markdown"] = re.sub(r"--out /[^\s`]+", f"--out outputs/{name}", said)
        cell.metadata = {"tags": cell.metadata.get("tags", [])}
        if "injected-parameters" in cell.metadata.get("tags", []):
            given = {"store": "store", "out": f"outputs/{name}", "data": "data", "scores": "scores"}
            lines = [line.split(" = ") for line in cell.source.splitlines()]
            cell.source = "\n".join(
                f'{key} = "{given[key]}"' if key in given else " = ".join([key, *value]) for key, *value in lines
            )
    book.metadata.pop("papermill", None)
    return book


def main(folders):
    """Copy the runs in these folders."""
    for folder in map(Path, folders):
        to = ROOT / "outputs" / "reference" / folder.name
        to.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            if (folder / name).exists():
                shutil.copy(folder / name, to / name)
        for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
            nbformat.write(cleaned(nbformat.read(path, 4), folder.name), to / path.name)


if __name__ == "__main__":
    main(sys.argv[1:])

import json
import shlex
import shutil
import subprocess
from concurrent.futures import CancelledError, Future
from threading import Timer, get_ident
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from lib.study import command_line, experiments, report, settings

SMALL = ["PRESET=tiny", "N_MODELS=8", "N_EXAMPLES=100", "EPOCHS=2"]


def words(tmp_path, *more):
    return [*SMALL, f"STORE={tmp_path / 'store'}", f"OUT={tmp_path / 'out'}", *more]


@pytest.mark.parametrize("words", [["N_MODEL=16"], ["N_MODELS=sixteen"], ["99"], ["01", "77"], ["DATASET=mnist"]])
def test_it_refuses_with_one_line_and_status_2(words, capsys):
    assert command_line.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_notebooks_are_chosen_by_their_numbers_and_the_verdict_comes_last():
    assert [book.name[:2] for book in command_line.chosen(["03", "01"])] == ["01", "03"]
    assert command_line.chosen([])[-1].stem == "07_verdict"


def test_make_passes_an_unknown_knob_on_so_that_it_fails():
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "study",
        "N_MODEL=16",
        "OPTIMIZERS=sgd,looksam(k=5, alpha=0.7)",
        "PYTHON=x",
    ]
    said = subprocess.run(command, cwd=settings.ROOT, capture_output=True, text=True)
    words = shlex.split(said.stdout.partition("-m lib.study")[2])
    assert sorted(words) == ["N_MODEL=16", "OPTIMIZERS=sgd,looksam(k=5, alpha=0.7)"]


def test_the_plan_is_said_and_nothing_is_trained(tmp_path, capsys):
    assert command_line.main(["--plan", *words(tmp_path, "03")]) == 0
    said = capsys.readouterr().out
    assert "16 of 16 models" in said and "disk" in said and "trial" in said
    assert not list((tmp_path / "store").glob("*/done/*.json"))


def test_a_notebook_that_trains_nothing_has_an_empty_plan(tmp_path, capsys):
    assert command_line.main(["--plan", *words(tmp_path, "07")]) == 0
    assert command_line.main(["--work", *words(tmp_path, "07")]) == 0
    assert "0 of 0 models" in capsys.readouterr().out


def test_a_run_that_will_not_fit_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    assert command_line.main(words(tmp_path, "03")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: store=") and "MB free" in said and said.count("\n") == 1
    assert not list((tmp_path / "store").glob("*/done/*.json"))


def notebook(tmp_path, name, *sources):
    """A notebook with a cell of parameters and cells with these sources."""
    cells = [nbformat.v4.new_code_cell(text) for text in ("# Parameters\npreset = 'tiny'", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / name)
    return tmp_path / name


def test_notebooks_get_all_parameters_and_this_interpreter(tmp_path, monkeypatch, capfd):
    """Also if the kernel spec that Jupyter finds first is another interpreter's, and in a path with braces."""
    spec = {"argv": ["/no/such/python", "{connection_file}"], "display_name": "x", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    opening = "import sys\nfrom lib.study import settings\nrun = settings.notebook_run(globals())"
    source = "print(sys.executable, run.n_models, run.epochs, run.parameters.out)"
    monkeypatch.setattr(command_line, "NOTEBOOKS", [notebook(tmp_path, "07_mine.ipynb", opening, source)])
    monkeypatch.setattr(report, "build", lambda out: out / "report" / "index.html")
    out = tmp_path / "out {a} 50% $x_$y"
    assert command_line.main(words(tmp_path, f"OUT={out}")) == 0
    said = capfd.readouterr()
    assert f"{command_line.sys.executable} 8 2 {out}" in said.out and "unknown parameter" not in said.err
    assert "IPKernelApp" not in said.err
    took = json.loads((out / "run.json").read_text())
    assert took["notebooks"] == ["07"] and took["n_models"] == 8 and took["trained"] == 0


@pytest.mark.parametrize(
    "source, said",
    [("raise ValueError('lr=9: too large')", "lr=9"), ("import os\nos.kill(os.getpid(), 9)", "DeadKernelError")],
)
def test_a_notebook_that_fails_or_dies_is_named_and_ends_the_run(tmp_path, monkeypatch, capsys, source, said):
    books = [notebook(tmp_path, "07_a.ipynb", source), notebook(tmp_path, "08_b.ipynb")]
    monkeypatch.setattr(command_line, "NOTEBOOKS", books)
    monkeypatch.setattr(experiments, "OPEN", 1)
    assert command_line.main(words(tmp_path)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "07_a failed" in line and said in line and not (tmp_path / "out" / "08_b.ipynb").exists()


def test_on_small_data_the_longest_notebooks_come_first_and_the_verdict_last(tmp_path, monkeypatch, capsys):
    books = [notebook(tmp_path, name) for name in ("01_a.ipynb", "03_b.ipynb", "05_c.ipynb", "07_verdict.ipynb")]
    monkeypatch.setattr(command_line, "NOTEBOOKS", books)
    monkeypatch.setattr(command_line, "execute", lambda book, *_: print(book.stem))
    monkeypatch.setattr(report, "rendered", lambda *_: None)
    monkeypatch.setattr(report, "build", lambda out: out / "report" / "index.html")
    monkeypatch.setattr(experiments, "ANALYSIS", {"01": (3, 0), "03": (1, 0), "05": (2, 0), "07": (9, 0)})
    monkeypatch.setattr(experiments, "OPEN", 1)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {})
    (tmp_path / "out").mkdir()
    for book in books:
        (tmp_path / "out" / book.name).touch()
    assert command_line.main(words(tmp_path)) == 0
    assert capsys.readouterr().out.split()[:4] == ["01_a", "05_c", "03_b", "07_verdict"]


def test_a_notebook_whose_training_was_given_up_does_not_wait_for_it(tmp_path, monkeypatch):
    """After another notebook has failed: its future is cancelled, and never done."""
    monkeypatch.setitem(command_line.KERNELS, get_ident(), SimpleNamespace())
    given_up = Future()
    Timer(0.2, given_up.cancel).start()
    with pytest.raises(CancelledError):
        command_line.execute(tmp_path / "01_a.ipynb", {}, tmp_path, [given_up])


def test_one_kernel_runs_notebook_after_notebook_and_forgets_each(tmp_path, monkeypatch):
    """The second sees nothing that the first has named, its cells count from 1, and the kernel ends with the run."""
    pids = tmp_path / "pids"
    note = f"import os\nwith open({str(pids)!r}, 'a') as file:\n    print(os.getpid(), file=file)"
    look = "print(sorted({*globals()} & {'mine', 'pandas', 'preset', '_4'}), len(In), Out)"
    first = notebook(tmp_path, "01_a.ipynb", note, "import pandas\nmine = 1\nmine")
    monkeypatch.setattr(command_line, "NOTEBOOKS", [first, notebook(tmp_path, "02_b.ipynb", note, look)])
    monkeypatch.setattr(experiments, "OPEN", 1)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {})
    monkeypatch.setattr(report, "build", lambda out: out / "report" / "index.html")
    assert command_line.main(words(tmp_path)) == 0 and not command_line.KERNELS
    one, last = (
        nbformat.read(tmp_path / "out" / name, as_version=4).cells[-1] for name in ("01_a.ipynb", "02_b.ipynb")
    )
    # the parameters, those that papermill adds, a note, and this cell; IPython's list begins with an empty line
    assert one.execution_count == last.execution_count == 4 and last.outputs[0].text == "['preset'] 5 {}\n"
    (pid, again) = map(int, pids.read_text().split())
    assert pid == again and not psutil.pid_exists(pid)


def test_two_notebooks_run_at_once_and_the_verdict_after_all(tmp_path, monkeypatch):
    """Each of two waits until the other has begun; the verdict sees what both have left."""
    begin = "import pathlib, time\npathlib.Path({0!r} + {1!r}).touch()\nuntil = time.time() + 60\n"
    wait = "while not pathlib.Path({0!r} + {2!r}).exists() and time.time() < until:\n    time.sleep(0.1)\n"
    wait += "assert time.time() < until\n"
    leave, flags = "pathlib.Path({0!r} + {1!r} + '.done').touch()", f"{tmp_path}/flag_"
    both = [begin + wait + leave, begin + wait + "time.sleep(2)\n" + leave]
    sources = [text.format(flags, *"ab"[::way]) for text, way in zip(both, (1, -1), strict=True)]
    sources.append(f"import pathlib\nassert len(list(pathlib.Path({str(tmp_path)!r}).glob('flag_*.done'))) == 2")
    names = "01_a.ipynb", "02_b.ipynb", "07_verdict.ipynb"
    books = [notebook(tmp_path, name, source) for name, source in zip(names, sources, strict=True)]
    monkeypatch.setattr(command_line, "NOTEBOOKS", books)
    monkeypatch.setattr(experiments, "OPEN", 2)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {})
    monkeypatch.setattr(report, "build", lambda out: out / "report" / "index.html")
    assert command_line.main(words(tmp_path)) == 0

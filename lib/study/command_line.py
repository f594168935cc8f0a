"""`python -m lib.study` runs the notebooks; --plan, --work, --report and --audit do something else: see --help."""

import json
import logging
import os
import sys
import time
from concurrent import futures
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from threading import get_ident

from lib import need
from lib.study import experiments, settings
from lib.study.settings import ROOT
from lib.training.store import check_disk, write_atomic

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"), key=lambda p: ("verdict" in p.stem, p.stem))
KERNELS = {}  # of each thread that runs notebooks: a new one would import for two seconds what all of them need


def chosen(words):
    """The notebooks that begin with these words, or all of them."""
    for word in words:
        known = any(book.name.startswith(word) for book in NOTEBOOKS)
        need(known, f"notebook {word!r} is unknown: choose from {', '.join(b.stem for b in NOTEBOOKS)}")
    return [book for book in NOTEBOOKS if not words or book.name.startswith(tuple(words))]


def shortest(path):
    """The path as seen from here, where the kernel will start too; absolute if it lies elsewhere."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def execute(book, given, out, awaited):
    """Run one notebook with papermill in this thread's kernel, once the futures in `awaited` are done.

    The kernel is this interpreter; it imports our modules while it waits, and forgets each notebook before the next."""
    import papermill
    from jupyter_client import AsyncKernelClient, KernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_core.utils import ensure_event_loop

    if get_ident() not in KERNELS:
        none = KernelSpecManager(kernel_dirs=[])  # it knows of none that is installed: it makes its own
        KERNELS[get_ident()] = KernelManager(kernel_spec_manager=none, client_factory=AsyncKernelClient)
        # one thread and one process: beside those that train, two wait for each other (a cell of 2 s took 51 s);
        # no progress bars, since those of two notebooks would overwrite each other
        settled = dict.fromkeys(("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT", "TQDM_DISABLE"), "1")
        arguments = ["--log-level=ERROR", "--IPKernelApp.exec_lines=from lib.study import figures, settings"]
        KERNELS[get_ident()].start_kernel(extra_arguments=arguments, env={**os.environ, **settled})
    kernel = KERNELS[get_ident()]
    kernel.client = client = cache(partial(KernelManager.client, kernel))  # papermill's client, which we use too
    for each in awaited:
        each.exception()  # waits; if the training has failed, the notebook tries itself, and says why
    print(f"{book.stem} -> {out}\n", end="", flush=True)  # in one piece, beside another notebook
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that the first cell does not list
    how = {"on_notebook_start": lambda notebook: client().execute("get_ipython().reset()", silent=True), "km": kernel}
    how |= {"kernel_name": "python3", "stdout_file": sys.stdout, "stderr_file": sys.stderr, "progress_bar": False}
    paths = (str(path).replace("{", "{{").replace("}", "}}") for path in (book, out / book.name))  # it formats them
    with closing(ensure_event_loop()):  # of this thread
        try:
            papermill.execute_notebook(*paths, given, **how)
        finally:
            client().stop_channels()


def main(arguments=None):
    """Command line. Returns the exit status: 2 for bad input, 1 for a notebook that failed."""
    try:
        words, given, doing = settings.parse(arguments)
        asked = settings.checked(given)
        if doing == "audit":
            from lib.study import own_logits  # here: this import, and that of the report, take two seconds

            out = given.get("out", "outputs/mine")
            own_logits.audit([*words, *filter(None, given.get("data", "").split(","))], out)
            print(f"Done. Look at {out}/report/index.html (open in a browser), results.csv and figures/ beside it")
            return 0
        books = chosen(words)
        if doing == "report":
            from lib.study import report

            print(f"Look at {report.build(asked.out)}")
            return 0
        run, numbers = settings.open_run(given), [book.name[:2] for book in books]
        plan = experiments.Plan(run, numbers)
        if doing == "plan":
            print(plan.describe())
            return 0
        before, out = plan.table(), Path(shortest(run.out))
        check_disk(run.store, 1e6 * before.megabytes.sum())
        if doing == "work":
            plan.train()
            return 0
        given = {**asked.model_dump(exclude_none=True), "store": shortest(run.store), "out": str(out)}
        # on larger images, which take long, a notebook runs when its models are there; else it waits for all models,
        # since beside training both take 8% more processor time
        n_open, running = experiments.OPEN if run.is_small else experiments.AT_ONCE, {}
        ahead, pool = futures.ThreadPoolExecutor(1), futures.ThreadPoolExecutor(n_open)

        def run_one(book, awaited):
            try:
                execute(book, given, out, awaited)
            except Exception:
                for executor in (ahead, pool):  # none that has not begun will
                    executor.shutdown(wait=False, cancel_futures=True)
                raise

        trained = [ahead.submit(plan.train, part) for part in ([numbers] if run.is_small else [[n] for n in numbers])]
        if run.is_small:  # the longest first, and the verdict last, so that they end together
            books.sort(key=lambda book: ("verdict" in book.stem, -plan.analysis(book.name[:2])))
        for at, book in enumerate(books, 1):
            others = running if "verdict" in book.stem else []  # it judges what all the others recorded
            running[pool.submit(run_one, book, [*trained[:at], *others])] = book
        from lib.study import report  # it is imported while kernels and processes are starting

        for done in futures.as_completed(running):
            plan.notebooks.remove((book := running[done]).name[:2])
            if error := done.exception():  # the notebook's own, or the kernel's death: what it did so far is in `out`
                said = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
                print(f"error: {book.stem} failed, see {out / book.name}: {said}", file=sys.stderr)
                return 1
            report.rendered(out / book.name, (out / book.name).stat().st_mtime_ns)  # ahead of the report
        took = {"notebooks": numbers, "n_models": run.n_models, "seconds": round(time.monotonic() - run.began)}
        # the share of the training that the store did not have
        took["trained"] = before.megagradients.sum() / (before.megagradients_in_all.sum() or 1)
        write_atomic(out / "run.json", json.dumps(took))
        page = shortest(report.build(out))
        print(f"Done. Look at {page} (open in a browser), results.csv, figures/ and the notebooks beside it")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        while KERNELS:  # all that they leave is on the disk by then: killed, they need no seconds to shut down
            KERNELS.popitem()[1].shutdown_kernel(now=True)

"""What a reader sees, in a real browser: JupyterLab run by its menu, and the pages of a report in light and dark.

Debian's chromium is driven over its DevTools protocol; where it is not installed, these tests are skipped.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from base64 import b64decode
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import jupytext
import pytest

from lib.study.settings import ROOT
from tests.processes import until

websocket = pytest.importorskip("websocket")  # comes with JupyterLab's server
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
SCREEN = dict(width=1280, height=720, deviceScaleFactor=1, mobile=False)  # a small laptop's

# Every visible text's contrast with what lies behind it (WCAG 2.1): the worst of them, as [ratio, text].
CONTRAST = """(() => {
  const rgba = text => { const v = text.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const over = (a, b) => a.slice(0, 3).map((v, i) => v * a[3] + b[i] * (1 - a[3]));
  const light = c => c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { const own = e ? rgba(getComputedStyle(e).backgroundColor) : [255, 255, 255, 1];
    return own[3] === 1 ? own.slice(0, 3) : over(own, behind(e.parentElement)); };
  const ratio = e => { const back = behind(e), text = over(rgba(getComputedStyle(e).color), back);
    const [low, high] = [light(back), light(text)].sort((a, b) => a - b); return (high + 0.05) / (low + 0.05); };
  const own = e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join(' ');
  return [...document.querySelectorAll('SCOPE')].filter(e => own(e) && e.getClientRects().length
    && getComputedStyle(e).visibility === 'visible').map(e => [ratio(e), own(e).slice(0, 60)])
    .sort((a, b) => a[0] - b[0])[0];
})()"""


@contextmanager
def running(command, **more):
    """A process that is ended afterwards, kindly first."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Page:
    """A tab of the browser, over a DevTools connection."""

    def __init__(self, connection):
        self.connection, self.number = connection, 0

    def call(self, method, **parameters):
        """The result of one DevTools method."""
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (said := json.loads(self.connection.recv())).get("id") != self.number:
            pass  # an event
        assert "error" not in said, said["error"]
        return said["result"]

    def js(self, expression):
        """The value of a JavaScript expression."""
        said = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def open(self, url):
        self.call("Page.navigate", url=url)
        until(lambda: self.js("location.href != 'about:blank' && document.readyState") == "complete", 30, url)

    def click(self, selector, text):
        """Press the mouse on the visible element that reads `text`."""
        find = f"[...document.querySelectorAll({selector!r})].find(e => e.innerText.trim() === {text!r})"
        middle = "r => r.width ? [r.x + r.width / 2, r.y + r.height / 2] : 0"
        box = f"(e => e && ({middle})(e.getBoundingClientRect()))({find})"
        x, y = until(lambda: self.js(box), 20, f"something to click that reads {text!r}")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def scheme(self, name):
        """Ask for light or dark pages, as the reader's desktop would."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def contrast(self, scope):
        """[ratio, text] of what is hardest to read among the elements that a CSS selector finds."""
        return self.js(CONTRAST.replace("SCOPE", scope))

    def picture(self, path):
        Path(path).write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))


@pytest.fixture
def page(tmp_path):
    """A tab of a small laptop's size."""
    home = tmp_path / "chromium"
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    quiet = [
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--remote-debugging-port=0",
    ]
    awake = ["--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows"]
    with running([CHROMIUM, *quiet, *awake, *root, f"--user-data-dir={home}", "about:blank"]):
        told = home / "DevToolsActivePort"
        port = until(lambda: told.exists() and told.read_text().split("\n")[0], 30, "chromium's port")
        with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(t for t in json.load(answer) if t["type"] == "page")
        connection = websocket.create_connection(tab["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
        try:
            found = Page(connection)
            found.call("Emulation.setDeviceMetricsOverride", **SCREEN)
            found.call("Page.bringToFront")
            found.call("Emulation.setFocusEmulationEnabled", enabled=True)
            yield found
        finally:
            connection.close()


# ---- JupyterLab ---------------------------------------------------------------------------------------------


def answers(url):
    """True if a server is there."""
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def lab(folder, settings):
    """JupyterLab on a folder, with nobody's settings but these: its address, and how to add the token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        (folder / kind / "labconfig").mkdir(parents=True)
    (folder / "CONFIG" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(settings))
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    options = [f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token=reader"]
    options += [f"--ServerApp.root_dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with running([sys.executable, "-m", "jupyterlab", *options], cwd=folder, env={**os.environ, **own}):
        until(lambda: answers(f"http://127.0.0.1:{port}/api"), 60, "JupyterLab's server")
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token=reader"


def tiny_copy(folder):
    """Notebook 01 as the reader would change it: its cell of parameters asks for little."""
    book = jupytext.read(ROOT / "notebooks" / "01_phenomenon.py")
    (cell,) = (c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    little = dict(preset="tiny", n_models=8, n_examples=200, epochs=2, store=str(folder / "store"), out=str(folder))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in little.items())
    jupytext.write(book, folder / "01_phenomenon.ipynb")


PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.innerText.trim())"


def test_notebook_01_runs_by_its_menu_and_shows_its_figures(page, tmp_path):
    tiny_copy(tmp_path)
    settings = {
        "@jupyterlab/apputils-extension:themes": {"theme": "JupyterLab Dark"},
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # cells out of sight are there too
    }
    with lab(tmp_path, settings) as url:
        page.open(url.format("01_phenomenon.ipynb"))
        until(lambda: len(page.js(PROMPTS)) > 20, 60, "the notebook")
        until(
            lambda: page.js("document.querySelector('#jp-main-statusbar').innerText.includes('| Idle')"),
            120,
            "a kernel",
        )
        page.click(".lm-MenuBar-item", "Run")
        page.click(".lm-Menu-itemLabel", "Run All Cells")
        until(lambda: "[*]:" in page.js(PROMPTS), 30, "the first cell's start")
        until(lambda: "[*]:" not in page.js(PROMPTS), 400, "the last cell's end")
        said = "[...document.querySelectorAll('.jp-OutputArea-output pre')].map(e => e.innerText).join()"
        assert "Traceback" not in page.js(said) and "[ ]:" not in page.js(PROMPTS)
        figures = "[...document.querySelectorAll('.jp-OutputArea img')].map(e => e.naturalWidth)"
        assert len(page.js(figures)) >= 7 and min(page.js(figures)) > 300
        assert page.contrast(".jp-OutputArea th, .jp-OutputArea td")[0] > 4.5
        assert (tmp_path / "results.csv").exists()


# ---- the report ---------------------------------------------------------------------------------------------


def test_a_report_fits_a_small_screen_and_can_be_read_in_light_and_dark(page, made):
    addresses = [p.as_uri() for p in sorted((made / "report").glob("*.html"))]
    assert len(addresses) == 8  # seven notebooks and the front page
    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 18, 18)")):
        page.scheme(scheme)
        for url in addresses:
            page.open(url)
            assert page.js("document.documentElement.scrollWidth") <= SCREEN["width"], f"{url} scrolls sideways"
            ratio, text = page.contrast("body *")
            assert ratio > 4.5, f"{url}: {text!r} is hard to read in {scheme} ({ratio:.1f})"
        assert page.js("getComputedStyle(document.body).backgroundColor") == ground


@pytest.mark.parametrize("kind", ["studied", "audited"])
def test_the_first_screen_holds_the_answer_and_the_picture(kind, page, request):
    page.open((request.getfixturevalue(kind) / "report" / "index.html").as_uri())
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        shown = "[...document.querySelectorAll('header h1, header p, header nav, header img')]"
        corners = ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])"
        boxes = page.js(shown + corners)
        assert len(boxes) == 4
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= SCREEN["width"] and 0 <= top < bottom <= SCREEN["height"]
        left, top, right, bottom = boxes[-1]
        width, height = page.js("(e => [e.naturalWidth, e.naturalHeight])(document.querySelector('header img'))")
        assert bottom - top > SCREEN["height"] / 2 and (right - left) / (bottom - top) == pytest.approx(
            width / height, 0.02
        )
        assert page.js("document.documentElement.scrollWidth") <= SCREEN["width"]
        assert page.contrast("body *")[0] > 4.5

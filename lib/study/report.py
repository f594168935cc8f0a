"""The report of a run, outputs/<run>/report/index.html: the verdicts first, behind them every executed notebook.

It opens from disk, without a server, a script or the network: figures are embedded and mathematics is MathML.
`make report DATASET=digits` (or OUT=folder) makes it anew from what is there.
"""

import html
import re
from functools import partial
from itertools import groupby
from pathlib import Path

import nbformat
import nh3
import pandas as pd
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from lib.study import verdict
from lib.study.results import COLUMNS, differing, read
from lib.study.text import null_control, planted_leak
from lib.training.store import write_atomic

# The browser refuses whatever runs or loads, should anything slip through `clean`.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MATH = "math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow mspace msqrt mstyle msub msubsup msup mtable mtd"
TAGS = nh3.ALLOWED_TAGS | set(f"{MATH} mtext mtr munder munderover style".split())
EVERYWHERE = "class columnalign columnspacing display displaystyle fence form height id lang largeop linethickness"
EVERYWHERE += " lspace mathvariant maxsize minsize movablelimits notation open rowspacing rspace scriptlevel separator"
ATTRIBUTES = nh3.ALLOWED_ATTRIBUTES | {"*": set(f"{EVERYWHERE} stretchy title type width xmlns".split())}
SETUP = {"setup", "parameters", "injected-parameters"}  # tags of cells that a page folds
PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[\w+/=\s]*$")
LOADS = re.compile(r"<|url\s*\(|@import|expression\s*\(|\\", re.I)  # in a style sheet; a backslash can spell the others
CSS = """
:root { color-scheme: light dark }
body { background: Canvas; color: CanvasText; font: 16px/1.55 system-ui, sans-serif; margin: auto; padding: 1.5em;
  max-width: 62em }
body.wide { max-width: 90em }
table { border-collapse: collapse; font-size: 0.85em; margin: 1em 0; display: block; overflow-x: auto }
th, td { border: 1px solid #8886; padding: 0.3em 0.6em; text-align: left }
.wide td:first-child { white-space: nowrap }
pre { background: #8888880c; padding: 0.7em; overflow-x: auto; font-size: 0.82em; line-height: 1.4 }
img { max-width: 100%; background: #fff }
.anchor-link { visibility: hidden }
"""
SPELLINGS = {r"\operatorname*": r"\operatorname", r"arg\,min": "argmin", r"\arg\min": r"\operatorname{argmin}",
             "{aligned}": "{align*}", r"\!": ""}  # fmt: skip
LIGHT, DARK = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "monokai"))
CSS += f"{LIGHT} @media (prefers-color-scheme: dark) {{ {DARK} }} .highlight {{ background: none !important }}"


def mathml(tex, display="inline"):
    """TeX as MathML, which browsers draw without a script; what the converter can't read stays TeX."""
    for written, known in SPELLINGS.items():
        tex = tex.replace(written, known)
    try:
        found = convert(re.sub(r"\\log\s*(?=[a-zA-Z])", r"\\log\\,", tex.strip()), display=display)
        return re.sub(r"&(?!#?\w+;)", "&amp;", found)
    except Exception:  # the converter's own kinds, and whatever a malformed formula makes of it
        return f'<code class="tex">{html.escape(tex)}</code>'


class Renderer(IPythonRenderer):
    """Markdown as nbconvert renders it, but for the mathematics."""

    inline_math = staticmethod(mathml)
    block_math = staticmethod(partial(mathml, display="block"))

    def latex_environment(self, name, body):
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def clean(body):
    """HTML of a page's body without anything that runs, loads or sends: tags and attributes by the lists above."""

    def link(tag, name, value):
        data = re.sub(r"[\x00-\x20]", "", value).lower().startswith("data:")  # browsers ignore these characters
        return None if (name == "src" and not PICTURE.match(value)) or (name == "href" and data) else value

    schemes, cut = {"http", "https", "mailto", "data"}, {"script"}
    cleaned = nh3.clean(body, TAGS, cut, ATTRIBUTES, link, link_rel=None, url_schemes=schemes)
    return re.sub(r"<style[^>]*>(.*?)</style>", lambda m: "" if LOADS.search(m[1]) else m[0], cleaned, flags=re.S)


def page(title, body, kind=""):
    """A whole HTML page, in ASCII; title is text, body is HTML, which is cleaned."""
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    head += f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
    text = f"<html lang=en><head>{head}<style>{CSS}</style></head><body class='{kind}'>{clean(body)}</body></html>"
    return "<!DOCTYPE html>\n" + text.encode("ascii", "xmlcharrefreplace").decode()


def rendered(path):
    """(title, HTML page) of an executed notebook: set-up folded, mathematics as MathML, no widgets, no folders."""
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r'"/[^"]*/', '"…/', cell.source)
        for output in cell.get("outputs", []):
            shown = output.get("data", {})
            for kind in [k for k in shown if k.startswith("application/")]:
                del shown[kind]
            if "text/latex" in shown:
                shown["text/html"] = mathml(shown.pop("text/latex").strip("$ \n"), "block")
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_filter("markdown2html", lambda text: MarkdownWithMath(Renderer(escape=False)).render(text))
    body = '<p><a href="index.html">All verdicts</a></p>'
    for folded, cells in groupby(book.cells, lambda cell: bool(SETUP & set(cell.metadata.get("tags", [])))):
        part, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=list(cells)))
        body += f"<details><summary>Set-up and parameters</summary>{part}</details>" if folded else part
    titles = re.findall(r"^# (.+)", "\n".join(c.source for c in book.cells if c.cell_type == "markdown"), flags=re.M)
    title = [*titles, path.stem][0]
    return title, page(title, body)


def bullets(sentences):
    """A list in HTML of plain sentences."""
    return f"<ul>{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul>"


def index(out, rows, titles):
    """The first page of the run in folder `out`: the verdicts, the controls, a link to every page.

    rows: of results.csv (results.read); titles: file name -> title.
    """
    ledger, by_attack = verdict.ledger(rows), verdict.ledger(rows, verdict.BY_ATTACK)
    counts = ledger.verdict.value_counts()
    counted = ", ".join(f"{counts[name]} {name}" for name in verdict.SHADES if name in counts)
    groups = filter(None, (", ".join(filter(None, group)) for group in ledger[verdict.GROUP].drop_duplicates().values))
    title = f"Flat Is Not Private: {'; '.join(groups) or 'no results yet'}"
    settings = ledger[(ledger.optimizer != "") & (ledger.differs != "")][["dataset", "arch", "optimizer", "differs"]]
    lines = [f"{', '.join(about)}: {differs}" for *about, differs in settings.drop_duplicates().values]
    controls = [f"Null control, membership shuffled: {null_control(rows[rows.experiment == 'null control'])}"]
    for times, leak in rows[rows.experiment == "planted leak"].groupby("coordinate", sort=False):
        controls += [f"Planted leak, one example trained {times.removeprefix('times=')}×: {planted_leak(leak)}"]
    links = "".join(f'<li><a href="{html.escape(name)}">{html.escape(text)}</a></li>' for name, text in titles.items())
    body = f"""<h1>{html.escape(title)}</h1>
<p>The paper's claims, and checks of ours: {counted}.
An effect is a difference from the baseline, with its 95% interval.
What differs from the paper's setting, and how well the baseline fits its own training halves:</p>
{bullets([*(lines or ["nothing was run yet"]), *differing(out)])}
<p>{html.escape(verdict.headline(ledger))}</p>
{verdict.table(ledger).to_html()}
<details><summary>Each attack by itself</summary>{verdict.table(by_attack).to_html()}</details>
<details><summary>The rule</summary><pre>{html.escape(verdict.__doc__)}</pre></details>
<h2>Controls</h2><p>No attack should find anything in shuffled membership; every attack should find a planted leak.</p>
{bullets(controls)}
<h2>The evidence</h2><ul>{links}</ul><p>All numbers: <a href="../results.csv">results.csv</a>.</p>"""
    return page(title, body, "wide")


def build(out):
    """Write the report of the run in folder `out`: the path of its index. Raises ValueError if nothing is there."""
    out, titles = Path(out), {}
    books, results = sorted(out.glob("[0-9][0-9]_*.ipynb")), out / "results.csv"
    if not books and not results.exists():
        raise ValueError(f"out={str(out)!r} has neither results.csv nor an executed notebook: `make study` makes them")
    rows = read(results) if results.exists() else pd.DataFrame(columns=COLUMNS)
    (out / "report").mkdir(exist_ok=True)
    for book in books:
        titles[f"{book.stem}.html"], text = rendered(book)
        write_atomic(out / "report" / f"{book.stem}.html", text)
    path = out / "report" / "index.html"
    write_atomic(path, index(out, rows, titles))
    return path

"""The report of a run, outputs/<run>/report/index.html: the verdicts first, behind them every executed notebook.

It opens from disk, without a server, a script or the network: figures are embedded and mathematics is MathML.
`python -m lib.study.report DATASET=digits` (or OUT=folder) makes it anew from what is there.
"""

import html
import re
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from lib.study import verdict
from lib.study.results import differing
from lib.study.safe import POLICY, harmless
from lib.study.text import null_control, planted_leak
from lib.training.store import write_atomic

CSS = """
:root { color-scheme: light dark; --back: #fff; --text: #1f2328; --line: #d0d7de; --code: #f6f8fa; --link: #0550ae }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #dfe3e8; --line: #3b4048; --code: #21252b;
  --link: #79b8ff } }
body { background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; margin: auto; padding: 1.5em;
  max-width: 62em } body.wide { max-width: 90em } a { color: var(--link) }
table { border-collapse: collapse; font-size: 0.85em; margin: 1em 0; display: block; overflow-x: auto }
th, td { border: 1px solid var(--line); padding: 0.3em 0.6em; text-align: left }
.wide td:first-child { white-space: nowrap }
pre { background: var(--code); padding: 0.7em; overflow-x: auto; font-size: 0.82em; line-height: 1.4 }
img { max-width: 100%; background: #fff } math { font-size: 1.08em } .anchor-link { visibility: hidden }
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

    def inline_math(self, body):
        return mathml(body)

    def block_math(self, body):
        return mathml(body, "block")

    def latex_environment(self, name, body):
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def page(title, body, kind=""):
    """A whole HTML page, in ASCII; title is text, body is HTML, whose scripts are taken out."""
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    head += f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
    text = f"<html lang=en><head>{head}<style>{CSS}</style></head><body class='{kind}'>{harmless(body)}</body></html>"
    return "<!DOCTYPE html>\n" + text.encode("ascii", "xmlcharrefreplace").decode()


def plain(cell):
    """A cell for paper: parameters without the folders of this computer, formulas as MathML, no widgets."""
    if "injected-parameters" in cell.metadata.get("tags", []):
        cell.source = re.sub(r'"/[^"]*/', '"…/', cell.source)
    for output in cell.get("outputs", []):
        shown = output.get("data", {})
        for kind in [k for k in shown if k.startswith("application/")]:
            del shown[kind]
        if "text/latex" in shown:
            shown["text/html"] = mathml(shown.pop("text/latex").strip("$ \n"), "block")


def rendered(path):
    """(title, HTML page) of an executed notebook."""
    book = nbformat.read(path, as_version=4)
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        plain(cell)
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_filter("markdown2html", lambda text: MarkdownWithMath(Renderer(escape=False)).render(text))
    headings = re.findall(r"^# (.+)", "\n".join(c.source for c in book.cells if c.cell_type == "markdown"), flags=re.M)
    title = (headings or [path.stem])[0]
    body, _ = exporter.from_notebook_node(book)
    return title, page(title, f'<p><a href="index.html">All verdicts</a></p>{body}')


CONTROLS = {"null control": null_control, "planted leak": planted_leak, "the same example trained once": planted_leak}


def controls(rows):
    """A list in HTML: what each of the CONTROLS says, from a run's rows (verdict.read), or that it was not run."""
    said = []
    for note, words in CONTROLS.items():
        found = rows[rows.note.str.startswith(note)]
        sentence = f"{found.note.iloc[0]}. {words(found)}" if len(found) else f"{note}. Not run."
        said.append(f"<li>{html.escape(sentence[0].upper() + sentence[1:])}</li>")
    return f"<ul>{''.join(said)}</ul>"


def index(ledger, titles, differing=(), checked=""):
    """The first page: the verdicts, the controls, a link to every page. titles: file name -> title; differing:
    sentences; checked: HTML of `controls`."""
    counts = ledger.verdict.value_counts()
    counted = ", ".join(f"{counts[name]} {name}" for name in verdict.SHADES if name in counts)
    groups = ledger[verdict.GROUP].drop_duplicates().agg(lambda row: ", ".join(filter(None, row)), axis=1)
    title = f"Flat Is Not Private: {'; '.join(filter(None, groups)) or 'no results yet'}"
    settings = ledger[[*verdict.GROUP, "optimizer", "differs"]].drop_duplicates()
    settings = settings[(settings.optimizer != "") & (settings.differs != "")].drop(columns="run")
    lines = "".join(f"<li>{html.escape(', '.join(row[:-1]))}: {html.escape(row[-1])}</li>" for row in settings.values)
    mixed = "".join(f"<li>Mind: {html.escape(sentence)}</li>" for sentence in differing)
    links = "".join(f'<li><a href="{html.escape(name)}">{html.escape(text)}</a></li>' for name, text in titles.items())
    body = f"""<h1>{html.escape(title)}</h1>
<p>The paper's claims, and checks of ours, one by one: {counted}.
An effect is a difference to the baseline, with its 95% interval.
What differs from the paper's setting, and how well the baseline fits its own training halves:</p>
<ul>{lines or "<li>nothing was run yet</li>"}{mixed}</ul>
{verdict.table(ledger).to_html()}
<details><summary>The rule</summary><pre>{html.escape(verdict.__doc__)}</pre></details>
<h2>Controls</h2><p>Shuffled membership is nothing that an attack could tell; a planted leak is there to be found.</p>
{checked}
<h2>The evidence</h2><ul>{links}</ul><p>All numbers: <a href="../results.csv">results.csv</a>.</p>"""
    return page(title, body, "wide")


def build(out):
    """Write the report of the run in folder `out`: the path of its index. Raises ValueError if nothing is there."""
    out, results = Path(out), Path(out) / "results.csv"
    books = sorted(out.glob("[0-9][0-9]_*.ipynb"))
    if not books and not results.exists():
        raise ValueError(
            f"out={str(out)!r} holds neither results.csv nor an executed notebook: `make study` makes them"
        )
    rows = verdict.read(results) if results.exists() else verdict.NOTHING
    ledger = verdict.ledger(rows)
    (out / "report").mkdir(exist_ok=True)
    titles = {}
    for book in books:
        name = f"{book.stem}.html"
        titles[name], text = rendered(book)
        write_atomic(out / "report" / name, text)
    write_atomic(out / "report" / "index.html", index(ledger, titles, differing(out), controls(rows)))
    return out / "report" / "index.html"


def main(arguments=None):
    """Command line: the words of `python -m lib.study`. Returns the exit status, 2 for bad input."""
    from lib.study import command_line, settings

    try:
        print(f"Look at {build(settings.clean(command_line.parse(arguments)[1])['out'])}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

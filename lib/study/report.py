"""The report of a run, outputs/<run>/report/index.html, which opens from disk, without scripts or the network."""

import base64
import html
import re
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import nh3
import pandas as pd
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from lib import need
from lib.attacks.catalogue import HEADLINES
from lib.study import verdict
from lib.study.results import COLUMNS, NUMBERS, differing, read
from lib.study.text import joined, null_control, of_hundred, planted_leak
from lib.training.store import write_atomic

# The browser refuses whatever runs or loads, should anything slip through `clean`.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# what nbconvert, pandas and MathML need beside the usual tags and attributes
MATH = "math mfrac mi mn mo mover mrow mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover"
SHAPE = "display displaystyle fence form mathvariant maxsize minsize movablelimits scriptlevel stretchy type width"
TAGS = nh3.ALLOWED_TAGS | {"style", *MATH.split()}
ATTRIBUTES = nh3.ALLOWED_ATTRIBUTES | {"*": {"class", "id", "title", *SHAPE.split()}}
SETUP = {"setup", "parameters", "injected-parameters"}  # tags of cells that a page folds
PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[\w+/=\s]*$")
LOADS = re.compile(r"<|url\s*\(|@import|expression\s*\(|\\", re.I)  # in a style sheet; a backslash can spell the others
PICTURES = {  # of a run: the first that is there opens its page
    "leakage_against_accuracy": "Every setting tried: higher up it leaks more, further right it tests better.",
    "difference_auc": "Each attack's AUC, minus the baseline's: right of the line, the model leaks more.",
}
LIGHT, DARK = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "monokai"))
CSS = Path(__file__).with_suffix(".css").read_text()
CSS += f"{LIGHT} @media (prefers-color-scheme: dark) {{ {DARK} }} .highlight {{ background: none !important }}"


def mathml(tex, display="inline"):
    """TeX as MathML, which browsers draw without a script; what the converter can't read stays TeX."""
    try:
        spaced = re.sub(r"\\log\s*(?=[a-zA-Z])", r"\\log\\,", tex.strip())
        return convert(spaced.replace(r"\arg\min", r"\operatorname{argmin}"), display=display)
    except Exception:  # the converter's own kinds, and whatever a malformed formula makes of it
        return f"<code>{html.escape(tex)}</code>"


class Renderer(IPythonRenderer):
    inline_math = staticmethod(mathml)
    block_math = staticmethod(partial(mathml, display="block"))


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


@cache
def rendered(path, changed):
    """(title, HTML page) of an executed notebook: set-up folded, mathematics as MathML, no widgets, no folders.

    changed: the file's st_mtime_ns, so that the same state of it is rendered once."""
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r'"/[^"]*/', '"…/', cell.source)
        for output in cell.get("outputs", []):
            if "text/latex" in (shown := output.get("data", {})):
                shown["text/html"] = mathml(shown.pop("text/latex").strip("$ \n"), "block")
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_filter("clean_html", lambda part: part)  # `page` cleans the whole
    exporter.register_filter("markdown2html", lambda text: MarkdownWithMath(Renderer(escape=False)).render(text))
    body = '<p><a href="index.html">All verdicts</a></p>'
    for folded, cells in groupby(book.cells, lambda cell: bool(SETUP & set(cell.metadata.get("tags", [])))):
        part, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=list(cells)))
        body += f"<details><summary>Set-up and parameters</summary>{part}</details>" if folded else part
    said = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    title = [*re.findall(r"^# (.+)", said, flags=re.M), path.stem][0]
    return title, page(title, body)


def bullets(sentences):
    return f"<ul>{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul>"


def embedded(path, caption):
    data, said = base64.b64encode(Path(path).read_bytes()).decode(), html.escape(caption)
    return f'<img alt="{said}" title="{said}" src="data:image/png;base64,{data}">'


def opening(title, answer, picture, sections, folded):
    """A page: answer, picture (path, caption) or None, sections and, in an appendix, folded ones: heading -> HTML."""
    folds = (f"<details><summary>{summary}</summary>{text}</details>" for summary, text in folded.items())
    numbers = '<p>All numbers: <a href="../results.csv">results.csv</a>.</p>'
    sections = sections | {"Appendix": f"{''.join(folds)}{numbers}"}
    links = "".join(f'<a href="#part{k}">{name}</a>' for k, name in enumerate(sections))
    body = f"<div><h1>{html.escape(title)}</h1><p>{html.escape(answer)}</p><nav>{links}</nav></div>"
    if picture:  # a narrow one stands beside the text
        height, width = plt.imread(picture[0]).shape[:2]
        body = f'<header class="{"beside" if width < 1.6 * height else ""}">{body}{embedded(*picture)}</header>'
    body += "".join(f'<h2 id="part{k}">{name}</h2>{text}' for k, (name, text) in enumerate(sections.items()))
    return page(title, body, "wide")


def strongest(rows):
    """From the rows of a results.csv: each optimizer's AUC by the headline attack whose AUC is highest, else by any."""
    auc = rows[(rows.experiment == "main") & (rows.metric == "auc") & (rows.baseline == "") & (rows.coordinate == "")]
    auc = auc[auc.attack.isin(HEADLINES)] if auc.attack.isin(HEADLINES).any() else auc
    return auc[auc.attack == auc.attack[auc.value.idxmax()]] if len(auc) else auc


def for_engineers(rows, prefer="", over=""):
    """In HTML, from the rows of a results.csv: what to do, how often the attacker is right, who is exposed, controls.

    prefer: what leaks less ("": no difference was found), over: than what ("": nothing was compared)."""
    best, own = strongest(rows), rows[(rows.experiment == "main") & (rows.baseline == "")]
    null, (attack, *_) = rows[rows.experiment == "null control"], [*best.attack, "none"]
    shift = null[NUMBERS].to_numpy(float) - 0.5
    if len(null) and verdict.judge_attacks([*null.attack], shift, 0.0, "family")[0] != "inconclusive":
        do = "look for a fault first: membership was shuffled, and attacks still tell members apart"
    elif prefer:
        do = f"prefer {prefer} to {over} where it is accurate enough, and audit what you release"
    elif over:
        do = f"choose between {over} by test accuracy: the attacks agree on no difference in leakage"
    elif (best.ci_low > 0.5).any():
        do = f"do not release {joined(best.optimizer)} if membership is a secret"
    else:
        do = "treat this as no proof of privacy: no leak was shown"
    right, exposed = {}, []
    for row in own[own.metric.str.startswith("precision@") & (own.attack == attack)].itertuples():
        rate, share = (f"{100 * float(number):g}%" for number in re.findall(r"[\d.]+", row.metric))
        right.setdefault(f"if {share} of the candidates are, at {rate} FPR", {})[row.optimizer] = of_hundred(row)
    for name, part in own[own.metric.str.startswith("expos")].groupby("optimizer", sort=False):
        who = part.coordinate[part.metric == "exposure"].str.removeprefix("example=")
        halves, again = part[part.metric != "exposure"], "too few models or examples to ask two halves."
        if len(halves) == 2:
            both, chance = map(of_hundred, halves.itertuples())
            again = f"of a hundred whom one half of the models names, the other half names {both}, by chance {chance}."
        exposed.append(f"{name}: the most exposed examples are {joined(who)}; {again}")
    leaks = rows[rows.experiment == "planted leak"].groupby("coordinate", sort=False)
    controls = [f"Null control, membership shuffled: {null_control(null)}"]
    controls += [f"Planted leak, one example trained {c.removeprefix('times=')}×: {planted_leak(r)}" for c, r in leaks]
    table = pd.DataFrame(right).T.to_html(border=0) if right else bullets(["not recorded, or too few examples."])
    return f"""<p><b>What to do:</b> {html.escape(do)}; only differential privacy bounds what other attacks learn.</p>
<p>Of a hundred people whom the attacker names, by {html.escape(attack)}, so many are members:</p>{table}
<p>Who is exposed, and would other models expose the same?</p>{bullets(exposed or ["not recorded."])}
<p>No attack should find anything in shuffled membership; every attack should find a planted leak.</p>
{bullets(controls)}"""


def build(out):
    """Write the report of the run in folder `out`: the path of its index. Raises ValueError if nothing is there."""
    out, links = Path(out), ""
    books, results = sorted(out.glob("[0-9][0-9]_*.ipynb")), out / "results.csv"
    what = f"out={str(out)!r} has neither results.csv nor an executed notebook"
    need(books or results.exists(), f"{what}: `make study` makes them")
    rows = read(results) if results.exists() else pd.DataFrame(columns=COLUMNS)
    (out / "report").mkdir(exist_ok=True)
    for book in books:
        title, text = rendered(book, book.stat().st_mtime_ns)
        write_atomic(out / "report" / f"{book.stem}.html", text)
        links += f'<li><a href="{html.escape(book.stem)}.html">{html.escape(title)}</a></li>'
    ledger = verdict.ledger(rows)
    counted = ", ".join(f"{count} {name}" for name, count in ledger.verdict.value_counts().items())
    groups = "; ".join(", ".join(filter(None, group)) for group in ledger[verdict.GROUP].drop_duplicates().values)
    settings = ledger[(ledger.optimizer != "") & (ledger.setting != "")][["dataset", "arch", "optimizer", "setting"]]
    lines = [f"{', '.join(about)}: {said}" for *about, said in settings.drop_duplicates().values]
    names, advice = ("the tuned baseline", "sharpness-aware training"), ("", "")
    for claim in ("more_when_tuned", "more_at_equal_accuracy"):  # the second has the last word, where it was judged
        if judged := {*ledger.verdict[ledger.claim == claim]} - {"not run", "not testable here"}:
            way = ("supported" in judged) - ("contradicted" in judged)
            advice = {1: names, -1: names[::-1], 0: ("", joined(names))}[way]
    pictures = ((out / "figures" / f"{name}.png", caption) for name, caption in PICTURES.items())
    picture = next((each for each in pictures if each[0].exists()), None)
    sections = {
        "For engineers": for_engineers(rows, *advice),
        "Verdicts": f"""<p>The paper's claims, and checks of ours: {counted}.
An effect is a difference from the baseline, with its 95% interval.
The size of this run (the paper's: 50,000 examples, 256 models), and how well the optimizers fit their own halves:</p>
{bullets([*(lines or ["nothing was run yet"]), *differing(out)])}{verdict.table(ledger).to_html()}""",
        "Evidence": f"<ul>{links}</ul>",
    }
    by_attack = verdict.table(verdict.ledger(rows, verdict.BY_ATTACK)).to_html()
    folded = {"Each attack by itself": by_attack, "The rule": f"<pre>{html.escape(verdict.__doc__)}</pre>"}
    title, path = f"Flat Is Not Private: {groups or 'no results yet'}", out / "report" / "index.html"
    write_atomic(path, opening(title, verdict.headline(ledger), picture, sections, folded))
    return path

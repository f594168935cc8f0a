"""The report: offline pages with mathematics as MathML, made from whatever of a run is there."""

import re
import shutil
from html.parser import HTMLParser

import jupytext
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.study import report, verdict
from lib.study.results import COLUMNS
from lib.study.settings import ROOT

RUN = ROOT / "outputs" / "reference" / "digits"
ROW = {"notebook": "01", "metric": "test_accuracy", "value": 0.01, "ci_low": 0.005, "ci_high": 0.015, "n_models": 8}


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def named(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


def pages(out):
    return {p.name: p.read_text(encoding="ascii") for p in (out / "report").glob("*.html")}


def book(path, *cells, **metadata):
    """An executed notebook on disk."""
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The report of the committed run on digits."""
    out = tmp_path_factory.mktemp("run") / "digits"
    shutil.copytree(RUN, out)
    report.build(out)
    return out


def test_pages_load_nothing_from_anywhere_else(made):
    for name, text in pages(made).items():
        tags = Tags(text)
        assert not tags.named("script") and not tags.named("link") and not tags.named("iframe"), name
        assert all(image["src"].startswith("data:image/") for image in tags.named("img")), name
        assert not re.search(r"@import|url\(|javascript:", text), name
        assert str(ROOT) not in text and str(made) not in text, name


def test_the_index_has_the_verdicts_first_and_links_to_every_page(made):
    index = pages(made)["index.html"]
    links = [a["href"] for a in Tags(index).named("a")]
    assert {f"{p.stem}.html" for p in made.glob("[0-9]*.ipynb")} <= set(links)
    assert all((made / "report" / link).exists() for link in links)
    assert index.index("<table") < index.index(links[0])
    ledger = verdict.ledger(verdict.read(made / "results.csv"))
    for name, count in ledger.verdict.value_counts().items():
        assert f"{count} {name}" in index and index.count(f">{name}</td>") == count


def test_pages_hold_the_figures_and_the_mathematics(made):
    page = pages(made)["01_phenomenon.html"]
    assert len(Tags(page).named("img")) >= 9 and len(Tags(page).named("math")) >= 8
    assert "$" not in re.sub(r"<pre>.*?</pre>|<style.*?</style>", "", page, flags=re.S)
    assert sum(len(text) for text in pages(made).values()) < 5e6 and not list((made / "report").glob(".*"))


def formulas(text):
    """The TeX between dollars of a Markdown text, but for code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, flags=re.S)]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda p: p.stem)
def test_every_formula_of_the_notebooks_is_converted(path):
    cells = [c.source for c in jupytext.read(path).cells if c.cell_type == "markdown"]
    for tex in (tex for source in cells for tex in formulas(source)):
        shown = report.mathml(tex)
        assert shown.startswith("<math") and "\\" not in shown, tex


@pytest.mark.parametrize(
    "tex, wanted",
    [(r"\log p_y", "<mspace"), (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "<mtable"),
     (r"\operatorname*{arg\,min}_w w", "argmin"), (r"a < b \& c", "&#x0003C;"), (r"\bad{<b>\frac{", 'class="tex"')],
)  # fmt: skip
def test_tex_becomes_mathml_or_stays_tex(tex, wanted):
    shown = report.mathml(tex)
    assert wanted in shown and "<b>" not in shown and not re.search(r"&(?!#?\w+;)", shown)


def test_a_cell_loses_widgets_and_folders_and_keeps_its_formula(tmp_path):
    latex = new_output("display_data", {"text/latex": r"$\displaystyle x^{2}$", "text/plain": "x**2"})
    widget = new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "s"}
    )
    given = new_code_cell(
        'out = "/home/somebody/outputs/x"\nstore = "store"', metadata={"tags": ["injected-parameters"]}
    )
    state = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    cells = [new_markdown_cell("# A title\n\n$$y = \\frac{1}{2}$$"), given, new_code_cell("f", outputs=[latex, widget])]
    book(tmp_path / "02_some.ipynb", *cells, widgets=state)
    report.build(tmp_path)
    page = pages(tmp_path)["02_some.html"]
    assert len(Tags(page).named("math")) == 2 and "display" in Tags(page).named("math")[0]
    assert "somebody" not in page and "store" in page and "<script" not in page and "model_id" not in page
    assert "A title</a>" in pages(tmp_path)["index.html"] and "no results yet" in pages(tmp_path)["index.html"]


def test_text_from_results_and_titles_is_escaped(tmp_path):
    rows = [dict.fromkeys(COLUMNS, "") | ROW | {"dataset": "<script>alert(1)</script>", "arch": "a&b", "optimizer": o}
            for o in ("sgd", "sam-sgd")]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    book(tmp_path / "01_a.ipynb", new_markdown_cell("# A <script>title</script> é"))
    report.build(tmp_path)
    index = pages(tmp_path)["index.html"]
    assert not Tags(index).named("script") and "&lt;script&gt;alert(1)" in index and "a&amp;b" in index
    assert "&lt;script&gt;title" in index and "&#233;" in index


def test_only_what_is_there_is_linked_and_a_second_report_replaces_the_first(tmp_path):
    shutil.copy(RUN / "results.csv", tmp_path)
    first = report.build(tmp_path).read_text()
    assert [a["href"] for a in Tags(first).named("a")] == ["../results.csv"]
    assert ", 0 not run" not in first
    book(tmp_path / "03_new.ipynb", new_markdown_cell("# New"))
    assert "03_new.html" in report.build(tmp_path).read_text()


def test_nothing_there_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="out=.*make study"):
        report.build(tmp_path)
    assert not (tmp_path / "report").exists()
    for words in ([f"OUT={tmp_path}"], ["DATASETT=x"]):
        assert report.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def control(note, metric, values, low, high, attacks=("gap", "loss", "lira")):
    """Rows of a control, one an attack."""
    about = dict.fromkeys(COLUMNS, "") | {"notebook": "01", "note": note, "metric": metric, "n_models": 16}
    numbers = zip(attacks, values, low, high, strict=True)
    return [about | dict(attack=a, value=v, ci_low=low, ci_high=high) for a, v, low, high in numbers]


def test_the_controls_are_counted_from_the_rows(tmp_path):
    rows = control(
        "null control: shuffled membership", "auc", (0.5, 0.52, 0.47), (0.49, 0.51, 0.46), (0.51, 0.53, 0.51)
    )
    rows += control(
        "planted leak: one example trained 50 times", "planted_pairs_found", (1, 1, 0.5), (0.6, 0.6, 0.2), (1, 1, 0.8)
    )
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    page = report.build(tmp_path).read_text()
    assert "2 of 3 attacks have 0.5 within their 95% interval; the furthest is lira with 0.470." in page
    assert (
        "one example trained 50 times. 2 of 3 attacks find" in page and "of 8 pairs than chance allows; lira do" in page
    )
    assert "The same example trained once. Not run." in page


def test_controls_that_did_not_run_say_so(made):
    index = pages(made)["index.html"]  # the committed run is older than the planted leak
    found = re.search(r"<h2>Controls</h2>.*?</ul>", index, flags=re.S)[0]
    assert "of 16 attacks have 0.5" in found
    old = "planted leak" not in (made / "results.csv").read_text()
    assert ("Planted leak. Not run." in found) == old


def test_a_bad_results_file_is_named(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    assert report.main([f"OUT={tmp_path}"]) == 2
    assert "results.csv" in capsys.readouterr().err and not (tmp_path / "report").exists()


def test_the_command_line_names_the_page(tmp_path, capsys):
    shutil.copy(RUN / "results.csv", tmp_path)
    assert report.main([f"OUT={tmp_path}"]) == 0
    assert str(tmp_path / "report" / "index.html") in capsys.readouterr().out

"""The report: offline pages with mathematics as MathML, made from whatever of a run is there."""

import re
import shutil
from html.parser import HTMLParser

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.study import command_line, own_logits, report, verdict
from lib.study.results import COLUMNS, read
from lib.study.settings import ROOT

RUN = ROOT / "outputs" / "reference" / "digits"
ROW = {
    "notebook": "01",
    "experiment": "main",
    "coordinate": "",
    "metric": "test_accuracy",
    "value": 0.01,
    "ci_low": 0.005,
    "ci_high": 0.015,
    "n_models": 8,
}


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


def test_pages_load_nothing_from_anywhere_else(made):
    for name, text in pages(made).items():
        tags = Tags(text)
        assert not tags.named("script") and not tags.named("link") and not tags.named("iframe"), name
        assert all(image["src"].startswith("data:image/") for image in tags.named("img")), name
        assert not re.search(r"@import|url\(|javascript:", text), name
        assert str(ROOT) not in text and str(made) not in text, name


def links_of(text):
    """The links of a page to other files."""
    return [a["href"] for a in Tags(text).named("a") if not a["href"].startswith("#")]


def test_the_index_has_the_verdicts_and_links_to_every_page(made):
    index = pages(made)["index.html"]
    links = links_of(index)
    assert {f"{p.stem}.html" for p in made.glob("[0-9]*.ipynb")} <= set(links)
    assert all((made / "report" / link).exists() for link in links)
    assert index.index("<table") < index.index(links[0])
    rows = read(made / "results.csv")
    ledger, by_attack = verdict.ledger(rows), verdict.ledger(rows, verdict.BY_ATTACK)
    appendix = by_attack.verdict.value_counts()
    for name, count in ledger.verdict.value_counts().items():
        assert f"{count} {name}" in index and index.count(f">{name}</td>") == count + appendix.get(name, 0)
    assert verdict.headline(ledger) in index


def test_pages_hold_the_figures_and_the_mathematics(made):
    page = pages(made)["01_phenomenon.html"]
    assert len(Tags(page).named("img")) >= 7 and len(Tags(page).named("math")) >= 8
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
        kept = [[a | {"xmlns": ""} for _, a in Tags(text).found] for text in (shown, report.clean(shown))]
        assert kept[0] == [a | {"xmlns": ""} for a in kept[1]], tex


@pytest.mark.parametrize(
    "tex, wanted", [(r"\log p_y", "<mspace"), (r"a < b", "&#x0003C;"), (r"\bad{<b>\frac{", "<code>")]
)
def test_tex_becomes_mathml_or_stays_tex(tex, wanted):
    shown = report.mathml(tex)
    assert wanted in shown and "<b>" not in shown


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
    about = dict.fromkeys(COLUMNS, "") | ROW | {"dataset": "<script>alert(1)</script>", "arch": "a&b", "rho": 0.1}
    rows = [about | {"optimizer": "sgd"}, about | {"optimizer": "sam", "baseline": "sgd"}]
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    book(tmp_path / "01_a.ipynb", new_markdown_cell("# A <script>title</script> é"))
    report.build(tmp_path)
    index = pages(tmp_path)["index.html"]
    assert not Tags(index).named("script") and "&lt;script&gt;alert(1)" in index and "a&amp;b" in index
    assert "&lt;script&gt;title" in index and "&#233;" in index


def test_only_what_is_there_is_linked_and_a_second_report_replaces_the_first(tmp_path):
    shutil.copy(RUN / "results.csv", tmp_path)
    first = report.build(tmp_path).read_text()
    assert links_of(first) == ["../results.csv"]
    assert ", 0 not run" not in first
    book(tmp_path / "03_new.ipynb", new_markdown_cell("# New"))
    assert "03_new.html" in report.build(tmp_path).read_text()


def test_nothing_there_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="out=.*make study"):
        report.build(tmp_path)
    assert not (tmp_path / "report").exists()
    for words in ([f"OUT={tmp_path}"], ["DATASETT=x"]):
        assert command_line.main(["--report", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def control(experiment, coordinate, metric, values, low, high, attacks=("gap", "loss", "lira")):
    """Rows of a control, one an attack."""
    about = dict.fromkeys(COLUMNS, "") | {"notebook": "01", "experiment": experiment, "coordinate": coordinate}
    numbers = zip(attacks, values, low, high, strict=True)
    return [about | dict(attack=a, value=v, ci_low=low, ci_high=high, metric=metric, n_models=16)
            for a, v, low, high in numbers]  # fmt: skip


def test_the_controls_are_counted_from_the_rows(tmp_path):
    rows = control("null control", "", "auc", (0.5, 0.52, 0.47), (0.49, 0.51, 0.46), (0.51, 0.53, 0.51))
    rows += control("planted leak", "times=50", "planted_pairs_found", (1, 1, 0.5), (0.6, 0.6, 0.2), (1, 1, 0.8))
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    items = re.findall(r"<li>(.*?)</li>", report.build(tmp_path).read_text())
    null, many = (next(i for i in items if i.startswith(word)) for word in ("Null", "Planted"))
    assert "2 of 3 attacks" in null and "lira with 0.470" in null and "loss" in null
    assert "50&#215;" in many and "2 of 3 attacks" in many and "8 pairs" in many and "lira" in many


PARTS = {
    "study": ["For engineers", "Verdicts", "Evidence", "Appendix"],
    "audit": ["For engineers", "Families of attacks", "Fit", "Figures", "Limits", "Appendix"],
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_page_answers_first_and_folds_what_each_attack_says(kind, studied, audited):
    out = {"study": studied, "audit": audited}[kind]
    text = pages(out)["index.html"]
    headings = re.findall('<h2 id="([^"]+)">([^<]+)</h2>', text)
    contents = re.search("<nav>(.*?)</nav>", text)[1]
    assert [name for _, name in headings] == PARTS[kind]
    assert re.findall('href="#([^"]+)">([^<]+)<', contents) == headings
    picture, first = text.index("<img"), text.index("<h2")
    assert text.index("<h1") < text.index("<nav>") < picture < first < text.index("<table")
    answer = (
        verdict.headline(verdict.ledger(read(out / "results.csv"))) if kind == "study" else "sam leaks more than sgd"
    )
    assert answer in text[:picture]
    assert text.count("What to do:") == 1 and text.index("What to do:") < text.index(headings[1][0] + '">', first)
    appendix = text[text.index("Appendix</h2>") :]
    folded = "".join(re.findall("<details>.*?</details>", appendix, flags=re.S))
    assert "Each attack by itself" in folded and appendix.count("<table") == folded.count("<table") > 0


def test_every_number_of_the_pages_is_in_results_csv(studied, audited):
    for out, least in ((studied, 3), (audited, 60)):
        rows = pd.read_csv(out / "results.csv")
        text = pages(out)["index.html"].split("<h2", 1 if out == audited else 2)
        text = " ".join(text if out == audited else text[1:2])
        found = re.findall(r"([-+]?\d[\d.]*) \[([-+]?[\d.]+), ([-+]?[\d.]+)\]", text)
        assert len(found) >= least
        numbers = rows[["value", "ci_low", "ci_high"]].to_numpy()
        for triple in found:
            wanted = np.array(triple, float)
            half = [0.51 * 10.0 ** -len(t.partition(".")[2]) for t in triple]
            near = (abs(numbers[..., None] * [1, 100] - wanted[:, None]) <= np.array(half)[:, None]).all(1)
            assert near.any(), triple


def test_engineers_are_told_precision_and_who_is_exposed_again(studied):
    text = pages(studied)["index.html"]
    assert "if 10% of the candidates are, at 0.1% FPR</th>" in text and "<td>79.9 [68.5, 87.9]</td>" in text
    again = "of a hundred whom one half of the models names, the other half names 62.5 [40, 81], by chance 1."
    assert f"the most exposed examples are 7 and 3; {again}" in text


def advice(values, low, prefer="", over=""):
    """What a page says to do, given a null control's AUCs and the low end of the audit's."""
    null = control("null control", "", "auc", values, np.array(values) - 0.01, np.array(values) + 0.01)
    own = control("main", "", "auc", (0.6,), (low,), (0.7,), ("rmia",))
    text = report.for_engineers(pd.DataFrame([*null, *(row | {"optimizer": "<a>"} for row in own)]), prefer, over)
    return re.search("What to do:</b> ([^;]+);", text.replace("&lt;", "<").replace("&gt;", ">"))[1]


def test_what_to_do_follows_from_the_numbers():
    fine = (0.5, 0.505, 0.495)
    assert (
        advice(fine, 0.55, "sgd", "sam") == "prefer sgd to sam where it is accurate enough, and audit what you release"
    )
    assert advice(fine, 0.55, "", "sgd and sam").startswith("choose between sgd and sam by test accuracy")
    assert advice(fine, 0.55) == "do not release <a> if membership is a secret"
    assert advice(fine, 0.45).startswith("treat this as no proof")
    assert advice((0.5, 0.53, 0.5), 0.55, "sgd", "sam").startswith("look for a fault first")


def test_a_headline_attack_speaks_where_one_ran():
    rows = control("main", "", "auc", (0.9, 0.6, 0.7), (0.5,) * 3, (1,) * 3, ("loss", "rmia", "combined"))
    assert [*report.strongest(pd.DataFrame(rows)).attack] == ["combined"]
    assert [*report.strongest(pd.DataFrame(rows[:1])).attack] == ["loss"]
    assert report.strongest(pd.DataFrame(columns=COLUMNS)).empty


def test_set_up_is_folded(tmp_path):
    kinds = {"opening": ["setup"], "given": ["parameters"], "science": []}
    tagged = [new_code_cell(source, metadata={"tags": tags}) for source, tags in kinds.items()]
    book(tmp_path / "02_some.ipynb", *tagged)
    report.build(tmp_path)
    (folded,) = re.findall(r"<details>.*?</details>", pages(tmp_path)["02_some.html"], flags=re.S)
    assert "opening" in folded and "given" in folded and "science" not in folded


def test_a_bad_results_file_is_named(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    assert command_line.main(["--report", f"OUT={tmp_path}"]) == 2
    assert "results.csv" in capsys.readouterr().err and not (tmp_path / "report").exists()


def test_the_command_line_names_the_page(tmp_path, capsys):
    shutil.copy(RUN / "results.csv", tmp_path)
    assert command_line.main(["--report", f"OUT={tmp_path}"]) == 0
    assert str(tmp_path / "report" / "index.html") in capsys.readouterr().out


# ---- pages --------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "<b onclick='alert(1)'>b</b>",
    "<a href='javascript:alert(1)'>a</a>", "<a href='jAva\tscript&colon;alert(1)'>a</a>", "<iframe src=//x></iframe>",
    "<a href=' data:text/html,<script>alert(1)</script>'>a</a>", "<form action=javascript:alert(1)><button>x</form>",
    "[a](javascript:alert(1))", "![a](https://example.org/x.png)", "<object data=x></object><embed src=x>",
    "<style>@import 'https://example.org/x.css'</style>", "<style>a{background:url(//x)}</style>",
    "<link rel=stylesheet href=//x>", "<meta http-equiv=refresh content='0;url=//x'>", "<base href=//x>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></mglyph></table></mtext></math>",
    "<style><!--</style><img src=x onerror=alert(1)>-->", "</title></style></body><script>alert(1)</script>",
    '"><script>alert(1)</script>', "'onmouseover='alert(1)", "<<script>alert(1)//<</script>", "<p style='x:url(//x)'>p",
    "<details open ontoggle=alert(1)>d", "<video><source onerror=alert(1)></video>", "<script",
    "<a href='da\tta:text/html,<script>alert(1)</script>'>a</a>", "<a href=vbscript:x>a</a>",
    "<img src=x onerror=alert(1)", "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>", "<plaintext>",
    "<math><annotation-xml encoding='text/html'><script>alert(1)</script></annotation-xml></math>",
    "$x<img src=x onerror=alert(1)>$", "<textarea><script>",
]  # fmt: skip
BAD_TAGS = (
    "script iframe object embed svg link base form button input video audio source applet frame noscript template"
)


def tree_of(page):
    """The elements of a page as a browser builds them: [(tag, attributes)]."""
    html5lib = pytest.importorskip("bleach._vendor.html5lib")
    found = html5lib.parse(page, namespaceHTMLElements=False).iter()
    return [(str(e.tag).split("}")[-1], dict(e.attrib), e.text) for e in found if isinstance(e.tag, str)]


def assert_harmless(page):
    """No element that runs or loads, no handler, no link with a script, and a policy that forbids them."""
    elements = tree_of(page)
    assert not {tag for tag, _, _ in elements} & set(BAD_TAGS.split())
    for tag, attributes, text in elements:
        assert not [name for name in attributes if name.lower().startswith("on") or name in ("style", "srcset")], tag
        for name in ("href", "src", "action", "data"):
            url = re.sub(r"[\x00-\x20]", "", attributes.get(name, "")).lower()
            assert not re.match(r"(javascript|vbscript|data(?!:image/(png|jpeg|gif|webp);)):?", url), url
        assert tag != "img" or attributes.get("src", "data:").startswith("data:")
        assert tag != "style" or not re.search(r"@import|url\(", text or "")
        assert tag != "meta" or attributes.get("http-equiv", "Content-Security-Policy") == "Content-Security-Policy"
    policies = [a["content"] for tag, a, _ in elements if tag == "meta" and "http-equiv" in a]
    assert policies == [report.POLICY] and "script-src" not in report.POLICY and "default-src 'none'" in report.POLICY


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_runs_that_a_page_is_given(text):
    for wrapped in (text, f"<table><tr><td>{text}</td></tr></table>", f"<math><mi>{text}</mi></math>", f"<pre>{text}"):
        once = report.clean(wrapped)
        assert_harmless(report.page(text, wrapped))
        assert_harmless(report.page(text, once))


def test_the_judge_of_pages_sees_a_script():
    good = report.page("t", "<p>x</p>")
    assert_harmless(good)
    for bad in ("<script>1</script>", "<img src=x>", "<p onclick=1>", "<a href=javascript:1>", "<p style=x>"):
        with pytest.raises(AssertionError):
            assert_harmless(good.replace("<p>", f"{bad}<p>"))
    with pytest.raises(AssertionError):
        assert_harmless(good.replace("default-src", "x"))


def test_what_a_page_needs_stays():
    kept = (
        '<h1 id="a">A &amp; B</h1><p>a <strong>b</strong> <code>x &lt; y</code></p><table><tbody><tr><td colspan="2">1'
        '</td></tr></tbody></table><a href="01_x.html">one</a><a href="https://arxiv.org/abs/2310.00488">two</a>'
        '<a href="mailto:a@b.c">three</a><img alt="a" src="data:image/png;base64,AAAA"><style>#T_a td { color: red }'
        '</style><math display="block"><mi mathvariant="bold">x</mi></math><details></details>'
    )
    assert report.clean(kept) == kept


def hostile_notebook(path):
    """An executed notebook whose text and outputs hold all that is hostile."""
    every = "\n\n".join(HOSTILE)
    outputs = [new_output("display_data", {kind: every, "text/plain": "x"}) for kind in
               ("text/html", "text/markdown", "image/svg+xml", "application/javascript", "text/latex")]  # fmt: skip
    outputs.append(new_output("stream", name="stdout", text=every))
    outputs.append(new_output("error", ename=HOSTILE[0], evalue=HOSTILE[1], traceback=HOSTILE))
    cells = [new_markdown_cell(f"# {HOSTILE[0]}\n\n{every}"), new_code_cell(f'x = """{every}"""', outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), path)


def test_reports_of_hostile_data_have_no_script(tmp_path):
    rows = []
    for text in ("".join(HOSTILE), *HOSTILE[:4]):
        for optimizer, baseline in (("sgd", ""), ("sam", "sgd")):
            row = dict.fromkeys(COLUMNS, text) | ROW | {"optimizer": optimizer, "baseline": baseline, "attack": ""}
            rows.append(row | {"dataset": text, "arch": text, "rho": 0.1, "n_examples": 80})
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    hostile_notebook(tmp_path / "01_<img src=x onerror=alert(1)>.ipynb")
    report.build(tmp_path)
    pages = list((tmp_path / "report").glob("*.html"))
    assert len(pages) == 2
    for page in pages:
        assert_harmless(page.read_text())
        assert "alert(1)" in page.read_text()  # it is shown, as text


def audit_of_hostile_names(out):
    """An audit of files whose names are hostile, in folder `out`."""
    rng, member = np.random.default_rng(0), np.arange(40) % 2 == 0
    arrays = {"logits": rng.normal(size=(40, 2)), "y": np.arange(40) // 2 % 2, "member": member}
    names = (HOSTILE[0], HOSTILE[1], "<a href='javascript:alert(1)'>a")
    own_logits.audit({name: {**arrays, "logits": arrays["logits"] + k} for k, name in enumerate(names)}, out)


def test_the_audit_of_hostile_names_has_no_script(tmp_path):
    audit_of_hostile_names(tmp_path / "out")
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert_harmless(page)
    assert "alert(1)" in page

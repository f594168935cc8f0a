"""Sentences and tables from tidy frames: the one row, numbers as text, and what controls say."""

import html
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from nbconvert.filters.markdown_mistune import MarkdownWithMath

from lib.study import figures, report, text

FRAME = pd.DataFrame(
    [("sgd", "", "auc", "lira", 0.6, 0.5, 0.7), ("sam", "", "auc", "lira", 0.7, 0.6, 0.8),
     ("sam", "sgd", "auc", "lira", 0.1, 0.05, 0.15), ("sam", "sgd", "auc", "gap", -0.1, -0.15, 0.05)],
    columns=["optimizer", "baseline", "metric", "attack", "value", "ci_low", "ci_high"],
)  # fmt: skip


def test_select_finds_the_one_row_and_names_what_it_sought():
    assert text.select(FRAME, optimizer="sam").value == 0.7  # an optimizer's own value
    assert text.select(FRAME, optimizer="sam", baseline="sgd", attack="gap").value == -0.1
    assert text.select(FRAME.drop(columns="baseline"), value=0.6).optimizer == "sgd"
    for wanted, rows in ((dict(optimizer="adam"), "0 rows"), (dict(metric="auc"), "2 rows")):
        ((name, value),) = wanted.items()
        with pytest.raises(ValueError, match=f"{rows}.*'{name}': '{value}'.*'baseline': ''"):
            text.select(FRAME, **wanted)


def test_a_difference_is_told_from_an_own_value():
    assert list(text.series(FRAME)) == ["sgd", "sam", "sam − sgd", "sam − sgd"]


@pytest.mark.parametrize(
    "row, wanted",
    [((0.634, 0.62, 0.648), "0.634 [0.620, 0.648]"), ((0.0012, 0.001, 0.0014), "0.00120 [0.00100, 0.00140]"),
     ((0.5, float("nan"), float("nan")), "0.500"), ((0.0, 0.0, 0.0), "0.000")],
)  # fmt: skip
def test_numbers_have_the_digits_that_their_size_calls_for(row, wanted):
    assert text.number(pd.Series(row, index=["value", "ci_low", "ci_high"])) == wanted


@pytest.mark.parametrize("low, high, word", [(0.1, 0.3, "more"), (-0.3, -0.1, "less"), (-0.1, 0.1, "neither")])
def test_words_follow_the_interval(low, high, word):
    row = pd.Series({"value": (low + high) / 2, "ci_low": low, "ci_high": high})
    assert text.describe_sign(row, "more", "less", "neither") == word
    assert text.percentage_points(row).startswith(f"{50 * (low + high):+.1f} points [{100 * low:+.1f}")


NAMES = ["$0_to_$10", "__a_b_", r"a\$b", "<b>", "</td>", "{1}", "50%", r"\alpha \( x \)", "a < 2"]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_data_are_shown_letter_by_letter(monkeypatch, name):
    """As the report and Jupyter render them: Markdown, then a page whose text is the name, with no tag but span's."""
    shown = []
    monkeypatch.setattr(text, "display", shown.append)
    text.show_text(f"**{name}** leaks: `{name}`")
    rendered = MarkdownWithMath(report.Renderer(escape=False)).render(shown[0].data)
    assert html.unescape(re.sub("</?(p|strong|code|span)>", "", rendered)).strip() == f"{name} leaks: {name}"
    assert "$" not in re.sub("`.*`", "", shown[0].data)
    text.show_table(FRAME[:2].assign(optimizer=name, attack=[name, "lira"], baseline=""), across=["optimizer"])
    cells = re.findall("<th [^>]*>(.*?)</th>", shown[1].to_html())
    assert [html.unescape(cell) for cell in cells].count(name) == 2 and not any("<" in cell for cell in cells)


def test_names_from_data_are_text_in_a_figure():
    figure, axis = plt.subplots()
    for name in NAMES:
        axis.plot([0, 1], label=figures.plain(name))
    said = axis.legend().get_texts()
    assert [drawn._preprocess_math(drawn.get_text())[0].strip() for drawn in said] == NAMES
    assert not any(drawn._preprocess_math(drawn.get_text())[1] for drawn in said)  # none is mathematics
    plt.close(figure)


def test_names_are_joined():
    assert [text.joined("abc"[:n]) for n in range(4)] == ["none", "a", "a and b", "a, b and c"]


def test_a_table_has_a_column_for_each_optimizer_and_difference(monkeypatch):
    shown = []
    monkeypatch.setattr(text, "display", shown.append)
    text.show_table(FRAME)
    text.show_table(FRAME[:0])
    assert list(shown[0].data.columns) == ["sgd", "sam", "sam − sgd"] and list(shown[0].data.index) == ["lira", "gap"]
    assert shown[0].data.loc["gap", "sgd"] == "" and len(shown) == 2


def test_controls_count_the_attacks_and_name_the_others():
    rows = pd.DataFrame({"attack": ["gap", "loss", "lira"], "value": [0.5, 0.52, 0.47], "n_models": 16,
                         "ci_low": [0.49, 0.51, 0.46], "ci_high": [0.51, 0.53, 0.51]})  # fmt: skip
    said = text.null_control(rows)
    assert "2 of 3 attacks" in said and "lira with 0.470" in said and "loss" in said
    found = text.planted_leak(rows.assign(ci_low=[0.6, 0.6, 0.4]))
    assert "2 of 3 attacks" in found and "8 pairs" in found and "lira" in found and "gap" not in found
    assert "too few" in text.planted_leak(rows.assign(n_models=8))

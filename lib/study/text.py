"""Sentences and tables computed from results, never typed. Frames: optimizer, metric, value, ci_low, ci_high."""

import re
from functools import partial

import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from lib import need

pd.set_option("styler.html.mathjax", False, "display.html.use_mathjax", False)  # a $ in a table is a dollar


def show_text(text):
    """Show a computed sentence as Markdown, without the mathematics and HTML that only names from data can bring in."""
    # code stays as it is; else what begins mathematics or a tag, an underscore at the edge of a word, a backslash
    special = r"`[^`]*`|\$|<(?=[a-zA-Z/!?])|(?<![^\W_])_|_(?![^\W_])|\\(?=[^\w\s])"
    spelt = {"$": "<span>&#36;</span>", "\\": "<span>&#92;</span>", "<": "&lt;", "_": r"\_"}  # no formula crosses a tag
    display(Markdown(re.sub(special, lambda found: spelt.get(found[0], found[0]), text)))


def number(row, form=None, unit="", scale=1):
    """'0.634 [0.620, 0.648]': value and interval, times a scale. form: by default 3 decimals, 5 of a small number."""
    form = form or (".5f" if 0 < np.nanmax([abs(row.value), row.ci_high - row.ci_low]) < 0.005 else ".3f")
    value, low, high = (f"{scale * v:{form}}" for v in (row.value, row.ci_low, row.ci_high))
    return f"{value}{unit}" + f" [{low}, {high}]" * bool(row.ci_low < row.ci_high)


of_hundred = partial(number, form=".3g", scale=100)  # '63.7 [62.6, 64.7]' of a share
percentage_points = partial(number, form="+.1f", unit=" points", scale=100)  # '+2.8 points [+2.1, +3.5]'


def wide(frame, across):
    """Values with their intervals as text: one row per attack, metric or optimizer, one column per `across`."""
    across, frame = list(across), frame.assign(optimizer=series(frame)) if "optimizer" in frame else frame
    rows = [c for c in ("attack", "metric", "optimizer") if c in frame and c not in across and frame[c].nunique() > 1]
    rows = rows or [c for c in ("metric", "attack", "optimizer") if c in frame and c not in across][:1]
    keys = frame[rows + across].apply(lambda column: pd.Categorical(column, column.unique()))
    keys["cell"] = [number(row) for row in frame.itertuples()]
    return keys.pivot(index=rows, columns=across, values="cell").fillna("")


def show_table(frame, across=("optimizer",)):
    """Show `wide`, or say that there is nothing to show."""
    if frame.empty:
        return show_text("*Too few counts to report any.*")
    style = wide(frame, across).style.format(escape="html")
    style = style.format_index(escape="html").format_index(axis=1, escape="html")
    display(style.set_properties(**{"text-align": "right", "white-space": "nowrap"}))


def select(frame, baseline="", **columns):
    """The one row of a tidy frame whose columns have these values: baseline "sgd" for a difference from SGD."""
    wanted = columns | ({"baseline": baseline} if baseline or "baseline" in frame else {})
    found = frame[(frame[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    need(len(found) == 1, f"{len(found)} rows have {wanted}; valid is what exactly one row has")
    return found.iloc[0]


def series(frame):
    """The optimizer of each row as a reader should see it: 'sam', or 'sam − sgd' for a difference."""
    minus = " − " + frame.get("baseline", pd.Series("", frame.index))
    return frame.optimizer + minus.where(minus != " − ", "")


def sign(row):
    """1 or -1 if the interval of a difference lies on one side of 0, else 0."""
    return int(row.ci_low > 0) - int(row.ci_high < 0)


def describe_sign(row, more, less, neither):
    """The words that the interval of a difference allows."""
    return {1: more, -1: less, 0: neither}[sign(row)]


def joined(names):
    """'a, b and c'; 'none' of nothing."""
    names = list(names)
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "none"


def null_control(rows):
    if rows.empty:
        return "not run."
    outside = rows.attack[(rows.ci_low > 0.5) | (rows.ci_high < 0.5)]
    furthest = rows.loc[(rows.value - 0.5).abs().idxmax()]
    said = f"{len(rows) - len(outside)} of {len(rows)} attacks have 0.5 within their 95% interval; outside: "
    return said + f"{joined(outside)}. The furthest is {furthest.attack} with {furthest.value:.3f}."


def planted_leak(rows):
    pairs, missed = int(rows.n_models.max()) // 2, rows.attack[rows.ci_low <= 0.5]
    if pairs < 6:
        return f"{pairs} pairs are too few to say: with every one found, the interval would still hold 0.5."
    said = f"{len(rows) - len(missed)} of {len(rows)} attacks find, of two models, the one that was trained on it, "
    return said + f"in more of {pairs} pairs than chance allows; not: {joined(missed)}."

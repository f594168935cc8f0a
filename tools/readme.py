"""Fill in the README's picture and tables from the committed runs: `python -m tools.readme` (part of `make sync`).

No result in the README is typed: what stands between `<!-- name -->` and `<!-- /name -->` is made here from
outputs/reference/, and a test compares the two.
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.study import figures, verdict
from lib.study.text import describe_sign, joined, percentage_points, sign
from tools import costs

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs" / "reference"
FITS = 0.99  # a model that fits so much of its training half is said to interpolate it


def runs():
    """The committed runs: dict name -> results frame."""
    return {p.parent.name: pd.read_csv(p, keep_default_na=False) for p in sorted(REFERENCE.glob("*/results.csv"))}


def regimes(results):
    """Paired differences at every number of epochs, with the baseline's train accuracy beside them."""
    rows = results[results.note.str.startswith("epochs=")].copy()
    rows["epochs"] = rows.note.str.removeprefix("epochs=").astype(int)
    for column in ("value", "ci_low", "ci_high"):
        rows[column] = rows[column].astype(float)
    fit = rows[(rows.optimizer == "sgd") & (rows.metric == "train_accuracy")].set_index("epochs").value
    differences = rows[rows.optimizer == "sam-sgd"]
    return differences.assign(train_accuracy=differences.epochs.map(fit))


def title(results):
    """'digits, mlp: 128 models on halves of 1200', the models being those of the lengths of training."""
    first = results[results.note.str.startswith("epochs=")].iloc[0]
    return f"{first.dataset}, {first.arch}: {first.n_models} models on halves of {first.n_examples}"


def counted(signs):
    """'more in 3 of 5 comparisons, less in 1', from the signs of differences; 'in none' of none."""
    kinds = [(word, signs.count(s)) for s, word in ((1, "more"), (-1, "less"), (0, "no differently")) if s in signs]
    if not kinds:
        return "in none"
    (word, count), *others = kinds
    return f"{word} in {count} of {len(signs)} comparisons" + "".join(f", {word} in {n}" for word, n in others)


def answer():
    """The finding in plain words, computed from the paired differences of every committed run."""
    made = runs()
    frames = {name: regimes(results).query("metric == 'auc'").sort_values("epochs") for name, results in made.items()}
    rows = [row for frame in frames.values() for row in frame.itertuples()]
    fitted = [sign(row) for row in rows if row.train_accuracy >= FITS]
    short = [sign(row) for row in rows if row.train_accuracy < FITS]
    last = {name: sign(next(frame.iloc[-1:].itertuples())) for name, frame in frames.items()}
    equal = [sign(row) for results in made.values() for row in equal_rows(results)]
    signs = {sign(row) for row in rows}
    head = "Always, in these runs." if signs == {1} else "Not in these runs." if 1 not in signs else "Sometimes."
    ends = "; ".join(
        f"{word} on {joined(name for name, s in last.items() if s == wanted)}"
        for wanted, word in ((1, "more"), (-1, "less"), (0, "no differently"))
        if wanted in last.values()
    )
    return (
        f"**{head}** After the longest training SAM leaks {ends}. Where SGD fits at least {FITS:.0%} of its own half, "
        f"SAM leaks {counted(fitted)}; short of that, {counted(short)}. At equal train loss, it leaks "
        f"{counted(equal)}. ({len(made)} runs, leakage by the AUC of the attack LiRA.)"
    )


def results_table():
    """A line per run and number of epochs: what SAM gains, what it leaks."""
    lines = [
        "| run | epochs | SGD fits | test accuracy, SAM − SGD | LiRA AUC, SAM − SGD | SAM leaks |",
        "|---|---|---|---|---|---|",
    ]
    for results in runs().values():
        wide = regimes(results)
        for epochs, rows in wide.groupby("epochs"):
            test, auc = (rows[rows.metric == m].iloc[0] for m in ("test_accuracy", "auc"))
            word = describe_sign(auc, "**more**", "**less**", "no differently")
            lines.append(
                f"| {title(results)} | {epochs} | {auc.train_accuracy:.1%} | {percentage_points(test)} | {percentage_points(auc)} | {word} |"
            )
    return "\n".join(lines)


def equal_rows(results):
    """The paired differences of LiRA's AUC at equal train loss, as a list of named tuples."""
    rows = results[results.note.str.startswith("at equal train loss")]
    return list(rows.astype({"value": float, "ci_low": float, "ci_high": float}).itertuples())


def equal_table():
    """A line per run and train loss at which both optimizers can be compared."""
    lines = [
        "| run | train loss (nats), and the SGD runs about it | LiRA AUC, SAM − SGD | SAM leaks |",
        "|---|---|---|---|",
    ]
    for results in runs().values():
        for row in equal_rows(results):
            loss, between = row.note.removeprefix("at equal train loss ").split(", baseline between ")
            word = describe_sign(row, "**more**", "**less**", "no differently")
            lines.append(f"| {title(results)} | {loss} ({between}) | {percentage_points(row)} | {word} |")
    return "\n".join(lines)


def finding(runs):
    """The study in one picture: what SAM gains in test accuracy and what it costs in LiRA's AUC, epoch by epoch.

    runs: dict title -> tidy frame of the paired differences with columns epochs, metric, value, ci_low, ci_high,
    train_accuracy (of the baseline).
    """
    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    size = (4.9 * columns, 3.7 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    labels = {"auc": "leakage: AUC of LiRA", "test_accuracy": "test accuracy"}
    for spare in axes.flat[len(runs) :]:
        spare.set_axis_off()
    for axis, (title, frame) in zip(axes.flat, runs.items(), strict=False):
        for index, (metric, label) in enumerate(labels.items()):
            rows = 100 * frame[frame.metric == metric].set_index("epochs").sort_index()[["value", "ci_low", "ci_high"]]
            figures.error_bars(axis, np.arange(len(rows)) + 0.06 * index, rows, 1 - index, label)
        fits = frame[frame.metric == "auc"].sort_values("epochs")
        ticks = [f"{row.epochs} epochs\n(SGD fits {row.train_accuracy:.0%})" for row in fits.itertuples()]
        axis.set_xticks(range(len(ticks)), ticks, fontsize=9)
        axis.axhline(0, color="0.3", lw=1)
        axis.set(title=title, ylabel="SAM minus SGD, points")
        axis.margins(x=0.12)
    if len(runs) < axes.size:  # the empty place is for the legend
        axes.flat[-1].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", fontsize=12)
    else:
        axes[0, 0].legend(fontsize=10)
    return figure


def bench_table():
    """The committed output of `make bench`: goals missed are marked; when, where and how each part was measured."""
    bench = pd.read_csv(REFERENCE / "bench.csv", keep_default_na=False)
    lines = ["| what | value | against | ratio | goal | met |", "|---|---|---|---|---|---|"]
    for row in bench.itertuples():
        value, met = f"{row.value} {row.unit}".strip(), row.met.replace("no", "**no**")
        lines.append(f"| {row.name} | {value} | {row.baseline} | {row.ratio} | {row.goal} | {met} |")
    lines.append("")
    for (command, date, machine), rows in bench.groupby(["command", "date", "machine"], sort=False):
        lines.append(f"- {', '.join(rows.section.unique())}: `{command}`, {date}, {machine}.")
    if (REFERENCE / "bench_scaling.png").exists():
        caption = "Seconds against models, examples and weights, with the slopes of their logarithms"
        lines += ["", f"![{caption}](outputs/reference/bench_scaling.png)"]
    return "\n".join(lines)


def faults_table():
    """The committed output of `make faults`: how every disturbed run ended."""
    found = pd.read_csv(REFERENCE / "faults.csv", keep_default_na=False)
    lines = ["| fault | cases | same result | one clear error | neither | of these |", "|---|---|---|---|---|---|"]
    for row in found.itertuples():
        counts = f"{row.cases} | {row.same_result} | {row.clear_error} | {row.neither}"
        lines.append(f"| {row.fault} | {counts} | {row.note} |")
    return "\n".join([*lines, "", f"`{found.command[0]}`, {found.date[0]}, {found.machine[0]}."])


def verdict_table():
    """A line per claim, a column per run: the verdicts by rule, the attacks of each run counted in one cell."""
    ledgers = {p.parent.name: verdict.ledger(verdict.read(p)) for p in sorted(REFERENCE.glob("*/results.csv"))}
    lines = [f"| claim | whose | {' | '.join(ledgers)} |", "|---" * (2 + len(ledgers)) + "|"]
    attacks = {}
    for name, ledger in ledgers.items():
        counts = ledger[ledger.claim.str.startswith("leaks_more_")].verdict.value_counts()
        attacks[name] = ", ".join(f"{counts[word]} {word}" for word in verdict.SHADES if word in counts)
    first = next(iter(ledgers.values()))
    for row in first[~first.claim.str.startswith("leaks_more_")].itertuples():
        cells = [ledger[ledger.claim == row.claim].verdict.iloc[0] for ledger in ledgers.values()]
        lines.append(f"| {row.statement} | {row.whose} | {' | '.join(cells)} |")
    counted = f"| SAM leaks more than SGD, by attack ({counts.sum()}). | the paper's | {' | '.join(attacks.values())} |"
    lines.insert(3, counted)
    return "\n".join(lines)


def failing():
    """Which optimizers, with their default options at the run's radius, test worse than SGD: a point of a list.

    SharpReg is none of them: it seeks sharp minima and is meant to cost accuracy.
    """
    said = []
    for name, results in runs().items():
        rows = results[(results.note == "variants") & (results.metric == "test_accuracy")]
        rows = rows[rows.optimizer.str.endswith("-sgd")].astype({"ci_low": float, "ci_high": float})
        rows = rows[~rows.optimizer.str.startswith("sharpreg")]
        worse = [row.optimizer.removesuffix("-sgd") for row in rows.itertuples() if sign(row) < 0]
        said += [f"{joined(worse)} on {name}"] if worse else []
    return f"- A default may fail. With the options they have by default, these test worse than SGD: {'; '.join(said)}."


def costs_table():
    """What a run costs, by preset."""
    return costs.table([path.parent for path in sorted(REFERENCE.glob("*/results.csv"))])


def filled(text):
    """The README with its tables made anew."""
    tables = {"answer": answer, "costs": costs_table, "results": results_table, "equal": equal_table}
    tables |= {"verdict": verdict_table, "bench": bench_table, "faults": faults_table}
    tables |= {"failing": failing}
    for name, made in tables.items():
        table = made()
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.S
        )
    return text


def main():
    """Write the picture and the tables."""
    figures.style()
    figure = finding({title(results): regimes(results) for results in runs().values()})
    figure.savefig(REFERENCE / "finding.png")
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()

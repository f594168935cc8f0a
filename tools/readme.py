"""Fill in the picture and the tables of README.md and docs/: `python -m tools.readme` (part of `make sync`).

No result is typed there. What stands between `<!-- name -->` and `<!-- /name -->` is made by the function of that name
in TABLES, from outputs/reference/ and from the library; a test compares the two.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.study import figures, settings, verdict
from lib.study.results import read
from lib.study.text import describe_sign, joined, percentage_points, sign
from tools import costs

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs" / "reference"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIRA = ("", "lira", "lira_shrunk")  # the attack of the sweeps: runs since November 2026 have lira_shrunk and others
WORDS = "**more**", "**less**", "no differently"


# ---- the committed runs -------------------------------------------------------------------------------------


def runs():
    """The committed runs: dict name -> results frame, with numbers where they are recorded and "" elsewhere."""
    numbers = dict.fromkeys(("value", "ci_low", "ci_high"), "")
    paths = sorted(REFERENCE.glob("*/results.csv"))
    return {p.parent.name: pd.read_csv(p, keep_default_na=False, na_values=numbers) for p in paths}


def lengths(results):
    """SAM minus SGD in the length sweep, with columns epochs and the train accuracies sgd and sam."""
    rows = results[(results.experiment == "length sweep") & results.attack.isin(LIRA)]
    rows = rows.assign(epochs=rows.coordinate.str.removeprefix("epochs=").astype(int))
    own = rows[(rows.metric == "train_accuracy") & (rows.baseline == "")]
    fits = own.pivot(index="epochs", columns="optimizer", values="value")
    return rows[rows.baseline == "sgd"].join(fits, on="epochs").sort_values("epochs")


def leaks(results):
    """The rows of `lengths` on LiRA's AUC, as named tuples."""
    return list(lengths(results).query("metric == 'auc'").itertuples())


def equal_loss(results):
    """SAM minus SGD in LiRA's AUC at equal train loss, as named tuples."""
    rows = results[(results.experiment == "equal train loss") & (results.notebook == "01_phenomenon")]
    return list(rows[rows.attack.isin(LIRA)].itertuples())


def title(results):
    """'digits, mlp: 128 models on halves of 1200', the models being those of the length sweep."""
    first = results[results.experiment == "length sweep"].iloc[0]
    return f"{first.dataset}, {first.arch}: {first.n_models} models on halves of {first.n_examples}"


# ---- the finding --------------------------------------------------------------------------------------------


def counted(rows):
    """'more in 3 of 5 comparisons, less in 1', from differences; 'in none' of none."""
    signs = [sign(row) for row in rows]
    kinds = [(word, signs.count(s)) for s, word in ((1, "more"), (-1, "less"), (0, "no differently")) if s in signs]
    if not kinds:
        return "in none"
    (word, count), *others = kinds
    return f"{word} in {count} of {len(signs)} comparisons" + "".join(f", {word} in {n}" for word, n in others)


def answer():
    """The finding in two sentences, from the paired differences of every committed run."""
    made = runs().values()
    rows = [row for results in made for row in leaks(results)]
    both, short = ([row for row in rows if (min(row.sgd, row.sam) >= verdict.FITS) == fit] for fit in (True, False))
    signs = {sign(row) for row in rows}
    head = "Always, in these runs" if signs == {1} else "Not in these runs" if 1 not in signs else "Sometimes"
    return (
        f"**{head}:** where both optimizers fit at least {verdict.FITS:.0%} of their training data, SAM leaks "
        f"{counted(both)}; where one of them does not, {counted(short)}. At equal train loss, SAM "
        f"leaks {counted([row for results in made for row in equal_loss(results)])} ({len(made)} runs; leakage is the "
        "AUC of the attack LiRA)."
    )


def ends():
    """Where SAM leaks more, less or no differently after the longest training."""
    last = {name: sign(leaks(results)[-1]) for name, results in runs().items()}
    said = [
        f"{word} on {joined(name for name, s in last.items() if s == wanted)}"
        for wanted, word in ((1, "more"), (-1, "less"), (0, "no differently"))
        if wanted in last.values()
    ]
    return f"After the longest training SAM leaks {'; '.join(said)}."


def finding(runs):
    """The study in one picture: what SAM gains in test accuracy and what it costs in LiRA's AUC, epoch by epoch.

    runs: dict title -> frame as from `lengths`.
    """
    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    size = (4.9 * columns, 3.7 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for spare in axes.flat[len(runs) :]:
        spare.set_axis_off()
    for axis, (heading, frame) in zip(axes.flat, runs.items(), strict=False):
        for index, (metric, label) in enumerate(
            {"auc": "leakage: AUC of LiRA", "test_accuracy": "test accuracy"}.items()
        ):
            rows = 100 * frame[frame.metric == metric].set_index("epochs")[["value", "ci_low", "ci_high"]]
            figures.error_bars(axis, np.arange(len(rows)) + 0.06 * index, rows, 1 - index, label)
        fits = frame[frame.metric == "auc"]
        ticks = [f"{row.epochs} epochs\nfit {100 * row.sgd:.0f}, {row.sam:.0%}" for row in fits.itertuples()]
        axis.set_xticks(range(len(ticks)), ticks, fontsize=9)
        axis.axhline(0, color="0.3", lw=1)
        axis.set(title=heading, ylabel="SAM minus SGD, points")
        axis.margins(x=0.12)
    if len(runs) < axes.size:  # the empty place is for the legend
        axes.flat[-1].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", fontsize=12)
    else:
        axes[0, 0].legend(fontsize=10)
    return figure


# ---- tables -------------------------------------------------------------------------------------------------


def table(header, rows):
    """A table in Markdown. header: names of the columns; rows: sequences of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def results():
    """A row for each run and number of epochs: what SAM gains, what it leaks."""
    header = "run", "epochs", "SGD fits", "SAM fits", "test accuracy, SAM − SGD", "LiRA AUC, SAM − SGD", "SAM leaks"
    rows = []
    for found in runs().values():
        for epochs, at in lengths(found).groupby("epochs"):
            test, auc = (at[at.metric == metric].iloc[0] for metric in ("test_accuracy", "auc"))
            differences = percentage_points(test), percentage_points(auc), describe_sign(auc, *WORDS)
            rows.append((title(found), epochs, f"{auc.sgd:.1%}", f"{auc.sam:.1%}", *differences))
    return table(header, rows)


def equal():
    """A row for each run and train loss at which both optimizers can be compared."""
    header = "run", "train loss (nats), and the SGD runs about it", "LiRA AUC, SAM − SGD", "SAM leaks"
    rows = []
    for found in runs().values():
        for row in equal_loss(found):
            at = dict(part.split("=") for part in row.coordinate.split(", "))
            where = f"{at['train_loss']} ({at['between']})"
            rows.append((title(found), where, percentage_points(row), describe_sign(row, *WORDS)))
    return table(header, rows)


def verdicts():
    """A row for each claim, with the day from which its rule holds, and a column for each run."""
    ledgers = {p.parent.name: verdict.ledger(read(p)) for p in sorted(REFERENCE.glob("*/results.csv"))}
    ledgers = {name: ledger.drop_duplicates("claim").set_index("claim") for name, ledger in ledgers.items()}
    rows = [
        [row.statement, row.whose, row.since, *(ledger.verdict[row.Index] for ledger in ledgers.values())]
        for row in next(iter(ledgers.values())).itertuples()
    ]
    return table(["claim", "whose", "since", *ledgers], rows)


def failing():
    """Which optimizers, with their default options at the run's radius, test worse than SGD: a point of a list.

    SharpReg is none of them: it seeks sharp minima and is meant to cost accuracy.
    """
    said = []
    for name, found in runs().items():
        rows = found[(found.experiment == "variants") & (found.metric == "test_accuracy") & (found.coordinate == "")]
        rows = rows[(rows.baseline == "sgd") & ~rows.optimizer.str.startswith("sharpreg")]
        worse = [row.optimizer for row in rows.itertuples() if sign(row) < 0]
        said += [f"{joined(worse)} on {name}"] if worse else []
    return f"- A default may fail. With the options they have by default, these test worse than SGD: {'; '.join(said)}."


def bench():
    """The committed output of `make bench`: goals missed are marked; when, where and how each part was measured."""
    found = pd.read_csv(REFERENCE / "bench.csv", keep_default_na=False)
    rows = [
        (r.name, f"{r.value} {r.unit}".strip(), r.baseline, r.ratio, r.goal, r.met.replace("no", "**no**"), r.limit)
        for r in found.itertuples()
    ]
    lines = [table(("what", "value", "against", "ratio", "goal", "met", "limit"), rows), ""]
    for (command, date, machine), rows in found.groupby(["command", "date", "machine"], sort=False):
        lines.append(f"- {', '.join(rows.section.unique())}: `{command}`, {date}, {machine}.")
    return "\n".join(lines)


def faults():
    """The committed output of `make faults`: how every disturbed run ended."""
    found = pd.read_csv(REFERENCE / "faults.csv", keep_default_na=False)
    header = "fault", "cases", "same result", "one clear error", "neither", "of these"
    columns = ["fault", "cases", "same_result", "clear_error", "neither", "note"]
    about = f"`{found.command[0]}`, {found.date[0]}, {found.machine[0]}."
    return f"{table(header, found[columns].to_numpy())}\n\n{about}"


def what_it_costs():
    """What a run costs, by preset."""
    return table(costs.COLUMNS, costs.rows([path.parent for path in sorted(REFERENCE.glob("*/results.csv"))]))


def parameters():
    """Every parameter of a run."""
    fields = settings.Parameters.model_fields.items()
    return table(("parameter", "meaning"), [(f"`{name}`", about.description) for name, about in fields])


def presets():
    """What the presets give, for tables and for images."""
    names = "arch", "n_models", "n_examples", "epochs", "batch_size", "rho", "augment"
    rows = [
        (f"`{preset}`", kind, *(f"{given[name]:,}" if type(given[name]) is int else given[name] for name in names))
        for preset, kinds in settings.PRESETS.items()
        for kind, given in kinds.items()
    ]
    return table(("preset", "data", *(f"`{name}`" for name in names)), rows)


def on_gpu():
    """The run on a GPU: what was trained, accuracies and the AUC of every attack, and what did not fit."""
    folder = REFERENCE / "cifar10_paper"
    models = json.loads((folder / "summary.json").read_text())["models"]
    recipe, n = models["sgd"]["recipe"], len(set(models["sgd"]["ids"]) & set(models["sam"]["ids"]))
    trained = (
        f"{recipe['arch']} for {recipe['epochs']} epochs at a peak learning rate of {recipe['lr']:g}, without "
        f"augmentation: {n} models of each optimizer."
    )
    found = pd.read_csv(folder / "audit" / "results.csv", keep_default_na=False)
    found = found[(found.experiment == "main") & found.metric.isin(["test_accuracy", "train_accuracy", "auc"])]
    rows = []
    for (metric, attack), own in found.groupby(["metric", "attack"], sort=False):
        name = f"AUC of {attack}" if attack else metric.replace("_", " ")
        cells = [percentage_points(row) if row.baseline else f"{row.value:.1%}" for row in own.itertuples()]
        rows.append((name, *cells))
    lines = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    fits = [f"{line[1].split(', ')[1]} {line[2]:.1%}" for line in lines if line[1].endswith("train accuracy")]
    moved = (
        f"With flips and shifts as many epochs did not suffice: of its half, one model of each fitted {joined(fits)}."
    )
    return "\n\n".join([trained, table(("", "SGD", "SAM", "SAM − SGD"), rows), moved])


TABLES = {"answer": answer, "costs": what_it_costs, "parameters": parameters, "presets": presets, "verdict": verdicts}
TABLES |= {"ends": ends, "results": results, "equal": equal, "failing": failing, "bench": bench, "faults": faults}
TABLES |= {"gpu": on_gpu}


def filled(text):
    """A page with what is computed in it made anew."""
    for name, made in TABLES.items():
        if f"<!-- {name} -->" in text:
            before, rest = text.split(f"<!-- {name} -->\n")
            _, after = rest.split(f"<!-- /{name} -->")
            text = f"{before}<!-- {name} -->\n{made()}\n<!-- /{name} -->{after}"
    return text


def main():
    """Write the picture and the pages."""
    figures.style()
    finding({title(found): lengths(found) for found in runs().values()}).savefig(REFERENCE / "finding.png")
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()

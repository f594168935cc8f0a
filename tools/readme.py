"""Fill in the picture and the tables of README.md and docs/: `python -m tools.readme` (part of `make sync`).

No result is typed there. What stands between `<!-- name -->` and `<!-- /name -->` is made by the function of that name
in TABLES, from outputs/reference/ and from the library; a test compares the two.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from lib.attacks import catalogue
from lib.study import figures, settings, verdict
from lib.study.results import read
from lib.study.text import describe_sign, joined, number, percentage_points, sign
from tools import costs

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs" / "reference"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADLINES = catalogue.HEADLINES
WORDS = "**more**", "**less**", "no differently"


# ---- the committed runs -------------------------------------------------------------------------------------


def runs():
    """The committed runs: dict name -> results frame, with numbers where they are recorded and "" elsewhere."""
    numbers = dict.fromkeys(("value", "ci_low", "ci_high"), "")
    paths = sorted(REFERENCE.glob("*/results.csv"))
    return {p.parent.name: pd.read_csv(p, keep_default_na=False, na_values=numbers) for p in paths}


def tuned_runs():
    """The committed runs in which both optimizers were tuned."""
    return {name: found for name, found in runs().items() if (found.experiment == "tuned").any()}


def lengths(results):
    """SAM minus SGD in the length sweep, with columns epochs and the train accuracies sgd and sam."""
    rows = results[(results.experiment == "length sweep") & results.attack.isin(["", HEADLINES[0]])]
    rows = rows.assign(epochs=rows.coordinate.str.removeprefix("epochs=").astype(int))
    own = rows[(rows.metric == "train_accuracy") & (rows.baseline == "")]
    fits = own.pivot(index="epochs", columns="optimizer", values="value")
    return rows[rows.baseline == "sgd"].join(fits, on="epochs").sort_values("epochs")


def title(results, experiment="length sweep"):
    """'digits, mlp: 128 models on halves of 1200', the models being those of an experiment."""
    first = results[results.experiment == experiment].iloc[0]
    return f"{first.dataset}, {first.arch}: {first.n_models} models on halves of {first.n_examples}"


# ---- the finding --------------------------------------------------------------------------------------------


def answer():
    """The headline of all committed runs, and in a word whether SAM leaks more where both are tuned and fit."""
    rows = pd.concat([read(path).assign(run=path.parent.name) for path in sorted(REFERENCE.glob("*/results.csv"))])
    ledger = verdict.ledger(rows)
    found = ledger.verdict[ledger.claim == "more_when_tuned"]
    fair = found[~found.isin(["not run", "not testable here"])]
    word = "Yes, in these runs" if (fair == "supported").all() else "Not in these runs"
    word = "Sometimes" if fair.nunique() > 1 else word if len(fair) else "Not testable in these runs"
    testable = rows[rows.run.isin(rows.run[rows.metric == "settings_that_fit"])]  # where tuned SAM fits
    fitted, better = (rows.value[rows.metric == name].sum() for name in ("settings_that_fit", "better_choices"))
    at = (testable.experiment == "frontier") & (testable.metric == "test_accuracy") & (testable.baseline == "sam")
    ends = testable[testable.metric == "auc_among_the_best"].groupby("run").value
    both, alike = ((ends.min() < 0) & (ends.max() > 0)).sum(), (testable.ci_high[at] >= 0).sum()
    said = f"Of {fitted:.0f} fitted settings of SGD, {alike} are about as accurate as tuned SAM; clearly leaking less "
    said += f"by {HEADLINES[0]}: {better:.0f} of these. Between the most accurate settings of each, the difference has "
    said += f"either sign in {both} of {ends.ngroups} runs."
    return f"**{word}.** {verdict.headline(ledger)} {said}"


def nearest():
    """The comparison in the run whose setting is nearest to the paper's, in one sentence."""
    found = read(REFERENCE / "cifar10_paper" / "results.csv")
    found = found[(found.baseline == "sgd") & (found.metric.isin(["test_accuracy", "auc"]))].set_index("attack")
    said = {attack: percentage_points(row) for attack, row in found.iterrows()}
    by = joined([f"{said[attack]} by {attack}" for attack in HEADLINES])
    link = "[all of CIFAR-10, with flips and shifts](docs/results.md#all-of-cifar-10-on-a-gpu)"
    both = f"SAM − SGD is {said['']} in test accuracy and, in AUC, {by}, but {said['confidence']} by confidence"
    return f"Nearest to the paper's setting is {link}. There both fit, and {both}."


def chosen(results):
    """The tuned settings of SGD and SAM: tuples (optimizer, rho, lr, weight decay), SGD's first."""
    rows = results[(results.experiment == "tuned") & results.metric.isin(["chosen_lr", "chosen_weight_decay"])]
    rows = rows.assign(rho=pd.to_numeric(rows.rho).fillna(0.0))
    wide = rows.pivot(index=["rho", "optimizer"], columns="metric", values="value").sort_index()
    return [(name, rho, row.chosen_lr, row.chosen_weight_decay) for (rho, name), row in wide.iterrows()]


def is_testable(results):
    """Whether the comparison of both optimizers, tuned, can be judged in a run."""
    ledger = verdict.ledger(results)
    return "not testable here" not in {*ledger.verdict[ledger.claim == "more_when_tuned"]}


def finding(runs):
    """The study in one picture: leakage against accuracy of every setting tried, a panel for each run to judge by."""
    runs = {name: frame for name, frame in runs.items() if is_testable(frame)}
    size = -(-len(runs) // 2), 2  # rows and columns: two panels side by side are wide enough to read on a page
    figure, axes = plt.subplots(*size, figsize=(5.2 * size[1], 4.3 * size[0]), layout="constrained", squeeze=False)
    for axis in axes.flat[len(runs) :]:
        axis.remove()
    for axis, frame in zip(axes.flat, runs.values(), strict=False):
        tried = frame[frame.experiment == "tuning"].assign(rho=lambda rows: pd.to_numeric(rows.rho).fillna(0.0))
        tried[["lr", "weight_decay"]] = tried.coordinate.str.extract("lr=(.+), weight_decay=(.+)").astype(float)
        figures.leakage_against_accuracy(axis, tried, HEADLINES[0], chosen(frame))
        axis.set_title(title(frame, "tuning"), fontsize=10)
        axis.legend(fontsize=9)
        axis.locator_params(axis="x", nbins=6)
    return figure


# ---- tables -------------------------------------------------------------------------------------------------


def table(header, rows):
    """A table in Markdown. header: names of the columns; rows: sequences of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def tuned():
    """A row for each run: the settings that were chosen, and the differences between the two."""
    header = "run", "SGD", "SAM", "fit", "test accuracy, SAM − SGD", *(f"AUC of `{a}`" for a in HEADLINES), "range"
    rows = []
    for found in tuned_runs().values():
        settings_of = [
            f"lr {lr:g}, decay {decay:g}" + f", rho {rho:g}" * (rho > 0) for _, rho, lr, decay in chosen(found)
        ]
        here = found[(found.experiment == "tuned") & (found.coordinate == "")]
        fits = here[(here.metric == "train_accuracy") & (here.baseline == "")].value.map("{:.1%}".format)
        steps = here[here.baseline == "sgd"]
        cells = [percentage_points(row) for row in steps[steps.metric == "test_accuracy"].itertuples()]
        cells += [percentage_points(row) for row in steps[steps.metric == "auc"].itertuples()]
        ends = found[found.metric == "auc_among_the_best"].value
        span = f"{100 * ends.min():+.1f} to {100 * ends.max():+.1f}"
        rows.append((title(found, "tuned"), *settings_of, ", ".join(fits), *cells, span))
    return table(header, rows)


def pools():
    """A row for each pool of each run: SAM minus SGD, tuned and at equal settings."""
    header = "run", "pool", "test accuracy, SAM − SGD", *(f"AUC of `{a}`" for a in HEADLINES)
    rows = []
    for found in tuned_runs().values():
        for place, at in found[found.experiment == "pools"].groupby("coordinate", sort=False):
            steps = at[at.metric.isin(["test_accuracy", "auc"])].sort_values("metric", ascending=False, kind="stable")
            rows.append((title(found, "pools"), place, *map(percentage_points, steps.itertuples())))
    return table(header, rows)


def equal_settings():
    """A row for each run: the main comparison, in which both optimizers have the run's own settings."""
    header = "run", "SGD fits", "SAM fits", "test accuracy, SAM − SGD", *(f"AUC of `{a}`" for a in HEADLINES)
    rows = []
    for found in runs().values():
        here = found[(found.experiment == "main") & (found.coordinate == "") & found.optimizer.isin(["sgd", "sam"])]
        fits = here[(here.metric == "train_accuracy") & (here.baseline == "")].set_index("optimizer").value
        steps = here[here.baseline == "sgd"].set_index(["metric", "attack"])
        wanted = [("test_accuracy", ""), *(("auc", attack) for attack in HEADLINES)]
        cells = [percentage_points(steps.loc[one]) for one in wanted]
        rows.append((title(found, "main"), *(f"{fits[name]:.1%}" for name in ("sgd", "sam")), *cells))
    return table(header, rows)


def results():
    """A row for each run and number of epochs: what SAM gains, what it leaks."""
    header = (
        "run",
        "epochs",
        "SGD fits",
        "SAM fits",
        "test accuracy, SAM − SGD",
        f"AUC of `{HEADLINES[0]}`",
        f"SAM leaks, by `{HEADLINES[0]}`",
    )
    rows = []
    for found in tuned_runs().values():
        skill = found[(found.experiment == "main") & (found.metric == verdict.SKILL) & (found.baseline == "")].ci_low
        for epochs, at in lengths(found).groupby("epochs"):
            test, auc = (at[at.metric == metric].iloc[0] for metric in ("test_accuracy", "auc"))
            is_fair = min(auc.sgd, auc.sam) >= verdict.FITS and skill.min() > verdict.LEARNS
            said = describe_sign(auc, *WORDS) if is_fair else "not testable"
            differences = percentage_points(test), percentage_points(auc), said
            rows.append((title(found), epochs, f"{auc.sgd:.1%}", f"{auc.sam:.1%}", *differences))
    return table(header, rows)


def equal():
    """A row for each run, radius and path: the difference in AUC, from fit and at equal train loss."""
    header = "run", "rho", "SGD's path", "total", "from fitting more or less", "at equal train loss"
    rows = []
    for found in tuned_runs().values():
        split = found[(found.experiment == "decomposition") & (found.attack == HEADLINES[0])]
        split = split[split.coordinate.str.startswith("path=")]
        for (path, rho), at in split.groupby(["coordinate", "rho"], sort=False):
            said = {row.metric: percentage_points(row) for row in at.itertuples()}
            cells = [said.get(f"auc_{part}", "not bracketed") for part in ("total", "from_fit", "at_equal_loss")]
            rows.append((title(found, "decomposition"), rho, path.removeprefix("path="), *cells))
    return table(header, rows)


def accurate():
    """A row for each run and weight decay: the difference in AUC at equal test accuracy, and over how many settings."""
    header = "run", "weight decay of both", "settings of SAM", *(f"AUC of `{a}`" for a in HEADLINES)
    rows = []
    for found in tuned_runs().values():
        split = found[found.metric == "auc_at_equal_accuracy"]
        of_each = split[split.coordinate.str.startswith("lr=") & (split.attack == HEADLINES[0])]
        for place, at in split[split.coordinate.str.startswith("weight_decay=")].groupby("coordinate", sort=False):
            n = of_each.coordinate.str.endswith(f", {place}").sum()
            cells = place.removeprefix("weight_decay="), n, *map(percentage_points, at.itertuples())
            rows.append((title(found, "tuned"), *cells))
        if split.empty:
            rows.append((title(found, "tuned"), "any", 0, *["nothing to compare"] * len(HEADLINES)))
    return table(header, rows)


def contraction():
    """A row for each run: how the difference in AUC goes, over the settings, with what the paper says drives it."""
    kinds = [f"{what}, {how}" for what in ("log variance", "overlap") for how in ("at equal settings", "at equal loss")]
    rows = []
    for found in tuned_runs().values():
        at = found[found.metric == "correlation_with_auc"].set_index("coordinate")
        cells = [number(at.loc[kind], "+.2f") if kind in at.index else "too few settings" for kind in kinds]
        rows.append((title(found, "tuned"), *cells))
    return table(("run", *kinds), rows)


def verdicts():
    """A row for each claim, with the day from which its rule holds, and a column for each run."""
    ledgers = {p.parent.name: verdict.ledger(read(p)) for p in sorted(REFERENCE.glob("*/results.csv"))}
    ledgers = {name: ledger.drop_duplicates("claim").set_index("claim") for name, ledger in ledgers.items()}
    rows = [
        [row.statement, row.whose, row.since, *(ledger.verdict[row.Index] for ledger in ledgers.values())]
        for row in next(iter(ledgers.values())).itertuples()
    ]
    return table(["claim", "whose", "since", *ledgers], rows)


def published():
    """A row for each output: rank correlations of memorization, by each optimizer and their difference, with scores."""
    rows = []
    for name, found in runs().items():
        found = found[found.metric == "memorization_spearman_published"]
        for place, at in found.groupby("coordinate", sort=False):
            output = place.removeprefix("output=") or "correctness"
            rows.append((name, output, *(number(row, "+.2f") for row in at.itertuples())))
    return table(("run", "memorization of", "SGD", "SAM", "SAM − SGD"), rows)


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
    """The run on a GPU: how the learning rates were chosen, what was trained, and who leaks more by which attacks."""
    folder = REFERENCE / "cifar10_paper"
    models = json.loads((folder / "summary.json").read_text())["models"]
    recipe, n = models["sgd"]["recipe"], len(set(models["sgd"]["ids"]) & set(models["sam"]["ids"]))
    tried = {}
    for section, name, value, *_ in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
        if section == "tune" and "accuracy" in name:
            setting, what = name.split(": ")
            tried.setdefault(tuple(setting.split(", ")[1:]), {})[what] = f"{value:.1%}"
    header = "one model each", *next(iter(tried.values()))
    tried = table(header, [(": ".join(setting), *found.values()) for setting, found in tried.items()])
    rates = joined([f"{about['recipe']['lr']:g} for {name.upper()}" for name, about in models.items()])
    trained = (
        f"{recipe['arch']} for {recipe['epochs']} epochs in batches of {recipe['batch_size']}, "
        f"{'with flips and shifts' if recipe['augment'] else 'without augmentation'}, weight decay "
        f"{recipe['weight_decay']:g}; SAM's radius is {models['sam']['recipe']['rho']:g}. The peak learning rate, "
        f"{rates}, is the one that did best on the half that a model was not trained on:"
    )
    found = read(folder / "results.csv")
    ledger = verdict.ledger(found)
    ways = {"more": "supported", "less": "contradicted", "as much, as far as we can tell,": "inconclusive"}
    said = []
    for way, wanted in ways.items():
        rows = ledger[ledger.claim.str.startswith("leaks_more_") & (ledger.verdict == wanted)]
        families = joined([statement.split(": ")[1].rstrip(".") for statement in rows.statement])
        said += [f"SAM leaks {way} by {families}."] if families else []
    found = found[found.experiment == "main"]
    plain = ["train_loss", "hessian_top_eigenvalue", "loss_rise_in_ball"]
    found = found[found.metric.isin(["test_accuracy", "train_accuracy", *plain, "auc"])]
    rows = []
    for (metric, attack), own in found.groupby(["metric", "attack"], sort=False):
        name = f"AUC of {attack}" if attack else metric.replace("_", " ")
        name += f" ({own.n_models.iloc[0]:.0f} models)" * bool(own.n_models.iloc[0] < n)
        show = number if metric in plain else percentage_points
        cells = [show(row) if row.baseline or show is number else f"{row.value:.1%}" for row in own.itertuples()]
        rows.append((name, *cells))
    found = table(("", "SGD", "SAM", "SAM − SGD"), rows)
    return "\n\n".join([trained, tried, f"Then {n} models of each were trained. {' '.join(said)}", found])


TABLES = {"answer": answer, "costs": what_it_costs, "parameters": parameters, "presets": presets, "verdict": verdicts}
TABLES |= {
    "tuned": tuned,
    "pools": pools,
    "results": results,
    "equal": equal,
    "equal_settings": equal_settings,
    "accurate": accurate,
    "contraction": contraction,
    "failing": failing,
    "bench": bench,
    "faults": faults,
}
TABLES |= {"gpu": on_gpu, "nearest": nearest, "published": published}


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
    finding(tuned_runs()).savefig(REFERENCE / "finding.png", dpi=130)
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()

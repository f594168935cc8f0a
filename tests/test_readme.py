"""The lines of README and CONTRIBUTING, typed as they stand, and the README's tables against the committed runs."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lib.data.dataset import load
from lib.study import command_line, settings
from lib.study.results import SETTINGS
from lib.study.settings import ROOT
from lib.training import ensemble
from lib.training.ensemble import train
from tools import costs, readme

TEXT, HOW_TO = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
COMMANDS = re.findall(r"^    ((?:make|\.venv/bin/|bash).*?)\s*(?:#.*)?$", TEXT + HOW_TO, flags=re.M)


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def typed(text, names):
    """Run the Python blocks in order; one that begins with a file's name is put into that file instead."""
    for block in blocks(text):
        if file := re.match(r"# (\w+\.py)\n", block):
            with open(file[1], "a") as out:
                out.write(block)
        else:
            exec(block, names)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the first lines take as given, in an empty folder: logits of two ensembles, who trained on what, a table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    y, member = rng.integers(0, 3, 200), np.zeros((8, 200), bool)
    for k in range(0, 8, 2):
        member[k, rng.permutation(200)[:100]] = True
        member[k + 1] = ~member[k]
    made = {"y": y, "member": member, "np": np}
    for name, gain in (("logits_sgd", 1.0), ("logits_sam", 3.0)):
        made[name] = rng.normal(size=(8, 200, 3))
        made[name][:, np.arange(200), y] += gain * member
    digits = load("digits")
    np.savez("table.npz", x=digits.x[:600].reshape(600, -1).astype(np.float32), y=digits.y[:600])
    return made


def test_the_readmes_blocks_run_in_order_as_written(names, capsys):
    typed(TEXT, names)
    said = capsys.readouterr().out
    assert said.count("auc") >= 3 and said.count("train_loss") >= 2
    assert {e.recipe.arch for e in names["made"].values()} == {"mine:net"} and "mine:flatter(share=0.3)" in names[
        "made"
    ]
    assert Path("outputs/mine/report/index.html").exists()
    auc = [names["metrics"].auc_influence_values(names["attacks"].run(names[key], names["y"], names["member"])["lira"],
           names["member"]).mean() for key in ("logits_sgd", "logits_sam")]  # fmt: skip
    assert 0.55 < auc[0] < auc[1]


def test_the_blocks_of_contributing_run_in_order_as_written(names, capsys):
    typed(HOW_TO, {**names, "logits": names["logits_sam"]})
    said = capsys.readouterr().out
    values = [float(value) for value in re.findall(r"\bauc +(0\.\d+)", said)]
    assert len(values) == 2 and values[0] > 0.7 > 0.55 > values[1], said


def test_blocks_are_short():
    assert len(blocks(TEXT)) >= 6 and all(block.count("\n") <= 10 for block in blocks(TEXT) + blocks(HOW_TO))


def checkout(folder):
    """A folder that looks like this project after `make` has set everything up: its files, and an environment."""
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "store", "outputs", "data"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".ready":
            (folder / ".venv" / path.name).symlink_to(path)
    (folder / ".venv" / ".ready").touch()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "audit" in c or "outside" in c])
def test_an_audit_as_it_is_typed(names, tmp_path, command):
    exec(blocks(TEXT)[0], names)  # sgd.npz and sam.npz
    checkout(tmp_path)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list(tmp_path.glob("outputs/*/report/index.html"))
    assert len(pages) == 1 and "lira" in pages[0].read_text()


def test_there_are_audits_to_type():
    assert sum("audit" in c or "outside" in c for c in COMMANDS) >= 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_every_make_command_has_a_target_that_takes_its_parameters(command, tmp_path):
    target, *words = shlex.split(command)[1:]
    assert re.search(rf"^(\w+ )*{target}( \w+)*:", (ROOT / "Makefile").read_text(), flags=re.M), target
    if target in ("study", "plan", "work"):
        settings.clean(command_line.parse(words)[1])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lib.study" in c and "--help" not in c])
def test_every_line_of_the_study_is_understood(command):
    assert settings.clean(command_line.parse(shlex.split(command)[3:])[1])["preset"] in settings.PRESETS


def test_papermill_is_told_parameters_that_exist():
    (command,) = [shlex.split(c) for c in COMMANDS if "papermill" in c]
    assert Path(ROOT / command[1]).exists()
    settings.clean({command[i + 1]: command[i + 2] for i, word in enumerate(command) if word == "-p"})


def test_no_table_is_typed():
    assert readme.filled(TEXT) == TEXT, "the tables differ from outputs/reference/: run make sync"


def test_the_finding_is_in_the_first_screen_and_computed():
    first = TEXT.split("## ")[0]
    assert "<!-- answer -->\n**" in first and "](outputs/reference/finding.png)" in first
    assert readme.counted([1, 1, -1]) == "more in 2 of 3 comparisons, less in 1"
    assert readme.counted([0, 0]) == "no differently in 2 of 2 comparisons" and readme.counted([]) == "in none"


def test_every_path_it_names_exists():
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT + HOW_TO):
        assert (ROOT / path).exists(), path
    for path in set(re.findall(r"`((?:lib|tests|tools|notebooks)/\w+\.py)`", TEXT + HOW_TO)) - {"notebooks/NN_name.py"}:
        assert (ROOT / path).exists(), path


def test_every_module_is_on_the_map_of_the_code():
    modules = {f"lib/{path.name}" for path in (ROOT / "lib").glob("*.py")} - {"lib/__init__.py"}
    assert modules == set(re.findall(r"`(lib/\w+\.py)`", TEXT))


def test_anchors_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)", TEXT, flags=re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings


# ---- what a run costs ---------------------------------------------------------------------------------------


def test_disk_is_what_the_store_takes(table, quick, tmp_path):
    made = [quick, replace(quick, optimizer="sam")]
    for recipe in made:
        train(recipe, table, 32, tmp_path, quiet=True)
    taken = sum(p.stat().st_size for p in tmp_path.glob("*/*.npy"))
    told = sum(ensemble.stored_bytes(recipe, table, range(*ids)) for recipe in made for ids in ((0, 8), (8, 32)))
    assert told == pytest.approx(taken, rel=0.02)  # the files have headers


def test_time_is_of_a_whole_run_of_just_these_settings_or_not_measured(tmp_path):
    run = costs.preset_run("digits", "tiny", str(tmp_path / "store"))
    book = {name: run.values[name] for name in SETTINGS}
    took = {
        "notebooks": [book.name[:2] for book in command_line.NOTEBOOKS],
        "n_models": 16,
        "seconds": 11,
        "trained": 1.0,
    }

    def told(took, **changed):
        (tmp_path / "settings.json").write_text(json.dumps({"01": book, "02": book | changed}))
        (tmp_path / "run.json").write_text(json.dumps(took))
        return costs.measured(run, [tmp_path])

    assert told(took) == 11
    assert told(took, epochs=9) is None
    assert told(took | {"trained": 0.9}) is None, "the store had some of the models"
    assert told(took | {"notebooks": ["01"]}) is None and told(took | {"n_models": 8}) is None
    assert told({}) is None


def test_a_larger_preset_costs_more():
    rows = [
        row.split("|") for row in re.search("<!-- costs -->(.*?)<!-- /costs", TEXT, re.S)[1].splitlines() if "`" in row
    ]
    work = {row[1].strip(" `"): float(row[5]) for row in rows}
    assert list(work) == [preset for _, preset in costs.PRESETS]
    assert work["tiny"] < work["small"] < work["default"] < work["fast"] < work["paper"]


# ---- what runs on every change ------------------------------------------------------------------------------


def test_github_runs_what_ci_runs_on_both_systems_and_all_versions():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["cancel-in-progress"] is True
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads `on` as true
    assert job["strategy"]["matrix"] == {"os": ["ubuntu-latest", "macos-latest"], "python": ["3.10", "3.11", "3.12"]}
    assert job["timeout-minutes"] and [s["run"] for s in job["steps"] if "run" in s] == ["bash .ci/run"]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", s["uses"]) for s in job["steps"] if "uses" in s)
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make test" in lines and "make test" in COMMANDS


def test_the_citation_has_what_github_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)[1]
    assert citation["version"] == version

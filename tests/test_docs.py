"""README, CONTRIBUTING and docs/: their lines typed as they stand, their links, and their tables against the runs."""

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

from lib.data.dataset import DATASETS, load
from lib.study import command_line, settings
from lib.study.results import SETTINGS
from lib.study.settings import ROOT
from lib.training import ensemble, networks, optimizers, train
from tools import costs, readme

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in [*readme.PAGES, ROOT / "CONTRIBUTING.md"]}
README, HOW_TO = PAGES["README.md"], PAGES["CONTRIBUTING.md"]
ALL = "\n".join(PAGES.values())
COMMANDS = re.findall(r"^    ((?:make|\.venv/bin/|bash).*?)\s*(?:#.*)?$", ALL, flags=re.M)


# ---- code ---------------------------------------------------------------------------------------------------


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


def test_the_blocks_of_the_readme_and_of_own_audits_run_in_order(names, capsys):
    typed(README + PAGES["docs/own_audits.md"], names)
    said = capsys.readouterr().out
    assert said.count("train_loss") >= 2
    assert {e.recipe.arch for e in names["made"].values()} == {"mine:net"}
    assert Path("outputs/python/report/index.html").exists()
    assert names["found"].value.shape == (400,) and len(names["entropy"]) == len(names["data"].y_test)
    auc = names["intervals"].table(names["both"], names["member"]).query("metric == 'auc'").value.tolist()
    assert 0.55 < auc[0] < auc[1]


def test_the_block_on_results_finds_the_difference(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    typed(PAGES["docs/outputs.md"], {})
    assert re.search(r"0\.02\d+\s", capsys.readouterr().out)


def test_the_blocks_of_contributing_run_in_order(names, capsys):
    typed(HOW_TO, {**names, "logits": names["logits_sam"]})
    said = capsys.readouterr().out
    values = [float(value) for value in re.findall(r"\bauc +(0\.\d+)", said)]
    assert len(values) == 2 and values[0] > 0.7 > 0.55 > values[1], said


# ---- commands -----------------------------------------------------------------------------------------------


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


AUDITS = [c for c in COMMANDS if "audit" in c]


@pytest.mark.parametrize("command", AUDITS)
def test_an_audit_as_it_is_typed(names, tmp_path, command):
    exec(blocks(README)[0], names)  # sgd.npz and sam.npz
    before, is_module, words = command.partition(" -m lib.study ")
    if is_module:  # what that python would do
        assert before == ".venv/bin/python" and command_line.main(shlex.split(words)) == 0
    else:
        checkout(tmp_path)
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    (page,) = tmp_path.glob("outputs/*/report/index.html")
    assert "lira" in page.read_text()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_a_make_command_has_a_target_that_hands_its_parameters_on(command, tmp_path):
    checkout(tmp_path)
    done = subprocess.run(f"{command} --dry-run", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    target, *given = shlex.split(command)[1:]
    if target in ("study", "plan", "work"):
        words = shlex.split(done.stdout)
        assert set(given) <= set(words)
        settings.checked(settings.parse([word for word in words if "=" in word])[1])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m lib.study " in c and "--help" not in c])
def test_every_line_of_the_study_is_understood(command):
    assert settings.checked(settings.parse(shlex.split(command)[3:])[1]).preset in settings.PRESETS


def test_papermill_is_given_parameters_that_exist():
    (command,) = [shlex.split(c) for c in COMMANDS if "papermill" in c]
    assert Path(ROOT / command[1]).exists()
    settings.checked({command[i + 1]: command[i + 2] for i, word in enumerate(command) if word == "-p"})


def test_there_are_commands_and_blocks_to_type():
    assert len(AUDITS) >= 2 and len(blocks(README)) >= 5 and {"make study", "make test"} <= set(COMMANDS)


# ---- the pages ----------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.split()) < 1800


@pytest.mark.parametrize("page", PAGES)
def test_nothing_computed_is_typed(page):
    assert readme.filled(PAGES[page]) == PAGES[page], "a computed part differs: run make sync"


def test_every_computed_part_stands_on_a_page():
    assert all(f"<!-- {name} -->\n" in ALL and f"<!-- /{name} -->" in ALL for name in readme.TABLES)


def test_the_finding_and_its_picture_come_first():
    first = README.split("\n## ")[0]
    assert "<!-- answer -->\n**" in first and "](outputs/reference/finding.png)" in first


def headings(text):
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)", text, flags=re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_path_leads_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text()), link
    for path in re.findall(r"`((?:lib|tests|tools|notebooks|benchmarks|docs)/[\w/]+\.\w+)`", PAGES[page]):
        assert "NN_" in path or (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", PAGES[page]):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


def test_the_settings_page_names_every_optimizer_network_and_data_set():
    known = {*optimizers.BASES, *optimizers.RULES, *networks.MODELS, *DATASETS} - {"plain"}
    assert known <= set(re.findall(r"`([\w]+)`", PAGES["docs/settings.md"]))


def test_every_page_of_docs_is_linked_from_the_readme():
    assert {page for page in PAGES if page.startswith("docs/")} <= set(re.findall(r"\]\(([^)#]+)\)", README))


def test_the_map_of_the_code_is_the_tree():
    (drawn,) = re.findall(r"```\n(lib/.*?)```", README, flags=re.S)
    found, room = set(), ""
    for line in drawn.splitlines():
        name = line.split()[0] if line.strip() else ""
        room = name if name.startswith("lib/") else room
        if name.endswith(".py"):
            found.add(room + name)
    tree = {str(p.relative_to(ROOT)) for p in (ROOT / "lib").glob("*/*.py") if not p.name.startswith("__")}
    assert found == tree


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
    book = {name: getattr(run, name) for name in SETTINGS}
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
    (table,) = re.findall("<!-- costs -->\n(.*?)<!-- /costs -->", ALL, flags=re.S)  # which is computed anew above
    cells = [line.split(" | ") for line in table.splitlines()[2:]]
    work = {row[0].strip("|` "): float(row[4]) for row in cells if len(row) > 1}
    assert list(work) == [preset for _, preset in costs.PRESETS]
    # of one kind of network each: a gradient of a ResNet is not that of a small MLP
    assert work["tiny"] < work["default"] and work["small"] < work["fast"] < work["paper"]


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
    assert {"make lint", "make test"} <= set(lines)


def test_the_citation_has_what_github_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)[1]
    assert citation["version"] == version

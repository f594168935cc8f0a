"""The bench at toy size, and what it writes. Speed is not tested."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from benchmarks import bench, cpu, gpu
from lib.attacks.catalogue import NAMES
from lib.data.dataset import load, pool
from tools import readme

TOY = replace(cpu.RECIPE, epochs=2, batch_size=32)
NOTED = {"date": "2026-01-02", "machine": "a machine", "command": "make bench"}


def row(name, value=1.0, ratio="", goal="", limit="1: light"):
    return name, value, "s", "another" if ratio else "", ratio, goal, limit


def limit(row):
    """The number that the text of a limit begins with."""
    return float(row[6].split(":")[0])


@pytest.fixture(scope="module")
def digits():
    return pool(load("digits"), 128, n_test=64)


@pytest.mark.parametrize(
    "value, ratio, goal, judged",
    [
        (3.0, 10.0, ">= 10", "yes"),
        (11.0, 9.999, ">= 10", "no"),
        (5.0, "", "<= 5", "yes"),
        (0.98999, "", ">= 0.99", "no"),
        (float("nan"), "", ">= 0.99", "no"),
        ("not measured", "", "<= 2", ""),
        (3.0, 2.0, "", ""),
    ],
)
def test_a_goal_is_judged_by_the_ratio_or_else_the_value(value, ratio, goal, judged):
    assert bench.met(value, ratio, goal) == judged


def test_a_goal_is_judged_before_rounding():
    made = bench.line(row("a", ratio=9.99999, goal=">= 10"), "training", **NOTED)
    assert (made["ratio"], made["met"], made["limit"]) == ("10", "no", "1: light")
    assert [*made] == bench.COLUMNS[:9] + [*NOTED]


def test_sections_are_chosen_by_name(capsys):
    assert bench.arguments([]).only == []
    assert bench.arguments(["training,gpu", "memory"]).only == ["training", "gpu", "memory"]
    with pytest.raises(SystemExit):
        bench.arguments(["trainin"])
    assert "ONLY='trainin' is no section of the bench: choose among training, " in capsys.readouterr().err


def test_a_run_of_some_sections_replaces_their_rows_and_records_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECTIONS", {"training": lambda: [row("a")], "memory": lambda: [row("m")]})
    bench.main(["--out", str(tmp_path)])
    bench.main(["memory", "--out", str(tmp_path)])
    found = bench.read(tmp_path / "bench.csv")
    commands = [("a", "make bench"), ("m", "make bench ONLY=memory")]
    assert [(made["name"], made["command"]) for made in found] == commands
    assert "1: light" in capsys.readouterr().out


def test_a_section_run_again_replaces_its_rows_only(tmp_path):
    path = tmp_path / "bench.csv"
    bench.run("memory", [row("m")], path, **NOTED)
    bench.run("training", [row("a"), row("gone")], path, **NOTED)
    bench.run("training", [row("a", 2.0), row("b")], path, **NOTED)
    assert [(made["name"], made["value"]) for made in bench.read(path)] == [("a", "2"), ("b", "1"), ("m", "1")]


def test_a_killed_run_loses_no_row(tmp_path):
    def killed():
        yield row("a", 2.0)
        raise KeyboardInterrupt

    path = tmp_path / "bench.csv"
    bench.run("training", [row("a"), row("b")], path, **NOTED)
    with pytest.raises(KeyboardInterrupt):
        bench.run("training", killed(), path, **NOTED)
    assert [(made["name"], made["value"]) for made in bench.read(path)] == [("b", "1"), ("a", "2")]


def test_a_table_with_other_columns_is_not_read(tmp_path):
    path = tmp_path / "bench.csv"
    pd.DataFrame({"name": ["a"], "machine": ["old"]}).to_csv(path, index=False)
    assert bench.read(path) == []


def test_works_take_turns():
    order = []
    taken = cpu.in_turn({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2)
    assert order == [*"abcabc"] and [*taken] == [*"abc"]


def test_the_products_of_a_step_are_counted(digits):
    flops, steps, work = cpu.products(digits, TOY, n_stacked=2, repeats=3)
    # x W1, h W2; their weights' gradients; h's gradient
    assert (flops, steps) == (2 * 32 * (2 * 64 * 256 + 3 * 256 * 10), 6)
    assert cpu.large_products(8, 2)[0] == 2 * 2 * 8**3
    work()


def test_training_at_toy_size(digits, monkeypatch):
    monkeypatch.setattr(cpu, "large_products", partial(cpu.large_products, 512))
    sgd, lean, loader = cpu.training(digits, TOY, count=4, times=1, rounds=1)
    assert sgd[1] == lean[1] == loader[1] and 0 < sgd[4] < 1 and "bmm on the models' own shapes" in sgd[6]
    # a loop's time over that of the products at the best rate
    for loop in (lean, loader):
        assert limit(loop) == pytest.approx(loop[4] / sgd[4] * limit(sgd), rel=0.1, abs=1)


def test_rules_at_toy_size(digits, monkeypatch):
    ticks = (np.array([k, 8.0 * k]) for k in itertools.count())  # of each second, the kernel takes an eighth
    monkeypatch.setattr(cpu, "processor_seconds", lambda: next(ticks))
    sam, private, kernel = cpu.rules(digits, TOY, count=4, few=2, rounds=1)
    assert sam[1] / sam[4] == pytest.approx(private[1] / private[4])  # SGD's
    assert limit(private) > 1 and kernel[1] == 12.5 and kernel[3:6] == ("", "", "<= 10")


def test_images_and_compiling_and_memory_at_toy_size(digits):
    (images,) = cpu.images(gpu.photographs(128, 64, side=16), replace(cpu.IMAGES, epochs=1, batch_size=32), 2, rounds=1)
    assert images[0] == "SGD, 2 small CNNs on 64 images of 3x16x16" and images[4] > 0
    assert limit(images) > images[4]
    (compiling,) = cpu.compiling(digits, TOY, count=2, main=4)
    assert compiling[4] != 0 and compiling[6].startswith("0: ")
    (memory,) = cpu.memory(digits, TOY, (2, 4))
    assert memory[4] >= 1


def test_scoring_and_influences_at_toy_size(monkeypatch):
    monkeypatch.setattr(cpu, "large_products", partial(cpu.large_products, 512))
    speed, most = cpu.fresh(cpu.scoring, 8, 1000)
    assert speed[0] == f"all {len(NAMES)} attacks on 8 x 1,000 examples" and speed[1] > limit(speed)
    assert most[1] >= 0.9 * limit(most)
    (rate,) = cpu.influences(50, 200, 40)
    assert 0 < rate[4]


def test_the_table_marks_missed_goals_and_says_when_where_and_how(tmp_path, monkeypatch):
    path = tmp_path / "bench.csv"
    bench.run("training", [row("fast", ratio=12.0, goal=">= 10"), row("slow", ratio=3.0, goal=">= 10")], path, **NOTED)
    bench.run("gpu", [row("g", "not measured")], path, **{**NOTED, "machine": "another"})
    monkeypatch.setattr(readme, "REFERENCE", tmp_path)
    text = readme.bench()
    assert "| fast | 1 s | another | 12 | >= 10 | yes | 1: light |" in text
    assert "| slow | 1 s | another | 3 | >= 10 | **no** | 1: light |" in text
    assert "training: `make bench`, 2026-01-02, a machine." in text and "another." in text

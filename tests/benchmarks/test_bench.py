"""The bench at toy size: what it writes, and that the code for a GPU runs on any device. Speed is not tested."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from benchmarks import bench, cpu, scaling
from tools import readme

TOY = replace(cpu.RECIPE, epochs=2, batch_size=32)
NOTED = {"date": "2026-01-02", "machine": "a machine", "command": "make bench"}


def row(name, value=1.0, ratio="", goal=""):
    return name, value, "s", "another" if ratio else "", ratio, goal


@pytest.fixture(scope="module")
def pool():
    return scaling.table_like_digits(128, t=64)


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
    assert (made["ratio"], made["met"]) == ("10", "no") and [*made] == bench.COLUMNS[:8] + [*NOTED]


def test_sections_are_chosen_by_name_or_family():
    assert bench.chosen([]) == list(bench.SECTIONS)
    assert bench.chosen(["gpu", "training"]) == ["training", "gpu_resnet9", "gpu_resnet18"]
    assert bench.arguments(["training,gpu", "memory"]).only == ["training", "gpu", "memory"]
    with pytest.raises(ValueError, match="ONLY='trainin' .* choose among memory, training"):
        bench.chosen(["trainin"])


def test_the_command_is_recorded_without_paths():
    assert bench.command(bench.arguments([])) == "make bench"
    assert bench.command(bench.arguments(["gpu", "--data", "/home/me/x"])) == "make bench ONLY=gpu DATA=path"


def test_a_section_run_again_replaces_its_rows_only(tmp_path):
    path = tmp_path / "bench.csv"
    bench.run("training", [row("a"), row("gone")], path, **NOTED)
    bench.run("memory", [row("m")], path, **NOTED)
    bench.run("training", [row("a", 2.0), row("b")], path, **NOTED)
    assert [(made["name"], made["value"]) for made in bench.read(path)] == [("m", "1"), ("a", "2"), ("b", "1")]


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


def test_training_and_variants_and_memory_at_toy_size(pool):
    rows = list(cpu.training(pool, TOY, counts=(2, 4), rounds=1))
    ours = [made for made in rows if made[0].startswith("sgd, ")]
    assert len(rows) == 4 + 6 and {made[5] for made in ours} == {">= 5", ">= 10", ">= 20"}
    assert all(made[1] > 0 for made in rows)
    loop, per_model = rows[0][1], ours[0][1]
    assert ours[0][4] == pytest.approx(loop / per_model)
    assert [made[5] for made in cpu.variants(pool, TOY, 2, {"sam": 2}, rounds=1)] == ["<= 2.20"]
    assert next(cpu.memory(pool, TOY, (2, 4)))[4] >= 1


def test_scoring_and_influences_at_toy_size():
    assert len(list(cpu.scoring(8, 1000))) == 3
    assert len(list(cpu.influences(50, 200, 40))) == 4


@pytest.mark.parametrize("b", [0.5, 1.0, 2.0])
def test_slope_recovers_a_power_law(b):
    sizes, rng = np.array([32, 64, 128, 256, 512]), np.random.default_rng(0)
    exact, noisy = 3e-3 * sizes**b, 3e-3 * sizes**b * np.exp(0.05 * rng.normal(size=5))
    assert scaling.slope(sizes, exact) == pytest.approx((b, 0), abs=1e-6)
    found, error = scaling.slope(sizes, noisy)
    # the same from the normal equations
    design = np.stack([np.ones(5), np.log(sizes)], 1)
    left = np.log(noisy) - design @ np.linalg.lstsq(design, np.log(noisy), rcond=None)[0]
    wanted = np.sqrt(left @ left / 3 * np.linalg.inv(design.T @ design)[1, 1])
    assert error == pytest.approx(wanted) and abs(found - b) < 4 * error


def test_scaling_at_toy_size_makes_rows_points_and_the_figure(tmp_path):
    sizes = {
        (scaling.TRAIN, "M"): (32, 64, 96),
        (scaling.TRAIN, "N"): (64, 128, 192),
        (scaling.TRAIN, "P"): (8, 16, 24),
        (scaling.ATTACK, "M"): (8, 12, 16),
        (scaling.ATTACK, "N"): (200, 400, 600),
    }
    fixed = {"models": 2, "pool": 128, "scored": 200, "against": 8}
    rows = list(scaling.scaling(tmp_path, replace(TOY, epochs=1), sizes, fixed, rounds=1))
    frame = pd.read_csv(tmp_path / "bench_scaling.csv")
    assert len(rows) == 5 and len(frame) == 15 and (frame.seconds > 0).all()
    picked = frame[(frame.series == scaling.TRAIN) & (frame.axis == "P")]
    assert list(picked["size"]) == [64 * h + h + 10 * h + 10 for h in (8, 16, 24)]
    assert (tmp_path / "bench_scaling.png").stat().st_size > 10_000


def test_the_figure_names_every_slope():
    sizes = [1, 2, 4, 8]
    cells = [(series, axis) for series, axis in scaling.SIZES]
    points = [(*cell, size, 2.0 * size**1.25) for cell in cells for size in sizes]
    made = scaling.figure(pd.DataFrame(points, columns=["series", "axis", "size", "seconds"]))
    titles = [panel.get_title() for panel in made.axes]
    assert [title.count("^1.25 (± 0.00)") for title in titles] == [2, 2, 1] and "time ~ P^1.25" in titles[2]


def test_the_table_marks_missed_goals_and_says_when_where_and_how(tmp_path, monkeypatch):
    path = tmp_path / "bench.csv"
    bench.run("training", [row("fast", ratio=12.0, goal=">= 10"), row("slow", ratio=3.0, goal=">= 10")], path, **NOTED)
    bench.run("gpu_resnet9", [row("g", "not measured")], path, **{**NOTED, "machine": "another"})
    monkeypatch.setattr(readme, "REFERENCE", tmp_path)
    text = readme.bench()
    assert (
        "| fast | 1 s | another | 12 | >= 10 | yes |" in text
        and "| slow | 1 s | another | 3 | >= 10 | **no** |" in text
    )
    assert "training: `make bench`, 2026-01-02, a machine." in text and "another." in text

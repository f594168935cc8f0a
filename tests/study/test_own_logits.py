"""Audits of what others trained: files as users make them, from the command to the page; every fault is named."""

import html
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special

from lib.analysis import compare
from lib.attacks import catalogue, intervals, membership
from lib.attacks.intervals import auc_influence_values
from lib.attacks.signals import signals
from lib.study import command_line, own_logits
from lib.study.results import COLUMNS

ALONE = [*catalogue.ALONE]


def given(n_models=8, n=80, leak=1.0, classes=4, seed=0, member=None):
    """Gaussian logits that know their members, as a dict of arrays; complementary halves by default."""
    rng = np.random.default_rng(seed)
    if member is None:
        half = np.argsort(rng.random((n_models // 2, n)), axis=1) < n // 2
        member = np.stack([half, ~half], axis=1).reshape(-1, n)
    n_models, n = member.shape
    y, rng = np.arange(n) % classes, np.random.default_rng(seed + 1)
    logits = rng.normal(size=(n_models, n, classes)) + rng.normal(size=(n, classes))
    logits[:, np.arange(n), y] += 1 + leak * member
    return {"logits": logits.astype(np.float32), "y": y, "member": member}


def single(n=400):
    return given(member=np.random.default_rng(5).permutation(n)[None] < n // 2)


def page(out):
    return (out / "report" / "index.html").read_text(encoding="ascii")


def auc(frame, optimizer=None, baseline=""):
    rows = frame[(frame.metric == "auc") & (frame.experiment == "main")]
    own = (rows.optimizer == optimizer) & (rows.baseline.fillna("") == baseline)
    return rows[own].set_index("attack") if optimizer else rows


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two files audited by the command: (folder, what was in the files)."""
    folder = tmp_path_factory.mktemp("two")
    arrays = {"sgd": given(), "sam": given(leak=2.5)}
    for name, one in arrays.items():
        np.savez(folder / f"{name}.npz", **one)
    words = [f"DATA={folder / 'sgd.npz'},{folder / 'sam.npz'}", f"OUT={folder / 'out'}"]
    assert command_line.main(["--audit", *words]) == 0
    return folder / "out", arrays


def test_the_table_holds_what_attacks_and_metrics_say(two):
    out, arrays = two
    frame = pd.read_csv(out / "results.csv", keep_default_na=False)
    assert list(frame.columns) == COLUMNS and set(frame.notebook) == {"own_logits"}
    scored = {name: catalogue.run(**one)["rmia"] for name, one in arrays.items()}
    key = ["optimizer", "baseline", "metric"]
    expected = intervals.table(scored, arrays["sgd"]["member"]).set_index(key)
    found = frame[(frame.attack == "rmia") & (frame.experiment == "main")].set_index(key)
    columns = ["value", "ci_low", "ci_high"]
    np.testing.assert_allclose(found.loc[expected.index, columns].astype(float), expected[columns], rtol=1e-5)
    assert set(frame.attack) == {"", *catalogue.NAMES} and set(frame.n_models) == {8} and set(frame.n_examples) == {80}
    accuracy = frame[(frame.metric == "train_accuracy") & (frame.optimizer == "sam")].value.iloc[0]
    one = arrays["sam"]
    correct = one["logits"].argmax(-1) == one["y"]
    assert accuracy == pytest.approx(np.mean([c[m].mean() for c, m in zip(correct, one["member"], strict=True)]))


def test_the_page_stands_alone_and_holds_the_numbers(two):
    out, _ = two
    text, frame = page(out), pd.read_csv(out / "results.csv", keep_default_na=False)
    sources = re.findall(r'(?:src|href)="([^#"][^"]*)"', text)
    assert [s[:22] for s in sources] == ["data:image/png;base64,"] * 3 + ["../results.csv"]
    assert not re.search(r"<script|<link|<iframe|https?:|url\(|@import", text) and str(out.parent) not in text
    assert {p.name for p in (out / "figures").iterdir()} == {"auc.png", "difference.png", "roc_and_phi.png"}
    for name, baseline in (("sgd", ""), ("sam", ""), ("sam", "sgd")):
        for row in auc(frame, name, baseline).itertuples():
            assert f"<td>{float(row.value):.3f} [{float(row.ci_low):.3f}, {float(row.ci_high):.3f}]</td>" in text
    for name, row in auc(frame, "sam", "sgd").astype({c: float for c in ("value", "ci_low")}).iterrows():
        assert (f"{100 * row.value:+.1f} points [{100 * row.ci_low:+.1f}, " in text) == (name in catalogue.HEADLINES)
    assert "sam leaks more than sgd: " in text and "prefer sgd to sam" in text
    assert "over new models and new examples" in text and "left out" not in text


def test_the_null_control_finds_nothing_and_the_attacks_much(two):
    frame = pd.read_csv(two[0] / "results.csv")
    control = frame[frame.experiment == "null control"]
    assert control.attack.tolist() == list(catalogue.NAMES) and control.value.between(0.38, 0.62).all()
    assert (auc(frame, "sam").value > 0.62).all()


def test_one_model_has_a_table_over_examples(tmp_path):
    one = single()
    np.savez(tmp_path / "target.npz", logits=one["logits"][0], y=one["y"], member=one["member"][0])
    frame = own_logits.audit([tmp_path / "target.npz"], tmp_path / "out")
    assert auc(frame).attack.tolist() == ALONE
    row = auc(frame, "target").loc["confidence"]
    cells = intervals.auc_influence_values(signals(one["logits"], one["y"])["phi"], one["member"])
    expected = intervals.estimate(cells, rate=True, examples_only=True)
    np.testing.assert_allclose(row[["value", "ci_low", "ci_high"]].astype(float), expected)
    assert {"tpr@0.1", "realised_fpr@0.1"} < set(frame.metric) and frame.ci_low.notna().all()
    text = page(tmp_path / "out")
    assert "LiRA and RMIA were left out" in text and "n_models &gt;= 6" in text and "over new examples only" in text
    assert "difference" not in [p.stem for p in (tmp_path / "out" / "figures").iterdir()]


def test_seeds_on_one_split_and_pairs_run_the_attacks_on_single_models(tmp_path):
    same = np.repeat(single(120)["member"], 4, 0)
    for k, arrays in enumerate((given(member=same), given(n_models=2))):
        frame = own_logits.audit({"x": arrays}, tmp_path / str(k))
        assert auc(frame).attack.tolist() == ALONE and auc(frame).ci_low.notna().all()
        assert ("over new examples only" in page(tmp_path / str(k))) == (k == 1)


def test_subsets_without_partners_run_every_attack(tmp_path):
    rng = np.random.default_rng(0)
    member = rng.permuted(np.tile(np.arange(12)[:, None] < 7, 60), axis=0)  # each example in 7 of 12 models
    assert membership.partners(member) is None
    frame = own_logits.audit({"x": given(member=member)}, tmp_path)
    assert auc(frame).attack.tolist() == list(catalogue.NAMES)


def variants(one):
    rng, (m, n, c) = np.random.default_rng(9), one["logits"].shape
    p = np.exp(one["logits"].astype(float))
    less = {k: v for k, v in one.items() if k != "logits"}
    more = {"population_logits": rng.normal(size=(m, 30, c)).astype(np.float32), "population_y": np.arange(30) % c}
    return {
        "one-hot": {**one, "y": np.eye(c)[one["y"]]},
        "a column": {**one, "y": one["y"][:, None].astype(float), "member": one["member"].astype(np.float16)},
        "a row": {**one, "y": one["y"][None].astype(np.int8)},
        "log p": {**one, "logits": np.log(p / p.sum(-1, keepdims=True))},
        "integers": {**one, "member": one["member"].astype(int), "y": one["y"].astype(np.uint8)},
        "probabilities": {**less, "probabilities": p / p.sum(-1, keepdims=True)},
        "queries": {**one, "logits": np.stack([one["logits"]] * 2, 1)},
        "population": {**one, **more},
        "groups": {**one, "groups": np.array([f"p{i // 2}" for i in range(n)])},
    }


SPELLINGS = "one-hot,a column,a row,log p,integers,probabilities,queries,population,groups".split(",")


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_the_same_are_read(name, tmp_path):
    one = given(n_models=6)
    e, plain = own_logits.models("x", variants(one)[name]), own_logits.models("x", one)
    found, expected = compare.scores(e), compare.scores(plain)
    for attack in ("confidence", "entropy", "lira"):
        np.testing.assert_allclose(found[attack], expected[attack], atol=1e-3)
    for attack, other in (("rmia", "population"), ("entropy_classwise", "groups")):
        assert (np.abs(found[attack] - expected[attack]).max() > 0.01) == (name == other)
    a, b = (compare.leakage({"x": one}, {"x": {"loss": expected["loss"]}}) for one in (e, plain))
    assert (a.ci_low[0] != b.ci_low[0]) == (name == "groups")
    assert ("test_accuracy" in set(compare.accuracies({"x": e}).metric)) == (name == "population")
    said = " ".join(own_logits.limits({"x": e}, True))
    assert ("logarithms" in said) == (name == "probabilities") and ("40 groups" in said) == (name == "groups")


def test_probabilities_in_half_precision_sum_to_one_only_nearly_and_keep_their_digits():
    e = own_logits.models("x", {**LESS, "probabilities": P.astype(np.float16)})
    assert np.abs(P.astype(np.float16).sum(-1, dtype=float) - 1).max() > 1e-4 and e.logits.dtype == np.float32
    np.testing.assert_allclose(special.softmax(e.logits[:, 0], -1), P, rtol=2e-3, atol=1e-6)


def test_probabilities_of_zero_become_the_smallest_given():
    p = np.tile([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]], (1, 6, 1))
    e = own_logits.models("x", {"probabilities": p, "y": np.arange(12) % 3, "member": np.arange(12)[None] % 2})
    np.testing.assert_allclose(e.logits[0, 0, 0], np.log([0.75, 0.25, 0.25]))
    assert "33.33%" in e.notes[-1] and "0.25" in e.notes[-1]


def test_a_class_that_thresholds_lack_is_said_and_an_absent_class_is_none():
    one = given(classes=6)
    one["y"] = np.where(np.arange(80) == 7, 4, one["y"] % 4)  # one example of class 4, none of 5
    assert "Classes [4] lack" in " ".join(own_logits.limits({"x": own_logits.models("x", one)}, True))
    assert "Classes" not in " ".join(own_logits.limits({"x": own_logits.models("x", given())}, True))


def test_names_of_files_are_escaped_wherever_they_are_shown(tmp_path):
    name = "_<script>alert(1)<\\script>&$\\frac$"
    frame = own_logits.audit({name: single(120)}, tmp_path)
    assert "<script" not in page(tmp_path) and html.escape(name) in page(tmp_path)
    assert set(frame.optimizer) == {name}


def changed(**arrays):
    return {**given(), **arrays}


def at(array, index, value):
    array = array.copy()
    array[index] = value
    return array


ONE = given()
LESS, P = {k: ONE[k] for k in ("y", "member")}, special.softmax(ONE["logits"].astype(float), -1)
NAN, OBJECTS = at(ONE["logits"], (3, 5, 1), np.nan), np.array([{}] * 80, object)
FAULTS = {
    "x: logits: missing": {k: ONE[k] for k in ("y", "member")},
    "x: y: missing": {k: ONE[k] for k in ("logits", "member")},
    "x: member: missing": {k: ONE[k] for k in ("logits", "y")},
    "x: group: .*valid are the names logits": changed(group=np.zeros(80)),
    r"x: y: object of shape \(80,\)": changed(y=OBJECTS),
    r"x: y: int\d+ of shape \(79,\); valid are integers \[80\]": changed(y=ONE["y"][:79]),
    r"x: y: 0.5 at \[0\]; valid are whole": changed(y=ONE["y"] + 0.5),
    r"x: y: nan at \[2\]; valid are whole": changed(y=at(ONE["y"].astype(float), 2, np.nan)),
    r"x: y: 4 at \[3\]; valid are 0 to 3.*, so subtract 1": changed(y=ONE["y"] + 1),
    r"x: y: -1 at \[3\]; valid are 0 to 3": changed(y=at(ONE["y"], 3, -1)),
    r"x: y: 4 at \[2\]; valid are 0 to 3": changed(y=at(ONE["y"], 2, 4)),
    r"x: y: .*\(80, 4\)": changed(y=np.zeros((80, 4))),
    r"x: member: bool of shape \(8, 79\); valid are \[M, N\] = \(8, 80\)": changed(member=ONE["member"][:, :79]),
    r"x: member: 2 at \[1, 3\]; valid are 0 and 1": changed(member=at(ONE["member"].astype(int), (1, 3), 2)),
    r"x: member: 2 at \[0, 3\]": {
        "probabilities": P[0],
        "y": ONE["y"],
        "member": at(ONE["member"][0].astype(int), 3, 2),
    },
    r"x: member: nan at \[0, 0\]": changed(member=at(ONE["member"].astype(float), (0, 0), np.nan)),
    r"x: member: 80 at \[4\]; valid are 4 members": changed(member=at(ONE["member"], 4, True)),
    r"x: member: bool of shape \(80, 8\); .* give member.T": changed(member=ONE["member"].T),
    r"x: logits: .*\(80, 8, 4\); .*N = 80 labels: np.moveaxis\(logits, 0, -2\)": changed(
        logits=ONE["logits"].swapaxes(0, 1)
    ),
    r"x: logits: .*\(8, 4, 80\); .*np.moveaxis\(logits, 2, -2\)": changed(logits=ONE["logits"].swapaxes(1, 2)),
    r"x: logits: float64 of shape .*name the array probabilities": changed(logits=P),
    r"x: logits: float16 of shape .*name the array probabilities": changed(logits=P.astype(np.float16)),
    r"x: logits: .*they sum to 100\): name the array prob": changed(logits=100 * P),
    r"x: population_logits: .*name the array population_prob": changed(population_logits=P, population_y=ONE["y"]),
    r"x: probabilities: -\d.*name the array logits": {**LESS, "probabilities": np.log(P)},
    r"x: probabilities: .* sum to 1 \(logits are named logits": {**LESS, "probabilities": np.abs(ONE["logits"])},
    r"x: probabilities: .*labels only": {**LESS, "probabilities": np.eye(4)[ONE["logits"].argmax(-1)]},
    r"x: logits: .*two classes or more; .*save logits=np.stack\(\[np.zeros_like\(z\), z\], -1": changed(
        logits=ONE["logits"][..., 0]
    ),
    r"x: probabilities: .*\(8, 80, 1\).*save probabilities=np.stack\(\[1 - p, p\], -1": {
        **LESS,
        "probabilities": P[..., :1],
    },
    r"x: logits: .*\(80,\); .*save probabilities=np.stack": {**LESS, "member": ONE["member"][0], "logits": P[0, :, 0]},
    r"x: logits: nan at \[3, 5, 1\]": changed(logits=NAN),
    r"x: logits: inf at \[0, 2, 0\]": changed(logits=at(ONE["logits"], (0, 2, 0), np.inf)),
    r"x: logits: int\d+ of shape": changed(logits=np.zeros((8, 80, 4), int)),
    r"x: logits: float32 of shape \(8, 80, 1\)": changed(logits=ONE["logits"][..., :1]),
    "x: probabilities: .*not both": changed(probabilities=ONE["logits"]),
    r"x: probabilities: 4.0 at \[0, 0\].* sum to 1": {**LESS, "probabilities": np.ones((8, 80, 4))},
    r"x: probabilities: -1.0 at \[0, 0, 0\].* 0 to 1": {**LESS, "probabilities": np.tile([-1.0, 2, 0, 0], (8, 80, 1))},
    "x: population_logits: missing": changed(population_y=ONE["y"]),
    "x: population_y: missing": changed(population_logits=ONE["logits"]),
    r"x: population_logits: .*7, .*; valid are 8 models": changed(
        population_logits=ONE["logits"][:7], population_y=ONE["y"]
    ),
    r"x: population_logits: nan at \[3": changed(population_logits=NAN, population_y=ONE["y"]),
    r"x: population_y: 9 at \[1\]": changed(population_logits=ONE["logits"], population_y=at(ONE["y"], 1, 9)),
    r"x: groups: .*shape \(8,\)": changed(groups=np.arange(8)),
    r"x: groups: . at \[0\]; valid are 4 members": changed(groups=np.zeros(80)),
}


@pytest.mark.parametrize("words", FAULTS)
def test_faults_are_named_before_any_attack(words, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "scores", lambda *_: pytest.fail("an attack ran"))
    with pytest.raises(ValueError, match=words):
        own_logits.audit({"x": FAULTS[words]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["y", "member", "groups", "population_y"])
def test_files_that_cannot_be_paired_are_sent_to_separate_runs(key, tmp_path):
    values = {"y": ONE["y"][::-1], "member": ~ONE["member"], "groups": np.arange(80), "population_y": ONE["y"]}
    other = changed(**{key: values[key]})
    if key == "population_y":
        other["population_logits"] = ONE["logits"]
    with pytest.raises(ValueError, match=f"sam: {key}: differs from that of sgd; .*one at a time"):
        own_logits.audit({"sgd": ONE, "sam": other}, tmp_path)


def test_names_that_collide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="different names"):
        own_logits.audit(["a/x.npz", "b/x.npz"], tmp_path)


def test_files_that_are_no_archives_end_the_command_with_one_line(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "objects.npz", **changed(y=OBJECTS))
    np.savez(tmp_path / "short.npz", **ONE)
    whole = (tmp_path / "short.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("text.npz", "empty.npz", "objects.npz", "short.npz", "absent.npz"):
        assert command_line.main(["--audit", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and name in said, said
        assert ("y: Object arrays" in said) == (name == "objects.npz")
    assert command_line.main(["--audit"]) == 2 and "valid are one or more .npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, save",
    [
        ("a.csv", lambda path, z: np.savetxt(path, z, delimiter=",")),
        ("b.npy", np.save),
        ("c.pt", lambda path, z: torch.save(torch.from_numpy(z), path)),
        ("d.PTH", lambda path, z: torch.save(torch.from_numpy(z), path)),
    ],
)
def test_other_kinds_of_files_are_refused_with_the_lines_that_make_an_npz(name, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    z = np.arange(6.0).reshape(3, 2)
    save(name, z)
    with pytest.raises(ValueError, match=f"data='{name}': valid is an .npz") as caught:
        own_logits.models("x", name)
    _, *lines = str(caught.value).splitlines()
    exec("\n".join(lines), {"np": np, "torch": torch, "y": np.arange(3), "member": np.ones(3)})
    np.testing.assert_array_equal(np.load(name[0] + ".npz")["logits"], z)


def test_two_classes_take_labels_that_are_bools_and_one_model_a_column_of_members():
    one = given(member=np.arange(80)[None] % 3 == 0, classes=2)
    plain = own_logits.models("x", one)
    for change in ({"y": one["y"].astype(bool)}, {"member": one["member"].T}, {"logits": one["logits"][0]}):
        e = own_logits.models("x", {**one, **change})
        np.testing.assert_array_equal(e.logits, plain.logits)
        np.testing.assert_array_equal(e.dataset.y, plain.dataset.y)
        np.testing.assert_array_equal(e.member, plain.member)


def coins(n_models, n=300, seed=0):
    """Members by coin flips, an example in all models and one in none; which have three models on either side."""
    member = np.random.default_rng(seed).random((n_models, n)) < 0.5
    member[:, 7], member[:, 11] = True, False
    return member, (member.sum(0) >= 3) & ((~member).sum(0) >= 3)


@pytest.mark.parametrize("design", ["coins", "one example", "a broken pair"])
def test_examples_without_enough_shadows_are_left_out_and_counted_and_the_others_judged(design, tmp_path, capsys):
    member, enough = coins(10)
    if design == "one example":
        member = given(n_models=10, n=300)["member"]
        member[:, 7] = np.arange(10) < 8
        enough = np.arange(300) != 7
    if design == "a broken pair":  # five models on either side, but no model's partner is the other's complement
        member = given(n_models=10, n=300)["member"]
        member[:, 7] = np.arange(10) < 5
        enough = np.arange(300) != 7
        assert membership.partners(member) is None and membership.partners(member[:, enough]) is not None
    one, other = (given(member=member, leak=leak) for leak in (1.0, 2.0))
    frame = own_logits.audit({"one": one, "other": other}, tmp_path)
    assert auc(frame, "other").index.tolist() == list(catalogue.NAMES)
    judged = {"logits": one["logits"][:, enough], "y": one["y"][enough], "member": member[:, enough]}
    scores = catalogue.run(**judged, only=("rmia",))["rmia"]
    expected = auc_influence_values(scores, judged["member"]).mean()
    assert auc(frame, "one").value["rmia"] == pytest.approx(expected)
    n_out = 300 - enough.sum()
    assert set(frame.n_examples) == {enough.sum()} and 1 <= n_out < 100
    assert frame[frame.metric == "examples_left_out"].value.tolist() == [n_out]
    said = f"{n_out} of 300 examples are left out"
    assert said in page(tmp_path) and f"one: {said}" in capsys.readouterr().out
    exposed = frame[(frame.metric == "exposure") & (frame.optimizer == "one")].coordinate
    assert len(exposed) == 10 and all(enough[int(name.removeprefix("example="))] for name in exposed)


def test_where_no_example_has_enough_shadows_all_are_judged_by_the_attacks_that_need_none(tmp_path):
    member, enough = coins(5)
    assert not enough.any()
    frame = own_logits.audit({"x": given(member=member)}, tmp_path)
    assert auc(frame).attack.tolist() == ALONE and set(frame.n_examples) == {300}
    assert "examples_left_out" not in set(frame.metric) and "LiRA and RMIA were left out" in page(tmp_path)


def test_precision_is_recorded_for_people_who_are_rarely_members(tmp_path):
    frame = own_logits.audit({"x": given(n_models=8, n=600)}, tmp_path)
    found = frame[(frame.attack == "lira_shrunk") & (frame.experiment == "main")].set_index("metric").value
    tpr, fpr = found["tpr@0.01"], found["realised_fpr@0.01"]
    assert found["precision@0.01,prevalence=0.1"] == pytest.approx(0.1 * tpr / (0.1 * tpr + 0.9 * fpr))


def test_the_results_of_a_study_are_not_overwritten(tmp_path):
    (tmp_path / "results.csv").write_text("notebook,value\n01,2\n")
    with pytest.raises(ValueError, match="holds other results"):
        own_logits.audit({"x": single(120)}, tmp_path)
    (tmp_path / "results.csv").unlink()
    for _ in range(2):  # its own are
        frame = own_logits.audit({"x": single(120)}, tmp_path)
    assert len(pd.read_csv(tmp_path / "results.csv")) == len(frame)

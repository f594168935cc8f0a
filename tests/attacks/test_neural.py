"""The neural attack against a loop over single networks; what it cannot know, and what it must find."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.calibration import halves_of_pool, two_optimizers
from lib.attacks import catalogue, intervals, neural, thresholds
from lib.attacks.intervals import auc_influence_values, balanced_accuracy_influence_values, estimate
from lib.attacks.membership import calibration_split
from tests.attacks.simulated import leaky


def problem(seed=0, n_models=6, n=120, leak=1.5, share=0.5):
    """What the networks look at, two arrays [M, N] of which the first is higher for members, and member [M, N]."""
    rng = np.random.default_rng(seed)
    member = np.argsort(np.argsort(rng.random((n_models, n)), axis=1), axis=1) < share * n
    return [rng.normal(size=member.shape) + leak * member, rng.normal(size=member.shape)], member


def one_network(x, label, learn, stop, batches, start):
    """Plain PyTorch, one network: the log-odds of all examples x [n, F]."""
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], neural.HIDDEN), torch.nn.ReLU())
    net.append(torch.nn.Linear(neural.HIDDEN, 1))
    for parameter, value in zip(net.parameters(), start, strict=True):
        parameter.data = value.clone()
    optimizer, lowest, best = torch.optim.Adam(net.parameters(), neural.RATE), np.inf, None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, neural.STEPS)

    def loss(index, part):
        p, target, share = torch.sigmoid(net(x[index])[:, 0]), label[index], label[part].mean()
        return (-target * p.log() / share - (1 - target) * (1 - p).log() / (1 - share)).mean() / 2

    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss(batch, learn).backward()
        optimizer.step()
        schedule.step()
        if step % neural.EVERY == 0 and (now := loss(stop, stop).item()) < lowest:
            lowest, best = now, net(x)[:, 0].detach()
    return best.numpy()


def test_networks_trained_at_once_equal_networks_trained_one_by_one(monkeypatch):
    monkeypatch.setattr(neural, "BATCH", 64)
    seen, member = problem(n_models=4)
    scores, own, part = neural.attack(seen, member)
    assert scores.dtype == np.float32 and (part == calibration_split(member, 0, parts=3)).all()
    x = np.stack(seen, -1).reshape(-1, 2)
    x = torch.from_numpy((x - x.mean(0)) / (x.std(0) + 1e-6)).clip(-neural.CLIP, neural.CLIP).float()
    label, parts = torch.from_numpy(member.ravel()).float(), [np.flatnonzero(part == k) for k in range(3)]
    random = torch.Generator().manual_seed(int(np.random.default_rng(0).integers(2**62)))
    orders = [rows[torch.randperm(len(rows), generator=random)] for rows in parts]
    first = torch.randn(2, neural.HIDDEN, generator=random) * (2 / 2) ** 0.5
    kinks = x[torch.randint(len(x), (neural.HIDDEN,), generator=random)]
    start = first.T, -torch.stack([k @ w for k, w in zip(kinks, first.T, strict=True)])
    start += torch.zeros(1, neural.HIDDEN), torch.zeros(1)
    shortest = min(map(len, parts))
    for k in range(3):
        endless = np.tile(orders[k], 1 + neural.STEPS * 64 // len(orders[k]))[: neural.STEPS * 64]
        odds = one_network(x, label, parts[k], orders[(k + 1) % 3][:shortest], endless.reshape(-1, 64), start)
        judged, stopped = (part.ravel() == (k + ahead) % 3 for ahead in (2, 1))
        np.testing.assert_allclose(scores.ravel()[judged], odds[judged], atol=5e-3)
        np.testing.assert_allclose(own.ravel()[stopped], odds[stopped], atol=5e-3)


def test_no_score_and_no_decision_depends_on_the_membership_it_judges(monkeypatch):
    seen, member = problem()
    part, y = calibration_split(member, parts=3), np.random.default_rng(2).integers(0, 4, 120)
    other, rng = member.copy(), np.random.default_rng(1)
    for m in range(len(member)):  # within one part, who is a member is drawn again
        judged = np.flatnonzero(part[m] == 2)
        other[m, judged] = rng.permutation(member[m, judged])
    monkeypatch.setattr(neural, "calibration_split", lambda *_, **__: part)
    (first, own, _), (second, own_second, _) = (neural.attack(seen, a) for a in (member, other))
    assert (first[part == 2] == second[part == 2]).all() and (own[part == 1] == own_second[part == 1]).all()
    assert (first[part != 2] != second[part != 2]).any()
    decided = [
        thresholds.classwise(s, a, y, part=part, own=o)[part == 2]
        for s, a, o in ((first, member, own), (second, other, own_second))
    ]
    assert (decided[0] == decided[1]).all()
    crossed = [thresholds.classwise(s, a, y, part=part)[part == 2] for s, a in ((first, member), (second, other))]
    assert (crossed[0] != crossed[1]).any()  # thresholds from the next part's scores would have known


def test_null_is_one_half_unless_a_network_saw_what_partners_have_in_common(monkeypatch):
    """Two partners answer alike, and their classes are plain to see."""
    for name, value in {"BATCH": 256, "STEPS": 40}.items():
        monkeypatch.setattr(neural, name, value)
    found = {"shared": [], "decided": [], "apart": []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        member, y = halves_of_pool(rng, 2, 90), rng.integers(0, 3, 90)
        seen = [np.tile(rng.normal(size=90), (2, 1)), np.tile(1.0 * y, (2, 1))]
        scores, own, part = neural.attack(seen, member, seed)
        found["shared"].append(auc_influence_values(scores, member).mean())
        decided = thresholds.classwise(scores, member, y, part=part, own=own)
        found["decided"].append(balanced_accuracy_influence_values(decided, member, 0.0).mean())
        apart = np.stack([part[0], (part[0] + 1) % 3])  # the second model's part was learned from the first
        with monkeypatch.context() as patched:
            patched.setattr(neural, "calibration_split", lambda *_, apart=apart, **__: apart)
            found["apart"].append(auc_influence_values(neural.attack(seen, member, seed)[0], member).mean())
    z = {name: (np.mean(v) - 0.5) / (np.std(v) / np.sqrt(len(v))) for name, v in found.items()}
    assert abs(z["shared"]) < 4 and abs(z["decided"]) < 4 and z["apart"] < -6, z


def test_finds_a_shape_of_the_output_that_confidence_cannot():
    """All have p_y = 0.6; a member's other classes are alike, of a non-member's one stands out."""
    rng = np.random.default_rng(0)
    member, y = problem(n_models=24, n=200)[1], rng.integers(0, 5, 200)
    rest = rng.normal(size=(24, 200, 5)) * np.where(member, 0.3, 1.5)[..., None]
    rest[:, np.arange(200), y] = -np.inf
    p = 0.4 * np.exp(rest) / np.exp(rest).sum(-1, keepdims=True)
    p[:, np.arange(200), y] = 0.6 + 0.01 * rng.normal(size=(24, 200))
    out = catalogue.run(np.log(p), y, member, only=catalogue.ALONE)
    auc = {name: auc_influence_values(scores, member).mean() for name, scores in out.items()}
    assert abs(auc["confidence"] - 0.5) < 0.05 and auc["neural"] > auc["confidence"] + 0.35
    assert auc["neural_classwise"] > auc["confidence_classwise"] + 0.3
    assert balanced_accuracy_influence_values(out["neural_classwise"], member, 0.0).mean() > 0.8


@pytest.mark.parametrize("n_models, n", [(20, 800), (1, 3000)])
def test_reaches_the_optimal_auc_on_gaussians(n_models, n):
    # phi ~ N(1 + member, 1) and nothing else: the best AUC is Phi(1 / sqrt 2) = 0.760
    rng, member = np.random.default_rng(0), problem(n_models=n_models, n=n)[1]
    phi = rng.normal(size=member.shape) + 1 + member
    scores = neural.attack([phi], member)[0]
    found = estimate(auc_influence_values(scores, member), examples_only=n_models == 1)
    assert found.low - 0.01 < stats.norm.cdf(1 / np.sqrt(2)) < found.high + 0.01
    # log-odds: log N(phi; 2, 1) - log N(phi; 1, 1) = phi - 3/2
    slope = np.polyfit(phi.ravel(), scores.ravel(), 1)
    assert slope[0] == pytest.approx(1, abs=0.2) and -slope[1] / slope[0] == pytest.approx(1.5, abs=0.15)


def test_members_and_non_members_weigh_alike_whatever_their_numbers():
    seen, member = problem(n_models=10, n=400, leak=0.0, share=0.8)
    assert abs(neural.attack(seen, member)[0].mean()) < 0.1  # log(0.8 / 0.2) = 1.39 without weights


def test_the_same_seed_gives_the_same_scores_and_blocks_change_nothing(monkeypatch):
    seen, member = problem()
    scores = neural.attack(seen, member)[0]
    assert (neural.attack(seen, member)[0] == scores).all()
    assert (neural.attack(seen, member, seed=1)[0] != scores).any()
    monkeypatch.setattr(neural, "BLOCK", 50)
    np.testing.assert_allclose(neural.attack(seen, member)[0], scores, atol=1e-5)


def test_a_sample_of_the_outputs_teaches_about_as_much_as_all(monkeypatch):
    phi, member = leaky(n_models=40, n=1000, leak=1.0)
    whole = auc_influence_values(neural.attack([phi], member)[0], member).mean()
    monkeypatch.setattr(neural, "CELLS", 8000)
    part = auc_influence_values(neural.attack([phi], member)[0], member).mean()
    assert whole - 0.01 < part < whole + 0.005


def test_survives_certain_and_constant_outputs():
    rng = np.random.default_rng(0)
    member, y, logits = problem()[1], rng.integers(0, 4, 120), rng.normal(size=(6, 120, 4))
    logits[0] = 0.0  # one model says nothing
    logits[1] *= 1e4
    logits[2, :5, 0] = -np.inf
    scores = catalogue.run(logits, y, member, only=catalogue.ALONE)["neural"]
    assert np.isfinite(scores).all()
    assert auc_influence_values(scores, member)[0].mean() == pytest.approx(0.5, abs=0.1)


def test_intervals_cover_the_truth_although_targets_share_networks():
    found = []
    for seed in range(60):
        a, b, member = two_optimizers(seed, 8, 260)
        scores = {name: neural.attack([phi], member, seed)[0] for name, phi in (("a", a), ("b", b))}
        found.append(intervals.table(scores, member, fprs=())[["value", "ci_low", "ci_high"]])
    value, low, high = np.moveaxis(np.array(found), 2, 0)  # [replications, rows] each
    held = ((low <= value.mean(0)) & (value.mean(0) <= high)).mean(0)
    assert (held > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 60)).all() and held.mean() > 0.9, held


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seen": [np.zeros((6, 119))]}, r"scores: shape \(6, 119\)"),
        ({"member": np.ones((6, 120), int)}, "member: dtype int64"),
        ({"member": np.arange(120) < np.full((6, 1), 2)}, "member: row 0 has 2 members .* at least 3"),
        ({"seen": [np.full((6, 120), np.nan)]}, "scores: NaN"),
    ],
)
def test_faults_are_named(change, words):
    seen, member = problem()
    with pytest.raises(ValueError, match=words):
        neural.attack(**{"seen": seen, "member": member, **change})

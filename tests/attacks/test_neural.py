"""The neural attack against a loop over single networks; what it cannot know, and what it must find."""

import numpy as np
import pytest
import torch
from scipy import stats

from lib.attacks import catalogue, intervals, neural, thresholds
from lib.attacks.intervals import auc_influence_values, balanced_accuracy_influence_values, estimate
from lib.attacks.membership import calibration_split
from lib.attacks.signals import signals


def problem(seed=0, n_models=6, n=120, n_classes=4, leak=1.5, share=0.5):
    """Logits [M, N, C] whose label's logit is higher for members, labels [N], member [M, N]."""
    rng = np.random.default_rng(seed)
    member = np.argsort(np.argsort(rng.random((n_models, n)), axis=1), axis=1) < share * n
    y = rng.integers(0, n_classes, n)
    logits = 2 * rng.normal(size=(n_models, n, n_classes)).astype(np.float32)
    logits[:, np.arange(n), y] += 2 + leak * member
    return logits, y, member


def one_network(x, label, learn, stop, seed=0):
    """Plain PyTorch, one network: the log-odds of all examples x [N, features]."""
    x = (x - x[learn].mean(0)) / (x[learn].std(0, correction=0) + 1e-6)
    x = x.clamp(-neural.CLIP, neural.CLIP)
    random = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62)))
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    net[0].weight.data = torch.randn(x.shape[1], 64, generator=random).T * (2 / x.shape[1]) ** 0.5
    optimizer, lowest, waited, best = torch.optim.Adam(net.parameters(), neural.RATE), np.inf, 0, None

    def loss(index, quarter):
        p, target, share = torch.sigmoid(net(x[index])[:, 0]), label[index], label[quarter].mean()
        return (-target * p.log() / share - (1 - target) * (1 - p).log() / (1 - share)).mean() / 2

    for step in range(neural.STEPS + 1):
        if step % neural.EVERY == 0:
            now, waited = loss(stop, stop).item(), waited + 1
            if now < lowest:
                lowest, waited, best = now, 0, net(x)[:, 0].detach()
            if waited >= neural.PATIENCE:
                break
        batch = torch.randperm(len(learn), generator=random)[: neural.BATCH]
        optimizer.zero_grad()
        loss(learn[batch], learn).backward()
        optimizer.step()
    return best.numpy()


def test_networks_trained_at_once_equal_networks_trained_one_by_one():
    logits, y, member = problem(n_models=3)
    half = calibration_split(member)
    second = calibration_split(2 * half + member, 0, y)  # of the two quarters of its half
    scores, own = neural.attack(logits, y, member, half)
    p = torch.from_numpy(logits).double().softmax(-1)
    for m in range(3):
        p_y = p[m, np.arange(120), y]
        top = p[m].sort(-1, descending=True)[0].log()
        x = torch.cat([top, (p_y / (1 - p_y)).log()[:, None], p_y.log()[:, None]], 1).float()
        odds = np.empty((2, 2, 120))
        for h in range(2):
            for k in range(2):
                learn, stop = (torch.from_numpy(np.flatnonzero((half[m] == h) & (second[m] == s))) for s in (1 - k, k))
                odds[h, k] = one_network(x, torch.from_numpy(member[m]).float(), learn, stop)
        for i in range(120):
            assert scores[m, i] == pytest.approx(odds[1 - int(half[m, i]), :, i].mean(), abs=2e-3)
            assert own[m, i] == pytest.approx(odds[int(half[m, i]), int(second[m, i]), i], abs=2e-3)


def test_no_score_and_no_decision_depends_on_the_membership_it_judges():
    logits, y, member = problem()
    half = calibration_split(member, 0, y)
    other, rng = member.copy(), np.random.default_rng(1)
    for m in range(len(member)):  # within one half, who is a member is drawn again
        judged = np.flatnonzero(half[m])
        other[m, judged] = rng.permutation(member[m, judged])
    (first, own), (second, own_second) = (neural.attack(logits, y, a, half) for a in (member, other))
    assert (first[half] == second[half]).all() and (own[~half] == own_second[~half]).all()
    assert (first[~half] != second[~half]).any()
    decided = [
        thresholds.classwise(s, a, y, half=half, own=o)[half]
        for s, a, o in ((first, member, own), (second, other, own_second))
    ]
    assert (decided[0] == decided[1]).all()
    crossed = [thresholds.classwise(s, a, y, half=half)[half] for s, a in ((first, member), (second, other))]
    assert (crossed[0] != crossed[1]).any()  # thresholds from the other half's scores would have known


def test_null_is_one_half_where_a_look_at_the_judged_would_show():
    found = {name: [] for name in ("auc", "accuracy", "classwise", "seen")}
    for seed in range(5):
        logits, y, member = problem(seed, n_models=100, n=40, leak=0.0)
        half = calibration_split(member, seed, y)
        scores, own = neural.attack(logits, y, member, half, seed)
        found["auc"].append(auc_influence_values(scores, member))
        found["accuracy"].append(balanced_accuracy_influence_values(scores, member))
        decided = thresholds.classwise(scores, member, y, half=half, own=own)
        found["classwise"].append(balanced_accuracy_influence_values(decided, member, 0.0))
        # own scores come from a network that stopped at the example: a faint look, and it must be detectable
        found["seen"].append(auc_influence_values(own, member))
    for name, influence_values in found.items():
        rows = np.concatenate(influence_values).mean(1)
        z = (rows.mean() - 0.5) / (rows.std() / np.sqrt(len(rows)))
        assert z > 6 if name == "seen" else abs(z) < 4, (name, z)


def test_knows_nothing_of_how_many_of_a_class_are_members():
    rng, found = np.random.default_rng(0), {"default": [], "within classes": []}
    for seed in range(10):
        _, y, member = problem(seed, n_models=20, n=60, n_classes=5, leak=0.0)
        logits = np.eye(5)[y] * (1.0 + y[:, None]) + 0.01 * rng.normal(size=(20, 60, 5))  # the class is plain to see
        for name, half in (("default", None), ("within classes", calibration_split(member, seed, y))):
            found[name].append(auc_influence_values(neural.attack(logits, y, member, half, seed)[0], member))
    for name, influence_values in found.items():
        rows = np.concatenate(influence_values).mean(1)
        z = (rows.mean() - 0.5) / (rows.std() / np.sqrt(len(rows)))
        assert z > 6 if name == "within classes" else abs(z) < 4, (name, z)


def test_finds_a_shape_of_the_output_that_confidence_cannot():
    """All have p_y = 0.6; a member's other classes are alike, of a non-member's one stands out."""
    rng = np.random.default_rng(0)
    _, y, member = problem(n_models=24, n=200, n_classes=5)
    rest = rng.normal(size=(24, 200, 5)) * np.where(member, 0.3, 1.5)[..., None]
    rest[:, np.arange(200), y] = -np.inf
    p = 0.4 * np.exp(rest) / np.exp(rest).sum(-1, keepdims=True)
    p[:, np.arange(200), y] = 0.6 + 0.01 * rng.normal(size=(24, 200))
    out = catalogue.run(np.log(p), y, member)
    auc = {
        name: auc_influence_values(scores, member).mean()
        for name, scores in out.items()
        if not name.startswith(("lira", "rmia"))
    }
    assert abs(auc["confidence"] - 0.5) < 0.05 and auc["neural"] > auc["confidence"] + 0.35
    assert auc["neural_classwise"] > auc["confidence_classwise"] + 0.3
    assert balanced_accuracy_influence_values(out["neural_classwise"], member, 0.0).mean() > 0.8


def test_reaches_the_optimal_auc_on_gaussians():
    # phi ~ N(1 + member, 1) and nothing else: the best AUC is Phi(1 / sqrt 2) = 0.760
    rng, (_, y, member) = np.random.default_rng(0), problem(n_models=20, n=800, n_classes=2)
    logits = np.zeros((20, 800, 2))
    logits[:, np.arange(800), y] = rng.normal(size=member.shape) + 1 + member
    scores, _ = neural.attack(logits, y, member)
    found = estimate(auc_influence_values(scores, member))
    assert found.low - 0.015 < stats.norm.cdf(1 / np.sqrt(2)) < found.high + 0.015
    # log-odds: log N(phi; 2, 1) - log N(phi; 1, 1) = phi - 3/2
    slope = np.polyfit(signals(logits, y, only=("phi",))["phi"].ravel(), scores.ravel(), 1)
    assert slope[0] == pytest.approx(1, abs=0.2) and -slope[1] / slope[0] == pytest.approx(1.5, abs=0.15)


def test_members_and_non_members_weigh_alike_whatever_their_numbers():
    logits, y, member = problem(n_models=10, n=400, leak=0.0, share=0.8)
    assert abs(neural.attack(logits, y, member)[0].mean()) < 0.1  # log(0.8 / 0.2) = 1.39 without weights


def test_blocks_order_memory_maps_and_the_seed(tmp_path, monkeypatch):
    logits, y, member = problem()
    scores, _ = neural.attack(logits, y, member)
    assert (neural.attack(logits, y, member)[0] == scores).all()
    assert (neural.attack(logits, y, member, seed=1)[0] != scores).any()
    order = np.random.default_rng(0).permutation(6)
    np.testing.assert_allclose(neural.attack(logits[order], y, member[order])[0], scores[order], atol=1e-4)
    np.save(tmp_path / "logits.npy", logits)
    monkeypatch.setattr(neural, "BLOCK", 1)  # each target alone
    mapped, _ = neural.attack(np.load(tmp_path / "logits.npy", mmap_mode="r"), y, member)
    np.testing.assert_allclose(mapped, scores, atol=1e-4)
    assert scores.dtype == np.float32


def test_the_block_changes_nothing_where_models_have_members_of_different_number(monkeypatch):
    logits, y, _ = problem()
    member = np.random.default_rng(3).random((6, 120)) < np.linspace(0.3, 0.7, 6)[:, None]
    together, _ = neural.attack(logits, y, member)
    monkeypatch.setattr(neural, "BLOCK", 1)
    np.testing.assert_allclose(neural.attack(logits, y, member)[0], together, atol=1e-4)


def test_survives_certain_and_constant_outputs():
    logits, y, member = problem()
    logits[0] = 0.0  # one model says nothing
    logits[1] *= 1e4
    logits[2, :5, 0] = -np.inf
    scores, _ = neural.attack(logits, y, member)
    assert np.isfinite(scores).all()
    assert intervals.auc_influence_values(scores, member)[0].mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_agree():
    logits, y, member = problem()
    scores = [neural.attack(logits, y, member, device=device)[0] for device in ("cpu", "cuda")]
    np.testing.assert_allclose(*scores, atol=0.05)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"logits": np.zeros((120, 4))}, r"logits: shape \(120, 4\); valid is \[M, N, C\]"),
        ({"member": np.ones((6, 120), int)}, "member: dtype int64"),
        ({"member": np.arange(120) < np.full((6, 1), 3)}, "member: row 0 has 3 .* at least 4"),
        ({"y": np.full(120, 9)}, "y: values 9"),
        ({"logits": np.full((6, 120, 4), np.nan)}, "logits: .*nan"),
    ],
)
def test_faults_are_named(change, words):
    logits, y, member = problem()
    with pytest.raises(ValueError, match=words):
        neural.attack(**{"logits": logits, "y": y, "member": member, **change})

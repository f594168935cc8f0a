"""What readers bring: what cannot be mapped over models, what is frozen, what draws random numbers."""

from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from lib.analysis import compare
from lib.training import Recipe, ensemble, networks, step, train, trial
from tests.training.test_sharpness import REFERENCE, assert_is_the_twin

HERE = "tests.training.test_trial"


# ---- rules and networks that torch.func refuses --------------------------------------------------------------


def clip(gradient, params):
    """The gradient, of norm 1 at most."""
    grads, aux = gradient(params)
    size = sum((g**2).sum() for g in grads.values()).sqrt()
    return ({n: g / size for n, g in grads.items()} if size > 1 else grads), aux


def item(gradient, params, is_kth_step, k=2):
    """As clip, by another way, in every second step."""
    grads, aux = gradient(params)
    size = sum((g**2).sum() for g in grads.values()).sqrt()
    return {n: g / (1 if is_kth_step else max(1, size.item())) for n, g in grads.items()}, aux


def clip_twin(twin, x, y):
    g = twin.gradient(x, y)
    return g / max(1, g.norm())


def item_twin(twin, x, y):
    return twin.gradient(x, y) if twin.at % 2 == 0 else clip_twin(twin, x, y)


class Recurrent(nn.Module):
    def __init__(self, kind, n_classes):
        super().__init__()
        self.cells, self.last = kind(1, 8, batch_first=True), nn.Linear(8, n_classes)

    def forward(self, x):
        return self.last(self.cells(x.flatten(1)[..., None])[0][:, -1])


def gru(shape, n_classes):
    return Recurrent(nn.GRU, n_classes)


def lstm(shape, n_classes):
    return Recurrent(nn.LSTM, n_classes)


class Old(torch.autograd.Function):
    """A rectifier written as autograd functions were before torch.func."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, slope):
        return slope * (ctx.saved_tensors[0] > 0)


class Layers(nn.Module):
    """Two linear layers, with `between` called on the hidden layer [B, 8]."""

    def __init__(self, shape, n_classes, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(prod(shape), 8), nn.Linear(8, n_classes), between

    def forward(self, x):
        return self.last(self.between(self.first(x.flatten(1))))


def into_zeros(h):
    out = torch.zeros(len(h), 8)
    out[:, ::2] = h[:, ::2].tanh()
    return out


def zeros(shape, n_classes):
    return Layers(shape, n_classes, into_zeros)


def branch(shape, n_classes):
    return Layers(shape, n_classes, lambda h: h / 2 if h.abs().max() > 1 else h.relu())


def old(shape, n_classes):
    return Layers(shape, n_classes, Old.apply)


def old_images(shape, n_classes):
    """A convolution, which is not stacked anyway."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4), nn.Flatten(1), Layers((4 * 14 * 14,), n_classes, Old.apply)
    )


def spectral(shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(prod(shape), n_classes)))


@pytest.mark.parametrize(
    "arch, optimizer, named",
    [("mlp", "clip", "optimizers"), ("mlp", "item", "optimizers"), ("mlp", "clip+torch.optim:RMSprop", "optimizers")]
    + [(arch, "sgd", "arch") for arch in ("gru", "zeros", "branch", "old", "spectral")]
    + [("gru", "clip", "arch"), ("lstm", "sam", "arch")],
)
def test_what_cannot_be_mapped_is_trained_one_at_a_time_as_in_the_plain_loop(
    table, tmp_path, monkeypatch, capsys, arch, optimizer, named
):
    monkeypatch.setitem(REFERENCE, f"{HERE}:clip", clip_twin)
    monkeypatch.setitem(REFERENCE, f"{HERE}:item", item_twin)
    arch = arch if arch == "mlp" else f"{HERE}:{arch}"
    optimizer = optimizer if optimizer in ("sgd", "sam") else f"{HERE}:{optimizer}"
    recipe = Recipe(arch, optimizer, rho=0.1, epochs=2, batch_size=8, lr=0.01 if "RMS" in optimizer else 0.5)
    found = train(recipe, table, 4, tmp_path, "cpu", quiet=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"{named}='") and "one at a time" in said and "issue" not in said
    for k in (0, 3):
        assert_is_the_twin(found, table, k, rtol=1e-3, atol=1e-5)
    train(recipe, table, 4, tmp_path, "cpu", quiet=True)
    assert not capsys.readouterr().out  # nothing was left to train


def test_so_are_images_augmented_averaged_and_asked_for_labels(images, tmp_path):
    recipe = Recipe(f"{HERE}:old_images", "sam", 0.1, epochs=2, batch_size=8, augment=True, queries=3, ema=0.9)
    found = train(recipe, images, 4, tmp_path, "cpu", quiet=True)
    assert found.logits.shape == (4, 3, 48, 3) and np.isfinite(found.logits).all()
    net, params, buffers = found.weights(1)
    answers = compare.label_answers(found)
    assert answers.shape[1:] == (4, 48)
    with torch.no_grad():
        np.testing.assert_allclose(net(torch.from_numpy(ensemble.inputs(images)[0])), found.logits[1, 0], atol=1e-4)


def test_one_at_a_time_is_the_same_gradient_as_stacked(table):
    """Ordinary autograd and torch.func agree on a network that both take, for each thing that a rule may ask for."""
    recipe = Recipe(optimizer="esam", rho=0.1, batch_size=8)
    x, y = torch.from_numpy(table.x[None, :8]), torch.from_numpy(table.y[None, :8])
    stacks = [step.Stack(recipe, (6,), 4, 1, torch.device("cpu"), alone=alone).reset(recipe, [3]) for alone in (0, 1)]
    context = {"rho": torch.tensor([0.1]), "uniform": torch.full((1, 4), 0.5)}
    for stack in stacks:
        stack.step(x, y, context, 0.1, True)
    for name, weight in stacks[0].params.items():
        torch.testing.assert_close(weight, stacks[1].params[name])


def unfit(gradient, params):
    grads, aux = gradient(params)
    return {n: g.view(3, 2) if "weight" in n else g for n, g in grads.items()}, aux


def untrainable(shape, n_classes):
    return Layers(shape, n_classes, lambda h: h.detach().numpy() if h.requires_grad else h)


def all_frozen(shape, n_classes):
    return nn.Linear(shape[0], n_classes).requires_grad_(False)


class Differentiable(torch.optim.SGD):
    """Asks for a derivative of the gradient, as AdaHessian does."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            torch.autograd.grad(p.grad.sum(), p)


class Needy(torch.optim.SGD):
    def step(self, loss):
        super().step()


@pytest.mark.parametrize(
    "arch, optimizer, says",
    [
        ("mlp", "own:unfit", "optimizers='own:unfit' fails"),
        ("own:untrainable", "sam", "arch='own:untrainable' fails"),
        ("own:untrainable", "own:clip", "arch='own:untrainable' fails"),
        ("own:all_frozen", "sgd", "arch='own:all_frozen' has no parameter that is trained"),
        ("mlp", "torch.optim:Muon", "optimizers='torch.optim:Muon' fails.*2D"),
        ("mlp", "sam+torch.optim:SparseAdam", "optimizers='sam.torch.optim:SparseAdam' fails.*dense"),
        ("mlp", "own:Differentiable", "optimizers='own:Differentiable' fails"),
        ("mlp", "own:Needy", "optimizers='own:Needy' fails"),
        ("own:gru", "dpsgd", "arch='own:gru' gives no gradient of each example"),
    ],
)
def test_what_fails_either_way_is_named_before_training(table, tmp_path, arch, optimizer, says):
    arch, optimizer, says = (text.replace("own:", f"{HERE}:") for text in (arch, optimizer, says))
    with pytest.raises(ValueError, match=says):
        train(Recipe(arch, optimizer, rho=0.1, epochs=2, batch_size=8), table, 2, tmp_path, "cpu", quiet=True)
    assert not list(tmp_path.iterdir())


def bare(shape, n_classes):
    return nn.Linear(shape[0], n_classes, bias=False)


def test_an_optimizer_is_tried_on_the_network_that_it_is_for(table, tmp_path):
    """Muon takes matrices alone, and a network may have nothing else."""
    recipe = Recipe(f"{HERE}:bare", "torch.optim:Muon", epochs=2, batch_size=8, lr=0.02)
    assert len(train(recipe, table, 2, tmp_path, "cpu", quiet=True).ids) == 2


def test_a_trial_changes_no_array_and_is_not_made_for_what_is_ours(table, tmp_path, monkeypatch):
    def linear(shape, n_classes):
        return networks.mlp(shape, n_classes)

    monkeypatch.setitem(globals(), "linear", linear)
    named, ours = (
        Recipe(f"{HERE}:linear", "sam", 0.1, epochs=2, batch_size=8),
        Recipe("mlp", "sam", 0.1, epochs=2, batch_size=8),
    )
    first, second = (train(r, table, 2, tmp_path, "cpu", quiet=True) for r in (named, ours))
    np.testing.assert_array_equal(first.logits, second.logits)
    monkeypatch.setattr(step, "Stack", None)
    assert trial.trial(ours, (6,), 4, torch.device("cpu")) == ""

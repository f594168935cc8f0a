"""What readers bring: what cannot be mapped over models, what is frozen, what draws random numbers."""

import random
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from lib.analysis import flatness
from lib.attacks import label_only
from lib.training import Recipe, ensemble, networks, privacy, step, train, trial, workers
from lib.training.recipe import learning_rate
from tests.training.test_sharpness import REFERENCE, Twin, assert_is_the_twin

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


def saving(shape, n_classes):
    """A checkpoint that is reentrant works in backward() alone."""

    def between(h):
        return checkpoint(torch.tanh, h, use_reentrant=True, preserve_rng_state=False) if h.requires_grad else h.tanh()

    return Layers(shape, n_classes, between)


class Centred(nn.Linear):
    """Subtracts a running mean, which it assigns anew: `mean` is a buffer, or an attribute that nobody would store."""

    def __init__(self, shape, n_classes, as_buffer=True):
        super().__init__(shape[0], n_classes)
        if as_buffer:
            self.register_buffer("mean", torch.zeros(shape[0]))
        else:
            self.mean = torch.zeros(shape[0])

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return super().forward(x - self.mean)


def remembering(shape, n_classes):
    return Centred(shape, n_classes, as_buffer=False)


class Embedded(nn.Module):
    """An embedding of the rounded first feature."""

    def __init__(self, shape, n_classes, is_sparse=False):
        super().__init__()
        self.table = nn.Embedding(5, n_classes, sparse=is_sparse)

    def forward(self, x):
        return self.table(x[:, 0].clamp(-2, 2).add(2).long())


def sparse(shape, n_classes):
    return Embedded(shape, n_classes, is_sparse=True)


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
    + [(arch, "sgd", "arch") for arch in ("gru", "zeros", "branch", "old", "saving", "spectral")]
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
    workers.tell_once.cache_clear()
    found = train(recipe, table, 4, tmp_path, "cpu", quiet=True)
    train(replace(recipe, seed=1), table, 4, tmp_path, "cpu", quiet=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"{named}='") and "one at a time" in said and "issue" not in said
    for k in (0, 3):
        assert_is_the_twin(found, table, k, rtol=1e-3, atol=1e-5)


def test_sparse_gradients_are_made_dense(table, tmp_path):
    first, second = (
        train(Recipe(f"{HERE}:{name}", "sam", 0.1, epochs=2, batch_size=8), table, 2, tmp_path, "cpu", quiet=True)
        for name in ("sparse", "Embedded")
    )
    np.testing.assert_allclose(first.logits, second.logits, rtol=1e-5, atol=1e-6)


def test_buffers_that_are_assigned_are_kept_as_in_the_plain_loop(table, tmp_path):
    found = train(Recipe(f"{HERE}:Centred", epochs=2, batch_size=8), table, 2, tmp_path, "cpu", quiet=True)
    assert found.weights(1)[2]["mean"].abs().max() > 0.01
    assert_is_the_twin(found, table, 1, rtol=1e-3, atol=1e-5)


def test_so_are_images_augmented_averaged_and_asked_for_labels(images, tmp_path):
    recipe = Recipe(f"{HERE}:old_images", "sam", 0.1, epochs=2, batch_size=8, augment=True, queries=3, ema=0.9)
    found = train(recipe, images, 4, tmp_path, "cpu", quiet=True)
    assert found.logits.shape == (4, 3, 48, 3) and np.isfinite(found.logits).all()
    net, params, buffers = found.weights(1)
    answers = label_only.answers([lambda x: net(x).argmax(-1)], ensemble.inputs(images)[0], images.y, True)
    assert answers.shape[1:] == (1, 48)
    with torch.no_grad():
        np.testing.assert_allclose(net(torch.from_numpy(ensemble.inputs(images)[0])), found.logits[1, 0], atol=1e-4)


@pytest.mark.parametrize("arch", ["gru", "old"])
def test_flatness_is_measured_on_such_networks_too(table, tmp_path, arch):
    found = train(Recipe(f"{HERE}:{arch}", epochs=2, batch_size=8), table, 2, tmp_path, "cpu", quiet=True)
    assert np.isfinite(flatness.flatness(found, 0.1)).all()


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


class Closing(torch.optim.SGD):
    """Can't be stepped without a closure, though its signature does not say so."""

    def step(self, closure=None):
        super().step(closure)
        closure()


@pytest.mark.parametrize(
    "arch, optimizer, says",
    [
        ("mlp", "own:unfit", "optimizers='own:unfit' fails"),
        ("mlp", "lib.training.networks:mlp", "optimizers='lib.training.networks:mlp' fails"),
        ("mlp", "os.path:join", "optimizers='os.path:join' fails.*a rule returns .grads, aux.*"),
        ("own:untrainable", "sam", "arch='own:untrainable' fails"),
        ("own:untrainable", "own:clip", "arch='own:untrainable' fails"),
        ("own:all_frozen", "sgd", "arch='own:all_frozen' has no parameter that is trained"),
        ("mlp", "torch.optim:Muon", "optimizers='torch.optim:Muon' fails.*2D"),
        ("mlp", "sam+torch.optim:SparseAdam", "optimizers='sam.torch.optim:SparseAdam' fails.*dense"),
        ("mlp", "own:Differentiable", "optimizers='own:Differentiable' fails"),
        ("mlp", "own:Closing", "optimizers='own:Closing' fails"),
        ("own:gru", "dpsgd", "optimizers='dpsgd' fails.*tried on arch='own:gru'"),
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


# ---- frozen parameters ---------------------------------------------------------------------------------------


class Held(nn.Module):
    """Three layers, of which the middle one and the last bias do not train: frozen parameters, or buffers."""

    def __init__(self, shape, n_classes, as_buffers):
        super().__init__()
        widths = [prod(shape), 8, 8, n_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        for layer, name in ((self.layers[1], "weight"), (self.layers[1], "bias"), (self.layers[2], "bias")):
            value = getattr(layer, name).requires_grad_(False)
            if as_buffers:
                delattr(layer, name)
                layer.register_buffer(name, value.detach())

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers[:2]:
            x = layer(x).relu()
        return self.layers[2](x)


def frozen(shape, n_classes):
    return Held(shape, n_classes, False)


def buffered(shape, n_classes):
    return Held(shape, n_classes, True)


@pytest.mark.parametrize(
    "optimizer", ["sam", "msam(m=3)", "swa", "adamw", "asam", "dpsam(clip=0.5)", "torch.optim:RMSprop", "own:clip"]
)
def test_frozen_parameters_are_as_buffers_and_do_not_move(table, tmp_path, optimizer):
    """They stay out of weight decay, of SAM's norm, of averages and of private noise and norms."""
    settings = dict(
        optimizer=optimizer.replace("own:", f"{HERE}:"), rho=0.2, epochs=2, batch_size=8, lr=0.01, weight_decay=0.1
    )
    first, second = (
        train(
            Recipe(f"{HERE}:{name}", ema=0 if optimizer == "swa" else 0.5, **settings),
            table,
            2,
            tmp_path,
            "cpu",
            quiet=True,
        )
        for name in ("frozen", "buffered")
    )
    np.testing.assert_allclose(first.logits, second.logits, rtol=1e-5, atol=1e-6)
    start = step.initial_state(first.recipe, (6,), 4, range(2), torch.device("cpu"))
    for k in range(2):
        _, params, buffers = first.weights(k)
        assert set(buffers) == {"layers.1.weight", "layers.1.bias", "layers.2.bias"}
        for name, held in buffers.items():
            assert torch.equal(held, start[1][name][k]), name
        for name, weight in params.items():
            assert not torch.equal(weight, start[0][name][k]), name


def test_private_norms_leave_frozen_parameters_out():
    torch.manual_seed(0)
    net, x, y = frozen((6,), 4).double(), torch.randn(5, 6).double(), torch.arange(5) % 4
    params, buffers = networks.parts(net)

    def loss(params, x, y):
        return F.cross_entropy(functional_call(net, (params, buffers), (x,)), y)

    norms, weighted_sum = privacy.by_layer(lambda *batch: (loss(*batch), ()), params, x, y, net)
    assert weighted_sum(norms)[0].keys() == params.keys()
    for i, found in enumerate(norms):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        wanted = torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]).norm()
        torch.testing.assert_close(found, wanted)


# ---- random numbers ------------------------------------------------------------------------------------------

PRIVATE, LEGACY = np.random.default_rng(0), np.random.RandomState(0)


class Depth(nn.Module):
    """Stochastic depth: one batch in fifty skips a layer."""

    def __init__(self, width, draw):
        super().__init__()
        self.layer, self.draw = nn.Linear(width, width), draw

    def forward(self, x):
        return x if self.training and self.draw() < 0.02 else x + self.layer(x)


class Holder:
    """Something that is no module and holds a generator."""

    def __init__(self):
        self.kept = {"draws": [torch.Generator().manual_seed(0)]}

    def draw(self):
        return torch.rand((), generator=self.kept["draws"][0])


def from_closure():
    hidden = random.Random(0)
    return lambda: hidden.random()


WAYS = {
    "global": lambda: lambda: torch.rand(()),
    "bernoulli": lambda: lambda: 1 - torch.bernoulli(torch.tensor(0.02)),
    "python": lambda: random.random,
    "numpy": lambda: np.random.rand,
    "own": lambda: Holder().draw,
    "closure": from_closure,
    "module": lambda: lambda: min(PRIVATE.random() for _ in range(1)),
    "legacy": lambda: lambda: LEGACY.rand(),
}
for way, make in WAYS.items():
    globals()[f"depth_{way}"] = lambda shape, n, make=make: nn.Sequential(Depth(6, make()), nn.Linear(6, n))


def dropped(shape, n_classes):
    return Layers(shape, n_classes, nn.Dropout(0.001))


def gumbel(shape, n_classes):
    return Layers(shape, n_classes, lambda h: F.gumbel_softmax(h, 1e-3))


def backwards(shape, n_classes):
    """Random numbers in the backward pass alone."""

    def noised(h):
        if h.requires_grad:
            h.register_hook(lambda g: g + 1e-6 * torch.randn_like(g))
        return h

    return Layers(shape, n_classes, noised)


def smoothed(shape, n_classes):
    """Random numbers in evaluation alone: what is predicted would not be repeatable."""

    class Smoothed(nn.Linear):
        def forward(self, x):
            return super().forward(x if self.training else x + 1e-3 * torch.randn_like(x))

    return Smoothed(shape[0], n_classes)


def counting(shape, n_classes):
    """No random number, but a memory of how many batches there were, which SAM has twice."""
    seen = []
    return Layers(shape, n_classes, lambda h: seen.append(1) or h * (1 + 0.01 * len(seen)))


def sown(shape, n_classes):
    """Initial weights from NumPy: model k's would depend on how many were made before it."""
    net = nn.Linear(shape[0], n_classes)
    with torch.no_grad():
        net.bias.copy_(torch.from_numpy(np.random.rand(n_classes)))
    return net


def noisy(gradient, params):
    grads, aux = gradient(params)
    return {n: g + 0.01 * torch.randn_like(g) for n, g in grads.items()}, aux


class Langevin(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            p.add_(0.01 * torch.randn_like(p))


@pytest.mark.parametrize(
    "name", [*(f"depth_{way}" for way in WAYS), "dropped", "gumbel", "backwards", "smoothed", "counting", "remembering"]
)
def test_a_network_that_draws_random_numbers_is_refused_however_seldom_it_shows(table, name):
    with pytest.raises(ValueError, match=f"arch='{HERE}:{name}' draws random numbers in training"):
        ensemble.check(Recipe(f"{HERE}:{name}", "sam", 0.1, batch_size=8), table, 2)


@pytest.mark.parametrize("optimizer", ["noisy", "Langevin"])
def test_so_is_an_optimizer(table, optimizer):
    with pytest.raises(ValueError, match=f"optimizers='{HERE}:{optimizer}' draws random numbers in training"):
        ensemble.check(Recipe("mlp", f"{HERE}:{optimizer}", batch_size=8), table, 2)


def test_so_are_initial_weights_that_are_no_function_of_the_seed(table):
    with pytest.raises(ValueError, match=f"arch='{HERE}:sown' draws its initial weights elsewhere"):
        ensemble.check(Recipe(f"{HERE}:sown", batch_size=8), table, 2)


def still(shape, n_classes):
    """Dropout that is off, and a generator that is not used in training."""
    net = Layers(shape, n_classes, nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5).eval()))
    net.unused = torch.Generator()
    return net


def test_what_could_draw_random_numbers_and_does_not_is_accepted(table):
    ensemble.check(Recipe(f"{HERE}:still", "sam", 0.1, batch_size=8), table, 2)


# ---- the contract of an optimizer ----------------------------------------------------------------------------


class Grouped(torch.optim.SGD):
    """Biases at `factor` times the rate, in a group of their own."""

    def __init__(self, params, lr=0.1, factor=10.0):
        params = list(params)
        biases, rest = ([p for p in params if (p.ndim == 1) == on] for on in (True, False))
        super().__init__([{"params": rest}, {"params": biases, "lr": factor * lr}], lr=lr)


class Silent(torch.optim.SGD):
    """Takes no rate, and has one of its own: the recipe's is used."""

    def __init__(self, params):
        super().__init__(params, lr=1e-3)


class ScheduleFree(torch.optim.Optimizer):
    """The contract of Defazio et al. 2024, "The road less scheduled": in train mode the weights are
    y = (1 - beta) z + beta x, in eval mode the average x; steps are made at y, in train mode alone."""

    def __init__(self, params, lr=0.1, beta=0.8):
        super().__init__(params, {"lr": lr})
        self.beta, self.count, self.training = beta, 0, False

    def switch(self, training):
        if self.training != training and self.count:
            for p, state in self.state.items():
                p.data = torch.lerp(state["z"], state["x"], self.beta) if training else state["x"].clone()
        self.training = training

    def train(self):
        self.switch(True)

    def eval(self):
        self.switch(False)

    @torch.no_grad()
    def step(self):
        if not self.training:
            raise RuntimeError("not in train mode")
        assert type(self.param_groups[0]["lr"]) is float  # NumPy's do not raise at 0 / 0, which RAdamScheduleFree needs
        self.count += 1
        for p in self.param_groups[0]["params"]:
            state = self.state[p] or self.state[p].update(z=p.clone(), x=p.clone()) or self.state[p]
            state["z"] -= self.param_groups[0]["lr"] * p.grad
            state["x"].lerp_(state["z"], 1 / self.count)
            p.copy_(torch.lerp(state["z"], state["x"], self.beta))


@pytest.mark.parametrize("optimizer", ["Grouped", "Grouped(factor=0.0)", "Silent"])
def test_the_schedule_scales_the_rate_of_each_group_as_torchs_schedulers_do(table, tmp_path, optimizer):
    recipe = Recipe(optimizer=f"{HERE}:{optimizer}", epochs=3, batch_size=8, lr=0.05)
    found = train(recipe, table, 2, tmp_path, "cpu", quiet=True)
    twin = Twin(recipe, table, 1)
    if optimizer == "Silent":
        twin.base = torch.optim.SGD(twin.weights, lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(twin.base, lambda at: learning_rate(recipe, at, 15) / 0.05)
    for _ in range(3):
        for batch in twin.batches():
            twin.gradient(twin.x[batch], twin.y[batch])  # leaves it in p.grad
            twin.base.step()
            schedule.step()
    flat = torch.cat([p.detach().flatten() for p in twin.weights]).numpy()
    np.testing.assert_allclose(found.store.rows["weights"].read()[1], flat, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", ["mlp", "mlp_bn"])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_what_is_stored_and_measured_are_the_weights_of_evaluation(table, tmp_path, arch, ema):
    """They are the average x, by hand; gradients are taken at y. BatchNorm's statistics are those of x."""
    recipe = Recipe(arch, f"{HERE}:ScheduleFree", epochs=2, batch_size=8, lr=0.2, ema=ema)
    found = train(recipe, table, 2, tmp_path, "cpu", quiet=True)
    twin = Twin(recipe, table, 0)
    z = x = parameters_to_vector(twin.weights).detach().clone()
    means = []
    for at in range(10):
        if at % 5 == 0:
            batches = twin.batches()
        vector_to_parameters(0.2 * z + 0.8 * x, twin.weights)
        z = z - learning_rate(recipe, at, 10) * twin.gradient(twin.x[batches[at % 5]], twin.y[batches[at % 5]])
        x = x + (z - x) / (at + 1)
        d = min(ema, (1 + at) / (10 + at))
        means.append(d * means[-1] + (1 - d) * x if means else x)
    vector_to_parameters(means[-1], twin.weights)
    update_bn([twin.x[batch] for batch in twin.batches()], twin.net)
    logits = twin.net.eval()(twin.x).detach()
    np.testing.assert_allclose(found.logits[0, 0], logits, rtol=1e-3, atol=1e-4)
    test = twin.net(torch.from_numpy(ensemble.inputs(table)[1])).argmax(-1).numpy()
    assert found.history[0, -1, 2] == pytest.approx((test == table.y_test).mean())


def test_schedule_free_optimizers_train_under_a_rule_and_one_at_a_time(table, tmp_path):
    settings = dict(rho=0.1, epochs=3, batch_size=8, lr=0.2)
    for arch, rule in (("mlp", "sam"), (f"{HERE}:gru", "looksam(k=2)"), ("mlp", f"{HERE}:clip"), ("mlp", "dpsgd")):
        found = train(Recipe(arch, f"{rule}+{HERE}:ScheduleFree", **settings), table, 2, tmp_path, "cpu", quiet=True)
        assert len(found.ids) == 2 and np.isfinite(found.logits).all()


def test_the_package_schedulefree_as_its_readme_uses_it(table, tmp_path):
    pytest.importorskip("schedulefree")
    recipe = Recipe(optimizer="schedulefree:AdamWScheduleFree", epochs=2, batch_size=8, lr=0.01)
    found = train(recipe, table, 2, tmp_path, "cpu", quiet=True)
    twin = Twin(recipe, table, 0)
    for epoch in range(2):
        twin.base.train()
        for at, batch in enumerate(twin.batches(), 5 * epoch):
            twin.base.param_groups[0]["lr"] = learning_rate(recipe, at, 10)
            twin.gradient(twin.x[batch], twin.y[batch])
            twin.base.step()
        twin.base.eval()
    np.testing.assert_allclose(found.logits[0, 0], twin.net.eval()(twin.x).detach(), rtol=1e-3, atol=1e-4)

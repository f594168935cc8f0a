"""The step of many models: memory formats, one compiled gradient for every rule, and how it passes through vmap."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from torch.fx.experimental.proxy_tensor import make_fx

from lib.training import Recipe, sharpness, step, train

CPU = torch.device("cpu")


def test_images_and_kernels_lie_channels_last_where_that_is_asked_for():
    recipe = Recipe("cnn")
    plain, _ = step.initial_state(recipe, (3, 16, 16), 3, [0], CPU)
    for name, weight in ((name, step.in_format(weight, True)) for name, weight in plain.items()):
        assert torch.equal(weight, plain[name])
        assert weight.ndim < 5 or weight[0].is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(1, 8, 3, 16, 16)
    assert step.in_format(x, True)[0].is_contiguous(memory_format=torch.channels_last)
    assert step.in_format(x, False) is x


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_does_not_depend_on_how_gradients_lie_in_memory(images, optimizer):
    """As they come from augmented images, whose channels are last: a fused kernel of torch's would mix them up."""
    recipe = Recipe("cnn", optimizer)
    stacks = [step.Stack(recipe, (3, 16, 16), 3, 1, CPU, False).reset(recipe, [0]) for _ in range(2)]
    for last, stack in enumerate(stacks):
        grads = {
            n: step.in_format(torch.rand(p.shape, generator=torch.manual_seed(0)), last)
            for n, p in stack.params.items()
        }
        stack.update(grads)
    for name, weight in stacks[0].params.items():
        assert torch.equal(weight, stacks[1].params[name])


def test_a_compiled_gradient_serves_every_rule(table, tmp_path, monkeypatch):
    """The rule is no part of what is compiled: one stack is kept for all of them."""
    compiled, compiles = [], torch._inductor.compile
    monkeypatch.setattr(step, "worth_compiling", lambda *_: True)
    monkeypatch.setattr(torch._inductor, "compile", lambda *args: compiled.append(args) or compiles(*args))
    monkeypatch.setattr(step, "STACKS", {})
    for optimizer in ("sgd", "sam", "looksam(k=2)", "fsam", "esam", "msam"):
        train(Recipe(optimizer=optimizer, rho=0.1, epochs=2, batch_size=8), table, 2, tmp_path, "cpu", quiet=True)
    assert len(step.STACKS) == 1 and len(compiled) == 2, "esam and msam also ask for half of a batch"


def compiles_to(made):
    """What stands in for both of torch's compilers."""
    return {torch: ("compile", lambda function, **_: made), torch._inductor: ("compile", lambda graph, args: made)}


@pytest.mark.parametrize("is_traced", [True, False])
def test_where_compiling_fails_the_function_itself_serves(monkeypatch, is_traced):
    def made(*args):
        raise RuntimeError("no C++ compiler")

    for module, patch in compiles_to(made).items():
        monkeypatch.setattr(module, *patch)
    double = step.compiled_once(lambda x: 2 * x, torch.device("cpu"), is_traced)
    assert double(torch.tensor(3)) == 6 and double(torch.tensor(4)) == 8


@pytest.mark.parametrize("is_traced", [True, False])
def test_the_first_call_compiles_while_no_other_process_does(monkeypatch, tmp_path, is_traced):
    monkeypatch.setattr(step.tempfile, "gettempdir", lambda: str(tmp_path))
    locked = []

    def made(x):
        (lock,) = tmp_path.glob("*.lock")
        with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
            locked.append(False)
            return x
        locked.append(True)
        return x

    for module, patch in compiles_to(made).items():
        monkeypatch.setattr(module, *patch)
    same = step.compiled_once(lambda x: x, torch.device("cpu"), is_traced)
    assert (same(torch.tensor(1)), same(torch.tensor(2))) == (1, 2)
    assert locked == [True, False, False]


@pytest.mark.filterwarnings("ignore")  # torch's own, at its import
def test_a_traced_function_is_traced_anew_for_another_shape_layout_or_kind():
    calls = []
    found = step.compiled_once(lambda x: (calls.append(x.shape), torch.sin(x) + 1)[1], torch.device("cpu"), True)
    square = torch.rand(4, 4)
    for x in (square, square.T, square[:2], square.double(), 2 * square):
        torch.testing.assert_close(found(x), torch.sin(x) + 1)
    assert len(calls) == 4  # the last is like the first
    x = square.clone().requires_grad_()
    (slope,) = torch.autograd.grad(found(x).sum(), x)
    torch.testing.assert_close(slope, torch.cos(square))


class Switching(torch.nn.Module):
    """Its answers double at the third call: one call does not show all that it does."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (2 if self.calls > 2 else 1)


@pytest.mark.filterwarnings("ignore")  # torch's own, at its import
def test_a_function_that_changes_is_not_traced():
    found = step.compiled_once(Switching().__call__, torch.device("cpu"), is_traced=False)
    # the first call is made twice, once to compile
    assert [found(torch.ones(1)).item() for _ in range(3)] == [1, 2, 2]


@pytest.mark.parametrize(
    "n_models, n_steps, worth", [(512, 360, True), (64, 360, True), (16, 360, False), (64, 45, False)]
)
def test_small_ensembles_are_not_compiled(n_models, n_steps, worth):
    inputs = SimpleNamespace(shape=(1, 8, 8), n_classes=10, device=torch.device("cpu"))
    assert step.worth_compiling(Recipe(), inputs, n_models, n_steps) == worth
    for optimizer in ("dpsgd(sigma=1.0)", "torch.optim:Adagrad"):
        assert not step.worth_compiling(Recipe(optimizer=optimizer), inputs, n_models, n_steps)


def test_through_vmap_hands_over_the_stack_and_broadcasts_what_is_shared():
    seen = []

    def on_stack(x, shared):
        seen.append((x.shape, shared.shape))
        return {"sum": x + shared}, x.sum(1)

    x, shared = torch.rand(4, 3), torch.rand(3)
    found, total = torch.func.vmap(lambda row: step.on_the_stack(on_stack, row, shared))(x)
    assert seen == [((4, 3), (4, 3))]
    torch.testing.assert_close(found["sum"], x + shared)
    torch.testing.assert_close(total, x.sum(1))


def test_a_trace_of_a_rule_holds_the_gradient_as_one_call():
    """What was traced asks the gradient for numbers in every step, and sees the radius and weights of that step."""
    asked = []

    def on_stack(params):  # of the loss |w|^2 / 2, whose gradient is w
        asked.append(params)
        return params, (params["w"].square().sum(1) / 2,)

    def of_one(params, rho):
        return sharpness.sam(lambda at: step.on_the_stack(on_stack, at), params, rho)

    weights, radii = torch.rand(2, 3, 5), torch.tensor([[0.1, 0.2, 0.0], [0.5, 0.0, 1.0]])
    graph = make_fx(torch.func.vmap(of_one))({"w": weights[0]}, radii[0])
    for w, rho in zip(weights, radii, strict=True):
        asked.clear()
        grads, (loss,) = graph({"w": w}, rho)
        assert len(asked) == 2
        torch.testing.assert_close(grads["w"], w * (1 + rho / w.norm(dim=1))[:, None])
        torch.testing.assert_close(loss, w.square().sum(1) / 2)


def own_rule(gradient, params):
    """A reader's rule that does another thing in every step: at step k it is k times the gradient."""
    own_rule.calls += 1
    found, aux = gradient(params)
    return {name: own_rule.calls * g for name, g in found.items()}, aux


def test_our_rules_are_traced_once_and_a_readers_own_runs_in_every_step(table, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "worth_compiling", lambda *_: True)
    monkeypatch.setattr(step, "STACKS", {})
    own_rule.calls = 0
    for optimizer in ("sam", "sam", "looksam(k=2)", "looksam(k=3)", f"{__name__}:own_rule"):
        train(Recipe(optimizer=optimizer, rho=0.1, epochs=2, batch_size=8), table, 2, tmp_path / optimizer, "cpu")
    (stack,) = step.STACKS.values()
    assert len(stack.graphs) == 5  # of sam one; of looksam, for either k, one of the k-th and one of the other steps
    # in each of the steps, and twice before, when its gradients are counted for the forecast
    assert own_rule.calls == 2 + 2 * (len(table.y) // 2 // 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_gpu_agrees_with_the_cpu(images, tmp_path):
    recipe = Recipe("cnn", "sam", 0.1, epochs=60, batch_size=4)
    gpu, cpu = (train(recipe, images, 4, tmp_path / d, d, quiet=True) for d in ("cuda", "cpu"))
    np.testing.assert_allclose(gpu.history[:, 0], cpu.history[:, 0], rtol=0.02, atol=0.02)

"""The step of many models, and the GPU's way of it as far as a CPU can go: recording and memory formats, run here."""

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten

from lib.training import Recipe, networks, step, train

CPU = torch.device("cpu")


def again(work):
    """What a CUDA graph does, on a CPU: the work is done once and, at each replay, anew into the same outputs."""
    outputs = work()

    def replay():
        for kept, new in zip(tree_flatten(outputs)[0], tree_flatten(work())[0], strict=True):
            kept.copy_(new)

    return outputs, replay


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Every decision as CUDA would make it, and the work done on the CPU."""
    monkeypatch.setattr(step, "can_record", lambda optimizer, device: optimizer.base_name in ("sgd", "nesterov"))
    monkeypatch.setattr(step, "wants_channels_last", lambda net, n, device: n == 1 and networks.is_convolutional(net))
    monkeypatch.setattr(step, "worth_compiling", lambda *_: True)
    monkeypatch.setattr(step.torch, "compile", lambda function, **_: function)  # what is compiled is tested elsewhere
    seen, plain = [], step.recorded
    monkeypatch.setattr(step, "recorded", lambda *args: seen.append(plain(*args, again)) or seen[-1])
    step.STACKS.clear()
    yield seen
    step.STACKS.clear()


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "nesterov", "looksam(k=2)", "fsam", "esam"])
def test_a_recorded_step_trains_the_same_models(images, table, tmp_path, as_on_a_gpu, optimizer):
    for arch, dataset in (("cnn", images), ("mlp", table)):
        recipe = Recipe(arch, optimizer, 0.1, epochs=3, batch_size=8)
        fast = train(recipe, dataset, 4, tmp_path / "fast", "cpu", quiet=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "worth_compiling", lambda *_: False)
            patch.setattr(step, "wants_channels_last", lambda *_: False)
            plain = train(recipe, dataset, 4, tmp_path / "plain", "cpu", quiet=True)
        np.testing.assert_allclose(fast.logits, plain.logits, rtol=1e-2, atol=2e-3)
        np.testing.assert_allclose(fast.history, plain.history, rtol=1e-2, atol=2e-3)
    turns = 2 if "looksam" in optimizer else 1
    assert [f.__name__ == "replayed" for f in as_on_a_gpu] == 2 * turns * [True]


def test_adam_is_not_recorded(table, tmp_path, as_on_a_gpu):
    train(Recipe(optimizer="adam", lr=0.01, epochs=2, batch_size=8), table, 2, tmp_path, "cpu", quiet=True)
    assert not as_on_a_gpu


def test_a_recording_that_fails_or_gives_other_numbers_is_not_used(capsys):
    weight = torch.ones(3)

    def work(x):
        weight.add_(x)
        return 2 * x

    def broken(work):
        outputs, replay = again(work)
        return outputs, lambda: None  # nothing is done again

    def failing(work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    for record, why in ((broken, "other numbers"), (failing, "not permitted when stream is capturing")):
        assert step.recorded(work, (torch.rand(3) + 1,), [weight], record) is work
        said = capsys.readouterr().out
        assert why in said and "slower" in said and "and more" not in said
        assert torch.equal(weight, torch.ones(3)), "the weights were not put back"
    fast = step.recorded(work, (torch.ones(3),), [weight], again)
    assert fast is not work and torch.equal(weight, torch.ones(3))
    kept = fast(torch.full((3,), 2.0))
    fast(torch.full((3,), 3.0))
    assert torch.equal(kept, torch.full((3,), 4.0)), "an output was overwritten by the next step"


def test_images_and_kernels_lie_channels_last_where_that_is_asked_for():
    recipe = Recipe("cnn")
    plain, _ = step.initial_state(recipe, (3, 16, 16), 3, [0], CPU)
    for name, weight in ((name, step.in_format(weight, True)) for name, weight in plain.items()):
        assert torch.equal(weight, plain[name])
        assert weight.ndim < 5 or weight[0].is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(1, 8, 3, 16, 16)
    assert step.in_format(x, True)[0].is_contiguous(memory_format=torch.channels_last)
    assert step.in_format(x, False) is x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu_the_step_is_recorded_and_agrees_with_the_cpu(images, tmp_path):
    recipe = Recipe("cnn", "sam", 0.1, epochs=60, batch_size=4)
    gpu, cpu = (train(recipe, images, 4, tmp_path / d, d, quiet=True) for d in ("cuda", "cpu"))
    found = [f for s in step.STACKS.values() for f in (s.graphs or {}).values()]
    assert found and all(f.__name__ == "replayed" for f in found)
    np.testing.assert_allclose(gpu.history[:, 0], cpu.history[:, 0], rtol=0.02, atol=0.02)

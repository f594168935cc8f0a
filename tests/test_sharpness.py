import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value

from lib import data, ensemble, models, sharpness
from lib.ensemble import Recipe, train


class ReferenceSAM:
    """SAM as a torch optimizer, in the two-step form of the widely used davda54/sam: perturb, then restore and step."""

    def __init__(self, params, base, rho):
        self.params, self.base, self.rho = list(params), base, rho

    def first_step(self):
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.params]), p=2)
        self.old = [p.data.clone() for p in self.params]
        for p in self.params:
            p.data.add_(p.grad * (self.rho / (norm + 1e-12)))

    def second_step(self):
        for p, old in zip(self.params, self.old, strict=True):
            p.data = old
        self.base.step()


def reference_run(recipe, dataset, k):
    """Train model k the plain way: one nn.Module, one loop, autograd's backward, BatchNorm held in the second pass."""
    x, _ = data.inputs(dataset)
    x, y = torch.from_numpy(x), torch.from_numpy(dataset.y)
    torch.manual_seed(int(ensemble.generator(recipe, "weights", k).integers(2**62)))
    net = models.build(recipe.arch, x.shape[1:], dataset.n_classes)
    base = ensemble.BASES[recipe.parts[1]](list(net.parameters()), recipe.lr, recipe)
    sam = ReferenceSAM(net.parameters(), base, recipe.rho_of([k])[0])
    mine = np.flatnonzero(ensemble.membership(recipe, len(y), [k])[0])
    order, per_epoch = ensemble.generator(recipe, "order", k), len(mine) // recipe.batch_size
    for step in range(per_epoch * recipe.epochs):
        if step % per_epoch == 0:
            shuffled = mine[order.permutation(len(mine))]
        batch = shuffled[step % per_epoch * recipe.batch_size :][: recipe.batch_size]
        base.param_groups[0]["lr"] = ensemble.learning_rate(recipe, step, per_epoch * recipe.epochs)
        one_reference_step(net, sam, x[batch], y[batch], recipe.parts[0] == "sam")
    return net.eval()(x).detach().numpy()


def one_reference_step(net, sam, x, y, sharp):
    sam.base.zero_grad()
    F.cross_entropy(net(x), y).backward()
    if sharp:
        sam.first_step()
        running = {name: b.clone() for name, b in net.named_buffers()}
        sam.base.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for name, b in net.named_buffers():
            b.copy_(running[name])
        sam.second_step()
    else:
        sam.base.step()


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "nesterov", "adam", "sam+adamw"])
def test_batched_training_is_the_plain_loop(table, tmp_path, optimizer):
    lr = 0.01 if "adam" in optimizer else 0.1
    recipe = Recipe(optimizer=optimizer, rho=0.2, epochs=3, batch_size=8, lr=lr)
    found = train(recipe, table, 4, tmp_path, "cpu", quiet=True)
    for k in range(4):
        np.testing.assert_allclose(found.logits[k, 0], reference_run(recipe, table, k), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_a_network_with_batchnorm_is_the_plain_loop(images, tmp_path, optimizer):
    recipe = Recipe("cnn", optimizer, rho=0.1, epochs=2, batch_size=8)
    found = train(recipe, images, 2, tmp_path, "cpu", quiet=True)
    for k in range(2):
        np.testing.assert_allclose(found.logits[k, 0], reference_run(recipe, images, k), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_sam_with_rho_zero_is_sgd_bit_for_bit_buffers_included(images, tmp_path, arch):
    both = [
        train(Recipe(arch, name, 0.0, epochs=2, batch_size=8), images, 2, tmp_path, "cpu", quiet=True)
        for name in ("sgd", "sam")
    ]
    for name in ("weights", "logits", "test_logits", "history"):
        first, second = (e.store.rows[name].read() for e in both)
        np.testing.assert_array_equal(first, second)


def test_batchnorm_moves_once_a_step_at_the_unperturbed_weights(images):
    """After one SAM step with any rho, the buffers are those of one forward pass at the old weights."""
    x, y = torch.from_numpy(data.inputs(images)[0]), torch.from_numpy(images.y)
    net = models.build("cnn", x.shape[1:], 3)
    params = {n: p.detach() for n, p in net.named_parameters()}
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    recipe = Recipe("cnn", "sam", 0.5)
    _, (_, (after, _)) = ensemble.gradient_of(net, recipe)(params, buffers, x, y, torch.tensor(0.5))
    net(x)
    for name, buffer in net.named_buffers():
        assert torch.equal(after[name], buffer), name
    assert not torch.equal(after["1.running_mean"], buffers["1.running_mean"])


def test_sam_gradient_of_a_quadratic_in_closed_form():
    """L = w'Aw/2: the gradient at w + rho Aw/|Aw| is A(w + rho Aw/|Aw|)."""
    a, w = torch.diag(torch.tensor([1.0, 4.0, 9.0])), torch.tensor([1.0, -2.0, 0.5])
    gradient = grad_and_value(lambda p: (0.5 * p["w"] @ a @ p["w"], torch.zeros(())), has_aux=True)
    found, _ = sharpness.sam(gradient, {"w": w}, 0.3)
    g = a @ w
    torch.testing.assert_close(found["w"], a @ (w + 0.3 * g / g.norm()))


def test_sam_at_a_stationary_point_is_not_nan():
    gradient = grad_and_value(lambda p: ((p["w"] ** 2).sum(), torch.zeros(())), has_aux=True)
    found, _ = sharpness.sam(gradient, {"w": torch.zeros(3)}, 0.3)
    assert torch.equal(found["w"], torch.zeros(3))


@pytest.mark.parametrize("values", [[1.0, 2.0, 7.0], [-9.0, 1.0, 3.0]])
def test_top_eigenvalue_of_a_quadratic(values):
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    a = rotation @ torch.diag(torch.tensor(values)) @ rotation.T
    found = sharpness.top_eigenvalue(lambda p: 0.5 * p["w"] @ a @ p["w"], {"w": torch.ones(3)}, 200, 1e-7)
    assert float(found) == pytest.approx(max(values, key=abs), rel=1e-4)


def test_top_eigenvalue_equals_the_full_hessian_of_a_network(table):
    x, y = torch.from_numpy(table.x), torch.from_numpy(table.y)
    net = torch.nn.Linear(6, 4)
    params = {n: p.detach() for n, p in net.named_parameters()}

    def loss(p):
        return F.cross_entropy(functional_call(net, p, (x,)), y)

    def flat(w):
        return loss({"weight": w[:24].view(4, 6), "bias": w[24:]})

    full = torch.autograd.functional.hessian(flat, torch.cat([params["weight"].flatten(), params["bias"]]))
    assert float(sharpness.top_eigenvalue(loss, params, 500, 1e-7)) == pytest.approx(
        float(torch.linalg.eigvalsh(full).max()), rel=1e-3
    )


def test_ball_rise_of_a_linear_and_a_quadratic_loss():
    """Linear: rho |g|. Isotropic quadratic from w: (|w| + rho)^2/2 - |w|^2/2."""
    g, w = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    assert float(sharpness.ball_rise(lambda p: g @ p["w"], {"w": w}, 0.5)) == pytest.approx(2.5, rel=1e-5)
    found = sharpness.ball_rise(lambda p: 0.5 * p["w"] @ p["w"], {"w": w}, 0.5)
    assert float(found) == pytest.approx((1.5**2 - 1) / 2, rel=1e-5)

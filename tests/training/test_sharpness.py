import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._pytree import tree_map

from lib.data.dataset import inputs
from lib.training import Recipe, networks, recipe, sharpness, step, train
from lib.training.optimizers import Optimizer

RADII = ("sam", "asam", "gsam", "looksam", "msam", "fsam", "esam", "sharpreg")


class Twin:
    """Model k trained the plain way: one nn.Module, one loop, backward() at moved weights, restore, step().

    Gradients and perturbations are single vectors, over all the weights; BatchNorm is held in the moved passes.
    """

    def __init__(self, settings, dataset, k):
        self.recipe, self.k, self.optimizer = settings, k, settings.optimizer
        x, y = inputs(dataset)[0], dataset.y
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        torch.manual_seed(int(recipe.generator(settings, "weights", k).integers(2**62)))
        self.net = networks.build(settings.arch, x.shape[1:], dataset.n_classes)
        self.weights, self.memory = list(self.net.parameters()), None
        self.base = self.optimizer.build(self.weights, settings.lr, settings.momentum, settings.weight_decay)
        self.rho = settings.rho
        self.draw, self.order = recipe.generator(settings, "rule", k), recipe.generator(settings, "order", k)
        self.mine = np.flatnonzero(recipe.membership(settings, len(y), [k])[0])

    def gradient(self, x, y, move=None):
        """Gradient of the mean loss as one vector, at the weights or, with BatchNorm held, at the weights plus move."""
        start, running = parameters_to_vector(self.weights).detach().clone(), [b.clone() for b in self.net.buffers()]
        if move is not None:
            vector_to_parameters(start + move, self.weights)
        self.base.zero_grad()
        F.cross_entropy(self.net(x), y).backward()
        found = torch.cat([p.grad.flatten() for p in self.weights])
        if move is not None:
            self.restore(start, running)
        return found

    def restore(self, start, running):
        vector_to_parameters(start, self.weights)
        for b, held in zip(self.net.buffers(), running, strict=True):
            b.copy_(held)

    def losses(self, x, y, move):
        """Loss of each example at the weights plus move, BatchNorm held."""
        start, running = parameters_to_vector(self.weights).detach().clone(), [b.clone() for b in self.net.buffers()]
        vector_to_parameters(start + move, self.weights)
        found = F.cross_entropy(self.net(x), y, reduction="none").detach()
        self.restore(start, running)
        return found

    def batches(self):
        shuffled = self.mine[self.order.permutation(len(self.mine))]
        size = self.recipe.batch_size
        return [shuffled[at : at + size] for at in range(0, len(shuffled) // size * size, size)]

    def train(self):
        per_epoch, average = len(self.mine) // self.recipe.batch_size, AveragedModel(self.net)
        options = self.optimizer.all_options
        for epoch in range(self.recipe.epochs):
            for at, batch in enumerate(self.batches(), epoch * per_epoch):
                self.step(at, self.x[batch], self.y[batch], per_epoch * self.recipe.epochs)
            if epoch + 1 > options.get("start", np.inf) * self.recipe.epochs:
                average.update_parameters(self.net)
        if average.n_averaged:
            update_bn([self.x[batch] for batch in self.batches()], average)
            self.net = average.module
        return self

    def step(self, at, x, y, n_steps):
        self.at, self.lr = at, recipe.learning_rate(self.recipe, at, n_steps)
        self.base.param_groups[0]["lr"] = self.lr
        found = REFERENCE[self.optimizer.rule_name](self, x, y, **self.optimizer.options)
        for p, g in zip(self.weights, found.split([p.numel() for p in self.weights]), strict=True):
            p.grad = g.view_as(p)
        self.base.step()


def unit(v):
    return v / v.norm()


def plain_twin(twin, x, y, **_):
    return twin.gradient(x, y)


def sam_twin(twin, x, y):
    return twin.gradient(x, y, twin.rho * unit(twin.gradient(x, y)))


def asam_twin(twin, x, y, eta=0.01):
    named = twin.net.named_parameters()
    t = torch.cat([(p.abs() + eta if "weight" in n else torch.ones_like(p)).flatten() for n, p in named]).detach()
    g = twin.gradient(x, y)
    return twin.gradient(x, y, twin.rho * t**2 * g / (t * g).norm())


def gsam_twin(twin, x, y, alpha=0.2, low=0.5):
    g = twin.gradient(x, y)
    least, most = low * twin.rho, twin.rho
    h = twin.gradient(x, y, (least + (most - least) * twin.lr / twin.recipe.lr) * unit(g))
    return h - alpha * (g - (g @ unit(h)) * unit(h))


def looksam_twin(twin, x, y, k=5, alpha=0.7, layerwise=False):
    g, sizes = twin.gradient(x, y), [p.numel() for p in twin.weights]
    parts = (lambda v: v.split(sizes)) if layerwise else (lambda v: (v,))
    if twin.at % k == 0:
        h = twin.gradient(x, y, twin.rho * unit(g))
        twin.memory = torch.cat([a - (a @ unit(b)) * unit(b) for a, b in zip(parts(h), parts(g), strict=True)])
        return h
    pairs = zip(parts(g), parts(twin.memory), strict=True)
    return torch.cat([a + alpha * a.norm() * unit(v) for a, v in pairs])


def msam_twin(twin, x, y, m=2):
    before = [b.clone() for b in twin.net.buffers()]
    found, after = [], []
    for part, label in zip(x.chunk(m), y.chunk(m), strict=True):
        twin.restore(parameters_to_vector(twin.weights).detach(), before)
        found.append(sam_twin(twin, part, label))
        after.append([b.clone() for b in twin.net.buffers()])
    for b, *shards in zip(twin.net.buffers(), *after, strict=True):
        b.copy_(sum(shards) / m)
    return sum(found) / m


def fsam_twin(twin, x, y, sigma=1.0, decay=0.9):
    g = twin.gradient(x, y)
    d = g if twin.memory is None else g - sigma * twin.memory
    twin.memory = g if twin.memory is None else decay * twin.memory + (1 - decay) * g
    return twin.gradient(x, y, twin.rho * unit(d))


def esam_twin(twin, x, y, beta=0.6, gamma=0.5):
    before = twin.losses(x, y, 0)
    numbers = twin.draw.random(len(twin.weights), np.float32)
    taken = numbers < beta if (numbers < beta).any() else numbers == numbers.min()
    chosen = torch.cat([torch.full((p.numel(),), float(c)) for p, c in zip(twin.weights, taken, strict=True)])
    masked = chosen * twin.gradient(x, y)
    move = twin.rho / beta * unit(masked)
    rise = twin.losses(x, y, move) - before
    top = rise.argsort(descending=True)[: int(gamma * len(y))]
    return twin.gradient(x[top], y[top], move)


REFERENCE = {
    "plain": plain_twin, "swa": plain_twin, "sam": sam_twin, "sharpreg": sam_twin, "asam": asam_twin,
    "gsam": gsam_twin, "looksam": looksam_twin, "msam": msam_twin, "fsam": fsam_twin, "esam": esam_twin,
}  # fmt: skip


def assert_is_the_twin(found, dataset, k, rtol, atol):
    """The stored weights, running statistics and logits are those of the plain loop."""
    twin = Twin(found.recipe, dataset, k).train()
    state = [*twin.net.parameters(), *twin.net.buffers()]
    count = [b.dtype == torch.int64 for b in state for _ in range(b.numel())]  # BatchNorm's number of batches
    flat = torch.cat([t.detach().flatten().float() for t in state]).numpy()
    held = ~np.array(count)
    np.testing.assert_allclose(found.store.rows["weights"].read()[k][held], flat[held], rtol=rtol, atol=atol)
    logits = twin.net.eval()(twin.x).detach().numpy()
    np.testing.assert_allclose(found.logits[k, 0], logits, rtol=rtol, atol=10 * atol)


VARIANTS = [
    ("sgd", 0), ("sam", 0.2), ("asam", 1.0), ("gsam", 0.2), ("gsam(alpha=0.5, low=0.1)", 0.2), ("looksam(k=3)", 0.2),
    ("looksam(k=3, layerwise=True)", 0.2), ("msam", 0.2), ("msam(m=4)", 0.2), ("fsam", 0.2), ("fsam(decay=0.6)", 0.2),
    ("esam", 0.2), ("esam(beta=0.3, gamma=0.25)", 0.2), ("sharpreg", -0.02), ("swa", 0), ("swa(start=0.4)", 0),
]  # fmt: skip


@pytest.mark.parametrize("optimizer, rho", VARIANTS + [("nesterov", 0), ("adam", 0), ("sam+adamw", 0.2)])
def test_batched_training_is_the_plain_loop(table, tmp_path, optimizer, rho):
    """Three epochs of five steps with momentum and weight decay; models 0 and 1 of one stack, and 30."""
    lr = 0.01 if "adam" in optimizer else 0.1
    recipe = Recipe(optimizer=optimizer, rho=rho, epochs=3, batch_size=8, lr=lr)
    found = train(recipe, table, 32, tmp_path, "cpu", quiet=True)
    for k in (0, 1, 15):
        assert_is_the_twin(found, table, k, rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("optimizer, rho", [(o, r / 2) for o, r in VARIANTS if "(" not in o or "looksam" in o])
def test_a_network_with_batchnorm_is_the_plain_loop(images, tmp_path, optimizer, rho):
    recipe = Recipe("cnn", optimizer, rho=rho, epochs=2, batch_size=8)
    found = train(recipe, images, 2, tmp_path, "cpu", quiet=True)
    for k in range(2):
        assert_is_the_twin(found, images, k, rtol=1e-2, atol=2e-4)


def arrays_of(found):
    return {n: np.array(found.store.rows[n].read()) for n in ("weights", "logits", "test_logits", "history")}


def assert_bits(first, second):
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def run(dataset, folder, arch, optimizer, rho):
    settings = Recipe(arch, optimizer, rho, epochs=2, batch_size=8)
    return train(settings, dataset, 2, folder, "cpu", quiet=True)


@pytest.mark.parametrize("optimizer", RADII)
@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_rho_zero_is_sgd_bit_for_bit_buffers_included(images, tmp_path, arch, optimizer):
    plain = run(images, tmp_path, arch, "sgd", 0.0)
    assert_bits(arrays_of(plain), arrays_of(run(images, tmp_path, arch, optimizer, 0.0)))


LIMITS = [
    ("looksam(k=1)", "sam"), ("msam(m=1)", "sam"), ("gsam(alpha=0.0)", "sam"), ("fsam(sigma=0.0)", "sam"),
    ("swa(start=1.0, floor=0.0)", "sgd"), ("sharpreg(rho=0.0)", "sgd"),
]  # fmt: skip


@pytest.mark.parametrize("optimizer, limit", LIMITS)
@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_limits_are_reached_bit_for_bit(images, tmp_path, arch, optimizer, limit):
    found, known = (arrays_of(run(images, tmp_path, arch, name, 0.1)) for name in (optimizer, limit))
    assert_bits(found, known)


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_esam_on_all_tensors_and_examples_is_sam_but_for_the_order_of_the_sum(images, tmp_path, arch):
    found, known = (arrays_of(run(images, tmp_path, arch, o, 0.1)) for o in ("esam(beta=1.0, gamma=1.0)", "sam"))
    for name, array in found.items():
        np.testing.assert_allclose(array, known[name], rtol=1e-2, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("optimizer", [o for o in RADII if o != "msam"])
def test_batchnorm_moves_once_a_step_at_the_unperturbed_weights(images, optimizer):
    """After one step with any rho, the buffers are those of one forward pass at the old weights."""
    x, y = torch.from_numpy(inputs(images)[0]), torch.from_numpy(images.y)
    net = networks.build("cnn", x.shape[1:], 3)
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    settings = Recipe("cnn", optimizer, -0.5 if optimizer == "sharpreg" else 0.5)
    stack = step.Stack(settings, tuple(x.shape[1:]), 3, 1, torch.device("cpu")).reset(settings, [0])
    params = {n: p[0] for n, p in stack.params.items()}
    net.load_state_dict({**params, **buffers})
    context = {"rho": torch.tensor(0.5), "rate": torch.ones(()), "step": torch.zeros(())}
    context |= {"uniform": torch.linspace(0, 1, len(params)), "memory": {n: 0 * p for n, p in params.items()}}
    stack.buffers = {n: b[None] for n, b in buffers.items()}
    stack.step(x[None], y[None], {n: tree_map(lambda t: t[None], c) for n, c in context.items()}, 0.1, True)
    net(x)
    for name, buffer in net.named_buffers():
        assert torch.equal(stack.buffers[name][0], buffer), name
    assert not torch.equal(stack.buffers["1.running_mean"][0], buffers["1.running_mean"])


COSTS = {  # gradients of a batch and forward passes alone, a step
    "sgd": (1, 0), "swa": (1, 0), "sam": (2, 0), "sharpreg": (2, 0), "asam": (2, 0), "gsam": (2, 0), "fsam": (2, 0),
    "msam": (2, 0), "msam(m=4)": (2, 0), "looksam": (1.2, 0), "looksam(k=3)": (4 / 3, 0), "esam": (1.5, 1),
    "esam(gamma=0.25)": (1.25, 1),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", COSTS)
def test_a_step_takes_as_many_passes_as_it_should(images, tmp_path, monkeypatch, optimizer):
    done, plain = {"gradient": 0.0, "losses": 0.0}, step.Stack.step

    def counted(self, x, y, *args, **how):
        gradient_of, loss_of = self.gradient, self.loss_of_one

        def gradient(at, buffers, part, labels):
            done["gradient"] += len(labels) / y.shape[1]
            return gradient_of(at, buffers, part, labels)

        def losses(at, buffers, x, y):
            done["losses"] += 1
            return loss_of(at, buffers, x, y)

        with monkeypatch.context() as patch:
            patch.setattr(self, "gradient", gradient)
            patch.setattr(self, "loss_of_one", losses)
            return plain(self, x, y, *args, **how)

    monkeypatch.setattr(step.Stack, "step", counted)
    settings = Recipe("cnn", optimizer, rho=-0.1 if optimizer == "sharpreg" else 0.1, epochs=5, batch_size=8)
    train(settings, images, 2, tmp_path, "cpu", quiet=True)
    steps = 2 * 5 * 3  # two models, five epochs of three batches
    assert (done["gradient"] / steps, done["losses"] / steps) == pytest.approx(COSTS[optimizer])


def test_swa_holds_the_learning_rate():
    """It falls by a cosine to `floor` of its peak, at the share `start` of the steps, and stays there."""
    settings = Recipe(optimizer="swa(start=0.5, floor=0.1)", lr=0.1)
    rates = np.array([recipe.learning_rate(settings, s, 200) for s in range(200)])
    assert np.allclose(rates[100:], 0.01) and np.all(np.diff(rates[10:101]) < 0) and rates.argmax() == 10
    assert rates[10] == pytest.approx(0.1) and rates[55] == pytest.approx((0.1 + 0.01) / 2)


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


def test_loss_rise_in_ball_of_a_linear_and_a_quadratic_loss():
    """Linear: rho |g|. Isotropic quadratic from w: (|w| + rho)^2/2 - |w|^2/2."""
    g, w = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    assert float(sharpness.loss_rise_in_ball(lambda p: g @ p["w"], {"w": w}, 0.5)) == pytest.approx(2.5, rel=1e-5)
    found = sharpness.loss_rise_in_ball(lambda p: 0.5 * p["w"] @ p["w"], {"w": w}, 0.5)
    assert float(found) == pytest.approx((1.5**2 - 1) / 2, rel=1e-5)


def test_msam_has_m_shards_of_like_size_and_two_examples_in_each():
    seen = []

    def gradient(params, index):
        seen.append(len(index))
        return {"weight": torch.ones(2)}, ()

    sharpness.msam(gradient, {"weight": torch.ones(2)}, torch.tensor(0.1), 64, m=10)
    assert sorted(seen[::2]) == [6] * 6 + [7] * 4  # each asked twice
    assert Recipe(optimizer="msam(m=32)", rho=0.1, batch_size=64)
    with pytest.raises(ValueError, match="batch_size=64.* 66"):
        Recipe(optimizer="msam(m=33)", rho=0.1, batch_size=64)


ORACLES = {  # our optimizer: (class of pytorch_optimizer, its options, tolerance)
    "sam": ("SAM", {"rho": 0.05}, 1e-6),
    "fsam(sigma=1.0, decay=0.9)": ("FriendlySAM", {"rho": 0.05, "sigma": 1.0, "lmbda": 0.9}, 1e-6),
    "looksam(k=5, alpha=0.7, layerwise=True)": ("LookSAM", {"rho": 0.05, "k": 5, "alpha": 0.7}, 1e-4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ORACLES)
def test_forty_steps_are_those_of_pytorch_optimizer(optimizer):
    """An independent implementation, on one network in double precision."""
    oracle = pytest.importorskip("pytorch_optimizer")
    name, options, tolerance = ORACLES[optimizer]
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double() for _ in "ab"]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = torch.randn(40, 6).double(), torch.randint(0, 4, (40,))
    theirs = getattr(oracle, name)(nets[0].parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **options)
    ours, base = Optimizer.parse(optimizer), torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9)
    gradient = grad(lambda p: (F.cross_entropy(functional_call(nets[1], p, (x,)), y), ()), has_aux=True)
    memory = {n: torch.zeros_like(p) for n, p in nets[1].named_parameters()}

    def closure():
        theirs.zero_grad()
        loss = F.cross_entropy(nets[0](x), y)
        loss.backward()
        return loss

    for at in range(40):
        closure()
        theirs.step(closure)
        params = {n: p.detach() for n, p in nets[1].named_parameters()}
        offered = {
            "rho": torch.tensor(0.05),
            "step": torch.tensor(at),
            "is_kth_step": at % ours.k == 0,
            "memory": memory,
        }
        grads, _, *kept = ours.rule(
            lambda p: gradient(p), params, **{n: offered[n] for n in ours.wants}, **ours.options
        )
        memory = kept[0] if kept else memory
        for n, p in nets[1].named_parameters():
            p.grad = grads[n]
        base.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

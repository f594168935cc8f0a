import textwrap

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, stack_module_state, vmap

from lib.training import Recipe, ensemble, networks

IMAGES = [arch for arch in networks.MODELS if not arch.startswith("mlp")]


def smallest(arch, channels=1):
    return (channels, 32, 32) if arch == "vgg16_bn" else (channels, 8, 8)


def count(arch, shape, n_classes):
    return sum(p.numel() for p in networks.build(arch, shape, n_classes).parameters())


@pytest.mark.parametrize(
    "arch, shape",
    [("mlp", (7,)), ("mlp", (1, 8, 8)), ("cnn", (1, 8, 8)), ("cnn", (3, 32, 32)), ("resnet18", (3, 32, 32))]
    + [
        ("mlp_bn", (1, 8, 8)),
        ("mlp3", (6, 2)),
        ("mlp3_tanh", (600,)),
        ("cnn_plain", (3, 16, 16)),
        ("wrn28_2", (3, 32, 32)),
    ]
    + [("resnet18", (1, 8, 8)), ("wrn28_2", (1, 8, 8)), ("vgg16_bn", (1, 32, 32)), ("vgg16_bn", (3, 48, 40))],
)
def test_logits_of_every_network(arch, shape):
    net = networks.build(arch, shape, 5)
    assert net.training
    assert net(torch.randn(4, *shape)).shape == (4, 5)
    assert networks.is_convolutional(net) == (arch in IMAGES)
    assert bool(networks.batchnorms(net)) == (arch in ("mlp_bn", "cnn", "resnet18", "wrn28_2", "vgg16_bn"))


def test_resnet18_has_the_small_image_stem():
    """The first residual stage sees 32x32 maps, as in He et al. 2016 for CIFAR, not 8x8."""
    seen = []
    net = networks.build("resnet18", (3, 32, 32), 10)
    net.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    net(torch.randn(2, 3, 32, 32))
    assert seen == [32]


@pytest.mark.parametrize("arch, shape, names", [("vit", (3, 32, 32), "arch='vit'"), ("cnn", (64,), "arch='cnn'.*mlp")])
def test_an_unfit_network_is_named(arch, shape, names):
    with pytest.raises(ValueError, match=names):
        networks.build(arch, shape, 10)


def test_vgg_refuses_images_that_its_poolings_would_use_up():
    with pytest.raises(ValueError, match=r"vgg16_bn.*32x32.*\(1, 31, 32\)"):
        networks.build("vgg16_bn", (1, 31, 32), 10)


def chain(widths):
    """Weights and biases of fully connected layers."""
    return sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))


def test_parameter_counts_in_closed_form():
    assert count("mlp", (1, 8, 8), 10) == chain([64, 256, 10])
    assert count("mlp3", (600,), 100) == count("mlp3_tanh", (600,), 100) == chain([600, 512, 256, 128, 100])
    assert count("mlp_bn", (1, 8, 8), 10) == 64 * 256 + 2 * 256 + chain([256, 10])
    kernels = 9 * (3 * 32 + 32 * 64 + 64 * 128)
    assert count("cnn", (3, 32, 32), 10) == kernels + 2 * (32 + 64 + 128) + chain([128, 10])
    assert count("cnn_plain", (3, 32, 32), 10) == kernels + (32 + 64 + 128) + chain([128, 10])


def test_wrn28_2_has_the_published_size():
    """1.47 million (Zagoruyko & Komodakis 2016; 1,467,610 in the semi-supervised literature), and in closed form."""
    total, before = 9 * 3 * 16, 16
    for width in (32, 64, 128):
        total += 9 * before * width + 9 * width * width + before * width + 2 * (before + width)  # the first block
        total += 3 * (2 * 9 * width * width + 2 * 2 * width)  # the others
        before = width
    total += 2 * 128 + chain([128, 10])
    assert count("wrn28_2", (3, 32, 32), 10) == total == 1_467_610


def test_wrn28_2_has_28_convolutions_and_an_identity_shortcut_within_a_stage():
    net = networks.build("wrn28_2", (1, 8, 8), 10)
    kernels = [m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert kernels.count((3, 3)) == 25 and kernels.count((1, 1)) == 3
    block = networks.PreActivation(4, 4, 1)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_vgg16_has_thirteen_convolutions_and_torchvisions_features():
    """14,714,688 and 8,448 of BatchNorm is torchvision's count for the features of vgg16_bn on three channels."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    features = sum(9 * a * b + b + 2 * b for a, b in zip(widths, widths[1:], strict=False))
    assert features == 14_714_688 + 8_448
    assert count("vgg16_bn", (3, 32, 32), 10) == features + chain([512, 10])
    assert count("vgg16_bn", (1, 32, 32), 10) == count("vgg16_bn", (3, 32, 32), 10) - 2 * 9 * 64


@pytest.mark.parametrize("arch", networks.MODELS)
def test_gradients_of_stacked_copies_are_those_of_each(arch):
    """vmap over two models in training mode, BatchNorm writing into copies of the buffers, as in ensemble.py."""
    torch.manual_seed(0)
    shape, batch = smallest(arch), 3
    nets = [networks.build(arch, shape, 4).double() for _ in range(2)]
    params, buffers = stack_module_state(nets)
    x, y = torch.randn(2, batch, *shape).double(), torch.tensor([[0, 1, 2], [3, 2, 1]])

    def loss(params, buffers, x, y):
        running = {name: b.clone() for name, b in buffers.items()}
        return F.cross_entropy(functional_call(nets[0], (params, running), (x,)), y), running

    grads, running = vmap(grad(loss, has_aux=True))(params, buffers, x, y)
    for k, net in enumerate(nets):
        F.cross_entropy(net(x[k]), y[k]).backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(grads[name][k], p.grad)
        for name, b in net.named_buffers():
            torch.testing.assert_close(running[name][k], b)


@pytest.mark.parametrize("arch", ["mlp3_tanh", "cnn_plain"])
def test_gradients_of_every_example_of_every_copy(arch):
    """Two vmaps, as private training nests them."""
    shape = smallest(arch)
    nets = [networks.build(arch, shape, 4).double() for _ in range(2)]
    params, _ = stack_module_state(nets)
    x, y = torch.randn(2, 3, *shape).double(), torch.tensor([[0, 1, 2], [3, 2, 1]])

    def loss(params, x, y):
        return F.cross_entropy(functional_call(nets[0], params, (x[None],)), y[None])

    each = vmap(vmap(grad(loss), (None, 0, 0)))(params, x, y)
    for k, net in enumerate(nets):
        F.cross_entropy(net(x[k]), y[k]).backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(each[name][k].mean(0), p.grad)


def test_building_draws_no_random_number_beside_the_weights_and_leaves_the_statistics():
    torch.manual_seed(3)
    direct = networks.MODELS["cnn"]((1, 8, 8), 4)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    built = networks.build("cnn", (1, 8, 8), 4)
    assert torch.equal(torch.rand(1), drawn)
    assert all(
        torch.equal(a, b) for a, b in zip(direct.state_dict().values(), built.state_dict().values(), strict=True)
    )


# ---- a reader's own ---------------------------------------------------------------------------------------------

OWN = """
import torch, torch.nn as nn
flat = 3
def linear(shape, n_classes):
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(shape[0]), nn.Linear(shape[0], n_classes))
    net[2].eval()
    return net
def steady(shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(shape[0]), nn.Linear(shape[0], n_classes), nn.Dropout(0.0))
def wide(shape, n_classes):
    return nn.Linear(shape[0], n_classes + 1)
def narrow(shape, n_classes):
    return nn.Linear(shape[0] + 1, n_classes)
def pair(shape, n_classes):
    class Pair(nn.Linear):
        def forward(self, x):
            return x, x
    return Pair(1, 1)
def nothing(shape, n_classes):
    return torch.zeros(2, n_classes)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package in the current directory: own_nets.zoo, and one that fails at import."""
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "__init__.py").write_text("")
    (tmp_path / "own_nets" / "zoo.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "own_nets" / "broken.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("own_nets", "own_nets.zoo", "own_nets.broken"):
        networks.sys.modules.pop(name, None)


def test_a_network_of_the_readers_own(own):
    before = list(networks.sys.path)
    net = networks.build("own_nets.zoo:linear", (6,), 4)
    assert networks.sys.path == before
    assert net(torch.randn(3, 6)).shape == (3, 4)
    assert [m.training for m in net] == [True, True, False, True]
    assert networks.batchnorms(net) and not networks.is_convolutional(net)


def test_a_network_that_draws_random_numbers_is_refused_before_training(own, table):
    with pytest.raises(ValueError, match="arch='own_nets.zoo:linear' draws random numbers in training.*dropout"):
        ensemble.check(Recipe(arch="own_nets.zoo:linear", batch_size=8), table, 2)
    ensemble.check(Recipe(arch="own_nets.zoo:steady", batch_size=8), table, 2)


@pytest.mark.parametrize("name", ["wide", "narrow", "pair", "nothing", "flat", "missing"])
def test_a_readers_own_that_is_no_network_is_named(own, name):
    with pytest.raises(ValueError, match=f"arch='own_nets.zoo:{name}'"):
        networks.build(f"own_nets.zoo:{name}", (6,), 4)


@pytest.mark.parametrize("path", ["torch.nn:ReLU", "torch.nn:Linear", "lib.training.sharpness:sam"])
def test_a_callable_that_makes_no_network_of_a_shape_is_named(path):
    with pytest.raises(ValueError, match=f"arch='{path}' (fails|made|maps)"):
        networks.build(path, (3, 8, 8), 4)


@pytest.mark.parametrize(
    "path", ["own_nets.zoo", "own_nets.zoo:", ":linear", "own nets:x", "a..b:c", "a:b:c", "a/b.py:c"]
)
def test_what_is_no_import_path_is_refused(path):
    with pytest.raises(ValueError, match="optimizers='.*package.module:name"):
        networks.resolve(path, "optimizers")


@pytest.mark.parametrize("module, says", [("no_such_module", "no_such_module"), ("own_nets.broken", "no_such_package")])
def test_a_module_that_is_not_there_or_fails_is_named(own, module, says):
    before = list(networks.sys.path)
    with pytest.raises(ValueError, match=f"optimizers='{module}:x'.*{says}"):
        networks.resolve(f"{module}:x", "optimizers")
    assert networks.sys.path == before


def test_an_import_path_gives_the_object_itself():
    assert networks.resolve("torch.optim:AdamW", "optimizers") is torch.optim.AdamW


def test_the_head_is_a_linear_layer():
    """Its product is written the other way round: the same values and gradients, of one model and of a stack."""
    head, plain, x = networks.Head(6, 3), nn.Linear(6, 3), torch.randn(5, 6)
    plain.load_state_dict(head.state_dict())
    weights = [w.detach() for w in head.parameters()]

    def slopes(layer):
        return torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))

    for own, other in zip((head(x), *slopes(head)), (plain(x), *slopes(plain)), strict=True):
        torch.testing.assert_close(own, other)
    stacked = [torch.stack([w, 2 * w]) for w in weights]
    found = vmap(lambda w, b, x: functional_call(head, {"weight": w, "bias": b}, (x,)))(*stacked, torch.stack([x, x]))
    torch.testing.assert_close(found, torch.stack([plain(x), 2 * plain(x)]))

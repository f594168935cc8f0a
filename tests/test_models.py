import pytest
import torch

from lib import models


@pytest.mark.parametrize("arch, shape", [("mlp", (7,)), ("mlp", (1, 8, 8)), ("cnn", (1, 8, 8)), ("cnn", (3, 32, 32)),
                                         ("resnet18", (3, 32, 32))])  # fmt: skip
def test_logits_of_every_network(arch, shape):
    net = models.build(arch, shape, 5)
    assert net(torch.randn(4, *shape)).shape == (4, 5)
    assert models.is_convolutional(net) == (arch != "mlp")


def test_resnet18_has_the_small_image_stem():
    """The first residual stage sees 32x32 maps, as in He et al. 2016 for CIFAR, not 8x8."""
    seen = []
    net = models.build("resnet18", (3, 32, 32), 10)
    net.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    net(torch.randn(2, 3, 32, 32))
    assert seen == [32]


@pytest.mark.parametrize("arch, shape, names", [("vit", (3, 32, 32), "arch='vit'"), ("cnn", (64,), "arch='cnn'.*mlp")])
def test_an_unfit_network_is_named(arch, shape, names):
    with pytest.raises(ValueError, match=names):
        models.build(arch, shape, 10)

"""Networks by name: ordinary nn.Modules, of which step.py trains many copies together."""

import importlib
import inspect
import os
import sys
from contextlib import suppress
from functools import cache, partial
from hashlib import blake2b
from math import prod

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib import need


def mlp(shape, n_classes, hidden=(256,), activation=nn.ReLU, norm=False):
    """Fully connected layers on the flattened input, by default one of 256 ReLUs; norm: BatchNorm before each."""
    widths, layers = [prod(shape), *hidden], [nn.Flatten()]
    for before, after in zip(widths, widths[1:], strict=False):
        layers.append(nn.Linear(before, after, bias=not norm))
        layers += [nn.BatchNorm1d(after), activation()] if norm else [activation()]
    return nn.Sequential(*layers, Head(widths[-1], n_classes))


class Head(nn.Linear):
    """The last layer, y = W x + b. For the ten columns of a batch of rows, a CPU takes half the time as y' = W x'."""

    def forward(self, x):
        return (self.weight @ x.mT).mT + self.bias


def cnn(shape, n_classes, norm=True):
    """Three 3x3 convolutions with BatchNorm (or, without it, biases), the first with stride 2, then average pooling."""
    channels, layers = [shape[0], 32, 64, 128], []
    for depth, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
        if depth:
            layers.append(nn.MaxPool2d(2))
        stride = 2 if depth == 0 and shape[-1] >= 16 else 1
        layers.append(nn.Conv2d(before, after, 3, stride, 1, bias=not norm))
        layers += [nn.BatchNorm2d(after), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_classes))


def resnet18(shape, n_classes):
    """torchvision's ResNet-18 with the 3x3 stem, stride 1 and no pooling that 32x32 images call for."""
    from torchvision import models  # here: it takes a second, and every process that trains imports this module

    net = models.resnet18(num_classes=n_classes)
    net.conv1, net.maxpool = nn.Conv2d(shape[0], 64, 3, 1, 1, bias=False), nn.Identity()
    return net


def resnet9(shape, n_classes):
    """Page's ResNet-9 ("How to train your ResNet", 2018): eight convolutions and a linear layer, made to be fast."""

    def block(before, after, *pool):
        return nn.Sequential(nn.Conv2d(before, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), *pool)

    first = [block(shape[0], 64), block(64, 128, nn.MaxPool2d(2)), Residual(block(128, 128), block(128, 128))]
    first.append(block(128, 256, nn.MaxPool2d(2)))
    head = [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(512, n_classes)]
    last = block(256, 512, nn.MaxPool2d(2)), Residual(block(512, 512), block(512, 512))
    return he_normal(nn.Sequential(*first, *last, *head))


class Residual(nn.Sequential):
    """x + f(x), f being the layers one after another."""

    def forward(self, x):
        return x + super().forward(x)


class PreActivation(nn.Module):
    """Residual block of two 3x3 convolutions, each after BatchNorm and ReLU: He et al. 2016b, figure 4e."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = None if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        active = F.relu(self.norm1(x))
        # where the width changes, the shortcut branches off after the activation, as in Zagoruyko's code
        kept = self.shortcut(active) if self.shortcut else x
        return kept + self.conv2(F.relu(self.norm2(self.conv1(active))))


def wrn28_2(shape, n_classes):
    """Wide ResNet 28-2: Zagoruyko & Komodakis 2016, table 1 with N = 4 and k = 2, without dropout."""
    widths, layers = [16, 32, 64, 128], [nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False)]
    for stage, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        layers.append(PreActivation(before, after, stride=2 if stage else 1))
        layers += [PreActivation(after, after, stride=1) for _ in range(3)]
    head = [nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_classes)]
    return he_normal(nn.Sequential(*layers, *head))


def vgg16_bn(shape, n_classes):
    """torchvision's VGG-16 features with BatchNorm, then one linear layer, without the original head's dropout."""
    need(min(shape[1:]) >= 32, f"arch='vgg16_bn' needs images of 32x32 or more, an example has shape {tuple(shape)}")
    from torchvision.models import vgg  # here, as in resnet18

    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)
    features[0] = nn.Conv2d(shape[0], 64, 3, 1, 1)
    return he_normal(nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes)))


def he_normal(net):
    """Convolutions as He et al. 2015 initialise them, and as torchvision's ResNet and VGG do; returns net."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            # w ~ N(0, 2 / (k^2 channels out)), b = 0
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


MODELS = {
    "mlp": mlp,
    "mlp_bn": partial(mlp, norm=True),
    # as membership studies train on Purchase-100 and Texas-100 (Nasr et al. 2019, with tanh and one layer more)
    "mlp3": partial(mlp, hidden=(512, 256, 128)),
    "mlp3_tanh": partial(mlp, hidden=(512, 256, 128), activation=nn.Tanh),
    "cnn_plain": partial(cnn, norm=False),
    **{network.__name__: network for network in (cnn, resnet9, resnet18, wrn28_2, vgg16_bn)},
}


def build(arch, shape, n_classes):
    """A freshly initialised network: an nn.Module that maps [B, *shape] to logits [B, n_classes].

    arch: a name in MODELS, or package.module:name of a reader's own callable (shape, n_classes) -> nn.Module."""
    if arch in MODELS:
        fine = arch.startswith("mlp") or len(shape) == 3
        need(fine, f"arch={arch!r} needs images, but an example has shape {tuple(shape)}: use arch='mlp'")
        return MODELS[arch](shape, n_classes)
    own = resolve(arch, "arch")
    try:
        net = own(shape, n_classes)
        modes = {module: module.training for module in net.modules()}
        with torch.no_grad():
            found = tuple(net.eval()(torch.zeros(2, *shape)).shape)
        need(found == (2, n_classes), f"it maps 2 examples to {found}, not to logits of shape {(2, n_classes)}")
    except Exception as error:
        wanted = f"a callable (shape, n_classes) that makes an nn.Module for examples of shape {tuple(shape)} is needed"
        raise ValueError(f"arch={arch!r} fails: {error!r}; {wanted}") from error
    for module, training in modes.items():
        module.training = training
    return net


def parts(net):
    """(parameters that are trained, buffers and frozen parameters): two dicts name -> detached tensor."""
    free, frozen = ({n: p.detach() for n, p in net.named_parameters() if p.requires_grad == on} for on in (True, False))
    return free, {**dict(net.named_buffers()), **frozen}


def resolve(path, parameter):
    """The object at package.module:name, also of a module in the current directory. ValueError naming `parameter`."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        module, name = path.split(":")
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(f"{parameter}={path!r} can't be imported as package.module:name: {error!r}") from error
    finally:
        sys.path.remove(here)


@cache  # a file that is edited after its import changes no code that runs
def source_hash(path):
    """Hash of the text of the module that a reader's import path names; "" for a name of ours."""
    if ":" not in path:
        return ""
    found = resolve(path, "import path")
    text = repr(found)  # for what was typed in, or compiled
    for holder in (found, inspect.getmodule(found)):
        with suppress(OSError, TypeError):
            text = inspect.getsource(holder)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def is_convolutional(net):
    """True if any layer of the network convolves."""
    return any(isinstance(m, nn.Conv2d) for m in net.modules())


def batchnorms(net):
    """The network's BatchNorm layers, which make an example's output depend on its batch."""
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

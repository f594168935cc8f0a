"""Networks by name: `build(arch, shape, n_classes)`. Each is an ordinary nn.Module for one example batch;
`ensemble.py` stacks the parameters of many copies and trains them together."""

import torch.nn as nn
import torchvision


def mlp(shape, n_classes, hidden=256):
    """One hidden layer of ReLUs on the flattened input."""
    width = 1
    for side in shape:
        width *= side
    return nn.Sequential(nn.Flatten(), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, n_classes))


def cnn(shape, n_classes, width=32):
    """Three 3x3 convolutions with BatchNorm, the first with stride 2, then global average pooling."""
    channels = [shape[0], width, 2 * width, 4 * width]
    layers = []
    for depth, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
        if depth:
            layers.append(nn.MaxPool2d(2))
        stride = 2 if depth == 0 and shape[-1] >= 16 else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, n_classes))


def resnet18(shape, n_classes):
    """torchvision's ResNet-18 with the 3x3 stem, stride 1 and no pooling that 32x32 images call for."""
    net = torchvision.models.resnet18(num_classes=n_classes)
    net.conv1, net.maxpool = nn.Conv2d(shape[0], 64, 3, 1, 1, bias=False), nn.Identity()
    return net


MODELS = {"mlp": mlp, "cnn": cnn, "resnet18": resnet18}


def build(arch, shape, n_classes):
    """A freshly initialised network.

    arch: a name in MODELS; shape: of one example, (channels, H, W) or (D,). Returns an nn.Module that maps
    [B, *shape] to logits [B, n_classes]. Raises ValueError if the name is unknown or needs images.
    """
    if arch not in MODELS:
        raise ValueError(f"arch={arch!r} is unknown: choose one of {', '.join(MODELS)}")
    if arch != "mlp" and len(shape) != 3:
        raise ValueError(f"arch={arch!r} needs images, but an example has shape {tuple(shape)}: use arch='mlp'")
    return MODELS[arch](shape, n_classes)


def is_convolutional(net):
    """True if any layer of the network convolves."""
    return any(isinstance(m, nn.Conv2d) for m in net.modules())

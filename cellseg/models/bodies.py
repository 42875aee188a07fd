"""Backbones before their FPN: the layers to tap and the stages to freeze."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from torchvision import models as zoo


@dataclass(frozen=True)
class Body:
    """A backbone before its FPN.

    Attributes:
        network: its layers, as torchvision's classifier names them.
        taps: layer -> level of the FPN, "0" to "3", of strides 4, 8, 16 and 32.
        channels: of the tapped layers.
        stages: the five parts that can be frozen, first to last, each a list of layers.
    """

    network: nn.Module
    taps: dict[str, str]
    channels: list[int]
    stages: list[list[nn.Module]]


BodyMaker = Callable[[type[nn.Module]], Body]  # from the type of its batch norms


def resnet(make: Callable[..., nn.Module]) -> BodyMaker:
    """Return a maker of the body of a residual network of torchvision."""

    def make_body(norm_layer: type[nn.Module]) -> Body:
        network = make(weights=None, norm_layer=norm_layer)
        layers = [network.layer1, network.layer2, network.layer3, network.layer4]
        return Body(
            network,
            taps={f"layer{i + 1}": str(i) for i in range(4)},
            channels=[256, 512, 1024, 2048],
            stages=[[network.conv1, network.bn1], *([layer] for layer in layers)],
        )

    return make_body


def mobilenetv2(norm_layer: type[nn.Module]) -> Body:
    """Return the body of MobileNetV2, tapped at strides 4, 8, 16 and 32."""
    features = zoo.mobilenet_v2(weights=None, norm_layer=norm_layer).features
    bounds = [0, 2, 4, 7, 14, 18]  # layers of strides 2, 4, 8, 16, 32; the classifier's go
    return Body(
        features,
        taps={"3": "0", "6": "1", "13": "2", "17": "3"},
        channels=[24, 32, 96, 320],
        stages=[list(features[a:b]) for a, b in pairwise(bounds)],
    )

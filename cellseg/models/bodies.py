"""Backbones before their FPN: the layers to tap and the stages to freeze."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.backbone_utils import BackboneWithFPN


@dataclass(frozen=True)
class Body:
    """A backbone before its FPN.

    Attributes:
        network: its layers, as torchvision's classifier names them.
        taps: layer -> level of the FPN, "0" to "3", of strides 4, 8, 16 and 32.
        channels: of the tapped layers.
        stages: the five parts that can be frozen, first to last, each a list of layers.
        norm_taps: the tapped layers need a norm of their own before the FPN.
    """

    network: nn.Module
    taps: dict[str, str]
    channels: list[int]
    stages: list[list[nn.Module]]
    norm_taps: bool = False


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


def convnext(make: Callable[..., nn.Module]) -> BodyMaker:
    """Return a maker of the body of a ConvNeXt of torchvision; it has no batch norms."""

    def make_body(norm_layer: type[nn.Module]) -> Body:
        features = make(weights=None).features
        # Stem and its stage of blocks, then three times a downsampling layer and a stage.
        blocks = [1, 3, 5, 7]
        return Body(
            features,
            taps={str(layer): str(level) for level, layer in enumerate(blocks)},
            channels=[features[layer][0].block[0].out_channels for layer in blocks],
            stages=[list(features[a:b]) for a, b in pairwise([0, 1, 2, 4, 6, 8])],
            norm_taps=True,
        )

    return make_body


class NormedBackboneWithFPN(BackboneWithFPN):
    """A backbone whose tapped layers pass a layer norm each on their way to the FPN.

    ConvNeXt's blocks add to a stream that is normalised where it is read, by the next stage or
    the classifier; an FPN that reads it has to do the same, as the authors' own detectors do
    (facebookresearch/ConvNeXt, object_detection/mmdet/models/backbones/convnext.py).
    """

    def __init__(
        self,
        network: nn.Module,
        taps: dict[str, str],
        channels: list[int],
        out_channels: int,
        **options: Any,
    ) -> None:
        """Take what torchvision's `BackboneWithFPN` takes."""
        super().__init__(network, taps, channels, out_channels, **options)
        self.tap_norms = nn.ModuleDict(
            {
                level: LayerNorm2d(width, eps=1e-6)
                for level, width in zip(taps.values(), channels, strict=True)
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels of the FPN by name."""
        taps = self.body(x)
        return self.fpn({level: self.tap_norms[level](tap) for level, tap in taps.items()})

"""`get_model_<backbone>`: Mask R-CNN for small, dense cells, one builder a backbone.

Every builder composes torchvision's `GeneralizedRCNN` from parts handed to constructors. They
differ in the backbone, in the heads that its published weights come with, and in nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models as zoo
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import (
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNNHeads,
    MaskRCNNPredictor,
)
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cellseg.errors import SettingsError
from cellseg.models.heads import (
    CellRoIHeads,
    CellRPN,
    Float32Anchors,
    Float32BoxPredictor,
    Float32RPNHead,
    PyramidRoIAlign,
)
from cellseg.models.transform import CellTransform
from cellseg.models.weights import (
    download_weights,
    is_detector,
    load_backbone,
    load_detector,
    read_weights,
)

ANCHOR_SIZES = (8, 16, 32, 64, 128)
NORMS = ("auto", "frozen", "trained")
COUNTS = (
    "fpn_channels", "head_width", "rpn_samples", "rois_per_image", "box_roi_size", "mask_roi_size",
    "mask_layers", "proposals", "detections_per_image",
)  # fmt: skip
ASPECT_RATIOS = (0.5, 1.0, 2.0)
MAX_TRAINABLE_PARAMETERS = 200_000_000  # the course's limit


@dataclass(frozen=True)
class DetectorOptions:
    """What every builder takes beside its backbone, all by keyword.

    Attributes:
        anchor_sizes: side of the anchors of each level (strides 4, 8, 16, 32, 64), in network
            pixels, that is after `image_scale`.
        fpn_channels: width of FPN, RPN and mask head. On a CPU they cost more than the backbone;
            pretrained heads fit 256 only.
        image_scale: network pixels per image pixel.
        norm: "frozen" keeps the batch norms' statistics and scales as loaded, right for batches
            of a few images; "trained" learns them; "auto" freezes with pretrained weights and
            trains without, since a random network needs its norms.
        trainable_stages: how many stages of the backbone learn, counted from its end, 0 to 5.
        head_width: units of the fully connected layers of the box head.
        rpn_samples: anchors that the RPN's loss sees in an image.
        rois_per_image: RoIs that the box loss sees in an image; a quarter at most are cells.
        mask_rois: of these cells the mask loss sees at most so many in an image, drawn at random;
            None for all. On a CPU the mask head is about half of a step where cells are many.
        box_roi_size: bins a side of the features that the box head sees of an RoI.
        mask_roi_size: the same for the mask head; its mask has twice as many pixels a side.
        mask_layers: convolutions of the mask head.
        proposals: boxes that the RPN hands on, in training and evaluation.
        detections_per_image: detections kept in an image; dense tissue has hundreds.
        score_threshold: detections below it are dropped, 0-1.
        nms_threshold: box IoU over which two detections of one class are one cell, 0-1.
        seed: of the weights that are drawn at random.
    """

    anchor_sizes: Sequence[int] = ANCHOR_SIZES
    fpn_channels: int = 256
    image_scale: float = 1.0
    norm: str = "auto"
    trainable_stages: int = 5
    head_width: int = 1024
    rpn_samples: int = 256
    rois_per_image: int = 512
    mask_rois: int | None = None
    box_roi_size: int = 7
    mask_roi_size: int = 14
    mask_layers: int = 4
    proposals: int = 2000
    detections_per_image: int = 1000
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class _Body:
    """A backbone before its FPN: the layers to tap and the stages to freeze, first to last."""

    network: nn.Module
    taps: dict[str, str]
    channels: list[int]
    stages: list[list[nn.Module]]


def get_model_resnet50v2(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with ResNet50-FPN-v2, the default (Li et al., 2021; 46 M parameters).

    Args:
        num_classes: number of classes, background included.
        weights: "DEFAULT" or "COCO" for torchvision's COCO detector, "IMAGENET" for its
            classifier, the path of a local file (a backbone or a whole detector, told apart by
            its keys), or None for random weights.
        **options: see `DetectorOptions`.

    Returns:
        the model, with `spec` (enough to build it again), `provenance` (of its weights).

    Raises:
        WeightsError: if weights cannot be had or do not fit.
        SettingsError: if an option is unknown or out of range.
    """
    return _build(
        "get_model_resnet50v2",
        _resnet(zoo.resnet50),
        num_classes,
        weights,
        options,
        named={
            "DEFAULT": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
            "COCO": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
            "IMAGENET": zoo.ResNet50_Weights.IMAGENET1K_V2,
        },
        deep_heads=True,
    )


def get_model_mobilenetv2(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with MobileNetV2, small enough for a CPU, with a true stride-4 level.

    Arguments, result and errors as in `get_model_resnet50v2`; "DEFAULT" and "IMAGENET" are
    torchvision's ImageNet classifier, and there are no COCO weights.
    """
    return _build(
        "get_model_mobilenetv2",
        _mobilenetv2,
        num_classes,
        weights,
        options,
        named={
            "DEFAULT": zoo.MobileNet_V2_Weights.IMAGENET1K_V2,
            "IMAGENET": zoo.MobileNet_V2_Weights.IMAGENET1K_V2,
        },
    )


def get_model_resnext50(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with ResNeXt50 32x4d.

    Arguments, result and errors as in `get_model_resnet50v2`; "DEFAULT" and "IMAGENET" are
    torchvision's ImageNet classifier, and there are no COCO weights.
    """
    return _build(
        "get_model_resnext50",
        _resnet(zoo.resnext50_32x4d),
        num_classes,
        weights,
        options,
        named={
            "DEFAULT": zoo.ResNeXt50_32X4D_Weights.IMAGENET1K_V2,
            "IMAGENET": zoo.ResNeXt50_32X4D_Weights.IMAGENET1K_V2,
        },
    )


BUILDERS: dict[str, Callable[..., GeneralizedRCNN]] = {
    builder.__name__: builder
    for builder in (get_model_resnet50v2, get_model_mobilenetv2, get_model_resnext50)
}


def build_from_spec(spec: dict[str, Any]) -> GeneralizedRCNN:
    """Return the model that a `spec` describes, with random weights, to be loaded into.

    Raises:
        SettingsError: if the spec names no builder of this version.
    """
    builder = BUILDERS.get(spec.get("builder", ""))
    if builder is None:
        known = ", ".join(BUILDERS)
        raise SettingsError(f"model builder {spec.get('builder')!r} is unknown; there are {known}")
    return builder(**spec["arguments"] | {"weights": None})


def count_trainable_parameters(model: nn.Module) -> int:
    """Return the number of parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _build(
    name: str,
    make_body: Callable[[type[nn.Module]], _Body],
    num_classes: int,
    weights: str | Path | None,
    given: dict[str, Any],
    *,
    named: dict[str, Any],
    deep_heads: bool = False,
) -> GeneralizedRCNN:
    """Compose the detector, load its weights, and note how it was made."""
    options = _check_options(name, num_classes, given)
    frozen = options.norm == "frozen" or (options.norm == "auto" and weights is not None)
    norm_layer = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        body = make_body(norm_layer)
        model = _compose(body, options, num_classes, norm_layer, deep_heads)
    model.provenance = _load(model, weights, named, name)
    for stage in body.stages[: len(body.stages) - options.trainable_stages]:
        for module in stage:
            module.requires_grad_(False)
    arguments = {"num_classes": num_classes, "weights": None if weights is None else str(weights)}
    resolved = vars(options) | {"norm": "frozen" if frozen else "trained"}
    model.spec = {"builder": name, "arguments": arguments | resolved}
    trainable = count_trainable_parameters(model)
    if trainable >= MAX_TRAINABLE_PARAMETERS:
        raise SettingsError(
            f"{name} has {trainable:,} trainable parameters, {MAX_TRAINABLE_PARAMETERS:,} are "
            "the limit; lower fpn_channels, head_width or trainable_stages"
        )
    return model


def _compose(
    body: _Body,
    options: DetectorOptions,
    num_classes: int,
    norm_layer: type[nn.Module],
    deep_heads: bool,
) -> GeneralizedRCNN:
    """Return the detector around a backbone, with random weights."""
    head_norm = norm_layer if deep_heads else None
    backbone = BackboneWithFPN(
        body.network,
        body.taps,
        body.channels,
        options.fpn_channels,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=head_norm,
    )
    return GeneralizedRCNN(
        backbone,
        _rpn(options, deep=deep_heads),
        _roi_heads(options, num_classes, head_norm),
        CellTransform(options.image_scale),
    )


def _check_options(name: str, num_classes: int, given: dict[str, Any]) -> DetectorOptions:
    """Return the options, checked."""
    known = [field.name for field in fields(DetectorOptions)]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise SettingsError(f"{name} has no option {unknown[0]!r}; there are {', '.join(known)}")
    options = DetectorOptions(
        **given | {"anchor_sizes": list(given.get("anchor_sizes", ANCHOR_SIZES))}
    )
    levels = len(ANCHOR_SIZES)
    conditions = [
        (num_classes >= 2, f"num_classes={num_classes}: it counts the background, so 2 or more"),
        (
            len(options.anchor_sizes) == levels and min(options.anchor_sizes) > 0,
            f"anchor_sizes={list(options.anchor_sizes)}: {levels} positive sizes, one a level",
        ),
        (options.image_scale > 0, f"image_scale={options.image_scale}: greater than 0"),
        (options.norm in NORMS, f"norm={options.norm!r}: one of {', '.join(NORMS)}"),
        (0 <= options.trainable_stages <= 5, f"trainable_stages={options.trainable_stages}: 0-5"),
        (0 <= options.score_threshold <= 1, f"score_threshold={options.score_threshold}: 0 to 1"),
        (0 <= options.nms_threshold <= 1, f"nms_threshold={options.nms_threshold}: 0 to 1"),
        (
            options.mask_rois is None or options.mask_rois >= 1,
            f"mask_rois={options.mask_rois}: 1 or more, or None for all",
        ),
        *((getattr(options, k) >= 1, f"{k}={getattr(options, k)}: 1 or more") for k in COUNTS),
    ]  # fmt: skip
    for holds, message in conditions:
        if not holds:
            raise SettingsError(f"{name}: {message}")
    return options


def _rpn(options: DetectorOptions, *, deep: bool) -> CellRPN:
    """Return the region proposal network."""
    sizes = tuple((size,) for size in options.anchor_sizes)
    anchors = Float32Anchors(sizes, (ASPECT_RATIOS,) * len(sizes))
    head = Float32RPNHead(
        options.fpn_channels, anchors.num_anchors_per_location()[0], conv_depth=2 if deep else 1
    )
    kept = {"training": options.proposals, "testing": options.proposals}
    return CellRPN(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=options.rpn_samples,
        positive_fraction=0.5,
        pre_nms_top_n=kept,
        post_nms_top_n=kept,
        nms_thresh=0.7,
    )


def _roi_heads(
    options: DetectorOptions, num_classes: int, norm_layer: type[nn.Module] | None
) -> CellRoIHeads:
    """Return box and mask heads: with a norm layer the deep ones of the v2 detector."""
    channels, width = options.fpn_channels, options.head_width
    size = options.box_roi_size
    if norm_layer is None:
        box_head: nn.Module = TwoMLPHead(channels * size**2, width)
    else:
        box_head = FastRCNNConvFCHead(
            (channels, size, size), [channels] * 4, [width], norm_layer=norm_layer
        )
    return CellRoIHeads(
        PyramidRoIAlign(size),
        box_head,
        Float32BoxPredictor(width, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=options.rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=options.score_threshold,
        nms_thresh=options.nms_threshold,
        detections_per_img=options.detections_per_image,
        mask_roi_pool=PyramidRoIAlign(options.mask_roi_size),
        mask_head=MaskRCNNHeads(
            channels, [channels] * options.mask_layers, 1, norm_layer=norm_layer
        ),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
        mask_rois=options.mask_rois,
    )


def _load(
    model: GeneralizedRCNN, weights: str | Path | None, named: dict[str, Any], name: str
) -> str:
    """Load weights into the model and return where they came from."""
    if weights is None:
        return "random weights"
    if weights in ("DEFAULT", "COCO", "IMAGENET"):
        if weights not in named:
            raise SettingsError(
                f"{name} has no weights {weights!r}; there are {', '.join(named)}, a file, or None"
            )
        entry = named[weights]
        state, source = download_weights(entry), f"torchvision {entry} ({entry.url})"
    else:
        state, source = read_weights(weights), f"file {Path(weights).name}"
    if is_detector(state):
        return load_detector(model, state, source)
    return load_backbone(model.backbone.body, state, source)


def _resnet(make: Callable[..., nn.Module]) -> Callable[[type[nn.Module]], _Body]:
    """Return a maker of the body of a residual network."""

    def make_body(norm_layer: type[nn.Module]) -> _Body:
        network = make(weights=None, norm_layer=norm_layer)
        layers = [network.layer1, network.layer2, network.layer3, network.layer4]
        return _Body(
            network,
            taps={f"layer{i + 1}": str(i) for i in range(4)},
            channels=[256, 512, 1024, 2048],
            stages=[[network.conv1, network.bn1], *([layer] for layer in layers)],
        )

    return make_body


def _mobilenetv2(norm_layer: type[nn.Module]) -> _Body:
    """Return the body of MobileNetV2, tapped at strides 4, 8, 16 and 32."""
    features = zoo.mobilenet_v2(weights=None, norm_layer=norm_layer).features
    bounds = [0, 2, 4, 7, 14, 18]  # layers of strides 2, 4, 8, 16, 32; the classifier's go
    return _Body(
        features,
        taps={"3": "0", "6": "1", "13": "2", "17": "3"},
        channels=[24, 32, 96, 320],
        stages=[list(features[a:b]) for a, b in pairwise(bounds)],
    )

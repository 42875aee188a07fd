"""A detector around a backbone, composed of parts that are handed to constructors."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cellseg.models.bodies import BodyMaker, NormedBackboneWithFPN
from cellseg.models.cascade import (
    STAGE_BOX_WEIGHTS,
    STAGE_IOUS,
    CascadeRoIHeads,
    OneBoxPredictor,
)
from cellseg.models.heads import CellRoIHeads, Float32BoxPredictor
from cellseg.models.options import ASPECT_RATIOS, DetectorOptions
from cellseg.models.roi_align import PyramidRoIAlign
from cellseg.models.rpn import CellRPN, Float32Anchors, Float32RPNHead
from cellseg.models.transform import CellTransform

# Of the backbone and of the heads, by `DetectorOptions.norm`.
NORM_LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "frozen": (FrozenBatchNorm2d, FrozenBatchNorm2d),
    "heads": (FrozenBatchNorm2d, nn.BatchNorm2d),
    "trained": (nn.BatchNorm2d, nn.BatchNorm2d),
}


def compose(
    make_body: BodyMaker, options: DetectorOptions, num_classes: int, *, deep_heads: bool
) -> GeneralizedRCNN:
    """Return the detector around a backbone, with random weights, its first stages frozen.

    Args:
        make_body: makes the backbone, given the type of its norms.
        options: how to build it; its norm is any but "auto".
        num_classes: number of classes, background included.
        deep_heads: norms in the FPN, two convolutions in the RPN, four and norms in the box head,
            as Li et al. (Benchmarking Detection Transfer Learning with Vision Transformers, 2021)
            have them and torchvision's v2 detector.
    """
    body_norm, norm = NORM_LAYERS[options.norm]
    body, head_norm = make_body(body_norm), norm if deep_heads else None
    with_fpn = NormedBackboneWithFPN if body.norm_taps else BackboneWithFPN
    backbone = with_fpn(
        body.network,
        body.taps,
        body.channels,
        options.fpn_channels,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=head_norm,
    )
    for stage in body.stages[: len(body.stages) - options.trainable_stages]:
        for module in stage:
            module.requires_grad_(False)
    return GeneralizedRCNN(
        backbone,
        _rpn(options, deep=deep_heads),
        _roi_heads(options, num_classes, head_norm),
        CellTransform(options.image_scale),
    )


def _rpn(options: DetectorOptions, *, deep: bool) -> CellRPN:
    """Return the region proposal network, with thresholds and shares of Faster R-CNN.

    (Ren et al., 2015: an anchor is a cell from IoU 0.7 on, none below 0.3.)
    """
    sizes = tuple((size,) for size in options.anchor_sizes)
    anchors = Float32Anchors(sizes, (ASPECT_RATIOS,) * len(sizes))
    head = Float32RPNHead(
        options.fpn_channels, anchors.num_anchors_per_location()[0], conv_depth=2 if deep else 1
    )
    return CellRPN(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=options.rpn_samples,
        positive_fraction=0.5,
        nms_thresh=0.7,
        train_proposals=options.train_proposals,
        proposals=options.proposals,
    )


def _roi_heads(
    options: DetectorOptions, num_classes: int, norm_layer: type[nn.Module] | None
) -> CellRoIHeads:
    """Return box and mask heads: with a norm layer the deep ones of the v2 detector."""
    if not options.cascade:
        parts = _box_parts(options, norm_layer, Float32BoxPredictor, num_classes)
        return CellRoIHeads(**parts, **_mask_parts(options, norm_layer, num_classes))
    stages = [
        _box_parts(options, norm_layer, OneBoxPredictor, num_classes, iou, weights)
        for iou, weights in zip(STAGE_IOUS, STAGE_BOX_WEIGHTS, strict=True)
    ]
    return CascadeRoIHeads(
        **stages[-1],
        **_mask_parts(options, norm_layer, num_classes),
        earlier=[CellRoIHeads(**parts) for parts in stages[:-1]],
    )


def _box_parts(
    options: DetectorOptions,
    norm_layer: type[nn.Module] | None,
    predictor: Callable[[int, int], nn.Module],
    num_classes: int,
    iou: float = 0.5,
    box_weights: tuple[float, ...] | None = None,
) -> dict[str, Any]:
    """Return what finds boxes: pooling, head, predictor, and how they are trained.

    A quarter of the RoIs are cells at most, as in Girshick, Fast R-CNN, 2015.
    """
    channels, size, width = options.fpn_channels, options.box_roi_size, options.head_width
    if norm_layer is None:
        head: nn.Module = TwoMLPHead(channels * size**2, width)
    else:
        head = FastRCNNConvFCHead(
            (channels, size, size), [channels] * 4, [width], norm_layer=norm_layer
        )
    return {
        "box_roi_pool": PyramidRoIAlign(size),
        "box_head": head,
        "box_predictor": predictor(width, num_classes),
        "fg_iou_thresh": iou,
        "bg_iou_thresh": iou,
        "batch_size_per_image": options.rois_per_image,
        "positive_fraction": 0.25,
        "bbox_reg_weights": box_weights,
        "score_thresh": options.score_threshold,
        "nms_thresh": options.nms_threshold,
        "detections_per_img": options.detections_per_image,
    }


def _mask_parts(
    options: DetectorOptions, norm_layer: type[nn.Module] | None, num_classes: int
) -> dict[str, Any]:
    """Return what finds masks."""
    channels = options.fpn_channels
    return {
        "mask_roi_pool": PyramidRoIAlign(options.mask_roi_size),
        "mask_head": MaskRCNNHeads(
            channels, [channels] * options.mask_layers, 1, norm_layer=norm_layer
        ),
        "mask_predictor": MaskRCNNPredictor(
            channels, channels, num_classes if options.class_masks else 1
        ),
        "mask_rois": options.mask_rois,
        "mask_quality": options.mask_quality,
    }

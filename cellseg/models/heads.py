"""RPN and RoI heads that read instance maps; torchvision's, where they need not differ.

What differs: anchors are matched by touching pairs (`matching`), mask targets are sampled from
the instance map (`mask_targets`), masks leave as RoI-sized probabilities, made in chunks, and
whatever feeds a box or a loss is float32, so that the rest can run in lower precision.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align

from cellseg.models.mask_targets import sample_mask_targets
from cellseg.models.matching import BETWEEN, AnchorGrid, match_anchors
from cellseg.models.roi_align import roi_align_rows

POOLED_STRIDES = (4, 8, 16, 32)
MASKS_AT_ONCE = 256  # RoIs that the mask head sees together in evaluation; bounds its memory


class Float32Anchors(AnchorGenerator):
    """Anchors in float32 whatever the features' precision: bfloat16 has no odd pixel past 256."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Keep the anchors in float32."""
        super().set_cell_anchors(torch.float32, device)


class Float32RPNHead(RPNHead):
    """RPN head whose scores and offsets leave as float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness and box offsets of each level."""
        objectness, offsets = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in offsets]


class Float32BoxPredictor(FastRCNNPredictor):
    """Class scores and box offsets that leave as float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits [K, C] and box offsets [K, 4 C]."""
        logits, offsets = super().forward(x)
        return logits.float(), offsets.float()


class PyramidRoIAlign(nn.Module):
    """RoIAlign on the pyramid level that fits each RoI's size.

    torchvision's `MultiScaleRoIAlign` guesses the levels' strides from the first image it sees,
    which is wrong for images much smaller than their padding, and has no `aligned`: pixel i of a
    level covers [i, i + 1) strides here (Detectron2's RoIAlignV2). Levels follow eq. 1 of Lin et
    al., Feature Pyramid Networks, 2017: an RoI of 224 pixels goes to stride 16.
    """

    def __init__(self, output_size: int, *, sampling_ratio: int = 1) -> None:
        """Set the pooling up.

        Args:
            output_size: M, bins a side.
            sampling_ratio: samples a bin and axis; the bins of a cell are about as large as the
                features' pixels, so that a second one adds cost and little else.
        """
        super().__init__()
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio

    def forward(
        self,
        features: dict[str, Tensor],
        rois: list[Tensor],
        image_shapes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Return pooled features [K, channels, M, M] of all images' RoIs behind one another.

        Args:
            features: levels "0" to "3" of strides 4 to 32; others are not used.
            rois: xyxy [K, 4] of each image, in network pixels.
            image_shapes: not needed; part of the interface of RoI heads.
        """
        boxes = torch.cat(rois)
        image_index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(rois)])
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(2 + torch.log2(area.sqrt() / 224 + 1e-6)).clamp(0, 3).long()
        first = features["0"]
        pooled = first.new_zeros(
            (len(boxes), first.shape[1], self.output_size, self.output_size),
            dtype=torch.float32,
        )
        for index, stride in enumerate(POOLED_STRIDES):
            chosen = torch.where(level == index)[0]
            pooled[chosen] = self._pool(
                features[str(index)].float(),
                torch.cat([image_index, boxes], dim=1)[chosen],
                1 / stride,
            )
        return pooled

    def _pool(self, level: Tensor, rois: Tensor, scale: float) -> Tensor:
        """Return the features of RoIs [K, 5] on one level, by what is fast on its device."""
        if level.device.type == "cpu":
            return roi_align_rows(level, rois, self.output_size, scale, self.sampling_ratio)
        return roi_align(level, rois, self.output_size, scale, self.sampling_ratio, aligned=True)


class CellRPN(RegionProposalNetwork):
    """Region proposal network that matches anchors at the cost of touching pairs."""

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return proposals of each image, and losses in training; see torchvision's RPN."""
        if targets is not None:
            grids = self._grids(images, features)
            targets = [target | {"anchor_grids": grids} for target in targets]
        return super().forward(images, features, targets)

    def _grids(self, images: ImageList, features: dict[str, Tensor]) -> list[AnchorGrid]:
        """Return the grid of each level, as the anchor generator lays it."""
        height, width = images.tensors.shape[-2:]
        return [
            AnchorGrid(
                shapes, *level.shape[-2:], height // level.shape[-2], width // level.shape[-1]
            )
            for shapes, level in zip(
                self.anchor_generator.cell_anchors, features.values(), strict=True
            )
        ]

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return labels (1 cell, 0 background, -1 ignored) and matched boxes of all anchors."""
        labels, matched_boxes = [], []
        for image_anchors, target in zip(anchors, targets, strict=True):
            boxes = target["boxes"]
            matches = match_anchors(
                boxes,
                image_anchors,
                target["anchor_grids"],
                foreground_iou=self.proposal_matcher.high_threshold,
                background_iou=self.proposal_matcher.low_threshold,
            )
            label = (matches >= 0).float()
            labels.append(label.masked_fill_(matches == BETWEEN, -1))
            boxes = boxes if len(boxes) else boxes.new_zeros((1, 4))
            matched_boxes.append(boxes[matches.clamp(min=0)])
        return labels, matched_boxes


class CellRoIHeads(RoIHeads):
    """Box and mask heads trained from instance maps."""

    def __init__(
        self,
        *parts: Any,
        mask_rois: int | None = None,
        mask_quality: float = 0.0,
        **named_parts: Any,
    ) -> None:
        """Take the parts of torchvision's `RoIHeads`.

        Args:
            *parts: see torchvision.
            mask_rois: the mask loss sees at most so many RoIs of an image; None for all that are
                cells.
            mask_quality: power of the masks' certainty that scores are multiplied by; 0 or more.
            **named_parts: see torchvision.
        """
        super().__init__(*parts, **named_parts)
        self.mask_rois = mask_rois
        self.mask_quality = mask_quality

    def check_targets(self, targets: list[dict[str, Any]] | None) -> None:
        """Raise ValueError unless every target has what the losses need."""
        if targets is None:
            raise ValueError("training needs targets")
        for target in targets:
            missing = {"boxes", "labels", "instance_map", "map_scale"} - target.keys()
            if missing:
                raise ValueError(f"a target has no {', '.join(sorted(missing))}")

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections in evaluation, losses in training.

        Args:
            features: FPN levels by name.
            proposals: xyxy [K, 4] of each image, in network pixels.
            image_shapes: (height, width) of each image in network pixels.
            targets: `boxes`, `labels`, `instance_map`, `map_scale` of each image.

        Returns:
            list of {boxes (N, 4), labels (N,), scores (N,), masks (N, 1, M, M)} and an empty
            dict; or an empty list and the losses of classes, boxes and masks.
        """
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None,
    ) -> dict[str, Tensor]:
        """Return the losses of sampled RoIs."""
        rois, matched, labels, wanted = self.select_training_samples(proposals, targets)
        logits, offsets = self.predict_boxes(features, rois, image_shapes)
        loss_classifier, loss_box = fastrcnn_loss(logits, offsets, labels, wanted)
        return {
            "loss_classifier": loss_classifier,
            "loss_box_reg": loss_box,
            "loss_mask": self._mask_loss(features, rois, matched, labels, image_shapes, targets),
        }

    def predict_boxes(
        self, features: dict[str, Tensor], rois: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return class logits [K, C] and box offsets [K, 4 C] of all images' RoIs."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, rois, image_shapes)))

    def _draw_positive(self, labels: Tensor) -> Tensor:
        """Return which of an image's RoIs the mask loss sees: its cells, or a random part."""
        positive = torch.where(labels > 0)[0]
        if self.mask_rois is None or len(positive) <= self.mask_rois:
            return positive
        order = torch.randperm(len(positive), device=positive.device)
        return positive[order[: self.mask_rois]]

    def _mask_logits(
        self, features: dict[str, Tensor], rois: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Return float32 mask logits [K, C, M, M] of all RoIs."""
        pooled = self.mask_roi_pool(features, rois, image_shapes)
        return self.mask_predictor(self.mask_head(pooled)).float()

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        rois: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]],
    ) -> Tensor:
        """Return the mean binary cross-entropy of the mask of each positive RoI's own class."""
        positive = [self._draw_positive(label) for label in labels]
        rois, matched, labels = (
            [values[chosen] for values, chosen in zip(column, positive, strict=True)]
            for column in (rois, matched, labels)
        )
        logits = self._mask_logits(features, rois, image_shapes)
        if len(logits) == 0:
            return logits.sum() * 0  # keeps every parameter in the graph
        mask_targets = torch.cat(
            [
                sample_mask_targets(
                    target["instance_map"],
                    index,
                    boxes * boxes.new_tensor(target["map_scale"] * 2),
                    logits.shape[-1],
                )
                for target, index, boxes in zip(targets, matched, rois, strict=True)
            ]
        )
        own = torch.cat(labels)
        return F.binary_cross_entropy_with_logits(
            logits[torch.arange(len(own), device=own.device), own], mask_targets
        )

    def _classify(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return class logits, box offsets, and the boxes that these move."""
        return *self.predict_boxes(features, proposals, image_shapes), proposals

    def _detections(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Return the detections of each image, best score first."""
        logits, offsets, proposals = self._classify(features, proposals, image_shapes)
        results = []
        for index, (boxes, scores, labels) in enumerate(
            zip(*self.postprocess_detections(logits, offsets, proposals, image_shapes), strict=True)
        ):
            one_image = OrderedDict(
                (name, level[index : index + 1]) for name, level in features.items()
            )
            masks = [
                self._mask_probabilities(one_image, some, classes, image_shapes[index])
                for some, classes in zip(
                    boxes.split(MASKS_AT_ONCE), labels.split(MASKS_AT_ONCE), strict=True
                )
            ]
            found = {"boxes": boxes, "labels": labels, "scores": scores, "masks": torch.cat(masks)}
            results.append(weigh_by_masks(found, self.mask_quality) if self.mask_quality else found)
        return results

    def _mask_probabilities(
        self, features: dict[str, Tensor], boxes: Tensor, labels: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """Return [K, 1, M, M] in 0-1: the mask of each box's class."""
        logits = self._mask_logits(features, [boxes], [shape])
        return logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()[:, None]


def weigh_by_masks(found: dict[str, Tensor], power: float) -> dict[str, Tensor]:
    """Return detections with scores times their masks' certainty, best first again.

    A score speaks of class and box; how good the mask is, is another matter (Huang et al., Mask
    Scoring R-CNN, 2019). There a network of its own guesses it; here it is the mean probability
    of the pixels over one half, 0 if there are none: no parameter, and no training.
    """
    masks = found["masks"]
    inside = masks > 0.5
    pixels = inside.sum(dim=(1, 2, 3)).clamp(min=1)
    certainty = (masks * inside).sum(dim=(1, 2, 3)) / pixels
    found = found | {"scores": found["scores"] * certainty**power}
    order = found["scores"].argsort(descending=True, stable=True)
    return {name: values[order] for name, values in found.items()}

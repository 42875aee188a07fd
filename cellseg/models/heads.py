"""Box and mask heads that read instance maps; torchvision's, where they need not differ.

What differs: mask targets are sampled from the instance map (`mask_targets`), masks leave as
RoI-sized probabilities, made in chunks, and what feeds a box or a loss is float32, so that the
rest can run in lower precision.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from cellseg.models.mask_targets import sample_mask_targets

# RoIs that a head sees together in evaluation: bounds its memory
BOXES_AT_ONCE, MASKS_AT_ONCE = 4096, 256


class Float32BoxPredictor(FastRCNNPredictor):
    """Class scores and box offsets that leave as float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits [K, C] and box offsets [K, 4 C]."""
        logits, offsets = super().forward(x)
        return logits.float(), offsets.float()


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
        if self.training or sum(map(len, rois)) <= BOXES_AT_ONCE:
            pooled = self.box_roi_pool(features, rois, image_shapes)
            return self.box_predictor(self.box_head(pooled))
        parts = [
            self.predict_boxes(_one_image(features, index), [some], [shape])
            for index, (boxes, shape) in enumerate(zip(rois, image_shapes, strict=True))
            for some in boxes.split(BOXES_AT_ONCE)
        ]
        logits, offsets = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(offsets)

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
        """Return the mean binary cross-entropy of each positive RoI's mask."""
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
        return F.binary_cross_entropy_with_logits(
            _own_masks(logits, torch.cat(labels)), mask_targets
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
            one_image, shape = _one_image(features, index), image_shapes[index]
            masks = [
                self._mask_probabilities(one_image, some, classes, shape)
                for some, classes in zip(
                    boxes.split(MASKS_AT_ONCE), labels.split(MASKS_AT_ONCE), strict=True
                )
            ]
            found = {"boxes": boxes, "labels": labels, "scores": scores, "masks": torch.cat(masks)}
            results.append(weigh_by_masks(found, self.mask_quality) if self.mask_quality else found)
        return results

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], ...]:
        """Return boxes xyxy [N, 4], scores [N] and labels [N] of each image, best first.

        As torchvision's, but for the number that is kept: `detections_per_img` for each network
        megapixel, no fewer in all, so that a large image loses no cell that a tile of it finds.

        Args:
            class_logits: [K, C] of all images' boxes.
            box_regression: offsets [K, 4 C].
            proposals: xyxy [K, 4] of each image, which the offsets move.
            image_shapes: (height, width) of each image in network pixels.
        """
        counts = [len(boxes) for boxes in proposals]
        boxes = self.box_coder.decode(box_regression, proposals)
        boxes = boxes.reshape(*class_logits.shape, 4).split(counts)  # none have no shape of theirs
        scores = class_logits.softmax(dim=-1).split(counts)
        found = map(self._best_detections, boxes, scores, image_shapes)
        return tuple(map(list, zip(*found, strict=True)))

    def _best_detections(
        self, boxes: Tensor, scores: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels of an image; of [K, C, 4] boxes and [K, C] scores."""
        row, label = (scores[:, 1:] > self.score_thresh).nonzero(as_tuple=True)
        label = label + 1  # the background has none
        boxes, scores = clip_boxes_to_image(boxes[row, label], shape), scores[row, label]
        large = remove_small_boxes(boxes, min_size=1e-2)
        boxes, scores, label = boxes[large], scores[large], label[large]
        megapixels = shape[0] * shape[1] / 1e6
        most = math.ceil(self.detections_per_img * max(1, megapixels))
        kept = batched_nms(boxes, scores, label, self.nms_thresh)[:most]
        return boxes[kept], scores[kept], label[kept]

    def _mask_probabilities(
        self, features: dict[str, Tensor], boxes: Tensor, labels: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """Return [K, 1, M, M] in 0-1: the mask of each box's class."""
        logits = self._mask_logits(features, [boxes], [shape])
        return _own_masks(logits, labels).sigmoid()[:, None]


def _own_masks(logits: Tensor, labels: Tensor) -> Tensor:
    """Return [K, M, M]: of the mask logits [K, C, M, M] those of each RoI's class.

    Where all classes share one mask, C is 1.
    """
    masks = labels.clamp(max=logits.shape[1] - 1)
    return logits[torch.arange(len(labels), device=labels.device), masks]


def _one_image(features: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the feature levels of one image of a batch."""
    return OrderedDict((name, level[index : index + 1]) for name, level in features.items())


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

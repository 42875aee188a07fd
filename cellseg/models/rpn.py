"""Region proposal network for images of any size, full of cells; torchvision's otherwise.

What differs: anchors are matched by touching pairs (`matching`), an image is given as many boxes
as its size asks for, and what feeds a box or a loss is float32, so that the rest can run in lower
precision.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from cellseg.models.matching import BETWEEN, AnchorGrid, match_anchors


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


class CellRPN(RegionProposalNetwork):
    """Region proposal network that matches anchors at the cost of touching pairs."""

    def __init__(
        self, *parts: Any, train_proposals: int, proposals: int, **named_parts: Any
    ) -> None:
        """Take the parts of torchvision's network, and how many boxes are handed on.

        Args:
            *parts: see torchvision.
            train_proposals: boxes of an image in training.
            proposals: boxes for each network megapixel (10^6 pixels) of an image in evaluation,
                no fewer than `train_proposals` in all.
            **named_parts: see torchvision.
        """
        unused = dict.fromkeys(("training", "testing"), train_proposals)
        super().__init__(*parts, pre_nms_top_n=unused, post_nms_top_n=unused, **named_parts)
        self.train_proposals = train_proposals
        self.proposals = proposals

    def most_proposals(self, image_shape: tuple[int, int]) -> int:
        """Return how many boxes an image of (height, width) network pixels is given at most.

        A crop of training has so many boxes a pixel; an image of a hundred times its pixels holds
        a hundred times the cells and needs as many a pixel, or a tile would find more than the
        image that it is cut from.
        """
        if self.training:
            return self.train_proposals
        by_area = math.ceil(self.proposals * image_shape[0] * image_shape[1] / 1e6)
        return max(self.train_proposals, by_area)

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the best boxes of each image, xyxy [K, 4], and their probabilities [K].

        Each level hands on its best, at most `most_proposals`; of boxes of a level that overlap
        the better stays; then the best of all levels are kept.

        Args:
            proposals: xyxy [images, anchors, 4] in network pixels.
            objectness: logits of all anchors.
            image_shapes: (height, width) of each image in network pixels.
            num_anchors_per_level: how many of an image's anchors each level has, in their order.
        """
        objectness = objectness.detach().reshape(len(proposals), -1)
        counts = torch.tensor(num_anchors_per_level, device=objectness.device)
        levels = torch.arange(len(counts), device=counts.device).repeat_interleave(
            counts, output_size=sum(num_anchors_per_level)
        )
        found = []
        for boxes, logits, shape in zip(proposals, objectness, image_shapes, strict=True):
            most = self.most_proposals(shape)
            best = _best_of_levels(logits, num_anchors_per_level, most)
            boxes, scores = clip_boxes_to_image(boxes[best], shape), logits[best].sigmoid()
            large = remove_small_boxes(boxes, self.min_size)
            boxes, scores, level = boxes[large], scores[large], levels[best][large]
            likely = scores >= self.score_thresh
            boxes, scores, level = boxes[likely], scores[likely], level[likely]
            kept = batched_nms(boxes, scores, level, self.nms_thresh)[:most]
            found.append((boxes[kept], scores[kept]))
        return [boxes for boxes, _ in found], [scores for _, scores in found]

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


def _best_of_levels(logits: Tensor, counts: list[int], most: int) -> Tensor:
    """Return the indices of the best values of each level, at most so many of one."""
    starts = [0, *itertools.accumulate(counts)]
    return torch.cat(
        [
            level.topk(min(most, len(level))).indices + start
            for level, start in zip(logits.split(counts), starts, strict=False)
        ]
    )

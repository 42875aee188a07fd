"""Cascade heads: three box heads in a row, each trained on what the one before it hands on.

Cai & Vasconcelos, Cascade R-CNN: Delving into High Quality Object Detection, 2018. A head that is
trained at IoU 0.5 refines boxes well enough that the next can be trained at 0.6, and its boxes a
third one at 0.7; trained at 0.7 from the start, a head would see hardly a box that is a cell.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import clip_boxes_to_image

from cellseg.models.heads import CellRoIHeads

STAGE_IOUS = (0.5, 0.6, 0.7)
# Offsets shrink from stage to stage; these bring them back to about the same size.
STAGE_BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
# Shares of the stages in the loss, as mmdetection's configurations of Cascade R-CNN have them.
STAGE_LOSS_WEIGHTS = (1.0, 0.5, 0.25)


class OneBoxPredictor(nn.Module):
    """Class scores and one box for whatever class, in float32."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        """Set the two layers up."""
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits [K, C] and box offsets [K, 4 C], the same four for every class."""
        logits = self.cls_score(x).float()
        return logits, self.bbox_pred(x).float().repeat(1, logits.shape[1])


class CascadeRoIHeads(CellRoIHeads):
    """Three box heads in a row, of which this is the last, and its mask head.

    Each stage draws its samples anew, from the boxes of the stage before and the true ones, at its
    own IoU. The mask head learns on the samples of the first stage, as in Detectron2: there are
    enough that hold a cell from the first step on, they vary most, and the boxes that it gets in
    evaluation, the last stage's, are better ones. A detection's scores are the mean over the
    stages, each on the boxes that it was handed; its box is the last stage's.
    """

    def __init__(self, *parts: Any, earlier: Sequence[CellRoIHeads], **named_parts: Any) -> None:
        """Take the parts of `CellRoIHeads` and the stages before.

        Args:
            *parts: see `CellRoIHeads`; box head, thresholds and box weights are the last stage's.
            earlier: the stages before, first to last, without mask heads.
            **named_parts: see `CellRoIHeads`.
        """
        super().__init__(*parts, **named_parts)
        self.earlier = nn.ModuleList(earlier)

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None,
    ) -> dict[str, Tensor]:
        """Return the losses of all stages, numbered from 1, and of the masks."""
        losses: dict[str, Tensor] = {}
        stages = [*self.earlier, self]
        for number, (stage, share) in enumerate(zip(stages, STAGE_LOSS_WEIGHTS, strict=True), 1):
            rois, matched, labels, wanted = stage.select_training_samples(proposals, targets)
            if number == 1:
                loss_mask = self._mask_loss(features, rois, matched, labels, image_shapes, targets)
            logits, offsets = stage.predict_boxes(features, rois, image_shapes)
            loss_classifier, loss_box = fastrcnn_loss(logits, offsets, labels, wanted)
            losses[f"loss_classifier_{number}"] = share * loss_classifier
            losses[f"loss_box_reg_{number}"] = share * loss_box
            proposals = _refine(stage, rois, offsets, image_shapes)
        return losses | {"loss_mask": loss_mask}

    def _classify(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return logits of the mean probabilities, the last offsets, and the boxes they move."""
        probabilities = []
        for stage in self.earlier:
            logits, offsets = stage.predict_boxes(features, proposals, image_shapes)
            probabilities.append(logits.softmax(dim=1))
            proposals = _refine(stage, proposals, offsets, image_shapes)
        logits, offsets = self.predict_boxes(features, proposals, image_shapes)
        mean = torch.stack([*probabilities, logits.softmax(dim=1)]).mean(dim=0)
        return mean.log(), offsets, proposals  # the softmax of a probability's logarithm is itself


@torch.no_grad()
def _refine(
    stage: CellRoIHeads,
    rois: list[Tensor],
    offsets: Tensor,
    image_shapes: list[tuple[int, int]],
) -> list[Tensor]:
    """Return the boxes that a stage hands on: its RoIs moved by its offsets, within the image."""
    boxes = stage.box_coder.decode(offsets[:, :4], rois).reshape(-1, 4)
    return [
        clip_boxes_to_image(some, shape)
        for some, shape in zip(boxes.split([len(r) for r in rois]), image_shapes, strict=True)
    ]

"""Look at an image from several sides, and merge what the views show as masks.

A network that was trained on turned and mirrored crops still sees a cell a little otherwise from
each side. What all views see is more often a cell than what one sees, and the mean of their
outlines is truer than any of them (`merge_views`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellseg.coco import Record
from cellseg.errors import SettingsError
from cellseg.inference.merging import fuse
from cellseg.inference.prediction import as_tensor, detect, detections_to_records

Detection = dict[str, Tensor]

# (mirrored, quarter turns): the four sides that keep height and width apart, and all eight.
SIDES = {
    "plain": ((False, 0),),
    "flips": ((False, 0), (True, 0), (True, 2), (False, 2)),
    "d4": tuple((mirrored, turns) for mirrored in (False, True) for turns in range(4)),
}


@dataclass(frozen=True)
class View:
    """One way to look at an image: resized, then mirrored, then turned.

    Attributes:
        mirrored: left and right change places.
        turns: quarter turns counter-clockwise, 0-3.
        scale: pixels of the view per pixel of the image. The network keeps its own `image_scale`
            on top of it, so that cells really come out larger or smaller.
    """

    mirrored: bool = False
    turns: int = 0
    scale: float = 1.0

    def show(self, image: Tensor) -> Tensor:
        """Return the view of an image [3, H, W]; a resized one is float32 in 0-1."""
        if self.scale != 1:
            image = image.float() / (255 if image.dtype == torch.uint8 else 1)
            image = F.interpolate(
                image[None],
                size=self._sides(image.shape[-2:]),
                mode="bilinear",
                antialias=self.scale < 1,
            )[0]
        if self.mirrored:
            image = image.flip(-1)
        return torch.rot90(image, self.turns, (-2, -1)).contiguous()

    def undo(self, detection: Detection, size: tuple[int, int]) -> Detection:
        """Return what was detected in the view in coordinates of the image.

        Masks are turned and mirrored on their own grid, which is exact.

        Args:
            detection: `boxes` xyxy in pixels of the view, `masks` (N, 1, M, M), and other keys.
            size: (height, width) of the image.
        """
        height, width = self._sides(size)
        boxes, masks = (
            detection["boxes"].double(),
            torch.rot90(detection["masks"], -self.turns, (-2, -1)),
        )
        for turn in range(self.turns):
            # A turn moved (x, y) to (y, side - x), where `side` is now the height.
            side = width if (self.turns - turn) % 2 else height
            left, top, right, bottom = boxes.unbind(dim=1)
            boxes = torch.stack([side - bottom, left, side - top, right], dim=1)
        if self.mirrored:
            masks = masks.flip(-1)
            left, top, right, bottom = boxes.unbind(dim=1)
            boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
        factor = boxes.new_tensor([size[1] / width, size[0] / height] * 2)
        return detection | {"boxes": (boxes * factor).float(), "masks": masks}

    def _sides(self, size: tuple[int, int]) -> list[int]:
        """Return height and width of the resized image."""
        return [max(1, round(side * self.scale)) for side in size]


def make_views(views: str, scales: Sequence[float] = (1.0,)) -> list[View]:
    """Return the views that a name and scales stand for, every side at every scale.

    Args:
        views: "plain" (the image as it is), "flips" (mirrored both ways: 4) or "d4" (turned, too:
            8).
        scales: pixels of the view per pixel of the image, each > 0.

    Raises:
        SettingsError: if there is no such name, or no scale, or one is not > 0.
    """
    if views not in SIDES:
        raise SettingsError(f"views is {views!r}; there are {', '.join(SIDES)}")
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise SettingsError(f"scales are {list(scales)}; give one or more numbers > 0")
    return [View(mirrored, turns, scale) for scale in scales for mirrored, turns in SIDES[views]]


def predict_views(
    model: nn.Module,
    image: Tensor | np.ndarray,
    *,
    image_id: int,
    views: str = "plain",
    scales: Sequence[float] = (1.0,),
    score_threshold: float = 0.05,
    mask_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> list[Record]:
    """Return the COCO result records of one image seen from several sides, best score first.

    Args:
        model: Mask R-CNN of this package, in eval mode, on any device.
        image: uint8 [3, H, W], RGB (float in 0-1 is accepted), or an array [H, W, 3].
        image_id: number written into each record.
        views: "plain", "flips" or "d4"; see `make_views`.
        scales: pixels of the view per pixel of the image.
        score_threshold: views keep detections with score >= this, in 0-1.
        mask_threshold: a pixel belongs to the cell if its probability is greater.
        iou_threshold: mask IoU over which views show the same cell, in 0-1.

    Returns:
        list of records, none with an empty mask. With a single view it is what the view shows;
        with several, see `merge_views`.

    Raises:
        SettingsError: if views or scales are not of those.
        ValueError: as `predict_image`.
    """
    image = as_tensor(image)
    size = (image.shape[-2], image.shape[-1])
    seen = [view.undo(detect(model, view.show(image)), size) for view in make_views(views, scales)]
    members = [
        detections_to_records(
            detection,
            size,
            image_id=image_id,
            score_threshold=score_threshold,
            mask_threshold=mask_threshold,
        )
        for detection in seen
    ]
    return members[0] if len(members) == 1 else fuse(members, iou_threshold=iou_threshold)

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

from cellseg.coco import Record, make_records, record_order
from cellseg.errors import SettingsError
from cellseg.inference.merging import agreement, cluster_scores, find_owners
from cellseg.inference.pasting import masks_to_rles
from cellseg.inference.prediction import as_tensor, detect, detections_to_records

Detection = dict[str, Tensor]

# (mirrored, quarter turns). Of four sides turns gain more than flips: they exchange x and y.
SIDES = {
    "plain": ((False, 0),),
    "flips": ((False, 0), (True, 0), (True, 2), (False, 2)),
    "turns": tuple((False, turns) for turns in range(4)),
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
        views: "plain" (the image as it is), "flips" (mirrored both ways: 4), "turns" (by quarters:
            4) or "d4" (all 8).
        scales: pixels of the view per pixel of the image, each > 0.

    Raises:
        SettingsError: if there is no such name, or no scale, or one is not > 0.
    """
    if views not in SIDES:
        raise SettingsError(f"views is {views!r}; use one of {', '.join(SIDES)}")
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
        views: "plain", "flips", "turns" or "d4"; see `make_views`.
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
    seen = []
    for view in make_views(views, scales):
        detection = detect(model, view.show(image))
        chosen = detection["scores"] >= score_threshold
        detection = {key: value[chosen] for key, value in detection.items()}
        seen.append(view.undo(detection, size))
    merged = (
        seen[0]
        if len(seen) == 1
        else merge_views(seen, size, mask_threshold=mask_threshold, iou_threshold=iou_threshold)
    )
    return detections_to_records(merged, size, image_id=image_id, mask_threshold=mask_threshold)


def merge_views(
    seen: Sequence[Detection],
    size: tuple[int, int],
    *,
    mask_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> Detection:
    """Return one detection per cell and class, on the CPU, from those of several views.

    The views' detections are suppressed together as masks; those that a kept one removes are its
    cluster. Its box and its mask on the box's grid become the cluster's means, so that it is
    pasted once, at sub-pixel places. Its score becomes the mean over the views of each one's best
    in the cluster, 0 where a view saw nothing. A cell that all views see alike stays as it is.

    Args:
        seen: detections of V views, in coordinates of the image.
        size: (height, width) of the image.
        mask_threshold: a pixel belongs to the cell if its probability is greater.
        iou_threshold: detections of one class with mask IoU > this show the same cell, in 0-1.
    """
    together = {key: torch.cat([found[key].cpu() for found in seen]) for key in seen[0]}
    view = np.repeat(np.arange(len(seen)), [len(found["scores"]) for found in seen])
    rles = masks_to_rles(together["masks"], together["boxes"], size, mask_threshold=mask_threshold)
    scores, labels = together["scores"].tolist(), together["labels"].tolist()
    records = make_records(0, labels, scores, rles)
    best_first = sorted(range(len(records)), key=lambda index: record_order(records[index]))
    owners = find_owners([records[index] for index in best_first], iou_threshold=iou_threshold)
    ranked = np.array(scores)[best_first]
    kept, cell, best_of_views = cluster_scores(owners, view[best_first], ranked, len(seen))
    order = torch.tensor(best_first, dtype=torch.int64)
    return {
        "boxes": _means(together["boxes"][order], kept, cell),
        "labels": together["labels"][order][kept],
        "scores": torch.tensor(agreement(best_of_views, np.ones(len(seen))), dtype=torch.float64),
        "masks": _means(together["masks"][order], kept, cell),
    }


def _means(values: Tensor, kept: np.ndarray, cell: np.ndarray) -> Tensor:
    """Return the mean of the values of each cell; equal ones give exactly that value back.

    Args:
        values: float [N, ...].
        kept: int64 [K], the row of each cell that its differences are taken from.
        cell: int64 [N], the cell of each row, in 0..K-1.
    """
    first, cell = values[kept], torch.from_numpy(cell)
    difference = torch.zeros_like(first).index_add_(0, cell, values - first[cell])
    number = torch.bincount(cell, minlength=len(kept)).view(-1, *[1] * (values.ndim - 1))
    return first + difference / number

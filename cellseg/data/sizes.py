"""How large the cells are, and what follows: the image scale, the crop, the anchors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellseg.data.dataset import CellDataset
from cellseg.data.reading import Instances
from cellseg.errors import DataError

TARGET_DIAMETER = 32.0
"""Network pixels that the median cell should be across: what was best on real tissue."""
MIN_SCALE, MAX_SCALE = 0.25, 4.0

STRIDES = (4, 8, 16, 32, 64)
"""Pixels between the anchors of each level of the pyramid."""
DEFAULT_SIZES = (8, 16, 32, 64, 128)
DEFAULT_RATIOS = (0.5, 1.0, 2.0)
_FIRST_SIZES = (8, 11, 16, 23, 32)
_STEPS = (2.0, 1.7, math.sqrt(2))  # from a level's size to the next one's
_RATIOS = (DEFAULT_RATIOS, (0.7, 1.0, 1.4))
_MAX_TRIED = 4000  # cells on which proposals are compared
_MAX_LOST = 0.03  # of the best coverage at 0.5, given up for more at 0.7


@dataclass(frozen=True)
class CellSizes:
    """Where cells lie and how large they are, those of all images one after the other.

    Attributes:
        boxes: float32 [N, 4], xyxy, half-open, pixels of the cell's image.
        areas: int64 [N], pixels.
        labels: int64 [N], 1..C.
        cut: bool [N], whether the border of its image may cut the cell: its box touches it.
    """

    boxes: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    cut: np.ndarray

    def select(self, chosen: np.ndarray | slice) -> "CellSizes":
        """Return the cells that an index, a slice or a mask [N] chooses."""
        return CellSizes(
            self.boxes[chosen], self.areas[chosen], self.labels[chosen], self.cut[chosen]
        )

    @property
    def whole(self) -> "CellSizes":
        """The cells that no border cuts; all of them if it cuts every one."""
        return self if self.cut.all() else self.select(~self.cut)

    @property
    def diameters(self) -> np.ndarray:
        """Diameter of the disc of each cell's area, float64 [N], pixels."""
        return np.sqrt(4 / np.pi * self.areas)


@dataclass(frozen=True)
class AnchorProposal:
    """Anchors for cells of these sizes, and how well they and the default ones cover them.

    Attributes:
        sizes: side of the anchors of each level, network pixels.
        ratios: of height to width.
        coverage_50, coverage_70: share of cells whose best anchor reaches IoU 0.5 / 0.7.
        default_coverage_50, default_coverage_70: the same for the default of 8 to 128.
    """

    sizes: tuple[int, ...]
    ratios: tuple[float, ...]
    coverage_50: float
    coverage_70: float
    default_coverage_50: float
    default_coverage_70: float


def measure_cells(dataset: CellDataset) -> CellSizes:
    """Return the sizes of all cells; reads every sample, which is cheap from a cache.

    Raises:
        DataError: if a file of a sample cannot be used; names it.
    """
    parts = [sizes_of(dataset.read_instances(index)[1]) for index in range(len(dataset))]
    return join_sizes(parts)


def sizes_of(cells: Instances) -> CellSizes:
    """Return the sizes of the cells of one image."""
    height, width = cells.instance_map.shape[1:]
    starts, ends = cells.boxes[:, :2], cells.boxes[:, 2:]
    cut = (starts <= 0).any(axis=1) | (ends >= (width, height)).any(axis=1)
    return CellSizes(cells.boxes.copy(), cells.areas.copy(), cells.labels.copy(), cut)


def join_sizes(parts: Sequence[CellSizes]) -> CellSizes:
    """Return the sizes of the cells of several images."""
    names = ("boxes", "areas", "labels", "cut")
    return CellSizes(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def suggest_image_scale(sizes: CellSizes) -> float:
    """Return the network pixels per image pixel that suit cells of these sizes.

    The median whole cell is to be `TARGET_DIAMETER` network pixels across. The factor is rounded
    to a power of the square root of two (0.25, 0.35, 0.5, 0.71, 1, 1.41, 2, 2.83, 4): at most a
    fifth off, and so coarse that a few images more or less seldom change it, on which the name
    and the settings of a run depend.

    Returns:
        a factor from `MIN_SCALE` to `MAX_SCALE`; 1 if there are no cells.
    """
    if not len(sizes.areas):
        return 1.0
    wanted = TARGET_DIAMETER / float(np.median(sizes.whole.diameters))
    wanted = min(max(wanted, MIN_SCALE), MAX_SCALE)
    return round(2 ** (round(2 * math.log2(wanted)) / 2), 2)


def suggest_crop_size(image_scale: float, network_size: int = 320) -> int:
    """Return the side, in image pixels, of crops that are `network_size` pixels in the network."""
    return max(1, round(network_size / image_scale))


def propose_anchors(sizes: CellSizes, image_scale: float) -> AnchorProposal:
    """Return the anchors that cover the cells best, of a few regular ladders of sizes.

    Tried are ladders from 8 to 32 pixels on the finest level that grow by 1.4 to 2 from level to
    level, with wide and narrow ratios. Of those that cover nearly as many cells at IoU 0.5 as the
    best does (`_MAX_LOST`), the one that covers most at 0.7 is taken: what the first misses is
    hard to find at all, what the second has is trained on most. Anchors are laid over each image
    as at prediction, each level's on the grid of its stride from the image's corner, and rounded
    as torchvision does: cells lie between their centres as they do in the images.

    Args:
        sizes: of the cells, image pixels.
        image_scale: network pixels per image pixel.

    Raises:
        DataError: if there are no cells.
    """
    if not len(sizes.boxes):
        raise DataError("no cells to propose anchors for; check class_names and the class maps")
    boxes = sizes.boxes * np.float32(image_scale)
    tried = boxes[:: -(-len(boxes) // _MAX_TRIED)]
    ladders = [
        (tuple(round(first * step**level) for level in range(len(STRIDES))), ratios)
        for first in _FIRST_SIZES
        for step in _STEPS
        for ratios in _RATIOS
    ]
    covered = [_coverage(tried, *ladder) for ladder in ladders]
    enough = max(half for half, _ in covered) - _MAX_LOST
    chosen = [k for k, (half, _) in enumerate(covered) if half >= enough]
    best = ladders[max(chosen, key=lambda k: covered[k][1])]
    default = _coverage(boxes, DEFAULT_SIZES, DEFAULT_RATIOS)
    return AnchorProposal(*best, *_coverage(boxes, *best), *default)


def best_anchor_ious(
    boxes: np.ndarray, anchor_sizes: Sequence[int], ratios: Sequence[float]
) -> np.ndarray:
    """Return the IoU of each box with the anchor that overlaps it most.

    Of all anchors of one shape the one whose centre is nearest is the best, so that each box is
    compared with one anchor a shape.

    Args:
        boxes: [N, 4], xyxy, network pixels.
        anchor_sizes: side of the anchors of each level (strides 4, 8, 16, 32, 64).
        ratios: of height to width.

    Returns:
        float [N], 0-1.
    """
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    best = np.zeros(len(boxes))
    for stride, size in zip(STRIDES, anchor_sizes, strict=True):
        offsets = np.abs(centres - stride * np.round(centres / stride))
        for ratio in ratios:
            half = np.round(size / 2 * np.array([1 / math.sqrt(ratio), math.sqrt(ratio)]))
            shared = np.minimum(offsets + sides / 2, half) - np.maximum(offsets - sides / 2, -half)
            overlap = np.maximum(shared, 0).prod(axis=1)
            union = sides.prod(axis=1) + (2 * half).prod() - overlap
            np.maximum(best, overlap / union, out=best)
    return best


def _coverage(
    boxes: np.ndarray, anchor_sizes: Sequence[int], ratios: Sequence[float]
) -> tuple[float, float]:
    """Return the share of boxes whose best anchor reaches IoU 0.5, and 0.7."""
    ious = best_anchor_ious(boxes, anchor_sizes, ratios)
    return float((ious >= 0.5).mean()), float((ious >= 0.7).mean())

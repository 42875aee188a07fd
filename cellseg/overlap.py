"""Which masks of an image overlap, and by how much: found on a grid, measured along one line.

All masks of an image are laid one after the other on one line of pixels. Along it the number of
covered pixels so far is a broken line with its corners at the ends of runs, so that the overlap
of mask a with mask b is read off at the ends of b's runs, moved to where a lies. Pairs are found
on a grid of about a cell's size. The cost follows the runs and the pairs of overlapping boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cellseg.coco import Rle
from cellseg.rle import decode_counts, index_within

CELL_SIDES = 1.5  # side of a grid cell in median box sides: fewest pairs to look at (measured)
MAX_CELLS = 8  # grid cells that a box may cover in the mean


def neighbour_ious(rles: Sequence[Rle]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mask IoU of all pairs of masks whose boxes overlap.

    Args:
        rles: N masks of one image, {size, counts}.

    Returns:
        i, j: int64 [P], indices into `rles`, i < j, ascending by (i, j).
        iou: float64 [P] in 0-1, the same numbers as pycocotools'; pairs not listed have 0.

    Raises:
        ValueError: if the masks are of different size, or a mask's runs do not fill its size.
    """
    masks = MaskLine.from_rles(rles)
    first, second = box_neighbours(masks.boxes)
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    return first, second, masks.ious(first, second)


def box_neighbours(
    boxes: np.ndarray, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of boxes that share some area, found on a grid.

    Args:
        boxes: [N, 4] xyxy, half-open; boxes without area have no neighbours.
        groups: int [N]; only boxes of one group are paired. None means one group.

    Returns:
        i, j: int64 [P] with i < j, each pair once, in no particular order.
    """
    boxes = np.asarray(boxes).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    solid = np.flatnonzero((sides > 0).all(axis=1))
    if len(solid) < 2:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    low, high = _grid_spans(boxes[solid], float(np.median(sides[solid])))
    box, column, row = _covered_cells(low, high)
    group = np.zeros(len(solid), dtype=np.int64)
    if groups is not None:
        group = np.unique(np.asarray(groups)[solid], return_inverse=True)[1]
    columns, rows = high.max(axis=0)
    order = np.argsort((group[box] * columns + column) * rows + row, kind="stable")
    box, column, row = box[order], column[order], row[order]
    a, b = _pairs_of_equal((group[box] * columns + column) * rows + row)
    # A pair meets in every grid cell that both cover; it counts in the first of them, where one
    # of the two has its first column and one of the two its first row.
    first = (column == low[box, 0]) + 2 * (row == low[box, 1]).astype(np.uint8)
    once = (first[a] | first[b]) == 3
    i, j = solid[box[a[once]]], solid[box[b[once]]]
    overlap = np.logical_and(*(shared > 0 for shared in _shared_sides(boxes, i, j)))
    return i[overlap], j[overlap]


def _grid_spans(boxes: np.ndarray, median_side: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first grid cell (column, row) of each box, and the one past its last."""
    origin = np.tile(boxes[:, :2].min(axis=0), 2)
    cell = CELL_SIDES * max(median_side, 1.0)
    while True:
        grid = (boxes - origin) / cell
        low = np.floor(grid[:, :2]).astype(np.int64)
        high = np.maximum(np.ceil(grid[:, 2:]).astype(np.int64), low + 1)
        if (high - low).prod(axis=1).sum() <= MAX_CELLS * len(boxes):
            return low, high
        cell *= 2  # many boxes far larger than the median: a coarser grid


def _shared_sides(boxes: np.ndarray, i: np.ndarray, j: np.ndarray) -> list[np.ndarray]:
    """Return width and height of what the boxes of each pair share, <= 0 if nothing."""
    lows, highs = boxes.T[:2].copy(), boxes.T[2:].copy()  # whole columns are faster to pick from
    return [
        np.minimum(high[i], high[j]) - np.maximum(low[i], low[j])
        for low, high in zip(lows, highs, strict=True)
    ]


def _covered_cells(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (box, column, row) of all grid cells from `low` to before `high`, box by box."""
    columns, rows = (high - low).T
    number = columns * rows
    box = np.repeat(np.arange(len(low)), number)
    within = index_within(number)
    return box, low[box, 0] + within // rows[box], low[box, 1] + within % rows[box]


def _pairs_of_equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions a < b of all pairs of equal keys; the keys are sorted."""
    positions = np.arange(len(keys))
    later = np.searchsorted(keys, keys, side="right") - positions - 1
    a = np.repeat(positions, later)
    return a, a + 1 + index_within(later)


@dataclass(frozen=True)
class MaskLine:
    """The masks of one image, one after the other on a line of pixels.

    Attributes:
        height: rows of the image; a mask's pixels are numbered down its columns.
        pixels: pixels of one mask; mask n lies from n * pixels to (n + 1) * pixels.
        corners: int64 [R + 1], where runs start and end along the line.
        covered: int64 [R + 1], object pixels on the line before each corner.
        starts, ends: int64, the object runs of all masks along the line.
        offsets: int64 [N + 1]; mask n has the object runs offsets[n] to before offsets[n + 1].
    """

    height: int
    pixels: int
    corners: np.ndarray
    covered: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_rles(cls, rles: Sequence[Rle]) -> "MaskLine":
        """Lay masks on a line; ValueError if their sizes differ or their runs do not fill them."""
        sizes = [rle["size"] for rle in rles]
        height, width = sizes[0] if sizes else (0, 0)
        if sizes.count(sizes[0] if sizes else None) < len(sizes):
            raise ValueError(f"masks of one image have sizes {sorted(set(map(tuple, sizes)))}")
        counts, offsets = decode_counts([rle["counts"] for rle in rles])
        corners = np.concatenate([[0], np.cumsum(counts)])
        filled = corners[offsets] == np.arange(len(rles) + 1) * height * width
        if not filled.all() or counts.min(initial=0) < 0:
            raise ValueError(f"the runs of a mask do not fill its size ({height}, {width})")
        inside = index_within(np.diff(offsets)) % 2 == 1
        covered = np.concatenate([[0], np.cumsum(counts * inside)])
        runs = np.flatnonzero(inside & (counts > 0))
        return cls(
            height=height,
            pixels=height * width,
            corners=corners,
            covered=covered,
            starts=corners[runs],
            ends=corners[runs + 1],
            offsets=np.searchsorted(runs, offsets),
        )

    @cached_property
    def areas(self) -> np.ndarray:
        """Pixels of each mask, int64 [N]."""
        covered = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        return np.diff(covered[self.offsets])

    @cached_property
    def boxes(self) -> np.ndarray:
        """Tight boxes, int64 [N, 4] xyxy, half-open; zeros for an empty mask."""
        boxes = np.zeros((len(self.offsets) - 1, 4), dtype=np.int64)
        number = np.diff(self.offsets)
        full = np.flatnonzero(number)
        if not len(full):
            return boxes
        moved = np.repeat(np.arange(len(number)) * self.pixels, number)
        left, top = np.divmod(self.starts - moved, self.height)
        right, bottom = np.divmod(self.ends - 1 - moved, self.height)
        wraps = right > left  # goes on from the foot of a column to the head of the next
        top[wraps], bottom[wraps] = 0, self.height - 1
        first = self.offsets[full]
        boxes[full, 0] = left[first]
        boxes[full, 1] = np.minimum.reduceat(top, first)
        boxes[full, 2] = right[self.offsets[full + 1] - 1] + 1
        boxes[full, 3] = np.maximum.reduceat(bottom, first) + 1
        return boxes

    def ious(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return the IoU of pairs of masks, float64 [P]; two empty masks have 0."""
        shared = self._intersections(i, j)
        return shared / np.maximum(self.areas[i] + self.areas[j] - shared, 1)

    def iou_limits(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return what the IoU of pairs cannot exceed, by their boxes and areas, float64 [P]."""
        width, height = _shared_sides(self.boxes, i, j)
        box = np.maximum(width, 0) * np.maximum(height, 0)
        a, b = self.areas[i], self.areas[j]
        shared = np.minimum(box, np.minimum(a, b))
        return shared / np.maximum(a + b - shared, 1)

    def _intersections(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return the pixels that the masks of each pair share, int64 [P]."""
        runs = np.diff(self.offsets)[j]
        run = np.repeat(self.offsets[j], runs) + index_within(runs)
        shift = np.repeat((i - j) * self.pixels, runs)
        covered = self._covered_before(self.ends[run] + shift)
        covered -= self._covered_before(self.starts[run] + shift)
        totals = np.concatenate([[0], np.cumsum(covered)])
        ends = np.cumsum(runs)
        return totals[ends] - totals[ends - runs]

    def _covered_before(self, position: np.ndarray) -> np.ndarray:
        """Return the object pixels on the line before each position."""
        return np.rint(np.interp(position, self.corners, self.covered)).astype(np.int64)

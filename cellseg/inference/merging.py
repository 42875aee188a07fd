"""Merge records that show the same cell: mask IoU of neighbours, suppression, agreement.

All masks of an image are laid one after the other on one line of pixels. Along it the number of
covered pixels so far is a broken line with its corners at the ends of runs, so that the overlap
of mask a with mask b is read off at the ends of b's runs, moved to where a lies. Pairs are found
on a grid of about a cell's size. The cost follows the runs and the pairs of overlapping boxes: at
a constant density of cells it grows with the number of records.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from cellseg.coco import Record, Rle, record_order, sort_records
from cellseg.rle import decode_counts

CELL_SIDES = 1.5  # side of a grid cell in median box sides: fewest pairs to look at (measured)
MAX_CELLS = 8  # grid cells that a box may cover in the mean
Combine = Callable[[np.ndarray, np.ndarray], list[float]]  # scores [cells, M], weights [M]


def group_by_image(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Return the records of each image, in the order given."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["image_id"], []).append(record)
    return groups


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


def suppress(records: Iterable[Record], *, iou_threshold: float) -> list[Record]:
    """Return the records without those that a better one of the same image and class covers.

    Records are taken best score first (ties: the smaller counts string first); each one kept
    removes every later one whose mask IoU with it is > `iou_threshold`. Touching cells have an
    IoU of about 0 and stay. The result does not depend on the order of the input.

    Args:
        records: records of any number of images and classes; not changed.
        iou_threshold: in 0-1.

    Returns:
        the kept records themselves, in `sort_records` order.
    """
    kept: list[Record] = []
    for _, image in sorted(group_by_image(records).items()):
        image.sort(key=record_order)
        owners = find_owners(image, iou_threshold=iou_threshold)
        kept += [record for index, record in enumerate(image) if owners[index] == index]
    return kept


def agreement(scores: np.ndarray, weight: np.ndarray) -> list[float]:
    """Return the weighted means of scores [cells, M], the same bits in any order of members.

    Args:
        scores: of each cell each member's best, in 0-1; 0 where it saw nothing.
        weight: float64 [M], > 0.
    """
    best = scores.max(axis=1, initial=0)
    # As a loss against the best score, equal scores give exactly that score back.
    losses = np.sort(np.ascontiguousarray((best[:, None] - scores) * weight), axis=1)
    return np.maximum(best - losses.sum(axis=1) / math.fsum(weight), 0).tolist()


def fuse(
    members: Sequence[Sequence[Record]],
    *,
    iou_threshold: float,
    weights: Sequence[float] | None = None,
    combine: Combine = agreement,
) -> list[Record]:
    """Return one record per cell, its score rewarded by the members that agree on it.

    The members' records are suppressed together; the records that a kept one removes are its
    cluster. The kept record's score becomes the weighted mean of the members' scores for the
    cell, sum(w_m * s_m) / sum(w_m), where s_m is member m's best score in the cluster and 0 if it
    saw nothing there: the mean over those that agree times their share of the weights. A cell
    that all members see with one score keeps that score. The mask is that of the best record.

    Args:
        members: the record lists of M models; not changed.
        iou_threshold: records of one class with mask IoU > this show the same cell, in 0-1.
        weights: M weights > 0; all 1 if None.
        combine: takes the members' scores and weights as `agreement` does, for another rule.

    Returns:
        list of new records, in `sort_records` order; it does not depend on the order of members
        or records.

    Raises:
        ValueError: if the weights are not M numbers > 0.
    """
    weight = np.ones(len(members)) if weights is None else np.asarray(weights, dtype=float)
    if weight.shape != (len(members),) or not (np.isfinite(weight) & (weight > 0)).all():
        raise ValueError(f"weights must be {len(members)} numbers > 0, got {weights}")
    members_of: dict[int, list[tuple[Record, int]]] = {}
    for member, records in enumerate(members):
        for record in records:
            members_of.setdefault(record["image_id"], []).append((record, member))
    fused = (
        _fuse_image(entries, weight, iou_threshold, combine) for entries in members_of.values()
    )
    return sort_records(chain.from_iterable(fused))


def _fuse_image(
    entries: list[tuple[Record, int]],
    weight: np.ndarray,
    iou_threshold: float,
    combine: Combine,
) -> list[Record]:
    """Return `fuse` for the (record, member) entries of one image."""
    entries.sort(key=lambda entry: record_order(entry[0]))
    records = [record for record, _ in entries]
    owners = find_owners(records, iou_threshold=iou_threshold)
    kept, cluster = np.unique(owners, return_inverse=True)
    scores = np.zeros((len(kept), len(weight)))
    member = [member for _, member in entries]
    np.maximum.at(scores, (cluster, member), [record["score"] for record in records])
    fused = combine(scores, weight)
    return [{**records[index], "score": score} for index, score in zip(kept, fused, strict=True)]


def find_owners(
    records: Sequence[Record], *, iou_threshold: float, sources: np.ndarray | None = None
) -> np.ndarray:
    """Return for each record of one image the one that stands for it after suppression.

    Args:
        records: the records of one image, best first (`record_order`).
        iou_threshold: in 0-1.
        sources: int [N]; records of one source do not cover each other. None: any may.

    Returns:
        int64 [N]: the record's own index if it is kept; else the index of the best record of its
        class that is kept and covers it.
    """
    masks = MaskLine.from_rles([record["segmentation"] for record in records])
    classes = np.array([record["category_id"] for record in records])
    first, second = box_neighbours(masks.boxes, classes)
    possible = masks.iou_limits(first, second) > iou_threshold
    if sources is not None:
        possible &= sources[first] != sources[second]
    first, second = first[possible], second[possible]
    owners = np.arange(len(records))
    undecided = np.ones(len(records), dtype=bool)
    while undecided.any():
        # Kept are those that wait for no better one; only their overlaps need be measured.
        waiting = np.zeros(len(records), dtype=bool)
        waiting[second[undecided[second]]] = True
        kept = undecided & ~waiting
        measured = kept[first]
        i, j = first[measured], second[measured]
        covers = masks.ious(i, j) > iou_threshold
        np.minimum.at(owners, j[covers], i[covers])
        undecided[kept] = False
        undecided[j[covers]] = False
        rest = undecided[first]
        first, second = first[rest], second[rest]
    return owners


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
    within = np.arange(len(box)) - np.repeat(np.cumsum(number) - number, number)
    return box, low[box, 0] + within // rows[box], low[box, 1] + within % rows[box]


def _pairs_of_equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions a < b of all pairs of equal keys; the keys are sorted."""
    positions = np.arange(len(keys))
    later = np.searchsorted(keys, keys, side="right") - positions - 1
    a = np.repeat(positions, later)
    b = a + 1 + np.arange(len(a)) - np.repeat(np.cumsum(later) - later, later)
    return a, b


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
        position = np.arange(len(counts)) - np.repeat(offsets[:-1], np.diff(offsets))
        inside = position % 2 == 1
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
        pair_starts = np.cumsum(runs) - runs
        within = np.arange(runs.sum()) - np.repeat(pair_starts, runs)
        run = np.repeat(self.offsets[j], runs) + within
        shift = np.repeat((i - j) * self.pixels, runs)
        covered = self._covered_before(self.ends[run] + shift)
        covered -= self._covered_before(self.starts[run] + shift)
        totals = np.concatenate([[0], np.cumsum(covered)])
        return totals[pair_starts + runs] - totals[pair_starts]

    def _covered_before(self, position: np.ndarray) -> np.ndarray:
        """Return the object pixels on the line before each position."""
        return np.rint(np.interp(position, self.corners, self.covered)).astype(np.int64)

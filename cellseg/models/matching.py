"""Which anchor learns which cell, from the pairs that touch instead of from all pairs.

Anchors lie on regular grids, so the anchors that a box can touch are a rectangle of each grid:
they are listed, not searched. 1,000 cells on 250,000 anchors are 250 million IoUs for a dense
matrix and a few hundred thousand for this list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BACKGROUND = -1
BETWEEN = -2


@dataclass(frozen=True)
class AnchorGrid:
    """One pyramid level's anchors: `shapes` repeated at every point of a grid, row by row.

    Attributes:
        shapes: float [A, 4], the level's anchors around the origin, xyxy in pixels.
        rows: number of grid points down the image.
        columns: number of grid points across.
        stride_y: pixels from one row to the next.
        stride_x: pixels from one column to the next.
    """

    shapes: Tensor
    rows: int
    columns: int
    stride_y: int
    stride_x: int

    def __len__(self) -> int:
        """Return the number of anchors of the level."""
        return self.rows * self.columns * len(self.shapes)


def match_anchors(
    boxes: Tensor,
    anchors: Tensor,
    grids: Sequence[AnchorGrid],
    *,
    foreground_iou: float = 0.7,
    background_iou: float = 0.3,
) -> Tensor:
    """Return for each anchor the box that it matches.

    The rules are those of torchvision's `Matcher` with low-quality matches: an anchor takes the
    box of highest IoU (the lowest index on ties) if that IoU reaches `foreground_iou`; and every
    anchor whose IoU with some box is the highest that this box has anywhere takes *its own* best
    box, however low. Time and memory grow with the number of overlapping (box, anchor) pairs.

    Args:
        boxes: float32 [N, 4], xyxy in pixels.
        anchors: float32 [M, 4], all levels one after the other, as `grids` describe them.
        grids: one entry a level, in the order of `anchors`.
        foreground_iou: IoU from which an anchor is positive.
        background_iou: IoU below which it is background.

    Returns:
        int64 [M]: index of the box, BACKGROUND (-1), or BETWEEN (-2) the two thresholds.
    """
    matches = torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    if len(boxes) == 0:
        return matches
    box_index, anchor_index = _touching_pairs(boxes, grids)
    iou = _pair_iou(boxes, anchors, box_index, anchor_index)
    best_iou = iou.new_zeros(len(anchors)).scatter_reduce_(0, anchor_index, iou, "amax")
    # Anchors that touch nothing have IoU 0 with every box: the first is "best", as with argmax.
    is_best = iou == best_iou.index_select(0, anchor_index)
    best_box = torch.full_like(matches, len(boxes))
    best_box.scatter_reduce_(0, anchor_index[is_best], box_index[is_best], "amin")
    best_box[best_iou == 0] = 0

    matches[best_iou >= background_iou] = BETWEEN
    positive = best_iou >= foreground_iou
    box_best = iou.new_zeros(len(boxes)).scatter_reduce_(0, box_index, iou, "amax")
    positive[anchor_index[iou == box_best.index_select(0, box_index)]] = True
    # By the same rule a box that touches no anchor is matched by all of them, at IoU 0.
    positive |= (box_best == 0).any()
    return torch.where(positive, best_box, matches)


def _touching_pairs(boxes: Tensor, grids: Sequence[AnchorGrid]) -> tuple[Tensor, Tensor]:
    """Return (box, anchor) index pairs that contain every overlapping pair."""
    box_parts, anchor_parts, first = [], [], 0
    for grid in grids:
        shapes = grid.shapes.to(boxes)
        # Grid lines j with x1 < right + j * stride and left + j * stride < x2 (and alike in y).
        top, bottom = _line_range(boxes[:, 1::2], shapes[:, 1::2], grid.stride_y, grid.rows)
        left, right = _line_range(boxes[:, ::2], shapes[:, ::2], grid.stride_x, grid.columns)
        # Each (box, shape) has a rectangle of the grid; its points are numbered row by row.
        width = (right - left).reshape(-1)
        counts = (bottom - top).reshape(-1) * width
        shape = torch.arange(len(shapes), device=boxes.device)
        corner = first + (top * grid.columns + left) * len(shapes) + shape
        rectangle = torch.repeat_interleave(counts)
        point = torch.arange(len(rectangle), device=boxes.device)
        point -= (counts.cumsum(0) - counts).index_select(0, rectangle)
        width = width.index_select(0, rectangle)
        point += point // width * (grid.columns - width)
        anchor_parts.append(corner.reshape(-1).index_select(0, rectangle) + point * len(shapes))
        box_parts.append(rectangle // len(shapes))
        first += len(grid)
    return torch.cat(box_parts), torch.cat(anchor_parts)


def _line_range(
    sides: Tensor, shape_sides: Tensor, stride: int, lines: int
) -> tuple[Tensor, Tensor]:
    """Return first and one past the last grid line [N, A] on which a shape can touch a box."""
    first = torch.floor((sides[:, None, 0] - shape_sides[None, :, 1]) / stride).long()
    last = torch.ceil((sides[:, None, 1] - shape_sides[None, :, 0]) / stride).long()
    first = first.clamp(0, lines)
    return first, torch.maximum((last + 1).clamp(0, lines), first)


def _pair_iou(boxes: Tensor, anchors: Tensor, box_index: Tensor, anchor_index: Tensor) -> Tensor:
    """Return the IoU of pairs [K] of boxes, by the operations of `torchvision.ops.box_iou`."""
    # Gathered edge by edge: from a line of numbers that is several times faster than by rows.
    box_edges, anchor_edges = boxes.T.contiguous(), anchors.T.contiguous()
    overlaps = []
    for low, high in ((0, 2), (1, 3)):
        start = box_edges[low].index_select(0, box_index)
        start = torch.maximum(start, anchor_edges[low].index_select(0, anchor_index))
        end = box_edges[high].index_select(0, box_index)
        end = torch.minimum(end, anchor_edges[high].index_select(0, anchor_index))
        overlaps.append(end.sub_(start).clamp_(min=0))
    intersection = overlaps[0].mul_(overlaps[1])
    areas = _areas(boxes).index_select(0, box_index)
    areas += _areas(anchors).index_select(0, anchor_index)
    return intersection / areas.sub_(intersection)


def _areas(boxes: Tensor) -> Tensor:
    """Return the areas [K] of xyxy boxes."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

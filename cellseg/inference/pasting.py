"""RoI-sized mask probabilities -> RLE in the image; no full frame is made.

RLE is runs down the columns, so runs are what is computed. In the aligned paste a column of the
image is a broken line through the mask's cells, and a run starts and ends where that line crosses
the threshold: a mask costs its columns times M, whatever their height. For torchvision's paste
masks are resized to their boxes, at the cost of the boxes' pixels. Masks are worked through in
pieces, so that memory is bounded whatever their number.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cellseg.coco import Rle, runs_to_rles
from cellseg.rle import index_within

PASTES = ("aligned", "torchvision")
PIECE_VALUES = 4_000_000  # values worked on at once: 16 MB of float32

Runs = tuple[np.ndarray, np.ndarray, np.ndarray]


def masks_to_rles(
    masks: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    mask_threshold: float = 0.5,
    paste: str = "aligned",
) -> list[Rle]:
    """Return the RLE of each predicted mask.

    Masks and boxes are fetched from their device once; all work is done on the CPU.

    Args:
        masks: float [N, 1, M, M], probabilities 0-1 on the RoI's grid.
        boxes: float [N, 4], xyxy in image pixels, half-open, sub-pixel.
        size: (height, width) of the image.
        mask_threshold: a pixel belongs to the cell if its probability is greater; 0-1.
        paste: "aligned" samples the mask at each pixel's centre, at the box's sub-pixel place
            (Detectron2's `paste_masks_in_image`); "torchvision" resizes it to the box rounded to
            whole pixels, byte for byte as torchvision's `paste_masks_in_image` does on a CPU, for
            comparison with its results.

    Returns:
        list of N RLEs; a mask without a pixel over the threshold comes out empty.
    """
    if paste not in PASTES:
        raise ValueError(f"paste is {paste!r}; use one of {', '.join(PASTES)}")
    if len(masks) == 0:
        return []
    masks, boxes = masks[:, 0].detach().cpu().float(), boxes.detach().cpu().float()
    make_runs = _aligned_runs if paste == "aligned" else _torchvision_runs
    owner, start, end = make_runs(masks, boxes, size, mask_threshold)
    return runs_to_rles(owner, start, end, len(masks), size)


def _pieces(values: np.ndarray) -> Iterator[slice]:
    """Yield slices of consecutive masks that need about PIECE_VALUES values together."""
    piece = np.cumsum(values) // PIECE_VALUES
    bounds = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(values)]
    for first, last in pairwise(bounds):
        yield slice(first, last)


def _join(parts: list[Runs]) -> Runs:
    """Return the runs of all pieces, one after the other."""
    owner, start, end = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return owner, start, end


def _place_runs(
    owner: np.ndarray, column: np.ndarray, top: np.ndarray, bottom: np.ndarray, size: tuple
) -> Runs:
    """Return (owner, start, end) in the image's column-major order; what lies outside is cut off.

    Args:
        owner: int64 [R], the mask that each run belongs to.
        column: int64 [R], column of the image.
        top: int64 [R], first row of the run.
        bottom: int64 [R], one past its last row.
        size: (height, width) of the image.
    """
    height, width = size
    top, bottom = np.maximum(top, 0), np.minimum(bottom, height)
    seen = (top < bottom) & (column >= 0) & (column < width)
    first = column[seen] * height
    return owner[seen], first + top[seen], first + bottom[seen]


def _aligned_runs(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> Runs:
    """Return the runs of masks sampled at pixel centres, owners ascending."""
    # A border of 0 and the columns first: as `grid_sample` pads, and as runs go.
    columns = F.pad(masks, (1,) * 4).transpose(1, 2).contiguous().numpy()
    side = masks.shape[-1]
    edges = boxes.double().numpy()
    first, count = _columns_of_boxes(edges, side, size[1])
    parts = []
    for piece in _pieces(count * (side + 2)):
        masks_of_piece = np.arange(piece.start, piece.stop)
        owner = np.repeat(masks_of_piece, count[piece])
        x = first[owner] + index_within(count[piece])
        line, top, bottom = _crossings(_profiles(columns, owner, x, edges), edges[owner], threshold)
        parts.append(_place_runs(owner[line], x[line], top, bottom, size))
    return _join(parts)


def _columns_of_boxes(edges: np.ndarray, side: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first column and the number of columns that each mask can touch, int64 [N].

    Its pixels have their centre within half a mask cell of the box: farther out the interpolated
    probability is 0.
    """
    margin = (edges[:, 2] - edges[:, 0]) / side / 2
    first = np.clip(np.ceil(edges[:, 0] - margin - 0.5), 0, width).astype(np.int64)
    last = np.clip(np.floor(edges[:, 2] + margin - 0.5) + 1, 0, width).astype(np.int64)
    return first, np.maximum(last - first, 0)


def _profiles(
    columns: np.ndarray, owner: np.ndarray, x: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """Return the masks interpolated at the centres of columns, float32 [C, M + 2].

    Args:
        columns: float32 [N, M + 2, M + 2], masks with their border, columns first.
        owner: int64 [C], the mask of each column.
        x: int64 [C], column of the image.
        edges: float64 [N, 4], boxes.
    """
    padded = columns.shape[-1]
    scale = (padded - 2) / np.maximum(edges[:, 2] - edges[:, 0], 1e-6)
    position = np.clip((x + 0.5 - edges[owner, 0]) * scale[owner] + 0.5, 0, padded - 1)
    left = np.minimum(position.astype(np.int64), padded - 2)
    share = (position - left).astype(np.float32)[:, None]
    lines = columns.reshape(-1, padded)
    index = owner * padded + left
    before, profiles = lines[index], lines[index + 1]
    profiles -= before
    profiles *= share
    profiles += before
    return profiles


def _crossings(
    profiles: np.ndarray, edges: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where broken lines down the image are over the threshold.

    Args:
        profiles: float32 [C, M + 2], probabilities at the mask's cells down a column, 0 at both
            ends.
        edges: float64 [C, 4], the box of each column.
        threshold: a row is over it if the line is greater at the row's centre.

    Returns:
        line int64 [R], the column; top and bottom int64 [R], first row and one past the last.
    """
    threshold = np.float32(threshold)
    over = profiles > threshold
    place = np.flatnonzero(over[:, 1:] != over[:, :-1])
    line, cell = np.divmod(place, profiles.shape[1] - 1)
    place += line  # of the same cell in `profiles`, whose lines are longer by one
    before, after = profiles.reshape(-1)[place], profiles.reshape(-1)[place + 1]
    share = (threshold - before) / (after - before)
    top, height = edges[line, 1], np.maximum(edges[line, 3] - edges[line, 1], 1e-6)
    row = top + (cell + share - 0.5) * (height / (profiles.shape[1] - 2)) - 0.5
    # Lines begin and end at 0, so that crossings alternate: up, down, up, down.
    first = np.floor(row[::2]).astype(np.int64) + 1
    last = np.ceil(row[1::2]).astype(np.int64)
    return line[::2], first, last


def _torchvision_runs(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> Runs:
    """Return the runs of masks resized to whole pixels, owners ascending."""
    masks, corners, sides = _torchvision_frames(masks, boxes)
    parts = []
    for piece in _pieces(sides.prod(axis=1)):
        pixels, order, offsets = _resized(masks[piece], sides[piece], threshold)
        edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
        start, end = edges[::2], edges[1::2]
        crop = np.searchsorted(offsets, start, side="right") - 1
        owner = order[crop] + piece.start
        column, row = np.divmod(start - offsets[crop], sides[owner, 0] + 1)
        top = corners[owner, 0] + row
        runs = _place_runs(
            owner, corners[owner, 1] + column, top - 1, top - 1 + (end - start), size
        )
        by_owner = np.argsort(runs[0], kind="stable")
        parts.append(tuple(values[by_owner] for values in runs))
    return _join(parts)


def _torchvision_frames(masks: Tensor, boxes: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return padded masks, first pixels (y, x) and sides (h, w) as torchvision lays them out.

    The mask gets a border of one cell, the box grows with it and loses its fractions, and a box
    of whole pixels i..j has j - i + 1 of them.
    """
    side = masks.shape[-1]
    scale = (side + 2) / side
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    first, last = (centre - half).to(torch.int64), (centre + half).to(torch.int64)
    sides = (last - first + 1).clamp(min=1)
    return F.pad(masks, (1,) * 4), first.flip(1).numpy(), sides.flip(1).numpy()


def _resized(
    masks: Tensor, sides: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which pixels of resized masks are over the threshold, on one line.

    Masks of one size are resized together, each as torchvision resizes it alone.

    Returns:
        pixels: bool, column after column of mask after mask, a False before each column and
            behind the last.
        order: int64 [K], the masks as they lie in `pixels`.
        offsets: int64 [K + 1], where each of them starts.
    """
    order = np.lexsort((sides[:, 1], sides[:, 0]))
    heights, widths = sides[order].T
    offsets = np.concatenate([[0], np.cumsum(widths * (heights + 1))])
    pixels = np.zeros(offsets[-1] + 1, dtype=bool)
    changes = np.flatnonzero(np.diff(heights) | np.diff(widths)) + 1
    for first, last in pairwise([0, *changes.tolist(), len(order)]):
        height, width = int(heights[first]), int(widths[first])
        crops = F.interpolate(
            masks[order[first:last], None], (height, width), mode="bilinear", align_corners=False
        )
        inside = (crops[:, 0] > threshold).transpose(1, 2).numpy()
        lines = pixels[offsets[first] : offsets[last]].reshape(-1, width, height + 1)
        lines[:, :, 1:] = inside
    return pixels, order, offsets

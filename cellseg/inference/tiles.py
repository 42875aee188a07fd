"""Cut an image into overlapping tiles, and put together what they show.

The image is shared out among the tiles at the middles of their overlaps, and a record counts where
the centre of its box lies in its tile's share. For connected cells no larger than the overlap this
is exact: the tile whose share holds a cell's centre shows the whole cell, and a part that another
tile's border has cut off has its centre in a neighbour's share. Since a network may place one cell
a pixel apart in two tiles, whole cells near a seam count in both, and one of the twins goes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn

from cellseg.coco import Record, move_rles, record_order, sort_records, xywh_to_xyxy
from cellseg.errors import SettingsError
from cellseg.inference.merging import find_owners, fuse
from cellseg.inference.prediction import as_tensor
from cellseg.inference.views import predict_views
from cellseg.models.transform import SIZE_DIVISIBLE

WHOLE_PIXELS = 2048 * 2048  # network pixels up to which an image is looked at whole by default
TILE_SIZE = 1536  # network pixels a side, unless given: < 2 GB above the model (EXPERIMENTS.md)
OVERLAP = 256  # network pixels, unless given
MAX_MULTIPLE = 256  # image pixels; where whole strides need more, tiles begin near them
TOUCHING = 2  # pixels: what ends so near a tile's border may have been cut by it
SEAM = 1 / 4  # of the overlap: so far beyond its share a tile's whole cells count


@dataclass(frozen=True)
class Tile:
    """A window of an image and its share of it, xyxy, half-open, in image pixels.

    Attributes:
        window: what the network sees.
        share: where the centres lie that count; open to infinity at the image's own borders.
        row: number of the row of tiles, from 0.
        overlap: pixels that neighbours have in common, at least.
    """

    window: tuple[int, int, int, int]
    share: tuple[float, float, float, float]
    row: int
    overlap: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the window."""
        left, top, right, bottom = self.window
        return bottom - top, right - left

    def counts(self, boxes: np.ndarray) -> np.ndarray:
        """Return which of the boxes seen here count, bool [N]; boxes xyxy in image pixels.

        A cell that a border may have cut counts only within the share.
        """
        inside = _depth(boxes, self.share)
        return (inside >= 0) | ((inside >= -SEAM * self.overlap) & ~self._cut(boxes))

    def may_have_twins(self, boxes: np.ndarray) -> np.ndarray:
        """Return which of the boxes that count may count in another tile, too, bool [N]."""
        return (_depth(boxes, self.share) <= 2 * SEAM * self.overlap) | self._cut(boxes)

    def _cut(self, boxes: np.ndarray) -> np.ndarray:
        """Return which boxes end at a border beyond which the image goes on, bool [N]."""
        inner = np.where(np.isfinite(self.share), self.window, [-np.inf] * 2 + [np.inf] * 2)
        gaps = np.concatenate([boxes[:, :2] - inner[:2], inner[2:] - boxes[:, 2:]], axis=1)
        return (gaps < TOUCHING).any(axis=1)


def _depth(boxes: np.ndarray, share: tuple[float, float, float, float]) -> np.ndarray:
    """Return how deep the centres of boxes lie in a share, < 0 if outside; float64 [N].

    The first row and column belong to a share, those where the next one begins do not.
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    ends = np.nextafter(share[2:], -np.inf)
    return np.minimum(centre - share[:2], ends - centre).min(axis=1, initial=np.inf)


def plan_tiles(
    size: tuple[int, int], *, tile_size: int, overlap: int, multiple: int = 1
) -> list[Tile]:
    """Return the tiles of an image, row by row; tiles of one image are about equally large.

    Args:
        size: (height, width) of the image.
        tile_size: pixels a side, at most; rounded down to the multiple.
        overlap: pixels that neighbours have in common, at least; rounded up to the multiple. It
            should be larger than any cell.
        multiple: of origins and sides, except where the image ends.

    Raises:
        SettingsError: if tiles are not at least twice as large as their overlap.
    """
    side, shared = tile_size // multiple * multiple, -(-overlap // multiple) * multiple
    if overlap < 0 or side < max(2 * shared, 1):
        raise SettingsError(
            f"tile_size={tile_size}, overlap={overlap}: rounded to multiples of {multiple} pixels "
            f"they are {side} and {shared}; tiles must be at least twice as large as their overlap"
        )
    rows, columns = (
        _spans(length, side if length > tile_size else length, shared, multiple) for length in size
    )
    return [
        Tile((x1, y1, x2, y2), (left, top, right, bottom), row, shared)
        for row, (y1, y2, top, bottom) in enumerate(rows)
        for x1, x2, left, right in columns
    ]


def _spans(
    length: int, side: int, shared: int, multiple: int
) -> list[tuple[int, int, float, float]]:
    """Return (start, end, first and last place of the share) of the tiles along one axis."""
    if length > side:
        number = math.ceil((length - shared) / (side - shared))
        even = (length - shared) / number + shared
        side = min(side, math.ceil(even / multiple) * multiple)
    step = max(side - shared, 1)
    starts = [i * step for i in range(max(1, math.ceil((length - shared) / step)))]
    seams = [start + shared / 2 for start in starts[1:]]
    return [
        (start, min(start + side, length), low, high)
        for start, (low, high) in zip(starts, pairwise([-math.inf, *seams, math.inf]), strict=True)
    ]


def place_records(tile: Tile, records: Sequence[Record], size: tuple[int, int]) -> list[Record]:
    """Return the records of a tile that count, in the coordinates of the image.

    Args:
        tile: where the records were found.
        records: in the coordinates of the tile's window; not changed.
        size: (height, width) of the image.
    """
    left, top = tile.window[:2]
    bboxes = np.array([record["bbox"] for record in records], dtype=float).reshape(-1, 4)
    bboxes[:, :2] += (left, top)
    counting = np.flatnonzero(tile.counts(xywh_to_xyxy(bboxes)))
    rles = move_rles([records[i]["segmentation"] for i in counting], (left, top), size)
    return [
        records[i] | {"bbox": bboxes[i].tolist(), "segmentation": rle}
        for i, rle in zip(counting, rles, strict=True)
    ]


def join_tiles(
    tiles: Sequence[Tile], parts: Sequence[Sequence[Record]], *, iou_threshold: float
) -> list[Record]:
    """Return the records of an image from those that its tiles have placed in it, sorted.

    Of records of one class in different tiles whose mask IoU is > `iou_threshold` the best is
    kept. So a cell larger than the overlap, of which tiles may show parts only, leaves the best
    part, and parts that have less than this in common stay.

    Args:
        tiles: the tiles of one image.
        parts: of each tile what `place_records` returned.
        iou_threshold: in 0-1.
    """
    alone: list[Record] = []
    near: list[tuple[Record, int]] = []
    for number, (tile, records) in enumerate(zip(tiles, parts, strict=True)):
        bboxes = np.array([record["bbox"] for record in records], dtype=float).reshape(-1, 4)
        twins = tile.may_have_twins(xywh_to_xyxy(bboxes)).tolist()
        near += [(record, number) for record, seen in zip(records, twins, strict=True) if seen]
        alone += [record for record, seen in zip(records, twins, strict=True) if not seen]
    near.sort(key=lambda entry: record_order(entry[0]))
    records = [record for record, _ in near]
    owners = find_owners(
        records, iou_threshold=iou_threshold, sources=np.array([number for _, number in near])
    )
    return sort_records(
        alone + [records[i] for i in np.flatnonzero(owners == np.arange(len(near)))]
    )


def predict_tiles(
    model: nn.Module,
    image: Tensor | np.ndarray,
    *,
    image_id: int,
    tile_size: int | None = None,
    overlap: int | None = None,
    mix_whole: bool = False,
    iou_threshold: float = 0.5,
    **options: Any,
) -> list[Record]:
    """Return the COCO result records of one image, looked at tile by tile, best score first.

    An image that fits into one tile, or without a `tile_size` one of no more than `WHOLE_PIXELS`
    network pixels, is looked at as a whole.

    Args:
        model: Mask R-CNN of this package, in eval mode, on any device.
        image: uint8 [3, H, W], RGB (float in 0-1 is accepted), or an array [H, W, 3] as
            `read_image` returns it; it may stay on the CPU.
        image_id: number written into each record.
        tile_size: image pixels a side, at most; None means `TILE_SIZE` network pixels.
        overlap: image pixels that neighbours have in common; cells should be smaller. None means
            `OVERLAP` network pixels, or half a tile if that is less.
        mix_whole: look at the whole image, too, and score cells by agreement (`fuse`): the mean
            of both scores, 0 where one saw nothing. Takes the memory of the whole image.
        iou_threshold: mask IoU over which records show the same cell, in 0-1.
        **options: views, scales, score_threshold and mask_threshold of `predict_views`.

    Returns:
        list of records with masks in the whole image.

    Raises:
        SettingsError: if tiles are not at least twice as large as their overlap.
        ValueError: as `predict_image`.
    """
    image = as_tensor(image)
    size = (image.shape[-2], image.shape[-1])
    predict = partial(
        predict_views, model, image_id=image_id, iou_threshold=iou_threshold, **options
    )
    tiles = plan_for_model(model, size, tile_size=tile_size, overlap=overlap)
    if len(tiles) == 1:
        return predict(image)
    parts = []
    for tile in tiles:
        left, top, right, bottom = tile.window
        parts.append(place_records(tile, predict(image[:, top:bottom, left:right]), size))
    joined = join_tiles(tiles, parts, iou_threshold=iou_threshold)
    if not mix_whole:
        return joined
    return fuse([predict(image), joined], iou_threshold=iou_threshold)


def plan_for_model(
    model: nn.Module,
    size: tuple[int, int],
    *,
    tile_size: int | None = None,
    overlap: int | None = None,
) -> list[Tile]:
    """Return the tiles of an image that suit a model's scale and strides; see `predict_tiles`.

    Tiles begin at multiples of the network's coarsest stride, so that its cells of features lie
    on the image as they would in the whole of it.
    """
    scale = image_scale_of(model)
    network_pixels = size[0] * size[1] * scale**2
    if network_pixels <= WHOLE_PIXELS if tile_size is None else max(size) <= tile_size:
        return plan_tiles(size, tile_size=max(size), overlap=0)
    # The least number of image pixels that make whole strides.
    exact = Fraction(SIZE_DIVISIBLE) / Fraction(scale).limit_denominator(SIZE_DIVISIBLE)
    multiple = exact.numerator if exact.numerator <= MAX_MULTIPLE else max(1, round(exact))
    if tile_size is None:
        tile_size = max(round(TILE_SIZE / scale), multiple)
    if overlap is None:
        overlap = min(round(OVERLAP / scale), tile_size // multiple // 2 * multiple)
    return plan_tiles(size, tile_size=tile_size, overlap=overlap, multiple=multiple)


def image_scale_of(model: nn.Module) -> float:
    """Return the network pixels per image pixel of a model, 1 if it does not say."""
    return float(getattr(getattr(model, "transform", None), "image_scale", 1.0))

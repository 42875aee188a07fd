"""Masks of one image as box-sized crops, and maps of ids drawn from them."""

import io
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import tifffile

from cellseg.coco import Rle
from cellseg.files import write_atomically
from cellseg.overlap import MaskLine, box_neighbours


def box_masks(masks: MaskLine) -> Iterator[np.ndarray]:
    """Yield each mask as a bool array [h, w] of its tight box; the cost is that of the boxes.

    An empty mask gives an array without pixels.
    """
    boxes = masks.boxes
    owner = np.repeat(np.arange(len(boxes)), np.diff(masks.offsets))
    left, top = boxes[owner, 0], boxes[owner, 1]
    box_height = boxes[owner, 3] - top

    def place(position: np.ndarray) -> np.ndarray:
        # A run that wraps round the foot of a column has a box as high as the image.
        column, row = np.divmod(position - owner * masks.pixels, masks.height)
        return (column - left) * box_height + row - top

    starts, stops = place(masks.starts).tolist(), (place(masks.ends - 1) + 1).tolist()
    offsets = masks.offsets.tolist()
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        crop = np.zeros((x2 - x1) * (y2 - y1), dtype=bool)
        for run in range(offsets[number], offsets[number + 1]):
            crop[starts[run] : stops[run]] = True
        yield crop.reshape(x2 - x1, y2 - y1).T


def paint_masks(masks: MaskLine, ids: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Return a map of ids; where masks overlap, the first of them keeps the pixel.

    Args:
        masks: N masks.
        ids: N numbers > 0, below 2**32.
        size: (height, width) of the image.

    Returns:
        uint16 [H, W], uint32 if an id needs it; 0 where there is no mask.
    """
    highest = max(ids, default=0)
    painted = np.zeros(size, np.uint16 if highest < 2**16 else np.uint32)
    crops = list(box_masks(masks))
    for number in reversed(range(len(crops))):
        x1, y1, x2, y2 = masks.boxes[number]
        painted[y1:y2, x1:x2][crops[number]] = ids[number]
    return painted


def draw_pages(rles: Sequence[Rle]) -> list[np.ndarray]:
    """Return the masks of one image as pages of a map, none over another on its page.

    Mask k gets the id k + 1, and lies on the first page where it is free of those before it.

    Args:
        rles: N >= 1 masks, none of them empty.

    Returns:
        uint16 or uint32 arrays [H, W], all of one type; one unless masks overlap.
    """
    masks = MaskLine.from_rles(rles)
    pages = _choose_pages(masks)
    size = tuple(rles[0]["size"])
    kind = np.uint16 if len(rles) < 2**16 else np.uint32
    drawn = [np.zeros(size, kind) for _ in range(max(pages) + 1)]
    for number, crop in enumerate(box_masks(masks)):
        x1, y1, x2, y2 = masks.boxes[number]
        drawn[pages[number]][y1:y2, x1:x2][crop] = number + 1
    return drawn


def _choose_pages(masks: MaskLine) -> list[int]:
    """Return the page of each mask; costs what the pairs of overlapping boxes cost."""
    first, second = box_neighbours(masks.boxes)
    overlap = masks.ious(first, second) > 0
    before: dict[int, list[int]] = {}
    for i, j in zip(first[overlap].tolist(), second[overlap].tolist(), strict=True):
        before.setdefault(j, []).append(i)
    pages = [0] * len(masks.boxes)
    for number in sorted(before):
        taken = {pages[other] for other in before[number]}
        pages[number] = next(page for page in count() if page not in taken)
    return pages


def write_map(path: Path, pages: Sequence[np.ndarray]) -> None:
    """Write maps of ids [H, W] as the pages of one TIFF file, the same bytes every time."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tiff:
        for page in pages:
            tiff.write(page, photometric="minisblack", compression="zlib", metadata=None)
    write_atomically(path, file.getvalue())

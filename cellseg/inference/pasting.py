"""RoI-sized mask probabilities -> RLE in the image, through box-sized crops only.

No full frame is made: a mask costs the pixels of its box, and what leaves is runs. Masks are
worked through in groups of similar size, so that memory is bounded whatever their number.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cellseg.coco import Rle, runs_to_rles

PASTES = ("aligned", "torchvision")
GROUP_PIXELS = 4_000_000  # pixels of crops worked on at once: 16 MB of float32
SIZE_STEP = 8  # crops whose sides differ by less share a group


def masks_to_rles(
    masks: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    mask_threshold: float = 0.5,
    paste: str = "aligned",
) -> list[Rle]:
    """Return the RLE of each predicted mask.

    Args:
        masks: float [N, 1, M, M], probabilities 0-1 on the RoI's grid.
        boxes: float [N, 4], xyxy in image pixels, half-open, sub-pixel.
        size: (height, width) of the image.
        mask_threshold: a pixel belongs to the cell if its probability is greater.
        paste: "aligned" samples the mask at each pixel's centre, at the box's sub-pixel place
            (Detectron2's `paste_masks_in_image`); "torchvision" resizes it to the box rounded to
            whole pixels, byte for byte as torchvision's `paste_masks_in_image` does.

    Returns:
        list of N RLEs; a mask without a pixel over the threshold comes out empty.
    """
    if paste not in PASTES:
        raise ValueError(f"paste={paste!r}; there are {', '.join(PASTES)}")
    if len(masks) == 0:
        return []
    masks, boxes = masks[:, 0].float(), boxes.float()
    if paste == "torchvision":
        masks, corners, sides = _torchvision_frames(masks, boxes)
    else:
        corners, sides = _aligned_frames(boxes, masks.shape[-1], size)
    parts = []
    for chosen in _groups(sides, exact=paste == "torchvision"):
        if paste == "torchvision":
            crops = _resized(masks[chosen], sides[chosen][0])
        else:
            crops = _sampled(masks[chosen], boxes[chosen], corners[chosen], sides[chosen])
        inside = (crops > mask_threshold).cpu().numpy()
        parts.append(_crop_runs(inside, chosen, corners[chosen], size))
    owner, start, end = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(owner, kind="stable")
    return runs_to_rles(owner[order], start[order], end[order], len(masks), size)


def _groups(sides: np.ndarray, *, exact: bool) -> Iterator[np.ndarray]:
    """Yield indices of crops to work on together, of equal or similar (height, width)."""
    step = 1 if exact else SIZE_STEP
    keys = -(-sides // step)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    changes = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    for group in np.split(order, changes):
        pixels = int(sides[group].max(axis=0).prod())
        at_once = max(1, GROUP_PIXELS // max(pixels, 1))
        for first in range(0, len(group), at_once):
            yield np.sort(group[first : first + at_once])


def _aligned_frames(
    boxes: Tensor, mask_side: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return first pixels (y, x) and sides (h, w) of the crops, int64 [N, 2], within the image.

    A crop holds every pixel whose centre lies within half a mask cell of the box: farther out
    the interpolated probability is 0.
    """
    edges = boxes.cpu().double().numpy()[:, [1, 0, 3, 2]]
    margin = (edges[:, 2:] - edges[:, :2]) / mask_side / 2
    limit = np.array(size)
    first = np.clip(np.ceil(edges[:, :2] - margin - 0.5), 0, limit).astype(np.int64)
    last = np.clip(np.floor(edges[:, 2:] + margin - 0.5) + 1, 0, limit).astype(np.int64)
    return first, np.maximum(last - first, 0)


def _sampled(masks: Tensor, boxes: Tensor, corners: np.ndarray, sides: np.ndarray) -> Tensor:
    """Return crops [K, h, w] of a group: bilinear samples of the masks at pixel centres.

    Bilinear interpolation of a separable grid is a matrix for the rows and one for the columns;
    outside the mask it falls to 0 over half a mask cell, as `grid_sample` pads with zeros.
    """
    side = masks.shape[-1]
    first = torch.from_numpy(corners).to(boxes)
    height, width = sides.max(axis=0).tolist()
    own = torch.from_numpy(sides).to(boxes)
    rows = _hat_weights(boxes[:, 1], boxes[:, 3], first[:, 0], own[:, 0], height, side)
    columns = _hat_weights(boxes[:, 0], boxes[:, 2], first[:, 1], own[:, 1], width, side)
    with torch.autocast(masks.device.type, enabled=False):
        return rows @ masks @ columns.transpose(1, 2)


def _hat_weights(
    low: Tensor, high: Tensor, first: Tensor, own: Tensor, pixels: int, side: int
) -> Tensor:
    """Return the sampling matrix [K, pixels, M] of one axis; 0 past each crop's own length."""
    steps = torch.arange(pixels, device=low.device, dtype=low.dtype)
    centre = first[:, None] + steps + 0.5
    position = (centre - low[:, None]) / (high - low).clamp(min=1e-6)[:, None] * side - 0.5
    cells = torch.arange(side, device=low.device, dtype=low.dtype)
    weights = (1 - (position[..., None] - cells).abs()).clamp_(min=0)
    return weights * (steps < own[:, None])[..., None]


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
    return F.pad(masks, (1,) * 4), first.flip(1).cpu().numpy(), sides.flip(1).cpu().numpy()


def _resized(masks: Tensor, side: np.ndarray) -> Tensor:
    """Return the masks resized to (h, w), as torchvision resizes each of them."""
    size = [int(side[0]), int(side[1])]
    return F.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _crop_runs(
    inside: np.ndarray, owner: np.ndarray, corners: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (owner, start, end) of the runs of crops, in column-major order of the image.

    Args:
        inside: bool [K, h, w]; what lies outside the image is dropped here.
        owner: int64 [K], the mask that each crop shows.
        corners: int64 [K, 2], image row and column of each crop's first pixel.
        size: (height, width) of the image.
    """
    count, height, width = inside.shape
    y = corners[:, :1] + np.arange(height)
    x = corners[:, 1:] + np.arange(width)
    visible = ((y >= 0) & (y < size[0]))[:, :, None] & ((x >= 0) & (x < size[1]))[:, None, :]
    # One False after each column, so that no run crosses from one column to the next here.
    columns = np.zeros((count, width, height + 1), dtype=np.int8)
    columns[:, :, :height] = (inside & visible).transpose(0, 2, 1)
    edges = np.flatnonzero(np.diff(columns.reshape(-1), prepend=0))
    start, end = edges[::2], edges[1::2]
    crop, column = np.divmod(start // (height + 1), width)
    # From a place in the crops to a pixel of the image, run by run.
    shift = (
        (corners[crop, 1] + column) * size[0]
        + corners[crop, 0]
        - start // (height + 1) * (height + 1)
    )
    return owner[crop], start + shift, end + shift

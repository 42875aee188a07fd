"""Made inputs: cells of known number, predictions like a network's, samples on disk."""

from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellseg.data.runs import find_runs, measure_runs
from cellseg.data.tissue import make_tissue

CLASSES = 4
LARGEST_RADIUS = 20.0  # px


def cells_on_grid(count: int, side: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the map of ellipses, one in each of `count` cells of a square grid, boxes and labels.

    Args:
        count: number of ellipses; none touches another.
        side: of the map, px.
        seed: of sizes, places and labels.

    Returns:
        instance_map int32 [1, side, side], boxes float32 [count, 4] xyxy, labels int64 [count].
    """
    rng = np.random.default_rng(seed)
    across = int(np.ceil(np.sqrt(count)))
    pitch = side / across
    slots = np.sort(rng.permutation(across**2)[:count])
    radii = np.minimum(rng.uniform(0.3, 0.45, (count, 2)) * pitch, LARGEST_RADIUS)
    room = pitch / 2 - radii - 1
    centres = np.stack(np.divmod(slots, across), axis=1) * pitch + pitch / 2
    centres += rng.uniform(-1, 1, (count, 2)) * np.maximum(room, 0)
    cells = np.zeros((1, side, side), dtype=np.int32)
    for number, (centre, radius) in enumerate(zip(centres, radii, strict=True), start=1):
        top, left = np.maximum((centre - radius).astype(int) - 1, 0)
        bottom, right = (centre + radius).astype(int) + 2
        window = cells[0, top:bottom, left:right]
        y, x = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
        inside = ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
        window[inside] = number
    runs = find_runs(cells)
    boxes, _ = measure_runs(runs, runs.values - 1, count, cells.shape[1:])
    labels = torch.from_numpy(rng.integers(1, CLASSES + 1, count))
    return torch.from_numpy(cells), torch.from_numpy(boxes), labels


def jittered_boxes(boxes: Tensor, count: int, *, shift: float = 0.08, seed: int = 0) -> Tensor:
    """Return `count` boxes [count, 4], each near one of the given ones: an RoI of its cell.

    Args:
        boxes: float [N, 4], xyxy.
        count: number of boxes; they take the given ones in turn.
        shift: largest move of an edge, in sides of the box.
        seed: of the moves.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = boxes[torch.arange(count) % len(boxes)]
    sides = (chosen[:, 2:] - chosen[:, :2]).repeat(1, 2)
    return chosen + shift * sides * (2 * torch.rand(count, 4, generator=generator) - 1)


def predicted_masks(count: int, side: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return masks [count, 1, 28, 28] of blobs, 0-1, and boxes [count, 4] of 16 to 40 px a side."""
    generator = torch.Generator().manual_seed(seed)
    sides = 16 + 24 * torch.rand(count, 2, generator=generator)
    corners = (side - sides) * torch.rand(count, 2, generator=generator)
    axis = torch.linspace(-1, 1, 28)
    far = axis.square()[:, None] + axis.square()[None, :]
    waves = F.interpolate(
        torch.randn(count, 1, 5, 5, generator=generator), size=(28, 28), mode="bicubic"
    )
    masks = (6 * (0.8 - far) + waves).sigmoid()
    return masks, torch.cat([corners, corners + sides], dim=1)


def leave_boxes(model: nn.Module) -> None:
    """Let a model of random weights leave boxes where its anchors are, changed in place.

    Random weights move boxes anywhere; unmoved ones are as many as in a trained model.
    """
    for layer in (model.rpn.head.bbox_pred, model.roi_heads.box_predictor.bbox_pred):
        nn.init.zeros_(layer.weight)


def write_sample(
    folder: Path,
    image: np.ndarray,
    maps: dict[int, np.ndarray],
    *,
    compression: str | None = "lzw",
) -> None:
    """Write a sample as releases store it: an RGBA image and raw float64 maps.

    Args:
        folder: the sample's folder.
        image: uint8 [H, W, 3].
        maps: for each class its map [H, W].
        compression: of the image, "lzw" (with predictor) or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rgba = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    options = {"compression": compression, "predictor": True} if compression else {}
    tifffile.imwrite(
        folder / "image.tif",
        rgba,
        photometric="rgb",
        extrasamples=["unspecified"],
        metadata=None,
        **options,
    )
    for label, ids in maps.items():
        tifffile.imwrite(folder / f"class{label}.tif", ids.astype(np.float64), metadata=None)


def write_tissue(train_dir: Path, images: int, side: int, cells: int) -> None:
    """Write samples of made tissue, `side` px square, with about so many cells each."""
    for number in range(images):
        image, maps = make_tissue(side, side, density=cells / side**2, seed=number)
        write_sample(train_dir / f"sample{number:02d}", image, maps)

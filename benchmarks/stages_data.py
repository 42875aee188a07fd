"""Reading and augmenting a dense sample: the usual way and ours, on the same made input.

The reference reads as tutorials do, with one full-frame comparison a cell, and augments a stack
of masks through torchvision's transforms. The rows `read_raw_codec` and `read_lzw_codec` hold
reading against the codec alone.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from skimage import io
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from benchmarks.made import write_sample
from benchmarks.stage import Stage
from cellseg.data.reading import read_sample
from cellseg.data.tissue import make_tissue
from cellseg.data.transforms import TrainTransform

SIDE = 1000
DENSITY = 450 / SIDE**2
MIN_VISIBLE = 0.25

Folder = tempfile.TemporaryDirectory
Read = tuple[np.ndarray, np.ndarray, np.ndarray, Any]


def make_sample(compression: str | None) -> Folder:
    """Return a folder, gone when it is dropped, with one sample of 450 cells as releases store it.

    Args:
        compression: of the image, "lzw" (with predictor) or None; the maps are raw float64.
    """
    folder = tempfile.TemporaryDirectory()
    image, maps = make_tissue(SIDE, SIDE, density=DENSITY, seed=1)
    write_sample(Path(folder.name), image, maps, compression=compression)
    return folder


def read_by_comparisons(folder: Folder) -> Read:
    """Return image, boxes, labels and masks, each cell compared with the whole frame."""
    image = io.imread(Path(folder.name, "image.tif"))[..., :3]
    boxes, labels, masks = [], [], []
    for label in range(1, 5):
        path = Path(folder.name, f"class{label}.tif")
        if not path.exists():
            continue
        ids = io.imread(path)
        for cell_id in np.unique(ids):
            if cell_id == 0:
                continue
            mask = ids == cell_id
            y, x = np.where(mask)
            boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
            labels.append(label)
            masks.append(mask)
    return image, np.array(boxes, np.float32), np.array(labels), masks


def read_ours(folder: Folder) -> Read:
    """Return image, boxes, labels and instance map through `read_sample`."""
    image, target = read_sample(folder.name)
    return image, target["boxes"], target["labels"], target["instance_map"]


def read_codec(folder: Folder) -> list[np.ndarray]:
    """Return all files of the sample as the codec gives them, the image first."""
    paths = [Path(folder.name, "image.tif"), *sorted(Path(folder.name).glob("class*.tif"))]
    return [tifffile.imread(path) for path in paths]


def same_sample(reference: Read, ours: Read) -> bool:
    """Return whether image, boxes, labels and every cell's pixels are identical."""
    if not all(map(np.array_equal, reference[:3], ours[:3])):
        return False
    cells = ours[3]
    drawn = sum(int(mask.sum()) for mask in reference[3])
    return drawn == np.count_nonzero(cells) and all(
        (cells[:, mask] == k).any(axis=0).all() for k, mask in enumerate(reference[3], 1)
    )


def same_image(codec: list[np.ndarray], ours: Read) -> bool:
    """Return whether our image is the codec's."""
    return np.array_equal(codec[0][..., :3], ours[0])


def make_augmented() -> tuple[torch.Tensor, dict[str, Any], torch.Tensor, TrainTransform]:
    """Return image, target, the target's stack of masks, and the transform without colour."""
    with make_sample(None) as name:
        pixels, arrays = read_sample(name)
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    target = {key: torch.from_numpy(value) for key, value in arrays.items()}
    cells = torch.arange(1, len(target["labels"]) + 1)
    stack = target["instance_map"][0] == cells[:, None, None]
    return image, target, stack, TrainTransform(color=0, min_visible=MIN_VISIBLE)


def augment_stack(data: tuple) -> list[torch.Tensor]:
    """Return image, boxes, labels and masks, the stack of masks cut, scaled and turned."""
    image, target, stack, transform = data
    placement = transform.draw_placement(image.shape[-2:], torch.Generator().manual_seed(0))
    window, size = placement.window, list(placement.size)
    image = F.resized_crop(image, *window, size, InterpolationMode.BILINEAR, antialias=True)
    masks = F.resized_crop(stack.byte(), *window, size, InterpolationMode.NEAREST_EXACT)
    angle = 90.0 * (placement.turn % 4)
    image, masks = F.rotate(image, angle, expand=True), F.rotate(masks, angle, expand=True)
    if placement.turn >= 4:
        image, masks = F.horizontal_flip(image), F.horizontal_flip(masks)
    areas, full_areas = masks.sum((1, 2)), stack.sum((1, 2)) * placement.scale**2
    keep = (areas > 0) & (areas >= MIN_VISIBLE * full_areas)
    boxes = masks_to_boxes(masks[keep]) + torch.tensor([0, 0, 1, 1])
    return [image, boxes, target["labels"][keep], masks[keep]]


def augment_ours(data: tuple) -> list[torch.Tensor]:
    """Return image, boxes, labels and instance map through `TrainTransform`."""
    image, target, _, transform = data
    image, target = transform(image, target, torch.Generator().manual_seed(0))
    return [image, target["boxes"], target["labels"], target["instance_map"]]


def same_instances(reference: list[torch.Tensor], ours: list[torch.Tensor]) -> bool:
    """Return whether image, boxes, labels and every cell's pixels are identical."""
    cells = torch.arange(1, len(ours[2]) + 1)
    stack = ours[3][0] == cells[:, None, None]
    return all(map(torch.equal, reference, [*ours[:3], stack.byte()]))


STAGES = (
    Stage("read_raw", 100, lambda: make_sample(None), read_by_comparisons, read_ours, same_sample),
    Stage("read_lzw", 40, lambda: make_sample("lzw"), read_by_comparisons, read_ours, same_sample),
    Stage("read_raw_codec", 0.5, lambda: make_sample(None), read_codec, read_ours, same_image),
    Stage("read_lzw_codec", 0.5, lambda: make_sample("lzw"), read_codec, read_ours, same_image),
    Stage("augment", 20, make_augmented, augment_stack, augment_ours, same_instances),
)

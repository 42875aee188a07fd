"""Models, targets and annotated folders small enough to train within a test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_files import plain_image, write_sample

from cellseg.data import CellDataset
from cellseg.models import get_model_mobilenetv2

# On tensors this small a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)

CLASSES = ("dark", "light")
COLORS = {1: (70, 40, 120), 2: (150, 90, 160)}
Square = tuple[int, int, int, int, int]  # label, x1, y1, x2, y2


def tiny_model(num_classes: int = 3, **options: Any) -> torch.nn.Module:
    """Return a narrow Mask R-CNN with MobileNetV2."""
    narrow = {"weights": None, "fpn_channels": 16, "head_width": 32, "train_proposals": 50}
    return get_model_mobilenetv2(num_classes, **narrow | options)


def make_target(height: int, width: int, squares: Sequence[Square], image_id: int = 1) -> dict:
    """Return the target of squares, drawn in order: a later one covers an earlier one."""
    instance_map = torch.zeros((1, height, width), dtype=torch.int32)
    for number, (_, x1, y1, x2, y2) in enumerate(squares, start=1):
        instance_map[0, y1:y2, x1:x2] = number
    return {
        "boxes": torch.tensor([square[1:] for square in squares]).reshape(-1, 4).float(),
        "labels": torch.tensor([square[0] for square in squares], dtype=torch.int64),
        "instance_map": instance_map,
        "image_id": image_id,
    }


def make_image(height: int, width: int, squares: Sequence[Square] = ()) -> torch.Tensor:
    """Return a uint8 image [3, H, W] of squares in their class's colour."""
    pixels = plain_image(height, width, (230, 200, 215))
    for label, x1, y1, x2, y2 in squares:
        pixels[y1:y2, x1:x2] = COLORS[label]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def write_squares(
    train_dir: Path, samples: dict[str, tuple[int, int, Sequence[Square]]]
) -> CellDataset:
    """Write a folder for each sample (height, width, squares) and return them as a dataset."""
    for name, (height, width, squares) in samples.items():
        image = make_image(height, width, squares).numpy().transpose(1, 2, 0)
        maps = {label: np.zeros((height, width)) for label in {square[0] for square in squares}}
        for number, (label, x1, y1, x2, y2) in enumerate(squares, start=1):
            maps[label][y1:y2, x1:x2] = number
        write_sample(train_dir / name, image, maps)
    return CellDataset(train_dir, class_names=CLASSES, channel_order="true")

"""Tiny sample folders on disk, for the tests of the data room."""

from collections.abc import Mapping
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile


def write_sample(folder: Path, image: np.ndarray, maps: Mapping[int, np.ndarray] = {}) -> Path:
    """Write a folder as the release stores it: LZW image with predictor, float64 maps."""
    folder.mkdir(parents=True)
    options = {"photometric": "rgb"} if image.ndim == 3 else {}
    tifffile.imwrite(
        folder / "image.tif", image, compression="lzw", predictor=True, metadata=None, **options
    )
    for label, ids in maps.items():
        tifffile.imwrite(folder / f"class{label}.tif", np.asarray(ids, np.float64), metadata=None)
    return folder


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """Write a PNG file of 8 or 16 bit."""
    path.write_bytes(imagecodecs.png_encode(pixels))
    return path


def plain_image(height: int, width: int, color: tuple[int, ...] = (200, 150, 180)) -> np.ndarray:
    """Return a uint8 image [H, W, len(color)] of one colour."""
    return np.broadcast_to(np.uint8(color), (height, width, len(color))).copy()


def stained_sample(
    folder: Path, *, nuclei=(90, 60, 140), around=(220, 170, 200), label: int = 1
) -> Path:
    """Write an image of 12 x 20 with one square nucleus of 6 x 6 of the given colours."""
    image, ids = plain_image(12, 20, around), np.zeros((12, 20))
    image[3:9, 5:11], ids[3:9, 5:11] = nuclei, 7
    return write_sample(folder, image, {label: ids})

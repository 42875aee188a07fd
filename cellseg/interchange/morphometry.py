"""Shape and colour of each cell, measured by scikit-image on the cell's own box."""

import csv
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from skimage.measure import regionprops

from cellseg.data.reading import read_image
from cellseg.errors import DataError, SettingsError
from cellseg.files import open_atomically
from cellseg.interchange.masks import box_masks
from cellseg.interchange.pictures import Cell, Picture
from cellseg.overlap import MaskLine

# column without its unit -> power of a pixel's side
_SIZES = {
    "centroid_x": 1,
    "centroid_y": 1,
    "area": 2,
    "perimeter": 1,
    "equivalent_diameter": 1,
    "major_axis": 1,
    "minor_axis": 1,
}
_RATIOS = ("eccentricity", "solidity")
_COLOURS = ("mean_red", "mean_green", "mean_blue")


def morphometry_columns(*, micrometres: bool) -> list[str]:
    """Return the columns of the table; lengths end in _px or _um, areas in _px2 or _um2."""
    columns = ["image_id", "image", "cell", "class_id", "class", "score"]
    for unit in ("px", "um") if micrometres else ("px",):
        columns += [f"{name}_{unit}{'2' if power == 2 else ''}" for name, power in _SIZES.items()]
    return [*columns, *_RATIOS, *_COLOURS]


def write_morphometry(
    path: str | Path,
    pictures: Sequence[Picture],
    cells: Sequence[Sequence[Cell]],
    class_names: Sequence[str],
    *,
    pixel_size: float | None = None,
) -> None:
    """Write a table (CSV) of one row a cell; see `measure_cells` for what is measured.

    Args:
        path: the .csv file; appears whole or not at all.
        pictures: P images; each is read once.
        cells: P lists, see `cells_by_picture`. A cell's number counts from 1 in its image.
        class_names: C names, that of category 1 first.
        pixel_size: side of a pixel in micrometres; adds columns in micrometres.

    Raises:
        SettingsError: if the pixel size is no number > 0.
        DataError: if an image cannot be read, or is not of its picture's size.
    """
    if pixel_size is not None and not (math.isfinite(pixel_size) and pixel_size > 0):
        raise SettingsError(f"pixel_size is {pixel_size}; it is a pixel's side in micrometres, > 0")
    columns = morphometry_columns(micrometres=pixel_size is not None)
    with open_atomically(path, "w") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for picture, found in zip(pictures, cells, strict=True):
            if not found:
                continue
            rows = measure_cells(_read(picture), found, pixel_size=pixel_size)
            for number, (cell, row) in enumerate(zip(found, rows, strict=True), start=1):
                label = cell["category_id"]
                about = {"image_id": picture.image_id, "image": picture.name, "cell": number}
                about |= {"class_id": label, "class": class_names[label - 1]}
                shown = {name: f"{value:.6g}" for name, value in row.items()}
                table.writerow({**about, "score": cell.get("score", ""), **shown})


def _read(picture: Picture) -> np.ndarray:
    """Return the pixels of a picture, uint8 [H, W, 3], RGB."""
    image = read_image(picture.path, swapped=picture.swapped)
    if image.shape[:2] != picture.size:
        raise DataError(
            f"{picture.path} has {image.shape[0]} x {image.shape[1]} pixels, its cells were found "
            f"in {picture.size[0]} x {picture.size[1]} (height x width); give the same images"
        )
    return image


def measure_cells(
    image: np.ndarray, cells: Sequence[Cell], *, pixel_size: float | None = None
) -> Iterator[dict[str, float]]:
    """Yield the measurements of each cell, by the names of `morphometry_columns`.

    They are scikit-image's `regionprops` of the same names, whose documentation defines them;
    all pieces of a cell are measured as one. The centroid lies in the coordinates of boxes and
    outlines, in which the first pixel covers 0 to 1: half a pixel more than scikit-image's. Means
    of colours are those of the stored 8-bit values. Costs the cells' boxes.

    Args:
        image: uint8 [H, W, 3], RGB.
        cells: records or annotations of this image, none of them empty.
        pixel_size: side of a pixel in micrometres; None leaves micrometres out.
    """
    masks = MaskLine.from_rles([cell["segmentation"] for cell in cells])
    for crop, box in zip(box_masks(masks), masks.boxes.tolist(), strict=True):
        x1, y1, x2, y2 = box
        row = _measure(crop, image[y1:y2, x1:x2])
        row["centroid_x"] += x1 + 0.5
        row["centroid_y"] += y1 + 0.5
        units = {"px": 1.0} if pixel_size is None else {"px": 1.0, "um": pixel_size}
        sizes = {
            f"{name}_{unit}{'2' if power == 2 else ''}": row[name] * side**power
            for unit, side in units.items()
            for name, power in _SIZES.items()
        }
        yield sizes | {name: row[name] for name in (*_RATIOS, *_COLOURS)}


def _measure(mask: np.ndarray, image: np.ndarray) -> dict[str, Any]:
    """Return the measurements of one cell in pixels, the centroid within its box."""
    region = regionprops(mask.astype(np.uint8), intensity_image=image)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cell of one row of pixels has no convex hull to warn of
        solidity = region.solidity
    return {
        "centroid_x": region.centroid[1],
        "centroid_y": region.centroid[0],
        "area": region.area,
        "perimeter": region.perimeter,
        "equivalent_diameter": region.equivalent_diameter_area,
        "major_axis": region.axis_major_length,
        "minor_axis": region.axis_minor_length,
        "eccentricity": region.eccentricity,
        "solidity": solidity,
        **dict(zip(_COLOURS, region.intensity_mean, strict=True)),
    }

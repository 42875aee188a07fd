"""Cells for other tools: COCO JSON, label TIFFs, GeoJSON for QuPath."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellseg.coco import xyxy_to_xywh
from cellseg.errors import SettingsError
from cellseg.files import open_atomically
from cellseg.interchange.masks import box_masks, paint_masks, write_map
from cellseg.interchange.pictures import Cell, Picture
from cellseg.interchange.rings import mask_to_polygons
from cellseg.overlap import MaskLine

OBJECT_TYPES = ("detection", "annotation")
# Okabe and Ito's colours, which are told apart with any colour vision.
COLOURS = (
    (240, 228, 66), (86, 180, 233), (0, 158, 115), (213, 94, 0),
    (204, 121, 167), (0, 114, 178), (230, 159, 0), (0, 0, 0),
)  # fmt: skip


def write_coco(
    path: str | Path,
    pictures: Sequence[Picture],
    cells: Sequence[Sequence[Cell]],
    class_names: Sequence[str],
) -> None:
    """Write images, cells and classes as one COCO file; a record's score stays beside it.

    Args:
        path: the .json file; appears whole or not at all.
        pictures: P images.
        cells: P lists, see `cells_by_picture`.
        class_names: C names, that of category 1 first.
    """
    images = [
        {
            "id": picture.image_id,
            "file_name": picture.file_name,
            "height": picture.size[0],
            "width": picture.size[1],
        }
        for picture in pictures
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(class_names, start=1)]
    number = 0
    with open_atomically(path, "w") as file:
        file.write(f'{{"info": {{}},\n"images": {json.dumps(images)},\n')
        file.write(f'"categories": {json.dumps(categories)},\n"annotations": [')
        for found in cells:
            for annotation in _annotations(found):
                file.write(",\n" if number else "\n")
                number += 1
                file.write(json.dumps({"id": number, **annotation}))
        file.write("\n]}\n")


def _annotations(cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Yield the cells of one image as COCO annotations without their id."""
    masks = MaskLine.from_rles([cell["segmentation"] for cell in cells])
    boxes = xyxy_to_xywh(masks.boxes).tolist()
    for cell, area, box in zip(cells, masks.areas.tolist(), boxes, strict=True):
        keys = ("image_id", "category_id", "score", "segmentation")
        yield {key: cell[key] for key in keys if key in cell} | {
            "area": area,
            "bbox": box,
            "iscrowd": 0,
        }


def write_labels(
    folder: str | Path,
    pictures: Sequence[Picture],
    cells: Sequence[Sequence[Cell]],
    class_names: Sequence[str],
    *,
    by_class: bool = False,
) -> None:
    """Write label maps, uint16 TIFFs (uint32 above 65,535 cells), and `labels.csv` beside them.

    Where cells overlap the better score keeps the pixel, in the truth the first. The table has
    one row a cell; a cell that others cover wholly has 0 visible pixels.

    Args:
        folder: `<name>.tif` goes there, or with `by_class` `<name>/class1.tif`, ... of the classes
            that occur.
        pictures: P images.
        cells: P lists, see `cells_by_picture`.
        class_names: C names, that of category 1 first.
        by_class: one map a class, in which cells of other classes cover nothing.
    """
    folder = Path(folder)
    with open_atomically(folder / "labels.csv", "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "image_id", "id", "class_id", "class", "score", "visible_px2"])
        for picture, found in zip(pictures, cells, strict=True):
            for name, chosen in _maps_of(picture, found, by_class):
                masks = MaskLine.from_rles([cell["segmentation"] for cell in chosen])
                painted = paint_masks(masks, range(1, len(chosen) + 1), picture.size)
                write_map(folder / name, [painted])
                visible = np.bincount(painted.reshape(-1), minlength=len(chosen) + 1)[1:].tolist()
                for number, (cell, area) in enumerate(zip(chosen, visible, strict=True), start=1):
                    label, score = cell["category_id"], cell.get("score", "")
                    row = [name, picture.image_id, number, label, class_names[label - 1]]
                    table.writerow([*row, score, area])


def _maps_of(
    picture: Picture, cells: Sequence[Cell], by_class: bool
) -> Iterator[tuple[str, list[Cell]]]:
    """Yield name and cells of each map of an image."""
    if not by_class:
        yield f"{picture.name}.tif", list(cells)
        return
    for label in sorted({cell["category_id"] for cell in cells}):
        chosen = [cell for cell in cells if cell["category_id"] == label]
        yield f"{picture.name}/class{label}.tif", chosen


def write_geojson(
    folder: str | Path,
    pictures: Sequence[Picture],
    cells: Sequence[Sequence[Cell]],
    class_names: Sequence[str],
    *,
    object_type: str = "detection",
) -> None:
    """Write one GeoJSON file an image, as QuPath (0.4 or later) imports and exports objects.

    A file is a FeatureCollection of one Feature a cell. Coordinates are pixels of the image from
    its top left corner, along pixel edges, so that an outline encloses exactly the cell's pixels;
    see `mask_to_polygons`. Form: `objectType`, `classification` (name and colour) and
    `measurements` (the score) as QuPath's `PathObjectTypeAdapters` reads and writes them.

    Args:
        folder: `<name>.geojson` goes there.
        pictures: P images.
        cells: P lists, see `cells_by_picture`.
        class_names: C names, that of category 1 first.
        object_type: "detection", or "annotation", which can be edited in QuPath.

    Raises:
        SettingsError: if `object_type` is neither.
    """
    if object_type not in OBJECT_TYPES:
        raise SettingsError(f"object_type is {object_type!r}; use {' or '.join(OBJECT_TYPES)}")
    for picture, found in zip(pictures, cells, strict=True):
        with open_atomically(Path(folder) / f"{picture.name}.geojson", "w") as file:
            file.write('{"type": "FeatureCollection", "features": [')
            for number, feature in enumerate(_features(found, class_names, object_type)):
                file.write(",\n" if number else "\n")
                file.write(json.dumps(feature, separators=(",", ":")))
            file.write("\n]}\n")


def _features(
    cells: Sequence[Cell], class_names: Sequence[str], object_type: str
) -> Iterator[dict[str, Any]]:
    """Yield the cells of one image as GeoJSON features."""
    masks = MaskLine.from_rles([cell["segmentation"] for cell in cells])
    corners = masks.boxes[:, :2].tolist()
    for cell, crop, corner in zip(cells, box_masks(masks), corners, strict=True):
        polygons = mask_to_polygons(crop, tuple(corner))
        single = len(polygons) == 1
        label = cell["category_id"]
        properties: dict[str, Any] = {
            "objectType": object_type,
            "classification": {
                "name": class_names[label - 1],
                "color": COLOURS[(label - 1) % len(COLOURS)],
            },
        }
        if "score" in cell:
            properties["measurements"] = {"Score": cell["score"]}
        geometry = {
            "type": "Polygon" if single else "MultiPolygon",
            "coordinates": polygons[0] if single else polygons,
        }
        yield {"type": "Feature", "geometry": geometry, "properties": properties}

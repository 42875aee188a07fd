"""COCO annotation files of any tool: checked, and their masks as RLE.

The format is COCO's (https://cocodataset.org/#format-data): `images` (id, file_name, perhaps
height and width), `categories` (id, name) and `annotations` (image_id, category_id, iscrowd,
segmentation). A segmentation is a list of polygons, which pycocotools turns into pixels here as
everywhere, or an RLE with its counts as text or as a list.
"""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from cellseg.coco import MAX_NUMBER, Rle
from cellseg.errors import DataError
from cellseg.files import read_json
from cellseg.rle import decode_counts, encode_counts

MAX_OUTLINE = 1_000_000
"""Longest outline of one cell in pixels; its cost in memory is about 100 bytes a pixel."""


@dataclass(frozen=True)
class CocoImage:
    """One image of a COCO file.

    Attributes:
        image_id: its number.
        file_name: as in the file, perhaps with folders.
        size: (height, width), None where the file does not say.
        annotations: the annotations of this image, in the file's order.
    """

    image_id: int
    file_name: str
    size: tuple[int, int] | None
    annotations: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class CocoFile:
    """A COCO file of which everything but the segmentations is checked.

    Attributes:
        path: the file.
        images: in the file's order.
        class_names: names of the categories in the order of their ids.
        labels: category id -> label 1..C, ids in ascending order.
    """

    path: Path
    images: list[CocoImage]
    class_names: tuple[str, ...]
    labels: dict[int, int]


def read_coco(path: str | Path) -> CocoFile:
    """Return a COCO file, checked; the masks are not looked at yet.

    Raises:
        DataError: naming the file, the image, category or annotation, the value and the remedy.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}, not an object with images, annotations and "
            "categories; is it a COCO annotation file?"
        )
    rows = {key: _rows(path, content, key) for key in ("images", "categories", "annotations")}
    if not rows["images"] or not rows["categories"]:
        raise DataError(f"{path} lists no images or no categories; there is nothing to take")
    categories = _by_id(path, "category", "name", rows["categories"])
    names = [categories[number]["name"] for number in sorted(categories)]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: two categories are called {name!r}; give each its own name")
    images = {
        number: CocoImage(number, row["file_name"], _image_size(path, row))
        for number, row in _by_id(path, "image", "file_name", rows["images"]).items()
    }
    seen: set[int] = set()
    for position, row in enumerate(rows["annotations"]):
        _check_annotation(path, position, row, images, categories, seen)
        images[row["image_id"]].annotations.append(row)
    labels = {number: label for label, number in enumerate(sorted(categories), start=1)}
    return CocoFile(path, list(images.values()), tuple(names), labels)


def _rows(path: Path, content: dict, key: str) -> list[dict]:
    """Return one of the lists of a COCO file."""
    rows = content.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path} has no list of objects called {key!r}; is it a COCO annotation file?"
        )
    return rows


def _by_id(path: Path, kind: str, text: str, rows: Sequence[dict]) -> dict[int, dict]:
    """Return rows by their id, which must differ, with something written under the key `text`."""
    found: dict[int, dict] = {}
    for position, row in enumerate(rows):
        number = row.get("id")
        if type(number) is not int or abs(number) >= MAX_NUMBER:
            raise DataError(f"{path}: {kind} {position} has id {number!r}; ids are whole numbers")
        if number in found:
            raise DataError(f"{path}: two of {kind} have the id {number}; give each its own")
        if not isinstance(row.get(text), str) or not row[text]:
            raise DataError(f"{path}: {kind} {number} has {text} {row.get(text)!r}; write a text")
        found[number] = row
    return found


def _image_size(path: Path, row: dict) -> tuple[int, int] | None:
    """Return (height, width) of an image's row, None if it tells neither."""
    size = row.get("height"), row.get("width")
    if size == (None, None):
        return None
    if not all(type(side) is int and side > 0 for side in size):
        raise DataError(
            f"{path}: image {row['id']} has height {size[0]!r} and width {size[1]!r}; both are "
            "whole numbers of pixels, or left out"
        )
    return size


def _check_annotation(
    path: Path, position: int, row: dict, images: dict, categories: dict, seen: set[int]
) -> None:
    """Raise unless an annotation's id is new and its image and category are in the file."""
    number = row.get("id", position)
    name = f"{path}: annotation {number!r}"
    if type(number) is not int or number in seen:
        raise DataError(f"{name}: the id is used twice or no whole number; number them anew")
    seen.add(number)
    row["id"] = number
    for key, known in (("image_id", images), ("category_id", categories)):
        value = row.get(key)
        if type(value) is not int or value not in known:
            raise DataError(f"{name} has {key} {value!r}, which the file does not list; correct it")
    if row.get("iscrowd", 0) not in (0, 1):
        raise DataError(f"{name} has iscrowd {row['iscrowd']!r}; it is 0 or 1")


def annotation_to_rle(path: Path, annotation: dict[str, Any], size: tuple[int, int]) -> Rle:
    """Return the mask of an annotation, whatever form its segmentation has.

    Several polygons are one mask, their union; a polygon's pixels are those that pycocotools
    gives it.

    Args:
        path: of the COCO file, for errors.
        annotation: as `read_coco` returns it.
        size: (height, width) of the image.

    Raises:
        DataError: if the segmentation is of no known form or does not fit the image.
    """
    segmentation = annotation.get("segmentation")
    try:
        if isinstance(segmentation, list) and segmentation:
            return _polygons_to_rle(segmentation, size)
        if isinstance(segmentation, dict):
            return _checked_rle(segmentation, size)
        raise ValueError(f"has no mask: segmentation is {_shown(segmentation)}")
    except ValueError as fault:
        raise DataError(
            f"{path}: annotation {annotation['id']} (image {annotation['image_id']}) {fault}; "
            "correct the annotation or remove it"
        ) from None


def _polygons_to_rle(polygons: list, size: tuple[int, int]) -> Rle:
    """Return the union of polygons [x, y, x, y, ...]; ValueError says what is wrong."""
    height, width = size
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"has the polygon {_shown(polygon)}: three points or more are needed")
        for place, value in enumerate(polygon):
            side = height if place % 2 else width
            if type(value) not in (int, float) or not -side <= value <= 2 * side:
                raise ValueError(
                    f"has the coordinate {_shown(value)}, far outside its image of {height} x "
                    f"{width} pixels (height x width)"
                )
    length = sum(
        float(np.abs(np.diff(polygon[axis::2], append=polygon[axis])).sum())
        for polygon in polygons
        for axis in (0, 1)
    )
    if length > MAX_OUTLINE:
        raise ValueError(f"has an outline of {length:.0f} pixels, more than {MAX_OUTLINE:,}")
    rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _checked_rle(segmentation: dict, size: tuple[int, int]) -> Rle:
    """Return an RLE of either kind with its counts as text; ValueError says what is wrong."""
    counts, stated = segmentation.get("counts"), segmentation.get("size")
    if stated != list(size):
        raise ValueError(f"has a mask of size {_shown(stated)}, but its image is {list(size)}")
    if isinstance(counts, list):
        if not all(type(count) is int and 0 <= count <= math.prod(size) for count in counts):
            raise ValueError("has run lengths that are no pixel counts of the image")
        runs = np.array(counts, dtype=np.int64)
        counts = encode_counts(runs, np.array([0, len(runs)]))[0]
    elif isinstance(counts, str):
        runs = decode_counts([counts])[0]
    else:
        raise ValueError(f"has the counts {_shown(counts)}, neither text nor a list")
    if runs.min(initial=0) < 0 or runs.sum() != math.prod(size):
        raise ValueError(
            f"has runs that cover {runs.sum()} pixels, not {size[0]} x {size[1]} (height x width)"
        )
    return {"size": list(size), "counts": counts}


def _shown(value: Any) -> str:
    """Return a value as it may stand in a message."""
    return reprlib.repr(value)

"""Result files as other tools write them, brought into the form that records have here.

Mended is what has one meaning only: run lengths as a list (SAM's and COCO's uncompressed form), or
as bytes that a JSON encoder turned into text ("b'...'") or into character codes; numbers as text
(`json.dumps(default=str)` of NumPy's) and ids as whole floats (pandas); no box, or one of corners.
Whatever else is wrong stays as it is, for `check_records` to name.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellseg.coco import MAX_NUMBER, MAX_PIXELS, Record, rle_to_xywh, xywh_to_xyxy
from cellseg.rle import encode_counts

CODES = range(48, 112)  # characters of COCO's run-length text
FITS = 0.5  # least IoU of a box with its mask's
LISTS, BYTES, NUMBERS = "run lengths as lists", "run lengths as bytes", "numbers as text or floats"
NO_BOX = "no box: made from the mask"
CORNERS = "boxes as corners x1, y1, x2, y2: made anew from the masks"
NO_FIT = "boxes that do not fit their masks: made anew"


def mend_forms(content: Any) -> list[str]:
    """Bring masks and numbers into our form, in place; a missing box becomes an empty one.

    Args:
        content: what a JSON file holds, whatever that is.

    Returns:
        a note for each kind of mending, with the number of records.
    """
    mended: Counter[str] = Counter()
    lists: list[dict] = []
    for record in content if isinstance(content, list) else ():
        if not isinstance(record, dict):
            continue
        if _mend_numbers(record):
            mended[NUMBERS] += 1
        rle = record.get("segmentation")
        if isinstance(rle, dict):
            _mend_counts(rle, mended, lists)
        if record.get("bbox") is None:
            record["bbox"] = [0, 0, 0, 0]
            mended[NO_BOX] += 1
    counts = [rle["counts"] for rle in lists]
    offsets = np.concatenate([[0], np.cumsum([len(runs) for runs in counts], dtype=np.int64)])
    flat = np.array([length for runs in counts for length in runs], dtype=np.int64)
    for rle, text in zip(lists, encode_counts(flat, offsets), strict=True):
        rle["counts"] = text
    return _notes(mended, len(content) if isinstance(content, list) else 0)


def _mend_numbers(record: Record) -> bool:
    """Turn numbers in text, and ids that are whole floats, into numbers; tell if there were any."""
    changed = False
    for key, kind in (("image_id", int), ("category_id", int), ("score", float)):
        value = record.get(key)
        if isinstance(value, str) or (kind is int and isinstance(value, float)):
            try:
                number = kind(value)
            except (ValueError, OverflowError):
                continue
            if isinstance(value, str) or number == value:
                record[key], changed = number, True
    return changed


def _mend_counts(rle: dict, mended: Counter[str], lists: list[dict]) -> None:
    """Turn bytes in any guise into text; put lists of run lengths aside, to be written together."""
    counts = rle.get("counts")
    if isinstance(counts, str) and counts[:2] == "b'" and counts[-1] == "'":
        rle["counts"] = counts[2:-1].replace("\\\\", "\\")
        mended[BYTES] += 1
    elif isinstance(counts, list) and all(
        type(length) is int and 0 <= length < MAX_PIXELS for length in counts
    ):
        if all(code in CODES for code in counts) and not _fill(counts, rle.get("size")):
            rle["counts"] = bytes(counts).decode("ascii")
            mended[BYTES] += 1
        else:
            lists.append(rle)
            mended[LISTS] += 1


def _fill(counts: Sequence[int], size: Any) -> bool:
    """Tell whether run lengths fill a mask of this size."""
    if not isinstance(size, list) or len(size) != 2 or not all(type(s) is int for s in size):
        return False
    return sum(counts) == size[0] * size[1]


def compare_boxes(records: Sequence[Record]) -> list[str]:
    """Return a note if most boxes of a file are corners, or fit their masks in neither form.

    The convention belongs to the file, so most of its boxes decide; near the image's corner both
    forms are alike. Records of an ensemble get their mask's tight box in any case.

    Args:
        records: without faults.
    """
    boxes = np.array([record["bbox"] for record in records], dtype=float).reshape(-1, 4)
    tight = xywh_to_xyxy(rle_to_xywh([record["segmentation"] for record in records]))
    given = (boxes[:, 2:] > 0).all(axis=1) & (tight[:, 2] > 0)
    boxes, tight = boxes[given], tight[given]
    as_xywh, as_corners = _box_ious(xywh_to_xyxy(boxes), tight), _box_ious(boxes, tight)
    corners = (as_corners > as_xywh) & (as_corners >= FITS)
    others = np.maximum(as_corners, as_xywh) < FITS
    found: Counter[str] = Counter()
    if corners.sum() > (~corners & ~others & (as_xywh > as_corners)).sum():
        found[CORNERS] = int(corners.sum())
    if 2 * others.sum() > len(boxes):
        found[NO_FIT] = int(others.sum())
    return _notes(found, len(records))


def _box_ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes [N, 4] xyxy with those in the same rows, 0 where one is reversed."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = np.maximum(sides, 0).prod(axis=1)
    areas = [np.maximum(box[:, 2:] - box[:, :2], 0).prod(axis=1) for box in (a, b)]
    return shared / np.maximum(areas[0] + areas[1] - shared, 1 / MAX_NUMBER)


def _notes(mended: Counter[str], number: int) -> list[str]:
    """Return kinds of mending in words, in a fixed order."""
    return [
        f"{kind} ({'all' if count == number else f'{count:,} of {number:,}'})"
        for kind, count in sorted(mended.items())
    ]

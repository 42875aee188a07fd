"""The COCO boundary: masks to RLE and back, and result records in and out, checked.

Inside the package boxes are xyxy, half-open, in pixels, and instances are numbers in a map. A
record, the form in which detections leave, is a plain dict::

    {"image_id": 3, "category_id": 1, "score": 0.91, "bbox": [x, y, w, h],
     "segmentation": {"size": [height, width], "counts": "..."}}

Run-length encoding follows COCO: runs in column-major order, the first run is background.
"""

import json
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from cellseg.errors import RecordsError
from cellseg.files import open_atomically
from cellseg.markdown import first_lines
from cellseg.rle import decode_counts, encode_counts, index_within

Record = dict[str, Any]
Rle = dict[str, Any]

MAX_PIXELS = 2**31  # of one mask; run lengths beyond it overflow the codec's 32-bit counts
MAX_NUMBER = 2**53  # of ids and coordinates; whole numbers beyond it are not exact in JSON
FAULTS_SHOWN = 10
LONGEST = 100  # characters of a value in a message
_CUT = reprlib.Repr()
_CUT.maxstring = _CUT.maxother = _CUT.maxlong = LONGEST


def xyxy_to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Return boxes [N, 4] as (x, y, width, height) from half-open (x1, y1, x2, y2)."""
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def xywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """Return boxes [N, 4] as half-open (x1, y1, x2, y2) from (x, y, width, height)."""
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def mask_to_rle(mask: np.ndarray) -> Rle:
    """Return the RLE of one mask [H, W] (bool, or integers where non-zero is the object)."""
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def rle_to_mask(rle: Rle) -> np.ndarray:
    """Return the bool mask [H, W] of one RLE."""
    return mask_utils.decode(rle).astype(bool)


def rle_area(rles: Sequence[Rle]) -> np.ndarray:
    """Return the number of pixels of each RLE, int64 [N]."""
    # pycocotools 2.0.11 cannot do it for more than 255 masks at once.
    counts, offsets = decode_counts([rle["counts"] for rle in rles])
    place = index_within(np.diff(offsets))
    sums = np.concatenate([[0], np.cumsum(np.where(place % 2 == 1, counts, 0))])
    return sums[offsets[1:]] - sums[offsets[:-1]]


def rle_to_xywh(rles: Sequence[Rle]) -> np.ndarray:
    """Return the tight boxes (x, y, width, height) of RLEs, float64 [N, 4]; empty masks give 0."""
    if not rles:
        return np.zeros((0, 4))
    return np.asarray(mask_utils.toBbox(list(rles)), dtype=float).reshape(-1, 4)


def runs_to_rles(
    owner: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    num_masks: int,
    size: tuple[int, int],
) -> list[Rle]:
    """Return one RLE per mask from foreground runs; the cost is the number of runs.

    Args:
        owner: int [R], index of the mask that each run belongs to, ascending.
        start: int [R], first pixel of the run in column-major order, ascending within a mask.
        end: int [R], one past its last pixel.
        num_masks: number of masks; one without runs comes out empty.
        size: (height, width) of the image.

    Returns:
        list of `num_masks` RLEs.
    """
    begins = np.ones(len(start), dtype=bool)  # runs that touch are one
    begins[1:] = (owner[1:] != owner[:-1]) | (start[1:] != end[:-1])
    owner, start, end = owner[begins], start[begins], end[np.append(begins, True)[1:]]
    runs = np.bincount(owner, minlength=num_masks)
    place = index_within(runs)
    before = start - np.where(place > 0, np.roll(end, 1), 0)
    last_end = np.zeros(num_masks, dtype=np.int64)
    last_end[owner] = end  # the last one of each mask stays
    rest = size[0] * size[1] - last_end
    # A last background run of no pixels is not written, unless the mask has no other.
    closes = (rest > 0) | (runs == 0)
    offsets = np.concatenate([[0], np.cumsum(2 * runs + closes)])
    counts = np.empty(offsets[-1], dtype=np.int64)
    first = offsets[owner] + 2 * place
    counts[first], counts[first + 1] = before, end - start
    counts[offsets[1:][closes] - 1] = rest[closes]
    strings = encode_counts(counts, offsets)
    return [{"size": [int(size[0]), int(size[1])], "counts": string} for string in strings]


def move_rles(rles: Sequence[Rle], offset: tuple[int, int], size: tuple[int, int]) -> list[Rle]:
    """Return masks of a window as masks of the image that it lies in; the cost is their runs.

    Args:
        rles: N masks of one window, {size, counts}.
        offset: (x, y) of the window in the image; it lies wholly inside.
        size: (height, width) of the image.
    """
    if not rles:
        return []
    height = rles[0]["size"][0]
    counts, offsets = decode_counts([rle["counts"] for rle in rles])
    owner = np.repeat(np.arange(len(rles)), np.diff(offsets))
    place = index_within(np.diff(offsets))
    end = np.cumsum(counts)
    end -= np.concatenate([[0], end])[offsets[:-1]][owner]  # within its own mask
    object_run = (place % 2 == 1) & (counts > 0)
    owner, start, end = owner[object_run], (end - counts)[object_run], end[object_run]
    # A run may go on from the foot of a column to the head of the next: one part for each column.
    first, last = start // height, (end - 1) // height
    parts = last - first + 1
    part = np.repeat(np.arange(len(parts)), parts)
    column = first[part] + index_within(parts)
    top = np.maximum(start[part], column * height) - column * height
    bottom = np.minimum(end[part], (column + 1) * height) - column * height
    base = (column + offset[0]) * size[0] + offset[1]
    return runs_to_rles(owner[part], base + top, base + bottom, len(rles), size)


def instance_map_to_rles(instance_map: np.ndarray, num_instances: int) -> list[Rle]:
    """Return one RLE per instance of a map; the cost is the number of pixels.

    Args:
        instance_map: integers [L, H, W] (or [H, W]); the value k + 1 marks instance k.
        num_instances: number of instances; one without pixels comes out empty.

    Returns:
        list of `num_instances` RLEs.
    """
    layers = np.asarray(instance_map)
    layers = layers[None] if layers.ndim == 2 else layers
    height, width = layers.shape[1:]
    runs = [_layer_runs(layer) for layer in layers]
    owner, start, end = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    order = np.lexsort((start, owner))
    return runs_to_rles(owner[order], start[order], end[order], num_instances, (height, width))


def _layer_runs(layer: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (instance, start, end) of the foreground runs of one layer in column-major order."""
    values = np.ascontiguousarray(layer.T).reshape(-1)
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    start = np.concatenate([[0], changes])
    end = np.concatenate([changes, [len(values)]])
    value = values[start]
    inside = value > 0
    return value[inside].astype(np.int64) - 1, start[inside], end[inside]


def make_record(image_id: int, category_id: int, score: float, rle: Rle) -> Record:
    """Return the result record of one detection; `bbox` is the tight box of its mask."""
    return make_records(image_id, [category_id], [score], [rle])[0]


def make_records(
    image_id: int, category_ids: Iterable[int], scores: Iterable[float], rles: Sequence[Rle]
) -> list[Record]:
    """Return the result records of one image's detections, in the order given."""
    boxes = rle_to_xywh(rles).tolist()
    return [
        {
            "image_id": int(image_id),
            "category_id": int(category_id),
            "score": float(score),
            "bbox": box,
            "segmentation": rle,
        }
        for category_id, score, box, rle in zip(category_ids, scores, boxes, rles, strict=True)
    ]


def record_order(record: Record) -> tuple:
    """Return the sort key of records: image, best score first, class, mask."""
    rle = record["segmentation"]
    return (record["image_id"], -record["score"], record["category_id"], rle["counts"])


def sort_records(records: Iterable[Record]) -> list[Record]:
    """Return records in the order in which files hold them; equal content, equal order."""
    return sorted(records, key=record_order)


def group_by_image(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Return the records of each image, in the order given."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["image_id"], []).append(record)
    return groups


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records, sorted, as one JSON list; the file appears whole or not at all."""
    with open_atomically(path, "w") as file:
        file.write("[")
        for position, record in enumerate(sort_records(records)):
            file.write(",\n" if position else "\n")
            file.write(json.dumps(record, separators=(",", ":"), allow_nan=False))
        file.write("\n]\n")


def read_records(
    path: str | Path,
    *,
    image_ids: Collection[int] | None = None,
    category_ids: Collection[int] | None = None,
    image_sizes: Mapping[int, tuple[int, int]] | None = None,
) -> list[Record]:
    """Return the records of a result file after checking each of them.

    Args:
        path: a JSON file that holds a list of records.
        image_ids: the ids that may occur; None allows any.
        category_ids: the classes that may occur; None allows any.
        image_sizes: image_id -> (height, width) that masks must have; None checks nothing.

    Raises:
        RecordsError: if the file is missing, no JSON list, or holds a faulty record; the message
            lists the first ten faults, the error's `faults` all of them.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RecordsError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, endless digits
        reason = str(error).splitlines()[0]
        raise RecordsError(
            f"{path} is not a JSON result file ({reason}); write it anew, or leave it out", [reason]
        ) from None
    faults = check_records(
        records, image_ids=image_ids, category_ids=category_ids, image_sizes=image_sizes
    )
    if faults:
        shown = "\n  ".join(first_lines(faults, FAULTS_SHOWN))
        raise RecordsError(
            f"{path} has {len(faults)} fault{'s' * (len(faults) > 1)}; correct these records, or "
            "write the file anew:\n"
            f"  {shown}",
            faults,
        )
    return records


def check_records(
    records: Any,
    *,
    image_ids: Collection[int] | None = None,
    category_ids: Collection[int] | None = None,
    image_sizes: Mapping[int, tuple[int, int]] | None = None,
) -> list[str]:
    """Return one line for each fault of a list of records, empty if all can be used.

    The masks are checked by their runs (their sum must be height x width); none is decoded to
    pixels, so that a hostile size costs nothing. For the arguments see `read_records`.
    """
    if not isinstance(records, list):
        return [f"the file holds a {type(records).__name__}, not a list of records"]
    allowed_images = None if image_ids is None else set(image_ids)
    allowed_classes = None if category_ids is None else set(category_ids)
    faults: list[str | None] = [
        _record_fault(record, allowed_images, allowed_classes, image_sizes) for record in records
    ]
    whole = [index for index, fault in enumerate(faults) if fault is None]
    for index, fault in zip(
        whole, _run_faults([records[index]["segmentation"] for index in whole]), strict=True
    ):
        faults[index] = fault
    return [f"record {index}: {fault}" for index, fault in enumerate(faults) if fault is not None]


def _record_fault(
    record: Any,
    image_ids: set[int] | None,
    category_ids: set[int] | None,
    image_sizes: Mapping[int, tuple[int, int]] | None,
) -> str | None:
    """Return what is wrong with one record, its mask's runs apart."""
    if not isinstance(record, dict):
        return f"is a {type(record).__name__}, not an object"
    missing = [key for key in ("image_id", "category_id", "score") if key not in record]
    if missing:
        return f"has no {', '.join(missing)}"
    image_id, category_id, score = record["image_id"], record["category_id"], record["score"]
    if (
        type(image_id) is not int
        or abs(image_id) >= MAX_NUMBER
        or (image_ids is not None and image_id not in image_ids)
    ):
        return f"unknown image_id {_short(image_id)}"
    if (
        type(category_id) is not int
        or abs(category_id) >= MAX_NUMBER
        or (category_ids is not None and category_id not in category_ids)
    ):
        return f"unknown category_id {_short(category_id)}"
    if type(score) not in (int, float) or not 0 <= score <= 1:  # NaN is neither
        return f"score is {_short(score)}, not a number from 0 to 1"
    return _box_fault(record.get("bbox")) or _segmentation_fault(
        record.get("segmentation"), (image_sizes or {}).get(image_id)
    )


def _short(value: Any) -> str:
    """Return a value as it may stand in a message: cut where it is long, or nested deeply."""
    text = _CUT.repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _box_fault(box: Any) -> str | None:
    """Return what is wrong with a bbox, the form of which is [x, y, width, height]."""
    if not isinstance(box, list) or len(box) != 4:
        return f"bbox is {_short(box)}, not [x, y, width, height]"
    if not all(type(side) in (int, float) and abs(side) < MAX_NUMBER for side in box):
        return f"bbox is {_short(box)}, not four finite numbers"
    return None


def _segmentation_fault(rle: Any, image_size: tuple[int, int] | None) -> str | None:
    """Return what is wrong with the form of an RLE, its runs apart."""
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str):
        return "segmentation is not an RLE {size, counts} with counts as text"
    size = rle.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(s) is int for s in size):
        return f"segmentation size is {_short(size)}, not [height, width]"
    if min(size) < 1 or size[0] * size[1] >= MAX_PIXELS:
        return f"segmentation size {_short(size)} is out of range"
    if image_size is not None and tuple(size) != tuple(image_size):
        return f"segmentation size {size} differs from the image's {list(image_size)}"
    return None


def _run_faults(rles: Sequence[Rle]) -> list[str | None]:
    """Return for each RLE what is wrong with its runs, or None."""
    counts, offsets = decode_counts([rle["counts"] for rle in rles])
    sums = np.concatenate([[0], np.cumsum(counts)])
    covered = sums[offsets[1:]] - sums[offsets[:-1]]
    negative = np.concatenate([[0], np.cumsum(counts < 0)])
    invalid = negative[offsets[1:]] > negative[offsets[:-1]]
    faults: list[str | None] = []
    for rle, pixels, bad in zip(rles, covered.tolist(), invalid.tolist(), strict=True):
        height, width = rle["size"]
        if bad:
            faults.append("segmentation counts are not COCO run lengths")
        elif pixels != height * width:
            faults.append(f"segmentation counts cover {pixels} pixels, not {height} x {width}")
        else:
            faults.append(None)
    return faults

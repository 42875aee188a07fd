"""Which record overlaps which cell of the truth, and by how much: what every score starts from.

Only masks whose boxes overlap are compared, so that time and memory follow the records and their
neighbours.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter

import numpy as np

from cellseg.coco import Record
from cellseg.overlap import MaskLine, box_neighbours

BATCH = 1000  # masks that are compared at once, and one image's more
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def find_pairs(
    records: Sequence[Record],
    image: np.ndarray,
    cells: Sequence[dict],
    cell_image: np.ndarray,
    *,
    iou_threshold: float,
    same_class: bool,
) -> Pairs:
    """Return the pairs of a record and a cell of one image whose mask IoU reaches a threshold.

    Args:
        records: N result records.
        image: int64 [N], a number for the image of each record.
        cells: T annotations.
        cell_image: int64 [T], the same of the cells.
        iou_threshold: in 0-1; pairs with IoU >= this are returned, if their boxes overlap.
        same_class: leave out pairs of two classes.

    Returns:
        record, cell: int64 [P], positions in `records` and `cells`, in no particular order.
        iou: float64 [P].
    """
    group_of = itemgetter("image_id", "category_id") if same_class else itemgetter("image_id")
    parts = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))]
    for i, j in _batches(image, cells, cell_image):
        some_records, some_cells = [records[k] for k in i.tolist()], [cells[k] for k in j.tolist()]
        ids = np.array([group_of(entry) for entry in [*some_records, *some_cells]])
        groups = np.unique(ids, axis=0, return_inverse=True)[1].reshape(-1)
        record, cell, iou = pair_masks(
            some_records, some_cells, iou_threshold=iou_threshold, groups=groups
        )
        parts.append((i[record], j[cell], iou))
    record, cell, iou = (np.concatenate(part) for part in zip(*parts, strict=True))
    return record, cell, iou


def pair_masks(
    records: Sequence[Record],
    cells: Sequence[dict],
    *,
    iou_threshold: float,
    groups: np.ndarray | None = None,
) -> Pairs:
    """Return the pairs of a record and a cell, all of one size, whose mask IoU is high enough.

    Args:
        records: N result records.
        cells: T annotations.
        iou_threshold: in 0-1; pairs with IoU >= this are returned, if their boxes overlap.
        groups: int64 [N + T], those of the records first; only entries of one group are paired.
            None means one group.

    Returns:
        as `find_pairs`.

    Raises:
        ValueError: if the masks are of different size, or a mask's runs do not fill its size.
    """
    masks = MaskLine.from_rles([entry["segmentation"] for entry in [*records, *cells]])
    first, second = box_neighbours(masks.boxes, groups)
    mixed = (first < len(records)) & (second >= len(records))
    first, second = first[mixed], second[mixed]
    possible = masks.iou_limits(first, second) >= iou_threshold
    first, second = first[possible], second[possible]
    iou = masks.ious(first, second)
    enough = iou >= iou_threshold
    return first[enough], second[enough] - len(records), iou[enough]


def take_cells(record: np.ndarray, cell: np.ndarray, iou: np.ndarray, number: int) -> np.ndarray:
    """Let records in turn take the free cell of the highest IoU, as COCO does (ties: the last).

    Args:
        record: int64 [P], the record of each pair; the lower the number, the sooner its turn.
        cell: int64 [P], a cell that it may take.
        iou: float64 [P].
        number: of records.

    Returns:
        int64 [number], the cell of each record, -1 without one.
    """
    taken_by = np.full(number, -1)
    order = np.lexsort((-cell, -iou, record))
    gone: set[int] = set()
    for k, c in zip(record[order].tolist(), cell[order].tolist(), strict=True):
        if taken_by[k] < 0 and c not in gone:
            taken_by[k] = c
            gone.add(c)
    return taken_by


def positions_of(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Return for each id the positions where it stands, ascending."""
    order = np.argsort(ids, kind="stable")
    names, starts = np.unique(ids[order], return_index=True)
    spans = pairwise([*starts.tolist(), len(order)])
    return {
        name: order[start:end] for name, (start, end) in zip(names.tolist(), spans, strict=True)
    }


def _batches(
    image: np.ndarray, cells: Sequence[dict], cell_image: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (records, cells) of some images of one size, whose masks fit onto one line."""
    of_image, of_cell_image = positions_of(image), positions_of(cell_image)
    batches: dict[tuple, list[int]] = {}
    held: Counter = Counter()
    for row in of_image.keys() & of_cell_image.keys():
        size = tuple(cells[of_cell_image[row][0]]["segmentation"]["size"])
        batches.setdefault((size, held[size] // BATCH), []).append(row)
        held[size] += len(of_image[row]) + len(of_cell_image[row])
    for rows in batches.values():
        yield tuple(np.concatenate([of[row] for row in rows]) for of in (of_image, of_cell_image))

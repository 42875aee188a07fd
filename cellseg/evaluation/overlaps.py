"""What each record found at a mask IoU of 0.5, and what else it overlaps, whatever the classes.

AP asks whether a record found a cell of its class; to explain a score one must also know which
cell a false record is near. Only masks whose boxes overlap are compared, so that time and memory
follow the records and their neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellseg.coco import Record
from cellseg.evaluation.matches import Matches, average_precision, match_records
from cellseg.evaluation.pairs import find_pairs, take_cells
from cellseg.evaluation.scores import Truth, check_fit

FOUND_IOU = 0.5  # t_f of TIDE
NEAR_IOU = 0.1  # t_b of TIDE: a record with less is on no cell


@dataclass(frozen=True)
class Overlaps:
    """D records in the order given, and the T cells of the truth (annotations that are no crowd).

    Attributes:
        category_ids: int64 [C], ascending.
        cells: the T annotations.
        cell_label: int64 [T], their category ids.
        image, label, score: of the records, [D]; image ids and category ids.
        found: int64 [D], the cell that the record found as AP50 counts it, -1 if none.
        ignored: bool [D], it found none and lies in a crowd, so that it does not count.
        own, own_iou: int64, float64 [D], the cell of its class that it overlaps most; -1 and 0
            where no IoU is >= 0.1. Of equal ones the first.
        other, other_iou: the same among the cells of other classes.
    """

    category_ids: np.ndarray
    cells: Sequence[dict]
    cell_label: np.ndarray
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    found: np.ndarray
    ignored: np.ndarray
    own: np.ndarray
    own_iou: np.ndarray
    other: np.ndarray
    other_iou: np.ndarray

    @property
    def false(self) -> np.ndarray:
        """Records that found no cell and count, bool [D]."""
        return (self.found < 0) & ~self.ignored

    @property
    def finder(self) -> np.ndarray:
        """The record that found each cell, int64 [T]; -1 if none did."""
        finder = np.full(len(self.cells), -1)
        hits = np.flatnonzero(self.found >= 0)
        finder[self.found[hits]] = hits
        return finder

    @property
    def truths(self) -> np.ndarray:
        """Cells of each class, int64 [C]."""
        places = np.searchsorted(self.category_ids, self.cell_label)
        return np.bincount(places, minlength=len(self.category_ids))


def find_overlaps(truth: Truth, records: Sequence[Record]) -> Overlaps:
    """Return what each record found and what it overlaps.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    check_fit(truth, records)
    cells = [entry for entry in truth["annotations"] if not entry.get("iscrowd")]
    label, image = (_column(records, key) for key in ("category_id", "image_id"))
    score = np.array([record["score"] for record in records], dtype=float)
    cell_label = _column(cells, "category_id")
    cell_image = _column(cells, "image_id")
    record, cell, iou = find_pairs(
        records, image, cells, cell_image, iou_threshold=NEAR_IOU, same_class=False
    )
    same = label[record] == cell_label[cell]
    own, own_iou = _most(record[same], cell[same], iou[same], len(records))
    other, other_iou = _most(record[~same], cell[~same], iou[~same], len(records))
    ranks = np.lexsort((image, -score, label))
    rank_of = np.argsort(ranks)
    enough = same & (iou >= FOUND_IOU)
    found = take_cells(rank_of[record[enough]], cell[enough], iou[enough], len(ranks))[rank_of]
    return Overlaps(
        category_ids=np.array(sorted(entry["id"] for entry in truth["categories"]), dtype=int),
        cells=cells,
        cell_label=cell_label,
        image=image,
        label=label,
        score=score,
        found=found,
        ignored=_ignored(truth, records, ranks),
        own=own,
        own_iou=own_iou,
        other=other,
        other_iou=other_iou,
    )


def grouped_ap50(
    group: np.ndarray,
    score: np.ndarray,
    image: np.ndarray,
    *,
    found: np.ndarray,
    ignored: np.ndarray,
    truths: np.ndarray,
) -> np.ndarray:
    """Return the AP50 of each group of records, float64 [G]; NaN where there is no cell to find.

    Args:
        group: int64 [D], 0 to G - 1: classes, or classes of one image.
        score: of the records, [D].
        image: of the records, [D]; ties rank by image, then as given.
        found: bool [D], the record found a cell.
        ignored: bool [D], it counts neither as found nor as false.
        truths: int64 [G], cells to find.
    """
    order = np.lexsort((image, -score, group))
    nothing = np.zeros(len(order), dtype=np.int64)
    matches = Matches(
        category_ids=np.arange(len(truths)),
        truths=truths[None],
        image=nothing,
        starts=np.searchsorted(group[order], np.arange(len(truths) + 1)),
        rank=nothing,
        found=found[None, order],
        ignored=ignored[None, order],
    )
    return average_precision(matches, ious=slice(0, 1))[:, 0]


def _column(entries: Sequence[dict], key: str) -> np.ndarray:
    """Return one whole number of each entry, int64 [N]."""
    return np.array([entry[key] for entry in entries], dtype=np.int64)


def _most(
    record: np.ndarray, cell: np.ndarray, iou: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cell of the highest IoU of each record, and that IoU; -1 and 0 without one."""
    best, best_iou = np.full(number, -1), np.zeros(number)
    order = np.lexsort((cell, -iou, record))
    named, first = np.unique(record[order], return_index=True)
    best[named], best_iou[named] = cell[order[first]], iou[order[first]]
    return best, best_iou


def _ignored(truth: Truth, records: Sequence[Record], ranks: np.ndarray) -> np.ndarray:
    """Return which records a crowd excuses, bool [D]."""
    ignored = np.zeros(len(records), dtype=bool)
    if any(entry.get("iscrowd") for entry in truth["annotations"]):
        ignored[ranks] = match_records(truth, records).ignored[0]
    return ignored

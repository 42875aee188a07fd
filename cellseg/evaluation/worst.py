"""The errors most worth looking at: the worst cells of each kind, and the worst images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellseg.coco import Record
from cellseg.errors import SettingsError
from cellseg.evaluation.analysis import (
    BACKGROUND,
    BOTH,
    CLASS,
    KINDS,
    error_kinds,
    missed_cells,
)
from cellseg.evaluation.overlaps import Overlaps, find_overlaps, grouped_ap50
from cellseg.evaluation.scores import Truth, mean_or_none


@dataclass(frozen=True)
class Pick:
    """An error to look at.

    Attributes:
        kind: one of `KINDS`.
        image_id: its image.
        record: the false record; None for a missed cell.
        cell: the annotation that the record should have found, or that was missed; None for
            background.
        iou: mask IoU of the two, 0 where there is one only.
        rival: the record that found the cell, if one did.
    """

    kind: str
    image_id: int
    record: Record | None
    cell: dict[str, Any] | None
    iou: float
    rival: Record | None


def worst_cells(
    truth: Truth, records: Sequence[Record], *, kind: str | None = None, count: int = 6
) -> list[Pick]:
    """Return the worst errors of a kind: the surest false records, the largest missed cells.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records.
        kind: one of `KINDS`; None returns those of every kind, in that order.
        count: at most so many of a kind. Ties: the first given.

    Raises:
        SettingsError: if the kind is unknown.
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    if kind is not None and kind not in KINDS:
        raise SettingsError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    seen = find_overlaps(truth, records)
    kinds = error_kinds(seen)
    areas = np.array([cell["area"] for cell in seen.cells], dtype=float)
    picks = []
    for number, name in enumerate(KINDS):
        if kind not in (None, name):
            continue
        if name == "missed":
            places = np.flatnonzero(missed_cells(seen, kinds))
            worst = places[np.argsort(-areas[places], kind="stable")][:count].tolist()
            picks += [_missed_pick(seen.cells[k]) for k in worst]
        else:
            places = np.flatnonzero(kinds == number)
            worst = places[np.argsort(-seen.score[places], kind="stable")][:count].tolist()
            picks += [_false_pick(seen, records, number, k) for k in worst]
    return picks


def worst_images(
    truth: Truth, records: Sequence[Record], *, count: int = 4
) -> list[tuple[int, float]]:
    """Return (image_id, AP50) of the images with the lowest AP50 of their own, worst first.

    An image's AP50 is the mean over the classes that occur in it. Images without cells are left
    out; ties keep the truth's order.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    seen = find_overlaps(truth, records)
    row_of = {image["id"]: row for row, image in enumerate(truth["images"])}
    row = np.array([row_of[k] for k in seen.image.tolist()], dtype=np.int64)
    cell_row = np.array([row_of[cell["image_id"]] for cell in seen.cells], dtype=np.int64)
    classes = len(seen.category_ids)
    group = row * classes + np.searchsorted(seen.category_ids, seen.label)
    asked = cell_row * classes + np.searchsorted(seen.category_ids, seen.cell_label)
    ap50 = grouped_ap50(
        group,
        seen.score,
        seen.image,
        found=seen.found >= 0,
        ignored=seen.ignored,
        truths=np.bincount(asked, minlength=len(row_of) * classes),
    ).reshape(len(row_of), classes)
    means = [(image_id, mean_or_none(ap50[k])) for image_id, k in row_of.items()]
    known = [(image_id, mean) for image_id, mean in means if mean is not None]
    return sorted(known, key=lambda item: item[1])[:count]


def _missed_pick(cell: dict) -> Pick:
    """Return a missed cell as something to look at."""
    return Pick("missed", cell["image_id"], None, cell, 0.0, None)


def _false_pick(seen: Overlaps, records: Sequence[Record], kind: int, k: int) -> Pick:
    """Return a false record with the cell that it should have found."""
    beside = kind in (CLASS, BOTH)
    cell, iou = (seen.other[k], seen.other_iou[k]) if beside else (seen.own[k], seen.own_iou[k])
    if kind == BACKGROUND:
        return Pick(KINDS[kind], records[k]["image_id"], records[k], None, 0.0, None)
    rival = seen.finder[cell]
    return Pick(
        kind=KINDS[kind],
        image_id=records[k]["image_id"],
        record=records[k],
        cell=seen.cells[cell],
        iou=float(iou),
        rival=records[rival] if rival >= 0 else None,
    )

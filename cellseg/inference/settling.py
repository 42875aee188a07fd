"""One record a cell: what counting, painting and exporting need, and AP does not.

A detector scores each class of a cell apart, and AP rewards it for handing in every class that
may be right. Whoever counts nuclei wants one record for each: its likeliest class, and the
probability that there is a cell at all.
"""

from collections.abc import Iterable

import numpy as np

from cellseg.coco import Record, group_by_image, record_order, sort_records
from cellseg.inference.merging import cluster_scores, find_owners


def settle_classes(records: Iterable[Record], *, iou_threshold: float = 0.5) -> list[Record]:
    """Return one record a cell, of its best class, scored by the sum over its classes.

    Records are taken best score first, whatever their class (ties as in `suppress`); each one
    kept stands for every later one whose mask IoU with it is > `iou_threshold`. The classes of a
    cell exclude one another, so that the probability of a cell is the sum of theirs: of each
    class the best score counts, and the sum is capped at 1.

    Args:
        records: of any number of images and classes; not changed.
        iou_threshold: in 0-1.

    Returns:
        list of new records, in `sort_records` order; it does not depend on the order given.
    """
    groups = group_by_image(records)
    return sort_records(
        record for image in groups.values() for record in _settle_image(image, iou_threshold)
    )


def _settle_image(records: list[Record], iou_threshold: float) -> list[Record]:
    """Return `settle_classes` for the records of one image."""
    records = sorted(records, key=record_order)
    alike = [record | {"category_id": 0} for record in records]
    owners = find_owners(alike, iou_threshold=iou_threshold)
    classes, label = np.unique([record["category_id"] for record in records], return_inverse=True)
    scores = [record["score"] for record in records]
    kept, _, best = cluster_scores(owners, label, scores, len(classes))
    sums = np.minimum(np.sort(best, axis=1).sum(axis=1), 1.0).tolist()
    return [records[k] | {"score": score} for k, score in zip(kept, sums, strict=True)]

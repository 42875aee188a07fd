"""Merge records that show the same cell: suppression, and scores rewarded by agreement.

The cost follows the runs of the masks and the pairs of overlapping boxes (`overlap`): at a
constant density of cells it grows with the number of records.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np

from cellseg.coco import Record, group_by_image, record_order, sort_records
from cellseg.overlap import MaskLine, box_neighbours

Combine = Callable[[np.ndarray, np.ndarray], list[float]]  # scores [cells, M], weights [M]


def suppress(records: Iterable[Record], *, iou_threshold: float) -> list[Record]:
    """Return the records without those that a better one of the same image and class covers.

    Records are taken best score first (ties: the smaller counts string first); each one kept
    removes every later one whose mask IoU with it is > `iou_threshold`. Touching cells have an
    IoU of about 0 and stay. The result does not depend on the order of the input.

    Args:
        records: records of any number of images and classes; not changed.
        iou_threshold: in 0-1.

    Returns:
        the kept records themselves, in `sort_records` order.
    """
    kept: list[Record] = []
    for _, image in sorted(group_by_image(records).items()):
        image.sort(key=record_order)
        owners = find_owners(image, iou_threshold=iou_threshold)
        kept += [record for index, record in enumerate(image) if owners[index] == index]
    return kept


def agreement(scores: np.ndarray, weight: np.ndarray) -> list[float]:
    """Return the weighted means of scores [cells, M], the same bits in any order of members.

    Args:
        scores: of each cell each member's best, in 0-1; 0 where it saw nothing.
        weight: float64 [M], > 0.
    """
    best = scores.max(axis=1, initial=0)
    # As a loss against the best score, equal scores give exactly that score back.
    losses = np.sort(np.ascontiguousarray((best[:, None] - scores) * weight), axis=1)
    return np.maximum(best - losses.sum(axis=1) / math.fsum(weight), 0).tolist()


def fuse(
    members: Sequence[Sequence[Record]],
    *,
    iou_threshold: float,
    weights: Sequence[float] | None = None,
    combine: Combine = agreement,
) -> list[Record]:
    """Return one record per cell, its score rewarded by the members that agree on it.

    The members' records are suppressed together; the records that a kept one removes are its
    cluster. The kept record's score becomes the weighted mean of the members' scores for the
    cell, sum(w_m * s_m) / sum(w_m), where s_m is member m's best score in the cluster and 0 if it
    saw nothing there: the mean over those that agree times their share of the weights. A cell
    that all members see with one score keeps that score. The mask is that of the best record.

    Args:
        members: the record lists of M models; not changed.
        iou_threshold: records of one class with mask IoU > this show the same cell, in 0-1.
        weights: M weights > 0; all 1 if None.
        combine: takes the members' scores and weights as `agreement` does, for another rule.

    Returns:
        list of new records, in `sort_records` order; it does not depend on the order of members
        or records.

    Raises:
        ValueError: if the weights are not M numbers > 0.
    """
    weight = np.ones(len(members)) if weights is None else np.asarray(weights, dtype=float)
    if weight.shape != (len(members),) or not (np.isfinite(weight) & (weight > 0)).all():
        raise ValueError(f"weights must be {len(members)} numbers > 0, got {weights}")
    members_of: dict[int, list[tuple[Record, int]]] = {}
    for member, records in enumerate(members):
        for record in records:
            members_of.setdefault(record["image_id"], []).append((record, member))
    fused = (
        _fuse_image(entries, weight, iou_threshold, combine) for entries in members_of.values()
    )
    return sort_records(chain.from_iterable(fused))


def _fuse_image(
    entries: list[tuple[Record, int]],
    weight: np.ndarray,
    iou_threshold: float,
    combine: Combine,
) -> list[Record]:
    """Return `fuse` for the (record, member) entries of one image."""
    entries.sort(key=lambda entry: record_order(entry[0]))
    records = [record for record, _ in entries]
    owners = find_owners(records, iou_threshold=iou_threshold)
    members, scores = [member for _, member in entries], [record["score"] for record in records]
    kept, _, best = cluster_scores(owners, members, scores, len(weight))
    fused = combine(best, weight)
    return [{**records[index], "score": score} for index, score in zip(kept, fused, strict=True)]


def cluster_scores(
    owners: np.ndarray, columns: Sequence[int], scores: Sequence[float], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what each of M members (or views, or classes) saw at best of each cell.

    Args:
        owners: int64 [N], of `find_owners`; records of one owner are one cell.
        columns: N numbers in 0..M-1, the member of each record.
        scores: N scores >= 0.
        count: M.

    Returns:
        kept: int64 [K], the owners, ascending.
        cell: int64 [N], the position of each record's owner in `kept`.
        best: float64 [K, M], the best score of each member in each cell, 0 if it saw nothing.
    """
    kept, cell = np.unique(owners, return_inverse=True)
    best = np.zeros((len(kept), count))
    np.maximum.at(best, (cell, columns), scores)
    return kept, cell, best


def find_owners(
    records: Sequence[Record], *, iou_threshold: float, sources: np.ndarray | None = None
) -> np.ndarray:
    """Return for each record of one image the one that stands for it after suppression.

    Args:
        records: the records of one image, best first (`record_order`).
        iou_threshold: in 0-1.
        sources: int [N]; records of one source do not cover each other. None: any may.

    Returns:
        int64 [N]: the record's own index if it is kept; else the index of the best record of its
        class that is kept and covers it.
    """
    masks = MaskLine.from_rles([record["segmentation"] for record in records])
    classes = np.array([record["category_id"] for record in records])
    first, second = box_neighbours(masks.boxes, classes)
    possible = masks.iou_limits(first, second) > iou_threshold
    if sources is not None:
        possible &= sources[first] != sources[second]
    return suppress_pairs(
        len(records),
        first[possible],
        second[possible],
        covers=lambda i, j: masks.ious(i, j) > iou_threshold,
    )


def suppress_pairs(
    number: int,
    better: np.ndarray,
    worse: np.ndarray,
    *,
    covers: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return for each record the one that stands for it after suppression, int64 [number].

    Args:
        number: of records, best first.
        better: int64 [P], the better record, of the lower number, of each pair that may overlap.
        worse: int64 [P], the other one.
        covers: takes some of the pairs and tells which overlap enough, bool; asked only of pairs
            whose better record is kept. None: all do.
    """
    owners = np.arange(number)
    undecided = np.ones(number, dtype=bool)
    while len(better):
        # Kept are those that wait for no better one; only their overlaps need be measured.
        waiting = np.zeros(number, dtype=bool)
        waiting[worse[undecided[worse]]] = True
        kept = undecided & ~waiting
        asked = kept[better]
        i, j = better[asked], worse[asked]
        if covers is not None:
            enough = covers(i, j)
            i, j = i[enough], j[enough]
        np.minimum.at(owners, j, i)
        undecided[kept] = False
        undecided[j] = False
        rest = undecided[better]
        better, worse = better[rest], worse[rest]
    return owners

"""Records matched with the truth as COCO does it, and average precision from the matches.

COCO's evaluation compares each record with each annotation of its image and class. A record can
only find a cell that its box overlaps, so here the pairs come from a grid and time and memory
follow the records and their neighbours. The matches are kept, so that the average precision of
any choice of images is a few sums away. Order of ranks, ties and recall levels are those of
pycocotools' `COCOeval`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_utils

from cellseg.coco import Record
from cellseg.evaluation.pairs import find_pairs

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Matches:
    """What D records found at ten IoUs, in I images with C classes.

    The records are ranked within their class: best score first, ties by image id, then in the
    order given. Classes follow one another in the order of their ids.

    Attributes:
        category_ids: int64 [C], ascending.
        truths: int64 [I, C], cells to find, images in the order of the truth's.
        image: int64 [D], row of the record's image in `truths`.
        starts: int64 [C + 1]; class k has the records starts[k] to before starts[k + 1].
        rank: int64 [D], place of the record among those of its image and class, from 0.
        found: bool [10, D], the record is the match of a cell at IOU_THRESHOLDS.
        ignored: bool [10, D], it found no cell and lies in a crowd, so it does not count.
    """

    category_ids: np.ndarray
    truths: np.ndarray
    image: np.ndarray
    starts: np.ndarray
    rank: np.ndarray
    found: np.ndarray
    ignored: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """N records and the cells that each may find, whatever their scores are.

    Attributes:
        category_ids, truths: as in `Matches`.
        image_id, image, label: int64 [N], the record's image, its row in `truths`, and the
            position of its class in `category_ids`.
        record, cell, iou: [P], the pairs of one image and class with IoU >= 0.5.
        cells: number of cells.
        crowd_share: float64 [N], the largest share of the record's area in a crowd of its class.
    """

    category_ids: np.ndarray
    truths: np.ndarray
    image_id: np.ndarray
    image: np.ndarray
    label: np.ndarray
    record: np.ndarray
    cell: np.ndarray
    iou: np.ndarray
    cells: int
    crowd_share: np.ndarray

    def match(self, chosen: np.ndarray, scores: np.ndarray) -> Matches:
        """Match some of the records with the cells of their image and class.

        At each IoU the records in the order of their rank take the free cell with the highest
        mask IoU, if that reaches the threshold; of equal cells the last one. A record without a
        cell is ignored if it lies in an annotation marked `iscrowd` by as much of its own area.

        Args:
            chosen: int64 [D], the records that take part.
            scores: float64 [D], theirs; of equal ones the first counts as better.
        """
        ranked = chosen[np.lexsort((self.image_id[chosen], -scores, self.label[chosen]))]
        place = np.full(len(self.image), -1)
        place[ranked] = np.arange(len(ranked))
        record = place[self.record]
        used = record >= 0
        shape = (len(ranked), self.cells)
        found = _assign(record[used], self.cell[used], self.iou[used], shape)
        limits = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
        image, label = self.image[ranked], self.label[ranked]
        return Matches(
            category_ids=self.category_ids,
            truths=self.truths,
            image=image,
            starts=np.searchsorted(label, np.arange(len(self.category_ids) + 1)),
            rank=_ranks_within(label * len(self.truths) + image),
            found=found,
            ignored=~found & (self.crowd_share[ranked] >= limits),
        )


def match_records(truth: dict, records: Sequence[Record]) -> Matches:
    """Match records with the cells of their image and class; see `Candidates.match`.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records that belong to the truth's images and classes.
    """
    scores = np.array([record["score"] for record in records], dtype=float)
    return find_candidates(truth, records).match(np.arange(len(records)), scores)


def find_candidates(truth: dict, records: Sequence[Record]) -> Candidates:
    """Measure the overlap of records with cells, once for any choice and scores of them.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records that belong to the truth's images and classes.
    """
    row_of = {image["id"]: row for row, image in enumerate(truth["images"])}
    category_ids = np.array(sorted(category["id"] for category in truth["categories"]), dtype=int)
    image_id = np.array([record["image_id"] for record in records], dtype=np.int64)
    image = np.array([row_of[record["image_id"]] for record in records], dtype=np.int64)
    cells = [entry for entry in truth["annotations"] if not entry.get("iscrowd")]
    crowds = [entry for entry in truth["annotations"] if entry.get("iscrowd")]
    cell_image = np.array([row_of[cell["image_id"]] for cell in cells], dtype=np.int64)
    truths = np.zeros((len(row_of), len(category_ids)), dtype=np.int64)
    np.add.at(truths, (cell_image, _labels(cells, category_ids)), 1)
    record, cell, iou = find_pairs(
        records, image, cells, cell_image, iou_threshold=IOU_THRESHOLDS[0], same_class=True
    )
    return Candidates(
        category_ids=category_ids,
        truths=truths,
        image_id=image_id,
        image=image,
        label=_labels(records, category_ids),
        record=record,
        cell=cell,
        iou=iou,
        cells=len(cells),
        crowd_share=_crowd_shares(records, crowds),
    )


def average_precision(
    matches: Matches,
    *,
    weights: np.ndarray | None = None,
    cap: int | None = None,
    ious: slice = slice(None),
) -> np.ndarray:
    """Return COCO's average precision of each class and IoU, 0-1, float64 [C, 10].

    It is the mean over 101 recalls of the best precision at that recall or a higher one. NaN
    where a class has no truth.

    Args:
        matches: of `match_records`.
        weights: int [I], how often each image counts, all once if None; the copies of a record
            rank beside each other.
        cap: count the best records of each image and class up to this number only.
        ious: which of IOU_THRESHOLDS to return.
    """
    weights = np.ones(len(matches.truths), dtype=np.int64) if weights is None else weights
    truths = weights @ matches.truths
    counts = weights[matches.image]
    if cap is not None:
        counts = counts * (matches.rank < cap)
    result = np.full((len(truths), len(IOU_THRESHOLDS[ious])), np.nan)
    for k in np.flatnonzero(truths):
        ranked = slice(matches.starts[k], matches.starts[k + 1])
        rows = zip(matches.found[ious, ranked], matches.ignored[ious, ranked], strict=True)
        for at, (found, ignored) in enumerate(rows):
            result[k, at] = _mean_precision(counts[ranked], found, ignored, truths[k])
    return result


def _mean_precision(
    counts: np.ndarray, found: np.ndarray, ignored: np.ndarray, truths: int
) -> float:
    """Return the average precision of ranked records, each counted so often, of one class."""
    # Recall rises only where a cell is found, and there precision is at its best.
    hits = np.flatnonzero(found)
    seen = np.cumsum(counts * ~ignored)[hits]
    true = np.cumsum(counts[hits])
    precision = true / np.maximum(seen, 1)
    best_from = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(best_from[np.searchsorted(true / truths, RECALLS)].mean())


def _labels(entries: Sequence[dict], category_ids: np.ndarray) -> np.ndarray:
    """Return the position of each entry's class among the classes, int64 [N]."""
    ids = np.array([entry["category_id"] for entry in entries], dtype=np.int64)
    return np.searchsorted(category_ids, ids)


def _ranks_within(groups: np.ndarray) -> np.ndarray:
    """Return for each element how many before it are of the same group, int64 [N]."""
    order = np.argsort(groups, kind="stable")
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.searchsorted(groups[order], groups[order])
    return ranks


def _assign(
    record: np.ndarray, cell: np.ndarray, iou: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Let records, better ones first, take the free cell of highest IoU; bool [10, D].

    In each round those records decide whose favourite is wanted by no better undecided one:
    whatever the others take, it stays free. All IoU thresholds are decided side by side.
    """
    favourites_first = np.lexsort((-cell, -iou, record))
    record, cell, iou = record[favourites_first], cell[favourites_first], iou[favourites_first]
    at, pair = np.nonzero(iou >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None])
    record, cell = at * shape[0] + record[pair], at * shape[1] + cell[pair]
    found = np.zeros(len(IOU_THRESHOLDS) * shape[0], dtype=bool)
    taken = np.zeros(len(IOU_THRESHOLDS) * shape[1], dtype=bool)
    suitor = np.empty(len(taken), dtype=np.int64)
    while len(record):
        suitor[cell[::-1]] = record[::-1]  # the first to write last: the best that wants it
        decided = suitor[cell] == record
        decided[1:] &= record[1:] != record[:-1]  # its favourite
        found[record[decided]] = True
        taken[cell[decided]] = True
        rest = ~(found[record] | taken[cell])
        record, cell = record[rest], cell[rest]
    return found.reshape(len(IOU_THRESHOLDS), shape[0])


def _crowd_shares(records: Sequence[Record], crowds: list[dict]) -> np.ndarray:
    """Return the largest share of each record's area in a crowd of its class, float64 [D]."""
    shares = np.zeros(len(records))
    for crowd in crowds:
        beside = [
            k
            for k, record in enumerate(records)
            if all(record[key] == crowd[key] for key in ("image_id", "category_id"))
        ]
        rles = [records[k]["segmentation"] for k in beside]
        if rles:
            inside = mask_utils.iou(rles, [crowd["segmentation"]], [1])[:, 0]
            shares[beside] = np.maximum(shares[beside], inside)
    return shares

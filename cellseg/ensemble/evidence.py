"""What any ensemble of some members scores out of fold, from overlaps that are measured once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellseg.coco import Record, group_by_image, record_order
from cellseg.ensemble.rules import RULES
from cellseg.evaluation.matches import Candidates, Matches, average_precision, find_candidates
from cellseg.evaluation.scores import AT_50, Truth, check_fit, mean_or_none
from cellseg.inference.merging import cluster_scores, suppress_pairs
from cellseg.overlap import neighbour_ious

Clusters = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """Settings of an ensemble of M members: their weights, 0 for one left out, and how to fuse."""

    weights: tuple[float, ...]
    iou_threshold: float
    agreement: str


class Evidence:
    """The records of M members for images with truth, and how they overlap.

    The overlaps of records with each other and with the truth's cells are measured once. A plan
    then costs a suppression over known pairs and a matching; plans that differ in weights or rule
    alone share the suppression, in which the best records stand whatever their member's weight.
    """

    def __init__(
        self, members: Sequence[Sequence[Record]], truth: Truth, *, lowest_iou: float
    ) -> None:
        """Measure the overlaps.

        Args:
            members: the records of each member; not changed.
            truth: COCO dict as `truth_from_targets` makes it.
            lowest_iou: no plan has a lower threshold.

        Raises:
            RecordsError: if a record's image, class or mask size is not the truth's.
        """
        entries = [(record, k) for k, records in enumerate(members) for record in records]
        entries.sort(key=lambda entry: record_order(entry[0]))
        records = [record for record, _ in entries]
        check_fit(truth, records)
        self._member = np.array([member for _, member in entries], dtype=np.int64)
        self._score = np.array([record["score"] for record in records], dtype=float)
        texts = np.array([record["segmentation"]["counts"] for record in records], dtype=object)
        self._text_place = np.unique(texts, return_inverse=True)[1].reshape(-1)
        self._pairs = _measure_pairs(records, lowest_iou)
        self._candidates: Candidates = find_candidates(truth, records)
        self._last: tuple[tuple, Clusters] | None = None

    def match(self, plan: Plan) -> Matches:
        """Return what the records of a plan find, as `match_records` of what `fuse` returns."""
        weights = np.array(plan.weights)
        kept, scores = self._clusters(weights > 0, plan.iou_threshold)
        taking = weights > 0
        fused = np.array(RULES[plan.agreement](scores[:, taking], weights[taking]))
        order = np.argsort(self._text_place[kept], kind="stable")  # equal scores: as files do
        return self._candidates.match(kept[order], fused[order])

    def _clusters(self, taking: np.ndarray, iou_threshold: float) -> Clusters:
        """Return the kept records [K], and of their clusters each member's best score [K, M]."""
        key = (taking.tobytes(), iou_threshold)
        if self._last is None or self._last[0] != key:
            first, second, iou = self._pairs
            active = taking[self._member]
            used = (iou > iou_threshold) & active[first] & active[second]
            owners = suppress_pairs(len(active), first[used], second[used])
            kept, _, best = cluster_scores(
                owners[active], self._member[active], self._score[active], len(taking)
            )
            self._last = (key, (kept, best))
        return self._last[1]


def ap50(matches: Matches, image_weights: np.ndarray | None = None) -> float:
    """Return the uncapped AP50, each image counted so often; NaN without truth."""
    at_50 = slice(AT_50, AT_50 + 1)
    mean = mean_or_none(average_precision(matches, weights=image_weights, ious=at_50))
    return np.nan if mean is None else mean


def _measure_pairs(
    records: Sequence[Record], lowest_iou: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return i < j and IoU of all pairs of one image and class with IoU > a limit.

    Args:
        records: sorted by image.
        lowest_iou: the limit.
    """
    parts = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))]
    start = 0
    images: Mapping[int, list[Record]] = group_by_image(records)
    for image in images.values():
        i, j, iou = neighbour_ious([record["segmentation"] for record in image])
        label = np.array([record["category_id"] for record in image])
        near = (iou > lowest_iou) & (label[i] == label[j])
        parts.append((i[near] + start, j[near] + start, iou[near]))
        start += len(image)
    first, second, iou = (np.concatenate(part) for part in zip(*parts, strict=True))
    return first, second, iou

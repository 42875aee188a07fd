"""The scores of the nuclei literature: PQ, DQ, SQ, AJI, Dice and F_d.

They are those of HoVer-Net (Graham et al., Medical Image Analysis 58, 2019), of two label maps in
which a pixel belongs to one nucleus at most. Records may overlap, so they are painted: of two
records on a pixel the better one keeps it (ties: `sort_records` order), and a record of which no
pixel is left does not count. A score cut takes away worse records only, hence never changes what
the better ones hold: one painting serves every cut. The cost follows the pixels of the images and
of the masks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from cellseg.coco import Record, Rle, sort_records
from cellseg.evaluation.scores import Truth, check_fit, scores_table
from cellseg.inference.merging import MaskLine, box_neighbours, group_by_image

MATCH_IOU = 0.5  # a match needs more; of disjoint nuclei only one can have it
FOUND_WITHIN = 12.0  # px between centroids, HoVer-Net's radius at 40x
THRESHOLDS = tuple(step / 20 for step in range(1, 20))
NUCLEI_NAMES = {"pq": "PQ", "dq": "DQ", "sq": "SQ", "aji": "AJI", "dice": "Dice", "f_d": "F_d"}
# What is added up over images; the scores are ratios of these.
SUMS = (
    "nuclei",  # of truth and prediction together
    "matched",
    "matched_iou",
    "aji_shared",
    "aji_union",
    "dice_shared",
    "dice_pixels",
    "found",
)


@dataclass(frozen=True)
class NucleiScores:
    """Scores in 0-1 with all nuclei as one class; None where there is no nucleus at all.

    TP are the pairs of a true and a predicted nucleus with IoU > 0.5, which are one to one; FP
    and FN the nuclei in no pair. Truth without prediction, or prediction without truth, scores 0.

    Attributes:
        pq: panoptic quality (Kirillov et al., CVPR 2019), dq * sq.
        dq: detection quality, TP / (TP + FP / 2 + FN / 2).
        sq: segmentation quality, mean IoU of the TP; 0 without any.
        aji: aggregated Jaccard index (Kumar et al., IEEE TMI 2017) by HoVer-Net's `get_fast_aji`:
            each true nucleus takes the predicted one with the highest IoU (ties: the better
            record), even if another has taken it. Pixels shared by these pairs, summed, over the
            pairs' unions, summed, plus the pixels of every true nucleus that touches no
            prediction and of every predicted one that nobody took.
        dice: 2 |A and B| / (|A| + |B|) of the pixels of any nucleus, HoVer-Net's DICE1.
        f_d: F1 of detection, 2 TP / (2 TP + FP + FN), where TP is the greatest number of pairs,
            one to one, whose centroids lie within 12 px. (HoVer-Net pairs at the least sum of all
            distances and then drops the long ones; that can find fewer.)
    """

    pq: float | None
    dq: float | None
    sq: float | None
    aji: float | None
    dice: float | None
    f_d: float | None


@dataclass(frozen=True)
class NucleiReport:
    """Nuclei scores of a set of images.

    Attributes:
        pooled: from counts and pixels summed over the images.
        mean: mean over the images that hold a nucleus, true or predicted; as published figures.
        per_image: image_id -> its scores.
        per_class_pq: class name -> pooled PQ of the true and the predicted nuclei of that class;
            None for a class absent from the truth.
    """

    pooled: NucleiScores
    mean: NucleiScores
    per_image: dict[int, NucleiScores]
    per_class_pq: dict[str, float | None]

    def table(self) -> str:
        """Return the scores as a Markdown table; "-" where there is no nucleus."""
        rows = [
            (shown, getattr(self.pooled, name), getattr(self.mean, name))
            for name, shown in NUCLEI_NAMES.items()
        ]
        rows += [(f"PQ, {name}", value, None) for name, value in self.per_class_pq.items()]
        return scores_table(("pooled", "mean over images"), rows)


@dataclass(frozen=True)
class _Overlaps:
    """The painted nuclei of one image: T true ones, P records, best first.

    Attributes:
        areas, labels: of the true nuclei, pixels and category ids, int64 [T].
        record_areas, record_labels: the same of the records, int64 [P]; 0 pixels: painted over.
        scores: of the records, float64 [P], descending.
        pairs: (true nucleus, record, pixels shared), int64 [K] each; those that share any.
        near: (true nucleus, record) whose centroids lie within 12 px, int64 [M] each.
    """

    areas: np.ndarray
    labels: np.ndarray
    record_areas: np.ndarray
    record_labels: np.ndarray
    scores: np.ndarray
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray]
    near: tuple[np.ndarray, np.ndarray]

    def number(self, score_threshold: float) -> int:
        """Return how many records, the first ones, have a score >= the threshold."""
        return int((self.scores >= score_threshold).sum())


def score_nuclei(
    truth: Truth, records: Sequence[Record], *, score_threshold: float
) -> NucleiReport:
    """Return PQ, DQ, SQ, AJI, Dice and F_d of records, with all nuclei as one class.

    Args:
        truth: COCO dict as `truth_from_targets` makes it; where annotations overlap the first
            keeps the pixel.
        records: result records; where they overlap the better one keeps the pixel.
        score_threshold: use records with score >= this, in 0-1.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    images = _paint_images(truth, records)
    sums = _stack([_sums(image, score_threshold) for image in images])
    ratios = nuclei_ratios(sums)
    seen = sums[:, 0] > 0
    means = {name: values[seen].mean() if seen.any() else np.nan for name, values in ratios.items()}
    return NucleiReport(
        pooled=_scores(nuclei_ratios(sums.sum(axis=0))),
        mean=_scores(means),
        per_image={
            image["id"]: _scores({name: values[k] for name, values in ratios.items()})
            for k, image in enumerate(truth["images"])
        },
        per_class_pq={
            category["name"]: _class_pq(images, category["id"], score_threshold)
            for category in truth["categories"]
        },
    )


def choose_score_threshold(
    truth: Truth, records: Sequence[Record], *, thresholds: Iterable[float] = THRESHOLDS
) -> float:
    """Return the score cut with the best pooled PQ; ties give the smallest.

    The cut is part of the method, so choose it on training images only. The images are painted
    once for all cuts.

    Args:
        truth: COCO dict of the training images.
        records: what was predicted on them.
        thresholds: the cuts to try, in 0-1; 0.05, 0.10, ..., 0.95 by default.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    images = _paint_images(truth, records)

    def quality(threshold: float) -> float:
        sums = _stack([_sums(image, threshold) for image in images]).sum(axis=0)
        return float(np.nan_to_num(nuclei_ratios(sums)["pq"]))

    return max(sorted(thresholds), key=quality)  # the first of equals


def nuclei_sums(truth: Truth, records: Sequence[Record], *, score_threshold: float) -> np.ndarray:
    """Return what the scores of each image are made of, float64 [I, 8], columns as in `SUMS`.

    The rows are in the order of the truth's images. Rows add up: `nuclei_ratios` of the sum over
    any choice of images gives the pooled scores of that choice.
    """
    images = _paint_images(truth, records)
    return _stack([_sums(image, score_threshold) for image in images])


def nuclei_ratios(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores by name from sums [..., 8]; NaN where there is no nucleus."""
    part = dict(zip(SUMS, np.moveaxis(np.asarray(sums, dtype=float), -1, 0), strict=True))
    # TP + FP / 2 + FN / 2 is half of the nuclei of both sides together.
    halves = part["nuclei"] / 2
    sq = np.where(part["matched"] > 0, part["matched_iou"] / np.maximum(part["matched"], 1), 0)
    with np.errstate(invalid="ignore"):
        return {
            "pq": part["matched_iou"] / halves,
            "dq": part["matched"] / halves,
            "sq": np.where(halves > 0, sq, np.nan),
            "aji": part["aji_shared"] / part["aji_union"],
            "dice": 2 * part["dice_shared"] / part["dice_pixels"],
            "f_d": part["found"] / halves,
        }


def _paint_images(truth: Truth, records: Sequence[Record]) -> list[_Overlaps]:
    """Return the painted nuclei of each image of the truth, in its order."""
    check_fit(truth, records)
    cells, found = group_by_image(truth["annotations"]), group_by_image(records)
    return [
        _paint_image(
            cells.get(image["id"], []),
            sort_records(found.get(image["id"], [])),
            (image["height"], image["width"]),
        )
        for image in truth["images"]
    ]


def _paint_image(cells: list[dict], records: list[Record], size: tuple[int, int]) -> _Overlaps:
    """Paint the nuclei of one image, records best first, and count what they share."""
    (true_map, areas, centres), (found_map, record_areas, record_centres) = starmap(
        _painted, (([entry["segmentation"] for entry in side], size) for side in (cells, records))
    )
    both = np.flatnonzero((true_map > 0) & (found_map > 0))
    keys = (true_map[both].astype(np.int64) - 1) * max(len(records), 1) + found_map[both] - 1
    keys, shared = np.unique(keys, return_counts=True)
    return _Overlaps(
        areas=areas,
        labels=np.array([cell["category_id"] for cell in cells], dtype=np.int64),
        record_areas=record_areas,
        record_labels=np.array([entry["category_id"] for entry in records], dtype=np.int64),
        scores=np.array([entry["score"] for entry in records], dtype=float),
        pairs=(*np.divmod(keys, max(len(records), 1)), shared),
        near=_near_pairs(centres, record_centres),
    )


def _painted(rles: Sequence[Rle], size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Paint masks onto one map, the first on top.

    Returns:
        map: int32 [H * W], column-major; k + 1 where mask k lies on top, 0 elsewhere.
        areas: int64 [N], the pixels left of each mask.
        centres: float64 [N, 2], mean (row, column) of these; NaN if none is left.
    """
    masks = MaskLine.from_rles(rles)
    owner = np.repeat(np.arange(len(rles)), np.diff(masks.offsets))[::-1]
    lengths = (masks.ends - masks.starts)[::-1]
    first = masks.starts[::-1] - owner * masks.pixels
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    painted = np.zeros(size[0] * size[1], dtype=np.int32)
    # From the last mask to the first: of several values for one pixel the last one stays.
    painted[np.repeat(first, lengths) + within] = np.repeat(owner + 1, lengths)
    pixel = np.flatnonzero(painted)
    nucleus = painted[pixel] - 1
    areas = np.bincount(nucleus, minlength=len(rles))
    sums = [np.bincount(nucleus, at, len(rles)) for at in (pixel % size[0], pixel // size[0])]
    with np.errstate(invalid="ignore"):
        return painted, areas, np.stack(sums, axis=1) / areas[:, None]


def _near_pairs(centres: np.ndarray, record_centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (true nucleus, record) whose centres [T, 2], [P, 2] are near each other."""
    both = np.concatenate([centres, record_centres])
    # Boxes that share some area wherever two centres lie at FOUND_WITHIN or less.
    reach = FOUND_WITHIN / 2 + 1
    known = np.flatnonzero(~np.isnan(both[:, 0]))
    first, second = box_neighbours(np.concatenate([both - reach, both + reach], axis=1)[known])
    first, second = known[first], known[second]
    mixed = (first < len(centres)) & (second >= len(centres))
    first, second = first[mixed], second[mixed]
    near = ((both[first] - both[second]) ** 2).sum(axis=1) <= FOUND_WITHIN**2
    return first[near], second[near] - len(centres)


def _sums(image: _Overlaps, score_threshold: float) -> list[float]:
    """Return the sums of one image in the order of `SUMS`."""
    number = image.number(score_threshold)
    areas = image.record_areas[:number]
    true, record, shared, iou = _pair_ious(image, number)
    matched = iou > MATCH_IOU
    aji_shared, aji_union = _aji_sums(image.areas, areas, true, record, shared)
    return [
        (image.areas > 0).sum() + (areas > 0).sum(),
        matched.sum(),
        iou[matched].sum(),
        aji_shared,
        aji_union,
        shared.sum(),
        image.areas.sum() + areas.sum(),
        _most_pairs(*image.near, (len(image.areas), number)),
    ]


def _pair_ious(image: _Overlaps, number: int) -> tuple[np.ndarray, ...]:
    """Return (true nucleus, record, pixels shared, IoU) of the pairs of the first records."""
    chosen = image.pairs[1] < number
    true, record, shared = (column[chosen] for column in image.pairs)
    return true, record, shared, shared / (image.areas[true] + image.record_areas[record] - shared)


def _aji_sums(
    areas: np.ndarray,
    record_areas: np.ndarray,
    true: np.ndarray,
    record: np.ndarray,
    shared: np.ndarray,
) -> tuple[int, int]:
    """Return numerator and denominator of the AJI; see `NucleiScores`."""
    union = areas[true] + record_areas[record] - shared
    order = np.lexsort((record, -shared / union, true))
    paired, first = np.unique(true[order], return_index=True)
    best = order[first]
    alone, unused = np.ones(len(areas), dtype=bool), np.ones(len(record_areas), dtype=bool)
    alone[paired], unused[record[best]] = False, False
    apart = areas[alone].sum() + record_areas[unused].sum()
    return shared[best].sum(), union[best].sum() + apart


def _most_pairs(true: np.ndarray, record: np.ndarray, shape: tuple[int, int]) -> int:
    """Return how many of the pairs can stand at once, each nucleus in one pair at most."""
    chosen = record < shape[1]
    if not chosen.any():
        return 0
    links = np.ones(chosen.sum(), dtype=np.int8), (true[chosen], record[chosen])
    graph = csr_array(links, shape=shape)
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def _class_pq(
    images: Iterable[_Overlaps], category_id: int, score_threshold: float
) -> float | None:
    """Return the PQ of one class, pooled over images; None without truth."""
    ious, truths, found = 0.0, 0, 0
    for image in images:
        number = image.number(score_threshold)
        true, record, _, iou = _pair_ious(image, number)
        is_true = image.labels == category_id
        is_found = image.record_labels[:number] == category_id
        ious += iou[(iou > MATCH_IOU) & is_true[true] & is_found[record]].sum()
        truths += (is_true & (image.areas > 0)).sum()
        found += (is_found & (image.record_areas[:number] > 0)).sum()
    return float(2 * ious / (truths + found)) if truths else None


def _stack(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the images' sums as float64 [I, 8]."""
    return np.array(rows, dtype=float).reshape(len(rows), len(SUMS))


def _scores(values: dict[str, np.ndarray]) -> NucleiScores:
    """Return scores from single values by name, NaN as None."""
    return NucleiScores(
        **{name: None if np.isnan(value) else float(value) for name, value in values.items()}
    )

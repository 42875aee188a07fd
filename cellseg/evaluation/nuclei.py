"""The scores of the nuclei literature: PQ, DQ, SQ, AJI, Dice and F_d.

They are those of HoVer-Net (Graham et al., Medical Image Analysis 58, 2019), of two label maps in
which a pixel belongs to one nucleus at most. Records may overlap, so they are painted: of two
records on a pixel the better one keeps it (ties: `sort_records` order), and a record of which no
pixel is left does not count. A score cut takes away worse records only, hence never changes what
the better ones hold: one painting serves every cut. The cost follows the pixels of the images and
of the masks, but for F_d, which compares the centroids of all nuclei of an image with one another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import starmap

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from cellseg.coco import Record, Rle, group_by_image, sort_records
from cellseg.evaluation.names import NUCLEI_NAMES
from cellseg.evaluation.scores import Truth, check_fit, scores_table
from cellseg.overlap import MaskLine
from cellseg.rle import index_within

MATCH_IOU = 0.5  # a match needs more; of disjoint nuclei only one can have it
FOUND_WITHIN = 12.0  # px between centroids, HoVer-Net's radius at 40x
MOST_DISTANCES = 25_000_000  # true nuclei x records of an image; beyond it F_d has no value
THRESHOLDS = tuple(step / 20 for step in range(1, 20))
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
        f_d: F1 of detection, 2 TP / (2 TP + FP + FN). TP are pairs by HoVer-Net's
            `pair_coordinates`: centroids are paired one to one at the least sum of all distances,
            and the pairs farther apart than 12 px then go. (To pair as many within 12 px as can
            be would sometimes find more.) None for an image of more than 5,000 nuclei on each
            side, which is no tile any more, and where such an image is one of several.
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
        per_class: class name -> pooled scores of the true and the predicted nuclei of that class
            alone; all None for a class absent from the truth.
        per_class_f_c: class name -> HoVer-Net's F_c (its `run_nuclei_type_stat`): of the pairs of
            F_d in which either side is of the class those of one class are TP, the others count
            as two errors each, and each nucleus of the class without a pair as one; pooled.
        class_sums: class name -> what its scores are made of, float64 [I, 8] as `nuclei_sums`.
    """

    pooled: NucleiScores
    mean: NucleiScores
    per_image: dict[int, NucleiScores]
    per_class: dict[str, NucleiScores]
    per_class_f_c: dict[str, float | None]
    class_sums: dict[str, np.ndarray]

    def table(self) -> str:
        """Return the scores as a Markdown table; "-" where there is no nucleus."""
        rows = [
            (shown, getattr(self.pooled, name), getattr(self.mean, name))
            for name, shown in NUCLEI_NAMES.items()
        ]
        return scores_table(("pooled", "mean over images"), rows)


@dataclass(frozen=True)
class _Painted:
    """The painted nuclei of one image: T true ones, P records, best first.

    Attributes:
        areas, labels: of the true nuclei, pixels and category ids, int64 [T].
        centres: float64 [T, 2], mean (row, column) of their pixels; NaN without any.
        record_areas, record_labels, record_centres: the same of the records; 0 pixels: painted
            over.
        scores: of the records, float64 [P], descending.
        pairs: (true nucleus, record, pixels shared), int64 [K] each; those that share any.
    """

    areas: np.ndarray
    labels: np.ndarray
    centres: np.ndarray
    record_areas: np.ndarray
    record_labels: np.ndarray
    record_centres: np.ndarray
    scores: np.ndarray
    pairs: tuple[np.ndarray, ...]

    def above(self, score_threshold: float) -> "_Painted":
        """Return the image with the records of score >= the threshold, which are the first."""
        number = int((self.scores >= score_threshold).sum())
        kept = self.pairs[1] < number
        return replace(
            self,
            record_areas=self.record_areas[:number],
            record_labels=self.record_labels[:number],
            record_centres=self.record_centres[:number],
            scores=self.scores[:number],
            pairs=tuple(column[kept] for column in self.pairs),
        )

    def of_class(self, category_id: int) -> "_Painted":
        """Return the image with the nuclei of one class; the others have no pixels."""
        true, record = self.labels == category_id, self.record_labels == category_id
        kept = true[self.pairs[0]] & record[self.pairs[1]]
        return replace(
            self,
            areas=self.areas * true,
            record_areas=self.record_areas * record,
            pairs=tuple(column[kept] for column in self.pairs),
        )

    def ious(self) -> np.ndarray:
        """Return the IoU of each pair, float64 [K]."""
        true, record, shared = self.pairs
        return shared / (self.areas[true] + self.record_areas[record] - shared)


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
    images = [image.above(score_threshold) for image in _paint_images(truth, records)]
    pairs = [_pair_centres(image) for image in images]
    sums = _stack([_sums(image, _count(near)) for image, near in zip(images, pairs, strict=True)])
    ratios = nuclei_ratios(sums)
    seen = sums[:, 0] > 0
    means = {name: values[seen].mean() if seen.any() else np.nan for name, values in ratios.items()}
    classes = {category["name"]: category["id"] for category in truth["categories"]}
    class_sums = {name: _class_sums(images, label) for name, label in classes.items()}
    return NucleiReport(
        pooled=_scores(nuclei_ratios(sums.sum(axis=0))),
        mean=_scores(means),
        per_image={
            image["id"]: _scores({name: values[k] for name, values in ratios.items()})
            for k, image in enumerate(truth["images"])
        },
        per_class={
            name: _class_scores(images, label, class_sums[name]) for name, label in classes.items()
        },
        per_class_f_c={name: _class_f_c(images, pairs, label) for name, label in classes.items()},
        class_sums=class_sums,
    )


def choose_score_threshold(
    truth: Truth, records: Sequence[Record], *, thresholds: Iterable[float] = THRESHOLDS
) -> float:
    """Return the score cut with the best sum of pooled PQ and AJI; ties give the smallest.

    A false cell costs PQ more than AJI, a missed one the other way round, and PQ alone hardly
    changes over a wide range of cuts. The cut is part of the method, so choose it on training
    images only. The images are painted once for all cuts.

    Args:
        truth: COCO dict of the training images.
        records: what was predicted on them.
        thresholds: the cuts to try, in 0-1; 0.05, 0.10, ..., 0.95 by default.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    images = _paint_images(truth, records)

    def quality(threshold: float) -> float:
        sums = _stack([_sums(image.above(threshold)) for image in images]).sum(axis=0)
        ratios = nuclei_ratios(sums)
        return float(np.nan_to_num(ratios["pq"] + ratios["aji"]))

    return max(sorted(thresholds), key=quality)  # the first of equals


def nuclei_sums(truth: Truth, records: Sequence[Record], *, score_threshold: float) -> np.ndarray:
    """Return what the scores of each image are made of, float64 [I, 8], columns as in `SUMS`.

    The rows are in the order of the truth's images. Rows add up: `nuclei_ratios` of the sum over
    any choice of images gives the pooled scores of that choice.
    """
    images = [image.above(score_threshold) for image in _paint_images(truth, records)]
    return _stack([_sums(image, _count(_pair_centres(image))) for image in images])


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


def _paint_images(truth: Truth, records: Sequence[Record]) -> list[_Painted]:
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


def _paint_image(cells: list[dict], records: list[Record], size: tuple[int, int]) -> _Painted:
    """Paint the nuclei of one image, records best first, and count what they share."""
    (true_map, areas, centres), (found_map, record_areas, record_centres) = starmap(
        _painted, (([entry["segmentation"] for entry in side], size) for side in (cells, records))
    )
    both = np.flatnonzero((true_map > 0) & (found_map > 0))
    keys = (true_map[both].astype(np.int64) - 1) * max(len(records), 1) + found_map[both] - 1
    keys, shared = np.unique(keys, return_counts=True)
    return _Painted(
        areas=areas,
        labels=np.array([cell["category_id"] for cell in cells], dtype=np.int64),
        centres=centres,
        record_areas=record_areas,
        record_labels=np.array([entry["category_id"] for entry in records], dtype=np.int64),
        record_centres=record_centres,
        scores=np.array([entry["score"] for entry in records], dtype=float),
        pairs=(*np.divmod(keys, max(len(records), 1)), shared),
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
    covered = np.repeat(first, lengths) + index_within(lengths)
    painted = np.zeros(size[0] * size[1], dtype=np.int32)
    # From the last mask to the first: of several values for one pixel the last one stays.
    painted[covered] = np.repeat(owner + 1, lengths)
    pixel = np.flatnonzero(painted)
    nucleus = painted[pixel] - 1
    areas = np.bincount(nucleus, minlength=len(rles))
    sums = [np.bincount(nucleus, at, len(rles)) for at in (pixel % size[0], pixel // size[0])]
    with np.errstate(invalid="ignore"):
        return painted, areas, np.stack(sums, axis=1) / areas[:, None]


def _pair_centres(image: _Painted) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (true nuclei, records) whose centroids are paired, see `NucleiScores.f_d`; or None."""
    true, record = np.flatnonzero(image.areas), np.flatnonzero(image.record_areas)
    if len(true) * len(record) > MOST_DISTANCES:
        return None
    distance = cdist(image.centres[true], image.record_centres[record])
    row, column = linear_sum_assignment(distance)
    near = distance[row, column] <= FOUND_WITHIN
    return true[row[near]], record[column[near]]


def _count(pairs: tuple[np.ndarray, np.ndarray] | None) -> float:
    """Return the number of pairs, NaN where none were sought."""
    return np.nan if pairs is None else len(pairs[0])


def _sums(image: _Painted, found: float = np.nan) -> list[float]:
    """Return the sums of one image in the order of `SUMS`; `found` is the number of centroids."""
    iou, shared = image.ious(), image.pairs[2]
    matched = iou > MATCH_IOU
    aji_shared, aji_union = _aji_sums(image)
    return [
        (image.areas > 0).sum() + (image.record_areas > 0).sum(),
        matched.sum(),
        iou[matched].sum(),
        aji_shared,
        aji_union,
        shared.sum(),
        image.areas.sum() + image.record_areas.sum(),
        found,
    ]


def _aji_sums(image: _Painted) -> tuple[int, int]:
    """Return numerator and denominator of the AJI; see `NucleiScores`."""
    true, record, shared = image.pairs
    areas, record_areas = image.areas, image.record_areas
    union = areas[true] + record_areas[record] - shared
    order = np.lexsort((record, -shared / union, true))
    paired, first = np.unique(true[order], return_index=True)
    best = order[first]
    alone, unused = np.ones(len(areas), dtype=bool), np.ones(len(record_areas), dtype=bool)
    alone[paired], unused[record[best]] = False, False
    apart = areas[alone].sum() + record_areas[unused].sum()
    return shared[best].sum(), union[best].sum() + apart


def _class_sums(images: Iterable[_Painted], category_id: int) -> np.ndarray:
    """Return the sums of the nuclei of one class alone, float64 [I, 8]."""
    parts = [image.of_class(category_id) for image in images]
    return _stack([_sums(part, _count(_pair_centres(part))) for part in parts])


def _class_scores(images: Iterable[_Painted], category_id: int, sums: np.ndarray) -> NucleiScores:
    """Return the pooled scores of one class alone; all None without truth."""
    if not any(image.areas[image.labels == category_id].any() for image in images):
        return NucleiScores(*[None] * len(NUCLEI_NAMES))
    return _scores(nuclei_ratios(sums.sum(axis=0)))


def _class_f_c(
    images: Sequence[_Painted],
    pairs: Sequence[tuple[np.ndarray, np.ndarray] | None],
    category_id: int,
) -> float | None:
    """Return F_c of one class, see `NucleiReport`; None without truth, or pairs of an image."""
    if any(near is None for near in pairs):
        return None
    truths = right = sides = nuclei = 0
    for image, (true, record) in zip(images, pairs, strict=True):
        is_true = image.labels[true] == category_id
        is_found = image.record_labels[record] == category_id
        right += (is_true & is_found).sum()
        sides += is_true.sum() + is_found.sum()
        truths += ((image.labels == category_id) & (image.areas > 0)).sum()
        nuclei += ((image.record_labels == category_id) & (image.record_areas > 0)).sum()
    nuclei += truths
    mixed, alone = sides - 2 * right, nuclei - sides
    return float(2 * right / (2 * right + 2 * mixed + alone)) if truths else None


def _stack(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the images' sums as float64 [I, 8]."""
    return np.array(rows, dtype=float).reshape(len(rows), len(SUMS))


def _scores(values: dict[str, np.ndarray]) -> NucleiScores:
    """Return scores from single values by name, NaN as None."""
    return NucleiScores(
        **{name: None if np.isnan(value) else float(value) for name, value in values.items()}
    )

"""A score taken apart: by class with its precision-recall curve, by size, by crowding, by score.

All at a mask IoU of 0.5 and uncapped, from the matches that AP50 counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from scipy.spatial import cKDTree

from cellseg import markdown
from cellseg.coco import Record, rle_area
from cellseg.evaluation.overlaps import Overlaps, find_overlaps, grouped_ap50
from cellseg.evaluation.scores import Truth, mean_or_none

CROWDED_WITHIN = 50.0  # px between box centres: about three cells at 40x
BINS = 10


@dataclass(frozen=True)
class BestCut:
    """The score cut with the best F1: records with score >= threshold are kept."""

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ClassCurve:
    """Precision and recall of one class over all score cuts.

    Attributes:
        category_id: its id.
        truths, records, found: cells, records that count, and records that found a cell.
        ap50: None without cells.
        thresholds: float64 [K], the K different scores, descending: cuts of score >= threshold.
        precision, recall: float64 [K] at each cut; recall is 0 without cells.
        best: the cut with the best F1 = 2 P R / (P + R), ties: the highest; None if nothing is
            found.
    """

    category_id: int
    truths: int
    records: int
    found: int
    ap50: float | None
    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    best: BestCut | None


@dataclass(frozen=True)
class Part:
    """The cells whose size or crowding lies in one range.

    Attributes:
        low, high: a cell belongs to the part if low < value <= high (the first part: low <=).
        truths, found: its cells, and those of them found.
        recall: found / truths.
        ap50: mean over the classes that occur in the part. A record that found a cell counts in
            that cell's part; a false one in the part of its own size or crowding.
    """

    low: float
    high: float
    truths: int
    found: int
    recall: float
    ap50: float


@dataclass(frozen=True)
class Calibration:
    """How far scores are the share of records that found a cell, in bins of equal width.

    Attributes:
        edges: float64 [B + 1], 0 to 1; a score on an edge belongs to the bin above it, 1 to the
            last.
        records: int64 [B], records in each bin.
        mean_score, share_found: float64 [B], NaN in an empty bin.
        error: the expected calibration error, the mean over the records of their bin's
            |share_found - mean_score| (Naeini et al., AAAI 2015); None without records.
    """

    edges: np.ndarray
    records: np.ndarray
    mean_score: np.ndarray
    share_found: np.ndarray
    error: float | None


def class_curves(truth: Truth, records: Sequence[Record]) -> dict[str, ClassCurve]:
    """Return the curve of each class by its name, in the order of the class ids.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    seen = find_overlaps(truth, records)
    names = {category["id"]: category["name"] for category in truth["categories"]}
    ap50 = grouped_ap50(
        np.searchsorted(seen.category_ids, seen.label),
        seen.score,
        seen.image,
        found=seen.found >= 0,
        ignored=seen.ignored,
        truths=seen.truths,
    )
    columns = (seen.category_ids.tolist(), seen.truths.tolist(), ap50)
    return {
        names[category_id]: _class_curve(seen, category_id, truths, mean_or_none(value))
        for category_id, truths, value in zip(*columns, strict=True)
    }


def curves_table(curves: Mapping[str, ClassCurve]) -> str:
    """Return the classes as a Markdown table, with precision and recall at the best F1."""
    header = "", "cells", "records", "found", "AP50", "best cut", "precision", "recall", "F1"
    rows = []
    for name, curve in curves.items():
        counts = [f"{number:,}" for number in (curve.truths, curve.records, curve.found)]
        ap50 = "-" if curve.ap50 is None else f"{curve.ap50:.3f}"
        best = [f"{value:.3f}" for value in astuple(curve.best)] if curve.best else ["-"] * 4
        rows.append([markdown.escape(name), *counts, ap50, *best])
    return markdown.table(header, rows)


def score_by_size(
    truth: Truth, records: Sequence[Record], *, bounds: Sequence[float] | None = None
) -> list[Part]:
    """Return recall and AP50 of small to large cells.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records.
        bounds: areas in px2 between the parts, ascending; the terciles of all cells if None.

    Returns:
        the parts that hold a cell, from small to large.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    seen = find_overlaps(truth, records)
    areas = rle_area([cell["segmentation"] for cell in seen.cells])
    record_areas = rle_area([record["segmentation"] for record in records])
    return _parts(seen, areas.astype(float), record_areas.astype(float), bounds)


def score_by_crowding(
    truth: Truth,
    records: Sequence[Record],
    *,
    bounds: Sequence[float] | None = None,
    within: float = CROWDED_WITHIN,
) -> list[Part]:
    """Return recall and AP50 of lonely to crowded cells.

    A cell's crowding is the number of other cells of its image whose box centre is no farther
    from its own than `within` px. A false record's is that number less one, as if it stood for
    one of them, and 0 if there is none.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records.
        bounds: numbers of neighbours between the parts, ascending; the terciles if None.
        within: radius in px.

    Returns:
        the parts that hold a cell, from lonely to crowded.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    seen = find_overlaps(truth, records)
    cell_image = np.array([cell["image_id"] for cell in seen.cells], dtype=np.int64)
    centres, record_centres = _centres(seen.cells), _centres(records)
    crowding, record_crowding = np.zeros(len(centres)), np.zeros(len(record_centres))
    for image_id in np.unique(cell_image):
        cells, beside = cell_image == image_id, seen.image == image_id
        tree = cKDTree(centres[cells])
        for values, points, chosen in (
            (crowding, centres, cells),
            (record_crowding, record_centres, beside),
        ):
            if chosen.any():
                number = tree.query_ball_point(points[chosen], within, return_length=True)
                values[chosen] = np.maximum(number - 1, 0)
    return _parts(seen, crowding, record_crowding, bounds)


def parts_table(parts: Sequence[Part], unit: str) -> str:
    """Return parts as a Markdown table; `unit` names what low and high are, e.g. "area, px2"."""
    rows = []
    for k, part in enumerate(parts):
        span = f"{'over ' if k else ''}{part.low:,.0f} to {part.high:,.0f}"
        counts = f"{part.truths:,}", f"{part.found:,}"
        rows.append((span, *counts, f"{part.recall:.3f}", f"{part.ap50:.3f}"))
    return markdown.table((unit, "cells", "found", "recall", "AP50"), rows)


def calibrate(truth: Truth, records: Sequence[Record], *, bins: int = BINS) -> Calibration:
    """Return how often records of each score found a cell of their class.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    seen = find_overlaps(truth, records)
    counts = ~seen.ignored
    score, found = seen.score[counts], seen.found[counts] >= 0
    edges = np.arange(bins + 1) / bins  # 0.3 is 0.3, as linspace's is not
    place = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, bins - 1)
    number = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_score = np.bincount(place, score, bins) / number
        share_found = np.bincount(place, found, bins) / number
    gaps = np.nan_to_num(np.abs(share_found - mean_score))
    error = float((gaps * number).sum() / number.sum()) if len(score) else None
    return Calibration(edges, number, mean_score, share_found, error)


def _class_curve(seen: Overlaps, category_id: int, truths: int, ap50: float | None) -> ClassCurve:
    """Return the curve of one class."""
    chosen = np.flatnonzero((seen.label == category_id) & ~seen.ignored)
    order = chosen[np.argsort(-seen.score[chosen], kind="stable")]
    score, found = seen.score[order], seen.found[order] >= 0
    last = np.flatnonzero(np.append(score[1:] < score[:-1], True)[: len(score)])
    true, kept = np.cumsum(found)[last], last + 1
    precision, recall = true / kept, true / max(truths, 1)
    best = None
    if truths and found.any():
        f1 = 2 * true / (kept + truths)  # = 2 P R / (P + R)
        k = int(np.argmax(f1))  # the first, highest cut of equals
        best = BestCut(*(float(values[k]) for values in (score[last], precision, recall, f1)))
    return ClassCurve(
        category_id=category_id,
        truths=truths,
        records=len(order),
        found=int(found.sum()),
        ap50=ap50,
        thresholds=score[last],
        precision=precision,
        recall=recall,
        best=best,
    )


def _parts(
    seen: Overlaps,
    values: np.ndarray,
    record_values: np.ndarray,
    bounds: Sequence[float] | None,
) -> list[Part]:
    """Return recall and AP50 of the cells by a value of theirs, [T]; [D] for false records."""
    if not len(values):
        return []
    inner = np.quantile(values, [1 / 3, 2 / 3]) if bounds is None else np.asarray(bounds)
    inner = np.unique(inner)
    hit = seen.found >= 0
    own = record_values.copy()
    own[hit] = values[seen.found[hit]]
    part, cell_part = np.searchsorted(inner, own), np.searchsorted(inner, values)
    classes = len(seen.category_ids)
    asked = cell_part * classes + np.searchsorted(seen.category_ids, seen.cell_label)
    ap50 = grouped_ap50(
        part * classes + np.searchsorted(seen.category_ids, seen.label),
        seen.score,
        seen.image,
        found=hit,
        ignored=seen.ignored,
        truths=np.bincount(asked, minlength=(len(inner) + 1) * classes),
    ).reshape(-1, classes)
    edges = [min([values.min(), *inner]), *inner, max([values.max(), *inner])]
    truths = np.bincount(cell_part, minlength=len(inner) + 1)
    found = np.bincount(part[hit], minlength=len(inner) + 1)
    return [
        Part(
            low=float(edges[k]),
            high=float(edges[k + 1]),
            truths=int(truths[k]),
            found=int(found[k]),
            recall=float(found[k] / truths[k]),
            ap50=mean_or_none(ap50[k]),
        )
        for k in np.flatnonzero(truths).tolist()
    ]


def _centres(entries: Sequence[dict]) -> np.ndarray:
    """Return the centres of the boxes of cells or records, float64 [N, 2], x and y."""
    bbox = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
    return bbox[:, :2] + bbox[:, 2:] / 2

"""Errors, curves, parts and calibration against values worked out by hand."""

import copy
from dataclasses import astuple

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from cellseg.coco import make_record, mask_to_rle
from cellseg.errors import RecordsError, SettingsError
from cellseg.evaluation import (
    KINDS,
    calibrate,
    class_curves,
    curves_table,
    explain_errors,
    parts_table,
    score_by_crowding,
    score_by_size,
    score_records,
    truth_from_targets,
    worst_cells,
    worst_images,
)
from cellseg.evaluation.matches import match_records
from cellseg.evaluation.overlaps import find_overlaps

NAMES = ("epithelial", "lymphocyte", "neutrophil")
HEIGHT, WIDTH = 30, 100
A, B, C, D = ((x, 5, x + 10, 15) for x in (5, 30, 55, 80))  # 100 px each
POOR_A = (9, 5, 19, 15)  # 60 px shared of 140: IoU 0.4286
GOOD_A = (6, 5, 16, 15)  # 90 px shared of 110: IoU 0.8182
EMPTY = (40, 20, 50, 30)


def rle(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask_to_rle(mask)


def record(category_id, score, box, image_id=1):
    return make_record(image_id, category_id, score, rle(*box))


def truth_of(*images):
    """Return the truth of images of rectangles (label, (x1, y1, x2, y2))."""
    targets = []
    for image_id, cells in enumerate(images, start=1):
        instance_map = np.zeros((len(cells) or 1, HEIGHT, WIDTH), dtype=np.int32)
        for k, (_, (x1, y1, x2, y2)) in enumerate(cells):
            instance_map[k, y1:y2, x1:x2] = k + 1
        labels = np.array([label for label, _ in cells], dtype=np.int64)
        targets.append({"instance_map": instance_map, "labels": labels, "image_id": image_id})
    return truth_from_targets(targets, NAMES)


def ap(recall, precision=1.0):
    """Return AP of one step: this precision up to this recall, by 101 levels."""
    return precision * (np.arange(101) / 100 <= recall + 1e-12).sum() / 101


# Each has two cells of class 1, A and B, unless said. (reason, cells, records, AP50 as it is,
# kinds of the records, number missed, {mend: AP50 with it}; the others leave AP50 as it is.)
TWO = [(1, A), (1, B)]
CASES = [
    ("perfect", TWO, [(1, 0.9, A), (1, 0.8, B)], 1.0, [None, None], 0, {}),
    (
        # The poor record on A ranks first: recall 0.5 at precision 1/2. With its mask both are
        # found; so they are by perfect masks.
        "a poor mask",
        TWO,
        [(1, 0.9, POOR_A), (1, 0.8, B)],
        ap(0.5, 0.5),
        ["poor mask", None],
        0,
        {"poor mask": 1.0, "perfect masks": 1.0},
    ),
    (
        # B found as class 2, which has no cell: only class 1 counts. Mended, both are found.
        "a wrong class",
        TWO,
        [(1, 0.9, A), (2, 0.8, B)],
        ap(0.5),
        [None, "wrong class"],
        0,
        {"wrong class": 1.0, "perfect classes": 1.0},
    ),
    (
        # Class 1: found at rank 2, precision 1/2; class 2 found. Without the record on D's place:
        # class 1 is 1. With perfect classes it is a second, poor record of the class 2 cell.
        "wrong class and poor mask",
        [(2, A), (1, B)],
        [(1, 0.9, POOR_A), (1, 0.8, B), (2, 0.7, A)],
        (0.5 + 1) / 2,
        ["both", None, None],
        0,
        {"both": 1.0, "perfect classes": (1 + 0.5) / 2, "perfect suppression": 0.75},
    ),
    (
        # A, a second time A, B: precision 1 to recall 1/2, then 2/3.
        "a duplicate",
        TWO,
        [(1, 0.9, A), (1, 0.85, GOOD_A), (1, 0.8, B)],
        ap(0.5) + ap(1, 2 / 3) - ap(0.5, 2 / 3),
        [None, "duplicate", None],
        0,
        {"duplicate": 1.0, "perfect masks": 1.0, "perfect suppression": 1.0},
    ),
    (
        "background",
        TWO,
        [(1, 0.9, EMPTY), (1, 0.8, A), (1, 0.7, B)],
        ap(1, 2 / 3),
        ["background", None, None],
        0,
        {"background": 1.0},
    ),
    # One of two cells found, the other no longer asked for.
    ("a missed cell", TWO, [(1, 0.9, A)], ap(0.5), [None], 1, {"missed": 1.0}),
    # Class 2 has one cell and it is missed: its AP50 stays 0 when no cell of it is left.
    ("a missed class", [(1, A), (2, B)], [(1, 0.9, A)], 0.5, [None], 1, {}),
    ("nothing predicted", TWO, [], 0.0, [], 2, {}),
    (
        # The class of A's second record mended would be a duplicate: it goes. Class 2 has C only.
        # Class 2 is found at rank 2, so removing the first gives it back its precision.
        "a second class for a found cell",
        [(1, A), (2, C)],
        [(1, 0.9, A), (2, 0.8, A), (2, 0.7, C)],
        (1 + 0.5) / 2,
        [None, "wrong class", None],
        0,
        {"wrong class": 1.0, "perfect classes": 1.0},
    ),
    (
        # The surer of two wrong records gets the cell, the other goes.
        "two wrong classes for one cell",
        [(1, A), (2, C)],
        [(2, 0.9, A), (3, 0.8, A), (2, 0.7, C)],
        (0 + 0.5) / 2,
        ["wrong class", "wrong class", None],
        0,
        {"wrong class": 1.0, "perfect classes": 1.0},
    ),
    (
        # TIDE drops a poor mask on a cell that is found: A at rank 1 then. So do perfect masks,
        # where the poor one, being surer, finds it, and perfect suppression.
        "a poor mask beside a good one",
        [(1, A)],
        [(1, 0.9, POOR_A), (1, 0.8, A)],
        0.5,
        ["poor mask", None],
        0,
        {"poor mask": 1.0, "perfect masks": 1.0, "perfect suppression": 1.0},
    ),
]


@pytest.mark.parametrize(
    ("reason", "cells", "found", "ap50", "kinds", "missed", "mends"),
    CASES,
    ids=[case[0] for case in CASES],
)
def test_errors_by_hand(reason, cells, found, ap50, kinds, missed, mends):
    truth, records = truth_of(cells), [record(*entry) for entry in found]
    report = explain_errors(truth, records)
    assert report.ap50 == pytest.approx(ap50)
    assert report.ap50 == score_records(truth, records).ap50
    assert report.per_record == kinds
    assert len(report.missed) == missed
    for name, mend in (report.kinds | report.perfect).items():
        assert mend.ap50_after == pytest.approx(mends.get(name, ap50)), name
        assert mend.gain == pytest.approx(mend.ap50_after - ap50)
    for name in KINDS[:-1]:
        assert report.kinds[name].count == kinds.count(name)
    assert report.kinds["missed"].count == missed


def mixture():
    """Return an image with one error of each kind, and one without an error."""
    truth = truth_of([(1, A), (1, B), (2, C), (2, D)], [(1, A)], [])
    records = [
        record(1, 0.50, GOOD_A),
        record(1, 0.90, A),
        record(3, 0.95, (31, 5, 41, 15)),  # B as class 3
        record(2, 0.80, (59, 5, 69, 15)),  # a poor C
        record(1, 0.70, (84, 5, 94, 15)),  # a poor D, as class 1
        record(2, 0.60, EMPTY, 3),
        record(1, 0.99, A, 2),
    ]
    return truth, records


def test_mixture():
    truth, records = mixture()
    report = explain_errors(truth, records)
    kinds = ["duplicate", None, "wrong class", "poor mask", "both", "background", None]
    assert report.per_record == kinds
    assert report.missed == [4]  # D: nothing of its class is near
    assert [mend.count for mend in report.kinds.values()] == [1] * 6
    # Class 1 has 3 cells, 2 found at ranks 1 and 2; class 2 none of its 2.
    base = ap(2 / 3)
    after = {
        # class 3 becomes class 1, between the two found: all three found.
        "wrong class": 1.0 / 2,
        "poor mask": (base + ap(1 / 2)) / 2,
        "both": base / 2,
        "duplicate": base / 2,
        "background": base / 2,
        "missed": base / 2,
    }
    assert {name: mend.ap50_after for name, mend in report.kinds.items()} == pytest.approx(after)
    assert report.sentence == (
        "Most is lost to records with a poor mask (1): mended, AP50 would be 0.584 instead of "
        "0.332 (+0.252)."
    )
    assert report.perfect["perfect masks"].ap50_after == pytest.approx(after["poor mask"])
    assert report.perfect["perfect suppression"].count == 1
    # Classes: B is found, and D's record now ranks, with a poor mask, below C's.
    assert report.perfect["perfect classes"].ap50_after == pytest.approx(0.5)


def test_table_of_errors():
    lines = explain_errors(*mixture()).table().splitlines()
    assert lines[0] == "| | number | AP50 if mended | gain |"
    assert lines[2].startswith("| as it is | | 0.3")
    assert lines[3] == "| wrong class | 1 | 0.500 | +0.168 |"
    assert len(lines) == 3 + 9


def test_without_truth_there_is_nothing_to_lose():
    report = explain_errors(truth_of([]), [record(1, 0.9, A)])
    assert report.ap50 is None and report.per_record == ["background"]
    assert report.kinds["background"] == type(report.kinds["background"])(1, None, None)
    assert "no cell to find" in report.sentence
    assert "| background | 1 | - | - |" in report.table()
    perfect = explain_errors(truth_of(TWO), [record(1, 0.9, A), record(1, 0.9, B)])
    assert perfect.sentence == "AP50 is 1.000, and no kind of error costs any of it by itself."


def test_a_record_in_a_crowd_is_no_error():
    truth = truth_of([(1, A), (1, B)])
    truth["annotations"][1]["iscrowd"] = 1
    report = explain_errors(truth, [record(1, 0.9, B), record(1, 0.8, A)])
    assert (report.ap50, report.per_record, report.missed) == (1.0, [None, None], [])


def test_records_of_other_data_are_refused():
    with pytest.raises(RecordsError, match="image_id 7"):
        explain_errors(truth_of(TWO), [record(1, 0.9, A, 7)])


def random_tissue(seed):
    """Return a truth of overlapping rectangles and records around them, ties included."""
    rng = np.random.default_rng(seed)

    def box():
        x, y = rng.integers(0, WIDTH - 12), rng.integers(0, HEIGHT - 10)
        return (x, y, x + rng.integers(4, 12), y + rng.integers(4, 10))

    images = [[(int(rng.integers(1, 4)), box()) for _ in range(9)] for _ in range(4)]
    records = []
    for image_id, cells in enumerate(images, start=1):
        for label, (x1, y1, x2, y2) in cells * 3:
            dx, dy = rng.integers(0, 4, 2)
            label = label if rng.random() < 0.7 else int(rng.integers(1, 4))
            moved = (x1 + dx, y1 + dy, min(x2 + dx, WIDTH), min(y2 + dy, HEIGHT))
            records.append(record(label, int(rng.integers(1, 9)) / 10, moved, image_id))
    return truth_of(*images), records


@pytest.mark.parametrize("seed", range(5))
def test_found_cells_are_those_of_the_score(seed):
    truth, records = random_tissue(seed)
    seen, matches = find_overlaps(truth, records), match_records(truth, records)
    ranks = np.lexsort((seen.image, -seen.score, seen.label))
    np.testing.assert_array_equal((seen.found >= 0)[ranks], matches.found[0])
    report = explain_errors(truth, records)
    assert report.ap50 == pytest.approx(score_records(truth, records).ap50, abs=1e-12)
    # Mends that only take false records or cells away, or find earlier, cannot cost anything.
    safe = [report.kinds[kind].gain for kind in KINDS if kind != "wrong class"]
    safe += [report.perfect[name].gain for name in ("perfect masks", "perfect suppression")]
    assert min(safe) >= -1e-12


def plain_ap50(points, cells, missed):
    """Return the mean AP of classes from (class, score, image, place, found), in plain loops."""
    values = []
    for label in sorted({cell["category_id"] for cell in cells}):
        number = sum(c["category_id"] == label and c["id"] not in missed for c in cells)
        ranked = sorted((-s, i, k, hit) for c, s, i, k, hit in points if c == label)
        hits = np.cumsum([hit for *_, hit in ranked])
        precision = [hits[k] / (k + 1) for k in range(len(hits))]
        levels = [
            max((p for p, h in zip(precision, hits, strict=True) if h / number >= level), default=0)
            for level in np.linspace(0, 1, 101)
            if number
        ]
        values.append(np.mean(levels) if levels else 0.0)
    return np.mean(values)


def plain_tide(truth, records):
    """Return {kind: (number, AP50 without it)}: TIDE's definitions, all pairs, one at a time."""
    cells = truth["annotations"]
    iou = mask_utils.iou(
        [entry["segmentation"] for entry in records],
        [cell["segmentation"] for cell in cells],
        [0] * len(cells),
    )
    kinds, nearest, taken = [None] * len(records), {}, set()
    alike = np.array([[r["image_id"] == c["image_id"] for c in cells] for r in records])
    same = np.array([[r["category_id"] == c["category_id"] for c in cells] for r in records])
    own, other = iou * alike * same, iou * alike * ~same
    by_score = sorted(range(len(records)), key=lambda k: -records[k]["score"])
    hits = set()
    for k in by_score:
        free = [c for c in range(len(cells)) if c not in taken and own[k, c] >= 0.5]
        if free:
            taken.add(max(free, key=lambda c: (own[k, c], c)))
            hits.add(k)
    for k in set(range(len(records))) - hits:
        if 0.1 <= own[k].max() < 0.5:
            kinds[k], nearest[k] = "poor mask", int(own[k].argmax())
        elif other[k].max() >= 0.5:
            kinds[k], nearest[k] = "wrong class", int(other[k].argmax())
        elif own[k].max() >= 0.5:
            kinds[k] = "duplicate"
        else:
            kinds[k] = "both" if other[k].max() >= 0.1 else "background"
    missed = {c["id"] for k, c in enumerate(cells) if k not in taken | set(nearest.values())}
    result = {}
    for kind in KINDS:
        points, claimed = [], set(taken)
        for k in by_score:
            label, hit = records[k]["category_id"], k in hits
            if kinds[k] == kind:
                if nearest.get(k) is None or nearest[k] in claimed:
                    continue
                claimed.add(nearest[k])
                label, hit = cells[nearest[k]]["category_id"], True
            points.append((label, records[k]["score"], records[k]["image_id"], k, hit))
        number = len(missed) if kind == "missed" else kinds.count(kind)
        result[kind] = (number, plain_ap50(points, cells, missed if kind == "missed" else ()))
    return result


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_those_of_a_plain_reference(seed):
    truth, records = random_tissue(seed)
    report = explain_errors(truth, records)
    for kind, (number, after) in plain_tide(truth, records).items():
        assert report.kinds[kind].count == number, kind
        assert report.kinds[kind].ap50_after == pytest.approx(after, abs=1e-12), kind


def test_perfect_masks_give_the_ap_of_true_masks():
    truth, records = random_tissue(3)
    seen = find_overlaps(truth, records)
    mended = []
    for k, entry in enumerate(records):
        cell = seen.found[k] if seen.found[k] >= 0 else seen.own[k]
        rles = seen.cells[cell]["segmentation"] if cell >= 0 else entry["segmentation"]
        mended.append(entry | {"segmentation": rles})
    best = {}
    for entry in sorted(mended, key=lambda entry: -entry["score"]):
        best.setdefault(
            (entry["image_id"], entry["category_id"], str(entry["segmentation"])), entry
        )
    expected = score_records(truth, list(best.values()))
    perfect = explain_errors(truth, records).perfect["perfect masks"]
    assert perfect.ap50_after == pytest.approx(expected.ap50, abs=1e-12)


def test_inputs_stay_as_they_are():
    truth, records = mixture()
    before = copy.deepcopy((truth, records))
    explain_errors(truth, records)
    worst_cells(truth, records)
    score_by_crowding(truth, records)
    assert (truth, records) == before


def test_curve_and_best_cut_by_hand():
    # Class 1: scores 0.9 found, 0.8 false and found (a tie is cut as one), 0.3 false; 3 cells.
    truth = truth_of([(1, A), (1, B), (1, C), (2, D)])
    found = [(1, 0.9, A), (1, 0.8, EMPTY), (1, 0.8, B), (1, 0.3, EMPTY)]
    curves = class_curves(truth, [record(*entry) for entry in found])
    curve = curves["epithelial"]
    assert (curve.truths, curve.records, curve.found) == (3, 4, 2)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.3]
    assert curve.precision.tolist() == pytest.approx([1, 2 / 3, 1 / 2])
    assert curve.recall.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert astuple(curve.best) == pytest.approx((0.8, 2 / 3, 2 / 3, 2 / 3))
    assert curve.ap50 == pytest.approx(ap(1 / 3) + ap(2 / 3, 2 / 3) - ap(1 / 3, 2 / 3))
    silent, absent = curves["lymphocyte"], curves["neutrophil"]
    assert (silent.ap50, silent.best, silent.truths) == (0.0, None, 1)
    assert (absent.ap50, absent.best, len(absent.thresholds)) == (None, None, 0)
    lines = curves_table(curves).splitlines()
    assert lines[2] == "| epithelial | 3 | 4 | 2 | 0.554 | 0.800 | 0.667 | 0.667 | 0.667 |"
    assert lines[4] == "| neutrophil | 0 | 0 | 0 | - | - | - | - | - |"


def test_parts_by_size():
    # 100 px found, 100 px missed, 200 px found behind a false record of 200 px.
    large = (55, 5, 75, 15)
    truth = truth_of([(1, A), (1, B), (1, large)])
    records = [record(1, 0.9, A), record(1, 0.9, (20, 20, 40, 30)), record(1, 0.8, large)]
    small, big = score_by_size(truth, records, bounds=[150])
    assert astuple(small) == pytest.approx((100, 150, 2, 1, 0.5, ap(0.5)))
    assert astuple(big) == pytest.approx((150, 200, 1, 1, 1.0, 0.5))
    assert score_by_size(truth, records)[0].high == 100  # terciles 100 and 133: two parts
    assert "| 150 to 200 | 1 | 1 | 1.000 | 0.500 |" in parts_table([big], "area, px2")
    assert score_by_size(truth_of([]), []) == []


def test_parts_by_crowding():
    # Within 25 px B has two neighbours, A and C one each, and D, in an image of its own, none.
    truth = truth_of([(1, A), (1, B), (1, C)], [(1, D)])
    records = [record(1, 0.9, B), record(1, 0.8, D, 2), record(1, 0.95, (2, 18, 8, 24))]
    parts = score_by_crowding(truth, records, bounds=[0, 1], within=25)
    assert [(part.truths, part.found) for part in parts] == [(1, 1), (2, 0), (1, 1)]
    # The false record has A alone within 25 px, so it counts as a cell without neighbours.
    assert [part.ap50 for part in parts] == pytest.approx([0.5, 0.0, 1.0])


def test_calibration_by_hand():
    truth = truth_of([(1, A), (1, B), (1, C)])
    found = [(1, 1.0, A), (1, 0.9, B), (1, 0.15, EMPTY), (1, 0.13, C)]
    result = calibrate(truth, [record(*entry) for entry in found])
    assert result.records.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert result.mean_score[[1, 9]].tolist() == pytest.approx([0.14, 0.95])
    assert result.share_found[[1, 9]].tolist() == [0.5, 1.0]
    assert result.error == pytest.approx((2 * 0.36 + 2 * 0.05) / 4)
    assert calibrate(truth, []).error is None


def test_a_score_on_an_edge_belongs_to_the_bin_above_it():
    records = [record(1, tenth / 10, EMPTY) for tenth in range(11)]
    assert calibrate(truth_of([(1, A)]), records).records.tolist() == [1] * 9 + [2]


def test_worst_cells_are_the_surest_and_the_largest():
    truth = truth_of([(1, A), (1, B), (1, (55, 5, 75, 15)), (2, D)])
    records = [
        record(1, 0.6, EMPTY),
        record(1, 0.8, (2, 18, 8, 24)),
        record(1, 0.8, (60, 20, 66, 28)),
        record(2, 0.9, D),
        record(2, 0.7, D),
    ]
    picks = worst_cells(truth, records, kind="background", count=2)
    assert [pick.record for pick in picks] == [records[1], records[2]]  # a tie: as given
    assert picks[0].cell is None and picks[0].iou == 0
    missed = worst_cells(truth, records, kind="missed")
    assert [pick.cell["id"] for pick in missed] == [3, 1, 2]
    (duplicate,) = worst_cells(truth, records, kind="duplicate")
    assert duplicate.record is records[4] and duplicate.rival is records[3]
    assert duplicate.cell["id"] == 4 and duplicate.iou == 1.0
    every = worst_cells(truth, records, count=1)
    assert [pick.kind for pick in every] == ["duplicate", "background", "missed"]
    with pytest.raises(SettingsError, match="kind 'blurred' is not one of wrong class"):
        worst_cells(truth, records, kind="blurred")


def test_worst_cells_of_the_mixture_name_their_cells():
    picks = {pick.kind: pick for pick in worst_cells(*mixture())}
    assert {kind: pick.cell and pick.cell["id"] for kind, pick in picks.items()} == {
        "wrong class": 2,
        "poor mask": 3,
        "both": 4,
        "duplicate": 1,
        "background": None,
        "missed": 4,
    }
    assert picks["both"].iou == pytest.approx(60 / 140)


def test_worst_images_by_their_own_ap50():
    truth = truth_of([(1, A)], [(1, A), (2, B)], [], [(2, A)])
    records = [record(1, 0.9, A), record(1, 0.2, A, 2), record(1, 0.9, A, 3), record(2, 0.1, A, 4)]
    assert worst_images(truth, records) == [(2, 0.5), (1, 1.0), (4, 1.0)]
    assert worst_images(truth, records, count=1) == [(2, 0.5)]
    with pytest.raises(RecordsError):
        worst_images(truth, [record(9, 0.9, A)])

"""Nuclei scores against values worked out by hand and against a plain, slow reference."""

import copy
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from cellseg.coco import make_record, mask_to_rle, rle_to_mask, sort_records
from cellseg.errors import RecordsError
from cellseg.evaluation import (
    choose_score_threshold,
    nuclei,
    score_nuclei,
    truth_from_targets,
)
from cellseg.evaluation.nuclei import nuclei_ratios, nuclei_sums

NAMES = ("epithelial", "lymphocyte", "neutrophil")
HEIGHT, WIDTH = 24, 80


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
        instance_map = np.zeros((1, HEIGHT, WIDTH), dtype=np.int32)
        for k, (_, (x1, y1, x2, y2)) in enumerate(cells):
            instance_map[0, y1:y2, x1:x2] = k + 1
        labels = np.array([label for label, _ in cells], dtype=np.int64)
        targets.append({"instance_map": instance_map, "labels": labels, "image_id": image_id})
    return truth_from_targets(targets, NAMES)


LEFT, RIGHT = (2, 3, 12, 13), (60, 3, 70, 13)  # 100 px each, 58 px apart
TWIN = (12, 3, 22, 13)  # touches LEFT
NONE = (None,) * 6

# (reason, cells, found, (pq, dq, sq, aji, dice, f_d))
CASES = [
    ("perfect", [LEFT, RIGHT], [LEFT, RIGHT], (1, 1, 1, 1, 1, 1)),
    ("touching cells stay two", [LEFT, TWIN], [LEFT, TWIN], (1, 1, 1, 1, 1, 1)),
    # 70 of 100 pixels found: IoU 0.7; Dice 2 * 70 / 170.
    ("part of a cell", [LEFT], [(2, 3, 9, 13)], (0.7, 1, 0.7, 0.7, 140 / 170, 1)),
    ("an IoU of 0.5 is no match", [LEFT], [(2, 3, 7, 13)], (0, 0, 0, 0.5, 2 / 3, 1)),
    # Halves of 60 and 40 px: one match of IoU 0.6, one false; AJI: 60 / (100 + 40); 2 centroids
    # near one cell: one found.
    (
        "a split cell",
        [LEFT],
        [(2, 3, 8, 13), (8, 3, 12, 13)],
        (0.6 * 2 / 3, 2 / 3, 0.6, 60 / 140, 1, 2 / 3),
    ),
    # Two cells of 100 in one record of 200: IoU 0.5 each, none matches; both take it: AJI
    # (100 + 100) / (200 + 200). Its centroid is 5 px from each of theirs: one is found.
    ("a merged pair", [LEFT, TWIN], [(2, 3, 22, 13)], (0, 0, 0, 0.5, 1, 2 / 3)),
    ("a missed cell", [LEFT, RIGHT], [LEFT], (2 / 3, 2 / 3, 1, 0.5, 200 / 300, 2 / 3)),
    ("an extra record", [LEFT], [LEFT, RIGHT], (2 / 3, 2 / 3, 1, 0.5, 200 / 300, 2 / 3)),
    ("empty truth", [], [LEFT], (0, 0, 0, 0, 0, 0)),
    ("empty prediction", [LEFT], [], (0, 0, 0, 0, 0, 0)),
    ("both empty", [], [], NONE),
    # The better record keeps the 50 px: the other is left with 50 px of its 100, no match.
    (
        "of overlapping records the better keeps the pixel",
        [LEFT, TWIN],
        [LEFT, (7, 3, 17, 13)],
        (0.5, 0.5, 1, 150 / 200, 300 / 350, 1),
    ),
    ("a record painted over does not count", [LEFT], [LEFT, (4, 5, 8, 9)], (1, 1, 1, 1, 1, 1)),
    # Centroids 12 px apart count as found, 13 px do not.
    ("12 px away", [LEFT], [(14, 3, 24, 13)], (0, 0, 0, 0, 0, 1)),
    ("13 px away", [LEFT], [(15, 3, 25, 13)], (0, 0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize(("reason", "cells", "found", "expected"), CASES, ids=[c[0] for c in CASES])
def test_scores_by_hand(reason, cells, found, expected):
    truth = truth_of([(1, box) for box in cells])
    records = [record(1, 0.9 - k / 10, box) for k, box in enumerate(found)]
    report = score_nuclei(truth, records, score_threshold=0.5)
    for scores in (report.pooled, report.mean, report.per_image[1]):
        assert astuple(scores) == (expected if None in expected else pytest.approx(expected))


def test_of_equal_ious_a_cell_takes_the_better_record():
    # Both share 20 of 100 px: IoU 20 / 100 within the cell, 40 / 200 for the larger.
    truth = truth_of([(1, LEFT)])
    inner, outer = (2, 3, 4, 13), (8, 3, 18, 17)  # outer: 140 px, 40 shared, union 200
    first = score_nuclei(
        truth, [record(1, 0.9, inner), record(1, 0.8, outer)], score_threshold=0.1
    ).pooled.aji
    second = score_nuclei(
        truth, [record(1, 0.8, inner), record(1, 0.9, outer)], score_threshold=0.1
    ).pooled.aji
    assert first == pytest.approx(20 / (100 + 140))
    assert second == pytest.approx(40 / (200 + 20))


def test_pooled_sums_and_mean_averages_over_images():
    # Image 1: two perfect cells; image 2: one missed; image 3 is empty and counts nowhere.
    truth = truth_of([(1, LEFT), (1, RIGHT)], [(2, LEFT)], [])
    records = [record(1, 0.9, LEFT), record(1, 0.9, RIGHT)]
    report = score_nuclei(truth, records, score_threshold=0.5)
    assert report.pooled.pq == pytest.approx(2 / (2 + 0.5))
    assert report.pooled.aji == pytest.approx(200 / 300)
    assert report.mean.pq == pytest.approx(0.5)
    assert [report.per_image[k].pq for k in (1, 2, 3)] == [1.0, 0.0, None]
    assert {name: scores.pq for name, scores in report.per_class.items()} == {
        "epithelial": 1.0, "lymphocyte": 0.0, "neutrophil": None,
    }  # fmt: skip


def test_pq_of_a_class_counts_records_of_another_as_false():
    truth = truth_of([(1, LEFT), (1, TWIN), (2, RIGHT)])
    records = [record(1, 0.9, LEFT), record(2, 0.9, TWIN), record(2, 0.9, RIGHT)]
    report = score_nuclei(truth, records, score_threshold=0.5)
    assert report.pooled.pq == 1.0
    # Class 1: one TP and one FN; class 2: one TP and one FP.
    assert report.per_class["epithelial"].pq == pytest.approx(1 / 1.5)
    assert report.per_class["lymphocyte"].pq == pytest.approx(1 / 1.5)


def test_every_score_of_a_class_by_hand():
    # Class 1: LEFT found as 70 of 100 px; TWIN found, but as class 2. Class 2: RIGHT missed.
    truth = truth_of([(1, LEFT), (1, TWIN), (2, RIGHT)])
    records = [record(1, 0.9, (2, 3, 9, 13)), record(2, 0.8, TWIN)]
    report = score_nuclei(truth, records, score_threshold=0.5)
    # One TP of IoU 0.7 and one FN; of 200 true and 70 found pixels 70 are shared.
    assert astuple(report.per_class["epithelial"]) == pytest.approx(
        (0.7 / 1.5, 1 / 1.5, 0.7, 70 / 200, 140 / 270, 2 / 3)
    )
    assert astuple(report.per_class["lymphocyte"]) == (0,) * 6  # one FN, one FP, far apart
    assert astuple(report.per_class["neutrophil"]) == NONE
    # Pairs: LEFT as class 1; TWIN (1) as 2. Without a pair: RIGHT. Class 1: one TP, one mixed
    # pair; class 2: the mixed pair and RIGHT.
    assert report.per_class_f_c == {
        "epithelial": pytest.approx(2 / (2 + 2)), "lymphocyte": 0.0, "neutrophil": None,
    }  # fmt: skip


def test_centroids_are_paired_at_the_least_sum_of_distances():
    # To pair each cell with a record within 12 px takes 10 + 11 px; the least sum is 0 + 14.9 px,
    # of which the long pair goes: one of two is found, as by HoVer-Net's code.
    near, far = (2, 2, 6, 6), (12, 2, 16, 6)
    truth = truth_of([(1, near), (1, far)])
    records = [record(1, 0.9, far), record(1, 0.8, (12, 13, 16, 17))]
    assert score_nuclei(truth, records, score_threshold=0.5).pooled.f_d == 2 / 4


def test_an_image_of_too_many_nuclei_has_no_f_d(monkeypatch):
    monkeypatch.setattr(nuclei, "MOST_DISTANCES", 1)
    truth = truth_of([(1, LEFT), (1, RIGHT)], [(1, LEFT)])
    records = [record(1, 0.9, LEFT), record(1, 0.9, LEFT, image_id=2)]
    report = score_nuclei(truth, records, score_threshold=0.5)
    assert (report.pooled.f_d, report.mean.f_d, report.per_image[1].f_d) == (None,) * 3
    assert report.per_image[2].f_d == report.per_image[2].pq == 1.0
    assert report.pooled.pq == pytest.approx(2 / 2.5)
    assert report.per_class_f_c["epithelial"] is None


def test_a_record_at_the_threshold_counts():
    truth, records = truth_of([(1, LEFT)]), [record(1, 0.5, LEFT)]
    assert score_nuclei(truth, records, score_threshold=0.5).pooled.pq == 1.0
    assert score_nuclei(truth, records, score_threshold=0.51).pooled.pq == 0.0


def test_where_annotations_overlap_the_first_keeps_the_pixel():
    truth = truth_of([(1, LEFT), (1, TWIN)])
    truth["annotations"][1]["segmentation"] = rle(7, 3, 17, 13)
    records = [record(1, 0.9, LEFT), record(1, 0.8, (12, 3, 17, 13))]
    assert score_nuclei(truth, records, score_threshold=0.5).pooled.pq == 1.0


def test_the_chosen_cut_weighs_pq_and_aji():
    truth = truth_of([(1, LEFT), (1, RIGHT)])
    records = [record(1, 0.8, LEFT), record(1, 0.3, (60, 3, 64, 13))]
    # With the part of the right cell PQ is 1 / 2 and AJI 140 / 200; without 2 / 3 and 100 / 200.
    assert choose_score_threshold(truth, records) == 0.05


def test_ties_of_the_chosen_cut_give_the_smallest():
    truth = truth_of([(1, LEFT)])
    records = [record(1, 0.8, LEFT), record(1, 0.3, RIGHT)]
    # Above 0.3 the false record is gone, up to 0.8 the true one stays.
    assert choose_score_threshold(truth, records) == 0.35
    assert choose_score_threshold(truth, records, thresholds=(0.7, 0.2, 0.5)) == 0.5
    assert choose_score_threshold(truth_of([]), []) == 0.05


def test_the_table_names_every_score():
    report = score_nuclei(truth_of([(1, LEFT)]), [record(1, 0.9, LEFT)], score_threshold=0.5)
    lines = report.table().splitlines()
    assert lines[:3] == [
        "| | pooled | mean over images |",
        "|---|---|---|",
        "| PQ | 1.000 | 1.000 |",
    ]
    assert lines[-1] == "| F_d | 1.000 | 1.000 |"


def test_records_of_other_data_are_refused():
    with pytest.raises(RecordsError, match="image_id 5 is not in the truth"):
        score_nuclei(truth_of([]), [record(1, 0.9, LEFT, image_id=5)], score_threshold=0.5)


def slow_scores(cells, records):
    """Return (pq, dq, sq, aji, dice, f_d) of bool masks, one nucleus after the other."""
    cells, records = drop_empty(settle(cells)), drop_empty(settle(records))
    if not cells and not records:
        return NONE
    iou = np.array([[(t & p).sum() / (t | p).sum() for p in records] for t in cells])
    iou = iou.reshape(len(cells), len(records))
    tp = int((iou > 0.5).sum())
    dq = tp / (tp + (len(records) - tp) / 2 + (len(cells) - tp) / 2)
    sq = iou[iou > 0.5].mean() if tp else 0.0
    shared = union = 0
    used = set()
    for t, row in zip(cells, iou, strict=True):
        if row.max(initial=0) == 0:
            union += t.sum()
            continue
        best = int(row.argmax())
        used.add(best)
        shared += (t & records[best]).sum()
        union += (t | records[best]).sum()
    union += sum(p.sum() for k, p in enumerate(records) if k not in used)
    empty = np.zeros((HEIGHT, WIDTH), dtype=bool)
    true, found = np.any([empty, *cells], axis=0), np.any([empty, *records], axis=0)
    dice = 2 * (true & found).sum() / (true.sum() + found.sum())
    centres = [np.reshape([centre(m) for m in side], (-1, 2)) for side in (cells, records)]
    apart = np.sqrt(((centres[0][:, None] - centres[1][None]) ** 2).sum(axis=-1))
    pairs = (apart[linear_sum_assignment(apart)] <= 12).sum()
    return dq * sq, dq, sq, shared / union, dice, 2 * pairs / (len(cells) + len(records))


def settle(masks):
    """Return masks less what the masks before them cover."""
    taken = np.zeros((HEIGHT, WIDTH), dtype=bool)
    settled = []
    for mask in masks:
        settled.append(mask & ~taken)
        taken |= mask
    return settled


def drop_empty(masks):
    return [mask for mask in masks if mask.any()]


def centre(mask):
    return np.argwhere(mask).mean(axis=0)


boxes = st.tuples(st.integers(0, 30), st.integers(0, 16), st.integers(1, 20), st.integers(1, 8))
scores = st.sampled_from([0.2, 0.4, 0.5, 0.7, 0.9])


def placed(box):
    x, y, width, height = box
    return x, y, min(x + width, WIDTH), min(y + height, HEIGHT)


@settings(max_examples=60, deadline=None)
@given(st.lists(boxes, max_size=8), st.lists(st.tuples(boxes, scores), max_size=10))
def test_equals_the_slow_reference(cells, found):
    truth = truth_of([(1, LEFT)] * len(cells), [(1, RIGHT)])
    for annotation, box in zip(truth["annotations"], cells, strict=False):
        annotation["segmentation"] = rle(*placed(box))
    records = [record(1, score, placed(box)) for box, score in found]
    before = copy.deepcopy((truth, records))
    report = score_nuclei(truth, records, score_threshold=0.4)
    kept = [entry for entry in sort_records(records) if entry["score"] >= 0.4]
    sides = [
        [rle_to_mask(entry["segmentation"]) for entry in side]
        for side in (truth["annotations"][: len(cells)], kept)
    ]
    expected = slow_scores(*sides)
    scores = astuple(report.per_image[1])
    assert scores == (NONE if None in expected else pytest.approx(expected, abs=1e-12))
    assert (truth, records) == before


def test_sums_of_images_add_up_to_the_pooled_scores():
    truth = truth_of([(1, LEFT), (1, TWIN)], [(2, LEFT)], [(1, RIGHT)])
    records = [record(1, 0.9, LEFT), record(2, 0.8, (2, 3, 9, 13), image_id=2)]
    sums = nuclei_sums(truth, records, score_threshold=0.5)
    pooled = score_nuclei(truth, records, score_threshold=0.5).pooled
    assert tuple(nuclei_ratios(sums.sum(axis=0)).values()) == pytest.approx(astuple(pooled))
    twice = nuclei_ratios(np.array([[1, 1, 1], [2, 0, 0]]) @ sums)
    assert twice["pq"] == pytest.approx([pooled.pq, 1 / 1.5])

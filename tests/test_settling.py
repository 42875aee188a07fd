"""One record a cell: classes that compete for it are added up."""

import random

import numpy as np

from cellseg.coco import make_record, mask_to_rle
from cellseg.inference import settle_classes


def record(score, box, category_id, image_id=1):
    x1, y1, x2, y2 = box
    mask = np.zeros((30, 50), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return make_record(image_id, category_id, score, mask_to_rle(mask))


CELL, ALMOST, APART = (5, 5, 15, 15), (5, 5, 15, 14), (20, 5, 30, 15)


def summary(records):
    return [(r["image_id"], r["category_id"], round(r["score"], 9), r["bbox"]) for r in records]


def test_classes_of_one_cell_are_added_and_the_best_is_kept():
    records = [record(0.4, CELL, 2), record(0.3, ALMOST, 1), record(0.2, APART, 3)]
    assert summary(settle_classes(records)) == [
        (1, 2, 0.7, [5, 5, 10, 10]),
        (1, 3, 0.2, [20, 5, 10, 10]),
    ]


def test_of_one_class_the_best_score_counts_once():
    records = [record(0.4, CELL, 2), record(0.35, ALMOST, 2), record(0.1, CELL, 1)]
    assert summary(settle_classes(records)) == [(1, 2, 0.5, [5, 5, 10, 10])]


def test_a_sum_is_capped_at_one():
    records = [record(0.9, CELL, 1), record(0.8, ALMOST, 2)]
    assert summary(settle_classes(records)) == [(1, 1, 1.0, [5, 5, 10, 10])]


def test_images_and_masks_that_overlap_little_are_left_apart():
    records = [record(0.5, CELL, 1), record(0.4, (10, 5, 20, 15), 2), record(0.3, CELL, 2, 7)]
    assert [(r["image_id"], r["score"]) for r in settle_classes(records)] == [
        (1, 0.5), (1, 0.4), (7, 0.3),
    ]  # fmt: skip


def test_order_does_not_matter_and_nothing_is_changed():
    records = [record(0.1 * k, (k, 5, k + 8, 15), 1 + k % 3) for k in range(1, 10)]
    before = [dict(r) for r in records]
    expected = settle_classes(records)
    random.Random(0).shuffle(records)
    assert settle_classes(records) == expected
    assert sorted(map(str, records)) == sorted(map(str, before))
    assert settle_classes([]) == []

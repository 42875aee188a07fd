"""Pairs of records and cells, worked out by hand."""

import numpy as np
import pytest

from cellseg.coco import make_record, mask_to_rle
from cellseg.evaluation.pairs import find_pairs, pair_masks, positions_of, take_cells

HEIGHT, WIDTH = 30, 50
CELL, HALF, APART = (5, 5, 15, 15), (10, 5, 20, 15), (30, 5, 40, 15)  # CELL and HALF: IoU 1/3


def entry(box, category_id=1, image_id=1):
    x1, y1, x2, y2 = box
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return make_record(image_id, category_id, 0.5, mask_to_rle(mask))


def listed(pairs):
    return sorted(zip(*(column.tolist() for column in pairs), strict=True))


@pytest.mark.parametrize(
    ("reason", "iou_threshold", "expected"),
    [
        ("one that only touches a box is no pair", 0.0, [(0, 0, 1 / 3), (1, 0, 1.0)]),
        ("the threshold itself is enough", 1 / 3, [(0, 0, 1 / 3), (1, 0, 1.0)]),
        ("and no less", 0.34, [(1, 0, 1.0)]),
    ],
)
def test_masks_are_paired_from_a_threshold_on(reason, iou_threshold, expected):
    records = [entry(HALF), entry(CELL), entry((15, 5, 25, 15)), entry(APART)]
    assert listed(pair_masks(records, [entry(CELL)], iou_threshold=iou_threshold)) == expected


@pytest.mark.parametrize(
    ("same_class", "expected"),
    [
        (True, [(0, 2, 1.0), (2, 1, 1 / 3)]),
        (False, [(0, 2, 1.0), (1, 0, 1.0), (2, 1, 1 / 3)]),
    ],
)
def test_pairs_lie_in_one_image_and_of_one_class_if_asked(same_class, expected):
    records = [entry(CELL, 1, 7), entry(APART, 2, 3), entry(HALF, 2, 5), entry(CELL, 1, 9)]
    cells = [entry(APART, 1, 3), entry(CELL, 2, 5), entry(CELL, 1, 7), entry(CELL, 1, 8)]
    image, cell_image = (
        np.array([one["image_id"] for one in side], dtype=np.int64) for side in (records, cells)
    )
    pairs = find_pairs(records, image, cells, cell_image, iou_threshold=0.1, same_class=same_class)
    assert listed(pairs) == expected


def test_without_records_or_cells_there_are_no_pairs():
    nothing = np.zeros(0, dtype=np.int64)
    one, here = [entry(CELL)], np.array([1])
    for sides in (([], nothing, one, here), (one, here, [], nothing), ([], nothing, [], nothing)):
        assert listed(find_pairs(*sides, iou_threshold=0.1, same_class=True)) == []
        assert listed(pair_masks(sides[0], sides[2], iou_threshold=0.1)) == []


@pytest.mark.parametrize(
    ("reason", "pairs", "expected"),
    [
        ("the better record chooses first, whatever the IoUs", [(0, 0, 0.6), (1, 0, 0.9)], [0, -1]),
        ("what it has left is free", [(0, 0, 0.6), (0, 1, 0.7), (1, 1, 0.9), (1, 0, 0.5)], [1, 0]),
        ("of equal cells the last, as in pycocotools", [(0, 0, 0.5), (0, 1, 0.5)], [1, -1]),
        ("without a pair no record has a cell", [], [-1, -1]),
    ],
)
def test_records_in_turn_take_the_free_cell_of_the_highest_iou(reason, pairs, expected):
    record, cell, iou = np.array(pairs).reshape(-1, 3).T
    assert take_cells(record.astype(int), cell.astype(int), iou, 2).tolist() == expected


def test_positions_of_ids_with_gaps():
    found = positions_of(np.array([7, 3, 7, 7, 12]))
    assert {name: place.tolist() for name, place in found.items()} == {
        3: [1], 7: [0, 2, 3], 12: [4],
    }  # fmt: skip
    assert positions_of(np.zeros(0, dtype=np.int64)) == {}

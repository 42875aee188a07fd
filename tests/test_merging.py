"""Overlaps, suppression and agreement against values worked out by hand and pycocotools."""

import copy
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from cellseg.coco import make_record, mask_to_rle, sort_records
from cellseg.inference.merging import cluster_scores, fuse, suppress
from cellseg.overlap import box_neighbours, neighbour_ious

HEIGHT, WIDTH = 30, 50


def rectangle(x1, y1, x2, y2, size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask_to_rle(mask)


def record(score, box, category_id=1, image_id=1, size=(HEIGHT, WIDTH)):
    return make_record(image_id, category_id, score, rectangle(*box, size=size))


def scores_of(records):
    return [entry["score"] for entry in records]


PAIRS = [
    ("the same square", (5, 5, 15, 15), (5, 5, 15, 15), 1.0),
    ("moved by half a side: 50 of 150 pixels", (5, 5, 15, 15), (10, 5, 20, 15), 1 / 3),
    ("one within the other: 4 of 100 pixels", (5, 5, 15, 15), (7, 8, 9, 10), 0.04),
    ("a corner of one pixel: 1 of 199", (5, 5, 15, 15), (14, 14, 24, 24), 1 / 199),
    ("one pixel each, the same", (3, 2, 4, 3), (3, 2, 4, 3), 1.0),
    (
        "whole columns, so that runs go on from column to column",
        (0, 0, 4, 30),
        (2, 0, 6, 30),
        1 / 3,
    ),
    ("the whole image and its last pixel", (0, 0, 50, 30), (49, 29, 50, 30), 1 / 1500),
]


@pytest.mark.parametrize(("reason", "a", "b", "expected"), PAIRS, ids=[c[0] for c in PAIRS])
def test_iou_of_two_rectangles(reason, a, b, expected):
    i, j, iou = neighbour_ious([rectangle(*a), rectangle(*b)])
    assert (i.tolist(), j.tolist()) == ([0], [1])
    assert iou.tolist() == [expected]


def test_pairs_whose_boxes_only_touch_are_not_listed():
    i, _, _ = neighbour_ious([rectangle(5, 5, 15, 15), rectangle(15, 5, 25, 15)])
    assert i.size == 0


def test_boxes_overlap_but_masks_do_not():
    corner = np.zeros((HEIGHT, WIDTH), dtype=bool)
    corner[5:15, 5] = corner[14, 5:15] = True
    _, _, iou = neighbour_ious([mask_to_rle(corner), rectangle(8, 6, 12, 12)])
    assert iou.tolist() == [0.0]


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_masks_have_no_pairs(number):
    assert [part.size for part in neighbour_ious([rectangle(1, 1, 5, 5)] * number)] == [0, 0, 0]


def test_empty_masks_have_no_neighbours():
    assert neighbour_ious([rectangle(0, 0, 0, 0)] * 2)[0].size == 0


def test_masks_of_different_size_are_refused():
    with pytest.raises(ValueError, match=r"\(30, 50\), \(50, 30\)"):
        neighbour_ious([rectangle(0, 0, 2, 2), rectangle(0, 0, 2, 2, size=(50, 30))])


def test_runs_that_do_not_fill_the_mask_are_refused():
    with pytest.raises(ValueError, match="do not fill"):
        neighbour_ious([{"size": [HEIGHT, WIDTH], "counts": "112"}])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.sampled_from([0.02, 0.3, 0.9]))
def test_neighbours_agree_with_pycocotools(seed, number, density):
    generator = np.random.default_rng(seed)
    rles = []
    for _ in range(number):
        mask = np.zeros((13, 17), dtype=bool)
        y, x = generator.integers(0, 11), generator.integers(0, 15)
        h, w = generator.integers(1, 14), generator.integers(1, 18)
        part = mask[y : y + h, x : x + w]
        part[:] = generator.random(part.shape) < density
        rles.append(mask_to_rle(mask))
    i, j, iou = neighbour_ious(rles)
    found = np.zeros((number, number))
    found[i, j] = iou
    reference = np.triu(mask_utils.iou(rles, rles, [0] * number), k=1)
    assert np.array_equal(found, reference)
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(i)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.integers(0, 60)] * 2, *[st.sampled_from([0, 1, 3, 20, 90])] * 2),
        max_size=25,
    )
)
def test_box_neighbours_are_all_pairs_that_share_area_in_their_group(spans):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in spans]).reshape(-1, 4)
    groups = np.arange(len(boxes)) % 2
    i, j = box_neighbours(boxes, groups)
    expected = [
        (a, b)
        for a in range(len(boxes))
        for b in range(a + 1, len(boxes))
        if groups[a] == groups[b]
        and (np.minimum(boxes[a, 2:], boxes[b, 2:]) > np.maximum(boxes[a, :2], boxes[b, :2])).all()
    ]
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == expected


SUPPRESSIONS = [
    ("nothing in, nothing out", [], 0.5, []),
    ("one record stays", [record(0.4, (5, 5, 15, 15))], 0.5, [0.4]),
    (
        "the worse of two that show one cell goes (80 of 120 pixels)",
        [record(0.4, (5, 5, 15, 15)), record(0.9, (7, 5, 17, 15))],
        0.5,
        [0.9],
    ),
    (
        "an IoU equal to the threshold does not suppress (50 of 100 pixels)",
        [record(0.9, (5, 5, 15, 15)), record(0.4, (5, 5, 10, 15))],
        0.5,
        [0.9, 0.4],
    ),
    (
        "touching cells stay",
        [record(0.9, (5, 5, 15, 15)), record(0.4, (15, 5, 25, 15))],
        0.0,
        [0.9, 0.4],
    ),
    (
        "another class stays",
        [record(0.9, (5, 5, 15, 15)), record(0.4, (5, 5, 15, 15), category_id=2)],
        0.5,
        [0.9, 0.4],
    ),
    (
        "another image stays, and may have another size",
        [
            record(0.9, (5, 5, 15, 15)),
            record(0.4, (5, 5, 15, 15), image_id=2, size=(20, 40)),
        ],
        0.5,
        [0.9, 0.4],
    ),
    (
        "a suppressed record suppresses nothing (a-b and b-c share 80 of 120, a-c 60 of 140)",
        [
            record(0.9, (5, 5, 15, 15)),
            record(0.8, (7, 5, 17, 15)),
            record(0.7, (9, 5, 19, 15)),
        ],
        0.5,
        [0.9, 0.7],
    ),
]


@pytest.mark.parametrize(
    ("reason", "records", "threshold", "expected"), SUPPRESSIONS, ids=[c[0] for c in SUPPRESSIONS]
)
def test_suppression(reason, records, threshold, expected):
    before = copy.deepcopy(records)
    assert scores_of(suppress(records, iou_threshold=threshold)) == expected
    assert records == before


def test_equal_scores_are_decided_by_the_mask_not_by_the_order():
    pair = [record(0.5, (5, 5, 15, 15)), record(0.5, (7, 5, 17, 15))]
    best = min(pair, key=lambda entry: entry["segmentation"]["counts"])
    assert suppress(pair, iou_threshold=0.5) == [best]
    assert suppress(pair[::-1], iou_threshold=0.5) == [best]


def _crowd(seed, number=60, levels=5):
    """Return squares thrown onto two images, with few distinct scores so that ties occur."""
    generator = np.random.default_rng(seed)
    return [
        record(
            float(generator.integers(1, levels + 1)) / levels,
            (x, y, x + int(generator.integers(6, 10)), y + 8),
            category_id=int(generator.integers(1, 3)),
            image_id=int(generator.integers(1, 3)),
        )
        for x, y in generator.integers(0, [38, 20], size=(number, 2)).tolist()
    ]


def _greedy(records, threshold):
    """Suppress one record after the other, each by its IoU with all that are kept."""
    kept = []
    for entry in sort_records(records):
        rivals = [
            other["segmentation"]
            for other in kept
            if (other["image_id"], other["category_id"])
            == (entry["image_id"], entry["category_id"])
        ]
        ious = mask_utils.iou(rivals, [entry["segmentation"]], [0]) if rivals else np.zeros(1)
        if not (ious > threshold).any():
            kept.append(entry)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7])
def test_suppression_is_the_greedy_one_in_any_order(threshold):
    for seed in range(4):
        records = _crowd(seed, number=120)
        expected = _greedy(records, threshold)
        assert 0 < len(expected) < len(records)
        random.Random(seed).shuffle(records)
        assert suppress(records, iou_threshold=threshold) == expected


CELL, MOVED, FAR = (5, 5, 15, 15), (6, 5, 16, 15), (30, 5, 40, 15)  # CELL, MOVED: 90 of 110

FUSIONS = [
    ("no member", [], None, []),
    ("members that saw nothing", [[], []], None, []),
    ("one member keeps its scores", [[record(0.8, CELL)]], None, [0.8]),
    ("two that agree: the mean", [[record(0.8, CELL)], [record(0.4, MOVED)]], None, [0.6]),
    ("one of two saw it: half", [[record(0.8, CELL)], []], None, [0.4]),
    ("one of two saw it, of weight 3 to 1", [[record(0.8, CELL)], []], [3, 1], [0.6]),
    (
        "two records of one member count once, by the better",
        [[record(0.8, CELL), record(0.7, MOVED)], [record(0.4, CELL)]],
        None,
        [0.6],
    ),
    (
        "agreement overtakes one loud member",
        [[record(0.9, FAR), record(0.7, CELL)], [record(0.7, MOVED)]],
        None,
        [0.7, 0.45],
    ),
]


@pytest.mark.parametrize(
    ("reason", "members", "weights", "expected"), FUSIONS, ids=[c[0] for c in FUSIONS]
)
def test_agreement(reason, members, weights, expected):
    before = copy.deepcopy(members)
    fused = fuse(members, iou_threshold=0.5, weights=weights)
    assert scores_of(fused) == pytest.approx(expected, abs=1e-12)
    assert members == before


def test_of_each_cell_the_best_score_of_each_member_counts():
    owners = np.array([0, 0, 2, 0, 2])  # record 0 stands for 1 and 3, record 2 for 4
    kept, cell, best = cluster_scores(owners, [0, 2, 2, 2, 0], [0.9, 0.5, 0.7, 0.6, 0.1], 3)
    assert (kept.tolist(), cell.tolist()) == ([0, 2], [0, 0, 1, 0, 1])
    assert best.tolist() == [[0.9, 0, 0.6], [0.1, 0, 0.7]]
    nothing = np.zeros(0, dtype=np.int64)
    assert cluster_scores(nothing, nothing, nothing, 3)[2].shape == (0, 3)


def test_the_mask_is_that_of_the_best_record():
    fused = fuse([[record(0.4, CELL)], [record(0.8, MOVED)]], iou_threshold=0.5)
    assert fused[0]["segmentation"] == rectangle(*MOVED)
    assert fused[0]["bbox"] == [6, 5, 10, 10]


def test_a_record_joins_the_best_of_two_that_cover_it():
    # The middle overlaps both by 60 of 100 + 40 pixels; left and right share 20 of 180.
    left, right, middle = (0, 5, 10, 15), (8, 5, 18, 15), (4, 5, 14, 15)
    members = [[record(0.9, left), record(0.8, right)], [record(0.5, middle)]]
    assert scores_of(fuse(members, iou_threshold=0.4)) == pytest.approx([0.7, 0.4])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_agreement_of_copies_is_suppression_of_one_to_the_bit(seed, copies):
    records = _crowd(seed, levels=7)
    weights = np.random.default_rng(seed).uniform(0.1, 3, copies).tolist()
    fused = fuse([records] * copies, iou_threshold=0.5, weights=weights)
    assert fused == suppress(records, iou_threshold=0.5)


def test_agreement_does_not_depend_on_the_order_of_members_or_records():
    members = [_crowd(seed, levels=3) for seed in range(3)]
    weights = [0.3, 0.7, 1.1]
    expected = fuse(members, iou_threshold=0.4, weights=weights)
    for seed in range(3):
        order = random.Random(seed).sample(range(3), 3)
        shuffled = [random.Random(seed).sample(members[k], len(members[k])) for k in order]
        assert expected == fuse(shuffled, iou_threshold=0.4, weights=[weights[k] for k in order])


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, float("nan")], [1, -1]])
def test_weights_that_cannot_work_are_refused(weights):
    with pytest.raises(ValueError, match="2 numbers > 0"):
        fuse([[], []], iou_threshold=0.5, weights=weights)

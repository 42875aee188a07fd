"""Scores against values worked out by hand and against pycocotools."""

import contextlib
import copy
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cellseg.coco import make_record, mask_to_rle, rle_area
from cellseg.errors import RecordsError
from cellseg.evaluation import (
    confusion_matrix,
    dataset_truth,
    score_records,
    truth_from_targets,
)

NAMES = ("epithelial", "lymphocyte", "neutrophil")
HEIGHT, WIDTH = 24, 40


def rle(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask_to_rle(mask)


def record(category_id, score, box, image_id=1):
    return make_record(image_id, category_id, score, rle(*box))


def target(cells, image_id=1):
    """Return a target of rectangles (label, (x1, y1, x2, y2))."""
    instance_map = np.zeros((1, HEIGHT, WIDTH), dtype=np.int32)
    for k, (_, (x1, y1, x2, y2)) in enumerate(cells):
        instance_map[0, y1:y2, x1:x2] = k + 1
    labels = np.array([label for label, _ in cells], dtype=np.int64)
    return {"instance_map": instance_map, "labels": labels, "image_id": image_id}


def truth_of(*images):
    targets = [target(cells, image_id) for image_id, cells in enumerate(images, start=1)]
    return truth_from_targets(targets, NAMES)


def pycocotools_scores(truth, records, cap=100):
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = copy.deepcopy(truth)
        ground_truth.createIndex()
        results = ground_truth.loadRes(copy.deepcopy(records))
        evaluation = COCOeval(ground_truth, results, "segm")
        evaluation.params.maxDets = [1, 10, cap]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return [part[part > -1].mean() for part in (precision, precision[0], precision[5])]


LEFT, MIDDLE, RIGHT = (2, 3, 12, 13), (15, 3, 25, 13), (28, 3, 38, 13)
HALF_RIGHT = (28, 3, 38, 10)  # 70 of 100 pixels of RIGHT


def test_truth_of_a_target():
    truth = truth_of([(2, LEFT), (1, (20, 5, 21, 6))], [])
    assert truth["images"] == [
        {"id": 1, "height": HEIGHT, "width": WIDTH},
        {"id": 2, "height": HEIGHT, "width": WIDTH},
    ]
    assert truth["categories"][2] == {"id": 3, "name": "neutrophil"}
    assert truth["annotations"] == [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 2,
            "area": 100,
            "bbox": [2, 3, 10, 10],
            "iscrowd": 0,
            "segmentation": rle(*LEFT),
        },
        {
            "id": 2,
            "image_id": 1,
            "category_id": 1,
            "area": 1,
            "bbox": [20, 5, 1, 1],
            "iscrowd": 0,
            "segmentation": rle(20, 5, 21, 6),
        },
    ]


def test_truth_of_a_dataset_is_that_of_its_untransformed_targets(capsys):
    targets = [target([(1, LEFT)], 7), target([], 9)]

    class Dataset:
        class_names = NAMES

        def __len__(self):
            return len(targets)

        def read(self, index):
            return None, targets[index]

    assert dataset_truth(Dataset()) == truth_from_targets(targets, NAMES)
    assert capsys.readouterr() == ("", "")


# AP50 worked out on COCO's 101 recall levels: with one of two cells found first, levels 0 to 0.50
# (51 of 101) have precision 1, the others 0.
CASES = [
    ("everything found", [(1, LEFT), (2, RIGHT)], [(1, 0.9, LEFT), (2, 0.8, RIGHT)], 1.0),
    ("nothing predicted scores 0", [(1, LEFT), (2, RIGHT)], [], 0.0),
    ("the wrong class", [(1, LEFT)], [(2, 0.9, LEFT)], 0.0),
    ("one of two cells", [(1, LEFT), (1, RIGHT)], [(1, 0.9, LEFT)], 51 / 101),
    ("one of two classes", [(1, LEFT), (2, RIGHT)], [(1, 0.9, LEFT)], 0.5),
    (
        "a false cell after the true one costs nothing",
        [(1, LEFT)],
        [(1, 0.9, LEFT), (1, 0.1, RIGHT)],
        1.0,
    ),
    (
        "a false cell before the true one halves precision",
        [(1, LEFT)],
        [(1, 0.1, LEFT), (1, 0.9, RIGHT)],
        0.5,
    ),
    (
        "a second record of the same cell is false",
        [(1, LEFT), (1, RIGHT)],
        [(1, 0.9, LEFT), (1, 0.8, LEFT), (1, 0.7, RIGHT)],
        (51 + 50 * 2 / 3) / 101,
    ),
    (
        "a predicted class without truth is left out",
        [(1, LEFT)],
        [(1, 0.9, LEFT), (2, 0.8, RIGHT)],
        1.0,
    ),
]


@pytest.mark.parametrize(("reason", "cells", "found", "ap50"), CASES, ids=[c[0] for c in CASES])
def test_ap50_by_hand(reason, cells, found, ap50):
    scores = score_records(truth_of(cells), [record(*entry) for entry in found])
    assert scores.ap50 == pytest.approx(ap50, abs=1e-12)
    assert scores.ap50_100 == pytest.approx(ap50, abs=1e-12)


def test_ap_takes_the_mean_over_ten_ious():
    scores = score_records(truth_of([(1, RIGHT)]), [record(1, 0.9, HALF_RIGHT)])
    # IoU 0.70 passes 0.50, 0.55, 0.60, 0.65, 0.70 of the ten.
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((0.5, 1.0, 0.0))


def test_a_class_absent_from_the_truth_is_none_and_outside_the_mean():
    scores = score_records(truth_of([(1, LEFT), (3, RIGHT)]), [record(3, 0.9, RIGHT)])
    assert scores.ap50_per_class == {"epithelial": 0.0, "lymphocyte": None, "neutrophil": 1.0}
    assert scores.ap50 == pytest.approx(0.5)


@pytest.mark.parametrize("records", [[], [record(1, 0.9, LEFT)]], ids=["nothing", "something"])
def test_without_truth_there_is_no_score(records):
    scores = score_records(truth_of([]), records)
    assert {scores.ap, scores.ap50, scores.ap75, scores.ap50_100, scores.ap_100} == {None}
    assert scores.ap50_per_class == dict.fromkeys(NAMES)


def test_500_perfect_cells_of_one_class():
    instance_map = np.kron(
        np.arange(1, 501, dtype=np.int32).reshape(20, 25), np.ones((3, 4), dtype=np.int32)
    )[None]
    truth = truth_from_targets(
        [{"instance_map": instance_map, "labels": np.ones(500, dtype=int), "image_id": 1}], NAMES
    )
    records = [
        make_record(1, 1, 0.5 + k / 1000, cell["segmentation"])
        for k, cell in enumerate(truth["annotations"])
    ]
    scores = score_records(truth, records)
    assert scores.ap == scores.ap50 == 1.0
    # 100 of 500 cells reach recall 0.2: 21 of the 101 levels.
    assert scores.ap_100 == pytest.approx(21 / 101)
    assert round(scores.ap_100, 3) == 0.208
    assert scores.ap_100 == pytest.approx(pycocotools_scores(truth, records)[0], abs=1e-9)


def _scene(seed, images=3, cells=130):
    """Return truth and records of jittered cells with missed, false and tied ones."""
    generator = np.random.default_rng(seed)
    targets, records = [], []
    for image_id in range(1, images + 1):
        layer = np.zeros((1, 90, 120), dtype=np.int32)
        labels = generator.choice([1, 1, 2], size=cells)
        for k in range(cells):
            y, x = divmod(k, 15)
            y, x = 9 * y + 1, 8 * x + 1
            layer[0, y : y + 7, x : x + 6] = k + 1
            for _ in range(generator.integers(0, 4)):
                mask = np.zeros(layer.shape[1:], dtype=bool)
                dy, dx = generator.integers(-1, 2, size=2)
                mask[y + dy : y + dy + 7, x + dx : x + dx + 6] = True
                score = round(float(generator.random()), 2)
                label = int(labels[k]) if generator.random() < 0.9 else 3
                records.append(make_record(image_id, label, score, mask_to_rle(mask)))
        targets.append({"instance_map": layer, "labels": labels, "image_id": image_id})
    return truth_from_targets(targets, NAMES), records


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pycocotools_at_100_and_uncapped(seed):
    truth, records = _scene(seed, cells=150)
    before = copy.deepcopy((truth, records))
    scores = score_records(truth, records)
    at_100 = [scores.ap_100, scores.ap50_100, scores.ap75_100]
    uncapped = [scores.ap, scores.ap50, scores.ap75]
    assert at_100 == pytest.approx(pycocotools_scores(truth, records), abs=1e-9)
    assert uncapped == pytest.approx(pycocotools_scores(truth, records, cap=1000), abs=1e-9)
    assert 0 < scores.ap < scores.ap50 < 1
    assert (truth, records) == before


def _dense_scene(seed, images, ties):
    """Return truth and records of overlapping rectangles whose scores take few values."""
    generator = np.random.default_rng(seed)

    def boxes(number):
        corner = generator.integers(0, (WIDTH - 8, HEIGHT - 6), (number, 2))
        return np.concatenate([corner, corner + generator.integers(3, 9, (number, 2))], axis=1)

    truth, records = truth_of(*[[]] * images), []
    for image_id in generator.permutation(images).tolist():
        cells = boxes(generator.integers(0, 25))
        found = np.concatenate([boxes(20), np.repeat(cells, 2, axis=0)])
        moved = found + generator.integers(-1, 2, found.shape)
        for box in cells.tolist():
            label, mask = int(generator.integers(1, 3)), rle(*box)
            cell = {"id": len(truth["annotations"]) + 1, "image_id": image_id + 1, "iscrowd": 0}
            cell |= {"category_id": label, "segmentation": mask, "area": int(rle_area([mask])[0])}
            truth["annotations"].append(cell)
        for box in moved[generator.random(len(moved)) < 0.8].clip(0).tolist():
            score = float(generator.integers(1, ties + 1)) / ties
            records.append(record(int(generator.integers(1, 4)), score, box, image_id + 1))
    order = generator.permutation(len(records))
    return truth, [records[k] for k in order]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([1, 2, 5, 100]))
def test_dense_and_tied_records_score_as_with_pycocotools(seed, images, ties):
    truth, records = _dense_scene(seed, images, ties)
    if not truth["annotations"] or not records:
        return
    scores = score_records(truth, records)
    assert [scores.ap_100, scores.ap50_100, scores.ap75_100] == pytest.approx(
        pycocotools_scores(truth, records), abs=1e-9
    )


def test_of_equal_ious_the_last_cell_is_taken_as_in_pycocotools():
    # The first record lies in the middle of two cells, the second on the latter alone.
    truth = truth_of([(1, LEFT), (1, RIGHT)])
    for cell, box in zip(truth["annotations"], [(2, 3, 12, 13), (4, 3, 14, 13)], strict=True):
        cell["segmentation"] = rle(*box)
    records = [record(1, 0.9, (3, 3, 13, 13)), record(1, 0.8, (5, 3, 15, 13))]
    scores = score_records(truth, records)
    expected = pycocotools_scores(truth, records)
    assert [scores.ap, scores.ap50, scores.ap75] == pytest.approx(expected, abs=1e-9)


def test_records_in_a_crowd_are_ignored_as_in_pycocotools():
    truth = truth_of([(1, LEFT), (1, RIGHT)])
    truth["annotations"][1] |= {"iscrowd": 1, "segmentation": rle(15, 0, 40, 24)}
    in_crowd = [record(1, 0.95, MIDDLE), record(1, 0.9, RIGHT)]
    half_in = record(1, 0.85, (10, 3, 20, 13))  # half of it lies in the crowd
    records = [*in_crowd, half_in, record(1, 0.8, LEFT), record(2, 0.7, RIGHT)]
    scores = score_records(truth, records)
    expected = pycocotools_scores(truth, records)
    assert [scores.ap, scores.ap50, scores.ap75] == pytest.approx(expected, abs=1e-9)
    assert (scores.ap50, scores.ap75) == pytest.approx((1.0, 0.5))


def test_the_cap_counts_per_image_and_class():
    truth, records = _scene(2, images=1, cells=150)
    of_class_1 = sum(entry["category_id"] == 1 for entry in records)
    assert of_class_1 > 100 > len(records) - of_class_1
    scores = score_records(truth, records)
    assert scores.ap50_100 < scores.ap50


def test_scoring_prints_nothing(capfd):
    score_records(truth_of([(1, LEFT)]), [record(1, 0.9, LEFT)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("reason", "faulty", "message"),
    [
        ("image", record(1, 0.9, LEFT, image_id=5), "record 1: image_id 5 is not in the truth"),
        ("class", record(4, 0.9, LEFT), "record 1: category_id 4 is not in the truth"),
        (
            "size",
            make_record(1, 1, 0.9, mask_to_rle(np.ones((WIDTH, HEIGHT), dtype=bool))),
            r"record 1: mask of \[40, 24\], but image 1 is \[24, 40\]",
        ),
    ],
)
def test_records_of_other_data_are_refused(reason, faulty, message):
    with pytest.raises(RecordsError, match=message):
        score_records(truth_of([(1, LEFT)]), [record(1, 0.9, LEFT), faulty])


def test_confusion_matrix_by_hand():
    truth = truth_of([(1, LEFT), (1, MIDDLE), (2, RIGHT)], [(3, LEFT)])
    records = [
        record(1, 0.9, LEFT),  # right
        record(2, 0.8, MIDDLE),  # epithelial found as lymphocyte
        record(1, 0.7, MIDDLE),  # the cell is taken: none
        record(2, 0.6, HALF_RIGHT),  # IoU 0.7: right
        record(3, 0.9, RIGHT, image_id=2),  # nothing there in image 2
        record(3, 0.4, LEFT, image_id=2),  # below the score threshold: not found
    ]
    matrix = confusion_matrix(truth, records)
    assert matrix.tolist() == [
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 1],
        [1, 0, 1, 0],
    ]
    stricter = confusion_matrix(truth, records, score_threshold=0.4, iou_threshold=0.75)
    assert stricter.tolist() == [
        [1, 1, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 1, 0],
        [1, 1, 1, 0],
    ]


def test_a_record_takes_the_free_cell_of_highest_iou():
    # The upper 6 and the lower 4 rows of a square; the better record covers both.
    truth = truth_of([(1, (2, 3, 12, 9)), (2, (2, 9, 12, 13))])
    records = [record(3, 0.9, LEFT), record(3, 0.8, LEFT)]
    matrix = confusion_matrix(truth, records, iou_threshold=0.4)
    assert matrix.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("reason", "cells", "found", "expected"),
    [
        ("neither", [], [], {}),
        ("no records", [(2, LEFT)], [], {(1, 3): 1}),
        ("no truth", [], [(2, 0.9, LEFT)], {(3, 1): 1}),
        ("both", [(2, LEFT)], [(2, 0.9, LEFT)], {(1, 1): 1}),
    ],
)
def test_confusion_matrix_of_the_empty_cases(reason, cells, found, expected):
    matrix = confusion_matrix(truth_of(cells), [record(*entry) for entry in found])
    assert {tuple(at): int(matrix[tuple(at)]) for at in np.argwhere(matrix).tolist()} == expected

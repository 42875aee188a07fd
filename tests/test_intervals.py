"""Bootstrap intervals: draws by hand, AP of a draw against copied images, coverage."""

import copy
from dataclasses import astuple

import numpy as np
import pytest

from cellseg.coco import make_record, mask_to_rle
from cellseg.errors import RecordsError, SettingsError
from cellseg.evaluation import (
    class_bootstrap,
    class_nuclei_bootstrap,
    compare_records,
    image_bootstrap,
    score_nuclei,
    score_records,
    truth_from_targets,
)
from cellseg.evaluation.intervals import (
    STATISTICS,
    Interval,
    bootstrap_interval,
    draw_images,
)
from cellseg.evaluation.matches import average_precision, match_records

NAMES = ("epithelial", "lymphocyte", "neutrophil")
HEIGHT, WIDTH = 40, 64
SQUARE = (2, 3, 12, 13)


def rle(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask_to_rle(mask)


def scene(seed, images=6):
    """Return truth and records of 3 x 5 cells an image; hits, misses, false and moved ones."""
    generator = np.random.default_rng(seed)
    targets, records = [], []
    for image_id in range(1, images + 1):
        layer = np.zeros((1, HEIGHT, WIDTH), dtype=np.int32)
        labels = generator.choice([1, 1, 2], size=15)
        skill = generator.uniform(0.3, 1)
        for k in range(15):
            y, x = 2 + 12 * (k // 5), 2 + 12 * (k % 5)
            layer[0, y : y + 9, x : x + 8] = k + 1
            for _ in range(2):
                if generator.random() < skill:
                    dy, dx = generator.integers(-2, 3, size=2)
                    box = (x + dx, y + dy, x + dx + 8, y + dy + 9)
                    score = float(generator.random())
                    records.append(make_record(image_id, int(labels[k]), score, rle(*box)))
        targets.append({"instance_map": layer, "labels": labels, "image_id": image_id})
    return truth_from_targets(targets, NAMES), records


def copied(truth, records, weights):
    """Return truth and records in which each image occurs so often, under new ids."""
    images, annotations, found = [], [], []
    for image, number in zip(truth["images"], weights, strict=True):
        for _ in range(number):
            new = {"image_id": len(images) + 1}
            images.append({**image, "id": new["image_id"]})
            own = (cell for cell in truth["annotations"] if cell["image_id"] == image["id"])
            annotations += [
                {**cell, **new, "id": len(annotations) + k} for k, cell in enumerate(own)
            ]
            found += [{**entry, **new} for entry in records if entry["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, found


def test_every_image_once_gives_the_scores_themselves():
    truth, records = scene(0)
    before = copy.deepcopy((truth, records))
    intervals = image_bootstrap(
        truth, records, statistics=STATISTICS, score_threshold=0.3, samples=20
    )
    assert tuple(intervals) == STATISTICS
    scores = score_records(truth, records)
    pooled = score_nuclei(truth, records, score_threshold=0.3).pooled
    for name, interval in intervals.items():
        value = getattr(scores, name) if hasattr(scores, name) else getattr(pooled, name)
        assert interval.value == pytest.approx(value, abs=1e-9)
        assert interval.low < interval.value < interval.high
    assert (truth, records) == before


@pytest.mark.parametrize("weights", [[1] * 6, [2, 0, 1, 0, 0, 3], [0, 0, 0, 5, 1, 0]])
@pytest.mark.parametrize(("cap", "name"), [(None, "ap"), (100, "ap_100")])
def test_ap_of_a_draw_is_that_of_copied_images(weights, cap, name):
    truth, records = scene(1)
    drawn = average_precision(match_records(truth, records), weights=np.array(weights), cap=cap)
    expected = getattr(score_records(*copied(truth, records, weights)), name)
    assert np.nanmean(drawn) == pytest.approx(expected, abs=1e-12)


def test_interval_of_two_images_by_hand():
    # One image with its cell found, one without: draws score 1, 51 / 101 (half the recalls) or 0.
    layer = np.zeros((1, HEIGHT, WIDTH), dtype=np.int32)
    layer[0, 3:13, 2:12] = 1
    targets = [{"instance_map": layer, "labels": [1], "image_id": k} for k in (4, 9)]
    truth = truth_from_targets(targets, NAMES)
    interval = image_bootstrap(truth, [make_record(4, 1, 0.9, rle(*SQUARE))])["ap50"]
    assert (interval.low, interval.high) == (0.0, 1.0)
    assert interval.value == pytest.approx(51 / 101)
    assert str(interval) == "0.505 (0.000-1.000)"


def test_interval_of_each_class_is_that_of_the_class_alone():
    truth, records = scene(3)
    intervals = class_bootstrap(truth, records, samples=50)
    assert list(intervals) == list(NAMES)
    assert (intervals["neutrophil"].value, intervals["neutrophil"].low) == (None, None)
    for label, name in ((1, "epithelial"), (2, "lymphocyte")):
        own = [cell for cell in truth["annotations"] if cell["category_id"] == label]
        found = [entry for entry in records if entry["category_id"] == label]
        alone = image_bootstrap({**truth, "annotations": own}, found, samples=50)["ap50"]
        assert intervals[name] == alone
    groups = dict.fromkeys(range(1, 7), "slide")
    together = class_bootstrap(truth, records, groups=groups, samples=5)["epithelial"]
    assert together.low == together.high == pytest.approx(together.value)


def test_each_class_has_its_own_intervals_of_the_nuclei_scores():
    truth, records = scene(4)
    report = score_nuclei(truth, records, score_threshold=0.3)
    intervals = class_nuclei_bootstrap(truth, report, samples=4)
    assert set(intervals["neutrophil"].values()) == {Interval(None, None, None)}
    drawn = [
        score_nuclei(*copied(truth, records, weights), score_threshold=0.3).per_class
        for weights in draw_images(range(1, 7), samples=4)
    ]
    for name in NAMES[:2]:
        for key, at in intervals[name].items():
            ends = np.percentile([getattr(scores[name], key) for scores in drawn], [2.5, 97.5])
            value = getattr(report.per_class[name], key)
            assert astuple(at) == pytest.approx((value, *ends))


def test_draws_without_a_cell_of_a_class_say_nothing_of_its_nuclei():
    layer = np.zeros((1, HEIGHT, WIDTH), dtype=np.int32)
    layer[0, 3:13, 2:12] = 1
    targets = [
        {"instance_map": layer, "labels": [3], "image_id": 1},
        {"instance_map": layer, "labels": [1], "image_id": 2},
    ]
    truth = truth_from_targets(targets, NAMES)
    records = [make_record(1, 3, 0.9, rle(*SQUARE)), make_record(2, 3, 0.9, rle(*SQUARE))]
    report = score_nuclei(truth, records, score_threshold=0.5)
    intervals = class_nuclei_bootstrap(truth, report)
    # One found and one false cell; without the second image one found. Without the first: nothing.
    assert astuple(intervals["neutrophil"]["pq"]) == pytest.approx((2 / 3, 2 / 3, 1))
    assert astuple(intervals["epithelial"]["pq"]) == (0, 0, 0)


def test_images_of_a_group_are_drawn_together():
    draws = draw_images([3, 5, 8, 9], samples=500, groups={3: "a", 5: "b", 8: "a", 9: "b"})
    assert (draws[:, 0] == draws[:, 2]).all() and (draws[:, 1] == draws[:, 3]).all()
    assert set(draws[:, 0].tolist()) == {0, 1, 2}
    assert (draws[:, 0] + draws[:, 1] == 2).all()
    truth, records = scene(0)
    together = image_bootstrap(truth, records, groups=dict.fromkeys(range(1, 7), "slide"))
    assert together["ap"].low == together["ap"].high == pytest.approx(together["ap"].value)


def test_equal_seeds_draw_the_same_images():
    assert (draw_images(range(9), seed=1) == draw_images(range(9), seed=1)).all()
    assert (draw_images(range(9), seed=1) != draw_images(range(9), seed=2)).any()
    assert (draw_images(range(9)).sum(axis=1) == 9).all()


def test_draws_without_a_value_are_left_out():
    values = np.array([1.0, 2.0, 3.0])
    draws = np.array([[3, 0, 0], [0, 0, 0], [0, 0, 3]])

    def mean(weights):
        return weights @ values / weights.sum() if weights.any() else np.nan

    interval = bootstrap_interval(mean, draws)
    # Two draws, 1 and 3: percentiles lie 2.5 % of the way in.
    assert (interval.value, interval.low, interval.high) == pytest.approx((2, 1.05, 2.95))


def test_nothing_to_score_has_no_interval():
    truth = truth_from_targets([], NAMES)
    interval = image_bootstrap(truth, [], statistics=("ap50", "pq"), score_threshold=0.5)["pq"]
    assert (interval.value, interval.low, interval.high) == (None, None, None)
    assert str(interval) == "-"
    comparison = compare_records(truth, [], [])
    assert comparison.difference is None
    assert comparison.sentence == "AP50 has no value here: there is nothing to score."


def test_coverage_of_a_made_population():
    # Images whose cells and hits vary; the true ratio is 0.6. 95 % is 190 of 200; the percentile
    # interval of 30 images holds it a little less often (935 of 1,000).
    generator = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        cells = generator.integers(5, 60, 30)
        hits = cells * generator.beta(6, 4, 30)

        def share(weights, cells=cells, hits=hits):
            return weights @ hits / (weights @ cells)

        interval = bootstrap_interval(share, draw_images(range(30), samples=300, seed=trial))
        held += interval.low <= 0.6 <= interval.high
    assert 0.87 <= held / 200 <= 0.98


def test_comparison_is_paired():
    truth, records = scene(2)
    same = compare_records(truth, records, records)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    # B lacks the cells on the right: less in every image, though images differ by more.
    fewer = [entry for entry in records if entry["bbox"][0] < 36]
    worse = compare_records(truth, records, fewer, names=("all", "fewer"))
    assert worse.difference == pytest.approx(worse.value_b - worse.value_a)
    assert worse.low <= worse.difference <= worse.high < 0
    alone = image_bootstrap(truth, records)["ap50"]
    assert worse.high - worse.low < alone.high - alone.low


def test_comparison_in_words():
    truth, records = scene(2)
    none = compare_records(truth, records, [], names=("ours", "nothing"), samples=50)
    assert none.sentence.startswith(
        f"AP50 is 0.000 with nothing and {none.value_a:.3f} with ours: "
    )
    assert none.sentence.endswith(", 6 images); ours is better.")
    reverse = compare_records(truth, [], records, names=("nothing", "ours"), samples=50)
    assert reverse.sentence.endswith("; ours is better.")
    pq = compare_records(truth, records, records, statistic="pq", score_thresholds=(0.3, 0.3))
    assert pq.sentence.startswith("PQ is ")
    assert pq.sentence.endswith("6 images); these images cannot tell them apart.")
    groups = {1: "a", 2: "a", 3: "b", 4: "b", 5: "b", 6: "c"}
    grouped = compare_records(truth, records, records, groups=groups, samples=50)
    assert grouped.sentence.endswith(
        ", 3 groups of 6 images); these images cannot tell them apart."
    )


def test_what_cannot_be_computed_is_refused():
    truth, records = scene(0)
    with pytest.raises(SettingsError, match="statistic 'map' is not one of ap, ap50"):
        image_bootstrap(truth, records, statistics=("map",))
    with pytest.raises(SettingsError, match="score_threshold"):
        image_bootstrap(truth, records, statistics=("pq",))
    with pytest.raises(SettingsError, match="image_id 2 has no group"):
        image_bootstrap(truth, records, groups={1: "a"})
    with pytest.raises(RecordsError, match="image_id 77"):
        compare_records(truth, records, [make_record(77, 1, 0.5, rle(*SQUARE))])

"""Ensembles tuned out of fold: what is chosen on made records, and what is left as it was."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_squares
from typer.testing import CliRunner

from benchmarks.stages_records import ellipses, scatter_cells
from cellseg import cli
from cellseg.coco import make_record, make_records, mask_to_rle, write_records
from cellseg.ensemble import RULES, Tuning, tune_ensemble, tune_files
from cellseg.ensemble.evidence import Evidence, Plan, ap50
from cellseg.ensemble.tuning import THRESHOLDS, WEIGHTS
from cellseg.errors import RecordsError, SettingsError
from cellseg.evaluation import dataset_truth, score_records, truth_from_targets
from cellseg.inference.merging import fuse

SIZE = (40, 60)
COLUMNS = range(0, 60, 10)  # left sides of squares of 8 pixels


def record(score, box, category_id=1, image_id=1):
    x1, y1, x2, y2 = box
    mask = np.zeros(SIZE, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return make_record(image_id, category_id, score, mask_to_rle(mask))


def square(x, y, side=8):
    return (x, y, x + side, y + side)


def truth_of(boxes_of_images, labels=None):
    """Return a truth of images from 1 with these boxes, all of class 1 unless labels say else."""
    targets = []
    for image_id, boxes in enumerate(boxes_of_images, start=1):
        instance_map = np.zeros(SIZE, dtype=int)
        for k, (x1, y1, x2, y2) in enumerate(boxes, start=1):
            instance_map[y1:y2, x1:x2] = k
        target = {"instance_map": instance_map, "image_id": image_id}
        targets.append(target | {"labels": [1] * len(boxes) if labels is None else labels})
    return truth_from_targets(targets, ("first", "second"))


IMAGES = 16
TRUTH = truth_of([[square(x, 1) for x in COLUMNS]] * IMAGES)


def good(seed):
    """Return records of five cells in six, no others."""
    draw = random.Random(seed)
    return [
        record(draw.uniform(0.5, 0.9), square(x, 1), image_id=image_id)
        for image_id in range(1, IMAGES + 1)
        for x in COLUMNS
        if draw.random() < 5 / 6
    ]


def noise(seed):
    """Return sure records where no cell is."""
    draw = random.Random(seed)
    return [
        record(draw.uniform(0.9, 1.0), square(x, 25), image_id=image_id)
        for image_id in range(1, IMAGES + 1)
        for x in COLUMNS
    ]


def test_noise_is_left_out():
    tuning = tune_ensemble({"a": good(1), "noise": noise(2), "z": good(3)}, TRUTH)
    assert tuning.weights == {"a": 1.0, "noise": 0.0, "z": 1.0}
    assert tuning.members == ["a", "z"]
    assert tuning.steps[0].startswith("without noise +0.")
    assert tuning.ap50 > tuning.default.value + 0.05
    assert tuning.interval.low < tuning.ap50 < tuning.interval.high
    fused = fuse([good(1), good(3)], iou_threshold=tuning.iou_threshold)
    assert tuning.ap50 == score_records(TRUTH, fused).ap50


def test_equal_members_stay_as_they_are():
    tuning = tune_ensemble({"a": good(1), "b": good(1)}, TRUTH)
    assert tuning.weights == {"a": 1.0, "b": 1.0}
    assert (tuning.iou_threshold, tuning.agreement, tuning.steps) == (0.5, "mean", [])
    assert tuning.interval == tuning.default
    assert tuning.ap50 == score_records(TRUTH, good(1)).ap50
    assert "no change passed the guard" in tuning.sentence()


def test_a_member_that_is_needed_in_spite_of_its_noise_counts_less():
    # It alone sees the second row, so it cannot go; its noise outranks what the others see.
    rows = [[square(x, y) for y in (1, 12) for x in COLUMNS]] * IMAGES
    second = [record(1.0, square(x, 12), image_id=k) for k in range(1, IMAGES + 1) for x in COLUMNS]
    members = {"a": good(1), "b": good(2), "mixed": second + [r | {"score": 0.9} for r in noise(3)]}
    tuning = tune_ensemble(members, truth_of(rows))
    assert tuning.weights == {"a": 1.0, "b": 1.0, "mixed": 0.5}
    assert len(tuning.steps) == 1 and tuning.steps[0].startswith("weight 0.5 for mixed +0.0")
    assert tuning.ap50 > tuning.default.value + 0.05


def doubled(images):
    """Return a truth of one cell an image, and each found twice, the second time 4 px aside.

    Of 80 pixels each, they share 48: IoU 48 / 112 = 0.43. The scores fall from one record to the
    next, so that of the first 2 k - 1 records k are right.
    """
    boxes = [(10, 10, 20, 18)] * images
    records = []
    for k in range(images):
        score = 0.99 - 0.02 * k
        records.append(record(score, (10, 10, 20, 18), image_id=k + 1))
        records.append(record(score - 0.01, (14, 10, 24, 18), image_id=k + 1))
    return truth_of([[box] for box in boxes]), records


def test_the_threshold_that_merges_doubles_is_found():
    truth, records = doubled(12)
    tuning = tune_ensemble({"one": records}, truth)
    place = [max(1, math.ceil(12 * percent / 100 - 1e-9)) for percent in range(101)]
    by_hand = sum(k / (2 * k - 1) for k in place) / 101
    assert tuning.default.value == pytest.approx(by_hand, abs=1e-12)
    assert (tuning.iou_threshold, tuning.ap50) == (0.4, 1.0)  # 0.3 does it too: the nearest
    assert tuning.weights == {"one": 1.0} and tuning.agreement == "mean"
    assert len(tuning.steps) == 1 and tuning.steps[0].startswith("IoU threshold 0.4 +0.")


def test_a_gain_that_hangs_on_the_choice_of_images_is_not_taken():
    # Merging mends four images and spoils one, where the records are cells that touch.
    records = doubled(4)[1]
    records += [record(0.9, box, image_id=5) for box in ((10, 10, 20, 18), (14, 10, 24, 18))]
    truth = truth_of([[(10, 10, 20, 18)]] * 4 + [[(10, 10, 17, 18), (17, 10, 24, 18)]])
    values = [score_records(truth, fuse([records], iou_threshold=iou)).ap50 for iou in (0.5, 0.4)]
    assert values[1] > values[0] + 0.1
    tuning = tune_ensemble({"one": records}, truth)
    assert tuning.steps == [] and tuning.iou_threshold == 0.5


def test_without_a_gain_nothing_is_changed():
    cells = [square(x, 1) for x in COLUMNS]
    records = [record(0.9, box) for box in cells]
    tuning = tune_ensemble({"a": records, "b": records[:3]}, truth_of([cells]))
    assert tuning.steps == [] and tuning.ap50 == 1.0


def crowd(seed, images=3, number=25):
    draw = random.Random(seed)
    return [
        record(
            draw.randint(1, 9) / 9,
            square(draw.randint(0, 40), draw.randint(0, 25), draw.randint(6, 12)),
            category_id=draw.randint(1, 2),
            image_id=draw.randint(1, images),
        )
        for _ in range(number)
    ]


CROWDED = truth_of(
    [[square(x, y) for y in (1, 12) for x in COLUMNS]] * 3, labels=[1, 2] * len(COLUMNS)
)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.sampled_from([0.0, *WEIGHTS]), min_size=3, max_size=3).filter(any),
    st.sampled_from(THRESHOLDS),
    st.sampled_from(list(RULES)),
)
def test_a_plan_scores_as_the_fused_records_do(seed, weights, iou_threshold, rule):
    members = [crowd(seed + k) for k in range(3)]
    evidence = Evidence(members, CROWDED, lowest_iou=min(THRESHOLDS))
    taking = [members[k] for k in range(3) if weights[k] > 0]
    fused = fuse(
        taking,
        iou_threshold=iou_threshold,
        weights=[weight for weight in weights if weight > 0],
        combine=RULES[rule],
    )
    for _ in range(2):  # from scratch and from what was kept
        found = ap50(evidence.match(Plan(tuple(weights), iou_threshold, rule)))
        assert found == score_records(CROWDED, fused).ap50


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_members_and_records_does_not_matter(seed):
    draw = random.Random(seed)
    members = {name: crowd(seed + k) for k, name in enumerate("abc")}
    shuffled = {
        name: draw.sample(members[name], len(members[name])) for name in draw.sample("abc", 3)
    }
    assert tune_ensemble(members, CROWDED) == tune_ensemble(shuffled, CROWDED)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_one_score_that_all_share_and_the_order_of_members(rule):
    generator = np.random.default_rng(0)
    weight = generator.uniform(0.1, 3, 11)
    alike = np.repeat(generator.uniform(0, 1, (50, 1)), 11, axis=1)
    scores = generator.uniform(0, 1, (200, 11)) * (generator.uniform(0, 1, (200, 11)) > 0.4)
    order = generator.permutation(11)
    assert (np.array(RULES[rule](scores, weight)) <= scores.max(axis=1)).all()
    assert RULES[rule](scores, weight) == RULES[rule](scores[:, order], weight[order])
    if rule != "best":  # the weight of one member is no part of what all see
        assert RULES[rule](alike, weight) == alike[:, 0].tolist()
    assert RULES[rule](np.zeros((2, 11)), weight) == [0.0, 0.0]


def test_what_cannot_be_tuned():
    with pytest.raises(SettingsError, match="no member"):
        tune_ensemble({}, TRUTH)
    with pytest.raises(RecordsError, match="image_id 99 is not in the truth"):
        tune_ensemble({"a": [record(0.5, square(1, 1), image_id=99)]}, TRUTH)
    nothing = tune_ensemble({"a": [], "b": []}, truth_of([[]] * 3))
    assert nothing.ap50 is None and nothing.steps == []


# Runs by folds

SAMPLES = {
    name: (40, 60, [(1, x, 2, x + 8, 10) for x in COLUMNS][: 3 + k])
    for k, name in enumerate("abcd")
}


@pytest.fixture
def project(tmp_path):
    """Give a dataset, and a function that writes a result file and its run by folds."""
    dataset = write_squares(tmp_path / "train", SAMPLES)

    def add(name, records, val_ids="abcd", run=True):
        write_records(tmp_path / "predictions" / f"{name}.json", [record(0.5, square(1, 1))])
        if run:
            write_records(tmp_path / "runs" / name / "oof.json", records)
            folds = [{"name": "fold1", "val_ids": list(val_ids)}]
            content = {"groups": dict.fromkeys(SAMPLES, "g"), "folds": folds}
            (tmp_path / "runs" / name / "folds.json").write_text(json.dumps(content))

    return tmp_path, dataset, add


def found_cells(dataset, score=0.9):
    return [
        make_record(cell["image_id"], cell["category_id"], score, cell["segmentation"])
        for cell in dataset_truth(dataset)["annotations"]
    ]


def tune(root, dataset):
    return tune_files(root / "predictions", dataset, runs_dir=root / "runs")


def test_files_are_tuned_by_the_runs_they_are_named_after(project):
    root, dataset, add = project
    add("one", found_cells(dataset))
    add("two", found_cells(dataset, 0.8))
    tuning = tune(root, dataset)
    assert tuning.reason == "" and tuning.images == 4
    assert tuning.weights == {"one": 1.0, "two": 1.0} and tuning.ap50 == 1.0


def test_only_images_that_every_run_held_out_count(project):
    root, dataset, add = project
    add("one", found_cells(dataset))
    add("two", found_cells(dataset), val_ids="bd")
    assert tune(root, dataset.subset(["a", "b", "d"])).images == 2
    assert "held out no sample" in tune(root, dataset.subset(["a", "c"])).reason


def test_one_member_without_records_out_of_fold_leaves_all_as_they_are(project):
    root, dataset, add = project
    add("one", found_cells(dataset))
    add("foreign", [], run=False)
    tuning = tune(root, dataset)
    assert tuning == Tuning(reason=f"there is no oof.json in {root / 'runs'} for foreign.json")
    assert tuning.ap50 is None and tuning.members == []


def test_what_is_missing_or_damaged_is_a_reason_and_no_error(project):
    root, dataset, add = project
    add("one", [record(0.5, square(1, 1), image_id=9)])
    assert tune(root, None).reason == "the samples with truth are not at hand"
    (root / "runs" / "one" / "folds.json").write_text("[]")
    assert "holds no folds" in tune(root, dataset).reason
    (root / "runs" / "one" / "oof.json").write_text("[3]")
    (root / "runs" / "one" / "folds.json").write_text('{"folds": [{"val_ids": ["a"]}]}')
    assert "record 0" in tune(root, dataset).reason


def test_the_command_tunes_and_writes_the_manifest(project):
    root, dataset, add = project
    add("one", found_cells(dataset))
    add("two", found_cells(dataset, 0.8))
    command = ["ensemble", root / "predictions", "--output-dir", root, "--runs-dir", root / "runs"]
    command += ["--truth", root / "train", "--num-labels", 2]
    done = CliRunner().invoke(cli.app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    assert "Out of fold on 4 images the AP50 is 1.000" in done.output
    manifest = json.loads((root / "test-results.manifest.json").read_text(encoding="utf-8"))
    assert manifest["out_of_fold"]["ap50"]["value"] == 1.0
    assert [member["weight_is"] for member in manifest["members"]] == ["tuned", "tuned"]


# Images that the tuning has not seen


def tissue(generator, images, qualities):
    """Return a truth of drawn cells, and the records of a member for each quality, 1 being good.

    Faint cells are missed more often and score lower, classes are mixed up, outlines move, and
    some false alarms are the same for all members.
    """
    truth = {"images": [], "annotations": [], "categories": [{"id": k, "name": k} for k in (1, 2)]}
    members = [[] for _ in qualities]
    for image_id in range(1, images + 1):
        truth["images"].append({"id": image_id, "height": 150, "width": 150})
        number = int(generator.integers(6, 40))
        centres, radii, _ = scatter_cells(generator, number + number // 2, (150, 150))
        labels, faint = generator.integers(1, 3, len(radii)), generator.random(len(radii))
        rles = ellipses(centres[:number], radii[:number], (150, 150))
        for label, rle in zip(labels.tolist(), rles, strict=False):
            cell = {"image_id": image_id, "category_id": label, "segmentation": rle}
            truth["annotations"].append(cell)
        for records, quality in zip(members, qualities, strict=True):
            seen = generator.random(len(radii)) < 1 - 0.5 * faint / quality
            seen[number:] = generator.random(len(radii) - number) < 0.5 / quality
            mixed = generator.random(len(radii)) < 0.12 / quality
            noise = generator.normal(0, 0.15 / quality, len(radii))
            scores = np.clip(1 - 0.7 * faint + noise, 0.05, 1)
            scores[number:] *= 0.7
            moved = centres + generator.normal(0, 1.3 / quality, centres.shape)
            shown = ellipses(moved[seen], radii[seen], (150, 150))
            found = np.where(mixed, 3 - labels, labels)[seen]
            records += make_records(image_id, found, scores[seen], shown)
    return truth, members


def gains(qualities, seeds):
    """Return the AP50 gained by tuning on 20 images: as it says itself, and on 60 others."""
    rows = []
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        truth, members = tissue(generator, 20, qualities)
        tuning = tune_ensemble(dict(zip("abcde", members, strict=True)), truth)
        truth, members = tissue(generator, 60, qualities)
        evidence = Evidence(members, truth, lowest_iou=min(THRESHOLDS))
        tuned = Plan(tuple(tuning.weights.values()), tuning.iou_threshold, tuning.agreement)
        default = Plan((1.0,) * 5, 0.5, "mean")
        new = ap50(evidence.match(tuned)) - ap50(evidence.match(default))
        rows.append((tuning.ap50 - tuning.default.value, new))
    return np.array(rows)


@pytest.mark.slow
def test_what_is_gained_out_of_fold_is_gained_on_new_images():
    inside, outside = gains((1, 1, 1, 0.4, 0.4), seeds=8).mean(axis=0)
    assert outside > 0.08 and outside > 0.85 * inside


@pytest.mark.slow
def test_members_of_one_quality_are_mostly_left_as_they_are():
    values = gains((1,) * 5, seeds=16)
    assert (values[:, 0] > 0).mean() <= 0.35  # how often anything is changed
    assert values[:, 1].mean() > -0.001 and values[:, 1].min() > -0.01

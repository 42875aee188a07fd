"""predict, evaluate and compare as typed: what a run remembers, scores worked out by hand."""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from data_files import plain_image, write_png
from tiny_models import CLASSES, tiny_model, write_squares
from typer.testing import CliRunner

from cellseg import cli
from cellseg.coco import make_record, mask_to_rle, read_records, write_records
from cellseg.data import SampleImages
from cellseg.errors import DataError, SettingsError
from cellseg.evaluation import dataset_truth, evaluate_records
from cellseg.inference import predict_images
from cellseg.training import load_model, open_run, read_truth
from cellseg.training.checkpoint import write_checkpoint

CELLS = [(1, 4, 5, 16, 17), (2, 30, 20, 46, 36)]  # label, x1, y1, x2, y2
SAMPLES = {name: (40, 60, CELLS) for name in "abcd"}
LOOKS = {"views": "turns", "score_threshold": 0.02, "mask_threshold": 0.4}


def run(command, *arguments):
    return CliRunner().invoke(cli.app, [command, *map(str, arguments)])


def record(image_id, k, *, label=None, score=0.9, down=0):
    """Return a record of cell k of an image, of its class or another, so many pixels lower."""
    own, x1, y1, x2, y2 = CELLS[k]
    mask = np.zeros((40, 60), dtype=bool)
    mask[y1 + down : y2 + down, x1:x2] = True
    return make_record(image_id, label or own, score, mask_to_rle(mask))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("release") / "train", SAMPLES)


@pytest.fixture
def trained(dataset, tmp_path):
    """Return a run that holds b, c and d out in two groups, with a checkpoint as training's."""
    model = tiny_model(proposals=20, train_proposals=20)
    sides = dataset.subset(["a"]), dataset.subset(list("bcd"))
    groups = {"a": 0, "b": 1, "c": 1, "d": 2}
    made = open_run(tmp_path / "runs", model, *sides, recipe={}, groups=groups, prediction=LOOKS)
    content = {"spec": model.spec, "model": model.state_dict(), "settings": made.settings}
    write_checkpoint(made.path / "best.pt", content)
    return made.path


@pytest.mark.parametrize(
    ("options", "looks", "told"),
    [
        ((), LOOKS, "views turns (the run remembers it), score_threshold 0.02 (the run"),
        (
            ("--views", "flips", "--score-threshold", 0.03, "--scale", 1),
            {"views": "flips", "score_threshold": 0.03, "mask_threshold": 0.4, "scales": [1.0]},
            "views flips (given), score_threshold 0.03 (given), mask_threshold 0.4 (the run",
        ),
    ],
    ids=["the run's", "given"],
)
def test_predict_looks_as_the_run_did_unless_told_otherwise(
    options, looks, told, trained, dataset, tmp_path
):
    checkpoint, output = trained / "best.pt", tmp_path / "records.json"
    place = ("--train-dir", dataset.train_dir, "--device", "cpu")
    done = run("predict", checkpoint, output, *place, "--held-out", *options)
    assert done.exit_code == 0, done.output
    assert f"prediction: {told}" in done.output
    model, images = load_model(checkpoint), SampleImages(dataset.subset(list("bcd")))
    records = read_records(output)
    assert records == predict_images(model, images, progress=False, **looks)
    assert records and records != predict_images(model, images, progress=False)


def test_a_checkpoint_away_from_its_run_looks_plainly(trained, dataset, tmp_path):
    away = shutil.copy(trained / "best.pt", tmp_path / "away.pt")
    place = ("--train-dir", dataset.train_dir, "--ids", "b", "--device", "cpu")
    done = run("predict", away, tmp_path / "x.json", *place, "--views", "plain")
    assert (
        done.exit_code == 0
        and "prediction: views plain (given); all else by default" in done.output
    )
    images = SampleImages(dataset.subset(["b"]))
    expected = predict_images(load_model(away), images, progress=False)
    assert read_records(tmp_path / "x.json") == expected
    assert "prediction: plain" in run("predict", away, tmp_path / "x.json", *place).output
    assert read_records(tmp_path / "x.json") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--held-out",), "--held-out chooses samples of --train-dir"),
        (("--ids", "a"), "--ids chooses samples of --train-dir; leave it out"),
        (("--swapped",), "--swapped is for --image; leave it out"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_of_other_images_than_those_named_are_refused(options, message, tmp_path):
    done = run("predict", "best.pt", tmp_path / "x.json", "--release", "r", *options)
    assert isinstance(done.exception, SettingsError)
    assert message in str(done.exception)


def test_options_of_one_large_image_reach_its_prediction(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("cellseg.inference.predict_file", predicted := Mock(return_value=[]))
    picture, output = write_png(tmp_path / "a.png", plain_image(40, 60)), tmp_path / "x.json"
    options = ("--no-resume", "--swapped", "--tile-size", 32, "--overlap", 8, "--device", "cpu")
    done = run("predict", trained / "best.pt", output, "--image", picture, *options)
    assert "0 cells in 1 image" in done.output
    (_, *places), looks = predicted.call_args
    assert places == [picture, output]
    assert looks == {"resume": False, "swapped": True, "tile_size": 32, "overlap": 8, **LOOKS}


def write_found(path, *records):
    write_records(path, records)
    return path


def test_evaluate_prints_intervals_and_what_costs_most(dataset, tmp_path):
    # Of two classes in images a and b one cell each; class 1 is found twice, class 2 once.
    found = write_found(tmp_path / "r.json", record(1, 0), record(2, 0), record(2, 1))
    options = (found, dataset.train_dir, "--ids", "a,b", "--class-names", ",".join(CLASSES))
    text = run("evaluate", *options).stdout
    half = 51 / 101  # recall 0.5: of 101 recalls 51
    assert f"| AP50 | {(1 + half) / 2:.3f} | " in text
    assert "| PQ | 0.857 | " in text  # 3 of 4 found: 3 / (3 + 1 / 2)
    assert "| dark | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    assert "| missed | 1 | 1.000 | +0.248 |" in text
    assert "Most is lost to missed cells (1)" in text and "1,000 draws of 2 images" in text
    content = json.loads(run("evaluate", *options, "--json").stdout)
    truth = dataset_truth(dataset.subset(["a", "b"]))
    assert (
        content["intervals"] == evaluate_records(truth, read_records(found)).content()["intervals"]
    )
    assert content["errors"]["kinds"]["missed"]["count"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"r.json"}


def test_evaluate_writes_into_the_run_that_held_the_samples_out(trained, dataset, tmp_path):
    found = write_found(tmp_path / "r.json", record(2, 0), record(3, 1, score=0.4))
    done = run("evaluate", found, dataset.train_dir, "--run", trained)
    assert done.exit_code == 0, done.output
    assert "1,000 draws of 2 groups of 3 images" in done.stdout
    assert f"written into {trained}: scores.json" in done.stdout
    assert read_records(trained / "validation.json") == read_records(found)
    assert read_truth(trained)[1] == {2: "1", 3: "1", 4: "2"}
    assert json.loads((trained / "confusion.json").read_text())["matrix"] == [
        [1, 0, 2],
        [0, 0, 3],
        [0, 0, 0],
    ]
    assert (trained / "figures" / "gallery.png").exists()
    refused = run("evaluate", found, dataset.train_dir, "--run", trained, "--ids", "b")
    assert isinstance(refused.exception, SettingsError)


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ((), [0.7]),  # the mean of 0.9 and 0.5, as IoU is 11 / 13
        (("--agreement", "best"), [0.9]),
        (("--iou-threshold", 0.9), [0.45, 0.25]),  # two cells, each of one file of two
    ],
    ids=["plain", "best", "strict"],
)
def test_ensemble_merges_as_it_is_told(options, scores, tmp_path):
    members = tmp_path / "members"
    write_found(members / "one.json", record(1, 0))
    write_found(members / "two.json", record(1, 0, score=0.5, down=1))
    done = run("ensemble", members, "--output-dir", tmp_path / "out", "--num-labels", 2, *options)
    assert done.exit_code == 0, done.output
    merged = read_records(tmp_path / "out" / "test-results.json")
    assert [entry["score"] for entry in merged] == pytest.approx(scores)


def test_compare_says_the_paired_difference(dataset, tmp_path):
    every = [record(image_id, k) for image_id in (1, 2, 3, 4) for k in (0, 1)]
    before, after = (
        write_found(tmp_path / "before.json"),
        write_found(tmp_path / "after.json", *every),
    )
    options = ("--truth", dataset.train_dir, "--class-names", ",".join(CLASSES))
    assert run("compare", before, after, *options).stdout == (
        "AP50 is 1.000 with after and 0.000 with before: +1.000 (95 % interval +1.000 to +1.000, "
        "4 images); after is better.\n"
    )
    some = write_found(tmp_path / "some.json", *(entry for entry in every if entry["image_id"] < 3))
    ids = (*options, "--ids", "a,b")
    assert run("compare", after, some, *ids).exception is not None  # records of other images
    same = run("compare", some, some, *ids, "--statistic", "dq").stdout
    assert same.startswith("DQ is 1.000 with") and "cannot tell them apart" in same
    none = run("compare", before, after, *options, "--statistic", "auc")
    assert isinstance(none.exception, SettingsError) and "'auc' is not one of" in str(
        none.exception
    )


def test_nuclei_are_compared_one_record_each(dataset, tmp_path):
    # Each cell under both classes, the other one a pixel lower: painted, that row would be false.
    plain = [record(image_id, k) for image_id in (1, 2, 3, 4) for k in (0, 1)]
    twins = [
        record(e["image_id"], e["category_id"] - 1, label=3 - e["category_id"], down=1)
        for e in plain
    ]
    twins = [twin | {"score": 0.6} for twin in twins]
    one = write_found(tmp_path / "one.json", *plain)
    two = write_found(tmp_path / "two.json", *plain, *twins)
    options = ("--truth", dataset.train_dir, "--class-names", ",".join(CLASSES))
    told = run("compare", one, two, *options, "--statistic", "pq").stdout
    assert told.startswith("PQ is 1.000 with two and 1.000 with one: +0.000")


def test_runs_are_compared_on_what_they_held_out_by_their_groups(trained, dataset, tmp_path):
    write_found(trained / "validation.json", record(2, 0), record(3, 0), record(4, 0))
    other = write_found(tmp_path / "other.json")
    told = run("compare", other, trained, "--truth", dataset.train_dir).stdout
    assert f"AP50 is 0.500 with {trained.name} and 0.000 with other: +0.500" in told
    assert "Drawn by 2 groups of images that belong together." in told
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(trained, elsewhere)
    settings = json.loads((elsewhere / "settings.json").read_text())
    (elsewhere / "settings.json").write_text(json.dumps(settings | {"val_ids": ["a"]}))
    done = run("compare", trained, elsewhere, "--truth", dataset.train_dir)
    assert isinstance(done.exception, DataError)
    assert "elsewhere was validated on other images" in str(done.exception)

"""The command line, as a user types it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from data_files import plain_image, write_sample
from typer.testing import CliRunner

from cellseg import cli, data
from cellseg.cli import shared

COMMANDS = ["sample", "audit", "train", "predict", "evaluate", "ensemble", "report", "run"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_each_value_means(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--help" in result.output


def test_our_errors_are_one_line_and_exit_code_1():
    done = subprocess.run(
        [sys.executable, "-m", "cellseg", "audit", "nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: nowhere is not a folder")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_whole_way_from_sample_to_submission(tmp_path):
    made, runs = tmp_path / "data", tmp_path / "runs"
    assert "made tissue" in run(
        "sample", made, "--train-images", 5, "--test-images", 2, "--image-size", 96
    ).output  # fmt: skip
    assert "epithelial" in run("audit", made / "train", "--figure", tmp_path / "audit.png").output
    trained = run(
        "train", made / "train", "--backbone", "mobilenetv2", "--weights", "none",
        "--fpn-channels", 32, "--epochs", 1, "--crop-size", 64, "--runs-dir", runs,
        "--name", "tiny", "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert "epoch 1: loss" in trained.output

    checkpoint, held = runs / "tiny" / "best.pt", tmp_path / "held.json"
    ids = ",".join(json.loads((runs / "tiny" / "settings.json").read_text())["val_ids"])
    predicted = run("predict", checkpoint, held, "--train-dir", made / "train", "--ids", ids)
    assert predicted.exit_code == 0, predicted.output
    scores = json.loads(run("evaluate", held, made / "train", "--ids", ids).stdout)
    assert set(scores["ap50_per_class"]) == {"epithelial", "lymphocyte", "neutrophil", "macrophage"}

    members = tmp_path / "predictions"
    predicted = run("predict", checkpoint, members / "tiny.json", "--release", made)
    assert predicted.exit_code == 0, predicted.output
    merged = run("ensemble", members, "--output-dir", tmp_path)
    assert merged.exit_code == 0, merged.output
    assert (tmp_path / "test-results.zip").exists()
    assert "pages" in run("report", runs / "tiny").output


def test_predict_wants_one_kind_of_images(tmp_path):
    result = run("predict", "best.pt", tmp_path / "x.json")
    assert "either --release" in str(result.exception)


@pytest.mark.parametrize(
    ("given", "told", "names", "reason"),
    [
        (None, None, data.CLASS_NAMES, "the course's four"),
        (None, '["spindle", "round"]', ("spindle", "round"), "what the release tells"),
        ("a, b", '["spindle", "round"]', ("a", "b"), "what is given"),
    ],
)
def test_names_of_classes_are_those_given_or_told(given, told, names, reason, tmp_path):
    if told:
        (tmp_path / "class_names.json").write_text(told)
    assert shared.pick_names(given, tmp_path / "train") == names, reason


def test_commands_take_the_names_that_the_release_tells(tmp_path):
    ids = np.zeros((8, 9))
    ids[2:5, 2:6] = 1
    write_sample(tmp_path / "train" / "a", plain_image(8, 9), {2: ids})
    (tmp_path / "class_names.json").write_text('["spindle", "round"]')
    (tmp_path / "records.json").write_text("[]")
    assert "| 2 | round | 1 |" in run("audit", tmp_path / "train").output
    scores = json.loads(run("evaluate", tmp_path / "records.json", tmp_path / "train").stdout)
    assert list(scores["ap50_per_class"]) == ["spindle", "round"]


def test_a_long_list_of_ids_is_not_taken_for_a_file():
    assert shared.read_ids(",".join(["sample"] * 200)) == ["sample"] * 200

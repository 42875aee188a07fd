"""The command line, as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from data_files import plain_image, stained_sample, write_sample
from typer.main import get_command
from typer.testing import CliRunner

from cellseg import cli, data, presets
from cellseg.cli import shared, training
from cellseg.errors import SettingsError


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def every_command(command, *names):
    """Yield the words and the command of all commands below one."""
    if not hasattr(command, "commands"):
        yield names, command
    for name, below in getattr(command, "commands", {}).items():
        yield from every_command(below, *names, name)


COMMANDS = dict(every_command(get_command(cli.app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_says_what_each_value_means(words):
    result = run(*words, "--help")
    assert result.exit_code == 0 and "--help" in result.output
    assert COMMANDS[words].help
    assert [value.name for value in COMMANDS[words].params if not value.help] == []


def test_our_errors_are_one_line_and_exit_code_1():
    done = subprocess.run(
        [sys.executable, "-m", "cellseg", "audit", "nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: nowhere is not a folder")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied; choose another"),
        (OSError(28, "No space left on device", "x"), "x: No space left on device; make space"),
        (OSError(28, "No space left on device"), "No space left on device; make space and run"),
        (FileNotFoundError(2, "No such file", "x"), "x: No such file; check the path"),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_one_line(error, told, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {told}")


def test_an_error_without_a_remedy_keeps_its_traceback(monkeypatch):
    for error in (OSError(9, "Bad file descriptor"), RuntimeError("ours")):
        monkeypatch.setattr(cli, "app", Mock(side_effect=error))
        with pytest.raises(type(error)):
            cli.main()


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "{file}/made"),
        ("predict", "best.pt", "{file}/x.json", "--release", "nowhere"),
        ("train", "nowhere", "--runs-dir", "{file}/runs"),
        ("audit", "nowhere", "--figure", "{file}/x.png"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(arguments, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    result = run(*(argument.format(file=file) for argument in arguments))
    assert isinstance(result.exception, SettingsError)
    assert f"cannot be written ({file}: Not a directory); check the path" in str(result.exception)


def test_a_figure_of_another_format_is_told_before_the_work(tmp_path):
    result = run("audit", "nowhere", "--figure", tmp_path / "x.gif")
    assert "x.gif has no format; let it end in .png, .svg or .pdf" in str(result.exception)


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
        "--name", "tiny", "--workers", 0, "--device", "cpu", "--set", "flip=false",
        "--set", "color=0.1",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    settings = json.loads((runs / "tiny" / "settings.json").read_text())
    assert (settings["recipe"]["flip"], settings["recipe"]["color"]) == (False, 0.1)
    assert set(settings["groups"]) == {*settings["train_ids"], *settings["val_ids"]}
    assert "epoch 1: loss" in trained.output

    checkpoint, held = runs / "tiny" / "best.pt", tmp_path / "held.json"
    ids = ",".join(settings["val_ids"])
    predicted = run("predict", checkpoint, held, "--train-dir", made / "train", "--ids", ids)
    assert predicted.exit_code == 0, predicted.output
    scores = json.loads(run("evaluate", held, made / "train", "--ids", ids, "--json").stdout)
    assert set(scores["ap50_per_class"]) == {"epithelial", "lymphocyte", "neutrophil", "macrophage"}

    members = tmp_path / "predictions"
    predicted = run("predict", checkpoint, members / "tiny.json", "--release", made)
    assert predicted.exit_code == 0, predicted.output
    merged = run("ensemble", members, "--output-dir", tmp_path)
    assert merged.exit_code == 0, merged.output
    assert (tmp_path / "test-results.zip").exists()
    assert "pages" in run("report", runs / "tiny").output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cascade", "--set cascade: write it as key=value"),
        ("crop=3", "nothing takes the setting 'crop'; use one of .*cascade.*views"),
        ("seed=3", "--set seed: it has an option of its own, --seed"),
        ("save_every=3", "it has an option of its own, --save-minutes"),
    ],
)
def test_settings_that_nothing_takes_are_told_before_anything_is_read(given, message):
    result = run("train", "nowhere", "--preset", "quick", "--set", given)
    assert isinstance(result.exception, SettingsError)
    assert re.search(message, str(result.exception))


def test_every_setting_with_an_option_of_its_own_is_one_of_a_recipe():
    presets.group_settings(dict.fromkeys(training.OPTIONS))


def test_images_that_are_alike_stay_on_one_side_of_the_split(tmp_path):
    rng = np.random.default_rng(0)
    pairs = ("ab", "cd", "ef")
    for pair in pairs:
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        for name in pair:
            write_sample(tmp_path / name, pixels)
    dataset = data.CellDataset(tmp_path)

    def torn(split):
        return [pair for pair in pairs if len(set(pair) & set(split.val_ids)) == 1]

    for seed in range(5):
        split = training.divide(dataset, None, 0.3, "alike", seed)
        assert split.groups == {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "f": 3}
        assert sorted(split.train_ids + split.val_ids) == list("abcdef") and not torn(split)
    splits = [training.divide(dataset, None, 0.3, "random", seed) for seed in range(5)]
    assert any(torn(split) for split in splits) and not any(split.groups for split in splits)
    assert training.divide(dataset, ["a"], 0.3, "alike", 0) == (list("bcdef"), ["a"], None)


def test_each_option_of_train_reaches_the_part_that_it_is_for(tmp_path, monkeypatch):
    for name in "abcde":
        stained_sample(tmp_path / "train" / name)
    monkeypatch.setattr(training, "_train_once", trained := Mock())
    done = run(
        "train", tmp_path / "train", "--preset", "quick", "--groups", "random",
        "--val-fraction", 0.4, "--image-scale", 0.5, "--network-size", 64, "--batch-size", 3,
        "--rois-per-image", 77, "--head-width", 33, "--learning-rate", 0.003, "--minutes", 2,
        "--validate-every", 5, "--precision", "float32", "--runs-dir", tmp_path / "runs",
        "--name", "r", "--on-change", "continue", "--save-minutes", 3, "--keep-checkpoints", 4,
        "--tracker", "tensorboard", "--workers", 0, "--no-cache", "--seed", 6, "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (build, dataset, split, parts, *place), options = trained.call_args
    assert (len(split.train_ids), len(split.val_ids), dataset.cache) == (3, 2, None)
    model = {"weights": None, "seed": 6, "image_scale": 0.5, "rois_per_image": 77, "head_width": 33}
    assert build.func is presets.pick_builder("mobilenetv2") and build.args == (5,)
    assert model.items() <= build.keywords.items()
    assert parts["transform"]["crop_size"] == 128  # 64 network pixels at a scale of 0.5
    assert parts["loaders"]["batch_size"] == 3
    schedule = {"learning_rate": 0.003, "time_budget": 120, "epochs": None, "validate_every": 5}
    assert (schedule | {"precision": "float32"}).items() <= parts["fit"].items()
    assert place == [tmp_path / "runs", "r"]
    assert options.pop("ranks").first
    assert options == {
        "on_change": "continue", "workers": 0, "device": "cpu", "seed": 6, "save_every": 180,
        "keep_checkpoints": 4, "tracker": "tensorboard",
    }  # fmt: skip


def test_each_option_of_report_reaches_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cellseg.report.build_report", built := Mock())
    built.return_value.warnings = ["no words"]
    told = run(
        "report", tmp_path, "--title", "Cells", "--name", "A", "--student-id", "B",
        "--data-set", "CoNSeP", "--output", "x.pdf", "--no-tissue",
    )  # fmt: skip
    assert "warning: no words" in told.stderr
    built.assert_called_once_with(
        tmp_path, title="Cells", name="A", student_id="B", data_set="CoNSeP", output=Path("x.pdf"),
        tissue=False,
    )  # fmt: skip


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
    scores = json.loads(
        run("evaluate", tmp_path / "records.json", tmp_path / "train", "--json").stdout
    )
    assert list(scores["ap50_per_class"]) == ["spindle", "round"]


def test_ids_are_a_list_or_a_file_of_one_a_line(tmp_path):
    (tmp_path / "ids.txt").write_text("a\r\n\r\nb c \r\n", encoding="utf-8-sig")  # by Windows
    assert shared.read_ids(str(tmp_path / "ids.txt")) == ["a", "b c"]
    assert shared.read_ids(" a,b c, ") == ["a", "b c"]
    assert shared.read_ids(None) is None
    (tmp_path / "none.txt").write_text("\n")
    for empty in ("", ",", str(tmp_path / "none.txt")):
        with pytest.raises(SettingsError, match="names no sample; give names of folders"):
            shared.read_ids(empty)


def test_a_long_list_of_ids_is_not_taken_for_a_file():
    assert shared.read_ids(",".join(["sample"] * 200)) == ["sample"] * 200

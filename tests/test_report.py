"""The report: what its pages say, the student's own part, strange names, damage, lost fonts."""

import inspect
import json
import re
import shutil
import subprocess
from dataclasses import asdict, fields

import numpy as np
import pytest
import typst
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import write_squares
from typer.testing import CliRunner

from cellseg import presets
from cellseg.cli import app
from cellseg.coco import make_record, mask_to_rle, read_records, sort_records, write_records
from cellseg.data import TrainTransform, make_loaders
from cellseg.errors import CellsegError, DataError
from cellseg.evaluation import evaluate_records, truth_from_targets
from cellseg.models import DetectorOptions
from cellseg.report import build_report, evaluate_run
from cellseg.report.facts import facts_of_run, read_epochs
from cellseg.report.glyphs import pick_fonts
from cellseg.report.reasons import REASONS
from cellseg.report.student import CHAPTERS, read_experiments, read_words
from cellseg.training import EpochSummary, fit, write_evaluation
from cellseg.training.run import write_history

SETTINGS = {
    "run_name": "mobilenetv2-3f9a1c",
    "model": {
        "builder": "get_model_mobilenetv2",
        "arguments": {"weights": None, "anchor_sizes": [8, 16], "image_scale": 1.0},
    },
    "provenance": "random initialisation",
    "trainable_parameters": 12_345_678,
    "class_names": ["epithelial", "lymphocyte"],
    "train_ids": ["a", "b", "c"],
    "val_ids": ["d"],
    "channel_order": "swapped",
    "recipe": {"learning_rate": 4e-4, "flip": True},
    "seed": 7,
    "versions": {"torch": "2.14.1"},
    "device": "cpu",
    "data": {
        "source": "made tissue",
        "fingerprint": "3f9a1c77aa0012ffee",
        "images": 4,
        "cells_per_class": {"epithelial": 1500, "lymphocyte": 500},
    },
    "sample_data": True,
    "started": "2026-03-05T08:00:00+00:00",
}
SCORES = {"ap": 0.31, "ap50": 0.624, "ap50_per_class": {"epithelial": 0.7, "lymphocyte": None}}
DRAWING = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"><path d="M2 2H30V20Z"/></svg>'
)
CONFUSION = {
    "matrix": [[1234, 5, 6], [7, 8, 9], [1, 2, 0]],
    "class_names": ["epithelial", "lymphocyte"],
    "score_threshold": 0.5,
    "iou_threshold": 0.5,
}


def epoch(number, train_loss, **measured):
    """Return an epoch in which nothing but the loss was measured, unless said."""
    nothing = dict.fromkeys(
        ("val_loss", "ap", "ap50", "ap75", "ap50_100", "train_ap50", "peak_memory_mb")
    )
    given = {"epoch": number, "step": 10 * number, "train_loss": train_loss} | nothing | measured
    return EpochSummary(
        learning_rate=1e-3, losses={"train": {}, "val": {}}, ap50_per_class={}, seconds=0.0,
        images_per_second=1.0, **given,
    )  # fmt: skip


def write_run(folder, *, settings=SETTINGS, full=True):
    """Write a run's folder of two epochs, with scores, matrix and an overlay if full."""
    (folder / "figures").mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    write_history(folder, [epoch(1, 2.0, ap50=0.4), epoch(2, 1.0)])
    if full:
        (folder / "scores.json").write_text(json.dumps(SCORES), encoding="utf-8")
        (folder / "confusion.json").write_text(json.dumps(CONFUSION), encoding="utf-8")
        pixels = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
        for name in ("overlay_1", "gallery"):
            Image.fromarray(pixels).save(folder / "figures" / f"{name}.png")
        for name in ("precision_recall", "calibration"):
            (folder / "figures" / f"{name}.svg").write_text(DRAWING, encoding="utf-8")
    return folder


def squares(image_id, *corners, size=8, label=1, score=0.9):
    """Return records of square cells with these top left corners in an image of 40 x 60."""
    records = []
    for row, column in corners:
        mask = np.zeros((40, 60), dtype=bool)
        mask[row : row + size, column : column + size] = True
        records.append(make_record(image_id, label, score, mask_to_rle(mask)))
    return records


def evaluate(folder, found, *, groups=None, val_ids=("d",)):
    """Write a run of three images of two cells, of which so many were found in each."""
    write_run(folder, settings=SETTINGS | {"val_ids": list(val_ids)}, full=False)
    corners = ((2, 3), (20, 30))
    targets = []
    for image_id in (1, 2, 3):
        instance_map = np.zeros((1, 40, 60), dtype=np.int32)
        for k, (row, column) in enumerate(corners, start=1):
            instance_map[0, row : row + 8, column : column + 8] = k
        target = {"instance_map": instance_map, "labels": np.array([1, 2]), "image_id": image_id}
        targets.append(target)
    truth = truth_from_targets(targets, SETTINGS["class_names"])
    records = [
        record
        for image_id, number in enumerate(found, start=1)
        for k in range(number)
        for record in squares(image_id, corners[k], label=k + 1)
    ]
    scored = evaluate_records(truth, records, groups=groups)
    write_evaluation(folder, truth, records, scored, groups=groups)
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run after evaluation, and beside it `elsewhere`, validated on other images."""
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(folder / "elsewhere", (1, 1, 1), val_ids="xyz")
    return evaluate(folder / "run", (2, 1, 1))


def read_text(report):
    """Return the words on the pages, spaces between lines made one."""
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed")
    command = ["pdftotext", "-layout", str(report.path), "-"]
    text = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    return re.sub(r"\s+", " ", text)


def has_chinese_font():
    return len(pick_fonts(typst.Fonts())) > 1


def test_a_run_that_held_no_image_out_says_so(tmp_path):
    settings = SETTINGS | {"train_ids": ["a", "b", "c", "d"], "val_ids": []}
    text = read_text(build_report(write_run(tmp_path / "run", settings=settings, full=False)))
    assert "all trained on, none held out" in text and "No image was held out" in text
    assert "0 for validation" not in text and "The best epoch" not in text


def test_report_tells_the_run_in_the_course_order(tmp_path):
    report = build_report(write_run(tmp_path / "run"), name="Ada", student_id="R1", title="Cells")
    assert report.path == tmp_path / "run" / "report.pdf"
    assert report.warnings == []
    text = read_text(report)
    parts = (
        "1 Introduction", "2 Method", "3 Results", "4 Additional experiments", "References",
        "Compliance",
    )  # fmt: skip
    places = [text.rindex(part) for part in parts]
    assert places == sorted(places)
    for words in (
        "Cells",
        "Ada · R1",
        "2,000 annotated cells",
        "75.0%",
        "12.3 million",
        "0.624",
        "1,234",
        "MobileNetV2",
        "0.0004",
        "5 March 2026",
        "best epoch was 1",
        "98% of the annotated cells are found with the right class",
        "12.3 M trainable parameters, fewer than 200 M; weights: random initialisation",
    ):
        assert words in text
    assert report.path.stat().st_size < 3_000_000


def test_settings_stand_beside_their_reasons(tmp_path):
    text = read_text(build_report(write_run(tmp_path / "run")))
    assert "anchor sizes 8, 16 network pixels; the usual 32 to 512 are larger" in text
    assert "learning rate 0.0004 AdamW; on tissue 5e-4 beat 1e-3 and 2e-3" in text
    assert "flip yes" in text


def test_evaluated_run_shows_intervals_errors_and_what_costs_most(tmp_path):
    run_dir = evaluate(tmp_path / "run", (2, 1, 1))
    stored = json.loads((run_dir / "scores.json").read_text(encoding="utf-8"))
    assert stored["images"] == 3 and stored["groups"] is None
    interval = stored["intervals"]["ap50"]
    assert interval["low"] < interval["value"] == stored["ap50"] < interval["high"]
    text = read_text(build_report(run_dir))
    assert f"{interval['low']:.3f}–{interval['high']:.3f}" in text
    assert "1,000 draws of 3 images" in text and "PQ" in text and "AJI" in text
    assert "Here it is missed: AP50 would be 1.000" in text
    assert re.search(r"missed 2 1\.000 \+0\.\d{3}", text)
    # Of three lymphocytes one is found, and nothing is false.
    by_class = stored["intervals_per_class"]["lymphocyte"]
    shown = f"lymphocyte {by_class['value']:.3f} {by_class['low']:.3f}–{by_class['high']:.3f}"
    ends = stored["nuclei_intervals_per_class"]["lymphocyte"]["pq"]
    pq = f"0.500 {ends['low']:.3f}–{ends['high']:.3f}"
    assert f"{shown} {pq} 0.500 1.000 0.333 0.500 0.500 0.500" in text


def test_intervals_by_groups_are_called_so(tmp_path):
    run_dir = evaluate(tmp_path / "run", (2, 1, 0), groups={1: "x", 2: "x", 3: "y"})
    assert "1,000 draws of 2 groups of 3 images" in read_text(build_report(run_dir))


@pytest.mark.parametrize("tissue", [True, False])
def test_tissue_is_left_out_where_it_may_not_be_shown(tissue, tmp_path):
    text = read_text(build_report(write_run(tmp_path / "run"), tissue=tissue))
    assert ("Validation image 1" in text and "largest missed cells" in text) == tissue
    assert ("figures that show tissue are left out" in text) != tissue
    assert "Precision and recall of each class" in text  # a drawing, no tissue


def test_command_leaves_tissue_out(tmp_path):
    command = ["report", str(write_run(tmp_path / "run")), "--no-tissue", "--name", "Ada"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "pages" in done.output
    shutil.copyfile(tmp_path / "run" / "report.pdf", tmp_path / "none.pdf")
    build_report(tmp_path / "run", name="Ada", tissue=False)
    assert (tmp_path / "none.pdf").read_bytes() == (tmp_path / "run/report.pdf").read_bytes()


def test_data_sets_are_cited_where_they_are_named(tmp_path):
    run_dir = write_run(tmp_path / "run")
    assert "HoVer-Net: " not in (plain := read_text(build_report(run_dir)))
    assert "MoNuSAC" not in plain
    (run_dir / "words.md").write_text("# Data\nThe images of MoNuSAC.\n", encoding="utf-8")
    assert "MoNuSAC2020: A Multi" in read_text(build_report(run_dir))


def test_the_name_of_the_data_is_printed_and_cited(tmp_path):
    run_dir = write_run(tmp_path / "run", settings=SETTINGS | {"sample_data": False})
    text = read_text(build_report(run_dir, data_set="CoNSeP, pieces"))
    assert "(CoNSeP, pieces) were" in text and "made tissue" not in text
    assert "HoVer-Net: " in text
    command = ["report", str(run_dir), "--data-set", "CoNSeP, pieces", "--output"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "b.pdf")]).exit_code == 0
    assert (tmp_path / "b.pdf").read_bytes() == (run_dir / "report.pdf").read_bytes()


@pytest.mark.parametrize(
    ("scale", "words"),
    [(1.0, "whole cells at their native scale"), (2.0, "whole cells, 2 times as large as the")],
)
def test_scale_is_told_as_it_is(scale, words, tmp_path):
    model = {"builder": "get_model_resnet50v2", "arguments": {"image_scale": scale}}
    run_dir = write_run(tmp_path / "run", settings=SETTINGS | {"model": model})
    assert words in read_text(build_report(run_dir))


def test_settings_of_prediction_are_told(tmp_path):
    looks = {"views": "turns", "mask_threshold": 0.5}
    run_dir = write_run(tmp_path / "run", settings=SETTINGS | {"prediction": looks})
    text = read_text(build_report(run_dir))
    assert "looks at an image, in validation as at the test" in text
    assert "views turns at test: d4" in text and "mask threshold 0.5 a pixel is" in text


@pytest.mark.parametrize("path", ["/home/me/secret/own.pth", r"C:\Users\me\secret\own.pth"])
def test_the_folder_of_weights_is_not_told(path, tmp_path):
    model = {"builder": "get_model_resnet50v2", "arguments": {"weights": path}}
    run_dir = write_run(tmp_path / "run", settings=SETTINGS | {"model": model})
    text = read_text(build_report(run_dir))
    assert "own.pth" in text and "secret" not in text


def test_every_setting_of_a_run_has_a_reason():
    functions = (TrainTransform, make_loaders, fit)
    parameters = [p for made in functions for p in inspect.signature(made).parameters.values()]
    names = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    names |= {field.name for field in fields(DetectorOptions)} | {*presets.PREDICTION}
    about_the_machine = {
        "run_dir", "device", "workers", "resume", "save_every", "keep_checkpoints", "tracker",
        "progress", "ranks",
    }  # fmt: skip
    assert not names - about_the_machine - REASONS.keys()
    assert all(len(reason) < 80 for reason in REASONS.values())


# An evaluation, and what a report makes of it


def squares_run(tmp_path, **changes):
    """Write three samples and a run that held them out; return both and some records."""
    cells = [(1, 4, 5, 18, 17), (2, 30, 20, 46, 38)]
    dataset = write_squares(tmp_path / "train", {name: (40, 60, cells) for name in "abc"})
    held = {"class_names": list(dataset.class_names), "val_ids": list("abc")}
    run_dir = write_run(tmp_path / "run", settings=SETTINGS | held | changes, full=False)
    records = squares(1, (5, 4), size=12) + squares(2, (21, 31), size=17, label=2, score=0.6)
    return run_dir, dataset, records + squares(3, (0, 50), score=0.7)


def test_evaluation_of_a_run_writes_all_that_its_report_looks_for(tmp_path):
    run_dir, dataset, records = squares_run(tmp_path, groups={"a": 1, "b": 1, "c": 2})
    found = evaluate_run(run_dir, dataset, records)
    assert found.evaluation.groups == 2 and found.evaluation.images == 3
    assert found.evaluation.matrix.tolist() == [[1, 0, 2], [0, 1, 2], [1, 0, 0]]
    written = {path.relative_to(run_dir).as_posix() for path in found.paths}
    drawings = {"confusion_matrix", "precision_recall", "errors_mended", "calibration"}
    tissue = {"overlay_1", "overlay_2", "overlay_3", "gallery"}
    assert written == {
        "scores.json", "errors.json", "confusion.json", "truth.json", "validation.json",
        *(f"figures/{name}.png" for name in drawings | tissue),
        *(f"figures/{name}.svg" for name in drawings),
    }  # fmt: skip
    assert set(found.figures) == drawings | tissue
    assert all(path.stat().st_size > 100 for path in found.paths)
    assert read_records(run_dir / "validation.json") == sort_records(records)
    report = build_report(run_dir)
    assert "folder holds no" not in read_text(report)
    assert "1,000 draws of 2 groups of 3 images" in read_text(report)


def test_report_without_tissue_is_small(tmp_path):
    run_dir, dataset, records = squares_run(tmp_path)
    evaluate_run(run_dir, dataset, records)
    assert build_report(run_dir, tissue=False).path.stat().st_size < 300_000


def folds_run(tmp_path):
    """Turn a run into one of three folds, each of which held out one sample."""
    run_dir, dataset, records = squares_run(tmp_path, val_ids=["a"], train_ids=["b", "c"])
    folder = tmp_path / "folds"
    folder.mkdir()
    run_dir.rename(folder / "fold1")
    folds = [
        {"name": f"fold{k}", "val_ids": [name], "best_epoch": k, "scores": {"ap50": k / 10}}
        for k, name in enumerate("abc", start=1)
    ]
    content = {"groups": dict(zip("abc", (0, 0, 1), strict=True)), "folds": folds}
    content |= {"oof": {"ap50": 0.2}, "all": {"epochs": 2}}
    (folder / "folds.json").write_text(json.dumps(content), encoding="utf-8")
    write_records(folder / "oof.json", records)
    return folder, dataset, records


def test_report_of_folds_tells_each_of_them_and_the_scores_of_all(tmp_path):
    folder, dataset, records = folds_run(tmp_path)
    found = evaluate_run(folder, dataset, records)
    assert found.evaluation.groups == 2
    assert not (folder / "validation.json").exists()  # oof.json has them
    text = read_text(build_report(folder))
    for words in (
        "Run folds",
        "each held out once by one of 3 models",
        "2 epochs were trained in the first fold",
        "The curves are those of the first fold",
        "each found by the model that did not see it",
        "2 1 2 0.200",
        "Training on all images takes 2 epochs",
    ):
        assert words in text


# The student's part


def test_prompts_are_printed_until_words_replace_them(tmp_path):
    run_dir = write_run(tmp_path / "run")
    assert "Why is the task hard on these images?" in read_text(build_report(run_dir))
    words = (run_dir / "words.md").read_text(encoding="utf-8")
    prompt = f"> {CHAPTERS['Introduction']}"
    own = "We look at *nuclei* #1 [@x]\nof the gut.\n\n- first\n- second"
    mine = words.replace(prompt, own).replace(f"> {CHAPTERS['Data']}", "")
    (run_dir / "words.md").write_text(mine, encoding="utf-8")
    text = read_text(build_report(run_dir))
    assert "We look at *nuclei* #1 [@x] of the gut." in text and "first" in text
    assert "Why is the task hard" not in text and "What did you see" not in text
    assert "Why this backbone?" in text
    assert (run_dir / "words.md").read_text(encoding="utf-8") == mine


@pytest.mark.parametrize(
    ("content", "blocks", "is_prompt"),
    [
        ("# Results\n> Tell.\n> More.", ["Tell. More."], True),
        ("# Results\n> Tell.\nI tell.", ["I tell."], False),  # the prompt was forgotten
        ("# Results\n", [], True),
        ("", [], True),
        ("\ufeff# RESULTS #\r\none\r\n\r\ntwo", ["one", "two"], False),  # a Windows editor's
        ("# Results\n- a\n  b\n* c\n\nd", [["a b", "c"], "d"], False),
        ("# Results\na\n# Data\nb\n# Results\nc", ["a c"], False),
        ("# Results\n#hashtag\n## sub", ["#hashtag ## sub"], False),
    ],
)
def test_words_are_read_by_chapter(content, blocks, is_prompt, tmp_path):
    (tmp_path / "words.md").write_bytes(content.encode())
    assert read_words(tmp_path)["Results"] == {"blocks": blocks, "is_prompt": is_prompt}


def test_unknown_chapter_is_named(tmp_path):
    (tmp_path / "words.md").write_text("# Results\nx\n# Conclusion\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"words.md, line 3: 'Conclusion' is no chapter .* use one"):
        read_words(tmp_path)


def test_example_of_the_experiments_can_be_uncommented(tmp_path):
    assert read_experiments(tmp_path) == []
    path = tmp_path / "experiments.toml"
    lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()]
    begin = lines.index("[[experiment]]")
    example = "\n".join(lines[begin : lines.index("#", begin)])
    path.write_text(f"# mine\n\n{example}\n", encoding="utf-8")
    (experiment,) = read_experiments(tmp_path)
    assert experiment.line == 3 and experiment.after == "." and experiment.statistic == "ap50"
    assert experiment.title == "Half the learning rate"


def test_experiment_compares_two_runs_on_the_same_images(tmp_path):
    old, run_dir = evaluate(tmp_path / "old", (1, 1, 1)), evaluate(tmp_path / "new", (2, 2, 2))
    (run_dir / "experiments.toml").write_text(
        '[[experiment]]\ntitle = "More"\nhypothesis = "H"\nwhy = "W"\n'
        'before = "../old"\nafter = "."\nresult = "Confirmed."\n',
        encoding="utf-8",
    )
    text = read_text(build_report(run_dir))
    assert "4.1 More" in text and "Confirmed." in text
    assert "AP50 is 1.000 with new and 0.500 with old: +0.500" in text
    assert "AP50, old AP50, new difference 95 % interval" in text
    write_records(old / "other.json", [])
    (run_dir / "experiments.toml").write_text(
        '[[experiment]]\nbefore = "../old/other.json"\nafter = "../new/validation.json"\n'
        'statistic = "pq"\n',
        encoding="utf-8",
    )
    text = read_text(build_report(run_dir))
    assert "PQ is 1.000 with validation and 0.000 with other" in text
    assert "what should change the score" in text  # the hypothesis was left out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[[experiment]]\ntitle = "a"\nwhy = b"\n', r"line 3: not valid TOML .* double quotes"),
        ('[[experiment]]\ntitle = "a', r"line 2: not valid TOML"),
        ('[[experiments]]\ntitle = "a"\n', r"line 1: 'experiments' belongs to no experiment"),
        ('\ntitle = "a"\n', r"line 2: 'title' belongs to no experiment; begin each with a line"),
        ('[experiment]\ntitle = "a"\n', r"line 1: 'experiment' belongs to no experiment"),
        ('[[experiment]]\n\n[[experiment]]\nwy = "b"\n', r"line 3: .* has 'wy'; it may have"),
        ("[[experiment]]\nwhy = 3\n", r'line 1: .* why = 3; write a text in quotes, "3"'),
        ("experiment = [3]\n", r"line 1: experiment is 3; begin with"),
        ('[[experiment]]\nafter = "."\n', r"line 1: .* has after but not before; give both"),
        (
            '[[experiment]]\nafter = "."\nbefore = "../gone"\n',
            r"line 1: nothing to compare: .*gone does not exist; name a run",
        ),
        (
            '[[experiment]]\nafter = "."\nbefore = "../elsewhere"\n',
            r"line 1: .*elsewhere was validated on other images than .*; compare runs of one split",
        ),
        (
            '[[experiment]]\nafter = "."\nbefore = "."\nstatistic = "auc"\n',
            r"line 1: nothing to compare: statistic 'auc' is not one of ap, ap50",
        ),
    ],
)
def test_fault_in_the_experiments_is_named_with_its_line(content, message, evaluated):
    run_dir = evaluated
    (run_dir / "experiments.toml").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"experiments.toml, {message}"):
        build_report(run_dir)


def test_comparison_needs_the_truth(tmp_path):
    run_dir = write_run(tmp_path / "run")
    (run_dir / "experiments.toml").write_text(
        '[[experiment]]\nafter = "."\nbefore = "."\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"line 1: nothing to compare: .*truth.json does not exist"):
        build_report(run_dir)


@pytest.mark.parametrize("full", [True, False])
def test_same_folder_gives_the_same_bytes(full, tmp_path):
    run_dir = write_run(tmp_path / "run", full=full)
    reports = [build_report(run_dir, output=tmp_path / f"{name}.pdf") for name in "ab"]
    assert reports[0].path.read_bytes() == reports[1].path.read_bytes()


def test_sample_run_is_marked_on_every_page_and_a_real_one_on_none(tmp_path):
    sample = build_report(write_run(tmp_path / "sample"))
    real = build_report(write_run(tmp_path / "real", settings=SETTINGS | {"sample_data": False}))
    assert sample.pages > 1
    assert read_text(sample).count("Made from sample data") == sample.pages
    assert "sample data" not in read_text(real)


def test_missing_parts_are_said(tmp_path):
    report = build_report(write_run(tmp_path / "run", full=False))
    text = read_text(report)
    for name in (
        "scores.json", "confusion.json", "errors.json", "figures/overlay*.png",
        "figures/gallery.png", "figures/precision_recall.svg", "figures/calibration.svg",
    ):  # fmt: skip
        assert f"holds no {name}" in text


def test_markup_in_a_name_comes_out_literally(tmp_path):
    name = 'A "B" #let *c* [d] $e$ \\ @f <g> _h_ `i` // ~'
    report = build_report(write_run(tmp_path / "run"), name=name)
    assert name in read_text(report)


@pytest.mark.skipif(not has_chinese_font(), reason="no Chinese font is installed")
def test_chinese_name_comes_out_where_a_font_is_installed(tmp_path):
    report = build_report(write_run(tmp_path / "run"), name="王小明")
    assert report.warnings == []
    assert "王小明" in read_text(report)


def test_chinese_name_without_a_font_is_left_out_with_a_warning(tmp_path):
    run_dir = write_run(tmp_path / "run")
    report = build_report(run_dir, name="王小明 Ming", student_id="R1", system_fonts=False)
    (warning,) = report.warnings
    assert "'小明王' (in '王小明 Ming')" in warning and "fonts-noto-cjk" in warning
    text = read_text(report)
    assert "Ming · R1" in text and "王" not in text


def test_letters_of_latin_greek_and_cyrillic_need_no_system_font(tmp_path):
    run_dir = write_run(tmp_path / "run")
    report = build_report(run_dir, name="Łukasz Đỗ Ωμέγα Жанна", system_fonts=False)
    assert report.warnings == []


def test_overlay_is_printed_small(tmp_path):
    run_dir = write_run(tmp_path / "run")
    Image.effect_noise((3000, 1500), 60).save(run_dir / "figures" / "overlay_0.png")
    Image.effect_noise((3000, 1500), 60).save(run_dir / "figures" / "gallery.png")
    assert build_report(run_dir).path.stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.json", None, "settings.json does not exist"),
        ("metrics.jsonl", None, "metrics.jsonl does not exist: train at least one epoch"),
        ("metrics.jsonl", "", "metrics.jsonl is empty"),
        ("metrics.jsonl", '{"epo', "metrics.jsonl, line 1 is no epoch .*; remove that line"),
        ("metrics.jsonl", '{"epoch": 1, "ap50": "x"}', "metrics.jsonl, line 1 is no epoch"),
        ("metrics.jsonl", "[" * 10**5, "metrics.jsonl, line 1 is no epoch"),
        ("settings.json", "[]", r"settings.json is not as a run writes it \(it holds a list\)"),
        ("settings.json", '{"class_names": "ab"}', "settings.json .*class_names is 'ab'.*; open"),
        ("settings.json", '{"model": [3]}', "settings.json is not as a run writes it"),
        ("scores.json", "{", "scores.json is not valid JSON"),
        ("scores.json", '{"ap50": "x"}', "scores.json is not as .*; remove it, or evaluate"),
        ("confusion.json", "{}", r"confusion.json .*\(no 'class_names'\); remove it, or eval"),
        (
            "confusion.json",
            json.dumps(CONFUSION | {"matrix": [[1, 2], [3, 4]]}),
            "confusion.json .*the matrix is not square for 2 classes and background",
        ),
        ("errors.json", '{"kinds": {}, "perfect": {}}', "errors.json is not as a run writes it"),
        ("figures/gallery.png", "x", "gallery.png is no usable image .* draw it anew"),
        ("figures/calibration.svg", "x", "calibration.svg is no usable drawing .* evaluate the"),
        ("figures/calibration.svg", "<html/>", r"calibration.svg is no usable drawing \(no SVG\)"),
    ],
)
def test_damaged_run_is_named(file, content, message, tmp_path):
    path = write_run(tmp_path / "run") / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(CellsegError, match=message):
        build_report(tmp_path / "run")
    assert not (tmp_path / "run" / "report.pdf").exists()


def test_one_epoch_without_validation_and_a_bare_settings_file(tmp_path):
    run_dir = write_run(tmp_path / "run", settings={"run_name": "bare"}, full=False)
    write_history(run_dir, [epoch(1, 2.0)])
    assert build_report(run_dir).pages >= 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["settings.json", "scores.json", "confusion.json", "errors.json"]),
    st.integers(0, 30),
    VALUES,
)
def test_any_value_in_a_file_is_shown_or_refused_by_name(evaluated, name, place, value):
    run_dir = evaluated
    path = run_dir / name
    content = path.read_text(encoding="utf-8")
    damaged = json.loads(content)
    damaged[sorted(damaged)[place % len(damaged)]] = value
    path.write_text(json.dumps(damaged), encoding="utf-8")
    try:
        json.dumps(facts_of_run(run_dir), allow_nan=False)
    except DataError as error:
        assert name in str(error)
    finally:
        path.write_text(content, encoding="utf-8")


@given(st.lists(st.dictionaries(st.sampled_from(["epoch", "ap50", "seconds"]), VALUES)))
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_line_is_an_epoch_or_refused_by_name(tmp_path, rows):
    lines = "\n".join(json.dumps(asdict(epoch(1, 2.0)) | row) for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    try:
        epochs = read_epochs(tmp_path)
        assert all(isinstance(row["epoch"], int) for row in epochs)
        json.dumps(epochs, allow_nan=False)
    except CellsegError as error:
        assert "metrics.jsonl" in str(error)

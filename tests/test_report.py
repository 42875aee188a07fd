"""The report: what its pages say, what it does with strange names, missing parts, lost fonts."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import typst
from PIL import Image

from cellseg.errors import DataError
from cellseg.report import build_report
from cellseg.report.glyphs import pick_fonts

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
CONFUSION = {
    "matrix": [[1234, 5, 6], [7, 8, 9], [1, 2, 0]],
    "class_names": ["epithelial", "lymphocyte"],
    "score_threshold": 0.5,
    "iou_threshold": 0.5,
}


def write_run(folder, *, settings=SETTINGS, full=True):
    """Write a run's folder of two epochs, with scores, matrix and an overlay if full."""
    epochs = [{"epoch": 1, "train_loss": 2.0, "ap50": 0.4}, {"epoch": 2, "train_loss": 1.0}]
    (folder / "figures").mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in epochs)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if full:
        (folder / "scores.json").write_text(json.dumps(SCORES), encoding="utf-8")
        (folder / "confusion.json").write_text(json.dumps(CONFUSION), encoding="utf-8")
        pixels = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "figures" / "overlay_1.png")
    return folder


def read_text(report):
    """Return the words on the pages, spaces between lines made one."""
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed")
    command = ["pdftotext", "-layout", str(report.path), "-"]
    text = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    return re.sub(r"\s+", " ", text)


def has_chinese_font():
    return len(pick_fonts(typst.Fonts())) > 1


def test_report_tells_the_run_in_the_course_order(tmp_path):
    report = build_report(write_run(tmp_path / "run"), name="Ada", student_id="R1", title="Cells")
    assert report.path == tmp_path / "run" / "report.pdf"
    assert 1 <= report.pages <= 3 and report.warnings == []
    text = read_text(report)
    parts = ["Introduction", "Method", "Results", "Additional experiments", "References"]
    places = [text.index(part) for part in parts]
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
    ):
        assert words in text


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
    for name in ("scores.json", "confusion.json", "figures/overlay*.png"):
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
    assert build_report(run_dir).path.stat().st_size < 600_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.json", None, "settings.json does not exist"),
        ("metrics.jsonl", None, "metrics.jsonl does not exist: train at least one epoch"),
        ("metrics.jsonl", "", "metrics.jsonl is empty"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo', "metrics.jsonl: line 2 is not an epoch"),
        ("scores.json", "{", "scores.json is not valid JSON"),
    ],
)
def test_damaged_run_is_named(file, content, message, tmp_path):
    path = write_run(tmp_path / "run") / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        build_report(tmp_path / "run")
    assert not (tmp_path / "run" / "report.pdf").exists()


def test_one_epoch_without_validation_and_a_bare_settings_file(tmp_path):
    run_dir = write_run(tmp_path / "run", settings={"run_name": "bare"}, full=False)
    (run_dir / "metrics.jsonl").write_text('{"epoch": 1, "train_loss": 2.0}\n', encoding="utf-8")
    assert build_report(run_dir).pages >= 1

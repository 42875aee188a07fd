"""Figures of the analysis: what they hold, for empty inputs too; how they look is for the eye."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from cellseg.coco import make_record, mask_to_rle
from cellseg.evaluation import (
    KINDS,
    calibrate,
    class_curves,
    explain_errors,
    truth_from_targets,
    worst_cells,
)
from cellseg.report import (
    plot_calibration,
    plot_errors_mended,
    plot_gallery,
    plot_precision_recall,
)
from cellseg.report.style import save_figure

NAMES = ("epithelial", "lymphocyte", "neutrophil")
HEIGHT, WIDTH = 40, 90
A, B, C = (0, 5, 10, 15), (30, 5, 40, 15), (70, 20, 90, 40)  # at two borders of the image


def record(category_id, score, box):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = True
    return make_record(4, category_id, score, mask_to_rle(mask))


def truth_of(cells):
    instance_map = np.zeros((1, HEIGHT, WIDTH), dtype=np.int32)
    for k, (_, (x1, y1, x2, y2)) in enumerate(cells):
        instance_map[0, y1:y2, x1:x2] = k + 1
    labels = np.array([label for label, _ in cells], dtype=np.int64)
    return truth_from_targets(
        [{"instance_map": instance_map, "labels": labels, "image_id": 4}], NAMES
    )


@pytest.fixture
def case():
    truth = truth_of([(1, A), (2, B), (1, C)])
    found = [(1, 0.9, A), (1, 0.8, (1, 5, 11, 15)), (1, 0.7, B), (2, 0.6, (55, 25, 60, 30))]
    return truth, [record(*entry) for entry in found]


def test_precision_recall_draws_the_classes_that_occur(case):
    (axis,) = plot_precision_recall(class_curves(*case)).axes
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["epithelial: 0.505; 0.67 at 0.90", "lymphocyte: 0.000"]
    assert axis.get_title("left") == "AP50 is 0.252, the mean over 2 classes"
    x, y = axis.lines[1].get_data()
    assert x.tolist() == [0, 0.5, 0.5, 0.5, 0.5]
    assert y.tolist() == pytest.approx([1, 1, 0.5, 1 / 3, 0])


def test_errors_mended_has_a_bar_a_mend(case):
    report = explain_errors(*case)
    (axis,) = plot_errors_mended(report).axes
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == [mend.gain for mend in (report.kinds | report.perfect).values()]
    assert [text.get_text() for text in axis.get_yticklabels()][3] == "duplicate (1)"
    assert (
        axis.get_title("left") == 'AP50 is 0.252; of the kinds of error, "wrong class" costs most'
    )


def test_calibration_draws_full_bins_only(case):
    axis, below = plot_calibration(calibrate(*case)).axes
    (line,) = [line for line in axis.lines if line.get_label() == "these records"]
    np.testing.assert_allclose(line.get_xdata(), [0.6, 0.7, 0.8, 0.9])
    np.testing.assert_allclose(line.get_ydata(), [0, 0, 0, 1])
    assert sum(bar.get_height() for bar in below.patches) == 4
    assert axis.get_title("left") == "Scores are off by 0.550 in the mean, on the whole too high"


@pytest.mark.parametrize("channels_first", [True, False])
def test_gallery_shows_a_row_a_kind(case, channels_first):
    shape = (3, HEIGHT, WIDTH) if channels_first else (HEIGHT, WIDTH, 3)
    picks = worst_cells(*case)
    figure = plot_gallery({4: np.full(shape, 200, dtype=np.uint8)}, picks, NAMES)
    drawn = {axis.texts[0].get_text(): axis for axis in figure.axes if axis.texts}
    assert list(drawn) == ["wrong class", "duplicate", "background", "missed"]
    assert set(drawn) <= set(KINDS)
    titles = [axis.get_title() for axis in drawn.values()]
    assert titles[0] == "lymphocyte as epithelial\nscore 0.70, IoU 1.00\nimage 4"
    assert titles[2] == "lymphocyte\nscore 0.60\nimage 4"
    assert titles[3] == "epithelial\n400 px²\nimage 4"
    # Of the duplicate: the cell, the record that found it, and the record, each over an edge.
    lines = [c for c in drawn["duplicate"].collections if isinstance(c, LineCollection)]
    assert len(lines) == 6
    for axis in drawn.values():  # square windows, the image being lower than they are
        assert np.ptp(axis.get_xlim()) == np.ptp(axis.get_ylim()) >= 48


def test_nothing_to_show_still_gives_figures(tmp_path):
    truth = truth_of([])
    figures = {
        "No annotated cells": plot_precision_recall(class_curves(truth, [])),
        "No annotated cells ": plot_errors_mended(explain_errors(truth, [])),
        "No records": plot_calibration(calibrate(truth, [])),
        "No errors to show": plot_gallery({}, worst_cells(truth, []), NAMES),
    }
    for title, figure in figures.items():
        shown = figure.get_suptitle() or figure.axes[0].get_title("left")
        assert shown == title.strip()
        save_figure(figure, tmp_path / "figure.svg")


def test_a_class_without_records_is_an_empty_curve():
    (axis,) = plot_precision_recall(class_curves(truth_of([(3, A)]), [])).axes
    assert axis.get_title("left") == "AP50 is 0.000, the mean over 1 class"

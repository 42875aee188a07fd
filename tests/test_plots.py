"""Figures: what they hold, for the awkward inputs too; how they look is checked by eye."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from cellseg import coco
from cellseg.data.audit import Audit, ImageRow
from cellseg.data.sizes import CellSizes
from cellseg.errors import SettingsError
from cellseg.report import plots
from cellseg.report.outlines import count_cells, outlines_of_records, outlines_of_target
from cellseg.report.style import class_colour, save_figure

CLASS_NAMES = ("epithelial", "lymphocyte", "neutrophil", "macrophage")


@pytest.fixture
def sample():
    """An image of 12 x 20 px: a 4 x 3 cell, a cell of one pixel, one in a second layer."""
    instance_map = np.zeros((2, 12, 20), dtype=np.int32)
    instance_map[0, 2:6, 5:8] = 1
    instance_map[0, 11, 19] = 2
    instance_map[1, 3:7, 6:9] = 3
    target = {
        "labels": torch.tensor([1, 4, 1]),
        "instance_map": torch.from_numpy(instance_map),
        "image_id": 1,
    }
    return torch.full((3, 12, 20), 200, dtype=torch.uint8), target


def make_summary(epoch, **values):
    empty = dict.fromkeys(("val_loss", "ap", "ap50", "ap50_100", "train_ap50"))
    return {"epoch": epoch, "train_loss": 2.0 / epoch} | empty | values


def curve(axis, label):
    return next(line for line in axis.lines if line.get_label() == label)


def test_outlines_follow_the_pixels_of_each_cell(sample):
    outlines = outlines_of_target(sample[1])
    assert {label: len(cells) for label, cells in outlines.items()} == {1: 2, 4: 1}
    (contour,) = outlines[1][0]  # rows 2-5, columns 5-7: edges half a pixel outside the centres
    assert contour[:, 0].min() == 4.5 and contour[:, 0].max() == 7.5
    assert contour[:, 1].min() == 1.5 and contour[:, 1].max() == 5.5
    assert len(outlines[4][0]) == 1  # one pixel in the corner still has a closed outline
    assert count_cells(outlines) == "3 cells"


def test_records_give_the_outlines_of_their_masks(sample):
    mask = sample[1]["instance_map"][0].numpy() == 1
    record = coco.make_record(1, 1, 0.9, coco.mask_to_rle(mask))
    np.testing.assert_array_equal(
        outlines_of_records([record])[1][0][0], outlines_of_target(sample[1])[1][0][0]
    )


def test_cell_in_two_pieces_is_one_cell():
    instance_map = np.zeros((1, 5, 9), dtype=np.int32)
    instance_map[0, 1, 1] = instance_map[0, 3, 7] = 1
    outlines = outlines_of_target({"labels": [2], "instance_map": instance_map})
    assert count_cells(outlines) == "1 cell"
    assert len(outlines[2][0]) == 2


def test_truth_and_prediction_counts_only_scores_at_or_over_the_threshold(sample):
    image, target = sample
    rle = coco.mask_to_rle(target["instance_map"][0].numpy() == 1)
    records = [coco.make_record(1, 2, score, rle) for score in (0.9, 0.5, 0.49)]
    figure = plots.plot_truth_and_prediction(image, target, records, CLASS_NAMES, 0.5)
    left, right = figure.axes
    assert left.get_title() == "Annotated: 3 cells"
    assert right.get_title() == "Predicted: 2 cells of score 0.5 or more"
    texts = [text.get_text() for text in right.get_legend().get_texts()]
    assert texts == ["epithelial  0", "lymphocyte  2", "neutrophil  0", "macrophage  0"]


def test_sample_draws_each_class_in_its_colour(sample):
    figure = plots.plot_sample(*sample, CLASS_NAMES)
    lines = [item for item in figure.axes[1].collections if isinstance(item, LineCollection)]
    colours = {tuple(np.round(line.get_color()[0][:3], 3)) for line in lines}
    for label in (1, 4):
        rgb = tuple(round(int(class_colour(label)[k : k + 2], 16) / 255, 3) for k in (1, 3, 5))
        assert rgb in colours
    assert figure.axes[0].get_title() == "The image, 20 x 12 px"


def test_image_without_cells_is_drawn(sample, tmp_path):
    target = {"labels": np.zeros(0), "instance_map": np.zeros((1, 12, 20), np.int32)}
    figure = plots.plot_truth_and_prediction(sample[0], target, [], CLASS_NAMES)
    assert figure.axes[0].get_title() == "Annotated: 0 cells"
    save_figure(figure, tmp_path / "empty.png", dpi=40)


def test_augmentations_have_a_pane_each(sample):
    figure = plots.plot_augmentations([sample] * 5, CLASS_NAMES)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 5


@pytest.mark.parametrize("count", [0, 1, 200])
def test_learning_curves_of_any_length(count, tmp_path):
    summaries = [make_summary(epoch + 1, ap50=0.1, val_loss=1.0) for epoch in range(count)]
    figure = plots.plot_learning_curves(summaries)
    assert sum(len(line.get_xdata()) for line in figure.axes[0].lines[:2]) == 2 * count
    save_figure(figure, tmp_path / "curves.png", dpi=40)


def test_learning_curves_skip_epochs_without_validation_and_ring_the_best():
    summaries = [
        make_summary(1, ap50=0.1, val_loss=3.0, train_ap50=0.2),
        make_summary(2),
        make_summary(3, ap50=0.5, val_loss=1.0),
        make_summary(4, ap50=0.5, val_loss=1.5),
    ]
    loss_axis, map_axis = plots.plot_learning_curves(summaries).axes
    assert list(curve(loss_axis, "training").get_xdata()) == [1, 2, 3, 4]
    assert list(curve(loss_axis, "validation").get_xdata()) == [1, 3, 4]
    assert list(curve(map_axis, "validation AP50").get_ydata()) == [0.1, 0.5, 0.5]
    assert map_axis.get_title(loc="left") == "Validation AP50 is best in epoch 3: 0.500"
    assert loss_axis.get_title(loc="left") == "Validation loss is lowest in epoch 3: 1.000"


def test_learning_curves_before_any_validation():
    loss_axis, map_axis = plots.plot_learning_curves([make_summary(1)]).axes
    assert map_axis.get_title(loc="left") == "Not validated"
    assert map_axis.get_legend() is None and loss_axis.get_legend() is not None


def test_confusion_matrix_shades_shares_of_the_row():
    matrix = [[6, 1, 1], [0, 0, 0], [2, 2, 0]]  # class 2 is absent: no division by zero
    figure = plots.plot_confusion_matrix(matrix, ["a", "b"])
    (axis,) = figure.axes
    np.testing.assert_allclose(
        axis.images[0].get_array(), [[0.75, 0.125, 0.125], [0, 0, 0], [0.5, 0.5, 0]]
    )
    assert axis.get_title() == "75% of the annotated cells are found with the right class"
    assert "6\n75%" in [text.get_text() for text in axis.texts]


def test_audit_shows_classes_areas_counts_and_sizes():
    rows = [ImageRow("a", 40, 60, (3, 0)), ImageRow("b", 50, 30, (1, 0))]
    areas = np.array([100, 200, 300, 400])
    cells = CellSizes(np.zeros((4, 4)), areas, np.ones(4, int), np.zeros(4, bool))
    figure = plots.plot_audit(Audit(("large", "absent"), rows, cells, "true"))
    totals, boxes, counts, sizes = figure.axes
    assert [bar.get_width() for bar in totals.patches] == [4, 0]
    assert boxes.lines[1].get_xdata()[0] == 250  # the median of the first class
    assert counts.get_title(loc="left") == "Half of the images hold 2 cells or more"
    assert sizes.collections[0].get_offsets().tolist() == [[60, 40], [30, 50]]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_same_figure_gives_the_same_bytes(suffix, tmp_path):
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        save_figure(plots.plot_learning_curves([make_summary(1, ap50=0.2)]), path, dpi=40)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_figures_leave_pyplot_alone(sample):
    plots.plot_sample(*sample, CLASS_NAMES)
    assert plt.get_fignums() == []


def test_unknown_format_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"curve\.gif has no format; let it end in \.png"):
        save_figure(plots.plot_learning_curves([]), tmp_path / "curve.gif")

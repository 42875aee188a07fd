"""Sizes of cells, and the image scale, crop and anchors that follow from them."""

import numpy as np
import pytest
import torch
from data_files import plain_image, write_sample
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from cellseg.data.audit import audit
from cellseg.data.dataset import CellDataset
from cellseg.data.sizes import (
    DEFAULT_RATIOS,
    DEFAULT_SIZES,
    STRIDES,
    CellSizes,
    best_anchor_ious,
    measure_cells,
    propose_anchors,
    suggest_crop_size,
    suggest_image_scale,
)
from cellseg.errors import DataError
from cellseg.models import options


def _sizes(diameters, *, cut=None):
    """Return cells of these diameters, in square boxes at various places."""
    diameters = np.asarray(diameters, dtype=np.float64)
    count = len(diameters)
    corners = np.random.default_rng(0).integers(1, 500, (count, 2))
    boxes = np.concatenate([corners, corners + diameters[:, None]], axis=1).astype(np.float32)
    areas = np.rint(np.pi / 4 * diameters**2).astype(np.int64)
    cut = np.zeros(count, bool) if cut is None else np.asarray(cut)
    return CellSizes(boxes, areas, np.ones(count, np.int64), cut)


@pytest.fixture
def train_dir(tmp_path):
    """Return two samples: a square, a pixel and a cell at the border; a bar of class 3."""
    first, bar = np.zeros((20, 30)), np.zeros((12, 40))
    first[2:10, 4:12], first[15, 20], first[16:20, 3:8] = 3, 5, 9
    bar[5:7, 3:23] = 2
    write_sample(tmp_path / "a", plain_image(20, 30), {1: first})
    write_sample(tmp_path / "b", plain_image(12, 40), {3: bar})
    return tmp_path


def test_cells_are_measured_by_hand(train_dir):
    sizes = measure_cells(CellDataset(train_dir))
    boxes = [[4, 2, 12, 10], [20, 15, 21, 16], [3, 16, 8, 20], [3, 5, 23, 7]]
    assert sizes.boxes.tolist() == boxes
    assert sizes.areas.tolist() == [64, 1, 20, 40]
    assert sizes.labels.tolist() == [1, 1, 1, 3]
    assert sizes.cut.tolist() == [False, False, True, False]
    np.testing.assert_allclose(sizes.diameters**2 * np.pi / 4, sizes.areas)
    assert sizes.whole.areas.tolist() == [64, 1, 40]


@pytest.mark.parametrize("side", range(4))
def test_a_cell_at_any_border_may_be_cut(tmp_path, side):
    ids = np.zeros((9, 12))
    ids[[(0, 4), (4, 0), (8, 4), (4, 11)][side]] = 1
    write_sample(tmp_path / "a", plain_image(9, 12), {1: ids})
    sizes = measure_cells(CellDataset(tmp_path))
    assert sizes.cut.tolist() == [True]
    assert sizes.whole is sizes  # every cell is cut: all count


@pytest.mark.parametrize(
    ("diameter", "scale", "reason"),
    [
        (32, 1, "as it should be"),
        (16, 2, "CoNSeP"),
        (26, 1.41, "MoNuSAC: 1.23, nearer to 1.41 than to 1 in ratio"),
        (27, 1, "1.19 is just below the middle of 1 and 1.41 in ratio, 1.189"),
        (8, 4, "small"),
        (3, 4, "never more than 4"),
        (150, 0.25, "large: 0.21"),
        (1000, 0.25, "never less than a quarter"),
    ],
)
def test_scale_makes_the_median_cell_32_network_pixels(diameter, scale, reason):
    assert suggest_image_scale(_sizes([2, diameter, 2000])) == scale, reason


def test_scale_without_cells_is_1_and_cut_cells_do_not_count():
    assert suggest_image_scale(_sizes([])) == 1
    assert suggest_image_scale(_sizes([4, 4, 16], cut=[True, True, False])) == 2


def test_a_few_cells_more_do_not_change_the_scale():
    rng = np.random.default_rng(1)
    diameters = 16 * np.exp(rng.normal(0, 0.3, 300))
    parts = [rng.permutation(diameters)[:200] for _ in range(20)]
    assert {suggest_image_scale(_sizes(part)) for part in parts} == {2.0}


def test_crop_is_of_one_size_in_the_network():
    assert [suggest_crop_size(scale) for scale in (0.25, 1, 2, 2.83)] == [1280, 320, 160, 113]
    assert suggest_crop_size(4, 2) == 1


def test_ious_by_hand():
    boxes = np.array([[4, 4, 12, 12], [6, 4, 14, 12], [3, 4, 13, 12], [28, 24, 36, 40]])
    ious = best_anchor_ious(boxes, [8] * 5, [1.0])
    # on the centre of stride 4; 2 of 8 px beside it; 10 x 8 around it; 8 x 16 around (32, 32)
    np.testing.assert_allclose(ious, [1, 6 / 10, 64 / 80, 64 / 128])
    tall = best_anchor_ious(boxes[3:], [11] * 5, [2.0])  # 8 x 16: 11 / sqrt(2) and 11 * sqrt(2)
    np.testing.assert_allclose(tall, [1])


def test_ious_equal_a_comparison_with_every_anchor_of_torchvision():
    rng = np.random.default_rng(4)
    corners, sides = rng.uniform(0, 200, (300, 2)), np.exp(rng.uniform(1, 4.5, (300, 2)))
    boxes = np.concatenate([corners, corners + sides], axis=1)
    levels = [torch.zeros(1, 1, 320 // stride, 320 // stride) for stride in STRIDES]
    generator = AnchorGenerator(tuple((s,) for s in DEFAULT_SIZES), (DEFAULT_RATIOS,) * 5)
    anchors = generator(ImageList(torch.zeros(1, 3, 320, 320), [(320, 320)]), levels)[0]
    expected = box_iou(torch.from_numpy(boxes), anchors.double()).amax(1)
    ours = best_anchor_ious(boxes, DEFAULT_SIZES, DEFAULT_RATIOS)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_the_default_is_that_of_the_models():
    assert tuple(options.ANCHOR_SIZES) == DEFAULT_SIZES
    assert tuple(options.ASPECT_RATIOS) == DEFAULT_RATIOS


def test_proposal_fits_the_cells_and_beats_the_default():
    proposal = propose_anchors(_sizes(np.linspace(14, 18, 400)), 2.0)
    assert proposal.coverage_50 >= proposal.default_coverage_50
    assert proposal.coverage_70 > proposal.default_coverage_70 + 0.1
    assert proposal.coverage_50 > 0.99
    assert min(proposal.sizes) >= 8
    assert len(proposal.sizes) == 5
    assert list(proposal.sizes) == sorted(proposal.sizes)
    with pytest.raises(DataError, match="no cells to propose anchors for"):
        propose_anchors(_sizes([]), 1.0)


def test_audit_shows_scale_and_anchors(train_dir):
    table = audit(CellDataset(train_dir)).table()
    line = next(line for line in table.splitlines() if line.startswith("| image_scale"))
    # whole cells of 64, 1 and 40 px: the median is a disc of 7.1 px
    assert line == (
        "| image_scale | 4: the median cell is 7.1 px across, 29 in the network (32 are aimed at) |"
    )
    assert "| anchors | " in table
    assert "the default 8 to 128 px" in table


def test_audit_without_cells_shows_neither(tmp_path):
    write_sample(tmp_path / "a", plain_image(9, 12))
    table = audit(CellDataset(tmp_path)).table()
    assert "image_scale" not in table
    assert "anchors" not in table

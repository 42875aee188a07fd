"""Anchor matching against torchvision's matcher on a dense IoU matrix, and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_target, tiny_model
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from cellseg.models.matching import BACKGROUND, AnchorGrid, match_anchors

SIZES = ((8,), (16,), (32,), (64,), (128,))
STRIDES = (4, 8, 16, 32, 64)
HEIGHT, WIDTH = 128, 192


def anchors_and_grids(height=HEIGHT, width=WIDTH):
    """Return the anchors of all five levels as torchvision lays them, and their grids."""
    generator = AnchorGenerator(SIZES, ((0.5, 1.0, 2.0),) * 5)
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    levels = [torch.zeros(1, 1, *shape) for shape in shapes]
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    anchors = generator(images, levels)[0]
    grids = [
        AnchorGrid(cells, rows, columns, height // rows, width // columns)
        for cells, (rows, columns) in zip(generator.cell_anchors, shapes, strict=True)
    ]
    return anchors, grids


ANCHORS, GRIDS = anchors_and_grids()


def dense_matches(boxes, anchors):
    return Matcher(0.7, 0.3, allow_low_quality_matches=True)(box_iou(boxes, anchors))


def test_one_entry_per_anchor():
    assert len(ANCHORS) == sum(map(len, GRIDS)) == 3 * (32 * 48 + 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3)


# A 2 x 3 grid of stride 4 with one anchor of 8 x 8 around each point: the anchor of row i and
# column j spans x from 4j - 4 to 4j + 4 and y from 4i - 4 to 4i + 4.
HAND_GRID = AnchorGrid(torch.tensor([[-4.0, -4.0, 4.0, 4.0]]), 2, 3, 4, 4)
HAND_ANCHORS = torch.tensor(
    [[4.0 * j - 4, 4.0 * i - 4, 4.0 * j + 4, 4.0 * i + 4] for i in range(2) for j in range(3)]
)
BY_HAND = [
    ("no cell: all background", [], [-1] * 6),
    ("the anchor of row 1, column 2 itself; its neighbours' IoU is 1/3", [[4, 0, 12, 8]],
     [-1, -1, -2, -1, -2, 0]),
    ("16 of 64 pixels in four anchors alike: all four, though below 0.3", [[0, 0, 4, 4]],
     [0, 0, -1, 0, 0, -1]),
    ("twice the same box: the lowest index", [[0, 0, 4, 4], [0, 0, 4, 4]], [0, 0, -1, 0, 0, -1]),
    ("one pixel in a single anchor: the best there is, at 1/64", [[-4, -4, -3, -3]],
     [0, -1, -1, -1, -1, -1]),
    ("a box that touches no anchor has IoU 0 with each, so each is its best", [[90, 90, 99, 99]],
     [0, 0, 0, 0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "boxes", "expected"), BY_HAND, ids=[c[0] for c in BY_HAND])
def test_matches_worked_out_by_hand(reason, boxes, expected):
    boxes = torch.tensor(boxes).reshape(-1, 4).float()
    assert match_anchors(boxes, HAND_ANCHORS, [HAND_GRID]).tolist() == expected


CASES = [
    ("one pixel", [[70, 30, 71, 31]]),
    ("one pixel in each corner", [[0, 0, 1, 1], [191, 0, 192, 1], [0, 127, 1, 128],
                                  [191, 127, 192, 128]]),
    ("larger than the image", [[-300, -200, 600, 500]]),
    ("partly outside", [[-10, 50, 6, 70], [180, 120, 220, 150]]),
    ("outside of every anchor, beside a cell", [[20, 20, 36, 36], [900, 900, 910, 910]]),
    ("the same cell three times", [[40, 40, 56, 60]] * 3),
    ("an anchor itself, at IoU 1", [[92, 60, 100, 68]]),
    ("half-way between four anchors", [[2, 2, 10, 10]]),
    ("as wide as the image, a pixel high", [[0, 64, 192, 65]]),
    ("a cell within a cell", [[32, 32, 96, 96], [60, 60, 68, 68]]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "boxes"), CASES, ids=[case[0] for case in CASES])
def test_matches_are_those_of_torchvision(reason, boxes):
    boxes = torch.tensor(boxes).float()
    assert torch.equal(match_anchors(boxes, ANCHORS, GRIDS), dense_matches(boxes, ANCHORS))


def test_levels_that_do_not_divide_the_image():
    anchors, grids = anchors_and_grids(100, 150)
    boxes = torch.tensor([[3.0, 4, 20, 25], [140, 90, 150, 100], [60, 2, 62, 90]])
    assert torch.equal(match_anchors(boxes, anchors, grids), dense_matches(boxes, anchors))


def test_thresholds_are_arguments():
    boxes = torch.tensor([[41.0, 42, 57, 55], [100, 20, 131, 60]])
    expected = Matcher(0.5, 0.2, allow_low_quality_matches=True)(box_iou(boxes, ANCHORS))
    found = match_anchors(boxes, ANCHORS, GRIDS, foreground_iou=0.5, background_iou=0.2)
    assert torch.equal(found, expected)


@st.composite
def box_lists(draw):
    """Draw boxes of all sizes, on whole pixels (ties) or not, some of them twice."""
    whole = draw(st.booleans())
    step = 1.0 if whole else 1 / 7
    place = st.integers(-40, 260) if whole else st.integers(-280, 1820)
    side = st.one_of(st.integers(1, 40), st.sampled_from([1, 8, 16, 64, 128, 400]))
    box = st.tuples(place, place, side, side)
    drawn = draw(st.lists(box, min_size=1, max_size=25))
    drawn += draw(st.lists(st.sampled_from(drawn), max_size=5))
    x, y, width, height = torch.tensor(drawn).float().unbind(1)
    return torch.stack([x * step, y * step, x * step + width, y * step + height], dim=1)


@settings(max_examples=50, deadline=None)
@given(boxes=box_lists())
def test_any_boxes_match_as_in_torchvision(boxes):
    before = boxes.clone()
    assert torch.equal(match_anchors(boxes, ANCHORS, GRIDS), dense_matches(boxes, ANCHORS))
    assert torch.equal(boxes, before)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_hundreds_of_cells_match_as_in_torchvision(seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(300, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    sides = 4 + 30 * torch.rand(300, 2, generator=generator)
    boxes = torch.cat([corner, corner + sides], dim=1)
    assert torch.equal(match_anchors(boxes, ANCHORS, GRIDS), dense_matches(boxes, ANCHORS))


def test_rpn_gives_losses_and_proposals_of_torchvision():
    """The network's own grids: the same anchors learn the same cells within the model."""
    model = tiny_model(train_proposals=50, proposals=10_000).train()
    rpn = model.rpn
    most = {"training": 50, "testing": 91}  # of the first image, a hundredth of its pixels
    plain = RegionProposalNetwork(
        AnchorGenerator(SIZES, ((0.5, 1.0, 2.0),) * 5), rpn.head, 0.7, 0.3, 256, 0.5, most, most,
        0.7,
    ).train()  # fmt: skip
    targets = [
        make_target(70, 130, [(1, 5, 6, 20, 30), (2, 90, 40, 91, 41), (1, 20, 6, 40, 26)]),
        make_target(100, 60, [(1, 0, 0, 50, 90)]),
    ]
    images, targets = model.transform([torch.rand(3, 70, 130), torch.rand(3, 100, 60)], targets)
    with torch.no_grad():
        features = model.backbone(images.tensors)
        losses, proposals = [], []
        for network in (rpn, plain):
            torch.manual_seed(1)
            boxes, loss = network(images, features, targets)
            losses.append(loss)
            proposals.append([*boxes, network.eval()(images, features)[0][0]])
    assert [len(boxes) for boxes in proposals[0]] == [50, 50, 91]
    assert all(torch.equal(own, its) for own, its in zip(*proposals, strict=True))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        assert value.item() == losses[1][name].item() > 0


def test_rpn_takes_an_image_without_cells_as_background():
    rpn = tiny_model().rpn
    target = {"boxes": torch.zeros(0, 4), "anchor_grids": GRIDS}
    labels, boxes = rpn.assign_targets_to_anchors([ANCHORS], [target])
    assert labels[0].tolist() == [0.0] * len(ANCHORS)
    assert not boxes[0].any() and boxes[0].shape == ANCHORS.shape
    assert BACKGROUND == -1

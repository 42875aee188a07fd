"""Half pixels end to end: a small cell's perfect mask survives target and paste.

A cell is 10 pixels across in much tissue: half a pixel on each side is a fifth of its IoU.
"""

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from cellseg.coco import rle_to_mask
from cellseg.inference.pasting import masks_to_rles
from cellseg.models.mask_targets import sample_mask_targets

SIZE = (40, 44)
MASK_SIDE = 28


def draw_discs(count, diameter):
    """Return discs [K, H, W], drawn at sub-pixel centres, and tight boxes with moved sides."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    centres = np.array([17.0, 23.0]) + rng.uniform(-0.5, 0.5, size=(count, 2))
    discs = np.stack([(y - cy) ** 2 + (x - cx) ** 2 <= diameter**2 / 4 for cy, cx in centres])
    rows, columns = discs.any(axis=2), discs.any(axis=1)
    low = [columns.argmax(axis=1), rows.argmax(axis=1)]
    high = [low[0] + columns.sum(axis=1), low[1] + rows.sum(axis=1)]
    boxes = np.stack([*low, *high], axis=1) + rng.uniform(-0.5, 0.5, size=(count, 4))
    return discs, torch.from_numpy(boxes).float()


def ious(found, discs):
    """Return the IoU of each pair of masks [K, H, W]."""
    return (found & discs).sum(axis=(1, 2)) / (found | discs).sum(axis=(1, 2))


def through_ours(discs, boxes):
    """Return each disc after mask target and paste: a mask head without any error."""
    pasted = []
    for disc, box in zip(discs, boxes, strict=True):
        instance_map = torch.from_numpy(disc[None].astype(np.int32))
        target = sample_mask_targets(instance_map, torch.tensor([0]), box[None], MASK_SIDE)
        pasted.append(rle_to_mask(masks_to_rles(target[:, None], box[None], SIZE)[0]))
    return np.stack(pasted).astype(bool)


def through_torchvision(discs, boxes):
    """Return the same by torchvision's targets and paste."""
    masks, each = torch.from_numpy(discs.astype(np.uint8)), torch.arange(len(discs))
    targets = project_masks_on_boxes(masks, boxes, each, MASK_SIDE)
    return (paste_masks_in_image(targets[:, None], boxes, SIZE)[:, 0] > 0.5).numpy()


def test_a_disc_of_ten_pixels_keeps_its_shape():
    discs, boxes = draw_discs(100, diameter=10)
    found = ious(through_ours(discs, boxes), discs)
    assert found.mean() >= 0.97
    assert found.min() >= 0.95
    assert ious(through_torchvision(discs, boxes), discs).mean() < 0.9


@pytest.mark.parametrize(("diameter", "worst"), [(6, 0.92), (16, 0.975), (30, 0.985)])
def test_discs_of_other_sizes(diameter, worst):
    discs, boxes = draw_discs(100, diameter)
    found = ious(through_ours(discs, boxes), discs)
    assert found.mean() >= 0.995
    assert found.min() >= worst


@pytest.mark.parametrize("diameter", [10, 16])
def test_nothing_is_moved_on_average(diameter):
    """What is lost at a side that cuts the cell lies on no side more than on another."""
    discs, boxes = draw_discs(100, diameter)
    found = through_ours(discs, boxes)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    for places in (x, y):
        shift = [places[a].mean() - places[b].mean() for a, b in zip(found, discs, strict=True)]
        assert abs(np.mean(shift)) < 0.01

"""Masks into RLE: against torchvision's paste, against full-frame sampling, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

from cellseg.coco import rle_to_mask
from cellseg.inference import masks_to_rles, pasting

SIZE = (30, 50)  # height, width


def smooth_masks(count, side=28, seed=0):
    """Return probabilities [N, 1, M, M] as a network gives them: blobs of any form."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)


def torchvision_rles(masks, boxes, size):
    """Encode as torchvision's tutorials do: full frames, then pycocotools."""
    frames = (paste_masks_in_image(masks, boxes, size)[:, 0] > 0.5).numpy()
    rles = [mask_utils.encode(np.asfortranarray(frame, dtype=np.uint8)) for frame in frames]
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles]


def full_frame(masks, boxes, size):
    """Return probabilities [N, H, W] sampled at every pixel centre of the image."""
    y, x = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    x1, y1, x2, y2 = boxes.double().unbind(1)
    across = (x[None] - x1[:, None]) / (x2 - x1)[:, None] * 2 - 1
    down = (y[None] - y1[:, None]) / (y2 - y1)[:, None] * 2 - 1
    shape = (len(boxes), *size)
    grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(masks.double(), grid, align_corners=False, padding_mode="zeros")[:, 0]


def assert_aligned(masks, boxes, size, threshold=0.5):
    rles = masks_to_rles(masks, boxes, size, mask_threshold=threshold)
    expected = full_frame(masks, boxes, size)
    found = torch.from_numpy(np.stack([rle_to_mask(rle) for rle in rles]))
    differs = found != (expected > threshold)
    assert not (differs & ((expected - threshold).abs() > 1e-4)).any()


CASES = [
    ("inside", [[10.3, 5.2, 30.7, 20.9]]),
    ("on whole pixels", [[10, 5, 30, 20]]),
    ("smaller than a pixel, four of them", [[10.1, 5.1, 10.4, 5.3], [10.6, 5.6, 10.9, 5.9],
                                            [0.1, 0.1, 0.2, 0.2], [49.6, 29.4, 49.9, 29.7]]),
    ("one pixel", [[10, 5, 11, 6], [49, 29, 50, 30]]),
    ("partly outside, on each side", [[-7.5, 4, 12, 15], [40.2, 3, 66.6, 14], [5, -9.1, 16, 9],
                                      [5, 20.5, 16, 41.9]]),
    ("outside on all sides at once", [[-20.2, -10.4, 80.3, 55.5]]),
    ("full height, so that runs go on from column to column", [[12, 0, 20, 30], [0, -8, 50, 38]]),
    ("long and thin", [[0, 14.2, 50, 15.9], [24.1, 0, 25.3, 30]]),
    ("a thousand times the pixels of the smallest", [[1, 1, 49, 29], [3.2, 3.3, 4.1, 4.2]]),
]  # fmt: skip
MANY = torch.tensor([box for _, boxes in CASES for box in boxes]).float()


@pytest.mark.parametrize(("reason", "boxes"), CASES, ids=[case[0] for case in CASES])
def test_torchvision_paste_is_torchvisions_byte_for_byte(reason, boxes):
    boxes = torch.tensor(boxes).float()
    masks = smooth_masks(len(boxes))
    found = masks_to_rles(masks, boxes, SIZE, paste="torchvision")
    assert found == torchvision_rles(masks, boxes, SIZE)


@pytest.mark.parametrize(("reason", "boxes"), CASES, ids=[case[0] for case in CASES])
def test_aligned_paste_samples_pixel_centres(reason, boxes):
    boxes = torch.tensor(boxes).float()
    assert_aligned(smooth_masks(len(boxes)), boxes, SIZE)


def test_a_full_mask_covers_its_box_and_nothing_else():
    boxes = torch.tensor([[12.0, 6, 19, 11], [0, 0, 50, 30], [12, 0, 20, 30]])
    rles = masks_to_rles(torch.ones(3, 1, 28, 28), boxes, SIZE)
    for rle, (x1, y1, x2, y2) in zip(rles, boxes.int().tolist(), strict=True):
        expected = np.zeros(SIZE, dtype=bool)
        expected[y1:y2, x1:x2] = True
        assert np.array_equal(rle_to_mask(rle), expected)
    # Columns 12 to 19 of 30 rows are one run: 360 before it, 240 of it, 900 after it.
    whole = mask_utils.frPyObjects({"size": SIZE, "counts": [360, 240, 900]}, *SIZE)
    assert rles[2]["counts"] == whole["counts"].decode()


def test_half_a_mask_covers_half_its_box():
    masks = torch.zeros(1, 1, 28, 28)
    masks[..., :14] = 1  # the left half
    found = rle_to_mask(masks_to_rles(masks, torch.tensor([[10.0, 4, 24, 12]]), SIZE)[0])
    expected = np.zeros(SIZE, dtype=bool)
    expected[4:12, 10:17] = True
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("probability", "threshold", "pixels"),
    [(0.5, 0.5, 0), (0.51, 0.5, 24), (0.25, 0.2, 24), (0.9, 0.95, 0)],
)
def test_a_pixel_needs_more_than_the_threshold(probability, threshold, pixels):
    masks, boxes = torch.full((1, 1, 28, 28), probability), torch.tensor([[10.0, 4, 14, 10]])
    rle = masks_to_rles(masks, boxes, SIZE, mask_threshold=threshold)[0]
    assert rle_to_mask(rle).sum() == pixels


@pytest.mark.parametrize("paste", pasting.PASTES)
def test_an_empty_mask_comes_out_empty(paste):
    masks = torch.cat([torch.zeros(1, 1, 28, 28), torch.ones(1, 1, 28, 28)])
    boxes = torch.tensor([[3.0, 4, 20, 21], [5, 5, 9, 9]])
    empty, full = masks_to_rles(masks, boxes, SIZE, paste=paste)
    nothing = mask_utils.encode(np.zeros(SIZE, dtype=np.uint8, order="F"))
    assert empty == {"size": [30, 50], "counts": nothing["counts"].decode()}
    assert rle_to_mask(full).any()


def test_a_box_outside_of_the_image_comes_out_empty():
    boxes = torch.tensor([[60.0, 4, 70, 12], [-30, -30, -20, -20]])
    rles = masks_to_rles(torch.ones(2, 1, 28, 28), boxes, SIZE)
    assert not any(rle_to_mask(rle).any() for rle in rles)


def test_no_masks():
    assert masks_to_rles(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), SIZE) == []


def test_an_unknown_paste_is_refused():
    with pytest.raises(ValueError, match="'bilinear'; use one of aligned, torchvision"):
        masks_to_rles(torch.ones(1, 1, 28, 28), torch.ones(1, 4), SIZE, paste="bilinear")


@pytest.mark.parametrize("paste", pasting.PASTES)
def test_memory_limit_changes_no_byte(monkeypatch, paste):
    masks = smooth_masks(len(MANY))
    before = masks.clone(), MANY.clone()
    expected = masks_to_rles(masks, MANY, SIZE, paste=paste)
    monkeypatch.setattr(pasting, "PIECE_VALUES", 1)
    assert masks_to_rles(masks, MANY, SIZE, paste=paste) == expected
    assert torch.equal(masks, before[0]) and torch.equal(MANY, before[1])


@pytest.mark.parametrize("paste", pasting.PASTES)
def test_a_mask_does_not_depend_on_the_others(paste):
    masks = smooth_masks(len(MANY))
    together = masks_to_rles(masks, MANY, SIZE, paste=paste)
    alone = [
        masks_to_rles(masks[k : k + 1], MANY[k : k + 1], SIZE, paste=paste)[0]
        for k in range(len(MANY))
    ]
    assert together == alone


@st.composite
def placed_masks(draw):
    """Draw an image size, boxes that touch the image, and masks for them."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 8))
    first = rng.uniform(-12, [width - 0.01, height - 0.01], size=(count, 2))
    reach = rng.choice([0.3, 4, 30, 90], size=(count, 2)) * rng.uniform(0.5, 1, size=(count, 2))
    last = np.maximum(first, 0) + reach
    boxes = torch.from_numpy(np.concatenate([first, last], axis=1)).float()
    side = draw(st.sampled_from([1, 7, 28]))
    return smooth_masks(count, side, int(rng.integers(2**31))), boxes, (height, width)


@settings(max_examples=60, deadline=None)
@given(placed=placed_masks())
def test_any_masks_paste_as_the_references_do(placed):
    masks, boxes, size = placed
    expected = torchvision_rles(masks, boxes, size)
    assert masks_to_rles(masks, boxes, size, paste="torchvision") == expected
    assert_aligned(masks, boxes, size)

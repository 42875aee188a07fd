"""Mask targets against `roi_align` on binary masks, and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from cellseg.models.mask_targets import sample_mask_targets

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


def reference(instance_map, instances, rois, size, *, aligned):
    """Pool the binary mask of each RoI's instance."""
    parts = [
        roi_align(
            (instance_map == instance + 1).any(dim=0)[None, None].to(rois.dtype),
            [roi[None]],
            size,
            sampling_ratio=-1,
            aligned=aligned,
        )[:, 0]
        for instance, roi in zip(instances.tolist(), rois, strict=True)
    ]
    return torch.cat(parts) if parts else rois.new_zeros((0, size, size))


def touching():
    layer = torch.zeros(30, 44, dtype=torch.int32)
    layer[5:15, 5:15], layer[5:15, 15:27], layer[15:22, 8:20] = 1, 2, 3
    return layer[None]


def with_hole():
    layer = torch.zeros(24, 40, dtype=torch.int32)
    layer[4:20, 6:30] = 1
    layer[8:12, 12:20] = 0
    layer[9:11, 14:17] = 2
    return layer[None]


def layered():
    layers = torch.zeros(2, 26, 38, dtype=torch.int32)
    layers[0, 3:15, 4:20], layers[0, 18:25, 2:30] = 1, 2
    layers[1, 10:22, 12:28] = 3
    layers[1, 3:5, 30:36] = 1  # a second piece of cell 0, in the other layer
    return layers


def one_pixel():
    layer = torch.zeros(20, 33, dtype=torch.int32)
    layer[7, 12] = 1
    layer[0, 0], layer[19, 32] = 2, 3
    return layer[None]


CASES = [
    ("touching cells: none shows in the other's target", touching(), [0, 1, 2],
     [[5, 5, 15, 15], [14.5, 4.7, 27.3, 15.2], [8, 15, 20, 22]]),
    ("an RoI of one cell that lies on another: nothing to see", touching(), [0], [[17, 6, 25, 14]]),
    ("one pixel, also in the corners", one_pixel(), [0, 1, 2],
     [[12, 7, 13, 8], [0, 0, 1, 1], [32, 19, 33, 20]]),
    ("an RoI far larger than its one pixel", one_pixel(), [0, 0], [[2, 1, 30, 19], [0, 0, 33, 20]]),
    ("a hole, and a cell in the hole", with_hole(), [0, 1],
     [[6, 4, 30, 20], [13.9, 8.8, 17.1, 11]]),
    ("cells over one another in several layers", layered(), [0, 1, 2],
     [[4, 3, 36, 15], [2, 18, 30, 25], [12, 10, 28, 22]]),
    ("partly outside, on all four sides", touching(), [0, 0, 1, 2],
     [[-8.3, -4.2, 12, 12], [3, -20, 16, 40.4], [11, 3, 60.1, 33.3], [-5.2, 9, 51, 24]]),
    ("wholly outside", touching(), [0, 1], [[-40, -30, -20, -10], [60, 40, 90, 77]]),
    ("larger than the map", with_hole(), [0], [[-30.3, -20.6, 90.1, 66.2]]),
    ("narrower than a pixel", touching(), [0, 1], [[6.2, 6.1, 6.6, 14], [15.1, 5, 26, 5.2]]),
]  # fmt: skip


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("reason", "instance_map", "instances", "rois"), CASES, ids=[case[0] for case in CASES]
)
def test_targets_are_roi_align_of_the_mask(reason, instance_map, instances, rois, dtype, aligned):
    before, instances = instance_map.clone(), torch.tensor(instances)
    rois = torch.tensor(rois, dtype=dtype)
    for size in (28, 7):
        found = sample_mask_targets(instance_map, instances, rois, size, aligned=aligned)
        expected = reference(instance_map, instances, rois, size, aligned=aligned)
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= TOLERANCE[dtype]
    assert torch.equal(instance_map, before)


def test_an_roi_of_m_pixels_gives_the_map_as_it_is():
    found = sample_mask_targets(layered(), torch.tensor([2]), torch.tensor([[10.0, 8, 24, 22]]), 14)
    assert torch.equal(found[0], (layered()[1, 8:22, 10:24] == 3).float())


def test_a_bin_that_is_half_cell_is_one_half():
    layer = torch.zeros(1, 8, 12, dtype=torch.int32)
    layer[0, :, 3:] = 1
    # Two bins of 2 x 2 pixels: columns 2-3 are half background, 4-5 all cell; rows are uniform.
    found = sample_mask_targets(layer, torch.tensor([0]), torch.tensor([[2.0, 2, 6, 6]]), 2)
    assert found[0].tolist() == [[0.5, 1.0], [0.5, 1.0]]


def test_no_rois():
    found = sample_mask_targets(touching(), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 9)
    assert found.shape == (0, 9, 9)


def test_result_does_not_depend_on_the_other_rois():
    rois = torch.tensor([[5, 5, 15, 15], [-8.3, -4.2, 12, 12], [3, 3, 43, 29], [14, 6, 16, 9.0]])
    instances = torch.tensor([0, 0, 1, 1])
    together = sample_mask_targets(touching(), instances, rois, 28)
    for k in range(4):
        alone = sample_mask_targets(touching(), instances[k : k + 1], rois[k : k + 1], 28)
        assert torch.allclose(together[k], alone[0], atol=1e-6)


def draw_map(rng, layers, height, width, count):
    """Return a map of rectangles and single pixels, with holes; later cells cover earlier ones."""
    instance_map = np.zeros((layers, height, width), dtype=np.int32)
    for number in range(1, count + 1):
        layer = instance_map[rng.integers(layers)]
        y, x = rng.integers(height), rng.integers(width)
        layer[y : y + rng.integers(1, 12), x : x + rng.integers(1, 12)] = number
    instance_map[:, rng.random((height, width)) < 0.05] = 0
    return torch.from_numpy(instance_map)


def draw_rois(rng, height, width, count, *, whole):
    """Return RoIs of any size, some partly or wholly outside of the image."""
    corner = rng.uniform(-10, [width + 5, height + 5], size=(count, 2))
    sides = rng.choice([0.3, 3, 14, 28, 56, 70], size=(count, 2)) * rng.uniform(0.5, 1.5)
    if whole:
        corner, sides = np.round(corner), np.ceil(sides)
    return np.concatenate([corner, corner + sides], axis=1)


def near_the_limit(rois, size, height, width, *, aligned):
    """Tell whether a sample lies just a pixel outside, where roi_align jumps to 0."""
    for axis, length in ((0, width), (1, height)):
        for start, end in rois[:, [axis, axis + 2]]:
            side = end - start if aligned else max(end - start, 1)
            samples = size * max(1, math.ceil(side / size))
            position = start - 0.5 * aligned + (np.arange(samples) + 0.5) * side / samples
            if np.abs(position[:, None] - [-1, length]).min() < 1e-4:
                return True
    return False


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 60)),
    cells=st.integers(1, 12),
    count=st.integers(0, 6),
    size=st.sampled_from([1, 7, 14, 28]),
    whole=st.booleans(),
)
def test_any_map_and_rois(seed, shape, cells, count, size, whole):
    rng = np.random.default_rng(seed)
    instance_map = draw_map(rng, *shape, cells)
    rois = draw_rois(rng, *shape[1:], count, whole=whole)
    instances = torch.from_numpy(rng.integers(cells, size=count))
    for aligned in (True, False):
        assume(not near_the_limit(rois, size, *shape[1:], aligned=aligned))
        for dtype, tolerance in TOLERANCE.items():
            boxes = torch.from_numpy(rois).to(dtype)
            found = sample_mask_targets(instance_map, instances, boxes, size, aligned=aligned)
            expected = reference(instance_map, instances, boxes, size, aligned=aligned)
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=0, atol=tolerance)

"""Stains are changed in optical density, and only where there are stains."""

import numpy as np
import pytest
import torch

from cellseg.data import stain as module
from cellseg.data.stain import (
    STAINS,
    change_stains,
    is_light_background,
    jitter_stain,
    weigh_channels,
)
from cellseg.data.tissue import make_tissue
from cellseg.data.transforms import TrainTransform

EVERY_LEVEL = torch.arange(256, dtype=torch.uint8).reshape(1, 8, 32).repeat(3, 1, 1)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _colors(amounts):
    """Return the image [3, 1, N] of amounts [N, 3] of the three stains."""
    levels = 256 * np.exp(-np.asarray(amounts) @ STAINS) - 1
    return torch.from_numpy(levels.round().clip(0).astype(np.uint8).T[:, None])


def _scene(outside, inside, *, size=8):
    """Return an image of two colours and its map: one cell in the middle."""
    instance_map = torch.zeros(1, size, size + 2, dtype=torch.int32)
    instance_map[0, 2:6, 2:6] = 1
    image = torch.tensor(outside, dtype=torch.uint8)[:, None, None].repeat(1, size, size + 2)
    image[:, instance_map[0] == 1] = torch.tensor(inside, dtype=torch.uint8)[:, None]
    return image, instance_map


def test_gains_of_1_change_no_grey_level():
    image = torch.stack([EVERY_LEVEL[0], EVERY_LEVEL[1].flip(0), EVERY_LEVEL[2].flip(1)])
    before = image.clone()
    assert torch.equal(change_stains(image, [1, 1, 1], [0, 0, 0]), image)
    assert torch.equal(image, before)


def test_a_gain_multiplies_the_amount_of_its_stain_alone():
    before = _colors([[0, 0, 0], [0.8, 0, 0], [0.8, 0.4, 0], [0, 0.4, 0.1]])
    after = _colors([[0, 0, 0], [1.2, 0, 0], [1.2, 0.4, 0], [0, 0.4, 0.1]])
    changed = change_stains(before, [1.5, 1, 1], [0, 0, 0])
    assert (changed.int() - after.int()).abs().max() <= 2  # of rounding both to grey levels


def test_white_stays_white_under_gains_and_takes_the_color_of_a_shift():
    white = torch.full((3, 2, 3), 255, dtype=torch.uint8)
    assert torch.equal(change_stains(white, [1.9, 0.2, 1.4], [0, 0, 0]), white)
    # 256 * exp(-0.1 * (0.65, 0.70, 0.29)) - 1
    pink = change_stains(white, [1, 1, 1], [0.1, 0, 0])
    assert pink[:, 0, 0].tolist() == [239, 238, 248]
    assert torch.equal(change_stains(white, [1, 1, 1], [-0.1, 0, 0]), white)  # clipped


def test_no_level_leaves_its_range():
    for gains, shifts in (([9, 0, 5], [3, 3, 3]), ([0, 8, 0], [-3, 3, -3])):
        changed = change_stains(EVERY_LEVEL, gains, shifts)
        assert changed.dtype == torch.uint8
        assert changed.shape == EVERY_LEVEL.shape
    assert change_stains(EVERY_LEVEL, [1, 1, 1], [9, 9, 9]).max() == 0


def test_channels_are_weighed_in_float32():
    channels = [np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)]
    total = weigh_channels(channels, np.array([0.5, -1.0]), 3)
    assert total.dtype == np.float32
    assert total.tolist() == [[-6.5, -16.0]]


def test_draws_come_from_the_generator_and_keep_their_bounds(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "change_stains", lambda image, *changes: seen.append(changes))
    for seed in (0, 0, *range(40)):
        jitter_stain(EVERY_LEVEL, 0.1, _generator(seed))
    np.testing.assert_array_equal(seen[0], seen[1])
    gains, shifts = np.array(seen).transpose(1, 0, 2)
    assert 0.9 <= gains.min() < 0.92 < 1.08 < gains.max() <= 1.1
    assert -0.1 <= shifts.min() < -0.08 < 0.08 < shifts.max() <= 0.1


@pytest.mark.parametrize(
    ("outside", "inside", "light", "reason"),
    [
        ((235, 200, 220), (120, 80, 150), True, "stained nuclei on pale tissue"),
        ((105, 70, 110), (70, 40, 90), True, "deeply stained tissue, mean 95"),
        ((10, 8, 30), (20, 40, 220), False, "fluorescence: dark background"),
        ((85, 65, 87), (60, 50, 80), False, "mean 79: too dark"),
        ((180, 170, 190), (230, 220, 240), False, "cells brighter than a light background"),
        ((200, 200, 200), (90, 90, 90), False, "grey: no stain can be told from another"),
    ],
)
def test_background_decides(outside, inside, light, reason):
    assert is_light_background(*_scene(outside, inside)) is light, reason


def test_without_cells_the_background_alone_decides_and_without_background_nothing():
    image, instance_map = _scene((235, 200, 220), (235, 200, 221))
    assert is_light_background(image, torch.zeros_like(instance_map))
    assert not is_light_background(image, torch.ones_like(instance_map))


def test_a_cell_of_the_second_layer_is_no_background():
    image, instance_map = _scene((85, 80, 90), (10, 10, 20))
    layers = torch.cat([torch.zeros_like(instance_map), instance_map])
    assert is_light_background(image, layers)  # with the cell in it the mean is 71


def test_made_tissue_is_light_and_its_negative_is_not():
    pixels, maps = make_tissue(150, 130, seed=3)
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    instance_map = torch.from_numpy(sum(maps.values()).astype(np.int32))[None]
    assert is_light_background(image, instance_map)
    assert not is_light_background(255 - image, instance_map)


@pytest.mark.parametrize(
    ("outside", "inside", "changes"),
    [((235, 200, 220), (120, 80, 150), True), ((9, 9, 9), (90, 9, 9), False)],
)
def test_the_transform_leaves_dark_images_alone(outside, inside, changes):
    image, instance_map = _scene(outside, inside)
    target = {"labels": torch.tensor([1]), "instance_map": instance_map}
    transform = TrainTransform(scale_range=(1, 1), flip=False, stain=0.3, color=0)
    new_image, new_target = transform(image, target, _generator(1))
    assert torch.equal(new_image, image) != changes
    assert torch.equal(new_target["instance_map"], instance_map)
    assert torch.equal(image, _scene(outside, inside)[0])

"""Augmentation keeps image, map, boxes and labels together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cellseg.data import transforms
from cellseg.data.transforms import (
    TrainTransform,
    color_matrix,
    cut_sample,
    flip_and_turn,
    jitter_color,
    mix_channels,
    update_target,
)
from cellseg.errors import SettingsError

NO_CHANGE = {"scale_range": (1, 1), "flip": False, "color": 0}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _sample(height=30, width=40):
    """Return an image whose red channel is the map, and 3 cells: a square, one pixel, a bar."""
    instance_map = torch.zeros(1, height, width, dtype=torch.int32)
    instance_map[0, 4:12, 6:14] = 1
    instance_map[0, 20, 33] = 2
    instance_map[0, 24:26, 2:38] = 3
    image = torch.full((3, height, width), 7, dtype=torch.uint8)
    image[0] = instance_map[0].to(torch.uint8) * 40
    target = {
        "boxes": torch.tensor([[6.0, 4, 14, 12], [33, 20, 34, 21], [2, 24, 38, 26]]),
        "labels": torch.tensor([3, 1, 2]),
        "instance_map": instance_map,
        "image_id": 17,
    }
    return image, target


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (0, [[1, 2, 3], [4, 5, 6]]),
        (1, [[3, 6], [2, 5], [1, 4]]),
        (2, [[6, 5, 4], [3, 2, 1]]),
        (3, [[4, 1], [5, 2], [6, 3]]),
        (4, [[3, 2, 1], [6, 5, 4]]),
        (5, [[6, 3], [5, 2], [4, 1]]),
        (6, [[4, 5, 6], [1, 2, 3]]),
        (7, [[1, 4], [2, 5], [3, 6]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_eight_symmetries_by_hand(turn, expected, dtype):
    pixels = torch.tensor([[[1, 2, 3], [4, 5, 6]]], dtype=dtype)
    turned = flip_and_turn(pixels, turn)
    assert turned.dtype == dtype
    assert turned[0].tolist() == expected
    back = turn if turn >= 4 else -turn % 4  # a reflection undoes itself
    assert torch.equal(flip_and_turn(turned, back), pixels)


def test_without_changes_all_stays_as_it_was():
    image, target = _sample()
    new_image, new_target = TrainTransform(**NO_CHANGE)(image, target, _generator())
    assert torch.equal(new_image, image)
    assert new_target["image_id"] == 17
    for key in ("boxes", "labels", "instance_map"):
        assert torch.equal(new_target[key], target[key])
        assert new_target[key].dtype == target[key].dtype


def test_image_and_map_move_together():
    image, target = _sample()
    transform = TrainTransform(crop_size=24, scale_range=(1, 1), color=0, min_visible=0)
    turned = set()
    for seed in range(30):
        new_image, new_target = transform(image, target, _generator(seed))
        marks = torch.cat([torch.tensor([0]), new_target["labels"]])[new_target["instance_map"]]
        colors = torch.tensor([0, 40, 80, 120])[torch.tensor([0, 2, 3, 1])][marks]  # by label
        assert torch.equal(new_image[0].long(), colors.amax(0))
        assert new_image.shape == (3, 24, 24)
        assert new_image.is_contiguous()
        turned.add(tuple(new_image[0].flatten().tolist()))
    assert len(turned) == 30


def test_inputs_are_left_as_they_were():
    image, target = _sample()
    before = image.clone(), {k: v.clone() for k, v in target.items() if k != "image_id"}
    for seed in range(4):
        new_image, new_target = TrainTransform(crop_size=20)(image, target, _generator(seed))
        new_image.fill_(0)
        new_target["instance_map"].fill_(0)
    assert torch.equal(image, before[0])
    assert all(torch.equal(target[key], value) for key, value in before[1].items())


def test_random_numbers_come_from_the_generator_alone():
    image, target = _sample()
    transform = TrainTransform(crop_size=16)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = transform(image, target, _generator(5))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    second = transform(image, target, _generator(5))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1]["boxes"], second[1]["boxes"])
    assert not torch.equal(transform(image, target, _generator(6))[0], first[0])


def test_scale_comes_before_the_crop_in_size_and_after_it_in_cost():
    image, target = _sample()
    doubled = TrainTransform(crop_size=512, scale_range=(2, 2), flip=False, color=0)
    new_image, new_target = doubled(image, target, _generator())
    assert new_image.shape == (3, 60, 80)
    assert new_target["boxes"].tolist() == [[12, 8, 28, 24], [66, 40, 68, 42], [4, 48, 76, 52]]
    cropped = TrainTransform(crop_size=20, scale_range=(2, 2), flip=False, color=0)
    assert cropped(image, target, _generator())[0].shape == (3, 20, 20)
    halved = TrainTransform(crop_size=512, scale_range=(0.5, 0.5), flip=False, color=0)
    assert halved(image, target, _generator())[0].shape == (3, 15, 20)


def test_image_smaller_than_the_crop_comes_out_smaller():
    image, target = _sample(26, 40)
    transform = TrainTransform(crop_size=30, scale_range=(1, 1), flip=False, color=0)
    assert transform(image, target, _generator())[0].shape == (3, 26, 30)
    one_pixel = image[:, :1, :1], {**target, "instance_map": target["instance_map"][:, :1, :1]}
    assert TrainTransform(scale_range=(0.3, 0.3))(*one_pixel, _generator())[0].shape == (3, 1, 1)


def test_crowded_crops_hold_a_cell_drawn_evenly_and_lie_evenly_about_it():
    boxes = torch.tensor([[30.0, 30, 31, 31], [2, 50, 5, 53], [31, 30, 32, 31]])
    transform = TrainTransform(crop_size=8, scale_range=(1, 1), flip=False, crowded=1)
    generator, seen = _generator(), []
    for _ in range(600):
        placement = transform.draw_placement((60, 60), generator, boxes)
        assert placement.size == (8, 8)
        seen.append(placement.window[:2])
    tops, lefts = np.array(seen).T
    corner = tops > 40  # around (51, 3): no window starts left of 0
    assert 0.25 < corner.mean() < 0.42  # one cell of three
    assert sorted(set(tops[corner])) == [*range(44, 52)]
    assert sorted(set(lefts[corner])) == [0, 1, 2, 3]
    assert sorted(set(tops[~corner])) == [*range(23, 31)]
    assert sorted(set(lefts[~corner])) == [*range(23, 32)]
    assert np.bincount(tops[~corner] - 23).min() > 25  # 50 expected of each


def test_share_of_crowded_crops_and_empty_images():
    transform = TrainTransform(crop_size=2, scale_range=(1, 1), crowded=0.5)
    box = torch.tensor([[0.0, 0, 1, 1]])
    generator = _generator()
    held = [
        transform.draw_placement((100, 100), generator, box).window[:2] == (0, 0)
        for _ in range(300)
    ]
    assert 0.4 < np.mean(held) < 0.6
    windows = [transform.draw_placement((9, 9), generator, box[:0]).window for _ in range(200)]
    assert {top for top, _, _, _ in windows} == {*range(8)}


def test_crowded_crops_hold_their_cell():
    image, target = _sample()
    transform = TrainTransform(crop_size=9, scale_range=(1, 1), crowded=1, min_visible=0)
    for seed in range(20):
        new_image, new_target = transform(image, target, _generator(seed))
        assert new_image.shape == (3, 9, 9)
        assert len(new_target["boxes"])


def test_image_without_cells_stays_without():
    image, target = _sample()
    target |= {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    target["instance_map"] = torch.zeros_like(target["instance_map"])
    _, new_target = TrainTransform(crop_size=16)(image, target, _generator())
    assert new_target["boxes"].shape == (0, 4)
    assert new_target["labels"].shape == (0,)
    assert new_target["instance_map"].shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("min_visible", "labels", "reason"),
    [
        (0, [5, 6, 7], "whatever shows is kept"),
        (0.25, [5, 6, 7], "2 of 8 pixels are a quarter: kept"),
        (0.26, [5, 7], "2 of 8 pixels are too few"),
        (1, [5], "only what is whole"),
    ],
)
def test_slivers_are_dropped_and_ids_renumbered(min_visible, labels, reason):
    instance_map = torch.tensor([[[1, 1, 0, 2], [0, 4, 4, 2]]], dtype=torch.int32)
    full_areas = torch.tensor([2, 8, 5, 4])  # the third is not in this crop at all
    target = update_target(instance_map, torch.tensor([5, 6, 9, 7]), full_areas, min_visible)
    assert target["labels"].tolist() == labels, reason
    boxes = {5: [0, 0, 2, 1], 6: [3, 0, 4, 2], 7: [1, 1, 3, 2]}
    assert target["boxes"].tolist() == [boxes[label] for label in labels]
    marks = sorted(set(target["instance_map"].flatten().tolist()) - {0})
    assert marks == list(range(1, len(labels) + 1))


def test_a_window_of_a_sample_has_its_own_places_and_numbers():
    """Cell 1 is 8 x 8 at (6, 4), of which the window shows a column; cell 2 lies in it."""
    image, target = _sample()
    part, cells = cut_sample(image, {**target, "image_id": 3}, (13, 2, 36, 22))
    assert torch.equal(part, image[:, 2:22, 13:36])
    assert cells["boxes"].tolist() == [[0, 2, 1, 10], [20, 18, 21, 19]]
    assert cells["labels"].tolist() == target["labels"][:2].tolist() and cells["image_id"] == 3
    assert cells["instance_map"].shape == (1, 20, 23)
    _, whole = cut_sample(image, target, (13, 2, 36, 22), min_visible=0.2)
    assert whole["boxes"].tolist() == [[20, 18, 21, 19]]
    assert int(whole["instance_map"].max()) == 1 and int(target["instance_map"].max()) == 3


def test_areas_are_summed_over_layers_and_empty_layers_go():
    instance_map = torch.tensor([[[0, 0, 0]], [[1, 1, 0]], [[0, 2, 2]]], dtype=torch.int32)
    target = update_target(instance_map, torch.tensor([1, 2]), torch.tensor([2, 8]), 0.5)
    assert target["instance_map"].tolist() == [[[1, 1, 0]]]
    split = torch.tensor([[[1, 0, 0]], [[0, 1, 0]]], dtype=torch.int32)  # one cell, two layers
    target = update_target(split, torch.tensor([1]), torch.tensor([2]), 1.0)
    assert target["boxes"].tolist() == [[0, 0, 2, 1]]
    none = update_target(split, torch.tensor([1]), torch.tensor([9]), 1.0)
    assert none["instance_map"].tolist() == [[[0, 0, 0]]]


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(
        "i4", hnp.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.integers(0, 5)
    ),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_update_equals_one_comparison_a_cell(pixels, min_visible):
    instance_map = torch.from_numpy(pixels)
    labels, full_areas = torch.arange(1, 6), torch.tensor([1, 2, 4, 8, 16])
    target = update_target(instance_map, labels, full_areas, min_visible)
    kept = []
    for k in range(5):
        mask = (instance_map == k + 1).any(0)
        area = int((instance_map == k + 1).sum())
        if area and area >= min_visible * int(full_areas[k]):
            y, x = torch.nonzero(mask, as_tuple=True)
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            kept.append((int(labels[k]), [int(v) for v in box], mask))
    assert target["labels"].tolist() == [label for label, _, _ in kept]
    assert target["boxes"].tolist() == [box for _, box, _ in kept]
    for number, (_, _, mask) in enumerate(kept, 1):
        assert torch.equal((target["instance_map"] == number).any(0), mask)
    assert len(target["boxes"]) == len(kept)
    assert target["boxes"].shape[1] == 4


def test_color_jitter_stays_within_its_bounds_and_type():
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    seen = {int(jitter_color(image, 0.2, _generator(seed))[0, 0, 0]) for seed in range(20)}
    assert len(seen) > 5
    assert 75 <= min(seen) <= max(seen) <= 125
    assert jitter_color(image, 0.2, _generator()).dtype == torch.uint8


def test_color_matrix_keeps_greys_and_turns_the_rest():
    np.testing.assert_allclose(color_matrix(1, 0), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(color_matrix(1, 1 / 3) @ [9, 0, 0], [0, 9, 0], atol=1e-12)  # green
    np.testing.assert_allclose(color_matrix(0, 0.1) @ [30, 60, 90], [60, 60, 60])  # no saturation
    np.testing.assert_allclose(color_matrix(2, 0) @ [50, 60, 70], [40, 60, 80])  # twice as far
    np.testing.assert_allclose(color_matrix(1.3, 0.07) @ [8, 8, 8], [8, 8, 8])


def test_channels_are_mixed_rounded_and_clipped_once():
    image = torch.tensor([[[10, 200]], [[20, 100]], [[30, 0]]], dtype=torch.uint8)
    before = image.clone()
    matrix = np.array([[1, 0.5, 0], [0, 0.11, 0], [-2, 0, 1]])
    # 10 + 10 + 0.4, 2.2 + 0.4, 30 - 20 + 0.4 and 200 + 50 + 0.4, 11 + 0.4, -400 + 0.4
    mixed = mix_channels(image, matrix, 0.4)
    assert mixed.tolist() == [[[20, 250]], [[3, 11]], [[10, 0]]]
    assert mix_channels(image, 2 * np.eye(3), 0).tolist() == [[[20, 255]], [[40, 200]], [[60, 0]]]
    assert torch.equal(image, before)


def test_contrast_is_the_distance_from_the_mean_grey(monkeypatch):
    image = torch.tensor([[[40, 160]], [[40, 160]], [[40, 160]]], dtype=torch.uint8)
    draws = iter([0.5, 1.0, 0.5, 0.5])  # contrast 1 + color, all else unchanged
    monkeypatch.setattr(transforms, "_uniform", lambda generator: next(draws))
    assert jitter_color(image, 0.5, None)[0].tolist() == [[10, 190]]  # 100 -+ 60 * 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "crop_size is 0"),
        ({"scale_range": (0, 1)}, r"scale_range is \(0, 1\)"),
        ({"scale_range": (1.2, 0.8)}, "smallest <= largest"),
        ({"crowded": 2}, "crowded is 2"),
        ({"stain": -0.1}, "stain is -0.1"),
        ({"color": 1.5}, "color is 1.5"),
        ({"min_visible": -0.1}, "min_visible is -0.1"),
    ],
)
def test_settings_that_cannot_work(arguments, message):
    with pytest.raises(SettingsError, match=message):
        TrainTransform(**arguments)

"""Tiles: they cover the image, and what they show together is what the whole image shows."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from tiny_models import make_image, make_target, tiny_model
from torch import nn

from cellseg.coco import (
    check_records,
    instance_map_to_rles,
    make_records,
    mask_to_rle,
    move_rles,
    rle_to_mask,
    sort_records,
)
from cellseg.errors import SettingsError
from cellseg.inference import predict_image, predict_images, predict_tiles
from cellseg.inference.tiles import Tile, join_tiles, place_records, plan_for_model, plan_tiles
from cellseg.overlap import neighbour_ious


class CuttingModel(nn.Module):
    """Finds upright rectangles by their colour, cut where the image ends, all at score 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shapes = []

    def forward(self, images):
        self.shapes += [tuple(image.shape[-2:]) for image in images]
        return [self.look(image[0].numpy()) for image in images]

    def look(self, red):
        boxes, labels = [], []
        for label, color in ((1, 70), (2, 150)):
            patches, _ = ndimage.label(red == color)
            for rows, columns in ndimage.find_objects(patches):
                boxes.append([columns.start, rows.start, columns.stop, rows.stop])
                labels.append(label)
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.ones(len(boxes)),
            "masks": torch.ones(len(boxes), 1, 28, 28),
        }


def scattered_squares(generator, height, width, largest):
    """Return rectangles (label, x1, y1, x2, y2) that do not touch, of up to `largest` a side."""
    pitch = largest + 2
    squares = []
    for top in range(0, height, pitch):
        for left in range(0, width, pitch):
            h, w = generator.integers(1, largest + 1, 2)
            y, x = top + generator.integers(0, largest + 1 - h), left + generator.integers(0, 2)
            if y < height and x < width:
                label = int(generator.integers(1, 3))
                squares.append((label, x, y, min(x + w, width), min(y + h, height)))
    return squares


@pytest.mark.parametrize("length", [64, 100, 256, 257, 300, 511, 640, 1000, 4096])
@pytest.mark.parametrize(
    ("tile_size", "overlap", "multiple"), [(256, 64, 1), (256, 64, 32), (256, 128, 64), (70, 9, 1)]
)
def test_tiles_cover_the_image_and_share_it_out(length, tile_size, overlap, multiple):
    tiles = plan_tiles((length, 80), tile_size=tile_size, overlap=overlap, multiple=multiple)
    column = [tile for tile in tiles if tile.window[0] == 0]
    assert [tile.row for tile in column] == list(range(len(column)))
    assert column[0].window[1] == 0 and column[-1].window[3] == length
    assert column[0].share[1] == -math.inf and column[-1].share[3] == math.inf
    for tile in column:
        top, bottom = tile.window[1], tile.window[3]
        assert 0 < bottom - top <= tile_size
        assert length <= tile_size or top % multiple == 0
        assert bottom == length or bottom % multiple == 0
    for one, next_one in pairwise(column):
        start, end = next_one.window[1], one.window[3]
        assert end - start >= overlap
        assert one.share[3] == next_one.share[1] == (start + end) / 2


def test_tiles_of_an_image_are_about_equally_large():
    tiles = plan_tiles((64, 1100), tile_size=1024, overlap=128, multiple=64)
    assert [tile.window for tile in tiles] == [(0, 0, 640, 64), (512, 0, 1100, 64)]
    assert [tile.share[:3:2] for tile in tiles] == [(-math.inf, 576), (576, math.inf)]


def test_an_image_of_one_tile_is_not_cut():
    (tile,) = plan_tiles((1000, 999), tile_size=1000, overlap=100, multiple=64)
    assert tile.window == (0, 0, 999, 1000) and tile.shape == (1000, 999)
    assert tile.share == (-math.inf, -math.inf, math.inf, math.inf)


@pytest.mark.parametrize(("tile_size", "overlap"), [(100, 51), (63, 0), (100, -1), (0, 0)])
def test_tiles_that_cannot_work_are_refused(tile_size, overlap):
    multiple = 64 if tile_size == 63 else 1
    with pytest.raises(SettingsError, match="at least twice as large as their overlap"):
        plan_tiles((500, 500), tile_size=tile_size, overlap=overlap, multiple=multiple)


@pytest.mark.parametrize(
    ("scale", "multiple"), [(1, 64), (2, 32), (0.5, 128), (1.5, 128), (4, 16), (1.37, 47)]
)
def test_tiles_begin_at_whole_strides_of_the_network(scale, multiple):
    model = tiny_model(image_scale=scale)
    tiles = plan_for_model(model, (900, 5000), tile_size=800, overlap=70)
    starts = {tile.window[0] for tile in tiles}
    assert len(starts) > 5 and all(start % multiple == 0 for start in starts)
    if scale != 1.37:
        assert multiple * scale % 64 == 0


@pytest.mark.parametrize(
    ("size", "scale", "whole"),
    [
        ((1000, 1000), 2, True),
        ((1025, 1024), 2, False),
        ((1024, 4096), 1, True),
        ((2049, 2049), 1, False),
        ((8000, 8000), 0.25, True),
    ],
)
def test_only_very_large_images_are_tiled_by_default(size, scale, whole):
    tiles = plan_for_model(tiny_model(image_scale=scale), size)
    assert (len(tiles) == 1) == whole
    for tile in tiles:
        assert whole or max(tile.shape) * scale <= 1536


def blobs(seed, height, width, largest):
    """Return a map of connected cells of every shape, none larger than `largest` a side."""
    generator = np.random.default_rng(seed)
    ids = np.zeros((height, width), np.int32)
    for number in range(1, max(2, height * width // (largest * largest)) + 1):
        h, w = np.minimum(generator.integers(1, largest + 1, 2), (height, width))
        top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
        pieces, count = ndimage.label(generator.random((h, w)) < 0.7, np.ones((3, 3)))
        free = ids[top : top + h, left : left + w]
        ids[top : top + h, left : left + w] = np.where(
            (pieces == min(1, count)) & (pieces > 0) & (free == 0), number, free
        )
    return connected(ids)


def connected(ids):
    """Return the map with a number for each connected piece of a cell."""
    pieces = np.zeros_like(ids)
    for number in np.unique(ids[ids > 0]):
        labels, _ = ndimage.label(ids == number, np.ones((3, 3)))
        pieces += np.where(labels > 0, labels + pieces.max(), 0).astype(np.int32)
    return pieces


def see(ids):
    """Return a record of score 1 for each cell of a map, class by its number."""
    numbers = np.unique(ids[ids > 0])
    dense = np.searchsorted(np.append(0, numbers), ids).astype(np.int32)
    rles = instance_map_to_rles(dense[None], len(numbers))
    return make_records(7, (numbers % 3 + 1).tolist(), [1.0] * len(numbers), rles)


def tile_by_tile(ids, tiles):
    parts = []
    for tile in tiles:
        left, top, right, bottom = tile.window
        parts.append(place_records(tile, see(ids[top:bottom, left:right]), ids.shape))
    return join_tiles(tiles, parts, iou_threshold=0.5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(64, 400),
    width=st.integers(64, 400),
    tile_size=st.integers(40, 200),
    share=st.floats(0.1, 0.5),
)
def test_tiles_show_what_the_whole_image_shows(seed, height, width, tile_size, share):
    overlap = max(2, int(tile_size * share))
    ids = blobs(seed, height, width, overlap)
    tiles = plan_tiles(ids.shape, tile_size=tile_size, overlap=overlap)
    assert tile_by_tile(ids, tiles) == sort_records(see(ids))


@pytest.mark.slow
@pytest.mark.parametrize("side", [1024, 2048, 4096])
def test_tiles_show_what_a_large_image_shows(side):
    squares = scattered_squares(np.random.default_rng(side), side, side - 33, 64)
    image = make_image(side, side - 33, squares)
    model = CuttingModel().eval()
    expected = predict_image(model, image, image_id=1)
    assert len(expected) > (side / 66 - 1) ** 2 * 0.9
    for tile_size in (512, 1024):
        found = predict_tiles(model, image, image_id=1, tile_size=tile_size, overlap=64)
        assert found == expected


@pytest.mark.parametrize("size", [(64, 64), (130, 333), (500, 257)])
def test_a_model_that_cuts_cells_finds_the_whole_ones(size):
    squares = scattered_squares(np.random.default_rng(1), *size, 64)
    image = make_image(*size, squares)
    model = CuttingModel().eval()
    expected = predict_image(model, image, image_id=1)
    model.shapes.clear()
    found = predict_tiles(model, image, image_id=1, tile_size=192, overlap=64)
    assert found == expected
    assert len(model.shapes) == len(plan_for_model(model, size, tile_size=192, overlap=64))
    assert max(max(shape) for shape in model.shapes) <= 192
    assert check_records(found, image_sizes={1: size}) == []
    again = predict_images(model, [(image, 1)], tile_size=192, overlap=64, progress=False)
    assert again == expected


def test_an_array_as_read_from_a_file_is_cut_into_tiles_as_its_tensor_is():
    image = make_image(130, 333, scattered_squares(np.random.default_rng(1), 130, 333, 64))
    model, options = CuttingModel().eval(), {"image_id": 1, "tile_size": 192, "overlap": 64}
    expected = predict_tiles(model, image, **options)
    shapes = list(model.shapes)
    model.shapes.clear()
    assert predict_tiles(model, image.permute(1, 2, 0).numpy(), **options) == expected
    assert len(shapes) > 1 and model.shapes == shapes


NARROW = {"fpn_channels": 32, "head_width": 64, "rois_per_image": 64}


def train_on_squares(steps):
    """Return a narrow network that finds rectangles, after so many steps of training."""
    torch.manual_seed(0)
    model = tiny_model(**NARROW, train_proposals=300).train()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = np.random.default_rng(0)
    for _ in range(steps):
        squares = [scattered_squares(generator, 128, 128, 24) for _ in range(4)]
        images = [make_image(128, 128, some) for some in squares]
        losses = model(images, [make_target(128, 128, some) for some in squares])
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    return model.state_dict()


@pytest.mark.slow
def test_a_network_sees_the_same_cells_in_tiles():
    state = train_on_squares(240)
    # 1,465 squares a megapixel: 3.5 boxes for each, as the default has for the densest real tile.
    model = tiny_model(**NARROW, proposals=5100)
    model.load_state_dict(state)
    model.eval()
    size = (576, 832)
    image = make_image(*size, scattered_squares(np.random.default_rng(9), *size, 24))
    whole = predict_image(model, image, image_id=1)
    options = {"tile_size": 320, "overlap": 64}
    tiled = predict_tiles(model, image, image_id=1, **options)
    tiles = plan_for_model(model, size, **options)
    assert len(tiles) == 6
    for one, other in ((whole, tiled), (tiled, whole)):
        sure = [r for r in one if r["score"] >= 0.5 and not near_a_border(r["bbox"], tiles, size)]
        assert len(sure) > 50
        assert np.mean([has_twin(record, other) for record in sure]) >= 0.99


def near_a_border(bbox, tiles, size):
    """Tell whether a box comes nearer than half the overlap to a border between tiles."""
    margin = tiles[0].overlap / 2
    for axis in (0, 1):
        ends = {tile.window[axis + side] for tile in tiles for side in (0, 2)} - {0, size[1 - axis]}
        low, high = bbox[axis] - margin, bbox[axis] + bbox[axis + 2] + margin
        if any(low < end < high for end in ends):
            return True
    return False


def has_twin(record, others):
    """Tell whether a record of the class has mask IoU >= 0.9 with this one."""
    rles = [r["segmentation"] for r in others if r["category_id"] == record["category_id"]]
    first, _, iou = neighbour_ious([record["segmentation"], *rles])
    return bool((iou[first == 0] >= 0.9).any())


def test_a_cell_larger_than_the_overlap_is_found_once_if_tiles_agree_on_most_of_it():
    ids = np.zeros((60, 300), np.int32)
    ids[20:30, 60:100] = 1  # 40 pixels where tiles share 32
    tiles = plan_tiles(ids.shape, tile_size=96, overlap=32)
    (found,) = tile_by_tile(ids, tiles)
    assert found["bbox"][2] >= 32
    ids[40:50, 10:290] = 1  # larger than tiles: every pixel in some part
    shown = [rle_to_mask(record["segmentation"]) for record in tile_by_tile(ids, tiles)]
    assert np.array_equal(np.any(shown, axis=0)[40:50], ids[40:50] > 0)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_tiles_that_disagree_by_a_pixel_neither_lose_nor_double_a_cell(shift):
    one, other = plan_tiles((50, 100), tile_size=64, overlap=28)
    seam = int(one.share[2])
    ids = np.zeros((50, 100), np.int32)
    ids[10:20, seam - 4 : seam + 4] = 1
    parts = []
    for tile, moved in ((one, shift), (other, -shift)):
        left, top, right, bottom = tile.window
        seen = see(np.roll(ids, moved, axis=1)[top:bottom, left:right])
        parts.append(place_records(tile, seen, ids.shape))
    assert len(join_tiles([one, other], parts, iou_threshold=0.5)) == 1


def test_records_of_one_tile_never_remove_each_other():
    tile, _ = plan_tiles((50, 100), tile_size=64, overlap=28)
    mask = np.zeros((50, 100), bool)
    mask[10:20, 44:54] = True
    twins = make_records(1, [1, 1], [0.9, 0.8], [mask_to_rle(mask)] * 2)
    assert join_tiles([tile], [twins], iou_threshold=0.5) == twins


def test_mixing_halves_the_score_of_what_one_of_the_two_saw():
    class Whole(CuttingModel):
        def look(self, red):
            found = super().look(red)
            return found if red.shape[1] > 200 else {k: v[:0] for k, v in found.items()}

    image = make_image(64, 400, [(1, 10, 12, 30, 24)])
    options = {"image_id": 1, "tile_size": 192, "overlap": 64}
    assert predict_tiles(Whole().eval(), image, **options) == []
    mixed = predict_tiles(Whole().eval(), image, mix_whole=True, **options)
    assert [(record["score"], record["bbox"]) for record in mixed] == [(0.5, [10, 12, 20, 12])]
    both = predict_tiles(CuttingModel().eval(), image, mix_whole=True, **options)
    assert [record["score"] for record in both] == [1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    window=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    offset=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    rest=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    density=st.sampled_from([0, 0.1, 0.6, 1]),
)
def test_masks_of_a_window_move_to_the_image(seed, window, offset, rest, density):
    (height, width), (x, y) = window, offset
    size = (y + height + rest[0], x + width + rest[1])
    masks = np.random.default_rng(seed).random((3, height, width)) < density
    moved = np.zeros((3, *size), bool)
    moved[:, y : y + height, x : x + width] = masks
    found = move_rles([mask_to_rle(mask) for mask in masks], offset, size)
    assert found == [mask_to_rle(mask) for mask in moved]


def test_no_masks_move_to_no_masks():
    assert move_rles([], (3, 4), (50, 60)) == []


def test_a_tile_counts_what_lies_in_its_share():
    tile = Tile((100, 0, 200, 80), (120, -math.inf, 180, math.inf), row=0, overlap=40)
    boxes = np.array(
        [
            [115, 5, 125, 15],  # its centre is the first place of the share
            [175, 5, 185, 15],  # the next tile's first place, whole: counts in both
            [105, 5, 115, 15],  # centre 10 outside, whole
            [103, 5, 115, 15],  # centre 11 outside
            [101, 5, 141, 15],  # cut, centre inside
            [100, 5, 130, 15],  # cut, centre 5 outside
            [140, 0, 160, 80],  # at the image's own borders: not cut
        ],
        dtype=float,
    )
    assert tile.counts(boxes).tolist() == [True, True, True, False, True, False, True]
    assert tile.may_have_twins(boxes).tolist() == [True, True, True, True, True, True, False]
    assert tile.counts(boxes[:0]).tolist() == []

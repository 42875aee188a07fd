"""Outlines along pixel edges enclose exactly a mask's pixels."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from skimage.measure import label as connected_pieces
from tiny_sets import (
    RING,
)

from cellseg import interchange


def test_ring_of_a_rectangle_by_hand():
    polygons = interchange.mask_to_polygons(np.ones((3, 4), bool), (2, 1))
    assert polygons == [[[(2, 1), (6, 1), (6, 4), (2, 4), (2, 1)]]]
    assert interchange.ring_area(polygons[0][0]) == 12


def test_a_hole_is_an_inner_ring_that_turns_the_other_way():
    [[outer, hole]] = interchange.mask_to_polygons(RING)
    assert outer == [(1, 1), (6, 1), (6, 5), (1, 5), (1, 1)]
    assert hole == [(3, 2), (3, 4), (4, 4), (4, 2), (3, 2)]
    assert (interchange.ring_area(outer), interchange.ring_area(hole)) == (20, -2)


CORNERS = [
    (["10", "01"], [[1], [1]], "two pixels that touch at a corner are two pieces"),
    (["111", "101", "110"], [[8, -1]], "a loop that closes at a corner has a hole"),
    (["1111", "1011", "1101", "1111"], [[16, -1, -1]], "two holes that touch at a corner"),
    (["111", "101", "111"], [[9, -1]], "a hole"),
    (["11111", "10001", "10101", "10001", "11111"], [[25, -9], [1]], "a piece in a hole"),
]


@pytest.mark.parametrize(("rows", "areas", "reason"), CORNERS, ids=[row[2] for row in CORNERS])
def test_where_pixels_touch_at_corners(rows, areas, reason):
    mask = np.array([[value == "1" for value in row] for row in rows])
    polygons = interchange.mask_to_polygons(mask)
    assert [[interchange.ring_area(ring) for ring in rings] for rings in polygons] == areas, reason


def inside(rings, x, y):
    """Tell by even crossings of a ray to the left whether a point lies in the rings."""
    crossings = 0
    for ring in rings:
        for (x1, y1), (x2, y2) in pairwise(ring):
            crossings += x1 == x2 and x1 < x and min(y1, y2) < y < max(y1, y2)
    return crossings % 2 == 1


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8)))
def test_rings_enclose_exactly_the_pixels(mask):
    polygons = interchange.mask_to_polygons(mask)
    pieces = connected_pieces(mask, connectivity=1)
    assert len(polygons) == pieces.max()
    for number, rings in enumerate(polygons, start=1):
        areas = [interchange.ring_area(ring) for ring in rings]
        assert areas[0] > 0 and all(area < 0 for area in areas[1:])
        assert sum(areas) == (pieces == number).sum()
        for ring in rings:
            assert ring[0] == ring[-1]
            assert len(set(ring)) == len(ring) - 1  # passes no corner twice
            assert all((x1 == x2) != (y1 == y2) for (x1, y1), (x2, y2) in pairwise(ring))
    every_ring = [ring for rings in polygons for ring in rings]
    assert sum(map(interchange.ring_area, every_ring)) == mask.sum()
    drawn = [
        [inside(every_ring, x + 0.5, y + 0.5) for x in range(mask.shape[1])]
        for y in range(mask.shape[0])
    ]
    assert np.array_equal(drawn, mask)

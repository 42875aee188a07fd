"""Outlines along pixel edges: closed rings that enclose exactly a mask's pixels."""

from itertools import pairwise

import numpy as np
from scipy import ndimage

Ring = list[tuple[int, int]]


def mask_to_polygons(mask: np.ndarray, offset: tuple[int, int] = (0, 0)) -> list[list[Ring]]:
    """Return the polygons of a mask: for each of its pieces the outer ring, then its holes.

    Pixel (row r, column c) covers the square from (c, r) to (c + 1, r + 1). Pixels that touch at
    a corner only belong to different pieces, and no ring passes a corner twice: so the polygons
    are valid as OGC's simple features, whose rings may touch at points. Outer rings turn as RFC
    7946 (3.1.6) asks, which with y downwards looks clockwise, holes the other way: the signed
    areas add up to the number of pixels.

    Args:
        mask: bool [h, w], the mask's box or more of it.
        offset: (x, y) of the array in the image.

    Returns:
        one list of rings a piece, by the row and then the column of its first pixel. A ring holds
        its corners as (x, y), the first again at the end.
    """
    pieces, number = ndimage.label(mask)  # neighbours share an edge
    polygons = []
    for piece, box in enumerate(ndimage.find_objects(pieces, number), start=1):
        top, left = box[0].start + offset[1], box[1].start + offset[0]
        rings = [_corners(loop, left, top) for loop in _loops(pieces[box] == piece)]
        polygons.append(sorted(rings, key=ring_area, reverse=True))  # only the outer one is > 0
    return polygons


def ring_area(ring: Ring) -> float:
    """Return the signed area of a closed ring by the shoelace formula; > 0 for an outer ring."""
    twice = sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairwise(ring))
    return twice / 2


def _loops(piece: np.ndarray) -> list[Ring]:
    """Return the closed walks along the edges of one piece, one step a pixel edge.

    Each edge is walked with the piece on its right as seen on a screen. Where a walk comes to a
    point where it was before, what lies between is a loop of its own.
    """
    steps = _steps(piece)
    loops = []
    while steps:
        path = [next(iter(steps))]
        place = {path[0]: 0}
        while path[-1] in steps:
            ways = steps[path[-1]]
            point = ways.pop()
            if not ways:
                del steps[path[-1]]
            if point in place:
                start = place[point]
                loops.append([*path[start:], point])
                for left_behind in path[start + 1 :]:
                    del place[left_behind]
                del path[start + 1 :]
            else:
                place[point] = len(path)
                path.append(point)
    return loops


def _steps(piece: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return for each corner (x, y) of the pixels' edges the corners that a step leads to."""
    padded = np.pad(piece, 1)
    inside = padded[1:-1, 1:-1]
    sides = [
        (padded[:-2, 1:-1], (0, 0), (1, 0)),  # above: to the right along the top edge
        (padded[1:-1, 2:], (1, 0), (1, 1)),  # right: down
        (padded[2:, 1:-1], (1, 1), (0, 1)),  # below: to the left
        (padded[1:-1, :-2], (0, 1), (0, 0)),  # left: up
    ]
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for beyond, (x1, y1), (x2, y2) in sides:
        rows, columns = np.nonzero(inside & ~beyond)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            steps.setdefault((column + x1, row + y1), []).append((column + x2, row + y2))
    return steps


def _corners(loop: Ring, left: int, top: int) -> Ring:
    """Return a closed loop without the points that it passes straight on, moved by (left, top)."""
    points = loop[:-1]
    turns = [
        (x + left, y + top)
        for (x0, y0), (x, y), (x2, y2) in zip(
            points[-1:] + points[:-1], points, points[1:] + points[:1], strict=True
        )
        if (x - x0, y - y0) != (x2 - x, y2 - y)
    ]
    start = turns.index(min(turns, key=lambda point: (point[1], point[0])))
    turns = turns[start:] + turns[:start]
    return [*turns, turns[0]]

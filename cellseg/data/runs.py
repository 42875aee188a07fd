"""Runs of equal value along the rows of a map: how cells are found without looking at each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Runs:
    """Runs of equal value other than 0 along the rows of a map, in raster order.

    Attributes:
        starts: int64 [R], position of the first pixel in the flattened map.
        stops: int64 [R], position after the last pixel; a run never crosses rows.
        values: [R] of the map's type.
    """

    starts: np.ndarray
    stops: np.ndarray
    values: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of pixels of each run."""
        return self.stops - self.starts

    def select(self, chosen: np.ndarray) -> "Runs":
        """Return the runs that an index or a mask [R] chooses."""
        return Runs(self.starts[chosen], self.stops[chosen], self.values[chosen])


EMPTY = Runs(*np.zeros((3, 0), np.int64))


def find_runs(pixels: np.ndarray) -> Runs:
    """Return the runs of a map [..., W]; layers and rows are taken one after the other.

    Costs one comparison of each pixel with its neighbour; all else costs as much as there are runs.
    A value that is not a number is a run of its own.
    """
    flat = pixels.ravel()
    changes = np.empty(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=changes[1:])
    changes[:: pixels.shape[-1]] = True
    starts = np.flatnonzero(changes)
    stops = np.append(starts[1:], flat.size)
    values = flat[starts]
    cells = values != 0
    return Runs(starts[cells], stops[cells], values[cells])


def draw_runs(runs: Runs, size: int) -> np.ndarray:
    """Return the flattened map of `size` pixels, int32, that holds the runs' values, else 0.

    Costs one pass of writing, whatever the number of runs.

    Args:
        runs: in raster order, none over another; the values fit into int32.
        size: pixels of the map, all its layers counted.
    """
    lengths = np.empty(2 * len(runs.starts) + 1, np.int64)
    lengths[1::2] = runs.lengths
    lengths[::2] = np.append(runs.starts, size) - np.append(0, runs.stops)
    values = np.zeros(len(lengths), np.int32)
    values[1::2] = runs.values
    return np.repeat(values, lengths)


def stack_runs(layers: Sequence[Runs], size: int) -> Runs:
    """Return the runs of all layers, of `size` pixels each, as runs of one map [L, H, W]."""
    shifts = [depth * size for depth in range(len(layers))]
    starts = [layer.starts + shift for layer, shift in zip(layers, shifts, strict=True)]
    stops = [layer.stops + shift for layer, shift in zip(layers, shifts, strict=True)]
    values = [layer.values for layer in layers]
    return Runs(*map(np.concatenate, (starts, stops, values)))


def add_to_layers(layers: list[Runs], runs: Runs) -> None:
    """Put each cell into the first layer where it is free as a whole, adding layers.

    Costs as much as there are runs; no pixel is looked at.

    Args:
        layers: changed in place.
        runs: of one map, in raster order; the values tell its cells apart, also from those that
            the layers hold.
    """
    depth = 0
    while len(runs.starts):
        if depth == len(layers):
            layers.append(runs)
            return
        taken = runs.values[_overlapping(runs, layers[depth])]
        waits = np.isin(runs.values, taken)
        layers[depth] = _merge(layers[depth], runs.select(~waits))
        runs = runs.select(waits)
        depth += 1


def _overlapping(runs: Runs, others: Runs) -> np.ndarray:
    """Return for each run whether it shares a pixel with one of the others, bool [R]."""
    before = np.searchsorted(others.stops, runs.starts, "right")  # others that end before it
    begun = np.searchsorted(others.starts, runs.stops, "left")  # others that begin before its end
    return begun > before


def _merge(runs: Runs, others: Runs) -> Runs:
    """Return runs and others, none over another, in raster order."""
    pairs = ((runs.starts, others.starts), (runs.stops, others.stops), (runs.values, others.values))
    both = Runs(*map(np.concatenate, pairs))
    return both.select(np.argsort(both.starts, kind="stable"))


def measure_runs(
    runs: Runs, index: np.ndarray, count: int, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes and areas of the things that runs belong to.

    Args:
        runs: of a map [H, W] or [L, H, W].
        index: int [R], 0..count-1, whose run it is.
        count: number of things, each with a run or more.
        shape: (H, W) of the map.

    Returns:
        float32 [count, 4], xyxy, half-open, pixels, and int64 [count], pixels.
    """
    height, width = shape
    lengths = runs.lengths
    row, x = np.divmod(runs.starts, width)
    y = row % height
    low = np.full((2, count), max(shape))
    high = np.zeros((2, count), np.int64)
    np.minimum.at(low[0], index, x)
    np.minimum.at(low[1], index, y)
    np.maximum.at(high[0], index, x + lengths)
    np.maximum.at(high[1], index, y + 1)
    areas = np.bincount(index, weights=lengths, minlength=count).astype(np.int64)
    return np.concatenate([low, high]).T.astype(np.float32, order="C"), areas

"""Runs of equal value along the rows of a map: how cells are found without looking at each."""

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

    def positions(self) -> np.ndarray:
        """Return the position of every pixel in the flattened map, run after run."""
        lengths = self.lengths
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        return np.arange(total) + np.repeat(self.starts - (ends - lengths), lengths)


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

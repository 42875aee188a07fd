"""Validation images beside the training images that they are most like."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellseg.report.style import FAINT, INK, TRAIN_COLOUR, VAL_COLOUR, new_figure

if TYPE_CHECKING:
    from cellseg.data import CellDataset
    from cellseg.data.similarity import Nearest

PAIRS_A_ROW = 2
_PANE_INCHES = 2.3


def plot_leaks(nearest: Sequence["Nearest"], dataset: "CellDataset", *, pairs: int = 6) -> Figure:
    """Plot the closest pairs side by side, the validation image on the left of each.

    Args:
        nearest: what `nearest_training_images` returned, closest first.
        dataset: holds the images of both sides.
        pairs: how many to show, from the first on.

    Returns:
        a figure of two pairs a row; over each what they have in common.

    Raises:
        ValueError: if there is no pair to show.
        DataError: if an image cannot be read.
    """
    from cellseg.data import SampleImages

    shown = list(nearest[:pairs])
    if not shown:
        raise ValueError("there is no pair to show; nearest_training_images found none")
    columns = min(PAIRS_A_ROW, len(shown))
    rows = -(-len(shown) // columns)
    images = SampleImages(dataset.subset([i for n in shown for i in (n.val_id, n.train_id)]))
    place = {sample_id: index for index, sample_id in enumerate(images.dataset.sample_ids)}
    figure = new_figure(2 * columns * _PANE_INCHES, rows * (_PANE_INCHES + 0.55) + 0.4)
    figure.suptitle(f"The {len(shown)} closest of {len(nearest)} pairs", color=INK, fontsize=12)
    cells = figure.subfigures(rows, columns, squeeze=False).ravel()
    for cell, pair in zip(cells, shown, strict=False):
        left, right = cell.subplots(1, 2)
        for axis, sample_id, side, colour in (
            (left, pair.val_id, "validation", VAL_COLOUR),
            (right, pair.train_id, "training", TRAIN_COLOUR),
        ):
            pixels = np.asarray(images[place[sample_id]][0]).transpose(1, 2, 0)
            _draw(axis, pixels, f"{side} {_short(sample_id)}", colour)
        cell.suptitle(f"{pair.cue}, distance {pair.distance:.2g}", fontsize=10, color=INK)
    return figure


def _draw(axis: Axes, pixels: np.ndarray, title: str, colour: str) -> None:
    """Show an image whole, in a square pane framed in its side's colour."""
    axis.imshow(pixels)
    axis.set_box_aspect(1)
    longest = max(pixels.shape[:2])
    for centre, limits in zip(pixels.shape[1::-1], (axis.set_xlim, axis.set_ylim), strict=True):
        limits(centre / 2 - longest / 2 - 0.5, centre / 2 + longest / 2 - 0.5)
    axis.invert_yaxis()
    axis.set_facecolor("white")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(color=FAINT, linewidth=0.5)
    axis.set_title(title, fontsize=9, color=colour)


def _short(sample_id: str) -> str:
    """Return the first characters of a long name."""
    return sample_id if len(sample_id) <= 14 else f"{sample_id[:13]}…"

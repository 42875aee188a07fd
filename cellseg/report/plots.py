"""Data in, matplotlib figures out: returned to the caller, never shown, no pyplot state.

Images are uint8 [3, H, W] (or [H, W, 3]); targets and records are the shapes that cross rooms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from cellseg.evaluation.names import SCORE_NAMES
from cellseg.report.outlines import (
    Outlines,
    class_handles,
    count_cells,
    draw_outlines,
    outlines_of_records,
    outlines_of_target,
)
from cellseg.report.style import (
    FAINT,
    INK,
    TRAIN_COLOUR,
    VAL_COLOUR,
    class_colour,
    finish_axis,
    name_rows,
    new_figure,
)

if TYPE_CHECKING:
    from cellseg.data.audit import Audit

_PANE_INCHES = 4.3


def plot_learning_curves(summaries: Sequence[Any]) -> Figure:
    """Plot losses (left) and mAP (right) against the epoch, training and validation together.

    Args:
        summaries: EpochSummary objects or their dicts, one an epoch; values that were not
            measured in an epoch are None and leave no gap in the line.

    Returns:
        a figure of two panes; the epoch with the best validation AP50 is marked.
    """
    rows = [asdict(row) if is_dataclass(row) else dict(row) for row in summaries]
    figure = new_figure(8.8, 3.9)
    figure.get_layout_engine().set(wspace=0.06)
    loss_axis, map_axis = figure.subplots(1, 2)
    _draw_curve(loss_axis, rows, "train_loss", "training", TRAIN_COLOUR, "-o")
    _draw_curve(loss_axis, rows, "val_loss", "validation", VAL_COLOUR, "-o")
    finish_axis(loss_axis, _best_title(rows, "val_loss"), "epoch", "loss (sum of its parts)")

    _draw_curve(map_axis, rows, "train_ap50", "training AP50", TRAIN_COLOUR, "-o")
    _draw_curve(map_axis, rows, "ap50", "validation AP50", VAL_COLOUR, "-o")
    _draw_curve(map_axis, rows, "ap50_100", SCORE_NAMES["ap50_100"], VAL_COLOUR, ":s")
    _draw_curve(map_axis, rows, "ap", "AP", VAL_COLOUR, "--^")
    finish_axis(map_axis, _best_title(rows, "ap50"), "epoch", "mask mAP (0 to 1)")
    for axis, key in ((loss_axis, "val_loss"), (map_axis, "ap50")):
        _mark_best(axis, rows, key)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        _set_epoch_range(axis, rows)
        _add_legend_below(axis)
    return figure


def plot_sample(image: Any, target: Mapping[str, Any], class_names: Sequence[str]) -> Figure:
    """Plot an image beside the same image with its annotated cells outlined by class.

    Args:
        image: uint8 [3, H, W] tensor or [H, W, 3] array.
        target: with `labels` (N,) and `instance_map` (L, H, W).
        class_names: names of the classes 1..C.

    Returns:
        a figure of two panes.
    """
    figure, (left, right) = _image_panes(image, 1, 2)
    outlines = outlines_of_target(target)
    height, width = to_pixels(image).shape[:2]
    _draw_image(left, image, f"The image, {width} x {height} px")
    _draw_image(right, image, f"Its {count_cells(outlines)} by class")
    draw_outlines(right, outlines)
    _add_counts(right, outlines, class_names)
    return figure


def plot_truth_and_prediction(
    image: Any,
    target: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    score_threshold: float = 0.5,
) -> Figure:
    """Plot annotated cells (left) and predicted cells (right) as outlines by class.

    Args:
        image: uint8 [3, H, W] tensor or [H, W, 3] array.
        target: with `labels` (N,) and `instance_map` (L, H, W).
        records: COCO result records of this image.
        class_names: names of the classes 1..C.
        score_threshold: records with score >= this are drawn, in 0-1.

    Returns:
        a figure of two panes with a legend of counts each.
    """
    figure, (left, right) = _image_panes(image, 1, 2)
    truth = outlines_of_target(target)
    found = outlines_of_records([row for row in records if row["score"] >= score_threshold])
    _draw_image(left, image, f"Annotated: {count_cells(truth)}")
    _draw_image(
        right, image, f"Predicted: {count_cells(found)} of score {score_threshold:g} or more"
    )
    for axis, outlines in ((left, truth), (right, found)):
        draw_outlines(axis, outlines)
        _add_counts(axis, outlines, class_names)
    return figure


def plot_prediction(
    image: Any,
    records: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    score_threshold: float = 0.5,
) -> Figure:
    """Plot the predicted cells of one image as outlines by class; see `plot_truth_and_prediction`.

    Returns:
        a figure of one pane with a legend of counts.
    """
    figure, (axis,) = _image_panes(image, 1, 1)
    found = outlines_of_records([row for row in records if row["score"] >= score_threshold])
    _draw_image(axis, image, f"{count_cells(found)} of score {score_threshold:g} or more")
    draw_outlines(axis, found)
    _add_counts(axis, found, class_names)
    return figure


def plot_augmentations(
    samples: Sequence[tuple[Any, Mapping[str, Any]]], class_names: Sequence[str]
) -> Figure:
    """Plot samples as the model sees them, in rows of four, cells outlined by class.

    Args:
        samples: (image, target) pairs, at least one, as the training dataset gives them.
        class_names: names of the classes 1..C.

    Returns:
        a figure with one pane a sample and one legend for all.
    """
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure = new_figure(2.9 * columns, 2.95 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (image, target) in zip(axes, samples, strict=False):
        outlines = outlines_of_target(target)
        _draw_image(axis, image, count_cells(outlines), size=9)
        draw_outlines(axis, outlines, width=1.3)
    for axis in axes[len(samples) :]:
        axis.set_axis_off()
    figure.suptitle("Training samples as the model sees them", color=INK, fontsize=12)
    figure.legend(
        handles=class_handles(class_names),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
    )
    return figure


def plot_audit(audit: "Audit") -> Figure:
    """Plot what a data set holds: cells by class and by image, areas, image sizes.

    Args:
        audit: what `cellseg.data.audit` returned.

    Returns:
        a figure of four panes.
    """
    figure = new_figure(9.6, 6.2)
    (class_axis, area_axis), (count_axis, size_axis) = figure.subplots(2, 2)
    _draw_totals(class_axis, audit.totals)
    _draw_areas(area_axis, audit.areas)
    counts = audit.cells_per_image
    bins = int(np.clip(len(counts) // 4, 8, 30))
    count_axis.hist(counts, bins=bins, color=VAL_COLOUR, edgecolor="white", linewidth=0.6)
    middle = np.median(counts) if counts else 0
    finish_axis(count_axis, f"Half of the images hold {middle:g} cells or more", "cells", "images")
    count_axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    widths, heights = [row.width for row in audit.rows], [row.height for row in audit.rows]
    size_axis.scatter(widths, heights, s=22, color=VAL_COLOUR, alpha=0.45, linewidths=0)
    title = f"{len(audit.rows):,} images, each a point"
    finish_axis(size_axis, title, "width (px)", "height (px)")
    size_axis.set(xlim=(0, 1.1 * max(widths, default=1)), ylim=(0, 1.1 * max(heights, default=1)))
    return figure


def plot_confusion_matrix(matrix: Any, class_names: Sequence[str]) -> Figure:
    """Plot counts shaded by their share of the row (of the annotated class).

    Args:
        matrix: counts [C + 1, C + 1], rows truth, columns predicted, last is background.
        class_names: names of the classes 1..C.

    Returns:
        a figure; the last row holds cells found where none is annotated, the last column
        annotated cells that were not found.
    """
    counts = np.asarray(matrix)
    sums = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, sums, out=np.zeros(counts.shape), where=sums > 0)
    side = 2.2 + 0.75 * len(counts)
    figure = new_figure(side + 0.3, side)
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if (row, column) != (len(counts) - 1, len(counts) - 1):
            _write_cell(axis, row, column, count, shares[row, column])
    ticks = range(len(counts))
    axis.set_xticks(ticks, [*class_names, "not found"], rotation=30, ha="right")
    axis.set_yticks(ticks, [*class_names, "no cell there"])
    axis.set_xlabel("predicted class", color=INK)
    axis.set_ylabel("annotated class", color=INK)
    axis.set_title(_confusion_title(counts), color=INK, fontsize=11, pad=10)
    axis.tick_params(length=0, labelcolor=INK)
    axis.spines[:].set_visible(False)
    for edge in np.arange(0.5, len(counts) - 1):
        width = 3 if edge == len(counts) - 1.5 else 1
        axis.axhline(edge, color="white", linewidth=width)
        axis.axvline(edge, color="white", linewidth=width)
    return figure


def _draw_totals(axis: Axes, totals: Mapping[str, int]) -> None:
    """Draw the number of cells of each class as bars, from the first class down."""
    for row, count in enumerate(totals.values()):
        axis.barh(row, count, 0.62, color=class_colour(row + 1), edgecolor=INK, linewidth=0.6)
        axis.annotate(f" {count:,}", (count, row), va="center", fontsize=9, color=INK)
    finish_axis(axis, f"{sum(totals.values()):,} annotated cells", "cells", "")
    name_rows(axis, list(totals))
    axis.set_xlim(0, 1.15 * max([1, *totals.values()]))


def _draw_areas(axis: Axes, areas: Mapping[str, np.ndarray]) -> None:
    """Draw the areas of each class as boxes of quartiles, whiskers from 5 to 95 %."""
    for row, values in enumerate(areas.values()):
        if len(values):
            low, first, middle, third, high = np.percentile(values, (5, 25, 50, 75, 95))
            axis.plot((low, high), (row, row), "-|", color=INK, linewidth=1.0, zorder=1)
            box = {"color": class_colour(row + 1), "edgecolor": INK, "linewidth": 0.6}
            axis.barh(row, third - first, 0.62, left=first, **box)
            axis.plot((middle, middle), (row - 0.31, row + 0.31), color=INK, linewidth=2.0)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    title = "Areas: quartiles, whiskers from 5 to 95 %"
    finish_axis(axis, title, "area of a cell (px², log scale)", "")
    name_rows(axis, list(areas))


def _write_cell(axis: Axes, row: int, column: int, count: int, share: float) -> None:
    """Write one count of the confusion matrix, readable on its shade."""
    axis.text(
        column,
        row,
        f"{count:,}\n{share:.0%}" if count else "0",
        ha="center",
        va="center",
        fontsize=9,
        linespacing=1.3,
        color="white" if share > 0.55 else INK if count else FAINT,
    )


def _confusion_title(counts: np.ndarray) -> str:
    """Say how many annotated cells were found with their class."""
    truth = counts[:-1].sum()
    if not truth:
        return "No annotated cells"
    share = np.trace(counts[:-1, :-1]) / truth
    return f"{share:.0%} of the annotated cells are found with the right class"


def _measured(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return the epochs in which a value was measured, and the values."""
    pairs = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _best_index(values: list[float], key: str) -> int:
    """Return the first position of the best value: the lowest loss, the highest AP."""
    return int(np.argmin(values) if key.endswith("loss") else np.argmax(values))


def _best_title(rows: list[dict], key: str) -> str:
    """Say in a sentence where a validation value is best."""
    epochs, values = _measured(rows, key)
    if not epochs:
        return "Not validated"
    best = _best_index(values, key)
    what = "Validation loss is lowest" if key.endswith("loss") else "Validation AP50 is best"
    return f"{what} in epoch {epochs[best]}: {values[best]:.3f}"


def _mark_best(axis: Axes, rows: list[dict], key: str) -> None:
    """Ring the best value of a curve."""
    epochs, values = _measured(rows, key)
    if epochs:
        best = _best_index(values, key)
        axis.plot(epochs[best], values[best], "o", ms=10, mfc="none", mec=INK, mew=1.3)


def _draw_curve(
    axis: Axes, rows: list[dict], key: str, label: str, colour: str, style: str
) -> None:
    """Draw one value against the epoch; style is a line and a marker, used while dots are few."""
    epochs, values = _measured(rows, key)
    if not epochs:
        return
    line, marker = style[:-1], style[-1] if len(epochs) <= 25 else ""
    width = 1.8 if line == "-" else 1.3
    axis.plot(epochs, values, line, color=colour, marker=marker, ms=4, lw=width, label=label)


def _add_legend_below(axis: Axes) -> None:
    """Name the curves below the axis, where no curve can run through the words."""
    if axis.get_legend_handles_labels()[0]:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
        axis.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.7, **place)


def _set_epoch_range(axis: Axes, rows: list[dict]) -> None:
    """Show all epochs, whole numbers only, also when there is a single one or none."""
    epochs = [row["epoch"] for row in rows] or [1]
    margin = max(0.5, 0.02 * (max(epochs) - min(epochs)))
    axis.set_xlim(min(epochs) - margin, max(epochs) + margin)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def to_pixels(image: Any) -> np.ndarray:
    """Return an image as [H, W, 3] numpy array, from [3, H, W] or as it is."""
    pixels = np.asarray(image)
    return pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels


def _image_panes(image: Any, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Return a figure with panes in the image's own proportions."""
    height, width = to_pixels(image).shape[:2]
    pane_height = float(np.clip(_PANE_INCHES * height / width, 1.5, 2 * _PANE_INCHES))
    figure = new_figure(_PANE_INCHES * columns, (pane_height + 0.8) * rows)
    return figure, np.atleast_1d(figure.subplots(rows, columns))


def _draw_image(axis: Axes, image: Any, title: str, size: int = 11) -> None:
    """Show an image without ticks, under a title."""
    axis.imshow(to_pixels(image))
    axis.set_title(title, fontsize=size, color=INK)
    axis.set_axis_off()


def _add_counts(axis: Axes, outlines: Outlines, class_names: Sequence[str]) -> None:
    """Write the number of cells of each class below a pane."""
    axis.legend(
        handles=class_handles(class_names, outlines),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=2 if len(class_names) > 3 else 3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )

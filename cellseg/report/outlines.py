"""Cells as outlines: traced in box-sized crops, drawn as vectors, sharp at any zoom."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from scipy import ndimage
from skimage.measure import find_contours

from cellseg import coco
from cellseg.report.style import INK, class_colour

# label -> one list of closed contours a cell, each [P, 2] as x, y in pixels
Outlines = dict[int, list[list[np.ndarray]]]
LineStyle = str | tuple[float, tuple[float, ...]]  # as matplotlib's: "-" or (offset, dashes)


def outlines_of_target(target: Mapping[str, Any]) -> Outlines:
    """Return the outlines of annotated cells by class; costs pixels, not cells times pixels.

    Args:
        target: with `labels` (N,) and `instance_map` (L, H, W), where k + 1 marks instance k.
    """
    labels = np.asarray(target["labels"])
    outlines: Outlines = {}
    for layer in np.asarray(target["instance_map"]):
        for index, box in enumerate(ndimage.find_objects(layer)):
            if box is not None:
                contours = _trace(layer[box] == index + 1, box[1].start, box[0].start)
                outlines.setdefault(int(labels[index]), []).append(contours)
    return outlines


def outlines_of_records(records: Iterable[Mapping[str, Any]]) -> Outlines:
    """Return the outlines of result records by class (`category_id`)."""
    outlines: Outlines = {}
    for record in records:
        mask = coco.rle_to_mask(record["segmentation"])
        left, top, width, height = (round(side) for side in record["bbox"])
        contours = _trace(mask[top : top + height, left : left + width], left, top)
        outlines.setdefault(int(record["category_id"]), []).append(contours)
    return outlines


def count_cells(outlines: Outlines) -> str:
    """Return "1 cell", "23 cells"."""
    number = sum(map(len, outlines.values()))
    return "1 cell" if number == 1 else f"{number:,} cells"


def draw_outlines(
    axis: Axes, outlines: Outlines, *, width: float = 1.4, line: LineStyle = "-"
) -> None:
    """Draw outlines in their class's colour over a thin dark edge that keeps them visible."""
    for label, cells in sorted(outlines.items()):
        lines = [contour for cell in cells for contour in cell]
        axis.add_collection(
            LineCollection(lines, colors="#1A1A1A", linewidths=width + 0.9, alpha=0.7)
        )
        style = {"colors": class_colour(label), "linewidths": width, "linestyles": [line]}
        axis.add_collection(LineCollection(lines, **style))


def class_handles(class_names: Sequence[str], outlines: Outlines | None = None) -> list[Line2D]:
    """Return legend entries of all classes, with the number of cells where outlines are given."""
    handles = []
    for label, name in enumerate(class_names, start=1):
        count = "" if outlines is None else f"  {len(outlines.get(label, [])):,}"
        marker = {"marker": "o", "ms": 8, "mew": 1.0, "mec": INK, "ls": ""}
        handles.append(Line2D([], [], color=class_colour(label), label=name + count, **marker))
    return handles


def _trace(crop: np.ndarray, left: int, top: int) -> list[np.ndarray]:
    """Return the contours [P, 2] (x, y) of a box-sized mask that starts at (left, top)."""
    contours = find_contours(np.pad(crop, 1).astype(np.float32), 0.5)
    return [contour[:, ::-1] + (left - 1, top - 1) for contour in contours]

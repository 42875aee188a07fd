"""Where the score is lost, as figures: curves, errors mended, calibration, a gallery of errors.

What they show is computed in `cellseg.evaluation`; here it is only drawn and returned.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cellseg.evaluation import Calibration, ClassCurve, ErrorReport, Pick
from cellseg.report.outlines import (
    LineStyle,
    class_handles,
    draw_outlines,
    outlines_of_records,
)
from cellseg.report.plots import to_pixels
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

_CURVE_LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_TRUE_LINE, _FOUND_LINE, _RIVAL_LINE = "-", (0.0, (3.0, 2.0)), (0.0, (1.0, 1.6))
_TILE_INCHES = 1.65
_LEAST_CROP = 48  # px
_MARGIN = 0.5  # of the longer side of what is shown, on each side


def plot_precision_recall(curves: Mapping[str, ClassCurve]) -> Figure:
    """Plot the precision-recall curve of each class, as AP reads it, and its best F1.

    Args:
        curves: class name -> curve, of `class_curves`.

    Returns:
        a figure of one pane: at each recall the best precision at that recall or a higher one;
        a dot marks the score cut with the best F1. Classes without cells are left out.
    """
    figure = new_figure(6.4, 4.2)
    axis = figure.subplots()
    shown = {name: curve for name, curve in curves.items() if curve.truths}
    for place, (name, curve) in enumerate(shown.items()):
        _draw_precision_recall(axis, name, curve, _CURVE_LINES[place % len(_CURVE_LINES)])
    finish_axis(axis, _recall_title(shown), "recall", "precision")
    axis.set(xlim=(-0.01, 1.02), ylim=(-0.01, 1.04))
    if shown:
        _add_legend_below(axis, "class: AP50; best F1 (dot) at its score cut")
    return figure


def plot_errors_mended(report: ErrorReport) -> Figure:
    """Plot what AP50 gains if each kind of error is mended alone, and with perfect parts.

    Args:
        report: of `explain_errors`.

    Returns:
        a figure of one pane: a bar a mend, what TIDE mends above, perfect parts below.
    """
    mends = report.kinds | report.perfect
    figure = new_figure(7.2, 4.3)
    axis = figure.subplots()
    gains = [mend.gain or 0.0 for mend in mends.values()]
    reach = max([0.01, *map(abs, gains)])
    for row, (mend, gain) in enumerate(zip(mends.values(), gains, strict=True)):
        colour = VAL_COLOUR if row < len(report.kinds) else TRAIN_COLOUR
        axis.barh(row, gain, 0.62, color=colour)
        text = "-" if mend.gain is None else f"{gain:+.3f}, to {mend.ap50_after:.3f}"
        axis.text(max(gain, 0) + 0.015 * reach, row, text, va="center", fontsize=9, color=INK)
    finish_axis(axis, _gain_title(report), "gain of AP50", "")
    name_rows(axis, [f"{name} ({mend.count:,})" for name, mend in mends.items()])
    axis.axhline(len(report.kinds) - 0.5, color=FAINT, linewidth=0.8, linestyle=":")
    axis.axvline(0, color=FAINT, linewidth=0.8)
    axis.set_xlim(1.08 * min([0.0, *gains]), 1.34 * reach)
    return figure


def plot_calibration(calibration: Calibration) -> Figure:
    """Plot how often records of a score are right, and below how many there are.

    Args:
        calibration: of `calibrate`.

    Returns:
        a figure of two panes over one axis of scores; on the diagonal a score is the share of
        records that found a cell.
    """
    figure = new_figure(5.4, 5.2)
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    full = calibration.records > 0
    scores, shares = calibration.mean_score[full], calibration.share_found[full]
    axis.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle="--", label="calibrated")
    axis.vlines(scores, scores, shares, color=VAL_COLOUR, linewidth=1.0, alpha=0.5)
    axis.plot(scores, shares, "-o", color=VAL_COLOUR, ms=5, lw=1.8, label="these records")
    finish_axis(axis, _calibration_title(calibration), "", "share that found a cell")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")
    edges = calibration.edges
    below.bar((edges[1:] + edges[:-1]) / 2, calibration.records, 0.92 * np.diff(edges), color=FAINT)
    finish_axis(below, "", "score", "records")
    below.yaxis.get_major_locator().set_params(nbins=3, integer=True)
    return figure


def plot_gallery(
    images: Mapping[int, Any], picks: Sequence[Pick], class_names: Sequence[str]
) -> Figure:
    """Plot errors as crops, a row a kind: what is annotated solid, what is predicted dashed.

    Args:
        images: image_id -> uint8 [3, H, W] tensor or [H, W, 3] array, of the picks' images.
        picks: of `worst_cells`, those of one kind behind one another.
        class_names: names of the classes 1..C.

    Returns:
        a figure; where another record found the cell, it is dotted.
    """
    rows = [(kind, list(group)) for kind, group in groupby(picks, key=lambda pick: pick.kind)]
    columns = max([len(group) for _, group in rows], default=1)
    figure = new_figure(
        _TILE_INCHES * max(columns, 3) + 0.4, (_TILE_INCHES + 0.6) * max(len(rows), 1) + 0.7
    )
    axes = figure.subplots(max(len(rows), 1), max(columns, 3), squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for line, (kind, group) in zip(axes, rows, strict=False):
        for axis, pick in zip(line, group, strict=False):
            _draw_pick(axis, to_pixels(images[pick.image_id]), pick, class_names)
        line[0].text(
            -0.09,
            0.5,
            kind,
            rotation=90,
            ha="right",
            va="center",
            transform=line[0].transAxes,
            fontsize=10,
            color=INK,
        )
    title = "The surest false records and the largest missed cells" if rows else "No errors to show"
    figure.suptitle(title, color=INK, fontsize=12)
    figure.legend(
        handles=[*class_handles(class_names), *_line_handles()],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    return figure


def _draw_precision_recall(axis: Axes, name: str, curve: ClassCurve, line: LineStyle) -> None:
    """Draw one class's curve over a dark edge, as a staircase, with a dot at its best F1."""
    best_from = np.maximum.accumulate(curve.precision[::-1])[::-1]
    recall = np.concatenate([[0.0], curve.recall, curve.recall[-1:]])
    precision = np.concatenate([best_from[:1], best_from, [0.0]])  # ends where recall does
    colour, label = class_colour(curve.category_id), f"{name}: {curve.ap50:.3f}"
    for width, ink in ((3.3, INK), (1.9, colour)):
        style = {"lw": width, "color": ink, "solid_capstyle": "butt"}
        axis.step(recall, precision, where="pre", linestyle=line if ink == colour else "-", **style)
    if curve.best:
        label += f"; {curve.best.f1:.2f} at {curve.best.threshold:.2f}"
        place = (curve.best.recall, curve.best.precision)
        axis.plot(*place, "o", ms=8, color=colour, mec=INK, mew=1.3, zorder=4)
    axis.plot([], [], "o", color=colour, mec=INK, lw=2.5, ls=line, label=label)


def _add_legend_below(axis: Axes, title: str) -> None:
    """Name the curves below the axis, where no curve can run through the words."""
    legend = axis.legend(
        title=title,
        title_fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=2.6,
    )
    legend.get_title().set_color(INK)


def _draw_pick(axis: Axes, pixels: np.ndarray, pick: Pick, class_names: Sequence[str]) -> None:
    """Show an error in a square window around what is annotated and predicted there."""
    entries = [entry for entry in (pick.cell, pick.record, pick.rival) if entry is not None]
    left, top, side = _window(entries, pixels.shape[1::-1])
    rows = slice(max(top, 0), min(top + side, pixels.shape[0]))
    columns = slice(max(left, 0), min(left + side, pixels.shape[1]))
    extent = (columns.start - 0.5, columns.stop - 0.5, rows.stop - 0.5, rows.start - 0.5)
    axis.imshow(pixels[rows, columns], extent=extent, interpolation="nearest")
    for entry, line, width in (
        (pick.cell, _TRUE_LINE, 1.6),
        (pick.rival, _RIVAL_LINE, 1.0),
        (pick.record, _FOUND_LINE, 1.6),
    ):
        if entry is not None:
            draw_outlines(axis, outlines_of_records([entry]), width=width, line=line)
    axis.set(xlim=(left - 0.5, left + side - 0.5), ylim=(top + side - 0.5, top - 0.5))
    axis.set_title(_pick_title(pick, class_names), fontsize=8, color=INK, pad=3, linespacing=1.15)


def _window(entries: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> tuple[int, int, int]:
    """Return left, top and side of a square around cells and records, with a margin.

    It lies inside an image of size (width, height), or around it where the image is smaller.
    """
    bbox = np.array([entry["bbox"] for entry in entries], dtype=float)
    low, high = bbox[:, :2].min(axis=0), (bbox[:, :2] + bbox[:, 2:]).max(axis=0)
    side = max(_LEAST_CROP, int(np.ceil((1 + 2 * _MARGIN) * (high - low).max())))
    start = np.round((low + high - side) / 2).astype(int)
    room = np.array(size) - side
    left, top = np.where(room < 0, room // 2, np.clip(start, 0, np.maximum(room, 0))).tolist()
    return left, top, side


def _pick_title(pick: Pick, class_names: Sequence[str]) -> str:
    """Say what an error is in three short lines: classes; score, IoU or area; and the image."""
    names = [class_names[entry["category_id"] - 1] for entry in (pick.cell, pick.record) if entry]
    facts = []
    if pick.record is not None:
        facts.append(f"score {pick.record['score']:.2f}")
    if pick.record is not None and pick.cell is not None:
        facts.append(f"IoU {pick.iou:.2f}")
    if pick.record is None:
        facts.append(f"{pick.cell['area']:,.0f} px²")
    return f"{' as '.join(dict.fromkeys(names))}\n{', '.join(facts)}\nimage {pick.image_id}"


def _line_handles() -> list[Line2D]:
    """Return legend entries for what is annotated, predicted, and found by another record."""
    lines = {
        "annotated": _TRUE_LINE,
        "predicted": _FOUND_LINE,
        "the record that found the cell": _RIVAL_LINE,
    }
    return [Line2D([], [], color=INK, lw=1.6, ls=line, label=name) for name, line in lines.items()]


def _recall_title(curves: Mapping[str, ClassCurve]) -> str:
    """Say what AP50 is in the mean."""
    if not curves:
        return "No annotated cells"
    mean = np.mean([curve.ap50 for curve in curves.values()])
    classes = "1 class" if len(curves) == 1 else f"{len(curves)} classes"
    return f"AP50 is {mean:.3f}, the mean over {classes}"


def _gain_title(report: ErrorReport) -> str:
    """Say which mend of one kind gains most."""
    if report.ap50 is None:
        return "No annotated cells"
    kind, most = max(report.kinds.items(), key=lambda item: item[1].gain)
    if most.gain <= 0:
        return f"AP50 is {report.ap50:.3f}; no kind of error costs any of it by itself"
    return f'AP50 is {report.ap50:.3f}; of the kinds of error, "{kind}" costs most'


def _calibration_title(calibration: Calibration) -> str:
    """Say by how much scores are off, and to which side."""
    if calibration.error is None:
        return "No records"
    gaps = np.nan_to_num(calibration.mean_score - calibration.share_found)
    side = "too high" if (gaps * calibration.records).sum() > 0 else "too low"
    return f"Scores are off by {calibration.error:.3f} in the mean, on the whole {side}"

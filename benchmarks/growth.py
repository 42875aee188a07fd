"""How time and memory grow with pixels at constant density, and with cells at constant pixels."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from benchmarks.made import cells_on_grid, jittered_boxes
from benchmarks.memory import added_peak_mb, run_alone
from benchmarks.section import Section, seconds_text
from benchmarks.stage import median_seconds
from benchmarks.stages_records import make_scoring
from benchmarks.stopwatch import Stopwatch
from cellseg.evaluation import score_records
from cellseg.inference import predict_image
from cellseg.models import get_model_mobilenetv2
from cellseg.report.style import FAINT, INK, finish_axis, new_figure, save_figure

SIDES = (256, 512, 1024, 2048)
DENSITY = 450e-6  # cells a pixel
FIXED_SIDE = 1024
CELLS = (10, 1000)
MOST_POWER = 1.1
MOST_FACTOR = 1.3
NETWORK = {"weights": None, "norm": "frozen", "fpn_channels": 32}
PROPOSALS = 2000
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "growth.png"
LINES = {
    "training step": ("#0072B2", "o"),
    "prediction": ("#E08A00", "s"),
    "scoring": ("#00916B", "^"),
}

Cost = tuple[float, float]  # seconds, MB


def training_cost(side: int, cells: int, fixed_rois: bool, runs: int) -> Cost:
    """Return time and added memory of a forward and backward pass over one image.

    Args:
        side: of the image, px.
        cells: in the image.
        fixed_rois: hand the heads proposals made of the cells, so that the number of sampled and
            of positive RoIs does not depend on the number of cells.
        runs: how often the step is timed.
    """
    model = get_model_mobilenetv2(5, **NETWORK, train_proposals=PROPOSALS)
    _pass_over(model, *_training_image(64, 4))  # what happens once is not counted
    image, target = _training_image(side, cells)
    if fixed_rois:
        model.rpn.filter_proposals = partial(_made_proposals, target["boxes"], side)
    step = partial(_pass_over, model, image, target)
    peak = added_peak_mb(step)
    return median_seconds(step, runs), peak


def prediction_cost(side: int, detections: int, runs: int) -> Cost:
    """Return time, the mask head's taken out, and added memory of predicting one image.

    Args:
        side: of the image, px.
        detections: that the heads keep, the best ones at a score threshold of 0.
        runs: how often it is timed.
    """
    model = get_model_mobilenetv2(
        5,
        **NETWORK,
        detections_per_image=detections,
        score_threshold=0.0,
        nms_threshold=1.0,
    ).eval()
    predict = partial(predict_image, model, image_id=1, score_threshold=0.0)
    predict(_noise(64))
    image, watch, seconds = _noise(side), Stopwatch(), []
    peak = added_peak_mb(partial(predict, image))
    with watch.watch([("mask head", model.roi_heads, "_mask_logits")]):
        for _ in range(runs):
            watch.seconds.clear()
            whole = median_seconds(partial(predict, image), 1)
            seconds.append(whole - watch.seconds["mask head"])
    return float(np.median(seconds)), peak


def scoring_cost(side: int, runs: int) -> Cost:
    """Return time and added memory of scoring one image with two records for each truth."""
    score_records(*make_scoring(images=1, cells=4, side=64))
    truth, records = make_scoring(images=1, cells=round(DENSITY * side**2), side=side)
    score = partial(score_records, truth, records)
    peak = added_peak_mb(score)
    return median_seconds(score, runs), peak


def growth(*, quick: bool = False) -> list[Section]:
    """Return the tables of growth with pixels and with cells, and draw them.

    Args:
        quick: leave out the largest image and time everything once.
    """
    sides, runs = (SIDES[:-1], 1) if quick else (SIDES, 3)
    cells = [round(DENSITY * side**2) for side in sides]
    by_pixels = {
        "training step": [
            run_alone(training_cost, side, n, False, runs)
            for side, n in zip(sides, cells, strict=True)
        ],
        "prediction": [
            run_alone(prediction_cost, side, n, runs) for side, n in zip(sides, cells, strict=True)
        ],
        "scoring": [run_alone(scoring_cost, side, 3 * runs) for side in sides],
    }
    by_cells = {
        "training step": [run_alone(training_cost, FIXED_SIDE, n, True, runs) for n in CELLS],
        "prediction": [run_alone(prediction_cost, FIXED_SIDE, n, runs) for n in CELLS],
    }
    _draw(sides, by_pixels, by_cells)
    return [_pixel_section(sides, by_pixels), _cell_section(by_cells)]


def _pass_over(model: nn.Module, image: Tensor, target: dict[str, Any]) -> None:
    """Compute the gradients of one image."""
    model.zero_grad(set_to_none=True)
    sum(model([image], [target]).values()).backward()


def _noise(side: int) -> Tensor:
    """Return a uint8 image [3, side, side]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8)


def _training_image(side: int, cells: int) -> tuple[Tensor, dict[str, Any]]:
    """Return an image and the target of cells that do not touch."""
    instance_map, boxes, labels = cells_on_grid(cells, side)
    target = {"boxes": boxes, "labels": labels, "instance_map": instance_map, "image_id": 1}
    return _noise(side), target


def _made_proposals(boxes: Tensor, side: int, *_: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return proposals of one image, half of them near cells, and their scores."""
    generator = torch.Generator().manual_seed(0)
    near = jittered_boxes(boxes, PROPOSALS // 2)
    sides = 16 + 24 * torch.rand(PROPOSALS - len(near), 2, generator=generator)
    corners = (side - sides) * torch.rand(len(sides), 2, generator=generator)
    proposals = torch.cat([near, torch.cat([corners, corners + sides], dim=1)])
    return [proposals], [torch.ones(len(proposals))]


def _pixel_section(sides: Sequence[int], by_pixels: dict[str, list[Cost]]) -> Section:
    """Return the table of growth with pixels."""
    rows, misses = [], []
    for what, costs in by_pixels.items():
        for kind, values, texts in _kinds(costs):
            power = _power([side**2 for side in sides], values)
            rows.append([f"{what}, {kind}", *texts, f"{power:.2f}"])
            if power > MOST_POWER:
                misses.append(f"{kind} of {what}: power {power:.2f}, at most {MOST_POWER} wanted")
    return Section(
        title="Growth with pixels at constant density",
        text=f"{1e6 * DENSITY:.0f} cells (detections, truths) a megapixel; one square image of "
        "so many px a side, MobileNetV2 with 32 channels, CPU; prediction without the mask head's "
        "own time. Power: slope in log-log against pixels (for scoring, records grow alike). "
        f"Wanted: at most {MOST_POWER}.",
        header=["", *(f"{side} px" for side in sides), "power"],
        rows=rows,
        misses=misses,
    )


def _cell_section(by_cells: dict[str, list[Cost]]) -> Section:
    """Return the table of growth with cells."""
    rows, misses = [], []
    for what, costs in by_cells.items():
        for kind, values, texts in _kinds(costs):
            factor = values[1] / values[0]
            rows.append([f"{what}, {kind}", *texts, f"{factor:.2f}"])
            if factor > MOST_FACTOR:
                misses.append(
                    f"{kind} of {what}: factor {factor:.2f}, at most {MOST_FACTOR} wanted"
                )
    return Section(
        title="Growth with cells at constant pixels",
        text=f"{FIXED_SIDE} px a side; the same number of sampled and of positive RoIs; "
        "prediction without the mask head's own time. "
        f"Wanted: at most {MOST_FACTOR} times as much.",
        header=["", *(f"{cells:,} cells" for cells in CELLS), "factor"],
        rows=rows,
        misses=misses,
    )


def _kinds(costs: Sequence[Cost]) -> list[tuple[str, list[float], list[str]]]:
    """Return (kind, values, values as text) of time and of memory."""
    seconds, megabytes = (list(column) for column in zip(*costs, strict=True))
    return [
        ("time", seconds, [seconds_text(value) for value in seconds]),
        ("memory", megabytes, [f"{value:.0f} MB" for value in megabytes]),
    ]


def _power(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of the line through log(cost) over log(size)."""
    costs = np.maximum(costs, 1e-3)  # less than a page of memory is nothing, whose log is none
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def _draw(
    sides: Sequence[int], by_pixels: dict[str, list[Cost]], by_cells: dict[str, list[Cost]]
) -> None:
    """Write the figure of both tables."""
    figure = new_figure(11.5, 3.9)
    time_axis, memory_axis, cell_axis = figure.subplots(1, 3, width_ratios=[1, 1, 0.85])
    megapixels = np.array(sides) ** 2 / 1e6
    panes = ((time_axis, 0, "Time", "seconds"), (memory_axis, 1, "Memory", "MB added"))
    for axis, place, name, unit in panes:
        for what, costs in by_pixels.items():
            values = [cost[place] for cost in costs]
            power = _power(megapixels, values)
            colour, marker = LINES[what]
            label = f"{what}: power {power:.2f}"
            axis.loglog(megapixels, values, marker=marker, color=colour, label=label)
        _draw_guide(axis, megapixels)
        finish_axis(axis, f"{name} at constant density", "megapixels", unit)
        axis.legend(fontsize=8, frameon=False)
    _draw_factors(cell_axis, by_cells)
    save_figure(figure, FIGURE, dpi=110)


def _draw_guide(axis: Axes, megapixels: np.ndarray) -> None:
    """Draw the slope of cost that is proportional to pixels."""
    low, high = axis.get_ylim()
    start = np.sqrt(low * high) * megapixels[0] / np.sqrt(megapixels[0] * megapixels[-1])
    axis.loglog(
        megapixels, start * megapixels / megapixels[0], ":", color=FAINT, label="as the pixels"
    )
    axis.set_ylim(low, high)


def _draw_factors(axis: Axes, by_cells: dict[str, list[Cost]]) -> None:
    """Draw what 1,000 cells cost in multiples of what 10 cost."""
    names, factors, colours = [], [], []
    for what, costs in by_cells.items():
        for kind, values, _ in _kinds(costs):
            names.append(f"{what},\n{kind}")
            factors.append(values[1] / values[0])
            colours.append(LINES[what][0])
    bars = axis.barh(names, factors, color=colours, height=0.55)
    axis.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize=9)
    axis.axvline(1, color=FAINT, linewidth=0.8)
    axis.axvline(MOST_FACTOR, color=INK, linewidth=0.8, linestyle="--")
    axis.invert_yaxis()
    axis.set_xlim(0, max(1.6, 1.2 * max(factors)))
    finish_axis(axis, f"From {CELLS[0]} to {CELLS[1]:,} cells", "times as much (dashed: limit)", "")
    axis.grid(visible=False)

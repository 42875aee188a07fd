"""What each backbone costs: `python -m benchmarks.backbones [--device cuda] [NAME ...]`.

Prints a table of parameters, and of seconds and memory a megapixel in prediction and in a training
step (gradients counted, weights and the optimiser's memory not). Every builder runs in a process of
its own, with its default width, on one made image of 450 cells and 490 sampled RoIs a megapixel;
times depend on the machine, their order hardly does.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.made import cells_on_grid, leave_boxes
from benchmarks.memory import run_alone, with_peak
from benchmarks.section import markdown_table
from cellseg.models import BUILDERS, count_trainable_parameters

SIDE = 512  # px of the image, at a scale of 1
CELLS = 118  # 450 a megapixel, as in dense tissue
NETWORK = {
    "weights": None, "norm": "frozen", "rois_per_image": 128,
    "detections_per_image": CELLS, "score_threshold": 0.0, "nms_threshold": 1.0,
}  # fmt: skip
HEADER = (
    "builder", "parameters, M", "backbone, M", "prediction, s/Mpx", "MB/Mpx", "training, s/Mpx",
    "MB/Mpx",
)  # fmt: skip


def measure(name: str, device: str) -> list[str]:
    """Return a builder's row of the table."""
    model = BUILDERS[name](5, **NETWORK).to(device)
    image, target = _tissue(device)
    leave_boxes(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    costs = [
        _cost(partial(_predict, model, image), device),
        _cost(partial(_train, model, optimiser, image, target), device),
    ]
    parts = (model, model.backbone.body)
    sizes = [f"{count_trainable_parameters(part) / 1e6:.1f}" for part in parts]
    pixels = SIDE**2 / 1e6
    texts = [[f"{seconds / pixels:.1f}", f"{mb / pixels:.0f}"] for seconds, mb in costs]
    return [name, *sizes, *texts[0], *texts[1]]


def _tissue(device: str) -> tuple[Tensor, dict[str, Any]]:
    """Return a made image of cells and its target, on the device."""
    instance_map, boxes, labels = cells_on_grid(CELLS, SIDE)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(150, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    image[:, instance_map[0] > 0] -= 100
    target = {"boxes": boxes, "labels": labels, "instance_map": instance_map}
    return image.to(device), {key: value.to(device) for key, value in target.items()}


def _predict(model: nn.Module, image: Tensor) -> None:
    with torch.inference_mode():
        model.eval()([image])


def _train(
    model: nn.Module, optimiser: torch.optim.Optimizer, image: Tensor, target: dict[str, Any]
) -> None:
    optimiser.zero_grad()
    sum(model.train()([image], [target]).values()).backward()
    optimiser.step()


def _cost(work: Callable[[], None], device: str) -> tuple[float, float]:
    """Return seconds of a second call, and by how many MB it raises the peak of memory."""
    work()  # what happens once, the optimiser's memory for one, is not counted
    if device == "cpu":
        return with_peak(partial(_seconds, work))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = _seconds(work)
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure what the command line names, all builders by default, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*BUILDERS, []], help="builders")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    rows = [run_alone(measure, name, given.device) for name in given.names or BUILDERS]
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()

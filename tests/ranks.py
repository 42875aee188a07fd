"""One of several processes that train a tiny model together, as tests start them.

As a script: `ranks.py SCENARIO FOLDER`, with the environment that torch's launcher would make. What
a process found lies in `FOLDER/rank_<number>.json` afterwards.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tiny_models import CLASSES, tiny_model, write_squares
from torch import nn
from torch.utils.data import DataLoader

from cellseg.data import CellDataset, TrainTransform, make_loaders
from cellseg.training import EpochSummary, TrainingInterrupted, fit, join_ranks, validate
from cellseg.training.checkpoint import digest_of
from cellseg.training.distributed import ALONE, Ranks
from cellseg.training.schedule import TrainingLength
from cellseg.training.session import Session

SAMPLES = {
    "a": (48, 64, [(1, 4, 5, 18, 17), (2, 30, 20, 46, 38)]),
    "b": (64, 48, [(2, 5, 40, 21, 58), (1, 25, 8, 26, 9)]),
    "c": (56, 62, []),
    "d": (40, 60, [(1, 2, 2, 14, 16), (1, 14, 2, 27, 16), (2, 40, 10, 58, 30)]),
    "e": (48, 60, [(1, 30, 6, 44, 20)]),
    "f": (60, 44, [(1, 4, 30, 18, 44), (2, 20, 4, 38, 20)]),
    "g": (44, 52, [(2, 6, 6, 30, 28)]),
    "h": (50, 46, []),
}
STEPS_PER_EPOCH = 3  # five images, two a batch: the third batch has one image, for one process
SETTINGS = {"epochs": 2, "learning_rate": 1e-3, "probe_images": 1, "device": "cpu"}


def make_data(folder: Path) -> None:
    """Write the samples."""
    write_squares(folder / "train", SAMPLES)


def loaders(
    folder: Path, batch_size: int = 2, workers: int = 0, cache_dir: Path | None = None
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of five images to train on, one of them empty, and three others."""
    dataset = CellDataset(
        folder / "train", class_names=CLASSES, channel_order="true", cache_dir=cache_dir
    )
    train = dataset.subset(list("abcde"), transform=TrainTransform(crop_size=40))
    return make_loaders(train, dataset.subset(list("fgh")), batch_size=batch_size, workers=workers)


def quick_model(**options: Any) -> nn.Module:
    """Return a model with trained norms of which a step takes a few hundredths of a second."""
    return tiny_model(rpn_samples=64, rois_per_image=32, train_proposals=16, **options)


def finding_model() -> nn.Module:
    """Return a model that finds cells everywhere, with masks that are not empty."""
    model = quick_model(score_threshold=0.0)
    nn.init.constant_(model.roi_heads.mask_predictor.mask_fcn_logits.bias, 1.0)
    return model


def train(
    folder: Path,
    run_name: str,
    *,
    model: nn.Module | None = None,
    ranks: Ranks = ALONE,
    workers: int = 0,
    **settings: Any,
) -> Iterator[EpochSummary]:
    """Return the epochs of a run in the folder."""
    settings = SETTINGS | {"progress": False} | settings
    pair = loaders(folder, workers=workers)
    return fit(model or quick_model(), *pair, run_dir=folder / run_name, ranks=ranks, **settings)


def at_step(model: nn.Module, step: int, action: Callable[[], None]) -> None:
    """Do something within the forward pass of a step, counted from 1."""
    seen = []

    def act(module: nn.Module, inputs: Any) -> None:
        seen.append(module.training)
        if seen.count(True) == step:
            action()

    model.register_forward_pre_hook(act)


class Line(nn.Module):
    """A model whose loss is the mean over its images of (weight x pixel - 1) squared."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))

    def forward(self, images: list[torch.Tensor], targets: list[dict]) -> dict[str, torch.Tensor]:
        return {"loss": torch.stack([(self.weight * x - 1) ** 2 for x in images]).mean()}


def line_session(ranks: Ranks, accumulate: int = 1) -> Session:
    """Return a session of the line, which steps by the sign of the gradient and its size."""
    return Session(
        Line(), batches_per_epoch=4, length=TrainingLength(1), learning_rate=0.1, weight_decay=0.0,
        warmup=0.0, clip_norm=1e9, ema_decay=0.5, accumulate=accumulate,
        device=torch.device("cpu"), dtype=torch.float32, seed=0, ranks=ranks,
    )  # fmt: skip


PIXELS = [1.0, 2.0, 4.0, -3.0, 5.0]  # of five images of a pixel: two batches, of three and two


def line_steps(ranks: Ranks) -> list[float]:
    """Return the weight and the losses after two steps, the second of uneven batches."""
    session, found = line_session(ranks), []
    for batch in (PIXELS[:3], PIXELS[3:], PIXELS[4:]):
        mine = batch[ranks.rank :: ranks.count]
        share = len(mine), len(batch)
        images = [torch.tensor([pixel]) for pixel in mine or batch[:1]]
        session.train_step([(images, [{"image_id": 1}] * len(images))], [share])
        found += [session.model.weight.item(), session.loss_sums["loss"].item()]
    return [*found, session.epoch_images]


def together(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Do all that ends well, and return what this process found."""
    found: dict[str, Any] = {"line": line_steps(ranks)}

    model = quick_model()
    found["whole"] = [asdict(row) for row in train(folder, "whole", model=model, ranks=ranks)]
    found["weights"] = digest_of(model.state_dict())

    next(train(folder, "from_two", ranks=ranks))  # goes on alone
    found["from_one"] = [row.epoch for row in train(folder, "from_one", ranks=ranks)]

    model = quick_model()
    if ranks.rank == 1:
        at_step(model, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        list(train(folder, "stopped", model=model, ranks=ranks, workers=1))
    except TrainingInterrupted as stopped:
        found["stopped"] = str(stopped)

    val_loader = loaders(folder)[1]
    val_loader.sampler.deal(ranks.rank, ranks.count)
    model = finding_model()
    result = validate(model, val_loader, seed=3, progress=False, ranks=ranks)
    found["validation"] = {"losses": result.losses, "records": result.records}
    return found


def fails_on_one(folder: Path, ranks: Ranks, action: Callable[[], None]) -> None:
    """Let the second process fail in the second epoch."""
    model = quick_model()
    if ranks.rank == 1:
        at_step(model, 5, action)
    list(train(folder, "lost", model=model, ranks=ranks))


def out_of_memory() -> None:
    """Fail as an allocation does."""
    raise torch.OutOfMemoryError("simulated")


def killed() -> None:
    """End as the kernel ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def start_ranks(scenario: str, folder: Path, count: int = 2) -> list[subprocess.Popen]:
    """Start the processes of a scenario without a launcher, whose own start takes seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, scenario, str(folder)],
            env=os.environ
            | common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def main(scenario: str, folder: Path) -> None:
    """Do this process's part."""
    with join_ranks("cpu") as ranks:
        if scenario == "together":
            found = together(folder, ranks)
            text = json.dumps(found)
            (folder / f"rank_{ranks.rank}.json").write_text(text, encoding="utf-8")
        else:
            fails_on_one(folder, ranks, {"memory": out_of_memory, "killed": killed}[scenario])


if __name__ == "__main__":
    from cellseg.errors import CellsegError

    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except CellsegError as error:
        print(f"error: {error}", flush=True)
        os._exit(1)

"""A tiny run that can be broken off anywhere, and what must be equal afterwards.

As a script it is the child that others kill: `survival.py TRAIN_DIR RUN_DIR '{"epochs": 2}'`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_models import CLASSES, tiny_model, write_squares

from cellseg.data import CellDataset, TrainTransform, make_loaders
from cellseg.errors import CellsegError
from cellseg.inference import predict_image
from cellseg.training import EpochSummary, TrainingInterrupted, fit, load_model, read_checkpoint

SAMPLES = {
    "a": (48, 64, [(1, 4, 5, 18, 17), (2, 30, 20, 46, 38)]),
    "b": (64, 48, [(2, 5, 40, 21, 58), (1, 25, 8, 26, 9)]),
    "c": (56, 62, []),
    "d": (40, 60, [(1, 2, 2, 14, 16), (1, 14, 2, 27, 16), (2, 40, 10, 58, 30)]),
    "e": (52, 50, [(2, 8, 12, 30, 34)]),
    "v": (48, 60, [(1, 30, 6, 44, 20), (2, 8, 20, 26, 40)]),
}
BATCHES_PER_EPOCH = 5  # of one image
STEPS_PER_EPOCH = 3  # two batches to a step, and one left over
CLOCKED = ("seconds", "images_per_second", "peak_memory_mb")


def make_data(train_dir: Path) -> CellDataset:
    """Write the samples."""
    return write_squares(train_dir, SAMPLES)


def quick_model(**options: Any) -> torch.nn.Module:
    """Return a model of which a step takes a few hundredths of a second."""
    return tiny_model(rpn_samples=64, rois_per_image=32, train_proposals=16, **options)


def train(
    train_dir: Path,
    run_dir: Path,
    *,
    model: torch.nn.Module | None = None,
    workers: int = 0,
    batch_size: int = 1,
    transform: TrainTransform | None = None,
    **settings: Any,
) -> Iterator[EpochSummary]:
    """Return the epochs of a run with augmentation, accumulation and averaged weights."""
    dataset = CellDataset(train_dir, class_names=CLASSES, channel_order="true")
    pair = make_loaders(
        dataset.subset(list("abcde"), transform=transform or TrainTransform(crop_size=40)),
        dataset.subset(["v"]),
        batch_size=batch_size,
        workers=workers,
    )
    quick = {"epochs": 2, "learning_rate": 1e-3, "accumulate": 2, "probe_images": 1}
    return fit(
        model or quick_model(), *pair, run_dir=run_dir, device="cpu", progress=False,
        **quick | settings,
    )  # fmt: skip


def after_steps(model: torch.nn.Module, count: int, action: Callable[[], None]) -> None:
    """Do something within the forward pass of the batch that begins step `count`, from 0."""
    epochs, within = divmod(count, STEPS_PER_EPOCH)
    first, seen = BATCHES_PER_EPOCH * epochs + 2 * within + 1, []

    def act(module: torch.nn.Module, inputs: Any) -> None:
        seen.append(module.training)
        if seen.count(True) == first:
            action()

    model.register_forward_pre_hook(act)


def send(signum: int) -> Callable[[], None]:
    """Return a function that sends a signal to this process."""
    return lambda: os.kill(os.getpid(), signum)


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    """Return a summary without what depends on time."""
    return {key: value for key, value in row.items() if key not in CLOCKED}


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Compare weights, optimiser, average, metrics and predictions bit by bit, times aside."""
    for name in ("last.pt", "best.pt"):
        first, second = read_checkpoint(run_dir / name), read_checkpoint(other / name)
        for content in (first, second):
            for key in ("seconds", "generators", "settings"):
                content.pop(key, None)
            content.get("this_epoch", {}).pop("seconds", None)
            content["history"] = [without_clock(row) for row in content.get("history", [])]
        assert_same(first, second, name)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run_dir, other)]
    first, second = ([without_clock(json.loads(line)) for line in rows] for rows in lines)
    assert first == second
    assert predictions(run_dir) == predictions(other)


def assert_same(first: Any, second: Any, place: str) -> None:
    """Compare two trees of tensors and plain values."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key, value in first.items():
            assert_same(value, second[key], f"{place}: {key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


def predictions(run_dir: Path) -> list[dict[str, Any]]:
    """Return what the best weights of a run find in a fixed image."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 255, (3, 40, 56), dtype=torch.uint8, generator=generator)
    return predict_image(load_model(run_dir / "best.pt"), image, image_id=1, score_threshold=0.0)


def child(train_dir: Path, run_dir: Path, **settings: Any) -> subprocess.Popen:
    """Start a process that trains; it writes a line for each epoch."""
    command = [sys.executable, __file__, str(train_dir), str(run_dir), json.dumps(settings)]
    source = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def wait_for(found: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until something is so, or fail with what the process has to say."""
    end = time.monotonic() + seconds
    while not found():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"the child ended or hangs: {process.communicate()[0]}")
        time.sleep(0.005)


def main(train_dir: str, run_dir: str, settings: str) -> None:
    """Train; exit as the command line does."""
    options = json.loads(settings)
    limit = options.pop("file_size_limit", None)
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    model = quick_model()
    print("ready", flush=True)
    try:
        for epoch in train(Path(train_dir), Path(run_dir), model=model, **options):
            print(epoch.line(), flush=True)
    except TrainingInterrupted as interrupted:
        print(interrupted, flush=True)
        sys.exit(128 + interrupted.signum)
    except CellsegError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped at once", flush=True)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(*sys.argv[1:])

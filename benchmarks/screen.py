"""Screen a lever of the package's recipe: a short training, scored on the held tiles.

    python -m benchmarks.screen NAME [--set key=value ...] [--minutes 10] [--threads 1]

trains the recipe with some settings changed, predicts held tiles and pieces, and appends one line
of JSON to screens.jsonl in the folder of --keep. A setting is one of a preset, or `train_on`, or an
option of the builder, `TrainTransform`, `make_loaders`, `fit` or `predict_images`; its value is
read as JSON, or else taken as a word: `--set image_scale=1.5 scale_range=[0.7,1.4] norm=trained`.

The budget is processor time of this process, divided by its threads, in place of the wall time
that `fit(time_budget=...)` counts: a machine that is busy with something else costs patience and
no steps. For this to hold, samples are read in this process (`workers` is 0), and a step costs
what it costs alone; caches and memory shared with a busy neighbour still slow it by some percent,
so that levers of nearly equal cost are better compared at `--set epochs=N`, which does away with
the time budget.

    python -m benchmarks.screen NAME --of EARLIER [--set nms_threshold=0.6 ...]

trains nothing: it predicts anew with the weights of an earlier screen, for levers of prediction;

    python -m benchmarks.screen NAME --fuse EARLIER EARLIER ...

merges the records of earlier screens as `ensemble_files` does, all by its defaults.
With `--against EARLIER` the line holds the paired differences from an earlier screen, too.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.held_tissue import (
    PARTS,
    data_folder,
    predict_examined,
    score_examined,
    tile_differences,
    weights_file,
)
from benchmarks.our_recipe import LAPTOP, group_settings, our_predictor, remade_model, train_ours
from cellseg.coco import write_records
from cellseg.ensemble import ensemble_files
from cellseg.errors import CellsegError, SettingsError
from cellseg.presets import read_overrides
from cellseg.training import load_model

fit_module = importlib.import_module("cellseg.training.fit")  # `cellseg.training.fit` is `fit`
KEEP = Path("scratch")


@contextmanager
def processor_clock(threads: int) -> Iterator[None]:
    """Let `fit` count this process's processor time, divided by the threads, within a block."""
    clock = SimpleNamespace(**vars(time))
    clock.perf_counter = lambda: time.process_time() / threads
    with mock.patch.object(fit_module, "time", clock):
        yield


def screened_recipe(overrides: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Return the recipe with overrides, its budget in minutes unless epochs are among them.

    Raises:
        SettingsError: if nothing takes an override.
    """
    budget = {"time_budget": None if overrides.get("epochs") else minutes * 60}
    group_settings(overrides)
    return LAPTOP | {"workers": 0} | budget | overrides


def screen(
    recipe: dict[str, Any],
    data: Path,
    weights: Path | None,
    folder: Path,
    *,
    threads: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a recipe into a folder, predict and score; return the figures."""
    torch.set_num_threads(threads)
    with processor_clock(threads):
        training = train_ours(recipe, data, weights, folder, progress=progress)
    model = load_model(folder / "run" / "last.pt")
    return {
        **asdict(training),
        "seconds_a_step": training.seconds / training.steps,
        **predicted_figures(recipe, model, data, folder, progress=progress),
    }


def screen_prediction(
    overrides: dict[str, Any],
    data: Path,
    earlier: Path,
    folder: Path,
    *,
    threads: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Predict with an earlier screen's weights and some settings changed; return the figures."""
    torch.set_num_threads(threads)
    model = remade_model(earlier / "run" / "last.pt", overrides)
    return predicted_figures(overrides, model, data, folder, progress=progress)


def predicted_figures(
    recipe: dict[str, Any], model: nn.Module, data: Path, folder: Path, *, progress: bool
) -> dict[str, Any]:
    """Return the scores of a model, and the processor seconds that predicting took."""
    start = time.process_time()
    predict_examined(our_predictor(recipe, model, progress=progress), data, folder)
    seconds = time.process_time() - start
    return {"prediction_seconds": seconds, **score_examined(data, folder)}


def fuse_screens(folders: Sequence[Path], folder: Path, data: Path) -> dict[str, Any]:
    """Merge the records of earlier screens into a folder; return the figures."""
    start = time.process_time()
    for part in PARTS:
        merged = ensemble_files([earlier / f"{part}.json" for earlier in folders])
        write_records(folder / f"{part}.json", merged.records)
    seconds = time.process_time() - start
    return {"fusion_seconds": seconds, **score_examined(data, folder)}


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Screen one lever; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the screen, and of its folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time a thread")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--of", help="predict with the weights of this earlier screen")
    parser.add_argument("--fuse", nargs="+", default=[], help="merge the records of these screens")
    parser.add_argument("--against", help="say the differences from this earlier screen")
    parser.add_argument("--keep", type=Path, default=KEEP, help="folder of screens and their list")
    parser.add_argument("--weights", type=Path, help="file of ImageNet weights")
    options = parser.parse_args(arguments)
    try:
        line = run_screen(options)
    except CellsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    append_line(options.keep / "screens.jsonl", line)
    print(json.dumps(line, indent=1))
    return 0


def run_screen(options: argparse.Namespace) -> dict[str, Any]:
    """Return the line of a screen that the command line describes."""
    data, overrides = data_folder(), read_overrides(options.set)
    screens = options.keep / "screens"
    folder = screens / options.name
    for earlier in filter(None, (options.of, options.against, *options.fuse)):
        if not (screens / earlier).is_dir():
            raise SettingsError(f"there is no screen {earlier!r} in {screens}; make it first")
    line = {
        "name": options.name,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "of": options.fuse or options.of,
        "overrides": overrides,
        "threads": options.threads,
    }
    if options.fuse:
        line |= fuse_screens([screens / earlier for earlier in options.fuse], folder, data)
    elif options.of:
        line |= screen_prediction(
            overrides, data, screens / options.of, folder, threads=options.threads
        )
    else:
        recipe = screened_recipe(overrides, options.minutes)
        weights = weights_file(data, options.weights)
        line |= screen(recipe, data, weights, folder, threads=options.threads)
    if options.against:
        line["differences"] = tile_differences(data, screens / options.against, folder)
    return line


if __name__ == "__main__":
    sys.exit(main())

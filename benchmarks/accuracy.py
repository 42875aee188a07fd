"""`make bench-accuracy`: the course recipe and the package's, with the same budget, side by side.

    python -m benchmarks.accuracy [--only course_recipe|ours] [--minutes 45] [--threads 2]
        [--keep DIR] [--predict-only | --score-only] [--weights FILE]

needs CELLSEG_DATA, the folder with consep/ and consep_tiles/. Each side is trained on the 21
training tiles in a process of its own, one after the other, then predicts the six held tiles whole
and as their pieces; with --predict-only by the weights that are kept from earlier. Writes
accuracy.json beside this file and prints the table. A side that is not measured in a call stays as
it was, with its date. Peak memory is that of the process that trains, apart from the one that
reads ahead for it. Ends with 1 if the package's recipe misses what it must reach.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import course_recipe
from benchmarks.held_tissue import (
    PARTS,
    Predictor,
    data_folder,
    predict_examined,
    score_examined,
    training_samples,
    weights_file,
)
from benchmarks.memory import run_alone
from benchmarks.our_recipe import LAPTOP, Training, our_predictor, remade_model, train_ours
from benchmarks.run import FOLDER, machine, read_earlier, today
from benchmarks.section import markdown_table
from cellseg.errors import CellsegError, SettingsError
from cellseg.files import read_json, write_atomically
from cellseg.models import DetectorOptions
from cellseg.presets import PREDICTION

MINUTES, THREADS = 45.0, 2
WORKERS = 1  # that read ahead, of both sides
KEEP = Path("scratch") / "accuracy"
RESULTS = FOLDER / "accuracy.json"
FIGURES = {  # of the table: title, and where it stands in a side's entry
    "AP50, held tiles": ("tiles", "ap50"),
    "AP50 at 100, held tiles": ("tiles", "ap50_100"),
    "AP, held tiles": ("tiles", "ap"),
    "AP50, their pieces": ("pieces", "ap50"),
    "AP50 at 100, their pieces": ("pieces", "ap50_100"),
    "AP, their pieces": ("pieces", "ap"),
    "PQ, pooled": ("pq",),
    "AJI, pooled": ("aji",),
    "Dice, pooled": ("dice",),
    "PQ, mean over tiles": ("pq_mean",),
    "AJI, mean over tiles": ("aji_mean",),
    "Dice, mean over tiles": ("dice_mean",),
    "training, s": ("seconds",),
    "peak memory, MB": ("peak_memory_mb",),
}
WANTED = {("tiles", "ap50"): 0.45, ("pq",): 0.52, ("aji",): 0.53}
WANTED_RATIO = 2.5  # of the AP50s on pieces
Settings = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A recipe that takes part.

    Attributes:
        train: keeps its weights in a folder; takes data, file of ImageNet weights, that folder,
            minutes and settings.
        load: returns what predicts with them; takes data, folder and settings.
        settings: of the recipe.
    """

    train: Callable[[Path, Path, Path, float, Settings], Training]
    load: Callable[[Path, Path, Settings], Predictor]
    settings: Settings


def train_course(
    data: Path, weights: Path, folder: Path, minutes: float, settings: Settings
) -> Training:
    """Train the course recipe; return what it took."""
    torch.manual_seed(settings["seed"])
    dataset = training_samples(data, settings["train_on"])
    model = _course_model(data, weights, settings)
    loader = course_recipe.course_loader(
        dataset, workers=settings["workers"], seed=settings["seed"]
    )
    training = course_recipe.train_course(model, loader, time_budget=minutes * 60)
    torch.save(model.state_dict(), folder / "last.pth")
    return training


def load_course(data: Path, folder: Path, settings: Settings) -> Predictor:
    """Return what predicts with the course recipe's weights."""
    model = _course_model(data, None, settings)
    model.load_state_dict(torch.load(folder / "last.pth", weights_only=True))
    return course_recipe.course_predictor(model)


def _course_model(data: Path, weights: Path | None, settings: Settings) -> nn.Module:
    """Return the course recipe's model."""
    sizes = {name: settings[name] for name in ("min_size", "max_size")}
    num_classes = training_samples(data, settings["train_on"]).num_classes
    return course_recipe.course_model(num_classes, weights, **sizes)


def train_package(
    data: Path, weights: Path, folder: Path, minutes: float, settings: Settings
) -> Training:
    """Train the package's recipe; return what it took."""
    return train_ours(settings | {"time_budget": minutes * 60}, data, weights, folder)


def load_package(data: Path, folder: Path, settings: Settings) -> Predictor:
    """Return what predicts with the weights of the package's recipe, as today's default does."""
    options = {"proposals": DetectorOptions().proposals}
    return our_predictor(settings, remade_model(folder / "run" / "last.pt", options))


SIDES = {
    "course_recipe": Side(
        train_course,
        load_course,
        {
            "train_on": "pieces",
            "workers": WORKERS,
            "seed": 0,
            "epochs": course_recipe.EPOCHS,
            "batch_size": course_recipe.BATCH_SIZE,
            "learning_rate": course_recipe.LEARNING_RATE,
            "min_size": course_recipe.MIN_SIZE,
            "max_size": course_recipe.MAX_SIZE,
        },
    ),
    "ours": Side(train_package, load_package, LAPTOP | {"workers": WORKERS}),
}


def train_side(
    side: str, data: Path, weights: Path, folder: Path, minutes: float, threads: int
) -> None:
    """Train one side and write `training.json`; for a new process.

    Args:
        side: "course_recipe" or "ours".
        data: the folder with consep/ and consep_tiles/.
        weights: file of ImageNet weights.
        folder: for the weights.
        minutes: of training.
        threads: that compute; where the system allows it, no more cores are used either.
    """
    settings = SIDES[side].settings
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in ("training", *PARTS):
        (folder / f"{earlier}.json").unlink(missing_ok=True)
    hold_to_cores(threads)
    training = SIDES[side].train(data, weights, folder, minutes, settings)
    about = {"date": today(), "machine": machine(), "weights": weights.name, "minutes": minutes}
    about |= {"threads": threads, "settings": settings, **asdict(training)}
    write_atomically(folder / "training.json", dumps(about, indent=1) + "\n")


def predict_side(side: str, data: Path, folder: Path, threads: int) -> None:
    """Write the records of one side with the weights that `train_side` kept; for a new process.

    The settings of prediction in `training.json` become today's.
    """
    hold_to_cores(threads)
    settings = SIDES[side].settings
    predict_examined(SIDES[side].load(data, folder, settings), data, folder)
    about = read_json(folder / "training.json")
    about["settings"] |= {name: settings[name] for name in PREDICTION if name in settings}
    write_atomically(folder / "training.json", dumps(about, indent=1) + "\n")


def hold_to_cores(threads: int) -> None:
    """Compute with so many threads, on so many cores where the system can be told."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def side_entry(data: Path, folder: Path) -> dict[str, Any]:
    """Return a side's entry of accuracy.json from what is kept of it."""
    return read_json(folder / "training.json") | score_examined(data, folder)


def figure(entry: Mapping[str, Any], place: Sequence[str]) -> float | None:
    """Return a figure of an entry."""
    for key in place:
        entry = entry[key]
    return entry


def figure_table(results: Mapping[str, dict[str, Any]]) -> str:
    """Return the table of both sides; "-" where a side is not measured."""
    rows = []
    for title, place in FIGURES.items():
        values = [figure(results[side], place) if side in results else None for side in SIDES]
        digits = 0 if place[0] in ("seconds", "peak_memory_mb") else 3
        cells = ["-" if value is None else f"{value:.{digits}f}" for value in values]
        known = None not in values and values[0]
        rows.append([title, *cells, f"{values[1] / values[0]:.2f}" if known else "-"])
    rows.append(["measured", *(results.get(side, {}).get("date", "-") for side in SIDES), ""])
    return markdown_table(["", *SIDES, "ratio"], rows)


def find_misses(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return what the package's recipe misses of what it must reach, one phrase each."""
    if "ours" not in results:
        return []
    titles = {place: title for title, place in FIGURES.items()}
    misses = [
        f"{titles[place]}: {figure(results['ours'], place):.3f}, {least:g} wanted"
        for place, least in WANTED.items()
        if figure(results["ours"], place) < least
    ]
    if "course_recipe" in results:
        theirs, ours = (figure(results[side], ("pieces", "ap50")) for side in SIDES)
        if ours < WANTED_RATIO * theirs:
            misses.append(
                f"AP50, their pieces: {ours:.3f}, {WANTED_RATIO:g} times {theirs:.3f} wanted"
            )
    return misses


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure what is asked for, write accuracy.json after each side, return all entries."""
    data = data_folder()
    weights = weights_file(data, options.weights)
    results = read_earlier(RESULTS)
    for side in [options.only] if options.only else SIDES:
        folder = options.keep / side
        if not (options.predict_only or options.score_only):
            limits = f"{options.minutes:g} minutes of training at most, {options.threads} threads"
            print(f"{side}: {limits}; then some minutes of prediction", flush=True)
            run_alone(train_side, side, data, weights, folder, options.minutes, options.threads)
        if not (folder / "training.json").is_file():
            raise SettingsError(f"{folder} keeps nothing of a training; measure without an -only")
        if not options.score_only:
            run_alone(predict_side, side, data, folder, options.threads)
        results[side] = side_entry(data, folder)
        kept = {name: results[name] for name in SIDES if name in results}
        write_atomically(RESULTS, dumps(kept, indent=1) + "\n")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SIDES))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of training, each side")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--keep", type=Path, default=KEEP, help="folder of records, checkpoints")
    parser.add_argument("--predict-only", action="store_true", help="with the weights kept there")
    parser.add_argument("--score-only", action="store_true", help="score the records kept there")
    parser.add_argument("--weights", type=Path, help="file of ImageNet weights")
    options = parser.parse_args(arguments)
    try:
        results = measure(options)
    except CellsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(figure_table(results))
    misses = find_misses(results)
    for miss in misses:
        print(f"MISSED: {miss}")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())

"""How optimistic a random split is: one recipe, trained once a split, examined twice.

    python -m benchmarks.optimism [--set key=value ...] [--minutes 10] [--threads 1]

needs CELLSEG_DATA. The pieces of CoNSeP's training tiles are split into training and validation
twice: at random, where pieces of one tile fall on both sides, and by groups of similar images
(`group_by_similarity`, to which the tiles are not told). Each time the recipe is trained on the
one side and scored on the other, and on the pieces of the held tiles, which nothing was trained
on or chosen by. AP50 on the validation images minus AP50 on the held ones is what a split
promises too much; both trainings see the same held pieces, so that the two excesses compare.

Writes optimism.json and optimism.md into the folder of --keep. Training is by processor time, as
in `benchmarks.screen`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.consep_ids import tiles_of
from benchmarks.held_tissue import (
    FOLDERS,
    average_precisions,
    data_folder,
    examined_samples,
    training_samples,
    weights_file,
)
from benchmarks.our_recipe import our_predictor, train_recipe
from benchmarks.screen import KEEP, processor_clock, screened_recipe
from cellseg import markdown
from cellseg.data import CellDataset, split_ids
from cellseg.data.similarity import group_by_similarity
from cellseg.errors import CellsegError
from cellseg.evaluation import dataset_truth
from cellseg.presets import read_overrides, resolve_sizes
from cellseg.training import load_model

SPLITS = ("random", "grouped")


def make_splits(
    samples: CellDataset, groups: Mapping[str, int], val_fraction: float
) -> dict[str, tuple[list[str], ...]]:
    """Return `(train_ids, val_ids)` of each split; both are stratified by classes alike."""
    counts = {name: samples.class_counts(index) for index, name in enumerate(samples.sample_ids)}
    kept = {"random": None, "grouped": groups}
    return {
        name: split_ids(counts, val_fraction=val_fraction, groups=kept[name]) for name in SPLITS
    }


def shared_tiles(split: Sequence[Sequence[str]], tiles: Mapping[str, str]) -> float:
    """Return the share of validation images of whose tile the training holds a piece, too."""
    train_ids, val_ids = split
    trained = {tiles[name] for name in train_ids}
    return sum(tiles[name] in trained for name in val_ids) / len(val_ids)


def examine(
    recipe: Mapping[str, Any], checkpoint: Path, parts: Mapping[str, CellDataset]
) -> dict[str, dict[str, Any]]:
    """Return the scores of a checkpoint on the images of each part."""
    predict = our_predictor(recipe, load_model(checkpoint))
    return {
        name: average_precisions(dataset_truth(dataset), predict(dataset))
        for name, dataset in parts.items()
    }


def measure(
    recipe: Mapping[str, Any],
    data: Path,
    weights: Path | None,
    folder: Path,
    *,
    threads: int = 1,
    val_fraction: float = 0.2,
) -> dict[str, Any]:
    """Train both splits; return the figures of each and the difference of their optimism.

    An earlier run of the same recipe in the folder goes on, or is taken as it is.
    """
    torch.set_num_threads(threads)
    samples = training_samples(data, "pieces", cache_dir=folder / "cache")
    held = examined_samples(data)["pieces"]
    tiles = tiles_of(data / FOLDERS["pieces"] / "provenance.json")
    settled = resolve_sizes(recipe, samples)  # by all: one recipe for both splits
    found: dict[str, Any] = {"recipe": dict(recipe), "splits": {}}
    splits = make_splits(samples, group_by_similarity(samples), val_fraction)
    for name, split in splits.items():
        train, val = map(samples.subset, split)
        with processor_clock(threads):
            run_dir = train_recipe(settled, train, val, weights, folder / name)
        scores = examine(recipe, run_dir / "last.pt", {"validation": val, "held": held})
        found["splits"][name] = {
            "train_images": len(split[0]),
            "val_images": len(split[1]),
            "shared_tiles": shared_tiles(split, tiles),
            **scores,
            "optimism": scores["validation"]["ap50"] - scores["held"]["ap50"],
        }
    random, grouped = (found["splits"][name] for name in SPLITS)
    found["ap50_difference"] = random["validation"]["ap50"] - grouped["validation"]["ap50"]
    found["optimism_difference"] = random["optimism"] - grouped["optimism"]
    return found


def table(found: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table and a sentence."""
    scores = "AP50, validation", "AP50, held tiles", "excess"
    header = "split", "images", "tile on both sides", *scores
    rows = []
    for name in SPLITS:
        row = found["splits"][name]
        images = f"{row['train_images']} + {row['val_images']}"
        ap50 = [f"{row[part]['ap50']:.3f}" for part in ("validation", "held")]
        excess = f"{row['optimism']:+.3f}"
        rows.append((name, images, f"{row['shared_tiles']:.0%}", *ap50, excess))
    difference, excess = found["ap50_difference"], found["optimism_difference"]
    return (
        f"{markdown.table(header, rows)}\n\n"
        f"The random split says {difference:+.3f} AP50 against the grouped one; measured against "
        f"the held tiles it promises {excess:+.3f} more.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both splits and write what was found; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time a thread")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--val-fraction", type=float, default=0.2)
    parser.add_argument("--keep", type=Path, default=KEEP / "optimism", help="folder of the runs")
    parser.add_argument("--weights", type=Path, help="file of ImageNet weights")
    options = parser.parse_args(arguments)
    try:
        data = data_folder()
        recipe = screened_recipe(read_overrides(options.set), options.minutes)
        found = measure(
            recipe,
            data,
            weights_file(data, options.weights),
            options.keep,
            threads=options.threads,
            val_fraction=options.val_fraction,
        )
    except CellsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (options.keep / "optimism.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.keep / "optimism.md").write_text(table(found), "utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

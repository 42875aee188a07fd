"""Groups of similar images on real tissue: are pieces of one tile kept together, and what leaks?

    python -m benchmarks.groups_on_tissue [--val-fraction 0.2]

needs CELLSEG_DATA. CoNSeP's pieces are grouped by their pixels (`group_by_similarity`) and split
into training and validation twice, at random and by these groups; then each validation image is
held against all of training (`nearest_training_images`). Which tile a piece was cut from is known
here and told to neither. Prints both.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.consep_ids import tiles_of
from benchmarks.held_tissue import FOLDERS, all_samples, data_folder
from benchmarks.optimism import make_splits, shared_tiles
from benchmarks.section import markdown_table
from cellseg.data import Nearest, group_by_similarity, nearest_training_images
from cellseg.data.similarity import LOOKS
from cellseg.errors import CellsegError

HEADER = (
    "split", "images", "validation images that share a border or tissue with training",
    "nearest of the same tile", "tile on both sides",
)  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """How far groups are the tiles.

    Attributes:
        groups: how many there are.
        recall: share of the pairs of one tile that are in one group.
        precision: share of the pairs of one group that are of one tile.
        largest: share of all images in the largest group.
    """

    groups: int
    recall: float
    precision: float
    largest: float


def pair_agreement(groups: Mapping[str, int], tiles: Mapping[str, str]) -> Agreement:
    """Return how far the groups of images are those of their tiles; both by name."""
    found = np.array(list(groups.values()))
    tile = np.array([tiles[name] for name in groups])
    pairs = np.triu_indices(len(groups), 1)
    same_tile, together = ((ids[:, None] == ids)[pairs] for ids in (tile, found))
    both = (same_tile & together).sum()
    sizes = np.unique(found, return_counts=True)[1]
    return Agreement(
        groups=len(sizes),
        recall=float(both / same_tile.sum()),
        precision=float(both / together.sum()),
        largest=float(sizes.max() / len(groups)),
    )


def leak_row(
    name: str,
    split: Sequence[Sequence[str]],
    nearest: Sequence[Nearest],
    tiles: Mapping[str, str],
) -> list[str]:
    """Return a split's row of the table."""
    linked = sum(pair.cue != LOOKS for pair in nearest)
    same = sum(tiles[pair.val_id] == tiles[pair.train_id] for pair in nearest)
    return [
        name,
        " + ".join(str(len(side)) for side in split),
        f"{linked} of {len(nearest)}",
        f"{same / len(nearest):.0%}",
        f"{shared_tiles(split, tiles):.0%}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Group, split and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--val-fraction", type=float, default=0.2)
    options = parser.parse_args(arguments)
    try:
        data = data_folder()
        samples = all_samples(data, "pieces")
        tiles = tiles_of(data / FOLDERS["pieces"] / "provenance.json")
        start = time.process_time()
        groups = group_by_similarity(samples)
        seconds = time.process_time() - start
        splits = make_splits(samples, groups, options.val_fraction)
        rows = [
            leak_row(name, split, nearest_training_images(samples, *split), tiles)
            for name, split in splits.items()
        ]
    except CellsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = pair_agreement(groups, tiles)
    print(
        f"{len(groups)} images in {found.groups} groups, {seconds:.0f} s of the processor: pair "
        f"recall {found.recall:.2f}, pair precision {found.precision:.2f}, largest group "
        f"{found.largest:.1%}\n"
    )
    print(markdown_table(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

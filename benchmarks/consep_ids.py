"""Write the sample ids of CoNSeP's held tiles, so that commands can name them.

    python -m benchmarks.consep_ids $CELLSEG_DATA scratch

writes `held_pieces.txt` (pieces of held tiles, in consep), `held_tiles.txt` and `train_tiles.txt`
(whole tiles, in consep_tiles): folder names, one a line.
"""

import argparse
import json
from pathlib import Path

HELD = ("train_1", "train_5", "train_6", "train_8", "train_10", "train_25")


def ids_of(provenance: Path, *, held: bool) -> list[str]:
    """Return the folder names of training images cut from held (or from other) tiles, sorted.

    Args:
        provenance: a provenance.json; an entry of its `images` has `uuid`, and the tile's name
            under `tile`, or under `source` where the tile is whole.
        held: whether held tiles are wanted.
    """
    tiles = tiles_of(provenance)
    train_dir = provenance.parent / "hw3-data-release" / "train"
    names = (folder.name for folder in train_dir.iterdir() if folder.name in tiles)
    return sorted(name for name in names if (tiles[name] in HELD) == held)


def tiles_of(provenance: Path) -> dict[str, str]:
    """Return the tile that each image was cut from, or is, by folder name."""
    entries = json.loads(provenance.read_text(encoding="utf-8"))["images"]
    return {entry["uuid"]: entry.get("tile", entry.get("source")) for entry in entries}


def main() -> None:
    """Write the three lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with consep/ and consep_tiles/")
    parser.add_argument("output", type=Path, help="folder for the lists")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lists = {
        "held_pieces": ids_of(options.data / "consep" / "provenance.json", held=True),
        "held_tiles": ids_of(options.data / "consep_tiles" / "provenance.json", held=True),
        "train_tiles": ids_of(options.data / "consep_tiles" / "provenance.json", held=False),
    }
    for name, ids in lists.items():
        path = options.output / f"{name}.txt"
        path.write_text("\n".join(ids) + "\n", encoding="utf-8")
        print(f"{len(ids)} ids: {path}")


if __name__ == "__main__":
    main()

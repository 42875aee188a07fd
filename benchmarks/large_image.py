"""What memory a very large image takes: how far `predict_file` raises it above the model's.

    python -m benchmarks.large_image [mobilenetv2 ...] [--rows 1] [--columns 2] [--threads 1]

writes a TIFF in strips of LZW that has so many rows and columns of whole tiles, and one of twice
the rows. Each model, of random weights and 256 channels, predicts the small file as it is and in
four turns, and the large one as it is, each in a process of its own; settings are the defaults but
for the number of cells, which is that of dense tissue. Wanted: less than 2 GB above the model, and
for the large file no more than a tenth above what the small one takes. Ends with 1 if that is
missed.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch

from benchmarks.made import leave_boxes
from benchmarks.memory import run_alone, with_peak
from benchmarks.section import markdown_table, seconds_text
from cellseg.data.tissue import make_tissue
from cellseg.inference import predict_file
from cellseg.inference.tiles import OVERLAP, TILE_SIZE
from cellseg.presets import pick_builder

NAMES = ("mobilenetv2", "resnet50v2")
CASES = (("small", "plain"), ("large", "plain"), ("small", "turns"))  # file, views
CELLS = 450  # a network megapixel
PIECE = 512  # px of made tissue, laid side by side
STRIP_ROWS = 64
MOST_MB = 2e9 / 2**20
MOST_GROWTH = 1.1  # of the large file's memory over the small one's
HEADER = ("builder", "file", "views", "above the model", "cells", "time")

Case = tuple[str, str, str]  # builder, file, views


def whole_tiles(rows: int, columns: int) -> tuple[int, int]:
    """Return (height, width) of an image of whole tiles, for a model with a scale of 1."""
    height, width = (TILE_SIZE + (n - 1) * (TILE_SIZE - OVERLAP) for n in (rows, columns))
    return height, width


def write_strips(path: Path, size: tuple[int, int]) -> None:
    """Write made tissue of a size (height, width) as a TIFF in strips of LZW."""
    piece, _ = make_tissue(PIECE, PIECE, density=1e-6 * CELLS, seed=0)
    repeats = [-(-side // PIECE) for side in size]
    pixels = np.tile(piece, (*repeats, 1))[: size[0], : size[1]]
    options = {"compression": "lzw", "predictor": True, "rowsperstrip": STRIP_ROWS}
    tifffile.imwrite(path, pixels, photometric="rgb", metadata=None, **options)


def measure(name: str, path: Path, views: str, threads: int) -> tuple[float, int, float]:
    """Return MB above the model, cells and seconds of predicting a file; for a new process."""
    torch.set_num_threads(threads)
    model = pick_builder(name)(5, weights=None, detections_per_image=CELLS).eval()
    leave_boxes(model)
    options = {"views": views, "score_threshold": 0.0, "resume": False, "progress": False}
    start = time.perf_counter()
    records, peak = with_peak(
        partial(predict_file, model, path, path.with_suffix(".json"), **options)
    )
    return peak, len(records), time.perf_counter() - start


def find_misses(peaks: Mapping[Case, float]) -> list[str]:
    """Return what the memory of the cases misses of what is wanted, one phrase each."""
    misses = [
        f"{', '.join(case)}: {peak:.0f} MB, less than {MOST_MB:.0f} wanted"
        for case, peak in peaks.items()
        if peak >= MOST_MB
    ]
    for name in dict.fromkeys(name for name, *_ in peaks):
        small, large = (peaks[name, file, "plain"] for file in ("small", "large"))
        if large > MOST_GROWTH * small:
            misses.append(
                f"{name}: {large / small:.2f} times as much for the large file, at most "
                f"{MOST_GROWTH} wanted"
            )
    return misses


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the builders that the command line names and print the table; return the status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"builders; {' and '.join(NAMES)} by default")
    parser.add_argument("--rows", type=int, default=1, help="of tiles, in the small file")
    parser.add_argument("--columns", type=int, default=2, help="of tiles")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    sizes = {
        "small": whole_tiles(options.rows, options.columns),
        "large": whole_tiles(2 * options.rows, options.columns),
    }
    peaks: dict[Case, float] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {file: Path(folder, f"{file}.tif") for file in sizes}
        for file, path in paths.items():
            write_strips(path, sizes[file])
        for name in options.names or NAMES:
            for file, views in CASES:
                peak, cells, seconds = run_alone(measure, name, paths[file], views, options.threads)
                peaks[name, file, views] = peak
                shown = f"{file}, {sizes[file][0]} x {sizes[file][1]}"
                row = [name, shown, views, f"{peak:.0f} MB", f"{cells:,}", seconds_text(seconds)]
                rows.append(row)
                print(" | ".join(row), flush=True)
    print(f"\n{markdown_table(HEADER, rows)}")
    misses = find_misses(peaks)
    for miss in misses:
        print(f"MISSED: {miss}")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())

"""Cells out and in again on real tissue: every export timed, and read back.

    python -m benchmarks.exports_on_tissue

needs CELLSEG_DATA. Writes the cells of CoNSeP's whole tiles as COCO, label maps, outlines and a
table of their shapes, imports the COCO file as a release, and checks a zip of made records as it
would be handed in. Prints the processor time of each, and whether what is read back is what was
written; ends with 1 if it is not.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.held_tissue import all_samples, data_folder
from benchmarks.section import markdown_table, seconds_text
from benchmarks.stages_records import MEDIAN_TEST_SIZE, jittered_records, scatter_cells
from cellseg.coco import Record, group_by_image, rle_area
from cellseg.data import CellDataset
from cellseg.errors import CellsegError
from cellseg.evaluation import dataset_truth
from cellseg.files import read_json
from cellseg.interchange import (
    cells_by_picture,
    import_coco,
    pictures_of_samples,
    ring_area,
    write_coco,
    write_geojson,
    write_labels,
    write_morphometry,
)
from cellseg.overlap import neighbour_ious
from cellseg.submission import check_submission, write_submission

HEADER = ("", "processor time", "found", "as written")
IMAGES, RECORDS_PER_IMAGE = 100, 1000  # of the hand-in


@dataclass(frozen=True)
class Row:
    """One way out or in.

    Attributes:
        what: was done.
        seconds: of the processor.
        found: a figure of what came out.
        same: whether it is what went in; None where nothing is read back.
    """

    what: str
    seconds: float
    found: str
    same: bool | None = None


def clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns and the processor seconds that it took."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def tissue_rows(dataset: CellDataset, folder: Path) -> list[Row]:
    """Export the cells of a dataset into a folder and read them back."""
    pictures = pictures_of_samples(dataset)
    cells = cells_by_picture(pictures, dataset_truth(dataset)["annotations"])
    given = (pictures, cells, dataset.class_names)
    number = sum(map(len, cells))
    area = int(rle_area([cell["segmentation"] for found in cells for cell in found]).sum())
    coco, outlines = folder / "cells.json", folder / "outlines"
    _, coco_seconds = clocked(partial(write_coco, coco, *given))
    _, labels_seconds = clocked(partial(write_labels, folder / "labels", *given))
    _, outlines_seconds = clocked(partial(write_geojson, outlines, *given))
    _, table_seconds = clocked(partial(write_morphometry, folder / "cells.csv", *given))
    imported, import_seconds = clocked(
        partial(import_coco, coco, dataset.train_dir, folder / "imported")
    )
    again = CellDataset(imported.root / "train", class_names=imported.class_names)
    written = {f"{name}__image": masks for name, masks in masks_of(dataset).items()}
    outlined, size = outlined_area(outlines), sum(p.stat().st_size for p in outlines.iterdir())
    return [
        Row("COCO", coco_seconds, f"{number:,} cells of {len(pictures)} images"),
        Row("label maps", labels_seconds, f"{len(pictures)} maps"),
        Row(
            "GeoJSON",
            outlines_seconds,
            f"{size / 1e6:.1f} MB; signed areas {outlined:,.0f} px2 of {area:,}",
            outlined == area,
        ),
        Row("morphometry", table_seconds, f"{1000 * table_seconds / number:.2f} ms a cell"),
        Row(
            "import of the COCO file",
            import_seconds,
            f"{sum(imported.cells):,} masks, compared RLE for RLE",
            masks_of(again) == written,
        ),
    ]


def masks_of(dataset: CellDataset) -> dict[str, list[tuple[int, str]]]:
    """Return class and RLE of the cells of each sample, in sorted order."""
    cells = group_by_image(dataset_truth(dataset)["annotations"])
    return {
        name: sorted(
            (cell["category_id"], cell["segmentation"]["counts"]) for cell in cells.get(number, [])
        )
        for name, number in zip(dataset.sample_ids, dataset.image_ids, strict=True)
    }


def outlined_area(folder: Path) -> float:
    """Return the signed areas of all rings in the GeoJSON files of a folder, together, px2."""
    rings = []
    for path in folder.glob("*.geojson"):
        for feature in read_json(path)["features"]:
            single = feature["geometry"]["type"] == "Polygon"
            polygons = feature["geometry"]["coordinates"]
            rings += polygons if single else [ring for polygon in polygons for ring in polygon]
    return sum(map(ring_area, rings))


def check_row(folder: Path, images: int = IMAGES, records: int = RECORDS_PER_IMAGE) -> Row:
    """Write a zip of made records into a folder and check it as a hand-in."""
    rng, made = np.random.default_rng(0), []
    for image_id in range(1, images + 1):
        cells = scatter_cells(rng, records, MEDIAN_TEST_SIZE)
        made += jittered_records(rng, image_id, cells, MEDIAN_TEST_SIZE, shift=1.0)
    _, archive = write_submission(made, folder)
    checked, seconds = clocked(partial(check_submission, archive))
    found = f"{len(made):,} made records, {overlapping_pairs(made):,} pairs of a class overlap"
    return Row("check of a zip to hand in", seconds, found, checked.ready)


def overlapping_pairs(records: Sequence[Record]) -> int:
    """Return how many pairs of records of one image and class share pixels."""
    groups: dict[tuple[int, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["image_id"], record["category_id"]), []).append(record)
    ious = (neighbour_ious([r["segmentation"] for r in group])[2] for group in groups.values())
    return sum(int((iou > 0).sum()) for iou in ious)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    try:
        dataset = all_samples(data_folder(), "tiles")
    except CellsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        rows = [*tissue_rows(dataset, Path(folder)), check_row(Path(folder))]
    words = {None: "", True: "yes", False: "**no**"}
    lines = [[row.what, seconds_text(row.seconds), row.found, words[row.same]] for row in rows]
    print(markdown_table(HEADER, lines))
    return int(any(row.same is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Result files and the cache: the usual way and ours, on the same made files."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

from benchmarks.made import write_sample
from benchmarks.stage import Stage
from benchmarks.stages_data import DENSITY, Folder, Read, read_by_comparisons, same_sample
from benchmarks.stages_records import jittered_records, scatter_cells
from cellseg.coco import Record, read_records, sort_records, write_records
from cellseg.data.cache import SampleCache
from cellseg.data.reading import CLASS_NAMES, SampleFiles, find_sample_files
from cellseg.data.tissue import make_tissue
from cellseg.errors import RecordsError

SIDE = 1000
IMAGES, RECORDS_PER_IMAGE = 200, 500
CLASS_IDS = range(1, 5)
SOUND, CORRUPT = "sound.json", "corrupt.json"
CORRUPT_RECORDS = 2000  # in the corrupted file; one in 50 is faulty

Checked = tuple[list[Record], set[int], Path]


def make_files(images: int = IMAGES, records_per_image: int = RECORDS_PER_IMAGE) -> Folder:
    """Return a folder, gone when it is dropped, with a sound and a corrupted file of records."""
    folder = tempfile.TemporaryDirectory()
    rng = np.random.default_rng(0)
    records: list[Record] = []
    for image_id in range(1, images + 1):
        cells = scatter_cells(rng, records_per_image, (SIDE, SIDE))
        records += jittered_records(rng, image_id, cells, (SIDE, SIDE), shift=1.0)
    Path(folder.name, SOUND).write_text(json.dumps(records), encoding="utf-8")
    faulty = corrupt(records[:CORRUPT_RECORDS])
    Path(folder.name, CORRUPT).write_text(json.dumps(faulty), encoding="utf-8")
    return folder


def corrupt(records: list[Record]) -> list[Record]:
    """Return records of which one in 50 has a fault, of five kinds in turn."""
    faulty = list(records)
    for turn, index in enumerate(range(7, len(records), 50)):
        rle = records[index]["segmentation"]
        faults = (
            {"score": math.nan},
            {"segmentation": rle | {"counts": rle["counts"][:-1]}},
            {"segmentation": rle | {"size": [SIDE, SIDE - 1]}},
            {"category_id": 9},
            {"image_id": 0},
        )
        faulty[index] = records[index] | faults[turn % len(faults)]
    return faulty


def rewrite_by_decoding(folder: Folder) -> Checked:
    """Read, check each record by decoding its mask, write; and check the corrupted file."""
    with Path(folder.name, SOUND).open(encoding="utf-8") as file:
        records = json.load(file)
    if any(map(is_faulty, records)):
        raise ValueError(f"{SOUND} is not sound")
    copy = Path(folder.name, "reference.json")
    with copy.open("w", encoding="utf-8") as file:
        json.dump(records, file)
    with Path(folder.name, CORRUPT).open(encoding="utf-8") as file:
        faults = {index for index, record in enumerate(json.load(file)) if is_faulty(record)}
    return records, faults, copy


def is_faulty(record: Record) -> bool:
    """Return whether a record's values or its decoded mask are none of ours."""
    if not 0 <= record["score"] <= 1 or record["category_id"] not in CLASS_IDS:
        return True
    if not 1 <= record["image_id"] <= IMAGES:
        return True
    try:
        return mask_utils.decode(record["segmentation"]).shape != (SIDE, SIDE)
    except ValueError:
        return True


def rewrite_ours(folder: Folder) -> Checked:
    """Do the same through `read_records` and `write_records`."""
    allowed = {
        "image_ids": range(1, IMAGES + 1),
        "category_ids": CLASS_IDS,
        "image_sizes": dict.fromkeys(range(1, IMAGES + 1), (SIDE, SIDE)),
    }
    records = read_records(Path(folder.name, SOUND), **allowed)
    copy = Path(folder.name, "ours.json")
    write_records(copy, records)
    faults = set()
    try:
        read_records(Path(folder.name, CORRUPT), **allowed)
    except RecordsError as error:
        faults = {int(fault.split()[1].rstrip(":")) for fault in error.faults}
    return records, faults, copy


def same_files(reference: Checked, ours: Checked) -> bool:
    """Return whether the same was read, written (in any order) and found faulty."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in (reference[2], ours[2])]
    return reference[:2] == ours[:2] and sort_records(written[0]) == sort_records(written[1])


@dataclass(frozen=True)
class CachedSample:
    """A sample of 450 cells on disk and in a cache that has read it before.

    Attributes:
        name: the sample's folder.
        files: its files.
        cache: the cache.
        arrays: image planes, boxes, labels and map in this process's memory.
        folder: holds all of it; gone when it is dropped.
    """

    name: str
    files: SampleFiles
    cache: SampleCache
    arrays: list[np.ndarray]
    folder: Folder


def make_cached(side: int = SIDE) -> CachedSample:
    """Return a sample whose entry was made, and checked, by this process."""
    folder = tempfile.TemporaryDirectory()
    place = Path(folder.name, "sample")
    write_sample(place, *make_tissue(side, side, density=DENSITY, seed=1), compression=None)
    files = find_sample_files(place, CLASS_NAMES)
    cache = SampleCache(Path(folder.name, "cache"))
    cache.read(files)
    sample = CachedSample(str(place), files, cache, [], folder)
    return replace(sample, arrays=copy_from_cache(sample))


def copy_from_cache(sample: CachedSample) -> list[np.ndarray]:
    """Return the arrays copied out of the cache, so that all of it is really read."""
    planes, cells = sample.cache.read(sample.files)
    return copy((planes, cells.boxes, cells.labels, cells.instance_map))


def copy(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return a copy of each array."""
    return [array.copy() for array in arrays]


def same_cells(reference: Read, ours: list[np.ndarray]) -> bool:
    """Return whether image, boxes, labels and every cell's pixels are identical."""
    return same_sample(reference, (ours[0].transpose(1, 2, 0), *ours[1:]))


def same_arrays(reference: list[np.ndarray], ours: list[np.ndarray]) -> bool:
    """Return whether all arrays are identical."""
    return all(map(np.array_equal, reference, ours))


STAGES = (
    Stage(
        name="cache",
        floor=100,
        make=make_cached,
        reference=read_by_comparisons,
        ours=copy_from_cache,
        equal=same_cells,
        note="read from the cache and copied",
    ),
    Stage(
        name="cache_copy",
        floor=0.5,
        make=make_cached,
        reference=lambda sample: copy(sample.arrays),
        ours=copy_from_cache,
        equal=same_arrays,
        runs=31,
        note="the same beside a copy of the arrays in memory",
    ),
    Stage(
        name="records_io",
        floor=3,
        make=make_files,
        reference=rewrite_by_decoding,
        ours=rewrite_ours,
        equal=same_files,
        runs=1,
        memory_limit_mb=500,
    ),
)

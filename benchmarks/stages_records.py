"""Scoring and merging records: the libraries' own way and ours, on the same made input.

pycocotools compares every record with every truth, or with every other record, of an image and
class; ours looks at neighbours only.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.stage import Stage
from cellseg.coco import (
    Record,
    group_by_image,
    make_records,
    rle_to_xywh,
    runs_to_rles,
    sort_records,
)
from cellseg.ensemble import ensemble_files
from cellseg.evaluation.scores import score_records
from cellseg.inference.merging import suppress

CLASS_SHARES = (0.4, 0.4, 0.1, 0.1)
IOU_THRESHOLD = 0.5
MERGED_FILES, MERGED_IMAGES, RECORDS_PER_IMAGE = 17, 101, 300
MEDIAN_TEST_SIZE = (374, 464)
CROWDED_IMAGE = 500  # records of an image in one file of a large ensemble

Folder = tempfile.TemporaryDirectory


def ellipses(centres: np.ndarray, radii: np.ndarray, size: tuple[int, int]) -> list[dict]:
    """Return the RLEs of ellipses [N, 2] (row, column), cut off at the border of the image."""
    reach = np.arange(-int(radii.max()) - 1, int(radii.max()) + 2)
    column = np.rint(centres[:, 1]).astype(int)[:, None] + reach
    across = (column - centres[:, 1:]) / radii[:, 1:]
    half = radii[:, :1] * np.sqrt(np.maximum(1 - across**2, 0))
    top = np.clip(np.ceil(centres[:, :1] - half), 0, size[0]).astype(int)
    bottom = np.clip(np.floor(centres[:, :1] + half) + 1, 0, size[0]).astype(int)
    seen = (np.abs(across) < 1) & (column >= 0) & (column < size[1]) & (bottom > top)
    owner = np.nonzero(seen)[0]
    start = (column * size[0] + top)[seen]
    end = (column * size[0] + bottom)[seen]
    return runs_to_rles(owner, start, end, len(centres), size)


def jittered_records(
    generator: np.random.Generator,
    image_id: int,
    cells: tuple[np.ndarray, np.ndarray, np.ndarray],
    size: tuple[int, int],
    *,
    shift: float,
) -> list[Record]:
    """Return one record per cell (centres, radii, labels), moved by `shift` px and reshaped."""
    centres, radii, labels = cells
    moved = centres + generator.normal(0, shift, centres.shape)
    rles = ellipses(moved, radii * generator.uniform(0.85, 1.15, radii.shape), size)
    return make_records(image_id, labels, generator.random(len(labels)), rles)


def scatter_cells(
    generator: np.random.Generator, number: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return centres, radii (5 to 11 px) and labels of cells thrown onto an image."""
    centres = generator.uniform(8, np.array(size) - 8, (number, 2))
    labels = generator.choice(len(CLASS_SHARES), number, p=CLASS_SHARES) + 1
    return centres, generator.uniform(5, 11, (number, 2)), labels


def make_scoring(images: int = 6, cells: int = 446, side: int = 1000) -> tuple[dict, list[Record]]:
    """Return truth and two records per cell: 2,676 truths and 5,352 records."""
    generator = np.random.default_rng(0)
    size = (side, side)
    truth: dict = {"info": {}, "images": [], "annotations": []}
    truth["categories"] = [{"id": k, "name": f"class{k}"} for k in range(1, len(CLASS_SHARES) + 1)]
    records: list[Record] = []
    for image_id in range(1, images + 1):
        truth["images"].append({"id": image_id, "height": side, "width": side})
        centres, radii, labels = scatter_cells(generator, cells, size)
        rles = ellipses(centres, radii, size)
        for label, bbox, rle in zip(labels.tolist(), rle_to_xywh(rles).tolist(), rles, strict=True):
            annotation = {"id": len(truth["annotations"]) + 1, "image_id": image_id}
            annotation |= {"category_id": label, "bbox": bbox, "segmentation": rle}
            truth["annotations"].append(
                annotation | {"area": int(mask_utils.area(rle)), "iscrowd": 0}
            )
        for _ in range(2):
            mistaken = generator.random(cells) < 0.1
            guesses = np.where(mistaken, generator.integers(1, 5, cells), labels)
            found = (centres, radii, guesses)
            records += jittered_records(generator, image_id, found, size, shift=1.5)
    return truth, records


def pycocotools_scores(data: tuple[dict, list[Record]], cap: int) -> tuple[float, ...]:
    """Return AP, AP50 and AP75 as pycocotools computes them at a cap.

    Read off its precision table, since its summary knows no other cap than 100.
    """
    truth, records = data
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = truth
        ground_truth.createIndex()
        results = ground_truth.loadRes([dict(record) for record in records])
        evaluation = COCOeval(ground_truth, results, "segm")
        evaluation.params.maxDets = [1, 10, cap]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return tuple(float(part[part > -1].mean()) for part in (precision, precision[0], precision[5]))


def _our_scores(data: tuple[dict, list[Record]]) -> dict[str, tuple[float | None, ...]]:
    scores = score_records(*data)
    return {
        "100": (scores.ap_100, scores.ap50_100, scores.ap75_100),
        "uncapped": (scores.ap, scores.ap50, scores.ap75),
    }


def _scores_stage(cap_name: str, cap: int, floor: float) -> Stage:
    """Return the stage of one cap; ours computes both caps each time."""
    return Stage(
        name=f"scores_{cap_name}",
        floor=floor,
        make=make_scoring,
        reference=lambda data: pycocotools_scores(data, cap),
        ours=_our_scores,
        equal=lambda reference, ours: np.allclose(reference, ours[cap_name], rtol=0, atol=1e-9),
    )


def make_merging(
    files: int = MERGED_FILES,
    images: int = MERGED_IMAGES,
    cells: int = RECORDS_PER_IMAGE,
    size: tuple[int, int] = MEDIAN_TEST_SIZE,
) -> list[Record]:
    """Return the records of several files that found the same cells, each a little elsewhere."""
    generator = np.random.default_rng(0)
    records: list[Record] = []
    for image_id in range(1, images + 1):
        found = scatter_cells(generator, cells, size)
        for _ in range(files):
            records += jittered_records(generator, image_id, found, size, shift=1.0)
    return records


def suppress_by_all_pairs(records: Sequence[Record]) -> list[Record]:
    """Suppress greedily from `mask_utils.iou` over all pairs of an image and class."""
    kept: list[Record] = []
    for image in group_by_image(records).values():
        for label in sorted({record["category_id"] for record in image}):
            ordered = sort_records(record for record in image if record["category_id"] == label)
            rles = [record["segmentation"] for record in ordered]
            covers = mask_utils.iou(rles, rles, [0] * len(rles)) > IOU_THRESHOLD
            gone = np.zeros(len(ordered), dtype=bool)
            for index, record in enumerate(ordered):
                if not gone[index]:
                    kept.append(record)
                    gone |= covers[index]
    return kept


def _suppress(records: Sequence[Record]) -> list[Record]:
    return suppress(records, iou_threshold=IOU_THRESHOLD)


def make_ensemble(
    files: int = MERGED_FILES, images: int = MERGED_IMAGES, cells: int = CROWDED_IMAGE
) -> Folder:
    """Return a folder, gone when it is dropped, of files that found the same cells."""
    folder = tempfile.TemporaryDirectory()
    generator = np.random.default_rng(0)
    found = [scatter_cells(generator, cells, MEDIAN_TEST_SIZE) for _ in range(images)]
    for number in range(files):
        records: list[Record] = []
        for image_id, of_image in enumerate(found, start=1):
            records += jittered_records(generator, image_id, of_image, MEDIAN_TEST_SIZE, shift=1.0)
        Path(folder.name, f"{number:02}.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def fuse_by_all_pairs(folder: Folder) -> dict[tuple[int, int, str], float]:
    """Read all files whole; score greedy clusters by the mean of the files' best scores."""
    paths = sorted(Path(folder.name).glob("*.json"))
    groups: dict[tuple[int, int], list[tuple[Record, int]]] = {}
    for member, records in enumerate([json.loads(path.read_text("utf-8")) for path in paths]):
        for record in records:
            key = (record["image_id"], record["category_id"])
            groups.setdefault(key, []).append((record, member))
    fused = {}
    for key, entries in groups.items():
        entries.sort(key=lambda entry: (-entry[0]["score"], entry[0]["segmentation"]["counts"]))
        rles = [record["segmentation"] for record, _ in entries]
        scores = np.array([record["score"] for record, _ in entries])
        members = np.array([member for _, member in entries])
        covers = mask_utils.iou(rles, rles, [0] * len(rles)) > IOU_THRESHOLD
        free = np.ones(len(entries), dtype=bool)
        for index, rle in enumerate(rles):
            if free[index]:
                cluster = np.flatnonzero(covers[index] & free)
                best = np.zeros(len(paths))
                np.maximum.at(best, members[cluster], scores[cluster])
                fused[(*key, rle["counts"])] = float(best.mean())
                free[cluster] = False
    return fused


def _ensemble(folder: Folder) -> list[Record]:
    return ensemble_files(folder.name, iou_threshold=IOU_THRESHOLD).records


def _same_cells(fused: dict[tuple[int, int, str], float], records: Sequence[Record]) -> bool:
    """Tell whether both found the same cells with the same scores, to 1e-12."""
    ours = {
        (r["image_id"], r["category_id"], r["segmentation"]["counts"]): r["score"] for r in records
    }
    return fused.keys() == ours.keys() and all(
        abs(ours[key] - score) <= 1e-12 for key, score in fused.items()
    )


STAGES = (
    _scores_stage("100", 100, floor=15),
    _scores_stage("uncapped", 10_000, floor=30),
    Stage(
        name="merging",
        floor=3,
        make=make_merging,
        reference=suppress_by_all_pairs,
        ours=_suppress,
        equal=lambda reference, ours: sort_records(reference) == ours,
        runs=1,
    ),
    Stage(
        name="ensemble",
        floor=1.2,
        make=make_ensemble,
        reference=fuse_by_all_pairs,
        ours=_ensemble,
        equal=_same_cells,
        runs=1,
        memory_floor=3,
        note="17 files x 101 images x 500 records, from files to merged records; reading the JSON "
        "is part of both sides, checking it of ours alone",
    ),
)

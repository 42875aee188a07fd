"""What a run's validation showed, kept in its folder: all that the report is made from."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cellseg.coco import Record, write_records
from cellseg.errors import DataError
from cellseg.evaluation import Scores, explain_errors, image_bootstrap
from cellseg.evaluation.scores import Truth
from cellseg.files import read_json, write_atomically

TRUTH_NAME = "truth.json"
STATISTICS = ("ap50", "ap75", "ap", "ap50_100", "ap_100", "pq", "aji", "dice", "f_d")
_KEYS = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"),
    "categories": ("id", "name"),
}


def write_evaluation(
    run_dir: str | Path,
    records: Sequence[Record],
    scores: Scores,
    matrix: np.ndarray,
    class_names: Sequence[str],
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
    truth: Truth | None = None,
    groups: Mapping[int, Hashable] | None = None,
) -> None:
    """Write a run's validation results, from which the report is made.

    Args:
        run_dir: the run's folder.
        records: detections on the validation images -> `validation.json`.
        scores: their AP -> `scores.json`.
        matrix: int [C + 1, C + 1], rows truth, background last -> `confusion.json`.
        class_names: names of the classes.
        score_threshold: from which score on the matrix and the nuclei scores count detections.
        iou_threshold: mask IoU at which the matrix calls two masks one cell.
        truth: COCO dict of the validation images (masks, no pixels) -> `truth.json`, against
            which the report compares runs; with it intervals and the nuclei scores go into
            `scores.json`, and what AP50 loses to each kind of error into `errors.json`.
        groups: image_id -> its slide or patient, as in `image_bootstrap`.

    Raises:
        SettingsError: if an image has no group.
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    run_dir = Path(run_dir)
    content: dict[str, Any] = asdict(scores)
    if truth is not None:
        content |= _intervals(truth, records, score_threshold, groups)
        errors = asdict(explain_errors(truth, records))
        _write(run_dir / "errors.json", {key: errors[key] for key in ("ap50", "kinds", "perfect")})
        _write(run_dir / TRUTH_NAME, _with_groups(truth, groups), indent=None)
    write_records(run_dir / "validation.json", records)
    _write(run_dir / "scores.json", content)
    confusion = {
        "matrix": np.asarray(matrix).tolist(),
        "class_names": list(class_names),
        "score_threshold": score_threshold,
        "iou_threshold": iou_threshold,
    }
    _write(run_dir / "confusion.json", confusion, indent=None)


def read_truth(run_dir: str | Path) -> tuple[Truth, dict[int, Hashable] | None]:
    """Return the truth of a run's validation images, and their groups if they have any.

    Raises:
        DataError: if `truth.json` is missing or not as `write_evaluation` writes it.
    """
    path = Path(run_dir) / TRUTH_NAME
    truth = read_json(path)
    for part, keys in _KEYS.items():
        entries = truth.get(part) if isinstance(truth, dict) else None
        whole = isinstance(entries, list) and all(
            isinstance(entry, dict) and entry.keys() >= set(keys) for entry in entries
        )
        if not whole:
            raise DataError(f"{path}: {part} are not as a run writes them; evaluate the run again")
    groups = {image["id"]: image["group"] for image in truth["images"] if "group" in image}
    return truth, groups or None


def _intervals(
    truth: Truth,
    records: Sequence[Record],
    score_threshold: float,
    groups: Mapping[int, Hashable] | None,
) -> dict[str, Any]:
    """Return what `scores.json` holds beside the AP."""
    intervals = image_bootstrap(
        truth, records, statistics=STATISTICS, score_threshold=score_threshold, groups=groups
    )
    return {
        "images": len(truth["images"]),
        "groups": None if groups is None else len({groups[i["id"]] for i in truth["images"]}),
        "nuclei_score_threshold": score_threshold,
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
    }


def _with_groups(truth: Truth, groups: Mapping[int, Hashable] | None) -> Truth:
    """Return a truth whose images name their groups, if there are any."""
    if groups is None:
        return truth
    images = [image | {"group": str(groups[image["id"]])} for image in truth["images"]]
    return truth | {"images": images}


def _write(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write plain values as JSON."""
    write_atomically(path, json.dumps(content, indent=indent) + "\n")

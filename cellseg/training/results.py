"""What a run's validation showed, kept in its folder: all that the report is made from."""

import json
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cellseg.coco import Record, write_records
from cellseg.data import CellDataset
from cellseg.errors import DataError
from cellseg.evaluation import Evaluation
from cellseg.evaluation.scores import Truth
from cellseg.files import read_json, write_atomically
from cellseg.training.folds import read_folds
from cellseg.training.run import (
    FOLDS_NAME,
    OOF_NAME,
    SETTINGS_NAME,
    TRUTH_NAME,
    VALIDATION_NAME,
    read_settings,
)

_KEYS = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class Held:
    """The samples that a run has held out: those that its records can be scored on.

    Attributes:
        sample_ids: their names; of a run of folds those of all folds.
        class_names: names of the classes 1..C.
        channel_order: of the images, as `CellDataset` takes it.
        group_of: sample_id -> its group in the split; None if each sample stood alone.
        records: the file of the run's records of them, `validation.json` or `oof.json`.
    """

    sample_ids: list[str]
    class_names: list[str]
    channel_order: str
    group_of: dict[str, Hashable] | None
    records: Path

    def dataset(self, train_dir: str | Path, **options: Any) -> CellDataset:
        """Return the samples, found again in a folder; options as of `CellDataset`.

        Raises:
            DataError, SettingsError: as `CellDataset`.
        """
        return CellDataset(
            train_dir,
            class_names=self.class_names,
            sample_ids=self.sample_ids,
            channel_order=self.channel_order,
            **options,
        )


def read_held(run_dir: str | Path) -> Held:
    """Return what a run, or a run of folds, has held out.

    Raises:
        DataError: if the folder is no run's, holds nothing out, or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    is_folds = (run_dir / FOLDS_NAME).exists()
    settings_dir = first_fold(run_dir)
    settings = read_settings(settings_dir)
    if not settings:
        raise DataError(f"{settings_dir} holds no {SETTINGS_NAME}; name the folder of a run")
    if is_folds:
        content = read_folds(run_dir)
        held = list(chain.from_iterable(fold["val_ids"] for fold in content["folds"]))
        groups = content.get("groups")
    else:
        held, groups = settings.get("val_ids"), settings.get("groups")
    names = settings.get("class_names")
    for key, value in (("val_ids", held), ("class_names", names)):
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise DataError(f"{run_dir}: {key} are {reprlib.repr(value)}; remove the run's folder")
    if not held:
        raise DataError(f"{run_dir} held no image out; name the run whose folds chose its epochs")
    return Held(
        sample_ids=sorted(held),
        class_names=names,
        channel_order=str(settings.get("channel_order", "auto")),
        group_of=groups if isinstance(groups, dict) else None,
        records=run_dir / (OOF_NAME if is_folds else VALIDATION_NAME),
    )


def first_fold(run_dir: str | Path) -> Path:
    """Return the folder with the settings that a run was made by: its own, or its first fold's."""
    run_dir = Path(run_dir)
    return run_dir / "fold1" if (run_dir / FOLDS_NAME).exists() else run_dir


def image_groups(
    group_of: Mapping[str, Hashable] | None, dataset: CellDataset
) -> dict[int, Hashable] | None:
    """Return image_id -> its sample's group, as the bootstrap takes it; None unless all have one.

    Args:
        group_of: sample_id -> group, or None.
        dataset: the samples.
    """
    if not isinstance(group_of, Mapping) or not group_of.keys() >= set(dataset.sample_ids):
        return None
    pairs = zip(dataset.image_ids, dataset.sample_ids, strict=True)
    return {image_id: str(group_of[sample_id]) for image_id, sample_id in pairs}


def write_evaluation(
    run_dir: str | Path,
    truth: Truth,
    records: Sequence[Record],
    evaluation: Evaluation,
    *,
    groups: Mapping[int, Hashable] | None = None,
) -> list[Path]:
    """Write a run's validation results, from which the report is made, and return their paths.

    `validation.json` holds the records, unless the run is one of folds, whose `oof.json` has
    them; `scores.json` the scores with their intervals; `errors.json` what AP50 loses to each
    kind of error; `confusion.json` the matrix; `truth.json` the truth without pixels, against
    which the report compares runs.

    Args:
        run_dir: the run's folder.
        truth: COCO dict of the validation images.
        records: detections on them.
        evaluation: of `evaluate_records`, with the same truth, records and groups.
        groups: image_id -> its slide or patient.
    """
    run_dir = Path(run_dir)
    errors = asdict(evaluation.errors)
    contents = {
        "scores.json": (evaluation.content(), 1),
        "errors.json": ({key: errors[key] for key in ("ap50", "kinds", "perfect")}, 1),
        "confusion.json": (_confusion(truth, evaluation), None),
        TRUTH_NAME: (_with_groups(truth, groups), None),
    }
    for name, (content, indent) in contents.items():
        write_atomically(run_dir / name, json.dumps(content, indent=indent) + "\n")
    paths = [run_dir / name for name in contents]
    if not (run_dir / FOLDS_NAME).exists():
        paths.append(run_dir / VALIDATION_NAME)
        write_records(paths[-1], records)
    return paths


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


def _confusion(truth: Truth, evaluation: Evaluation) -> dict[str, Any]:
    """Return the confusion matrix with what it is of, as plain values."""
    names = {category["id"]: category["name"] for category in truth["categories"]}
    return {
        "matrix": evaluation.matrix.tolist(),
        "class_names": [names[category_id] for category_id in sorted(names)],
        "score_threshold": evaluation.score_threshold,
        "iou_threshold": evaluation.iou_threshold,
    }


def _with_groups(truth: Truth, groups: Mapping[int, Hashable] | None) -> Truth:
    """Return a truth whose images name their groups, if there are any."""
    if groups is None:
        return truth
    images = [image | {"group": str(groups[image["id"]])} for image in truth["images"]]
    return truth | {"images": images}

"""A run's folder: what it was made from, what it measured, and what it is called."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

import cellseg
from cellseg.coco import Record, write_records
from cellseg.data import CellDataset
from cellseg.errors import TrainingError
from cellseg.evaluation import Scores
from cellseg.files import read_json, write_atomically
from cellseg.models import count_trainable_parameters
from cellseg.training.precision import pick_device


@dataclass(frozen=True)
class EpochSummary:
    """One epoch, one line of `metrics.jsonl`; None where nothing was measured.

    Attributes:
        epoch: number of the epoch, from 1.
        step: optimiser steps so far.
        learning_rate: at the last step.
        train_loss: mean over the epoch.
        val_loss: mean over the validation images, in evaluation mode.
        losses: parts of both, {"train": {...}, "val": {...}}.
        ap, ap50, ap75: segm AP on the validation images, all detections counted.
        ap50_100: AP50 of at most 100 detections an image and class.
        ap50_per_class: by class name; None for a class without truth.
        train_ap50: on a fixed few training images, to see overfitting.
        seconds: of training, loading included, validation not.
        images_per_second: training images a second.
        peak_memory_mb: of the device, or of this process on a CPU.
    """

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    val_loss: float | None
    losses: dict[str, dict[str, float]]
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap50_100: float | None
    ap50_per_class: dict[str, float | None]
    train_ap50: float | None
    seconds: float
    images_per_second: float
    peak_memory_mb: float | None

    def line(self) -> str:
        """Return the epoch as one line of text."""
        shown = {
            "loss": self.train_loss,
            "val_loss": self.val_loss,
            "AP50": self.ap50,
            "AP50@100": self.ap50_100,
            "train_AP50": self.train_ap50,
        }
        parts = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
        return f"epoch {self.epoch}: {', '.join(parts)}, {self.seconds:.0f} s"


@dataclass(frozen=True)
class Run:
    """A run's folder and its settings.

    Attributes:
        path: the folder, `runs/<name>`.
        settings: the content of its `settings.json`.
        epochs_done: epochs in its history; 0 for a new run.
    """

    path: Path
    settings: dict[str, Any]
    epochs_done: int

    @property
    def state(self) -> str:
        """Say whether the run is new or goes on."""
        if not self.epochs_done:
            return f"new run {self.path.name}"
        return f"run {self.path.name}: {self.epochs_done} epochs done, going on from there"


def open_run(
    runs_dir: str | Path,
    model: nn.Module,
    train_dataset: CellDataset,
    val_dataset: CellDataset,
    *,
    recipe: Mapping[str, Any],
    seed: int = 0,
    name: str | None = None,
    sample_data: bool = False,
) -> Run:
    """Return the folder of this training run, new or as an earlier call left it.

    The default name is the builder plus a hash of data, model, recipe and seed, so that another
    backbone is another run, and the same call finds the same run again.

    Args:
        runs_dir: folder of all runs.
        model: a model with `spec` and `provenance`.
        train_dataset: what is trained on.
        val_dataset: what is validated on.
        recipe: plain values that decide the result, such as epochs, learning rate and crop.
        seed: of all draws.
        name: of the folder, instead of the default.
        sample_data: the data is made tissue; marks whatever is made from the run.

    Raises:
        TrainingError: if the folder of this name belongs to a run with other settings.
    """
    described = _describe(model, train_dataset, val_dataset, recipe, seed, sample_data)
    settings = json.loads(json.dumps(described, default=str))  # as they will be read: lists
    identity = _digest(_identity(settings))
    short = model.spec["builder"].removeprefix("get_model_")
    name = name or f"{short}-{identity[:8]}"
    path = Path(runs_dir) / name
    settings = {"run_name": name, "identity": identity} | settings
    if (path / "settings.json").exists():
        stored = read_json(path / "settings.json")
        if stored.get("identity") != identity:
            changed = ", ".join(_differences(stored, settings)) or "its identity"
            raise TrainingError(
                f"{path} is a run with other settings ({changed}); choose another name for this "
                "run, or remove that folder"
            )
        return Run(path, stored, len(read_history(path)))
    write_atomically(path / "settings.json", json.dumps(settings, indent=1) + "\n")
    return Run(path, settings, 0)


def _describe(
    model: nn.Module,
    train_dataset: CellDataset,
    val_dataset: CellDataset,
    recipe: Mapping[str, Any],
    seed: int,
    sample_data: bool,
) -> dict[str, Any]:
    """Return the settings that a report and a reader need to know the run by."""
    cells = np.zeros(len(train_dataset.class_names), dtype=int)
    for dataset in (train_dataset, val_dataset):
        for index in range(len(dataset)):
            cells += np.asarray(dataset.class_counts(index))
    return {
        "model": model.spec,
        "provenance": model.provenance,
        "trainable_parameters": count_trainable_parameters(model),
        "class_names": list(train_dataset.class_names),
        "num_classes": train_dataset.num_classes,
        "train_ids": train_dataset.sample_ids,
        "val_ids": val_dataset.sample_ids,
        "channel_order": train_dataset.channel_order,
        "recipe": dict(recipe),
        "seed": seed,
        "versions": {
            "cellseg": cellseg.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "device": str(pick_device()),
        "data": {
            "source": "made tissue"
            if sample_data
            else train_dataset.train_dir.resolve().parent.name,
            "fingerprint": _digest([train_dataset.fingerprint(), val_dataset.fingerprint()]),
            "images": len(train_dataset) + len(val_dataset),
            "cells_per_class": dict(zip(train_dataset.class_names, cells.tolist(), strict=True)),
        },
        "sample_data": sample_data,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a run this run: no paths, no device, no versions, no time."""
    arguments = {k: v for k, v in settings["model"]["arguments"].items() if k != "weights"}
    return {
        "builder": settings["model"]["builder"],
        "arguments": arguments,
        "data": settings["data"]["fingerprint"],
    } | {
        key: settings[key]
        for key in ("provenance", "class_names", "train_ids", "val_ids", "recipe", "seed")
    }


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs between two runs' settings, down to single entries."""
    old, new = _identity(stored), _identity(wanted)
    names = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{key}.{k}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
        elif a != b:
            names.append(key)
    return names


def _digest(value: Any) -> str:
    """Return the SHA-256 of a plain value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_history(run_dir: str | Path) -> list[EpochSummary]:
    """Return the epochs of a run so far, oldest first; empty for a new one.

    Raises:
        TrainingError: if `metrics.jsonl` holds a line that is no epoch.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    history = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            history.append(EpochSummary(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise TrainingError(
                f"{path}, line {number} is no epoch ({error}); remove that line"
            ) from None
    return history


def write_history(run_dir: str | Path, history: Sequence[EpochSummary]) -> None:
    """Write `metrics.jsonl` anew, whole."""
    lines = [json.dumps(asdict(summary)) + "\n" for summary in history]
    write_atomically(Path(run_dir) / "metrics.jsonl", "".join(lines))


def write_evaluation(
    run_dir: str | Path,
    records: Sequence[Record],
    scores: Scores,
    matrix: np.ndarray,
    class_names: Sequence[str],
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
) -> None:
    """Write a run's validation results, from which the report is made.

    Args:
        run_dir: the run's folder.
        records: detections on the validation images -> `validation.json`.
        scores: their AP -> `scores.json`.
        matrix: int [C + 1, C + 1], rows truth, background last -> `confusion.json`.
        class_names: names of the classes.
        score_threshold: from which score on the matrix counts detections.
        iou_threshold: mask IoU at which the matrix calls two masks one cell.
    """
    run_dir = Path(run_dir)
    write_records(run_dir / "validation.json", records)
    write_atomically(run_dir / "scores.json", json.dumps(asdict(scores), indent=1) + "\n")
    confusion = {
        "matrix": np.asarray(matrix).tolist(),
        "class_names": list(class_names),
        "score_threshold": score_threshold,
        "iou_threshold": iou_threshold,
    }
    write_atomically(run_dir / "confusion.json", json.dumps(confusion) + "\n")

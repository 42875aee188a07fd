"""A run's folder: what it was made from, what it measured, and what it is called."""

import hashlib
import json
import platform
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

import cellseg
from cellseg.data import CellDataset
from cellseg.errors import DataError, SettingsError, TrainingError
from cellseg.files import read_json, read_text, write_atomically
from cellseg.models import count_trainable_parameters
from cellseg.training.lock import lock_run
from cellseg.training.precision import pick_device

# The files of a run, or of a run of folds; those of its weights are named in `checkpoint`.
SETTINGS_NAME = "settings.json"
METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.json"
TRUTH_NAME = "truth.json"
FOLDS_NAME = "folds.json"
OOF_NAME = "oof.json"
MAX_NUMBER = 2**53  # beyond it numbers in JSON are not exact
NETWORK = ("builder", "arguments", "class_names")  # what weights fit


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

    def checked(self) -> "EpochSummary":
        """Return the summary itself.

        Raises:
            ValueError: if a value is not of the kind that its name says.
        """
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            wanted = dict if "dict" in kind else int if field.type is int else int | float
            missing = value is None and kind.endswith("| None")
            if not missing and (not isinstance(value, wanted) or isinstance(value, bool)):
                raise ValueError(f"{field.name} is {reprlib.repr(value)}")
            if isinstance(value, int) and abs(value) > MAX_NUMBER:
                raise ValueError(f"{field.name} is {reprlib.repr(value)}")
        return self

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
    val_dataset: CellDataset | None,
    *,
    recipe: Mapping[str, Any],
    seed: int = 0,
    name: str | None = None,
    groups: Mapping[str, Hashable] | None = None,
    prediction: Mapping[str, Any] | None = None,
    sample_data: bool = False,
    on_change: str = "refuse",
) -> Run:
    """Return the folder of this training run, new or as an earlier call left it.

    The default name is the builder plus a hash of data, model, recipe and seed, so that another
    backbone is another run, and the same call finds the same run again.

    Args:
        runs_dir: folder of all runs.
        model: a model with `spec` and `provenance`.
        train_dataset: what is trained on.
        val_dataset: what is validated on; None if no image is held out.
        recipe: plain values that decide the result, such as epochs, learning rate and crop.
        seed: of all draws.
        name: of the folder, instead of the default.
        groups: sample_id -> group (patient, slide) that the split kept together, stored so that
            intervals can be drawn by them; None if each sample stood alone.
        prediction: settings of `predict_images` that the run remembers, for `read_prediction`.
            They change no weights, so the latest ones are stored; None leaves what is there.
        sample_data: the data is made tissue; marks whatever is made from the run.
        on_change: what to do if the folder of this name belongs to a run with another recipe,
            other data or another seed: "refuse", or "continue" to go on with it, which is
            written down under `changes` in its `settings.json`.

    Raises:
        TrainingError: if the folder of this name belongs to a run with other settings; names
            them. Another model or other classes cannot go on in any case.
        SettingsError: if `on_change` is neither.
    """
    if on_change not in ("refuse", "continue"):
        raise SettingsError(f"on_change={on_change!r}; use refuse or continue")
    datasets = [train_dataset] if val_dataset is None else [train_dataset, val_dataset]
    described = _describe(model, datasets, recipe, seed, groups, prediction, sample_data)
    settings = json.loads(json.dumps(described, default=str))  # as they will be read: lists
    identity = _digest(_identity(settings))
    short = model.spec["builder"].removeprefix("get_model_")
    name = name or f"{short}-{identity[:8]}"
    path = Path(runs_dir) / name
    settings = {"run_name": name, "identity": identity} | settings
    stored = read_settings(path)
    if not stored:
        write_atomically(path / SETTINGS_NAME, json.dumps(settings, indent=1) + "\n")
        return Run(path, settings, 0)
    if prediction is None:
        settings["prediction"] = stored.get("prediction")
    if stored.get("identity") != identity:
        stored = _go_on_changed(path, stored, settings, on_change)
    elif stored.get("prediction") != settings["prediction"]:
        stored = stored | {"prediction": settings["prediction"]}
        write_atomically(path / SETTINGS_NAME, json.dumps(stored, indent=1) + "\n")
    return Run(path, stored, len(read_history(path)))


def _go_on_changed(
    path: Path, stored: dict[str, Any], settings: dict[str, Any], on_change: str
) -> dict[str, Any]:
    """Write changed settings into a run's folder if that is wanted and can work."""
    changed = _differences(stored, settings)
    text = ", ".join(_difference_text(*entry) for entry in changed) or "its identity"
    network = [name for name, *_ in changed if name.split(".")[0] in NETWORK]
    if network or on_change == "refuse":
        way = (
            f"or remove that folder (with another {network[0]} no run can go on)"
            if network
            else "remove that folder, or go on with it by on_change='continue'"
        )
        raise TrainingError(
            f"{path} is a run with other settings ({text}); choose another name for this run, {way}"
        )
    change = {
        "time": settings["started"],
        "epochs_done": len(read_history(path)),
        "from": {name: old for name, old, _ in changed},
        "to": {name: new for name, _, new in changed},
    }
    settings = settings | {
        "started": stored.get("started"), "changes": [*stored.get("changes", []), change],
    }  # fmt: skip
    with lock_run(path):
        write_atomically(path / SETTINGS_NAME, json.dumps(settings, indent=1) + "\n")
    return settings


def read_settings(run_dir: str | Path) -> dict[str, Any]:
    """Return a run's settings; empty if there are none.

    Raises:
        DataError: if the file is no JSON object, or names no model and data as ours do.
    """
    path = Path(run_dir) / SETTINGS_NAME
    if not path.exists():
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise DataError(f"{path} holds a {type(settings).__name__}, not settings; remove it")
    for key in ("model", "data"):
        if not isinstance(settings.get(key, {}), dict):
            raise DataError(f"{path}: {key} is {reprlib.repr(settings[key])}; remove the file")
    return settings


def read_prediction(run_dir: str | Path) -> dict[str, Any]:
    """Return the settings of prediction that a run remembers, by name; empty if it has none.

    What predicts with them finds cells as the run's records out of fold were found, and as its
    test records, so that weights and thresholds fitted on the ones hold for the others.

    Raises:
        DataError: if settings.json is not as a run writes it.
    """
    prediction = read_settings(run_dir).get("prediction")
    if not isinstance(prediction, dict | None):
        raise DataError(
            f"{Path(run_dir) / SETTINGS_NAME}: prediction is {reprlib.repr(prediction)}; write "
            'settings by their names, such as {"views": "turns"}, or null'
        )
    return prediction or {}


def _describe(
    model: nn.Module,
    datasets: Sequence[CellDataset],
    recipe: Mapping[str, Any],
    seed: int,
    groups: Mapping[str, Hashable] | None,
    prediction: Mapping[str, Any] | None,
    sample_data: bool,
) -> dict[str, Any]:
    """Return the settings that a report and a reader need to know the run by.

    `datasets` are what is trained on and, if there is one, what is validated on.
    """
    train_dataset = datasets[0]
    cells = np.zeros(len(train_dataset.class_names), dtype=int)
    for dataset in datasets:
        for index in range(len(dataset)):
            cells += np.asarray(dataset.class_counts(index))
    return {
        "model": model.spec,
        "provenance": model.provenance,
        "trainable_parameters": count_trainable_parameters(model),
        "class_names": list(train_dataset.class_names),
        "num_classes": train_dataset.num_classes,
        "train_ids": train_dataset.sample_ids,
        "val_ids": [sample_id for dataset in datasets[1:] for sample_id in dataset.sample_ids],
        "groups": None if groups is None else dict(sorted(groups.items())),
        "channel_order": train_dataset.channel_order,
        "recipe": dict(recipe),
        "prediction": None if prediction is None else dict(prediction),
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
            "fingerprint": _digest([dataset.fingerprint() for dataset in datasets]),
            "images": sum(map(len, datasets)),
            "cells_per_class": dict(zip(train_dataset.class_names, cells.tolist(), strict=True)),
        },
        "sample_data": sample_data,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a run this run: no paths, no device, no versions, no time."""
    model = settings.get("model", {})
    arguments = model.get("arguments")
    if isinstance(arguments, dict):
        arguments = {k: v for k, v in arguments.items() if k != "weights"}
    return {
        "builder": model.get("builder"),
        "arguments": arguments,
        "data": settings.get("data", {}).get("fingerprint"),
    } | {
        key: settings.get(key)
        for key in ("provenance", "class_names", "train_ids", "val_ids", "recipe", "seed")
    }


def _differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Return (name, old, new) of what differs between two runs' settings, single entries apart."""
    old, new = _identity(stored), _identity(wanted)
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names = sorted(a.keys() | b.keys())
            found += [(f"{key}.{k}", a.get(k), b.get(k)) for k in names if a.get(k) != b.get(k)]
        elif a != b:
            found.append((key, a, b))
    return found


def _difference_text(name: str, old: Any, new: Any) -> str:
    """Return "recipe.epochs 3 -> 9"; the name alone where values are lists or digests."""
    if name == "data" or any(isinstance(value, list | dict) for value in (old, new)):
        return name
    return f"{name} {reprlib.repr(old)} -> {reprlib.repr(new)}"


def _digest(value: Any) -> str:
    """Return the SHA-256 of a plain value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_history(run_dir: str | Path) -> list[EpochSummary]:
    """Return the epochs of a run so far, oldest first; empty for a new one.

    Raises:
        TrainingError: if `metrics.jsonl` holds a line that is no epoch.
    """
    path = Path(run_dir) / METRICS_NAME
    if not path.exists():
        return []
    history = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            history.append(EpochSummary(**json.loads(line)).checked())
        except (ValueError, TypeError, RecursionError) as error:
            raise TrainingError(
                f"{path}, line {number} is no epoch ({error}); remove that line"
            ) from None
    return history


def write_history(run_dir: str | Path, history: Sequence[EpochSummary]) -> None:
    """Write `metrics.jsonl` anew, whole."""
    lines = [json.dumps(asdict(summary)) + "\n" for summary in history]
    write_atomically(Path(run_dir) / METRICS_NAME, "".join(lines))

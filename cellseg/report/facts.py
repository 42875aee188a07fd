"""What a run's files say, as texts and shares that the report's template can print."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from cellseg.errors import DataError
from cellseg.evaluation.names import AP_SHOWN, NUCLEI_NAMES, SCORE_NAMES
from cellseg.files import read_json
from cellseg.report.reasons import REASONS
from cellseg.submission.compliance import compliance
from cellseg.training import read_history
from cellseg.training.results import first_fold
from cellseg.training.run import FOLDS_NAME, METRICS_NAME, SETTINGS_NAME

Facts = dict[str, Any]

_CLASS_SHOWN = (*NUCLEI_NAMES, "f_c")
_BACKBONES = ("mobilenet", "resnext", "resnet", "convnext")
_DATA_SETS = ("MoNuSAC", "CoNSeP")
_MEASURED = ("train_loss", "val_loss", "ap", "ap50", "ap50_100", "train_ap50", "seconds")
_THRESHOLDS = ("score_threshold", "iou_threshold")
_SHAPE_ERRORS = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError)


def facts_of_run(run_dir: Path, *, data_set: str = "") -> Facts:
    """Return what settings.json, scores.json, confusion.json and errors.json say.

    Of a run of folds the settings are those of its first one, and folds.json tells the rest. What
    the data are called is given, or else the name of their folder.

    Raises:
        DataError: if one is not as a run writes it; names the file, what is wrong and the remedy.
    """
    facts: Facts = {"scores": None, "confusion": None, "errors": None, "folds": None}
    settings = first_fold(run_dir) / SETTINGS_NAME
    tell = partial(_settings, data_set=data_set)
    facts |= _read(settings, tell, "open the run anew in another folder")
    if (run_dir / FOLDS_NAME).exists():
        facts["folds"] = _read(run_dir / FOLDS_NAME, _folds, "remove the run's folder")
        facts["run_name"] = run_dir.resolve().name
    for name, tell in (
        ("scores", _scores),
        ("confusion", _confusion),
        ("errors", _errors),
    ):
        path = run_dir / f"{name}.json"
        if path.exists():
            facts[name] = _read(path, tell, "remove it, or evaluate the run again")
    return facts


def read_epochs(run_dir: Path) -> list[dict]:
    """Return the epochs of metrics.jsonl in order; of an epoch told twice, the later line.

    Of a run of folds they are those of its first one. What is no finite number is None.

    Raises:
        DataError: if there is none.
        TrainingError: if a line is no epoch; names file and line.
    """
    path = first_fold(run_dir) / METRICS_NAME
    rows = {epoch.epoch: asdict(epoch) for epoch in read_history(path.parent)}
    if not rows:
        state = "is empty" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}: train at least one epoch before the report")
    for row in rows.values():
        row |= {key: _finite(row[key]) for key in _MEASURED}
    return [rows[epoch] for epoch in sorted(rows)]


def facts_of_epochs(epochs: Sequence[Mapping[str, Any]]) -> Facts:
    """Return the number of epochs, their time, and what the curves say at their end."""
    validated = [row for row in epochs if row.get("ap50") is not None]
    best = max(validated, key=lambda row: row["ap50"], default=None)
    seconds = sum(row.get("seconds") or 0 for row in epochs)
    return {
        "epochs": f"{len(epochs):,}",
        "duration": _as_duration(seconds) if seconds else "",
        "best": best
        and {
            "epoch": str(best["epoch"]),
            "ap50": _as_score(best["ap50"]),
            "train": _as_score(best.get("train_ap50")),
        },
    }


def data_sets_named(*texts: str) -> list[str]:
    """Return the data sets with a reference that texts name, in lower case."""
    together = " ".join(texts).lower()
    return [name.lower() for name in _DATA_SETS if name.lower() in together]


def _read(path: Path, tell: Callable[[Any], Any], remedy: str) -> Any:
    """Return what a file says; what has another shape than a run writes is an error of ours."""
    content = read_json(path)
    try:
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return tell(content)
    except _SHAPE_ERRORS as error:
        reason = f"no {error}" if isinstance(error, KeyError) else f"{error}"
        raise DataError(f"{path} is not as a run writes it ({reason}); {remedy}") from None


def _settings(settings: Mapping[str, Any], data_set: str) -> Facts:
    """Return what the report says about data, model and recipe."""
    if data_set:
        settings = {**settings, "data": (settings.get("data") or {}) | {"source": data_set}}
    model, started = settings.get("model") or {}, _parse_time(settings.get("started"))
    builder = str(model.get("builder", "?"))
    arguments, recipe = model.get("arguments") or {}, settings.get("recipe") or {}
    parameters = settings.get("trainable_parameters")
    provenance = _as_text(settings.get("provenance") or "")
    device = _as_text(settings.get("device") or "")
    return {
        "run_name": str(settings.get("run_name", "")),
        "sample_data": bool(settings.get("sample_data")),
        "date": [started.year, started.month, started.day] if started else None,
        "classes": _names(settings.get("class_names", [])),
        "builder": builder,
        "backbone": next((name for name in _BACKBONES if name in builder), ""),
        "cascade": arguments.get("cascade") is True,
        "provenance": provenance,
        "pretrained_on": [name for name in ("ImageNet", "COCO") if name in provenance],
        "parameters": f"{_number(parameters, 'trainable_parameters') / 1e6:.1f} million"
        if parameters
        else "",
        "model": _explained(_without_folder(arguments)),
        "scale": _as_text(arguments["image_scale"]) if "image_scale" in arguments else "",
        "recipe": _explained(_without_folder(recipe)),
        "prediction": _explained(settings.get("prediction") or {}),
        "seed": _as_text(settings.get("seed")),
        "device": "the CPU" if device == "cpu" else device,
        "versions": ", ".join(f"{k} {v}" for k, v in (settings.get("versions") or {}).items()),
        "compliance": compliance(settings),
    } | _data(settings)


def _data(settings: Mapping[str, Any]) -> Facts:
    """Return the numbers of images and of cells by class, as text."""
    data = settings.get("data") or {}
    train, val = len(settings.get("train_ids", [])), len(settings.get("val_ids", []))
    counts = data.get("cells_per_class") or {}
    total = sum(_number(count, name) for name, count in counts.items())
    return {
        "images": {
            "total": f"{_number(data.get('images') or train + val, 'images'):,}",
            "train": f"{train:,}",
            "val": f"{val:,}",
            "source": _as_text(data.get("source") or "source not stated"),
        },
        "held_out": settings.get("val_ids") != [],
        "channel_order": _as_text(settings.get("channel_order")),
        "fingerprint": str(data.get("fingerprint") or "")[:12],
        "cells_total": f"{total:,}",
        "cells": [
            {"name": name, "count": f"{count:,}", "share": f"{count / max(total, 1):.1%}"}
            for name, count in counts.items()
        ],
    }


def _folds(content: Mapping[str, Any]) -> Facts:
    """Return the rows of the folds, and how long the training on all images took."""
    rows = [
        [
            str(number),
            f"{len(fold['val_ids']):,}",
            _as_text(fold.get("best_epoch")),
            _as_score((fold.get("scores") or {}).get("ap50")) or "–",
        ]
        for number, fold in enumerate(content["folds"], start=1)
    ]
    epochs = (content.get("all") or {}).get("epochs")
    return {"rows": rows, "number": str(len(rows)), "all": "" if epochs is None else str(epochs)}


def _scores(scores: Mapping[str, Any]) -> Facts:
    """Return the rows of the tables of scores: AP, nuclei scores, AP50 by class."""
    intervals = scores.get("intervals") or {}

    def row(key: str) -> Facts:
        interval = intervals.get(key) or {}
        low, high = (_as_score(interval.get(end)) for end in ("low", "high"))
        value = _as_score(interval.get("value", scores.get(key)))
        name = SCORE_NAMES[key]
        return {"name": name, "value": value, "interval": low and high and f"{low}–{high}"}

    images, groups = (scores.get(key) for key in ("images", "groups"))
    unit = f"{groups} groups of {images} images" if groups else f"{images} images"
    return {
        "ap": [row(key) for key in AP_SHOWN if key in scores],
        "nuclei": [row(key) for key in NUCLEI_NAMES if key in intervals],
        "by_class": _by_class(scores),
        "images": f"{images} images" if images else "the validation images",
        "drawn": unit if intervals else "",
        "cut": _as_text(scores.get("nuclei_score_threshold")),
    }


def _by_class(scores: Mapping[str, Any]) -> list[Facts]:
    """Return the rows of the classes: AP50 and PQ with their intervals, the other nuclei scores."""
    intervals, nuclei, nuclei_intervals = (
        scores.get(key) or {}
        for key in ("intervals_per_class", "nuclei_per_class", "nuclei_intervals_per_class")
    )
    rows = []
    for name, value in (scores.get("ap50_per_class") or {}).items():
        own = nuclei.get(name) or {}
        rows.append(
            {
                "name": str(name),
                "value": _as_score(value),
                "interval": _ends(intervals.get(name)),
                "nuclei": [_as_score(own.get(key)) for key in _CLASS_SHOWN] if nuclei else [],
                "pq_interval": _ends((nuclei_intervals.get(name) or {}).get("pq")),
            }
        )
    return rows


def _ends(interval: Mapping[str, Any] | None) -> str | None:
    """Return the ends of an interval as text; None where there is none."""
    ends = [_as_score((interval or {}).get(end)) for end in ("low", "high")]
    return "–".join(ends) if all(ends) else None


def _confusion(confusion: Mapping[str, Any]) -> Facts:
    """Return counts and shares of the row; the corner, which means nothing, stays blank."""
    names, matrix = _names(confusion["class_names"]), confusion["matrix"]
    if [len(row) for row in matrix] != [len(names) + 1] * (len(names) + 1):
        raise ValueError(f"the matrix is not square for {len(names)} classes and background")
    for row in matrix:
        for count in row:
            if _number(count, "a count of the matrix") < 0:
                raise ValueError(f"a count of the matrix is {count}")
    truths = sum(map(sum, matrix[:-1]))
    right = sum(matrix[k][k] for k in range(len(names)))
    rows = [
        [{"count": f"{count:,}", "share": count / max(sum(row), 1)} for count in row]
        for row in matrix
    ]
    rows[-1][-1] = {"count": "", "share": 0}
    return {
        "names": names,
        "rows": rows,
        "right": f"{right / truths:.0%}" if truths else "",
        **{key: _as_text(_number(confusion[key], key)) for key in _THRESHOLDS},
    }


def _errors(errors: Mapping[str, Any]) -> Facts:
    """Return the mends as rows of a table, each bar's length a share of the longest."""
    mends = {part: errors[part] for part in ("kinds", "perfect")}
    every = [mend for table in mends.values() for mend in table.values()]
    longest = max([0.01, *(_number(mend["gain"] or 0, "gain") for mend in every)])
    shown = {
        part: [
            {
                "name": str(name),
                "count": f"{_number(mend['count'], 'count'):,}",
                "after": _as_score(mend["ap50_after"]) or "–",
                "gain": "–" if mend["gain"] is None else f"{mend['gain']:+.3f}",
                "share": max(mend["gain"] or 0, 0) / longest,
            }
            for name, mend in table.items()
        ]
        for part, table in mends.items()
    }
    worst = max(shown["kinds"], key=lambda row: row["share"])
    known = worst["share"] > 0
    return shown | {"ap50": _as_score(errors["ap50"]) or "–", "worst": worst if known else None}


def _explained(settings: Mapping[str, Any]) -> Facts:
    """Return settings with a reason as (words, value, reason), the others as (words, value)."""
    pairs = [(key, str(key).replace("_", " "), _as_text(value)) for key, value in settings.items()]
    return {
        "explained": [[words, value, REASONS[k]] for k, words, value in pairs if k in REASONS],
        "others": [[words, value] for k, words, value in pairs if k not in REASONS],
    }


def _without_folder(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings in which a file of weights has its name alone: its folder is a machine's."""
    weights = settings.get("weights")
    if not isinstance(weights, str):
        return settings
    return {**settings, "weights": PureWindowsPath(weights).name}  # knows both kinds of slash


def _names(values: Any) -> list[str]:
    """Return names of classes."""
    if not isinstance(values, list):
        raise TypeError(f"class_names is {values!r}")
    return [str(value) for value in values]


def _number(value: Any, name: str) -> float:
    """Return a number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} is {value!r}")
    return value


def _finite(value: float | None) -> float | None:
    """Return what an epoch measured; None where it was nothing, or beyond numbers."""
    return None if value is None or not math.isfinite(value) else value


def _parse_time(text: Any) -> datetime | None:
    """Return an ISO time in UTC, None if it is not one."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _as_text(value: Any) -> str:
    """Return a setting as a reader writes it: yes, 0.0004, 8, 16, 32."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_as_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value))
    return str(value)


def _as_score(value: float | None) -> str | None:
    """Return a score with three decimals, None where there is none."""
    return None if value is None or math.isnan(value) else f"{value:.3f}"


def _as_duration(seconds: float) -> str:
    """Return "45 s", "12 min" or "3 h 20 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

"""A run's folder in, report.pdf out: values travel as JSON data, never as typst source."""

import io
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typst
from PIL import Image

from cellseg.errors import DataError
from cellseg.files import read_json, write_atomically
from cellseg.report.glyphs import drop_undrawable, pick_fonts
from cellseg.report.plots import plot_learning_curves
from cellseg.report.style import save_figure

_TEMPLATE = Path(__file__).with_name("report.typ")
_MAX_PAGES = 3
_MAX_OVERLAYS = 2
_OVERLAY_PIXELS = 900
_SCORE_NAMES = {
    "ap50": "AP50",
    "ap": "AP",
    "ap75": "AP75",
    "ap50_100": "AP50, at most 100",
    "ap_100": "AP, at most 100",
}


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        path: the PDF.
        pages: number of its A4 pages.
        warnings: what the reader should know, in sentences; empty if all is well.
    """

    path: Path
    pages: int
    warnings: list[str]


def build_report(
    run_dir: str | Path,
    *,
    title: str = "Cell instance segmentation with Mask R-CNN",
    name: str = "",
    student_id: str = "",
    output: str | Path | None = None,
    system_fonts: bool = True,
) -> Report:
    """Write the report of a run as PDF; the same folder gives the same bytes.

    Reads settings.json and metrics.jsonl, and what there is of scores.json, confusion.json and
    figures/overlay*.png (the first two); what is missing is said in the report.

    Args:
        run_dir: folder of the run.
        title: printed as it is, like all texts: no character has a special meaning.
        name: author, in any script for which a font is installed.
        student_id: printed beside the name.
        output: the PDF to write; report.pdf in the run's folder by default.
        system_fonts: False uses only the fonts that typst brings, which hold Latin, Greek and
            Cyrillic.

    Returns:
        the Report; characters that no font can draw are left out, with a warning.

    Raises:
        DataError: if settings.json or metrics.jsonl is missing or damaged.
    """
    run_dir = Path(run_dir)
    output = Path(output) if output is not None else run_dir / "report.pdf"
    settings, epochs = read_json(run_dir / "settings.json"), _read_metrics(run_dir)
    fonts = typst.Fonts(include_system_fonts=system_fonts)
    facts = {"title": title, "author": name, "student_id": student_id}
    facts |= _facts_of_settings(settings) | _facts_of_epochs(epochs)
    facts |= {"scores": None, "class_scores": [], "confusion": None}
    facts |= _facts_of_scores(_read_optional(run_dir / "scores.json"))
    facts |= _facts_of_confusion(_read_optional(run_dir / "confusion.json"))
    facts, warnings = drop_undrawable(facts, fonts)
    facts["fonts"] = pick_fonts(fonts)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        facts["overlays"] = _copy_overlays(run_dir / "figures", root)
        save_figure(plot_learning_curves(epochs), root / "curves.svg")
        (root / "data.json").write_text(json.dumps(facts), encoding="utf-8")
        pdf, pages = _compile(root, fonts)
    write_atomically(output, pdf)
    if pages > _MAX_PAGES:
        warnings.append(f"the report has {pages} pages; the course asks for {_MAX_PAGES} at most")
    return Report(output, pages, warnings)


def _compile(root: Path, fonts: typst.Fonts) -> tuple[bytes, int]:
    """Compile the template beside its data; return the PDF and its number of pages.

    PDF/A is an archive's format: everything is embedded, and a character without a glyph is an
    error instead of a box.
    """
    shutil.copyfile(_TEMPLATE, root / "report.typ")
    compiler = typst.Compiler(root / "report.typ", root=root, font_paths=fonts)
    pdf = compiler.compile(format="pdf", pdf_standards="a-2b", timestamp=0)
    return pdf, int(json.loads(compiler.query("<pages>", field="value", one=True)))


def _read_metrics(run_dir: Path) -> list[dict]:
    """Return the epochs of metrics.jsonl in order; of an epoch told twice, the later line."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise DataError(f"{path} does not exist: train at least one epoch before the report")
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["epoch"]] = row
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}: line {number} is not an epoch's summary; remove it") from None
    if not rows:
        raise DataError(f"{path} is empty: train at least one epoch before the report")
    return [rows[epoch] for epoch in sorted(rows)]


def _read_optional(path: Path) -> Any | None:
    """Return the content of a JSON file, None if there is no such file."""
    return read_json(path) if path.exists() else None


def _facts_of_settings(settings: Mapping[str, Any]) -> dict:
    """Return what the report says about data, model and recipe, all of it as text."""
    model, started = settings.get("model") or {}, _parse_time(settings.get("started"))
    builder = str(model.get("builder", "?"))
    parameters = settings.get("trainable_parameters")
    device = _as_text(settings.get("device") or "")
    return {
        "run_name": str(settings.get("run_name", "")),
        "sample_data": bool(settings.get("sample_data")),
        "date": [started.year, started.month, started.day] if started else None,
        "classes": [str(name) for name in settings.get("class_names", [])],
        "builder": builder,
        "backbone": next((b for b in ("mobilenet", "resnext", "resnet") if b in builder), ""),
        "provenance": _as_text(settings.get("provenance") or ""),
        "parameters": f"{parameters / 1e6:.1f} million" if parameters else "",
        "arguments": _as_pairs(model.get("arguments") or {}),
        "recipe": _as_pairs(settings.get("recipe") or {}),
        "seed": _as_text(settings.get("seed")),
        "device": "the CPU" if device == "cpu" else device,
        "versions": ", ".join(f"{k} {v}" for k, v in (settings.get("versions") or {}).items()),
        "channel_order": _as_text(settings.get("channel_order")),
    } | _facts_of_data(settings)


def _facts_of_data(settings: Mapping[str, Any]) -> dict:
    """Return the numbers of images and of cells by class, as text."""
    data = settings.get("data") or {}
    train, val = len(settings.get("train_ids", [])), len(settings.get("val_ids", []))
    counts = data.get("cells_per_class") or {}
    total = sum(counts.values())
    return {
        "images": {
            "total": f"{data.get('images') or train + val:,}",
            "train": f"{train:,}",
            "val": f"{val:,}",
            "source": _as_text(data.get("source") or "source not stated"),
        },
        "fingerprint": str(data.get("fingerprint") or "")[:12],
        "cells_total": f"{total:,}",
        "cells": [
            {"name": name, "count": f"{count:,}", "share": f"{count / max(total, 1):.1%}"}
            for name, count in counts.items()
        ],
    }


def _facts_of_epochs(epochs: Sequence[Mapping[str, Any]]) -> dict:
    """Return the number of epochs, their time and the best of them."""
    validated = [row for row in epochs if row.get("ap50") is not None]
    best = max(validated, key=lambda row: row["ap50"], default=None)
    seconds = sum(row.get("seconds") or 0 for row in epochs)
    return {
        "epochs": f"{len(epochs):,}",
        "duration": _as_duration(seconds) if seconds else "",
        "best": best and {"epoch": str(best["epoch"]), "ap50": f"{best['ap50']:.3f}"},
    }


def _facts_of_scores(scores: Mapping[str, Any] | None) -> dict:
    """Return the table of scores, and AP50 by class."""
    if scores is None:
        return {}
    by_class = scores.get("ap50_per_class") or {}
    return {
        "scores": [
            {"name": name, "value": _as_score(scores.get(key))}
            for key, name in _SCORE_NAMES.items()
            if key in scores
        ],
        "class_scores": [
            {"name": name, "value": _as_score(value)} for name, value in by_class.items()
        ],
    }


def _facts_of_confusion(confusion: Mapping[str, Any] | None) -> dict:
    """Return counts and shares of the row; the corner, which means nothing, stays blank."""
    if confusion is None:
        return {}
    matrix = confusion["matrix"]
    rows = [
        [{"count": f"{count:,}", "share": count / max(sum(row), 1)} for count in row]
        for row in matrix
    ]
    rows[-1][-1] = {"count": "", "share": 0}
    thresholds = {key: _as_text(confusion[key]) for key in ("score_threshold", "iou_threshold")}
    return {"confusion": {"names": list(confusion["class_names"]), "rows": rows} | thresholds}


def _copy_overlays(figures_dir: Path, root: Path) -> list[str]:
    """Copy the first overlays, as JPEG of print size: a report of 300 KB, not of 5 MB."""
    names = []
    for path in sorted(figures_dir.glob("overlay*.png"))[:_MAX_OVERLAYS]:
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.thumbnail((_OVERLAY_PIXELS, _OVERLAY_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75)
        names.append(f"{len(names)}.jpg")
        (root / names[-1]).write_bytes(buffer.getvalue())
    return names


def _parse_time(text: Any) -> datetime | None:
    """Return an ISO time in UTC, None if it is not one."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC)
    except ValueError:
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


def _as_pairs(settings: Mapping[str, Any]) -> list[list[str]]:
    """Return settings as (words, value) pairs in their own order."""
    return [[str(key).replace("_", " "), _as_text(value)] for key, value in settings.items()]


def _as_score(value: float | None) -> str | None:
    """Return a score with three decimals, None where there is none."""
    return None if value is None or math.isnan(value) else f"{value:.3f}"


def _as_duration(seconds: float) -> str:
    """Return "45 s", "12 min" or "3 h 20 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

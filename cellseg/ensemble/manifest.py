"""What a merged result was made from, in a file beside it."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cellseg
from cellseg.coco import FAULTS_SHOWN
from cellseg.ensemble.merge import EnsembleResult
from cellseg.ensemble.rules import RULE_TEXTS
from cellseg.ensemble.tuning import Tuning
from cellseg.errors import CellsegError
from cellseg.files import read_json, write_atomically

PACKAGES = ("numpy", "pycocotools")


def manifest_path(results_path: str | Path) -> Path:
    """Return where the manifest of a result file lies: `<name>.manifest.json` beside it."""
    path = Path(results_path)
    return path.with_name(f"{path.stem}.manifest.json")


def write_manifest(result: EnsembleResult, results_path: str | Path) -> Path:
    """Write what a merged result was made from beside it, whole or not at all.

    It holds the `results` (name, digest, number of records), `members` and `left_out` (with
    digests, weights and where each is from), `settings`, `out_of_fold` (AP50 with its interval,
    or why there is none), `versions` and the `date`.

    Args:
        result: of `ensemble_files`.
        results_path: the file that holds its records.

    Returns:
        the path of the manifest.
    """
    results_path = Path(results_path)
    content = {
        "results": {
            "file": results_path.name,
            "sha256": _digest(results_path),
            "records": len(result.records),
        },
        "members": [
            {
                "file": member.path.name,
                "sha256": member.sha256,
                "records": len(member.table),
                "weight": member.weight,
                "weight_is": member.chosen,
                "notes": member.notes,
            }
            for member in result.members
        ],
        "left_out": [
            {"file": file.path.name, "faults": file.faults[:FAULTS_SHOWN]}
            for file in result.left_out
        ],
        "settings": _settings(result),
        "out_of_fold": _out_of_fold(result.tuning),
        "versions": {
            "cellseg": cellseg.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = manifest_path(results_path)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


def merged_names(results_path: str | Path) -> list[str] | None:
    """Return the names without .json of the members that made a result file.

    Returns:
        None if no manifest says so: there is none, it cannot be read, or it is of another result.
    """
    try:
        content = read_json(manifest_path(results_path))
        if content["results"]["sha256"] != _digest(Path(results_path)):
            return None
        taking = [member for member in content["members"] if member["weight"] > 0]
        return [Path(member["file"]).stem for member in taking]
    except (CellsegError, OSError, KeyError, TypeError):
        return None


def _settings(result: EnsembleResult) -> dict[str, Any]:
    """Return how the members were merged, and where each setting is from."""
    return {
        "iou_threshold": result.iou_threshold,
        "iou_threshold_is": result.chosen["iou_threshold"],
        "agreement": result.agreement,
        "agreement_is": result.chosen["agreement"],
        "agreement_means": RULE_TEXTS[result.agreement],
        "score_threshold": result.score_threshold,
    }


def _out_of_fold(tuning: Tuning | None) -> Mapping[str, Any]:
    """Return what is known of the ensemble's score, or why nothing is."""
    if tuning is None or tuning.reason:
        return {"ap50": None, "reason": tuning.reason if tuning else "tuning was not asked for"}
    return {
        "ap50": asdict(tuning.interval),
        "ap50_with_defaults": asdict(tuning.default),
        "images": tuning.images,
        "steps": tuning.steps,
    }


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

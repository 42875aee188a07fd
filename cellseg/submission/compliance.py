"""What is known of the runs behind a hand-in, held against the course's rules."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellseg.ensemble import merged_names
from cellseg.errors import CellsegError
from cellseg.files import read_json
from cellseg.models.builders import MAX_TRAINABLE_PARAMETERS
from cellseg.submission.files import RESULTS_NAME
from cellseg.training.run import SETTINGS_NAME

Settings = Mapping[str, Any]


def compliance(run_settings: Settings | None) -> str:
    """Return what a run's settings say about the course's rules, in a line.

    The rules: fewer than 200 M trainable parameters, weights of ImageNet or COCO, no other data.

    Args:
        run_settings: content of a run's `settings.json`; what it does not hold is called unknown.
    """
    settings = run_settings or {}
    return "; ".join([_parameters(settings), _weights(settings), _data(settings)])


def breaks_limit(run_settings: Settings | None) -> bool:
    """Tell whether a run's model is known to have too many trainable parameters."""
    number = (run_settings or {}).get("trainable_parameters")
    return type(number) is int and number >= MAX_TRAINABLE_PARAMETERS


def member_settings(project_dir: Path, runs_dir: Path | None = None) -> dict[str, Settings | None]:
    """Return the settings of the runs that the members of an ensemble are named after.

    The members are those in the manifest beside the result, else the files in `predictions/`.

    Args:
        project_dir: holds the result and `predictions/`.
        runs_dir: holds the runs' folders; by default they are looked for under `runs/` in the
            project's folder and in itself.

    Returns:
        name of the file without .json -> settings, None where no run of that name is found.
    """
    names = merged_names(project_dir / RESULTS_NAME)
    if names is None:
        files = sorted((project_dir / "predictions").glob("*.json"))
        names = [file.stem for file in files if file.name[0] != "."]
    places = (project_dir / "runs", project_dir) if runs_dir is None else (runs_dir,)
    return {name: _read_settings([place / name for place in places]) for name in names}


def _read_settings(runs: Sequence[Path]) -> Settings | None:
    """Return the settings of the first run that has some, of one by folds those of a part."""
    for folder in (run / part for run in runs for part in ("", "all", "fold1")):
        try:
            settings = read_json(folder / SETTINGS_NAME)
        except CellsegError:
            continue
        if isinstance(settings, dict):
            return settings
    return None


def _parameters(settings: Settings) -> str:
    """Return the number of trainable parameters beside the limit."""
    number = settings.get("trainable_parameters")
    if type(number) is not int:
        return "trainable parameters: unknown"
    relation = "not fewer" if breaks_limit(settings) else "fewer"
    limit = MAX_TRAINABLE_PARAMETERS / 1e6
    return f"{number / 1e6:.1f} M trainable parameters, {relation} than {limit:.0f} M"


def _weights(settings: Settings) -> str:
    """Return where the pretrained weights come from."""
    provenance = str(settings.get("provenance") or "unknown")
    origin = " (where the file comes from: unknown)" if provenance.startswith("file ") else ""
    return f"weights: {provenance}{origin}"


def _data(settings: Settings) -> str:
    """Return what the run was trained and validated on."""
    data = settings.get("data")
    if not isinstance(data, dict) or not data.get("source"):
        return "data: unknown"
    images = data.get("images", "an unknown number of")
    return f"data: {images} images ({data['source']}), none other recorded"

"""Checkpoints: tensors and plain values only, written whole, read without running anything."""

from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from cellseg.errors import CheckpointError, SettingsError
from cellseg.files import open_atomically
from cellseg.models import build_from_spec

FORMAT = 1
MARK = "cellseg checkpoint"


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; an older one under this name stays until the new one is complete."""
    with open_atomically(path) as file:
        torch.save({"mark": MARK, "format": FORMAT} | content, file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, not one of ours, or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; train first or check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged or unsafe files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({reason}); it is damaged or not a checkpoint of "
            "cellseg: use another one, or train again"
        ) from error
    if not isinstance(content, dict) or content.get("mark") != MARK:
        raise CheckpointError(
            f"{path} is not a checkpoint of cellseg; to start from foreign weights pass the file "
            "as weights= to a model builder"
        )
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this version reads up to {FORMAT}; "
            "install a newer cellseg"
        )
    return content


def load_model(path: str | Path, device: str | torch.device = "cpu") -> GeneralizedRCNN:
    """Return the model of a checkpoint, rebuilt by its own builder, in eval mode.

    The averaged weights are loaded where a checkpoint has both. The model has `spec`,
    `provenance`, `class_names` and `channel_order` (of the images that it was trained on).

    Raises:
        CheckpointError: if the checkpoint cannot be used.
    """
    content = read_checkpoint(path)
    try:
        model = build_from_spec(content["spec"])
        model.load_state_dict(content.get("ema") or content["model"])
    except (SettingsError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not fit its own description: {reason}") from error
    settings = content.get("settings", {})
    model.provenance = content.get("provenance", "unknown")
    model.class_names = tuple(settings.get("class_names", ()))
    model.channel_order = settings.get("channel_order", "undecided")
    return model.to(device).eval()

"""Checkpoints: tensors and plain values only, sealed by a digest, read without running anything."""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from cellseg.errors import CheckpointError, SettingsError
from cellseg.files import open_atomically
from cellseg.models import build_from_spec

FORMAT = 1
MARK = "cellseg checkpoint"
STATE_NAME = "last.pt"
PREVIOUS_NAME = "previous.pt"


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; an older one under this name stays until the new one is complete."""
    sealed = {"mark": MARK, "format": FORMAT, "digest": digest_of(content)} | content
    with open_atomically(path) as file:
        torch.save(sealed, file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged (one bit is enough), not one of ours, or
            from a newer version.
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
    rest = {k: v for k, v in content.items() if k not in ("mark", "format", "digest")}
    if content.get("digest") != digest_of(rest):
        raise CheckpointError(
            f"checkpoint {path} is damaged: its content does not match its digest; use another "
            "one, or train again"
        )
    return rest


def digest_of(value: Any) -> str:
    """Return a SHA-256 over a tree of dicts, lists, tensors and plain values, types included.

    torch.load takes a flipped bit in a tensor for good; this does not.
    """
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a digest, with marks that keep different trees apart."""
    if isinstance(value, dict):
        digest.update(b"{%d" % len(value))
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(b"[%d" % len(value))
        for item in value:
            _feed(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"t{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(f"{type(value).__name__}{value!r}".encode())


def save_state(run_dir: str | Path, content: dict[str, Any]) -> None:
    """Write a run's state; the one before stays, as `previous.pt`, and this one is proved first.

    Raises:
        CheckpointError: if what was written does not read back; the older states are intact.
    """
    run_dir = Path(run_dir)
    last, new = run_dir / STATE_NAME, run_dir / f"{STATE_NAME}.new"
    try:
        write_checkpoint(new, content)
        read_checkpoint(new)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if last.exists():
        os.replace(last, run_dir / PREVIOUS_NAME)
    os.replace(new, last)


def load_state(run_dir: str | Path) -> dict[str, Any] | None:
    """Return a run's last good state, None if it has none.

    Raises:
        CheckpointError: if there are states but none can be used.
    """
    run_dir = Path(run_dir)
    # In this order of age; a crash between two renames leaves the newest under `.new`.
    paths = [run_dir / name for name in (STATE_NAME, f"{STATE_NAME}.new", PREVIOUS_NAME)]
    faults = []
    for path in paths:
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if faults:
            warnings.warn(f"{faults[0]} - going on from {path.name} instead", stacklevel=2)
        return state
    if faults:
        raise CheckpointError("; ".join(faults))
    return None


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

"""Checkpoints: tensors and plain values only, sealed by a digest, read without running anything."""

import hashlib
import os
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from cellseg.errors import CheckpointError, SettingsError
from cellseg.files import open_atomically
from cellseg.models import build_from_spec
from cellseg.models.weights import load_tensors

FORMAT = 2  # 1 had no digest
MARK = "cellseg checkpoint"
STATE_NAME = "last.pt"
BEST_NAME = "best.pt"
PREVIOUS_NAME = "previous.pt"
# In this order of age; a crash between two renames leaves the newest under `.new`.
STATE_NAMES = (STATE_NAME, f"{STATE_NAME}.new", PREVIOUS_NAME)
REMEDY = "use another one, or train again"
MAX_DEPTH, MAX_VALUES = 20, 5_000_000  # of what a digest is taken; ours stay far below


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that cannot be read, so that an older one may take its place."""


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
        content = load_tensors(path)
    except ValueError as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} cannot be read ({error}); it is damaged or not a checkpoint of "
            f"cellseg: {REMEDY}"
        ) from error
    if not isinstance(content, dict) or content.get("mark") != MARK:
        raise CheckpointError(
            f"{path} is not a checkpoint of cellseg; to start from foreign weights pass the file "
            "as weights= to a model builder"
        )
    number = content.get("format")
    if not isinstance(number, int) or number > FORMAT:
        raise CheckpointError(
            f"{path} has format {number!r:.20}, this version reads up to {FORMAT}; install a "
            "newer cellseg"
        )
    rest = {k: v for k, v in content.items() if k not in ("mark", "format", "digest")}
    if number > 1 and not _fits_digest(rest, content.get("digest")):
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: its content does not match its digest; {REMEDY}"
        )
    return rest


def _fits_digest(content: dict[str, Any], digest: object) -> bool:
    """Tell whether content has a digest; a tree that has none, too deep or large, has not."""
    try:
        return digest_of(content) == digest
    except ValueError:
        return False


def digest_of(value: Any) -> str:
    """Return a SHA-256 over a tree of dicts, lists, tensors and plain values, types included.

    torch.load takes a flipped bit in a tensor for good; this does not.

    Raises:
        ValueError: if the tree is deeper or larger than any of ours: a small file can hold a list
            of the same list, many times over.
    """
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(tree: Any) -> Iterator[Any]:
    """Yield a tree as bytes, with marks that keep different trees apart."""
    left, waiting = MAX_VALUES, [(tree, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict | list | tuple):
            pairs = isinstance(value, dict)
            yield b"%b%d" % (b"{" if pairs else b"[", len(value))
            left -= len(value)
            if left < 0 or depth == MAX_DEPTH:
                raise ValueError(f"more than {MAX_VALUES} values or {MAX_DEPTH} levels")
            items = list(chain.from_iterable(value.items())) if pairs else value
            waiting += [(item, depth + 1) for item in reversed(items)]
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
                raise ValueError("a tensor that is not stored whole")
            yield f"t{value.dtype}{tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            yield f"{type(value).__name__}{value!r}".encode()


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

    An older state takes the place of a damaged one, with a warning; not that of a foreign or a
    newer one, which somebody may still want.

    Raises:
        CheckpointError: if there are states but none can be used.
    """
    run_dir = Path(run_dir)
    faults = []
    for path in (run_dir / name for name in STATE_NAMES):
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
        except DamagedCheckpoint as error:
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
    settings = content.get("settings", {})
    if not isinstance(content.get("spec", {}), dict) or not isinstance(settings, dict):
        raise CheckpointError(
            f"{path} does not fit its own description: spec or settings; {REMEDY}"
        )
    try:
        model = build_from_spec(content["spec"])
        model.load_state_dict(content.get("ema") or content["model"])
    except (SettingsError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} does not fit its own description: {reason}; {REMEDY}"
        ) from error
    model.provenance = content.get("provenance", "unknown")
    model.class_names = tuple(settings.get("class_names", ()))
    model.channel_order = settings.get("channel_order", "undecided")
    return model.to(device).eval()

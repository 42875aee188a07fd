"""Pretrained weights: where they come from, what of them fits, and what to do without network."""

import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from cellseg.errors import WeightsError

BODY_PREFIX = "backbone.body."  # of the names of a detector's tensors before its FPN
UNIMPORTANT = "num_batches_tracked"  # not there with frozen norms, and not needed

# What torch.load raises for files that are damaged, foreign, or would run code.
LOAD_ERRORS = (
    UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError,
    AssertionError, OverflowError, MemoryError, OSError, struct.error,
)  # fmt: skip
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, zlib.error, *LOAD_ERRORS)
SMALL_RECORD = 100_000_000  # bytes of the part that is interpreted; of tensors there may be more


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a local file; nothing in the file is executed.

    A checkpoint of this package, or a file that keeps its tensors under `model` or `state_dict`,
    is unwrapped; a `module.` prefix of DataParallel is taken off.

    Raises:
        WeightsError: if the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist; check the path in the settings")
    try:
        content = load_tensors(path)
    except ValueError as error:
        raise WeightsError(
            f"{path} cannot be read as weights ({error}); save a state dict with torch.save"
        ) from error
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise WeightsError(f"{path} holds no state dict of tensors; save one with torch.save")
    return {key.removeprefix("module."): value for key, value in content.items()}


def load_tensors(path: Path) -> Any:
    """Return the content of a file that torch.save wrote, on the CPU; nothing in it is executed.

    Raises:
        ValueError: if it is damaged, was not written by torch.save, or holds more than tensors
            and plain values; says why, in one line.
    """
    fault = _zip_fault(path)
    if fault is not None:
        raise ValueError(fault)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(reason) from error


def _zip_fault(path: Path) -> str | None:
    """Return what is wrong with a zip as torch.save writes it, before torch looks into it.

    None if nothing is, or if it is no zip, which torch.save wrote until 1.6.

    Tensors lie in it as they are: a compressed entry could unpack to any size, and one entry
    could stand for many tensors. What is interpreted is held against its checksum.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "its entries are compressed, as torch.save never does"
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                return "its entries claim more bytes than the file has"
            for entry in entries:
                if entry.filename.endswith(".pkl") and entry.file_size <= SMALL_RECORD:
                    file.read(entry)
    except ZIP_ERRORS as error:
        return f"not a whole zip: {error}"
    return None


def download_weights(weights: object) -> dict[str, Tensor]:
    """Return the state dict of a torchvision weights entry, from the cache or the network.

    Raises:
        WeightsError: without network, which file to fetch and where to put it; or that the file
            there is damaged.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError, EOFError, UnpicklingError) as error:
        if path.is_file():
            raise WeightsError(
                f"{path} cannot be read as weights; remove it, so that it is fetched anew"
            ) from error
        raise WeightsError(
            f"weights {weights} could not be downloaded ({error}); fetch {weights.url} on a "
            f"machine with network and put the file into {path.parent}, or pass weights=None to "
            "start from random weights"
        ) from error


def is_detector(state: Mapping[str, Tensor]) -> bool:
    """Tell a whole detector's state dict from a backbone's, by its keys."""
    return any(key.startswith(("backbone.", "rpn.", "roi_heads.")) for key in state)


def load_detector(model: nn.Module, state: Mapping[str, Tensor], source: str) -> str:
    """Copy into a detector every tensor of another one that fits; return what happened.

    Args:
        model: the detector, changed in place.
        state: a detector's state dict, of any number of classes.
        source: where it comes from, for messages and the provenance.

    Raises:
        WeightsError: if the backbone does not fit, that is, it is another network.
    """
    own = model.state_dict()
    state = spread_over_stages(state, own)
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    body = [k for k in own if k.startswith(BODY_PREFIX) and not k.endswith(UNIMPORTANT)]
    lost = [key for key in body if key not in fitting]
    if lost:
        raise WeightsError(
            f"{source} holds another detector: {len(lost)} of {len(body)} backbone tensors do not "
            f"fit, the first is {lost[0]}; use the builder that these weights were made with"
        )
    model.load_state_dict(fitting, strict=False)
    remade = sorted(k for k in own if k not in fitting and not k.endswith(UNIMPORTANT))
    kept = len(fitting)
    if not remade:
        return f"{source}: all {kept} tensors kept"
    return f"{source}: {kept} tensors kept, re-made: {', '.join(remade)}"


def spread_over_stages(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a detector's state with its box head for the earlier stages of a cascade, too."""
    filled = dict(state)
    for key in own:
        stage = re.match(r"roi_heads\.earlier\.\d+\.", key)
        last = stage and f"roi_heads.{key[stage.end() :]}"
        if last and key not in state and last in state:
            filled[key] = state[last]
    return filled


def load_backbone(body: nn.Module, state: Mapping[str, Tensor], source: str) -> str:
    """Copy an image classifier's weights into a backbone's body; return what happened.

    Args:
        body: the part of the network before the FPN, changed in place.
        state: a torchvision classifier's state dict; its classifier and its layers past the
            body are left out.
        source: where it comes from, for messages and the provenance.

    Raises:
        WeightsError: unless every tensor of the body is found with its shape.
    """
    state = {key.removeprefix("features."): value for key, value in state.items()}
    own = body.state_dict()
    needed = [key for key in own if not key.endswith(UNIMPORTANT)]
    lost = [k for k in needed if k not in state or state[k].shape != own[k].shape]
    if lost:
        found = next(iter(state), "nothing")
        raise WeightsError(
            f"{source} does not fit this backbone: {len(lost)} of {len(needed)} tensors are "
            f"missing or of another shape, the first is {lost[0]} (the file starts with {found}); "
            "use the builder of the network that these weights belong to"
        )
    body.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return f"{source}: backbone, {len(needed)} tensors kept"

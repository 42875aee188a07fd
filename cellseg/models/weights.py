"""Pretrained weights: where they come from, what of them fits, and what to do without network."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from torch import Tensor, nn

from cellseg.errors import WeightsError

UNIMPORTANT = "num_batches_tracked"  # not there with frozen norms, and not needed


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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged or unsafe files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as weights ({reason}); save a state dict with torch.save"
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
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    body = [k for k in own if k.startswith("backbone.body.") and not k.endswith(UNIMPORTANT)]
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

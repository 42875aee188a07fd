"""A true validation loss, and records of the same pass: nothing in the model changes."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cellseg.coco import Record, sort_records
from cellseg.data import cut_sample
from cellseg.inference.prediction import detections_to_records
from cellseg.inference.tiles import Tile, join_tiles, place_records, plan_for_model
from cellseg.training.distributed import ALONE, Ranks
from cellseg.training.precision import autocast

_Look = tuple[dict[str, float], list[Record]]  # losses, records
_Part = tuple[int, int, dict[str, float], list[Record]]  # place, images, losses, records
MIN_VISIBLE = 0.25  # a tile's loss asks for cells that show so much of their area, as training's
TWINS = 0.5  # mask IoU over which two tiles have seen the same cell, as in prediction


@dataclass(frozen=True)
class Validation:
    """What one pass over validation images gives.

    Attributes:
        losses: mean of each part of the loss over the images.
        records: the detections, in the order of `sort_records`.
    """

    losses: dict[str, float]
    records: list[Record]


@contextmanager
def loss_branches(model: nn.Module) -> Iterator[None]:
    """Make a detector return losses while every layer stays in evaluation mode.

    Only the three modules that choose between losses and detections are told to train; batch
    norm and dropout below them keep using what they have learned, and change nothing.
    """
    switches = (model, model.rpn, model.roi_heads)
    before = [module.training for module in switches]
    for module in switches:
        module.training = True
    try:
        yield
    finally:
        for module, was_training in zip(switches, before, strict=True):
            module.training = was_training


@contextmanager
def forked_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block under its own random draws; the generators outside do not move."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def losses_and_detections(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return losses and detections of a model in eval mode, its features computed once.

    Args:
        model: Mask R-CNN of this package in eval mode.
        images: uint8 [3, H, W] on the model's device.
        targets: their targets, on the same device.
    """
    sizes = [tuple(image.shape[-2:]) for image in images]
    batch, scaled = model.transform(images, targets)
    features = model.backbone(batch.tensors)
    with loss_branches(model):
        proposals, losses = model.rpn(batch, features, scaled)
        _, head_losses = model.roi_heads(features, proposals, batch.image_sizes, scaled)
    proposals, _ = model.rpn(batch, features)
    detections, _ = model.roi_heads(features, proposals, batch.image_sizes)
    return losses | head_losses, model.transform.postprocess(detections, batch.image_sizes, sizes)


def validate(
    model: nn.Module,
    loader: Iterable[tuple[list[Tensor], list[dict[str, Any]]]],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tile_size: int | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Validation:
    """Return losses and records over a loader; neither buffers nor generators change.

    The sampling of anchors and RoIs inside the loss is drawn from `seed` and the image's place
    alone, so that the loss of two epochs differs by the model and not by the draw, and several
    processes find, image by image, what one finds (on the CPU, at the same number of threads each).

    What is too large to be predicted as a whole is examined in the same tiles, so that it needs no
    more memory here than there: its records are those of `predict_tiles`, its loss is its tiles'
    mean.

    Args:
        model: Mask R-CNN of this package; it is put into eval mode and back.
        loader: batches of images and targets.
        seed: of the draws inside the losses.
        dtype: the type that the forward pass computes in.
        tile_size: image pixels a side, at most; None as in `predict_tiles`.
        progress: show a bar with the time left.
        ranks: the processes that share the images, each with its part of the loader's; the first
            of them gets the result, the others an empty one.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts: list[_Part] = []
    place = ranks.rank
    total = len(loader) if isinstance(loader, Sized) else None
    try:
        with forked_seed(seed, device), autocast(device, dtype):
            for images, targets in tqdm(
                loader, total=total, desc="validate", leave=False, disable=not progress
            ):
                torch.manual_seed(seed + place)  # loaders draw, too: how often depends on workers
                look = _examine(model, images, targets, tile_size)
                parts.append((place, len(images), *look))
                place += len(images) * ranks.count
    finally:
        model.train(was_training)
    gathered = ranks.gather(parts) or []
    return _put_together([part for some in gathered for part in some])


def _examine(
    model: nn.Module,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Any]],
    tile_size: int | None,
) -> _Look:
    """Return the losses of a batch, means over its images, and the records, large ones by tiles."""
    plans = [plan_for_model(model, tuple(i.shape[-2:]), tile_size=tile_size) for i in images]
    if all(len(tiles) == 1 for tiles in plans):
        return _look_at(model, images, targets)
    looks = [_look_at_tiles(model, *sample) for sample in zip(images, targets, plans, strict=True)]
    return _mean([losses for losses, _ in looks]), [r for _, records in looks for r in records]


def _look_at(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]
) -> _Look:
    """Return losses and records of a batch of images, whole."""
    images, targets = to_device(images, targets, next(model.parameters()).device)
    losses, detections = losses_and_detections(model, images, targets)
    records = []
    for image, target, detection in zip(images, targets, detections, strict=True):
        records += detections_to_records(
            detection, tuple(image.shape[-2:]), image_id=target["image_id"]
        )
    return {name: float(value) for name, value in losses.items()}, records


def _look_at_tiles(
    model: nn.Module, image: Tensor, target: dict[str, Any], tiles: Sequence[Tile]
) -> _Look:
    """Return the mean of the losses of an image's tiles, and their records put together."""
    size = tuple(image.shape[-2:])
    losses, parts = [], []
    for tile in tiles:
        part, cells = cut_sample(image, target, tile.window, min_visible=MIN_VISIBLE)
        loss, records = _look_at(model, [part], [cells])
        losses.append(loss)
        parts.append(place_records(tile, records, size))
    return _mean(losses), join_tiles(tiles, parts, iou_threshold=TWINS)


def _mean(losses: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each part of several losses."""
    return {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}


def _put_together(parts: Sequence[_Part]) -> Validation:
    """Return the result of all images, added up in their order, whoever has looked at them."""
    sums: dict[str, float] = {}
    records: list[Record] = []
    count = 0
    for _, images, losses, found in sorted(parts, key=lambda part: part[0]):
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value * images
        count += images
        records += found
    return Validation({k: v / max(count, 1) for k, v in sums.items()}, sort_records(records))


def to_device(
    images: Sequence[Tensor], targets: Sequence[dict[str, Any]], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return a batch on the device; copies run beside the computation where memory is pinned."""
    moved = [
        {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in target.items()
        }
        for target in targets
    ]
    return [image.to(device, non_blocking=True) for image in images], moved

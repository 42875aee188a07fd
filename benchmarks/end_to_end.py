"""Dense images through our loop and through torchvision's usual one, with the same network."""

import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from benchmarks.made import CLASSES, write_tissue
from benchmarks.memory import added_peak_mb, run_alone
from benchmarks.section import Section, seconds_text
from benchmarks.usual_loop import (
    UsualDataset,
    train_one_epoch,
    usual_collate,
    usual_loader,
    usual_model,
    usual_optimiser,
)
from cellseg.data import CellDataset, make_loaders
from cellseg.models import get_model_mobilenetv2
from cellseg.training import fit
from cellseg.training.session import Session

IMAGES, SIDE, CELLS, BATCH = 20, 1000, 350, 2
NUM_CLASSES = CLASSES + 1
WIDTH = 64
MOST_TIME = 1.05  # of ours over the usual way's
LEAST_MEMORY = 10  # of the usual way's over ours, the network stubbed
STRIDES = (4, 8, 16, 32, 64)
SIDES = ("usual", "ours")


class StubBackbone(nn.Module):
    """Features of the right shapes that take no memory."""

    def __init__(self, channels: int) -> None:
        """Set the number of channels."""
        super().__init__()
        self.out_channels = channels
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Tensor) -> OrderedDict[str, Tensor]:
        """Return five levels, as a feature pyramid does."""
        count, _, height, width = batch.shape
        return OrderedDict(
            (str(level), self.value.expand(count, self.out_channels, height // s, width // s))
            for level, s in enumerate(STRIDES)
        )


class StubRPNHead(nn.Module):
    """Scores and offsets of the right shapes."""

    def __init__(self, anchors: int) -> None:
        """Set the number of anchors a place."""
        super().__init__()
        self.anchors = anchors
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return one score and four offsets an anchor for each level."""
        shapes = [(level.shape[0], level.shape[-2:]) for level in levels]
        return tuple(
            [self.value.expand(count, k * self.anchors, *shape) for count, shape in shapes]
            for k in (1, 4)
        )


class StubPool(nn.Module):
    """One number an RoI instead of its features."""

    def forward(self, features: Any, rois: Sequence[Tensor], shapes: Any) -> Tensor:
        """Return zeros [K, 1]."""
        return torch.cat(list(rois))[:, :1] * 0


class StubOutputs(nn.Module):
    """Outputs of the right shapes for each RoI."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        """Set the shapes of the outputs of one RoI."""
        super().__init__()
        self.shapes = shapes
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, pooled: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return outputs [K, ...]."""
        outputs = tuple(self.value.expand(len(pooled), *shape) for shape in self.shapes)
        return outputs if len(outputs) > 1 else outputs[0]


def stub_network(model: GeneralizedRCNN) -> GeneralizedRCNN:
    """Replace backbone and heads by stubs with outputs of the same shapes."""
    model.backbone = StubBackbone(model.backbone.out_channels)
    model.rpn.head = StubRPNHead(model.rpn.anchor_generator.num_anchors_per_location()[0])
    heads = model.roi_heads
    heads.box_roi_pool = heads.mask_roi_pool = StubPool()
    heads.box_head = heads.mask_head = nn.Identity()
    heads.box_predictor = StubOutputs((NUM_CLASSES,), (4 * NUM_CLASSES,))
    heads.mask_predictor = StubOutputs((NUM_CLASSES, 28, 28))
    return model


def make_model(side: str, width: int) -> GeneralizedRCNN:
    """Return the same network as torchvision's Mask R-CNN or as ours."""
    ours = get_model_mobilenetv2(NUM_CLASSES, weights=None, norm="frozen", fpn_channels=width)
    return ours if side == "ours" else usual_model(ours, NUM_CLASSES, SIDE)


def train(side: str, train_dir: Path, images: int, width: int) -> list[float]:
    """Train for an epoch and return the seconds of its steps, loading included, but the first's."""
    model = make_model(side, width)
    if side == "usual":
        loader = usual_loader(UsualDataset(train_dir, images, NUM_CLASSES), BATCH)
        ends = train_one_epoch(model, usual_optimiser(model), loader)
    else:
        ends = train_ours(model, train_dir, images)
    return np.diff(ends).tolist()


def train_ours(model: GeneralizedRCNN, train_dir: Path, images: int) -> list[float]:
    """Train for an epoch through `fit` and return when each step ended."""
    dataset = CellDataset(train_dir, channel_order="true")
    dataset = dataset.subset(dataset.sample_ids[:images])
    loaders = make_loaders(dataset, dataset, batch_size=BATCH, workers=0)
    ends, step = [], Session.train_step

    def noted(*arguments: Any) -> None:
        step(*arguments)
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as run_dir, mock.patch.object(Session, "train_step", noted):
        # Two epochs, of which the first is run: validation comes after the last.
        options = {"epochs": 2, "validate_every": 2, "progress": False}
        with closing(fit(model, *loaders, run_dir=run_dir, **options)) as epochs:
            next(epochs)
    return ends


def epoch_peak_mb(side: str, train_dir: Path, width: int) -> float:
    """Return the memory that an epoch of one step adds, model and optimiser included."""
    return added_peak_mb(lambda: train(side, train_dir, BATCH, width))


def stubbed_peak_mb(side: str, train_dir: Path, width: int) -> float:
    """Return the memory that one step adds beside the network, from the files to gradients."""
    model = stub_network(make_model(side, width)).train()
    if side == "usual":
        dataset = UsualDataset(train_dir, BATCH, NUM_CLASSES)
    else:
        dataset = CellDataset(train_dir, channel_order="true")

    def step() -> None:
        images, targets = usual_collate([dataset[index] for index in range(BATCH)])
        sum(model(list(images), list(targets)).values()).backward()

    return added_peak_mb(step)


def end_to_end(*, quick: bool = False) -> list[Section]:
    """Return times and memory of whole epochs on both sides."""
    images = 3 * BATCH if quick else IMAGES
    with tempfile.TemporaryDirectory() as folder:
        train_dir = Path(folder)
        write_tissue(train_dir, images, SIDE, CELLS)
        dataset = CellDataset(train_dir, channel_order="true")
        cells = [sum(dataset.class_counts(index)) for index in range(images)]
        seconds = [float(np.median(train(side, train_dir, images, WIDTH))) for side in SIDES]
        whole_mb = [run_alone(epoch_peak_mb, side, train_dir, WIDTH) for side in SIDES]
        stubbed_mb = [run_alone(stubbed_peak_mb, side, train_dir, WIDTH) for side in SIDES]
    misses = []
    if seconds[1] > MOST_TIME * seconds[0]:
        misses.append(f"{seconds[1] / seconds[0]:.3f} of the usual time, {MOST_TIME} allowed")
    if stubbed_mb[0] < LEAST_MEMORY * stubbed_mb[1]:
        misses.append(
            f"1/{stubbed_mb[0] / stubbed_mb[1]:.3g} of the usual memory beside the network, "
            f"1/{LEAST_MEMORY} wanted"
        )
    rows = [["time of a step", *map(seconds_text, seconds), f"{seconds[0] / seconds[1]:.2f}"]]
    for what, megabytes in (("peak memory", whole_mb), ("peak, network stubbed", stubbed_mb)):
        texts = [f"{value:.0f} MB" for value in megabytes]
        rows.append([what, *texts, f"{megabytes[0] / megabytes[1]:.1f}"])
    section = Section(
        title="Against the usual way, end to end",
        text=f"{images} made images of {SIDE} x {SIDE}, {min(cells)} cells each and more, "
        f"batch {BATCH}, MobileNetV2 with {WIDTH} channels, CPU: torchvision's loop, as its "
        "tutorial writes it with [N, H, W] masks, and `fit`, both reading in the training process. "
        "Stubbed: a step without backbone and heads, whose outputs have the same shapes. Wanted: "
        f"at most {MOST_TIME} of the usual time; stubbed, at most 1/{LEAST_MEMORY} of its memory.",
        header=["", "torchvision", "ours", "ratio"],
        rows=rows,
        misses=misses,
    )
    return [section]

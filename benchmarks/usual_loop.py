"""Training as torchvision's tutorial on detection writes it: the reference of whole epochs."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from skimage import io
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes

from cellseg.models.options import ANCHOR_SIZES, ASPECT_RATIOS

LEVELS = ["0", "1", "2", "3"]


class UsualDataset(Dataset):
    """Samples as `(image, target)` with a stack of masks, one full frame a cell."""

    def __init__(self, train_dir: Path, images: int, num_classes: int) -> None:
        """List the first `images` samples of a folder."""
        self.folders = sorted(train_dir.iterdir())[:images]
        self.num_classes = num_classes

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.folders)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Return an image, float [3, H, W] in 0-1, and its target."""
        folder = self.folders[index]
        image = torch.from_numpy(io.imread(folder / "image.tif")[..., :3]).permute(2, 0, 1) / 255
        masks, labels = [], []
        for label in range(1, self.num_classes):
            path = folder / f"class{label}.tif"
            if path.exists():
                ids_of_pixels = torch.from_numpy(io.imread(path))
                ids = torch.unique(ids_of_pixels)[1:]
                masks.append((ids_of_pixels == ids[:, None, None]).byte())
                labels.append(torch.full((len(ids),), label))
        stack = torch.cat(masks)
        # The tutorial's boxes lack their last row and column, and a cell of one pixel any area.
        boxes = masks_to_boxes(stack) + torch.tensor([0, 0, 1, 1])
        target = {"boxes": boxes, "labels": torch.cat(labels), "masks": stack, "image_id": index}
        return image, target


def usual_model(ours: GeneralizedRCNN, num_classes: int, side: int) -> MaskRCNN:
    """Return torchvision's Mask R-CNN around the same network, with the same weights.

    Args:
        ours: a model of this package; its backbone is used, its weights are copied.
        num_classes: background included.
        side: of the images, px, which torchvision's transform then leaves as they are.
    """
    backbone = ours.backbone
    channels = backbone.out_channels
    width = ours.roi_heads.box_head.fc7.out_features
    anchors = AnchorGenerator(
        tuple((size,) for size in ANCHOR_SIZES), (ASPECT_RATIOS,) * len(ANCHOR_SIZES)
    )
    model = MaskRCNN(
        backbone,
        min_size=side,
        max_size=side,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0]),
        box_roi_pool=MultiScaleRoIAlign(LEVELS, 7, 2),
        box_head=TwoMLPHead(channels * 7**2, width),
        box_predictor=FastRCNNPredictor(width, num_classes),
        mask_roi_pool=MultiScaleRoIAlign(LEVELS, 14, 2),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
    )
    model.load_state_dict(ours.state_dict())
    return model


def usual_loader(dataset: UsualDataset, batch_size: int) -> DataLoader:
    """Return the tutorial's loader, reading in this process."""
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=True, collate_fn=usual_collate, num_workers=0
    )


def usual_collate(batch: Sequence[tuple]) -> tuple:
    """Return images and targets as two tuples."""
    return tuple(zip(*batch, strict=True))


def usual_optimiser(model: nn.Module) -> torch.optim.Optimizer:
    """Return the tutorial's optimiser, at a rate that suits random weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=0.0005)


def train_one_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader
) -> list[float]:
    """Train over the loader once and return when each step ended, in seconds of the clock."""
    model.train()
    ends = []
    for images, targets in loader:
        losses = sum(model(list(images), list(targets)).values())
        if not math.isfinite(losses.item()):
            raise ArithmeticError(f"loss is {losses.item()}, stopping training")
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        ends.append(time.perf_counter())
    return ends

"""The course recipe: what a user of plain torchvision trains. The reference of the comparison.

It is written down here as it was found, faults included, so that `make bench-accuracy` can measure
it beside the package's own recipe; nothing of the package uses it. For MobileNetV2 on a CPU:

- `MaskRCNN(backbone, num_classes=5)` with torchvision's defaults: the short side scaled to 800 px
  and the long one to 1333 at most, anchors of 32 to 512 px, 100 detections an image, score cut
  0.05; ImageNet weights with frozen batch norms; features 4, 7, 14 and 18 (strides 8, 16, 32, 32)
  into an FPN of 256 channels.
- AdamW at 4e-4 on all trainable parameters, divided by 10 after every third epoch; batches of two;
  no warm-up, clipping, augmentation, mixed precision or average of the weights.
- Images are drawn with replacement, in proportion to the mean over their cells of log1p(cells of
  the largest class / cells of the cell's class), from a random 80 % of them.

The other 20 % would be its validation, which chooses among epochs by a test of its own; here it is
left out of the time, and the last weights are used. Samples are read by the package's reader, and
its masks are handed over as the stack [N, H, W] that torchvision asks for.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, WeightedRandomSampler
from torchvision.models import mobilenet_v2
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from tqdm.auto import tqdm

from benchmarks.our_recipe import Training
from benchmarks.usual_loop import usual_collate
from cellseg.coco import Record, make_records, mask_to_rle
from cellseg.data import CellDataset, SampleImages, log_balanced_weights
from cellseg.models.weights import load_backbone, read_weights
from cellseg.training.epoch_scores import peak_memory_mb

EPOCHS = 4
BATCH_SIZE = 2
TRAINED_SHARE = 0.8
LEARNING_RATE = 4e-4
STEP_EPOCHS, STEP_FACTOR = 3, 0.1
TAPS = {"4": "0", "7": "1", "14": "2", "18": "3"}
CHANNELS = [32, 64, 160, 1280]
FPN_CHANNELS = 256
MIN_SIZE, MAX_SIZE = 800, 1333
MASK_THRESHOLD = 0.5


class StackedMasks(Dataset):
    """Samples as `(image, target)` with one full mask a cell, as torchvision wants them."""

    def __init__(self, dataset: CellDataset) -> None:
        """Keep the dataset; its transform is not used."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Return an image, float [3, H, W] in 0-1, and its target with bool `masks` [N, H, W]."""
        image, target = self.dataset.read(index)
        ids = torch.arange(1, len(target["labels"]) + 1)
        layers = target.pop("instance_map")
        masks = (layers[None] == ids[:, None, None, None]).any(dim=1)
        return image / 255, target | {"masks": masks}


def course_model(
    num_classes: int, weights: Path | None, *, min_size: int = MIN_SIZE, max_size: int = MAX_SIZE
) -> MaskRCNN:
    """Return the model, its backbone with ImageNet weights, the rest drawn from torch's state.

    Args:
        num_classes: background included.
        weights: file of the classifier's state dict; None for random ones.
        min_size: network pixels of the short side, unless the long one would pass `max_size`.
        max_size: network pixels of the long side, at most.
    """
    features = mobilenet_v2(weights=None, norm_layer=FrozenBatchNorm2d).features
    backbone = BackboneWithFPN(features, TAPS, CHANNELS, FPN_CHANNELS)
    if weights is not None:
        load_backbone(backbone.body, read_weights(weights), f"file {weights.name}")
    return MaskRCNN(backbone, num_classes=num_classes, min_size=min_size, max_size=max_size)


def course_optimiser(
    model: nn.Module,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.StepLR]:
    """Return optimiser and schedule; the schedule is stepped once an epoch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    return optimiser, torch.optim.lr_scheduler.StepLR(optimiser, STEP_EPOCHS, STEP_FACTOR)


def course_loader(dataset: CellDataset, *, workers: int, seed: int) -> DataLoader:
    """Return batches of a random 80 % of the samples, drawn with replacement by their weights."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=draw).tolist()
    chosen = order[: max(1, int(TRAINED_SHARE * len(order)))]
    weights = log_balanced_weights([dataset.class_counts(index) for index in chosen])
    sampler = WeightedRandomSampler(weights.tolist(), len(chosen), generator=draw)
    return DataLoader(
        Subset(StackedMasks(dataset), chosen),
        batch_size=BATCH_SIZE,
        sampler=sampler,
        num_workers=workers,
        collate_fn=usual_collate,
    )


def train_course(
    model: nn.Module,
    loader: DataLoader,
    *,
    time_budget: float,
    epochs: int = EPOCHS,
    progress: bool = True,
) -> Training:
    """Train for the epochs of the recipe, or until the time is up.

    Args:
        model: from `course_model`; changed in place.
        loader: from `course_loader`.
        time_budget: seconds, loading included.
        epochs: passes over the loader.
        progress: show a bar with the time left.
    """
    optimiser, schedule = course_optimiser(model)
    model.train()
    begin, steps = time.perf_counter(), 0
    with tqdm(total=epochs * len(loader), desc="course recipe", disable=not progress) as bar:
        for _ in range(epochs):
            steps += _train_epoch(model, optimiser, loader, begin + time_budget, bar)
            if time.perf_counter() >= begin + time_budget:
                break
            schedule.step()
    return Training(
        steps=steps,
        seconds=time.perf_counter() - begin,
        peak_memory_mb=peak_memory_mb(torch.device("cpu")),
        ended_by="epochs" if steps == epochs * len(loader) else "time",
    )


def _train_epoch(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    loader: DataLoader,
    deadline: float,
    bar: tqdm,
) -> int:
    """Train over the loader once, or until the clock says the deadline; return the steps."""
    steps = 0
    for images, targets in loader:
        loss = sum(model(list(images), list(targets)).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
        left = deadline - time.perf_counter()
        bar.set_postfix_str(f"at most {tqdm.format_interval(max(0, left))} left", refresh=False)
        bar.update()
        if left <= 0:
            break
    return steps


def course_predictor(
    model: nn.Module, *, progress: bool = True
) -> Callable[[CellDataset], list[Record]]:
    """Return what predicts the images of a dataset as torchvision does, masks pasted by it."""

    def predict(dataset: CellDataset) -> list[Record]:
        images = tqdm(SampleImages(dataset), desc="predict", leave=False, disable=not progress)
        return [record for image, image_id in images for record in records_of(image, image_id)]

    @torch.inference_mode()
    def records_of(image: Tensor, image_id: int) -> list[Record]:
        found = model.eval()([image / 255])[0]
        masks = (found["masks"][:, 0] > MASK_THRESHOLD).numpy()
        filled = masks.any(axis=(1, 2)).nonzero()[0].tolist()
        labels, scores = found["labels"][filled].tolist(), found["scores"][filled].tolist()
        return make_records(image_id, labels, scores, [mask_to_rle(masks[k]) for k in filled])

    return predict

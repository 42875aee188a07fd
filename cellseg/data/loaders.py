"""Batches for training and validation whose order is a function of (seed, epoch)."""

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cellseg.data.dataset import CellDataset
from cellseg.data.decoding import read_size
from cellseg.errors import SettingsError, check_at_least

SamplerName = Literal["shuffle", "log_balanced", "area"]
SAMPLERS: tuple[SamplerName, ...] = ("shuffle", "log_balanced", "area")


class EpochSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of keys `(index, epoch, draw)`; the order is a function of (seed, epoch).

    An epoch has `draws_per_image` draws of each image, or, with weights, as many draws in all with
    replacement. The last batch may be smaller; no image is lost. `draw` numbers the draws of an
    image within the epoch, so that each gets a crop of its own.

    Where several processes train together, `deal` gives each its share of every batch: batches and
    their number stay the same, and each key goes to one process. Shares differ by one key at most.
    A process without a key in a batch smaller than the number of processes gets the batch's first
    one, to keep step with the others; `share` says that it counts as nothing.

    Attributes:
        epoch: the epoch that the next iteration gives.
        start_batch: the batch of it to begin with.
        num_draws: keys of an epoch.
        rank: number of this process among those that share the batches.
        ranks: number of these processes.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        draws_per_image: int | Sequence[int] = 1,
    ) -> None:
        """Begin at batch 0 of epoch 0.

        Args:
            num_images: images to draw from.
            batch_size: keys a batch.
            seed: of the order, 0 or more.
            weights: draw with replacement, images in proportion to these; None to shuffle.
            draws_per_image: draws of every image an epoch, or a number for each image.

        Raises:
            SettingsError: if `batch_size` or `draws_per_image` is below 1, or `seed` below 0.
        """
        fewest = np.min(draws_per_image, initial=1)
        check_at_least(1, batch_size=batch_size, draws_per_image=fewest)
        check_at_least(0, seed=seed)
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self.draws_per_image = draws_per_image
        self.num_draws = int(np.broadcast_to(draws_per_image, num_images).sum())
        self.set_epoch(0)
        self.deal(0, 1)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration gives, and the batch to begin with."""
        self.epoch = epoch
        self.start_batch = start_batch

    def deal(self, rank: int, ranks: int) -> None:
        """Give only this process's share of each batch from the next iteration on."""
        self.rank, self.ranks = rank, ranks

    def share(self, batch: int) -> tuple[int, int]:
        """Return how many keys of a batch are this process's, and how many it has in all."""
        left = self.num_draws - batch * self.batch_size
        whole = min(self.batch_size, left)
        return len(range(self.rank, whole, self.ranks)), whole

    def __len__(self) -> int:
        """Return the batches of a whole epoch, wherever the next iteration begins."""
        return -(-self.num_draws // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the epoch's batches from `start_batch` on, or this process's share of each."""
        keys = self._keys()
        for first in range(self.start_batch * self.batch_size, len(keys), self.batch_size):
            batch = keys[first : first + self.batch_size]
            yield batch[self.rank :: self.ranks] or batch[:1]

    def _keys(self) -> list[tuple[int, int, int]]:
        """Return all keys of the epoch, in order."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.weights is None:
            counts = np.broadcast_to(self.draws_per_image, self.num_images)
            every_draw = np.nonzero(np.arange(counts.max(initial=0))[:, None] < counts)
            draws, indices = np.stack(every_draw)[:, rng.permutation(self.num_draws)]
        else:
            share = self.weights / self.weights.sum()
            indices = rng.choice(self.num_images, self.num_draws, p=share)
            draws = np.arange(self.num_draws)
        return [(int(i), self.epoch, int(d)) for i, d in zip(indices, draws, strict=True)]


class OrderedSampler(Sampler[int]):
    """Every image once, in order; where several processes share them, every so many-th."""

    def __init__(self, num_images: int) -> None:
        """Give all of them."""
        self.num_images = num_images
        self.deal(0, 1)

    def deal(self, rank: int, ranks: int) -> None:
        """Give images rank, rank + ranks, ... from the next iteration on."""
        self.shared = range(rank, self.num_images, ranks)

    def __len__(self) -> int:
        """Return the number of images that are given."""
        return len(self.shared)

    def __iter__(self) -> Iterator[int]:
        """Yield their indices."""
        return iter(self.shared)


def log_balanced_weights(class_counts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return a weight for each image that favours images of rare classes.

    The weight is the mean over the image's cells of log1p(cells of the largest class / cells of
    the cell's class), counted over all images. An image without cells gets the smallest weight
    of the others, so that negatives are still seen.

    Args:
        class_counts: for each image the number of cells of each class, [images, C].

    Returns:
        float64 array [images], all above 0; all 1 if there are no cells at all.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    totals, cells = counts.sum(axis=0), counts.sum(axis=1)
    if not cells.any():
        return np.ones(len(counts))
    rarity = np.log1p(totals.max() / np.maximum(totals, 1))
    weights = (counts @ rarity) / np.maximum(cells, 1)
    weights[cells == 0] = weights[cells > 0].min()
    return weights


def count_crops(dataset: CellDataset, crop_size: int) -> list[int]:
    """Return how many crops of `crop_size` pixels a side each image has room for, by its area.

    Rounded, and at least 1. Reads the size of each image only.

    Raises:
        DataError: if the header of an image cannot be read; names it.
    """
    sizes = (read_size(dataset.files(index).image) for index in range(len(dataset)))
    return [max(1, round(height * width / crop_size**2)) for height, width in sizes]


def make_loaders(
    train_dataset: CellDataset,
    val_dataset: Dataset | None,
    *,
    batch_size: int,
    workers: int = 2,
    seed: int = 0,
    sampler: SamplerName = "shuffle",
    draws_per_image: int | Sequence[int] = 1,
) -> tuple[DataLoader, DataLoader | None]:
    """Return the loaders of training and validation; both give `(images, targets)` as lists.

    Call `train_loader.batch_sampler.set_epoch(epoch)` before each epoch: the order of the epoch
    depends on (seed, epoch) alone, what is drawn for a sample on the dataset's seed, the epoch,
    the image and the draw; the number of workers changes neither.

    Args:
        train_dataset: training samples with their transform.
        val_dataset: validation samples, given one by one in order; None makes None of its loader.
        batch_size: images a training batch, of all processes together where several train; the
            last batch of an epoch may be smaller.
        workers: processes that read ahead, 0 to read in this one. They stay alive between
            epochs and compute on one thread each.
        seed: of the order, 0 or more.
        sampler: "shuffle" for every image equally often, "area" for every image once for each
            crop of the transform's `crop_size` that it has room for (see `count_crops`),
            "log_balanced" to draw with replacement by `log_balanced_weights` (reads all maps once).
        draws_per_image: how often an image is drawn in an epoch (on average if balanced, for each
            crop it has room for with "area"); a number for all or one for each.

    Raises:
        SettingsError: if a setting has a value that cannot work.
    """
    if sampler not in SAMPLERS:
        raise SettingsError(f"sampler is {sampler!r}; use one of {', '.join(SAMPLERS)}")
    check_at_least(0, workers=workers)
    weights = None
    if sampler == "area":
        crop_size = getattr(train_dataset.transform, "crop_size", None)
        if crop_size is None:
            raise SettingsError("sampler 'area' needs a transform with a crop_size; use 'shuffle'")
        crops = count_crops(train_dataset, crop_size)
        draws_per_image = (np.asarray(crops) * draws_per_image).tolist()
    if sampler == "log_balanced":
        counts = [train_dataset.class_counts(index) for index in range(len(train_dataset))]
        weights = log_balanced_weights(counts)
    batches = EpochSampler(
        len(train_dataset),
        batch_size,
        seed=seed,
        weights=weights,
        draws_per_image=draws_per_image,
    )
    options: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "collate_fn": collate,
        "worker_init_fn": _leave_interrupts_to_parent,
        "pin_memory": torch.cuda.is_available(),
    }
    train_loader = DataLoader(train_dataset, batch_sampler=batches, **options)
    if val_dataset is None:
        return train_loader, None
    in_order = OrderedSampler(len(val_dataset))
    return train_loader, DataLoader(val_dataset, batch_size=1, sampler=in_order, **options)


def _leave_interrupts_to_parent(worker: int) -> None:
    """Let signals that reach every process of a job be handled by the one that trains.

    SIGTERM is left to torch, whose workers end with the process that started them; a launcher
    sends it to a whole group of processes, so workers leave the one they were started in.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def collate(samples: Sequence[tuple[torch.Tensor, Any]]) -> tuple[list[torch.Tensor], list[Any]]:
    """Return the images and the targets of a batch as two lists; images may differ in size."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)

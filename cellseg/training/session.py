"""What a run holds between steps: model, average, optimiser, and how far it is.

A session moves in steps. After each step its state is whole: saved and loaded there, it goes on bit
for bit as if it had not been interrupted.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cellseg.errors import CheckpointError, TrainingError
from cellseg.training.averaging import WeightAverage
from cellseg.training.distributed import ALONE, Ranks, rank_errors
from cellseg.training.generators import generator_states, restore_generators
from cellseg.training.precision import autocast
from cellseg.training.schedule import TrainingLength, learning_rate_share
from cellseg.training.validation import forked_seed, to_device

SEED_STRIDE = 1_000_003  # keeps the draws of (seed, step) apart for neighbouring seeds
RANK_STRIDE = 15_485_863  # and those of the ranks of one step
MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient, after which training stops

Batch = tuple[Sequence[Tensor], Sequence[dict[str, Any]]]
Share = tuple[int, int]  # images of a batch that this process has, and that all have together


class Session:
    """A model in training, and everything that its next step depends on.

    Attributes:
        epoch: epochs that are closed.
        batch: batches of the current epoch that are done.
        step: optimiser steps so far.
        seconds: of training so far, loading included.
        best_ap50: the best validation so far; -1 before the first.
        history: the summaries of the closed epochs, as plain dicts.
        average: the trailing average of the weights.
        ranks: the processes that take each step together; all of them hold the same.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batches_per_epoch: int,
        length: TrainingLength,
        learning_rate: float,
        weight_decay: float,
        warmup: float,
        clip_norm: float,
        ema_decay: float,
        accumulate: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        """Start at step 0; for the arguments see `fit`."""
        self.model = model.to(device)
        self.ranks, self.network = ranks, ranks.wrap(self.model)
        self.device, self.dtype, self.length, self.seed = device, dtype, length, seed
        self.learning_rate, self.warmup, self.clip_norm = learning_rate, warmup, clip_norm
        self.accumulate, self.batches_per_epoch = accumulate, batches_per_epoch
        self.optimiser = torch.optim.AdamW(split_by_decay(model, weight_decay), lr=learning_rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.average = WeightAverage(model, ema_decay)
        self.epoch = self.batch = self.step = 0
        self.seconds, self.best_ap50 = 0.0, -1.0
        self.history: list[dict[str, Any]] = []
        self.micro_batches = 1
        self.skipped: list[list[int]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forget what was added up over the epoch before."""
        self.batch, self.epoch_images, self.epoch_seconds = 0, 0, 0.0
        self.loss_sums: dict[str, Tensor] = {}
        self.summed_batches = 0

    @property
    def steps_per_epoch(self) -> int:
        """The optimiser steps of a whole epoch."""
        return math.ceil(self.batches_per_epoch / self.accumulate)

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0-1."""
        within_epoch = math.ceil(self.batch / self.accumulate)
        done = self.epoch * self.steps_per_epoch + within_epoch
        return self.length.progress(done, self.steps_per_epoch, self.seconds)

    @property
    def mean_losses(self) -> dict[str, float]:
        """The mean of each part of the loss over the epoch so far, skipped batches apart."""
        count = max(self.summed_batches, 1)
        return {name: float(value) / count for name, value in self.loss_sums.items()}

    def train_step(self, group: Sequence[Batch], shares: Sequence[Share] | None = None) -> None:
        """Change the weights once by the gradients of a group of batches.

        Several processes give the gradient of the mean over all images of a batch: each weighs
        its loss by its share. It is the gradient of the whole batch as far as the model's losses
        are means over images; those over cells (masks) are so within a process only.

        A loss or gradient that is not finite changes nothing; after `MAX_SKIPPED` in a row, or a
        whole epoch of them, training stops. Where memory runs out, the batches are cut into
        smaller ones whose gradients are added up; not if batch norms are trained, which would
        see other batches.

        Raises:
            TrainingError: as said; the weights are those of the last good step.
        """
        rate = self.learning_rate * learning_rate_share(self.progress, warmup=self.warmup)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = rate
        with self._norms_kept_if_not_finite() as outcome:
            shares = shares or [(len(images), len(images)) for images, _ in group]
            losses = self._add_gradients_within_memory(group, shares)
            self._meet_other_ranks(losses, shares)
            outcome["finite"] = finite = self._change_weights(losses)
        ids = [target["image_id"] for _, targets in group for target in targets]
        if finite:
            self.skipped = []
            self.summed_batches += len(group)
            for name, value in losses.items():
                self.loss_sums[name] = self.loss_sums.get(name, 0.0) + value
        else:
            self.skipped.append(ids)
        self.step += 1
        self.batch += len(group)
        self.epoch_images += sum(whole for _, whole in shares)
        if not finite:
            self._tell_of_skipped(losses)

    def _tell_of_skipped(self, losses: dict[str, Tensor]) -> None:
        """Warn of a step that was skipped, or stop after too many of them."""
        place = f"epoch {self.epoch + 1}, batch {self.batch}"
        parts = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        count = len(self.skipped)
        if count < min(MAX_SKIPPED, self.steps_per_epoch):
            warnings.warn(
                f"loss or gradient is not finite in {place} (images {self.skipped[-1]}; {parts}): "
                "step skipped",
                stacklevel=3,
            )
            return
        images = sorted({image_id for some in self.skipped for image_id in some})
        self.skipped = []  # whoever goes on regardless has as many again
        raise TrainingError(
            f"loss or gradient is not finite in {count} steps in a row, up to {place} (images "
            f"{images}; {parts}); lower learning_rate or use precision='float32', and look at "
            "these images"
        )

    def _meet_other_ranks(self, losses: dict[str, Tensor], shares: Sequence[Share]) -> None:
        """Add up the losses of all ranks, average the statistics of trained norms."""
        if not self.ranks.several:
            return
        weight = sum(mine for mine, _ in shares) / sum(whole for _, whole in shares)
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        buffers = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
        for buffer in buffers:
            buffer.mul_(weight)
        if self.device.type == "cuda":
            self.ranks.confirm()
        self.ranks.add_up([*losses.values(), *buffers])

    def _add_gradients_within_memory(
        self, group: Sequence[Batch], shares: Sequence[Share]
    ) -> dict[str, Tensor]:
        """Return the losses of a group, its gradients added up; smaller pieces if memory ends."""
        before = self.micro_batches
        largest = max(len(images) for images, _ in group)
        while (losses := self._gradients_or_none(group, shares)) is None:
            if self.ranks.several and self.micro_batches < largest:
                fits = self.ranks.count * math.ceil(largest / self.micro_batches / 2)
                raise TrainingError(
                    f"out of memory with {math.ceil(largest / self.micro_batches)} images in a "
                    f"process; batch_size={fits} may fit ({self.ranks.count} processes share a "
                    "batch, and cannot cut it smaller each for itself)"
                )
            if self.micro_batches >= largest:
                self.micro_batches = before
                raise TrainingError(
                    "out of memory with one image at a time; lower crop_size, image_scale, "
                    "rois_per_image or fpn_channels, and run again to go on"
                )
            self.micro_batches *= 2
        if self.micro_batches > before:
            self._tell_of_cut(largest, before)
        return losses

    def _gradients_or_none(
        self, group: Sequence[Batch], shares: Sequence[Share]
    ) -> dict[str, Tensor] | None:
        """Add the gradients of a group, or leave none of them and return None: memory ran out."""
        try:
            with rank_errors() if self.ranks.several else nullcontext():
                return self._add_gradients(group, shares)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not _is_out_of_memory(error):
                raise
        # Only here, with the error gone, are the tensors of the failed step free.
        self.optimiser.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _tell_of_cut(self, largest: int, before: int) -> None:
        """Say that batches are cut from now on, or stop where that changes the result."""
        failed, fits = (math.ceil(largest / pieces) for pieces in (before, self.micro_batches))
        if any(isinstance(module, _BatchNorm) for module in self.model.modules()):
            self.micro_batches = before
            raise TrainingError(
                f"out of memory with {failed} images a batch; {fits} fit: use batch_size={fits} "
                "(the model's batch norms are trained, so that a batch cannot be cut without "
                "changing them)"
            )
        warnings.warn(
            f"out of memory with {failed} images at a time: going on with {fits}, gradients added "
            "up to the same batch",
            stacklevel=4,
        )

    def _add_gradients(self, group: Sequence[Batch], shares: Sequence[Share]) -> dict[str, Tensor]:
        """Add the gradients of a group of batches; return the sums of their losses.

        With the last piece the gradients of all ranks are averaged: hence the factor.
        """
        sums: dict[str, Tensor] = {}
        ranks = self.ranks
        for number, (images, targets) in enumerate(group):
            mine, whole = shares[number]
            seed = self.seed * SEED_STRIDE + self.epoch * self.batches_per_epoch + self.batch
            size = math.ceil(len(images) / self.micro_batches)
            with forked_seed(seed + number + 1 + ranks.rank * RANK_STRIDE, self.device):
                for first in range(0, len(images), size):
                    part = slice(first, first + size)
                    moved = to_device(images[part], targets[part], self.device)
                    share = len(moved[0]) / len(images) * (mine / whole)
                    last = number == len(group) - 1 and first + size >= len(images)
                    with ranks.exchanging(self.network, last):
                        with autocast(self.device, self.dtype):
                            losses = self.network(*moved)
                            loss = sum(losses.values())
                        weight = share * ranks.count / self.accumulate
                        self.scaler.scale(loss * weight).backward()
                    for name, value in losses.items():
                        sums[name] = sums.get(name, 0.0) + value.detach() * share
        return sums

    def _change_weights(self, losses: dict[str, Tensor]) -> bool:
        """Step if losses and gradients are finite; tell whether they are."""
        finite = bool(torch.isfinite(sum(losses.values())))
        if finite:
            self.scaler.unscale_(self.optimiser)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            # With float16 the scaler skips what overflows, and lowers its factor.
            finite = self.scaler.is_enabled() or bool(torch.isfinite(norm))
        if finite:
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.average.update(self.model)
        self.optimiser.zero_grad(set_to_none=True)
        return finite

    @contextmanager
    def _norms_kept_if_not_finite(self) -> Iterator[dict[str, bool]]:
        """Put the running statistics of trained norms back if the step turns out not finite."""
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
        outcome = {"finite": False}
        try:
            yield outcome
        finally:
            if not outcome["finite"]:
                for norm, saved in zip(norms, before, strict=True):
                    for buffer, value in zip(norm.buffers(), saved, strict=True):
                        buffer.copy_(value)

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": self.average.model.state_dict(),
            "ema_updates": self.average.updates,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step},
            "seconds": self.seconds,
            "this_epoch": {
                "images": self.epoch_images,
                "seconds": self.epoch_seconds,
                "loss_sums": dict(self.loss_sums),
                "summed_batches": self.summed_batches,
            },
            "batches_per_epoch": self.batches_per_epoch,
            "micro_batches": self.micro_batches,
            "skipped": self.skipped,
            "best_ap50": self.best_ap50,
            "history": self.history,
            "generators": generator_states(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state that `state` returned.

        Where an epoch now has another number of batches, one that was begun begins anew.

        Raises:
            CheckpointError: if it does not fit this model and optimiser.
        """
        decays = [group["weight_decay"] for group in self.optimiser.param_groups]
        try:
            self.model.load_state_dict(state["model"])
            self.average.model.load_state_dict(state["ema"])
            self.optimiser.load_state_dict(state["optimiser"])
            if state["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self._load_numbers(state)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"the saved state does not fit this model or version ({reason}); choose another "
                "run_dir"
            ) from error
        for group, decay in zip(self.optimiser.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        if self.batch and state["batches_per_epoch"] != self.batches_per_epoch:
            self.begin_epoch()
        restore_generators(state["generators"])

    def _load_numbers(self, state: dict[str, Any]) -> None:
        """Take up all of a state that is not a tensor of model or optimiser."""
        position, this_epoch = state["position"], state["this_epoch"]
        self.average.updates = state["ema_updates"]
        self.epoch, self.batch, self.step = (position[key] for key in ("epoch", "batch", "step"))
        self.epoch_images, self.epoch_seconds = this_epoch["images"], this_epoch["seconds"]
        self.summed_batches = this_epoch["summed_batches"]
        sums = this_epoch["loss_sums"]
        self.loss_sums = {name: value.to(self.device) for name, value in sums.items()}
        self.seconds, self.best_ap50 = state["seconds"], state["best_ap50"]
        self.micro_batches = state["micro_batches"]
        self.skipped, self.history = state["skipped"], state["history"]


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, which each device says in its own way."""
    text = str(error).lower()
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "out of memory" in text or "can't allocate memory" in text


def split_by_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: kernels and matrices decay, norms and biases do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]

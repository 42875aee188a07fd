"""The training loop: `for epoch in fit(...)`.

The run is a function of its arguments: the order of the images depends on (seed, epoch), what is
drawn for a sample on (seed, epoch, index), and what is drawn inside the losses on (seed, step).
Workers and interruptions change none of them.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cellseg.data import SampleImages
from cellseg.errors import CheckpointError, SettingsError, TrainingError
from cellseg.evaluation import dataset_truth, score_records
from cellseg.files import read_json
from cellseg.inference import predict_images
from cellseg.training.averaging import WeightAverage
from cellseg.training.checkpoint import read_checkpoint, write_checkpoint
from cellseg.training.precision import autocast, pick_device, pick_precision
from cellseg.training.run import EpochSummary, read_history, write_history
from cellseg.training.schedule import Length, learning_rate_share
from cellseg.training.validation import Validation, forked_seed, to_device, validate

SEED_STRIDE = 1_000_003  # keeps the draws of (seed, step) apart for neighbouring seeds


def fit(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    run_dir: str | Path,
    epochs: int | None = 50,
    time_budget: float | None = None,
    learning_rate: float = 2e-4,
    weight_decay: float = 0.05,
    warmup: float = 0.05,
    clip_norm: float = 5.0,
    ema_decay: float = 0.999,
    accumulate: int = 1,
    validate_every: int = 1,
    probe_images: int = 4,
    precision: str = "auto",
    device: str = "auto",
    seed: int = 0,
    resume: str = "auto",
    progress: bool = True,
) -> Iterator[EpochSummary]:
    """Train a model and yield a summary after each epoch.

    AdamW without decay on norms and biases, linear warm-up and a cosine over the whole length,
    clipped gradients, mixed precision where it is safe, and an average of the weights that is
    what is validated, kept as `best.pt` (by `ap50`) and used to predict. After each epoch
    `metrics.jsonl`, `last.pt` and, if it is the best, `best.pt` lie in the run's folder.

    Args:
        model: a model of `cellseg.models`; changed in place and moved to the device.
        train_loader: from `make_loaders`; gives lists of images and targets.
        val_loader: from `make_loaders`; its dataset has `class_names` and `read`.
        run_dir: folder of the run; made if missing.
        epochs: length of the run; None with a time budget.
        time_budget: seconds of training, loading included and validation not, after which the
            run ends, its schedule with it; the last epoch may be cut short.
        learning_rate: at its peak, for the whole model.
        weight_decay: of AdamW, for weight matrices and kernels.
        warmup: share of the run over which the learning rate rises.
        clip_norm: largest norm of the gradient; longer ones are shortened to it.
        ema_decay: of the weights' average, reached after its warm-up.
        accumulate: batches whose gradients are added up for one step.
        validate_every: validate after every so many epochs, and after the last.
        probe_images: training images that `train_ap50` is measured on.
        precision: "auto", "float32", "bfloat16" or "float16"; see `pick_precision`.
        device: "auto", "cuda", "mps" or "cpu".
        seed: of the draws inside the losses.
        resume: "auto" goes on from `last.pt` where there is one, "never" refuses to.
        progress: show bars with the time left.

    Yields:
        one `EpochSummary` per epoch trained in this call; nothing if the run is finished.

    Raises:
        TrainingError: if the loss is not finite (says where), or the folder holds a run and
            `resume` is "never".
        CheckpointError: if `last.pt` is damaged or belongs to another model.
        SettingsError: if a setting cannot work.
    """
    _check(accumulate, validate_every, resume)
    session = _Session(
        model,
        train_loader,
        val_loader,
        Path(run_dir),
        length=Length(epochs, time_budget),
        optimiser={"lr": learning_rate, "weight_decay": weight_decay},
        warmup=warmup,
        clip_norm=clip_norm,
        ema_decay=ema_decay,
        accumulate=accumulate,
        device=pick_device(device),
        precision=precision,
        seed=seed,
        progress=progress,
    )
    session.resume(resume)
    probe = _probe_dataset(train_loader.dataset, probe_images)
    truths = None
    while session.progress() < 1:
        session.train_epoch()
        scored = session.epoch % validate_every == 0 or session.progress() >= 1
        if scored and truths is None:
            truths = dataset_truth(val_loader.dataset), dataset_truth(probe)
        yield session.close_epoch(probe, truths if scored else None)


def _check(accumulate: int, validate_every: int, resume: str) -> None:
    """Raise SettingsError for a setting that nothing else looks at before training."""
    for name, value in (("accumulate", accumulate), ("validate_every", validate_every)):
        if value < 1:
            raise SettingsError(f"{name}={value}; 1 or more")
    if resume not in ("auto", "never"):
        raise SettingsError(f"resume={resume!r}; use auto or never")


def split_by_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: kernels and matrices decay, norms and biases do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class _Session:
    """What a run holds between steps: model, average, optimiser, and how far it is."""

    def __init__(
        self,
        model: nn.Module,
        train_loader: DataLoader,
        val_loader: DataLoader,
        run_dir: Path,
        *,
        length: Length,
        optimiser: dict[str, float],
        warmup: float,
        clip_norm: float,
        ema_decay: float,
        accumulate: int,
        device: torch.device,
        precision: str,
        seed: int,
        progress: bool,
    ) -> None:
        self.model = model.to(device)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.run_dir, self.length, self.device, self.seed = run_dir, length, device, seed
        self.warmup, self.clip_norm, self.accumulate = warmup, clip_norm, accumulate
        self.show = progress
        self.dtype = pick_precision(device, precision)
        self.learning_rate = optimiser["lr"]
        self.optimiser = torch.optim.AdamW(
            split_by_decay(model, optimiser["weight_decay"]), lr=self.learning_rate
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.average = WeightAverage(model, ema_decay)
        self.steps_per_epoch = math.ceil(len(train_loader) / accumulate)
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.best_ap50 = -1.0
        self.history: list[EpochSummary] = []
        self.epoch_losses: dict[str, float] = {}
        self.epoch_images, self.epoch_seconds = 0, 0.0

    def progress(self, running: float = 0.0) -> float:
        """Return the share of the run that is done, 0-1."""
        return self.length.progress(self.step, self.steps_per_epoch, self.seconds + running)

    def train_epoch(self) -> None:
        """Pass over the training loader once, or until the time is up."""
        self.model.train()
        self.train_loader.batch_sampler.set_epoch(self.epoch)
        start, images_seen, batches = time.perf_counter(), 0, 0
        sums: dict[str, Tensor] = {}
        last = len(self.train_loader)
        of = f"/{self.length.epochs}" if self.length.epochs else ""
        bar = tqdm(
            self.train_loader,
            desc=f"epoch {self.epoch + 1}{of}",
            unit="batch",
            disable=not self.show,
            leave=False,
        )
        with bar:
            for batches, (images, targets) in enumerate(bar, start=1):
                running = time.perf_counter() - start
                self._set_learning_rate(self.progress(running))
                losses = self._backward(images, targets, batches)
                if batches % self.accumulate == 0 or batches == last:
                    self._step()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.detach()
                images_seen += len(images)
                bar.set_postfix_str(self._left(running), refresh=False)
                if self.length.time_budget and self.progress(running) >= 1:
                    break
        self.epoch_seconds = time.perf_counter() - start
        self.seconds += self.epoch_seconds
        self.epoch += 1
        self.epoch_images = images_seen
        self.epoch_losses = {name: float(value) / batches for name, value in sums.items()}

    def _backward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]], batch: int
    ) -> dict[str, Tensor]:
        """Add the gradients of one batch; return its losses."""
        images, targets = to_device(images, targets, self.device)
        draws = self.seed * SEED_STRIDE + self.epoch * len(self.train_loader) + batch
        with forked_seed(draws, self.device), autocast(self.device, self.dtype):
            losses = self.model(images, targets)
            loss = sum(losses.values())
        if not math.isfinite(loss.item()):
            parts = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            ids = [target["image_id"] for target in targets]
            raise TrainingError(
                f"the loss is not finite in epoch {self.epoch + 1}, batch {batch} (images {ids}: "
                f"{parts}); lower learning_rate or use precision='float32'; last.pt holds the "
                "state after the epoch before"
            )
        self.scaler.scale(loss / self.accumulate).backward()
        return losses

    def _step(self) -> None:
        """Change the weights by the gradients added up, and let the average follow."""
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(self.model)
        self.step += 1

    def _set_learning_rate(self, progress: float) -> None:
        """Set the learning rate of this point of the run."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * learning_rate_share(progress, warmup=self.warmup)

    def _left(self, running: float) -> str:
        """Return the time that the whole run still takes, validation apart."""
        done = self.progress(running)
        if not done:
            return ""
        return f"run: {tqdm.format_interval((self.seconds + running) * (1 / done - 1))} left"

    def close_epoch(self, probe: Any, truths: tuple[Any, Any] | None) -> EpochSummary:
        """Validate if truths are given, keep the epoch's results, and return its summary."""
        validation, scores, probe_ap50 = Validation({}, []), None, None
        if truths is not None:
            averaged = self.average.model
            validation = validate(
                averaged, self.val_loader, seed=self.seed, dtype=self.dtype, progress=self.show
            )
            scores = score_records(truths[0], validation.records)
            with autocast(self.device, self.dtype):
                records = predict_images(
                    averaged, SampleImages(probe), score_threshold=0.0, progress=False
                )
            probe_ap50 = score_records(truths[1], records).ap50
        val = validation.losses
        summary = EpochSummary(
            epoch=self.epoch,
            step=self.step,
            learning_rate=self.optimiser.param_groups[0]["lr"],
            train_loss=sum(self.epoch_losses.values()),
            val_loss=sum(val.values()) if val else None,
            losses={"train": self.epoch_losses, "val": val},
            ap=scores and scores.ap,
            ap50=scores and scores.ap50,
            ap75=scores and scores.ap75,
            ap50_100=scores and scores.ap50_100,
            ap50_per_class=scores.ap50_per_class if scores else {},
            train_ap50=probe_ap50,
            seconds=self.epoch_seconds,
            images_per_second=self.epoch_images / self.epoch_seconds,
            peak_memory_mb=peak_memory_mb(self.device),
        )
        self._save(summary)
        return summary

    def _save(self, summary: EpochSummary) -> None:
        """Write the epoch into the run's folder: the best weights, the history, the state."""
        self.history.append(summary)
        settings_path = self.run_dir / "settings.json"
        common = {
            "spec": self.model.spec,
            "provenance": self.model.provenance,
            "settings": read_json(settings_path) if settings_path.exists() else {},
            "epoch": self.epoch,
        }
        averaged = self.average.model.state_dict()
        if summary.ap50 is not None and summary.ap50 > self.best_ap50:
            self.best_ap50 = summary.ap50
            write_checkpoint(
                self.run_dir / "best.pt", common | {"model": averaged, "ap50": summary.ap50}
            )
        write_history(self.run_dir, self.history)
        state = {
            "model": self.model.state_dict(),
            "ema": averaged,
            "ema_updates": self.average.updates,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best_ap50": self.best_ap50,
        }
        write_checkpoint(self.run_dir / "last.pt", common | state)

    def resume(self, how: str) -> None:
        """Take up the state in the run's folder, if there is one."""
        path = self.run_dir / "last.pt"
        if not path.exists():
            return
        if how != "auto":
            raise TrainingError(f"{path} exists; use resume='auto' to go on, or another run_dir")
        state = read_checkpoint(path)
        if _network(state["spec"]) != _network(self.model.spec):
            raise CheckpointError(
                f"{path} was written by {state['spec']}, not by this model "
                f"({self.model.spec}); choose another run_dir"
            )
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["ema"])
        self.average.updates = state["ema_updates"]
        self.optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:  # empty where the run was in another precision so far
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.best_ap50 = state["seconds"], state["best_ap50"]
        self.history = read_history(self.run_dir)[: self.epoch]


def _network(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a spec without the place of its first weights, which a checkpoint replaces."""
    arguments = {key: value for key, value in spec["arguments"].items() if key != "weights"}
    return spec | {"arguments": arguments}


def _probe_dataset(dataset: Any, count: int) -> Any:
    """Return a few training images, spread over the sorted ids, as they lie on disk."""
    ids = dataset.sample_ids
    count = min(count, len(ids))
    chosen = [ids[index * len(ids) // count] for index in range(count)]
    return dataset.subset(chosen)


def peak_memory_mb(device: torch.device) -> float | None:
    """Return the most memory that was in use so far, in MB: the GPU's, or this process's.

    None where the system does not tell (Windows without a GPU).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
        import sys
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

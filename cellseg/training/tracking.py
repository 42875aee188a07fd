"""Trackers: epochs told to a program that draws them, which never stops training."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cellseg.errors import SettingsError
from cellseg.training.run import EpochSummary

TRACKERS = ("none", "tensorboard")


class Tracker(Protocol):
    """What is told each epoch."""

    def log(self, summary: EpochSummary) -> None:
        """Take an epoch."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Writes scalars for `tensorboard --logdir runs`, into the run's folder, offline."""

    def __init__(self, run_dir: Path) -> None:
        """Open `tensorboard/` in the run's folder.

        Raises:
            ImportError: if TensorBoard is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run_dir / "tensorboard")

    def log(self, summary: EpochSummary) -> None:
        """Write an epoch's numbers, by epoch; what was not measured is left out."""
        for name, value in scalars(summary).items():
            self.writer.add_scalar(name, value, summary.epoch)
        self.writer.flush()

    def close(self) -> None:
        """Close the file of events."""
        self.writer.close()


class SafeTracker:
    """Makes a tracker, and gives up on it, with one warning, when it first fails."""

    def __init__(self, name: str, run_dir: Path) -> None:
        """Make the tracker of this name.

        Raises:
            SettingsError: if there is none of this name.
        """
        if name not in TRACKERS:
            raise SettingsError(f"tracker is {name!r}; use one of {', '.join(TRACKERS)}")
        self.name = name
        self.tracker: Tracker | None = None
        if name == "tensorboard":
            with self._failures_forgiven():
                self.tracker = TensorBoard(run_dir)

    def log(self, summary: EpochSummary) -> None:
        """Tell the tracker an epoch."""
        if self.tracker is not None:
            with self._failures_forgiven():
                self.tracker.log(summary)

    def close(self) -> None:
        """Let the tracker write what is left."""
        if self.tracker is not None:
            with self._failures_forgiven():
                self.tracker.close()

    @contextmanager
    def _failures_forgiven(self) -> Iterator[None]:
        """Do without the tracker from its first failure on."""
        try:
            yield
        except Exception as error:  # whatever foreign code raises must not cost a run
            self.tracker = None
            missing = isinstance(error, ImportError)
            remedy = "; pip install tensorboard" if missing else ""
            warnings.warn(
                f"tracker {self.name!r} failed ({type(error).__name__}: {error}) and is left out"
                f"{remedy}; metrics.jsonl has every number",
                stacklevel=2,
            )


def scalars(summary: EpochSummary) -> dict[str, float]:
    """Return an epoch's numbers under the names they are drawn by."""
    values: dict[str, float | None] = {
        "loss/train": summary.train_loss,
        "loss/val": summary.val_loss,
        "ap/ap": summary.ap,
        "ap/ap50": summary.ap50,
        "ap/ap75": summary.ap75,
        "ap/ap50_100": summary.ap50_100,
        "ap/train_ap50": summary.train_ap50,
        "run/learning_rate": summary.learning_rate,
        "run/images_per_second": summary.images_per_second,
        "run/peak_memory_mb": summary.peak_memory_mb,
    }
    for part, losses in summary.losses.items():
        values |= {f"loss_{part}/{name}": value for name, value in losses.items()}
    values |= {f"ap50_of/{name}": value for name, value in summary.ap50_per_class.items()}
    return {name: value for name, value in values.items() if value is not None}

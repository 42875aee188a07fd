"""How far a run is, and the learning rate there: warm-up, then a cosine to nearly nothing."""

import math
from dataclasses import dataclass

from cellseg.errors import SettingsError, check_at_least

FINAL_SHARE = 0.01  # of the peak learning rate, where the cosine ends


@dataclass(frozen=True)
class TrainingLength:
    """How long a run is: a number of epochs, or seconds of training, whichever is given.

    Attributes:
        epochs: number of passes over the training loader; None with a time budget alone.
        time_budget: seconds of training (loading included, validation excluded), or None.
    """

    epochs: int | None
    time_budget: float | None = None

    def __post_init__(self) -> None:
        """Check that there is an end."""
        if self.epochs is None and self.time_budget is None:
            raise SettingsError("give epochs or time_budget; a run needs an end")
        if self.epochs is not None:
            check_at_least(1, epochs=self.epochs)
        if self.time_budget is not None and not 0 < self.time_budget < math.inf:
            raise SettingsError(f"time_budget is {self.time_budget}; give seconds, more than 0")

    def progress(self, step: int, steps_per_epoch: int, seconds: float) -> float:
        """Return the share of the run that is done, 0-1: by epochs or time, what is farther."""
        by_epochs = step / (self.epochs * steps_per_epoch) if self.epochs else 0.0
        by_time = seconds / self.time_budget if self.time_budget else 0.0
        return min(1.0, max(by_epochs, by_time))


def learning_rate_share(progress: float, *, warmup: float = 0.05) -> float:
    """Return the share of the peak learning rate at a point of the run.

    Args:
        progress: share of the run that is done, 0-1.
        warmup: share of the run over which the rate rises linearly from a tenth.

    Returns:
        0.1 to 1 during the warm-up, then half a cosine down to 0.01 (Loshchilov and Hutter,
        SGDR, 2017, without restarts).
    """
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    position = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, position)))
    return FINAL_SHARE + (1 - FINAL_SHARE) * cosine

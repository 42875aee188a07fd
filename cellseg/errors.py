"""The errors that users meet: each names the file, the value and the remedy."""


class CellsegError(Exception):
    """Base of every error that this package raises on purpose."""


class DataError(CellsegError):
    """An image, an instance map, a release or its index cannot be used as it is."""


class RecordsError(CellsegError):
    """A result file cannot be used.

    Attributes:
        faults: one line for each fault found, the first ten of them in the message.
    """

    def __init__(self, message: str, faults: list[str] | None = None) -> None:
        """Keep the faults beside the message."""
        super().__init__(message)
        self.faults = faults or []


class WeightsError(CellsegError):
    """Pretrained weights are missing or do not fit the model."""


class CheckpointError(CellsegError):
    """A checkpoint is damaged, foreign, or belongs to another run."""


class SettingsError(CellsegError):
    """A setting has a value that cannot work."""


class TrainingError(CellsegError):
    """Training cannot go on; the message says why and from where to continue."""


def check_at_least(least: float, **settings: float) -> None:
    """Raise SettingsError for the first setting that is below a number, or is none."""
    for name, value in settings.items():
        if not value >= least:  # NaN neither
            raise SettingsError(f"{name} is {value}; give {least} or more")

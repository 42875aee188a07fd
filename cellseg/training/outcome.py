"""How a run's last call of training ended, for whoever started it: a notebook, a batch script.

An exit code does not tell: launchers make one of their own out of several processes'.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cellseg.errors import DataError
from cellseg.files import read_json, write_atomically
from cellseg.training.interruption import TrainingInterrupted

OUTCOME_NAME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """What `outcome.json` says.

    Attributes:
        outcome: "running", "finished", "stopped" (the state is saved) or "failed".
        epochs_before: closed epochs when the call began.
        signal: name of the signal that stopped it, or None.
        message: what the call said at its end, "" if nothing.
    """

    outcome: str
    epochs_before: int
    signal: str | None = None
    message: str = ""


def read_outcome(run_dir: str | Path) -> Outcome | None:
    """Return how training in a run's folder stands; None if nothing usable says so."""
    try:
        return Outcome(**read_json(Path(run_dir) / OUTCOME_NAME))
    except (DataError, TypeError):
        return None


@contextmanager
def recorded_outcome(
    run_dir: str | Path, epochs_before: int, *, writes: bool = True
) -> Iterator[None]:
    """Keep `outcome.json` true to what happens in the block.

    Args:
        run_dir: the run's folder.
        epochs_before: closed epochs at the beginning.
        writes: False in a process that is not the one that writes.
    """

    def tell(outcome: str, signum: int | None = None, message: str = "") -> None:
        name = None if signum is None else signal.Signals(signum).name
        told = asdict(Outcome(outcome, epochs_before, name, message))
        if writes:
            with suppress(OSError):  # a full disk has been told about already
                write_atomically(Path(run_dir) / OUTCOME_NAME, json.dumps(told) + "\n")

    tell("running")
    try:
        yield
    except TrainingInterrupted as stopped:
        tell("stopped", stopped.signum, str(stopped))
        raise
    except (KeyboardInterrupt, GeneratorExit):
        tell("stopped")
        raise
    except Exception as error:
        tell("failed", message=str(error))
        raise
    tell("finished")

"""Signals while an epoch runs: the step ends, the state is saved, then training stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped because it was asked to, after its state was saved.

    Attributes:
        signum: the signal; a command line exits with 128 + signum, as shells do (130 for Ctrl-C
            and the notebook's stop button, 143 for SIGTERM, 138 for SIGUSR1 on Linux).
    """

    def __init__(self, message: str, signum: int) -> None:
        """Keep the signal's number."""
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Whether a signal has asked to stop: `signum` is None until one does."""

    def __init__(self) -> None:
        """Start without a request."""
        self.signum: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a request for as long as the block runs.

    The first signal is noted for the block to see; a second one raises KeyboardInterrupt at once.
    The handlers that were there before are put back at the end. Only the main thread may set
    handlers; in another thread the block runs without them.
    """
    request = StopRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        if request.signum is not None:
            raise KeyboardInterrupt
        request.signum = signum

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.signal(signum, note) for signum in SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

"""Signals while an epoch runs: the step ends, the state is saved, then training stops."""

import signal
import threading
from collections.abc import Callable, Iterator
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
    """Whether a signal has asked to stop.

    Attributes:
        signum: the signal; None until one comes.
        at_once: makes what is raised as soon as a signal comes, where there is nothing to bring
            to an end first; None to note it only.
    """

    def __init__(self) -> None:
        """Start without a request."""
        self.signum: int | None = None
        self.at_once: Callable[[int], BaseException] | None = None


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
        if request.at_once is not None:
            raise request.at_once(signum)

    if not _is_main_thread():
        yield request
        return
    before = {signum: signal.signal(signum, note) for signum in SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def alarms_held_back(stop: StopRequest) -> Iterator[None]:
    """Hold back torch's alarm about a worker that died until the block is over.

    torch raises it from a handler of SIGCHLD, wherever the process happens to be: in the middle
    of a step it would leave half of the weights changed. After a request to stop, which may have
    reached the workers as well, there is no alarm.
    """
    if not hasattr(signal, "SIGCHLD") or not _is_main_thread():
        yield
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda signum, frame: noted.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    if noted and callable(before) and stop.signum is None:
        before(signal.SIGCHLD, None)


def _is_main_thread() -> bool:
    """Tell whether this thread may set handlers."""
    return threading.current_thread() is threading.main_thread()

"""A run's folder: one process at a time, and what is said if it cannot be written to."""

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cellseg.errors import TrainingError
from cellseg.files import FULL

LOCK_NAME = "run.lock"
SILENT_AFTER = 300.0  # seconds without a sign of life after which another machine's lock is stale
SIGN_EVERY = 30.0  # seconds between signs of life


@contextmanager
def disk_errors(run_dir: Path) -> Iterator[None]:
    """Raise TrainingError, with the remedy, where the block cannot write into the run's folder.

    torch's writer answers a full disk with a RuntimeError of its own.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        full = isinstance(error, RuntimeError) or error.errno in FULL
        what = "the disk is full" if full else str(error)
        remedy = "make space" if full else "check the folder's rights"
        raise TrainingError(
            f"{run_dir} cannot be written to ({what}); the last saved state is intact: {remedy} "
            "and run again to go on"
        ) from error


class RunLock:
    """A held lock; `sign_of_life` keeps it fresh for processes on other machines."""

    def __init__(self, path: Path) -> None:
        """Keep the path of the lock file, which this process owns."""
        self.path = path
        self._signed = time.monotonic()

    def sign_of_life(self) -> None:
        """Touch the lock, at most every 30 seconds."""
        if time.monotonic() - self._signed >= SIGN_EVERY:
            self._signed = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)


@contextmanager
def lock_run(run_dir: str | Path) -> Iterator[RunLock]:
    """Hold a run's folder for this process, so that no other one trains in it.

    A lock is stale, and taken over, if its process is gone from this machine, or if it belongs to
    another machine and has shown no sign of life for five minutes (a Colab session that was lost
    with its run on Drive).

    Raises:
        TrainingError: if another process holds the folder; names it.
    """
    path = Path(run_dir) / LOCK_NAME
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid())}
    mine["token"] = uuid.uuid4().hex
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            if _create(path, mine):
                break
            _remove_if_stale(path)
        else:
            raise TrainingError(f"{path} cannot be taken; others start in the same folder")
    try:
        yield RunLock(path)
    finally:
        with suppress(OSError):
            if _read(path).get("token") == mine["token"]:
                path.unlink()


def _create(path: Path, content: dict) -> bool:
    """Write the lock if there is none; tell whether it is ours."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> dict:
    """Return what a lock file says; nothing if it is torn."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _remove_if_stale(path: Path) -> None:
    """Remove a lock whose owner is gone; raise if it is alive."""
    try:
        owner, silent = _read(path), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return  # released meanwhile
    if _is_alive(owner, silent):
        raise TrainingError(
            f"{path.parent} is in use by process {owner.get('pid', '?')} on "
            f"{owner.get('host', '?')} (sign of life {silent:.0f} s ago); stop it first, use "
            f"another run name, or remove {path} if that process is gone"
        )
    # Taken aside first: of two processes that find the same stale lock one may have taken over
    # already, and its fresh lock is put back.
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        os.replace(path, aside)
        if _read(aside) != owner:
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _is_alive(owner: dict, silent: float) -> bool:
    """Tell whether a lock's owner may still be at work."""
    pid = owner.get("pid")
    if not isinstance(pid, int):
        return silent < 5  # perhaps being written at this moment; torn otherwise
    if owner.get("host") != socket.gethostname() or sys.platform == "win32":
        return silent < SILENT_AFTER
    if pid == os.getpid():
        return False  # an earlier run of this notebook cell, which was interrupted
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, and somebody else's
    return owner.get("born") in (None, _born(pid))


def _born(pid: int) -> str | None:
    """Return a process's start time where the system tells (Linux): numbers are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None

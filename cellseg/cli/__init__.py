"""The command line: `python -m cellseg <command>`, made from the functions the notebook calls."""

import os
import sys
import traceback

import typer

from cellseg.cli import checks, data, results, training  # noqa: F401  (each adds its commands)
from cellseg.cli.shared import app
from cellseg.errors import CellsegError
from cellseg.files import tell_refusal

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; what is the user's to mend becomes one line and exit code 1."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    try:
        app()
    except Exception as error:
        told = _told(error)
        if told is None and rank is None:
            raise
        if told is None:
            traceback.print_exc()
        else:
            whose = "" if rank is None else f"[rank {rank}] "
            typer.echo(f"{whose}error: {told}", err=True)
        _leave(rank)


def _told(error: Exception) -> str | None:
    """Return the sentence that an error is told in, None if its traceback must say it."""
    if isinstance(error, CellsegError):
        return str(error)
    return tell_refusal(error) if isinstance(error, OSError) else None


def _leave(rank: str | None) -> None:
    """Exit with code 1; one process of several at once, so that the others notice and end."""
    if rank is None:
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

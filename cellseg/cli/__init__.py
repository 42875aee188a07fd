"""The command line: `python -m cellseg <command>`, made from the functions the notebook calls."""

import os
import sys
import traceback

import typer

from cellseg.cli import checks, data, results, training  # noqa: F401  (each adds its commands)
from cellseg.cli.shared import app
from cellseg.errors import CellsegError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; our own errors become one line and exit code 1."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    try:
        app()
    except CellsegError as error:
        typer.echo(f"error: {error}" if rank is None else f"[rank {rank}] error: {error}", err=True)
        _leave(rank)
    except Exception:
        if rank is None:
            raise
        traceback.print_exc()
        _leave(rank)


def _leave(rank: str | None) -> None:
    """Exit with code 1; one process of several at once, so that the others notice and end."""
    if rank is None:
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

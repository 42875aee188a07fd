"""The app, and the arguments that several commands take."""

import os
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from cellseg.errors import SettingsError
from cellseg.files import read_text

app = typer.Typer(
    help="Segment cells with Mask R-CNN, from annotated images to a checked result file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Names = Annotated[
    str | None,
    typer.Option(
        "--class-names",
        help="Names of class1, class2, ..., with commas between; default: those in the "
        "release's class_names.json, else the course's four.",
        show_default=False,
    ),
]
Ids = Annotated[
    str | None,
    typer.Option(
        help="Only these samples: folder names with commas between, or a file of one a line."
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cuda, mps or cpu.")]
TrainDir = Annotated[
    Path,
    typer.Argument(help="Folder of annotated samples: a folder each, with image and class maps."),
]


def option(text: str) -> OptionInfo:
    """Return an option with this text beside it."""
    return typer.Option(help=text, show_default=False)


def pick_names(names: str | None, data: Path) -> tuple[str, ...]:
    """Return the names of the classes: as given, else as the data's release tells, else the four.

    Args:
        names: with commas between, or None.
        data: the release, or a folder or file directly in it.
    """
    from cellseg.data import CLASS_NAMES, find_class_names

    if names is None:
        return find_class_names(data) or CLASS_NAMES
    return tuple(name.strip() for name in names.split(",") if name.strip())


def read_ids(ids: str | None) -> list[str] | None:
    """Return ids given with commas between, or one a line in a file; None if none are given.

    Raises:
        SettingsError: if an option is given that names no sample.
    """
    if ids is None:
        return None
    # A long list is no name of a file: the system refuses to look for it, which isfile forgives.
    text = read_text(ids) if os.path.isfile(ids) else ids.replace(",", "\n")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise SettingsError(f"{ids!r} names no sample; give names of folders, or a file of them")
    return found

"""How all figures look: one colour a class, one ink, quiet axes, files with stable bytes."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellseg.errors import SettingsError
from cellseg.files import write_atomically

# Okabe and Ito's colours (told apart with any colour vision), a little brighter, in the order in
# which they stand out from purple nuclei on pink tissue.
CLASS_COLOURS = (
    "#FFD21F",
    "#4CC3FF",
    "#00BD8A",
    "#E8590C",
    "#FFFFFF",
    "#111111",
    "#0072B2",
    "#CC79A7",
)
INK = "#222222"
FAINT = "#8A8A8A"
GRID = "#E6E6E6"
TRAIN_COLOUR = "#E08A00"
VAL_COLOUR = "#0072B2"
_METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def class_colour(label: int) -> str:
    """Return the colour of a class (1 is the first; the colours repeat after eight)."""
    return CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure (inches) whose panes are laid out without overlaps."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def finish_axis(axis: Axes, title: str, x_label: str, y_label: str) -> None:
    """Give an axis its title and labels and take away what carries no data."""
    axis.set_title(title, fontsize=11, color=INK, loc="left")
    axis.set_xlabel(x_label, color=INK, fontsize=10)
    axis.set_ylabel(y_label, color=INK, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=9)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Name the rows of a horizontal plot, the first on top, with vertical grid lines."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color=GRID, linewidth=0.8)


def check_figure_path(path: str | Path) -> str:
    """Return the format that the path of a figure ends in.

    Raises:
        SettingsError: if it is not one of those that are written.
    """
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in _METADATA:
        raise SettingsError(f"figure {path} has no format; let it end in .png, .svg or .pdf")
    return kind


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure whole or not at all; the same figure gives the same bytes.

    Args:
        figure: what a function of `plots` returned.
        path: ends in .png, .svg or .pdf, which decides the format.
        dpi: pixels per inch (PNG only).

    Returns:
        the path.

    Raises:
        SettingsError: if the path ends in something else.
    """
    path = Path(path)
    kind = check_figure_path(path)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cellseg"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_METADATA[kind])
    write_atomically(path, buffer.getvalue())
    return path

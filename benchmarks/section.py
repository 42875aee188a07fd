"""A part of the results beside the rows: a table of its own with a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """One table of the results.

    Attributes:
        title: heading.
        text: what was measured, and how.
        header: names of the columns.
        rows: the cells, as they are printed.
        misses: what the figures miss of what they must reach, one phrase each.
    """

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    misses: Sequence[str] = field(default_factory=list)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns line up; all but the first are set flush right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "| "
        + " | ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    ]
    rule = [("-" * (w + 1) + ":") if place else "-" * (w + 2) for place, w in enumerate(widths)]
    return "\n".join([texts[0], "|" + "|".join(rule) + "|", *texts[1:]])


def seconds_text(seconds: float) -> str:
    """Return a time with three digits: 41.2 ms, 1.53 s."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"

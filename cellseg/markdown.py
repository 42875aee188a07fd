"""Tables, names and lists in Markdown, shown as they are whatever characters they hold."""

import re
from collections.abc import Collection, Iterable, Sequence

# What starts HTML, code, emphasis (within a word "_" is none), a formula, a cell of a table, a new
# line or a link's address.
_SPECIAL = re.compile(r"[&<>`*$\\~|\x00-\x1f]|\b_+|_+\b|\](?=[(\[:])")


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, flush_right: Collection[int] = ()
) -> str:
    """Return a Markdown table, without a newline at its end.

    Args:
        header: the columns' names; may be empty.
        rows: the cells as they are to be printed: what may hold any character goes through
            `escape` or `code` before.
        flush_right: columns, from 0, that are set flush right.
    """
    rule = "|" + "".join("---:|" if k in flush_right else "---|" for k in range(len(header)))
    return "\n".join([_line(header), rule, *map(_line, rows)])


def _line(cells: Iterable[str]) -> str:
    """Return one row of a table."""
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def escape(text: str) -> str:
    """Return a text, such as a file's name, that Markdown shows as it is, in a table as well."""
    return _SPECIAL.sub(lambda found: "".join(f"&#{ord(c)};" for c in found.group()), text)


def code(text: str) -> str:
    """Return a text as code in Markdown, whatever characters it has."""
    escaped = escape(text)
    return f"`{text}`" if escaped == text else f"<code>{escaped}</code>"


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: "1,204 cells"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def first_few(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first items in a line, and how many more there are: "a, b and 3 more"."""
    more = len(items) - most
    return separator.join(items[:most]) + (f" and {more:,} more" if more > 0 else "")


def first_lines(items: Sequence[str], most: int) -> list[str]:
    """Return the first items, and as a last one how many more there are: "and 3 more"."""
    more = len(items) - most
    return [*items[:most], *([f"and {more:,} more"] if more > 0 else [])]

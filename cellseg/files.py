"""Files written whole or not at all, and read with errors that name them."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cellseg.errors import DataError

# What starts HTML, code, emphasis, a formula, a cell of a table, a new line or a link's address.
_SPECIAL = re.compile(r"[&<>`*$\\~|\x00-\x1f]|\](?=[(\[:])")


@contextmanager
def open_atomically(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears under its name only when everything was written.

    The bytes go to a temporary file beside the target, are synced and renamed onto it; if the
    block raises, the target keeps its old content and the temporary file is removed.

    Args:
        path: the file to write; its folder is made if it is missing.
        mode: "wb" or "w" (text is UTF-8 with newlines as written).

    Yields:
        the open file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Return the process's umask (it can only be read by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a whole file, or leave the old one as it was."""
    with open_atomically(path, "w" if isinstance(data, str) else "wb") as file:
        file.write(data)


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: if the file is missing or is not JSON; names the file and the place.
    """
    path = Path(path)
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}); write it anew"
        ) from None
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{path} holds a number that cannot be ({error})") from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply to be one of ours; write it anew") from None


def read_text(path: str | Path) -> str:
    """Return the content of a text file.

    Raises:
        DataError: if the file is missing, cannot be opened, or is not UTF-8.
    """
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}); check the file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None


def digest_files(paths: Iterable[str | Path]) -> str:
    """Return the SHA-256 over the names and bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def escape_markdown(text: str) -> str:
    """Return a text, such as a file's name, that Markdown shows as it is, in a table as well."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found.group())};", text)


def markdown_code(text: str) -> str:
    """Return a text as code in Markdown, whatever characters it has."""
    escaped = escape_markdown(text)
    return f"`{text}`" if escaped == text else f"<code>{escaped}</code>"

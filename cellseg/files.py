"""Files written whole or not at all, and read with errors that name them."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cellseg.errors import DataError, SettingsError

FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


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

    Raises:
        OSError: if it cannot be written; names the target.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and (name is None or error.filename in (None, name)):
            error.filename = str(path)
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


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Try before long work whether its result can be written.

    Args:
        path: the file to be written, or the folder to write into; nothing of it need exist.
        folder: the path is the folder's.

    Raises:
        SettingsError: if it cannot; says why.
    """
    path = Path(path)
    if not folder and os.path.isdir(path):
        raise SettingsError(f"{path} is a folder; name a file in it")
    nearest = path.absolute() if folder else path.absolute().parent
    while not os.path.exists(nearest):
        nearest = nearest.parent
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be written ({nearest}: {error.strerror}); {_remedy(error)}"
        ) from None


def tell_refusal(error: OSError) -> str | None:
    """Return in one sentence what the system refused: the file, why, and the remedy.

    None if no file is named and no disk is full: then there is no remedy to tell.
    """
    if error.filename is None and error.errno not in FULL:
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {_remedy(error)}"


def _remedy(error: OSError) -> str:
    """Return what to do about a file that the system does not let us read or write."""
    if error.errno in FULL:
        return "make space and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose another place, or change its rights"
    return "check the path"


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
        raise DataError(f"{path} holds a number that cannot be ({error}); write it anew") from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply to be one of ours; write it anew") from None


def read_text(path: str | Path) -> str:
    """Return the content of a text file, without the mark of UTF-8 that Windows puts first.

    Raises:
        DataError: if the file is missing, cannot be opened, or is not UTF-8.
    """
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}); check the file") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def digest_files(paths: Iterable[str | Path]) -> str:
    """Return the SHA-256 over the names and bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

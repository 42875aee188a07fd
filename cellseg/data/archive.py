"""Archives unpacked with distrust: looked through first, refused whole if anything is wrong."""

import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cellseg.errors import DataError
from cellseg.markdown import first_few

MAX_BYTES = 40 * 10**9
MAX_FILES = 200_000


# What the standard library raises for archives that are cut short or damaged.
DAMAGE = (
    EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError,
    NotImplementedError, ValueError, LookupError, ArithmeticError, struct.error,
)  # fmt: skip


class _CheckedHeader(tarfile.TarInfo):
    """A member's header; one that is damaged is an error, and not the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_CheckedHeader":
        """Read a header.

        Raises:
            tarfile.ReadError: if it is damaged or its size is negative, which leads backwards.
        """
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf) or len(buf) not in (0, tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"a damaged header: {error}") from error
            raise
        if header.size < 0:
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        return header


@dataclass(frozen=True)
class _Entry:
    """One member of an archive; `kind` is "file", "folder" or what makes it refused."""

    name: str
    size: int
    kind: str
    member: Any

    @property
    def is_junk(self) -> bool:
        """Whether it is what macOS adds to archives."""
        parts = PurePosixPath(self.name).parts
        return "__MACOSX" in parts or (bool(parts) and parts[-1].startswith(("._", ".DS_Store")))


def is_archive(path: str | Path) -> bool:
    """Return whether a file is a tar (compressed or not) or a zip, by its content."""
    path = Path(path)
    try:
        return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))
    except DAMAGE:
        return False


def unpack(
    archive: str | Path, folder: str | Path, *, max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
) -> None:  # fmt: skip
    """Unpack a tar or zip into a folder, or refuse it before anything is written.

    macOS's `__MACOSX` and `._` files are left out. The archive is read twice: once to look.

    Args:
        archive: .tar, .tar.gz, .tgz or .zip; told apart by content, not by name.
        folder: where to unpack; it must exist.
        max_bytes: refuse more than this, unpacked.
        max_files: refuse more members than this.

    Raises:
        DataError: if it is no archive or a truncated one, if a name is absolute, leads outside or
            comes twice, if a member is a link, a device or encrypted, if it passes a limit or the
            disk is too small.
    """
    archive, folder = Path(archive), Path(folder)
    if not is_archive(archive):
        raise DataError(f"{archive} is no tar or zip archive, or was cut short; download it again")
    with _archive_errors(archive):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                entries = _accept(archive, _zip_entries(file), folder, max_bytes, max_files)
                for entry in entries:
                    file.extract(entry.member, folder)
        else:
            with tarfile.open(archive, tarinfo=_CheckedHeader) as file:
                entries = _accept(archive, _tar_entries(file), folder, max_bytes, max_files)
                members = [entry.member for entry in entries]
                file.extractall(folder, members, filter="data")


@contextmanager
def _archive_errors(archive: Path) -> Iterator[None]:
    """Turn the many ways in which a cut or damaged archive fails into one error."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{archive} cannot be unpacked: {error}") from error
        reason = " ".join(str(error).split())
        text = f"{archive} is truncated or damaged ({reason}); download it again"
        raise DataError(text) from error


def _zip_entries(file: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in file.infolist():
        mode = stat.S_IFMT(info.external_attr >> 16)
        kind = "folder" if info.is_dir() else "file"
        if info.flag_bits & 1:
            kind = "encrypted"
        elif stat.S_ISLNK(mode):
            kind = "a link"
        elif mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a device"
        yield _Entry(info.orig_filename, info.file_size, kind, info)


def _tar_entries(file: tarfile.TarFile) -> Iterator[_Entry]:
    end = 0
    for member in file:
        kind = "folder" if member.isdir() else "file"
        if member.issym() or member.islnk():
            kind = "a link"
        elif not (member.isreg() or member.isdir()):
            kind = "a device"
        size = member.size if member.isreg() else 0
        end = member.offset_data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        yield _Entry(member.name, size, kind, member)
    if file.fileobj.tell() <= end:
        raise tarfile.ReadError("no end mark")


def _accept(
    archive: Path, entries: Iterator[_Entry], folder: Path, max_bytes: int, max_files: int
) -> Sequence[_Entry]:
    """Return the entries to unpack, or raise one error with what is wrong."""
    kept, faults, names, total = [], [], set(), 0
    for count, entry in enumerate(entries, 1):
        total += entry.size
        if count > max_files or total > max_bytes:
            limit = f"{max_files} files or {max_bytes / 1e9:.1f} GB"
            raise DataError(f"{archive} holds more than {limit}; if it is right, raise the limit")
        if entry.is_junk:
            continue
        fault = _name_fault(entry, names)
        if fault:
            faults.append(f"{entry.name!r} {fault}")
        kept.append(entry)
    if faults:
        text = first_few(faults, 5, "; ")
        raise DataError(f"{archive} is not safe to unpack: {text}; get it from its source again")
    free = shutil.disk_usage(folder).free
    if total > free:
        raise DataError(
            f"{archive} needs {total / 1e9:.2f} GB and {folder.parent} has {free / 1e9:.2f} GB "
            "left; make room"
        )
    return kept


def _name_fault(entry: _Entry, names: set[str]) -> str | None:
    """Return what is wrong with a member, None if nothing is; remembers its name."""
    path = PurePosixPath(entry.name)
    if entry.kind not in ("file", "folder"):
        return f"is {entry.kind}"
    if path.is_absolute() or entry.name[1:2] == ":":
        return "is an absolute name"
    if "\\" in entry.name or "\0" in entry.name:
        return "has a backslash or a zero in its name"
    if ".." in path.parts:
        return "leads outside"
    known = str(path).casefold()
    if known in names and entry.kind == "file":
        return "comes twice"
    names.add(known)
    return None

"""Decoded samples on disk: each is decoded once, then mapped into memory wherever it is used.

An entry is one file: a head that says what it was made from, then the arrays as they lie in
memory. Nothing in it is executed, and a process that reads it shares its pages with all others.
"""

import hashlib
import json
import math
import os
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch

from cellseg.data import decoding, reading, runs
from cellseg.data.reading import Instances, SampleFiles, read_image, read_instances
from cellseg.errors import DataError
from cellseg.files import digest_files, open_atomically

SETTLE_SECONDS = 2.0
"""Sources changed so shortly before an entry was made are compared by content ever after, since
a file system's clock might not tell the next change from that one."""

_MAGIC = b"cellseg1"
_HEAD = struct.Struct("<8sII")  # magic, bytes of the description, their CRC-32
_ALIGNMENT = 64

Stamp = list[Any]


@dataclass(frozen=True)
class _Entry:
    """An entry of the cache, mapped into memory.

    Attributes:
        about: its description: `sources` (name, digest and stamp of each file), `settled`, `crc`.
        planes, cells: the sample, as `SampleCache.read` returns it.
        payload: the bytes of all arrays, uint8.
    """

    about: dict[str, Any]
    planes: np.ndarray
    cells: Instances
    payload: np.ndarray


class SampleCache:
    """A folder of decoded samples, about 7 bytes a pixel.

    An entry holds the image and the cells of one sample. It is valid as long as the sample's
    files hold what it was made from and the decoder (our modules and the codecs) is the same: files
    of the same names, sizes and times are taken to be the same, others are compared by their
    SHA-256. An entry that is cut off or of which a bit changed is made anew. Each process checks
    an entry once; after that, reading it costs a few system calls.

    Entries are written beside and renamed, so that several processes may fill one folder. Where
    it cannot be written, one warning says so, and samples that it lacks are decoded each time.

    Attributes:
        folder: of the entries; it may serve several data sets.
        writable: whether new entries are written.
    """

    def __init__(self, folder: str | Path) -> None:
        """Make the folder and try whether it can be written."""
        self.folder = Path(folder)
        self.writable = True
        self._decoder = decoder_version()
        self._checked: dict[str, int] = {}  # entry -> checksum of its arrays when it was checked
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            self._give_up(error)

    def read(self, files: SampleFiles) -> tuple[np.ndarray, Instances]:
        """Return a sample, from its entry if there is a valid one; else decode it and make one.

        Returns:
            the image as planes, uint8 [3, H, W], channels in stored order, and its cells. All
            arrays may be written to: that changes neither the entry nor what others read.

        Raises:
            DataError: if a file of the sample cannot be used; names it.
        """
        path = self._entry_path(files)
        entry = _open_entry(path, self._decoder)
        if entry is not None and self._is_valid(path.name, entry, files):
            return entry.planes, entry.cells
        before = _stamp_files(files)
        planes, cells = decode_sample(files)
        if self.writable:
            self._write(path, files, before, planes, cells)
        return planes, cells

    def _entry_path(self, files: SampleFiles) -> Path:
        """Return where the entry of a sample lies; samples of one name in two places have two."""
        place = hashlib.sha256(os.fsencode(os.path.abspath(files.folder))).hexdigest()
        return self.folder / f"{files.folder.name[:40]}-{place[:12]}.cells"

    def _is_valid(self, name: str, entry: _Entry, files: SampleFiles) -> bool:
        """Return whether an entry is whole and the sample's files are what it was made from."""
        checksum = entry.about["crc"]
        if self._checked.get(name) == checksum:
            return True
        if not _same_files(entry.about, files) or zlib.crc32(entry.payload) != checksum:
            return False
        self._checked[name] = checksum
        return True

    def _write(
        self,
        path: Path,
        files: SampleFiles,
        stamps: list[Stamp],
        planes: np.ndarray,
        cells: Instances,
    ) -> None:
        """Write the entry of a sample, unless its files changed while they were read."""
        newest = max(max(stamp[1:]) for stamp in stamps) / 1e9
        about: dict[str, Any] = {
            "decoder": self._decoder,
            "sources": _describe(files, stamps),
            "settled": newest < time.time() - SETTLE_SECONDS,
            "shape": [len(cells.labels), *cells.instance_map.shape],
        }
        if _stamp_files(files) != stamps:
            return
        try:
            _write_entry(path, about, planes, cells)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Write no more entries, and say so."""
        self.writable = False
        warnings.warn(
            f"the cache {self.folder} cannot be written ({error.strerror}); samples that it lacks "
            "are decoded each time: choose another cache_dir, or None for no cache",
            stacklevel=4,
        )


def decode_sample(files: SampleFiles) -> tuple[np.ndarray, Instances]:
    """Return image planes, uint8 [3, H, W], channels in stored order, and cells of a sample."""
    image = read_image(files.image)
    return image.transpose(2, 0, 1), read_instances(files, image.shape[:2])


def decoder_version() -> str:
    """Return a digest of what decides how files become arrays: our modules and the codecs."""
    paths = [module.__file__ for module in (decoding, reading, runs)]
    versions = f"tifffile {tifffile.__version__}, imagecodecs {imagecodecs.__version__}"
    return hashlib.sha256(f"{digest_files([__file__, *paths])} {versions}".encode()).hexdigest()


def entry_bytes(height: int, width: int, *, cells: int = 0, layers: int = 1) -> int:
    """Return the bytes that the arrays of an entry take: 7 a pixel, 4 more for another layer."""
    return sum(_padded(nbytes) for _, _, nbytes in _layout([cells, layers, height, width]))


def _layout(shape: list[int]) -> list[tuple[str, tuple[int, ...], int]]:
    """Return type, shape and bytes of an entry's arrays in order.

    Args:
        shape: numbers of cells and layers, height, width.
    """
    count, layers, height, width = shape
    table = [
        ("|u1", (3, height, width)),
        ("<i4", (layers, height, width)),
        ("<f4", (count, 4)),  # boxes
        ("<i8", (3, count)),  # labels, ids, areas
    ]
    return [(kind, size, np.dtype(kind).itemsize * math.prod(size)) for kind, size in table]


def _padded(nbytes: int) -> int:
    """Return the bytes up to the next start of an array."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _open_entry(path: Path, decoder: str) -> _Entry | None:
    """Map an entry into memory; None if it is missing, cut off, foreign or by another decoder.

    The mapping is private and copied on writing, so that nobody can change the file through it.
    Torch maps it, because Python's own mapping keeps the file open.
    """
    try:
        size = path.stat().st_size
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        magic, length, checksum = _HEAD.unpack_from(mapped.data)
    except (OSError, RuntimeError, struct.error):  # missing, replaced just now, too short
        return None
    text = mapped[_HEAD.size : _HEAD.size + length].tobytes()
    if magic != _MAGIC or zlib.crc32(text) != checksum:
        return None
    about = json.loads(text)
    if about["decoder"] != decoder:
        return None
    start = position = _padded(_HEAD.size + length)
    arrays = []
    for kind, shape, nbytes in _layout(about["shape"]):
        if position + nbytes > size:
            return None
        arrays.append(np.ndarray(shape, kind, mapped.data, position))
        position += _padded(nbytes)
    if position != size:
        return None
    planes, instance_map, boxes, (labels, ids, areas) = arrays
    cells = Instances(boxes, labels, ids, areas, instance_map)
    return _Entry(about, planes, cells, mapped[start:])


def _write_entry(path: Path, about: dict[str, Any], planes: np.ndarray, cells: Instances) -> None:
    """Write an entry; `about` lacks the checksum of the arrays only."""
    numbers = np.stack([cells.labels, cells.ids, cells.areas])
    arrays = (planes, cells.instance_map, cells.boxes, numbers)
    chunks = []
    for array, (kind, _, nbytes) in zip(arrays, _layout(about["shape"]), strict=True):
        chunks.append(np.ascontiguousarray(array, kind).reshape(-1).view(np.uint8))
        chunks.append(bytes(_padded(nbytes) - nbytes))
    text = json.dumps(about | {"crc": _checksum(chunks)}).encode()
    head = _HEAD.pack(_MAGIC, len(text), zlib.crc32(text)) + text
    with open_atomically(path) as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for chunk in chunks:
            file.write(chunk)


def _checksum(chunks: Iterable[Any]) -> int:
    """Return the CRC-32 of chunks of bytes one after the other."""
    checksum = 0
    for chunk in chunks:
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _stamp_files(files: SampleFiles) -> list[Stamp]:
    """Return size, time of change and time of change of status, in ns, of each file.

    The last one also changes where a file is replaced by one of the same size and time, as
    unpacking an archive does.
    """
    stamps = []
    for path in files.paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be opened ({error.strerror}); check the file") from None
        stamps.append([stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return stamps


def _describe(files: SampleFiles, stamps: list[Stamp]) -> list[list[Any]]:
    """Return name, digest of the content and stamp of each file."""
    return [
        [path.name, digest_files([path]), stamp]
        for path, stamp in zip(files.paths, stamps, strict=True)
    ]


def _same_files(about: dict[str, Any], files: SampleFiles) -> bool:
    """Return whether the files of a sample are those that an entry was made from."""
    names, digests, stamps = zip(*about["sources"], strict=True)
    if list(names) != [path.name for path in files.paths]:
        return False
    if about["settled"] and list(stamps) == _stamp_files(files):
        return True
    return list(digests) == [digest_files([path]) for path in files.paths]

"""TIFF and PNG files to arrays of pixels, with errors that say what to do about the file."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

from cellseg.errors import DataError

SUFFIXES = (".tif", ".tiff", ".png")
MAX_PIXELS = 200_000_000
"""Largest image that is read unless the caller allows more: about 14,000 x 14,000 pixels."""
MAX_THREADS = 4
THREADED_SIZE = 1_000_000
"""Compressed TIFFs of at least so many values are decoded in up to `MAX_THREADS` threads."""

MAX_CHANNELS = 4

# What tifffile and imagecodecs raise for damaged files; the codecs' own are RuntimeErrors.
CODEC_ERRORS = (
    tifffile.TiffFileError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    ArithmeticError, AssertionError, EOFError, OSError, MemoryError, struct.error,
)  # fmt: skip

_LIBTIFF = imagecodecs.TIFF.available  # missing from some builds
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PALETTE = 3
_TIFF_PHOTOMETRICS = {"MINISWHITE", "MINISBLACK", "RGB", "YCBCR"}


def read_pixels(
    path: str | Path, *, invert_white: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Return the pixels of a one-page TIFF or PNG file as they are stored.

    The size that the file claims is checked before memory is taken for it. Costs what the codec
    costs; uncompressed TIFFs are mapped into memory instead of copied.

    Args:
        path: the file; its content, not its name, tells TIFF from PNG.
        invert_white: whether to invert an unsigned TIFF in which 0 means white, as an image
            needs it and a map of ids does not.
        max_pixels: refuse files that claim more pixels than this.

    Returns:
        array [H, W] or [H, W, S] of the stored type; read-only where the file is mapped, which
        it stays as long as the array lives.

    Raises:
        DataError: if the file is missing, damaged, of another kind, has several pages or a
            palette, or is larger than `max_pixels`.
    """
    path = Path(path)
    head = read_head(path)
    if head.startswith(PNG_SIGNATURE):
        return _read_png(path, head, max_pixels)
    return _read_tiff(path, invert_white, max_pixels)


def read_planes(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> list[np.ndarray]:
    """Return the pixels of each page of a TIFF file, or of a PNG file, as they are stored.

    Args:
        path: as in `read_pixels`.
        max_pixels: refuse files whose pages together claim more pixels than this.

    Returns:
        one array [H, W] or [H, W, S] a page.

    Raises:
        DataError: as `read_pixels`, but for the number of pages.
    """
    path = Path(path)
    head = read_head(path)
    if head.startswith(PNG_SIGNATURE):
        return [_read_png(path, head, max_pixels)]
    with codec_errors(path), tifffile.TiffFile(path) as tiff:
        pages = list(_some_pages(path, tiff))
        for page in pages:
            _check_page(path, page, tiff.filehandle.size, max_pixels)
        sizes = [(page.imagelength, page.imagewidth) for page in pages]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        _check_size(path, len(pages) * height, width, max_pixels)
        return [_page_pixels(path, page) for page in pages]


def read_size(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return height and width of a one-page TIFF or PNG file; its pixels are not read.

    Raises:
        DataError: as `read_pixels`, as far as the header tells.
    """
    path = Path(path)
    head = read_head(path)
    if head.startswith(PNG_SIGNATURE):
        return _png_size(path, head, max_pixels)
    with _only_page(path, max_pixels) as page:
        return page.imagelength, page.imagewidth


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file: of a PNG, up to its size and kind."""
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}); check the file") from None
    if not head:
        raise DataError(f"{path} is empty (0 bytes); copy it anew from its source")
    return head


def _png_size(path: Path, head: bytes, max_pixels: int) -> tuple[int, int]:
    """Return height and width of a PNG file whose first 26 bytes are `head`."""
    if len(head) < 26:
        raise _damaged(path, "the header is cut off")
    width, height = struct.unpack(">II", head[16:24])
    _check_size(path, height, width, max_pixels)
    return height, width


def _read_png(path: Path, head: bytes, max_pixels: int) -> np.ndarray:
    """Return the pixels of a PNG file whose first 26 bytes are `head`."""
    _png_size(path, head, max_pixels)
    if head[25] == _PNG_PALETTE:
        raise DataError(f"{path} is a palette image; save an image as RGB, a map of ids as grey")
    try:
        return imagecodecs.png_decode(path.read_bytes())
    except CODEC_ERRORS as error:
        raise _damaged(path, error) from error


@contextmanager
def _only_page(path: Path, max_pixels: int) -> Iterator[tifffile.TiffPage]:
    """Open the only page of a TIFF file, checked; what its decoding raises is a DataError."""
    with codec_errors(path), tifffile.TiffFile(path) as tiff:
        yield checked_page(path, tiff, max_pixels)


@contextmanager
def codec_errors(path: str | Path) -> Iterator[None]:
    """Turn what tifffile and the codecs raise into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except CODEC_ERRORS as error:
        raise _damaged(Path(path), error) from error


def checked_page(path: Path, tiff: tifffile.TiffFile, max_pixels: int) -> tifffile.TiffPage:
    """Return the only page of an open TIFF file.

    Raises:
        DataError: if there is none or another, or it is no image that can be decoded without
            surprises.
    """
    pages = _some_pages(path, tiff)
    if len(pages) > 1:
        raise DataError(
            f"{path} has {len(pages)} pages; save the one that is meant as a file of one page"
        )
    _check_page(path, pages[0], tiff.filehandle.size, max_pixels)
    return pages[0]


def _some_pages(path: Path, tiff: tifffile.TiffFile) -> tifffile.TiffPages:
    """Return the pages of an open TIFF file, one or more."""
    if not tiff.pages:
        raise _damaged(path, "it holds no page")
    return tiff.pages


def _read_tiff(path: Path, invert_white: bool, max_pixels: int) -> np.ndarray:
    """Return the pixels of the only page of a TIFF file."""
    with _only_page(path, max_pixels) as page:
        pixels = _page_pixels(path, page)
        return ~pixels if invert_white and is_inverted(page) else pixels


def _page_pixels(path: Path, page: tifffile.TiffPage) -> np.ndarray:
    """Return the pixels of a checked page, [H, W] or [H, W, S], as they are stored."""
    pixels = map_pixels(path, page) if page.is_memmappable else _decoded(path, page)
    if pixels.shape != page.shape:
        raise _damaged(path, f"{pixels.size} values instead of {page.size}")
    return np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels


def is_inverted(page: tifffile.TiffPage) -> bool:
    """Tell whether 0 means white in a page of whole numbers."""
    return page.photometric.name == "MINISWHITE" and page.dtype.kind == "u"


def map_pixels(path: Path, page: tifffile.TiffPage) -> np.ndarray:
    """Return the pixels of an uncompressed page as a read-only view on the file."""
    dtype = page.dtype.newbyteorder(page.parent.byteorder)
    return np.memmap(path, dtype, "r", page.dataoffsets[0], page.shape).view(np.ndarray)


def _decoded(path: Path, page: tifffile.TiffPage) -> np.ndarray:
    """Return the pixels of a compressed page.

    LZW goes through libtiff, which takes half the time; other strips are decoded side by side if
    the page is large.
    """
    if page.compression.name == "LZW" and _LIBTIFF and page.bitspersample in (8, 16, 32, 64):
        pixels = imagecodecs.tiff_decode(path.read_bytes(), index=page.index)
        if pixels.shape == page.shape:
            return pixels
    threads = min(MAX_THREADS, os.cpu_count() or 1) if page.size >= THREADED_SIZE else 1
    return page.asarray(maxworkers=threads)


def _check_page(path: Path, page: tifffile.TiffPage, file_size: int, max_pixels: int) -> None:
    """Raise unless the page is an image that can be decoded without surprises."""
    _check_size(path, page.imagelength, page.imagewidth, max_pixels)
    photometric = getattr(page.photometric, "name", str(page.photometric))
    if photometric not in _TIFF_PHOTOMETRICS:
        raise DataError(f"{path} stores its colours as {photometric}; save it as grey or RGB")
    if page.samplesperpixel > MAX_CHANNELS:
        raise DataError(f"{path} has {page.samplesperpixel} channels; save it as grey, RGB or RGBA")
    if page.axes not in ("YX", "YXS", "SYX"):
        raise DataError(f"{path} has the axes {page.axes} instead of YX or YXS; save it as 2-D")
    ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if max(ends, default=0) > file_size:
        raise _damaged(path, f"the pixels end at byte {max(ends)}, the file at {file_size}")


def _check_size(path: Path, height: int, width: int, max_pixels: int) -> None:
    """Raise unless 1 <= height * width <= max_pixels."""
    if height < 1 or width < 1:
        raise DataError(f"{path} claims {height} x {width} pixels; copy it anew from its source")
    if height * width > max_pixels:
        raise DataError(
            f"{path} claims {height} x {width} pixels, more than the limit of {max_pixels:,}; "
            "cut it into pieces, or raise max_pixels"
        )


def _damaged(path: Path, reason: object) -> DataError:
    """Return the error for a file that cannot be decoded."""
    return DataError(f"{path} is damaged or not an image ({reason}); copy it anew from its source")

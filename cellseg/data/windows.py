"""Windows of an image too large to be held: only the pieces that a window touches are decoded.

A TIFF file keeps its pixels in strips or tiles. Uncompressed ones in one piece are mapped into
memory; of others the pieces used last are kept, so that neighbouring windows decode a piece once.
A PNG file can only be decoded whole.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import tifffile

from cellseg.data.decoding import (
    PNG_SIGNATURE,
    checked_page,
    codec_errors,
    is_inverted,
    map_pixels,
    read_head,
    read_pixels,
)
from cellseg.data.reading import is_16_bit, pixels_to_rgb
from cellseg.errors import DataError

MAX_KEPT_BYTES = 2**29
"""Decoded pieces that are kept: at least a row of windows 2,000 pixels high, 40,000 wide."""
MAX_PIECE_BYTES = 2**29
"""Largest piece that is decoded."""

Window = tuple[int, int, int, int]
ReadStored = Callable[[Window], np.ndarray]


class ImageWindows:
    """An open image, windows of which are read as RGB.

    Attributes:
        path: the file.
        size: (height, width) in pixels.
    """

    def __init__(
        self, path: Path, size: tuple[int, int], read_stored: ReadStored, *, swapped: bool = False
    ) -> None:
        """Keep how stored pixels are read; made by `open_windows`."""
        self.path = path
        self.size = size
        self.swapped = swapped
        self._read_stored = read_stored

    def read(self, window: Window) -> np.ndarray:
        """Return a window of the image, uint8 [h, w, 3], as `read_image` would hold it.

        Args:
            window: xyxy, half-open, in pixels, within the image.

        Raises:
            DataError: if the pixels cannot be decoded or are not of 8 or 16 bit or 0-1.
        """
        left, top, right, bottom = window
        if not (0 <= left < right <= self.size[1] and 0 <= top < bottom <= self.size[0]):
            raise ValueError(f"window {window} is not within an image of {self.size}")
        pixels = self._read_stored(window)
        highest = self._highest if is_16_bit(pixels) else None
        return pixels_to_rgb(pixels, self.path, swapped=self.swapped, highest=highest)

    @cached_property
    def _highest(self) -> int:
        """The largest value of all pixels, which takes a pass over the image."""
        height, width = self.size
        rows = max(1, MAX_KEPT_BYTES // (width * 64))
        return max(
            int(self._read_stored((0, top, width, min(top + rows, height))).max())
            for top in range(0, height, rows)
        )


@contextmanager
def open_windows(
    path: str | Path, *, swapped: bool = False, max_pixels: int
) -> Iterator[ImageWindows]:
    """Open a TIFF or PNG file of one page to read windows of it.

    Args:
        path: the file; its content, not its name, tells TIFF from PNG.
        swapped: exchange the first and the third channel, for files that are stored as BGR.
        max_pixels: refuse files that claim more pixels than this; a PNG, which is held as a
            whole, also if it has more than `read_image` takes.

    Yields:
        the open image.

    Raises:
        DataError: if the file is missing, damaged, of another kind or size, has several pages or a
            palette, or keeps its pixels in pieces of more than `MAX_PIECE_BYTES`.
    """
    path = Path(path)
    if read_head(path).startswith(PNG_SIGNATURE):
        pixels = read_pixels(path)
        yield ImageWindows(path, pixels.shape[:2], _slices(pixels), swapped=swapped)
        return
    with codec_errors(path):
        tiff = tifffile.TiffFile(path)
    with tiff:
        with codec_errors(path):
            page = checked_page(path, tiff, max_pixels)
            stored = _stored_pixels(path, page)
        size = (page.imagelength, page.imagewidth)
        yield ImageWindows(path, size, stored, swapped=swapped)


def _slices(pixels: np.ndarray) -> ReadStored:
    """Return a reader of windows of an array [H, W] or [H, W, S]."""

    def read(window: Window) -> np.ndarray:
        left, top, right, bottom = window
        return pixels[top:bottom, left:right]

    return read


def _stored_pixels(path: Path, page: tifffile.TiffPage) -> ReadStored:
    """Return a reader of windows of a page, white its largest value, samples last."""
    if page.is_memmappable:
        pixels = map_pixels(path, page)
        read = _slices(np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels)
    else:
        read = _Pieces(path, page).read
    return (lambda window: ~read(window)) if is_inverted(page) else read


class _Pieces:
    """The strips or tiles of a page, decoded as they are needed, those used last kept."""

    def __init__(self, path: Path, page: tifffile.TiffPage) -> None:
        """Find out how the page is cut up; DataError if it cannot be read piece by piece."""
        self.path, self.page = path, page
        if page.is_tiled:
            self.shape = (page.tilelength, page.tilewidth)
        else:
            self.shape = (page.rowsperstrip, page.imagewidth)
        self.planes = page.samplesperpixel if page.axes == "SYX" else 1
        self.grid = (
            math.ceil(page.imagelength / self.shape[0]),
            math.ceil(page.imagewidth / self.shape[1]),
        )
        number = self.planes * math.prod(self.grid)
        if len(page.dataoffsets) != number or len(page.databytecounts) != number:
            raise DataError(
                f"{path} is damaged: {len(page.dataoffsets)} strips or tiles instead of {number}; "
                "copy it anew from its source"
            )
        self.samples = page.samplesperpixel // self.planes
        rows = min(self.shape[0], page.imagelength)
        size = rows * self.shape[1] * self.samples * page.dtype.itemsize
        if size > MAX_PIECE_BYTES:
            raise DataError(
                f"{path} keeps its pixels in pieces of {size / 2**20:,.0f} MB, too large to be "
                "read by windows; save it with tiles of 256 or 512 pixels"
            )
        self.kept: OrderedDict[int, np.ndarray | None] = OrderedDict()
        self.kept_bytes = 0

    def read(self, window: Window) -> np.ndarray:
        """Return the stored pixels of a window, [h, w, S]."""
        left, top, right, bottom = window
        height, width = self.shape
        # What a file leaves out has this value.
        shape = (bottom - top, right - left, self.planes * self.samples)
        pixels = np.full(shape, self.page.nodata, self.page.dtype)
        rows = range(top // height, (bottom - 1) // height + 1)
        columns = range(left // width, (right - 1) // width + 1)
        for plane, row, column in product(range(self.planes), rows, columns):
            piece = self._piece((plane * self.grid[0] + row) * self.grid[1] + column)
            if piece is None:
                continue
            y, x = row * height, column * width
            piece = piece[max(top - y, 0) : bottom - y, max(left - x, 0) : right - x]
            y, x = max(y, top) - top, max(x, left) - left
            place = pixels[y : y + piece.shape[0], x : x + piece.shape[1]]
            place[..., plane : plane + piece.shape[2]] = piece
        return pixels

    def _piece(self, index: int) -> np.ndarray | None:
        """Return a decoded piece [h, w, S], None if the file leaves it out."""
        if index not in self.kept:
            piece = self._decode(index)
            self.kept[index] = piece
            self.kept_bytes += 0 if piece is None else piece.nbytes
            while self.kept_bytes > MAX_KEPT_BYTES and len(self.kept) > 1:
                _, oldest = self.kept.popitem(last=False)
                self.kept_bytes -= 0 if oldest is None else oldest.nbytes
        self.kept.move_to_end(index)
        return self.kept[index]

    def _decode(self, index: int) -> np.ndarray | None:
        """Return a piece, decoded from the file."""
        page = self.page
        count = page.databytecounts[index]
        if count == 0:
            return None
        with codec_errors(self.path):
            file = page.parent.filehandle
            file.seek(page.dataoffsets[index])
            data = file.read(count)  # before the tables, which are read from elsewhere in the file
            piece, _, _ = page.decode(
                data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader
            )
        return None if piece is None else piece[0]

"""Hostile and broken TIFF and PNG files: one error that names them, and no memory taken."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from data_files import write_png
from hostile import FUZZ, bounded, cases, mutated, survives
from hypothesis import given
from hypothesis import strategies as st

from cellseg.data.reading import SampleFiles, read_image, read_instances
from cellseg.errors import DataError

pytestmark = FUZZ


def make_tiff(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


RGBA = np.arange(12 * 20 * 4, dtype=np.uint8).reshape(12, 20, 4)
IDS = np.zeros((12, 20))
IDS[2:6, 3:9], IDS[7:9, 1:18] = 4, 9
TIFFS = [
    make_tiff(RGBA, photometric="rgb", compression="lzw", predictor=True),
    make_tiff(IDS),
    make_tiff(IDS.astype(np.uint16), compression="zlib"),
    make_tiff(IDS.astype(np.float32), compression="packbits", rowsperstrip=3),
]
PNGS = [imagecodecs.png_encode(RGBA), imagecodecs.png_encode(IDS.astype(np.uint16))]


def read_map(path: Path) -> None:
    """Read a file as the map of a class, its image of the size of the originals."""
    read_instances(SampleFiles(path.parent, path, {1: path}), IDS.shape)


@cases(450)
@given(data=mutated(TIFFS))
def test_damaged_tiffs(data, tmp_path):
    survives(tmp_path, ".tif", data, read_image, DataError)
    survives(tmp_path, ".tif", data, read_map, DataError)


def mend_checksums(data: bytes) -> bytes:
    """Return a PNG whose chunks have the checksums that their content asks for."""
    place, parts = 8, [data[:8]]
    while place + 12 <= len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + size]
        parts.append(data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + size
    return b"".join(parts)


@cases(250)
@given(data=mutated(PNGS), mended=st.booleans())
def test_damaged_pngs(data, mended, tmp_path):
    data = mend_checksums(data) if mended else data
    survives(tmp_path, ".png", data, read_image, DataError)
    survives(tmp_path, ".png", data, read_map, DataError)


@pytest.mark.parametrize("value", [2**31 - 1, 2**32 - 1])
def test_a_tiff_that_claims_a_huge_size_takes_no_memory(value, tmp_path):
    data = bytearray(TIFFS[1])
    (entries,) = struct.unpack("<I", data[4:8])
    for number in range(struct.unpack("<H", data[entries : entries + 2])[0]):
        place = entries + 2 + 12 * number
        if struct.unpack("<H", data[place : place + 2])[0] in (256, 257):  # width and height
            data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value)
    (tmp_path / "big.tif").write_bytes(data)
    with (
        bounded(),
        pytest.raises(DataError, match=rf"big.tif claims {value} x {value} pixels"),
    ):
        read_image(tmp_path / "big.tif")


def test_a_tiff_of_many_channels_takes_no_memory(tmp_path):
    (tmp_path / "deep.tif").write_bytes(
        make_tiff(np.zeros((4, 4, 60000), np.uint8), photometric="minisblack", compression="zlib",
                  planarconfig="contig")
    )  # fmt: skip
    with bounded(megabytes=50), pytest.raises(DataError, match=r"deep.tif (has|is damaged)"):
        read_image(tmp_path / "deep.tif")


def test_a_png_bomb_takes_no_memory(tmp_path):
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = zlib.compress(bytes(10**7))
    chunks = [(b"IHDR", head), (b"IDAT", bomb), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + bytes(4) for kind, body in chunks
    )
    (tmp_path / "bomb.png").write_bytes(mend_checksums(data))
    with bounded(), pytest.raises(DataError, match=r"bomb.png claims 60000 x 60000 pixels, more "):
        read_image(tmp_path / "bomb.png")
    small = write_png(tmp_path / "small.png", RGBA).read_bytes()
    place = small.index(b"IDAT") - 4
    (size,) = struct.unpack(">I", small[place : place + 4])
    more = small[:place] + struct.pack(">I", len(bomb)) + b"IDAT" + bomb + bytes(4)
    (tmp_path / "small.png").write_bytes(mend_checksums(more + small[place + 12 + size :]))
    with bounded(megabytes=50):  # what is too much may be passed over, as libpng does
        assert read_image(tmp_path / "small.png").shape == (12, 20, 3)

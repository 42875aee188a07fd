"""Images too large to hold: windows equal the whole, and a prediction goes on where it stopped."""

import json
import sys

import numpy as np
import pytest
import tifffile
import torch
from data_files import write_png
from test_tiles import CuttingModel, scattered_squares
from tiny_models import make_image
from typer.testing import CliRunner

from cellseg.cli import app
from cellseg.coco import check_records, read_records
from cellseg.data import read_image
from cellseg.data.windows import open_windows
from cellseg.errors import DataError, SettingsError
from cellseg.inference import large, predict_file, predict_image
from cellseg.training.checkpoint import write_checkpoint

HEIGHT, WIDTH = 75, 116
WINDOWS = [
    (0, 0, WIDTH, HEIGHT),
    (0, 0, 1, 1),
    (31, 15, 33, 17),
    (40, 3, 116, 75),
    (115, 74, 116, 75),
]
LAYOUTS = {
    "plain": {},
    "strips": {"rowsperstrip": 7},
    "strips of deflate": {"rowsperstrip": 16, "compression": "zlib"},
    "strips of LZW": {"rowsperstrip": 7, "compression": "lzw", "predictor": True},
    "one strip of LZW": {"compression": "lzw"},
    "tiles": {"tile": (32, 16)},
    "tiles of deflate": {"tile": (16, 32), "compression": "zlib", "predictor": True},
    "tiles of LZW": {"tile": (64, 64), "compression": "lzw"},
    "planes in strips": {"planarconfig": "separate", "rowsperstrip": 9, "compression": "zlib"},
    "planes in tiles": {"planarconfig": "separate", "tile": (32, 32), "compression": "zlib"},
    "planes": {"planarconfig": "separate"},
    "BigTIFF": {"bigtiff": True, "tile": (32, 32)},
    "big endian": {"byteorder": ">", "tile": (32, 32), "compression": "zlib"},
    "plain big endian": {"byteorder": ">"},
}


def picture(channels=3, dtype=np.uint8, highest=None):
    highest = highest or (1 if dtype == np.float32 else np.iinfo(dtype).max)
    values = np.random.default_rng(4).random((HEIGHT, WIDTH, channels)) * highest
    return values.astype(dtype)[..., slice(None) if channels > 1 else 0]


def write_tiff(path, pixels, **options):
    planar = options.get("planarconfig") == "separate"
    photometric = "rgb" if pixels.ndim == 3 else options.pop("photometric", "minisblack")
    stored = np.moveaxis(pixels, -1, 0) if planar else pixels
    extra = {"extrasamples": ["unassalpha"]} if pixels.ndim == 3 and pixels.shape[2] == 4 else {}
    tifffile.imwrite(path, stored, photometric=photometric, metadata=None, **extra, **options)
    return path


def assert_windows_equal_the_whole(path, **options):
    expected = read_image(path, **options)
    with open_windows(path, max_pixels=10**6, **options) as image:
        assert image.size == expected.shape[:2]
        for left, top, right, bottom in WINDOWS:
            window = image.read((left, top, right, bottom))
            assert window.dtype == np.uint8
            assert np.array_equal(window, expected[top:bottom, left:right])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_windows_equal_the_whole_image(tmp_path, layout, channels):
    options = LAYOUTS[layout]
    if channels == 1 and "planarconfig" in options:
        pytest.skip("one channel has no planes")
    path = write_tiff(tmp_path / "image.tif", picture(channels), **options)
    assert_windows_equal_the_whole(path)
    assert_windows_equal_the_whole(path, swapped=True)


@pytest.mark.parametrize(
    "layout", ["plain", "plain big endian", "strips of deflate", "tiles of LZW", "big endian"]
)
@pytest.mark.parametrize(
    ("dtype", "highest"), [(np.uint16, 200), (np.uint16, 3000), (np.uint16, 0), (np.float32, 0)]
)
def test_windows_of_other_types_are_scaled_as_the_whole_image(tmp_path, layout, dtype, highest):
    pixels = picture(3, dtype, highest)
    path = write_tiff(tmp_path / "image.tif", pixels, **LAYOUTS[layout])
    assert_windows_equal_the_whole(path)


@pytest.mark.parametrize("layout", ["plain", "tiles of LZW"])
def test_white_as_zero_is_inverted(tmp_path, layout):
    options = {"photometric": "miniswhite", **LAYOUTS[layout]}
    assert_windows_equal_the_whole(write_tiff(tmp_path / "image.tif", picture(1), **options))


@pytest.mark.parametrize(
    "tile", [{"tile": (32, 32)}, {"rowsperstrip": 16}], ids=["tiles", "strips"]
)
def test_jpeg_is_read_by_windows(tmp_path, tile):
    path = write_tiff(tmp_path / "image.tif", picture(), compression="jpeg", **tile)
    assert_windows_equal_the_whole(path)


def test_png_is_read_by_windows(tmp_path):
    assert_windows_equal_the_whole(write_png(tmp_path / "image.png", picture()))


def test_pieces_that_a_file_leaves_out_are_zero(tmp_path):
    path = tmp_path / "image.tif"
    tiles = (None if i == 1 else np.full((32, 32, 3), 9, np.uint8) for i in range(12))
    tifffile.imwrite(
        path, tiles, shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, tile=(32, 32), photometric="rgb",
        compression="zlib", metadata=None,
    )  # fmt: skip
    assert (read_image(path)[:32, 32:64] == 0).all()
    assert_windows_equal_the_whole(path)


def test_only_the_pieces_that_a_window_touches_are_decoded(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "image.tif", picture(), tile=(16, 16), compression="zlib")
    with open_windows(path, max_pixels=10**6) as image:
        pieces = image._read_stored.__self__
        image.read((17, 17, 40, 30))
        assert list(pieces.kept) == [9, 10]  # 8 tiles a row
        image.read((17, 17, 20, 20))
        assert list(pieces.kept) == [10, 9]
        monkeypatch.setattr("cellseg.data.windows.MAX_KEPT_BYTES", 16 * 16 * 3 * 2)
        image.read((64, 0, 80, 16))
        assert list(pieces.kept) == [9, 4]
        assert pieces.kept_bytes == 16 * 16 * 3 * 2


@pytest.mark.parametrize(
    "window", [(0, 0, WIDTH + 1, 5), (-1, 0, 4, 4), (5, 5, 5, 9), (3, 9, 8, 9)]
)
def test_windows_outside_the_image_are_refused(tmp_path, window):
    path = write_tiff(tmp_path / "image.tif", picture())
    with open_windows(path, max_pixels=10**6) as image, pytest.raises(ValueError, match="within"):
        image.read(window)


def test_files_that_cannot_be_read_by_windows_are_named(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "image.tif", picture(), tile=(32, 32), compression="zlib")
    with pytest.raises(DataError, match=r"image.tif claims 75 x 116 pixels, more than"):
        open_windows(path, max_pixels=8699).__enter__()
    with monkeypatch.context() as patch:
        patch.setattr("cellseg.data.windows.MAX_PIECE_BYTES", 3071)
        with pytest.raises(DataError, match=r"image.tif keeps its pixels in pieces of 0 MB"):
            open_windows(path, max_pixels=10**6).__enter__()
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[5]
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    with open_windows(path, max_pixels=10**6) as image:
        image.read((0, 0, 32, 32))
        with pytest.raises(DataError, match=r"image.tif is damaged"):
            image.read((0, 0, WIDTH, HEIGHT))
    with pytest.raises(DataError, match="cannot be opened"):
        open_windows(tmp_path / "none.tif", max_pixels=10**6).__enter__()


def test_an_error_of_the_reader_is_not_blamed_on_the_file(tmp_path):
    path = write_tiff(tmp_path / "image.tif", picture())
    with pytest.raises(RuntimeError, match="mine"), open_windows(path, max_pixels=10**6):
        raise RuntimeError("mine")


SIZE = (300, 420)
TILES = {"tile_size": 192, "overlap": 64, "progress": False}


@pytest.fixture
def tissue(tmp_path):
    """Return a file of rectangles and what is to be found in it."""
    image = make_image(*SIZE, scattered_squares(np.random.default_rng(2), *SIZE, 40))
    path = tmp_path / "slide.tif"
    pixels = image.numpy().transpose(1, 2, 0)
    write_tiff(path, pixels, tile=(64, 64), compression="zlib")
    return path, predict_image(CuttingModel().eval(), image, image_id=1)


class Stopping(CuttingModel):
    """Is stopped at the given call."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, images):
        if len(self.shapes) == self.calls:
            raise KeyboardInterrupt
        return super().forward(images)


def test_a_file_is_segmented_by_windows(tmp_path, tissue):
    path, expected = tissue
    output = tmp_path / "out" / "slide.json"
    model = CuttingModel().eval()
    assert predict_file(model, path, output, **TILES) == expected
    assert len(model.shapes) == 6
    assert read_records(output, image_sizes={1: SIZE}) == expected
    assert [file.name for file in output.parent.iterdir()] == ["slide.json"]
    assert predict_file(model, path, output, progress=False) == expected  # in one tile


@pytest.mark.parametrize("calls", [0, 2, 3, 5])
def test_a_stopped_prediction_goes_on_with_the_next_row(tmp_path, tissue, calls):
    path, expected = tissue
    output = tmp_path / "slide.json"
    with pytest.raises(KeyboardInterrupt):
        predict_file(Stopping(calls).eval(), path, output, **TILES)
    assert not output.exists()
    model = CuttingModel().eval()
    assert predict_file(model, path, output, **TILES) == expected
    assert len(model.shapes) == 6 - calls // 3 * 3
    assert not (tmp_path / "slide.json.partial").exists()


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_torn_row_is_done_again(tmp_path, tissue, cut):
    path, expected = tissue
    output, left = tmp_path / "slide.json", tmp_path / "slide.json.partial"
    with pytest.raises(KeyboardInterrupt):
        predict_file(Stopping(3).eval(), path, output, **TILES)
    left.write_bytes(left.read_bytes()[:-cut])
    model = CuttingModel().eval()
    assert predict_file(model, path, output, **TILES) == expected
    assert len(model.shapes) == 6


def test_a_file_left_torn_in_its_first_line_is_begun_anew(tmp_path, tissue):
    path, expected = tissue
    left = tmp_path / "slide.json.partial"
    for content in (b"", b"12345678 {", b"\xff\n\x00"):
        left.write_bytes(content)
        found = predict_file(CuttingModel().eval(), path, tmp_path / "slide.json", **TILES)
        assert found == expected


def test_what_another_prediction_left_is_not_used(tmp_path, tissue):
    path, expected = tissue
    output = tmp_path / "slide.json"
    with pytest.raises(KeyboardInterrupt):
        predict_file(Stopping(3).eval(), path, output, **TILES)
    model = CuttingModel().eval()
    for change, name in [
        ({"tile_size": 256}, "tiles"),
        ({"swapped": True}, "settings"),
        ({"views": "flips"}, "settings"),
    ]:
        with pytest.raises(SettingsError, match=rf"partial.*: {name} differ; .*--no-resume"):
            predict_file(model, path, output, **TILES | change)
    other = CuttingModel().eval()
    other.weight.data += 1
    with pytest.raises(SettingsError, match="model differ"):
        predict_file(other, path, output, **TILES)
    path.touch()
    with pytest.raises(SettingsError, match="image differ"):
        predict_file(model, path, output, **TILES)
    assert not model.shapes and not output.exists()
    assert predict_file(model, path, output, resume=False, **TILES) == expected


def test_the_end_of_rle_is_named(tmp_path):
    path = tmp_path / "huge.tif"
    tiles = (None if i else np.zeros((4096, 4096), np.uint8) for i in range(12 * 12))
    tifffile.imwrite(
        path, tiles, shape=(46341, 46341), dtype=np.uint8, tile=(4096, 4096), compression="zlib",
        metadata=None,
    )  # fmt: skip
    with pytest.raises(
        DataError, match=r"46341 x 46341 pixels, masks \(RLE\) can have 2,147,483,647"
    ):
        predict_file(CuttingModel().eval(), path, tmp_path / "huge.json")


def test_masks_just_below_the_end_of_rle_are_exact():
    tile = large.Tile((46000, 46000, 46340, 46340), (46100, 46100, np.inf, np.inf), 0, 200)
    image = make_image(340, 340, [(1, 300, 310, 340, 340)])
    found = predict_image(CuttingModel().eval(), image, image_id=1)
    (record,) = large.place_records(tile, found, (46340, 46340))
    assert record["bbox"] == [46300, 46310, 40, 30]
    assert check_records([record], image_sizes={1: (46340, 46340)}) == []


def test_the_command_segments_one_file(tmp_path, tissue):
    from tiny_models import tiny_model

    path, _ = tissue
    model = tiny_model(seed=2)
    settings = {"class_names": ["dark", "light"], "channel_order": "true"}
    content = {"spec": model.spec, "model": model.state_dict(), "settings": settings}
    write_checkpoint(tmp_path / "model.pt", content)
    output = tmp_path / "slide.json"
    arguments = ["predict", str(tmp_path / "model.pt"), str(output), "--image", str(path)]
    options = ["--tile-size", "192", "--overlap", "64", "--mask-threshold", "0.58"]
    done = CliRunner().invoke(app, [*arguments, *options, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    records = json.loads(output.read_text())
    assert f"{len(records)} cells in 1 image" in done.output and len(records) > 10
    assert check_records(records, image_sizes={1: SIZE}) == []


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads its peak from /proc")
@pytest.mark.parametrize(
    "layout", [{"tile": (512, 512)}, {"rowsperstrip": 64}], ids=["tiles", "strips"]
)
def test_an_image_of_100_megapixels_takes_little_memory(tmp_path, layout):
    from benchmarks.memory import run_alone

    side = 10_000
    squares = scattered_squares(np.random.default_rng(3), side, side, 64)
    pixels = make_image(side, side, squares).numpy().transpose(1, 2, 0)
    write_tiff(tmp_path / "slide.tif", pixels, compression="zlib", **layout)
    count, added = run_alone(segment_and_measure, tmp_path / "slide.tif", tmp_path / "slide.json")
    assert count == len(squares)
    assert added < 700, f"{added:.0f} MB above the model"


def segment_and_measure(path, output):
    """Return the number of cells of a file, and by how many MB memory rose meanwhile."""
    from benchmarks.memory import with_peak

    torch.set_num_threads(1)
    model = CuttingModel().eval()
    records, added = with_peak(lambda: predict_file(model, path, output, progress=False))
    return len(records), added

"""The benchmark of memory: its files are whole tiles in strips, and what is missed is said."""

import tifffile
from test_tiles import CuttingModel

from benchmarks import large_image
from benchmarks.large_image import find_misses, whole_tiles, write_strips
from cellseg.inference.tiles import TILE_SIZE, plan_for_model


def test_files_are_of_whole_tiles():
    for rows, columns in [(1, 2), (2, 2), (2, 3), (4, 3)]:
        tiles = plan_for_model(CuttingModel(), whole_tiles(rows, columns))
        assert len(tiles) == rows * columns
        assert {tile.shape for tile in tiles} == {(TILE_SIZE, TILE_SIZE)}


def test_a_file_is_kept_in_strips(tmp_path, monkeypatch):
    monkeypatch.setattr(large_image, "PIECE", 64)
    write_strips(tmp_path / "a.tif", (150, 100))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages[0]
        assert page.shape == (150, 100, 3) and page.rowsperstrip == 64 and not page.is_tiled
        pixels = page.asarray()
    assert (pixels[:64, :64] == pixels[64:128, :64]).all()
    assert (pixels[:64, :36] == pixels[:64, 64:]).all()


def test_too_much_memory_and_growth_are_said():
    peaks = {
        ("a", "small", "plain"): 1000.0,
        ("a", "large", "plain"): 1099.0,
        ("a", "small", "turns"): 2000.0,
        ("b", "small", "plain"): 1000.0,
        ("b", "large", "plain"): 1200.0,
        ("b", "small", "turns"): 1100.0,
    }
    assert find_misses(peaks) == [
        "a, small, turns: 2000 MB, less than 1907 wanted",
        "b: 1.20 times as much for the large file, at most 1.1 wanted",
    ]

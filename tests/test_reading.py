"""Files to arrays: what the release holds, what labs have, and what must be refused."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from data_files import plain_image, stained_sample, write_png, write_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cellseg.data import channels, decoding, reading
from cellseg.data.decoding import read_pixels, read_size
from cellseg.errors import DataError

real_data = pytest.mark.skipif("CELLSEG_DATA" not in os.environ, reason="CELLSEG_DATA is not set")
CELL_IDS = st.integers(0, 4)


def test_ids_with_gaps_and_across_files_become_instances_in_order(tmp_path):
    first, second = np.zeros((4, 6)), np.zeros((4, 6))
    first[0, 0:2] = 9  # boxes are x0, y0, x1, y1
    first[2:4, 1] = 4
    second[1:3, 4:6] = 9  # the same id in another class is another cell
    second[3, 3] = 120  # one pixel
    folder = write_sample(tmp_path / "a", plain_image(4, 6), {1: first, 3: second})

    image, target = reading.read_sample(folder)

    assert image.shape == (4, 6, 3)
    assert target["labels"].tolist() == [1, 1, 3, 3]
    assert target["boxes"].tolist() == [[1, 2, 2, 4], [0, 0, 2, 1], [4, 1, 6, 3], [3, 3, 4, 4]]
    assert target["instance_map"].tolist() == [
        [[2, 2, 0, 0, 0, 0], [0, 0, 0, 0, 3, 3], [0, 1, 0, 0, 3, 3], [0, 1, 0, 4, 0, 0]]
    ]
    assert [target[k].dtype for k in ("boxes", "labels", "instance_map")] == ["f4", "i8", "i4"]


def test_one_pixel_cell_has_a_box_of_width_one(tmp_path):
    ids = np.zeros((3, 5))
    ids[1, 4] = 1
    _, target = reading.read_sample(write_sample(tmp_path / "a", plain_image(3, 5), {2: ids}))
    assert target["boxes"].tolist() == [[4, 1, 5, 2]]


@pytest.mark.parametrize("maps", [{}, {1: np.zeros((3, 5))}], ids=["no map", "an empty map"])
def test_image_without_cells_is_a_valid_negative(tmp_path, maps):
    _, target = reading.read_sample(write_sample(tmp_path / "a", plain_image(3, 5), maps))
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["instance_map"].shape == (1, 3, 5)
    assert not target["instance_map"].any()


def test_image_without_background(tmp_path):
    ids = np.array([[5.0, 5, 2], [5, 5, 2]])
    _, target = reading.read_sample(write_sample(tmp_path / "a", plain_image(2, 3), {1: ids}))
    assert target["boxes"].tolist() == [[2, 0, 3, 2], [0, 0, 2, 2]]
    assert target["instance_map"].tolist() == [[[2, 2, 1], [2, 2, 1]]]


def test_a_cell_that_wraps_round_the_edge_is_not_one_run(tmp_path):
    ids = np.array([[0.0, 0, 3], [3, 0, 0]])  # neighbours in memory, not in the image
    _, target = reading.read_sample(write_sample(tmp_path / "a", plain_image(2, 3), {1: ids}))
    assert target["boxes"].tolist() == [[0, 0, 3, 2]]


def test_overlap_between_classes_opens_a_layer_for_the_overlapping_cell_only(tmp_path):
    first, second = np.zeros((3, 6)), np.zeros((3, 6))
    first[0, 0:3] = 1
    second[0, 2:4] = 1
    second[2, 4:6] = 2
    folder = write_sample(tmp_path / "a", plain_image(3, 6), {1: first, 2: second})
    _, target = reading.read_sample(folder)
    assert target["instance_map"].tolist() == [
        [[1, 1, 1, 0, 0, 0], [0] * 6, [0, 0, 0, 0, 3, 3]],
        [[0, 0, 2, 2, 0, 0], [0] * 6, [0] * 6],
    ]


def test_a_cell_takes_the_first_layer_where_it_is_free_as_a_whole(tmp_path):
    maps = {label: np.zeros((2, 7)) for label in (1, 2, 3)}
    maps[1][0, 0:3] = 1
    maps[2][0, 2:4] = 1  # over the first
    maps[3][0, 3:5] = 1  # over the second, and free of the first
    maps[3][1, 0:2] = 2
    maps[3][0, 0], maps[3][1, 6] = 3, 3  # one of its two pieces over the first
    folder = write_sample(tmp_path / "a", plain_image(2, 7), maps)
    _, target = reading.read_sample(folder)
    assert target["instance_map"].tolist() == [
        [[1, 1, 1, 3, 3, 0, 0], [4, 4, 0, 0, 0, 0, 0]],
        [[5, 0, 2, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0, 5]],
    ]


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_cells_of_one_class_that_overlap_lie_on_pages(tmp_path, compression):
    pages = np.zeros((2, 3, 6), np.uint16)
    pages[0, 0, 0:3] = 7
    pages[1, 0, 2:5] = 3  # over the first
    pages[1, 2, 4:6] = 9  # free of it
    folder = write_sample(tmp_path / "a", plain_image(3, 6))
    _write_pages(folder, pages, compression=compression)
    cells = reading.read_instances(reading.find_sample_files(folder), (3, 6))
    assert cells.ids.tolist() == [3, 7, 9]
    assert cells.areas.tolist() == [3, 3, 2]
    assert cells.boxes.tolist() == [[2, 0, 5, 1], [0, 0, 3, 1], [4, 2, 6, 3]]
    assert cells.instance_map.tolist() == [
        [[2, 2, 2, 0, 0, 0], [0] * 6, [0, 0, 0, 0, 3, 3]],
        [[0, 0, 1, 1, 1, 0], [0] * 6, [0] * 6],
    ]
    assert reading.count_cells(reading.find_sample_files(folder), 4) == [3, 0, 0, 0]


def test_one_id_in_two_pieces_is_one_instance(tmp_path):
    ids = np.array([[8.0, 0, 0, 8], [0, 0, 0, 0]])
    _, target = reading.read_sample(write_sample(tmp_path / "a", plain_image(2, 4), {1: ids}))
    assert target["boxes"].tolist() == [[0, 0, 4, 1]]


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=CELL_IDS),
    hnp.arrays(np.int32, (7, 7), elements=st.sampled_from([0, 0, 0, 2, 70_000])),
)
def test_instances_equal_one_comparison_a_cell(tmp_path_factory, first, second):
    second = second[: first.shape[0], : first.shape[1]]
    folder = tmp_path_factory.mktemp("random") / "a"
    write_sample(folder, plain_image(*first.shape), {1: first, 2: second})
    files = reading.find_sample_files(folder)
    cells = reading.read_instances(files, first.shape)
    expected = [(1, i) for i in np.unique(first) if i] + [(2, i) for i in np.unique(second) if i]
    assert list(zip(cells.labels, cells.ids, strict=True)) == expected
    for k, (label, cell_id) in enumerate(expected):
        mask = (first if label == 1 else second) == cell_id
        y, x = np.nonzero(mask)
        assert cells.boxes[k].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert cells.areas[k] == mask.sum()
        assert (cells.instance_map == k + 1).any(axis=0).tolist() == mask.tolist()
    assert cells.instance_map.max(initial=0) == len(expected)
    assert len(cells.instance_map) == 1 + bool(((first > 0) & (second > 0)).any())


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "u4", "i8", "f4", "f8", ">f8", ">u2"])
def test_ids_of_any_type_are_read_alike(tmp_path, dtype):
    ids = np.array([[0, 7, 7], [200, 0, 0]], dtype)
    folder = write_sample(tmp_path / "a", plain_image(2, 3))
    tifffile.imwrite(folder / "class1.tif", ids, byteorder=">" if ">" in dtype else "<")
    cells = reading.read_instances(reading.find_sample_files(folder), (2, 3))
    assert cells.ids.tolist() == [7, 200]
    assert cells.instance_map.dtype == np.int32
    assert cells.instance_map.tolist() == [[[0, 1, 1], [2, 0, 0]]]


@pytest.mark.parametrize("libtiff", [True, False])
@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        ("u1", (5, 7, 4), {"photometric": "rgb", "predictor": True}),
        ("u1", (5, 7, 3), {"photometric": "rgb", "rowsperstrip": 2}),
        ("u1", (3, 5, 7), {"photometric": "rgb", "planarconfig": "separate", "predictor": True}),
        ("u1", (40, 50, 3), {"photometric": "rgb", "predictor": True, "tile": (16, 32)}),
        ("u2", (5, 7), {"byteorder": ">", "predictor": True}),
        ("f4", (5, 7), {"byteorder": ">", "predictor": True}),
        ("f8", (5, 7), {}),
        ("i4", (5, 7), {"predictor": True}),
    ],
)
def test_lzw_of_every_kind_is_decoded(tmp_path, monkeypatch, libtiff, dtype, shape, options):
    monkeypatch.setattr(decoding, "_LIBTIFF", libtiff and decoding._LIBTIFF)
    pixels = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", pixels, compression="lzw", metadata=None, **options)
    expected = np.moveaxis(pixels, 0, -1) if "planarconfig" in options else pixels
    read = read_pixels(tmp_path / "x.tif")
    assert read.dtype.kind == pixels.dtype.kind
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("libtiff", [True, False])
def test_lzw_codes_that_cannot_be_are_noticed(tmp_path, monkeypatch, libtiff):
    monkeypatch.setattr(decoding, "_LIBTIFF", libtiff and decoding._LIBTIFF)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.arange(900).reshape(30, 30), compression="lzw", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        middle = tiff.pages[0].dataoffsets[0] + tiff.pages[0].databytecounts[0] // 2
    data = bytearray(path.read_bytes())
    data[middle : middle + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tif is damaged"):
        read_pixels(path)


def test_png_beside_tiff_files(tmp_path):
    image = plain_image(2, 3, (10, 20, 30))
    write_png(tmp_path / "image.png", image)
    write_png(tmp_path / "class2.PNG", np.array([[0, 300, 300], [0, 0, 0]], np.uint16))
    tifffile.imwrite(tmp_path / "class1.tiff", np.array([[1, 0, 0], [0, 0, 0]], np.uint8))
    read, target = reading.read_sample(tmp_path)
    assert np.array_equal(read, image)
    assert target["labels"].tolist() == [1, 2]
    assert target["instance_map"].tolist() == [[[1, 2, 2], [0, 0, 0]]]


def test_class_names_decide_how_many_maps_there_may_be(tmp_path):
    ids = np.array([[0.0, 1, 0]])
    folder = write_sample(tmp_path / "a", plain_image(1, 3), {6: ids})
    _, target = reading.read_sample(folder, tuple("abcdef"))
    assert target["labels"].tolist() == [6]


def test_other_files_are_passed_over(tmp_path):
    folder = write_sample(tmp_path / "a", plain_image(1, 3))
    for name in ("notes.txt", "._image.tif", ".class9.tif", "overview.png", "overview.tif"):
        (folder / name).write_bytes(b"x")
    assert reading.find_sample_files(folder).paths == [folder / "image.tif"]


@pytest.mark.parametrize(
    ("pixels", "expected", "reason"),
    [
        (np.uint8([[[1, 2, 3, 255]]]), [1, 2, 3], "RGBA: alpha dropped"),
        (np.uint8([[[1, 2, 3]]]), [1, 2, 3], "RGB: as it is"),
        (np.uint8([[9]]), [9, 9, 9], "grey: three equal channels"),
        (np.uint8([[[9, 255]]]), [9, 9, 9], "grey with alpha: alpha dropped"),
        (np.uint16([[[0, 100, 255]]]), [0, 100, 255], "16 bit that hold 8: as it is"),
        (np.uint16([[[0, 2048, 4095]]]), [0, 128, 255], "12 bit: 2048 * 255 / 4095 = 127.53"),
        (np.uint16([[[0, 4096, 65535]]]), [0, 16, 255], "16 bit: 4096 * 255 / 65535 = 15.94"),
        (np.float32([[[0, 0.5, 1]]]), [0, 128, 255], "float in 0-1: 127.5 rounds to even"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_image_of_every_kind_is_rgb_of_8_bit(tmp_path, pixels, expected, reason):
    colored = pixels.ndim == 3 and pixels.shape[2] > 2
    options = {"planarconfig": "contig"} if pixels.ndim == 3 else {}
    photometric = "rgb" if colored else "minisblack"
    tifffile.imwrite(tmp_path / "image.tif", pixels, photometric=photometric, **options)
    image = reading.read_image(tmp_path / "image.tif")
    assert image.dtype == np.uint8
    assert image.shape == (1, 1, 3)
    assert image[0, 0].tolist() == expected, reason


@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}], ids=["plain", "lzw"])
def test_16_bit_in_the_other_order_of_bytes_is_the_same_image(tmp_path, options):
    pixels = np.uint16([[0, 2048, 4095]])
    tifffile.imwrite(tmp_path / "image.tif", pixels, byteorder=">", **options)
    assert reading.read_image(tmp_path / "image.tif")[0, :, 1].tolist() == [0, 128, 255]


def test_planes_stored_apart_and_white_stored_as_zero(tmp_path):
    planes = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)
    tifffile.imwrite(tmp_path / "p.tif", planes, photometric="rgb", planarconfig="separate")
    assert np.array_equal(reading.read_image(tmp_path / "p.tif"), planes.transpose(1, 2, 0))
    tifffile.imwrite(tmp_path / "w.tif", np.uint8([[0, 255]]), photometric="miniswhite")
    assert reading.read_image(tmp_path / "w.tif")[..., 0].tolist() == [[255, 0]]
    assert read_pixels(tmp_path / "w.tif").tolist() == [[0, 255]]  # ids stay as they are


def _write_map(folder, values):
    tifffile.imwrite(folder / "class1.tif", np.asarray(values), metadata=None)


def _write_pages(folder, pages, **options):
    with tifffile.TiffWriter(folder / "class1.tif") as tiff:
        for page in pages:
            tiff.write(np.asarray(page), photometric="minisblack", metadata=None, **options)


def _cell_of(value, dtype=np.float64):
    ids = np.zeros((4, 6), dtype)
    ids[2, 3] = value
    return ids


def _cut_off(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _claim_width(path, width):
    """Give a PNG header another width, checksum left wrong: the size is looked at first."""
    data = bytearray(path.read_bytes())
    data[16:20] = struct.pack(">I", width)
    path.write_bytes(bytes(data))


def _to_png(folder, name, pixels):
    (folder / name).with_suffix(".tif").unlink(missing_ok=True)
    return write_png(folder / name, pixels)


FAULTS = [
    # what is done to a good folder of 4 x 6 pixels, words of the message, the reason for the row
    (
        lambda d: _write_map(d, np.zeros((6, 4))),
        ["class1.tif has 6 x 4", "image.tif has 4 x 6", "same size"],
        "sizes differ (axes swapped)",
    ),
    (
        lambda d: _write_map(d, _cell_of(-3)),
        ["class1.tif", "id -3", "row 2, column 3"],
        "negative",
    ),
    (
        lambda d: _write_map(d, _cell_of(-3, np.int16)),
        ["class1.tif", "id -3", "row 2"],
        "negative integer",
    ),
    (
        lambda d: _write_map(d, _cell_of(1.5)),
        ["class1.tif", "id 1.5", "row 2, column 3"],
        "fractional",
    ),
    (lambda d: _write_map(d, _cell_of(np.nan)), ["class1.tif", "id nan", "row 2"], "not a number"),
    (lambda d: _write_map(d, _cell_of(np.inf)), ["class1.tif", "id inf", "row 2"], "infinite"),
    (
        lambda d: _write_map(d, _cell_of(2.0**31)),
        ["class1.tif", "id 2147483648.0", "2147483647"],
        "too large for int32",
    ),
    (
        lambda d: _write_map(d, _cell_of(2.0**31, np.float32)),
        ["class1.tif", "id 2147483648.0"],
        "too large, in a type too coarse for the largest id",
    ),
    (
        lambda d: _write_map(d, _cell_of(2**40, np.int64)),
        ["class1.tif", "id 1099511627776"],
        "too large as an integer",
    ),
    (
        lambda d: _write_map(d, np.zeros((4, 6, 3), np.uint8)),
        ["class1.tif", "4 x 6 x 3", "single plane"],
        "a colour picture of the map",
    ),
    (
        lambda d: tifffile.imwrite(d / "class1.tif", np.ones((5, 4, 6)), photometric="minisblack"),
        ["class1.tif", "5 pages", "id 1", "one page"],
        "a cell on several pages, as in a stack of slices",
    ),
    (
        lambda d: _write_pages(d, [np.zeros((4, 6)), np.zeros((4, 5))]),
        ["class1.tif", "(4, 6)", "(4, 5)"],
        "pages of different size",
    ),
    (
        lambda d: _write_pages(d, [_cell_of(1), _cell_of(0.5)]),
        ["class1.tif", "id 0.5", "row 2"],
        "fractional on the second page",
    ),
    (lambda d: (d / "image.tif").unlink(), ["no image.tif", "add it"], "no image"),
    (
        lambda d: (d / "class1.tif").rename(d / "class5.tif"),
        ["class5.tif", "unknown class file", "4 class names"],
        "more classes than names",
    ),
    (
        lambda d: (d / "class1.tif").rename(d / "class0.tif"),
        ["class0.tif", "unknown class file"],
        "classes are counted from 1",
    ),
    (
        lambda d: write_png(d / "image.png", plain_image(4, 6)),
        ["image.png", "image.tif", "remove"],
        "two images",
    ),
    (lambda d: _cut_off(d / "image.tif", 0.9), ["image.tif", "damaged", "anew"], "cut in the data"),
    (lambda d: _cut_off(d / "class1.tif", 0.7), ["class1.tif", "damaged"], "cut, uncompressed"),
    (lambda d: _cut_off(d / "image.tif", 0.02), ["image.tif", "damaged"], "cut in the header"),
    (lambda d: (d / "image.tif").write_bytes(b""), ["image.tif", "empty", "0 bytes"], "empty"),
    (lambda d: (d / "image.tif").write_text("<html>"), ["image.tif", "not an image"], "a web page"),
    (
        lambda d: (d / "image.tif").write_bytes(b"II*\0damaged"),
        ["image.tif", "damaged", "no page"],
        "a header without pages",
    ),
    (
        lambda d: _cut_off(_to_png(d, "image.png", plain_image(4, 6)), 0.8),
        ["image.png", "damaged"],
        "cut PNG",
    ),
    (
        lambda d: _claim_width(_to_png(d, "image.png", plain_image(4, 6)), 2**30),
        ["image.png", "4 x 1073741824", "limit"],
        "PNG of an absurd size",
    ),
    (
        lambda d: tifffile.imwrite(d / "image.tif", np.zeros((4, 6), np.uint32)),
        ["image.tif", "uint32", "8 or 16 bit"],
        "pixels of 32 bit",
    ),
    (
        lambda d: tifffile.imwrite(d / "image.tif", np.full((4, 6), 300, np.float32)),
        ["image.tif", "300", "0-1"],
        "float out of range",
    ),
    (
        lambda d: tifffile.imwrite(d / "image.tif", np.full((4, 6), np.nan, np.float32)),
        ["image.tif", "nan", "0-1"],
        "float that is no number",
    ),
    (
        lambda d: tifffile.imwrite(
            d / "image.tif",
            np.zeros((4, 6, 5), np.uint8),
            photometric="minisblack",
            planarconfig="contig",
        ),
        ["image.tif", "5 channels"],
        "five channels",
    ),
    (
        lambda d: tifffile.imwrite(
            d / "image.tif", np.zeros((4, 6, 4), np.uint8), photometric="separated"
        ),
        ["image.tif", "SEPARATED", "RGB"],
        "CMYK",
    ),
]


@pytest.mark.parametrize(("damage", "words", "reason"), FAULTS, ids=[row[2] for row in FAULTS])
def test_bad_input_is_refused_by_name_value_and_remedy(tmp_path, damage, words, reason):
    folder = write_sample(tmp_path / "a", plain_image(4, 6), {1: _cell_of(1)})
    reading.read_sample(folder)
    damage(folder)
    with pytest.raises(DataError) as caught:
        reading.read_sample(folder)
    message = str(caught.value)
    assert str(folder) in message
    for word in words:
        assert word in message, reason


def test_missing_folder_and_missing_file_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        reading.find_sample_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.tif cannot be opened"):
        reading.read_image(tmp_path / "gone.tif")


def test_palette_png_is_refused(tmp_path):
    from PIL import Image

    Image.new("P", (6, 4)).save(tmp_path / "image.png")
    with pytest.raises(
        DataError, match=r"image\.png is a palette image; save an image as RGB, a m"
    ):
        reading.read_image(tmp_path / "image.png")


def test_size_limit_is_an_argument(tmp_path):
    folder = write_sample(tmp_path / "a", plain_image(4, 6))
    with pytest.raises(DataError, match=r"image\.tif claims 4 x 6 pixels, more than the limit"):
        reading.read_sample(folder, max_pixels=23)
    assert read_pixels(folder / "image.tif", max_pixels=24).shape == (4, 6, 3)


def test_size_is_read_from_the_head(tmp_path):
    folder = write_sample(tmp_path / "a", plain_image(4, 6))
    assert read_size(folder / "image.tif") == (4, 6)
    assert read_size(write_png(tmp_path / "image.png", plain_image(7, 2))) == (7, 2)
    with pytest.raises(DataError, match="4 x 6 pixels, more than the limit"):
        read_size(folder / "image.tif", max_pixels=23)


def test_count_cells_does_not_open_the_image(tmp_path):
    folder = write_sample(tmp_path / "a", plain_image(4, 6), {2: _cell_of(9), 3: _cell_of(1)})
    (folder / "image.tif").write_bytes(b"not an image")
    assert reading.count_cells(reading.find_sample_files(folder), 4) == [0, 1, 1, 0]


def _order(tmp_path: Path, **colors):
    folders = [stained_sample(tmp_path / name, **colors) for name in "abc"]
    return channels.detect_channel_order(folders)


def test_channel_order_true(tmp_path):
    # inside B - R = 140 - 90 = 50, outside 200 - 220 = -20
    assert _order(tmp_path) == channels.ChannelOrder("true", (70.0, 70.0, 70.0))


def test_channel_order_swapped(tmp_path):
    order = _order(tmp_path, nuclei=(140, 60, 90), around=(200, 170, 220))
    assert order == channels.ChannelOrder("swapped", (-70.0, -70.0, -70.0))


@pytest.mark.parametrize(
    ("nuclei", "around", "judged", "reason"),
    [
        ((90, 90, 90), (220, 220, 220), 0, "grey"),
        ((40, 40, 250), (0, 0, 5), 0, "fluorescence on a dark ground"),
        ((230, 60, 250), (150, 90, 120), 0, "nuclei brighter than the ground"),
        ((90, 60, 92), (220, 170, 219), 3, "a difference of 3 is under the margin of 6"),
    ],
)
def test_channel_order_undecided(tmp_path, nuclei, around, judged, reason):
    order = _order(tmp_path, nuclei=nuclei, around=around)
    assert order.outcome == "undecided", reason
    assert len(order.differences) == judged


def test_channel_order_of_images_without_cells_or_that_disagree(tmp_path):
    empty = write_sample(tmp_path / "empty", plain_image(4, 6), {1: np.zeros((4, 6))})
    full = write_sample(tmp_path / "full", plain_image(4, 6), {1: np.ones((4, 6))})
    bare = write_sample(tmp_path / "bare", plain_image(4, 6))
    assert channels.detect_channel_order([empty, full, bare]) == channels.ChannelOrder("undecided")
    true = [stained_sample(tmp_path / f"t{n}") for n in range(2)]
    swapped = stained_sample(tmp_path / "s", nuclei=(140, 60, 90), around=(200, 170, 220))
    assert channels.detect_channel_order([*true, swapped]).outcome == "undecided"  # 2 of 3
    more = stained_sample(tmp_path / "t2")
    assert channels.detect_channel_order([*true, more, swapped]).outcome == "true"  # 3 of 4


@real_data
@pytest.mark.parametrize(
    ("folder", "outcome"),
    [("monusac_mini/train", "swapped"), ("consep/hw3-data-release/train", "true")],
)
def test_channel_order_of_real_tissue(folder, outcome):
    train_dir = Path(os.environ["CELLSEG_DATA"]) / folder
    folders = sorted(path for path in train_dir.iterdir() if path.is_dir())
    assert channels.detect_channel_order(folders).outcome == outcome

"""Cells out as COCO, label maps and GeoJSON: by hand, and back in again."""

import contextlib
import csv
import io
import json

import numpy as np
import pytest
import tifffile
from data_files import plain_image, write_png, write_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools.coco import COCO
from tiny_sets import (
    RECTANGLE,
    RING,
    SIZE,
    annotation,
    mask_of,
    one_picture,
    read_masks,
    read_table,
    records_of,
    write_set,
)
from typer.testing import CliRunner

from cellseg import cli, interchange
from cellseg.coco import make_records, mask_to_rle, rle_to_mask, write_records
from cellseg.data import CellDataset, make_sample_release
from cellseg.data.release import INDEX_NAME
from cellseg.errors import DataError, SettingsError
from cellseg.evaluation import dataset_truth
from cellseg.interchange import masks
from cellseg.overlap import MaskLine

MASKS = hnp.arrays(bool, (6, 9))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2]), MASKS), max_size=6))
def test_masks_survive_out_and_in_however_they_overlap(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("trip")
    given_cells = {(label, mask.tobytes()): (label, mask) for label, mask in drawn if mask.any()}
    labels = [label for label, _ in given_cells.values()]
    rles = [mask_to_rle(mask) for _, mask in given_cells.values()]
    path = write_png(folder / "a.png", plain_image(*SIZE))
    pictures = interchange.list_pictures(path)
    records = make_records(1, labels, np.linspace(1, 0.5, len(labels)), rles)
    cells = interchange.cells_by_picture(pictures, records)

    interchange.write_coco(folder / "out.json", pictures, cells, ["one", "two"])
    interchange.import_coco(folder / "out.json", folder, folder / "in")

    found = read_masks(folder / "in" / "train" / "a", ["one", "two"])
    order = np.argsort(labels, kind="stable")
    assert [label for label, _ in found] == [labels[k] for k in order]
    for k, (_, mask) in zip(order, found, strict=True):
        assert np.array_equal(mask, rle_to_mask(rles[k]))


def test_coco_out_is_what_pycocotools_reads(tmp_path):
    truth = {1: mask_of((0, 0, 2, 3)) * 4 + mask_of((5, 2, 9, 6)) * 9, 2: mask_of((3, 0, 4, 1)) * 1}
    write_sample(tmp_path / "train" / "a", plain_image(*SIZE), truth)
    dataset = CellDataset(tmp_path / "train", class_names=("one", "two"))
    pictures = interchange.pictures_of_samples(dataset)
    cells = interchange.cells_by_picture(pictures, dataset_truth(dataset)["annotations"])
    interchange.write_coco(tmp_path / "out.json", pictures, cells, dataset.class_names)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "out.json")
    assert coco.imgs == {1: {"id": 1, "file_name": "a/image.tif", "height": 6, "width": 9}}
    assert [cat["name"] for cat in coco.loadCats([1, 2])] == ["one", "two"]
    assert [ann["area"] for ann in coco.anns.values()] == [6, 16, 1]
    assert coco.anns[2]["bbox"] == [5, 2, 4, 4] and "score" not in coco.anns[2]
    assert np.array_equal(coco.annToMask(coco.anns[2]), mask_of((5, 2, 9, 6)))
    imported = interchange.import_coco(tmp_path / "out.json", tmp_path / "train", tmp_path / "in")
    assert imported.cells == [2, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(MASKS, max_size=4))
def test_crops_are_the_masks_in_their_boxes(drawn):
    line = MaskLine.from_rles([mask_to_rle(mask) for mask in drawn])
    for mask, crop, (x1, y1, x2, y2) in zip(drawn, masks.box_masks(line), line.boxes, strict=True):
        assert np.array_equal(crop, mask[y1:y2, x1:x2])
        assert crop.sum() == mask.sum()


def test_geojson_of_a_rectangle_and_of_a_cell_in_two_pieces_by_hand(tmp_path):
    two = mask_of((0, 0, 1, 1), (3, 0, 5, 2))
    pictures, cells = one_picture(tmp_path, (1, 0.9, mask_of((2, 1, 6, 4))), (2, 0.25, two))
    interchange.write_geojson(tmp_path / "out", pictures, cells, ["one", "two"])
    content = json.loads((tmp_path / "out" / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    first, second = content["features"]
    assert first == {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[2, 1], [6, 1], [6, 4], [2, 4], [2, 1]]],
        },
        "properties": {
            "objectType": "detection",
            "classification": {"name": "one", "color": [240, 228, 66]},
            "measurements": {"Score": 0.9},
        },
    }
    assert second["geometry"]["type"] == "MultiPolygon"
    assert second["geometry"]["coordinates"] == [
        [[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]],
        [[[3, 0], [5, 0], [5, 2], [3, 2], [3, 0]]],
    ]
    with pytest.raises(SettingsError, match="object_type is 'cell'"):
        interchange.write_geojson(tmp_path, pictures, cells, ["one", "two"], object_type="cell")


def test_an_image_without_cells_gives_an_empty_collection(tmp_path):
    pictures, cells = one_picture(tmp_path, (1, 0.2, mask_of((0, 0, 1, 1))), score_threshold=0.5)
    interchange.write_geojson(tmp_path, pictures, cells, ["one"])
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []
    interchange.write_labels(tmp_path, pictures, cells, ["one"])
    assert not tifffile.imread(tmp_path / "a.tif").any()
    interchange.write_morphometry(tmp_path / "a.csv", pictures, cells, ["one"])
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1


def test_threshold_and_empty_masks_drop_records_and_truth_has_no_score(tmp_path):
    pictures, cells = one_picture(
        tmp_path,
        (1, 0.5, mask_of((0, 0, 1, 1))),
        (1, 0.9, mask_of((0, 0, 2, 1))),
        (1, 0.49, mask_of((0, 0, 3, 1))),
        (1, 0.9, mask_of()),
        score_threshold=0.5,
    )
    assert [cell["score"] for cell in cells[0]] == [0.9, 0.5]
    truth = [{"image_id": 1, "category_id": 1, "segmentation": mask_to_rle(RING)}]
    assert interchange.cells_by_picture(pictures, truth, score_threshold=0.5) == [truth]


def test_label_map_gives_a_pixel_to_the_better_score(tmp_path):
    low, high, hidden = mask_of((0, 0, 4, 2)), mask_of((2, 0, 6, 2)), mask_of((3, 0, 5, 2))
    pictures, cells = one_picture(tmp_path, (1, 0.6, low), (2, 0.9, high), (1, 0.5, hidden))
    interchange.write_labels(tmp_path / "one", pictures, cells, ["x", "y"])
    drawn = tifffile.imread(tmp_path / "one" / "a.tif")
    assert drawn.dtype == np.uint16 and drawn.shape == SIZE
    assert drawn[0].tolist() == [2, 2, 1, 1, 1, 1, 0, 0, 0]
    rows = list(csv.DictReader((tmp_path / "one" / "labels.csv").open()))
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert [row["class"] for row in rows] == ["y", "x", "x"]
    assert [row["visible_px2"] for row in rows] == ["8", "4", "0"]

    interchange.write_labels(tmp_path / "two", pictures, cells, ["x", "y"], by_class=True)
    first, second = (tifffile.imread(tmp_path / "two" / "a" / f"class{k}.tif") for k in (1, 2))
    assert first[0].tolist() == [1, 1, 1, 1, 2, 0, 0, 0, 0]
    assert second[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_label_maps_come_in_again(tmp_path):
    boxes = [(0, 0, 2, 2), (3, 1, 5, 6), (5, 0, 9, 4)]
    cells = [(1, 0.9 - k / 10, mask_of(box)) for k, box in enumerate(boxes)]
    pictures, kept = one_picture(tmp_path, *cells)
    interchange.write_labels(tmp_path / "labels", pictures, kept, ["x"])
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "images" / "a.png")
    release = interchange.prepare_release(tmp_path, tmp_path / "cache")
    found = read_masks(release.train_dir / "a", release.class_names)
    for (_, mask), box in zip(found, boxes, strict=True):
        assert np.array_equal(mask, mask_of(box))


def test_more_cells_than_16_bits_count():
    dots = [mask_to_rle(mask_of((0, 0, 1, 1))), mask_to_rle(mask_of((2, 2, 3, 3)))]
    line = MaskLine.from_rles(dots)
    assert masks.paint_masks(line, [1, 65_535], SIZE).dtype == np.uint16
    painted = masks.paint_masks(line, [1, 65_536], SIZE)
    assert painted.dtype == np.uint32 and painted[2, 2] == 65_536


def test_images_of_a_release_of_samples_and_of_one_file(tmp_path):
    made = make_sample_release(tmp_path, train_images=3, test_images=2, image_size=64)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    for place in (tmp_path, made.test_dir):
        pictures = interchange.list_pictures(place)
        assert [p.file_name for p in pictures] == [entry["file_name"] for entry in index]
        assert [p.size for p in pictures] == [(e["height"], e["width"]) for e in index]
    samples = interchange.list_pictures(made.train_dir)
    assert [p.image_id for p in samples] == [1, 2, 3]
    assert interchange.list_pictures(made.train_dir, sample_ids=[samples[2].name]) == samples[2:]
    assert {p.file_name for p in samples} == {f"{p.name}/image.tif" for p in samples}
    [alone] = interchange.list_pictures(samples[0].path)
    assert (alone.image_id, alone.size) == (1, samples[0].size)
    with pytest.raises(DataError, match="not a folder"):
        interchange.list_pictures(tmp_path / "gone")


def test_an_image_may_be_as_large_as_one_that_is_segmented(tmp_path):
    tiles = iter([np.zeros((512, 512, 3), np.uint8), *[None] * (40 * 32 - 1)])  # left out
    tifffile.imwrite(
        tmp_path / "slide.tif", tiles, shape=(20_000, 16_000, 3), dtype=np.uint8, tile=(512, 512),
        photometric="rgb", compression="zlib", metadata=None,
    )  # fmt: skip
    [picture] = interchange.list_pictures(tmp_path / "slide.tif")
    assert (picture.name, picture.size) == ("slide", (20_000, 16_000))


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command_line_takes_in_and_gives_out(tmp_path):
    path, images = write_set(tmp_path, [annotation([RECTANGLE]), annotation([RECTANGLE], 7)])
    taken = run("import", path, images, tmp_path / "out")
    assert taken.exit_code == 0, taken.output
    train = tmp_path / "out" / "train"
    assert f"python -m cellseg train {train}" in taken.output

    truth = run("export", train, tmp_path / "truth.json", "--to", "coco")
    assert "2 of 2 cells in 1 images, 0 of them without any" in truth.output
    categories = json.loads((tmp_path / "truth.json").read_text())["categories"]
    assert [category["name"] for category in categories] == ["spindle", "round"]
    records = records_of((1, 0.9, mask_of((2, 1, 6, 4))), (2, 0.3, mask_of((0, 0, 1, 1))))
    write_records(tmp_path / "r.json", records)
    about = ("--images", train)
    for to, out in (("labels", "l"), ("geojson", "g"), ("csv", "t.csv"), ("coco", "c.json")):
        given = run("export", tmp_path / "r.json", tmp_path / out, "--to", to, *about)
        assert "1 of 2 cells" in given.output, given.output
        assert "left out below a score of 0.5 (--score-threshold): 1" in given.output
        assert (tmp_path / out).exists()
    assert read_table(tmp_path / "t.csv")[0]["area_px2"] == "12"
    assert [p.name for p in (tmp_path / "g").iterdir()] == ["a.geojson"]

    run("export", train, tmp_path / "t.csv", "--to", "csv", "--pixel-size", 0.5)
    assert [row["area_um2"] for row in read_table(tmp_path / "t.csv")] == ["3", "3"]
    run("export", train, tmp_path / "l", "--to", "labels", "--by-class")
    assert {p.name for p in (tmp_path / "l" / "a").iterdir()} == {"class1.tif", "class2.tif"}
    run("export", train, tmp_path / "g", "--to", "geojson", "--object-type", "annotation")
    assert '"objectType":"annotation"' in (tmp_path / "g" / "a.geojson").read_text()


def test_the_command_line_says_what_is_missing(tmp_path):
    write_records(tmp_path / "r.json", records_of((1, 0.9, RING)))
    write_png(tmp_path / "a.png", plain_image(4, 4))
    for words, arguments in (
        ("give --images", ["--to", "csv"]),
        ("--to is 'pdf'", ["--to", "pdf"]),
        ("differs from the image's", ["--to", "csv", "--images", tmp_path / "a.png"]),
    ):
        done = run("export", tmp_path / "r.json", tmp_path / "out", *arguments)
        assert words in str(done.exception)
    for to, output, words in (
        ("coco", tmp_path, "is a folder; name a file in it"),
        ("labels", tmp_path / "a.png", "a.png cannot be written"),
    ):
        done = run("export", tmp_path / "gone.json", output, "--to", to)
        assert words in str(done.exception)
    assert not (tmp_path / "out").exists()

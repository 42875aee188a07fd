"""The commands that measure exports and groups on real tissue, tried on a small made release."""

import json

import numpy as np
import pytest
from test_accuracy import write_made_release

from benchmarks import exports_on_tissue, groups_on_tissue
from benchmarks.exports_on_tissue import check_row, masks_of, outlined_area, tissue_rows
from benchmarks.groups_on_tissue import Agreement, leak_row, pair_agreement
from benchmarks.held_tissue import all_samples
from cellseg.coco import make_record, mask_to_rle
from cellseg.data import Nearest
from cellseg.data.links import BORDER, SAME
from cellseg.data.similarity import LOOKS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_made_release(folder)
    return folder


def test_what_is_read_back_is_what_was_written(data, tmp_path):
    rows = {row.what: row for row in tissue_rows(all_samples(data, "tiles"), tmp_path)}
    assert {what: row.same for what, row in rows.items()} == {
        "COCO": None,
        "label maps": None,
        "GeoJSON": True,
        "morphometry": None,
        "import of the COCO file": True,
    }
    assert rows["COCO"].found == "18 cells of 9 images"
    # In each tile one cell of 12 x 12 px and one of 14 x 13.
    assert "signed areas 2,934 px2 of 2,934" in rows["GeoJSON"].found
    assert rows["import of the COCO file"].found.startswith("18 masks")


def test_a_hole_counts_against_its_outline(tmp_path):
    outer = [[0, 0], [4, 0], [4, 3], [0, 3], [0, 0]]
    hole = [[1, 1], [1, 2], [2, 2], [2, 1], [1, 1]]
    shapes = [
        {"type": "Polygon", "coordinates": [outer, hole]},
        {"type": "MultiPolygon", "coordinates": [[outer], [outer, hole]]},
    ]
    content = {"features": [{"geometry": shape} for shape in shapes]}
    (tmp_path / "a.geojson").write_text(json.dumps(content), encoding="utf-8")
    assert outlined_area(tmp_path) == 11 + 12 + 11


def test_masks_are_told_by_class(data):
    masks = masks_of(all_samples(data, "pieces"))
    assert len(masks) == 18 and [label for label, _ in masks["held0_1"]] == [2]


def test_a_hand_in_of_made_records_is_checked(tmp_path):
    row = check_row(tmp_path, images=2, records=30)
    assert row.same and row.found.startswith("60 made records, ")


def test_overlaps_count_within_an_image_and_class():
    mask = np.zeros((9, 12), dtype=bool)
    mask[2:5, 3:8] = True
    places = [(1, 1), (1, 1), (1, 2), (2, 1)]  # image, class
    records = [make_record(*place, 0.5, mask_to_rle(mask)) for place in places]
    assert exports_on_tissue.overlapping_pairs(records) == 1


def test_pairs_of_groups_by_hand():
    # Of one tile: ab, ac, bc, de. Together: ab, cd, ce, de.
    groups = dict(zip("abcde", [1, 1, 2, 2, 2], strict=True))
    tiles = dict(zip("abcde", "xxxyy", strict=True))
    assert pair_agreement(groups, tiles) == Agreement(2, 0.5, 0.5, 0.6)


def test_leaks_of_a_split_are_counted():
    tiles = dict(zip("abcde", "xxxyy", strict=True))
    nearest = [
        Nearest("a", "b", 0.0, SAME),
        Nearest("d", "b", 0.2, BORDER),
        Nearest("e", "c", 1.0, LOOKS),
    ]
    row = leak_row("random", (["b", "c"], ["a", "d", "e"]), nearest, tiles)
    assert row == ["random", "2 + 3", "2 of 3", "33%", "33%"]


def test_groups_are_printed(data, monkeypatch, capsys):
    monkeypatch.setenv("CELLSEG_DATA", str(data))
    assert groups_on_tissue.main([]) == 0
    printed = capsys.readouterr().out
    assert "18 images in " in printed and "pair recall " in printed
    assert "| random  |" in printed and "| grouped |" in printed


@pytest.mark.parametrize("command", [exports_on_tissue, groups_on_tissue])
def test_without_data_it_says_what_to_set(command, monkeypatch, capsys):
    monkeypatch.delenv("CELLSEG_DATA", raising=False)
    assert command.main([]) == 1
    assert "error: set CELLSEG_DATA to the folder" in capsys.readouterr().err

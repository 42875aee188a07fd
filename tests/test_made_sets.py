"""The made sets are what they say; the table tells where the automatic scale holds."""

import numpy as np
import pytest
from test_accuracy import TINY, squares
from tiny_models import make_image, make_target

from benchmarks import made_sets
from benchmarks.made_sets import MadeSet, draw_glow, draw_large, draw_small, results_table, zoom
from cellseg import presets


def _median_diameter(maps):
    areas = np.concatenate([np.bincount(ids.ravel())[1:] for ids in maps.values()])
    return np.sqrt(4 / np.pi * np.median(areas[areas > 0]))


def test_zoom_scales_image_and_maps_alike():
    image = np.zeros((6, 8, 3), np.uint8)
    image[2:4, 2:6] = 200
    ids = (image[..., 0] > 0).astype(np.int32) * 7
    larger, maps = zoom(image, {3: ids}, 2)
    assert larger.shape == (12, 16, 3)
    assert np.array_equal(np.argwhere(maps[3] == 7), np.argwhere(np.kron(ids, np.ones((2, 2)))))
    assert larger[6, 8].min() > 190
    assert larger[0, 0].max() < 10
    assert set(np.unique(maps[3])) == {0, 7}


def test_glow_is_light_on_black():
    image, maps = draw_glow(0)
    cells = sum(maps.values()) > 0
    assert set(maps) == {1, 2}
    assert image[~cells].mean() < 20
    assert image[cells][:, 2].mean() > 3 * image[~cells][:, 2].mean()
    assert image[cells][:, 2].mean() > 2 * image[cells][:, 0].mean()


@pytest.mark.parametrize(("draw", "diameter"), [(draw_small, 8), (draw_large, 150)])
def test_cells_are_of_the_size_they_should(draw, diameter):
    image, maps = draw(0)
    assert image.dtype == np.uint8
    assert _median_diameter(maps) == pytest.approx(diameter, rel=0.25)


def test_a_set_is_drawn_once_and_opened_in_two_parts(tmp_path, monkeypatch):
    calls = []

    def draw(number):
        calls.append(number)
        ids = np.zeros((12, 15), np.int32)
        ids[2:8, 3:9] = 1
        return np.full((12, 15, 3), 10 * number + 1, np.uint8), {1: ids}

    monkeypatch.setitem(made_sets.SETS, "tiny", MadeSet("tiny", ("cell",), 2, 1, draw))
    for _ in range(2):
        train, held = made_sets.open_set("tiny", tmp_path)
    assert calls == [0, 1, 2]
    assert (train.sample_ids, held.sample_ids) == (["train00", "train01"], ["held02"])
    made_sets.write_picture("tiny", tmp_path, tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").stat().st_size > 50


@pytest.mark.slow
def test_a_set_is_trained_and_examined_at_three_scales(tmp_path, monkeypatch):
    def draw(number):
        cells = [(1, *box) for _, *box in squares(number)]
        image = make_image(64, 64, cells).numpy().transpose(1, 2, 0)
        return image, {1: make_target(64, 64, cells)["instance_map"][0].numpy()}

    monkeypatch.setitem(made_sets.SETS, "tiny", MadeSet("tiny", ("cell",), 3, 1, draw))
    own = {"weights": None, "image_scale": "auto", "epochs": 1, "time_budget": None}
    recipe = presets.preset("laptop") | TINY | own
    found = made_sets.examine_set("tiny", tmp_path, recipe)
    assert found["image_scale"] > 0 and set(found["ap50"]) == {"0.5", "1", "2"}
    assert all(0 <= value <= 1 for value in found["ap50"].values())
    assert all((tmp_path / name / "run" / "last.pt").exists() for name in found["ap50"])


def test_table_says_where_the_automatic_scale_holds():
    results = {
        "small": {"image_scale": 4.0, "ap50": {"0.5": 0.2, "1": 0.45, "2": 0.5}},
        "glow": {"image_scale": 1.41, "ap50": {"0.5": 0.2, "1": 0.4, "2": 0.5}},
        "large": {"image_scale": 0.25, "ap50": {"0.5": 0.0, "1": 0.0, "2": 0.0}},
    }
    lines = results_table(results).splitlines()
    assert lines[2] == "| cells of 8 px | 4 | 0.200 | 0.450 | 0.500 | 0.90 | holds |"
    assert lines[3].endswith("| 0.80 | below 0.9 |")
    assert lines[4].endswith("| 0.00 | below 0.9 |")
    assert len({line.count("|") for line in lines}) == 1

"""The comparison of recipes: each side's details by value, and both on a tiny made release."""

import json
import time

import pytest
from tiny_models import write_squares

from benchmarks import screen
from benchmarks.consep_ids import HELD
from benchmarks.held_tissue import data_folder, examined_samples, training_samples, weights_file
from benchmarks.our_recipe import LAPTOP, sort_settings
from cellseg.errors import SettingsError

SIDE = 64
TILES = {  # name of the tile: folder of the whole tile
    **{name: f"held{number}" for number, name in enumerate(HELD[:2])},
    **{f"train_{30 + number}": f"tile{number}" for number in range(7)},
}
TINY = {
    "image_scale": 1.0, "crop_size": 32, "batch_size": 2, "workers": 0, "fpn_channels": 16,
    "head_width": 32, "rois_per_image": 16, "proposals": 16, "draws_per_image": 1,
}  # fmt: skip


def squares(number):
    """Return two cells that lie elsewhere in each tile, one in each half."""
    top = 2 + number
    return [(1, 3, top, 15, top + 12), (2, 44, top, 57, top + 14)]


def write_made_release(data):
    """Write tiles of 64 x 64 with two cells, and their left and right halves as pieces."""
    tiles, pieces = {}, {}
    names = {"tiles": {}, "pieces": {}}
    for number, (tile, folder) in enumerate(TILES.items()):
        cells = squares(number)
        tiles[folder] = (SIDE, SIDE, cells)
        names["tiles"][folder] = {"source": tile}
        for half, (label, x1, y1, x2, y2) in enumerate(cells):
            left = half * SIDE // 2
            moved = [(label, x1 - left, y1, x2 - left, y2)]
            pieces[f"{folder}_{half}"] = (SIDE, SIDE // 2, moved)
            names["pieces"][f"{folder}_{half}"] = {"source": f"{tile}@0,{left}", "tile": tile}
    for kind, samples in (("tiles", tiles), ("pieces", pieces)):
        root = data / {"tiles": "consep_tiles", "pieces": "consep"}[kind]
        write_squares(root / "hw3-data-release" / "train", samples)
        images = [{"uuid": name, **about} for name, about in names[kind].items()]
        (root / "provenance.json").write_text(json.dumps({"images": images}), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_made_release(folder)
    return folder


def test_held_tiles_are_examined_and_never_trained_on(data):
    for kind, count in (("tiles", 7), ("pieces", 14)):
        ids = training_samples(data, kind).sample_ids
        assert len(ids) == count and not [name for name in ids if name.startswith("held")]
    samples = examined_samples(data)
    assert samples["tiles"].sample_ids == ["held0", "held1"]
    assert samples["pieces"].sample_ids == ["held0_0", "held0_1", "held1_0", "held1_1"]
    assert samples["tuning"].sample_ids == ["tile0", "tile6"]
    with pytest.raises(SettingsError, match="train_on is 'cells'; use tiles or pieces"):
        training_samples(data, "cells")


def test_data_and_weights_that_are_missing_are_named(data, tmp_path, monkeypatch):
    monkeypatch.delenv("CELLSEG_DATA", raising=False)
    with pytest.raises(SettingsError, match="set CELLSEG_DATA to the folder that holds consep/"):
        data_folder()
    monkeypatch.setenv("CELLSEG_DATA", str(tmp_path))
    with pytest.raises(SettingsError, match=r"has no consep_tiles/provenance.json"):
        data_folder()
    monkeypatch.setenv("CELLSEG_DATA", str(data))
    assert data_folder() == data
    with pytest.raises(SettingsError, match="do not exist; name the file with --weights"):
        weights_file(data)


def test_a_setting_goes_to_every_function_that_takes_it():
    parts = sort_settings({"crop_size": 96, "seed": 3, "learning_rate": 0.1, "backbone": "x"})
    assert parts == {
        "own": {"backbone": "x"},
        "builder": {"seed": 3},
        "transform": {"crop_size": 96},
        "loaders": {"seed": 3},
        "fit": {"seed": 3, "learning_rate": 0.1},
        "predict": {},
    }
    sort_settings(LAPTOP)
    with pytest.raises(SettingsError, match="nothing takes the setting 'crop'; there are "):
        sort_settings({"crop": 96})


def test_settings_are_read_as_json_or_words():
    texts = ["image_scale=1.5", "norm=trained", "scale_range=[0.7, 1.4]", "flip=false"]
    assert screen.read_overrides(texts) == {
        "image_scale": 1.5, "norm": "trained", "scale_range": [0.7, 1.4], "flip": False
    }  # fmt: skip
    with pytest.raises(SettingsError, match="--set flip: write it as key=value"):
        screen.read_overrides(["flip"])


def test_a_screen_has_minutes_or_epochs():
    assert screen.screened_recipe({}, 2)["time_budget"] == 120
    assert screen.screened_recipe({"epochs": 3}, 2)["time_budget"] is None


def test_the_processor_clock_does_not_run_while_the_process_waits():
    with screen.processor_clock(threads=2):
        begin, used = screen.fit_module.time.perf_counter(), time.process_time()
        time.sleep(0.2)
        sum(range(10**6))
        counted = screen.fit_module.time.perf_counter() - begin
        assert counted == pytest.approx((time.process_time() - used) / 2, abs=0.01)
        assert counted < 0.1
    assert screen.fit_module.time is time


def test_a_lever_is_screened_and_predicted_with_again(data, tmp_path):
    recipe = screen.screened_recipe(TINY | {"epochs": 2}, 1)
    found = screen.screen(recipe, data, None, tmp_path / "a", threads=1, progress=False)
    assert (found["steps"], found["ended_by"]) == (14, "epochs")  # 14 pieces, two a batch
    assert found["seconds_a_step"] == pytest.approx(found["seconds"] / 14)
    for part in ("tiles", "pieces"):
        assert set(found[part]) == {"ap50", "ap50_100", "ap", "ap50_per_class"}
        assert 0 <= found[part]["ap"] <= found[part]["ap50"] <= 1
        assert found[part]["ap50_per_class"]["other"] is None
    assert 0.05 <= found["score_threshold"] <= 0.95
    assert all(0 <= found[name] <= 1 for name in ("pq", "aji", "dice", "pq_mean", "dice_mean"))

    again = screen.screen_prediction(
        {"detections_per_image": 1}, data, tmp_path / "a", tmp_path / "b", threads=1, progress=False
    )
    for name in ("tiles", "pieces"):
        records = json.loads((tmp_path / "b" / f"{name}.json").read_text(encoding="utf-8"))
        ids = [record["image_id"] for record in records]
        assert len(ids) == len(set(ids))
    of_training = {"steps", "seconds", "seconds_a_step", "peak_memory_mb", "ended_by"}
    assert set(again) == set(found) - of_training


def test_the_command_appends_a_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CELLSEG_DATA", str(data))
    monkeypatch.setattr(screen, "screen", lambda *_, **__: {"pq": 0.5})
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"")
    for name in ("first", "second"):
        options = ["--set", "fpn_channels=64", "--keep", str(tmp_path), "--weights", str(weights)]
        assert screen.main([name, *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "screens.jsonl").open(encoding="utf-8")]
    assert [line["name"] for line in lines] == ["first", "second"]
    assert lines[1]["overrides"] == {"fpn_channels": 64} and lines[1]["pq"] == 0.5
    assert screen.main(["third", "--keep", str(tmp_path), "--of", "none"]) == 1
    assert "none/run/last.pt does not exist" in capsys.readouterr().err

"""The comparison of recipes: each side's details by value, and both on a tiny made release."""

import json
import math
import os
import time
from dataclasses import replace

import pytest
import torch
from tiny_models import write_squares
from torchvision.models import mobilenet_v2

from benchmarks import accuracy, course_recipe, screen
from benchmarks.consep_ids import HELD
from benchmarks.held_tissue import (
    data_folder,
    examined_samples,
    tile_differences,
    training_samples,
    weights_file,
)
from benchmarks.our_recipe import LAPTOP, group_settings
from cellseg.errors import SettingsError

SIDE = 64
TILES = {  # name of the tile: folder of the whole tile
    **{name: f"held{number}" for number, name in enumerate(HELD[:2])},
    **{f"train_{30 + number}": f"tile{number}" for number in range(7)},
}
TINY = {
    "image_scale": 1.0, "crop_size": 32, "batch_size": 2, "workers": 0, "fpn_channels": 16,
    "head_width": 32, "rois_per_image": 16, "train_proposals": 16, "detections_per_image": 20,
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


def test_settings_are_those_of_a_preset_and_what_to_train_on():
    assert group_settings({"crop_size": 96, "train_on": "tiles", "backbone": "x"}) == {
        "own": {"backbone": "x", "train_on": "tiles"},
        "builder": {},
        "transform": {"crop_size": 96},
        "loaders": {},
        "fit": {},
        "predict": {},
    }
    group_settings(LAPTOP)
    with pytest.raises(SettingsError, match="nothing takes the setting 'crop'; use one of"):
        group_settings({"crop": 96})


def test_a_screen_has_minutes_or_epochs():
    assert screen.screened_recipe({}, 2)["time_budget"] == 120
    assert screen.screened_recipe({"epochs": 3}, 2)["time_budget"] is None
    with pytest.raises(SettingsError, match="nothing takes the setting 'crop'; use one of"):
        screen.screened_recipe({"crop": 3}, 2)


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
    # Twice four crops of each of seven tiles, two a batch.
    assert (found["steps"], found["ended_by"]) == (28, "epochs")
    assert found["seconds_a_step"] == pytest.approx(found["seconds"] / 28)
    for part in ("tiles", "pieces"):
        assert set(found[part]) == {"ap50", "ap50_100", "ap", "ap50_per_class"}
        assert 0 <= found[part]["ap"] <= found[part]["ap50"] <= 1
        assert found[part]["ap50_per_class"]["other"] is None
    assert 0.05 <= found["score_threshold"] <= 0.95
    assert all(0 <= found[name] <= 1 for name in ("pq", "aji", "dice", "pq_mean", "dice_mean"))

    differences = tile_differences(data, tmp_path / "a", tmp_path / "a")
    assert set(differences) == {"tiles_ap50", "pieces_ap50", "pq", "aji", "dice"}
    assert all("+0.000 to +0.000" in sentence for sentence in differences.values())

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
    assert "there is no screen 'none' in" in capsys.readouterr().err


def test_course_model_is_torchvisions_with_its_defaults():
    model = course_recipe.course_model(5, None)
    assert model.transform.min_size == (800,) and model.transform.max_size == 1333
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.rpn.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),) * 5
    heads = model.roi_heads
    assert (heads.detections_per_img, heads.score_thresh, heads.nms_thresh) == (100, 0.05, 0.5)
    assert heads.box_predictor.cls_score.out_features == 5
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not norms and model.backbone.out_channels == 256
    levels = model.backbone(torch.zeros(1, 3, 64, 128))
    assert [tuple(level.shape[-2:]) for level in levels.values()] == [
        (8, 16), (4, 8), (2, 4), (2, 4), (1, 2)  # strides 8, 16, 32, 32 and the pooled 64
    ]  # fmt: skip


def test_course_schedule_divides_the_rate_after_every_third_epoch():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    model[0].bias.requires_grad_(False)
    optimiser, schedule = course_recipe.course_optimiser(model)
    assert type(optimiser) is torch.optim.AdamW
    assert sum(p.numel() for p in optimiser.param_groups[0]["params"]) == 6 + 12 + 4
    rates = []
    for _ in range(7):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([4e-4] * 3 + [4e-5] * 3 + [4e-6])


def test_course_loader_draws_four_fifths_by_the_rarity_of_their_cells(tmp_path):
    one, two = (1, 2, 3, 14, 15), (2, 20, 4, 34, 18)
    samples = {"a": [one, (1, 2, 20, 14, 32)], "b": [one, two], "c": [two], "d": [one], "e": [one]}
    dataset = write_squares(tmp_path, {name: (40, 36, cells) for name, cells in samples.items()})
    loader = course_recipe.course_loader(dataset, workers=0, seed=0)
    chosen = [samples[dataset.sample_ids[index]] for index in loader.dataset.indices]
    assert len(chosen) == 4 == loader.sampler.num_samples and loader.batch_size == 2
    labels = [[cell[0] for cell in cells] for cells in chosen]
    counts = {k: sum(row.count(k) for row in labels) for k in (1, 2)}
    rarity = {k: math.log1p(max(counts.values()) / counts[k]) for k in (1, 2)}
    expected = [sum(rarity[k] for k in row) / len(row) for row in labels]
    assert loader.sampler.weights.tolist() == pytest.approx(expected)
    assert loader.sampler.replacement
    assert counts[1] != counts[2] and len(set(expected)) > 1
    again = course_recipe.course_loader(dataset, workers=0, seed=1)
    assert {*again.dataset.indices} != {*loader.dataset.indices}


def test_course_samples_hold_a_stack_of_masks(tmp_path):
    cells = [(1, 2, 3, 14, 15), (2, 20, 4, 34, 18)]
    dataset = write_squares(tmp_path, {"a": (40, 36, cells), "b": (30, 36, [])})
    image, target = course_recipe.StackedMasks(dataset)[0]
    assert image.dtype == torch.float32 and 0 < image.max() <= 1
    assert target["masks"].dtype == torch.bool and target["masks"].shape == (2, 40, 36)
    assert target["masks"].sum(dim=(1, 2)).tolist() == [12 * 12, 14 * 14]
    assert target["masks"][1, 4:18, 20:34].all() and "instance_map" not in target
    assert course_recipe.StackedMasks(dataset)[1][1]["masks"].shape == (0, 30, 36)


class CountingModel(torch.nn.Module):
    """Takes batches and time, and gives a loss."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.weight, self.seconds, self.batches = torch.nn.Parameter(torch.ones(1)), seconds, 0

    def forward(self, images, targets):
        self.batches += 1
        time.sleep(self.seconds)
        return {"loss": self.weight.sum()}


@pytest.mark.parametrize(
    ("seconds", "budget", "steps", "ended_by"),
    [
        (0.0, 60, 12, "epochs"),  # three batches an epoch, four epochs
        (0.1, 0.35, 4, "time"),  # in the second epoch
        (0.1, 0.25, 3, "time"),  # at the end of the first
    ],
)
def test_course_training_ends_by_epochs_or_time(seconds, budget, steps, ended_by):
    model = CountingModel(seconds)
    training = course_recipe.train_course(model, [([], [])] * 3, time_budget=budget, progress=False)
    assert (training.steps, training.ended_by) == (steps, ended_by) and model.batches == steps
    assert training.seconds >= steps * seconds


def test_the_cores_of_a_side_are_as_many_as_its_threads():
    before, cores = torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: {0})(0)
    try:
        accuracy.hold_to_cores(1)
        assert torch.get_num_threads() == 1
        if hasattr(os, "sched_getaffinity"):
            assert os.sched_getaffinity(0) == {min(cores)}
    finally:
        torch.set_num_threads(before)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)


@pytest.fixture
def small_sides(data, tmp_path, monkeypatch):
    """Give the options of a comparison of seconds, and the file it writes."""
    weights, results = tmp_path / "weights.pth", tmp_path / "accuracy.json"
    torch.save(mobilenet_v2(weights=None).state_dict(), weights)
    small = {"workers": 0, "min_size": 64, "max_size": 96}
    for side, settings in (("course_recipe", small), ("ours", TINY)):
        own = accuracy.SIDES[side]
        changed = replace(own, settings=own.settings | settings)
        monkeypatch.setitem(accuracy.SIDES, side, changed)
    monkeypatch.setattr(accuracy, "RESULTS", results)
    monkeypatch.setattr(accuracy, "hold_to_cores", lambda threads: None)
    monkeypatch.setattr(accuracy, "run_alone", lambda function, *given: function(*given))
    monkeypatch.setenv("CELLSEG_DATA", str(data))
    options = ["--minutes", "0.02", "--keep", str(tmp_path / "kept"), "--weights", str(weights)]
    return options, results


@pytest.mark.slow
def test_both_sides_are_measured_by_one_command(small_sides, capsys):
    options, path = small_sides
    accuracy.main(options)
    results = json.loads(path.read_text(encoding="utf-8"))
    assert list(results) == ["course_recipe", "ours"]
    for entry in results.values():
        assert entry["minutes"] == 0.02 and entry["threads"] == 2 and entry["date"]
        assert entry["weights"] == "weights.pth"
        assert entry["seconds"] > 0 and entry["steps"] > 0 and entry["peak_memory_mb"] > 0
        for part in ("tiles", "pieces"):
            assert {"ap50", "ap50_100", "ap"} <= entry[part].keys()
        assert 0 <= entry["pq"] <= 1 and 0 <= entry["aji"] <= 1 and 0 <= entry["dice"] <= 1
        assert entry["intervals"].keys() == {"tiles_ap50", "pieces_ap50", "pq", "aji", "dice"}
    learned_from = {side: entry["settings"]["train_on"] for side, entry in results.items()}
    assert learned_from == {"course_recipe": "pieces", "ours": "tiles"}
    assert results["ours"]["ended_by"] == "time"
    printed = capsys.readouterr().out
    assert "| AP50, held tiles" in printed and "MISSED: AP50, held tiles: 0." in printed

    # From what is kept, predicted again or not: the same figures, and the other side as it was.
    kept = dict(results, course_recipe=results["course_recipe"] | {"date": "2026-01-31"})
    path.write_text(json.dumps(kept), encoding="utf-8")
    for less in ("--predict-only", "--score-only"):
        accuracy.main([*options, less, "--only", "ours"])
        assert json.loads(path.read_text(encoding="utf-8")) == kept
    accuracy.main([*options, "--predict-only"])
    assert json.loads(path.read_text(encoding="utf-8")) == results


def test_what_the_comparison_cannot_do_is_said(small_sides, monkeypatch, capsys):
    options, path = small_sides
    assert accuracy.main([*options, "--score-only"]) == 1
    assert "keeps nothing of a training; measure without an -only" in capsys.readouterr().err
    monkeypatch.delenv("CELLSEG_DATA")
    assert accuracy.main(options) == 1
    assert "error: set CELLSEG_DATA to the folder" in capsys.readouterr().err
    assert not path.exists()


def entry(ap50, pieces, pq=0.6, aji=0.6):
    precisions = {part: {"ap50": value, "ap50_100": value, "ap": value / 2}
                  for part, value in (("tiles", ap50), ("pieces", pieces))}  # fmt: skip
    means = {"pq_mean": pq, "aji_mean": aji, "dice_mean": 0.7, "dice": 0.7}
    clock = {"seconds": 2700.4, "peak_memory_mb": None, "date": "2026-01-31"}
    return precisions | means | clock | {"pq": pq, "aji": aji}


@pytest.mark.parametrize(
    ("ours", "course", "misses"),
    [
        (entry(0.45, 0.5), entry(0.02, 0.2), []),
        (entry(0.45, 0.3), None, []),
        (entry(0.44, 0.5), entry(0.02, 0.2), ["AP50, held tiles: 0.440, 0.45 wanted"]),
        (entry(0.5, 0.49), entry(0.1, 0.2), ["AP50, their pieces: 0.490, 2.5 times 0.200 wanted"]),
        (
            entry(0.5, 0.5, pq=0.51, aji=0.52),
            None,
            ["PQ, pooled: 0.510, 0.52 wanted", "AJI, pooled: 0.520, 0.53 wanted"],
        ),
        (None, entry(0.02, 0.2), []),
    ],
)
def test_what_must_be_reached(ours, course, misses):
    sides = {"course_recipe": course, "ours": ours}
    assert accuracy.find_misses({k: v for k, v in sides.items() if v}) == misses


def cells_of(results):
    lines = accuracy.figure_table(results).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_shows_ratios_where_there_are_both():
    lines = cells_of({"course_recipe": entry(0.02, 0.2), "ours": entry(0.5, 0.6)})
    assert ["AP50, held tiles", "0.020", "0.500", "25.00"] in lines
    assert ["training, s", "2700", "2700", "1.00"] in lines
    assert ["peak memory, MB", "-", "-", "-"] in lines
    assert lines[-1] == ["measured", "2026-01-31", "2026-01-31", ""]
    assert ["AP50, held tiles", "-", "0.500", "-"] in cells_of({"ours": entry(0.5, 0.6)})

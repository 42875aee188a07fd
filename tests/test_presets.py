"""Presets: one table, overrides that win, sizes settled from the data, settings sorted."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_files import plain_image, write_sample

from cellseg import presets
from cellseg.data import CellDataset, TrainTransform
from cellseg.errors import SettingsError
from cellseg.models import BUILDERS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", presets.NAMES)
def test_every_setting_of_a_preset_is_taken(name):
    recipe = presets.preset(name)
    parts = presets.group_settings(recipe)
    assert set().union(*parts.values()) == set(recipe)
    assert presets.pick_builder(recipe["backbone"]) in BUILDERS.values()
    assert recipe["epochs"] or recipe["time_budget"]


def test_table_shows_each_setting_with_a_reason():
    lines = presets.presets_table().splitlines()
    assert lines[0] == "| setting | quick | laptop | gpu | why |"
    assert len(lines) == 2 + len(presets.TABLE)
    assert all(line.count(" | ") == 4 and not line.endswith("|  |") for line in lines[2:])
    assert any(line.startswith("| `epochs` | 24 | - | 60 | ") for line in lines)


@pytest.mark.parametrize("place", ["README.md", "Training.ipynb"])
def test_table_stands_where_users_read_it(place):
    text = (ROOT / place).read_text(encoding="utf-8")
    if place.endswith(".ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    assert presets.presets_table().strip() in text


def test_preset_goes_by_the_device():
    assert presets.pick_preset("cpu") == "laptop"


@pytest.mark.parametrize(
    ("overrides", "length", "reason"),
    [
        ({}, (24, 360), "the preset's own"),
        ({"epochs": 3}, (3, None), "alone"),
        ({"time_budget": 60.0}, (None, 60.0), "alone"),
        ({"epochs": 3, "time_budget": 60.0}, (3, 60.0), "whichever is over first"),
        ({"batch_size": 2}, (24, 360), "of something else"),
    ],
)
def test_a_length_replaces_the_preset_length(overrides, length, reason):
    before = presets.preset("quick")
    recipe = presets.override(before, overrides)
    assert (recipe["epochs"], recipe["time_budget"]) == length, reason
    assert before == presets.preset("quick")


def test_a_setting_goes_to_all_that_take_it():
    parts = presets.group_settings(
        {"crop_size": 9, "seed": 4, "norm": "frozen", "weights": None, "mask_threshold": 0.4}
    )
    assert parts == {
        "own": {"weights": None},
        "builder": {"seed": 4, "norm": "frozen"},
        "transform": {"crop_size": 9},
        "loaders": {"seed": 4},
        "fit": {"seed": 4},
        "predict": {"mask_threshold": 0.4},
    }
    assert TrainTransform(**parts["transform"]).crop_size == 9


def test_what_nothing_takes_is_refused():
    with pytest.raises(SettingsError, match="nothing takes the setting 'crop'; use one of"):
        presets.override({}, {"crop": 3})
    with pytest.raises(SettingsError, match="preset 'fast' is unknown; use one of quick, lap"):
        presets.preset("fast")
    with pytest.raises(SettingsError, match="backbone 'vgg' is unknown; use one of resnet50"):
        presets.pick_builder("vgg")


def test_settings_are_read_as_json_or_words():
    texts = [
        "image_scale=1.5", "norm=trained", "scale_range=[0.7, 1.4]", "cascade=true",
        "mask_quality=True", "mask_rois=null", "weights=None", "views=a=b",
    ]  # fmt: skip
    assert presets.read_overrides(texts) == {
        "image_scale": 1.5, "norm": "trained", "scale_range": [0.7, 1.4], "cascade": True,
        "mask_quality": True, "mask_rois": None, "weights": None, "views": "a=b",
    }  # fmt: skip
    with pytest.raises(SettingsError, match="--set flip: write it as key=value"):
        presets.read_overrides(["flip"])


def test_sizes_are_settled_from_the_cells(tmp_path):
    ids = np.zeros((40, 50))
    ids[10:24, 10:24] = 1  # 196 px: a disc of 15.8 px
    write_sample(tmp_path / "a", plain_image(40, 50), {1: ids})
    dataset = CellDataset(tmp_path)
    automatic = {"image_scale": "auto", "network_size": 320, "norm": "auto"}
    assert presets.resolve_sizes(automatic, dataset) == {
        "image_scale": 2.0, "crop_size": 160, "norm": "auto",
    }  # fmt: skip
    fixed = presets.resolve_sizes(automatic | {"image_scale": "0.5"}, None)
    assert (fixed["image_scale"], fixed["crop_size"]) == (0.5, 640)
    given = presets.resolve_sizes(automatic | {"crop_size": 99}, dataset)
    assert (given["image_scale"], given["crop_size"]) == (2.0, 99)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_scale": "big"}, "image_scale is 'big'; use 'auto' or a finite number above 0"),
        ({"image_scale": 0}, "image_scale is 0; use"),
        ({"image_scale": "-1.5"}, "image_scale is '-1.5'; use"),
        ({"image_scale": "nan"}, "image_scale is 'nan'; use"),
        ({"image_scale": float("inf")}, "image_scale is inf; use"),
        ({"image_scale": None}, "image_scale is None; use"),
        ({"network_size": 0}, "network_size is 0; give 1 or more"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_settled_are_named(settings, message):
    with pytest.raises(SettingsError, match=message):
        presets.resolve_sizes(settings, None)

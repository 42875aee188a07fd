"""Recipes for three machines: every setting that differs between them in one table, with why."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from torch import nn

from cellseg import markdown
from cellseg.data import CellDataset, TrainTransform, make_loaders
from cellseg.data.sizes import measure_cells, suggest_crop_size, suggest_image_scale
from cellseg.errors import SettingsError, check_at_least
from cellseg.models import BUILDERS, DetectorOptions
from cellseg.models.options import ANCHOR_SIZES
from cellseg.training import fit, pick_device

Recipe = dict[str, Any]

NAMES = ("quick", "laptop", "gpu")
SMALL, MIDDLE = list(ANCHOR_SIZES), [16, 32, 64, 128, 256]
TABLE: tuple[tuple[str, Any, Any, Any, str], ...] = (
    # setting, its value in each preset, reason
    ("backbone", "mobilenetv2", "mobilenetv2", "resnet50v2", "what a CPU bears; the more accurate"),
    ("weights", None, "DEFAULT", "DEFAULT", "a try downloads nothing; ImageNet's or COCO's"),
    ("image_scale", 1.0, "auto", "auto", "drawn cells are large; the median 32 network pixels"),
    ("network_size", 192, 320, 512, "side of a crop in network pixels; larger costs memory"),
    ("anchor_sizes", SMALL, MIDDLE, MIDDLE, "network pixels, one a level; half a cell and up"),
    ("batch_size", 4, 4, 8, "crops a step; 8 fit into 16 GB"),
    ("sampler", "shuffle", "area", "area", "a large image is seen in as many places as it has"),
    ("draws_per_image", 2, 1, 1, "an epoch is long enough to be worth a validation"),
    ("fpn_channels", 64, 128, 256, "costs a CPU more than the backbone; COCO heads fit 256"),
    ("head_width", 256, 512, 1024, "units of the box head; COCO's has 1024"),
    ("rois_per_image", 128, 128, 512, "RoIs that the losses see; a quarter get masks"),
    ("mask_rois", 16, 16, None, "of these, cells that the mask loss sees: a CPU's largest cost"),
    ("class_masks", False, False, True, "one for all classes is +0.017 AP50 in short trainings"),
    ("train_proposals", 500, 500, 1000, "boxes that the RPN hands on of a crop in training"),
    ("learning_rate", 1e-3, 5e-4, 2e-4, "AdamW; on tissue 5e-4 beat 1e-3 and 2e-3"),
    ("epochs", 24, None, 60, "peers' gains level off after 50"),
    ("time_budget", 360, 2700, None, "seconds, after which the schedule has come to its end"),
    ("validate_every", 8, 4, 2, "epochs; a validation costs as much as an epoch on a CPU"),
    ("views", "plain", "d4", "d4", "at test: d4 +0.09 AP50 for 8 times the time; turns +0.08, 4"),
)
OWN = ("backbone", "weights", "network_size")
"""Settings that no function takes by these names."""
PREDICTION = (
    "score_threshold", "mask_threshold", "iou_threshold", "views", "scales", "tile_size", "overlap",
    "mix_whole",
)  # fmt: skip
"""Settings that `predict_images` hands on."""
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def preset(name: str) -> Recipe:
    """Return a preset's settings by name.

    Raises:
        SettingsError: if there is no such preset.
    """
    if name not in NAMES:
        raise SettingsError(f"preset {name!r} is unknown; use one of {', '.join(NAMES)}")
    column = 1 + NAMES.index(name)
    return {row[0]: row[column] for row in TABLE}


def pick_preset(device: str = "auto") -> str:
    """Return the preset for a device as `pick_device` understands it: "gpu", or "laptop"."""
    return "laptop" if pick_device(device).type == "cpu" else "gpu"


def pick_builder(backbone: str) -> Callable[..., nn.Module]:
    """Return `get_model_<backbone>`.

    Raises:
        SettingsError: if there is no such builder.
    """
    builder = BUILDERS.get(f"get_model_{backbone}")
    if builder is None:
        known = ", ".join(name.removeprefix("get_model_") for name in BUILDERS)
        raise SettingsError(f"backbone {backbone!r} is unknown; use one of {known}")
    return builder


def presets_table() -> str:
    """Return all presets as a Markdown table, a setting and its reason on each line."""
    rows = [
        (markdown.code(name), *("-" if value is None else f"{value}" for value in values), reason)
        for name, *values, reason in TABLE
    ]
    return markdown.table(("setting", *NAMES, "why"), rows) + "\n"


def read_overrides(texts: Iterable[str]) -> Recipe:
    """Return settings written as key=value, such as `cascade=true` or `scale_range=[0.8,1.25]`.

    A value is read as JSON, else as Python's True, False or None, else taken as a word.

    Raises:
        SettingsError: if one has no value.
    """
    overrides = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--set {text}: write it as key=value")
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = _PYTHON_WORDS.get(value, value)
    return overrides


def override(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """Return a recipe in which overrides win; `epochs` or `time_budget` alone set the length.

    Raises:
        SettingsError: if nothing takes an override.
    """
    length = {"epochs", "time_budget"}
    cleared = dict.fromkeys(length) if length & overrides.keys() else {}
    changed = dict(recipe) | cleared | dict(overrides)
    group_settings(changed)
    return changed


def resolve_sizes(recipe: Mapping[str, Any], dataset: CellDataset) -> Recipe:
    """Return a recipe whose image scale and crop size are numbers, found from the data's cells.

    An `image_scale` of "auto" becomes what `suggest_image_scale` says, and `network_size` the
    `crop_size` in image pixels that it means at that scale, unless the recipe has one.

    Args:
        recipe: settings by name.
        dataset: the training samples; each is read if the scale is "auto".

    Raises:
        SettingsError: if `image_scale` is another word or not above 0, or `network_size` below 1.
        DataError: if a sample cannot be read; names the file.
    """
    settled = {name: value for name, value in recipe.items() if name != "network_size"}
    if "network_size" in recipe:
        check_at_least(1, network_size=recipe["network_size"])
    scale = settled["image_scale"] = _settle_scale(recipe.get("image_scale", 1.0), dataset)
    if "network_size" in recipe:
        settled.setdefault("crop_size", suggest_crop_size(scale, recipe["network_size"]))
    return settled


def _settle_scale(given: Any, dataset: CellDataset) -> float:
    """Return an image scale as a number, from the data's cells if it is "auto"."""
    if given == "auto":
        return suggest_image_scale(measure_cells(dataset))
    try:
        scale = float(given)
    except (TypeError, ValueError):
        scale = math.nan
    if not 0 < scale < math.inf:
        raise SettingsError(f"image_scale is {given!r}; use 'auto' or a finite number above 0")
    return scale


def group_settings(recipe: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return a recipe's settings by what takes them; each goes to all that do.

    Returns:
        dict of "builder", "transform" (`TrainTransform`), "loaders" (`make_loaders`), "fit",
        "predict" (`predict_images`) and "own" (the `OWN` ones).

    Raises:
        SettingsError: if nothing takes a setting.
    """
    takers = _takers()
    unknown = sorted(recipe.keys() - set().union(*takers.values()))
    if unknown:
        known = ", ".join(sorted(set().union(*takers.values())))
        raise SettingsError(f"nothing takes the setting {unknown[0]!r}; use one of {known}")
    return {
        taker: {name: value for name, value in recipe.items() if name in names}
        for taker, names in takers.items()
    }


@cache
def _takers() -> dict[str, frozenset[str]]:
    """Return the names of the settings that each part of a run takes."""
    return {
        "own": frozenset(OWN),
        "builder": frozenset(field.name for field in fields(DetectorOptions)),
        "transform": _keywords(TrainTransform),
        "loaders": _keywords(make_loaders),
        "fit": _keywords(fit) - {"run_dir", "progress", "ranks", "resume"},
        "predict": frozenset(PREDICTION),
    }


def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)

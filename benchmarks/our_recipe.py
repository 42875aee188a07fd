"""The package's own recipe, trained and used by its public functions: one dict of settings."""

import inspect
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.held_tissue import training_samples
from cellseg import inference
from cellseg.coco import Record
from cellseg.data import CellDataset, SampleImages, TrainTransform, make_loaders
from cellseg.errors import SettingsError
from cellseg.inference import predict_images
from cellseg.models import BUILDERS
from cellseg.models.builders import DetectorOptions
from cellseg.training import fit, open_run, read_history

LAPTOP: dict[str, Any] = {
    "backbone": "mobilenetv2",
    "train_on": "pieces",
    "image_scale": 2.0,
    "crop_size": 160,
    "batch_size": 4,
    "workers": 1,
    "learning_rate": 1e-3,
    "fpn_channels": 128,
    "head_width": 512,
    "rois_per_image": 128,
    "detections_per_image": 1000,
    "epochs": None,
    "time_budget": 45 * 60,
}
"""Settings by name, `time_budget` in seconds; each goes to every function that takes it."""

OWN = ("backbone", "train_on")
NOT_OF_A_RECIPE = {
    "run_dir", "progress", "ranks", "resume", "validate_every", "probe_images", "image_id",
}  # fmt: skip
PREDICTORS = [getattr(inference, name) for name in dir(inference) if name.startswith("predict_")]
NEVER = 10**9  # epochs between validations: only the last is validated, and it chooses nothing


@dataclass(frozen=True)
class Training:
    """What a training took.

    Attributes:
        steps: of the optimiser.
        seconds: wall time of training, loading included.
        peak_memory_mb: of the process that trained; None where the system does not tell.
        ended_by: "epochs" or "time".
    """

    steps: int
    seconds: float
    peak_memory_mb: float | None
    ended_by: str


def keyword_names(function: Callable[..., Any]) -> set[str]:
    """Return the names of the keyword-only arguments of a function that a recipe may set."""
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return names - NOT_OF_A_RECIPE


def sort_settings(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a recipe's settings by the function that takes them, each with all that take it.

    Returns:
        dict of "builder", "transform", "loaders", "fit", "predict", and "own" for what is decided
        here: `backbone` and `train_on`.

    Raises:
        SettingsError: if nothing takes a setting.
    """
    takers = {
        "own": set(OWN),
        "builder": {field.name for field in fields(DetectorOptions)},
        "transform": keyword_names(TrainTransform),
        "loaders": keyword_names(make_loaders),
        "fit": keyword_names(fit),
        # `predict_images` hands on what the functions below it take.
        "predict": set().union(*map(keyword_names, PREDICTORS)),
    }
    unknown = sorted(set(recipe).difference(*takers.values()))
    if unknown:
        known = ", ".join(sorted(set().union(*takers.values())))
        raise SettingsError(f"nothing takes the setting {unknown[0]!r}; there are {known}")
    return {
        taker: {name: value for name, value in recipe.items() if name in names}
        for taker, names in takers.items()
    }


def train_ours(
    recipe: Mapping[str, Any],
    data: Path,
    weights: Path | None,
    folder: Path,
    *,
    progress: bool = True,
) -> Training:
    """Train the package's model into `folder/run`, an earlier run there removed.

    Validation is kept to the end, on one training piece: `fit` wants one, and it chooses nothing,
    since the weights' average as it stands at the end (`last.pt`) is what predicts.

    Args:
        recipe: as `LAPTOP`.
        data: the folder with consep/ and consep_tiles/.
        weights: file of ImageNet weights; None for random ones.
        folder: for the run and the cache of samples.
        progress: show bars with the time left.
    """
    parts = sort_settings(recipe)
    kind, seed = parts["own"]["train_on"], recipe.get("seed", 0)
    samples = training_samples(data, kind, seed=seed, cache_dir=folder.parent / "cache")
    pieces = training_samples(data, "pieces", channel_order=samples.channel_order)
    train = samples.subset(samples.sample_ids, transform=TrainTransform(**parts["transform"]))
    last = pieces.subset(pieces.sample_ids[:1])
    builder = BUILDERS[f"get_model_{parts['own']['backbone']}"]
    model = builder(train.num_classes, weights=weights, **parts["builder"])
    shutil.rmtree(folder / "run", ignore_errors=True)
    run = open_run(folder, model, train, last, recipe=dict(recipe), seed=seed, name="run")
    loaders = make_loaders(train, last, **parts["loaders"])
    options = {"validate_every": NEVER, "probe_images": 0, "progress": progress}
    for _ in fit(model, *loaders, run_dir=run.path, **options, **parts["fit"]):
        pass
    history = read_history(run.path)
    seconds, budget = sum(epoch.seconds for epoch in history), recipe.get("time_budget")
    return Training(
        steps=history[-1].step,
        seconds=seconds,
        peak_memory_mb=history[-1].peak_memory_mb,
        ended_by="time" if budget and seconds >= budget else "epochs",
    )


def our_predictor(
    recipe: Mapping[str, Any], model: nn.Module, *, progress: bool = True
) -> Callable[[CellDataset], list[Record]]:
    """Return what predicts the images of a dataset with a model, as the recipe says."""
    options = sort_settings(recipe)["predict"] | {"progress": progress}
    return lambda dataset: predict_images(model, SampleImages(dataset), **options)

"""The package's own recipe, trained and used by its public functions: one dict of settings."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.held_tissue import training_samples
from cellseg import presets
from cellseg.coco import Record
from cellseg.data import CellDataset, SampleImages, TrainTransform, make_loaders
from cellseg.inference import predict_images
from cellseg.models import build_from_spec
from cellseg.presets import pick_builder, resolve_sizes
from cellseg.training import fit, open_run, read_checkpoint, read_history

LAPTOP: dict[str, Any] = presets.preset("laptop") | {"train_on": "tiles"}
"""Settings of a preset, and `train_on`: the training tiles whole, or as their pieces."""

NEVER = 10**9  # epochs between validations: only after the last is there one


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


def group_settings(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a recipe's settings by what takes them, as `presets.group_settings`, and `train_on`.

    Raises:
        SettingsError: if nothing takes a setting.
    """
    here = {name: recipe[name] for name in ("train_on",) if name in recipe}
    parts = presets.group_settings({k: v for k, v in recipe.items() if k not in here})
    return parts | {"own": parts["own"] | here}


def train_ours(
    recipe: Mapping[str, Any],
    data: Path,
    weights: Path | None,
    folder: Path,
    *,
    progress: bool = True,
) -> Training:
    """Train the package's model on the training tiles into `folder/run`, an earlier run removed.

    Args:
        recipe: as `LAPTOP`.
        data: the folder with consep/ and consep_tiles/.
        weights: file of ImageNet weights; None for random ones.
        folder: for the run and the cache of samples.
        progress: show bars with the time left.
    """
    seed, cache = recipe.get("seed", 0), folder.parent / "cache"
    samples = training_samples(data, recipe["train_on"], seed=seed, cache_dir=cache)
    pieces = training_samples(data, "pieces", channel_order=samples.channel_order)
    shutil.rmtree(folder / "run", ignore_errors=True)
    run_dir = train_recipe(
        resolve_sizes(recipe, samples),
        samples,
        pieces.subset(pieces.sample_ids[:1]),
        weights,
        folder,
        progress=progress,
    )
    history = read_history(run_dir)
    seconds, budget = sum(epoch.seconds for epoch in history), recipe.get("time_budget")
    return Training(
        steps=history[-1].step,
        seconds=seconds,
        peak_memory_mb=history[-1].peak_memory_mb,
        ended_by="time" if budget and seconds >= budget else "epochs",
    )


def train_recipe(
    recipe: Mapping[str, Any],
    train: CellDataset,
    val: CellDataset,
    weights: str | Path | None,
    folder: Path,
    *,
    progress: bool = True,
) -> Path:
    """Train a recipe into `folder/run`, or go on with what an earlier call left; return the run.

    Validation is kept to the end, on one image: `fit` wants one, and it chooses nothing, since
    the weights' average as it stands at the end (`last.pt`) is what predicts.

    Args:
        recipe: settings by name, its sizes settled (`resolve_sizes`).
        train: the samples to train on.
        val: what the run notes as its validation; the first image of it is the one.
        weights: as the builder takes them.
        folder: of the run.
        progress: show bars with the time left.
    """
    parts = group_settings(recipe)
    augmented = train.subset(train.sample_ids, transform=TrainTransform(**parts["transform"]))
    builder = pick_builder(recipe["backbone"])
    model = builder(train.num_classes, weights=weights, **parts["builder"])
    seed = recipe.get("seed", 0)
    run = open_run(folder, model, augmented, val, recipe=recipe, seed=seed, name="run")
    loaders = make_loaders(augmented, val.subset(val.sample_ids[:1]), **parts["loaders"])
    options = parts["fit"] | {"validate_every": NEVER, "probe_images": 0, "progress": progress}
    for _ in fit(model, *loaders, run_dir=run.path, **options):
        pass
    return run.path


def remade_model(checkpoint: Path, overrides: dict[str, Any]) -> nn.Module:
    """Return the averaged model of a checkpoint, with some of the builder's options changed."""
    content = read_checkpoint(checkpoint)
    spec = content["spec"]
    arguments = spec["arguments"] | group_settings(overrides)["builder"]
    model = build_from_spec(spec | {"arguments": arguments})
    model.load_state_dict(content["ema"])
    return model.eval()


def our_predictor(
    recipe: Mapping[str, Any], model: nn.Module, *, progress: bool = True
) -> Callable[[CellDataset], list[Record]]:
    """Return what predicts the images of a dataset with a model, as the recipe says."""
    options = group_settings(recipe)["predict"] | {"progress": progress}
    return lambda dataset: predict_images(model, SampleImages(dataset), **options)

"""Training by folds: a model for each, and for every image the records of one that never saw it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median_high
from typing import Any

from torch import nn

from cellseg.coco import read_records, write_records
from cellseg.data import CellDataset, SampleImages, TrainTransform, make_folds, make_loaders
from cellseg.errors import DataError, TrainingError
from cellseg.evaluation import dataset_truth, score_records
from cellseg.files import read_json, write_atomically
from cellseg.inference import predict_images
from cellseg.training.checkpoint import BEST_NAME, load_model
from cellseg.training.distributed import ALONE, Ranks
from cellseg.training.fit import fit
from cellseg.training.precision import pick_device
from cellseg.training.run import (
    FOLDS_NAME,
    OOF_NAME,
    VALIDATION_NAME,
    EpochSummary,
    open_run,
    read_history,
)

RULE = "the median of the folds' best epochs, of an even number the later middle one"
"""How long the training on all images takes."""

Parts = Mapping[str, Mapping[str, Any]]
Groups = Callable[[CellDataset], Mapping[str, Any]]


def plan_folds(
    dataset: CellDataset, run_dir: str | Path, groups: Groups, *, folds: int, seed: int = 0
) -> list[tuple[list[str], list[str]]]:
    """Return the folds of a run: those in its `folds.json`, or new ones, which are written there.

    Args:
        dataset: all images that are to be held out once.
        run_dir: folder of the run, in which each fold gets its own.
        groups: gives samples their group, such as `group_by_similarity`; asked for new folds only.
        folds: how many.
        seed: of the folds.

    Returns:
        `(train_ids, val_ids)` of each fold.

    Raises:
        TrainingError: if the folder holds other folds.
        SettingsError: if there are fewer groups than folds.
    """
    path, asked = Path(run_dir) / FOLDS_NAME, {"seed": seed, "count": folds}
    if path.exists():
        stored = read_folds(run_dir)
        held = [fold["val_ids"] for fold in stored["folds"]]
        if sorted(chain(*held)) != dataset.sample_ids or stored.get("asked") != asked:
            raise TrainingError(
                f"{path} is of other samples or settings ({stored.get('asked')}, now {asked}); "
                "choose another name for this run"
            )
        return [(sorted(set(dataset.sample_ids) - set(ids)), ids) for ids in held]
    counts = {name: dataset.class_counts(index) for index, name in enumerate(dataset.sample_ids)}
    group_of = groups(dataset)
    made = make_folds(counts, group_of, folds=folds, seed=seed)
    entries = [{"name": f"fold{k}", "val_ids": ids} for k, (_, ids) in enumerate(made, 1)]
    _write(run_dir, {"asked": asked, "groups": dict(sorted(group_of.items())), "folds": entries})
    return made


def train_folds(
    build: Callable[[], nn.Module],
    dataset: CellDataset,
    folds: Sequence[tuple[list[str], list[str]]],
    parts: Parts,
    *,
    run_dir: str | Path,
    seed: int = 0,
    workers: int = 2,
    on_change: str = "refuse",
    train_on_all: bool = False,
    ranks: Ranks = ALONE,
    **options: Any,
) -> Iterator[tuple[str, EpochSummary]]:
    """Train a model for each fold, one after the other, and yield each epoch as `fit` does.

    Each fold is a run of its own, `fold1` and so on in the run's folder. Its best weights, by the
    AP50 of the images that it holds out, find the cells of these: `validation.json` there, and
    of all folds together `oof.json`. No model has trained on an image that it predicts; the epoch
    was chosen on it, which makes these records a little better than those of new images.

    With `train_on_all` one more model, in `all`, then trains on every image for as many epochs as
    `RULE` says. It holds no image out: nothing is scored, and its last weights are its best.

    Interrupted anywhere, the same call goes on: a fold that is finished is not trained, or
    predicted, again.

    Args:
        build: makes the model that a fold starts from.
        dataset: all images; their image ids are those of the records.
        folds: `(train_ids, val_ids)` of each, from `plan_folds` for the same `run_dir`.
        parts: settings by what takes them: "transform", "loaders", "fit" and "predict", as
            `presets.group_settings` returns them.
        run_dir: folder of the run.
        seed: of all draws.
        workers: processes that read ahead.
        on_change: what to do if a fold's folder is of another recipe; see `open_run`.
        train_on_all: whether to train on all images at the end.
        ranks: the processes that train together, from `join_ranks`.
        **options: of `fit`, such as `device`, that do not decide the result.

    Yields:
        the fold's name, or "all", and the summary of an epoch trained in this call.

    Raises:
        TrainingInterrupted: as `fit` does; the state is saved.
        TrainingError: as `fit` and `open_run` do.
    """
    run_dir = Path(run_dir)
    settings = {"run_dir": run_dir, "seed": seed, "workers": workers, "ranks": ranks}
    settings |= {"on_change": on_change, "options": options}
    for number, (train_ids, val_ids) in enumerate(folds, start=1):
        name, val = f"fold{number}", dataset.subset(val_ids)
        yield from _train(name, build(), dataset.subset(train_ids), val, parts, **settings)
        close = partial(_close_fold, run_dir / name, val, parts["predict"])
        ranks.from_first(partial(close, options.get("device", "auto")))
    ranks.from_first(partial(_join_folds, run_dir, dataset))
    if train_on_all:
        epochs = ranks.from_first(partial(read_folds, run_dir))["all"]["epochs"]
        parts = {**parts, "fit": parts["fit"] | {"epochs": epochs, "time_budget": None}}
        every = dataset.subset(dataset.sample_ids)
        yield from _train("all", build(), every, None, parts, **settings)


def _train(
    name: str,
    model: nn.Module,
    train: CellDataset,
    val: CellDataset | None,
    parts: Parts,
    *,
    run_dir: Path,
    seed: int,
    workers: int,
    on_change: str,
    ranks: Ranks,
    options: Mapping[str, Any],
) -> Iterator[tuple[str, EpochSummary]]:
    """Train, or go on, in one folder of a run; yield its name and each epoch's summary."""
    train.transform = TrainTransform(**parts["transform"])
    about = {"recipe": _recipe(parts), "seed": seed, "name": name, "on_change": on_change}
    about |= {"groups": read_folds(run_dir).get("groups"), "prediction": parts["predict"]}
    ranks.from_first(partial(open_run, run_dir, model, train, val, **about))
    loaders = make_loaders(train, val, workers=workers, seed=seed, **parts["loaders"])
    settings = {**options, **parts["fit"], "seed": seed, "ranks": ranks}
    for epoch in fit(model, *loaders, run_dir=run_dir / name, **settings):
        yield name, epoch


def read_folds(run_dir: str | Path) -> dict[str, Any]:
    """Return the content of a run's `folds.json`.

    It holds `asked` (count and seed), `groups` (sample_id -> group), `folds` (of each its `name`,
    `val_ids` and, once it is trained, `best_epoch`, the `scores` of its images, and `told`: the
    epochs trained and the settings of prediction) and, once all are, `oof` (the scores of all
    records together) and `all` (`epochs` and their `rule`).

    Raises:
        DataError: if there is none, or it is not one of ours.
    """
    path = Path(run_dir) / FOLDS_NAME
    content = read_json(path)
    folds = content.get("folds") if isinstance(content, dict) else None
    if not isinstance(folds, list) or not all(
        isinstance(fold, dict) and isinstance(fold.get("val_ids"), list) for fold in folds
    ):
        raise DataError(f"{path} holds no folds; remove the run's folder")
    return content


def folds_name(model: nn.Module, dataset: CellDataset, parts: Parts, folds: int, seed: int) -> str:
    """Return the default name of a run of folds: builder, folds, and a hash of all settings."""
    arguments = {k: v for k, v in model.spec["arguments"].items() if k != "weights"}
    content = [arguments, model.provenance, dataset.fingerprint(), _recipe(parts), seed]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return f"{model.spec['builder'].removeprefix('get_model_')}-{folds}folds-{digest[:8]}"


def _recipe(parts: Parts) -> dict[str, Any]:
    """Return the settings that decide a training's result."""
    return {**parts["transform"], **parts["loaders"], **parts["fit"]}


def _close_fold(
    fold_dir: Path, val: CellDataset, prediction: Mapping[str, Any], device: str
) -> None:
    """Predict the images that a fold held out and note their scores, unless that is done."""
    content, history = read_folds(fold_dir.parent), read_history(fold_dir)
    fold = next(fold for fold in content["folds"] if fold["name"] == fold_dir.name)
    path, told = fold_dir / VALIDATION_NAME, {"epochs": len(history), **prediction}
    if fold.get("told") == told and path.exists():
        return
    model = load_model(fold_dir / BEST_NAME, pick_device(device))
    records = predict_images(model, SampleImages(val), progress=False, **prediction)
    write_records(path, records)
    scored = [epoch for epoch in history if epoch.ap50 is not None] or history[-1:]
    fold["best_epoch"] = max(scored, key=lambda epoch: epoch.ap50 or 0.0).epoch
    fold["scores"] = asdict(score_records(dataset_truth(val), records))
    fold["told"] = told
    _write(fold_dir.parent, content)


def _join_folds(run_dir: Path, dataset: CellDataset) -> None:
    """Write the records of all folds into one file, and what they and the folds say."""
    content, records = read_folds(run_dir), []
    for fold in content["folds"]:
        records += read_records(run_dir / fold["name"] / VALIDATION_NAME)
    write_records(run_dir / OOF_NAME, records)
    epochs = median_high(fold["best_epoch"] for fold in content["folds"])
    scores = asdict(score_records(dataset_truth(dataset), records))
    _write(run_dir, content | {"oof": scores, "all": {"epochs": epochs, "rule": RULE}})


def _write(run_dir: str | Path, content: Mapping[str, Any]) -> None:
    """Write a run's `folds.json`."""
    write_atomically(Path(run_dir) / FOLDS_NAME, json.dumps(content, indent=1) + "\n")

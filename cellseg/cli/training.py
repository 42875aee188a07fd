"""Commands that train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cellseg.cli.shared import (
    Device,
    Names,
    TrainDir,
    app,
    option,
    pick_names,
    read_ids,
)
from cellseg.errors import SettingsError
from cellseg.files import check_writable

if TYPE_CHECKING:
    from torch import nn

    from cellseg.data import CellDataset
    from cellseg.training.distributed import Ranks

ALIKE = "alike"
GROUPS = (ALIKE, "random")
OPTIONS = {
    "seed": "--seed", "device": "--device", "workers": "--workers", "tracker": "--tracker",
    "save_every": "--save-minutes", "keep_checkpoints": "--keep-checkpoints",
}  # fmt: skip
"""Settings of a recipe's parts that are no part of a recipe here, and their options."""


class Split(NamedTuple):
    """The ids of the samples on both sides, and their groups; None if each stands alone."""

    train_ids: list[str]
    val_ids: list[str]
    groups: dict[str, int] | None


# What `train` takes
PresetName = Annotated[
    str, typer.Option(help="Recipe: quick, laptop or gpu; auto takes gpu where there is one.")
]
BackboneName = Annotated[str | None, option("Such as mobilenetv2, resnet50v2 or convnext_tiny.")]
Weights = Annotated[
    str | None, option("Pretrained weights: DEFAULT, COCO, IMAGENET, a file, or none.")
]
ImageScale = Annotated[
    str | None, option("Network pixels per image pixel; auto: from the cells' size.")
]
CropSize = Annotated[
    int | None, option("Side of a training crop, image pixels; instead of --network-size.")
]
RoisPerImage = Annotated[int | None, option("Proposals per crop that the heads learn from.")]
Precision = Annotated[str | None, option("Number format: auto, float32, bfloat16 or float16.")]
OtherSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting, such as cascade=true or scale_range=[0.8,1.25]; may be given "
        "several times. An unknown key is refused with a list of those that there are.",
        show_default=False,
    ),
]
ValIds = Annotated[
    str | None,
    option("Samples to hold out: folder names with commas between, or a file of one a line."),
]
ValFraction = Annotated[
    float, typer.Option(help="Without --val-ids: share of the data to hold out, as the notebook.")
]
GroupsBy = Annotated[
    str,
    typer.Option(
        help="Images that are held out together or not at all: alike (those of one slide, as "
        "far as their pixels tell: 17 s for 209 images) or random (none)."
    ),
]
TrainOnAll = Annotated[
    bool, typer.Option(help="After --folds: train one more model, on every image.")
]
RunName = Annotated[
    str | None, option("Name of the run's folder; default: the backbone and a hash.")
]
OnChange = Annotated[
    str, typer.Option(help="If a run of that name has other settings: refuse or continue.")
]
SaveMinutes = Annotated[float, typer.Option(help="Minutes between saves within an epoch.")]
KeepCheckpoints = Annotated[
    int, typer.Option(help="Number of latest epochs to keep as epoch_<n>.pt, beside last.pt.")
]
Tracker = Annotated[str, typer.Option(help="What else to log to: none or tensorboard.")]
Cache = Annotated[bool, typer.Option(help="Keep decoded samples in cache/ in the folder of runs.")]


@app.command()
def train(
    train_dir: TrainDir,
    preset: PresetName = "auto",
    backbone: BackboneName = None,
    weights: Weights = None,
    image_scale: ImageScale = None,
    network_size: Annotated[int | None, option("Side of a training crop, network pixels.")] = None,
    crop_size: CropSize = None,
    batch_size: Annotated[int | None, option("Training crops per step.")] = None,
    fpn_channels: Annotated[int | None, option("Channels of FPN, RPN and mask head.")] = None,
    head_width: Annotated[int | None, option("Units of the box head.")] = None,
    rois_per_image: RoisPerImage = None,
    learning_rate: Annotated[float | None, option("Peak learning rate.")] = None,
    epochs: Annotated[int | None, option("Passes over the training images.")] = None,
    minutes: Annotated[float | None, option("Minutes of training.")] = None,
    validate_every: Annotated[int | None, option("Epochs from one validation to the next.")] = None,
    precision: Precision = None,
    settings: OtherSettings = None,
    val_ids: ValIds = None,
    val_fraction: ValFraction = 0.25,
    groups: GroupsBy = "alike",
    folds: Annotated[int, option("Cross-validation with this many folds.")] = 0,
    train_on_all: TrainOnAll = False,
    class_names: Names = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    name: RunName = None,
    on_change: OnChange = "refuse",
    save_minutes: SaveMinutes = 10,
    keep_checkpoints: KeepCheckpoints = 0,
    tracker: Tracker = "none",
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 2,
    cache: Cache = True,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a model; run the same command again to go on.

    Settings that are not given are those of the preset; the README has a table of them.

    On several GPUs: torchrun --nproc-per-node 2 -m cellseg train ...; they share each batch.

    With --folds each fold is a run in a folder of its own inside the run's folder, and images
    that are alike are held out together. The run's oof.json gets the records of all images, each
    found by the model that was not trained on it.

    Asked to stop, it ends the step, saves its state and exits with 128 + the signal's number: 130
    after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1 (a cluster's time limit ahead).
    """
    from cellseg import presets
    from cellseg.data import CellDataset
    from cellseg.training import join_ranks

    named = {
        "backbone": backbone, "weights": weights, "image_scale": image_scale,
        "network_size": network_size, "crop_size": crop_size, "batch_size": batch_size,
        "fpn_channels": fpn_channels, "head_width": head_width, "rois_per_image": rois_per_image,
        "epochs": epochs, "time_budget": None if minutes is None else minutes * 60,
        "learning_rate": learning_rate, "validate_every": validate_every, "precision": precision,
    }  # fmt: skip
    chosen = presets.pick_preset(device) if preset == "auto" else preset
    recipe = _override(chosen, named, settings or [])
    _check_split(groups, folds, val_ids, train_on_all)
    with join_ranks(device) as ranks:
        ranks.from_first(partial(check_writable, runs_dir / (name or ""), folder=True))
        dataset = CellDataset(
            train_dir,
            class_names=pick_names(class_names, train_dir),
            seed=seed,
            cache_dir=runs_dir / "cache" if cache else None,
        )
        make_split = partial(divide, dataset, read_ids(val_ids), val_fraction, groups, seed)
        split = None if folds else ranks.from_first(make_split)
        sized = dataset.subset(split.train_ids) if split else dataset
        recipe = ranks.from_first(partial(presets.resolve_sizes, recipe, sized))
        parts = presets.group_settings(recipe)
        build = _builder(recipe, dataset.num_classes, seed)
        options = {
            "on_change": on_change, "workers": workers, "device": device, "seed": seed,
            "save_every": save_minutes * 60, "keep_checkpoints": keep_checkpoints,
            "tracker": tracker, "ranks": ranks,
        }  # fmt: skip
        if ranks.first:
            typer.echo(f"preset {chosen}: {recipe}")
        with exit_on_signal(ranks.first):
            if split is None:
                options["train_on_all"] = train_on_all
                _train_folds(build, dataset, parts, folds, runs_dir, name, **options)
            else:
                _train_once(build, dataset, split, parts, runs_dir, name, **options)


def _override(preset: str, named: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Return a preset's recipe, in which named options (not None) and `--set` win."""
    from cellseg import presets

    given = {key: value for key, value in named.items() if value is not None}
    return presets.override(presets.preset(preset), given | _read_settings(settings))


def _builder(recipe: dict[str, Any], num_classes: int, seed: int) -> Callable[[], "nn.Module"]:
    """Return what builds the model of a recipe."""
    from cellseg import presets

    return partial(
        presets.pick_builder(recipe["backbone"]),
        num_classes,
        weights=None if recipe["weights"] == "none" else recipe["weights"],
        seed=seed,
        **presets.group_settings(recipe)["builder"],
    )


@app.command("train-launched", hidden=True)
def train_launched(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run that a notebook launched.")],
) -> None:
    """Do one process's part of a training that a notebook has launched."""
    from cellseg.training import TrainingInterrupted
    from cellseg.training.launch import train_launched

    try:
        train_launched(run_dir)
    except TrainingInterrupted as interrupted:
        raise typer.Exit(128 + interrupted.signum) from None


@contextmanager
def exit_on_signal(tells: bool) -> Iterator[None]:
    """Exit with 128 + the signal's number if training in the block is asked to stop."""
    from cellseg.training import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as interrupted:
        if tells:
            typer.echo(str(interrupted), err=True)
        raise typer.Exit(128 + interrupted.signum) from None


def _train_once(
    build: Callable[[], "nn.Module"],
    dataset: "CellDataset",
    split: "Split",
    parts: dict[str, dict[str, Any]],
    runs_dir: Path,
    name: str | None,
    *,
    on_change: str,
    workers: int,
    seed: int,
    ranks: "Ranks",
    **options: Any,
) -> None:
    """Train a model on one side of a split, and say where it lies."""
    from cellseg.data import TrainTransform, make_loaders
    from cellseg.training import fit, open_run

    model = build()
    train_data = dataset.subset(split.train_ids, transform=TrainTransform(**parts["transform"]))
    val_data = dataset.subset(split.val_ids)
    open_it = partial(
        open_run, runs_dir, model, train_data, val_data, seed=seed, name=name, groups=split.groups,
        recipe=parts["transform"] | parts["loaders"] | parts["fit"], prediction=parts["predict"],
        on_change=on_change,
    )  # fmt: skip
    run = ranks.from_first(open_it)
    if ranks.first:
        sides = f"{len(train_data)} images to train on, {len(val_data)} held out"
        typer.echo(f"{run.state}; {sides}")
        typer.echo(f"channel order: {train_data.channel_order}; {model.provenance}")
    loaders = make_loaders(train_data, val_data, workers=workers, seed=seed, **parts["loaders"])
    for epoch in fit(
        model, *loaders, run_dir=run.path, seed=seed, ranks=ranks, **options, **parts["fit"]
    ):
        if ranks.first:
            typer.echo(epoch.line())
    if ranks.first:
        typer.echo(f"run folder: {run.path}")


def _train_folds(
    build: Callable[[], "nn.Module"],
    dataset: "CellDataset",
    parts: dict[str, dict[str, Any]],
    folds: int,
    runs_dir: Path,
    name: str | None,
    *,
    seed: int,
    ranks: "Ranks",
    **options: Any,
) -> None:
    """Train a model a fold, and say where the records of all images are."""
    from cellseg.data import group_by_similarity
    from cellseg.training.folds import folds_name, plan_folds, read_folds, train_folds

    def plan() -> tuple[Path, list[tuple[list[str], list[str]]]]:
        run_dir = runs_dir / (name or folds_name(build(), dataset, parts, folds, seed))
        groups = partial(group_by_similarity, progress=True)
        return run_dir, plan_folds(dataset, run_dir, groups, folds=folds, seed=seed)

    run_dir, planned = ranks.from_first(plan)
    for fold, epoch in train_folds(
        build, dataset, planned, parts, run_dir=run_dir, seed=seed, ranks=ranks, **options
    ):
        if ranks.first:
            typer.echo(f"{fold}, {epoch.line()}")
    if ranks.first:
        scores = read_folds(run_dir)["oof"]
        typer.echo(f"run folder: {run_dir}; out of fold: AP50 {scores['ap50']}")


def divide(
    dataset: "CellDataset", val_ids: list[str] | None, val_fraction: float, groups: str, seed: int
) -> Split:
    """Return the split that is asked for; images that are alike stay on one side of a share."""
    from cellseg.data import group_by_similarity, split_ids

    together = groups == ALIKE and val_ids is None
    group_of = group_by_similarity(dataset, progress=True) if together else None
    counts = {name: dataset.class_counts(index) for index, name in enumerate(dataset.sample_ids)}
    sides = split_ids(
        counts, val_fraction=val_fraction, seed=seed, groups=group_of, val_ids=val_ids
    )
    return Split(*sides, group_of)


def _check_split(groups: str, folds: int, val_ids: str | None, train_on_all: bool) -> None:
    """Raise SettingsError for options of a split that do not go together."""
    if groups not in GROUPS:
        raise SettingsError(f"--groups is {groups!r}; use one of {', '.join(GROUPS)}")
    if folds and val_ids:
        raise SettingsError("--folds holds out every image; leave out --val-ids")
    if folds and groups != ALIKE:
        raise SettingsError("--folds keeps together what is alike; leave out --groups")
    if train_on_all and not folds:
        raise SettingsError("--train-on-all comes after --folds; say how many")


def _read_settings(texts: list[str]) -> dict[str, Any]:
    """Return what --set says, unless it is what another option says."""
    from cellseg.presets import read_overrides

    settings = read_overrides(texts)
    for name in settings.keys() & OPTIONS.keys():
        raise SettingsError(f"--set {name}: it has an option of its own, {OPTIONS[name]}")
    return settings

"""The command line: `python -m cellseg <command>`, made from the functions the notebook calls."""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import OptionInfo

from cellseg.errors import CellsegError, SettingsError
from cellseg.files import read_text

if TYPE_CHECKING:
    from torch import nn

    from cellseg.data import CellDataset
    from cellseg.exports import Picture
    from cellseg.training.distributed import Ranks

app = typer.Typer(
    help="Segment cells with Mask R-CNN, from annotated images to a checked result file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Names = Annotated[
    str, typer.Option("--class-names", help="Names of class1, class2, ..., with commas between.")
]
DEFAULT_NAMES = "epithelial,lymphocyte,neutrophil,macrophage"
Ids = Annotated[
    str | None,
    typer.Option(help="Sample ids (folder names) with commas between, or a file of one a line."),
]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
TrainDir = Annotated[
    Path, typer.Argument(help="Folder of samples: one folder each, with image and class maps.")
]


def _help(text: str) -> OptionInfo:
    """Return an option with this text beside it."""
    return typer.Option(help=text, show_default=False)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Folder to fill with a made release.")],
    train_images: Annotated[int, typer.Option(help="Number of annotated images.")] = 40,
    test_images: Annotated[int, typer.Option(help="Number of images without truth.")] = 6,
    image_size: Annotated[int, typer.Option(help="Typical side of an image, pixels.")] = 256,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
) -> None:
    """Make a release of drawn tissue, to try the workflow without data."""
    from cellseg.data import make_sample_release

    release = make_sample_release(
        folder, train_images=train_images, test_images=test_images, image_size=image_size, seed=seed
    )
    typer.echo(f"made tissue lies in {release.root}")


@app.command()
def audit(
    train_dir: TrainDir,
    class_names: Names = DEFAULT_NAMES,
    figure: Annotated[Path | None, typer.Option(help="Where to save the figure, .png.")] = None,
) -> None:
    """Say what a folder of samples holds, and what in it looks like a mistake."""
    from cellseg.data import CellDataset
    from cellseg.data import audit as audit_dataset
    from cellseg.report import plot_audit, save_figure

    found = audit_dataset(CellDataset(train_dir, class_names=_split(class_names)), progress=True)
    typer.echo(found.table())
    if figure is not None:
        typer.echo(f"figure: {save_figure(plot_audit(found), figure)}")


@app.command()
def train(
    train_dir: TrainDir,
    preset: Annotated[
        str, typer.Option(help="quick, laptop or gpu; auto takes gpu where there is one.")
    ] = "auto",
    backbone: Annotated[str | None, _help("Which get_model_* builds the model.")] = None,
    weights: Annotated[str | None, _help("DEFAULT, COCO, IMAGENET, a file, or none.")] = None,
    image_scale: Annotated[str | None, _help("Network pixels a pixel; auto: by the cells.")] = None,
    network_size: Annotated[int | None, _help("Side of a crop, network pixels.")] = None,
    crop_size: Annotated[int | None, _help("The same in image pixels, instead.")] = None,
    crowded: Annotated[float | None, _help("Share of crops laid about a cell, 0-1.")] = None,
    stain: Annotated[float | None, _help("Change of the stains, 0-1.")] = None,
    color: Annotated[float | None, _help("Change of brightness and colour, 0-1.")] = None,
    batch_size: Annotated[int | None, _help("Crops a step.")] = None,
    sampler: Annotated[str | None, _help("shuffle, area or log_balanced.")] = None,
    draws_per_image: Annotated[int | None, _help("Crops of an image in an epoch.")] = None,
    norm: Annotated[str | None, _help("Norms that learn: auto, frozen, heads, trained.")] = None,
    trainable_stages: Annotated[int | None, _help("Backbone's stages that learn, 0-5.")] = None,
    fpn_channels: Annotated[int | None, _help("Width of FPN, RPN and mask head.")] = None,
    head_width: Annotated[int | None, _help("Units of the box head.")] = None,
    rois_per_image: Annotated[int | None, _help("RoIs that the losses see.")] = None,
    mask_rois: Annotated[int | None, _help("Of these, cells that the mask loss sees.")] = None,
    proposals: Annotated[int | None, _help("Boxes that the RPN hands on.")] = None,
    learning_rate: Annotated[float | None, _help("At its peak.")] = None,
    ema_decay: Annotated[float | None, _help("Of the weights' average, 0-1.")] = None,
    epochs: Annotated[int | None, _help("Passes over the training images.")] = None,
    minutes: Annotated[float | None, _help("Of training, after which the run ends.")] = None,
    validate_every: Annotated[int | None, _help("Validate every so many epochs.")] = None,
    precision: Annotated[str | None, _help("auto, float32, bfloat16 or float16.")] = None,
    val_ids: Ids = None,
    val_fraction: Annotated[float, typer.Option(help="Without val-ids: share held out.")] = 0.2,
    folds: Annotated[int, _help("Instead: so many models, each image held out by one.")] = 0,
    train_on_all: Annotated[bool, typer.Option(help="After folds: train on every image.")] = False,
    class_names: Names = DEFAULT_NAMES,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    on_change: Annotated[
        str, typer.Option(help="If that run has other settings: refuse or continue.")
    ] = "refuse",
    save_minutes: Annotated[float, typer.Option(help="Save within an epoch, too, so often.")] = 10,
    keep_checkpoints: Annotated[int, typer.Option(help="Epochs' states to keep besides.")] = 0,
    tracker: Annotated[str, typer.Option(help="none or tensorboard.")] = "none",
    workers: Annotated[int, typer.Option(help="Processes that read ahead.")] = 2,
    cache: Annotated[bool, typer.Option(help="Decode each sample once, beside the runs.")] = True,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a model; run again to go on. What is not given is the preset's, see the README.

    On several GPUs: torchrun --nproc-per-node 2 -m cellseg train ...; they share each batch.

    With --folds similar images are held out together, each fold is a run in the run's folder, and
    the records of all images, each by the model that did not see it, are in its oof.json.

    Asked to stop, it ends the step, saves its state and exits with 128 + the signal's number: 130
    after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1 (a cluster's time limit ahead).
    """
    from cellseg import presets
    from cellseg.data import CellDataset, TrainTransform, make_loaders
    from cellseg.training import fit, join_ranks, open_run

    model_settings = {
        "backbone": backbone, "weights": weights, "image_scale": image_scale,
        "norm": norm, "trainable_stages": trainable_stages, "fpn_channels": fpn_channels,
        "head_width": head_width, "rois_per_image": rois_per_image, "mask_rois": mask_rois,
        "proposals": proposals,
    }  # fmt: skip
    crop_settings = {
        "network_size": network_size, "crop_size": crop_size, "crowded": crowded, "stain": stain,
        "color": color, "batch_size": batch_size, "sampler": sampler,
        "draws_per_image": draws_per_image,
    }  # fmt: skip
    schedule = {
        "epochs": epochs, "time_budget": None if minutes is None else minutes * 60,
        "learning_rate": learning_rate, "ema_decay": ema_decay, "validate_every": validate_every,
        "precision": precision,
    }  # fmt: skip
    given = _without_none(model_settings | crop_settings | schedule)
    if folds and val_ids:
        raise SettingsError("--folds holds out every image; leave out --val-ids")
    if train_on_all and not folds:
        raise SettingsError("--train-on-all comes after --folds; say how many")
    with join_ranks(device) as ranks:
        dataset = CellDataset(
            train_dir,
            class_names=_split(class_names),
            seed=seed,
            cache_dir=runs_dir / "cache" if cache else None,
        )
        train_ids, held_ids = ranks.from_first(
            partial(_divide, dataset, _read_ids(val_ids), val_fraction, seed)
        )
        train_data, val_data = dataset.subset(train_ids), dataset.subset(held_ids)
        chosen = presets.pick_preset(device) if preset == "auto" else preset
        recipe = presets.override(presets.preset(chosen), given)
        sized = dataset if folds else train_data
        recipe = ranks.from_first(partial(presets.settle_sizes, recipe, sized))
        parts = presets.sort_settings(recipe)
        train_data.transform = TrainTransform(**parts["transform"])
        build = partial(
            presets.pick_builder(recipe["backbone"]),
            dataset.num_classes,
            weights=None if recipe["weights"] == "none" else recipe["weights"],
            seed=seed,
            **parts["builder"],
        )
        options = {
            "device": device, "seed": seed, "save_every": save_minutes * 60,
            "keep_checkpoints": keep_checkpoints, "tracker": tracker, "ranks": ranks,
        }  # fmt: skip
        if folds:
            if ranks.first:
                typer.echo(f"preset {chosen}: {recipe}")
            with _told_if_stopped(ranks.first):
                _train_folds(
                    build, dataset, parts, folds, runs_dir, name,
                    train_on_all=train_on_all, on_change=on_change, workers=workers, **options,
                )  # fmt: skip
            return
        model = build()
        open_it = partial(
            open_run, runs_dir, model, train_data, val_data, seed=seed, name=name,
            recipe=parts["transform"] | parts["loaders"] | parts["fit"], on_change=on_change,
        )  # fmt: skip
        run = ranks.from_first(open_it)
        if ranks.first:
            typer.echo(f"{run.state}; channel order: {dataset.channel_order}; {model.provenance}")
            typer.echo(f"preset {chosen}: {recipe}")
        train_loader, val_loader = make_loaders(
            train_data, val_data, workers=workers, seed=seed, **parts["loaders"]
        )
        with _told_if_stopped(ranks.first):
            for epoch in fit(
                model, train_loader, val_loader, run_dir=run.path, **options, **parts["fit"]
            ):
                if ranks.first:
                    typer.echo(epoch.line())
        if ranks.first:
            typer.echo(f"run folder: {run.path}")


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


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A run's best.pt or last.pt.")],
    output: Annotated[Path, typer.Argument(help="Result file to write, .json.")],
    release: Annotated[
        Path | None, typer.Option(help="Release whose test images to segment.")
    ] = None,
    train_dir: Annotated[
        Path | None, typer.Option(help="Or: a folder of samples to segment whole.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Or: one image file, however large; its image_id is 1.")
    ] = None,
    ids: Ids = None,
    views: Annotated[str, typer.Option(help="plain, flips (4), turns (4) or d4 (8).")] = "plain",
    scale: Annotated[
        list[float] | None, typer.Option(help="Size of a view; may be given several times.")
    ] = None,
    tile_size: Annotated[
        int | None, typer.Option(help="Image pixels; by default only large images are tiled.")
    ] = None,
    overlap: Annotated[int | None, typer.Option(help="Of tiles; larger than any cell.")] = None,
    score_threshold: Annotated[float, typer.Option(help="Drop lower scores, 0-1.")] = 0.05,
    mask_threshold: Annotated[float, typer.Option(help="A pixel's least probability.")] = 0.5,
    swapped: Annotated[bool, typer.Option(help="--image has red and blue exchanged.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with a stopped --image.")] = True,
    device: Device = "auto",
) -> None:
    """Segment test images, samples with truth, or one image file, from a checkpoint alone."""
    from cellseg.coco import write_records
    from cellseg.data import CellDataset, SampleImages, TestDataset, find_release
    from cellseg.inference import predict_file, predict_images
    from cellseg.training import load_model, pick_device

    if sum(source is not None for source in (release, train_dir, image)) != 1:
        raise SettingsError(
            "give either --release (test images), --train-dir (samples) or --image (a file)"
        )
    model = load_model(checkpoint, pick_device(device))
    options = {
        "views": views, "scales": scale or [1.0],
        "tile_size": tile_size, "overlap": overlap,
        "score_threshold": score_threshold, "mask_threshold": mask_threshold,
    }  # fmt: skip
    if image is not None:
        records = predict_file(model, image, output, swapped=swapped, resume=resume, **options)
        typer.echo(f"{len(records)} cells in 1 image: {output}")
        return
    if release is not None:
        found = find_release(release_dir=release)
        if found.test_dir is None or found.index_path is None:
            raise SettingsError(f"{release} has no test images; extract the whole archive")
        images = TestDataset(found.test_dir, found.index_path, channel_order=model.channel_order)
    else:
        samples = CellDataset(train_dir, class_names=model.class_names, sample_ids=_read_ids(ids))
        images = SampleImages(samples)
    records = predict_images(model, images, **options)
    write_records(output, records)
    typer.echo(f"{len(records)} cells in {len(images)} images: {output}")


@app.command()
def evaluate(
    records_file: Annotated[Path, typer.Argument(help="Result file of samples with truth.")],
    train_dir: TrainDir,
    ids: Ids = None,
    class_names: Names = DEFAULT_NAMES,
) -> None:
    """Score a result file against the truth: AP, uncapped and at 100 detections."""
    from dataclasses import asdict

    from cellseg.coco import read_records
    from cellseg.data import CellDataset
    from cellseg.evaluation import dataset_truth, score_records

    names = _split(class_names)
    dataset = CellDataset(train_dir, class_names=names, sample_ids=_read_ids(ids))
    records = read_records(records_file, category_ids=range(1, len(names) + 1))
    scores = score_records(dataset_truth(dataset, progress=True), records)
    typer.echo(json.dumps(asdict(scores), indent=1))


@app.command()
def ensemble(
    predictions: Annotated[Path, typer.Argument(help="Folder of result files.")] = Path(
        "predictions"
    ),
    output_dir: Annotated[Path, typer.Option(help="Where the result and its zip go.")] = Path("."),
    truth: Annotated[
        Path | None, _help("Samples that the members' runs were trained on by folds, to tune.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs, for tuning.")] = Path("runs"),
    iou_threshold: Annotated[float | None, _help("Mask IoU of one cell; else tuned, or 0.5.")] = (
        None
    ),
    agreement: Annotated[str | None, _help("mean, root or best; else tuned, or mean.")] = None,
    num_classes: Annotated[int, typer.Option(help="Classes 1..N that may occur.")] = 4,
) -> None:
    """Merge every result file of a folder into test-results.json, its zip and its manifest.

    With --truth, weights, threshold, rule and the choice of members are fitted on the records out
    of fold (oof.json of train --folds) of the runs that the files are named after.
    """
    from cellseg.data import CellDataset
    from cellseg.ensemble import ensemble_files, tune_files, write_manifest
    from cellseg.submission import write_submission

    names = [f"class{number}" for number in range(1, num_classes + 1)]
    dataset = None if truth is None else CellDataset(truth, class_names=names)
    result = ensemble_files(
        predictions,
        tuning=tune_files(predictions, dataset, runs_dir=runs_dir),
        iou_threshold=iou_threshold,
        agreement=agreement,
        category_ids=range(1, num_classes + 1),
    )
    typer.echo(result.summary())
    paths = write_submission(result.records, output_dir)
    for path in (*paths, write_manifest(result, paths[0])):
        typer.echo(str(path))


submission = typer.Typer(no_args_is_help=True)
app.add_typer(submission, name="submission", help="Look at what is handed in, or score it.")
HandIn = Annotated[Path, typer.Argument(help="The zip to hand in, or the JSON in it.")]


@submission.command("check")
def check_submission(
    file: HandIn,
    index: Annotated[
        Path | None, typer.Option(help="test_image_name_to_ids.json; default: the release's.")
    ] = None,
    num_classes: Annotated[int, typer.Option(help="Classes 1..N that may occur.")] = 4,
) -> None:
    """Say whether a file is ready to be handed in, or why not; exit code 1 then."""
    from cellseg.data import find_release
    from cellseg.submission import check_submission

    if index is None and (release := find_release(extract=False)) is not None:
        index = release.index_path
        typer.echo(f"index: {index}")
    found = check_submission(file, index_path=index, num_classes=num_classes)
    typer.echo(f"{found.table()}\n\n{found.verdict()}")
    if not found.ready:
        raise typer.Exit(1)


@submission.command("score")
def score_submission(
    file: HandIn,
    truth: Annotated[Path, typer.Option(help="Folder of samples, as predict --train-dir takes.")],
    ids: Ids = None,
    class_names: Names = DEFAULT_NAMES,
) -> None:
    """Score a hand-in against samples with truth: uncapped, and at 100 an image and class.

    An image_id is the sample's position among all sorted folders, from 1, with --ids as well.
    """
    from cellseg.data import CellDataset
    from cellseg.submission import score_submission

    names = _split(class_names)
    dataset = CellDataset(truth, class_names=names, sample_ids=_read_ids(ids))
    typer.echo(score_submission(file, dataset).table())


@app.command()
def doctor(
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    predictions_dir: Annotated[Path, typer.Option(help="Folder of result files.")] = Path(
        "predictions"
    ),
    device: Device = "auto",
) -> None:
    """Look at what the workflow needs: each line OK or what to do; exit code 1 if it cannot work.

    It ends within a minute and changes nothing.
    """
    from cellseg.doctor import examine

    broken = 0
    for finding in examine(runs_dir=runs_dir, predictions_dir=predictions_dir, device=device):
        typer.echo(finding.line())
        broken += finding.broken
    if broken:
        typer.echo(f"to mend before anything works: {broken}")
        raise typer.Exit(1)
    typer.echo("nothing essential is missing")


@app.command("import")
def import_data(
    source: Annotated[
        Path, typer.Argument(help="COCO file, or folder of label maps (or of one such a class).")
    ],
    images_dir: Annotated[Path, typer.Argument(help="Folder of the annotated images.")],
    out_dir: Annotated[Path, typer.Argument(help="Release to write; a new folder.")],
) -> None:
    """Make a release of annotated images from elsewhere: of a COCO file, or of label maps."""
    from cellseg.exports import import_annotations

    imported = import_annotations(source, images_dir, out_dir, progress=True)
    typer.echo(imported.summary())
    names = shlex.quote(",".join(imported.class_names))
    typer.echo(f"in the notebook: release_dir = {str(out_dir)!r}; in a shell:")
    typer.echo(f"python -m cellseg train {imported.root / 'train'} --class-names {names}")


@app.command("export")
def export_cells(
    source: Annotated[
        Path, typer.Argument(help="Result file, .json; or a folder of samples, for their truth.")
    ],
    output: Annotated[Path, typer.Argument(help="File (coco, csv) or folder (labels, geojson).")],
    to: Annotated[str, typer.Option(help="coco, labels, geojson (QuPath) or csv (sizes).")],
    images: Annotated[
        Path | None,
        typer.Option(help="Of a result file: release, folder of samples, or one image file."),
    ] = None,
    ids: Ids = None,
    class_names: Names = DEFAULT_NAMES,
    score_threshold: Annotated[float, typer.Option(help="Drop lower scores, 0-1.")] = 0.5,
    pixel_size: Annotated[float | None, _help("csv: a pixel's side in micrometres.")] = None,
    by_class: Annotated[bool, typer.Option(help="labels: one map a class.")] = False,
    object_type: Annotated[
        str, typer.Option(help="geojson: detection, or annotation (to be edited in QuPath).")
    ] = "detection",
) -> None:
    """Write cells for other tools: COCO, label TIFFs, GeoJSON for QuPath, a table of sizes."""
    from cellseg import exports

    writers = {
        "coco": exports.write_coco,
        "labels": partial(exports.write_labels, by_class=by_class),
        "geojson": partial(exports.write_geojson, object_type=object_type),
        "csv": partial(exports.write_morphometry, pixel_size=pixel_size),
    }
    if to not in writers:
        raise SettingsError(f"--to is {to!r}; use one of {', '.join(writers)}")
    names = _split(class_names)
    pictures, cells = _read_cells(source, images, names, _read_ids(ids))
    kept = exports.cells_by_picture(pictures, cells, score_threshold=score_threshold)
    writers[to](output, pictures, kept, names)
    number, empty = sum(map(len, kept)), sum(not found for found in kept)
    images_text = f"{len(pictures)} images, {empty} of them without any"
    typer.echo(f"{number} of {len(cells)} cells in {images_text}: {output}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")],
    title: Annotated[str, typer.Option(help="Title of the report.")] = (
        "Cell instance segmentation with Mask R-CNN"
    ),
    name: Annotated[str, typer.Option(help="Author, in any script.")] = "",
    student_id: Annotated[str, typer.Option(help="Printed beside the name.")] = "",
    output: Annotated[Path | None, typer.Option(help="The PDF; default: in the run.")] = None,
    tissue: Annotated[
        bool, typer.Option(help="Figures that show images; not for data that may not be shown.")
    ] = True,
) -> None:
    """Write the PDF report of a run, with the words.md and experiments.toml in its folder."""
    from cellseg.report import build_report

    built = build_report(
        run_dir,
        title=title,
        name=name,
        student_id=student_id,
        output=output,
        tissue=tissue,
    )
    for warning in built.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{built.path}: {built.pages} pages")


@app.command("run")
def run_notebook(
    notebook: Annotated[Path, typer.Argument(help="The notebook.")] = Path("Training.ipynb"),
) -> None:
    """Execute the notebook from top to bottom and say where everything lies."""
    from cellseg.notebook import execute_notebook
    from cellseg.training import read_history

    executed = execute_notebook(notebook, tell=typer.echo)
    run_dir = executed.parent
    history = read_history(run_dir)
    typer.echo(f"\n{history[-1].line()}" if history else "")
    found = [
        ("executed notebook", executed),
        ("report", run_dir / "report.pdf"),
        ("figures", run_dir / "figures"),
        ("weights", run_dir / "best.pt"),
        ("metrics", run_dir / "metrics.jsonl"),
    ]
    for name, path in found:
        typer.echo(f"{name + ':':19}{path}")


def main() -> None:
    """Run the command line; our own errors become one line and exit code 1."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    try:
        app()
    except CellsegError as error:
        typer.echo(f"error: {error}" if rank is None else f"[rank {rank}] error: {error}", err=True)
        _leave(rank)
    except Exception:
        if rank is None:
            raise
        traceback.print_exc()
        _leave(rank)


def _leave(rank: str | None) -> None:
    """Exit with code 1; one process of several at once, so that the others notice and end."""
    if rank is None:
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def _told_if_stopped(tells: bool) -> Iterator[None]:
    """Exit with 128 + the signal's number if training in the block is asked to stop."""
    from cellseg.training import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as interrupted:
        if tells:
            typer.echo(str(interrupted), err=True)
        raise typer.Exit(128 + interrupted.signum) from None


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


def _divide(
    dataset: "CellDataset", val_ids: list[str] | None, val_fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """Return the ids of the samples to train on and of those held out."""
    from cellseg.data import split_ids

    counts = {name: dataset.class_counts(index) for index, name in enumerate(dataset.sample_ids)}
    return split_ids(counts, val_fraction=val_fraction, seed=seed, val_ids=val_ids)


def _read_cells(
    source: Path, images: Path | None, names: tuple[str, ...], ids: list[str] | None
) -> tuple[list["Picture"], list[dict[str, Any]]]:
    """Return the images and the cells of a result file, or of a folder of samples."""
    from cellseg.coco import read_records
    from cellseg.data import CellDataset
    from cellseg.evaluation import dataset_truth
    from cellseg.exports import list_pictures, pictures_of_samples

    if source.is_dir():
        dataset = CellDataset(source, class_names=names, sample_ids=ids)
        truth = dataset_truth(dataset, progress=True)
        return pictures_of_samples(dataset), truth["annotations"]
    if images is None:
        raise SettingsError("give --images: the release, samples or image that was segmented")
    pictures = list_pictures(images, names, sample_ids=ids)
    sizes = {picture.image_id: picture.size for picture in pictures}
    records = read_records(
        source, image_ids=sizes, category_ids=range(1, len(names) + 1), image_sizes=sizes
    )
    return pictures, records


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}


def _split(names: str) -> tuple[str, ...]:
    """Return names that stand with commas between."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _read_ids(ids: str | None) -> list[str] | None:
    """Return ids given with commas between, or one a line in a file."""
    if ids is None:
        return None
    # A long list is no name of a file: the system refuses to look for it, which isfile forgives.
    text = read_text(ids) if os.path.isfile(ids) else ids.replace(",", "\n")
    return [line.strip() for line in text.splitlines() if line.strip()]

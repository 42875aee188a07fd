"""Commands that predict, score, merge and report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellseg.cli.shared import (
    Device,
    Ids,
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
    from cellseg.data import SampleImages, TestDataset

# What `predict` takes
ReleaseDir = Annotated[Path | None, option("Release whose test images are segmented.")]
SampleDir = Annotated[Path | None, option("Or: a folder of annotated samples to segment.")]
ImageFile = Annotated[Path | None, option("Or: one image file, however large; its image_id is 1.")]
HeldOut = Annotated[
    bool, typer.Option("--held-out", help="Of --train-dir only what the run held out.")
]
Views = Annotated[
    str | None,
    option("Mirrored and turned views, merged: plain (1), flips (4), turns (4) or d4 (8)."),
]
Scales = Annotated[
    list[float] | None,
    option("Scale of the views, 1 is the image's own; may be given several times."),
]
TileSize = Annotated[
    int | None, option("Side of a tile, image pixels; default: only large images are tiled.")
]
Overlap = Annotated[int | None, option("Overlap of tiles, image pixels; larger than any cell.")]
MaskThreshold = Annotated[
    float | None, option("Probability above which a pixel belongs to the cell.")
]


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A run's best.pt or last.pt.")],
    output: Annotated[Path, typer.Argument(help="Result file to write, .json.")],
    release: ReleaseDir = None,
    train_dir: SampleDir = None,
    image: ImageFile = None,
    ids: Ids = None,
    held_out: HeldOut = False,
    views: Views = None,
    scale: Scales = None,
    tile_size: TileSize = None,
    overlap: Overlap = None,
    score_threshold: Annotated[float | None, option("Drop cells of lower scores, 0-1.")] = None,
    mask_threshold: MaskThreshold = None,
    swapped: Annotated[bool, typer.Option(help="Red and blue of --image are exchanged.")] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on where an earlier --image was stopped.")
    ] = True,
    device: Device = "auto",
) -> None:
    """Segment test images, samples with truth, or one image file, from a checkpoint.

    Settings that are not given are those of the run that the checkpoint lies in, with which its
    records out of fold were made; outside a run's folder the defaults stand.
    """
    from cellseg.coco import write_records
    from cellseg.inference import predict_file, predict_images
    from cellseg.training import load_model, pick_device

    _check_images(release, train_dir, image, ids=ids, held_out=held_out, swapped=swapped)
    check_writable(output)
    model = load_model(checkpoint, pick_device(device))
    given = {
        "views": views, "scales": scale or None, "tile_size": tile_size, "overlap": overlap,
        "score_threshold": score_threshold, "mask_threshold": mask_threshold,
    }  # fmt: skip
    options = _prediction(checkpoint.parent, given)
    if image is not None:
        options.pop("mix_whole", None)  # it would need the whole image at once
        records = predict_file(model, image, output, swapped=swapped, resume=resume, **options)
        typer.echo(f"{len(records)} cells in 1 image: {output}")
        return
    if release is not None:
        images = _test_images(release, model.channel_order)
    else:
        run_dir = checkpoint.parent if held_out else None
        images = _sample_images(train_dir, model.class_names, read_ids(ids), run_dir)
    records = predict_images(model, images, **options)
    write_records(output, records)
    typer.echo(f"{len(records)} cells in {len(images)} images: {output}")


def _check_images(
    release: Path | None,
    train_dir: Path | None,
    image: Path | None,
    *,
    ids: str | None,
    held_out: bool,
    swapped: bool,
) -> None:
    """Raise SettingsError unless one kind of images is named, with options that belong to it."""
    if sum(source is not None for source in (release, train_dir, image)) != 1:
        raise SettingsError(
            "give either --release (test images), --train-dir (samples) or --image (a file)"
        )
    if held_out and (train_dir is None or ids is not None):
        raise SettingsError("--held-out chooses samples of --train-dir; leave out --ids")
    if ids is not None and train_dir is None:
        raise SettingsError("--ids chooses samples of --train-dir; leave it out")
    if swapped and image is None:
        raise SettingsError("--swapped is for --image; leave it out")


def _sample_images(
    train_dir: Path, class_names: Sequence[str], ids: list[str] | None, run_dir: Path | None
) -> "SampleImages":
    """Return annotated samples as images: what a run held out, else those with the ids."""
    from cellseg.data import CellDataset, SampleImages
    from cellseg.training import read_held

    if run_dir is not None:
        return SampleImages(read_held(run_dir).dataset(train_dir))
    return SampleImages(CellDataset(train_dir, class_names=class_names, sample_ids=ids))


def _test_images(release: Path, channel_order: str) -> "TestDataset":
    """Return the test images of a release."""
    from cellseg.data import TestDataset, find_release

    found = find_release(release_dir=release)
    if found.test_dir is None or found.index_path is None:
        raise SettingsError(f"{release} has no test images; extract the whole archive")
    return TestDataset(found.test_dir, found.index_path, channel_order=channel_order)


def _prediction(run_dir: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of prediction, and say what they are: given, else the run's."""
    from cellseg.presets import group_settings
    from cellseg.training import read_prediction

    given = {name: value for name, value in given.items() if value is not None}
    remembered = group_settings(read_prediction(run_dir))["predict"]
    used = remembered | given
    parts = [
        f"{name} {value} ({'given' if name in given else 'the run remembers it'})"
        for name, value in used.items()
    ]
    typer.echo(f"prediction: {', '.join(parts) or 'plain'}; all else by default")
    return used


@app.command()
def evaluate(
    records_file: Annotated[Path, typer.Argument(help="Result file for samples with truth.")],
    train_dir: TrainDir,
    ids: Ids = None,
    class_names: Names = None,
    run: Annotated[
        Path | None,
        option("Folder of the run that held the samples out: write scores and figures there."),
    ] = None,
    score_threshold: Annotated[
        float,
        typer.Option(help="Lowest score of cells that are counted and drawn, 0-1; AP takes all."),
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Score a result file against the truth: AP, PQ and so on, intervals, and what costs most.

    With --run all that its report is made from goes into that folder; ids, classes and groups
    are then those of its split. Of a run of folds name its oof.json and its folder.
    """
    from cellseg.coco import read_records
    from cellseg.data import CellDataset
    from cellseg.evaluation import dataset_truth, evaluate_records
    from cellseg.report import evaluate_run
    from cellseg.training import read_held

    if run is not None and (ids is not None or class_names is not None):
        raise SettingsError("--run knows its samples and classes; leave out --ids, --class-names")
    if run is None:
        names = pick_names(class_names, train_dir)
        dataset = CellDataset(train_dir, class_names=names, sample_ids=read_ids(ids))
    else:
        dataset = read_held(run).dataset(train_dir)
    records = read_records(records_file, category_ids=range(1, dataset.num_classes))
    paths: list[Path] = []
    if run is None:
        truth = dataset_truth(dataset, progress=True)
        found = evaluate_records(truth, records, score_threshold=score_threshold)
    else:
        evaluated = evaluate_run(
            run, dataset, records, score_threshold=score_threshold, progress=True
        )
        found, paths = evaluated.evaluation, evaluated.paths
    errors = asdict(found.errors)
    content = found.content() | {"errors": {part: errors[part] for part in ("kinds", "perfect")}}
    typer.echo(json.dumps(content, indent=1) if as_json else found.summary())
    if paths:
        typer.echo(f"\nwritten into {run}: {', '.join(path.name for path in paths)}", err=as_json)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Result file, or folder of a run.")],
    after: Annotated[Path, typer.Argument(help="The other one, for the same samples.")],
    truth: Annotated[Path, option("Folder of samples, as train and evaluate take it.")],
    statistic: Annotated[
        str,
        typer.Option(
            help="Score to compare: ap50, ap75, ap, ap50_100, ap_100, pq, dq, sq, aji, dice or f_d."
        ),
    ] = "ap50",
    ids: Ids = None,
    class_names: Names = None,
    score_threshold: Annotated[
        float, typer.Option(help="pq to f_d: count records of this score or more, 0-1.")
    ] = 0.5,
) -> None:
    """Say by how much the second is better than the first, with a 95 % interval.

    Both are scored on the same draws of images. Where one of them is a run's folder, the samples
    are those that it held out, drawn by the groups of its split if it has any.
    """
    from cellseg.data import CellDataset
    from cellseg.evaluation import dataset_truth
    from cellseg.report import compare_sides
    from cellseg.training import image_groups, read_held

    paths = [before, after]
    held = [read_held(path) for path in paths if path.is_dir()]
    if held and ids is None:
        dataset = held[0].dataset(truth)
    else:
        names = pick_names(class_names, truth)
        dataset = CellDataset(truth, class_names=names, sample_ids=read_ids(ids))
    known = [image_groups(run.group_of, dataset) for run in held]
    groups = next((groups for groups in known if groups is not None), None)
    comparison, _ = compare_sides(
        dataset_truth(dataset, progress=True),
        paths,
        dataset.sample_ids,
        statistic=statistic,
        score_threshold=score_threshold,
        groups=groups,
    )
    typer.echo(comparison.sentence)
    if groups is not None:
        typer.echo(f"Drawn by {len(set(groups.values()))} groups of images that belong together.")


@app.command()
def ensemble(
    predictions: Annotated[Path, typer.Argument(help="Folder of result files.")] = Path(
        "predictions"
    ),
    output_dir: Annotated[Path, typer.Option(help="Where the result and its zip go.")] = Path("."),
    truth: Annotated[
        Path | None,
        option("Samples to tune on: those that the members' runs had for train --folds."),
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs, for tuning.")] = Path("runs"),
    iou_threshold: Annotated[
        float | None,
        option("Mask IoU above which records show one cell; default: as tuned, else 0.5."),
    ] = None,
    agreement: Annotated[
        str | None,
        option("How scores for a cell become one: mean, root or best; default: as tuned, or mean."),
    ] = None,
    num_labels: Annotated[int, typer.Option(help="Number of classes, without background.")] = 4,
) -> None:
    """Merge every result file of a folder into test-results.json, its zip and its manifest.

    With --truth, the members' weights and choice, the threshold and the rule are fitted on the
    records out of fold (oof.json of train --folds) of the runs that the files are named after.
    """
    from cellseg.data import CellDataset
    from cellseg.ensemble import ensemble_files, tune_files, write_manifest
    from cellseg.submission import write_submission

    names = [f"class{number}" for number in range(1, num_labels + 1)]
    dataset = None if truth is None else CellDataset(truth, class_names=names)
    result = ensemble_files(
        predictions,
        tuning=tune_files(predictions, dataset, runs_dir=runs_dir),
        iou_threshold=iou_threshold,
        agreement=agreement,
        category_ids=range(1, num_labels + 1),
    )
    typer.echo(result.summary())
    paths = write_submission(result.records, output_dir)
    for path in (*paths, write_manifest(result, paths[0])):
        typer.echo(str(path))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")],
    title: Annotated[str, typer.Option(help="Title of the report.")] = (
        "Cell instance segmentation with Mask R-CNN"
    ),
    name: Annotated[str, typer.Option(help="Author, in any script.")] = "",
    student_id: Annotated[str, typer.Option(help="Printed beside the name.")] = "",
    data_set: Annotated[
        str,
        typer.Option(
            help="Name of the data, instead of their folder's; MoNuSAC and CoNSeP are cited."
        ),
    ] = "",
    output: Annotated[Path | None, option("PDF to write; default: report.pdf in the run.")] = None,
    tissue: Annotated[
        bool,
        typer.Option(help="Print figures that show images; not for data that may not be shown."),
    ] = True,
) -> None:
    """Write the PDF report of a run, with the words.md and experiments.toml in its folder."""
    from cellseg.report import build_report

    built = build_report(
        run_dir,
        title=title,
        name=name,
        student_id=student_id,
        data_set=data_set,
        output=output,
        tissue=tissue,
    )
    for warning in built.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{built.path}: {built.pages} pages")


@app.command("run")
def run_notebook(
    notebook: Annotated[Path, typer.Argument(help="Notebook to execute.")] = Path("Training.ipynb"),
) -> None:
    """Execute the notebook from top to bottom and say where everything lies."""
    from cellseg.notebook import execute_notebook
    from cellseg.training import read_history
    from cellseg.training.checkpoint import BEST_NAME
    from cellseg.training.run import METRICS_NAME

    executed = execute_notebook(notebook, tell=typer.echo)
    run_dir = executed.parent
    history = read_history(run_dir)
    typer.echo(f"\n{history[-1].line()}" if history else "")
    found = [
        ("executed notebook", executed),
        ("report", run_dir / "report.pdf"),
        ("figures", run_dir / "figures"),
        ("weights", run_dir / BEST_NAME),
        ("metrics", run_dir / METRICS_NAME),
    ]
    for name, path in found:
        typer.echo(f"{name + ':':19}{path}")

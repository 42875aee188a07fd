"""Commands that predict, score, merge and report."""

import json
from pathlib import Path
from typing import Annotated

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
    check_writable(output)
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
        samples = CellDataset(train_dir, class_names=model.class_names, sample_ids=read_ids(ids))
        images = SampleImages(samples)
    records = predict_images(model, images, **options)
    write_records(output, records)
    typer.echo(f"{len(records)} cells in {len(images)} images: {output}")


@app.command()
def evaluate(
    records_file: Annotated[Path, typer.Argument(help="Result file of samples with truth.")],
    train_dir: TrainDir,
    ids: Ids = None,
    class_names: Names = None,
) -> None:
    """Score a result file against the truth: AP, uncapped and at 100 detections."""
    from dataclasses import asdict

    from cellseg.coco import read_records
    from cellseg.data import CellDataset
    from cellseg.evaluation import dataset_truth, score_records

    names = pick_names(class_names, train_dir)
    dataset = CellDataset(train_dir, class_names=names, sample_ids=read_ids(ids))
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
        Path | None, option("Samples that the members' runs were trained on by folds, to tune.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs, for tuning.")] = Path("runs"),
    iou_threshold: Annotated[float | None, option("Mask IoU of one cell; else tuned, or 0.5.")] = (
        None
    ),
    agreement: Annotated[str | None, option("mean, root or best; else tuned, or mean.")] = None,
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

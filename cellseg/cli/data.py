"""Commands that make, look at, take in and give out data."""

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellseg.cli.shared import (
    Ids,
    Names,
    TrainDir,
    app,
    option,
    pick_names,
    read_ids,
)
from cellseg.errors import DataError, SettingsError
from cellseg.files import check_writable

if TYPE_CHECKING:
    from cellseg.data import CellDataset
    from cellseg.interchange import Picture

FOLDERS = ("labels", "geojson")
"""Formats of `export` that are one file an image."""


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

    check_writable(folder, folder=True)
    release = make_sample_release(
        folder, train_images=train_images, test_images=test_images, image_size=image_size, seed=seed
    )
    typer.echo(f"made tissue lies in {release.root}")


@app.command()
def audit(
    train_dir: TrainDir,
    class_names: Names = None,
    figure: Annotated[Path | None, typer.Option(help="Where to save the figure, .png.")] = None,
    val_ids: Annotated[
        str | None,
        option("Samples to hold out, as for train: says also what they share with the others."),
    ] = None,
    run: Annotated[
        Path | None,
        option(
            "Folder of a run: says also what the samples that it held out share with the others."
        ),
    ] = None,
    leaks_figure: Annotated[
        Path | None,
        option("Where to save the closest pairs, .png; default with --run: its figures/leaks.png."),
    ] = None,
) -> None:
    """Say what a folder of samples holds, and what in it looks like a mistake.

    With --val-ids or --run also what leaks: each validation image's nearest training image, and
    whether they share a border, tissue or all their pixels.
    """
    from cellseg.data import CellDataset
    from cellseg.data import audit as audit_dataset
    from cellseg.report import check_figure_path, plot_audit, save_figure

    if leaks_figure is not None and run is None and val_ids is None:
        raise SettingsError("--leaks-figure shows what is held out; give --val-ids or --run")
    if run is not None and leaks_figure is None:
        leaks_figure = run / "figures" / "leaks.png"
    for path in filter(None, (figure, leaks_figure)):
        check_figure_path(path)
        check_writable(path)
    dataset = CellDataset(train_dir, class_names=pick_names(class_names, train_dir))
    sides = _read_sides(dataset, read_ids(val_ids), run)
    found = audit_dataset(dataset, progress=True)
    typer.echo(found.table())
    if figure is not None:
        typer.echo(f"figure: {save_figure(plot_audit(found), figure)}")
    if sides is not None:
        _tell_leaks(dataset, sides, leaks_figure)


def _read_sides(
    dataset: "CellDataset", val_ids: list[str] | None, run: Path | None
) -> tuple[list[str], list[str]] | None:
    """Return the training and the validation samples that are told, None if none are."""
    from cellseg.training.run import SETTINGS_NAME, read_settings

    if run is None:
        rest = sorted(set(dataset.sample_ids) - set(val_ids or ()))
        return None if val_ids is None else (rest, val_ids)
    if val_ids is not None:
        raise SettingsError("--run tells what is held out; leave out --val-ids")
    settings = read_settings(run)
    sides = settings.get("train_ids"), settings.get("val_ids")
    if not all(isinstance(side, list) and side for side in sides):
        raise DataError(
            f"{run} has no {SETTINGS_NAME} that tells of images held out; name a run's folder, of "
            "one by folds that of a fold"
        )
    return sides


def _tell_leaks(
    dataset: "CellDataset", sides: tuple[list[str], list[str]], figure: Path | None
) -> None:
    """Say what validation images share with training images, and save the closest pairs."""
    from cellseg.data import leaks_table, nearest_training_images
    from cellseg.report import plot_leaks, save_figure

    nearest = nearest_training_images(dataset, *sides, progress=True)
    typer.echo(f"\n{leaks_table(nearest)}")
    if figure is not None:
        typer.echo(f"closest pairs: {save_figure(plot_leaks(nearest, dataset), figure)}")


@app.command("import")
def import_data(
    source: Annotated[
        Path,
        typer.Argument(help="COCO file; or folder of label maps, or of one such folder per class."),
    ],
    images_dir: Annotated[Path, typer.Argument(help="Folder of the annotated images.")],
    out_dir: Annotated[Path, typer.Argument(help="Release to write; a new folder.")],
) -> None:
    """Make a release of annotated images from elsewhere: of a COCO file, or of label maps."""
    from cellseg.interchange import import_annotations

    imported = import_annotations(source, images_dir, out_dir, progress=True)
    typer.echo(imported.summary())
    typer.echo(f"in the notebook: release_dir = {str(out_dir)!r}; in a shell:")
    typer.echo(f"python -m cellseg train {shlex.quote(str(imported.root / 'train'))}")


@app.command("export")
def export_cells(
    source: Annotated[
        Path, typer.Argument(help="Result file, .json; or a folder of samples, for their truth.")
    ],
    output: Annotated[Path, typer.Argument(help="File (coco, csv) or folder (labels, geojson).")],
    to: Annotated[str, typer.Option(help="Format: coco, labels, geojson (QuPath) or csv (sizes).")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Images of a result file: release, folder of samples, or one image file."
        ),
    ] = None,
    ids: Ids = None,
    class_names: Names = None,
    score_threshold: Annotated[float, typer.Option(help="Drop cells of lower scores, 0-1.")] = 0.5,
    pixel_size: Annotated[float | None, option("csv: a pixel's side in micrometres.")] = None,
    by_class: Annotated[bool, typer.Option(help="labels: one map per class.")] = False,
    object_type: Annotated[
        str, typer.Option(help="geojson: detection, or annotation (to be edited in QuPath).")
    ] = "detection",
) -> None:
    """Write cells for other tools: COCO, label TIFFs, GeoJSON for QuPath, a table of sizes."""
    from cellseg import interchange

    writers = {
        "coco": interchange.write_coco,
        "labels": partial(interchange.write_labels, by_class=by_class),
        "geojson": partial(interchange.write_geojson, object_type=object_type),
        "csv": partial(interchange.write_morphometry, pixel_size=pixel_size),
    }
    if to not in writers:
        raise SettingsError(f"--to is {to!r}; use one of {', '.join(writers)}")
    check_writable(output, folder=to in FOLDERS)
    names = pick_names(class_names, images or source)
    pictures, cells = _read_cells(source, images, names, read_ids(ids))
    kept = interchange.cells_by_picture(pictures, cells, score_threshold=score_threshold)
    writers[to](output, pictures, kept, names)
    number, empty = sum(map(len, kept)), sum(not found for found in kept)
    images_text = f"{len(pictures)} images, {empty} of them without any"
    typer.echo(f"{number} of {len(cells)} cells in {images_text}: {output}")
    if below := sum(cell.get("score", 1.0) < score_threshold for cell in cells):
        typer.echo(f"left out below a score of {score_threshold:g} (--score-threshold): {below}")


def _read_cells(
    source: Path, images: Path | None, names: tuple[str, ...], ids: list[str] | None
) -> tuple[list["Picture"], list[dict[str, Any]]]:
    """Return the images and the cells of a result file, or of a folder of samples."""
    from cellseg.coco import read_records
    from cellseg.data import CellDataset
    from cellseg.evaluation import dataset_truth
    from cellseg.interchange import list_pictures, pictures_of_samples

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

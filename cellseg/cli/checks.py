"""Commands that look at what is handed in, and at what a run needs."""

from pathlib import Path
from typing import Annotated

import typer

from cellseg.cli.shared import (
    Device,
    Ids,
    Names,
    app,
    option,
    pick_names,
    read_ids,
)

submission = typer.Typer(no_args_is_help=True)
app.add_typer(submission, name="submission", help="Look at what is handed in, or score it.")
HandIn = Annotated[Path, typer.Argument(help="The zip to hand in, or the JSON in it.")]


@submission.command("check")
def check_submission(
    file: HandIn,
    index: Annotated[
        Path | None, typer.Option(help="test_image_name_to_ids.json; default: the release's.")
    ] = None,
    num_labels: Annotated[int, typer.Option(help="Number of classes, without background.")] = 4,
    runs_dir: Annotated[
        Path | None, option("Folder of all runs; default: runs/ beside the file.")
    ] = None,
) -> None:
    """Say whether a file is ready to be handed in, or why not; exit code 1 then."""
    from cellseg.data import find_release
    from cellseg.submission import check_submission

    if index is None and (release := find_release(extract=False)) is not None:
        index = release.index_path
        typer.echo(f"index: {index}")
    found = check_submission(file, index_path=index, num_labels=num_labels, runs_dir=runs_dir)
    typer.echo(f"{found.table()}\n\n{found.verdict()}")
    if not found.ready:
        raise typer.Exit(1)


@submission.command("score")
def score_submission(
    file: HandIn,
    truth: Annotated[Path, typer.Option(help="Folder of samples, as for predict --train-dir.")],
    ids: Ids = None,
    class_names: Names = None,
) -> None:
    """Score a hand-in against samples with truth: uncapped, and at 100 an image and class.

    An image_id is the sample's position among all sorted folders, from 1, with --ids as well.
    """
    from cellseg.data import CellDataset
    from cellseg.submission import score_submission

    names = pick_names(class_names, truth)
    dataset = CellDataset(truth, class_names=names, sample_ids=read_ids(ids))
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

"""A run's records in; its scores, their figures and all files that the report is made from out."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from cellseg.coco import Record, group_by_image
from cellseg.data import CellDataset
from cellseg.evaluation import (
    Evaluation,
    dataset_truth,
    evaluate_records,
    worst_cells,
)
from cellseg.evaluation.scores import Truth
from cellseg.report.analysis_plots import (
    plot_calibration,
    plot_errors_mended,
    plot_gallery,
    plot_precision_recall,
)
from cellseg.report.plots import plot_confusion_matrix, plot_truth_and_prediction
from cellseg.report.style import save_figure
from cellseg.training import image_groups, read_held, write_evaluation

DRAWINGS = ("confusion_matrix", "precision_recall", "errors_mended", "calibration")
"""Figures without tissue, written as SVG as well: so a report prints them sharp and small."""
OVERLAYS = 3
WORST = 5  # cells of each kind of error in the gallery


@dataclass(frozen=True)
class EvaluatedRun:
    """What an evaluation has shown and written.

    Attributes:
        truth: COCO dict of the images.
        evaluation: the scores, and where they lose.
        figures: name -> figure: those of `DRAWINGS`, "overlay_1" to "overlay_3", and "gallery".
        paths: the files that were written, `figures/<name>.png` among them.
    """

    truth: Truth
    evaluation: Evaluation
    figures: dict[str, Figure]
    paths: list[Path]


def evaluate_run(
    run_dir: str | Path,
    dataset: CellDataset,
    records: Sequence[Record],
    *,
    groups: Mapping[int, Hashable] | None = None,
    score_threshold: float = 0.5,
    progress: bool = False,
) -> EvaluatedRun:
    """Score a run's records, and write into its folder all that its report is made from.

    Args:
        run_dir: folder of a run, or of a run of folds.
        dataset: the images that it held out, without a transform; `read_held` finds them.
        records: detections on them; of a run of folds those in its `oof.json`.
        groups: image_id -> its slide or patient; None takes the groups of the run's split, if it
            was by groups.
        score_threshold: from which score on matrix, nuclei and overlays count records, in 0-1.
        progress: show a bar while the truth is read.

    Raises:
        DataError: if the folder is no run's, or an image cannot be read.
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    run_dir = Path(run_dir)
    if groups is None:
        groups = image_groups(read_held(run_dir).group_of, dataset)
    truth = dataset_truth(dataset, progress=progress)
    evaluation = evaluate_records(truth, records, score_threshold=score_threshold, groups=groups)
    paths = write_evaluation(run_dir, truth, records, evaluation, groups=groups)
    figures = {
        "confusion_matrix": plot_confusion_matrix(evaluation.matrix, dataset.class_names),
        "precision_recall": plot_precision_recall(evaluation.curves),
        "errors_mended": plot_errors_mended(evaluation.errors),
        "calibration": plot_calibration(evaluation.calibration),
        **dict(_overlays(dataset, records, score_threshold)),
        "gallery": _gallery(dataset, truth, records),
    }
    for name, figure in figures.items():
        for kind in ("png", "svg") if name in DRAWINGS else ("png",):
            paths.append(save_figure(figure, run_dir / "figures" / f"{name}.{kind}"))
    return EvaluatedRun(truth, evaluation, figures, paths)


def _overlays(
    dataset: CellDataset, records: Sequence[Record], score_threshold: float
) -> Iterator[tuple[str, Figure]]:
    """Yield (name, truth beside prediction) of the first images."""
    found = group_by_image(records)
    for index in range(min(OVERLAYS, len(dataset))):
        image, target = dataset[index]
        figure = plot_truth_and_prediction(
            image,
            target,
            found.get(target["image_id"], []),
            dataset.class_names,
            score_threshold=score_threshold,
        )
        yield f"overlay_{index + 1}", figure


def _gallery(dataset: CellDataset, truth: Truth, records: Sequence[Record]) -> Figure:
    """Return the worst cells of each kind of error."""
    worst = worst_cells(truth, records, count=WORST)
    wanted = {pick.image_id for pick in worst}
    images = {
        image_id: dataset[index][0]
        for index, image_id in enumerate(dataset.image_ids)
        if image_id in wanted
    }
    return plot_gallery(images, worst, dataset.class_names)

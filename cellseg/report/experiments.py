"""Two runs, or files of records, compared on the same images: the numbers of an experiment."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellseg.coco import Record, read_records
from cellseg.errors import CellsegError, DataError
from cellseg.evaluation import Comparison, compare_records
from cellseg.evaluation.names import NUCLEI_NAMES, SCORE_NAMES
from cellseg.evaluation.scores import Truth
from cellseg.inference import settle_classes
from cellseg.report.student import EXPERIMENTS_NAME, Experiment
from cellseg.training import read_held, read_truth


def compare_experiments(
    run_dir: str | Path, experiments: Sequence[Experiment], *, score_threshold: float
) -> list[dict[str, Any]]:
    """Return what the report says of each experiment, all of it as text.

    Args:
        run_dir: the run's folder; `truth.json` in it is needed where something is compared.
        experiments: of `read_experiments`.
        score_threshold: the cut for the nuclei scores.

    Returns:
        per experiment its texts and `comparison`: None, or a table's cells and a sentence.

    Raises:
        DataError: if something cannot be compared; names the line of experiments.toml, and why.
    """
    shown = []
    for experiment in experiments:
        told = {key: getattr(experiment, key) for key in ("title", "hypothesis", "why", "result")}
        told["comparison"] = None
        if experiment.before:
            try:
                told["comparison"] = _compare(Path(run_dir), experiment, score_threshold)
            except CellsegError as error:
                where = f"{Path(run_dir) / EXPERIMENTS_NAME}, line {experiment.line}"
                raise DataError(f"{where}: nothing to compare: {error}") from None
        shown.append(told)
    return shown


def compare_sides(
    truth: Truth,
    paths: Sequence[Path],
    sample_ids: Sequence[str],
    *,
    statistic: str,
    score_threshold: float,
    groups: Mapping[int, Hashable] | None,
) -> tuple[Comparison, tuple[str, str]]:
    """Return by how much the second of two sides is better, and what the two are called.

    The nuclei scores are those of one record a nucleus, as in `evaluate_records`.

    Args:
        truth: COCO dict of the images.
        paths: two, each the folder of a run that was evaluated, or a file of records.
        sample_ids: the samples of the truth; a run must have held out the same.
        statistic: a name out of `STATISTICS`.
        score_threshold: the cut for the nuclei scores.
        groups: image_id -> its slide or patient, as in `image_bootstrap`.

    Raises:
        DataError: if there are no records, or a run held out other images.
        SettingsError: if the statistic is unknown, or an image has no group.
        RecordsError: if a file holds other records.
    """
    sides = [_records(path, truth, sample_ids) for path in paths]
    if statistic in NUCLEI_NAMES:
        sides = [settle_classes(side) for side in sides]
    names = _names(paths)
    comparison = compare_records(
        truth,
        *sides,
        statistic=statistic,
        score_thresholds=(score_threshold, score_threshold),
        names=names,
        groups=groups,
    )
    return comparison, names


def _compare(run_dir: Path, experiment: Experiment, score_threshold: float) -> dict[str, Any]:
    """Return the comparison of one experiment as text."""
    truth, groups = read_truth(run_dir)
    comparison, names = compare_sides(
        truth,
        [run_dir / experiment.before, run_dir / experiment.after],
        read_held(run_dir).sample_ids,
        statistic=experiment.statistic,
        score_threshold=score_threshold,
        groups=groups,
    )
    return {
        "statistic": SCORE_NAMES[experiment.statistic],
        "names": list(names),
        "values": [_shown(value) for value in (comparison.value_a, comparison.value_b)],
        "difference": _shown(comparison.difference, "+.3f"),
        "interval": _interval(comparison),
        "sentence": comparison.sentence,
    }


def _records(path: Path, truth: Truth, sample_ids: Sequence[str]) -> list[Record]:
    """Return the records of a run's folder, or of a file, checked against the truth."""
    if path.is_dir():
        held = read_held(path)
        if set(held.sample_ids) != set(sample_ids):
            raise DataError(
                f"{path} was validated on other images than those of this comparison; compare "
                "runs of one split"
            )
        path = held.records
    if not path.exists():
        raise DataError(f"{path} does not exist; name a run that was evaluated, or a result file")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    classes = [category["id"] for category in truth["categories"]]
    return read_records(path, image_ids=sizes, category_ids=classes, image_sizes=sizes)


def _names(paths: Sequence[Path]) -> tuple[str, str]:
    """Return what the two sides are called: folder or file; with its folder if both are alike."""
    resolved = [path.resolve() for path in paths]
    before, after = (path.stem if path.suffix == ".json" else path.name for path in resolved)
    if before == after:
        before, after = (f"{path.parent.name}/{path.name}" for path in resolved)
    return before, after


def _interval(comparison: Comparison) -> str:
    """Return the ends of an interval, a dash where there is none."""
    if comparison.low is None:
        return "–"
    return f"{comparison.low:+.3f} to {comparison.high:+.3f}"


def _shown(value: float | None, form: str = ".3f") -> str:
    """Return a score as text."""
    return "–" if value is None else format(value, form)

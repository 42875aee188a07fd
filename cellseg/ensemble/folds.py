"""The records out of fold of the runs that result files are named after."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from cellseg.coco import Record, read_records
from cellseg.data import CellDataset
from cellseg.ensemble.members import find_files
from cellseg.ensemble.tuning import Tuning, tune_ensemble
from cellseg.errors import CellsegError
from cellseg.evaluation import dataset_truth
from cellseg.markdown import first_few
from cellseg.training import image_groups
from cellseg.training.folds import read_folds
from cellseg.training.run import OOF_NAME


def tune_files(
    paths_or_dir: str | Path | Iterable[str | Path],
    dataset: CellDataset | None,
    *,
    runs_dir: str | Path = "runs",
    seed: int = 0,
) -> Tuning:
    """Return the settings for an ensemble of files, tuned on their runs' records out of fold.

    The file `<name>.json` is that of the run `<runs_dir>/<name>`, whose `oof.json` was written by
    `train --folds`. Settings are fitted for one company of members, so either all of them have
    such records or the defaults stand: what is best without a member says little of the ensemble
    with it. Only images that every run held out count; their groups are those of the first run.

    Args:
        paths_or_dir: as for `ensemble_files`.
        dataset: the samples that the runs were trained on; None if they are not at hand.
        runs_dir: folder of the runs.
        seed: of the draws for intervals.

    Returns:
        the tuning; where nothing can be tuned the defaults, with the reason.

    Raises:
        RecordsError: if there is no file.
    """
    names = sorted({path.stem for path in find_files(paths_or_dir)})
    runs = {name: Path(runs_dir) / name for name in names}
    missing = [f"{name}.json" for name, run in runs.items() if not (run / OOF_NAME).is_file()]
    if missing:
        return Tuning(reason=f"there is no {OOF_NAME} in {runs_dir} for {first_few(missing, 3)}")
    if dataset is None:
        return Tuning(reason="the samples with truth are not at hand")
    try:
        return _tune_runs(runs, dataset, seed)
    except CellsegError as error:
        return Tuning(reason=" ".join(str(error).split()))


def _tune_runs(runs: Mapping[str, Path], dataset: CellDataset, seed: int) -> Tuning:
    """Return the tuning of runs all of which have records out of fold."""
    contents = {name: read_folds(run) for name, run in runs.items()}
    held = [
        set(chain.from_iterable(fold["val_ids"] for fold in content["folds"]))
        for content in contents.values()
    ]
    shared = sorted(set(dataset.sample_ids).intersection(*held))
    if not shared:
        return Tuning(reason=f"the runs held out no sample of {dataset.train_dir} in common")
    part = dataset.subset(shared)
    truth = dataset_truth(part, progress=True)
    records = {name: _read_oof(run / OOF_NAME, part) for name, run in runs.items()}
    groups = image_groups(next(iter(contents.values())).get("groups"), part)
    return tune_ensemble(records, truth, groups=groups, seed=seed)


def _read_oof(path: Path, part: CellDataset) -> Sequence[Record]:
    """Return a run's records of some of its samples."""
    ids = set(part.image_ids)
    records = read_records(path, category_ids=range(1, part.num_classes))
    return [record for record in records if record["image_id"] in ids]

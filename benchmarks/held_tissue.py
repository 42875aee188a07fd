"""CoNSeP's training and held tiles: what every recipe is trained on, and the score it gets."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.consep_ids import ids_of, tiles_of
from cellseg.coco import Record, read_records, write_records
from cellseg.data import CellDataset
from cellseg.errors import SettingsError
from cellseg.evaluation import (
    choose_score_threshold,
    compare_records,
    dataset_truth,
    image_bootstrap,
    score_nuclei,
    score_records,
)
from cellseg.inference import settle_classes

CLASS_NAMES = ("epithelial", "inflammatory", "spindle", "other")
FOLDERS = {"tiles": "consep_tiles", "pieces": "consep"}
WEIGHTS = "mobilenet_v2_imagenet_from_tflite_quant.pth"
TUNING_STEP = 6  # every sixth training tile: four of them choose the score cut
PARTS = ("tiles", "pieces", "tuning")
NUCLEI = ("pq", "aji", "dice")

Truth = dict[str, Any]
Predictor = Callable[[CellDataset], list[Record]]


def data_folder() -> Path:
    """Return the folder that CELLSEG_DATA names.

    Raises:
        SettingsError: if it is not set, or does not hold the data.
    """
    name = os.environ.get("CELLSEG_DATA")
    if not name:
        raise SettingsError("set CELLSEG_DATA to the folder that holds consep/ and consep_tiles/")
    for folder in FOLDERS.values():
        if not (Path(name) / folder / "provenance.json").is_file():
            raise SettingsError(
                f"CELLSEG_DATA={name} has no {folder}/provenance.json; name the folder that holds "
                "consep/ and consep_tiles/"
            )
    return Path(name)


def weights_file(data: Path, given: Path | None = None) -> Path:
    """Return the file of ImageNet weights: the one given, or the one beside the data.

    Raises:
        SettingsError: if it does not exist.
    """
    path = given or data.parent / "weights" / WEIGHTS
    if not path.is_file():
        raise SettingsError(f"weights {path} do not exist; name the file with --weights")
    return path


def all_samples(data: Path, kind: str, **options: Any) -> CellDataset:
    """Return all tiles that have a truth, whole ("tiles") or as their pieces ("pieces").

    Args:
        data: the folder with consep/ and consep_tiles/.
        kind: one of the two.
        **options: for `CellDataset`.
    """
    train_dir = data / FOLDERS[kind] / "hw3-data-release" / "train"
    return CellDataset(train_dir, class_names=CLASS_NAMES, **options)


def training_samples(data: Path, kind: str, **options: Any) -> CellDataset:
    """Return the 21 training tiles, whole ("tiles") or as their pieces ("pieces").

    Args:
        data: the folder with consep/ and consep_tiles/.
        kind: one of the two.
        **options: for `CellDataset`.

    Raises:
        SettingsError: if the kind is neither.
    """
    if kind not in FOLDERS:
        raise SettingsError(f"train_on is {kind!r}; use tiles or pieces")
    dataset = _samples(data, kind, held=False, **options)
    held = set(ids_of(data / FOLDERS[kind] / "provenance.json", held=True))
    assert held.isdisjoint(dataset.sample_ids), "a held tile is among the training samples"
    return dataset


def examined_samples(data: Path) -> dict[str, CellDataset]:
    """Return what is predicted: held tiles, their pieces, and the tiles that choose the cut."""
    every_tile = training_samples(data, "tiles")
    return {
        "tiles": _samples(data, "tiles", held=True),
        "pieces": _samples(data, "pieces", held=True),
        "tuning": every_tile.subset(every_tile.sample_ids[::TUNING_STEP]),
    }


def _samples(data: Path, kind: str, *, held: bool, **options: Any) -> CellDataset:
    """Return the samples of held or of other tiles."""
    ids = ids_of(data / FOLDERS[kind] / "provenance.json", held=held)
    return all_samples(data, kind, sample_ids=ids, **options)


def predict_examined(predict: Predictor, data: Path, folder: Path) -> None:
    """Write the records of all that is examined to `<part>.json` in a folder."""
    for part, dataset in examined_samples(data).items():
        write_records(folder / f"{part}.json", predict(dataset))


def score_examined(data: Path, folder: Path) -> dict[str, Any]:
    """Return the figures of the records that `predict_examined` wrote.

    Returns:
        dict of `tiles` and `pieces` (ap50, ap50_100, ap, ap50_per_class), `score_threshold` (the
        cut, chosen on training tiles), and on whole tiles, all nuclei as one class and one record
        a nucleus, `pq`, `aji` and `dice` pooled and `pq_mean`, ... as means over tiles;
        `intervals`: [low, high] of some of them by draws of tiles.
    """
    truth, records = examined_truth(data), examined_records(folder)
    cut = choose_score_threshold(truth["tuning"], records["tuning"])
    nuclei = score_nuclei(truth["nuclei"], records["nuclei"], score_threshold=cut)
    return {
        **{part: average_precisions(truth[part], records[part]) for part in ("tiles", "pieces")},
        "score_threshold": cut,
        **{name: getattr(nuclei.pooled, name) for name in NUCLEI},
        **{f"{name}_mean": getattr(nuclei.mean, name) for name in NUCLEI},
        "intervals": tile_intervals(data, truth, records, cut),
    }


def examined_truth(data: Path) -> dict[str, Truth]:
    """Return the truth of all that is examined; "nuclei" are those of the whole tiles."""
    truth = {part: dataset_truth(dataset) for part, dataset in examined_samples(data).items()}
    return truth | {"nuclei": truth["tiles"]}


def examined_records(folder: Path) -> dict[str, list[Record]]:
    """Return the records of all that is examined; in "nuclei" and "tuning" one a nucleus."""
    records = {part: read_records(folder / f"{part}.json") for part in PARTS}
    tuning, nuclei = settle_classes(records["tuning"]), settle_classes(records["tiles"])
    return records | {"tuning": tuning, "nuclei": nuclei}


def tile_intervals(
    data: Path, truth: Mapping[str, Truth], records: Mapping[str, list[Record]], cut: float
) -> dict[str, list[float | None]]:
    """Return 95 % intervals over the held tiles, [low, high] by name."""
    wanted = {"tiles": ("ap50",), "nuclei": NUCLEI, "pieces": ("ap50",)}
    groups = {"pieces": tile_of_pieces(data)}
    return {
        name if name in NUCLEI else f"{part}_{name}": [interval.low, interval.high]
        for part, statistics in wanted.items()
        for name, interval in image_bootstrap(
            truth[part],
            records[part],
            statistics=statistics,
            score_threshold=cut,
            groups=groups.get(part),
        ).items()
    }


def tile_differences(data: Path, before: Path, after: Path) -> dict[str, str]:
    """Return by how much the records in one folder score better than those in another.

    Both are scored on the same draws of tiles, each at its own score cut.

    Returns:
        a sentence with the difference and its 95 % interval by name, as in `tile_intervals`.
    """
    truth = examined_truth(data)
    records = [examined_records(folder) for folder in (before, after)]
    cuts = tuple(choose_score_threshold(truth["tuning"], found["tuning"]) for found in records)
    names = (before.name, after.name)
    parts = {"ap50": "tiles"} | dict.fromkeys(NUCLEI, "nuclei")
    sentences = {
        name: compare_records(
            truth[part],
            *(found[part] for found in records),
            statistic=name,
            score_thresholds=cuts,
            names=names,
        ).sentence
        for name, part in parts.items()
    }
    groups = tile_of_pieces(data)
    pieces = compare_records(
        truth["pieces"], *(found["pieces"] for found in records), names=names, groups=groups
    )
    return {"tiles_ap50": sentences.pop("ap50"), "pieces_ap50": pieces.sentence, **sentences}


def tile_of_pieces(data: Path) -> dict[int, str]:
    """Return the tile that each held piece was cut from, by image_id."""
    pieces = _samples(data, "pieces", held=True)
    tiles = tiles_of(data / FOLDERS["pieces"] / "provenance.json")
    return {
        image_id: tiles[name]
        for name, image_id in zip(pieces.sample_ids, pieces.image_ids, strict=True)
    }


def average_precisions(truth: Truth, records: Sequence[Record]) -> dict[str, Any]:
    """Return AP50 uncapped and at 100, AP, and AP50 by class."""
    scores = vars(score_records(truth, records))
    return {name: scores[name] for name in ("ap50", "ap50_100", "ap", "ap50_per_class")}

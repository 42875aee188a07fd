"""Several result files -> one list of records."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cellseg.coco import FAULTS_SHOWN, Record, read_records, rle_to_xywh
from cellseg.errors import RecordsError, SettingsError
from cellseg.files import escape_markdown, markdown_code
from cellseg.inference.merging import fuse, suppress


@dataclass(frozen=True)
class Member:
    """A file that takes part: its path, its records as read, and its weight."""

    path: Path
    records: list[Record]
    weight: float


@dataclass(frozen=True)
class LeftOut:
    """A file that cannot take part, and one line for each of its faults."""

    path: Path
    faults: list[str]


@dataclass(frozen=True)
class EnsembleResult:
    """The merged records, the files they came from, and those that were left out."""

    records: list[Record]
    members: list[Member]
    left_out: list[LeftOut]

    def summary(self) -> str:
        """Return a markdown table of the members; files left out stand in bold, with faults."""
        number, merged = len(self.members), len(self.records)
        lines = [f"{_count(number, 'file')} merged into {_count(merged, 'record')}.", ""]
        lines += ["| file | records | weight |", "|---|---:|---:|"]
        lines += [
            f"| {markdown_code(member.path.name)} | {len(member.records):,} | {member.weight:g} |"
            for member in self.members
        ]
        for file in self.left_out:
            lines += ["", *_left_out_lines(file)]
        return "\n".join(lines) + "\n"


def _left_out_lines(file: LeftOut) -> list[str]:
    """Return the markdown lines that name a file left out and its first faults."""
    number = len(file.faults)
    lines = [f"**Left out: {markdown_code(file.path.name)}, {_count(number, 'fault')}**", ""]
    lines += [
        f"- {escape_markdown(' '.join(fault.split()))}" for fault in file.faults[:FAULTS_SHOWN]
    ]
    if number > FAULTS_SHOWN:
        lines.append(f"- and {number - FAULTS_SHOWN:,} more")
    return lines


def _count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def ensemble_files(
    paths_or_dir: str | Path | Iterable[str | Path],
    *,
    weights: Mapping[str, float] | None = None,
    iou_threshold: float = 0.5,
    agreement: bool = True,
    score_threshold: float = 0.0,
    category_ids: Collection[int] = range(1, 5),
    image_ids: Collection[int] | None = None,
    image_sizes: Mapping[int, tuple[int, int]] | None = None,
) -> EnsembleResult:
    """Return the records of result files merged by the overlap of their masks.

    No dataset is needed: image sizes come from the masks. A faulty file is left out and named in
    the result. Where files disagree about the size of an image, they are from different test
    sets: the size that most files give is taken for right (each file has one vote) and the others
    are left out; if no size has the most votes, all files that hold this image are left out, for
    nothing tells which is right (`image_sizes` does). The result depends neither on the order or
    names of files nor on the order of records; it holds no empty mask, and each box is its mask's.

    Args:
        paths_or_dir: a folder, every .json file in it taking part, or the files themselves.
        weights: file name (with or without .json) -> weight > 0; 1 for files not named.
        iou_threshold: records of one class with mask IoU > this show the same cell, in 0-1.
        agreement: True: scores are the members' weighted mean for the cell, so that agreement is
            rewarded (see `fuse`). False: the best record's score, times its file's weight over
            the largest weight.
        score_threshold: records with score < this, before merging, do not take part.
        category_ids: the classes that may occur.
        image_ids: the images that may occur; None allows any.
        image_sizes: image_id -> (height, width); None lets the files vote.

    Raises:
        RecordsError: if there is no file, or none without faults.
        SettingsError: if a weight or threshold cannot work.
    """
    _check_thresholds(iou_threshold, score_threshold)
    paths = _find_files(paths_or_dir)
    weight_of = _weights_by_path(paths, weights or {})
    members: list[Member] = []
    left_out: list[LeftOut] = []
    for path in paths:
        try:
            records = read_records(
                path, image_ids=image_ids, category_ids=category_ids, image_sizes=image_sizes
            )
        except (RecordsError, OSError) as error:
            left_out.append(LeftOut(path, getattr(error, "faults", None) or [str(error)]))
        else:
            members.append(Member(path, records, weight_of[path]))
    members, strangers = _part_by_image_sizes(members)
    left_out = sorted(left_out + strangers, key=lambda file: paths.index(file.path))
    if not members:
        raise _nothing_left(left_out)
    records = _merge(members, iou_threshold, agreement, score_threshold)
    return EnsembleResult(records, members, left_out)


def _merge(
    members: Sequence[Member], iou_threshold: float, agreement: bool, score_threshold: float
) -> list[Record]:
    """Return the merged records of the members."""
    members = [
        replace(member, records=[r for r in member.records if r["score"] >= score_threshold])
        for member in members
    ]
    weights = [member.weight for member in members]
    if agreement:
        lists = [member.records for member in members]
        return _tidy(fuse(lists, iou_threshold=iou_threshold, weights=weights))
    largest = max(weights)
    records = [
        {**record, "score": record["score"] * (member.weight / largest)}
        for member in members
        for record in member.records
    ]
    return _tidy(suppress(records, iou_threshold=iou_threshold))


def _tidy(records: Sequence[Record]) -> list[Record]:
    """Return records with the tight box of their mask and no other keys; no empty mask."""
    boxes = rle_to_xywh([record["segmentation"] for record in records])
    return [
        {
            "image_id": record["image_id"],
            "category_id": record["category_id"],
            "score": float(record["score"]),
            "bbox": box.tolist(),
            "segmentation": {key: record["segmentation"][key] for key in ("size", "counts")},
        }
        for record, box in zip(records, boxes, strict=True)
        if box[2] > 0
    ]


def _find_files(paths_or_dir: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the files to merge by name, which orders tables only."""
    if not isinstance(paths_or_dir, (str, Path)):
        paths = [Path(path) for path in paths_or_dir]
        where = "the list of files"
    elif Path(paths_or_dir).is_file():
        return [Path(paths_or_dir)]
    else:
        visible = (path for path in Path(paths_or_dir).glob("*.json") if path.name[0] != ".")
        paths = [path for path in visible if path.is_file()]
        where = str(paths_or_dir)
    if not paths:
        raise RecordsError(
            f"nothing to ensemble: no .json file in {where}; put result files there, lists of "
            "{image_id, category_id, score, bbox, segmentation} as prediction writes them"
        )
    return sorted(paths, key=lambda path: (path.name, str(path)))


def _weights_by_path(paths: Sequence[Path], weights: Mapping[str, float]) -> dict[Path, float]:
    """Return each file's weight."""
    known = {path.name for path in paths} | {path.stem for path in paths}
    for name, weight in weights.items():
        if name not in known:
            names = ", ".join(path.name for path in paths)
            raise SettingsError(f"weights: {name!r} is none of the files {names}; mend the name")
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0):
            raise SettingsError(
                f"weights: {name!r} has {weight!r}; give a number > 0, or take the file away"
            )
    return {path: float(weights.get(path.name, weights.get(path.stem, 1))) for path in paths}


def _check_thresholds(iou_threshold: float, score_threshold: float) -> None:
    """Raise SettingsError for thresholds outside 0-1."""
    thresholds = {"iou_threshold": iou_threshold, "score_threshold": score_threshold}
    for name, value in thresholds.items():
        if not 0 <= value <= 1:
            raise SettingsError(f"{name} is {value!r}; give a number from 0 to 1")


def _part_by_image_sizes(members: Sequence[Member]) -> tuple[list[Member], list[LeftOut]]:
    """Return the members that agree with the most files about image sizes, and the others."""
    votes: dict[int, Counter[tuple[int, int]]] = {}
    for member in members:
        for image_id, size in {(r["image_id"], _size(r)) for r in member.records}:
            votes.setdefault(image_id, Counter())[size] += 1
    right = {image_id: _elected(counter) for image_id, counter in votes.items()}
    agreeing, strangers = [], []
    for member in members:
        faults = [
            f"record {index}: image {record['image_id']} is {_text(_size(record))} here, "
            + _verdict(votes[record["image_id"]], right[record["image_id"]])
            for index, record in enumerate(member.records)
            if _size(record) != right[record["image_id"]]
        ]
        if faults:
            strangers.append(LeftOut(member.path, faults))
        else:
            agreeing.append(member)
    return agreeing, strangers


def _size(record: Record) -> tuple[int, int]:
    """Return (height, width) of the image that a record belongs to."""
    height, width = record["segmentation"]["size"]
    return height, width


def _elected(votes: Counter[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the size with the most votes, None if two have as many."""
    first, *others = votes.most_common(2)
    return None if others and others[0][1] == first[1] else first[0]


def _verdict(votes: Counter[tuple[int, int]], right: tuple[int, int] | None) -> str:
    """Say what the other files hold."""
    if right is None:
        sizes = " and ".join(_text(size) for size in sorted(votes))
        return f"but files differ ({sizes}) and none has the most votes; keep those of one test set"
    return f"but {_text(right)} in {votes[right]} of the files: another test set"


def _text(size: tuple[int, int]) -> str:
    """Return a size as height x width."""
    return f"{size[0]} x {size[1]}"


def _nothing_left(left_out: Sequence[LeftOut]) -> RecordsError:
    """Return the error for an ensemble all files of which are faulty."""
    faults = [f"{file.path.name}: {fault}" for file in left_out for fault in file.faults]
    parts = [line for file in left_out for line in _left_out_lines(file)]
    return RecordsError("no file can take part in the ensemble:\n" + "\n".join(parts), faults)

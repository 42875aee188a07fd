"""Several result files -> one list of records."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellseg import markdown
from cellseg.coco import Record, make_records
from cellseg.ensemble.members import LeftOut, Member, find_files, read_members
from cellseg.ensemble.rules import RULE_TEXTS, RULES
from cellseg.ensemble.tuning import AGREEMENT, IOU_THRESHOLD, Tuning
from cellseg.errors import RecordsError, SettingsError
from cellseg.inference.merging import fuse


@dataclass(frozen=True)
class EnsembleResult:
    """The merged records, the files they came from, and how.

    Attributes:
        records: one a cell and class, in `sort_records` order.
        members: the files that take part; those of weight 0 were left out by tuning.
        left_out: the files that cannot take part.
        iou_threshold, agreement, score_threshold: as they were used.
        chosen: where the first two are from: "default", "tuned" or "given".
        tuning: what was tuned, or why nothing was; None if nobody asked.
    """

    records: list[Record]
    members: list[Member]
    left_out: list[LeftOut]
    iou_threshold: float
    agreement: str
    score_threshold: float
    chosen: dict[str, str]
    tuning: Tuning | None

    def summary(self) -> str:
        """Return a markdown table of the members; files left out stand in bold, with faults."""
        number = sum(member.weight > 0 for member in self.members)
        merged = markdown.count_text(len(self.records), "record")
        lines = [f"{markdown.count_text(number, 'file')} merged into {merged}.", "", self._table()]
        lines += [
            "",
            f"One cell: mask IoU > {self.iou_threshold:g} ({self.chosen['iou_threshold']}). Score: "
            f"{RULE_TEXTS[self.agreement]} ({self.chosen['agreement']}).",
        ]
        if self.tuning is not None:
            lines += ["", markdown.escape(self.tuning.sentence())]
        for file in self.left_out:
            lines += ["", *file.lines()]
        return "\n".join(lines) + "\n"

    def _table(self) -> str:
        """Return the table of members, with a column of notes if there are any."""
        noted = any(member.notes for member in self.members)
        rows = []
        for member in self.members:
            weight = f"{member.weight:g}" + f" ({member.chosen})" * (member.chosen != "default")
            notes = [markdown.escape("; ".join(member.notes))] * noted
            rows.append([markdown.code(member.path.name), f"{len(member.table):,}", weight, *notes])
        header = ["file", "records", "weight", *["notes"] * noted]
        return markdown.table(header, rows, flush_right=(1, 2))


def ensemble_files(
    paths_or_dir: str | Path | Iterable[str | Path],
    *,
    tuning: Tuning | None = None,
    weights: Mapping[str, float] | None = None,
    iou_threshold: float | None = None,
    agreement: str | None = None,
    score_threshold: float = 0.0,
    category_ids: Collection[int] = range(1, 5),
    image_ids: Collection[int] | None = None,
    image_sizes: Mapping[int, tuple[int, int]] | None = None,
) -> EnsembleResult:
    """Return the records of result files merged by the overlap of their masks.

    No dataset is needed: image sizes come from the masks. Files of other tools are mended where
    that has one meaning (see `foreign`), with a note. A faulty file is left out and named in the
    result. Where files disagree about the size of an image, they are from different test sets:
    the size that most files give is taken for right (each file has one vote) and the others are
    left out; if no size has the most votes, all files that hold this image are left out, for
    nothing tells which is right (`image_sizes` does). The result depends neither on the order or
    names of files nor on the order of records; it holds no empty mask, and each box is its mask's.

    What is given wins over what was tuned, and that over the defaults. A tuning is for one company
    of files: if one of them cannot take part, or another has come, the defaults stand.

    Args:
        paths_or_dir: a folder, every .json file in it taking part, or the files themselves.
        tuning: of `tune_files`.
        weights: file name (with or without .json) -> weight > 0; 1 for files not named.
        iou_threshold: records of one class with mask IoU > this show the same cell, in 0-1; the
            mask that stands is that of the highest score. 0.5 by default.
        agreement: how the members' scores for a cell become one: "mean" (the default), "root" or
            "best"; see `rules`.
        score_threshold: records with score < this, before merging, do not take part.
        category_ids: the classes that may occur.
        image_ids: the images that may occur; None allows any.
        image_sizes: image_id -> (height, width); None lets the files vote.

    Raises:
        RecordsError: if there is no file, or none without faults.
        SettingsError: if a weight, threshold or rule cannot work.
    """
    _check_settings(iou_threshold, score_threshold, agreement)
    paths = find_files(paths_or_dir)
    _check_weights(paths, weights or {})
    members, left_out = read_members(
        paths, category_ids=category_ids, image_ids=image_ids, image_sizes=image_sizes
    )
    if not members:
        raise _nothing_left(left_out)
    tuning = _fitting(tuning, members)
    members = [_with_weight(member, weights or {}, tuning) for member in members]
    given = {"iou_threshold": iou_threshold, "agreement": agreement}
    settings, chosen = _settle(given, tuning)
    records = _merge(members, score_threshold=score_threshold, **settings)
    return EnsembleResult(
        records, members, left_out, **settings,
        score_threshold=score_threshold, chosen=chosen, tuning=tuning,
    )  # fmt: skip


def _fitting(tuning: Tuning | None, members: Sequence[Member]) -> Tuning | None:
    """Return the tuning if it is for these members; else one that says why it is not used."""
    here = {member.path.stem for member in members}
    if tuning is None or tuning.reason or tuning.weights.keys() == here:
        return tuning
    differing = ", ".join(sorted(tuning.weights.keys() ^ here))
    return Tuning(reason=f"the files that were tuned are not those merged ({differing})")


def _with_weight(member: Member, weights: Mapping[str, float], tuning: Tuning | None) -> Member:
    """Return a member with its weight, and where that is from."""
    for name in (member.path.name, member.path.stem):
        if name in weights:
            return replace(member, weight=float(weights[name]), chosen="given")
    if tuning is not None and not tuning.reason:
        return replace(member, weight=tuning.weights[member.path.stem], chosen="tuned")
    return member


def _settle(
    given: Mapping[str, float | str | None], tuning: Tuning | None
) -> tuple[dict[str, float | str], dict[str, str]]:
    """Return threshold and rule, and where each is from."""
    tuned = tuning is not None and not tuning.reason
    settings = {"iou_threshold": IOU_THRESHOLD, "agreement": AGREEMENT}
    chosen = dict.fromkeys(settings, "default")
    for name, value in given.items():
        if value is not None:
            settings[name], chosen[name] = value, "given"
        elif tuned:
            settings[name], chosen[name] = getattr(tuning, name), "tuned"
    return settings, chosen


def _merge(
    members: Sequence[Member], *, iou_threshold: float, agreement: str, score_threshold: float
) -> list[Record]:
    """Return the merged records of the members, image by image."""
    taking = [member for member in members if member.weight > 0]
    weights = [member.weight for member in taking]
    image_ids = np.unique(np.concatenate([member.table.image_ids for member in taking]))
    merged: list[Record] = []
    for image_id in image_ids.tolist():
        lists = [
            member.table.of_image(image_id, score_threshold=score_threshold) for member in taking
        ]
        fused = fuse(lists, iou_threshold=iou_threshold, weights=weights, combine=RULES[agreement])
        merged += _tidy(image_id, fused)
    return merged


def _tidy(image_id: int, fused: Sequence[Record]) -> list[Record]:
    """Return the records of an image with the tight box of their mask; no empty mask."""
    category_ids, scores = ([record[key] for record in fused] for key in ("category_id", "score"))
    rles = [record["segmentation"] for record in fused]
    records = make_records(image_id, category_ids, scores, rles)
    return [record for record in records if record["bbox"][2] > 0]


def _check_settings(
    iou_threshold: float | None, score_threshold: float, agreement: str | None
) -> None:
    """Raise SettingsError for thresholds outside 0-1, or an unknown rule."""
    thresholds = {"iou_threshold": iou_threshold, "score_threshold": score_threshold}
    for name, value in thresholds.items():
        if value is not None and not 0 <= value <= 1:
            raise SettingsError(f"{name} is {value!r}; give a number from 0 to 1")
    if agreement is not None and agreement not in RULES:
        raise SettingsError(f"agreement is {agreement!r}; use one of {', '.join(RULES)}")


def _check_weights(paths: Sequence[Path], weights: Mapping[str, float]) -> None:
    """Raise SettingsError for weights of no file, or that are not > 0."""
    known = {path.name for path in paths} | {path.stem for path in paths}
    for name, weight in weights.items():
        if name not in known:
            names = ", ".join(path.name for path in paths)
            raise SettingsError(f"weights: {name!r} is none of the files {names}; mend the name")
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0):
            raise SettingsError(
                f"weights: {name!r} has {weight!r}; give a number > 0, or take the file away"
            )


def _nothing_left(left_out: Sequence[LeftOut]) -> RecordsError:
    """Return the error for an ensemble all files of which are faulty."""
    faults = [f"{file.path.name}: {fault}" for file in left_out for fault in file.faults]
    parts = [line for file in left_out for line in file.lines()]
    return RecordsError("no file can take part in the ensemble:\n" + "\n".join(parts), faults)

"""A hand-in looked at before the upload: what the scorer would refuse, and what looks wrong."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellseg import markdown
from cellseg.coco import FAULTS_SHOWN, Record, check_records, rle_to_xywh, xywh_to_xyxy
from cellseg.data import TestImage, read_test_index
from cellseg.errors import RecordsError
from cellseg.evaluation.scores import COCO_CAP
from cellseg.overlap import neighbour_ious
from cellseg.submission.compliance import breaks_limit, compliance, member_settings
from cellseg.submission.files import RESULTS_NAME, parse_results, read_results

BOX_TOLERANCE = 1.0  # px that a side may lie off the mask's: some tools leave the last pixel out
OVERLAP = 0.5  # mask IoU beyond which two records of a class seem to show one cell
MOST_COMPARED = 1000  # records of an image and class, best first, whose overlaps are looked for
NAMED = 10  # images listed by name
# How a fault of `check_records` starts, and the check that it belongs to; others are the schema's.
CHECK_OF = {
    "unknown image_id": "image ids",
    "unknown category_id": "classes",
    "score is": "scores",
    "segmentation size": "sizes",
    "segmentation counts": "RLE",
}
Numbered = dict[int, Record]  # records by their place in the file, from 0


@dataclass(frozen=True)
class Finding:
    """What one check of a hand-in found.

    Attributes:
        check: what was looked at.
        result: "ok", "note", "warning" or "fault"; only a fault keeps it from being handed in.
        detail: the finding in a phrase.
        reasons: a line for each fault, with the record's number, from 0, where it has one.
    """

    check: str
    result: str
    detail: str
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SubmissionCheck:
    """What the checks of a hand-in found, in their order."""

    path: Path
    findings: list[Finding]

    @property
    def reasons(self) -> list[str]:
        """Why it is not ready, a line for each fault; empty if it is."""
        return [reason for finding in self.findings for reason in finding.reasons]

    @property
    def ready(self) -> bool:
        """Whether it can be handed in."""
        return not self.reasons

    def table(self) -> str:
        """Return the findings as a Markdown table."""
        rows = [
            (markdown.escape(f.check), f.result, markdown.escape(f.detail)) for f in self.findings
        ]
        return markdown.table(("check", "result", "detail"), rows)

    def verdict(self) -> str:
        """Return "ready", or the first reasons why it is not, a line each."""
        if self.ready:
            return f"ready: {self.path}"
        lines = [f"- {reason}" for reason in markdown.first_lines(self.reasons, FAULTS_SHOWN)]
        return "\n".join([f"not ready: {self.path}", *lines])


def check_submission(
    path: str | Path,
    *,
    index_path: str | Path | None = None,
    num_labels: int = 4,
    project_dir: str | Path | None = None,
    runs_dir: str | Path | None = None,
) -> SubmissionCheck:
    """Return what is right and what is wrong with a file to hand in.

    A fault is what the scorer would refuse or what can only be a mistake; what may be meant is a
    warning. The cost follows the file's size; a hostile file is not unpacked beyond a limit.

    Args:
        path: the zip, or the bare JSON that belongs into it.
        index_path: the release's `test_image_name_to_ids.json`; without it any id is allowed,
            and sizes are compared among the records of an image.
        num_labels: number of classes, background not counted: ids 1..num_labels may occur.
        project_dir: holds `predictions/`, for the lines on the course's rules; the file's own
            folder by default.
        runs_dir: holds the runs that the files there are named after; by default `runs/` in
            `project_dir`, or that itself.

    Raises:
        DataError: if the index cannot be used.
    """
    path = Path(path)
    index = None if index_path is None else read_test_index(index_path)
    findings: list[Finding] = []
    try:
        data, zipped = read_results(path)
        findings.append(_file_finding(path, zipped))
        records = parse_results(path, data)
    except RecordsError as error:
        check = "JSON" if findings else "file"
        return SubmissionCheck(path, [*findings, _judge(check, [str(error)])])
    findings.append(_size_finding(path, data, records))
    forms, sound = _check_forms(records, index, num_labels)
    findings += forms
    if sound:
        findings += [*_check_masks(sound), *_check_coverage(sound, index)]
    project = path.parent if project_dir is None else Path(project_dir)
    findings += _check_members(project, None if runs_dir is None else Path(runs_dir))
    return SubmissionCheck(path, findings)


def _judge(check: str, faults: list[str], fine: str = "") -> Finding:
    """Return a fault with its reasons, or "ok" with what is fine if there are none."""
    if not faults:
        return Finding(check, "ok", fine)
    first = faults[0] if len(faults) == 1 else f"{len(faults):,} faults, first {faults[0]}"
    return Finding(check, "fault", first, faults)


def _file_finding(path: Path, zipped: bool) -> Finding:
    """Say what kind of file it is."""
    if zipped:
        return Finding("file", "ok", f"{path.name} holds exactly {RESULTS_NAME}")
    named = "" if path.name == RESULTS_NAME else f", named {RESULTS_NAME}"
    return Finding("file", "note", f"a bare JSON; handed in is the zip that holds it{named}")


def _size_finding(path: Path, data: bytes, records: Any) -> Finding:
    """Say how large it is."""
    number = len(records) if isinstance(records, list) else 0
    text = f"{path.stat().st_size / 1e6:.2f} MB, unpacked {len(data) / 1e6:.2f} MB"
    return Finding("file size", "ok", f"{text}; number of records: {number:,}")


def _check_forms(
    records: Any, index: Sequence[TestImage] | None, num_labels: int
) -> tuple[list[Finding], Numbered]:
    """Return the findings on each record by itself, and the records without fault."""
    if not isinstance(records, list) or not records:
        empty = ["the list is empty, on which COCO's loadRes fails; hand in some records"]
        return [_judge("schema", check_records(records) or empty)], {}
    sizes = None if index is None else {i.image_id: (i.height, i.width) for i in index}
    faults = check_records(
        records, image_ids=sizes, category_ids=range(1, num_labels + 1), image_sizes=sizes
    )
    sound = _without(dict(enumerate(records)), faults)
    if index is None:
        faults += _odd_sizes(sound)
        sound = _without(sound, faults)
    by_check: dict[str, list[str]] = {}
    for fault in faults:
        text = fault.split(": ", 1)[1]
        check = next((c for start, c in CHECK_OF.items() if text.startswith(start)), "schema")
        by_check.setdefault(check, []).append(fault)
    return _form_findings(by_check, index, num_labels), sound


def _without(records: Numbered, faults: Collection[str]) -> Numbered:
    """Return the records that no fault names; a fault starts with "record 7:"."""
    faulty = {int(fault.split(":")[0].removeprefix("record ")) for fault in faults}
    return {number: record for number, record in records.items() if number not in faulty}


def _odd_sizes(records: Numbered) -> list[str]:
    """Return a fault for each mask whose size is not that of the first one of its image."""
    first: dict[int, list[int]] = {}
    faults = []
    for number, record in records.items():
        size = record["segmentation"]["size"]
        expected = first.setdefault(record["image_id"], size)
        if size != expected:
            text = f"segmentation size {size} differs from {expected}, that of the image's first"
            faults.append(f"record {number}: {text}")
    return faults


def _form_findings(
    by_check: Mapping[str, list[str]], index: Sequence[TestImage] | None, num_labels: int
) -> list[Finding]:
    """Return a finding for each check of the records' form."""
    fine = {
        "schema": "each record has its five keys",
        "image ids": "not compared, for want of the test index",
        "classes": f"each is one of 1 to {num_labels}",
        "scores": "each is a number from 0 to 1",
        "sizes": "one size an image; not compared with the test index, for want of it",
        "RLE": "each mask decodes to height x width pixels",
    }
    if index is not None:
        fine |= {
            "image ids": f"each is one of the {len(index)} in the test index",
            "sizes": "each mask has the size that the test index gives",
        }
    findings = [_judge(check, by_check.get(check, []), text) for check, text in fine.items()]
    return [
        Finding(f.check, "note", f.detail) if "for want" in f.detail and not f.reasons else f
        for f in findings
    ]


def _check_masks(records: Numbered) -> list[Finding]:
    """Return the findings on boxes, empty masks, duplicates and overlaps."""
    tight = rle_to_xywh([record["segmentation"] for record in records.values()])
    solid = {
        number: (record, box)
        for (number, record), box in zip(records.items(), tight, strict=True)
        if box[2] > 0
    }
    empty = [f"record {number}: its mask is empty" for number in records if number not in solid]
    copies = _find_copies(records)
    same = [f"record {n}: image, class and mask are those of record {o}" for n, o in copies.items()]
    different = {n: record for n, (record, _) in solid.items() if n not in copies}
    boxes = np.array([box for _, box in solid.values()]).reshape(-1, 4)
    return [
        _judge("boxes", _box_faults({n: record for n, (record, _) in solid.items()}, boxes),
               f"each is its mask's tight box to {BOX_TOLERANCE:g} px"),
        _judge("empty masks", empty, "none"),
        _judge("duplicates", same, "none"),
        _overlap_finding(different),
    ]  # fmt: skip


def _box_faults(records: Numbered, tight: np.ndarray) -> list[str]:
    """Return a fault for each record whose bbox is not the tight box (xywh, [N, 4]) of its mask."""
    given = np.array([record["bbox"] for record in records.values()], dtype=float).reshape(-1, 4)
    corners = xywh_to_xyxy(tight)
    off = np.abs(xywh_to_xyxy(given) - corners).max(axis=1, initial=0) > BOX_TOLERANCE
    as_corners = np.abs(given - corners).max(axis=1, initial=0) <= BOX_TOLERANCE
    numbers = list(records)
    return [
        f"record {numbers[k]}: bbox {records[numbers[k]]['bbox']} is not {tight[k].tolist()}, its "
        f"mask's tight box [x, y, width, height]{'; it holds corners' if as_corners[k] else ''}"
        for k in np.flatnonzero(off).tolist()
    ]


def _find_copies(records: Numbered) -> dict[int, int]:
    """Return, for each record whose image, class and mask came before, the record that had them."""
    first: dict[tuple, int] = {}
    copies = {}
    for number, record in records.items():
        counts = record["segmentation"]["counts"]
        key = (record["image_id"], record["category_id"], counts)
        if first.setdefault(key, number) != number:
            copies[number] = first[key]
    return copies


def _overlap_finding(records: Numbered) -> Finding:
    """Say which records of one image and class cover each other; the best ones are compared."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, record in records.items():
        groups.setdefault((record["image_id"], record["category_id"]), []).append(number)
    pairs: list[tuple[int, int]] = []
    for group in groups.values():
        group.sort(key=lambda number: -records[number]["score"])
        best = group[:MOST_COMPARED]
        i, j, iou = neighbour_ious([records[number]["segmentation"] for number in best])
        close = iou > OVERLAP
        pairs += [(best[a], best[b]) for a, b in zip(i[close], j[close], strict=True)]
    largest = max(map(len, groups.values()), default=0)
    cut = f" (of an image and class the best {MOST_COMPARED:,})" if largest > MOST_COMPARED else ""
    if not pairs:
        return Finding("overlaps", "ok", f"no two of a class with IoU over {OVERLAP:g}{cut}")
    a, b = min(map(sorted, pairs))
    text = f"{len(pairs):,} pairs of a class with IoU over {OVERLAP:g}{cut}, first records {a}, {b}"
    return Finding("overlaps", "warning", f"{text}: one cell told twice counts as a false one")


def _check_coverage(records: Numbered, index: Sequence[TestImage] | None) -> list[Finding]:
    """Return the findings on images without records, and on images with many."""
    found = Counter((record["image_id"], record["category_id"]) for record in records.values())
    images = {image_id for image_id, _ in found}
    over = sum(number > COCO_CAP for number in found.values())
    text = f"at most {max(found.values())} in an image and class"
    if over:
        text += f", over {COCO_CAP} in {over} of {len(found)}: a scorer may count the best only"
    many = Finding("records per image and class", "note" if over else "ok", text)
    if index is None:
        unknown = f"{len(images)} have records; of others nothing is known without the test index"
        return [Finding("images without records", "note", unknown), many]
    bare = [f"{i.image_id} ({i.file_name})" for i in index if i.image_id not in images]
    if not bare:
        return [Finding("images without records", "ok", f"none of {len(index)}"), many]
    named = f"{len(bare)} of {len(index)}: {markdown.first_few(bare, NAMED)}"
    return [Finding("images without records", "warning", named), many]


def _check_members(project_dir: Path, runs_dir: Path | None) -> list[Finding]:
    """Return a finding on the course's rules for each result file in `predictions/`."""
    findings = []
    for name, settings in member_settings(project_dir, runs_dir).items():
        check, line = f"compliance: {name}", compliance(settings)
        if breaks_limit(settings):
            findings.append(_judge(check, [f"{name} in predictions/: {line}; leave it out"]))
        else:
            findings.append(Finding(check, "note" if "unknown" in line else "ok", line))
    none = Finding("compliance", "note", f"unknown: {project_dir} holds no predictions/ with files")
    return findings or [none]

"""The files of an ensemble: found, read, mended, and held against one another."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg import markdown
from cellseg.coco import FAULTS_SHOWN, check_records
from cellseg.ensemble.foreign import compare_boxes, mend_forms
from cellseg.ensemble.table import RecordTable
from cellseg.errors import RecordsError


@dataclass(frozen=True)
class Member:
    """A file that takes part.

    Attributes:
        path: of the file.
        table: its records as columns.
        sha256: of its bytes.
        notes: what was mended in it.
        weight: > 0, or 0 if tuning left it out.
        chosen: where the weight is from: "default", "tuned" or "given".
    """

    path: Path
    table: RecordTable
    sha256: str
    notes: list[str]
    weight: float = 1.0
    chosen: str = "default"


@dataclass(frozen=True)
class LeftOut:
    """A file that cannot take part, and one line for each of its faults."""

    path: Path
    faults: list[str]

    def lines(self) -> list[str]:
        """Return the markdown lines that name the file and its first faults."""
        number = markdown.count_text(len(self.faults), "fault")
        shown = markdown.first_lines(self.faults, FAULTS_SHOWN)
        return [
            f"**Left out: {markdown.code(self.path.name)}, {number}**",
            "",
            *(f"- {markdown.escape(' '.join(fault.split()))}" for fault in shown),
        ]


def find_files(paths_or_dir: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the files to merge by name, which orders tables only.

    Raises:
        RecordsError: if there are none.
    """
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


def read_members(
    paths: Sequence[Path],
    *,
    category_ids: Collection[int],
    image_ids: Collection[int] | None = None,
    image_sizes: Mapping[int, tuple[int, int]] | None = None,
) -> tuple[list[Member], list[LeftOut]]:
    """Return the files that can take part, and those that cannot with their faults.

    Args:
        paths: the files, one after the other in memory.
        category_ids: the classes that may occur.
        image_ids: the images that may occur; None allows any.
        image_sizes: image_id -> (height, width); None lets the files vote.
    """
    allowed = {"category_ids": category_ids, "image_ids": image_ids, "image_sizes": image_sizes}
    members: list[Member] = []
    left_out: list[LeftOut] = []
    for path in paths:
        try:
            members.append(_read_member(path, allowed))
        except RecordsError as error:
            left_out.append(LeftOut(path, error.faults or [str(error)]))
    members, strangers = _part_by_image_sizes(members)
    return members, sorted(left_out + strangers, key=lambda file: paths.index(file.path))


def _read_member(path: Path, allowed: Mapping[str, object]) -> Member:
    """Return one file, with the form of its records mended; RecordsError if it has faults."""
    try:
        data = path.read_bytes()
        content = json.loads(data)  # from bytes, so that UTF-16 and a byte order mark are read
    except FileNotFoundError:
        raise RecordsError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = f"is not a JSON result file ({str(error).splitlines()[0]}); write it anew"
        raise RecordsError(f"{path} {reason}", [reason]) from None
    notes = mend_forms(content)
    faults = check_records(content, **allowed)
    if faults:
        raise RecordsError(f"{path} has {markdown.count_text(len(faults), 'fault')}", faults)
    notes += compare_boxes(content)
    return Member(path, RecordTable.from_records(content), hashlib.sha256(data).hexdigest(), notes)


def _part_by_image_sizes(members: Sequence[Member]) -> tuple[list[Member], list[LeftOut]]:
    """Return the members that agree with the most files about image sizes, and the others."""
    votes: dict[int, Counter[tuple[int, int]]] = {}
    for member in members:
        for image_id, height, width in member.table.image_sizes():
            votes.setdefault(image_id, Counter())[height, width] += 1
    right = {image_id: _elected(counter) for image_id, counter in votes.items()}
    agreeing, strangers = [], []
    for member in members:
        faults = _size_faults(member.table, votes, right)
        if faults:
            strangers.append(LeftOut(member.path, faults))
        else:
            agreeing.append(member)
    return agreeing, strangers


def _size_faults(
    table: RecordTable,
    votes: Mapping[int, Counter[tuple[int, int]]],
    right: Mapping[int, tuple[int, int] | None],
) -> list[str]:
    """Return a line for each record whose mask is not of its image's elected size."""
    if all(right[image_id] == (height, width) for image_id, height, width in table.image_sizes()):
        return []
    rows = enumerate(zip(table.image_ids.tolist(), map(tuple, table.sizes.tolist()), strict=True))
    return [
        f"record {index}: image {image_id} is {_text(size)} here, "
        + _verdict(votes[image_id], right[image_id])
        for index, (image_id, size) in rows
        if size != right[image_id]
    ]


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

"""Where the score is lost: what AP50 would be if each kind of error were mended.

The kinds are those of TIDE (Bolya et al., ECCV 2020), in mask IoU, with t_f = 0.5 and t_b = 0.1.
A false record is, by the first that holds (the order of its authors' code):

- "poor mask": 0.1 <= IoU < 0.5 with a cell of its class;
- "wrong class": IoU >= 0.5 with a cell of another class;
- "duplicate": IoU >= 0.5 with a cell of its class that a better record found;
- "background": IoU < 0.1 with every cell;
- "both": the rest, 0.1 <= IoU < 0.5 with a cell of another class.

A cell is "missed" if no record found it and no poor mask or wrong class is nearest to it. Gains do
not add up: mending one kind uncovers or hides another.

Figures are those of the authors' tidecv 1.0.1 but for three things. There an IoU of exactly 0.5 on
a cell that is found makes a poor mask, here, as in the paper, a duplicate. There a cell that both a
wrong class and a poor mask could find goes to the surer of them, so that mending the other kind
alone leaves it unfound. There precision is read at recalls of exactly k / 100, here where
pycocotools reads it, some of them a rounding error to the side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cellseg import markdown
from cellseg.coco import Record
from cellseg.evaluation.overlaps import (
    FOUND_IOU,
    NEAR_IOU,
    Overlaps,
    find_overlaps,
    grouped_ap50,
)
from cellseg.evaluation.scores import Truth

KINDS = ("wrong class", "poor mask", "both", "duplicate", "background", "missed")
PERFECT = ("perfect masks", "perfect classes", "perfect suppression")
CLASS, MASK, BOTH, DUPLICATE, BACKGROUND = range(5)
_FAULTS = {
    "wrong class": "records with the wrong class",
    "poor mask": "records with a poor mask",
    "both": "records with the wrong class and a poor mask",
    "duplicate": "duplicates",
    "background": "records where no cell is",
    "missed": "missed cells",
}


@dataclass(frozen=True)
class Mended:
    """One mend; AP50 and gain are None where there is no cell to find.

    Attributes:
        count: errors of the kind; of the perfect parts the records that get a cell's mask, that
            change class or go for it, and that suppression takes away.
        ap50_after: AP50 with it.
        gain: by how much that is more.
    """

    count: int
    ap50_after: float | None
    gain: float | None


@dataclass(frozen=True)
class ErrorReport:
    """What AP50 would be with one kind of error mended.

    Attributes:
        ap50: as it is, as `Scores.ap50`; None where there is no cell to find.
        kinds: a mend for each of `KINDS`, alone, as TIDE does it. Wrong class: the class becomes
            the cell's. Poor mask: the mask becomes the cell's. Of several that would find one
            cell the best stays (ties: the first given), and the others go, as all do whose cell
            is found already. Both, duplicate, background: the records go. Missed: the cells are
            no longer asked for; a class of which none is left keeps an AP50 of 0.
        perfect: a mend for each of `PERFECT`, in which a record's cell is the one that it found,
            else the one that it overlaps most with an IoU >= 0.1.
            Masks: each record gets the mask of its cell of its class; of those alike then the
            best stays. All masks being true, this is what AP would be, too.
            Classes: each record gets the class of its cell of any class. The best of those with
            an IoU >= 0.5 finds the cell; the others go, but for duplicates that there were
            before. This can cost AP50: false records move to the class of their cell.
            Suppression: of the records of one class on one cell of any class only one stays, the
            one that found it if any did, else the best.
        per_record: the kind of each record in the order given; None if it found a cell or a
            crowd excuses it.
        missed: ids of the missed annotations.
    """

    ap50: float | None
    kinds: dict[str, Mended]
    perfect: dict[str, Mended]
    per_record: list[str | None]
    missed: list[int]

    @property
    def sentence(self) -> str:
        """Say where most is lost."""
        if self.ap50 is None:
            return "AP50 has no value here: there is no cell to find."
        kind, most = max(self.kinds.items(), key=lambda item: item[1].gain)
        if most.gain <= 0:
            return f"AP50 is {self.ap50:.3f}, and no kind of error costs any of it by itself."
        return (
            f"Most is lost to {_FAULTS[kind]} ({most.count:,}): mended, AP50 would be "
            f"{most.ap50_after:.3f} instead of {self.ap50:.3f} ({most.gain:+.3f})."
        )

    def table(self) -> str:
        """Return the mends as a Markdown table; "-" where there is no cell to find."""
        rows = [
            (name, f"{mend.count:,}", _shown(mend.ap50_after), _shown(mend.gain, "+.3f"))
            for name, mend in (self.kinds | self.perfect).items()
        ]
        as_it_is = ("as it is", "", _shown(self.ap50), "")
        return markdown.table(("", "number", "AP50 if mended", "gain"), [as_it_is, *rows])


def explain_errors(truth: Truth, records: Sequence[Record]) -> ErrorReport:
    """Return the errors by kind, and what AP50 would be without each.

    Args:
        truth: COCO dict as `truth_from_targets` makes it; not changed.
        records: result records, all that there are: AP50 counts records of any score.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    seen = find_overlaps(truth, records)
    kinds = error_kinds(seen)
    missed = missed_cells(seen, kinds)
    ap50 = _ap50(seen)
    mends = dict(_tide_mends(seen, kinds, missed)) | dict(_perfect_mends(seen))
    mended = {
        name: Mended(count, after, None if ap50 is None else after - ap50)
        for name, (count, after) in mends.items()
    }
    return ErrorReport(
        ap50=ap50,
        kinds={name: mended[name] for name in KINDS},
        perfect={name: mended[name] for name in PERFECT},
        per_record=[KINDS[kind] if kind >= 0 else None for kind in kinds.tolist()],
        missed=[seen.cells[k]["id"] for k in np.flatnonzero(missed).tolist()],
    )


def error_kinds(seen: Overlaps) -> np.ndarray:
    """Return the kind of each record, a position in `KINDS`, int64 [D]; -1 is no error."""
    conditions = [
        ~seen.false,
        (seen.own_iou >= NEAR_IOU) & (seen.own_iou < FOUND_IOU),
        seen.other_iou >= FOUND_IOU,
        seen.own_iou >= FOUND_IOU,
        seen.other_iou < NEAR_IOU,
    ]
    return np.select(conditions, [-1, MASK, CLASS, DUPLICATE, BACKGROUND], default=BOTH)


def missed_cells(seen: Overlaps, kinds: np.ndarray) -> np.ndarray:
    """Return which cells no record found and no mended class or mask would find, bool [T]."""
    missed = seen.finder < 0
    missed[seen.own[kinds == MASK]] = False
    missed[seen.other[kinds == CLASS]] = False
    return missed


def _tide_mends(
    seen: Overlaps, kinds: np.ndarray, missed: np.ndarray
) -> Iterator[tuple[str, tuple[int, float | None]]]:
    """Yield (kind, (number of errors, AP50 without them)) of TIDE's kinds."""
    label = np.append(seen.cell_label, 0)  # what place -1 reads
    free = np.append(seen.finder < 0, False)
    for kind, cell in ((CLASS, seen.other), (MASK, seen.own)):
        wrong = kinds == kind
        wins = _best_of(np.where(wrong & free[cell], cell, -1), seen.score)
        after = _ap50(
            seen,
            label=np.where(wins, label[cell], seen.label),
            found=(seen.found >= 0) | wins,
            gone=wrong & ~wins,
        )
        yield KINDS[kind], (int(wrong.sum()), after)
    for kind in (BOTH, DUPLICATE, BACKGROUND):
        wrong = kinds == kind
        yield KINDS[kind], (int(wrong.sum()), _ap50(seen, gone=wrong))
    places = np.searchsorted(seen.category_ids, seen.cell_label[missed])
    left = seen.truths - np.bincount(places, minlength=len(seen.category_ids))
    yield "missed", (int(missed.sum()), _ap50(seen, truths=left))


def _perfect_mends(seen: Overlaps) -> Iterator[tuple[str, tuple[int, float | None]]]:
    """Yield (name, (records that it is about, AP50 then)) of the perfect parts."""
    hit = seen.found >= 0
    own = np.where(hit, seen.found, seen.own)
    other_is_nearer = ~hit & (seen.other_iou > seen.own_iou)
    cell = np.where(other_is_nearer, seen.other, own)
    cell[seen.ignored] = own[seen.ignored] = -1

    wins = _best_of(own, seen.score)
    after = _ap50(seen, found=wins, gone=(own >= 0) & ~wins)
    yield "perfect masks", (int((own >= 0).sum()), after)

    label = np.where(cell >= 0, np.append(seen.cell_label, 0)[cell], seen.label)
    changes = label != seen.label
    reaches = hit | ((cell >= 0) & (np.maximum(seen.own_iou, seen.other_iou) >= FOUND_IOU))
    wins = _best_of(np.where(reaches, cell, -1), seen.score)
    gone = ((changes & reaches) | hit) & ~wins
    after = _ap50(seen, label=label, found=wins, gone=gone)
    yield "perfect classes", (int((changes | gone).sum()), after)

    place = np.where(cell >= 0, cell * (seen.category_ids.max(initial=0) + 1) + seen.label, -1)
    stays = _best_of(place, np.where(hit, np.inf, seen.score))
    gone = (cell >= 0) & ~stays
    yield "perfect suppression", (int(gone.sum()), _ap50(seen, gone=gone))


def _best_of(place: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return which record is the best of those at its place, bool [D]; place -1 is none."""
    order = np.argsort(-score, kind="stable")
    order = order[place[order] >= 0]
    best = np.zeros(len(place), dtype=bool)
    best[order[np.unique(place[order], return_index=True)[1]]] = True
    return best


def _ap50(
    seen: Overlaps,
    *,
    label: np.ndarray | None = None,
    found: np.ndarray | None = None,
    gone: np.ndarray | None = None,
    truths: np.ndarray | None = None,
) -> float | None:
    """Return AP50 with something changed: classes, what is found or gone [D], cells [C]."""
    present = seen.truths > 0
    if not present.any():
        return None
    ap50 = grouped_ap50(
        np.searchsorted(seen.category_ids, seen.label if label is None else label),
        seen.score,
        seen.image,
        found=seen.found >= 0 if found is None else found,
        ignored=seen.ignored if gone is None else seen.ignored | gone,
        truths=seen.truths if truths is None else truths,
    )
    return float(np.nan_to_num(ap50[present]).mean())


def _shown(value: float | None, form: str = ".3f") -> str:
    """Return a score as text, None as "-"."""
    return "-" if value is None else format(value, form)

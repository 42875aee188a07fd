"""All that records are told by, from one call: for notebook, command line and report."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

from cellseg.coco import Record
from cellseg.evaluation.analysis import ErrorReport, explain_errors
from cellseg.evaluation.curves import Calibration, ClassCurve, calibrate, class_curves
from cellseg.evaluation.intervals import (
    Interval,
    class_bootstrap,
    class_nuclei_bootstrap,
    count_groups,
    describe_draws,
    image_bootstrap,
)
from cellseg.evaluation.names import AP_SHOWN, NUCLEI_NAMES, SCORE_NAMES
from cellseg.evaluation.nuclei import NucleiReport, score_nuclei
from cellseg.evaluation.scores import (
    Scores,
    Truth,
    confusion_matrix,
    score_records,
    scores_table,
)
from cellseg.inference.settling import settle_classes


@dataclass(frozen=True)
class Evaluation:
    """What records of images with truth are worth, and where they lose.

    Attributes:
        scores: their AP.
        intervals: the names of `AP_SHOWN` and of the nuclei scores -> score with 95 % interval.
        class_intervals: class name -> AP50 with 95 % interval.
        nuclei: PQ, AJI and so on, of one record a nucleus (`settle_classes`).
        class_nuclei: class name -> nuclei score -> the same with 95 % interval.
        matrix: int64 [C + 1, C + 1], see `confusion_matrix`.
        curves: class name -> its precision-recall curve.
        errors: what AP50 loses to each kind of error.
        calibration: how far scores are the share of records that found a cell.
        images, groups: how many there are; None if each image was drawn by itself.
        score_threshold: from which score on nuclei and matrix count records.
        iou_threshold: mask IoU at which the matrix calls two masks one cell.
    """

    scores: Scores
    intervals: dict[str, Interval]
    class_intervals: dict[str, Interval]
    nuclei: NucleiReport
    class_nuclei: dict[str, dict[str, Interval]]
    matrix: np.ndarray
    curves: dict[str, ClassCurve]
    errors: ErrorReport
    calibration: Calibration
    images: int
    groups: int | None
    score_threshold: float
    iou_threshold: float

    def table(self) -> str:
        """Return the scores with the ends of their intervals as a Markdown table."""
        rows = [(SCORE_NAMES[name], *astuple(at)) for name, at in self.intervals.items()]
        return scores_table(("value", "from", "to"), rows)

    def class_table(self) -> str:
        """Return the scores of each class as a Markdown table, AP50 and PQ with their intervals."""
        others = [name for name in NUCLEI_NAMES if name != "pq"]
        rows = []
        for name, at in self.class_intervals.items():
            nuclei = self.class_nuclei[name]
            rest = [nuclei[key].value for key in others]
            rows.append(
                (name, *astuple(at), *astuple(nuclei["pq"]), *rest, self.nuclei.per_class_f_c[name])
            )
        shown = [NUCLEI_NAMES[name] for name in others]
        return scores_table(("AP50", "from", "to", "PQ", "from", "to", *shown, "F_c"), rows)

    def summary(self) -> str:
        """Return the tables and what they are made of, as Markdown."""
        drawn = describe_draws(self.images, self.groups)
        return "\n\n".join(
            (
                self.table(),
                f"From and to: the middle 95 % of 1,000 draws of {drawn}. The nuclei scores take "
                f"records of score {self.score_threshold:g} or more, one a nucleus.",
                self.class_table(),
                self.errors.table(),
                self.errors.sentence,
            )
        )

    def content(self) -> dict[str, Any]:
        """Return the scores as plain values, as a run's `scores.json` holds them."""
        nuclei = self.nuclei
        return asdict(self.scores) | {
            "images": self.images,
            "groups": self.groups,
            "nuclei_score_threshold": self.score_threshold,
            "intervals": {name: asdict(at) for name, at in self.intervals.items()},
            "intervals_per_class": {name: asdict(at) for name, at in self.class_intervals.items()},
            "nuclei_mean_over_images": asdict(nuclei.mean),
            "nuclei_per_class": {
                name: asdict(scores) | {"f_c": nuclei.per_class_f_c[name]}
                for name, scores in nuclei.per_class.items()
            },
            "nuclei_intervals_per_class": {
                name: {key: asdict(at) for key, at in scores.items()}
                for name, scores in self.class_nuclei.items()
            },
        }


def evaluate_records(
    truth: Truth,
    records: Sequence[Record],
    *,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    groups: Mapping[int, Hashable] | None = None,
) -> Evaluation:
    """Return all scores of records, their intervals and where they lose.

    AP and errors count all records. The nuclei scores count one record a nucleus: a detector
    hands in a cell under every class that it may be of, and painted those would be holes and
    false nuclei.

    Args:
        truth: COCO dict as `truth_from_targets` makes it; not changed.
        records: result records; not changed.
        score_threshold: from which score on nuclei and matrix count records, in 0-1.
        iou_threshold: mask IoU at which the matrix calls two masks one cell.
        groups: image_id -> its slide or patient, as in `image_bootstrap`.

    Raises:
        SettingsError: if an image has no group.
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    settled, cut = settle_classes(records), {"score_threshold": score_threshold}
    drawn = {"statistics": tuple(NUCLEI_NAMES), "groups": groups} | cut
    nuclei = score_nuclei(truth, settled, **cut)
    return Evaluation(
        scores=score_records(truth, records),
        intervals=image_bootstrap(truth, records, statistics=AP_SHOWN, groups=groups)
        | image_bootstrap(truth, settled, **drawn),
        class_intervals=class_bootstrap(truth, records, groups=groups),
        nuclei=nuclei,
        class_nuclei=class_nuclei_bootstrap(truth, nuclei, groups=groups),
        matrix=confusion_matrix(truth, records, iou_threshold=iou_threshold, **cut),
        curves=class_curves(truth, records),
        errors=explain_errors(truth, records),
        calibration=calibrate(truth, records),
        images=len(truth["images"]),
        groups=count_groups(truth, groups),
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
    )

"""Scores of records against the truth."""

from cellseg.evaluation.intervals import (
    Comparison,
    Interval,
    compare_records,
    image_bootstrap,
)
from cellseg.evaluation.nuclei import (
    NucleiReport,
    NucleiScores,
    choose_score_threshold,
    score_nuclei,
)
from cellseg.evaluation.scores import (
    Scores,
    confusion_matrix,
    dataset_truth,
    score_records,
    truth_from_targets,
)

__all__ = [
    "Comparison",
    "Interval",
    "NucleiReport",
    "NucleiScores",
    "Scores",
    "choose_score_threshold",
    "compare_records",
    "confusion_matrix",
    "dataset_truth",
    "image_bootstrap",
    "score_nuclei",
    "score_records",
    "truth_from_targets",
]

"""Scores of records against the truth."""

from cellseg.evaluation.scores import (
    Scores,
    confusion_matrix,
    dataset_truth,
    score_records,
    truth_from_targets,
)

__all__ = ["Scores", "confusion_matrix", "dataset_truth", "score_records", "truth_from_targets"]

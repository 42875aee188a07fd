"""Scores of records against the truth, and what they are made of."""

from cellseg.evaluation.analysis import KINDS, PERFECT, ErrorReport, Mended, explain_errors
from cellseg.evaluation.curves import (
    BestCut,
    Calibration,
    ClassCurve,
    Part,
    calibrate,
    class_curves,
    curves_table,
    parts_table,
    score_by_crowding,
    score_by_size,
)
from cellseg.evaluation.intervals import (
    Comparison,
    Interval,
    class_bootstrap,
    class_nuclei_bootstrap,
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
from cellseg.evaluation.summary import Evaluation, evaluate_records
from cellseg.evaluation.worst import Pick, worst_cells, worst_images

__all__ = [
    "KINDS",
    "PERFECT",
    "BestCut",
    "Calibration",
    "ClassCurve",
    "Comparison",
    "ErrorReport",
    "Evaluation",
    "Interval",
    "Mended",
    "NucleiReport",
    "NucleiScores",
    "Part",
    "Pick",
    "Scores",
    "calibrate",
    "choose_score_threshold",
    "class_bootstrap",
    "class_curves",
    "class_nuclei_bootstrap",
    "compare_records",
    "confusion_matrix",
    "curves_table",
    "dataset_truth",
    "evaluate_records",
    "explain_errors",
    "image_bootstrap",
    "parts_table",
    "score_by_crowding",
    "score_by_size",
    "score_nuclei",
    "score_records",
    "truth_from_targets",
    "worst_cells",
    "worst_images",
]

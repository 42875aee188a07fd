"""Results a person looks at: figures of data and training, and the report of a run."""

from cellseg.report.analysis_plots import (
    plot_calibration,
    plot_errors_mended,
    plot_gallery,
    plot_precision_recall,
)
from cellseg.report.document import Report, build_report
from cellseg.report.evaluated import EvaluatedRun, evaluate_run
from cellseg.report.experiments import compare_sides
from cellseg.report.leaks import plot_leaks
from cellseg.report.plots import (
    plot_audit,
    plot_augmentations,
    plot_confusion_matrix,
    plot_learning_curves,
    plot_prediction,
    plot_sample,
    plot_truth_and_prediction,
)
from cellseg.report.style import check_figure_path, save_figure

__all__ = [
    "EvaluatedRun",
    "Report",
    "build_report",
    "check_figure_path",
    "compare_sides",
    "evaluate_run",
    "plot_audit",
    "plot_augmentations",
    "plot_calibration",
    "plot_confusion_matrix",
    "plot_errors_mended",
    "plot_gallery",
    "plot_leaks",
    "plot_learning_curves",
    "plot_precision_recall",
    "plot_prediction",
    "plot_sample",
    "plot_truth_and_prediction",
    "save_figure",
]

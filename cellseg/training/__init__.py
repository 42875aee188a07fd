"""Training: the loop, the run's folder, and checkpoints."""

from cellseg.training.checkpoint import load_model, read_checkpoint
from cellseg.training.distributed import join_ranks
from cellseg.training.fit import fit
from cellseg.training.folds import plan_folds, read_folds, train_folds
from cellseg.training.interruption import TrainingInterrupted
from cellseg.training.launch import launch
from cellseg.training.precision import pick_device
from cellseg.training.results import image_groups, read_held, read_truth, write_evaluation
from cellseg.training.run import EpochSummary, Run, open_run, read_history, read_prediction
from cellseg.training.validation import to_device, validate

__all__ = [
    "EpochSummary",
    "Run",
    "TrainingInterrupted",
    "fit",
    "image_groups",
    "join_ranks",
    "launch",
    "load_model",
    "open_run",
    "pick_device",
    "plan_folds",
    "read_checkpoint",
    "read_folds",
    "read_held",
    "read_history",
    "read_prediction",
    "read_truth",
    "to_device",
    "train_folds",
    "validate",
    "write_evaluation",
]

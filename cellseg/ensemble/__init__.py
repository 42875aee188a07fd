"""Result files, also of other tools, merged into one; tuned where records out of fold allow."""

from cellseg.ensemble.folds import tune_files
from cellseg.ensemble.manifest import merged_names, write_manifest
from cellseg.ensemble.members import LeftOut, Member
from cellseg.ensemble.merge import EnsembleResult, ensemble_files
from cellseg.ensemble.rules import RULES
from cellseg.ensemble.tuning import Tuning, tune_ensemble

__all__ = [
    "RULES",
    "EnsembleResult",
    "LeftOut",
    "Member",
    "Tuning",
    "ensemble_files",
    "merged_names",
    "tune_ensemble",
    "tune_files",
    "write_manifest",
]

"""What is handed in: written, looked at before the upload, and scored where the truth is known."""

from cellseg.submission.checks import Finding, SubmissionCheck, check_submission
from cellseg.submission.compliance import compliance
from cellseg.submission.files import (
    ARCHIVE_NAME,
    RESULTS_NAME,
    score_submission,
    write_submission,
)

__all__ = [
    "ARCHIVE_NAME",
    "RESULTS_NAME",
    "Finding",
    "SubmissionCheck",
    "check_submission",
    "compliance",
    "score_submission",
    "write_submission",
]

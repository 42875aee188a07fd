"""The release: found, downloaded, extracted, its layout and its test index."""

from dataclasses import dataclass
from pathlib import Path

TRAIN_NAME = "train"
TEST_NAME = "test_release"
INDEX_NAME = "test_image_name_to_ids.json"
DEFAULT_RELEASE_ID = "1B0qWNzQZQmfQP7x7o4FDdgb9GvPDoFzI"


@dataclass(frozen=True)
class Release:
    """Where an extracted release lies.

    Attributes:
        root: the folder that holds the rest.
        train_dir: one folder a training sample.
        test_dir: images without truth, or None where only `train/` was given.
        index_path: JSON list of file name, id, height and width, or None.
    """

    root: Path
    train_dir: Path
    test_dir: Path | None
    index_path: Path | None

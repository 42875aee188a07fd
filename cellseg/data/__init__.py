"""From a release on disk to batches of `(image, target)`: find, read, check, split, augment."""

from cellseg.data.audit import Audit, ImageRow, Oddity, audit
from cellseg.data.cache import SampleCache
from cellseg.data.channels import ChannelOrder, detect_channel_order
from cellseg.data.dataset import CellDataset, SampleImages, TestDataset
from cellseg.data.loaders import EpochSampler, log_balanced_weights, make_loaders
from cellseg.data.reading import (
    CLASS_NAMES,
    find_sample_files,
    read_image,
    read_sample,
)
from cellseg.data.release import (
    DEFAULT_RELEASE_ID,
    Release,
    TestImage,
    download_release,
    extract_archive,
    find_class_names,
    find_release,
    read_test_index,
)
from cellseg.data.sample import make_sample_release
from cellseg.data.similarity import (
    Nearest,
    group_by_similarity,
    leaks_table,
    nearest_training_images,
)
from cellseg.data.splits import make_folds, split_ids
from cellseg.data.tissue import make_tissue
from cellseg.data.transforms import TrainTransform, cut_sample, update_target

__all__ = [
    "CLASS_NAMES",
    "DEFAULT_RELEASE_ID",
    "Audit",
    "CellDataset",
    "ChannelOrder",
    "EpochSampler",
    "ImageRow",
    "Nearest",
    "Oddity",
    "Release",
    "SampleCache",
    "SampleImages",
    "TestDataset",
    "TestImage",
    "TrainTransform",
    "audit",
    "cut_sample",
    "detect_channel_order",
    "download_release",
    "extract_archive",
    "find_class_names",
    "find_release",
    "find_sample_files",
    "group_by_similarity",
    "leaks_table",
    "log_balanced_weights",
    "make_folds",
    "make_loaders",
    "make_sample_release",
    "make_tissue",
    "nearest_training_images",
    "read_image",
    "read_sample",
    "read_test_index",
    "split_ids",
    "update_target",
]

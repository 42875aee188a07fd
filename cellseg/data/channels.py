"""Whether a folder of images has red and blue in their true places, told from its nuclei."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cellseg.data.reading import (
    CLASS_NAMES,
    SampleFiles,
    find_sample_files,
    read_image,
    read_instances,
)

Outcome = Literal["true", "swapped", "undecided"]
OUTCOMES: tuple[Outcome, ...] = ("true", "swapped", "undecided")

MAX_IMAGES = 8
"""No more images of a folder than this are looked at."""
MIN_DIFFERENCE = 6.0
"""A folder is decided only if the median difference is at least this, in grey levels of 255."""
MIN_AGREEMENT = 0.75
"""... and if at least this share of its images has the sign of the median."""
MIN_BACKGROUND = 80.0
"""An image takes part only if its mean outside nuclei is at least this, and above that inside."""


@dataclass(frozen=True)
class ChannelOrder:
    """What the images of a folder say about the order of their channels.

    Attributes:
        outcome: "true" (stored as RGB), "swapped" (stored as BGR) or "undecided".
        differences: for each image that could be judged, the mean of (B - R) inside its nuclei
            minus the mean outside, in grey levels of 255, as stored.
    """

    outcome: Outcome
    differences: tuple[float, ...] = ()


def detect_channel_order(
    sample_folders: Sequence[str | Path | SampleFiles],
    class_names: Sequence[str] = CLASS_NAMES,
) -> ChannelOrder:
    """Decide from several annotated images whether red and blue are swapped.

    Haematoxylin makes nuclei bluer than what surrounds them, so that the mean of (B - R) inside
    nuclei minus the mean outside is positive in true RGB (about +24) and negative in swapped
    images (about -46). Images that are grey, have a dark background or nuclei brighter than it,
    or hold no cells or nothing but cells, say nothing.

    Args:
        sample_folders: folders (or their files) in a fixed order; the `MAX_IMAGES` looked at are
            spread evenly over those that have a class file.
        class_names: names of the classes 1..C.

    Returns:
        "true" or "swapped" if the median difference is at least `MIN_DIFFERENCE` from 0 and
        `MIN_AGREEMENT` of the images agree with its sign; else "undecided".

    Raises:
        DataError: if one of the images looked at cannot be read.
    """
    listings = [
        folder if isinstance(folder, SampleFiles) else find_sample_files(folder, class_names)
        for folder in sample_folders
    ]
    annotated = [files for files in listings if files.maps]
    count = min(MAX_IMAGES, len(annotated))
    chosen = [annotated[i * len(annotated) // count] for i in range(count)]
    measured = [_difference(files) for files in chosen]
    differences = tuple(value for value in measured if value is not None)
    return ChannelOrder(_decide(differences), differences)


def _difference(files: SampleFiles) -> float | None:
    """Return mean(B - R) inside the nuclei minus outside, None if the image cannot tell."""
    image = read_image(files.image)
    inside = (read_instances(files, image.shape[:2]).instance_map != 0).any(axis=0)
    if inside.all() or not inside.any():
        return None
    foreground = image[inside].mean(axis=0, dtype=np.float64)
    background = image[~inside].mean(axis=0, dtype=np.float64)
    if background.mean() < MIN_BACKGROUND or foreground.mean() >= background.mean():
        return None
    if np.array_equal(image[..., 0], image[..., 2]):
        return None
    return float((foreground[2] - foreground[0]) - (background[2] - background[0]))


def _decide(differences: Sequence[float]) -> Outcome:
    """Return the outcome for the differences of the images that could be judged."""
    if not differences:
        return "undecided"
    median = float(np.median(differences))
    agreement = np.mean(np.sign(differences) == np.sign(median))
    if abs(median) < MIN_DIFFERENCE or agreement < MIN_AGREEMENT:
        return "undecided"
    return "true" if median > 0 else "swapped"

"""Which images an export is about, and the cells in them: records or the truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cellseg.coco import MAX_PIXELS, group_by_image, rle_area
from cellseg.data.dataset import CellDataset
from cellseg.data.decoding import read_size
from cellseg.data.reading import CLASS_NAMES
from cellseg.data.release import INDEX_NAME, TEST_NAME, find_release, read_test_index
from cellseg.errors import DataError
from cellseg.interchange.storing import sample_names

Cell = dict[str, Any]
"""A record, or an annotation of the truth: the same keys, but no score."""


@dataclass(frozen=True)
class Picture:
    """One image of an export.

    Attributes:
        image_id: its number in the records.
        name: what its files are called; no suffix.
        path: the image file.
        file_name: its path in the folder of images, parted by /.
        size: (height, width) in pixels.
        swapped: whether the file has red and blue exchanged.
    """

    image_id: int
    name: str
    path: Path
    file_name: str
    size: tuple[int, int]
    swapped: bool = False


def list_pictures(
    images: str | Path,
    class_names: Sequence[str] = CLASS_NAMES,
    *,
    sample_ids: Sequence[str] | None = None,
) -> list[Picture]:
    """Return the images that records belong to.

    Args:
        images: a release (or its folder of test images): the test images, by the index; a folder
            of samples: these, by their place among the folders, as `CellDataset` numbers them; or
            one image file, whose image_id is 1.
        class_names: names of the classes of the samples.
        sample_ids: only these of the samples; None for all.

    Raises:
        DataError: if it is none of these, or a sample has no image. Test images need not be there.
        SettingsError: if a sample_id is unknown.
    """
    images = Path(images)
    if images.is_file():
        size = read_size(images, max_pixels=MAX_PIXELS)  # as large as one that is segmented
        return [Picture(1, images.stem, images, images.name, size)]
    for root in (images, images.parent) if images.name == TEST_NAME else (images,):
        if (root / INDEX_NAME).is_file():
            return _test_pictures(root, class_names)
    return pictures_of_samples(CellDataset(images, class_names=class_names, sample_ids=sample_ids))


def pictures_of_samples(dataset: CellDataset) -> list[Picture]:
    """Return the images of a dataset, in its order; of each only the head is read."""
    swapped = dataset.channel_order == "swapped"
    pictures = []
    for index, (sample_id, image_id) in enumerate(
        zip(dataset.sample_ids, dataset.image_ids, strict=True)
    ):
        path = dataset.files(index).image
        name = f"{sample_id}/{path.name}"
        pictures.append(Picture(image_id, sample_id, path, name, read_size(path), swapped))
    return pictures


def _test_pictures(root: Path, class_names: Sequence[str]) -> list[Picture]:
    """Return the test images of a release; its samples tell the order of the channels."""
    release = find_release(release_dir=root)
    if release is None or release.test_dir is None or release.index_path is None:
        raise DataError(f"{root} has no test images; extract the whole archive")
    samples = CellDataset(release.train_dir, class_names=release.class_names or class_names)
    swapped = samples.channel_order == "swapped"
    index = read_test_index(release.index_path)
    names = sample_names([PurePosixPath(entry.file_name) for entry in index])
    return [
        Picture(
            entry.image_id,
            name,
            release.test_dir / entry.file_name,
            entry.file_name,
            (entry.height, entry.width),
            swapped,
        )
        for entry, name in zip(index, names, strict=True)
    ]


def cells_by_picture(
    pictures: Sequence[Picture], cells: Sequence[Cell], *, score_threshold: float = 0.0
) -> list[list[Cell]]:
    """Return the cells of each picture, those without a pixel left out, best score first.

    Args:
        pictures: P images.
        cells: records or annotations, of these images or others; not changed.
        score_threshold: drop records with score < this, in 0-1; annotations stay.

    Returns:
        P lists; annotations keep their order.
    """
    areas = rle_area([cell["segmentation"] for cell in cells])
    kept = [
        cell
        for cell, area in zip(cells, areas, strict=True)
        if area and cell.get("score", 1.0) >= score_threshold
    ]
    groups = group_by_image(sorted(kept, key=lambda cell: -cell.get("score", 1.0)))
    return [groups.get(picture.image_id, []) for picture in pictures]

"""Folders of images and label maps as a release, `train/<sample>/image.*` and `classN.*`."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from scipy import ndimage
from tqdm.auto import tqdm

from cellseg.data.decoding import SUFFIXES
from cellseg.data.reading import Instances, SampleFiles, read_instances
from cellseg.errors import DataError, SettingsError
from cellseg.interchange.storing import (
    IMAGE_SUFFIXES,
    Imported,
    release_folder,
    sample_names,
    store_image,
)
from cellseg.markdown import first_few

ONE_CLASS = "cell"
"""Name of the class where a folder of label maps tells none."""
MANY_PIECES = 3
"""Maps of one value each, in so many pieces in the mean, show where cells are but not which."""


def import_labels(
    labels_dir: str | Path,
    images_dir: str | Path,
    out_dir: str | Path,
    *,
    progress: bool = False,
) -> Imported:
    """Write images and their label maps as a release.

    A label map is a TIFF or PNG of the image's name, in which 0 is background and every other
    value one cell. Images without any map and maps without an image are left out, and counted.

    Args:
        labels_dir: maps of one class; or one folder of maps a class, whose names become the
            classes' names, in their order ("class2" before "class10").
        images_dir: the images; may lie in `labels_dir` beside the classes' folders.
        out_dir: the release to write; must not exist, or be empty.
        progress: show a bar.

    Raises:
        DataError: if a file cannot be used, no map has the name of an image, or the maps do not
            tell cells apart; nothing is written then.
        SettingsError: if `out_dir` holds something, or both folders are one.
    """
    labels_dir, images_dir = Path(labels_dir), Path(images_dir)
    folders = class_folders(labels_dir, images_dir)
    maps = [_by_stem(folder, SUFFIXES) for folder in folders.values()]
    images = _by_stem(images_dir, IMAGE_SUFFIXES)
    labelled = [stem for stem in images if any(stem in found for found in maps)]
    if not labelled:
        raise DataError(
            f"none of the {len(images)} images in {images_dir} ({first_few(list(images), 5)}) has "
            f"a label map of its name in {labels_dir}; name image and map alike, as x.png and x.tif"
        )
    imported = Imported(Path(out_dir), tuple(folders))
    imported.leave_out("images without a label map", len(images) - len(labelled))
    imported.leave_out("label maps without an image", sum(len(set(m) - set(images)) for m in maps))
    names = sample_names([PurePosixPath(images[stem].name) for stem in labelled])
    pieces = []
    with release_folder(Path(out_dir), imported.class_names) as train_dir:
        for stem, name in zip(tqdm(labelled, "Import", disable=not progress), names, strict=True):
            chosen = {label: found[stem] for label, found in enumerate(maps, 1) if stem in found}
            cells = _store_sample(images[stem], chosen, train_dir / name)
            imported.count(np.bincount(cells.labels, minlength=len(maps) + 1)[1:].tolist())
            pieces.append(_pieces_of_only_cell(cells))
        if min(pieces) and sum(pieces) >= MANY_PIECES * len(pieces):
            raise DataError(
                f"the label maps in {labels_dir} hold one value each, in several pieces: they show "
                "where cells are, not which; number the pieces (scikit-image: measure.label) first"
            )
    return imported


def _store_sample(image: Path, maps: dict[int, Path], folder: Path) -> Instances:
    """Put an image and its maps by label into a new sample folder; return the cells."""
    size = store_image(image, folder).shape[:2]
    cells = read_instances(SampleFiles(image.parent, image, maps), size)
    for label, path in maps.items():
        shutil.copyfile(path, folder / f"class{label}{path.suffix.lower()}")
    return cells


def class_folders(labels_dir: Path, images_dir: Path) -> dict[str, Path]:
    """Return the names of the classes and the folders of their maps, class1 first.

    Raises:
        DataError: if the folder is missing.
        SettingsError: if the folder of images holds the labels as well.
    """
    if not labels_dir.is_dir():
        raise DataError(f"{labels_dir} is not a folder; check the path of the labels")
    own = images_dir.resolve()
    below = {
        path.name: path
        for path in labels_dir.iterdir()
        if path.is_dir() and path.name[0] not in "._" and path.resolve() != own
    }
    classes = {name: path for name, path in below.items() if _by_stem(path, SUFFIXES)}
    if classes:
        return {name: classes[name] for name in sorted(classes, key=_natural_order)}
    if labels_dir.resolve() == own:
        raise SettingsError(
            f"{labels_dir} is named for the images and for the labels; part them, as images/x.png "
            "and labels/x.tif"
        )
    return {ONE_CLASS: labels_dir}


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the files of a folder by their names without suffix, sorted.

    Raises:
        DataError: if the folder is missing, or two files differ in their suffix only.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; check the path")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            raise DataError(
                f"{folder} holds both {found[path.stem].name} and {path.name}; remove the one that "
                "is not meant"
            )
        found[path.stem] = path
    return found


def _pieces_of_only_cell(cells: Instances) -> int:
    """Return into how many pieces the only cell of an image falls, 0 if there are several cells."""
    if len(cells.labels) != 1:
        return 0
    return ndimage.label(cells.instance_map[0], np.ones((3, 3)))[1]

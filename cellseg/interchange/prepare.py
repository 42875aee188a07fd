"""The door for data of any layout: what a setting names becomes a release."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cellseg.data.release import TRAIN_NAME, Release, find_release
from cellseg.errors import DataError
from cellseg.interchange.coco_file import read_coco
from cellseg.interchange.from_coco import import_coco, locate_images
from cellseg.interchange.from_labels import class_folders, import_labels
from cellseg.interchange.storing import IMAGE_SUFFIXES, Imported

LABELS_NAMES = ("labels", "masks")
_VERSION = 1  # of what an import writes: count it up when that changes


class _Annotations(NamedTuple):
    """A COCO file or a folder of labels, its folder of images, and all files of both."""

    source: Path
    images_dir: Path
    files: list[Path]


def prepare_release(
    release_dir: str | Path | None,
    cache_dir: str | Path,
    *,
    project_dir: str | Path = ".",
    progress: bool = False,
) -> Release | None:
    """Return the release that a setting names, importing other data first.

    Besides a release and its archive (see `find_release`) these are taken:

    - a COCO file (.json); its images lie beside it, in `images/`, or in a folder of its name;
    - a folder that holds one COCO file, or has it in its `train/`;
    - a folder with `images/` and `labels/` (or `masks/`): one label map an image, or one folder
      of maps a class in there;
    - a folder with `images/` and one folder of label maps a class beside it.

    They are imported once into a folder of the cache that is named by their content: what did not
    change is not imported again, what changed is.

    Args:
        release_dir: what the setting names; None searches as `find_release` does.
        cache_dir: folder for imports.
        project_dir: as in `find_release`.
        progress: show a bar while importing.

    Returns:
        the release, its `class_names` set where they are known; None if nothing was found.

    Raises:
        DataError: if what is named cannot be used; names the file, the value and the remedy.
    """
    if release_dir is None:
        return find_release(project_dir)
    path = Path(release_dir).expanduser()
    found = _find_annotations(path)
    if found is None:
        return find_release(project_dir, release_dir=path)
    target = Path(cache_dir) / f"{path.resolve().stem[:40]}-{_fingerprint(found.files)[:12]}"
    if not (target / TRAIN_NAME).is_dir():
        import_annotations(found.source, found.images_dir, target, progress=progress)
    return find_release(project_dir, release_dir=target)


def import_annotations(
    source: str | Path, images_dir: str | Path, out_dir: str | Path, *, progress: bool = False
) -> Imported:
    """Write a COCO file or a folder of label maps as a release.

    For what is taken and what is raised see `import_coco` and `import_labels`.
    """
    take = import_labels if Path(source).is_dir() else import_coco
    return take(source, images_dir, out_dir, progress=progress)


def _find_annotations(path: Path) -> _Annotations | None:
    """Return the annotations that lie in one of the layouts, None if none do."""
    if path.is_file():
        return _coco_annotations(path) if path.suffix.lower() == ".json" else None
    if not path.is_dir() or any(map(_has_samples, (path, *path.iterdir()))):
        return None
    for folder in (path, path / TRAIN_NAME):
        files = sorted(file for file in folder.glob("*.json") if _holds_object(file))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{folder} holds {names}; set release_dir to the one to train on")
        if files:
            return _coco_annotations(files[0])
    images = path / "images"
    if not images.is_dir():
        return None
    labels = next((path / name for name in LABELS_NAMES if (path / name).is_dir()), path)
    folders = [images, *class_folders(labels, images).values()]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    return _Annotations(labels, images, [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES])


def _has_samples(path: Path) -> bool:
    """Tell whether a path is a release: a folder with folders in its `train/`."""
    train = path / TRAIN_NAME
    return train.is_dir() and any(child.is_dir() for child in train.iterdir())


def _holds_object(path: Path) -> bool:
    """Tell whether a JSON file holds an object, as COCO files do; result files hold a list."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"


def _coco_annotations(path: Path) -> _Annotations:
    """Return a COCO file with the images that belong to it, looked for near it."""
    coco = read_coco(path)
    folder, subset = path.absolute().parent, re.sub(r"^(instances|annotations)_", "", path.stem)
    tops = (folder, folder.parent)
    places = [top / name for top in tops for name in ("images", subset, f"images/{subset}", ".")]
    for place in places:
        try:
            return _Annotations(path, place, [path, *locate_images(coco, place)])
        except DataError as error:
            reason = error
    raise DataError(
        f"the images of {path} are not near it; put them into {folder / 'images'}, or use "
        f"`python -m cellseg import` ({reason})"
    )


def _fingerprint(files: Iterable[Path]) -> str:
    """Return the SHA-256 over names and bytes of files, and over how they are imported."""
    digest = hashlib.sha256(f"import {_VERSION}\n".encode())
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(os.fsencode(f"{path.parent.name}/{path.name} {content}\n"))
    return digest.hexdigest()

"""The release: found, extracted or downloaded; its layout and its test index.

A release is a folder with `train/` (one folder a sample), `test_release/` (images without truth)
and `test_image_name_to_ids.json`. It counts as extracted with the marker that is written last, or
when all three are there.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from cellseg.data.archive import MAX_BYTES, MAX_FILES, is_archive, unpack
from cellseg.errors import DataError
from cellseg.files import read_json, read_text, write_atomically
from cellseg.markdown import first_few

RELEASE_NAME = "hw3-data-release"
TRAIN_NAME = "train"
TEST_NAME = "test_release"
INDEX_NAME = "test_image_name_to_ids.json"
CLASSES_NAME = "class_names.json"
MARKER_NAME = ".extracted"
MARKER_TEXT = "extracted whole from an archive of {} bytes; remove this folder to extract again\n"
DEFAULT_RELEASE_ID = "1B0qWNzQZQmfQP7x7o4FDdgb9GvPDoFzI"
"""The archive of 2025 on Google Drive."""
SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
PLACES = (("/kaggle/input", 4), ("/content/drive/MyDrive", 2))
"""Folders outside the project to search, with how many levels below them."""


@dataclass(frozen=True)
class Release:
    """Where an extracted release lies.

    Attributes:
        root: the folder that holds the rest.
        train_dir: one folder a training sample.
        test_dir: images without truth, or None where only `train/` was given.
        index_path: JSON list of file name, id, height and width, or None.
        class_names: of class1, class2, ..., where the folder tells them in `class_names.json`.
    """

    root: Path
    train_dir: Path
    test_dir: Path | None
    index_path: Path | None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TestImage:
    """One line of the test index; height and width in px."""

    __test__ = False  # not a test, whatever pytest thinks of the name
    file_name: str
    image_id: int
    height: int
    width: int


class _NoRelease(DataError):
    """An archive that is sound but holds something else."""


def find_release(
    project_dir: str | Path = ".",
    *,
    release_dir: str | Path | None = None,
    extra_places: Sequence[str | Path] | None = None,
    extract: bool = True,
) -> Release | None:
    """Return the release that is at hand, extracting its archive if need be.

    Args:
        project_dir: where `hw3-data-release/` or its archive is looked for first, and where an
            archive is extracted to, wherever it was found.
        release_dir: a folder or an archive named in the settings; nothing else is searched then,
            and `train/` alone is enough.
        extra_places: folders to search besides, four levels deep; by default Kaggle's inputs and
            Colab's Drive.
        extract: False passes archives over, those in `release_dir` apart.

    Returns:
        the release, or None if there is none.

    Raises:
        DataError: if `release_dir` holds no release or is another archive than the one that the
            project's folder came from, if that folder holds a part of a release only, or if the
            archive is damaged.
    """
    project = Path(project_dir)
    target = project / RELEASE_NAME
    if release_dir is not None:
        return _explicit_release(Path(release_dir).expanduser(), target)
    places = PLACES if extra_places is None else [(place, 4) for place in extra_places]
    elsewhere = [folder for place, depth in places for folder in _folders(Path(place), depth)]
    for folder in (*_folders(target, 1), project, *elsewhere):
        if _is_extracted(folder):
            return _release_at(folder)
    for archive in _archives([project, target, *elsewhere] if extract else []):
        try:
            return extract_archive(archive, target)
        except _NoRelease:
            if RELEASE_NAME in archive.name:
                raise
    if (target / TRAIN_NAME).is_dir():
        raise DataError(
            f"{target} holds {TRAIN_NAME}/ but not {_missing_parts(target)}: extract the archive "
            f"again, or set release_dir to {target} to work without test images"
        )
    return None


def _explicit_release(path: Path, target: Path) -> Release:
    """Return the release at a path from the settings."""
    if path.is_file():
        return _extract_named(path, target)
    if not path.is_dir():
        raise DataError(f"release_dir {path} does not exist; correct the setting")
    for folder in _folders(path, 1):
        if (folder / TRAIN_NAME).is_dir():
            return _release_at(folder)
    for archive in _archives([path]):
        return _extract_named(archive, target)
    raise DataError(
        f"release_dir {path} holds no {TRAIN_NAME}/ folder and no archive of one; set it to the "
        "folder that does"
    )


def _extract_named(archive: Path, target: Path) -> Release:
    """Extract the archive that the settings name, unless the target came from another one."""
    marker = target / MARKER_NAME
    told = read_text(marker) if marker.is_file() else ""
    known = told.startswith(MARKER_TEXT.split("{}")[0])  # not in folders of earlier versions
    if known and told != MARKER_TEXT.format(archive.stat().st_size):
        raise DataError(
            f"{target} was extracted from another archive than {archive}; rename that folder, or "
            "set release_dir to it"
        )
    return extract_archive(archive, target)


def _is_extracted(folder: Path) -> bool:
    has_train = (folder / TRAIN_NAME).is_dir()
    return has_train and ((folder / MARKER_NAME).is_file() or not _missing_parts(folder))


def _missing_parts(folder: Path) -> str:
    """Return the parts that a folder lacks, as a phrase; empty if it is whole."""
    parts = [name for name in (TRAIN_NAME, TEST_NAME) if not (folder / name).is_dir()]
    if not (folder / INDEX_NAME).is_file():
        parts.append(INDEX_NAME)
    return ", ".join(parts)


def _release_at(folder: Path) -> Release:
    test, index, classes = (folder / name for name in (TEST_NAME, INDEX_NAME, CLASSES_NAME))
    return Release(
        root=folder,
        train_dir=folder / TRAIN_NAME,
        test_dir=test if test.is_dir() else None,
        index_path=index if index.is_file() else None,
        class_names=_read_class_names(classes) if classes.is_file() else None,
    )


def find_class_names(path: str | Path) -> tuple[str, ...] | None:
    """Return the names of the classes that a release tells, looked for in a folder and above it.

    Args:
        path: the release, or a folder or file directly in it.

    Returns:
        names of class1, class2, ..., or None where no `class_names.json` tells them.

    Raises:
        DataError: if that file is no list of names.
    """
    path = Path(path).resolve()
    files = (folder / CLASSES_NAME for folder in (path, path.parent))
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else _read_class_names(found)


def _read_class_names(path: Path) -> tuple[str, ...]:
    """Return the names that a release tells of its classes."""
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path} is no list of class names; correct it, or remove it")
    return tuple(names)


def _folders(top: Path, depth: int) -> Iterator[Path]:
    """Yield a folder and those below it, nearest first; not what lies inside a release."""
    level = [top] if top.is_dir() else []
    for left in range(depth, -1, -1):
        yield from level
        if left:
            level = [child for folder in level for child in _subfolders(folder)]


def _subfolders(folder: Path) -> list[Path]:
    if (folder / TRAIN_NAME).is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__"))]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def _archives(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield archives named like a release, folder by folder, the surest name first."""
    for folder in folders:
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        named = [n for n in names if n.lower().endswith(SUFFIXES) and "hw3" in n.lower()]
        for name in sorted(named, key=lambda name: (RELEASE_NAME not in name, name)):
            if (folder / name).is_file() and not name.startswith("."):
                yield folder / name


def extract_archive(
    archive: str | Path,
    target_dir: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
) -> Release:
    """Extract a release into a folder, whole or not at all; a second call does nothing.

    It is unpacked into a temporary folder beside, checked, and moved in; the marker comes last.
    A part that lies there without the marker, as a broken extraction leaves it, is kept under
    the name `<part>.old`.

    Args:
        archive: .tar.gz, .tgz, .tar or .zip with or without a top folder.
        target_dir: the release's folder, for example `hw3-data-release`.
        max_bytes: refuse more than this, unpacked.
        max_files: refuse more members than this.

    Raises:
        DataError: if the archive is damaged, unsafe, too large, or holds no release.
    """
    archive, target = Path(archive), Path(target_dir)
    if _is_extracted(target):
        return _release_at(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        unpack(archive, staging, max_bytes=max_bytes, max_files=max_files)
        found = [folder for folder in _folders(staging, 2) if not _missing_parts(folder)]
        if not found:
            parts = f"{TRAIN_NAME}/, {TEST_NAME}/ and {INDEX_NAME}"
            raise _NoRelease(f"{archive} does not hold {parts} side by side; is it the release?")
        _move_in(found[0], target, archive.stat().st_size)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return _release_at(target)


def _move_in(source: Path, target: Path, archive_bytes: int) -> None:
    """Move the three parts into the target and write the marker."""
    target.mkdir(exist_ok=True)
    for name in (TRAIN_NAME, TEST_NAME, INDEX_NAME):
        if (target / name).exists():
            olds = (target / f"{name}.old{number or ''}" for number in count())
            (target / name).rename(next(old for old in olds if not old.exists()))
        (source / name).rename(target / name)
    write_atomically(target / MARKER_NAME, MARKER_TEXT.format(archive_bytes))


def download_release(project_dir: str | Path, *, file_id: str = DEFAULT_RELEASE_ID) -> Release:
    """Download the release from Google Drive into `project_dir/hw3-data-release/`.

    Args:
        project_dir: the project's folder.
        file_id: the archive's id on Google Drive.

    Raises:
        DataError: if it cannot be downloaded or is no release; says which file to fetch by hand
            and where to put it. Nothing is left behind then.
    """
    project = Path(project_dir).resolve()
    target = project / RELEASE_NAME
    if _is_extracted(target):
        return _release_at(target)
    project.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=project, prefix=f".{RELEASE_NAME}-") as folder:
        archive = Path(folder) / "archive"
        reason = _download(file_id, archive)
        if reason is None:
            try:
                return extract_archive(archive, target)
            except DataError as error:
                reason = str(error).replace(str(archive), "the file that came")
    raise DataError(
        f"the release could not be downloaded ({reason}); open {drive_url(file_id)} in a browser "
        f"and put the archive into {project} as {RELEASE_NAME}.tar.gz (or .zip, as it is)"
    )


def drive_url(file_id: str) -> str:
    """Return the address of a file on Google Drive."""
    return f"https://drive.google.com/uc?id={file_id}"


def _download(file_id: str, path: Path) -> str | None:
    """Download a file; return why it failed, None if an archive came."""
    import gdown  # slow to import, and needed only here

    try:
        gdown.download(url=drive_url(file_id), output=str(path))
    except (gdown.exceptions.DownloadError, OSError) as error:  # requests raises OSErrors
        return " ".join(str(error).split())[:300] or type(error).__name__
    if is_archive(path):
        return None
    if not path.is_file():
        return "no file came"
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page came instead of an archive, as when too many people fetched it today"
    return "what came is not an archive"


def read_test_index(path: str | Path) -> list[TestImage]:
    """Return the test images in the index's order.

    Raises:
        DataError: if the index is not a list of `{file_name, id, height, width}` with whole
            positive numbers and plain file names, or if a name or an id comes twice; names the
            first ten faults.
    """
    path, images, faults = Path(path), [], []
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds a {type(rows).__name__}, not a list of images; extract it again or "
            "correct it"
        )
    names, ids = set(), set()
    for number, row in enumerate(rows):
        fault = _row_fault(row)
        if fault is None and (row["file_name"] in names or row["id"] in ids):
            fault = f"repeats the name {row['file_name']!r} or the id {row['id']}"
        if fault is not None:
            faults.append(f"row {number} {fault}")
            continue
        names.add(row["file_name"])
        ids.add(row["id"])
        images.append(TestImage(row["file_name"], row["id"], row["height"], row["width"]))
    if faults:
        raise DataError(f"{path}: {first_few(faults, 10, '; ')}; extract it again or correct it")
    return images


def _row_fault(row: object) -> str | None:
    """Return what is wrong with one row of the test index."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, not an object"
    name = row.get("file_name")
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        return f"has the file_name {name!r}, which is no plain file name"
    for key, least in (("id", 0), ("height", 1), ("width", 1)):
        value = row.get(key)
        if type(value) is not int or value < least:
            return f"has {key} {value!r}, which is no whole number from {least}"
    return None

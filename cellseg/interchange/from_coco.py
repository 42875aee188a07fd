"""COCO files as a release, `train/<sample>/image.*` and `classN.tif`."""

import os
import re
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm.auto import tqdm

from cellseg.coco import Rle, rle_area
from cellseg.errors import DataError
from cellseg.interchange.coco_file import CocoFile, CocoImage, annotation_to_rle, read_coco
from cellseg.interchange.masks import draw_pages, write_map
from cellseg.interchange.storing import Imported, release_folder, sample_names, store_image
from cellseg.markdown import first_few


def import_coco(
    coco_path: str | Path, images_dir: str | Path, out_dir: str | Path, *, progress: bool = False
) -> Imported:
    """Write the images and masks of a COCO file as a release.

    Categories become class1, class2, ... in the order of their ids. Left out, and counted, are
    crowds (there is no region to ignore in a sample), masks without a pixel, and masks that
    repeat another of their class. Cells of one class that overlap go to different pages of their
    map. Folders in a file's name become part of the sample's id.

    Args:
        coco_path: the .json file.
        images_dir: where its images lie, under their file names; without the folders in these
            names, too.
        out_dir: the release to write; must not exist, or be empty.
        progress: show a bar.

    Raises:
        DataError: if the file or an image cannot be used; nothing is written then.
        SettingsError: if `out_dir` holds something.
    """
    coco, images_dir = read_coco(coco_path), Path(images_dir)
    sources = locate_images(coco, images_dir)
    names = sample_names([PurePosixPath(_as_posix(image.file_name)) for image in coco.images])
    imported = Imported(Path(out_dir), coco.class_names)
    with release_folder(Path(out_dir), coco.class_names) as train_dir:
        images = tqdm(coco.images, "Import", disable=not progress)
        for image, source, name in zip(images, sources, names, strict=True):
            pixels = store_image(source, train_dir / name)
            size = pixels.shape[:2]
            if image.size not in (None, size):
                raise DataError(
                    f"{source} has {size[0]} x {size[1]} pixels, but {coco.path} says "
                    f"{image.size[0]} x {image.size[1]} (height x width) of image "
                    f"{image.image_id}; give the images that were annotated"
                )
            imported.count(_store_cells(coco, image, size, train_dir / name, imported))
    return imported


def locate_images(coco: CocoFile, images_dir: Path) -> list[Path]:
    """Return where the images of a COCO file lie, in its order.

    Raises:
        DataError: if a file is not in the folder or below it, or belongs to two images.
    """
    paths: dict[Path, CocoImage] = {}
    missing = []
    for image in coco.images:
        path = _locate(images_dir, image.file_name)
        if path is None:
            missing.append(image.file_name)
        elif path in paths:
            raise DataError(
                f"{coco.path}: images {paths[path].image_id} and {image.image_id} are one file, "
                f"{path}; merge their annotations under one id"
            )
        else:
            paths[path] = image
    if missing:
        raise DataError(
            f"{images_dir} lacks {len(missing)} of {len(coco.images)} images of {coco.path}: "
            f"{first_few(missing, 5)}; name the folder that holds them"
        )
    return list(paths)


def _locate(images_dir: Path, file_name: str) -> Path | None:
    """Return the file of an image, None if it is not there; its folders may be missing."""
    name = PurePosixPath(_as_posix(file_name))
    inside = not name.is_absolute() and ".." not in name.parts
    for candidate in ([name] if inside else []) + [PurePosixPath(name.name)]:
        path = images_dir / candidate
        if candidate.name and os.path.isfile(path):  # a name too long is no file either
            return path
    return None


def _as_posix(file_name: str) -> str:
    """Return a file's name with the folders parted by /, wherever it was written."""
    return re.sub(r"^[A-Za-z]:", "", file_name.replace("\\", "/"))


def _store_cells(
    coco: CocoFile, image: CocoImage, size: tuple[int, int], folder: Path, imported: Imported
) -> list[int]:
    """Write the maps of one image; return the number of cells of each class."""
    rles: dict[int, list[Rle]] = {}
    for annotation in image.annotations:
        if annotation.get("iscrowd"):
            imported.leave_out("crowd regions")
            continue
        label = coco.labels[annotation["category_id"]]
        rles.setdefault(label, []).append(annotation_to_rle(coco.path, annotation, size))
    counts = [0] * len(coco.class_names)
    for label, masks in sorted(rles.items()):
        solid = [rle for rle, area in zip(masks, rle_area(masks), strict=True) if area]
        kept = list({rle["counts"]: rle for rle in solid}.values())
        imported.leave_out("masks without a pixel", len(masks) - len(solid))
        imported.leave_out("masks that repeat another of their class", len(solid) - len(kept))
        if kept:
            pages = draw_pages(kept)
            imported.further_pages += sum(len(np.unique(page)) - 1 for page in pages[1:])
            write_map(folder / f"class{label}.tif", pages)
        counts[label - 1] = len(kept)
    return counts

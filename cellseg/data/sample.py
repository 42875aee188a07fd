"""A release of made tissue, in the genuine layout and with the genuine one's quirks."""

import io
import json
import shutil
import uuid
from pathlib import Path

import numpy as np
import tifffile

from cellseg.data.release import INDEX_NAME, TEST_NAME, TRAIN_NAME, Release
from cellseg.data.tissue import DENSITY, make_tissue
from cellseg.errors import DataError, check_at_least
from cellseg.files import read_json, write_atomically

_VERSION = 1  # of the drawing: count it up when the pixels change
_RECIPE_NAME = ".made_tissue.json"
_NAMESPACE = uuid.UUID("5b8ac0de-0000-4000-8000-7155e0000000")


def make_sample_release(
    root: str | Path,
    *,
    train_images: int = 40,
    test_images: int = 6,
    seed: int = 0,
    image_size: int = 256,
) -> Release:
    """Write a release of made tissue, quirks of the genuine one included.

    With four training images or more, one holds no cell at all, one lacks two class files and one
    is crowded with lymphocytes. A second call with the same arguments does nothing; with others it
    draws anew.

    Args:
        root: folder to fill with `train/`, `test_release/` and the index; made if missing.
        train_images: number of annotated images.
        test_images: number of images without truth.
        seed: the same arguments and seed give the same bytes.
        image_size: typical side, px; sides vary by 15 % and height differs from width.

    Returns:
        the release that was written.

    Raises:
        DataError: if the folder holds a release that is not made tissue.
        SettingsError: if a number is below 0, or the side below 1.
    """
    check_at_least(0, train_images=train_images, test_images=test_images, seed=seed)
    check_at_least(1, image_size=image_size)
    root, index = Path(root), []
    release = Release(root, root / TRAIN_NAME, root / TEST_NAME, root / INDEX_NAME)
    recipe = [_VERSION, train_images, test_images, seed, image_size]
    if _is_drawn(root, recipe):
        return release
    for number in range(train_images + test_images):
        rng = np.random.default_rng([seed, number])
        name = str(uuid.uuid5(_NAMESPACE, f"{seed}/{number}"))
        height = int(rng.integers(round(0.85 * image_size), round(1.15 * image_size) + 1))
        width = int(rng.integers(round(0.85 * image_size), round(1.15 * image_size) + 1))
        width += height == width
        settings = _oddity(number) if number < train_images and train_images >= 4 else {}
        image, maps = make_tissue(height, width, seed=int(rng.integers(2**63)), **settings)
        if number < train_images:
            _write_sample(root / TRAIN_NAME / name, image, maps, rng)
            continue
        _write_image(root / TEST_NAME / f"{name}.tif", image)
        number_in_test = number - train_images + 1
        index.append(
            {"file_name": f"{name}.tif", "id": number_in_test, "height": height, "width": width}
        )
    for folder in (release.train_dir, release.test_dir):
        folder.mkdir(exist_ok=True)
    write_atomically(root / INDEX_NAME, json.dumps(index, indent=1))
    write_atomically(root / _RECIPE_NAME, json.dumps(recipe))
    return release


def _is_drawn(root: Path, recipe: list) -> bool:
    """Say whether the sample is there already; clear the folder of another sample if not."""
    note, train = root / _RECIPE_NAME, root / TRAIN_NAME
    if not note.is_file() and train.is_dir() and any(train.iterdir()):
        raise DataError(f"{root} holds a release that is not made tissue; choose another folder")
    if note.is_file() and (root / INDEX_NAME).is_file() and read_json(note) == recipe:
        return True
    (root / INDEX_NAME).unlink(missing_ok=True)
    write_atomically(note, json.dumps("being drawn"))
    for name in (TRAIN_NAME, TEST_NAME):
        shutil.rmtree(root / name, ignore_errors=True)
    return False


def _oddity(number: int) -> dict:
    """Return what is special about the first images: an empty, a poor and a dense one."""
    if number == 0:
        return {"density": 0.0}
    if number == 1:
        return {"shares": (0.5, 0.5, 0.0, 0.0)}
    if number == 2:
        return {"density": 2.0 * DENSITY, "shares": (0.12, 0.8, 0.04, 0.04)}
    return {}


def _tiff(pixels: np.ndarray, **options) -> bytes:
    """Return the bytes of a TIFF file without date or description, the same every time."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


def _write_image(path: Path, image: np.ndarray) -> None:
    """Write RGBA with red and blue swapped, LZW with predictor, as the release has it."""
    alpha = np.full((*image.shape[:2], 1), 255, np.uint8)
    options = {"photometric": "rgb", "extrasamples": ["unspecified"]}
    swapped = np.concatenate([image[..., ::-1], alpha], axis=2)
    write_atomically(path, _tiff(swapped, compression="lzw", predictor=True, **options))


def _write_sample(folder: Path, image: np.ndarray, maps: dict[int, np.ndarray], rng) -> None:
    """Write one folder of the training set; ids get gaps."""
    _write_image(folder / "image.tif", image)
    count = max((int(ids.max()) for ids in maps.values()), default=0)
    number = np.concatenate([[0], np.cumsum(rng.choice([1, 2], size=count, p=[0.9, 0.1]))])
    for kind, ids in maps.items():
        write_atomically(folder / f"class{kind}.tif", _tiff(number[ids].astype(np.float64)))

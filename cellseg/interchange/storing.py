"""What an import writes: a release's folder that appears whole or not at all, and its samples."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path, PurePosixPath

import numpy as np
import tifffile
from PIL import Image

from cellseg.data.decoding import CODEC_ERRORS, MAX_PIXELS, SUFFIXES
from cellseg.data.reading import read_image
from cellseg.data.release import CLASSES_NAME, TRAIN_NAME
from cellseg.errors import DataError, SettingsError
from cellseg.files import write_atomically

CONVERTED_SUFFIXES = (".jpg", ".jpeg", ".bmp")
IMAGE_SUFFIXES = (*SUFFIXES, *CONVERTED_SUFFIXES)
MAX_NAME = 150
"""Bytes of a sample's name that are taken from its image's; most systems take 255 in all."""


@dataclass
class Imported:
    """What an import wrote.

    Attributes:
        root: the release's folder.
        class_names: names of class1, class2, ...
        images: number of samples.
        cells: number of cells of each class.
        empty_images: samples without any cell; they are negatives.
        further_pages: cells that lie on a map's second page or a later one, as they overlap others.
        left_out: what was not taken over -> how many.
    """

    root: Path
    class_names: tuple[str, ...]
    images: int = 0
    cells: list[int] = field(default_factory=list)
    empty_images: int = 0
    further_pages: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, what: str, number: int = 1) -> None:
        """Count something that is not taken over."""
        if number:
            self.left_out[what] = self.left_out.get(what, 0) + number

    def count(self, cells: Sequence[int]) -> None:
        """Count one image with so many cells of each class."""
        self.images += 1
        self.empty_images += not any(cells)
        self.cells = [a + b for a, b in zip(self.cells or [0] * len(cells), cells, strict=True)]

    def summary(self) -> str:
        """Return what was written, a line each."""
        number = self.cells or [0] * len(self.class_names)
        lines = [
            f"{self.images:,} images, {self.empty_images:,} of them without cells: {self.root}"
        ]
        for label, (name, cells) in enumerate(zip(self.class_names, number, strict=True), start=1):
            lines.append(f"class{label} {name}: {cells:,} cells")
        if self.further_pages:
            lines.append(f"{self.further_pages:,} cells lie over others, on pages of their own")
        lines += [f"left out: {number:,} {what}" for what, number in self.left_out.items()]
        return "\n".join(lines)


@contextmanager
def release_folder(out_dir: Path, class_names: Sequence[str]) -> Iterator[Path]:
    """Yield the `train/` of a release that appears as `out_dir` when all was written."""
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise SettingsError(f"{out_dir} exists already; name a new folder, or remove it first")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}-"))
    try:
        root = staging / "release"
        (root / TRAIN_NAME).mkdir(parents=True)
        yield root / TRAIN_NAME
        write_atomically(root / CLASSES_NAME, json.dumps(list(class_names)) + "\n")
        if out_dir.exists():
            out_dir.rmdir()
        root.rename(out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sample_names(files: Sequence[PurePosixPath]) -> list[str]:
    """Return a folder's name for each image, all of them different on any file system."""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        parts = [part for part in file.with_suffix("").parts if part.strip("/.")]
        name = re.sub(r'[<>:"|?*\x00-\x1f]', "_", "__".join(parts))
        name = name.encode(errors="ignore")[:MAX_NAME].decode(errors="ignore").strip(". ")
        if not name or name[0] in "._":  # folders that are passed over as hidden
            name = f"image{name}"
        tries = chain([name], (f"{name}-{number}" for number in count(2)))
        name = next(choice for choice in tries if choice.lower() not in taken)
        taken.add(name.lower())
        names.append(name)
    return names


def store_image(source: Path, folder: Path) -> np.ndarray:
    """Put an image into a new sample folder; what is no TIFF or PNG becomes a TIFF.

    Returns:
        uint8 [H, W, 3], channels in stored order.
    """
    folder.mkdir()
    suffix = source.suffix.lower()
    if suffix not in CONVERTED_SUFFIXES:
        shutil.copyfile(source, folder / f"image{suffix if suffix in SUFFIXES else '.tif'}")
        return read_image(source)
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.height} x {image.width} pixels, limit {MAX_PIXELS:,}")
            pixels = np.asarray(image.convert("RGB"))
    except (*CODEC_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(
            f"{source} is damaged, too large or no image ({error}); copy it anew from its source"
        ) from None
    options = {"photometric": "rgb", "compression": "lzw", "predictor": True, "metadata": None}
    tifffile.imwrite(folder / "image.tif", pixels, **options)
    return pixels

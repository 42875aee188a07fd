"""Sample folders to arrays: the image, and every cell of its instance maps.

A sample folder holds `image.tif` and one map for each class that occurs, `class1.tif`,
`class2.tif`, ... (or .tiff, .png). In a map 0 is background and any other value is the id of a
cell; a class owns its ids, so the same id in two maps means two cells. Cells of one class that
overlap lie on different pages of its map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cellseg.data.decoding import MAX_PIXELS, SUFFIXES, read_pixels, read_planes
from cellseg.data.runs import (
    EMPTY,
    Runs,
    add_to_layers,
    draw_runs,
    find_runs,
    measure_runs,
    stack_runs,
)
from cellseg.errors import DataError

CLASS_NAMES = ("epithelial", "lymphocyte", "neutrophil", "macrophage")
MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class SampleFiles:
    """The files of one sample folder.

    Attributes:
        folder: the folder itself; its name is the sample_id.
        image: path of the image.
        maps: label 1..C -> path of that class's map; classes without a file are absent.
    """

    folder: Path
    image: Path
    maps: dict[int, Path] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """All files, the image first, then the maps by label."""
        return [self.image, *self.maps.values()]


@dataclass(frozen=True)
class Instances:
    """All cells of one sample, ordered by class and then by id in the class's map.

    Attributes:
        boxes: float32 [N, 4], xyxy, half-open, pixels.
        labels: int64 [N], 1..C.
        ids: int64 [N], the id in the class's own map.
        areas: int64 [N], pixels.
        instance_map: int32 [L, H, W]; k + 1 marks instance k, 0 is nothing. A second layer
            exists only where cells overlap.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    areas: np.ndarray
    instance_map: np.ndarray


def find_sample_files(folder: str | Path, class_names: Sequence[str] = CLASS_NAMES) -> SampleFiles:
    """Return the image and the maps of a sample folder, without opening them.

    Files that are neither `image.*` nor `class*.*`, and hidden files, are passed over.

    Raises:
        DataError: if the folder is missing, has no image, has the same file as TIFF and PNG, or
            holds a class file that no class name stands for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; check the path of the data")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = path.stem.lower()
        meant = stem == "image" or stem.startswith("class")
        if not meant or path.suffix.lower() not in SUFFIXES:
            continue
        if stem in found:
            raise DataError(
                f"{folder} holds both {found[stem].name} and {path.name}; remove the one that is "
                "not meant"
            )
        found[stem] = path
    image = found.pop("image", None)
    if image is None:
        raise DataError(f"{folder} holds no image.tif or image.png; add it or remove the folder")
    labels = {f"class{label}": label for label in range(1, len(class_names) + 1)}
    for stem, path in found.items():
        if stem not in labels:
            raise DataError(
                f"{path} is an unknown class file: {len(class_names)} class names are set, for "
                f"class1 to class{len(class_names)}; add its name or remove the file"
            )
    maps = {label: found[stem] for stem, label in labels.items() if stem in found}
    return SampleFiles(folder, image, maps)


def read_image(
    path: str | Path, *, swapped: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Return an image as RGB.

    Grey images get three equal channels; an alpha channel is dropped. Values of 16-bit images are
    divided by the full scale of the camera, taken to be the smallest of 255, 4095 (12 bit) and
    65535 that no value exceeds, times 255, rounded to the nearest. Values of float images must
    lie in 0-1 and are multiplied by 255.

    Args:
        path: TIFF or PNG file of one page.
        swapped: exchange the first and the third channel, for files that are stored as BGR.
        max_pixels: refuse files that claim more pixels than this.

    Returns:
        uint8 array [H, W, 3]. It is a view on planes [3, H, W], so that going to a torch image
        copies nothing.

    Raises:
        DataError: if the file cannot be read or is not an image of 8 or 16 bit or 0-1.
    """
    pixels = read_pixels(path, invert_white=True, max_pixels=max_pixels)
    return pixels_to_rgb(pixels, path, swapped=swapped)


def pixels_to_rgb(
    pixels: np.ndarray, path: str | Path, *, swapped: bool = False, highest: int | None = None
) -> np.ndarray:
    """Return pixels [H, W] or [H, W, S], as they are stored, as RGB; see `read_image`.

    Args:
        pixels: of the whole image or a window of it; white is the largest value.
        path: the file they come from, for errors.
        swapped: exchange the first and the third channel.
        highest: the largest value of the whole 16-bit image; of these pixels if None.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] not in (1, 2, 3, 4):
        raise DataError(f"{path} has {pixels.shape[2]} channels; save it as grey, RGB or RGBA")
    if pixels.dtype != np.uint8:
        pixels = _to_uint8(pixels[..., : 3 if pixels.shape[2] > 2 else 1], path, highest)
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    _part_channels(pixels, planes[::-1] if swapped else planes)
    return planes.transpose(1, 2, 0)


def _part_channels(pixels: np.ndarray, planes: np.ndarray) -> None:
    """Write the colours of pixels [H, W, 1-4] into planes [3, H, W], grey into all three."""
    if pixels.shape[2] == 4 and pixels.flags.c_contiguous:
        words = pixels.view("<u4")[..., 0]  # shifting whole pixels is faster than picking bytes
        for channel, plane in enumerate(planes):
            np.copyto(plane, words >> np.uint32(8 * channel), casting="unsafe")
        return
    grey = pixels.shape[2] < 3
    for channel, plane in enumerate(planes):
        plane[:] = pixels[..., 0 if grey else channel]


def _to_uint8(pixels: np.ndarray, path: str | Path, highest: int | None) -> np.ndarray:
    """Return pixels of 16 bit, or floats in 0-1, as uint8 (rule: see `read_image`)."""
    if is_16_bit(pixels):
        highest = int(pixels.max()) if highest is None else highest
        scale = next(full for full in (255, 4095, 65535) if highest <= full)
        return ((pixels.astype(np.uint32) * 255 + scale // 2) // scale).astype(np.uint8)
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise DataError(
                f"{path} is a float image with values from {pixels.min():g} to {pixels.max():g}; "
                "scale it to 0-1 or save it as 8 bit"
            )
        return np.rint(pixels * 255).astype(np.uint8)
    raise DataError(f"{path} stores its pixels as {pixels.dtype}; save it with 8 or 16 bit")


def is_16_bit(pixels: np.ndarray) -> bool:
    """Tell whether pixels are unsigned, of 16 bit, in either order of bytes."""
    return pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2


def count_cells(files: SampleFiles, num_labels: int) -> list[int]:
    """Return the number of cells of each class 1..num_labels, without decoding the image."""
    counts = [0] * num_labels
    for label, path in files.maps.items():
        pages, _ = _read_pages(path, MAX_PIXELS)
        counts[label - 1] = sum(len(np.unique(runs.values)) for runs in pages)
    return counts


def _read_pages(path: str | Path, max_pixels: int) -> tuple[list[Runs], tuple[int, int]]:
    """Return the runs of each page of a map and the pages' shape [H, W], the ids checked."""
    planes = read_planes(path, max_pixels=max_pixels)
    pages, shapes = zip(*(_plane_runs(path, plane) for plane in planes), strict=True)
    if len(set(shapes)) > 1:
        raise DataError(
            f"{path} has pages of {shapes[0]} and {next(s for s in shapes if s != shapes[0])} "
            "pixels; all pages of a map are of the image's size"
        )
    if len(pages) > 1:
        every_id = np.concatenate([np.unique(runs.values) for runs in pages])
        ids, number = np.unique(every_id, return_counts=True)
        if (number > 1).any():
            raise DataError(
                f"{path} has {len(pages)} pages, and the id {ids[number > 1][0]} on more than one; "
                "a cell lies on one page: give every cell its own id, or save one page"
            )
    return list(pages), shapes[0]


def _plane_runs(path: str | Path, pixels: np.ndarray) -> tuple[Runs, tuple[int, int]]:
    """Return the runs and the shape [H, W] of one page of a map, its ids checked."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.dtype.kind not in "biuf":
        raise DataError(
            f"{path} holds {' x '.join(map(str, pixels.shape))} values of {pixels.dtype}; an "
            "instance map is a single plane of numbers, 0 for background"
        )
    runs = find_runs(pixels)
    _check_ids(path, runs, pixels.shape[1])
    return replace(runs, values=runs.values.astype(np.int64)), pixels.shape


def _check_ids(path: str | Path, runs: Runs, width: int) -> None:
    """Raise for the first value of a map of this width that cannot be an id."""
    values = runs.values
    if values.dtype.kind == "f":
        values = values.astype(np.float64)  # so that the largest id can be told from the next
    good = (values > 0) & (values <= MAX_ID)
    if values.dtype.kind == "f":
        good &= values == np.floor(values)
    if good.all():
        return
    first = int(np.argmin(good))
    row, column = divmod(int(runs.starts[first]), width)
    raise DataError(
        f"{path} holds the id {values[first]} at row {row}, column {column}; ids are whole "
        f"numbers from 1 to {MAX_ID}, 0 is background: write the map anew"
    )


def read_instances(
    files: SampleFiles, shape: tuple[int, int], *, max_pixels: int = MAX_PIXELS
) -> Instances:
    """Return all cells of a sample whose image has the given shape [H, W].

    Costs one pass over each map's pixels, whatever the number of cells.

    Raises:
        DataError: if a map cannot be read, is no plane of numbers or not of the image's size, or
            holds an id that is negative, fractional, not a number or above 2**31 - 1.
    """
    parts = []
    layers: list[Runs] = []
    count = 0
    for label, path in files.maps.items():
        pages, map_shape = _read_pages(path, max_pixels)
        if map_shape != shape:
            raise DataError(
                f"{path} has {map_shape[0]} x {map_shape[1]} pixels, {files.image.name} has "
                f"{shape[0]} x {shape[1]} (height x width); both must be of the same size"
            )
        runs = stack_runs(pages, shape[0] * shape[1])
        ids, index = np.unique(runs.values, return_inverse=True)
        boxes, areas = measure_runs(runs, index, len(ids), shape)
        parts.append((boxes, np.full(len(ids), label, np.int64), ids, areas))
        ends = np.cumsum([len(page.starts) for page in pages])
        for page, values in zip(pages, np.split(index + count + 1, ends[:-1]), strict=True):
            add_to_layers(layers, replace(page, values=values))
        count += len(ids)
    empty = (np.zeros((0, 4), np.float32), *(np.zeros(0, np.int64) for _ in range(3)))
    boxes, labels, ids, areas = (np.concatenate(p) for p in zip(empty, *parts, strict=True))
    return Instances(boxes, labels, ids, areas, _draw_layers(layers, shape))


def _draw_layers(layers: list[Runs], shape: tuple[int, int]) -> np.ndarray:
    """Return the map int32 [L, H, W] of layers of runs, one empty layer if there are none."""
    pixels, depth = shape[0] * shape[1], max(1, len(layers))
    runs = stack_runs(layers or [EMPTY], pixels)
    return draw_runs(runs, depth * pixels).reshape(depth, *shape)


def read_sample(
    folder: str | Path | SampleFiles,
    class_names: Sequence[str] = CLASS_NAMES,
    *,
    max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the image and the target of a sample folder.

    Args:
        folder: the folder, or its files as `find_sample_files` returned them.
        class_names: one name for each of class1, class2, ...
        max_pixels: refuse files that claim more pixels than this.

    Returns:
        uint8 image [H, W, 3], channels in stored order, and the target without `image_id`:
        `boxes` float32 [N, 4] xyxy half-open, `labels` int64 [N], `instance_map` int32 [L, H, W]
        (see `Instances`). Without cells N is 0 and the map one layer of zeros.

    Raises:
        DataError: naming the file, the value and the remedy.
    """
    files = folder if isinstance(folder, SampleFiles) else find_sample_files(folder, class_names)
    image = read_image(files.image, max_pixels=max_pixels)
    cells = read_instances(files, image.shape[:2], max_pixels=max_pixels)
    target = {"boxes": cells.boxes, "labels": cells.labels, "instance_map": cells.instance_map}
    return image, target

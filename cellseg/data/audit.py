"""What a folder of samples holds, and what in it looks like a mistake."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from skimage.measure import label as label_pieces
from tqdm.auto import tqdm

from cellseg import markdown
from cellseg.data.dataset import CellDataset
from cellseg.data.reading import Instances, SampleFiles
from cellseg.data.sizes import (
    DEFAULT_SIZES,
    TARGET_DIAMETER,
    CellSizes,
    join_sizes,
    propose_anchors,
    sizes_of,
    suggest_image_scale,
)

MIN_AREA = 10
"""Cells of fewer pixels are called fragments."""

OddityKind = Literal["fragments", "several pieces", "overlap", "duplicate image"]


@dataclass(frozen=True)
class Oddity:
    """Something in one file that a person should look at.

    Attributes:
        sample_id: the sample's folder.
        file: name of the file in it.
        kind: "fragments" (cells under `MIN_AREA` pixels), "several pieces" (one id in pieces that
            do not touch, not even at a corner), "overlap" (with another class's cells) or
            "duplicate image" (the same pixels as an earlier sample).
        detail: the ids, areas or files concerned.
    """

    sample_id: str
    file: str
    kind: OddityKind
    detail: str


@dataclass(frozen=True)
class ImageRow:
    """One image: its size in pixels, and its cells of each class 1..C."""

    sample_id: str
    height: int
    width: int
    cells: tuple[int, ...]


@dataclass(frozen=True)
class Audit:
    """The state of a data set.

    Attributes:
        class_names: names of the classes 1..C.
        rows: one for each image, in the data set's order.
        sizes: of all cells.
        channel_order: "true", "swapped" or "undecided".
        channel_differences: what the order was decided from (see `ChannelOrder`).
        oddities: in the order of the images.
    """

    class_names: tuple[str, ...]
    rows: list[ImageRow]
    sizes: CellSizes
    channel_order: str
    channel_differences: tuple[float, ...] = ()
    oddities: list[Oddity] = field(default_factory=list)

    @property
    def areas(self) -> dict[str, np.ndarray]:
        """Areas of the cells of each class, int64 arrays, pixels, by name."""
        numbered = enumerate(self.class_names, 1)
        return {name: self.sizes.areas[self.sizes.labels == label] for label, name in numbered}

    @property
    def totals(self) -> dict[str, int]:
        """Number of cells of each class, by name."""
        return {name: len(areas) for name, areas in self.areas.items()}

    @property
    def cells_per_image(self) -> list[int]:
        """Number of cells of each image, in the order of the rows."""
        return [sum(row.cells) for row in self.rows]

    def table(self, *, max_oddities: int = 20) -> str:
        """Return the audit as Markdown: facts, a table of classes, the oddities.

        Args:
            max_oddities: list no more than this many; the number of all is always told.
        """
        parts = [self._facts(), self._class_table(), self._oddity_table(max_oddities)]
        return "\n\n".join(parts) + "\n"

    def _facts(self) -> str:
        """Return the table of facts about the images."""
        heights = [row.height for row in self.rows]
        widths = [row.width for row in self.rows]
        rows = [
            ("number", f"{len(self.rows)}, {self.cells_per_image.count(0)} without cells"),
            ("height, px", _spread(heights)),
            ("width, px", _spread(widths)),
            ("cells an image", _spread(self.cells_per_image)),
            *self._size_rows(),
            ("channel order", self._order_text()),
            ("oddities", f"{len(self.oddities)}"),
        ]
        return markdown.table(("images", "what was found"), rows)

    def _size_rows(self) -> list[tuple[str, str]]:
        """Return the image scale and the anchors that the cells' sizes suggest, a row each."""
        if not len(self.sizes.areas):
            return []
        scale, median = suggest_image_scale(self.sizes), np.median(self.sizes.whole.diameters)
        found = propose_anchors(self.sizes, scale)
        shape = f"{', '.join(map(str, found.sizes))} px x {', '.join(map(str, found.ratios))}"
        default = f"{DEFAULT_SIZES[0]} to {DEFAULT_SIZES[-1]} px"
        size = (
            f"{scale:g}: the median cell is {median:.1f} px across, "
            f"{scale * median:.0f} in the network ({TARGET_DIAMETER:.0f} are aimed at)"
        )
        reach = (
            f"{shape} reach IoU 0.5 for {found.coverage_50:.1%} of the cells, 0.7 for "
            f"{found.coverage_70:.1%}; the default {default} {found.default_coverage_50:.1%} and "
            f"{found.default_coverage_70:.1%}"
        )
        return [("image_scale", size), ("anchors", reach)]

    def _order_text(self) -> str:
        """Return the channel order and what it was decided from."""
        meaning = {
            "true": "true (RGB)",
            "swapped": "swapped (BGR as stored, mended on reading)",
            "undecided": "undecided (left as stored)",
        }[self.channel_order]
        if not self.channel_differences:
            return meaning
        median = np.median(self.channel_differences)
        images = markdown.count_text(len(self.channel_differences), "image")
        return f"{meaning}; B - R in nuclei minus outside: median {median:+.0f} of {images}"

    def _class_table(self) -> str:
        """Return the table of classes: cells, images that hold them, areas."""
        rows = []
        for number, (name, areas) in enumerate(self.areas.items(), 1):
            images = sum(row.cells[number - 1] > 0 for row in self.rows)
            low, middle, high = np.percentile(areas, (10, 50, 90)) if len(areas) else (None,) * 3
            spread = (f"{middle:.0f}", f"{low:.0f}-{high:.0f}") if len(areas) else ("-", "-")
            rows.append((f"{number}", markdown.escape(name), f"{len(areas)}", f"{images}", *spread))
        header = "class", "name", "cells", "images", "area, median px", "10-90 %"
        return markdown.table(header, rows)

    def _oddity_table(self, max_oddities: int) -> str:
        """Return the table of oddities, or a sentence that there are none."""
        if not self.oddities:
            return "No oddities."
        rows = [
            (markdown.escape(f"{odd.sample_id}/{odd.file}"), odd.kind, markdown.escape(odd.detail))
            for odd in self.oddities[:max_oddities]
        ]
        if (rest := len(self.oddities) - max_oddities) > 0:
            rows.append(("...", "", f"and {rest} more"))
        return markdown.table(("file", "oddity", "detail"), rows)


def audit(dataset: CellDataset, *, progress: bool = False) -> Audit:
    """Read every sample once and return what the data set holds.

    Args:
        dataset: the samples; its transform is not used.
        progress: whether to show a bar.

    Raises:
        DataError: at the first sample that cannot be read; names the file.
    """
    rows, sizes, oddities = [], [], []
    first_with: dict[bytes, str] = {}
    indices = range(len(dataset))
    for index in tqdm(indices, desc="audit", unit="image", disable=not progress):
        image, cells = dataset.read_instances(index)
        files, sample_id = dataset.files(index), dataset.sample_ids[index]
        rows.append(_image_row(sample_id, cells, len(dataset.class_names)))
        sizes.append(sizes_of(cells))
        digest = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).digest()
        twin = first_with.setdefault(digest, sample_id)
        if twin != sample_id:
            detail = f"the same pixels as {twin}"
            oddities.append(Oddity(sample_id, files.image.name, "duplicate image", detail))
        oddities.extend(find_oddities(files, cells))
    return Audit(
        class_names=dataset.class_names,
        rows=rows,
        sizes=join_sizes(sizes),
        channel_order=dataset.channel_order,
        channel_differences=tuple(dataset.channel_differences),
        oddities=oddities,
    )


def find_oddities(files: SampleFiles, cells: Instances) -> Iterator[Oddity]:
    """Yield what looks like a mistake in the maps of one sample, map by map."""
    pieces = _count_pieces(cells)
    for label, path in files.maps.items():
        own = cells.labels == label
        for kind, chosen, numbers, unit in (
            ("fragments", own & (cells.areas < MIN_AREA), cells.areas, "px"),
            ("several pieces", own & (pieces > 1), pieces, "pieces"),
        ):
            if chosen.any():
                detail = _name_cells(cells.ids[chosen], numbers[chosen], unit)
                yield Oddity(files.folder.name, path.name, kind, detail)
    for (first, second), pixels in _overlaps(cells).items():
        detail = f"{pixels} px shared with {files.maps[second].name}"
        yield Oddity(files.folder.name, files.maps[first].name, "overlap", detail)


def _image_row(sample_id: str, cells: Instances, num_labels: int) -> ImageRow:
    """Return the row of one image."""
    counts = np.bincount(cells.labels, minlength=num_labels + 1)[1:]
    height, width = cells.instance_map.shape[1:]
    return ImageRow(sample_id, height, width, tuple(counts.tolist()))


def _count_pieces(cells: Instances) -> np.ndarray:
    """Return for each instance the number of its 8-connected pieces, int64 [N]."""
    pieces = np.zeros(len(cells.labels) + 1, np.int64)
    for layer in cells.instance_map:
        components, count = label_pieces(layer, background=0, connectivity=2, return_num=True)
        owners = np.zeros(count + 1, np.int64)
        owners[components] = layer
        pieces += np.bincount(owners[1:], minlength=len(pieces))
    return pieces[1:]


def _overlaps(cells: Instances) -> dict[tuple[int, int], int]:
    """Return the pixels that two classes share, for each pair of labels (low, high) with any."""
    labels = np.concatenate([[0], cells.labels])
    shared: dict[tuple[int, int], int] = {}
    layers = cells.instance_map
    for upper in range(1, len(layers)):
        for lower in range(upper):
            both = (layers[upper] != 0) & (layers[lower] != 0)
            pairs = np.stack([labels[layers[upper][both]], labels[layers[lower][both]]])
            found, pixels = np.unique(np.sort(pairs, axis=0), axis=1, return_counts=True)
            for (low, high), number in zip(found.T.tolist(), pixels.tolist(), strict=True):
                shared[low, high] = shared.get((low, high), 0) + number
    return dict(sorted(shared.items()))


def _name_cells(ids: np.ndarray, numbers: np.ndarray, unit: str, most: int = 5) -> str:
    """Return "3 cells: id 4 (2 px), id 9 (7 px), id 11 (1 px)", the first few of them."""
    named = [f"id {i} ({n} {unit})" for i, n in zip(ids[:most], numbers[:most], strict=True)]
    rest = ", ..." if len(ids) > most else ""
    return f"{markdown.count_text(len(ids), 'cell')}: {', '.join(named)}{rest}"


def _spread(values: Sequence[int]) -> str:
    """Return "median (smallest-largest)" of some whole numbers."""
    if not values:
        return "-"
    return f"{np.median(values):.0f} ({min(values)}-{max(values)})"

"""A folder of annotated samples as a dataset of `(image, target)`, and the test images."""

import hashlib
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cellseg.data.cache import SampleCache, entry_bytes
from cellseg.data.channels import OUTCOMES, ChannelOrder, detect_channel_order
from cellseg.data.decoding import read_size
from cellseg.data.reading import (
    CLASS_NAMES,
    Instances,
    SampleFiles,
    count_cells,
    find_sample_files,
    read_image,
    read_instances,
)
from cellseg.data.release import read_test_index
from cellseg.errors import DataError, SettingsError, check_at_least
from cellseg.markdown import first_few

Target = dict[str, Any]
Transform = Callable[[torch.Tensor, Target, torch.Generator], tuple[torch.Tensor, Target]]
Key = int | tuple[int, int, int]


class CellDataset(Dataset):
    """Annotated images, one folder each, as `(image, target)`.

    `image` is a uint8 tensor [3, H, W] in RGB. `target` holds `boxes` float32 (N, 4), xyxy,
    half-open, pixels; `labels` int64 (N,), 1..C; `instance_map` int32 (L, H, W), where k + 1 marks
    instance k and a second layer exists only if instances overlap; and `image_id`, an int. An
    image without cells has N = 0.

    Attributes:
        sample_ids: names of the folders, sorted.
        image_ids: for each sample its position, from 1, among *all* folders of `train_dir`; a
            subset keeps the ids of the whole.
        class_names: names of the classes 1..C.
        channel_order: "true", "swapped" or "undecided"; images of a swapped folder are mended
            as they are read.
        channel_differences: what "auto" measured, one number an image (see `ChannelOrder`).
        cache: where samples lie decoded, or None; what is read is the same with it and without.
    """

    def __init__(
        self,
        train_dir: str | Path,
        *,
        class_names: Sequence[str] = CLASS_NAMES,
        sample_ids: Sequence[str] | None = None,
        transform: Transform | None = None,
        channel_order: str = "auto",
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        """List the folders; nothing is decoded, save a few images for the channel order.

        Args:
            train_dir: folder of sample folders; hidden folders are passed over.
            class_names: one name for each of class1, class2, ...
            sample_ids: use only these folders; None for all.
            transform: called as `transform(image, target, generator)`; the generator is seeded by
                (seed, epoch, image_id, draw), so that a draw does not depend on who makes it.
            channel_order: "auto" to decide from several images, or the outcome to go by.
            seed: of the transform's draws, 0 or more.
            cache_dir: folder in which each sample is kept decoded once it was read (see
                `SampleCache`, and `cache_bytes` for the room it takes); None to decode each time.

        Raises:
            DataError: if the folder is missing or empty, or a sample lacks its image or holds an
                unknown class file.
            SettingsError: if a sample_id is unknown, a class name comes twice, `channel_order` is
                none of the four, or `seed` is below 0.
        """
        check_at_least(0, seed=seed)
        self.train_dir = Path(train_dir)
        self.class_names = _check_names(class_names)
        self.transform = transform
        self.seed = seed
        self.cache = None if cache_dir is None else SampleCache(cache_dir)
        every_id = list_sample_ids(self.train_dir)
        self._all_image_ids = {name: number for number, name in enumerate(every_id, 1)}
        self._counts: dict[str, list[int]] = {}
        self._select(every_id if sample_ids is None else sample_ids)
        order = _check_order(channel_order, (*OUTCOMES, "auto"))
        found = ChannelOrder("undecided") if order != "auto" else self._detect()
        self.channel_order = found.outcome if order == "auto" else order
        self.channel_differences = found.differences

    def _select(self, sample_ids: Sequence[str]) -> None:
        """Keep the samples of these ids, in sorted order."""
        unknown = sorted(set(sample_ids) - set(self._all_image_ids))
        if unknown:
            names = first_few([repr(name) for name in unknown], 10)
            raise SettingsError(
                f"{self.train_dir} has no sample {names}; name its folders as they are"
            )
        self.sample_ids = sorted(set(sample_ids))
        self.image_ids = [self._all_image_ids[sample_id] for sample_id in self.sample_ids]
        self._files = [
            find_sample_files(self.train_dir / sample_id, self.class_names)
            for sample_id in self.sample_ids
        ]

    def _detect(self) -> ChannelOrder:
        """Decide the channel order from the samples at hand."""
        return detect_channel_order(self._files, self.class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes, the background counted."""
        return len(self.class_names) + 1

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.sample_ids)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, Target]:
        """Return a sample, transformed.

        Args:
            key: index, or (index, epoch, draw); an index alone means epoch 0, draw 0.

        Raises:
            IndexError: if the index is out of range.
            DataError: if a file of the sample cannot be used; names it.
        """
        index, epoch, draw = key if isinstance(key, tuple) else (key, 0, 0)
        image, target = self.read(index)
        if self.transform is None:
            return image, target
        generator = draw_generator(self.seed, epoch, target["image_id"], draw)
        return self.transform(image, target, generator)

    def files(self, index: int) -> SampleFiles:
        """Return the paths of a sample's image and maps."""
        return self._files[operator.index(index)]

    def read(self, index: int) -> tuple[torch.Tensor, Target]:
        """Return a sample as it lies on disk, channels mended, not transformed."""
        image, cells = self.read_instances(index)
        target: Target = {
            "boxes": torch.from_numpy(cells.boxes),
            "labels": torch.from_numpy(cells.labels),
            "instance_map": torch.from_numpy(cells.instance_map),
            "image_id": self.image_ids[index],
        }
        return image, target

    def read_instances(self, index: int) -> tuple[torch.Tensor, Instances]:
        """Return the image, channels mended, and its cells with their ids and areas."""
        files = self.files(index)
        if self.cache is None:
            image = _read_tensor(files.image, self.channel_order)
            return image, read_instances(files, tuple(image.shape[1:]))
        planes, cells = self.cache.read(files)
        image = torch.from_numpy(planes)
        return image.flip(0) if self.channel_order == "swapped" else image, cells

    def cache_bytes(self) -> int:
        """Return about how many bytes the cache of these samples takes, existing entries included.

        Reads the size of each image only; where cells of different classes overlap it is more.
        """
        return sum(entry_bytes(*read_size(files.image)) for files in self._files)

    def subset(
        self, sample_ids: Sequence[str], *, transform: Transform | None = None
    ) -> "CellDataset":
        """Return a dataset of some of the samples, with the channel order found here.

        Raises:
            SettingsError: if a sample_id is not in the folder.
        """
        part = CellDataset.__new__(CellDataset)
        part.__dict__.update(self.__dict__)
        part.transform = transform
        part._select(sample_ids)
        return part

    def class_counts(self, index: int) -> list[int]:
        """Return the number of cells of each class 1..C; without a cache only the maps are read."""
        sample_id, num_labels = self.sample_ids[index], len(self.class_names)
        if sample_id not in self._counts:
            if self.cache is None:
                counts = count_cells(self.files(index), num_labels)
            else:
                labels = self.cache.read(self.files(index))[1].labels
                counts = np.bincount(labels, minlength=num_labels + 1)[1:].tolist()
            self._counts[sample_id] = counts
        return list(self._counts[sample_id])

    def fingerprint(self) -> str:
        """Return a SHA-256 over ids, file names and bytes of all samples, read from disk anew."""
        digest = hashlib.sha256()
        for sample_id, files in zip(self.sample_ids, self._files, strict=True):
            for path in files.paths:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{sample_id}/{path.name} {content}\n".encode())
        return digest.hexdigest()


class TestDataset(Dataset):
    """The test images in the order of their index, as `(image, image_id)`.

    Attributes:
        images: entries of the index: file_name, image_id, height, width.
        channel_order: as found in the folder of training images.
    """

    __test__ = False  # not a test case, whatever its name tells pytest

    def __init__(
        self, test_dir: str | Path, index_path: str | Path, *, channel_order: str = "true"
    ) -> None:
        """Read the index and check that every image it names is there.

        Args:
            test_dir: folder of the images.
            index_path: JSON list of {file_name, id, height, width}.
            channel_order: "swapped" to exchange red and blue; "true" and "undecided" do nothing.

        Raises:
            DataError: if the index cannot be used or an image is missing; names the image.
            SettingsError: if `channel_order` is none of the three.
        """
        self.test_dir = Path(test_dir)
        self.images = read_test_index(index_path)
        self.channel_order = _check_order(channel_order, OUTCOMES)
        for entry in self.images:
            if not (self.test_dir / entry.file_name).is_file():
                raise DataError(
                    f"{self.test_dir / entry.file_name} is missing, though {index_path} lists it; "
                    "extract the release anew"
                )

    def __len__(self) -> int:
        """Return the number of test images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return the image, uint8 [3, H, W] in RGB, and its image_id.

        Raises:
            DataError: if the image cannot be read or is not of the size that the index says.
        """
        entry = self.images[operator.index(index)]
        path = self.test_dir / entry.file_name
        image = _read_tensor(path, self.channel_order)
        height, width = image.shape[1:]
        if (height, width) != (entry.height, entry.width):
            raise DataError(
                f"{path} has {height} x {width} pixels, the index says {entry.height} x "
                f"{entry.width} (height x width); extract the release anew"
            )
        return image, entry.image_id


class SampleImages(Dataset):
    """The images of a `CellDataset` as `(image, image_id)`; no map is read."""

    def __init__(self, dataset: CellDataset) -> None:
        """Keep the dataset; its transform is not used."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return the image, uint8 [3, H, W] in RGB, and its image_id."""
        path = self.dataset.files(index).image
        return _read_tensor(path, self.dataset.channel_order), self.dataset.image_ids[index]


def list_sample_ids(train_dir: str | Path) -> list[str]:
    """Return the names of the sample folders in a folder, sorted; hidden ones are left out.

    Raises:
        DataError: if the folder is missing, holds no folder, or one whose name is not UTF-8, which
            could be written into no result.
    """
    train_dir = Path(train_dir)
    if not train_dir.is_dir():
        raise DataError(f"{train_dir} is not a folder; extract the archive, or check the path")
    names = [p.name for p in train_dir.iterdir() if p.is_dir() and p.name[0] not in "._"]
    if not names:
        raise DataError(f"{train_dir} holds no sample folders; check the path of the training data")
    if odd := [name for name in names if name.encode(errors="ignore").decode() != name]:
        raise DataError(f"{train_dir} holds the folder {odd[0]!r}, no name in UTF-8; rename it")
    return sorted(names)


def draw_generator(seed: int, epoch: int, image_id: int, draw: int) -> torch.Generator:
    """Return a generator whose numbers depend on these four and on nothing else."""
    state = np.random.SeedSequence([seed, epoch, image_id, draw]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def _read_tensor(path: Path, channel_order: str) -> torch.Tensor:
    """Return an image as a contiguous RGB tensor, uint8 [3, H, W]."""
    pixels = read_image(path, swapped=channel_order == "swapped")
    return torch.from_numpy(pixels.transpose(2, 0, 1))


def _check_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes if each is another: scores are told by them."""
    twice = sorted({name for name in class_names if list(class_names).count(name) > 1})
    if twice:
        raise SettingsError(
            f"class_names holds {', '.join(map(repr, twice))} more than once; give each class a "
            "name of its own"
        )
    return tuple(class_names)


def _check_order(channel_order: str, allowed: Sequence[str]) -> str:
    """Return the channel order if it is one of those allowed."""
    if channel_order not in allowed:
        raise SettingsError(
            f"channel_order is {channel_order!r}; use one of {', '.join(map(repr, allowed))}"
        )
    return channel_order

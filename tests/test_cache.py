"""Samples from the cache are those from the files, whatever happens to either."""

import os
import pickle
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import tifffile
import torch
from data_files import plain_image, stained_sample, write_sample

from cellseg.data import cache
from cellseg.data.cache import SampleCache, entry_bytes
from cellseg.data.dataset import CellDataset
from cellseg.data.loaders import make_loaders
from cellseg.data.reading import find_sample_files
from cellseg.data.transforms import TrainTransform
from cellseg.errors import DataError

SWAPPED = {"nuclei": (140, 60, 90), "around": (200, 170, 220)}
YESTERDAY = time.time() - 86_400


@pytest.fixture
def train_dir(tmp_path):
    """Return five swapped samples of 12 x 20: plain ones, one without cells, one with layers."""
    root = tmp_path / "train"
    for name in "bad":
        stained_sample(root / name, **SWAPPED)
    write_sample(root / "empty", plain_image(12, 20))
    first, third = np.zeros((12, 20)), np.zeros((12, 20))
    first[2:5, 3:9], third[4:8, 5:7] = 4, 9
    write_sample(root / "layers", plain_image(12, 20, (1, 2, 3)), {1: first, 3: third})
    for path in root.rglob("*.tif"):
        _settle(path)
    return root


def _settle(path):
    """Set a file's time of change to yesterday; only its time of change of status is new."""
    os.utime(path, (YESTERDAY, YESTERDAY))


@pytest.fixture
def settled(monkeypatch):
    """Let files be taken for unchanged by their times at once, however new they are."""
    monkeypatch.setattr(cache, "SETTLE_SECONDS", -60)


@pytest.fixture
def decoded(monkeypatch):
    """Return a list that gets the name of each sample that is decoded."""
    names, decode = [], cache.decode_sample
    monkeypatch.setattr(
        cache, "decode_sample", lambda files: names.append(files.folder.name) or decode(files)
    )
    return names


def assert_same_samples(dataset, expected):
    for index in range(len(expected)):
        (image, cells), (expected_image, expected_cells) = (
            d.read_instances(index) for d in (dataset, expected)
        )
        assert image.is_contiguous()
        assert torch.equal(image, expected_image)
        for field in fields(cells):
            ours, theirs = getattr(cells, field.name), getattr(expected_cells, field.name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_each_sample_is_decoded_once_and_is_the_same_ever_after(train_dir, tmp_path, decoded):
    expected = CellDataset(train_dir)
    assert expected.channel_order == "swapped"
    first = CellDataset(train_dir, cache_dir=tmp_path / "cache")
    for dataset in (first, first, first.subset(first.sample_ids)):
        assert_same_samples(dataset, expected)
        assert dataset.class_counts(0) == expected.class_counts(0)
    second = CellDataset(train_dir, cache_dir=tmp_path / "cache", channel_order="true")
    assert_same_samples(second, CellDataset(train_dir, channel_order="true"))
    assert decoded == ["a", "b", "d", "empty", "layers"]
    assert second.read(4)[1]["instance_map"].shape == (2, 12, 20)


def test_off_unless_a_folder_is_given(train_dir, tmp_path):
    assert CellDataset(train_dir).cache is None
    CellDataset(train_dir).read(0)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def _batches(dataset, workers):
    loader, _ = make_loaders(
        dataset, dataset, batch_size=2, workers=workers, seed=1, draws_per_image=2
    )
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        for images, targets in loader:
            yield from zip(images, targets, strict=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_the_cache_is_bit_identical(train_dir, tmp_path, workers):
    options = {"transform": TrainTransform(crop_size=10), "seed": 3}
    sources = CellDataset(train_dir, **options)
    cached = sources.subset(sources.sample_ids, transform=options["transform"])
    cached.cache = SampleCache(tmp_path / "cache")
    pairs = zip(_batches(sources, 0), _batches(cached, workers), strict=True)
    for (image, target), (cached_image, cached_target) in pairs:
        assert torch.equal(image, cached_image)
        assert target["image_id"] == cached_target["image_id"]
        for key in ("boxes", "labels", "instance_map"):
            assert torch.equal(target[key], cached_target[key])
            assert target[key].dtype == cached_target[key].dtype
    assert len(list((tmp_path / "cache").glob("*.cells"))) == 5


def test_a_worker_gets_what_was_checked_already(train_dir, tmp_path, monkeypatch):
    dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache")
    for _ in range(2):
        dataset.read(0)
    worker = pickle.loads(pickle.dumps(dataset))  # as workers are started on macOS and Windows
    monkeypatch.setattr(cache, "_same_files", lambda *_: pytest.fail("checked again"))
    assert torch.equal(worker.read(0)[0], dataset.read(0)[0])


def test_writing_to_a_sample_changes_nothing_for_others(train_dir, tmp_path, decoded):
    dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache", channel_order="true")
    before = dataset.read(0)[1]["instance_map"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where an array cannot be written
        image, target = dataset.read(0)
    image.fill_(9)
    target["instance_map"].fill_(9)
    target["boxes"].fill_(9)
    assert torch.equal(dataset.read(0)[1]["instance_map"], before)
    assert_same_samples(dataset, CellDataset(train_dir, channel_order="true"))
    assert decoded.count("a") == 1


def _new_pixels(path):
    """Write another pixel into an uncompressed map, size and time of change as they were."""
    stat, pixels = path.stat(), tifffile.imread(path)
    pixels[0, 0] = 3
    tifffile.imwrite(path, pixels, metadata=None)
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("settle_seconds", [-60, 2], ids=["old sources", "fresh sources"])
@pytest.mark.parametrize(
    ("change", "times", "reason"),
    [
        (lambda d: None, 1, "nothing changed"),
        (lambda d: os.utime(d / "image.tif"), 1, "touched only: the content is the same"),
        (lambda d: shutil.copy(d / "image.tif", d.parent / "x.tif"), 1, "a file beside it"),
        (lambda d: _new_pixels(d / "class1.tif"), 2, "another pixel, same size and time"),
        (lambda d: (d / "class1.tif").unlink(), 2, "a map less"),
        (lambda d: (d / "class1.tif").rename(d / "class2.tif"), 2, "another class"),
        (lambda d: shutil.copy(d / "class1.tif", d / "class2.tif"), 2, "a map more"),
    ],
)
def test_changed_sources_are_seen(
    train_dir, tmp_path, decoded, monkeypatch, settle_seconds, change, times, reason
):
    if os.name == "nt" and "same size and time" in reason and settle_seconds < 0:
        pytest.skip("Windows keeps no time of change of status")
    monkeypatch.setattr(cache, "SETTLE_SECONDS", settle_seconds)
    options = {"sample_ids": ["a"], "channel_order": "true"}
    CellDataset(train_dir, cache_dir=tmp_path / "cache", **options).read(0)
    change(train_dir / "a")
    for _ in range(2):
        dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache", **options)
        assert_same_samples(dataset, CellDataset(train_dir, **options))
    assert decoded == ["a"] * times, reason
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_decoder_is_seen(train_dir, tmp_path, decoded, monkeypatch):
    files = find_sample_files(train_dir / "a")
    SampleCache(tmp_path).read(files)
    monkeypatch.setattr(cache, "decoder_version", lambda: "another")
    for _ in range(2):
        SampleCache(tmp_path).read(files)
    assert decoded == ["a", "a"]


def test_the_decoder_is_known_by_its_code_and_its_codecs(monkeypatch, tmp_path):
    version = cache.decoder_version()
    assert cache.decoder_version() == version
    monkeypatch.setattr(cache.imagecodecs, "__version__", "0")
    other_codec = cache.decoder_version()
    shutil.copy(cache.runs.__file__, tmp_path / "runs.py")
    with (tmp_path / "runs.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    monkeypatch.setattr(cache.runs, "__file__", str(tmp_path / "runs.py"))
    assert len({version, other_codec, cache.decoder_version()}) == 3


def test_sources_are_not_read_again_where_times_and_sizes_are_the_same(
    train_dir, tmp_path, settled, monkeypatch
):
    files = find_sample_files(train_dir / "a")
    version = cache.decoder_version()
    SampleCache(tmp_path).read(files)
    monkeypatch.setattr(cache, "decoder_version", lambda: version)
    monkeypatch.setattr(cache, "digest_files", lambda paths: pytest.fail("a source was read"))
    SampleCache(tmp_path).read(files)


def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES = [
    (lambda path: path.write_bytes(b""), "empty"),
    (lambda path: path.write_bytes(path.read_bytes()[:10]), "cut in the head"),
    (lambda path: path.write_bytes(path.read_bytes()[:300]), "cut in the description"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut by a byte"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "a byte too long"),
    (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "all zeros"),
    (lambda path: path.write_text("x" * 5000, encoding="utf-8"), "another kind of file"),
    (lambda path: _flip(path, 3), "a bit of the magic"),
    (lambda path: _flip(path, 9), "a bit of the length"),
    (lambda path: _flip(path, 40), "a bit of the description"),
    (lambda path: _flip(path, -1), "a bit at the end"),
    (lambda path: _flip(path, -600), "a bit of the map"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[row[1] for row in DAMAGES])
def test_damaged_entries_are_made_anew(train_dir, tmp_path, decoded, settled, damage, reason):
    options = {"sample_ids": ["a"], "channel_order": "true"}
    CellDataset(train_dir, cache_dir=tmp_path / "cache", **options).read(0)
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    damage(entry)
    for _ in range(2):
        dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache", **options)
        assert_same_samples(dataset, CellDataset(train_dir, **options))
    assert decoded == ["a", "a"], reason
    assert entry.read_bytes() == whole


def test_a_folder_that_cannot_be_made_gives_one_warning_and_the_sources(train_dir, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.warns(UserWarning, match="cache .*file.* cannot be written") as caught:
        dataset = CellDataset(train_dir, cache_dir=tmp_path / "file" / "cache")
        for _ in range(2):
            assert_same_samples(dataset.subset(dataset.sample_ids), CellDataset(train_dir))
            assert len(list(_batches(dataset, 1))) == 20
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_folder_that_cannot_be_written_still_gives_what_it_holds(
    train_dir, tmp_path, decoded, monkeypatch
):
    CellDataset(train_dir, cache_dir=tmp_path / "cache").read(0)

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)
    with pytest.warns(UserWarning, match="Permission denied") as caught:
        dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache")
        for _ in range(2):
            assert_same_samples(
                dataset.subset(["a", "b"]), CellDataset(train_dir).subset(["a", "b"])
            )
    assert len(caught) == 1
    assert decoded == ["a", "b", "b"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_disk_gives_one_warning_and_the_sources(train_dir, tmp_path, monkeypatch):
    dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache")

    def fill(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "open_atomically", fill)
    with pytest.warns(UserWarning, match="No space left") as caught:
        assert_same_samples(dataset, CellDataset(train_dir))
    assert len(caught) == 1


def test_room_is_told_beforehand(train_dir, tmp_path):
    dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache")
    assert entry_bytes(1000, 1000) == 7_000_000
    # 3 bytes of image and 4 of map, each rounded up to 64: 768 and 960 for 12 x 20
    assert dataset.cache_bytes() == 5 * (768 + 960)
    assert dataset.subset(["a", "b"]).cache_bytes() == 2 * (768 + 960)
    assert not list((tmp_path / "cache").iterdir())
    big = stained_sample(tmp_path / "big" / "a")
    tifffile.imwrite(big / "image.tif", plain_image(300, 400), photometric="rgb")
    tifffile.imwrite(big / "class1.tif", np.eye(300, 400), metadata=None)
    whole = CellDataset(tmp_path / "big", cache_dir=tmp_path / "cache")
    whole.read(0)
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert whole.cache_bytes() <= taken <= 1.01 * whole.cache_bytes()


def test_samples_of_one_name_in_two_places_do_not_mix(train_dir, tmp_path, decoded):
    other = stained_sample(tmp_path / "other" / "a", label=2).parent
    for _ in range(2):
        for folder in (train_dir, other):
            options = {"sample_ids": ["a"], "channel_order": "true"}
            dataset = CellDataset(folder, cache_dir=tmp_path / "cache", **options)
            assert_same_samples(dataset, CellDataset(folder, **options))
    assert decoded == ["a", "a"]


def test_many_may_fill_one_folder_at_once(train_dir, tmp_path):
    expected = CellDataset(train_dir)

    def fill(_):
        dataset = expected.subset(expected.sample_ids)
        dataset.cache = SampleCache(tmp_path / "cache")
        for _ in range(4):
            assert_same_samples(dataset, expected)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(fill, range(6)))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cells"] * 5


def test_a_source_that_is_gone_is_named(train_dir, tmp_path):
    dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache", channel_order="true")
    (train_dir / "a" / "class1.tif").unlink()
    with pytest.raises(DataError, match=r"class1\.tif cannot be opened"):
        dataset.read(0)


def test_many_samples_can_be_held_at_once(train_dir, tmp_path):
    resource = pytest.importorskip("resource")
    dataset = CellDataset(train_dir, cache_dir=tmp_path / "cache")
    dataset.read(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 128), hard))
    try:
        assert len([dataset.read(0) for _ in range(200)]) == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""Samples, their fixed draws, batches in a fixed order, and the test images."""

import gc
import json
import os
import pickle

import numpy as np
import pytest
import tifffile
import torch
from data_files import plain_image, stained_sample, write_sample

from cellseg.data.dataset import CellDataset, TestDataset, draw_generator
from cellseg.data.loaders import (
    EpochSampler,
    collate,
    count_crops,
    log_balanced_weights,
    make_loaders,
)
from cellseg.data.transforms import TrainTransform
from cellseg.errors import DataError, SettingsError

SWAPPED = {"nuclei": (140, 60, 90), "around": (200, 170, 220)}


@pytest.fixture
def train_dir(tmp_path):
    """Return four samples d, b, a, c of 12 x 20 with one cell of class 1 each; c has none."""
    for name in "dba":
        stained_sample(tmp_path / "train" / name)
    write_sample(tmp_path / "train" / "c", plain_image(12, 20))
    return tmp_path / "train"


def _numbers(image, target, generator):
    """A transform that gives back what the generator drew."""
    return image, {**target, "drawn": float(torch.rand((), generator=generator))}


def test_sample_is_an_image_and_its_target(train_dir):
    dataset = CellDataset(train_dir)
    image, target = dataset[0]
    assert dataset.sample_ids == ["a", "b", "c", "d"]
    assert dataset.num_classes == 5
    assert image.dtype == torch.uint8
    assert image.shape == (3, 12, 20)
    assert image.is_contiguous()
    assert image[:, 0, 0].tolist() == [220, 170, 200]
    assert {k: target[k].dtype for k in ("boxes", "labels", "instance_map")} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "instance_map": torch.int32,
    }
    assert target["boxes"].tolist() == [[5, 3, 11, 9]]
    assert target["instance_map"].sum() == 36
    assert target["image_id"] == 1
    assert dataset[-2][1]["boxes"].shape == (0, 4)
    assert len(list(dataset)) == 4


def test_hidden_and_foreign_entries_are_no_samples(train_dir):
    (train_dir / ".cache").mkdir()
    (train_dir / "__MACOSX").mkdir()
    (train_dir / "notes.txt").write_text("x", encoding="utf-8")
    assert CellDataset(train_dir).sample_ids == ["a", "b", "c", "d"]


def test_a_folder_whose_name_no_result_could_hold_is_told(train_dir):
    try:
        (train_dir / os.fsdecode(b"caf\xe9")).mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    with pytest.raises(DataError, match=r"holds the folder 'caf\\udce9', no name in UTF-8; rename"):
        CellDataset(train_dir)


def test_subset_keeps_image_ids_and_channel_order(tmp_path):
    for name in "abc":
        stained_sample(tmp_path / name, **SWAPPED)
    write_sample(tmp_path / "d", plain_image(12, 20, (1, 2, 3)))
    dataset = CellDataset(tmp_path)
    part = dataset.subset(["d", "b"])
    assert part.sample_ids == ["b", "d"]
    assert part.image_ids == [2, 4]
    assert part[1][1]["image_id"] == 4
    assert part.channel_order == "swapped"
    assert part[1][0][:, 0, 0].tolist() == [3, 2, 1]  # mended, though it could not tell by itself
    assert len(dataset) == 4


@pytest.mark.parametrize(
    ("order", "first_pixel"),
    [
        ("auto", [220, 170, 200]),
        ("swapped", [220, 170, 200]),
        ("true", [200, 170, 220]),
        ("undecided", [200, 170, 220]),
    ],
)
def test_channel_order_is_found_or_given(tmp_path, order, first_pixel):
    stained_sample(tmp_path / "a", **SWAPPED)
    dataset = CellDataset(tmp_path, channel_order=order)
    assert dataset.channel_order == ("swapped" if order == "auto" else order)
    assert dataset[0][0][:, 0, 0].tolist() == first_pixel
    assert dataset.channel_differences == ((-70.0,) if order == "auto" else ())


def test_draws_depend_on_seed_epoch_image_and_draw_only(train_dir):
    dataset = CellDataset(train_dir, transform=_numbers, seed=3)
    drawn = {key: dataset[key][1]["drawn"] for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(set(drawn.values())) == 4
    assert dataset[0][1]["drawn"] == drawn[0, 0, 0]
    torch.manual_seed(1)
    assert dataset[1, 0, 0][1]["drawn"] == drawn[1, 0, 0]
    assert dataset.subset(["b"], transform=_numbers)[0][1]["drawn"] == drawn[1, 0, 0]
    other_seed = CellDataset(train_dir, transform=_numbers, seed=4)
    assert other_seed[0][1]["drawn"] != drawn[0, 0, 0]


def test_a_draw_is_the_same_on_every_machine():
    first = torch.randint(1000, (3,), generator=draw_generator(0, 1, 2, 3))
    assert (
        first.tolist() == torch.randint(1000, (3,), generator=draw_generator(0, 1, 2, 3)).tolist()
    )


def test_class_counts_read_maps_only_and_once(train_dir):
    dataset = CellDataset(train_dir, channel_order="true")
    (train_dir / "a" / "image.tif").write_bytes(b"not an image")
    assert dataset.class_counts(0) == [1, 0, 0, 0]
    (train_dir / "a" / "class1.tif").unlink()
    assert dataset.class_counts(0) == [1, 0, 0, 0]
    assert dataset.subset(["a"]).class_counts(0) == [1, 0, 0, 0]
    assert dataset.class_counts(2) == [0, 0, 0, 0]


def test_fingerprint_follows_content_and_names(train_dir):
    dataset = CellDataset(train_dir)
    before = dataset.fingerprint()
    assert CellDataset(train_dir).fingerprint() == before
    assert dataset.subset(["a"]).fingerprint() != before
    ids = tifffile.imread(train_dir / "a" / "class1.tif")
    ids[0, 0] = 7
    tifffile.imwrite(train_dir / "a" / "class1.tif", ids, metadata=None)
    changed = dataset.fingerprint()
    (train_dir / "a" / "class1.tif").rename(train_dir / "a" / "class2.tif")
    assert len({before, changed, CellDataset(train_dir).fingerprint()}) == 3


def test_dataset_survives_pickling(train_dir):
    dataset = CellDataset(train_dir, transform=TrainTransform(crop_size=8), seed=5)
    twin = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(twin[0, 2, 1][0], dataset[0, 2, 1][0])


@pytest.mark.parametrize("key", ["0", 1.0, [0], None])
def test_other_keys_are_refused(train_dir, key):
    with pytest.raises(TypeError):
        CellDataset(train_dir)[key]


def test_settings_that_cannot_work(train_dir, tmp_path):
    with pytest.raises(SettingsError, match="has no sample 'x'"):
        CellDataset(train_dir, sample_ids=["a", "x"])
    with pytest.raises(SettingsError, match="channel_order is 'bgr'; use one of"):
        CellDataset(train_dir, channel_order="bgr")
    with pytest.raises(SettingsError, match="class_names holds 'x' more than once; give each"):
        CellDataset(train_dir, class_names=["x", "y", "x"])
    with pytest.raises(SettingsError, match="seed is -1; give 0 or more"):
        CellDataset(train_dir, seed=-1)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        CellDataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no sample folders"):
        CellDataset(tmp_path / "empty")
    (train_dir / "b" / "image.tif").unlink()
    with pytest.raises(DataError, match=r"b holds no image\.tif"):
        CellDataset(train_dir)


@pytest.mark.parametrize("draws_per_image", [1, 3])
def test_an_epoch_has_every_image_equally_often(draws_per_image):
    sampler = EpochSampler(5, 4, seed=1, draws_per_image=draws_per_image)
    sampler.set_epoch(2)
    batches = list(sampler)
    keys = [key for batch in batches for key in batch]
    expected = [(index, 2, draw) for draw in range(draws_per_image) for index in range(5)]
    assert sorted(keys) == sorted(expected)
    assert len(batches) == len(sampler) == -(-5 * draws_per_image // 4)
    assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)


def test_images_can_have_draws_of_their_own():
    sampler = EpochSampler(3, 4, seed=1, draws_per_image=[1, 4, 2])
    batches = list(sampler)
    assert sorted(key for batch in batches for key in batch) == [
        (0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 0, 3), (2, 0, 0), (2, 0, 1),
    ]  # fmt: skip
    assert [len(batch) for batch in batches] == [4, 3]
    assert len(sampler) == 2
    sampler.deal(1, 2)
    assert [sampler.share(batch) for batch in (0, 1)] == [(2, 4), (1, 3)]
    alike = EpochSampler(3, 4, seed=1, draws_per_image=[2, 2, 2])
    assert list(alike) == list(EpochSampler(3, 4, seed=1, draws_per_image=2))


def test_large_images_are_drawn_once_a_crop(tmp_path):
    for name, (height, width) in {"a": (40, 50), "b": (9, 7), "c": (20, 30)}.items():
        write_sample(tmp_path / name, plain_image(height, width))
    dataset = CellDataset(tmp_path, transform=TrainTransform(crop_size=20))
    assert count_crops(dataset, 20) == [5, 1, 2]  # 2000 / 400, 63 / 400, 600 / 400 = 1.5 to even
    options = {"batch_size": 2, "workers": 0, "sampler": "area"}
    loader, _ = make_loaders(dataset, dataset, draws_per_image=3, **options)
    keys = [key for batch in loader.batch_sampler for key in batch]
    assert [sum(index == k for index, _, _ in keys) for k in range(3)] == [15, 3, 6]
    dataset.transform = None
    with pytest.raises(SettingsError, match="'area' needs a transform with a crop_size"):
        make_loaders(dataset, dataset, **options)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(20, 20, seed=seed)
        sampler.set_epoch(epoch)
        return [index for index, _, _ in next(iter(sampler))]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_an_epoch_can_begin_in_its_middle():
    sampler = EpochSampler(7, 2, seed=1)
    whole = list(sampler)
    sampler.set_epoch(0, start_batch=2)
    assert list(sampler) == whole[2:]
    assert len(sampler) == 4  # the steps of an epoch do not depend on where it is taken up
    sampler.set_epoch(0)
    assert list(sampler) == whole


def test_log_balanced_weights_by_hand():
    # totals 6 and 2: a cell of the first class weighs ln 2, of the second ln 4 = 2 ln 2
    weights = log_balanced_weights([[4, 0], [2, 2], [0, 0]])
    np.testing.assert_allclose(weights, np.log(2) * np.array([1, 1.5, 1]), rtol=1e-12)
    assert log_balanced_weights([[0, 0], [0, 0]]).tolist() == [1, 1]
    # a class that never occurs weighs nothing
    np.testing.assert_allclose(log_balanced_weights([[3, 0]]), np.log(2))


def test_weights_draw_with_replacement_and_number_the_draws():
    sampler = EpochSampler(2, 4, seed=0, weights=[1, 9], draws_per_image=200)
    keys = [key for batch in sampler for key in batch]
    assert len(set(keys)) == len(keys) == 400
    share = np.mean([index == 1 for index, _, _ in keys])
    assert 0.85 < share < 0.95


def _everything(dataset, workers, sampler="shuffle"):
    train_loader, val_loader = make_loaders(
        dataset, dataset, batch_size=3, workers=workers, seed=1, sampler=sampler, draws_per_image=2
    )
    train_loader.batch_sampler.set_epoch(1)
    assert len(train_loader) == 3
    assert len(val_loader) == 4
    return [*train_loader, *val_loader]


@pytest.mark.parametrize("sampler", ["shuffle", "log_balanced"])
def test_batches_are_the_same_with_0_and_2_workers(train_dir, sampler):
    dataset = CellDataset(train_dir, transform=TrainTransform(crop_size=10), seed=2)
    here, elsewhere = (_everything(dataset, workers, sampler) for workers in (0, 2))
    assert [len(images) for images, _ in here] == [3, 3, 2, 1, 1, 1, 1]
    assert [t["image_id"] for _, targets in here[3:] for t in targets] == [1, 2, 3, 4]
    for (images, targets), (images_2, targets_2) in zip(here, elsewhere, strict=True):
        assert all(map(torch.equal, images, images_2))
        for a, b in zip(targets, targets_2, strict=True):
            assert a["image_id"] == b["image_id"]
            assert all(torch.equal(a[k], b[k]) for k in ("boxes", "labels", "instance_map"))


def test_an_error_in_a_worker_names_the_file(train_dir):
    dataset = CellDataset(train_dir)
    (train_dir / "b" / "class1.tif").write_bytes(b"II*\0damaged")
    loader, _ = make_loaders(dataset, dataset, batch_size=4, workers=1)
    with pytest.raises(DataError, match=r"b[\\/]+class1\.tif is damaged"):
        list(loader)
    gc.collect()  # the worker of the failed loader ends here and not during a later test


def test_loader_settings_that_cannot_work(train_dir):
    dataset = CellDataset(train_dir)
    for name in ("batch_size", "draws_per_image"):
        with pytest.raises(SettingsError, match=f"{name} is 0"):
            make_loaders(dataset, dataset, **{"batch_size": 1, "workers": 0, name: 0})
    for name in ("workers", "seed"):
        with pytest.raises(SettingsError, match=f"{name} is -1; give 0 or more"):
            make_loaders(dataset, dataset, **{"batch_size": 1, "workers": 0, name: -1})
    with pytest.raises(SettingsError, match="sampler is 'balanced'"):
        make_loaders(dataset, dataset, batch_size=1, workers=0, sampler="balanced")


def test_collate_keeps_images_of_different_sizes():
    images, targets = collate([(torch.zeros(3, 2, 4), {"a": 1}), (torch.zeros(3, 5, 1), {"a": 2})])
    assert [tuple(image.shape) for image in images] == [(3, 2, 4), (3, 5, 1)]
    assert targets == [{"a": 1}, {"a": 2}]


@pytest.fixture
def test_release(tmp_path):
    """Return the folder and the index of two test images of 4 x 6, ids 2 and 1."""
    (tmp_path / "test_release").mkdir()
    index = []
    for image_id, name in ((2, "x.tif"), (1, "y.tif")):
        pixels = plain_image(4, 6, (10 * image_id, 0, 7))
        tifffile.imwrite(tmp_path / "test_release" / name, pixels, photometric="rgb")
        index.append({"file_name": name, "id": image_id, "height": 4, "width": 6})
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return tmp_path / "test_release", tmp_path / "index.json"


@pytest.mark.parametrize(("order", "pixel"), [("true", [20, 0, 7]), ("swapped", [7, 0, 20])])
def test_test_images_come_with_their_ids(test_release, order, pixel):
    dataset = TestDataset(*test_release, channel_order=order)
    found = {image_id: image for image, image_id in dataset}
    assert sorted(found) == [1, 2]
    assert found[2].shape == (3, 4, 6)
    assert found[2][:, 0, 0].tolist() == pixel


def test_missing_or_wrong_sized_test_image_is_named(test_release):
    folder, _ = test_release
    dataset = TestDataset(*test_release)
    for name in ("x.tif", "y.tif"):
        tifffile.imwrite(folder / name, plain_image(6, 4), photometric="rgb")
    with pytest.raises(DataError, match=r"[xy]\.tif has 6 x 4 pixels, the index says 4 x 6"):
        dataset[0]
    (folder / "x.tif").unlink()
    with pytest.raises(DataError, match=r"x\.tif is missing"):
        TestDataset(*test_release)
    with pytest.raises(SettingsError, match="channel_order is 'auto'"):
        TestDataset(*test_release, channel_order="auto")

"""Groups of similar images: pieces of one slide together, copies surely; and what leaks."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_sample
from scipy.ndimage import gaussian_filter

from benchmarks.consep_ids import tiles_of
from benchmarks.groups_on_tissue import pair_agreement
from cellseg.data import CellDataset
from cellseg.data.descriptors import appearance, describe_image, find_spots, pixel_digest, quarters
from cellseg.data.links import BORDER, SAME, SHARED, find_links
from cellseg.data.similarity import (
    LOOKS,
    Nearest,
    appearance_distances,
    group_by_similarity,
    leaks_table,
    nearest_training_images,
)
from cellseg.data.stain import STAINS
from cellseg.errors import SettingsError
from cellseg.report.leaks import plot_leaks

real_data = pytest.mark.skipif("CELLSEG_DATA" not in os.environ, reason="CELLSEG_DATA is not set")
SIDE = 240
# Of three slides: amounts of haematoxylin and eosin, and the width of what is seen, in pixels.
SLIDES = ((0.5, 0.4, 1.2), (0.3, 0.7, 1.6), (0.8, 0.3, 2.2))


def make_slide(number):
    """Return tissue without structure, uint8 [3, H, W], in the stains of its slide."""
    rng = np.random.default_rng(number)
    *amounts, width = SLIDES[number]
    shape = (SIDE, SIDE + 16)
    density = 0
    for amount, stain in zip(amounts, STAINS, strict=False):
        field = gaussian_filter(rng.standard_normal(shape), width)
        density = density + amount * (1 + 0.3 * field / field.std()) * stain[:, None, None]
    return torch.from_numpy(np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8))


def write(folder, images):
    """Write images by name as a dataset without cells."""
    for name, image in images.items():
        write_sample(folder / name, image.numpy().transpose(1, 2, 0))
    return CellDataset(folder, class_names=("cell",), channel_order="true")


@pytest.fixture(scope="module")
def slides():
    return [make_slide(number) for number in range(len(SLIDES))]


@pytest.fixture(scope="module")
def pieces(slides):
    """Give four pieces of each slide, by name: the slide's number and the piece's."""
    return {
        f"{number}{corner}": piece
        for number, slide in enumerate(slides)
        for corner, piece in zip("abcd", quarters(slide), strict=True)
    }


@pytest.fixture(scope="module")
def dataset(pieces, tmp_path_factory):
    return write(tmp_path_factory.mktemp("release") / "train", pieces)


def test_pieces_of_a_slide_fall_together(dataset):
    groups = group_by_similarity(dataset, max_share=0.34)
    assert list(groups) == dataset.sample_ids
    assert groups == {name: int(name[0]) + 1 for name in dataset.sample_ids}
    assert group_by_similarity(dataset, max_share=0.34) == groups


def test_no_group_is_larger_than_the_share_allows(dataset):
    groups = group_by_similarity(dataset, max_share=0.17)  # two of twelve
    counts = np.bincount(list(groups.values()))[1:]
    assert counts.max() <= 2 and counts.min() >= 1
    assert all(len({n[0] for n in groups if groups[n] == g}) == 1 for g in groups.values())


@pytest.mark.parametrize("turn", ["same", "flipped", "turned"])
def test_copies_stay_together_whatever_the_share(turn, pieces, tmp_path):
    image = pieces["0a"]
    copy = {"same": image, "flipped": image.flip(2), "turned": image.transpose(1, 2)}[turn]
    dataset = write(tmp_path, {"a": image, "b": pieces["1b"], "z": copy})
    groups = group_by_similarity(dataset, max_share=0.01)
    assert groups == {"a": 1, "b": 2, "z": 1}


def test_what_two_images_have_in_common_is_found(slides):
    slide = slides[0]
    noise = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, slide.shape))
    saved_again = (slide.int() + noise).clip(0, 255).byte()
    images = {
        "left": slide[:, :, :120],
        "right": saved_again[:, 20:, 120:],  # goes on where left ends, 20 pixels lower
        "overlapping": saved_again[:, 10:230, 20:220].flip(1),
        "turned": saved_again[:, :, :120].transpose(1, 2),
        "other": slides[1],
    }
    names = list(images)
    links = find_links([describe_image(image.contiguous()) for image in images.values()])
    found = {(names[i], names[j]): cue for (i, j), cue in links.items()}
    assert found[("left", "right")] == BORDER
    assert found[("left", "overlapping")] == SHARED and found[("right", "overlapping")] == SHARED
    assert found[("left", "turned")] == SHARED
    assert not any("other" in pair for pair in found)
    same = find_links([describe_image(slide), describe_image(slide.flip(1))])
    assert same == {(0, 1): SAME}


def test_flips_and_turns_change_neither_descriptor_nor_digest(slides):
    slide = slides[2]
    for copy in (slide.flip(1), slide.flip(2), slide.transpose(1, 2), slide.rot90(1, (1, 2))):
        np.testing.assert_allclose(appearance(copy), appearance(slide), rtol=0.02, atol=0.02)
        assert pixel_digest(copy.numpy()) == pixel_digest(slide.numpy())
        grey, turned = slide.numpy().mean(axis=0), copy.numpy().mean(axis=0)
        alike = (find_spots(-turned / 100) @ find_spots(-grey / 100).T).max(axis=1)
        assert np.median(alike) > 0.999
    changed = slide.clone()
    changed[0, 0, 0] ^= 1
    assert pixel_digest(changed.numpy()) != pixel_digest(slide.numpy())


def test_the_distance_is_small_within_a_slide(dataset, pieces):
    distances = appearance_distances([describe_image(pieces[name]) for name in dataset.sample_ids])
    slide = np.array([name[0] for name in dataset.sample_ids])
    within = slide[:, None] == slide
    np.testing.assert_allclose(distances, distances.T)
    assert np.diag(distances).max() == 0
    assert distances[within].max() < distances[~within].min()


def test_images_too_small_for_anything_are_described(tmp_path):
    rng = np.random.default_rng(0)
    images = {
        name: torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8))
        for name, size in {"a": (1, 1), "b": (2, 40), "c": (33, 5), "d": (90, 100)}.items()
    }
    images["e"] = torch.full((3, 50, 60), 255, dtype=torch.uint8)
    images["f"] = torch.zeros((3, 100, 80), dtype=torch.uint8)
    dataset = write(tmp_path, images)
    groups = group_by_similarity(dataset)
    assert sorted(groups) == list("abcdef") and len(set(groups.values())) == 6
    assert group_by_similarity(dataset.subset(["a"])) == {"a": 1}


@pytest.mark.parametrize("max_share", [0, -1, 1.5, float("nan")])
def test_a_share_that_cannot_be_is_refused(max_share, dataset):
    with pytest.raises(SettingsError, match="max_share is"):
        group_by_similarity(dataset, max_share=max_share)


def test_each_validation_image_meets_its_nearest_training_image(dataset, pieces, tmp_path):
    images = dict(pieces) | {"copy": pieces["2c"].flip(2)}
    whole = write(tmp_path, images)
    found = nearest_training_images(whole, ["0a", "1a", "1b", "2c"], ["0b", "1d", "copy"])
    assert found[0] == Nearest("copy", "2c", 0.0, SAME)
    nearest = {pair.val_id: (pair.train_id, pair.cue) for pair in found}
    assert nearest["0b"] == ("0a", BORDER) and nearest["1d"] == ("1b", BORDER)
    distances = [pair.distance for pair in found]
    assert distances == sorted(distances) and distances[1] > 0


@pytest.mark.parametrize("sides", [([], ["0a"]), (["0a"], []), (["0a", "0b"], ["0b"])])
def test_sides_that_overlap_or_are_empty_are_refused(sides, dataset):
    with pytest.raises(SettingsError, match="give two sides that have nothing in common"):
        nearest_training_images(dataset, *sides)


def test_the_table_counts_what_leaks():
    pairs = [
        Nearest("a", "x", 0.0, SAME),
        Nearest("b", "x", 0.9, LOOKS),
        Nearest("c", "y", 2, LOOKS),
    ]
    text = leaks_table(pairs, rows=2)
    assert "1 the same pixels, 2 colour and texture" in text
    assert "| a | x | 0.000 | the same pixels |" in text and "| c |" not in text
    odd = leaks_table([Nearest("a|*b*", "<i>", 0.0, SAME)])
    assert "| a&#124;&#42;b&#42; | &#60;i&#62; | 0.000 |" in odd


def test_the_figure_shows_both_images_of_each_pair(dataset):
    pairs = nearest_training_images(dataset, ["0a", "1a", "2a"], ["0b", "1b", "2d"])
    figure = plot_leaks(pairs, dataset, pairs=2)
    axes = [axis for part in figure.subfigs for axis in part.axes]
    titles = [axis.get_title() for axis in axes]
    assert titles == [
        f"{side} {name}"
        for pair in pairs[:2]
        for side, name in (("validation", pair.val_id), ("training", pair.train_id))
    ]
    with pytest.raises(ValueError, match="no pair"):
        plot_leaks([], dataset)


@real_data
@pytest.mark.slow
def test_pieces_of_real_tiles_are_kept_together():
    folder = Path(os.environ["CELLSEG_DATA"]) / "consep"
    dataset = CellDataset(folder / "hw3-data-release" / "train", channel_order="true")
    start = time.process_time()
    groups = group_by_similarity(dataset)
    assert time.process_time() - start < 60
    found = pair_agreement(groups, tiles_of(folder / "provenance.json"))
    assert found.recall >= 0.9 and found.precision >= 0.5 and found.largest <= 0.15

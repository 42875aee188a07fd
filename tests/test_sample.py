"""Made tissue: the genuine layout, its quirks, its sizes, and the same bytes every time."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg.data.release import find_release, read_test_index
from cellseg.data.sample import make_sample_release
from cellseg.data.tissue import AREAS, DENSITY, make_tissue
from cellseg.errors import DataError, SettingsError
from cellseg.files import digest_files


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample") / "hw3-data-release"
    return make_sample_release(root, train_images=5, test_images=2, image_size=160)


def digest(root: Path) -> str:
    return digest_files(sorted(path for path in root.rglob("*") if path.is_file()))


def ids_by_file(folder: Path) -> dict[str, list[int]]:
    return {
        path.name: np.unique(tifffile.imread(path))[1:].astype(int).tolist()
        for path in sorted(folder.glob("class*.tif"))
    }


def test_same_arguments_give_the_same_bytes(release, tmp_path):
    arguments = {"train_images": 5, "test_images": 2, "image_size": 160}
    again = make_sample_release(tmp_path / "again", **arguments)
    other = make_sample_release(tmp_path / "other", **arguments, seed=1)
    assert digest(again.root) == digest(release.root) != digest(other.root)


def test_layout_is_found_as_a_release(release, tmp_path):
    assert find_release(tmp_path, release_dir=release.root) == release
    assert find_release(release.root.parent, extra_places=[]) == release
    index = read_test_index(release.index_path)
    assert [entry.image_id for entry in index] == [1, 2]
    for entry in index:
        image = tifffile.imread(release.test_dir / entry.file_name)
        assert image.shape == (entry.height, entry.width, 4)


def test_images_and_maps_are_stored_as_the_genuine_ones(release):
    for folder in release.train_dir.iterdir():
        with tifffile.TiffFile(folder / "image.tif") as file:
            page = file.pages[0]
            assert (page.compression.name, int(page.predictor)) == ("LZW", 2)
            assert page.shape[2] == 4 and page.dtype == np.uint8
            assert page.shape[0] != page.shape[1]
        for path in folder.glob("class*.tif"):
            with tifffile.TiffFile(path) as file:
                assert file.pages[0].compression.name == "NONE"
                assert file.pages[0].dtype == np.float64
                assert file.pages[0].shape == page.shape[:2]


def test_ids_run_on_across_files_with_gaps_and_no_cell_twice(release):
    gaps = 0
    for folder in release.train_dir.iterdir():
        ids = [number for numbers in ids_by_file(folder).values() for number in numbers]
        assert ids == sorted(set(ids))
        gaps += sum(after - before > 1 for before, after in zip([0, *ids], ids, strict=False))
        covered = sum((tifffile.imread(path) > 0).astype(int) for path in folder.glob("class*.tif"))
        assert np.max(covered) <= 1
    assert gaps > 0


def test_there_is_an_empty_a_poor_and_a_dense_image(release):
    files = [ids_by_file(folder) for folder in release.train_dir.iterdir()]
    assert sum(not names for names in files) == 1
    assert sum(set(names) == {"class1.tif", "class2.tif"} for names in files) == 1
    counts = sorted(sum(map(len, names.values())) for names in files)
    assert counts[-1] > 1.3 * counts[-2]


def test_red_and_blue_are_swapped_on_disk(release):
    for folder in release.train_dir.iterdir():
        maps = [tifffile.imread(path) for path in folder.glob("class*.tif")]
        if maps:
            image = tifffile.imread(folder / "image.tif").astype(int)
            inside, difference = sum(maps) > 0, image[..., 2] - image[..., 0]
            assert difference[inside].mean() - difference[~inside].mean() < -10


def test_sizes_and_shares_are_those_of_the_field():
    maps = [make_tissue(250, 270, seed=seed)[1] for seed in range(6)]
    areas = {k: [] for k in range(1, 5)}
    for ids in maps:
        for kind, layer in ids.items():
            areas[kind] += [n for n in np.bincount(layer.ravel())[1:] if n]
    total = sum(map(len, areas.values()))
    for kind, share in zip(areas, (0.38, 0.38, 0.12, 0.12), strict=True):
        assert len(areas[kind]) / total == pytest.approx(share, abs=0.03)
        assert np.median(areas[kind]) == pytest.approx(AREAS[kind - 1], rel=0.2)
    assert total / (6 * 250 * 270) == pytest.approx(DENSITY, rel=0.05)


def test_tissue_is_rgb_and_empty_without_density():
    image, maps = make_tissue(40, 33, density=0.0)
    assert image.shape == (40, 33, 3) and image.dtype == np.uint8 and maps == {}
    image, maps = make_tissue(120, 150, shares=(0, 1, 0, 0), density=2e-3, seed=4)
    assert list(maps) == [2] and maps[2].dtype == np.int32
    assert np.unique(maps[2]).tolist() == list(range(37))


def test_a_second_call_does_nothing_and_another_draws_anew(tmp_path):
    arguments = {"train_images": 1, "test_images": 1, "image_size": 48}
    release = make_sample_release(tmp_path, **arguments)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tif")}
    make_sample_release(tmp_path, **arguments)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tif")}
    make_sample_release(tmp_path, **arguments, seed=7)
    assert len(list(release.train_dir.iterdir())) == 1
    assert not times.keys() & set(tmp_path.rglob("*.tif"))


def test_a_broken_drawing_is_drawn_again(tmp_path):
    arguments = {"train_images": 1, "test_images": 1, "image_size": 48}
    release = make_sample_release(tmp_path, **arguments)
    release.index_path.unlink()
    index = make_sample_release(tmp_path, **arguments).index_path
    assert len(json.loads(index.read_text(encoding="utf-8"))) == 1


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {"train_images": -1}, {"seed": -1}], ids=str)
def test_numbers_that_cannot_be_are_told_before_anything_is_drawn(wrong, tmp_path):
    [name] = wrong
    with pytest.raises(SettingsError, match=f"{name} is {wrong[name]}; give"):
        make_sample_release(tmp_path, **{"train_images": 1, "test_images": 0} | wrong)
    assert not list(tmp_path.iterdir())


def test_data_that_is_no_made_tissue_is_left_alone(tmp_path):
    (tmp_path / "train" / "patient").mkdir(parents=True)
    with pytest.raises(DataError, match="choose another folder"):
        make_sample_release(tmp_path, train_images=1, test_images=0)
    assert (tmp_path / "train" / "patient").is_dir()

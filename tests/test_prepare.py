"""What one setting may name: a COCO file, folders of label maps, or a release."""

import pytest
from data_files import plain_image, write_png
from tiny_sets import (
    RECTANGLE,
    SIZE,
    SPOTS,
    TWO_CELLS,
    annotation,
    read_masks,
    write_labels_set,
    write_set,
)

from cellseg import interchange
from cellseg.data import CellDataset, find_release, make_sample_release, read_sample
from cellseg.errors import DataError


def test_one_setting_takes_a_coco_file_and_imports_it_once(tmp_path):
    path, images = write_set(tmp_path / "set", [annotation([RECTANGLE])])
    cache = tmp_path / "runs" / "imported"
    first = interchange.prepare_release(path, cache)
    made = (first.train_dir / "a" / "class1.tif").stat().st_mtime_ns
    assert first.class_names == ("spindle", "round")
    assert len(CellDataset(first.train_dir, class_names=first.class_names)) == 1
    assert interchange.prepare_release(str(path), cache) == first
    assert interchange.prepare_release(tmp_path / "set", cache).class_names == first.class_names
    assert (first.train_dir / "a" / "class1.tif").stat().st_mtime_ns == made

    write_png(images / "a.png", plain_image(*SIZE, (1, 2, 3)))
    second = interchange.prepare_release(path, cache)
    assert second.root != first.root
    assert read_sample(second.train_dir / "a")[0][0, 0].tolist() == [1, 2, 3]


LAYOUTS = [
    ("images", ".", "images beside the file, in images/"),
    (".", ".", "images beside the file"),
    ("val2017", "annotations", "COCO's own folders"),
    ("train", "train", "the file among the images of a train/"),
]


@pytest.mark.parametrize(("images", "place", "layout"), LAYOUTS, ids=[row[2] for row in LAYOUTS])
def test_images_are_found_where_tools_put_them(tmp_path, images, place, layout):
    path, written = write_set(tmp_path / "made", [annotation([RECTANGLE])])
    root = tmp_path / "set"
    for folder in (root / images, root / place):
        folder.mkdir(parents=True, exist_ok=True)
    (written / "a.png").rename(root / images / "a.png")
    path.rename(root / place / "instances_val2017.json")
    named = root if layout.endswith("train/") else root / place / "instances_val2017.json"
    release = interchange.prepare_release(named, tmp_path / "cache")
    assert len(read_masks(release.train_dir / "a")) == 1


def test_images_above_the_folder_one_works_in_are_found(tmp_path, monkeypatch):
    path, _ = write_set(tmp_path, [annotation([RECTANGLE])])
    (tmp_path / "annotations").mkdir()
    path.rename(tmp_path / "annotations" / "set.json")
    monkeypatch.chdir(tmp_path / "annotations")
    release = interchange.prepare_release("set.json", tmp_path / "cache")
    assert len(read_masks(release.train_dir / "a")) == 1


def test_one_setting_takes_folders_of_label_maps(tmp_path):
    one = write_labels_set(tmp_path / "one", {"labels/a.tif": TWO_CELLS})
    two = write_labels_set(tmp_path / "two", {"masks/x/a.tif": TWO_CELLS, "masks/y/b.tif": SPOTS})
    three = write_labels_set(tmp_path / "three", {"x/a.tif": TWO_CELLS})
    found = [
        interchange.prepare_release(folder, tmp_path / "cache") for folder in (one, two, three)
    ]
    assert [release.class_names for release in found] == [("cell",), ("x", "y"), ("x",)]


def test_one_setting_still_takes_a_release(tmp_path):
    made = make_sample_release(tmp_path / "data", train_images=2, test_images=1, image_size=48)
    (tmp_path / "test-results.json").write_text("[]")  # a result is no annotation
    release = interchange.prepare_release(tmp_path, tmp_path / "cache")
    assert (release.train_dir, release.class_names) == (made.train_dir, None)
    assert (
        interchange.prepare_release(None, tmp_path / "cache", project_dir=tmp_path / "no") is None
    )
    with pytest.raises(DataError, match="does not exist"):
        interchange.prepare_release(tmp_path / "gone", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_settings_that_name_too_much_or_too_little_are_refused(tmp_path):
    path, images = write_set(tmp_path, [])
    (images / "a.png").rename(images / "b.png")
    with pytest.raises(DataError, match="are not near it"):
        interchange.prepare_release(path, tmp_path / "cache")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other\.json, set\.json; set release_dir"):
        interchange.prepare_release(tmp_path, tmp_path / "cache")
    (tmp_path / "class_names.json").write_text("[1]")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no list of class names"):
        find_release(release_dir=tmp_path)

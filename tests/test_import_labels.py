"""Label maps in: of one class and of several, and what is refused."""

import numpy as np
import pytest
from tiny_sets import SPOTS, TWO_CELLS, mask_of, read_masks, write_labels_set

from cellseg import interchange
from cellseg.errors import DataError, SettingsError


def test_label_maps_of_one_class(tmp_path):
    maps = {"labels/a.tif": TWO_CELLS, "labels/b.tif": 0 * TWO_CELLS, "labels/z.tif": TWO_CELLS}
    write_labels_set(tmp_path, maps, images=("a", "b", "c"))
    imported = interchange.import_labels(tmp_path / "labels", tmp_path / "images", tmp_path / "out")
    assert (imported.class_names, imported.cells, imported.empty_images) == (("cell",), [2], 1)
    assert imported.left_out == {"images without a label map": 1, "label maps without an image": 1}
    cells = read_masks(tmp_path / "out" / "train" / "a", ["cell"])
    assert [mask.sum() for _, mask in cells] == [4, 4]


@pytest.mark.parametrize("labels", ["labels", "."], ids=["in labels/", "beside images/"])
def test_label_maps_of_several_classes(tmp_path, labels):
    maps = {f"{labels}/class{k}/a.tif": mask_of((0, 0, k, 1)) * 1 for k in (1, 2, 10)}
    write_labels_set(tmp_path, maps | {f"{labels}/class2/b.tif": TWO_CELLS})
    imported = interchange.import_labels(tmp_path / labels, tmp_path / "images", tmp_path / "out")
    assert imported.class_names == ("class1", "class2", "class10")
    assert imported.cells == [1, 3, 1]
    cells = read_masks(tmp_path / "out" / "train" / "a", imported.class_names)
    assert [(label, mask.sum()) for label, mask in cells] == [(1, 1), (2, 2), (3, 10 - 1)]


BAD_LABELS = [
    ({"labels/a_mask.tif": TWO_CELLS}, ["none of the 2 images", "a, b", "alike"], "other names"),
    ({"labels/a.tif": TWO_CELLS.T}, ["a.tif has 9 x 6", "a.png has"], "sizes differ"),
    ({"labels/a.tif": TWO_CELLS, "labels/a.tiff": TWO_CELLS}, ["both a.tif"], "two of one name"),
    ({"labels/a.tif": SPOTS, "labels/b.tif": SPOTS}, ["several pieces", "number"], "yes or no"),
    ({"labels/a.tif": np.dstack([TWO_CELLS] * 3)}, ["a.tif", "single plane"], "a colour picture"),
]


@pytest.mark.parametrize(("maps", "words", "reason"), BAD_LABELS, ids=[r[2] for r in BAD_LABELS])
def test_bad_label_maps_are_refused_by_name_value_and_remedy(tmp_path, maps, words, reason):
    write_labels_set(tmp_path / "set", maps)
    with pytest.raises(DataError) as caught:
        interchange.import_labels(
            tmp_path / "set/labels", tmp_path / "set/images", tmp_path / "out"
        )
    for word in words:
        assert word in str(caught.value), reason
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_labels_and_images_in_one_folder_cannot_be_told_apart(tmp_path):
    write_labels_set(tmp_path, {})
    with pytest.raises(SettingsError, match="part them"):
        interchange.import_labels(tmp_path / "images", tmp_path / "images", tmp_path / "out")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        interchange.import_labels(tmp_path / "nowhere", tmp_path / "images", tmp_path / "out")

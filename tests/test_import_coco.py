"""COCO files in: the pixels that pycocotools gives, and what is refused."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools.coco import COCO
from tiny_sets import (
    RECTANGLE,
    RING,
    SIZE,
    annotation,
    mask_of,
    read_masks,
    write_set,
)

from cellseg import interchange
from cellseg.coco import mask_to_rle
from cellseg.data import CellDataset, find_release, read_sample
from cellseg.errors import DataError, SettingsError
from cellseg.interchange import storing


def import_one(tmp_path, annotations, **keys):
    """Import a set of one image; return what was imported and the cells read back."""
    imported = interchange.import_coco(*write_set(tmp_path, annotations, **keys), tmp_path / "out")
    return imported, read_masks(tmp_path / "out" / "train" / "a")


def test_a_rectangle_becomes_its_pixels_and_categories_count_from_1_in_order_of_ids(tmp_path):
    imported, cells = import_one(tmp_path, [annotation([RECTANGLE], 7)])
    assert imported.class_names == ("spindle", "round")
    assert imported.cells == [0, 1]
    assert [label for label, _ in cells] == [2]
    assert np.array_equal(cells[0][1], mask_of((2, 1, 6, 4)))
    release = find_release(release_dir=tmp_path / "out")
    assert release.class_names == ("spindle", "round")
    assert "class2 round: 1 cells" in imported.summary()


def uncompressed(mask):
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


FORMS = [
    ([RECTANGLE], "a polygon"),
    ([[1.5, 0.7, 7.2, 1.1, 4.4, 5.6]], "a triangle between pixels"),
    ([RECTANGLE, [6.5, 4.5, 9, 4.5, 9, 6, 6.5, 6]], "two parts"),
    ([RECTANGLE, [4, 2, 8, 2, 8, 5, 4, 5]], "two parts that overlap"),
    ([[-3, -2, 4, -2, 4, 3, -3, 3]], "a polygon over the image's edge"),
    (uncompressed(RING), "an RLE as a list, with a hole"),
    (uncompressed(mask_of((0, 0, 2, 6))), "an RLE as a list that begins with the object"),
    (mask_to_rle(RING), "an RLE as text"),
]


@pytest.mark.parametrize(("segmentation", "form"), FORMS, ids=[row[1] for row in FORMS])
def test_every_form_of_a_mask_has_the_pixels_that_pycocotools_gives_it(
    tmp_path, segmentation, form
):
    _, cells = import_one(tmp_path, [annotation(segmentation)])
    sized = [{"id": 5, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}]
    path, _ = write_set(tmp_path, [annotation(segmentation)], images=sized)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
    expected = coco.annToMask(coco.anns[1]).astype(bool)
    assert expected.any()
    assert np.array_equal(cells[0][1], expected), form


def test_what_is_left_out_is_counted(tmp_path):
    crowd = annotation({"size": list(SIZE), "counts": "damaged"}, iscrowd=1)
    sliver = annotation([[2.1, 1.1, 2.2, 1.1, 2.2, 1.2]])
    again = annotation(uncompressed(mask_of((2, 1, 6, 4))))
    imported, cells = import_one(tmp_path, [annotation([RECTANGLE]), again, sliver, crowd])
    assert len(cells) == 1
    assert imported.left_out == {
        "crowd regions": 1,
        "masks without a pixel": 1,
        "masks that repeat another of their class": 1,
    }
    assert "left out: 1 crowd regions" in imported.summary()


def test_cells_of_a_class_that_overlap_get_a_page_each_time_they_must(tmp_path):
    boxes = [(0, 0, 3, 6), (2, 0, 5, 6), (4, 0, 8, 6), (8, 0, 9, 1)]
    rows = [annotation(mask_to_rle(mask_of(box))) for box in boxes]
    imported, cells = import_one(tmp_path, rows)
    assert [mask.sum() for _, mask in cells] == [18, 18, 24, 1]
    pages = tifffile.imread(tmp_path / "out" / "train" / "a" / "class1.tif")
    assert pages.dtype == np.uint16
    assert [np.unique(page).tolist() for page in pages] == [[0, 1, 3, 4], [0, 2]]
    assert imported.further_pages == 1
    assert "1 cells lie over others" in imported.summary()


def test_an_image_without_cells_is_a_negative_and_jpegs_become_tiffs(tmp_path):
    path, images = write_set(tmp_path, [], names=("a.png", "b.jpg"))
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(noise).save(images / "b.jpg")
    imported = interchange.import_coco(path, images, tmp_path / "out")
    assert (imported.images, imported.empty_images) == (2, 2)
    image, target = read_sample(tmp_path / "out" / "train" / "b", ["x", "y"])
    assert np.array_equal(image, np.asarray(Image.open(images / "b.jpg")))
    assert len(target["labels"]) == 0


def test_names_with_folders_or_alike_give_samples_of_their_own(tmp_path):
    names = ("x/a.png", "y/a.png", "x__a.png", ".b.png", "_c.png", "X/A.tif")
    path, images = write_set(tmp_path, [], names=names)
    interchange.import_coco(path, images, tmp_path / "out")
    found = CellDataset(tmp_path / "out" / "train").sample_ids
    assert found == ["X__A-3", "b", "image_c", "x__a", "x__a-2", "y__a"]


def test_a_long_name_in_any_script_is_cut_to_what_a_file_system_takes(tmp_path):
    word = "細" * 60  # 180 bytes
    path, images = write_set(tmp_path, [], names=(f"{word}/{word}.png", f"{word}/{word}2.png"))
    assert interchange.import_coco(path, images, tmp_path / "out").images == 2
    assert CellDataset(tmp_path / "out" / "train").sample_ids == ["細" * 50, "細" * 50 + "-2"]


def test_images_are_found_without_the_folders_of_the_machine_that_annotated_them(tmp_path):
    path, images = write_set(tmp_path, [annotation([RECTANGLE])])
    strange = (r"C:\Users\me\a.png", "/home/me/a.png", "../../a.png", "deep/a.png")
    for number, name in enumerate(strange):
        content = json.loads(path.read_text())
        content["images"][0]["file_name"] = name
        path.write_text(json.dumps(content))
        out = tmp_path / str(number)
        interchange.import_coco(path, images, out)
        assert len(list((out / "train").iterdir())) == 1


def changed(key, **values):
    """Return a change of the first row of a list of a COCO file."""
    return lambda content: content[key][0].update(values)


def rle(counts, size=SIZE):
    return {"size": list(size), "counts": counts}


HOSTILE = [
    (lambda c: c.pop("categories"), ["'categories'"], "no categories"),
    (lambda c: c.update(images=[]), ["no images"], "no image"),
    (lambda c: c.update(annotations=[3]), ["'annotations'"], "a number for an annotation"),
    (changed("images", id="5"), ["image 0", "'5'"], "an id as text"),
    (changed("images", file_name=None), ["image 5", "file_name None"], "no file name"),
    (changed("images", file_name="gone.png"), ["lacks 1 of 1", "gone.png"], "no such image"),
    (changed("images", file_name="x" * 300), ["lacks 1 of 1"], "a name longer than any file's"),
    (changed("images", file_name="a\0.png"), ["lacks 1 of 1"], "a name with a zero"),
    (changed("images", file_name=".."), ["lacks 1 of 1"], "a name that is no file"),
    (changed("images", height=9, width=6), ["a.png has 6 x 9", "9 x 6"], "axes swapped"),
    (changed("images", height=0, width=9), ["image 5", "height 0"], "no height"),
    (lambda c: c["images"].append({"id": 5, "file_name": "b"}), ["id 5"], "an image id twice"),
    (
        lambda c: c["images"].append({"id": 9, "file_name": "q/a.png"}),
        ["images 5 and 9", "one file", "merge"],
        "one file under two ids",
    ),
    (
        lambda c: c["categories"].append({"id": 4, "name": "round"}),
        ["'round'", "own name"],
        "two categories of one name",
    ),
    (
        lambda c: c["annotations"].append(dict(c["annotations"][0])),
        ["annotation 1", "twice", "anew"],
        "an annotation id twice",
    ),
    (changed("annotations", image_id=6), ["annotation 1", "image_id 6"], "an unknown image"),
    (changed("annotations", category_id=1), ["annotation 1", "category_id 1"], "unknown class"),
    (changed("annotations", iscrowd="no"), ["annotation 1", "'no'"], "iscrowd is a text"),
    (changed("annotations", segmentation=None), ["annotation 1", "None"], "boxes only"),
    (changed("annotations", segmentation=[]), ["annotation 1", "[]"], "no polygon"),
    (changed("annotations", segmentation=[[1, 2, 3, 4]]), ["three points"], "a line (or a box)"),
    (changed("annotations", segmentation=[[1, 2] * 3 + [1]]), ["three points"], "an odd number"),
    (changed("annotations", segmentation=[RECTANGLE, 3]), ["polygon 3"], "a number for a polygon"),
    (changed("annotations", segmentation=[["1"] * 6]), ["coordinate '1'"], "numbers as text"),
    (changed("annotations", segmentation=[[1, 2, 3, 4, 5, float("nan")]]), ["nan"], "no number"),
    (changed("annotations", segmentation=[[1, 2, 3, 4, 1e300, 1]]), ["1e+300"], "far outside"),
    (
        changed("annotations", segmentation=[[0, 0, 18, 12] * 40_000]),
        ["outline", "1,000,000"],
        "an endless outline",
    ),
    (changed("annotations", segmentation=rle([54], (9, 6))), ["[9, 6]"], "size of axes swapped"),
    (changed("annotations", segmentation=rle([10, 5])), ["cover 15", "6 x 9"], "too few runs"),
    (changed("annotations", segmentation=rle([60, -6])), ["run lengths"], "a negative run"),
    (changed("annotations", segmentation=rle([10**30])), ["run lengths"], "a run without end"),
    (changed("annotations", segmentation=rle("~~")), ["runs that cover"], "counts are no RLE"),
    (changed("annotations", segmentation=rle(None)), ["counts None"], "no counts"),
]


@pytest.mark.parametrize(("damage", "words", "reason"), HOSTILE, ids=[row[2] for row in HOSTILE])
def test_bad_coco_files_are_refused_by_name_value_and_remedy(tmp_path, damage, words, reason):
    path, images = write_set(tmp_path, [annotation([RECTANGLE])])
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        interchange.import_coco(path, images, tmp_path / "out")
    for word in (*words, str(tmp_path)):
        assert word in str(caught.value), reason
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "set.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\ud800"])
def test_what_is_no_coco_file_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"x\.json"):
        interchange.read_coco(path)


def test_nothing_is_written_over_and_a_broken_image_leaves_nothing(tmp_path):
    path, images = write_set(tmp_path, [annotation([RECTANGLE])], names=("a.png", "b.png"))
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"b\.png is damaged"):
        interchange.import_coco(path, images, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "set.json"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(SettingsError, match="exists already"):
        interchange.import_coco(path, images, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_images_of_other_kinds_are_refused_by_name(tmp_path):
    path, images = write_set(tmp_path, [], names=("a.jpg",))
    (images / "a.jpg").write_text("<html>")
    with pytest.raises(DataError, match=r"a\.jpg is damaged"):
        interchange.import_coco(path, images, tmp_path / "out")


def test_summary_of_nothing():
    assert "class1 x: 0 cells" in storing.Imported(Path("out"), ("x",)).summary()

"""Data of other tools in, cells for other tools out: by hand, by round trip, against originals."""

import contextlib
import csv
import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile
from data_files import plain_image, write_png, write_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools.coco import COCO
from skimage.measure import label as connected_pieces
from skimage.measure import regionprops_table
from typer.testing import CliRunner

from cellseg import cli, interchange
from cellseg.coco import make_records, mask_to_rle, rle_to_mask, write_records
from cellseg.data import CellDataset, find_release, make_sample_release, read_sample
from cellseg.data.release import INDEX_NAME
from cellseg.errors import DataError, SettingsError
from cellseg.evaluation import dataset_truth
from cellseg.interchange import masks, storing
from cellseg.overlap import MaskLine

SIZE = (6, 9)  # height, width
RECTANGLE = [2, 1, 6, 1, 6, 4, 2, 4]  # 4 wide, 3 high
CATEGORIES = [{"id": 7, "name": "round"}, {"id": 3, "name": "spindle"}]
MASKS = hnp.arrays(bool, (6, 9))


def mask_of(*boxes, size=SIZE):
    """Return a mask that is True in boxes (x1, y1, x2, y2)."""
    mask = np.zeros(size, bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def annotation(segmentation, category_id=3, **keys):
    return {"image_id": 5, "category_id": category_id, "segmentation": segmentation, **keys}


def write_set(folder, annotations, *, names=("a.png",), categories=CATEGORIES, **keys):
    """Write images 5, 6, ... of one size and a COCO file; return it and the images' folder."""
    images = [{"id": 5 + k, "file_name": name} for k, name in enumerate(names)]
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(folder / "images" / name, plain_image(*SIZE))
    numbered = [{"id": k, **row} for k, row in enumerate(annotations, start=1)]
    content = {"images": images, "annotations": numbered, "categories": categories} | keys
    (folder / "set.json").write_text(json.dumps(content))
    return folder / "set.json", folder / "images"


def read_masks(sample, class_names=("spindle", "round")):
    """Return (label, mask) of each cell of a sample folder."""
    _, target = read_sample(sample, class_names)
    cells = enumerate(target["labels"].tolist(), start=1)
    return [(label, (target["instance_map"] == k).any(axis=0)) for k, label in cells]


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


RING = mask_of((1, 1, 6, 5)) & ~mask_of((3, 2, 4, 4))
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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2]), MASKS), max_size=6))
def test_masks_survive_out_and_in_however_they_overlap(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("trip")
    given_cells = {(label, mask.tobytes()): (label, mask) for label, mask in drawn if mask.any()}
    labels = [label for label, _ in given_cells.values()]
    rles = [mask_to_rle(mask) for _, mask in given_cells.values()]
    path = write_png(folder / "a.png", plain_image(*SIZE))
    pictures = interchange.list_pictures(path)
    records = make_records(1, labels, np.linspace(1, 0.5, len(labels)), rles)
    cells = interchange.cells_by_picture(pictures, records)

    interchange.write_coco(folder / "out.json", pictures, cells, ["one", "two"])
    interchange.import_coco(folder / "out.json", folder, folder / "in")

    found = read_masks(folder / "in" / "train" / "a", ["one", "two"])
    order = np.argsort(labels, kind="stable")
    assert [label for label, _ in found] == [labels[k] for k in order]
    for k, (_, mask) in zip(order, found, strict=True):
        assert np.array_equal(mask, rle_to_mask(rles[k]))


def test_coco_out_is_what_pycocotools_reads(tmp_path):
    truth = {1: mask_of((0, 0, 2, 3)) * 4 + mask_of((5, 2, 9, 6)) * 9, 2: mask_of((3, 0, 4, 1)) * 1}
    write_sample(tmp_path / "train" / "a", plain_image(*SIZE), truth)
    dataset = CellDataset(tmp_path / "train", class_names=("one", "two"))
    pictures = interchange.pictures_of_samples(dataset)
    cells = interchange.cells_by_picture(pictures, dataset_truth(dataset)["annotations"])
    interchange.write_coco(tmp_path / "out.json", pictures, cells, dataset.class_names)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "out.json")
    assert coco.imgs == {1: {"id": 1, "file_name": "a/image.tif", "height": 6, "width": 9}}
    assert [cat["name"] for cat in coco.loadCats([1, 2])] == ["one", "two"]
    assert [ann["area"] for ann in coco.anns.values()] == [6, 16, 1]
    assert coco.anns[2]["bbox"] == [5, 2, 4, 4] and "score" not in coco.anns[2]
    assert np.array_equal(coco.annToMask(coco.anns[2]), mask_of((5, 2, 9, 6)))
    imported = interchange.import_coco(tmp_path / "out.json", tmp_path / "train", tmp_path / "in")
    assert imported.cells == [2, 1]


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


def write_labels_set(folder, maps, images=("a", "b")):
    """Write images a.png, ... and label maps {path: ids}."""
    (folder / "images").mkdir(parents=True)
    for name in images:
        write_png(folder / "images" / f"{name}.png", plain_image(*SIZE))
    for name, ids in maps.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / name, np.asarray(ids, np.uint16))
    return folder


TWO_CELLS = mask_of((0, 0, 2, 2)) * 1 + mask_of((2, 0, 4, 2)) * 5


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


SPOTS = mask_of((0, 0, 1, 1), (2, 0, 3, 1), (4, 0, 5, 1), (6, 0, 7, 1)) * 255
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


def test_ring_of_a_rectangle_by_hand():
    polygons = interchange.mask_to_polygons(np.ones((3, 4), bool), (2, 1))
    assert polygons == [[[(2, 1), (6, 1), (6, 4), (2, 4), (2, 1)]]]
    assert interchange.ring_area(polygons[0][0]) == 12


def test_a_hole_is_an_inner_ring_that_turns_the_other_way():
    [[outer, hole]] = interchange.mask_to_polygons(RING)
    assert outer == [(1, 1), (6, 1), (6, 5), (1, 5), (1, 1)]
    assert hole == [(3, 2), (3, 4), (4, 4), (4, 2), (3, 2)]
    assert (interchange.ring_area(outer), interchange.ring_area(hole)) == (20, -2)


CORNERS = [
    (["10", "01"], [[1], [1]], "two pixels that touch at a corner are two pieces"),
    (["111", "101", "110"], [[8, -1]], "a loop that closes at a corner has a hole"),
    (["1111", "1011", "1101", "1111"], [[16, -1, -1]], "two holes that touch at a corner"),
    (["111", "101", "111"], [[9, -1]], "a hole"),
    (["11111", "10001", "10101", "10001", "11111"], [[25, -9], [1]], "a piece in a hole"),
]


@pytest.mark.parametrize(("rows", "areas", "reason"), CORNERS, ids=[row[2] for row in CORNERS])
def test_where_pixels_touch_at_corners(rows, areas, reason):
    mask = np.array([[value == "1" for value in row] for row in rows])
    polygons = interchange.mask_to_polygons(mask)
    assert [[interchange.ring_area(ring) for ring in rings] for rings in polygons] == areas, reason


def inside(rings, x, y):
    """Tell by even crossings of a ray to the left whether a point lies in the rings."""
    crossings = 0
    for ring in rings:
        for (x1, y1), (x2, y2) in pairwise(ring):
            crossings += x1 == x2 and x1 < x and min(y1, y2) < y < max(y1, y2)
    return crossings % 2 == 1


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8)))
def test_rings_enclose_exactly_the_pixels(mask):
    polygons = interchange.mask_to_polygons(mask)
    pieces = connected_pieces(mask, connectivity=1)
    assert len(polygons) == pieces.max()
    for number, rings in enumerate(polygons, start=1):
        areas = [interchange.ring_area(ring) for ring in rings]
        assert areas[0] > 0 and all(area < 0 for area in areas[1:])
        assert sum(areas) == (pieces == number).sum()
        for ring in rings:
            assert ring[0] == ring[-1]
            assert len(set(ring)) == len(ring) - 1  # passes no corner twice
            assert all((x1 == x2) != (y1 == y2) for (x1, y1), (x2, y2) in pairwise(ring))
    every_ring = [ring for rings in polygons for ring in rings]
    assert sum(map(interchange.ring_area, every_ring)) == mask.sum()
    drawn = [
        [inside(every_ring, x + 0.5, y + 0.5) for x in range(mask.shape[1])]
        for y in range(mask.shape[0])
    ]
    assert np.array_equal(drawn, mask)


@settings(max_examples=60, deadline=None)
@given(st.lists(MASKS, max_size=4))
def test_crops_are_the_masks_in_their_boxes(drawn):
    line = MaskLine.from_rles([mask_to_rle(mask) for mask in drawn])
    for mask, crop, (x1, y1, x2, y2) in zip(drawn, masks.box_masks(line), line.boxes, strict=True):
        assert np.array_equal(crop, mask[y1:y2, x1:x2])
        assert crop.sum() == mask.sum()


def records_of(*cells, image_id=1):
    """Return records of (label, score, mask)."""
    labels, scores, drawn = zip(*cells, strict=True)
    return make_records(image_id, labels, scores, [mask_to_rle(mask) for mask in drawn])


def one_picture(tmp_path, *cells, **options):
    """Write an image and return its picture and the cells in it."""
    image = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(*SIZE, 3)
    pictures = interchange.list_pictures(write_png(tmp_path / "a.png", image))
    return pictures, interchange.cells_by_picture(pictures, records_of(*cells), **options)


def test_geojson_of_a_rectangle_and_of_a_cell_in_two_pieces_by_hand(tmp_path):
    two = mask_of((0, 0, 1, 1), (3, 0, 5, 2))
    pictures, cells = one_picture(tmp_path, (1, 0.9, mask_of((2, 1, 6, 4))), (2, 0.25, two))
    interchange.write_geojson(tmp_path / "out", pictures, cells, ["one", "two"])
    content = json.loads((tmp_path / "out" / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    first, second = content["features"]
    assert first == {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[2, 1], [6, 1], [6, 4], [2, 4], [2, 1]]],
        },
        "properties": {
            "objectType": "detection",
            "classification": {"name": "one", "color": [240, 228, 66]},
            "measurements": {"Score": 0.9},
        },
    }
    assert second["geometry"]["type"] == "MultiPolygon"
    assert second["geometry"]["coordinates"] == [
        [[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]],
        [[[3, 0], [5, 0], [5, 2], [3, 2], [3, 0]]],
    ]
    with pytest.raises(SettingsError, match="object_type is 'cell'"):
        interchange.write_geojson(tmp_path, pictures, cells, ["one", "two"], object_type="cell")


def test_an_image_without_cells_gives_an_empty_collection(tmp_path):
    pictures, cells = one_picture(tmp_path, (1, 0.2, mask_of((0, 0, 1, 1))), score_threshold=0.5)
    interchange.write_geojson(tmp_path, pictures, cells, ["one"])
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []
    interchange.write_labels(tmp_path, pictures, cells, ["one"])
    assert not tifffile.imread(tmp_path / "a.tif").any()
    interchange.write_morphometry(tmp_path / "a.csv", pictures, cells, ["one"])
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1


def test_threshold_and_empty_masks_drop_records_and_truth_has_no_score(tmp_path):
    pictures, cells = one_picture(
        tmp_path,
        (1, 0.5, mask_of((0, 0, 1, 1))),
        (1, 0.9, mask_of((0, 0, 2, 1))),
        (1, 0.49, mask_of((0, 0, 3, 1))),
        (1, 0.9, mask_of()),
        score_threshold=0.5,
    )
    assert [cell["score"] for cell in cells[0]] == [0.9, 0.5]
    truth = [{"image_id": 1, "category_id": 1, "segmentation": mask_to_rle(RING)}]
    assert interchange.cells_by_picture(pictures, truth, score_threshold=0.5) == [truth]


def test_label_map_gives_a_pixel_to_the_better_score(tmp_path):
    low, high, hidden = mask_of((0, 0, 4, 2)), mask_of((2, 0, 6, 2)), mask_of((3, 0, 5, 2))
    pictures, cells = one_picture(tmp_path, (1, 0.6, low), (2, 0.9, high), (1, 0.5, hidden))
    interchange.write_labels(tmp_path / "one", pictures, cells, ["x", "y"])
    drawn = tifffile.imread(tmp_path / "one" / "a.tif")
    assert drawn.dtype == np.uint16 and drawn.shape == SIZE
    assert drawn[0].tolist() == [2, 2, 1, 1, 1, 1, 0, 0, 0]
    rows = list(csv.DictReader((tmp_path / "one" / "labels.csv").open()))
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert [row["class"] for row in rows] == ["y", "x", "x"]
    assert [row["visible_px2"] for row in rows] == ["8", "4", "0"]

    interchange.write_labels(tmp_path / "two", pictures, cells, ["x", "y"], by_class=True)
    first, second = (tifffile.imread(tmp_path / "two" / "a" / f"class{k}.tif") for k in (1, 2))
    assert first[0].tolist() == [1, 1, 1, 1, 2, 0, 0, 0, 0]
    assert second[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_label_maps_come_in_again(tmp_path):
    boxes = [(0, 0, 2, 2), (3, 1, 5, 6), (5, 0, 9, 4)]
    cells = [(1, 0.9 - k / 10, mask_of(box)) for k, box in enumerate(boxes)]
    pictures, kept = one_picture(tmp_path, *cells)
    interchange.write_labels(tmp_path / "labels", pictures, kept, ["x"])
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "images" / "a.png")
    release = interchange.prepare_release(tmp_path, tmp_path / "cache")
    found = read_masks(release.train_dir / "a", release.class_names)
    for (_, mask), box in zip(found, boxes, strict=True):
        assert np.array_equal(mask, mask_of(box))


def test_more_cells_than_16_bits_count():
    dots = [mask_to_rle(mask_of((0, 0, 1, 1))), mask_to_rle(mask_of((2, 2, 3, 3)))]
    line = MaskLine.from_rles(dots)
    assert masks.paint_masks(line, [1, 65_535], SIZE).dtype == np.uint16
    painted = masks.paint_masks(line, [1, 65_536], SIZE)
    assert painted.dtype == np.uint32 and painted[2, 2] == 65_536


def read_table(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_morphometry_of_a_rectangle_by_hand(tmp_path):
    pictures, cells = one_picture(tmp_path, (2, 0.75, mask_of((2, 1, 6, 4))))
    interchange.write_morphometry(tmp_path / "t.csv", pictures, cells, ["x", "y"], pixel_size=0.5)
    [row] = read_table(tmp_path / "t.csv")
    assert [row[k] for k in ("image_id", "image", "cell", "class_id", "class", "score")] == [
        "1", "a", "1", "2", "y", "0.75",
    ]  # fmt: skip
    numbers = {name: float(row[name]) for name in list(row)[6:]}
    assert (numbers["area_px2"], numbers["area_um2"]) == (12, 3)
    assert (numbers["centroid_x_px"], numbers["centroid_y_px"]) == (4, 2.5)
    assert (numbers["centroid_x_um"], numbers["centroid_y_um"]) == (2, 1.25)
    assert (numbers["perimeter_px"], numbers["perimeter_um"]) == (10, 5)  # 2 (4 - 1) + 2 (3 - 1)
    assert numbers["solidity"] == 1
    diameter = np.sqrt(4 * 12 / np.pi)
    assert numbers["equivalent_diameter_px"] == pytest.approx(diameter, rel=1e-5)
    assert numbers["equivalent_diameter_um"] == pytest.approx(diameter / 2, rel=1e-5)
    # Axes of the ellipse of equal second moments, those of the pixels' centres.
    assert numbers["major_axis_px"] == pytest.approx(4 * np.sqrt((4**2 - 1) / 12), rel=1e-5)
    assert numbers["minor_axis_px"] == pytest.approx(4 * np.sqrt((3**2 - 1) / 12), rel=1e-5)
    assert numbers["eccentricity"] == pytest.approx(np.sqrt(1 - 8 / 15), rel=1e-5)
    # The image counts up its values: 27 a row, 3 a column.
    assert [numbers[f"mean_{name}"] for name in ("red", "green", "blue")] == [64.5, 65.5, 66.5]


def test_morphometry_is_that_of_scikit_image_on_the_whole_map():
    rng = np.random.default_rng(3)
    ids = connected_pieces(rng.random((60, 80)) < 0.45, connectivity=1)
    image = rng.integers(0, 256, (60, 80, 3), np.uint8)
    cells = [{"segmentation": mask_to_rle(ids == k)} for k in range(1, ids.max() + 1)]
    rows = list(interchange.measure_cells(image, cells, pixel_size=0.25))
    names = {
        "area": "area_px2", "perimeter": "perimeter_px", "eccentricity": "eccentricity",
        "equivalent_diameter_area": "equivalent_diameter_px", "solidity": "solidity",
        "axis_major_length": "major_axis_px", "axis_minor_length": "minor_axis_px",
        "intensity_mean-0": "mean_red", "intensity_mean-2": "mean_blue",
    }  # fmt: skip
    wanted = [name.split("-")[0] for name in names]
    table = regionprops_table(ids, image, properties=[*dict.fromkeys(wanted), "centroid"])
    assert len(rows) > 50
    for theirs, ours in names.items():
        assert [row[ours] for row in rows] == pytest.approx(table[theirs].tolist(), nan_ok=True)
    assert [row["centroid_x_px"] - 0.5 for row in rows] == pytest.approx(
        table["centroid-1"].tolist()
    )
    assert [row["area_um2"] * 16 for row in rows] == pytest.approx([*table["area"]])


@pytest.mark.parametrize("box", [(3, 3, 4, 4), (0, 5, 9, 6), (8, 0, 9, 6)])
@pytest.mark.filterwarnings("error")
def test_morphometry_of_a_pixel_and_of_lines_is_finite(box):
    cells = [{"segmentation": mask_to_rle(mask_of(box))}]
    [row] = interchange.measure_cells(plain_image(*SIZE), cells)
    assert all(np.isfinite(value) for value in row.values())
    assert row["solidity"] == 1


def test_cells_of_another_image_are_not_measured(tmp_path):
    pictures, cells = one_picture(tmp_path, (1, 0.9, RING))
    write_png(tmp_path / "a.png", plain_image(9, 6))
    with pytest.raises(DataError, match=r"a\.png has 9 x 6 pixels, .* 6 x 9"):
        interchange.write_morphometry(tmp_path / "t.csv", pictures, cells, ["one"])
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("pixel_size", [0, -1, float("nan"), float("inf")])
def test_a_pixel_has_a_size(tmp_path, pixel_size):
    with pytest.raises(SettingsError, match="pixel_size"):
        interchange.write_morphometry(tmp_path / "t.csv", [], [], [], pixel_size=pixel_size)
    assert not list(tmp_path.iterdir())


def test_images_of_a_release_of_samples_and_of_one_file(tmp_path):
    made = make_sample_release(tmp_path, train_images=3, test_images=2, image_size=64)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    for place in (tmp_path, made.test_dir):
        pictures = interchange.list_pictures(place)
        assert [p.file_name for p in pictures] == [entry["file_name"] for entry in index]
        assert [p.size for p in pictures] == [(e["height"], e["width"]) for e in index]
    samples = interchange.list_pictures(made.train_dir)
    assert [p.image_id for p in samples] == [1, 2, 3]
    assert interchange.list_pictures(made.train_dir, sample_ids=[samples[2].name]) == samples[2:]
    assert {p.file_name for p in samples} == {f"{p.name}/image.tif" for p in samples}
    [alone] = interchange.list_pictures(samples[0].path)
    assert (alone.image_id, alone.size) == (1, samples[0].size)
    with pytest.raises(DataError, match="not a folder"):
        interchange.list_pictures(tmp_path / "gone")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command_line_takes_in_and_gives_out(tmp_path):
    path, images = write_set(tmp_path, [annotation([RECTANGLE]), annotation([RECTANGLE], 7)])
    taken = run("import", path, images, tmp_path / "out")
    assert taken.exit_code == 0, taken.output
    train = tmp_path / "out" / "train"
    assert f"python -m cellseg train {train}" in taken.output

    truth = run("export", train, tmp_path / "truth.json", "--to", "coco")
    assert "2 of 2 cells in 1 images, 0 of them without any" in truth.output
    categories = json.loads((tmp_path / "truth.json").read_text())["categories"]
    assert [category["name"] for category in categories] == ["spindle", "round"]
    records = records_of((1, 0.9, mask_of((2, 1, 6, 4))), (2, 0.3, mask_of((0, 0, 1, 1))))
    write_records(tmp_path / "r.json", records)
    about = ("--images", train)
    for to, out in (("labels", "l"), ("geojson", "g"), ("csv", "t.csv"), ("coco", "c.json")):
        given = run("export", tmp_path / "r.json", tmp_path / out, "--to", to, *about)
        assert "1 of 2 cells" in given.output, given.output
        assert (tmp_path / out).exists()
    assert read_table(tmp_path / "t.csv")[0]["area_px2"] == "12"
    assert [p.name for p in (tmp_path / "g").iterdir()] == ["a.geojson"]


def test_the_command_line_says_what_is_missing(tmp_path):
    write_records(tmp_path / "r.json", records_of((1, 0.9, RING)))
    write_png(tmp_path / "a.png", plain_image(4, 4))
    for words, arguments in (
        ("give --images", ["--to", "csv"]),
        ("--to is 'pdf'", ["--to", "pdf"]),
        ("differs from the image's", ["--to", "csv", "--images", tmp_path / "a.png"]),
    ):
        done = run("export", tmp_path / "r.json", tmp_path / "out", *arguments)
        assert words in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_summary_of_nothing():
    assert "class1 x: 0 cells" in storing.Imported(Path("out"), ("x",)).summary()

"""Images of 6 x 9 with what belongs to them: a COCO file, label maps, or records."""

import csv
import json
from pathlib import Path

import numpy as np
import tifffile
from data_files import plain_image, write_png

from cellseg import interchange
from cellseg.coco import make_records, mask_to_rle
from cellseg.data import read_sample

SIZE = (6, 9)  # height, width
RECTANGLE = [2, 1, 6, 1, 6, 4, 2, 4]  # 4 wide, 3 high
CATEGORIES = [{"id": 7, "name": "round"}, {"id": 3, "name": "spindle"}]


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


RING = mask_of((1, 1, 6, 5)) & ~mask_of((3, 2, 4, 4))


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
SPOTS = mask_of((0, 0, 1, 1), (2, 0, 3, 1), (4, 0, 5, 1), (6, 0, 7, 1)) * 255


def records_of(*cells, image_id=1):
    """Return records of (label, score, mask)."""
    labels, scores, drawn = zip(*cells, strict=True)
    return make_records(image_id, labels, scores, [mask_to_rle(mask) for mask in drawn])


def one_picture(tmp_path, *cells, **options):
    """Write an image and return its picture and the cells in it."""
    image = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(*SIZE, 3)
    pictures = interchange.list_pictures(write_png(tmp_path / "a.png", image))
    return pictures, interchange.cells_by_picture(pictures, records_of(*cells), **options)


def read_table(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))

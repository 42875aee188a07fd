"""Data of other tools in, and cells for other tools out."""

from cellseg.exports.coco_file import CocoFile, read_coco
from cellseg.exports.from_coco import import_coco
from cellseg.exports.from_labels import import_labels
from cellseg.exports.morphometry import measure_cells, write_morphometry
from cellseg.exports.pictures import (
    Picture,
    cells_by_picture,
    list_pictures,
    pictures_of_samples,
)
from cellseg.exports.prepare import import_annotations, prepare_release
from cellseg.exports.rings import mask_to_polygons, ring_area
from cellseg.exports.storing import Imported
from cellseg.exports.writing import write_coco, write_geojson, write_labels

__all__ = [
    "CocoFile",
    "Imported",
    "Picture",
    "cells_by_picture",
    "import_annotations",
    "import_coco",
    "import_labels",
    "list_pictures",
    "mask_to_polygons",
    "measure_cells",
    "pictures_of_samples",
    "prepare_release",
    "read_coco",
    "ring_area",
    "write_coco",
    "write_geojson",
    "write_labels",
    "write_morphometry",
]

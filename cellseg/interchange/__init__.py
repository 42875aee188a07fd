"""Data of other tools in, and cells for other tools out."""

from cellseg.interchange.coco_file import CocoFile, read_coco
from cellseg.interchange.from_coco import import_coco
from cellseg.interchange.from_labels import import_labels
from cellseg.interchange.morphometry import measure_cells, write_morphometry
from cellseg.interchange.pictures import (
    Picture,
    cells_by_picture,
    list_pictures,
    pictures_of_samples,
)
from cellseg.interchange.prepare import import_annotations, prepare_release
from cellseg.interchange.rings import mask_to_polygons, ring_area
from cellseg.interchange.storing import Imported
from cellseg.interchange.writing import write_coco, write_geojson, write_labels

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

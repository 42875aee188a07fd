"""From a model and images to records, and from records to fewer, better ones."""

from cellseg.inference.images import predict_images
from cellseg.inference.large import predict_file
from cellseg.inference.merging import fuse, suppress
from cellseg.inference.pasting import masks_to_rles
from cellseg.inference.prediction import predict_image
from cellseg.inference.settling import settle_classes
from cellseg.inference.tiles import predict_tiles
from cellseg.inference.views import predict_views

__all__ = [
    "fuse",
    "masks_to_rles",
    "predict_file",
    "predict_image",
    "predict_images",
    "predict_tiles",
    "predict_views",
    "settle_classes",
    "suppress",
]

"""From a model and images to records, and from records to fewer, better ones."""

from cellseg.inference.merging import fuse, suppress
from cellseg.inference.pasting import masks_to_rles
from cellseg.inference.prediction import predict_image, predict_images

__all__ = ["fuse", "masks_to_rles", "predict_image", "predict_images", "suppress"]

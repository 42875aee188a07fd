"""Cell instance segmentation with Mask R-CNN, from annotated TIFFs to a scored submission."""

__version__ = "0.1.0"

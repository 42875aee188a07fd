"""Mask R-CNN builders; the model to train is one call."""

from cellseg.models.builders import (
    BUILDERS,
    build_from_spec,
    count_trainable_parameters,
    get_model_convnext_base,
    get_model_convnext_small,
    get_model_convnext_tiny,
    get_model_mobilenetv2,
    get_model_resnet50v2,
    get_model_resnet101,
    get_model_resnext50,
)
from cellseg.models.options import DetectorOptions

__all__ = [
    "BUILDERS",
    "DetectorOptions",
    "build_from_spec",
    "count_trainable_parameters",
    "get_model_convnext_base",
    "get_model_convnext_small",
    "get_model_convnext_tiny",
    "get_model_mobilenetv2",
    "get_model_resnet50v2",
    "get_model_resnet101",
    "get_model_resnext50",
]

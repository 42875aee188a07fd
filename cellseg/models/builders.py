"""`get_model_<backbone>`: Mask R-CNN for small, dense cells, one builder a backbone.

Every builder composes torchvision's `GeneralizedRCNN` from parts handed to constructors. They
differ in the backbone, in the heads that its published weights come with, and in nothing else.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.models import WeightsEnum
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNN_ResNet50_FPN_V2_Weights

from cellseg.errors import SettingsError
from cellseg.models.bodies import BodyMaker, convnext, mobilenetv2, resnet
from cellseg.models.detector import compose
from cellseg.models.options import DetectorOptions, check_options
from cellseg.models.weights import (
    BODY_PREFIX,
    download_weights,
    is_detector,
    load_backbone,
    load_detector,
    read_weights,
    spread_over_stages,
)

MAX_TRAINABLE_PARAMETERS = 200_000_000  # the course's limit


def get_model_resnet50v2(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with ResNet50-FPN-v2, the default (Li et al., 2021; 46 M parameters).

    Args:
        num_classes: number of classes, background included.
        weights: "DEFAULT" or "COCO" for torchvision's COCO detector, "IMAGENET" for its
            classifier, the path of a local file (a backbone or a whole detector, told apart by
            its keys), or None for random weights.
        **options: see `DetectorOptions`.

    Returns:
        the model, with `spec` (enough to build it again), `provenance` (of its weights).

    Raises:
        WeightsError: if weights cannot be had or do not fit.
        SettingsError: if an option is unknown or out of range.
    """
    return _build(
        "get_model_resnet50v2",
        resnet(zoo.resnet50),
        num_classes,
        weights,
        options,
        named={
            "DEFAULT": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
            "COCO": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
            "IMAGENET": zoo.ResNet50_Weights.IMAGENET1K_V2,
        },
        deep_heads=True,
    )


def get_model_mobilenetv2(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with MobileNetV2, small enough for a CPU, with a true stride-4 level.

    Arguments, result and errors as in `get_model_resnet50v2`; "DEFAULT" and "IMAGENET" are
    torchvision's ImageNet classifier, and there are no COCO weights.
    """
    return _build(
        "get_model_mobilenetv2",
        mobilenetv2,
        num_classes,
        weights,
        options,
        named=_imagenet(zoo.MobileNet_V2_Weights.IMAGENET1K_V2),
    )


def get_model_resnext50(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with ResNeXt50 32x4d.

    Arguments, result and errors as in `get_model_resnet50v2`; "DEFAULT" and "IMAGENET" are
    torchvision's ImageNet classifier, and there are no COCO weights.
    """
    return _build(
        "get_model_resnext50",
        resnet(zoo.resnext50_32x4d),
        num_classes,
        weights,
        options,
        named=_imagenet(zoo.ResNeXt50_32X4D_Weights.IMAGENET1K_V2),
    )


def get_model_resnet101(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with ResNet101 and plain heads.

    The deep heads of v2 are for ResNet50 alone, whose COCO weights fill them; fresh ones cost more
    than this backbone and have more to learn from few images.

    Arguments, result and errors as in `get_model_resnet50v2`; "DEFAULT" and "IMAGENET" are
    torchvision's ImageNet classifier, and there are no COCO weights.
    """
    return _build(
        "get_model_resnet101",
        resnet(zoo.resnet101),
        num_classes,
        weights,
        options,
        named=_imagenet(zoo.ResNet101_Weights.IMAGENET1K_V2),
    )


def get_model_convnext_tiny(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with ConvNeXt-T (Liu et al., A ConvNet for the 2020s, 2022).

    Its layer norms need no batch: the option `norm` is without effect on them.

    Arguments, result and errors as in `get_model_resnet50v2`; "DEFAULT" and "IMAGENET" are
    torchvision's ImageNet classifier, and there are no COCO weights.
    """
    return _build(
        "get_model_convnext_tiny",
        convnext(zoo.convnext_tiny),
        num_classes,
        weights,
        options,
        named=_imagenet(zoo.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    )


def get_model_convnext_small(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with ConvNeXt-S, twice as deep in its third stage as ConvNeXt-T.

    Arguments, result and errors as in `get_model_resnet50v2`; "DEFAULT" and "IMAGENET" are
    torchvision's ImageNet classifier, and there are no COCO weights.
    """
    return _build(
        "get_model_convnext_small",
        convnext(zoo.convnext_small),
        num_classes,
        weights,
        options,
        named=_imagenet(zoo.ConvNeXt_Small_Weights.IMAGENET1K_V1),
    )


def get_model_convnext_base(
    num_classes: int, *, weights: str | Path | None = "DEFAULT", **options: Any
) -> GeneralizedRCNN:
    """Return Mask R-CNN with ConvNeXt-B, ConvNeXt-S with a third more channels.

    Arguments, result and errors as in `get_model_resnet50v2`; "DEFAULT" and "IMAGENET" are
    torchvision's ImageNet classifier, and there are no COCO weights.
    """
    return _build(
        "get_model_convnext_base",
        convnext(zoo.convnext_base),
        num_classes,
        weights,
        options,
        named=_imagenet(zoo.ConvNeXt_Base_Weights.IMAGENET1K_V1),
    )


BUILDERS: dict[str, Callable[..., GeneralizedRCNN]] = {
    builder.__name__: builder
    for builder in (
        get_model_resnet50v2,
        get_model_mobilenetv2,
        get_model_resnext50,
        get_model_resnet101,
        get_model_convnext_tiny,
        get_model_convnext_small,
        get_model_convnext_base,
    )
}


def build_from_spec(spec: dict[str, Any]) -> GeneralizedRCNN:
    """Return the model that a `spec` describes, with random weights, to be loaded into.

    Raises:
        SettingsError: if the spec names no builder of this version.
    """
    builder = BUILDERS.get(spec.get("builder", ""))
    if builder is None:
        known = ", ".join(BUILDERS)
        raise SettingsError(f"model builder {spec.get('builder')!r} is unknown; use one of {known}")
    return builder(**spec["arguments"] | {"weights": None})


def count_trainable_parameters(model: nn.Module) -> int:
    """Return the number of parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _imagenet(entry: WeightsEnum) -> dict[str, WeightsEnum]:
    """Return the weights by name where there is only an ImageNet classifier's."""
    return {"DEFAULT": entry, "IMAGENET": entry}


def _build(
    name: str,
    make_body: BodyMaker,
    num_classes: int,
    weights: str | Path | None,
    given: dict[str, Any],
    *,
    named: dict[str, WeightsEnum],
    deep_heads: bool = False,
) -> GeneralizedRCNN:
    """Compose the detector, load its weights, and note how it was made."""
    options = check_options(name, num_classes, given)
    state, source = _read(weights, named, name)
    make = partial(compose, make_body, num_classes=num_classes, deep_heads=deep_heads)
    if options.norm == "auto":
        options = replace(options, norm=_choose_norm(make, options, state))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = make(options)
    model.provenance = source if state is None else _load(model, state, source)
    arguments = {"num_classes": num_classes, "weights": None if weights is None else str(weights)}
    model.spec = {"builder": name, "arguments": arguments | vars(options)}
    trainable = count_trainable_parameters(model)
    if trainable >= MAX_TRAINABLE_PARAMETERS:
        raise SettingsError(
            f"{name} has {trainable:,} trainable parameters, {MAX_TRAINABLE_PARAMETERS:,} are "
            "the limit; lower fpn_channels, head_width or trainable_stages"
        )
    # Channels last is what convolutions on CPUs and tensor cores compute in, and RoIs are bags of.
    return model.to(memory_format=torch.channels_last)


def _read(
    weights: str | Path | None, named: dict[str, WeightsEnum], name: str
) -> tuple[dict[str, Tensor] | None, str]:
    """Return the state dict of the weights, None for random ones, and where it comes from."""
    if weights is None:
        return None, "random weights"
    if weights not in ("DEFAULT", "COCO", "IMAGENET"):
        return read_weights(weights), f"file {Path(weights).name}"
    if weights not in named:
        raise SettingsError(
            f"{name} has no weights {weights!r}; use {', '.join(named)}, a file, or None"
        )
    entry = named[weights]
    return download_weights(entry), f"torchvision {entry} ({entry.url})"


def _choose_norm(
    make: Callable[[DetectorOptions], GeneralizedRCNN],
    options: DetectorOptions,
    state: dict[str, Tensor] | None,
) -> str:
    """Return what norm="auto" is with these weights: norms without loaded statistics learn."""
    if state is None:
        return "trained"
    with torch.device("meta"):  # names and shapes, no values
        own = make(replace(options, norm="frozen")).state_dict()
    in_heads = [
        key for key in own if key.endswith("running_var") and not key.startswith(BODY_PREFIX)
    ]
    state = spread_over_stages(state, own)
    loaded = all(key in state and state[key].shape == own[key].shape for key in in_heads)
    return "frozen" if loaded else "heads"


def _load(model: GeneralizedRCNN, state: dict[str, Tensor], source: str) -> str:
    """Load a state dict into the model and return what was kept of it."""
    if is_detector(state):
        return load_detector(model, state, source)
    return load_backbone(model.backbone.body, state, source)

"""What a model is built with beside its backbone, and what of it makes sense."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from cellseg.errors import SettingsError

ANCHOR_SIZES = (8, 16, 32, 64, 128)
ASPECT_RATIOS = (0.5, 1.0, 2.0)
NORMS = ("auto", "frozen", "heads", "trained")
COUNTS = (
    "fpn_channels", "head_width", "rpn_samples", "rois_per_image", "box_roi_size", "mask_roi_size",
    "mask_layers", "train_proposals", "proposals", "detections_per_image",
)  # fmt: skip


@dataclass(frozen=True)
class DetectorOptions:
    """What every builder takes beside its backbone, all by keyword.

    Attributes:
        anchor_sizes: side of the anchors of each level (strides 4, 8, 16, 32, 64), in network
            pixels, that is after `image_scale`.
        fpn_channels: width of FPN, RPN and mask head. On a CPU they cost more than the backbone;
            pretrained heads fit 256 only.
        image_scale: network pixels per image pixel.
        norm: which batch norms learn. "frozen": none, they keep statistics and scales as loaded,
            right for batches of a few images; "trained": all; "heads": those of FPN and heads,
            which see many places of an image, and not the backbone's; "auto": those that came
            without statistics, since a random layer needs its norm - "trained" for random
            weights, "heads" for a backbone's, "frozen" for a whole detector's. Without effect on
            the layer norms of ConvNeXt, which need no batch and always learn.
        trainable_stages: how many stages of the backbone learn, counted from its end, 0 to 5.
        head_width: units of the fully connected layers of the box head.
        rpn_samples: anchors that the RPN's loss sees in an image.
        rois_per_image: RoIs that the box loss sees in an image; a quarter at most are cells.
        mask_rois: of these cells the mask loss sees at most so many in an image, drawn at random;
            None for all. On a CPU the mask head is about half of a step where cells are many.
        box_roi_size: bins a side of the features that the box head sees of an RoI.
        mask_roi_size: the same for the mask head; its mask has twice as many pixels a side.
        mask_layers: convolutions of the mask head.
        class_masks: the mask head draws a mask for each class, of which the box head's class is
            taken, as in He et al. 2017; if False one for whatever class, which learns from every
            cell, those of rare classes too.
        train_proposals: boxes that the RPN hands on in training, of each level and in all, out of
            which RoIs are drawn.
        proposals: the same in evaluation for each network megapixel (10^6 pixels) of an image, no
            fewer than `train_proposals` in all. A cell without one is lost: several times what an
            image has of cells.
        detections_per_image: detections kept in an image, and for each network megapixel of a
            larger one; a square of 1000 px has up to 2,300 cells.
        cascade: three box heads in a row, trained at IoU 0.5, 0.6 and 0.7 (see `cascade`), in
            place of one.
        mask_quality: scores are multiplied by this power of the mean probability of their mask's
            pixels over one half; 0 leaves them as they are.
        score_threshold: detections of this score or less are dropped, 0-1.
        nms_threshold: box IoU over which two detections of one class are one cell, 0-1.
        seed: of the weights that are drawn at random.
    """

    anchor_sizes: Sequence[int] = ANCHOR_SIZES
    fpn_channels: int = 256
    image_scale: float = 1.0
    norm: str = "auto"
    trainable_stages: int = 5
    head_width: int = 1024
    rpn_samples: int = 256
    rois_per_image: int = 512
    mask_rois: int | None = None
    box_roi_size: int = 7
    mask_roi_size: int = 14
    mask_layers: int = 4
    class_masks: bool = True
    train_proposals: int = 1000
    proposals: int = 2000
    detections_per_image: int = 2500
    cascade: bool = False
    mask_quality: float = 0.0
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    seed: int = 0


def check_options(name: str, num_classes: int, given: dict[str, Any]) -> DetectorOptions:
    """Return the options of a builder's call.

    Args:
        name: of the builder, for messages.
        num_classes: number of classes, background included.
        given: what the caller gave, by name.

    Raises:
        SettingsError: if an option is unknown or out of range.
    """
    known = [field.name for field in fields(DetectorOptions)]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise SettingsError(f"{name} has no option {unknown[0]!r}; use one of {', '.join(known)}")
    options = DetectorOptions(
        **given | {"anchor_sizes": list(given.get("anchor_sizes", ANCHOR_SIZES))}
    )
    for holds, message in _conditions(options, num_classes):
        if not holds:
            raise SettingsError(f"{name}: {message}")
    return options


def _conditions(options: DetectorOptions, num_classes: int) -> list[tuple[bool, str]]:
    """Return what must hold, and what to say where it does not."""
    levels = len(ANCHOR_SIZES)

    def give(name: str, what: str) -> str:
        return f"{name} is {getattr(options, name)}; give {what}"

    return [
        (num_classes >= 2, f"num_classes is {num_classes}; give 2 or more, background included"),
        (
            len(options.anchor_sizes) == levels and min(options.anchor_sizes) > 0,
            give("anchor_sizes", f"{levels} sizes of more than 0, one a level"),
        ),
        (0 < options.image_scale < math.inf, give("image_scale", "a finite number above 0")),
        (options.norm in NORMS, f"norm is {options.norm!r}; use one of {', '.join(NORMS)}"),
        (0 <= options.trainable_stages <= 5, give("trainable_stages", "0 to 5")),
        (0 <= options.score_threshold <= 1, give("score_threshold", "0 to 1")),
        (0 <= options.nms_threshold <= 1, give("nms_threshold", "0 to 1")),
        (options.mask_quality >= 0, give("mask_quality", "0 or more")),
        (
            options.mask_rois is None or options.mask_rois >= 1,
            give("mask_rois", "1 or more, or None for all"),
        ),
        (options.seed >= 0, give("seed", "0 or more")),
        *((getattr(options, name) >= 1, give(name, "1 or more")) for name in COUNTS),
    ]

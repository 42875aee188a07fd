"""A model and an image -> COCO records."""

import numpy as np
import torch
from torch import Tensor, nn

from cellseg.coco import Record, make_records, rle_area, sort_records
from cellseg.inference.pasting import masks_to_rles


def predict_image(
    model: nn.Module,
    image: Tensor | np.ndarray,
    *,
    image_id: int,
    score_threshold: float = 0.05,
    mask_threshold: float = 0.5,
) -> list[Record]:
    """Return the COCO result records of one image, best score first.

    Args:
        model: Mask R-CNN of this package, in eval mode, on any device.
        image: uint8 [3, H, W], RGB (float in 0-1 is accepted), or an array [H, W, 3] as
            `read_image` returns it.
        image_id: number written into each record.
        score_threshold: keep detections with score >= this, in 0-1; the model's own threshold
            has been applied before.
        mask_threshold: a pixel belongs to the cell if its probability is greater.

    Returns:
        list of records, empty if nothing passes; none has an empty mask.

    Raises:
        ValueError: if the image is not [3, H, W] or the model is in training mode.
    """
    image = as_tensor(image)
    return detections_to_records(
        detect(model, image),
        (image.shape[-2], image.shape[-1]),
        image_id=image_id,
        score_threshold=score_threshold,
        mask_threshold=mask_threshold,
    )


@torch.inference_mode()
def detect(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return the detections of one image, on the model's device; see `detections_to_records`.

    Raises:
        ValueError: if the image is not [3, H, W] or the model is in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    return model([image.to(next(model.parameters()).device)])[0]


def as_tensor(image: Tensor | np.ndarray) -> Tensor:
    """Return an image as [3, H, W]; an array is [H, W, 3], as `read_image` returns it."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def detections_to_records(
    detection: dict[str, Tensor],
    size: tuple[int, int],
    *,
    image_id: int,
    score_threshold: float = 0.0,
    mask_threshold: float = 0.5,
) -> list[Record]:
    """Return the records of one image's detections, best score first, empty masks left out.

    Args:
        detection: `boxes` xyxy (N, 4) in image pixels, `labels` (N,), `scores` (N,) and `masks`
            (N, 1, M, M), as the model returns them.
        size: (height, width) of the image.
        image_id: number written into each record.
        score_threshold: keep detections with score >= this, in 0-1.
        mask_threshold: a pixel belongs to the cell if its probability is greater.
    """
    chosen = detection["scores"] >= score_threshold
    rles = masks_to_rles(
        detection["masks"][chosen],
        detection["boxes"][chosen],
        size,
        mask_threshold=mask_threshold,
    )
    labels, scores = detection["labels"][chosen].tolist(), detection["scores"][chosen].tolist()
    filled = [index for index, area in enumerate(rle_area(rles)) if area > 0]
    records = make_records(
        image_id,
        [labels[index] for index in filled],
        [scores[index] for index in filled],
        [rles[index] for index in filled],
    )
    return sort_records(records)

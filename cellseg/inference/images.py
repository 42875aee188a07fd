"""Many images -> records: whole where they are small, in tiles where they are large."""

from collections.abc import Iterable, Sized
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from cellseg.coco import Record, sort_records
from cellseg.inference.tiles import predict_tiles


def predict_images(
    model: nn.Module,
    images: Iterable[tuple[Tensor, int]],
    *,
    progress: bool = True,
    **options: Any,
) -> list[Record]:
    """Return the records of many images, in the order of `sort_records`.

    Args:
        model: Mask R-CNN of this package; put into eval mode for the time of the call.
        images: pairs of an image (uint8 [3, H, W], RGB) and its image_id.
        progress: show a bar with the time left.
        **options: of `predict_tiles`, all of them the same for each image: views, scales,
            tile_size, overlap, mix_whole, score_threshold, mask_threshold, iou_threshold. Without
            any, images are looked at once, as they are, and only very large ones in tiles.
    """
    was_training = model.training
    model.eval()
    total = len(images) if isinstance(images, Sized) else None
    records = []
    try:
        for image, image_id in tqdm(
            images, total=total, desc="predict", unit="image", disable=not progress, leave=False
        ):
            records += predict_tiles(model, image, image_id=image_id, **options)
    finally:
        model.train(was_training)
    return sort_records(records)

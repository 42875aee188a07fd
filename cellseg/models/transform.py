"""From images to the network's input and back: a fixed scale, never "800 pixels a side"."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of each channel, images in 0-1: all weights' own
IMAGENET_STD = (0.229, 0.224, 0.225)
SIZE_DIVISIBLE = 64  # the coarsest stride, so that every level's stride is exact


class CellTransform(nn.Module):
    """Normalise, scale by a fixed factor and batch images; scale boxes there and back.

    A cell keeps its size relative to its neighbours in other images, whatever the size of the
    image that it stands in. Instance maps are left as they are: RoI heads sample them at their
    own resolution and find the factor under `map_scale` in the target.
    """

    def __init__(self, image_scale: float = 1.0) -> None:
        """Set the number of network pixels per image pixel."""
        super().__init__()
        self.image_scale = float(image_scale)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]] | None = None
    ) -> tuple[ImageList, list[dict[str, Any]] | None]:
        """Return the padded batch and the targets in network pixels.

        Args:
            images: uint8 [3, H, W], or float in 0-1, RGB, of any sizes.
            targets: `boxes` xyxy in image pixels; other keys pass through.

        Returns:
            an ImageList, and new targets with scaled `boxes` and `map_scale`, the (x, y) factor
            from network pixels to the instance map's (None without targets).
        """
        scaled = [self._prepare(image) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in scaled]
        height, width = (_divisible(max(sides)) for sides in zip(*sizes, strict=True))
        batch = scaled[0].new_zeros((len(scaled), 3, height, width))
        for slot, image in zip(batch, scaled, strict=True):
            slot[:, : image.shape[-2], : image.shape[-1]] = image
        if targets is None:
            return ImageList(batch, sizes), None
        moved = []
        for target, image, size in zip(targets, images, sizes, strict=True):
            scale_x, scale_y = size[1] / image.shape[-1], size[0] / image.shape[-2]
            factor = target["boxes"].new_tensor([scale_x, scale_y, scale_x, scale_y])
            scale = (1 / scale_x, 1 / scale_y)
            moved.append(target | {"boxes": target["boxes"] * factor, "map_scale": scale})
        return ImageList(batch, sizes), moved

    def _prepare(self, image: Tensor) -> Tensor:
        """Return one image, normalised and scaled, float32 [3, h, w]."""
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image has shape {tuple(image.shape)}; expected [3, H, W]")
        image = image.float() / (255 if image.dtype == torch.uint8 else 1)
        image = (image - self.mean) / self.std
        if self.image_scale == 1:
            return image
        size = [max(1, round(side * self.image_scale)) for side in image.shape[-2:]]
        return F.interpolate(
            image[None], size=size, mode="bilinear", antialias=self.image_scale < 1
        )[0]

    def postprocess(
        self,
        detections: list[dict[str, Tensor]],
        image_sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Return detections with boxes in image pixels; masks stay RoI-sized probabilities."""
        if not detections:  # training
            return detections
        for detection, size, original in zip(detections, image_sizes, original_sizes, strict=True):
            scale_x, scale_y = original[1] / size[1], original[0] / size[0]
            factor = detection["boxes"].new_tensor([scale_x, scale_y, scale_x, scale_y])
            detection["boxes"] = detection["boxes"] * factor
        return detections


def _divisible(side: int) -> int:
    """Return the side rounded up to a multiple of the coarsest stride."""
    return -(-side // SIZE_DIVISIBLE) * SIZE_DIVISIBLE

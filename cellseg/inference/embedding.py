"""A backbone as what describes images: for groups of similar ones, in place of colour and texture.

`group_by_similarity(dataset, embed=backbone_embedding(model))`
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def backbone_embedding(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function from an image to the mean of its backbone's features, level by level.

    The features are those before the FPN, so that a backbone with pretrained weights describes
    images before anything was trained. Use weights that have seen none of the images with their
    annotations: a trained model knows images by whether it was trained on them.

    Args:
        model: a model of `cellseg.models`, in eval mode, on any device.

    Returns:
        image uint8 [3, H, W] -> float32 [D], on the CPU.
    """

    @torch.inference_mode()
    def embed(image: Tensor) -> Tensor:
        device = next(model.parameters()).device
        batch, _ = model.transform([image.to(device)])
        levels = model.backbone.body(batch.tensors)
        return torch.cat([level.mean(dim=(2, 3))[0] for level in levels.values()]).float().cpu()

    return embed

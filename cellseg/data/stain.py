"""Stains: how much of each dye lies in a pixel, and a change of it as between laboratories.

A dye takes away a share of the light, so that dyes add up in the optical density of each channel
(the law of Beer and Lambert), not in its brightness: a gain there is a thicker section or a longer
bath, and white glass stays white.
"""

from collections.abc import Sequence

import numpy as np
import torch

from cellseg.data.channels import MIN_BACKGROUND

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Densities of haematoxylin, eosin and DAB (a row each) in red, green and blue: Ruifrok and
Johnston, "Quantification of histochemical staining by color deconvolution", 2001."""

_POINTS = 64  # a side of the grid on which an image is looked at
_STEPS = 1024  # of a unit of density: the nearest one is at most 1/8 grey level off
_DENSITIES = np.log(256 / np.arange(1, 257)).astype(np.float32)  # of each grey level
_LEVELS = np.rint(256 * np.exp(-np.arange(6 * _STEPS) / _STEPS) - 1).clip(0).astype(np.uint8)


def is_light_background(image: torch.Tensor, instance_map: torch.Tensor) -> bool:
    """Say whether an image shows stained cells on a light background, as in transmitted light.

    It does if what lies outside its cells has a mean of at least `MIN_BACKGROUND` and is brighter
    than the cells, as an image must be to tell its channel order. Dark images (fluorescence),
    undecided ones (cells no darker, or nothing but cells) and grey ones, in which no stain can be
    told from another, do not. Looks at some 64 x 64 points.

    Args:
        image: uint8 [3, H, W], RGB.
        instance_map: int32 [L, H, W], 0 outside cells.
    """
    steps = [max(1, side // _POINTS) for side in image.shape[1:]]
    grid = (slice(None), slice(None, None, steps[0]), slice(None, None, steps[1]))
    points, outside = image.numpy()[grid], (instance_map.numpy()[grid] == 0).all(axis=0)
    if not outside.any() or np.array_equal(points[0], points[2]):
        return False
    background = points[:, outside].mean()
    darker = outside.all() or points[:, ~outside].mean() < background
    return bool(background >= MIN_BACKGROUND and darker)


def jitter_stain(image: torch.Tensor, stain: float, generator: torch.Generator) -> torch.Tensor:
    """Return a uint8 image [3, H, W] with more or less of each stain.

    The amount of each of the three `STAINS` in a pixel is multiplied by a factor from 1 - stain to
    1 + stain, and up to `stain` is added or taken away (Tellez et al., "Whole-slide mitosis
    detection in H&E breast histology using PHH3 as a reference to train distilled stain-invariant
    convolutional networks", 2018).
    """
    draws = torch.rand(2, 3, generator=generator, dtype=torch.float64).numpy()
    gains, shifts = stain * (2 * draws - 1)
    return change_stains(image, 1 + gains, shifts)


def change_stains(
    image: torch.Tensor, gains: Sequence[float], shifts: Sequence[float]
) -> torch.Tensor:
    """Return a uint8 image [3, H, W] whose amount of each stain is gain * amount + shift.

    The amounts are those whose densities, -ln((level + 1) / 256) a channel, the `STAINS` add up
    to. Logarithm and exponential are looked up, so that the result does not depend on a
    processor's own.

    Args:
        image: RGB.
        gains: of the three stains; all 1, with shifts of 0, change nothing.
        shifts: of the three stains, in units of density.
    """
    matrix = STAINS.T @ np.diag(gains) @ np.linalg.inv(STAINS.T)
    densities = [_DENSITIES[channel] for channel in image.numpy()]
    changed = np.empty_like(image.numpy())
    for factors, shift, out in zip(matrix, STAINS.T @ shifts, changed, strict=True):
        total = weigh_channels(densities, _STEPS * factors, _STEPS * shift + 0.5)
        np.clip(total, 0, len(_LEVELS) - 1, out=total)
        np.take(_LEVELS, total.astype(np.int32), out=out)
    return torch.from_numpy(changed)


def weigh_channels(
    channels: Sequence[np.ndarray], factors: Sequence[float], offset: float
) -> np.ndarray:
    """Return the sum of channels [H, W] times a factor each, and of an offset, float32.

    Each product and each sum is an operation of its own in float32, so that the result does not
    depend on the number of threads or on what a processor can fuse.
    """
    total = np.full_like(channels[0], offset)
    for channel, factor in zip(channels, factors, strict=True):
        total += channel * np.float32(factor)
    return total

"""What an image looks like, in numbers: its stains, its texture, and marks to find it again by."""

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import ndimage
from skimage.feature import local_binary_pattern, peak_local_max

MIN_PART = 32  # pixels a side of a quarter; smaller images are described whole
MIN_DEPTH = 24  # least contrast of a spot, in thousandths of density
SPOT_DISTANCE = 12  # pixels between spots
_REACH = 14  # of the patch around a spot, pixels to each side
_STEP = 4  # between the samples of a patch


@dataclass(frozen=True)
class ImageDescriptor:
    """What is known of one image.

    Attributes:
        parts: float64 [P, D], descriptors of its four quarters, or of the whole if it is small.
        spots: float32 [S, 64], patches around its dark spots, of length 1, turned to a standard
            position so that a flipped or turned image has the same.
        borders: int8 [n, 3], signs of the change along its top, bottom, left and right border.
        digest: of its pixels, the same for flipped and turned copies.
    """

    parts: np.ndarray
    spots: np.ndarray
    borders: dict[str, np.ndarray]
    digest: str


def describe_image(image: torch.Tensor) -> ImageDescriptor:
    """Return what an image, uint8 [3, H, W], looks like.

    Nothing is resized: images of one magnification are compared.
    """
    density = optical_density(image.numpy())
    return ImageDescriptor(
        parts=np.array([appearance(part) for part in quarters(image)], dtype=np.float64),
        spots=find_spots(density.mean(axis=0)),
        borders={
            "top": _changes(density[:, 0]),
            "bottom": _changes(density[:, -1]),
            "left": _changes(density[:, :, 0]),
            "right": _changes(density[:, :, -1]),
        },
        digest=pixel_digest(image.numpy()),
    )


def quarters(image: torch.Tensor) -> list[torch.Tensor]:
    """Return the four quarters of an image [3, H, W]; the image itself if it is small."""
    height, width = image.shape[1:]
    if min(height, width) < 2 * MIN_PART:
        return [image]
    middle, centre = height // 2, width // 2
    halves = (image[:, :middle], image[:, middle:])
    return [part for half in halves for part in (half[:, :, :centre], half[:, :, centre:])]


def optical_density(pixels: np.ndarray) -> np.ndarray:
    """Return -ln((level + 1) / 256) of each uint8 pixel, in which stains add up, float32."""
    return -np.log((pixels.astype(np.float32) + 1) / 256)


def appearance(image: torch.Tensor) -> np.ndarray:
    """Return the colour and texture of an image, uint8 [3, H, W], as a vector.

    Colour in optical density: quantiles, spread and correlation of the channels (what the stains
    are), and the share of each channel in dark and in middling pixels (their hue). Texture: how
    steep the density is at three scales, and uniform local binary patterns at two radii (Ojala
    et al., "Multiresolution gray-scale and rotation invariant texture classification with local
    binary patterns", 2002). Turning or flipping the image changes neither.
    """
    density = optical_density(image.numpy())
    flat = density.reshape(3, -1)
    grey = density.mean(axis=0)
    return np.concatenate(
        [
            np.quantile(flat, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1).ravel(),
            *_spread(flat),
            *_hues(flat),
            *_steepness(grey),
            *_patterns(grey),
        ]
    )


def _spread(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return standard deviations of the channels and their correlations, of density [3, N]."""
    covariance = np.cov(flat, bias=True)
    deviation = np.sqrt(np.diag(covariance)) + 1e-6
    correlation = covariance / np.outer(deviation, deviation)
    return deviation, correlation[np.triu_indices(3, 1)]


def _hues(flat: np.ndarray) -> list[np.ndarray]:
    """Return each channel's share of the density of middling and of dark pixels."""
    total = flat.sum(axis=0)
    marks = np.quantile(total, (0.25, 0.75, 0.97), method="lower")
    hues = []
    for low, high in pairwise(marks):
        mean = flat[:, (total >= low) & (total <= high)].mean(axis=1)
        hues.append(mean / (mean.sum() + 1e-6))
    return hues


def _steepness(grey: np.ndarray) -> list[np.ndarray]:
    """Return the logarithm of median and high gradients of density at three scales."""
    gradients = (ndimage.gaussian_gradient_magnitude(grey, scale) for scale in (1, 2, 4))
    return [np.log(np.quantile(g[::2, ::2], (0.5, 0.9)) + 1e-3) for g in gradients]


def _patterns(grey: np.ndarray) -> list[np.ndarray]:
    """Return the roots of the shares of the uniform local binary patterns, at two radii."""
    levels = np.clip(80 * grey, 0, 255).astype(np.uint8)
    codes = (local_binary_pattern(levels, 8, radius, "uniform") for radius in (1, 3))
    return [np.sqrt(np.bincount(c.astype(int).ravel(), minlength=10) / c.size) for c in codes]


def find_spots(grey: np.ndarray) -> np.ndarray:
    """Return patches around the dark spots of density [H, W], float32 [S, 64].

    A patch is 8 x 8 samples of a smoothed neighbourhood, without its mean and of length 1. It is
    flipped so that its right and lower halves are the darker ones and turned so that the step to
    the right is the larger: a flipped or turned copy of the image has the same patches.
    """
    smooth = ndimage.gaussian_filter(grey, 2)
    if min(smooth.shape) <= 2 * _REACH + 2:
        return np.zeros((0, 64), np.float32)
    rows, columns = peak_local_max(smooth, min_distance=SPOT_DISTANCE, exclude_border=_REACH + 1).T[
        ..., None, None
    ]
    offsets = np.arange(-_REACH, _REACH + 1, _STEP)
    patches = smooth[rows + offsets[:, None], columns + offsets]
    patches = patches - patches.mean(axis=(1, 2), keepdims=True)
    across = (patches * offsets).sum(axis=(1, 2))
    down = (patches * offsets[:, None]).sum(axis=(1, 2))
    patches[across < 0] = patches[across < 0][:, :, ::-1]
    patches[down < 0] = patches[down < 0][:, ::-1]
    turned = np.abs(down) > np.abs(across)
    patches[turned] = patches[turned].transpose(0, 2, 1)
    flat = patches.reshape(-1, 64)
    length = np.linalg.norm(flat, axis=1)
    seen = 1000 * length / 8 >= MIN_DEPTH
    return (flat[seen] / length[seen, None]).astype(np.float32)


def pixel_digest(pixels: np.ndarray) -> str:
    """Return a SHA-256 of pixels [3, H, W] that flipping and turning do not change."""
    turned = [np.rot90(pixels, times, axes=(1, 2)) for times in range(4)]
    copies = turned + [copy[:, :, ::-1] for copy in turned]
    digests = [
        hashlib.sha256(f"{copy.shape}".encode() + np.ascontiguousarray(copy).tobytes()).hexdigest()
        for copy in copies
    ]
    return min(digests)


def _changes(line: np.ndarray) -> np.ndarray:
    """Return the signs of the change along a line of density [3, n], as int8 [n - 3, 3].

    Of the mean of the channels, of red against blue and of green against the mean: channels as
    they are go up and down together, so that three of them would say little more than one. Two
    pixels are compared with the two before them.
    """
    mean = line.mean(axis=0)
    opposed = np.stack([mean, line[0] - line[2], line[1] - mean])
    pairs = opposed[:, 1:] + opposed[:, :-1]
    return np.sign(pairs[:, 2:] - pairs[:, :-2]).astype(np.int8).T

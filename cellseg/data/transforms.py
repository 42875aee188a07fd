"""Augmentation of an image and its instance map together, at the cost of their pixels."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cellseg.data.runs import draw_runs, find_runs, measure_runs
from cellseg.data.stain import is_light_background, jitter_stain, weigh_channels
from cellseg.errors import SettingsError

Target = dict[str, Any]

HUE_SHARE = 0.2
"""Hue is turned by at most this share of `color`, in turns of the colour circle."""


@dataclass(frozen=True)
class Placement:
    """Where a crop lies and how it is turned.

    Attributes:
        window: (top, left, height, width) in the image, pixels.
        size: (height, width) to which the window is scaled.
        scale: the factor of magnification that was drawn.
        turn: one of the eight symmetries of the square, see `flip_and_turn`.
    """

    window: tuple[int, int, int, int]
    size: tuple[int, int]
    scale: float
    turn: int


class TrainTransform:
    """Random scale, crop, flips, quarter turns, stain and colour, drawn from a given generator.

    The crop is cut before it is scaled, so that the cost is that of the crop (and of one count
    over the whole map), whatever the number of cells. No crop is padded: an image that is smaller
    than the crop after scaling comes out smaller.
    """

    def __init__(
        self,
        *,
        crop_size: int = 512,
        scale_range: tuple[float, float] = (0.8, 1.25),
        flip: bool = True,
        crowded: float = 0.0,
        stain: float = 0.0,
        color: float = 0.2,
        min_visible: float = 0.25,
    ) -> None:
        """Keep the settings.

        Args:
            crop_size: side of the square crop in pixels after scaling.
            scale_range: smallest and largest factor of magnification, drawn evenly in its
                logarithm; (1, 1) for none.
            flip: whether to draw one of the eight flips and quarter turns of the square.
            crowded: share of crops that are laid about a cell, any one of the image as likely as
                the others, and so that it may be anywhere in the crop: the more cells a place
                has, the more often it is seen. The others lie anywhere, on empty places too.
            stain: the amounts of haematoxylin and eosin are multiplied by a factor from 1 - stain
                to 1 + stain and shifted by up to `stain` (see `jitter_stain`), in images of light
                background (see `is_light_background`); 0 for none.
            color: brightness, contrast and saturation are multiplied by a factor from 1 - color
                to 1 + color, the hue is turned by up to `HUE_SHARE` of it; 0 for none.
            min_visible: drop a cell of which less than this share of its area is in the crop.

        Raises:
            SettingsError: if a setting is out of range.
        """
        low, high = scale_range
        if crop_size < 1:
            raise SettingsError(f"crop_size is {crop_size}; it must be 1 pixel or more")
        if not 0 < low <= high:
            raise SettingsError(f"scale_range is {scale_range}; it must be 0 < smallest <= largest")
        shares = {"crowded": crowded, "stain": stain, "color": color, "min_visible": min_visible}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise SettingsError(f"{name} is {value}; it must lie in 0-1")
        self.crop_size = crop_size
        self.scale_range = (low, high)
        self.flip = flip
        self.crowded = crowded
        self.stain = stain
        self.color = color
        self.min_visible = min_visible

    def __call__(
        self, image: torch.Tensor, target: Target, generator: torch.Generator
    ) -> tuple[torch.Tensor, Target]:
        """Return a transformed image and target; the inputs are left as they were.

        Args:
            image: uint8 tensor [3, H, W].
            target: with `labels`, `instance_map` [L, H, W], and `boxes` if `crowded`; boxes are
                made anew, further entries are handed on.
            generator: source of all random numbers; torch's global state is not touched.

        Returns:
            image uint8 [3, h, w] with h and w at most `crop_size`, and its target.
        """
        labels, instance_map = target["labels"], target["instance_map"]
        boxes = target["boxes"] if self.crowded else None
        placement = self.draw_placement(image.shape[-2:], generator, boxes)
        full_areas = count_areas(instance_map, len(labels)) * placement.scale**2
        crop = place(image, placement, InterpolationMode.BILINEAR)
        if self.stain and is_light_background(image, instance_map):
            crop = jitter_stain(crop, self.stain, generator)
        if self.color:
            crop = jitter_color(crop, self.color, generator)
        map_crop = place(instance_map, placement, InterpolationMode.NEAREST_EXACT)
        cells = update_target(map_crop, labels, full_areas, self.min_visible)
        return crop.contiguous(), {**target, **cells}

    def draw_placement(
        self,
        shape: tuple[int, int],
        generator: torch.Generator,
        boxes: torch.Tensor | None = None,
    ) -> Placement:
        """Return scale, crop and turn for an image of shape [H, W].

        Args:
            shape: (H, W), pixels.
            generator: source of all random numbers.
            boxes: of the cells about which crowded crops are laid, [N, 4] xyxy; None for none.
        """
        low, high = self.scale_range
        scale = low * (high / low) ** _uniform(generator)
        side = max(1, round(self.crop_size / scale))
        height, width = (min(length, side) for length in shape)
        y, x = None, None
        if boxes is not None and len(boxes) and _uniform(generator) < self.crowded:
            left, top, right, bottom = boxes[_integer(len(boxes), generator)].tolist()
            y, x = int((top + bottom) / 2), int((left + right) / 2)
        top = _draw_start(shape[0], height, y, generator)
        left = _draw_start(shape[1], width, x, generator)
        new_height, new_width = (
            min(self.crop_size, max(1, round(length * scale))) for length in (height, width)
        )
        turn = _integer(8, generator) if self.flip else 0
        return Placement((top, left, height, width), (new_height, new_width), scale, turn)


def place(
    pixels: torch.Tensor, placement: Placement, interpolation: InterpolationMode
) -> torch.Tensor:
    """Return an image or a map [..., H, W] cropped, scaled and turned, in this order."""
    pixels = F.crop(pixels, *placement.window)
    if placement.size != placement.window[2:]:
        pixels = F.resize(pixels, list(placement.size), interpolation, antialias=True)
    return flip_and_turn(pixels, placement.turn)


def cut_sample(
    image: torch.Tensor,
    target: Target,
    window: tuple[int, int, int, int],
    *,
    min_visible: float = 0.0,
) -> tuple[torch.Tensor, Target]:
    """Return the part of a sample that a window shows; the inputs are left as they were.

    Args:
        image: [3, H, W].
        target: with `labels` and `instance_map` [L, H, W]; further entries are handed on.
        window: xyxy, half-open, within the image.
        min_visible: drop a cell of which less than this share of its area shows, in 0-1.
    """
    left, top, right, bottom = window
    labels, instance_map = target["labels"], target["instance_map"]
    part = instance_map[:, top:bottom, left:right].contiguous()
    cells = update_target(part, labels, count_areas(instance_map, len(labels)), min_visible)
    return image[:, top:bottom, left:right], {**target, **cells}


def update_target(
    instance_map: torch.Tensor,
    labels: torch.Tensor,
    full_areas: torch.Tensor,
    min_visible: float,
) -> Target:
    """Return boxes, labels and map of the cells that a cropped or warped map still shows.

    Cells that show less than a share of their area are erased, the others numbered anew in their
    old order, and layers left empty removed (one stays). Costs what the map's pixels cost.

    Args:
        instance_map: int32 [L, H, W] whose value k + 1 marks instance k; left as it was.
        labels: int64 [N].
        full_areas: [N], each cell's whole area in pixels of this map; 0 to keep what shows.
        min_visible: drop a cell if area in the map < min_visible * full area; in 0-1.

    Returns:
        dict of `boxes` float32 [M, 4] xyxy half-open, `labels` [M], `instance_map` int32
        [L', H, W].
    """
    pixels, count = instance_map.numpy(), len(labels)
    runs = find_runs(pixels)
    boxes, areas = measure_runs(runs, runs.values - 1, count, pixels.shape[1:])
    keep = (areas > 0) & (areas >= min_visible * full_areas.numpy())
    seen = runs.select(keep[runs.values - 1])
    numbered = replace(seen, values=np.cumsum(keep)[seen.values - 1])
    renumbered = draw_runs(numbered, pixels.size).reshape(pixels.shape)
    filled = np.unique(seen.starts // pixels[0].size)
    if len(filled) < len(pixels):
        renumbered = renumbered[filled if len(filled) else [0]]
    return {
        "boxes": torch.from_numpy(boxes[keep]),
        "labels": labels[torch.from_numpy(keep)],
        "instance_map": torch.from_numpy(renumbered),
    }


def count_areas(instance_map: torch.Tensor, count: int) -> torch.Tensor:
    """Return the pixels of each of `count` instances in a map [L, H, W], int64 [count]."""
    return torch.bincount(instance_map.flatten(), minlength=count + 1)[1:]


def flip_and_turn(pixels: torch.Tensor, turn: int) -> torch.Tensor:
    """Return pixels [..., H, W] under one of the eight symmetries of the square.

    Args:
        pixels: image or map.
        turn: 0-7; quarter turns counter-clockwise are turn % 4, and from 4 on the result is
            flipped left to right afterwards.
    """
    turned = F.rotate(pixels, 90.0 * (turn % 4), expand=True)
    return F.horizontal_flip(turned) if turn >= 4 else turned


def jitter_color(image: torch.Tensor, color: float, generator: torch.Generator) -> torch.Tensor:
    """Return a uint8 image [3, H, W] with brightness, contrast, saturation and hue changed.

    The first three are multiplied by a factor from 1 - color to 1 + color, the hue is turned by
    up to `HUE_SHARE * color` turns either way: of each pixel's colour the part that all channels
    share is grey, the rest is scaled and turned about the axis of greys; contrast is the distance
    from the mean grey of the image. All of it is one linear map, clipped once.
    """
    shifts = [color * (2 * _uniform(generator) - 1) for _ in range(4)]
    brightness, contrast, saturation = (1 + shift for shift in shifts[:3])
    matrix = brightness * contrast * color_matrix(saturation, HUE_SHARE * shifts[3])
    mean_grey = int(image.sum()) / image.numel()
    return mix_channels(image, matrix, brightness * (1 - contrast) * mean_grey)


def color_matrix(saturation: float, hue: float) -> np.ndarray:
    """Return the matrix [3, 3] on RGB that keeps greys and scales and turns what differs from them.

    Args:
        saturation: factor of the distance from grey.
        hue: turns of the colour circle, from red towards green; 1/3 makes red green.
    """
    along = saturation * math.cos(2 * math.pi * hue)
    across = saturation * math.sin(2 * math.pi * hue) / math.sqrt(3)
    grey = (1 - along) / 3
    same, before, after = grey + along, grey + across, grey - across
    return np.array([[same, after, before], [before, same, after], [after, before, same]])


def mix_channels(image: torch.Tensor, matrix: np.ndarray, offset: float) -> torch.Tensor:
    """Return a uint8 image [3, H, W] of matrix @ channels + offset, rounded, clipped to 0-255."""
    channels = [channel.astype(np.float32) for channel in image.numpy()]
    mixed = np.empty_like(image.numpy())
    for factors, out in zip(matrix, mixed, strict=True):
        total = weigh_channels(channels, factors, offset + 0.5)
        np.copyto(out, np.clip(total, 0, 255, out=total), casting="unsafe")
    return torch.from_numpy(mixed)


def _draw_start(length: int, side: int, pixel: int | None, generator: torch.Generator) -> int:
    """Return where a window of `side` starts in `length` pixels, evenly of all places.

    Args:
        length: of the image.
        side: of the window, at most `length`.
        pixel: take only places where the window holds this one; None for all.
        generator: source of the draw.
    """
    first, last = 0, length - side
    if pixel is not None:
        first, last = max(first, pixel - side + 1), min(last, pixel)
    return first + _integer(last - first + 1, generator)


def _uniform(generator: torch.Generator) -> float:
    """Return a number drawn evenly from 0-1."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _integer(stop: int, generator: torch.Generator) -> int:
    """Return a whole number drawn evenly from 0 to stop - 1."""
    return int(torch.randint(stop, (), generator=generator))

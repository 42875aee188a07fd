"""Mask targets of RoIs, sampled from the instance map at its own resolution.

The target of an RoI is the mask of its cell as `roi_align` would pool it: bilinear samples on a
regular grid in each of the M x M bins, averaged. Bilinear weights of a separable grid are a
matrix for the rows and one for the columns, so a target is `rows @ window @ columns.T`, where the
window holds the RoI's own pixels: the cost is the pixels under the RoIs, whatever the number of
cells or the size of the image.
"""

import torch
from torch import Tensor


def sample_mask_targets(
    instance_map: Tensor,
    instances: Tensor,
    rois: Tensor,
    output_size: int,
    *,
    aligned: bool = True,
) -> Tensor:
    """Return the mask targets of one image's RoIs.

    Equal to `torchvision.ops.roi_align(mask, roi, output_size, sampling_ratio=-1)` on the binary
    mask of each RoI's instance (He et al., Mask R-CNN, 2017), without any such mask being made.

    Args:
        instance_map: integers [L, H, W]; the value k + 1 marks instance k.
        instances: int64 [K], instance of each RoI.
        rois: float [K, 4], xyxy in the map's pixels (half-open, sub-pixel).
        output_size: M, bins a side.
        aligned: shift by half a pixel so that pixel i covers [i, i + 1); False is the older
            convention, with sides of at least one pixel, for comparison with torchvision's models.

    Returns:
        [K, M, M] in 0-1, of the RoIs' floating-point type.
    """
    targets = rois.new_zeros((len(rois), output_size, output_size))
    if len(rois) == 0:
        return targets
    height, width = instance_map.shape[-2:]
    offset = 0.5 if aligned else 0.0
    start, size = rois[:, :2] - offset, rois[:, 2:] - rois[:, :2]
    size = size if aligned else size.clamp(min=1)
    # Samples a bin: the smallest whole number that leaves none of the RoI's pixels out.
    samples = torch.ceil(size / output_size).clamp(min=1).long()
    for grid in torch.unique(samples, dim=0).tolist():
        chosen = torch.where((samples == samples.new_tensor(grid)).all(dim=1))[0]
        columns, left = _axis_weights(
            start[chosen, 0], size[chosen, 0], width, output_size, grid[0]
        )
        rows, top = _axis_weights(start[chosen, 1], size[chosen, 1], height, output_size, grid[1])
        window = _windows(
            instance_map, instances[chosen], top, left, rows.shape[-1], columns.shape[-1]
        )
        with torch.autocast(rois.device.type, enabled=False):
            targets[chosen] = rows @ window.to(rows.dtype) @ columns.transpose(1, 2)
    return targets


def _axis_weights(
    start: Tensor, size: Tensor, length: int, bins: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Return the sampling matrix of one axis and the first pixel of each RoI's window.

    Args:
        start: [K], where the RoI starts, in pixel-centre coordinates.
        size: [K], its length in pixels, at most M times the samples.
        length: number of pixels of the map along the axis.
        bins: M.
        samples: samples a bin.

    Returns:
        weights [K, M, P] over the P pixels of the window, and first pixels int64 [K].
    """
    steps = (torch.arange(bins * samples, device=start.device, dtype=start.dtype) + 0.5) / samples
    position = start[:, None] + steps * (size / bins)[:, None]
    # Samples farther than a pixel outside count as 0; nearer ones take the border's pixel.
    share = ((position >= -1) & (position <= length)) / samples
    position = position.clamp(0, length - 1)
    pixel = position.long()
    first = pixel[:, 0]
    pixel = (pixel - first[:, None]).view(-1, bins, samples)
    # A sample lies between two pixels; none is farther than M times the samples from the first.
    upper = (position.frac() * share).view_as(pixel)
    weights = start.new_zeros((len(start), bins, bins * samples + 2))
    weights.scatter_add_(2, pixel, share.view_as(pixel).to(upper.dtype) - upper)
    weights.scatter_add_(2, pixel + 1, upper)
    return weights, first


def _windows(
    instance_map: Tensor, instances: Tensor, top: Tensor, left: Tensor, rows: int, columns: int
) -> Tensor:
    """Return bool [K, rows, columns]: where each window shows its instance, in any layer."""
    height, width = instance_map.shape[-2:]
    y = (top[:, None] + torch.arange(rows, device=top.device)).clamp_(max=height - 1)
    x = (left[:, None] + torch.arange(columns, device=top.device)).clamp_(max=width - 1)
    wanted = (instances + 1).to(instance_map.dtype)[:, None, None]
    pixels = (y[:, :, None] * width + x[:, None, :]).reshape(-1)
    shown = [
        layer.reshape(-1).index_select(0, pixels).view(-1, rows, columns) == wanted
        for layer in instance_map
    ]
    return torch.stack(shown).any(dim=0) if len(shown) > 1 else shown[0]

"""RoIAlign over a pyramid, and as a weighted sum of feature vectors, which is fast on a CPU.

torchvision's kernel walks the features channel by channel, and its backward pass on one thread:
a third of a training step of a small network. A bin's value is a weighted sum of few feature
vectors, so the pooled features are those of a bag of rows in the table [pixels, channels], for
which torch has kernels that are vectorised over channels and use every thread, both ways.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

POOLED_STRIDES = (4, 8, 16, 32)


class PyramidRoIAlign(nn.Module):
    """RoIAlign on the pyramid level that fits each RoI's size.

    torchvision's `MultiScaleRoIAlign` guesses the levels' strides from the first image it sees,
    which is wrong for images much smaller than their padding, and has no `aligned`: pixel i of a
    level covers [i, i + 1) strides here (Detectron2's RoIAlignV2). Levels follow eq. 1 of Lin et
    al., Feature Pyramid Networks, 2017: an RoI of 224 pixels goes to stride 16.
    """

    def __init__(self, output_size: int, *, sampling_ratio: int = 1) -> None:
        """Set the pooling up.

        Args:
            output_size: M, bins a side.
            sampling_ratio: samples a bin and axis; the bins of a cell are about as large as the
                features' pixels, so that a second one adds cost and little else.
        """
        super().__init__()
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio

    def forward(
        self,
        features: dict[str, Tensor],
        rois: list[Tensor],
        image_shapes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Return pooled features [K, channels, M, M] of all images' RoIs behind one another.

        Args:
            features: levels "0" to "3" of strides 4 to 32; others are not used.
            rois: xyxy [K, 4] of each image, in network pixels.
            image_shapes: not needed; part of the interface of RoI heads.
        """
        boxes = torch.cat(rois)
        image_index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(rois)])
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(2 + torch.log2(area.sqrt() / 224 + 1e-6)).clamp(0, 3).long()
        first = features["0"]
        pooled = first.new_zeros(
            (len(boxes), first.shape[1], self.output_size, self.output_size),
            dtype=torch.float32,
        )
        for index, stride in enumerate(POOLED_STRIDES):
            chosen = torch.where(level == index)[0]
            pooled[chosen] = self._pool(
                features[str(index)].float(),
                torch.cat([image_index, boxes], dim=1)[chosen],
                1 / stride,
            )
        return pooled

    def _pool(self, level: Tensor, rois: Tensor, scale: float) -> Tensor:
        """Return the features of RoIs [K, 5] on one level, by what is fast on its device."""
        if level.device.type == "cpu":
            return roi_align_rows(level, rois, self.output_size, scale, self.sampling_ratio)
        return roi_align(level, rois, self.output_size, scale, self.sampling_ratio, aligned=True)


def roi_align_rows(
    features: Tensor, rois: Tensor, output_size: int, spatial_scale: float, sampling_ratio: int
) -> Tensor:
    """Return what `torchvision.ops.roi_align` returns with `aligned=True`.

    The cost is samples times channels; least if the features' memory is channels-last.

    Args:
        features: float [B, C, H, W].
        rois: [K, 5]: index of the image, then xyxy in input pixels.
        output_size: M, bins a side.
        spatial_scale: feature pixels per input pixel.
        sampling_ratio: S, samples a bin and axis, 1 or more.

    Returns:
        [K, C, M, M].
    """
    channels, height, width = features.shape[1:]
    image = rois[:, 0].long()
    row, row_weight = _axis_taps(rois[:, 2::2], spatial_scale, height, output_size, sampling_ratio)
    column, column_weight = _axis_taps(
        rois[:, 1::2], spatial_scale, width, output_size, sampling_ratio
    )
    # Every bin takes all pairs of a row and a column: [K, M, M, 2 S, 2 S].
    first = (image * height)[:, None, None]
    pixel = ((first + row) * width)[:, :, None, :, None] + column[:, None, :, None, :]
    weight = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]
    taps = (2 * sampling_ratio) ** 2
    pooled = F.embedding_bag(
        pixel.reshape(-1, taps),
        features.permute(0, 2, 3, 1).reshape(-1, channels),
        per_sample_weights=weight.reshape(-1, taps).to(features.dtype),
        mode="sum",
    )
    return pooled.view(len(rois), output_size, output_size, channels).permute(0, 3, 1, 2)


def _axis_taps(
    sides: Tensor, spatial_scale: float, length: int, bins: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Return the pixels that each bin reads along one axis, and their weights.

    Args:
        sides: [K, 2], start and end of each RoI in input pixels.
        spatial_scale: feature pixels per input pixel.
        length: pixels of the features along the axis.
        bins: M.
        samples: S, samples a bin.

    Returns:
        int64 and float [K, M, 2 S].
    """
    start = sides[:, :1] * spatial_scale - 0.5
    size = (sides[:, 1:] - sides[:, :1]) * spatial_scale
    steps = (torch.arange(bins * samples, device=sides.device, dtype=sides.dtype) + 0.5) / samples
    position = start + steps * (size / bins)
    # Samples farther than a pixel outside count as 0; nearer ones take the border's pixel.
    share = ((position >= -1) & (position <= length)).to(position.dtype) / samples
    position = position.clamp(0, length - 1)
    low = position.long()
    high = (low + 1).clamp(max=length - 1)
    upper = (position - low) * share
    pixels = torch.stack([low, high], dim=-1)
    weights = torch.stack([share - upper, upper], dim=-1)
    shape = (len(sides), bins, 2 * samples)
    return pixels.view(shape), weights.view(shape)

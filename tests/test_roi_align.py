"""RoIAlign by rows against torchvision's kernel, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from cellseg.models.roi_align import roi_align_rows

torch.set_num_threads(1)


def make_input(seed: int, height: int, width: int, count: int):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60 - 15
    sides = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40
    image = torch.randint(2, (count, 1), generator=generator).double()
    return features, torch.cat([image, corners, corners + sides], dim=1)


@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 12),
    width=st.integers(1, 9),
    count=st.integers(0, 5),
    bins=st.sampled_from([1, 2, 7]),
    samples=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_equals_torchvision_inside_at_borders_and_outside(
    seed, height, width, count, bins, samples
):
    features, rois = make_input(seed, height, width, count)
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    found = roi_align_rows(ours, rois, bins, 0.25, samples)
    expected = roi_align(theirs, rois, bins, 0.25, samples, aligned=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def test_one_bin_over_four_pixels_is_their_mean():
    features = torch.arange(12.0).view(1, 1, 3, 4)  # rows 0-3, 4-7, 8-11
    roi = torch.tensor([[0.0, 1, 0, 3, 2]])  # covers 1, 2, 5, 6
    assert roi_align_rows(features, roi, 1, 1.0, 1).item() == pytest.approx(3.5)


def test_channels_last_features_give_the_same():
    features, rois = make_input(0, 8, 9, 4)
    last = features.to(memory_format=torch.channels_last)
    assert torch.equal(
        roi_align_rows(features, rois, 7, 0.25, 1), roi_align_rows(last, rois, 7, 0.25, 1)
    )

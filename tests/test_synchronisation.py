"""A training step makes the host wait no more often than torchvision's, however many cells."""

import warnings
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.made import cells_on_grid
from benchmarks.usual_loop import usual_model
from cellseg.models import get_model_mobilenetv2

SIDE = 256
NETWORK = {"weights": None, "norm": "frozen", "fpn_channels": 8, "head_width": 16}
# Operators whose result has a size, or is a number, that the host must know: on CUDA it waits.
WAITS = {
    "nonzero", "masked_select", "_local_scalar_dense", "is_nonzero", "equal", "repeat_interleave",
    "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "nms",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Counts the operators that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        known_size = kwargs.get("output_size") is not None
        by_mask = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (name in WAITS and not known_size) or by_mask:
            self.counts[name] += 1
        return func(*args, **kwargs)


def make_step(side: str, cells: int, device: str = "cpu") -> Any:
    """Return a function that computes the gradients of two images of so many cells."""
    instance_map, boxes, labels = cells_on_grid(cells, SIDE)
    model = get_model_mobilenetv2(5, **NETWORK)
    target = {"boxes": boxes, "labels": labels}
    image = torch.randint(256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)) / 255
    if side == "ours":
        target["instance_map"] = instance_map
    else:
        model = usual_model(model, 5, SIDE)
        numbers = torch.arange(1, cells + 1)[:, None, None]
        target["masks"] = (instance_map == numbers).byte()
    model = model.to(device).train()
    target = {name: value.to(device) for name, value in target.items()}
    image = image.to(device)
    return lambda: sum(model([image, image], [dict(target), dict(target)]).values()).backward()


@cache
def waits(side: str, cells: int) -> int:
    with Waits() as counted:
        make_step(side, cells)()
    # `tolist` of the distinct sampling grids is no operator: one more wait an image.
    return counted.counts.total() + (2 if side == "ours" else 0)


def test_the_host_waits_no_more_often_than_in_torchvisions_step():
    assert 0 < waits("ours", 100) <= waits("usual", 100)


@pytest.mark.parametrize("cells", [10, 400])
def test_the_number_of_cells_does_not_change_how_often_the_host_waits(cells):
    assert waits("ours", cells) == waits("ours", 100)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_counts_no_more_synchronisations_than_in_torchvisions_step():
    counts = {}
    for side in ("usual", "ours"):
        for cells in (10, 400):
            step = make_step(side, cells, "cuda")
            step()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            counts[side, cells] = sum("synchroniz" in str(w.message) for w in caught)
    assert counts["ours", 10] <= counts["usual", 10]
    assert counts["ours", 400] <= counts["ours", 10] + 2  # other sampling grids, at most

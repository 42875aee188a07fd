"""Stages around the network: torchvision's own functions and ours, on the same made input."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from benchmarks.made import cells_on_grid, jittered_boxes, predicted_masks
from benchmarks.stage import Stage
from cellseg.coco import Rle, rle_to_mask
from cellseg.inference import masks_to_rles
from cellseg.models.mask_targets import sample_mask_targets
from cellseg.models.matching import AnchorGrid
from cellseg.models.options import ANCHOR_SIZES, ASPECT_RATIOS
from cellseg.models.rpn import CellRPN

MASK_SIDE = 28
THRESHOLD = 0.5
STRIDES = (4, 8, 16, 32, 64)
SAMPLED_AT_ONCE = 25  # full frames of float32 at 1000 x 1000: 100 MB
PASTED_AT_ONCE = 50


@dataclass(frozen=True)
class RoiInput:
    """RoIs of one image with its cells in both forms.

    Attributes:
        image: float [3, H, W].
        boxes: float [N, 4], of the cells.
        stack: uint8 [N, H, W], a mask a cell, as torchvision takes them.
        instance_map: int32 [1, H, W], as we take them.
        rois: float [K, 4].
        instances: int64 [K], the cell of each RoI.
        transform: torchvision's, at the image's own size.
    """

    image: Tensor
    boxes: Tensor
    stack: Tensor
    instance_map: Tensor
    rois: Tensor
    instances: Tensor
    transform: GeneralizedRCNNTransform


def make_rois(cells: int = 300, side: int = 800, rois: int = 128) -> RoiInput:
    """Return RoIs of cells, each a few pixels off its cell's box."""
    instance_map, boxes, _ = cells_on_grid(cells, side)
    stack = (instance_map == torch.arange(1, cells + 1)[:, None, None]).byte()
    instances = torch.arange(rois) % cells
    transform = GeneralizedRCNNTransform(side, side, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    near = jittered_boxes(boxes, rois).clamp(0, side)
    return RoiInput(
        torch.rand(3, side, side), boxes, stack, instance_map, near, instances, transform
    )


def project_resized_stack(data: RoiInput) -> Tensor:
    """Return mask targets [K, 28, 28] as torchvision makes them: resize all masks, then pool."""
    target = {"boxes": data.boxes, "masks": data.stack}
    _, target = data.transform.resize(data.image, target)
    return project_masks_on_boxes(target["masks"], data.rois, data.instances, MASK_SIDE)


def sample_targets(data: RoiInput) -> Tensor:
    """Return mask targets [K, 28, 28] from the instance map."""
    return sample_mask_targets(
        data.instance_map, data.instances, data.rois, MASK_SIDE, aligned=False
    )


@dataclass(frozen=True)
class AnchorInput:
    """Anchors and cells of one image, and the networks that match them."""

    anchors: Tensor
    target: dict
    plain: RegionProposalNetwork
    ours: CellRPN


def make_anchors(cells: int = 1000, side: int = 1000) -> AnchorInput:
    """Return cells among the anchors of all levels, 250,122 of them at 1000 x 1000."""
    generator = AnchorGenerator(
        tuple((size,) for size in ANCHOR_SIZES), (ASPECT_RATIOS,) * len(ANCHOR_SIZES)
    )
    shapes = [(-(-side // stride),) * 2 for stride in STRIDES]
    levels = [torch.empty(1, 1, *shape) for shape in shapes]
    images = ImageList(torch.empty(1, 3, side, side), [(side, side)])
    anchors = generator(images, levels)[0]
    grids = [
        AnchorGrid(cell_anchors, *shape, side // shape[0], side // shape[1])
        for cell_anchors, shape in zip(generator.cell_anchors, shapes, strict=True)
    ]
    kept = {"training": 2000, "testing": 2000}
    parts = (generator, nn.Identity(), 0.7, 0.3, 256, 0.5)
    plain = RegionProposalNetwork(*parts, kept, kept, 0.7)
    ours = CellRPN(*parts, nms_thresh=0.7, train_proposals=2000, proposals=2000)
    target = {"boxes": cells_on_grid(cells, side)[1], "anchor_grids": grids}
    return AnchorInput(anchors, target, plain, ours)


def match(data: AnchorInput, side: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return labels and matched boxes of all anchors through one of the networks."""
    network = data.plain if side == "reference" else data.ours
    return network.assign_targets_to_anchors([data.anchors], [data.target])


def same_matches(reference: tuple, ours: tuple) -> bool:
    """Return whether labels and matched boxes are identical."""
    return all(
        torch.equal(*pair)
        for kind in zip(reference, ours, strict=True)
        for pair in zip(*kind, strict=True)
    )


Prediction = tuple[Tensor, Tensor, tuple[int, int]]


def make_predictions(count: int, side: int) -> Prediction:
    """Return masks, boxes and the image's size."""
    return *predicted_masks(count, side), (side, side)


def paste_and_encode(data: Prediction) -> list[Rle]:
    """Return RLEs as torchvision's evaluation makes them: full frames, then pycocotools."""
    masks = paste_masks_in_image(*data) > THRESHOLD
    rles = [
        mask_utils.encode(np.array(mask[0, :, :, np.newaxis], dtype=np.uint8, order="F"))[0]
        for mask in masks
    ]
    return [rle | {"counts": rle["counts"].decode("utf-8")} for rle in rles]


def paste_and_encode_by_parts(data: Prediction) -> list[Rle]:
    """Return the same of a few masks at a time, so that it fits into memory."""
    masks, boxes, size = data
    parts = zip(masks.split(PASTED_AT_ONCE), boxes.split(PASTED_AT_ONCE), strict=True)
    return [rle for part in parts for rle in paste_and_encode((*part, size))]


def crop_and_encode(data: Prediction, paste: str) -> list[Rle]:
    """Return RLEs through our paste."""
    return masks_to_rles(*data, mask_threshold=THRESHOLD, paste=paste)


def agrees_with_full_frames(data: Prediction, rles: list[Rle]) -> bool:
    """Return whether RLEs are what `grid_sample` on the full frame gives, Detectron2's paste.

    Pixels whose probability is within 1e-4 of the threshold may fall on either side.
    """
    masks, boxes, size = data
    for first in range(0, len(masks), SAMPLED_AT_ONCE):
        part = slice(first, first + SAMPLED_AT_ONCE)
        expected = sample_full_frames(masks[part], boxes[part], size) - THRESHOLD
        found = torch.from_numpy(np.stack([rle_to_mask(rle) for rle in rles[part]]))
        if ((found != (expected > 0)) & (expected.abs() > 1e-4)).any():
            return False
    return True


def sample_full_frames(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return probabilities [K, H, W] at every pixel's centre."""
    x1, y1, x2, y2 = (edge[:, None] for edge in boxes.unbind(1))
    y = (torch.arange(size[0]) + 0.5 - y1) / (y2 - y1) * 2 - 1
    x = (torch.arange(size[1]) + 0.5 - x1) / (x2 - x1) * 2 - 1
    shape = (len(boxes), *size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(masks, grid, align_corners=False)[:, 0]


def _paste_stage(count: int) -> Stage:
    return Stage(
        name=f"masks_to_rle_{count}",
        floor=60,
        make=partial(make_predictions, count, 1000),
        reference=paste_and_encode,
        ours=partial(crop_and_encode, paste="torchvision"),
        equal=lambda reference, ours: reference == ours,
        note="byte for byte torchvision's paste",
    )


STAGES = (
    Stage(
        name="mask_targets",
        floor=60,
        make=make_rois,
        reference=project_resized_stack,
        ours=sample_targets,
        equal=partial(torch.allclose, rtol=0, atol=1e-4),
    ),
    Stage(
        name="rpn_matching",
        floor=10,
        make=make_anchors,
        reference=partial(match, side="reference"),
        ours=partial(match, side="ours"),
        equal=same_matches,
        memory_floor=20,
    ),
    _paste_stage(300),
    _paste_stage(500),
    Stage(
        name="masks_to_rle_aligned",
        floor=60,
        make=partial(make_predictions, 500, 1000),
        reference=paste_and_encode,
        ours=partial(crop_and_encode, paste="aligned"),
        equal=lambda _, ours: agrees_with_full_frames(make_predictions(500, 1000), ours),
        note="500 masks pasted at sub-pixel places, the default; time and memory against "
        "torchvision's paste, result against `grid_sample` on full frames",
    ),
    Stage(
        name="masks_to_rle_memory",
        floor=60,
        make=partial(make_predictions, 1000, 2000),
        reference=paste_and_encode_by_parts,
        ours=partial(crop_and_encode, paste="torchvision"),
        equal=lambda reference, ours: reference == ours,
        runs=1,
        memory_limit_mb=200,
        reference_mb=1000 * 2000 * 2000 * 4 / 2**20,
        note="1,000 masks at 2000 x 2000; the reference's memory is computed (its float32 frames "
        f"alone), its time taken {PASTED_AT_ONCE} masks at a time",
    ),
)

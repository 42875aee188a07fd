"""Builders: anchors, strides, scale, limits, and a model rebuilt from its own description."""

import json

import pytest
import torch
from tiny_models import make_image, make_target, tiny_model
from torch import nn
from torchvision import models as zoo
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align
from torchvision.ops.poolers import initLevelMapper

from cellseg.errors import SettingsError
from cellseg.models import (
    BUILDERS,
    DetectorOptions,
    build_from_spec,
    builders,
    count_trainable_parameters,
    get_model_convnext_tiny,
    heads,
)
from cellseg.models.roi_align import PyramidRoIAlign
from cellseg.training.validation import forked_seed

HEIGHT, WIDTH = 48, 80
SQUARES = [(1, 6, 5, 20, 17), (2, 40, 22, 58, 41)]


def norms(model):
    return [m for m in model.modules() if "BatchNorm" in type(m).__name__]


def losses_of(model, image, target, seed=0):
    with forked_seed(seed, torch.device("cpu")):
        return model([image], [target])


LARGE = ("get_model_convnext_small", "get_model_convnext_base")


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[pytest.mark.slow] if k in LARGE else []) for k in BUILDERS]
)
def test_every_builder_has_small_anchors_on_fine_levels(name):
    model = BUILDERS[name](5, weights=None)
    squares = [cells[1] for cells in model.rpn.anchor_generator.cell_anchors]
    assert [square.tolist() for square in squares] == [
        [-side / 2, -side / 2, side / 2, side / 2] for side in (8, 16, 32, 64, 128)
    ]
    for k, side in enumerate((8, 16, 32, 64, 128)):
        cells = model.rpn.anchor_generator.cell_anchors[k]
        extent = cells[:, 2:] - cells[:, :2]
        # Three shapes, flat to tall; corners on whole pixels, so areas hold to 15 %.
        assert (extent[:, 1] / extent[:, 0]).tolist() == pytest.approx([0.5, 1, 2], rel=0.1)
        assert extent.prod(dim=1).tolist() == pytest.approx([side**2] * 3, rel=0.15)
    with torch.no_grad():
        levels = model.eval().backbone(torch.zeros(1, 3, 128, 192))
    strides = [(128 // level.shape[2], 192 // level.shape[3]) for level in levels.values()]
    assert strides == [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]
    assert {level.shape[1] for level in levels.values()} == {256}
    assert 0 < count_trainable_parameters(model) < 200_000_000


def test_dense_tissue_fits_the_defaults():
    options = DetectorOptions()
    assert options.detections_per_image >= 1000
    tile_of_consep = 1000 * 1000 * 4 / 1e6  # network megapixels at scale 2, 2,283 nuclei
    assert options.proposals * tile_of_consep >= 3 * 2283
    assert options.score_threshold <= 0.05


def test_options_reach_the_parts():
    model = tiny_model(
        6, anchor_sizes=(6, 12, 24, 48, 96), rpn_samples=32, rois_per_image=64, train_proposals=7,
        proposals=7000, detections_per_image=7, score_threshold=0.01, nms_threshold=0.3,
    )  # fmt: skip
    squares = [cells[1, 2] * 2 for cells in model.rpn.anchor_generator.cell_anchors]
    assert [int(side) for side in squares] == [6, 12, 24, 48, 96]
    assert model.rpn.fg_bg_sampler.batch_size_per_image == 32
    assert model.train().rpn.most_proposals((64, 96)) == 7
    assert model.eval().rpn.most_proposals((64, 96)) == 44  # 7000 x 64 x 96 / 10^6, rounded up
    assert model.rpn.most_proposals((20, 20)) == 7
    parts = model.roi_heads
    assert parts.fg_bg_sampler.batch_size_per_image == 64
    assert (parts.detections_per_img, parts.score_thresh, parts.nms_thresh) == (7, 0.01, 0.3)
    assert parts.box_predictor.cls_score.out_features == 6
    assert parts.box_predictor.bbox_pred.out_features == 24
    assert parts.mask_predictor.mask_fcn_logits.out_channels == 6


def test_sizes_of_rois_and_depth_of_the_mask_head_are_options():
    model = tiny_model(box_roi_size=5, mask_roi_size=8, mask_layers=2, score_threshold=0.0).eval()
    with torch.inference_mode():
        found = model([make_image(64, 96)])[0]
    assert found["masks"].shape[1:] == (1, 16, 16)
    assert model.roi_heads.box_head.fc6.in_features == 16 * 5 * 5
    convolutions = [m for m in model.roi_heads.mask_head.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 2


def test_one_mask_for_whatever_class_is_an_option():
    model = tiny_model(4, class_masks=False, score_threshold=0.0).train()
    assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 1
    squares = [(1, 4, 5, 24, 25), (2, 30, 8, 60, 40)]
    losses_of(model, make_image(HEIGHT, WIDTH, squares), make_target(HEIGHT, WIDTH, squares))[
        "loss_mask"
    ].backward()
    assert model.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.abs().sum() > 0
    with torch.inference_mode():
        found = model.eval()([make_image(HEIGHT, WIDTH, squares)])[0]
    assert set(found["labels"].tolist()) == {1, 2, 3}
    assert found["masks"].shape[1:] == (1, 28, 28)


def test_the_mask_loss_sees_at_most_so_many_cells(monkeypatch):
    squares = [(1 + k % 2, 4 + 9 * k, 5, 11 + 9 * k, 13) for k in range(8)]
    target, seen = make_target(HEIGHT, WIDTH, squares), []
    monkeypatch.setattr(
        "cellseg.models.heads.sample_mask_targets",
        lambda instance_map, instances, rois, size: (
            seen.append((instances, rois)) or torch.zeros(len(rois), size, size)
        ),
    )
    for mask_rois in (None, 5, 1000):
        model = tiny_model(rois_per_image=64, mask_rois=mask_rois).train()
        losses_of(model, make_image(HEIGHT, WIDTH), target)
    (every, all_rois), (some, rois), (many, many_rois) = seen
    assert len(every) >= 8 and len(some) == len(rois) == 5
    # A part of the same RoIs, each with its own cell; not simply the first of them.
    places = [(all_rois == roi).all(dim=1).nonzero()[0].item() for roi in rois]
    assert len(set(places)) == 5 and places != [0, 1, 2, 3, 4]
    assert torch.equal(every[places], some)
    assert torch.equal(many, every) and torch.equal(many_rois, all_rois)


def test_more_than_a_hundred_cells_can_be_found():
    model = tiny_model(train_proposals=200, score_threshold=0.0, nms_threshold=1.0).eval()
    with torch.inference_mode():
        found = model([make_image(64, 96)])[0]
        model.roi_heads.detections_per_img = 7
        few = model([make_image(64, 96)])[0]
    assert len(found["scores"]) > 300  # 200 proposals, two classes, less those without extent
    assert len(few["scores"]) == len(few["masks"]) == 7
    assert set(found["labels"].tolist()) == {1, 2}
    assert found["masks"].shape[1:] == (1, 28, 28)
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def test_detections_are_those_of_torchvision():
    parts = tiny_model(4, score_threshold=0.2, detections_per_image=60).roi_heads.eval()
    torch.manual_seed(0)
    corners, shapes = 90 * torch.rand(300, 2), [(100, 90), (60, 100)]
    proposals = torch.cat([corners, corners + 2 + 20 * torch.rand(300, 2)], dim=1).split([180, 120])
    predicted = torch.randn(300, 4), torch.randn(300, 16), list(proposals), shapes
    found = parts.postprocess_detections(*predicted)
    expected = RoIHeads.postprocess_detections(parts, *predicted)
    assert [len(boxes) for boxes in found[0]] == [60, 60]
    for own, its in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(own, its, strict=True))


@pytest.mark.parametrize(
    ("shape", "kept"), [((500, 1000), 10), ((1000, 1000), 10), ((2000, 1200), 24)]
)
def test_a_larger_image_keeps_as_many_a_megapixel(shape, kept):
    parts = tiny_model(2, score_threshold=0.0, detections_per_image=10).roi_heads.eval()
    corner = torch.stack(torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij"))
    corner = 50 * corner.flatten(1).T
    boxes = torch.cat([corner, corner + 40], dim=1)
    found = parts.postprocess_detections(torch.zeros(100, 2), torch.zeros(100, 8), [boxes], [shape])
    assert [len(column[0]) for column in found] == [kept] * 3


def test_many_boxes_are_looked_at_in_parts(monkeypatch):
    model = tiny_model(score_threshold=0.0, detections_per_image=2000).eval()
    images = [make_image(64, 96, [(1, 8, 8, 30, 30)]), make_image(80, 50, [(2, 9, 30, 30, 50)])]
    with torch.inference_mode():
        whole = model(images)
        monkeypatch.setattr("cellseg.models.heads.BOXES_AT_ONCE", 7)
        parts = model(images)
    for one, other in zip(whole, parts, strict=True):
        assert len(one["boxes"]) == len(other["boxes"]) > 14
        assert torch.allclose(one["boxes"], other["boxes"], atol=1e-3)
        assert torch.allclose(one["scores"], other["scores"], atol=1e-5)


def record_shapes(model):
    """Return a list to which each forward pass adds its network input and its raw boxes."""
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model.roi_heads.register_forward_hook(
        lambda _, inputs, output: seen.append([d["boxes"].clone() for d in output[0]])
    )
    return seen


@pytest.mark.parametrize(
    ("scale", "size", "network"),
    [
        (1.0, (70, 200), (128, 256)),
        (2.0, (40, 100), (128, 256)),
        (0.5, (100, 300), (64, 192)),
        (1.0, (33, 33), (64, 64)),
        (1.5, (33, 20), (64, 64)),
        (1.0, (1, 1), (64, 64)),
    ],
)
def test_scale_is_the_networks_and_boxes_are_the_images(scale, size, network):
    model = tiny_model(image_scale=scale, score_threshold=0.0).eval()
    seen = record_shapes(model)
    with torch.inference_mode():
        boxes = model([make_image(*size)])[0]["boxes"]
    assert seen[0] == (1, 3, *network)
    height, width = (max(1, round(side * scale)) for side in size)
    factor = torch.tensor([size[1] / width, size[0] / height] * 2)
    assert torch.equal(boxes, seen[1][0] * factor)
    assert (boxes[:, 2:] <= torch.tensor([size[1], size[0]]) + 1e-3).all()
    if min(size) > 1:
        assert len(boxes)


def test_transform_scales_boxes_there_and_back():
    transform = tiny_model(image_scale=2.0).transform
    target = make_target(40, 100, [(1, 10, 15, 50, 30)])
    images, moved = transform([make_image(40, 100)], [target])
    assert images.image_sizes == [(80, 200)]
    assert images.tensors.shape == (1, 3, 128, 256)
    assert not images.tensors[..., 80:, :].any() and not images.tensors[..., 200:].any()
    assert moved[0]["boxes"].tolist() == [[20, 30, 100, 60]]
    assert moved[0]["map_scale"] == (0.5, 0.5)
    assert moved[0]["instance_map"] is target["instance_map"]
    assert target["boxes"].tolist() == [[10, 15, 50, 30]]
    back = transform.postprocess([{"boxes": moved[0]["boxes"]}], [(80, 200)], [(40, 100)])
    assert back[0]["boxes"].tolist() == [[10, 15, 50, 30]]


def test_byte_and_float_images_are_the_same_to_the_network():
    transform = tiny_model().transform
    image = make_image(10, 20, [(1, 2, 2, 5, 8)])
    batch = transform([image])[0].tensors
    assert torch.equal(batch, transform([image / 255])[0].tensors)
    # Red 230 of 255, less the mean and over the deviation of ImageNet's red.
    assert batch[0, 0, 0, 0].item() == pytest.approx((230 / 255 - 0.485) / 0.229)
    assert transform([image.double() / 255])[0].tensors.dtype == torch.float32


def test_sure_masks_come_first_if_that_is_wanted():
    model = tiny_model(mask_quality=2.0)
    masks = torch.full((4, 1, 2, 2), 0.2)
    masks[0, 0, 0] = torch.tensor([0.6, 0.8])  # mean 0.7 of two pixels over one half
    masks[1] = 0.9
    masks[3, 0, 1, 1] = 0.5  # not over one half
    found = {
        "boxes": torch.arange(16.0).reshape(4, 4), "labels": torch.tensor([1, 2, 3, 4]),
        "scores": torch.tensor([0.8, 0.5, 0.4, 0.3]), "masks": masks,
    }  # fmt: skip
    weighed = heads.weigh_by_masks(found, model.roi_heads.mask_quality)
    assert weighed["scores"].tolist() == pytest.approx([0.5 * 0.81, 0.8 * 0.49, 0, 0])
    assert weighed["labels"].tolist() == [2, 1, 3, 4]
    assert torch.equal(weighed["masks"], masks[[1, 0, 2, 3]])
    assert torch.equal(weighed["boxes"][0], torch.arange(4.0, 8))
    assert found["scores"].tolist() == pytest.approx([0.8, 0.5, 0.4, 0.3])


def test_mask_quality_changes_scores_alone():
    plain, weighed = (
        tiny_model(score_threshold=0.0),
        tiny_model(score_threshold=0.0, mask_quality=1.0),
    )
    with torch.inference_mode():
        before, after = (m.eval()([make_image(64, 96, SQUARES)])[0] for m in (plain, weighed))
    assert len(before["scores"]) == len(after["scores"]) > 10
    assert after["scores"].tolist() == sorted(after["scores"].tolist(), reverse=True)
    assert (after["scores"].sort().values <= before["scores"].sort().values).all()
    assert torch.allclose(after["boxes"].sum(dim=0), before["boxes"].sum(dim=0))


def test_images_of_different_size_share_a_batch():
    model = tiny_model(score_threshold=0.0).eval()
    images = [make_image(33, 90, SQUARES[:1]), make_image(120, 40)]
    with torch.inference_mode():
        found = model(images)
    assert len(found) == 2
    for image, detections in zip(images, found, strict=True):
        assert (detections["boxes"][:, 2] <= image.shape[2]).all()
        assert (detections["boxes"][:, 3] <= image.shape[1]).all()


def test_frozen_norms_do_not_change_in_training():
    model = tiny_model(norm="frozen").train()
    before = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in norms(model)]
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    target = make_target(HEIGHT, WIDTH, SQUARES)
    sum(losses_of(model, make_image(HEIGHT, WIDTH), target).values()).backward()
    optimiser.step()
    assert len(before) == 51  # MobileNetV2's 52 less that of its last, unused layer
    for norm, state in zip(norms(model), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("norm", ["auto", "trained"])
def test_a_random_network_trains_its_norms(norm):
    model = tiny_model(norm=norm).train()
    assert {type(module) for module in norms(model)} == {nn.BatchNorm2d}
    before = model.backbone.body["0"][1].running_mean.clone()
    losses_of(model, make_image(HEIGHT, WIDTH), make_target(HEIGHT, WIDTH, SQUARES))
    assert not torch.equal(model.backbone.body["0"][1].running_mean, before)
    assert model.spec["arguments"]["norm"] == "trained"


@pytest.mark.parametrize(("stages", "first"), [(5, 0), (4, 2), (3, 4), (2, 7), (1, 14), (0, 18)])
def test_trainable_stages_count_from_the_end(stages, first):
    body = tiny_model(trainable_stages=stages).backbone.body
    learns = [int(key) for key, layer in body.items() if next(layer.parameters()).requires_grad]
    assert learns == list(range(first, 18))


@pytest.mark.parametrize(("stages", "first"), [(5, 0), (4, 1), (3, 2), (2, 4), (1, 6), (0, 8)])
def test_convnexts_stages_begin_with_their_downsampling(stages, first):
    with torch.device("meta"):
        backbone = get_model_convnext_tiny(3, weights=None, trainable_stages=stages).backbone
    body = backbone.body
    learns = [int(key) for key, layer in body.items() if next(layer.parameters()).requires_grad]
    assert learns == list(range(first, 8))
    assert all(parameter.requires_grad for parameter in backbone.tap_norms.parameters())


def test_convnexts_levels_are_normed_where_they_are_tapped():
    """Each level the FPN reads has mean 0 and deviation 1 a place; the stages read it as it is."""
    backbone = get_model_convnext_tiny(3, weights=None, fpn_channels=16, head_width=8).backbone
    seen = []
    backbone.fpn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        backbone.eval()(image)
        taps = backbone.body(image)
        deepest = zoo.convnext_tiny(weights=None).features.eval()
        deepest.load_state_dict(backbone.body.state_dict())
        assert torch.allclose(taps["3"], deepest(image), atol=1e-5)
    for (name, level), stride in zip(seen[0].items(), (4, 8, 16, 32), strict=True):
        assert level.shape == taps[name].shape == (1, level.shape[1], 64 // stride, 96 // stride)
        variance, mean = torch.var_mean(level, dim=1, correction=0)
        assert mean.abs().max() < 1e-4 and (variance - 1).abs().max() < 0.05
        # Of random networks only the stem's output is normed already.
        assert torch.allclose(level, taps[name], atol=1e-2) == (stride == 4)


def test_a_frozen_stage_keeps_its_weights_and_the_loss_its_gradient():
    model = tiny_model(trainable_stages=0).train()
    target = make_target(HEIGHT, WIDTH, SQUARES)
    sum(losses_of(model, make_image(HEIGHT, WIDTH), target).values()).backward()
    assert all(parameter.grad is None for parameter in model.backbone.body.parameters())
    assert model.backbone.fpn.inner_blocks[0][0].weight.grad.abs().sum() > 0


BAD_OPTIONS = [
    ({"anchors": 3}, "get_model_mobilenetv2 has no option 'anchors'; use one of anchor_sizes"),
    ({"anchor_sizes": (8, 16)}, r"anchor_sizes is \[8, 16\]; give 5 sizes of more than 0"),
    ({"anchor_sizes": (0, 8, 16, 32, 64)}, "give 5 sizes of more than 0, one a level"),
    ({"image_scale": 0}, "image_scale is 0; give a finite number above 0"),
    ({"image_scale": float("inf")}, "image_scale is inf; give a finite number above 0"),
    ({"image_scale": float("nan")}, "image_scale is nan; give a finite number above 0"),
    ({"norm": "group"}, "norm is 'group'; use one of auto, frozen, heads, trained"),
    ({"trainable_stages": 6}, "trainable_stages is 6; give 0 to 5"),
    ({"score_threshold": 5}, "score_threshold is 5; give 0 to 1"),
    ({"nms_threshold": -0.1}, "nms_threshold is -0.1; give 0 to 1"),
    ({"fpn_channels": 0}, "fpn_channels is 0; give 1 or more"),
    ({"proposals": 0}, "proposals is 0; give 1 or more"),
    ({"mask_rois": 0}, "mask_rois is 0; give 1 or more, or None for all"),
    ({"mask_quality": -1}, "mask_quality is -1; give 0 or more"),
    ({"mask_layers": 0}, "mask_layers is 0; give 1 or more"),
    ({"detections_per_image": -1}, "detections_per_image is -1; give 1 or more"),
    ({"seed": -1}, "seed is -1; give 0 or more"),
    ({"weights": "COCO"}, "has no weights 'COCO'; use DEFAULT, IMAGENET, a file, or None"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(b[0]) for b in BAD_OPTIONS])
def test_a_bad_option_is_named_with_its_remedy(options, message):
    with pytest.raises(SettingsError, match=message):
        tiny_model(**options)


def test_one_class_is_not_enough():
    with pytest.raises(SettingsError, match="num_classes is 1; give 2 or more, background incl"):
        tiny_model(1)


def test_a_model_past_the_courses_limit_is_refused(monkeypatch):
    monkeypatch.setattr(builders, "MAX_TRAINABLE_PARAMETERS", 1_000_000)
    with pytest.raises(SettingsError, match=r"has 1,868,225 trainable .* lower fpn_channels"):
        tiny_model()
    assert count_trainable_parameters(tiny_model(trainable_stages=0)) < 1_000_000


@pytest.mark.parametrize(
    "options", [{}, {"norm": "frozen", "image_scale": 1.5, "anchor_sizes": (4, 8, 16, 32, 64)}]
)
def test_a_spec_rebuilds_the_model(options):
    model = tiny_model(4, score_threshold=0.0, **options).eval()
    again = build_from_spec(json.loads(json.dumps(model.spec))).eval()
    state = model.state_dict()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    assert again.spec == model.spec
    again.load_state_dict(state)
    with torch.inference_mode():
        image = make_image(HEIGHT, WIDTH, SQUARES)
        found, expected = again([image])[0], model([image])[0]
    assert len(expected["scores"]) > 0
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_random_weights_are_a_function_of_the_seed():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    key = "rpn.head.cls_logits.weight"
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_an_unknown_builder_is_named():
    with pytest.raises(SettingsError, match="'get_model_vgg' is unknown; use one of get_model"):
        build_from_spec({"builder": "get_model_vgg", "arguments": {}})


def test_a_one_pixel_cell_has_a_finite_loss():
    target = make_target(HEIGHT, WIDTH, [(1, 30, 11, 31, 12)])
    losses = losses_of(tiny_model().train(), make_image(HEIGHT, WIDTH), target)
    assert losses.keys() == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask",
    }  # fmt: skip
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["loss_mask"] > 0 and losses["loss_rpn_box_reg"] > 0


def test_an_image_without_cells_teaches_background():
    model = tiny_model().train()
    losses = losses_of(model, make_image(HEIGHT, WIDTH), make_target(HEIGHT, WIDTH, []))
    assert losses["loss_objectness"] > 0 and losses["loss_classifier"] > 0
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.rpn.head.cls_logits.weight.grad.abs().sum() > 0
    assert not model.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.any()


def test_a_target_without_a_map_is_refused():
    target = make_target(HEIGHT, WIDTH, SQUARES)
    del target["instance_map"]
    with pytest.raises(ValueError, match="a target has no instance_map"):
        losses_of(tiny_model().train(), make_image(HEIGHT, WIDTH), target)


def test_a_mask_learns_its_own_cell_at_any_scale(monkeypatch):
    """RoIs are in network pixels, the map in its own: the factor between them is used."""
    seen = []
    monkeypatch.setattr(
        "cellseg.models.heads.sample_mask_targets",
        lambda instance_map, instances, rois, size: (
            seen.append(rois) or torch.zeros(len(rois), size, size)
        ),
    )
    model = tiny_model(image_scale=2.0).train()
    losses_of(model, make_image(HEIGHT, WIDTH), make_target(HEIGHT, WIDTH, SQUARES[:1]))
    # The true box is always among the RoIs; in the map's pixels it is the target's own.
    assert (seen[0] == torch.tensor([6.0, 5, 20, 17])).all(dim=1).any()


def test_each_roi_is_pooled_from_the_level_that_torchvision_would_take():
    generator = torch.Generator().manual_seed(0)
    features = {
        str(level): torch.rand(2, 8, 256 // stride, 384 // stride, generator=generator)
        for level, stride in enumerate((4, 8, 16, 32))
    }
    corner = torch.rand(40, 2, generator=generator) * torch.tensor([300.0, 200])
    sides = 2 ** (11 * torch.rand(40, 2, generator=generator))  # 1 to 2048: on all four levels
    rois = list(torch.cat([corner, corner + sides], dim=1).split([25, 15]))
    levels = initLevelMapper(2, 5)(rois).tolist()  # torchvision's, of strides 4 to 32
    expected = [
        roi_align(features[str(level)], [rois_of.view(1, 4)], 7, 1 / 2 ** (level + 2), 1, True)
        for level, rois_of in zip(levels[:25], rois[0], strict=True)
    ]
    found = PyramidRoIAlign(7)(features, rois)
    assert set(levels) == {0, 1, 2, 3}
    assert torch.allclose(found[:25], torch.cat(expected), atol=1e-4)
    assert PyramidRoIAlign(7)(features, [rois[0][:0], rois[1][:0]]).shape == (0, 8, 7, 7)

"""The cascade: its thresholds, averages and boxes by hand, and that it learns."""

import json

import pytest
import survival
import torch
from survival import assert_same_run, predictions, quick_model, train
from tiny_models import make_image, make_target, tiny_model
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.ops import box_iou

from cellseg.models import build_from_spec, get_model_resnet50v2
from cellseg.training.validation import forked_seed

HEIGHT, WIDTH = 48, 80
SQUARES = [(1, 6, 5, 20, 17), (2, 40, 22, 58, 41)]
STAGES = range(3)


def stages_of(model):
    return [*model.roi_heads.earlier, model.roi_heads]


def losses_of(model, squares):
    with forked_seed(0, torch.device("cpu")):
        return model([make_image(HEIGHT, WIDTH, squares)], [make_target(HEIGHT, WIDTH, squares)])


def answer(model, probabilities, offsets):
    """Make every stage give these class probabilities and box offsets, whatever it sees."""
    with torch.no_grad():
        for stage, classes, moves in zip(stages_of(model), probabilities, offsets, strict=True):
            for layer, bias in (("cls_score", torch.tensor(classes).log()), ("bbox_pred", moves)):
                predictor = getattr(stage.box_predictor, layer)
                predictor.weight.zero_()
                predictor.bias.copy_(torch.as_tensor(bias))


def test_a_stage_calls_a_cell_what_reaches_its_own_iou():
    truth = [torch.tensor([[0.0, 0, 10, 10]])]
    boxes = [torch.tensor([[0.0, 0, 10, side] for side in (4.5, 5.5, 6.5, 7.5)])]  # IoU side / 10
    found = [
        stage.assign_targets_to_proposals(boxes, truth, [torch.tensor([2])])[1][0].tolist()
        for stage in stages_of(tiny_model(cascade=True))
    ]
    assert found == [[0, 2, 2, 2], [0, 0, 2, 2], [0, 0, 0, 2]]


def test_offsets_are_enlarged_from_stage_to_stage():
    truth, box = torch.tensor([[1.0, 0, 21, 40]]), torch.tensor([[0.0, 0, 20, 20]])
    for k, stage in enumerate(stages_of(tiny_model(cascade=True)), start=1):
        dx, dy, dw, dh = stage.box_coder.encode([truth], [box])[0][0].tolist()
        # A twentieth of the width, half the height; as wide, and twice as high.
        assert [dx, dy, dw] == pytest.approx([10 * k * 0.05, 10 * k * 0.5, 0], abs=1e-5)
        assert dh == pytest.approx(5 * k * 0.6931, rel=1e-3)


def test_scores_are_the_mean_of_the_stages_and_boxes_go_through_all():
    model = tiny_model(cascade=True, nms_threshold=1.0, score_threshold=0.0).eval()
    answer(
        model,
        probabilities=[[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.2, 0.3, 0.5]],
        # Each stage goes right by a tenth of the width; the last grows by e^(1.5 / 15) in height.
        offsets=[[1.0, 0, 0, 0], [2.0, 0, 0, 0], [3.0, 0, 0, 1.5]],
    )
    boxes = torch.tensor([[10.0, 10, 20, 30], [60, 4, 80, 14]])
    features = model.backbone(torch.zeros(1, 3, 64, 128))
    with torch.inference_mode():
        found, losses = model.roi_heads(features, [boxes], [(HEIGHT, WIDTH)])
    assert not losses
    assert found[0]["labels"].tolist() == [1, 1, 2, 2]
    assert found[0]["scores"].tolist() == pytest.approx([0.4, 0.4, 0.3, 0.3])
    grown = 20 * 2.718281828**0.1 / 2
    # The second is stopped by the image's right side, at each stage: 62-80, 63.8-80, 65.42-80.
    ends = 5 * 2.718281828**0.1
    expected = [[13, 20 - grown, 23, 20 + grown], [65.42, 9 - ends, 80, 9 + ends]]
    assert found[0]["boxes"][:2].tolist() == [pytest.approx(box, rel=1e-4) for box in expected]
    assert torch.equal(found[0]["boxes"][:2], found[0]["boxes"][2:])  # one box for all classes
    assert found[0]["masks"].shape == (4, 1, 28, 28)


def test_losses_have_the_shares_of_their_stages():
    model = tiny_model(cascade=True).train()
    answer(model, probabilities=[[1 / 3] * 3] * 3, offsets=[[0.0] * 4] * 3)
    losses = losses_of(model, [])
    # Nothing is known of three classes: each stage's cross-entropy is log 3.
    classes = [losses[f"loss_classifier_{k}"].item() for k in (1, 2, 3)]
    assert classes == pytest.approx([1.0986, 1.0986 / 2, 1.0986 / 4], rel=1e-3)
    assert all(losses[f"loss_box_reg_{k}"] == 0 for k in (1, 2, 3))
    assert len(losses) == 2 + 3 * 2 + 1 and "loss_mask" in losses


def test_stages_learn_from_what_the_one_before_hands_on(monkeypatch):
    """Each stage's samples are boxes that the one before has moved, and the true ones."""
    model = tiny_model(cascade=True, train_proposals=30, rois_per_image=200).train()
    answer(model, probabilities=[[1 / 3] * 3] * 3, offsets=[[1.0, 0, 0, 0]] * 3)
    handed, drawn = [], []
    for stage in stages_of(model):
        inner = stage.select_training_samples
        monkeypatch.setattr(
            stage, "select_training_samples",
            lambda boxes, targets, inner=inner: (
                handed.append(boxes[0].clone()) or drawn.append(inner(boxes, targets)) or drawn[-1]
            ),
        )  # fmt: skip
    losses_of(model, SQUARES)
    for k in (1, 2):
        rois = drawn[k - 1][0][0]
        moved = rois + torch.tensor([1.0, 0, 1, 0]) * (rois[:, 2:3] - rois[:, :1]) / 10 / k
        assert torch.allclose(handed[k], moved.clamp(max=torch.tensor([WIDTH, HEIGHT] * 2)))
        true = torch.tensor([square[1:] for square in SQUARES]).float()
        assert all((drawn[k][0][0] == box).all(dim=1).any() for box in true)


@pytest.mark.parametrize("squares", [[], SQUARES[:1]], ids=["empty", "a cell"])
def test_every_weight_of_a_cascade_takes_part_in_every_step(squares):
    model = tiny_model(cascade=True, rois_per_image=16, norm="frozen").train()
    losses = losses_of(model, squares)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_cascades_spec_rebuilds_it():
    model = tiny_model(cascade=True, mask_quality=0.5, score_threshold=0.0).eval()
    again = build_from_spec(json.loads(json.dumps(model.spec))).eval()
    again.load_state_dict(model.state_dict())
    assert again.spec == model.spec
    image = make_image(HEIGHT, WIDTH, SQUARES)
    with torch.inference_mode():
        found, expected = again([image])[0], model([image])[0]
    assert len(expected["scores"]) > 0
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_coco_weights_fill_the_heads_of_all_stages(tmp_path):
    torch.manual_seed(6)
    detector = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    torch.save(detector.state_dict(), tmp_path / "coco_like.pth")
    model = get_model_resnet50v2(3, weights=tmp_path / "coco_like.pth", cascade=True)
    own, state = model.state_dict(), detector.state_dict()
    for name in (k for k in state if k.startswith("roi_heads.box_head.") and "num_b" not in k):
        part = name.removeprefix("roi_heads.")
        for place in ("roi_heads", "roi_heads.earlier.0", "roi_heads.earlier.1"):
            assert torch.equal(own[f"{place}.{part}"], state[name])
    assert "box_head" not in model.provenance  # what was re-made
    assert model.spec["arguments"]["norm"] == "frozen"


@pytest.mark.slow
def test_a_cascade_learns_an_image_by_heart():
    model = tiny_model(cascade=True, fpn_channels=32, rois_per_image=32, norm="frozen").train()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(200):
        torch.manual_seed(step)
        image, target = make_image(HEIGHT, WIDTH, SQUARES), make_target(HEIGHT, WIDTH, SQUARES)
        losses = model([image], [target])
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    with torch.inference_mode():
        found = model.eval()([image])[0]
    overlaps = box_iou(found["boxes"], target["boxes"])
    for k, label in enumerate(target["labels"]):
        best = found["scores"].where((found["labels"] == label) & (overlaps[:, k] > 0.7), 0).max()
        assert best > 0.5


@pytest.mark.slow
def test_a_cascade_goes_on_where_it_stopped(tmp_path):
    survival.make_data(tmp_path / "tissue")
    whole = list(train(tmp_path / "tissue", tmp_path / "whole", model=quick_model(cascade=True)))
    assert {"loss_classifier_3", "loss_box_reg_1"} <= whole[-1].losses["val"].keys()
    assert whole[-1].train_loss == pytest.approx(sum(whole[-1].losses["train"].values()))
    next(train(tmp_path / "tissue", tmp_path / "parts", model=quick_model(cascade=True)))
    list(train(tmp_path / "tissue", tmp_path / "parts", model=quick_model(cascade=True)))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert predictions(tmp_path / "parts")

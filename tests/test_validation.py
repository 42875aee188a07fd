"""The validation loss: a true one, always the same, and without a trace."""

import random

import numpy as np
import pytest
import torch
from tiny_models import make_image, make_target, tiny_model
from torch import nn

from cellseg.data import cut_sample
from cellseg.inference import predict_images
from cellseg.inference.tiles import plan_for_model
from cellseg.training import validate
from cellseg.training.validation import forked_seed, losses_and_detections

SQUARES = [(1, 6, 5, 20, 17), (2, 40, 18, 58, 33), (1, 22, 6, 23, 7)]
CPU = torch.device("cpu")


def batches():
    """Return two images, one of them without cells, as a loader gives them."""
    return [
        ([make_image(40, 72, SQUARES)], [make_target(40, 72, SQUARES, image_id=4)]),
        ([make_image(56, 50)], [make_target(56, 50, [], image_id=2)]),
    ]


def model_with_dropout():
    """Return a model with trained norms and, as some backbones have it, dropout."""
    model = tiny_model(norm="trained", rpn_samples=16, rois_per_image=16)
    model.roi_heads.box_head = nn.Sequential(model.roi_heads.box_head, nn.Dropout(0.5))
    return model


def everything(model):
    """Return whatever a pass could change: tensors, modes and all generators."""
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return (
        {key: value.clone() for key, value in tensors.items()},
        [module.training for module in model.modules()],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )


@pytest.mark.parametrize("training", [True, False])
def test_validation_changes_nothing_and_is_the_same_twice(training):
    model = model_with_dropout().train(training)
    tensors, *before = everything(model)
    first = validate(model, batches(), progress=False)
    tensors_after, *after = everything(model)
    assert tensors.keys() == tensors_after.keys()
    assert all(torch.equal(value, tensors_after[key]) for key, value in tensors.items())
    assert before == after
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.rand(7)  # what others draw in between does not matter
    assert validate(model, batches(), progress=False) == first


def test_another_seed_samples_other_anchors():
    model = model_with_dropout()
    losses = [validate(model, batches(), seed=seed, progress=False).losses for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_the_loss_is_the_training_loss_of_a_model_whose_layers_do_not_change():
    """With frozen norms and no dropout both modes compute the same network."""
    model = tiny_model(norm="frozen", rpn_samples=16, rois_per_image=16).train()
    images, targets = batches()[0]
    with forked_seed(3, CPU):
        expected = {name: value.item() for name, value in model(images, targets).items()}
    found = validate(model, batches()[:1], seed=3, progress=False).losses
    assert found == pytest.approx(expected, rel=1e-6)


def test_norms_use_what_they_have_learned():
    model = tiny_model(norm="trained").train()
    images, targets = batches()[0]
    with forked_seed(0, CPU), torch.no_grad():
        in_training = sum(model(images, targets).values()).item()
    found = validate(model, batches()[:1], progress=False).losses
    assert sum(found.values()) != pytest.approx(in_training, rel=1e-3)


def test_losses_are_means_over_images():
    model = model_with_dropout()
    alone = [
        validate(model, [batch], seed=seed, progress=False).losses
        for seed, batch in enumerate(batches())  # the second image's draws follow the first's
    ]
    together = validate(model, batches(), seed=0, progress=False).losses
    assert together.keys() == alone[0].keys() and len(together) == 5
    for name, value in together.items():
        assert value == pytest.approx((alone[0][name] + alone[1][name]) / 2)


def test_detections_are_those_of_the_model_itself():
    model = tiny_model(score_threshold=0.0).eval()
    images, targets = batches()[0]
    _, found = losses_and_detections(model, images, targets)
    with torch.inference_mode():
        expected = model(images)
    assert len(expected[0]["scores"]) > 0
    assert all(torch.equal(found[0][key], expected[0][key]) for key in expected[0])


def test_records_come_sorted_with_their_images():
    result = validate(tiny_model(seed=2), batches(), progress=False)
    ids = [record["image_id"] for record in result.records]
    assert set(ids) == {2, 4} and ids == sorted(ids)
    sizes = {record["image_id"]: record["segmentation"]["size"] for record in result.records}
    assert sizes == {2: [56, 50], 4: [40, 72]}


def test_a_large_image_is_examined_in_the_tiles_that_predict_it():
    """Records as `predict_images` has them; the loss is the mean over the tiles' own samples."""
    size = 150, 260
    cells = [(1 + i % 2, x, y, x + 14, y + 12) for i, (x, y) in enumerate(
        (x, y) for x in range(4, 240, 31) for y in range(5, 130, 29)
    )]  # fmt: skip
    model = tiny_model(seed=2, score_threshold=0.0)
    image, target = make_image(*size, cells), make_target(*size, cells, image_id=9)
    found = validate(model, [([image], [target])], seed=5, tile_size=128, progress=False)

    expected = predict_images(
        model, [(image, 9)], tile_size=128, score_threshold=0.0, progress=False
    )
    assert len(expected) > 20 and found.records == expected

    tiles = plan_for_model(model.eval(), size, tile_size=128)
    assert len(tiles) > 2
    with forked_seed(5, CPU):
        losses = []
        for tile in tiles:
            part, cut = cut_sample(image, target, tile.window, min_visible=0.25)
            losses.append(losses_and_detections(model, [part], [cut])[0])
    for name, value in found.losses.items():
        mean = sum(float(loss[name]) for loss in losses) / len(losses)
        assert value == pytest.approx(mean, rel=1e-6)


def test_a_small_image_beside_a_large_one_is_examined_whole():
    small, large = batches()[0], ([make_image(150, 260)], [make_target(150, 260, [], image_id=7)])
    model = tiny_model(seed=2, score_threshold=0.0)
    mixed = [(small[0] + large[0], small[1] + large[1])]
    together = validate(model, mixed, tile_size=128, progress=False)
    alone = validate(model, [small], tile_size=128, progress=False)
    assert [r for r in together.records if r["image_id"] == 4] == alone.records
    assert {r["image_id"] for r in together.records} == {4, 7}


def test_a_failing_batch_leaves_the_mode_as_it_was():
    model = tiny_model().train()
    target = make_target(40, 72, SQUARES)
    del target["instance_map"]
    with pytest.raises(ValueError, match="a target has no instance_map"):
        validate(model, [([make_image(40, 72)], [target])], progress=False)
    assert all(module.training for module in model.modules())


def test_no_batches_give_no_losses():
    result = validate(tiny_model(), [], progress=False)
    assert result.losses == {} and result.records == []

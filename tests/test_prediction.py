"""From detections to records, and a model that comes back from its checkpoint."""

import numpy as np
import pytest
import torch
from tiny_models import make_image, tiny_model
from torch import nn

from cellseg.coco import check_records, rle_to_mask
from cellseg.inference import predict_image, predict_images
from cellseg.inference.prediction import detections_to_records
from cellseg.training import load_model
from cellseg.training.checkpoint import write_checkpoint

HEIGHT, WIDTH = 40, 72
SQUARES = [(1, 6, 5, 20, 17), (2, 40, 18, 58, 33)]


def full_masks(count, side=28):
    return torch.ones(count, 1, side, side)


def detections(rows):
    """Return detections with full masks from rows of (label, score, x1, y1, x2, y2)."""
    rows = torch.tensor(rows).reshape(-1, 6)
    return {
        "boxes": rows[:, 2:],
        "labels": rows[:, 0].long(),
        "scores": rows[:, 1],
        "masks": full_masks(len(rows)),
    }


class StubModel(nn.Module):
    """Finds the same cells in every image, and keeps what it was shown."""

    def __init__(self, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rows, self.seen = rows, []

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.seen += images
        return [detections(self.rows) for _ in images]


ROWS = [
    [2, 0.30, 10, 5, 20, 11],
    [1, 0.90, 30, 8, 33, 12],
    [1, 0.30, 10, 5, 20, 11],
    [1, 0.30, 0, 0, 2, 40],
    [3, 0.04, 50, 5, 60, 15],
]


def test_records_hold_the_masks_tight_box_and_come_sorted():
    records = predict_image(StubModel(ROWS).eval(), make_image(HEIGHT, WIDTH), image_id=7)
    assert check_records(records, image_ids=[7], image_sizes={7: (HEIGHT, WIDTH)}) == []
    assert [(r["category_id"], r["bbox"]) for r in records] == [
        (1, [30, 8, 3, 4]),
        (1, [0, 0, 2, 40]),  # "0" sorts before the runs of the box inside
        (1, [10, 5, 10, 6]),
        (2, [10, 5, 10, 6]),
    ]
    assert [record["score"] for record in records] == pytest.approx([0.9, 0.3, 0.3, 0.3])
    mask = rle_to_mask(records[0]["segmentation"])
    assert mask.shape == (HEIGHT, WIDTH)
    assert np.argwhere(mask).min(axis=0).tolist() == [8, 30] and mask.sum() == 12


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, [0.9, 0.3, 0.3, 0.3, 0.04]),
        (0.05, [0.9, 0.3, 0.3, 0.3]),
        (0.3, [0.9, 0.3, 0.3, 0.3]),
        (0.5, [0.9]),
        (0.95, []),
    ],
)
def test_scores_below_the_threshold_are_left_out(threshold, expected):
    found = predict_image(
        StubModel(ROWS).eval(), make_image(HEIGHT, WIDTH), image_id=1, score_threshold=threshold
    )
    assert [record["score"] for record in found] == pytest.approx(expected)


def test_a_score_at_the_threshold_is_kept():
    found = detections_to_records(
        detections([[1, 0.5, 3, 3, 9, 9]]), (HEIGHT, WIDTH), image_id=1, score_threshold=0.5
    )
    assert [record["score"] for record in found] == [0.5]


def test_empty_masks_are_left_out():
    found = detections([[1, 0.9, 3, 3, 9, 9], [1, 0.8, 200, 3, 210, 9], [2, 0.7, 3, 3, 9, 9]])
    found["masks"][2] = 0.5  # no pixel is over the threshold
    records = detections_to_records(found, (HEIGHT, WIDTH), image_id=1)
    assert [record["score"] for record in records] == pytest.approx([0.9])
    records = detections_to_records(found, (HEIGHT, WIDTH), image_id=1, mask_threshold=0.4)
    assert [record["score"] for record in records] == pytest.approx([0.9, 0.7])


def test_nothing_found_gives_no_records():
    assert detections_to_records(detections([]), (HEIGHT, WIDTH), image_id=1) == []


def test_hundreds_of_cells_all_become_records():
    rows = [[1, 0.5, x, y, x + 2, y + 2] for x in range(0, 72, 2) for y in range(0, 40, 2)]
    records = detections_to_records(detections(rows), (HEIGHT, WIDTH), image_id=1)
    assert len(records) == 720
    assert sum(rle_to_mask(record["segmentation"]).sum() for record in records) == HEIGHT * WIDTH


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\) first"):
        predict_image(StubModel(ROWS).train(), make_image(HEIGHT, WIDTH), image_id=1)


@pytest.mark.parametrize("shape", [(1, 40, 72), (4, 40, 72), (40, 72, 3), (40, 72), (1, 3, 40, 72)])
def test_another_shape_than_an_images_is_refused(shape):
    with pytest.raises(ValueError, match=rf"shape \({', '.join(map(str, shape))}\).*\[3, H, W\]"):
        predict_image(tiny_model().eval(), torch.zeros(shape), image_id=1)


def test_image_as_byte_float_or_array_gives_the_same_records():
    model = tiny_model(seed=2).eval()
    image = make_image(HEIGHT, WIDTH, SQUARES)
    # Random weights know no cells: about 0.58 is the probability of every other pixel.
    expected = predict_image(model, image, image_id=3, mask_threshold=0.58)
    assert len(expected) > 10
    assert check_records(expected, image_sizes={3: (HEIGHT, WIDTH)}) == []
    for other in (image / 255, image.numpy().transpose(1, 2, 0)):
        assert predict_image(model, other, image_id=3, mask_threshold=0.58) == expected


def test_a_model_from_its_checkpoint_gives_the_same_records(tmp_path):
    model = tiny_model(4, seed=1, image_scale=1.5).eval()
    images = [(make_image(HEIGHT, WIDTH, SQUARES), 2), (make_image(33, 50), 1)]
    expected = predict_images(model, images, progress=False)
    write_checkpoint(tmp_path / "model.pt", {"spec": model.spec, "model": model.state_dict()})
    again = load_model(tmp_path / "model.pt")
    assert predict_images(again, images, progress=False) == expected
    assert {record["image_id"] for record in expected} == {1, 2}


def test_records_of_images_come_in_the_order_of_their_ids():
    images = [(make_image(HEIGHT, WIDTH), 9), (make_image(50, 36), 4)]
    model = StubModel(ROWS[:2])
    records = predict_images(model, images, progress=False)
    assert [record["image_id"] for record in records] == [4, 4, 9, 9]
    assert records[0]["segmentation"]["size"] == [50, 36]
    assert [tuple(image.shape) for image in model.seen] == [(3, HEIGHT, WIDTH), (3, 50, 36)]


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_the_models_mode_as_it_was(training):
    model = StubModel(ROWS).train(training)
    predict_images(model, [(make_image(HEIGHT, WIDTH), 1)], progress=False)
    assert model.training is training


def test_a_failing_image_leaves_the_mode_too():
    model = tiny_model().train()
    with pytest.raises(ValueError, match="shape"):
        predict_images(model, [(torch.zeros(2, 4, 4), 1)], progress=False)
    assert model.training


def test_predicting_changes_no_weight_and_no_draw():
    model = tiny_model(score_threshold=0.0).eval()
    image = make_image(HEIGHT, WIDTH, SQUARES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, pixels = torch.get_rng_state(), image.clone()
    predict_image(model, image, image_id=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(image, pixels)

"""Views of an image: turned back exactly, and merged so that agreement counts."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny_models import make_image, tiny_model
from torch import nn

from cellseg.coco import check_records, rle_to_mask
from cellseg.errors import SettingsError
from cellseg.inference import predict_image, predict_views
from cellseg.inference.views import View, make_views, merge_views

HEIGHT, WIDTH = 61, 90
SIDE = 28


class Seer(nn.Module):
    """Finds connected dark patches, class 1 in red and class 2 in green, from whatever side.

    A patch's mask is read at the centres of the mask's cells, so that turning the image turns it.
    `scores` gives the score of each class at each call in turn; None is a cell not seen.
    """

    def __init__(self, scores=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scores, self.calls = scores, 0

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return [self.look(image) for image in images]

    def look(self, image):
        dark = (image.numpy() * (1 if image.dtype == torch.uint8 else 255)) < 145
        boxes, labels, scores, masks = [], [], [], []
        for label in (1, 2):
            score = 0.5 + label / 8 if self.scores is None else self.scores[label][self.calls]
            patches, _ = ndimage.label(dark[label - 1])
            for number, (rows, columns) in enumerate(ndimage.find_objects(patches), start=1):
                patch = torch.from_numpy(patches[rows, columns] == number).float()
                if score is not None:
                    boxes.append([columns.start, rows.start, columns.stop, rows.stop])
                    labels.append(label)
                    scores.append(score)
                    masks.append(sample(patch))
        self.calls += 1
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores),
            "masks": torch.stack(masks)[:, None] if masks else torch.zeros(0, 1, SIDE, SIDE),
        }


def sample(patch):
    """Return the patch read at the centres of SIDE x SIDE cells."""
    rows, columns = (
        ((torch.arange(SIDE) + 0.5) * side / SIDE).long().clamp(max=side - 1)
        for side in patch.shape
    )
    return patch[rows][:, columns]


def tissue(height=HEIGHT, width=WIDTH):
    """Return an image of two hooks, which look different from all eight sides, and a square.

    Their sides of 7, 14 and 28 pixels put no centre of a mask's cell between two pixels.
    """
    image = torch.full((3, height, width), 240, dtype=torch.uint8)
    image[0, 5:19, 8:15] = 50
    image[0, 12:19, 8:36] = 50
    image[1, 26:54, 60:67] = 50
    image[1, 26:33, 60:74] = 50
    image[0, 40:47, 20:27] = 50
    return image


SIDES = make_views("d4")


@pytest.mark.parametrize("view", SIDES, ids=lambda view: f"{view.mirrored:d}{view.turns}")
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_view_undone_is_what_the_image_shows(view, scale):
    view = View(view.mirrored, view.turns, scale)
    image = tissue()
    shown = view.show(image)
    turned = (WIDTH, HEIGHT) if view.turns % 2 else (HEIGHT, WIDTH)
    assert tuple(shown.shape) == (3, *(int(side * scale) for side in turned))
    seer = Seer().eval()
    with torch.no_grad():
        straight, found = seer.look(image), view.undo(seer.look(shown), (HEIGHT, WIDTH))
    order = [[box.tolist() for box in found["boxes"]].index(b.tolist()) for b in straight["boxes"]]
    assert torch.equal(found["boxes"][order], straight["boxes"])
    assert torch.equal(found["masks"][order], straight["masks"])
    assert torch.equal(found["labels"][order], straight["labels"])


def test_the_eight_sides_are_eight():
    image = tissue(64, 64)
    shown = {view.show(image).numpy().tobytes() for view in SIDES}
    assert len(shown) == 8
    assert len(make_views("flips", (0.5, 1))) == 8 and len(make_views("plain")) == 1
    flips = {view.show(image).numpy().tobytes() for view in make_views("flips")}
    mirrored = [image, image.flip(-1), image.flip(-2), image.flip((-2, -1))]
    assert flips == {side.numpy().tobytes() for side in mirrored}


def test_a_view_resized_is_larger_by_the_factor_whatever_the_type():
    image = tissue(31, 50)
    view = View(scale=1.5).show(image)
    assert view.shape == (3, 46, 75) and view.min() >= 0 and view.max() <= 1
    assert torch.allclose(View(scale=1.5).show(image / 255), view)
    assert View(scale=0.25).show(torch.zeros(3, 1, 9)).shape == (3, 1, 2)
    factor = torch.tensor([50 / 75, 31 / 46, 50 / 75, 31 / 46])
    found = {"boxes": torch.tensor([[3.0, 3, 75, 46]]), "masks": torch.zeros(1, 1, SIDE, SIDE)}
    back = View(scale=1.5).undo(found, (31, 50))["boxes"][0]
    assert torch.allclose(back, torch.tensor([3.0, 3, 75, 46]) * factor)


@pytest.mark.parametrize(
    ("views", "scales"), [("flips", (1,)), ("d4", (1,)), ("d4", (1, 2)), ("plain", (2,))]
)
def test_what_every_view_shows_is_what_the_image_shows(views, scales):
    expected = predict_image(Seer().eval(), tissue(), image_id=4)
    assert [record["category_id"] for record in expected] == [2, 1, 1]
    found = predict_views(Seer().eval(), tissue(), image_id=4, views=views, scales=scales)
    assert found == expected


def test_one_view_of_a_network_is_its_prediction():
    model = tiny_model(seed=2).eval()
    image = make_image(40, 72, [(1, 6, 5, 20, 17), (2, 40, 18, 58, 33)])
    # Random weights know no cells: about 0.58 is the probability of every other pixel.
    options = {"image_id": 3, "mask_threshold": 0.58}
    assert predict_views(model, image, **options) == predict_image(model, image, **options)
    array = image.numpy().transpose(1, 2, 0)
    assert predict_views(model, array, **options) == predict_image(model, array, **options)
    merged = predict_views(model, image, views="d4", scales=(1, 1.5), **options)
    assert merged and check_records(merged, image_ids=[3], image_sizes={3: (40, 72)}) == []


@pytest.mark.parametrize(
    ("scores", "expected", "reason"),
    [
        ([0.8, 0.8, 0.8, 0.8], [0.8], "all agree"),
        ([0.8, None, None, None], [0.2], "one of four"),
        ([0.5, None, 0.75, 0.25], [0.375], "the sum over the number of views"),
        ([None] * 4, [], "nothing seen"),
    ],
)
def test_scores_are_the_mean_over_the_views(scores, expected, reason):
    image = torch.full((3, HEIGHT, WIDTH), 240, dtype=torch.uint8)
    image[0, 10:24, 30:37] = 50
    model = Seer({1: scores, 2: scores}).eval()
    found = predict_views(model, image, image_id=1, views="flips")
    assert [record["score"] for record in found] == pytest.approx(expected), reason


def found(*rows):
    """Return detections with full masks from rows of (label, score, x1, y1, x2, y2)."""
    rows = torch.tensor(rows).reshape(-1, 6)
    masks = torch.ones(len(rows), 1, SIDE, SIDE)
    return {"boxes": rows[:, 2:], "labels": rows[:, 0].long(), "scores": rows[:, 1], "masks": masks}


def test_a_cell_is_drawn_where_its_views_see_it_in_the_mean():
    one, other = found([1, 0.75, 10, 5, 20, 15]), found([1, 0.5, 12, 5, 22, 15])
    other["masks"] = other["masks"] * 0.5
    for seen in ([one, other], [other, one]):
        merged = merge_views(seen, (HEIGHT, WIDTH), mask_threshold=0.4)
        assert merged["boxes"].tolist() == [[11, 5, 21, 15]]
        assert merged["scores"].tolist() == [0.625]
        assert (merged["masks"] == 0.75).all()


def test_views_that_differ_about_the_class_leave_a_record_of_each():
    seen = [found([1, 0.75, 10, 5, 20, 15]), found([2, 0.5, 10, 5, 20, 15]), found()]
    merged = merge_views(seen, (HEIGHT, WIDTH))
    assert merged["labels"].tolist() == [1, 2]
    assert merged["scores"].tolist() == pytest.approx([0.25, 0.5 / 3])


def test_touching_cells_stay_apart():
    seen = [found([1, 0.5, 10, 5, 20, 15], [1, 0.5, 20, 5, 30, 15])] * 3
    merged = merge_views(seen, (HEIGHT, WIDTH))
    assert sorted(merged["boxes"].tolist()) == [[10, 5, 20, 15], [20, 5, 30, 15]]
    assert merged["scores"].tolist() == [0.5, 0.5]


def test_nothing_seen_from_any_side_is_nothing():
    merged = merge_views([found(), found()], (HEIGHT, WIDTH))
    assert {key: len(value) for key, value in merged.items()} == dict.fromkeys(merged, 0)


def test_the_image_is_left_as_it_was():
    image = tissue()
    before = image.clone()
    predict_views(Seer().eval(), image, image_id=1, views="d4", scales=(1, 0.5))
    assert torch.equal(image, before)


def test_masks_lie_where_the_cells_are():
    found = predict_views(Seer().eval(), tissue(), image_id=1, views="d4")
    drawn = np.zeros((2, HEIGHT, WIDTH), bool)
    for record in found:
        drawn[record["category_id"] - 1] |= rle_to_mask(record["segmentation"])
    assert np.array_equal(drawn, tissue()[:2].numpy() == 50)


@pytest.mark.parametrize(
    ("views", "scales", "message"),
    [
        ("all", (1,), "views is 'all'; use one of plain, flips, turns, d4"),
        ("flips", (), "one or more numbers > 0"),
        ("flips", (1, 0), "one or more numbers > 0"),
        ("flips", (float("nan"),), "one or more numbers > 0"),
    ],
)
def test_views_that_cannot_be_are_refused(views, scales, message):
    with pytest.raises(SettingsError, match=message):
        make_views(views, scales)

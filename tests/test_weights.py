"""Weights in: what is kept, what is made anew, and files that do not fit or do harm."""

import os
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from torchvision import models as zoo
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d

from cellseg.errors import WeightsError
from cellseg.models import (
    BUILDERS,
    build_from_spec,
    get_model_convnext_tiny,
    get_model_mobilenetv2,
    get_model_resnet50v2,
)
from cellseg.models.weights import read_weights

CLASS_HEADS = {
    f"roi_heads.{part}.{kind}"
    for part in (
        "box_predictor.cls_score",
        "box_predictor.bbox_pred",
        "mask_predictor.mask_fcn_logits",
    )
    for kind in ("weight", "bias")
}


def save(path, content):
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def backbone_state():
    """Return the state dict of torchvision's classifier, every tensor drawn at random."""
    torch.manual_seed(5)
    state = zoo.mobilenet_v2(weights=None).state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture(scope="module")
def backbone_file(backbone_state, tmp_path_factory):
    path = save(tmp_path_factory.mktemp("weights") / "mobilenet_v2.pth", backbone_state)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def coco_like(tmp_path_factory):
    """Give torchvision's detector of 91 classes with random weights, and its file."""
    torch.manual_seed(6)
    detector = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    path = save(tmp_path_factory.mktemp("weights") / "coco_like.pth", detector.state_dict())
    yield detector.eval(), path
    path.unlink()


def test_coco_weights_keep_all_but_the_class_heads(coco_like):
    detector, path = coco_like
    model = get_model_resnet50v2(5, weights=path).eval()
    assert kinds_of_norms(model) == ({FrozenBatchNorm2d}, {FrozenBatchNorm2d})
    own = model.state_dict()
    state = {k: v for k, v in detector.state_dict().items() if "num_batches" not in k}
    assert own.keys() == state.keys()
    for key, value in state.items():
        kept = own[key].shape == value.shape and torch.equal(own[key], value)
        assert kept == (key not in CLASS_HEADS), key
    assert own["roi_heads.box_predictor.cls_score.weight"].shape == (5, 1024)
    kept = len(state) - 6
    assert model.provenance == (
        f"file coco_like.pth: {kept} tensors kept, re-made: {', '.join(sorted(CLASS_HEADS))}"
    )
    # In their places, too: backbone and FPN give torchvision's own features.
    image = torch.rand(1, 3, 64, 128)
    with torch.inference_mode():
        expected, found = detector.backbone(image), model.backbone(image)
        for key in ("0", "1", "2", "3", "pool"):
            assert torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-4)
        deep = torch.rand(3, 256, 7, 7)
        pair = [m.roi_heads.box_head(deep) for m in (detector, model)]
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-4)
        deep = torch.rand(3, 256, 14, 14)
        pair = [m.roi_heads.mask_head(deep) for m in (detector, model)]
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-4)


def test_a_detector_of_the_same_classes_is_kept_whole(coco_like, tmp_path):
    _, path = coco_like
    model = get_model_resnet50v2(91, weights=path, norm="trained")
    assert "coco_like.pth: all" in model.provenance and "re-made" not in model.provenance


def kinds_of_norms(model):
    """Return the types of the norms in the backbone, and of those in FPN and heads."""
    kinds = {True: set(), False: set()}
    for name, module in model.named_modules():
        if "BatchNorm" in type(module).__name__:
            kinds[name.startswith("backbone.body.")].add(type(module))
    return kinds[True], kinds[False]


def test_norms_that_came_without_statistics_learn(coco_like, tmp_path):
    """A random layer behind a frozen norm is one without a norm."""
    resnet = save(tmp_path / "resnet50.pth", zoo.resnet50(weights=None).state_dict())
    narrow = {"fpn_channels": 16, "head_width": 16}
    backbone = get_model_resnet50v2(3, weights=resnet, **narrow)
    assert kinds_of_norms(backbone) == ({FrozenBatchNorm2d}, {nn.BatchNorm2d})
    again = build_from_spec(backbone.spec)
    again.load_state_dict(backbone.state_dict())
    assert kinds_of_norms(again) == kinds_of_norms(backbone)
    # Of a detector of another depth all norms fit but one.
    part = get_model_resnet50v2(3, weights=coco_like[1], mask_layers=5, head_width=16)
    assert kinds_of_norms(part) == ({FrozenBatchNorm2d}, {nn.BatchNorm2d})
    assert part.spec["arguments"]["norm"] == "heads"


def test_a_detector_for_another_network_is_refused(coco_like):
    with pytest.raises(
        WeightsError,
        match=r"file coco_like.pth holds another detector: 255 of 255 backbone tensors do not fit, "
        r"the first is backbone.body.0.0.weight; use the builder",
    ):
        tiny_model(weights=coco_like[1])


def test_a_backbone_file_goes_into_the_backbone(backbone_state, backbone_file):
    model = tiny_model(weights=backbone_file)
    body = model.backbone.body.state_dict()
    assert len(body) == 51 * 5
    assert all(torch.equal(v, backbone_state[f"features.{k}"]) for k, v in body.items())
    assert model.provenance == "file mobilenet_v2.pth: backbone, 255 tensors kept"
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    heads = tiny_model().state_dict()
    assert torch.equal(heads["rpn.head.conv.0.0.weight"], model.rpn.head.conv[0][0].weight)


def test_a_models_own_file_goes_into_the_whole_of_it(tmp_path):
    source = tiny_model(3, seed=9)
    path = save(tmp_path / "own.pt", source.state_dict())
    same, other = tiny_model(3, weights=path), tiny_model(4, weights=path)
    assert all(
        torch.equal(value, source.state_dict()[key]) for key, value in same.state_dict().items()
    )
    assert same.provenance.startswith("file own.pt: all ")
    assert other.provenance.endswith("re-made: " + ", ".join(sorted(CLASS_HEADS)))
    key = "rpn.head.cls_logits.weight"
    assert torch.equal(other.state_dict()[key], source.state_dict()[key])


WRAPPERS = [
    ("under 'model'", lambda state: {"model": state, "epoch": 3}),
    ("under 'state_dict'", lambda state: {"state_dict": state}),
    ("the average of a checkpoint before its model", lambda state: {"model": {}, "ema": state}),
    ("of DataParallel", lambda state: {f"module.{k}": v for k, v in state.items()}),
    ("both at once", lambda state: {"model": {f"module.{k}": v for k, v in state.items()}}),
]


@pytest.mark.parametrize(("reason", "wrap"), WRAPPERS, ids=[case[0] for case in WRAPPERS])
def test_wrapped_state_dicts_are_unwrapped(reason, wrap, tmp_path):
    state = {
        "features.0.0.weight": torch.arange(6.0).reshape(2, 3),
        "classifier.bias": torch.ones(2),
    }
    found = read_weights(save(tmp_path / "wrapped.pth", wrap(state)))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_another_networks_backbone_is_refused(tmp_path):
    path = save(tmp_path / "resnet18.pth", zoo.resnet18(weights=None).state_dict())
    with pytest.raises(
        WeightsError,
        match=r"file resnet18.pth does not fit this backbone: 255 of 255 tensors are missing or of "
        r"another shape, the first is 0.0.weight \(the file starts with conv1.weight\)",
    ):
        tiny_model(weights=path)


def test_one_tensor_of_another_shape_is_named(backbone_state, tmp_path):
    state = backbone_state | {"features.3.conv.0.0.weight": torch.zeros(9, 9, 1, 1)}
    path = save(tmp_path / "bent.pth", state)
    with pytest.raises(WeightsError, match=r"1 of 255 .* the first is 3.conv.0.0.weight"):
        tiny_model(weights=path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere.pth does not exist; check the path"):
        tiny_model(weights=tmp_path / "nowhere.pth")


BAD_CONTENT = [
    ("no torch file", b"<html>quota exceeded</html>", "page.pth cannot be read as weights"),
    ("empty", b"", "page.pth cannot be read as weights"),
]


@pytest.mark.parametrize(("reason", "content", "message"), BAD_CONTENT)
def test_a_damaged_file_is_named(reason, content, message, tmp_path):
    path = tmp_path / "page.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        tiny_model(weights=path)


def test_a_truncated_file_is_named(backbone_file, tmp_path):
    path = tmp_path / "half.pth"
    path.write_bytes(backbone_file.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match=r"half.pth cannot be read as weights"):
        tiny_model(weights=path)


NO_STATE = [
    ("a tensor", torch.ones(3)),
    ("a list", [torch.ones(3)]),
    ("settings without tensors", {"lr": 0.1}),
    ("tensors under numbers", {0: torch.ones(3)}),
]


@pytest.mark.parametrize(("reason", "content"), NO_STATE, ids=[case[0] for case in NO_STATE])
def test_other_content_is_no_state_dict(reason, content, tmp_path):
    path = save(tmp_path / "other.pth", content)
    with pytest.raises(WeightsError, match=r"other.pth holds no state dict of tensors"):
        tiny_model(weights=path)


class Harmful:
    """Runs code when it is unpickled: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_does_not(tmp_path):
    path = save(tmp_path / "harmful.pth", {"features.0.0.weight": Harmful(tmp_path / "ran")})
    with pytest.raises(WeightsError, match=r"harmful.pth cannot be read as weights"):
        tiny_model(weights=path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # so the file was as harmful as meant


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Give an empty folder of downloads, and no network."""

    def fail(url, *_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


MOBILENET_FILE = "mobilenet_v2-7ebf99e0.pth"


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET"])
def test_without_network_the_file_and_its_place_are_named(hub, weights):
    with pytest.raises(WeightsError) as caught:
        get_model_mobilenetv2(3, weights=weights, fpn_channels=16)
    message = str(caught.value)
    assert "no route to host" in message
    assert f"https://download.pytorch.org/models/{MOBILENET_FILE}" in message
    assert f"put the file into {hub}, or pass weights=None" in message


FILES = [
    ("get_model_resnet101", "resnet101-cd907fc2.pth"),
    ("get_model_convnext_tiny", "convnext_tiny-983f1562.pth"),
    ("get_model_convnext_small", "convnext_small-0c510722.pth"),
    ("get_model_convnext_base", "convnext_base-6075fbad.pth"),
]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_each_builder_names_its_own_file(hub, name, file):
    with pytest.raises(WeightsError, match=f"fetch https://download.pytorch.org/models/{file} on"):
        BUILDERS[name](3)


def test_a_convnext_file_fills_the_backbone_and_no_more(tmp_path):
    torch.manual_seed(7)
    state = zoo.convnext_tiny(weights=None).state_dict()
    model = get_model_convnext_tiny(
        3, weights=save(tmp_path / "convnext.pth", state), fpn_channels=16, head_width=8
    )
    body = model.backbone.body.state_dict()
    assert all(torch.equal(value, state[f"features.{key}"]) for key, value in body.items())
    assert model.provenance == f"file convnext.pth: backbone, {len(body)} tensors kept"
    assert len(body) == len(state) - 4  # the classifier's norm and layer


def test_coco_is_the_default_of_the_large_model(hub):
    with pytest.raises(WeightsError, match=r"maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"):
        get_model_resnet50v2(3, fpn_channels=16, head_width=32)


def test_a_file_put_into_that_place_is_used(hub, backbone_file):
    (hub / MOBILENET_FILE).write_bytes(backbone_file.read_bytes())
    model = tiny_model(weights="DEFAULT")
    assert model.provenance.startswith("torchvision MobileNet_V2_Weights.IMAGENET1K_V2 (https://")
    assert model.provenance.endswith(": backbone, 255 tensors kept")
    assert model.spec["arguments"]["weights"] == "DEFAULT"


@pytest.mark.parametrize("content", [b"<html>quota exceeded</html>", b""])
def test_a_damaged_file_in_that_place_is_named(hub, content):
    (hub / MOBILENET_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{MOBILENET_FILE} cannot be read .* remove it"):
        tiny_model(weights="DEFAULT")


def test_a_file_in_that_place_runs_no_code(hub, tmp_path):
    save(hub / MOBILENET_FILE, {"features.0.0.weight": Harmful(tmp_path / "ran")})
    with pytest.raises(WeightsError, match="remove it"):
        tiny_model(weights="DEFAULT")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif("CELLSEG_DATA" not in os.environ, reason="CELLSEG_DATA is not set")
def test_real_imagenet_weights_see_more_than_noise():
    folder = Path(os.environ["CELLSEG_DATA"]).parent / "weights"
    path = folder / "mobilenet_v2_imagenet_from_tflite_quant.pth"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    model = tiny_model(weights=path).eval()
    assert model.provenance == f"file {path.name}: backbone, 255 tensors kept"
    # Trained statistics keep the signal at its scale through all 17 blocks.
    with torch.inference_mode():
        deepest = model.backbone.body(torch.rand(1, 3, 64, 96))["3"]
    assert 0.1 < deepest.std() < 10

"""Learning rate, length, averaged weights, decay and precision, by hand."""

import math

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from cellseg.errors import SettingsError
from cellseg.training import pick_device
from cellseg.training.averaging import WeightAverage
from cellseg.training.precision import autocast, pick_precision
from cellseg.training.schedule import TrainingLength, learning_rate_share
from cellseg.training.session import split_by_decay

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

SHARES = [
    ("the start", 0.0, 0.1, 0.1),
    ("half of the warm-up", 0.05, 0.1, 0.55),
    ("the end of the warm-up", 0.1, 0.1, 1.0),
    ("half of the cosine: the mean of 1 and 0.01", 0.55, 0.1, 0.505),
    ("a third of the cosine: cos 60 degrees", 0.4, 0.1, 0.01 + 0.99 * 0.75),
    ("the end", 1.0, 0.1, 0.01),
    ("past the end", 1.5, 0.1, 0.01),
    ("no warm-up", 0.0, 0.0, 1.0),
    ("nothing but warm-up", 0.5, 1.0, 0.55),
    ("the end of nothing but warm-up", 1.0, 1.0, 0.01),
]


@pytest.mark.parametrize(
    ("reason", "progress", "warmup", "share"), SHARES, ids=[case[0] for case in SHARES]
)
def test_share_of_the_learning_rate(reason, progress, warmup, share):
    assert learning_rate_share(progress, warmup=warmup) == pytest.approx(share)


LENGTHS = [
    ("epochs alone: 3 of 8 steps", (2, None), (3, 4, 99.0), 0.375),
    ("time alone", (None, 60.0), (3, 4, 15.0), 0.25),
    ("both: time is farther", (2, 60.0), (3, 4, 30.0), 0.5),
    ("both: epochs are farther", (2, 60.0), (6, 4, 30.0), 0.75),
    ("never more than the whole", (2, 60.0), (9, 4, 70.0), 1.0),
    ("the very start", (2, 60.0), (0, 4, 0.0), 0.0),
]


@pytest.mark.parametrize(
    ("reason", "length", "state", "progress"), LENGTHS, ids=[case[0] for case in LENGTHS]
)
def test_progress_of_a_run(reason, length, state, progress):
    assert TrainingLength(*length).progress(*state) == progress


def test_average_trails_the_weights_and_its_decay_warms_up():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, decay=0.5)
    weight = average.model.weight
    model.weight.data.fill_(3.0)
    average.update(model)  # decay 1/10: 0.1 * 1 + 0.9 * 3
    assert weight.item() == pytest.approx(2.8)
    average.update(model)  # decay 2/11
    assert weight.item() == pytest.approx(2 / 11 * 2.8 + 9 / 11 * 3)
    for _ in range(20):  # (1 + 8) / (10 + 8) = 0.5 is reached
        average.update(model)
    model.weight.data.fill_(0.0)
    before = weight.item()
    average.update(model)
    assert weight.item() == pytest.approx(0.5 * before)
    assert average.updates == 23 and model.weight.item() == 0.0
    assert not weight.requires_grad


def test_average_takes_statistics_along_and_copies_counts():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model)
    model(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))  # means 1 and 20, a tenth of them is taken
    average.update(model)
    assert average.model.running_mean.tolist() == pytest.approx([0.9 * 0.1, 0.9 * 2.0])
    assert average.model.num_batches_tracked.item() == 1
    assert not average.model.training and model.training


def test_matrices_decay_and_norms_and_biases_do_not():
    model = tiny_model()
    decayed, plain = split_by_decay(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    found = {names[id(parameter)] for parameter in plain["params"]}
    assert found == norms | {name for name in names.values() if name.endswith("bias")}
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(names.values()) - found


def test_frozen_stages_have_no_part_in_the_optimiser():
    groups = split_by_decay(tiny_model(trainable_stages=0), 0.05)
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        (CPU, "float32", torch.float32),
        (CPU, "bfloat16", torch.bfloat16),
        (CUDA, "float16", torch.float16),
        (torch.device("mps"), "auto", torch.float32),
    ],
)
def test_precision(device, precision, expected):
    assert pick_precision(device, precision) == expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_precision_of_a_cpu_is_what_it_has_instructions_for(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_precision(CPU) == expected


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_precision_of_cuda_is_what_its_hardware_multiplies(monkeypatch, has_bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: has_bfloat16 or emulated)
    assert pick_precision(CUDA) == getattr(torch, expected)


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        (CPU, "half", "precision is 'half'; use one of auto, float32, bfloat16, float16"),
        (CPU, "float16", "precision='float16' needs CUDA; use auto, bfloat16 or float32"),
    ],
)
def test_a_precision_that_cannot_work_is_named(device, precision, message):
    with pytest.raises(SettingsError, match=message):
        pick_precision(device, precision)


def test_lower_precision_keeps_losses_and_boxes_in_float32():
    model = tiny_model(score_threshold=0.0).eval()
    with autocast(CPU, torch.bfloat16), torch.inference_mode():
        assert model.backbone(torch.rand(1, 3, 64, 128))["0"].dtype == torch.bfloat16
        found = model([torch.rand(3, 50, 70)])[0]
    assert {found[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}
    assert all(math.isfinite(value) for value in found["boxes"].flatten().tolist())


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == pick_device("cpu") == CPU
    for device in ("cuda", "mps"):
        with pytest.raises(SettingsError, match=f"device='{device}' is not available here; use"):
            pick_device(device)
    with pytest.raises(SettingsError, match="device='gpu' is not one; use auto, cuda, mps or cpu"):
        pick_device("gpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == CUDA

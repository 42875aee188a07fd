"""Hostile and broken settings, metrics, checkpoints and weights: one error that names them."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import FUZZ, bounded, cases, mutated, spoilt, survives
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model, write_squares

from cellseg.errors import CellsegError, CheckpointError, WeightsError
from cellseg.models.weights import read_weights
from cellseg.training import load_model, open_run, read_checkpoint, read_history
from cellseg.training.checkpoint import FORMAT, MARK, digest_of, write_checkpoint
from cellseg.training.outcome import read_outcome
from cellseg.training.run import EpochSummary, write_history

pytestmark = FUZZ


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Return a function that opens a run, and the settings that it wrote."""
    root = tmp_path_factory.mktemp("run")
    dataset = write_squares(root / "train", {"a": (9, 8, [(1, 2, 3, 6, 7)]), "b": (8, 9, [])})
    model = tiny_model()

    def opening(**options):
        pair = dataset.subset(["a"]), dataset.subset(["b"])
        return open_run(root / "runs", model, *pair, recipe={"epochs": 1}, name="r", **options)

    path = opening().path / "settings.json"
    return opening, path, json.loads(path.read_text(encoding="utf-8"))


def survives_opening(opened, data: bytes) -> None:
    opening, path, _ = opened
    path.write_bytes(data)
    for word in ("refuse", "continue"):
        try:
            opening(on_change=word)
        except CellsegError as error:
            assert str(path.parent) in str(error)


@cases(80)
@given(data=st.data())
def test_damaged_settings(data, opened):
    survives_opening(opened, data.draw(mutated([json.dumps(opened[2]).encode()])))


@cases(80)
@given(data=st.data())
def test_settings_of_other_values(data, opened):
    survives_opening(opened, json.dumps(data.draw(spoilt(opened[2]))).encode())


SUMMARY = EpochSummary(
    1, 2, 1e-3, 1.5, None, {"train": {"loss_mask": 1.5}, "val": {}}, None, None, None, None,
    {"dark": None}, None, 3.0, 4.0, 100.0,
)  # fmt: skip


def read_lines(path: Path) -> None:
    history = read_history(path.parent)
    assert all(summary.line() for summary in history)


@pytest.fixture
def line(tmp_path):
    write_history(tmp_path, [SUMMARY, SUMMARY])
    return (tmp_path / "metrics.jsonl").read_bytes()


@cases(200)
@given(data=st.data())
def test_damaged_metrics(data, line, tmp_path):
    content = data.draw(mutated([line]) | spoilt(json.loads(line.splitlines()[0])))
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text)
    try:
        read_lines(path)
    except CellsegError as error:
        assert "metrics.jsonl" in str(error)
    (tmp_path / "outcome.json").write_bytes(text)
    read_outcome(tmp_path)


def saved(content: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


WEIGHTS = {"body.weight": torch.arange(6.0).reshape(2, 3), "body.bias": torch.ones(2)}
CONTENT = {"spec": {"builder": "get_model_x", "arguments": {}}, "model": WEIGHTS, "epoch": 3}


def sealed(content: dict) -> dict:
    return {"mark": MARK, "format": FORMAT, "digest": digest_of(content)} | content


CHECKPOINTS = [saved(sealed(CONTENT)), saved(CONTENT | {"mark": MARK, "format": 1})]
STATES = [saved(WEIGHTS), saved(WEIGHTS, _use_new_zipfile_serialization=False)]


@cases(200)
@given(data=mutated(CHECKPOINTS))
def test_damaged_checkpoints(data, tmp_path):
    survives(tmp_path, ".pt", data, read_checkpoint, CheckpointError)


@cases(100)
@given(
    content=spoilt({"mark": MARK, "format": FORMAT, "digest": "0"} | CONTENT), seal=st.booleans()
)
def test_checkpoints_of_other_values(content, seal, tmp_path):
    if seal and isinstance(content, dict):
        rest = {k: v for k, v in content.items() if k not in ("mark", "format", "digest")}
        content = content | {"digest": digest_of(rest)}
    survives(tmp_path, ".pt", saved(content), load_model, CheckpointError)


@cases(150)
@given(data=mutated(STATES))
def test_damaged_weights(data, tmp_path):
    survives(tmp_path, ".pth", data, read_weights, WeightsError)


def test_a_damaged_tensor_of_a_checkpoint_never_passes(tmp_path):
    path = tmp_path / "x.pt"
    write_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    start = whole.index(WEIGHTS["body.weight"].numpy().tobytes())
    for bit in range(24 * 8):
        data = bytearray(whole)
        data[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x.pt is damaged"):
            read_checkpoint(path)


def test_small_files_that_stand_for_much_are_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    laughs: list = []
    for _ in range(40):
        laughs = [laughs] * 10
    deep: list = []
    for _ in range(300):
        deep = [deep]
    wide = torch.zeros(1).expand(10**6, 10**6)
    for content in ({"laughs": laughs}, {"deep": deep}, {"wide": wide}):
        torch.save({"mark": MARK, "format": FORMAT, "digest": "0", **content}, path)
        with bounded(seconds=60), pytest.raises(CheckpointError, match=r"bomb.pt is damaged"):
            read_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**8))
    with bounded(), pytest.raises(CheckpointError, match=r"bomb.pt cannot be read \(its entries"):
        read_checkpoint(path)
    with bounded(), pytest.raises(WeightsError, match=r"bomb.pt cannot be read as weights \(its"):
        read_weights(path)

"""Trackers that never stop training, and the word that a run leaves about its end."""

import json
import signal
import sys
import types
import warnings

import pytest

from cellseg.errors import SettingsError, TrainingError
from cellseg.training import EpochSummary, TrainingInterrupted
from cellseg.training.outcome import OUTCOME_NAME, Outcome, read_outcome, recorded_outcome
from cellseg.training.tracking import SafeTracker, scalars

SUMMARY = EpochSummary(
    epoch=3, step=30, learning_rate=1e-4, train_loss=1.5, val_loss=None,
    losses={"train": {"loss_mask": 0.5}, "val": {}}, ap=None, ap50=0.25, ap75=None,
    ap50_100=None, ap50_per_class={"dark": 0.25, "light": None}, train_ap50=None, seconds=9.0,
    images_per_second=4.0, peak_memory_mb=None,
)  # fmt: skip


class Writer:
    """A stand-in for TensorBoard's SummaryWriter that keeps what it is told."""

    def __init__(self, folder, fails=()):
        self.folder, self.fails, self.told = folder, fails, []

    def add_scalar(self, name, value, step):
        if "add_scalar" in self.fails:
            raise OSError("no space")
        self.told.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        if "close" in self.fails:
            raise RuntimeError("closed twice")


@pytest.fixture
def tensorboard(monkeypatch):
    """Install a stand-in; its `made` lists the writers, its `fails` what they cannot do."""
    module = types.ModuleType("torch.utils.tensorboard")
    module.made, module.fails = [], []

    def make(folder):
        module.made.append(Writer(folder, module.fails))
        return module.made[-1]

    module.SummaryWriter = make
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module


def test_what_was_measured_is_told_by_epoch(tensorboard, tmp_path):
    tracked = SafeTracker("tensorboard", tmp_path)
    tracked.log(SUMMARY)
    tracked.close()
    writer = tensorboard.made[0]
    assert writer.folder == tmp_path / "tensorboard"
    assert writer.told == [(name, value, 3) for name, value in scalars(SUMMARY).items()]
    assert dict(item[:2] for item in writer.told) == {
        "loss/train": 1.5,
        "loss_train/loss_mask": 0.5,
        "ap/ap50": 0.25,
        "ap50_of/dark": 0.25,
        "run/learning_rate": 1e-4,
        "run/images_per_second": 4.0,
    }


@pytest.mark.parametrize("what", ["add_scalar", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(what, tensorboard, tmp_path):
    tensorboard.fails.append(what)
    tracked = SafeTracker("tensorboard", tmp_path)
    with pytest.warns(UserWarning, match="tracker 'tensorboard' failed .* and is left out") as told:
        tracked.log(SUMMARY)
        tracked.log(SUMMARY)
        tracked.close()
        tracked.close()
    assert len(told) == 1


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match=r"left out; pip install tensorboard; metrics.jsonl has"):
        tracked = SafeTracker("tensorboard", tmp_path)
    tracked.log(SUMMARY)


def test_tensorboard_itself_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = SafeTracker("tensorboard", tmp_path)
    tracked.log(SUMMARY)
    tracked.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("ap/ap50")] == [(3, 0.25)]


def test_no_tracker_does_nothing_and_an_unknown_one_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SafeTracker("none", tmp_path).log(SUMMARY)
    with pytest.raises(SettingsError, match="tracker is 'wandb'; use one of none, tensorbo"):
        SafeTracker("wandb", tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, ("finished", None, "")),
        (TrainingInterrupted("saved", signal.SIGTERM), ("stopped", "SIGTERM", "saved")),
        (KeyboardInterrupt(), ("stopped", None, "")),
        (TrainingError("no memory"), ("failed", None, "no memory")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_leaves_word_how_it_ended(error, expected, tmp_path):
    def end():
        with recorded_outcome(tmp_path, 2):
            assert read_outcome(tmp_path) == Outcome("running", 2)
            if error is not None:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(type(error)):
            end()
    outcome, signal_name, message = expected
    assert read_outcome(tmp_path) == Outcome(outcome, 2, signal_name, message)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"outcome": "finished"}'])
def test_a_word_that_cannot_be_read_is_none(text, tmp_path):
    if text is not None:
        (tmp_path / OUTCOME_NAME).write_text(text, encoding="utf-8")
    assert read_outcome(tmp_path) is None


def test_a_process_that_does_not_write_leaves_no_word(tmp_path):
    with recorded_outcome(tmp_path, 0, writes=False):
        pass
    assert not (tmp_path / OUTCOME_NAME).exists()


def test_the_word_is_plain_json(tmp_path):
    with recorded_outcome(tmp_path, 1):
        pass
    assert json.loads((tmp_path / OUTCOME_NAME).read_text(encoding="utf-8")) == {
        "outcome": "finished", "epochs_before": 1, "signal": None, "message": "",
    }  # fmt: skip

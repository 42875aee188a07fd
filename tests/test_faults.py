"""The fault table in short, and what of it a process of its own is not needed for."""

import os
import signal

import chaos
import pytest
import torch

from cellseg.errors import CheckpointError, TrainingError
from cellseg.training.checkpoint import (
    digest_of,
    load_state,
    read_checkpoint,
    save_state,
    write_checkpoint,
)  # fmt: skip
from cellseg.training.interruption import StopRequest, alarms_held_back, stop_requests
from cellseg.training.lock import LOCK_NAME, lock_run

if os.name == "nt":
    pytest.skip("signals and locks are those of Unix", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return chaos.prepare(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("fault", chaos.FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_survived(fault, prepared, tmp_path):
    assert fault(chaos.Bench(tmp_path, *prepared, kills=3, signals=("SIGTERM",)))


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_save_broken_off_at_any_rename_leaves_a_good_state(at, tmp_path, monkeypatch):
    for number in (1, 2):
        save_state(tmp_path, {"number": number})
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == at + 1:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            save_state(tmp_path, {"number": 3})
    # The new state counts from the moment at which the one before has made way for it.
    assert load_state(tmp_path)["number"] == (3 if at == 2 else 2)
    save_state(tmp_path, {"number": 4})
    assert load_state(tmp_path)["number"] == 4


def test_a_state_that_does_not_read_back_leaves_the_old_ones(tmp_path, monkeypatch):
    save_state(tmp_path, {"number": 1})
    seals = iter("ab")
    monkeypatch.setattr("cellseg.training.checkpoint.digest_of", lambda value: next(seals))
    with pytest.raises(CheckpointError, match=r"last.pt.new is damaged: its content does not mat"):
        save_state(tmp_path, {"number": 2})
    monkeypatch.undo()
    assert load_state(tmp_path)["number"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 1.0}),
        ({"a": [1, 2]}, {"a": [12]}),
        ({"a": {"b": 1}}, {"a": {}, "b": 1}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(1, 2)}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.float64)}),
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}),
        ([[], []], [[[]]]),
    ],
    ids=str,
)
def test_different_content_has_different_digests(one, other):
    assert digest_of(one) != digest_of(other)


def test_one_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    weight = torch.arange(64, dtype=torch.float32) + 1
    write_checkpoint(path, {"model": {"weight": weight}})
    data = bytearray(path.read_bytes())
    place = data.index(weight.numpy().tobytes()) + 30
    data[place] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["weight"].isfinite().all()
    with pytest.raises(CheckpointError, match=r"x.pt is damaged: its content does not match its"):
        read_checkpoint(path)


def test_a_lock_is_held_by_one_and_given_back(tmp_path, monkeypatch):
    with lock_run(tmp_path):
        assert (tmp_path / LOCK_NAME).exists()
        monkeypatch.setattr("os.getpid", lambda: os.getppid())  # as another process sees it
        with pytest.raises(TrainingError, match=r"is in use by process \d+ on .*stop it first"):
            lock_run(tmp_path).__enter__()
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 99999999}'])
def test_a_lock_of_nobody_is_taken_over(content, tmp_path):
    (tmp_path / LOCK_NAME).write_text(content, encoding="utf-8")
    os.utime(tmp_path / LOCK_NAME, (1, 1))
    with lock_run(tmp_path):
        assert '"token"' in (tmp_path / LOCK_NAME).read_text(encoding="utf-8")


def test_a_number_used_again_by_another_process_is_no_owner(tmp_path):
    with lock_run(tmp_path):
        held = (tmp_path / LOCK_NAME).read_text(encoding="utf-8")
    other = held.replace(f'"pid": {os.getpid()}', '"pid": 1')  # alive, and born at another time
    if '"born": null' in held:
        pytest.skip("this system does not tell when a process was born")
    (tmp_path / LOCK_NAME).write_text(other, encoding="utf-8")
    with lock_run(tmp_path):
        pass


def test_handlers_are_put_back_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), stop_requests():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_alarm_comes_after_the_block_and_not_after_a_stop():
    seen = []
    before = signal.signal(signal.SIGCHLD, lambda *_: seen.append("alarm"))
    try:
        with alarms_held_back(StopRequest()):
            os.kill(os.getpid(), signal.SIGCHLD)
            seen.append("end of the step")
        asked = StopRequest()
        asked.signum = signal.SIGTERM
        with alarms_held_back(asked):
            os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert seen == ["end of the step", "alarm"]

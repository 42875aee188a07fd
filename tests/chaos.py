"""The faults that a run must survive, each of them really caused; `make chaos` runs them all.

Every function causes one fault in a folder of its own, looks at what is left, goes on, and returns
what it saw in a line. `test_faults.py` runs the same functions with fewer repetitions.
"""

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import survival
import torch
from survival import after_steps, assert_same_run, child, quick_model, send, train, wait_for

from cellseg.data import TrainTransform
from cellseg.errors import CellsegError, CheckpointError, DataError, TrainingError
from cellseg.training import TrainingInterrupted, read_checkpoint
from cellseg.training.checkpoint import FORMAT, MARK
from cellseg.training.lock import LOCK_NAME, SILENT_AFTER

CODES = {name: 128 + getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1")}


@dataclass
class Bench:
    """Where a fault is caused: an empty folder, the data, a run that nothing disturbed."""

    folder: Path
    data: Path
    whole: Path
    kills: int = 20
    signals: tuple[str, ...] = tuple(CODES)

    @property
    def run(self) -> Path:
        """The run that is disturbed."""
        return self.folder / "run"

    def finish(self) -> None:
        """Go on with the run to its end, and hold it to the undisturbed one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            list(train(self.data, self.run))
        assert_same_run(self.run, self.whole)


def raised(kind: type[BaseException], action: Callable[[], object]) -> str:
    """Return the message of the error that an action must raise: one line of ours."""
    try:
        action()
    except kind as error:
        text = str(error)
        assert "\n" not in text, text
        return text
    raise AssertionError(f"no {kind.__name__}")


def warned(action: Callable[[], object]) -> list[str]:
    """Return the warnings that an action gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


def position(run: Path) -> tuple[int, int, int]:
    """Return (epoch, batch, step) of a run's state."""
    return tuple(read_checkpoint(run / "last.pt")["position"].values())


def kill_at_random(bench: Bench) -> str:
    """Kill a training process with SIGKILL at random moments, while it saves as well."""
    seconds = _seconds_of_a_run(bench)
    draw, saving, steps, done = random.Random(5), 0, [], 0
    for attempt in range(3 * bench.kills):
        shutil.rmtree(bench.run, ignore_errors=True)
        process = child(bench.data, bench.run, save_every=0, workers=2 * (attempt % 2))
        wait_for((bench.run / "run.lock").exists, process)
        time.sleep(draw.uniform(0, seconds))
        early = process.poll() is None
        process.kill()
        process.communicate()
        if not early:
            continue
        left = [path.name for path in bench.run.iterdir()]
        saving += any(name.endswith((".part", ".new")) for name in left)
        steps.append(position(bench.run)[2] if "last.pt" in left else -1)
        bench.finish()
        assert not [path for path in bench.run.iterdir() if path.name.endswith(".part")]
        done += 1
        if done == bench.kills:
            break
    assert done == bench.kills
    return (
        f"{done} of {done} equal to the undisturbed run; {saving} killed while saving, "
        f"after steps {sorted(steps)}"
    )


def _seconds_of_a_run(bench: Bench) -> float:
    """Return how long a child trains, from its lock to its end."""
    process = child(bench.data, bench.folder / "timed", save_every=0)
    wait_for((bench.folder / "timed" / "run.lock").exists, process)
    start = time.monotonic()
    assert process.wait(300) == 0, process.communicate()[0]
    return time.monotonic() - start


def stop_by_signals(bench: Bench) -> str:
    """Send each signal to `python -m cellseg train`, as a shell or a cluster does."""
    found = {}
    for name in bench.signals:
        runs = bench.folder / name
        process = _command_line(bench.data, runs)
        wait_for(lambda runs=runs: _steps_begun(runs / "r"), process)
        process.send_signal(getattr(signal, name))
        text = process.communicate(timeout=120)[0]
        assert process.returncode == CODES[name], text
        assert f"stopped by {name} in epoch" in text and "Traceback" not in text, text
        assert position(runs / "r")[2] > 0 and not (runs / "r" / LOCK_NAME).exists()
        found[name] = process.returncode
    return f"state saved, lock gone, exit codes {found}"


def _command_line(data: Path, runs: Path) -> subprocess.Popen:
    options = {
        "backbone": "mobilenetv2", "weights": "none", "fpn-channels": 16, "head-width": 32,
        "rois-per-image": 32, "epochs": 500, "crop-size": 40, "workers": 2, "device": "cpu",
        "class-names": "dark,light", "val-ids": "v", "runs-dir": runs, "name": "r",
        "batch-size": 1, "validate-every": 500, "save-minutes": 0, "set": "train_proposals=16",
    }  # fmt: skip
    pairs = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    source = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "cellseg", "train", str(data), *pairs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def _steps_begun(run: Path) -> bool:
    """Tell whether a run that saves at each step is past its first."""
    return (run / "previous.pt").exists()


def second_signal(bench: Bench) -> str:
    """Send two signals within one step."""
    model, seen = quick_model(), []

    def twice() -> None:
        send(signal.SIGTERM)()
        seen.append("first noted")
        send(signal.SIGINT)()
        seen.append("not reached")

    after_steps(model, 1, twice)
    before = [signal.getsignal(getattr(signal, name)) for name in CODES]
    try:
        list(train(bench.data, bench.run, model=model, save_every=0))
    except TrainingInterrupted:
        raise AssertionError("the second signal was taken for the first") from None
    except KeyboardInterrupt:
        seen.append("stopped")
    assert seen == ["first noted", "stopped"]
    assert [signal.getsignal(getattr(signal, name)) for name in CODES] == before
    assert position(bench.run)[2] == 1
    bench.finish()
    return "stopped within the step, at the state after step 1; equal after going on"


def handlers_only_within_epochs(bench: Bench) -> str:
    """Look at the handlers in a step, between epochs and afterwards."""
    model, within = quick_model(), []
    after_steps(model, 0, lambda: within.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    epochs = train(bench.data, bench.run, model=model)
    next(epochs)
    between = signal.getsignal(signal.SIGTERM)
    list(epochs)
    assert within[0] is not before and between is before
    assert signal.getsignal(signal.SIGTERM) is before
    return "in place in a step, not between epochs"


def disk_full_while_saving(bench: Bench) -> str:
    """Let a child write no file larger than half a state (RLIMIT_FSIZE)."""
    next(train(bench.data, bench.run))
    before = (bench.run / "last.pt").read_bytes()
    process = child(bench.data, bench.run, file_size_limit=len(before) // 2)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "the disk is full" in text and "make space" in text, text
    assert (bench.run / "last.pt").read_bytes() == before
    assert not [path for path in bench.run.iterdir() if path.name.endswith((".part", ".new"))]
    bench.finish()
    return "old state intact byte for byte, error says to make space, equal after going on"


def disk_full_at_each_write(bench: Bench) -> str:
    """Let each file that is synced in turn, state, best weights and metrics, find no space."""
    sync, failed = os.fsync, []
    # The first state; the outcome, which is passed over; metrics on resuming; an epoch's files.
    for number in (0, 1, 0, 3, 4, 5):
        calls = []

        def full(handle: int, number: int = number, calls: list[int] = calls) -> None:
            calls.append(handle)
            if len(calls) == number + 1:
                failed.append(_name_of(handle))
            if len(calls) > number:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        with mock.patch("os.fsync", full):
            text = raised(TrainingError, lambda: list(train(bench.data, bench.run)))
        assert "the disk is full" in text and str(bench.run) in text
    bench.finish()
    return f"{len(failed)} writes failed ({', '.join(failed)}); equal after going on"


def _name_of(handle: int) -> str:
    """Return the name of an open file where the system tells."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".part")[0][1:-9]
    except OSError:
        return "a file"


def two_in_one_folder(bench: Bench) -> str:
    """Train where another process trains; then kill that one, which leaves its lock."""
    process = child(bench.data, bench.run, save_every=0, epochs=500, validate_every=500)
    wait_for((bench.run / "previous.pt").exists, process)
    text = raised(TrainingError, lambda: next(train(bench.data, bench.run)))
    assert f"is in use by process {process.pid} on" in text, text
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert (bench.run / LOCK_NAME).exists()
    after = next(train(bench.data, bench.run, epochs=500, validate_every=500)).epoch
    return (
        f"the second refused and named process {process.pid}; its stale lock was taken over, "
        f"going on in epoch {after}"
    )


def lock_of_another_machine(bench: Bench) -> str:
    """Find a lock on a shared drive: fresh, and silent for longer than a machine may be."""
    bench.run.mkdir()
    lock = bench.run / LOCK_NAME
    lock.write_text(json.dumps({"pid": 4, "host": "elsewhere"}), encoding="utf-8")
    text = raised(TrainingError, lambda: next(train(bench.data, bench.run)))
    assert "process 4 on elsewhere" in text
    old = time.time() - SILENT_AFTER - 1
    os.utime(lock, (old, old))
    bench.finish()
    return "fresh: refused; silent for five minutes: taken over"


def damaged_state(bench: Bench) -> str:
    """Cut the state short, flip one of its bits, and damage both states."""
    next(train(bench.data, bench.run))
    last, previous = bench.run / "last.pt", bench.run / "previous.pt"
    good = last.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    for data in (good[: len(good) // 2], bytes(flipped), b"", os.urandom(5000)):
        last.write_bytes(data)
        (text,) = warned(lambda: next(train(bench.data, bench.run)).epoch)
        assert str(last) in text and "going on from previous.pt instead" in text, text
    last.write_bytes(bytes(flipped))
    previous.write_bytes(b"nothing")
    text = raised(CheckpointError, lambda: next(train(bench.data, bench.run)))
    assert str(last) in text and str(previous) in text
    last.write_bytes(good)
    bench.finish()
    return "the previous state taken with a warning; both damaged: refused by name"


class _RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "ran")


def foreign_state(bench: Bench) -> str:
    """Put a foreign, a too new and a code-running file in the state's place."""
    next(train(bench.data, bench.run))
    last, ran = bench.run / "last.pt", bench.folder / "ran"
    good = last.read_bytes()
    for content, words in (
        ({"weight": torch.ones(3)}, "is not a checkpoint of cellseg"),
        ({"mark": MARK, "format": FORMAT + 1}, "install a newer cellseg"),
    ):
        torch.save(content, last)
        text = raised(CheckpointError, lambda: next(train(bench.data, bench.run)))
        assert str(last) in text and words in text, text
    torch.save({"mark": MARK, "format": FORMAT, "model": _RunsCode(ran)}, last)
    (text,) = warned(lambda: next(train(bench.data, bench.run)))
    assert "cannot be read" in text and not ran.exists(), text
    last.write_bytes(good)
    bench.finish()
    return "foreign and too new: refused by name; code: not run, previous state taken"


def spoilt_loss(bench: Bench) -> str:
    """Make the loss of one step NaN, the gradient of another Inf, then every loss NaN."""
    model, spoil = quick_model(), {"loss": False, "gradient": False}

    def loss(module: torch.nn.Module, inputs: object, losses: dict) -> dict:
        return {k: v * torch.nan for k, v in losses.items()} if spoil["loss"] else losses

    weight = next(model.roi_heads.parameters())
    model.register_forward_hook(lambda m, i, o: loss(m, i, o) if m.training else o)
    weight.register_hook(lambda gradient: gradient * torch.inf if spoil["gradient"] else gradient)
    after_steps(model, 0, lambda: spoil.update(loss=True))
    after_steps(model, 1, lambda: spoil.update(loss=False, gradient=True))
    after_steps(model, 2, lambda: spoil.update(gradient=False))
    texts = warned(lambda: next(train(bench.data, bench.run, model=model)))
    assert len(texts) == 2 and all("step skipped" in text for text in texts), texts
    assert "batch 2 (images [" in texts[0] and "batch 4 (images [" in texts[1], texts
    good = read_checkpoint(bench.run / "last.pt")
    assert good["ema_updates"] == 1 and good["skipped"] == []

    spoil["loss"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = raised(TrainingError, lambda: next(train(bench.data, bench.run, model=model)))
    assert "not finite in 3 steps in a row" in text and "images [1, 2, 3, 4, 5]" in text, text
    kept = read_checkpoint(bench.run / "last.pt")
    survival.assert_same(kept["model"], good["model"], "weights and norms of the last good step")
    survival.assert_same(kept["optimiser"]["state"], good["optimiser"]["state"], "optimiser")
    spoil["loss"] = False
    assert [row.epoch for row in train(bench.data, bench.run, model=model)] == [2]
    return "2 steps skipped with their images; after an epoch of them stopped, good weights saved"


def out_of_memory(bench: Bench) -> str:
    """Run out of memory with more than one image at a time."""

    def limited(most: int, norm: str) -> torch.nn.Module:
        model = quick_model(norm=norm)

        def check(module: torch.nn.Module, inputs: tuple) -> None:
            if module.training and len(inputs[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        model.register_forward_pre_hook(check)
        return model

    settings = {"batch_size": 4, "accumulate": 1}
    model = limited(1, "frozen")
    texts = warned(lambda: list(train(bench.data, bench.run, model=model, **settings)))
    assert len(texts) == 1 and "with 4 images at a time: going on with 1" in texts[0], texts
    assert position(bench.run) == (2, 0, 4)
    other = bench.folder / "trained"
    model = limited(2, "trained")
    text = raised(TrainingError, lambda: next(train(bench.data, other, model=model, **settings)))
    assert "4 images a batch; 2 fit: use batch_size=2" in text, text
    assert position(other) == (0, 0, 0)
    model = limited(0, "frozen")
    text = raised(TrainingError, lambda: next(train(bench.data, other / "x", model=model)))
    assert "out of memory with one image at a time; lower crop_size" in text, text
    return "frozen norms: cut to 1 image, said once; trained norms: told that 2 fit, state saved"


def corrupt_file(bench: Bench) -> str:
    """Cut an image short before a worker meets it in epoch 3."""
    data = bench.folder / "data"
    shutil.copytree(bench.data, data)
    image = data / "d" / "image.tif"
    whole = image.read_bytes()
    epochs = train(data, bench.run, workers=2, epochs=3, validate_every=9)
    assert [next(epochs).epoch, next(epochs).epoch] == [1, 2]
    image.write_bytes(whole[:200])
    text = raised(DataError, lambda: next(epochs))
    assert str(image) in text and "damaged" in text, text
    epoch, batch, _ = position(bench.run)
    image.write_bytes(whole)
    assert [row.epoch for row in train(data, bench.run, workers=2, epochs=3)] == [3]
    return f"named {image.relative_to(data)}; saved in epoch {epoch + 1} after batch {batch}"


def dead_worker(bench: Bench) -> str:
    """Kill a process that reads ahead, in the middle of a step."""
    model = quick_model()

    def kill_one() -> None:
        multiprocessing.active_children()[0].kill()
        time.sleep(0.3)

    after_steps(model, 1, kill_one)
    text = raised(TrainingError, lambda: list(train(bench.data, bench.run, model=model, workers=2)))
    assert "a process that reads ahead died" in text and "workers=0" in text, text
    step = position(bench.run)[2]
    assert step >= 1
    bench.finish()
    return f"one sentence with the remedy, state saved after step {step}; equal after going on"


class LittleSharedMemory(TrainTransform):
    """Fails at one image, in a worker, as torch does where /dev/shm is full."""

    def __call__(self, image: torch.Tensor, target: dict, generator: torch.Generator) -> tuple:
        if target["image_id"] == 4:
            file = "file </torch_1_2_3>: No space left on device (28)"
            raise RuntimeError(f"unable to allocate shared memory(shm) for {file}")
        return super().__call__(image, target, generator)


def little_shared_memory(bench: Bench) -> str:
    """Let a worker fail as it does where /dev/shm is full."""
    failing = LittleSharedMemory(crop_size=40)
    text = raised(
        TrainingError, lambda: next(train(bench.data, bench.run, workers=1, transform=failing))
    )
    assert "unable to allocate shared memory" in text and "--shm-size" in text, text
    bench.finish()
    return "one sentence with the remedy; equal after going on"


FAULTS = [
    kill_at_random, stop_by_signals, second_signal, handlers_only_within_epochs,
    disk_full_while_saving, disk_full_at_each_write, two_in_one_folder, lock_of_another_machine,
    damaged_state, foreign_state, spoilt_loss, out_of_memory, corrupt_file, dead_worker,
    little_shared_memory,
]  # fmt: skip


def prepare(folder: Path) -> tuple[Path, Path]:
    """Return the data and the undisturbed run, made in a folder."""
    survival.make_data(folder / "train")
    list(train(folder / "train", folder / "whole"))
    return folder / "train", folder / "whole"


def main() -> int:
    """Cause all faults; return how many were not survived."""
    failed = 0
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        data, whole = prepare(Path(name))
        for fault in FAULTS:
            bench = Bench(Path(name) / fault.__name__, data, whole)
            bench.folder.mkdir()
            start = time.monotonic()
            try:
                seen = f"ok    {fault.__name__}: {fault(bench)}"
            except (Exception, KeyboardInterrupt) as error:
                failed += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = "" if isinstance(error, CellsegError | AssertionError) else "unexpected "
                seen = (
                    f"FAIL  {fault.__name__}: {kind}{type(error).__name__} in line {place.lineno} "
                    f"of {Path(place.filename).name}: {error}"
                )
            print(f"{seen} [{time.monotonic() - start:.0f} s]", flush=True)
            shutil.rmtree(bench.folder)
    print(f"{len(FAULTS) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main()))

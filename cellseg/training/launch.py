"""Training by several processes from a notebook: the same loop, in children of its kernel.

A kernel that has touched CUDA cannot fork, so torch's launcher starts the processes anew; each
rebuilds model and loaders from a description that the notebook leaves in the run's folder. They
stop, after the step and with their state saved, when their standard input ends: because the cell
was interrupted, or because the kernel is gone.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from cellseg.data import CellDataset, TrainTransform, make_loaders
from cellseg.errors import CheckpointError, SettingsError, TrainingError
from cellseg.models import build_from_spec
from cellseg.training.checkpoint import read_checkpoint, write_checkpoint
from cellseg.training.distributed import LOST, join_ranks
from cellseg.training.fit import fit
from cellseg.training.interruption import TrainingInterrupted
from cellseg.training.lock import disk_errors, lock_run
from cellseg.training.outcome import OUTCOME_NAME, read_outcome
from cellseg.training.run import EpochSummary, read_history

START_NAME = "start.pt"
LOG_NAME = "launch.log"
LOOK_EVERY = 0.5  # seconds between looks into the run's folder
OUR_ERROR = re.compile(r"(?:\[rank \d+\] )?error: (.*)")
ANY_ERROR = re.compile(r"((?:\w+\.)*\w+(?:Error|Exception): .*)")
LAST_LINES = 15  # of the log, told if no line of it says what went wrong


def launch(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader | None,
    *,
    run_dir: str | Path,
    processes: int = 1,
    **settings: Any,
) -> Iterator[EpochSummary]:
    """Train as `fit` does, by several processes, and yield the same summaries.

    The weights are trained in the children: load `best.pt` afterwards. What they print goes into
    `launch.log` in the run's folder. Interrupting the cell stops them after they have saved; a
    second interruption does not wait for that.

    Args:
        model: a model of `cellseg.models`; the processes start from its spec and weights.
        train_loader: from `make_loaders`, its transform a `TrainTransform` or None; its
            `batch_size` is that of all processes together.
        val_loader: from `make_loaders`, or None.
        run_dir: folder of the run.
        processes: how many, one a GPU; with 1 this is `fit` itself.
        **settings: of `fit`, plain values.

    Yields:
        one `EpochSummary` per epoch trained in this call.

    Raises:
        TrainingInterrupted: if the cell is interrupted; the state is saved.
        TrainingError: if a process fails; says why, as that process did.
        SettingsError: if the loaders cannot be described.
    """
    if processes == 1:
        yield from fit(model, train_loader, val_loader, run_dir=run_dir, **settings)
        return
    run_dir = Path(run_dir)
    with lock_run(run_dir), disk_errors(run_dir):  # nobody else trains there
        _describe(run_dir, model, train_loader, val_loader, settings)
        (run_dir / OUTCOME_NAME).unlink(missing_ok=True)
    told = 0
    with _children(run_dir, processes) as child:
        running = True
        while running:
            running = child.poll() is None  # before looking, so that nothing is missed
            for summary in _closed_epochs(run_dir, told):
                told += 1
                yield summary
            if running:
                time.sleep(LOOK_EVERY)
    _raise_unless_finished(run_dir, processes)


def train_launched(run_dir: str | Path) -> None:
    """Do one process's part of what `launch` left in a run's folder.

    Raises:
        CheckpointError: if the description cannot be used.
        CellsegError: whatever `fit` raises.
    """
    start = read_checkpoint(Path(run_dir) / START_NAME)
    settings = start["settings"]
    with join_ranks(settings.get("device", "auto")) as ranks:
        if ranks.first:
            _stop_at_end_of_input()
        model = build_from_spec(start["spec"])
        try:
            model.load_state_dict(start["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{Path(run_dir) / START_NAME} does not fit its own description; remove it and "
                "launch again"
            ) from error
        model.spec, model.provenance = start["spec"], start["provenance"]
        ranks.confirm()  # all have read it
        if ranks.first:
            (Path(run_dir) / START_NAME).unlink(missing_ok=True)
        for _ in fit(model, *_loaders(start), run_dir=run_dir, ranks=ranks, **settings):
            pass


def _describe(
    run_dir: Path,
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader | None,
    settings: dict[str, Any],
) -> None:
    """Write what the processes start from."""
    batches = train_loader.batch_sampler
    weights = None if batches.weights is None else batches.weights.tolist()
    content = {
        "spec": model.spec,
        "provenance": model.provenance,
        "model": model.state_dict(),
        "train": _describe_dataset(train_loader.dataset),
        "val": None if val_loader is None else _describe_dataset(val_loader.dataset),
        "loaders": {
            "batch_size": batches.batch_size,
            "workers": train_loader.num_workers,
            "seed": batches.seed,
            "draws_per_image": batches.draws_per_image,
        },
        "weights": weights,
        "settings": {"progress": False} | settings,
    }
    write_checkpoint(run_dir / START_NAME, content)


def _describe_dataset(dataset: Any) -> dict[str, Any]:
    """Return what a dataset is made from, as plain values."""
    transform = dataset.transform
    if not isinstance(dataset, CellDataset) or type(transform) not in (TrainTransform, type(None)):
        raise SettingsError(
            "several processes from a notebook need a CellDataset with a TrainTransform or none; "
            "for your own, write a script and start it with torchrun"
        )
    return {
        "train_dir": str(dataset.train_dir.resolve()),
        "class_names": list(dataset.class_names),
        "sample_ids": dataset.sample_ids,
        "channel_order": dataset.channel_order,
        "seed": dataset.seed,
        "cache_dir": None if dataset.cache is None else str(dataset.cache.folder.resolve()),
        "transform": None if transform is None else vars(transform),
    }


def _make_dataset(description: dict[str, Any] | None) -> CellDataset | None:
    """Return the dataset that a description tells of."""
    if description is None:
        return None
    transform = description["transform"]
    transform = None if transform is None else TrainTransform(**transform)
    return CellDataset(**description | {"transform": transform})


def _loaders(start: dict[str, Any]) -> tuple[DataLoader, DataLoader | None]:
    """Return the loaders that a description tells of."""
    datasets = _make_dataset(start["train"]), _make_dataset(start["val"])
    pair = make_loaders(*datasets, **start["loaders"])
    if start["weights"] is not None:
        pair[0].batch_sampler.weights = np.asarray(start["weights"])
    return pair


@contextmanager
def _children(run_dir: Path, processes: int) -> Iterator[subprocess.Popen]:
    """Start the processes under torch's launcher; none is left when the block is over."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes)]
    command += ["-m", "cellseg", "train-launched", str(run_dir)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    with (run_dir / LOG_NAME).open("wb") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # the notebook's interruption is passed on once, by us
        )
    try:
        with _interruption_passed_on(child, run_dir):
            yield child
    finally:
        _stop(child)
        (run_dir / START_NAME).unlink(missing_ok=True)


@contextmanager
def _interruption_passed_on(child: subprocess.Popen, run_dir: Path) -> Iterator[None]:
    """Stop the child at an interruption, also one that comes while the cell draws."""
    asked = []

    def interrupt(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        _stop(child)
        outcome = read_outcome(run_dir)
        message = outcome.message if outcome else ""
        raise TrainingInterrupted(message or "stopped before the first step", signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


def _stop(child: subprocess.Popen) -> None:
    """Let the child save and end; a second interruption, while this waits, ends it at once."""
    with suppress(OSError):
        child.stdin.close()
    try:
        child.wait()
    except KeyboardInterrupt:
        child.terminate()
        raise


def _stop_at_end_of_input() -> None:
    """Ask this process to stop when its standard input ends."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):  # not buffered: that lock would outlive the thread
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _closed_epochs(run_dir: Path, told: int) -> list[EpochSummary]:
    """Return the epochs closed in this call, without those that were told already."""
    outcome = read_outcome(run_dir)
    return read_history(run_dir)[outcome.epochs_before + told :] if outcome else []


def _raise_unless_finished(run_dir: Path, processes: int) -> None:
    """Raise what ended the run, unless it says itself that it is finished.

    The exit code does not count: processes that have finished sometimes abort as they leave.
    """
    outcome = read_outcome(run_dir)
    if outcome is not None and outcome.outcome == "finished":
        return
    if outcome is not None and outcome.outcome == "stopped":
        raise TrainingInterrupted(outcome.message, getattr(signal, outcome.signal or "SIGTERM"))
    raise TrainingError(f"{processes} processes: {_own_error(run_dir / LOG_NAME)}")


def _own_error(log: Path) -> str:
    """Return the first error in a log that is not about another process, or its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for pattern in (OUR_ERROR, ANY_ERROR):
        for line in lines:
            if LOST not in line and (found := pattern.match(line)):
                return f"{found[1]} (all of it: {log})"
    last = "\n".join(lines[-LAST_LINES:])
    return f"they ended without a word; the last lines of {log}:\n{last}"

"""A run's state on disk: saved whole, taken up again, the one before kept until it is safe."""

import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cellseg.errors import CheckpointError, TrainingError
from cellseg.training.checkpoint import (
    BEST_NAME,
    STATE_NAME,
    STATE_NAMES,
    load_state,
    save_state,
    write_checkpoint,
)
from cellseg.training.interruption import TrainingInterrupted
from cellseg.training.lock import disk_errors
from cellseg.training.run import METRICS_NAME, EpochSummary, read_settings, write_history
from cellseg.training.session import Session

LEFT_BY_A_KILL = (".*.pt.*.part", f".{METRICS_NAME}.*.part")  # of files that were being written


class StateKeeper:
    """Keeps a session's state in the run's folder; of several processes only the first writes."""

    def __init__(
        self, run_dir: Path, session: Session, save_every: float, keep_checkpoints: int
    ) -> None:
        """Keep what is asked for; see `fit`."""
        self.run_dir, self.session = run_dir, session
        self.save_every, self.keep = save_every, keep_checkpoints
        self.saved_at = time.monotonic()
        self.writes = session.ranks.first

    def _about(self) -> dict[str, Any]:
        """Return what every checkpoint of the run says about its model."""
        return {
            "spec": self.session.model.spec,
            "provenance": self.session.model.provenance,
            "settings": read_settings(self.run_dir),
        }

    def save(self) -> None:
        """Save the state as it is."""
        if not self.writes:
            return
        with disk_errors(self.run_dir):
            save_state(self.run_dir, self._about() | self.session.state())
        self.saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """Save the state if the last time is long enough ago."""
        if time.monotonic() - self.saved_at >= self.save_every:
            self.save()

    def resume(self, how: str) -> None:
        """Take up the state in the run's folder, or save the first one if there is none.

        What a killed process left half-written is removed. Several processes take up the same.
        """
        ranks, session = self.session.ranks, self.session
        ranks.from_first(lambda: self._resume(how))
        if not ranks.first and (state := load_state(self.run_dir)) is not None:
            session.load(state)
        place = ranks.from_first(lambda: (session.epoch, session.batch, session.step))
        if place != (session.epoch, session.batch, session.step):
            raise TrainingError(
                f"{self.run_dir} holds another state here than for the first process; it must be "
                "one folder that all machines share"
            )

    def _resume(self, how: str) -> None:
        """Take up the state, and put the folder in order."""
        for pattern in LEFT_BY_A_KILL:
            for path in self.run_dir.glob(pattern):
                path.unlink(missing_ok=True)
        found = [name for name in STATE_NAMES if (self.run_dir / name).exists()]
        if how != "auto" and found:
            raise TrainingError(
                f"{self.run_dir / found[0]} exists; use resume='auto' to go on, or another run_dir"
            )
        state = load_state(self.run_dir)
        if state is None:
            # Whatever stops the first epoch, the model in memory is not what the run began with.
            self.save()
            return
        if _network(state["spec"]) != _network(self.session.model.spec):
            raise CheckpointError(
                f"{self.run_dir / STATE_NAME} was written by {state['spec']}, not by this model "
                f"({self.session.model.spec}); choose another run_dir"
            )
        self.session.load(state)
        self._write_history()

    def _write_history(self) -> None:
        """Write the closed epochs into `metrics.jsonl`."""
        if not self.writes:
            return
        with disk_errors(self.run_dir):
            write_history(self.run_dir, [EpochSummary(**row) for row in self.session.history])

    def close_epoch(self, summary: EpochSummary) -> None:
        """Write the epoch's results and the state after it: the best weights, the history.

        Where no epoch could be scored, for want of images held out or of cells in them, the last
        weights are the best.
        """
        session = self.session
        better = summary.ap50 is not None and summary.ap50 > session.best_ap50
        if better:
            session.best_ap50 = summary.ap50
        never_scored = session.best_ap50 < 0 and session.progress >= 1
        if self.writes and (better or never_scored):
            self._write_best(summary)
        session.history.append(asdict(summary))
        session.epoch += 1
        session.begin_epoch()
        self._write_history()
        self.save()
        if self.keep and self.writes:
            self._keep_last()

    def _write_best(self, summary: EpochSummary) -> None:
        """Write the averaged weights as the best so far."""
        best = {"model": self.session.average.model.state_dict(), "epoch": summary.epoch}
        with disk_errors(self.run_dir):
            write_checkpoint(
                self.run_dir / BEST_NAME, self._about() | best | {"ap50": summary.ap50}
            )

    def _keep_last(self) -> None:
        """Keep this epoch's state under its number, and no more than asked for."""
        kept = self.run_dir / f"epoch_{self.session.epoch:03d}.pt"
        kept.unlink(missing_ok=True)
        try:
            os.link(self.run_dir / STATE_NAME, kept)
        except OSError:  # a file system without links
            with disk_errors(self.run_dir):
                shutil.copy2(self.run_dir / STATE_NAME, kept)
        found = sorted(self.run_dir.glob("epoch_*.pt"), key=lambda path: (len(path.name), path))
        for old in found[: -self.keep]:
            old.unlink()

    def interrupted(self, signum: int) -> TrainingInterrupted:
        """Return the exception that tells where training stopped."""
        return TrainingInterrupted(
            f"stopped by {signal.Signals(signum).name} in epoch {self.session.epoch + 1} after "
            f"batch {self.session.batch}; the state is saved in {self.run_dir}: run again to go on",
            signum,
        )


def _network(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a spec without the place of its first weights, which a checkpoint replaces."""
    arguments = {key: value for key, value in spec["arguments"].items() if key != "weights"}
    return spec | {"arguments": arguments}

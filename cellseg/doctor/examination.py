"""The examination: the machine first, then the probes, in children that may crash or hang."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from cellseg.doctor.findings import Finding
from cellseg.doctor.machine import examine_machine
from cellseg.doctor.probes import PROBES, Settings

SECONDS = 50.0  # for all probes together
PROBE_SECONDS = 40.0  # for one of them: the first import of torch from a cold disk takes long
POLL_SECONDS = 0.05
LONGEST = 200  # characters of what a child said last
CHILD = (
    "import json, sys; from cellseg.doctor.probes import Settings, do_probes; "
    "do_probes(sys.argv[1], sys.argv[3:], Settings(**json.loads(sys.argv[2])))"
)


def examine(
    project_dir: str | Path = ".",
    *,
    runs_dir: str | Path = "runs",
    predictions_dir: str | Path = "predictions",
    device: str = "auto",
    seconds: float = SECONDS,
) -> Iterator[Finding]:
    """Yield what is found of machine, libraries, data and device, each as soon as it is known.

    Nothing is changed, unpacked or downloaded.

    Args:
        project_dir: where the release is looked for.
        runs_dir: folder of all runs; it need not exist.
        predictions_dir: folder of result files; it need not exist.
        device: as for training: auto, cuda, mps or cpu.
        seconds: that all probes together may take; those left then are named.
    """
    yield from examine_machine(Path(runs_dir), Path(predictions_dir))
    yield from run_probes(list(PROBES), Settings(str(project_dir), device), seconds=seconds)


def run_probes(
    names: Sequence[str],
    settings: Settings,
    *,
    seconds: float,
    probe_seconds: float = PROBE_SECONDS,
) -> Iterator[Finding]:
    """Yield the findings of probes; one that takes its process down or hangs is a finding too."""
    deadline = time.monotonic() + seconds
    left = list(names)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number in count():
            child = _Child(Path(folder) / str(number), left, settings)
            for message in child.messages(deadline, probe_seconds):
                if "ended" in message:
                    left.remove(message["ended"])
                else:
                    yield Finding(**message)
            if left:
                yield _lost(left.pop(0), child.fate)
            if time.monotonic() >= deadline:
                yield from (_lost(name, "not looked at: the time was up") for name in left)
                return
            if not left:
                return


def _lost(name: str, fate: str) -> Finding:
    """Return the finding on a probe that did not come to its end."""
    return Finding(name, fate, PROBES[name].remedy, PROBES[name].essential)


class _Child:
    """A process that does probes and writes to a file what it finds."""

    def __init__(self, path: Path, names: Sequence[str], settings: Settings) -> None:
        """Start it; `path` and what is beside it with a suffix hold its words."""
        self._findings, self._errors = path.with_suffix(".findings"), path.with_suffix(".errors")
        self._findings.touch()
        told = [str(self._findings), json.dumps(asdict(settings)), *names]
        self._late = 0.0
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CHILD, *told],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            )  # fmt: skip

    def messages(self, deadline: float, probe_seconds: float) -> Iterator[dict[str, Any]]:
        """Yield what it writes until it ends, or is ended for taking too long."""
        seen, since = 0, time.monotonic()
        try:
            while True:
                ended = self._process.poll() is not None  # before reading, so that all is read
                lines = self._findings.read_text(encoding="utf-8").split("\n")[:-1]
                for line in lines[seen:]:
                    yield json.loads(line)
                now = time.monotonic()
                since = now if len(lines) > seen else since
                seen = len(lines)
                if ended:
                    return
                if now > min(since + probe_seconds, deadline):
                    self._late = now - since
                    return
                time.sleep(POLL_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()

    @property
    def fate(self) -> str:
        """Say how it came to its end."""
        if self._late:
            return f"did not end within {self._late:.0f} s"
        code = self._process.returncode
        known = {int(entry): entry.name for entry in signal.Signals}
        how = known.get(-code, f"exit code {code}")
        said = self._errors.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return f"took its process down ({how}{': ' if last else ''}{last[:LONGEST]})"

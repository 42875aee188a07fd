"""How far a piece of work raises the memory of its process, each in a process of its own."""

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import torch

from cellseg.training.epoch_scores import peak_memory_mb

PRELOADED = ["benchmarks.end_to_end", "benchmarks.growth", "benchmarks.stages_files"]
IS_LINUX = sys.platform.startswith("linux")


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a module's function returns when it runs in a new process.

    Where there is a fork server the process starts with all modules loaded and nothing else.
    """
    if "forkserver" in get_all_start_methods():
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
    else:
        context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def added_peak_mb(work: Callable[[], Any]) -> float:
    """Return by how much memory rises while `work` runs, in MB; see `with_peak`."""
    return with_peak(work)[1]


def with_peak(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns, and the peak of resident memory above its start, in MB.

    Memory that was freed before is handed back first, so that it is not used again unseen. Where
    the system cannot forget an earlier peak (elsewhere than on Linux), what lies below that peak
    is not seen.
    """
    gc.collect()
    before = _start_anew() if IS_LINUX else _peak_mb()
    result = work()
    after = _status_mb("VmHWM") if IS_LINUX else _peak_mb()
    return result, after - before


def _start_anew() -> float:
    """Give freed memory back, forget the peak, and return the memory in use, in MB."""
    with suppress(AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    """Return a line of this process's status on Linux, in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{name}:\s+(\d+)", status, re.M).group(1)) / 2**10


def _peak_mb() -> float:
    """Return the peak of this process's resident memory, in MB; 0 where the system hides it."""
    return peak_memory_mb(torch.device("cpu")) or 0.0

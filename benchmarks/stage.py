"""A row of the bench: two ways to do the same, and what our way must reach."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.memory import with_peak

OURS_PER_REFERENCE = 3  # runs of ours for each run of the reference
Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One row of the table: two ways to do the same.

    Attributes:
        name: of the row.
        floor: least reference time over our time; None if there is no limit.
        make: () -> input of both sides.
        reference, ours: input -> result; neither changes the input.
        equal: (reference's result, our result) -> whether they are the same.
        runs: how often the reference is timed.
        memory_floor: least reference memory over our memory; None if there is no limit.
        memory_limit_mb: our memory stays below it; None if there is no limit.
        reference_mb: the reference's memory where it is computed and not measured.
        note: what a reader of the table has to know.
    """

    name: str
    floor: float | None
    make: Callable[[], Any]
    reference: Callable[[Any], Any]
    ours: Callable[[Any], Any]
    equal: Callable[[Any, Any], bool]
    runs: int = 3
    memory_floor: float | None = None
    memory_limit_mb: float | None = None
    reference_mb: float | None = None
    note: str = ""


def measure_times(stage: Stage, *, quick: bool = False) -> Result:
    """Return median seconds of both sides, their ratio, equality, and the reference's memory.

    The sides run by turns in this process on the same input. The memory is that of the
    reference's first run; for it to be true this process must be new.

    Args:
        stage: the row.
        quick: run the reference once.
    """
    data = stage.make()
    reference, ours = partial(stage.reference, data), partial(stage.ours, data)
    reference_seconds: list[float] = []
    our_seconds: list[float] = []
    result, peak = with_peak(partial(timed, reference, reference_seconds))
    equal = bool(stage.equal(result, timed(ours, our_seconds)))
    del result
    for turn in range(1 if quick else stage.runs):
        if turn > 0:
            timed(reference, reference_seconds)
        for _ in range(OURS_PER_REFERENCE):
            timed(ours, our_seconds)
    reference_s, ours_s = float(np.median(reference_seconds)), float(np.median(our_seconds))
    return {
        "reference_s": reference_s,
        "ours_s": ours_s,
        "ratio": reference_s / ours_s,
        "reference_mb": peak if stage.reference_mb is None else stage.reference_mb,
        "equal": equal,
    }


def find_misses(stage: Stage, result: Result) -> list[str]:
    """Return what a result misses of what its row must reach, one phrase each."""
    misses = []
    if not result["equal"]:
        misses.append("the results differ")
    if stage.floor is not None and result["ratio"] < stage.floor:
        misses.append(f"{result['ratio']:.3g} times as fast, {stage.floor:g} wanted")
    ours_mb, reference_mb = result["ours_mb"], result["reference_mb"]
    if stage.memory_limit_mb is not None and ours_mb >= stage.memory_limit_mb:
        misses.append(f"{ours_mb:.0f} MB, less than {stage.memory_limit_mb:g} wanted")
    if stage.memory_floor is not None and reference_mb < stage.memory_floor * ours_mb:
        part = reference_mb / ours_mb
        misses.append(f"1/{part:.3g} of the reference's memory, 1/{stage.memory_floor:g} wanted")
    return misses


def timed(work: Callable[[], Any], seconds: list[float]) -> Any:
    """Return what `work` returns and note how long it took."""
    start = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - start)
    return result


def median_seconds(work: Callable[[], Any], runs: int) -> float:
    """Return the median time of some runs."""
    seconds: list[float] = []
    for _ in range(runs):
        timed(work, seconds)
    return float(np.median(seconds))

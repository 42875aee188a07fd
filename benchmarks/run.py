"""`make bench`: measure every row and every whole step, compare results, write the tables.

    python -m benchmarks.run [--only NAME,NAME] [--quick]

writes results.md, results.json (the rows) and steps.json (whole steps) beside this file. What is
not measured in a call stays as it was, with its date. Ends with 1 if anything misses what it must
reach, or results differ.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

from benchmarks import stages_data, stages_files, stages_model, stages_records
from benchmarks.end_to_end import end_to_end
from benchmarks.growth import growth
from benchmarks.memory import added_peak_mb, run_alone
from benchmarks.section import Section, markdown_table, seconds_text
from benchmarks.stage import Result, Stage, find_misses, measure_times
from benchmarks.whole_steps import prediction_step, training_step
from cellseg.files import read_json, write_atomically

EVERY_STAGE = (
    *stages_data.STAGES, *stages_files.STAGES, *stages_model.STAGES, *stages_records.STAGES
)  # fmt: skip
STAGES: dict[str, Stage] = {stage.name: stage for stage in EVERY_STAGE}
assert len(STAGES) == len(EVERY_STAGE), "two rows have the same name"
STEPS: dict[str, Callable[..., list[Section]]] = {
    function.__name__: function for function in (training_step, prediction_step, growth, end_to_end)
}
FOLDER = Path(__file__).resolve().parent
PACKAGES = ("torch", "torchvision", "numpy", "pycocotools")
HEADER = (
    "row", "reference", "ours", "ratio", "floor", "reference MB", "ours MB", "equal", "reached",
    "measured",
)  # fmt: skip
INTRODUCTION = """\
# Benchmarks

Made by `make bench`; the code of both sides is in this folder. The reference is the libraries' own
functions called as their documentation does, and the usual way of reading. Times are medians of
several runs, both sides by turns in one process on the same input: ratios count, absolute times
depend on the machine. Memory is how far the peak of resident memory rises above what it was with
the input at hand, each side in a new process.
"""


def measure_row(name: str, *, quick: bool = False) -> Result:
    """Return a row of results.json: times, memory, equality, and what is missed."""
    stage = STAGES[name]
    times = run_alone(time_row, name, quick)
    result = times | {"ours_mb": run_alone(our_peak_mb, name), "floor": stage.floor}
    return result | {"measured": today(), "misses": find_misses(stage, result)}


def time_row(name: str, quick: bool) -> Result:
    """Return times of both sides of a row and the reference's memory; for a new process."""
    return measure_times(STAGES[name], quick=quick)


def our_peak_mb(name: str) -> float:
    """Return the memory that our side of a row adds; for a new process."""
    stage = STAGES[name]
    data = stage.make()
    return added_peak_mb(lambda: stage.ours(data))


def measure_step(name: str, *, quick: bool = False) -> list[dict[str, Any]]:
    """Return the tables of a whole step as plain data."""
    return [asdict(section) | {"measured": today()} for section in STEPS[name](quick=quick)]


def today() -> str:
    """Return the date, UTC."""
    return datetime.now(UTC).date().isoformat()


def machine() -> str:
    """Return the machine and the versions in words."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{os.cpu_count()} cores ({platform.machine()}, {platform.system()}), Python "
        f"{platform.python_version()}, {versions}"
    )


def write_results(
    rows: Mapping[str, Result], steps: Mapping[str, list[dict[str, Any]]], folder: Path = FOLDER
) -> None:
    """Write results.json, steps.json and results.md, each whole or not at all."""
    write_atomically(folder / "results.json", dumps(rows, indent=1) + "\n")
    write_atomically(folder / "steps.json", dumps(steps, indent=1) + "\n")
    parts = [INTRODUCTION, f"Machine: {machine()}.\n", "## Stages\n", row_table(rows)]
    notes = [f"- `{name}`: {STAGES[name].note}." for name in rows if STAGES[name].note]
    parts += [""] + ([*notes, ""] if notes else []) + missed_lines(rows)
    for sections in steps.values():
        for section in sections:
            table = markdown_table(section["header"], section["rows"])
            parts += [f"## {section['title']}\n", section["text"] + "\n", table, ""]
            parts += [f"Missed: {miss}." for miss in section["misses"]]
            parts += [f"Measured {section['measured']}.\n"]
    parts += ["![growth](../docs/growth.png)"] if "growth" in steps else []
    write_atomically(folder / "results.md", "\n".join(parts).rstrip() + "\n")


def row_table(rows: Mapping[str, Result]) -> str:
    """Return the table of rows."""
    return markdown_table(HEADER, [row_cells(name, result) for name, result in rows.items()])


def row_cells(name: str, result: Result) -> list[str]:
    """Return the cells of one row as text."""
    megabytes = [
        "" if value is None else f"{value:.1f}"
        for value in (result["reference_mb"], result["ours_mb"])
    ]
    return [
        f"`{name}`",
        seconds_text(result["reference_s"]),
        seconds_text(result["ours_s"]),
        f"{result['ratio']:.3g}",
        "" if result["floor"] is None else f"{result['floor']:g}",
        *megabytes,
        "yes" if result["equal"] else "**no**",
        "**no**" if result["misses"] else "yes",
        result["measured"],
    ]


def missed_lines(rows: Mapping[str, Result]) -> list[str]:
    """Return a line for each row that misses something."""
    return [
        f"Missed: `{name}`: {'; '.join(result['misses'])}.\n"
        for name, result in rows.items()
        if result["misses"]
    ]


def read_earlier(path: Path) -> dict[str, Any]:
    """Return what an earlier call wrote, nothing if there is no such file."""
    return read_json(path) if path.exists() else {}


def pick_names(text: str | None) -> list[str]:
    """Return the names in a list with commas, in the order in which all are measured.

    Raises:
        ValueError: if a name is unknown.
    """
    names = [*STAGES, *STEPS]
    chosen = names if text is None else text.split(",")
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)}; there are {', '.join(names)}")
    return [name for name in names if name in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of rows and steps, with commas between")
    parser.add_argument("--quick", action="store_true", help="fewer runs and smaller steps")
    options = parser.parse_args(arguments)
    try:
        names = pick_names(options.only)
    except ValueError as error:
        parser.error(str(error))
    rows, steps = read_earlier(FOLDER / "results.json"), read_earlier(FOLDER / "steps.json")
    missed = False
    for name in names:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        if name in STAGES:
            rows[name] = measure_row(name, quick=options.quick)
            print("  " + " | ".join(row_cells(name, rows[name])[1:-1]))
            misses = rows[name]["misses"]
        else:
            steps[name] = measure_step(name, quick=options.quick)
            for section in steps[name]:
                print(markdown_table(section["header"], section["rows"]))
            misses = [miss for section in steps[name] for miss in section["misses"]]
        for miss in misses:
            print(f"  MISSED: {miss}")
        print(f"  {time.perf_counter() - start:.0f} s")
        missed |= bool(misses)
        write_results(
            {key: rows[key] for key in STAGES if key in rows},
            {key: steps[key] for key in STEPS if key in steps},
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

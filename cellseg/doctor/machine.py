"""Python, memory, disk and permissions: asked of the system, without any library."""

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cellseg.doctor.findings import Finding

PYTHONS = ((3, 11), (3, 13))  # the first and the last that the tests run with
GB = 1e9
LEAST_MEMORY = 4 * GB  # training on crops takes 2 to 3
LEAST_DISK = 5 * GB  # the release, its cache, and checkpoints of some runs
NO_DISK = 0.5 * GB  # a checkpoint and its copy may not fit into less
LEAST_SHARED = 0.5 * GB  # two workers with batches of large crops; Docker gives 64 MB


def examine_machine(runs_dir: Path, predictions_dir: Path) -> Iterator[Finding]:
    """Yield the findings on the machine; the folders need not exist, and are not made."""
    yield python_finding(sys.version_info[:2])
    yield memory_finding(_free_memory())
    yield disk_finding(runs_dir, shutil.disk_usage(_nearest(runs_dir)).free)
    yield shared_finding(Path("/dev/shm"))
    yield permission_finding("runs", runs_dir)
    yield permission_finding("predictions", predictions_dir)


def python_finding(version: tuple[int, int]) -> Finding:
    """Judge the version of Python."""
    first, last = PYTHONS
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if first <= version <= last:
        return Finding("Python", found)
    remedy = f"install Python 3.{first[1]} to 3.{last[1]}"
    return Finding("Python", found, remedy, essential=version < first)


def memory_finding(free: int | None) -> Finding:
    """Judge the bytes of memory that are free."""
    if free is None:
        return Finding("memory", "not known on this system")
    enough = free >= LEAST_MEMORY
    remedy = "" if enough else "close other programs, or lower batch_size, crop_size and workers"
    return Finding("memory", f"{free / GB:.1f} GB free", remedy)


def disk_finding(folder: Path, free: int) -> Finding:
    """Judge the bytes that are free where runs are written."""
    remedy = "" if free >= LEAST_DISK else "make room, or choose another runs_dir"
    found = f"{free / GB:.1f} GB free for {folder}"
    return Finding("disk", found, remedy, essential=free < NO_DISK)


def shared_finding(folder: Path) -> Finding:
    """Judge the shared memory through which workers hand over batches; Linux alone has such."""
    if not folder.is_dir():
        return Finding("shared memory", "of no concern on this system")
    size = shutil.disk_usage(folder).total
    remedy = "start the container with --shm-size=2g, or train with workers = 0"
    return Finding(
        "shared memory", f"{size / GB:.2f} GB in {folder}", remedy if size < LEAST_SHARED else ""
    )


def permission_finding(name: str, folder: Path) -> Finding:
    """Try whether a folder, or the one that it will be made in, can be written to."""
    place = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding(f"writing {name}", f"{folder} can be written")
    except OSError as error:
        found = f"{place} cannot be written ({error.strerror})"
        remedy = f"give yourself permission there, or choose another {name}_dir"
        return Finding(f"writing {name}", found, remedy, essential=True)


def _nearest(folder: Path) -> Path:
    """Return a path, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def _free_memory() -> int | None:
    """Return the bytes of memory that are free, a container's limit counted; None if unknown."""
    known = [amount for amount in (_free_in_system(), free_in_container()) if amount is not None]
    return min(known, default=None)


def _free_in_system() -> int | None:
    """Return the bytes that are free (Linux), or all that there are (macOS)."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(re.search(r"^MemAvailable:\s*(\d+) kB", text, re.M).group(1)) * 1024
    except (OSError, AttributeError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # Windows has no sysconf
        return None


def free_in_container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that a container's limit leaves, None without one (Linux, cgroup v2).

    What it holds of files is given back on demand, and counts as free.
    """
    try:
        limit, used = (int((root / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = re.search(r"^inactive_file (\d+)", (root / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # "max" stands for no limit
        return None
    return max(limit - used + int(files.group(1) if files else 0), 0)

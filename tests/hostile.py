"""Hostile and broken content, drawn: files must give one of our errors that names them.

Every run tries the same cases; `make fuzz` tries CELLSEG_FUZZ times as many, new ones each time.
"""

import copy
import itertools
import os
import struct
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cellseg.coco import make_record, mask_to_rle

# Of zipfile about names that come twice, of torch about pickles: both are what is tried here.
FUZZ = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
SCALE = int(os.environ.get("CELLSEG_FUZZ", "1"))
NUMBERS = [0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def cases(count: int) -> Callable:
    """Return the settings of a test of so many cases, times CELLSEG_FUZZ."""
    return settings(
        max_examples=count * SCALE,
        deadline=None,
        derandomize=SCALE == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def mutated(draw, originals: list[bytes]) -> bytes:
    """Draw one of some files, damaged in one to four places."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["bit", "bytes", "number", "cut", "drop", "repeat"]))
        if kind == "bit" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            data[place : place + 4] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "number":
            order = draw(st.sampled_from(["<I", ">I", "<H", ">H"]))
            number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * struct.calcsize(order))
            piece = struct.pack(order, number)
            data[place : place + len(piece)] = piece
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + draw(st.integers(1, 40))]
        else:
            data[place:place] = data[place : place + draw(st.integers(1, 600))]
    return bytes(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 2**53, 1e308, "<img src=x>", "..", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)  # fmt: skip


@st.composite
def spoilt(draw, original: object) -> object:
    """Draw a tree of plain values in which one to three values, at any depth, are others."""
    tree = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        node, depth = tree, draw(st.integers(1, 4))
        for level in range(depth):
            if not isinstance(node, dict | list) or not node:
                break
            key = draw(st.sampled_from(list(node if isinstance(node, dict) else range(len(node)))))
            if level == depth - 1 or not isinstance(node[key], dict | list):
                node[key] = draw(JSON)
                break
            node = node[key]
    return tree


numbers = itertools.count()


def survives(folder: Path, suffix: str, data: bytes, read: Callable, *kinds: type) -> None:
    """Read a file: it works, or raises one of these errors, naming the file; nothing is written."""
    path = folder / f"case{next(numbers)}{suffix}"
    path.write_bytes(data)
    try:
        read(path)
    except kinds as error:
        assert path.name in str(error), error
    finally:
        assert [entry.name for entry in folder.iterdir()] == [path.name]
        path.unlink()


@contextmanager
def bounded(seconds: float = 10, megabytes: float = 300):
    """Fail if a block takes long, or more memory than the process ever had."""
    resource = pytest.importorskip("resource")
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert time.monotonic() - start < seconds and grown < megabytes


def make_mask(x: int) -> dict:
    mask = np.zeros((9, 14), bool)
    mask[2:6, x : x + 4] = True
    return mask_to_rle(mask)


RECORDS = [make_record(1, 1, 0.5, make_mask(2)), make_record(2, 3, 0.25, make_mask(7))]

"""Run-length strings against counts worked out by hand and against pycocotools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_utils

from cellseg.rle import decode_counts, encode_counts, index_within

CASES = [
    ("a pixel of four: one count before, one in, two after", [1, 1, 2], "112"),
    ("the fourth count is the difference to the second", [5, 3, 5, 3], "5350"),
    ("a difference below zero carries its sign", [5, 3, 5, 2], "535O"),
    ("15 is the largest number of one group", [15, 1], "?1"),
    ("16 needs a second group for its sign", [16, 1], "`01"),
    ("a full mask starts with no background", [0, 6], "06"),
    ("an empty mask is one run", [6], "6"),
    ("no runs at all", [], ""),
]


def _pycocotools_string(mask: np.ndarray) -> str:
    return mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def _runs(mask: np.ndarray) -> list[int]:
    pixels = mask.reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(pixels.astype(np.int8), prepend=0)).tolist()
    return np.diff([0, *edges, pixels.size]).tolist()


@pytest.mark.parametrize(("reason", "counts", "string"), CASES, ids=[c[0] for c in CASES])
def test_one_mask_by_hand(reason, counts, string):
    assert encode_counts(np.array(counts, dtype=int), np.array([0, len(counts)])) == [string]
    decoded, offsets = decode_counts([string])
    assert decoded.tolist() == counts
    assert offsets.tolist() == [0, len(counts)]


def test_all_masks_at_once_give_the_same_as_one_by_one():
    counts, offsets = decode_counts([string for _, _, string in CASES])
    for (_, expected, _), start, end in zip(CASES, offsets[:-1], offsets[1:], strict=True):
        assert counts[start:end].tolist() == expected
    assert encode_counts(counts, offsets) == [string for _, _, string in CASES]


@pytest.mark.parametrize(
    ("lengths", "places"), [([2, 0, 3], [0, 1, 0, 1, 2]), ([0, 0, 1, 0], [0]), ([0], []), ([], [])]
)
def test_index_within_counts_each_group_from_nothing(lengths, places):
    assert index_within(np.array(lengths, dtype=np.int64)).tolist() == places


def test_no_masks():
    counts, offsets = decode_counts([])
    assert counts.tolist() == []
    assert offsets.tolist() == [0]
    assert encode_counts(counts, offsets) == []


@pytest.mark.parametrize(
    ("reason", "string"),
    [
        ("a character below the format's", "1/2"),
        ("a character above the format's", "1p2"),
        ("a letter outside ASCII", "1é2"),
        ("cut off within a number", "11`"),
        ("a number of eight groups", "1PPPPPPP0"),
        ("a first count below zero", "O1"),
    ],
)
def test_a_faulty_string_decodes_to_minus_one_and_spoils_no_other(reason, string):
    counts, offsets = decode_counts(["112", string, "5350"])
    assert counts[: offsets[1]].tolist() == [1, 1, 2]
    assert counts[offsets[1]] == -1
    assert counts[offsets[2] :].tolist() == [5, 3, 5, 3]


def test_a_difference_that_leads_below_zero_is_seen_as_a_negative_count():
    counts, _ = decode_counts(["111J"])  # J is -6: the fourth count would be 1 - 6
    assert counts.tolist() == [1, 1, 1, -5]


def test_numbers_of_every_width():
    counts = np.array([1, 15, 16, 511, 512, 16383, 16384, 1 << 20, 3, (1 << 31) - 1, 2, 0])
    offsets = np.array([0, 5, 12])
    decoded, decoded_offsets = decode_counts(encode_counts(counts, offsets))
    assert decoded.tolist() == counts.tolist()
    assert decoded_offsets.tolist() == offsets.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)), max_size=5)
)
def test_agrees_with_pycocotools_byte_for_byte(masks):
    strings = [_pycocotools_string(mask) for mask in masks]
    counts, offsets = decode_counts(strings)
    for mask, start, end in zip(masks, offsets[:-1], offsets[1:], strict=True):
        assert counts[start:end].tolist() == _runs(mask)
    assert encode_counts(counts, offsets) == strings

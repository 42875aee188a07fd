"""COCO's run-length strings <-> arrays of run lengths, many masks at a time.

A mask is scanned down its columns; `counts` are the lengths of its runs, background first. The
string stores each count as groups of five bits, lowest first, the sixth bit saying that another
group follows and the highest bit of the last group being the sign. From the fourth count on the
difference to the count two places back is stored. Both directions cost a few passes over the
characters, whatever the number of masks.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# Seven groups hold any difference of two counts below 2**34; longer numbers are a fault.
_MAX_GROUPS = 7
_FOREIGN = "~"  # a character that the format does not use
_MINUS_ONE = "O"  # a mask of the single count -1


def decode_counts(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the run lengths of many masks.

    Args:
        strings: `counts` of N masks in COCO's compressed form.

    Returns:
        counts: int64, the run lengths of all masks one after the other.
        offsets: int64 [N + 1]; mask n has `counts[offsets[n]:offsets[n + 1]]`.
        A string outside the format (a foreign character, cut off within a number, a number of
        more than 35 bits) decodes to the single count -1; one whose differences lead below zero
        holds a negative count. So "no count is negative" is the test of validity.
    """
    codes, string_ends = _codes(strings)
    last_of_number = (codes & 32) == 0
    number_ends = np.flatnonzero(last_of_number) + 1
    groups = np.diff(number_ends, prepend=0)
    foreign = np.flatnonzero((codes < 0) | (codes > 63))
    long_ends = number_ends[groups > _MAX_GROUPS]
    long_starts = long_ends - groups[groups > _MAX_GROUPS]
    owner_of_end = np.searchsorted(string_ends, long_ends - 1, side="right")
    # A string cut off within a number seems to go on in the next one, which is not at fault.
    within = np.searchsorted(string_ends, long_starts, side="right") == owner_of_end
    invalid = np.zeros(len(strings), dtype=bool)
    invalid[np.searchsorted(string_ends, foreign, side="right")] = True
    invalid[owner_of_end[within]] = True
    nonempty = np.diff(string_ends, prepend=0) > 0
    invalid[nonempty] |= ~last_of_number[string_ends[nonempty] - 1]
    if invalid.any():
        valid = [_MINUS_ONE if bad else text for text, bad in zip(strings, invalid, strict=True)]
        return decode_counts(valid)
    offsets = np.concatenate([[0], np.searchsorted(number_ends, string_ends, side="right")])
    return _undo_differences(_numbers(codes, number_ends, groups), offsets), offsets


def encode_counts(counts: np.ndarray, offsets: np.ndarray) -> list[str]:
    """Return the compressed strings of many masks, byte for byte as pycocotools writes them.

    Args:
        counts: integers >= 0, the run lengths of all masks one after the other.
        offsets: [N + 1]; mask n has `counts[offsets[n]:offsets[n + 1]]`.

    Returns:
        list of N strings.
    """
    counts = np.asarray(counts, dtype=np.int64)
    offsets = np.asarray(offsets, dtype=np.int64)
    numbers = counts.copy()
    differs = index_within(np.diff(offsets)) > 2
    numbers[differs] -= counts[np.flatnonzero(differs) - 2]
    magnitude = np.where(numbers < 0, ~numbers, numbers)
    limits = 1 << (5 * np.arange(1, _MAX_GROUPS) - 1)
    groups = 1 + np.searchsorted(limits, magnitude, side="right")
    ends = np.concatenate([[0], np.cumsum(groups)])
    codes = np.empty(ends[-1], dtype=np.uint8)
    for k in range(groups.max(initial=0)):
        chosen = np.flatnonzero(groups > k)
        more = (groups[chosen] > k + 1) * 32
        codes[ends[chosen] + k] = ((numbers[chosen] >> (5 * k)) & 31) + more + 48
    text = codes.tobytes().decode("ascii")
    edges = ends[offsets].tolist()
    return [text[start:end] for start, end in pairwise(edges)]


def index_within(lengths: np.ndarray) -> np.ndarray:
    """Return for each element of groups that lie one after the other its place in its own, from 0.

    Args:
        lengths: integers >= 0 [N], the elements of each group.

    Returns:
        int64 [sum of lengths]; groups of 2, 0 and 3 give 0, 1, 0, 1, 2.
    """
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _codes(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters less 48 as int16, and where each string ends among them."""
    text = "".join(strings)
    if not text.isascii():
        strings = [string if string.isascii() else _FOREIGN for string in strings]
        text = "".join(strings)
    lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int16) - 48
    return codes, np.cumsum(lengths)


def _numbers(codes: np.ndarray, ends: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Put the five-bit groups of each number together, sign included."""
    starts = ends - groups
    numbers = np.zeros(len(ends), dtype=np.int64)
    for k in range(groups.max(initial=0)):
        chosen = np.flatnonzero(groups > k) if k else slice(None)
        numbers[chosen] |= (codes[starts[chosen] + k] & 31).astype(np.int64) << (5 * k)
    negative = (codes[ends - 1] & 16) > 0
    numbers[negative] -= np.int64(1) << (5 * groups[negative])
    return numbers


def _undo_differences(numbers: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Turn differences to the count two places back into counts, mask by mask."""
    sizes = np.diff(offsets)
    index = index_within(sizes)
    pair_starts = np.concatenate([[0], np.cumsum((sizes + 1) // 2)])
    slots = np.repeat(2 * pair_starts[:-1], sizes) + index
    pairs = np.zeros((pair_starts[-1], 2), dtype=np.int64)
    # The first count starts no chain: the third is stored as it is.
    pairs.reshape(-1)[slots] = np.where(index == 0, 0, numbers)
    sums = np.concatenate([np.zeros((1, 2), dtype=np.int64), np.cumsum(pairs, axis=0)])
    sums[1:] -= np.repeat(sums[pair_starts[:-1]], np.diff(pair_starts), axis=0)
    return np.where(index == 0, numbers, sums[1:].reshape(-1)[slots])

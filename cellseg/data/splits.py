"""Training and validation samples, or folds: alike in classes, never sharing a group."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from cellseg.errors import SettingsError, check_at_least
from cellseg.markdown import first_few


def split_ids(
    class_counts: Mapping[str, Sequence[int]],
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    groups: Mapping[str, Hashable] | None = None,
    val_ids: Iterable[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Divide samples into training and validation; the same input gives the same split.

    Groups are dealt out class by class, the rarest class first and its richest groups first
    (groups within a factor of two in random order). Each goes where it brings validation closer
    to `val_fraction` of the cells of every class and of the samples dealt so far. The last group
    that holds a class goes to the side that has none of it, so that a class which two groups hold
    is on both sides where the order allows.

    Args:
        class_counts: sample_id -> number of cells of each class 1..C.
        val_fraction: wanted share of validation, between 0 and 1.
        seed: of the random order, 0 or more.
        groups: sample_id -> group (patient, slide, tile); samples of a group stay together. None
            lets each sample stand alone.
        val_ids: take exactly these for validation; `val_fraction` and `seed` then do nothing.

    Returns:
        `(train_ids, val_ids)`, each sorted and not empty.

    Raises:
        SettingsError: if `val_fraction` is not between 0 and 1, `seed` is below 0, `groups` lacks
            a sample, `val_ids` holds an unknown id or splits a group, or one side would be empty.
    """
    _check_groups(class_counts, groups)
    if val_ids is None:
        if not 0 < val_fraction < 1:
            raise SettingsError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
        check_at_least(0, seed=seed)
        chosen = _deal(class_counts, val_fraction, seed, groups)
    else:
        chosen = _check_val_ids(set(val_ids), class_counts, groups)
    return sorted(set(class_counts) - chosen), sorted(chosen)


def make_folds(
    class_counts: Mapping[str, Sequence[int]],
    groups: Mapping[str, Hashable] | None,
    *,
    folds: int = 5,
    seed: int = 0,
) -> list[tuple[list[str], list[str]]]:
    """Divide samples into folds that hold each of them out once; the same input, the same folds.

    Groups are dealt out as in `split_ids`, the rarest class first. Each goes to the fold that has
    the least of what it holds, all classes and the samples being counted in shares of the whole,
    so that what is rare weighs as much as what is common.

    Args:
        class_counts: sample_id -> number of cells of each class 1..C.
        groups: sample_id -> group; samples of a group stay together. None lets each sample stand
            alone.
        folds: how many, 2 or more.
        seed: of the order among groups that hold alike, 0 or more.

    Returns:
        `(train_ids, val_ids)` of each fold, sorted and not empty.

    Raises:
        SettingsError: if `folds` is less than 2 or more than there are groups, `seed` is below 0,
            or `groups` lacks a sample.
    """
    check_at_least(0, seed=seed)
    _check_groups(class_counts, groups)
    units, counts = _count_units(class_counts, groups)
    if not 2 <= folds <= len(units):
        raise SettingsError(
            f"folds is {folds} for {len(class_counts)} samples in {len(units)} groups; it must be "
            "at least 2 and no more than there are groups"
        )
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    dealt = np.zeros((folds, counts.shape[1]))
    held: list[list[str]] = [[] for _ in range(folds)]
    for _, holders in _dealing_order(counts, np.random.default_rng(seed)):
        for unit in holders:
            fold = int(np.argmin(dealt @ shares[unit]))
            dealt[fold] += shares[unit]
            held[fold] += units[unit]
    return [(sorted(set(class_counts) - set(val_ids)), sorted(val_ids)) for val_ids in held]


def _check_groups(
    class_counts: Mapping[str, Sequence[int]], groups: Mapping[str, Hashable] | None
) -> None:
    """Raise SettingsError if a sample has no group."""
    if groups is not None and (missing := sorted(set(class_counts) - set(groups))):
        raise SettingsError(f"groups lacks {_names(missing)}; give every sample a group")


def _check_val_ids(
    val_ids: set[str], known: Iterable[str], groups: Mapping[str, Hashable] | None
) -> set[str]:
    """Return `val_ids` if they are a proper part of the known ids that splits no group."""
    known = set(known)
    if unknown := sorted(val_ids - known):
        raise SettingsError(f"val_ids holds unknown samples: {_names(unknown)}; correct the ids")
    if not val_ids or val_ids == known:
        raise SettingsError(
            f"val_ids names {len(val_ids)} of {len(known)} samples; leave at least one on each side"
        )
    if groups is not None:
        train_groups = {groups[sample_id] for sample_id in known - val_ids}
        for sample_id in sorted(val_ids):
            if groups[sample_id] in train_groups:
                raise SettingsError(
                    f"val_ids splits the group {groups[sample_id]!r} of sample {sample_id!r}; name "
                    "all samples of a group or none"
                )
    return val_ids


def _deal(
    class_counts: Mapping[str, Sequence[int]],
    val_fraction: float,
    seed: int,
    groups: Mapping[str, Hashable] | None,
) -> set[str]:
    """Return the validation samples that the greedy deal gives."""
    units, counts = _count_units(class_counts, groups)
    if len(units) < 2:
        raise SettingsError(
            f"{len(class_counts)} samples in {len(units)} groups cannot be split; two groups "
            "are needed"
        )
    in_val = _assign(counts, val_fraction, np.random.default_rng(seed))
    return {sample_id for unit, val in zip(units, in_val, strict=True) if val for sample_id in unit}


def _count_units(
    class_counts: Mapping[str, Sequence[int]], groups: Mapping[str, Hashable] | None
) -> tuple[list[list[str]], np.ndarray]:
    """Return the samples of each group, and int64 [groups, C + 1]: its cells, and its samples."""
    members: dict[Hashable, list[str]] = {}
    for sample_id in sorted(class_counts):
        group = sample_id if groups is None else groups[sample_id]
        members.setdefault(group, []).append(sample_id)
    units = list(members.values())
    counts = [np.sum([[*class_counts[i], 1] for i in unit], axis=0) for unit in units]
    return units, np.array(counts, dtype=np.int64)


def _dealing_order(counts: np.ndarray, rng: np.random.Generator) -> list[tuple[int, list[int]]]:
    """Return each column of counts with the groups to deal out for it, every group once.

    The rarest class comes first, the samples last, and of a column's holders that are left the
    richest; groups within a factor of two count as equally rich and come in random order.
    """
    order, left = rng.permutation(len(counts)), np.full(len(counts), True)
    columns = []
    for column in [*np.argsort(counts[:, :-1].sum(axis=0), kind="stable"), -1]:
        holders = [unit for unit in order if left[unit] and counts[unit, column]]
        holders.sort(key=lambda unit: -int(counts[unit, column]).bit_length())
        left[holders] = False
        columns.append((column, holders))
    return columns


def _assign(counts: np.ndarray, val_fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Return bool [units]: which units go to validation, at least one and not all.

    Args:
        counts: int64 [units, C + 1], cells of each class and, last, samples.
        val_fraction: wanted share.
        rng: of the order among units that hold alike.
    """
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    dealt = np.zeros((2, counts.shape[1]))  # shares in training (0) and in validation (1)
    side = np.full(len(counts), -1)
    for column, holders in _dealing_order(counts, rng):
        for unit in holders:
            in_train, in_val = dealt[:, column] > 0
            if unit == holders[-1] and in_train != in_val:
                side[unit] = in_train
            else:
                owed = val_fraction * (dealt.sum(axis=0) + shares[unit]) - dealt[1]
                side[unit] = np.square(owed - shares[unit]).sum() < np.square(owed).sum()
            dealt[side[unit]] += shares[unit]
    if side.all() or not side.any():
        side[np.argmin(shares.sum(axis=1))] ^= 1
    return side == 1


def _names(ids: Sequence[str]) -> str:
    """Return the first ten ids for a message."""
    return first_few([repr(name) for name in ids], 10)

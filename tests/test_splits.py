"""The split and the folds: the same twice, alike in classes, no group on both sides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellseg.data.splits import make_folds, split_ids
from cellseg.errors import SettingsError

COUNTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.tuples(st.integers(0, 30), st.integers(0, 5)),
    min_size=2,
    max_size=20,
)


def _many(number=100, seed=0):
    """Return counts like a release's: two common classes, one rare, one in a tenth of images."""
    rng = np.random.default_rng(seed)
    rows = rng.poisson([70, 75, 3, 3 * 9], (number, 4)) * rng.random((number, 4))
    rows[rng.random(number) > 0.1, 3] = 0
    return {f"s{n:03}": row.astype(int).tolist() for n, row in enumerate(rows)}


def test_same_input_same_split_whatever_the_order_of_samples():
    counts = _many()
    shuffled = dict(sorted(counts.items(), key=lambda item: sum(item[1])))
    assert split_ids(counts, seed=1) == split_ids(shuffled, seed=1)
    assert split_ids(counts, seed=1) != split_ids(counts, seed=2)


@pytest.mark.parametrize("val_fraction", [0.1, 0.2, 0.5])
def test_every_class_is_shared_out_in_proportion(val_fraction):
    counts = _many()
    train_ids, val_ids = split_ids(counts, val_fraction=val_fraction)
    assert train_ids == sorted(train_ids)
    assert val_ids == sorted(val_ids)
    assert set(train_ids) | set(val_ids) == set(counts)
    assert not set(train_ids) & set(val_ids)
    totals = np.sum(list(counts.values()), axis=0)
    shares = np.sum([counts[i] for i in val_ids], axis=0) / totals
    np.testing.assert_allclose(shares[:3], val_fraction, atol=0.03)
    np.testing.assert_allclose(shares[3], val_fraction, atol=0.08)  # only ten images hold it
    assert len(val_ids) == pytest.approx(100 * val_fraction, abs=4)


def test_a_class_that_two_samples_hold_is_on_both_sides():
    counts = {f"s{n}": [20, 0] for n in range(8)} | {"r1": [0, 3], "r2": [0, 3]}
    train_ids, val_ids = split_ids(counts)
    assert len({"r1", "r2"} & set(val_ids)) == 1
    assert len({"r1", "r2"} & set(train_ids)) == 1


def test_a_class_that_one_sample_holds_is_for_training():
    counts = {f"s{n}": [20, 0] for n in range(9)} | {"rare": [0, 3]}
    assert "rare" in split_ids(counts)[0]


def test_images_without_cells_are_shared_out_too():
    counts = {f"s{n}": [0, 0] for n in range(10)}
    assert [len(ids) for ids in split_ids(counts)] == [8, 2]


def test_groups_stay_together():
    counts = _many(60)
    groups = {sample_id: int(sample_id[1:]) % 12 for sample_id in counts}
    train_ids, val_ids = split_ids(counts, groups=groups)
    assert not {groups[i] for i in train_ids} & {groups[i] for i in val_ids}
    assert len(train_ids) + len(val_ids) == 60
    assert 5 <= len(val_ids) <= 20


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.sampled_from([0.01, 0.2, 0.7, 0.99]), st.integers(0, 3))
def test_each_sample_is_on_one_side_and_no_side_is_empty(counts, val_fraction, seed):
    train_ids, val_ids = split_ids(counts, val_fraction=val_fraction, seed=seed)
    assert sorted(train_ids + val_ids) == sorted(counts)
    assert train_ids
    assert val_ids


def test_explicit_val_ids():
    counts = {"a": [1], "b": [2], "c": [3]}
    assert split_ids(counts, val_ids=["c", "a"]) == (["b"], ["a", "c"])
    groups = {"a": 1, "b": 2, "c": 1}
    assert split_ids(counts, val_ids=["c", "a"], groups=groups) == (["b"], ["a", "c"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 0}, "val_fraction is 0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": float("nan")}, "val_fraction is nan"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"val_ids": ["a", "z", "y"]}, "unknown samples: 'y', 'z'"),
        ({"val_ids": []}, "names 0 of 3 samples"),
        ({"val_ids": ["a", "b", "c"]}, "names 3 of 3 samples"),
        ({"val_ids": ["a"], "groups": {"a": 1, "b": 1, "c": 2}}, "splits the group 1"),
        ({"groups": {"a": 1}}, "groups lacks 'b', 'c'"),
        ({"groups": {"a": 1, "b": 1, "c": 1}}, "3 samples in 1 groups cannot be split"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        split_ids({"a": [1], "b": [2], "c": [3]}, **arguments)


def test_folds_are_alike_and_hold_each_sample_out_once():
    counts = _many()
    folds = make_folds(counts, None, folds=4)
    assert sorted(i for _, val_ids in folds for i in val_ids) == sorted(counts)
    totals = np.sum(list(counts.values()), axis=0)
    for train_ids, val_ids in folds:
        assert train_ids == sorted(set(counts) - set(val_ids))
        shares = np.sum([counts[i] for i in val_ids], axis=0) / totals
        np.testing.assert_allclose(shares[:3], 0.25, atol=0.05)
        np.testing.assert_allclose(shares[3], 0.25, atol=0.12)  # only ten images hold it
        assert len(val_ids) == pytest.approx(25, abs=4)


def test_folds_worked_by_hand():
    # Class 1 is rarer and dealt first; then each group goes where there is least of what it holds.
    counts = {"a": [0, 8], "b": [0, 8], "c": [4, 0], "d": [4, 0], "e": [0, 1]}
    for seed in range(4):
        held = [set(val_ids) for _, val_ids in make_folds(counts, None, folds=2, seed=seed)]
        for pair in ("ab", "cd"):
            assert all(len(set(pair) & ids) == 1 for ids in held)


def test_folds_do_not_depend_on_the_order_of_samples():
    counts = _many()
    shuffled = dict(sorted(counts.items(), key=lambda item: sum(item[1])))
    assert make_folds(counts, None, seed=1) == make_folds(shuffled, None, seed=1)
    assert make_folds(counts, None, seed=1) != make_folds(counts, None, seed=2)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(2, 5), st.integers(0, 3))
def test_folds_split_no_group_and_none_is_empty(counts, folds, seed):
    groups = {sample_id: sample_id[0] for sample_id in counts}
    if len(set(groups.values())) < folds:
        with pytest.raises(SettingsError, match=f"folds is {folds} for"):
            make_folds(counts, groups, folds=folds, seed=seed)
        return
    made = make_folds(counts, groups, folds=folds, seed=seed)
    assert len(made) == folds
    assert sorted(i for _, val_ids in made for i in val_ids) == sorted(counts)
    for train_ids, val_ids in made:
        assert train_ids and val_ids
        assert not {groups[i] for i in train_ids} & {groups[i] for i in val_ids}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folds": 3, "seed": -1}, "seed is -1; give 0 or more"),
        ({"folds": 1}, "folds is 1 for 3 samples in 3 groups"),
        ({"folds": 4}, "folds is 4 for 3 samples in 3 groups"),
        ({"folds": 3, "groups": {"a": 1, "b": 1, "c": 2}}, "folds is 3 for 3 samples in 2 groups"),
        ({"groups": {"a": 1}}, "groups lacks 'b', 'c'"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        make_folds({"a": [1], "b": [2], "c": [3]}, **{"groups": None} | arguments)

"""Hostile and broken result files and test indices: one error that names them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hostile import FUZZ, RECORDS, bounded, cases, mutated, spoilt, survives
from hypothesis import given
from hypothesis import strategies as st

from cellseg.coco import read_records
from cellseg.data import read_test_index
from cellseg.ensemble import ensemble_files
from cellseg.errors import DataError, RecordsError
from cellseg.files import read_json
from cellseg.rle import encode_counts

pytestmark = FUZZ


def read_and_merge(path: Path) -> None:
    read_records(path)
    ensemble_files([path]).summary()


@cases(200)
@given(data=mutated([json.dumps(RECORDS).encode()]))
def test_damaged_result_files(data, tmp_path):
    survives(tmp_path, ".json", data, read_and_merge, RecordsError)


@cases(300)
@given(content=spoilt(RECORDS))
def test_result_files_of_other_values(content, tmp_path):
    data = json.dumps(content).encode()
    survives(tmp_path, ".json", data, read_and_merge, RecordsError)


CHARACTERS = st.text(
    "0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmno~é", max_size=30
)


@cases(200)
@given(counts=CHARACTERS, size=st.lists(st.sampled_from([1, 9, 14, 46340, 2**31]), max_size=3))
def test_any_run_lengths(counts, size, tmp_path):
    record = RECORDS[0] | {"segmentation": {"size": size, "counts": counts}}
    survives(tmp_path, ".json", json.dumps([record]).encode(), read_and_merge, RecordsError)


def test_masks_of_terabytes_take_no_memory(tmp_path):
    path = tmp_path / "huge.json"
    side = 46340  # the largest square that passes: 2 GB as a mask, a few bytes as runs
    (counts,) = encode_counts(np.array([0, side * side]), np.array([0, 2]))
    for size, passes in (([side] * 2, True), ([10**6] * 2, False), ([2**40] * 2, False)):
        record = RECORDS[0] | {"segmentation": {"size": size, "counts": counts}}
        path.write_text(json.dumps([record] * 50), encoding="utf-8")
        with bounded():
            if passes:
                assert len(ensemble_files([path]).records) == 1
            else:
                with pytest.raises(RecordsError, match=r"huge.json has 50 faults"):
                    read_records(path)


DEEP = [10, 400, 900, 990, 5000, 200_000]


@pytest.mark.parametrize("depth", DEEP)
@pytest.mark.parametrize("pair", ["[]", '{"a":}'])
def test_deeply_nested_json(depth, pair, tmp_path):
    nested = pair[:-1] * depth + "1" + pair[-1] * depth
    for text in (nested, f'[{{"image_id":1,"category_id":1,"score":{nested},"bbox":{nested}}}]'):
        survives(tmp_path, ".json", text.encode(), read_records, RecordsError)
        survives(tmp_path, ".json", text.encode(), read_json, DataError)
        survives(tmp_path, ".json", text.encode(), read_test_index, DataError)


def test_numbers_of_many_digits(tmp_path):
    for text in ("1" * 100_000, f'[{{"id": {"9" * 100_000}}}]', "1e999999"):
        survives(tmp_path, ".json", text.encode(), read_records, RecordsError)
        survives(tmp_path, ".json", text.encode(), read_test_index, DataError)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(RecordsError, match=r"x\.json"):
        read_records(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"x.json cannot be opened"):
        read_json(tmp_path / "x.json")


INDEX = [
    {"file_name": f"{name}.tif", "id": n, "height": 3, "width": 5} for n, name in enumerate("ab")
]


@cases(100)
@given(data=mutated([json.dumps(INDEX).encode()]))
def test_damaged_indices(data, tmp_path):
    survives(tmp_path, ".json", data, read_test_index, DataError)


@cases(100)
@given(content=spoilt(INDEX))
def test_indices_of_other_values(content, tmp_path):
    survives(tmp_path, ".json", json.dumps(content).encode(), read_test_index, DataError)

"""The files to hand in: exact content, same bytes for the same records, whole or not at all."""

import json
import zipfile

import numpy as np
import pytest

from cellseg.coco import make_record, mask_to_rle, read_records, sort_records
from cellseg.errors import RecordsError
from cellseg.submission import write_submission


def _records():
    masks = np.zeros((3, 20, 30), dtype=bool)
    for k, mask in enumerate(masks):
        mask[2 : 8 + k, 4 + k : 11] = True
    return [make_record(3 - k, k + 1, 0.5, mask_to_rle(mask)) for k, mask in enumerate(masks)]


def test_the_zip_holds_exactly_the_results_file(tmp_path):
    json_path, zip_path = write_submission(_records(), tmp_path / "out")
    assert (json_path.name, zip_path.name) == ("test-results.json", "test-results.zip")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "test-results.json",
        "test-results.zip",
    ]
    with zipfile.ZipFile(zip_path) as archive:
        assert archive.namelist() == ["test-results.json"]
        assert archive.testzip() is None
        assert archive.read("test-results.json") == json_path.read_bytes()


def test_the_file_is_a_sorted_list_of_records_of_the_five_keys(tmp_path):
    json_path, _ = write_submission(_records(), tmp_path)
    written = json.loads(json_path.read_text(encoding="utf-8"))
    assert written == sort_records(_records()) == read_records(json_path)
    assert [entry["image_id"] for entry in written] == [1, 2, 3]
    assert list(written[0]) == ["image_id", "category_id", "score", "bbox", "segmentation"]


def test_the_same_records_in_another_order_give_the_same_bytes(tmp_path):
    first = write_submission(_records(), tmp_path / "a")
    second = write_submission(_records()[::-1], tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_no_records_make_an_empty_list(tmp_path):
    json_path, _ = write_submission([], tmp_path)
    assert json.loads(json_path.read_text(encoding="utf-8")) == []


def test_faulty_records_are_refused_and_the_old_files_stay(tmp_path):
    before = [path.read_bytes() for path in write_submission(_records(), tmp_path)]
    with pytest.raises(RecordsError, match="record 1: score is nan"):
        write_submission([_records()[0], {**_records()[1], "score": float("nan")}], tmp_path)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before

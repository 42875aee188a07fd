"""Ensembles of small files worked out by hand, and files that cannot take part."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellseg.coco import make_record, mask_to_rle, sort_records, write_records
from cellseg.ensemble import ensemble_files
from cellseg.errors import RecordsError, SettingsError
from cellseg.inference.merging import suppress

SIZE = (20, 30)
LEFT, MOVED, RIGHT = (2, 3, 12, 13), (3, 3, 13, 13), (12, 3, 22, 13)  # RIGHT touches LEFT


def record(score, box=LEFT, category_id=1, image_id=1, size=SIZE):
    x1, y1, x2, y2 = box
    mask = np.zeros(size, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return make_record(image_id, category_id, score, mask_to_rle(mask))


@pytest.fixture
def folder(tmp_path):
    """Return a function that fills a folder with result files."""

    def fill(**files):
        for name, records in files.items():
            write_records(tmp_path / f"{name}.json", records)
        return tmp_path

    return fill


def scores_of(result):
    return [entry["score"] for entry in result.records]


FILES = [
    ("two touching cells stay", {"a": [record(0.9), record(0.8, RIGHT)]}, {}, [0.9, 0.8]),
    (
        "agreement: the mean of the members",
        {"a": [record(0.9)], "b": [record(0.5, MOVED)]},
        {},
        [0.7],
    ),
    (
        "agreement: seen by one of two",
        {"a": [record(0.9)], "b": []},
        {},
        [0.45],
    ),
    (
        "without agreement the best record stands",
        {"a": [record(0.9)], "b": [record(0.5, MOVED), record(0.3, RIGHT)]},
        {"agreement": False},
        [0.9, 0.3],
    ),
    (
        "weights in the mean: (3 * 0.9 + 1 * 0.5) / 4, named with and without .json",
        {"a": [record(0.9)], "b": [record(0.5, MOVED)]},
        {"weights": {"a.json": 3, "b": 1}},
        [0.8],
    ),
    (
        "weights without agreement scale scores by weight over largest weight",
        {"a": [record(0.9)], "b": [record(0.5, MOVED), record(0.4, RIGHT)]},
        {"weights": {"b": 2}, "agreement": False},
        [0.5, 0.4],
    ),
    (
        "one cell in two classes stays two records",
        {"a": [record(0.9)], "b": [record(0.5, category_id=2)]},
        {"agreement": False},
        [0.9, 0.5],
    ),
    (
        "records below the score threshold take no part",
        {"a": [record(0.9)], "b": [record(0.1)]},
        {"score_threshold": 0.2},
        [0.45],
    ),
    (
        "a stricter threshold keeps both (90 of 110 pixels)",
        {"a": [record(0.9)], "b": [record(0.5, MOVED)]},
        {"iou_threshold": 0.9, "agreement": False},
        [0.9, 0.5],
    ),
    ("files without records give none", {"a": [], "b": []}, {}, []),
]


@pytest.mark.parametrize(
    ("reason", "files", "options", "expected"), FILES, ids=[c[0] for c in FILES]
)
def test_by_hand(folder, reason, files, options, expected):
    result = ensemble_files(folder(**files), **options)
    assert scores_of(result) == pytest.approx(expected, abs=1e-12)
    assert result.left_out == []
    assert [member.path.stem for member in result.members] == sorted(files)


def _scene(seed, number=40):
    generator = random.Random(seed)
    return sort_records(
        record(
            generator.randint(1, 6) / 6,
            (x := generator.randint(0, 20), y := generator.randint(0, 10), x + 8, y + 9),
            category_id=generator.randint(1, 4),
            image_id=generator.randint(1, 3),
        )
        for _ in range(number)
    )


@pytest.mark.parametrize("agreement", [True, False])
def test_a_file_with_itself_is_the_file_after_its_own_suppression(folder, agreement):
    records = _scene(0)
    path = folder(a=records, b=records)
    expected = suppress(records, iou_threshold=0.5)
    assert ensemble_files(path, agreement=agreement).records == expected
    copies = [path / "a.json"] * 3
    assert ensemble_files(copies, agreement=agreement).records == expected


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 1000), st.booleans())
def test_the_order_of_files_names_and_records_does_not_matter(tmp_path, seed, agreement):
    scenes = [_scene(seed + k) for k in range(3)]
    generator = random.Random(seed)
    results = []
    for names in (["a", "b", "c"], ["c", "a", "b"]):
        for name, records in zip(names, scenes, strict=True):
            shuffled = generator.sample(records, len(records))
            (tmp_path / f"{name}.json").write_text(json.dumps(shuffled), encoding="utf-8")
        paths = generator.sample([tmp_path / f"{name}.json" for name in names], 3)
        weights = dict(zip(names, (0.3, 0.7, 1.1), strict=True))
        results.append(ensemble_files(paths, weights=weights, agreement=agreement).records)
    assert results[0] == results[1]


def _spoilt(**changes):
    return {**record(0.9), **changes}


def _bad_counts(counts):
    return _spoilt(segmentation={"size": list(SIZE), "counts": counts})


FAULTY = [
    ("not a list", {"annotations": []}, "not a list"),
    ("not an object", [record(0.9), 7], "record 1: is a int"),
    ("runs of no mask", [_bad_counts("112")], "record 0: .* cover 4 pixels"),
    ("characters of no RLE", [_bad_counts("é~")], "record 0: .*not COCO run lengths"),
    ("a score that is NaN", [record(0.9), _spoilt(score=float("nan"))], "record 1: score is nan"),
    ("an unknown class", [_spoilt(category_id=5)], "record 0: unknown category_id 5"),
    ("an unknown image", [_spoilt(image_id=102)], "record 0: unknown image_id 102"),
    (
        "no mask",
        [{"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 1, 1]}],
        "record 0",
    ),
]


@pytest.mark.parametrize(("reason", "content", "fault"), FAULTY, ids=[c[0] for c in FAULTY])
def test_a_faulty_file_is_left_out_and_named(folder, reason, content, fault):
    path = folder(good=[record(0.9)])
    (path / "bad.json").write_text(json.dumps(content), encoding="utf-8")
    result = ensemble_files(path, image_ids=range(1, 102))
    assert scores_of(result) == [0.9]
    assert [file.path.name for file in result.left_out] == ["bad.json"]
    assert len(result.left_out[0].faults) == 1
    assert re.search(fault, result.left_out[0].faults[0])
    assert "**Left out: `bad.json`, 1 fault**" in result.summary()


def test_text_that_is_no_json_and_missing_files_are_left_out(folder):
    path = folder(good=[record(0.9)])
    (path / "half.json").write_text('[{"image_id": 1, ', encoding="utf-8")
    result = ensemble_files([path / "good.json", path / "half.json", path / "none.json"])
    assert [file.path.name for file in result.left_out] == ["half.json", "none.json"]
    assert "does not exist" in result.left_out[1].faults[0]


def test_the_first_ten_faults_are_listed_by_record(folder):
    path = folder(good=[record(0.9)])
    bad = [_spoilt(score=2)] * 12
    (path / "bad.json").write_text(json.dumps(bad), encoding="utf-8")
    result = ensemble_files(path)
    assert len(result.left_out[0].faults) == 12
    summary = result.summary()
    assert "**Left out: `bad.json`, 12 faults**" in summary
    assert [f"- record {k}: " in summary for k in range(12)] == [True] * 10 + [False] * 2
    assert "- and 2 more" in summary


OTHER = (30, 20)


def test_the_file_of_another_test_set_is_the_one_that_most_files_contradict(folder):
    path = folder(
        a=[record(0.9)],
        b=[record(0.8)],
        odd=[record(0.6, size=OTHER), record(0.7, image_id=2)],
    )
    result = ensemble_files(path)
    assert [member.path.stem for member in result.members] == ["a", "b"]
    assert result.left_out[0].faults == [
        "record 0: image 1 is 30 x 20 here, but 20 x 30 in 2 of the files: another test set"
    ]


def test_files_that_contradict_each_other_one_to_one_are_all_left_out(folder):
    path = folder(a=[record(0.9)], b=[record(0.8, size=OTHER)], c=[record(0.7, image_id=2)])
    result = ensemble_files(path)
    assert [member.path.stem for member in result.members] == ["c"]
    assert [file.path.stem for file in result.left_out] == ["a", "b"]
    assert "20 x 30 and 30 x 20" in result.left_out[0].faults[0]


def test_image_sizes_tell_which_file_is_right(folder):
    path = folder(a=[record(0.9)], b=[record(0.8, size=OTHER)])
    result = ensemble_files(path, image_sizes={1: OTHER})
    assert scores_of(result) == [0.8]
    assert [file.path.stem for file in result.left_out] == ["a"]


def test_an_empty_folder_says_what_to_put_there(tmp_path):
    (tmp_path / ".hidden.json").write_text("[]", encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(RecordsError, match="put result files there"):
        ensemble_files(tmp_path)
    with pytest.raises(RecordsError, match="put result files there"):
        ensemble_files(tmp_path / "nowhere")
    with pytest.raises(RecordsError, match="put result files there"):
        ensemble_files([])


def test_nothing_left_is_an_error_that_names_every_file(tmp_path):
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    (tmp_path / "b.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(RecordsError, match=r"(?s)a\.json.*not a list.*b\.json.*record 0") as error:
        ensemble_files(tmp_path)
    assert len(error.value.faults) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"c": 1}}, "'c' is none of the files a.json, b.json"),
        ({"weights": {"a": 0}}, "'a' has 0; give a number > 0"),
        ({"weights": {"a": float("nan")}}, "'a' has nan"),
        ({"iou_threshold": 1.5}, "iou_threshold is 1.5"),
        ({"score_threshold": -0.1}, "score_threshold is -0.1"),
    ],
)
def test_settings_that_cannot_work(folder, options, message):
    with pytest.raises(SettingsError, match=message):
        ensemble_files(folder(a=[record(0.9)], b=[]), **options)


def test_records_come_out_in_the_exact_form_whatever_the_files_add(folder):
    loose = {**record(1), "bbox": [0, 0, 1, 1], "id": 7}
    empty = record(0.5, box=(0, 0, 0, 0))
    (folder() / "a.json").write_text(json.dumps([loose, empty]), encoding="utf-8")
    assert ensemble_files(folder()).records == [record(1.0)]


def test_the_summary_tables_the_members(folder):
    result = ensemble_files(folder(a=[record(0.9)], b=[record(0.5, MOVED)]), weights={"a": 1.5})
    assert result.summary() == (
        "2 files merged into 1 record.\n\n"
        "| file | records | weight |\n"
        "|---|---:|---:|\n"
        "| `a.json` | 1 | 1.5 |\n"
        "| `b.json` | 1 | 1 |\n"
    )

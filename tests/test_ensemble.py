"""Ensembles of small files worked out by hand, files of other tools, and files left out."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.stages_records import STAGES, make_ensemble
from cellseg.coco import make_record, mask_to_rle, sort_records, write_records
from cellseg.ensemble import RULES, Tuning, ensemble_files, merged_names, write_manifest
from cellseg.errors import RecordsError, SettingsError
from cellseg.evaluation import Interval
from cellseg.inference.merging import suppress
from cellseg.rle import decode_counts, encode_counts
from cellseg.submission.compliance import member_settings

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
        {"agreement": "best"},
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
        {"weights": {"b": 2}, "agreement": "best"},
        [0.5, 0.4],
    ),
    (
        "half way: (0.9 * 3 + 0.5 * 1) / 4 times the root of 4 of 5 weights",
        {"a": [record(0.9)], "b": [record(0.5, MOVED)], "c": []},
        {"weights": {"a": 3}, "agreement": "root"},
        [0.8 * (4 / 5) ** 0.5],
    ),
    (
        "one cell in two classes stays two records",
        {"a": [record(0.9)], "b": [record(0.5, category_id=2)]},
        {"agreement": "best"},
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
        {"iou_threshold": 0.9, "agreement": "best"},
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


@pytest.mark.parametrize("agreement", RULES)
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
@given(st.integers(0, 1000), st.sampled_from(list(RULES)))
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
        ({"agreement": "sum"}, "agreement is 'sum'; use one of mean, root, best"),
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
        "| `a.json` | 1 | 1.5 (given) |\n"
        "| `b.json` | 1 | 1 |\n\n"
        "One cell: mask IoU > 0.5 (default). Score: mean over all members, 0 from those that saw "
        "nothing (default).\n"
    )


def test_crowded_files_give_what_all_pairs_give():
    (stage,) = (stage for stage in STAGES if stage.name == "ensemble")
    files = make_ensemble(files=4, images=3, cells=60)
    fused = stage.reference(files)
    assert len(fused) > 100 and stage.equal(fused, stage.ours(files))


# Files of other tools


def _counts(entry):
    """Return a record's run lengths as COCO's uncompressed list."""
    return decode_counts([entry["segmentation"]["counts"]])[0].tolist()


def _with_counts(entry, counts):
    return {**entry, "segmentation": {**entry["segmentation"], "counts": counts}}


def _without(entry, *keys):
    return {key: value for key, value in entry.items() if key not in keys}


def _corners(entry):
    x, y, w, h = entry["bbox"]
    return {**entry, "bbox": [x, y, x + w, y + h]}


def _codes(entry):
    return list(entry["segmentation"]["counts"].encode())


CELLS = [record(0.9), record(0.8, RIGHT, 2), record(0.5, (21, 9, 27, 18), image_id=2)]
FOREIGN = [
    ("no boxes", lambda r: _without(r, "bbox"), "no box: made from the mask (all)"),
    ("a box of null", lambda r: {**r, "bbox": None}, "no box: made from the mask (all)"),
    ("corners", _corners, "boxes as corners x1, y1, x2, y2: made anew from the masks (all)"),
    (
        "corners of the last pixels",
        lambda r: {**r, "bbox": [side - k // 2 for k, side in enumerate(_corners(r)["bbox"])]},
        "boxes as corners x1, y1, x2, y2: made anew from the masks (all)",
    ),
    (
        "boxes of something else",
        lambda r: {**r, "bbox": [0.1, 0.1, 0.2, 0.2]},
        "boxes that do not fit their masks: made anew (all)",
    ),
    ("run lengths as a list", lambda r: _with_counts(r, _counts(r)), "run lengths as lists (all)"),
    (
        "bytes by repr",
        lambda r: _with_counts(r, str(r["segmentation"]["counts"].encode())),
        "run lengths as bytes (all)",
    ),
    ("bytes by list()", lambda r: _with_counts(r, _codes(r)), "run lengths as bytes (all)"),
    (
        "json.dumps(default=str) of NumPy's numbers",
        lambda r: {**r, "image_id": str(r["image_id"]), "score": str(r["score"])},
        "numbers as text or floats (all)",
    ),
    (
        "ids as pandas writes them",
        lambda r: {**r, "category_id": float(r["category_id"])},
        "numbers as text or floats (all)",
    ),
]


@pytest.mark.parametrize(("reason", "change", "note"), FOREIGN, ids=[c[0] for c in FOREIGN])
def test_files_of_other_tools_are_mended_with_a_note(folder, reason, change, note):
    path = folder(own=CELLS) / "other.json"
    path.write_text(json.dumps([change(entry) for entry in CELLS]), encoding="utf-8")
    result = ensemble_files(path)
    assert result.records == CELLS
    assert [member.notes for member in result.members] == [[note]]
    both = ensemble_files(folder())
    assert [member.notes for member in both.members] == [[note], []]
    assert f"| `other.json` | 3 | 1 | {note} |" in both.summary()


def test_a_backslash_in_bytes_is_one_character(tmp_path):
    (text,) = encode_counts(np.array([0, 44, 20 * 30 - 44]), np.array([0, 3]))
    assert text == "0\\1\\a0"
    entry = _with_counts(record(0.5), str(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps([entry]), encoding="utf-8")
    assert ensemble_files(tmp_path).records[0]["segmentation"]["counts"] == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_of_windows_tools_are_read(tmp_path, encoding):
    (tmp_path / "a.json").write_text(json.dumps(CELLS), encoding=encoding)
    assert ensemble_files(tmp_path).records == CELLS


def test_a_note_counts_the_records_it_is_about(folder):
    path = folder(a=[]) / "a.json"
    path.write_text(json.dumps([_without(CELLS[0], "bbox"), *CELLS[1:]]), encoding="utf-8")
    assert ensemble_files(path).members[0].notes == ["no box: made from the mask (1 of 3)"]


def test_one_box_like_corners_among_others_is_none(folder):
    # By chance one sloppy box fits better as corners; the other two say what the file means.
    sloppy = {**CELLS[0], "bbox": [2, 3, 12, 13]}
    path = folder(a=[sloppy, *CELLS[1:]])
    assert ensemble_files(path).members[0].notes == []


FAULTY_MASKS = [
    ("lists that do not fill the mask", [1, 2, 3], "cover 6 pixels, not 20 x 30"),
    ("lists with a negative run", [610, -10], "not an RLE .* counts as text"),
    ("lists of something else", [1, "2"], "not an RLE .* counts as text"),
    ("an empty list", [], "cover 0 pixels"),
    ("bytes of no mask", "b'112'", "cover 4 pixels"),
]


@pytest.mark.parametrize(
    ("reason", "counts", "fault"), FAULTY_MASKS, ids=[c[0] for c in FAULTY_MASKS]
)
def test_what_cannot_be_mended_is_a_fault(folder, reason, counts, fault):
    path = folder(good=[record(0.9)])
    (path / "bad.json").write_text(json.dumps([_with_counts(record(0.9), counts)]))
    (file,) = ensemble_files(path).left_out
    assert re.search(fault, file.faults[0])


# What was tuned, and the manifest

TUNED = Tuning(
    weights={"a": 2.0, "b": 1.0, "c": 0.0},
    iou_threshold=0.3,
    agreement="best",
    interval=Interval(0.5, 0.4, 0.6),
    default=Interval(0.45, 0.35, 0.55),
    images=7,
    steps=["without c +0.050 (+0.010 to +0.090)"],
)


def test_a_tuning_decides_what_is_not_given(folder):
    path = folder(a=[record(0.8)], b=[record(0.6, MOVED), record(0.4, RIGHT)], c=[record(1.0)])
    result = ensemble_files(path, tuning=TUNED)
    assert scores_of(result) == [0.8, 0.2]
    assert [(m.weight, m.chosen) for m in result.members] == [
        (2.0, "tuned"), (1.0, "tuned"), (0.0, "tuned"),
    ]  # fmt: skip
    assert "2 files merged into 2 records." in result.summary()
    assert (
        "Out of fold on 7 images the AP50 is 0.500 (0.400-0.600), with the defaults 0.450 "
        "(0.350-0.550): without c +0.050 (+0.010 to +0.090).\n" in result.summary()
    )
    given = ensemble_files(path, tuning=TUNED, weights={"b": 2}, iou_threshold=0.9)
    assert scores_of(given) == [0.8, 0.6, 0.4]
    assert given.chosen == {"iou_threshold": "given", "agreement": "tuned"}


@pytest.mark.parametrize("files", [("a", "b"), ("a", "b", "c", "d")])
def test_a_tuning_of_another_company_is_not_used(folder, files):
    result = ensemble_files(folder(**{name: [record(0.8)] for name in files}), tuning=TUNED)
    assert scores_of(result) == [0.8] and result.iou_threshold == 0.5
    assert result.chosen == {"iou_threshold": "default", "agreement": "default"}
    assert "The settings are the defaults: the files that were tuned are not" in result.summary()


def test_the_manifest_says_what_a_result_was_made_from(folder):
    path = folder(a=[record(0.8)], b=[record(0.6)], c=[record(1.0)])
    result = ensemble_files(path, tuning=TUNED, iou_threshold=0.6)
    out = path / "out" / "test-results.json"
    write_records(out, result.records)
    manifest = write_manifest(result, out)
    assert manifest == path / "out" / "test-results.manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert list(content) == [
        "results", "members", "left_out", "settings", "out_of_fold", "versions", "date",
    ]  # fmt: skip
    assert content["results"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert content["members"][0] == {
        "file": "a.json",
        "sha256": hashlib.sha256((path / "a.json").read_bytes()).hexdigest(),
        "records": 1,
        "weight": 2.0,
        "weight_is": "tuned",
        "notes": [],
    }
    assert content["settings"]["iou_threshold_is"] == "given"
    assert content["out_of_fold"]["ap50"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert merged_names(out) == ["a", "b"]  # c has no weight
    part = out.parent / "runs" / "a" / "all"  # of a run by folds
    part.mkdir(parents=True)
    (part / "settings.json").write_text('{"trainable_parameters": 7}')
    assert member_settings(out.parent) == {"a": {"trainable_parameters": 7}, "b": None}
    write_records(out, [record(0.1)])
    assert merged_names(out) is None  # a manifest of another result


def test_a_manifest_without_tuning_says_why(folder):
    path = folder(a=[record(0.8)])
    (path / "bad.json").write_text("{}")
    result = ensemble_files(path, tuning=Tuning(reason="there is no oof.json"))
    content = json.loads(write_manifest(result, path / "a.json").read_text(encoding="utf-8"))
    assert content["out_of_fold"] == {"ap50": None, "reason": "there is no oof.json"}
    assert [file["file"] for file in content["left_out"]] == ["bad.json"]
    assert "The settings are the defaults: there is no oof.json." in result.summary()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": 3}', '{"results": {"sha256": 1}}'])
def test_a_manifest_that_cannot_be_read_names_nobody(tmp_path, text):
    assert merged_names(tmp_path / "test-results.json") is None
    (tmp_path / "test-results.json").write_text("[]")
    (tmp_path / "test-results.manifest.json").write_text(text)
    assert merged_names(tmp_path / "test-results.json") is None

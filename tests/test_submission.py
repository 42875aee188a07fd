"""The files to hand in: exact content, whole or not at all; every check, failing once."""

import json
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from tiny_models import write_squares
from typer.testing import CliRunner

from cellseg import cli
from cellseg.coco import make_record, mask_to_rle, read_records, sort_records
from cellseg.errors import DataError, RecordsError
from cellseg.submission import (
    check_submission,
    compliance,
    score_submission,
    write_submission,
)


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


SIZE = (20, 30)


def block(top, left, height, width, size=SIZE):
    """Return the RLE of a rectangle."""
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask_to_rle(mask)


def good_records():
    """Return a record of class 1 in image 1, two of class 1 and 2 in image 2, of other size."""
    return [
        make_record(1, 1, 0.9, block(2, 3, 6, 7)),
        make_record(2, 1, 0.8, block(4, 5, 8, 4, (24, 16))),
        make_record(2, 2, 0.7, block(0, 0, 4, 4, (24, 16))),
    ]


INDEX = [
    {"file_name": "a.tif", "id": 1, "height": 20, "width": 30},
    {"file_name": "b.tif", "id": 2, "height": 24, "width": 16},
]


def write_index(folder, rows=INDEX):
    path = folder / "index.json"
    path.write_text(json.dumps(rows))
    return path


def write_zip(path, content, *, name="test-results.json", **more):
    """Write a zip with one entry, and others beside it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content if isinstance(content, bytes) else json.dumps(content))
        for other, text in more.items():
            archive.writestr(other, text)
    return path


def check(folder, records, *, index=True, **options):
    """Return the check of records in a zip, against the index of two images."""
    path = write_zip(folder / "test-results.zip", records)
    return check_submission(path, index_path=write_index(folder) if index else None, **options)


def result_of(checked, name):
    found = [finding for finding in checked.findings if finding.check == name]
    assert len(found) == 1, checked.table()
    return found[0]


def test_a_sound_zip_is_ready(tmp_path):
    write_submission(good_records(), tmp_path)
    checked = check_submission(tmp_path / "test-results.zip", index_path=write_index(tmp_path))
    assert checked.ready and checked.reasons == []
    assert checked.verdict().startswith("ready")
    results = {finding.check: finding.result for finding in checked.findings}
    assert results.pop("compliance") == "note"
    assert set(results.values()) == {"ok"}
    assert set(results) == {
        "file", "file size", "schema", "image ids", "classes", "scores", "sizes", "RLE", "boxes",
        "empty masks", "duplicates", "overlaps", "images without records",
        "records per image and class",
    }  # fmt: skip
    assert "number of records: 3" in result_of(checked, "file size").detail
    assert checked.table().splitlines()[:2] == ["| check | result | detail |", "|---|---|---|"]


def changed(number, **values):
    records = good_records()
    records[number] |= values
    return records


def without(number, key):
    records = good_records()
    del records[number][key]
    return records


def resized(number, size):
    records = good_records()
    records[number]["segmentation"]["size"] = size
    return records


def twice(number, **values):
    return [*good_records(), good_records()[number] | values]


def rle(counts):
    return {"size": list(SIZE), "counts": counts}


EMPTY = mask_to_rle(np.zeros(SIZE, dtype=bool))
FAULTS = [
    # reason for the row, records, the check that sees it, what it says, in which record
    ("no score", without(1, "score"), "schema", "has no score", 1),
    ("no bbox, which prediction always writes", without(2, "bbox"), "schema", "bbox is None", 2),
    ("no object", [*good_records(), 7], "schema", "is a int, not an object", 3),
    ("an id of another set", changed(1, image_id=3), "image ids", "unknown image_id 3", 1),
    ("an id as text", changed(0, image_id="1"), "image ids", "unknown image_id '1'", 0),
    ("the background's class", changed(0, category_id=0), "classes", "unknown category_id 0", 0),
    ("a fifth class", changed(2, category_id=5), "classes", "unknown category_id 5", 2),
    ("a percentage", changed(0, score=90), "scores", "score is 90", 0),
    ("height and width exchanged", resized(0, [30, 20]), "sizes", "differs from the image's", 0),
    ("runs cut short", changed(0, segmentation=rle("T2")), "RLE", "cover", 0),
    ("not run lengths", changed(0, segmentation=rle("~~")), "RLE", "not COCO", 0),
    ("corners as box", changed(0, bbox=[3, 2, 10, 8]), "boxes", "it holds corners", 0),
    ("a box 2 px off", changed(0, bbox=[1, 2, 7, 6]), "boxes", "mask's tight box", 0),
    ("no pixel", changed(0, segmentation=EMPTY, bbox=[0, 0, 0, 0]), "empty masks", "is empty", 0),
    ("the same cell twice", twice(1, score=0.1), "duplicates", "those of record 1", 3),
]  # fmt: skip


@pytest.mark.parametrize("records, name, text, number", [row[1:] for row in FAULTS],
                         ids=[row[0] for row in FAULTS])  # fmt: skip
def test_each_fault_is_seen_by_its_check_alone(tmp_path, records, name, text, number):
    checked = check(tmp_path, records)
    finding = result_of(checked, name)
    assert finding.result == "fault" and text in finding.detail
    assert len(checked.reasons) == 1 and checked.reasons[0].startswith(f"record {number}: ")
    assert not checked.ready
    assert checked.verdict().splitlines()[1:] == [f"- {checked.reasons[0]}"]


def test_a_score_that_is_no_number_is_named_with_its_record(tmp_path):
    text = json.dumps(good_records()).replace("0.8", "NaN").encode()
    assert check(tmp_path, text).reasons == ["record 1: score is nan, not a number from 0 to 1"]


@pytest.mark.parametrize("moved", [[3, 2, 6, 5], [3.4, 1.5, 7, 6]])
def test_a_box_within_a_pixel_of_its_mask_is_fine(tmp_path, moved):
    assert check(tmp_path, changed(0, bbox=moved)).ready


def test_many_reasons_are_counted_and_the_first_ten_shown(tmp_path):
    checked = check(tmp_path, [record | {"score": 2} for record in good_records() * 4])
    assert len(checked.reasons) == 12
    assert checked.verdict().splitlines()[-1] == "- and 2 more"
    assert "12 faults, first record 0" in result_of(checked, "scores").detail


def test_overlaps_are_a_warning_and_named(tmp_path):
    # 6 x 7 against 6 x 8 that holds it: IoU 42 / 48; against its half: 21 / 42, which is not > 0.5.
    near, half = block(2, 3, 6, 8), block(2, 3, 3, 7)
    records = [*good_records(), make_record(1, 1, 0.5, near), make_record(1, 2, 0.5, near)]
    checked = check(tmp_path, records)
    finding = result_of(checked, "overlaps")
    assert checked.ready and finding.result == "warning"
    assert "1 pairs" in finding.detail and "first records 0, 3" in finding.detail
    records[3:] = [make_record(1, 1, 0.5, half)]
    assert result_of(check(tmp_path, records), "overlaps").result == "ok"


def test_images_without_records_are_named(tmp_path):
    finding = result_of(check(tmp_path, good_records()[1:]), "images without records")
    assert (finding.result, finding.detail) == ("warning", "1 of 2: 1 (a.tif)")


def test_more_than_a_hundred_of_a_class_are_told(tmp_path):
    dots = [make_record(1, 1, 0.5, block(k % 20, k // 20, 1, 1)) for k in range(101)]
    checked = check(tmp_path, [*dots, *good_records()[1:]])
    finding = result_of(checked, "records per image and class")
    assert checked.ready and finding.result == "note"
    assert "at most 101" in finding.detail and "over 100 in 1 of 3" in finding.detail


def test_without_the_index_sizes_are_compared_within_an_image(tmp_path):
    checked = check(tmp_path, good_records(), index=False)
    assert checked.ready
    for name in ("image ids", "sizes", "images without records"):
        assert result_of(checked, name).result == "note"
    odd = make_record(2, 1, 0.5, block(0, 0, 2, 2, (16, 24)))
    checked = check(tmp_path, [*good_records(), odd], index=False)
    assert result_of(checked, "sizes").result == "fault"
    assert checked.reasons == [
        "record 3: segmentation size [16, 24] differs from [24, 16], that of the image's first"
    ]


def test_an_index_that_cannot_be_used_is_an_error(tmp_path):
    path = write_zip(tmp_path / "test-results.zip", good_records())
    with pytest.raises(DataError, match="does not exist"):
        check_submission(path, index_path=tmp_path / "none.json")


def test_a_bare_json_is_accepted_with_a_note(tmp_path):
    json_path, _ = write_submission(good_records(), tmp_path)
    checked = check_submission(json_path, index_path=write_index(tmp_path))
    assert checked.ready and "the zip that holds it" in result_of(checked, "file").detail
    other = json_path.rename(tmp_path / "run.json")
    assert "named test-results.json" in result_of(check_submission(other), "file").detail


def write_bomb(path):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("test-results.json", "w") as file,
    ):
        for _ in range(201):
            file.write(b" " * 1_000_000)


def write_encrypted(path):
    write_zip(path, [])
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag in the entry's own header
    data[data.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    path.write_bytes(data)


def write_flipped(path):
    write_zip(path, good_records())
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)


def zipped(content, **options):
    return lambda path: write_zip(path, content, **options)


HOSTILE = [
    # name, how it is written, the reason it gives
    ("none.zip", lambda path: None, "is not a file"),
    ("folder.zip", lambda path: path.mkdir(), "is not a file"),
    ("text.zip", lambda path: path.write_text("[]"), "is no zip"),
    ("cut.zip", lambda path: path.write_bytes(write_zip(path, []).read_bytes()[:-30]), "is no zip"),
    ("flipped.zip", write_flipped, "is damaged"),
    ("zip.json", zipped([]), "is a zip by its content"),
    ("two.zip", zipped([], readme="x"), "'readme'; it must"),
    ("macos.zip", zipped([], **{"__MACOSX/._x": ""}), "'__MACOSX/._x'"),
    ("inside.zip", zipped([], name="out/test-results.json"), "in no folder"),
    ("other.zip", zipped([], name="results.json"), "'results.json'; it must"),
    ("empty.zip", lambda path: zipfile.ZipFile(path, "w").close(), "holds nothing"),
    ("locked.zip", write_encrypted, "is encrypted"),
    ("bomb.zip", write_bomb, "holds 201 MB of JSON"),
    ("latin.zip", zipped(b'["\xe9"]'), "is not UTF-8 text (byte 2)"),
    ("utf16.zip", zipped("[]".encode("utf-16")), "is not UTF-8 text"),
    ("bom.zip", zipped(b"\xef\xbb\xbf[]"), "BOM"),
    ("cut.json", lambda path: path.write_text('[{"image_id": 1'), "is not JSON (Expecting"),
    ("deep.zip", zipped(b"[" * 200_000 + b"]" * 200_000), "too deeply"),
    ("digits.zip", zipped(b"[" + b"9" * 5000 + b"]"), "is not JSON (Exceeds"),
    ("values.zip", zipped(b"[" + b"[]," * 10_000_000 + b"[]]"), "20,000,000"),
    ("object.zip", zipped({"a": 1}), "holds a dict, not a list"),
    ("nothing.zip", zipped([]), "the list is empty"),
]  # fmt: skip


@pytest.mark.parametrize("name, write, reason", HOSTILE, ids=[row[0] for row in HOSTILE])
def test_a_hostile_file_gives_one_reason(tmp_path, name, write, reason):
    write(tmp_path / name)
    checked = check_submission(tmp_path / name)
    assert len(checked.reasons) == 1 and reason in checked.reasons[0]
    assert [finding.result for finding in checked.findings].count("fault") == 1


def test_a_zip_that_lies_about_its_size_unpacks_no_more_than_it_says(tmp_path):
    path = tmp_path / "test-results.zip"
    write_zip(path, b" " * 5_000_000)
    data = path.read_bytes().replace((5_000_000).to_bytes(4, "little"), (9).to_bytes(4, "little"))
    path.write_bytes(data)
    tracemalloc.start()
    checked = check_submission(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(checked.reasons) == 1 and peak < 1_000_000


def test_names_cannot_break_the_table(tmp_path):
    path = write_zip(tmp_path / "a`b.zip", [], name="x|y\n.json")
    table = check_submission(path).table()
    assert len(table.splitlines()) == 3 and table.splitlines()[2].count("|") == 4


SETTINGS = {
    "trainable_parameters": 44_000_000,
    "provenance": "torchvision ResNet50_Weights.IMAGENET1K_V2 (https://x/y.pth): all tensors kept",
    "data": {"source": "hw3-data-release", "images": 209},
}


def test_compliance_says_what_the_settings_hold():
    assert compliance(SETTINGS) == (
        "44.0 M trainable parameters, fewer than 200 M; weights: torchvision "
        "ResNet50_Weights.IMAGENET1K_V2 (https://x/y.pth): all tensors kept; "
        "data: 209 images (hw3-data-release), none other recorded"
    )
    exactly = compliance(SETTINGS | {"trainable_parameters": 200_000_000})
    assert exactly.startswith("200.0 M trainable parameters, not fewer than 200 M")


@pytest.mark.parametrize("settings", [None, {}, {"trainable_parameters": "many", "data": 3}])
def test_compliance_invents_nothing(settings):
    assert compliance(settings) == (
        "trainable parameters: unknown; weights: unknown; data: unknown"
    )


def test_compliance_does_not_know_a_files_origin():
    line = compliance({"provenance": "file my.pth: backbone, 260 tensors kept"})
    assert (
        "weights: file my.pth: backbone, 260 tensors kept (where the file comes from: unknown)"
        in line
    )


def test_the_runs_behind_the_members_are_held_against_the_rules(tmp_path):
    for name, number in (("small", 44_000_000), ("large", 250_000_000)):
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        (run_dir / "settings.json").write_text(
            json.dumps(SETTINGS | {"trainable_parameters": number})
        )
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "settings.json").write_text("{")
    (tmp_path / "predictions").mkdir()
    for name in ("small", "foreign", "broken"):
        (tmp_path / "predictions" / f"{name}.json").write_text("[]")
    checked = check(tmp_path, good_records())
    assert result_of(checked, "compliance: small").result == "ok"
    assert result_of(checked, "compliance: foreign").result == "note"
    assert result_of(checked, "compliance: broken").detail.count("unknown") == 3
    assert checked.ready
    (tmp_path / "predictions" / "large.json").write_text("[]")
    checked = check(tmp_path, good_records())
    assert not checked.ready and "not fewer than 200 M" in checked.reasons[0]


def test_the_run_of_made_tissue_lies_beside_its_predictions(tmp_path):
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "quick.json").write_text("[]")
    assert result_of(check(tmp_path, good_records()), "compliance: quick").result == "ok"


def test_the_runs_may_lie_in_a_folder_of_their_own(tmp_path):
    (tmp_path / "drive" / "far").mkdir(parents=True)
    (tmp_path / "drive" / "far" / "settings.json").write_text(json.dumps(SETTINGS))
    project = tmp_path / "project"
    (project / "predictions").mkdir(parents=True)
    (project / "predictions" / "far.json").write_text("[]")
    _, path = write_submission(good_records(), project)
    assert result_of(check_submission(path), "compliance: far").result == "note"
    found = result_of(check_submission(path, runs_dir=tmp_path / "drive"), "compliance: far")
    assert (found.result, found.detail) == ("ok", compliance(SETTINGS))
    arguments = ["submission", "check", str(path), "--index", str(write_index(tmp_path))]
    done = CliRunner().invoke(cli.app, [*arguments, "--runs-dir", str(tmp_path / "drive")])
    assert "| compliance: far | ok | 44.0 M trainable parameters" in done.output


def crowded_records(images):
    """Return 250 records of one class an image: 25 squares, each in ten places a pixel apart."""
    rles = [block(20 * row, 4 + k, 12, 12, (512, 40)) for row in range(25) for k in range(10)]
    boxes = [[4 + k, 20 * row, 12, 12] for row in range(25) for k in range(10)]
    return [
        {"image_id": image, "category_id": 1, "score": 0.5, "bbox": box, "segmentation": rle}
        for image in range(images)
        for box, rle in zip(boxes, rles, strict=True)
    ]


def test_many_crowded_records_are_checked_in_seconds(tmp_path):
    path = write_zip(tmp_path / "test-results.zip", crowded_records(100))  # 25,000
    start = time.process_time()
    checked = check_submission(path)
    assert time.process_time() - start < 5  # 0.8 measured, and 2.8 for 100,000
    # Twelve pixels wide and d apart: IoU (12 - d) / (12 + d), over 0.5 for d of 1, 2 and 3.
    pairs = 25 * 100 * (9 + 8 + 7)
    assert checked.ready and f"{pairs:,} pairs" in result_of(checked, "overlaps").detail


def test_the_score_of_a_zip_is_that_of_its_records(tmp_path):
    squares = {
        "b": (30, 40, [(1, 4, 4, 16, 18), (2, 20, 8, 32, 22)]),
        "a": (24, 36, [(1, 2, 2, 14, 14)]),
        "c": (24, 36, [(2, 2, 2, 14, 14)]),
    }
    dataset = write_squares(tmp_path / "train", squares)
    # Sorted folders: a is image 1, b is 2. One of the three cells of a and b is missed.
    records = [
        make_record(1, 1, 0.9, block(2, 2, 12, 12, (24, 36))),
        make_record(2, 2, 0.8, block(8, 20, 14, 12, (30, 40))),
    ]
    _, path = write_submission(records, tmp_path)
    scores = score_submission(path, dataset.subset(["a", "b"]))
    # Class 1: one of two found, precision 1 up to recall 0.5: 51 of COCO's 101 points.
    assert scores.ap50_per_class == pytest.approx({"dark": 51 / 101, "light": 1.0})
    assert scores.ap50 == scores.ap50_100 == pytest.approx((51 / 101 + 1) / 2)
    with pytest.raises(RecordsError, match="record 1: unknown image_id 2"):
        score_submission(path, dataset.subset(["a"]))


def test_the_commands_print_the_table_and_exit_by_the_verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner, index = CliRunner(), write_index(tmp_path)
    _, path = write_submission(good_records(), tmp_path)
    done = runner.invoke(cli.app, ["submission", "check", str(path), "--index", str(index)])
    assert done.exit_code == 0 and done.output.strip().endswith(f"ready: {path}")
    path = write_zip(tmp_path / "test-results.zip", without(0, "score"))
    done = runner.invoke(cli.app, ["submission", "check", str(path)])
    assert done.exit_code == 1 and "- record 0: has no score" in done.output
    write_squares(tmp_path / "train", {"a": (20, 30, [(1, 3, 2, 10, 8)])})
    path = write_zip(tmp_path / "test-results.zip", good_records()[:1])
    told = ["--truth", str(tmp_path / "train"), "--class-names", "dark,light"]
    done = runner.invoke(cli.app, ["submission", "score", str(path), *told])
    assert done.exit_code == 0 and "| AP50 | 1.000 | 1.000 |" in done.output


def test_the_check_finds_the_index_of_an_extracted_release(tmp_path, monkeypatch):
    release = tmp_path / "hw3-data-release"
    for part in ("train", "test_release"):
        (release / part).mkdir(parents=True)
    write_index(release).rename(release / "test_image_name_to_ids.json")
    monkeypatch.chdir(tmp_path)
    path = write_zip(tmp_path / "test-results.zip", changed(0, image_id=7))
    done = CliRunner().invoke(cli.app, ["submission", "check", str(path)])
    assert done.exit_code == 1 and "unknown image_id 7" in done.output

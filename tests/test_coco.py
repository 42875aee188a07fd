"""RLE, boxes and result files: values by hand, and agreement with pycocotools."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as mask_utils

from cellseg import coco
from cellseg.errors import RecordsError

MASK = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=bool)


def square(image_id=1, *, score=0.5, category_id=1, x=0):
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, x : x + 2] = True
    return coco.make_record(image_id, category_id, score, coco.mask_to_rle(mask))


def test_runs_of_a_mask_written_out_by_hand():
    # Columns: 000 | 110 | 100 | 001 -> runs 3, 2, 1, 1, 4, 1; a count is a character from 48 on,
    # and from the fourth on it is the difference to the count two before it: 1-2=-1, 4-1=3, 1-1=0.
    assert coco.mask_to_rle(MASK) == {"size": [3, 4], "counts": "321O30"}


def test_boxes_there_and_back():
    xyxy = np.array([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0, 1.0]])
    assert coco.xyxy_to_xywh(xyxy).tolist() == [[1, 2, 3, 6], [0, 0, 1, 1]]
    assert coco.xywh_to_xyxy(coco.xyxy_to_xywh(xyxy)).tolist() == xyxy.tolist()


def test_record_has_the_tight_box_of_its_mask():
    record = coco.make_record(7, 2, 0.25, coco.mask_to_rle(MASK))
    assert record["bbox"] == [1, 0, 3, 3]
    assert (record["image_id"], record["category_id"], record["score"]) == (7, 2, 0.25)


@settings(max_examples=60, deadline=None)
@given(arrays(np.int32, st.tuples(*[st.integers(1, 2)], *[st.integers(1, 9)] * 2),
              elements=st.integers(0, 5)))  # fmt: skip
def test_map_to_rles_agrees_with_the_codec_on_every_instance(layers):
    if len(layers) == 2:  # an instance lies in one layer
        layers[1][layers[1] > 0] += 5
    rles = coco.instance_map_to_rles(layers, 10)
    for k, rle in enumerate(rles):
        assert rle == coco.mask_to_rle((layers == k + 1).any(axis=0))


def test_a_cell_as_high_as_the_image_is_one_run():
    instance_map = np.zeros((1, 3, 4), dtype=np.int32)
    instance_map[0, :, 1:3] = 1
    assert coco.instance_map_to_rles(instance_map, 1) == [{"size": [3, 4], "counts": "363"}]


def test_areas_and_boxes_of_more_than_255_masks():
    rles = [coco.mask_to_rle(MASK)] * 300
    assert coco.rle_area(rles).tolist() == [4] * 300
    assert coco.rle_to_xywh(rles).tolist() == [[1, 0, 3, 3]] * 300


def test_areas_and_boxes_of_no_masks():
    assert coco.rle_area([]).shape == (0,)
    assert coco.rle_to_xywh([]).shape == (0, 4)


def test_file_there_and_back_is_sorted_and_leaves_input_alone(tmp_path):
    records = [square(2), square(1, score=0.1), square(1, score=0.9, x=3)]
    before = copy.deepcopy(records)
    coco.write_records(tmp_path / "a.json", records)
    again = coco.read_records(tmp_path / "a.json")
    assert records == before
    assert [(r["image_id"], r["score"]) for r in again] == [(1, 0.9), (1, 0.1), (2, 0.5)]
    coco.write_records(tmp_path / "b.json", reversed(records))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_no_records_is_a_valid_file(tmp_path):
    coco.write_records(tmp_path / "none.json", [])
    assert coco.read_records(tmp_path / "none.json") == []
    (tmp_path / "none.json").write_bytes(b"\xef\xbb\xbf[]")  # with the mark that Windows sets
    assert coco.read_records(tmp_path / "none.json") == []


def changed(**change):
    record = square()
    for key, value in change.items():
        if key in ("size", "counts"):
            record["segmentation"][key] = value
        else:
            record[key] = value
    return record


FAULTS = [
    ("not an object", 3, "is a int"),
    ("a key missing", {"image_id": 1}, "has no category_id, score"),
    ("id as text", changed(image_id="1"), "unknown image_id '1'"),
    ("true is not an id", changed(image_id=True), "unknown image_id True"),
    ("image of another set", changed(image_id=500), "unknown image_id 500"),
    ("class of another set", changed(category_id=9), "unknown category_id 9"),
    ("NaN score", changed(score=float("nan")), "score is nan"),
    ("score above one", changed(score=1.5), "score is 1.5"),
    ("score as text", changed(score="0.5"), "score is '0.5'"),
    ("box of three", changed(bbox=[1, 2, 3]), "bbox is [1, 2, 3]"),
    ("no mask", changed(segmentation=None), "segmentation is not an RLE"),
    ("counts as numbers", changed(counts=[1, 2]), "segmentation is not an RLE"),
    ("size of one", changed(size=[4]), "segmentation size is [4]"),
    ("terabytes", changed(size=[2**20, 2**20]), "is out of range"),
    ("another image's size", changed(size=[6, 4]), "differs from the image's [4, 6]"),
    ("runs too short", changed(counts="3"), "cover 3 pixels, not 4 x 6"),
    ("foreign characters", changed(counts="3 ~"), "not COCO run lengths"),
    ("cut in a number", changed(counts="5222:P"), "not COCO run lengths"),
    ("empty counts", changed(counts=""), "cover 0 pixels"),
    ("negative run", changed(counts="O"), "not COCO run lengths"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_each_fault_is_named_with_its_record(record, message):
    faults = coco.check_records(
        [square(), record], image_ids=range(1, 102), category_ids=range(1, 5),
        image_sizes={1: (4, 6)},
    )  # fmt: skip
    assert len(faults) == 1
    assert faults[0].startswith("record 1: ")
    assert message in faults[0]


def test_a_mask_cut_within_a_number_does_not_spoil_the_next():
    # Its two runs of 2**19 take five characters each: four of them and five would be one number of
    # nine, which no count has.
    long = np.zeros((1024, 1024), dtype=bool)
    long[:, 512:] = True
    sound = coco.make_record(1, 1, 0.5, coco.mask_to_rle(long))
    cut = copy.deepcopy(sound)
    cut["segmentation"]["counts"] = sound["segmentation"]["counts"][:-1]
    assert [fault.split(":")[0] for fault in coco.check_records([sound, cut, sound])] == [
        "record 1"
    ]


def test_first_ten_faults_are_in_the_message(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps([{}] * 12))
    with pytest.raises(RecordsError, match=r"bad\.json has 12 faults; correct these") as caught:
        coco.read_records(tmp_path / "bad.json")
    assert "record 9:" in str(caught.value)
    assert "record 10:" not in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert len(caught.value.faults) == 12


@pytest.mark.parametrize("text", ["{}", "[1", "\xff", ""])
def test_a_file_that_is_no_list_is_named(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordsError, match=r"x\.json .*(leave it out|write the file anew)"):
        coco.read_records(tmp_path / "x.json")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=[chr(c) for c in range(48, 112)], min_size=1, max_size=12))
def test_checked_runs_decode_as_the_codec_does(text):
    record = square()
    record["segmentation"] = {"size": [4, 6], "counts": text}
    if not coco.check_records([record]):
        mask = mask_utils.decode(record["segmentation"])
        assert mask.shape == (4, 6)
        assert mask.sum() == coco.rle_area([record["segmentation"]])[0]

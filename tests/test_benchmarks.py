"""The bench itself: both sides agree on small inputs, misses are found, tables are true."""

import json
import time

import numpy as np
import pytest
import torch
from tiny_models import make_image, make_target

import benchmarks
from benchmarks import end_to_end, memory, run, stages_files, stages_model
from benchmarks.made import cells_on_grid, jittered_boxes, predicted_masks, write_sample
from benchmarks.memory import with_peak
from benchmarks.section import markdown_table, seconds_text
from benchmarks.stage import Stage, find_misses, measure_times
from benchmarks.stopwatch import Stopwatch
from benchmarks.usual_loop import UsualDataset, usual_model
from cellseg.data import CellDataset
from cellseg.models import get_model_mobilenetv2

ROWS = {
    "read_raw", "read_lzw", "cache", "mask_targets", "rpn_matching", "masks_to_rle_300",
    "masks_to_rle_500", "masks_to_rle_memory", "scores_100", "scores_uncapped", "merging",
    "records_io", "augment",
}  # fmt: skip


def make_stage(**options):
    """Return a row that adds one, by sleeping and by not."""

    def slowly(number):
        time.sleep(0.01)
        return number + 1

    plain = {
        "name": "add",
        "floor": 2,
        "make": lambda: 1,
        "reference": slowly,
        "ours": lambda number: number + 1,
        "equal": lambda reference, ours: reference == ours == 2,
    }
    return Stage(**plain | options)


def make_result(**changes):
    plain = {"reference_s": 1.0, "ours_s": 0.1, "ratio": 10.0, "equal": True}
    plain |= {"reference_mb": 400.0, "ours_mb": 20.0, "floor": 2, "measured": "2026-01-31"}
    return plain | {"misses": []} | changes


def test_every_row_of_the_table_is_measured():
    assert set(run.STAGES) >= ROWS
    assert len(run.STAGES) == len(run.EVERY_STAGE)


def test_every_module_is_told_of():
    names = {path.stem for path in run.FOLDER.glob("*.py")} - {"__init__"}
    assert [name for name in sorted(names) if f"`{name}`" not in benchmarks.__doc__] == []


def test_times_of_both_sides_and_their_ratio():
    result = measure_times(make_stage(runs=2))
    assert result["equal"] and result["reference_s"] >= 0.01
    assert result["ratio"] == result["reference_s"] / result["ours_s"] > 2


def test_results_that_differ_are_seen():
    assert not measure_times(make_stage(ours=lambda number: number), quick=True)["equal"]


@pytest.mark.parametrize(
    ("options", "changes", "misses"),
    [
        ({}, {}, []),
        ({"floor": None}, {"ratio": 0.1}, []),
        ({"floor": 12}, {}, ["10 times as fast, 12 wanted"]),
        ({}, {"equal": False}, ["the results differ"]),
        ({"memory_limit_mb": 20.5}, {}, []),
        ({"memory_limit_mb": 20}, {}, ["20 MB, less than 20 wanted"]),
        ({"memory_floor": 20}, {}, []),
        ({"memory_floor": 21}, {}, ["1/20 of the reference's memory, 1/21 wanted"]),
    ],
)
def test_misses(options, changes, misses):
    assert find_misses(make_stage(**options), make_result(**changes)) == misses


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0412, "41.2 ms"), (0.9999, "1 s"), (1.534, "1.53 s"), (1e-4, "0.1 ms")]
)
def test_seconds_have_three_digits(seconds, text):
    assert seconds_text(seconds) == text


def test_a_table_lines_up():
    assert markdown_table(["row", "s"], [["a", "10"], ["longer", "2"]]).splitlines() == [
        "| row    |  s |",
        "|--------|---:|",
        "| a      | 10 |",
        "| longer |  2 |",
    ]


def test_results_are_written_as_table_and_json(tmp_path):
    rows = {
        "augment": make_result(),
        "rpn_matching": make_result(ratio=3.0, misses=["3 times as fast, 10 wanted"]),
        "masks_to_rle_memory": make_result(floor=None, equal=False, reference_mb=None),
    }
    section = {"title": "Growth", "text": "Wanted: 1.1.", "header": ["", "power"]}
    section |= {"rows": [["time", "1.4"]], "misses": ["power 1.4"], "measured": "2026-01-31"}
    run.write_results(rows, {"growth": [section]}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == rows
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    times, memory = ["1 s", "100 ms", "10", "2"], ["400.0", "20.0"]
    assert ["`augment`", *times, *memory, "yes", "yes", "2026-01-31"] in lines
    assert [line[4:9] for line in lines if line[:1] == ["`masks_to_rle_memory`"]] == [
        ["", "", "20.0", "**no**", "yes"]
    ]
    assert "Missed: `rpn_matching`: 3 times as fast, 10 wanted." in text
    assert "| time |   1.4 |" in text and "Missed: power 1.4." in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "results.md",
        "steps.json",
    }


def test_names_are_picked_in_the_order_of_the_table():
    assert run.pick_names("growth,augment,read_raw") == ["read_raw", "augment", "growth"]
    assert run.pick_names(None)[-1] == "end_to_end"
    with pytest.raises(ValueError, match="there is no speed; there are read_raw"):
        run.pick_names("speed,read_raw")


def test_a_stopwatch_counts_inner_time_once():
    class Work:
        def inner(self):
            time.sleep(0.02)

        def outer(self):
            time.sleep(0.01)
            self.inner()
            return "done"

    watch, work = Stopwatch(), Work()
    with watch.watch([("outer", Work, "outer"), ("inner", Work, "inner")]):
        assert work.outer() == "done"
    assert 0.01 <= watch.seconds["outer"] < 0.02 <= watch.seconds["inner"]
    assert not hasattr(Work.outer, "__wrapped__")


@pytest.mark.parametrize("count", [1, 5, 16])
def test_made_cells_are_as_many_as_asked_for(count):
    instance_map, boxes, labels = cells_on_grid(count, 90)
    assert instance_map.shape == (1, 90, 90) and boxes.shape == (count, 4)
    assert torch.unique(instance_map).tolist() == list(range(count + 1))
    assert ((labels >= 1) & (labels <= 4)).all() and len(labels) == count
    for number, box in enumerate(boxes.long().tolist(), start=1):
        y, x = torch.where(instance_map[0] == number)
        assert box == [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def test_jittered_boxes_stay_near_their_cells():
    boxes = torch.tensor([[10.0, 10, 30, 50], [60, 20, 70, 30]])
    moved = jittered_boxes(boxes, 5, shift=0.1)
    sides = torch.tensor([[20.0, 40, 20, 40], [10, 10, 10, 10]])
    for index, box in enumerate(moved):
        assert ((box - boxes[index % 2]).abs() <= 0.1 * sides[index % 2]).all()


def test_made_predictions_are_blobs_of_the_sizes_of_cells():
    masks, boxes = predicted_masks(20, 100)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert masks.shape == (20, 1, 28, 28) and boxes.min() >= 0 and boxes.max() <= 100
    assert sides.min() >= 16 and sides.max() <= 40
    assert 0.3 < (masks > 0.5).float().mean() < 0.8


def test_mask_targets_agree():
    data = stages_model.make_rois(cells=7, side=80, rois=9)
    reference, ours = stages_model.project_resized_stack(data), stages_model.sample_targets(data)
    assert reference.max() == 1 and run.STAGES["mask_targets"].equal(reference, ours)


def test_matches_agree_and_a_difference_is_seen():
    data = stages_model.make_anchors(cells=6, side=128)
    reference, ours = (stages_model.match(data, side) for side in ("reference", "ours"))
    assert stages_model.same_matches(reference, ours)
    ours[0][0][5] = 1 - ours[0][0][5]
    assert not stages_model.same_matches(reference, ours)


def test_pastes_agree_and_a_difference_is_seen():
    data = stages_model.make_predictions(6, 70)
    assert stages_model.paste_and_encode(data) == stages_model.crop_and_encode(data, "torchvision")
    assert stages_model.paste_and_encode_by_parts(data) == stages_model.paste_and_encode(data)
    rles = stages_model.crop_and_encode(data, "aligned")
    assert stages_model.agrees_with_full_frames(data, rles)
    assert not stages_model.agrees_with_full_frames(data, rles[::-1])


def test_result_files_agree_and_all_faults_are_found():
    folder = stages_files.make_files(images=2, records_per_image=150)
    reference, ours = stages_files.rewrite_by_decoding(folder), stages_files.rewrite_ours(folder)
    assert reference[1] == set(range(7, 300, 50))
    assert stages_files.same_files(reference, ours)
    assert not stages_files.same_files(reference, (ours[0], {7}, ours[2]))


def test_a_cached_sample_is_the_sample():
    sample = stages_files.make_cached(side=90)
    ours = stages_files.copy_from_cache(sample)
    assert run.STAGES["cache"].equal(run.STAGES["cache"].reference(sample), ours)
    assert stages_files.same_arrays(stages_files.copy(sample.arrays), ours)
    assert not stages_files.same_arrays((ours[0] + 1, *ours[1:]), ours)


def test_memory_is_seen_where_the_system_tells_it():
    kept = bytearray(60_000_000)
    result, peak = with_peak(lambda: len(b"x" * 40_000_000))
    assert len(kept) == 60_000_000 and result == 40_000_000
    if memory.IS_LINUX:
        assert 30 < peak < 60
        assert memory.added_peak_mb(lambda: b"x" * 10_000_000) < 30


def test_the_usual_dataset_holds_the_same_cells(tmp_path):
    ids = np.zeros((40, 50))
    ids[5:12, 8:20], ids[20:21, 30:31] = 3, 7
    image = make_image(40, 50).numpy().transpose(1, 2, 0)
    write_sample(tmp_path / "a", image, {2: ids})
    usual_image, usual = UsualDataset(tmp_path, 1, num_classes=3)[0]
    image, target = CellDataset(tmp_path, class_names=("x", "y"), channel_order="true")[0]
    assert torch.equal(usual_image, image / 255)
    assert usual["boxes"].tolist() == target["boxes"].tolist() == [[8, 5, 20, 12], [30, 20, 31, 21]]
    assert usual["labels"].tolist() == target["labels"].tolist() == [2, 2]
    assert torch.equal(
        usual["masks"], torch.stack([target["instance_map"][0] == k for k in (1, 2)])
    )


def test_both_sides_of_a_step_have_the_same_network_and_stubs_of_its_shapes():
    ours = get_model_mobilenetv2(5, weights=None, fpn_channels=8, head_width=16)
    usual = usual_model(ours, num_classes=5, side=64)
    for name, value in ours.state_dict().items():
        assert torch.equal(usual.state_dict()[name], value)
    squares = [(1, 5, 6, 20, 30), (2, 40, 30, 60, 50)]
    batch = [make_image(64, 64, squares)], [make_target(64, 64, squares)]
    losses = ours.train()(*batch)
    stubbed = end_to_end.stub_network(ours)(*batch)
    assert stubbed.keys() == losses.keys()
    assert all(torch.isfinite(value) for value in stubbed.values())
    assert stubbed["loss_mask"].item() == pytest.approx(np.log(2), abs=1e-4)

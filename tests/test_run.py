"""A run's folder, its identity, and checkpoints that can and cannot be used."""

import json
import os

import numpy as np
import pytest
import torch
from tiny_models import CLASSES, tiny_model, write_squares

from cellseg.coco import make_record, mask_to_rle, read_records
from cellseg.errors import CheckpointError, DataError, TrainingError
from cellseg.evaluation import evaluate_records, truth_from_targets
from cellseg.training import (
    EpochSummary,
    image_groups,
    load_model,
    open_run,
    read_checkpoint,
    read_held,
    read_history,
    read_prediction,
    read_truth,
    write_evaluation,
)
from cellseg.training.checkpoint import FORMAT, MARK, write_checkpoint
from cellseg.training.run import write_history

SAMPLES = {
    "a": (20, 32, [(1, 4, 5, 12, 13), (2, 20, 6, 28, 15)]),
    "b": (24, 30, [(2, 5, 4, 15, 12)]),
    "c": (28, 20, []),
}
RECIPE = {"epochs": 3, "learning_rate": 1e-3, "scale_range": (0.8, 1.25)}


@pytest.fixture
def dataset(tmp_path):
    return write_squares(tmp_path / "tissue" / "train", SAMPLES)


def open_it(root, dataset, *, model=None, train_ids="ab", **changes):
    settings = {"recipe": RECIPE} | changes
    pair = dataset.subset(list(train_ids)), dataset.subset(["c"])
    return open_run(root / "runs", model or tiny_model(), *pair, **settings)


def test_settings_tell_what_the_run_was_made_from(dataset, tmp_path):
    run = open_it(tmp_path, dataset, seed=4)
    stored = json.loads((run.path / "settings.json").read_text(encoding="utf-8"))
    assert run.path.parent == tmp_path / "runs"
    assert run.path.name == stored["run_name"] == f"mobilenetv2-{stored['identity'][:8]}"
    assert stored["model"] == tiny_model().spec and stored["provenance"] == "random weights"
    assert stored["trainable_parameters"] == 1_868_225
    assert (stored["class_names"], stored["num_classes"]) == (list(CLASSES), 3)
    assert (stored["train_ids"], stored["val_ids"]) == (["a", "b"], ["c"])
    assert stored["recipe"] == RECIPE | {"scale_range": [0.8, 1.25]}
    assert (stored["seed"], stored["channel_order"]) == (4, "true")
    assert stored["data"]["images"] == 3
    assert stored["data"]["cells_per_class"] == {"dark": 1, "light": 2}
    assert stored["data"]["source"] == "tissue" and stored["sample_data"] is False
    assert set(stored["versions"]) == {"cellseg", "torch", "torchvision", "python"}
    assert run.epochs_done == 0 and run.state == f"new run {run.path.name}"
    assert str(tmp_path) not in (run.path / "settings.json").read_text(encoding="utf-8")


def test_made_tissue_is_marked(dataset, tmp_path):
    run = open_it(tmp_path, dataset, sample_data=True)
    assert run.settings["sample_data"] is True
    assert run.settings["data"]["source"] == "made tissue"


def summary(epoch):
    return EpochSummary(
        epoch, 2 * epoch, 1e-3, 1.5, None, {"train": {"loss_mask": 1.5}, "val": {}}, None, None,
        None, None, {"dark": None}, None, 3.0, 4.0, 100.0,
    )  # fmt: skip


def test_the_same_call_finds_the_same_run(dataset, tmp_path):
    first = open_it(tmp_path, dataset)
    write_history(first.path, [summary(1), summary(2)])
    before = (first.path / "settings.json").read_bytes()
    again = open_it(tmp_path, dataset)
    assert again.path == first.path and again.settings == first.settings
    assert again.state == f"run {first.path.name}: 2 epochs done, going on from there"
    assert (first.path / "settings.json").read_bytes() == before


def test_the_run_is_found_with_data_and_weights_in_another_place(dataset, tmp_path):
    torch.save(tiny_model(norm="frozen").state_dict(), tmp_path / "own.pt")
    (tmp_path / "elsewhere").mkdir()
    torch.save(tiny_model(norm="frozen").state_dict(), tmp_path / "elsewhere" / "own.pt")
    moved = write_squares(tmp_path / "other" / "train", SAMPLES)
    first = open_it(tmp_path, dataset, model=tiny_model(weights=tmp_path / "own.pt"))
    again = open_it(tmp_path, moved, model=tiny_model(weights=tmp_path / "elsewhere" / "own.pt"))
    assert again.path == first.path


OTHERS = [
    ("another network", {"model": tiny_model(rpn_samples=9)}, "arguments.rpn_samples 256 -> 9"),
    ("another length", {"recipe": RECIPE | {"epochs": 9}}, "recipe.epochs 3 -> 9"),
    ("one more setting", {"recipe": RECIPE | {"crop": 96}}, "recipe.crop None -> 96"),
    ("another seed", {"seed": 1}, "seed 0 -> 1"),
    ("other training images", {"train_ids": "a"}, "data, train_ids"),
]


@pytest.mark.parametrize(("reason", "changes", "named"), OTHERS, ids=[case[0] for case in OTHERS])
def test_other_settings_are_another_run(reason, changes, named, dataset, tmp_path):
    first = open_it(tmp_path, dataset)
    assert open_it(tmp_path, dataset, **changes).path != first.path
    with pytest.raises(
        TrainingError, match=rf"is a run with other settings \({named}\); choose an"
    ):
        open_it(tmp_path, dataset, name=first.path.name, **changes)
    assert open_it(tmp_path, dataset).settings == first.settings


def test_a_run_may_hold_nothing_out(dataset, tmp_path):
    every = dataset.subset(["a", "b", "c"])
    run = open_run(tmp_path / "runs", tiny_model(), every, None, recipe=RECIPE)
    assert (run.settings["train_ids"], run.settings["val_ids"]) == (["a", "b", "c"], [])
    assert run.settings["data"]["images"] == 3
    assert run.settings["data"]["cells_per_class"] == {"dark": 1, "light": 2}


def test_groups_are_stored_and_do_not_make_another_run(dataset, tmp_path):
    plain = open_it(tmp_path, dataset)
    assert plain.settings["groups"] is None
    groups = {"c": 2, "b": 1, "a": 1}
    grouped = open_it(tmp_path / "other", dataset, groups=groups)
    assert grouped.settings["groups"] == groups and list(grouped.settings["groups"]) == list("abc")
    assert grouped.path.name == plain.path.name


def test_a_run_can_have_a_name_of_its_own(dataset, tmp_path):
    run = open_it(tmp_path, dataset, name="mine")
    assert run.path == tmp_path / "runs" / "mine" and run.settings["run_name"] == "mine"
    assert open_it(tmp_path, dataset, name="mine").settings == run.settings


def test_changed_pixels_are_another_run(dataset, tmp_path):
    first = open_it(tmp_path, dataset)
    changed = SAMPLES | {"b": (24, 30, [(2, 5, 4, 15, 13)])}
    other = write_squares(tmp_path / "changed" / "train", changed)
    assert open_it(tmp_path, other).path != first.path


def test_history_is_read_back_as_written(tmp_path):
    assert read_history(tmp_path) == []
    write_history(tmp_path, [summary(1), summary(2)])
    assert read_history(tmp_path) == [summary(1), summary(2)]


@pytest.mark.parametrize("line", ["{", "{}", '{"epoch": 1, "speed": 3}', "[]"])
def test_a_line_that_is_no_epoch_is_named(line, tmp_path):
    write_history(tmp_path, [summary(1)])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(TrainingError, match=r"metrics.jsonl, line 2 is no epoch .*; remove that l"):
        read_history(tmp_path)


def test_evaluation_is_written_for_the_report(tmp_path):
    mask = np.zeros((6, 9), dtype=bool)
    mask[1:4, 2:7] = True
    records = [
        make_record(5, 2, 0.25, mask_to_rle(mask)),
        make_record(5, 1, 0.5, mask_to_rle(mask)),
    ]
    target = {"instance_map": mask[None].astype(int), "labels": [1], "image_id": 5}
    truth = truth_from_targets([target], CLASSES)
    scored = evaluate_records(truth, records, score_threshold=0.4)
    paths = write_evaluation(tmp_path, truth, records, scored)
    assert read_records(tmp_path / "validation.json") == records[::-1]
    read = {path.name: json.loads(path.read_text()) for path in paths}
    assert read["scores.json"]["ap50"] == 1.0
    assert read["scores.json"]["ap50_per_class"] == {"dark": 1.0, "light": None}
    assert read["scores.json"]["intervals_per_class"]["dark"]["low"] == 1.0
    assert read["scores.json"]["nuclei_per_class"]["light"]["pq"] is None
    nuclei = read["scores.json"]["nuclei_intervals_per_class"]
    assert nuclei["dark"]["aji"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert nuclei["light"]["pq"] == {"value": None, "low": None, "high": None}
    assert scored.class_table().splitlines() == [
        "| | AP50 | from | to | PQ | from | to | DQ | SQ | AJI | Dice | F_d | F_c |",
        "|" + "---|" * 13,
        "| dark " + "| 1.000 " * 12 + "|",
        "| light " + "| - " * 12 + "|",
    ]
    # Settled, the two records are one nucleus: no false one beside it.
    assert read["scores.json"]["intervals"]["dq"]["value"] == 1.0
    assert read["confusion.json"] == {
        "matrix": [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
        "class_names": list(CLASSES),
        "score_threshold": 0.4,
        "iou_threshold": 0.5,
    }
    assert read["errors.json"]["kinds"]["wrong class"]["count"] == 1
    assert read_truth(tmp_path) == (truth, None)
    again = write_evaluation(tmp_path, truth, records, scored, groups={5: "slide"})
    assert again == paths and read_truth(tmp_path)[1] == {5: "slide"}


def test_a_run_remembers_its_prediction_and_the_latest_stands(dataset, tmp_path):
    run = open_it(tmp_path, dataset)
    assert read_prediction(run.path) == {}
    looks = {"views": "turns", "scales": (1.0, 1.5)}
    again = open_it(tmp_path, dataset, prediction=looks)
    assert again.path == run.path and again.settings["identity"] == run.settings["identity"]
    assert read_prediction(run.path) == looks | {"scales": [1.0, 1.5]}
    open_it(tmp_path, dataset)  # says nothing of it
    assert read_prediction(run.path)["views"] == "turns"
    open_it(tmp_path, dataset, prediction={"views": "d4"})
    assert read_prediction(run.path) == {"views": "d4"}
    changed = {"recipe": RECIPE | {"epochs": 9}, "name": run.path.name, "on_change": "continue"}
    open_it(tmp_path, dataset, **changed)
    assert read_prediction(run.path) == {"views": "d4"}
    assert read_prediction(tmp_path) == {}


def test_a_damaged_memory_of_the_prediction_is_named(tmp_path):
    (tmp_path / "settings.json").write_text('{"prediction": ["turns"]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"settings.json: prediction is \['turns'\]; write settin"):
        read_prediction(tmp_path)


def test_a_run_tells_what_it_held_out(dataset, tmp_path):
    run = open_it(tmp_path, dataset, groups={"a": 1, "b": 1, "c": 2})
    held = read_held(run.path)
    assert (held.sample_ids, held.class_names, held.channel_order) == (["c"], list(CLASSES), "true")
    assert held.records == run.path / "validation.json"
    again = held.dataset(dataset.train_dir)
    assert (again.sample_ids, again.image_ids) == (["c"], [3])
    assert image_groups(held.group_of, again) == {3: "2"}
    assert image_groups({"a": 1}, again) is None and image_groups(None, again) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "holds no settings.json; name the folder of a run"),
        ({"val_ids": "ab", "class_names": ["a"]}, "val_ids are 'ab'; remove the run's folder"),
        ({"val_ids": ["a"], "class_names": [3]}, r"class_names are \[3\]; remove"),
        ({"val_ids": [], "class_names": ["a"]}, "held no image out; name the run whose folds"),
    ],
)
def test_a_run_that_does_not_tell_is_named(settings, message, tmp_path):
    if settings is not None:
        (tmp_path / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_held(tmp_path)


def content(model, **more):
    return {"spec": model.spec, "provenance": "somewhere", "model": model.state_dict()} | more


def test_a_model_comes_back_with_all_that_it_needs(tmp_path):
    model = tiny_model(4, image_scale=2.0)
    settings = {"class_names": ["a", "b", "c"], "channel_order": "swapped"}
    write_checkpoint(tmp_path / "best.pt", content(model, settings=settings))
    again = load_model(tmp_path / "best.pt")
    assert not again.training
    assert again.spec == model.spec and again.transform.image_scale == 2.0
    assert again.provenance == "somewhere"
    assert again.class_names == ("a", "b", "c") and again.channel_order == "swapped"
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_the_average_is_loaded_where_there_is_one(tmp_path):
    model, average = tiny_model(), tiny_model(seed=8)
    write_checkpoint(tmp_path / "last.pt", content(model, ema=average.state_dict()))
    again = load_model(tmp_path / "last.pt")
    assert all(torch.equal(v, average.state_dict()[k]) for k, v in again.state_dict().items())
    assert again.class_names == () and again.channel_order == "undecided"


def test_a_model_starts_from_the_weights_of_a_checkpoint(tmp_path):
    source = tiny_model(seed=8)
    write_checkpoint(tmp_path / "best.pt", content(source))
    model = tiny_model(weights=tmp_path / "best.pt", norm="trained")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def mark(**more):
    return {"mark": MARK, "format": FORMAT} | more


CONTENTS = [
    ("foreign weights", lambda _: {"weight": torch.ones(2)}, "is not a checkpoint of cellseg; to"),
    ("a list", lambda _: [1, 2], "is not a checkpoint of cellseg"),
    ("a newer version's", lambda _: mark(format=FORMAT + 1),
     f"has format {FORMAT + 1}, this version reads up to {FORMAT}; install a newer cellseg"),
    ("one that runs code", lambda path: mark(spec=Harmful(path)), "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "make", "message"), CONTENTS, ids=[case[0] for case in CONTENTS]
)
def test_other_files_are_refused_by_name(reason, make, message, tmp_path):
    torch.save(make(tmp_path / "ran"), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"x.pt {message}"):
        load_model(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(share, tmp_path):
    path = tmp_path / "half.pt"
    write_checkpoint(path, content(tiny_model()))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"half.pt cannot be read .* use another one, or tra"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"last.pt does not exist; train first or check"):
        load_model(tmp_path / "last.pt")


def with_arguments(content, **arguments):
    return content | {"spec": content["spec"] | {"arguments": arguments}}


MISFITS = [
    ("weights of another network", lambda c: c | {"model": tiny_model(5).state_dict()}),
    ("a builder that is gone", lambda c: c | {"spec": {"builder": "get_model_x", "arguments": {}}}),
    ("an option that is gone", lambda c: with_arguments(c, num_classes=3, old=1)),
    ("arguments without classes", lambda c: with_arguments(c)),
    ("no weights", lambda c: {"spec": c["spec"]}),
    ("no spec", lambda c: {"model": c["model"]}),
]


@pytest.mark.parametrize(("reason", "change"), MISFITS, ids=[case[0] for case in MISFITS])
def test_a_checkpoint_that_contradicts_itself_is_named(reason, change, tmp_path):
    write_checkpoint(tmp_path / "x.pt", change(content(tiny_model())))
    with pytest.raises(CheckpointError, match=r"x.pt does not fit its own description: \S.*; use"):
        load_model(tmp_path / "x.pt")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(path, {"epoch": 2, "model": lambda: None})
    assert read_checkpoint(path)["epoch"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]

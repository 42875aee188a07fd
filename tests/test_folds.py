"""Training by folds: every image predicted by a model that did not see it, in one file."""

import json
from itertools import islice

import pytest
import torch
from tiny_models import tiny_model, write_squares
from typer.testing import CliRunner

from cellseg import cli
from cellseg.coco import read_records
from cellseg.errors import DataError, SettingsError, TrainingError
from cellseg.training import load_model, read_history
from cellseg.training.folds import RULE, folds_name, plan_folds, read_folds, train_folds
from cellseg.training.run import read_settings

SAMPLES = {
    "a": (40, 52, [(1, 4, 5, 18, 17), (2, 30, 20, 46, 38)]),
    "b": (52, 40, [(2, 5, 30, 21, 48), (1, 20, 8, 32, 20)]),
    "c": (44, 40, []),
    "d": (40, 48, [(1, 2, 2, 14, 16), (1, 14, 2, 27, 16), (2, 30, 10, 46, 30)]),
}
PARTS = {
    "transform": {"crop_size": 40},
    "loaders": {"batch_size": 2},
    "fit": {
        "epochs": 2, "learning_rate": 1e-3, "precision": "float32", "probe_images": 0,
    },
    "predict": {"score_threshold": 0.0},
}  # fmt: skip


def build():
    return tiny_model(rpn_samples=64, rois_per_image=32, train_proposals=16)


def by_pairs(dataset):
    """Group a with c and b with d."""
    return {name: "ac" if name in "ac" else "bd" for name in dataset.sample_ids}


def train(dataset, run_dir, **settings):
    folds = plan_folds(dataset, run_dir, by_pairs, folds=2)
    options = {"workers": 0, "device": "cpu", "progress": False, "train_on_all": True}
    return train_folds(build, dataset, folds, PARTS, run_dir=run_dir, **options | settings)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("release") / "train", SAMPLES)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Give the folder and the epochs of a training in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, list(train(dataset, folder))


@pytest.mark.slow
def test_each_fold_is_a_run_and_all_follow_the_folds(whole):
    folder, epochs = whole
    content = read_folds(folder)
    chosen = content["all"]["epochs"]
    names = [name for name, _ in epochs]
    assert names == ["fold1"] * 2 + ["fold2"] * 2 + ["all"] * chosen
    assert content["all"]["rule"] == RULE
    best = [fold["best_epoch"] for fold in content["folds"]]
    assert chosen == max(best)  # of two, the later middle one
    for fold in content["folds"]:
        history = read_history(folder / fold["name"])
        assert max(epoch.ap50 for epoch in history) == history[fold["best_epoch"] - 1].ap50
    settings = json.loads((folder / "all" / "settings.json").read_text(encoding="utf-8"))
    assert settings["train_ids"] == list("abcd") and settings["recipe"]["epochs"] == chosen


@pytest.mark.slow
def test_the_training_on_all_holds_nothing_out_and_is_not_scored(whole):
    folder = whole[0] / "all"
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["val_ids"] == [] and settings["data"]["images"] == 4
    assert settings["data"]["cells_per_class"] == {"dark": 4, "light": 3}
    for epoch in read_history(folder):
        assert epoch.val_loss is None and epoch.ap50 is None and epoch.train_ap50 is None
        assert epoch.losses["val"] == {} and "AP50" not in epoch.line()
    best, last = load_model(folder / "best.pt"), load_model(folder / "last.pt")
    for name, value in last.state_dict().items():
        assert torch.equal(best.state_dict()[name], value), name


@pytest.mark.slow
def test_every_image_is_held_out_once_with_its_group(whole):
    folder, _ = whole
    content = read_folds(folder)
    assert [fold["val_ids"] for fold in content["folds"]] in (
        [["a", "c"], ["b", "d"]],
        [["b", "d"], ["a", "c"]],
    )
    assert content["groups"] == {"a": "ac", "b": "bd", "c": "ac", "d": "bd"}
    assert read_settings(folder / "fold1")["groups"] == content["groups"]
    for fold in content["folds"]:
        settings = json.loads((folder / fold["name"] / "settings.json").read_text())
        assert settings["val_ids"] == fold["val_ids"]
        assert not set(settings["train_ids"]) & set(fold["val_ids"])


@pytest.mark.slow
def test_records_carry_the_ids_of_the_whole_data_set(whole):
    folder, _ = whole
    number = dict(zip("abcd", (1, 2, 3, 4), strict=True))
    joined = read_records(folder / "oof.json")
    parts = []
    for fold in read_folds(folder)["folds"]:
        records = read_records(folder / fold["name"] / "validation.json")
        assert {record["image_id"] for record in records} <= {number[i] for i in fold["val_ids"]}
        parts += records
    assert joined and sorted(map(json.dumps, joined)) == sorted(map(json.dumps, parts))
    assert 0 <= read_folds(folder)["oof"]["ap50"] <= 1


@pytest.mark.slow
def test_a_finished_training_is_not_done_again(dataset, whole):
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.glob("fold*/*.pt")}
    kept = (folder / "fold1" / "validation.json").stat().st_mtime_ns
    assert list(train(dataset, folder)) == []
    assert {path: path.stat().st_mtime_ns for path in folder.glob("fold*/*.pt")} == before
    assert (folder / "fold1" / "validation.json").stat().st_mtime_ns == kept


@pytest.mark.slow
@pytest.mark.parametrize("epochs_before", [1, 2, 3, 4])
def test_an_interrupted_training_goes_on_where_it_was(epochs_before, dataset, whole, tmp_path):
    folder, expected = whole
    first = train(dataset, tmp_path)
    found = [name for name, _ in islice(first, epochs_before)]
    first.close()
    found += [name for name, _ in train(dataset, tmp_path)]
    assert found == [name for name, _ in expected]
    for name in ("oof.json", "folds.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_folds_are_found_again_without_grouping_anew(dataset, tmp_path):
    made = plan_folds(dataset, tmp_path, by_pairs, folds=2)
    assert plan_folds(dataset, tmp_path, None, folds=2) == made


@pytest.mark.parametrize("changes", [{"folds": 3}, {"seed": 1}])
def test_other_folds_are_refused(changes, dataset, tmp_path):
    plan_folds(dataset, tmp_path, by_pairs, folds=2)
    with pytest.raises(TrainingError, match=r"folds.json is of other .* choose another name"):
        plan_folds(dataset, tmp_path, by_pairs, **{"folds": 2} | changes)
    with pytest.raises(TrainingError, match=r"of other samples"):
        plan_folds(dataset.subset(["a", "b"]), tmp_path, by_pairs, folds=2)


def test_more_folds_than_groups_are_refused(dataset, tmp_path):
    with pytest.raises(SettingsError, match="folds is 3 for 4 samples in 2 groups"):
        plan_folds(dataset, tmp_path / "run", by_pairs, folds=3)
    assert not (tmp_path / "run").exists()


def test_a_file_without_folds_is_named(tmp_path):
    (tmp_path / "folds.json").write_text('{"folds": [1]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"folds.json holds no folds; remove"):
        read_folds(tmp_path)


def test_the_default_name_says_builder_and_folds(dataset):
    name = folds_name(build(), dataset, PARTS, 2, 0)
    assert name.startswith("mobilenetv2-2folds-")
    assert name == folds_name(build(), dataset, PARTS, 2, 0)
    others = {
        folds_name(build(), dataset, PARTS, 2, 1),
        folds_name(build(), dataset.subset(["a"]), PARTS, 2, 0),
        folds_name(build(), dataset, PARTS | {"fit": {"epochs": 3}}, 2, 0),
    }
    assert len(others | {name}) == 4


def command(*arguments):
    return CliRunner().invoke(cli.app, ["train", *(str(argument) for argument in arguments)])


@pytest.mark.slow
def test_the_command_trains_all_folds_and_then_on_all(dataset, tmp_path):
    options = (
        "--folds", 2, "--train-on-all", "--class-names", "dark,light", "--runs-dir", tmp_path,
        "--preset", "quick", "--fpn-channels", 16, "--head-width", 32, "--network-size", 40,
        "--epochs", 1, "--set", "draws_per_image=1", "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    done = command(dataset.train_dir, *options)
    assert done.exit_code == 0, done.output
    for name in ("fold1", "fold2", "all"):
        assert f"{name}, epoch 1: loss" in done.output
    (run_dir,) = tmp_path.glob("mobilenetv2-2folds-*")
    assert f"run folder: {run_dir}; out of fold: AP50 " in done.output
    assert (run_dir / "oof.json").exists() and (run_dir / "all" / "best.pt").exists()
    again = command(dataset.train_dir, *options)
    assert again.exit_code == 0 and "epoch 1: loss" not in again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", 2, "--val-ids", "a"], "--folds holds out every image; leave out --val-ids"),
        (["--train-on-all"], "--train-on-all comes after --folds; say how many"),
        (["--folds", 2, "--groups", "random"], "--folds keeps together what is alike; leave out"),
        (["--groups", "similar"], "--groups is 'similar'; use one of alike, random"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, dataset, tmp_path):
    done = command(dataset.train_dir, *options, "--runs-dir", tmp_path)
    assert isinstance(done.exception, SettingsError) and message in str(done.exception)

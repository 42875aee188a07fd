"""A run in pieces is the run in one go, bit for bit; another run in its place is noticed."""

import json
import os
import random
import signal

import numpy as np
import pytest
import survival
import torch
from survival import (
    STEPS_PER_EPOCH,
    after_steps,
    assert_same_run,
    quick_model,
    send,
    train,
    without_clock,
)  # fmt: skip
from tiny_models import tiny_model

from cellseg.errors import CheckpointError, SettingsError, TrainingError
from cellseg.models import get_model_resnext50
from cellseg.training import TrainingInterrupted, open_run, read_checkpoint, read_history
from cellseg.training.generators import generator_states, restore_generators

if os.name == "nt":
    pytest.skip("signals are those of Unix", allow_module_level=True)

pytestmark = pytest.mark.slow

STEPS = 2 * STEPS_PER_EPOCH
SCORED = "cellseg.training.epoch_scores.score_records"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tissue") / "train"
    survival.make_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return the folder of two epochs in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert len(list(train(data, folder))) == 2
    return folder


def position(run_dir):
    return tuple(read_checkpoint(run_dir / "last.pt")["position"].values())


def test_stopped_after_every_step_it_is_the_same_run(data, whole, tmp_path):
    stops = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    for step in range(STEPS):
        model = quick_model()
        with torch.no_grad():  # whatever a new kernel holds, the state replaces it
            for parameter in model.parameters() if step else ():
                parameter.add_(1)
        after_steps(model, 0, send(stops[step % 3]))
        with pytest.raises(TrainingInterrupted, match=r"stopped by SIG\w+ in epoch \d after batch"):
            list(train(data, tmp_path, model=model, workers=2 * (step % 2)))
        epoch, within = divmod(step, STEPS_PER_EPOCH)
        batches = 5 if within == 2 else 2 * (within + 1)
        assert position(tmp_path) == (epoch, batches, step + 1)
    assert [summary.epoch for summary in train(data, tmp_path)] == [2]  # validated, not trained
    assert_same_run(tmp_path, whole)


class Broken(Exception):
    """Whatever may go wrong."""


def breaks():
    raise Broken


@pytest.mark.parametrize(
    ("reason", "step", "workers", "save_every"),
    [
        ("before the first step: from the first weights", 0, (0, 0), 600),
        ("within the first epoch, never saved in it", 2, (0, 2), 600),
        ("within the first epoch, saved at each step", 2, (2, 0), 0),
        ("at the end of an epoch", 3, (0, 2), 600),
        ("within the last epoch", 5, (2, 0), 0),
    ],
)
def test_broken_off_by_an_error_it_is_the_same_run(
    reason, step, workers, save_every, data, whole, tmp_path
):
    model = quick_model()
    after_steps(model, step, breaks)
    with pytest.raises(Broken):
        list(train(data, tmp_path, model=model, workers=workers[0], save_every=save_every))
    saved = step if not save_every else step // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    assert position(tmp_path)[2] == saved
    # The same model in memory, changed by what was lost, as in a notebook's cell run again.
    model._forward_pre_hooks.clear()
    list(train(data, tmp_path, model=model, workers=workers[1]))
    assert_same_run(tmp_path, whole)


def test_stopped_at_the_ends_of_epochs_it_is_the_same_run(data, whole, tmp_path):
    for epoch in (1, 2):
        epochs = train(data, tmp_path, workers=2 * (epoch % 2))
        assert next(epochs).epoch == epoch
        epochs.close()
    assert list(train(data, tmp_path)) == []
    assert_same_run(tmp_path, whole)


def test_a_stop_while_validating_comes_at_once_and_trains_nothing_again(
    data, whole, tmp_path, monkeypatch
):
    def stopped(*arguments, **options):
        send(signal.SIGTERM)()
        raise AssertionError("not reached")

    monkeypatch.setattr(SCORED, stopped)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM in epoch 1 after batch 5"):
        list(train(data, tmp_path))
    monkeypatch.undo()
    assert position(tmp_path) == (0, 5, 3)
    assert [summary.epoch for summary in train(data, tmp_path)] == [1, 2]
    assert_same_run(tmp_path, whole)


def test_a_time_budget_that_is_up_is_not_trained_past(data, tmp_path, monkeypatch):
    budget = {"epochs": None, "time_budget": 1e-6}
    with monkeypatch.context() as patch:
        patch.setattr(SCORED, lambda *_: breaks())
        with pytest.raises(Broken):
            list(train(data, tmp_path, **budget))
    assert [summary.step for summary in train(data, tmp_path, **budget)] == [1]


def test_a_finished_run_trains_nothing_and_changes_nothing(data, whole):
    names = ("last.pt", "previous.pt", "best.pt", "metrics.jsonl")
    before = [(whole / name).read_bytes() for name in names]
    assert list(train(data, whole)) == []
    assert [(whole / name).read_bytes() for name in names] == before


def test_the_last_states_are_kept_as_asked(data, tmp_path):
    list(train(data, tmp_path, epochs=4, validate_every=9, keep_checkpoints=2))
    kept = sorted(path.name for path in tmp_path.glob("epoch_*.pt"))
    assert kept == ["epoch_003.pt", "epoch_004.pt"]
    assert read_checkpoint(tmp_path / "epoch_003.pt")["position"]["epoch"] == 3
    assert read_checkpoint(tmp_path / "previous.pt")["position"]["batch"] == 5


def test_generators_go_on_where_they_were():
    states, draws = generator_states(), []
    for _ in range(2):
        draws.append((torch.rand(2).tolist(), np.random.rand(), random.random()))
        restore_generators(states)
    assert draws[0] == draws[1]
    random.gauss(0, 1)  # leaves half of a pair behind, which is state, too
    states = generator_states()
    draws = [random.gauss(0, 1), restore_generators(states), random.gauss(0, 1)]
    assert draws[0] == draws[2]


def test_another_number_of_batches_begins_the_epoch_anew(data, tmp_path):
    model = quick_model()
    after_steps(model, 1, send(signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        list(train(data, tmp_path, model=model))
    assert position(tmp_path) == (0, 4, 2)
    rows = list(train(data, tmp_path, batch_size=5, accumulate=1))
    assert [(row.epoch, row.step) for row in rows] == [(1, 3), (2, 4)]


def test_a_changed_decay_is_used_after_going_on(data, tmp_path):
    next(train(data, tmp_path, weight_decay=0.1))
    list(train(data, tmp_path, weight_decay=0.3, epochs=2))
    groups = read_checkpoint(tmp_path / "last.pt")["optimiser"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


# The run's folder: what may go on under its name.

RECIPE = {"epochs": 2, "learning_rate": 1e-3}


def open_it(root, data, *, model=None, train_ids="abcde", **changes):
    dataset = survival.CellDataset(data, class_names=("dark", "light"), channel_order="true")
    pair = dataset.subset(list(train_ids)), dataset.subset(["v"])
    settings = {"recipe": RECIPE, "name": "mine"} | changes
    return open_run(root, model or tiny_model(), *pair, **settings)


CHANGES = [
    ("a longer recipe", {"recipe": RECIPE | {"epochs": 5}}, "recipe.epochs", 2, 5),
    ("another seed", {"seed": 3}, "seed", 0, 3),
    ("other images", {"train_ids": "abc"}, "train_ids", list("abcde"), list("abc")),
]


@pytest.mark.parametrize(("reason", "change", "name", "old", "new"), CHANGES, ids=str)
def test_changes_are_refused_or_written_down(reason, change, name, old, new, data, tmp_path):
    first = open_it(tmp_path, data)
    with pytest.raises(TrainingError, match=rf"other settings \(.*{name}.*on_change='continue'"):
        open_it(tmp_path, data, **change)
    assert open_it(tmp_path, data).settings == first.settings
    run = open_it(tmp_path, data, on_change="continue", **change)
    (entry,) = run.settings["changes"]
    assert (entry["from"][name], entry["to"][name], entry["epochs_done"]) == (old, new, 0)
    assert run.settings["started"] == first.settings["started"]
    assert json.loads((run.path / "settings.json").read_text()) == run.settings
    assert open_it(tmp_path, data, **change).settings == run.settings  # no word needed any more


NETWORKS = [
    ("another network", {"model": tiny_model(train_proposals=9)}, "arguments.train_proposals"),
    ("another number of classes", {"model": tiny_model(4)}, "arguments.num_classes"),
]


@pytest.mark.parametrize(("reason", "change", "name"), NETWORKS, ids=[case[0] for case in NETWORKS])
def test_another_model_cannot_go_on(reason, change, name, data, tmp_path):
    first = open_it(tmp_path, data)
    with pytest.raises(TrainingError, match=rf"\(with another {name} no run can go on"):
        open_it(tmp_path, data, on_change="continue", **change)
    assert open_it(tmp_path, data).settings == first.settings


def test_a_state_of_another_number_of_classes_is_refused(data, whole):
    with pytest.raises(CheckpointError, match=r"last.pt was written by .*'num_classes': 3"):
        next(train(data, whole, model=quick_model(num_classes=4)))


def test_a_word_that_is_none_is_named(data, tmp_path):
    with pytest.raises(SettingsError, match="on_change='anew'; use refuse or continue"):
        open_it(tmp_path, data, on_change="anew")


def test_another_backbone_is_another_run(data, tmp_path):
    other = get_model_resnext50(3, weights=None, fpn_channels=16, head_width=32)
    first = open_it(tmp_path, data, name=None)
    assert open_it(tmp_path, data, name=None, model=other).path != first.path
    assert open_it(tmp_path, data, name=None).path == first.path


def test_metrics_hold_what_the_state_holds(whole):
    rows = [without_clock(row) for row in read_checkpoint(whole / "last.pt")["history"]]
    assert rows == [without_clock(vars(summary)) for summary in read_history(whole)]

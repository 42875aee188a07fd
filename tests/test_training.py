"""The training loop: what a run is a function of, what it writes, and where it stops."""

import json
import math
from dataclasses import asdict
from itertools import islice

import pytest
import torch
from tiny_models import CLASSES, tiny_model, write_squares

from cellseg.data import TrainTransform, make_loaders
from cellseg.errors import CheckpointError, SettingsError, TrainingError
from cellseg.evaluation import dataset_truth, score_records
from cellseg.training import fit, load_model, read_history, validate
from cellseg.training.validation import forked_seed

pytestmark = pytest.mark.slow
CLOCKED = ("seconds", "images_per_second", "peak_memory_mb")
SAMPLES = {
    "a": (48, 64, [(1, 4, 5, 18, 17), (2, 30, 20, 46, 38)]),
    "b": (64, 48, [(2, 5, 40, 21, 58), (1, 25, 8, 26, 9)]),
    "c": (56, 62, []),
    "d": (40, 60, [(1, 2, 2, 14, 16), (1, 14, 2, 27, 16), (2, 40, 10, 58, 30)]),
    "e": (48, 60, [(1, 30, 6, 44, 20)]),
    "f": (60, 44, [(1, 4, 30, 18, 44), (2, 20, 4, 38, 20)]),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("release") / "train", SAMPLES)


def loaders(dataset, *, workers=0, batch_size=2, train_ids="abcd"):
    transform = TrainTransform(crop_size=40)
    train = dataset.subset(list(train_ids), transform=transform)
    return make_loaders(train, dataset.subset(["e", "f"]), batch_size=batch_size, workers=workers)


def quick_model(**options):
    return tiny_model(rpn_samples=64, rois_per_image=32, train_proposals=16, **options)


def run(dataset, run_dir, *, model=None, workers=0, batch_size=2, train_ids="abcd", **settings):
    """Return the generator of a short run with settings that suit a tiny one."""
    pair = loaders(dataset, workers=workers, batch_size=batch_size, train_ids=train_ids)
    model = model or quick_model()
    quick = {"epochs": 3, "learning_rate": 1e-3, "precision": "float32", "probe_images": 1}
    return fit(model, *pair, run_dir=run_dir, device="cpu", progress=False, **quick | settings)


def without_clock(summaries):
    return [
        {key: value for key, value in asdict(summary).items() if key not in CLOCKED}
        for summary in summaries
    ]


def assert_same_state(path, other):
    """Compare two checkpoints bit by bit, times aside."""
    first, second = (torch.load(p, weights_only=True) for p in (path, other))
    assert first.keys() == second.keys()
    for key in ("model", "ema"):
        for name, value in first.get(key, {}).items():
            assert torch.equal(value, second[key][name]), name
    if "optimiser" in first:
        states = first["optimiser"]["state"], second["optimiser"]["state"]
        for index, state in states[0].items():
            assert all(torch.equal(value, states[1][index][k]) for k, value in state.items())
    plain = ("epoch", "position", "ema_updates", "best_ap50", "ap50", "spec")
    assert all(first.get(key) == second.get(key) for key in plain)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Give the folder and the summaries of three epochs in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, list(run(dataset, folder))


def test_a_run_yields_an_epoch_at_a_time(whole):
    _, summaries = whole
    assert [summary.epoch for summary in summaries] == [1, 2, 3]
    assert [summary.step for summary in summaries] == [2, 4, 6]
    # Steps 2, 4 and 6 begin at 1/6, 3/6 and 5/6 of the run: past the warm-up of 5 %.
    for summary, done in zip(summaries, (1 / 6, 3 / 6, 5 / 6), strict=True):
        cosine = 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))
        assert summary.learning_rate == pytest.approx(1e-3 * (0.01 + 0.99 * cosine))
    for summary in summaries:
        for part, total in (("train", summary.train_loss), ("val", summary.val_loss)):
            assert len(summary.losses[part]) == 5
            assert sum(summary.losses[part].values()) == pytest.approx(total)
        assert 0 <= summary.ap <= summary.ap50 <= 1 and 0 <= summary.train_ap50 <= 1
        assert set(summary.ap50_per_class) == set(CLASSES)
        assert summary.images_per_second == pytest.approx(4 / summary.seconds)


def test_metrics_lines_are_the_summaries(whole):
    folder, summaries = whole
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [asdict(summary) for summary in summaries]
    assert read_history(folder) == summaries


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_run(workers, dataset, whole, tmp_path):
    folder, expected = whole
    torch.manual_seed(99)  # what was drawn before does not matter
    found = list(run(dataset, tmp_path / "again", workers=workers))
    assert without_clock(found) == without_clock(expected)
    assert_same_state(tmp_path / "again" / "last.pt", folder / "last.pt")


def test_another_seed_gives_another_run(dataset, whole, tmp_path):
    found = next(run(dataset, tmp_path, seed=1))
    assert found.train_loss != whole[1][0].train_loss


def test_a_run_draws_nothing_from_outside(dataset, tmp_path):
    epochs = run(dataset, tmp_path, epochs=1)
    torch.manual_seed(5)
    before = torch.rand(3)
    torch.manual_seed(5)
    with forked_seed(7, torch.device("cpu")):
        list(epochs)
    assert torch.equal(torch.rand(3), before)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(dataset, whole, tmp_path):
    folder, expected = whole
    first = run(dataset, tmp_path)
    found = list(islice(first, 1))
    first.close()
    # A new kernel: weights drawn anew, which those of the checkpoint replace.
    model = quick_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    found += list(run(dataset, tmp_path, model=model))
    assert without_clock(found) == without_clock(expected)
    for name in ("last.pt", "best.pt"):
        assert_same_state(tmp_path / name, folder / name)
    assert read_history(tmp_path) == found


def test_a_run_broken_off_within_an_epoch_goes_on_from_the_last_save(dataset, whole, tmp_path):
    folder, expected = whole
    model = quick_model()
    calls = []

    def interrupt(module, inputs):
        calls.append(module.training)
        if calls.count(True) == 4:  # the second batch of the second epoch
            raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(run(dataset, tmp_path, model=model))
    found = list(run(dataset, tmp_path))
    assert [summary.epoch for summary in found] == [2, 3]
    assert without_clock(read_history(tmp_path)) == without_clock(expected)
    assert_same_state(tmp_path / "last.pt", folder / "last.pt")


def test_a_line_past_the_last_checkpoint_is_written_anew(dataset, tmp_path):
    list(run(dataset, tmp_path, epochs=1))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text(encoding="utf-8") * 2, encoding="utf-8")
    list(run(dataset, tmp_path, epochs=2))
    assert [summary.epoch for summary in read_history(tmp_path)] == [1, 2]


def test_a_finished_run_yields_nothing(dataset, whole):
    folder, _ = whole
    before = (folder / "last.pt").read_bytes()
    assert list(run(dataset, folder)) == []
    assert (folder / "last.pt").read_bytes() == before


def test_a_run_is_not_written_over(dataset, whole):
    with pytest.raises(TrainingError, match=r"last.pt exists; use resume='auto' to go on, or ano"):
        next(run(dataset, whole[0], resume="never"))


def test_another_models_run_is_not_gone_on_with(dataset, whole):
    with pytest.raises(CheckpointError, match=r"last.pt was written by .*choose another run_dir"):
        next(run(dataset, whole[0], model=quick_model(fpn_channels=8)))


def test_a_run_goes_on_with_weights_from_another_place(dataset, tmp_path):
    source = tiny_model(norm="frozen")
    for name in ("here.pt", "there.pt"):
        torch.save(source.state_dict(), tmp_path / name)
    for name, expected in (("here.pt", [1]), ("there.pt", [2])):
        model = quick_model(weights=tmp_path / name, norm="frozen")
        found = islice(run(dataset, tmp_path / "run", model=model, epochs=2), 1)
        assert [summary.epoch for summary in found] == expected


def test_best_holds_the_averaged_weights_of_the_best_epoch(dataset, tmp_path):
    best = -1.0
    for summary in run(dataset, tmp_path, epochs=2):
        kept = torch.load(tmp_path / "best.pt", weights_only=True)
        last = torch.load(tmp_path / "last.pt", weights_only=True)
        assert last["ema_updates"] == last["position"]["step"] == summary.step
        if summary.ap50 > best:
            best = summary.ap50
            assert kept["epoch"] == summary.epoch and kept["ap50"] == best
            assert all(torch.equal(v, last["ema"][k]) for k, v in kept["model"].items())
            assert any(not torch.equal(v, last["model"][k]) for k, v in kept["model"].items())
    assert torch.load(tmp_path / "best.pt", weights_only=True)["ap50"] == best


def test_what_is_scored_is_what_best_predicts(dataset, whole):
    """The AP50 of the summary comes out of `best.pt` in a new kernel, from images alone."""
    folder, summaries = whole
    model = load_model(folder / "best.pt")
    val_loader = loaders(dataset)[1]
    result = validate(model, val_loader, progress=False)
    best = max(summaries, key=lambda summary: (summary.ap50, -summary.epoch))
    truth = dataset_truth(val_loader.dataset)
    assert score_records(truth, result.records).ap50 == best.ap50
    assert result.losses == best.losses["val"]


def test_validation_comes_every_k_epochs_and_at_the_end(dataset, tmp_path):
    summaries = list(run(dataset, tmp_path, validate_every=2, probe_images=1))
    assert [summary.val_loss is not None for summary in summaries] == [False, True, True]
    assert summaries[0].ap50 is summaries[0].train_ap50 is None
    assert summaries[0].ap50_per_class == {} and summaries[0].losses["val"] == {}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["ap50"] is None


@pytest.mark.parametrize(
    ("reason", "settings", "steps"),
    [
        ("two batches of one are one step", {"batch_size": 1, "accumulate": 2}, 2),
        ("the last step takes the batches that are left", {"batch_size": 1, "accumulate": 3}, 2),
        ("more than there are batches", {"batch_size": 2, "accumulate": 9}, 1),
        ("a smaller last batch is not lost", {"batch_size": 3}, 2),
    ],
)  # fmt: skip
def test_steps_of_an_epoch(reason, settings, steps, dataset, tmp_path):
    summary = next(run(dataset, tmp_path, epochs=1, probe_images=0, **settings))
    assert summary.step == steps
    assert summary.train_ap50 is None


def test_a_time_budget_ends_the_run_and_counts_what_was_trained_before(dataset, tmp_path):
    first = next(run(dataset, tmp_path, epochs=None, time_budget=1000.0, validate_every=9))
    assert (first.step, first.val_loss) == (2, None)
    budget = {"epochs": None, "time_budget": first.seconds + 1e-6, "validate_every": 9}
    last = list(run(dataset, tmp_path, **budget))
    # The time is up after one batch of the second epoch, which is the last: it is validated.
    assert [(summary.epoch, summary.step) for summary in last] == [(2, 3)]
    assert last[0].val_loss is not None
    assert list(run(dataset, tmp_path, **budget)) == []


def test_a_loss_that_is_not_finite_stops_the_run_with_its_place(dataset, tmp_path):
    model = quick_model()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.fill_(math.nan)
    with (
        pytest.warns(UserWarning, match=r"not finite in epoch 1, batch 1 \(images \[\d, \d\]; "),
        pytest.raises(
            TrainingError,
            match=r"not finite in 2 steps in a row, up to epoch 1, batch 2 \(images \[1, 2, 3, 4\]"
            r"; .*loss_classifier nan.*lower learning_rate or use precision='float32'",
        ),
    ):
        next(run(dataset, tmp_path, model=model))


def test_a_learning_rate_without_bounds_stops_the_run(dataset, tmp_path):
    with (
        pytest.warns(UserWarning, match="step skipped"),
        pytest.raises(TrainingError, match=r"not finite in 2 steps in a row, up to epoch \d"),
    ):
        list(run(dataset, tmp_path, learning_rate=1e12, clip_norm=1e12, epochs=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": None}, "give epochs or time_budget"),
        ({"epochs": 0}, "epochs is 0; give 1 or more"),
        ({"time_budget": -5.0}, "time_budget is -5.0; give seconds, more than 0"),
        ({"time_budget": math.nan}, "time_budget is nan; give seconds"),
        ({"learning_rate": 0}, "learning_rate is 0; give more than 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan; give more than 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; give 0 or more"),
        ({"warmup": 1.5}, "warmup is 1.5; give 0 to 1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; give more than 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; give 0 or more, and less than 1"),
        ({"ema_decay": -0.5}, "ema_decay is -0.5; give 0 or more"),
        ({"accumulate": 0}, "accumulate is 0; give 1 or more"),
        ({"validate_every": 0}, "validate_every is 0; give 1 or more"),
        ({"probe_images": -1}, "probe_images is -1; give 0 or more"),
        ({"save_every": -1.0}, "save_every is -1.0; give 0 or more"),
        ({"keep_checkpoints": -1}, "keep_checkpoints is -1; give 0 or more"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"precision": "int8"}, "precision is 'int8'; use one of auto, float32"),
        ({"resume": "maybe"}, "resume is 'maybe'; use auto or never"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_setting_that_cannot_work_is_named(settings, message, dataset, tmp_path):
    with pytest.raises(SettingsError, match=message):
        next(run(dataset, tmp_path, **settings))


def test_bfloat16_gives_nearly_the_same_first_loss(dataset, whole, tmp_path):
    found = next(run(dataset, tmp_path, precision="bfloat16"))
    assert found.train_loss == pytest.approx(whole[1][0].train_loss, rel=0.1)
    assert math.isfinite(found.val_loss)


def test_one_image_is_learned_by_heart(tmp_path):
    squares = [(1, 6, 6, 20, 22), (2, 40, 8, 56, 22), (1, 10, 36, 26, 52), (2, 44, 34, 62, 54)]
    dataset = write_squares(tmp_path / "train", {"only": (64, 80, squares)})
    pair = make_loaders(dataset, dataset, batch_size=1, workers=0, draws_per_image=30)
    epochs = fit(
        tiny_model(), *pair, run_dir=tmp_path / "run", epochs=5, learning_rate=3e-3,
        weight_decay=0.0, ema_decay=0.9, validate_every=4, precision="float32", device="cpu",
        progress=False,
    )  # fmt: skip
    last = list(epochs)[-1]
    assert last.ap50 == last.train_ap50 == last.ap50_100 == 1.0
    assert last.ap50_per_class == {"dark": 1.0, "light": 1.0}
    assert last.train_loss < 0.7 and last.val_loss < 1.2

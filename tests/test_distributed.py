"""Several processes that train one model, on the CPU by gloo: alike, exact, and ending together."""

import importlib
import json
import os
import signal
import threading
from dataclasses import asdict

import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_image, make_target

from cellseg.data import EpochSampler, TrainTransform
from cellseg.data.loaders import OrderedSampler
from cellseg.errors import SettingsError, TrainingError
from cellseg.models import BUILDERS
from cellseg.training import (
    TrainingInterrupted,
    fit,
    launch,
    read_checkpoint,
    read_history,
    validate,
)
from cellseg.training.distributed import ALONE, LOST, join_ranks
from cellseg.training.outcome import read_outcome

launcher = importlib.import_module("cellseg.training.launch")  # its name is a function's, too
CLOCKED = ("seconds", "images_per_second", "peak_memory_mb")
needs_signals = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def without_clock(row):
    return {key: value for key, value in row.items() if key not in CLOCKED}


@settings(max_examples=200, deadline=None)
@given(
    num_images=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    draws=st.integers(1, 3),
    count=st.integers(1, 9),
    epoch=st.integers(0, 3),
    start=st.integers(0, 3),
)
def test_shares_are_the_batches_of_one_process(num_images, batch_size, draws, count, epoch, start):
    def sampler(rank, of):
        made = EpochSampler(num_images, batch_size, seed=7, draws_per_image=draws)
        made.deal(rank, of)
        made.set_epoch(epoch, start_batch=start)
        return made

    whole = list(sampler(0, 1))
    parts = [sampler(rank, count) for rank in range(count)]
    dealt = [list(part) for part in parts]
    assert all(len(part) == len(whole) for part in dealt)  # every process takes every step
    assert {len(part) for part in parts} == {len(sampler(0, 1))}
    for step, batch in enumerate(whole):
        shares = [part.share(start + step) for part in parts]
        assert all(size == len(batch) for _, size in shares)
        sizes = [mine for mine, _ in shares]
        assert sum(sizes) == len(batch) and max(sizes) - min(sizes) <= 1
        counted = [part[step][:size] for part, size in zip(dealt, sizes, strict=True)]
        assert sorted(key for keys in counted for key in keys) == sorted(batch)
        for part, size in zip(dealt, sizes, strict=True):
            assert len(part[step]) == max(size, 1)  # one of weight 0 keeps step


@given(num_images=st.integers(0, 30), count=st.integers(1, 9))
def test_validation_images_are_dealt_out_once(num_images, count):
    dealt = []
    for rank in range(count):
        sampler = OrderedSampler(num_images)
        sampler.deal(rank, count)
        dealt.append(list(sampler))
        assert len(sampler) == len(dealt[-1])
    assert sorted(index for part in dealt for index in part) == list(range(num_images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks.make_data(folder)
    return folder


def wait_for(process, seconds):
    """Return a process's exit code and output; it fails the test if it takes longer."""
    try:
        output = process.communicate(timeout=seconds)[0]
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture(scope="module")
def found(folder):
    """Give what two processes found, after one has trained the first epoch of `from_one`."""
    next(ranks.train(folder, "from_one"))
    outputs = [wait_for(process, 300)[1] for process in ranks.start_ranks("together", folder)]
    paths = [folder / f"rank_{rank}.json" for rank in (0, 1)]
    # By what they wrote, not by their exit codes: gloo sometimes aborts at the very end.
    assert all(path.exists() for path in paths), "\n".join(outputs)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.slow
def test_uneven_shares_give_the_gradient_of_the_whole_batch(found):
    """Batches of 3, 2 and 1 images over two processes, against one process."""
    alone = ranks.line_steps(ALONE)
    for part in found:
        assert part["line"] == pytest.approx(alone, rel=1e-6)
    assert alone[-1] == 6


@pytest.mark.slow
def test_all_processes_end_with_the_same_weights_and_summaries(found):
    first, second = found
    assert first["weights"] == second["weights"]
    assert first["whole"] == second["whole"]
    assert [row["epoch"] for row in first["whole"]] == [1, 2]
    assert [row["step"] for row in first["whole"]] == [3, 6]


@pytest.mark.slow
def test_one_process_writes(found, folder):
    assert [asdict(row) for row in read_history(folder / "whole")] == found[0]["whole"]
    state = read_checkpoint(folder / "whole" / "last.pt")
    assert state["position"] == {"epoch": 2, "batch": 0, "step": 6}
    assert not (folder / "whole" / "run.lock").exists()
    assert read_outcome(folder / "whole").outcome == "finished"


@pytest.mark.slow
def test_validation_by_two_is_that_by_one(found, folder):
    model = ranks.finding_model()
    alone = validate(model, ranks.loaders(folder)[1], seed=3, progress=False)
    assert len(alone.records) > 10
    assert json.dumps(found[0]["validation"]["records"]) == json.dumps(alone.records)
    assert found[0]["validation"]["losses"] == alone.losses
    assert found[1]["validation"] == {"losses": {}, "records": []}


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_and_with_more_processes(found, folder):
    assert [summary.epoch for summary in ranks.train(folder, "from_two")] == [2]
    assert [part["from_one"] for part in found] == [[2], [2]]
    for name in ("from_one", "from_two"):
        assert [row.step for row in read_history(folder / name)] == [3, 6]
    # What two have done, they have done alike: the first epoch is that of the undisturbed run.
    first = without_clock(asdict(read_history(folder / "from_two")[0]))
    assert first == without_clock(found[0]["whole"][0])


@pytest.mark.slow
@needs_signals
def test_a_signal_to_one_process_stops_all_after_the_same_step(found, folder):
    for part in found:
        assert part["stopped"].startswith("stopped by SIGTERM in epoch 2 after batch 2")
    outcome = read_outcome(folder / "stopped")
    assert (outcome.outcome, outcome.signal, outcome.epochs_before) == ("stopped", "SIGTERM", 0)
    position = read_checkpoint(folder / "stopped" / "last.pt")["position"]
    assert position == {"epoch": 1, "batch": 2, "step": 5}


@pytest.mark.slow
@needs_signals
@pytest.mark.parametrize(
    ("scenario", "said"),
    [("memory", "error: out of memory with one image at a time; lower crop_size"), ("killed", "")],
)
def test_a_process_that_fails_ends_all_with_the_state_saved(scenario, said, tmp_path):
    ranks.make_data(tmp_path)
    first, second = ranks.start_ranks(scenario, tmp_path)
    code, output = wait_for(second, 300)
    assert code == (-signal.SIGKILL if scenario == "killed" else 1)
    assert said in output
    code, output = wait_for(first, 60)
    assert code == 1
    assert f"error: {LOST}; the state is saved in" in output
    assert "Traceback" not in output
    state = read_checkpoint(tmp_path / "lost" / "last.pt")
    assert state["position"] == {"epoch": 1, "batch": 1, "step": 4}
    assert read_outcome(tmp_path / "lost").outcome == "failed"


def launch_tiny(folder, run_name, **options):
    pair = ranks.loaders(folder)
    return launch(ranks.quick_model(), *pair, run_dir=folder / run_name, **options)


@pytest.mark.slow
def test_launching_yields_what_the_processes_find(found, folder):
    summaries = list(launch_tiny(folder, "launched", processes=2, **ranks.SETTINGS))
    expected = [without_clock(row) for row in found[0]["whole"]]
    assert [without_clock(asdict(summary)) for summary in summaries] == expected
    assert read_history(folder / "launched") == summaries
    assert not (folder / "launched" / "start.pt").exists()


@pytest.mark.slow
@needs_signals
def test_interrupting_a_launch_stops_it_saved_and_it_goes_on(folder):
    before = signal.getsignal(signal.SIGINT)
    long = ranks.SETTINGS | {"epochs": 500}
    epochs = launch_tiny(folder, "interrupted", processes=2, **long)
    first = next(epochs)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(TrainingInterrupted, match=r"the state is saved in .*: run again to go on"):
        for _ in epochs:
            pass
    assert signal.getsignal(signal.SIGINT) is before
    outcome = read_outcome(folder / "interrupted")
    assert (outcome.outcome, outcome.signal) == ("stopped", "SIGTERM")
    assert not (folder / "interrupted" / "run.lock").exists()
    done = len(read_history(folder / "interrupted"))
    assert done >= first.epoch
    after = next(launch_tiny(folder, "interrupted", processes=1, **long))
    assert after.epoch == done + 1


@pytest.mark.slow
def test_a_launch_that_fails_says_what_its_processes_say(folder):
    settings = ranks.SETTINGS | {"precision": "float16"}
    with pytest.raises(TrainingError, match=r"^2 processes: precision='float16' needs CUDA"):
        list(launch_tiny(folder, "failed", processes=2, **settings))


def test_launch_names_what_it_cannot_hand_over(folder):
    pair = ranks.loaders(folder)

    class Mine(TrainTransform):
        pass

    pair[0].dataset.transform = Mine(crop_size=40)
    with pytest.raises(SettingsError, match="write a script and start it with torchrun"):
        next(launch(ranks.quick_model(), *pair, run_dir=folder / "no", processes=2))


@pytest.mark.parametrize("cached", [True, False])
def test_launched_processes_read_the_same_cache(cached, folder, tmp_path):
    pair = ranks.loaders(folder, cache_dir=tmp_path / "cache" if cached else None)
    launcher._describe(tmp_path, ranks.quick_model(), *pair, {})
    for loader in launcher._loaders(read_checkpoint(tmp_path / launcher.START_NAME)):
        cache = loader.dataset.cache
        assert (cache and cache.folder) == ((tmp_path / "cache").resolve() if cached else None)
        loader.dataset.read(0)
    assert len(list(tmp_path.glob("cache/*.cells"))) == 2 * cached


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=list(BUILDERS))
@pytest.mark.parametrize("squares", [[], [(1, 4, 6, 30, 28)]], ids=["empty", "a cell"])
def test_every_weight_takes_part_in_every_step(builder, squares):
    """DDP waits for the gradient of each trained weight: without one the others would hang."""
    narrow = {"fpn_channels": 16, "head_width": 16, "train_proposals": 20, "rois_per_image": 16}
    model = builder(3, weights=None, norm="frozen", **narrow).train()
    losses = model([make_image(40, 48, squares)], [make_target(40, 48, squares)])
    sum(losses.values()).backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks() as alone:
        assert alone is ALONE and alone.first and not alone.several
    assert alone.from_first(lambda: 5) == 5 and alone.gather(3) == [3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has GPUs to give")
def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("cellseg.training.distributed.pick_device", lambda _: torch.device("cuda"))
    with pytest.raises(SettingsError, match="process 2 of this machine has no GPU of its own"):
        next(fit(None, [], [], run_dir="nowhere"))

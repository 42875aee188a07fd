"""The training loop: `for epoch in fit(...)`.

The run is a function of its arguments: the order of the images depends on (seed, epoch), what is
drawn for a sample on (seed, epoch, index), and what is drawn inside the losses on (seed, batch).
Workers and interruptions change none of them.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cellseg.errors import DataError, SettingsError, TrainingError
from cellseg.training.distributed import RankLost, Ranks, join_ranks
from cellseg.training.epoch_scores import EpochEvaluator
from cellseg.training.interruption import StopRequest, alarms_held_back, stop_requests
from cellseg.training.keeper import StateKeeper
from cellseg.training.lock import RunLock, lock_run
from cellseg.training.outcome import recorded_outcome
from cellseg.training.precision import pick_device, pick_precision
from cellseg.training.run import EpochSummary
from cellseg.training.schedule import TrainingLength
from cellseg.training.session import Batch, Session, Share
from cellseg.training.tracking import SafeTracker
from cellseg.training.validation import validate

# Of torch's messages about a worker that was killed, or about its shared memory.
WORKER_GONE = ("DataLoader worker (pid", "shared memory", "shm", "unable to mmap", "ancdata")
# Of the settings that nothing else looks at: whether a value can work, and what can.
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda value: 0 < value < math.inf, "more than 0"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "0 or more"),
    "warmup": (lambda value: 0 <= value <= 1, "0 to 1"),
    "clip_norm": (lambda value: value > 0, "more than 0"),
    "ema_decay": (lambda value: 0 <= value < 1, "0 or more, and less than 1"),
    "accumulate": (lambda value: value >= 1, "1 or more"),
    "validate_every": (lambda value: value >= 1, "1 or more"),
    "probe_images": (lambda value: value >= 0, "0 or more"),
    "save_every": (lambda value: value >= 0, "0 or more"),
    "keep_checkpoints": (lambda value: value >= 0, "0 or more"),
    "seed": (lambda value: value >= 0, "0 or more"),
}


def fit(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader | None,
    *,
    run_dir: str | Path,
    epochs: int | None = 50,
    time_budget: float | None = None,
    learning_rate: float = 2e-4,
    weight_decay: float = 0.05,
    warmup: float = 0.05,
    clip_norm: float = 5.0,
    ema_decay: float = 0.999,
    accumulate: int = 1,
    validate_every: int = 1,
    probe_images: int = 4,
    precision: str = "auto",
    device: str = "auto",
    seed: int = 0,
    resume: str = "auto",
    save_every: float = 600.0,
    keep_checkpoints: int = 0,
    tracker: str = "none",
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Iterator[EpochSummary]:
    """Train a model and yield a summary after each epoch.

    AdamW without decay on norms and biases, linear warm-up and a cosine over the whole length,
    clipped gradients, mixed precision where it is safe, and an average of the weights that is
    what is validated, kept as `best.pt` (by `ap50`) and used to predict. After each epoch
    `metrics.jsonl`, `last.pt` and, if it is the best, `best.pt` lie in the run's folder.

    Interrupted at any moment, the same call goes on where it was: on a CPU bit for bit as if it
    had never stopped. CUDA adds numbers in an order of its own in some gradients (RoIAlign,
    interpolation), so there two runs agree closely, interrupted or not.

    Started by `torchrun`, each process calls this with the same arguments; they share every batch
    and the validation images, and the first one writes. The number of processes may change when
    a run goes on: the steps stay the same, what the losses sample in them does not.

    Args:
        model: a model of `cellseg.models`; changed in place and moved to the device.
        train_loader: from `make_loaders`; gives lists of images and targets.
        val_loader: from `make_loaders`; its dataset has `class_names` and `read`. None holds no
            image out: nothing is scored, and `best.pt` is the average at the end.
        run_dir: folder of the run; made if missing.
        epochs: length of the run; None with a time budget.
        time_budget: seconds of training, loading included and validation not, after which the
            run ends, its schedule with it; the last epoch may be cut short.
        learning_rate: at its peak, for the whole model.
        weight_decay: of AdamW, for weight matrices and kernels.
        warmup: share of the run over which the learning rate rises.
        clip_norm: largest norm of the gradient; longer ones are shortened to it.
        ema_decay: of the weights' average, reached after its warm-up.
        accumulate: batches whose gradients are added up for one step.
        validate_every: validate after every so many epochs, and after the last.
        probe_images: training images that `train_ap50` is measured on.
        precision: "auto", "float32", "bfloat16" or "float16"; see `pick_precision`.
        device: "auto", "cuda", "mps" or "cpu".
        seed: of the draws inside the losses.
        resume: "auto" goes on from `last.pt` where there is one, "never" refuses to.
        save_every: seconds after which the state is saved also within an epoch.
        keep_checkpoints: how many epochs' states are kept besides, as `epoch_003.pt`.
        tracker: "none", or "tensorboard" to write into `tensorboard/` in the run's folder; one
            that fails is left out.
        progress: show bars with the time left.
        ranks: the processes that train together, from `join_ranks`; None joins those that the
            launcher started.

    Yields:
        one `EpochSummary` per epoch trained in this call; nothing if the run is finished.

    Raises:
        TrainingInterrupted: a KeyboardInterrupt, after SIGINT, SIGTERM or SIGUSR1 (or the
            notebook's stop button) and the end of the step; the state is saved. A second signal
            raises KeyboardInterrupt at once; the state is that of the last save.
        TrainingError: if loss or gradient are not finite in many steps, memory or disk are
            full, a worker or another rank dies, another process trains in the folder, or it
            holds a run and `resume` is "never"; says what to do.
        DataError: if a file cannot be read; names it; the state before it is saved.
        CheckpointError: if `last.pt` is damaged or belongs to another model.
        SettingsError: if a setting cannot work.
    """
    steps = {
        "learning_rate": learning_rate, "weight_decay": weight_decay, "warmup": warmup,
        "clip_norm": clip_norm, "ema_decay": ema_decay, "accumulate": accumulate, "seed": seed,
    }  # fmt: skip
    _check(
        resume, **steps, validate_every=validate_every, probe_images=probe_images,
        save_every=save_every, keep_checkpoints=keep_checkpoints,
    )  # fmt: skip
    with (
        nullcontext(ranks) if ranks is not None else join_ranks(device) as ranks,
        lock_run(run_dir) if ranks.first else nullcontext() as lock,
    ):
        where = ranks.device(pick_device(device))
        session = Session(
            model,
            batches_per_epoch=len(train_loader),
            length=TrainingLength(epochs, time_budget),
            device=where,
            dtype=pick_precision(where, precision),
            ranks=ranks,
            **steps,
        )
        keeper = StateKeeper(Path(run_dir), session, save_every, keep_checkpoints)
        keeper.resume(resume)
        train_loader.batch_sampler.deal(ranks.rank, ranks.count)
        if ranks.several and val_loader is not None:
            val_loader.sampler.deal(ranks.rank, ranks.count)
        held_out = None if val_loader is None else val_loader.dataset
        evaluator = EpochEvaluator(held_out, train_loader.dataset, probe_images)
        with (
            recorded_outcome(run_dir, session.epoch, writes=ranks.first),
            closing(SafeTracker(tracker if ranks.first else "none", Path(run_dir))) as tracked,
        ):
            show = progress and ranks.first
            for summary in _epochs(
                session, keeper, lock, train_loader, val_loader, evaluator, validate_every, show
            ):
                tracked.log(summary)
                yield summary


def _epochs(
    session: Session,
    keeper: StateKeeper,
    lock: RunLock | None,
    train_loader: DataLoader,
    val_loader: DataLoader | None,
    evaluator: EpochEvaluator,
    validate_every: int,
    show: bool,
) -> Iterator[EpochSummary]:
    """Train, validate and close one epoch after the other to the end of the run."""
    ranks = session.ranks
    # An epoch may be trained and not closed: stopped while it was validated.
    while session.progress < 1 or session.batch:
        with stop_requests() as stop:
            _train_epoch(session, train_loader, keeper, lock, stop, show)
            due = (session.epoch + 1) % validate_every == 0 or session.progress >= 1
            validation = None
            with loader_errors():
                if due and val_loader is not None:
                    keeper.save()
                    stop.at_once = keeper.interrupted
                    validation = validate(
                        session.average.model,
                        val_loader,
                        seed=session.seed,
                        dtype=session.dtype,
                        progress=show,
                        ranks=ranks,
                    )
                summary = ranks.from_first(partial(evaluator.summarise, session, validation))
            stop.at_once = None
            keeper.close_epoch(summary)
            asked = ranks.meet(True, stop.signum, session.seconds).signum
            if asked is not None:
                raise keeper.interrupted(asked)
        yield summary


def _check(resume: str, **given: float) -> None:
    """Raise SettingsError for a setting that cannot work, before anything is written."""
    for name, value in given.items():
        works, wanted = LIMITS[name]
        if not works(value):
            raise SettingsError(f"{name} is {value}; give {wanted}")
    if resume not in ("auto", "never"):
        raise SettingsError(f"resume is {resume!r}; use auto or never")


def _train_epoch(
    session: Session,
    loader: DataLoader,
    keeper: StateKeeper,
    lock: RunLock | None,
    stop: StopRequest,
    show: bool,
) -> None:
    """Train to the end of the epoch, from where it stands, or until the time is up.

    Before each step all ranks say whether they have their share of its images and whether a signal
    has come, and take over the first one's clock: so they do, and stop after, the same steps.
    """
    last = len(loader)
    if session.batch >= last or session.progress >= 1:
        return  # trained before it was interrupted, and not closed
    session.model.train()
    loader.batch_sampler.set_epoch(session.epoch, start_batch=session.batch)
    of = f"/{session.length.epochs}" if session.length.epochs else ""
    bar = tqdm(
        total=last,
        initial=session.batch,
        desc=f"epoch {session.epoch + 1}{of}",
        unit="batch",
        disable=not show,
        leave=False,
    )
    with bar, loader_errors(keeper.save):
        clock = time.perf_counter()
        groups = _groups(_batches(loader, stop), session.accumulate, last - session.batch)
        while True:
            group = next(groups, None)
            with save_on_error(keeper):
                meeting = session.ranks.meet(group is not None, stop.signum, session.seconds)
            session.seconds = meeting.seconds
            over = session.length.time_budget and session.progress >= 1
            if not meeting.ready or meeting.signum is not None or over:
                break
            with alarms_held_back(stop):
                with save_on_error(keeper):
                    session.train_step(group, _shares(session, group, loader))
                bar.update(len(group))
                clock = _count_time(session, clock)
                bar.set_postfix_str(_time_left(session), refresh=False)
                if lock is not None:
                    lock.sign_of_life()
                if stop.signum is None:
                    keeper.save_if_due()
    if meeting.signum is not None:
        session.ranks.from_first(keeper.save)  # the others wait: the launcher ends all with one
        raise keeper.interrupted(meeting.signum)


def _groups(batches: Iterator[Batch], size: int, left: int) -> Iterator[list[Batch]]:
    """Yield the batches of each step; the last step of an epoch takes those that are left."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        left -= 1
        if len(group) == size or left == 0:
            yield group
            group = []


def _shares(session: Session, group: list[Batch], loader: DataLoader) -> list[Share]:
    """Return how much of each batch of the next step is this process's."""
    return [loader.batch_sampler.share(session.batch + k) for k in range(len(group))]


@contextmanager
def save_on_error(keeper: StateKeeper) -> Iterator[None]:
    """Save the state before a step that cannot be made, here or by another rank."""
    try:
        yield
    except TrainingError as error:
        ranks = keeper.session.ranks
        with ranks.rescuing(keeper.session.device):
            keeper.save()
        if isinstance(error, RankLost) and ranks.first:
            raise RankLost(
                f"{error}; the state is saved in {keeper.run_dir}: run again to go on"
            ) from error
        raise


def _batches(loader: DataLoader, stop: StopRequest) -> Iterator[Batch]:
    """Yield the loader's batches; none any more if a signal has reached its workers, too."""
    try:
        yield from loader
    except RuntimeError:
        if stop.signum is None:
            raise


@contextmanager
def loader_errors(save: Callable[[], None] | None = None) -> Iterator[None]:
    """Say in one sentence what went wrong where a loader reads, after saving the state.

    An error of a worker arrives as a text that holds its whole traceback; the last line is ours.
    """
    try:
        yield
    except DataError as error:
        if save is not None:
            save()
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.removeprefix(f"{DataError.__module__}.DataError: ")) from error
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        if not lines or not any(sign in str(error) for sign in WORKER_GONE):
            raise
        if save is not None:
            save()
        reason = lines[-1] if lines[0].startswith("Caught ") else lines[0]
        raise TrainingError(
            f"a process that reads ahead died or found no memory ({reason}); the state is saved: "
            "run again with workers=0, or with fewer workers, a smaller batch_size or more shared "
            "memory (docker run --shm-size=2g)"
        ) from error


def _count_time(session: Session, since: float) -> float:
    """Add the time since a moment to the session's clocks; return the moment now."""
    now = time.perf_counter()
    session.seconds += now - since
    session.epoch_seconds += now - since
    return now


def _time_left(session: Session) -> str:
    """Return the time that the whole run still takes, validation apart."""
    done = session.progress
    if not done:
        return ""
    return f"run: {tqdm.format_interval(session.seconds * (1 / done - 1))} left"

"""Several processes that train one model: torch's own DDP, started by torch's own launcher.

`torchrun --nproc-per-node 2 -m cellseg train ...` starts the processes ("ranks") and tells each who
it is by its environment. All hold the same weights and take every step together: rank r goes
through its share of the step's images, and the gradients are averaged, so that a run is the same
sequence of steps whatever the number of ranks. The first rank writes; the others only compute.

A rank that fails says why and ends. The others notice by its closed connection: the first saves the
state of the last good step, and all end.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cellseg.errors import SettingsError, TrainingError
from cellseg.training.precision import pick_device

STEP_PATIENCE = timedelta(minutes=10)  # for a rank that hangs; one that dies is noticed at once
WORK_PATIENCE = timedelta(days=1)  # for what the first rank does alone: counting, scoring
LOST = "another process of this run ended or hangs; its own error stands above"
# What keeps DDP from copying buffers in each forward pass; renamed in torch 2.14.
_BUFFERS = "forward_sync_buffers"
if _BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _BUFFERS = "broadcast_buffers"

Value = TypeVar("Value")


class RankLost(TrainingError):
    """Another process of the run ended, or did not answer in time."""


@dataclass(frozen=True)
class Meeting:
    """What all ranks know alike before a step.

    Attributes:
        ready: every rank has its share of the step's images.
        signum: a signal that asks to stop, seen by any of them; None if there is none.
        seconds: of training so far, by the clock of the first rank.
    """

    ready: bool
    signum: int | None
    seconds: float


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        local_rank: number of this process on its machine.
        steps: the process group of what happens in a step; None if this process is alone.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    steps: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.count > 1

    def device(self, chosen: torch.device) -> torch.device:
        """Return this rank's own device of the kind that was chosen."""
        if self.several and chosen.type == "cuda":
            return torch.device("cuda", self.local_rank)
        return chosen

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model whose backward pass leaves the average of all ranks' gradients.

        All ranks get the first one's weights. Buffers are left alone: frozen norms do not change,
        and the statistics of trained ones are averaged with `add_up`.
        """
        if not self.several:
            return model
        with rank_errors():
            return DistributedDataParallel(
                model,
                process_group=self.steps,
                gradient_as_bucket_view=True,
                **{_BUFFERS: False},
            )

    @contextmanager
    def exchanging(self, network: nn.Module, last: bool) -> Iterator[None]:
        """Average gradients in the block's backward pass if it is the last one of a step."""
        with nullcontext() if last or not self.several else network.no_sync():
            yield

    @contextmanager
    def rescuing(self, device: torch.device) -> Iterator[None]:
        """Let the block copy from a GPU whose queue waits for a rank that is gone."""
        stuck = self.several and device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(device)) if stuck else nullcontext():
            yield

    def meet(self, ready: bool, signum: int | None, seconds: float) -> Meeting:
        """Return what all ranks know before the next step, the same for all.

        Raises:
            RankLost: if one of them is gone.
        """
        if not self.several:
            return Meeting(ready, signum, seconds)
        mine = torch.tensor([ready, signum or 0, seconds], dtype=torch.float64)
        all_of = [torch.empty_like(mine) for _ in range(self.count)]
        with rank_errors():
            distributed.all_gather(all_of, mine, group=self.steps)
        everyone = torch.stack(all_of)
        asked = int(everyone[:, 1].max())
        return Meeting(bool(everyone[:, 0].all()), asked or None, float(everyone[0, 2]))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors by their sums over all ranks, in one exchange."""
        if not self.several:
            return
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        with rank_errors():
            distributed.all_reduce(flat, group=self.steps)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def confirm(self) -> None:
        """Wait until all ranks have come this far, on the CPU: a GPU waits for a dead one forever.

        Raises:
            RankLost: if one of them is gone.
        """
        self.meet(True, None, 0.0)

    def gather(self, value: Value) -> list[Value] | None:
        """Return every rank's value, in their order, to the first; None to the others."""
        if not self.several:
            return [value]
        values = [None] * self.count if self.first else None
        with rank_errors():
            distributed.gather_object(value, values)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Return what the first rank makes; the others wait for it."""
        if not self.several:
            return make()
        box = [make() if self.first else None]
        with rank_errors():
            distributed.broadcast_object_list(box)
        return box[0]


ALONE = Ranks()


@contextmanager
def rank_errors() -> Iterator[None]:
    """Raise RankLost where a block that exchanges something with other ranks fails."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        raise RankLost(LOST) from error


def _is_of_connection(error: RuntimeError) -> bool:
    """Tell whether an error comes from the exchange between ranks."""
    if isinstance(error, distributed.DistError):
        return True
    return any(sign in str(error) for sign in ("gloo", "NCCL", "onnection closed", "imed out"))


def ranks_asked_for() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the other processes that the launcher started; alone if it started none.

    Args:
        device: that will be trained on; CUDA exchanges by NCCL, the CPU by gloo.

    Raises:
        SettingsError: if there are more processes than GPUs, or the device cannot exchange.
    """
    if ranks_asked_for() == 1:
        yield ALONE
        return
    backend = _backend(pick_device(device))
    with rank_errors():
        distributed.init_process_group(backend, timeout=WORK_PATIENCE)
        steps = distributed.new_group(timeout=STEP_PATIENCE)
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), _local_rank(), steps)
    # Not after an error: the others may be gone, and leaving in order would wait for them.
    with rank_errors():
        distributed.barrier()
        distributed.destroy_process_group()


def _local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _backend(device: torch.device) -> str:
    """Return what exchanges tensors of the CPU and, if it is trained on, of CUDA."""
    if device.type == "mps":
        raise SettingsError("several processes need CUDA or device='cpu'; mps trains with one")
    if device.type != "cuda":
        return "gloo"
    if _local_rank() >= torch.cuda.device_count():
        raise SettingsError(
            f"process {_local_rank() + 1} of this machine has no GPU of its own; start at most "
            f"{torch.cuda.device_count()}, or use device='cpu'"
        )
    torch.cuda.set_device(_local_rank())
    return "cpu:gloo,cuda:nccl"

"""This process among the ranks of the job: its number, its device, its process groups."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.errors import UserError
from hecate.local_store import STORE_VARIABLE
from hecate.moe.engine import ExpertGroups

# Long enough for one rank to evaluate while the others wait, short against gloo's half hour.
_TIMEOUT = timedelta(minutes=10)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device
    groups: ExpertGroups

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_max(self, value: float) -> float:
        """The largest value of any rank. Every rank must call it."""
        return float(self._reduce(value, dist.ReduceOp.MAX))

    def all_sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks. Every rank must call it."""
        total = values.to(self.device)
        dist.all_reduce(total, group=self.groups.tokens)
        return total

    def barrier(self) -> None:
        self.all_max(0.0)

    def new_group(self) -> dist.ProcessGroup:
        """All ranks once more, for messages that must not queue behind others. Every rank must call it."""
        return _all_ranks()

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes, of a length that all ranks know."""
        tensor = torch.tensor(list(data), dtype=torch.uint8, device=self.device)
        dist.broadcast(tensor, src=0, group=self.groups.tokens)
        return bytes(tensor.tolist())

    def _reduce(self, value: float, op: dist.ReduceOp.RedOpType) -> Tensor:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op, group=self.groups.tokens)
        return tensor


def ranks_from_environment() -> tuple[int, int] | None:
    """(rank, world size) that torchrun or our own launcher has given this process, or None.

    Raises:
        UserError: the variables are there but make no sense.
    """
    if "RANK" not in os.environ:
        return None
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise UserError(f"RANK is set, but RANK and WORLD_SIZE are not both integers: {error}") from None
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size}")
    return rank, world_size


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the process group that the environment describes; a process outside any launcher becomes a world of one.

    Leaves the group at the end whatever happened, so that a peer that waits for this rank fails at once.
    """
    place = ranks_from_environment()
    rank, world_size = place or (0, 1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if place is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
    elif STORE_VARIABLE in os.environ:
        die_with_parent()
        store = dist.FileStore(os.environ[STORE_VARIABLE], world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        default = dist.group.WORLD
        assert default is not None
        groups = ExpertGroups(experts=default, tokens=_all_ranks())
        yield Ranks(rank, world_size, device, groups)
    finally:
        dist.destroy_process_group()


def _all_ranks() -> dist.ProcessGroup:
    group = dist.new_group(timeout=_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # a rank outside the group would get a number
    return group


def die_with_parent() -> None:
    """Linux: be killed when the launcher dies, however it dies."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() == 1:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)

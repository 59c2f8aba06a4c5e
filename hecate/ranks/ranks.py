"""This process among the ranks of the job: its number, its device, its process groups."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.errors import UserError
from hecate.parallel.mesh import make_mesh
from hecate.ranks.groups import TIMEOUT, ExpertGroups, TensorGroups, expert_groups, own_group, tensor_groups
from hecate.ranks.launcher_files import JOIN_VARIABLE, LAUNCHED_VARIABLE, STORE_VARIABLE
from hecate.ranks.sockets import Connection, notice_lost_machines, ports, shut_down, tcp_sockets

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device
    groups: ExpertGroups
    connections: frozenset[Connection] = frozenset()
    """with which gloo has joined this rank to the others"""
    tensor: TensorGroups | None = None
    """None: every rank has all of the model outside its experts"""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def tp_size(self) -> int:
        """Neighbouring ranks that compute the same rows, each with a part of the model outside its experts."""
        return self.tensor.tp_size if self.tensor else 1

    @property
    def dp_rank(self) -> int:
        """Of such groups this rank's, which has rows of its own."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tp_size

    @property
    def is_first_of_tensor_group(self) -> bool:
        """On one rank of each copy, for sums over all ranks of what those of a copy see alike."""
        return self.rank % self.tp_size == 0

    def all_max(self, value: float) -> float:
        """The largest value of any rank. Every rank must call it."""
        return float(self._reduce(value, dist.ReduceOp.MAX))

    def all_sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks. Every rank must call it."""
        total = values.to(self.device)
        dist.all_reduce(total, group=self.groups.world)
        return total

    def all_gather(self, values: Tensor) -> Tensor:
        """[ranks, ...]: every rank's values, of one shape. Every rank must call it."""
        mine = values.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine, group=self.groups.world)
        return torch.stack(parts).cpu()

    def broadcast_from(self, source: int, data: bytes | None) -> bytes:
        """The bytes of rank `source`, of any length; others give None. Every rank must call it."""
        length = torch.tensor(len(data or b""), device=self.device)
        dist.broadcast(length, src=source, group=self.groups.world)
        buffer = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if len(buffer):
            dist.broadcast(buffer, src=source, group=self.groups.world)
        return buffer.cpu().numpy().tobytes()

    def abort(self) -> None:
        """Break off every collective under way, here and, because it loses this peer, on every rank that waits for this one.

        From any thread. Nothing more can be sent among these ranks.
        """
        groups = self.groups.all() + ([self.tensor.tensor, self.tensor.data] if self.tensor else [])
        for group in groups:
            _keep_for_good(group)
        shut_down(self.connections)
        if self.device.type == "cuda":
            for group in groups:
                group.abort()

    def leave(self) -> None:
        """Abort, and forget the groups, so that this process can join others."""
        self.abort()
        dist.destroy_process_group()

    def all_most(self, values: Sequence[float]) -> list[float]:
        """The largest of each of several values of any rank, in one message. Every rank must call it, with as many values."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.groups.world)
        return [float(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        self.all_max(0.0)

    def new_sharding_group(self) -> dist.ProcessGroup:
        """This rank's sharding group once more, for messages that must not queue behind others. Every rank must call it."""
        return own_group(make_mesh(self.world_size, dist.get_world_size(self.groups.experts)).sharding_groups())

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes, of a length that all ranks know."""
        tensor = torch.tensor(list(data), dtype=torch.uint8, device=self.device)
        dist.broadcast(tensor, src=0, group=self.groups.world)
        return bytes(tensor.tolist())

    def _reduce(self, value: float, op: dist.ReduceOp.RedOpType) -> Tensor:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op, group=self.groups.world)
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
def join_ranks(shard_size: int | None = None, tp_size: int = 1) -> Iterator[Ranks]:
    """Join the process group that the environment describes; a process outside any launcher becomes a world of one.

    Leaves the group at the end whatever happened, or the one that has taken its place, so that a peer that waits for this rank fails at
    once.

    Args:
        shard_size: `fssdp.shard_size`.
        tp_size: `model.tensor_parallel`.

    Raises:
        UserError: the environment makes no sense, or there is another number of ranks than the two sizes divide.
    """
    # One that is to join a run under way is alone until it is let in.
    place = None if JOIN_VARIABLE in os.environ else ranks_from_environment()
    rank, world_size = place or (0, 1)
    if place is None:
        store: dist.Store | None = dist.HashStore()
    elif STORE_VARIABLE in os.environ:
        # A file of its own for each time that an agent starts all ranks anew.
        store = dist.FileStore(f"{os.environ[STORE_VARIABLE]}-{restarts()}", world_size)
    else:
        store = None
    if LAUNCHED_VARIABLE in os.environ:
        die_with_launcher(int(os.environ[LAUNCHED_VARIABLE]))
    try:
        ranks = connect(store, rank, world_size, shard_size, tp_size)
        try:
            yield ranks
        except BaseException:
            ranks.abort()  # whoever waits for this rank is to fail now, not at its timeout
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _keep_for_good(group: dist.ProcessGroup) -> None:
    """Never destroy it: gloo's destructor waits for the operations under way, some of which only their timeout ends, and stops all of
    Python meanwhile. What is left of a broken group are a few idle threads."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def lost_a_peer(error: BaseException) -> bool:
    """Is this what a collective says when another rank has died or broken off?"""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def restarts() -> int:
    """How often torch's elastic agent on this node has started its ranks anew. Another node's may have another number."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def connect(store: dist.Store | None, rank: int, world_size: int, shard_size: int | None = None, tp_size: int = 1) -> Ranks:
    """Make this process one of `world_size` ranks. It must belong to no process group, or have left it.

    Args:
        store: where the ranks meet, used by none before; None: where torchrun's environment says.
        shard_size, tp_size: as `join_ranks` has them.
    """
    mesh = make_mesh(world_size, shard_size, tp_size)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    before = tcp_sockets()
    if store is None:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    ranks = Ranks(rank, world_size, device, expert_groups(mesh), tensor=tensor_groups(mesh))
    if cuda:
        return ranks
    connections = _of_gloo(ranks, tcp_sockets() - before)
    notice_lost_machines(connections)
    return replace(ranks, connections=connections)


def _of_gloo(ranks: Ranks, new: set[Connection]) -> frozenset[Connection]:
    """Those of the sockets that connect to a port on which some rank's gloo listens. Every rank must call it.

    Args:
        new: sockets opened since the groups began. Another thread may have connected to somewhere else meanwhile.
    """
    mine = sorted(ports(new))
    most = int(ranks.all_max(len(mine)))  # one for each group and network interface, so their number has no fixed bound
    table = ranks.all_gather(torch.tensor(mine + [0] * (most - len(mine)), dtype=torch.int64))
    listening = {port for port in table.flatten().tolist() if port}
    return frozenset(c for c in new if c.peer is not None and {c.local[1], c.peer[1]} & listening)


def die_with_launcher(launcher: int) -> None:
    """Linux: be killed when the launcher, this process's parent, dies, however it dies."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != launcher:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)

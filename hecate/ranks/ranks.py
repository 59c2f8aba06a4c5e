"""Joins a process to the other ranks of its job, and gives its rank, its device and its process groups as a value."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from hecate import faults
from hecate.errors import UserError
from hecate.io.process_end import die_with_parent
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.comm.aborts import is_aborted, note_abort, read
from hecate.parallel.comm.exchanges import all_gather_single
from hecate.ranks.backend import (
    ABORTING,
    abort_nccl,
    chosen_backend,
    chunk_options,
    first_group_options,
    forget_groups,
    is_nccl,
    own_device,
    plain_options,
    use_once,
    wait_for_all,
)
from hecate.ranks.groups import TIMEOUT, ExpertGroups, TensorGroups, expert_groups, own_group, set_limit, tensor_groups
from hecate.ranks.launcher_files import (
    BEGINS_VARIABLE,
    JOIN_VARIABLE,
    LAUNCHED_VARIABLE,
    STORE_VARIABLE,
    leave_failure,
    name_process,
)
from hecate.ranks.meeting import meeting_store
from hecate.ranks.sockets import Connection, notice_lost_machines, ports, shut_down, tcp_sockets


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its job, with the collectives that training needs besides those of experts and tokens."""

    rank: int
    world_size: int
    device: torch.device
    groups: ExpertGroups
    connections: frozenset[Connection] = frozenset()
    """The connections that gloo has made to the other ranks; empty with NCCL."""
    tensor: TensorGroups | None = None
    """The groups of tensor parallelism; None: every rank has all of the model outside its experts."""
    layers: dist.ProcessGroup | None = None
    """The sharding group once more, for the weights of sharded layers (`model.shard_non_experts`), which must not queue behind experts or
    tokens; None: every rank has these weights."""
    store: dist.Store | None = None
    """The store where the ranks have met; None: torch's launcher has named it in the environment."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def tp_size(self) -> int:
        """Number of ranks in a tensor group: they compute the same sequences, each with a part of the model outside its experts."""
        return self.tensor.tp_size if self.tensor else 1

    @property
    def dp_rank(self) -> int:
        """The number of this rank's tensor group, which is the number of its share of the data."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tp_size

    @property
    def is_first_of_tensor_group(self) -> bool:
        """True on one rank of each tensor group. Sums over all ranks use it to count once what is the same on all ranks of a group."""
        return self.rank % self.tp_size == 0

    def all_max(self, value: float) -> float:
        """The largest value of any rank. Every rank must call it."""
        return self.all_most([value])[0]

    def all_sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks, on the CPU. Every rank must call it."""
        total = values.to(self.device)
        dist.all_reduce(total, group=self.groups.world)
        return read(total, self.groups.world)

    def all_gather(self, values: Tensor) -> Tensor:
        """[ranks, ...]: the values of every rank, which must all have one shape. Every rank must call it."""
        mine = values.to(self.device)
        table = mine.new_empty((self.world_size, *mine.shape))
        all_gather_single(table.view(-1), mine.flatten(), group=self.groups.world)
        return read(table, self.groups.world)

    def broadcast_from(self, source: int, data: bytes | None) -> bytes:
        """The bytes of rank `source`, of any length. Every rank must call it; the other ranks pass None."""
        length = torch.tensor(len(data or b""), device=self.device)
        dist.broadcast(length, src=source, group=self.groups.world)
        buffer = torch.empty(int(read(length, self.groups.world)), dtype=torch.uint8, device=self.device)
        if data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if len(buffer):
            dist.broadcast(buffer, src=source, group=self.groups.world)
        return read(buffer, self.groups.world).numpy().tobytes()

    @property
    def aborted(self) -> bool:
        """Whether this rank's groups were aborted. Whatever fails afterwards may be a consequence."""
        return is_aborted(self.groups.world)

    def all_groups(self) -> list[dist.ProcessGroup]:
        """Each group of this rank once, in the same order on all ranks."""
        return self.groups.all() + ([self.tensor.tensor, self.tensor.data] if self.tensor else []) + ([self.layers] if self.layers else [])

    def abort(self) -> None:
        """Break off every collective under way on this rank, and with gloo on every rank that waits for this one.

        Any thread may call it, several times. Nothing more can be sent among these ranks afterwards, and what their collectives have
        written cannot be read any more (`hecate.parallel.comm.aborts`). With NCCL it aborts all groups of the process.
        """
        with ABORTING:
            if self.aborted:
                return
            if is_nccl(self.groups.world):
                abort_nccl()
                return
            # Noted first: the shutdown lets waiting reads return, and these must raise. Kept alive before the shutdown, too: a thread whose
            # collective fails may drop the last reference to its group.
            note_abort(self.all_groups())
            for group in self.all_groups():
                _keep_for_good(group)
            shut_down(self.connections)

    def leave(self, *, agreed: bool = False) -> None:
        """Abort, and forget the groups, so that this process can join others.

        Args:
            agreed: all ranks leave, and none is known to be lost. With NCCL they wait for each other's devices first, because an abort
                may take memory from a collective that another rank has not ended yet.
        """
        if agreed and self.store is not None and not self.aborted and is_nccl(self.groups.world):
            wait_for_all(self.store, self.world_size, self.device)
        self.abort()
        forget_groups()

    def all_most(self, values: Sequence[float]) -> list[float]:
        """The largest value of any rank, for each of several values in one message. Every rank must call it, with equally many values."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.groups.world)
        return [float(value) for value in read(tensor, self.groups.world).tolist()]

    def barrier(self) -> None:
        self.all_max(0.0)


def ranks_from_environment() -> tuple[int, int] | None:
    """(rank, world size) from the environment variables of torchrun or hecate's launcher; None: no launcher has started this process.

    Raises:
        UserError: the variables are set, but are not a rank and a world size.
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


_NEWEST: list[Ranks] = []
"""The ranks that this process has joined last."""
_CONNECTED = count()
"""How often this process has connected where torchrun's variables say."""


@contextmanager
def join_ranks(
    shard_size: int | None = None, tp_size: int = 1, *, sharded_layers: bool = False, max_ctas: int | None = None
) -> Iterator[Ranks]:
    """Join the process group that the environment describes. A process that no launcher has started becomes a world of one rank.

    At the end of the block the process leaves the group, or the group that has replaced it, whatever happened. So a peer that waits for
    this rank fails at once.

    Args:
        shard_size: `fssdp.shard_size`.
        tp_size: `model.tensor_parallel`.
        sharded_layers: `model.shard_non_experts`.
        max_ctas: `fssdp.max_ctas`; None: no limit but NCCL's own.

    Raises:
        UserError: the environment variables are no rank and world size, or name no backend that this process can have; or the two sizes
            do not divide the number of ranks.
    """
    # A process that is to join a run under way is a world of one rank until it is let in.
    given = None if JOIN_VARIABLE in os.environ else ranks_from_environment()
    rank, world_size = given or (0, 1)
    if given is None:
        store: dist.Store | None = dist.HashStore()
    elif STORE_VARIABLE in os.environ:
        # Each time that a launcher starts all ranks anew, they meet in a new place.
        store = meeting_store(first_generation(), world_size)
    else:
        store = None
    if LAUNCHED_VARIABLE in os.environ:
        die_with_parent(int(os.environ[LAUNCHED_VARIABLE]))
        name_process()
    try:
        given_size = None if JOIN_VARIABLE in os.environ else shard_size
        ranks = connect(store, rank, world_size, given_size, tp_size, sharded_layers=sharded_layers, max_ctas=max_ctas)
        try:
            yield ranks
        except BaseException as error:
            if isinstance(error, Exception) and not (lost_a_peer(error) or _NEWEST[0].aborted):
                # Before the abort, by which others fail: the launcher is to find the cause, not a consequence.
                leave_failure(error)
            # Ranks that wait for this one fail now, not at their timeout.
            _NEWEST[0].abort()
            raise
    except BaseException:
        forget_groups()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _keep_for_good(group: dist.ProcessGroup) -> None:
    """Keep a process group alive until the process ends.

    gloo's destructor waits for the operations under way, some of which end only by their timeout, and stops all of Python meanwhile. A
    broken group that is kept costs a few idle threads.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error is what a collective raises when another rank has died or broken off."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def loss_in_words(error: BaseException) -> str:
    """What an error of a lost peer says, in one line of 120 characters at most.

    gloo's texts name lines of its sources; where they are known, plain words stand for them. torch 2.10 to 2.13.
    """
    text = (str(error) or type(error).__name__).splitlines()[0]
    if "gloo/transport" in text:
        if any(words in text for words in ("closed by peer", "reset by peer", "Broken pipe")):
            return "another rank closed its connection"
        if re.search("time(d )?out", text, re.IGNORECASE):
            return "another rank did not answer in time"
    return text[:120]


def restarts() -> int:
    """How often torch's elastic agent on this node has started its ranks anew. The number may differ from node to node."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def first_generation() -> int:
    """The number of the generation of ranks that this process begins with, which differs each time that a launcher starts all anew."""
    return int(os.environ.get(BEGINS_VARIABLE) or restarts())


def connect(
    store: dist.Store | None,
    rank: int,
    world_size: int,
    shard_size: int | None = None,
    tp_size: int = 1,
    *,
    sharded_layers: bool = False,
    max_ctas: int | None = None,
    limit: timedelta = TIMEOUT,
) -> Ranks:
    """Make this process one of `world_size` ranks. It must belong to no process group. With NCCL all groups have been used once.

    Args:
        store: the unused store where the ranks meet; None: torchrun's environment variables name it.
        rank: this process's rank.
        world_size: the number of ranks that connect.
        shard_size: `fssdp.shard_size`.
        tp_size: `model.tensor_parallel`.
        sharded_layers: `model.shard_non_experts`.
        max_ctas: `fssdp.max_ctas`; None: no limit but NCCL's own.
        limit: how long the ranks may wait for one that does not connect. gloo cannot be interrupted while it connects.

    Raises:
        UserError: the sizes do not divide the number of ranks, or HECATE_COLLECTIVES names no backend that this process can have.
    """
    mesh = make_mesh(world_size, shard_size, tp_size)
    backend = chosen_backend()
    device = own_device(backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    chunks = chunk_options(backend, max_ctas)
    options = first_group_options(backend, device, chunks if mesh.num_sharding_groups == 1 else plain_options(backend))
    # gloo does not say which sockets are its own: they are among those that this process has more of once all groups are made.
    before = tcp_sockets()
    faults.at("connect")
    if (meeting := store) is None:
        # torch calls the keys of every first group alike, and a process that connects again would meet the addresses of the time before.
        torchruns, _, _ = next(iter(dist.rendezvous("env://", rank, world_size, timeout=limit)))
        meeting = dist.PrefixStore(f"hecate-{next(_CONNECTED)}", torchruns)
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=world_size, timeout=limit, **options)
    faults.at("connect")
    groups, tensor = expert_groups(mesh, chunks, limit), tensor_groups(mesh, limit)
    faults.at("connect")
    layers = own_group(mesh.sharding_groups(), limit) if sharded_layers else None
    ranks = Ranks(rank, world_size, device, groups, tensor=tensor, layers=layers, store=store)
    if is_nccl(ranks.groups.world):
        use_once(ranks.all_groups(), [groups.experts, groups.tokens], device)
    else:
        ranks = replace(ranks, connections=_of_gloo(ranks, tcp_sockets() - before))
        notice_lost_machines(ranks.connections)
    # `limit` was for connecting. Collectives of training may wait longer, for example for a rank that evaluates.
    if limit != TIMEOUT:
        set_limit(ranks.all_groups())
    faults.at("connect")
    _NEWEST[:] = [ranks]
    return ranks


def _of_gloo(ranks: Ranks, new: set[Connection]) -> frozenset[Connection]:
    """The sockets that connect to a port on which the gloo of some rank listens. Every rank must call it.

    Args:
        new: sockets opened since the groups were begun. Some may be connections that another thread has made meanwhile.
    """
    mine = sorted(ports(new))
    most = int(ranks.all_max(len(mine)))  # there is one port for each group and network interface, so their number has no fixed bound
    table = ranks.all_gather(torch.tensor(mine + [0] * (most - len(mine)), dtype=torch.int64))
    listening = {port for port in table.flatten().tolist() if port}
    return frozenset(c for c in new if c.peer is not None and {c.local[1], c.peer[1]} & listening)

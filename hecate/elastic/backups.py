"""Keeps a second copy of every owned expert on another rank (`fssdp.redundancy`), so that no step is lost when a rank dies.

A backup equals the expert on its owner bit for bit: the owner sends each step's summed gradient, and both ranks take the same optimizer
step. This sends a third of the bytes of master parameters and moments, and it is hidden behind the all-reduce of the replicated gradients.
(MoE-LoRA can afford backups, because the frozen base need not be kept twice.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from hecate.engine.protocol import ExpertEngine
from hecate.optim.optimizer import MASTER, ExpertOptimizer
from hecate.parallel.backup_ranks import backup_ranks
from hecate.parallel.comm.aborts import read
from hecate.parallel.comm.reshard import RowSpec, reshard
from hecate.parallel.units import Unit, expert_name


def copy_to_backup_ranks(engine: ExpertEngine, optimizer: ExpertOptimizer) -> int:
    """Make the backups of all owned experts anew, with their moments.

    Every rank must call it, between two steps, after owners have changed.

    Returns:
        Number of bytes sent by all ranks together.
    """
    backup_rank_D = backup_ranks(engine.shards.config.topology)
    backups: dict[str, nn.Parameter] = {}
    states: dict[str, dict[str, Tensor]] = {}
    num_bytes = 0
    if engine.shards.world_size > 1:
        for unit, store in engine.shards.stores.items():
            rows = {expert: optimizer.row(parameter) for expert, parameter in zip(store.experts, store.parameters, strict=True)}
            specs = optimizer.row_specs(RowSpec((store.chunk_numel,), store.owned.dtype))
            owner_E = engine.shards.owners[unit]
            done = reshard(rows, specs, owner_E, backup_rank_D[owner_E], engine.shards.groups.experts, store.device)
            for expert, row in done.rows.items():
                backups[expert_name(unit, expert)] = nn.Parameter(row.pop(MASTER))
                states[expert_name(unit, expert)] = row
            num_bytes += done.num_bytes
    optimizer.replace_backups(backups, states)
    return num_bytes


def differing_backups(engine: ExpertEngine, optimizer: ExpertOptimizer) -> list[str]:
    """The experts whose backups are not equal to them bit for bit, by name; the same on every rank. Every rank must call it between steps.

    Owner and backup take the same steps from the same numbers, so a difference means that the memory of one of them has changed by itself.
    Only digests travel: 8 bytes an expert.
    """
    names = [expert_name(unit, expert) for unit, chunked in engine.shards.chunked.items() for expert in range(chunked.num_experts)]
    own = torch.zeros((2, len(names)), dtype=torch.int64)
    for place, name in enumerate(names):
        for row, held in enumerate((optimizer.owned, optimizer.backups)):
            if name in held:
                own[row, place] = _digest(optimizer.row(held[name]))
    both = own.to(engine.shards.device)
    dist.all_reduce(both, group=engine.shards.groups.experts)  # each number comes from one rank
    owned_E, backup_E = read(both, engine.shards.groups.experts)
    return [names[place] for place in torch.nonzero((owned_E != backup_E) & (backup_E != 0)).flatten().tolist()]


def _digest(row: dict[str, Tensor]) -> int:
    """63 bits of all numbers of an expert's parameters and moments; never 0."""
    hashed = xxhash.xxh3_64()
    for key in sorted(row):
        hashed.update(row[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return (hashed.intdigest() >> 1) or 1


@dataclass(frozen=True)
class GradientsOnTheirWay:
    """A message of gradients that `send_gradients` has started."""

    work: dist.Work | None
    """None: this rank sends and receives nothing"""
    sent: Tensor
    """must live until it is sent"""
    arriving: Tensor
    backups: list[nn.Parameter]
    """in the order in which their gradients arrive"""

    def wait(self) -> None:
        """Wait for the gradients and give them to the backups."""
        if self.work is None:
            return
        self.work.wait()
        for backup, grad in zip(self.backups, self.arriving.split([backup.numel() for backup in self.backups]), strict=True):
            backup.grad = grad


def send_gradients(engine: ExpertEngine, optimizer: ExpertOptimizer, loads: dict[Unit, np.ndarray]) -> GradientsOnTheirWay:
    """Start sending the summed gradients of owned experts to their backup ranks, in one all-to-all for all units. Every rank must call it.

    An expert that no token has reached has no gradient, neither on its owner nor on its backup rank.

    Args:
        loads: per unit, int64 [experts, source ranks], the same on every rank.
    """
    rank, world = engine.shards.rank, engine.shards.world_size
    if world == 1 or not engine.shards.stores:
        return GradientsOnTheirWay(None, torch.empty(0), torch.empty(0), [])
    backup_rank_D = backup_ranks(engine.shards.config.topology)
    leaving: list[list[nn.Parameter]] = [[] for _ in range(world)]
    arriving: list[list[nn.Parameter]] = [[] for _ in range(world)]
    reached = engine.shards.reached(loads)
    for unit, store in engine.shards.trained.items():
        reached_E = reached[unit]
        for expert, parameter in zip(store.experts, store.parameters, strict=True):
            if reached_E[expert]:
                leaving[backup_rank_D[rank]].append(parameter)
        owner_E = engine.shards.owners[unit]
        for expert in np.flatnonzero(reached_E & (backup_rank_D[owner_E] == rank)).tolist():
            arriving[owner_E[expert]].append(optimizer.backups[expert_name(unit, expert)])
    some = next(iter(engine.shards.stores.values())).owned
    parts = [parameter.grad.flatten() for peer in leaving for parameter in peer if parameter.grad is not None]
    sent = torch.cat([some.new_empty(0), *parts])
    leaving_sizes, arriving_sizes = ([sum(parameter.numel() for parameter in peer) for peer in side] for side in (leaving, arriving))
    received = some.new_empty(sum(arriving_sizes))
    work = dist.all_to_all_single(received, sent, arriving_sizes, leaving_sizes, group=engine.shards.groups.experts, async_op=True)
    return GradientsOnTheirWay(work, sent, received, [backup for peer in arriving for backup in peer])

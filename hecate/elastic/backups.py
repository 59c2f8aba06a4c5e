"""Second copies of owned experts on another rank (`fssdp.redundancy`), so that no step is lost with a rank.

A backup holds what its owner holds, bit for bit: the owner sends each step's summed gradient, and both take the same optimizer step. That
is a third of what sending master and moments would take, and it hides behind the all-reduce of the replicated gradients.
(MoE-LoRA can afford it: of a frozen base nothing has to be kept twice.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.engine.protocol import ExpertEngine
from hecate.optim.optimizer import MASTER, ExpertOptimizer
from hecate.parallel.backup_ranks import backup_ranks
from hecate.parallel.comm.reshard import RowSpec, reshard
from hecate.parallel.units import Unit, expert_name


def copy_to_backup_ranks(engine: ExpertEngine, optimizer: ExpertOptimizer) -> int:
    """Make the backups of all owned experts anew, with their moments. Every rank must call it, between two steps, after owners have
    changed.

    Returns:
        Bytes sent by all ranks together.
    """
    backup_rank_D = backup_ranks(engine.shards.config.topology)
    backups: dict[str, nn.Parameter] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    num_bytes = 0
    if engine.shards.world_size > 1:
        for layer, store in engine.shards.stores.items():
            rows = {expert: optimizer.row(parameter) for expert, parameter in zip(store.experts, store.parameters, strict=True)}
            specs = optimizer.row_specs(RowSpec((store.chunk_numel,), store.owned.dtype))
            owner_E = engine.shards.owners[layer]
            done = reshard(rows, specs, owner_E, backup_rank_D[owner_E], engine.shards.groups.experts, store.device)
            for expert, row in done.rows.items():
                backups[expert_name(layer, expert)] = nn.Parameter(row.pop(MASTER))
                moments[expert_name(layer, expert)] = row
            num_bytes += done.num_bytes
    optimizer.replace_backups(backups, moments)
    return num_bytes


@dataclass(frozen=True)
class GradientsOnTheirWay:
    """What `send_gradients` has started."""

    work: dist.Work | None
    sent: Tensor
    """kept until it is sent"""
    arriving: Tensor
    backups: list[nn.Parameter]
    """in the order in which their gradients arrive"""

    def wait(self) -> None:
        """The backups have their gradients afterwards."""
        if self.work is None:
            return
        self.work.wait()
        for backup, grad in zip(self.backups, self.arriving.split([backup.numel() for backup in self.backups]), strict=True):
            backup.grad = grad


def send_gradients(engine: ExpertEngine, optimizer: ExpertOptimizer, loads: dict[Unit, np.ndarray]) -> GradientsOnTheirWay:
    """Start sending the summed gradients of owned experts to their backup_ranks, in one all-to-all of all layers. Every rank must call it.

    An expert that no token has reached has no gradient, there as here.

    Args:
        loads: per layer, int64 [experts, source ranks], the same on every rank.
    """
    rank, world = engine.shards.rank, engine.shards.world_size
    if world == 1 or not engine.shards.stores:
        return GradientsOnTheirWay(None, torch.empty(0), torch.empty(0), [])
    backup_rank_D = backup_ranks(engine.shards.config.topology)
    leaving: list[list[nn.Parameter]] = [[] for _ in range(world)]
    arriving: list[list[nn.Parameter]] = [[] for _ in range(world)]
    for layer, store in engine.shards.stores.items():
        reached_E = loads[layer].sum(1) > 0
        for expert, parameter in zip(store.experts, store.parameters, strict=True):
            if reached_E[expert]:
                leaving[backup_rank_D[rank]].append(parameter)
        owner_E = engine.shards.owners[layer]
        for expert in np.flatnonzero(reached_E & (backup_rank_D[owner_E] == rank)).tolist():
            arriving[owner_E[expert]].append(optimizer.backups[expert_name(layer, expert)])
    some = next(iter(engine.shards.stores.values())).owned
    parts = [parameter.grad.flatten() for peer in leaving for parameter in peer if parameter.grad is not None]
    sent = torch.cat([some.new_empty(0), *parts])
    leaving_sizes, arriving_sizes = ([sum(parameter.numel() for parameter in peer) for peer in side] for side in (leaving, arriving))
    received = some.new_empty(sum(arriving_sizes))
    work = dist.all_to_all_single(received, sent, arriving_sizes, leaving_sizes, group=engine.shards.groups.experts, async_op=True)
    return GradientsOnTheirWay(work, sent, received, [backup for peer in arriving for backup in peer])

"""Keeps one or two more copies of every owned expert on other ranks (`fssdp.redundancy`), so that no step is lost when ranks die.

A backup equals the expert on its owner bit for bit: the owner sends each step's summed gradient, and all of these ranks take the same
optimizer step. For each backup this sends a third of the bytes of master parameters and moments, and it is hidden behind the all-reduce of
the replicated gradients. (MoE-LoRA can afford backups, because the frozen base need not be kept twice.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate import faults
from hecate.engine.protocol import ExpertEngine
from hecate.optim.optimizer import MASTER, ExpertOptimizer
from hecate.parallel.cluster.backup_ranks import backup_ranks
from hecate.parallel.comm.aborts import read
from hecate.parallel.comm.reshard import reshard
from hecate.parallel.values.units import Unit, expert_name


def backups_kept(engine: ExpertEngine, redundancy: int) -> int:
    """The number of backups of each expert: none where other sharding groups hold it already, of which there are more than `redundancy`."""
    return 0 if engine.shards.mesh.num_sharding_groups > 1 else redundancy


def holders(engine: ExpertEngine, unit: Unit, backups: int) -> np.ndarray:
    """int64 [copies, experts]: the ranks of the job that hold each expert of a unit: its owner in each sharding group; or in a single group
    its owner first, then its backup ranks."""
    owner_E, mesh = engine.shards.owners[unit], engine.shards.mesh
    if mesh.num_sharding_groups > 1:
        return owner_E + mesh.shard_size * np.arange(mesh.num_sharding_groups)[:, None]
    config = engine.shards.config
    return np.concatenate([owner_E[None], backup_ranks(config.topology, backups, config.tp_size)[owner_E].T])


def copy_to_backup_ranks(engine: ExpertEngine, optimizer: ExpertOptimizer, redundancy: int, units: Collection[Unit] | None = None) -> int:
    """Make the backups of owned experts anew, with their moments, one unit at a time.

    Every rank must call it, between two steps, after owners have changed. No rank gives up an old backup, or a former owner's copy, before
    every rank holds the new ones: until then those may be the only copies that a lost rank leaves.

    Args:
        redundancy: see `backups_kept`; where there are too few ranks, each expert has as many backups as there are other ranks.
        units: whose owners have changed; None: all.

    Returns:
        Number of bytes sent by all ranks together.
    """
    backups = backups_kept(engine, redundancy)
    num_bytes = 0
    for unit in engine.shards.stores if units is None else units:
        copies, states, sent = _new_backups(engine, optimizer, unit, backups)
        faults.at("backups")
        optimizer.replace_backups({**optimizer.backups, **copies}, states)
        _wait_for_all(engine)
        faults.at("backups")
        of_unit = {expert_name(unit, expert) for expert in range(engine.shards.chunked[unit].num_experts)}
        kept = {name: backup for name, backup in optimizer.backups.items() if name in copies or name not in of_unit}
        optimizer.replace_backups(kept, {})
        num_bytes += sent
    return num_bytes


def _new_backups(
    engine: ExpertEngine, optimizer: ExpertOptimizer, unit: Unit, backups: int
) -> tuple[dict[str, nn.Parameter], dict[str, dict[str, Tensor]], int]:
    """The backups of a unit's experts that this rank is to hold and their states, by name, and the bytes sent by all ranks together."""
    copies: dict[str, nn.Parameter] = {}
    states: dict[str, dict[str, Tensor]] = {}
    num_bytes = 0
    if backups:
        store = engine.shards.stores[unit]
        rows = {expert: optimizer.row(parameter) for expert, parameter in zip(store.experts, store.parameters, strict=True)}
        specs = optimizer.chunk_specs(unit, store.owned)
        owner_E, *backup_BE = holders(engine, unit, backups)
        for backup_E in backup_BE:
            done = reshard(rows, specs, owner_E, backup_E, engine.shards.groups.experts, store.device)
            for expert, row in done.rows.items():
                copies[expert_name(unit, expert)] = nn.Parameter(row.pop(MASTER))
                states[expert_name(unit, expert)] = row
            num_bytes += done.num_bytes
    return copies, states, num_bytes


def _wait_for_all(engine: ExpertEngine) -> None:
    """Return when every rank has called this, or raise because one is lost."""
    token = torch.zeros((), device=engine.shards.device)
    dist.all_reduce(token, group=engine.shards.groups.world)
    # With NCCL only the read waits for the other ranks, and raises if the groups were aborted.
    read(token, engine.shards.groups.world)


@dataclass(frozen=True)
class GradientsOnTheirWay:
    """A message of gradients that `send_gradients` has started."""

    work: dist.Work | None
    """The exchange under way; None: this rank sends and receives nothing."""
    sent: Tensor
    """The gradients that this rank sends, kept here because their memory must live until they are sent."""
    arriving: Tensor
    backups: list[nn.Parameter]
    """The backups on this rank, in the order in which their gradients arrive."""

    def wait(self) -> None:
        """Wait for the gradients and give them to the backups."""
        if self.work is None:
            return
        self.work.wait()
        for backup, grad in zip(self.backups, self.arriving.split([backup.numel() for backup in self.backups]), strict=True):
            backup.grad = grad


def send_gradients(engine: ExpertEngine, optimizer: ExpertOptimizer, loads: dict[Unit, np.ndarray], backups: int) -> GradientsOnTheirWay:
    """Start sending the summed gradients of owned experts to their backup ranks, in one all-to-all for all units. Every rank must call it.

    An expert that no token has reached has no gradient, neither on its owner nor on its backup ranks.

    Args:
        loads: per unit, int64 [experts, source ranks], the same on every rank.
        backups: of each expert, as `copy_to_backup_ranks` has made them.
    """
    rank, world = engine.shards.rank, engine.shards.world_size
    if world == 1 or not engine.shards.stores:
        return GradientsOnTheirWay(None, torch.empty(0), torch.empty(0), [])
    leaving: list[list[nn.Parameter]] = [[] for _ in range(world)]
    arriving: list[list[nn.Parameter]] = [[] for _ in range(world)]
    reached = engine.shards.reached(loads)
    for unit, store in engine.shards.trained.items():
        reached_E = reached[unit]
        owner_E, *backup_BE = holders(engine, unit, backups)
        for expert, parameter in zip(store.experts, store.parameters, strict=True):
            if reached_E[expert]:
                for backup_E in backup_BE:
                    leaving[backup_E[expert]].append(parameter)
        own_E = (np.array(backup_BE) == rank).any(0)  # a rank has one backup of an expert at most
        # By expert ascending, as the owner's loop above: gradients travel without names, so their order says whose they are.
        for expert in np.flatnonzero(reached_E & own_E).tolist():
            arriving[owner_E[expert]].append(optimizer.backups[expert_name(unit, expert)])
    like = next(iter(engine.shards.stores.values())).owned
    parts = [parameter.grad.flatten() for peer in leaving for parameter in peer if parameter.grad is not None]
    sent = torch.cat([like.new_empty(0), *parts])
    leaving_sizes, arriving_sizes = ([sum(parameter.numel() for parameter in peer) for peer in side] for side in (leaving, arriving))
    received = like.new_empty(sum(arriving_sizes))
    work = dist.all_to_all_single(received, sent, arriving_sizes, leaving_sizes, group=engine.shards.groups.experts, async_op=True)
    return GradientsOnTheirWay(work, sent, received, [backup for peer in arriving for backup in peer])

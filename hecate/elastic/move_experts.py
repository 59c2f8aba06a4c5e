"""Re-sharding: moves experts, with their master parameters and moments, to new owners between two steps, if this is predicted to pay."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate import faults
from hecate.config.sections import OPTIMIZERS
from hecate.elastic.backups import copy_to_backup_ranks
from hecate.engine.protocol import ExpertEngine
from hecate.errors import UserError
from hecate.optim.optimizer import MASTER, ExpertOptimizer, owned_parameters
from hecate.parallel.comm.aborts import read
from hecate.parallel.comm.reshard import reshard
from hecate.parallel.plan.sharding import better_owners, owned_bytes, owned_slots
from hecate.parallel.values.optimizer_state import expert_spec, owner_bytes
from hecate.parallel.values.units import Unit, expert_name
from hecate.report.events import Move, Resharding


def check_room(engine: ExpertEngine) -> None:
    """Check that the devices can hold the experts, and the blocks of pools, when these are dealt by memory, as re-sharding deals them.

    Raises:
        UserError: the memory that the topology gives the devices is too small for the experts.
    """
    number: dict[float, int] = {}
    inputs = engine.shards.plans.inputs(for_owners=True)
    for _, given in inputs:
        size = owned_bytes(given.cost)
        number[size] = number.get(size, 0) + given.owner_LE.size
    for pool in engine.shards.pools.values():
        layout, state = pool.layout(), engine.shards.config.state or OPTIMIZERS["adamw"].STATE
        size = (
            owner_bytes(state, expert_spec(layout.trainable), pool.dtype.itemsize) + layout.trainable_numel * pool.dtype.itemsize
        )  # a gradient, too
        number[size] = number.get(size, 0) + pool.num_experts
    if inputs:
        owned_slots(number, inputs[0][1].topology.memory)


def reshard_if_it_pays(engine: ExpertEngine, optimizer: ExpertOptimizer, steps: int, redundancy: int = 0) -> Resharding | None:
    """Find better owners for the predicted loads and move the experts there, if `steps` more steps repay it.

    Every rank must call it, after a step of the optimizer and before the next one begins.

    Args:
        redundancy: see `move_experts`.

    Returns:
        What was moved; None: all experts stay, because moving does not pay or the devices' memory is too small (`check_room`).
    """
    started = time.monotonic()
    inputs = engine.shards.plans.inputs(for_owners=True)
    try:
        better = better_owners(engine.shards.config.planner, [given for _, given in inputs], steps)
    except UserError:
        better = None  # a job's controller may order a re-shard at any time, and this must not end a run that can go on as it is
    owners = dict(engine.shards.owners)
    if better is not None:
        for (units, _), owner_LE in zip(inputs, better[0], strict=True):
            owners.update(zip(units, owner_LE, strict=True))
    refuse_different_owners(engine, owners)
    if better is None:
        return None
    return Resharding(move_experts(engine, optimizer, owners, redundancy), better[1], time.monotonic() - started)


def move_experts(engine: ExpertEngine, optimizer: ExpertOptimizer, owners: dict[Unit, np.ndarray], redundancy: int = 0) -> Move:
    """Move master parameters, moments and frozen parts to `owners`, bit for bit, one unit at a time.

    Every rank must call it, between two steps. An expert that was never stepped has no moments, neither before nor after. A frozen part
    that the new owner holds already does not travel.

    Args:
        owners: int64 [experts] for each of the engine's units and pools.
        redundancy: how many ranks may be lost meanwhile without taking an expert's last copy. Unless 0, a former owner keeps its copies
            until their backups are made anew, and these are made here.
    """
    experts = num_bytes = 0
    for unit, store in engine.shards.stores.items():
        before, after = engine.shards.owners[unit], owners[unit]
        if np.array_equal(before, after):
            continue
        faults.at("move")
        rows: dict[int, dict[str, Tensor]] = {
            expert: optimizer.row(parameter) for expert, parameter in zip(store.experts, store.parameters, strict=True)
        }
        done = reshard(rows, optimizer.chunk_specs(unit, store.owned), before, after, engine.shards.groups.experts, store.device)
        faults.at("move")
        frozen_bytes = engine.shards.change_owners(unit, after, {expert: tensors.pop(MASTER) for expert, tensors in done.rows.items()})
        states = {expert_name(unit, expert): tensors for expert, tensors in done.rows.items()}
        optimizer.replace_owned(owned_parameters(engine), states, keep_leaving=redundancy > 0)
        if redundancy:
            copy_to_backup_ranks(engine, optimizer, redundancy, [unit])
        experts += done.moved
        num_bytes += done.num_bytes + frozen_bytes
    if engine.shards.groups.replicate is not None:
        # Every sharding group moves the same experts, but not the same frozen parts: one that its new owner holds already stays.
        total = torch.tensor(num_bytes, device=next(iter(engine.shards.stores.values())).device)
        dist.all_reduce(total, group=engine.shards.groups.replicate)
        num_bytes = int(read(total, engine.shards.groups.replicate))
    return Move(experts, num_bytes)


def refuse_different_owners(engine: ExpertEngine, owners: Mapping[Unit, np.ndarray]) -> None:
    """Check that all ranks have planned the same owners; otherwise experts would be lost when they move. Every rank must call it.

    Raises:
        UserError: they have not. Every rank raises it, and its text names the layers.
    """
    if dist.get_world_size(engine.shards.groups.world) == 1 or not owners:
        return
    own = torch.from_numpy(np.concatenate(list(owners.values())))
    # One message finds the highest and the lowest of each number: the highest of -x is the lowest of x.
    highest = torch.cat([own, -own]).to(next(iter(engine.shards.stores.values())).device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=engine.shards.groups.world)
    upper, lower = read(highest, engine.shards.groups.world).chunk(2)
    sizes = [len(owner_E) for owner_E in owners.values()]
    differ = [str(unit) for unit, part in zip(owners, (upper != -lower).split(sizes), strict=True) if bool(part.any())]
    if differ:
        units = ", ".join(differ[:8]) + (f" and {len(differ) - 8} more" if len(differ) > 8 else "")
        raise UserError(
            f"the ranks planned different owners for the experts of layer {units}, so no expert was moved\n"
            "  all ranks must run the same versions of hecate, numpy and numba, on processors that round alike\n"
            "  resume from the last checkpoint without fssdp.reshard_interval, or on machines of one kind"
        )

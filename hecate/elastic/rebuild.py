"""Lets a run go on with other ranks in the same processes, after ranks were lost or new ones have joined.

A rank whose collective has failed aborts its groups, so that no other rank waits for it, and gets the next group from its `Membership`.
Then all ranks of that group go through the same phases (`hecate.train.training` calls them in this order):

1. `exchange_rank_states`: the ranks exchange how far each of them is.
2. `catch_up`: if some rank has taken the step under way, the others have all gradients of that step, and take it now with the same norm.
   Otherwise no rank has changed anything, and the step is done again from its beginning.
3. `redeal`: each expert is taken from its owner, or else from its backup, and dealt anew. A new rank receives the replicated parameters
   and the `TrainState`. If an expert has no copy left, all ranks go back to the last checkpoint (`go_back`).

No rank frees anything until everything has arrived; with backups, until the new ones are made, too (`copy_to_backup_ranks`). So if another
rank is lost meanwhile, the remaining ranks begin these phases again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.checkpoint.train_state import LoadedState, NoCheckpointError, TrainedParts, TrainState, load_state
from hecate.config import Config
from hecate.errors import UserError
from hecate.optim.norm_limit import norm_limit
from hecate.optim.optimizer import MASTER, ExpertOptimizer, owned_parameters
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.comm.reshard import reshard
from hecate.parallel.values.placement import contiguous_owners, redealt_owners
from hecate.parallel.values.units import Unit, expert_name
from hecate.ranks.ranks import Ranks

_OWNED, _BACKUP = 2, 1
_MOST_NAMED = 8
"""The most experts that a text lists by name."""

ExpertStates = dict[Unit, dict[int, dict[str, Tensor]]]
"""By unit and expert, the master chunk and its state (`ExpertOptimizer.row`)."""


@dataclass(frozen=True)
class Group:
    """A new group of ranks, as one of its ranks sees it."""

    ranks: Ranks
    """The ranks of the group, already connected (`hecate.ranks.ranks.connect`)."""
    topology: Topology
    """The devices of the ranks, and their links."""


class Membership(Protocol):
    """One rank's connection to the launcher or controller of its job, which decides which ranks are in the job."""

    def loaded(self) -> None:
        """Report that this rank can go on when others are lost. Called once, when the run begins, by ranks that did not join later."""

    def regroup_requested(self) -> bool:
        """Whether a new group waits for this rank, for example because one more rank is ready.

        It is called between steps and must return at once.
        """

    def first_group(self) -> Group:
        """Join a run under way: wait until this process is let in, and return its group.

        The process has loaded the model by itself, and has left the group of one that it did this in.
        """

    def next_group(self) -> Group | None:
        """Wait for the next group and join it; None: no rank was lost and none has joined. The process has left its old group.

        If a rank is lost while the group forms, the implementation waits for the group after it.
        """


@dataclass(frozen=True)
class RankState:
    """How far one rank of a new group is."""

    has_state: bool
    """Whether the rank has a state. A new rank has none, nor has one that lost it on the way back to a checkpoint."""
    step: int
    completed: int
    tokens: int
    gradients_complete: bool
    """Whether the rank has the summed gradients of the step after `step`, so that only the optimizer's step is missing."""
    norm: float
    """The global gradient norm of the rank's last step."""
    norms: tuple[float, ...] = ()
    """The gradient norms of the separate experts in the rank's last step."""


def exchange_rank_states(ranks: Ranks, state: TrainState | None, optimizer: ExpertOptimizer) -> list[RankState]:
    """Exchange how far each rank is, and return this by rank. Every rank must call it; `state` is None on a rank that has none."""
    own = [0.0] * 4 if state is None else [1.0, float(state.step), float(state.completed), float(state.tokens)]
    own += [float(optimizer.gradients_complete), optimizer.last_norm, *optimizer.last_norms]
    table = ranks.all_gather(torch.tensor(own, dtype=torch.float64)).tolist()
    return [
        RankState(bool(has_state), int(step), int(completed), int(tokens), bool(complete), norm, tuple(norms))
        for has_state, step, completed, tokens, complete, norm, *norms in table
    ]


def can_catch_up(rank_states: Sequence[RankState]) -> bool:
    """Whether the ranks with a state are at most one step apart, and the ranks that are behind can take that step.

    This is false, for example, if only one of the ranks has gone back to a checkpoint.
    """
    with_state = [rank_state for rank_state in rank_states if rank_state.has_state]
    last = max((rank_state.step for rank_state in with_state), default=0)
    return len(with_state) > 0 and all(
        rank_state.step == last or (rank_state.step == last - 1 and rank_state.gradients_complete) for rank_state in with_state
    )


def catch_up(parts: TrainedParts, state: TrainState, rank_states: Sequence[RankState], config: Config) -> TrainState:
    """Take this rank to the beginning of the step that the most advanced rank is at (`can_catch_up`), and return its state there."""
    ahead = max((rank_state for rank_state in rank_states if rank_state.has_state), key=lambda rank_state: rank_state.step)
    if state.step < ahead.step:
        # The step's forward and backward passes have already advanced the stream and the history, whose last loads are the step's.
        loads, limit = parts.engine.shards.history.snapshot()[-1], norm_limit(state.grad_norms, config.skip_step_sigma_factor)
        taken = parts.optimizer.step(ahead.norm, config.max_grad_norm, loads, ahead.norms, limit)
        state = state.after_step(parts, tokens=ahead.tokens - state.tokens, skipped=not taken, grad_norm=ahead.norm)
    state.put_back(parts)
    return state


@dataclass(frozen=True)
class NoCopyLeft:
    """Experts cannot be dealt anew, because the ranks that held them and their backups are lost."""

    experts: tuple[str, ...]
    """The names of these experts."""


def redeal(
    parts: TrainedParts, state: TrainState | None, rank_states: Sequence[RankState], group: Group, redundancy: int
) -> tuple[TrainState, int] | NoCopyLeft:
    """Deal all experts anew over the group, and send everything else to ranks without a state. Every rank must call it.

    Args:
        redundancy: unless 0, former owners keep their copies until their backups are made anew (`copy_to_backup_ranks`).

    Returns:
        The state of the run, and the number of experts that moved; or which experts have no copy left, and nothing was changed.
    """
    ranks = group.ranks
    held = _held(parts, ranks, has_state=state is not None)
    holders = {unit: np.where(held_DE.max(0) > 0, held_DE.argmax(0), -1) for unit, held_DE in held.items()}
    if lost := tuple(expert_name(unit, int(e)) for unit, holder_E in holders.items() for e in np.flatnonzero(holder_E < 0)):
        return NoCopyLeft(lost)
    size = dist.get_world_size(ranks.groups.experts)
    owners = dict(zip(holders, redealt_owners([holder_E % size for holder_E in holders.values()], size), strict=True))
    # Every rank has found the same `lost`, so all or none of them go on to these messages.
    dealt, moved = _deal(parts, ranks, held, owners, size)
    source = next(rank for rank, rank_state in enumerate(rank_states) if rank_state.has_state)
    everyone_has_state = all(rank_state.has_state for rank_state in rank_states)
    received = None if everyone_has_state else _send_replicated(parts, ranks, source, state)
    ranks.barrier()  # every rank has received everything, so no rank needs what the next lines free
    _install(parts, group, owners, dealt, keep_leaving=redundancy > 0)
    if state is None:
        assert received is not None
        state = _take_over(parts, *received)
        # After the state, which has brought the loads by the old ranks.
        parts.engine.shards.history.redeal(ranks.world_size)
    # Phases after the step that some rank has not been through are done by all of them again, because all must take part.
    completed = min(rank_state.completed for rank_state in rank_states if rank_state.has_state)
    return replace(state.with_positions_of(parts), completed=completed), moved


def go_back(parts: TrainedParts, config: Config, group: Group, lost: Sequence[str] = ()) -> LoadedState:
    """Load the last checkpoint on all ranks of the group. Every rank must call it; until it returns, the values in `parts` are undefined.

    Args:
        lost: the experts without a copy, for the text of an error.

    Raises:
        UserError: there is no checkpoint.
    """
    engine, ranks = parts.engine, group.ranks
    parts.optimizer.replace_backups({}, {})
    size, rank = dist.get_world_size(ranks.groups.experts), dist.get_rank(ranks.groups.experts)
    owners = {unit: contiguous_owners(chunked.num_experts, size) for unit, chunked in engine.shards.chunked.items()}
    chunks = {
        unit: {int(expert): engine.shards.chunked[unit].init_chunk(int(expert)) for expert in np.flatnonzero(owner_E == rank)}
        for unit, owner_E in owners.items()
    }
    engine.rejoin(group.topology, ranks.groups, owners, chunks)
    parts.optimizer.replace_owned(owned_parameters(engine), {})
    try:
        return load_state(config, ranks, parts)
    except NoCheckpointError as error:
        raise UserError(
            f"ranks were lost with the only copy of {named(lost)}, and {error}\n"
            "  start the run anew; fssdp.redundancy=1 keeps a second copy of each expert, save_steps writes checkpoints to go back to"
        ) from error


def named(experts: Sequence[str]) -> str:
    """The experts in words, the first few by name; "some experts" if no name is known."""
    if not experts:
        return "some experts"
    more = f" and {len(experts) - _MOST_NAMED} more" if len(experts) > _MOST_NAMED else ""
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(experts[:_MOST_NAMED])}{more}"


def _held(parts: TrainedParts, ranks: Ranks, *, has_state: bool) -> dict[Unit, np.ndarray]:
    """Per unit int64 [ranks, experts]: `_OWNED`, `_BACKUP`, or 0 where the rank has no copy of the expert."""
    optimizer, chunked = parts.optimizer, parts.engine.shards.chunked
    own = []
    for unit, of_unit in chunked.items():
        held_E = np.zeros(of_unit.num_experts, dtype=np.int64)
        for expert in range(of_unit.num_experts if has_state else 0):
            name = expert_name(unit, expert)
            held_E[expert] = _OWNED if name in optimizer.owned else _BACKUP if name in optimizer.backups else 0
        own.append(held_E)
    if not own:
        return {}
    held_DE = ranks.all_gather(torch.from_numpy(np.concatenate(own))).numpy()
    cuts = np.cumsum([len(held_E) for held_E in own])[:-1]
    return dict(zip(chunked, np.split(held_DE, cuts, axis=1), strict=True))


def _deal(
    parts: TrainedParts, ranks: Ranks, held: Mapping[Unit, np.ndarray], owners: Mapping[Unit, np.ndarray], size: int
) -> tuple[ExpertStates, int]:
    """The states of the experts that this rank is to own, and how many experts have moved on all ranks together.

    Each sharding group of `size` ranks gets every expert. A rank that has a copy of what it is to own keeps it; the others get it from the
    lowest rank that owns it, or else from the lowest that has a backup.
    """
    optimizer = parts.optimizer
    mine = {**optimizer.backups, **optimizer.owned}
    dealt: ExpertStates = {}
    moved = 0
    for unit, store in parts.engine.shards.stores.items():
        specs = optimizer.chunk_specs(unit, store.owned)
        dealt[unit] = {}
        for first in range(0, ranks.world_size, size):
            target_E = first + owners[unit]
            has_it_E = held[unit][target_E, np.arange(len(target_E))] > 0
            source_E = np.where(has_it_E, target_E, held[unit].argmax(0))
            rows = {expert: optimizer.row(mine[expert_name(unit, expert)]) for expert in np.flatnonzero(source_E == ranks.rank).tolist()}
            done = reshard(rows, specs, source_E, target_E, ranks.groups.world, store.device)
            dealt[unit] |= done.rows
            moved += done.moved
    return dealt, moved


def _install(parts: TrainedParts, group: Group, owners: dict[Unit, np.ndarray], dealt: ExpertStates, *, keep_leaving: bool) -> None:
    chunks = {unit: {expert: row[MASTER] for expert, row in experts.items()} for unit, experts in dealt.items()}
    states = {
        expert_name(unit, expert): {key: value for key, value in row.items() if key != MASTER}
        for unit, experts in dealt.items()
        for expert, row in experts.items()
    }
    parts.engine.rejoin(group.topology, group.ranks.groups, owners, chunks)
    parts.optimizer.replace_owned(owned_parameters(parts.engine), states, keep_leaving=keep_leaving)


def _send_replicated(
    parts: TrainedParts, ranks: Ranks, source: int, state: TrainState | None
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """Send the run's state, and the rows (`ExpertOptimizer.row`) of what all ranks hold alike, from rank `source` to all ranks.

    Returns:
        On a rank without a state: what it has received. On others: None.
    """
    optimizer = parts.optimizer
    text = tensors = None
    if ranks.rank == source:
        assert state is not None
        rows = {name: optimizer.row(parameter) for name, parameter in optimizer.alike.items()}
        flat = [rows[name][key] for name in rows for key in rows[name]]
        tensors = b"".join(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for part in flat)
        text = json.dumps({"state": state.to_json(), "stepped": [name for name in rows if len(rows[name]) > 1]}).encode()
    text, tensors = ranks.broadcast_from(source, text), ranks.broadcast_from(source, tensors)
    if state is not None:
        return None
    facts = json.loads(text)
    received: dict[str, dict[str, Tensor]] = {}
    start = 0
    for name, parameter in optimizer.alike.items():
        received[name] = {}
        for key, spec in optimizer.row_specs(name, parameter).items():
            if key != MASTER and name not in facts["stepped"]:
                continue
            end = start + spec.num_bytes
            part = torch.frombuffer(bytearray(tensors[start:end]), dtype=spec.dtype)
            received[name][key], start = part.view(spec.shape), end
    return facts["state"], received


def _take_over(parts: TrainedParts, state_value: Mapping[str, Any], rows: Mapping[str, Mapping[str, Tensor]]) -> TrainState:
    optimizer = parts.optimizer
    with torch.no_grad():
        for name, parameter in optimizer.alike.items():
            parameter.copy_(rows[name][MASTER])
            optimizer.set_state(parameter, {key: tensor for key, tensor in rows[name].items() if key != MASTER})
    state = TrainState.from_json(state_value)
    optimizer.steps_done = state.step
    state.put_back(parts)
    return state

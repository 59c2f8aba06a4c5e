"""Going on with other ranks in the same processes: some were lost, or new ones have come.

A rank whose collective has failed aborts its groups, so that no other waits for it, and asks whoever watches over the job (`Controller`)
who is in the next group. Then all of them call `rebuild`:

1. Who had the norm of the step under way has taken it; then the others have all gradients of it and take it now with the same norm.
   Otherwise nobody has changed anything, and the step is done again from its beginning.
2. Each expert is taken from its owner, or else from the backup on its backup rank, and dealt anew. If one has neither, all ranks go back to
   the last checkpoint.
3. A rank that comes new receives the replicated parameters and where the run stands.

Until everything has arrived no rank gives anything up, so one that is lost meanwhile is lost like any other: the survivors call it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hecate.checkpoint import remove_stale_staging
from hecate.elastic.backups import copy_to_backup_ranks
from hecate.optim.optimizer import MASTER, MOMENTS, owned_parameters
from hecate.parallel.comm.reshard import RowSpec, reshard
from hecate.parallel.placement import contiguous_owners, redealt_owners
from hecate.parallel.topology import Topology
from hecate.parallel.units import Unit, expert_name
from hecate.ranks.ranks import Ranks
from hecate.report.events import Rebuilt
from hecate.train.state import load_state

if TYPE_CHECKING:
    from hecate.train.loop import Run

_OWNED, _BACKUP = 2, 1


@dataclass(frozen=True)
class Group:
    """Who goes on together, as one of them is told."""

    ranks: Ranks
    """connected already (`hecate.ranks.ranks.connect`)"""
    topology: Topology
    """of the ranks' devices"""


class Controller(Protocol):
    """Whoever watches over the job's processes. Each rank has its own end of it."""

    def wants_regroup(self) -> bool:
        """Does a new group wait for the ranks to come, as when one more is ready? Asked between steps; must return at once."""

    def first_group(self) -> Group:
        """This process has loaded and could join; wait until it is let in, and join. It has left the group that it was alone in."""

    def next_group(self) -> Group | None:
        """Wait for the next group and join it; None if nobody was lost and nobody has come. This process has left its old one.

        A rank that is lost on the way is the implementation's business: it joins the group after that.
        """


@dataclass(frozen=True)
class _Standing:
    """What one rank brings."""

    known: bool
    """has it a state at all?"""
    step: int
    settled: int
    gradients_complete: bool
    norm: float


def rebuild(run: Run, ranks: Ranks, topology: Topology) -> Rebuilt:
    """Go on with `ranks`, from the beginning of a step. Every one of them must call it; they have left their old groups.

    Args:
        run: with `fresh` set if this rank has come new, so that what it holds is only its beginning.
        topology: of the ranks' devices.

    Raises:
        RuntimeError: a rank was lost meanwhile. The run can be rebuilt again.
        UserError: there is no copy of some experts, and no checkpoint to go back to.
    """
    run.ranks = ranks
    standings = _exchange_standings(run)
    if ranks.is_first:
        remove_stale_staging(run.folder)
    in_step = _finish_or_rewind(run, standings)
    holders = _holders(run)
    went_back = not in_step or any((holder_E < 0).any() for holder_E in holders.values())
    moved = 0
    if went_back:
        _go_back(run, topology)
    else:
        owners = dict(zip(holders, redealt_owners(list(holders.values()), ranks.world_size), strict=True))
        rows = _deal(run, holders, owners)
        source = next(rank for rank, standing in enumerate(standings) if standing.known)
        replicated = _exchange_replicated(run, source) if not all(standing.known for standing in standings) else None
        ranks.barrier()  # now every rank has everything: from here on nothing is given up that another still needs
        _install(run, topology, owners, rows)
        if run.fresh:
            assert replicated is not None
            _take_over(run, *replicated)
        run.settled = min(standing.settled for standing in standings if standing.known)
        moved = sum(int((owners[layer] != holder_E).sum()) for layer, holder_E in holders.items())
    run.fresh = False
    if run.config.fssdp.redundancy:
        copy_to_backup_ranks(run.moe.engine, run.optimizer)
    run.plan_for(topology)
    return Rebuilt(run.step, went_back, moved)


def _exchange_standings(run: Run) -> list[_Standing]:
    mine = [float(not run.fresh), float(run.step), float(run.settled), float(run.optimizer.gradients_complete), run.optimizer.last_norm]
    table = run.ranks.all_gather(torch.tensor(mine, dtype=torch.float64)).tolist()
    return [_Standing(bool(known), int(step), int(settled), bool(complete), norm) for known, step, settled, complete, norm in table]


def _finish_or_rewind(run: Run, standings: list[_Standing]) -> bool:
    """Bring all ranks to the beginning of the same step; False: they are too far apart, as if one had gone back to a checkpoint alone."""
    known = [standing for standing in standings if standing.known]
    last = max((standing.step for standing in known), default=0)
    in_step = all(s.step == last or (s.step == last - 1 and s.gradients_complete) for s in known) and len(known) > 0
    if in_step and not run.fresh and run.step < last:
        assert run.under_way is not None
        norm = next(standing.norm for standing in known if standing.step == last)
        taken = run.optimizer.step(norm, run.config.max_grad_norm)
        run.count(run.under_way.tokens, skipped=not taken)
    run.rewind()
    return in_step


def _holders(run: Run) -> dict[Unit, np.ndarray]:
    """Per layer int64 [experts]: the lowest rank that owns it, else the lowest that has its backup, else -1."""
    mine = []
    for layer, family in run.moe.engine.shards.families.items():
        held_E = np.zeros(family.num_experts, dtype=np.int64)
        for expert in range(0 if run.fresh else family.num_experts):
            name = expert_name(layer, expert)
            held_E[expert] = _OWNED if name in run.optimizer.owned else _BACKUP if name in run.optimizer.backups else 0
        mine.append(held_E)
    if not mine:
        return {}
    held_DE = run.ranks.all_gather(torch.from_numpy(np.concatenate(mine))).numpy()
    holder_E = np.where(held_DE.max(0) > 0, held_DE.argmax(0), -1)
    cuts = np.cumsum([len(held_E) for held_E in mine])[:-1]
    return dict(zip(run.moe.engine.shards.families, np.split(holder_E, cuts), strict=True))


def _deal(run: Run, holders: dict[Unit, np.ndarray], owners: dict[Unit, np.ndarray]) -> dict[Unit, dict[int, dict[str, Tensor]]]:
    """Layer -> expert -> all there is of it, of the experts that this rank is to own."""
    optimizer, ranks = run.optimizer, run.ranks
    dealt = {}
    for layer, store in run.moe.engine.shards.stores.items():
        mine = np.flatnonzero(holders[layer] == ranks.rank).tolist()
        names = {expert: expert_name(layer, expert) for expert in mine}
        held = {expert: optimizer.owned[name] if name in optimizer.owned else optimizer.backups[name] for expert, name in names.items()}
        rows = {expert: optimizer.row(parameter) for expert, parameter in held.items()}
        specs = optimizer.row_specs(RowSpec((store.chunk_numel,), store.owned.dtype))
        dealt[layer] = reshard(rows, specs, holders[layer], owners[layer], ranks.groups.experts, store.device).rows
    return dealt


def _install(run: Run, topology: Topology, owners: dict[Unit, np.ndarray], rows: dict[Unit, dict[int, dict[str, Tensor]]]) -> None:
    chunks = {layer: {expert: row[MASTER] for expert, row in experts.items()} for layer, experts in rows.items()}
    moments = {
        expert_name(layer, expert): {key: value for key, value in row.items() if key != MASTER}
        for layer, experts in rows.items()
        for expert, row in experts.items()
    }
    run.moe.engine.rejoin(topology, run.ranks.groups, owners, chunks)
    run.optimizer.replace_owned(owned_parameters(run.moe.engine), moments)


def _go_back(run: Run, topology: Topology) -> None:
    """To the last checkpoint, with all ranks."""
    engine, ranks = run.moe.engine, run.ranks
    run.fresh = True  # what it holds until it is through counts for nothing
    run.optimizer.replace_backups({}, {})
    owners = {layer: contiguous_owners(family.num_experts, ranks.world_size) for layer, family in engine.shards.families.items()}
    chunks = {
        layer: {int(expert): engine.shards.families[layer].init_chunk(int(expert)) for expert in np.flatnonzero(owner_E == ranks.rank)}
        for layer, owner_E in owners.items()
    }
    engine.rejoin(topology, ranks.groups, owners, chunks)
    run.optimizer.replace_owned(owned_parameters(engine), {})
    run.step, run.tokens = load_state(run.config, ranks, run.moe, run.optimizer, run.stream)
    run.settled = run.step


def _exchange_replicated(run: Run, source: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Where the run stands, and the replicated parameters with their moments, from rank `source`; None for who knows them."""
    ranks = run.ranks
    optimizer = run.optimizer
    text = tensors = None
    if ranks.rank == source:
        rows = {name: optimizer.row(parameter) for name, parameter in optimizer.replicated.items()}
        parts = [rows[name][key] for name in rows for key in rows[name]]
        tensors = torch.cat([part.detach().cpu().contiguous().view(-1).view(torch.uint8) for part in parts]).numpy().tobytes()
        facts = {
            "step": run.step,
            "tokens": run.tokens,
            "skipped": run.skipped,
            "skipped_in_a_row": run.skipped_in_a_row,
            "rows_per_step": run.stream.sequences_per_step,
            "stream": run.stream.state_dict(),
            "history": run.moe.engine.shards.history.state_dict(),
            "stepped": [name for name in rows if len(rows[name]) > 1],
        }
        text = json.dumps(facts).encode()
    text, tensors = ranks.broadcast_from(source, text), ranks.broadcast_from(source, tensors)
    if not run.fresh:
        return None
    facts = json.loads(text)
    received, start = {}, 0
    for name, parameter in optimizer.replicated.items():
        specs = optimizer.row_specs(RowSpec(tuple(parameter.shape), parameter.dtype))
        for key in (MASTER, *(MOMENTS if name in facts["stepped"] else ())):
            end = start + specs[key].num_bytes
            part = torch.frombuffer(bytearray(tensors[start:end]), dtype=specs[key].dtype)
            received[f"{name}/{key}"], start = part.view(specs[key].shape), end
    return facts, received


def _take_over(run: Run, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in run.optimizer.replicated.items():
            parameter.copy_(tensors[f"{name}/{MASTER}"])
            moments = {key: tensors[f"{name}/{key}"] for key in MOMENTS if f"{name}/{key}" in tensors}
            run.optimizer.set_moments(parameter, moments)
    run.step, run.tokens = facts["step"], facts["tokens"]
    run.skipped, run.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]
    run.optimizer.steps_done = run.step
    run.stream.load_state_dict(facts["stream"])
    run.stream.sequences_per_step = facts["rows_per_step"]
    run.moe.engine.shards.history.load_state_dict(facts["history"])
    run.moe.engine.shards.history.redeal(run.ranks.world_size)

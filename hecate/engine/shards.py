"""What one rank holds of a model's experts from step to step, and how one layer's experts are called.

Ranks, owners and placements are those of a sharding group: each plans for its own loads on its own devices. Owners are the same in every
group, and recorded loads are those of the whole job.

Shapes: T tokens, K experts a token, D hidden, S replica slots of this rank, C elements of a chunk, R tokens that this rank computes,
E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.engine.step_plans import EngineConfig, StepPlans
from hecate.errors import UserError
from hecate.experts.family import ExpertFamily, ExpertReplicas, OwnedChunks
from hecate.experts.pairs.pool import Pool
from hecate.kernels.common.assignments import RoutedTokens
from hecate.parallel.cluster.mesh import Mesh, make_mesh, owners_topology
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.comm.device_tables import chunk_tables
from hecate.parallel.comm.dispatch import Dispatched, combine, dispatch
from hecate.parallel.comm.expert_store import ExpertStore, gather_layers
from hecate.parallel.comm.frozen_store import FrozenStore
from hecate.parallel.transfer.residency import Residency, residency_from_json, residency_to_json
from hecate.parallel.values.loads import LoadHistory
from hecate.parallel.values.placement import Placement, contiguous_owners, owners_by_memory, redealt_owners
from hecate.parallel.values.units import Unit, expert_name
from hecate.ranks.groups import ExpertGroups


@dataclass(frozen=True)
class LayerWork:
    """What this rank's experts of a layer compute in one pass."""

    routed: RoutedTokens
    """the tokens that this rank serves, wherever they come from"""
    replicas: ExpertReplicas
    sent: Dispatched | None
    """how they have come, if tokens travel"""


class ExpertShards:
    """All MoE layers' experts on one rank: master chunks of those that it owns, replicas while they last, loads and plans."""

    def __init__(
        self,
        families: dict[Unit, ExpertFamily],
        config: EngineConfig,
        groups: ExpertGroups,
        *,
        pools: Mapping[Unit, Pool] | None = None,
        contiguous: bool = False,
    ) -> None:
        """Args:
        pools: those that families draw on, by their names.
        contiguous: each rank owns as many experts as every other, in their order; else owners follow the devices' memory.
        """
        self.families = families
        self.pools: Mapping[Unit, Pool] = pools or {}
        self.chunked: dict[Unit, OwnedChunks] = {**families, **self.pools}
        """Whatever has chunks with owners: the experts of each unit, whose chunks are empty if they draw on a pool, and the blocks of each
        pool."""
        self.trained_in = {unit: unit if family.pool is None else family.pool.unit for unit, family in families.items()}
        """By unit, what holds the numbers that its experts train: the unit itself, or its pool."""
        if self.pools and config.per_micro_step:
            raise UserError(
                "lora.pairs=shards: the pool is gathered once a step, but fssdp.rematerialize and fssdp.plan gather in each micro-step\n"
                "  leave fssdp.rematerialize and fssdp.plan out"
            )
        self.history = LoadHistory(config.load_window)
        self._contiguous = contiguous
        self._join(config, groups, self._first_owners(config, groups), {})

    def _first_owners(self, config: EngineConfig, groups: ExpertGroups) -> dict[Unit, np.ndarray]:
        """The owners in a run that begins, int64 [experts] of each layer or pool."""
        if self._contiguous:
            return self.redealt({}, dist.get_world_size(groups.experts))
        memory = owners_topology(config.topology, _mesh_of(groups)).memory
        return {unit: owners_by_memory(chunks.num_experts, memory) for unit, chunks in self.chunked.items()}

    def redealt(self, owners: Mapping[Unit, np.ndarray], world_size: int) -> dict[Unit, np.ndarray]:
        """The owners on a sharding group of another size, int64 [experts] of each layer or pool."""
        if self._contiguous:
            return {unit: contiguous_owners(chunks.num_experts, world_size) for unit, chunks in self.chunked.items()}
        return dict(zip(owners, redealt_owners(list(owners.values()), world_size), strict=True))

    def _join(
        self, config: EngineConfig, groups: ExpertGroups, owners: dict[Unit, np.ndarray], chunks: Mapping[Unit, Mapping[int, Tensor]]
    ) -> None:
        """Set all that depends on which ranks there are, as at the beginning of a step."""
        self.groups = groups
        self.rank = dist.get_rank(groups.experts)
        """This rank's number in the sharding group."""
        self.world_size = dist.get_world_size(groups.experts)
        """The number of ranks in the sharding group."""
        self.mesh = _mesh_of(groups)
        group = dist.get_rank(groups.world) // self.world_size
        self.plans = StepPlans(self.families, config, owners, self.history, self.mesh, group, self.rank, self.pools)
        self.stores = {
            unit: ExpertStore(
                owners[unit].tolist(),
                _chunk_of(owned, chunks.get(unit, {})),
                owned.no_chunks(),
                groups.experts,
                groups.replicate,
                replica_dtype=owned.replica_dtype,
            )
            for unit, owned in self.chunked.items()
        }
        self.frozen = {
            unit: FrozenStore(
                self.stores[unit].experts, self.families[unit].frozen_chunk, self.families[unit].no_frozen_chunks(), groups.experts
            )
            for unit in self.plans.residency
        }
        """The frozen parts of the layers whose experts have any."""
        self.token_bytes_to = np.zeros(self.world_size, dtype=np.int64)
        """The bytes that dispatch and combine have sent so far to each rank of the sharding group."""

    @property
    def config(self) -> EngineConfig:
        return self.plans.config

    @config.setter
    def config(self, config: EngineConfig) -> None:
        self.plans.config = config

    @property
    def owners(self) -> dict[Unit, np.ndarray]:
        """The owner rank of each expert, int64 [experts] of each layer and pool."""
        return self.plans.owners

    @property
    def placements(self) -> dict[Unit, Placement]:
        """The placement of each layer, as it is gathered next."""
        return self.plans.placements

    @property
    def in_first_group(self) -> bool:
        """Whether this is the one sharding group that saves and exports, and whose experts count in norms."""
        return self.plans.members[0] == 0

    @property
    def device(self) -> torch.device:
        """The device of the experts; there is one layer at least."""
        return next(iter(self.stores.values())).device

    @property
    def trained(self) -> dict[Unit, ExpertStore]:
        """The stores that are gathered and reduced in a step, in the order of their first use."""
        return {unit: self.stores[unit] for unit in self.trained_in.values()}

    @property
    def expert_names(self) -> list[str]:
        """The names that all experts and blocks of the job have in checkpoints, in one order on every rank."""
        return [expert_name(unit, expert) for unit, of_unit in self.chunked.items() for expert in range(of_unit.num_experts)]

    def reached(self, loads: Mapping[Unit, np.ndarray]) -> dict[Unit, np.ndarray]:
        """Whether a token has reached each expert that trains or, for a pool's blocks, any expert that draws on the pool: bool [chunks] by
        `trained`. The others have no gradient, so that their optimizer keeps nothing of them.

        Args:
            loads: of each unit, int64 [experts, ranks of the job].
        """
        found: dict[Unit, np.ndarray] = {}
        for unit, source in self.trained_in.items():
            reached_E = (loads[unit].sum(1) > 0) & self.families[unit].trains_E
            if source != unit:
                reached_E = found.get(source, False) | np.full(self.pools[source].num_experts, reached_E.any())
            found[source] = reached_E
        return found

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks so far: chunks, gradients, frozen parts, tokens (forward and back)."""
        return int(self._bytes_to().sum()) + self._ring_bytes

    @property
    def bytes_between_nodes(self) -> int:
        """The part of `bytes_sent` that went to ranks on other nodes of the topology."""
        node, members = self.config.topology.node_of_rank, self.plans.members
        own = members[self.rank]
        sent = sum(int(sent) for sent, other in zip(self._bytes_to(), members, strict=True) if node[other] != node[own])
        next_in_ring = (own + self.world_size) % self.mesh.world_size
        return sent + (self._ring_bytes if node[next_in_ring] != node[own] else 0)

    def _bytes_to(self) -> np.ndarray:
        """int64 [ranks of the sharding group]: bytes sent to each of them so far."""
        chunks = [store.bytes_to for store in self.stores.values()]
        return np.sum([self.token_bytes_to, *chunks, *(store.bytes_to for store in self.frozen.values())], axis=0)

    @property
    def _ring_bytes(self) -> int:
        return sum(store.ring_bytes for store in self.stores.values())

    @property
    def replica_bytes(self) -> int:
        """Bytes of the trainable chunks that are materialized now."""
        return sum(store.replica_bytes for store in self.stores.values())

    def named_parameters(self) -> dict[tuple[Unit, int], nn.Parameter]:
        """(unit, expert) -> flat chunk, of the experts that this rank owns."""
        return {
            (unit, expert): parameter
            for unit, store in self.stores.items()
            for expert, parameter in zip(store.experts, store.parameters, strict=True)
        }

    def rejoin(
        self, topology: Topology, groups: ExpertGroups, owners: dict[Unit, np.ndarray], chunks: Mapping[Unit, Mapping[int, Tensor]]
    ) -> None:
        """Go on with other ranks, in other process groups, from the beginning of a step. The parameters are new ones afterwards. Owners
        read or compute frozen parts again, as when the run began.

        Args:
            owners: int64 [experts] of each layer, the same on every rank.
            chunks: unit -> expert -> the master chunk of each expert that this rank owns from now on; copied.
        """
        for unit in self.chunked:
            mine = np.flatnonzero(owners[unit] == dist.get_rank(groups.experts)).tolist()
            assert sorted(chunks.get(unit, {})) == mine, (unit, sorted(chunks.get(unit, {})), mine)
        self._join(replace(self.config, topology=topology), groups, owners, chunks)
        self.history.redeal(topology.world_size)

    def change_owners(self, unit: Unit, owner_E: np.ndarray, chunks: Mapping[int, Tensor]) -> int:
        """Put a layer's experts on new owners, between two steps. The layer's parameters are new ones afterwards.

        Every rank must call it, for the same layers in the same order: frozen parts travel.

        Args:
            chunks: the master chunks of the experts that this rank owns from now on.

        Returns:
            Bytes of frozen parts sent by all ranks together.
        """
        self.stores[unit].change_owners(owner_E.tolist(), chunks)
        move = self.plans.change_owners(unit, owner_E)
        if move is None:
            return 0
        self.frozen[unit].start(move)
        self.frozen[unit].wait()
        return move.copies * self.frozen[unit].chunk_bytes

    def residency_to_json(self) -> dict[str, Any]:
        """Which rank holds which frozen parts, by unit, for a checkpoint; empty with several sharding groups, which differ in that."""
        if self.mesh.num_sharding_groups > 1:
            return {}
        return {str(unit): residency_to_json(state) for unit, state in self.plans.residency.items()}

    def residency_from_json(self, states: Any) -> dict[Unit, Residency]:
        """Which rank held which frozen parts, from what `residency_to_json` returned in a run with these owners. Nothing changes.

        Raises:
            ValueError: the values do not fit these experts and ranks.
        """
        if not isinstance(states, Mapping):
            raise ValueError("residency: is no mapping")
        known = {unit: state for unit, state in self.plans.residency.items() if str(unit) in states}
        return {unit: residency_from_json(states[str(unit)], state) for unit, state in known.items()}

    def adopt_residency(self, after: Mapping[Unit, Residency]) -> None:
        """Hold these frozen parts. Every rank must call it, between two steps, with the same values."""
        for unit, state in after.items():
            self.frozen[unit].start(self.plans.adopt_residency(unit, state))
            self.frozen[unit].wait()

    def gather(self, *units: Unit) -> None:
        """Start materializing layers, or the pools that they draw on, where their replicas have neither arrived nor are on their way."""
        # Both kinds of chunks travel in one group, so every rank starts the trainable ones of all these layers first, then the frozen ones.
        gather_layers(
            [(self.stores[source], self.plans.transfer(source)) for source in dict.fromkeys(self.trained_in[unit] for unit in units)]
        )
        for unit in units:
            if unit in self.frozen and (move := self.plans.fetch_frozen(unit)) is not None:
                self.frozen[unit].start(move)

    def dispatched(self, unit: Unit, replicas_SC: Tensor, routed: RoutedTokens) -> LayerWork:
        """Send tokens to the ranks that serve them; what this rank then has to compute.

        Every rank must call it for the same layers in the same order, also with no tokens, and `combined` after it.

        Args:
            replicas_SC: the replicas of the layer in its present placement, or of its pool.
            routed: this rank's tokens with their token numbers; `slot_TK` holds the chosen experts, whose slots are not known yet.
        """
        plan = self.plans.transfer(unit)
        sent = None
        if plan.tokens is not None:
            assert routed.token_T is not None
            sent = dispatch(routed.x_TD, routed.slot_TK, routed.weight_TK, routed.token_T, plan.tokens, self.groups.tokens)
            routed = RoutedTokens(sent.x_RD, sent.slot_RK, sent.weight_RK, sent.token_R, served=sent.served)
        # Where no token may have to leave its rank, every expert has a slot on every rank, and its slot is its number.
        routed = replace(routed, expert_S=chunk_tables(plan.chunks, routed.x_TD.device).expert_S)
        # This waits for frozen parts that are still on their way, so it comes after the tokens have left.
        frozen_S = self.frozen[unit].chunks(plan.chunks.tables.expert_S.tolist()) if unit in self.frozen else ()
        return LayerWork(routed, ExpertReplicas(replicas_SC, frozen_S), sent)

    def combined(self, work: LayerWork, y_RD: Tensor, *, backward_follows: bool) -> Tensor:
        """Return the experts' results to the tokens' ranks: the weighted sum of each token's experts, [T, D].

        Args:
            y_RD: what the experts have made of `work`.
            backward_follows: so that the bytes of gradients that return to the tokens' ranks count.
        """
        if work.sent is None:
            return y_RD
        self.token_bytes_to += work.sent.bytes_to(self.rank, y_RD, backward=backward_follows)
        return combine(y_RD, work.sent, self.groups.tokens)


def _mesh_of(groups: ExpertGroups) -> Mesh:
    return make_mesh(dist.get_world_size(groups.world), dist.get_world_size(groups.experts))


def _chunk_of(owned: OwnedChunks, chunks: Mapping[int, Tensor]) -> Callable[[int], Tensor]:
    """An expert's chunk: the one given, else its initial one."""
    return lambda expert: chunks[expert].detach() if expert in chunks else owned.init_chunk(expert)

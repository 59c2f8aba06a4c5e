"""The FSSDP engine: plans, materializes, dispatches, computes, reduces. It knows neither transformers nor Megatron.

Its contract is `experts(layer, x, expert, weight, token) -> y`. One optimizer step goes:

    begin_step             plan every layer (a pure function of values that all ranks share; no message)
    prefetch(*layers)      start the SparseAllGather of layers, before the attention that hides it
    experts(layer, ...)    wait for the replicas; dispatch what must travel; compute; combine
    last_micro_step        from here on, the backward pass starts each layer's SparseReduceScatter as soon as its gradient is complete, and
                           of the layer before it the sum over the sharding groups, if there are several
    begin_backward         start the gathers that the backward pass needs first, where replicas were freed after the forward pass
    finish_step            wait for the reductions; exchange and record the loads; hand gradients to the owners' parameters

Parameters do not change between the micro-batches of one step, so the replicas live across them and gradients are reduced once. Not so
where replicas are freed between forward and backward (`rematerialize`), or where plans follow each micro-step's own loads (`plan`): there
each micro-step gathers and reduces for itself, and the owners add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.engine.layer_plan import exchange_counts
from hecate.engine.step_plans import EngineConfig, StepPlans
from hecate.experts.family import ExpertFamily
from hecate.parallel.comm.dispatch import combine, dispatch
from hecate.parallel.comm.expert_store import LayerStore, gather_together
from hecate.parallel.comm.frozen_store import FrozenStore
from hecate.parallel.loads import LoadHistory
from hecate.parallel.mesh import Mesh, make_mesh, owners_topology
from hecate.parallel.placement import Placement, owners_by_memory, redealt_owners
from hecate.parallel.planners import PlanInput
from hecate.parallel.topology import Topology
from hecate.parallel.units import Unit
from hecate.ranks.groups import ExpertGroups


class Engine:
    """All MoE layers of a model on one rank.

    Ranks, owners and placements are those of a sharding group: each plans for its own loads on its own devices. Owners are the same in
    every group, and recorded loads are those of the whole job.
    """

    def __init__(self, families: dict[Unit, ExpertFamily], config: EngineConfig, groups: ExpertGroups) -> None:
        self.families = families
        self.history = LoadHistory(config.load_window)
        self._join(config, groups, self.first_owners(config, groups), {})

    def first_owners(self, config: EngineConfig, groups: ExpertGroups) -> dict[Unit, np.ndarray]:
        """int64 [experts] of each layer, of a run that begins."""
        memory = owners_topology(config.topology, _mesh_of(groups)).memory
        return {layer: owners_by_memory(family.num_experts, memory) for layer, family in self.families.items()}

    def redealt(self, owners: Mapping[Unit, np.ndarray], world_size: int) -> dict[Unit, np.ndarray]:
        """Each layer's owners on another number of ranks, of a sharding group."""
        return dict(zip(owners, redealt_owners(list(owners.values()), world_size), strict=True))

    def _join(
        self, config: EngineConfig, groups: ExpertGroups, owners: dict[Unit, np.ndarray], chunks: Mapping[Unit, Mapping[int, Tensor]]
    ) -> None:
        """All that depends on which ranks there are, as at the beginning of a step."""
        self.groups = groups
        self.rank = dist.get_rank(groups.experts)
        """in the sharding group, as all ranks here"""
        self.world_size = dist.get_world_size(groups.experts)
        """ranks of the sharding group"""
        self.mesh = _mesh_of(groups)
        group = dist.get_rank(groups.world) // self.world_size
        self.plans = StepPlans(self.families, config, owners, self.history, self.mesh, group, self.rank)
        self.stores = {
            layer: LayerStore(
                owners[layer].tolist(), _chunk_of(family, chunks.get(layer, {})), groups.experts, self.plans.topology, groups.replicate
            )
            for layer, family in self.families.items()
        }
        self.frozen = {
            layer: FrozenStore(owners[layer], self.plans.slots(family), family.frozen_chunk, groups.experts)
            for layer, family in self.families.items()
            if family.layout().frozen
        }
        """of the layers whose experts have frozen parts"""
        self.peak_replica_bytes = 0
        """most bytes of replicas that were here or on their way at once, since the step began"""
        self._reduced_last: Unit | None = None
        """the layer whose reduction was started last in the step's last backward pass"""
        self._awaiting_backward: list[Unit] = []
        """layers whose replicas were freed after their forward pass, in its order"""
        self._counts: dict[Unit, Tensor] = {}
        self._step = 0
        self._training = False
        self._last_micro_step = False
        self._token_bytes_sent = 0

    @property
    def config(self) -> EngineConfig:
        return self.plans.config

    @config.setter
    def config(self, config: EngineConfig) -> None:
        self.plans.config = config

    @property
    def owners(self) -> dict[Unit, np.ndarray]:
        """int64 [experts] of each layer."""
        return self.plans.owners

    @property
    def placements(self) -> dict[Unit, Placement]:
        """Of each layer, as it is gathered next."""
        return self.plans.placements

    @property
    def in_first_group(self) -> bool:
        """Is this the sharding group that speaks for all: saves, exports, is counted?"""
        return self.plans.members[0] == 0

    def rejoin(
        self, topology: Topology, groups: ExpertGroups, owners: dict[Unit, np.ndarray], chunks: Mapping[Unit, Mapping[int, Tensor]]
    ) -> None:
        """Go on with other ranks, in other process groups, from the beginning of a step; what was under way among the old ones is
        forgotten. The parameters are new ones afterwards. Frozen parts come anew from where they came at first.

        Args:
            owners: int64 [experts] of each layer, the same on every rank.
            chunks: layer -> expert -> the master chunk of each expert that this rank owns from now on; copied.
        """
        for layer in self.families:
            mine = np.flatnonzero(owners[layer] == dist.get_rank(groups.experts)).tolist()
            assert sorted(chunks.get(layer, {})) == mine, (layer, sorted(chunks.get(layer, {})), mine)
        self._join(replace(self.config, topology=topology), groups, owners, chunks)
        self.history.redeal(topology.world_size)

    def named_parameters(self) -> dict[tuple[Unit, int], nn.Parameter]:
        """(layer, expert) -> flat chunk, of the experts that this rank owns."""
        return {
            (layer, expert): parameter
            for layer, store in self.stores.items()
            for expert, parameter in zip(store.experts, store.parameters, strict=True)
        }

    @property
    def goes_together(self) -> bool:
        """Must ranks run the same forward passes at the same time outside training, too?"""
        return bool(self.frozen) and self.world_size > 1

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks so far: chunks, gradients, frozen parts, tokens (forward and back)."""
        chunk_bytes = sum(store.bytes_sent for store in self.stores.values())
        return self._token_bytes_sent + chunk_bytes + sum(store.bytes_sent for store in self.frozen.values())

    @property
    def replica_bytes(self) -> int:
        """Bytes of the trainable chunks that are materialized now."""
        return sum(store.replica_bytes for store in self.stores.values())

    @property
    def frozen_replica_bytes(self) -> int:
        """Bytes of others' frozen parts that are held now; they stay between steps."""
        return sum(store.replica_bytes for store in self.frozen.values())

    def begin_step(self, step: int, micro_steps: int = 1) -> None:
        """Plan all layers of an optimizer step from the history. Every rank must call it.

        Args:
            micro_steps: in which the step's tokens come.
        """
        self._step, self._training, self._last_micro_step, self._reduced_last = step, True, False, None
        self.peak_replica_bytes = self.replica_bytes
        self._awaiting_backward.clear()
        for layer, family in self.families.items():
            self._counts[layer] = torch.zeros(family.num_experts, dtype=torch.int64, device=self._device())
        self.plans.begin(self._resident(), micro_steps)

    def plan_inputs(self, *, for_owners: bool = False) -> list[tuple[list[Unit], PlanInput]]:
        """See `StepPlans.inputs`."""
        return self.plans.inputs(self._resident(), for_owners=for_owners)

    def change_owners(self, layer: Unit, owner_E: np.ndarray, chunks: Mapping[int, Tensor]) -> int:
        """Put a layer's experts on new owners, between two steps. The layer's parameters are new ones afterwards.

        Every rank must call it, for the same layers in the same order: frozen parts travel.

        Args:
            chunks: the master chunks of the experts that this rank owns from now on.

        Returns:
            Bytes of frozen parts sent by all ranks together.
        """
        self.stores[layer].change_owners(owner_E.tolist(), chunks)
        frozen_bytes = self.frozen[layer].change_owners(owner_E) if layer in self.frozen else 0
        self.plans.change_owners(layer, owner_E)
        return frozen_bytes

    def last_micro_step(self) -> None:
        """The next backward pass is the step's last: reduce gradients as they come."""
        self._last_micro_step = True

    def prefetch(self, *layers: Unit) -> None:
        """Start materializing layers, in the order in which they are needed; every rank must call it in the same order.

        Does nothing for those for which that has happened, and where plans must wait for the gate.
        """
        if not (self._training and self.config.plan == "exact"):
            self._gather(*layers)

    def begin_backward(self) -> None:
        """A micro-step's backward pass comes next. Every rank must call it."""
        self._prefetch_backward()

    def experts(self, layer: Unit, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor, *, count: bool) -> Tensor:
        """The weighted sum of each token's experts: [T, D].

        Every rank must call it for the same layers in the same order, also with no tokens.

        Args:
            expert_TK: int64 [T, K].
            token_T: int64 [T], global token numbers.
            count: record the loads (not when a checkpointed forward runs again).
        """
        first_time = count and self._training
        if first_time:
            # bincount and a copy to the host would each wait for a GPU.
            choice = expert_TK.flatten()
            count_E = choice.new_zeros(self.families[layer].num_experts).scatter_add_(0, choice, torch.ones_like(choice))
            self._counts[layer] += count_E
            if self.config.plan != "history":
                self._plan_after_gate(layer, count_E)
        self._gather(layer)
        replicas_SC = self._replicas(layer)
        frozen_S = self.frozen[layer].chunks() if layer in self.frozen else ()
        placement = self.placements[layer]
        expert_S = torch.from_numpy(placement.experts_on(self.rank))
        family = self.families[layer]
        here = None
        if layer in self.plans.splits:
            here = dispatch(x_TD, expert_TK, weight_TK, token_T, placement, self.plans.splits[layer], self.groups.tokens)
        y_RD = family.compute(
            replicas_SC,
            x_TD if here is None else here.x_RD,
            expert_TK if here is None else here.slot_RK,
            weight_TK if here is None else here.weight_RK,
            frozen_S=frozen_S,
            expert_S=expert_S,
            token_T=token_T if here is None else here.token_R,
            step=self._step,
            training=self._training,
        )
        if first_time and self.config.rematerialize and y_RD.requires_grad:
            # Called before the backward of whatever has made y, and so before its saved views of the replicas are used.
            y_RD.register_hook(lambda _: self._bring_back(layer))
            self.stores[layer].free()
            self._awaiting_backward.append(layer)
        if here is None:
            return y_RD
        self._token_bytes_sent += here.bytes_sent(self.rank, backward=count and torch.is_grad_enabled())
        return combine(y_RD, here, self.groups.tokens)

    def finish_step(self) -> dict[Unit, np.ndarray]:
        """Complete the step: gradients summed onto the owners' parameters, loads recorded. Every rank must call it.

        An expert that no token of any rank reached gets no gradient (None), so that its optimizer leaves it untouched.

        Returns:
            Per layer the step's loads, int64 [experts, ranks of the job].
        """
        for layer, store in reversed(self.stores.items()):
            assert store.reduce_started, f"layer {layer} took no part in the step's last backward pass"
            store.sum_over_groups()
        loads = self._exchange_loads()
        for layer, store in self.stores.items():
            grad_nC = store.reduced()
            for expert, parameter, grad in zip(store.experts, store.parameters, grad_nC, strict=True):
                parameter.grad = grad if loads[layer][expert].sum() > 0 else None
        self.history.record(loads)
        self._training = False
        if self.mesh.num_sharding_groups > 1:
            most = self.plans.most_served(loads)
            most_L = torch.tensor(list(most.values()), dtype=torch.float64).to(self._device())
            dist.all_reduce(most_L, op=dist.ReduceOp.MAX, group=self.groups.world)
            self.plans.note_most_served(dict(zip(most, most_L.tolist(), strict=True)))
        return loads

    @contextmanager
    def evaluating(self, *, together: bool = False) -> Iterator[None]:
        """Every expert everywhere until the end of the block, so that ranks may run whatever they like, each on its own.

        Every rank must enter it; entering materializes all layers.

        Args:
            together: experts stay with their owners and tokens go to them, so that no rank holds what it has no room for; ranks must then
                run the same forward passes at the same time.
        """
        if together:
            self.plans.place_on_owners()
        else:
            self.plans.place_everywhere()
        for layer, frozen in self.frozen.items():
            frozen.borrow(self.placements[layer])
        self.prefetch(*self.families)
        for store in self.stores.values():
            store.replicas()
        for frozen in self.frozen.values():
            frozen.chunks()
        try:
            yield
        finally:
            for store in self.stores.values():
                store.drop()
            for frozen in self.frozen.values():
                frozen.trim()

    def _plan_after_gate(self, layer: Unit, count_E: Tensor) -> None:
        """Plan a layer's micro-step from what all ranks have chosen."""
        # Through the tokens' group: the layer's own gather may be under way in the other one.
        loads_ED = exchange_counts(count_E, self.groups.tokens)
        plan = self.plans.after_gate(layer, loads_ED, self.frozen[layer].resident_ED if layer in self.frozen else None)
        if plan is not None:
            if self.config.plan == "calibrated":
                self._gather(layer)
                store = self.stores[layer]
                self._note_peak(store.placement_bytes(plan.placement))
                store.exchange(plan.placement)
            self.plans.place(layer, plan)
        self.plans.note_served(layer, loads_ED)

    def _resident(self) -> dict[Unit, np.ndarray]:
        """bool [experts, ranks]: who holds which frozen parts, of the layers that have any."""
        return {layer: frozen.resident_ED for layer, frozen in self.frozen.items()}

    def _gather(self, *layers: Unit) -> None:
        gather_together([(self.stores[layer], self.placements[layer]) for layer in layers])
        for layer in layers:
            if layer in self.frozen:
                self.frozen[layer].gather(self.placements[layer])
        self._note_peak()

    def _note_peak(self, more: int = 0) -> None:
        self.peak_replica_bytes = max(self.peak_replica_bytes, self.replica_bytes + more)

    def _replicas(self, layer: Unit) -> Tensor:
        return self.stores[layer].replicas((lambda: self._gradient_complete(layer)) if self._training else None)

    def _bring_back(self, layer: Unit) -> None:
        """The backward pass has come to a layer whose replicas were freed; a checkpointed layer may have brought them back itself."""
        self._gather(layer)
        self._replicas(layer)

    def _prefetch_backward(self) -> None:
        count = self.config.prefetch
        if count:
            self._gather(*self._awaiting_backward[-count:][::-1])

    def _gradient_complete(self, layer: Unit) -> None:
        """The backward pass is through with a layer's experts."""
        if not (self.config.per_micro_step or self._last_micro_step):
            return
        if self.config.rematerialize:
            # The layer before needs its replicas sooner than the owners need gradients; of those one layer's are here at a time.
            self.stores[layer].free()
            self._awaiting_backward.remove(layer)
            self._prefetch_backward()
            for store in self.stores.values():
                store.settle()
        self.stores[layer].reduce()
        if self._last_micro_step:
            # The reduction before has had a layer's backward pass to arrive in; the sum over the groups has the rest of the step.
            if self._reduced_last is not None:
                self.stores[self._reduced_last].sum_over_groups()
            self._reduced_last = layer
        if self.config.plan == "calibrated":
            self.plans.place_from_history(layer)

    def _exchange_loads(self) -> dict[Unit, np.ndarray]:
        layers = list(self.families)
        if not layers:
            return {}
        mine = torch.cat([self._counts[layer] for layer in layers])
        table = exchange_counts(mine, self.groups.world)
        cuts = np.cumsum([self.families[layer].num_experts for layer in layers])[:-1]
        return dict(zip(layers, np.split(table, cuts), strict=True))

    def _device(self) -> torch.device:
        return next(iter(self.stores.values())).device


def _mesh_of(groups: ExpertGroups) -> Mesh:
    return make_mesh(dist.get_world_size(groups.world), dist.get_world_size(groups.experts))


def _chunk_of(family: ExpertFamily, chunks: Mapping[int, Tensor]) -> Callable[[int], Tensor]:
    """An expert's chunk: the one given, else its initial one."""
    return lambda expert: chunks[expert].detach() if expert in chunks else family.init_chunk(expert)

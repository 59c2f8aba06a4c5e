"""The FSSDP engine: plans, materializes, dispatches, computes, reduces. It knows neither transformers nor Megatron.

Its contract is `experts(layer, x, expert, weight, token) -> y`. One optimizer step goes:

    begin_step             plan every layer (a pure function of values that all ranks share; no message)
    prefetch(*layers)      start the SparseAllGather of layers, before the attention that hides it
    experts(layer, ...)    wait for the replicas; dispatch what must travel; compute; combine
    last_micro_step        from here on, the backward pass starts each layer's SparseReduceScatter as soon as its gradient is complete
    begin_backward         start the gathers that the backward pass needs first, where replicas were freed after the forward pass
    finish_step            wait for the reductions; exchange and record the loads; hand gradients to the owners' parameters

Parameters do not change between the micro-batches of one step, so the replicas live across them and gradients are reduced once. Not so
where replicas are freed between forward and backward (`rematerialize`), or where plans follow each micro-step's own loads (`plan`): there
each micro-step gathers and reduces for itself, and the owners add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.moe.family import ExpertFamily
from hecate.moe.planning import LayerPlan, PlanMode, calibration_gain, exchange_counts, layer_plan, one_layer
from hecate.parallel.dispatch import combine, dispatch
from hecate.parallel.frozen_store import FrozenStore
from hecate.parallel.loads import LoadHistory, imbalance
from hecate.parallel.placement import Placement, everything_everywhere, owners_by_memory, owners_only, redealt_owners
from hecate.parallel.planners import Plan, PlanInput, Planner
from hecate.parallel.store import LayerStore, gather_together
from hecate.parallel.topology import Topology


@dataclass(frozen=True)
class EngineConfig:
    """What the engine plans with."""

    planner: Planner
    topology: Topology
    load_window: int = 5
    memory_slots: int | None = None
    """free replica slots per device and layer; None: as many as there are experts"""
    max_imbalance: float | None = None
    """see `PlanInput.max_imbalance`"""
    top_k: int = 1
    non_moe_flops: float = 0.0
    """forward FLOPs per rank and micro-step of what hides a layer's gather (its attention)"""
    plan: PlanMode = "history"
    """from which loads layers are planned: see `hecate.moe.planning`"""
    rematerialize: bool = False
    """free a layer's replicas after its forward pass and gather them again before its backward pass (Hecate-RM)"""
    prefetch: int = 1
    """forward: decoder layers, a layer's own included, ahead of whose end its gather starts; backward: layers gathered ahead"""

    @property
    def per_micro_step(self) -> bool:
        """Does each micro-step gather and reduce for itself?"""
        return self.rematerialize or self.plan != "history"


@dataclass(frozen=True)
class ExpertGroups:
    """A rank's sharding group, of ranks that share one copy of all experts, twice, so that expert chunks and tokens never queue behind each
    other; and what there is beyond it (`hecate.parallel.mesh`)."""

    experts: dist.ProcessGroup
    tokens: dist.ProcessGroup
    replicas: dist.ProcessGroup | None = None
    """this rank and those that own the same experts in the other sharding groups; None: there is no other"""
    everyone: dist.ProcessGroup | None = None
    """all ranks of the job; None: those of the sharding group"""

    @property
    def world(self) -> dist.ProcessGroup:
        """For what is summed over all ranks of the job."""
        return self.everyone or self.tokens

    def all(self) -> list[dist.ProcessGroup]:
        """Each once."""
        return [group for group in (self.experts, self.tokens, self.replicas, self.everyone) if group is not None]


class Engine:
    """All MoE layers of a model on one rank."""

    def __init__(self, families: dict[int, ExpertFamily], config: EngineConfig, groups: ExpertGroups) -> None:
        self.families = families
        self.history = LoadHistory(config.load_window)
        self._join(config, groups, self.first_owners(config, groups), {})

    def first_owners(self, config: EngineConfig, groups: ExpertGroups) -> dict[int, np.ndarray]:
        """int64 [experts] of each layer, of a run that begins."""
        return {layer: owners_by_memory(family.num_experts, config.topology.memory) for layer, family in self.families.items()}

    def redealt(self, owners: Mapping[int, np.ndarray], world_size: int) -> dict[int, np.ndarray]:
        """Each layer's owners on another number of ranks."""
        return dict(zip(owners, redealt_owners(list(owners.values()), world_size), strict=True))

    def _join(
        self, config: EngineConfig, groups: ExpertGroups, owners: dict[int, np.ndarray], chunks: Mapping[int, Mapping[int, Tensor]]
    ) -> None:
        """All that depends on which ranks there are, as at the beginning of a step."""
        self.config, self.groups = config, groups
        self.rank = dist.get_rank(groups.experts)
        self.world_size = dist.get_world_size(groups.experts)
        assert config.topology.world_size == self.world_size, (config.topology.world_size, self.world_size)
        self.owners = owners
        self.stores = {
            layer: LayerStore(owners[layer].tolist(), _chunk_of(family, chunks.get(layer, {})), groups.experts, config.topology)
            for layer, family in self.families.items()
        }
        self.frozen = {
            layer: FrozenStore(owners[layer], self._slots(family), family.frozen_chunk, groups.experts)
            for layer, family in self.families.items()
            if family.layout().frozen
        }
        """of the layers whose experts have frozen parts"""
        self.placements: dict[int, Placement] = {}
        self.peak_replica_bytes = 0
        """most bytes of replicas that were here or on their way at once, since the step began"""
        self.calibrations = 0
        """plans of this step's micro-steps and layers that gave way to better ones after the gate"""
        self._plans: dict[int, LayerPlan] = {}
        self._from_history: dict[int, LayerPlan] = {}
        self._given: dict[int, tuple[PlanInput, int]] = {}
        """what the step's plan was made from, and a layer's place in it"""
        self._splits: dict[int, np.ndarray] = {}
        self._served: dict[int, np.ndarray] = {}
        """float64 [ranks]: choices served so far in this step, where plans follow the true loads"""
        self._awaiting_backward: list[int] = []
        """layers whose replicas were freed after their forward pass, in its order"""
        self._counts: dict[int, Tensor] = {}
        self._step = 0
        self._training = False
        self._last_micro_step = False
        self._token_bytes_sent = 0

    def rejoin(
        self, topology: Topology, groups: ExpertGroups, owners: dict[int, np.ndarray], chunks: Mapping[int, Mapping[int, Tensor]]
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

    def named_parameters(self) -> dict[tuple[int, int], nn.Parameter]:
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
        self._step, self._training, self._last_micro_step = step, True, False
        self.peak_replica_bytes, self.calibrations = self.replica_bytes, 0
        self._awaiting_backward.clear()
        self._served.clear()
        for layers, given in self.plan_inputs():
            if self.config.per_micro_step and given.loads_LSE is not None:
                given = replace(given, loads_LSE=given.loads_LSE / micro_steps)  # a plan serves one of them
            plan = None if self.config.plan == "exact" else self._planned(given)
            for index, layer in enumerate(layers):
                self._given[layer] = given, index
                self._counts[layer] = torch.zeros(given.num_experts, dtype=torch.int64, device=self._device())
                if plan is not None:
                    self._from_history[layer] = layer_plan(plan, given, index)
                    self._place(layer, self._from_history[layer])

    def plan_inputs(self) -> list[tuple[list[int], PlanInput]]:
        """What a planner is given for the next step: the layers of one shape together, each with its number."""
        inputs = []
        for layers in self._alike():
            family = self.families[layers[0]]
            predicted = [self.history.predict(layer) for layer in layers]
            known = [loads_SE for loads_SE in predicted if loads_SE is not None]
            given = PlanInput(
                np.stack([self.owners[layer] for layer in layers]),
                np.stack(known) if known else None,
                self.config.topology,
                family.cost(self.config.top_k, self.config.non_moe_flops),
                self._slots(family),
                resident_LED=np.stack([self.frozen[layer].resident_ED for layer in layers]) if layers[0] in self.frozen else None,
                max_imbalance=self.config.max_imbalance,
            )
            inputs.append((layers, given))
        return inputs

    def change_owners(self, layer: int, owner_E: np.ndarray, chunks: Mapping[int, Tensor]) -> int:
        """Put a layer's experts on new owners, between two steps. The layer's parameters are new ones afterwards.

        Every rank must call it, for the same layers in the same order: frozen parts travel.

        Args:
            chunks: the master chunks of the experts that this rank owns from now on.

        Returns:
            Bytes of frozen parts sent by all ranks together.
        """
        self.stores[layer].change_owners(owner_E.tolist(), chunks)
        frozen_bytes = self.frozen[layer].change_owners(owner_E) if layer in self.frozen else 0
        self.owners[layer] = owner_E
        self.placements.pop(layer, None)  # made for the owners of before
        return frozen_bytes

    def last_micro_step(self) -> None:
        """The next backward pass is the step's last: reduce gradients as they come."""
        self._last_micro_step = True

    def prefetch(self, *layers: int) -> None:
        """Start materializing layers, in the order in which they are needed; every rank must call it in the same order.

        Does nothing for those for which that has happened, and where plans must wait for the gate.
        """
        if not (self._training and self.config.plan == "exact"):
            self._gather(*layers)

    def begin_backward(self) -> None:
        """A micro-step's backward pass comes next. Every rank must call it."""
        self._prefetch_backward()

    def experts(self, layer: int, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor, *, count: bool) -> Tensor:
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
        if layer in self._splits:
            here = dispatch(x_TD, expert_TK, weight_TK, token_T, placement, self._splits[layer], self.groups.tokens)
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

    def finish_step(self) -> dict[int, np.ndarray]:
        """Complete the step: gradients summed onto the owners' parameters, loads recorded. Every rank must call it.

        An expert that no token of any rank reached gets no gradient (None), so that its optimizer leaves it untouched.

        Returns:
            Per layer the step's loads, int64 [source ranks, experts].
        """
        loads = self._exchange_loads()
        for layer, store in self.stores.items():
            assert store.reduce_started, f"layer {layer} took no part in the step's last backward pass"
            grad_nC = store.reduced()
            for expert, parameter, grad in zip(store.experts, store.parameters, grad_nC, strict=True):
                parameter.grad = grad if loads[layer][:, expert].sum() > 0 else None
        self.history.record(loads)
        self._training = False
        return loads

    @contextmanager
    def evaluating(self, *, together: bool = False) -> Iterator[None]:
        """Every expert everywhere until the end of the block, so that ranks may run whatever they like, each on its own.

        Every rank must enter it; entering materializes all layers.

        Args:
            together: experts stay with their owners and tokens go to them, so that no rank holds what it has no room for; ranks must then
                run the same forward passes at the same time.
        """
        for layer in self.families:
            everywhere = everything_everywhere(self.owners[layer], self.world_size)
            placement = owners_only(self.owners[layer], self.world_size) if together else everywhere
            # Some tokens of every rank for every expert: what must travel may.
            self._place(layer, LayerPlan(placement, np.ones((self.world_size, placement.num_experts)), None))
            if layer in self.frozen:
                self.frozen[layer].borrow(placement)
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

    def imbalance(self, loads: dict[int, np.ndarray]) -> float:
        """Largest over mean choices computed per rank, averaged over the layers: what the last plans made of a step's loads.

        Where plans follow the true loads, it is what they made of the last step's own.
        """
        skews = []
        for layer, loads_SE in loads.items():
            served_D = self._served.get(layer)
            skews.append(imbalance(self._plans[layer].served(loads_SE, self.config.topology) if served_D is None else served_D))
        return float(np.mean(skews)) if skews else 1.0

    def _slots(self, family: ExpertFamily) -> np.ndarray:
        """int64 [ranks]: free replica slots of each device in a layer."""
        return np.full(self.world_size, family.num_experts if self.config.memory_slots is None else self.config.memory_slots)

    def _alike(self) -> list[list[int]]:
        """The layers, those of one shape together."""
        alike: dict[tuple[int, object], list[int]] = {}
        for layer, family in self.families.items():
            key = (family.num_experts, family.cost(self.config.top_k, self.config.non_moe_flops))
            alike.setdefault(key, []).append(layer)
        return list(alike.values())

    def _planned(self, given: PlanInput) -> Plan:
        plan = self.config.planner(given)
        assert np.array_equal(plan.owner_LE, given.owner_LE), "a planner moved owners, which only re-sharding does"
        return plan

    def _place(self, layer: int, plan: LayerPlan) -> None:
        self._plans[layer], self.placements[layer] = plan, plan.placement
        self._splits.pop(layer, None)
        if plan.dispatches(self.config.topology):
            self._splits[layer] = plan.split(self.config.topology, self.rank)

    def _plan_after_gate(self, layer: int, count_E: Tensor) -> None:
        """Plan a layer's micro-step from what all ranks have chosen."""
        # Through the tokens' group: the layer's own gather may be under way in the other one.
        loads_SE = exchange_counts(count_E, self.groups.tokens)
        resident_ED = self.frozen[layer].resident_ED if layer in self.frozen else None
        given = one_layer(*self._given[layer], loads_SE, resident_ED)
        plan = layer_plan(self._planned(given), given, 0)
        if self.config.plan == "exact":
            self._place(layer, plan)
        elif calibration_gain(given, self._plans[layer], plan, rematerialize=self.config.rematerialize) > 0:
            self._gather(layer)
            store = self.stores[layer]
            self._note_peak(store.placement_bytes(plan.placement))
            store.exchange(plan.placement)
            self._place(layer, plan)
            self.calibrations += 1
        served_D = self._plans[layer].served(loads_SE, self.config.topology)
        self._served[layer] = self._served.get(layer, 0.0) + served_D

    def _gather(self, *layers: int) -> None:
        gather_together([(self.stores[layer], self.placements[layer]) for layer in layers])
        for layer in layers:
            if layer in self.frozen:
                self.frozen[layer].gather(self.placements[layer])
        self._note_peak()

    def _note_peak(self, more: int = 0) -> None:
        self.peak_replica_bytes = max(self.peak_replica_bytes, self.replica_bytes + more)

    def _replicas(self, layer: int) -> Tensor:
        return self.stores[layer].replicas((lambda: self._gradient_complete(layer)) if self._training else None)

    def _bring_back(self, layer: int) -> None:
        """The backward pass has come to a layer whose replicas were freed; a checkpointed layer may have brought them back itself."""
        self._gather(layer)
        self._replicas(layer)

    def _prefetch_backward(self) -> None:
        count = self.config.prefetch
        if count:
            self._gather(*self._awaiting_backward[-count:][::-1])

    def _gradient_complete(self, layer: int) -> None:
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
        if self.config.plan == "calibrated":
            self._place(layer, self._from_history[layer])

    def _exchange_loads(self) -> dict[int, np.ndarray]:
        layers = list(self.families)
        if not layers:
            return {}
        mine = torch.cat([self._counts[layer] for layer in layers])
        table = exchange_counts(mine, self.groups.experts)
        cuts = np.cumsum([self.families[layer].num_experts for layer in layers])[:-1]
        return dict(zip(layers, np.split(table, cuts, axis=1), strict=True))

    def _device(self) -> torch.device:
        return next(iter(self.stores.values())).device


def _chunk_of(family: ExpertFamily, chunks: Mapping[int, Tensor]) -> Callable[[int], Tensor]:
    """An expert's chunk: the one given, else its initial one."""
    return lambda expert: chunks[expert].detach() if expert in chunks else family.init_chunk(expert)

"""The FSSDP engine: plans, materializes, dispatches, computes, reduces. It knows neither transformers nor Megatron.

Its contract is `experts(layer, x, expert, weight, token) -> y`. One optimizer step goes:

    begin_step             plan every layer (a pure function of values that all ranks share; no message)
    prefetch(layer)        start the SparseAllGather of a layer, before the attention that hides it
    experts(layer, ...)    wait for the replicas; dispatch what must travel; compute; combine
    last_micro_step        from here on, the backward pass starts each layer's SparseReduceScatter as soon as its gradient is complete
    finish_step            wait for the reductions; exchange and record the loads; hand gradients to the owners' parameters

Parameters do not change between the micro-batches of one step, so the replicas live across them and gradients are reduced once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.moe.family import ExpertFamily
from hecate.parallel.dispatch import combine, dispatch
from hecate.parallel.flows import token_split
from hecate.parallel.frozen_store import FrozenStore
from hecate.parallel.loads import LoadHistory, imbalance
from hecate.parallel.placement import Placement, contiguous_owners, everything_everywhere
from hecate.parallel.planners import PlanInput, Planner
from hecate.parallel.store import LayerStore
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


@dataclass(frozen=True)
class ExpertGroups:
    """The same ranks twice, so that expert chunks and tokens never queue behind each other."""

    experts: dist.ProcessGroup
    tokens: dist.ProcessGroup


class Engine:
    """All MoE layers of a model on one rank."""

    def __init__(self, families: dict[int, ExpertFamily], config: EngineConfig, groups: ExpertGroups) -> None:
        self.families = families
        self.config = config
        self.groups = groups
        self.rank = dist.get_rank(groups.experts)
        self.world_size = dist.get_world_size(groups.experts)
        assert config.topology.world_size == self.world_size, (config.topology.world_size, self.world_size)
        self.history = LoadHistory(config.load_window)
        self.owners = {layer: contiguous_owners(f.num_experts, self.world_size) for layer, f in families.items()}
        self.stores = {
            layer: LayerStore(self.owners[layer].tolist(), family.init_chunk, groups.experts, config.topology)
            for layer, family in families.items()
        }
        self.frozen = {
            layer: FrozenStore(self.owners[layer], self._slots(family), family.frozen_chunk, groups.experts)
            for layer, family in families.items()
            if family.layout().frozen
        }
        """of the layers whose experts have frozen parts"""
        self.placements: dict[int, Placement] = {}
        self._planned: dict[int, tuple[np.ndarray | None, np.ndarray | None]] = {}
        self._splits: dict[int, np.ndarray] = {}
        self._counts: dict[int, Tensor] = {}
        self._step = 0
        self._training = False
        self._last_micro_step = False
        self._token_bytes_sent = 0

    def named_parameters(self) -> dict[tuple[int, int], nn.Parameter]:
        """(layer, expert) -> flat chunk, of the experts that this rank owns."""
        return {
            (layer, expert): parameter
            for layer, store in self.stores.items()
            for expert, parameter in zip(store.experts, store.parameters, strict=True)
        }

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

    def begin_step(self, step: int) -> None:
        """Plan all layers of an optimizer step from the history. Every rank must call it."""
        self._step, self._training, self._last_micro_step = step, True, False
        for layers, given in self.plan_inputs():
            plan = self.config.planner(given)
            assert np.array_equal(plan.owner_LE, given.owner_LE), "a planner moved owners, which only re-sharding does"
            for index, layer in enumerate(layers):
                predicted_SE = None if given.loads_LSE is None else given.loads_LSE[index]
                quota_ED = None if plan.quota_LED is None else plan.quota_LED[index]
                self._place(layer, plan.placement(index), predicted_SE, quota_ED)
                self._counts[layer] = torch.zeros(given.num_experts, dtype=torch.int64)

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

    def prefetch(self, layer: int) -> None:
        """Start materializing a layer; every rank must call it in the same order. Does nothing where that has happened."""
        self.stores[layer].gather(self.placements[layer])
        if layer in self.frozen:
            self.frozen[layer].gather(self.placements[layer])

    def experts(self, layer: int, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor, *, count: bool) -> Tensor:
        """The weighted sum of each token's experts: [T, D].

        Every rank must call it for the same layers in the same order, also with no tokens.

        Args:
            expert_TK: int64 [T, K].
            token_T: int64 [T], global token numbers.
            count: record the loads (not when a checkpointed forward runs again).
        """
        self.prefetch(layer)
        replicas_SC = self._replicas(layer)
        frozen_S = self.frozen[layer].chunks() if layer in self.frozen else ()
        placement = self.placements[layer]
        if count and self._training:
            self._counts[layer] += torch.bincount(expert_TK.flatten(), minlength=placement.num_experts).cpu()
        expert_S = torch.from_numpy(placement.experts_on(self.rank))
        family = self.families[layer]
        if layer not in self._splits:
            return family.compute(
                replicas_SC,
                x_TD,
                expert_TK,
                weight_TK,
                frozen_S=frozen_S,
                expert_S=expert_S,
                token_T=token_T,
                step=self._step,
                training=self._training,
            )
        here = dispatch(x_TD, expert_TK, weight_TK, token_T, placement, self._splits[layer], self.groups.tokens)
        y_RD = family.compute(
            replicas_SC,
            here.x_RD,
            here.slot_RK,
            here.weight_RK,
            frozen_S=frozen_S,
            expert_S=expert_S,
            token_T=here.token_R,
            step=self._step,
            training=self._training,
        )
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
    def evaluating(self) -> Iterator[None]:
        """Every expert everywhere until the end of the block, so that ranks may run whatever they like, each on its own.

        Every rank must enter it; entering materializes all layers.
        """
        for layer in self.families:
            self._place(layer, everything_everywhere(self.owners[layer], self.world_size), None, None)
            if layer in self.frozen:
                self.frozen[layer].borrow(self.placements[layer])
            self.prefetch(layer)
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
        """Largest over mean choices computed per rank, averaged over the layers: what the last plans made of a step's loads."""
        skews = []
        for layer, loads_SE in loads.items():
            served = [loads_SE[source] @ self._split(layer, source) for source in range(self.world_size)]
            skews.append(imbalance(np.sum(served, axis=0)))
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

    def _place(self, layer: int, placement: Placement, loads_SE: np.ndarray | None, quota_ED: np.ndarray | None) -> None:
        self.placements[layer] = placement
        self._planned[layer] = (loads_SE, quota_ED)
        self._splits.pop(layer, None)
        if not placement.everywhere or quota_ED is not None:  # else every choice stays on its rank
            self._splits[layer] = self._split(layer, self.rank)

    def _split(self, layer: int, source: int) -> np.ndarray:
        return token_split(self.placements[layer].where_ED, *self._planned[layer], self.config.topology, source)

    def _replicas(self, layer: int) -> Tensor:
        store = self.stores[layer]
        fresh = not store.materialized
        replicas_SC = store.replicas()
        if fresh and self._training:
            replicas_SC.register_post_accumulate_grad_hook(lambda _: store.reduce() if self._last_micro_step else None)
        return replicas_SC

    def _exchange_loads(self) -> dict[int, np.ndarray]:
        layers = list(self.families)
        if not layers:
            return {}
        mine = torch.cat([self._counts[layer] for layer in layers]).to(self._device())
        if self.world_size > 1:
            gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
            dist.all_gather(gathered, mine, group=self.groups.experts)
        else:
            gathered = [mine]
        table = torch.stack(gathered).cpu().numpy()
        cuts = np.cumsum([self.families[layer].num_experts for layer in layers])[:-1]
        return dict(zip(layers, np.split(table, cuts, axis=1), strict=True))

    def _device(self) -> torch.device:
        return next(iter(self.stores.values())).device

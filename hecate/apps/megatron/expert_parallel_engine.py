"""`fssdp.policy: megatron_ep`: Megatron's MoE layers do the work, under the trainer that drives our engine.

The shards keep master weights, owners and gradients as they do for our own layers, so that optimizer, checkpoints and export are the same.
Megatron's experts compute with views of the master weights, or with copies of a narrower type; nothing is materialized elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.apps.megatron.expert_parallel import ExpertParallelLayer, put_experts, write_gradients
from hecate.engine.evaluation import EvaluationPass
from hecate.engine.shards import ExpertShards
from hecate.engine.step import StepLedger, require_nothing_under_way
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.forward_pass import CurrentPass, PassTokens
from hecate.experts.full import FullExperts
from hecate.experts.routers.router import RouterStats, Routing
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups


class ExpertParallelEngine:
    """Has experts compute in Megatron's layers: an `ExpertEngine`, whose methods are described there.

    Each rank owns equally many experts, in their order, as those layers have them.
    """

    def __init__(
        self,
        families: Mapping[Unit, FullExperts],
        config: EngineConfig,
        groups: ExpertGroups,
        layers: Mapping[Unit, ExpertParallelLayer],
        current: CurrentPass,
    ) -> None:
        """Args:
        families: what Megatron's layers begin with.
        layers: the Megatron layer of each unit, with as many experts, in the same sharding group.
        current: that the layers' routers were built with.
        """
        self.shards = ExpertShards(dict(families), config, groups, contiguous=True)
        self.current = current
        self._layers = layers
        self._last: StepLedger | None = None
        """of the step that began last"""
        for layer in layers.values() if self.shards.world_size > 1 else ():
            layer.register_forward_hook(self._count_bytes)

    @property
    def runs_in_lockstep(self) -> bool:
        return self.shards.world_size > 1

    def begin_step(self, number: int, micro_steps: int = 1) -> ExpertParallelStep:
        require_nothing_under_way(self._last, self.current)
        step = ExpertParallelStep(self.shards, self.current, self._layers, number, micro_steps)
        self._last = step.ledger
        self._put_experts()
        return step

    @contextmanager
    def evaluation(self, *, in_lockstep: bool = False) -> Iterator[EvaluationPass]:
        """Ranks must run the same forward passes at the same time, whatever `in_lockstep` says."""
        require_nothing_under_way(self._last, self.current)
        self._put_experts()
        one = EvaluationPass(None, self.current)
        with self.current.set_to(one):
            yield one

    def rejoin(
        self, topology: Topology, groups: ExpertGroups, owners: dict[Unit, np.ndarray], chunks: Mapping[Unit, Mapping[int, Tensor]]
    ) -> None:
        self._last, self.current.now = None, None
        self.shards.rejoin(topology, groups, owners, chunks)

    def _put_experts(self) -> None:
        for unit, store in self.shards.stores.items():
            put_experts(self._layers[unit], store.owned)

    def _count_bytes(self, layer: Any, _inputs: Any, outputs: tuple[Tensor, None]) -> None:
        dispatcher = layer.token_dispatcher
        away = np.array([dispatcher.input_splits, dispatcher.output_splits], dtype=np.int64)
        away[:, self.shards.rank] = 0
        row = layer.config.hidden_size * outputs[0].element_size()
        now = self.current.now
        backward_follows = outputs[0].requires_grad and isinstance(now, ExpertParallelMicroStep) and now.counts
        passes = 2 if backward_follows else 1
        wide = torch.promote_types(layer.config.params_dtype, torch.float32)  # of the weights that travel beside the rows
        self.shards.token_bytes_to += passes * row * away.sum(0) + wide.itemsize * away[:passes].sum(0)


class ExpertParallelStep:
    """One optimizer step; as `hecate.engine.step.Step`."""

    def __init__(
        self, shards: ExpertShards, current: CurrentPass, layers: Mapping[Unit, ExpertParallelLayer], number: int, micro_steps: int
    ) -> None:
        self.ledger = StepLedger(shards, number, micro_steps)
        self._shards, self._current, self._layers = shards, current, layers
        shards.plans.begin(number, micro_steps)

    def begin_micro_step(self, tokens: PassTokens | None = None) -> ExpertParallelMicroStep:
        """The model's next forward pass is of these tokens; None: of any, without padding."""
        number = self.ledger.begin_micro_step()
        micro = ExpertParallelMicroStep(self._current, tokens or PassTokens(), {}, self.ledger, number, self._take_gradients)
        self._current.now = micro
        return micro

    def finish(self) -> dict[Unit, np.ndarray]:
        """See `hecate.engine.step.Step.finish`."""
        self.ledger.require_complete()
        for store in reversed(self._shards.stores.values()):
            store.sum_over_groups()
        loads = self.ledger.exchange_loads()
        self.ledger.close({unit: store.reduced() for unit, store in self._shards.stores.items()}, loads)
        return loads

    def _take_gradients(self) -> None:
        """Add what a backward pass has left in Megatron's layers to the owners' sums, in the type of the master weights."""
        for unit, store in reversed(self._shards.stores.items()):
            grad_nC = torch.empty_like(store.owned)
            write_gradients(self._layers[unit], grad_nC)
            store.add_gradients(grad_nC)


@dataclass(frozen=True, eq=False)
class ExpertParallelMicroStep:
    """A `ForwardPass` of a step, for its backward pass; as `hecate.engine.step.MicroStep`."""

    current: CurrentPass
    tokens: PassTokens
    stats: dict[Unit, RouterStats]
    ledger: StepLedger
    number: int
    take_gradients: Callable[[], None]
    counts: bool = True
    """False: a checkpointed layer runs again, and what it does has been counted"""

    @property
    def step(self) -> int:
        return self.ledger.number

    def prefetch(self, *units: Unit) -> None:
        """Does nothing: only tokens travel."""

    def note_routing(self, unit: Unit, routing: Routing) -> None:
        self.ledger.require(self.number)
        if self.counts:
            self.stats[unit] = routing.stats()
            self.ledger.add(unit, self.stats[unit].count_KE.sum(0))

    def experts(self, unit: Unit, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor) -> NoReturn:
        raise NotImplementedError("Megatron's layers compute their experts themselves")

    def again(self) -> ExpertParallelMicroStep:
        return replace(self, counts=False)

    def backward(self, loss: Tensor, gradient: Tensor | None = None, limit: Tensor | None = None) -> None:
        """See `hecate.engine.step.MicroStep.backward`. Gradients cannot be clipped by ranks: tokens of several are with each expert."""
        assert limit is None, "the configuration lets nothing but hecate's own engine clip gradients of samples"
        self.ledger.require(self.number)
        if self.ledger.in_last_micro_step:
            self.ledger.start_exchange()
        torch.autograd.backward(loss, gradient)
        self.take_gradients()
        self.ledger.end_micro_step()
        self.current.now = None


def check_equal_experts(num_experts: int, groups: ExpertGroups) -> None:
    """Raises UserError: the ranks cannot have equally many experts."""
    ranks = dist.get_world_size(groups.experts)
    if num_experts % ranks:
        raise UserError(
            f"fssdp.policy: megatron_ep puts equally many experts on each rank, but {num_experts} experts are on {ranks} ranks\n"
            "  take a number of ranks that divides moe.num_experts, or another policy"
        )

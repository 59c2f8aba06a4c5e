"""`fssdp.policy: megatron_ep`: Megatron's MoE layers do the work, under the trainer that drives our engine.

The engine keeps master weights, owners and gradients as it does for our own layers, so that optimizer, checkpoints and export are the same.
Megatron's experts compute with views of the master weights; nothing is materialized elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.full import FullExperts
from hecate.experts.micro_step import MicroStep
from hecate.megatron.expert_parallel import ExpertParallelLayer, put_experts, write_gradients
from hecate.parallel.placement import contiguous_owners
from hecate.parallel.units import Unit
from hecate.ranks.groups import ExpertGroups


class ExpertParallelEngine(Engine):
    """Experts at home in order, equally many on each rank, as Megatron's layers have them."""

    def __init__(
        self,
        families: Mapping[Unit, FullExperts],
        config: EngineConfig,
        groups: ExpertGroups,
        layers: Mapping[Unit, ExpertParallelLayer],
        micro_step: MicroStep,
    ) -> None:
        """Args:
        families: what Megatron's layers begin with.
        layers: with as many experts, in the same sharding group.
        """
        super().__init__(dict(families), config, groups)
        self._layers = layers
        self._micro_step = micro_step
        for layer in layers.values() if self.world_size > 1 else ():
            layer.register_forward_hook(self._count_bytes)

    def first_owners(self, config: EngineConfig, groups: ExpertGroups) -> dict[Unit, np.ndarray]:
        return self.redealt({}, dist.get_world_size(groups.experts))

    def redealt(self, owners: Mapping[Unit, np.ndarray], world_size: int) -> dict[Unit, np.ndarray]:
        return {layer: contiguous_owners(family.num_experts, world_size) for layer, family in self.families.items()}

    @property
    def goes_together(self) -> bool:
        return self.world_size > 1

    def begin_step(self, step: int, micro_steps: int = 1) -> None:
        super().begin_step(step, micro_steps)
        self._put_experts()

    def prefetch(self, *layers: Unit) -> None:
        """Nothing travels but tokens."""

    def begin_backward(self) -> None:
        for layer, stats in self._micro_step.stats.items():
            self._counts[layer] += stats.count_KE.sum(0)

    def finish_step(self) -> dict[Unit, np.ndarray]:
        for layer, store in self.stores.items():
            grad_nC = torch.empty_like(store.owned)
            write_gradients(self._layers[layer], grad_nC)
            store.bring(grad_nC)
        return super().finish_step()

    @contextmanager
    def evaluating(self, *, together: bool = False) -> Iterator[None]:
        """Ranks must run the same forward passes at the same time, whatever `together` says."""
        self._put_experts()
        yield

    def _put_experts(self) -> None:
        for layer, store in self.stores.items():
            put_experts(self._layers[layer], store.owned)

    def _count_bytes(self, layer: Any, _inputs: Any, outputs: tuple[Tensor, None]) -> None:
        dispatcher = layer.token_dispatcher
        away = [int(sum(splits) - splits[self.rank]) for splits in (dispatcher.input_splits, dispatcher.output_splits)]
        row = layer.config.hidden_size * outputs[0].element_size()
        passes = 2 if outputs[0].requires_grad else 1
        weights = [layer.config.params_dtype.itemsize * pairs for pairs in away[:passes]]
        self._token_bytes_sent += passes * row * sum(away) + sum(weights)


def check_fit(num_experts: int, groups: ExpertGroups) -> None:
    """Raises UserError: the ranks cannot have equally many experts."""
    ranks = dist.get_world_size(groups.experts)
    if num_experts % ranks:
        raise UserError(
            f"fssdp.policy: megatron_ep puts equally many experts on each rank, but {num_experts} experts are on {ranks} ranks\n"
            "  take a number of ranks that divides moe.num_experts, or another policy"
        )

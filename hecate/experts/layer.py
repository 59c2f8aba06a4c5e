"""The module that stands where a model's FFN stood: router, then the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hecate.engine.engine import Engine
from hecate.experts.micro_step import MicroStep, RouterStats
from hecate.experts.router import Routing, TopKRouter
from hecate.parallel.units import Unit


class MoeLayer(nn.Module):
    """[B, S, D] -> [B, S, D]. Padding tokens (see `MicroStep.valid`) are not routed and come out as zeros."""

    def __init__(self, unit: Unit, router: TopKRouter, engine: Engine, micro_step: MicroStep) -> None:
        super().__init__()
        self.unit = unit
        self.router = router
        self._engine = engine
        self._micro_step = micro_step

    @property
    def trained_router(self) -> nn.Parameter:
        """The router's weight, which is always trained."""
        return self.router.weight

    def forward(self, hidden: Tensor) -> Tensor:
        micro = self._micro_step
        x_TD = hidden.flatten(0, -2)
        token_T = micro.token if micro.token is not None else torch.arange(len(x_TD), device=x_TD.device)
        if micro.valid is not None:
            x_TD, token_T = x_TD[micro.valid], token_T[micro.valid]
        routing = self.router(x_TD)
        if micro.recording:
            micro.stats[self.unit] = stats_of(routing)
        y_TD = self._engine.experts(self.unit, x_TD, routing.expert_TK, routing.weight_TK, token_T, count=micro.recording)
        if micro.valid is not None:
            y_TD = y_TD.new_zeros((hidden[..., 0].numel(), hidden.shape[-1])).index_copy(0, micro.valid, y_TD)
        return y_TD.view_as(hidden)


def stats_of(routing: Routing) -> RouterStats:
    """What the load-balancing loss needs of some tokens' routing."""
    num_experts = routing.prob_TE.shape[1]
    count_KE = torch.zeros((routing.expert_TK.shape[1], num_experts), dtype=torch.int64, device=routing.expert_TK.device)
    count_KE.scatter_add_(1, routing.expert_TK.T, torch.ones_like(routing.expert_TK.T))
    return RouterStats(routing.prob_TE.sum(0), count_KE)

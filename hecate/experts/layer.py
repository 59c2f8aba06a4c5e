"""The module that stands where a model's FFN stood: router, then experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hecate.experts.forward_pass import CurrentPass
from hecate.experts.router import TopKRouter
from hecate.parallel.units import Unit


class MoeLayer(nn.Module):
    """[B, S, D] -> [B, S, D]. Padding tokens (see `PassTokens.valid`) are not routed and come out as zeros."""

    def __init__(self, unit: Unit, router: TopKRouter, current: CurrentPass) -> None:
        super().__init__()
        self.unit = unit
        self.router = router
        self._current = current

    @property
    def trained_router(self) -> nn.Parameter:
        """The router's weight, which is always trained."""
        return self.router.weight

    def forward(self, hidden: Tensor) -> Tensor:
        current = self._current.required()
        valid, number = current.tokens.valid, current.tokens.number
        x_TD = hidden.flatten(0, -2)
        token_T = number if number is not None else torch.arange(len(x_TD), device=x_TD.device)
        if valid is not None:
            x_TD, token_T = x_TD[valid], token_T[valid]
        routing = self.router(x_TD)
        current.note_routing(self.unit, routing)
        y_TD = current.experts(self.unit, x_TD, routing.expert_TK, routing.weight_TK, token_T)
        if valid is not None:
            y_TD = y_TD.new_zeros((hidden[..., 0].numel(), hidden.shape[-1])).index_copy(0, valid, y_TD)
        return y_TD.view_as(hidden)

"""The module in the place of a model's FFN, or of the experts of an MoE model: router, then experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hecate.experts.forward_pass import CurrentPass, OrderError
from hecate.experts.pass_routing import differing
from hecate.experts.routers.router import BalanceLoss, Router, TokenFeatures
from hecate.parallel.values.units import Unit


class _AtRows(torch.autograd.Function):
    """Put rows at given places among rows of zeros, [M, D] -> [T, D].

    `torch.index_copy` would keep the rows for the backward pass, which needs their places only.
    """

    @staticmethod
    def forward(ctx: Any, row_MD: Tensor, place_M: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(place_M)
        return row_MD.new_zeros((num_rows, row_MD.shape[1])).index_copy_(0, place_M, row_MD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place_M,) = ctx.saved_tensors
        return grads[0].index_select(0, place_M), None, None


class MoeLayer(nn.Module):
    """[..., D] -> [..., D]. Padding tokens (see `PassTokens.valid`) go to no expert, do not count, and come out as zeros.

    In the place of a dense FFN it is called with hidden states [B, S, D], and its router decides. In the place of an MoE model's own
    experts it is called as experts(x [T, D], expert [T, K], weight [T, K]), as transformers 5 does when the model's router has decided.
    """

    def __init__(self, unit: Unit, router: Router, current: CurrentPass) -> None:
        super().__init__()
        self.unit = unit
        self.router = router
        self._current = current

    @property
    def trained_router(self) -> Mapping[str, nn.Parameter]:
        """What the router trains, by name (`Router.trained`)."""
        return self.router.trained

    @property
    def balance(self) -> BalanceLoss | None:
        """The loss that balances its experts, if there is one."""
        return self.router.loss

    def forward(self, hidden: Tensor, *decided: Tensor) -> Tensor:
        current = self._current.required()
        valid, number = current.tokens.valid, current.tokens.number
        x_TD = hidden.flatten(0, -2)
        token_T = number if number is not None else torch.arange(len(x_TD), device=x_TD.device)
        if valid is not None:
            x_TD, token_T, decided = x_TD[valid], token_T[valid], tuple(part[valid] for part in decided)
        # As for the attention's adapters, a pass with gradients whose tokens have numbers is one of training.
        step = current.step if number is not None and torch.is_grad_enabled() else None
        tokens = current.tokens
        known_TK = None if tokens.routing is None else tokens.routing.experts(self.unit)
        forced_TK = known_TK if tokens.routing is not None and tokens.routing.forced else None
        if forced_TK is not None and not self.router.replays:
            raise OrderError(f"layer {self.unit}: its router, {type(self.router).__name__}, cannot be given a choice (`Router.replays`)")
        features = TokenFeatures(valid, tokens.samples, tokens.source, tokens.users, step, decided, forced_TK)
        routing = self.router.route(x_TD, features)
        if known_TK is not None and forced_TK is None:
            routing = replace(routing, differing=differing(routing.expert_TK, known_TK))
        current.note_routing(self.unit, routing)
        y_TD = current.experts(self.unit, x_TD, routing.expert_TK, routing.weight_TK, token_T)
        if valid is not None:
            y_TD = _AtRows.apply(y_TD, valid, hidden[..., 0].numel())
        return y_TD.view(*hidden.shape[:-1], y_TD.shape[-1])

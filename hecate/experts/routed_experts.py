"""The module that stands where an MoE model's experts stood: the model's own router has chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hecate.experts.forward_pass import CurrentPass
from hecate.experts.router import Routing
from hecate.parallel.units import Unit


class RoutedExperts(nn.Module):
    """experts(x [T, D], index [T, K], weight [T, K]) -> [T, D], as transformers 5 calls its experts.

    Tokens that are padding (see `PassTokens.valid`) have been routed like the others, but go nowhere, do not count, and come out as zeros.
    """

    def __init__(self, unit: Unit, router: nn.Module, current: CurrentPass, trained: nn.Parameter | None = None) -> None:
        """Args:
        router: the model's own; its first output are the logits [T, E].
        trained: its weight, if that is trained.
        """
        super().__init__()
        self.unit = unit
        self._current = current
        self._trained = (trained,)  # not this module's parameter, but the router's
        self._logits_TE: Tensor | None = None
        router.register_forward_hook(self._note_logits)

    @property
    def trained_router(self) -> nn.Parameter | None:
        """The router's weight, if that is trained."""
        return self._trained[0]

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        current, num_tokens = self._current.required(), len(x_TD)
        valid, number = current.tokens.valid, current.tokens.number
        logits_TE, self._logits_TE = self._logits_TE, None
        token_T = number if number is not None else torch.arange(num_tokens, device=x_TD.device)
        if valid is not None:
            x_TD, expert_TK, weight_TK, token_T = (part[valid] for part in (x_TD, expert_TK, weight_TK, token_T))
        assert logits_TE is not None, "experts were called without their router"
        logits_TE = logits_TE if valid is None else logits_TE[valid]
        # Also when a checkpointed layer runs again: autograd wants the same tensors as in the first run.
        prob_TE = torch.softmax(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)), dim=-1)
        current.note_routing(self.unit, Routing(prob_TE, expert_TK, weight_TK))
        y_TD = current.experts(self.unit, x_TD, expert_TK, weight_TK, token_T)
        if valid is None:
            return y_TD
        return y_TD.new_zeros((num_tokens, y_TD.shape[1])).index_copy(0, valid, y_TD)

    def _note_logits(self, _router: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self._logits_TE = outputs[0]

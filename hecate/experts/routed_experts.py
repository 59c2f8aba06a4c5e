"""The module that stands where an MoE model's experts stood: the model's own router has chosen, the engine does the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hecate.engine.engine import Engine
from hecate.experts.layer import stats_of
from hecate.experts.micro_step import MicroStep
from hecate.experts.router import Routing
from hecate.parallel.units import Unit


class RoutedExperts(nn.Module):
    """experts(x [T, D], index [T, K], weight [T, K]) -> [T, D], as transformers 5 calls its experts.

    Tokens that are padding (see `MicroStep.valid`) have been routed like the others, but go nowhere, do not count, and come out as zeros.
    """

    def __init__(self, unit: Unit, router: nn.Module, engine: Engine, micro_step: MicroStep, trained: nn.Parameter | None = None) -> None:
        """Args:
        router: the model's own; its first output are the logits [T, E].
        trained: its weight, if that is trained.
        """
        super().__init__()
        self.unit = unit
        self._engine = engine
        self._micro_step = micro_step
        self._trained = (trained,)  # not this module's parameter, but the router's
        self._logits_TE: Tensor | None = None
        router.register_forward_hook(self._note_logits)

    @property
    def trained_router(self) -> nn.Parameter | None:
        """The router's weight, if that is trained."""
        return self._trained[0]

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        micro, num_tokens = self._micro_step, len(x_TD)
        logits_TE, self._logits_TE = self._logits_TE, None
        token_T = micro.token if micro.token is not None else torch.arange(num_tokens, device=x_TD.device)
        if micro.valid is not None:
            x_TD, expert_TK, weight_TK, token_T = (part[micro.valid] for part in (x_TD, expert_TK, weight_TK, token_T))
        assert logits_TE is not None, "experts were called without their router"
        logits_TE = logits_TE if micro.valid is None else logits_TE[micro.valid]
        # Also when a checkpointed layer runs again: autograd wants the same tensors as in the first run.
        prob_TE = torch.softmax(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)), dim=-1)
        if micro.recording:
            micro.stats[self.unit] = stats_of(Routing(prob_TE, expert_TK, weight_TK))
        y_TD = self._engine.experts(self.unit, x_TD, expert_TK, weight_TK, token_T, count=micro.recording)
        if micro.valid is None:
            return y_TD
        return y_TD.new_zeros((num_tokens, y_TD.shape[1])).index_copy(0, micro.valid, y_TD)

    def _note_logits(self, _router: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self._logits_TE = outputs[0]

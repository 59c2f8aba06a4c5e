"""What an expert computes: the seam between the engine and an expert family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hecate.parallel.cost_model import LayerCost
from hecate.parallel.layout import ExpertLayout


class ExpertFamily(Protocol):
    """One layer's experts of some kind. The engine moves their chunks and tokens and never looks inside."""

    num_experts: int

    def layout(self) -> ExpertLayout:
        """The tensors of one expert."""
        ...

    def init_chunk(self, expert: int) -> Tensor:
        """The initial flat chunk of one expert, [C] in master precision; a function of (seed, layer, expert) alone."""
        ...

    def frozen_chunk(self, expert: int) -> Tensor:
        """The flat frozen chunk of one expert, in the dtype it is computed in; empty for a family without frozen parts.

        It is asked for on the expert's first owner; a rank that owns none asks for expert 0 to learn its dtype and device.
        """
        ...

    def cost(self, top_k: int, non_moe_flops: float) -> LayerCost:
        """What a planner must know of the layer; `non_moe_flops` is of what hides transfers, of one rank, forward."""
        ...

    def compute(
        self,
        replicas_SC: Tensor,
        x_TD: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        *,
        frozen_S: Sequence[Tensor] = (),
        expert_S: Tensor,
        token_T: Tensor,
        step: int,
        training: bool,
    ) -> Tensor:
        """The weighted sum of each token's experts that are here, [T, D]; differentiable in replicas, x and weights.

        The result must depend on `replicas_SC` in autograd's eyes even if there is no token. What is saved of the replicas for the
        backward pass must be views of them: their memory may be freed in between, and filled again.

        Args:
            replicas_SC: the chunks materialized here.
            slot_TK: int64, the slot of each choice; -1: computed elsewhere.
            frozen_S: the frozen chunk of each slot; nothing for a family without frozen parts.
            expert_S: int64, the experts in the slots.
            token_T: int64, global token numbers, for whatever must not depend on ranks.
        """
        ...

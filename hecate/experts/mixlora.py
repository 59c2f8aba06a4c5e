"""MixLoRA (arXiv 2404.15159): experts are low-rank pairs over one shared, frozen, gated FFN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hecate.experts.pairs import LoraPairs, LoraShape
from hecate.kernels.backend import Backend, expert_kernels
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, dropout_key
from hecate.kernels.common.ffn import FfnBase
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.parallel.cost_model import LayerCost
from hecate.parallel.layout import ExpertLayout


class MixLoraExperts:
    """The MixLoRA experts of one layer (an ExpertFamily)."""

    def __init__(
        self,
        base: FfnBase,
        lora: LoraShape,
        projections: tuple[str, ...],
        *,
        layer: int,
        num_experts: int,
        seed: int,
        master_dtype: torch.dtype,
        kernels: Backend = "auto",
    ) -> None:
        ffn, hidden = base.gate_FD.shape
        self.base = base
        self.lora = lora
        self.num_experts = num_experts
        self._layer = layer
        self._seed = seed
        self._master_dtype = master_dtype
        self._kernels = kernels
        self._pairs = LoraPairs(lora, projections, hidden=hidden, ffn=ffn)

    @property
    def projections(self) -> tuple[str, ...]:
        """Those with an adapter, in the order of `PROJECTIONS`."""
        return self._pairs.projections

    def layout(self) -> ExpertLayout:
        return ExpertLayout(trainable=self._pairs.specs())

    def init_chunk(self, expert: int) -> Tensor:
        """A by Kaiming uniform, B zero."""
        chunk = self._pairs.initial(self._seed, "expert", self._layer, expert)
        return chunk.to(device=self.base.gate_FD.device, dtype=self._master_dtype)

    def frozen_chunk(self, expert: int) -> Tensor:
        """Nothing: the base is every rank's own."""
        return self.base.gate_FD.new_empty(0)

    def cost(self, top_k: int, non_moe_flops: float) -> LayerCost:
        chunk_bytes = float(self.layout().trainable_numel * self._master_dtype.itemsize)
        hidden = self.base.gate_FD.shape[1]
        return LayerCost(
            trainable_bytes=chunk_bytes,
            state_bytes=3 * chunk_bytes,
            top_k=top_k,
            row_bytes=float(hidden * self.base.gate_FD.element_size()),
            row_flops=6.0 * self.base.gate_FD.numel(),
            assignment_flops=self._pairs.flops,
            assignment_backward=3.0,  # the pairs run once more, and twice for their gradients
            non_moe_flops=non_moe_flops,
        )

    def pairs(self, replicas_SC: Tensor) -> dict[str, LowRankPairs]:
        """The chunks as stacked pairs by projection; views, differentiable."""
        return self._pairs.stacked(replicas_SC)

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
        dropout = None
        if training and self.lora.dropout > 0:
            dropout = Dropout(self.lora.dropout, dropout_key(self._seed, step, self._layer))
        routed = RoutedTokens(x_TD, slot_TK, weight_TK, token_T, expert_S)
        return expert_kernels(self._kernels, x_TD, self.lora.rank).mixlora_ffn(routed, self.base, self.pairs(replicas_SC), dropout=dropout)

"""LoRA over the experts of an MoE base, as Mixtral's or Qwen3-MoE's: each has a frozen gated FFN of its own and low-rank pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hecate.experts.full import ffn_specs
from hecate.experts.pairs import LoraPairs, LoraShape
from hecate.kernels.backend import Backend, expert_kernels
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, dropout_key
from hecate.kernels.common.ffn import FfnShape
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.parallel.cost_model import LayerCost
from hecate.parallel.layout import ExpertLayout


class MoeLoraExperts:
    """The adapted experts of one layer (an ExpertFamily).

    An expert's frozen weights are far heavier than its pairs and never change, so a replica of them is kept between steps.
    """

    def __init__(
        self,
        shape: FfnShape,
        frozen: Callable[[int], Tensor],
        lora: LoraShape,
        projections: tuple[str, ...],
        *,
        layer: int,
        num_experts: int,
        seed: int,
        master_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        device: torch.device,
        kernels: Backend = "auto",
    ) -> None:
        """Args:
        frozen: the weights of an expert, flat as `FfnShape` lays them out, on the device and in `compute_dtype`.
        """
        self.shape = shape
        self.num_experts = num_experts
        self._frozen = frozen
        self._lora = lora
        self._pairs = LoraPairs(lora, projections, hidden=shape.hidden, ffn=shape.ffn)
        self._layer = layer
        self._seed = seed
        self._master_dtype = master_dtype
        self._kernels = kernels
        self._compute_dtype = compute_dtype
        self._device = device

    @property
    def projections(self) -> tuple[str, ...]:
        """Those with an adapter, in the order of the chunk."""
        return self._pairs.projections

    @property
    def rank(self) -> int:
        """Of the pairs."""
        return self._lora.rank

    def layout(self) -> ExpertLayout:
        return ExpertLayout(trainable=self._pairs.specs(), frozen=ffn_specs(self.shape))

    def init_chunk(self, expert: int) -> Tensor:
        """A by Kaiming uniform, B zero: an expert starts as the base's."""
        chunk = self._pairs.initial(self._seed, "expert", self._layer, expert)
        return chunk.to(device=self._device, dtype=self._master_dtype)

    def frozen_chunk(self, expert: int) -> Tensor:
        chunk = self._frozen(expert)
        assert (chunk.shape, chunk.dtype) == ((self.shape.numel,), self._compute_dtype), (chunk.shape, chunk.dtype)
        return chunk

    def cost(self, top_k: int, non_moe_flops: float) -> LayerCost:
        chunk_bytes = float(self.layout().trainable_numel * self._master_dtype.itemsize)
        frozen_flops, pair_flops = 2.0 * self.shape.numel, self._pairs.flops
        return LayerCost(
            trainable_bytes=chunk_bytes,
            frozen_bytes=float(self.shape.numel * self._compute_dtype.itemsize),
            state_bytes=3 * chunk_bytes,
            top_k=top_k,
            row_bytes=float(self.shape.hidden * self._compute_dtype.itemsize),
            assignment_flops=frozen_flops + pair_flops,
            # The frozen part passes the gradient on; the pairs shrink their inputs once more, and run twice for their gradients.
            assignment_backward=(frozen_flops + 2.5 * pair_flops) / (frozen_flops + pair_flops),
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
        if training and self._lora.dropout > 0:
            dropout = Dropout(self._lora.dropout, dropout_key(self._seed, step, self._layer))
        routed = RoutedTokens(x_TD, slot_TK, weight_TK, token_T, expert_S)
        return expert_kernels(self._kernels, x_TD, self._lora.rank).moe_lora_ffn(
            routed, frozen_S, self.pairs(replicas_SC), self.shape, dropout=dropout
        )

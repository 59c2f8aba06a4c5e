"""LoRA over the experts of an MoE base, as Mixtral's or Qwen3-MoE's: each has a frozen gated FFN of its own and low-rank pairs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hecate.experts.family import ExpertReplicas, FfnExperts, Site
from hecate.experts.pairs.source import PairSource
from hecate.kernels.common.assignments import RoutedTokens
from hecate.parallel.values.expert_kinds import MOE_LORA


class MoeLoraExperts(FfnExperts):
    """The adapted experts of one layer (an ExpertFamily).

    An expert's frozen weights are far heavier than its pairs and never change, so a replica of them is kept between steps.
    """

    def __init__(self, site: Site, frozen: Callable[[int], Tensor], pairs: PairSource) -> None:
        """`frozen`: the weights of an expert, flat as `FfnShape` lays them out, on the site's device and in its `compute_dtype`."""
        super().__init__(MOE_LORA, site, pairs)
        self._frozen = frozen

    def frozen_chunk(self, expert: int) -> Tensor:
        chunk = self._frozen(expert)
        assert (chunk.shape, chunk.dtype) == ((self.shape.numel,), self.site.compute_dtype), (chunk.shape, chunk.dtype)
        return chunk

    def compute(self, routed: RoutedTokens, replicas: ExpertReplicas, step: int | None) -> Tensor:
        pairs = self.pair_source.stacked(replicas.chunks_SC, routed.experts_in_slots)
        return self._kernels(routed.x_TD).moe_lora_ffn(routed, replicas.frozen_S, pairs, self.shape, dropout=self._dropout(step))

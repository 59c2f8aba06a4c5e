"""MixLoRA (arXiv 2404.15159): experts are low-rank pairs over one shared, frozen, gated FFN."""

from __future__ import annotations

from torch import Tensor

from hecate.experts.family import ExpertReplicas, FfnExperts, Site
from hecate.experts.pairs.source import PairSource
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnBase
from hecate.parallel.values.expert_kinds import MIXLORA


class MixLoraExperts(FfnExperts):
    """The MixLoRA experts of one layer (an ExpertFamily). Every rank holds the base, which is no part of an expert."""

    def __init__(self, site: Site, base: FfnBase, pairs: PairSource) -> None:
        super().__init__(MIXLORA, site, pairs)
        self.base = base

    def compute(self, routed: RoutedTokens, replicas: ExpertReplicas, step: int | None) -> Tensor:
        pairs = self.pair_source.stacked(replicas.chunks_SC, routed.experts_in_slots)
        dropout = self._dropout(step)
        return self._kernels(routed.x_TD).mixlora_ffn(self._numbered_for(dropout, routed), self.base, pairs, dropout=dropout)

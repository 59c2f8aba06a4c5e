"""The low-rank pairs of one expert: how they lie in its chunk, how they begin, what they cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.experts.seeding import generator, kaiming_lora_a
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.parallel.layout import TensorSpec


@dataclass(frozen=True)
class LoraShape:
    """Hyper-parameters of low-rank pairs."""

    rank: int
    scale: float
    """alpha / r, or alpha / sqrt(r) with rsLoRA"""
    dropout: float


GATE_UP = "gate_up_proj"
"""gate and up as one projection [2F, D]: they share A"""
_ORDER = ("gate_proj", "up_proj", GATE_UP, "down_proj")


class LoraPairs:
    """A and B for some projections of a gated FFN; a chunk holds them by projection, A before B."""

    def __init__(self, lora: LoraShape, projections: tuple[str, ...], *, hidden: int, ffn: int) -> None:
        assert projections, "an expert needs an adapter on at least one projection"
        assert set(projections) <= set(_ORDER), projections
        self.lora = lora
        self.projections = tuple(name for name in _ORDER if name in projections)
        self._hidden, self._ffn = hidden, ffn

    def _sizes(self, projection: str) -> tuple[int, int]:
        """Inputs and outputs of a projection."""
        if projection == GATE_UP:
            return self._hidden, 2 * self._ffn
        return (self._ffn, self._hidden) if projection == "down_proj" else (self._hidden, self._ffn)

    def specs(self) -> tuple[TensorSpec, ...]:
        specs = []
        for name in self.projections:
            inputs, outputs = self._sizes(name)
            specs += [TensorSpec(f"{name}.A", (self.lora.rank, inputs)), TensorSpec(f"{name}.B", (outputs, self.lora.rank))]
        return tuple(specs)

    def initial(self, *key: int | str) -> Tensor:
        """float64 [C]: A by Kaiming uniform, B zero. `key` names the expert, as (seed, "expert", layer, expert)."""
        parts = []
        for name in self.projections:
            inputs, outputs = self._sizes(name)
            parts += [kaiming_lora_a(self.lora.rank, inputs, generator(*key, name)).flatten()]
            parts += [torch.zeros(outputs * self.lora.rank, dtype=torch.float64)]
        return torch.cat(parts)

    def stacked(self, replicas_SC: Tensor) -> dict[str, LowRankPairs]:
        """The chunks as stacked pairs by projection; views, differentiable."""
        specs = self.specs()
        # One split, whose backward is one concatenation, and not a slice each, whose backward zero-fills the whole chunk.
        parts = replicas_SC.split([spec.numel for spec in specs], dim=1)
        stacked = {spec.name: part.view(-1, *spec.shape) for spec, part in zip(specs, parts, strict=True)}
        return {name: LowRankPairs(stacked[f"{name}.A"], stacked[f"{name}.B"], self.lora.scale) for name in self.projections}

    @property
    def flops(self) -> float:
        """Of one token forward."""
        return 2.0 * sum(self.lora.rank * sum(self._sizes(name)) for name in self.projections)

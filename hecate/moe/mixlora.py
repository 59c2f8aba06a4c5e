"""MixLoRA (arXiv 2404.15159): experts are low-rank pairs over one shared, frozen, gated FFN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.kernels.dropout import Dropout, dropout_key
from hecate.kernels.mixlora import mixlora_ffn
from hecate.kernels.mixlora_inputs import PROJECTIONS, FfnBase, Lora
from hecate.moe.seeding import generator, kaiming_lora_a
from hecate.parallel.cost_model import LayerCost
from hecate.parallel.layout import ExpertLayout, TensorSpec


@dataclass(frozen=True)
class LoraShape:
    """Hyper-parameters of low-rank pairs."""

    rank: int
    scale: float
    """alpha / r, or alpha / sqrt(r) with rsLoRA"""
    dropout: float


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
    ) -> None:
        assert projections, "a MixLoRA layer needs an adapter on at least one projection"
        assert set(projections) <= set(PROJECTIONS), projections
        self.base = base
        self.lora = lora
        self.projections = tuple(name for name in PROJECTIONS if name in projections)
        self.num_experts = num_experts
        self._layer = layer
        self._seed = seed
        self._master_dtype = master_dtype

    def _sizes(self, projection: str) -> tuple[int, int]:
        """Inputs and outputs of a projection."""
        ffn, hidden = self.base.gate_FD.shape
        return (ffn, hidden) if projection == "down_proj" else (hidden, ffn)

    def layout(self) -> ExpertLayout:
        specs = []
        for name in self.projections:
            inputs, outputs = self._sizes(name)
            specs += [
                TensorSpec(f"{name}.A", (self.lora.rank, inputs)),
                TensorSpec(f"{name}.B", (outputs, self.lora.rank)),
            ]
        return ExpertLayout(trainable=tuple(specs))

    def init_chunk(self, expert: int) -> Tensor:
        """A by Kaiming uniform, B zero."""
        parts = []
        for name in self.projections:
            inputs, outputs = self._sizes(name)
            source = generator(self._seed, "expert", self._layer, expert, name)
            parts += [kaiming_lora_a(self.lora.rank, inputs, source).flatten()]
            parts += [torch.zeros(outputs * self.lora.rank, dtype=torch.float64)]
        return torch.cat(parts).to(device=self.base.gate_FD.device, dtype=self._master_dtype)

    def cost(self, top_k: int, non_moe_flops: float) -> LayerCost:
        chunk_bytes = float(self.layout().trainable_numel * self._master_dtype.itemsize)
        hidden = self.base.gate_FD.shape[1]
        return LayerCost(
            trainable_bytes=chunk_bytes,
            state_bytes=3 * chunk_bytes,
            top_k=top_k,
            row_bytes=float(hidden * self.base.gate_FD.element_size()),
            row_flops=6.0 * self.base.gate_FD.numel(),
            choice_flops=2.0 * sum(self.lora.rank * sum(self._sizes(name)) for name in self.projections),
            choice_backward=3.0,  # the pairs run once more, and twice for their gradients
            non_moe_flops=non_moe_flops,
        )

    def pairs(self, replicas_SC: Tensor) -> dict[str, Lora]:
        """The chunks as stacked pairs by projection; views, differentiable."""
        specs = self.layout().trainable
        # One split, whose backward is one concatenation, and not a slice each, whose backward zero-fills the whole chunk.
        parts = replicas_SC.split([spec.numel for spec in specs], dim=1)
        stacked = {spec.name: part.view(-1, *spec.shape) for spec, part in zip(specs, parts, strict=True)}
        return {name: Lora(stacked[f"{name}.A"], stacked[f"{name}.B"], self.lora.scale) for name in self.projections}

    def compute(
        self,
        replicas_SC: Tensor,
        x_TD: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        *,
        expert_S: Tensor,
        token_T: Tensor,
        step: int,
        training: bool,
    ) -> Tensor:
        dropout = None
        if training and self.lora.dropout > 0:
            dropout = Dropout(self.lora.dropout, dropout_key(self._seed, step, self._layer))
        return mixlora_ffn(
            x_TD,
            slot_TK,
            weight_TK,
            self.base,
            self.pairs(replicas_SC),
            dropout=dropout,
            token_T=token_T,
            expert_S=expert_S,
        )

"""Full experts: each a gated FFN of its own, all of it trained. The case of the Hecate paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hecate.experts.seeding import generator, linear_weight
from hecate.kernels.backend import Backend, expert_kernels
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnShape
from hecate.parallel.cost_model import LayerCost
from hecate.parallel.layout import ExpertLayout, TensorSpec


def ffn_specs(shape: FfnShape) -> tuple[TensorSpec, ...]:
    """The weights of a gated FFN in the order of `FfnShape`."""
    return (
        TensorSpec("gate_proj", (shape.ffn, shape.hidden)),
        TensorSpec("up_proj", (shape.ffn, shape.hidden)),
        TensorSpec("down_proj", (shape.hidden, shape.ffn)),
    )


class FullExperts:
    """The fully trained experts of one layer (an ExpertFamily)."""

    def __init__(
        self,
        shape: FfnShape,
        *,
        layer: int,
        num_experts: int,
        seed: int,
        master_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        device: torch.device,
        initial: Callable[[int], Tensor] | None = None,
        kernels: Backend = "auto",
    ) -> None:
        """Args:
        initial: the flat chunk that an expert begins with; None: each matrix as torch's nn.Linear. Whoever gave it may take it back
            (`forget_initial`) once there is an engine.
        """
        self.shape = shape
        self.num_experts = num_experts
        self._layer = layer
        self._seed = seed
        self._master_dtype = master_dtype
        self._kernels = kernels
        self._compute_dtype = compute_dtype
        self._device = device
        self._initial = self._as_linear if initial is None else initial

    def layout(self) -> ExpertLayout:
        return ExpertLayout(trainable=ffn_specs(self.shape))

    def init_chunk(self, expert: int) -> Tensor:
        return self._initial(expert).to(device=self._device, dtype=self._master_dtype)

    def forget_initial(self) -> None:
        """Let go of what the initial chunks were made from."""
        self._initial = self._as_linear

    def _as_linear(self, expert: int) -> Tensor:
        """float64 [C]"""
        parts = []
        for spec in self.layout().trainable:
            outputs, inputs = spec.shape
            parts.append(linear_weight(outputs, inputs, generator(self._seed, "expert", self._layer, expert, spec.name)).flatten())
        return torch.cat(parts)

    def frozen_chunk(self, expert: int) -> Tensor:
        """Nothing."""
        return torch.empty(0, dtype=self._compute_dtype, device=self._device)

    def cost(self, top_k: int, non_moe_flops: float) -> LayerCost:
        chunk_bytes = float(self.shape.numel * self._master_dtype.itemsize)
        return LayerCost(
            trainable_bytes=chunk_bytes,
            state_bytes=3 * chunk_bytes,
            top_k=top_k,
            row_bytes=float(self.shape.hidden * self._compute_dtype.itemsize),
            assignment_flops=2.0 * self.shape.numel,
            assignment_backward=2.0,
            non_moe_flops=non_moe_flops,
        )

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
        return expert_kernels(self._kernels, x_TD).full_ffn(RoutedTokens(x_TD, slot_TK, weight_TK), replicas_SC, self.shape)

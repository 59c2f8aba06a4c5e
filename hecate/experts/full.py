"""Full experts: each a gated FFN of its own, all of it trained. The case of the Hecate paper."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hecate.experts.family import ExpertReplicas, FfnExperts, Site
from hecate.experts.seeding import generator, linear_weight
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnBase
from hecate.parallel.values.expert_kinds import FULL
from hecate.parallel.values.units import Unit


class FullExperts(FfnExperts):
    """The fully trained experts of one layer (an ExpertFamily)."""

    def __init__(self, site: Site, initial: Callable[[int], Tensor] | None = None) -> None:
        """`initial`: returns the flat chunk that an expert begins with, until `forget_initial`; None: each matrix as torch's nn.Linear."""
        super().__init__(FULL, site, pairs=None)
        self._initial = self._as_linear if initial is None else initial

    def init_chunk(self, expert: int) -> Tensor:
        return self._initial(expert).to(device=self.site.device, dtype=self.site.master_dtype)

    def forget_initial(self) -> None:
        self._initial = self._as_linear

    def compute(self, routed: RoutedTokens, replicas: ExpertReplicas, step: int | None) -> Tensor:
        return self._kernels(routed.x_TD).full_ffn(routed, replicas.chunks_SC, self.shape)

    def _as_linear(self, expert: int) -> Tensor:
        """float64 [C]"""
        parts = []
        for spec in self.layout().trainable:
            outputs, inputs = spec.shape
            parts.append(linear_weight(outputs, inputs, generator(*self.site.key(self.site.unit, expert), spec.name)).flatten())
        return torch.cat(parts)


def noisy_copies(base: FfnBase, noise: float, *, unit: Unit, seed: int) -> Callable[[int], Tensor]:
    """The initial chunk of each expert of an upcycled model, float64 [C]: a copy of the dense FFN with a little noise. It is a function of
    (seed, unit, expert, matrix) alone.

    Sparse upcycling (arXiv 2212.05055). The weights of a token's experts sum to 1, so without noise the model computes at first what the
    dense one did, whatever the number of experts.

    Args:
        noise: standard deviation of what is added to a copied weight, as a share of its matrix's own.
    """

    def initial(expert: int) -> Tensor:
        parts = []
        for name, weight in (("gate_proj", base.gate_FD), ("up_proj", base.up_FD), ("down_proj", base.down_DF)):
            copy = weight.detach().to("cpu", torch.float64)
            if noise > 0:
                random = generator(seed, "upcycle", str(unit), expert, name)
                copy = copy + torch.randn(copy.shape, generator=random, dtype=torch.float64) * (noise * copy.std())
            parts.append(copy.flatten())
        return torch.cat(parts)

    return initial

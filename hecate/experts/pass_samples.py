"""The samples that the tokens of a forward pass belong to, and means over each sample's tokens.

Shapes: B rows of S positions, N = B·S tokens with padding among them, T tokens without padding, M samples, E experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleMeans:
    """One layer's routing, for each of M samples; a sample without tokens has zeros."""

    prob_ME: Tensor
    """The mean probability of each expert over the sample's valid tokens; differentiable."""
    chosen_ME: Tensor
    """The assignments to each expert, divided by the sample's valid tokens, whose sum is K; without gradient."""
    expected: float
    """The number of samples in a micro-step (`PassSamples.expected`)."""


@dataclass(frozen=True, eq=False)
class PassSamples:
    """Which sample each token of a forward pass belongs to."""

    segment_ids: Tensor
    """The sample's number within its row, int64 [B, S], from 1; 0 at padding."""
    most: int
    """The largest number of samples in a row."""
    expected: float
    """The number of samples of all ranks in a micro-step, on average over the step's micro-steps."""
    _shares: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @cached_property
    def number_N(self) -> Tensor:
        """int64 [N]: the sample of each token, among M = B · `most`, of which some may have no tokens."""
        rows = torch.arange(len(self.segment_ids), device=self.segment_ids.device)[:, None]
        return (rows * self.most + self.segment_ids - 1).flatten()

    def means(self, valid_T: Tensor | None, prob_TE: Tensor, expert_TK: Tensor) -> SampleMeans:
        """The means over each sample's tokens. Of one pass `valid_T` is the same in all layers, see `TokenFeatures`."""
        share_MT = self._share(valid_T, prob_TE.dtype)
        # As matrix products, whose order of sums a GPU does not change from run to run.
        chosen_TE = torch.zeros_like(prob_TE, requires_grad=False).scatter_(1, expert_TK, 1.0)
        return SampleMeans(share_MT @ prob_TE, share_MT @ chosen_TE, self.expected)

    def _share(self, valid_T: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[M, T]: 1 / (tokens of the sample) where the token is of the sample, else 0; computed once in a pass."""
        if dtype not in self._shares:
            number_T = self.number_N if valid_T is None else self.number_N[valid_T]
            of_sample_MT = (number_T == torch.arange(len(self.segment_ids) * self.most, device=number_T.device)[:, None]).to(dtype)
            self._shares[dtype] = of_sample_MT / of_sample_MT.sum(1, keepdim=True).clamp(min=1)
        return self._shares[dtype]

"""What the feed-forward of experts with weights of their own is made of, shared by the fast version and the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FfnShape:
    """A gated FFN, down(act(gate(x)) * up(x)), no biases, whose weights lie in one flat chunk: gate [F, D], up [F, D], down [D, F]."""

    hidden: int
    """D"""
    ffn: int
    """F"""
    activation: str

    @property
    def numel(self) -> int:
        return 3 * self.hidden * self.ffn

    def matrices(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a chunk: gate and up as one matrix [2F, D], down [D, F]."""
        gate_up, down = flat.split((2 * self.hidden * self.ffn, self.hidden * self.ffn))
        return gate_up.view(2 * self.ffn, self.hidden), down.view(self.hidden, self.ffn)

    def stacked_matrices(self, flat_SC: Tensor) -> tuple[Tensor, Tensor]:
        """As `matrices`, of a chunk per slot: [S, 2F, D] and [S, D, F]."""
        gate_up, down = flat_SC.split((2 * self.hidden * self.ffn, self.hidden * self.ffn), dim=1)
        return gate_up.unflatten(1, (2 * self.ffn, self.hidden)), down.unflatten(1, (self.hidden, self.ffn))

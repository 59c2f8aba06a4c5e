"""What all MoE layers of a model share during one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from hecate.parallel.units import Unit


@dataclass
class RouterStats:
    """One layer's routing of this rank's valid tokens in one micro-step."""

    prob_sum_E: Tensor
    """probabilities summed over tokens; differentiable"""
    count_KE: Tensor
    """int64: tokens whose k-th choice is expert e"""


@dataclass
class MicroStep:
    """The micro-step under way: which tokens are real, their numbers, and what the routers did.

    One object for the whole model; the trainer resets it before each forward pass, layers fill it.
    """

    valid: Tensor | None = None
    """int64 indices of the real tokens in the flattened [B·S]; None: all are"""
    token: Tensor | None = None
    """int64 [B·S]: global token numbers; None outside training"""
    step: int = 0
    """the optimizer step it belongs to"""
    recording: bool = False
    """keep router statistics; off outside training and while a checkpointed layer runs again"""
    stats: dict[Unit, RouterStats] = field(default_factory=dict)

    def start(self, valid: Tensor | None, token: Tensor | None, *, step: int, recording: bool) -> None:
        self.valid, self.token, self.step, self.recording = valid, token, step, recording
        self.stats = {}

    def clear(self) -> None:
        """No micro-step is under way: every token counts as real and nothing is kept."""
        self.start(None, None, step=0, recording=False)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """The forward pass of a checkpointed layer runs again: same routing, but nothing is counted twice."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

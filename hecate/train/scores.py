"""What an evaluation of one held-out source found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalScore:
    """One source, all ranks together."""

    loss: float
    """cross-entropy per label token"""
    accuracy: float | None
    """share of the answers that were exact, 0 to 1; None where nothing was generated"""
    samples: int

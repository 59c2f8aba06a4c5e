"""What a MixLoRA feed-forward is made of, shared by the fast version and the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FfnBase:
    """The frozen gated FFN that all experts of a layer share: down(act(gate(x)) * up(x)), no biases."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    activation: str


@dataclass(frozen=True)
class Lora:
    """The low-rank pairs of one projection, one per slot: delta_s = scale · B_s A_s."""

    a_SrI: Tensor
    """[slots, rank, inputs]"""
    b_SOr: Tensor
    """[slots, outputs, rank]"""
    scale: float


def dropout_stream(expert: int, projection: str) -> int:
    """The dropout stream of one expert's projection (see `Dropout.mask`)."""
    return expert * len(PROJECTIONS) + PROJECTIONS.index(projection)

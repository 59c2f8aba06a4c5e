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


def dropout_stream(expert: int | Tensor, projection: str) -> int | Tensor:
    """The dropout stream of an expert's projection (see `Dropout.rows`); gate and up have one dropped input."""
    return expert * 2 + int(projection == "down_proj")

"""What a MixLoRA feed-forward is made of, shared by the fast version and the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hecate.kernels.dropout import Dropout

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


def separate_gate_and_up(loras: dict[str, Lora]) -> dict[str, Lora]:
    """A pair of `gate_up_proj`, whose B has the rows of both, as a pair of each with one A; the others as they are."""
    if "gate_up_proj" not in loras:
        return loras
    both = loras["gate_up_proj"]
    gate, up = (Lora(both.a_SrI, b, both.scale) for b in both.b_SOr.chunk(2, dim=1))
    return {"gate_proj": gate, "up_proj": up, **{name: lora for name, lora in loras.items() if name != "gate_up_proj"}}


def dropout_stream(expert: int | Tensor, projection: str) -> int | Tensor:
    """The dropout stream of an expert's projection (see `Dropout.rows`); gate and up have one dropped input."""
    return expert * 2 + int(projection == "down_proj")


def dropout_rows(dropout: Dropout, order_P: Tensor, slot_TK: Tensor, token_T: Tensor | None, expert_S: Tensor | None) -> dict[str, Tensor]:
    """What the dropout of each (token, choice) pair is made from, for its two dropped inputs: `in` (gate's and up's) and `down`.

    Args:
        order_P: int64, indices into the flattened [tokens, k].
        token_T: int64 [tokens], global token numbers; needed.
        expert_S: int64 [slots], the experts in the slots; needed.
    """
    assert token_T is not None
    assert expert_S is not None
    token_P, expert_P = token_T[order_P // slot_TK.shape[1]], expert_S.to(slot_TK.device)[slot_TK.flatten()[order_P]]
    return {name: dropout.rows(token_P, dropout_stream(expert_P, of)) for name, of in (("in", "gate_proj"), ("down", "down_proj"))}

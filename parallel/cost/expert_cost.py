"""Compute the cost of an MoE layer from the parameters of one expert. The engine, `hecate plan` and the simulator all use this formula."""

from __future__ import annotations

from dataclasses import dataclass

from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.values.expert_kinds import ExpertKind, ExpertParameters

STATE_NUMBERS = 3
"""the numbers that an owner keeps for each trained parameter: the master itself, and the two moments of AdamW"""


@dataclass(frozen=True)
class NumberBytes:
    """The bytes of one number, by what it is."""

    trained: int
    """the bytes of a trained parameter as it is gathered"""
    gradient: int
    """the bytes of a gradient as it is reduced"""
    master: int
    """the bytes of a trained parameter, and of each of its two moments, on the expert's owner"""
    computed: int
    """the bytes of a frozen weight and of a hidden state"""


def number_bytes(kind: ExpertKind, *, master: int, computed: int) -> NumberBytes:
    """Return the bytes of numbers in a training of this kind of experts. Gradients have the owners' type, whatever replicas have.

    Args:
        master: of a parameter on its owner.
        computed: of a frozen weight and of a hidden state.
    """
    trained = min(master, computed) if kind.gathers_rounded else master
    return NumberBytes(trained=trained, gradient=master, master=master, computed=computed)


@dataclass(frozen=True)
class UnitPlace:
    """A unit among those of its decoder layer, and the widths of its rows."""

    inputs: int
    """numbers in a token's row on the way to its experts"""
    outputs: int
    """numbers in the row that returns"""
    units_per_layer: int = 1
    """the number of units of the decoder layer, which are gathered in one message"""
    at_beginning: bool = False
    """whether the layer needs its experts as soon as it begins, before anything has hidden their gather"""


def ffn_place(hidden: int) -> UnitPlace:
    """Of the one FFN of a decoder layer, after its attention."""
    return UnitPlace(hidden, hidden)


def expert_layer_cost(
    expert: ExpertParameters, *, place: UnitPlace, top_k: int, number: NumberBytes, non_moe_flops: float, on_every_rank: bool = False
) -> LayerCost:
    """Return the cost of a layer, as planners need it.

    The backward pass of a trained FFN takes twice as long as its forward pass (gradients of its inputs and of its weights), that of a
    frozen FFN as long, and that of pairs `ExpertParameters.pair_backward` times as long. The attention's projections are trained where
    experts are trained whole, and frozen otherwise.

    Args:
        on_every_rank: see `LayerCost.on_every_rank`.
        non_moe_flops: the forward FLOPs, on one rank, of the computation that can overlap with the transfers of a decoder layer's units.
    """
    flops = 2.0 * (expert.trained_ffn + expert.frozen_ffn) + expert.pair_flops
    backward = 2.0 * (2.0 * expert.trained_ffn) + 2.0 * expert.frozen_ffn + expert.pair_backward * expert.pair_flops
    return LayerCost(
        trainable_bytes=float(number.trained * expert.trained),
        chunk_numel=max(1, expert.trained),
        gradient_bytes=float(number.gradient * expert.trained),
        frozen_bytes=float(number.computed * expert.frozen_ffn),
        state_bytes=float(STATE_NUMBERS * number.master * expert.trained),
        top_k=top_k,
        row_bytes=float((place.inputs + place.outputs) / 2 * number.computed),  # as many rows return as go
        row_flops=2.0 * expert.shared_ffn,
        assignment_flops=flops,
        assignment_backward=backward / flops if flops else expert.pair_backward,
        non_moe_flops=non_moe_flops / place.units_per_layer,
        non_moe_backward=2.0 if expert.trained_ffn else 1.0,
        hidden_from=2 if place.at_beginning else 1,
        message_share=1.0 / place.units_per_layer,
        on_every_rank=on_every_rank,
    )

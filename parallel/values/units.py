"""A unit is a part of the model that has experts. Values per MoE layer, in the engine, checkpoints and metrics, have units as keys."""

from __future__ import annotations

from dataclasses import dataclass

FFN = "ffn"
"""the place of experts that replace a layer's feed-forward network"""


@dataclass(frozen=True, order=True)
class Unit:
    """A part of the model with its own router and experts. Its text is `LAYER` for a layer's FFN and `LAYER.PLACE` otherwise."""

    layer: int
    """the decoder layer, from 0"""
    place: str = FFN
    """the FFN, or the dotted name of a linear in the layer, such as `self_attn.q_proj`; of a pool see `pool_unit`"""

    def __str__(self) -> str:
        return str(self.layer) if self.place == FFN else f"{self.layer}.{self.place}"


def pool_unit(first: Unit) -> Unit:
    """Return the name of a pool that experts of several units share: LAYER.PLACE.pool, of the first of these units.

    No unit has this name, because nothing lies inside of an FFN that experts replace, or of a linear.
    """
    return Unit(first.layer, f"{first.place}.pool")


def parse_unit(text: str) -> Unit:
    """Return the unit with this text.

    Raises:
        ValueError: the text is not that of a unit.
    """
    layer, _, place = text.partition(".")
    unit = Unit(int(layer), place or FFN)
    if str(unit) != text:
        raise ValueError(f"{text!r} names no unit: LAYER or LAYER.PLACE is needed")
    return unit


def expert_name(unit: Unit, expert: int) -> str:
    """Return an expert's name in checkpoints: LAYER.EXPERT, or LAYER.PLACE.EXPERT."""
    return f"{unit}.{expert}"

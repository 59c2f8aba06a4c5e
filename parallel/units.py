"""Where a model's experts sit: the key of whatever is kept by layer, in the engine, in checkpoints, in traces and in metrics."""

from __future__ import annotations

from dataclasses import dataclass

FFN = "ffn"
"""the place of experts that stand for a layer's feed-forward network"""


@dataclass(frozen=True, order=True)
class Unit:
    """One place of a model that has a router and experts of its own. Its text is `LAYER`, or `LAYER.PLACE` elsewhere than in the FFN."""

    layer: int
    """the decoder layer, from 0"""
    place: str = FFN
    """the FFN, or the dotted name of a linear in the layer, such as `self_attn.q_proj`"""

    def __str__(self) -> str:
        return str(self.layer) if self.place == FFN else f"{self.layer}.{self.place}"


def parse_unit(text: str) -> Unit:
    """The unit whose text this is.

    Raises:
        ValueError: it is no unit's.
    """
    layer, _, place = text.partition(".")
    unit = Unit(int(layer), place or FFN)
    if str(unit) != text:
        raise ValueError(f"{text!r} names no unit: LAYER or LAYER.PLACE is needed")
    return unit


def expert_name(unit: Unit, expert: int) -> str:
    """An expert's name in checkpoints: LAYER.EXPERT, or LAYER.PLACE.EXPERT."""
    return f"{unit}.{expert}"

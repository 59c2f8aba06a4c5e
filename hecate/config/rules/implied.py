"""Values that others imply: with `adapter: lora` there are no experts, and adapters of several sources are as many as the sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hecate.config.problems import Add
from hecate.config.schema import LEAVES
from hecate.config.typed import INVALID

NO_EXPERTS = {"moe.unit": "linear", "moe.num_experts": 0, "moe.top_k": 1, "moe.router_aux_loss_coef": 0.0}
"""what the keys of `moe` are with `adapter: lora`, if not the defaults: each linear has an adapter, and no unit has experts"""
_OF_ALL_RANKS = ("fssdp.redundancy",)
"""keys of `fssdp` that mean something where all ranks hold the same: whether they go on when one is lost"""
_PAIRS = ("plain", "fixed_a")
"""values of `lora.pairs` whose A and B are the adapter's own; those of the others are made of what experts share"""


def with_implied(values: Mapping[str, Any], add: Add) -> dict[str, Any]:
    """Return the values with those that they imply. Keys that contradict these are reported."""
    if values.get("adapter") == "lora":
        return _plain_lora(values, add)
    by_source = values.get("moe.router.input") == "given" and values.get("moe.allocation") is None
    if by_source and isinstance(sources := values.get("data.train"), tuple):
        return {"moe.num_experts": len(sources), **values}
    return dict(values)


def _plain_lora(values: Mapping[str, Any], add: Add) -> dict[str, Any]:
    hint = "leave it out, or set adapter=mixture"
    for key, value in values.items():
        of_experts = key.startswith("moe.") or (key.startswith("fssdp.") and key not in _OF_ALL_RANKS)
        if of_experts and value is not INVALID and value != NO_EXPERTS.get(key, LEAVES[key].default):
            add(key, "is about experts, of which there are none with adapter=lora", hint)
    if values.get("lora.pairs", "plain") not in _PAIRS:
        add("lora.pairs", f"must be {' or '.join(_PAIRS)} with adapter=lora, got {values['lora.pairs']}", hint)
    if isinstance(values.get("lora.r"), tuple):
        add("lora.r", "must be one number with adapter=lora, which has no experts with ranks of their own", "give one")
    if values.get("trace"):
        add("trace", "records the loads of experts, of which there are none with adapter=lora", "leave it out")
    if values.get("model.front_end") == "megatron":
        add("adapter", "lora needs model.front_end=transformers: Megatron's front end trains all of a model from scratch", hint)
    return {**values, **NO_EXPERTS}

"""Check what the pair source shards goes together with."""

from collections.abc import Mapping
from typing import Any

from hecate.config.problems import Add
from hecate.config.schema import LEAVES

_PREFIX = "lora.shards."
_SHARDS = "lora.pairs=shards"


def check_shards(values: Mapping[str, Any], add: Add) -> None:
    """Add every problem of `lora.pairs: shards` and of its keys, given the typed values of all dotted keys.

    What depends on the model's sizes is checked in `hecate.forecast.pair_check`.
    """
    pairs = values.get("lora.pairs")
    if pairs != "shards":
        changed = [key for key, leaf in LEAVES.items() if key.startswith(_PREFIX) and key in values and values[key] != leaf.default]
        for key in changed if pairs is not None else ():
            add(key, f"is read with {_SHARDS} only, got {values[key]}", f"leave it out, or set {_SHARDS}")
        return
    private = values.get(_PREFIX + "private_rank", 0)
    for key in (_PREFIX + "equivalent_rank", "lora.r"):
        most = values.get(key, private)
        if isinstance(most, int) and private > most:  # a list of ranks has a problem already
            what = f"must be at most {key}, which is {most}, got {private}"
            add(_PREFIX + "private_rank", what, "an expert's private shards are a part of its share of the pool, and of its pairs")
    refused = (
        ("lora.gradient_rule", "none", "row_norm is about rows of A and B that train by themselves, but", "which several pairs share"),
        ("fssdp.rematerialize", False, "frees replicas after each layer, but", "which all layers share and which lives a whole step"),
        ("fssdp.plan", "history", "gathers in each micro-step, but", "which lives a whole step"),
    )
    for key, only, what, why in refused:
        if values.get(key, only) != only:
            add(key, f"{what} with {_SHARDS} pairs are parts of a pool, {why}", "leave it out, or use lora.pairs=plain")
    if values.get("lora.init_from") is not None:
        what = f"cannot be given with {_SHARDS}: A and B of an adapter do not say by which shards they were made"
        add("lora.init_from", what, "leave it out, or use lora.pairs=plain, which trains the adapter's own A and B on")
    if values.get("moe.router.input") == "given":
        what = "shards has one pool for all experts, but with moe.router.input=given each is an adapter that nothing else may influence"
        add("lora.pairs", what, "use lora.pairs=plain")

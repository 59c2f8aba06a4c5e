"""Check what goes together with routing that samples bring, the keys `moe.replay` and `fssdp.plan: replay`."""

from collections.abc import Mapping
from typing import Any

from hecate.config.files.paths import indexed_prefix
from hecate.config.problems import Add

_REFUSED: tuple[tuple[str, Any, str, str], ...] = (
    ("model.front_end", "megatron", "builds its layers and their batches itself", "use model.front_end=transformers"),
    ("moe.unit", "linear", "gives each linear a router of its own, but a sample brings one choice for each layer", "use moe.unit=ffn"),
    ("moe.router.input", "given", "lets the sample's source decide", "leave moe.router.input out"),
    ("moe.router.input", "user", "gives every token to all experts", "leave moe.router.input out"),
    ("moe.router.dense", True, "gives every token to all experts", "leave moe.router.dense out"),
)
"""key, value, why there is nothing to replay with it, and what to do"""


def check_replay(values: Mapping[str, Any], add: Add) -> None:
    """Add every problem of routing that samples bring, given the typed values of all dotted keys. Absent keys have a problem already."""
    planned, replay = values.get("fssdp.plan") == "replay", values.get("moe.replay")
    if replay is None and not planned:
        return
    key = "fssdp.plan" if planned else "moe.replay"
    chosen = f"{key}={'replay' if planned else replay}"
    for other, value, why, hint in _REFUSED:
        if values.get(other) == value:
            shown = "true" if value is True else value
            add(other, f"{shown} does not go together with {chosen}: it {why}", hint)
    for i, source in enumerate(values.get("data.train", ())):
        if indexed_prefix(source.path) is not None:
            what = f"is an indexed data set, whose documents bring no routing, but {chosen} needs that of each sample"
            add(f"data.train[{i}].path", what, 'use a JSONL file with a key "routed_experts" in each line')

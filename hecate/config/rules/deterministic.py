"""Check what goes together with `deterministic`."""

from collections.abc import Mapping
from typing import Any

from hecate.config.problems import Add
from hecate.config.schema import LEAVES

_REFUSED: tuple[tuple[str, str, str], ...] = (
    ("model.front_end", "builds layers whose gradients are summed by rank", "use model.front_end=transformers"),
    (
        "fssdp.plan",
        "has nothing to decide, because every rank has all experts",
        "leave it out; moe.replay=force replays a routing without it",
    ),
    ("fssdp.memory_slots", "says how many experts a rank may have, but every rank has all of them", "leave it out"),
)
"""key, why another value than the default does not go together with it, and what to do"""
_ALSO = {"fssdp.plan": ("history",)}
"""values that do, beside the default"""


def check_deterministic(values: Mapping[str, Any], add: Add) -> None:
    """Add every problem of `deterministic`, given the typed values of all dotted keys. Absent keys have a problem already."""
    _check_group(values, add)
    if not values.get("deterministic"):
        return
    for key, why, hint in _REFUSED:
        if key in values and values[key] not in (LEAVES[key].default, *_ALSO.get(key, ())):
            add(key, f"does not go together with deterministic: it {why}", hint)
    if values.get("kernels") == "triton":
        add("kernels", "triton does not go together with deterministic, which holds on CPUs only", "leave one of the two out")


def _check_group(values: Mapping[str, Any], add: Add) -> None:
    group, own = values.get("deterministic_group", 1), values.get("micro_batch_size")
    if group > 1 and values.get("deterministic") is False:
        add("deterministic_group", f"applies with deterministic only, got {group}", "set deterministic=true, or leave it out")
    elif group > 1 and own is not None and own % group:
        what = f"must divide micro_batch_size, which is {own}, so that each rank has whole groups, got {group}"
        add("deterministic_group", what, "use a common divisor of the micro_batch_size of all runs that are to end with the same bits")

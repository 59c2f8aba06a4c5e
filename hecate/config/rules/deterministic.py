"""Check what goes together with `deterministic`."""

from collections.abc import Mapping
from typing import Any

from hecate.config.problems import Add, serves

_REFUSED: tuple[tuple[str, Any, str, str], ...] = (
    ("model.front_end", "transformers", "builds layers whose gradients are summed by rank", "use model.front_end=transformers"),
    (
        "fssdp.plan",
        "history",
        "has nothing to decide, because every rank has all experts",
        "leave it out; moe.replay=force replays a routing without it",
    ),
    ("fssdp.memory_slots", None, "says how many experts a rank may have, but every rank has all of them", "leave it out"),
)
"""key, the value that goes together with it, why no other does, and what to do"""


def check_deterministic(values: Mapping[str, Any], add: Add) -> None:
    """Add every problem of `deterministic`, given the typed values of all dotted keys. Absent keys have a problem already."""
    _check_group(values, add)
    if not values.get("deterministic"):
        return
    for key, needed, why, hint in _REFUSED:
        if key in values and not serves(key, values[key], needed):
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

"""All drills by name, each with what is done, what is expected, and the function that does it. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Drill:
    """One drill."""

    name: str
    fault: str
    expected: str
    function: str
    """MODULE:FUNCTION, below hecate.drill"""
    quick: bool = True
    """whether it has a short form, of seconds"""


DRILLS: dict[str, Drill] = {
    drill.name: drill
    for drill in (
        Drill("R1", "any rank killed in any phase of a step", "the others go on, same result, 0 steps lost, noticed in 250 ms, back in 1 s", "hecate.drill.losses:kill_any_rank"),
    )
}

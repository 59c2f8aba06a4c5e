"""What a drill is given, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Scope:
    """What a drill is given."""

    folder: str
    """a folder of its own, empty"""
    workshop: str
    """the folder of the tiny run (`hecate.apps.check.drill.tiny_run`)"""
    quick: bool
    """a short form, for tests: fewer cases, and no times are judged"""
    start: tuple[str, ...]
    """the command that starts a process of `hecate.apps.check.drill.program`; arguments are appended to it"""

    @property
    def path(self) -> Path:
        return Path(self.folder)


class TooSlow(Exception):
    """A limit of the wall clock has passed, which a loaded machine may do as well as a defect; the text says which."""


@dataclass(frozen=True)
class DrillOutcome:
    """What became of a drill's cases."""

    seen: str
    """in a few words"""
    passed: int
    total: int
    counts: Mapping[str, float] = field(default_factory=dict)
    """details, such as times in ms; the same names in every run"""
    failures: tuple[str, ...] = ()
    """what went otherwise than expected, a line each"""
    too_slow: tuple[str, ...] = ()
    """what a limit of the wall clock leaves open, a line each"""

    @property
    def ok(self) -> bool:
        return self.total > 0 and self.passed == self.total

    @property
    def undecided(self) -> bool:
        """Whether nothing went otherwise than expected, and a limit of the wall clock leaves something open."""
        return not self.ok and not self.failures and bool(self.too_slow)


@dataclass(frozen=True)
class DrillCase:
    """One fault of a drill, and whether what followed was expected."""

    name: str
    problem: str = ""
    """empty: all was as expected"""
    too_slow: str = ""
    """which limit of the wall clock has passed, where all else was as expected; empty: none"""

    def __post_init__(self) -> None:
        _MADE.append(self)


_MADE: list[DrillCase] = []
"""all cases of this process, which does one drill: what is known of a drill that ends before it has summed them up"""


def outcome_of(cases: Sequence[DrillCase], seen: str, counts: Mapping[str, float] | None = None) -> DrillOutcome:
    """Sum cases up.

    Args:
        seen: what was seen if all went as expected.
    """
    failures = tuple(f"{one.name}: {one.problem}" for one in cases if one.problem)
    too_slow = tuple(f"{one.name}: {one.too_slow}" for one in cases if one.too_slow and not one.problem)
    if failures:
        seen = f"{len(failures)} of {len(cases)} went otherwise"
    elif too_slow:
        seen = f"not decided: the machine was too slow for {len(too_slow)} of {len(cases)}; all others went as expected"
    return DrillOutcome(seen, len(cases) - len(failures) - len(too_slow), len(cases), dict(counts or {}), failures, too_slow)


def outcome_so_far(why: str) -> DrillOutcome:
    """The outcome of this process's drill, which a limit of the wall clock has ended in the midst of a case.

    Args:
        why: which limit.
    """
    return outcome_of([*_MADE, DrillCase("the case under way", too_slow=why)], "")


def worst(values: Sequence[float]) -> float:
    return max(values, default=0.0)

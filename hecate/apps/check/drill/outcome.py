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

    @property
    def ok(self) -> bool:
        return self.total > 0 and self.passed == self.total


@dataclass(frozen=True)
class DrillCase:
    """One fault of a drill, and whether what followed was expected."""

    name: str
    problem: str = ""
    """empty: all was as expected"""


def outcome_of(cases: Sequence[DrillCase], seen: str, counts: Mapping[str, float] | None = None) -> DrillOutcome:
    """Sum cases up.

    Args:
        seen: what was seen if all went as expected.
    """
    failures = tuple(f"{one.name}: {one.problem}" for one in cases if one.problem)
    seen = f"{len(failures)} of {len(cases)} went otherwise" if failures else seen
    return DrillOutcome(seen, len(cases) - len(failures), len(cases), dict(counts or {}), failures)


def worst(values: Sequence[float]) -> float:
    return max(values, default=0.0)

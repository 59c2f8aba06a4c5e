"""Many runs of one configuration with other values, as values: what `hecate sweep` reads from a file, and a federated round plans."""

from __future__ import annotations

import json
from dataclasses import dataclass

STATE_FOLDER = "sweep"
"""the folder below output_dir that is no run's"""


@dataclass(frozen=True)
class SweepValue:
    """A value of a configuration's key, as the command line has it."""

    key: str
    text: str
    line: int | None
    """the line of the sweep file; None: the value is from the command line"""

    @property
    def override(self) -> str:
        return f"{self.key}={self.text}"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    title: str | None
    """the name that the file gives the run, which runs that differ in their seeds share; None: it gives none"""
    values: tuple[SweepValue, ...]
    """the values that set the run apart from others, the seed left out"""
    seed: int | None
    """the run's seed; None: the sweep has no seeds"""
    fixed: tuple[SweepValue, ...]
    """the values that all runs have"""
    folder: str

    @property
    def overrides(self) -> list[str]:
        """The arguments with which `hecate train` trains it."""
        seed = [] if self.seed is None else [f"seed={self.seed}"]
        return [
            *(value.override for value in (*self.fixed, *self.values)),
            *seed,
            f"output_dir={json.dumps(self.folder, ensure_ascii=False)}",
        ]

    def line_of(self, key: str) -> int | None:
        """The line of the sweep file that gives a key, or the section that holds it."""
        lines = [
            value.line for value in (*self.fixed, *self.values) if key == value.key or key.startswith((value.key + ".", value.key + "["))
        ]
        return lines[-1] if lines else None  # of the value that holds, as on a command line


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says."""

    file: str
    run: str
    """the configuration of all runs: a path or a preset's name"""
    output_dir: str
    jobs: int
    """the most runs at once"""
    runs: tuple[SweepRun, ...]

    @property
    def named(self) -> bool:
        """Whether the file gives names to runs."""
        return any(run.title is not None for run in self.runs)

    @property
    def keys(self) -> list[str]:
        """The dotted keys whose values differ, in the file's order; the seed is not among them."""
        return list(dict.fromkeys(value.key for run in self.runs for value in run.values))

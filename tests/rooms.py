"""The checkout's source files, and the order of its packages in which imports point."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sources(*folders: str) -> list[Path]:
    """The Python files of the real folders, each once: links are not followed."""
    found: list[Path] = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parents = [ROOT / Path(*path.relative_to(ROOT).parts[: i + 1]) for i in range(len(path.relative_to(ROOT).parts))]
            if not any(parent.is_symlink() for parent in parents):
                found.append(path)
    return found


ALL_SOURCES = sources("hecate", "parallel", "kernels", "launch", "benchmarks")


ROOMS = (
    "hecate.errors",
    "hecate.faults",
    "hecate.io",
    "hecate.parallel",
    "hecate.parallel.comm",
    "hecate.kernels",
    "hecate.ranks",
    "hecate.config",
    "hecate.data",
    "hecate.experts",
    "hecate.engine",
    "hecate.model",
    "hecate.megatron",
    "hecate.optim",
    "hecate.checkpoint",
    "hecate.adapters",
    "hecate.report",
    "hecate.forecast",
    "hecate.elastic",
    "hecate.train",
    "hecate.profile",
    "hecate.doctor",
    "hecate.sweep",
    "hecate.launch",
    "hecate.federate",
    "hecate.drill",
    "hecate.cli",
    "hecate.__main__",
)
"""All rooms, bottom up: a module imports its own room and those before it, nothing after it. The package itself, `hecate`, is below all."""

"""The checkout's source files, the order of its packages in which imports point, and who imports whom."""

from __future__ import annotations

import ast
from functools import cache
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
    "hecate.parallel.loops",
    "hecate.parallel.values",
    "hecate.parallel.cluster",
    "hecate.parallel.cost",
    "hecate.parallel.transfer",
    "hecate.parallel.planners",
    "hecate.parallel.plan",
    "hecate.parallel.simulate",
    "hecate.parallel.comm",
    "hecate.kernels",
    "hecate.ranks",
    "hecate.config",
    "hecate.data",
    "hecate.experts",
    "hecate.engine",
    "hecate.model",
    "hecate.optim",
    "hecate.checkpoint",
    "hecate.adapters",
    "hecate.report",
    "hecate.elastic",
    "hecate.train",
    "hecate.api",
    "hecate.launch",
    "hecate.apps.megatron",
    "hecate.apps.answers",
    "hecate.apps.foresee",
    "hecate.apps.sweep",
    "hecate.apps.federate",
    "hecate.apps.check",
    "hecate.apps.convert",
    "hecate.cli",
    "hecate.__main__",
)
"""All rooms, bottom up: a module imports its own room and those before it, nothing after it. The package itself, `hecate`, is below all."""


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in sources("hecate", "parallel", "kernels", "launch"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "hecate" else ("hecate", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of_modules() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere in its file, lazy and typing-only imports included."""
    paths = modules()
    graph = {}
    for name, path in paths.items():
        names = {alias.name for node in nodes(path) if isinstance(node, ast.Import) for alias in node.names}
        for node in (node for node in nodes(path) if isinstance(node, ast.ImportFrom)):
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {module if module in paths else str(node.module) for module in inner.values()}
        graph[name] = {other for other in names if other in paths and other != name}
    return graph

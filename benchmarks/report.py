"""Print and write the result of a benchmark: {"name", "commit", "machine", "rows", "summary"}.

A ratio of the summary has its interval and a verdict beside it (`benchmarks.ratios`).

A long benchmark writes each row as soon as it is there (`recorded`), and goes on with `--resume` where a call before has ended."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.ratios import Ratio


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="take few samples, only to see that it works")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


def resumable(description: str) -> argparse.ArgumentParser:
    parser = arguments(description)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file of --json has, and make those that it lacks")
    return parser


def kept_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows to begin with.

    Raises:
        SystemExit: `--resume` without a file.
    """
    if options.resume and options.json is None:
        raise SystemExit("--resume needs the file whose rows are kept: --json FILE")
    if not options.resume or not options.json.exists():
        return []
    return list(json.loads(options.json.read_text(encoding="utf-8"))["rows"])


def recorded(
    name: str, rows: list[dict[str, Any]], case: Mapping[str, Any], make: Callable[[], Sequence[Mapping[str, Any]]], json_file: Path | None
) -> list[dict[str, Any]]:
    """The rows of a case: those of `rows`, if there are any, or else new ones, which are added to `rows` and to the file.

    Args:
        case: what rows of the case have in common, and no others.
        make: a function that makes them, without what `case` says.
    """
    found = [row for row in rows if case.items() <= {key: row.get(key) for key in case}.items()]
    if not found:
        found = [{**case, **row} for row in make()]
        rows += found
        if json_file:
            _write(name, rows, {}, json_file)
    return found


def machine() -> dict[str, Any]:
    import torch

    packages = ("torch", "numpy", "transformers")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def finish(name: str, rows: Sequence[dict[str, Any]], summary: Mapping[str, float | Ratio], json_file: Path | None) -> None:
    """Print rows (lists left out) and summary as a table; write everything to `json_file`."""
    columns = [key for key in rows[0] if not isinstance(rows[0][key], list)]
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for key, value in summary.items():
        print(f"{key} = {value if isinstance(value, Ratio) else format(value, '.3g')}")
    if json_file:
        _write(name, rows, numbers(summary), json_file)


def numbers(summary: Mapping[str, float | Ratio]) -> dict[str, float]:
    """What a file keeps of a summary: a ratio becomes its value, the ends of its interval, the verdict, and whether it is narrow."""
    found: dict[str, float] = {}
    for key, value in summary.items():
        found |= value.numbers(key) if isinstance(value, Ratio) else {key: value}
    return found


def _write(name: str, rows: Sequence[dict[str, Any]], summary: dict[str, float], json_file: Path) -> None:
    result = {"name": name, "commit": commit(), "machine": machine(), "rows": list(rows), "summary": summary}
    part = json_file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1), encoding="utf-8")
    part.replace(json_file)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    """The commit of the program that runs, as git describes it; "unknown" outside a clone."""
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()

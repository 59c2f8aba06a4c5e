"""Print and write the result of a benchmark: {"name", "commit", "machine", "rows", "summary"}."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="take few samples, only to see that it works")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


def machine() -> dict[str, Any]:
    import torch

    packages = ("torch", "numpy", "transformers")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def finish(name: str, rows: Sequence[dict[str, Any]], summary: dict[str, float], json_file: Path | None) -> None:
    """Print rows (lists left out) and summary as a table; write everything to `json_file`."""
    columns = [key for key in rows[0] if not isinstance(rows[0][key], list)]
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for key, value in summary.items():
        print(f"{key} = {value:.3g}")
    if json_file:
        result = {"name": name, "commit": _commit(), "machine": machine(), "rows": list(rows), "summary": summary}
        json_file.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str:
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()

"""Print and write the result of a benchmark: {"name", "commit", "machine", "rows", "summary"}.

A ratio of the summary has its interval and a verdict beside it (`benchmarks.ratios`).

A long benchmark writes each row as soon as it is there (`recorded`), and goes on with `--resume` where a call before has ended. Such rows
are in a file of their own beside the result, which git ignores (`raw_file`): a recording may hold less, a summary of many samples
(`spread`)."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.ratios import Ratio


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="take few samples, only to see that it works")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


def resumable(description: str) -> argparse.ArgumentParser:
    parser = arguments(description)
    parser.add_argument("--resume", action="store_true", help="keep the rows that an earlier call with the same --json has made")
    return parser


def kept_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows to begin with, which an earlier call has left in `raw_file`.

    Raises:
        SystemExit: `--resume` without a file.
    """
    if options.resume and options.json is None:
        raise SystemExit("--resume needs the file whose rows are kept: --json FILE")
    if not options.resume or not raw_file(options.json).exists():
        return []
    return list(json.loads(raw_file(options.json).read_text(encoding="utf-8")))


def raw_file(json_file: Path) -> Path:
    """Where a benchmark that can be resumed keeps its rows as they came, beside its recording; git ignores it."""
    return json_file.with_suffix(".rows.json")


def recorded(
    rows: list[dict[str, Any]], case: Mapping[str, Any], make: Callable[[], Sequence[Mapping[str, Any]]], json_file: Path | None
) -> list[dict[str, Any]]:
    """The rows of a case: those of `rows`, if there are any, or else new ones, which are added to `rows` and to the recording's `raw_file`.

    Args:
        case: what rows of the case have in common, and no others.
        make: a function that makes them, without what `case` says.
    """
    found = [row for row in rows if case.items() <= {key: row.get(key) for key in case}.items()]
    if not found:
        found = [{**case, **row} for row in make()]
        rows += found
        if json_file:
            replace_file(raw_file(json_file), json.dumps(rows))
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


def finish(
    name: str,
    rows: Sequence[dict[str, Any]],
    summary: Mapping[str, float | Ratio],
    json_file: Path | None,
    *,
    kept: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Print rows (lists left out) and summary as a table; write everything to `json_file`, or `kept` in place of the rows."""
    columns = [key for key in rows[0] if not isinstance(rows[0][key], list)]
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for key, value in summary.items():
        print(f"{key} = {value if isinstance(value, Ratio) else format(value, '.3g')}")
    if json_file:
        result = {"name": name, "commit": commit(), "machine": machine(), "rows": list(rows if kept is None else kept)}
        replace_file(json_file, as_json(result | {"summary": numbers(summary)}))


def numbers(summary: Mapping[str, float | Ratio]) -> dict[str, float]:
    """What a file keeps of a summary: a ratio becomes its value, the ends of its interval, the verdict, and whether it is narrow."""
    found: dict[str, float] = {}
    for key, value in summary.items():
        found |= value.numbers(key) if isinstance(value, Ratio) else {key: value}
    return found


def spread(values: Iterable[float]) -> list[float]:
    """How many of these are finite, and the least, the geometric mean and the largest of them; [0] if there is none."""
    found = [value for value in values if math.isfinite(value)]
    return [len(found), min(found), math.exp(fmean(map(math.log, found))), max(found)] if found else [0]


def as_json(result: Mapping[str, Any]) -> str:
    """A recording as text: each of its lists and mappings with one element a line, and fractions with five digits."""
    lines = []
    for key, value in _rounded(result).items():
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        elif isinstance(value, dict) and value:
            text = "{\n  " + ",\n  ".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()) + "\n }"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def replace_file(path: Path, text: str) -> None:
    """Write a file at once: whoever reads it meanwhile has the one before."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


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

"""Print the rows of a simulation as tables, and write them as JSON. `hecate.forecast.bars` draws them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hecate.errors import UserError
from hecate.forecast.cases import BASELINE

Row = dict[str, Any]

SPEEDUP = f"speedup_over_{BASELINE}"
_WIDTH = 160
"""the width in characters of a table that is not printed to a terminal"""


def print_rows(rows: Sequence[Row]) -> None:
    """Print the rows of a simulation.

    One case is printed as a table of its policies in detail; several workloads as a table of speed-ups with a line per workload; several
    models or clusters as a table with a line for each, the mean over their workloads.
    """
    console = Console(width=None if Console().is_terminal else _WIDTH, highlight=False)
    cases = grouped(rows, ("topology", "model", "experts", "tokens_per_rank", "workload"))
    if len(cases) == 1:
        console.print(_detail(rows))
        return
    pairs = grouped(rows, ("topology", "model", "experts", "tokens_per_rank"))
    if len(pairs) == 1:
        console.print(_speedups(rows, ("workload",), f"Speed-up over {BASELINE}\n{_title(rows[0])}"))
    else:
        workloads = len(grouped(rows, ("workload",)))
        title = f"Speed-up over {BASELINE}, geometric mean over {workloads} workload{'s' * (workloads > 1)}"
        console.print(_speedups(rows, ("topology", "model", "experts"), title))


def write_json(path: Path, settings: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write `{"settings", "rows"}` to a JSON file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _detail(rows: Sequence[Row]) -> Table:
    table = Table(title=f"{_title(rows[0])}, {rows[0]['workload']}: one step")
    table.add_column("policy")
    numbers = ("ms", "speed-up", "attention", "experts", "tokens", "exposed", "optim.", "gather", "reduce")
    for name in (*numbers, "max/mean", "port MB", "uplink MB", "memory GB", "plan ms/layer"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = row["seconds"]
        parts = ("attention", "compute", "dispatch", "exposed", "optimizer", "gather", "reduce")
        table.add_row(
            row["policy"] + _mark([row]),
            f"{1e3 * row['step_seconds']:.1f}",
            _times(row[SPEEDUP]),
            *(f"{1e3 * (seconds[part] + (seconds['reshard'] if part == 'optimizer' else 0)):.1f}" for part in parts),
            f"{row['imbalance']:.2f}",
            f"{row['bytes']['busiest_port'] / 1e6:.1f}",
            f"{row['bytes']['busiest_uplink'] / 1e6:.1f}",
            f"{row['memory_bytes'] / 1e9:.1f}",
            f"{row['planner_ms_per_layer']:.2f}",
        )
    table.caption = _TOO_LARGE * bool(_mark(rows)) + (
        "port, uplink: through the busiest one; memory: on the fullest rank, without activations; exposed: gather and reduce, not hidden"
    )
    return table


def _speedups(rows: Sequence[Row], keys: tuple[str, ...], title: str) -> Table:
    """Return a table with a line for each value of `keys`, a column for each policy, and the geometric mean of all lines."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    relative = rows[0][SPEEDUP] is not None
    table = Table(title=title if relative else title.replace(f"Speed-up over {BASELINE}", "Milliseconds a step"))
    for key in keys:
        table.add_column(key)
    for policy in policies:
        table.add_column(policy, justify="right")

    def cells(group: Sequence[Row]) -> list[str]:
        means = [_geomean([_value(row, relative) for row in group if row["policy"] == policy]) for policy in policies]
        marks = [_mark([row for row in group if row["policy"] == policy]) for policy in policies]
        return [(_times(mean) if relative else f"{mean:.1f}") + mark for mean, mark in zip(means, marks, strict=True)]

    groups = grouped(rows, keys)
    for group in groups:
        table.add_row(*(str(group[0][key]) for key in keys), *cells(group), end_section=group is groups[-1])
    table.add_row("geo-mean", *[""] * (len(keys) - 1), *cells(rows))
    table.caption = _TOO_LARGE if _mark(rows) else None
    return table


_TOO_LARGE = "*: does not fit the devices' memory\n"


def _mark(rows: Sequence[Row]) -> str:
    return "*" if any(not row["fits_memory"] for row in rows) else ""


def _value(row: Row, relative: bool) -> float:
    return float(row[SPEEDUP] if relative else 1e3 * row["step_seconds"])


def grouped(rows: Sequence[Row], keys: tuple[str, ...]) -> list[list[Row]]:
    """Group the rows with the same values of `keys`, in the order of their first occurrence."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def _title(row: Row) -> str:
    return f"{row['model']} with {row['experts']} experts on {row['topology']} ({row['ranks']} ranks of {row['tokens_per_rank']} tokens)"


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"

"""The table of a sweep: as text, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hecate.apps.sweep.names import column_names
from hecate.apps.sweep.results import FIGURES, Figure, SweepResult, SweepRow
from hecate.report.progress import duration_text

_HEADERS = {
    "training_loss": "training loss",
    "held_out_loss": "held-out loss",
    "accuracy": "exact",
    "tokens_per_s": "tokens/s",
    "seconds": "time",
}
_DIGITS = {"training_loss": 4, "held_out_loss": 4, "accuracy": 3, "tokens_per_s": 0}


def table_text(rows: Sequence[SweepRow], keys: Sequence[str], *, named: bool, plus_minus: str = "±") -> str:
    """Return the table, without a line break at its end. A figure that no run has stands as "-", and a column that no run has is left out.

    Args:
        keys: the dotted keys whose values differ.
        named: whether the runs have names that the user has given.
        plus_minus: what stands before a spread.
    """
    columns = column_names(keys)
    first = ["run"] * named
    figures = [name for name in FIGURES if any(row.figures[name] for row in rows)]
    headers = [*first, *columns.values(), *(_HEADERS[name] for name in figures), "state"]
    lines = [headers]
    for row in rows:
        cells = [row.values.get(key, "-") for key in keys]
        lines.append([*[row.name] * named, *cells, *(_cell(name, row.figures[name], plus_minus) for name in figures), row.state])
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    numbers = range(len(first) + len(keys), len(headers) - 1)
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if column in numbers else f"{cell:<{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def table_json(rows: Sequence[SweepRow], results: Sequence[SweepResult], file: str) -> dict[str, Any]:
    """Return the rows of the table and all runs as JSON values."""
    return {
        "sweep": file,
        "rows": [
            {
                "values": dict(row.values),
                "runs": [run.name for run in row.runs],
                "figures": {name: None if figure is None else asdict(figure) for name, figure in row.figures.items()},
            }
            for row in rows
        ],
        "runs": [
            {
                "name": run.name,
                "values": dict(run.values),
                "seed": run.seed,
                "state": run.state,
                "reason": run.reason,
                "step": run.step,
                "max_steps": run.max_steps,
                **run.figures,
                "sources": dict(run.sources),
            }
            for run in results
        ],
    }


def _cell(name: str, figure: Figure | None, plus_minus: str) -> str:
    if figure is None:
        return "-"
    if name == "seconds":
        return duration_text(figure.mean) if figure.mean >= 10 else f"{figure.mean:.1f}s"
    digits = _DIGITS[name]
    spread = "" if figure.spread is None else f" {plus_minus} {figure.spread:.{digits}f}"
    return f"{figure.mean:.{digits}f}{spread}"

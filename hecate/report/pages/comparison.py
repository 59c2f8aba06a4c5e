"""Several runs on one page: their curves over one another, their last figures, and in which keys their configurations differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hecate.report.pages.page import document
from hecate.report.pages.page_parts import NOT_RECORDED, figure, not_recorded, section, table
from hecate.report.pages.svg import COLOURS, Line, line_chart, number_text
from hecate.report.run_records import RunRecords

MOST_RUNS = COLOURS
"""how many runs a page compares: each has a colour of its own"""
_CURVES = {"loss": "training loss", "tokens_per_s": "tokens/s", "imbalance": "imbalance", "grad_norm": "norm of the gradients"}
_OWN = ("output_dir",)
"""keys in which every two runs differ"""


def comparison_page(runs: Mapping[str, RunRecords]) -> str:
    """Return a page about runs by the names that they are called by, at most `MOST_RUNS`."""
    configs = {name: _flat(run.config) for name, run in runs.items()}
    keys = sorted({key for config in configs.values() for key in config} - set(_OWN))
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs.values()}) > 1]
    curves = [_curves(title, {name: (run.step_S, run.column(key)) for name, run in runs.items()}) for key, title in _CURVES.items()]
    for source in dict.fromkeys(source for run in runs.values() for record in run.evals for source in record["sources"]):
        curves.append(_curves(f"held-out loss of {source}", {name: _held_out(run, source) for name, run in runs.items()}))
    rows = [[key, *(str(config.get(key, "-")) for config in configs.values())] for key in differing]
    body = (
        f"<header><h1>{len(runs)} runs</h1>{table(['run', 'records', *_CURVES.values()], [_last(*one) for one in runs.items()])}</header>",
        section("Curves", *curves),
        section("Configurations", table(["key", *runs], rows) if rows else "<p>The configurations differ in no key.</p>"),
    )
    return document(f"comparison of {len(runs)} runs", "".join(body))


def _curves(title: str, values: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> str:
    lines = [Line(name, step_N, np.full(len(step_N), np.nan) if value_N is None else value_N) for name, (step_N, value_N) in values.items()]
    lines = [line if len(line.x_N) else Line(line.name, np.zeros(1), np.full(1, np.nan)) for line in lines]  # names keep their colours
    if not any(np.isfinite(line.y_N).any() for line in lines):
        return not_recorded(title)
    return figure(title, line_chart(lines, f"{title} of each run by step"), "", [line.name for line in lines])


def _held_out(run: RunRecords, source: str) -> tuple[np.ndarray, np.ndarray | None]:
    losses = [(record["step"], record["sources"].get(source, {}).get("loss")) for record in run.evals]
    return np.array([step for step, _ in losses]), np.array([np.nan if loss is None else float(loss) for _, loss in losses])


def _last(name: str, run: RunRecords) -> Sequence[str]:
    columns = [run.column(key) for key in _CURVES]
    return [
        name,
        str(len(run.step_S)),
        *(NOT_RECORDED if one is None else number_text(float(one[np.isfinite(one)][-1])) for one in columns),
    ]


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return flat

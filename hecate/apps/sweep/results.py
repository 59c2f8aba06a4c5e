"""What a run of a sweep has come to, by what it has recorded, and runs that differ in their seeds alone together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from hecate.io.strict_yaml import YamlError, parse_yaml
from hecate.launch.many_runs.ledger import RunState, SweepEntry
from hecate.launch.many_runs.sweep import SweepRun
from hecate.report.run_records import RunRecords, read_run

FIGURES = ("training_loss", "held_out_loss", "accuracy", "tokens_per_s", "seconds")


@dataclass(frozen=True)
class SweepResult:
    """What one run has come to. A figure that it has not is None."""

    name: str
    title: str | None
    """the name that the sweep file gives it, if any"""
    values: Mapping[str, str]
    """what sets it apart, as text, by dotted keys"""
    seed: int | None
    state: str
    """not begun, running, interrupted, stopped, failed or finished"""
    reason: str
    """why it failed"""
    step: int
    """the last one recorded"""
    max_steps: int | None
    """None: the run has not begun, or its length is given in epochs"""
    figures: Mapping[str, float | None]
    """of FIGURES"""
    sources: Mapping[str, Any]
    """the last evaluation, by source, as metrics.jsonl has it"""

    @property
    def finished(self) -> bool:
        return self.state == RunState.FINISHED.value

    @property
    def standing(self) -> str:
        """The state with how far the run has come."""
        if self.state not in ("running", "interrupted", "stopped", "failed"):
            return self.state
        return f"{self.state} at {self.step}" + (f"/{self.max_steps}" if self.max_steps else "")


@dataclass(frozen=True)
class Figure:
    """A figure of runs that differ in their seeds alone."""

    mean: float
    spread: float | None
    """the standard deviation of a sample; None: of one run"""
    runs: int


@dataclass(frozen=True)
class SweepRow:
    """Runs that differ in their seeds alone, as one row of the table."""

    values: Mapping[str, str]
    name: str
    """the runs' title, or else the name of the first"""
    runs: tuple[SweepResult, ...]
    figures: Mapping[str, Figure | None]
    """over the finished runs; if there are none, over all that have the figure"""

    @property
    def state(self) -> str:
        if len(self.runs) == 1:
            return self.runs[0].standing
        counts: dict[str, int] = {}
        for run in self.runs:
            counts[run.state] = counts.get(run.state, 0) + 1
        return ", ".join(f"{count} {state}" for state, count in counts.items()) if len(counts) > 1 else f"all {next(iter(counts))}"


def read_result(run: SweepRun, entry: SweepEntry | None, *, working: bool) -> SweepResult:
    """Read what a run has come to.

    Args:
        entry: what the sweep knows of it; None: it was not begun.
        working: whether a sweep is at work, so that a run that was begun is running.

    Raises:
        UserError: its metrics.jsonl is damaged.
    """
    values = {value.key: value.text for value in run.values}
    if entry is None:
        return SweepResult(run.name, run.title, values, run.seed, "not begun", "", 0, None, dict.fromkeys(FIGURES), {})
    folder = Path(run.folder)
    records = read_run(folder) if (folder / "metrics.jsonl").is_file() else None
    steps = [] if records is None else records.step_S.tolist()
    evals = [] if records is None else [one for one in records.evals if one["step"] > 0]
    sources = evals[-1]["sources"] if evals else {}
    figures = ({} if records is None else _of_steps(records)) | _of_evaluation(sources) | {"seconds": entry.seconds or None}
    state = entry.state.value
    if entry.state is RunState.STARTED:
        state = "running" if working else "interrupted"
    max_steps = _max_steps(entry.config)
    whole = dict.fromkeys(FIGURES) | figures
    return SweepResult(run.name, run.title, values, run.seed, state, entry.reason, max(steps, default=0), max_steps, whole, sources)


def _max_steps(config: str) -> int | None:
    """Of a run's configuration as YAML; None: it does not say, or is damaged."""
    with suppress(YamlError):
        found = parse_yaml(config)
        steps = found.get("max_steps") if isinstance(found, Mapping) else None
        return steps if type(steps) is int and steps > 0 else None
    return None


def rows_of(results: Sequence[SweepResult]) -> list[SweepRow]:
    """Put runs together that differ in their seeds alone, the least held-out loss first; rows without a finished run come last.

    Rows that have neither loss stay in the order of `results`.
    """
    groups: dict[str, list[SweepResult]] = {}
    for result in results:
        groups.setdefault(result.title or str(result.values), []).append(result)
    return sorted(map(_row, groups.values()), key=_order)


def _row(runs: list[SweepResult]) -> SweepRow:
    counted = [run for run in runs if run.finished] or runs
    title = runs[0].title or runs[0].name
    return SweepRow(runs[0].values, title, tuple(runs), {name: _figure([run.figures[name] for run in counted]) for name in FIGURES})


def _figure(values: Sequence[float | None]) -> Figure | None:
    known = [value for value in values if value is not None]
    return Figure(mean(known), stdev(known) if len(known) > 1 else None, len(known)) if known else None


def _order(row: SweepRow) -> tuple[bool, float, float]:
    losses = [math.inf if (figure := row.figures[name]) is None else figure.mean for name in ("held_out_loss", "training_loss")]
    return not any(run.finished for run in row.runs), losses[0], losses[1]


def _of_steps(records: RunRecords) -> dict[str, float | None]:
    losses, tokens, seconds = (records.column(name) for name in ("loss", "tokens", "step_seconds"))
    loss = None if losses is None or not np.isfinite(losses[-1]) else float(losses[-1])
    speed = None
    if tokens is not None and seconds is not None and np.nansum(seconds) > 0:
        speed = float(np.nansum(tokens) / np.nansum(seconds))
    return {"training_loss": loss, "tokens_per_s": speed}


def _of_evaluation(sources: Mapping[str, Any]) -> dict[str, float | None]:
    """The means over the sources, each of which counts alike; None if one lacks the figure."""
    found: dict[str, float | None] = {}
    for figure, name in (("held_out_loss", "loss"), ("accuracy", "accuracy")):
        values = [source.get(name) for source in sources.values()]
        found[figure] = mean(values) if values and None not in values else None
    return found

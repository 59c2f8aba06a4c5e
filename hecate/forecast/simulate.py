"""Run the cases of `hecate simulate`, print their results and write them to files."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hecate.config.presets import find_preset
from hecate.errors import UserError
from hecate.forecast.bars import write_bars
from hecate.forecast.cases import Case, Options, chosen, chosen_policies, synthetic_cases, trace_case
from hecate.forecast.report import print_rows, write_json
from hecate.forecast.sweep import load_sweep
from hecate.parallel.cost_model import ExecutionMode
from hecate.parallel.workloads import WORKLOADS


def run_simulation(
    *,
    topology: str | None,
    model: str | None,
    workload: str,
    trace: Path | None,
    tokens: int,
    policy: str,
    steps: int,
    seed: int,
    execution: ExecutionMode,
    max_imbalance: float | None,
    wide: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Simulate one model on one cluster, under synthetic workloads or a trace. Names are those of presets, or paths of files.

    Raises:
        UserError: a name, a file or a number is wrong.
    """
    if topology is None or model is None:
        what = " and ".join(name for name, value in (("--topology", topology), ("--model", model)) if value is None)
        raise UserError(
            f"simulate needs {what}, or --sweep FILE\n  presets: see configs/topologies and configs/models; any other name lists them"
        )
    options = Options(
        policies=chosen_policies(policy, "--policy"),
        steps=steps,
        seed=seed,
        execution=execution,
        max_imbalance=max_imbalance,
    )
    cases = (
        synthetic_cases(topology, model, chosen(workload, tuple(WORKLOADS), "--workload"), tokens)
        if trace is None
        else [trace_case(topology, model, trace)]
    )
    _run(cases, options, wide, json_path, plot_path)


def run_sweep(sweep: str, wide: bool, json_path: Path | None, plot_path: Path | None) -> None:
    """Simulate all cases of a sweep, given as a preset's name or a file.

    Raises:
        UserError: the file, or a name in it, is wrong.
    """
    cases, options = load_sweep(find_preset("experiments", "sweep", sweep))
    _run(cases, options, wide, json_path, plot_path)


def _show(*texts: str) -> None:
    """Replace the last line of the terminal."""
    print(f"\r\033[K{''.join(texts)}", end="", file=sys.stderr, flush=True)


def _run(cases: list[Case], options: Options, wide: bool, json_path: Path | None, plot_path: Path | None) -> None:
    rows: list[dict[str, Any]] = []
    live = sys.stderr.isatty()
    for number, case in enumerate(cases, start=1):
        what = f"{number}/{len(cases)} {case.model.name} on {case.topology_name}, {case.workload}"
        if not live:
            print(what, file=sys.stderr, flush=True)
        rows += case.run(options, partial(_show, f"{what}: ") if live else None)
    if live:
        _show()
    print_rows(rows, wide=wide)
    if json_path is not None:
        write_json(json_path, asdict(options), rows)
    if plot_path is not None:
        write_bars(plot_path, rows)

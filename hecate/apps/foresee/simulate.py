"""Run the cases of `hecate simulate`, print their results and write them to files."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hecate.apps.foresee.bars import write_bars
from hecate.apps.foresee.cases import Case, Options, chosen_names, synthetic_cases, trace_case
from hecate.apps.foresee.report import print_rows, write_rows
from hecate.apps.foresee.sweep import load_sweep
from hecate.config.files.presets import find_preset, preset_names
from hecate.errors import UserError
from hecate.io.terminal import show_progress
from hecate.parallel.simulate.workloads import WORKLOADS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """Where the results of a simulation go."""

    wide: bool
    """print every figure, in tables of 160 characters"""
    json_path: Path | None = None
    """to which all figures are written; None: nowhere"""
    plot_path: Path | None = None
    """to which a picture of the step times is written; None: nowhere"""


def named_cases(topology: str | None, model: str | None, loads: str | Path, tokens: int, price_per_hour: str | None) -> list[Case]:
    """One model on one cluster or several, under synthetic workloads or a trace. Names are those of presets, or paths of files.

    Args:
        topology: a name, or several names separated by commas.
        loads: names of workloads separated by commas, or all; or the path of a trace.
        tokens: of one rank in a step of a workload.
        price_per_hour: of a device, in place of the topology's: one number, or one for each topology, separated by commas.

    Raises:
        UserError: a name, a file or a number is wrong.
    """
    if topology is None or model is None:
        what = " and ".join(name for name, value in (("--topology", topology), ("--model", model)) if value is None)
        topologies, models = ", ".join(preset_names("topologies")), ", ".join(preset_names("models"))
        raise UserError(f"simulate needs {what}, or --sweep FILE\n  topologies: {topologies}\n  models: {models}")
    names = topology.split(",")
    stems = [Path(name).stem for name in names]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(f"--topology {topology}: two are called {', '.join(twice)}; rows could not be told apart\n  rename a file")
    cases: list[Case] = []
    for name, price in zip(names, _prices(price_per_hour, len(names)), strict=True):
        if isinstance(loads, Path):
            cases.append(trace_case(name, model, loads, price_per_hour=price))
        else:
            cases += synthetic_cases(name, model, chosen_names(loads, tuple(WORKLOADS), "--workload"), tokens, price_per_hour=price)
    return cases


def sweep_cases(sweep: str) -> tuple[list[Case], Options]:
    """All cases of a sweep, given as a preset's name or a file, and their options.

    Raises:
        UserError: the file, or a name in it, is wrong.
    """
    return load_sweep(find_preset("experiments", "sweep", sweep))


def _prices(text: str | None, number: int) -> list[float | None]:
    """Return the price of a device of each topology; None: the topology's own.

    Raises:
        UserError: there are neither one nor as many prices as topologies, or one of them is no positive number.
    """
    if text is None:
        return [None] * number
    given = text.split(",")
    try:
        prices = [float(one) for one in given]
    except ValueError:
        prices = []
    if len(prices) not in (1, number) or not all(0 < price < math.inf for price in prices):
        raise UserError(
            f"--price-per-hour {text}: must be a positive number, what a device costs in an hour, or one for each topology, of which there "
            f"{'is 1' if number == 1 else f'are {number}'}"
        )
    return list(prices * number if len(prices) == 1 else prices)


def run_cases(cases: list[Case], options: Options, shown: Shown) -> None:
    """Simulate the cases, print their results and write them to files."""
    rows: list[dict[str, Any]] = []
    live = sys.stderr.isatty()
    for number, case in enumerate(cases, start=1):
        what = f"{number}/{len(cases)} {case.model.name} on {case.topology_name}, {case.workload}"
        if not live:
            _log.info(what)
        rows += case.run(options, partial(show_progress, f"{what}: ") if live else None)
    if live:
        show_progress()
    print_rows(rows, wide=shown.wide)
    if shown.json_path is not None:
        write_rows(shown.json_path, asdict(options), rows)
    if shown.plot_path is not None:
        write_bars(shown.plot_path, rows)

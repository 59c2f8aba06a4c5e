"""Print the predictions of `hecate plan`: memory and step time under every policy."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Table

from hecate.apps.foresee.dry_run import Forecast, PolicyForecast, fits, forecast
from hecate.apps.foresee.purchase import purchase, purchase_lines
from hecate.apps.foresee.report import modes_table
from hecate.config import Config
from hecate.errors import UserError
from hecate.io.terminal import new_console
from hecate.model.sizes.memory import PHASES
from hecate.model.sizes.run_shape import run_shape
from hecate.parallel.cluster.step_spread import step_spread
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.traces import load_trace

_WIDTH = 140
"""the width in characters of a table that is not printed to a terminal"""
_UNITS = (("ms", 1e-3), ("s", 1.0), ("h", 3600.0))
"""in which times may be shown, and their seconds"""


def run_plan(
    config: Config,
    *,
    topology: str | None,
    ranks: int | None,
    loads: str | Path,
    json_path: Path | None,
    price_per_hour: float | None = None,
) -> None:
    """Print the memory of each phase on the fullest rank, the step under every policy, and what the run would take and cost.

    Args:
        topology: a preset or a file that replaces the configuration's topology.
        ranks: the number of ranks, if the topology is `auto`.
        loads: the name of a workload, or a run's folder `loads` to predict with.
        price_per_hour: of a device, in place of the topology's.

    Raises:
        UserError: a file is missing or damaged, a name is unknown, or the model is not supported.
    """
    if isinstance(loads, str) and loads not in WORKLOADS:
        raise UserError(f"--workload {loads}: unknown\n  there are {', '.join(WORKLOADS)}")
    run = run_shape(config, topology, ranks)
    if price_per_hour is not None:
        run = replace(run, topology=replace(run.topology, price_per_hour=(price_per_hour,) * run.topology.world_size))
    found = forecast(run, loads if isinstance(loads, str) else load_trace(loads))
    console = new_console(width=None if new_console().is_terminal or "COLUMNS" in os.environ else _WIDTH, highlight=False)
    for note in found.run.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(_memory_table(found))
    for part in _policy_tables(found, console.width) if found.run.groups else ():
        console.print(part)
    if modes := modes_table([(one.policy, one.plan_modes) for one in found.policies]):
        console.print(modes)
    for line in purchase_lines(found):
        console.print(line, markup=False)
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(found.as_dict() | {"purchase": purchase(found)}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{json_path}: cannot be written: {error.strerror or error}") from error


def _memory_table(found: Forecast) -> Table:
    """Return the table of the configured policy's memory on the rank that is fullest relative to its memory."""
    one, memory_D = found.policies[0], np.asarray(found.run.topology.memory)
    rank = int((one.memory_PD.max(0) / memory_D).argmax())
    policy = f"; policy {one.policy}" if found.run.groups else ""
    table = Table(title=f"Memory of rank {rank}, the fullest, in MB{policy}")
    table.add_column("")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for part in (part for part in one.memory if part.bytes_PD.any()):
        table.add_row(part.name, *(f"{value / 1e6:.1f}" for value in part.bytes_PD[:, rank]))
    table.add_section()
    table.add_row("in all", *(f"{value / 1e6:.1f}" for value in one.memory_PD[:, rank]))
    if fits(one, found.run):
        on_top = "gaps in the allocator's segments and NCCL's buffers come" if found.run.is_gpu_D[rank] else "the memory of libraries comes"
        table.caption = f"fits: the device has {memory_D[rank] / 1e6:.0f}; {on_top} on top"
    else:
        table.caption = f"does not fit: the device has {memory_D[rank] / 1e6:.0f}"
    return table


def _policy_tables(found: Forecast, width: int) -> list[Table]:
    """Return one table of all policies, or as many tables as are needed so that no column is cut off at `width`."""
    run = found.run
    unit, seconds = next(one for one in _UNITS if found.policies[0].step_seconds < 1e4 * one[1] or one is _UNITS[-1])
    header = ["policy", unit, *found.policies[0].parts, "max/mean", "port MB", "uplink MB", "memory GB"]
    cells = [_policy_cells(one, found, seconds) for one in found.policies]
    wide = [3 + max(len(name), *(len(row[column]) for row in cells)) for column, name in enumerate(header)]  # with a border and two blanks
    groups: list[list[int]] = [[]]
    for column in range(1, len(header)):
        if groups[-1] and 1 + wide[0] + sum(wide[c] for c in groups[-1]) + wide[column] > width:
            groups.append([])
        groups[-1].append(column)
    tables = []
    for group in groups:
        table = Table()
        table.add_column(header[0])
        for column in group:
            table.add_column(header[column], justify="right")
        for row in cells:
            table.add_row(row[0], *(row[column] for column in group))
        tables.append(table)
    sharing = f" in sharding groups of {run.mesh.shard_size}" if run.mesh.num_sharding_groups > 1 else ""
    tables[0].title = f"One step on {run.topology_name}, {run.topology.world_size} ranks{sharing}, {found.workload} loads"
    tables[0].caption = (
        f"{unit}, as a range; its parts: at the topology's rates; port, uplink: MB through the busiest one; *: does not fit the devices' "
        "memory; first: the configured policy"
    )
    return tables


def _policy_cells(one: PolicyForecast, found: Forecast, unit: float) -> list[str]:
    return [
        one.policy + "*" * (not fits(one, found.run)),
        step_spread(found.run.topology).text(one.step_seconds / unit),
        *(f"{seconds / unit:.1f}" for seconds in one.parts.values()),
        f"{one.imbalance:.2f}",
        *(f"{size / 1e6:.1f}" for size in (one.bytes.busiest_port, one.bytes.busiest_uplink)),
        f"{one.memory_PD.max() / 1e9:.2f}",
    ]

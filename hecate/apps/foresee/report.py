"""Print the rows of a simulation as tables, and write them as JSON. `hecate.apps.foresee.bars` draws them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hecate.apps.foresee.cases import BASELINE
from hecate.apps.foresee.fsdp_ep import FSDP_EP
from hecate.apps.foresee.purchase import replication_line
from hecate.errors import UserError
from hecate.io.terminal import new_console
from hecate.parallel.cluster.step_spread import StepSpread
from hecate.parallel.simulate.simulator import mean_modes

Row = dict[str, Any]

_TIE = 1.05
"""up to this ratio of their prices, clusters are called equally cheap"""
SPEEDUP = f"speedup_over_{BASELINE}"
COST = "cost_per_million_tokens"
_CASE = ("topology", "model", "experts", "tokens_per_rank", "workload")
_ALIKE = 1e-3
"""the share of a step's seconds by which policies may differ that place experts alike once loads are known"""
_MOST_NOTES = 6
"""how many lines about single cases are printed"""
_NARROW, _WIDE = 80, 160
"""the widths in characters of tables that are not printed to a terminal; a wide one is that wide everywhere"""


def print_rows(rows: Sequence[Row], *, wide: bool = False) -> None:
    """Print the rows of a simulation.

    One case is printed as a table of its policies. Several cases are printed as a table of each policy's speed-ups, which are a case's if
    they differ in the workload only, and else the means over the workloads of each model and cluster.

    Args:
        wide: every figure, in tables of 160 characters; otherwise those that policies are chosen by, in 80.
    """
    width = None if new_console().is_terminal else _NARROW
    console = new_console(width=_WIDE if wide else width, highlight=False)
    _print_tables(console, rows, wide=wide)
    for line in _notes(rows):
        console.print(line, markup=False)
    by_policy = [(group[0]["policy"], mean_modes([row.get("plan_modes") for row in group])) for group in grouped(rows, ("policy",))]
    if modes := modes_table(by_policy):
        console.print(modes)


def modes_table(shares: Sequence[tuple[str, dict[str, float] | None]]) -> Table | None:
    """Return a table of the share of layers that each policy planned in each mode; None: modes were not chosen.

    Args:
        shares: of each policy by name (`Simulated.plan_modes`).
    """
    known = [(policy, of_policy) for policy, of_policy in shares if of_policy is not None]
    if not known:
        return None
    table = Table(title="From which loads layers were planned, in %")
    for name in ("policy", *known[0][1]):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for policy, of_policy in known:
        table.add_row(policy, *(f"{100 * share:.0f}" for share in of_policy.values()))
    return table


def _notes(rows: Sequence[Row]) -> list[str]:
    """Lines on what times rest on, and on policies whose rows need an explanation."""
    on: dict[StepSpread, dict[str, None]] = {}
    for row in rows:
        on.setdefault(StepSpread(**row["spread"]), {})[row["topology"]] = None
    lines = [f"{', '.join(topologies)}: {spread.note}" for spread, topologies in on.items()]
    for case in grouped(rows, _CASE):
        seconds = {row["policy"]: float(row["step_seconds"]) for row in case if row["fits_memory"]}
        where = f"{case[0]['model']} on {case[0]['topology']}, {case[0]['workload']}: "
        lines += [where + line for line in replication_line(seconds, case[0]["ranks"])]
        all_seconds = {row["policy"]: float(row["step_seconds"]) for row in case}
        as_slow = BASELINE in all_seconds and math.isclose(all_seconds.get("hecate_paper", 0.0), all_seconds[BASELINE], rel_tol=_ALIKE)
        if as_slow and case[0]["ranks"] > 1:
            lines.append(f"{where}hecate_paper copies only experts that travel hidden behind a layer's attention: here none, as {BASELINE}")
        lines += [where + line for line in _on_first_steps(case)]
        lines += [f"{where}{FSDP_EP} is fastest in groups of {row['shard_size']} ranks" for row in case if row["policy"] == FSDP_EP]
    few = lines[: len(on) + _MOST_NOTES]
    return [*few, f"and {len(lines) - len(few)} more lines like these"] if len(lines) > len(few) else few


def _on_first_steps(case: Sequence[Row]) -> list[str]:
    """A line on the policies whose first steps take more than twice as long as the mean step, if there are any."""
    slow = [row for row in case if row["first_seconds"] > 2 * row["first_steps"] * row["step_seconds"]]
    said = "; ".join(f"{row['policy']} {row['first_seconds']:.2f} s, {row['first_bytes'] / 1e9:,.1f} GB" for row in slow)
    few = "step" if case[0]["first_steps"] == 1 else f"{case[0]['first_steps']} steps"
    return [f"the first {few}, in the mean of {case[0]['run_steps']:,}: {said}"] if slow else []


def _print_tables(console: Console, rows: Sequence[Row], *, wide: bool) -> None:
    cases = grouped(rows, _CASE)
    if len(cases) == 1:
        console.print(_detail(rows) if wide else _policies(rows))
        return
    pairs = grouped(rows, ("topology", "model", "experts", "tokens_per_rank"))
    if len(pairs) == 1:
        keys: tuple[str, ...] = ("workload",)
        title = f"Speed-up over {BASELINE}\n{_title(rows[0])}"
    else:
        workloads = len(grouped(rows, ("workload",)))
        keys = ("topology", "model", "experts")
        title = f"Speed-up over {BASELINE}, geometric mean over {workloads} workload{'s' * (workloads > 1)}"
    console.print(_speedups(rows, keys, title) if wide else _ranges(rows, keys, title))
    if len(grouped(rows, ("topology",))) > 1:
        for of_model in grouped(rows, ("model", "experts", "tokens_per_rank")):
            console.print(_clusters(of_model, console.width))


def write_rows(path: Path, settings: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write `{"settings", "rows"}` to a JSON file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _policies(rows: Sequence[Row]) -> Table:
    """The policies of one case, the fastest first."""
    table = Table(title=f"{_title(rows[0])}, {rows[0]['workload']}")
    table.add_column("policy")
    priced = rows[0][COST] is not None
    for name in ("ms a step", "speed-up", "max/mean", "memory GB", *(["cost"] if priced else [])):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: float(row["step_seconds"])):
        memory = f"{row['memory_bytes'] / 1e9:.1f}"
        table.add_row(
            row["policy"] + _mark([row]),
            StepSpread(**row["spread"]).text(1e3 * row["step_seconds"]),
            _times(row[SPEEDUP]),
            f"{row['imbalance']:.2f}",
            memory,
            *([StepSpread(**row["spread"]).text(row[COST])] if priced else []),
        )
    table.caption = _TOO_LARGE * bool(_mark(rows)) + _PRICED * priced
    table.caption += (
        f"speed-up: over {BASELINE}{_in_groups(rows[0])}; max/mean: of the ranks' compute; "
        "memory: on the fullest rank, without activations; --wide: all figures"
    )
    return table


def _in_groups(row: Row) -> str:
    size = row["baseline_shard_size"]
    return f" in groups of {size} ranks" if size is not None and size < row["ranks"] else ""


def _clusters(rows: Sequence[Row], width: int) -> Table:
    """One model on several clusters, each under its fastest policy that fits, the cheapest cluster first, or else the fastest.

    A range is broken at its dash where the table would be wider than `width`.
    """
    best = [fastest(of_cluster) for of_cluster in grouped(rows, ("topology",))]
    costs = [mean_cost(group) for group in best]
    priced = any(cost is not None for cost in costs)
    workloads = grouped(rows, ("workload",))
    title = f"{rows[0]['model']} with {rows[0]['experts']} experts, {rows[0]['tokens_per_rank']} tokens a rank"
    table = Table(title=f"{title}, {f'mean of {len(workloads)} workloads' if len(workloads) > 1 else rows[0]['workload']}")
    header = ("cluster", "ranks", "policy", "ms a step", "tokens/s", "memory GB", *(["cost"] if priced else []))
    for name in header:
        table.add_column(name, justify="left" if name in ("cluster", "policy") else "right", overflow="fold")
    lines = []
    for group, cost in zip(best, costs, strict=True):
        row, seconds = group[0], mean_seconds(group)
        speed = row["ranks"] * row["tokens_per_rank"] / seconds
        spread = StepSpread(**row["spread"])
        cells = [row["topology"], str(row["ranks"]), row["policy"] + _mark(group), spread.text(1e3 * seconds), spread.inverse_text(speed)]
        cells.append(f"{max(one['memory_bytes'] for one in group) / 1e9:.1f}")
        if priced:
            cells.append("-" if cost is None else spread.text(cost))
        lines.append((cost is None, -speed if cost is None else cost, cells))
    widest = [max(map(len, column)) for column in zip(header, *(cells for _, _, cells in lines), strict=True)]
    dash = "-" if 1 + sum(3 + characters for characters in widest) <= width else " - "
    for _, _, cells in sorted(lines):
        table.add_row(*cells[:3], *(cell.replace("-", dash) if len(cell) > 1 else cell for cell in cells[3:]))
    marked = any(_mark(group) for group in best)
    table.caption = _TOO_LARGE * marked + _PRICED * priced + "each cluster with the fastest of the policies that fit it"
    known = [cost for cost in costs if cost is not None]
    if len(known) > 1 and max(known) <= _TIE * min(known):
        table.caption += f"\nprices tie within {max(known) / min(known) - 1:.0%}: choose by memory, and by how long you can wait"
    return table


def fastest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the policy whose mean step is the shortest, among those that fit in memory under every workload, if there are any."""
    groups = grouped(rows, ("policy",))
    fitting = [group for group in groups if not _mark(group)]
    return min(fitting or groups, key=mean_seconds)


def mean_seconds(rows: Sequence[Row]) -> float:
    """The mean time of a step."""
    return sum(float(row["step_seconds"]) for row in rows) / len(rows)


def mean_cost(rows: Sequence[Row]) -> float | None:
    """The mean cost of a million tokens; None: the devices' price is not known."""
    costs = [row[COST] for row in rows]
    return None if None in costs else sum(costs) / len(costs)


def _ranges(rows: Sequence[Row], keys: tuple[str, ...], title: str) -> Table:
    """A line for each policy, the best first: the geometric mean of all lines that `_speedups` has, the least and the largest."""
    relative = rows[0][SPEEDUP] is not None
    table = Table(title=title if relative else title.replace(f"Speed-up over {BASELINE}", "Milliseconds a step, at the topology's rates"))
    table.add_column("policy")
    for name in ("geo-mean", "least", "with", "most", "with"):
        table.add_column(name, justify="left" if name == "with" else "right")
    lines: list[tuple[float, list[str]]] = []
    for of_policy in grouped(rows, ("policy",)):
        mean = _geomean([_value(row, relative) for row in of_policy])
        cases = {_case(group[0], keys, rows): _geomean([_value(row, relative) for row in group]) for group in grouped(of_policy, keys)}
        least, most = min(cases, key=cases.__getitem__), max(cases, key=cases.__getitem__)
        shown = [_figure(mean, relative), _figure(cases[least], relative), least, _figure(cases[most], relative), most]
        lines.append((-mean if relative else mean, [of_policy[0]["policy"] + _mark(of_policy), *shown]))
    for _, cells in sorted(lines, key=lambda line: line[0]):
        table.add_row(*cells)
    table.caption = _TOO_LARGE * bool(_mark(rows)) + "--wide: every case"
    return table


def _case(row: Row, keys: tuple[str, ...], rows: Sequence[Row]) -> str:
    """The values of those keys in which rows differ."""
    return " ".join(str(row[key]) for key in keys if len({other[key] for other in rows}) > 1)


def _figure(value: float, relative: bool) -> str:
    return _times(value) if relative else f"{value:.1f}"


def _detail(rows: Sequence[Row]) -> Table:
    table = Table(title=f"{_title(rows[0])}, {rows[0]['workload']}: one step, at the topology's rates")
    table.add_column("policy")
    numbers = ("ms", "speed-up", "attention", "experts", "tokens", "exposed", "optim.", "gather", "reduce")
    for name in (*numbers, "max/mean", "port MB", "uplink MB", "memory GB", "plan ms/layer"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = row["seconds"]
        parts = ("attention", "compute", "dispatch", "exposed", "optimizer", "gather", "reduce")
        rest = seconds["reshard"] + seconds["all_reduce"] + seconds["planning"]
        table.add_row(
            row["policy"] + _mark([row]),
            f"{1e3 * row['step_seconds']:.1f}",
            _times(row[SPEEDUP]),
            *(f"{1e3 * (seconds[part] + (rest if part == 'optimizer' else 0)):.1f}" for part in parts),
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
    table = Table(title=title if relative else title.replace(f"Speed-up over {BASELINE}", "Milliseconds a step, at the topology's rates"))
    for key in keys:
        table.add_column(key)
    for policy in policies:
        table.add_column(policy, justify="right")

    def cells(group: Sequence[Row]) -> list[str]:
        means = [_geomean([_value(row, relative) for row in group if row["policy"] == policy]) for policy in policies]
        marks = [_mark([row for row in group if row["policy"] == policy]) for policy in policies]
        return [_figure(mean, relative) + mark for mean, mark in zip(means, marks, strict=True)]

    groups = grouped(rows, keys)
    for group in groups:
        table.add_row(*(str(group[0][key]) for key in keys), *cells(group), end_section=group is groups[-1])
    table.add_row("geo-mean", *[""] * (len(keys) - 1), *cells(rows))
    table.caption = _TOO_LARGE if _mark(rows) else None
    return table


_PRICED = "cost: of a million tokens, in the currency of price_per_hour\n"
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

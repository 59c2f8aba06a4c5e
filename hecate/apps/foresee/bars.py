"""Draw simulated step times: a panel for each model and cluster, with a bar for each policy that shows the parts of its step.

The picture is opaque with dark text, so that it can be read on light and on dark pages, at a width of 800 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hecate.apps.foresee.cases import BASELINE
from hecate.apps.foresee.report import COST, SPEEDUP, Row, fastest, grouped, mean_cost, mean_seconds
from hecate.errors import UserError, install_hint
from hecate.parallel.values.expert_kinds import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {
    "attention": ("attention", "#9aa5b1"),
    "compute": ("experts compute", "#2f6db5"),
    "dispatch": ("tokens travel", "#e3a008"),
    "exposed": ("parameters and gradients travel (not hidden)", "#c2410c"),
    "optimizer": ("optimizer", "#6b4c9a"),
    "planning": ("ranks wait for plans", "#8a5a44"),
    "reshard": ("re-sharding", "#1b7f5c"),
    "all_reduce": ("gradients are summed over groups", "#7a8b2a"),
}
"""the parts of a step, which add up to it, with their labels and colours"""
NAMES = {BASELINE: f"{BASELINE}\n(expert parallelism)", "full": "full\n(every expert on every rank)", "auto": "auto\n(the default)"}
"""the labels of policies that need an explanation"""
LOADS = {
    "balanced": "every expert is equally popular",
    "zipf": "few experts are very popular",
    "dirichlet_drift": "skewed like real text",
}
"""the labels of workloads that need an explanation"""
EXPERTS = {"trained": "fully trained experts", "frozen": "LoRA on frozen experts", "shared": "LoRA experts over one frozen FFN"}
"""the label of a kind of experts by its `ExpertKind.ffn`"""
_VISIBLE = 0.002
"""a part gets a line in the legend if it has at least this share of the longest bar"""
_WIDTH, _DPI = 9.5, 140
_ROOM, _ROOM_WITH_COST = 1.6, 1.75
"""the width of a panel over that of its longest bar, whose label is beside it"""


def write_bars(path: Path, rows: Sequence[Row]) -> None:
    """Draw the rows of a simulation (docs/use/simulator.md) into a PNG.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    figure = draw_bars(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, pil_kwargs={"optimize": True})
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def draw_bars(rows: Sequence[Row]) -> Figure:
    """Draw a panel for each model and cluster. The length of a bar is the mean over the panel's workloads.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error})\n  {install_hint('report')}") from error
    panels = grouped(rows, ("topology", "model", "experts", "tokens_per_rank"))
    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    policies = max(len(grouped(panel, ("policy",))) for panel in panels)
    figure = Figure(figsize=(_WIDTH, 1.0 + down * (1.2 + 0.36 * policies)), layout="constrained", facecolor="white")
    figure.suptitle("Predicted time of one training step under each placement policy", fontsize=11.5, fontweight="bold")
    axes = figure.subplots(down, across, squeeze=False, sharey="row").flatten()  # all panels have the same policies
    shown: dict[str, Any] = {}
    room = _ROOM if all(row[COST] is None for row in rows) else _ROOM_WITH_COST
    for panel, axis in zip(panels, axes, strict=False):
        # Clusters with the same work are drawn to one scale.
        alike = [row for row in rows if all(row[key] == panel[0][key] for key in ("model", "experts", "tokens_per_rank"))]
        longest = max(1e3 * mean_seconds(group) for group in grouped(alike, ("topology", "policy")))
        shown |= _draw(axis, panel, longest, room)
    names = [group[0]["policy"] for group in grouped(rows, ("policy",))]
    for axis in axes[: len(panels) : across]:
        axis.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names], fontsize=8)
        for name, tick in zip(names, axis.get_yticklabels(), strict=True):
            tick.set_fontweight("bold" if name == "auto" else "normal")
        axis.invert_yaxis()
    for axis in axes[len(panels) :]:
        axis.remove()
    beside = ["milliseconds"]
    if all(row[SPEEDUP] is not None for row in rows):
        beside.append(f"speed-up over {BASELINE}")
    beside.append("memory of the fullest rank without activations")
    if any(row[COST] is not None for row in rows):
        beside.append("cost of a million tokens")
    caption = "beside each bar: " + ", ".join(beside)
    order = [part for part in PARTS if part in shown]
    called = [PARTS[part][0] for part in order]
    figure.legend(
        [shown[part] for part in order],
        called,
        loc="outside lower center",
        ncols=3,
        fontsize=8.5,
        frameon=False,
        title=caption,
        title_fontsize=8.5,
    )
    return figure


def _draw(axis: Axes, panel: Sequence[Row], longest: float, room: float) -> Mapping[str, Any]:
    """Draw one panel. Returns the bars of each visible part.

    Args:
        longest: the milliseconds of the longest bar that the panel is compared with.
        room: see `_ROOM`.
    """
    policies = grouped(panel, ("policy",))
    names = [group[0]["policy"] for group in policies]
    totals = [_mean_ms(group, tuple(PARTS)) for group in policies]
    shown, ends = {}, [0.0] * len(policies)
    for part, (_, colour) in PARTS.items():
        lengths = [_mean_ms(group, (part,)) for group in policies]
        bars = axis.barh(range(len(policies)), lengths, left=ends, color=colour, height=0.72)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        if max(lengths) > _VISIBLE * max(totals):
            shown[part] = bars
    for place, (group, total) in enumerate(zip(policies, totals, strict=True)):
        weight = "bold" if names[place] == "auto" else "normal"
        axis.text(total + 0.012 * longest, place, _label(group, total), va="center", fontsize=8, fontweight=weight)
    axis.set_xlim(0, room * longest)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(_title(panel), fontsize=9, loc="left", wrap=True)
    return shown


def _label(group: Sequence[Row], total: float) -> str:
    """Return the label at the end of a bar: time, speed-up over the baseline, memory of the fullest rank, cost; what is known of them."""
    parts = [f"{total:.0f} ms" if total >= 10 else f"{total:.2g} ms"]
    over = [row["step_seconds"] * row[SPEEDUP] for row in group if row[SPEEDUP] is not None]
    if len(over) == len(group):
        parts.append(f"{1e3 * sum(over) / len(over) / total:.2f}x")
    fits = all(row["fits_memory"] for row in group)
    parts.append(f"{max(row['memory_bytes'] for row in group) / 1e9:.0f} GB{'' if fits else ': too much'}")
    if (cost := mean_cost(group)) is not None:
        parts.append(f"cost {cost:.3g}")
    return ", ".join(parts)


def _mean_ms(group: Sequence[Row], parts: tuple[str, ...]) -> float:
    return 1e3 * sum(row["seconds"][part] for row in group for part in parts) / len(group)


def _title(panel: Sequence[Row]) -> str:
    row, workloads = panel[0], list(dict.fromkeys(row["workload"] for row in panel))
    loads = f"mean of the workloads {', '.join(workloads)}" if len(workloads) > 1 else f"workload {workloads[0]}"
    if len(workloads) == 1 and workloads[0] in LOADS:
        loads += f": {LOADS[workloads[0]]}"
    best = fastest(panel)
    fits = "fastest that fits" if all(one["fits_memory"] for one in best) else "fastest, although none fits"
    tokens_per_s = row["ranks"] * row["tokens_per_rank"] / mean_seconds(best)
    cost = mean_cost(best)
    return (
        f"{row['model']}: {EXPERTS[KINDS[row['kind']].ffn]}\n{row['experts']} experts a layer, "
        f"{row['tokens_per_rank']:,} tokens a rank\n{loads}\n{row['topology']} ({row['ranks']} ranks)\n"
        f"{fits}: {best[0]['policy']}\n{tokens_per_s:,.0f} tokens/s" + ("" if cost is None else f", a million for {cost:.3g}")
    )

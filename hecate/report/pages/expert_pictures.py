"""The sections of a report about the experts: which of them get the tokens, in which layer, and how that changes.

Where linears have experts, a model has hundreds of units. They are drawn as one map for each kind of linear, whose rows are the layers,
and over time only the most uneven unit of each layer is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from hecate.parallel.values.loads import imbalance
from hecate.parallel.values.units import FFN, Unit
from hecate.report.pages.page_parts import figure, not_recorded, section
from hecate.report.pages.svg import heat_chart, number_text
from hecate.report.run_records import LoadTimeline, RunRecords

MOST_COLUMNS = 256
"""experts beyond that are drawn several to a column, by the largest of them"""


def expert_sections(run: RunRecords) -> Sequence[str]:
    """The sections, as HTML."""
    loads, title = run.loads, "Load of the experts"
    if not loads.experts or not loads.loads_BN.sum():
        return [section(title, not_recorded("loads of the experts"))]
    shares = {unit: relative_loads(loads.of(unit).sum(0)) for unit in loads.experts}
    highest = max(float(share_E.max()) for share_E in shares.values())
    busiest = max(shares, key=lambda unit: (float(shares[unit].max()), -unit.layer))
    said = (
        "An expert's load over the mean of its layer, in the steps that are recorded; 1 is even. "
        f"The busiest is expert {int(shares[busiest].argmax())} of {_name(busiest)}, "
        f"with {number_text(float(shares[busiest].max()))} times the mean."
    )
    maps = []
    for place in dict.fromkeys(unit.place for unit in loads.experts):
        units = [unit for unit in loads.experts if unit.place == place]
        grid, columns = padded([shares[unit] for unit in units])
        rows = [str(unit.layer) for unit in units]
        name = "by layer and expert" if place == FFN else f"{place}, by layer and expert"
        maps.append(figure(name, heat_chart(grid, f"load {name}", highest=highest, rows=rows, columns=columns), ""))
    return [section(title, f"<p>{escape(said)}</p>", *maps), section("Load over time", *_over_time(loads))]


def _over_time(loads: LoadTimeline) -> Sequence[str]:
    skews = {unit: np.array([imbalance(load_E) for load_E in loads.of(unit)]) for unit in loads.experts}
    layers = sorted({unit.layer for unit in loads.experts})
    grid = np.stack([np.max([skew_B for unit, skew_B in skews.items() if unit.layer == layer], axis=0) for layer in layers])
    steps = [str(first) for first in loads.first_B]
    several = len(loads.experts) > len(layers)
    said = "Load of the busiest expert over the mean of its layer, by step and layer; 1 is even."
    if several:
        said += " Of a layer's linears, the most uneven one counts."
    by_layer = heat_chart(grid, said, lowest=1.0, highest=float(grid.max()), rows=[str(layer) for layer in layers], columns=steps)
    uneven = max(skews, key=lambda unit: (float(skews[unit].mean()), -unit.layer))
    shares = np.stack([relative_loads(load_E) for load_E in loads.of(uneven)], axis=1)
    experts = [str(expert) for expert in range(len(shares))]
    one = heat_chart(shares, f"load of each expert of {_name(uneven)} over time", highest=float(shares.max()), rows=experts, columns=steps)
    title = f"experts of {_name(uneven)}, the most uneven"
    return [
        figure("unevenness by layer", by_layer, said),
        figure(title, one, "Each expert's load over the mean, by step."),
    ]


def relative_loads(load_E: np.ndarray) -> np.ndarray:
    """float64 [experts]: each expert's load over the mean of all; 1 for all where there was none."""
    mean = load_E.mean()
    return load_E / mean if mean > 0 else np.ones(len(load_E))


def padded(rows: Sequence[np.ndarray], most: int = MOST_COLUMNS) -> tuple[np.ndarray, list[str]]:
    """Return rows of different lengths as float64 [rows, columns], NaN where a row has no value, and the columns' names.

    Args:
        most: columns; more values are taken together, by the largest of neighbours.
    """
    longest = max(len(row) for row in rows)
    together = -(-longest // most)
    columns = -(-longest // together)
    grid = np.full((len(rows), columns * together), np.nan)
    for into, row in zip(grid, rows, strict=True):
        into[: len(row)] = row
    largest = np.fmax.reduce(grid.reshape(len(rows), columns, together), axis=2)
    return largest, [str(first) for first in range(0, longest, together)]


def _name(unit: Unit) -> str:
    return f"layer {unit.layer}" if unit.place == FFN else f"layer {unit.layer}, {unit.place}"

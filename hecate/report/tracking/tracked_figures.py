"""What trackers get of a record of metrics.jsonl: numbers by name, and pictures of the experts' loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hecate.parallel.values.units import parse_unit
from hecate.report.metrics import Record
from hecate.report.pages.expert_pictures import padded, relative_loads
from hecate.report.pages.heat import heat_pixels

BRIGHTEST = 4.0
"""the load over the mean of its layer from which a cell has the brightest colour: the same at all steps, so that they compare"""
_SIDE = 256
"""pixels that the longer side of a picture has at least"""
_STEP = {
    "loss": "train/loss",
    "epoch": "train/epoch",
    "aux_loss": "train/aux_loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "step_seconds": "speed/step_seconds",
    "imbalance": "balance/imbalance",
    "static_imbalance": "balance/static_imbalance",
    "copies": "placement/copies",
    "new_copies": "placement/new_copies",
    "bytes_sent": "bytes/sent",
    "bytes_between_nodes": "bytes/between_nodes",
}
"""field of a step -> its name in trackers"""


def numbers_of(record: Record) -> dict[str, float]:
    """The numbers of a record by their names in trackers; those that are not finite are left out. Empty: the record has none for them."""
    if record["kind"] == "step":
        found = {name: record.get(key) for key, name in _STEP.items()}
        found |= {f"speed/{part}_seconds": seconds for part, seconds in record["parts"].items()}
        found["memory/peak_bytes"] = max(record["peak_bytes"], default=None)
    elif record["kind"] == "eval":
        scores = record["sources"].items()
        found = {f"eval/{source}/{what}": score[what] for source, score in scores for what in ("loss", "accuracy")}
    else:
        found = {}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def load_pictures(loads: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Heat maps of each expert's load over the mean of its unit: uint8 [rows, columns, 3], a row for each layer.

    Args:
        loads: unit, as text -> assignments of each expert.

    Returns:
        "loads/PLACE" -> the map of the units at this place of their layers.
    """
    units = sorted(parse_unit(name) for name in loads)
    pictures = {}
    for place in dict.fromkeys(unit.place for unit in units):
        rows = [relative_loads(np.asarray(loads[str(unit)], dtype=float)) for unit in units if unit.place == place]
        grid, _ = padded(rows)
        pixels = heat_pixels(grid, 0.0, BRIGHTEST)
        opaque = np.where(pixels[..., 3:] > 0, pixels[..., :3], np.uint8(255))
        larger = max(1, math.ceil(_SIDE / max(grid.shape)))
        pictures[f"loads/{place}"] = opaque.repeat(larger, axis=0).repeat(larger, axis=1)
    return pictures

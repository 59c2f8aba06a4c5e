"""Draws which experts serve which task: for each task, the share of its assignments at each expert of each layer."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np

from hecate.errors import UserError, install_hint

BLANK = "#d9d9d9"
DOTS_PER_INCH = 130
LETTERS_AN_INCH = 9
"""How many of the widest letters fit an inch of a panel's title."""

MAX_WIDTH, MAX_HEIGHT = 14.0, 9.0
"""Largest width and height, in inches, of all panels together."""


def write_heatmap(path: Path, shares: dict[str, list[list[float]]], title: str) -> None:
    """Write a PNG with one panel for each task, all on one colour scale.

    Args:
        path: where the PNG is written.
        shares: task -> layer -> expert, the share of the task's assignments; a layer's shares sum to 1. Layers may have
            different numbers of experts, or none: the rest of their row stays blank.
        title: stands above all panels.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    assert shares, "no task to draw"
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise UserError(f"the heatmap needs matplotlib ({error})\n  {install_hint('report')}") from error

    grids = {task: _grid(layers) for task, layers in shares.items()}
    num_layers = max(grid.shape[0] for grid in grids.values())
    num_experts = max(grid.shape[1] for grid in grids.values())
    width, height = min(max(0.3 * num_experts, 2.0), 5.0), min(max(0.16 * num_layers, 1.6), 8.0)
    columns = _columns(len(grids), width, height)
    rows = math.ceil(len(grids) / columns)
    shrink = min(1.0, MAX_WIDTH / (columns * width), MAX_HEIGHT / (rows * height))
    width, height = width * shrink, height * shrink

    figure = Figure(figsize=(max(columns * (width + 0.2) + 1.6, 5.0), rows * (height + 0.4) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=12, parse_math=False)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    largest = max((share for layers in shares.values() for layer in layers for share in layer), default=0.0) or 1.0
    for number, (panel, (task, grid)) in enumerate(zip(panels.flat, grids.items(), strict=False)):
        panel.set_facecolor(BLANK)
        image = panel.imshow(grid, cmap="viridis", vmin=0.0, vmax=largest, aspect="auto", interpolation="nearest")
        panel.set_title(textwrap.fill(task, max(int(LETTERS_AN_INCH * width), 10)), fontsize=9, parse_math=False)
        panel.set_xticks(_ticks(num_experts, most=int(4 * width)))
        panel.set_yticks(_ticks(num_layers, most=int(4 * height)))
        panel.set_xlim(-0.5, num_experts - 0.5)
        panel.set_ylim(num_layers - 0.5, -0.5)
        panel.tick_params(labelsize=8, labelbottom=number + columns >= len(grids))
    for panel in panels.flat[len(grids) :]:
        panel.set_axis_off()
    bar = figure.colorbar(image, ax=panels, format=PercentFormatter(1.0), aspect=30)
    bar.set_label("share of the task's tokens", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    even = {1.0 / len(layer) for layers in shares.values() for layer in layers if layer}
    if len(even) == 1:
        level = even.pop()
        bar.ax.axhline(level, color="white", linewidth=2)
        bar.ax.text(-0.3, level, "even", fontsize=8, ha="right", va="center", transform=bar.ax.get_yaxis_transform())
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
    except OSError as error:
        raise UserError(f"{path}: the heatmap cannot be written: {error.strerror or error}") from error


def _grid(layers: list[list[float]]) -> np.ndarray:
    """The shares of one task as float64 [layers, largest number of experts]; NaN where a layer has no such expert."""
    grid = np.full((max(len(layers), 1), max((len(layer) for layer in layers), default=0) or 1), np.nan)
    for row, layer in zip(grid, layers, strict=False):
        row[: len(layer)] = layer
    return grid


def _columns(num_panels: int, width: float, height: float) -> int:
    """How many panels stand side by side: the number that brings the picture nearest to 3:2, with few empty places in the last row."""

    def unlikeness(columns: int) -> float:
        rows = math.ceil(num_panels / columns)
        empty = rows * columns - num_panels
        return abs(math.log(columns * width / (rows * height) / 1.5)) + 0.25 * empty

    return min(range(1, num_panels + 1), key=unlikeness)


def _ticks(count: int, most: int) -> range:
    """The marks of an axis: 0, s, 2s, ... below `count`, about `most` of them at most, where s is one of 1, 2, 5, 10, 20, ..."""
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return range(0, count, next(step for step in steps if count <= step * most))

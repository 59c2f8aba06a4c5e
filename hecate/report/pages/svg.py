"""Charts as inline SVG: functions from values to text. Colours, light and dark, come from the page's style sheet."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from hecate.report.pages.heat import heat_pixels, png_bytes

WIDTH, HEIGHT = 420, 220
"""of a chart, in its own units; the page scales it, and on a phone's width letters stay readable"""
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 24
"""margins around the plotted area"""
COLOURS = 8
"""how many the style sheet has; further lines begin again with the first"""
MOST_POINTS = 300
"""a longer line is drawn through the means of equally many neighbours"""


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart."""

    name: str
    x_N: np.ndarray
    y_N: np.ndarray
    """NaN: the line is interrupted"""


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    name: str
    value: float
    goal: float | None = None
    """marked beside the value"""


def line_chart(lines: Sequence[Line], label: str, *, marks: Sequence[int] = (), from_zero: bool = False, dots: bool = False) -> str:
    """Return a chart of lines over the same axis.

    Args:
        label: what the chart shows, for whoever cannot see it.
        marks: values of x at which a dotted line stands.
        from_zero: the lower end of the y axis is 0.
        dots: each point is marked: there are few of them.
    """
    thin = [Line(line.name, *_thinned(line.x_N, line.y_N)) for line in lines]
    y = np.concatenate([line.y_N for line in thin])
    frame = _frame(np.concatenate([line.x_N for line in thin]), np.append(y, 0.0) if from_zero else y, label)
    body = [f'<line class="mark" x1="{frame.x(at):.1f}" x2="{frame.x(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for at in marks]
    for number, line in enumerate(thin):
        points = [(frame.x(x), frame.y(y)) for x, y in zip(line.x_N, line.y_N, strict=True)]
        body.append(f'<path class="line c{number % COLOURS}" d="{_path(points)}"><title>{escape(line.name)}</title></path>')
        if dots or sum(math.isfinite(y) for _, y in points) == 1:
            body += [f'<circle class="dot c{number % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points if math.isfinite(y)]
    return frame.svg("".join(body))


def area_chart(x_N: np.ndarray, layers: Sequence[tuple[str, np.ndarray]], label: str) -> str:
    """Return a chart of values stacked on each other; a NaN counts as 0.

    Args:
        x_N: shared by all layers.
        layers: (name, float64 [N]) from the lowest up.
        label: what the chart shows, for whoever cannot see it.
    """
    xs = _thinned(x_N, x_N.astype(float))[0]
    tops = np.cumsum([np.zeros(len(xs)), *(np.nan_to_num(_thinned(x_N, y_N)[1]) for _, y_N in layers)], axis=0)
    frame = _frame(xs, tops, label)
    body = []
    for number, (name, _) in enumerate(layers):
        upper = [(frame.x(x), frame.y(y)) for x, y in zip(xs, tops[number + 1], strict=True)]
        lower = [(frame.x(x), frame.y(y)) for x, y in zip(xs, tops[number], strict=True)]
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*upper, *reversed(lower)))
        body.append(f'<polygon class="area c{number % COLOURS}" points="{outline}"><title>{escape(name)}</title></polygon>')
    return frame.svg("".join(body))


def bar_chart(bars: Sequence[Bar], label: str, text: Callable[[float], str]) -> str:
    """Return a chart of horizontal bars from 0, with a mark at each bar's goal.

    Args:
        label: what the chart shows, for whoever cannot see it.
        text: a value as it is shown.
    """
    most = max((value for bar in bars for value in (bar.value, bar.goal or 0.0)), default=0.0) or 1.0
    height, left, right = 24, 70, 74
    scale = (WIDTH - left - right) / most
    body = []
    for number, bar in enumerate(bars):
        y = 4 + number * height
        body.append(f'<text x="{left - 6}" y="{y + 14}" text-anchor="end">{escape(bar.name)}</text>')
        body.append(f'<rect class="bar c0" x="{left}" y="{y}" width="{max(bar.value * scale, 0.5):.1f}" height="{height - 6}"/>')
        body.append(f'<text x="{left + most * scale + 6:.1f}" y="{y + 14}">{escape(text(bar.value))}</text>')
        if bar.goal is not None:
            at = left + bar.goal * scale
            body.append(f'<line class="goal" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 2}" y2="{y + height - 4}"/>')
    return _svg(len(bars) * height + 8, label, "".join(body))


def heat_chart(grid_RC: np.ndarray, label: str, *, highest: float, rows: Sequence[str], columns: Sequence[str], lowest: float = 0.0) -> str:
    """Return a heat map, row 0 on top, with a scale of its colours.

    Args:
        grid_RC: NaN: nothing there.
        label: what the map shows, for whoever cannot see it.
        highest: the value of the brightest colour.
        rows: the rows' names, of which as many are shown as there is room for.
        columns: likewise.
        lowest: the value of the darkest colour.
    """
    height = float(np.clip(9 * len(grid_RC), 60, 260))
    width, scale_at = WIDTH - LEFT - 54, WIDTH - 42
    body = [_image(grid_RC, lowest, highest, LEFT, TOP, width, height)]
    for row in _some(len(rows), int(height / 13)):
        y = TOP + (row + 0.5) * height / len(rows) + 4
        body.append(f'<text x="{LEFT - 5}" y="{y:.1f}" text-anchor="end">{escape(rows[row])}</text>')
    for column in _some(len(columns), 8):
        x = LEFT + (column + 0.5) * width / len(columns)
        body.append(f'<text x="{x:.1f}" y="{TOP + height + 14:.1f}" text-anchor="middle">{escape(columns[column])}</text>')
    body.append(_image(np.linspace(highest, lowest, 32)[:, None], lowest, highest, scale_at, TOP, 10, height))
    for value, y in ((highest, TOP + 8), (lowest, TOP + height)):
        body.append(f'<text x="{scale_at + 13}" y="{y:.1f}">{number_text(value)}</text>')
    return _svg(TOP + height + BOTTOM, label, "".join(body))


def number_text(value: float) -> str:
    """A number in at most six characters or so: 0.0013, 1.25, 340, 12k, 3.4M."""
    if not math.isfinite(value):
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (1e4 if letter == "k" else 0.9995 * size):  # what is a little less would be rounded up to it
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * digit for digit in (1, 2, 5, 10) if span / (power * digit) <= most)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Frame:
    """A plotted area with its axes."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    label: str

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / ((self.y_high - self.y_low) or 1.0) * (HEIGHT - TOP - BOTTOM)

    def svg(self, body: str) -> str:
        axes = []
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            axes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            axes.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{number_text(value)}</text>')
        for value in ticks(self.x_low, self.x_high, 6):
            if value == int(value):
                axes.append(f'<text x="{self.x(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number_text(value)}</text>')
        return _svg(HEIGHT, self.label, "".join(axes) + body)


def _frame(x: np.ndarray, y: np.ndarray, label: str) -> _Frame:
    known = y[np.isfinite(y)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if high == low:  # a constant stands in the middle, but 0 on the axis
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if high else (0.0, 1.0)
    return _Frame(float(x.min()), float(x.max()), low, high + 0.04 * (high - low), label)


def _svg(height: float, label: str, body: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}">'
        f"<title>{escape(label)}</title>{body}</svg>"
    )


def _image(grid_RC: np.ndarray, lowest: float, highest: float, x: float, y: float, width: float, height: float) -> str:
    png = base64.b64encode(png_bytes(heat_pixels(grid_RC, lowest, highest))).decode("ascii")
    return (
        f'<image class="cells" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{png}"/>'
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    """The points joined by lines, except where one is not known."""
    text, drawing = [], False
    for x, y in points:
        if math.isfinite(y):
            text.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        drawing = math.isfinite(y)
    return "".join(text)


def _thinned(x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: means of runs of neighbours, of those that are known."""
    run = math.ceil(len(x_N) / MOST_POINTS)
    if run <= 1:
        return x_N, y_N
    starts = np.arange(0, len(x_N), run)
    known = np.isfinite(y_N)
    counts = np.add.reduceat(known.astype(float), starts)
    sums = np.add.reduceat(np.where(known, y_N, 0.0), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.add.reduceat(x_N.astype(float), starts) / np.diff([*starts, len(x_N)]), sums / np.where(counts, counts, np.nan)


def _some(count: int, most: int) -> range:
    """About `most` of the indices 0 to `count`, at equal distances."""
    return range(0, count, max(1, math.ceil(count / max(most, 1))))

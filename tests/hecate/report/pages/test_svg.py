"""Charts as text."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from hecate.report.pages.heat import heat_pixels, png_bytes
from hecate.report.pages.page_parts import legend
from hecate.report.pages.style import STYLE
from hecate.report.pages.svg import COLOURS, MOST_POINTS, Bar, Line, area_chart, bar_chart, heat_chart, line_chart, number_text, ticks


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_a_picture_of_cells_is_read_back() -> None:
    pixels = heat_pixels(np.array([[0.0, 1.0, np.nan], [2.0, -1.0, 0.5]]), 0.0, 1.0)
    read = (imread(io.BytesIO(png_bytes(pixels))) * 255).round().astype(np.uint8)
    assert np.array_equal(read, pixels)
    assert pixels[0, 0].tolist() == pixels[1, 1].tolist() == [68, 1, 84, 255], "the lowest value, and what is less"
    assert pixels[0, 1].tolist() == pixels[1, 0].tolist() == [253, 231, 37, 255], "the highest value, and what is more"
    assert pixels[0, 2, 3] == 0, "what is not known is transparent"


def test_a_line_is_interrupted_where_nothing_is_known() -> None:
    svg = parsed(line_chart([Line("loss", np.arange(5), np.array([1.0, 2.0, np.nan, 3.0, 1.0]))], "loss <by> step", marks=[3]))
    assert svg.attrib["aria-label"] == "loss <by> step"
    (path,) = svg.iter("path")
    assert re.sub(r"[0-9. ]+", "", path.attrib["d"]) == "MLML"
    assert len([line for line in svg.iter("line") if line.attrib["class"] == "mark"]) == 1


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 1.0), (5.0, 4.5, 5.5)])
def test_a_constant_has_an_axis(value: float, low: float, high: float) -> None:
    svg = parsed(line_chart([Line("x", np.arange(3), np.full(3, value))], "x"))
    shown = [float(text.text or "") for text in svg.iter("text") if text.get("text-anchor") == "end"]
    assert low <= min(shown) <= value <= max(shown) <= high + 0.1


def test_long_lines_are_thinned_to_means() -> None:
    count = 10 * MOST_POINTS
    svg = parsed(line_chart([Line("x", np.arange(count), np.tile([0.0, 2.0], count // 2))], "x", from_zero=True))
    (path,) = svg.iter("path")
    heights = {point.split()[1] for point in re.split("[ML]", path.attrib["d"])[1:]}
    assert len(re.findall("[ML]", path.attrib["d"])) == MOST_POINTS
    assert len(heights) == 1


def test_areas_lie_on_each_other() -> None:
    svg = parsed(area_chart(np.arange(2), [("a", np.array([1.0, 1.0])), ("b", np.array([2.0, np.nan]))], "stack"))
    first, second = ([tuple(map(float, p.split(","))) for p in one.attrib["points"].split()] for one in svg.iter("polygon"))
    assert first[:2] == list(reversed(second[2:])), "the lower edge of the second is the upper edge of the first"
    assert second[0][1] < first[0][1]
    assert second[1][1] == first[1][1], "what is not known counts nothing"


def test_bars_with_goals() -> None:
    svg = parsed(bar_chart([Bar("rank 0", 5.0, 10.0), Bar("rank 1", 2.5)], "bars", str))
    wide, narrow = (float(bar.attrib["width"]) for bar in svg.iter("rect"))
    assert wide == pytest.approx(2 * narrow, abs=0.2)
    (goal,) = svg.iter("line")
    assert float(goal.attrib["x1"]) == pytest.approx(70 + 2 * wide, abs=0.2)


def test_a_heat_map_names_some_rows_and_columns() -> None:
    svg = parsed(heat_chart(np.ones((96, 64)), "map", highest=2.0, rows=list(map(str, range(96))), columns=list(map(str, range(64)))))
    texts = [text.text for text in svg.iter("text")]
    assert texts[0] == "0"
    assert len(texts) < 40


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00125, "0.00125"),
        (1.234, "1.23"),
        (340.4, "340"),
        (999.7, "1000"),
        (4096, "4096"),
        (12345, "12.3k"),
        (-999_700, "-1M"),
        (3.4e6, "3.4M"),
        (float("nan"), "-"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number_text(value) == text


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3.0, 14.0) == [0, 5, 10]
    assert ticks(2.0, 2.0) == [2.0]


def test_every_colour_has_a_light_and_a_dark_value() -> None:
    for number in range(COLOURS):
        assert STYLE.count(f"--c{number}:#") == 2
        assert f".c{number}{{" in STYLE
    assert f'class="c{COLOURS - 1}"' in legend([str(number) for number in range(COLOURS + 1)])

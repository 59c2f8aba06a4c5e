"""The figures of a page are those of the recordings that it names, at the commits that it says (`benchmarks.pages`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.pages import SAID, SECTIONS, named, pieces, recording_of

ROOT = Path(__file__).parents[2]
FIGURE = re.compile(r"\d+\.\d+x?|\d+/\d+|\d+ %|\d+x\b")
"""what is measured, and not counted: a decimal, a share, or a number of times"""


def text_of(page: str) -> str:
    return one_line((ROOT / page).read_text(encoding="utf-8"))


def one_line(text: str) -> str:
    return " ".join(text.split())


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page} has no heading {heading}"
    return found[2]


def figures_beside(text: str, said: list[str]) -> list[str]:
    """The figures of a text that are in none of these pieces; what is code, or where a link goes, is no figure."""
    text = one_line(text)
    for piece in said:
        text = text.replace(one_line(piece), " ")
    return FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text))


@pytest.mark.parametrize("page", SAID)
def test_a_page_says_of_its_recordings_what_they_hold(page: str) -> None:
    text = text_of(page)
    missing = [piece for piece in pieces(page) if one_line(piece) not in text]
    assert not missing, f"{page} does not say\n\n" + "\n\n".join(missing)


@pytest.mark.parametrize("page", SECTIONS)
def test_each_figure_names_its_recording(page: str) -> None:
    assert figures_beside(section(page, SECTIONS[page]), list(pieces(page))) == [], f"{page}: these figures name no recording"


def test_a_figure_that_no_piece_has_is_found() -> None:
    text = "A step takes\n1.24 of LoRA's, `0.5` and [this](page-1.5.md), which is 3 % and 1/66 of 2.0x."
    assert figures_beside(text, ["takes 1.24 of LoRA's"]) == ["3 %", "1/66", "2.0x"]
    assert figures_beside(text, ["takes 1.25 of LoRA's"])[0] == "1.24"


def test_a_recording_is_named_with_the_commits_of_its_runs() -> None:
    assert named("x", {"commit": "abc"}) == "`benchmarks/results/x.json`, commit abc"
    assert named("x", {"runs": [{"commit": "a"}, {"commit": "b"}, {"commit": "c"}]}) == "`benchmarks/results/x.json`, commits a to c"
    assert all("commit" in run for run in recording_of("methods")["runs"])

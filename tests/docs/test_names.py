"""Tables of names in the docs have those that are registered. docs/use/configuration.md is made from the schema."""

from __future__ import annotations

import re

import pytest

from hecate.experts.families import ROUTERS
from hecate.experts.pairs.gradient_rules import pair_rules
from hecate.experts.pairs.source_table import PAIR_SOURCES
from hecate.experts.routers.by_input.token import SCORES
from hecate.parallel.planners import POLICIES
from tests.rooms import ROOT


def page(name: str) -> str:
    return (ROOT / "docs" / "design" / name).read_text(encoding="utf-8")


def test_each_policy_has_its_row() -> None:
    table = page("planners.md").split("| policy | ", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(POLICIES)


@pytest.mark.parametrize(
    ("heading", "names"),
    [("The parts", PAIR_SOURCES), ("The parts", pair_rules()), ("What a router chooses by", ROUTERS), ("What a router chooses by", SCORES)],
)
def test_each_part_of_experts_is_named_under_its_heading(heading: str, names: dict[str, object]) -> None:
    said = page("experts.md").split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    assert set(names) <= set(re.findall(r"`(\w+)`", said))

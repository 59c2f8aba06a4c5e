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
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_each_policy_has_its_row() -> None:
    table = page("planners.md").split("| policy | ", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(POLICIES)


@pytest.mark.parametrize(("key", "names"), [("input", ROUTERS), ("score", SCORES)])
def test_each_choice_of_a_router_is_in_its_row(key: str, names: dict[str, object]) -> None:
    row = re.search(rf"^\| `{key}` \| ([^|]*) \|", page("experts.md"), re.MULTILINE)
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row[1])) == set(names)


@pytest.mark.parametrize("names", [PAIR_SOURCES, pair_rules()])
def test_each_pair_source_and_rule_is_named(names: dict[str, object]) -> None:
    parts = page("experts.md").split("## The parts", 1)[1].split("\n## ", 1)[0]
    assert set(names) <= set(re.findall(r"`(\w+)`", parts))

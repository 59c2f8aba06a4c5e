"""docs/support.md is what docs/make_support.py writes."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from tests.rooms import ROOT

PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "make_support.py"))


def test_the_tables_of_settings_and_of_what_is_not_supported_are_the_rules(program: dict[str, Any]) -> None:
    """If this fails: python docs/make_support.py."""
    rows, reasons = program["numbered"](program["setting_rows"]())
    for line in (*program["table"](["setting", *program["KINDS"]], rows), *program["table"](["what"], program["not_supported"]())[2:]):
        assert line in PAGE.splitlines()
    for number, reason in enumerate(reasons, 1):
        assert f"{number}. {reason}" in PAGE


@pytest.mark.slow
def test_the_page_is_the_programs(program: dict[str, Any]) -> None:
    assert program["page"]() == PAGE

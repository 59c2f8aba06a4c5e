"""docs/use/support.md is what docs/make_support.py writes."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch

from tests.hecate.model.tiny import tiny
from tests.rooms import ROOT

PAGE = (ROOT / "docs" / "use" / "support.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "make_support.py"))


def test_the_tables_of_settings_and_of_what_is_not_supported_are_the_rules(program: dict[str, Any]) -> None:
    """If this fails: python docs/make_support.py."""
    rows, reasons = program["numbered"](program["setting_rows"]())
    settings = program["table"](["setting", *program["KINDS"]], program["together"](rows))
    for line in (*settings, *program["table"](["what"], program["not_supported"]())[2:]):
        assert line in PAGE.splitlines()
    for number, reason in enumerate(reasons, 1):
        assert f"{number}. {reason}" in PAGE


@pytest.mark.slow
def test_the_page_is_the_programs(program: dict[str, Any]) -> None:
    assert program["page"]() == PAGE


def test_a_model_whose_logits_are_refused_is_not_called_supported(program: dict[str, Any]) -> None:
    model = tiny("llama", torch.float32)
    assert program["answers_with_logits"](["yes", "has none"], model) == ["yes", "has none"]
    model.register_forward_hook(lambda module, given, outputs: setattr(outputs, "logits", 3 * outputs.logits))
    changed, other = program["answers_with_logits"](["yes", "has none"], model)
    assert "does more between its decoder and its logits" in changed
    assert other == "has none"

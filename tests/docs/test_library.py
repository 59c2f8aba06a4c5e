"""The code of docs/use/library.md runs as it stands there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.rooms import ROOT


def test_the_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "use" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/use/library.md", "exec"), names)
    shown = capsys.readouterr().out
    assert re.findall(r"^(static_ep|mine|auto) +[\d.]+ ms", shown, re.MULTILINE) == ["static_ep", "mine", "auto"]
    seconds = {one.policy: one.step_seconds for one in names["found"]}
    assert seconds["auto"] < seconds["mine"] < seconds["static_ep"]

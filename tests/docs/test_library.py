"""The code of docs/use/library.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from testing.tiny_run import make_workshop
from tests.rooms import ROOT


def test_the_blocks_run_in_order(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "use" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    monkeypatch.chdir(make_workshop(tmp_path))
    for block in blocks:
        exec(compile(block, "docs/use/library.md", "exec"), names)
    assert names["result"].step == 20
    shown = capsys.readouterr().out
    assert re.findall(r"^(static_ep|mine|auto) +[\d.]+ ms", shown, re.MULTILINE) == ["static_ep", "mine", "auto"]
    seconds = {one.policy: one.step_seconds for one in names["found"]}
    assert seconds["auto"] < seconds["mine"] < seconds["static_ep"]

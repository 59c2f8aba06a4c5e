"""Each promise of SECURITY.md names a test that there is."""

from __future__ import annotations

import re

from tests.rooms import ROOT


def test_every_promise_is_held_by_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| (.*) \|$", text.partition("## What is promised")[2], re.MULTILINE)[1:]
    assert len(rows) >= 16
    for promise, held_by in rows:
        found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", held_by)
        assert found is not None, promise
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text(encoding="utf-8"), held_by

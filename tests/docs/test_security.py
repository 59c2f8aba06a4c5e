"""Each promise of SECURITY.md names a test that there is, and the drills that hold it."""

from __future__ import annotations

import re

from hecate.drill.catalogue import DRILLS
from tests.rooms import ROOT


def test_every_promise_is_held_by_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", text.partition("## What is promised")[2], re.MULTILINE)[1:]
    assert len(rows) >= 24
    for promise, drills, held_by in rows:
        assert drills == "-" or set(drills.split(", ")) <= set(DRILLS), promise
        found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", held_by)
        assert found is not None, promise
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text(encoding="utf-8"), held_by
    assert {"R9", "R16", "R17", "R21", "R22"} <= {drill for _, drills, _ in rows for drill in drills.split(", ")}

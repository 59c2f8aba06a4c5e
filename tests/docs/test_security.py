"""Each promise of SECURITY.md names a test that there is, and the drills that hold it."""

from __future__ import annotations

import re

from hecate.apps.check.drill.catalogue import DRILLS
from tests.rooms import ROOT

ROW = re.compile(r"^\| (.*) \| (\S[^|]*) \| `(tests/[\w/]+\.py)::(test_\w+)` \|$", re.MULTILINE)


def test_every_promise_is_held_by_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    given, _, after_faults = text.partition("## What is promised after which fault")
    for table, least in ((given, 40), (after_faults, 16)):
        lines = [line for line in table.splitlines() if line.startswith("|") and not line.startswith(("|---", "| who gives", "| fault"))]
        rows = ROW.findall(table)
        assert len(rows) == len(lines) >= least, set(lines) - {line for line in lines if ROW.fullmatch(line)}
        for promise, drills, file, test in rows:
            assert drills == "-" or set(drills.split(", ")) <= set(DRILLS), promise
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), promise
    assert {"R21", "R22"} <= {drill for _, drills, *_ in ROW.findall(text) for drill in drills.split(", ")}

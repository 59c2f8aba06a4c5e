"""Make all checks, and show what they found as a table or as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import hecate
from hecate.apps.check.doctor import machine, software
from hecate.apps.check.doctor.finding import Checks, Finding, problem

CHECKS: Checks = {**machine.CHECKS, **software.CHECKS}
"""those that need no configuration"""
_WIDTH = 100
_NEEDS_TORCH = "torch import"


def examine(checks: Checks) -> dict[str, Finding]:
    """The findings by the checks' names, in their order. A check that fails itself is a problem, and the others are made all the same."""
    found: dict[str, Finding] = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # noqa: BLE001 - whatever is broken here is what the user is looking for
            broken = f"the check failed with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            hint = f"see {_NEEDS_TORCH}" if found.get(_NEEDS_TORCH, Finding("ok", "")).state == "problem" else "report it"
            found[name] = problem(broken, hint)
    return found


def healthy(found: Mapping[str, Finding]) -> bool:
    return not any(finding.state == "problem" for finding in found.values())


def findings_text(found: Mapping[str, Finding]) -> str:
    """A line for each check, and below those that need it how to mend it; at the end the counts."""
    width = max(map(len, found))
    lines = []
    for name, finding in found.items():
        first, *others = finding.what.splitlines() or [""]
        lines.append(f"{finding.state:8} {name:{width}}  {first}")
        lines += [" " * (width + 11) + other for other in others]
        if finding.mend:
            lines += textwrap.wrap(finding.mend, _WIDTH, initial_indent=" " * (width + 11) + "-> ", subsequent_indent=" " * (width + 14))
    states = [finding.state for finding in found.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "warning", "problem", "skipped") if state in states)
    return "\n".join([*lines, f"hecate {hecate.__version__}: {len(found)} checks: {counts}"])


def findings_json(found: Mapping[str, Finding]) -> dict[str, Any]:
    """For a bug report."""
    checks = {name: {"state": finding.state, "what": finding.what, "mend": finding.mend} for name, finding in found.items()}
    return {"hecate": hecate.__version__, "healthy": healthy(found), "checks": checks}

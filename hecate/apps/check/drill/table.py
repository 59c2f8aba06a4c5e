"""Drills and their outcomes as text and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import hecate
from hecate.apps.check.drill.catalogue import Drill
from hecate.apps.check.drill.outcome import DrillOutcome
from hecate.apps.check.drill.prove import PROOFS
from hecate.apps.check.drill.run import DrillReport

_WIDTH = 110
_MOST_FAILURES = 5
_KILLS, _FLIPS = "R1", "R8"


def list_text(drills: Iterable[Drill]) -> str:
    """A line for each drill."""
    return "\n".join(f"{drill.name:4} {drill.fault}: {drill.expected}" for drill in drills)


def report_text(report: DrillReport) -> str:
    """The rows of one drill: its state and counts, fault, what was expected, what was seen, and what failed."""
    drill, outcome = report.drill, report.outcome
    lines = [f"{drill.name:4} {drill_state(outcome):11} {outcome.passed:>6}/{outcome.total:<6} {report.seconds:6.1f} s  {drill.fault}"]
    figures = ", ".join(f"{name} {value:.4g}" for name, value in outcome.counts.items())
    for label, text in (("expected", drill.expected), ("seen", outcome.seen), ("figures", figures)):
        if text:
            lines += textwrap.wrap(f"{label}: {text}", _WIDTH, initial_indent=" " * 5, subsequent_indent=" " * 8)
    shown = outcome.failures[:_MOST_FAILURES]
    lines += [f"     failed: {text}" for text in shown]
    if len(outcome.failures) > len(shown):
        lines.append(f"     and {len(outcome.failures) - len(shown)} more")
    lines += [f"     too slow: {text}" for text in outcome.too_slow]
    return "\n".join(lines)


def proof_text(report: DrillReport) -> str:
    """Whether a drill has failed without its feature, as it must."""
    outcome, feature = report.outcome, PROOFS[report.drill.name].feature
    found = "passes all the same" if outcome.ok else f"fails, {outcome.total - outcome.passed} of {outcome.total} cases"
    first = "" if outcome.ok else f"\n     {(outcome.failures or outcome.too_slow or (outcome.seen,))[0][:300]}"
    return f"{report.drill.name:4} without {feature}: {found} ({report.seconds:.1f} s){first}"


def proofs_text(reports: Sequence[DrillReport]) -> str:
    passed = [report.drill.name for report in reports if report.outcome.ok]
    text = (
        f"hecate {hecate.__version__}: {len(reports) - len(passed)} of {len(reports)} drills fail without what they are about, as they must"
    )
    return text + (f"; passed all the same: {', '.join(passed)}" if passed else "")


def summary_text(reports: Sequence[DrillReport]) -> str:
    passed = sum(report.outcome.ok for report in reports)
    failed = ", ".join(f"{report.drill.name} ({drill_state(report.outcome)})" for report in reports if not report.outcome.ok)
    seconds = sum(report.seconds for report in reports)
    text = f"hecate {hecate.__version__}: {passed} of {len(reports)} drills passed in {seconds:.0f} s"
    return text + (f"; not passed: {failed}" if failed else "")


def drill_state(outcome: DrillOutcome) -> str:
    return "passed" if outcome.ok else "not decided" if outcome.undecided else "failed"


def proofs_json(reports: Sequence[DrillReport]) -> dict[str, Any]:
    """The same of drills without what they are about."""
    rows = [
        {
            "name": report.drill.name,
            "without": PROOFS[report.drill.name].feature,
            "failed": not report.outcome.ok,
            "failed_cases": report.outcome.total - report.outcome.passed,
            "cases": report.outcome.total,
            "first_failure": (report.outcome.failures or report.outcome.too_slow or ("",))[0],
        }
        for report in reports
    ]
    summary = {"failed": sum(not report.outcome.ok for report in reports), "total": len(reports)}
    return {"name": "drill_proofs", "hecate": hecate.__version__, "rows": rows, "summary": summary}


def drills_json(reports: Sequence[DrillReport]) -> dict[str, Any]:
    """All figures, in the form of a benchmark's: a row for each drill, and a summary."""
    rows = [
        {
            "name": report.drill.name,
            "fault": report.drill.fault,
            "expected": report.drill.expected,
            "state": drill_state(report.outcome),
            "seconds": report.seconds,
            **vars(report.outcome),
        }
        for report in reports
    ]
    of_drill = {report.drill.name: report.outcome for report in reports}
    summary: dict[str, float] = {"passed": sum(report.outcome.ok for report in reports), "total": len(reports)}
    if kills := of_drill.get(_KILLS):
        summary |= {"kill_points": kills.total, "kill_points_equal": kills.passed}
    if flips := of_drill.get(_FLIPS):
        summary["bit_flips_found_share"] = flips.passed / flips.total
    return {"name": "drill", "hecate": hecate.__version__, "rows": rows, "summary": summary}

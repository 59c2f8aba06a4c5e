"""Faults can be put into a process in one place, and nothing that trains for a user does so."""

from __future__ import annotations

import ast

import pytest

from hecate import faults
from tests.rooms import ROOT, sources


def test_nothing_happens_unless_armed_and_then_each_place_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, object]] = []
    monkeypatch.setenv("HECATE_FAULTS", "kill")
    faults.at("forward")
    faults.arm(lambda place, subject: seen.append((place, subject)))
    try:
        faults.at("step", 3)
        faults.at("norm")
    finally:
        faults.arm(None)
    faults.at("stepped")
    assert seen == [("step", 3), ("norm", None)]


def calls_of_arm(text: str) -> bool:
    return any(isinstance(node, ast.Attribute) and ast.unparse(node) == "faults.arm" for node in ast.walk(ast.parse(text)))


def test_only_the_drills_arm_a_process_and_no_program_of_training_imports_them() -> None:
    paths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources("hecate", "parallel", "kernels", "launch")}
    assert {path for path, text in paths.items() if calls_of_arm(text)} == {
        "hecate/apps/check/drill/armed.py",
        "hecate/apps/check/drill/cases/naming.py",
        "hecate/apps/check/drill/cases/numbers.py",
    }
    importing = {
        path for path, text in paths.items() if "hecate.apps.check.drill" in text and not path.startswith("hecate/apps/check/drill/")
    }
    assert importing == {"hecate/cli/drills.py", "hecate/faults.py"}, "the last one names the room in a text"
    assert "import hecate" not in paths["hecate/faults.py"]

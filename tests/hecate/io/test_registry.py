"""Folders whose files are things that the configuration names."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.io.registry import registered, registered_names
from hecate.parallel.values.policy_names import POLICY_ORDER

SOURCES = "hecate.experts.pairs.sources"


def test_names_are_those_of_files_with_the_first_before_the_others() -> None:
    assert registered_names(SOURCES) == ("fixed_a", "nola", "plain", "shards")
    assert registered_names(SOURCES, ("shards", "plain", "missing")) == ("shards", "plain", "fixed_a", "nola")
    assert registered_names("hecate.parallel.planners.policies", POLICY_ORDER) == POLICY_ORDER


def test_what_is_registered_is_what_files_call_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hecate.io.registry._ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "colours"
    folder.mkdir()
    for name, value in (("__init__", 0), ("red", 1), ("blue", 2)):
        (folder / f"{name}.py").write_text(f"COLOUR = {value}\n", encoding="utf-8")
    (folder / "notes.txt").write_text("no module", encoding="utf-8")
    assert registered_names("hecate.colours") == ("blue", "red")
    monkeypatch.setattr("hecate.io.registry.import_module", lambda name: __import__(name.removeprefix("hecate."), fromlist=["COLOUR"]))
    assert registered("hecate.colours", "COLOUR", ("red",)) == {"red": 1, "blue": 2}

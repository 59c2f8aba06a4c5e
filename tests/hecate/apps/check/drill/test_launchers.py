"""Runs of drills are started as each launcher does, and only ranks that begin a run meet its faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hecate.apps.check.drill.armed import Injected, to_text
from hecate.apps.check.drill.launchers import LaunchRequest, armed_worker, request_of
from hecate.launch.ray_job.worker import Worker


def test_a_request_survives_its_way_through_a_command_line() -> None:
    asked = LaunchRequest(
        launcher="ray",
        start=("python", "-m"),
        injected="[]",
        trace="t",
        joins=False,
        arguments=("c", "k=v"),
        ranks=4,
        survives=True,
        restarts=0,
    )
    assert request_of(json.dumps(vars(asked))) == asked


def test_the_workers_that_replace_lost_ones_on_ray_meet_no_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[Any] = []
    monkeypatch.setattr(
        "hecate.apps.check.drill.armed.arm_process", lambda injected, rank, trace: armed.append((rank, list(injected), trace))
    )
    monkeypatch.setattr(Worker, "__init__", lambda *_: None)
    monkeypatch.setattr(Worker, "events", lambda _: iter([{"code": "up"}]))
    fault = Injected(action="kill", place="norm", rank=1, step=2)
    kind = armed_worker(to_text([fault]), str(tmp_path / "trace"), 2)
    for number in (1, 2):
        assert list(kind(number, "127.0.0.1", 1, "", "", 1, "").events()) == [{"code": "up"}]
    assert armed == [(1, [fault], tmp_path / "trace"), (2, [], tmp_path / "trace")]
